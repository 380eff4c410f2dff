"""Shows which tokens a run of grpo.py, ppo.py or reinforce.py is about to reinforce.

    python tools/credit.py runs/ppo-A

Samples a group of completions with the run's last checkpoint, for some prompts of its next
step, and prints the best and the worst one, each token with its advantage: in a terminal green
if it will become more likely and red if less (NO_COLOR=1: no colors), otherwise as word[+0.12].

With --prompts as large as the run's --prompts-per-step these are exactly the next step's; with
fewer, --whiten and --scale-rewards batch normalize over fewer. grpo.py's KL in the loss is no
part of them. Writes nothing.
"""
import contextlib
import dataclasses
import importlib
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from checkpoints import check_state, complete, last_line  # noqa: E402
from common import as_messages, kl_estimate, load_prompts, load_tokenizer, masked_whiten, rollout_logprobs  # noqa: E402
from evaluation import shorten  # noqa: E402
from flags import PosInt, RunArgs, cli, read_json  # noqa: E402
from modeling import UserError, load_causal_lm  # noqa: E402
from runtime import Run, reference_mode  # noqa: E402


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args:
    run: str
    """run folder"""
    prompts: PosInt = 3
    """number of prompts"""
    device: str = "auto"
    """cuda, cpu, or auto"""

    resume = ""  # not a flag: cli asks for it
    __post_init__ = RunArgs.__post_init__  # checks the bounds


def load_run(folder: str, device: str):
    """(run, script, models by name), with the state and the weights of the last checkpoint."""
    flags = read_json(Path(folder) / "args.json", folder)
    names = set(flags) - {"ran_with"}
    script = next((script for script in map(importlib.import_module, ("grpo", "ppo", "reinforce"))
                   if names == {field.name for field in dataclasses.fields(script.Args)}), None)
    if script is None:
        raise UserError(f"{folder}: not a run of grpo.py, ppo.py or reinforce.py in this version")
    args = script.Args(**{name: flags[name] for name in names} | {
        "resume": folder, "device": device, "tensorboard": False})
    run = Run(args, script.__file__)
    if not complete(run.dir):
        raise UserError(f"{folder}: has no checkpoint yet")
    _, checkpoint = complete(run.dir)[-1]
    if flags.get("renew_reference_every"):
        raise UserError(f"{folder}: has renewed its reference (--renew-reference-every), which this tool does not load")
    if not (checkpoint / "resume").is_dir():
        raise UserError(f"{checkpoint}: was saved with --no-resumable, so it holds the policy alone: no critic, and "
                        "no state of the run")
    saved = read_json(checkpoint / "resume/state.json", folder)
    run.state |= dict.fromkeys(saved.keys() - {"updates", "checksums"})  # some scripts have more
    try:
        check_state(run, checkpoint, saved)
    except Exception as error:
        raise UserError(f"{checkpoint} is damaged: {last_line(error)}")
    models = {"policy": run.trainable(load_causal_lm(args.model, run.device))}
    run.reward = run.load_reward(args.reward)
    if script.__name__ == "ppo":
        with contextlib.redirect_stdout(None):  # it prints where its critic starts from
            critic = script.load_critic(args, run.reward, load_tokenizer(args.model), run.device)
        models["critic"] = run.trainable(critic)
    tensors = {f"{name}.{key}": weight.detach() for name, model in models.items()
               for key, weight in model.eval().named_parameters() if weight.requires_grad}
    warnings.filterwarnings("ignore", module="torch.distributed")
    try:
        dcp.load(tensors, checkpoint_id=checkpoint / "resume", no_dist=True)
    except (Exception, dcp.api.CheckpointException) as error:
        raise UserError(f"{checkpoint} is damaged: {last_line(error)}")
    return run, script, models


@torch.no_grad()
def next_step(run: Run, script, models: dict, n_prompts: int):
    """Steps 1 to 4 of a script: prompts, their rollout, its scores and advantages (B, T)."""
    args, step, policy = run.args, run.state["step"] + 1, models["policy"]
    tokenizer, reference = load_tokenizer(args.model), run.load_reference(policy)
    prompts = run.batch(load_prompts(args, tokenizer)[0], step, n_prompts)
    rollout = script.sample(policy, prompts, args.group_size, run, tokenizer, run.generator(step))
    scores = run.reward([row for row in prompts for _ in range(args.group_size)], rollout.texts)
    rewards = scores - args.truncation_penalty * rollout.overlong(args)
    in_loss = ~scores.isnan() & ~(rollout.truncated & args.mask_truncated)
    mask, batches = rollout.mask * in_loss[:, None], run.micro_batches(rollout.lengths)
    kl, greedy = torch.zeros(mask.shape, device=run.device), None
    with run.autocast():
        if reference is not None:
            logprobs, _ = rollout_logprobs(policy, rollout, batches, args.temperature)
            with reference_mode(reference):
                ref_logprobs, _ = rollout_logprobs(reference, rollout, batches, args.temperature)
            kl = kl_estimate(logprobs, ref_logprobs)
        if script.__name__ == "ppo":
            values = script.rollout_values(models["critic"], rollout, batches)
    if script.__name__ == "grpo":
        if args.kl_in_reward:
            rewards = rewards - args.beta * kl.sum(1)
        advantages = script.group_advantages(rewards, args.group_size, args.scale_rewards)[:, None]
    elif script.__name__ == "ppo":
        rewards = script.token_rewards(rewards.nan_to_num(0.0), kl, rollout.mask, args.beta * run.state["beta_factor"])
        advantages, _ = script.gae(rewards, values, rollout.mask, args.gamma, args.gae_lambda)
        if args.whiten:
            advantages = masked_whiten(advantages, mask)
    else:
        if not args.kl_per_token:
            rewards = rewards - args.beta * kl.sum(1)
        if args.baseline == "greedy":
            best = script.sample(policy, prompts, 1, run, tokenizer, generator=None)
            greedy = run.reward(prompts, best.texts) - args.truncation_penalty * best.overlong(args)
            greedy = greedy.nan_to_num(0.0).repeat_interleave(args.group_size)
        baselines = script.baseline(rewards, args.group_size, args.baseline, run.state["moving"], greedy)
        advantages = script.token_advantages(rewards, baselines, kl, mask, args.beta, args.kl_per_token, args.whiten)
    return prompts, rollout, scores.tolist(), advantages * mask


def token_texts(tokenizer, completion_ids) -> list[str]:
    """What each token of a completion (T,) adds to its text."""
    texts, before = [], ""
    for t in range(len(completion_ids)):
        # decoded together: a token alone may be a part of a letter, or lose its space
        text = tokenizer.decode(completion_ids[:t + 1])
        word, before = text[len(before):], text
        texts.append("".join(c if c.isprintable() else "\\n" if c == "\n" else "?" for c in word))
    return texts


def colored(text: str, advantage: float, largest: float) -> str:
    """A text on green if its advantage is above 0, on red if below, the stronger the nearer to the largest."""
    dark = 255 - int(200 * abs(advantage) / largest)
    red, green = (dark, 255) if advantage > 0 else (255, dark)
    return f"\033[30;48;2;{red};{green};{dark}m{text}\033[0m"


def credit_line(tokenizer, completion_ids, advantages, colors: bool) -> str:
    """A completion (T,) with the advantage of each token (T,), as colors or numbers."""
    largest = advantages.abs().max().clamp(min=1e-6).item()
    return "".join(colored(word, advantage, largest) if colors else f"{word}[{advantage:+.2f}]" for word, advantage
                   in zip(token_texts(tokenizer, completion_ids), advantages.tolist()))


def main(args: Args):
    run, script, models = load_run(args.run, args.device)
    prompts, rollout, scores, advantages = next_step(run, script, models, args.prompts)
    colors = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    size = run.args.group_size
    for n, prompt in enumerate(prompts):
        print(shorten(as_messages(prompt["prompt"])[-1]["content"], 90))
        scored = [i for i in range(n * size, (n + 1) * size) if scores[i] == scores[i]]  # not nan
        for name, choose in {"best": max, "worst": min}.items() if scored else ():
            i = choose(scored, key=scores.__getitem__)
            mask = rollout.mask[i].bool()
            print(f"{name:5} {scores[i]:6.2f}  " + credit_line(
                rollout.tokenizer, rollout.completion_ids[i, mask], advantages[i, mask], colors))


if __name__ == "__main__":
    cli(main, Args, __doc__)
