"""Judges pairs of completions by hand in the terminal, blind, with one key per pair.

Compare two models; the win rate is printed at the end:

    python tools/compare.py --a runs/grpo-A/checkpoint-40 --b tiny/policy --out judged.jsonl

Collect preference pairs, two samples of the same model at a time, and train on them:

    python tools/compare.py --data tiny/prompts.jsonl --out pairs.jsonl
    python reward_model.py --data pairs.jsonl --eval-pairs 20

Each judgment is written at once. The same command continues after those already made. --out
holds the pairs in the format of reward_model.py and dpo.py; ties and skips are in
pairs.ties.jsonl beside it. `row` is the row of --data, counted from 1. --judge file.py:function
judges instead of a person:

    def judge(prompt, first, second, **columns):  # columns: the row's other columns
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
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import as_messages, encode_prompts, load_function, load_tokenizer, read_prompts  # noqa: E402
from evaluation import sample_with_generate, wilson_interval  # noqa: E402
from flags import NonNegInt, PosFloat, PosInt, RunArgs, cli  # noqa: E402
from modeling import UserError, context_length, first_line, freeze, load_causal_lm  # noqa: E402
from runtime import Run  # noqa: E402

CHOICES = "1", "2", "=", "s"


@dataclass
class Args:
    out: str
    """.jsonl file for the pairs, new or to continue; ties and skips go to a file beside it"""
    a: str = "tiny/policy"
    """folder or hub id of a causal LM"""
    b: str = "tiny/policy"
    """another one, or the same: then two of its samples are compared"""
    data: str = "tiny/heldout.jsonl"
    """prompts: .jsonl, .jsonl.gz, or hub dataset owner/name[[:config]:split]"""
    prompt_column: str = "prompt"
    """column with the prompt: a string or a list of chat messages"""
    prompts: NonNegInt = 0
    """number of prompts, from the first row on (0: all)"""
    judge: str = ""
    """file.py:function that judges instead of a person"""
    max_new_tokens: PosInt = 48
    """length limit of a completion, in tokens (256 to 1024)"""
    temperature: PosFloat = 1.0
    """sampling temperature (0.7 to 1.0)"""
    seed: int = 0
    """random seed of the samples and of which one is shown first"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of matrix products (auto: bfloat16 where it is faster)"""
    device: str = "auto"
    """cuda, cpu, or auto"""

    resume = ""  # not a flag: cli asks for it
    __post_init__ = RunArgs.__post_init__  # checks the bounds


def load_sampler(name: str, data: list[dict], args: Args):
    """sample(i, seed): a completion of the prompt of data[i]."""
    run = Run(RunArgs(device=args.device, dtype=args.dtype), __file__)
    tokenizer, model = load_tokenizer(name), run.trainable(load_causal_lm(name, run.device))
    freeze(model, run.bf16)
    rows = encode_prompts(tokenizer, data, args.data, context_length(name) - args.max_new_tokens,
                          otherwise="take the prompt out of the file")

    def sample(i: int, seed: int) -> str:
        torch.manual_seed(seed)
        try:
            with run.autocast():
                return sample_with_generate(model, rows[i:i + 1], tokenizer, args.max_new_tokens,
                                            args.temperature).texts[0]
        except RuntimeError as error:  # out of memory, or probabilities that are not finite
            raise UserError(f"{args.data}: row {i + 1}: no completion by {name}: "
                            f"{first_line(error)[:100]}")
    return sample


def load_judge(name: str, path: str):
    """judge(number, row, first, second): one of CHOICES, by `file.py:function`."""
    if not re.search(r"\.py:\w+$", name):
        raise UserError(f"--judge {name}: name a function, as file.py:function")
    function = load_function(name)

    def judge(number: int, row: dict, first: str, second: str) -> str:
        where = f"--judge {name}: {path}: row {number}:"
        try:
            columns = {k: v for k, v in row.items() if k != "prompt"}
            choice = function(row["prompt"], first, second, **columns)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, too
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(f"{where} raised {type(error).__name__}: {first_line(error)} "
                            f"({last.filename}:{last.lineno})")
        if not (isinstance(choice, str) and choice in CHOICES):
            raise UserError(f'{where} must return "1", "2", "=" or "s", not {repr(choice)[:60]}')
        return choice
    return judge


# --- the terminal

@contextlib.contextmanager
def keyboard():
    """Yields a function that waits for a key in a terminal, or reads a character of a pipe; it
    returns "" at the pipe's end."""
    if not sys.stdin.isatty():
        yield lambda: sys.stdin.read(1)
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    sys.stdout.reconfigure(errors="replace")  # the terminal may lack some characters
    try:
        tty.setcbreak(fd)
        yield lambda: os.read(fd, 64).decode(errors="replace")  # an arrow is several bytes
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def plain(text: str) -> str:
    """The text wrapped to the terminal's width, without control characters."""
    text = "".join(c if c.isprintable() or c == "\n" else " " if c.isspace() else "\ufffd"
                   for c in text.expandtabs(4))
    width = max(20, shutil.get_terminal_size().columns)
    return "\n".join("\n".join(textwrap.wrap(line, width)) for line in text.split("\n"))


def ask(key, header: str, prompt, first: str, second: str) -> str:
    """One of CHOICES, "q" to stop, or "" at the end of stdin."""
    if sys.stdin.isatty():  # keys pressed before the pair was shown do not count
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

def judged_before(path: Path, data: list[dict], args: Args, sampled: dict) -> list[dict]:
    """The judgments in a file, which must all be of this comparison. An incomplete last line,
    as a kill leaves it, is cut off."""
    content = path.read_bytes() if path.exists() else b""
    end = content.rfind(b"\n") + 1
    rows = []
    for n, line in enumerate(content[:end].splitlines(), 1):
        try:
            row = json.loads(line)
            same_prompt = [r["prompt"] for r in data[row["row"] - 1:][:1]] == [row["prompt"]]
            models = {row[k] for k in row if k.startswith("model_")}
            other = ("models" if models != {args.a, args.b} else "--data" if not same_prompt else
                     f"flags, {row['sampled']}" if row["sampled"] != sampled else "")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}:{n}: not a judgment of compare.py: name another --out")
        if other:
            raise UserError(f"{path}:{n}: judged with other {other}: name another --out, or use "
                            "the same flags")
        rows.append(row)
    if end < len(content):
        if not content[end:].startswith(b'{"row": '[:len(content) - end]):
            raise UserError(f"{path}: its last line is not a judgment of compare.py: name "
                            "another --out")
        os.truncate(path, end)
        print(f"{path}: its last line was incomplete and was dropped")
    return rows


def summary(pairs: list[dict], ties: list[dict], args: Args):
    """Prints the win rate, or the number of pairs collected."""
    tied, equal, skipped = ([row["judgment"] for row in ties].count(choice)
                            for choice in ("=", "equal", "s"))
    n, wins = len(pairs) + tied + equal, sum(row["model_chosen"] == args.a for row in pairs)
    if args.a == args.b:
        print(f"{len(pairs)} pairs collected in {args.out}")
    elif n:
        rate = (wins + (tied + equal) / 2) / n
        low, high = wilson_interval(rate, n)
        print(f"win rate of {args.a} over {args.b}: {rate:.4f}, 95 % interval {low:.4f} to "
              f"{high:.4f}: {wins} won, {len(pairs) - wins} lost, ties count half")
    print(f"{n} judged, {tied + equal} of them tied ({equal} not shown: equal texts), and "
          f"{skipped} skipped")
    if pairs:
        first = sum(row["judgment"] == "1" for row in pairs)
        low, high = wilson_interval(first / len(pairs), len(pairs))
        print(f"the one shown first was chosen {first} times of {len(pairs)}: "
              f"{first / len(pairs):.4f}, 95 % interval {low:.4f} to {high:.4f}")


def compare(args: Args, data: list[dict], paths: list[Path], pairs: list, ties: list, judge,
            sampled: dict) -> bool:
    """Adds the missing judgments to pairs, ties and their files. True if none is missing then."""
    done = {row["row"] for row in pairs + ties}
    left = [i for i in range(len(data)) if i + 1 not in done]
    if done:
        print(f"{args.out}: has {len(pairs)} pairs, and {len(ties)} ties and skips beside it; "
              f"{len(left)} prompts are left")
    names = dict.fromkeys([args.a, args.b]) if left else ()  # loaded once if they are the same
    samplers = {name: load_sampler(name, data, args) for name in names}
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
            rest = (f"{len(left) - n} of {len(data)} prompts are left; the same command "
                    "continues")
            if choice == "":
                raise UserError(f"stdin ended: {rest}")
            if choice == "q":
                print(f"stopped: {rest}")
                return False
            row = {"row": i + 1, "prompt": data[i]["prompt"]}  # judged_before expects this start
            row |= {k: data[i][k] for k in ("kind", "family") if k in data[i]}
            is_pair = choice in ("1", "2")
            in_order = answers[::-1] if choice == "2" else answers
            for column, (model, text) in zip(("chosen", "rejected") if is_pair else
                                             ("first", "second"), in_order):
                row |= {column: text, f"model_{column}": model}
            row |= {"judgment": choice, "chosen_by": args.judge or "person", "sampled": sampled}
            rows, path = (pairs, paths[0]) if is_pair else (ties, paths[1])
            rows.append(row)
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise UserError(f"{path}: not written: {error.strerror}; earlier judgments are "
                                "safe")
    return True


def main(args: Args):
    if not args.out.endswith(".jsonl") or args.out.endswith(".ties.jsonl"):
        raise UserError(f"--out {args.out}: must end with .jsonl, and not with .ties.jsonl")
    args.a, args.b = args.a.rstrip("/"), args.b.rstrip("/")
    judge = load_judge(args.judge, args.data) if args.judge else None
    data = read_prompts(args.data, args.prompt_column)
    sampled = {flag: getattr(args, flag) for flag in ("seed", "temperature", "max_new_tokens")}
    out = Path(args.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = open(out, "a")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out}: another process is writing to it")
        paths = [out, out.with_suffix(".ties.jsonl")]
        pairs, ties = (judged_before(path, data, args, sampled) for path in paths)
        try:
            if compare(args, data[:args.prompts or None], paths, pairs, ties, judge, sampled):
                summary(pairs, ties, args)
        except KeyboardInterrupt:
            print(f"\nstopped by Ctrl-C: judgments so far are in {out}; the same command "
                  "continues", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    cli(main, Args, __doc__)
