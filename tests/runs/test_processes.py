"""One process and two, on the CPU: the same gradients, and one run's folder."""
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import modeling
import runtime
from helpers.repo import load
from helpers.runs import (ENV, ON_POLICY, ROOT, SCRIPTS, TORCHRUN, checkpoints, command, evaluations_of, process, read,
                          steps_of, tensors)

CASES = [*SCRIPTS, "grpo-checkpointing", "grpo-bfloat16"]
SMALL = ("--prompts-per-step 6 --group-size 4 --max-new-tokens 12 --generate-batch-size 8 --eval-every 2 "
         "--eval-prompts 5 --log-every 1 --device cpu").split()


@pytest.fixture(scope="module")
def gradients(tmp_path_factory) -> list[Path]:
    """The folders of gradients.py, run by one process (this one) and by two."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    with pytest.MonkeyPatch.context() as patch:
        for owner, function in [*((SCRIPTS[name], "generate") for name in ON_POLICY), (runtime.Run, "clip_grad_norm")]:
            patch.setattr(owner, function, getattr(owner, function))  # gradients.py replaces them
        patch.chdir(ROOT)
        load("tests/runs/gradients.py").main(folders[0], CASES)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process(*TORCHRUN, "tests/runs/gradients.py", folders[1], *CASES)
    return folders


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_gradients_of_one(name, gradients):
    """Of every parameter, in every update, for the same completions: micro-batches, normalizers, whitening and the
    batch's std are those of all completions."""
    one, two = (load_file(folder / f"{name}.safetensors") for folder in gradients)
    assert one.keys() == two.keys() and len(one) >= 38
    worst = max(((one[k] - two[k]).norm() / one[k].norm().clamp(min=1e-12)).item() for k in one)
    print(f"{name}: {len(one)} gradients, the largest relative difference {worst:.1e}")
    assert worst < (0.1 if name == "grpo-bfloat16" else 1e-5)  # matrices in bfloat16 have 8 bits
    for a, b in zip(*(read(folder / name / "metrics.jsonl") for folder in gradients), strict=True):
        assert a.keys() == b.keys()
        for key in (key for key in a if "seconds" not in key):
            if name != "grpo-bfloat16" and not (name == "dpo" and key.endswith("accuracy") and a["step"] < 2):
                # dpo's policy is the reference still, and rounding decides which answer is ahead
                assert a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-4), key


LATE = """
import os, runpy, sys, time
sys.path.insert(0, {root!r})
if os.environ["RANK"] == "1":  # a clock that is wrong as well, since the folder's name has the time
    time.sleep(2)
    strftime = time.strftime
    time.strftime = lambda form, *when: strftime(form, *(when or [time.localtime(time.time() + 2)]))
runpy.run_path({root!r} + "/grpo.py", run_name="__main__")
"""


def start(*argv, cwd=ROOT) -> subprocess.Popen:
    return subprocess.Popen([str(x) for x in argv], cwd=cwd, env=ENV, start_new_session=True, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_one_run_folder_that_other_numbers_of_processes_resume(tmp_path, monkeypatch):
    """Two processes, one of them two seconds late, without --run-dir, until Ctrl-C in a terminal, which is sent to
    torchrun and to both; then one process; then two, of which one gets Ctrl-C: both stop after the same step."""
    (tmp_path / "late.py").write_text(LATE.format(root=str(ROOT)))
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    monkeypatch.chdir(tmp_path)
    running = start(*TORCHRUN, "late.py", *SMALL, "--steps", "1000", cwd=tmp_path)
    next(line for line in running.stdout if line.startswith("step    2  reward"))
    os.killpg(running.pid, signal.SIGINT)
    out, error = running.communicate(timeout=100)
    (folder,) = (tmp_path / "runs").iterdir()
    log = read(folder / "metrics.jsonl")
    n = log[-1]["step"]
    assert f"stopped after step {n}; to continue: --resume" in out and n < 1000, error[-2000:]
    assert {path.name for path in folder.iterdir()} == {
        "args.json", "metrics.jsonl", "samples.jsonl", "baseline.jsonl", "lock", f"checkpoint-{n}"}
    assert json.loads((folder / "args.json").read_text())["ran_with"]["processes"] == 2
    assert len(read(folder / "samples.jsonl")) == len(evaluations_of(log)) * 5
    assert len(read(folder / "baseline.jsonl")) == 5
    model, before = modeling.load_causal_lm(str(folder / f"checkpoint-{n}"), "cpu"), tensors("tiny/policy")
    moved = [not torch.equal(weight, before[name]) for name, weight in model.state_dict().items() if name in before]
    assert all(moved) and len(moved) == len(before)

    command("grpo", resume=folder, steps=n + 1)
    assert [row["step"] for row in steps_of(read(folder / "metrics.jsonl"))] == [*range(1, n + 2)]

    running = start(*TORCHRUN, ROOT / "grpo.py", "--resume", folder, "--steps", "1000", cwd=tmp_path)
    shown = [next(line for line in running.stdout if line.startswith(f"step {n + 2:4}  reward"))]
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGINT)
    out, error = running.communicate(timeout=100)
    log, shown = read(folder / "metrics.jsonl"), shown + out.splitlines()
    last = log[-1]["step"]
    assert running.returncode == 0 and f"stopped after step {last}; to continue: --resume" in out, error[-2000:]
    assert [row["step"] for row in steps_of(log)] == [*range(1, last + 1)] and last < 1000
    assert [row["step"] for row in evaluations_of(log)] == sorted({0, *range(2, last, 2), n, n + 1, last})
    assert sum("  reward " in line for line in shown) == last - (n + 1)  # one process prints
    assert list((tmp_path / "runs").iterdir()) == [folder] and checkpoints(folder) == [f"checkpoint-{last}"]
