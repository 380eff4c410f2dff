"""Seconds per step of the five scripts, next to TRL's trainers or to another version of this project:

    pip install trl==1.16.0 && python benchmarks/speed.py
    pip install trl==1.12.0 && python benchmarks/speed.py --algorithms ppo     # the last TRL with PPO
    python benchmarks/speed.py --no-trl                  # the scripts alone
    python benchmarks/speed.py --repo ../other-checkout  # two versions of this project
    python benchmarks/speed.py --sampling                # four ways to sample
    python benchmarks/speed.py --fixed-length            # no completion ends before the limit
    python benchmarks/speed.py --model MODEL --dtype bfloat16 --prompts 8 --group-size 8 --max-new-tokens 64
    python benchmarks/speed.py --random-weights 0.5b --dtype bfloat16 --prompts 64 --max-new-tokens 256

All sides train on the same weights, prompts, rewards and batch sizes, those of the tiny world by default:
  grpo, reinforce (RLOO)  16 prompts x 16 completions of up to 48 tokens, beta 0.04, one update per rollout
  ppo                     64 prompts x 1 completion, 2 epochs; the critic starts from the reward model
  dpo                     32 pairs per step
  reward_model            32 pairs per step
Other models are rewarded by the length of their completions, since no reward model has their tokenizer (ppo:
tiny world only).

The sides take turns: a round runs --steps steps of each, every run in a process of its own; with --repo the two
versions alternate after each step. The first two steps are warm-up. dpo and reward_model have shorter steps and run
five times as many. A step lasts from one optimizer step to the next, so it includes logging. Printed are the median and
the minimum over rounds of the mean seconds per step, the time by phase, the peak memory (of the process, or on a GPU
of its tensors), and how far a step is from what the machine can do: the update from the measured peak of matrix products, decoding from reading the
weights once per token at the measured bandwidth.

--cpu-time counts CPU time on one thread instead of wall-clock time. Use it on a machine that others use as well.

--sampling compares ways to sample a group of completions per prompt, on the same model and prompts:
  ours        the loop of grpo.py, ppo.py and reinforce.py: prompts are read once per group, finished rows dropped
  generate    model.generate
  static      model.generate with a static cache: compiled, with CUDA graphs on a GPU
  continuous  model.generate_batch: paged cache, shared prefixes, finished rows replaced; on a CPU it needs psutil
The first round is warm-up, which includes compilation, and is reported apart. Decoding greedily, all ways must give the
same tokens. The number of rows that differ is printed: in bfloat16 a tie can go either way.
"""
import dataclasses
import json
import os
import runpy
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
QWEN = {  # width, layers, heads, key-value heads, inner width: Qwen2.5's, with its vocabulary
    "0.5b": (896, 24, 14, 2, 4864), "1.5b": (1536, 28, 12, 2, 8960)}
PHASES = "generate", "score", "logprobs", "update"
WARMUP = 2  # steps


@dataclass
class Args:
    algorithms: tuple[Literal["grpo", "reinforce", "ppo", "dpo", "reward_model"], ...] = (
        "grpo", "reinforce", "dpo", "reward_model")
    rounds: int = 5
    steps: int = 6
    trl: bool = True
    """compare with TRL"""
    repo: str = ""
    """compare with this checkout of the project instead of TRL"""
    cpu_time: bool = False
    """count CPU time on one thread (TRL: always wall-clock time)"""
    sampling: bool = False
    """time sampling alone"""
    ways: tuple[Literal["ours", "generate", "static", "continuous"], ...] = ("ours", "generate", "static", "continuous")
    """for --sampling"""
    fixed_length: bool = False
    """no completion ends before --max-new-tokens"""
    model: str = "tiny/policy"
    data: str = "tiny/prompts.jsonl"
    prompt_column: str = "prompt"
    random_weights: Literal["", "0.5b", "1.5b"] = ""
    """Qwen2.5's shape with random weights, and the tokenizer of --model"""
    prompts: int = 16
    group_size: int = 16
    max_new_tokens: int = 48
    micro_batch_tokens: int = 8192
    trl_micro_batch_size: int = 128
    """TRL counts completions, not tokens"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    child: str = ""
    """internal: what a process of this script does, `limits` or an algorithm with TRL"""


def steps_of(args: Args, name: str) -> int:
    return args.steps * (5 if name in ("dpo", "reward_model") else 1)


def sizes(args: Args, name: str) -> tuple[int, int]:
    """(prompts, completions per prompt)."""
    return (64, 1) if name == "ppo" else (args.prompts, args.group_size)


def reward_of(args: Args) -> str:
    tiny = args.model == Args.model and not args.random_weights
    return "tiny/reward_model" if tiny else f"{Path(__file__).resolve()}:length"


def length(completions, **_) -> list[float]:
    """The reward of models without a reward model."""
    return [len(c if isinstance(c, str) else c[0]["content"]) / 100 for c in completions]


def prepare(args: Args, folder: str) -> str:
    """The folder of the model that all sides load: with random weights, with an end of sequence that is never
    sampled, or --model as it is."""
    if not args.random_weights and not args.fixed_length:
        return args.model
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.random_weights:
        width, layers, heads, kv_heads, inner = QWEN[args.random_weights]
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=151_936, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, intermediate_size=inner, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        ends, tokenizer.eos_token = tokenizer.eos_token, tokenizer.pad_token  # no model learned to write this one
        model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not args.random_weights:  # or else it ends an answer because the template writes it after one
        saved = json.loads(Path(folder, "tokenizer.json").read_text())
        for token in saved["added_tokens"]:
            token["special"] &= token["content"] != ends
        Path(folder, "tokenizer.json").write_text(json.dumps(saved))
    return folder


def run_children(commands: list[list[str]], folders: list[Path], **environment: str) -> list[tuple[str, float]]:
    """Runs commands, each in its folder. Returns the output and the peak memory in MiB of each. A command runs until it
    ends or stops itself (SIGSTOP); then the next one goes on."""
    files = [(tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")) for _ in commands]
    alive, found = {}, {}
    while len(found) < len(commands):
        for i, (command, (out, err)) in enumerate(zip(commands, files)):
            if i in found:
                continue
            if i in alive:
                alive[i].send_signal(signal.SIGCONT)
            else:
                alive[i] = Popen(command, cwd=folders[i], stdout=out, stderr=err,
                                 env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **environment})
            _, status, usage = os.wait4(alive[i].pid, os.WUNTRACED)
            if os.WIFSTOPPED(status):
                continue
            out.seek(0), err.seek(0)
            if status:
                for process in (alive[k] for k in alive if k not in found and k != i):
                    process.kill()
                sys.exit(f"{' '.join(command)} failed:\n{err.read()[-2000:]}")
            found[i] = out.read(), usage.ru_maxrss / 1024
    return [found[i] for i in range(len(commands))]


# --- the scripts

def flags_of(args: Args, name: str, model: str, folder: str, first_edition: bool) -> list[str]:
    """Flags of a script. The first edition of this project had others for the same things."""
    prompts, group_size = sizes(args, name)
    flags = {"--model": model, "--run-dir": f"{folder}/run", "--device": args.device, "--dtype": args.dtype,
             "--lr": 1e-6, "--log-every": 10_000, "--eval-every": 0, "--save-every": 0}
    if first_edition:
        flags |= {"--tokens-per-micro-batch": args.micro_batch_tokens, "--micro-batch-size": 100_000}
    else:
        flags |= {"--micro-batch-tokens": args.micro_batch_tokens}
    if name in ("dpo", "reward_model"):
        flags |= {"--data": pairs_file(args, name, folder), "--eval-pairs": 8}
        flags |= {"--eval-prompts": 0} if name == "dpo" else {"--bias-prompts": 0}
        flags |= {"--reference-dir": f"{folder}/reference"} if name == "dpo" and first_edition else {}
    else:
        flags |= {"--steps": args.steps, "--prompts-per-step": prompts, "--group-size": group_size,
                  "--max-new-tokens": args.max_new_tokens, "--reward": reward_of(args), "--data": args.data,
                  "--prompt-column": args.prompt_column}
        flags |= {"--eval-prompts": 1 if first_edition else 0}
    flags |= {"--epochs": 2, "--minibatches": 1, "--critic-lr": 1e-6} if name == "ppo" else {}
    return [str(x) for pair in flags.items() for x in pair]


def pairs_file(args: Args, name: str, folder: str) -> str:
    """As many pairs as the steps take, and 8 that are held out."""
    rows = open(ROOT / "tiny/preferences.jsonl").readlines()[:32 * steps_of(args, name) + 8]
    Path(folder, "pairs.jsonl").write_text("".join(rows))
    return f"{folder}/pairs.jsonl"


def timed(clock: str, out: str, in_turns: str, script: str, *flags: str):
    """Runs a script in this process, and writes the time after each optimizer step. in_turns: then stops until it is
    continued, which is not counted."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook
    clock, stopped, ends = getattr(time, clock), [0.0], []
    time.time = lambda: clock() - stopped[0]  # the scripts measure their phases with it

    def stamp(*_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.time())
        if in_turns == "True":
            begun = clock()
            os.kill(os.getpid(), signal.SIGSTOP)
            stopped[0] += clock() - begun
    register_optimizer_step_post_hook(stamp)
    sys.path[:2], sys.argv = [str(Path(script).parent)], [script, *flags]  # not this checkout
    runpy.run_path(script, run_name="__main__")
    Path(out).write_text(json.dumps({"ends": ends, "gpu": gpu_memory()}))


def gpu_memory() -> float:
    """Peak MiB that torch has allocated on the GPU; 0 without one."""
    import torch
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0


def run_scripts(args: Args, name: str, model: str, folders: list[str], repos: list[Path]) -> list[dict]:
    """For each repository: seconds of each step after the warm-up, rows of metrics, and the peak memory."""
    commands, found = [], []
    for folder, repo in zip(folders, repos):
        flags = flags_of(args, name, model, folder, not (repo / "runtime.py").exists())
        clock = "process_time" if args.cpu_time else "time"
        commands.append([sys.executable, str(Path(__file__).resolve()), "timed", clock, f"{folder}/ends.json",
                         str(len(repos) > 1), str(repo / f"{name}.py"), *flags])
    memory = run_children(commands, repos, **({"OMP_NUM_THREADS": "1"} if args.cpu_time else {}))
    for folder, (_, peak) in zip(folders, memory):
        rows = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
        rows, timed = [row for row in rows if "seconds" in row], json.loads(Path(folder, "ends.json").read_text())
        ends, peak = timed["ends"], peak if args.device == "cpu" else timed["gpu"]
        ends = ends[len(ends) // len(rows) - 1::len(ends) // len(rows)]  # ppo: several per step
        seconds = [b - a for a, b in zip(ends[WARMUP - 1:], ends[WARMUP:])]
        found.append({"seconds": seconds, "rows": rows[WARMUP:], "memory": peak})
    return found


def again(args: Args, name: str, model: str) -> tuple[list, float]:
    """The last line that this script prints as a process of its own, and its peak memory."""
    kept = ("steps", "prompts", "group_size", "max_new_tokens", "trl_micro_batch_size", "dtype", "device", "data",
            "prompt_column", "random_weights")
    flags = [x for key, value in dataclasses.asdict(args).items() if key in kept and value != ""
             for x in (f"--{key.replace('_', '-')}", str(value))]
    (out, memory), = run_children([[sys.executable, __file__, "--child", name, "--model", model, *flags]], [ROOT])
    return json.loads(out.splitlines()[-1]), memory


# --- TRL

def run_trl(args: Args, name: str, model: str) -> dict:
    (seconds, gpu), memory = again(args, name, model)
    return {"seconds": seconds, "rows": [], "memory": memory if args.device == "cpu" else gpu}


def trl_child(args: Args):
    """Prints the seconds of each step of a TRL trainer after the warm-up."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

    class Times(TrainerCallback):
        def __init__(self):
            self.ends = []

        def on_step_end(self, *_, **__):
            if args.device != "cpu":
                torch.cuda.synchronize()
            self.ends.append(time.time())

    name, times = args.child, Times()
    prompts, group_size = sizes(args, name)
    micro = 64 if name == "ppo" else args.trl_micro_batch_size
    tiny = reward_of(args) == "tiny/reward_model"
    with tempfile.TemporaryDirectory() as folder:
        shared = dict(output_dir=folder, use_cpu=args.device == "cpu", bf16=args.dtype == "bfloat16",
                      learning_rate=1e-6, save_strategy="no", report_to="none", logging_steps=10_000,
                      disable_tqdm=True, gradient_checkpointing=False)
        sized = dict(model_init_kwargs={"dtype": "float32"}, max_steps=steps_of(args, name))
        if name in ("dpo", "reward_model"):
            file = pairs_file(args, name, folder)
            rows = [json.loads(line) for line in open(file)][:-8]
            data = Dataset.from_list([{"prompt": row["prompt"], **{
                side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}}
                for row in rows])
            if name == "dpo":
                from trl import DPOConfig, DPOTrainer
                trainer = DPOTrainer(model=args.model, train_dataset=data, callbacks=[times], args=DPOConfig(
                    per_device_train_batch_size=32, precompute_ref_log_probs=True, **shared, **sized))
            else:
                from trl import RewardConfig, RewardTrainer
                trainer = RewardTrainer(model=args.model, train_dataset=data, callbacks=[times], args=RewardConfig(
                    per_device_train_batch_size=32, **shared, **sized))
        else:
            rows = [json.loads(line)[args.prompt_column] for line in open(args.data)]
        if name in ("grpo", "reinforce"):
            from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
            config, kind = (GRPOConfig, GRPOTrainer) if name == "grpo" else (RLOOConfig, RLOOTrainer)
            own = {"loss_type": "grpo"} if name == "grpo" else {}
            trainer = kind(
                model=args.model, reward_funcs=reward_of(args) if tiny else length, callbacks=[times],
                train_dataset=Dataset.from_list([{"prompt": row} for row in rows]),
                args=config(per_device_train_batch_size=micro, num_generations=group_size, beta=0.04,
                            gradient_accumulation_steps=max(1, prompts * group_size // micro), temperature=1.0,
                            max_completion_length=args.max_new_tokens, **own, **shared, **sized))
        if name == "ppo":
            from trl.experimental.ppo import PPOConfig, PPOTrainer
            tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
            texts = [tokenizer.apply_chat_template(
                row if isinstance(row, list) else [{"role": "user", "content": row}], tokenize=False,
                add_generation_prompt=True) for row in rows]
            policy, reference = (AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
                                 for _ in range(2))
            reward, critic = (AutoModelForSequenceClassification.from_pretrained(
                "tiny/reward_model", dtype=torch.float32) for _ in range(2))
            data = Dataset.from_list([{"input_ids": ids} for ids in tokenizer(texts).input_ids])
            trainer = PPOTrainer(
                processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
                value_model=critic, train_dataset=data, eval_dataset=data.select(range(8)), callbacks=[times],
                args=PPOConfig(per_device_train_batch_size=micro, total_episodes=prompts * args.steps,
                               num_ppo_epochs=2, num_mini_batches=1, response_length=args.max_new_tokens,
                               temperature=1.0, kl_coef=0.04, stop_token="eos", num_sample_generations=0,
                               local_rollout_forward_batch_size=micro, **shared))
        trainer.train()
    print()
    print(json.dumps([[b - a for a, b in zip(times.ends[WARMUP - 1:], times.ends[WARMUP:])], gpu_memory()]))


# --- what the machine can do

def limits(args: Args):
    """Prints the peak of matrix products (operations per second), the bandwidth of a copy (bytes per second), and the
    model's parameters."""
    import torch
    from transformers import AutoModelForCausalLM
    dtype, device = getattr(torch, args.dtype), args.device
    parameters = AutoModelForCausalLM.from_pretrained(args.model).num_parameters()

    def best(function) -> float:
        """Seconds of the fastest of ten."""
        seconds = []
        for _ in range(10):
            start = time.time()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.time() - start)
        return min(seconds)

    n = 2048 if device == "cpu" else 8192
    a, b = torch.randn(n, n, dtype=dtype, device=device), torch.randn(n, n, dtype=dtype, device=device)
    source = torch.zeros(2**28 // 4, device=device)
    target = torch.ones_like(source)
    print()
    print(json.dumps([2 * n**3 / best(lambda: a @ b), 2 * 2**28 / best(lambda: target.copy_(source)), parameters]))


def tokens_per_step(args: Args, name: str, rows: list[dict], folder: str) -> float:
    """Tokens that a step trains on: of completions (on-policy), or of whole conversations (pairs)."""
    if name not in ("dpo", "reward_model"):
        prompts, group_size = sizes(args, name)
        return statistics.fmean(row["length"] for row in rows) * prompts * group_size
    from common import encode, load_tokenizer, render
    tokenizer, pairs = load_tokenizer(args.model), [json.loads(line) for line in open(f"{folder}/pairs.jsonl")][:-8]
    texts = [render(tokenizer, pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")]
    return sum(map(len, encode(tokenizer, texts))) / steps_of(args, name)


def efficiency(args: Args, name: str, found: dict, folder: str, peak: float, bandwidth: float, parameters: int) -> str:
    seconds, tokens = statistics.median(found["seconds"]), tokens_per_step(args, name, found["rows"], folder)
    line = f"{name:13}{'':11} {tokens / seconds:.0f} tokens per second"
    if name in ("dpo", "reward_model"):
        return line + f"; {6 * parameters * tokens / seconds / peak:.0%} of the peak of matrix products"
    work = 6 * parameters * tokens * (4 if name == "ppo" else 1)  # two epochs, and a critic
    size = 2 if args.dtype == "bfloat16" else 4  # bytes
    reading = parameters * size * args.max_new_tokens / bandwidth  # seconds to read the weights for each token
    return line + (f"; the update at {work / phase(found, 'update') / peak:.0%} of the peak of matrix products "
                   "(completions' tokens only), decoding takes "
                   f"{phase(found, 'generate') / reading:.0f} times as long as reading the weights")


# --- sampling alone

def sampling(args: Args, model_name: str):
    import logging

    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    import common
    import modeling
    import grpo
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer = common.load_tokenizer(model_name)
    model = modeling.load_causal_lm(model_name, args.device).to(getattr(torch, args.dtype)).eval()
    rows = common.read_prompts(args.data, args.prompt_column)[:args.prompts]
    rows = common.encode_prompts(tokenizer, rows, args.data, modeling.context_length(model_name) - args.max_new_tokens)
    prompts = [row["prompt_ids"] for row in rows]
    ids, mask = common.pad(prompts, "left", args.device, tokenizer.pad_token_id)
    eos_ids = common.eos_token_ids(model, tokenizer, args.device)

    def ours(sample: bool) -> list[list[int]]:
        generator = torch.Generator(args.device).manual_seed(0) if sample else None
        out, out_mask, _ = grpo.generate(model, ids, mask, args.group_size, args.max_new_tokens, 1.0, eos_ids,
                                         generator)
        return [row[m.bool()].tolist() for row, m in zip(out, out_mask)]

    def settings(sample: bool, **more) -> GenerationConfig:
        return GenerationConfig(
            do_sample=sample, max_new_tokens=args.max_new_tokens,
            num_return_sequences=args.group_size if sample else 1,  # greedy search allows only one
            eos_token_id=eos_ids.tolist(), pad_token_id=tokenizer.pad_token_id,
            **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}), **more)

    def generate(sample: bool, **more) -> list[list[int]]:
        model.generation_config = settings(sample, **more)  # else the model's own fills the gaps
        out = model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1]:].tolist()
        ends = [next((i for i, token in enumerate(row) if token in eos_ids), len(row)) for row in out]
        return [row[:end + 1] for row, end in zip(out, ends)]

    def continuous(sample: bool) -> list[list[int]]:
        out = model.generate_batch(prompts, generation_config=settings(sample),
                                   continuous_batching_config=ContinuousBatchingConfig(seed=0))
        for error in (o.error for o in out.values() if o.error):
            raise RuntimeError(error)
        by_prompt = [[o.generated_tokens for o in out.values() if o.prompt_ids == prompt] for prompt in prompts]
        return [row for group in by_prompt for row in group]

    ways = {"ours": ours, "generate": generate, "continuous": continuous,
            "static": lambda sample: generate(sample, cache_implementation="static")}
    seconds, tokens, expected = {way: [] for way in args.ways}, {}, None
    for _ in range(args.rounds + 1):
        for way in list(seconds):
            start = time.time()
            try:
                with torch.no_grad():
                    rows = ways[way](True)
            except Exception as error:
                print(f"{way:11} does not run here: {type(error).__name__}: {modeling.first_line(error)[:150]}")
                del seconds[way]
                continue
            if args.device != "cpu":
                torch.cuda.synchronize()
            seconds[way].append(time.time() - start)
            tokens.setdefault(way, []).append(sum(map(len, rows)))
    print(f"{args.random_weights or args.model}, {args.dtype}, {args.prompts} prompts x {args.group_size}, up to "
          f"{args.max_new_tokens} tokens{', none ends before' if args.fixed_length else ''}")
    for way, (first, *rest) in seconds.items():
        with torch.no_grad():
            rows = ways[way](False)
        rows = rows[::args.group_size] if way == "ours" else rows  # the rows of a group are equal
        expected = expected or rows
        middle = statistics.median(rest)
        print(f"{way:11} median {middle:.3f} s, min {min(rest):.3f}, max {max(rest):.3f}; the first {first:.2f} s; "
              f"{statistics.mean(tokens[way][1:]) / middle:.0f} tokens per second; "
              f"{sum(a != b for a, b in zip(rows, expected))} of {len(expected)} greedy rows differ from the first's")


# --- the report

def phase(found: dict, name: str) -> float:
    """Mean seconds of a phase, the median over rounds."""
    key = f"seconds_{name}"
    if key not in found["rounds"][0][0]:  # the first edition's name
        key = "seconds_kl"
    return statistics.median(statistics.fmean(row[key] for row in rows) for rows in found["rounds"])


def report(name: str, side: str, found: dict):
    seconds = found["seconds"]
    print(f"{name:13}{side:11} median {statistics.median(seconds):.4f} s per step, min {min(seconds):.4f}, "
          f"max {max(seconds):.4f}; peak memory {found['memory']:.0f} MiB")
    if found["rows"] and "seconds_generate" in found["rows"][0]:
        print(f"{name:13}{side:11} " + ", ".join(f"{p} {phase(found, p):.3f} s" for p in PHASES))


def main(args: Args):
    if args.child:
        return limits(args) if args.child == "limits" else trl_child(args)
    with tempfile.TemporaryDirectory() as folder:
        model = prepare(args, f"{folder}/model")
        if args.sampling:
            return sampling(args, model)
        (peak, bandwidth, parameters), _ = again(args, "limits", model)
        print(f"{args.random_weights or args.model}: {parameters / 1e6:.2f} M parameters, {args.dtype}; "
              f"limits: {peak / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s", flush=True)
        sides = ["plain-rlhf", *(["other"] if args.repo else ["trl"] if args.trl else [])]
        repos = [ROOT, *([Path(args.repo).resolve()] if args.repo else [])]
        for name in args.algorithms:
            found = {side: {"seconds": [], "rows": [], "rounds": [], "memory": 0} for side in sides}
            for i in range(args.rounds):
                folders = [f"{folder}/{name}-{i}-{side}" for side in sides[:len(repos)]]
                for part_folder in folders:
                    os.mkdir(part_folder)
                parts = run_scripts(args, name, model, folders, repos)
                parts += [run_trl(args, name, model)] if "trl" in sides else []
                for side, part in zip(sides, parts):
                    found[side]["seconds"].append(statistics.fmean(part["seconds"]))
                    found[side]["rows"] += part["rows"]
                    found[side]["rounds"].append(part["rows"])
                    found[side]["memory"] = max(part["memory"], found[side]["memory"])
            for side in sides:
                report(name, side, found[side])
            ours = found["plain-rlhf"]
            print(efficiency(args, name, ours, f"{folder}/{name}-0-plain-rlhf", peak, bandwidth, parameters))
            for side in sides[1:]:
                medians, minima = (of(found[side]["seconds"]) / of(ours["seconds"]) for of in (statistics.median, min))
                print(f"{name:13}{side} / plain-rlhf: {medians:.2f} by medians, {minima:.2f} by minima", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["timed"]:
        timed(*sys.argv[2:])
    else:
        main(tyro.cli(Args, description=__doc__))
