"""reward_model.py: its loss, its reports, its numbered steps, and what it leaves behind."""
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import common
import reward_model
from test_runs import fails, rows, write

SMALL = dict(pairs_per_step=8, eval_pairs=20, micro_batch_size=6, log_every=1, bias_prompts=16, max_new_tokens=16,
             device="cpu")
COLORS = "green white black red yellow brown".split()
PAIRS = [{"prompt": f"what is {a} and {b} ?", "chosen": f"{a} and {b} is {b} .", "rejected": f"it is {a} ."}
         for a in COLORS for b in COLORS if a != b] * 2


def run(tmp_path, name="run", pairs=PAIRS, **changes):
    data = write(tmp_path / f"{name}.jsonl", *pairs)
    reward_model.main(reward_model.Args(**(SMALL | dict(data=data, run_dir=str(tmp_path / name)) | changes)))
    return rows(tmp_path / name / "metrics.jsonl")


def test_pair_loss_against_its_formula():
    chosen, rejected = torch.tensor([1.0, -0.5, 3.0]), torch.tensor([0.0, 1.0, 3.0])
    margin = torch.tensor([0.0, 0.5, 1.0])
    for smoothing, centering in ((0.0, 0.0), (0.1, 0.0), (0.2, 0.01)):
        loss = reward_model.pair_loss(chosen, rejected, margin, smoothing, centering)
        for i, (c, r, m) in enumerate(zip(chosen.tolist(), rejected.tolist(), margin.tolist())):
            p = 1 / (1 + math.exp(-(c - r - m)))
            expected = -(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p) + centering * (c + r) ** 2
            assert loss[i].item() == pytest.approx(expected, rel=1e-5)


def test_pair_loss_recovers_the_bradley_terry_probability():
    """The minimum over many labels of one pair is where sigmoid(r_w - r_l) is the share that chose it."""
    z = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], line_search_fn="strong_wolfe", max_iter=50)
    zero = torch.zeros(1)

    def closure():
        optimizer.zero_grad()
        loss = 0.8 * reward_model.pair_loss(z, zero).sum() + 0.2 * reward_model.pair_loss(zero, z).sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    assert z.sigmoid().item() == pytest.approx(0.8, abs=1e-4)


def test_calibration_error():
    sure = torch.tensor([0.9] * 10)  # says 0.9, is right always: off by 0.1
    assert reward_model.calibration_error(sure) == pytest.approx(0.1, abs=1e-6)
    honest = torch.tensor([0.75] * 3 + [0.25])  # the chosen one had 0.75, three times of four
    assert reward_model.calibration_error(honest) == pytest.approx(0.0, abs=1e-6)


def test_correlation_against_numpy():
    import numpy as np
    a, b = torch.randn(50), torch.randn(50)
    assert reward_model.correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-5)
    assert reward_model.correlation(a, torch.ones(50)) == 0.0


def test_a_run_learns_is_centred_and_loads_elsewhere(tmp_path):
    log = run(tmp_path, epochs=6)
    assert log[-1]["eval_accuracy"] > 0.9 and log[-1]["eval_loss"] < 0.2 < log[0]["eval_loss"]
    assert {"eval_ece", "eval_length_correlation"} <= log[-1].keys()
    folder = str(tmp_path / "run/checkpoint")
    reward = common.load_reward(folder, "cpu", 8)
    good, bad = reward([{"prompt": "what is green and white ?"}] * 2, ["green and white is white .", "it is green ."])
    assert good > bad
    # the bias is in the config; a loader that does not know it loses that constant and nothing else
    bias = AutoConfig.from_pretrained(folder).reward_bias
    tokenizer, plain = common.load_tokenizer(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    text = common.render(tokenizer, "what is green and white ?", "it is green .")
    logit = plain(torch.tensor(common.encode(tokenizer, [text]))).logits[0, 0]
    assert bias != 0 and (logit + bias).item() == pytest.approx(bad.item(), abs=1e-4)


def test_the_mean_score_of_the_references_completions_is_zero(tmp_path):
    run(tmp_path, bias_prompts=44)
    reward = common.load_reward(str(tmp_path / "run/checkpoint"), "cpu", 32)
    tokenizer = common.load_tokenizer("tiny/policy")
    policy, _ = common.load_model(AutoModelForCausalLM, "tiny/policy", "cpu")
    data = [{"prompt": p["prompt"]} for p in PAIRS[:30]] * 8
    ids, mask = common.pad(common.encode(tokenizer, [common.render(tokenizer, r["prompt"]) for r in data]),
                           tokenizer.pad_token_id, "left")
    out = policy.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=16)
    scores = reward(data, tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True))
    assert abs(scores.mean()) < 0.35 * scores.std()


def test_the_head_starts_at_one_over_the_root_of_d_plus_one(tmp_path, monkeypatch):
    seen, norm = [], torch.nn.init.normal_
    monkeypatch.setattr(torch.nn.init, "normal_", lambda *a, **k: seen.append((
        tuple(a[0].shape) if a else (), k)) or norm(*a, **k))
    run(tmp_path)
    assert ((1, 128), {"std": 129 ** -0.5}) in seen


def test_micro_batches_change_nothing(tmp_path):
    """The gradient of a step, told by its norm and by the loss after it, is the same in any portions."""
    a, b = (run(tmp_path, str(n), micro_batch_size=n, bias_prompts=0) for n in (2, 64))
    for x, y in zip(a, b):
        for key in set(x) - {"seconds", "tokens_per_second"}:
            assert x[key] == pytest.approx(y[key], rel=5e-3, abs=5e-4)


def test_equal_pairs_are_left_out_and_counted(tmp_path, capsys):
    same = {"prompt": "what is green and green ?", "chosen": "it is white .", "rejected": "it is white ."}
    run(tmp_path, pairs=[same, same] + PAIRS)
    assert f"of {len(PAIRS) - 18} pairs, 0 cut" in (out := capsys.readouterr().out) and "2 left out" in out


def test_pairs_equal_after_truncation_are_left_out(tmp_path, capsys):
    """What differs is lost with the beginning: nothing is left to choose between."""
    early = {"prompt": "what is green and green ?", "chosen": "white . " + "it is good . " * 30,
             "rejected": "one . " + "it is good . " * 30}
    run(tmp_path, pairs=[early] + PAIRS, max_tokens=40)
    out = capsys.readouterr().out
    assert "1 cut to 40 tokens" in out and "1 left out: their answers are equal" in out


@pytest.mark.parametrize("option", [dict(margin_column="margin"), dict(centering=0.01), dict(label_smoothing=0.1),
                                    dict(dtype="bfloat16"), dict(gradient_checkpointing=True),
                                    dict(reference="none"), dict(lr_schedule="cosine")], ids=str)
def test_every_option_runs(tmp_path, option):
    log = run(tmp_path, pairs=[{**p, "margin": 0.5} for p in PAIRS[:40]], **option)
    assert all(math.isfinite(r["loss"]) for r in log if "loss" in r)


def test_the_margin_is_used(tmp_path):
    plain, wide = (run(tmp_path, str(m), pairs=[{**p, "gap": m} for p in PAIRS], margin_column="gap", bias_prompts=0)
                   for m in (0.0, 5.0))
    first = [next(r["loss"] for r in log if "loss" in r) for log in (plain, wide)]
    assert first[1] > first[0] + 2


@pytest.mark.parametrize("pairs, changes, expected", [
    ([{"prompt": "a"}] * 30, {}, ":1: pairs need the columns"),
    ([{"prompt": "a", "chosen": "b", "rejected": "b"}] * 30, {}, "no pair is left"),
    (PAIRS, dict(margin_column="gap"), "no number in the column 'gap'"),
    (PAIRS, dict(label_smoothing=0.5), "--label-smoothing"),
    (PAIRS, dict(model="tiny/none"), "no such model folder"),
    (PAIRS[:5], {}, "--eval-pairs"),
])
def test_bad_input(tmp_path, capsys, pairs, changes, expected):
    data = write(tmp_path / "bad.jsonl", *pairs)
    args = reward_model.Args(**(SMALL | dict(data=data, run_dir=str(tmp_path / "run")) | changes))
    assert expected in fails(capsys, reward_model.main, args) and not (tmp_path / "run").exists()
