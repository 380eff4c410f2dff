"""Would torch.compile pay? Seconds of one forward and backward pass of the tiny policy over 256 x 48 tokens,
as it is and compiled, and of the first compiled one, which compiles:

    python benchmarks/compile.py
"""
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import load_model  # noqa: E402


def seconds(body, ids) -> float:
    start = time.time()
    body(input_ids=ids, use_cache=False)[0].square().mean().backward()
    return time.time() - start


def main():
    model, _ = load_model(AutoModelForCausalLM, "tiny/policy", "cpu")
    ids = torch.randint(5, model.config.vocab_size, (256, 48))
    compiled = torch.compile(model.base_model, dynamic=True)
    seconds(model.base_model, ids)
    first = seconds(compiled, ids)
    times = [[seconds(body, ids) for body in (model.base_model, compiled)] for _ in range(10)]  # in turn
    plain, fast = map(statistics.median, zip(*times))
    print(f"as it is {plain:.2f} s, compiled {fast:.2f} s ({plain / fast:.2f} times), after {first:.0f} s of compiling")


if __name__ == "__main__":
    main()
