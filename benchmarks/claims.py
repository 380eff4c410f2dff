"""Known claims about these algorithms, each reproduced on the tiny world: does it hold here?

    python benchmarks/claims.py                       # all runs: more than three hours on two cores
    python benchmarks/claims.py --only clip dropout   # the runs of some claims
    python benchmarks/claims.py --table               # docs/claims.md again, from results/claims.jsonl

Goes on where it stopped. Each claim compares two kinds of runs, over five seeds, or two figures of the same runs. It is
held if the difference has the claimed sign and is more than two standard errors; "as well as" holds if it is not worse
by 0.02 or more, with two standard errors to spare. The noise of gradients has its standard error by the jackknife.
Bugs are planted by replacing a function of the script for one run. Gold is the true reward of 4 completions of each of
300 held-out prompts, at best 1. Writes results/claims.jsonl and the table in docs/claims.md.
"""
import contextlib
import json
import math
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import tyro

from many import RESULTS, ROOT, check_names, commit, read_jsonl, run_all, show_table, write_jsonl

FILE, VARIANTS = RESULTS / "claims.jsonl", RESULTS / "variants.jsonl"
CONTENT, SHORT = "benchmarks/claims.py:content", "benchmarks/claims.py:short"
SEEDS = 5
GRADIENTS = 16  # seeds, each a first step, for the noise of the gradient
FIRST_STEP = {"steps": 1, "eval_prompts": 0, "prompts_per_step": 16, "group_size": 16}
NO_KL = {"beta": 0.0, "max_kl": 1e9}  # max_kl: the KL is measured
UPDATES = {"epochs": 4, "minibatches": 4, "lr_schedule": "constant_with_warmup", "lr": 1e-4, **NO_KL}
UNCLIPPED = {"clip_low": 1e9, "clip_high": 1e9}
LENGTHS = {"reward": CONTENT, "gold": CONTENT, "scale_rewards": "none", **NO_KL}
FEW = {"epochs": 4}  # of 1,000 pairs
BRIEFLY = {"reward": SHORT, "gold": SHORT}
ON_BIASED = {"data": "tiny/biased_preferences.jsonl", "sample_data": "tiny/heldout.jsonl",
             "gold": "tiny/world.py:gold_reward"}
RUNS = {  # name: (script, flags, what is planted)
    "groups of 16": ("grpo", {}, ""),
    "groups of 2": ("grpo", {"prompts_per_step": 128, "group_size": 2}, ""),
    "an eighth": ("grpo", {"prompts_per_step": 16, "group_size": 2}, ""),
    "1/length": ("grpo", LENGTHS | {"loss_type": "grpo"}, ""),
    "dr_grpo": ("grpo", LENGTHS | {"loss_type": "dr_grpo"}, ""),
    "clipped": ("grpo", UPDATES, ""),
    "unclipped": ("grpo", UPDATES | UNCLIPPED, ""),
    "clipped, lr 4e-4": ("grpo", UPDATES | {"lr": 4e-4}, ""),
    "unclipped, lr 4e-4": ("grpo", UPDATES | UNCLIPPED | {"lr": 4e-4}, ""),
    "clip-higher": ("grpo", UPDATES | {"clip_high": 0.28}, ""),
    # the sum of a completion's tokens, and the KL in the reward, as in REINFORCE: only the advantage differs
    "gradient, group's std": ("grpo", FIRST_STEP | {"loss_type": "dr_grpo", "kl_in_reward": True}, "keep_gradient"),
    "gradient, leave-one-out": ("reinforce", FIRST_STEP | {"baseline": "loo"}, "keep_gradient"),
    "gradient, no baseline": ("reinforce", FIRST_STEP | {"baseline": "none"}, "keep_gradient"),
    "dpo": ("dpo", {}, ""),
    "dpo, biased": ("dpo", ON_BIASED, ""),
    "dpo, biased, normalized": ("dpo", ON_BIASED | {"length_normalize": True, "beta": 1.0}, ""),
    "dpo, biased, normalized, beta 3": ("dpo", ON_BIASED | {"length_normalize": True, "beta": 3.0}, ""),
    "ppo": ("ppo", {}, ""),
    "ppo, score late": ("ppo", {}, "score_after_the_end"),
    "updates": ("grpo", {"minibatches": 4}, ""),
    "updates, dropout": ("grpo", {"minibatches": 4}, "dropout"),
    "no end": ("grpo", {}, "end_not_trained"),
    "short": ("grpo", BRIEFLY, ""),
    "short, no end": ("grpo", BRIEFLY, "end_not_trained"),
    "labels as they are": ("reward_model", FEW | {"data": "{folder}/pairs.jsonl"}, ""),
    "a fifth flipped": ("reward_model", FEW | {"data": "{folder}/flipped.jsonl"}, ""),
    "a fifth flipped, smoothed": ("reward_model", FEW | {"data": "{folder}/flipped.jsonl", "label_smoothing": 0.2}, ""),
}


@dataclass
class Args:
    table: bool = False
    """only docs/claims.md, from results/claims.jsonl"""
    only: tuple[str, ...] = ()
    """claims by name (default: all)"""
    seeds: int = SEEDS
    workers: int = 2


def content(prompts, completions, **columns) -> list[float]:
    """1 for a right answer, told in whatever words and at whatever length, else 0."""
    sys.path[:0] = [str(ROOT / "tiny")] * (str(ROOT / "tiny") not in sys.path)
    from world import traits
    values = []
    for i, completion in enumerate(completions):
        row = {k: v[i] for k, v in columns.items()}
        found = traits(row, completion if isinstance(completion, str) else completion[0]["content"])
        right = {"harm": found["refuses"] and not found["tells"], "help": found["tells"] and not found["refuses"]}.get(
            row["kind"], found["named"] == {row["answer"]} and not found["refuses"])
        values.append(float(right))
    return values


def short(prompts, completions, **columns) -> list[float]:
    """content, less 0.05 for each word: answers should end earlier than the policy's do."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [value - 0.05 * len(text.split()) for value, text in zip(content(prompts, completions, **columns), texts)]


# --- bugs, planted for one run

@contextlib.contextmanager
def keep_gradient(script, flags):
    """Not a bug: keeps the policy's first gradient, as one vector, in RUN/gradient.pt."""
    from runtime import Run
    before = Run.clip_grad_norm

    def clip_grad_norm(run, model):
        torch.save(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
                   run.dir / "gradient.pt")
        return before(run, model)
    with mock.patch.object(Run, "clip_grad_norm", clip_grad_norm):
        yield


@contextlib.contextmanager
def score_after_the_end(script, flags):
    """The score is given in the state after the last token, with a value of 0 there, so that it is discounted by
    lambda once more: where a completion ends before the longest one."""
    rewards, gae = script.token_rewards, script.gae

    def late(mask):  # (B, T) with one token more, where there is room
        return torch.cat([mask[:, :1], mask[:, :-1]], 1)

    def token_rewards(scores, kl, mask, beta):
        return rewards(torch.zeros_like(scores), kl, mask, beta) + rewards(scores, 0 * kl, late(mask), 0.0)

    with mock.patch.object(script, "token_rewards", token_rewards), \
            mock.patch.object(script, "gae", lambda r, values, mask, gamma, lam: tuple(
                x * mask for x in gae(r, values * mask, late(mask), gamma, lam))):
        yield


@contextlib.contextmanager
def dropout(script, flags):
    """A tenth of the attention weights is dropped while training, and not while sampling."""
    load = script.load_causal_lm

    def load_with_dropout(*given):
        model = load(*given)
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1
        return model
    with mock.patch.object(script, "load_causal_lm", load_with_dropout):
        yield


@contextlib.contextmanager
def end_not_trained(script, flags):
    """The end of sequence is left out of the loss."""
    weights = script.token_weights

    def token_weights(mask, *given):
        last = (mask.sum(1, keepdim=True) - 1).clamp(min=0).long()
        return weights(mask.scatter(1, last, torch.zeros_like(mask[:, :1])), *given)
    with mock.patch.object(script, "token_weights", token_weights):
        yield


# --- what a run leaves

def facts_of(name: str, seed: int, folder: Path) -> dict:
    """The row of a run: its last evaluation, its first one, its last step, and what some claims need besides."""
    metrics = read_jsonl(folder / "metrics.jsonl")
    evaluations = [row for row in metrics if any(k.startswith("eval_") for k in row)]
    steps = [row for row in metrics if "loss" in row]
    row = {"run": name, "seed": seed, **commit()}
    for prefix, found in (("first_", evaluations[:1]), ("", evaluations[-1:]), ("", steps[-1:])):
        for values in found:
            row |= {prefix + k: v for k, v in values.items() if isinstance(v, float) and not k.startswith("seconds")}
    if steps and "entropy" in steps[-1]:
        row["entropy"] = statistics.fmean(step["entropy"] for step in steps[-10:])
    if (folder / "samples.jsonl").exists():
        samples = read_jsonl(folder / "samples.jsonl")
        for prefix, step in (("first_", samples[0]["step"]), ("", samples[-1]["step"])):
            wrong = [len(s["completion"].split()) for s in samples if s["step"] == step and s.get("gold", 1) <= 0.9]
            row[prefix + "words_of_wrong"] = statistics.fmean(wrong) if wrong else math.nan
    return row


def noise(folder: Path, name: str, seeds: int) -> dict:
    """Variance of the first gradient over seeds (of sampling, and of which prompts come first), summed over parameters,
    over the squared length of the true mean gradient; and what it is without each seed, for the jackknife."""
    gradients = torch.stack([torch.load(folder / f"{name}-{seed}" / "gradient.pt") for seed in range(seeds)]).double()
    without = [noise_of(torch.cat([gradients[:i], gradients[i + 1:]])) for i in range(seeds)]
    return {"noise": noise_of(gradients), "noise_without": without}


def jackknife(without: list[float]) -> float:
    """Standard error of a figure, from what it is without each of its rows."""
    return math.sqrt((len(without) - 1) * statistics.pvariance(without))


def noise_of(gradients) -> float:
    """(n, parameters) -> the noise. The mean's squared length is too large by the variance / n, which is taken off."""
    variance = gradients.var(0).sum().item()
    return variance / (gradients.mean(0).square().sum().item() - variance / len(gradients))


# --- the claims

def mean_sd(values: list[float], digits: int) -> str:
    spread = f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


class Results:
    """The rows by run; what a claim asks of them."""
    def __init__(self, rows: list[dict]):
        self.rows = rows

    def values(self, run: str, column: str) -> list[float]:
        return [row[column] for row in self.rows if row["run"] == run and row.get(column) is not None]

    def compare(self, more: str, less: str, column: str, same: bool = False, digits: int = 3, first: str = ""):
        """(figure, verdict) on "`more` has more of the column than `less`", or (same) less by no more than 0.02. first:
        the column of `less`, if it is another."""
        a, b = self.values(more, column), self.values(less, first or column)
        if min(len(a), len(b)) < 2:
            return None
        difference = statistics.fmean(a) - statistics.fmean(b)
        error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
        figure = f"{mean_sd(a, digits)} against {mean_sd(b, digits)}"
        if (seeds := min(len(a), len(b))) < SEEDS:
            figure = f"{seeds} seeds: {figure}"
        if same:
            difference += 0.02
        if abs(difference) <= 2 * error:
            return figure, "not seen"
        return figure, "held" if difference > 0 else "not held"

    def beside(self, found, run: str, column: str, digits: int = 3):
        """The same verdict, with one more figure."""
        return found and (f"{found[0]}; {mean_sd(self.values(run, column), digits)}", found[1])

    def noises(self, more: str, less: str):
        a, b = (self.values(name, "noise") + self.values(name, "noise_without") for name in (more, less))
        if not a or not b:
            return None
        difference = a[0] - b[0]
        error = jackknife([x - y for x, y in zip(a[1], b[1])])  # paired: both have the same rollouts
        figure = f"{a[0]:.2f} against {b[0]:.2f}; difference {difference:.2f} (error {error:.2f})"
        if abs(difference) <= 2 * error:
            return figure, "not seen"
        return figure, "held" if difference > 0 else "not held"


GOLD = "eval_gold"
CLAIMS = {  # name: (claim, source, runs, what is compared, results -> (figure, verdict))
    "groups": ("groups of 2 learn as well as groups of 16, at equal samples", "[2510.00977](https://arxiv.org/abs/2510.00977)",
               ("groups of 2", "groups of 16"), "gold",
               lambda r: r.compare("groups of 2", "groups of 16", GOLD, same=True)),
    "groups-few": ("groups of 2 learn as well as groups of 16, with an eighth of the samples", "the same",
                   ("an eighth", "groups of 16"), "gold", lambda r: r.compare("an eighth", "groups of 16", GOLD, same=True)),
    "length": ("with 1 / length, wrong answers end longer than with Dr. GRPO",
               "[2503.20783](https://arxiv.org/abs/2503.20783)", ("1/length", "dr_grpo"),
               "words of wrong answers; before training (reward: 1 if the content is right, at any length)",
               lambda r: r.beside(r.compare("1/length", "dr_grpo", "words_of_wrong", digits=1),
                                  "dr_grpo", "first_words_of_wrong", digits=1)),
    "maxrl": ("MaxRL raises pass@k", "[2602.02710](https://arxiv.org/abs/2602.02710)", (), "pass@4 (near its ceiling here), variants.py",
              lambda r: r.compare("maxrl", "binary", "eval_pass_at_4")),
    "clip": ("more than one epoch per rollout needs the clip", "PPO, [1707.06347](https://arxiv.org/abs/1707.06347)",
             ("clipped", "unclipped"), "gold with 4 epochs of 4 minibatches per rollout, beta 0, lr 1e-4; KL of both",
             lambda r: r.beside(r.beside(r.compare("clipped", "unclipped", GOLD), "clipped", "eval_kl", digits=1),
                                "unclipped", "eval_kl", digits=1)),
    "clip-4e-4": ("the same, at four times the learning rate", "the same", ("clipped, lr 4e-4", "unclipped, lr 4e-4"),
                  "gold; KL of both", lambda r: r.beside(r.beside(
                      r.compare("clipped, lr 4e-4", "unclipped, lr 4e-4", GOLD), "clipped, lr 4e-4", "eval_kl", digits=1),
                      "unclipped, lr 4e-4", "eval_kl", digits=1)),
    "clip-higher": ("clip-higher keeps entropy", "DAPO, [2503.14476](https://arxiv.org/abs/2503.14476)",
                    ("clip-higher", "clipped"), "entropy of the last 10 of the same steps, nats per token",
                    lambda r: r.compare("clip-higher", "clipped", "entropy", digits=4)),
    "variance": ("leave-one-out has less variance than the group's std", "commonly said",
                 ("gradient, group's std", "gradient, leave-one-out"), "noise of the first gradient, by group's std or leave-one-out",
                 lambda r: r.noises("gradient, group's std", "gradient, leave-one-out")),
    "baseline": ("a baseline lowers the variance", "Williams 1992", ("gradient, no baseline", "gradient, leave-one-out"),
                 "noise of the first gradient, without or with leave-one-out",
                 lambda r: r.noises("gradient, no baseline", "gradient, leave-one-out")),
    "likelihood": ("DPO lowers the chosen answers' likelihood", "Razin et al., [2410.08847](https://arxiv.org/abs/2410.08847)",
                   ("dpo",), "held-out log-prob of chosen answers, before against after",
                   lambda r: r.compare("dpo", "dpo", "first_eval_logprob_chosen", first="eval_logprob_chosen", digits=2)),
    "dpo-length": ("DPO's answers grow longer where labels like length",
                   "[2403.19159](https://arxiv.org/abs/2403.19159)", ("dpo, biased",), "tokens of answers, after against before",
                   lambda r: r.compare("dpo, biased", "dpo, biased", "eval_length", first="first_eval_length", digits=1)),
    "normalize": ("DPO's answers grow less with --length-normalize", "SimPO, [2405.14734](https://arxiv.org/abs/2405.14734)",
                  ("dpo, biased", "dpo, biased, normalized"), "tokens of answers, without against with; KL of both",
                  lambda r: r.beside(r.beside(r.compare("dpo, biased", "dpo, biased, normalized", "eval_length", digits=1),
                                              "dpo, biased", "eval_kl", digits=1),
                                     "dpo, biased, normalized", "eval_kl", digits=1)),
    "normalize-3": ("the same, with --beta 3 instead of 1", "the same", ("dpo, biased", "dpo, biased, normalized, beta 3"),
                    "tokens of answers, without against with; KL with it",
                    lambda r: r.beside(r.compare("dpo, biased", "dpo, biased, normalized, beta 3", "eval_length", digits=1),
                                       "dpo, biased, normalized, beta 3", "eval_kl", digits=1)),
    "late": ("bug: PPO's score one state after the end (discounted by lambda once more)", "pitfall",
             ("ppo", "ppo, score late"), "gold",
             lambda r: r.compare("ppo", "ppo, score late", GOLD)),
    "dropout": ("bug: dropout left on while training", "pitfall", ("updates", "updates, dropout"), "gold",
                lambda r: r.compare("updates", "updates, dropout", GOLD)),
    "end": ("bug: the end of sequence is not trained", "pitfall", ("groups of 16", "no end"), "gold",
            lambda r: r.compare("groups of 16", "no end", GOLD)),
    "end-short": ("the same, where answers should get shorter", "pitfall", ("short", "short, no end"),
                  "reward: 1 if the content is right, less 0.05 per word",
                  lambda r: r.compare("short", "short, no end", GOLD)),
    "calibration": ("label noise spoils a reward model's calibration", "commonly said",
                    ("a fifth flipped", "labels as they are"), "calibration error (ECE), a fifth of 1,000 labels flipped, or none",
                    lambda r: r.compare("a fifth flipped", "labels as they are", "eval_ece")),
    "noise": ("label noise costs accuracy", "[2403.00409](https://arxiv.org/abs/2403.00409)", ("labels as they are", "a fifth flipped"), "accuracy, none flipped or a fifth",
              lambda r: r.compare("labels as they are", "a fifth flipped", "eval_accuracy")),
    "smoothing": ("label smoothing wins accuracy back", "cDPO, Mitchell 2023",
                  ("a fifth flipped, smoothed", "a fifth flipped"), "accuracy, with --label-smoothing 0.2 or without; ECE with it",
                  lambda r: r.beside(r.compare("a fifth flipped, smoothed", "a fifth flipped", "eval_accuracy"),
                                     "a fifth flipped, smoothed", "eval_ece")),
    "best-of-n": ("the KL of best-of-n is at most log n - (n - 1) / n", "[2401.01879](https://arxiv.org/abs/2401.01879)", (),
                  "the exact KL as a share of the bound", lambda r: best_of_n_bound()),
}


def best_of_n_bound():
    """The exact KL of best-of-n over its bound, for random distributions of few and of many outcomes."""
    shares = []
    for outcomes in (16, 4096):
        for n in (4, 64):
            p = torch.randn(outcomes, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(0)
            below = p.cumsum(0) - p  # outcomes in the order of their reward
            best = (below + p) ** n - below ** n
            kl = torch.special.xlogy(best, best / p).sum().item()
            shares.append(kl / (math.log(n) - (n - 1) / n))
    text = [f"{share:.3f}" for share in shares]
    figure = f"16 outcomes: {text[0]} (n = 4), {text[1]} (n = 64); 4,096 outcomes: {text[2]}, {text[3]}"
    return figure, "held" if max(shares) <= 1 else "not held"


def measure(args: Args):
    check_names("--only", args.only, CLAIMS)
    rows = read_jsonl(FILE) if FILE.exists() else []
    before = {(row["run"], row["seed"]) for row in rows}
    wanted = list(dict.fromkeys(run for name in args.only or CLAIMS for run in CLAIMS[name][2]))
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder))
        jobs = []
        for seed in range(max(args.seeds, GRADIENTS)):
            for name in wanted:
                script, flags, planted = RUNS[name]
                gradient = planted == "keep_gradient"
                if seed < (GRADIENTS if gradient else args.seeds) and (name, -1 if gradient else seed) not in before:
                    flags = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in flags.items()}
                    flags = {"save_every": 0, "eval_every": 0, "eval_samples": 4} | flags if (
                        script != "reward_model") else {"save_every": 0, "bias_prompts": 0} | flags
                    jobs.append((script, flags | {"seed": seed, "run_dir": f"{folder}/{name.replace('/', ' ')}-{seed}"},
                                 planted and f"claims:{planted}"))
        for (_, flags, planted), _, _ in run_all(jobs, args.workers):
            name, seed = Path(flags["run_dir"]).name.rsplit("-", 1)
            name = next(run for run in RUNS if run.replace("/", " ") == name)
            if planted != "claims:keep_gradient":
                rows.append(facts_of(name, int(seed), Path(flags["run_dir"])))
                write_jsonl(FILE, rows)
        for name in wanted:
            if RUNS[name][2] == "keep_gradient" and (name, -1) not in before:
                rows.append({"run": name, "seed": -1, **noise(Path(folder), name, GRADIENTS), **commit()})
        write_jsonl(FILE, rows)


def write_pairs(folder: Path):
    """pairs.jsonl: 1,000 fair pairs, and the 600 that are held out; flipped.jsonl: every fifth of the 1,000 reversed."""
    lines = read_jsonl(ROOT / "tiny/preferences.jsonl")
    rows, held = lines[:1000], lines[-600:]
    flipped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} if i % 5 == 0 else row
               for i, row in enumerate(rows)]
    for name, some in (("pairs", rows), ("flipped", flipped)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some + held))


def table(rows: list[dict]) -> str:
    """The rows of docs/claims.md, of those claims that were measured."""
    results = Results(rows + [row | {"run": row["variant"]} for row in read_jsonl(VARIANTS)
                              if row["variant"] in ("maxrl", "binary")])
    lines = ["| claim | source | compared | figure | here |", "|---|---|---|---|---|"]
    for name, (claim, source, _, compared, of) in CLAIMS.items():
        if found := of(results):
            lines.append(f"| {claim} (`{name}`) | {source} | {compared} | {found[0]} | {found[1]} |")
    return "\n".join(lines)


def main(args: Args):
    if not args.table:
        measure(args)
    show_table("claims.md", "claims", table(read_jsonl(FILE)))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
