"""Did a change move what is learned? Five seeds of each script with its defaults, against the committed results.

    python benchmarks/check.py                          # twenty minutes on two cores
    python benchmarks/check.py --scripts grpo dpo
    python benchmarks/check.py --seeds 3                # quicker, and sees less

Says for each figure whether it moved by more than the spread of the seeds allows: by more than three standard errors
of the difference of the two means. Ends with code 1 if one did. To make new results of a change that is meant:
python benchmarks/algorithms.py.
"""
import math
import statistics
import sys
import tempfile
from dataclasses import dataclass

import tyro

from algorithms import FILE, ONLINE, facts_of, jobs_of
from many import check_names, read_jsonl, run_all

FIGURES = {"first": "gold (or accuracy) before", "last": "gold (or accuracy) after", "kl": "KL", "length": "length"}


@dataclass
class Args:
    scripts: tuple[str, ...] = (*ONLINE, "dpo", "reward_model")
    seeds: int = 5
    """at least 2, for a spread"""


def moved(before: list[float], now: list[float]) -> tuple[float, bool]:
    """The difference of the means in standard errors, and whether it is more than three. Values that do not vary at
    all must be equal up to rounding."""
    difference = statistics.fmean(now) - statistics.fmean(before)
    error = math.sqrt(statistics.variance(before) / len(before) + statistics.variance(now) / len(now))
    if error < 1e-9:
        return 0.0 if abs(difference) < 1e-4 else math.inf, abs(difference) >= 1e-4
    return difference / error, abs(difference) > 3 * error


def main(args: Args):
    if args.seeds < 2:
        sys.exit("error: --seeds: at least 2, for a spread")
    check_names("--scripts", args.scripts, Args.scripts)
    with tempfile.TemporaryDirectory() as folder:
        rows = [facts_of(job, memory) for job, _, memory in run_all(jobs_of(args.scripts, args.seeds, folder))]
    committed, bad = read_jsonl(FILE), 0
    print("| script | figure | committed | now | standard errors | |\n|---|---|---|---|---|---|")
    for script in args.scripts:
        for column, name in FIGURES.items():
            before, now = ([row[column] for row in found if row["script"] == script and row.get(column) is not None]
                           for found in (committed, rows))
            if len(before) > 1 and len(now) < 2:
                bad += 1
                print(f"| {script} | {name} | {statistics.fmean(before):.3f} | missing in {args.seeds - len(now)} of "
                      f"{args.seeds} runs | | MOVED |")
            elif len(before) > 1:
                size, far = moved(before, now)
                bad += far
                print(f"| {script} | {name} | {statistics.fmean(before):.3f} ({statistics.stdev(before):.3f}) | "
                      f"{statistics.fmean(now):.3f} ({statistics.stdev(now):.3f}) | {size:+.1f} | "
                      f"{'MOVED' if far else ''} |")
    print(f"{bad} figures moved by more than three standard errors" if bad else "no figure moved")
    sys.exit(min(bad, 1))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
