"""reinforce.py against TRL's RLOOTrainer: the gradients of three updates on one rollout, the first
at ratio 1, the others with other ratios, clipped on both sides.

TRL's loss is PPO's clipped objective with one ratio per completion. Its advantage is the reward
minus beta times the KL, minus the mean of the group's others. Ours has the same gradient (ratio *
A * grad log pi, and 0 where the clip has none) but another loss, log pi weighted by constants, so
losses are not compared.
"""
import pytest

pytest.importorskip("trl", reason="parity with TRL: pip install 'plain-rlhf[parity]'")
from parity.peer import (GROUP, IN_ORDER, PROMPTS, agree, error, normal, run_on, same, sampled,
                         theirs, trainer_of)

import reinforce

B = PROMPTS * GROUP
# an ordinary group, one of equal rewards, one with None, one with None for all but one
REWARDS = [[0.3, -1.2, 2.0, 0.7], [0.5] * 4, [1.0, None, 3.0, -2.0], [None, 4.0, None, None]]


def trainer(tmp_path, **args):
    return trainer_of("RLOO", tmp_path, **(dict(
        epsilon=0.1, epsilon_high=0.3, num_iterations=3, temperature=0.8, beta=0.1) | args))


def ours(tmp_path, rollout, **args):
    return run_on(reinforce, tmp_path, rollout, **(dict(
        clip_low=0.1, clip_high=0.3, temperature=0.8, beta=0.1, epochs=3, lr=2e-4) | args))


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_gradients(tmp_path, beta):
    peer = trainer(tmp_path, beta=beta)
    rollout, inputs = sampled(peer, normal(1))
    updates = ours(tmp_path, rollout, beta=beta)
    assert len(updates) == 3
    for update in updates:
        agree(f"reinforce.py loo, beta {beta}", update, None,
              theirs(peer, update.weights, inputs)[1])
    for side in ("low", "high"):
        stopped = peer._metrics["train"][f"clip_ratio/{side}_mean"]
        assert stopped[0] == 0 < stopped[-1] < 1, side


def test_micro_batches(tmp_path):
    peer = trainer(tmp_path)
    rollout, inputs = sampled(peer, normal(2))
    parts = [{k: v[i:i + 4] for k, v in inputs.items()} for i in range(0, B, 4)]
    for update in ours(tmp_path, rollout, micro_batch_tokens=60, epochs=2):
        assert len(update.losses) > 4
        # in TRL, transformers' Trainer divides by the number of micro-batches
        agree("reinforce.py loo, micro-batches", update, None,
              theirs(peer, update.weights, *parts)[1], factor=len(parts))


def test_advantages(tmp_path):
    # which include the KL
    advantages, token_advantages = [], reinforce.token_advantages
    rollout, inputs = sampled(trainer(tmp_path), REWARDS)

    def recorded(*args):
        advantages.append(token_advantages(*args))
        return advantages[-1]

    ours(tmp_path, rollout, epochs=1,
         patches=[(reinforce, "token_advantages", recorded), IN_ORDER])
    same("reinforce.py advantages", advantages[0][:, 0], inputs["advantages"])


def test_differs_completions_without_a_reward_are_not_in_our_mean(tmp_path):
    # neither learns from them, but TRL still divides by all completions
    peer = trainer(tmp_path)
    rollout, inputs = sampled(peer, REWARDS)
    scored = sum(r is not None for group in REWARDS for r in group)
    for update in ours(tmp_path, rollout, epochs=1):
        agree("reinforce.py loo, rewards of None", update, None,
              theirs(peer, update.weights, inputs)[1], factor=scored / B)


def test_differs_we_normalize_advantages_over_tokens(tmp_path):
    # as REINFORCE++ does (Hu 2025, arXiv:2501.03262). TRL's normalize_advantages is over
    # completions, whatever their lengths.
    peer = trainer(tmp_path, normalize_advantages=True)
    rollout, inputs = sampled(peer, normal(1))
    update = ours(tmp_path, rollout, whiten=True, epochs=1)[0]
    assert error(update.grads, theirs(peer, update.weights, inputs)[1]) > 0.01
