"""ppo.py on an enumerable world: generalized advantage estimation, the expected gradient, and
what turns it.

`python -m pytest -n 0 -s tests/exact/test_ppo.py` prints the angles.
"""
import pytest
import torch

import ppo
from common import importance_weights, kl_estimate, masked_mean, masked_whiten
from helpers.exact import (BETA, CLIP, World, angle, exact_gradient, exact_values, groups, some_policy,
                           sum_by_row, whitened, world_of_lengths)


@pytest.fixture(scope="module")
def world():
    return world_of_lengths()


# --- generalized advantage estimation

@pytest.mark.parametrize("gamma, lam", [(1, 1), (1, 0.95), (0.9, 1), (0.97, 0.8), (0.9, 0),
                                        (0, 0.5)])
def test_gae_is_its_double_sum(gamma, lam):
    generator = torch.Generator().manual_seed(3)
    B, T = 32, 9
    rewards, values = torch.randn(2, B, T, generator=generator, dtype=torch.float64)
    lengths = torch.randint(T + 1, (B,), generator=generator)
    lengths[:3] = torch.tensor([0, 1, T])
    mask = (torch.arange(T) < lengths[:, None]).long()  # the numbers after it must not count
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for b, length in enumerate(lengths.tolist()):
        V = values[b, :length].tolist() + [0]
        delta = [rewards[b, t].item() + gamma * V[t + 1] - V[t] for t in range(length)]
        for t in range(T):
            A = sum((gamma * lam) ** l * delta[t + l] for l in range(length - t))
            R = A + V[t] if t < length else 0
            assert advantages[b, t].item() == pytest.approx(A, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(R, abs=1e-12)


# --- the gradient

def token_rewards(world, old):
    kl = kl_estimate(old, world.ref_logprobs)
    return ppo.token_rewards(world.rewards, kl, world.mask.long(), BETA)


def exact_critic(world, old):
    return exact_values(world, token_rewards(world, old), old)


def wrong_critic(world, old):
    noise = torch.randn(world.ref.shape[0], generator=torch.Generator().manual_seed(2))
    return exact_critic(world, old) + noise.double()[world.row] * world.mask


def advantages_of(world, old, lam: float = 1.0, critic=exact_critic):
    return ppo.gae(token_rewards(world, old), critic(world, old), world.mask, 1.0, lam)[0]


def expected_gradient(world, table, A):
    """Of the loss at ratio 1, summed over tokens; A: (Y, T)."""
    table = table.clone().requires_grad_()
    logprobs = world.logprobs(table)
    loss, _, _ = ppo.policy_loss(logprobs, logprobs.detach(), A, *CLIP)
    p = logprobs.detach().sum(1).exp()
    return torch.autograd.grad(p @ (loss * world.mask).sum(1), table)[0]


def expected_gradient_of_rollouts(world, table, size: int, whiten: bool):
    """Of the loss as it is, a mean over tokens, over all rollouts of `size` completions."""
    table = table.clone().requires_grad_()
    logprobs = world.logprobs(table)
    p, mask = groups(logprobs.detach().sum(1).exp(), size).prod(1), groups(world.mask, size)
    A = groups(advantages_of(world, logprobs.detach()), size)
    A = torch.vmap(masked_whiten)(A, mask) if whiten else A
    new = groups(logprobs, size)
    loss, _, _ = ppo.policy_loss(new, new.detach(), A, *CLIP)
    return torch.autograd.grad(p @ torch.vmap(masked_mean)(loss, mask), table)[0]


@pytest.mark.parametrize("lam, critic", [(1.0, exact_critic), (1.0, wrong_critic),
                                         (0.95, exact_critic), (0.0, exact_critic)])
def test_the_gradient_is_exact(world, lam, critic):
    # with any critic at lambda 1, and with an exact critic at any lambda
    table = some_policy(world)
    A = advantages_of(world, world.logprobs(table), lam, critic)
    gradient = expected_gradient(world, table, A)
    torch.testing.assert_close(gradient, -exact_gradient(world, table), rtol=0, atol=1e-10)


def test_an_exact_critics_advantages_have_mean_zero(world):
    # after every beginning: this is what makes the critic of these tests exact
    old = world.logprobs(some_policy(world))
    p = old.sum(1).exp()[:, None] * world.mask
    assert sum_by_row(world, p * advantages_of(world, old)).abs().max() < 1e-12


def test_what_turns_the_gradient(world):
    table = some_policy(world)
    old, exact = world.logprobs(table), -exact_gradient(world, table)
    p = old.sum(1).exp()
    degrees = {f"{'whitened, ' if whiten else ''}mean over tokens, rollouts of {size}":
               angle(expected_gradient_of_rollouts(world, table, size, whiten), exact)
               for whiten in (False, True) for size in (2, 3)}
    # In the limit of large rollouts each token counts by its probability and the number of tokens
    # is a constant, so that neither turns anything.
    A = whitened(advantages_of(world, old), p, world.mask)
    large = expected_gradient(world, table, A) / (p @ world.mask.sum(1))
    degrees["whitened, mean over tokens, large rollouts"] = angle(large, exact)
    for lam in (0.95, 0.0):
        A = advantages_of(world, old, lam, wrong_critic)
        gradient = expected_gradient(world, table, A)
        degrees[f"a critic off by 1, lambda {lam:g}"] = angle(gradient, exact)
    print("\ndegrees off the gradient")
    for name, value in degrees.items():
        print(f"{name:45}{value:6.2f}")
    plain2, plain3, white2, white3, limit, lam_95, lam_0 = degrees.values()
    assert limit < 1e-5
    assert 0.1 < plain3 < plain2 and 0.1 < white3 < white2  # less in larger rollouts
    assert 0.1 < lam_95 < lam_0


def test_large_rollouts_are_the_limit_of_masked_whiten():
    torch.manual_seed(0)
    counts, A = torch.randint(1, 9, (20,)), torch.randn(20, 3, dtype=torch.float64)
    mask = torch.arange(3) < torch.randint(1, 4, (20, 1))
    copies = masked_whiten(*(x.repeat_interleave(counts, 0) for x in (A, mask)))
    expected = whitened(A, counts, mask).repeat_interleave(counts, 0)
    torch.testing.assert_close(copies, expected, rtol=1e-12, atol=1e-12)


# --- what the critic learns, and the entropy bonus

def test_at_lambda_1_a_wrong_critic_learns_the_exact_values(world):
    # --critic-gae-lambda 1 (VC-PPO): the mean return after each beginning is its exact value,
    # whatever the critic said; below 1 the critic's own errors are in what it learns
    old = world.logprobs(some_policy(world))
    p = old.sum(1).exp()[:, None] * world.mask
    wrong, exact = wrong_critic(world, old), exact_critic(world, old)
    bias = {}
    for lam in (1.0, 0.95, 0.5):
        _, returns = ppo.gae(token_rewards(world, old), wrong, world.mask, 1.0, lam)
        bias[lam] = sum_by_row(world, p * (returns - exact)).abs().max().item()
    assert bias[1.0] < 1e-12 < 1e-3 < bias[0.95] < bias[0.5]


def test_where_the_entropy_bonus_leads():
    # with completions of one token the optimum of E[r] - beta * KL + c * entropy is known:
    # (pi_ref ** beta * exp(r)) ** (1 / (beta + c)), normalized
    world, c = World(1), 0.3
    table = world.ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for _ in range(1000):
        logprobs = world.logprobs(table)
        A = token_rewards(world, logprobs.detach())
        entropy = -(table.log_softmax(-1).exp() * table.log_softmax(-1)).sum(-1)[world.row]
        loss, _, _ = ppo.policy_loss(logprobs, logprobs.detach(), A, *CLIP)
        loss = loss - c * entropy
        optimizer.zero_grad()
        (logprobs.detach().exp() * loss).sum().backward()
        optimizer.step()
        scheduler.step()
    optimum = ((BETA * world.ref_logprobs[:, 0] + world.rewards) / (BETA + c)).softmax(0)
    torch.testing.assert_close(world.probs(table.detach()), optimum, rtol=0, atol=1e-3)


# --- a sampler that is not quite the policy

def test_importance_weights_turn_the_samplers_gradient_into_the_policys():
    # exactly, where a completion is one token; a cap, and tokens after another prefix, leave a part
    world = World(1)
    table, sampler = some_policy(world), some_policy(world) + torch.randn_like(world.ref)
    old, drawn = world.logprobs(table), world.logprobs(sampler)
    exact = -exact_gradient(world, table)
    A, degrees = advantages_of(world, old), {}
    for cap in (1e9, 1.5, None):
        new = table.clone().requires_grad_()
        loss, _, _ = ppo.policy_loss(world.logprobs(new), old, A, *CLIP)
        if cap:
            loss = loss * importance_weights(old, drawn, cap)
        gradient, = torch.autograd.grad((drawn.exp() * loss).sum(), new)
        degrees[cap] = angle(gradient, exact)
        if cap == 1e9:
            torch.testing.assert_close(gradient, exact)
    assert degrees[1e9] < 1e-3 < degrees[1.5] < degrees[None]
