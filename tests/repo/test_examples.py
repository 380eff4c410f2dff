"""The example reward functions do what they say, called as the scripts call them."""
import json
import re
import subprocess
import sys

import torch

import common
from helpers.repo import ROOT

NAME = "examples/takes_up_numbers.py:takes_up_numbers"


def test_takes_up_numbers():
    rows = [{"prompt": "Ann has 3 pens and buys 1,200 more. How many?", "answer": "1203", "prompt_ids": [1]}] * 4
    rows += [{"prompt": "What is 7 + 7?", "answer": "14", "prompt_ids": [1]}] * 2
    rows += [{"prompt": "How many legs has a dog?", "answer": "4", "prompt_ids": [1]}]
    completions = ["3 + 1200 = 1203", "1,200 and 3", "She has 3.", "30 or 12", "7", "14", "four"]
    scores = common.load_reward(NAME, "cpu")(rows, completions)
    assert torch.equal(scores, torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0]))


def test_sums(tmp_path):
    command = [sys.executable, "examples/sums.py", str(tmp_path / "sums.jsonl")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).returncode == 0
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1 and "File exists" in again.stderr
    rows = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    assert len(rows) == 81 == len({row["prompt"][0]["content"] for row in rows})
    for row in rows:
        a, b = map(int, re.findall(r"\d+", row["prompt"][0]["content"]))
        assert row["answer"] == a + b
    rows = [row | {"prompt_ids": [1]} for row in rows[:6]]  # 1 + 1 to 1 + 6
    completions = ["2", "1 + 2 = 3.", "The answer is 4, not 5", "", "6\n7", "07"]
    scores = common.load_reward("examples/sums.py:right", "cpu")(rows, completions)
    assert scores.tolist() == [1, 1, 0, 0, 0, 0]
