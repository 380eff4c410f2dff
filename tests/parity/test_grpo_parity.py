"""grpo.py against TRL's GRPOTrainer: advantages, and the loss and gradients of three updates on
one rollout, the first at ratio 1, the others with other ratios, clipped on both sides."""
import math

import pytest

trl = pytest.importorskip("trl", reason="parity with TRL: pip install 'plain-rlhf[parity]'")
import torch
from parity.peer import (GROUP, IN_ORDER, LENGTH, PROMPTS, UNDIVIDED, agree, error, normal, run_on,
                         same, sampled, score, theirs, trainer_of)

import common
import grpo

# our loss type -> TRL's arguments
LOSSES = {
    "grpo": dict(loss_type="grpo"),
    "dapo": dict(loss_type="dapo"),
    "dr_grpo": dict(loss_type="dr_grpo"),
    # TRL's epsilon_high for cispo is the bound itself, and it has no lower bound; ours are as in
    # MiniMax-M1, eq. 5: clip(ratio, 1 - low, 1 + high)
    "cispo": dict(loss_type="cispo", epsilon_high=1.3),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence"),
    "sapo": dict(loss_type="sapo")}
B = PROMPTS * GROUP


def trainer(tmp_path, loss_type="grpo", **args):
    # TRL's default KL is k3 times the ratio (DeepSeek-V3.2), that of the GRPO paper is k3
    return trainer_of("GRPO", tmp_path, **(dict(
        epsilon=0.1, epsilon_high=0.3, num_iterations=3, temperature=0.8, beta=0.0,
        use_bias_correction_kl=False) | LOSSES[loss_type] | args))


def ours(tmp_path, rollout, loss_type="grpo", **args):
    return run_on(grpo, tmp_path, rollout, loss_type=loss_type, **(dict(
        clip_low=1.0 if loss_type == "cispo" else 0.1, clip_high=0.3, temperature=0.8,
        beta=0.0, epochs=3, lr=3e-4) | args))


def micro(inputs: dict, size: int) -> list[dict]:
    """TRL's batch in micro-batches of `size` completions, as its trainer splits it."""
    return [{k: v if v.dim() == 0 else v[i:i + size] for k, v in inputs.items()}
            for i in range(0, B, size)]


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_gradients(tmp_path, loss_type, beta):
    peer = trainer(tmp_path, loss_type, beta=beta)
    rollout, inputs = sampled(peer, normal(1))
    updates = ours(tmp_path, rollout, loss_type, beta=beta, patches=[UNDIVIDED])
    assert len(updates) == 3
    for update in updates:
        agree(f"grpo.py {loss_type}, beta {beta}", update,
              *theirs(peer, update.weights, inputs))
    clipped = {"cispo": ["cispo_clip_ratio"], "sapo": []}.get(
        loss_type, ["clip_ratio/low_mean", "clip_ratio/high_mean"])
    for side in clipped:
        values = peer._metrics["train"][side]
        assert values[0] == 0 < values[-1] < 1, side


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_gmpo(tmp_path, beta, monkeypatch):
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
    monkeypatch.setattr(trl, "GRPOConfig", GMPOConfig)
    monkeypatch.setattr(trl, "GRPOTrainer", GMPOTrainer)
    peer = trainer(tmp_path, beta=beta)
    rollout, inputs = sampled(peer, normal(1))
    # TRL's bounds are those of the log of the ratio
    updates = ours(tmp_path, rollout, "gmpo", beta=beta, clip_low=1 - math.exp(-0.1),
                   clip_high=math.exp(0.3) - 1, patches=[UNDIVIDED])
    assert len(updates) == 3
    for update in updates:
        agree(f"grpo.py gmpo, beta {beta}", update, *theirs(peer, update.weights, inputs))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_importance_weights(tmp_path, loss_type):
    # TRL has them for samples of vLLM. It does not weight the KL's term, ours does: see the test
    # in tests/exact/test_ppo.py, so that samples of another policy give the exact gradient
    peer = trainer(tmp_path, loss_type)
    rollout, inputs = sampled(peer, normal(1))
    weights = torch.rand(inputs["completion_ids"].shape) + 0.5
    peer.use_vllm = peer.vllm_importance_sampling_correction = True
    inputs["importance_sampling_ratio"] = weights
    given = grpo, "importance_weights", lambda old, sampler, cap: weights[:, :old.shape[1]]
    for update in ours(tmp_path, rollout, loss_type, importance_cap=2.0,
                       patches=[UNDIVIDED, IN_ORDER, given]):
        agree(f"grpo.py {loss_type}, importance weights", update,
              *theirs(peer, update.weights, inputs))


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_kl_times_the_ratio(tmp_path, loss_type):
    peer = trainer(tmp_path, loss_type, beta=0.1, use_bias_correction_kl=True)
    rollout, inputs = sampled(peer, normal(1))
    for update in ours(tmp_path, rollout, loss_type, beta=0.1, kl_estimator="k3_ratio"):
        agree(f"grpo.py {loss_type}, k3 times the ratio", update,
              *theirs(peer, update.weights, inputs))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_micro_batches(tmp_path, loss_type):
    # TRL has four of 4 completions, ours have at most 60 tokens each
    peer = trainer(tmp_path, loss_type, beta=0.1, per_device_train_batch_size=B // 4,
                   gradient_accumulation_steps=4)
    rollout, inputs = sampled(peer, normal(2))
    for update in ours(tmp_path, rollout, loss_type, beta=0.1, micro_batch_tokens=60, epochs=2):
        assert len(update.losses) > 4
        agree(f"grpo.py {loss_type}, micro-batches", update,
              *theirs(peer, update.weights, *micro(inputs, B // 4)))


# an ordinary group, one of equal rewards, one with None, one with None for all but one
REWARDS = [[0.3, -1.2, 2.0, 0.7], [0.5] * 4, [1.0, None, 3.0, -2.0], [None, 4.0, None, None]]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(tmp_path, scale):
    _, inputs = sampled(trainer(tmp_path, scale_rewards=scale), REWARDS)
    rewards = torch.tensor([float("nan") if r is None else r for g in REWARDS for r in g])
    same(f"grpo.py advantages, scale_rewards {scale}",
         grpo.group_advantages(rewards, GROUP, scale), inputs["advantages"])


def test_advantages_of_several_rewards(tmp_path):
    # GDPO: TRL's normalize_then_sum; without, the weighted sum
    second = [[5.0, None, -1.0, 2.0], [0.0, 1.0, 1.0, 3.0], [0.2] * 4, [1.0, None, 2.0, 4.0]]

    def other(prompts, completions, other, **columns):
        return other
    flat = [[float("nan") if r is None else r for g in rewards for r in g]
            for rewards in (REWARDS, second)]
    rows = [row for row in range(PROMPTS) for _ in range(GROUP)]
    for how, scale in (("sum_then_normalize", "group"), ("normalize_then_sum", "batch")):
        peer = trainer(tmp_path, reward_weights=[1.0, 0.3], multi_objective_aggregation=how,
                       rewards=[score, other])
        _, inputs = sampled(peer, REWARDS, other=second)
        named = [dict(number=i) for i in range(PROMPTS)]
        reward = common.combine_rewards(
            {name: lambda rows, texts, x=x: torch.tensor(x) for name, x in zip("ab", flat)},
            (1.0, 0.3), normalize=how == "normalize_then_sum")
        scores = reward([named[i] for i in rows], [""] * B)
        same(f"grpo.py, several rewards, {how}", grpo.group_advantages(scores, GROUP, scale),
             inputs["advantages"])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_gradients_under_each_scale(tmp_path, scale):
    peer = trainer(tmp_path, scale_rewards=scale)
    rollout, inputs = sampled(peer, normal(3))
    for update in ours(tmp_path, rollout, scale_rewards=scale, epochs=2):
        agree(f"grpo.py scale_rewards {scale}", update, *theirs(peer, update.weights, inputs))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_differs_masked_completions_are_not_in_our_mean(tmp_path, loss_type):
    # Truncated completions are masked out of the loss (DAPO, section 3.4). Our grpo then takes
    # the mean over the other completions. TRL divides by all of them, so that its update shrinks
    # with the fraction of truncated ones. With dapo both count the tokens of the others, and with
    # dr_grpo both divide by the same constant.
    peer = trainer(tmp_path, loss_type, mask_truncated_completions=True)
    rollout, inputs = sampled(peer, normal(1))
    kept = (inputs["completion_mask"].sum(1) > 0).sum().item()
    assert 0 < kept < B
    # TRL's batch has lost what it masked: any LENGTH tokens without an end of sequence will do
    rollout.completions = [[c or [5] * LENGTH for c in group] for group in rollout.completions]
    factor = kept / B if loss_type == "grpo" else 1.0
    for update in ours(tmp_path, rollout, loss_type, mask_truncated=True, epochs=2):
        agree(f"grpo.py {loss_type}, truncated masked", update,
              *theirs(peer, update.weights, inputs), factor=factor)


def test_differs_completions_without_a_reward_are_not_in_our_mean(tmp_path):
    # neither learns from them, but TRL still divides by all completions
    peer = trainer(tmp_path)
    rollout, inputs = sampled(peer, REWARDS)
    scored = sum(r is not None for group in REWARDS for r in group)
    for update in ours(tmp_path, rollout, epochs=1):
        agree("grpo.py grpo, rewards of None", update, *theirs(peer, update.weights, inputs),
              factor=scored / B)


def test_differs_our_dapo_counts_the_tokens_of_the_update(tmp_path):
    # DAPO, eq. 8, is a mean over the tokens of a group; here, of the update. With two updates per pass, TRL divides
    # each by half of the rollout's tokens.
    peer = trainer(tmp_path, "dapo", per_device_train_batch_size=B // 2,
                   steps_per_generation=2)
    rollout, inputs = sampled(peer, normal(1))
    updates = ours(tmp_path, rollout, "dapo", minibatches=2, epochs=1, patches=[IN_ORDER])
    assert len(updates) == 2
    for update, half in zip(updates, micro(inputs, B // 2)):
        share = (half["completion_mask"].sum() / half["num_items_in_batch"]).item()
        assert abs(share - 0.5) > 0.005
        agree("grpo.py dapo, two updates per pass", update, *theirs(peer, update.weights, half),
              factor=2 * share)


def test_differs_our_gspo_multiplies_a_tokens_kl_by_its_own_ratio(tmp_path):
    # as DeepSeek-V3.2 does (arXiv:2512.02556). TRL takes the completion's ratio, which its
    # documentation says is not unbiased.
    peer = trainer(tmp_path, "gspo", beta=0.1, use_bias_correction_kl=True)
    rollout, inputs = sampled(peer, normal(1))
    for update in ours(tmp_path, rollout, "gspo", beta=0.1, kl_estimator="k3_ratio", epochs=2):
        assert error(update.grads, theirs(peer, update.weights, inputs)[1]) > 0.01
