"""What a script leaves behind, and what its flags do to a run, as a user sees it."""
import dataclasses
import functools
import json
import re
import shutil
import sys

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import modeling
from helpers.repo import MODULES
from helpers.runs import (ON_POLICY, PAIRWISE, ROOT, SCRIPTS, checkpoints, command, evaluations_of, fails,
                          last_checkpoint, process, read, small_flags, steps_of, tensors, weights, write)
from helpers.runs import run as resumable_run

run = functools.partial(resumable_run, resumable=False)  # quicker

HALF = """
def half(completions, **columns):
    return [None if i % 2 else i + 0.5 for i in range(len(completions))]
def ones_and_none(completions, **columns):
    return [None if i % 2 else 1.0 for i in range(len(completions))]
def none(completions, **columns):
    return [None] * len(completions)
"""
SHORT = """
def short(completions, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [-len(text.split()) / 5 for text in texts]
"""


def function(folder, text: str, name: str) -> str:
    (folder / "rewards.py").write_text(text)
    return f"{folder}/rewards.py:{name}"


# --- the command line

@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_flag(name, capsys):
    with pytest.raises(SystemExit) as stop:
        command(name, "--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for field in dataclasses.fields(SCRIPTS[name].Args):
        assert f"--{field.name.replace('_', '-')}" in out


def test_a_misspelled_flag_is_named_and_nothing_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command("grpo", "--group-sise", "4")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--group-sise" in error and "--group-size" in error
    assert not list(tmp_path.iterdir())


def test_a_copied_file_runs_in_an_empty_folder(tmp_path):
    """A script and the six shared files, with stdout closed, as without a terminal. (One process runs all five: most of
    its time is imports.)"""
    code = ["import os, runpy, sys"]
    for name in SCRIPTS:
        (folder := tmp_path / name).mkdir()
        for file in (f"{name}.py", *MODULES):
            shutil.copy(ROOT / file, folder)
        write(folder / "rows.jsonl", *[{"prompt": f"what is {w} ?", "chosen": "yes .", "rejected": "no ."}
                                       for w in "a b c d e f".split()])
        (folder / "my.py").write_text("def short(completions, **columns):\n    return [-len(c) for c in completions]\n")
        argv = ["--model", str(ROOT / "tiny/policy"), "--data", "rows.jsonl", "--run-dir", "out"]
        argv += ["--max-new-tokens", "8"]
        argv += ["--eval-pairs", "2"] if name in PAIRWISE else [
            "--reward", "my.py:short", "--steps", "1", "--prompts-per-step", "2", "--group-size", "2"]
        argv += ["--bias-prompts", "2"] if name == "reward_model" else ["--eval-prompts", "2"]
        code += [f"for module in {[module.removesuffix('.py') for module in MODULES]}:", "    sys.modules.pop(module, None)",
                 f"os.chdir({str(folder)!r}); sys.path[0] = {str(folder)!r}", f"sys.argv = {[name, *argv]}",
                 f"runpy.run_path('{name}.py', run_name='__main__')",
                 f"assert sys.modules['runtime'].__file__.startswith({str(folder)!r})"]
    (tmp_path / "all.py").write_text("\n".join(code))
    process("bash", "-c", f"exec {sys.executable} all.py >&-", cwd=tmp_path)
    assert len(list(tmp_path.glob("*/out/checkpoint-1/model.safetensors"))) == 5


def test_a_mistake_is_an_exception_in_python_and_one_line_on_the_command_line(tmp_path, capsys):
    with pytest.raises(modeling.UserError, match="--beta: must be at least 0"):
        SCRIPTS["grpo"].Args(beta=-1.0)
    with pytest.raises(modeling.UserError, match="nowhere: no such model folder"):
        run("grpo", tmp_path / "run", model="tiny/nowhere")
    assert fails(capsys, "grpo", beta=-1.0) == "--beta: must be at least 0"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_out_of_memory_says_which_flags_help(error, monkeypatch, capsys):
    def main(args):
        raise error
    monkeypatch.setattr(SCRIPTS["grpo"], "main", main)
    line = fails(capsys, "grpo")
    for flag in ("--micro-batch-tokens", "--generate-batch-size", "--gradient-checkpointing", "--lora-rank"):
        assert flag in line


@pytest.mark.parametrize("words", ["a bug", "CUDA error: an illegal memory access was encountered"])
def test_other_errors_of_the_program_are_not_hidden(words, monkeypatch):
    def main(args):
        raise RuntimeError(words)
    monkeypatch.setattr(SCRIPTS["grpo"], "main", main)
    with pytest.raises(RuntimeError, match=words):
        command("grpo")


# --- what a run leaves behind

STEP = {"step", "reward", "reward_std", "kl", "entropy", "length", "truncated", "loss", "grad_norm", "lr", "unscored",
        "sampler_gap", "sampler_gap_max",
        "length_correlation", "distinct_3", "zero_std_groups", "zero_std_groups_right", "clip_fraction_low",
        "clip_fraction_high", "seconds", "seconds_generate", "seconds_score", "seconds_logprobs", "seconds_update"}
STEPS = {"grpo": STEP | {"groups_replaced"}, "reinforce": STEP | {"advantage_std", "baseline"},
         "ppo": STEP | {
             "value_loss", "value", "critic_grad_norm", "explained_variance", "beta", "updates", "approx_kl"}}
RATES = {"win_rate", "win_rate_low", "win_rate_high", "lc_win_rate", "lc_win_rate_low", "lc_win_rate_high"}


def flags_and_versions(folder) -> tuple[dict, dict]:
    flags = json.loads((folder / "args.json").read_text())
    return flags, flags.pop("ran_with")


@pytest.mark.parametrize("name", ON_POLICY)
def test_a_run_leaves_metrics_samples_and_an_ordinary_model(name, tmp_path, capsys):
    folder = tmp_path / "run"
    log, out = resumable_run(name, folder), capsys.readouterr().out
    steps, evaluations = steps_of(log), evaluations_of(log)
    assert [row["step"] for row in steps] == [1, 2] and [row["step"] for row in evaluations] == [0, 2]
    assert all(row.keys() == STEPS[name] for row in steps)
    phases = sum(steps[0][f"seconds_{phase}"] for phase in ("generate", "score", "logprobs", "update"))
    assert phases == pytest.approx(steps[0]["seconds"], rel=1e-2)
    assert -1 <= steps[0]["length_correlation"] <= 1 and 0 < steps[0]["distinct_3"] <= 1
    expected = RATES | {"reward", "gold", "kl", "length", "truncated", "reference_gold"}
    assert all(row.keys() == {"step"} | {f"eval_{metric}" for metric in expected} for row in evaluations)

    # before the first update the policy is the reference: no KL, and its samples tie with themselves
    first, last = evaluations
    assert abs(steps[0]["kl"]) < 1e-6 and first["eval_kl"] == 0 and first["eval_win_rate"] == 0.5
    assert abs(steps[1]["kl"]) > 1e-6 and last["eval_kl"] != 0
    assert first["eval_gold"] == first["eval_reference_gold"] == last["eval_reference_gold"]
    assert last["eval_win_rate_low"] < last["eval_win_rate"] < last["eval_win_rate_high"]
    if name == "grpo":
        assert abs(steps[0]["loss"]) < 1e-6  # a group's advantages sum to 0, and the ratio is 1

    samples, baseline = read(folder / "samples.jsonl"), read(folder / "baseline.jsonl")
    columns = {"prompt", "completion", "reward", "gold", "kl", "length", "truncated"}
    assert len(samples) == 8 and all(row.keys() == columns | {"step", "baseline"} for row in samples)
    assert [row["step"] for row in samples] == [0] * 4 + [2] * 4 and len(baseline) == 4
    assert [row["baseline"] for row in samples] == [row["completion"] for row in baseline] * 2
    assert [row["completion"] for row in samples[:4]] == [row["completion"] for row in baseline]

    flags, versions = flags_and_versions(folder)
    assert flags == {field.name: flags[field.name] for field in dataclasses.fields(SCRIPTS[name].Args)}
    assert flags | small_flags(name, folder) == flags and flags["resume"] == ""
    assert versions.keys() == {"python", "torch", "transformers", "device", "processes", "commit"}
    assert versions["torch"] == torch.__version__ and versions["transformers"] == transformers.__version__
    assert versions["processes"] == 1 and versions["device"].startswith("cpu (")

    assert {path.name for path in folder.iterdir()} == {
        "args.json", "metrics.jsonl", "samples.jsonl", "baseline.jsonl", "lock", "checkpoint-2"}
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-2")
    before = AutoModelForCausalLM.from_pretrained("tiny/policy", dtype=torch.float32)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    assert AutoTokenizer.from_pretrained(folder / "checkpoint-2").chat_template

    models = ["policy", "critic", "reference", "reward_model"]
    models.remove("critic") if name != "ppo" else None
    assert [line.split()[0] for line in out.splitlines() if "M parameters" in line] == models
    assert f"the trained model is in {folder / 'checkpoint-2'}" in out
    assert out.count("step ") == 4  # log_every 1


COLORS = "green white black red yellow brown".split()
PAIRS = [{"prompt": f"what is {a} and {b} ?", "chosen": f"{a} and {b} is {b} .", "rejected": f"it is {a} ."}
         for a in COLORS for b in COLORS if a != b] * 2


def test_dpo_learns_and_leaves_an_ordinary_model(tmp_path):
    folder, gold = tmp_path / "run", function(tmp_path, SHORT, "short")
    log = run("dpo", folder, data=write(tmp_path / "pairs.jsonl", *PAIRS), eval_pairs=12, pairs_per_step=16, epochs=4,
              lr=1e-3, gold=gold)
    first, last = evaluations_of(log)
    assert [first["step"], last["step"]] == [0, 12] and [row["step"] for row in steps_of(log)] == [*range(1, 13)]
    assert first["eval_kl"] == 0 and first["eval_win_rate"] == 0.5 and first["eval_margin"] == 0
    assert last["eval_accuracy"] > 0.9 and last["eval_margin"] > 0.1
    assert last["eval_logprob_rejected"] < first["eval_logprob_rejected"]
    samples = read(folder / "samples.jsonl")
    columns = {"step", "prompt", "completion", "baseline", "gold", "kl", "length", "truncated"}
    assert len(samples) == 4 and all(row.keys() == columns for row in samples)
    assert all(row["completion"] == row["baseline"] for row in samples[:2])
    assert (weights(folder / "checkpoint-12") - weights("tiny/policy")).norm() > 0.01
    assert AutoModelForCausalLM.from_pretrained(folder / "checkpoint-12").dtype == torch.float32
    flags, versions = flags_and_versions(folder)
    assert flags["epochs"] == 4 and versions["torch"] == torch.__version__


def test_a_reward_model_learns_is_centered_and_loads_elsewhere(tmp_path, capsys):
    folder = tmp_path / "run"
    log = run("reward_model", folder, data=write(tmp_path / "pairs.jsonl", *PAIRS), eval_pairs=20, bias_prompts=16,
              max_new_tokens=16, epochs=6)
    first, last = evaluations_of(log)
    assert last["eval_accuracy"] > 0.9 and last["eval_loss"] < 0.2 < first["eval_loss"]
    assert {"eval_ece", "eval_length_correlation", "eval_accuracy_longer", "eval_reward_std"} <= last.keys()
    checkpoint = str(last_checkpoint(folder))
    reward = common.load_reward(checkpoint, "cpu")
    good, bad = reward([{"prompt": "what is green and white ?"}] * 2, ["green and white is white .", "it is green ."])
    assert good > bad
    # the bias is in the config; a loader that does not know of it is off by that constant and nothing else
    tokenizer = common.load_tokenizer(checkpoint)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint)
    bias = transformers.AutoConfig.from_pretrained(checkpoint).reward_bias
    text = common.render(tokenizer, "what is green and white ?", "it is green .")
    logit = plain(torch.tensor(common.encode(tokenizer, [text]))).logits[0, 0]
    assert bias != 0 and (logit + bias).item() == pytest.approx(bad.item(), abs=1e-4)
    found = re.search(rf"reward_bias {bias:.4f}: (\d+) completions.*of 16; (\d+) were cut", capsys.readouterr().out)
    assert int(found[1]) + int(found[2]) == 16 and int(found[2]) > 0


def test_another_seed_gives_another_run(tmp_path):
    """That the same seed gives the same one is in test_resume.py."""
    a, b = (steps_of(run("grpo", tmp_path / str(seed), seed=seed, eval_prompts=0)) for seed in (3, 5))
    assert a[1]["loss"] != b[1]["loss"] and a[0]["grad_norm"] != b[0]["grad_norm"]


# --- options

OPTIONS = {
    "grpo": [dict(loss_type="dapo", clip_high=0.28, mask_truncated=True, max_new_tokens=7),
             dict(loss_type="dr_grpo", scale_rewards="none", truncation_penalty=1.0, max_new_tokens=7),
             dict(loss_type="gspo", epochs=2, kl_estimator="k3_ratio"),
             dict(loss_type="cispo", clip_low=1.0, minibatches=2),
             dict(kl_in_reward=True, scale_rewards="batch"), dict(kl_estimator="k2", generate_batch_size=4),
             dict(gradient_checkpointing=True, lr_schedule="cosine", warmup=1), dict(dtype="bfloat16")],
    "ppo": [dict(epochs=2, minibatches=2, truncation_penalty=1.0, max_new_tokens=7),
            dict(critic_warmup=1, kl_target=0.1, mask_truncated=True),
            dict(value_clip=0.0, whiten=False, gamma=0.9, gae_lambda=0.0), dict(target_kl=1e-9, beta=0.0),
            dict(critic="tiny/policy", gradient_checkpointing=True), dict(group_size=1, dtype="bfloat16")],
    "reinforce": [dict(baseline="none", kl_per_token=True), dict(baseline="mean", gradient_checkpointing=True),
                  dict(baseline="moving", truncation_penalty=1.0, max_new_tokens=7), dict(beta=0.0, dtype="bfloat16"),
                  dict(baseline="greedy", mask_truncated=True), dict(group_size=1, baseline="moving"),
                  dict(whiten=True, kl_per_token=True, epochs=2, minibatches=2)],
    "dpo": [dict(loss_type="hinge", gradient_checkpointing=True), dict(loss_type="ipo", length_normalize=True),
            dict(loss_type="simpo", beta=2.0), dict(label_smoothing=0.1, dtype="bfloat16"),
            dict(label_smoothing=0.1, robust=True, sft_weight=0.5), dict(max_tokens=24, lr_schedule="cosine")],
    "reward_model": [dict(margin_column="margin", gradient_checkpointing=True), dict(centering=0.01, dtype="bfloat16"),
                     dict(label_smoothing=0.1, bias_prompts=0, lr_schedule="cosine"), dict(max_tokens=24)]}


@pytest.mark.parametrize("name, changes", [(name, changes) for name in SCRIPTS for changes in OPTIONS[name]],
                         ids=lambda x: str(x)[:60])
@pytest.mark.filterwarnings("error::UserWarning")  # of torch: order of steps, std of nothing
def test_every_option_runs(name, changes, tmp_path):
    """With finite numbers everywhere, a gradient, and a ratio of 1 if there is one update per rollout."""
    log = run(name, tmp_path / "run", **(dict(eval_prompts=0) if name != "reward_model" else {}) | changes)
    steps, flags = steps_of(log), flags_and_versions(tmp_path / "run")[0]
    # a held-out mean over no rows is nan, which is left out
    assert all(-1e9 < value < 1e9 for row in log for value in row.values())
    assert [row["step"] for row in steps] == [1, 2] and steps[-1]["grad_norm"] > 0
    if name in ON_POLICY and flags["epochs"] * flags["minibatches"] == 1:
        assert all(row["clip_fraction_low"] == row["clip_fraction_high"] == 0 for row in steps)


@pytest.mark.parametrize("name, changes", [
    ("grpo", dict(minibatches=2, loss_type="dapo", mask_truncated=True)),
    ("ppo", dict(mask_truncated=True, critic_lr=0.1)),
    ("reinforce", dict(minibatches=2, mask_truncated=True)),
    ("dpo", dict(loss_type="ipo", length_normalize=True, sft_weight=0.3)),
    ("reward_model", dict(centering=0.01))], ids=str)
def test_micro_batches_change_no_gradient(name, changes, tmp_path, monkeypatch):
    """Plain gradient descent hides nothing: the weights move by the same amount."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda weights, lr, **_: torch.optim.SGD(weights, lr))
    changes |= dict(lr=0.1, max_grad_norm=1e9, lr_schedule="constant_with_warmup")
    changes |= dict(steps=1, temperature=1.5, eval_prompts=0) if name in ON_POLICY else dict(pairs_per_step=100)
    changes |= dict(eval_prompts=0) if name == "dpo" else dict(bias_prompts=0) if name == "reward_model" else {}
    for tokens in (1, 8192):
        run(name, tmp_path / str(tokens), micro_batch_tokens=tokens, **changes)
    parts, whole = (tensors(last_checkpoint(tmp_path / folder)) for folder in ("1", "8192"))
    start = tensors("tiny/policy")
    moved = torch.cat([(whole[k] - start[k]).flatten() for k in whole if k in start])
    apart = torch.cat([(whole[k] - parts[k]).flatten() for k in whole])
    assert moved.norm() > 1e-3 and apart.norm() / moved.norm() < 1e-3


@pytest.mark.parametrize("name", ON_POLICY)
def test_a_plain_reward_is_learned(name, tmp_path):
    """A few steps toward short answers: the whole loop, with its signs and masks."""
    questions = "how do i make tea ?", "can you help me ? i have to bake bread ."
    data = write(tmp_path / "data.jsonl", *[{"prompt": [{"role": "user", "content": text}]} for text in questions])
    more = dict(critic_lr=3e-3, lr=1e-3) if name == "ppo" else dict(lr=1e-3, seed=1)
    log = run(name, tmp_path / "run", data=data, reward=function(tmp_path, SHORT, "short"), gold="", steps=8,
              prompts_per_step=2, group_size=12, max_new_tokens=24, eval_prompts=0, **more)
    first, last = log[0], {metric: sum(row[metric] for row in log[-3:]) / 3 for metric in log[0]}
    assert last["reward"] > first["reward"] + 0.2 and last["length"] < first["length"] - 1 and last["kl"] > 0.5
    if name == "ppo":
        assert last["explained_variance"] > first["explained_variance"]


def test_none_from_a_reward_leaves_the_completion_out(tmp_path):
    log = run("grpo", tmp_path / "run", reward=function(tmp_path, HALF, "half"), eval_prompts=0)
    assert log[0]["unscored"] == 0.5 and log[0]["reward"] == 5.5  # the mean of 0.5, 2.5, ..., 10.5


@pytest.mark.parametrize("name", ("grpo", "dpo"))
def test_unscored_completions_are_in_no_win_rate_and_no_nan_is_written(name, tmp_path):
    """JSON has no NaN; an evaluation that scores nothing says nothing about it."""
    for gold, rate in (("ones_and_none", 0.5), ("none", None)):
        none = dict(steps=0) if name in ON_POLICY else dict(epochs=0)
        (row,) = run(name, tmp_path / gold, gold=function(tmp_path, HALF, gold), eval_prompts=4, **none)
        assert row.get("eval_win_rate") == rate and row.get("eval_gold") == (rate and 1.0)
        text = (tmp_path / gold / "samples.jsonl").read_text()
        assert "NaN" not in text and text.count('"gold"') == (2 if rate else 0)


def test_groups_of_equal_rewards_are_counted(tmp_path):
    for value, right in ((0.0, 0), (1.0, 1), (5.0, 0)):
        reward = function(tmp_path, f"def f(completions, **columns):\n    return [{value}] * len(completions)\n", "f")
        (row,) = run("grpo", tmp_path / str(value), reward=reward, steps=1, eval_prompts=0)
        assert (row["zero_std_groups"], row["zero_std_groups_right"]) == (1, right)
        assert row["grad_norm"] < 1e-6


@pytest.mark.parametrize("name", ("grpo", *PAIRWISE))
def test_when_a_run_evaluates_and_saves(name, tmp_path):
    """Every so many steps and at the end; at 0 only at the end (and an evaluation at the start)."""
    changes = dict(steps=4, max_new_tokens=4) if name in ON_POLICY else dict(pairs_per_step=4)  # 16 pairs
    log = run(name, tmp_path / "some", eval_every=3, save_every=3, keep_checkpoints=9, **changes)
    assert [row["step"] for row in evaluations_of(log)] == [0, 3, 4]
    assert checkpoints(tmp_path / "some") == ["checkpoint-3", "checkpoint-4"]
    if name == "reward_model":
        return
    log = run(name, tmp_path / "none", eval_every=0, save_every=0, keep_checkpoints=9, **changes)
    assert [row["step"] for row in evaluations_of(log)] == [0, 4] and checkpoints(tmp_path / "none") == ["checkpoint-4"]


def test_eval_prompts_0_samples_nothing(tmp_path):
    log = run("grpo", tmp_path / "grpo", eval_prompts=0, gold="", steps=1)
    assert not evaluations_of(log) and not (tmp_path / "grpo/samples.jsonl").exists()
    log = run("dpo", tmp_path / "dpo", eval_prompts=0, gold="")
    assert len(evaluations_of(log)) == 2 and not any("eval_length" in row for row in log)  # of the pairs alone
    assert not (tmp_path / "dpo/samples.jsonl").exists()


# --- evaluation of a model

def digests(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ("grpo", "dpo"))
def test_a_checkpoint_is_evaluated_as_its_own_run_did(name, tmp_path):
    """--steps 0 or --epochs 0 against --reference, with the same seed: the same figures to the last digit, and
    nothing is written but the evaluation."""
    changes = dict(eval_prompts=8, eval_samples=2)
    last = run(name, tmp_path / "run", lr=3e-3, **changes)[-1]
    checkpoint, none = tmp_path / "run/checkpoint-2", dict(steps=0) if name in ON_POLICY else dict(epochs=0)
    before = digests(checkpoint)
    (found,) = run(name, tmp_path / "again", model=str(checkpoint), reference="tiny/policy", **changes | none)
    if name == "dpo":  # its loss and margin are measured against --reference too
        assert found["eval_margin"] != 0
    assert abs(last["eval_kl"]) > 0.01 and found | {"step": 2} == last
    assert digests(checkpoint) == before
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        "args.json", "lock", "metrics.jsonl", "samples.jsonl", "baseline.jsonl"}
    if name == "grpo":  # without --reference it is its own: as good as itself, and as far
        (alone,) = run(name, tmp_path / "alone", model=str(checkpoint), **changes | none)
        assert alone["eval_win_rate"] == 0.5 and alone["eval_reward"] == last["eval_reward"]
        assert alone["eval_gold"] == alone["eval_reference_gold"] and abs(alone["eval_kl"]) < 1e-4


def test_dpo_epochs_0_evaluates(tmp_path):
    (found,) = run("dpo", tmp_path / "run", epochs=0, eval_prompts=8)
    assert found["eval_accuracy"] == 0.5 == found["eval_win_rate"] and not checkpoints(tmp_path / "run")


def test_a_reward_model_is_evaluated_by_kind_and_by_length(tmp_path):
    with open("tiny/preferences.jsonl") as file:
        rows = [json.loads(line) for line in file.readlines()[-301:]]
    (found,) = run("reward_model", tmp_path / "run", epochs=0, model="tiny/reward_model",
                   data=write(tmp_path / "pairs.jsonl", *rows), eval_pairs=300, eval_by="kind")
    held_out = rows[1:]
    by_kind = {kind: sum(row["kind"] == kind for row in held_out) for kind in {row["kind"] for row in held_out}}
    weighted = sum(found[f"eval_accuracy_{kind}"] * count for kind, count in by_kind.items())
    assert weighted / 300 == pytest.approx(found["eval_accuracy"], abs=1e-3) and len(by_kind) > 2
    # how much longer the chosen answer is: in the tiny world a word is a token
    longer = torch.tensor([len(row["chosen"].split(" ")) - len(row["rejected"].split(" ")) for row in held_out])
    reward = common.load_reward("tiny/reward_model", "cpu")
    chosen, rejected = (reward(held_out, [row[side] for row in held_out]) for side in ("chosen", "rejected"))
    for rows, metric in ((longer > 0, "eval_accuracy_longer"), (longer < 0, "eval_accuracy_shorter")):
        right = (chosen > rejected)[rows].double().mean().item()
        assert found[metric] == pytest.approx(right, abs=0.5 / int(rows.sum()))
    assert not checkpoints(tmp_path / "run")


def test_pass_at_k_of_a_run(tmp_path):
    reward = function(tmp_path, "def right(completions, **columns):\n"
                                "    return [float(i % 5 == 0) for i in range(len(completions))]\n", "right")
    (found,) = run("grpo", tmp_path / "run", steps=0, reward=reward, eval_samples=4, eval_prompts=12)
    assert found["eval_pass_at_1"] == found["eval_reward"] < found["eval_pass_at_2"] < found["eval_pass_at_4"] < 1
    samples = read(tmp_path / "run/samples.jsonl")
    assert len(samples) == 48 and all(row["prompt"] == samples[i - i % 4]["prompt"] for i, row in enumerate(samples))
    solved = [max(row["reward"] for row in samples[i:i + 4]) for i in range(0, 48, 4)]
    assert found["eval_pass_at_4"] == pytest.approx(sum(solved) / 12, abs=1e-4)


@pytest.mark.parametrize("name", ON_POLICY)
def test_max_kl_ends_the_run_and_measures_the_kl_at_beta_0(name, tmp_path, capsys):
    changes = dict(steps=6, beta=0.0, lr=3e-3, save_every=0, lr_schedule="constant_with_warmup")
    log = run(name, tmp_path / "run", max_kl=0.05, **changes)
    steps, out = steps_of(log), capsys.readouterr()
    assert 1 < len(steps) < 6 and steps[-1]["kl"] > 0.05 and all(row["kl"] <= 0.05 for row in steps[:-1])
    assert log[-1]["step"] == steps[-1]["step"] and "eval_kl" in log[-1]
    assert f"stopped by --max-kl: the KL of step {len(steps)} is" in out.out + out.err
    assert len(checkpoints(tmp_path / "run")) == 1
    # at beta 0 the reference changes nothing that is learned
    free = steps_of(run(name, tmp_path / "free", **changes | dict(steps=len(steps))))
    assert "kl" not in free[1] and [row["loss"] for row in free] == [row["loss"] for row in steps]


# --- TensorBoard

def test_tensorboard_is_asked_for_before_anything_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert fails(capsys, "grpo", tensorboard=True, run_dir=tmp_path / "run") == "--tensorboard: pip install tensorboard"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["grpo", "dpo", "reward_model"])
def test_tensorboard_has_every_metric(name, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra: pip install '.[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = run(name, tmp_path / "run", tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for row in log:
        for metric, value in row.items():
            points = {event.step: event.value for event in events.Scalars(metric)}
            assert points[row["step"]] == pytest.approx(value, rel=1e-5), metric


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    """Steps after the checkpoint, which the resumed run makes again, are purged."""
    pytest.importorskip("tensorboard", reason="needs the extra: pip install '.[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder = tmp_path / "run"
    resumable_run("grpo", folder, tensorboard=True, steps=3, save_every=2, keep_checkpoints=2, eval_prompts=0)
    shutil.rmtree(folder / "checkpoint-3")
    command("grpo", resume=folder, lr=1e-3)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert events.Scalars("lr")[-1].value == pytest.approx(read(folder / "metrics.jsonl")[2]["lr"], rel=1e-5)
