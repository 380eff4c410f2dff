"""GRPO: group relative policy optimization (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300).

Samples a group of completions for each prompt and scores them. The advantage of
a completion is how much better it scored than its group, so no critic is needed:

    maximize   E[ mean over t of ( min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A)
                                   - beta * (exp(-d_t) - 1 + d_t) ) ]

    A     = (r - mean of the group's r) / std of the group's r     one per completion
    rho_t = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)          by default 1: a rollout has one
                                                               update, and nothing is clipped
    d_t   = log(pi(y_t | x, y_<t) / pi_ref(y_t | x, y_<t))     exp(-d) - 1 + d estimates the KL

Differences from the paper:

1. The reference stays fixed, unless --renew-reference-every is given.
2. The std is the sample's (divisor n - 1); 1e-4 is added against division by 0.
3. Outcome rewards only, no process rewards.

Its relatives. (With one update per rollout, GSPO, GMPO and SAPO have GRPO's gradient, and
CISPO has DAPO's. CISPO's paper does not say its clip; TRL advises this one, a bound of 5.)

    DAPO        --loss-type dapo --clip-high 0.28 --minibatches 4 --beta 0 --max-resamples 5
                --truncation-penalty 1 --overlong-window 16  (the paper: 4096 of 20480 tokens)
    Dr. GRPO    --loss-type dr_grpo --scale-rewards none --beta 0
    GSPO        --loss-type gspo --clip-low 3e-4 --clip-high 4e-4 --minibatches 4 --beta 0
    CISPO       --loss-type cispo --clip-low 1 --clip-high 4 --minibatches 4 --beta 0
    GMPO, SAPO, MaxRL and GDPO: docs/algorithms.md

For an unbiased gradient of E[r] - beta * KL, up to a constant factor, use one update per
rollout and --kl-in-reward --scale-rewards none --loss-type dr_grpo (docs/convergence.md).

    python grpo.py                                  # the tiny world: a minute on a laptop
    python grpo.py --help                           # the ranges of flags for real models
    python grpo.py --model MODEL --reward REWARD --data PROMPTS.jsonl --lr 1e-6

Watch eval_gold (--gold: a measure that you trust more) next to reward: if only reward
rises, it is being hacked. If length_correlation is far above 0, the reward
pays for length. If zero_std_groups is near 1, the prompts are too easy or too hard.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import get_scheduler

from common import (Rollout, completion_logprobs, draw, eos_token_ids, flat_groups,
                    importance_weights, kl_estimate, load_prompts, load_tokenizer,
                    masked_mean, pad, repeat, replace_groups, rollout_logprobs)
from evaluation import Evaluator, rollout_metrics, sample_with_generate
from flags import NonNegFloat, NonNegInt, OnPolicyArgs, PosFloat, PosInt, cli
from modeling import UserError, cache_works, load_causal_lm, sampling_cache
from runtime import Run, all_sum, reference_mode


@dataclass
class Args(OnPolicyArgs):  # inherits the flags that all scripts have: flags.py
    model: str = "tiny/policy"
    """initial policy: folder or hub id of a causal LM"""
    reward: tuple[str, ...] = ("tiny/reward_model",)
    """one or more: folder or hub id of a reward model (one label), or file.py:function"""
    data: str = "tiny/prompts.jsonl"  # brings its own --eval-data and --gold
    """prompts: .jsonl, .jsonl.gz, or hub dataset owner/name[[:config]:split]"""
    steps: NonNegInt = 40
    """rollouts to train on (real models: 200 to 2000; 0: evaluate only)"""
    prompts_per_step: PosInt = 16
    """prompts per rollout (real models: 128 to 512)"""
    group_size: PosInt = 16
    """completions per prompt (8 to 64)"""
    max_new_tokens: PosInt = 48
    """length limit of a completion, in tokens (real models: 256 to 8192)"""
    temperature: PosFloat = 1.0
    """sampling temperature, also applied to log-probs (0.7 to 1.0)"""
    beta: NonNegFloat = 0.04
    """KL coefficient, per nat (0.001 to 0.1; 0 loads no reference model)"""
    lr: PosFloat = 4e-4
    """AdamW's peak learning rate (real models: 1e-6 to 1e-5)"""
    epochs: PosInt = 1
    """passes over each rollout (1 to 4)"""
    minibatches: PosInt = 1
    """updates per pass (1 to 16)"""

    # --- flags of the algorithm
    scale_rewards: Literal["group", "batch", "mean", "none"] = "group"
    """divide advantages by the group's std, the batch's, the group's mean (MaxRL), or not"""
    max_resamples: NonNegInt = 0
    """rounds that replace groups whose scores are all equal by new prompts (DAPO; 1 to 10)"""
    loss_type: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo", "gmpo", "sapo"] = "grpo"
    """how tokens are clipped and averaged: see policy_loss and token_weights"""
    clip_low: NonNegFloat = 0.2
    """the ratio is clipped at 1 - clip_low (gspo: 3e-4; gmpo: 0.33; cispo: 1)"""
    clip_high: NonNegFloat = 0.2
    """the ratio is clipped at 1 + clip_high (dapo: 0.28; gspo: 4e-4; gmpo: 0.49; cispo: 4)"""
    kl_in_reward: bool = False
    """subtract beta * KL (k1) of a completion from its reward; the loss then has no KL"""
    kl_estimator: Literal["k3", "k3_ratio", "k2"] = "k3"
    """KL per token in the loss: the paper's k3, k3 times the ratio (DeepSeek-V3.2), or k2"""

    def __post_init__(self):
        super().__post_init__()
        if self.group_size < 2:
            raise UserError("--group-size: a group of 1 has advantage 0: use 2 or more")
        if self.scale_rewards == "mean" and (
                self.truncation_penalty or self.kl_in_reward or self.normalize_rewards):
            raise UserError("--scale-rewards mean: for plain rewards of 0 or 1: no penalty, "
                            "no KL in them, no normalization")


# --- the algorithm
# shapes: B completions (G per prompt) of T tokens, prompts of P tokens, a vocabulary of V

def group_advantages(rewards, group_size: int, scale: str = "group"):
    """Advantage of each of B completions over its group, (B,) (DeepSeekMath, sec. 4.1.2).

    rewards: (B,), group after group; nan marks a completion without a score, which gets 0.
    scale "none": Dr. GRPO (Liu et al. 2025, arXiv:2503.20783). "mean", for rewards of 0 or 1:
    MaxRL (arXiv:2602.02710), which in large groups follows the gradient of log P(reward 1).
    """
    # float64: in float32, rounding in the mean of equal rewards is blown up by the division
    groups = rewards.double().view(-1, group_size)  # (prompts, G)
    mean, n = groups.nanmean(1, keepdim=True), (~groups.isnan()).sum(1, keepdim=True)
    squares = (groups - mean).square().nansum(1, keepdim=True)  # (prompts, 1), like n
    if scale == "batch":  # one std for all, around the mean of all; n and squares become ()
        n = all_sum(n.sum()).clamp(min=1)
        squares = all_sum((groups - all_sum(groups.nansum()) / n).square().nansum())
    if scale == "mean" and (groups < 0).any():
        raise UserError("--scale-rewards mean: a reward is below 0; it is for 0 or 1")
    std = (squares / (n - 1).clamp(min=1)).sqrt() + 1e-4
    divisor = {"none": 1.0, "mean": mean}.get(scale, std)
    # nan: no score, or 0 / 0
    return ((groups - mean) / divisor).nan_to_num(0.0).view(-1).to(rewards.dtype)


def policy_loss(logprobs, old_logprobs, advantages, mask, loss_type: str, clip_low: float,
                clip_high: float):
    """Returns (loss, clipped_low, clipped_high), each (B, T), T tokens: each one's loss, and
    whether the clip changed it by raising the ratio or by lowering it.

    logprobs, old_logprobs, mask: (B, T); advantages: (B,).
    grpo, dapo, dr_grpo: PPO's clipped objective (arXiv:1707.06347, eq. 7).
    gspo: one ratio per completion, the geometric mean over tokens (arXiv:2507.18071, eq. 7).
    gmpo: as gspo, but each token is clipped before the mean is taken (arXiv:2507.20673).
    cispo: the clipped ratio weights the log-prob, so no token loses its gradient
        (arXiv:2506.13585).
    sapo: a smooth weight instead of the clip (arXiv:2511.20347).
    """
    advantages = advantages[:, None]  # (B, 1)
    log_ratio = logprobs - old_logprobs  # (B, T)
    if loss_type == "gspo":
        log_ratio = masked_mean(log_ratio, mask, 1)[:, None].expand_as(mask)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    if loss_type == "cispo":
        loss = -clipped_ratio.detach() * advantages * logprobs
        clipped = clipped_ratio != ratio
    elif loss_type == "sapo":
        tau = torch.where(advantages > 0, 1.0, 1.05)  # the paper's
        loss = -advantages * 4 / tau * (tau * (ratio - 1)).sigmoid()  # slope 1 at ratio 1
        clipped = torch.zeros_like(ratio, dtype=torch.bool)
    else:
        clipped = clipped_ratio * advantages < ratio * advantages
        factor = torch.where(clipped, clipped_ratio, ratio)  # min(ratio A, clipped_ratio A)/A
        if loss_type == "gmpo":
            factor = masked_mean(factor.log(), mask, 1)[:, None].exp().expand_as(mask)
        loss = -factor * advantages
    return loss, clipped & (ratio < 1), clipped & (ratio > 1)


def token_weights(mask, loss_type: str, max_new_tokens: int):
    """Weight of each token in the loss of an update, (B, T), normalized over all processes.

    grpo, gspo, gmpo, sapo: mean over completions of their tokens' mean (DeepSeekMath, eq. 3).
    dapo, cispo: mean over all tokens of the update (arXiv:2503.14476, eq. 8: of a group).
    dr_grpo: sum over tokens, divided by completions * max_new_tokens (arXiv:2503.20783);
        completions outside the loss are in the divisor, too.
    """
    if loss_type in ("grpo", "gspo", "gmpo", "sapo"):
        lengths = mask.sum(1, keepdim=True)
        return mask / lengths.clamp(min=1) / all_sum((lengths > 0).sum()).clamp(min=1)
    if loss_type == "dr_grpo":
        return mask / (all_sum(torch.ones_like(mask[:, 0]).sum()) * max_new_tokens)
    return mask / all_sum(mask.sum()).clamp(min=1)


def kl_loss(logprobs, old_logprobs, ref_logprobs, estimator: str):
    """KL term of the loss, (B, T) (DeepSeekMath, eq. 4; k3_ratio: DeepSeek-V3.2,
    arXiv:2512.02556); for the gradients see common.kl_estimate."""
    if estimator == "k3_ratio":
        return (logprobs - old_logprobs).exp() * kl_estimate(logprobs, ref_logprobs, "k3")
    return kl_estimate(logprobs, ref_logprobs, estimator)


# --- generate

@torch.no_grad()
def generate(model, prompt_ids, prompt_mask, group_size: int, max_new_tokens: int,
             temperature: float, eos_ids, generator=None):
    """Samples group_size completions per prompt. Returns their ids, mask and log-probs, each
    (B, max_new_tokens) and 0 after the end-of-sequence token.

    prompt_ids, prompt_mask: (prompts, P), left-padded. Without a generator, decodes greedily.
    """
    cache, past = sampling_cache(model)  # past: the cache as a keyword argument
    position = (prompt_mask.cumsum(1) - 1).clamp(min=0)  # (prompts, P)
    logits = model(input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=position,
                   use_cache=True, logits_to_keep=1, **past).logits[:, -1]  # (prompts, V)
    cache.batch_repeat_interleave(group_size)  # each prompt was processed once, for its group
    logits, attention_mask, position = (x.repeat_interleave(group_size, 0) for x in
                                        (logits, prompt_mask, position[:, -1:]))
    active = torch.arange(len(logits), device=logits.device)  # completions not finished yet
    ids = prompt_ids.new_zeros(len(active), max_new_tokens)
    mask, logprobs = torch.zeros_like(ids), torch.zeros(ids.shape, device=ids.device)
    for t in range(max_new_tokens):
        probs = (logits.float() / temperature).softmax(-1)  # (active, V)
        token = draw(probs, generator)  # (active, 1)
        ids[active, t], mask[active, t] = token[:, 0], 1
        logprobs[active, t] = probs.gather(1, token)[:, 0].log()
        alive = (~torch.isin(token[:, 0], eos_ids)).nonzero()[:, 0]  # positions in active
        if t == max_new_tokens - 1 or len(alive) == 0:
            break
        if len(alive) < len(active):  # drop finished completions from the batch
            cache.batch_select_indices(alive)
            active, token, attention_mask, position = (x[alive] for x in (
                active, token, attention_mask, position))
        attention_mask, position = F.pad(attention_mask, (0, 1), value=1), position + 1
        logits = model(input_ids=token, attention_mask=attention_mask, position_ids=position,
                       use_cache=True, **past).logits[:, -1]
    return ids, mask, logprobs


def sample(model, rows: list, group_size: int, run: Run, tokenizer, generator) -> Rollout:
    """Samples group_size completions per row, one group or more at a time."""
    args, eos_ids = run.args, eos_token_ids(model, tokenizer, run.device)
    prompt_ids, prompt_mask = pad([row["prompt_ids"] for row in rows], "left", run.device)
    size = max(1, args.generate_batch_size // group_size)  # prompts at a time
    model.eval()
    with run.autocast(), run.gathered(model):  # FSDP's weights are gathered once
        if not cache_works(model):  # Mamba and other recurrent models
            return sample_with_generate(model, repeat(rows, group_size), tokenizer,
                                        args.max_new_tokens,
                                        args.temperature if generator else 0.0,
                                        args.generate_batch_size)
        parts = [generate(model, prompt_ids[i:i + size], prompt_mask[i:i + size], group_size,
                          args.max_new_tokens, args.temperature, eos_ids, generator)
                 for i in run.progress(range(0, len(rows), size))]
    ids, mask, logprobs = (torch.cat(x) for x in zip(*parts))  # (B, max_new_tokens)
    longest = mask.sum(1).max()
    return Rollout(prompt_ids.repeat_interleave(group_size, 0),
                   prompt_mask.repeat_interleave(group_size, 0),
                   ids[:, :longest], mask[:, :longest], tokenizer, eos_ids,
                   logprobs[:, :longest])


def main(args: Args):
    # --- setup
    run = Run(args, __file__)
    tokenizer = load_tokenizer(args.model)
    train_rows, eval_rows = load_prompts(args, tokenizer)
    policy = run.trainable(load_causal_lm(args.model, run.device))  # LoRA, FSDP
    reference = run.load_reference(policy)  # may be None; with LoRA, the policy itself
    reward = run.load_reward(args.reward, train_rows + eval_rows)
    optimizer = torch.optim.AdamW((p for p in policy.parameters() if p.requires_grad),
                                  lr=args.lr, weight_decay=0.0, fused=True)
    scheduler = get_scheduler(args.lr_schedule, optimizer, args.warmup,
                              args.steps * args.epochs * args.minibatches)
    evaluate = Evaluator(run, eval_rows, reward, sample, tokenizer)
    trained = {"policy": (policy, optimizer, scheduler)}

    # --- setup of the algorithm
    # with one update per rollout, its forward pass also gives old_logprobs: step 3 skips them
    single_update = args.epochs * args.minibatches == 1 and not args.kl_in_reward

    # --- steps
    first_step = run.resume(tokenizer, **trained)
    if first_step == 1:
        evaluate(0, policy, reference)

    for step in range(first_step, args.steps + 1):
        # 1. generate a group of completions for each prompt
        run.phase("generate")
        generator = run.generator(step)  # seeded by the step, so a resumed run draws the same
        prompts = run.batch(train_rows, step, args.prompts_per_step)
        rollout = sample(policy, prompts, args.group_size, run, tokenizer, generator)

        # 2. score them
        run.phase("score")
        scores = reward(repeat(prompts, args.group_size), rollout.texts)  # (B,); nan: no score

        # --- dynamic sampling (DAPO, eq. 11): replaces groups of equal scores, in a few rounds
        groups_replaced = 0
        for _ in range(args.max_resamples):
            flat = flat_groups(scores, args.group_size)  # (prompts,): all scores are equal
            count = all_sum(flat.sum())
            if count == 0:
                break
            groups_replaced += count
            others = run.draw_rows(train_rows, flat.sum(), generator)  # at least 1, for FSDP
            new = sample(policy, others, args.group_size, run, tokenizer, generator)
            new_scores = reward(repeat(others, args.group_size), new.texts)
            prompts, rollout, scores = replace_groups(
                flat, (prompts, rollout, scores), (others, new, new_scores))

        # 3. log-probs under the policy that sampled, and under the reference
        run.phase("logprobs")  # the sampler's differ from these by rounding (sampler_gap)
        micro_batches = run.micro_batches(rollout.lengths)
        with run.autocast():
            # (B, T) each; with single_update zeros, until step 5's forward pass fills them in
            old_logprobs, entropy = rollout_logprobs(
                policy, rollout, [] if single_update else micro_batches, args.temperature)
            ref_logprobs = old_logprobs  # if it stays this tensor, no KL is logged
            if reference is not None:
                with reference_mode(reference):
                    ref_logprobs, _ = rollout_logprobs(reference, rollout, micro_batches,
                                                       args.temperature)

        # 4. advantages
        rewards = scores - args.truncation_penalty * rollout.overlong(args)  # (B,)
        in_loss = ~scores.isnan() & ~(rollout.truncated & args.mask_truncated)  # (B,)
        loss_mask = rollout.mask * in_loss[:, None]  # (B, T)
        if args.kl_in_reward:
            rewards -= args.beta * kl_estimate(old_logprobs, ref_logprobs, "k1").sum(1)
        advantages = group_advantages(rewards, args.group_size, args.scale_rewards)  # (B,)

        # 5. update
        run.phase("update")
        policy.train()
        lr = scheduler.get_last_lr()[0]
        loss_sum, clipped_low, clipped_high = torch.zeros(3, device=run.device)
        grad_norm = updates = 0
        for _ in range(args.epochs):
            order = torch.randperm(len(scores), generator=generator, device=run.device)
            for minibatch in order.tensor_split(args.minibatches):
                weights = torch.zeros_like(old_logprobs)  # (B, T), 0 outside this minibatch
                weights[minibatch] = token_weights(loss_mask[minibatch], args.loss_type,
                                                   args.max_new_tokens)
                for rows in run.micro_batches(rollout.lengths, minibatch):
                    with run.autocast():
                        logprobs, new_entropy = completion_logprobs(
                            policy, *rollout.tokens(rows), args.temperature)
                    if updates == 0:  # still the policy that sampled: the ratio is exactly 1
                        old_logprobs[rows], entropy[rows] = logprobs.detach(), new_entropy
                    loss, low, high = policy_loss(
                        logprobs, old_logprobs[rows], advantages[rows], rollout.mask[rows],
                        args.loss_type, args.clip_low, args.clip_high)
                    if args.beta > 0 and not args.kl_in_reward:
                        loss = loss + args.beta * kl_loss(
                            logprobs, old_logprobs[rows], ref_logprobs[rows],
                            args.kl_estimator)
                    if args.importance_cap > 0:  # of the KL's term, too: the same samples
                        loss = loss * importance_weights(
                            old_logprobs[rows], rollout.sampler_logprobs[rows],
                            args.importance_cap)
                    loss = (loss * weights[rows]).sum()
                    loss.backward()
                    loss_sum += loss.detach()
                    clipped_low += (low * loss_mask[rows]).sum()
                    clipped_high += (high * loss_mask[rows]).sum()
                grad_norm += run.clip_grad_norm(policy)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                updates += 1
        tokens = args.epochs * all_sum(loss_mask.sum()).clamp(min=1)
        metrics = {"lr": lr, "loss": all_sum(loss_sum) / updates,
                   "grad_norm": grad_norm / updates,
                   "clip_fraction_low": all_sum(clipped_low) / tokens,
                   "clip_fraction_high": all_sum(clipped_high) / tokens,
                   "groups_replaced": groups_replaced}

        # 6. log, evaluate, save
        run.log(step, rollout_metrics(rollout, scores, old_logprobs, entropy, ref_logprobs,
                                      args.group_size) | metrics)
        if run.due(args.eval_every, step):
            evaluate(step, policy, reference)
        run.renew_reference(step, policy, reference)
        if run.due(args.save_every, step):
            run.save(step)
        if run.stopped:  # set in run.log by Ctrl-C or --max-kl
            break
    return run.dir, run.metrics


if __name__ == "__main__":
    cli(main, Args, __doc__)
