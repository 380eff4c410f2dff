"""The measured table of algorithms: five seeds of each script with its defaults, evaluated ten times in the course of
training; and the noise of the first gradient.

    python benchmarks/algorithms.py                    half an hour on two cores
    python benchmarks/algorithms.py --scripts ppo      one script again, in a few minutes; the others' rows are kept
    python benchmarks/algorithms.py --table            the table again, from results/algorithms.jsonl

Gold is the true reward on 300 held-out prompts, at best 1. Seconds are training time on one core without evaluation,
relative to GRPO's. Memory is the peak of the process. Noise of the gradient: variance of the first update's gradient
over seeds (summed over parameters), divided by the squared length of its mean, both estimated from GRADIENTS seeds. An
update has a whole rollout of 256 completions, or 32 pairs. Writes results/algorithms.jsonl and the
tables in docs/algorithms.md and docs/measurements.md.
"""
import contextlib
import io
import math
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import logging

from many import RESULTS, ROOT, commit, read_jsonl, run_all, show_table, write_jsonl

sys.path[:0] = [str(ROOT)]
ONLINE = "grpo", "ppo", "reinforce"
GOLD, GRADIENTS = 0.85, 16
FILE = RESULTS / "algorithms.jsonl"


@dataclass
class Args:
    table: bool = False
    """only the table, from results/algorithms.jsonl"""
    seeds: int = 5
    steps: int = 40
    """of the on-policy scripts"""
    scripts: tuple[str, ...] = (*ONLINE, "dpo", "reward_model")


def jobs_of(scripts: tuple, seeds: int, folder: str, steps: int = 40) -> list[tuple]:
    """The default run of each script and seed, for run_all."""
    jobs = []
    for seed in range(seeds):
        for script in scripts:
            every = {"reward_model": 0, "dpo": 28}.get(script, 4)
            flags = {"seed": seed, "run_dir": f"{folder}/{script}-{seed}", "save_every": 0, "eval_every": every}
            if script in ONLINE:
                flags["steps"] = steps
            jobs.append((script, flags))
    return jobs


def facts_of(job: tuple, memory: float) -> dict:
    """The results of a run."""
    script, flags = job
    metrics = read_jsonl(Path(flags["run_dir"]) / "metrics.jsonl")
    steps = [row for row in metrics if "loss" in row]
    evaluations = [row for row in metrics if "eval_gold" in row or "eval_accuracy" in row]
    found = {"script": script, "seed": flags["seed"], "seconds": sum(row["seconds"] for row in steps), "memory": memory,
             "kl": evaluations[-1].get("eval_kl"), "length": evaluations[-1].get("eval_length"),
             "first": evaluations[0].get("eval_gold", evaluations[0].get("eval_accuracy")),
             "last": evaluations[-1].get("eval_gold", evaluations[-1].get("eval_accuracy")), **commit()}
    reached = next((row["step"] for row in evaluations if row.get("eval_gold", 0) >= GOLD), None)
    if reached:  # completions, or pairs
        found |= {"to_gold_seconds": sum(row["seconds"] for row in steps if row["step"] <= reached),
                  "to_gold_rows": reached * (256 if script in ONLINE else 32)}
    return found


def first_gradient(script_name: str, seed: int, folder: str) -> torch.Tensor:
    """The gradient of the policy's first update, as one vector, before it is clipped."""
    import importlib

    from runtime import Run
    script, seen, before = importlib.import_module(script_name), [], Run.clip_grad_norm

    class Enough(Exception):
        pass

    def clip_grad_norm(run, model):
        if model is next(iter(run.trained.values()))[0]:  # not PPO's critic
            seen.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
            raise Enough
        return before(run, model)
    flags = {"seed": seed, "run_dir": f"{folder}/{script_name}-gradient-{seed}", "eval_prompts": 0}
    if script_name in ONLINE:
        flags |= {"steps": 1} | ({"minibatches": 1} if script_name == "ppo" else {})
    else:
        flags |= {"data": f"{folder}/pairs.jsonl", "eval_pairs": 8}
    Run.clip_grad_norm = clip_grad_norm
    with contextlib.suppress(Enough), contextlib.redirect_stdout(io.StringIO()):
        script.main(script.Args(**flags))
    Run.clip_grad_norm = before
    return seen[0]


def noise_of(script: str, folder: str) -> float:
    gradients = torch.stack([first_gradient(script, seed, folder) for seed in range(GRADIENTS)]).double()
    variance = gradients.var(0).sum().item()
    squared_mean = gradients.mean(0).square().sum().item() - variance / GRADIENTS  # unbiased
    return variance / squared_mean


def by_seed(rows: list[dict]) -> str:
    """As docs/measurements.md has it: the default runs, seed by seed."""
    runs = {(row["script"], row["seed"]): row for row in rows if "seed" in row}
    scripts = [script for script in (*ONLINE, "dpo") if any(script == name for name, _ in runs)]
    lines = ["| gold | before | " + " | ".join(f"`{script}.py`" for script in scripts) + " |",
             "|---" * (len(scripts) + 2) + "|"]
    for seed in sorted({seed for _, seed in runs}):
        found = [runs.get((script, seed)) for script in scripts]
        lines.append(f"| seed {seed} | {next(row['first'] for row in found if row):.2f} | "
                     + " | ".join(f"{row['last']:.2f}" if row else "" for row in found) + " |")
    own = {script: [row for (name, _), row in runs.items() if name == script] for script in scripts}
    for name, column, digits in (("mean", "last", 3), ("KL, nats", "kl", 2), ("length, tokens", "length", 1)):
        first = f"{statistics.fmean(row['first'] for row in own[scripts[0]]):.3f}" if column == "last" else ""
        lines.append(f"| {name} | {first} | " + " | ".join(
            f"{statistics.fmean(row[column] for row in own[script]):.{digits}f}" for script in scripts) + " |")
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    """As docs/algorithms.md has it."""
    runs = [row for row in rows if "seed" in row]
    base = statistics.fmean(row["seconds"] for row in runs if row["script"] == "grpo")
    columns = {"kl": ("KL", 2), "length": ("length", 1), "memory": ("MiB", 0), "noise": ("noise", 1)}
    columns = {k: shown for k, shown in columns.items() if any(k in row for row in rows)}
    lines = ["| | gold: mean (lowest to highest) | to gold 0.85: completions, or pairs | time to it | "
             "time in all | " + " | ".join(name for name, _ in columns.values()) + " |",
             "|---" * (5 + len(columns)) + "|"]
    for script in (*ONLINE, "dpo", "reward_model"):
        own = [row for row in runs if row["script"] == script]
        last = [row["last"] for row in own]
        reached = [row for row in own if "to_gold_rows" in row]
        to_gold = [statistics.median([row.get(k, math.inf) for row in own])
                   for k in ("to_gold_rows", "to_gold_seconds")]
        rest = [f"{statistics.fmean(row['seconds'] for row in own) / base:.2f}"]
        for k, (_, digits) in columns.items():
            values = [row[k] for row in rows if row["script"] == script and row.get(k) is not None]
            rest.append(f"{statistics.fmean(values):.{digits}f}" if values else "")
        rest = " | ".join(rest)
        spread = f"{statistics.fmean(last):.3f} ({min(last):.2f} to {max(last):.2f})"
        if script == "reward_model":
            lines.append(f"| `{script}.py` | accuracy {spread} | | | {rest} |")
        else:
            often = to_gold[0] < math.inf  # by half of the seeds
            lines.append(f"| `{script}.py` | {spread} | {f'{to_gold[0]:,.0f}' if often else 'by fewer than half'} "
                         f"({len(reached)} of {len(own)} seeds) | {f'{to_gold[1] / base:.2f}' if often else ''} | {rest} |")
    return "\n".join(lines)


def main(args: Args):
    if not args.table:
        logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            jobs = jobs_of(args.scripts, args.seeds, folder, args.steps)
            rows = [facts_of(job, memory) for job, _, memory in run_all(jobs, fresh=True)]
            pairs = (ROOT / "tiny/preferences.jsonl").read_text().splitlines(True)[:2000]
            Path(folder, "pairs.jsonl").write_text("".join(pairs))
            before = read_jsonl(FILE) if FILE.exists() else []
            before = [row for row in before if row["script"] not in args.scripts]
            write_jsonl(FILE, before + rows)
            for script in args.scripts:
                if script != "reward_model":  # each seed starts from another random head
                    rows.append({"script": script, "noise": noise_of(script, folder), **commit()})
        write_jsonl(FILE, before + rows)
    rows = read_jsonl(FILE)
    for page, name, text in (("algorithms.md", "algorithms", table(rows)),
                             ("measurements.md", "default runs", by_seed(rows))):
        show_table(page, name, text)
    last = {(row["script"], row["seed"]): row["last"] for row in rows if "seed" in row}
    for script in ("reinforce", "ppo"):
        ahead = [last[script, seed] - gold for (name, seed), gold in last.items() if name == "grpo"]
        print(f"{script} minus grpo, seed by seed: {statistics.fmean(ahead):.3f}, standard error "
              f"{statistics.stdev(ahead) / len(ahead) ** 0.5:.3f}, above 0 in {sum(x > 0 for x in ahead)} of {len(ahead)}")
    reached = [row["last"] for row in rows if "to_gold_rows" in row]
    print(f"of {len(reached)} runs that reach gold {GOLD}, {sum(x < GOLD for x in reached)} end below it")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
