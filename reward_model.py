"""Reward model by Bradley-Terry (Ouyang et al. 2022, InstructGPT, arXiv:2203.02155; Stiennon
et al. 2020).

Learns from pairs of answers, one chosen and one rejected, a score r(x, y) whose differences
say how likely a person chooses one over the other: P(y_w over y_l) = sigmoid(r(x, y_w) - r(x,
y_l)). Hence

    minimise   E[ -log sigmoid(r_w - r_l - margin) ]  +  centering * E[ (r_w + r_l)^2 ]

Differences alone are learned, so the scale's zero is free: it is put where the mean score of
the reference's own completions is, after training (Stiennon et al. 2020, section 3.4).

Where this differs from InstructGPT:
 1. Pairs, not rankings of 4 to 9 answers at once.
 2. The head is new, and its learning rate and the model's are one.
Its neighbours: dpo.py learns a policy from the same pairs without this model; ppo.py, grpo.py
and reinforce.py maximise the score that is learned here.

    python reward_model.py                             the tiny world: under a minute
    python reward_model.py --model MODEL --data PAIRS.jsonl --lr 1e-5

Watch: `eval_accuracy` beside what the label noise allows; `eval_ece`: whether its
probabilities are to be believed; `eval_length_correlation`: a score that is mostly length will
be hacked by length.
"""
import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, get_scheduler,
                          logging)

from common import (add_lora, checkpoint_gradients, clip_gradients, command_line, context_of,
                    draw, encode, encode_prompts, enough, eval_line, fail, join_processes,
                    load_model, load_state, load_tokenizer, micro_batches, not_finite,
                    open_curves, open_run, pad, rank, ranks, read_pairs, remove_old, render,
                    save_model, save_state, score_ids, score_texts, shard, total, wants_bf16,
                    whole_folder)


# --- arguments

@dataclass
class Args:
    model: str = "tiny/policy"
    """the model to start from: a causal LM's (or reward model's) folder or hub id"""
    reference: str = ""
    """the policy on whose completions the mean score is made zero (empty: --model; none: no
    bias)"""
    data: str = "tiny/preferences.jsonl"
    """rows of pairs: a .jsonl or .jsonl.gz file, or a hub data set
    owner/name[:config][:split]"""
    eval_data: str = ""
    """held-out pairs (empty: the last --eval-pairs rows of --data, held out)"""
    prompt_column: str = "prompt"
    """the column that holds the prompt; without it, the prompt is what chosen and rejected
    begin with"""
    margin_column: str = ""
    """a column of how much better the chosen answer is, in units of score (Llama 2,
    arXiv:2307.09288)"""
    run_dir: str = ""
    """a new folder for metrics and the trained model (runs/reward_model-DATE-TIME)"""
    resume: str = ""
    """the folder of a run to go on with, from its newest checkpoint and with its flags"""
    seed: int = 0

    epochs: int = 1
    """passes over the pairs (1 to 2: reward models overfit soon; 0: evaluate --model, and save nothing
    of it)"""
    pairs_per_step: int = 32
    """pairs an update (32 to 256)"""
    max_tokens: int = 0
    """cut a longer conversation at its beginning, so that the whole answer stays (0: the
    context)"""
    lr: float = 1e-3
    """AdamW's peak learning rate (real models: 1e-6 to 2e-5)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """after the warm-up, for the rest of the updates"""
    warmup: int = 10
    """updates of linear warm-up"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    micro_batch_size: int = 64
    """most conversations per forward and backward pass, both of a pair in one; sets the memory used,
    changes no result"""
    tokens_per_micro_batch: int = 8192
    """and most tokens, with padding (16384 to 65536 on a GPU of 80 GB)"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""
    lora_rank: int = 0
    """train low-rank updates of the weights, of this rank (8 to 64), with an --lr ten times higher
    (0: the weights)"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of matrix products (autocast; weights stay float32): auto is bfloat16 where it is faster, on a
    GPU and for large models on CPUs that have it"""
    device: str = "auto"
    """auto: a GPU where there is one"""

    save_every: int = 100
    """steps between checkpoints that --resume can go on from; there is one at the end (0: no other)"""
    keep: int = 1
    """how many checkpoints are kept, the newest (1 to 5)"""
    log_every: int = 20
    """steps between printed lines"""
    eval_every: int = 0
    """steps between evaluations, besides the one before the first step and the one after the
    last"""
    eval_pairs: int = 600
    """held-out pairs, where --eval-data names none"""
    eval_by: str = ""
    """a column of the held-out pairs by whose values accuracy is told apart (tiny world: kind)"""
    tensorboard: bool = False
    """curves in RUN/tensorboard, too"""

    # the algorithm's own
    centering: float = 0.0
    """weight of (r_w + r_l)^2, which keeps scores around zero (0.01; Eisenstein et al.
    2023)"""
    label_smoothing: float = 0.0
    """the share of labels taken to be wrong (0 to 0.3)"""
    bias_prompts: int = 128
    """prompts for whose completions by the reference the mean score is made zero (0: no
    bias)"""
    max_new_tokens: int = 48
    """longest of those completions, in tokens"""


# --- the algorithm

def pair_loss(chosen, rejected, margin=0.0, label_smoothing: float = 0.0, centering: float = 0.0):
    """Bradley-Terry loss of each pair (B,), from the scores of its two answers (B,) each.

    margin (B,) or 0: by how much r_w must exceed r_l to be even (Touvron et al. 2023,
    arXiv:2307.09288, eq. 2). label_smoothing e: the expected loss where a share e of labels is
    wrong (Mitchell 2023, cDPO). centering: Eisenstein et al. 2023, arXiv:2312.09244.
    """
    z = chosen - rejected - margin
    loss = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    return loss + centering * (chosen + rejected).square()


def calibration_error(probability, bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3) of P(chosen over
    rejected).

    probability (B,): of the answer that was chosen. The confidence is the larger of p and 1 -
    p, its prediction is right where p > 1/2; the gap between confidence and accuracy, weighted
    over bins.
    """
    confidence = torch.maximum(probability, 1 - probability)
    right = (probability > 0.5).float() + 0.5 * (probability == 0.5)
    which = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = [(right[which == b] - confidence[which == b]).sum().abs() for b in range(bins)]
    return (sum(gaps) / len(probability)).item()


def correlation(a, b) -> float:
    """Pearson's correlation of two (B,); 0 where one of them does not vary."""
    a, b = a - a.mean(), b - b.mean()
    return ((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12)).item()


def main(args: Args):
    # --- setup
    for flag in ("epochs", "centering", "lora_rank", "warmup", "eval_every", "save_every",
                 "bias_prompts", "max_tokens"):
        if getattr(args, flag) < 0:
            fail(f"--{flag.replace('_', '-')}: must not be negative")
    for flag in ("pairs_per_step", "lr", "micro_batch_size", "tokens_per_micro_batch",
                 "log_every", "eval_pairs", "max_new_tokens", "keep"):
        if not getattr(args, flag) > 0:
            fail(f"--{flag.replace('_', '-')}: must be more than 0")
    if not 0 <= args.label_smoothing < 0.5:
        fail("--label-smoothing: must be at least 0 and below 0.5")
    new_name = f"runs/{Path(__file__).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.resume or args.run_dir or new_name)
    if run_dir.exists() and not args.resume:
        fail(f"--run-dir: {run_dir} exists already: name a new folder, or move it away")
    device = join_processes(args.device)
    enough(args.pairs_per_step, "--pairs-per-step")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(args.seed)

    data = read_pairs(args.data, args.prompt_column)
    if args.eval_data:
        eval_data = read_pairs(args.eval_data, args.prompt_column)[:args.eval_pairs]
    else:
        data, eval_data = data[:-args.eval_pairs], data[-args.eval_pairs:]
        if not data:
            fail(f"{args.data}: {len(eval_data)} rows, which --eval-pairs {args.eval_pairs} holds "
                 "out: lower it, or name --eval-data")
    args.eval_by = args.eval_by or ("kind" if args.data == Args.data and not args.eval_data else "")
    if args.eval_by and not any(args.eval_by in row for row in eval_data):
        fail(f"--eval-by {args.eval_by}: no held-out pair has that column")
    tokenizer = load_tokenizer(args.model)
    model, missing = load_model(AutoModelForSequenceClassification, args.model, device, num_labels=1)
    bf16 = wants_bf16(args.dtype, model)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:  # the head is read before the padding, and
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})  # would be read before the end as well
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    for name in missing:  # the head: normal, 1 / sqrt(d + 1), so that scores begin near one
        weight = model.get_parameter(name)
        torch.nn.init.normal_(weight, std=(weight.shape[-1] + 1) ** -0.5)
    longest = min(args.max_tokens or context_of(model), context_of(model))

    def tokenize(rows: list[dict], path: str) -> list[tuple]:
        """(chosen ids, rejected ids, margin, prompt's length, --eval-by) of each pair."""
        texts = [[render(tokenizer, row["prompt"], row[side]) for row in rows]
                 for side in ("chosen", "rejected")]
        prompt_lengths = map(len, encode(tokenizer, [render(tokenizer, row["prompt"]) for row in rows]))
        pairs, equal, cut = [], 0, 0
        for row, *sides, P in zip(rows, *(encode(tokenizer, t) for t in texts), prompt_lengths):
            cut += max(map(len, sides)) > longest
            # the end of the conversation is kept, the same beginning is lost on both sides
            lost = max(0, max(map(len, sides)) - longest)
            sides = [ids[lost:] for ids in sides]
            if sides[0] == sides[1] or not all(sides):
                equal += 1
                continue
            margin = row.get(args.margin_column) if args.margin_column else 0.0
            if not isinstance(margin, (int, float)):
                fail(f"{path}: a row has no number in the column {args.margin_column!r}")
            pairs.append((*sides, float(margin), P - lost, row.get(args.eval_by)))
        if equal or cut:
            print(f"{path}: of {len(rows)} pairs, {cut} cut to {longest} tokens at the beginning, "
                  f"{equal} left out: their answers are equal")
        if not pairs:
            fail(f"{path}: no pair is left to learn from")
        return pairs

    pairs = tokenize(data, args.data)
    eval_pairs = tokenize(eval_data, args.eval_data or args.data)
    enough(min(len(pairs), len(eval_pairs)), f"{args.data}, to train or to evaluate on")
    reference_name = "none" if args.bias_prompts == 0 else args.reference or args.model
    if reference_name != "none":
        reference, lacking = load_model(AutoModelForCausalLM, reference_name, device)
        if lacking:
            fail(f"{reference_name}: cannot write the completions whose mean score is made zero: name a "
                 "causal LM with --reference, or none")
        reference_tokenizer = load_tokenizer(reference_name)
        spread = torch.randperm(len(data))[:args.bias_prompts].tolist()
        reference_rows, reference_prompts = encode_prompts(
            reference_tokenizer, [data[i] for i in spread], args.data,
            context_of(reference) - args.max_new_tokens, args.max_tokens)
    adapter = add_lora(model, args.lora_rank, bf16) if args.lora_rank else None
    shard(model)
    if args.gradient_checkpointing:
        checkpoint_gradients(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                  lr=args.lr, weight_decay=0.0, fused=True)
    order = []  # batches of pairs at random, each of alike lengths, which share their padding
    for _ in range(args.epochs):
        for part in torch.randperm(len(pairs)).split(16 * args.pairs_per_step):
            part = sorted(part.tolist(), key=lambda i: max(map(len, pairs[i][:2])))
            batches = [part[i:i + args.pairs_per_step]
                       for i in range(0, len(part), args.pairs_per_step)]
            if len(batches) > 1 and len(batches[-1]) < ranks():  # too few for all processes
                batches[-2] += batches.pop()
            order += [batches[i] for i in torch.randperm(len(batches)).tolist()]
    steps = len(order)
    schedule = get_scheduler(
        "constant_with_warmup" if args.lr_schedule == "constant" else args.lr_schedule, optimizer,
        num_warmup_steps=args.warmup, num_training_steps=steps)
    state = {"step": 0, "rows": len(pairs)}  # carried by a run that goes on
    trained = {"model": (model, optimizer, schedule)}
    lock = open_run(run_dir, args, trained)  # held as long as this process lives
    if args.resume:
        state = load_state(run_dir, args, trained, state)
    curves = open_curves(run_dir, args, state["step"])

    def append(name: str, row: dict):
        if rank() == 0:
            with open(run_dir / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if curves and name == "metrics.jsonl":
                draw(curves, row)

    def micro(some_pairs: list[tuple]) -> list[torch.Tensor]:
        """Pairs of alike length in micro-batches; both answers of a pair go through the model
        at once."""
        lengths = torch.tensor([max(len(chosen), len(rejected)) for chosen, rejected, *_ in some_pairs])
        return micro_batches(2 * lengths, max(1, args.micro_batch_size // 2),
                             args.tokens_per_micro_batch)

    def score_pairs(some_pairs: list[tuple]) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores of the chosen and of the rejected answers, (B,) each."""
        with autocast:
            return score_ids(model, [pair[side] for side in (0, 1) for pair in some_pairs]).chunk(2)

    def evaluate(step: int):
        model.eval()
        chosen = rejected = torch.zeros(len(eval_pairs), device=device)
        chosen, rejected = chosen.clone(), rejected.clone()  # (B,) each
        with torch.no_grad():
            for rows in micro(eval_pairs):
                chosen[rows], rejected[rows] = score_pairs([eval_pairs[i] for i in rows])
        chosen, rejected = total(chosen), total(rejected)
        answers = [[len(pair[side]) - pair[3] for pair in eval_pairs] for side in (0, 1)]
        right = (chosen > rejected).float() + 0.5 * (chosen == rejected)  # (B,)
        longer = torch.tensor(answers[0]).to(chosen) - torch.tensor(answers[1]).to(chosen)  # (B,)
        metrics = {
            "step": step, "eval_loss": pair_loss(chosen, rejected).mean(),
            "eval_accuracy": right.mean(),
            # where length and the label agree, and where they do not
            "eval_accuracy_longer": right[longer > 0].mean(),
            "eval_accuracy_shorter": right[longer < 0].mean(),
            "eval_ece": calibration_error((chosen - rejected).sigmoid()),
            "eval_length_correlation": correlation(
                torch.cat([chosen, rejected]), torch.tensor(answers[0] + answers[1]).to(chosen)),
            "eval_reward": torch.cat([chosen, rejected]).mean(),
            "eval_reward_std": torch.cat([chosen, rejected]).std()}
        for value in sorted({str(pair[4]) for pair in eval_pairs}) if args.eval_by else ():
            rows = [i for i, pair in enumerate(eval_pairs) if str(pair[4]) == value]
            metrics[f"eval_accuracy_{value}"] = right[rows].mean()
        metrics = {k: v if k == "step" else round(float(v), 4) for k, v in metrics.items()}
        metrics = {k: v for k, v in metrics.items() if v == v}  # JSON has no nan: of no pair at all
        append("metrics.jsonl", metrics)
        tqdm.write(eval_line(metrics))

    def set_bias():
        """The scale's zero: the mean score of the reference's own completions."""
        model.eval()
        texts = []
        for start in range(0, len(reference_rows), args.micro_batch_size):
            ids, mask = pad(reference_prompts[start:start + args.micro_batch_size],
                            reference_tokenizer.pad_token_id, "left", device)
            with torch.no_grad(), autocast:
                out = reference.generate(
                    input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                    top_p=1.0, max_new_tokens=args.max_new_tokens,
                    pad_token_id=reference_tokenizer.pad_token_id)[:, ids.shape[1]:]
            texts += reference_tokenizer.batch_decode(out, skip_special_tokens=True)
        texts = [render(tokenizer, row["prompt"], text) for row, text in zip(reference_rows, texts)]
        with torch.no_grad(), autocast:
            mean = score_texts(model, tokenizer, texts, args.micro_batch_size).mean().item()
        model.config.reward_bias = getattr(model.config, "reward_bias", 0.0) - mean
        print(f"reward_bias {model.config.reward_bias:.4f}: the mean score of {len(texts)} completions "
              f"by {reference_name} is now 0")

    def save(name: str):
        """What from_pretrained loads, and in resume/ what it takes to go on."""
        with whole_folder(run_dir / name) as folder:
            save_state(folder, trained, state)
            if name == "checkpoint" and reference_name != "none":
                set_bias()
            save_model(adapter or model, model.config, tokenizer, folder)
        remove_old(run_dir, args.keep)

    interrupted = stop = False

    def finish_step(*_):
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once

    signal.signal(signal.SIGINT, finish_step)
    if not args.resume:
        evaluate(0)
    bar = tqdm(range(state["step"] + 1, steps + 1), initial=state["step"], total=steps,
               disable=rank() > 0 or None)  # no bar where the output is no terminal
    for step in bar:
        start = time.time()
        batch = [pairs[i] for i in order[step - 1]]

        # --- 5. update
        model.train()
        loss_sum = accuracy = 0.0
        for rows in micro(batch):
            part = [batch[i] for i in rows]
            chosen, rejected = score_pairs(part)
            margin = torch.tensor([pair[2] for pair in part], device=device)
            loss = pair_loss(chosen, rejected, margin, args.label_smoothing, args.centering)  # (b,)
            loss = loss.sum() / len(batch)
            loss.backward()
            loss_sum += loss.item()
            accuracy += (chosen > rejected).sum().item() / len(batch)
        grad_norm = clip_gradients(model, args.max_grad_norm)
        if not torch.isfinite(grad_norm):
            with torch.no_grad():
                loss = sum(score_pairs(batch))
            bad = [pair[0] for pair, n in zip(batch, loss) if not n.isfinite()]
            not_finite(step, tokenizer.batch_decode(bad), len(batch))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        # --- 6. log
        seconds = time.time() - start
        metrics = {"step": step, "loss": total(loss_sum), "accuracy": total(accuracy),
                   "grad_norm": grad_norm.item(), "lr": schedule.get_last_lr()[0], "seconds": seconds,
                   "tokens_per_second": sum(len(p[0]) + len(p[1]) for p in batch) / seconds}
        metrics = {k: v if k == "step" else float(f"{float(v):.5g}") for k, v in metrics.items()}
        append("metrics.jsonl", metrics)
        shown = {k: f"{metrics[k]:.3g}" for k in ("loss", "accuracy", "seconds")}
        bar.set_postfix(shown)
        if step % args.log_every == 0:
            tqdm.write(f"step {step:4}  " + "  ".join(f"{k} {v}" for k, v in shown.items()))
        stop = total(interrupted) > 0  # in any process
        if args.eval_every and step % args.eval_every == 0 or step == steps or stop:
            evaluate(step)
        state["step"] = step
        if stop:
            break
        if args.save_every and step % args.save_every == 0 and step < steps:
            save(f"checkpoint-{step}")
    if steps == 0:
        return print(f"nothing was trained; the evaluation is in {run_dir}")
    save("checkpoint")
    if stop:
        print(f"stopped by Ctrl-C after step {step}; to go on: {Path(__file__).name} --resume {run_dir}")
    print(f"the reward model is in {run_dir / 'checkpoint'}")


if __name__ == "__main__":
    command_line(main, Args, __doc__)
