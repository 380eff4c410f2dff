"""Runs of the unlucky, the careless and the hostile: nothing is lost, trained wrongly, or run that was not asked for."""
import copy
import dataclasses
import functools
import gc
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import common
import grpo
import runtime
from checkpoints import MetadataOnly, checksums
from flags import RunArgs, Shown, json_lines
from helpers.runs import ROOT, checkpoints, command, fails, process, read, run, small_flags, steps_of

ONE = dict(steps=1, eval_prompts=0, gold="")


def reward_file(tmp_path, body: str) -> str:
    (tmp_path / "reward.py").write_text(body)
    return f"{tmp_path}/reward.py:reward"


# --- reward functions

@pytest.mark.parametrize("body, words", [
    ("import sys\ndef reward(completions, **columns): sys.exit()", "raised SystemExit"),
    ("import sys; sys.exit(0)", "cannot be imported: SystemExit"),
    ("def reward(completions, **columns): return {c: 1 for c in range(len(completions))}", "must return a list"),
    ("import torch\ndef reward(completions, **columns): return torch.zeros(len(completions), 2)", "must return a list"),
    ("import asyncio\nasync def reward(**columns): raise asyncio.CancelledError()", "raised CancelledError"),
    ("def reward(**columns): raise GeneratorExit()", "raised GeneratorExit"),
    ("class E(Exception):\n    def __str__(self): 1 / 0\ndef reward(**columns): raise E()", "raised E"),
    ("def reward(completions): return []", "expected: function(prompts, completions, **columns)")])
def test_what_a_reward_function_does_ends_in_one_line(body, words, tmp_path, capsys):
    error = fails(capsys, "grpo", **small_flags("grpo", tmp_path / "run", reward=reward_file(tmp_path, body), **ONE))
    assert words in error and checkpoints(tmp_path / "run") == []


def test_what_a_reward_function_changes_stays_in_it(tmp_path):
    reward = common.load_reward(reward_file(tmp_path, """
import os, torch
def reward(prompts, completions, **columns):
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    prompts.clear(), columns["answer"][0].append("gone")
    return [1.0] * len(completions)
"""), "cpu")
    rows = [{"prompt": "a", "answer": ["b"]}, {"prompt": "c", "answer": ["d"]}]
    assert reward(rows, ["x", "y"]).tolist() == [1, 1]
    assert torch.get_default_device().type == "cpu" and not torch.overrides._get_current_function_mode_stack()
    assert os.getcwd() == str(ROOT) and torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert rows == [{"prompt": "a", "answer": ["b"]}, {"prompt": "c", "answer": ["d"]}]


def test_from_python_a_run_is_returned_and_resumed_with_its_flags(tmp_path):
    """Args(resume=...) takes that run's flags, except for those given, also where those are the defaults."""
    folder, metrics = grpo.main(grpo.Args(**small_flags("grpo", tmp_path / "run", lr=1e-3, beta=0.1)))
    log = read(folder / "metrics.jsonl")
    assert folder == tmp_path / "run" and metrics == log[-2] | log[-1] and {"loss", "eval_gold"} <= metrics.keys()
    args = grpo.Args(resume=str(folder), steps=3, beta=0.04)
    assert (args.lr, args.beta, args.steps, args.group_size) == (1e-3, 0.04, 3, 4)
    assert copy.copy(args) == args == dataclasses.replace(args) and set(vars(args)) == set(vars(copy.copy(args)))
    again, metrics = grpo.main(args)
    assert again == folder and metrics["step"] == 3


def test_a_checkpoint_may_leave_out_what_resume_needs(tmp_path, capsys):
    """A quarter of the bytes or less; the model is the same, and --resume says why it cannot."""
    sizes = []
    for resumable in (True, False):
        folder = tmp_path / f"run-{resumable}"
        run("ppo", folder, resumable=resumable, **ONE)
        files = list((folder / checkpoints(folder)[-1]).rglob("*"))
        sizes.append(sum(path.stat().st_size for path in files))
        assert any(path.name == "resume" for path in files) == resumable
    assert sizes[1] < 0.3 * sizes[0]
    both = [tmp_path / f"run-{resumable}" for resumable in (True, False)]
    weights = [(folder / checkpoints(folder)[-1] / "model.safetensors").read_bytes() for folder in both]
    assert weights[0] == weights[1]
    capsys.readouterr()
    error = fails(capsys, "ppo", resume=both[1])
    assert error == f"--resume {both[1]}: {both[1] / checkpoints(both[1])[-1]} was saved with --no-resumable"


def test_dpo_measures_the_kl_at_the_temperature_that_it_trains_at(tmp_path):
    run("dpo", tmp_path / "run", lr=3e-3, eval_prompts=0)
    flags = dict(model=str(tmp_path / "run" / checkpoints(tmp_path / "run")[-1]), reference="tiny/policy", epochs=0,
                 eval_prompts=8)
    (one,), (half,) = (run("dpo", tmp_path / f"at-{t}", temperature=t, **flags) for t in (1.0, 0.5))
    assert half["eval_kl"] == one["eval_kl"] > 0.01 and half["eval_gold"] != one["eval_gold"]


def test_a_win_rate_by_the_trained_reward_says_so(tmp_path, capsys):
    run("grpo", tmp_path / "run", gold="")
    assert "eval_win_rate_by_reward 0.5 (" in capsys.readouterr().out
    assert not any("eval_win_rate" in row for row in read(tmp_path / "run/metrics.jsonl"))


def test_from_python_a_reward_is_a_function_and_ctrl_c_is_given_back(tmp_path):
    def short(completions, **columns):
        return [-len(turns[-1]["content"]) for turns in completions]
    before = signal.getsignal(signal.SIGINT)
    for name in ("one", "two"):
        grpo.main(grpo.Args(**small_flags("grpo", tmp_path / name, reward=short, **ONE)))
        assert json.loads((tmp_path / name / "args.json").read_text())["reward"] == ["<short>"]
        assert signal.getsignal(signal.SIGINT) == before
    with pytest.raises(common.UserError, match="--loss-type: must be one of grpo, dapo"):
        grpo.Args(loss_type="gpro")


# --- flags

def test_gradients_are_not_clipped_with_0(tmp_path):
    plain, other = (steps_of(run("grpo", tmp_path / str(norm), max_grad_norm=norm, **ONE))[0] for norm in (0.0, 1e9))
    assert plain["grad_norm"] == other["grad_norm"] > 0
    with pytest.raises(common.UserError, match="--max-grad-norm: must be at least 0"):
        RunArgs(max_grad_norm=-1.0)


def test_a_real_model_needs_a_learning_rate_of_its_own(tmp_path, monkeypatch, capsys):
    """The default fits 0.8 M parameters; it would make gibberish of 135 M."""
    monkeypatch.setattr("transformers.PreTrainedModel.num_parameters", lambda *args, **kwargs: 135_000_000)
    flags = small_flags("grpo", tmp_path / "run", dtype="float32", **ONE)
    assert fails(capsys, "grpo", **flags).startswith("--lr: the default, 0.0004, is for the tiny model: set one for 135 M")
    command("grpo", **flags, lr=1e-6)
    flags = small_flags("ppo", tmp_path / "ppo", dtype="float32", **ONE) | dict(lr=1e-6)
    assert fails(capsys, "ppo", **flags).startswith("--critic-lr: the default is for the tiny model: set one")
    command("ppo", **flags, critic_lr=1e-5)


# --- checkpoints

@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robust") / "run"
    run("grpo", folder, **ONE)
    return folder


@pytest.fixture
def damaged(a_run, tmp_path):
    """A copy of a run, to damage."""
    subprocess.run(["cp", "-r", a_run, tmp_path / "run"], check=True)
    return tmp_path / "run"


def test_a_flipped_bit_is_found(damaged, capsys):
    (shard,) = (damaged / "checkpoint-1/resume").glob("*.distcp")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert "a file has changed since it was written" in fails(capsys, "grpo", resume=damaged, steps=2)


def test_a_checkpoints_index_runs_nothing(damaged, tmp_path, capsys):
    """torch.distributed.checkpoint reads it as a pickle."""
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    folder = damaged / "checkpoint-1/resume"
    (folder / ".metadata").write_bytes(pickle.dumps(Attack()))
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"checksums": checksums(folder)}))
    assert ".metadata would run posix.system" in fails(capsys, "grpo", resume=damaged, steps=2)
    assert not (tmp_path / "ran").exists()
    for name in ("os.system", "os"):
        with pytest.raises((common.UserError, AttributeError)):
            found = MetadataOnly(io.BytesIO()).find_class("torch.distributed.checkpoint.filesystem", name)
            assert not callable(found)
            raise AttributeError


def test_a_checkpoints_index_names_no_pickled_object_and_no_function(damaged, tmp_path, capsys):
    """dcp.load would unpickle an object that the index says was saved as bytes."""
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    folder = damaged / "checkpoint-1/resume"
    tensors = dict.fromkeys(keys_of(folder), Attack())
    state = json.loads((folder / "state.json").read_text())
    for path in folder.iterdir():
        path.unlink()
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    (folder / "state.json").write_text(json.dumps(state | {"checksums": checksums(folder)}))
    assert "BytesStorageMetadata" in fails(capsys, "grpo", resume=damaged, steps=2)
    assert not (tmp_path / "ran").exists()
    for module, name in (("format_utils", "dcp_to_torch_save"), ("state_dict_loader", "load")):
        with pytest.raises(common.UserError):
            MetadataOnly(io.BytesIO()).find_class(f"torch.distributed.checkpoint.{module}", name)


def keys_of(folder) -> list[str]:
    return list(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)


@pytest.mark.parametrize("file, text, words", [
    ("metrics.jsonl", b"\xff\n", "has a line that no run has written"),
    ("baseline.jsonl", "{oops\n", "has a line that no run has written"),
    ("baseline.jsonl", "[1]\n", "has a line that no run has written"),
    ("args.json", {"steps": "3"}, "--steps: must be a whole number, not '3'"),
    ("args.json", {"lr": None}, "--lr: must be a number, not None"),
    ("args.json", {"data": {}}, "--data: must be text, not {}"),
    ("checkpoint-1/resume/state.json", {"step": "1"}, "'1' is no number of steps"),
    ("checkpoint-1/resume/state.json", {"step": -3}, "-3 is no number of steps"),
    ("checkpoint-1/resume/state.json", {"updates": {"policy": 10**12}}, "is no number of steps"),
    ("metrics.jsonl", "\n", "has a line that no run has written"),
    ("metrics.jsonl", "[1]\n", "has a line that no run has written"),
    ("args.json", "[]", "it holds no JSON object"),
    ("args.json", "[" * 100_000, "cannot be read"),
    ("checkpoint-1/resume/state.json", "3", "it holds no JSON object")])
def test_foreign_files_in_a_run(file, text, words, damaged, capsys):
    path = damaged / file
    if isinstance(text, dict):  # some values of what is there
        text = json.dumps(json.loads(path.read_text()) | text)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    more = {} if file == "args.json" else dict(steps=2)
    assert words in fails(capsys, "grpo", resume=damaged, **more)


def test_resume_names_one_folder_and_writes_to_it(damaged, tmp_path, capsys):
    """Of two the last counts, with its own flags; an unset variable in a script starts no new run."""
    assert "--resume: names no run folder" in fails(capsys, "grpo", "--resume", "", "--steps", 2)
    assert "--resume: names no run folder" in fails(capsys, "grpo", "--resume=", "--steps", 2)
    assert "--run-dir: not with --resume" in fails(capsys, "grpo", resume=damaged, run_dir=tmp_path / "new", steps=2)
    assert checkpoints(damaged) == ["checkpoint-1"] and not (tmp_path / "new").exists()
    run("grpo", tmp_path / "other", lr=1e-5, **ONE)
    command("grpo", "--resume", damaged, "--resume", tmp_path / "other", "--steps", 2)
    flags = json.loads((tmp_path / "other/args.json").read_text())
    assert (flags["lr"], flags["steps"]) == (1e-5, 2) and checkpoints(damaged) == ["checkpoint-1"]


def test_ppos_beta_given_now_replaces_the_runs(tmp_path):
    flags = dict(kl_target=6.0, kl_horizon=100, eval_prompts=0, lr_schedule="constant_with_warmup")
    run("ppo", tmp_path / "run", beta=0.05, **flags)
    log = read(tmp_path / "run/metrics.jsonl")
    command("ppo", resume=tmp_path / "run", steps=3, beta=5)
    later = read(tmp_path / "run/metrics.jsonl")[-1]["beta"]
    assert log[1]["beta"] < 0.05 and later == pytest.approx(100 * log[1]["beta"] * (1 - 0.2 * 12 / 100), rel=1e-3)


def test_a_second_process_that_was_slower_finds_the_first_ones_run(tmp_path):
    """Both have looked for the folder before either made it."""
    late = runtime.Run(grpo.Args(**small_flags("grpo", tmp_path / "run")), "grpo.py")
    run("grpo", tmp_path / "run", **ONE)
    before = (tmp_path / "run/args.json").read_bytes()
    with pytest.raises(common.UserError, match="--run-dir: .* exists"):
        late.resume(None)
    assert (tmp_path / "run/args.json").read_bytes() == before


def test_a_run_that_is_freed_late_takes_nothing_from_the_next(tmp_path):
    """In a notebook an exception keeps a failed run. When it goes, the resumed one keeps its lock and its Ctrl-C."""
    before = signal.getsignal(signal.SIGINT)
    args = grpo.Args(**small_flags("grpo", tmp_path / "run"))
    runs = [runtime.Run(args, "grpo.py")]
    runs[0].resume(None)
    runs.append(runtime.Run(args, "grpo.py"))
    runs[1].resume(None)
    handler = signal.getsignal(signal.SIGINT)
    del runs[0]
    gc.collect()
    code = f"import fcntl; fcntl.lockf(open({str(tmp_path / 'run/lock')!r}, 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    assert signal.getsignal(signal.SIGINT) is handler != before
    assert "BlockingIOError" in process(sys.executable, "-c", code, code=1).stderr
    runs.clear()
    gc.collect()
    process(sys.executable, "-c", code)
    signal.signal(signal.SIGINT, before)


def test_a_terminal_that_has_gone_away_ends_no_run():
    """Nor does one that was never there: test_scripts.test_a_copied_file_runs_in_an_empty_folder."""
    class Gone(io.StringIO):
        def reconfigure(self, **_):
            pass

        def write(self, text):
            raise OSError(5, "Input/output error")
        flush = write
    shown = Shown(Gone())
    for _ in range(2):
        print("a line", file=shown, flush=True)


def test_a_coroutine_keeps_no_stopped_run_alive():
    async def reward():
        return threading.current_thread().daemon
    assert common.run_coroutine(reward())


@pytest.mark.parametrize("changes, words", [
    (dict(steps="10"), "--steps: must be a whole number, not '10'"), (dict(steps=2.5), "--steps: must be a whole"),
    (dict(steps=True), "--steps: must be a whole number"), (dict(lr="1e-4"), "--lr: must be a number, not '1e-4'"),
    (dict(lora_rank=None), "--lora-rank: must be a whole number, not None"), (dict(model=3), "--model: must be text")])
def test_from_python_types_are_checked(changes, words):
    with pytest.raises(common.UserError, match=words):
        grpo.Args(**changes)


def test_from_python_folders_are_paths_and_rewards_any_function(tmp_path):
    def by(weight, completions, **columns):
        return [weight * len(turns) for turns in completions]
    flags = small_flags("grpo", tmp_path / "run", reward=functools.partial(by, 2.0), **ONE)
    folder, _ = grpo.main(grpo.Args(**flags | dict(run_dir=tmp_path / "run", lr=np.float64(0.001), beta=0)))
    assert "functools.partial" in json.loads((folder / "args.json").read_text())["reward"][0]


def test_a_function_of_a_program_has_to_be_passed_again(tmp_path, capsys):
    def short(completions, **columns):
        return [-len(turns[-1]["content"]) for turns in completions]
    folder, _ = grpo.main(grpo.Args(**small_flags("grpo", tmp_path / "run", reward=short, **ONE)))
    words = "<short>: the program that began this run had passed this function: pass it again"
    assert fails(capsys, "grpo", resume=folder, steps=2) == words
    grpo.main(grpo.Args(resume=folder, steps=2, reward=short))
    assert checkpoints(folder) == ["checkpoint-2"]


def test_a_gold_function_of_pairs_gets_the_columns_of_the_data(tmp_path):
    (tmp_path / "gold.py").write_text(
        "def gold(prompts, completions, chosen, rejected, kind):\n    return [float(len(x)) for x in chosen]")
    rows = [{"prompt": f"what is {w} ?", "chosen": "yes .", "rejected": "no .", "kind": "a"} for w in "a b c d e".split()]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = run("dpo", tmp_path / "run", data=f"{tmp_path}/pairs.jsonl", eval_pairs=2, eval_prompts=2,
              gold=f"{tmp_path}/gold.py:gold", epochs=0, sample_data="")
    assert log[0]["eval_gold"] == 5


def test_the_checkpoint_just_written_stays_beside_one_with_a_higher_number(tmp_path):
    def reward(completions, **columns):
        (tmp_path / "run/checkpoint-99").mkdir(exist_ok=True)  # a copy that somebody keeps there
        return [float(len(turns[-1]["content"])) for turns in completions]
    grpo.main(grpo.Args(**small_flags("grpo", tmp_path / "run", reward=reward, **ONE) | dict(steps=2, save_every=1)))
    assert "checkpoint-2" in checkpoints(tmp_path / "run")
    assert "checkpoint-1" not in checkpoints(tmp_path / "run")


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_checkpoints_are_kept(keep, tmp_path):
    run("grpo", tmp_path / "run", **ONE | dict(steps=4, save_every=1, keep_checkpoints=keep))
    assert checkpoints(tmp_path / "run") == [f"checkpoint-{step}" for step in (1, 2, 3, 4)[-keep:]]


def test_a_full_disk_is_named(damaged, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    monkeypatch.setattr(dcp, "save", full)
    error = fails(capsys, "grpo", resume=damaged, steps=2)
    assert error == f"{damaged}/checkpoint-2: not written: the disk is full (earlier checkpoints are untouched)"
    assert checkpoints(damaged) == ["checkpoint-1"]


def test_a_warmup_of_the_critic_as_long_as_the_run_is_said(tmp_path, capsys):
    for steps, said in ((1, True), (2, False)):
        run("ppo", tmp_path / f"run-{steps}", **ONE | dict(steps=steps, critic_warmup=1))
        assert ("the policy will not be trained" in capsys.readouterr().out) == said


def test_weights_that_are_not_finite_replace_no_checkpoint(damaged, capsys, monkeypatch):
    step = torch.optim.AdamW.step

    def broken(self, *args):
        step(self, *args)
        self.param_groups[0]["params"][0].data[0, 0] = float("nan")
    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    assert "the weights are not finite" in fails(capsys, "grpo", resume=damaged, steps=2)
    assert checkpoints(damaged) == ["checkpoint-1"]


def test_a_lock_is_not_inherited(tmp_path):
    """By workers that a reward function starts: they may outlive their run."""
    before = signal.getsignal(signal.SIGINT)
    args = grpo.Args(**small_flags("grpo", tmp_path / "run"))
    first = runtime.Run(args, "grpo.py")
    first.resume(None)
    if (worker := os.fork()) == 0:
        time.sleep(60)
        os._exit(0)
    try:
        del first
        gc.collect()
        second = runtime.Run(args, "grpo.py")
        second.resume(None)  # it is not refused
        assert os.waitpid(worker, os.WNOHANG) == (0, 0)  # the worker is still there
        del second
        gc.collect()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        signal.signal(signal.SIGINT, before)


def test_a_run_that_made_no_step_does_not_block_its_name(tmp_path, capsys):
    bad = reward_file(tmp_path, "def reward(completions, **columns): return []")
    flags = small_flags("grpo", tmp_path / "run", **ONE)
    fails(capsys, "grpo", **flags | dict(reward=bad))
    assert (tmp_path / "run/args.json").exists()
    command("grpo", **flags)
    assert fails(capsys, "grpo", **flags).startswith("--run-dir:")


# --- what is shown and written

def test_a_terminal_that_lacks_a_letter_and_a_pipe_that_closes_end_no_run(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(
        json.dumps({"prompt": f"qu'est-ce qu'un caf\u00e9 {i} ?"}) + "\n" for i in range(8)))
    shell = (f"{sys.executable} grpo.py --data {tmp_path}/rows.jsonl --steps 2 --prompts-per-step 2 --group-size 2"
             f" --eval-prompts 2 --log-every 1 --run-dir {tmp_path}/run | head -n 6")
    done = process("bash", "-c", shell, PYTHONIOENCODING="ascii")
    assert done.stdout.count("\n") == 6 and "caf? " in done.stdout
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"] and len(read(tmp_path / "run/metrics.jsonl")) == 4


def test_metrics_are_json_always():
    text = json_lines([{"a": float("nan"), "b": float("inf"), "c": 1.5, "d": "x"}])
    assert text == '{"c": 1.5, "d": "x"}\n'


def test_a_name_that_is_too_long(tmp_path, capsys):
    assert "File name too long" in fails(capsys, "grpo", **small_flags("grpo", tmp_path / "run", **ONE) | dict(
        run_dir=str(tmp_path / ("n" * 300))))
