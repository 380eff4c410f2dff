"""What single parts of a step cost, and what the faster ways of computing them gain:

    python benchmarks/parts.py                                    # the tiny world: below a minute
    python benchmarks/parts.py --model MODEL --dtype bfloat16     # a model of your own
    python benchmarks/parts.py --profile grpo                     # a default training step
    python benchmarks/parts.py --profile grpo --model MODEL       # 8 x 8 completions of 14 tokens

  draw      one random number per row (common.draw) against torch.multinomial, for a batch of completions
  share     a forward pass, and one with backward pass, that reads each prompt once per group, against one that reads
            it once per completion, for several lengths
  compile   token_logprobs as it is, and compiled (--compile), on one chunk
  profile   with --profile SCRIPT: where the CPU time of a training step goes, by operation

Printed are minima over --rounds of CPU time on --threads threads, in milliseconds, and their ratios.
"""
import contextlib
import importlib
import io
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}


@dataclass
class Args:
    model: str = str(ROOT / "tiny/policy")
    dtype: Literal["float32", "bfloat16"] = "float32"
    rows: int = 256
    """completions in a batch, for draw"""
    groups: int = 4
    """prompts in a batch, for share"""
    group_size: int = 16
    lengths: tuple[str, ...] = ("8+48", "16+32", "32+16", "64+16")
    """tokens of a prompt + tokens of a completion, for share"""
    rounds: int = 5
    threads: int = 1
    compile: bool = False
    """also time token_logprobs compiled (needs gcc)"""
    profile: Literal["", "grpo", "ppo", "reinforce", "dpo", "reward_model"] = ""
    """instead: the CPU time of a default step of this script"""
    steps: int = 4
    """steps to profile, after two that are not"""


def cpu_ms(function) -> float:
    start = time.process_time()
    function()
    return 1000 * (time.process_time() - start)


def in_turns(rounds: int, ways: dict) -> dict[str, float]:
    """The minimum of each way's CPU time, in ms. The ways take turns, and the first round is not counted."""
    found = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, way in ways.items():
            ms = cpu_ms(way)
            if i > 0:
                found[name].append(ms)
    return {name: min(ms) for name, ms in found.items()}


def parts(args: Args):
    import torch

    import common
    import modeling
    torch.set_num_threads(args.threads)
    model = modeling.load_causal_lm(args.model, "cpu")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16")
    vocabulary = model.config.get_text_config().vocab_size

    probs, generator = (3 * torch.randn(args.rows, vocabulary)).softmax(-1), torch.Generator().manual_seed(0)
    ms = in_turns(args.rounds, {"draw": lambda: common.draw(probs, generator),
                                "multinomial": lambda: torch.multinomial(probs, 1, generator=generator)})
    print(f"draw     {args.rows} rows, vocabulary {vocabulary}: {ms['draw']:.2f} ms, torch.multinomial "
          f"{ms['multinomial']:.2f} ({ms['multinomial'] / ms['draw']:.1f} times)", flush=True)

    for lengths in args.lengths:
        P, T = map(int, lengths.split("+"))
        prompts = torch.randint(5, vocabulary, (args.groups, P)).repeat_interleave(args.group_size, 0)
        completions = torch.randint(5, vocabulary, (args.groups * args.group_size, T))
        rows = prompts, torch.ones_like(prompts), completions, torch.ones_like(completions)

        def way(share: bool, backward: bool):
            model.cache_is_exact = share
            with torch.set_grad_enabled(backward), autocast:
                logprobs, _ = common.completion_logprobs(model, *rows)
            if backward:
                logprobs.sum().backward()
                model.zero_grad()
        for backward in (False, True):
            ms = in_turns(args.rounds, {"whole": lambda: way(False, backward), "shared": lambda: way(True, backward)})
            print(f"share    {args.groups} x {args.group_size} x ({lengths}) tokens, "
                  f"{'forward and backward' if backward else 'forward'}: {ms['shared']:.0f} ms, each prompt read "
                  f"{args.group_size} times {ms['whole']:.0f} ({ms['whole'] / ms['shared']:.2f} times)", flush=True)

    head = model.get_output_embeddings()
    tokens = min(2048, max(1, common.LOGITS_AT_ONCE // vocabulary))
    hidden = torch.randn(tokens, head.weight.shape[1], requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,))
    functions = {"plain": common.token_logprobs}
    if args.compile:
        functions["compiled"] = torch.compile(common.token_logprobs, dynamic=True)

    def logprobs(function):
        with autocast:
            function(hidden, labels, head, 1.0, False)[0].sum().backward()
    ms = in_turns(args.rounds, {name: lambda f=f: logprobs(f) for name, f in functions.items()})
    print(f"logprobs {tokens} tokens, vocabulary {vocabulary}, forward and backward: "
          + ", ".join(f"{name} {value:.0f} ms" for name, value in ms.items())
          + (f" ({ms['plain'] / ms['compiled']:.2f} times)" if args.compile else ""))


def profile(args: Args):
    """Profiles training steps 3 to 2 + --steps of a script's default run."""
    import torch

    import runtime
    torch.set_num_threads(args.threads)
    script, profiler = importlib.import_module(args.profile), torch.profiler.profile()
    flags = {"eval_every": 0, "save_every": 0, "log_every": 1000}
    if args.profile in ("dpo", "reward_model"):
        flags |= {"eval_pairs": 8} | ({"eval_prompts": 0} if args.profile == "dpo" else {"bias_prompts": 0})
    else:
        flags |= {"eval_prompts": 0, "steps": 2 + args.steps}
    if args.model != Args.model:  # 8 x 8 completions of 14 tokens, rewarded by their length
        flags |= {"model": args.model, "lr": 1e-6, "dtype": args.dtype, "reward": f"{ROOT}/benchmarks/speed.py:length",
                  "prompts_per_step": 8, "group_size": 8, "max_new_tokens": 14}
        flags |= {"critic_lr": 1e-6} if args.profile == "ppo" else {}
    begun, log = [], runtime.Run.log

    def between_steps(run, step, metrics, prefix=""):
        log(run, step, metrics, prefix)
        if not prefix and step == 2:
            begun.append(time.process_time())
            profiler.start()
        if not prefix and step == 2 + args.steps:
            begun.append(time.process_time())
            profiler.stop()
            run.stopped = True
    runtime.Run.log = between_steps
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        script.main(script.Args(**flags, run_dir=f"{folder}/run"))
        lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
        lines = [line for line in lines if '"loss"' in line]
    runtime.Run.log = log
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    products = sum(event.self_cpu_time_total for event in events if event.key in PRODUCTS)
    rows = [json.loads(line) for line in lines][2:]
    parts = [f"{name.removeprefix('seconds_')} {sum(row[name] for row in rows) / len(rows):.3f}"
             for name in rows[0] if name.startswith("seconds_")]
    print(f"{args.profile}: seconds of a step by part: {', '.join(parts)}")
    print(f"{args.profile}: {(begun[1] - begun[0]) / args.steps:.3f} CPU seconds per step under the profiler, "
          f"{sum(event.count for event in events) // args.steps} operations, {products / total:.0%} of the time in "
          "matrix products")
    for event in events[:15]:
        print(f"{event.self_cpu_time_total / total:6.1%} {event.count // args.steps:7} times a step  {event.key[:70]}")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    profile(args) if args.profile else parts(args)
