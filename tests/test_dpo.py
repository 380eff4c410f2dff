"""dpo.py: its losses by hand, how pairs become tokens, and its steps."""
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import (AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)

import common
import dpo
from dpo import cut, dpo_loss
from test_grpo_math import close, float64
from test_ppo import weights
from test_reward_model import PAIRS
from test_runs import rows, write

LONG = {"prompt": "is it so ? " * 80, "chosen": "it is two .", "rejected": "no ."}


def run(tmp_path, name="run", pairs=PAIRS, **changes):
    data = write(tmp_path / f"{name}.jsonl", *pairs)
    args = dict(data=data, run_dir=str(tmp_path / name), reference_dir=str(tmp_path / "ref"),
                pairs_per_step=16, eval_pairs=12, eval_prompts=4, max_new_tokens=8, warmup=0,
                micro_batch_size=6, device="cpu", log_every=1)
    dpo.main(dpo.Args(**(args | changes)))
    return rows(tmp_path / name / "metrics.jsonl")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
def test_the_chosen_answer_is_made_likelier_and_a_swap_turns_that_round(options):
    chosen, rejected = float64(-3).requires_grad_(), float64(-5).requires_grad_()
    ref = float64(-3), float64(-5)
    dpo_loss(chosen, rejected, *ref, 0.5, **options).sum().backward()
    assert chosen.grad < 0 < rejected.grad and chosen.grad == -rejected.grad
    if not options:  # -beta * sigmoid(-z)
        assert chosen.grad.item() == pytest.approx(-0.25)
    if options.get("loss_type") != "simpo":  # at z = 0, where the reference is: what was up is down
        swapped = chosen.detach().clone().requires_grad_()
        dpo_loss(rejected.detach(), swapped, *ref[::-1], 0.5, **options).sum().backward()
        assert swapped.grad.item() == pytest.approx(-chosen.grad.item())


@pytest.mark.parametrize("z, grad", [(-2000.0, -0.1), (2000.0, 0.0)])
def test_far_off_loss_and_gradient_are_finite(z, grad):
    chosen = torch.tensor([z / 0.1], requires_grad=True)
    loss = dpo_loss(chosen, *torch.zeros(3, 1), 0.1)
    loss.sum().backward()
    assert loss.item() == pytest.approx(max(0, -z)) and chosen.grad.item() == pytest.approx(grad)


def test_what_the_losses_make_of_z():
    """Where the minimum is: nowhere, at the log-odds of right labels, at 1 / (2 beta)."""
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


# --- cut

def test_cut_by_hand():
    prompt = list(range(10))
    assert cut(prompt, [[90, 91], [92]], 12) == (prompt, [[90, 91], [92]])  # it fits
    assert cut(prompt, [[90, 91], [92]], 8) == (prompt[-6:], [[90, 91], [92]])
    # half of 8 for the answers, where they need it
    answers = [list(range(50, 56)), [92]]
    assert cut(prompt, answers, 8) == (prompt[-4:], [[50, 51, 52, 53], [92]])
    # a short prompt leaves them the rest
    assert cut([1, 2], answers, 7) == ([1, 2], [[50, 51, 52, 53, 54], [92]])


def test_cut_fits_and_loses_no_answer_and_no_end_of_a_prompt():
    for longest in range(2, 14):
        for P in range(1, 16):
            for a in range(1, 16):
                for b in (1, 7):
                    prompt, answers = list(range(P)), [list(range(50, 50 + n)) for n in (a, b)]
                    short, kept = cut(prompt, answers, longest)
                    assert short and short == prompt[-len(short):]
                    assert len(short) + max(map(len, kept)) == min(longest, P + max(a, b))
                    for answer, part in zip(answers, kept):
                        assert part and part == answer[:len(part)]
                        if len(answer) <= longest - longest // 2:  # half: it stays whole
                            assert part == answer


# --- how pairs become tokens

def tokens_of(tmp_path, monkeypatch, pairs, model="tiny/policy"):
    """[(prompt, answers)] as they come to cut(), without those of the held-out pairs."""
    seen = []
    monkeypatch.setattr(dpo, "cut", lambda p, a, n: seen.append((p, a)) or cut(p, a, n))
    def stop(*args, **options):
        raise InterruptedError
    monkeypatch.setattr(dpo, "get_scheduler", stop)
    with pytest.raises(InterruptedError):
        run(tmp_path, pairs=pairs + pairs[-1:], eval_pairs=1, model=str(model))
    return seen[:len(pairs)]


def with_tokenizer(tmp_path, change):
    shutil.copytree("tiny/policy", tmp_path / "model")
    tokenizer = common.load_tokenizer("tiny/policy")
    change(tokenizer)
    (tmp_path / "model/chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


PAIR = {"prompt": "what is green and green ?", "chosen": " it is white .", "rejected": " no ."}


@pytest.mark.parametrize("written", ["", "<end>"])  # already in the text: still once
@pytest.mark.parametrize("template", ["tiny", "tail", "no end", "none"])
def test_an_answer_is_its_tokens_and_one_end(tmp_path, monkeypatch, template, written):
    tokenizer = common.load_tokenizer("tiny/policy")
    end, plain = tokenizer.eos_token, tokenizer.chat_template
    turn = "{% for m in messages %}{{ m['content'] }}TAIL{% endfor %}"
    change = {"tiny": plain, "none": None, "no end": turn.replace("TAIL", " "),
              "tail": turn.replace("TAIL", end + "so so ")}[template]
    model = with_tokenizer(tmp_path, lambda t: setattr(t, "chat_template", change))
    pair = PAIR | {k: PAIR[k] + written.replace("<end>", end) for k in ("chosen", "rejected")}
    (prompt, answers), = tokens_of(tmp_path, monkeypatch, [pair], model)
    tokenizer.chat_template = change
    assert prompt == common.encode(tokenizer, [common.render(tokenizer, PAIR["prompt"])])[0]
    words = [tokenizer.convert_tokens_to_ids(PAIR[k].split()) for k in ("chosen", "rejected")]
    assert answers == [w + [tokenizer.eos_token_id] for w in words]


def test_a_prompt_s_last_token_may_go_on_in_an_answer(tmp_path, monkeypatch):
    """The tokens are those of the whole text: nothing of the prompt is written twice."""
    inner = Tokenizer(models.BPE({"<e>": 0, "a": 1, "b": 2, "c": 3, "bc": 4}, [("b", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>", pad_token="<e>")
    tokenizer.save_pretrained(tmp_path / "model")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=5, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        eos_token_id=0)).save_pretrained(tmp_path / "model")
    seen = tokens_of(tmp_path, monkeypatch, [
        {"prompt": "ab", "chosen": "cc", "rejected": "a"},  # "bc" is one token
        {"prompt": "aa", "chosen": "cc", "rejected": "a"},
        {"prompt": "b", "chosen": "c", "rejected": "a"}], tmp_path / "model")
    assert seen[0] == ([1], [[4, 3, 0], [2, 1, 0]])
    assert seen[1] == ([1, 1], [[3, 3, 0], [1, 0]])
    assert seen[2][0]  # a prompt of no token would have nothing to predict from


def test_pairs_with_equal_answers_are_left_out_and_counted(tmp_path, capsys):
    same = PAIR | {"rejected": PAIR["chosen"]}
    run(tmp_path, pairs=[same, same] + PAIRS[:30], eval_prompts=0)
    assert "of 20 pairs, 0 cut to" in (out := capsys.readouterr().out) and "2 left out" in out


def test_a_prompt_that_fills_the_context_is_cut_and_its_answer_is_not(tmp_path, capsys, monkeypatch):
    """In training and among the held-out pairs, whose long prompts are not asked in evaluation."""
    fed, pad = [], dpo.pad
    monkeypatch.setattr(dpo, "pad", lambda r, *a: fed.append(r) or pad(r, *a))
    run(tmp_path, pairs=[LONG] + PAIRS[:16] + [LONG] + PAIRS[:2], eval_pairs=3, micro_batch_size=100)
    out = capsys.readouterr().out
    assert "of 17 pairs, 1 cut to 192 tokens, 0 left out" in out and "of 3 pairs, 1 cut" in out
    assert "left out 1 of 3 rows" in out
    tokenizer = common.load_tokenizer("tiny/policy")
    ends = common.encode(tokenizer, [common.render(tokenizer, "is it so ?")])[0][-4:]
    prompts, answers = fed[0], fed[1]  # of the reference: the longest first, chosen then rejected
    assert len(prompts[0]) + len(answers[0]) == 192 and prompts[0][-4:] == ends
    assert answers[0] == tokenizer.convert_tokens_to_ids("it is two .".split()) + [tokenizer.eos_token_id]


def test_an_answer_that_was_cut_is_counted(tmp_path, capsys):
    run(tmp_path, pairs=[PAIR | {"prompt": "no", "chosen": "so " * 40}] + PAIRS[:30], max_tokens=30,
        eval_prompts=0)
    assert "of 19 pairs, 1 cut to 30 tokens" in capsys.readouterr().out


# --- log-probs

def test_log_probs_are_those_of_a_plain_forward_pass(tmp_path):
    """Of the answer's tokens and its end, and of nothing else; the mean over the held-out pairs."""
    log = run(tmp_path, eval_prompts=0)
    tokenizer = common.load_tokenizer("tiny/policy")
    model = AutoModelForCausalLM.from_pretrained("tiny/policy", dtype=torch.float32)
    for side in ("chosen", "rejected"):
        sums = []
        for pair in PAIRS[-12:]:
            texts = [common.render(tokenizer, pair["prompt"], *a) for a in ([], [pair[side]])]
            prompt, ids = common.encode(tokenizer, texts)
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(logprobs[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))))
        assert log[0][f"eval_logprob_{side}"] == pytest.approx(sum(sums) / 12, abs=1e-3)
    assert log[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-4) and log[0]["eval_margin"] == 0


def test_the_reference_is_computed_once_for_a_model_and_its_pairs(tmp_path, capsys, monkeypatch):
    def files(name, **changes):
        capsys.readouterr()
        log = run(tmp_path, name, eval_prompts=0, **changes)
        found = "log-probs of" in capsys.readouterr().out
        return log, found, len(list((tmp_path / "ref").iterdir()))

    first, found, n = files("a")
    assert not found and n == 2  # of the pairs, and of the held-out ones
    again, found, n = files("b", lr=1e-5, seed=0, loss_type="ipo")
    assert found and n == 2
    assert first[0]["eval_logprob_chosen"] == again[0]["eval_logprob_chosen"]
    assert again[0]["eval_margin"] == 0
    _, found, n = files("c", pairs=PAIRS[:20] + PAIRS[21:])
    assert found and n == 3  # the held-out pairs are the same ones
    _, found, n = files("d", pairs=[{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in PAIRS])
    assert not found and n == 5
    model, _ = common.load_model(AutoModelForCausalLM, "tiny/policy", "cpu")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "other")
    common.load_tokenizer("tiny/policy").save_pretrained(tmp_path / "other")
    other, found, n = files("e", model=str(tmp_path / "other"))
    assert not found and n == 7 and abs(other[0]["eval_margin"]) < 1e-5
    model.config.rms_norm_eps = 0.1  # the same weights, another model
    model.save_pretrained(tmp_path / "other")
    other, found, n = files("f", model=str(tmp_path / "other"))
    assert not found and n == 9 and abs(other[0]["eval_margin"]) < 1e-5


def test_under_bfloat16_sums_are_float32(tmp_path):
    """A sum near -300 has steps of 2 in bfloat16."""
    run(tmp_path, dtype="bfloat16", eval_prompts=0)
    for path in (tmp_path / "ref").iterdir():
        sums = load_file(path)["logprobs"]
        assert sums.dtype == torch.float32 and not torch.equal(sums, sums.bfloat16().float())


# --- whole runs

OPTIONS = [
    dict(loss_type="hinge", gradient_checkpointing=True), dict(loss_type="ipo", length_normalise=True),
    dict(loss_type="simpo", beta=2.0), dict(label_smoothing=0.1, dtype="bfloat16"),
    dict(label_smoothing=0.1, robust=True, sft_weight=0.5), dict(max_tokens=12, eval_every=2),
    dict(eval_prompts=0, lr_schedule="cosine", micro_batch_size=1)]


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
@pytest.mark.filterwarnings("error::UserWarning")
def test_every_option_runs(tmp_path, changes):
    log = run(tmp_path, pairs=PAIRS[:44], **changes)
    assert [r["step"] for r in log if "loss" in r] == [1, 2]
    assert all(math.isfinite(x) for r in log for x in r.values())
    assert next(r["grad_norm"] for r in log if "loss" in r) > 0


def test_a_run_learns_and_leaves_an_ordinary_model(tmp_path):
    path = tmp_path / "short.py"
    path.write_text("def f(completions, **c):\n    return [-len(x.split()) for x in completions]\n")
    log = run(tmp_path, epochs=4, lr=1e-3, gold=f"{path}:f")
    evals = [r for r in log if "eval_loss" in r]
    assert [r["step"] for r in evals] == [0, log[-1]["step"]]
    assert evals[0]["eval_kl"] == 0 and evals[0]["eval_win_rate"] == 0.5
    assert evals[1]["eval_accuracy"] > 0.9 and evals[1]["eval_margin"] > 0.1
    assert evals[1]["eval_logprob_rejected"] < evals[0]["eval_logprob_rejected"]
    samples = rows(tmp_path / "run/samples.jsonl")
    assert len(samples) == 8 and {"step", "prompt", "completion", "reference", "gold"} <= samples[0].keys()
    assert samples[0]["completion"] == samples[0]["reference"]
    moved = weights(tmp_path / "run/checkpoint") - weights("tiny/policy")
    assert moved.norm() > 0.01
    assert json.loads((tmp_path / "run/args.json").read_text())["epochs"] == 4


def moved(tmp_path, monkeypatch, name, **changes):
    """By how much one step of plain gradient descent moves the weights: the gradient, scaled."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, **_: torch.optim.SGD(p, lr))
    run(tmp_path, name, **(dict(lr=0.1, eval_prompts=0, max_grad_norm=1e9, pairs_per_step=100) | changes))
    return weights(tmp_path / name / "checkpoint") - weights("tiny/policy")


@pytest.mark.parametrize("options", [dict(), dict(loss_type="ipo", length_normalise=True, sft_weight=0.3)],
                         ids=str)
def test_micro_batches_change_no_gradient(tmp_path, monkeypatch, options):
    whole, parts = (moved(tmp_path, monkeypatch, str(n), micro_batch_size=n, pairs=PAIRS[:25], **options)
                    for n in (200, 3))
    assert whole.norm() > 1e-4
    assert (parts - whole).norm() / whole.norm() < 1e-3


def test_swapped_labels_turn_the_gradient_round(tmp_path, monkeypatch):
    swapped = [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in PAIRS]
    one, other = (moved(tmp_path, monkeypatch, name, pairs=pairs)
                  for name, pairs in (("a", PAIRS), ("b", swapped)))
    assert one.norm() > 1e-4 and (one + other).norm() / one.norm() < 1e-3


def test_the_sft_term_is_in_the_loss(tmp_path):
    """The mean over chosen answers of their negative log-likelihood per token."""
    plain, sft = (run(tmp_path, str(w), sft_weight=w, eval_prompts=0, pairs=PAIRS[:20])
                  for w in (0.0, 0.5))
    assert sft[0]["eval_loss"] > plain[0]["eval_loss"] + 0.05
    assert sft[-1]["eval_logprob_chosen"] > sft[0]["eval_logprob_chosen"]


def test_rows_without_a_gold_score_are_in_no_win_rate(tmp_path):
    path = tmp_path / "half.py"
    path.write_text("def f(completions, **c):\n    return [None if i % 2 else 1.0 for i in range(len(completions))]\n")
    log = run(tmp_path, gold=f"{path}:f", pairs=PAIRS[:20])
    assert log[0]["eval_win_rate"] == 0.5 and log[0]["eval_gold"] == 1
    assert ["gold" in r for r in rows(tmp_path / "run/samples.jsonl")[:4]] == [True, False, True, False]


@pytest.mark.parametrize("changes, expected", [
    (dict(label_smoothing=0.5), "--label-smoothing"),
    (dict(label_smoothing=0.1, loss_type="ipo"), "--label-smoothing"),
    (dict(beta=0.0), "--beta"), (dict(max_tokens=1), "--max-tokens"),
    (dict(eval_pairs=100), "--eval-pairs"), (dict(gold="tiny/policy"), "not a reward model"),
    (dict(pairs=[{"prompt": "a"}] * 20), ":1: pairs need the columns"),
    (dict(pairs=[{"prompt": "a", "chosen": "no .", "rejected": "no ."}] * 20), "no pair is left")],
    ids=lambda x: str(x)[:40])
def test_bad_input(tmp_path, capsys, changes, expected):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, **changes)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("error: ") == 1 and expected in error
    assert not (tmp_path / "run").exists()


def test_a_damaged_reference_cache_is_named(tmp_path, capsys):
    run(tmp_path, "a", epochs=1)
    for path in (tmp_path / "ref").iterdir():
        path.write_bytes(b"no tensors")
    with pytest.raises(SystemExit):
        run(tmp_path, "b", epochs=1)
    error = capsys.readouterr().err
    assert "--reference-dir" in error and "damaged" in error and not (tmp_path / "b").exists()
