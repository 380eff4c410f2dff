"""A real model learns: one-digit sums (examples/sums.py) with a small chat model, by every algorithm.

    python benchmarks/sums.py --model HuggingFaceTB/SmolLM2-135M-Instruct   # three hours on two cores
    python benchmarks/sums.py --model MODEL --only grpo --seeds 1            # a quarter of an hour
    python benchmarks/sums.py --table        # the table and the picture, from results/sums.jsonl; no model

Three seeds of GRPO, PPO, REINFORCE with its baseline and without, and DPO on pairs sampled from the model itself (one
right and one wrong answer to the same sum). 8 x 8 answers of at most 14 tokens a step, the reward 1 if the last number
is right. The bar is that of arXiv:2510.26788: on prompts that the model sometimes solves, accuracy in training passes
0.95. Goes on where it stopped. Writes results/sums.jsonl, docs/sums.png and the table in docs/measurements.md.
pip install '.[plot]'
"""
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from many import DOCS, RESULTS, ROOT, check_names, commit, read_jsonl, run_all, show_table, write_jsonl

FILE = RESULTS / "sums.jsonl"
ONLINE = {"reward": "examples/sums.py:right", "eval_prompts": 81, "prompts_per_step": 8, "group_size": 8,
          "max_new_tokens": 14, "lr": 1e-5, "lr_schedule": "constant_with_warmup", "beta": 0.02, "eval_every": 8,
          "eval_samples": 4, "save_every": 0}
RUNS = {  # name: (script, flags)
    "grpo": ("grpo", {}),
    "ppo": ("ppo", {"critic_lr": 1e-4, "critic_warmup": 0}),
    "reinforce": ("reinforce", {}),
    "reinforce, no baseline": ("reinforce", {"baseline": "none"}),
    "dpo": ("dpo", {"lr": 1e-5, "beta": 0.1, "pairs_per_step": 16, "epochs": 2, "max_new_tokens": 14,
                    "eval_prompts": 81, "eval_samples": 4, "gold": "examples/sums.py:right", "eval_pairs": 16,
                    "save_every": 0})}


@dataclass
class Args:
    model: str = ""
    """folder or hub id of a small chat model"""
    table: bool = False
    """only the table and the picture, from results/sums.jsonl"""
    only: tuple[str, ...] = tuple(RUNS)
    seeds: int = 3
    steps: int = 24
    """of the on-policy scripts"""
    samples: int = 32
    """answers to each sum, of which DPO's pairs are made"""
    dtype: str = "auto"
    workers: int = 1
    """runs at a time, with one thread each if there are several (slower: they share the memory's bandwidth)"""


def own_pairs(args: Args, folder: Path):
    """pairs.jsonl in the folder: for each sum, as many pairs of a right and a wrong answer as there are of both."""
    sys.path[:0] = [str(ROOT)]
    import grpo
    flags = ONLINE | {"model": args.model, "data": f"{folder}/sums.jsonl", "eval_data": f"{folder}/sums.jsonl",
                      "steps": 0, "eval_samples": args.samples, "dtype": args.dtype, "run_dir": f"{folder}/samples"}
    grpo.main(grpo.Args(**flags))
    by_prompt = {}
    for row in read_jsonl(folder / "samples" / "samples.jsonl"):
        by_prompt.setdefault(json.dumps(row["prompt"]), {1: [], 0: []})[int(row["reward"])].append(row["completion"])
    pairs = [{"prompt": json.loads(prompt), "chosen": good, "rejected": bad}
             for prompt, found in by_prompt.items() for good, bad in zip(found[1], found[0])]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    print(f"{len(pairs)} pairs of the model's own answers to {len(by_prompt)} sums")


def curve_of(folder: Path) -> dict:
    """Accuracy of the evaluations and of the training steps, by step."""
    metrics = read_jsonl(folder / "metrics.jsonl")
    name = "eval_reward" if "eval_reward" in metrics[0] else "eval_gold"
    return {"held": {row["step"]: row[name] for row in metrics if name in row},
            "train": [row["reward"] for row in metrics if "loss" in row and "reward" in row],
            "kl": metrics[-1].get("eval_kl"), "seconds": sum(row.get("seconds", 0) for row in metrics)}


def measure(args: Args):
    check_names("--only", args.only, RUNS)
    rows, given = read_jsonl(FILE) if FILE.exists() else [], {"model": Path(args.model).name, "steps": args.steps}
    if others := [row for row in rows if given != {k: row[k] for k in given}]:
        sys.exit(f"error: {FILE} has runs with --model {others[0]['model']} --steps {others[0]['steps']}: move it away to "
                 "measure others")
    before = {(row["name"], row["seed"]) for row in rows}
    todo = [(name, seed) for seed in range(args.seeds) for name in args.only if (name, seed) not in before]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run([sys.executable, ROOT / "examples/sums.py", folder / "sums.jsonl"], check=True)
        if any(name == "dpo" for name, _ in todo):
            own_pairs(args, folder)
        jobs = []
        for name, seed in todo:
            script, flags = RUNS[name]
            flags = flags | {"model": args.model, "seed": seed, "dtype": args.dtype, "run_dir": f"{folder}/{name}-{seed}"}
            flags |= {"data": f"{folder}/pairs.jsonl", "sample_data": f"{folder}/sums.jsonl"} if script == "dpo" else (
                ONLINE | flags | {"data": f"{folder}/sums.jsonl", "eval_data": f"{folder}/sums.jsonl",
                                  "steps": args.steps})
            jobs.append((script, flags))
        for (script, flags), _, memory in run_all(jobs, args.workers, True, 0 if args.workers == 1 else 1):
            name, seed = Path(flags["run_dir"]).name.rsplit("-", 1)
            rows.append({"name": name, "seed": int(seed), **given, **curve_of(Path(flags["run_dir"])),
                         "memory": round(memory), **commit()})
            write_jsonl(FILE, rows)


def table(rows: list[dict]) -> str:
    """As docs/measurements.md has it: means over the seeds (lowest to highest)."""
    steps = sorted({int(step) for row in rows if row["name"] != "dpo" for step in row["held"]})
    lines = ["| | seeds | " + " | ".join(f"step {step}" for step in steps) +
             " (DPO: its last) | training passes 0.95 at step | KL | peak memory, MiB |", "|---" * (len(steps) + 5) + "|"]
    for name in RUNS:
        own = [row for row in rows if row["name"] == name]
        if own:
            cells = []
            for step in steps:
                values = [row["held"][str(step)] for row in own if str(step) in row["held"]]
                if step == steps[-1]:  # DPO has steps of its own
                    values = [list(row["held"].values())[-1] for row in own]
                spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.2f}{spread}" if values else "")
            passed = [next((i for i, value in enumerate(row["train"], 1) if value > 0.95), None) for row in own]
            cells.append(", ".join(str(step or "never") for step in passed) if name != "dpo" else "")
            kl = [row["kl"] for row in own if row["kl"] is not None]
            cells += [f"{statistics.fmean(kl):.1f}" if kl else "", f"{max(row['memory'] for row in own)}"]
            lines.append(f"| {name} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict]):
    """docs/sums.png: the share of right answers in training, for each run, and held out at the evaluations."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    sys.path[:0] = [str(ROOT / "tools")]
    from plot import COLORS, GRAY, STYLE
    names = [name for name in RUNS if name != "dpo" and any(row["name"] == name for row in rows)]
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3.2), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), sharex=True, sharey=True, squeeze=False)[0], names):
            axes.axhline(0.95, color=GRAY, lw=1, ls=":")
            for row, color in zip((row for row in rows if row["name"] == name), COLORS):
                axes.plot(range(1, len(row["train"]) + 1), row["train"], color=color, lw=1.2, alpha=0.85)
                axes.plot([int(step) for step in row["held"]], list(row["held"].values()), "o", color=color, ms=5)
            axes.set_title(name)
        figure.supylabel("share of right answers", fontsize="medium")
        figure.supxlabel("step (lines: training; dots: all 81 sums; dotted: 0.95)", fontsize="medium")
        figure.savefig(DOCS / "sums.png")


def main(args: Args):
    if not args.table:
        if not args.model:
            sys.exit("error: --model: name a small chat model, such as HuggingFaceTB/SmolLM2-135M-Instruct")
        measure(args)
    rows = read_jsonl(FILE)
    show_table("measurements.md", "sums", table(rows))
    draw(rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
