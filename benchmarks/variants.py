"""What the flags beyond the defaults did on the tiny world: five seeds of each variant beside the run it varies.

    python benchmarks/variants.py                        # two hours on two cores; goes on where it stopped
    python benchmarks/variants.py --only maxrl --only binary
    python benchmarks/variants.py --table                # the table again, from results/variants.jsonl

Gold is the true reward of 4 completions of each of 300 held-out prompts, at best 1, after training. pass@4, for rewards
that are 0 or 1, is how often one of the 4 has a reward of 1. Rewards, besides the tiny world's models:
  best    1 if the gold reward is above 0.9, else 0
  brief   minus a hundredth of the completion's words, so that its scale is far below that of best
Writes results/variants.jsonl.
"""
import math
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from many import RESULTS, ROOT, commit, read_jsonl, run_all, show_table, write_jsonl

FILE, HERE = RESULTS / "variants.jsonl", "benchmarks/variants.py"
BEST, BOTH = f"{HERE}:best", (f"{HERE}:best", f"{HERE}:brief")
BIASED = {"reward": "tiny/biased_reward_model", "max_new_tokens": 32}
VARIANTS = {  # name: (the run it is beside, script, flags)
    "grpo": ("", "grpo", {}),
    "importance_cap": ("grpo", "grpo", {"importance_cap": 2.0}),
    "renewed": ("grpo", "grpo", {"renew_reference_every": 10}),
    "moving": ("grpo", "grpo", {"renew_reference_every": 1, "reference_mix": 0.05}),
    "updates": ("", "grpo", {"minibatches": 4}),
    "sapo": ("updates", "grpo", {"minibatches": 4, "loss_type": "sapo"}),
    "gmpo": ("updates", "grpo", {"minibatches": 4, "loss_type": "gmpo", "clip_low": 0.33, "clip_high": 0.49}),
    "binary": ("", "grpo", {"reward": BEST}),
    "maxrl": ("binary", "grpo", {"reward": BEST, "scale_rewards": "mean"}),
    "resampled": ("binary", "grpo", {"reward": BEST, "max_resamples": 3}),
    "two": ("", "grpo", {"reward": BOTH}),
    "gdpo": ("two", "grpo", {"reward": BOTH, "normalize_rewards": True, "scale_rewards": "batch"}),
    "biased": ("", "grpo", BIASED),
    "overlong": ("biased", "grpo", BIASED | {"truncation_penalty": 4.0, "overlong_window": 28}),
    "ppo": ("", "ppo", {}),
    "critic_lambda": ("ppo", "ppo", {"critic_gae_lambda": 1.0}),
    "critic_first": ("ppo", "ppo", {"critic_gae_lambda": 1.0, "critic_warmup": 5, "steps": 45}),
    "entropy": ("ppo", "ppo", {"entropy_bonus": 0.01}),
    "dpo": ("", "dpo", {}),
    "apo_zero": ("dpo", "dpo", {"loss_type": "apo_zero"}),
    "apo_down": ("dpo", "dpo", {"loss_type": "apo_down"})}
COLUMNS = {"eval_gold": "gold", "eval_kl": "KL", "eval_length": "length", "entropy": "entropy",
           "eval_pass_at_4": "pass@4", "explained_variance": "explained variance"}


@dataclass
class Args:
    table: bool = False
    """only the table, from results/variants.jsonl"""
    only: tuple[str, ...] = tuple(VARIANTS)
    seeds: int = 5
    workers: int = 2


def best(prompts, completions, **columns) -> list[float]:
    sys.path[:0] = [str(ROOT / "tiny")] * (str(ROOT / "tiny") not in sys.path)
    from world import gold_reward
    return [float(value > 0.9) for value in gold_reward(prompts=prompts, completions=completions, **columns)]


def brief(prompts, completions, **columns) -> list[float]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [-len(text.split()) / 100 for text in texts]


def flags_of(name: str) -> str:
    """The flags of a variant that its neighbor does not have, as on the command line."""
    beside, script, flags = VARIANTS[name]
    before = VARIANTS[beside][2] if beside else {}
    shown = []
    for flag, value in flags.items():
        if before.get(flag) != value:
            value = " ".join(value) if isinstance(value, tuple) else value
            shown.append(f"--{flag.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return " ".join(shown).replace(f"{HERE}:", "") or "defaults"


def table(rows: list[dict]) -> str:
    """As docs/measurements.md has it: means over the seeds, with the standard deviation of gold."""
    found = {}
    for row in rows:
        for column, value in row.items():
            found.setdefault((row["variant"], column), []).append(value)

    def cell(name, column, digits=2):
        values = [value for value in found.get((name, column), []) if value is not None]
        return f"{statistics.fmean(values):.{digits}f}" if values else ""
    lines = ["| | gold | difference | " + " | ".join([*COLUMNS.values()][1:]) + " | groups replaced |",
             "|---" * (len(COLUMNS) + 3) + "|"]
    for name, (beside, script, _) in VARIANTS.items():
        own, other = (found.get((x, "eval_gold"), []) for x in (name, beside))
        if own:
            spread = f" ({statistics.stdev(own):.3f})" if len(own) > 1 else ""
            difference = ""
            if min(len(own), len(other)) > 1:
                error = math.sqrt(statistics.variance(own) / len(own) + statistics.variance(other) / len(other))
                difference = f"{statistics.fmean(own) - statistics.fmean(other):+.3f} ({error:.3f})"
            rest = [cell(name, column, 3 if column in ("entropy", "eval_pass_at_4") else 2) for column in [*COLUMNS][1:]]
            replaced = cell(name, "groups_replaced", 0)
            lines.append(f"| {'+ ' if beside else f'`{script}.py` '}`{flags_of(name)}` | {cell(name, 'eval_gold', 3)}{spread}"
                         f" | {difference} | " + " | ".join(rest) + f" | {replaced if replaced != '0' else ''} |")
    return "\n".join(lines)


def main(args: Args):
    if not args.table:
        done = read_jsonl(FILE) if FILE.exists() else []
        before = {(row["variant"], row["seed"]) for row in done}
        with tempfile.TemporaryDirectory() as folder:
            jobs = []
            for seed in range(args.seeds):
                for name in args.only:
                    if (name, seed) not in before:
                        _, script, flags = VARIANTS[name]
                        jobs.append((script, flags | {"seed": seed, "eval_samples": 4, "save_every": 0,
                                                      "eval_every": 0, "run_dir": f"{folder}/{name}-{seed}"}))
            for (_, flags), _, _ in run_all(jobs, args.workers):
                name, seed = Path(flags["run_dir"]).name.rsplit("-", 1)
                metrics = read_jsonl(Path(flags["run_dir"]) / "metrics.jsonl")
                steps, last = [row for row in metrics if "loss" in row], metrics[-1]
                row = {"variant": name, "seed": int(seed), **commit()}
                row |= {k: (steps[-1] | last).get(k) for k in COLUMNS}
                row["groups_replaced"] = sum(r.get("groups_replaced", 0) for r in steps)
                done.append(row)
                write_jsonl(FILE, done)
    show_table("measurements.md", "variants", table(read_jsonl(FILE)))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
