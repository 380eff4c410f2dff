"""What the parity tests share: the updates that one of the scripts makes, and TRL's loss and
gradients with the same weights on the same batch.

Ours is the script's own main(), with a given rollout in place of its sampling. Theirs is TRL's own
trainer: its methods are called and its variables are read, and nothing of it is copied.
"""
import json
import os
from dataclasses import dataclass

import pytest

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # its PPO and CPO are experimental
REASON = "parity with TRL: pip install 'plain-rlhf[parity]'"
trl = pytest.importorskip("trl", minversion="1.12", reason=REASON)

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling
from common import pad, read_prompts
from runtime import Run

PROMPTS, GROUP, LENGTH = 4, 4, 9  # a rollout: prompts, completions per prompt, max_new_tokens
# later versions of TRL compute some of it in float32
TOLERANCE = 1e-5 if trl.__version__.startswith("1.12.") else 5e-4
OURS = dict(device="cpu", dtype="float32", lr_schedule="constant_with_warmup", warmup=0,
            max_grad_norm=1e9)
THEIRS = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
              disable_tqdm=True, save_strategy="no")
worst = {}  # what was compared -> its largest relative errors: of the loss or tensor, of gradients


@dataclass
class Update:
    """One update: the losses that were differentiated, the weights before it, and the
    gradients."""
    losses: list[float]
    weights: list[torch.Tensor]
    grads: list[torch.Tensor]


@dataclass
class Rollout:
    """For each prompt: its token ids, its completions' token ids, and their rewards or None."""
    prompts: list[list[int]]
    completions: list[list[list[int]]]
    rewards: list[list[float | None]]


# --- models and data

def tokenizer():
    return AutoTokenizer.from_pretrained("tiny/policy")


def policy():
    return AutoModelForCausalLM.from_pretrained("tiny/policy", dtype=torch.float64)


def reference(model=None):
    """A model with noise added to its weights, so that it differs from the policy."""
    model = policy() if model is None else model
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model.eval().requires_grad_(False)


def prompts(n: int = PROMPTS) -> list[dict]:
    """Rows with prompts of different lengths, numbered."""
    rows = read_prompts("tiny/prompts.jsonl")[:n]
    return [{"prompt": row["prompt"], "number": i} for i, row in enumerate(rows)]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def normal(seed: int) -> list[list[float]]:
    """Random rewards of a rollout."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(PROMPTS, GROUP, generator=generator).tolist()


# --- ours

def watch(patch) -> list[Update]:
    """The updates that a script is going to make, one for each call of an optimizer."""
    updates, losses, backward = [], [], torch.Tensor.backward

    def recorded(loss, *args, **kwargs):
        losses.append(loss.item())
        backward(loss, *args, **kwargs)

    def unclipped(parameters, max_norm):
        parameters = list(parameters)
        updates.append(Update(losses.copy(), [p.detach().clone() for p in parameters],
                              [p.grad.clone() for p in parameters]))
        losses.clear()
        return torch.ones(())

    patch.setattr(torch.Tensor, "backward", recorded)
    patch.setattr(torch.nn.utils, "clip_grad_norm_", unclipped)
    return updates


def in_float64(load_model):
    """modeling.load_model in float64, with noise added to the second causal LM, the reference."""
    causal = 0

    def load(auto_class, *args, **kwargs):
        nonlocal causal
        model, missing = load_model(auto_class, *args, **kwargs)
        causal += auto_class is AutoModelForCausalLM
        second = auto_class is AutoModelForCausalLM and causal == 2
        return reference(model.double()) if second else model.double(), missing
    return load


def run(script, tmp_path, patches=(), **args) -> list[Update]:
    """The updates of a run of a script in float64. During it, each of the patches (object, name,
    value) is in place."""
    with pytest.MonkeyPatch.context() as patch:
        updates = watch(patch)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        load_model = in_float64(modeling.load_model)
        patch.setattr(modeling, "load_model", load_model)
        if hasattr(script, "load_model"):
            patch.setattr(script, "load_model", load_model)
        for what in patches:
            patch.setattr(*what)
        script.main(script.Args(**(OURS | dict(
            run_dir=str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")) | args)))
    return updates


# patches: each update as one micro-batch; prompts and completions in order
UNDIVIDED = Run, "micro_batches", lambda run, lengths, rows=None: [
    torch.arange(len(lengths)) if rows is None else rows]
IN_ORDER = torch, "randperm", lambda n, **kwargs: torch.arange(n)


def run_on(script, tmp_path, rollout: Rollout, patches=(), **args) -> list[Update]:
    """The updates of one step of an on-policy script on a rollout."""
    size = len(rollout.completions[0])
    numbers = {tuple(ids): i for i, ids in enumerate(rollout.prompts)}

    def generate(model, prompt_ids, prompt_mask, group_size, max_new_tokens, temperature, eos_ids,
                 generator=None):
        assert group_size == size
        completions = [c for ids, m in zip(prompt_ids, prompt_mask)
                       for c in rollout.completions[numbers[tuple(ids[m.bool()].tolist())]]]
        ids, mask = pad(completions, "right")
        missing = (0, max_new_tokens - ids.shape[1])
        ids, mask = (torch.nn.functional.pad(x, missing) for x in (ids, mask))
        return ids, mask, torch.zeros(ids.shape)  # it does not know the log-probs

    def reward(rows, texts):
        values = [rollout.rewards[row["number"]][i % size] for i, row in enumerate(rows)]
        return torch.tensor([float("nan") if v is None else v for v in values])

    data = write(tmp_path / "prompts.jsonl", prompts(len(numbers)))
    return run(script, tmp_path, [(script, "generate", generate), *patches,
                                  (Run, "load_reward", lambda run, name, rows: reward)],
               data=data, eval_prompts=0, steps=1, prompts_per_step=len(numbers),
               group_size=size, max_new_tokens=LENGTH, **args)


# --- theirs

def score(prompts, completions, score, **columns):
    """The reward function of TRL's trainers: the column `score` of the rows."""
    return score


def trainer_of(name: str, tmp_path, rewards=score, **args):
    """TRL's GRPO or RLOO trainer of the tiny policy."""
    config, trainer = getattr(trl, name + "Config"), getattr(trl, name + "Trainer")
    args = THEIRS | dict(output_dir=str(tmp_path / "trl"), num_generations=GROUP,
                         max_completion_length=LENGTH,
                         per_device_train_batch_size=PROMPTS * GROUP) | args
    peer = trainer(model=policy(), args=config(**args), reward_funcs=rewards,
                   train_dataset=Dataset.from_list(prompts()), processing_class=tokenizer())
    if peer.ref_model is not None:
        reference(peer.ref_model.double())
    return peer


def sampled(trainer, rewards, **columns) -> tuple[Rollout, dict]:
    """A rollout that TRL's GRPO or RLOO trainer samples and scores, and its own batch of that.
    Columns, like rewards, have a value for each completion of each prompt."""
    torch.manual_seed(0)
    rows = [row | {name: groups[i][j] for name, groups in (columns | {"score": rewards}).items()}
            for i, row in enumerate(prompts()) for j in range(len(rewards[i]))]
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    inputs = trainer._generate_and_score_completions(rows)
    ids = [[row[m.bool()].tolist() for row, m in zip(inputs[k + "_ids"], inputs[k + "_mask"])]
           for k in ("prompt", "completion")]
    groups = [ids[1][i:i + GROUP] for i in range(0, len(ids[1]), GROUP)]
    return Rollout(ids[0][::GROUP], groups, rewards), inputs


def theirs(trainer, weights, *batches) -> tuple[float, list[torch.Tensor]]:
    """TRL's loss and gradients with some weights, summed over micro-batches."""
    with torch.no_grad():
        for parameter, weight in zip(trainer.model.parameters(), weights, strict=True):
            parameter.copy_(weight)
    trainer.model.zero_grad()
    total = 0.0
    for inputs in batches:
        loss = trainer.compute_loss(trainer.model, dict(inputs))
        loss.backward()
        total += loss.item()
    return total, [p.grad.clone() for p in trainer.model.parameters()]


# --- comparison

def error(grads, peers) -> float:
    """The largest relative error of a parameter's gradient: the norm of the difference divided by
    the norm."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(grads, peers, strict=True))


def agree(what: str, update: Update, loss: float | None, grads, factor: float = 1.0):
    """Asserts that an update of ours, times factor, has TRL's loss (None: they differ by design)
    and gradients."""
    # a loss near 0 is a difference of larger numbers: its error is then relative to 0.1
    of_loss = None if loss is None else (
        abs(sum(update.losses) * factor - loss) / max(abs(loss), 0.1))
    note(what, of_loss, error([g * factor for g in update.grads], grads))


def same(what: str, ours, theirs):
    """Asserts that a tensor of ours is TRL's."""
    note(what, error([ours.double()], [theirs.double()]), None)


def note(what: str, *errors: float | None):
    """Keeps the largest errors, of a loss or tensor and of gradients, and asserts that they are
    within the tolerance."""
    before = worst.get(what, (None, None))
    worst[what] = tuple(a if b is None else max(a, b) for a, b in zip(errors, before))
    assert all(e is None or e < TOLERANCE for e in errors), (what, *errors)
