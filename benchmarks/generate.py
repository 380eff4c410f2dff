"""Four ways to sample a group of completions of each prompt, in turn, on the same model and prompts:

    python benchmarks/generate.py
    python benchmarks/generate.py --model MODEL --dtype bfloat16 --prompts 8 --group-size 8 --max-new-tokens 64
    python benchmarks/generate.py --model MODEL --dtype bfloat16 --device cuda --prompts 64 --max-new-tokens 256

  ours        the loop that grpo.py, ppo.py and reinforce.py have: a prompt is read once for its group,
              a finished row is dropped from the cache
  generate    model.generate as it comes
  static      model.generate with a static cache: compiled, and on a GPU with CUDA graphs
  continuous  model.generate_batch: paged cache, prefixes shared, finished rows replaced

--fixed-length bars the end of sequence, so that all rows go on to the last token, which is the worst
case for a loop that gains by dropping rows. The first round is warm-up, compilation included, and is
shown apart. Greedy, the ways must write the same tokens; how many rows differ is shown, since in
bfloat16 a tie may fall either way.
"""
import logging
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import grpo  # noqa: E402


@dataclass
class Args:
    model: str = "tiny/policy"
    data: str = "tiny/prompts.jsonl"
    prompt_column: str = "prompt"
    prompts: int = 16
    group_size: int = 16
    max_new_tokens: int = 48
    fixed_length: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    rounds: int = 7
    ways: tuple[Literal["ours", "generate", "static", "continuous"], ...] = (
        "ours", "generate", "static", "continuous")


def main(args: Args):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer = common.load_tokenizer(args.model)
    model, _ = common.load_model(AutoModelForCausalLM, args.model, args.device)
    model = model.to(getattr(torch, args.dtype)).eval()
    rows = common.read_prompts(args.data, args.prompt_column)[:args.prompts]
    _, prompts = common.encode_prompts(tokenizer, rows, args.data, common.context_of(model))
    ids, mask = common.pad(prompts, tokenizer.pad_token_id, "left", args.device)
    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    ends = [] if args.fixed_length else ends if isinstance(ends, list) else [ends]

    def ours(sample: bool) -> list[list[int]]:
        generator = torch.Generator(args.device).manual_seed(0) if sample else None
        out, written = grpo.generate(model, ids, mask, grpo.Args(max_new_tokens=args.max_new_tokens),
                                     args.group_size, ends, tokenizer.pad_token_id, generator)
        return [row[m.bool()].tolist() for row, m in zip(out, written)]

    def settings(sample: bool, **more) -> GenerationConfig:
        return GenerationConfig(
            do_sample=sample, max_new_tokens=args.max_new_tokens,
            num_return_sequences=args.group_size if sample else 1,  # greedy search allows no more
            eos_token_id=ends or None, pad_token_id=tokenizer.pad_token_id,
            **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}), **more)

    def generate(sample: bool, **more) -> list[list[int]]:
        model.generation_config = settings(sample, **more)  # or the model's own fills what is left open
        out = model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1]:].tolist()
        return [row[:next((i for i, token in enumerate(row) if token in ends), len(row)) + 1] for row in out]

    def continuous(sample: bool) -> list[list[int]]:
        out = model.generate_batch(
            prompts, generation_config=settings(sample),
            continuous_batching_config=ContinuousBatchingConfig(seed=0))
        if any(o.error for o in out.values()):
            raise RuntimeError(next(o.error for o in out.values() if o.error))
        by_prompt = [[o.generated_tokens for o in out.values() if o.prompt_ids == prompt] for prompt in prompts]
        return [row for group in by_prompt for row in group]

    ways = {"ours": ours, "generate": generate, "continuous": continuous,
            "static": lambda sample: generate(sample, cache_implementation="static")}
    seconds, tokens, truth = {way: [] for way in args.ways}, {}, None
    for i in range(args.rounds + 1):
        for way in list(seconds):
            start = time.time()
            try:
                with torch.no_grad():
                    rows = ways[way](True)
            except Exception as error:
                print(f"{way:11} does not run here: {type(error).__name__}: {common.first_line(error)[:150]}")
                del seconds[way]
                continue
            if args.device != "cpu":
                torch.cuda.synchronize()
            seconds[way].append(time.time() - start)
            tokens.setdefault(way, []).append(sum(map(len, rows)))
    print(f"{args.model}, {args.dtype}, {args.prompts} prompts x {args.group_size}, up to {args.max_new_tokens} tokens"
          f"{', none ends before' if args.fixed_length else ''}")
    for way, (first, *rest) in seconds.items():
        with torch.no_grad():
            rows = ways[way](False)
        rows = rows[::args.group_size] if way == "ours" else rows  # all of a group's are alike
        truth = truth or rows
        middle = statistics.median(rest)
        print(f"{way:11} median {middle:.3f} s, min {min(rest):.3f}, max {max(rest):.3f}; the first {first:.2f} s; "
              f"{statistics.mean(tokens[way][1:]) / middle:.0f} tokens a second; "
              f"{sum(a != b for a, b in zip(rows, truth))} of {len(truth)} greedy rows differ from the first's")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
