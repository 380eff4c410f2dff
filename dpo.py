"""Direct preference optimisation, DPO (Rafailov et al. 2023, arXiv:2305.18290).

Learns from pairs of answers, one chosen and one rejected, with no reward model and no sampling: the
optimum of E[r] - beta * KL is pi* = pi_ref exp(r / beta) / Z, so a policy is the optimum of the
reward beta * log(pi / pi_ref), and it can be fitted to the pairs as a reward model is:

    minimise   E[ -log sigmoid( beta * (h_w - h_l) ) ]        h = log pi(y | x) - log pi_ref(y | x)

Its kin differ in what they do with z = h_w - h_l: --loss-type hinge (SLiC, Zhao et al. 2023,
arXiv:2305.10425), ipo (Azar et al. 2023, arXiv:2310.12036), simpo (Meng et al. 2024,
arXiv:2405.14734: mean log-probs, no reference, a margin).

Where this differs from the papers:
 1. The reference is the initial policy; DPO's authors first train it on the chosen answers, which
    --sft-weight does on the way (Pang et al. 2024, arXiv:2404.19733).
 2. IPO has sums of log-probs, as in its paper's eq. 17. TRL takes their means, which is
    `--length-normalise` here: the same beta then counts for as many times less as an answer
    has tokens, so it is to be that many times larger.
 3. An answer ends with one end-of-sequence token, which counts; one that is cut has none.
Neighbours: reward_model.py learns the same reward as a model of its own; grpo.py, ppo.py and
reinforce.py maximise that.

    python dpo.py                                      the tiny world: a minute on a laptop
    python dpo.py --model MODEL --data PAIRS.jsonl --lr 1e-6

Watch: `logprob_chosen`: it may fall while the margin grows, the rejected one falling faster, and
what neither answer says then gains; `eval_kl`: DPO goes far off without sampling; `eval_accuracy`
beside `accuracy`: overfitting.
"""
import hashlib
import json
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, DynamicCache, TopPLogitsWarper, get_scheduler,
                          logging)

from common import (add_lora, anywhere, as_reference, checkpoint_gradients, clip_gradients,
                    command_line, completion_logprobs, context_of, draw, encode,
                    encode_prompts, enough, eval_line, fail, first_line, freeze, gather,
                    join_processes, kl_estimate, load_model, load_reward, load_state,
                    load_tokenizer, micro_batches, not_finite, open_curves, open_run, pad,
                    past, rank, ranks, read_pairs, read_prompts, remove_old, render,
                    save_model, save_state, shard, share, total, unsharded, wants_bf16, whole,
                    whole_folder, win_rates)


# --- arguments

@dataclass
class Args:
    model: str = "tiny/policy"
    """the policy to start from, and the reference: a causal LM's folder or hub id"""
    data: str = "tiny/preferences.jsonl"
    """rows of pairs: a .jsonl or .jsonl.gz file, or a hub data set
    owner/name[:config][:split]"""
    eval_data: str = ""
    """held-out pairs (empty: the last --eval-pairs rows of --data, held out)"""
    sample_data: str = ""
    """rows of prompts that evaluation has answered (empty: the held-out pairs' prompts; tiny world:
    its own)"""
    gold: str = ""
    """what evaluation scores those answers by: a reward model, or file.py:function (tiny world: its
    gold reward)"""
    reward_timeout: float = 0.0
    """seconds that such a function may take for all answers (0: any)"""
    prompt_column: str = "prompt"
    """the column that holds the prompt; without it, the prompt is what chosen and rejected
    begin with"""
    run_dir: str = ""
    """a new folder for metrics, samples and the trained model (runs/SCRIPT-DATE-TIME)"""
    resume: str = ""
    """the folder of a run to go on with, from its newest checkpoint and with its flags"""
    reference_dir: str = "runs/reference_logprobs"
    """where the reference's log-probs are kept, by model and data, for the next run"""
    seed: int = 0

    epochs: int = 1
    """passes over the pairs (1 to 3; 0: evaluate --model, and save nothing of it)"""
    pairs_per_step: int = 32
    """pairs an update (32 to 256)"""
    max_tokens: int = 0
    """longest conversation: a longer one loses the beginning of its prompt, and, where that is not
    enough, the end of its answer (0: the context)"""
    beta: float = 0.1
    """weight of the KL that the pairs are taken to come from, in reward per nat (0.01 to 0.5; simpo:
    2 to 10)"""
    lr: float = 3e-4
    """AdamW's peak learning rate (real models: 1e-7 to 5e-6)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """after the warm-up, for the rest of the updates"""
    warmup: int = 10
    """updates of linear warm-up (a tenth of all)"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    micro_batch_size: int = 64
    """most answers per forward and backward pass, both of a pair in one; sets the memory used,
    changes no result"""
    tokens_per_micro_batch: int = 8192
    """and most tokens, with padding (16384 to 65536 on a GPU of 80 GB)"""
    generate_batch_size: int = 512
    """completions sampled at a time in evaluation; sets the memory used"""
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
    eval_prompts: int = 300
    """prompts that evaluation has answered, one completion each (0: none)"""
    tensorboard: bool = False
    """curves in RUN/tensorboard, too"""
    max_new_tokens: int = 48
    """longest of those completions, in tokens"""
    temperature: float = 1.0
    """of that sampling"""
    top_p: float = 1.0
    """nucleus sampling there"""

    # --- arguments of the algorithm
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo"] = "sigmoid"
    """see dpo_loss"""
    label_smoothing: float = 0.0
    """the share of labels taken to be wrong (0 to 0.3): cDPO"""
    robust: bool = False
    """make that loss unbiased: robust DPO"""
    length_normalise: bool = False
    """log-probs by their mean over an answer's tokens, not their sum (simpo always)"""
    simpo_margin: float = 0.5
    """by how much the chosen answer's mean log-prob must be ahead in simpo, in nats (its authors'
    gamma / beta: 0.3 to 1)"""
    sft_weight: float = 0.0
    """weight of the chosen answers' negative log-likelihood per token (0.1 to 1)"""


# --- the algorithm

def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta: float, loss_type: str = "sigmoid",
             label_smoothing: float = 0.0, robust: bool = False, margin: float = 0.0):
    """The loss of each pair, (B,), from the log-probs (B,) of its answers under policy and
    reference, sums or means over their tokens.

    sigmoid: DPO, eq. 7. label_smoothing e: its expectation where a share e of labels is wrong
        (cDPO, Mitchell 2023); robust: the loss whose expectation over such labels is that of
        right ones (Chowdhury et al. 2024, arXiv:2403.00409, eq. 12).
    hinge: SLiC with the reference's log-probs taken off (Zhao et al. 2023; Liu et al. 2023,
        arXiv:2309.06657, section 3.2).
    ipo: z is to be 1 / (2 beta), and no more (Azar et al. 2023, eq. 17).
    simpo: mean log-probs, no reference (Meng et al. 2024, eq. 6).
    """
    if loss_type == "simpo":
        z = beta * (chosen - rejected) - margin
    else:
        z = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    if loss_type == "hinge":
        return (1 - z).relu()
    if loss_type == "ipo":
        return (z / beta - 1 / (2 * beta)).square()
    e = label_smoothing
    if robust:
        return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)
    return -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)


def cut(prompt: list[int], answers: list[list[int]], longest: int):
    """(prompt, answers) that fit into `longest` tokens: answers lose their ends only where half of
    it is not enough for them, the prompt loses its beginning for what is left."""
    most = longest - min(len(prompt), longest // 2)
    answers = [answer[:most] for answer in answers]
    return prompt[-(longest - max(map(len, answers))):], answers


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
    if not 0 <= args.label_smoothing < 0.5:
        fail("--label-smoothing: must be at least 0 and below 0.5")
    if args.loss_type in ("hinge", "ipo") and (args.label_smoothing or args.robust):
        fail(f"--loss-type {args.loss_type}: has no --label-smoothing and no --robust")
    args.length_normalise |= args.loss_type == "simpo"

    # --- setup
    for flag in ("epochs", "warmup", "lora_rank", "eval_every", "save_every", "eval_prompts",
                 "max_tokens", "sft_weight", "simpo_margin", "reward_timeout"):
        if getattr(args, flag) < 0:
            fail(f"--{flag.replace('_', '-')}: must not be negative")
    for flag in ("pairs_per_step", "beta", "lr", "micro_batch_size", "tokens_per_micro_batch",
                 "log_every", "generate_batch_size", "eval_pairs", "max_new_tokens", "temperature",
                 "keep"):
        if not getattr(args, flag) > 0:
            fail(f"--{flag.replace('_', '-')}: must be more than 0")
    if not 0 < args.top_p <= 1:
        fail("--top-p: must be more than 0 and at most 1")
    new_name = f"runs/{Path(__file__).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.resume or args.run_dir or new_name)
    if run_dir.exists() and not args.resume:
        fail(f"--run-dir: {run_dir} exists already: name a new folder, or move it away")
    device = join_processes(args.device)
    enough(args.pairs_per_step, "--pairs-per-step")
    if args.offload_reference and ranks() > 1:
        fail("--offload-reference: is for one process; many share the reference out")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(args.seed)

    tiny = args.data == Args.data
    args.sample_data = args.sample_data or ("tiny/heldout.jsonl" if tiny else "")
    args.gold = args.gold or ("tiny/world.py:gold_reward" if tiny else "")
    data = read_pairs(args.data, args.prompt_column)
    if args.eval_data:
        eval_data = read_pairs(args.eval_data, args.prompt_column)[:args.eval_pairs]
    else:
        data, eval_data = data[:-args.eval_pairs], data[-args.eval_pairs:]
        if not data:
            fail(f"{args.data}: {len(eval_data)} rows, which --eval-pairs {args.eval_pairs} holds "
                 "out: lower it, or name --eval-data")
    sample_rows = read_prompts(args.sample_data, args.prompt_column) if args.sample_data else eval_data
    tokenizer = load_tokenizer(args.model)
    policy, missing = load_model(AutoModelForCausalLM, args.model, device)
    if missing:
        fail(f"{args.model}: no causal LM: it has no weights for {', '.join(sorted(missing)[:3])}")
    bf16 = wants_bf16(args.dtype, policy)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    longest = int(min(args.max_tokens or 2**31, context_of(policy), 2**31))
    if longest < 2:
        fail("--max-tokens: must leave room for a prompt and an answer")
    ends = policy.generation_config.eos_token_id or []  # one, or a list: chat models end turns by more
    ends = sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
    pad_id = tokenizer.pad_token_id

    def tokenize(rows: list[dict], path: str) -> list[tuple]:
        """(prompt ids, chosen ids, rejected ids) of each pair."""
        prompts = encode(tokenizer, [render(tokenizer, row["prompt"]) for row in rows])
        sides = [encode(tokenizer, [render(tokenizer, row["prompt"], row[side]) for row in rows])
                 for side in ("chosen", "rejected")]
        pairs, equal, shortened = [], 0, 0
        for prompt, *wholes in zip(prompts, *sides):
            same = 0  # the prompt's last token may go on in an answer, a template write over it
            while same < len(prompt) and all(ids[same:same + 1] == [prompt[same]] for ids in wholes):
                same += 1
            prompt, answers = prompt[:max(same, 1)], []
            for answer in (ids[same:] for ids in wholes):
                n = next((n for n, token in enumerate(answer, 1) if token in ends), 0)
                # not what a template writes after the end
                answers.append(answer[:n] if n else answer + [tokenizer.eos_token_id])
            whole, (short, answers) = (prompt, answers), cut(prompt, answers, longest)
            shortened += (short, answers) != whole
            if answers[0] == answers[1]:
                equal += 1
                continue
            pairs.append((short, *answers))
        if equal or shortened:
            print(f"{path}: of {len(rows)} pairs, {shortened} cut to {longest} tokens, {equal} left "
                  "out: their answers are equal")
        if not pairs:
            fail(f"{path}: no pair is left to learn from")
        return pairs

    pairs = tokenize(data, args.data)
    eval_pairs = tokenize(eval_data, args.eval_data or args.data)
    enough(min(len(pairs), len(eval_pairs)), f"{args.data}, to train or to evaluate on")
    if args.eval_prompts:
        room = context_of(policy) - args.max_new_tokens  # for a prompt
        sample_rows, sample_prompts = encode_prompts(
            tokenizer, sample_rows[:args.eval_prompts], args.sample_data or args.data, room, room)
        enough(len(sample_prompts), "--eval-prompts")
    adapter = add_lora(policy, args.lora_rank, bf16) if args.lora_rank else None
    shard(policy)
    if args.lora_rank:
        reference = policy  # without its adapter; see common.as_reference
    else:
        reference, _ = load_model(AutoModelForCausalLM, args.model,
                                  "cpu" if args.offload_reference else device)
        freeze(reference, bf16)
        shard(reference)
    gold = load_reward(args.gold, device, args.micro_batch_size, timeout=args.reward_timeout
                       ) if args.gold else None
    if args.gradient_checkpointing:
        checkpoint_gradients(policy)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad],
                                  lr=args.lr, weight_decay=0.0, fused=True)
    order = []  # batches of pairs at random, each of alike lengths, which share their padding
    for _ in range(args.epochs):
        for part in torch.randperm(len(pairs)).split(16 * args.pairs_per_step):
            part = sorted(part.tolist(), key=lambda i: max(map(len, pairs[i][1:])))
            batches = [part[i:i + args.pairs_per_step]
                       for i in range(0, len(part), args.pairs_per_step)]
            if len(batches) > 1 and len(batches[-1]) < ranks():  # too few for all processes
                batches[-2] += batches.pop()
            order += [batches[i] for i in torch.randperm(len(batches)).tolist()]
    steps = len(order)
    schedule = get_scheduler(
        "constant_with_warmup" if args.lr_schedule == "constant" else args.lr_schedule, optimizer,
        num_warmup_steps=args.warmup, num_training_steps=steps)

    # --- log-probs
    def micro(some_pairs: list[tuple]) -> list[torch.Tensor]:
        """Pairs of alike length in micro-batches; both answers of a pair go through the model
        at once."""
        lengths = torch.tensor([len(prompt) + max(len(chosen), len(rejected))
                                for prompt, chosen, rejected in some_pairs])
        return micro_batches(2 * lengths, max(1, args.micro_batch_size // 2),
                             args.tokens_per_micro_batch)

    def pair_logprobs(model, some_pairs: list[tuple]):
        """The sums of the log-probs of the chosen and of the rejected answers' tokens, and their
        numbers of tokens, (B,) each."""
        prompt_ids, prompt_mask = pad([pair[0] for pair in some_pairs] * 2, pad_id, "left", device)
        completion_ids, mask = pad([pair[side] for side in (1, 2) for pair in some_pairs], pad_id,
                                   "right", device)  # (2 B, T)
        with autocast:
            logprobs, _ = completion_logprobs(model, prompt_ids, prompt_mask, completion_ids, mask)
        return *logprobs.sum(1).chunk(2), *mask.sum(1).chunk(2)

    def reference_logprobs(some_pairs: list[tuple]) -> torch.Tensor:
        """(pairs, 2) sums under the reference, of chosen and rejected: computed once, and kept on
        disk by a digest of the model and the pairs."""
        digest = hashlib.sha256(repr((some_pairs, bf16, reference.config.to_json_string())).encode())
        for name, weight in sorted(reference.state_dict().items()):
            if "lora_" not in name:  # the reference's adapter is off
                digest.update(name.encode() + whole(weight).float().cpu().numpy().tobytes())
        path = Path(args.reference_dir) / f"{digest.hexdigest()[:24]}.safetensors"
        if path.is_file():
            try:
                logprobs = load_file(path)["logprobs"].to(device)
            except Exception as error:
                fail(f"--reference-dir: {path} is damaged ({first_line(error)}): remove it")
            print(f"the reference's log-probs of {len(some_pairs)} pairs are those of {path}")
            return logprobs
        logprobs = torch.zeros(len(some_pairs), 2, device=device)
        with torch.no_grad(), as_reference(reference, adapter, device):
            for rows in tqdm(micro(some_pairs), desc="reference", disable=rank() > 0 or None):
                chosen, rejected, _, _ = pair_logprobs(reference, [some_pairs[i] for i in rows])
                logprobs[rows] = torch.stack([chosen, rejected], 1)
        logprobs = total(logprobs)
        try:
            if rank() == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file({"logprobs": logprobs.cpu()}, path)
        except OSError as error:
            fail(f"--reference-dir: {path} cannot be written: {error.strerror}")
        return logprobs

    ref_logprobs = reference_logprobs(pairs if args.epochs else pairs[:1])
    eval_ref_logprobs = reference_logprobs(eval_pairs)

    def losses(some_pairs: list[tuple], ref: torch.Tensor):
        """The loss of each pair, and what is to be known of it, (B,) each."""
        chosen, rejected, *tokens = pair_logprobs(policy, some_pairs)
        logprobs = {"logprob_chosen": chosen.detach(), "logprob_rejected": rejected.detach()}
        sft = -chosen / tokens[0]  # (B,)
        sides = chosen, rejected, ref[:, 0], ref[:, 1]
        if args.length_normalise:
            sides = [side / n for side, n in zip(sides, tokens * 2)]
        loss = dpo_loss(*sides, args.beta, args.loss_type, args.label_smoothing, args.robust,
                        args.beta * args.simpo_margin) + args.sft_weight * sft
        if args.loss_type == "simpo":
            sides = *sides[:2], 0.0, 0.0  # its implicit reward has no reference
        rewards = [args.beta * (side.detach() - ref) for side, ref in zip(sides[:2], sides[2:])]
        metrics = {"loss": loss.detach(), "reward_chosen": rewards[0], "reward_rejected": rewards[1],
                   "margin": rewards[0] - rewards[1],
                   "accuracy": (rewards[0] > rewards[1]).float() + 0.5 * (rewards[0] == rewards[1])}
        return loss, metrics | logprobs

    # --- the run folder and evaluation
    for name, model in {"policy": policy, **({} if adapter else {"reference": reference})}.items():
        tuned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        size = 12 * tuned + sum(p.numel() * p.element_size() for p in model.parameters())
        print(f"{name:10} {model.num_parameters() / 1e6:10.2f} M parameters "
              f"{size / 2**20:10.1f} MiB  weights"
              + (f", gradients and two moments of {tuned / 1e6:.2f} M" if tuned else ""))
    # carried by a run that goes on
    state = {"step": 0, "rows": len(pairs), "first": {},
             "eval_rows": len(sample_prompts) if args.eval_prompts else 0}
    trained = {"policy": (policy, optimizer, schedule)}
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

    @torch.no_grad()
    def logprobs_of(model, *rollout):
        """Log-probs of completions (prompt_ids and the rest) under a model, (B, T)."""
        logprobs = torch.zeros(rollout[3].shape, device=device)
        for rows in micro_batches(rollout[1].sum(1) + rollout[3].sum(1), args.micro_batch_size,
                                  args.tokens_per_micro_batch):
            with autocast:
                logprobs[rows], _ = completion_logprobs(
                    model, *(t[rows] for t in rollout), args.temperature)
        return total(logprobs)

    def evaluate(step: int):
        """The held-out pairs, and one completion of each prompt, always with the same seed."""
        policy.eval()
        found = {}
        with torch.no_grad():
            for rows in micro(eval_pairs):
                _, part = losses([eval_pairs[i] for i in rows], eval_ref_logprobs[rows])
                for k, v in part.items():
                    found.setdefault(k, []).append(v)
        metrics = {"step": step} | {f"eval_{k}": gather(torch.cat(v)).mean() for k, v in found.items()}
        if args.eval_prompts:
            prompt_ids, prompt_mask = pad(sample_prompts, pad_id, "left", device)
            generator = torch.Generator(device).manual_seed(args.seed + 1_000_000 * rank())
            # in every process as many calls
            calls = math.ceil(len(prompt_ids) / ranks() / args.generate_batch_size)
            with autocast, unsharded(policy, args.gather_to_sample):
                parts = [generate(policy, *ids, args, 1, ends, pad_id, generator) for ids in zip(
                    *(share(t).tensor_split(calls) for t in (prompt_ids, prompt_mask)))]
            completion_ids, mask = (gather(torch.cat(part)) for part in zip(*parts))  # (B, T) each
            texts = tokenizer.batch_decode(
                [ids[m.bool()] for ids, m in zip(completion_ids, mask)], skip_special_tokens=True)
            rollout, scores = (prompt_ids, prompt_mask, completion_ids, mask), {}
            logprobs = logprobs_of(policy, *rollout)
            with as_reference(reference, adapter, device):
                kl = kl_estimate(logprobs, logprobs_of(reference, *rollout)).sum(1)  # (B,)
            lengths = mask.sum(1)  # (B,)
            metrics |= {"eval_kl": kl.mean(), "eval_length": lengths.float().mean()}
            if gold:
                scores["gold"] = gold(sample_rows, texts)  # (B,)
                metrics["eval_gold"] = scores["gold"].nanmean()
            if not state["first"]:  # of the reference, which the policy is at step 0
                state["first"] = {"texts": texts, "lengths": lengths.tolist(),
                                  "scores": {k: v.tolist() for k, v in scores.items()}}
            first = state["first"]
            if gold:
                wins = win_rates(scores["gold"] - torch.tensor(first["scores"]["gold"], device=device),
                                 lengths - torch.tensor(first["lengths"], device=device))
                metrics |= {f"eval_{k}": v for k, v in wins.items()}
        metrics = {k: v if k == "step" else round(float(v), 4) for k, v in metrics.items()}
        metrics = {k: v for k, v in metrics.items() if v == v}  # JSON has no nan: of no row at all
        append("metrics.jsonl", metrics)
        tqdm.write(eval_line(metrics))
        for i, (row, text) in enumerate(zip(sample_rows, texts) if args.eval_prompts else ()):
            values = {k: round(v[i].item(), 4) for k, v in scores.items()}
            append("samples.jsonl", {"step": step, "prompt": row["prompt"], "completion": text,
                                     "reference": first["texts"][i],
                                     **{k: v for k, v in values.items() if v == v}})
            if i < 4:
                asked = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
                tqdm.write(f"      {values.get('gold', 0):6.2f}  {shorten(asked, 40)} -> {shorten(text, 80)}")

    def save(name: str):
        """What from_pretrained loads, and in resume/ what it takes to go on."""
        with whole_folder(run_dir / name) as folder:
            save_model(adapter or policy, policy.config, tokenizer, folder)
            save_state(folder, trained, state)
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

        # --- 5. update
        policy.train()
        batch = order[step - 1]
        metrics = {"step": step}
        for rows in micro([pairs[i] for i in batch]):
            numbers = [batch[i] for i in rows]
            loss, part = losses([pairs[i] for i in numbers], ref_logprobs[numbers])
            (loss.sum() / len(batch)).backward()
            for k, v in part.items():
                metrics[k] = metrics.get(k, 0.0) + v.sum().item() / len(batch)
        grad_norm = clip_gradients(policy, args.max_grad_norm)
        if not torch.isfinite(grad_norm):
            with torch.no_grad():
                loss, _ = losses([pairs[i] for i in batch], ref_logprobs[batch])
            bad = [pairs[i][0] for i, n in zip(batch, loss) if not n.isfinite()]
            not_finite(step, tokenizer.batch_decode(bad), len(batch))
        metrics = {k: v if k == "step" else total(v) for k, v in metrics.items()}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        # --- 6. log
        seconds = time.time() - start
        metrics |= {"grad_norm": grad_norm.item(), "lr": schedule.get_last_lr()[0], "seconds": seconds,
                    "tokens_per_second": sum(len(a) + len(b) for _, a, b in map(pairs.__getitem__, batch))
                    / seconds}
        metrics = {k: v if k == "step" else float(f"{float(v):.5g}") for k, v in metrics.items()}
        append("metrics.jsonl", metrics)
        shown = {k: f"{metrics[k]:.3g}" for k in ("loss", "accuracy", "margin", "logprob_chosen", "seconds")}
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
    print(f"the policy is in {run_dir / 'checkpoint'}")


def shorten(text: str, width: int) -> str:
    text = " / ".join(text.split("\n"))
    return text if len(text) <= width else text[:width - 1] + "…"


if __name__ == "__main__":
    command_line(main, Args, __doc__)
