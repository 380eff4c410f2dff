"""A thousand steps of grpo.py on the tiny world: does its memory stay flat, and its speed?

    python benchmarks/soak.py
    python benchmarks/soak.py --script reinforce --steps 300

Every 100 steps: the resident memory of the process (MiB, from /proc), and the steps a second of those
100. A leak of one rollout (16 x 16 completions) a step would be seen as a line that climbs.
"""
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent


@dataclass
class Args:
    script: str = "grpo"
    steps: int = 1000
    save_every: int = 50


def main(args: Args):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        process = subprocess.Popen(
            [sys.executable, ROOT / f"{args.script}.py", "--steps", str(args.steps), "--lr", "5e-5", "--eval-every", "0",
             "--save-every", str(args.save_every), "--run-dir", run], cwd=ROOT, stdout=subprocess.DEVNULL)
        step = 0
        while process.poll() is None:
            time.sleep(0.2)
            path = run / "metrics.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")
                    ] if path.is_file() else []
            if rows and rows[-1]["step"] >= step + args.steps // 10:
                status = Path(f"/proc/{process.pid}/status").read_text()
                resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
                some = [r for r in rows if r["step"] > step]
                speed = len(some) / sum(r["seconds"] for r in some)
                step = rows[-1]["step"]
                print(f"step {step:5}  resident {resident:7.0f} MiB  {speed:.2f} steps a second  "
                      f"tokens a step {sum(r['length'] for r in some) / len(some) * 256:.0f}", flush=True)
        sys.exit(process.returncode)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
