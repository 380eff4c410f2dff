"""How the defaults were found: each algorithm gets the same number of trials, on prompts that are neither trained nor
held out.

    python benchmarks/tune.py                     # 88 runs: 106 minutes on two cores; goes on where it stopped
    python benchmarks/tune.py --scripts ppo
    python benchmarks/tune.py --table             # the table again, from results/tune.jsonl

The third set: of the questions in tiny/prompts.jsonl, every eighth (family, subject) is taken out of training, and 300
of its prompts are what a trial is judged by. DPO's pairs with the same last message are taken out as well. A trial
changes one flag from where the search starts: --lr or --beta, a quarter, half, twice or four times as large, or one flag
of the algorithm. Gold: the true reward of 4 completions of each of the 300 prompts, at best 1; two seeds. Flat: by how
much half and twice a value are worse. Writes results/tune.jsonl and the tables in docs/algorithms.md.
"""
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from many import RESULTS, ROOT, check_names, commit, read_jsonl, run_all, show_table, write_jsonl

FILE, PROMPTS = RESULTS / "tune.jsonl", 300
START = {"grpo": {"lr": 4e-4, "beta": 0.04}, "ppo": {"lr": 3e-4, "beta": 0.04},
         "reinforce": {"lr": 4e-4, "beta": 0.04}, "dpo": {"lr": 3e-4, "beta": 0.1}}
OWN = {  # two trials of a flag of the algorithm
    "grpo": [{"prompts_per_step": 64, "group_size": 4}, {"prompts_per_step": 4, "group_size": 64}],
    "ppo": [{"critic_lr": 5e-4}, {"critic_lr": 2e-3}],
    "reinforce": [{"baseline": "mean"}, {"baseline": "moving"}],
    "dpo": [{"pairs_per_step": 16}, {"pairs_per_step": 64}]}


@dataclass
class Args:
    table: bool = False
    """only the table, from results/tune.jsonl"""
    scripts: tuple[str, ...] = tuple(START)
    seeds: int = 2
    workers: int = 2


def trials(script: str) -> list[dict]:
    """The start, and one flag changed: {flag: value}."""
    found = [{}]
    for flag, value in START[script].items():
        found += [{flag: float(f"{value * factor:.6g}")} for factor in (0.25, 0.5, 2, 4)]
    return found + OWN[script]


def third_set(folder: Path):
    """train.jsonl, tune.jsonl and pairs.jsonl in a folder; no prompt of tune.jsonl is in the other two."""
    rows = read_jsonl(ROOT / "tiny/prompts.jsonl")
    subjects = sorted({(row["family"] or "", row["subject"] or "", row["kind"]) for row in rows})[::8]
    taken = [row for row in rows if (row["family"] or "", row["subject"] or "", row["kind"]) in subjects]
    train = [row for row in rows if (row["family"] or "", row["subject"] or "", row["kind"]) not in subjects]
    asked = {row["prompt"][-1]["content"] for row in taken}
    pairs = [row for row in read_jsonl(ROOT / "tiny/preferences.jsonl")[:9000]
             if row["prompt"][-1]["content"] not in asked]
    for name, some in (("train", train), ("tune", taken[:PROMPTS]), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def measure(args: Args):
    check_names("--scripts", args.scripts, START)
    rows = read_jsonl(FILE) if FILE.exists() else []
    before = {(row["script"], json.dumps(row["flags"]), row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        third_set(Path(folder))
        gold = {"gold": "tiny/world.py:gold_reward", "eval_samples": 4, "eval_every": 0, "save_every": 0}
        jobs, trial_of = [], {}
        for seed in range(args.seeds):
            for script in args.scripts:
                for i, flags in enumerate(trials(script)):
                    if (script, json.dumps(flags), seed) not in before:
                        data = {"data": f"{folder}/pairs.jsonl", "sample_data": f"{folder}/tune.jsonl"} if (
                            script == "dpo") else {"data": f"{folder}/train.jsonl", "eval_data": f"{folder}/tune.jsonl"}
                        run_dir = f"{folder}/{script}-{i}-{seed}"
                        trial_of[run_dir] = flags
                        jobs.append((script, gold | data | START[script] | flags | {"seed": seed, "run_dir": run_dir}))
        for (script, flags), _, _ in run_all(jobs, args.workers):
            last = read_jsonl(Path(flags["run_dir"]) / "metrics.jsonl")[-1]
            rows.append({"script": script, "flags": trial_of[flags["run_dir"]], "seed": flags["seed"],
                         "gold": last["eval_gold"], "kl": last["eval_kl"], **commit()})
            write_jsonl(FILE, rows)


def table(rows: list[dict]) -> str:
    """As docs/algorithms.md has it: for each script its trials, best first, and how flat the neighborhood is."""
    lines = []
    for script in START:
        found = {}
        for row in rows:
            if row["script"] == script:
                found.setdefault(json.dumps(row["flags"]), []).append(row)
        if not found:
            continue
        gold = {flags: statistics.fmean(row["gold"] for row in own) for flags, own in found.items()}
        lines += [""] * bool(lines) + [f"| `{script}.py` | gold (each seed) | KL |", "|---|---|---|"]
        for flags in sorted(gold, key=gold.get, reverse=True):
            name = ", ".join(f"--{k.replace('_', '-')} {v:g}" if isinstance(v, float) else f"--{k.replace('_', '-')} {v}"
                             for k, v in (json.loads(flags) or START[script]).items())
            name = name if flags != "{}" else f"start: {name}"
            each = ", ".join(f"{row['gold']:.3f}" for row in found[flags])
            lines.append(f"| {name} | {gold[flags]:.3f} ({each}) | {statistics.fmean(r['kl'] for r in found[flags]):.2f} |")
        start, best, flat = gold.get("{}"), max(gold.values()), []
        for flag, value in START[script].items():
            near = [gold.get(json.dumps({flag: float(f"{value * factor:.6g}")})) for factor in (0.5, 2)]
            if start is not None and None not in near:
                flat.append(f"`--{flag}` half {near[0] - start:+.3f}, twice {near[1] - start:+.3f}")
        if flat:
            lines += ["", f"`{script}.py`, against the start: {'; '.join(flat)}; the best trial {best - start:+.3f}."]
    return "\n".join(lines)


def main(args: Args):
    if not args.table:
        measure(args)
    show_table("algorithms.md", "tune", table(read_jsonl(FILE)))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
