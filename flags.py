"""The command line: flags that the scripts share, what is said about a wrong one, and the JSON
files that keep them."""
import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import torch.distributed as dist
import tyro

from modeling import UserError, first_line

# --- flags

BOUNDS = {"more than 0": lambda x: x > 0, "at least 0": lambda x: x >= 0,
          "from 0 to 1": lambda x: 0 <= x <= 1, "from 0 to below 0.5": lambda x: 0 <= x < 0.5}
PosInt, PosFloat = Annotated[int, "more than 0"], Annotated[float, "more than 0"]
NonNegInt, NonNegFloat = Annotated[int, "at least 0"], Annotated[float, "at least 0"]
Fraction, Smoothing = Annotated[float, "from 0 to 1"], Annotated[float, "from 0 to below 0.5"]

KINDS = {int: (int, "a whole number"), float: ((int, float), "a number"),
         str: ((str, Callable), "text"), bool: (bool, "True or False")}  # a reward is callable


@dataclass
class RunArgs:
    """Flags of all scripts."""
    prompt_column: str = "prompt"
    """column with the prompt: a string or a list of chat messages"""
    seed: int = 0
    """random seed; a step's randomness depends on it and on the step's number alone"""
    lr_schedule: Literal["constant_with_warmup", "linear", "cosine"] = "linear"
    """learning rate after the warmup"""
    warmup: NonNegInt = 0
    """updates of linear warmup (0 to 100)"""
    max_grad_norm: NonNegFloat = 1.0
    """gradients with a larger norm are scaled down to it (0: none are)"""

    micro_batch_tokens: PosInt = 8192
    """tokens per pass, padding included: sets memory, not results (16384 to 65536 on a GPU)"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""
    lora_rank: NonNegInt = 0
    """train LoRA adapters of this rank (8 to 64), with ten times the --lr (0: all weights)"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of matrix products; weights stay float32 (auto: bfloat16 where faster)"""
    compile: bool = False
    """compile the log-probs of large vocabularies: faster after half a minute (needs gcc)"""
    device: str = "auto"
    """cuda, cpu, or auto"""

    run_dir: str = ""
    """new folder for log, samples and checkpoints (default: runs/SCRIPT-DATE-TIME)"""
    resume: str = ""
    """run folder to resume from its last checkpoint, with its flags and those given now"""
    save_every: NonNegInt = 20
    """steps between checkpoints, besides the one at the end (0: no others)"""
    keep_checkpoints: PosInt = 1
    """how many checkpoints to keep, the newest (1 to 5)"""
    resumable: bool = True
    """checkpoints hold what --resume needs: 16 bytes per parameter instead of 4"""
    log_every: PosInt = 5
    """steps between printed lines"""
    eval_every: NonNegInt = 20
    """steps between evaluations, besides those at the start and the end (0: no others)"""
    tensorboard: bool = False
    """also write the metrics to RUN/tensorboard"""

    def __new__(cls, **given):
        self = super().__new__(cls)
        if "resume" in given:
            self._given = given  # for __post_init__
        return self

    def __post_init__(self):
        given = vars(self).pop("_given", ())
        if self.resume:  # that run's flags, except for those given now
            saved = saved_flags(Path(self.resume), type(self))
            vars(self).update((k, v) for k, v in saved.items() if k not in given)
            if self.run_dir not in ("", saved["run_dir"]):
                raise UserError("--run-dir: not with --resume, which writes to that run")
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(getattr(self, name)))
            value, kind = getattr(self, name), getattr(hint, "__origin__", hint)
            fitting, words = KINDS.get(kind, (object, ""))
            if not isinstance(value, fitting) or isinstance(value, bool) != (kind is bool):
                raise UserError(f"{flag}: must be {words}, not {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{flag}: must be a finite number")
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise UserError(f"{flag}: must be one of {', '.join(get_args(hint))}")
            for bound in getattr(hint, "__metadata__", ()):
                if bound in BOUNDS and not BOUNDS[bound](value):
                    raise UserError(f"{flag}: must be {bound}")


@dataclass
class PairArgs(RunArgs):
    """Flags of the scripts that learn from pairs."""
    eval_data: str = ""
    """held-out pairs (default: the last --eval-pairs rows of --data, not trained on)"""
    eval_pairs: PosInt = 600
    """number of held-out pairs"""
    warmup: NonNegInt = 10
    """updates of linear warmup (a tenth of all)"""
    save_every: NonNegInt = 100
    """steps between checkpoints, besides the one at the end (0: no others)"""
    log_every: PosInt = 20
    """steps between printed lines"""
    eval_every: NonNegInt = 0
    """steps between evaluations, besides those at the start and the end (0: no others)"""


@dataclass
class SampleArgs(RunArgs):
    """Flags of the scripts that sample completions of held-out prompts."""
    gold: str = ""
    """a reward used only in evaluation: a reward model, or file.py:function"""
    reference: str = ""
    """model that the KL and the win rate are measured against (default: --model)"""
    generate_batch_size: PosInt = 512
    """completions sampled at a time: sets memory (64 to 1024 on a GPU)"""
    eval_prompts: NonNegInt = 300
    """held-out prompts to sample completions for (0: none)"""
    eval_samples: PosInt = 1
    """completions per held-out prompt (4 to 64 for pass@k of rewards that are 0 or 1)"""


@dataclass
class OnPolicyArgs(SampleArgs):
    """Flags of the scripts that sample from the policy they train."""
    eval_data: str = ""
    """held-out prompts (default: the last --eval-prompts rows of --data, not trained on)"""
    max_prompt_tokens: NonNegInt = 0
    """skip rows with longer prompts (0: a prompt that does not fit the context is an error)"""
    max_kl: NonNegFloat = 0.0
    """stop after a step with a larger KL, in nats per completion (1 to 50; 0: never)"""

    reward_weights: tuple[float, ...] = ()
    """factors of the rewards, one each (default: 1)"""
    reward_combine: Literal["sum", "min", "mean_minus_std"] = "sum"
    """how several rewards become one (an ensemble of reward models: min or mean_minus_std)"""
    normalize_rewards: bool = False
    """bring each reward to mean 0 and std 1 in its group before they are combined (GDPO)"""
    mask_truncated: bool = False
    """leave completions that were cut at the length limit out of the loss"""
    truncation_penalty: NonNegFloat = 0.0
    """subtracted from the reward of completions that were cut at the length limit"""
    overlong_window: NonNegInt = 0
    """the last tokens before the limit, over which that penalty grows (DAPO; 0: no growth)"""
    importance_cap: NonNegFloat = 0.0
    """weight a token's loss by pi_old / pi_sampler, at most this, if sampling rounds (2)"""
    renew_reference_every: NonNegInt = 0
    """steps after which the reference moves to the policy (100 to 1000; 0: never)"""
    reference_mix: Fraction = 1.0
    """how far it moves: 1 copies the policy (a moving average: 0.6, TR-DPO)"""

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.reward, str) or callable(self.reward):
            self.reward = (self.reward,)
        if not isinstance(self.reward, (tuple, list)) or not self.reward or not all(
                callable(x) or isinstance(x, (str, os.PathLike)) for x in self.reward):
            raise UserError("--reward: name one or more models or functions")
        self.reward = tuple(x if callable(x) else os.fspath(x) for x in self.reward)
        weights = self.reward_weights
        if not isinstance(weights, (tuple, list)) or not all(
                isinstance(x, (int, float)) and math.isfinite(x) for x in weights) or (
                len(weights) not in (0, len(self.reward))):
            raise UserError(f"--reward-weights: must be {len(self.reward)} finite numbers, as "
                            "many as rewards")
        if self.normalize_rewards and self.group_size < 2:
            raise UserError("--normalize-rewards: needs a --group-size of 2 or more")
        if self.overlong_window and not (
                self.truncation_penalty and self.overlong_window <= self.max_new_tokens):
            raise UserError("--overlong-window: needs a --truncation-penalty, and is at most "
                            "--max-new-tokens")
        if self.renew_reference_every and not (self.beta or self.reference or self.max_kl):
            raise UserError("--renew-reference-every: --beta 0 has no reference")
        if self.renew_reference_every and self.lora_rank:
            raise UserError("--renew-reference-every: not with --lora-rank, where the "
                            "reference is the policy without its adapter")
        if self.data == "tiny/prompts.jsonl":  # the tiny world brings its own
            self.eval_data = self.eval_data or "tiny/heldout.jsonl"
            self.gold = self.gold or "tiny/world.py:gold_reward"
        processes = int(os.environ.get("WORLD_SIZE", 1))
        if self.minibatches * processes > self.prompts_per_step * self.group_size:
            raise UserError("--minibatches: more than a process has completions in a step")


def saved_flags(run_dir: Path, Args) -> dict:
    """The flags in a run's args.json."""
    flags = read_json(run_dir / "args.json", f"--resume {run_dir}")
    if flags.pop("ran_with", None) is None:
        raise UserError(f"--resume {run_dir}: made by an older version of this script, which "
                        "cannot be resumed: start a new run")
    if unknown := set(flags) - {field.name for field in dataclasses.fields(Args)}:
        raise UserError(f"--resume {run_dir}: a run of another script: it has "
                        f"--{min(unknown).replace('_', '-')}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()}


# --- the command line

def cli(main, Args, description: str):
    """Parses the command line and runs main. A user's mistake ends in one line and code 2."""
    Args.__dataclass_fields__ = {  # --help lists the script's own flags first
        name: Args.__dataclass_fields__[name] for cls in Args.__mro__
        for name in inspect.get_annotations(cls)}
    sys.stdout, sys.stderr = Shown(sys.stdout), Shown(sys.stderr)
    if {"-h", "--help"} & set(sys.argv):
        print(description)
    try:
        resume = re.findall("(?<=\0)--resume[=\0]([^\0]*)", "\0".join(sys.argv))
        if resume and not resume[-1]:
            raise UserError("--resume: names no run folder")
        if sys.argv.count("--reward") > 1:
            raise UserError("--reward: given twice: name all rewards after one")
        saved = resume and hasattr(Args, "resume")  # its flags are the defaults
        main(tyro.cli(Args, description="", **({"default": Args(resume=resume[-1])} if saved
                                               else {})))
    except KeyboardInterrupt:  # before the first step, or the second one
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        from runtime import rank, save_last_step  # here, since it imports this module
        save_last_step()
        hint = "".join(hint for words, hint in HINTS.items() if re.search(words, repr(error)))
        if not (isinstance(error, (UserError, OSError)) or hint):
            raise
        if rank() > 0:
            time.sleep(3)  # the first process says the same, unless this one fails alone
        line = str(error) if isinstance(error, UserError) else first_line(error)[:100]
        print(f"error: {line}{hint}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Shown:
    """A stream on which a letter that a terminal lacks, a closed pipe, or a terminal that has
    gone away ends no run."""
    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: closed from the start
        self.stream.reconfigure(errors="replace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            self.stream = open(os.devnull, "w")

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


HINTS = {  # words of an error of torch -> what to do
    "out of memory|allocate memory|not enough memory|MemoryError":
        ": out of memory: lower --micro-batch-tokens or --generate-batch-size, or use "
        "--gradient-checkpointing, --lora-rank or --dtype bfloat16",
    "probability tensor|device-side assert":
        ": the policy's probabilities are not finite: lower --lr, or use --dtype float32; "
        "--resume continues from the newest checkpoint"}


# --- JSON files

def read_json(path: Path, where: str) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {path} cannot be read: {first_line(error)}")
    if not isinstance(value, dict):
        raise UserError(f"{where}: {path} cannot be read: it holds no JSON object")
    return value


def writable(value):
    """A flag's value as args.json has it: a function as <NAME>, a tuple as a list."""
    if isinstance(value, tuple):
        return [writable(x) for x in value]
    if not callable(value):
        return value
    return f"<{getattr(value, '__name__', repr(value)).strip('<>')}>"


def json_lines(rows: list[dict]) -> str:
    """Rows as lines of JSON, which has no nan or infinity: such values are left out."""
    return "".join(json.dumps({
        name: value for name, value in row.items()
        if not isinstance(value, float) or math.isfinite(value)}) + "\n" for row in rows)


def write_json(path: Path, value: dict):
    write_whole(path, json.dumps(value, indent=2) + "\n")


def write_whole(path: Path, text: str):
    """Writes a file so that a kill leaves the old one or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)
