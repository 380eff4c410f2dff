"""grpo.py: its functions on cases worked out by hand, and the same gradient from any micro-batches."""
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import completion_logprobs, kl_estimate, micro_batches
from grpo import group_advantages, kl_loss, policy_loss, token_weights
from helpers.unit import close, float64, nan

PPO_TYPES = ["grpo", "dapo", "dr_grpo"]  # one clipped ratio per token
ALL_TYPES = PPO_TYPES + ["gspo", "cispo"]


# --- group_advantages

# Group 1 is 0, 2, 4: mean 2, deviations -2, 0, 2, sample variance 8 / 2 = 4.
# Group 2 is 4, 4, 7: mean 5, deviations -1, -1, 2, sample variance 6 / 2 = 3.
# All six: mean 3.5, squares 12.25 + 2.25 + 3 * 0.25 + 12.25 = 27.5, sample variance 27.5 / 5.
HAND = {"none": [-2, 0, 2, -1, -1, 2],
        "group": [-2 / 2.0001, 0, 2 / 2.0001] + [a / (3 ** 0.5 + 1e-4) for a in (-1, -1, 2)],
        "batch": [a / (5.5 ** 0.5 + 1e-4) for a in (-2, 0, 2, -1, -1, 2)]}


@pytest.mark.parametrize("scale", HAND)
def test_advantages_by_hand(scale):
    close(group_advantages(float64(0, 2, 4, 4, 4, 7), 3, scale), float64(*HAND[scale]))


@pytest.mark.parametrize("scale", HAND)
def test_a_completion_without_a_score_changes_nothing_for_the_others(scale):
    # nan is in neither the mean nor the std, nor in its n - 1, and has advantage 0
    A = group_advantages(float64(0, nan, 2, 4, 4, 4, 7, nan), 4, scale)
    close(A[[0, 2, 3, 4, 5, 6]], float64(*HAND[scale]))
    assert A[1] == 0 and A[7] == 0


@pytest.mark.parametrize("scale", HAND)
def test_groups_that_teach_nothing(scale):
    # no scores; a single one, which is its own mean; all equal
    A = group_advantages(float64(nan, nan, nan, 5, nan, nan, 3, 3, 3), 3, scale)
    assert A.tolist() == [0] * 9


@pytest.mark.parametrize("size", [3, 7, 16, 48])
def test_equal_rewards_have_advantage_0_in_float32(size):
    # 0.1 is not exact in float32: the mean may be off by a rounding error, which 1e-4 added to
    # the std keeps small; with 1e-8 it would become an advantage of about 1
    for value in (0.1, 0.3, 0.7, 1 / 3):
        for scale in HAND:
            A = group_advantages(torch.full((2 * size,), value), size, scale)
            assert A.abs().max() < 0.01


def test_each_group_has_mean_0_and_std_1():
    A = group_advantages(5 + 3 * torch.randn(6 * 8, dtype=torch.float64), 8)
    close(A.view(6, 8).sum(1), torch.zeros(6, dtype=torch.float64))
    close(A.view(6, 8).std(1), torch.ones(6, dtype=torch.float64), rtol=1e-3)


# --- policy_loss

def one_token(ratio, A, loss_type, clip_low=0.2, clip_high=0.2, logprob=-1.0):
    """The loss of one token, its gradient on the log-prob, and the flags low and high."""
    logprobs = float64([logprob]).requires_grad_()
    loss, low, high = policy_loss(logprobs, logprobs.detach() - math.log(ratio), float64(A),
                                  torch.ones(1, 1), loss_type, clip_low, clip_high)
    loss.sum().backward()
    return loss.item(), logprobs.grad.item(), low.item(), high.item()


# loss = -min(ratio A, clip(ratio) A); its gradient on the log-prob is -ratio A, or 0 where the
# clipped term is the smaller one. A ratio outside the range is clipped only if it moved in the
# direction of A; if it moved against A, the gradient must bring it back.
@pytest.mark.parametrize("A, ratio, loss, grad, low, high", [
    (2, 1.0, -2.0, -2.0, False, False),
    (2, 1.1, -2.2, -2.2, False, False),
    (2, 0.9, -1.8, -1.8, False, False),
    (2, 1.5, -2.4, 0.0, False, True),   # min(3, 1.2 * 2)
    (2, 0.5, -1.0, -1.0, False, False),  # min(1, 0.8 * 2)
    (-2, 1.1, 2.2, 2.2, False, False),
    (-2, 0.9, 1.8, 1.8, False, False),
    (-2, 1.5, 3.0, 3.0, False, False),  # -min(-3, -2.4)
    (-2, 0.5, 1.6, 0.0, True, False),   # -min(-1, -1.6)
    (0, 1.5, 0.0, 0.0, False, False),
])
def test_clipped_ratio_by_hand(A, ratio, loss, grad, low, high):
    for loss_type in PPO_TYPES + ["gspo"]:  # gspo on one token is the same
        got = one_token(ratio, A, loss_type)
        assert got[:2] == pytest.approx((loss, grad), rel=1e-9, abs=1e-12), loss_type
        assert got[2:] == (low, high), loss_type


def test_clip_higher():
    # DAPO's 0.2 and 0.28: 1.25 still has a gradient, 1.3 is clipped at 1.28, below it is 0.8
    assert one_token(1.25, 2, "dapo", 0.2, 0.28) == pytest.approx((-2.5, -2.5, False, False))
    assert one_token(1.3, 2, "dapo", 0.2, 0.28) == pytest.approx((-2.56, 0, False, True))
    assert one_token(0.75, -2, "dapo", 0.2, 0.28) == pytest.approx((1.6, 0, True, False))


# loss = -clip(ratio) A log pi at log pi = -1: clip(ratio) A; gradient -clip(ratio) A, never 0
@pytest.mark.parametrize("A, ratio, weight, low, high", [
    (2, 1.1, 1.1, False, False), (2, 1.5, 1.2, False, True), (2, 0.5, 0.8, True, False),
    (-2, 0.9, 0.9, False, False), (-2, 1.5, 1.2, False, True), (-2, 0.5, 0.8, True, False)])
def test_cispo_weights_clipped_tokens_by_the_clipped_ratio(A, ratio, weight, low, high):
    assert one_token(ratio, A, "cispo") == pytest.approx((weight * A, -weight * A, low, high))


def test_cispo_without_a_lower_bound():
    # --clip-low 1: the ratio is above 0 anyway
    assert one_token(0.01, 2, "cispo", 1, 4) == pytest.approx((0.02, -0.02, False, False))
    assert one_token(9.0, 2, "cispo", 1, 4) == pytest.approx((10, -10, False, True))


def gspo_completion(ratios, A):
    """Two tokens, and padding with arbitrary values: losses, gradient of their mean, low, high."""
    logprobs = float64([-1.0, -2.0, -5.0]).requires_grad_()
    old = logprobs.detach() - float64([math.log(r) for r in (*ratios, 1e9)])
    mask = torch.tensor([[1, 1, 0]])
    loss, low, high = policy_loss(logprobs, old, float64(A), mask, "gspo", 0.2, 0.2)
    (loss * token_weights(mask, "gspo", 3)).sum().backward()
    return loss[0, :2], logprobs.grad[0], low[0, :2].tolist(), high[0, :2].tolist()


def test_gspo_has_one_ratio_per_completion():
    # sqrt(1.1 * 1.3) = 1.19583 is inside the range, though 1.3 is not: both tokens have the same
    # gradient, 1 / 2 of the ratio times A; the padding's ratio of 1e9 does not count
    loss, grad, low, high = gspo_completion((1.1, 1.3), 2)
    ratio = math.sqrt(1.43)
    close(loss, float64(-2 * ratio, -2 * ratio))
    close(grad, float64(-ratio, -ratio, 0))
    assert low == high == [False, False]


def test_gspo_clips_whole_completions():
    # sqrt(1.0 * 2.25) = 1.5 is outside: the token whose own ratio is 1 is clipped too
    loss, grad, low, high = gspo_completion((1.0, 2.25), 2)
    close(loss, float64(-2.4, -2.4))
    assert grad.tolist() == [0, 0, 0] and low == [False] * 2 and high == [True] * 2
    loss, grad, low, high = gspo_completion((0.25, 1.0), -2)  # sqrt(0.25) = 0.5
    close(loss, float64(1.6, 1.6))
    assert grad.tolist() == [0, 0, 0] and low == [True] * 2 and high == [False] * 2


# --- token_weights

LENGTHS = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
EMPTY = torch.zeros(1, 4, dtype=torch.long)


# 3 completions of 1, 2 and 4 tokens, at most 5: 1 / (3 length), 1 / 7, 1 / (3 * 5)
@pytest.mark.parametrize("loss_type, each", [
    ("grpo", (1 / 3, 1 / 6, 1 / 12)), ("gspo", (1 / 3, 1 / 6, 1 / 12)), ("dapo", (1 / 7,) * 3),
    ("cispo", (1 / 7,) * 3), ("dr_grpo", (1 / 15,) * 3)])
def test_weights_by_hand(loss_type, each):
    expected = LENGTHS * torch.tensor(each)[:, None]
    close(token_weights(LENGTHS, loss_type, 5), expected, rtol=1e-6)
    # a completion masked out of the loss changes no other's weight, except in dr_grpo
    share = 3 / 4 if loss_type == "dr_grpo" else 1
    weights = token_weights(torch.cat([LENGTHS, EMPTY]), loss_type, 5)
    close(weights, torch.cat([expected * share, EMPTY.float()]), rtol=1e-6)
    if loss_type != "dr_grpo":
        assert weights.sum().item() == pytest.approx(1)
    assert token_weights(EMPTY, loss_type, 5).tolist() == [[0, 0, 0, 0]]  # and no nan


# --- loss and gradient in the first update of a rollout

def first_update(loss_type, mask, A):
    """Loss and gradient on the log-probs, at ratio 1."""
    logprobs = -torch.rand(mask.shape, dtype=torch.float64) - 0.1
    logprobs.requires_grad_()
    loss, low, high = policy_loss(logprobs, logprobs.detach(), A, mask, loss_type, 0.2, 0.2)
    assert not low.any() and not high.any()
    loss = (loss * token_weights(mask, loss_type, mask.shape[1])).sum()
    loss.backward()
    return loss.item(), logprobs.grad


def test_in_the_first_update_all_loss_types_are_the_same_for_equal_lengths():
    mask, A = torch.ones(4, 3).double(), group_advantages(float64(1, 2, 4, 9), 4)
    expected = -A[:, None].expand(4, 3) / 12  # each of 12 tokens: - A grad log pi
    for loss_type in ALL_TYPES:
        close(first_update(loss_type, mask, A)[1], expected)


def test_in_the_first_update_loss_types_differ_by_their_weights_only():
    A = group_advantages(float64(1, 2, 9), 3)
    for loss_type in ALL_TYPES:
        _, grad = first_update(loss_type, LENGTHS, A)
        close(grad, -A[:, None] * token_weights(LENGTHS, loss_type, 4))


def test_why_the_loss_starts_at_zero():
    # The mean of a group's advantages is 0, and so is the loss at ratio 1; its gradient is not.
    # With different lengths that needs the mean over completions; cispo's loss contains log pi.
    A = group_advantages(float64(1, 2, 9), 3)
    for loss_type, mask in [(t, torch.ones(3, 4)) for t in PPO_TYPES + ["gspo"]] + [
            ("grpo", LENGTHS), ("gspo", LENGTHS)]:
        loss, grad = first_update(loss_type, mask, A)
        assert abs(loss) < 1e-12 and grad.norm() > 0.1, loss_type
    assert abs(first_update("dapo", LENGTHS, A)[0]) > 0.1
    assert abs(first_update("cispo", torch.ones(3, 4), A)[0]) > 0.01


# --- kl_loss

def test_kl_loss_by_hand():
    # pi 1/2, ref 1/4, old 2/5: d = ln 2; k2 = d^2 / 2, k3 = 1/2 - 1 + d, and 5/4 of that
    # second: d = -ln 2, k3 = 2 - 1 + d; third: d = 0
    pi, old = float64([0.5, 0.25, 0.3]).log(), float64([0.4, 0.25, 0.3]).log()
    ref, d = float64([0.25, 0.5, 0.3]).log(), math.log(2)
    close(kl_loss(pi, old, ref, "k2"), float64([d * d / 2, d * d / 2, 0]))
    close(kl_loss(pi, old, ref, "k3"), float64([d - 0.5, 1 - d, 0]))
    close(kl_loss(pi, old, ref, "k3_ratio"), float64([1.25 * (d - 0.5), 1 - d, 0]))


@pytest.mark.parametrize("kind", ["k2", "k3", "k3_ratio"])
def test_kl_loss_gradient_by_finite_differences(kind):
    pi, old, ref = (-3 * torch.rand(3, 4, 5, dtype=torch.float64)).unbind()
    pi.requires_grad_()
    kl_loss(pi, old, ref, kind).sum().backward()
    up, down = (kl_loss(pi.detach() + h, old, ref, kind) for h in (1e-6, -1e-6))
    close(pi.grad, (up - down) / 2e-6, rtol=1e-6, atol=1e-8)


def test_kl_loss_gradient_at_ratio_1():
    # with d = log pi - log ref: k2 d, k3 1 - exp(-d), k3 times the ratio d again
    pi, ref = (-3 * torch.rand(2, 4, 5, dtype=torch.float64)).unbind()
    d = pi - ref
    for kind, expected in (("k2", d), ("k3", 1 - (-d).exp()), ("k3_ratio", d)):
        leaf = pi.clone().requires_grad_()
        kl_loss(leaf, pi, ref, kind).sum().backward()
        close(leaf.grad, expected)


# --- a loss without log-probs

def test_the_mean_of_sampled_rewards_has_no_gradient():
    # loss = -mean(reward) + beta * KL, as in some tutorials: the sampled tokens are constants, so
    # whatever is rewarded, the gradient is that of the KL alone
    table, ref = torch.randn(2, 3, 4, dtype=torch.float64)  # logits of 3 steps, 4 tokens
    ids = torch.multinomial(table.softmax(-1), 64, replacement=True).T  # (64, 3)
    token_0, token_1 = ((ids == i).double().sum(1) for i in (0, 1))  # (64,), two rewards
    mask = torch.ones(64, 3)

    def gradient(rewards, how):
        logits = table.clone().requires_grad_()
        logprobs, refs = (x.log_softmax(-1)[range(3), ids] for x in (logits, ref))
        kl = kl_estimate(logprobs, refs, "k3").sum(1).mean()
        loss = 0.1 * kl
        if how == "naive":
            loss = loss - rewards.mean()
        if how == "policy_loss":
            A = group_advantages(rewards, 64)
            tokens, _, _ = policy_loss(logprobs, logprobs.detach(), A, mask, "grpo", 0.2, 0.2)
            loss = loss + (tokens * token_weights(mask, "grpo", 3)).sum()
        loss.backward()
        return logits.grad

    kl_only = gradient(token_0, "")
    assert kl_only.norm() > 0.01
    assert torch.equal(gradient(token_0, "naive"), kl_only)
    assert torch.equal(gradient(token_1, "naive"), kl_only)
    learned = [gradient(r, "policy_loss") - kl_only for r in (token_0, token_1)]
    for i, grad in enumerate(learned):  # descent makes the rewarded token more likely
        assert grad[:, i].sum() < -0.05
    assert (learned[0] - learned[1]).norm() > 0.05


# --- micro-batches

def gradient_in_micro_batches(tokens, loss_type, expected, lengths=(6, 1, 4, 2, 5, 3, 6, 1)):
    """The gradient of one update of 8 completions on a small Llama, as in main's step 5."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.3))
    ids, prompt_ids = torch.randint(20, (8, 6)), torch.randint(20, (8, 4))
    prompt_mask = (torch.arange(4) >= torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])[:, None]).long()
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    loss_mask = mask.clone()
    loss_mask[4] = 0  # as with --mask-truncated: out of the loss and still in the batch
    A = group_advantages(torch.randn(8), 4)
    with torch.no_grad():  # some ratios outside the clip range
        now, _ = completion_logprobs(model, prompt_ids, prompt_mask, ids, mask)
    old, ref = now + 0.3 * torch.randn(8, 6), now + 0.3 * torch.randn(8, 6)
    parts = micro_batches(prompt_mask.sum(1) + mask.sum(1), tokens) if tokens else [torch.arange(8)]
    assert len(parts) == expected
    weights = token_weights(loss_mask, loss_type, 6)  # before the split
    for rows in parts:
        logprobs, _ = completion_logprobs(
            model, prompt_ids[rows], prompt_mask[rows], ids[rows], mask[rows])
        loss, _, _ = policy_loss(logprobs, old[rows], A[rows], mask[rows], loss_type, 0.2, 0.2)
        loss = loss + 0.1 * kl_loss(logprobs, old[rows], ref[rows], "k3")
        (loss * weights[rows]).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("loss_type", ALL_TYPES)
def test_micro_batches_change_no_gradient(loss_type):
    whole = gradient_in_micro_batches(None, loss_type, 1)
    assert whole.norm() > 0.01
    errors = [off(gradient_in_micro_batches(tokens, loss_type, n), whole) for tokens, n in ((1, 8), (20, 5))]
    assert max(errors) < 1e-5, errors
