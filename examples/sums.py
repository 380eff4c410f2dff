r"""A real chat model learns one-digit sums in minutes: a first run with a model of your own.

    python examples/sums.py                             # writes sums.jsonl: 81 prompts
    python grpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data sums.jsonl --reward examples/sums.py:right \
        --eval-data sums.jsonl --eval-prompts 81 --prompts-per-step 8 --group-size 8 --max-new-tokens 14 \
        --steps 24 --lr 1e-5 --lr-schedule constant_with_warmup --beta 0.02 --log-every 1 --eval-every 8

The reward is 1 if the last number of an answer is right. A small model knows the sums, but says them in so many ways
that few of its sampled answers end with the right number: the reward picks one way.
"""
import json
import re
import sys
from pathlib import Path


def rows() -> list[dict]:
    """The sums of two digits from 1 to 9."""
    return [{"prompt": [{"role": "user", "content": f"What is {a} + {b}? Reply with the number only."}],
             "answer": a + b} for a in range(1, 10) for b in range(1, 10)]


def right(completions, answer, **columns) -> list[float]:
    """1 for each completion whose last number is the row's answer, else 0."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(re.findall(r"\d+", text)[-1:] == [str(number)]) for text, number in zip(texts, answer)]


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[-1].startswith("-"):
        sys.exit(__doc__)
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "sums.jsonl")
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows())
    except OSError as error:
        sys.exit(f"error: {path}: {error.strerror}: name another file")
    print(f"wrote {path}: {len(rows())} prompts")
