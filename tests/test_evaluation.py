"""What evaluation and the log's diagnostics measure, each against another way to the same number; and the flags
that go with them."""
import dataclasses
import gc
import hashlib
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import dpo
import grpo
import ppo
import reinforce
import reward_model

ONLINE = {"grpo": grpo, "ppo": ppo, "reinforce": reinforce}
SMALL = dict(steps=2, prompts_per_step=3, group_size=4, max_new_tokens=12, eval_prompts=12, log_every=1, device="cpu")


def run(script, folder, name="run", **changes) -> list[dict]:
    script.main(script.Args(**SMALL | {"run_dir": str(folder / name)} | changes))
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def fails(capsys, script, **flags) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main(script.Args(**flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    del stop
    gc.collect()  # of the run's frames, which hold its lock
    return error


# --- pure functions

def test_wilson_interval():
    assert common.wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson's formula, by hand
    low, high = common.wilson_interval(1.0, 300)
    assert high == pytest.approx(1.0) and 0.98 < low < 0.99  # where the normal interval has no width
    # it holds the truth in about 95 % of tries, exactly counted over all outcomes
    for p in (0.1, 0.5, 0.9):
        held = sum(math.comb(50, k) * p**k * (1 - p)**(50 - k) for k in range(51)
                   if common.wilson_interval(k / 50, 50)[0] <= p <= common.wilson_interval(k / 50, 50)[1])
        assert 0.92 < held < 0.98


def test_length_controlled_is_the_optimum_of_the_penalised_likelihood():
    torch.manual_seed(0)
    longer = torch.randint(-20, 30, (200,)).float()
    wins = (torch.rand(200) < (0.3 + longer / 30).sigmoid()).float()
    wins[:20] = 0.5
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    x = (longer.double() / longer.double().std(correction=0)).tanh()
    optimizer = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(
            weights[0] + weights[1] * x, wins.double(), reduction="sum") + weights.square().sum() / 18
        value.backward()
        return value
    optimizer.step(loss)
    rate, low, high = common.length_controlled(wins, longer)
    assert rate == pytest.approx(weights[0].sigmoid().item(), abs=1e-6) and low < rate < high


def test_length_controlled_takes_the_length_out():
    """A judge that goes by length alone leaves no win rate but one half; one that ignores it, its own rate."""
    torch.manual_seed(1)
    longer = torch.randn(4000) * 10 + 8
    by_length = (torch.rand(4000) < (2 * (longer / longer.std()).tanh()).sigmoid()).float()
    assert by_length.mean() > 0.6
    rate, low, high = common.length_controlled(by_length, longer)
    assert low < 0.5 < high and high - low < 0.06
    rate, low, high = common.length_controlled((torch.rand(4000) < 0.7).float(), longer)
    assert low < 0.7 < high
    # of tries with that judge, about 95 % hold one half
    held = 0
    for _ in range(200):
        longer = torch.randn(150) + 0.8
        wins = (torch.rand(150) < (1.5 * (longer / longer.std(correction=0)).tanh()).sigmoid()).float()
        _, low, high = common.length_controlled(wins, longer)
        held += low <= 0.5 <= high
    assert 180 <= held <= 199


def test_length_controlled_holds_where_all_win_or_all_are_as_long():
    rate, low, high = common.length_controlled(torch.ones(50), torch.arange(50.0))
    assert 0.5 < low < rate < high < 1
    rate, *_ = common.length_controlled(torch.tensor([1.0, 0, 0, 0] * 100), torch.zeros(400))
    assert rate == pytest.approx(0.25, abs=0.01)


def test_win_rates_ties_left_out_rows_and_samples():
    found = common.win_rates(torch.tensor([1.0, 0.0, -1.0, 2.0]), torch.zeros(4))
    assert found["win_rate"] == pytest.approx(2.5 / 4)
    found = common.win_rates(torch.tensor([1.0, math.nan, -1.0, 2.0]), torch.zeros(4))
    assert found["win_rate"] == pytest.approx(2 / 3)
    assert (found["win_rate_low"], found["win_rate_high"]) == pytest.approx(common.wilson_interval(2 / 3, 3))
    # two of each prompt: the mean over prompts of their means, and an interval of two prompts, not of four tries
    found = common.win_rates(torch.tensor([1.0, -1.0, 1.0, math.nan]), torch.zeros(4), samples=2)
    assert found["win_rate"] == pytest.approx((0.5 + 1) / 2)
    assert found["win_rate_low"] == pytest.approx(common.wilson_interval(0.75, 2)[0])
    assert common.win_rates(torch.full((2,), math.nan), torch.zeros(2)) == {}


def test_pass_at_k_is_the_mean_over_all_subsets():
    right = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).float()
    for k in range(1, 6):
        for row, estimate in zip(right, common.pass_at_k(right, k)):
            subsets = list(itertools.combinations(row.tolist(), k))
            assert estimate.item() == pytest.approx(sum(max(s) for s in subsets) / len(subsets))
    assert common.pass_rates(right.view(-1), 5).keys() == {"pass_at_1", "pass_at_2", "pass_at_4"}
    assert common.pass_rates(right.view(-1) / 2, 5) == {} == common.pass_rates(right.view(-1), 1)


def test_length_correlation_is_within_prompts():
    torch.manual_seed(0)
    lengths = torch.randint(1, 40, (6, 5))
    scores = torch.randn(6, 5) + lengths / 20 + torch.arange(6)[:, None] * 100  # prompts differ by far more
    scores[2, 3] = math.nan
    centred = [np.array([(r, n) for r, n in zip(group.tolist(), some.tolist()) if r == r])
               for group, some in zip(scores, lengths)]
    centred = np.concatenate([c - c.mean(0) for c in centred])
    found = common.length_correlation(scores.view(-1), lengths.view(-1), 5)
    assert found == pytest.approx(np.corrcoef(centred.T)[0, 1], abs=1e-5)
    assert common.length_correlation(torch.ones(8), torch.arange(8), 4) == 0


def test_distinct_ngrams_counts_as_sets_do():
    torch.manual_seed(0)
    ids, lengths = torch.randint(0, 3, (30, 12)), torch.randint(1, 13, (30,))
    mask = (torch.arange(12)[None] < lengths[:, None]).long()
    for n in (1, 2, 3):
        shares = []
        for row, length in zip(ids.tolist(), lengths.tolist()):
            grams = [tuple(row[i:i + n]) for i in range(length - n + 1)]
            shares += [len(set(grams)) / len(grams)] if grams else []
        assert common.distinct_ngrams(ids, mask, n) == pytest.approx(sum(shares) / len(shares))
    assert common.distinct_ngrams(ids[:, :2], mask[:, :2]) == 1


def test_credit_line(monkeypatch):
    tokenizer = common.load_tokenizer("tiny/policy")
    ids = torch.tensor(tokenizer("a lily \n is", add_special_tokens=False).input_ids)
    line = common.credit_line(tokenizer, ids, torch.linspace(-1, 1, len(ids)))
    assert line.startswith("a[-1.00] lily[") and line.endswith("is[+1.00]") and "\n" not in line
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    line = common.credit_line(tokenizer, ids, torch.linspace(-1, 1, len(ids)))
    assert line.startswith("\033[30;48;2;255;55;55ma\033[0m") and "48;2;55;255;55m is" in line


def test_eval_line():
    line = common.eval_line({"step": 12345, "eval_gold": 0.87984, "eval_truncated": 0.0, "eval_win_rate": 0.6467,
                             "eval_win_rate_low": 0.5911, "eval_win_rate_high": 0.6987})
    assert line == "eval  step 12345  gold 0.8798  win_rate 0.6467 (0.59 to 0.70)"


# --- runs

@pytest.mark.parametrize("script", ONLINE)
def test_steps_0_evaluates_a_checkpoint_as_its_own_run_did(script, tmp_path):
    """Against --reference, with the same seed: the same figures to the last digit; and nothing is written but the
    evaluation."""
    last = run(ONLINE[script], tmp_path, lr=3e-3)[-1]
    checkpoint = tmp_path / "run/checkpoint"
    before = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in checkpoint.rglob("*") if p.is_file()}
    (found,) = run(ONLINE[script], tmp_path, "evaluation", steps=0, model=str(checkpoint), reference="tiny/policy")
    assert last["eval_kl"] > 0.01 and found | {"step": 2} == last
    assert before == {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in checkpoint.rglob("*") if p.is_file()}
    names = {p.name for p in (tmp_path / "evaluation").iterdir()}
    assert names == {"args.json", "lock", "metrics.jsonl", "samples.jsonl"}
    if script != "grpo":
        return
    # with no --reference it is its own: as good as itself, and as far
    (alone,) = run(ONLINE[script], tmp_path, "alone", steps=0, model=str(checkpoint))
    assert alone["eval_win_rate"] == 0.5 and alone["eval_reference_reward"] == alone["eval_reward"] == last["eval_reward"]
    assert abs(alone["eval_kl"]) < 1e-4


@pytest.mark.parametrize("script", ONLINE)
def test_stop_kl_ends_the_run_and_measures_it_at_beta_0(script, tmp_path, capsys):
    rows = run(ONLINE[script], tmp_path, steps=6, beta=0.0, lr=3e-3, stop_kl=0.05, save_every=0)
    steps = [row for row in rows if "loss" in row]
    assert 1 < len(steps) < 6 and steps[-1]["kl"] > 0.05 and all(row["kl"] <= 0.05 for row in steps[:-1])
    assert rows[-1]["eval_kl"] > 0 and rows[-1]["step"] == steps[-1]["step"]
    assert "stopped by --stop-kl 0.05" in capsys.readouterr().out and (tmp_path / "run/checkpoint").is_dir()
    if script == "ppo":
        return
    # at beta 0 the reference has no say in what is learned
    free = run(ONLINE[script], tmp_path, "free", steps=len(steps), beta=0.0, lr=3e-3, save_every=0, lr_schedule="constant")
    held = run(ONLINE[script], tmp_path, "held", steps=len(steps), beta=0.0, lr=3e-3, save_every=0, lr_schedule="constant",
               stop_kl=1e9)
    assert "kl" not in free[1] and [r["loss"] for r in free if "loss" in r] == [r["loss"] for r in held if "loss" in r]


def test_pass_at_k_of_a_run(tmp_path):
    (tmp_path / "right.py").write_text("def right(prompts, completions, **columns):\n"
                                       "    return [float(' is ' in str(c)) for c in completions]\n")
    (found,) = run(grpo, tmp_path, steps=0, reward=f"{tmp_path}/right.py:right", eval_samples=4)
    assert found["eval_pass_at_1"] == found["eval_reward"] < found["eval_pass_at_2"] < found["eval_pass_at_4"] <= 1
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 48 and all(s["prompt"] == samples[i - i % 4]["prompt"] for i, s in enumerate(samples))
    solved = np.array([s["reward"] for s in samples]).reshape(12, 4)
    assert found["eval_pass_at_4"] == pytest.approx(solved.max(1).mean(), abs=1e-4)


def test_show_credit(tmp_path, capsys):
    """Each token with its advantage: one number for GRPO and REINFORCE, many for PPO."""
    for name, script in ONLINE.items():
        run(script, tmp_path, name, steps=1, eval_every=0, show_credit=True)
        out = capsys.readouterr().out.splitlines()
        best, worst = (next(line for line in out if line.startswith(start)) for start in ("best ", "worst "))
        numbers, others = ({float(part.split("]")[0]) for part in line.split("[")[1:]} for line in (best, worst))
        assert len(numbers) > 1 if name == "ppo" else len(numbers) == 1, best
        if name == "grpo":
            assert max(others) < 0 < min(numbers)


def test_diagnostics_are_in_the_log(tmp_path):  # the same lines in all three; see test_sidebyside.py
    rows = run(reinforce, tmp_path)
    for row in (row for row in rows if "loss" in row):
        assert {"length_correlation", "distinct_3", "truncated", "kl", "entropy", "length"} <= set(row)
        assert -1 <= row["length_correlation"] <= 1 and 0 < row["distinct_3"] <= 1
    first, last = (row for row in rows if "eval_reward" in row)
    assert first["eval_reward"] == first["eval_reference_reward"] == last["eval_reference_reward"]
    assert last["eval_win_rate_low"] < last["eval_win_rate"] < last["eval_win_rate_high"]


def test_reward_model_by_kind_and_by_length(tmp_path):
    flags = dict(epochs=0, model="tiny/reward_model", bias_prompts=0, run_dir=str(tmp_path / "run"), device="cpu")
    reward_model.main(reward_model.Args(**flags))
    (found,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    held = [json.loads(line) for line in Path("tiny/preferences.jsonl").read_text().splitlines()][-600:]
    kinds = sorted({row["kind"] for row in held})
    weighted = sum(found[f"eval_accuracy_{kind}"] * sum(row["kind"] == kind for row in held) for kind in kinds)
    assert weighted / 600 == pytest.approx(found["eval_accuracy"], abs=1e-3)
    longer = [len(row["chosen"].split(" ")) - len(row["rejected"].split(" ")) for row in held]  # a word is a token
    parts = [(sum(n > 0 for n in longer), found["eval_accuracy_longer"]),
             (sum(n < 0 for n in longer), found["eval_accuracy_shorter"])]
    reward = common.load_reward("tiny/reward_model", "cpu", 64)
    chosen, rejected = (reward(held, [row[side] for row in held]) for side in ("chosen", "rejected"))
    for sign, (number, accuracy) in zip((1, -1), parts):
        here = torch.tensor([n * sign > 0 for n in longer])
        assert accuracy == pytest.approx((chosen > rejected)[here].float().mean().item(), abs=0.5 / number)
    assert not (tmp_path / "run/checkpoint").exists()


def test_dpo_epochs_0_evaluates(tmp_path):
    flags = dict(epochs=0, model="tiny/policy", run_dir=str(tmp_path / "run"), eval_pairs=20, eval_prompts=8,
                 reference_dir=str(tmp_path / "ref"), device="cpu")
    dpo.main(dpo.Args(**flags))
    (found,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert found["eval_accuracy"] == 0.5 == found["eval_win_rate"] and not (tmp_path / "run/checkpoint").exists()


# --- what users get wrong

@pytest.mark.parametrize("flags, words", [
    (dict(steps=0, eval_every=0), "--steps 0: only evaluates"), (dict(stop_kl=-1.0), "--stop-kl: must not be negative"),
    (dict(eval_samples=0), "--eval-samples: must be more than 0"), (dict(reference="tiny/none"), "tiny/none: no such model"),
    (dict(reference="tiny/reward_model"), "tiny/reward_model: no causal LM")])
def test_bad_flags(flags, words, tmp_path, capsys):
    assert fails(capsys, grpo, **SMALL | flags | {"run_dir": str(tmp_path / "run")}).startswith(f"error: {words}")
    assert not (tmp_path / "run").exists()


def test_eval_by_a_column_that_is_not_there(tmp_path, capsys):
    assert "--eval-by price: no held-out pair" in fails(capsys, reward_model, eval_by="price", run_dir=str(tmp_path / "run"))


def test_resuming_with_other_held_out_prompts_or_a_checkpoint_of_another_version_is_refused(tmp_path, capsys):
    run(grpo, tmp_path)
    flags = json.loads((tmp_path / "run/args.json").read_text()) | {"resume": str(tmp_path / "run"), "steps": 3}
    for other in ({"eval_samples": 2}, {"eval_prompts": 5}):
        assert "other held-out prompts than when the run began" in fails(capsys, grpo, **flags | other)
    path = tmp_path / "run/checkpoint/resume/state.json"
    state = json.loads(path.read_text())
    del state["first"]
    path.write_text(json.dumps(state))
    assert "another version of this script: it has no 'first'" in fails(capsys, grpo, **flags)


def test_tensorboard_is_asked_for_before_anything_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--tensorboard", "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        common.command_line(grpo.main, grpo.Args, "")
    assert stop.value.code == 2 and "pip install 'plain-rlhf[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [grpo, dpo, reward_model])
def test_tensorboard_has_every_metric(script, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra: pip install 'plain-rlhf[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    flags = SMALL | {"tensorboard": True, "run_dir": str(tmp_path / "run")}
    if script is not grpo:
        pairs = Path("tiny/preferences.jsonl").read_text().splitlines(True)[:40]
        (tmp_path / "pairs.jsonl").write_text("".join(pairs))
        flags |= {"data": str(tmp_path / "pairs.jsonl"), "eval_pairs": 8, "bias_prompts": 4,
                  "reference_dir": str(tmp_path / "ref")}
        flags = {k: v for k, v in flags.items() if k in {f.name for f in dataclasses.fields(script.Args)}}
    script.main(script.Args(**flags))
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for row in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()):
        for name, value in row.items():
            points = {e.step: e.value for e in events.Scalars(name)}
            assert points[row["step"]] == pytest.approx(value, rel=1e-5), name
