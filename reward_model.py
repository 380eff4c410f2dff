"""Reward model, after Bradley and Terry (Ouyang et al. 2022, InstructGPT,
arXiv:2203.02155; Stiennon et al. 2020, arXiv:2009.01325).

Learns from pairs of answers, one chosen and one rejected, a score r(x, y) whose
differences say how likely people prefer one to the other,
P(y_w preferred to y_l) = sigmoid(r_w - r_l):

    minimize   E[ -log sigmoid(r_w - r_l - margin) ]
               + centering * E[ (r_w + r_l)^2 ]

Only differences are learned, so the zero of the scale is free. After training
it is put at the mean score of the reference's own completions (Ziegler et al. 2019,
arXiv:1909.08593, who also set the variance), here of those that end by themselves.

Differences from InstructGPT and Stiennon et al.:

1. Pairs, as in Stiennon et al.; InstructGPT ranks 4 to 9 answers at once.
2. Both put the zero at the mean score of answers that people wrote.

    python reward_model.py                          # the tiny world: a minute on a laptop
    python reward_model.py --model MODEL --data PAIRS.jsonl --lr 1e-5

Watch eval_accuracy next to what the noise of the labels allows. eval_ece:
whether its probabilities can be believed. eval_length_correlation: a score that
is mostly length will be hacked by length.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, get_scheduler

from common import (check_room, encode, encode_prompts, load_pairs, load_tokenizer, render,
                    score_ids, score_texts, without_beginning)
from evaluation import sample_with_generate
from flags import NonNegFloat, NonNegInt, PairArgs, PosFloat, PosInt, Smoothing, cli
from modeling import UserError, context_length, embedding_rows, load_causal_lm, load_model
from runtime import Run, all_sum, gather_objects, global_means


@dataclass
class Args(PairArgs):  # inherits the flags that all scripts have: flags.py
    model: str = "tiny/policy"
    """initial model: folder or hub id of a causal LM, or of a reward model"""
    data: str = "tiny/preferences.jsonl"
    """pairs: .jsonl, .jsonl.gz, or hub dataset owner/name[[:config]:split]"""
    epochs: NonNegInt = 1
    """passes over the pairs (1 to 2: reward models overfit soon; 0: evaluate only)"""
    pairs_per_step: PosInt = 32
    """pairs per update (32 to 256)"""
    max_tokens: NonNegInt = 0
    """cut the beginning of longer conversations (0: the context)"""
    lr: PosFloat = 1e-3
    """AdamW's peak learning rate (real models: 1e-6 to 2e-5)"""

    # --- flags of the algorithm
    margin_column: str = ""
    """column with how much better the chosen answer is, in units of score (Llama 2)"""
    centering: NonNegFloat = 0.0
    """weight of (r_w + r_l)^2, which keeps scores near zero (0.01)"""
    label_smoothing: Smoothing = 0.0
    """fraction of labels taken to be wrong (0 to 0.3)"""
    reference: str = ""
    """policy whose completions get mean score 0: folder or hub id (default: --model)"""
    bias_prompts: NonNegInt = 128
    """number of prompts for these completions (0: the zero of the scale is left as it is)"""
    max_new_tokens: PosInt = 48
    """length limit of these completions, in tokens (256 to 8192)"""

    # --- flags of evaluation
    eval_by: str = ""
    """column of the held-out pairs: accuracy is also given for each of its values"""

    def __post_init__(self):
        super().__post_init__()
        if self.data == "tiny/preferences.jsonl" and not self.eval_data:
            self.eval_by = self.eval_by or "kind"


# --- the algorithm

def pair_loss(chosen, rejected, margin=0.0, label_smoothing: float = 0.0,
              centering: float = 0.0):
    """Bradley-Terry loss of each pair, (B,), from the scores of its two answers, (B,) each.

    margin: (B,) or 0, how far r_w must exceed r_l (Llama 2, arXiv:2307.09288, eq. 2).
    label_smoothing e: the expected loss if a fraction e of the pairs is swapped (cDPO,
    Mitchell 2023). centering: Eisenstein et al. 2023, arXiv:2312.09244, eq. 2.
    """
    z, e = chosen - rejected, label_smoothing
    loss = -(1 - e) * F.logsigmoid(z - margin) - e * F.logsigmoid(-z - margin)
    return loss + centering * (chosen + rejected).square()


def calibration_error(probability, bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3).

    probability: (B,), of the answer that was chosen. The confidence is the larger of p and
    1 - p; its gap to the accuracy is averaged over bins of equal width, by their size.
    """
    confidence = torch.maximum(probability, 1 - probability)
    right = ((probability - 0.5).sign() + 1) / 2
    bin_of = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = [(right - confidence)[bin_of == b].sum().abs() for b in range(bins)]
    return (sum(gaps) / len(probability)).item()


def correlation(a, b) -> float:
    """Pearson correlation of two (B,); 0 if one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    return ((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12)).item()


def load_scorer(name: str, tokenizer, device):
    """A model with one score, from a reward model, or from a causal LM with a new head."""
    model, missing = load_model(AutoModelForSequenceClassification, name, device, num_labels=1)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # transformers reads the score before the first pad token: it would be before the end
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
        tokenizer.embedded = embedding_rows(model)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    for key in missing:  # the head: std 1 / sqrt(d + 1), so that scores begin with std near 1
        weight = model.get_parameter(key)
        torch.nn.init.normal_(weight, std=(weight.shape[-1] + 1) ** -0.5)
    return model


# --- pairs and their tokens

def encode_pairs(tokenizer, rows: list[dict], path: str, longest: float, margin_column: str):
    """Rows with `chosen_ids` and `rejected_ids`, the two whole conversations, of at most
    `longest` tokens, and `prompt_length`. Pairs that are equal then are left out."""
    prompts = encode(tokenizer, [render(tokenizer, row["prompt"]) for row in rows])
    chosen, rejected = (
        encode(tokenizer, [render(tokenizer, row["prompt"], row[side]) for row in rows])
        for side in ("chosen", "rejected"))
    pairs, n_equal, n_cut = [], 0, 0
    for row, prompt, *whole in zip(rows, prompts, chosen, rejected):
        margin = row.get(margin_column) if margin_column else 0.0
        if not isinstance(margin, (int, float)) or not math.isfinite(margin):
            raise UserError(f"{path}: the column {margin_column!r} must hold a number, not "
                            f"{margin!r}, as for the prompt {str(row['prompt'])[:60]!r}")
        # both lose the same beginning of the prompt, and an answer only what it has too much
        excess = max(0, max(map(len, whole)) - longest)
        cut = min(excess, len(prompt))
        kept = [without_beginning(tokenizer, ids, max(cut, len(ids) - longest))
                for ids in whole]
        n_cut += excess > 0
        n_equal += kept[0] == kept[1] or not all(kept)
        if kept[0] != kept[1] and all(kept):
            pairs.append({**row, "chosen_ids": kept[0], "rejected_ids": kept[1],
                          "prompt_length": len(prompt) - cut, "margin_of_pair": float(margin)})
    if n_equal or n_cut:
        print(f"{path}: of {len(rows)} pairs, {n_cut} were cut to {longest} tokens, and "
              f"{n_equal} left out because their answers are equal or empty")
    if not pairs:
        raise UserError(f"{path}: no pair is left to learn from")
    return pairs


def pair_length(pair: dict) -> int:
    """Tokens of a pair in a micro-batch, with padding."""
    return 2 * max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def score_pairs(model, pairs: list[dict], run: Run):
    """Scores of the chosen and of the rejected answers: two (B,)."""
    with run.autocast():
        rows = [pair[side] for side in ("chosen_ids", "rejected_ids") for pair in pairs]
        return score_ids(model, rows, prompts=2 * list(range(len(pairs)))).chunk(2)


# --- evaluation

@torch.no_grad()
def evaluate(model, rows: list[dict], run: Run) -> dict:
    """Metrics of held-out pairs; the loss without margins, label smoothing and centering."""
    model.eval()
    rows = run.share(rows)
    scores = torch.zeros(2, len(rows))  # of the chosen and of the rejected answers
    for group in run.micro_batches(torch.tensor([pair_length(row) for row in rows])):
        scores[:, group] = torch.stack(score_pairs(model, [rows[i] for i in group], run)).cpu()
    lengths = [[len(row[side]) - row["prompt_length"] for row in rows]
               for side in ("chosen_ids", "rejected_ids")]
    values = [str(row.get(run.args.eval_by)) for row in rows]
    *numbers, values = zip(*gather_objects(list(zip(*scores.tolist(), *lengths, values))))
    chosen, rejected, chosen_length, rejected_length = torch.tensor(numbers)  # (pairs,) each
    right = ((chosen - rejected).sign() + 1) / 2
    scores = torch.cat([chosen, rejected])
    lengths = torch.cat([chosen_length, rejected_length])
    metrics = {"loss": pair_loss(chosen, rejected).mean(), "accuracy": right.mean(),
               "ece": calibration_error((chosen - rejected).sigmoid()),
               "length_correlation": correlation(scores, lengths),
               "reward": scores.mean(), "reward_std": scores.std(),
               "accuracy_longer": right[chosen_length > rejected_length].mean(),
               "accuracy_shorter": right[chosen_length < rejected_length].mean()}
    for value in sorted(set(values)) if run.args.eval_by else ():
        metrics[f"accuracy_{value}"] = right[[v == value for v in values]].mean()
    return metrics


def center(model, tokenizer, reference, prompts: list[dict], reference_tokenizer, run: Run):
    """Puts the zero of the scale at the mean score of the reference's completions."""
    run.generator(0)  # the same completions each time
    with run.autocast():
        rollout = sample_with_generate(reference, prompts, reference_tokenizer,
                                       run.args.max_new_tokens)
        # one that was cut would be scored as if it had ended there; if all were, they are used
        used = (~rollout.truncated | rollout.truncated.all()).nonzero()[:, 0].tolist()
        ended = [(prompts[i]["prompt"], rollout.texts[i]) for i in used]
        ended = gather_objects(ended if run.rank == 0 else [])  # the same in all processes
        texts = [render(tokenizer, *both, whole=False) for both in ended]
        mean = score_texts(model.eval(), tokenizer, texts, run.args.micro_batch_tokens).mean()
    bias = getattr(model.config, "reward_bias", 0.0) - mean.item()
    model.config.reward_bias = bias
    print(f"reward_bias {bias:.4f}: {len(texts)} completions of the reference now have mean "
          f"score 0 (of {len(prompts)}; {int(rollout.truncated.sum())} were cut)")


def main(args: Args):
    # --- setup
    run = Run(args, __file__)
    tokenizer = load_tokenizer(args.model)
    train_rows, eval_rows = load_pairs(args, tokenizer)
    if args.eval_by and not any(args.eval_by in row for row in eval_rows):
        raise UserError(f"--eval-by {args.eval_by}: no held-out pair has that column")
    model = load_scorer(args.model, tokenizer, run.device)
    reference = None
    if args.bias_prompts and args.epochs:
        name = args.reference or args.model
        try:
            reference = load_causal_lm(name, run.device)
        except UserError as error:
            raise UserError(f"{error} (set --reference to a causal LM, or --bias-prompts 0)")
        reference_tokenizer = load_tokenizer(name)
        room = context_length(reference) - args.max_new_tokens
        picked = torch.randperm(len(train_rows))[:args.bias_prompts]
        prompts = encode_prompts(reference_tokenizer, [train_rows[i] for i in picked],
                                 args.data, room, min(args.max_tokens or room, room),
                                 "set --bias-prompts 0")
        check_room(model, tokenizer, prompts, args.max_new_tokens)
    model = run.trainable(model)  # LoRA, FSDP
    longest = min(args.max_tokens or 2**31, context_length(model))
    train_rows = encode_pairs(tokenizer, train_rows, args.data, longest, args.margin_column)
    eval_rows = encode_pairs(tokenizer, eval_rows, args.eval_data or args.data, longest,
                             args.margin_column)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad),
                                  lr=args.lr, weight_decay=0.0, fused=True)
    run.steps = math.ceil(args.epochs * len(train_rows) / args.pairs_per_step)
    scheduler = get_scheduler(args.lr_schedule, optimizer, args.warmup, run.steps)

    # --- steps
    first_step = run.resume(tokenizer, model=(model, optimizer, scheduler))
    if first_step == 1:
        run.log(0, evaluate(model, eval_rows, run), "eval_")

    for step in range(first_step, run.steps + 1):
        # 1. take some pairs
        run.phase("update")
        pairs = run.batch(train_rows, step, args.pairs_per_step, args.epochs, pair_length)
        n_pairs = all_sum(torch.tensor(len(pairs), device=run.device))

        # 2. update
        model.train()
        lr, metrics = scheduler.get_last_lr()[0], []
        for rows in run.micro_batches(torch.tensor([pair_length(pair) for pair in pairs])):
            chosen, rejected = score_pairs(model, [pairs[i] for i in rows], run)
            margin = torch.tensor([pairs[i]["margin_of_pair"] for i in rows]).to(run.device)
            loss = pair_loss(chosen, rejected, margin, args.label_smoothing, args.centering)
            (loss.sum() / n_pairs).backward()
            right = ((chosen - rejected).detach().sign() + 1) / 2
            metrics.append({"loss": loss.detach(), "accuracy": right})
        grad_norm = run.clip_grad_norm(model)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        # 3. log, evaluate, save
        run.log(step, {**global_means(metrics), "grad_norm": grad_norm, "lr": lr})
        if run.due(args.eval_every, step):
            run.log(step, evaluate(model, eval_rows, run), "eval_")
        if run.due(0, step) and reference:
            center(model, tokenizer, reference, prompts, reference_tokenizer, run)
        if run.due(args.save_every, step):
            run.save(step)
        if run.stopped:  # Ctrl-C
            break
    return run.dir, run.metrics


if __name__ == "__main__":
    cli(main, Args, __doc__)
