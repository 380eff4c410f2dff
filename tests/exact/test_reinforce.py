"""reinforce.py on an enumerable world: its expected gradient with each baseline, and the
gradient's variance.

`python -m pytest -n 0 -s tests/exact/test_reinforce.py` prints the variances.
"""
import pytest
import torch

import ppo
import reinforce
from common import kl_estimate
from helpers.exact import (BETA, CLIP, NO_CLIP, exact_gradient, flat_groups, groups, some_policy,
                           world_of_lengths)

BASELINES = ["none", "mean", "moving", "loo", "greedy"]


@pytest.fixture(scope="module")
def world():
    return world_of_lengths()


def greedy_score(world, table):
    likeliest = (world.ids == table.argmax(-1)[world.row]) | (world.mask == 0)
    score, = world.rewards[likeliest.all(1)]  # of exactly one completion
    return score


def rewards_of(world, old, kl_per_token: bool):
    return world.rewards if kl_per_token else world.rewards_less_kl(old)


def group_advantages(world, table, kind: str, kl_per_token: bool, size: int, moving: float):
    """Advantages in every group of completions, (Y ** size * size, T)."""
    old = world.logprobs(table)
    rewards = flat_groups(rewards_of(world, old, kl_per_token), size)
    greedy = greedy_score(world, table).expand_as(rewards)
    baselines = reinforce.baseline(rewards, size, kind, moving, greedy)
    kl = flat_groups(kl_estimate(old, world.ref_logprobs), size)
    mask = flat_groups(world.mask, size)
    return reinforce.token_advantages(rewards, baselines, kl, mask, BETA, kl_per_token, False)


# --- the gradient

def expected_gradient(world, table, kind: str, kl_per_token: bool, size: int):
    """Of the loss at ratio 1, over all groups of completions; the moving baseline is any number."""
    A = group_advantages(world, table, kind, kl_per_token, size, moving=0.7)
    table = table.clone().requires_grad_()
    logprobs = world.logprobs(table)
    p = groups(logprobs.detach().sum(1).exp(), size).prod(1)
    new, mask = flat_groups(logprobs, size), flat_groups(world.mask, size)
    loss, _, _ = reinforce.policy_loss(new, new.detach(), A, mask, *CLIP)
    loss = loss.sum(1).view(-1, size).mean(1)
    return torch.autograd.grad((p * loss).sum(), table)[0]


@pytest.mark.parametrize("kl_per_token", [False, True])
@pytest.mark.parametrize("kind", ["none", "loo", "moving", "greedy"])
def test_the_gradient_is_exact(world, kind, kl_per_token):
    table = some_policy(world)
    for size in (2, 3):
        gradient = expected_gradient(world, table, kind, kl_per_token, size)
        torch.testing.assert_close(gradient, -exact_gradient(world, table), rtol=0, atol=1e-10)


def test_the_mean_shrinks_the_gradient(world):
    # by (G - 1) / G, for what is in the mean. With --kl-per-token that is the reward, and not the
    # KL, so that beta is in effect G / (G - 1) times as large.
    table = some_policy(world)
    exact = exact_gradient(world, table)
    no_reward = world_of_lengths()
    no_reward.rewards = torch.zeros_like(world.rewards)
    kl = exact_gradient(no_reward, table)
    for size in (2, 3):
        shrunk = (size - 1) / size
        gradient = expected_gradient(world, table, "mean", False, size)
        torch.testing.assert_close(gradient, -shrunk * exact, rtol=0, atol=1e-10)
        gradient = expected_gradient(world, table, "mean", True, size)
        torch.testing.assert_close(gradient, -shrunk * (exact - kl) - kl, rtol=0, atol=1e-10)


def test_samples_of_an_older_policy_are_weighted_by_the_ratio(world):
    # the second and later updates of a rollout, without the clip: the gradient of E[r]
    old, table = world.ref_logprobs, some_policy(world).requires_grad_()
    logprobs = world.logprobs(table)
    A = world.rewards[:, None] * world.mask
    loss, _, _ = reinforce.policy_loss(logprobs, old, A, world.mask, *NO_CLIP)
    gradient, exact = (torch.autograd.grad(x, table, retain_graph=True)[0] for x in (
        old.sum(1).exp() @ loss.sum(1), -logprobs.sum(1).exp() @ world.rewards))
    torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("script", [reinforce, ppo])
def test_the_clip_stops_what_would_go_further_out(world, script):
    # reinforce.py has one ratio per completion, ppo.py one per token
    old, new = world.ref_logprobs, world.logprobs(some_policy(world)).requires_grad_()
    A = torch.randn(new.shape, generator=torch.Generator().manual_seed(4)).double()
    mask = (world.mask,) if script is reinforce else ()
    loss, low, high = script.policy_loss(new, old, A, *mask, 0.2, 0.3)
    gradient = torch.autograd.grad((loss * world.mask).sum(), new)[0]
    ratio = (new - old).detach()
    ratio = (ratio.sum(1, keepdim=True).expand_as(ratio) if mask else ratio).exp()
    for y, t in world.mask.nonzero().tolist():
        r, a = ratio[y, t].item(), A[y, t].item()
        assert (low[y, t].item(), high[y, t].item()) == (r < 0.8 and a < 0, r > 1.3 and a > 0)
        stopped = low[y, t] or high[y, t]
        assert gradient[y, t].item() == pytest.approx(0 if stopped else -r * a, abs=1e-12)


# --- the variance

def variance(world, table, kind: str, kl_per_token: bool):
    """Variance of the gradient from a group of 2, and the squared length of its mean."""
    old = world.logprobs(table)
    p = old.sum(1).exp()
    mean = (p @ rewards_of(world, old, kl_per_token)).item()
    A = group_advantages(world, table, kind, kl_per_token, 2, mean)
    new, mask = flat_groups(old).requires_grad_(), flat_groups(world.mask)
    loss, _, _ = reinforce.policy_loss(new, new.detach(), A, mask, *CLIP)
    by_token = torch.autograd.grad(loss.sum() / 2, new)[0].view(len(p) ** 2, -1)  # (Y * Y, 2 T)
    of_table = torch.autograd.functional.jacobian(world.logprobs, table)  # (Y, T, rows, 4)
    g = torch.einsum("gk,gkd->gd", by_token, groups(of_table.flatten(2)).flatten(1, 2))
    pp = groups(p).prod(1)
    expected = pp @ g
    return (pp @ (g - expected).square().sum(1)).item(), expected.square().sum().item()


@pytest.fixture(scope="module")
def variances():
    """{(KL per token, added to all rewards): {baseline: (variance, squared mean)}}"""
    table, found = some_policy(world_of_lengths()), {}
    for kl_per_token in (False, True):
        for offset in (0, 3):
            world = world_of_lengths()
            world.rewards += offset
            found[kl_per_token, offset] = {
                kind: variance(world, table, kind, kl_per_token) for kind in BASELINES}
    print("\nvariance of the gradient from a group of 2, divided by its mean's squared length")
    print(f"{'':10}{'KL per completion':>38}{'KL per token':>38}")
    print(f"{'baseline':10}" + "".join(f"{f'r + {offset}':>19}" for _, offset in found))
    for kind in BASELINES:
        print(f"{kind:10}" + "".join(f"{v / m:19.1f}" for v, m in (
            column[kind] for column in found.values())))
    return found


@pytest.mark.parametrize("kl_per_token", [False, True])
def test_the_baselines_variances(variances, kl_per_token):
    with_0, with_3 = variances[kl_per_token, 0], variances[kl_per_token, 3]
    for kind in BASELINES[1:]:  # they take off what all rewards have in common
        assert with_3[kind][0] == pytest.approx(with_0[kind][0], rel=1e-9)
        assert with_3[kind][0] < with_3["none"][0]
    for v in (with_0, with_3):
        # The mean of the others has a variance of its own, the policy's mean has none: with
        # A = R - E[R] and s = grad log pi, loo adds -(A_2 s_1 + A_1 s_2) / 2, uncorrelated.
        assert v["moving"][0] < v["loo"][0]


def test_the_means_noise_is_that_of_loo(variances):
    # in a group of 2, R - mean is half of R - (the other's R): relative to the smaller gradient
    # the noise is the same
    for v in (variances[False, 0], variances[False, 3]):
        assert v["mean"][0] == pytest.approx(v["loo"][0] / 4, rel=1e-9)
        assert v["mean"][1] == pytest.approx(v["loo"][1] / 4, rel=1e-9)
