"""dpo.py against TRL's DPOTrainer and, for SimPO, CPOTrainer: the loss and gradients of three
updates, starting from the text of the pairs."""
import json

import pytest

pytest.importorskip("trl", reason="parity with TRL: pip install 'plain-rlhf[parity]'")
from parity.peer import (THEIRS, Dataset, agree, error, policy, reference, run, theirs, tokenizer,
                         write)
from trl import DPOConfig, DPOTrainer

import dpo

PAIRS = 6
E = 0.1  # label smoothing


def pairs(tokens: int = 0) -> list[dict]:
    """PAIRS pairs of the tiny world, with answers of this many tokens (0: any)."""
    rows = [json.loads(line) for line in open("tiny/preferences.jsonl")][:1000]
    if tokens:
        words = tokenizer()
        rows = [row for row in rows if row["chosen"] != row["rejected"] and all(
            len(words(row[side]).input_ids) == tokens for side in ("chosen", "rejected"))]
    assert len(rows) >= PAIRS
    return [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows[:PAIRS]]


def as_messages(row: dict) -> dict:
    return {k: v if k == "prompt" else [{"role": "assistant", "content": v}]
            for k, v in row.items()}


def ours(tmp_path, rows, **args):
    data = write(tmp_path / "pairs.jsonl", rows)
    return run(dpo, tmp_path, **(dict(
        data=data, eval_data=data, eval_prompts=0, pairs_per_step=PAIRS, epochs=3,
        lr=1e-3, beta=0.3) | args))


def batches_of(trainer, at_once: int = PAIRS):
    """TRL's own batches of its dataset, in order."""
    rows = list(trainer.train_dataset)
    return [trainer.data_collator(rows[i:i + at_once]) for i in range(0, PAIRS, at_once)]


def trainer_on(tmp_path, rows, **args):
    config = DPOConfig(**(THEIRS | dict(output_dir=str(tmp_path / "trl"), max_length=None,
                                        beta=0.3) | args))
    trainer = DPOTrainer(model=policy(), ref_model=reference(), args=config,
                         processing_class=tokenizer(),
                         train_dataset=Dataset.from_list([as_messages(row) for row in rows]))
    trainer.model.train()
    return trainer


# name -> our arguments, TRL's
LOSSES = {
    "sigmoid": ({}, dict(loss_type=["sigmoid"])),
    "hinge": (dict(loss_type="hinge"), dict(loss_type=["hinge"])),
    "ipo, means": (dict(loss_type="ipo", length_normalize=True), dict(loss_type=["ipo"])),
    "apo_zero": (dict(loss_type="apo_zero"), dict(loss_type=["apo_zero"])),
    "apo_down": (dict(loss_type="apo_down"), dict(loss_type=["apo_down"])),
    "sigmoid, means": (dict(length_normalize=True), dict(loss_type=["sigmoid_norm"])),
    "robust": (dict(robust=True, label_smoothing=E),
               dict(loss_type=["robust"], label_smoothing=E)),
    # TRL lacks cDPO, (1 - e) L(z) + e L(-z), but has its parts: sigmoid is L(z), and robust is
    # ((1 - e) L(z) - e L(-z)) / (1 - 2 e)
    "label smoothing": (dict(label_smoothing=E), dict(
        loss_type=["sigmoid", "robust"], loss_weights=[2 * (1 - E), -(1 - 2 * E)],
        label_smoothing=E)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients(tmp_path, name):
    mine, his = LOSSES[name]
    rows = pairs()
    trainer = trainer_on(tmp_path, rows, **his)
    updates = ours(tmp_path, rows, **mine)
    assert len(updates) == 3
    for update in updates:
        agree(f"dpo.py {name}", update, *theirs(trainer, update.weights, *batches_of(trainer)))


def test_simpo(tmp_path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    rows = pairs()
    config = CPOConfig(output_dir=str(tmp_path / "trl"), loss_type="simpo", cpo_alpha=0.0,
                       beta=2.0, simpo_gamma=0.8, max_length=None, **THEIRS)
    trainer = CPOTrainer(model=policy(), args=config, processing_class=tokenizer(),
                         train_dataset=Dataset.from_list([as_messages(row) for row in rows]))
    # our margin is in nats and gets multiplied by beta, TRL's gamma is that product
    updates = ours(tmp_path, rows, loss_type="simpo", beta=2.0, simpo_margin=0.4)
    assert len(updates) == 3
    for update in updates:
        agree("dpo.py simpo", update, *theirs(trainer, update.weights, *batches_of(trainer)))


def test_differs_our_ipo_has_sums(tmp_path):
    # Azar et al. 2023, eq. 17: (h_w - h_l - 1 / (2 tau))^2, where h is the log-ratio of the whole
    # answer, a sum over its tokens. TRL takes the mean; its comment says that the paper does not
    # mention this and that its authors confirmed it. With answers of n tokens, TRL's loss with
    # beta is the paper's with tau = beta / n, divided by n^2.
    n = 6
    rows = pairs(n - 1)  # and the end of sequence
    trainer = trainer_on(tmp_path, rows, loss_type=["ipo"])
    batches = batches_of(trainer)
    for update in ours(tmp_path, rows, loss_type="ipo", beta=0.3 / n):
        agree("dpo.py ipo, equal lengths", update, *theirs(trainer, update.weights, *batches),
              factor=1 / n ** 2)
    for update in ours(tmp_path, rows, loss_type="ipo"):
        assert error(update.grads, theirs(trainer, update.weights, *batches)[1]) > 1


def test_differs_we_do_not_ignore_label_smoothing(tmp_path):
    # cDPO (Mitchell 2023) is the sigmoid loss with label smoothing. TRL's sigmoid accepts the
    # argument and ignores it: it is our loss without.
    rows = pairs()
    trainer = trainer_on(tmp_path, rows, loss_type=["sigmoid"], label_smoothing=E)
    batches = batches_of(trainer)
    for update in ours(tmp_path, rows):
        agree("dpo.py sigmoid", update, *theirs(trainer, update.weights, *batches))
    update = ours(tmp_path, rows, label_smoothing=E)[0]
    assert error(update.grads, theirs(trainer, update.weights, *batches)[1]) > 0.01


def test_differs_our_sft_term_is_a_mean_over_answers(tmp_path):
    # Pang et al. 2024, eq. 1: each answer's negative log-likelihood is divided by its own length.
    # TRL takes the mean over the batch's tokens, so that long answers weigh more. With one pair per
    # batch both agree.
    rows = pairs()
    trainer = trainer_on(tmp_path, rows, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    one_by_one, pooled = batches_of(trainer, 1), batches_of(trainer)
    updates = ours(tmp_path, rows, sft_weight=0.5)
    for update in updates:
        agree("dpo.py sigmoid and sft", update, *theirs(trainer, update.weights, *one_by_one),
              factor=PAIRS)
    assert error(updates[0].grads, theirs(trainer, updates[0].weights, *pooled)[1]) > 0.01
