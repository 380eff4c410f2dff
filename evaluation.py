"""Evaluation on held-out prompts, win rates and pass@k, and diagnostics of a rollout."""
import json
import math

import torch
from common import (Rollout, as_messages, eos_token_ids, flat_groups, kl_estimate, pad,
                    rollout_logprobs)
from flags import json_lines, read_json, writable, write_whole
from modeling import UserError, cache_works, generate_by_library
from runtime import gather_objects, reference_mode


class Evaluator:
    """Samples completions of the held-out prompts, always with the same seed, scores them, and
    compares them with the reference's.

    reward: None if there is none. sample: the script's function of that name. temperature: of
    the trained log-probs, by which the KL is measured; samples are drawn at --temperature.
    """

    def __init__(self, run, rows: list[dict], reward, sample, tokenizer, temperature=None):
        self.temperature = temperature or run.args.temperature
        self.run, self.rows, self.sample, self.tokenizer = run, rows, sample, tokenizer
        self.rewards = {"reward": reward} if reward else {}
        if run.args.gold:
            self.rewards["gold"] = run.load_reward(run.args.gold, rows)
        self.baseline = []  # the reference's completions, sampled once
        path = run.dir / "baseline.jsonl"
        if run.args.resume and path.exists():
            try:
                lines = path.read_text("utf-8").splitlines()
                self.baseline = [json.loads(line) for line in lines]
                before = [row["prompt"] for row in self.baseline]
            except (ValueError, TypeError, KeyError):
                raise UserError(f"--resume {run.dir}: {path} has a line that no run has "
                                "written")
            if before != [row["prompt"] for row in rows for _ in range(run.args.eval_samples)]:
                raise UserError(f"--resume {run.dir}: other held-out prompts than before: "
                                "keep --eval-data, --eval-prompts and --eval-samples")
            saved = read_json(run.dir / "args.json", f"--resume {run.dir}")
            for name in ("gold", "reward", "reward_weights", "reward_combine", "model",
                         "reference", "max_new_tokens", "temperature"):
                value = writable(getattr(run.args, name, None))
                before = saved.get(name, value)
                if value not in (before, [before]):  # older runs have one reward, not a list
                    if getattr(run.args, "renew_reference_every", 0):
                        raise UserError(f"--{name.replace('_', '-')}: cannot change on "
                                        "--resume where the reference was renewed")
                    print(f"--{name.replace('_', '-')} has changed: the reference's "
                          "completions so far are dropped, and sampled again (unless "
                          "no reference is loaded)")
                    self.baseline, run.outdated = [], [path]

    def __call__(self, step: int, policy, reference, metrics=()):
        """Logs an evaluation, with the script's own metrics of it."""
        run, n = self.run, self.run.args.eval_samples
        if not self.rows:
            if metrics:
                run.log(step, metrics, "eval_")
            return
        samples = self.samples(policy, reference)
        if not self.baseline:  # before the first step the policy is the reference
            other = run.args.reference or step > 0
            if reference is not None and other:
                with reference_mode(reference):
                    self.baseline = self.samples(reference)
            elif not other:
                self.baseline = samples
            if run.rank == 0 and self.baseline:
                write_whole(run.dir / "baseline.jsonl", json_lines(self.baseline))
        columns = {k: torch.tensor([s[k] for s in samples], dtype=torch.float64)
                   for k in samples[0] if k not in ("prompt", "completion")}
        means = {k: column.nanmean() for k, column in columns.items()}
        truncated = means.pop("truncated")
        metrics = means | dict(metrics)
        if self.baseline and self.rewards:
            judge = list(self.rewards)[-1]  # gold, if there is one
            theirs, lengths = (torch.tensor([row.get(k, math.nan) for row in self.baseline],
                                            dtype=torch.float64) for k in (judge, "length"))
            rates = win_rates(columns[judge] - theirs, columns["length"] - lengths, n)
            by = "" if judge == "gold" else "_by_reward"  # by what is trained: no evidence
            metrics |= {k.replace("win_rate", "win_rate" + by): v for k, v in rates.items()}
            metrics[f"reference_{judge}"] = theirs.nanmean()
        if "reward" in columns:
            metrics |= pass_rates(columns["reward"], n)
        run.log(step, metrics | {"truncated": truncated}, "eval_")
        rows = [{"step": step, **row} for row in samples]
        for row, base in zip(rows, self.baseline):
            row["baseline"] = base["completion"]
        run.write("samples.jsonl", rows)
        if run.rank == 0:
            for row in rows[:4 * n:n]:
                prompt = as_messages(row["prompt"])[-1]["content"]  # the user's last turn
                score = row.get("reward", row.get("gold", math.nan))
                print("      " + (f"{score:6.2f}  " if math.isfinite(score) else "")
                      + f"{shorten(prompt, 40)} -> {shorten(row['completion'], 80)}")

    def samples(self, model, reference=None) -> list[dict]:
        """A row for each completion of each held-out prompt; every process does its share."""
        run, rows, n = self.run, self.run.share(self.rows), self.run.args.eval_samples
        rollout = self.sample(model, rows, n, run, self.tokenizer, run.generator(0))
        repeated = [row for row in rows for _ in range(n)]
        columns = {}
        for name, reward in self.rewards.items():
            scores = reward(repeated, rollout.texts)
            columns[name] = getattr(scores, "raw", scores)
            parts = getattr(scores, "parts", {})
            columns |= {f"{name}/{part}": values for part, values in parts.items()}
        if reference is not None:
            drawn = rollout  # the KL is a mean over samples of the distributions themselves
            if self.temperature != run.args.temperature:
                drawn = self.sample(model, rows, n, run, self.tokenizer, run.generator(0),
                                    self.temperature)
            groups = list(run.micro_batches(drawn.lengths))
            with run.autocast():
                logprobs, _ = rollout_logprobs(model, drawn, groups, self.temperature)
            with run.autocast(), reference_mode(reference):
                ref_logprobs, _ = rollout_logprobs(reference, drawn, groups, self.temperature)
            columns["kl"] = kl_estimate(logprobs, ref_logprobs).sum(1)
        columns |= {"length": rollout.mask.sum(1), "truncated": rollout.truncated.float()}
        values = zip(*(column.tolist() for column in columns.values()))
        return gather_objects([
            {"prompt": row["prompt"], "completion": text,
             **{k: float(f"{v:.6g}") for k, v in zip(columns, value)}}
            for row, text, value in zip(repeated, rollout.texts, values)])


@torch.no_grad()
def sample_with_generate(model, rows: list[dict], tokenizer, max_new_tokens: int,
                         temperature: float = 1.0, batch_size: int = 64) -> Rollout:
    """One completion for the `prompt_ids` of each row by transformers' generate, for scripts
    that do not sample in training, and for models without a cache like attention's: these get
    prompts of one length at a time, since recurrent layers may read padding. Temperature 0
    decodes greedily."""
    eos_ids = eos_token_ids(model, tokenizer, model.device)
    prompt_ids, prompt_mask = pad([row["prompt_ids"] for row in rows], "left", model.device)
    completion_ids = prompt_ids.new_zeros(len(rows), max_new_tokens)
    model.eval()
    lengths = prompt_mask.sum(1)
    kinds = torch.zeros_like(lengths) if cache_works(model) else lengths
    for part in [part for kind in kinds.unique()
                 for part in (kinds == kind).nonzero()[:, 0].split(batch_size)]:
        P = lengths[part].max()
        ids = generate_by_library(
            model, prompt_ids[part, -P:], prompt_mask[part, -P:], do_sample=temperature > 0,
            top_k=0, top_p=1.0, temperature=temperature or 1.0, max_new_tokens=max_new_tokens,
            eos_token_id=eos_ids.tolist() or None)[:, P:]
        completion_ids[part, :ids.shape[1]] = ids
    ended = torch.isin(completion_ids, eos_ids).long()
    mask = (ended.cumsum(1) - ended == 0).long()  # up to and including the first end
    longest = mask.sum(1).max()
    return Rollout(prompt_ids, prompt_mask, completion_ids[:, :longest], mask[:, :longest],
                   tokenizer, eos_ids)


# --- win rates and pass@k

def wilson_interval(mean: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a rate observed in n trials (Wilson 1927)."""
    center = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def length_controlled_win_rate(wins, longer, z: float = 1.96) -> tuple[float, float, float]:
    """Win rate at equal length, and its interval (Dubois et al. 2024, arXiv:2404.04475, sec.
    3).

    wins: (B,), 1, 0, or 0.5 for a tie. longer: (B,), how many tokens longer. Fits P(win) =
    sigmoid(a + b tanh(longer / std)) by Newton's method with a normal prior of std 3 on a and
    b; sigmoid(a) is the rate. Without their term for a prompt's difficulty (it takes many
    models to fit).
    """
    spread = longer.std(correction=0).clamp(min=1e-6)
    x = torch.stack([torch.ones_like(longer), (longer / spread).tanh()], 1)  # (B, 2)
    prior, weights = torch.eye(2, dtype=x.dtype) / 9, x.new_zeros(2)
    for _ in range(20):
        p = (x @ weights).sigmoid()  # (B,)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + prior  # (2, 2)
        weights = weights + torch.linalg.solve(hessian, x.T @ (wins - p) - prior @ weights)
    error = z * hessian.inverse()[0, 0].sqrt()
    return tuple((weights[0] + e).sigmoid().item() for e in (0.0, -error, error))


def win_rates(ahead, longer, samples: int = 1) -> dict[str, float]:
    """How often a completion is better than the reference's, ties counting half, and the same
    at equal length, with 95 % intervals over prompts.

    ahead, longer: float64 (B,), how much better (nan: left out) and how many tokens longer.
    samples: completions per prompt, one after the other.
    """
    wins = torch.where(ahead.isnan(), math.nan, (ahead.sign() + 1) / 2)
    per_prompt = wins.view(-1, samples).nanmean(1)
    per_prompt, valid = per_prompt[~per_prompt.isnan()], ~wins.isnan()
    if len(per_prompt) == 0:
        return {}
    rate = per_prompt.mean().item()
    low, high = wilson_interval(rate, len(per_prompt))
    # the samples of a prompt are not independent: as wide as if they were one
    lc, lc_low, lc_high = length_controlled_win_rate(wins[valid], longer[valid],
                                                     1.96 * samples**0.5)
    return {"win_rate": rate, "win_rate_low": low, "win_rate_high": high, "lc_win_rate": lc,
            "lc_win_rate_low": lc_low, "lc_win_rate_high": lc_high}


def pass_at_k(correct, k: int):
    """Unbiased P(at least one of k samples is correct), (prompts,), from n >= k samples each
    (Chen et al. 2021, arXiv:2107.03374, eq. 1). correct: (prompts, n), 0 or 1."""
    n, wrong = correct.shape[1], (1 - correct).sum(1)
    none = torch.ones_like(wrong, dtype=torch.float64)
    for i in range(k):  # C(wrong, k) / C(n, k), factor by factor
        none = none * (wrong - i).clamp(min=0) / (n - i)
    return 1 - none


def pass_rates(rewards, samples: int) -> dict[str, float]:
    """pass@1, 2, 4, ... for rewards (B,) that are all 0 or 1; otherwise nothing."""
    if samples < 2 or not ((rewards == 0) | (rewards == 1)).all():
        return {}
    correct, ks = rewards.view(-1, samples), [2**i for i in range(samples.bit_length())]
    return {f"pass_at_{k}": pass_at_k(correct, k).mean().item() for k in ks}


# --- diagnostics

def rollout_metrics(rollout: Rollout, scores, logprobs, entropy, ref_logprobs,
                    group_size: int) -> dict:
    """What every on-policy script logs about the completions of all processes.

    scores: (B,), nan where there is none; for its parts see common.combine_rewards. logprobs,
    entropy, ref_logprobs: (B, T); without a reference, ref_logprobs is logprobs.
    """
    lengths = rollout.mask.sum(1)  # (B,)
    gap = ((logprobs - rollout.sampler_logprobs) * rollout.mask).abs()  # (B, T)
    parts = getattr(scores, "parts", {})
    columns = [scores, getattr(scores, "raw", scores), lengths, rollout.truncated,
               (entropy * rollout.mask).sum(1), gap.sum(1), gap.amax(1),
               distinct_ngrams(rollout.completion_ids, rollout.mask), *parts.values()]
    if ref_logprobs is not logprobs:  # there is a reference
        columns.append(kl_estimate(logprobs, ref_logprobs).sum(1))
    columns = torch.stack([column.double().cpu() for column in columns], 1)  # (B, columns)
    trained, scores, lengths, truncated, entropy, gap, largest, distinct, *rest = torch.tensor(
        gather_objects(columns.tolist()), dtype=torch.float64).T
    if scores.isnan().all():
        raise UserError("--reward: it left out every completion of a step: score some, "
                        "or raise --prompts-per-step")
    flat = flat_groups(trained, group_size)
    highest = scores.view(-1, group_size).nan_to_num(-math.inf).amax(1)
    all_right = flat & ((highest - 1).abs() < 1e-4)
    kl, known = rest[len(parts):], not gap.isnan().any()
    return {"reward": scores.nanmean(), **({"kl": kl[0].mean()} if kl else {}),
            "length": lengths.mean(), "truncated": truncated.mean(),
            "entropy": entropy.sum() / lengths.sum(),
            "reward_std": scores[~scores.isnan()].std(correction=0),
            "length_correlation": length_correlation(scores, lengths, group_size),
            "distinct_3": distinct.nanmean(), "unscored": scores.isnan().double().mean(),
            "zero_std_groups": flat.double().mean(),
            "zero_std_groups_right": all_right.double().mean(),
            **({"sampler_gap": gap.sum() / lengths.sum(),
                "sampler_gap_max": largest.max()} if known else {}),
            **{f"reward/{name}": part.nanmean() for name, part in zip(parts, rest)}}


def length_correlation(scores, lengths, group_size: int) -> float:
    """Pearson correlation of score and length within groups; 0 if one of them is constant.
    Near 1, the reward pays for length."""
    valid = ~scores.isnan()
    lengths = torch.where(valid, lengths.to(scores.dtype), math.nan)
    means = (x.view(-1, group_size).nanmean(1).repeat_interleave(group_size)
             for x in (scores, lengths))
    scores, lengths = ((x - mean)[valid].double() for x, mean in zip((scores, lengths), means))
    return ((scores * lengths).sum() / (scores.norm() * lengths.norm()).clamp(min=1e-9)).item()


def distinct_ngrams(completion_ids, mask, n: int = 3):
    """Fraction of a completion's n-grams that are distinct, (B,); 1 means no repetition, nan
    that it has no n-gram. (In Li et al. 2016, arXiv:1510.03055, it is over a corpus.)"""
    fractions = []
    for ids, length in zip(completion_ids.tolist(), mask.sum(1).tolist()):
        ngrams = [tuple(ids[i:i + n]) for i in range(length - n + 1)]
        fractions.append(len(set(ngrams)) / len(ngrams) if ngrams else math.nan)
    return torch.tensor(fractions)


def shorten(text: str, width: int) -> str:
    text = text.strip().replace("\n", " / ")
    text = "".join(c if c.isprintable() else " " for c in text)  # terminals obey some others
    return text if len(text) <= width else text[:width - 1] + "…"

