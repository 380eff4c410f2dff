"""Kills the five scripts (SIGKILL) at random moments, saves included, and goes on with --resume:

    python benchmarks/kills.py                  # 25 kills, five of each script
    python benchmarks/kills.py --kills 5 --scripts grpo

A run that is never stopped says what the weights are to be. Printed of each kill: the step whose
metrics were written last, the newest checkpoint's, and whether a save was under way; at the end, how
many runs came to the same weights bit for bit, and how many kills lost more than --save-every steps.
"""
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
ONLINE = ("--steps 80 --prompts-per-step 3 --group-size 4 --max-new-tokens 16 --eval-every 0 "
          "--save-every 3 --log-every 1").split()
FLAGS = {
    "grpo": ONLINE + ["--minibatches", "2"], "ppo": ONLINE + ["--kl-target", "1"],
    "reinforce": ONLINE + ["--baseline", "moving"],
    "dpo": "--eval-pairs 8 --eval-prompts 2 --pairs-per-step 4 --save-every 3 --log-every 1".split(),
    "reward_model": "--eval-pairs 8 --pairs-per-step 4 --bias-prompts 8 --save-every 3 --log-every 1".split()}


@dataclass
class Args:
    kills: int = 25
    scripts: tuple[str, ...] = tuple(FLAGS)
    seed: int = 0


def start(name: str, folder: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, ROOT / f"{name}.py", *flags], cwd=ROOT, stdout=subprocess.DEVNULL,
                            stderr=open(folder / f"{name}.err", "w"), start_new_session=True)


def finish(name: str, folder: Path, *flags: str):
    process = start(name, folder, *flags)
    if process.wait():
        sys.exit(f"{name}: exit code {process.returncode}: {(folder / f'{name}.err').read_text()}")


def last_step(run: Path) -> int:
    """Of the metrics that are whole."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(True) if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def newest(run: Path) -> int:
    steps = [int(path.name.split("-")[1]) for path in run.glob("checkpoint-*[0-9]")]
    return last_step(run) if (run / "checkpoint").is_dir() else max(steps, default=0)


def main(args: Args):
    random.seed(args.seed)
    same = lost = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        pairs = (ROOT / "tiny/preferences.jsonl").read_text().splitlines(True)[:320]
        (folder / "pairs.jsonl").write_text("".join(pairs))
        whole = {}
        for name in args.scripts:
            flags = FLAGS[name] + (["--data", str(folder / "pairs.jsonl")] if name in ("dpo", "reward_model") else [])
            if name == "dpo":
                flags += ["--reference-dir", str(folder / "reference")]
            finish(name, folder, *flags, "--run-dir", str(folder / name))
            whole[name] = load_file(folder / name / "checkpoint/model.safetensors")
            whole[name, "flags"] = flags
            print(f"{name}: {last_step(folder / name)} steps in one go", flush=True)
        kill = 0
        while kill < args.kills:
            name = args.scripts[kill % len(args.scripts)]
            run = folder / f"{name}-{kill}"
            process = start(name, folder, *whole[name, "flags"], "--run-dir", str(run))
            while not newest(run) and process.poll() is None:
                time.sleep(0.01)
            at_save = kill % 2 == 0  # every other kill waits for a save to begin
            time.sleep(random.uniform(0, 2))
            while at_save and not list(run.glob("*.part")) and process.poll() is None:
                time.sleep(0.0005)
            time.sleep(random.uniform(0, 0.03) if at_save else 0)
            saving = [path.name for path in run.glob("*.part")]
            if process.poll() is not None:  # it had ended before the kill came: again
                shutil.rmtree(run)
                continue
            os.killpg(process.pid, 9)
            process.wait()
            kill += 1
            reached, kept = last_step(run), newest(run)
            finish(name, folder, "--resume", str(run))
            found = load_file(run / "checkpoint/model.safetensors")
            equal = found.keys() == whole[name].keys() and all(found[k].equal(whole[name][k]) for k in found)
            steps = [r["step"] for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in r]
            once = steps == list(range(1, max(steps) + 1))
            same, lost = same + (equal and once), lost + (reached - kept > 3)
            print(f"kill {kill}, {name}: at step {reached}, newest checkpoint {kept}"
                  f"{', in ' + saving[0] if saving else ''}; resumed: weights {'the same' if equal else 'OTHERS'}, "
                  f"metrics {'whole' if once else 'NOT whole'}", flush=True)
            shutil.rmtree(run)
    print(f"{same} of {args.kills} came to the same weights, bit for bit, with each step's metrics once; "
          f"{lost} lost more than --save-every steps")
    sys.exit(same < args.kills or lost > 0)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
