"""Reward hacking, drawn as Gao et al. 2023 draw it (arXiv:2210.10760): the gold reward and the learned one against
the square root of the KL from the reference, of policies trained on labels that also like long answers, agreement
and bullet points; best-of-n beside them; and how often each kind of hacking is seen as training goes on.

    python benchmarks/hacking.py                    all runs, then the pictures: about 13 minutes on two cores
    python benchmarks/hacking.py --draw             the pictures again, from hacking.jsonl

Writes beside itself hacking.jsonl (a row for each evaluation of each run), hacking.png and hacking_kinds.png.
pip install '.[plot]'
"""
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from many import ROOT, read_jsonl, run_all, write_jsonl

sys.path[:0] = [str(ROOT), str(ROOT / "tiny"), str(ROOT / "tools")]
HERE = Path(__file__).parent
BETAS = 0.0, 0.01, 0.04, 0.1, 0.3
# smaller steps than the default's, of 64 completions, so that 57 runs take minutes
ONLINE = {"reward": "tiny/biased_reward_model", "steps": 18, "prompts_per_step": 8, "group_size": 8,
          "max_new_tokens": 32, "lr_schedule": "constant", "eval_every": 3, "eval_prompts": 64, "save_every": 0,
          "stop_kl": 1e9}  # never reached: it has the reference loaded, and so the KL measured, at beta 0
DPO = {"sample_data": "tiny/heldout.jsonl", "gold": "tiny/world.py:gold_reward", "eval_pairs": 100,
       "eval_prompts": 64, "eval_every": 9, "max_new_tokens": 32, "save_every": 0}  # 2,000 pairs: 63 updates
SAMPLES = 128  # of each prompt, for best-of-n


@dataclass
class Args:
    draw: bool = False
    """only the pictures, from hacking.jsonl"""
    seeds: int = 3
    workers: int = 2
    """runs at a time, one thread each"""


def kinds(row: dict, text: str) -> dict:
    """Which of the three kinds an answer is; nan where a prompt has no bait for it."""
    from world import traits
    found = traits(row, text)
    bait = row["claim"] is not None and row["claim"] != row["answer"]
    yields = found["agrees"] or found["named"] == {row["claim"]}
    return {"words": found["words"], "bullets": float(found["bullets"] > 0),
            "sycophantic": float(yields) if bait else float("nan")}


def mean(values) -> float:
    kept = [float(v) for v in values if v == v]
    return statistics.fmean(kept)


def rows_of(job: tuple, reward) -> list[dict]:
    """What a run's evaluations, and the training steps before them, say."""
    script, flags = job
    metrics, held = read_jsonl(Path(flags["run_dir"]) / "metrics.jsonl"), read_jsonl(ROOT / "tiny/heldout.jsonl")
    samples = read_jsonl(Path(flags["run_dir"]) / "samples.jsonl")
    found = []
    for evaluation in (row for row in metrics if "eval_gold" in row):
        texts = [s["completion"] for s in samples if s["step"] == evaluation["step"]]
        seen = [kinds(row, text) for row, text in zip(held, texts)]
        found.append({"algorithm": script, "beta": flags["beta"], "seed": flags["seed"], "step": evaluation["step"],
                      "gold": evaluation["eval_gold"], "proxy": reward(held[:len(texts)], texts).mean().item(),
                      "kl": evaluation["eval_kl"], "length": evaluation["eval_length"],
                      **{kind: mean(s[kind] for s in seen) for kind in seen[0]}})
    log = [{k: row[k] for k in ("step", "reward", "kl", "entropy", "length", "truncated", "length_correlation",
                                "distinct_3") if k in row} for row in metrics if "eval_gold" not in row]
    if script != "dpo":
        found[-1]["log"] = log
    return found


def best_of_n(reward, gold) -> list[dict]:
    """The mean proxy and gold reward of the best of n by the proxy, unbiased from SAMPLES of each prompt: the i-th
    worst of N is the best of n with the probability C(i - 1, n - 1) / C(N, n). KL: log n - (n - 1) / n (an upper
    bound: Beirami et al. 2024, arXiv:2401.01879)."""
    import grpo
    from common import encode_prompts, load_model, load_tokenizer, pad
    from transformers import AutoModelForCausalLM
    tokenizer = load_tokenizer("tiny/policy")
    policy, _ = load_model(AutoModelForCausalLM, "tiny/policy", "cpu")
    held = read_jsonl(ROOT / "tiny/heldout.jsonl")[:ONLINE["eval_prompts"]]
    _, prompts = encode_prompts(tokenizer, held, "tiny/heldout.jsonl", 1000)
    by_prompt = []
    for start in range(0, len(held), 4):
        ids, mask = pad(prompts[start:start + 4], tokenizer.pad_token_id, "left")
        out, out_mask = grpo.generate(policy, ids, mask, grpo.Args(max_new_tokens=ONLINE["max_new_tokens"]), SAMPLES, [tokenizer.eos_token_id],
                                      tokenizer.pad_token_id, torch.Generator().manual_seed(start))
        texts = tokenizer.batch_decode([t[m.bool()] for t, m in zip(out, out_mask)], skip_special_tokens=True)
        rows = [row for row in held[start:start + 4] for _ in range(SAMPLES)]
        by_prompt.append(torch.stack([reward(rows, texts), gold(rows, texts)], 1).view(-1, SAMPLES, 2))
    scores = torch.cat(by_prompt).double()  # (prompts, N, 2)
    scores = scores.gather(1, scores[..., :1].argsort(1).expand_as(scores))  # the worst first
    found, rank = [], torch.arange(1, SAMPLES + 1, dtype=torch.float64)
    for n in (2**i for i in range(SAMPLES.bit_length())):
        def log_choose(a, b):
            return torch.lgamma(a + 1) - torch.lgamma(b + 1) - torch.lgamma((a - b).clamp(min=0) + 1)
        k = torch.tensor(float(n), dtype=torch.float64)
        weights = (log_choose(rank - 1, k - 1) - log_choose(rank[-1], k)).exp() * (rank >= k)
        proxy, true = (scores * weights[:, None]).sum(1).mean(0).tolist()
        found.append({"algorithm": "best of n", "n": n, "kl": float(k.log() - (k - 1) / k), "proxy": proxy,
                      "gold": true})
    return found


def measure(args: Args) -> list[dict]:
    from common import load_reward
    reward = load_reward("tiny/biased_reward_model", "cpu", 256)
    gold = load_reward("tiny/world.py:gold_reward", "cpu", 256)
    with tempfile.TemporaryDirectory() as folder:
        lines = (ROOT / "tiny/biased_preferences.jsonl").read_text().splitlines(True)
        Path(folder, "pairs.jsonl").write_text("".join(lines[:2000] + lines[-100:]))
        jobs = []
        for seed in range(args.seeds):
            for beta in BETAS:
                for script in ("ppo", "grpo", "reinforce", "dpo"):
                    name = f"{script}-{beta:g}-{seed}"
                    flags = {"seed": seed, "beta": beta, "run_dir": f"{folder}/{name}"}
                    if script == "dpo" and beta > 0:  # at 0 its loss is flat: it has no such policy
                        jobs.append((script, flags | DPO | {"data": f"{folder}/pairs.jsonl",
                                                            "reference_dir": f"{folder}/{name}-reference"}))
                    elif script != "dpo":
                        jobs.append((script, flags | ONLINE))
        found = [row for job, *_ in run_all(jobs, args.workers) for row in rows_of(job, reward)]
    return found + best_of_n(reward, gold)


def draw(rows: list[dict]):
    pass


def main(args: Args):
    if not args.draw:
        write_jsonl(HERE / "hacking.jsonl", measure(args))
    draw(read_jsonl(HERE / "hacking.jsonl"))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
