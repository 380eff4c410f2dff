"""A judge for tools/compare.py: the answer that a reward model scores higher wins.

    python tools/compare.py --data tiny/prompts.jsonl --prompts 480 --judge examples/judge.py:by_reward_model --out pairs.jsonl

It collects pairs of answers sampled from one model, on which dpo.py trains: iterative DPO, docs/usage.md.
"""
import os
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import load_reward  # noqa: E402

load = cache(load_reward)


def by_reward_model(prompt, first, second, **columns):
    reward = load(os.environ.get("JUDGE", "tiny/reward_model"), "cpu")
    a, b = reward([{"prompt": prompt}] * 2, [first, second]).tolist()
    return "=" if a == b else "1" if a > b else "2"
