"""One step of grpo.py, ppo.py and reinforce.py, worked through on the same four completions.

    python tools/one_step.py                           # prints it
    python tools/one_step.py --out docs/one_step.md    # writes that page
    python tools/one_step.py --seed 7 --row 50         # other completions, of another prompt
    python tools/one_step.py runs/ppo-A                # the credit of each token in a run of your own

The policy is tiny/policy after four steps of grpo.py, so that it differs from the reference. Then main of each of the
three scripts makes one step from it. They have the same seed, so they sample the same completions. The numbers are
what the scripts' own functions are given and give; nothing is computed anew here.

With a run folder of grpo.py, ppo.py or reinforce.py it takes the last checkpoint instead, samples a group of
completions for one prompt of the run's next step, and prints the advantage of each token: as the color of its
background in a terminal (green: it will become more likely; NO_COLOR=1: no colors), otherwise below it; for PPO the
critic's value before each token, too. Writes nothing but --out.
"""
import contextlib
import inspect
import io
import math
import os
import re
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import tyro

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import credit  # noqa: E402
import grpo  # noqa: E402
import ppo  # noqa: E402
import reinforce  # noqa: E402
from common import as_messages, importance_weights, kl_estimate, read_prompts  # noqa: E402
from evaluation import shorten  # noqa: E402

SCRIPTS = grpo, ppo, reinforce
REFERENCE, DATA = "tiny/policy", "tiny/prompts.jsonl"
LR = 1e-4  # of all three, so that their updates can be compared
RECORDED = ("kl_estimate", "kl_loss", "rollout_values", "token_rewards", "gae", "masked_whiten", "group_advantages",
            "baseline", "token_advantages", "rollout_metrics", "completion_logprobs")  # where a script has them
WIDTH = 100  # columns of a terminal


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args:
    run: tyro.conf.Positional[str] = ""
    """run folder (default: the worked example)"""
    row: grpo.PosInt = 94
    """the example's prompt: a line of tiny/prompts.jsonl"""
    seed: int = 3
    """the example's random seed"""
    out: str = ""
    """Markdown file to write the example to"""
    device: str = "auto"
    """cuda, cpu, or auto; the example is always computed on the CPU"""

    resume = ""  # not a flag: cli asks for it
    __post_init__ = credit.Args.__post_init__  # checks the bounds


# --- one step of a script

@dataclass
class Step:
    """What a script's main did in one step."""
    args: object
    calls: dict  # name: [(arguments by name, result)] of the functions in RECORDED
    metrics: dict
    rollout: object
    scores: torch.Tensor  # (B,)
    logprobs: torch.Tensor  # (B, T), of the policy that sampled
    ref_logprobs: torch.Tensor  # (B, T)
    new_logprobs: torch.Tensor  # (B, T), after the update
    advantages: torch.Tensor  # (B,) or (B, T), as policy_loss is given them
    clipped: torch.Tensor  # (B, T), tokens that a second update would clip

    def given(self, name: str, argument: str, call: int = 0):
        """What a function was given for an argument."""
        return self.calls[name][call][0][argument]

    def result(self, name: str, call: int = 0):
        return self.calls[name][call][1]


@contextlib.contextmanager
def recorded(script):
    """The calls of a script's functions while it runs, filled in as they happen."""
    functions = {name: getattr(script, name) for name in RECORDED if hasattr(script, name)}
    calls = {name: [] for name in functions}

    def recorder(name, function):
        def call(*arguments, **keywords):
            result = function(*arguments, **keywords)
            bound = inspect.signature(function).bind(*arguments, **keywords)
            bound.apply_defaults()
            calls[name].append((bound.arguments, result))
            return result
        return call
    for name, function in functions.items():
        setattr(script, name, recorder(name, function))
    try:
        yield calls
    finally:
        for name, function in functions.items():
            setattr(script, name, function)


def train(script, **flags) -> dict:
    """Calls a script's main without its output. Returns its metrics."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), \
            mock.patch("runtime.finish_step_on_interrupt"):  # Ctrl-C ends it at once
        return script.main(script.Args(device="cpu", eval_prompts=0, resumable=False, **flags))[1]


def warm_up(folder: Path) -> str:
    """A policy that is not the reference: four large steps of grpo.py from it. Returns its folder."""
    train(grpo, run_dir=str(folder / "before"), steps=4, prompts_per_step=8, group_size=8, max_new_tokens=16, lr=1e-3)
    return str(folder / "before/checkpoint-4")


def one_step(script, folder: Path, policy: str, data: str, seed: int) -> Step:
    """One step of a script with one update, from a policy and a file with one prompt."""
    flags = dict(model=policy, reference=REFERENCE, data=data, seed=seed, steps=1, prompts_per_step=1, group_size=4,
                 max_new_tokens=8, epochs=1, minibatches=1, lr=LR)
    with recorded(script) as calls:
        metrics = train(script, run_dir=str(folder / script.__name__), **flags)
    given, _ = calls["rollout_metrics"][0]
    rollout, old = given["rollout"], given["logprobs"]
    model = calls["completion_logprobs"][-1][0]["model"]  # updated by now
    new, _ = script.rollout_logprobs(model, rollout, [torch.arange(len(old))])
    args = script.Args(**flags)
    if script is grpo:
        advantages = calls["group_advantages"][0][1]
        _, low, high = grpo.policy_loss(new, old, advantages, rollout.mask, args.loss_type, args.clip_low,
                                        args.clip_high)
    elif script is ppo:
        advantages = calls["masked_whiten"][0][1]
        _, low, high = ppo.policy_loss(new, old, advantages, args.clip_low, args.clip_high)
    else:
        advantages = calls["token_advantages"][0][1]
        _, low, high = reinforce.policy_loss(new, old, advantages, rollout.mask, args.clip_low, args.clip_high)
    return Step(args, calls, metrics, rollout, given["scores"], old, given["ref_logprobs"], new, advantages,
                (low | high) & rollout.mask.bool())


def worked_example(folder: Path, row: int, seed: int) -> tuple[str, dict]:
    """The prompt, and a Step of each script by its name, all from the same rollout."""
    prompts = read_prompts(DATA)
    if row > len(prompts):
        raise grpo.UserError(f"--row: {DATA} has {len(prompts)} lines")
    data = folder / "row.jsonl"
    data.write_text(Path(DATA).read_text(encoding="utf-8").splitlines()[row - 1] + "\n", encoding="utf-8")
    policy = warm_up(folder)
    steps = {script.__name__: one_step(script, folder, policy, str(data), seed) for script in SCRIPTS}
    ids = [step.rollout.completion_ids for step in steps.values()]
    assert all(torch.equal(x, ids[0]) for x in ids), "the scripts have sampled different completions"
    return as_messages(prompts[row - 1]["prompt"])[-1]["content"], steps


# --- the page: headings and paragraphs are strings, tables are lists of rows

def number(x: float) -> str:
    return f"{x + 0.0:.3f}".replace("-0.000", "0.000")


def by_completion(columns: dict) -> list:
    """A table with a row for each completion: name of a column -> (B,) of numbers or texts."""
    columns = {name: column.tolist() if isinstance(column, torch.Tensor) else column
               for name, column in columns.items()}
    rows = [[x if isinstance(x, str) else number(x) for x in row] for row in zip(*columns.values())]
    return [["", *columns]] + [[f"y{i}", *row] for i, row in enumerate(rows, 1)]


def by_token(step: Step, lines: dict) -> list:
    """A table for each completion with a column for each token: name of a line -> (B, T)."""
    tables = []
    for i, mask in enumerate(step.rollout.mask.bool()):
        words = credit.token_texts(step.rollout.tokenizer, step.rollout.completion_ids[i, mask])
        tables.append([[f"y{i + 1}", *(word.strip() for word in words)]])
        tables[-1] += [[name, *map(number, values[i, mask].tolist())] for name, values in lines.items()]
    return tables


def page(prompt: str, steps: dict, args: Args) -> list:
    """The worked example."""
    g, p, r = steps["grpo"], steps["ppo"], steps["reinforce"]
    beta, mask = g.args.beta, g.rollout.mask
    ratios = {name: importance_weights(step.new_logprobs, step.logprobs, math.inf) for name, step in steps.items()}
    changes = {name: (step.new_logprobs - step.logprobs).sum(1) for name, step in steps.items()}
    spans = {name: [f"{number(row[on].min())} to {number(row[on].max())}" + f", {int(cut.sum())} clipped" * bool(
        cut.any()) for row, on, cut in zip(ratio, mask.bool(), steps[name].clipped)] for name, ratio in ratios.items()}
    return [
        "# One step, worked through",
        "One prompt, four completions, and what GRPO, PPO and REINFORCE make of them. `main` of `grpo.py`, `ppo.py` "
        "and `reinforce.py` made one step each, with the same seed, so with the same completions. Every number is "
        "what a function of the scripts was given or gave. The reference `pi_ref` is `tiny/policy`; the policy `pi` "
        "is the same after four steps of `grpo.py` with lr 0.001, so that the KL between them is not 0.",
        "This command prints the page. `--out docs/one_step.md` writes it; `--row` and `--seed` take another prompt "
        "and other completions.",
        "```bash\npython tools/one_step.py\n```",
        "Four symbols look alike. `r` is a completion's score, `r_t` a token's reward, `R_t` PPO's return, and `R` "
        "REINFORCE's score minus its KL. `d_t` is called k1 in `common.py`, `k3_t` k3.",
        "## 1. Generate, 2. score",
        f"The prompt `x` is \"{prompt}\" The reward model gives each completion `y` one score `r(x, y)`.",
        by_completion({"completion y": [shorten(text, 60) for text in g.rollout.texts], "r": g.scores}),
        "## 3. Log-probs and KL",
        "For each token `y_t`, including the end of sequence. `d_t` and `k3_t` are both unbiased estimates of the KL "
        "from the reference; `d_t` may be negative, `k3_t` never is.",
        *by_token(g, {
            "log pi(y_t)": g.logprobs, "log pi_ref(y_t)": g.ref_logprobs,
            "d_t = log pi - log pi_ref": kl_estimate(g.logprobs, g.ref_logprobs),
            "k3_t = exp(-d_t) - 1 + d_t": kl_estimate(g.logprobs, g.ref_logprobs, "k3")}),
        "## 4. Advantages",
        "### GRPO",
        "One advantage for all tokens of a completion: how much better it scored than its group. The KL comes in "
        f"with the loss. The std has the divisor n - 1: here it is {number(g.scores.std())}.",
        by_completion({"r": g.scores, "A = (r - mean of r) / (std of r + 0.0001)": g.advantages}),
        "### PPO",
        f"One advantage for each token. A token's reward `r_t` is minus beta ({beta:g}) times its share of the KL; the "
        "last token also gets the score `r`. The critic, which starts as the reward model, predicts the reward still "
        "to come, `V_t`, before it has read `y_t`, so all four start at the same value. GAE with gamma "
        f"{p.args.gamma:g} (left out of the formulas) and lambda {p.args.gae_lambda:g} adds up how much better things "
        "went than predicted. The critic learns the returns `R_t`. " + whitening(p),
        *by_token(p, {
            "V_t": p.result("rollout_values"),
            "r_t = -beta d_t (+ r)": p.result("token_rewards"),
            "delta_t = r_t + V_(t+1) - V_t": ppo.gae(
                p.result("token_rewards"), p.result("rollout_values"), mask, p.args.gamma, 0.0)[0],
            "A_t = delta_t + lambda A_(t+1)": p.result("gae", 0)[0],
            "A_t, whitened": p.advantages,
            "R_t = A_t + V_t": p.result("gae", 1)[1]}),
        "### REINFORCE",
        f"The KL of the whole completion, with beta {beta:g}, is part of its reward. The baseline `b` is the mean of "
        "the other three (leave-one-out). One advantage for all tokens.",
        by_completion({"r": r.scores, "KL = sum of d_t": r.result("kl_estimate").sum(1),
                       "R = r - beta KL": r.given("baseline", "rewards"), "b = mean of the others' R": r.result(
                           "baseline"), "A = R - b": r.advantages[:, 0]}),
        "## 5. Update",
        "In the first update the policy is still the one that sampled, so every ratio `rho_t = pi(y_t) / pi_old(y_t)` "
        "is 1 and nothing is clipped. The value of a loss then says little: its gradient is what counts.",
        [["", "loss, with the mean over completions y and tokens t", "loss", "gradient norm"],
         ["GRPO", "mean over y of mean over t of (-rho_t A + beta k3_t)", number(g.metrics["loss"]),
          number(g.metrics["grad_norm"])],
         ["PPO", "mean over all t of -rho_t A_t", number(p.metrics["loss"]), number(p.metrics["grad_norm"])],
         ["PPO's critic", "mean over all t of (V_t - R_t)^2 / 2", number(p.metrics["value_loss"]), number(
             p.metrics["critic_grad_norm"])],
         ["REINFORCE", "mean over y of -A sum over t of log pi(y_t)", number(r.metrics["loss"]),
          number(r.metrics["grad_norm"])]],
        f"A gradient longer than {g.args.max_grad_norm:g} is scaled down to that. AdamW makes one update with lr "
        f"{LR:g} (the scripts' own, for whole rollouts of the tiny world, are {grpo.Args.lr:g}, {ppo.Args.lr:g} and "
        f"{reinforce.Args.lr:g}: four completions are fewer). The update changes `log pi(y)`, the sum over the tokens, by:",
        by_completion({"r": g.scores, "log pi(y) before": g.logprobs.sum(1), "GRPO": changes["grpo"],
                       "PPO": changes["ppo"], "REINFORCE": changes["reinforce"]}),
        "If this rollout were used for a second update, its ratios would start here (the lowest to the highest of "
        f"each completion's tokens). GRPO and PPO clip a token's ratio, to {1 - g.args.clip_low:g} or "
        f"{1 + g.args.clip_high:g}, if it has already moved the way that its advantage wants. REINFORCE weights a "
        "completion by the product of its tokens' ratios in such an update, and clips that product: all of its "
        "tokens, or none.",
        by_completion({"GRPO": spans["grpo"], "PPO": spans["ppo"], "REINFORCE": spans["reinforce"]}),
        *(NOTES if (args.row, args.seed) == (Args.row, Args.seed) else []),
        "## Your own run",
        "```bash\npython tools/one_step.py RUN\n```",
        "takes the last checkpoint of a run of `grpo.py`, `ppo.py` or `reinforce.py`, samples a group of completions "
        "for one prompt, and prints each token's advantage: as its color in a terminal, otherwise as a number below "
        "it. For PPO it prints the critic's values, too. [Credit assignment](credit.md) asks whether they are right."]


NOTES = [  # on the example without --row and --seed
    "## What this example shows",
    "`y1` is right and `y3` is wrong, but the reward model scores them nearly alike. No algorithm knows more than its "
    "reward.",
    "GRPO and REINFORCE push alike, since their advantages are nearly proportional. `y1` has an advantage above 0, and "
    "yet becomes less likely: it begins with the same word as `y4`, whose advantage is further below 0. In GRPO each "
    "token also counts by one over the length of its completion, an eighth in `y1` and a fifth in `y4`.",
    "PPO makes `y4`, the worst of the four, more likely, and `y3` less likely. Its critic is a reward model that reads "
    "unfinished sentences, and has not been trained for that: from token to token its values jump by more than the "
    "scores differ, and the advantages with them. Its first updates mostly train the critic "
    "(`--critic-warmup` gives it a head start)."]


def whitening(step: Step) -> str:
    """What it subtracts and divides by, in words."""
    before = step.result("gae", 0)[0][step.rollout.mask.bool()]
    return (f"Whitening subtracts the mean of the {len(before)} advantages, {number(before.mean())}, and divides by their "
            f"std, {number(before.std(correction=0))} (divisor n): "
            f"{int((before > 0).sum())} are above 0 before it, and {int((before > before.mean()).sum())} after it.")


def widths(table: list) -> list[int]:
    return [max(map(len, column)) for column in zip(*table)]


def table_lines(table: list, markdown: bool) -> list[str]:
    """A table as lines: texts to the left, numbers to the right."""
    right = [all(re.fullmatch(r"-?\d+\.\d+", cell) for cell in column[1:]) for column in zip(*table)]
    if markdown:
        table = [[cell.replace("|", r"\|") for cell in row] for row in table]
    rows = [[cell.rjust(n) if to_right else cell.ljust(n) for cell, n, to_right in zip(row, widths(table), right)]
            for row in table]
    if not markdown:
        return ["  ".join(row).rstrip() for row in rows]
    rule = ["-" * (n - 1) + (":" if to_right else "-") for n, to_right in zip(widths(table), right)]
    return [f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]]]


def rendered(blocks: list, markdown: bool) -> str:
    parts = []
    for block in blocks:
        if isinstance(block, list):
            parts.append("\n".join(table_lines(block, markdown)))
        else:
            as_it_is = block.startswith(("#", "```"))
            parts.append(block if as_it_is else textwrap.fill(block, WIDTH, break_on_hyphens=False))
    return "\n\n".join(parts) + "\n"


# --- the credit of a run's tokens

def credit_lines(words: list[str], advantages: list[float], values: list[float], begin: str, colors: bool) -> list[str]:
    """A completion's tokens over their advantages, or in their colors, and over the critic's values (may be
    none), in as many lines as its width takes."""
    lines, largest = [], max(map(abs, advantages), default=0.0) or 1e-6
    while words:
        sizes, room = [], WIDTH - len(begin)
        for word in words:
            room -= max(len(word.strip()), 5) + 1
            if room < 0 and sizes:
                break
            sizes.append(max(len(word.strip()), 5))
        n = len(sizes)
        cells = [word.strip().ljust(size) for word, size in zip(words, sizes)]
        if colors:
            cells = [credit.colored(cell, advantage, largest) for cell, advantage in zip(cells, advantages)]
        lines.append(begin + " ".join(cells))
        rows = ([] if colors else [("A", "+.2f", advantages)]) + ([("V", ".2f", values)] if values else [])
        for name, form, numbers in rows:
            lines.append(name.rjust(len(begin) - 2) + "  " + " ".join(
                format(x, form).ljust(size) for x, size in zip(numbers, sizes)))
        words, advantages, values, begin = words[n:], advantages[n:], values[n:], " " * len(begin)
    return [line.rstrip() for line in lines]


@torch.no_grad()
def show_run(folder: str, device: str):
    """Prints a group of completions of a run's next step with the credit of each token."""
    run, script, models = credit.load_run(folder, device)
    prompts, rollout, scores, advantages = credit.next_step(run, script, models, 1)
    values = torch.zeros(len(scores), 0)
    if "critic" in models:
        with run.autocast():
            values = script.rollout_values(models["critic"], rollout, run.micro_batches(rollout.lengths))
    colors = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(f"{script.__name__}.py, step {run.state['step'] + 1}: {as_messages(prompts[0]['prompt'])[-1]['content']}")
    print("A: advantage" + (" (the color)" if colors else "") + (
        "; V: the critic's value before the token" if "critic" in models else "; there is no critic"))
    for i, mask in enumerate(rollout.mask.bool()):
        words = credit.token_texts(rollout.tokenizer, rollout.completion_ids[i, mask])
        of_tokens = values[i, mask].tolist() if "critic" in models else []
        print("\n".join(credit_lines(words, advantages[i, mask].tolist(), of_tokens, f"{scores[i]:7.2f}  ", colors)))


def main(args: Args):
    if args.run:
        if args.out:
            raise grpo.UserError("--out: only for the worked example, not with a run folder")
        show_run(args.run, args.device)
        return
    if args.out and not Path(args.out).parent.is_dir():
        raise grpo.UserError(f"--out: {Path(args.out).parent}: no such folder")
    out = args.out and Path(args.out).resolve()
    os.chdir(Path(__file__).parent.parent)  # where tiny/ is
    with tempfile.TemporaryDirectory() as folder:
        blocks = page(*worked_example(Path(folder), args.row, args.seed), args)
    if out:
        out.write_text(rendered(blocks, markdown=True), encoding="utf-8")
    else:
        print(rendered(blocks, markdown=False), end="")


if __name__ == "__main__":
    grpo.cli(main, Args, __doc__)
