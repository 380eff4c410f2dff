"""ppo.py: its functions by hand and against plain loops, and its critic."""
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import (AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification,
                          GPT2ForTokenClassification, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification,
                          LlamaForTokenClassification)

import common
import modeling
import ppo
import reward_model
from helpers.unit import batch, close, float64, make_run, refuses, word_tokenizer


# --- token_rewards

def test_the_score_is_on_the_last_token_and_each_token_pays_its_kl():
    # lengths 3, 1, 2, then arbitrary values; the last token is the end of sequence
    kl = float64([0.5, -1.0, 2.0], [3.0, 9.0, 9.0], [1.0, 1.0, 9.0])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    rewards = ppo.token_rewards(float64(10, 20, -5), kl, mask, 0.1)
    close(rewards, float64([-0.05, 0.1, 9.8], [19.7, 0, 0], [-0.1, -5.1, 0]))
    close(rewards.sum(1), float64(10, 20, -5) - 0.1 * (kl * mask).sum(1))  # r - beta * KL in all
    assert kl[1, 1] == 9  # the arguments are unchanged


def test_a_completion_without_tokens_changes_nothing_for_the_others():
    rewards = ppo.token_rewards(float64(0, 2), torch.zeros(2, 2).double(), torch.tensor([[0, 0], [1, 1]]), 0.1)
    close(rewards, float64([0, 0], [0, 2]))


# --- gae

def slow_gae(rewards, values, length, gamma, lam):
    """Eq. 16 as a sum, for each token on its own."""
    V = values[:length] + [0.0]
    delta = [rewards[t] + gamma * V[t + 1] - V[t] for t in range(length)]
    return [sum((gamma * lam) ** (i - t) * delta[i] for i in range(t, length)) for t in range(length)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_against_the_sum(gamma, lam):
    lengths = (5, 1, 3)
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    rewards, values = torch.randn(2, 3, 5, dtype=torch.float64)  # arbitrary after the ends
    before = rewards.clone(), values.clone()
    A, R = ppo.gae(rewards, values, mask, gamma, lam)
    for i, n in enumerate(lengths):
        close(A[i, :n], float64(*slow_gae(rewards[i].tolist(), values[i].tolist(), n, gamma, lam)))
        assert A[i, n:].abs().sum() == 0 and R[i, n:].abs().sum() == 0
    close(R, (A + values) * mask)
    assert torch.equal(before[0], rewards) and torch.equal(before[1], values)


def test_gae_with_lambda_1_and_0_by_hand():
    rewards, values, mask = float64([1, 2, 4]), float64([0.5, 1, 3]), torch.ones(1, 3)
    # lambda 1: the rewards to come, minus the value; lambda 0: one step and the next value
    close(ppo.gae(rewards, values, mask, 1.0, 1.0)[0], float64([6.5, 5, 1]))
    close(ppo.gae(rewards, values, mask, 1.0, 0.0)[0], float64([1.5, 4, 1]))


# --- policy_loss, value_loss, beta_change

# as in test_grpo.py: loss, gradient on the log-prob, clipped below, clipped above
@pytest.mark.parametrize("A, ratio, loss, grad, low, high", [
    (2, 1.0, -2.0, -2.0, False, False), (2, 1.1, -2.2, -2.2, False, False),
    (2, 1.5, -2.6, 0.0, False, True), (2, 0.5, -1.0, -1.0, False, False),
    (-2, 1.5, 3.0, 3.0, False, False), (-2, 0.5, 1.6, 0.0, True, False),
    (2, 1.25, -2.5, -2.5, False, False), (-2, 0.85, 1.7, 1.7, False, False)])
def test_clipped_ratio_by_hand(A, ratio, loss, grad, low, high):
    logprobs = float64([-1.0]).requires_grad_()
    found = ppo.policy_loss(logprobs, logprobs.detach() - math.log(ratio), float64([A]), 0.2, 0.3)
    found[0].sum().backward()
    assert (found[0].item(), logprobs.grad.item()) == pytest.approx((loss, grad), abs=1e-12)
    assert (found[1].item(), found[2].item()) == (low, high)


def test_each_token_has_its_own_ratio_and_advantage():
    old = float64([-1.0, -2.0, -3.0])
    new = (old + float64([1.5, 1.5, 0.5]).log()).requires_grad_()
    loss, low, high = ppo.policy_loss(new, old, float64([1, -1, -1]), 0.2, 0.2)
    loss.sum().backward()
    close(loss, float64([-1.2, 1.5, 0.8]))
    close(new.grad, float64([0, 1.5, 0]))
    assert low.tolist() == [[False, False, True]] and high.tolist() == [[True, False, False]]


# V_old 1, value_clip 0.2. (new value, return) -> loss, gradient. The larger of the two losses: no
# gradient once a value has moved 0.2 towards the return, and all of it if it moved away.
@pytest.mark.parametrize("value, R, loss, grad", [
    (1.1, 2.0, 0.81 / 2, -0.9),   # inside: both are the same
    (1.5, 2.0, 0.64 / 2, 0.0),    # towards the return, too far: (1.2 - 2)^2
    (0.5, 2.0, 2.25 / 2, -1.5),   # away from it: (0.5 - 2)^2, as (0.8 - 2)^2 is less
    (0.5, 0.0, 0.64 / 2, 0.0),    # towards it, downwards: (0.8 - 0)^2
    (1.5, 0.0, 2.25 / 2, 1.5),
    (3.0, 2.0, 1.0 / 2, 1.0)])    # beyond it: (3 - 2)^2 is more than (1.2 - 2)^2
def test_value_clipping_by_hand(value, R, loss, grad):
    values = float64([value]).requires_grad_()
    found = ppo.value_loss(values, float64([1.0]), float64([R]), 0.2)
    found.sum().backward()
    assert (found.item(), values.grad.item()) == pytest.approx((loss, grad), abs=1e-12)


def test_without_value_clipping_it_is_half_the_squared_error():
    values = float64([1.5, -2.0]).requires_grad_()
    loss = ppo.value_loss(values, float64([0, 0]), float64([2, 1]), 0.0)
    loss.sum().backward()
    close(loss, float64([0.125, 4.5]))
    close(values.grad, float64([-0.5, -3]))


def test_beta_change_by_hand():
    # target 6 nats, 256 completions, horizon 10000; the relative error is clipped at 0.2
    args = ppo.Args(kl_target=6.0, kl_horizon=10_000)
    for kl, factor in ((6, 1), (6.6, 1 + 0.1 * 0.0256), (60, 1 + 0.2 * 0.0256),
                       (5.4, 1 - 0.1 * 0.0256), (0, 1 - 0.2 * 0.0256), (-3, 1 - 0.2 * 0.0256)):
        assert ppo.beta_change(kl, 256, args) == pytest.approx(factor)
    assert ppo.beta_change(0, 100_000, args) == pytest.approx(0.8)  # never below 0, however many completions


def test_explained_variance():
    """1 for a perfect critic, 0 for the best constant, less for a biased one; only where the mask is 1."""
    returns, mask = torch.randn(6, 9), (torch.rand(6, 9) < 0.7).long()
    explained = ppo.explained_variance
    assert explained(returns, returns, mask).item() == 1
    constant = torch.full_like(returns, returns[mask == 1].mean().item())
    assert explained(constant, returns, mask).item() == pytest.approx(0, abs=1e-6)
    assert explained(constant + 1, returns, mask) < 0  # the errors' mean counts
    values = returns + 0.5 * torch.randn(6, 9)
    kept = mask == 1
    expected = 1 - (returns - values)[kept].square().mean() / returns[kept].var(correction=0)
    assert explained(values, returns, mask).item() == pytest.approx(expected.item(), abs=1e-5)
    spoiled = torch.where(kept, values, 1e4)
    assert explained(spoiled, returns, mask).item() == pytest.approx(expected.item(), abs=1e-5)
    assert explained(torch.zeros(2, 2), torch.ones(2, 2), torch.ones(2, 2)).isfinite()


# --- completion_values

def llama_critic():
    return LlamaForTokenClassification(LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_labels=1, initializer_range=0.3)).eval()


def gpt2_critic():  # learned positions: counting padding would show
    return GPT2ForTokenClassification(GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=64, num_labels=1,
        initializer_range=0.3)).eval()


PROMPTS, COMPLETIONS = [[5, 6, 7, 8], [9], [10, 11]], [[12, 13, 2], [14, 2], [15, 16, 17, 18, 2]]


def values_of(critic, prompts=PROMPTS, completions=COMPLETIONS, pad_id=2, left=0, right=0):
    """The default pad_id is the end of sequence, which is the hard case."""
    with torch.no_grad():
        return ppo.completion_values(critic, *batch(prompts, completions, pad_id, left, right))


@pytest.mark.parametrize("make", [llama_critic, gpt2_critic])
def test_values_are_those_of_a_loop_over_tokens(make):
    """values[:, t] is read before token t: token t does not change it."""
    critic, expected = make(), torch.zeros(3, 5)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
        for t in range(len(completion)):
            with torch.no_grad():
                expected[i, t] = critic(torch.tensor([prompt + completion[:t]])).logits[0, -1, 0]
    close(values_of(critic), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [llama_critic, gpt2_critic])
@pytest.mark.parametrize("changes", [dict(left=3), dict(right=4), dict(left=5, right=2),
                                     dict(pad_id=0), dict(pad_id=29)], ids=str)
def test_padding_changes_no_value(make, changes):
    critic = make()
    values, padded = values_of(critic), values_of(critic, **changes)
    close(padded[:, :5], values, rtol=1e-4, atol=1e-5)
    assert padded[:, 5:].abs().sum() == 0 and padded.shape[1] == 5 + changes.get("right", 0)


def test_another_row_changes_no_value():
    critic = gpt2_critic()
    for i in range(3):
        alone = values_of(critic, [PROMPTS[i]], [COMPLETIONS[i]])[0]
        close(alone, values_of(critic)[i, :len(alone)], rtol=1e-4, atol=1e-5)


def test_a_rollouts_values_are_those_of_its_micro_batches():
    critic = llama_critic()
    tokenizer = word_tokenizer(["<unk>"] + [f"w{i}" for i in range(29)])
    rollout = common.Rollout(*batch(PROMPTS, COMPLETIONS), tokenizer, torch.tensor([2]))
    for groups in ([torch.tensor([2, 0]), torch.tensor([1])], [torch.arange(3)]):
        values = ppo.rollout_values(critic, rollout, groups)
        close(values, values_of(critic), rtol=1e-4, atol=1e-5)
        assert not values.requires_grad


# --- load_critic

WORDS = ["<unk>"] + [f"w{i}" for i in range(29)]


def save_policy(path, **changes):
    LlamaForCausalLM(LlamaConfig(**{**dict(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64), **changes})).save_pretrained(path)
    word_tokenizer(WORDS).save_pretrained(path)
    return str(path)


def save_reward_model(path, kind, bias=None, words=WORDS, positions=64):
    config = dict(num_labels=1, pad_token_id=0, initializer_range=0.3, **(
        {} if bias is None else {"reward_bias": bias}))
    if kind == "llama":
        model = LlamaForSequenceClassification(LlamaConfig(
            vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=positions, **config))
    else:
        model = GPT2ForSequenceClassification(GPT2Config(
            vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=positions, **config))
    model.save_pretrained(path)
    word_tokenizer(words).save_pretrained(path)
    return str(path)


def load_critic(policy, **flags):
    args = ppo.Args(model=policy, **flags)
    return ppo.load_critic(args, lambda rows, texts: None, common.load_tokenizer(policy), "cpu")


@pytest.mark.parametrize("bias", [None, -1.25])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # their heads are named score and classifier
def test_a_critic_from_a_reward_model_gives_its_scores(tmp_path, kind, bias):
    policy, name = save_policy(tmp_path / "policy"), save_reward_model(tmp_path / "rm", kind, bias)
    scorer, _ = modeling.load_model(AutoModelForSequenceClassification, name, "cpu")
    critic = load_critic(policy, critic=name)
    conversations = [a + b for a, b in zip(PROMPTS, COMPLETIONS)]
    with torch.no_grad():
        scores = common.score_ids(scorer, conversations)
        for ids, score in zip(conversations, scores):
            value = critic(torch.tensor([ids])).logits[0, -1, 0]
            assert value.item() == pytest.approx(score.item(), abs=1e-5)
    assert scores.std() > 0.05


def test_a_critic_from_a_causal_lm_starts_at_zero_and_can_learn(tmp_path):
    critic = load_critic(save_policy(tmp_path / "policy"))
    assert values_of(critic).abs().sum() == 0
    (critic(torch.tensor([[5, 6]])).logits - 1).square().sum().backward()
    assert critic.score.weight.grad.norm() > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_critic_has_no_dropout(tmp_path, kind):
    # transformers puts a dropout of 0.1 before these heads if the config has none
    policy = save_policy(tmp_path / "policy")
    critic = load_critic(policy, critic=save_reward_model(tmp_path / "rm", kind)).train()
    ids = torch.tensor([PROMPTS[0] * 5])
    assert torch.equal(critic(ids).logits, critic(ids).logits)


@pytest.mark.parametrize("flags, expected", [
    ({}, "tiny/reward_model"),  # it reads the policy's tokens: the best start there is
    (dict(reward="tiny/world.py:gold_reward"), "tiny/policy"),
    (dict(critic="tiny/biased_reward_model"), "tiny/biased_reward_model")], ids=str)
def test_what_the_critic_starts_from(capsys, flags, expected):
    args = ppo.Args(**flags)
    reward = common.load_reward(args.reward[0], "cpu")
    critic = ppo.load_critic(args, reward, common.load_tokenizer(args.model), "cpu")
    assert f"the critic starts from {expected}\n" in capsys.readouterr().out
    source = modeling.load_config(expected)
    start, _ = modeling.load_model(AutoModelForSequenceClassification, expected, "cpu", num_labels=1)
    assert torch.equal(critic.get_input_embeddings().weight, start.get_input_embeddings().weight)
    assert source.hidden_size == critic.config.hidden_size and critic.score.out_features == 1


def test_a_reward_model_with_a_shorter_context_is_not_the_critics_start(capsys):
    args, reward = ppo.Args(), common.load_reward("tiny/reward_model", "cpu")
    reward.model.config.max_position_embeddings = 100  # the policy's: 192
    ppo.load_critic(args, reward, common.load_tokenizer(args.model), "cpu")
    assert "the critic starts from tiny/policy\n" in capsys.readouterr().out


def test_a_reward_model_with_another_tokenizer_is_not_the_critics_start(tmp_path, capsys):
    other = save_reward_model(tmp_path / "rm", "llama", words=["<unk>"] + [f"v{i}" for i in range(29)])
    policy = save_policy(tmp_path / "policy")
    args, tokenizer = ppo.Args(model=policy, reward=other), common.load_tokenizer(policy)
    ppo.load_critic(args, SimpleNamespace(model=None), tokenizer, "cpu")
    assert f"the critic starts from {policy}\n" in capsys.readouterr().out
    args.critic = other
    refuses(lambda: ppo.load_critic(args, SimpleNamespace(model=None), tokenizer, "cpu"),
            f"--critic {other}", "tokenizer")


def test_a_critic_with_a_shorter_context_is_refused(tmp_path):
    short = save_reward_model(tmp_path / "rm", "llama", positions=16)
    policy = save_policy(tmp_path / "policy")
    refuses(lambda: load_critic(policy, critic=short), f"--critic {short}", "context", "shorter")
    refuses(lambda: load_critic(policy, critic="tiny/none"), "tiny/none: no such model")


def test_a_policy_with_a_padded_vocabulary(tmp_path, capsys):
    """It may sample a token that its tokenizer lacks: the critic gets rows for these, a reference without is refused."""
    policy, name = save_policy(tmp_path / "policy", vocab_size=32), save_reward_model(tmp_path / "rm", "llama")
    critic = load_critic(policy, critic=name)
    assert critic(torch.tensor([[5, 31]])).logits.isfinite().all()
    args = ppo.Args(model=policy, reference=save_policy(tmp_path / "reference"), device="cpu")
    refuses(lambda: make_run(args).load_reference(modeling.load_causal_lm(policy, "cpu")),
            "--reference", "embeds 30 tokens, and the policy 32")


def test_a_reward_model_with_an_added_pad_token_is_a_critic(tmp_path, capsys):
    """As reward_model.py makes one where the model had none; which critic was taken is printed."""
    policy = save_policy(tmp_path / "policy")
    tokenizer = word_tokenizer(WORDS)
    scorer = reward_model.load_scorer(policy, tokenizer, "cpu")
    scorer.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    assert len(tokenizer) == 31
    reward = common.load_reward(str(tmp_path / "rm"), "cpu")
    ppo.load_critic(ppo.Args(model=policy, reward=str(tmp_path / "rm")), reward, common.load_tokenizer(policy), "cpu")
    assert f"the critic starts from {tmp_path}/rm\n" in capsys.readouterr().out
