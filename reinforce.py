"""REINFORCE for language models (Williams 1992), and relatives: RLOO (Ahmadian
et al. 2024, arXiv:2402.14740), ReMax (Li et al. 2023, arXiv:2310.10505) and
REINFORCE++ (Hu et al. 2025, arXiv:2501.03262).

A whole completion is one action. Its log-prob is raised by how much better it
scored than a baseline, so no critic is needed:

    maximize   E[ r(x, y) - beta * KL ]    by the gradient    E[ A * grad log pi(y | x) ]

    A = R - b        R = r - beta * log(pi(y | x) / pi_ref(y | x))
    b = 0, or the mean of the group, of the group's other completions (leave-one-out: RLOO),
        or of past steps, or the score of the greedy completion (ReMax)

Differences from the papers:

1. RLOO's authors make two updates per rollout, the default here is one. With more,
   the gradient is weighted by the completion's ratio pi / pi_old, and stopped where
   PPO's clip stops it.
2. ReMax samples one completion per prompt; here a group shares a greedy one.
3. REINFORCE++ is --baseline none --kl-per-token --whiten: returns per token,
   normalized over the rollout. Its own code clips the ratio of each token, this one
   the completion's. Its variant with baseline (--baseline mean) has the KL in the
   loss, as k2; here it stays in the reward.

Without --whiten, the gradient of a rollout's first update is unbiased with any baseline but
the group's mean. This shrinks it to (G - 1) / G (with --kl-per-token only the reward's part).

    python reinforce.py                             # the tiny world: a minute on a laptop
    python reinforce.py --help                      # the ranges of flags for real models
    python reinforce.py --model MODEL --reward REWARD --data PROMPTS.jsonl --lr 1e-6

Watch eval_gold (--gold: a measure that you trust more) next to reward: if only reward
rises, it is being hacked. If length_correlation is far above 0, the reward
pays for length. advantage_std is what the baseline leaves: the gradient's noise.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import get_scheduler

from common import (Rollout, completion_logprobs, draw, eos_token_ids, importance_weights,
                    kl_estimate, load_prompts, load_tokenizer, masked_whiten, pad, repeat,
                    rollout_logprobs)
from evaluation import Evaluator, rollout_metrics, sample_with_generate
from flags import Fraction, NonNegFloat, NonNegInt, OnPolicyArgs, PosFloat, PosInt, cli
from modeling import UserError, cache_works, load_causal_lm, sampling_cache
from runtime import Run, all_sum, global_mean, reference_mode


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
    baseline: Literal["none", "mean", "moving", "loo", "greedy"] = "loo"
    """none, the group's mean, past steps' mean, the group's others (RLOO), greedy (ReMax)"""
    moving_decay: Fraction = 0.9
    """how much of the moving baseline a step keeps"""
    kl_per_token: bool = False
    """charge a token with the KL from it onward, not with that of the whole completion"""
    whiten: bool = False
    """normalize advantages to mean 0 and variance 1 over a rollout's tokens (REINFORCE++)"""
    clip_low: NonNegFloat = 0.2
    """below a ratio of 1 - clip_low, completions with A < 0 have no gradient"""
    clip_high: NonNegFloat = 0.2
    """above a ratio of 1 + clip_high, completions with A > 0 have no gradient"""

    def __post_init__(self):
        super().__post_init__()
        if self.normalize_rewards and self.baseline == "greedy":
            raise UserError("--normalize-rewards: not with --baseline greedy, a group of one")
        if self.group_size < 2 and self.baseline in ("loo", "mean"):
            raise UserError(f"--group-size: --baseline {self.baseline} needs 2 or more")


# --- the algorithm
# shapes: B completions (G per prompt) of T tokens, prompts of P tokens, a vocabulary of V

def baseline(rewards, group_size: int, kind: str, moving: float = 0.0, greedy=None):
    """What is subtracted from each completion's reward, (B,).

    rewards: (B,), group after group; nan leaves a completion out of the means. moving: the
    mean reward of past steps, 0 at first. greedy: (B,), the score of the prompt's greedy
    completion (ReMax, algorithm 1). loo: RLOO (arXiv:2402.14740, sec. 2.3, after eq. 8). All
    but "mean" are independent of the completion, so the expected gradient stays the same.
    """
    groups = rewards.view(-1, group_size)  # (prompts, G)
    if kind == "mean":
        return groups.nanmean(1, keepdim=True).expand_as(groups).reshape(-1)
    if kind == "loo":
        others = (~groups.isnan()).sum(1, keepdim=True) - 1  # (prompts, 1)
        mean = (groups.nansum(1, keepdim=True) - groups) / others.clamp(min=1)
        return torch.where(others > 0, mean, groups).view(-1)  # the only one scored: A = 0
    if kind == "greedy":
        return greedy
    return torch.full_like(rewards, moving if kind == "moving" else 0.0)


def token_advantages(rewards, baselines, kl, mask, beta: float, kl_per_token: bool,
                     whiten: bool):
    """Advantage of each token, (B, T); 0 where the reward is nan.

    rewards: (B,), less beta times the completion's KL unless kl_per_token. baselines: (B,).
    kl: (B, T), log pi - log pi_ref. kl_per_token: A_t = r - b - beta * (KL of t and after),
    which is exact, too: a token does not change the KL before it (REINFORCE++, eq. 4).
    """
    advantages = (rewards - baselines)[:, None] * mask
    if kl_per_token:
        advantages = advantages - beta * (kl * mask).flip(1).cumsum(1).flip(1)
    mask = mask * ~rewards.isnan()[:, None]
    advantages = torch.where(mask > 0, advantages, 0.0)
    return masked_whiten(advantages, mask, global_mean) if whiten else advantages


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_low: float, clip_high: float):
    """Returns (loss, clipped_low, clipped_high), each (B, T): the loss of each token, and
    whether its gradient was stopped because the completion's ratio is too low or too high.

    logprobs, old_logprobs, advantages, mask: (B, T). The gradient is -ratio * A * grad log pi,
    with one ratio per completion, the importance weight of what an older policy sampled. It is
    stopped where PPO's clip has no gradient (arXiv:1707.06347, eq. 7).
    """
    ratio = ((logprobs - old_logprobs) * mask).sum(1, keepdim=True).exp().detach()  # (B, 1)
    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    return -torch.where(low | high, 0.0, ratio * advantages) * logprobs * mask, low, high


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
    single_update = args.epochs * args.minibatches == 1 and args.beta == 0
    run.state["moving"] = 0.0  # mean reward of past steps

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
        kl, greedy = kl_estimate(old_logprobs, ref_logprobs), None  # (B, T)
        if not args.kl_per_token:
            rewards = rewards - args.beta * kl.sum(1)  # (B,)
        if args.baseline == "greedy":  # its time is in seconds_logprobs
            best = sample(policy, prompts, 1, run, tokenizer, generator=None)
            greedy = reward(prompts, best.texts)
            greedy = greedy - args.truncation_penalty * best.overlong(args)
            greedy = greedy.nan_to_num(0.0).repeat_interleave(args.group_size)  # (B,)
        baselines = baseline(rewards, args.group_size, args.baseline, run.state["moving"],
                             greedy)
        scored = ~rewards.isnan()
        mean = global_mean(rewards.nan_to_num(0.0), scored).item()
        kept = args.moving_decay if step > 1 else 0.0
        run.state["moving"] = kept * run.state["moving"] + (1 - kept) * mean
        advantages = token_advantages(rewards, baselines, kl, loss_mask, args.beta,
                                      args.kl_per_token, args.whiten)  # (B, T)

        # 5. update
        run.phase("update")
        policy.train()
        lr = scheduler.get_last_lr()[0]
        loss_sum, clipped_low, clipped_high = torch.zeros(3, device=run.device)
        grad_norm = updates = 0
        for _ in range(args.epochs):
            order = torch.randperm(len(scores), generator=generator, device=run.device)
            for minibatch in order.tensor_split(args.minibatches):
                completions = all_sum(in_loss[minibatch].sum()).clamp(min=1)
                for rows in run.micro_batches(rollout.lengths, minibatch):
                    with run.autocast():
                        logprobs, new_entropy = completion_logprobs(
                            policy, *rollout.tokens(rows), args.temperature)
                    if updates == 0:  # still the policy that sampled: the ratio is exactly 1
                        old_logprobs[rows], entropy[rows] = logprobs.detach(), new_entropy
                    loss, low, high = policy_loss(
                        logprobs, old_logprobs[rows], advantages[rows], rollout.mask[rows],
                        args.clip_low, args.clip_high)
                    if args.importance_cap > 0:
                        loss = loss * importance_weights(
                            old_logprobs[rows], rollout.sampler_logprobs[rows],
                            args.importance_cap)
                    loss = (loss * loss_mask[rows]).sum() / completions
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
        spread = (advantages - global_mean(advantages, loss_mask)).square()  # (B, T)
        metrics = {"lr": lr, "loss": all_sum(loss_sum) / updates,
                   "grad_norm": grad_norm / updates,
                   "clip_fraction_low": all_sum(clipped_low) / tokens,
                   "clip_fraction_high": all_sum(clipped_high) / tokens,
                   "advantage_std": global_mean(spread, loss_mask).sqrt(),
                   "baseline": global_mean(baselines.nan_to_num(0.0), scored)}

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
