"""common.py against slow, independent computations: loops over tokens, enumeration, numpy."""
import copy
import gzip
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (AutoModelForCausalLM, AutoTokenizer, CohereConfig, CohereForCausalLM,
                          Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel,
                          GraniteConfig, GraniteForCausalLM,
                          LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification,
                          MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast,
                          Qwen2Config, Qwen2ForCausalLM, logging)

import common

logging.set_verbosity_error()  # as the scripts do
logging.disable_progress_bar()
V, EOS, PAD = 40, 1, 0


@pytest.fixture
def fails(capsys):
    """fails(call, *words): exit code 2, and one line on stderr that has the words."""
    def check(call, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            call()
        err = capsys.readouterr().err
        assert end.value.code == 2
        assert err.startswith("error: ") and err.endswith("\n")
        assert len(err.splitlines()) == 1, err
        for word in words:
            assert str(word) in err
    return check


# --- log-probs

def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{**dict(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD), **changes}))


def gpt2(**changes):
    """Absolute positions: padding on the left shifts them unless the mask is counted."""
    return GPT2LMHeadModel(GPT2Config(**{**dict(
        vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3,
        bos_token_id=None, eos_token_id=EOS), **changes}))


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.3, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD))


@pytest.fixture(params=[llama, gpt2, qwen2], ids=["llama", "gpt2", "qwen2"])
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


# lengths differ in both parts; the third completion was cut, the others end by themselves
PROMPTS = [[5, 6, 7], [9], [10, 11, 12, 13, 14, 15, 16], [5, 9, 5, 9]]
COMPLETIONS = [[20, 21, 22, EOS], [23, EOS], [24, 25, 26, 27, 28, 29], [EOS]]


def batch(prompts=PROMPTS, completions=COMPLETIONS, pad_id=PAD, left=0, right=0):
    """prompt_ids, prompt_mask, completion_ids, mask, with more padding on either side."""
    prompt_ids, prompt_mask = common.pad(prompts, pad_id, "left")
    completion_ids, mask = common.pad(completions, pad_id, "right")
    grow = torch.nn.functional.pad
    return (grow(prompt_ids, (left, 0), value=pad_id), grow(prompt_mask, (left, 0)),
            grow(completion_ids, (0, right), value=pad_id), grow(mask, (0, right)))


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
            expected = (logits / temperature).log_softmax(-1)
            assert logprobs[i, t].item() == pytest.approx(expected[token].item(), abs=1e-5)
            of = -(expected.exp() * expected).sum().item()
            assert entropy[i, t].item() == pytest.approx(of, abs=1e-5)
            assert 0.1 < of < math.log(V) - 0.1  # neither sure nor indifferent
    assert logprobs.requires_grad and not entropy.requires_grad
    assert logprobs.dtype == entropy.dtype == torch.float32


@pytest.mark.parametrize("left, right", [(3, 0), (0, 5), (7, 2)])
def test_padding_changes_no_number(model, left, right):
    """Of values and of gradients (in float64, so that rounding hides nothing); what is behind
    the mask is 0 exactly, at the width that came in."""
    model.double()
    weight = torch.randn(len(PROMPTS), 6)
    results = []
    for grown in (batch(), batch(left=left, right=right)):
        logprobs, entropy = common.completion_logprobs(model, *grown, 0.7)
        assert logprobs.shape == entropy.shape == grown[3].shape
        assert (logprobs[grown[3] == 0] == 0).all() and (entropy[grown[3] == 0] == 0).all()
        model.zero_grad()
        (logprobs[:, :6] * weight).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((logprobs[:, :6], entropy[:, :6], gradient))
    same(results[0][0], results[1][0])
    same(results[0][1], results[1][1])
    same(results[0][2], results[1][2])


def test_another_row_in_the_batch_changes_no_number(model):
    """Each row alone, without any padding, as in the batch of them all, in any order."""
    model.double()
    together = common.completion_logprobs(model, *batch())
    turned = common.completion_logprobs(model, *batch(PROMPTS[::-1], COMPLETIONS[::-1]))
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
        alone = common.completion_logprobs(model, *batch([prompt], [completion]))
        for a, b, c in zip(together, alone, turned):
            same(a[i, :len(completion)], b[0])
            same(a[i], c[-1 - i])


def test_padding_may_be_any_token_even_end_of_sequence(model):
    """Told by the mask alone: the end-of-sequence token inside it keeps its log-prob."""
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


GROUPS = [0, 2, 1, 0, 2, 0]  # of which of PROMPTS each completion is


@pytest.mark.parametrize("prompts", [PROMPTS, [PROMPTS[1]] * 3], ids=["prompts", "of one token"])
def test_completions_of_one_prompt_share_its_pass(model, prompts):
    """Values and every parameter's gradient are those of each row alone, in float64."""
    model.double()
    completions = [COMPLETIONS[i % 4] for i in range(6)]
    rows = batch([prompts[i] for i in GROUPS], completions, left=1)
    weight = torch.randn(6, 6, dtype=torch.float64)
    common.has_plain_head(model)
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, ids, __: seen.append(ids[0].numel()))
    shared = common.completion_logprobs(model, *rows)[0]
    hook.remove()
    assert sum(seen) < rows[0].numel() + 6 * 6 - 6  # a prompt's tokens were read once
    (shared * weight).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = torch.cat([common.completion_logprobs(model, *(t[i:i + 1] for t in rows))[0] for i in range(6)])
    (alone * weight).sum().backward()
    torch.testing.assert_close(shared, alone, atol=1e-6, rtol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-6, msg=name)


def test_gradient_checkpointing_shares_nothing_and_changes_nothing(model):
    """It forbids a cache: with one it would leave the prompt out without a word."""
    rows = batch([PROMPTS[i] for i in GROUPS], [COMPLETIONS[i % 4] for i in range(6)])
    expected = common.completion_logprobs(model, *rows)[0]
    common.checkpoint_gradients(model)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(common.completion_logprobs(model, *rows)[0], expected, atol=1e-5, rtol=0)


def test_a_sliding_window_sees_the_same_through_the_cache():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=4, initializer_range=0.3, pad_token_id=PAD)).eval()
    rows = batch([PROMPTS[i] for i in GROUPS], [COMPLETIONS[i % 4] for i in range(6)])
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


def test_logits_exist_for_the_completion_only(model):
    """(B, P + T, V) of logits are the most memory of a step: the head sees the
    completions' tokens, and padding that all rows share is seen by no layer."""
    common.has_plain_head(model)
    seen = {}
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, args: seen.update(trunk=args[0].shape))
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.update(head=args[0].shape))
    common.completion_logprobs(model, *batch(left=4, right=9))
    assert seen["head"] == (4 + 2 + 6 + 1, 32)
    assert seen["trunk"] == (4, 7 + 5)


def test_logits_in_chunks_change_no_number(model, monkeypatch):
    """Values, entropies and gradients, the logits made again in the backward pass."""
    weight = torch.randn(len(PROMPTS), 6)
    results = []
    common.has_plain_head(model)
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
    """A head on the last hidden states alone would be wrong without a word."""
    torch.manual_seed(0)
    model = other().eval()
    logprobs, _ = common.completion_logprobs(model, *batch([PROMPTS[0]] * 4))
    assert not common.has_plain_head(model)
    for i, completion in enumerate(COMPLETIONS):
        logits = model(torch.tensor([PROMPTS[0] + completion])).logits[0, 2:-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(logprobs[i, :len(completion)], expected, atol=1e-5, rtol=0)


def test_log_softmax_is_float32_under_bfloat16(model):
    """bfloat16 has three digits: the probabilities of a token add up to 1 far beyond them."""
    common.has_plain_head(model)
    head = []
    model.lm_head.register_forward_hook(lambda *args: head.append(args[-1].dtype))
    total = 0.0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for token in range(V):
            logprobs, entropy = common.completion_logprobs(
                model, *batch([PROMPTS[2]], [[token]]), temperature=0.7)
            assert logprobs.dtype == entropy.dtype == torch.float32
            total += math.exp(logprobs.item())
    assert set(head) == {torch.bfloat16}
    assert total == pytest.approx(1, abs=1e-5)


# --- KL estimators, where every token can be enumerated

THETA = torch.tensor([1.5, -0.5, 0.3, -2.0, 0.8], dtype=torch.float64)
REF = torch.tensor([-1.0, 0.7, 0.2, 0.9, -0.4], dtype=torch.float64).log_softmax(0)


def kl(p, q):
    return (p.exp() * (p - q)).sum()


def gradient_of(loss):
    theta = THETA.clone().requires_grad_()
    return torch.autograd.grad(loss(theta.log_softmax(0)), theta)[0]


def test_kl_estimates_as_values():
    """E[k1] = E[k3] = KL(policy || reference), and not the reversed KL; k2 is E[d^2] / 2."""
    policy = THETA.log_softmax(0)
    mean = {kind: (policy.exp() * common.kl_estimate(policy, REF, kind)).sum()
            for kind in ("k1", "k2", "k3")}
    assert abs(kl(policy, REF) - kl(REF, policy)) > 0.01
    assert mean["k1"].item() == pytest.approx(kl(policy, REF).item(), abs=1e-12)
    assert mean["k3"].item() == pytest.approx(kl(policy, REF).item(), abs=1e-12)
    assert mean["k2"].item() == pytest.approx(
        (policy.exp() * (policy - REF).square()).sum().item() / 2, abs=1e-12)
    assert torch.equal(common.kl_estimate(policy, REF), policy - REF)  # k1 is the default


@pytest.mark.parametrize("kind, times_ratio, expected", [
    ("k1", False, lambda p: 0 * kl(p, REF)),
    ("k2", False, lambda p: kl(p, REF)),
    ("k3", False, lambda p: kl(REF, p)),
    ("k3", True, lambda p: kl(p, REF)),
    ("k1", True, lambda p: kl(p, REF)),
], ids=["k1", "k2", "k3", "ratio k3", "ratio k1"])
def test_kl_estimates_as_losses(kind, times_ratio, expected):
    """The expected gradient, the sampled tokens held fixed: of which KL it is the gradient."""
    def loss(p):
        estimate = common.kl_estimate(p, REF, kind)
        ratio = (p - p.detach()).exp() if times_ratio else 1
        return (p.detach().exp() * ratio * estimate).sum()
    torch.testing.assert_close(gradient_of(loss), gradient_of(expected), atol=1e-12, rtol=1e-9)
    forward, reverse = gradient_of(lambda p: kl(p, REF)), gradient_of(lambda p: kl(REF, p))
    assert (forward - reverse).norm() > 0.1


def test_k3_near_zero():
    """exp(-d) - 1 + d cancels in float32: without expm1 nothing is left of 1e-4 ** 2 / 2."""
    d = torch.cat([sign * torch.logspace(-5, 0, 200) for sign in (1, -1)])
    k3 = common.kl_estimate(d, torch.zeros_like(d), "k3")
    exact = torch.expm1(-d.double()) + d.double()
    error = (k3.double() - exact).abs()
    assert (error <= 2e-7 * d.abs()).all()  # of float32's own spacing at d, not at 1
    assert (k3 >= -1e-7 * d.abs()).all() and (k3[d.abs() > 1e-4] > 0).all()
    assert common.kl_estimate(torch.zeros(1), torch.zeros(1), "k3").item() == 0


# --- masked statistics, groups of rows, padding

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


@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_whiten_is_numpys_on_the_entries_of_the_mask(shift_mean):
    torch.manual_seed(0)
    values, mask = 3 + 5 * torch.randn(6, 7), torch.rand(6, 7) < 0.6
    values[~mask] = 1e4  # what is outside must not be seen
    entries = values[mask].double().numpy()
    expected = (entries - entries.mean()) / entries.std()
    expected += 0 if shift_mean else entries.mean()
    whitened = common.masked_whiten(values, mask.long(), shift_mean)
    np.testing.assert_allclose(whitened[mask], expected, atol=1e-4)
    assert (whitened[~mask] == 0).all()


def test_masked_whiten_of_equal_values():
    """Rounding is not to be blown up to advantages of size 1 (0.1 is not exact in binary)."""
    for rows in (1, 2, 3, 9):
        whitened = common.masked_whiten(torch.full((rows, 12), 0.1), torch.ones(rows, 12))
        assert whitened.abs().max() < 0.01


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_micro_batches(size):
    """Every row once, the longest first, of a part of the rows too; a group is as large as it may be."""
    torch.manual_seed(0)
    lengths = torch.randint(1, 9, (17,))
    for rows in (None, torch.tensor([16, 2, 3, 5, 8, 11])):
        groups = common.micro_batches(lengths, size, rows=rows)
        assert [len(g) <= size for g in groups] == [True] * len(groups)
        order = torch.cat(groups)
        assert sorted(order.tolist()) == sorted(range(17) if rows is None else rows.tolist())
        assert lengths[order].tolist() == sorted(lengths[order].tolist(), reverse=True)
        for group, following in zip(groups, groups[1:]):
            assert lengths[group].min() >= 0.7 * lengths[group[0]]
            assert len(group) == size or lengths[following[0]] < 0.7 * lengths[group[0]]


def test_micro_batches_of_so_many_tokens():
    lengths = torch.tensor([3, 50, 8, 7, 3, 9])
    parts = [part.tolist() for part in common.micro_batches(lengths, 3, 20)]
    assert parts == [[1], [5, 2], [3], [0, 4]]  # 50 alone; 2 x 9, as 3 x 9 is too many; 7 and 3 are not alike
    assert [part.tolist() for part in common.micro_batches(lengths, 2, 20, torch.tensor([0, 2, 4]))] == [[2], [0, 4]]


def test_pad():
    rows = [[1, 2, 3], [4], []]
    ids, mask = common.pad(rows, 9, "left")
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4], [9, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    ids, mask = common.pad(rows, 3, "right")  # a pad token that the row also has
    assert ids.tolist() == [[1, 2, 3], [4, 3, 3], [3, 3, 3]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64


# --- rows of data

USER = [{"role": "user", "content": "is it so ?"}]
TURNS = [{"role": "system", "content": "be short"}, *USER,
         {"role": "assistant", "content": "no"}, {"role": "user", "content": "sure ?"}]
A = "\n\nHuman: a\n\nAssistant:"  # a transcript's first turns


def write(path, *rows):
    """The path of a file of rows: texts as they are, anything else as JSON."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (gzip.open if str(path).endswith(".gz") else open)(path, "wb").write(text.encode())
    return str(path)


def says(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_blank_lines_and_unicode(tmp_path, name):
    text = "größer 🙂 \u2028 zwei"
    path = write(tmp_path / name, {"a": 1}, "", '{"a": "%s"}' % text, "  ", {"b": None})
    assert common.read_rows(path) == [
        (f"{path}:1", {"a": 1}), (f"{path}:3", {"a": text}), (f"{path}:5", {"b": None})]


def test_prompts_as_texts_and_as_messages(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"prompt": "hi", "answer": 3}, {"prompt": TURNS})
    assert common.read_prompts(path) == [{"prompt": "hi", "answer": 3}, {"prompt": TURNS}]


def test_prompts_of_another_column(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"question": "hi", "prompt": "old", "answer": 3})
    assert common.read_prompts(path, "question") == [
        {"question": "hi", "prompt": "hi", "answer": 3}]


def test_prompts_of_pairs(tmp_path):
    """The prompt inside both answers, or beside them."""
    path = write(tmp_path / "rows.jsonl",
                 {"chosen": A + " b", "rejected": A + " c"},
                 {"chosen": USER + says("b"), "rejected": USER + says("c")},
                 {"prompt": "hi", "chosen": "b", "rejected": "c"})
    prompts = [row["prompt"] for row in common.read_prompts(path)]
    assert prompts == [A, USER, "hi"]


PAIRS = {  # name: row, (prompt, chosen, rejected)
    "texts": ({"prompt": "hi", "chosen": " b", "rejected": " c"}, ("hi", " b", " c")),
    "messages": ({"prompt": TURNS, "chosen": "b", "rejected": "c"}, (TURNS, "b", "c")),
    "answers as lists of one message": (
        {"prompt": USER, "chosen": says("b"), "rejected": says("c")}, (USER, "b", "c")),
    "text prompt, answers as lists of one message": (
        {"prompt": "hi", "chosen": says("b"), "rejected": says("c")}, ("hi", "b", "c")),
    "whole conversations": (
        {"chosen": TURNS + says("b"), "rejected": TURNS + says("c")}, (TURNS, "b", "c")),
    "whole conversations beside a prompt": (  # UltraFeedback
        {"prompt": "is it so ?", "chosen": USER + says("b"), "rejected": USER + says("c")},
        (USER, "b", "c")),
    "whole conversations, both answers the same": (
        {"chosen": USER + says("b"), "rejected": USER + says("b")}, (USER, "b", "b")),
    "transcript": ({"chosen": A + " yes", "rejected": A + " no"}, (A, " yes", " no")),
    "transcript, answers that begin alike": (  # the cut is the turn's, not inside the answer
        {"chosen": A + " yes it is", "rejected": A + " yes it is not so"},
        (A, " yes it is", " yes it is not so")),
    "transcript of several turns": (
        {"chosen": A + " b" + A + " well yes", "rejected": A + " b" + A + " well no"},
        (A + " b" + A, " well yes", " well no")),
    "transcript with paragraphs in the answer": (
        {"chosen": A + " well\n\nyes", "rejected": A + " well\n\nno"},
        (A, " well\n\nyes", " well\n\nno")),
    "plain texts, cut at a space and not inside a word": (
        {"chosen": "the sky is blue", "rejected": "the sky is black"},
        ("the sky is", " blue", " black")),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(tmp_path, name):
    """The three forms that public data sets have; other columns stay."""
    row, (prompt, chosen, rejected) = PAIRS[name]
    path = write(tmp_path / "rows.jsonl", {**row, "margin": 2})
    assert common.read_pairs(path) == [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": 2}]


def test_pairs_with_the_prompt_in_another_column(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"question": "hi", "chosen": "b", "rejected": "c"})
    assert common.read_pairs(path, "question")[0]["prompt"] == "hi"


@pytest.mark.parametrize("row, words", [
    ('{"prompt": "a"', "not JSON"),
    ("nothing", "not JSON"),
    ("[1, 2]", "JSON object"),
    ('"text"', "JSON object"),
    ({"question": "a"}, "question"),
    ({"prompt": ""}, "empty"),
    ({"prompt": " \n"}, "empty"),
    ({"prompt": []}, "empty"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": [{"role": "user"}]}, "messages"),
    ({"prompt": ["hi"]}, "messages"),
    ({"prompt": TURNS[:3]}, "assistant"),
    ({"chosen": USER, "rejected": "text"}, "chosen"),
])
def test_bad_prompts_name_their_line(tmp_path, fails, row, words):
    path = write(tmp_path / "rows.jsonl", {"prompt": "fine"}, "", row)
    fails(lambda: common.read_prompts(path), f"{path}:3:", words)


@pytest.mark.parametrize("row, words", [
    ({"prompt": "a", "chosen": "b"}, "rejected"),
    ({"prompt": "a", "completion": "b"}, "chosen"),
    ({"prompt": "a", "chosen": 3, "rejected": "b"}, "texts"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "texts"),
    ({"prompt": "a", "chosen": [], "rejected": "b"}, "texts"),
    ({"prompt": "", "chosen": "b", "rejected": "c"}, "empty"),
    ({"prompt": [3], "chosen": "b", "rejected": "c"}, "messages"),
    ({"chosen": 3, "rejected": "b"}, "texts"),
    ({"chosen": "abc", "rejected": "abd"}, "no beginning in common"),
    ({"chosen": "x", "rejected": "y"}, "no beginning in common"),
    ({"chosen": USER + says("b"), "rejected": "text"}, "both"),
    ({"chosen": says("b"), "rejected": says("c")}, "same messages"),
    ({"chosen": USER + says("b"), "rejected": TURNS + says("c")}, "same messages"),
    ({"chosen": TURNS + says("b"), "rejected": TURNS + says("c") + USER}, "same messages"),
    # half of a conversation must not be taken for an answer
    ({"prompt": USER, "chosen": says("b"), "rejected": says("c") + USER + says("d")}, ""),
])
def test_bad_pairs_name_their_line(tmp_path, fails, row, words):
    fine = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write(tmp_path / "rows.jsonl", fine, "", row)
    fails(lambda: common.read_pairs(path), f"{path}:3:", words)


ZIPPED = gzip.compress(b'{"prompt": "is it so ?"}\n' * 50, mtime=0)


UNREADABLE = {
    "empty.jsonl": b"", "blank.jsonl": b"\n \n",
    "latin.jsonl": '{"prompt": "größer"}\n'.encode("latin-1"),
    "binary.jsonl": b"\x80\x00\xff\xfe\n",
    "text.jsonl.gz": b'{"prompt": "hi"}\n',
    "cut.jsonl.gz": ZIPPED[:-12],
    "method.jsonl.gz": ZIPPED[:2] + b"\xff" + ZIPPED[3:],
    "inside.jsonl.gz": ZIPPED[:10] + b"\xff" + ZIPPED[11:],  # no such kind of block
    "sum.jsonl.gz": ZIPPED[:-8] + b"\x00" * 4 + ZIPPED[-4:],
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files(tmp_path, fails, name):
    (tmp_path / name).write_bytes(UNREADABLE[name])
    fails(lambda: common.read_prompts(str(tmp_path / name)), tmp_path / name)


@pytest.mark.parametrize("name", [
    "missing.jsonl", "tiny/missing.jsonl", "a/b/c.jsonl", "tests", ""])
def test_missing_files(fails, name):
    fails(lambda: common.read_rows(name), name)


# --- tokenization

@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained("tiny/policy")


@pytest.fixture
def plain():
    """The same words, no chat template."""
    tokenizer = AutoTokenizer.from_pretrained("tiny/policy")
    tokenizer.chat_template = None
    return tokenizer


def word_tokenizer(words, template=None, **special):
    """A word is a token; a space ends it. Ids are as the words come."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([w for w in words if w.startswith("<")])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", chat_template=template, **special)


@pytest.mark.parametrize("prompt, text", [
    ("is it ?", "<|user|>is it ?<|end|>"),
    (USER, "<|user|>is it so ?<|end|>"),
    (TURNS, "<|system|>be short<|end|><|user|>is it so ?<|end|><|assistant|>no<|end|>"
            "<|user|>sure ?<|end|>"),
    ("\n\nHuman: a b\n\nAssistant: c\n\nHuman: d\n\ne\n\nAssistant:",
     "<|user|>a b<|end|><|assistant|>c<|end|><|user|>d\n\ne<|end|>"),
    ("\n\nHuman: a b", "<|user|>a b<|end|>"),
    ("Human: a b", "<|user|>Human: a b<|end|>"),
])
def test_render_with_a_template(tokenizer, prompt, text):
    """Texts are the user's turn, transcripts are parsed; the assistant is next, or spoke."""
    assert common.render(tokenizer, prompt) == text + "<|assistant|>"
    for completion in ("yes it is", " yes it is\n"):  # transcripts leave a space in front
        assert common.render(tokenizer, prompt, completion) == (
            text + "<|assistant|>yes it is<|end|>")


def test_render_leaves_its_arguments(tokenizer):
    prompt = copy.deepcopy(TURNS)
    common.render(tokenizer, prompt, "yes")
    assert prompt == TURNS


def test_render_without_a_template(plain, fails):
    """Texts follow one another as they are, transcripts too; end-of-sequence is there once."""
    for prompt in ("  the sky is", "\n\nHuman: a\n\nAssistant:"):
        assert common.render(plain, prompt) == prompt
        assert common.render(plain, prompt, " blue ") == prompt + " blue <|end|>"
        assert common.render(plain, prompt, " blue<|end|>") == prompt + " blue<|end|>"
        ids, = common.encode(plain, [common.render(plain, prompt, " blue")])
        assert ids.count(plain.eos_token_id) == 1 and ids[-1] == plain.eos_token_id
    fails(lambda: common.render(plain, USER), "tiny/policy", "chat template")
    fails(lambda: common.render(plain, USER, "yes"), "tiny/policy", "chat template")
    plain.eos_token = None
    assert common.render(plain, "a", " b") == "a b"


def test_a_template_that_refuses_a_prompt(tokenizer, fails):
    tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    fails(lambda: common.render(tokenizer, TURNS), "chat template", "roles must")


def test_special_tokens_are_written_once():
    """By the chat template, or else by the tokenizer: the text never begins twice."""
    tokenizer = word_tokenizer(["<unk>", "<s>", "</s>", "a", "b"], bos_token="<s>")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    assert common.encode(tokenizer, ["a b", "b"]) == [[1, 3, 4], [1, 4]]
    tokenizer.chat_template = "{{ bos_token }} {{ messages[0].content }}"
    assert common.encode(tokenizer, [common.render(tokenizer, "a b")]) == [[1, 3, 4]]


def test_tokenizers_without_a_pad_token_get_one(tmp_path, fails):
    word_tokenizer(["<unk>", "</s>", "a"], eos_token="</s>").save_pretrained(tmp_path / "a")
    (tmp_path / "a/config.json").write_text('{"model_type": "llama"}')
    assert common.load_tokenizer(str(tmp_path / "a")).pad_token == "</s>"
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").write_text('{"model_type": "llama"}')
    fails(lambda: common.load_tokenizer(str(tmp_path / "b")), tmp_path / "b", "tokenizer")


def test_prompts_that_are_too_long(tokenizer, fails, capsys):
    """Left out and counted aloud above the limit; no room to answer is an error."""
    rows = [{"prompt": "what is it"}, {"prompt": " ".join(["what"] * 10)}, {"prompt": "is"}]
    n = [3 + 3, 10 + 3, 1 + 3]  # of <|user|> … <|end|> <|assistant|>
    kept, prompts = common.encode_prompts(tokenizer, rows, "rows", room=13)
    assert kept == rows and [len(p) for p in prompts] == n and capsys.readouterr().out == ""
    kept, prompts = common.encode_prompts(tokenizer, rows, "rows", room=6, longest=6)
    assert kept == [rows[0], rows[2]] and [len(p) for p in prompts] == [6, 4]
    out = capsys.readouterr().out
    assert "rows: left out 1 of 3 rows" in out and out.count("\n") == 1
    tokens = tokenizer.convert_ids_to_tokens(prompts[0])
    assert tokens == ["<|user|>", "what", "is", "it", "<|end|>", "<|assistant|>"]
    for room, longest, words in [
            (12, 0, "rows: row 2: its prompt has 13"), (3, 5, "rows: row 3"),
            (99, 3, "rows: no row has a prompt of at most 3 tokens"), (-5, 0, "rows: row 1")]:
        fails(lambda: common.encode_prompts(tokenizer, rows, "rows", room, longest), words)


# --- models

def test_dropout_is_off_in_train_mode(tmp_path):
    """Not by eval(), for which gradient checkpointing would be off."""
    torch.manual_seed(0)
    ids = torch.randint(V, (2, 20))
    gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).save_pretrained(tmp_path)
    loud = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    quiet, missing = common.load_model(AutoModelForCausalLM, str(tmp_path), "cpu")
    quiet.train()
    assert not torch.equal(loud(ids).logits, loud(ids).logits)
    assert torch.equal(quiet(ids).logits, quiet(ids).logits) and not missing
    assert torch.equal(quiet(ids).logits, loud.eval()(ids).logits)


def test_weights_are_float32(tmp_path):
    """Updates of 1e-6 are lost in bfloat16 weights, however the folder stores them."""
    torch.manual_seed(0)
    stored = llama().bfloat16()
    stored.save_pretrained(tmp_path)
    loaded, _ = common.load_model(AutoModelForCausalLM, str(tmp_path), "cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.lm_head.weight, stored.lm_head.weight.float())
    assert common.context_of(loaded) == 64 and common.context_of(gpt2()) == 64


@pytest.mark.parametrize("name", [
    "runs/missing", "tiny/missing", "/missing/folder", "a/b/c", "", "common.py", "tests"])
def test_missing_models(fails, name):
    fails(lambda: common.load_model(AutoModelForCausalLM, name, "cpu"), name)
    fails(lambda: common.load_tokenizer(name), name)


@pytest.mark.parametrize("damage", [
    "no config", "config", "no weights", "pickle", "cut", "noise"])
def test_damaged_models(tmp_path, fails, damage):
    """A pickle may run code when it is loaded: safetensors only."""
    model = llama()
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "no config":
        config.unlink()
    if damage == "config":
        config.write_text(config.read_text()[:50])
    if damage in ("no weights", "pickle"):
        weights.unlink()
    if damage == "pickle":
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    if damage == "noise":
        weights.write_bytes(bytes(range(256)) * 4)
    fails(lambda: common.load_model(AutoModelForCausalLM, str(tmp_path), "cpu"), tmp_path)


# --- reward functions

def reward_function(tmp_path, source):
    (tmp_path / "rewards.py").write_text(source)
    return common.load_reward(f"{tmp_path}/rewards.py:reward", "cpu", 8)


def returning(tmp_path, value):
    return reward_function(tmp_path, f"def reward(prompts, completions, **c): return {value}")


ROWS = [{"prompt": "hi", "answer": "a"}, {"prompt": TURNS, "level": 3}]


def test_reward_function_has_trls_signature(tmp_path):
    """Keywords; a column that a row lacks is None; messages are answered by messages."""
    seen = tmp_path / "seen.json"
    reward = reward_function(tmp_path, f"""
import json
def reward(**keywords):
    json.dump(keywords, open({str(seen)!r}, "w"))
    return [1, None]
""")
    values = reward(ROWS, ["b", "c"])
    assert json.loads(seen.read_text()) == {
        "prompts": ["hi", TURNS], "answer": ["a", None], "level": [None, 3],
        "completions": ["b", [{"role": "assistant", "content": "c"}]]}
    assert values.dtype == torch.float32 and values[0] == 1 and values[1].isnan()


@pytest.mark.parametrize("value", [
    "[len(c) for c in completions]", "(float(len(c)) for c in completions)",
    "__import__('numpy').array([len(c) for c in completions])",
    "__import__('torch').tensor([len(c) for c in completions])",
    "[True, __import__('numpy').float32(2)]"])
def test_reward_function_may_return_any_numbers(tmp_path, value):
    reward = returning(tmp_path, value)
    assert reward([{"prompt": "a"}, {"prompt": "b"}], ["x", "yy"]).tolist() == [1, 2]


def test_reward_file_is_a_module(tmp_path):
    """Dataclasses look their own module up by name, so it must be known by it."""
    reward = reward_function(tmp_path, """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Rule:
    points: float
def reward(completions, **columns):
    return [Rule(2.0).points for _ in completions]
""")
    assert reward(ROWS, ["b", "c"]).tolist() == [2, 2]


@pytest.mark.parametrize("value, words", [
    ("[1.0]", "1 rewards for 2"),
    ("[1.0, 2.0, 3.0]", "3 rewards for 2"),
    ("[]", "0 rewards for 2"),
    ("[1.0, float('nan')]", "finite"),
    ("[1.0, float('inf')]", "finite"),
    ("[1.0, -float('inf')]", "finite"),
    ("['1', '2']", "finite"),
    ("'12'", "finite"),
    ("[[1.0], [2.0]]", "finite"),
    ("__import__('numpy').zeros((2, 3))", "finite"),
    ("[1.0, 10 ** 400]", "finite"),
    ("[1.0, 1e39]", "finite"),  # infinite in float32
    ("None", "list"),
    ("3.0", "list"),
    ("{'a': 1, 'b': 2}", "list"),
    ("1 / 0", "ZeroDivisionError"),
    ("(_ for _ in ()).throw(RuntimeError('one\\ntwo'))", "RuntimeError: one"),
    ("(1 / 0 for c in completions)", "ZeroDivisionError"),
])
def test_reward_functions_that_fail(tmp_path, fails, value, words):
    """One line, with the function's name, whatever it raises or returns."""
    reward = returning(tmp_path, value)
    fails(lambda: reward(ROWS, ["b", "c"]), f"{tmp_path}/rewards.py:reward", words)


def test_a_raising_reward_function_is_told_with_its_line(tmp_path, fails):
    reward = returning(tmp_path, "(\n    missing)")
    fails(lambda: reward(ROWS, ["b", "c"]), "NameError", "missing", "rewards.py:2")
    reward = reward_function(tmp_path, "def reward(completions): return [1, 2]")
    fails(lambda: reward(ROWS, ["b", "c"]), "TypeError", "prompts")


def test_reward_functions_that_do_not_load(tmp_path, fails):
    name = f"{tmp_path}/missing.py"
    fails(lambda: common.load_reward(f"{name}:reward", "cpu", 8), f"{name}: no such file")
    for source, words in [
            ("def other(): pass", "no function 'reward'"),
            ("reward = 3", "no function 'reward'"),
            ("import not_there", "not_there"), ("def reward(:", "SyntaxError"),
            ("raise RuntimeError('one\\ntwo')", "RuntimeError: one")]:
        fails(lambda: reward_function(tmp_path, source), f"{tmp_path}/rewards.py", words)


# --- reward models

def save_reward_model(path, tokenizer, **changes):
    torch.manual_seed(1)
    bias = changes.pop("reward_bias", None)
    model = LlamaForSequenceClassification(LlamaConfig(**{**dict(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3, num_labels=1,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id), **changes})).eval()
    if bias is not None:
        model.config.reward_bias = bias
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def head_on_last_token(model, ids):
    """The score of one text without padding, by the model's two parts."""
    with torch.no_grad():
        return model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()


ASKED = [{"prompt": "what is it ?"}, {"prompt": [{"role": "system", "content": "word ."},
         {"role": "user", "content": "what is the word of yes ?"}]}, {"prompt": "is it"}]
ANSWERS = ["the word is water", "no", "yes it is . you want it very much , yes ?"]


@pytest.mark.parametrize("bias", [None, -1.25])
def test_reward_model_scores_the_last_token(tmp_path, tokenizer, bias):
    """By hand, one text at a time, whatever is beside it; the config's bias is added."""
    model = save_reward_model(tmp_path, tokenizer, reward_bias=bias)
    expected = []
    for row, answer in zip(ASKED, ANSWERS):
        text = common.render(tokenizer, row["prompt"]) + answer + "<|end|>"
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in ids
        expected.append(head_on_last_token(model, ids) + (bias or 0))
    assert np.std(expected) > 0.05
    for size in (1, 2, 8):
        reward = common.load_reward(str(tmp_path), "cpu", size)
        scores = reward(ASKED, ANSWERS)
        assert scores.shape == (3,) and scores.dtype == torch.float32
        assert not scores.requires_grad
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        turned = reward(ASKED[::-1], ANSWERS[::-1])
        np.testing.assert_allclose(turned, expected[::-1], atol=1e-5)
    for i in range(3):
        assert reward(ASKED[i:i + 1], ANSWERS[i:i + 1]).item() == pytest.approx(
            expected[i], abs=1e-5)


def test_reward_model_without_a_pad_token(tmp_path):
    """As transformers scores one text: at its last token, though that is the pad token now."""
    tokenizer = word_tokenizer(
        ["<unk>", "</s>", "a", "b", "c"], eos_token="</s>", template="{% for m in messages %}"
        "{{ m.content }} </s> {% endfor %}")
    model = save_reward_model(tmp_path, tokenizer, pad_token_id=None)
    texts = [["a b", "c"], ["b", "c c c a"], ["a", "a"]]
    ids = [tokenizer(f"{p} </s> {c} </s>").input_ids for p, c in texts]
    expected = [head_on_last_token(model, row) for row in ids]
    with torch.no_grad():
        np.testing.assert_allclose(
            [model(torch.tensor([row])).logits.item() for row in ids], expected, atol=1e-5)
    reward = common.load_reward(str(tmp_path), "cpu", 8)
    scores = reward([{"prompt": p} for p, _ in texts], [c for _, c in texts])
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_reward_model_with_words_of_its_own(tmp_path):
    """Another tokenizer and template than the policy's: scored through text, not ids."""
    other = word_tokenizer(
        "<stop> bot: water is <pad> what it <unk> human: the ?".split(),
        "{% for m in messages %}{{ 'human: ' if m.role == 'user' else 'bot: ' }}"
        "{{ m.content }} {% endfor %}{{ 'bot:' if add_generation_prompt else '<stop>' }}",
        eos_token="<stop>", pad_token="<pad>")
    model = save_reward_model(tmp_path, other)
    reward = common.load_reward(str(tmp_path), "cpu", 8)
    scores = reward([{"prompt": "what is it ?"}, {"prompt": "\n\nHuman: is it\n\nAssistant:"}],
                    ["it is the water", "what"])
    ids = [[8, 5, 3, 6, 10, 1, 6, 3, 9, 2, 0], [8, 3, 6, 1, 5, 0]]
    expected = [head_on_last_token(model, row) for row in ids]
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_folders_that_are_no_reward_model(tmp_path, tokenizer, fails):
    """A causal model would get a random head, silently; of two labels neither is the score."""
    two, causal = str(tmp_path / "two"), str(tmp_path / "causal")
    save_reward_model(two, tokenizer, num_labels=2)
    fails(lambda: common.load_reward(two, "cpu", 8), two, "2 labels")
    llama(vocab_size=len(tokenizer)).save_pretrained(causal)
    tokenizer.save_pretrained(causal)
    fails(lambda: common.load_reward(causal, "cpu", 8), causal, "score.weight")
    config = json.loads((tmp_path / "causal/config.json").read_text())
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (tmp_path / "causal/config.json").write_text(json.dumps(config))  # one label, no head
    fails(lambda: common.load_reward(causal, "cpu", 8), causal, "score.weight")
    for name in ("tiny/missing", "tests", str(tmp_path)):
        fails(lambda: common.load_reward(name, "cpu", 8), name)


def test_a_reward_file_without_its_function_is_not_asked_of_the_hub(monkeypatch, fails):
    """`rewards.py` could be a hub id, and half a minute passes until the network says no."""
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_: pytest.fail("asked"))
    fails(lambda: common.load_reward("rewards.py", "cpu", 8), "rewards.py")


def test_conversations_beyond_the_reward_models_context(tmp_path, tokenizer, fails):
    save_reward_model(tmp_path, tokenizer, max_position_embeddings=10)
    reward = common.load_reward(str(tmp_path), "cpu", 8)
    row = [{"prompt": "what is"}]  # <|user|> what is <|end|> <|assistant|> … <|end|>
    assert reward(row, ["it is it is"]).isfinite().all()
    fails(lambda: reward(row, ["it is it is it"]), "11 tokens", "context of 10")


def test_a_mistake_is_one_line_of_a_program(tmp_path, tokenizer):
    """With what the libraries have to say: a whole process, its exit code and its stderr."""
    save_reward_model(tmp_path / "model", tokenizer)
    llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    program = """
import sys
from transformers import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
import common
try:
    common.load_reward(sys.argv[1], "cpu", 8)
except SystemExit as end:
    assert end.code == 2
common.load_reward(sys.argv[2], "cpu", 8)([{"prompt": "is"}], ["it " * 300])
"""
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "causal", tmp_path / "model"],
        capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    lines = run.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines), run.stderr


def test_bf16_is_chosen_where_it_is_faster(monkeypatch):
    small, _ = common.load_model(AutoModelForCausalLM, "tiny/policy", "cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert common.wants_bf16("bfloat16", small) and not common.wants_bf16("float32", small)
    assert not common.wants_bf16("auto", small)  # what it gains is less than what the casts cost
    monkeypatch.setattr(small, "num_parameters", lambda: 135_000_000)
    assert common.wants_bf16("auto", small) and not common.wants_bf16("float32", small)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    assert not common.wants_bf16("auto", small)
