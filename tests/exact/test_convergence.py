"""Where reinforce.py, ppo.py and dpo.py converge on an enumerable world (grpo.py: test_grpo.py).

`python -m pytest -n 0 -s tests/exact/test_convergence.py` prints how far each variant converges
from pi_ref * exp(r / beta) / Z, in total variation.
"""
import pytest
import torch

import ppo
import reinforce
from common import kl_estimate, masked_mean
from dpo import dpo_loss
from helpers.exact import (BETA, CLIP, NO_CLIP, distance, exact_values, groups, whitened,
                           world_of_lengths)


@pytest.fixture(scope="module")
def world():
    return world_of_lengths()


def train(world, loss, updates: int = 1):
    """The policy, (Y,), after training from the reference with exact expected updates, and whether
    the clip ever stopped a token. The critic has a value for each beginning, 0 at first.

    loss: called with world, log-probs, old log-probs, values, old values. updates: per rollout.
    """
    table, critic = world.ref.clone(), torch.zeros(len(world.ref), dtype=torch.float64)
    optimizer = torch.optim.Adam([table.requires_grad_(), critic.requires_grad_()], lr=0.1)
    rollouts = 300 if updates == 1 else 150
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rollouts)
    ever_stopped = False
    for _ in range(rollouts):
        old, old_values = world.logprobs(table).detach(), values_of(world, critic).detach()
        for _ in range(updates):
            optimizer.zero_grad()
            logprobs, values = world.logprobs(table), values_of(world, critic)
            total, stopped = loss(world, logprobs, old, values, old_values)
            total.backward()
            optimizer.step()
            ever_stopped |= stopped
        scheduler.step()
    return world.probs(table.detach()), ever_stopped


def values_of(world, critic):
    return critic[world.row] * world.mask


def reinforce_loss(kl_per_token: bool, clip=NO_CLIP):
    """With baseline loo, over all groups of 2: the loss of the first completion of each."""
    def loss(world, logprobs, old, *_):
        pp, kl = groups(old.sum(1).exp()).prod(1), kl_estimate(old, world.ref_logprobs)
        rewards = world.rewards if kl_per_token else world.rewards_less_kl(old)
        rewards = groups(rewards)  # (Y * Y, 2)
        baselines = reinforce.baseline(rewards.flatten(), 2, "loo").view(-1, 2)
        new, old, kl, mask = (groups(x)[:, 0] for x in (logprobs, old, kl, world.mask))
        A = reinforce.token_advantages(rewards[:, 0], baselines[:, 0], kl, mask, BETA,
                                       kl_per_token, False)
        per_token, low, high = reinforce.policy_loss(new, old, A, mask, *clip)
        return pp @ per_token.sum(1), (low | high).any().item()
    return loss


def reinforce_plus_plus_loss(clip):
    def loss(world, logprobs, old, *_):
        p, kl = old.sum(1).exp(), kl_estimate(old, world.ref_logprobs)
        baselines = reinforce.baseline(world.rewards, 1, "none")
        A = reinforce.token_advantages(world.rewards, baselines, kl, world.mask, BETA, True, False)
        A = whitened(A, p, world.mask)
        per_token, low, high = reinforce.policy_loss(logprobs, old, A, world.mask, *clip)
        return p @ per_token.sum(1), (low | high).any().item()
    return loss


def ppo_loss(clip=NO_CLIP, lam: float = 1.0, whiten: bool = False, learned: bool = False):
    def loss(world, logprobs, old, values, old_values):
        p = old.sum(1).exp()
        kl = kl_estimate(old, world.ref_logprobs)
        rewards = ppo.token_rewards(world.rewards, kl, world.mask.long(), BETA)
        critic_values = old_values if learned else exact_values(world, rewards, old)
        A, returns = ppo.gae(rewards, critic_values, world.mask, 1.0, lam)
        A = whitened(A, p, world.mask) if whiten else A
        per_token, low, high = ppo.policy_loss(logprobs, old, A, *clip)
        if learned:
            per_token = per_token + ppo.value_loss(values, old_values, returns, 0.2)
        return masked_mean(per_token, p[:, None] * world.mask), (low | high).any().item()
    return loss


def dpo_loss_of_pairs(loss_type: str, flipped: float = 0.0, **kwargs):
    """Over all pairs sampled from the reference, with Bradley-Terry labels of the true reward, a
    fraction of them flipped."""
    def loss(world, logprobs, *_):
        policy, ref = (groups(x.sum(1)) for x in (logprobs, world.ref_logprobs))  # (Y * Y, 2)
        r = groups(world.rewards)
        first_wins = (r[:, 0] - r[:, 1]).sigmoid()
        first_wins = first_wins + flipped * (1 - 2 * first_wins)
        losses = dpo_loss(policy[:, 0], policy[:, 1], ref[:, 0], ref[:, 1], BETA, loss_type,
                          **kwargs)
        return (ref.exp().prod(1) * first_wins) @ losses, False
    return loss


CLOSE, FAR = (0, 0.02), (0.1, 1)
VARIANTS = {  # the loss, updates per rollout (2 x 2: epochs, minibatches), bounds of the distance
    "REINFORCE, loo": (reinforce_loss(False), 1, CLOSE),
    "REINFORCE, loo, KL per token": (reinforce_loss(True), 1, CLOSE),
    "REINFORCE, loo, 2 x 2, clipped": (reinforce_loss(False, CLIP), 4, CLOSE),
    "REINFORCE++, 2 x 2, clipped": (reinforce_plus_plus_loss(CLIP), 4, CLOSE),
    "PPO, exact critic": (ppo_loss(), 1, CLOSE),
    "PPO, exact critic, 2 x 2, clipped": (ppo_loss(CLIP), 4, CLOSE),
    "the same, whitened, lambda 0.95": (ppo_loss(CLIP, 0.95, True), 4, CLOSE),
    "the same, and the critic learned": (ppo_loss(CLIP, 0.95, True, True), 4, CLOSE),
    "DPO": (dpo_loss_of_pairs("sigmoid"), 1, CLOSE),
    "DPO, a fifth of labels flipped": (dpo_loss_of_pairs("sigmoid", 0.2), 1, FAR),
    "the same, robust": (
        dpo_loss_of_pairs("sigmoid", 0.2, label_smoothing=0.2, robust=True), 1, CLOSE),
    "IPO": (dpo_loss_of_pairs("ipo"), 1, FAR),
    "hinge": (dpo_loss_of_pairs("hinge"), 1, FAR),
    "APO-zero": (dpo_loss_of_pairs("apo_zero"), 1, FAR),
    "APO-down": (dpo_loss_of_pairs("apo_down"), 1, FAR),
}


@pytest.fixture(scope="module")
def trained():
    """{name: (policy, whether the clip was active)}"""
    world = world_of_lengths()
    optimum, ref = world.optimum(), world.probs(world.ref)
    trained = {name: train(world, loss, updates) for name, (loss, updates, _) in VARIANTS.items()}
    print(f"\n{'':36}{'E[r]':>7}{'KL':>7} distance from the optimum")
    table = {"(the reference)": ref, "(the optimum)": optimum}
    for name, p in (table | {name: p for name, (p, _) in trained.items()}).items():
        kl = p @ (p / ref).log()
        print(f"{name:36}{p @ world.rewards:7.3f}{kl:7.3f}{distance(p, optimum):9.4f}")
    return trained


@pytest.mark.parametrize("name", VARIANTS)
def test_where_it_converges(world, trained, name):
    _, updates, (low, high) = VARIANTS[name]
    p, stopped = trained[name]
    assert low <= distance(p, world.optimum()) <= high
    assert stopped == (updates > 1)  # the clip was active where there is one


def test_apo_zero_keeps_only_what_wins_more_than_half(world, trained):
    # its loss is a sum over completions of ref(y) * (P(y loses) - P(y wins)) * sigmoid(beta
    # log(pi / ref)): it falls without end for those that lose more often than they win
    ref = world.probs(world.ref)
    wins = (world.rewards[:, None] - world.rewards).sigmoid() @ ref  # against the reference's
    p, _ = trained["APO-zero"]
    print(f"APO-zero: mass on completions that lose more often than they win: "
          f"{ref[wins < 0.5].sum():.3f} -> {p[wins < 0.5].sum():.3f}")
    assert p[wins < 0.5].sum() < 0.05 < ref[wins < 0.5].sum()


def test_the_optimum_is_neither_the_reference_nor_one_completion(world):
    assert distance(world.probs(world.ref), world.optimum()) > 0.4
    assert world.optimum().max() < 0.25


def test_ipos_optimum(world, trained):
    # arXiv:2310.12036, theorem 1: in place of the reward there is the probability of being
    # preferred to an answer of the reference
    ref = world.ref_logprobs.sum(1)
    preferred = (world.rewards[:, None] - world.rewards).sigmoid() @ ref.exp()
    assert distance(trained["IPO"][0], (ref + preferred / BETA).softmax(0)) < 0.001
