"""Credit assignment: the advantage of each token according to PPO's critic, GRPO and REINFORCE, next to its exact
credit, for one completion; and the correlation of each with the exact credit.

    python benchmarks/credit.py                 three seeds: 13 minutes on two cores
    python benchmarks/credit.py --draw          the picture again, from results/credit.jsonl
    python benchmarks/credit.py --critics       does a better critic know tokens? 36 minutes on two cores

The exact credit of token t is V(tokens up to t) - V(tokens before t). V is the mean score of 128 completions that the
policy samples from there (VinePPO, Kazemnejad et al. 2024, arXiv:2410.01679, eq. 5 and 6); after the last token it is
the score. Policy and critic are from `ppo.py --steps 20`. The advantages are those of ppo.gae, grpo.group_advantages,
and for REINFORCE the score minus the mean of the group's others.
Writes results/credit.jsonl and docs/credit.png. pip install '.[plot]'

--critics: the policies of `ppo.py --steps 20` stay as they are, and new critics of them are trained (`--critic-warmup`
with as many steps): 20 to 80 steps of 256 completions, --critic-gae-lambda 0.95 and 1, two learning rates. Writes
results/critics.jsonl and the table in docs/credit.md.
"""
import json
import statistics
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import logging

from many import DOCS, RESULTS, ROOT, commit, read_jsonl, run_all, show_table, write_jsonl

sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
PROMPTS, GROUP, RESAMPLES, LONGEST = 10, 8, 128, 48
NAMES = {"ppo": "PPO, critic", "grpo": "GRPO", "reinforce": "REINFORCE", "exact": "exact credit"}
COMPARED = {"ppo": "PPO, critic", "ppo_0": "PPO, critic, lambda 0", "exact_95": "exact values, lambda 0.95",
            "grpo": "GRPO", "reinforce": "REINFORCE"}


@dataclass
class Args:
    draw: bool = False
    """only the picture, from results/credit.jsonl"""
    seeds: int = 3
    steps: int = 20
    """of ppo.py"""
    critics: bool = False
    """compare critics of a fixed policy"""


def load_checkpoint(checkpoint: Path, reward):
    """Policy and critic of a checkpoint of ppo.py, and the tokenizer."""
    import ppo
    import torch.distributed.checkpoint as dcp
    from common import load_tokenizer
    from modeling import load_causal_lm
    policy, tokenizer = load_causal_lm(str(checkpoint), "cpu"), load_tokenizer("tiny/policy")
    critic = ppo.load_critic(ppo.Args(), reward, tokenizer, "cpu")
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        dcp.load({f"critic.{k}": v.detach() for k, v in critic.named_parameters()},
                 checkpoint_id=checkpoint / "resume", no_dist=True)
    return policy.eval(), critic.eval(), tokenizer


def checkpoints_of(run_dir: str) -> list[Path]:
    return sorted(Path(run_dir).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@torch.no_grad()
def credits_of(run_dir: str, seed: int, others: tuple = ()) -> list[dict]:
    """Completions of held-out prompts, with the four kinds of credit of each token. others: more checkpoints, whose
    critics' values of the same completions are added, a list for each in the row's "values"."""
    import grpo
    import ppo
    import reinforce
    from common import encode_prompts, eos_token_ids, load_reward, pad
    reward = load_reward("tiny/reward_model", "cpu")
    policy, critic, tokenizer = load_checkpoint(checkpoints_of(run_dir)[-1], reward)
    eos_ids, generator = eos_token_ids(policy, tokenizer), torch.Generator().manual_seed(seed)
    held = read_jsonl(ROOT / "tiny/heldout.jsonl")[PROMPTS * seed:PROMPTS * (seed + 1)]
    held = encode_prompts(tokenizer, held, "tiny/heldout.jsonl", 1000)
    prompts = [row["prompt_ids"] for row in held]

    def sample(beginnings: list[list[int]], number: int, longest: int):
        parts = []
        for start in range(0, len(beginnings), 16):
            ids = pad(beginnings[start:start + 16], "left")
            parts.append(grpo.generate(policy, *ids, number, longest, 1.0, eos_ids, generator))
        return torch.cat([ids for ids, _, _ in parts]), torch.cat([mask for _, mask, _ in parts])

    def scores_of(rows: list[dict], answers: list[list[int]]):
        return reward(rows, tokenizer.batch_decode(answers, skip_special_tokens=True))

    completion_ids, mask = sample(prompts, GROUP, LONGEST)
    longest = int(mask.sum(1).max())
    completion_ids, mask = completion_ids[:, :longest], mask[:, :longest]  # (B, T) each
    rows = [row for row in held for _ in range(GROUP)]
    beginnings = [prompt for prompt in prompts for _ in range(GROUP)]
    answers = [ids[m.bool()].tolist() for ids, m in zip(completion_ids, mask)]
    scores = scores_of(rows, answers)  # (B,)

    values = torch.zeros(mask.shape)  # (B, T), of the tokens before each token
    halves = values.clone()  # the value from half of the samples, minus that from the others
    after = torch.zeros(mask.shape)
    for t in range(mask.shape[1]):
        alive = [i for i in range(len(rows)) if mask[i, t]]
        ids, more = sample([beginnings[i] + answers[i][:t] for i in alive], RESAMPLES, LONGEST - t)
        texts = [answers[i][:t] + x[m.bool()].tolist() for i, x, m in zip(
            [i for i in alive for _ in range(RESAMPLES)], ids, more)]
        found = scores_of([rows[i] for i in alive for _ in range(RESAMPLES)], texts).view(-1, RESAMPLES)
        values[alive, t] = found.mean(1)
        halves[alive, t] = found[:, ::2].mean(1) - found[:, 1::2].mean(1)
    last = (mask.sum(1, keepdim=True) - 1)
    after[:, :-1], noise_after = values[:, 1:], torch.zeros(mask.shape)
    noise_after[:, :-1] = halves[:, 1:]
    exact = after.scatter(1, last, scores[:, None]) - values
    noise = noise_after.scatter(1, last, torch.zeros(len(last), 1)) - halves  # twice the mean's error

    ids = pad(beginnings, "left")
    critics = ppo.completion_values(critic, *ids, completion_ids, mask)
    more = [ppo.completion_values(load_checkpoint(other, reward)[1], *ids, completion_ids, mask) for other in others]
    rewards = ppo.token_rewards(scores, torch.zeros(mask.shape), mask, 0.0)
    by_ppo, _ = ppo.gae(rewards, critics, mask, 1.0, ppo.Args.gae_lambda)
    by_group = grpo.group_advantages(scores, GROUP)
    by_others = scores - reinforce.baseline(scores, GROUP, "loo")
    return [{"seed": seed, "prompt": rows[i]["prompt"][-1]["content"], "score": scores[i].item(),
             "tokens": [tokenizer.decode([t]) for t in answers[i]], "ppo": by_ppo[i, :n].tolist(),
             "grpo": [by_group[i].item()] * n, "reinforce": [by_others[i].item()] * n, "exact": exact[i, :n].tolist(),
             "noise": (noise[i, :n] / 2).tolist(), "value": critics[i, :n].tolist(),
             "exact_value": values[i, :n].tolist(), **commit(),
             **({"values": [x[i, :n].tolist() for x in more]} if others else {})}
            for i, n in enumerate(mask.sum(1).tolist())]


def other_lambdas(row: dict) -> dict:
    """The critic's advantages at lambda 0, A_t - lambda A_t+1, which are its estimate of the exact credit; and GAE with
    exact values at lambda 0.95, the sum over l of lambda^l (exact credit of t + l) (eq. 16)."""
    lam, after = 0.95, 0.0
    found = {"ppo_0": [a - lam * b for a, b in zip(row["ppo"], [*row["ppo"][1:], 0.0])], "exact_95": []}
    for credit in reversed(row["exact"]):
        after = credit + lam * after
        found["exact_95"].insert(0, after)
    return found


def correlations(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """Correlation of each kind of credit with the exact one, over all tokens and within completions. The latter is 0
    where all tokens of a completion have the same credit."""
    rows = [row | other_lambdas(row) for row in rows]

    def stack(name, center):
        parts = [torch.tensor(row[name], dtype=torch.float64) for row in rows]
        return torch.cat([part - part.mean() if center else part for part in parts])
    found = {}
    for name in COMPARED:
        pairs = [(stack(name, center), stack("exact", center)) for center in (False, True)]
        found[name] = tuple(torch.corrcoef(torch.stack(pair))[0, 1].nan_to_num(0).item()
                            if pair[0].std() > 1e-9 else 0.0 for pair in pairs)
    exact, noise = stack("exact", False), stack("noise", False)
    # correlation between the estimates from either half of the samples: a lower bound for all of them
    found["exact"] = torch.corrcoef(torch.stack([exact + noise, exact - noise]))[0, 1].item(), 1.0
    return found


def draw(rows: list[dict]):
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from plot import COLORS, GRAY, STYLE
    seeds = sorted({row["seed"] for row in rows})
    each = [correlations([row for row in rows if row["seed"] == seed]) for seed in seeds]
    # the example: of those that fit on a line, the one whose exact credit varies most
    shown = max((row for row in rows if 7 <= len(row["tokens"]) <= 16), key=lambda r: statistics.pstdev(r["exact"]))
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        top, bottom = figure.subplots(2, 1, height_ratios=[3, 3])
        most = max(abs(v) for name in NAMES for v in shown[name])
        for y, name in enumerate(NAMES):
            for x, value in enumerate(shown[name]):
                color = COLORS[3] if value > 0 else COLORS[2]
                top.fill_between([x, x + 0.96], -y - 0.9, -y, color=color, alpha=0.08 + 0.8 * abs(value) / most, lw=0)
                top.text(x + 0.48, -y - 0.45, f"{value:+.1f}", ha="center", va="center", fontsize=9,
                         color="white" if abs(value) > 0.4 * most else GRAY)
        top.set_yticks([-y - 0.45 for y in range(len(NAMES))], NAMES.values())
        top.set_xticks([x + 0.48 for x in range(len(shown["tokens"]))],
                       [t.replace("<|end|>", "END").replace("\\n", "NEWLINE") for t in shown["tokens"]])
        top.set(xlim=(0, len(shown["tokens"])), ylim=(-len(NAMES), 0),
                title=f"“{shown['prompt']}”  score {shown['score']:.1f}")
        top.xaxis.tick_top()
        top.grid(False)
        top.tick_params(length=0)
        for spine in ("left", "bottom"):
            top.spines[spine].set_visible(False)
        for y, name in enumerate(COMPARED):
            for offset, (kind, color) in enumerate(zip(("all tokens", "within a completion"), COLORS)):
                values = [one[name][offset] for one in each]
                at = -y - 0.2 - 0.35 * offset
                bottom.barh(at, statistics.fmean(values), 0.3, color=color, label=kind if y == 0 else None)
                bottom.plot(values, [at] * len(values), "|", color=GRAY, markersize=9)
        bottom.set_yticks([-y - 0.38 for y in range(len(COMPARED))], COMPARED.values())
        bottom.set_xlabel("correlation with the exact credit (bars: mean, marks: each seed)")
        bottom.legend(loc="lower right")
        bottom.axvline(0, color=GRAY, lw=0.8)
        figure.savefig(DOCS / "credit.png")
    for seed in seeds:
        own = [row for row in rows if row["seed"] == seed]
        pair = torch.tensor([[v for row in own for v in row[k]] for k in ("value", "exact_value")])
        print(f"seed {seed}: the critic's values and the exact ones: correlation {torch.corrcoef(pair)[0, 1]:.2f}, "
              f"explained variance {1 - (pair[1] - pair[0]).square().mean() / pair[1].var():.2f}")
    for name in each[0]:
        print(f"{name:10}  all tokens {' '.join(f'{one[name][0]:.2f}' for one in each)}  "
              f"within a completion {' '.join(f'{one[name][1]:.2f}' for one in each)}")


CRITICS = {"lambda 0.95": {}, "lambda 1": {"critic_gae_lambda": 1.0},
           "lambda 1, lr 3e-4": {"critic_gae_lambda": 1.0, "critic_lr": 3e-4}}
CRITIC_STEPS = 20, 40, 80


def compare_critics(args: Args):
    """results/critics.jsonl: what critics of the same policy know of its completions, by steps of training."""
    rows, kinds = [], [(name, steps) for name in CRITICS for steps in CRITIC_STEPS]
    with tempfile.TemporaryDirectory() as folder:
        policies = [("ppo", {"seed": seed, "steps": args.steps, "eval_prompts": 0, "save_every": 0,
                             "run_dir": f"{folder}/{seed}"}) for seed in range(args.seeds)]
        critics = [("ppo", {"seed": seed, "model": f"{folder}/{seed}/checkpoint-{args.steps}", "steps": CRITIC_STEPS[-1],
                            "critic_warmup": CRITIC_STEPS[-1], "save_every": CRITIC_STEPS[0], "keep_checkpoints": 99,
                            "lr_schedule": "constant_with_warmup", "eval_prompts": 0,
                            "run_dir": f"{folder}/{name}-{seed}", **flags})
                   for seed in range(args.seeds) for name, flags in CRITICS.items()]
        for jobs in policies, critics:
            for _ in run_all(jobs):
                pass
        for seed in range(args.seeds):
            found = credits_of(f"{folder}/{next(iter(CRITICS))}-{seed}", seed, tuple(
                Path(folder, f"{name}-{seed}", f"checkpoint-{steps}") for name, steps in kinds))
            for i, (name, steps) in enumerate(kinds):
                own = [row | {"value": row["values"][i]} for row in found]
                rows.append({"critic": name, "steps": steps, "seed": seed, **knowledge(own), **commit()})
            write_jsonl(RESULTS / "critics.jsonl", rows)


def knowledge(rows: list[dict]) -> dict:
    """How a critic's values go with the exact ones: explained variance, correlation over all tokens, over the first
    tokens, before which there is the prompt alone, and within completions; and the correlation of its advantages with the exact credit."""
    def correlation(pairs):
        x = torch.tensor(pairs, dtype=torch.float64).T
        return torch.corrcoef(x)[0, 1].nan_to_num(0).item()
    value, exact = ([v for row in rows for v in row[k]] for k in ("value", "exact_value"))
    error = statistics.fmean((a - b) ** 2 for a, b in zip(value, exact))
    within = [(v - statistics.fmean(row["value"]), e - statistics.fmean(row["exact_value"]))
              for row in rows for v, e in zip(row["value"], row["exact_value"])]
    steps = [(b - a, e) for row in rows  # lambda 0: its estimate of the credit
             for a, b, e in zip(row["value"], [*row["value"][1:], row["score"]], row["exact"])]
    return {"explained": 1 - error / statistics.pvariance(exact), "all": correlation(list(zip(value, exact))),
            "first": correlation([(row["value"][0], row["exact_value"][0]) for row in rows]),
            "within": correlation(within), "credit": correlation(steps)}


def critics_table(rows: list[dict]) -> str:
    """As docs/credit.md has it: means over the seeds (lowest to highest)."""
    columns = {"explained": "explained variance of the exact values", "all": "correlation, all tokens",
               "first": "the 10 prompts", "within": "within an answer", "credit": "its credit, lambda 0, with the exact one"}
    lines = ["| critic | steps | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 2) + "|"]
    for name in CRITICS:
        for steps in CRITIC_STEPS:
            own = [row for row in rows if (row["critic"], row["steps"]) == (name, steps)]
            lines.append(f"| {name} | {steps} | " + " | ".join(
                f"{statistics.fmean(row[k] for row in own):.2f} ({min(row[k] for row in own):.2f} to "
                f"{max(row[k] for row in own):.2f})" for k in columns) + " |")
    return "\n".join(lines)


def main(args: Args):
    if args.critics:
        if not args.draw:
            compare_critics(args)
        return show_table("credit.md", "critics", critics_table(read_jsonl(RESULTS / "critics.jsonl")))
    if not args.draw:
        logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            jobs = [("ppo", {"seed": seed, "steps": args.steps, "eval_prompts": 0, "save_every": 0,
                             "run_dir": f"{folder}/{seed}"}) for seed in range(args.seeds)]
            found = [row for job, *_ in run_all(jobs) for row in credits_of(job[1]["run_dir"], job[1]["seed"])]
        write_jsonl(RESULTS / "credit.jsonl", [json.loads(json.dumps(row), parse_float=lambda x: round(float(x), 4))
                                            for row in found])
    draw(read_jsonl(RESULTS / "credit.jsonl"))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
