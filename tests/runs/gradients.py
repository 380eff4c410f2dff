"""One step of each script, and the gradients of each of its updates in a file. test_processes.py and test_lora.py run
it in one process and in two.

    python tests/runs/gradients.py OUT CASE [CASE ...]
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import dpo
import grpo
import ppo
import reinforce
import reward_model
import runtime

SCRIPTS = {"grpo": grpo, "ppo": ppo, "reinforce": reinforce, "dpo": dpo, "reward_model": reward_model}
ALL = dict(device="cpu", max_grad_norm=1e9, save_every=0, resumable=False)
ON_POLICY = ALL | dict(steps=1, prompts_per_step=4, group_size=4, max_new_tokens=16, eval_prompts=0,
                       micro_batch_tokens=96, gold="tiny/world.py:gold_reward")
PAIRS = ALL | dict(pairs_per_step=8, eval_pairs=5, micro_batch_tokens=192, warmup=0)
CASES = {
    "grpo": ON_POLICY | dict(loss_type="dapo", scale_rewards="batch", kl_in_reward=True, eval_prompts=3),
    "grpo-bfloat16": ON_POLICY | dict(dtype="bfloat16", beta=0.0),
    "grpo-lora": ON_POLICY | dict(lora_rank=4, gradient_checkpointing=True),
    "grpo-checkpointing": ON_POLICY | dict(gradient_checkpointing=True),
    "ppo": ON_POLICY | dict(minibatches=1),
    "reinforce": ON_POLICY | dict(whiten=True, kl_per_token=True),
    "dpo": PAIRS | dict(eval_prompts=0, sft_weight=0.1),
    "dpo-lora": PAIRS | dict(eval_prompts=0, lora_rank=4),
    "reward_model": PAIRS | dict(bias_prompts=0),
    "reward_model-lora": PAIRS | dict(bias_prompts=0, lora_rank=4)}


def main(out: Path, names: list[str]):
    gradients = {}
    for script in SCRIPTS.values():
        if hasattr(script, "generate"):
            script.generate = seeded(script.generate)
    runtime.Run.clip_grad_norm = recorded(runtime.Run.clip_grad_norm, gradients)
    for name in names:
        gradients.clear()
        # 10 pairs to learn from, in steps of 8 and 2; or 8 prompts
        source, n = ("preferences", 15) if CASES[name].keys() >= PAIRS.keys() else ("prompts", 11)
        data = out / f"{source}-{os.environ.get('RANK', 0)}.jsonl"
        data.write_text("".join(Path(f"tiny/{source}.jsonl").read_text().splitlines(True)[:n]))
        script = SCRIPTS[name.split("-")[0]]
        script.main(script.Args(**CASES[name], data=str(data), run_dir=str(out / name)))
        if runtime.rank() == 0:
            save_file(gradients, out / f"{name}.safetensors")
    if dist.is_initialized():
        dist.barrier()  # a process that ends first may take the other with it
        dist.destroy_process_group()


def seeded(generate):
    """Sampling that draws for each prompt with its own seed, whichever process it is in."""
    def one_by_one(model, prompt_ids, prompt_mask, *rest):
        parts = [generate(model, ids[None], mask[None], *rest[:-1],
                          torch.Generator().manual_seed(int(ids[mask.bool()].sum())))
                 for ids, mask in zip(prompt_ids, prompt_mask)]
        return tuple(torch.cat(tensors) for tensors in zip(*parts))
    return one_by_one


def recorded(clip_grad_norm, gradients: dict):
    """The whole gradients of every update, by update and parameter."""
    def clip(run, model):
        norm, update = clip_grad_norm(run, model), len({name.split("|")[0] for name in gradients})
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                whole = weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad
                gradients[f"{update}|{name}"] = whole.clone()
        return norm
    return clip


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
