"""One step of each script, and the gradient of each of its updates, written to a file: run by
tests/test_many_processes.py, alone and under torchrun.

    python tests/many_processes.py OUT SCRIPT [SCRIPT ...]
"""
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from safetensors.torch import save_file

import common

ONLINE = dict(steps=1, prompts_per_step=4, group_size=4, max_new_tokens=16, eval_every=0, device="cpu",
              micro_batch_size=3, max_grad_norm=1e9)
ARGS = {
    "grpo": ONLINE | dict(loss_type="dapo", scale_rewards="batch", kl_in="reward"),
    "grpo --lora-rank": ONLINE | dict(lora_rank=4),
    "ppo": ONLINE | dict(minibatches=1),
    "reinforce": ONLINE | dict(normalise=True, kl_in="token"),
    "dpo": dict(pairs_per_step=8, micro_batch_size=6, eval_pairs=4, eval_prompts=2, max_new_tokens=4, device="cpu",
                max_grad_norm=1e9, sft_weight=0.1),
    "reward_model": dict(pairs_per_step=8, micro_batch_size=6, eval_pairs=4, bias_prompts=0, device="cpu",
                         max_grad_norm=1e9)}


def main(out: Path, names: list[str]):
    out.mkdir(parents=True, exist_ok=True)
    pairs = Path("tiny/preferences.jsonl").read_text().splitlines(True)[:14]  # 10, in steps of 8 and 2, and 4 held out
    (out / f"pairs-{common.os.environ.get('RANK', 0)}.jsonl").write_text("".join(pairs))
    for name in names:
        script, gradients = importlib.reload(importlib.import_module(name.split()[0])), {}
        if hasattr(script, "generate"):
            script.generate = seeded(script.generate)
        script.clip_gradients = noted(script.clip_gradients, gradients)
        args = dict(ARGS[name])
        if name in ("dpo", "reward_model"):
            args |= {"data": str(out / f"pairs-{common.os.environ.get('RANK', 0)}.jsonl")}
        if name == "dpo":
            args |= {"reference_dir": str(out / "reference")}
        script.main(script.Args(**args, run_dir=str(out / name)))
        if common.rank() == 0:
            save_file(gradients, out / f"{name}.safetensors")
    if common.dist.is_initialized():
        common.dist.barrier()
        common.dist.destroy_process_group()  # else a process that ends first may take the other with it


def seeded(generate):
    """Sampling that draws for each prompt with a seed of its own, whichever process it is on."""
    def of_each(model, prompt_ids, prompt_mask, args, group_size, ends, pad_id, generator):
        parts = [generate(model, ids[None], mask[None], args, group_size, ends, pad_id,
                          torch.Generator().manual_seed(int(ids[mask.bool()].sum())))
                 for ids, mask in zip(prompt_ids, prompt_mask)]
        return tuple(torch.cat(tensors) for tensors in zip(*parts))
    return of_each


def noted(clip_gradients, gradients: dict):
    """The gradients of every update, whole, by model and parameter."""
    def clip(model, most):
        norm, update = clip_gradients(model, most), len({k.split("|")[0] for k in gradients})
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                gradients[f"{update}|{name}"] = common.whole(weight.grad).clone()
        return norm
    return clip


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
