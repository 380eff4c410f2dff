"""The example reward functions do what they say, called as the scripts call them."""
import torch

import common

NAME = "examples/takes_up_numbers.py:takes_up_numbers"


def test_takes_up_numbers():
    rows = [{"prompt": "Ann has 3 pens and buys 1,200 more. How many?", "answer": "1203", "prompt_ids": [1]}] * 4
    rows += [{"prompt": "What is 7 + 7?", "answer": "14", "prompt_ids": [1]}] * 2
    rows += [{"prompt": "How many legs has a dog?", "answer": "4", "prompt_ids": [1]}]
    completions = ["3 + 1200 = 1203", "1,200 and 3", "She has 3.", "30 or 12", "7", "14", "four"]
    scores = common.load_reward(NAME, "cpu")(rows, completions)
    assert torch.equal(scores, torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0]))
