"""A world small enough to enumerate: 4 tokens, at most 3 steps, and a table with a logit for each
token after each beginning of a completion. Every expectation is a sum over all completions, so
gradients and the end of training are exact.

Shapes: Y completions, T tokens of a completion.
"""
from functools import cache
from itertools import product

import torch

from common import kl_estimate, masked_mean, masked_whiten

BETA = 0.5
CLIP, NO_CLIP = (0.2, 0.2), (1e9, 1e9)


class World:
    """All completions of `steps` tokens out of 4. With `end`, token 0 ends a completion, which
    then has 1 to `steps` tokens."""

    def __init__(self, steps: int, end: bool = False, seed: int = 1):
        completions = product(range(4), repeat=steps)
        if end:  # padding is 0: after the first 0 there are only zeros
            completions = [y for y in completions if 0 not in y or not any(y[y.index(0):])]
        self.ids = torch.tensor(list(completions))  # (Y, T)
        ends_before = (self.ids == 0).cumsum(1) - (self.ids == 0).long()
        self.mask = ((ends_before == 0) | (not end)).double()  # (Y, T); float32 would round weights
        self.row = torch.zeros_like(self.ids)  # (Y, T), the table's row for what precedes a token
        for t in range(1, steps):
            self.row[:, t] = 4 * self.row[:, t - 1] + self.ids[:, t - 1] + 1
        generator = torch.Generator().manual_seed(seed)
        n_rows = (4 ** steps - 1) // 3  # 1 + 4 + 16 beginnings of 3 steps
        self.ref = torch.randn(n_rows, 4, generator=generator, dtype=torch.float64)  # logits
        self.rewards = torch.randn(4 ** steps, generator=generator, dtype=torch.float64)
        self.rewards = self.rewards[:len(self.ids)]  # (Y,)
        self.ref_logprobs = self.logprobs(self.ref)  # (Y, T)

    def logprobs(self, table):
        """Log-probs of all tokens, (Y, T), under a table of logits."""
        return table.log_softmax(-1)[self.row, self.ids] * self.mask

    def probs(self, table):
        """Probability of each completion, (Y,)."""
        return self.logprobs(table).sum(1).exp()

    def optimum(self, beta: float = BETA):
        """The policy, (Y,), that maximizes E[r] - beta * KL: pi_ref * exp(r / beta) / Z."""
        return (self.ref_logprobs.sum(1) + self.rewards / beta).softmax(0)

    def objective(self, table):
        """E[r] - BETA * KL."""
        logprobs = self.logprobs(table).sum(1)
        kl = logprobs - self.ref_logprobs.sum(1)
        return (logprobs.exp() * (self.rewards - BETA * kl)).sum()

    def rewards_less_kl(self, logprobs):
        """(Y,), the rewards with the KL in them."""
        return self.rewards - BETA * kl_estimate(logprobs.detach(), self.ref_logprobs).sum(1)


def world_of_lengths() -> World:
    """40 completions of 1 to 3 tokens, whose optimum is far from a single completion."""
    return World(3, end=True, seed=3)


def some_policy(world: World):
    """A table that is not the reference, where the KL has no gradient."""
    torch.manual_seed(5)
    return world.ref + torch.randn_like(world.ref)


def exact_gradient(world: World, table):
    """The gradient of the objective."""
    table = table.clone().requires_grad_()
    return torch.autograd.grad(world.objective(table), table)[0]


@cache
def numbers_of_groups(count: int, size: int):
    """(count ** size, size): the numbers of the completions in every group."""
    return torch.cartesian_prod(*[torch.arange(count)] * size).view(-1, size)


def groups(values, size: int = 2):
    """(Y, ...) -> (Y ** size, size, ...): every group of completions."""
    return values[numbers_of_groups(len(values), size)]


def flat_groups(values, size: int = 2):
    """(Y, ...) -> (Y ** size * size, ...): the same, group after group."""
    return groups(values, size).flatten(0, 1)


def whitened(advantages, p, mask):
    """masked_whiten in the limit of a large rollout, where each token counts by the probability
    p (or the number of copies) of its completion, (Y,)."""
    return masked_whiten(advantages, mask, lambda values, mask: masked_mean(
        values, p[:, None] * mask))


def angle(a, b) -> float:
    """Between two gradients, in degrees."""
    cosine = torch.cosine_similarity(a.flatten(), b.flatten(), 0)
    return cosine.clamp(max=1).acos().rad2deg().item()


def distance(p, q) -> float:
    """Total variation between two policies."""
    return (p - q).abs().sum().item() / 2


# --- what an exact critic of ppo.py says

def exact_values(world: World, token_rewards, old_logprobs):
    """(Y, T), the mean of all rewards still to come, over the completions with this beginning."""
    to_come = (token_rewards * world.mask).flip(1).cumsum(1).flip(1)
    p = old_logprobs.sum(1).exp()[:, None] * world.mask
    values = sum_by_row(world, p * to_come) / sum_by_row(world, p).clamp(min=1e-300)
    return values[world.row] * world.mask


def sum_by_row(world: World, values):
    """Sums of values (Y, T) over the tokens that follow the same beginning, (rows of the table,)."""
    sums = torch.zeros(len(world.ref), dtype=torch.float64)
    return sums.index_add(0, world.row.flatten(), values.flatten())
