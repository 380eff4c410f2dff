"""dpo.py: its losses by hand, how pairs become tokens, and what a step's gradient is."""
import math

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import common
import modeling
import dpo
from dpo import dpo_loss, encode_pairs
from helpers.unit import PAIRS, close, float64, make_run, refuses, word_tokenizer


# --- dpo_loss

def log_sigmoid(z):
    return -math.log(1 + math.exp(-z))


# log-probs -3, -5 under the policy, -4, -4.5 under the reference: h_w 1, h_l -0.5, z = 0.1 * 1.5
@pytest.mark.parametrize("options, expected", [
    (dict(), -log_sigmoid(0.15)),
    (dict(label_smoothing=0.2), -0.8 * log_sigmoid(0.15) - 0.2 * log_sigmoid(-0.15)),
    (dict(label_smoothing=0.2, robust=True),
     (-0.8 * log_sigmoid(0.15) + 0.2 * log_sigmoid(-0.15)) / 0.6),
    (dict(loss_type="hinge"), 0.85),
    (dict(loss_type="ipo"), (1.5 - 5) ** 2),
    (dict(loss_type="simpo", margin=0.5), -log_sigmoid(0.1 * 2 - 0.5))], ids=str)
def test_losses_by_hand(options, expected):
    loss = dpo_loss(float64(-3), float64(-5), float64(-4), float64(-4.5), 0.1, **options)
    assert loss.tolist() == pytest.approx([expected])


@pytest.mark.parametrize("options", [dict(), dict(loss_type="hinge"), dict(loss_type="ipo"),
                                     dict(loss_type="simpo")], ids=str)
def test_the_chosen_answer_becomes_likelier_and_a_swap_reverses_that(options):
    chosen, rejected = float64(-3).requires_grad_(), float64(-5).requires_grad_()
    ref = float64(-3), float64(-5)
    dpo_loss(chosen, rejected, *ref, 0.5, **options).sum().backward()
    assert chosen.grad < 0 < rejected.grad and chosen.grad == -rejected.grad
    if not options:  # -beta * sigmoid(-z)
        assert chosen.grad.item() == pytest.approx(-0.25)
    if options.get("loss_type") != "simpo":  # at z = 0
        swapped = chosen.detach().clone().requires_grad_()
        dpo_loss(rejected.detach(), swapped, *ref[::-1], 0.5, **options).sum().backward()
        assert swapped.grad.item() == pytest.approx(-chosen.grad.item())


@pytest.mark.parametrize("z, grad", [(-2000.0, -0.1), (2000.0, 0.0)])
def test_far_from_the_reference_loss_and_gradient_are_finite(z, grad):
    chosen = torch.tensor([z / 0.1], requires_grad=True)
    loss = dpo_loss(chosen, *torch.zeros(3, 1), 0.1)
    loss.sum().backward()
    assert loss.item() == pytest.approx(max(0, -z)) and chosen.grad.item() == pytest.approx(grad)


def test_where_the_losses_are_smallest():
    """At no finite log-ratio, at the log-odds of a right label / beta, at 1 / (2 beta)."""
    h = torch.linspace(-100, 100, 200_001, dtype=torch.float64)
    zeros = torch.zeros_like(h)
    def best(**options):
        return h[dpo_loss(h, zeros, zeros, zeros, 0.1, **options).argmin()].item()
    assert best() == 100
    assert best(label_smoothing=0.2) == pytest.approx(10 * math.log(4), abs=2e-3)
    assert best(loss_type="ipo") == pytest.approx(5, abs=2e-3)


def test_robust_is_unbiased_under_wrong_labels():
    h, zero = torch.randn(20, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
    def loss(h, **options):
        return dpo_loss(h, zero, zero, zero, 0.7, **options)
    options = dict(label_smoothing=0.3, robust=True)
    close(0.7 * loss(h, **options) + 0.3 * loss(-h, **options), loss(h))


# --- how pairs become tokens

def pieces(prompt_length: int, answer_lengths, longest: int):
    """[(prompt, chosen, rejected)] in tokens of rows whose prompt and answers have these lengths, the end of sequence
    included, cut to `longest`."""
    tokenizer = word_tokenizer(["<end>"] + [f"w{i}" for i in range(60)], eos_token="<end>", pad_token="<end>")
    prompt = " ".join(f"w{i}" for i in range(prompt_length))
    rows = [{"prompt": prompt, "chosen": "".join(f" w{i}" for i in range(20, 19 + a)),
             "rejected": "".join(f" w{i}" for i in range(40, 39 + b))} for a, b in answer_lengths]
    pairs = encode_pairs(tokenizer, rows, "rows", longest, [0])
    return [(pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]) for pair in pairs]


def test_cuts_by_hand():
    prompt, six, two = list(range(1, 11)), [21, 22, 23, 24, 25, 0], [21, 0]
    assert pieces(10, [(2, 1)], 12) == [(prompt, two, [0])]  # it fits
    assert pieces(10, [(2, 1)], 8) == [(prompt[-6:], two, [0])]
    # half of 8 for the answers, if they need it
    assert pieces(10, [(6, 1)], 8) == [(prompt[-4:], six[:4], [0])]
    # a short prompt leaves them the rest
    assert pieces(2, [(6, 1)], 7) == [(prompt[:2], six[:5], [0])]


def test_a_cut_keeps_the_prompts_end_and_the_answers_beginning():
    answers = [(a, b) for a in range(1, 16) for b in (1, 7) if (a, b) != (1, 1)]
    for longest in range(2, 14):
        for P in (1, 2, 5, 6, 7, 12, 15):
            found = pieces(P, answers, longest)
            whole = pieces(P, answers, 1000)
            assert len(found) == len(answers) == len(whole)
            for (a, b), (short, *kept), (prompt, *full) in zip(answers, found, whole):
                assert short and short == prompt[-len(short):]
                assert len(short) + max(map(len, kept)) == min(longest, P + max(a, b))
                for answer, part in zip(full, kept):
                    assert part and part == answer[:len(part)]
                    if len(answer) <= longest - longest // 2:  # half: it stays whole
                        assert part == answer


def eos_ids(tokenizer):
    return [tokenizer.eos_token_id]


PAIR = {"prompt": "what is green and green ?", "chosen": " it is white .", "rejected": " no ."}


@pytest.mark.parametrize("written", ["", "<end>"])  # already in the text: still once
@pytest.mark.parametrize("template", ["tiny", "tail", "no end", "none"])
def test_an_answer_is_its_tokens_and_one_end(tokenizer, template, written):
    end, turn = tokenizer.eos_token, "{% for m in messages %}{{ m['content'] }}TAIL{% endfor %}"
    tokenizer.chat_template = {"tiny": tokenizer.chat_template, "none": None, "no end": turn.replace("TAIL", " "),
                               "tail": turn.replace("TAIL", end + "so so ")}[template]
    pair = PAIR | {k: PAIR[k] + written.replace("<end>", end) for k in ("chosen", "rejected")}
    found, = encode_pairs(tokenizer, [pair], "rows", 192, eos_ids(tokenizer))
    assert found["prompt_ids"] == common.encode(tokenizer, [common.render(tokenizer, PAIR["prompt"])])[0]
    for side in ("chosen", "rejected"):
        words = tokenizer.convert_tokens_to_ids(PAIR[side].split())
        assert found[f"{side}_ids"] == words + [tokenizer.eos_token_id]
        assert found[side] == pair[side]  # the row's columns are kept


def test_an_answer_ends_at_any_end_of_the_model():
    assert dpo.end_once([5, 6, 2, 7, 1], [1, 2], 1) == [5, 6, 2]
    assert dpo.end_once([5, 6], [1, 2], 1) == [5, 6, 1] and dpo.end_once([], [1], 1) == [1]


def test_a_prompts_last_token_may_continue_in_an_answer():
    """The tokens are those of the whole text: nothing of the prompt is there twice."""
    inner = Tokenizer(models.BPE({"<e>": 0, "a": 1, "b": 2, "c": 3, "bc": 4}, [("b", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>", pad_token="<e>")
    found = encode_pairs(tokenizer, [
        {"prompt": "ab", "chosen": "cc", "rejected": "a"},  # "bc" is one token
        {"prompt": "aa", "chosen": "cc", "rejected": "a"},
        {"prompt": "b", "chosen": "c", "rejected": "a"}], "rows", 100, [0])
    assert [found[0][k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")] == [[1], [4, 3, 0], [2, 1, 0]]
    assert [found[1][k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")] == [[1, 1], [3, 3, 0], [1, 0]]
    assert found[2]["prompt_ids"]  # without a prompt token nothing would predict the first of the answer


def test_pairs_with_equal_answers_are_left_out_and_counted(tokenizer, capsys):
    same = PAIR | {"rejected": PAIR["chosen"]}
    pairs = encode_pairs(tokenizer, [same, same] + PAIRS[:18], "rows", 192, eos_ids(tokenizer))
    assert len(pairs) == 18
    assert "rows: of 20 pairs, 0 were cut to 192 tokens, and 2 left out" in capsys.readouterr().out
    encode_pairs(tokenizer, PAIRS, "rows", 192, eos_ids(tokenizer))
    assert capsys.readouterr().out == ""
    refuses(lambda: encode_pairs(tokenizer, [same], "rows", 192, eos_ids(tokenizer)), "rows: no pair is left")


def test_a_prompt_that_fills_the_context_is_cut_and_its_answer_is_not(tokenizer, capsys):
    long = {"prompt": "is it so ? " * 80, "chosen": "it is two .", "rejected": "no ."}
    pair, *_ = encode_pairs(tokenizer, [long] + PAIRS[:16], "rows", 192, eos_ids(tokenizer))
    assert "of 17 pairs, 1 were cut to 192 tokens, and 0 left out" in capsys.readouterr().out
    ends = common.encode(tokenizer, [common.render(tokenizer, "is it so ?")])[0][-4:]
    assert pair["prompt_ids"][-4:] == ends and len(pair["prompt_ids"]) + len(pair["chosen_ids"]) == 192
    for side in ("chosen", "rejected"):
        assert pair[f"{side}_ids"] == tokenizer.convert_tokens_to_ids(long[side].split()) + eos_ids(tokenizer)


def test_an_answer_that_was_cut_is_counted(tokenizer, capsys):
    long = PAIR | {"prompt": "no", "chosen": "so " * 40}
    pair, *_ = encode_pairs(tokenizer, [long] + PAIRS[:18], "rows", 30, eos_ids(tokenizer))
    assert "of 19 pairs, 1 were cut to 30 tokens" in capsys.readouterr().out
    assert tokenizer.eos_token_id not in pair["chosen_ids"]  # a cut answer has no end


# --- log-probs

@pytest.fixture(scope="module")
def policy():
    return modeling.load_causal_lm("tiny/policy", "cpu").eval()


@pytest.fixture
def pairs(tokenizer):
    return encode_pairs(tokenizer, PAIRS[:12], "rows", 192, eos_ids(tokenizer))


def test_log_probs_are_those_of_a_plain_forward_pass(policy, tokenizer, pairs):
    """Of the answer's tokens and its end, and of nothing else."""
    with torch.no_grad():
        found = dpo.pair_logprobs(policy, pairs, "cpu")
    for side, logprobs in zip(("chosen", "rejected"), found):
        for pair, logprob in zip(PAIRS, logprobs.tolist()):
            texts = [common.render(tokenizer, pair["prompt"], *a) for a in ([], [pair[side]])]
            prompt, ids = common.encode(tokenizer, texts)
            with torch.no_grad():
                plain = policy(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(plain[t - 1, ids[t]].item() for t in range(len(prompt), len(ids)))
            assert logprob == pytest.approx(expected, abs=1e-3)


def test_under_bfloat16_sums_are_float32(policy, pairs):
    """A sum near -300 has steps of 2 in bfloat16."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for sums in dpo.pair_logprobs(policy, pairs, "cpu"):
            assert sums.dtype == torch.float32 and not torch.equal(sums, sums.bfloat16().float())


# --- the loss of a step

def losses(policy, reference, pairs, **flags):
    run = make_run(dpo.Args(device="cpu", **flags))
    dpo.add_reference_logprobs(reference, pairs, run)
    return dpo.pair_metrics(policy, pairs, run)


@pytest.fixture(scope="module")
def other():
    """A policy that differs from the reference."""
    model = modeling.load_causal_lm("tiny/policy", "cpu").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return model


def test_at_the_reference_the_loss_is_log_2(policy, pairs):
    found = losses(policy, policy, pairs)
    close(found["loss"], torch.full((12,), math.log(2)), atol=1e-5)
    for name in ("margin", "reward_chosen", "reward_rejected"):
        close(found[name], torch.zeros(12), atol=1e-6)
    assert (found["accuracy"] == 0.5).all()  # ties count half


@pytest.mark.parametrize("flags", [
    dict(), dict(beta=0.5, label_smoothing=0.2), dict(label_smoothing=0.2, robust=True), dict(loss_type="hinge"),
    dict(loss_type="ipo"), dict(loss_type="ipo", length_normalize=True), dict(length_normalize=True),
    dict(loss_type="simpo", beta=2.0, simpo_margin=0.3), dict(sft_weight=0.5)], ids=str)
def test_the_loss_is_dpo_loss_of_sums_or_means(policy, other, pairs, flags):
    """simpo: of means, without the reference; --sft-weight: plus the negative log-likelihood per chosen token."""
    found = losses(other, policy, pairs, **flags)
    args = dpo.Args(**flags)
    with torch.no_grad():
        logprobs = [*dpo.pair_logprobs(other, pairs, "cpu"), *dpo.pair_logprobs(policy, pairs, "cpu")]
    n_chosen, n_rejected = (torch.tensor([len(p[k]) for p in pairs]) for k in ("chosen_ids", "rejected_ids"))
    sft = -logprobs[0] / n_chosen
    close(found["logprob_chosen"], logprobs[0], atol=1e-3)
    close(found["logprob_rejected"], logprobs[1], atol=1e-3)
    if args.length_normalize or args.loss_type == "simpo":
        logprobs = [x / n for x, n in zip(logprobs, (n_chosen, n_rejected) * 2)]
    if args.loss_type == "simpo":
        logprobs[2:] = torch.zeros(2, 12)
    expected = dpo_loss(*logprobs, args.beta, args.loss_type, args.label_smoothing, args.robust,
                        margin=args.beta * args.simpo_margin)
    close(found["loss"], expected + args.sft_weight * sft, atol=2e-4, rtol=1e-4)
    chosen, rejected = (args.beta * (logprobs[i] - logprobs[i + 2]) for i in (0, 1))
    close(found["reward_chosen"], chosen, atol=2e-4, rtol=1e-4)
    close(found["reward_rejected"], rejected, atol=2e-4, rtol=1e-4)
    close(found["margin"], chosen - rejected, atol=2e-4, rtol=1e-4)
    assert torch.equal(found["accuracy"], (found["margin"] > 0).float())
    assert not any(found[name].requires_grad for name in found if name != "loss")


def gradient(model, groups, reference, **flags):
    """The gradient of one update, as in main's step 2, from micro-batches of pairs."""
    n = sum(map(len, groups))
    model.zero_grad()
    for pairs in groups:
        (losses(model, reference, pairs, **flags)["loss"].sum() / n).backward()
    assert reference is model or all(p.grad is None for p in reference.parameters())
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("flags", [dict(), dict(loss_type="ipo", length_normalize=True, sft_weight=0.3)], ids=str)
def test_micro_batches_change_no_gradient(policy, other, pairs, flags):
    whole = gradient(other, [pairs], policy, **flags)
    parts = gradient(other, [pairs[:1], pairs[1:6], pairs[6:]], policy, **flags)
    assert whole.norm() > 1e-4 and (parts - whole).norm() / whole.norm() < 1e-3


def test_swapped_labels_reverse_the_gradient(other, pairs):
    """At the reference, where both answers' log-ratios are 0."""
    swapped = [{**p, "chosen_ids": p["rejected_ids"], "rejected_ids": p["chosen_ids"]} for p in pairs]
    one, reverse = gradient(other, [pairs], other), gradient(other, [swapped], other)
    assert one.norm() > 1e-4 and (one + reverse).norm() / one.norm() < 1e-3


def test_held_out_pairs_are_averaged_over_rows(policy, other, pairs):
    """Whatever the micro-batches, without a gradient, in eval mode."""
    expected = {name: values.mean().item() for name, values in losses(other, policy, pairs).items()}
    for tokens in (1, 120, 8192):
        run = make_run(dpo.Args(device="cpu", micro_batch_tokens=tokens))
        dpo.add_reference_logprobs(policy, pairs, run)
        found = dpo.evaluate_pairs(other.train(), pairs, run)
        assert not other.training and found.keys() == expected.keys()
        for name in found:
            assert found[name].item() == pytest.approx(expected[name], abs=1e-3) and not found[name].requires_grad


def test_the_tokens_of_a_pair_with_padding():
    pair = {"prompt_ids": [1, 2, 3], "chosen_ids": [1], "rejected_ids": [1, 2]}
    ids, _ = common.pad([pair["prompt_ids"] + pair[k] for k in ("chosen_ids", "rejected_ids")], "right")
    assert dpo.pair_length(pair) == ids.numel() == 10
