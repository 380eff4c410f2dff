"""PPO for language models (Schulman et al. 2017, arXiv:1707.06347; Ziegler et
al. 2019, arXiv:1909.08593; Ouyang et al. 2022, InstructGPT, arXiv:2203.02155).

Every token is an action. Its reward is minus its share of the KL, and on the
last token also the completion's score. A critic predicts the reward still to
come, and a token's advantage is how much better things went than predicted:

    maximize   E[ mean over t of min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t) ]

    rho_t = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)              1 in the first update
    r_t   = -beta * log(pi_old(y_t | ..) / pi_ref(y_t | ..))  +  score(x, y) on the last token
    A_t   = sum over l of (gamma lambda)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l})      GAE
    critic: minimize the mean of max((V - R)^2, (clip(V, V_old +- value_clip) - R)^2) / 2
    R_t   = A_t + V_old_t

Differences from the papers:

1. The critic is a model of its own, as in InstructGPT, not a head of the policy.
2. No pretraining term (InstructGPT's PPO-ptx) and, by default, no entropy bonus.
3. A completion cut at --max-new-tokens ends there; nothing is bootstrapped.
4. The mean is over all tokens of an update; whitening, over those of a rollout.

With gamma 1, no whitening, and an exact critic or lambda 1, the gradient of one
update is that of E[r] - beta * KL, up to a factor, for large rollouts; in small
ones the mean over tokens turns it by a few degrees (docs/convergence.md).

    python ppo.py                                   # the tiny world: a minute on a laptop
    python ppo.py --help                            # the ranges of flags for real models
    python ppo.py --model MODEL --reward REWARD --data PROMPTS.jsonl --lr 1e-6 --critic-lr 1e-5

Watch eval_gold (--gold: a measure that you trust more) next to reward: if only reward
rises, it is being hacked. If explained_variance is near or below 0, the critic
knows nothing yet (in the default run for some five steps: a reward model's head
says little before the last token). approx_kl is how far a rollout's updates go.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import get_scheduler
from transformers.modeling_outputs import TokenClassifierOutput

from common import (Rollout, completion_logprobs, draw, eos_token_ids, importance_weights,
                    kl_estimate, load_prompts, load_tokenizer, masked_whiten, pad, repeat,
                    rollout_logprobs, same_tokens)
from evaluation import Evaluator, rollout_metrics, sample_with_generate
from flags import Fraction, NonNegFloat, NonNegInt, OnPolicyArgs, PosFloat, PosInt, cli
from modeling import (UserError, cache_works, completion_outputs, context_length, load_body,
                      load_causal_lm, sampling_cache)
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
    lr: PosFloat = 3e-4
    """AdamW's peak learning rate (real models: 1e-6 to 1e-5)"""
    epochs: PosInt = 1
    """passes over each rollout (1 to 4)"""
    minibatches: PosInt = 2
    """updates per pass (1 to 16)"""

    # --- flags of the algorithm
    critic: str = ""
    """initial critic: a reward model or causal LM (default: --reward if its tokenizer fits)"""
    critic_lr: PosFloat = 1e-3
    """AdamW's peak learning rate for the critic (real models: 5e-6 to 1e-5)"""
    critic_warmup: NonNegInt = 0
    """first steps in which only the critic is trained; --lr's schedule runs on (0 to 20)"""
    gamma: Fraction = 1.0
    """discount per token"""
    gae_lambda: Fraction = 0.95
    """1 trusts the observed reward, 0 the critic"""
    critic_gae_lambda: Fraction = 0.95
    """the same for what the critic learns (1: VC-PPO, arXiv:2503.01491)"""
    entropy_bonus: NonNegFloat = 0.0
    """this times each token's entropy is added to the objective (PPO, eq. 9; 1e-3 to 0.01)"""
    whiten: bool = True
    """normalize advantages to mean 0 and variance 1 over the tokens of a rollout"""
    clip_low: NonNegFloat = 0.2
    """the ratio is clipped at 1 - clip_low"""
    clip_high: NonNegFloat = 0.2
    """the ratio is clipped at 1 + clip_high"""
    value_clip: NonNegFloat = 0.2
    """clip range around the old value in the value loss (0: no clipping)"""
    target_kl: NonNegFloat = 0.0
    """end a rollout's updates at this KL (k3) per token from the old policy (0.01 to 0.1)"""
    kl_target: NonNegFloat = 0.0
    """adapt beta to keep the KL near this, in nats per completion (6; 0: beta is fixed)"""
    kl_horizon: PosInt = 10_000
    """completions over which beta adapts by at most 20 %"""

    def __post_init__(self):
        super().__post_init__()
        if self.kl_target > 0 and self.beta == 0:
            raise UserError("--kl-target: needs a --beta above 0 to start from")


# --- the algorithm
# shapes: B completions (G per prompt) of T tokens, prompts of P tokens, a vocabulary of V

def token_rewards(scores, kl, mask, beta: float):
    """Reward of each token, (B, T): -beta * its KL, plus the score (B,) on the last token.

    kl: (B, T), log pi_old - log pi_ref, whose mean is the KL (Ziegler et al. 2019, eq. 2).
    """
    rewards = -beta * kl * mask
    last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(rewards, values, mask, gamma: float, lam: float):
    """Advantages (Schulman et al. 2015, arXiv:1506.02438, eq. 16) and returns, two (B, T).

    rewards, values, mask: (B, T). values[:, t] is of what comes from token t on.
    """
    advantages = torch.zeros_like(values)
    next_advantage = next_value = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask


def policy_loss(logprobs, old_logprobs, advantages, clip_low: float, clip_high: float):
    """Returns (loss, clipped_low, clipped_high), each (B, T) like logprobs and advantages: the
    loss of each token, and whether the clip changed it by raising the ratio or by lowering it
    (PPO, eq. 7)."""
    ratio = (logprobs - old_logprobs).exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    clipped = clipped_ratio * advantages < ratio * advantages
    return loss, clipped & (ratio < 1), clipped & (ratio > 1)


def value_loss(values, old_values, returns, value_clip: float):
    """Half the squared error of each value, (B, T), or of the clipped value if that is worse
    (as in PPO's own code)."""
    loss = (values - returns).square()
    if value_clip > 0:
        clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
        loss = torch.maximum(loss, (clipped - returns).square())
    return loss / 2


def beta_change(kl: float, completions: int, args) -> float:
    """The factor by which a step with this mean KL changes beta (Ziegler et al. 2019, sec.
    2.2; the target of 6 and the horizon are their code's)."""
    error = max(-0.2, min(0.2, kl / args.kl_target - 1))
    return 1 + error * min(1, completions / args.kl_horizon)  # so beta stays above 0


def explained_variance(values, returns, mask):
    """1 - mean((returns - values)^2) / Var(returns): at most 1; 0: no better than the mean."""
    residual = global_mean((returns - values).square(), mask)
    variance = global_mean((returns - global_mean(returns, mask)).square(), mask)
    return 1 - residual / variance.clamp(min=1e-8)


# --- the critic

def completion_values(critic, prompt_ids, prompt_mask, completion_ids, mask):
    """The critic's value before each completion token, float32 (B, T), 0 where mask is 0."""
    outputs = completion_outputs(critic, prompt_ids, prompt_mask, completion_ids, mask,
                                 share=cache_works(critic))
    return outputs[..., 0].float() * mask


@torch.no_grad()
def rollout_values(critic, rollout: Rollout, micro_batches: list):
    """completion_values of a whole rollout, (B, T)."""
    values = torch.zeros(rollout.mask.shape, device=rollout.mask.device)
    for rows in micro_batches:
        values[rows] = completion_values(critic, *rollout.tokens(rows))
    return values


def load_critic(args: Args, reward, tokenizer, device):
    """A value model from a reward model, whose head it takes over, or from a causal LM, with a
    head of zeros."""
    fits = hasattr(getattr(reward, "model", None), "score") and same_tokens(
        tokenizer, load_tokenizer(args.reward[0])) and (
        context_length(reward.model) >= context_length(args.model))
    name = args.critic or (args.reward[0] if fits else args.model)
    if not same_tokens(tokenizer, load_tokenizer(name)):
        raise UserError(f"--critic {name}: its tokenizer is not the policy's")
    critic, critic.score = load_body(name, device)
    critic.register_forward_hook(lambda critic, inputs, outputs: TokenClassifierOutput(
        logits=critic.score(outputs[0])))  # of the last hidden states, (B, T, 1)
    if context_length(critic) < context_length(args.model):
        raise UserError(f"--critic {name}: its context is shorter than the policy's")
    if args.critic_lr == Args.critic_lr and critic.num_parameters() > 50e6:
        raise UserError("--critic-lr: the default is for the tiny model: set one (--help)")
    if critic.config.get_text_config().vocab_size < tokenizer.embedded:  # the policy's, padded
        critic.resize_token_embeddings(tokenizer.embedded)
    print(f"the critic starts from {name}")
    return critic


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
    single_update = False  # step 4 needs old_logprobs: the KL is part of the rewards
    run.state["beta_factor"] = 1.0
    critic = run.trainable(load_critic(args, reward, tokenizer, run.device))
    critic_optimizer = torch.optim.AdamW((p for p in critic.parameters() if p.requires_grad),
                                         lr=args.critic_lr, weight_decay=0.0, fused=True)
    critic_scheduler = get_scheduler(args.lr_schedule, critic_optimizer, args.warmup,
                                     args.steps * args.epochs * args.minibatches)
    trained["critic"] = critic, critic_optimizer, critic_scheduler
    if 0 < args.steps <= args.critic_warmup:
        print("--critic-warmup covers all --steps: the policy will not be trained")

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
        with run.autocast():
            values = rollout_values(critic, rollout, micro_batches)  # (B, T)
        kl = kl_estimate(old_logprobs, ref_logprobs)  # (B, T)
        beta = args.beta * run.state["beta_factor"]
        rewards = token_rewards(rewards.nan_to_num(0.0), kl, rollout.mask, beta)  # (B, T)
        advantages, _ = gae(rewards, values, rollout.mask, args.gamma, args.gae_lambda)
        _, returns = gae(rewards, values, rollout.mask, args.gamma, args.critic_gae_lambda)
        if args.whiten:
            advantages = masked_whiten(advantages, loss_mask, global_mean)
        if args.kl_target > 0:
            completions = args.prompts_per_step * args.group_size
            mean_kl = all_sum(kl.sum()).item() / completions
            run.state["beta_factor"] *= beta_change(mean_kl, completions, args)

        # 5. update
        run.phase("update")
        policy.train()
        critic.train()
        lr = scheduler.get_last_lr()[0]
        loss_sum, clipped_low, clipped_high = torch.zeros(3, device=run.device)
        grad_norm = updates = 0
        value_loss_sum = critic_grad_norm = approx_kl = 0
        for _ in range(args.epochs):
            order = torch.randperm(len(scores), generator=generator, device=run.device)
            for minibatch in order.tensor_split(args.minibatches):
                if 0 < args.target_kl < approx_kl:  # the policy has moved far enough
                    break
                new_logprobs = old_logprobs.clone()  # (B, T)
                tokens = all_sum(loss_mask[minibatch].sum()).clamp(min=1)
                for rows in run.micro_batches(rollout.lengths, minibatch):
                    with run.autocast():
                        new_values = completion_values(critic, *rollout.tokens(rows))
                    loss = value_loss(new_values, values[rows], returns[rows], args.value_clip)
                    loss = (loss * loss_mask[rows]).sum() / tokens
                    loss.backward()
                    value_loss_sum += loss.detach()
                    if step <= args.critic_warmup:
                        continue
                    with run.autocast():
                        logprobs, new_entropy = completion_logprobs(
                            policy, *rollout.tokens(rows), args.temperature,
                            entropy_grad=args.entropy_bonus > 0)
                    if updates == 0:  # still the policy that sampled: the ratio is exactly 1
                        old_logprobs[rows] = logprobs.detach()
                        entropy[rows] = new_entropy.detach()
                    new_logprobs[rows] = logprobs.detach()
                    loss, low, high = policy_loss(
                        logprobs, old_logprobs[rows], advantages[rows],
                        args.clip_low, args.clip_high)
                    if args.importance_cap > 0:
                        loss = loss * importance_weights(
                            old_logprobs[rows], rollout.sampler_logprobs[rows],
                            args.importance_cap)
                    loss = loss - args.entropy_bonus * new_entropy
                    loss = (loss * loss_mask[rows]).sum() / tokens
                    loss.backward()
                    loss_sum += loss.detach()
                    clipped_low += (low * loss_mask[rows]).sum()
                    clipped_high += (high * loss_mask[rows]).sum()
                moved = kl_estimate(old_logprobs, new_logprobs, "k3")  # (B, T)
                approx_kl = global_mean(moved[minibatch], loss_mask[minibatch]).item()
                critic_grad_norm += run.clip_grad_norm(critic)
                critic_optimizer.step()
                critic_scheduler.step()
                critic_optimizer.zero_grad()
                if 0 < args.target_kl < approx_kl:  # only the critic learns: without a
                    optimizer.zero_grad()           # gradient AdamW makes no update
                grad_norm += run.clip_grad_norm(policy)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                updates += 1
        tokens = all_sum(loss_mask.sum()).clamp(min=1) * updates / args.minibatches
        metrics = {"lr": lr, "loss": all_sum(loss_sum) / updates,
                   "grad_norm": grad_norm / updates,
                   "clip_fraction_low": all_sum(clipped_low) / tokens,
                   "clip_fraction_high": all_sum(clipped_high) / tokens,
                   "value_loss": all_sum(value_loss_sum) / updates,
                   "critic_grad_norm": critic_grad_norm / updates,
                   "value": global_mean(values, rollout.mask),
                   "explained_variance": explained_variance(values, returns, loss_mask),
                   "approx_kl": approx_kl, "updates": updates, "beta": beta}

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
