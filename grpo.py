"""Group relative policy optimisation, GRPO (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300).

Samples a group of completions of each prompt, scores them, and takes as the advantage of each
how much better it is than its group: there is no critic. Over prompts x, completions y and
tokens t:

    maximise   E[ mean over t of  min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) ]
               - beta * KL(policy || reference)
    A     = (r - mean of the group's r) / std of the group's r     one for all tokens of y
    rho_t = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)              1 on the first update

Where this differs from the paper:
 1. The reference is the initial policy throughout: no outer loop renews it or the
    reward model.
 2. The standard deviation is the sample's (G - 1), plus 1e-4 so that a flat group stays at 0.
 3. Outcome rewards only, no process rewards.
The defaults are the paper's otherwise, the tiny world's sizes, and one update a rollout. Its KL
in the loss leads elsewhere than to the optimum of E[r] - beta * KL, a token's KL answering only
for itself; the division by the standard deviation then makes beta depend on how far the policy
has concentrated. `--kl-in reward --scale-rewards none --loss-type dr_grpo` is the exact gradient.
README.md, "Where it converges", has by how much each misses, and why.
Neighbours: reinforce.py takes a completion as one action, ppo.py learns a critic.

    python grpo.py                                     the tiny world: half a minute on a laptop
    python grpo.py --model MODEL --reward REWARD_MODEL --data PROMPTS.jsonl --lr 1e-6

Watch: `eval_gold` (or your own held-out measure) beside `reward`: the second rising without
the first is reward hacking; `length_correlation`: far above 0, the reward pays for words; `kl`:
how far the policy went for it; `flat_*`: prompts that teach nothing.
"""
import json
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, DynamicCache, TopPLogitsWarper, get_scheduler,
                          logging)

from common import (add_lora, anywhere, as_reference, checkpoint_gradients, clip_gradients,
                    command_line, completion_logprobs, context_of, credit_line,
                    distinct_ngrams, draw, encode_prompts, enough, eval_line, fail, freeze,
                    gather, join_processes, kl_estimate, length_correlation, load_model,
                    load_reward, load_state, load_tokenizer, masked_mean, micro_batches,
                    not_finite, open_curves, open_run, pad, pass_rates, past, rank, ranks,
                    read_prompts, remove_old, save_model, save_state, shard, share, total,
                    unsharded, wants_bf16, whole_folder, win_rates)


# --- arguments

@dataclass
class Args:
    model: str = "tiny/policy"
    """the policy to start from: a causal LM's folder or hub id"""
    reference: str = ""
    """what the KL is measured from and wins are counted against, likewise (empty: --model)"""
    reward: str = "tiny/reward_model"
    """a one-label reward model's folder or hub id, or file.py:function"""
    gold: str = ""
    """what evaluation scores beside it and training never sees, likewise (tiny world: its gold
    reward)"""
    data: str = "tiny/prompts.jsonl"
    """rows of prompts: a .jsonl or .jsonl.gz file, or a hub data set
    owner/name[:config][:split]"""
    eval_data: str = ""
    """held-out rows (tiny world: its own; otherwise the last --eval-prompts rows of --data,
    held out)"""
    prompt_column: str = "prompt"
    """the column that holds the prompt: a text, or chat messages"""
    run_dir: str = ""
    """a new folder for metrics, samples and the trained model (runs/SCRIPT-DATE-TIME)"""
    resume: str = ""
    """the folder of a run to go on with, from its newest checkpoint and with its flags"""
    seed: int = 0

    steps: int = 40
    """rollouts to train for (real models: 200 to 2000; 0: evaluate --model, and save nothing of it)"""
    prompts_per_step: int = 16
    """prompts a rollout (128 to 512)"""
    group_size: int = 16
    """completions of each prompt (8 to 64)"""
    max_new_tokens: int = 48
    """longest completion, in tokens (256 to 8192)"""
    max_prompt_tokens: int = 0
    """leave out rows with longer prompts, and count them (0: a prompt too long for the model
    is an error)"""
    temperature: float = 1.0
    """of sampling and of the log-probs alike (0.7 to 1.0)"""
    top_p: float = 1.0
    """nucleus sampling; below 1 the log-probs are those of another distribution than was
    sampled from"""
    truncated: Literal["keep", "mask", "penalise"] = "keep"
    """completions cut at --max-new-tokens: as they are; out of the loss; or less
    --truncation-penalty"""
    truncation_penalty: float = 1.0
    """in units of reward"""
    reward_timeout: float = 0.0
    """seconds that a reward function may take for a rollout (0: any)"""

    beta: float = 0.04
    """weight of the KL, in reward per nat (0.001 to 0.1; 0: no reference model is loaded, unless
    --reference or --stop-kl asks for one)"""
    stop_kl: float = 0.0
    """end the run after the step whose KL is beyond this many nats a completion (5 to 50; 0: never)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """after the warm-up, for the rest of the updates"""
    warmup: int = 0
    """updates of linear warm-up (0 to 20)"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    micro_batch_size: int = 256
    """most completions per forward and backward pass; sets the memory used, changes no result"""
    tokens_per_micro_batch: int = 8192
    """and most tokens, with prompts and padding (16384 to 65536 on a GPU of 80 GB)"""
    generate_batch_size: int = 512
    """completions sampled at a time; sets the memory used"""
    gather_to_sample: bool = True
    """with many processes: all weights in each of them while sampling, which is faster, if they fit"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""
    lora_rank: int = 0
    """train low-rank updates of the weights, of this rank (8 to 64), with an --lr ten times higher
    (0: the weights)"""
    offload_reference: bool = False
    """keep the reference in the CPU's memory between uses"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of matrix products (autocast; weights stay float32): auto is bfloat16 where it is faster, on a
    GPU and for large models on CPUs that have it"""
    device: str = "auto"
    """auto: a GPU where there is one"""

    save_every: int = 20
    """steps between checkpoints that --resume can go on from; there is one at the end (0: no other)"""
    keep: int = 1
    """how many checkpoints are kept, the newest (1 to 5)"""
    log_every: int = 5
    """steps between printed lines"""
    eval_every: int = 20
    """steps between evaluations; there is one before the first step and one after the last (0:
    none)"""
    eval_prompts: int = 300
    """held-out prompts"""
    eval_samples: int = 1
    """completions of each of them (for pass@k, of rewards that are all 0 or 1: 4 to 64)"""
    show_credit: bool = False
    """print the best and the worst completion of a prompt, each token with its advantage, beside the
    printed lines"""
    tensorboard: bool = False
    """curves in RUN/tensorboard, too"""

    # --- arguments of the algorithm
    lr: float = 4e-4
    """AdamW's peak learning rate (real models: 1e-6 to 1e-5)"""
    epochs: int = 1
    """passes over a rollout (1 to 4)"""
    minibatches: int = 1
    """updates a pass (1 to 16); the rollout's completions are dealt out to them at random"""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """what the advantages are divided by: the group's std, the batch's (arXiv:2508.08221), or
    nothing"""
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "cispo"] = "grpo"
    """see policy_loss and token_weights"""
    clip_low: float = 0.2
    """the ratio is clipped below at 1 - this (gspo: 3e-4; cispo: 1 for no bound)"""
    clip_high: float = 0.2
    """the ratio is clipped above at 1 + this (dapo: 0.28; gspo: 4e-4; cispo: 1 to 5)"""
    kl_in: Literal["loss", "reward"] = "loss"
    """KL per token in the loss (the paper), or per completion off the reward, before the
    advantages"""
    kl_loss: Literal["k3", "k3_ratio", "k2"] = "k3"
    """the estimator in the loss: the paper's, times the ratio (DeepSeek-V3.2), or half the
    squared log"""


# --- the algorithm

def group_advantages(rewards, group_size: int, scale: str = "group"):
    """How much better than its group each completion is (DeepSeekMath, eq. 3 and section
    4.1.2).

    rewards (B,): groups follow one another; nan leaves a completion out, and gets advantage 0.
    scale: divide by the `group`'s standard deviation, the `batch`'s (Liu et al. 2025,
    arXiv:2508.08221), or by `none` (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).
    """
    def std(r):  # (N, K) -> (N, 1): the sample's, without nan
        valid = ~r.isnan()
        mean = r.nanmean(1, keepdim=True)
        squares = (r - mean).square().nansum(1, keepdim=True)
        return (squares / (valid.sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()

    # float64: a flat group's mean is off by a rounding that the division would blow up
    groups = rewards.double().view(-1, group_size)  # (prompts, G)
    advantages = groups - groups.nanmean(1, keepdim=True)
    if scale == "group":
        advantages = advantages / (std(groups) + 1e-4)
    elif scale == "batch":
        advantages = advantages / (std(groups.view(1, -1)) + 1e-4)
    return advantages.nan_to_num(0.0).view(-1).to(rewards.dtype)  # (B,)


def policy_loss(logprobs, old_logprobs, advantages, mask, loss_type: str,
                clip_low: float, clip_high: float):
    """The loss of each token, and whether it is clipped below or above: three (B, T).

    logprobs, old_logprobs, mask (B, T), advantages (B,).
    grpo, bnpo, dapo, dr_grpo: PPO's clipped ratio (Schulman et al. 2017, arXiv:1707.06347,
        eq. 7); they differ in token_weights. dapo asks for clip_high > clip_low
        (arXiv:2503.14476, eq. 8).
    gspo: one ratio a completion, the geometric mean of its tokens' (arXiv:2507.18071, eq. 5
        and 7).
    cispo: the clipped ratio as a weight on the log-prob, so that clipped tokens still learn
        (MiniMax-M1, arXiv:2506.13585, eq. 4, 5).
    """
    A = advantages[:, None]
    log_ratio = logprobs - old_logprobs
    if loss_type == "gspo":
        log_ratio = masked_mean(log_ratio, mask, 1)[:, None].expand_as(mask)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    if loss_type == "cispo":
        loss = -clipped.detach() * A * logprobs
        low, high = ratio < 1 - clip_low, ratio > 1 + clip_high
    else:
        loss = -torch.minimum(ratio * A, clipped * A)
        low, high = (ratio < 1 - clip_low) & (A < 0), (ratio > 1 + clip_high) & (A > 0)
    return loss, low, high


def kl_loss(logprobs, old_logprobs, ref_logprobs, kind: str):
    """What beta multiplies in the loss, per token (B, T); see common.kl_estimate for its
    gradient.

    k3: DeepSeekMath, eq. 4. k3_ratio: DeepSeek-V3.2 (arXiv:2512.02556). k2: half the squared
    log.
    """
    if kind == "k3_ratio":
        return (logprobs - old_logprobs).exp() * kl_estimate(logprobs, ref_logprobs, "k3")
    return kl_estimate(logprobs, ref_logprobs, kind)


def token_weights(mask, loss_type: str, max_new_tokens: int):
    """What each token counts for in the loss of an update, (B, T), fixed before
    micro-batching.

    grpo, gspo: the mean over completions of the mean over their tokens (DeepSeekMath, eq. 3).
    dapo, cispo: the mean over all tokens of the update. DAPO's eq. 8 writes it for one
        group; as in its authors' code, and elsewhere, a batch of groups has one mean.
    bnpo: TRL's name for that mean within each micro-batch, so the one that depends on how they
        are split; here each counts by its number of completions.
    dr_grpo: the sum over tokens, over a constant: completions times the longest
    (arXiv:2503.20783).
    """
    if loss_type in ("grpo", "gspo"):
        lengths = mask.sum(1, keepdim=True).clamp(min=1)
        return mask / lengths / (mask.sum(1) > 0).sum().clamp(min=1)
    if loss_type == "dr_grpo":
        return mask / (len(mask) * max_new_tokens)
    return mask / mask.sum().clamp(min=1)


# --- sampling

@torch.no_grad()
def generate(model, prompt_ids, prompt_mask, args, group_size: int, ends: list[int], pad_id: int,
             generator):
    """Samples group_size completions of each prompt: completion_ids and mask, two (B,
    longest).

    prompt_ids, prompt_mask (prompts, P), padded on the left. mask is 1 up to and including the
    first of the `ends`. generator: None takes the likeliest token each time. A prompt is read
    once for its group, and a finished row costs nothing more.
    """
    model.eval()
    cache = DynamicCache(config=model.config)
    position = (prompt_mask.cumsum(1) - 1).clamp(min=0)  # (prompts, P)
    logits = model(input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=position,
                   use_cache=True, logits_to_keep=1, **past(model, cache)).logits[:, -1]
    cache.batch_repeat_interleave(group_size)
    logits = logits.repeat_interleave(group_size, 0)  # (B, V)
    attention = prompt_mask.repeat_interleave(group_size, 0)  # (B, P), grows by a column a token
    position = position[:, -1:].repeat_interleave(group_size, 0)  # (B, 1)
    rows = torch.arange(len(logits), device=logits.device)  # the completions still being written
    completion_ids = torch.full((len(rows), args.max_new_tokens), pad_id, device=logits.device)
    mask = torch.zeros_like(completion_ids)
    ends = torch.tensor(ends, device=logits.device)
    for t in range(args.max_new_tokens):
        logits = logits.float() / args.temperature
        if args.top_p < 1:
            logits = TopPLogitsWarper(args.top_p)(None, logits)
        if generator is None:
            token = logits.argmax(-1, keepdim=True)  # (rows, 1)
        else:
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)  # (rows, 1)
        completion_ids[rows, t] = token[:, 0]
        mask[rows, t] = 1
        alive = ~torch.isin(token[:, 0], ends)
        if t == args.max_new_tokens - 1 or not anywhere(alive, model):
            break
        if alive.any() and not alive.all():
            rows, token, attention = rows[alive], token[alive], attention[alive]
            position = position[alive]
            cache.batch_select_indices(alive.nonzero()[:, 0])
        attention = torch.cat([attention, attention.new_ones(len(rows), 1)], 1)
        position = position + 1
        logits = model(input_ids=token, attention_mask=attention, position_ids=position,
                       use_cache=True, **past(model, cache)).logits[:, -1]
    # nothing after the first end, where rows went on, waiting for another process
    ended = torch.isin(completion_ids, ends) * mask
    mask = mask * (ended.cumsum(1) - ended == 0)
    return completion_ids, mask


def main(args: Args):
    # --- setup of the algorithm
    if args.group_size < 2:
        fail("--group-size: a group of 1 is its own mean, so every advantage is 0: use 2 or more")
    kl_in_reward = args.beta > 0 and args.kl_in == "reward"
    # with one update a rollout the old log-probs are the new ones: no second forward pass
    old_first = kl_in_reward or args.epochs * args.minibatches > 1
    state = {}  # nothing is carried from step to step, besides what all scripts carry

    # --- setup
    for flag in ("steps", "lora_rank", "eval_every", "save_every", "warmup", "beta", "stop_kl",
                 "max_prompt_tokens", "reward_timeout"):
        if getattr(args, flag) < 0:
            fail(f"--{flag.replace('_', '-')}: must not be negative")
    for flag in ("prompts_per_step", "group_size", "max_new_tokens", "temperature", "lr", "epochs",
                 "minibatches", "micro_batch_size", "tokens_per_micro_batch", "generate_batch_size",
                 "log_every", "eval_prompts", "eval_samples", "keep"):
        if not getattr(args, flag) > 0:
            fail(f"--{flag.replace('_', '-')}: must be more than 0")
    if not 0 < args.top_p <= 1:
        fail("--top-p: must be more than 0 and at most 1")
    if args.steps == args.eval_every == 0:
        fail("--steps 0: only evaluates, and --eval-every 0 forbids that: leave it out")
    if args.minibatches > args.prompts_per_step * args.group_size:
        fail("--minibatches: more than there are completions in a rollout")
    if args.top_p < 1:
        print("warning: --top-p < 1 samples from another distribution than the one whose log-probs, "
              "ratio and KL are computed: they are inexact")
    new_name = f"runs/{Path(__file__).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.resume or args.run_dir or new_name)
    if run_dir.exists() and not args.resume:
        fail(f"--run-dir: {run_dir} exists already: name a new folder, or move it away")
    device = join_processes(args.device)
    enough(min(args.prompts_per_step, args.prompts_per_step * args.group_size // args.minibatches),
           "--prompts-per-step, or completions of one of the --minibatches")
    if args.offload_reference and ranks() > 1:
        fail("--offload-reference: is for one process; many share the reference out")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    seed_of_samples = args.seed + 1_000_000 * rank()  # each process has its own
    generator = torch.Generator(device).manual_seed(seed_of_samples)

    tiny = args.data == Args.data
    args.eval_data = args.eval_data or ("tiny/heldout.jsonl" if tiny else "")
    args.gold = args.gold or ("tiny/world.py:gold_reward" if tiny else "")
    data = read_prompts(args.data, args.prompt_column)
    if args.eval_data:
        eval_data = read_prompts(args.eval_data, args.prompt_column)[:args.eval_prompts]
    else:
        data, eval_data = data[:-args.eval_prompts], data[-args.eval_prompts:]
        if not data:
            fail(f"{args.data}: {len(eval_data)} rows, which --eval-prompts {args.eval_prompts} holds "
                 "out: lower it, or name --eval-data")
    tokenizer = load_tokenizer(args.model)
    policy, missing = load_model(AutoModelForCausalLM, args.model, device)
    if missing:
        fail(f"{args.model}: no causal LM: it has no weights for {', '.join(sorted(missing)[:3])}")
    bf16 = wants_bf16(args.dtype, policy)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    room = context_of(policy) - args.max_new_tokens
    data, prompts = encode_prompts(tokenizer, data, args.data, room, args.max_prompt_tokens)
    eval_data, eval_prompts = encode_prompts(tokenizer, eval_data, args.eval_data or args.data, room,
                                             args.max_prompt_tokens)
    enough(len(eval_prompts), "--eval-prompts")
    ends = policy.generation_config.eos_token_id or []  # one, or a list: chat models end turns by more
    ends = sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
    pad_id = tokenizer.pad_token_id
    adapter = add_lora(policy, args.lora_rank, bf16) if args.lora_rank else None
    shard(policy)
    reference = None
    if adapter and not args.reference and (args.beta > 0 or args.stop_kl > 0):
        reference = policy  # without its adapter; see common.as_reference
    elif args.beta > 0 or args.stop_kl > 0 or args.reference:
        name = args.reference or args.model
        reference, missing = load_model(AutoModelForCausalLM, name,
                                        "cpu" if args.offload_reference else device)
        if missing or load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
            fail(f"--reference {name}: no causal LM, or with another tokenizer than the policy's")
        freeze(reference, bf16)
        shard(reference)
    micro = args.micro_batch_size, args.tokens_per_micro_batch
    reward = load_reward(args.reward, device, *micro, bf16, args.reward_timeout)
    gold = load_reward(args.gold, device, *micro, bf16, args.reward_timeout) if args.gold else None
    if args.gradient_checkpointing:
        checkpoint_gradients(policy)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad],
                                  lr=args.lr, weight_decay=0.0, fused=True)
    updates_in_all = args.steps * args.epochs * args.minibatches
    schedule = get_scheduler(
        "constant_with_warmup" if args.lr_schedule == "constant" else args.lr_schedule, optimizer,
        num_warmup_steps=args.warmup, num_training_steps=updates_in_all)
    models = {"policy": policy, "reference": None if reference is policy else reference,
              "reward": getattr(reward, "model", None)}
    trained = {"policy": (policy, optimizer, schedule)}

    # --- the run folder, sampling and evaluation
    for name, model in models.items():  # what is held in memory, besides activations
        if model is not None:
            tuned = sum(p.numel() for p in model.parameters() if p.requires_grad)
            size = 12 * tuned + sum(p.numel() * p.element_size() for p in model.parameters())
            print(f"{name:10} {model.num_parameters() / 1e6:10.2f} M parameters "
                  f"{size / 2**20:10.1f} MiB  weights"
                  + (f", gradients and two moments of {tuned / 1e6:.2f} M" if tuned else ""))
    # carried by all scripts, and by a run that goes on; order: of the prompts still to come
    state |= {"step": 0, "rows": len(prompts), "order": [], "first": {},
              "eval_rows": len(eval_prompts) * args.eval_samples}
    lock = open_run(run_dir, args, trained)  # held as long as this process lives
    if args.resume:
        state = load_state(run_dir, args, trained, state, generator)
    curves = open_curves(run_dir, args, state["step"])

    def progress(parts: list, name: str):
        """A bar within a step that takes seconds."""
        return tqdm(parts, desc=name, delay=2, leave=False, disable=rank() > 0 or None)

    def append(name: str, row: dict):
        if rank() == 0:
            with open(run_dir / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if curves and name == "metrics.jsonl":
                draw(curves, row)

    def sample(some_prompts: list[list[int]], group_size: int, generator, model=policy):
        """Completions of some prompts: prompt_ids, prompt_mask (B, P), completion_ids, mask
        (B, T), truncated (B,), and the B texts."""
        prompt_ids, prompt_mask = pad(some_prompts, pad_id, "left", device)
        at_once = max(1, args.generate_batch_size // group_size)
        calls = math.ceil(len(some_prompts) / ranks() / at_once)  # in every process as many
        prompts_at_once = list(zip(*(share(t).tensor_split(calls) for t in (prompt_ids, prompt_mask))))
        # one context for all tokens: the weights are cast, and gathered, once
        with autocast, unsharded(model, args.gather_to_sample):
            parts = [generate(model, ids, m, args, group_size, ends, pad_id, generator)
                     for ids, m in progress(prompts_at_once, "generate")]
        mask = gather(torch.cat([m for _, m in parts]))
        lengths = mask.sum(1)  # (B,)
        mask = mask[:, :lengths.max()]  # (B, T)
        completion_ids = gather(torch.cat([ids for ids, _ in parts]))[:, :lengths.max()]  # (B, T)
        last = completion_ids.gather(1, lengths[:, None] - 1)[:, 0]
        truncated = ~torch.isin(last, torch.tensor(ends, device=device))  # (B,)
        texts = tokenizer.batch_decode(
            [ids[m.bool()] for ids, m in zip(completion_ids, mask)], skip_special_tokens=True)
        repeat = [t.repeat_interleave(group_size, 0) for t in (prompt_ids, prompt_mask)]
        return *repeat, completion_ids, mask, truncated, texts

    @torch.no_grad()
    def logprobs_of(model, *rollout):
        """Log-probs and entropies of a rollout (prompt_ids and the rest) under a model: two (B, T)."""
        logprobs, entropy = (torch.zeros(rollout[3].shape, device=device) for _ in range(2))  # (B, T)
        for rows in progress(micro_batches(rollout[1].sum(1) + rollout[3].sum(1), *micro), "log-probs"):
            with autocast:
                logprobs[rows], entropy[rows] = completion_logprobs(
                    model, *(t[rows] for t in rollout), args.temperature)
        return total(logprobs), total(entropy)

    def evaluate(step: int):
        """Completions of each held-out prompt, always with the same seed."""
        rows = [row for row in eval_data for _ in range(args.eval_samples)]

        def sample_and_score(model):
            eval_generator = torch.Generator(device).manual_seed(seed_of_samples)
            *ids, truncated, texts = sample(eval_prompts, args.eval_samples, eval_generator, model)
            scores = {"reward": reward(rows, texts)} | ({"gold": gold(rows, texts)} if gold else {})
            return ids, truncated, texts, scores  # (B, P) x 2 and (B, T) x 2, (B,), B, (B,) each

        ids, truncated, texts, scores = found = sample_and_score(policy)
        lengths = ids[-1].sum(1)  # (B,)
        if not state["first"]:  # of the reference, which the policy is at step 0, unless another is named
            if args.reference or reference is not None and step > 0:
                with as_reference(reference, adapter, device):
                    found = sample_and_score(reference)
            state["first"] = {"texts": found[2], "lengths": found[0][-1].sum(1).tolist(),
                              "scores": {k: v.tolist() for k, v in found[3].items()}}
        first = state["first"]
        first_scores = {k: torch.tensor(v, device=device) for k, v in first["scores"].items()}
        judge = "gold" if gold else "reward"  # of who wins
        wins = win_rates(scores[judge] - first_scores[judge],
                         lengths - torch.tensor(first["lengths"], device=device), args.eval_samples)
        passes = pass_rates(scores["reward"], args.eval_samples)
        if reference is not None:
            logprobs, _ = logprobs_of(policy, *ids)
            with as_reference(reference, adapter, device):
                ref_logprobs, _ = logprobs_of(reference, *ids)
            scores["kl"] = kl_estimate(logprobs, ref_logprobs).sum(1)
        metrics = {k: v.nanmean().item() for k, v in scores.items()}
        metrics |= {"length": lengths.float().mean().item(),
                    "truncated": truncated.float().mean().item(),
                    "reference_reward": first_scores["reward"].nanmean().item(), **passes, **wins}
        metrics = {"step": step} | {f"eval_{k}": round(v, 4) for k, v in metrics.items()}
        metrics = {k: v for k, v in metrics.items() if v == v}  # JSON has no nan: of no row at all
        append("metrics.jsonl", metrics)
        tqdm.write(eval_line(metrics))
        for i, (row, text) in enumerate(zip(rows, texts)):
            values = {k: round(v[i].item(), 4) for k, v in scores.items()}
            append("samples.jsonl", {"step": step, "prompt": row["prompt"], "completion": text,
                                     "reference": first["texts"][i],
                                     "truncated": bool(truncated[i]),
                                     **{k: v for k, v in values.items() if v == v}})
            if i % args.eval_samples == 0 and i < 4 * args.eval_samples:
                asked = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
                tqdm.write(f"      {values['reward']:6.2f}  {shorten(asked, 40)} -> {shorten(text, 80)}")

    def stop_before_update(step: int, batch: list[int], rollout):
        """The end of a run whose gradient is not finite; names the rows that are to blame."""
        logprobs, _ = logprobs_of(policy, *rollout)
        bad = ~logprobs.isfinite().all(1).view(-1, args.group_size).all(1)  # (prompts,)
        not_finite(step, [data[i]["prompt"] for i, b in zip(batch, bad) if b], len(batch))

    def save(name: str):
        """What from_pretrained loads, and in resume/ what it takes to go on."""
        with whole_folder(run_dir / name) as folder:
            save_model(adapter or policy, policy.config, tokenizer, folder)
            save_state(folder, trained, state, generator)
        remove_old(run_dir, args.keep)

    interrupted = stop = False

    def finish_step(*_):
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once

    signal.signal(signal.SIGINT, finish_step)
    if args.eval_every and not args.resume:
        evaluate(0)
    bar = tqdm(range(state["step"] + 1, args.steps + 1), initial=state["step"], total=args.steps,
               disable=rank() > 0 or None)  # no bar where the output is no terminal
    for step in bar:
        clock = [time.time()]

        # --- 1. generate
        while len(state["order"]) < args.prompts_per_step:  # each pass over the data in a new order
            state["order"] += torch.randperm(len(prompts)).tolist()
        batch, state["order"] = (state["order"][:args.prompts_per_step],
                                 state["order"][args.prompts_per_step:])
        prompt_ids, prompt_mask, completion_ids, mask, truncated, texts = sample(
            [prompts[i] for i in batch], args.group_size, generator)  # (B, P) x 2, (B, T) x 2, (B,)
        lengths = prompt_mask.sum(1) + mask.sum(1)  # (B,) tokens, prompt and completion

        # --- 2. score
        clock.append(time.time())
        scores = reward([data[i] for i in batch for _ in range(args.group_size)], texts)  # (B,)
        if scores.isnan().all():
            fail(f"--reward {args.reward}: left out every completion of step {step}")
        rewards = scores.clone()
        if args.truncated == "penalise":
            rewards -= args.truncation_penalty * truncated
        learn = ~rewards.isnan()  # (B,) a completion without a score, or masked, has no say in the loss
        if args.truncated == "mask":
            learn &= ~truncated
        loss_mask = mask * learn[:, None]  # (B, T); it stays in the group's mean, and in attention

        # --- 3. kl
        clock.append(time.time())
        old_logprobs = torch.zeros(mask.shape, device=device)  # (B, T)
        ref_logprobs, entropy = old_logprobs.clone(), old_logprobs.clone()  # (B, T)
        rollout = prompt_ids, prompt_mask, completion_ids, mask
        if reference is not None:
            with as_reference(reference, adapter, device):
                ref_logprobs, _ = logprobs_of(reference, *rollout)
        if old_first:
            old_logprobs, entropy = logprobs_of(policy, *rollout)

        # --- 4. advantages
        clock.append(time.time())
        if kl_in_reward:
            kl = kl_estimate(old_logprobs, ref_logprobs).sum(1)  # (B,)
            rewards = rewards - args.beta * kl
        advantages = group_advantages(rewards, args.group_size, args.scale_rewards)  # (B,)

        # --- 5. update
        policy.train()
        updates, losses, grad_norms = 0, [], []
        clip_low = clip_high = 0.0
        for _ in range(args.epochs):
            for minibatch in torch.randperm(len(mask), device=device).chunk(args.minibatches):
                parts = micro_batches(lengths, *micro, minibatch)
                weights = torch.zeros(mask.shape, device=device)  # (B, T)
                for rows in parts if args.loss_type == "bnpo" else [minibatch]:
                    weights[rows] = token_weights(loss_mask[rows], args.loss_type,
                                                  args.max_new_tokens) * len(rows) / len(minibatch)
                loss_sum = 0.0
                for rows in progress(parts, "update"):
                    ids = prompt_ids[rows], prompt_mask[rows], completion_ids[rows], mask[rows]
                    with autocast:
                        logprobs, entropy_now = completion_logprobs(policy, *ids, args.temperature)
                    if updates == 0:  # the policy is still the one that sampled: the ratio is 1
                        old_logprobs[rows], entropy[rows] = logprobs.detach(), entropy_now
                    loss, low, high = policy_loss(
                        logprobs, old_logprobs[rows], advantages[rows], mask[rows], args.loss_type,
                        args.clip_low, args.clip_high)
                    if args.beta > 0 and not kl_in_reward:
                        loss = loss + args.beta * kl_loss(
                            logprobs, old_logprobs[rows], ref_logprobs[rows], args.kl_loss)
                    loss = (loss * weights[rows]).sum()
                    loss.backward()
                    loss_sum += loss.item()
                    clip_low += (low * loss_mask[rows]).sum().item()
                    clip_high += (high * loss_mask[rows]).sum().item()
                grad_norm = clip_gradients(policy, args.max_grad_norm)
                if not torch.isfinite(grad_norm):
                    stop_before_update(step, batch, rollout)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                updates += 1
                losses.append(total(loss_sum))
                grad_norms.append(grad_norm.item())
        groups = scores.view(-1, args.group_size)
        flat = groups.amax(1) - groups.amin(1) < 1e-4  # (prompts,) nothing to learn from
        wrong, right = flat & (groups[:, 0] <= 0), flat & ((groups[:, 0] - 1).abs() < 1e-4)
        tokens = args.epochs * loss_mask.sum().clamp(min=1)
        own = {"flat_wrong": wrong.float().mean(), "flat_right": right.float().mean(),
               "flat_other": (flat & ~wrong & ~right).float().mean(),
               "clipped_low": total(clip_low) / tokens, "clipped_high": total(clip_high) / tokens}

        # --- 6. log
        if not old_first:  # each process has those of its own rows
            old_logprobs, entropy = total(old_logprobs), total(entropy)
        clock.append(time.time())
        seconds = clock[-1] - clock[0]
        parts = zip(("generate", "score", "kl", "update"), clock, clock[1:])
        metrics = {
            "step": step, "reward": scores.nanmean(),
            "reward_std": scores[~scores.isnan()].std(correction=0),
            "kl": kl_estimate(old_logprobs, ref_logprobs).sum(1).mean(),
            "entropy": masked_mean(entropy, mask),
            "length": mask.sum(1).float().mean(), "truncated": truncated.float().mean(),
            "length_correlation": length_correlation(scores, mask.sum(1), args.group_size),
            "distinct_3": distinct_ngrams(completion_ids, mask),
            "loss": sum(losses) / updates, "grad_norm": sum(grad_norms) / updates,
            "lr": schedule.get_last_lr()[0], "seconds": seconds,
            "tokens_per_second": mask.sum() / seconds, "left_out": scores.isnan().float().mean(),
            **{f"seconds_{name}": after - before for name, before, after in parts}, **own}
        if reference is None:
            del metrics["kl"]  # from what is not loaded
        metrics = {k: v if k == "step" else float(f"{float(v):.5g}") for k, v in metrics.items()}
        append("metrics.jsonl", metrics)
        shown = {k: f"{metrics[k]:.3g}" for k in ("reward", "kl", "length", "seconds") if k in metrics}
        bar.set_postfix(shown)
        if step % args.log_every == 0:
            tqdm.write(f"step {step:4}  " + "  ".join(f"{k} {v}" for k, v in shown.items()))
            if args.show_credit:
                per_token = advantages.view(len(mask), -1).expand_as(mask)  # (B, T)
                group = scores[:args.group_size].nan_to_num(0.0)  # of the first prompt
                for name, i in (("best", group.argmax()), ("worst", group.argmin())):
                    n = mask[i].sum()
                    tqdm.write(f"{name:5} {group[i]:6.2f}  "
                               + credit_line(tokenizer, completion_ids[i, :n], per_token[i, :n]))
        too_far = args.stop_kl > 0 and metrics["kl"] > args.stop_kl
        if args.eval_every and (step % args.eval_every == 0 or step == args.steps or too_far):
            evaluate(step)
        state["step"], stop = step, total(interrupted) > 0  # in any process
        if too_far:
            print(f"stopped by --stop-kl {args.stop_kl:g}: step {step} has a KL of {metrics['kl']:g}")
            break
        if stop:
            break
        if args.save_every and step % args.save_every == 0 and step < args.steps:
            save(f"checkpoint-{step}")
    if args.steps == 0:
        return print(f"nothing was trained; the evaluation is in {run_dir}")
    save("checkpoint")
    if stop:
        print(f"stopped by Ctrl-C after step {step}; to go on: {Path(__file__).name} --resume {run_dir}")
    print(f"the policy is in {run_dir / 'checkpoint'}")


def shorten(text: str, width: int) -> str:
    text = " / ".join(text.split("\n"))
    return text if len(text) <= width else text[:width - 1] + "…"


if __name__ == "__main__":
    command_line(main, Args, __doc__)
