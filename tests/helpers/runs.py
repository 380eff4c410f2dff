"""What the tests of whole runs share: small runs of each script, in this process or in others."""
import functools
import gc
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dpo
import grpo
import ppo
import reinforce
import reward_model
import runtime
from flags import cli

logging.getLogger("torch.distributed.checkpoint").setLevel(logging.WARNING)
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)  # a line per tensor, which pytest would keep
ROOT = Path(__file__).parent.parent.parent

# What makes hundreds of small runs quicker and changes nothing that they do: `fails` collects garbage, but not that of
# all imported modules; git is asked for the commit once; files are not forced to the disk.
gc.collect()
gc.freeze()
runtime.versions = functools.cache(runtime.versions)
os.fsync = lambda file: None

SCRIPTS = {"grpo": grpo, "ppo": ppo, "reinforce": reinforce, "dpo": dpo, "reward_model": reward_model}
ON_POLICY = ("grpo", "ppo", "reinforce")
PAIRWISE = ("dpo", "reward_model")

GOLD = "tiny/world.py:gold_reward"
SMALL = {  # flags of a run that takes about a second; its data are `rows_of_data`
    "grpo": dict(steps=2, prompts_per_step=3, group_size=4, max_new_tokens=12, eval_prompts=4, gold=GOLD),
    "dpo": dict(pairs_per_step=8, eval_pairs=4, eval_prompts=2, max_new_tokens=8, warmup=0, gold=GOLD,
                sample_data="tiny/heldout.jsonl"),
    "reward_model": dict(pairs_per_step=8, eval_pairs=4, bias_prompts=4, max_new_tokens=8, warmup=0)}
SMALL["ppo"] = SMALL["reinforce"] = SMALL["grpo"]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, *rows) -> str:
    """A file of JSON lines; strings are written as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def rows_of_data(name: str, folder: Path) -> str:
    """A file with a few of the tiny world's prompts or pairs."""
    source, n = ("preferences", 20) if name in PAIRWISE else ("prompts", 24)
    if not (path := folder / f"{source}.jsonl").exists():
        with open(f"tiny/{source}.jsonl") as file:
            path.write_text("".join(line for line, _ in zip(file, range(n))))
    return str(path)


def small_flags(name: str, folder: Path, **changes) -> dict:
    """The flags of a small run in a folder, whose parent folder holds its data."""
    changes.setdefault("data", None) or changes.update(data=rows_of_data(name, folder.parent))
    return SMALL[name] | dict(run_dir=str(folder), log_every=1, device="cpu") | changes


def run(name: str, folder: Path, **changes) -> list[dict]:
    """Calls a script's main; returns the lines of metrics.jsonl."""
    try:
        SCRIPTS[name].main(SCRIPTS[name].Args(**small_flags(name, folder, **changes)))
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the run had put in its own
    return read(folder / "metrics.jsonl")


def steps_of(log: list[dict]) -> list[dict]:
    return [row for row in log if "loss" in row]


def evaluations_of(log: list[dict]) -> list[dict]:
    return [row for row in log if "loss" not in row]


def without_times(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def command(name: str, *argv, **flags):
    """Calls a script as its command line does, with flags as strings or by keyword."""
    before = sys.argv
    for flag, value in flags.items():
        flag = flag.replace("_", "-")
        argv += (f"--{flag if value else f'no-{flag}'}",) if isinstance(value, bool) else (f"--{flag}", value)
    try:
        sys.argv = [f"{name}.py", *map(str, argv)]
        cli(SCRIPTS[name].main, SCRIPTS[name].Args, SCRIPTS[name].__doc__)
    finally:
        sys.argv = before
        signal.signal(signal.SIGINT, signal.default_int_handler)


def fails(capsys, name: str, *argv, **flags) -> str:
    """The message of a command that ends in one line on stderr and exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(name, *argv, **flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: "), error
    del stop  # its traceback would keep the run's lock
    gc.collect()
    return error.removeprefix("error: ").rstrip("\n")


def checkpoints(folder: Path) -> list[str]:
    """Names of everything in a run folder that looks like a checkpoint, the oldest first."""
    return sorted((path.name for path in folder.glob("checkpoint*")), key=lambda name: (len(name), name))


def last_checkpoint(folder: Path) -> Path:
    return folder / checkpoints(folder)[-1]


def tensors(model: Path | str) -> dict:
    return load_file(Path(model) / "model.safetensors")


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two model folders have the same weights, bit for bit."""
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def weights(model: Path | str) -> torch.Tensor:
    """All weights of a model folder in one vector."""
    return torch.cat([weight.flatten() for _, weight in sorted(tensors(model).items())])


# --- processes

ENV = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ENV |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def process(*argv, cwd: Path = ROOT, code: int = 0, **env) -> subprocess.CompletedProcess:
    """Runs a command that must end with this exit code. A variable of None is taken away."""
    env = {name: value for name, value in (ENV | env).items() if value is not None}
    done = subprocess.run([str(x) for x in argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stdout[-1000:] + done.stderr[-3000:]
    return done
