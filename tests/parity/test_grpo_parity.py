"""grpo.py against TRL's GRPOTrainer: advantages, and the loss and gradients of three updates
of one rollout, the first at ratio 1, the others off it and clipped on both sides."""
import pytest

pytest.importorskip("trl", reason="parity with TRL: pip install 'plain-rlhf[parity]'")
import torch
from peer import (GROUP, LENGTH, PROMPTS, agree, error, normal, run_on, same, sampled, theirs,
                  trainer_of, undivided)

import grpo

# ours -> what TRL calls it
LOSSES = {
    "grpo": dict(loss_type="grpo"),
    "bnpo": dict(loss_type="bnpo"),
    "dapo": dict(loss_type="dapo"),
    "dr_grpo": dict(loss_type="dr_grpo"),
    # TRL's epsilon_high for cispo is the bound itself, and it has none below; ours are those
    # of MiniMax-M1, eq. 5: clip(ratio, 1 - low, 1 + high)
    "cispo": dict(loss_type="cispo", epsilon_high=1.3),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence")}
B = PROMPTS * GROUP


def trainer(tmp_path, loss_type="grpo", **args):
    # its default KL is k3 times the ratio (DeepSeek-V3.2); GRPO as published has k3
    return trainer_of("GRPO", tmp_path, **(dict(
        epsilon=0.1, epsilon_high=0.3, num_iterations=3, temperature=0.8, beta=0.0,
        use_bias_correction_kl=False) | LOSSES[loss_type] | args))


def ours(tmp_path, rollout, loss_type="grpo", **args):
    return run_on(grpo, tmp_path, rollout, loss_type=loss_type, **(dict(
        clip_low=1.0 if loss_type == "cispo" else 0.1, clip_high=0.3, temperature=0.8,
        beta=0.0, epochs=3, lr=3e-4) | args))


def micro(inputs: dict, size: int) -> list[dict]:
    """TRL's batch in parts of `size` completions, as its trainer splits it."""
    return [{k: v if v.dim() == 0 else v[i:i + size] for k, v in inputs.items()}
            for i in range(0, B, size)]


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_gradients(tmp_path, loss_type, beta):
    peer = trainer(tmp_path, loss_type, beta=beta)
    rollout, inputs = sampled(peer, normal(1))
    updates = ours(tmp_path, rollout, loss_type, beta=beta, patches=[undivided(grpo)])
    assert len(updates) == 3
    for update in updates:
        agree(f"grpo.py {loss_type}, beta {beta}", update,
              *theirs(peer, update.weights, inputs))
    clipped = ["clip_ratio/low_mean", "clip_ratio/high_mean"]
    for side in ["cispo_clip_ratio"] if loss_type == "cispo" else clipped:
        values = peer._metrics["train"][side]
        assert values[0] == 0 < values[-1] < 1, side


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_kl_times_the_ratio(tmp_path, loss_type):
    peer = trainer(tmp_path, loss_type, beta=0.1, use_bias_correction_kl=True)
    rollout, inputs = sampled(peer, normal(1))
    for update in ours(tmp_path, rollout, loss_type, beta=0.1, kl_loss="k3_ratio"):
        agree(f"grpo.py {loss_type}, k3 times the ratio", update,
              *theirs(peer, update.weights, inputs))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_micro_batches(tmp_path, loss_type):
    # four there, of other rows and numbers here; bnpo is the one that depends on them
    peer = trainer(tmp_path, loss_type, beta=0.1, per_device_train_batch_size=B // 4,
                   gradient_accumulation_steps=4)
    rollout, inputs = sampled(peer, normal(2))
    for update in ours(tmp_path, rollout, loss_type, beta=0.1, micro_batch_size=6, epochs=2):
        agree(f"grpo.py {loss_type}, micro-batches", update,
              *theirs(peer, update.weights, *micro(inputs, B // 4)))


# a group, a flat one, one with a completion left out, and a completion that is left alone
REWARDS = [[0.3, -1.2, 2.0, 0.7], [0.5] * 4, [1.0, None, 3.0, -2.0], [None, 4.0, None, None]]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(tmp_path, scale):
    _, inputs = sampled(trainer(tmp_path, scale_rewards=scale), REWARDS)
    rewards = torch.tensor([float("nan") if r is None else r for g in REWARDS for r in g])
    same(f"grpo.py advantages, scale_rewards {scale}",
         grpo.group_advantages(rewards, GROUP, scale), inputs["advantages"])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_gradients_under_each_scale(tmp_path, scale):
    peer = trainer(tmp_path, scale_rewards=scale)
    rollout, inputs = sampled(peer, normal(3))
    for update in ours(tmp_path, rollout, scale_rewards=scale, epochs=2):
        agree(f"grpo.py scale_rewards {scale}", update, *theirs(peer, update.weights, inputs))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_differs_what_is_masked_is_no_part_of_the_mean_here(tmp_path, loss_type):
    # Truncated completions out of the loss (DAPO, section 3.4): grpo's mean over completions
    # is then over those that are left. TRL divides by all of them, so that its step shrinks
    # with the share of truncated ones. Over tokens (dapo) both count those left, and over
    # a constant (dr_grpo) both keep the constant.
    peer = trainer(tmp_path, loss_type, mask_truncated_completions=True)
    rollout, inputs = sampled(peer, normal(1))
    kept = (inputs["completion_mask"].sum(1) > 0).sum().item()
    assert 0 < kept < B
    # what TRL has masked is gone from its batch: here it is LENGTH tokens without an end
    rollout.completions = [[c or [5] * LENGTH for c in group] for group in rollout.completions]
    factor = kept / B if loss_type == "grpo" else 1.0
    for update in ours(tmp_path, rollout, loss_type, truncated="mask", epochs=2):
        agree(f"grpo.py {loss_type}, truncated masked", update,
              *theirs(peer, update.weights, inputs), factor=factor)


def test_differs_a_completion_without_a_reward_is_no_part_of_the_mean_here(tmp_path):
    # both give it no policy gradient; TRL still divides by all completions
    peer = trainer(tmp_path)
    rollout, inputs = sampled(peer, REWARDS)
    scored = sum(r is not None for group in REWARDS for r in group)
    for update in ours(tmp_path, rollout, epochs=1):
        agree("grpo.py grpo, rewards of None", update, *theirs(peer, update.weights, inputs),
              factor=scored / B)


def test_differs_dapo_counts_the_tokens_of_the_update_here(tmp_path):
    # DAPO, eq. 8, is a mean over the tokens that are updated on. With two updates a pass, TRL
    # divides each by half of the rollout's tokens.
    peer = trainer(tmp_path, "dapo", per_device_train_batch_size=B // 2,
                   steps_per_generation=2)
    rollout, inputs = sampled(peer, normal(1))
    updates = ours(tmp_path, rollout, "dapo", minibatches=2, epochs=1, patches=[
        (torch, "randperm", lambda n, **where: torch.arange(n, **where))])  # dealt in order
    assert len(updates) == 2
    for update, half in zip(updates, micro(inputs, B // 2)):
        share = (half["completion_mask"].sum() / half["num_items_in_batch"]).item()
        assert abs(share - 0.5) > 0.005
        agree("grpo.py dapo, two updates a pass", update, *theirs(peer, update.weights, half),
              factor=2 * share)


def test_differs_gspo_has_each_tokens_ratio_on_its_kl_here(tmp_path):
    # DeepSeek-V3.2 (arXiv:2512.02556) corrects the KL of a token by the ratio of that token.
    # TRL takes the completion's, of which its documentation says that it is not unbiased.
    peer = trainer(tmp_path, "gspo", beta=0.1, use_bias_correction_kl=True)
    rollout, inputs = sampled(peer, normal(1))
    for update in ours(tmp_path, rollout, "gspo", beta=0.1, kl_loss="k3_ratio", epochs=2):
        assert error(update.grads, theirs(peer, update.weights, inputs)[1]) > 0.01
