"""The scripts as a user runs them: whole runs, bad input, a copied file, Ctrl-C."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import dpo
import grpo
import ppo
import reinforce
import reward_model

ROOT = Path(__file__).parent.parent
SCRIPTS = {"grpo": grpo, "ppo": ppo, "reinforce": reinforce, "dpo": dpo, "reward_model": reward_model}
ONLINE = ["grpo", "ppo", "reinforce"]
SMALL = dict(steps=2, prompts_per_step=3, group_size=4, max_new_tokens=12, eval_prompts=8,
             micro_batch_size=5, log_every=1, device="cpu")


def rows(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path: Path, *lines) -> str:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return str(path)


def run_grpo(tmp_path, name="run", **changes):
    grpo.main(grpo.Args(**(SMALL | {"run_dir": str(tmp_path / name)} | changes)))
    return rows(tmp_path / name / "metrics.jsonl")


def fails(capsys, main, args) -> str:
    """The one line on stderr of a run that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: "), error
    return error


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag(script, capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(SCRIPTS[script].Args, description=SCRIPTS[script].__doc__, args=["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for field in dataclasses.fields(SCRIPTS[script].Args):
        assert f"--{field.name.replace('_', '-')}" in out


def test_a_misspelt_flag_is_named_and_nothing_runs(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "grpo.py", "--group-sise", "4"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "--group-sise" in done.stderr and "--group-size" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["ppo", "reinforce"])
def test_runs_of_the_others_leave_the_same(script, tmp_path, capsys):
    main, Args = SCRIPTS[script].main, SCRIPTS[script].Args
    main(Args(**(SMALL | {"run_dir": str(tmp_path / "run")})))
    log = rows(tmp_path / "run/metrics.jsonl")
    steps, evals = [r for r in log if "loss" in r], [r for r in log if "eval_reward" in r]
    assert [r["step"] for r in steps] == [1, 2] and [r["step"] for r in evals] == [0, 2]
    named = {"step", "reward", "reward_std", "kl", "entropy", "length", "truncated", "loss", "grad_norm", "lr",
             "seconds", "tokens_per_second", "left_out", "length_correlation", "distinct_3"}
    parts = {f"seconds_{part}" for part in ("generate", "score", "kl", "update")}
    assert sum(steps[0][part] for part in parts) == pytest.approx(steps[0]["seconds"], rel=1e-3)
    named |= parts | {"ppo": {"beta", "value_loss", "value", "explained_variance", "updates", "approx_kl_k1", "approx_kl",
                      "clipped_low", "clipped_high"},
              "reinforce": {"advantage_std", "baseline", "clipped_low", "clipped_high"}}[script]
    assert steps[0].keys() == named
    assert evals[0].keys() == {"step"} | {f"eval_{k}" for k in (
        "reward", "gold", "kl", "length", "truncated", "reference_reward", "win_rate", "win_rate_low", "win_rate_high",
        "lc_win_rate", "lc_win_rate_low", "lc_win_rate_high")}
    assert abs(steps[0]["kl"]) < 1e-6 and evals[0]["eval_kl"] == 0 and evals[0]["eval_win_rate"] == 0.5
    assert abs(steps[1]["kl"]) > 1e-6 and len(rows(tmp_path / "run/samples.jsonl")) == 2 * 8
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint")
    before = AutoModelForCausalLM.from_pretrained("tiny/policy", dtype=torch.float32)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    assert AutoTokenizer.from_pretrained(tmp_path / "run/checkpoint").chat_template
    out = capsys.readouterr().out  # what is in memory, model by model
    models = ["policy", "reference", "reward"] + ["critic"] * (script == "ppo")
    assert [line.split()[0] for line in out.splitlines() if "M parameters" in line] == models


def test_a_run_leaves_metrics_samples_and_an_ordinary_model(tmp_path):
    log = run_grpo(tmp_path)
    steps, evals = [r for r in log if "loss" in r], [r for r in log if "eval_reward" in r]
    assert [r["step"] for r in steps] == [1, 2] and [r["step"] for r in evals] == [0, 2]
    named = {"step", "reward", "reward_std", "kl", "entropy", "length", "truncated", "loss", "grad_norm", "lr",
             "seconds", "tokens_per_second", "flat_wrong", "flat_right", "flat_other", "seconds_generate", "seconds_update"}
    assert named <= steps[0].keys()
    assert {"eval_reward", "eval_gold", "eval_kl", "eval_length", "eval_win_rate"} <= evals[0].keys()
    # before the first update the policy is the reference: no KL, and its samples tie with themselves
    assert steps[0]["kl"] == 0 and evals[0]["eval_kl"] == 0 and evals[0]["eval_win_rate"] == 0.5
    assert abs(steps[0]["loss"]) < 1e-6  # the advantages of a group sum to zero, at ratio 1
    assert steps[1]["kl"] != 0
    assert len(rows(tmp_path / "run/samples.jsonl")) == 2 * 8
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint")
    before = AutoModelForCausalLM.from_pretrained("tiny/policy", dtype=torch.float32)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    assert AutoTokenizer.from_pretrained(tmp_path / "run/checkpoint").chat_template


def test_a_seed_gives_the_same_run_and_micro_batches_change_nothing(tmp_path):
    first, again = run_grpo(tmp_path, "a"), run_grpo(tmp_path, "b")
    other = run_grpo(tmp_path, "c", micro_batch_size=64)
    for a, b, c in zip(first, again, other):
        for key in (k for k in a if "second" not in k):
            assert a[key] == b[key]
            assert a[key] == pytest.approx(c[key], rel=2e-3, abs=2e-5)


@pytest.mark.parametrize("changes", [
    dict(loss_type="bnpo"), dict(loss_type="dapo", clip_high=0.28), dict(loss_type="dr_grpo", scale_rewards="none"),
    dict(loss_type="gspo", epochs=2), dict(loss_type="cispo", clip_low=1.0, minibatches=2),
    dict(kl_in="reward", scale_rewards="batch"), dict(kl_loss="k2"), dict(kl_loss="k3_ratio", epochs=2),
    dict(truncated="mask"), dict(truncated="penalise"), dict(gradient_checkpointing=True),
    dict(dtype="bfloat16"), dict(lr_schedule="cosine", warmup=1), dict(generate_batch_size=4)],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()))
def test_every_option_runs(tmp_path, changes):
    log = run_grpo(tmp_path, eval_every=0, **changes)
    assert len(log) == 2 and all(r["grad_norm"] > 0 for r in log)
    assert log[0]["clipped_low"] == 0 or changes.get("epochs", 1) * changes.get("minibatches", 1) > 1


def test_the_first_update_has_ratio_one_and_later_ones_do_not(tmp_path, monkeypatch):
    ratios, policy_loss = [], grpo.policy_loss
    monkeypatch.setattr(grpo, "policy_loss", lambda new, old, *rest: ratios.append(
        (new - old).detach().abs().max().item()) or policy_loss(new, old, *rest))
    run_grpo(tmp_path, steps=1, eval_every=0, minibatches=2, micro_batch_size=100, lr=1e-3)
    zero = [r == 0 for r in ratios]  # of micro-batch after micro-batch
    assert zero == sorted(zero, reverse=True) and 0 < sum(zero) < len(zero)


def test_beta_zero_loads_no_reference_and_one_update_makes_no_second_forward(tmp_path, monkeypatch):
    loads, calls = [], []
    load, logprobs = grpo.load_model, grpo.completion_logprobs
    monkeypatch.setattr(grpo, "load_model", lambda *a, **k: loads.append(a) or load(*a, **k))
    monkeypatch.setattr(grpo, "completion_logprobs", lambda *a: calls.append(a) or logprobs(*a))
    log = run_grpo(tmp_path, beta=0.0, steps=1, micro_batch_size=100)
    assert len(loads) == 1 and sum(len(a[4]) for a in calls) == 12 and not any("kl" in r or "eval_kl" in r for r in log)


def test_masked_completions_stay_in_the_group_and_in_attention(tmp_path, monkeypatch):
    """Taking truncated completions out before the baseline would bias it; out of attention, their log-probs."""
    seen, advantages = {}, grpo.group_advantages
    monkeypatch.setattr(grpo, "group_advantages", lambda r, *a: seen.update(rewards=r) or advantages(r, *a))
    log = run_grpo(tmp_path, truncated="mask", max_new_tokens=3, steps=1, eval_every=0)
    assert log[0]["truncated"] > 0 and log[0]["left_out"] == 0 and not seen["rewards"].isnan().any()


def test_generate_stops_at_each_end_and_samples_what_the_forward_pass_says(tmp_path):
    """Rows of a group differ, the mask ends with the first end, and the share of each first token is its
    probability under a plain forward pass of the prompt (no other token's, no shared draw)."""
    tokenizer = common.load_tokenizer("tiny/policy")
    model, _ = common.load_model(AutoModelForCausalLM, "tiny/policy", "cpu")
    prompts = common.encode(tokenizer, [common.render(tokenizer, p) for p in (
        "what is the capital of france ?", "how do i make tea ?")])
    ids, mask = common.pad(prompts, tokenizer.pad_token_id, "left")
    args = grpo.Args(max_new_tokens=20, temperature=1.3)
    end = tokenizer.eos_token_id
    completions, written = grpo.generate(model, ids, mask, args, 3000, [end], 0,
                                         torch.Generator().manual_seed(0))
    for row, seen in zip(completions, written):
        n = int(seen.sum())
        assert seen[:n].all() and not (row[:n - 1] == end).any()
        assert n == 20 or row[n - 1] == end
    for i, prompt in enumerate(prompts):
        probs = (model(torch.tensor([prompt])).logits[0, -1] / 1.3).softmax(-1)
        first = completions[i * 3000:(i + 1) * 3000, 0].bincount(minlength=len(probs)) / 3000
        assert (first - probs).abs().sum() / 2 < 0.08 and len(set(map(tuple, completions.tolist()))) > 1000
    # the second token as well: the cache goes with its rows when others finish
    likely = completions[:3000, 0].mode().values
    after = completions[:3000][(completions[:3000, 0] == likely) & (written[:3000, 1] == 1), 1]
    probs = (model(torch.tensor([prompts[0] + [likely.item()]])).logits[0, -1] / 1.3).softmax(-1)
    assert (after.bincount(minlength=len(probs)) / len(after) - probs).abs().sum() / 2 < 0.08


def test_sampled_rows_agree_with_the_plain_forward_pass(monkeypatch):
    """The logits of every decoding step, through the shared and shrunk cache, are those of a forward pass."""
    tokenizer = common.load_tokenizer("tiny/policy")
    model, _ = common.load_model(AutoModelForCausalLM, "tiny/policy", "cpu")
    prompts = common.encode(tokenizer, [common.render(tokenizer, p) for p in (
        "what is the capital of france ?", "how do i make tea ?", "what is the color of milk ?")])
    ids, mask = common.pad(prompts, tokenizer.pad_token_id, "left")
    picked, multinomial = [], torch.multinomial
    def spy(probs, n, generator):
        picked.append((probs, multinomial(probs, n, generator=generator)))
        return picked[-1][1]
    monkeypatch.setattr(torch, "multinomial", spy)
    completions, written = grpo.generate(model, ids, mask, grpo.Args(max_new_tokens=16), 4,
                                         [tokenizer.eos_token_id], 0, torch.Generator().manual_seed(1))
    repeat = ids.repeat_interleave(4, 0), mask.repeat_interleave(4, 0)
    logprobs, _ = common.completion_logprobs(model, *repeat, completions, written)
    for t, (probs, token) in enumerate(picked):
        sampler = probs.gather(1, token).log()[:, 0]
        assert torch.allclose(sampler, logprobs[written[:, t] == 1, t], atol=1e-4)
    assert len(picked[-1][0]) < 12  # some rows had finished, and were no longer computed


def test_a_copied_file_runs_in_an_empty_folder(tmp_path):
    """One script and common.py. (One process for all of them: most of its time is imports.)"""
    run = ["import os, runpy, sys"]
    for script in ("grpo", "ppo", "reinforce", "dpo"):
        folder = tmp_path / script
        folder.mkdir()
        for name in (f"{script}.py", "common.py"):
            shutil.copy(ROOT / name, folder)
        write(folder / "rows.jsonl", *[{"prompt": f"what is {w} ?", "chosen": "yes .", "rejected": "no ."}
                                       for w in "a b c d e f".split()])
        (folder / "my.py").write_text("def short(completions, **columns):\n    return [-len(c) for c in completions]\n")
        flags = ["--eval-pairs", "2"] if script == "dpo" else [
            "--reward", "my.py:short", "--steps", "1", "--prompts-per-step", "2", "--group-size", "2"]
        flags += ["--model", str(ROOT / "tiny/policy"), "--data", "rows.jsonl", "--eval-prompts", "2",
                  "--max-new-tokens", "8", "--run-dir", "out"]
        run += [f"os.chdir({str(folder)!r}); sys.path[0] = {str(folder)!r}", f"sys.argv = {[script, *flags]}",
                f"runpy.run_path('{script}.py', run_name='__main__')"]
    done = subprocess.run([sys.executable, "-c", "\n".join(run)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*/out/checkpoint/model.safetensors"))) == 4


@pytest.mark.parametrize("script", ["grpo", "dpo"])  # the loop's ends of the others are grpo.py's
def test_ctrl_c_finishes_the_step_and_saves(script, tmp_path):
    flags = ["--epochs", "50", "--eval-pairs", "8", "--pairs-per-step", "2", "--reference-dir", tmp_path / "ref"
             ] if script == "dpo" else ["--steps", "500", "--prompts-per-step", "2", "--group-size", "2"]
    if script == "dpo":
        lines = Path("tiny/preferences.jsonl").read_text().splitlines()[:40]
        flags += ["--data", write(tmp_path / "pairs.jsonl", *lines)]
    process = subprocess.Popen(
        [sys.executable, f"{script}.py", "--eval-prompts", "2", "--log-every", "1", "--run-dir", tmp_path / "run",
         *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"})
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGINT)
            break
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by Ctrl-C after step" in out and "Traceback" not in error
    assert (tmp_path / "run/checkpoint/model.safetensors").is_file()


def test_none_leaves_a_completion_out(tmp_path):
    path = tmp_path / "half.py"
    path.write_text("def half(completions, **c):\n    return [None if i % 2 else float(i) for i in range(len(completions))]\n")
    log = run_grpo(tmp_path, reward=f"{path}:half", eval_every=0)
    assert log[0]["left_out"] == 0.5


@pytest.mark.parametrize("script", ONLINE)
def test_rows_left_out_are_in_no_win_rate_and_no_nan_is_written(script, tmp_path):
    """As JSON knows no NaN; a run whose evaluation scores nothing at all says nothing of it."""
    path = tmp_path / "half.py"
    path.write_text("def half(completions, **c):\n    return [None if i % 2 else 1.0 for i in range(len(completions))]\n"
                    "def none(completions, **c):\n    return [None] * len(completions)\n")
    for gold, rate in (("half", 0.5), ("none", None)):
        args = dict(gold=f"{path}:{gold}", steps=0, run_dir=str(tmp_path / gold))
        SCRIPTS[script].main(SCRIPTS[script].Args(**(SMALL | args)))
        log = rows(tmp_path / gold / "metrics.jsonl")
        assert log[0].get("eval_win_rate") == rate and ("eval_gold" in log[0]) == (rate is not None)
        samples = (tmp_path / gold / "samples.jsonl").read_text()
        assert "NaN" not in samples and samples.count('"gold"') == (4 if rate else 0)


def test_flat_groups_are_told_apart(tmp_path):
    for name, value, key in (("zeros", 0.0, "flat_wrong"), ("ones", 1.0, "flat_right"), ("fives", 5.0, "flat_other")):
        path = tmp_path / f"{name}.py"
        path.write_text(f"def f(completions, **c):\n    return [{value}] * len(completions)\n")
        log = run_grpo(tmp_path, name, reward=f"{path}:f", steps=1, eval_every=0)
        assert [log[0][k] for k in ("flat_wrong", "flat_right", "flat_other")] == [float(k == key) for k in
                                                                               ("flat_wrong", "flat_right", "flat_other")]
        assert log[0]["grad_norm"] < 1e-6


def test_an_existing_run_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    write(tmp_path / "run/metrics.jsonl", "precious")
    for script in SCRIPTS.values():
        assert "exists already" in fails(capsys, script.main, script.Args(run_dir=str(tmp_path / "run")))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "run/metrics.jsonl").read_text() == "precious\n"


def test_top_p_is_warned_about(tmp_path, capsys):
    run_grpo(tmp_path, top_p=0.9, steps=1, eval_every=0)
    assert "warning: --top-p" in capsys.readouterr().out


def test_grpo_learns_a_plain_reward(tmp_path):
    """Twelve steps towards short answers: the whole loop, signs and masks included."""
    path = tmp_path / "short.py"
    path.write_text("def short(completions, **c):\n    return [-len(x[0]['content'].split()) / 10 for x in completions]\n")
    log = run_grpo(tmp_path, reward=f"{path}:short", steps=12, prompts_per_step=8, group_size=8, lr=1e-3,
                   max_new_tokens=32, eval_every=0, micro_batch_size=64)
    assert sum(r["reward"] for r in log[-3:]) / 3 > sum(r["reward"] for r in log[:3]) / 3 + 0.1
    assert log[-1]["kl"] > 0.1
