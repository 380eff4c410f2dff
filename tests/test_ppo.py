"""ppo.py: its functions by hand and against plain loops, its critic, and its steps."""
import math

import pytest
import torch
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, GPT2Config,
                          GPT2ForSequenceClassification, GPT2ForTokenClassification, LlamaConfig,
                          LlamaForCausalLM, LlamaForSequenceClassification,
                          LlamaForTokenClassification)

import common
import ppo
from common import masked_whiten, pad, score_ids
from test_grpo_math import close, float64
from test_runs import SMALL, rows

nan = float("nan")


def run(tmp_path, name="run", **changes):
    ppo.main(ppo.Args(**(SMALL | dict(prompts_per_step=2, eval_every=0, epochs=2, minibatches=1,
                                      run_dir=str(tmp_path / name)) | changes)))
    return rows(tmp_path / name / "metrics.jsonl")


def weights(folder) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- token_rewards

def test_the_score_is_on_the_last_token_and_drift_is_paid_for():
    # lengths 3, 1, 2; what is behind them is junk; the last token is the end-of-sequence
    kl = float64([0.5, -1.0, 2.0], [3.0, 9.0, 9.0], [1.0, 1.0, 9.0])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    rewards = ppo.token_rewards(float64(10, 20, -5), kl, mask, 0.1)
    close(rewards, float64([-0.05, 0.1, 9.8], [19.7, 0, 0], [-0.1, -5.1, 0]))
    close(rewards.sum(1), float64(10, 20, -5) - 0.1 * (kl * mask).sum(1))  # r - beta * KL in all
    assert kl[1, 1] == 9  # the arguments are left as they are


def test_a_completion_of_no_tokens_does_not_break_the_others():
    rewards = ppo.token_rewards(float64(0, 2), torch.zeros(2, 2).double(),
                                torch.tensor([[0, 0], [1, 1]]), 0.1)
    close(rewards, float64([0, 0], [0, 2]))


# --- gae

def slow_gae(rewards, values, length, gamma, lam):
    """Eq. 16, the sum written out: each token by its own."""
    V = values[:length] + [0.0]
    delta = [rewards[t] + gamma * V[t + 1] - V[t] for t in range(length)]
    return [sum((gamma * lam) ** (i - t) * delta[i] for i in range(t, length))
            for t in range(length)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_against_the_sum(gamma, lam):
    lengths = (5, 1, 3)
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    rewards, values = torch.randn(2, 3, 5, dtype=torch.float64)  # junk behind the ends
    before = rewards.clone(), values.clone()
    A, R = ppo.gae(rewards, values, mask, gamma, lam)
    for i, n in enumerate(lengths):
        close(A[i, :n], float64(*slow_gae(rewards[i].tolist(), values[i].tolist(), n, gamma, lam)))
        assert A[i, n:].abs().sum() == 0 and R[i, n:].abs().sum() == 0
    close(R, (A + values) * mask)
    assert torch.equal(before[0], rewards) and torch.equal(before[1], values)


def test_gae_at_its_ends_by_hand():
    rewards, values, mask = float64([1, 2, 4]), float64([0.5, 1, 3]), torch.ones(1, 3)
    # lam 1: what is still to come, less the value; lam 0: one step and the next value
    close(ppo.gae(rewards, values, mask, 1.0, 1.0)[0], float64([6.5, 5, 1]))
    close(ppo.gae(rewards, values, mask, 1.0, 0.0)[0], float64([1.5, 4, 1]))


# --- policy_loss, value_loss, next_beta

# as in test_grpo_math.py: loss, gradient on the log-prob, clipped below, clipped above
@pytest.mark.parametrize("A, ratio, loss, grad, low, high", [
    (2, 1.0, -2.0, -2.0, False, False), (2, 1.1, -2.2, -2.2, False, False),
    (2, 1.5, -2.6, 0.0, False, True), (2, 0.5, -1.0, -1.0, False, False),
    (-2, 1.5, 3.0, 3.0, False, False), (-2, 0.5, 1.6, 0.0, True, False),
    (2, 1.25, -2.5, -2.5, False, False), (-2, 0.85, 1.7, 1.7, False, False)])
def test_clipped_ratio_by_hand(A, ratio, loss, grad, low, high):
    logprobs = float64([-1.0]).requires_grad_()
    got = ppo.policy_loss(logprobs, logprobs.detach() - math.log(ratio), float64([A]), 0.2, 0.3)
    got[0].sum().backward()
    assert (got[0].item(), logprobs.grad.item()) == pytest.approx((loss, grad), abs=1e-12)
    assert (got[1].item(), got[2].item()) == (low, high)


def test_each_token_has_its_own_ratio_and_advantage():
    old = float64([-1.0, -2.0, -3.0])
    new = (old + float64([1.5, 1.5, 0.5]).log()).requires_grad_()
    loss, low, high = ppo.policy_loss(new, old, float64([1, -1, -1]), 0.2, 0.2)
    loss.sum().backward()
    close(loss, float64([-1.2, 1.5, 0.8]))
    close(new.grad, float64([0, 1.5, 0]))
    assert low.tolist() == [[False, False, True]] and high.tolist() == [[True, False, False]]


# V_old 1, value_clip 0.2. (new value, return) -> loss, gradient. The worse of the two: no
# gradient once a value has gone 0.2 towards the return, and all of it if it went away.
@pytest.mark.parametrize("value, R, loss, grad", [
    (1.1, 2.0, 0.81 / 2, -0.9),   # inside: both are the same
    (1.5, 2.0, 0.64 / 2, 0.0),    # towards the return, too far: (1.2 - 2)^2
    (0.5, 2.0, 2.25 / 2, -1.5),   # away from it: (0.5 - 2)^2, as (0.8 - 2)^2 is less
    (0.5, 0.0, 0.64 / 2, 0.0),    # towards it, downwards: (0.8 - 0)^2
    (1.5, 0.0, 2.25 / 2, 1.5),
    (3.0, 2.0, 1.0 / 2, 1.0)])    # beyond it: (3 - 2)^2 is more than (1.2 - 2)^2
def test_value_clipping_by_hand(value, R, loss, grad):
    values = float64([value]).requires_grad_()
    got = ppo.value_loss(values, float64([1.0]), float64([R]), 0.2)
    got.sum().backward()
    assert (got.item(), values.grad.item()) == pytest.approx((loss, grad), abs=1e-12)


def test_without_value_clipping_it_is_half_the_squared_error():
    values = float64([1.5, -2.0]).requires_grad_()
    loss = ppo.value_loss(values, float64([0, 0]), float64([2, 1]), 0.0)
    loss.sum().backward()
    close(loss, float64([0.125, 4.5]))
    close(values.grad, float64([-0.5, -3]))


def test_next_beta_by_hand():
    # 6 nats wanted, 256 completions of a horizon of 10000; the error is held within 0.2
    for kl, factor in ((6, 1), (6.6, 1 + 0.1 * 0.0256), (60, 1 + 0.2 * 0.0256),
                       (5.4, 1 - 0.1 * 0.0256), (0, 1 - 0.2 * 0.0256), (-3, 1 - 0.2 * 0.0256)):
        assert ppo.next_beta(0.5, kl, 6.0, 256, 10_000) == pytest.approx(0.5 * factor)


# --- completion_values

def llama_critic():
    return LlamaForTokenClassification(LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_labels=1, initializer_range=0.3)).eval()


def gpt2_critic():  # whose positions are learned: counting padding would show
    return GPT2ForTokenClassification(GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=64, num_labels=1,
        initializer_range=0.3)).eval()


PROMPTS, COMPLETIONS = [[5, 6, 7, 8], [9], [10, 11]], [[12, 13, 2], [14, 2], [15, 16, 17, 18, 2]]


def values_of(critic, prompts=PROMPTS, completions=COMPLETIONS, pad_id=2, left=0, right=0):
    """pad_id is the end-of-sequence by default, which is the hard case."""
    ids, mask = pad(prompts, pad_id, "left")
    completion_ids, seen = pad(completions, pad_id, "right")
    fill = torch.nn.functional.pad
    batch = [fill(ids, (left, 0), value=pad_id), fill(mask, (left, 0)),
             fill(completion_ids, (0, right), value=pad_id), fill(seen, (0, right))]
    with torch.no_grad():
        return ppo.completion_values(critic, *batch)


@pytest.mark.parametrize("make", [llama_critic, gpt2_critic])
def test_values_are_those_of_a_loop_over_tokens(make):
    """values[:, t] is read before token t is written: token t changes nothing in it."""
    critic, seen = make(), torch.zeros(3, 5)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
        for t in range(len(completion)):
            with torch.no_grad():
                seen[i, t] = critic(torch.tensor([prompt + completion[:t]])).logits[0, -1, 0]
    close(values_of(critic), seen, rtol=1e-4, atol=1e-5)


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


# --- load_critic

def save_reward_model(path, kind, bias):
    config = dict(num_labels=1, pad_token_id=0, initializer_range=0.3, **(
        {} if bias is None else {"reward_bias": bias}))
    if kind == "llama":
        model = LlamaForSequenceClassification(LlamaConfig(
            vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, **config))
    else:
        model = GPT2ForSequenceClassification(GPT2Config(
            vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=64, **config))
    model.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("bias", [None, -1.25])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # their heads are named score and classifier
def test_a_critic_from_a_reward_model_says_what_it_says(tmp_path, kind, bias):
    name = save_reward_model(tmp_path / "rm", kind, bias)
    scorer, _ = common.load_model(AutoModelForSequenceClassification, name, "cpu")
    critic = ppo.load_critic(name, "cpu")
    conversations = [a + b for a, b in zip(PROMPTS, COMPLETIONS)]
    with torch.no_grad():
        scores = score_ids(scorer, conversations)
        for ids, score in zip(conversations, scores):
            at_the_end = critic(torch.tensor([ids])).logits[0, -1, 0]
            assert at_the_end.item() == pytest.approx(score.item(), abs=1e-5)
    assert scores.std() > 0.05


def test_a_critic_from_a_causal_lm_starts_at_zero_and_can_learn(tmp_path):
    LlamaForCausalLM(LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2)).save_pretrained(tmp_path / "lm")
    critic = ppo.load_critic(str(tmp_path / "lm"), "cpu")
    assert values_of(critic).abs().sum() == 0
    (critic(torch.tensor([[5, 6]])).logits - 1).square().sum().backward()
    assert critic.score.weight.grad.norm() > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_critic_has_no_dropout(tmp_path, kind):
    # transformers puts one of 0.1 before these heads where the config names none
    critic = ppo.load_critic(save_reward_model(tmp_path / "rm", kind, None), "cpu").train()
    ids = torch.tensor([PROMPTS[0] * 5])
    assert torch.equal(critic(ids).logits, critic(ids).logits)


@pytest.mark.parametrize("changes, expected", [
    ({}, "tiny/reward_model"),  # it reads the policy's tokens: the best start there is
    (dict(reward="tiny/world.py:gold_reward"), "tiny/policy"),
    (dict(critic="tiny/biased_reward_model"), "tiny/biased_reward_model")], ids=str)
def test_what_the_critic_starts_from(tmp_path, monkeypatch, changes, expected):
    def stop(name, device):
        raise InterruptedError(name)
    monkeypatch.setattr(ppo, "load_critic", stop)
    with pytest.raises(InterruptedError, match=f"^{expected}$"):
        run(tmp_path, **changes)


# --- whole steps

OPTIONS = [
    dict(epochs=2, minibatches=2, truncated="penalise"), dict(critic_warmup=1, kl_target=0.1),
    dict(value_clip=0.0, whiten=False, gamma=0.9, lam=0.0), dict(target_kl=1e-9, beta=0.0),
    dict(truncated="mask", max_new_tokens=4), dict(critic="tiny/policy", gradient_checkpointing=True),
    dict(dtype="bfloat16"), dict(group_size=1, prompts_per_step=1)]


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
@pytest.mark.filterwarnings("error::UserWarning")  # of torch: order of steps, std of nothing
def test_every_option_runs(tmp_path, changes):
    log = run(tmp_path, **changes)
    assert len(log) == 2 and all(math.isfinite(x) for r in log for x in r.values())
    assert log[-1]["grad_norm"] > 0 or "max_new_tokens" in changes


def test_without_a_critic_s_knowledge_the_first_step_is_reward_to_go(tmp_path, monkeypatch):
    """Critic 0, gamma = lam = 1: the advantage is the score less beta times the KL to come."""
    seen, gae = {}, ppo.gae
    def spy(rewards, values, mask, *rest):
        seen.update(rewards=rewards, values=values, mask=mask, out=gae(rewards, values, mask, *rest))
        return seen["out"]
    monkeypatch.setattr(ppo, "gae", spy)
    log = run(tmp_path, critic="tiny/policy", lam=1.0, steps=1, epochs=1, whiten=False)
    assert seen["values"].abs().sum() == 0
    A, R = seen["out"]
    n = seen["mask"].sum()  # the losses are means over all tokens: the ratio is 1, the value 0
    assert log[0]["loss"] == pytest.approx(-(A.sum() / n).item(), rel=1e-3)
    assert log[0]["value_loss"] == pytest.approx((R.square().sum() / n / 2).item(), rel=1e-3)
    close(A, seen["rewards"].flip(1).cumsum(1).flip(1) * seen["mask"], rtol=1e-5, atol=1e-5)
    assert A[:, 0].mean().item() == pytest.approx(log[0]["reward"], rel=1e-3)  # the KL is still 0
    assert log[0]["explained_variance"] <= 0  # a critic that says 0 explains nothing


def test_explained_variance_of_a_perfect_critic(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "gae", lambda r, values, mask, *rest: (values.clone(), values))
    assert run(tmp_path, steps=1)[0]["explained_variance"] == 1


def test_the_kl_that_is_paid_for_is_that_of_the_policy_from_the_reference(tmp_path, monkeypatch):
    """log pi_old - log pi_ref of the sampled tokens, at the temperature of the sampling."""
    seen, token_rewards = [], ppo.token_rewards
    monkeypatch.setattr(ppo, "token_rewards", lambda s, kl, mask, beta: seen.append(
        (kl, mask)) or token_rewards(s, kl, mask, beta))
    calls, logprobs = [], ppo.completion_logprobs
    monkeypatch.setattr(ppo, "completion_logprobs", lambda *a: calls.append(
        (a[0], a[-1], logprobs(*a))) or calls[-1][-1])
    log = run(tmp_path, micro_batch_size=100, lr=3e-3, temperature=0.8, epochs=1)
    assert all(temperature == 0.8 for _, temperature, _ in calls)
    kl, _ = seen[1]  # of the second step, whose forward passes these are:
    sums = torch.cat([out[0].detach().sum(1) for _, _, out in calls])  # of micro-batch after micro-batch
    ref, old, new = sums[-3 * len(kl):].chunk(3)  # (B,) each
    close((old - ref).sort().values, kl.sum(1).sort().values, rtol=1e-3, atol=1e-4)
    close(old.sort().values, new.sort().values, rtol=1e-4, atol=1e-4)  # the update's: ratio 1
    assert log[1]["kl"] == pytest.approx(kl.sum(1).mean().item(), rel=1e-3) and log[1]["kl"] != 0


def test_the_first_update_has_ratio_one_and_later_ones_do_not(tmp_path, monkeypatch):
    ratios, policy_loss = [], ppo.policy_loss
    monkeypatch.setattr(ppo, "policy_loss", lambda new, old, *rest: ratios.append(
        (new - old).detach().abs().max().item()) or policy_loss(new, old, *rest))
    log = run(tmp_path, steps=1, micro_batch_size=100, lr=1e-3)
    zero = [r == 0 for r in ratios]  # of micro-batch after micro-batch
    assert zero == sorted(zero, reverse=True) and 0 < sum(zero) < len(zero)
    assert log[0]["approx_kl"] > 0 and log[0]["updates"] == 2


def test_only_scored_tokens_are_whitened(tmp_path, monkeypatch):
    """Neither padding nor what is left out of the loss is in the mean or the variance."""
    seen = []
    monkeypatch.setattr(ppo, "masked_whiten", lambda values, mask: seen.append(
        (values, mask)) or masked_whiten(values, mask))
    path = tmp_path / "half.py"
    path.write_text("def f(completions, **c):\n    return [None if i % 2 else i + 0.5 for i in range(len(completions))]\n")
    run(tmp_path, reward=f"{path}:f", steps=1)
    _, mask = seen[0]
    assert mask[1::2].sum() == 0 and (mask[::2, 0] == 1).all() and (mask[::2].sum(1) > 1).any()


def test_micro_batches_change_no_gradient(tmp_path, monkeypatch):
    """With plain gradient descent, which hides nothing, the policy ends at the same place."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, **_: torch.optim.SGD(p, lr))
    start = weights("tiny/policy")
    moved = [weights(run_dir) - start for size in (3, 100)
             if run(tmp_path, str(size), micro_batch_size=size, steps=1, lr=0.1, critic_lr=0.1,
                    minibatches=2, truncated="mask") and (run_dir := tmp_path / str(size) / "checkpoint")]
    assert moved[0].norm() > 1e-3
    for other in moved[1:]:
        assert (other - moved[0]).norm() / moved[0].norm() < 1e-3


def test_the_critic_warms_up_alone(tmp_path):
    log = run(tmp_path, critic_warmup=2, reward="tiny/world.py:gold_reward")
    assert torch.equal(weights(tmp_path / "run/checkpoint"), weights("tiny/policy"))
    assert all(r["grad_norm"] == 0 and r["loss"] == 0 and r["value_loss"] > 0 for r in log)
    assert log[1]["value"] != 0  # it started at 0


def test_target_kl_stops_a_rollout_s_updates(tmp_path):
    """The update that would come after is not made: as with one epoch, though the critic goes on."""
    options = dict(steps=1, lr_schedule="constant")
    log = run(tmp_path, "stopped", target_kl=1e-9, epochs=3, **options)
    assert log[0]["updates"] == 2 and log[0]["approx_kl"] > 1e-9
    run(tmp_path, "one", epochs=1, **options)
    stopped, one = (weights(tmp_path / n / "checkpoint") for n in ("stopped", "one"))
    assert torch.allclose(stopped, one, atol=1e-6)


def test_beta_follows_its_target(tmp_path):
    log = run(tmp_path, kl_target=0.001, kl_horizon=100, lr=1e-3)
    assert log[0]["beta"] == pytest.approx(0.04 * (1 - 0.2 * 8 / 100), rel=1e-4)  # KL 0 at first
    assert log[1]["beta"] > log[0]["beta"] or log[1]["kl"] < 0.001


def test_beta_zero_loads_no_reference(tmp_path, monkeypatch):
    loads, load = [], ppo.load_model
    monkeypatch.setattr(ppo, "load_model", lambda *a, **k: loads.append(a) or load(*a, **k))
    log = run(tmp_path, beta=0.0, steps=1)
    assert [a[0] for a in loads] == [AutoModelForCausalLM, AutoModelForSequenceClassification]  # policy, critic
    assert "kl" not in log[0]


def test_ppo_learns_a_plain_reward(tmp_path):
    """Eight steps towards short answers, with a critic that starts from nothing."""
    path = tmp_path / "short.py"
    path.write_text("def f(completions, **c):\n    return [-len(x[0]['content'].split()) / 5 for x in completions]\n")
    log = run(tmp_path, reward=f"{path}:f", steps=8, prompts_per_step=4, group_size=8, lr=2e-3,
              critic_lr=3e-3, max_new_tokens=16, micro_batch_size=64)
    assert sum(r["reward"] for r in log[-3:]) / 3 > sum(r["reward"] for r in log[:3]) / 3 + 0.1
    assert log[-1]["explained_variance"] > log[0]["explained_variance"]


def test_a_critic_with_a_shorter_context_is_refused(tmp_path, capsys):
    short, _ = common.load_model(AutoModelForSequenceClassification, "tiny/reward_model", "cpu")
    short.config.max_position_embeddings = 16
    short.save_pretrained(tmp_path / "short")
    common.load_tokenizer("tiny/reward_model").save_pretrained(tmp_path / "short")
    with pytest.raises(SystemExit):
        run(tmp_path, critic=str(tmp_path / "short"))
    assert "context, 16 tokens, is shorter" in capsys.readouterr().err
