r"""An example reward function: an answer to a word problem earns 1 if it uses at least two of the
problem's numbers, otherwise 0. A small chat model can already earn it. Copy this file to start
your own.

    python grpo.py --reward examples/takes_up_numbers.py:takes_up_numbers \
        --model HuggingFaceTB/SmolLM2-135M-Instruct --data openai/gsm8k:main:train \
        --prompt-column question --max-prompt-tokens 100 --max-new-tokens 40 \
        --prompts-per-step 2 --group-size 8 --steps 30 --lr 2e-5 \
        --lr-schedule constant_with_warmup --dtype bfloat16 --eval-prompts 50 --log-every 1

(--data openai/gsm8k:main:train needs `pip install datasets`; a .jsonl file with the column
`question` works as well.)
"""
import re


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+", text.replace(",", "")))


def takes_up_numbers(prompts, completions, **columns) -> list[float]:
    """One number for each completion. columns: the data's other columns, such as answer; None
    instead of a number leaves a completion out."""
    rewards = []
    for prompt, completion in zip(prompts, completions):
        in_prompt = numbers(prompt)
        used = in_prompt & numbers(completion)
        rewards.append(float(len(used) >= min(2, len(in_prompt))))
    return rewards
