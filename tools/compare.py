"""Which of two answers is better? A person says, in the terminal, blind and by one key.

Compare two models, whose win rate is printed at the end:

    python tools/compare.py --a runs/grpo/checkpoint --b tiny/policy --out judged.jsonl

Collect pairs, two samples of one model at a time, and train on them:

    python tools/compare.py --data tiny/prompts.jsonl --out pairs.jsonl
    python reward_model.py --data pairs.jsonl --eval-pairs 20

Each judgement is written at once, and the same command goes on after those that are there. --out
holds pairs as reward_model.py and dpo.py read them; pairs.ties.jsonl, beside it, ties and skips.
`row` counts the rows of --data from 1. --judge file.py:function judges in the person's place:

    def judge(prompt, first, second, **columns):  # columns: the others of the data row
        return "1" if len(first) < len(second) else "2"  # or "=", or "s" to skip
"""
import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import sys
import termios
import textwrap
import traceback
import tty
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import (as_messages, context_of, encode_prompts, fail, first_line,  # noqa: E402
                    freeze, join_processes, load_function, load_model, load_tokenizer,
                    read_prompts, wants_bf16, wilson_interval)

CHOICES = "1", "2", "=", "s"


@dataclass
class Args:
    out: str
    """the .jsonl file of pairs, new or to go on with; ties and skips go to a file beside it"""
    a: str = "tiny/policy"
    """a causal LM's folder or hub id"""
    b: str = "tiny/policy"
    """another's, or the same: then two samples of it are compared"""
    data: str = "tiny/heldout.jsonl"
    """rows of prompts: a .jsonl or .jsonl.gz file, or a hub data set
    owner/name[:config][:split]"""
    prompt_column: str = "prompt"
    """the column that holds the prompt: a text, or chat messages"""
    prompts: int = 0
    """how many of them, from the first (0: all)"""
    judge: str = ""
    """file.py:function that judges in the person's place"""
    max_new_tokens: int = 48
    """longest answer, in tokens (256 to 1024 for real models)"""
    temperature: float = 1.0
    """of sampling (0.7 to 1.0)"""
    seed: int = 0
    """of the samples, and of which is shown first"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of matrix products: auto is bfloat16 where it is faster, on a GPU and for large models on
    CPUs that have it"""
    device: str = "auto"
    """auto: a GPU where there is one"""


def load_sampler(name: str, data: list[dict], args: Args, device):
    """sample(i, seed) -> the text of an answer to the prompt of data[i]."""
    tokenizer = load_tokenizer(name)
    model, missing = load_model(AutoModelForCausalLM, name, device)
    if missing:
        fail(f"{name}: no causal LM: it has no weights for {', '.join(sorted(missing)[:3])}")
    room = context_of(model) - args.max_new_tokens
    _, prompts = encode_prompts(tokenizer, data, args.data, room)
    bf16 = wants_bf16(args.dtype, model)
    freeze(model, bf16)
    ends = model.generation_config.eos_token_id or []  # one, or a list: chat models have more
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    model.generation_config = GenerationConfig(  # nothing of the model's own, as in training
        do_sample=True, temperature=args.temperature, top_k=0, top_p=1.0,
        max_new_tokens=args.max_new_tokens, eos_token_id=sorted(ends) or None,
        pad_token_id=tokenizer.pad_token_id)

    def sample(i: int, seed: int) -> str:
        torch.manual_seed(seed)
        ids = torch.tensor([prompts[i]], device=device)
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                output = model.generate(ids, attention_mask=torch.ones_like(ids))
        except RuntimeError as error:  # out of memory, or probabilities that are not finite
            fail(f"{args.data}: row {i + 1}: {name} gave no answer: {first_line(error)[:100]}")
        return tokenizer.decode(output[0, ids.shape[1]:], skip_special_tokens=True)
    return sample


def load_judge(name: str, path: str):
    """judge(number, row, first, second) -> one of CHOICES, by `file.py:function`."""
    if not re.search(r"\.py:\w+$", name):
        fail(f"--judge {name}: name a function, as file.py:function")
    function = load_function(name)

    def judge(number: int, row: dict, first: str, second: str) -> str:
        where = f"--judge {name}: {path}: row {number}:"
        try:
            columns = {k: v for k, v in row.items() if k != "prompt"}
            choice = function(row["prompt"], first, second, **columns)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            fail(f"{where} raised {type(error).__name__}: {first_line(error)} "
                 f"({last.filename}:{last.lineno})")
        if not (isinstance(choice, str) and choice in CHOICES):
            fail(f'{where} must return "1", "2", "=" or "s", not {repr(choice)[:60]}')
        return choice
    return judge


# --- the terminal

@contextlib.contextmanager
def keyboard():
    """Yields a function that waits for a key of the terminal, or takes a character of a pipe:
    "" at its end."""
    if not sys.stdin.isatty():
        yield lambda: sys.stdin.read(1)
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    sys.stdout.reconfigure(errors="replace")  # it may not know every character
    try:
        tty.setcbreak(fd)
        yield lambda: os.read(fd, 64).decode(errors="replace")  # an arrow is several bytes
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def plain(text: str) -> str:
    """A text wrapped to the terminal's width, without characters that would steer it."""
    text = "".join(c if c.isprintable() or c == "\n" else " " if c.isspace() else "\ufffd"
                   for c in text.expandtabs(4))
    width = max(20, shutil.get_terminal_size().columns)
    return "\n".join("\n".join(textwrap.wrap(line, width)) for line in text.split("\n"))


def ask(key, header: str, prompt, first: str, second: str) -> str:
    """One of CHOICES, "q" to stop, or "" at the end of stdin."""
    if sys.stdin.isatty():  # keys pressed before there was something to read judge nothing
        termios.tcflush(sys.stdin, termios.TCIFLUSH)
    turns = [plain(f"{turn['role']}: {turn['content']}") for turn in as_messages(prompt)]
    print("", header, *turns, "--- 1 ---", plain(first), "--- 2 ---", plain(second), sep="\n")
    while True:
        print("which is better? 1, 2, = (equal), s (skip), q (stop): ", end="", flush=True)
        while (pressed := key()).isspace():
            pass
        pressed = "q" if pressed == "\x04" else pressed.strip().lower()  # Ctrl-D
        print(plain(pressed))
        if pressed in (*CHOICES, "q", ""):
            return pressed


# --- the files

def files(args: Args) -> tuple[Path, Path]:
    """The file of pairs, and that of ties and skips."""
    return Path(args.out), Path(args.out).with_suffix(".ties.jsonl")


def judged_before(path: Path, data: list[dict], args: Args, sampled: dict) -> list[dict]:
    """The judgements in a file, which fails unless all are of this comparison. Half a line at
    its end, as a kill leaves, is cut off."""
    content = path.read_bytes() if path.exists() else b""
    end = content.rfind(b"\n") + 1
    rows = []
    for n, line in enumerate(content[:end].splitlines(), 1):
        try:
            row = json.loads(line)
            same_prompt = [r["prompt"] for r in data[row["row"] - 1:][:1]] == [row["prompt"]]
            models = {row[k] for k in row if k.startswith("model_")}
            what = ("models" if models != {args.a, args.b} else "--data" if not same_prompt else
                    f"flags, {row['sampled']}" if row["sampled"] != sampled else "")
        except (ValueError, KeyError, TypeError, AttributeError):
            fail(f"{path}:{n}: no judgement of this program's: name another --out")
        if what:
            fail(f"{path}:{n}: judged with other {what}: name another --out, or the same flags")
        rows.append(row)
    if end < len(content):
        if not content[end:].startswith(b'{"row": '[:len(content) - end]):
            fail(f"{path}: its last line is no judgement of this program's: name another --out")
        os.truncate(path, end)
        print(f"{path}: its last line was half written, and was dropped")
    return rows


def summary(pairs: list[dict], ties: list[dict], args: Args):
    """Prints what the judgements come to."""
    tied, same, skipped = ([row["judgement"] for row in ties].count(x) for x in ("=", "equal", "s"))
    n, wins = len(pairs) + tied + same, sum(row["model_chosen"] == args.a for row in pairs)
    if args.a == args.b:
        print(f"{len(pairs)} pairs collected in {args.out}")
    elif n:
        rate = (wins + (tied + same) / 2) / n
        low, high = wilson_interval(rate, n)
        print(f"win rate of {args.a} over {args.b}: {rate:.4f}, 95 % interval {low:.4f} to "
              f"{high:.4f}: {wins} won, {len(pairs) - wins} lost, a tie counts half")
    print(f"{n} judged, of them {tied + same} tied ({same} not shown: equal texts), "
          f"and {skipped} skipped")
    if pairs:
        firsts = sum(row["judgement"] == "1" for row in pairs)
        low, high = wilson_interval(firsts / len(pairs), len(pairs))
        print(f"the one shown first was chosen {firsts} times of {len(pairs)}: "
              f"{firsts / len(pairs):.4f}, 95 % interval {low:.4f} to {high:.4f}")


def compare(args: Args, data: list[dict], pairs: list, ties: list, judge, sampled: dict, device):
    """Has what is not in pairs or ties judged, and adds it there and to the files.
    Whether all of it was."""
    out, beside = files(args)
    done = {row["row"] for row in pairs + ties}
    left = [i for i in range(len(data)) if i + 1 not in done]
    if done:
        print(f"{out}: {len(pairs)} pairs are there, {len(ties)} ties and skips beside it, and "
              f"{len(left)} prompts are left")
    names = dict.fromkeys([args.a, args.b]) if left else ()  # one of them, if they are the same
    samplers = {name: load_sampler(name, data, args, device) for name in names}
    with contextlib.nullcontext() if judge else keyboard() as key:
        for n, i in enumerate(tqdm(left, leave=False, disable=None if judge else True)):
            seed = (args.seed * 1_000_003 + i) * 2 % 2**63
            answers = [(name, samplers[name](i, seed + side))
                       for side, name in enumerate((args.a, args.b))]
            random.Random(seed).shuffle(answers)
            texts = [text for _, text in answers]
            if texts[0].strip() == texts[1].strip():
                choice = "equal"
            elif judge:
                choice = judge(i + 1, data[i], *texts)
            else:
                choice = ask(key, f"prompt {i + 1} of {len(data)}", data[i]["prompt"], *texts)
            to_go = f"{len(left) - n} of {len(data)} prompts are left: the same command goes on"
            if choice == "":
                fail(f"stdin ended, and {to_go}")
            if choice == "q":
                print(f"stopped, and {to_go}")
                return False
            row = {"row": i + 1, "prompt": data[i]["prompt"]}  # judged_before looks for this start
            row |= {k: data[i][k] for k in ("kind", "family") if k in data[i]}
            is_pair = choice in ("1", "2")
            in_order = answers[::-1] if choice == "2" else answers
            for name, (model, text) in zip(("chosen", "rejected") if is_pair else
                                           ("first", "second"), in_order):
                row |= {name: text, f"model_{name}": model}
            row |= {"judgement": choice, "chosen_by": args.judge or "person", "sampled": sampled}
            (pairs if is_pair else ties).append(row)
            path = out if is_pair else beside
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                fail(f"{path}: not written: {error.strerror}; what was judged before is there")
    return True


def main(args: Args):
    for flag in ("max_new_tokens", "temperature"):
        if not getattr(args, flag) > 0:
            fail(f"--{flag.replace('_', '-')}: must be more than 0")
    if args.prompts < 0:
        fail("--prompts: must not be negative")
    if not args.out.endswith(".jsonl"):
        fail(f"--out {args.out}: must end with .jsonl")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    args.a, args.b = args.a.rstrip("/"), args.b.rstrip("/")
    device = join_processes(args.device)
    judge = load_judge(args.judge, args.data) if args.judge else None
    data = read_prompts(args.data, args.prompt_column)
    sampled = {flag: getattr(args, flag) for flag in ("seed", "temperature", "max_new_tokens")}
    out = Path(args.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = open(out, "a")
    except OSError as error:
        fail(f"--out {out}: cannot be written: {error.strerror}")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--out {out}: another process is writing to it")
        pairs, ties = (judged_before(path, data, args, sampled) for path in files(args))
        data = data[:args.prompts or None]
        if compare(args, data, pairs, ties, judge, sampled, device):
            summary(pairs, ties, args)


if __name__ == "__main__":
    flags = tyro.cli(Args, description=__doc__)
    try:
        main(flags)
    except KeyboardInterrupt:
        print(f"\nstopped by Ctrl-C: what was judged is in {flags.out}; the same command goes on",
              file=sys.stderr)
        sys.exit(130)
