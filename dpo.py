"""DPO: direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290).

Learns from pairs of answers, one chosen and one rejected, without a reward
model and without sampling. The policy that maximizes E[r] - beta * KL is
pi* = pi_ref exp(r / beta) / Z(x), so r = beta * log(pi* / pi_ref) + beta log Z(x).
Z cancels in the difference of two answers to one prompt, so the policy can be
trained like a reward model:

    minimize   E[ -log sigmoid(beta * (h_chosen - h_rejected)) ]
    h = log pi(y | x) - log pi_ref(y | x)

Differences from the papers:

1. The reference is the initial policy. Without an SFT model, DPO's authors first train
   it on the chosen answers; --sft-weight adds that loss here (arXiv:2404.19733).
2. IPO takes sums of log-probs, as in its paper's eq. 17. TRL takes means, which
   here is --length-normalize; beta then has to be larger by a factor, the number
   of tokens of an answer.
3. An answer ends with one end-of-sequence token, which counts; one that is cut
   has none.

    python dpo.py                                   # the tiny world: a minute on a laptop
    python dpo.py --model MODEL --data PAIRS.jsonl --lr 1e-6

Watch logprob_chosen: it can fall while the margin grows; then answers outside
the pairs become more likely. eval_kl: DPO can move far from the reference.
accuracy far above eval_accuracy means overfitting.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import get_scheduler

from common import (completion_logprobs, encode, encode_prompts, eos_token_ids, load_pairs,
                    load_tokenizer, pad, read_prompts, render, repeat, without_beginning)
from evaluation import Evaluator, sample_with_generate
from flags import (NonNegFloat, NonNegInt, PairArgs, PosFloat, PosInt, SampleArgs, Smoothing,
                   cli)
from modeling import UserError, context_length, load_causal_lm
from runtime import Run, all_sum, gather_objects, global_means, reference_mode


@dataclass
class Args(PairArgs, SampleArgs):  # inherit the flags that all scripts have: flags.py
    model: str = "tiny/policy"
    """initial policy: folder or hub id of a causal LM"""
    data: str = "tiny/preferences.jsonl"
    """pairs: .jsonl, .jsonl.gz, or hub dataset owner/name[[:config]:split]"""
    epochs: NonNegInt = 1
    """passes over the pairs (1 to 3; 0: evaluate only)"""
    pairs_per_step: PosInt = 32
    """pairs per update (32 to 256)"""
    max_tokens: NonNegInt = 0
    """longer conversations lose the prompt's beginning, then the answer's end (0: context)"""
    beta: PosFloat = 0.1
    """KL coefficient, in reward per nat (0.01 to 0.5; simpo: 2 to 10)"""
    lr: PosFloat = 3e-4
    """AdamW's peak learning rate (real models: 1e-7 to 5e-6)"""

    # --- flags of the algorithm
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo", "apo_zero", "apo_down"] = "sigmoid"
    """sigmoid (DPO), hinge (SLiC), ipo, simpo, apo_zero or apo_down: see dpo_loss"""
    label_smoothing: Smoothing = 0.0
    """fraction of labels taken to be wrong (0 to 0.3): cDPO"""
    robust: bool = False
    """make that loss unbiased: robust DPO"""
    length_normalize: bool = False
    """average log-probs over an answer's tokens instead of summing them (simpo: always)"""
    simpo_margin: NonNegFloat = 0.5
    """simpo: how far the chosen answer must be ahead, in nats (gamma / beta: 0.1 to 0.8)"""
    sft_weight: NonNegFloat = 0.0
    """weight of the chosen answers' negative log-likelihood per token (0.1 to 1)"""

    # --- flags of evaluation
    sample_data: str = ""
    """held-out prompts to sample completions for (default: those of the held-out pairs)"""
    max_new_tokens: PosInt = 48
    """length limit of a completion, in tokens (256 to 8192)"""
    temperature: PosFloat = 1.0
    """sampling temperature (0.7 to 1.0)"""

    def __post_init__(self):
        super().__post_init__()
        if self.loss_type not in ("sigmoid", "simpo") and (
                self.label_smoothing or self.robust):
            raise UserError(f"--loss-type {self.loss_type}: no --label-smoothing or --robust")
        if self.robust and not self.label_smoothing:
            raise UserError("--robust: needs --label-smoothing, the fraction of wrong labels")
        if self.max_tokens == 1:
            raise UserError("--max-tokens: must leave room for a prompt and an answer")
        if self.data == "tiny/preferences.jsonl":  # the tiny world brings its own
            self.sample_data = self.sample_data or "tiny/heldout.jsonl"
            self.gold = self.gold or "tiny/world.py:gold_reward"


# --- the algorithm

def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta: float,
             loss_type: str = "sigmoid", label_smoothing: float = 0.0, robust: bool = False,
             margin: float = 0.0):
    """Loss of each pair, (B,), from the log-probs (B,) of its answers under policy and
    reference, summed or averaged over their tokens.

    sigmoid: DPO, eq. 7. label_smoothing e: its expectation if a fraction e of labels is wrong
        (cDPO, Mitchell 2023). robust: an unbiased estimate of the loss on the true labels
        (Chowdhury et al. 2024, arXiv:2403.00409, sec. 3.1).
    hinge: SLiC, relative to the reference (Liu et al. 2023, arXiv:2309.06657, eq. 10).
    ipo: pulls the log-ratio to 1 / (2 beta) (Azar et al. 2023, arXiv:2310.12036, eq. 17).
    simpo: mean log-probs, no reference; margin is its gamma (arXiv:2405.14734, eq. 6).
    apo_zero: raises the chosen answer and lowers the rejected one. apo_down: lowers both, the
        rejected one more, for pairs worse than the policy (arXiv:2408.06266, eq. 7 and 8).
    """
    if loss_type == "simpo":
        z = beta * (chosen - rejected)
    else:
        z, margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected)), 0.0
    if loss_type == "apo_zero":
        return (beta * (ref_chosen - chosen)).sigmoid() + (
            beta * (rejected - ref_rejected)).sigmoid()
    if loss_type == "apo_down":
        return (beta * (chosen - ref_chosen)).sigmoid() + (-z).sigmoid()
    if loss_type == "hinge":
        return (1 - z).relu()
    if loss_type == "ipo":
        return (z / beta - 1 / (2 * beta)).square()
    loss, swapped, e = -F.logsigmoid(z - margin), -F.logsigmoid(-z - margin), label_smoothing
    if robust:
        return ((1 - e) * loss - e * swapped) / (1 - 2 * e)
    return (1 - e) * loss + e * swapped


def pair_logprobs(model, pairs: list[dict], device):
    """Summed log-probs of the chosen and of the rejected answers: two (B,)."""
    prompt_ids, prompt_mask = pad([pair["prompt_ids"] for pair in pairs] * 2, "left", device)
    answers = [pair[side] for side in ("chosen_ids", "rejected_ids") for pair in pairs]
    completion_ids, mask = pad(answers, "right", device)  # (2 B, T)
    logprobs, _ = completion_logprobs(model, prompt_ids, prompt_mask, completion_ids, mask)
    return logprobs.sum(1).chunk(2)


@torch.no_grad()
def add_reference_logprobs(reference, rows: list[dict], run: Run):
    """Adds to each row its `ref_logprobs`, pair_logprobs under the reference, before training
    starts. They are 0 with simpo, whose implicit reward has no reference."""
    share = run.share(rows)
    logprobs = torch.zeros(len(share), 2)
    groups = run.micro_batches(torch.tensor([pair_length(row) for row in share]))
    with run.autocast(), reference_mode(reference):
        for group in groups if run.args.loss_type != "simpo" else ():
            sides = pair_logprobs(reference, [share[i] for i in group], run.device)
            logprobs[group] = torch.stack(sides, 1).cpu()
    for row, both in zip(rows, gather_objects(logprobs.tolist())):
        row["ref_logprobs"] = both


def pair_metrics(policy, pairs: list[dict], run: Run) -> dict:
    """The loss of each pair, with its gradient, and its metrics, without: (B,) each."""
    args = run.args
    with run.autocast():
        chosen, rejected = pair_logprobs(policy, pairs, run.device)
    ref_logprobs = torch.tensor([pair["ref_logprobs"] for pair in pairs], device=run.device)
    ref_chosen, ref_rejected = ref_logprobs.unbind(1)
    n_chosen = torch.tensor([len(pair["chosen_ids"]) for pair in pairs], device=run.device)
    n_rejected = torch.tensor([len(pair["rejected_ids"]) for pair in pairs], device=run.device)
    metrics = {"logprob_chosen": chosen.detach(), "logprob_rejected": rejected.detach()}
    sft_loss = -chosen / n_chosen
    if args.length_normalize or args.loss_type == "simpo":
        chosen, ref_chosen = chosen / n_chosen, ref_chosen / n_chosen
        rejected, ref_rejected = rejected / n_rejected, ref_rejected / n_rejected
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, args.beta, args.loss_type,
                    args.label_smoothing, args.robust, args.beta * args.simpo_margin)
    reward_chosen = args.beta * (chosen - ref_chosen).detach()
    reward_rejected = args.beta * (rejected - ref_rejected).detach()
    margin = reward_chosen - reward_rejected
    return {"accuracy": (margin.sign() + 1) / 2, "margin": margin,
            "loss": loss + args.sft_weight * sft_loss, **metrics,
            "reward_chosen": reward_chosen, "reward_rejected": reward_rejected}


# --- pairs and their tokens

def encode_pairs(tokenizer, rows: list[dict], path: str, longest: float, eos_ids: list[int]):
    """Rows with their `prompt_ids`, `chosen_ids` and `rejected_ids`, a conversation of at most
    `longest` tokens. Pairs with equal answers are left out."""
    prompts = encode(tokenizer, [render(tokenizer, row["prompt"]) for row in rows])
    chosen, rejected = (
        encode(tokenizer, [render(tokenizer, row["prompt"], row[side]) for row in rows])
        for side in ("chosen", "rejected"))
    pairs, n_equal, n_cut = [], 0, 0
    for row, prompt, *conversations in zip(rows, prompts, chosen, rejected):
        # an answer may merge with the prompt's last token: the prompt is what all three share
        same = 0
        while same < len(prompt) and all(c[same:same + 1] == prompt[same:same + 1]
                                         for c in conversations):
            same += 1
        prompt = prompt[:max(same, 1)]
        answers = [end_once(c[same:], eos_ids, tokenizer.eos_token_id) for c in conversations]
        room = longest - min(len(prompt), longest // 2)  # for the answers, at least half
        kept = [answer[:room] for answer in answers]
        excess = max(0, len(prompt) + max(map(len, kept)) - longest)
        kept_prompt = without_beginning(tokenizer, prompt, excess)
        n_cut += (kept_prompt, kept) != (prompt, answers)
        n_equal += kept[0] == kept[1] or not all(kept)
        if kept[0] != kept[1] and all(kept):
            pairs.append({**row, "prompt_ids": kept_prompt, "chosen_ids": kept[0],
                          "rejected_ids": kept[1]})
    if n_equal or n_cut:
        print(f"{path}: of {len(rows)} pairs, {n_cut} were cut to {longest} tokens, and "
              f"{n_equal} left out because their answers are equal or empty")
    if not pairs:
        raise UserError(f"{path}: no pair is left to learn from")
    return pairs


def end_once(answer: list[int], eos_ids: list[int], eos_id: int) -> list[int]:
    """An answer up to its first end of sequence, without what a template writes after it."""
    n = next((n for n, token in enumerate(answer, 1) if token in eos_ids), 0)
    return answer[:n] if n else answer + [eos_id] * (eos_id is not None)


def answer_length(pair: dict) -> int:
    return max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def pair_length(pair: dict) -> int:
    """Tokens of a pair in a micro-batch, with padding."""
    return 2 * (len(pair["prompt_ids"]) + answer_length(pair))


# --- evaluation

def sample(model, rows: list, group_size: int, run: Run, tokenizer, generator,
           temperature=None):
    """Completions for evaluation; run.generator has seeded what generate draws from."""
    args = run.args
    with run.autocast(), run.gathered(model):  # FSDP's weights are gathered once
        return sample_with_generate(model, repeat(rows, group_size), tokenizer,
                                    args.max_new_tokens, temperature or args.temperature,
                                    args.generate_batch_size)


@torch.no_grad()
def evaluate_pairs(policy, rows: list[dict], run: Run) -> dict:
    """Means of pair_metrics over held-out pairs."""
    policy.eval()
    rows = run.share(rows)
    metrics = {}  # name: (rows,), by row, since micro_batches may repeat one
    for group in run.micro_batches(torch.tensor([pair_length(row) for row in rows])):
        columns = pair_metrics(policy, [rows[i] for i in group], run)
        for name, values in columns.items():
            metrics.setdefault(name, torch.zeros(len(rows), device=run.device))[group] = values
    return global_means([metrics])


def main(args: Args):
    # --- setup
    run = Run(args, __file__)
    tokenizer = load_tokenizer(args.model)
    train_rows, eval_rows = load_pairs(args, tokenizer)
    policy = run.trainable(load_causal_lm(args.model, run.device))  # LoRA, FSDP
    reference = run.load_reference(policy)  # with LoRA, the policy itself
    eos_ids = eos_token_ids(policy, tokenizer).tolist()
    prompts = (read_prompts(args.sample_data, args.prompt_column, tokenizer)
               if args.sample_data else eval_rows)[:args.eval_prompts]
    room = context_length(policy) - args.max_new_tokens
    prompts = encode_prompts(tokenizer, prompts, args.sample_data or args.data, room, room,
                             "set --eval-prompts 0")
    longest = min(args.max_tokens or 2**31, context_length(policy))
    train_rows = encode_pairs(tokenizer, train_rows, args.data, longest, eos_ids)
    eval_rows = encode_pairs(tokenizer, eval_rows, args.eval_data or args.data, longest,
                             eos_ids)
    optimizer = torch.optim.AdamW((p for p in policy.parameters() if p.requires_grad),
                                  lr=args.lr, weight_decay=0.0, fused=True)
    run.steps = math.ceil(args.epochs * len(train_rows) / args.pairs_per_step)
    scheduler = get_scheduler(args.lr_schedule, optimizer, args.warmup, run.steps)
    evaluate = Evaluator(run, prompts, None, sample, tokenizer, temperature=1.0)

    for rows in [eval_rows, train_rows] if args.epochs else [eval_rows]:
        add_reference_logprobs(reference, rows, run)

    # --- steps
    first_step = run.resume(tokenizer, policy=(policy, optimizer, scheduler))
    if first_step == 1:
        evaluate(0, policy, reference, evaluate_pairs(policy, eval_rows, run))

    for step in range(first_step, run.steps + 1):
        # 1. take some pairs
        run.phase("update")
        pairs = run.batch(train_rows, step, args.pairs_per_step, args.epochs, answer_length)
        n_pairs = all_sum(torch.tensor(len(pairs), device=run.device))

        # 2. update
        policy.train()
        lr, metrics = scheduler.get_last_lr()[0], []
        for rows in run.micro_batches(torch.tensor([pair_length(pair) for pair in pairs])):
            columns = pair_metrics(policy, [pairs[i] for i in rows], run)
            (columns["loss"].sum() / n_pairs).backward()
            metrics.append({name: values.detach() for name, values in columns.items()})
        grad_norm = run.clip_grad_norm(policy)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        # 3. log, evaluate, save
        run.log(step, {**global_means(metrics), "grad_norm": grad_norm, "lr": lr})
        if run.due(args.eval_every, step):
            evaluate(step, policy, reference, evaluate_pairs(policy, eval_rows, run))
        if run.due(args.save_every, step):
            run.save(step)
        if run.stopped:  # Ctrl-C
            break
    return run.dir, run.metrics


if __name__ == "__main__":
    cli(main, Args, __doc__)
