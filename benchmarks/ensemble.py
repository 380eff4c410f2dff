"""Reward models of few pairs, alone and as an ensemble (Coste et al. 2023, arXiv:2310.02743; Eisenstein et al. 2023,
arXiv:2312.09244): three from 1,000 fair pairs each, and GRPO against each of them, their mean, their minimum, and their
mean minus their standard deviation, without a KL penalty and with a constant learning rate.

    python benchmarks/ensemble.py            # ten minutes on two cores
    python benchmarks/ensemble.py --table    # the table again, from results/ensemble.jsonl

Gold is the true reward of held-out completions, at best 1: what matters is how far it falls from its best value while
the learned reward still rises. Writes results/ensemble.jsonl.
"""
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from many import RESULTS, ROOT, commit, read_jsonl, run_all, write_jsonl

FILE, PAIRS, MODELS = RESULTS / "ensemble.jsonl", 1000, 3


@dataclass
class Args:
    table: bool = False
    """only the table, from results/ensemble.jsonl"""
    seeds: int = 1
    steps: int = 60
    every: int = 6
    """steps between evaluations"""


def table(rows: list[dict]):
    print("| reward | gold: best (step) | gold at the end | learned reward at the end | KL at the end |")
    print("|---" * 5 + "|")
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        for seed in sorted({row["seed"] for row in own}):
            curve = [row for row in own if row["seed"] == seed]
            best, last = max(curve, key=lambda row: row["gold"]), curve[-1]
            print(f"| {name} | {best['gold']:.2f} ({best['step']}) | {last['gold']:.2f} | {last['reward']:.2f} | "
                  f"{last['kl']:.1f} |")


def main(args: Args):
    if not args.table:
        with tempfile.TemporaryDirectory() as folder:
            lines, jobs = (ROOT / "tiny/preferences.jsonl").read_text().splitlines(True), []
            for i in range(MODELS):
                data = Path(folder, f"pairs-{i}.jsonl")
                data.write_text("".join(lines[i * PAIRS:(i + 1) * PAIRS] + lines[-300:]))
                jobs.append(("reward_model", {"data": str(data), "eval_pairs": 300, "bias_prompts": 0, "epochs": 4,
                                              "seed": i, "save_every": 0, "run_dir": f"{folder}/model-{i}"}))
            for (_, flags), _, _ in run_all(jobs):
                print(flags["run_dir"], read_jsonl(Path(flags["run_dir"], "metrics.jsonl"))[-1]["eval_accuracy"])
            models = tuple(str(next(Path(folder, f"model-{i}").glob("checkpoint-*"))) for i in range(MODELS))
            flags = {"steps": args.steps, "eval_every": args.every, "save_every": 0, "beta": 0.0, "max_kl": 1e9,
                     "lr_schedule": "constant_with_warmup", "max_new_tokens": 32, "prompts_per_step": 8,
                     "group_size": 8, "eval_prompts": 150}
            rewards = {f"model {i + 1} alone": {"reward": model} for i, model in enumerate(models)}
            for how, words in (("sum", "mean"), ("min", "minimum"), ("mean_minus_std", "mean minus std")):
                weights = (1 / MODELS,) * MODELS if how == "sum" else ()
                rewards[f"their {words}"] = {"reward": models, "reward_combine": how, "reward_weights": weights}
            jobs = [("grpo", flags | reward | {"seed": seed, "run_dir": f"{folder}/{name}-{seed}".replace(" ", "_")})
                    for seed in range(args.seeds) for name, reward in rewards.items()]
            rows = []
            for (_, given), _, _ in run_all(jobs):
                name, seed = Path(given["run_dir"]).name.replace("_", " ").rsplit("-", 1)
                rows += [{"name": name, "seed": int(seed), "step": row["step"], "gold": row["eval_gold"],
                          "reward": row["eval_reward"], "kl": row["eval_kl"], **commit()}
                         for row in read_jsonl(Path(given["run_dir"], "metrics.jsonl")) if "eval_gold" in row]
            rows.sort(key=lambda row: (list(rewards).index(row["name"]), row["seed"], row["step"]))
            write_jsonl(FILE, rows)
    table(read_jsonl(FILE))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
