"""Seconds a step of grpo.py and of TRL's GRPOTrainer on the same work, taken in turn:

    pip install trl==1.16.0 && python benchmarks/speed.py

The same policy, prompts and reward model (the tiny world's), 16 prompts x 16 samples, 48 new tokens,
beta 0.04, temperature 1, float32, one update a rollout, micro-batches of 128. A step is everything from
one rollout's start to the next one's. Each of --rounds rounds runs --steps steps of one, then of the
other, each in a process of its own; the first two steps of a process are warm-up.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def ours(steps: int) -> list[float]:
    with tempfile.TemporaryDirectory() as runs:
        subprocess.run([sys.executable, "grpo.py", "--steps", str(steps), "--eval-every", "0", "--lr", "1e-6",
                        "--device", "cpu",
                        "--run-dir", f"{runs}/run"], check=True, cwd=ROOT, capture_output=True)
        rows = [json.loads(line) for line in open(f"{runs}/run/metrics.jsonl")]
    return [row["seconds"] for row in rows][2:]


def trl(steps: int) -> list[float]:
    out = subprocess.run([sys.executable, __file__, "--trl-steps", str(steps)], check=True, cwd=ROOT,
                         capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def run_trl(steps: int):
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Times(TrainerCallback):
        def __init__(self):
            self.ends = []

        def on_step_end(self, *_, **__):
            self.ends.append(time.time())

    rows = [json.loads(line) for line in open("tiny/prompts.jsonl")]
    times = Times()
    with tempfile.TemporaryDirectory() as out:
        GRPOTrainer(
            model="tiny/policy", reward_funcs="tiny/reward_model",
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
            callbacks=[times],
            args=GRPOConfig(
                output_dir=out, use_cpu=True, bf16=False, per_device_train_batch_size=128,
                gradient_accumulation_steps=2, num_generations=16, max_completion_length=48, beta=0.04,
                temperature=1.0, loss_type="grpo", learning_rate=1e-6, max_steps=steps, save_strategy="no",
                report_to="none", logging_steps=1000, disable_tqdm=True, gradient_checkpointing=False,
                model_init_kwargs={"dtype": "float32"})).train()
    print(json.dumps([b - a for a, b in zip(times.ends[1:], times.ends[2:])]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--trl-steps", type=int)
    args = parser.parse_args()
    if args.trl_steps:
        return run_trl(args.trl_steps)
    seconds = {"plain-rlhf": [], "trl": []}
    for _ in range(args.rounds):
        seconds["plain-rlhf"] += ours(args.steps)
        seconds["trl"] += trl(args.steps)
    for name, values in seconds.items():
        print(f"{name:12} {len(values)} steps: median {statistics.median(values):.2f} s, "
              f"min {min(values):.2f}, max {max(values):.2f}")
    print(f"ratio of medians, TRL / ours: "
          f"{statistics.median(seconds['trl']) / statistics.median(seconds['plain-rlhf']):.2f}")


if __name__ == "__main__":
    main()
