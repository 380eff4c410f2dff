"""ppo.py against TRL's PPOTrainer (trl.experimental.ppo), whose whole algorithm is in its train().
It runs here as it is, and its variables are read when it differentiates its loss. Ours makes the
same updates on the same rollout with the same weights.

They differ by design in two things, each of which has a test: what whitening divides by, and the
state after the end.
"""
import sys

import pytest

pytest.importorskip("trl", reason="parity with TRL: pip install 'plain-rlhf[parity]'")
pytest.importorskip("trl.experimental.ppo", reason="TRL 1.12 is the last with PPO")
import torch
from parity.peer import (LENGTH, THEIRS, UNDIVIDED, Dataset, Rollout, Update, agree, error,
                         in_float64, policy, prompts, reference, run_on, same, tokenizer)
from transformers import AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer

import common
import modeling
import ppo

B, UPDATES = 8, 3
CRITIC = "tiny/biased_reward_model"  # initial critic
READ = ["queries", "responses", "sequence_lengths", "scores", "logprobs", "ref_logprobs",
        "values", "rewards", "advantages", "returns", "padding_mask", "pg_loss", "vf_loss",
        "pg_clipfrac_stats", "vf_clipfrac_stats"]


class ValueModel(torch.nn.Module):
    """A critic as TRL takes it."""
    base_model_prefix = "model"

    def __init__(self, body, head):
        super().__init__()
        self.model, self.score, self.config = body, head, body.config


def train(tmp_path, **args):
    """TRL's run on one rollout: its variables at each update, and the updates of its policy and
    of its value model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "load_model", in_float64(modeling.load_model))
        critic = ValueModel(*modeling.load_body(CRITIC, "cpu"))  # of which ppo.load_critic makes ours
    scorer = AutoModelForSequenceClassification.from_pretrained(
        "tiny/reward_model", dtype=torch.float64)
    words = tokenizer()
    words.padding_side = "left"
    config = PPOConfig(**(THEIRS | dict(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=B, total_episodes=B,
        num_ppo_epochs=UPDATES, num_mini_batches=1, response_length=LENGTH, temperature=0.8,
        kl_coef=0.1, cliprange=0.2, cliprange_value=0.2, vf_coef=1.0, gamma=1.0, lam=0.95,
        learning_rate=1e-3, num_sample_generations=0) | args))
    trainer = PPOTrainer(
        args=config, processing_class=words, model=policy(), ref_model=reference(),
        reward_model=scorer, value_model=critic,
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompt_ids()]))
    seen, policies, critics, backward = [], [], [], trainer.accelerator.backward

    def recorded(loss):
        known = sys._getframe(1).f_locals  # of train()
        seen.append({k: known[k].detach().clone() for k in READ})
        backward(loss)
        for updates, model, own in ((policies, trainer.policy_model, "pg_loss"),
                                    (critics, trainer.value_model, "vf_loss")):
            updates.append(Update(
                [known[own].item()], [p.detach().clone() for p in model.parameters()],
                [p.grad.clone() for p in model.parameters()]))

    trainer.accelerator.backward = recorded
    trainer.train()
    assert len(seen) == UPDATES
    return seen, policies, critics


def prompt_ids() -> list[list[int]]:
    words = tokenizer()
    return common.encode(words, [common.render(words, row["prompt"]) for row in prompts(B)])


def ours(tmp_path, seen, policies, critics, **args):
    """Our updates of the policy and of the critic on TRL's rollout, with TRL's weights: our
    optimizers are made to set them."""
    known, pad_id = seen[0], tokenizer().pad_token_id
    rows = {tuple(i for i in ids if i != pad_id): (response[:last + 1], reward)
            for ids, response, last, reward in zip(*(known[k].tolist() for k in (
                "queries", "responses", "sequence_lengths", "scores")))}
    asked = prompt_ids()  # TRL has shuffled them
    rollout = Rollout(asked, *([[rows[tuple(ids)][i]] for ids in asked] for i in (0, 1)))
    # the critic is updated first, then the policy
    after = iter([u.weights for pair in zip(critics[1:], policies[1:]) for u in pair])

    def step(optimizer, closure=None):
        with torch.no_grad():
            for p, weight in zip(optimizer.param_groups[0]["params"], next(after, ())):
                p.copy_(weight)

    updates = run_on(ppo, tmp_path, rollout,
                     patches=[(torch.optim.AdamW, "step", step), UNDIVIDED],
                     **(dict(critic=CRITIC, epochs=UPDATES, minibatches=1, beta=0.1,
                             temperature=0.8, gae_lambda=0.95) | args))
    # both losses are differentiated, the critic's first, before the gradients of either are clipped
    critic, mine = updates[::2], updates[1::2]
    for a, b in zip(mine, critic, strict=True):
        b.losses, a.losses = b.losses[:1], b.losses[1:]
    return mine, critic


def bessel(known) -> float:
    """The ratio of TRL's whitened advantages to ours: for the variance it divides by n - 1, we by
    n, as Ziegler et al.'s own code does (tf.nn.moments)."""
    n = (~known["padding_mask"]).sum().item()
    return ((n - 1) / n) ** 0.5


def test_loss_and_gradients(tmp_path):
    # without a stop token no completion ends before LENGTH, so there is no state after an end
    seen, policies, critics = train(tmp_path, stop_token=None)
    assert not (seen[0]["responses"] == 0).any() and not seen[0]["padding_mask"].any()
    mine, critic = ours(tmp_path, seen, policies, critics)
    for known, a, b, his, hers in zip(seen, mine, critic, policies, critics, strict=True):
        agree("ppo.py policy, times sqrt((n - 1) / n)", a, his.losses[0], his.grads,
              factor=bessel(known))
        agree("ppo.py critic", b, hers.losses[0], hers.grads)
    for clipped in ("pg_clipfrac_stats", "vf_clipfrac_stats"):  # of the last but one update
        assert 0 < seen[-1][clipped].flatten()[-2] < 1, clipped


def test_advantages(tmp_path):
    known = train(tmp_path, stop_token=None)[0][0]
    mask = torch.ones_like(known["responses"])
    kl = common.kl_estimate(known["logprobs"], known["ref_logprobs"])
    assert kl.abs().max() > 0.1
    rewards = ppo.token_rewards(known["scores"], kl, mask, 0.1)
    advantages, returns = ppo.gae(rewards, known["values"], mask, 1.0, 0.95)
    whitened = common.masked_whiten(advantages, mask) * bessel(known)
    same("ppo.py rewards", rewards, known["rewards"])
    same("ppo.py returns", returns, known["returns"])
    same("ppo.py advantages, times sqrt((n - 1) / n)", whitened, known["advantages"])


def test_differs_the_state_after_the_end(tmp_path):
    # GAE (Schulman et al. 2015, eq. 16) has no value after the last action: the advantage of the
    # end of sequence is its reward, which includes the score, minus V. TRL puts the score one
    # place later, in a state after the end whose value its critic learns as well. With lambda = 1
    # that cancels, and the policy's gradients agree.
    seen, policies, critics = train(tmp_path, stop_token="eos", lam=1.0)
    mine, critic = ours(tmp_path, seen, policies, critics, gae_lambda=1.0)
    for known, a, his in zip(seen, mine, policies, strict=True):
        agree("ppo.py policy, ended, lam 1", a, his.losses[0], his.grads, factor=bessel(known))
    assert error(critic[0].grads, critics[0].grads) > 0.01  # one more state

    # With lambda < 1 the end of sequence gets lambda of the score and 1 - lambda of that value.
    known = train(tmp_path, stop_token="eos", lam=0.95)[0][0]
    mask, last = (~known["padding_mask"]).long(), known["sequence_lengths"]
    ended = last + 1 < LENGTH
    assert ended.any() and not ended.all()
    kl = common.kl_estimate(known["logprobs"], known["ref_logprobs"])
    rewards = ppo.token_rewards(known["scores"], kl, mask, 0.1)
    advantages, _ = ppo.gae(rewards, known["values"], mask, 1.0, 0.95)
    his = known["returns"] - known["values"]  # before it whitens them
    same("ppo.py advantages, cut", advantages[~ended], his[~ended])
    rows, last = ended.nonzero()[:, 0], last[ended]
    leak = (1 - 0.95) * (known["scores"][rows] - known["values"][rows, last + 1])
    assert leak.abs().max() > 1e-2
    same("ppo.py advantage of the end, minus the leak", advantages[rows, last] - leak,
         his[rows, last])
