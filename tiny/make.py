"""Rebuilds every file of the tiny world from one seed:

    python tiny/make.py [--out tiny] [--seed 0]

The data and the tokenizer are the same on any machine, bit for bit; the weights depend on the
machine, on the version of torch and, for the reward models, on reward_model.py. The policy is a
small Llama, fine-tuned on good and bad answers. The reward models are trained from it by
`python reward_model.py --epochs 3`, one on the fair and one on the biased labels, on a core each.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast,
                          get_scheduler)

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from common import pad, render  # noqa: E402
from world import CHECK, best_answer, checked, make_data, vocabulary  # noqa: E402

TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
SPECIAL = ["<|pad|>", "<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; a space ends it."""
    words = {word: i for i, word in enumerate(SPECIAL + vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", unk_token="<|unk|>", eos_token="<|end|>",
        additional_special_tokens=SPECIAL[3:], chat_template=TEMPLATE, model_max_length=192,
        clean_up_tokenization_spaces=False)


def supervise(tokenizer, rows: list[dict], seed: int, batch: int = 40) -> LlamaForCausalLM:
    """Maximum likelihood of answers, given their prompts. Two epochs teach the facts: the best
    answers, and what to say when asked whether an answer was right. Three epochs of a mixture of
    good and bad answers follow, which the policy ends up giving."""
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=192, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    print(f"policy: {model.num_parameters():,} parameters")
    rng = random.Random(seed)

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    def example(row: dict, answer: str, learn: bool = True, verdict: str = "") -> tuple:
        """(token ids, labels), with the label -100 where there is nothing to learn."""
        prompt, said = tokens(render(tokenizer, row["prompt"])), tokens(answer + " <|end|>")
        ids, labels = prompt + said, [-100] * len(prompt) + (said if learn else [-100] * len(said))
        if verdict:
            asked, said = tokens(f"<|user|>{CHECK}<|end|><|assistant|>"), tokens(verdict + " <|end|>")
            ids, labels = ids + asked + said, labels + [-100] * len(asked) + said
        return ids, labels

    def facts() -> list[tuple]:
        return [example(row, answer, verdict == "yes .", verdict)
                for row in rows for answer, verdict in [checked(row, rng)]]

    def mixture() -> list[tuple]:
        return [example(row, row["completion"]) for row in rows]

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    phases = [facts] * 2 + [mixture] * 3
    steps = len(phases) * (len(rows) // batch)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=steps)
    start, batches = time.time(), []
    for step in range(steps):
        if not batches:  # a new epoch, in random order, with similar lengths in a batch
            data = phases.pop(0)()
            order = torch.randperm(len(data)).split(batch * 16)
            order = [sorted(part.tolist(), key=lambda i: len(data[i][0])) for part in order]
            batches = [part[i:i + batch] for part in order for i in range(0, len(part), batch)]
            batches = [batches[i] for i in torch.randperm(len(batches)).tolist()]
        part = [data[i] for i in batches.pop()]
        ids, mask = pad([ids for ids, _ in part], "right", pad_id=tokenizer.pad_token_id)
        labels, _ = pad([labels for _, labels in part], "right", pad_id=-100)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"supervised step {step}/{steps}  loss {loss.item():.3f}  {time.time() - start:.0f} s")
    return model


def write_rows(path: Path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["data", "policy", "rewards"], help="make only these files")
    args = parser.parse_args()
    root, out = Path(__file__).parent.parent, args.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)  # another number adds in another order, which changes the last bits
    torch.manual_seed(args.seed)
    data, tokenizer = make_data(args.seed), make_tokenizer()
    if args.only in (None, "data"):
        for name in ("prompts", "heldout", "preferences", "biased_preferences"):
            write_rows(out / f"{name}.jsonl", data[name])
    if args.only in (None, "policy"):
        policy = supervise(tokenizer, data["sft"], args.seed)
        policy.to(torch.bfloat16).save_pretrained(out / "policy")
        tokenizer.save_pretrained(out / "policy")
    if args.only in (None, "rewards"):
        with tempfile.TemporaryDirectory() as runs:
            names = {"reward_model": "preferences", "biased_reward_model": "biased_preferences"}
            running = [subprocess.Popen(  # both at once, on a core each
                [sys.executable, root / "reward_model.py", "--model", out / "policy", "--data",
                 out / f"{labels}.jsonl", "--run-dir", f"{runs}/{name}", "--device", "cpu",
                 "--epochs", "3"],
                cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"})
                for name, labels in names.items()]
            if any([process.wait() for process in running]):
                sys.exit("reward_model.py failed")
            for name in names:
                checkpoint, = Path(runs, name).glob("checkpoint-*")
                AutoModelForSequenceClassification.from_pretrained(
                    checkpoint, dtype=torch.bfloat16).save_pretrained(out / name)
                tokenizer.save_pretrained(out / name)


if __name__ == "__main__":
    main()
