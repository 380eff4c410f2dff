"""GRPO in worlds small enough to enumerate: 4 tokens, 1 or 3 steps, a logit for each token
after each beginning. Every expectation is a sum: gradients and training's end are exact.

How far each variant ends from pi_ref * exp(r / beta) / Z, in total variation, is printed by
`python -m pytest -n 0 -s tests/test_grpo_exact.py`.
"""
from itertools import product

import pytest
import torch

from common import kl_estimate
from grpo import group_advantages, kl_loss, policy_loss, token_weights

BETA, CLIP = 0.5, (0.2, 0.2)


class World:
    """All completions of up to `steps` tokens out of 4; `end`: token 0 ends a completion."""

    def __init__(self, steps: int, end: bool = False, seed: int = 1):
        everything = product(range(4), repeat=steps)
        if end:  # one way to write each: zeros after the first zero
            everything = [y for y in everything if 0 not in y or not any(y[y.index(0):])]
        self.ids = torch.tensor(list(everything))  # (Y, T)
        before = (self.ids == 0).cumsum(1) - (self.ids == 0).long()  # zeros before this token
        self.mask = ((before == 0) | (not end)).double()  # (Y, T); float32 would round weights
        self.row = torch.zeros_like(self.ids)  # (Y, T) of the table: the beginning it follows
        for t in range(1, steps):
            self.row[:, t] = 4 * self.row[:, t - 1] + self.ids[:, t - 1] + 1
        generator = torch.Generator().manual_seed(seed)
        size = (4 ** steps - 1) // 3  # 1 + 4 + 16 beginnings of 3 steps
        self.ref = torch.randn(size, 4, generator=generator, dtype=torch.float64)
        self.rewards = torch.randn(4 ** steps, generator=generator, dtype=torch.float64)
        self.rewards = self.rewards[:len(self.ids)]  # (Y,)
        self.ref_logprobs = self.logprobs(self.ref)

    def logprobs(self, table):  # (Y, T)
        return table.log_softmax(-1)[self.row, self.ids] * self.mask

    def optimum(self, beta: float = BETA):  # (Y,) the policy that maximises E[r] - beta * KL
        return (self.ref_logprobs.sum(1) + self.rewards / beta).softmax(0)

    def objective(self, table):
        logprobs = self.logprobs(table).sum(1)
        kl = logprobs - self.ref_logprobs.sum(1)
        return (logprobs.exp() * (self.rewards - BETA * kl)).sum()

    def rewards_less_kl(self, logprobs):
        return self.rewards - BETA * kl_estimate(logprobs.detach(), self.ref_logprobs).sum(1)


def pairs(values):
    """(Y, ...) -> (2 Y Y, ...): every group of two, one after the other."""
    first, second = torch.arange(len(values)).expand(2, len(values), len(values))
    return values[torch.stack([first.T, second], 2).flatten()]


# --- the gradient

def exact_gradient(world, table):
    table = table.clone().requires_grad_()
    return torch.autograd.grad(world.objective(table), table)[0]


def expected_gradient(world, table, scale: str, loss_type: str):
    """Of the loss with the KL in the reward, over all pairs of completions, at ratio 1."""
    table = table.clone().requires_grad_()
    logprobs, mask = world.logprobs(table), pairs(world.mask)
    p = logprobs.detach().sum(1).exp()
    A = group_advantages(pairs(world.rewards_less_kl(logprobs)), 2, scale)
    new, old = pairs(logprobs), pairs(logprobs.detach())
    loss, _, _ = policy_loss(new, old, A, mask, loss_type, *CLIP)
    weights = token_weights(mask, loss_type, mask.shape[1]) * len(mask) / 2  # a pair a batch
    loss = (loss * weights).view(len(p) ** 2, -1).sum(1)
    return torch.autograd.grad(((p[:, None] * p).flatten() * loss).sum(), table)[0]


def some_policy(world):
    """Not the reference, where the KL has no gradient."""
    torch.manual_seed(5)
    return world.ref + torch.randn_like(world.ref)


def error_and_angle(world, scale: str, loss_type: str):
    """How far the expected gradient is off, relative and in degrees, from minus the gradient
    times (G - 1) / G, as a completion is in its group's mean, and 1 / T, as dr_grpo has."""
    table = some_policy(world)
    expected = expected_gradient(world, table, scale, loss_type).flatten()
    exact = -exact_gradient(world, table).flatten() / 2 / world.mask.shape[1]
    angle = torch.cosine_similarity(expected, exact, 0).clamp(max=1).acos().rad2deg().item()
    return ((expected - exact).norm() / exact.norm()).item(), angle


@pytest.mark.parametrize("end", [False, True])
def test_without_the_paper_s_choices_the_gradient_is_exact(end):
    # --kl-in reward --scale-rewards none --loss-type dr_grpo, on one length and on several
    world = World(3, end)
    p = world.logprobs(some_policy(world)).sum(1).exp()
    assert p.sum().item() == pytest.approx(1)  # all of them, and each once
    assert set(world.mask.sum(1).tolist()) == ({1, 2, 3} if end else {3})
    error, _ = error_and_angle(world, "none", "dr_grpo")
    assert error < 1e-10, error


def test_the_standard_deviation_turns_the_gradient():
    # pairs that differ by little count for as much as those that differ by a lot
    _, angle = error_and_angle(World(3), "group", "dr_grpo")
    print(f"\ndegrees off the gradient, divided by the group's std: {angle:.1f}")
    assert 5 < angle < 10


def test_a_mean_over_each_completion_s_tokens_turns_the_gradient():
    # 1 / length: a token of a short completion counts for more than one of a long completion
    _, angle = error_and_angle(World(3, end=True), "none", "grpo")
    print(f"\ndegrees off the gradient, 1 / length: {angle:.1f}")
    assert 1.5 < angle < 5
    error, _ = error_and_angle(World(3), "none", "grpo")  # of one length it is dr_grpo
    assert error < 1e-10, error


@pytest.mark.parametrize("kind", ["k2", "k3_ratio", "k3"])
def test_which_kl_the_loss_descends(kind):
    # on one token: of KL(policy || reference), and the paper's k3 of the reversed
    world = World(1)
    table = some_policy(world).requires_grad_()
    p, ref = (world.logprobs(t).sum(1).exp() for t in (table, world.ref))
    kl = (p * (p / ref).log()).sum() if kind != "k3" else (ref * (ref / p).log()).sum()
    logprobs = world.logprobs(table)
    estimate = kl_loss(logprobs, logprobs.detach(), world.ref_logprobs, kind).sum(1)
    expected, exact = (torch.autograd.grad(x, table, retain_graph=True)[0]
                       for x in ((p.detach() * estimate).sum(), kl))
    torch.testing.assert_close(expected, exact, rtol=1e-10, atol=1e-12)


# --- where training ends

def advantages_in_large_groups(rewards, p, scale: str):
    """The limit of many completions a group: the mean and the std are the policy's."""
    A = rewards - (p * rewards).sum()
    return A / ((p * A.square()).sum().sqrt() + 1e-4) if scale == "group" else A


def advantages_in_pairs(rewards, p, scale: str):
    """The mean of each completion's advantage over whom it may be paired with."""
    A = group_advantages(pairs(rewards), 2, scale).view(len(p), len(p), 2)[:, :, 0]
    return A @ p


def train(world, kl_in: str, kind: str, scale: str, advantages, loss_type: str = "dr_grpo"):
    """The policy (Y,) at the end of exact expected updates, begun at the reference."""
    table = world.ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    weights = token_weights(world.mask, loss_type, 1) * len(world.mask)  # dr_grpo: 1 a token
    for _ in range(1500):
        logprobs = world.logprobs(table)
        p = logprobs.detach().sum(1).exp()
        rewards = world.rewards if kl_in == "loss" else world.rewards_less_kl(logprobs)
        A = advantages(rewards, p, scale)
        loss, _, _ = policy_loss(logprobs, logprobs.detach(), A, world.mask, loss_type, *CLIP)
        if kl_in == "loss":
            kl = kl_loss(logprobs, logprobs.detach(), world.ref_logprobs, kind)
            loss = loss + BETA * kl
        optimizer.zero_grad()
        (p[:, None] * loss * weights).sum().backward()
        optimizer.step()
        schedule.step()
    return world.logprobs(table.detach()).sum(1).exp()


def distance(p, q):
    return (p - q).abs().sum().item() / 2


PAIRS, LARGE = advantages_in_pairs, advantages_in_large_groups
VARIANTS = {  # KL in, estimator, divided by, groups; bounds of the distance: 3 steps, 1 step
    "KL in reward": ("reward", "", "none", PAIRS, (0, 0.02), (0, 0.02)),
    "KL in reward, divided": ("reward", "", "group", PAIRS, (0, 0.02), (0, 0.02)),
    "k2 in loss": ("loss", "k2", "none", LARGE, (0.15, 0.22), (0, 0.02)),
    "k3_ratio in loss": ("loss", "k3_ratio", "none", LARGE, (0.15, 0.22), (0, 0.02)),
    "k3 in loss": ("loss", "k3", "none", LARGE, (0.17, 0.23), (0.03, 0.06)),
    "the paper: k3, divided": ("loss", "k3", "group", LARGE, (0.16, 0.23), (0.15, 0.23)),
    "k2 in loss, divided": ("loss", "k2", "group", LARGE, (0.6, 1), (0.25, 0.36)),
    "k2 in loss, groups of 2": ("loss", "k2", "none", PAIRS, (0.28, 0.36), (0.14, 0.22)),
}


@pytest.fixture(scope="module")
def ends():
    worlds = World(3), World(1)
    policies = {name: [train(w, *v[:4]) for w in worlds] for name, v in VARIANTS.items()}
    distances = {name: [distance(p, w.optimum()) for p, w in zip(both, worlds)]
                 for name, both in policies.items()}
    print(f"\n{'distance from the optimum':27}3 steps  1 step")
    for name, (three, one) in distances.items():
        print(f"{name:27}{three:7.3f} {one:7.3f}")
    return policies, distances


@pytest.mark.parametrize("name", VARIANTS)
def test_where_it_converges(ends, name):
    for d, (low, high) in zip(ends[1][name], VARIANTS[name][4:]):
        assert low <= d <= high, d


def test_the_order(ends):
    # A token's KL in the loss answers for itself, not for what the token leads to (k2 and
    # k3_ratio: one gradient); k3 besides is the reversed KL. On one step only that is left.
    three, one = ({name: d[i] for name, d in ends[1].items()} for i in (0, 1))
    assert three["k2 in loss"] == pytest.approx(three["k3_ratio in loss"], abs=1e-6)
    assert three["KL in reward"] < three["k2 in loss"] < three["k3 in loss"]
    assert one["k2 in loss"] < one["k3 in loss"] < one["the paper: k3, divided"]


def test_divided_with_the_kl_in_the_loss_the_policy_collapses(ends):
    # the more it concentrates, the smaller the std, the less beta counts beside A / std: with
    # k2 nothing stops that, and the end is one completion, on 3 steps not even the best; which
    # one, and so the distance, depends on the path
    three, one = ends[0]["k2 in loss, divided"]
    assert three.max() > 0.999 and three.argmax() != World(3).rewards.argmax()
    assert one.max() > 0.999 and one.argmax() == World(1).rewards.argmax()


def test_with_the_kl_in_the_reward_no_division_moves_the_optimum():
    # at the optimum r - beta * log(pi / ref) is one number for all completions: all advantages
    # are 0, whatever they are divided by, and 1 / length changes nothing either. (For a policy
    # that can reach the optimum: weights shared among prompts may trade them otherwise.)
    world = World(3, end=True)
    rewards = world.rewards - BETA * (world.optimum().log() - world.ref_logprobs.sum(1))
    assert group_advantages(pairs(rewards), 2, "group").abs().max() < 1e-9
    p = train(world, "reward", "", "group", PAIRS, "grpo")
    assert distance(p, world.optimum()) < 0.02


def test_small_groups_and_a_kl_in_the_loss_raise_beta(ends):
    # a completion is in its own group's mean, so A is (G - 1) / G of what it is in large
    # groups, and the KL beside it is not: groups of 2 end where twice the beta would
    p = ends[0]["k2 in loss, groups of 2"][1]
    assert distance(p, World(1).optimum(2 * BETA)) < 0.002


def test_large_groups_are_the_limit_of_group_advantages():
    torch.manual_seed(0)
    counts = torch.randint(1, 400, (64,))
    rewards, G = World(3).rewards, int(counts.sum())
    for scale in ("none", "group"):
        A = group_advantages(rewards.repeat_interleave(counts), G, scale)
        expected = advantages_in_large_groups(rewards, counts / G, scale)
        torch.testing.assert_close(A, expected.repeat_interleave(counts), rtol=1e-3, atol=1e-6)
