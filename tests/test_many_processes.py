"""One process and two, on the CPU: the same gradients, the same runs to go on with."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import common

SCRIPTS = ["grpo", "ppo", "reinforce", "dpo", "reward_model"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
SMALL = ("--prompts-per-step 5 --group-size 4 --max-new-tokens 12 --generate-batch-size 8 --eval-every 2 --eval-prompts 5 "
         "--log-every 1 --device cpu").split()


def run(command: list, **changes) -> str:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, env=ENV | changes, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def gradients(tmp_path_factory) -> list[Path]:
    """The folders of tests/many_processes.py, run by one process and by two."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    run([sys.executable, "tests/many_processes.py", folders[0], *SCRIPTS])
    run([*TORCHRUN, "tests/many_processes.py", folders[1], *SCRIPTS])
    return folders


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_have_the_gradients_of_one(name, gradients):
    """Of every parameter, in every update; micro-batches, normalisers, whitening and the batch's spread
    are those of all completions."""
    one, two = (load_file(folder / f"{name}.safetensors") for folder in gradients)
    assert one.keys() == two.keys() and len(one) >= 38
    worst = max(((one[k] - two[k]).norm() / one[k].norm().clamp(min=1e-12)).item() for k in one)
    print(f"{name}: {len(one)} gradients, the worst relative difference {worst:.1e}")
    assert worst < 1e-5
    logs = [[json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
            for folder in gradients]
    for a, b in zip(*logs):
        for key in (k for k in a if "second" not in k):
            if key.endswith("accuracy") and name == "dpo":
                continue  # the policy is the reference, still (warm-up): rounding decides
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-4), key


def test_a_run_goes_on_with_other_numbers_of_processes(tmp_path):
    """Two processes, then one, then two; the first of two takes layer by layer to sample."""
    folder = tmp_path / "run"
    run([*TORCHRUN, "grpo.py", *SMALL, "--steps", "2", "--no-gather-to-sample", "--run-dir", folder])
    model, _ = common.load_model(AutoModelForCausalLM, str(folder / "checkpoint"), "cpu")
    start = load_file("tiny/policy/model.safetensors")
    moved = [not torch.equal(weight, start[name]) for name, weight in model.state_dict().items() if name in start]
    assert all(moved) and len(moved) == len(start)
    out = run([sys.executable, "grpo.py", "--resume", folder, "--steps", "3"])
    assert "step    3" in out and "step    2" not in out
    out = run([*TORCHRUN, "grpo.py", "--resume", folder, "--steps", "4"])
    assert out.count("step    4") == 1  # one process prints
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("to", ["all", "one"])
def test_ctrl_c_stops_all_processes_after_the_same_step(to, tmp_path):
    """Given to torchrun and its processes, as a terminal does, or to one of them alone."""
    process = subprocess.Popen([*map(str, TORCHRUN), "reinforce.py", *SMALL, "--steps", "1000", "--run-dir", str(tmp_path / "run")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env=ENV | {"PYTHONUNBUFFERED": "1"})
    for line in process.stdout:
        if line.startswith("step"):
            if to == "all":
                os.killpg(process.pid, signal.SIGINT)
            else:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                os.kill(int(children[-1]), signal.SIGINT)
            break
    out, error = process.communicate(timeout=60)
    assert "stopped by Ctrl-C after step" in out, error[-2000:]
    assert (tmp_path / "run/checkpoint/resume/state.json").is_file() and (to == "all" or process.returncode == 0)
