"""Seconds a step of the five scripts and of TRL's trainers on the same work, taken in turn:

    pip install trl==1.16.0 && python benchmarks/speed.py
    pip install trl==1.12.0 && python benchmarks/speed.py --algorithms ppo     # the last TRL with PPO
    python benchmarks/speed.py --fixed-length            # every completion to its last token
    python benchmarks/speed.py --model MODEL --dtype bfloat16 --prompts 8 --group-size 8 --max-new-tokens 64
    python benchmarks/speed.py --random-weights 0.5b --dtype bfloat16 --prompts 64 --max-new-tokens 256

The same weights, prompts, rewards and batch on both sides, the tiny world's unless said:
  grpo, reinforce (RLOO)  16 prompts x 16 samples, up to 48 new tokens, beta 0.04, temperature 1,
                          micro-batches of 128, one update a rollout
  ppo                     64 prompts x 1 sample, up to 48 new tokens, 2 epochs, micro-batches of 64;
                          the reward model is the critic's start
  dpo                     32 pairs a step, the reference's log-probs computed before the first step
  reward_model            32 pairs a step
A model of your own, or random weights, is rewarded by the length of its answers, for want of a reward
model with its tokenizer (ppo: is left to the tiny world).

A step is everything from one step's start to the next one's. Each round runs --steps steps of one
side, then of the other, each in a process of its own; the first two steps are warm-up (dpo and
reward_model, whose steps are short, run five times as many). Peak memory is that of the whole
process. Below them, what the machine could do: the update's matrix products against their measured
peak, and for decoding, the weights' bytes once a token against the measured bandwidth of a copy.
"""
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).parent.parent
QWEN = {  # width, layers, heads, key-value heads, inner width: Qwen2.5's, with its vocabulary
    "0.5b": (896, 24, 14, 2, 4864), "1.5b": (1536, 28, 12, 2, 8960)}


@dataclass
class Args:
    algorithms: tuple[Literal["grpo", "reinforce", "ppo", "dpo", "reward_model"], ...] = (
        "grpo", "reinforce", "dpo", "reward_model")
    rounds: int = 3
    steps: int = 6
    fixed_length: bool = False
    """no answer ends before --max-new-tokens"""
    model: str = "tiny/policy"
    random_weights: Literal["", "0.5b", "1.5b"] = ""
    prompts: int = 16
    group_size: int = 16
    max_new_tokens: int = 48
    micro_batch_size: int = 128
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    side: Literal["both", "plain-rlhf"] = "both"
    """plain-rlhf: needs no TRL"""
    child: str = ""
    """for this script's own use: what a process of its own does, an algorithm with TRL, or limits"""


def steps_of(args: Args, name: str) -> int:
    return args.steps * (5 if name in ("dpo", "reward_model") else 1)


def sizes(args: Args, name: str) -> tuple[int, int, int]:
    """(prompts, completions of each, micro-batch)."""
    return (64, 1, 64) if name == "ppo" else (args.prompts, args.group_size, args.micro_batch_size)


def reward_of(args: Args) -> str:
    tiny = args.model == Args.model and not args.random_weights
    return "tiny/reward_model" if tiny else f"{Path(__file__)}:length"


def length(completions, **_) -> list[float]:
    """The reward of models without a reward model."""
    return [len(c if isinstance(c, str) else c[0]["content"]) / 100 for c in completions]


def prepare(args: Args, folder: str) -> str:
    """The folder of the model that both sides load: with random weights, or with an end of sequence
    that is never sampled, or as it is."""
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
        tokenizer.eos_token = tokenizer.pad_token  # training never asked for it
        model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def child(command: list[str]) -> tuple[str, float]:
    """(its output, its peak memory in MiB)."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err,
                                   env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
        _, status, usage = os.wait4(process.pid, 0)
        out.seek(0), err.seek(0)
        if status:
            sys.exit(f"{' '.join(command)} failed:\n{err.read()[-2000:]}")
        return out.read(), usage.ru_maxrss / 1024


def ours(args: Args, name: str, model: str, folder: str) -> dict:
    """Rows of metrics after the warm-up, and the peak memory."""
    prompts, group, micro = sizes(args, name)
    flags = {"--model": model, "--run-dir": f"{folder}/run", "--device": args.device, "--dtype": args.dtype,
             "--lr": 1e-6, "--log-every": 10_000, "--eval-every": 0}
    if name in ("dpo", "reward_model"):
        flags |= {"--data": pairs_file(args, name, folder), "--eval-pairs": 8, "--micro-batch-size": 64}
        flags |= ({"--eval-prompts": 0, "--reference-dir": f"{folder}/reference"} if name == "dpo"
                  else {"--bias-prompts": 0})
    else:
        flags |= {"--steps": args.steps, "--prompts-per-step": prompts, "--group-size": group,
                  "--max-new-tokens": args.max_new_tokens, "--reward": reward_of(args),
                  "--micro-batch-size": micro}
    flags |= {"--epochs": 2, "--minibatches": 1} if name == "ppo" else {}
    _, memory = child([sys.executable, f"{name}.py", *(str(x) for pair in flags.items() for x in pair)])
    rows = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
    return {"rows": [row for row in rows if "seconds" in row][2:], "memory": memory}


def again(args: Args, name: str, model: str) -> tuple[str, float]:
    """This script in a process of its own, since memory is measured by process, and a child's peak is
    no less than what its parent held: (its last line, its peak memory in MiB)."""
    flags = {f"--{k.replace('_', '-')}": v for k, v in dataclasses.asdict(args).items()
             if k not in ("algorithms", "fixed_length", "random_weights", "model", "child")}
    out, memory = child([sys.executable, __file__, "--child", name, "--model", model,
                         *(str(x) for pair in flags.items() for x in pair),
                         *(["--random-weights", args.random_weights] if args.random_weights else [])])
    return json.loads(out.splitlines()[-1]), memory


def trl(args: Args, name: str, model: str, folder: str) -> dict:
    seconds, memory = again(args, name, model)
    return {"rows": [{"seconds": s} for s in seconds], "memory": memory}


def pairs_file(args: Args, name: str, folder: str) -> str:
    """As many pairs as the steps take, and 8 that are held out."""
    rows = open(ROOT / "tiny/preferences.jsonl").readlines()[:32 * steps_of(args, name) + 8]
    Path(folder, "pairs.jsonl").write_text("".join(rows))
    return f"{folder}/pairs.jsonl"


def run_trl(args: Args):
    """Prints the seconds of each step of a TRL trainer after the warm-up."""
    import torch
    from datasets import Dataset
    from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                              TrainerCallback)

    class Times(TrainerCallback):
        def __init__(self):
            self.ends = []

        def on_step_end(self, *_, **__):
            if args.device != "cpu":
                torch.cuda.synchronize()
            self.ends.append(time.time())

    name, times = args.child, Times()
    prompts, group, micro = sizes(args, name)
    tiny = reward_of(args) == "tiny/reward_model"
    with tempfile.TemporaryDirectory() as folder:
        common = dict(output_dir=folder, use_cpu=args.device == "cpu", bf16=args.dtype == "bfloat16",
                      learning_rate=1e-6, save_strategy="no", report_to="none", logging_steps=10_000,
                      disable_tqdm=True, gradient_checkpointing=False)
        like = dict(model_init_kwargs={"dtype": "float32"}, max_steps=steps_of(args, name))
        if name in ("dpo", "reward_model"):
            file = pairs_file(args, name, folder)
            rows = [json.loads(line) for line in open(file)][:-8]
            data = Dataset.from_list([{"prompt": row["prompt"], **{
                side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}}
                for row in rows])
            if name == "dpo":
                from trl import DPOConfig, DPOTrainer
                trainer = DPOTrainer(model=args.model, train_dataset=data, callbacks=[times], args=DPOConfig(
                    per_device_train_batch_size=32, precompute_ref_log_probs=True, **common, **like))
            else:
                from trl import RewardConfig, RewardTrainer
                trainer = RewardTrainer(
                    model=args.model, train_dataset=data, callbacks=[times],
                    args=RewardConfig(per_device_train_batch_size=32, **common, **like))
        else:
            rows = [json.loads(line)["prompt"] for line in open("tiny/prompts.jsonl")]
        if name in ("grpo", "reinforce"):
            from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
            config, kind = (GRPOConfig, GRPOTrainer) if name == "grpo" else (RLOOConfig, RLOOTrainer)
            own = {"loss_type": "grpo"} if name == "grpo" else {}
            trainer = kind(
                model=args.model, reward_funcs=reward_of(args) if tiny else length, callbacks=[times],
                train_dataset=Dataset.from_list([{"prompt": row} for row in rows]),
                args=config(per_device_train_batch_size=micro, num_generations=group, beta=0.04,
                            gradient_accumulation_steps=prompts * group // micro, temperature=1.0,
                            max_completion_length=args.max_new_tokens, **own, **common, **like))
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
                               local_rollout_forward_batch_size=micro, **common))
        trainer.train()
    print()
    print(json.dumps([b - a for a, b in zip(times.ends[1:], times.ends[2:])]))


def limits(args: Args):
    """Prints matrix products in operations a second, a copy's bytes a second, the model's parameters."""
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


def middle(rows: list[dict], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def main(args: Args):
    if args.child:
        return limits(args) if args.child == "limits" else run_trl(args)
    with tempfile.TemporaryDirectory() as where:
        model = prepare(args, f"{where}/model")
        (peak, bandwidth, parameters), _ = again(args, "limits", model)
        print(f"{model if not args.random_weights else args.random_weights}: {parameters / 1e6:.2f} M parameters, "
              f"{args.dtype}; limits: {peak / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s", flush=True)
        for name in args.algorithms:
            found = {}
            for i in range(args.rounds):
                for side, run in (("plain-rlhf", ours), ("trl", trl)):
                    if side == "trl" and args.side != "both":
                        continue
                    folder = f"{where}/{name}-{side}-{i}"
                    os.mkdir(folder)
                    part = run(args, name, model, folder)
                    found.setdefault(side, {"rows": [], "memory": 0})
                    found[side]["rows"] += part["rows"]
                    found[side]["memory"] = max(part["memory"], found[side]["memory"])
            for side, f in found.items():
                seconds = [row["seconds"] for row in f["rows"]]
                print(f"{name:13}{side:11} {len(seconds):3} steps: median {statistics.median(seconds):.3f} s, "
                      f"min {min(seconds):.3f}, max {max(seconds):.3f}; peak memory {f['memory']:.0f} MiB")
            rows = found["plain-rlhf"]["rows"]
            tokens = statistics.median(row["tokens_per_second"] * row["seconds"] for row in rows)
            line = f"{name:13}{'':11} {middle(rows, 'tokens_per_second'):.0f} tokens a second"
            if "seconds_generate" in rows[0]:
                split = {k: middle(rows, f"seconds_{k}") for k in ("generate", "score", "kl", "update")}
                epochs = 2 if name == "ppo" else 1
                work = 6 * parameters * tokens * epochs * (2 if name == "ppo" else 1)  # and a critic
                weights = parameters * 4 * args.max_new_tokens  # bytes, float32
                line += "; " + ", ".join(f"{k} {v:.2f} s" for k, v in split.items())
                line += (f"; the update at {work / split['update'] / peak:.0%} of the products' peak (completions' "
                         f"tokens counted alone), decoding {split['generate'] / (weights / bandwidth):.0f} times "
                         "the reading of the weights")
            else:
                line += f"; at {6 * parameters * tokens / middle(rows, 'seconds') / peak:.0%} of the products' peak"
            print(line)
            if "trl" in found:
                print(f"{name:13}ratio of medians, TRL / ours: "
                      f"{middle(found['trl']['rows'], 'seconds') / middle(rows, 'seconds'):.2f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
