"""A reward for word problems that a small chat model can already earn: an answer takes up at least two of the problem's
numbers. SmolLM2-135M-Instruct on GSM8K (rows with a `question`), on a CPU:

    python grpo.py --model MODEL --reward benchmarks/takes_up_numbers.py:takes_up_numbers --data gsm8k-train.jsonl \
        --prompt-column question --dtype bfloat16 --prompts-per-step 2 --group-size 8 --max-new-tokens 40 \
        --max-prompt-tokens 100 --steps 30 --lr 2e-5 --lr-schedule constant --micro-batch-size 16 --eval-every 0 \
        --log-every 1
"""
import re


def takes_up_numbers(prompts, completions, **columns):
    rewards = []
    for prompt, text in zip(prompts, completions):
        asked, said = (set(re.findall(r"\d+", t.replace(",", ""))) for t in (prompt, text))
        rewards.append(float(len(asked & said) >= min(2, len(asked))))
    return rewards
