"""common.py: log-probs, KL estimators and masked statistics, against slow and independent computations."""
import copy
import math

import numpy as np
import pytest
import torch
from transformers import (CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig,
                          GraniteForCausalLM, MistralConfig, MistralForCausalLM)

import common
import modeling
from helpers.unit import COMPLETIONS, EOS, PAD, PROMPTS, V, batch, gpt2, llama, qwen2, word_tokenizer


@pytest.fixture(params=[llama, gpt2, qwen2], ids=["llama", "gpt2", "qwen2"])
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_are_those_of_a_loop_over_tokens(model, temperature):
    """float64, one unpadded row and one forward pass at a time, no positions given."""
    logprobs, entropy = common.completion_logprobs(model, *batch(), temperature)
    slow = copy.deepcopy(model).double()
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
        for t, token in enumerate(completion):
            with torch.no_grad():
                logits = slow(input_ids=torch.tensor([prompt + completion[:t]])).logits[0, -1]
            log_softmax = (logits / temperature).log_softmax(-1)
            assert logprobs[i, t].item() == pytest.approx(log_softmax[token].item(), abs=1e-5)
            expected = -(log_softmax.exp() * log_softmax).sum().item()
            assert entropy[i, t].item() == pytest.approx(expected, abs=1e-5)
            assert 0.1 < expected < math.log(V) - 0.1  # neither certain nor uniform
    assert logprobs.requires_grad and not entropy.requires_grad
    assert logprobs.dtype == entropy.dtype == torch.float32


@pytest.mark.parametrize("chunk", [2**26, 3 * V])
def test_the_entropy_has_a_gradient_where_it_is_asked_for(model, chunk, monkeypatch):
    """Against central differences in float64, in one chunk of logits and in several; without being asked, none."""
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", chunk)
    model.double()
    weight = next(p for name, p in model.named_parameters() if p.dim() == 2)

    def total():
        return common.completion_logprobs(model, *batch(), 0.7, entropy_grad=True)[1].sum()
    total().backward()
    row = weight.grad.abs().sum(1).argmax()
    expected = weight.grad[row, 0].item()
    with torch.no_grad():
        weight[row, 0] += 1e-3
        up = total().item()
        weight[row, 0] -= 2e-3
        down = total().item()
    assert expected == pytest.approx((up - down) / 2e-3, rel=1e-2) and abs(expected) > 1e-3
    assert not common.completion_logprobs(model, *batch(), 0.7)[1].requires_grad


@pytest.mark.parametrize("left, right", [(3, 0), (0, 5), (7, 2)])
def test_padding_changes_no_number(model, left, right):
    """Neither values nor gradients (in float64, so that rounding hides nothing); where the mask is 0 there are
    exact zeros, and the width is the mask's."""
    model.double()
    weight = torch.randn(len(PROMPTS), 6)
    results = []
    for rows in (batch(), batch(left=left, right=right)):
        logprobs, entropy = common.completion_logprobs(model, *rows, 0.7)
        assert logprobs.shape == entropy.shape == rows[3].shape
        assert (logprobs[rows[3] == 0] == 0).all() and (entropy[rows[3] == 0] == 0).all()
        model.zero_grad()
        (logprobs[:, :6] * weight).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((logprobs[:, :6], entropy[:, :6], gradient))
    for a, b in zip(*results):
        same(a, b)


def test_another_row_in_the_batch_changes_no_number(model):
    """Each row alone, without padding, is the same as in the whole batch, in any order."""
    model.double()
    together = common.completion_logprobs(model, *batch())
    reversed_ = common.completion_logprobs(model, *batch(PROMPTS[::-1], COMPLETIONS[::-1]))
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
        alone = common.completion_logprobs(model, *batch([prompt], [completion]))
        for a, b, c in zip(together, alone, reversed_):
            same(a[i, :len(completion)], b[0])
            same(a[i], c[-1 - i])


def test_padding_may_be_any_token_even_end_of_sequence(model):
    """Only the mask tells: an end-of-sequence token inside it keeps its log-prob."""
    logprobs, entropy = common.completion_logprobs(model, *batch())
    last = torch.tensor([len(c) - 1 for c in COMPLETIONS])
    for pad_id in (EOS, 33):
        others = common.completion_logprobs(model, *batch(pad_id=pad_id, left=2, right=1))
        same(others[0][:, :-1], logprobs)
        same(others[1][:, :-1], entropy)
    assert (logprobs[torch.arange(len(last)), last] < -1e-3).all()
    prompt_ids, prompt_mask, completion_ids, mask = batch(left=2, right=2)
    noise = torch.randint(V, (4, 40))
    prompt_ids = torch.where(prompt_mask == 1, prompt_ids, noise[:, :prompt_ids.shape[1]])
    completion_ids = torch.where(mask == 1, completion_ids, noise[:, :completion_ids.shape[1]])
    others = common.completion_logprobs(model, prompt_ids, prompt_mask, completion_ids, mask)
    same(others[0][:, :-2], logprobs)


PROMPT_OF = [0, 2, 1, 0, 2, 0]  # which of the prompts each of six completions has
SIX = [COMPLETIONS[i % 4] for i in range(6)]


@pytest.mark.parametrize("prompts", [PROMPTS, [PROMPTS[1]] * 3], ids=["prompts", "of one token"])
def test_completions_of_one_prompt_share_its_forward_pass(model, prompts):
    """Values and the gradient of every parameter are those of each row alone, in float64."""
    model.double()
    rows = batch([prompts[i] for i in PROMPT_OF], SIX, left=1)
    weight = torch.randn(6, 6, dtype=torch.float64)
    modeling.cache_works(model), modeling.has_plain_head(model)
    sizes = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, ids, __: sizes.append(ids[0].numel()))
    shared = common.completion_logprobs(model, *rows)[0]
    hook.remove()
    assert sum(sizes) < rows[0].numel() + 6 * 6 - 6  # a prompt's tokens were read once
    (shared * weight).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = torch.cat([common.completion_logprobs(model, *(t[i:i + 1] for t in rows))[0] for i in range(6)])
    (alone * weight).sum().backward()
    same(shared, alone)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-6, msg=name)


def test_gradient_checkpointing_shares_nothing_and_changes_nothing(model):
    """It forbids a cache: with one, transformers would silently leave the prompt out."""
    rows = batch([PROMPTS[i] for i in PROMPT_OF], SIX)
    expected = common.completion_logprobs(model, *rows)[0]
    model.gradient_checkpointing_enable()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(common.completion_logprobs(model, *rows)[0], expected, atol=1e-5, rtol=0)


def test_a_sliding_window_is_the_same_through_the_cache():
    model = MistralForCausalLM(MistralConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=4, initializer_range=0.3, pad_token_id=PAD)).eval()
    rows = batch([PROMPTS[i] for i in PROMPT_OF], SIX)
    torch.testing.assert_close(
        common.completion_logprobs(model, *rows)[0],
        torch.cat([common.completion_logprobs(model, *(t[i:i + 1] for t in rows))[0] for i in range(6)]),
        atol=1e-5, rtol=0)


def test_empty_completions_are_zeros(model):
    prompt_ids, prompt_mask, completion_ids, mask = batch()
    rest = prompt_ids, prompt_mask, completion_ids
    empty = common.completion_logprobs(model, *rest, mask * 0)
    assert all(x.shape == mask.shape and (x == 0).all() for x in empty)
    mask[1] = 0  # one row without a token beside others with some
    logprobs, _ = common.completion_logprobs(model, *rest, mask)
    assert (logprobs[1] == 0).all() and (logprobs[0, :4] < 0).all()


def test_logits_are_computed_for_completions_only(model):
    """Logits of (B, P + T, V) would take most of a step's memory. The head sees the completions' tokens only, and
    no layer sees columns that are padding in every row."""
    modeling.cache_works(model), modeling.has_plain_head(model)
    shapes = {}
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, args: shapes.update(body=args[0].shape))
    model.lm_head.register_forward_pre_hook(lambda _, args: shapes.update(head=args[0].shape))
    common.completion_logprobs(model, *batch(left=4, right=9))
    assert shapes["head"] == (4 + 2 + 6 + 1, 32)
    assert shapes["body"] == (4, 7 + 5)


def test_logits_in_chunks_change_no_number(model, monkeypatch):
    """Values, entropies and gradients, where the backward pass computes the logits again."""
    weight = torch.randn(len(PROMPTS), 6)
    results = []
    modeling.cache_works(model), modeling.has_plain_head(model)
    for numbers in (2**26, 3 * V, 1):
        monkeypatch.setattr(common, "LOGITS_AT_ONCE", numbers)
        sizes = []
        hook = model.lm_head.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
        logprobs, entropy = common.completion_logprobs(model, *batch())
        (logprobs * weight).sum().backward()
        hook.remove()
        assert max(sizes) == min(13, max(1, numbers // V))
        results.append([logprobs.detach(), entropy, *(p.grad for p in model.parameters())])
        model.zero_grad()
    for chunked in results[1:]:
        for a, b in zip(results[0], chunked):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


SIZES = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, initializer_range=0.3, pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS)


@pytest.mark.parametrize("other", [
    lambda: Gemma2ForCausalLM(Gemma2Config(head_dim=16, final_logit_softcapping=2.0, **SIZES)),
    lambda: CohereForCausalLM(CohereConfig(logit_scale=0.3, **SIZES)),
    lambda: GraniteForCausalLM(GraniteConfig(logits_scaling=3.0, **SIZES))], ids=["gemma2", "cohere", "granite"])
def test_capped_and_scaled_logits_are_the_models_own(other):
    """The head of the last hidden states alone would be silently wrong."""
    model = other().eval()
    logprobs, _ = common.completion_logprobs(model, *batch([PROMPTS[0]] * 4))
    assert not modeling.has_plain_head(model)
    for i, completion in enumerate(COMPLETIONS):
        logits = model(torch.tensor([PROMPTS[0] + completion])).logits[0, 2:-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(logprobs[i, :len(completion)], expected, atol=1e-5, rtol=0)


def test_log_softmax_is_float32_under_bfloat16(model):
    """bfloat16 has three digits; the probabilities of all tokens add up to 1 far more closely."""
    modeling.cache_works(model), modeling.has_plain_head(model)
    head = []
    model.lm_head.register_forward_hook(lambda *args: head.append(args[-1].dtype))
    total = 0.0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for token in range(V):
            logprobs, entropy = common.completion_logprobs(model, *batch([PROMPTS[2]], [[token]]), temperature=0.7)
            assert logprobs.dtype == entropy.dtype == torch.float32
            total += math.exp(logprobs.item())
    assert set(head) == {torch.bfloat16}
    assert total == pytest.approx(1, abs=1e-5)


def test_a_rollouts_logprobs_are_those_of_its_micro_batches(model):
    tokenizer = word_tokenizer(["<unk>", "</s>"] + [f"w{i}" for i in range(V - 2)], eos_token="</s>")
    rollout = common.Rollout(*batch(), tokenizer, torch.tensor([EOS]))
    expected = common.completion_logprobs(model, *batch(), 0.7)
    for groups in ([torch.tensor([2]), torch.tensor([3, 0]), torch.tensor([1])], [torch.arange(4)]):
        found = common.rollout_logprobs(model, rollout, groups, 0.7)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b.detach(), atol=1e-5, rtol=0)
            assert not a.requires_grad
    assert all((x == 0).all() for x in common.rollout_logprobs(model, rollout, []))


# --- KL estimators, where every token can be enumerated

THETA = torch.tensor([1.5, -0.5, 0.3, -2.0, 0.8], dtype=torch.float64)
REF = torch.tensor([-1.0, 0.7, 0.2, 0.9, -0.4], dtype=torch.float64).log_softmax(0)


def kl(p, q):
    return (p.exp() * (p - q)).sum()


def gradient_of(loss):
    theta = THETA.clone().requires_grad_()
    return torch.autograd.grad(loss(theta.log_softmax(0)), theta)[0]


def test_kl_estimates_as_values():
    """E[k1] = E[k3] = KL(policy || reference), and not the reverse KL; k2 is E[d^2] / 2."""
    policy = THETA.log_softmax(0)
    mean = {kind: (policy.exp() * common.kl_estimate(policy, REF, kind)).sum() for kind in ("k1", "k2", "k3")}
    assert abs(kl(policy, REF) - kl(REF, policy)) > 0.01
    assert mean["k1"].item() == pytest.approx(kl(policy, REF).item(), abs=1e-12)
    assert mean["k3"].item() == pytest.approx(kl(policy, REF).item(), abs=1e-12)
    assert mean["k2"].item() == pytest.approx((policy.exp() * (policy - REF).square()).sum().item() / 2, abs=1e-12)
    assert torch.equal(common.kl_estimate(policy, REF), policy - REF)  # k1 is the default


@pytest.mark.parametrize("kind, times_ratio, expected", [
    ("k1", False, lambda p: 0 * kl(p, REF)),
    ("k2", False, lambda p: kl(p, REF)),
    ("k3", False, lambda p: kl(REF, p)),
    ("k3", True, lambda p: kl(p, REF)),
    ("k1", True, lambda p: kl(p, REF)),
], ids=["k1", "k2", "k3", "ratio k3", "ratio k1"])
def test_kl_estimates_as_losses(kind, times_ratio, expected):
    """Of which KL the expected gradient is, with the sampled tokens fixed."""
    def loss(p):
        estimate = common.kl_estimate(p, REF, kind)
        ratio = (p - p.detach()).exp() if times_ratio else 1
        return (p.detach().exp() * ratio * estimate).sum()
    torch.testing.assert_close(gradient_of(loss), gradient_of(expected), atol=1e-12, rtol=1e-9)
    forward, reverse = gradient_of(lambda p: kl(p, REF)), gradient_of(lambda p: kl(REF, p))
    assert (forward - reverse).norm() > 0.1


def test_k3_near_zero():
    """exp(-d) - 1 + d cancels in float32: without expm1 nothing remains of 1e-4 ** 2 / 2."""
    d = torch.cat([sign * torch.logspace(-5, 0, 200) for sign in (1, -1)])
    k3 = common.kl_estimate(d, torch.zeros_like(d), "k3")
    exact = torch.expm1(-d.double()) + d.double()
    error = (k3.double() - exact).abs()
    assert (error <= 2e-7 * d.abs()).all()  # float32's spacing at d, not at 1
    assert (k3 >= -1e-7 * d.abs()).all() and (k3[d.abs() > 1e-4] > 0).all()
    assert common.kl_estimate(torch.zeros(1), torch.zeros(1), "k3").item() == 0


# --- masked statistics and micro-batches

def test_masked_mean():
    values = torch.tensor([[1., 2., 90.], [4., 70., 80.]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert common.masked_mean(values, mask).item() == pytest.approx(7 / 3)
    assert common.masked_mean(values, mask, 1).tolist() == [1.5, 4]
    assert common.masked_mean(values, mask, 0).tolist() == [2.5, 2, 0]
    assert common.masked_mean(values, mask * 0).item() == 0
    assert common.masked_mean(values, mask * 0, 1).tolist() == [0, 0]
    common.masked_mean(values, mask.bool()).backward()
    assert (values.grad[mask == 0] == 0).all()


def test_masked_whiten_is_numpys_inside_the_mask():
    values, mask = 3 + 5 * torch.randn(6, 7), torch.rand(6, 7) < 0.6
    values[~mask] = 1e4  # must not enter the statistics
    entries = values[mask].double().numpy()
    whitened = common.masked_whiten(values, mask.long())
    np.testing.assert_allclose(whitened[mask], (entries - entries.mean()) / entries.std(), atol=1e-4)
    assert (whitened[~mask] == 0).all()


def test_masked_whiten_uses_the_mean_it_is_given():
    """With several processes, the mean and the variance are those of all of them."""
    first, second = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    masks = [torch.rand(5, 3) < 0.7 for _ in range(2)]
    whole = common.masked_whiten(torch.cat([first, second]), torch.cat(masks))
    calls = iter([(torch.cat([first, second]), torch.cat(masks))])

    def global_mean(values, mask):
        found = next(calls, None)
        if found:  # of the values; then of the squares of what is centered by it
            global_mean.mean = common.masked_mean(*found)
            return global_mean.mean
        both = torch.cat([first, second]) - global_mean.mean
        return common.masked_mean(both.square(), torch.cat(masks))
    torch.testing.assert_close(common.masked_whiten(first, masks[0], global_mean), whole[:5])


def test_masked_whiten_of_equal_values():
    """Rounding must not be blown up to advantages of size 1 (0.1 is not exact in binary)."""
    for rows in (1, 2, 3, 9):
        whitened = common.masked_whiten(torch.full((rows, 12), 0.1), torch.ones(rows, 12))
        assert whitened.abs().max() < 0.01


@pytest.mark.parametrize("tokens", [1, 12, 20, 35, 1000])
def test_micro_batches(tokens):
    """Every row once, the longest first, also for some of the rows; a group is as large as it may be."""
    lengths = torch.randint(1, 13, (17,))
    for rows in (None, torch.tensor([16, 2, 3, 5, 8, 11])):
        groups = common.micro_batches(lengths, tokens, rows)
        order = torch.cat(groups)
        assert sorted(order.tolist()) == sorted(range(17) if rows is None else rows.tolist())
        assert lengths[order].tolist() == sorted(lengths[order].tolist(), reverse=True)
        for group, following in zip(groups, [*groups[1:], None]):
            longest = lengths[group[0]].item()
            assert len(group) == 1 or len(group) * longest <= tokens
            assert lengths[group].min() >= 0.7 * longest
            if following is not None:  # one more row would be too many tokens, or too short
                assert (len(group) + 1) * longest > tokens or lengths[following[0]] < 0.7 * longest


def test_micro_batches_by_hand():
    lengths = torch.tensor([3, 50, 8, 7, 3, 9])
    groups = [group.tolist() for group in common.micro_batches(lengths, 20)]
    assert groups == [[1], [5, 2], [3], [0, 4]]  # 50 alone; 2 x 9, as 3 x 9 is too many; 3 < 0.7 x 7
    assert [g.tolist() for g in common.micro_batches(lengths, 20, torch.tensor([0, 2, 4]))] == [[2], [0, 4]]
    assert [g.tolist() for g in common.micro_batches(lengths, 27)] == [[1], [5, 2, 3], [0, 4]]


def test_a_compiled_function_gives_the_same(model):
    """--compile: values, and gradients of log-probs, in several chunks of logits."""
    expected = None
    for function in (None, torch.compile(common.token_logprobs, dynamic=True)):
        with pytest.MonkeyPatch.context() as patch:
            if function:
                patch.setattr(model, "token_logprobs", function, raising=False)
            patch.setattr(common, "LOGITS_AT_ONCE", 3 * V)
            model.zero_grad()
            logprobs, entropy = common.completion_logprobs(model, *batch(), 0.7)
            logprobs.square().sum().backward()
        found = logprobs.detach(), entropy, torch.cat([p.grad.flatten() for p in model.parameters()])
        expected = expected or found
        for a, b in zip(found, expected):
            assert (a - b).norm() <= 1e-5 * b.norm()


def test_prompts_are_shared_where_that_takes_fewer_tokens():
    """Padding included: a group of 16 with a short prompt, pairs with a long one; not pairs of all lengths in one
    batch, nor rows with a prompt of their own. Two passes must save more on a GPU."""
    assert modeling.sharing_pays(4, 20, 64, 40, 60, False) and modeling.sharing_pays(8, 100, 16, 20, 118, False)
    assert not modeling.sharing_pays(8, 38, 16, 35, 45, False) and not modeling.sharing_pays(64, 20, 64, 40, 60, False)
    assert not modeling.sharing_pays(4, 20, 64, 40, 60, True) and modeling.sharing_pays(4, 60, 64, 40, 100, True)
