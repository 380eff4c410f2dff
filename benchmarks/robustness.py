"""Do runs survive kills, and do long runs stay flat in memory and speed?

    python benchmarks/robustness.py --kills 25           # five kills of each script
    python benchmarks/robustness.py --kills 5 --scripts grpo
    python benchmarks/robustness.py --soak 1000          # a thousand steps of grpo.py
    python benchmarks/robustness.py --soak 300 --scripts reinforce

--kills trains each script once without a break. It then starts the script again, kills it (SIGKILL) at a random
moment, every other time while it saves a checkpoint, and resumes it. The resumed run must end with the same weights,
metrics and samples as the unbroken one, bit for bit, and a kill must cost no more than --save-every steps. For each
kill it prints the last step with metrics, the newest checkpoint, and whether a save was under way. Every third run is
killed a second time, after its resume. Each run is then resumed once more, although it is finished (every other one is
killed in that): nothing may change. At last a random bit of its checkpoint is flipped: --resume must refuse it. Exit
code 1: something did damage.

--soak prints ten times in a run: the resident memory of the process, and the steps per second since the last time.
"""
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SAVE_EVERY = 3
SHARED = ["--save-every", str(SAVE_EVERY), "--log-every", "1"]
ONLINE = SHARED + ("--steps 24 --prompts-per-step 3 --group-size 4 --max-new-tokens 16 --eval-prompts 4 "
                   "--eval-every 10").split()
PAIRS = SHARED + "--eval-pairs 8 --pairs-per-step 4".split()  # and so 24 steps, with 96 pairs and 8 held out
FLAGS = {
    "grpo": ONLINE + ["--minibatches", "2"], "ppo": ONLINE + ["--kl-target", "1"],
    "reinforce": ONLINE + ["--baseline", "moving"], "dpo": PAIRS + ["--eval-prompts", "2"],
    "reward_model": PAIRS + ["--bias-prompts", "8"]}


@dataclass
class Args:
    kills: int = 0
    """how many runs to kill"""
    soak: int = 0
    """how many steps to watch the memory for"""
    scripts: tuple[str, ...] = ()
    """default: all five for --kills, grpo for --soak"""
    seed: int = 0
    """of the moments of the kills"""
    workers: int = 2
    """kills at a time"""


def start(name: str, folder: Path, *flags) -> subprocess.Popen:
    with open(folder / f"{time.time_ns()}.err", "w") as err:
        process = subprocess.Popen([sys.executable, ROOT / f"{name}.py", *flags], cwd=ROOT, stderr=err,
                                   stdout=subprocess.DEVNULL,
                                   env={"OMP_WAIT_POLICY": "passive", **os.environ})  # for several runs at a time
    process.err = Path(err.name)
    return process


def finish(process: subprocess.Popen):
    if process.wait():
        raise RuntimeError(f"{process.args}: exit code {process.returncode}: {process.err.read_text()}")


def read_rows(path: Path) -> list[dict]:
    """The complete lines of a file, without times."""
    lines = path.read_text().splitlines(True) if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


def last_step(run: Path) -> int:
    return max((row["step"] for row in read_rows(run / "metrics.jsonl")), default=0)


def newest(run: Path) -> tuple[int, Path]:
    """Step and folder of the newest checkpoint."""
    found = [(int(path.name.split("-")[1]), path) for path in run.glob("checkpoint-*[0-9]")]
    return max(found, default=(0, None))


def results(run: Path) -> dict:
    return {"weights": {name: weight.tolist() for name, weight in
                        load_file(newest(run)[1] / "model.safetensors").items()},
            "metrics": read_rows(run / "metrics.jsonl"), "samples": read_rows(run / "samples.jsonl")}


def whole_run(name: str, folder: Path) -> dict:
    """Results of a run without a break."""
    finish(start(name, folder, *FLAGS[name], "--run-dir", folder / name))
    return results(folder / name)


def kill_one(name: str, number: int, seed: int, folder: Path, expected: dict) -> tuple[bool, bool, bool, bool]:
    """Kills a run and resumes it. Returns whether its results are as expected, whether the kill cost too much, whether
    resuming the finished run changed nothing, and whether a flipped bit was found."""
    moments, run = random.Random(seed * 1000 + number), folder / f"{name}-{number}"
    lost = kill(start(name, folder, *FLAGS[name], "--run-dir", run), name, number, moments, run, 15)
    if number % 3 == 0:
        lost |= kill(start(name, folder, "--resume", run), name, number, moments, run, 20)
    finish(start(name, folder, "--resume", run))
    found = results(run)
    wrong = [key for key in expected if found[key] != expected[key]]
    again = start(name, folder, "--resume", run)  # it is finished
    if number % 2:
        time.sleep(moments.uniform(1, 6))
        again.kill()
    again.wait()
    finish(start(name, folder, "--resume", run))
    unchanged = results(run) == found
    flipped = flip_a_bit(newest(run)[1] / "resume", moments)
    refused = start(name, folder, "--resume", run)
    noticed = refused.wait() == 2 and "damaged" in refused.err.read_text()
    print(f"kill {number}, {name}: resumed: {'DIFFERENT ' + ', '.join(wrong) if wrong else 'the same'}; finished and "
          f"resumed: {'unchanged' if unchanged else 'CHANGED'}; a bit of {flipped}: "
          f"{'refused' if noticed else 'ACCEPTED'}", flush=True)
    return not wrong, lost, unchanged, noticed


def flip_a_bit(folder: Path, moments: random.Random) -> str:
    """Flips a random bit of a random file but state.json. Returns its name."""
    path = moments.choice(sorted(path for path in folder.iterdir() if path.name != "state.json"))
    data = bytearray(path.read_bytes())
    data[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
    path.write_bytes(data)
    return path.name


def kill(process, name: str, number: int, moments: random.Random, run: Path, latest: int) -> bool:
    """Kills a run at a random moment. Returns whether that cost too much."""
    first, in_save = max(SAVE_EVERY, last_step(run) + 1), number % 2 == 0
    target = moments.randint(first, max(latest, first))
    while (last_step(run) < target or not newest(run)[0]) and process.poll() is None:
        time.sleep(0.005)
    time.sleep(0 if in_save else moments.uniform(0, 0.5))
    while in_save and not list(run.glob("*.part")) and process.poll() is None:
        time.sleep(0.0005)
    time.sleep(moments.uniform(0, 0.03) if in_save else 0)
    saving = [path.name for path in run.glob("*.part")]
    if process.poll() is not None:
        raise RuntimeError(f"{name}: ended before the kill: {process.err.read_text()}")
    process.kill()
    process.wait()
    reached, kept = last_step(run), newest(run)[0]
    print(f"kill {number}, {name}: at step {reached}, newest checkpoint {kept}{', in ' + saving[0] if saving else ''}",
          flush=True)
    return reached - kept > SAVE_EVERY


def kills(args: Args):
    scripts, begun = args.scripts or tuple(FLAGS), time.time()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.workers) as pool:
        folder = Path(folder)
        pairs = (ROOT / "tiny/preferences.jsonl").read_text().splitlines(True)[:104]
        (folder / "pairs.jsonl").write_text("".join(pairs))
        for name in ("dpo", "reward_model"):
            FLAGS[name] += ["--data", folder / "pairs.jsonl"]
        expected = dict(zip(scripts, pool.map(lambda name: whole_run(name, folder), scripts)))
        print(f"{len(scripts)} runs without a break: {time.time() - begun:.0f} s", flush=True)
        names = [scripts[i % len(scripts)] for i in range(args.kills)]
        found = list(pool.map(lambda i: kill_one(names[i], i + 1, args.seed, folder, expected[names[i]]),
                              range(args.kills)))
    same, lost, unchanged, noticed = (sum(column) for column in zip(*found))
    print(f"{same} of {args.kills} ended with the same weights, metrics and samples, bit for bit; {lost} lost more "
          f"than --save-every steps; {unchanged} did not change when resumed once more; {noticed} flipped bits were "
          f"refused; {time.time() - begun:.0f} s")
    sys.exit(min(same, unchanged, noticed) < args.kills or lost > 0)


def soak(args: Args):
    name = args.scripts[0] if args.scripts else "grpo"
    with tempfile.TemporaryDirectory() as folder:
        run, step = Path(folder) / "run", 0
        process = start(name, Path(folder), "--steps", str(args.soak), "--lr", "5e-5", "--eval-prompts", "0",
                        "--save-every", "50", "--run-dir", run)
        while process.poll() is None:
            time.sleep(0.2)
            path = run / "metrics.jsonl"
            lines = path.read_text().splitlines(True) if path.is_file() else []
            rows = [json.loads(line) for line in lines if line.endswith("\n")]
            if rows and rows[-1]["step"] >= step + max(1, args.soak // 10):
                status = Path(f"/proc/{process.pid}/status").read_text()
                if "VmRSS:" not in status:  # it has just ended
                    break
                resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
                part = [row for row in rows if row["step"] > step]
                step = rows[-1]["step"]
                print(f"step {step:5}  resident {resident:7.0f} MiB  "
                      f"{len(part) / sum(row['seconds'] for row in part):.2f} steps per second  "
                      f"length {sum(row['length'] for row in part) / len(part):.1f}", flush=True)
        finish(process)


def main(args: Args):
    if not (args.kills or args.soak):
        sys.exit("give --kills N or --soak STEPS")
    if args.soak:
        soak(args)
    if args.kills:
        kills(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
