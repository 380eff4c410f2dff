"""Runs that were stopped, and go on: Ctrl-C, a kill, a full disk, numbers that are not finite."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file, save_file

import common
import modeling
import runtime
from helpers.runs import (ENV, ON_POLICY, ROOT, SCRIPTS, checkpoints, command, fails, last_checkpoint, process, read,
                          rows_of_data, run, same_tensors, small_flags, without_times, write)

LONGER = {  # five steps for the on-policy scripts; six for the others, the last with one pair
    "grpo": dict(steps=5, eval_every=2, save_every=2, minibatches=2),
    "ppo": dict(steps=5, eval_every=2, save_every=2, kl_target=0.5),
    "reinforce": dict(steps=5, eval_every=2, save_every=2, baseline="moving"),
    "dpo": dict(pairs_per_step=3, eval_every=2, save_every=2),
    "reward_model": dict(pairs_per_step=3, eval_every=2, save_every=2)}


def digests(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def ctrl_c_in_step_3(monkeypatch):
    """Ctrl-C right after the checkpoint of step 2: step 3 is then the last."""
    save = runtime.Run.save

    def save_and_stop(self, step):
        save(self, step)
        if step == 2:
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(runtime.Run, "save", save_and_stop)
    yield lambda: monkeypatch.setattr(runtime.Run, "save", save)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_stopped_run_ends_as_one_that_was_not(name, tmp_path, ctrl_c_in_step_3, capsys):
    """With the same weights, bit for bit, and the same metrics and samples; half a line and half a checkpoint, as a
    kill would leave them, do no harm. Resumed once more, it says that it is finished, and changes nothing."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run(name, folder, **LONGER[name])
    assert f"stopped after step 3; to continue: --resume {folder}\n" in capsys.readouterr().out
    assert checkpoints(folder) == ["checkpoint-3"]  # --keep-checkpoints 1
    ctrl_c_in_step_3()
    run(name, whole, **LONGER[name] | dict(save_every=0))

    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 4, "loss": 1.0}) + '\n{"step": 5, "lo')
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-4.part")
    (folder / "checkpoint-4.part/resume/state.json").write_text("{")
    command(name, resume=folder)
    assert same_tensors(last_checkpoint(folder), last_checkpoint(whole))
    bias = [json.loads((last_checkpoint(f) / "config.json").read_text()).get("reward_bias") for f in (whole, folder)]
    assert bias[0] == bias[1] and (bias[0] is not None) == (name == "reward_model")
    log, expected = (without_times(read(f / "metrics.jsonl")) for f in (folder, whole))
    assert [row for row in log if "loss" in row or row["step"] != 3] == expected  # it evaluated where it stopped
    if name != "reward_model":
        samples = [row for row in read(folder / "samples.jsonl") if row["step"] != 3]
        assert samples == read(whole / "samples.jsonl")
        assert read(folder / "baseline.jsonl") == read(whole / "baseline.jsonl")
    assert not list(folder.glob("*.part")) and checkpoints(folder) == checkpoints(whole)

    before = digests(folder)
    capsys.readouterr()
    command(name, resume=folder)
    out = capsys.readouterr().out
    assert f"{folder} is finished: " in out and "step  " not in out
    assert digests(folder) == before


def test_a_notebook_resumes_a_run_that_it_has_made(tmp_path):
    """In the same process, where the first run's objects may still be alive."""
    main, Args, folder = SCRIPTS["grpo"].main, SCRIPTS["grpo"].Args, tmp_path / "run"
    flags = small_flags("grpo", folder, eval_prompts=0)
    main(Args(**flags))
    main(Args(**flags | dict(steps=3, run_dir="", resume=str(folder))))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("name, more, last", [("grpo", dict(steps=5), 5), ("dpo", dict(epochs=2), 8)])
def test_a_finished_run_goes_on_with_more_steps(name, more, last, tmp_path):
    """Flags given with --resume count; the others are the run's own, and a next --resume has them all."""
    changes = dict(lr_schedule="constant_with_warmup", eval_prompts=0)
    changes |= dict(pairs_per_step=4) if name == "dpo" else {}  # four whole steps per pass
    run(name, tmp_path / "run", **changes)
    command(name, resume=tmp_path / "run", save_every=1, keep_checkpoints=3, **more)
    run(name, tmp_path / "whole", **changes | more)
    flags = json.loads((tmp_path / "run/args.json").read_text())
    assert flags | more | dict(save_every=1, keep_checkpoints=3, resume="") == flags
    assert checkpoints(tmp_path / "run") == [f"checkpoint-{step}" for step in (last - 2, last - 1, last)]
    assert same_tensors(tmp_path / f"run/checkpoint-{last}", tmp_path / f"whole/checkpoint-{last}")


# --- other processes, signals and threads

def test_the_same_command_gives_the_same_weights_also_if_it_was_killed(tmp_path):
    """Bit for bit, with the default number of threads (two on a machine with one core), and in default folders of
    another working folder. The second run is killed after its first checkpoint, and resumed."""
    threads = None if (os.cpu_count() or 1) > 1 else "2"
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    argv = [sys.executable, ROOT / "grpo.py", "--steps", "3", "--save-every", "1", "--keep-checkpoints", "3",
            "--data", rows_of_data("grpo", tmp_path), "--prompts-per-step", "8", "--group-size", "8",
            "--max-new-tokens", "16", "--eval-prompts", "0", "--device", "cpu"]
    process(*argv, cwd=tmp_path, OMP_NUM_THREADS=threads)
    (whole,) = (tmp_path / "runs").iterdir()
    env = {name: value for name, value in (ENV | {"OMP_NUM_THREADS": threads}).items() if value}
    killed = subprocess.Popen([str(x) for x in argv], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    while not (found := [path for path in (tmp_path / "runs").glob("*/checkpoint-1") if path.parent != whole]):
        assert killed.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    folder = found[0].parent
    assert not (folder / "checkpoint-3").exists()
    process(*argv[:2], "--resume", folder.relative_to(tmp_path), cwd=tmp_path, OMP_NUM_THREADS=threads)
    assert all(same_tensors(folder / f"checkpoint-{step}", whole / f"checkpoint-{step}") for step in (1, 2, 3))
    assert without_times(read(folder / "metrics.jsonl")) == without_times(read(whole / "metrics.jsonl"))
    assert sorted((tmp_path / "runs").iterdir()) == sorted([whole, folder])


SLOW = """
import time
calls = []
def slow(completions, **columns):
    calls.append(completions)
    if len(calls) == 3:
        print("slow", flush=True)
        time.sleep(60)
    return [0.0] * len(completions)
"""


def test_ctrl_c_finishes_the_step_and_a_second_one_stops_at_once(tmp_path):
    """The reward takes a minute in the third step; nothing of that step is left."""
    (tmp_path / "slow.py").write_text(SLOW)
    folder = tmp_path / "run"
    flags = small_flags("grpo", folder, steps=50, eval_prompts=0, save_every=1, gold="",
                        reward=f"{tmp_path}/slow.py:slow")
    argv = [sys.executable, "grpo.py", *(str(x) for k, v in flags.items() for x in (f"--{k.replace('_', '-')}", v))]

    first = subprocess.Popen(argv, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    next(line for line in first.stdout if line.startswith("slow"))
    first.send_signal(signal.SIGINT)
    time.sleep(1)
    assert first.poll() is None  # it goes on with its step
    first.send_signal(signal.SIGINT)
    out, error = first.communicate(timeout=30)
    assert first.returncode == 130 and "stopped by Ctrl-C" in error and "Traceback" not in error
    assert checkpoints(folder) == ["checkpoint-2"] and read(folder / "metrics.jsonl")[-1]["step"] == 2

    command("grpo", resume=folder, reward="tiny/reward_model", steps=3)
    assert checkpoints(folder) == ["checkpoint-3"]  # one Ctrl-C alone: test_processes.py


@pytest.mark.parametrize("begun", [True, False])
def test_two_processes_never_write_to_one_run(begun, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    flags = dict(resume=tmp_path / "run", steps=2) if begun else small_flags("grpo", tmp_path / "run")
    if begun:
        run("grpo", tmp_path / "run", steps=1, eval_prompts=0)
    code = f"import fcntl; f = open('{tmp_path}/run/lock', 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        before = digests(tmp_path)
        error = fails(capsys, "grpo", **flags)
        other.communicate(b"\n")
    flag = "--resume" if begun else "--run-dir"
    assert error == f"{flag} {tmp_path}/run: another process is writing to this run" and digests(tmp_path) == before


# --- disks

def test_a_checkpoint_has_its_name_only_when_it_is_complete(tmp_path, monkeypatch):
    """A kill during a save then leaves the one before it, and nothing that could be taken for another."""
    seen = []

    def watch(owner, function):
        original = getattr(owner, function)

        def call(*args, **options):
            result = original(*args, **options)
            if (tmp_path / "run").is_dir():
                seen.append([name for name in checkpoints(tmp_path / "run") if not name.endswith(".part")])
            return result
        monkeypatch.setattr(owner, function, call)
    watch(torch.distributed.checkpoint, "save")  # the first part of a checkpoint
    watch(type(common.load_tokenizer("tiny/policy")), "save_pretrained")  # one of the last
    run("grpo", tmp_path / "run", steps=5, save_every=2, eval_prompts=0)
    last = [["checkpoint-4"]] * 2
    assert seen == [[], [], ["checkpoint-2"], ["checkpoint-2"], *last]  # saves of steps 2, 4, and the last


def test_a_save_that_fails_leaves_the_checkpoint_before_it(tmp_path, monkeypatch, capsys):
    save = torch.distributed.checkpoint.save

    def full(tensors, checkpoint_id, **options):
        save(tensors, checkpoint_id=checkpoint_id, **options)
        if "checkpoint-4" in str(checkpoint_id):
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch.distributed.checkpoint, "save", full)
    folder = tmp_path / "run"
    error = fails(capsys, "grpo", **small_flags("grpo", folder, **LONGER["grpo"] | dict(eval_prompts=0)))
    assert error.startswith(f"{folder}/checkpoint-4: not written: [Errno 28] No space left")
    assert checkpoints(folder) == ["checkpoint-2"]
    monkeypatch.setattr(torch.distributed.checkpoint, "save", save)
    command("grpo", resume=folder)
    assert checkpoints(folder) == ["checkpoint-5"]


def test_a_disk_without_room_is_found_before_training(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    error = fails(capsys, "grpo", **small_flags("grpo", tmp_path / "run"))
    assert "has 0.0 GiB free" in error and "--keep-checkpoints" in error
    assert not (tmp_path / "run/metrics.jsonl").exists()
    command("grpo", **small_flags("grpo", tmp_path / "other") | dict(steps=0))  # writes no checkpoint


def test_a_resumed_run_needs_room_for_its_next_checkpoint_only(tmp_path, monkeypatch, capsys):
    command("grpo", **small_flags("grpo", tmp_path / "run") | dict(steps=1))
    usage, size = shutil.disk_usage(tmp_path), 16 * sum(
        p.numel() for p in modeling.load_causal_lm("tiny/policy", "cpu").parameters())
    for free, enough in ((1.5, True), (0.5, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(free * size)))
        if enough:
            command("grpo", resume=tmp_path / "run", steps=2)
        else:
            assert "GiB free" in fails(capsys, "grpo", resume=tmp_path / "run", steps=3)


# --- numbers that are not finite

NORMS = {"grpo": 2, "ppo": 4}  # gradients per step: two updates, of one model or two


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_gradient_that_is_not_finite_stops_before_the_update(name, tmp_path, monkeypatch, capsys):
    """In step 3; the checkpoint of step 2 is what remains."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def spoil(*args):
        calls.append(args)
        return clip(*args) * (float("nan") if len(calls) > 2 * NORMS.get(name, 1) else 1)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
    error = fails(capsys, name, **small_flags(name, tmp_path / "run", **LONGER[name] | dict(eval_every=0), **(
        {} if name == "reward_model" else dict(eval_prompts=0))))
    assert error.startswith("step 3: the gradient is not finite") and "All rows have finite outputs" in error
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
    assert max(row["step"] for row in read(tmp_path / "run/metrics.jsonl")) == 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_row_to_blame_is_found(name, tmp_path, monkeypatch, capsys):
    """In training, the embedding of a word is nan: the one prompt that has it is named."""
    rows = [{"prompt": f"what is green and {color} ?", "chosen": "yes .", "rejected": "no ."}
            for color in ("white", "brown", "red", "black", "green")]  # the last one is held out
    word = common.load_tokenizer("tiny/policy").convert_tokens_to_ids("brown")
    loader = "load_scorer" if name == "reward_model" else "load_causal_lm"
    load = getattr(SCRIPTS[name], loader)

    def spoil(embeddings, args, output):
        return torch.where(embeddings.training & (args[0] == word)[..., None], float("nan"), output)

    def spoiled(*args):
        model = load(*args)
        model.get_input_embeddings().register_forward_hook(spoil)
        return model
    monkeypatch.setattr(SCRIPTS[name], loader, spoiled)
    flags = dict(prompts_per_step=4, eval_prompts=1) if name in ON_POLICY else dict(pairs_per_step=4, eval_pairs=1)
    flags |= dict(bias_prompts=0) if name == "reward_model" else dict(gold="")
    flags |= dict(sample_data="") if name == "dpo" else {}
    flags |= dict(data=write(tmp_path / "rows.jsonl", *rows))
    error = fails(capsys, name, **small_flags(name, tmp_path / "run", **flags))
    assert error.startswith("step 1: the gradient is not finite") and "'what is green and brown ?'" in error
    assert error.count("what is") == 1


def test_a_reward_model_that_is_not_finite_is_named(tmp_path, capsys):
    shutil.copytree("tiny/reward_model", tmp_path / "rm")
    weights = load_file(tmp_path / "rm/model.safetensors")
    weights["score.weight"] = weights["score.weight"] * float("nan")
    save_file(weights, tmp_path / "rm/model.safetensors", metadata={"format": "pt"})
    error = fails(capsys, "grpo", **small_flags("grpo", tmp_path / "run", reward=str(tmp_path / "rm")))
    assert error.startswith(f"{tmp_path}/rm: its score is not finite for the conversation that ends")


def test_weights_that_are_not_finite_end_the_run_in_one_line(tmp_path, capsys):
    run("grpo", tmp_path / "run", steps=1, eval_prompts=0)
    error = fails(capsys, "grpo", resume=tmp_path / "run", steps=4, lr=1e38, lr_schedule="constant_with_warmup")
    assert "not finite" in error


REWARD = """calls = 0
def reward(completions, **columns):
    global calls
    calls += 1
    if calls == {}: raise ValueError("no more")
    return [len(turns[-1]["content"]) for turns in completions]
"""


def test_a_run_that_fails_saves_what_it_has_trained(tmp_path, capsys):
    """Far from any checkpoint, and it then goes on as if nothing had happened."""
    flags = dict(steps=4, save_every=0, eval_every=0, eval_prompts=0, gold="")
    for name, call in (("whole", 99), ("fails", 4)):
        (tmp_path / f"{name}.py").write_text(REWARD.format(call))
        flags[name] = f"{tmp_path / name}.py:reward"
    whole, failing = flags.pop("whole"), flags.pop("fails")
    run("grpo", tmp_path / "whole", reward=whole, **flags)
    error = fails(capsys, "grpo", **small_flags("grpo", tmp_path / "run", reward=failing, **flags))
    assert "no more" in error and checkpoints(tmp_path / "run") == ["checkpoint-3"]
    command("grpo", resume=tmp_path / "run", reward=whole)
    assert same_tensors(tmp_path / "run/checkpoint-4", tmp_path / "whole/checkpoint-4")


def test_a_failure_within_an_update_saves_nothing(tmp_path, capsys, monkeypatch):
    """Its weights would be those of no step."""
    def fail(self, model):
        raise modeling.UserError("no more")
    monkeypatch.setattr(runtime.Run, "clip_grad_norm", fail)
    assert fails(capsys, "grpo", **small_flags("grpo", tmp_path / "run")) == "no more"
    assert checkpoints(tmp_path / "run") == []


def test_a_resumed_run_says_that_its_prompts_have_changed(tmp_path, capsys):
    """Other rows in a file as long as before, or a template that writes today's date."""
    rows = [{"prompt": f"what is {word} ?"} for word in "a cat dog sun moon tea france paris".split()]
    data = write(tmp_path / "rows.jsonl", *rows)
    run("grpo", tmp_path / "run", data=data, gold="", eval_prompts=0)
    for n, (changed, warns) in enumerate([(rows, False), (rows[:1] * 2 + rows[2:], True)], 3):
        write(tmp_path / "rows.jsonl", *changed)
        capsys.readouterr()
        command("grpo", resume=tmp_path / "run", steps=n)
        assert ("gives other prompts than when this run began" in capsys.readouterr().out) == warns
