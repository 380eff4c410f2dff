"""Peak memory of one update of grpo.py: measured, and estimated part by part.

    python benchmarks/memory.py --shape 0.5b --layers 4 --rows 2 --prompt-tokens 256 --completion-tokens 256
    python benchmarks/memory.py --shape 0.6b --rows 4 --prompt-tokens 2048 --completion-tokens 1024 --device cuda
    python benchmarks/memory.py --shape 7b --rows 4 --prompt-tokens 2048 --completion-tokens 1024 --estimate-only

The models have Qwen's shapes and random weights, with products in bfloat16 and a frozen reference. The update is one
micro-batch of --rows completions, each with its own prompt. A GPU that is too small for a shape can still check the
estimate on fewer layers (--layers).

The estimate, in bytes, for n parameters, L layers of width D and inner width I, a vocabulary of V tokens, and t tokens
in the micro-batch, c of them in completions:
  trained     16 n                          float32 weights, gradients, and AdamW's two moments
  copies       2 n                          the matrices in bfloat16, which autocast keeps until it ends
  reference    2 n + 2 V D                  matrices in bfloat16, embeddings in float32; 2 V D more where the head
                                            shares its weights with them, since it gets a bfloat16 copy
               with --lora-rank these three are one reference, and 16 bytes per parameter of the adapter
  layers       t L (34 D + 8 I)             what a layer keeps for the backward pass: about 8 float32 and 1 bfloat16
                                            of its width (norms, residuals, attention), 4 bfloat16 of its inner width
               t L (58 D + 12 I)            with --lora-rank: peft keeps a float32 copy of each matrix's input
               t (4 L D + 34 D + 8 I)       with --gradient-checkpointing: each layer's input, and one layer
  logits      12 min(c V, LOGITS_AT_ONCE)   a chunk in float32: logits, log-softmax, gradient; on a GPU the chunk is
                                            four times as large
"""
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import modeling  # noqa: E402
from grpo import Args as GRPOArgs  # noqa: E402
from grpo import policy_loss  # noqa: E402
from runtime import Run, reference_mode  # noqa: E402

SHAPES = {  # width, layers, heads, key-value heads, inner width, tied: Qwen2.5's and Qwen3-0.6B's, 151,936 tokens
    "0.5b": (896, 24, 14, 2, 4864, True), "0.6b": (1024, 28, 16, 8, 3072, True),
    "1.5b": (1536, 28, 12, 2, 8960, True), "7b": (3584, 28, 28, 4, 18944, False),
    "tiny": (64, 3, 4, 2, 128, True)}  # to see that it runs


@dataclass
class Args:
    shape: Literal["0.5b", "0.6b", "1.5b", "7b", "tiny"] = "0.5b"
    layers: int = 0
    """number of layers (0: the shape's)"""
    rows: int = 2
    prompt_tokens: int = 256
    completion_tokens: int = 256
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    device: str = "cpu"
    estimate_only: bool = False


def estimate(args: Args, n: int, width: int, layers: int, inner: int, keys: int, vocabulary: int) -> dict[str, float]:
    """Bytes, by part."""
    c = args.rows * args.completion_tokens
    t = c + args.rows * args.prompt_tokens
    layer = (58 * width + 12 * inner) if args.lora_rank else (34 * width + 8 * inner)
    frozen = 2 * n + (4 if SHAPES[args.shape][-1] else 2) * vocabulary * width
    if args.lora_rank:
        ends = 4 * width + 2 * (width + keys) + 3 * (width + inner)  # of a layer's seven matrices
        models = {"frozen": frozen, "adapter": 16 * args.lora_rank * layers * ends}
    else:
        models = {"trained": 16 * n, "copies": 2 * n, "reference": frozen}
    return {**models, "layers": t * (4 * layers * width + layer) if args.gradient_checkpointing else t * layers * layer,
            "logits": 12 * min(c * vocabulary, common.LOGITS_AT_ONCE * (1 if args.device == "cpu" else 4))}


def config_of(shape: str, layers: int = 0) -> Qwen2Config:
    width, all_layers, heads, kv_heads, inner, tied = SHAPES[shape]
    return Qwen2Config(vocab_size=2048 if shape == "tiny" else 151_936, hidden_size=width, intermediate_size=inner,
                       num_hidden_layers=layers or all_layers, num_attention_heads=heads,
                       num_key_value_heads=kv_heads, tie_word_embeddings=tied)


def random_model(config, device):
    """A model as load_causal_lm gives it, in float32 and tried on a few tokens."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    modeling.check_forward(model.train())
    modeling.has_plain_head(model.eval())
    return model


def main(args: Args):
    config = config_of(args.shape, args.layers)
    width, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    keys = width // config.num_attention_heads * config.num_key_value_heads
    with torch.device("meta"):
        n = AutoModelForCausalLM.from_config(config).num_parameters()
    parts = estimate(args, n, width, layers, config.intermediate_size, keys, vocabulary)
    print("estimate " + ", ".join(f"{k} {v / 2**30:.2f}" for k, v in parts.items())
          + f"; {sum(parts.values()) / 2**30:.2f} GiB")
    if args.estimate_only:
        return

    device = torch.device(args.device)
    cpu = device.type == "cpu"
    before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() if cpu else 0
    torch.manual_seed(0)
    run = Run(GRPOArgs(device=args.device, dtype="bfloat16", lr=1e-6, lora_rank=args.lora_rank,
                       gradient_checkpointing=args.gradient_checkpointing,
                       micro_batch_tokens=args.rows * (args.prompt_tokens + args.completion_tokens)), __file__)
    policy = run.trainable(random_model(config, device))
    reference = policy if args.lora_rank else modeling.freeze(random_model(config, device), run.bf16)
    policy.train()
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-6, fused=True)
    prompts, completions = (torch.randint(vocabulary, (args.rows, tokens), device=device)
                            for tokens in (args.prompt_tokens, args.completion_tokens))
    rollout = prompts, torch.ones_like(prompts), completions, torch.ones_like(completions)
    rows, = run.micro_batches(sum(mask.sum(1) for mask in rollout[1::2]))  # one micro-batch
    rollout = [x[rows] for x in rollout]
    for _ in range(2):  # the first update creates the moments
        with torch.no_grad(), run.autocast(), reference_mode(reference):
            old, _ = common.completion_logprobs(reference, *rollout)
        with run.autocast():
            logprobs, _ = common.completion_logprobs(policy, *rollout)
        loss, _, _ = policy_loss(logprobs, old, torch.ones(args.rows, device=device), rollout[3], "grpo", 0.2, 0.2)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before if cpu
            else torch.cuda.max_memory_allocated())
    print(f"measured {peak / 2**30:.2f} GiB, {args.shape} with {layers} layers, {n / 1e6:.0f} M parameters, "
          f"{args.rows} x ({args.prompt_tokens} + {args.completion_tokens}) tokens"
          f"{', gradient checkpointing' if args.gradient_checkpointing else ''}"
          f"{f', LoRA rank {args.lora_rank}' if args.lora_rank else ''}, {args.device}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
