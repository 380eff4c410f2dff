"""Overoptimization as in Gao et al. 2023 (arXiv:2210.10760): reward models from 200, 1,000 and 9,000 fair pairs, and
policies trained against each of them for long. Gold, the true reward, rises and then falls while the learned reward
keeps rising; the more pairs the reward model has seen, the less gold falls. With the paper's law fitted to each curve:

    gold(d) - gold(0) = d (a - b log d)      d: square root of the KL      (on-policy algorithms)
    gold(d) - gold(0) = d (a - b d)                                        (best-of-n)

    python benchmarks/overoptimization.py            # all runs, then the picture: 19 minutes on two cores
    python benchmarks/overoptimization.py --draw     # picture and figures again, from results/overoptimization.jsonl

Goes on where it stopped. Writes results/overoptimization.jsonl, a row for each evaluation of each run, and
docs/overoptimization.png, and the table in docs/hacking.md. pip install '.[plot]'
"""
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from many import DOCS, RESULTS, ROOT, commit, read_jsonl, run_all, show_table, write_jsonl

sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
FILE = RESULTS / "overoptimization.jsonl"
SIZES = {200: 10, 1000: 4, 9000: 1}  # pairs: epochs
BETAS = 0.0, 0.3
POLICY = {"steps": 72, "prompts_per_step": 8, "group_size": 8, "max_new_tokens": 32, "lr": 4e-4,
          "lr_schedule": "constant_with_warmup", "eval_every": 6, "eval_prompts": 100, "save_every": 0,
          "max_kl": 1e9}  # never reached: it loads the reference, to measure the KL at beta 0
OWN = {"grpo": {}, "ppo": {"lr": 3e-4}, "reinforce": {}}  # their defaults


@dataclass
class Args:
    draw: bool = False
    """only the picture and the figures, from results/overoptimization.jsonl"""
    seeds: int = 3
    """runs of each kind; each has a reward model of its own"""
    workers: int = 2


def wanted(seeds: int) -> list[tuple]:
    """(algorithm, pairs, beta, seed) of all runs; best-of-n stands for its one row for each n."""
    found = [("best of n", size, 0.0, 0) for size in SIZES]
    for seed in range(seeds):
        for size in SIZES:
            found += [("grpo", size, beta, seed) for beta in BETAS]
        found += [(script, 1000, 0.0, seed) for script in OWN if script != "grpo"]
    return found


def reward_models(args: Args, folder: str, missing: list[tuple]) -> dict:
    """{(pairs, seed): (its folder, held-out accuracy)}, trained on pairs of its own (of 9,000 pairs there is one set),
    for the runs that are missing."""
    lines, jobs = (ROOT / "tiny/preferences.jsonl").read_text().splitlines(True), []
    for size, seed in dict.fromkeys((size, seed) for _, size, _, seed in missing):
        start = 0 if size == 9000 else seed * size
        data = Path(folder, f"pairs-{size}-{seed}.jsonl")
        data.write_text("".join(lines[start:start + size] + lines[-600:]))
        jobs.append(("reward_model", {"data": str(data), "bias_prompts": 0, "epochs": SIZES[size], "seed": seed,
                                      "save_every": 0, "run_dir": f"{folder}/model-{size}-{seed}"}))
    found = {}
    for (_, flags), _, _ in run_all(jobs, args.workers):
        run = Path(flags["run_dir"])
        accuracy = read_jsonl(run / "metrics.jsonl")[-1]["eval_accuracy"]
        found[int(run.name.split("-")[1]), flags["seed"]] = str(next(run.glob("checkpoint-*"))), accuracy
    return found


def measure(args: Args) -> list[dict]:
    rows = read_jsonl(FILE) if FILE.exists() else []
    before = {(row["algorithm"], row["pairs"], row["beta"], row["seed"]) for row in rows}
    missing = [run for run in wanted(args.seeds) if run not in before]
    with tempfile.TemporaryDirectory() as folder:
        models = reward_models(args, folder, missing)
        for algorithm, size, _, seed in missing:
            if algorithm == "best of n":
                rows += best_of_n(size, models[size, seed][0])
                write_jsonl(FILE, rows)
        jobs = [(script, POLICY | OWN[script] | {"reward": models[size, seed][0], "beta": beta, "seed": seed,
                                                 "run_dir": f"{folder}/{script}-{size}-{beta:g}-{seed}"})
                for script, size, beta, seed in missing if script != "best of n"]
        for (script, flags), _, _ in run_all(jobs, args.workers):
            size = int(Path(flags["run_dir"]).name.split("-")[1])
            rows += [{"algorithm": script, "pairs": size, "beta": flags["beta"], "seed": flags["seed"],
                      "accuracy": models[size, flags["seed"]][1], "step": row["step"], "gold": row["eval_gold"],
                      "learned": row["eval_reward"], "kl": max(0.0, row["eval_kl"]), "length": row["eval_length"],
                      **commit()}
                     for row in read_jsonl(Path(flags["run_dir"], "metrics.jsonl")) if "eval_gold" in row]
            write_jsonl(FILE, rows)
    return rows


def best_of_n(size: int, model: str) -> list[dict]:
    from common import load_reward
    from hacking import best_of_n
    found = best_of_n(load_reward(model, "cpu"), load_reward("tiny/world.py:gold_reward", "cpu"))
    return [{"algorithm": "best of n", "pairs": size, "beta": 0.0, "seed": 0, "n": row["n"], "gold": row["gold"],
             "learned": row["proxy"], "kl": row["kl"], **commit()} for row in found]


def fit(kl: list[float], gold: list[float], law: str):
    """a, b and R squared of the law, by least squares through the start: law "rl" or "best of n"."""
    d = torch.tensor(kl, dtype=torch.float64).sqrt()
    y = torch.tensor(gold, dtype=torch.float64) - gold[0]
    X = torch.stack([d, -d * (d.clamp(min=1e-9).log() if law == "rl" else d)], 1)
    solution = torch.linalg.lstsq(X, y).solution
    residual = y - X @ solution
    return *solution.tolist(), (1 - residual.square().sum() / (y - y.mean()).square().sum()).item()


def curves(rows: list[dict]) -> dict:
    """{(algorithm, pairs, beta): [each seed's evaluations]}"""
    found = {}
    for row in rows:
        key = row["algorithm"], row["pairs"], row["beta"]
        found.setdefault(key, {}).setdefault(row["seed"], []).append(row)
    return {key: [sorted(run, key=lambda row: row.get("n", row.get("step"))) for run in seeds.values()]
            for key, seeds in found.items()}


def table(rows: list[dict]) -> str:
    """As docs/hacking.md has it: means over the seeds (lowest to highest)."""
    lines = ["| | pairs | `--beta` | gold at the start | highest | at the end | learned reward, rise | KL at the end | "
          "a | b | R squared |", "|---" * 11 + "|"]
    for (algorithm, pairs, beta), runs in curves(rows).items():
        best = [max(run, key=lambda row: row["gold"]) for run in runs]
        fits = [fit([r["kl"] for r in run], [r["gold"] for r in run], "rl" if "step" in run[0] else "best of n")
                for run in runs]
        where = "n" if algorithm == "best of n" else "step"

        def cell(values, digits=2):
            values = list(values)
            spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
            return f"{statistics.fmean(values):.{digits}f}{spread}"
        lines.append(
            f"| {algorithm} | {pairs} | {beta:g} | {cell(run[0]['gold'] for run in runs)} | "
            f"{cell(b['gold'] for b in best)}, {where} {', '.join(str(b[where]) for b in best)} | "
            f"{cell(run[-1]['gold'] for run in runs)} | "
            f"{cell(run[-1]['learned'] - run[0]['learned'] for run in runs)} | "
            f"{cell((run[-1]['kl'] for run in runs), 1)} | " + " | ".join(cell(column) for column in zip(*fits)) + " |")
    return "\n".join(lines)


def draw(rows: list[dict]):
    """docs/overoptimization.png: a column for each number of pairs; gold above, the learned reward below."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from plot import COLORS, GRAY, STYLE
    kinds = [("grpo", 0.0), ("grpo", 0.3), ("ppo", 0.0), ("reinforce", 0.0), ("best of n", 0.0)]
    colors = dict(zip(kinds, [COLORS[0], COLORS[3], COLORS[1], COLORS[2], GRAY]))
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 6), layout="constrained")
        panels = figure.subplots(2, len(SIZES), sharex=True, sharey="row")
        for column, size in zip(panels.T, SIZES):
            for axes, name in zip(column, ("gold", "learned")):
                for kind in kinds:
                    for run in curves(rows).get((kind[0], size, kind[1]), []):
                        style = {"ls": "--", "lw": 2.2} if kind[0] == "best of n" else {"lw": 1.3, "alpha": 0.85}
                        start = run[0]["learned"] if name == "learned" else 0
                        axes.plot([row["kl"] ** 0.5 for row in run], [row[name] - start for row in run],
                                  color=colors[kind], **style)
            column[0].set_title(f"{size:,} pairs")
        panels[0, 0].set_ylabel("gold reward")
        panels[1, 0].set_ylabel("learned reward, above its start")
        panels[1, 0].set_yscale("symlog", linthresh=2)  # shared by the row, and the next by all
        panels[1, 0].set_yticks([0, 1, 2, 5, 10], ["0", "1", "2", "5", "10"])
        panels[0, 0].set_xscale("symlog", linthresh=2)
        panels[0, 0].set_xticks([0, 0.5, 1, 2, 5, 10], ["0", "0.5", "1", "2", "5", "10"])
        panels[0, 0].set_xlim(0, 10)
        for axes in panels.flat:
            axes.minorticks_off()
        figure.supxlabel("square root of the KL from the reference (nats per completion)", fontsize="medium")
        keys = [axes.plot([], [], color=color, lw=2, ls="--" if kind[0] == "best of n" else "-")[0]
                for kind, color in colors.items()]
        figure.legend(keys, ["best of n" if a == "best of n" else f"{a}.py, beta {b:g}" for a, b in kinds],
                      loc="outside upper center", ncols=5)
        figure.savefig(DOCS / "overoptimization.png")


def main(args: Args):
    rows = read_jsonl(FILE) if args.draw else measure(args)
    show_table("hacking.md", "overoptimization", table(rows))
    draw(rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
