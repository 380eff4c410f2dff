"""reinforce.py: its baselines, advantages and gradient by hand."""
import math

import pytest
import torch

from helpers.unit import close, float64, nan
from reinforce import baseline, policy_loss, token_advantages


# --- baseline

def test_baselines_by_hand():
    rewards = float64(1, 2, 6, 0, 0, 9)  # two groups of three
    for kind, expected in (("none", [0] * 6), ("mean", [3, 3, 3, 3, 3, 3]), ("moving", [0.7] * 6),
                           ("loo", [4, 3.5, 1.5, 4.5, 4.5, 0]), ("greedy", [5, 5, 5, 8, 8, 8])):
        greedy = float64(5, 5, 5, 8, 8, 8)
        close(baseline(rewards, 3, kind, 0.7, greedy), float64(*expected))


def test_loo_is_the_mean_times_g_over_g_minus_one():
    rewards = torch.randn(40, dtype=torch.float64)
    loo, mean = (rewards - baseline(rewards, 8, kind) for kind in ("loo", "mean"))
    close(loo, mean * 8 / 7)


def test_a_completion_without_a_score_is_in_no_baseline():
    rewards = float64(1, nan, 2, 6, nan, 0, nan, 9)  # groups of four
    mean, loo = (baseline(rewards, 4, kind) for kind in ("mean", "loo"))
    close(mean, float64(3, 3, 3, 3, 4.5, 4.5, 4.5, 4.5))
    kept = ~rewards.isnan()
    close(loo[kept], float64(4, 3.5, 1.5, 9, 0))
    # and its own advantage is 0, whatever the baseline
    for kind in ("none", "mean", "moving", "loo", "greedy"):
        b = baseline(rewards, 4, kind, 1.0, torch.ones(8).double())
        A = token_advantages(rewards, b, torch.zeros(8, 2), torch.ones(8, 2), 0.1, True, False)
        assert A[~kept].abs().sum() == 0 and A.isfinite().all()


def test_a_single_completion_with_a_score():
    # nothing to compare it with: it is its own baseline, so its advantage is 0
    rewards = float64(5, nan, nan)
    assert baseline(rewards, 3, "mean")[0] == 5 and baseline(rewards, 3, "loo")[0] == 5


@pytest.mark.parametrize("kind", ["none", "moving", "loo", "greedy"])
def test_a_baseline_is_independent_of_its_own_completion(kind):
    rewards, greedy = torch.randn(2, 8).double()
    changed = rewards.clone()
    changed[2] += 10
    before, after = (baseline(r, 4, kind, 0.3, greedy) for r in (rewards, changed))
    assert before[2] == after[2]


# --- token_advantages

REWARDS, BASELINE = float64(3, -1, nan), float64(1, 1, 1)
KL = float64([0.5, -1, 2], [1, 9, 9], [1, 1, 1])  # the 9s are after the end
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])


def test_the_completions_kl_is_in_its_reward_already():
    A = token_advantages(REWARDS, BASELINE, KL, MASK, 0.1, False, False)
    close(A, float64([2, 2, 2], [-2, 0, 0], [0, 0, 0]))


def test_each_token_pays_its_own_kl_and_what_follows():
    # own and later KL: 1.5, 1, 2 in the first, 1 in the second; a tenth of it is subtracted
    A = token_advantages(REWARDS, BASELINE, KL, MASK, 0.1, True, False)
    close(A, float64([1.85, 1.9, 1.8], [-2.1, 0, 0], [0, 0, 0]))


@pytest.mark.parametrize("kl_per_token", [False, True])
def test_whitened_over_the_tokens_that_have_a_reward(kl_per_token):
    A = token_advantages(REWARDS, BASELINE, KL, MASK, 0.1, kl_per_token, True)
    plain = token_advantages(REWARDS, BASELINE, KL, MASK, 0.1, kl_per_token, False)
    kept = torch.stack([plain[0, 0], plain[0, 1], plain[0, 2], plain[1, 0]])
    expected = (kept - kept.mean()) / kept.std(correction=0)
    close(torch.stack([A[0, 0], A[0, 1], A[0, 2], A[1, 0]]), expected, rtol=1e-6)
    assert A[2].abs().sum() == 0 and A[1, 1:].abs().sum() == 0


# --- policy_loss

def test_in_the_first_update_it_is_advantage_times_log_prob():
    logprobs = (-torch.rand(2, 3)).double().requires_grad_()
    A, mask = torch.randn(2, 3).double(), torch.tensor([[1, 1, 1], [1, 1, 0]])
    loss, low, high = policy_loss(logprobs, logprobs.detach(), A, mask, 0.2, 0.2)
    loss.sum().backward()
    close(logprobs.grad, -A * mask)
    assert not low.any() and not high.any()


# the completion's ratio is 2 * 0.75 = 1.5 or 0.8 * 0.5 = 0.4; the clip at 0.8 and 1.2 stops the
# gradient where the ratio has moved in the direction of A, and nowhere else
@pytest.mark.parametrize("ratios, A, grad, low, high", [
    ((2, 0.75), (1, 1), (0, 0), (False, False), (True, True)),
    ((2, 0.75), (-1, -1), (1.5, 1.5), (False, False), (False, False)),
    ((0.8, 0.5), (1, 1), (-0.4, -0.4), (False, False), (False, False)),
    ((0.8, 0.5), (-1, -1), (0, 0), (True, True), (False, False)),
    ((2, 0.75), (1, -1), (0, 1.5), (False, False), (True, False)),  # --kl-per-token: A differs
    ((2, 0.55), (1, 1), (-1.1, -1.1), (False, False), (False, False)),  # 1.1, though one is 2
    ((3, 1), (0, 0), (0, 0), (False, False), (False, False))])
def test_the_ratio_is_the_completions_and_its_clip_stops_the_gradient(ratios, A, grad, low, high):
    logprobs = float64([-1.0, -2.0, -5.0]).requires_grad_()
    old = logprobs.detach() - float64([math.log(r) for r in (*ratios, 1e6)])  # arbitrary after the end
    mask = torch.tensor([[1, 1, 0]])
    loss, below, above = policy_loss(logprobs, old, float64([*A, 7]), mask, 0.2, 0.2)
    loss.sum().backward()
    close(logprobs.grad, float64([*grad, 0]))
    assert (tuple(below[0, :2].tolist()), tuple(above[0, :2].tolist())) == (low, high)


def test_the_gradient_is_that_of_the_importance_weighted_return():
    """d/d logits of ratio(y) * A(y), with pi(y) in the ratio, against autograd through the ratio."""
    logits = torch.randn(5, 3, 4, dtype=torch.float64).requires_grad_()
    ids, A = torch.randint(4, (5, 3)), torch.randn(5).double()
    mask = (torch.arange(3) < torch.tensor([3, 1, 2, 3, 2])[:, None]).long()
    def logprobs():
        return logits.log_softmax(-1).gather(-1, ids[:, :, None])[:, :, 0] * mask
    old = logprobs().detach() + 0.1 * torch.randn(5, 3).double() * mask
    loss, _, _ = policy_loss(logprobs(), old, A[:, None] * mask, mask, 1.0, 1e9)
    ours = torch.autograd.grad(loss.sum(), logits)[0]
    plain = -((logprobs() - old).sum(1).exp() * A).sum()
    close(ours, torch.autograd.grad(plain, logits)[0])
