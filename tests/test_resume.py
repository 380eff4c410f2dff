"""Runs that were stopped and go on: Ctrl-C, a kill, a full disk, a step that is not finite."""
import fcntl
import gc
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import common
import dpo
import grpo
import ppo
import reinforce
import reward_model

SCRIPTS = {"grpo": grpo, "ppo": ppo, "reinforce": reinforce, "dpo": dpo, "reward_model": reward_model}
ONLINE = dict(steps=5, prompts_per_step=3, group_size=4, max_new_tokens=12, eval_prompts=4, eval_every=2, save_every=2,
              device="cpu")
ARGS = {
    "grpo": ONLINE | dict(minibatches=2), "ppo": ONLINE | dict(kl_target=0.5),
    "reinforce": ONLINE | dict(baseline="moving"),
    "dpo": dict(pairs_per_step=4, eval_pairs=4, eval_prompts=2, max_new_tokens=8, save_every=2, device="cpu"),
    "reward_model": dict(pairs_per_step=4, eval_pairs=4, bias_prompts=4, max_new_tokens=8, save_every=2, device="cpu")}


def run(name: str, tmp_path: Path, **changes):
    args = dict(ARGS[name])
    if name in ("dpo", "reward_model"):
        pairs = Path("tiny/preferences.jsonl").read_text().splitlines(True)[:24]
        (tmp_path / "pairs.jsonl").write_text("".join(pairs))
        args["data"] = str(tmp_path / "pairs.jsonl")
    if name == "dpo":
        args["reference_dir"] = str(tmp_path / "reference")
    SCRIPTS[name].main(SCRIPTS[name].Args(**args | changes))


def resume(name: str, folder: Path, monkeypatch, *flags: str):
    monkeypatch.setattr(sys, "argv", [name, "--resume", str(folder), *flags])
    common.command_line(SCRIPTS[name].main, SCRIPTS[name].Args, "")


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """What was logged, but for times."""
    return [{k: v for k, v in json.loads(line).items() if "second" not in k}
            for line in (folder / name).read_text().splitlines()]


def tensors(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def stops_at_step_3(monkeypatch):
    """Ctrl-C while the checkpoint of step 2 is written: step 3 is then the last."""
    def of(script):
        save_state = script.save_state

        def stop(folder, trained, state, *more):
            save_state(folder, trained, state, *more)
            if state["step"] == 2:
                signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(script, "save_state", stop)
    yield of
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_stopped_run_ends_as_one_that_was_not(name, tmp_path, monkeypatch, stops_at_step_3, capsys):
    """The same weights to the bit, the same metrics and samples; and half a line, or half a checkpoint, that
    a kill would have left, does no harm."""
    run(name, tmp_path, run_dir=str(tmp_path / "whole"))
    stops_at_step_3(SCRIPTS[name])
    run(name, tmp_path, run_dir=str(tmp_path / "run"))
    folder = tmp_path / "run"
    assert f"stopped by Ctrl-C after step 3; to go on: {name}.py --resume {folder}" in capsys.readouterr().out
    assert [path.name for path in folder.glob("checkpoint*")] == ["checkpoint"]  # --keep 1
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 4, "loss": 1.0}) + '\n{"step": 5, "lo')
    shutil.copytree(folder / "checkpoint", folder / "checkpoint-4.part")
    (folder / "checkpoint-4.part/resume/state.json").write_text("{")
    resume(name, folder, monkeypatch)
    whole, resumed = tensors(tmp_path / "whole/checkpoint"), tensors(folder / "checkpoint")
    assert whole.keys() == resumed.keys() and all(whole[k].equal(resumed[k]) for k in whole)
    bias = [json.loads((f / "checkpoint/config.json").read_text()).get("reward_bias") for f in (tmp_path / "whole", folder)]
    assert bias[0] == bias[1] and (bias[0] is not None) == (name == "reward_model")
    extra = [r for r in rows(folder) if r["step"] == 3 and "loss" not in r]  # dpo, reward_model evaluate when stopped
    assert [r for r in rows(folder) if r not in extra] == rows(tmp_path / "whole")
    if name not in ("dpo", "reward_model"):
        assert rows(folder, "samples.jsonl") == rows(tmp_path / "whole", "samples.jsonl")
    assert not list(folder.glob("*.part")) and [p.name for p in folder.glob("checkpoint*")] == ["checkpoint"]


@pytest.mark.parametrize("name", ["grpo", "reward_model"])  # the others save as grpo.py does
def test_a_checkpoint_has_its_name_only_when_it_is_whole(name, tmp_path, monkeypatch):
    """So that a kill during a save leaves the one before it, and nothing that could be taken for another."""
    seen = {}
    for function in ("save_model", "save_state"):
        def save(*args, original=getattr(SCRIPTS[name], function)):
            original(*args)
            names = sorted(p.name for p in (tmp_path / "run").glob("checkpoint*") if p.suffix != ".part")
            seen.setdefault(len(seen), names)
        monkeypatch.setattr(SCRIPTS[name], function, save)
    run(name, tmp_path, run_dir=str(tmp_path / "run"))
    before = [[], [], ["checkpoint-2"], ["checkpoint-2"], ["checkpoint-4"], ["checkpoint-4"]]
    assert list(seen.values()) == before  # twice a save: at step 2, 4, and the end


def test_more_steps_and_more_checkpoints_than_before(tmp_path, monkeypatch):
    """Flags given with --resume count, others are the run's own."""
    run("grpo", tmp_path, run_dir=str(tmp_path / "run"), steps=2, lr_schedule="constant", eval_every=0)
    resume("grpo", tmp_path / "run", monkeypatch, "--steps", "5", "--save-every", "1", "--keep", "3")
    run("grpo", tmp_path, run_dir=str(tmp_path / "whole"), lr_schedule="constant", eval_every=0)
    flags = json.loads((tmp_path / "run/args.json").read_text())  # a next --resume has them, too
    assert (flags["steps"], flags["save_every"], flags["keep"], flags["resume"]) == (5, 1, 3, "")
    folders = {p.name for p in (tmp_path / "run").glob("checkpoint*")}
    assert folders == {"checkpoint", "checkpoint-3", "checkpoint-4"}  # three, of which one is the end
    assert all(a.equal(b) for a, b in zip(tensors(tmp_path / "run/checkpoint").values(),
                                          tensors(tmp_path / "whole/checkpoint").values()))


def fails(main, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: "), error
    del stop  # its traceback would hold the run's lock
    gc.collect()
    return error


def test_two_processes_never_write_to_one_run(tmp_path, monkeypatch, capsys):
    run("grpo", tmp_path, run_dir=str(tmp_path / "run"), steps=1, eval_every=0)
    with open(tmp_path / "run/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = sorted(tmp_path.rglob("*"))
        error = fails(lambda: resume("grpo", tmp_path / "run", monkeypatch, "--steps", "2"), capsys)
    assert "another process is at work on this run" in error and sorted(tmp_path.rglob("*")) == before


def test_a_disk_without_room_is_found_before_training(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    error = fails(lambda: run("grpo", tmp_path, run_dir=str(tmp_path / "run")), capsys)
    assert "has 0.0 GiB free" in error and "--keep" in error
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["grpo", "reward_model"])
def test_a_save_that_fails_leaves_the_checkpoint_before_it(name, tmp_path, monkeypatch, capsys):
    save_model = SCRIPTS[name].save_model

    def full(model, config, tokenizer, folder):
        save_model(model, config, tokenizer, folder)
        if "checkpoint-4" in folder.name:
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(SCRIPTS[name], "save_model", full)
    error = fails(lambda: run(name, tmp_path, run_dir=str(tmp_path / "run")), capsys)
    assert "checkpoint-4: not written: [Errno 28] No space left" in error
    assert [p.name for p in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-2"]
    monkeypatch.setattr(SCRIPTS[name], "save_model", save_model)
    resume(name, tmp_path / "run", monkeypatch)
    assert (tmp_path / "run/checkpoint/model.safetensors").is_file()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_out_of_memory_says_which_flags_help(error, monkeypatch, capsys):
    def main(args):
        raise error
    monkeypatch.setattr(sys, "argv", ["grpo"])
    said = fails(lambda: common.command_line(main, grpo.Args, ""), capsys)
    assert all(flag in said for flag in ("--tokens-per-micro-batch", "--generate-batch-size", "--gradient-checkpointing"))


@pytest.mark.parametrize("words", ["a bug", "CUDA error: an illegal memory access was encountered"])
def test_other_errors_of_the_program_are_not_hidden(words, monkeypatch):
    def main(args):
        raise RuntimeError(words)
    monkeypatch.setattr(sys, "argv", ["grpo"])
    with pytest.raises(RuntimeError, match=words):
        common.command_line(main, grpo.Args, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_gradient_that_is_not_finite_stops_before_the_step(name, tmp_path, monkeypatch, capsys):
    """At step 3; the weights saved at step 2 are what is left."""
    clip, calls = SCRIPTS[name].clip_gradients, []
    norms = {"ppo": 4, "grpo": 2}.get(name, 1)  # two updates a step, of two models

    def spoil(model, most):
        calls.append(0)
        norm = clip(model, most)
        return norm * float("nan") if len(calls) > 2 * norms else norm
    monkeypatch.setattr(SCRIPTS[name], "clip_gradients", spoil)
    changes = {} if name in ("dpo", "reward_model") else {"eval_every": 0}
    error = fails(lambda: run(name, tmp_path, run_dir=str(tmp_path / "run"), **changes), capsys)
    assert error.startswith("error: step 3: the gradient is not finite, and the update was not made")
    assert "0 of its" in error  # no row is to blame
    assert [p.name for p in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-2"]
    assert max(r["step"] for r in rows(tmp_path / "run")) == 2


@pytest.mark.parametrize("name", ["grpo", "ppo", "reinforce"])
def test_the_prompt_to_blame_is_found(name, tmp_path, monkeypatch, capsys):
    """One row of the rollout has a log-prob that is nan, at the first update: its prompt alone is named."""
    script, bad = SCRIPTS[name], []
    logprobs, clip = script.completion_logprobs, script.clip_gradients

    def spoil(model, prompt_ids, prompt_mask, *rest):
        found, entropy = logprobs(model, prompt_ids, prompt_mask, *rest)
        prompts = [tuple(ids[m.bool()].tolist()) for ids, m in zip(prompt_ids, prompt_mask)]
        bad.extend(prompts[:1] if not bad else [])
        row = torch.tensor([prompt == bad[0] for prompt in prompts])[:, None]
        return torch.where(row, float("nan"), found), entropy
    monkeypatch.setattr(script, "completion_logprobs", spoil)
    monkeypatch.setattr(script, "clip_gradients", lambda *a: clip(*a) * float("nan"))  # the critic's may be finite
    error = fails(lambda: run(name, tmp_path, run_dir=str(tmp_path / "run"), eval_every=0), capsys)
    tokenizer = common.load_tokenizer("tiny/policy")
    prompts = [row["prompt"] for row in common.read_prompts("tiny/prompts.jsonl")]
    ids = common.encode(tokenizer, [common.render(tokenizer, prompt) for prompt in prompts])
    blamed = prompts[ids.index(list(bad[0]))]
    assert f"for 1 of its 3 rows: {str(blamed).strip()[:60]!r}. Try" in error


def test_the_rows_to_blame_are_named(capsys):
    error = fails(lambda: common.not_finite(7, ["what is a cat ?", "a", "b", "c"], 16), capsys)
    assert "step 7" in error and "4 of its 16 rows: 'what is a cat ?', 'a', 'b', ..." in error


def test_a_reward_model_that_is_not_finite_is_named(tmp_path, capsys):
    shutil.copytree("tiny/reward_model", tmp_path / "rm")
    weights = load_file(tmp_path / "rm/model.safetensors")
    weights["score.weight"] = weights["score.weight"] * float("nan")
    save_file(weights, tmp_path / "rm/model.safetensors", metadata={"format": "pt"})
    error = fails(lambda: run("grpo", tmp_path, run_dir=str(tmp_path / "run"), reward=str(tmp_path / "rm")), capsys)
    assert f"{tmp_path / 'rm'}: its score is not finite, for the conversation that ends" in error


def test_weights_that_are_not_finite_end_sampling_in_one_line(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    run("grpo", tmp_path, run_dir=str(folder), steps=1, eval_every=0)
    monkeypatch.setattr(sys, "argv", ["grpo", "--resume", str(folder), "--steps", "4", "--lr", "1e38", "--lr-schedule", "constant"])
    error = fails(lambda: common.command_line(grpo.main, grpo.Args, ""), capsys)
    assert "not finite" in error
