"""grpo.py on an enumerable world: its expected gradient, and where training converges.

`python -m pytest -n 0 -s tests/exact/test_grpo.py` prints how far each variant converges from
pi_ref * exp(r / beta) / Z, in total variation.
"""
from types import SimpleNamespace

import pytest
import torch

import common
from common import Rollout, combine_rewards, replace_groups
from grpo import group_advantages, kl_loss, policy_loss, token_weights
from helpers.exact import (BETA, CLIP, World, angle, distance, exact_gradient, flat_groups,
                           some_policy, world_of_lengths)
from helpers.unit import refuses
from runtime import Run


# --- the gradient

def expected_gradient(world, table, scale: str, loss_type: str):
    """Of the loss with the KL in the reward, at ratio 1, over all groups of 2 completions."""
    table = table.clone().requires_grad_()
    logprobs, mask = world.logprobs(table), flat_groups(world.mask)
    p = logprobs.detach().sum(1).exp()
    advantages = group_advantages(flat_groups(world.rewards_less_kl(logprobs)), 2, scale)
    new, old = flat_groups(logprobs), flat_groups(logprobs.detach())
    loss, _, _ = policy_loss(new, old, advantages, mask, loss_type, *CLIP)
    weights = token_weights(mask, loss_type, mask.shape[1]) * len(mask) / 2  # a group is a batch
    loss = (loss * weights).view(len(p) ** 2, -1).sum(1)
    return torch.autograd.grad(((p[:, None] * p).flatten() * loss).sum(), table)[0]


def error_and_angle(world, scale: str, loss_type: str):
    """Distance of the expected gradient from minus the exact one, relative and in degrees. The
    exact one is times (G - 1) / G, since a completion is in its group's mean, and divided by T,
    as dr_grpo's loss is."""
    table = some_policy(world)
    expected = expected_gradient(world, table, scale, loss_type)
    exact = -exact_gradient(world, table) / 2 / world.mask.shape[1]
    return ((expected - exact).norm() / exact.norm()).item(), angle(expected, exact)


@pytest.mark.parametrize("end", [False, True])
def test_without_the_papers_choices_the_gradient_is_exact(end):
    # --kl-in-reward --scale-rewards none --loss-type dr_grpo, with one length and with several
    world = World(3, end)
    p = world.probs(some_policy(world))
    assert p.sum().item() == pytest.approx(1)  # every completion, once
    assert set(world.mask.sum(1).tolist()) == ({1, 2, 3} if end else {3})
    error, _ = error_and_angle(world, "none", "dr_grpo")
    assert error < 1e-10, error


def test_the_standard_deviation_turns_the_gradient():
    # groups whose rewards differ by little count for as much as those that differ by a lot
    _, degrees = error_and_angle(World(3), "group", "dr_grpo")
    print(f"\ndegrees off the gradient, divided by the group's std: {degrees:.1f}")
    assert 5 < degrees < 10


def test_a_mean_over_each_completions_tokens_turns_the_gradient():
    # 1 / length: a token of a short completion counts for more than one of a long completion
    _, degrees = error_and_angle(World(3, end=True), "none", "grpo")
    print(f"\ndegrees off the gradient, 1 / length: {degrees:.1f}")
    assert 1.5 < degrees < 5
    error, _ = error_and_angle(World(3), "none", "grpo")  # with one length it is dr_grpo
    assert error < 1e-10, error


@pytest.mark.parametrize("estimator", ["k2", "k3_ratio", "k3"])
def test_which_kl_the_loss_descends(estimator):
    # with one token: KL(policy || reference), and for the paper's k3, KL(reference || policy)
    world = World(1)
    table = some_policy(world).requires_grad_()
    p, ref = world.probs(table), world.probs(world.ref)
    kl = (ref * (ref / p).log()).sum() if estimator == "k3" else (p * (p / ref).log()).sum()
    logprobs = world.logprobs(table)
    estimate = kl_loss(logprobs, logprobs.detach(), world.ref_logprobs, estimator).sum(1)
    expected, exact = (torch.autograd.grad(x, table, retain_graph=True)[0]
                       for x in ((p.detach() * estimate).sum(), kl))
    torch.testing.assert_close(expected, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("G", [2, 3])
def test_divided_by_the_mean_it_is_the_gradient_of_the_log_success_rate(G):
    # MaxRL: for rewards of 0 or 1 the expected gradient is that of the success rate p, times
    # (1 - (1 - p) ** (G - 1)) / p: a sum of G - 1 terms of the series of 1 / p
    world = World(2)
    world.rewards = (world.rewards > 0.7).double()
    table = some_policy(world).requires_grad_()
    logprobs = world.logprobs(table)
    probs = logprobs.sum(1).exp()
    success = (probs * world.rewards).sum()
    assert 0.05 < success < 0.5
    p = success.detach()
    numbers = torch.cartesian_prod(*[torch.arange(len(probs))] * G)  # (groups, G)
    A = group_advantages(world.rewards[numbers.view(-1)], G, "mean").view(-1, G)
    new = logprobs[numbers]  # (groups, G, T)
    loss = -(A * new.sum(2)).mean(1)
    expected, exact = (torch.autograd.grad(x, table, retain_graph=True)[0] for x in (
        (probs.detach()[numbers].prod(1) * loss).sum(), -success))
    torch.testing.assert_close(expected, exact * (1 - (1 - p) ** (G - 1)) / p)


def test_the_mean_of_rewards_below_0_is_refused():
    refuses(lambda: group_advantages(torch.tensor([-1.0, 1.0]), 2, "mean"),
            "--scale-rewards mean", "a reward is below 0")
    assert group_advantages(torch.zeros(4), 2, "mean").tolist() == [0] * 4


@pytest.mark.parametrize("loss_type", ["gmpo", "sapo"])
def test_without_an_older_policy_gmpo_and_sapo_are_grpo(loss_type):
    # in value (up to a constant, for sapo) and in gradient
    world = World(3, end=True)
    table, grads = some_policy(world).requires_grad_(), []
    for kind in ("grpo", loss_type):
        logprobs = world.logprobs(table)
        loss, low, high = policy_loss(logprobs, logprobs.detach(), world.rewards, world.mask,
                                      kind, *CLIP)
        assert not low.any() and not high.any()
        weights = token_weights(world.mask, kind, 3)
        grads.append(torch.autograd.grad((loss * weights).sum(), table)[0])
    torch.testing.assert_close(*grads)


def test_gmpo_is_the_geometric_mean_of_clipped_ratios():
    # by hand: A > 0 bounds the ratios from above only, A < 0 from below only
    ratios = torch.tensor([[0.5, 1.0, 3.0], [0.5, 1.0, 3.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    advantages = torch.tensor([2.0, -1.0], dtype=torch.float64)
    loss, low, high = policy_loss(ratios.log(), torch.zeros(2, 3), advantages, mask, "gmpo",
                                  0.2, 0.5)
    first, second = (0.5 * 1.0 * 1.5) ** (1 / 3), (0.8 * 1.0) ** (1 / 2)
    torch.testing.assert_close(loss[:, 0], torch.tensor([-2 * first, second]).double())
    assert (low * mask).tolist() == [[0, 0, 0], [1, 0, 0]] and high[0].tolist() == [0, 0, 1]


def test_sapo_weighs_a_token_less_the_farther_its_ratio_is_from_1():
    # d loss / d logprob = -A * ratio * sech^2(tau (ratio - 1) / 2), its paper's weight
    logprobs = torch.tensor([[-0.5, 0.0, 1.0]] * 2, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    loss, *_ = policy_loss(logprobs, torch.zeros(2, 3).double(), advantages, torch.ones(2, 3),
                           "sapo", *CLIP)
    found, = torch.autograd.grad(loss.sum(), logprobs)
    ratio, tau = logprobs.detach().exp(), torch.tensor([[1.0], [1.05]]).double()
    weight = 1 / (tau * (ratio - 1) / 2).cosh().square()
    torch.testing.assert_close(found, -advantages[:, None] * ratio * weight)


def test_resampling_makes_the_gradient_longer_and_does_not_turn_it():
    # DAPO: rewards of 0 or 1, two prompts, all groups of 2, replaced once if they are flat. By
    # enumeration, with the functions of the script: the gradient without it, times 1 + f, f being
    # how often a group is flat
    worlds = [World(1, seed=1), World(1, seed=2)]
    tables = [some_policy(world).requires_grad_() for world in worlds]
    logprobs = torch.cat([world.logprobs(table) for world, table in zip(worlds, tables)])  # (8, 1)
    rewards = torch.tensor([0, 0, 1.0, 0, 1, 1, 0, 1], dtype=torch.float64)  # 4 per prompt
    outcomes = torch.cat([flat_groups(torch.arange(4)), flat_groups(torch.arange(4, 8))])
    outcomes = outcomes.view(-1, 2)  # (32, 2), each prompt's groups
    chance = logprobs.detach().exp()[outcomes, 0].prod(1) / 2  # (32,)

    def step(outcomes):
        """The prompts, rollout and scores of one group for each outcome."""
        ids = outcomes.flatten()[:, None]
        one = torch.ones_like(ids)
        rollout = Rollout(one, one, ids, one, NoText, torch.arange(8))
        return list(range(len(outcomes))), rollout, rewards[ids[:, 0]]

    def gradient(rollout, scores, chance):
        A = group_advantages(scores, 2, "none")  # (groups * 2,)
        new = logprobs[rollout.completion_ids[:, 0]]
        loss, _, _ = policy_loss(new, new.detach(), A, torch.ones_like(new), "dapo", *CLIP)
        return torch.cat(torch.autograd.grad(
            (chance.repeat_interleave(2) * loss[:, 0]).sum(), tables, retain_graph=True))

    _, rollout, scores = step(outcomes)
    without = gradient(rollout, scores, chance)
    f = chance[common.flat_groups(scores, 2)].sum()
    both = torch.cartesian_prod(torch.arange(32), torch.arange(32))  # first group, the next one
    first = step(outcomes[both[:, 0]])
    flat = common.flat_groups(first[2], 2)
    second = step(outcomes[both[flat, 1]])  # only as many as are needed
    _, rollout, scores = replace_groups(flat, first, second)
    found = gradient(rollout, scores, chance[both].prod(1))
    assert 0.3 < f < 0.9 and without.norm() > 0.01
    torch.testing.assert_close(found, without * (1 + f))


class NoText:
    """A tokenizer for rollouts of which no text is read."""
    chat_template = "none"
    batch_decode = staticmethod(lambda rows: [""] * len(rows))


# --- where training converges

def test_a_renewed_reference_goes_on_from_where_it_was():
    # each time it is renewed, the optimum is that policy times exp(r / beta) once more
    world = World(2)
    for n in (1, 2):
        p = train(world, "reward", "", "none", GROUPS_OF_2)
        optimum = (World(2).ref_logprobs.sum(1) + n * world.rewards / BETA).softmax(0)
        assert distance(p, optimum) < 0.02
        world.ref_logprobs = conditionals(world, p)
        assert torch.allclose(world.ref_logprobs.sum(1).exp(), p, atol=1e-6)


def test_a_moving_average_goes_part_of_the_way():
    # completions of one token: moved by a part m, the reference is pi_ref * exp(m r / beta) / Z,
    # so after n periods the policy is pi_ref * exp((1 + (n - 1) m) r / beta) / Z
    world, m = World(1), 0.6
    reference, policy = (torch.nn.ParameterList([world.ref.clone()]) for _ in range(2))
    run = SimpleNamespace(args=SimpleNamespace(renew_reference_every=5, reference_mix=m),
                          reshard=lambda *models: None)
    for n in (1, 2, 3):
        p = train(world, "reward", "", "none", GROUPS_OF_2)
        optimum = (World(1).ref_logprobs.sum(1) + (1 + (n - 1) * m) * world.rewards / BETA).softmax(0)
        assert distance(p, optimum) < 0.02
        policy[0].data = conditionals(world, p).view(1, 4)
        Run.renew_reference(run, 5 * n - 1, policy, reference)  # not due: nothing moves
        assert torch.equal(reference[0], world.ref)
        Run.renew_reference(run, 5 * n, policy, reference)
        world.ref = reference[0].data.clone()
        world.ref_logprobs = world.logprobs(world.ref)


def test_the_overlong_penalty_leads_to_the_optimum_of_what_it_pays():
    # completions of 1, 2 and 3 tokens pay 0, 1/2 and 1 of the penalty in a window of 2
    world, penalty = world_of_lengths(), 1.5
    lengths = world.mask.sum(1)
    paid = Rollout.overlong(SimpleNamespace(mask=world.mask), SimpleNamespace(
        max_new_tokens=3, overlong_window=2))
    world.rewards = world.rewards - penalty * paid
    by_hand = world_of_lengths().rewards - penalty * torch.tensor([0, 0, 0.5, 1])[lengths.long()]
    optimum = (world.ref_logprobs.sum(1) + by_hand / BETA).softmax(0)
    p = train(world, "reward", "", "none", GROUPS_OF_2)
    assert distance(p, optimum) < 0.02
    assert p @ lengths < world_of_lengths().optimum() @ lengths - 0.3  # answers are shorter


@pytest.mark.parametrize("unit", [1, 1000])
def test_normalized_rewards_count_by_their_ranks_and_not_by_their_unit(unit):
    # GDPO in groups of 2: each reward is +-1 / sqrt(2), by which completion has more of it. So
    # training ends where pi = pi_ref * exp(sqrt(2) * sum of E[sign(r(y) - r(y'))] / beta) / Z,
    # whatever the second reward is multiplied by; summed as they are, the larger one decides
    world, other = World(2), World(2, seed=4).rewards * unit
    values = {"first": world.rewards, "second": other}
    pairs = flat_groups(torch.arange(len(other)))
    rows = [row for row in [{"prompt": i} for i in range(len(pairs) // 2)] for _ in range(2)]
    scores = combine_rewards({name: lambda rows, completions, v=v: v[pairs] for name, v in
                              values.items()}, normalize=True)(rows, [""] * len(rows))

    def advantages(less_kl, p, scale):  # (Y,); less_kl: the KL's part of the reward
        A = group_advantages(scores + flat_groups(less_kl), 2, scale)
        return A.view(len(p), len(p), 2)[:, :, 0] @ p

    world.rewards = torch.zeros_like(world.rewards)
    p = train(world, "reward", "", "none", advantages)
    ranks = 2 ** 0.5 * sum((v[:, None] - v).sign() @ p for v in values.values())
    assert distance(p, (world.ref_logprobs.sum(1) + ranks / BETA).softmax(0)) < 0.02
    summed = (world.ref_logprobs.sum(1) + sum(values.values()) / BETA).softmax(0)
    assert distance(p, summed) > 0.2


def conditionals(world, p):
    """Log-probs (Y, T) of each token given those before it, of a policy (Y,)."""
    rows = torch.stack([(world.row == i).double().mul(p[:, None]).sum() for i in range(
        int(world.row.max()) + 1)])  # how likely each beginning is
    tokens = torch.stack([((world.row == world.row[i, t]) & (world.ids == world.ids[i, t]))
                          .double().mul(p[:, None]).sum()
                          for i in range(len(p)) for t in range(world.ids.shape[1])])
    return (tokens.view_as(world.mask) / rows[world.row]).log()


def advantages_in_large_groups(rewards, p, scale: str):
    """The limit of large groups: the mean and the std are those of the policy."""
    advantages = rewards - (p * rewards).sum()
    if scale == "group":
        advantages = advantages / ((p * advantages.square()).sum().sqrt() + 1e-4)
    return advantages


def advantages_in_groups_of_2(rewards, p, scale: str):
    """The mean of each completion's advantage over the other completion of its group."""
    advantages = group_advantages(flat_groups(rewards), 2, scale)
    return advantages.view(len(p), len(p), 2)[:, :, 0] @ p


def train(world, kl_in: str, estimator: str, scale: str, advantages, loss_type: str = "dr_grpo"):
    """The policy, (Y,), after training from the reference with exact expected updates."""
    table = world.ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.1)
    steps = 1500 if kl_in == "loss" else 1000  # with the KL in the reward it converges sooner
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    weights = token_weights(world.mask, loss_type, 1) * len(world.mask)  # dr_grpo: 1 per token
    for _ in range(steps):
        logprobs = world.logprobs(table)
        p = logprobs.detach().sum(1).exp()
        rewards = world.rewards if kl_in == "loss" else world.rewards_less_kl(logprobs)
        A = advantages(rewards, p, scale)
        loss, _, _ = policy_loss(logprobs, logprobs.detach(), A, world.mask, loss_type, *CLIP)
        if kl_in == "loss":
            kl = kl_loss(logprobs, logprobs.detach(), world.ref_logprobs, estimator)
            loss = loss + BETA * kl
        optimizer.zero_grad()
        (p[:, None] * loss * weights).sum().backward()
        optimizer.step()
        scheduler.step()
    return world.probs(table.detach())


GROUPS_OF_2, LARGE = advantages_in_groups_of_2, advantages_in_large_groups
VARIANTS = {  # KL in, estimator, scale, groups; bounds of the distance with 3 steps, with 1 step
    "KL in reward": ("reward", "", "none", GROUPS_OF_2, (0, 0.02), (0, 0.02)),
    "KL in reward, divided": ("reward", "", "group", GROUPS_OF_2, (0, 0.02), (0, 0.02)),
    "k2 in loss": ("loss", "k2", "none", LARGE, (0.15, 0.22), (0, 0.02)),
    "k3_ratio in loss": ("loss", "k3_ratio", "none", LARGE, (0.15, 0.22), (0, 0.02)),
    "k3 in loss": ("loss", "k3", "none", LARGE, (0.17, 0.23), (0.03, 0.06)),
    "the paper: k3, divided": ("loss", "k3", "group", LARGE, (0.16, 0.23), (0.15, 0.23)),
    "k2 in loss, divided": ("loss", "k2", "group", LARGE, (0.6, 1), (0.25, 0.36)),
    "k2 in loss, groups of 2": ("loss", "k2", "none", GROUPS_OF_2, (0.28, 0.36), (0.14, 0.22)),
}


@pytest.fixture(scope="module")
def trained():
    """{name: policies with 3 steps and 1 step}, {name: their distances from the optimum}"""
    worlds = World(3), World(1)
    policies = {name: [train(w, *v[:4]) for w in worlds] for name, v in VARIANTS.items()}
    distances = {name: [distance(p, w.optimum()) for p, w in zip(both, worlds)]
                 for name, both in policies.items()}
    print(f"\n{'distance from the optimum':27}3 steps  1 step")
    for name, (three, one) in distances.items():
        print(f"{name:27}{three:7.3f} {one:7.3f}")
    return policies, distances


@pytest.mark.parametrize("name", VARIANTS)
def test_where_it_converges(trained, name):
    for d, (low, high) in zip(trained[1][name], VARIANTS[name][4:]):
        assert low <= d <= high, d


def test_the_order(trained):
    # A token's KL in the loss accounts for that token alone, not for what it leads to (k2 and
    # k3_ratio have the same gradient). k3 is the reversed KL besides: all that remains with 1 step.
    three, one = ({name: d[i] for name, d in trained[1].items()} for i in (0, 1))
    assert three["k2 in loss"] == pytest.approx(three["k3_ratio in loss"], abs=1e-6)
    assert three["KL in reward"] < three["k2 in loss"] < three["k3 in loss"]
    assert one["k2 in loss"] < one["k3 in loss"] < one["the paper: k3, divided"]


def test_divided_with_the_kl_in_the_loss_the_policy_collapses(trained):
    # As the policy concentrates, the std shrinks, so A / std outgrows the KL. With k2 nothing
    # stops that: the policy ends at one completion, with 3 steps not even the best one. Which one,
    # and so the distance, depends on the path.
    three, one = trained[0]["k2 in loss, divided"]
    assert three.max() > 0.999 and three.argmax() != World(3).rewards.argmax()
    assert one.max() > 0.999 and one.argmax() == World(1).rewards.argmax()


def test_with_the_kl_in_the_reward_no_division_moves_the_optimum():
    # At the optimum r - beta * log(pi / pi_ref) is the same for all completions, so all advantages
    # are 0, whatever they are divided by, and 1 / length changes nothing either. (This is true of
    # a policy that can reach the optimum: weights shared among prompts may trade them otherwise.)
    world = World(3, end=True)
    rewards = world.rewards - BETA * (world.optimum().log() - world.ref_logprobs.sum(1))
    assert group_advantages(flat_groups(rewards), 2, "group").abs().max() < 1e-9
    p = train(world, "reward", "", "group", GROUPS_OF_2, "grpo")
    assert distance(p, world.optimum()) < 0.02


def test_small_groups_and_a_kl_in_the_loss_raise_beta(trained):
    # A completion is in its own group's mean, so its advantage is (G - 1) / G of that in large
    # groups, and the KL is not scaled: groups of 2 converge where twice the beta would.
    p = trained[0]["k2 in loss, groups of 2"][1]
    assert distance(p, World(1).optimum(2 * BETA)) < 0.002


def test_large_groups_are_the_limit_of_group_advantages():
    torch.manual_seed(0)
    counts = torch.randint(1, 400, (64,))
    rewards, G = World(3).rewards, int(counts.sum())
    for scale in ("none", "group"):
        A = group_advantages(rewards.repeat_interleave(counts), G, scale)
        expected = advantages_in_large_groups(rewards, counts / G, scale)
        torch.testing.assert_close(A, expected.repeat_interleave(counts), rtol=1e-3, atol=1e-6)
