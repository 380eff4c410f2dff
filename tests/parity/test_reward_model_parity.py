"""reward_model.py against TRL's RewardTrainer: the loss and gradients of three updates, starting
from the text of the pairs. TRL has no label smoothing to compare with."""
import json

import pytest

pytest.importorskip("trl", reason="parity with TRL: pip install 'plain-rlhf[parity]'")
import torch
from parity.peer import THEIRS, Dataset, agree, run, theirs, tokenizer, write
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

import reward_model

PAIRS = 6
# name -> our arguments, TRL's, and whether the rows have a margin
LOSSES = {
    "pair loss": ({}, {}, False),
    "margin": (dict(margin_column="margin"), {}, True),
    "centering": (dict(centering=0.3), dict(center_rewards_coefficient=0.3), False),
    "margin and centering": (dict(margin_column="margin", centering=0.3),
                             dict(center_rewards_coefficient=0.3), True),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients(tmp_path, name):
    mine, his, with_margin = LOSSES[name]
    rows = [json.loads(line) for line in open("tiny/preferences.jsonl")][:PAIRS]
    rows = [{"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]}
            | ({"margin": 0.3 * i} if with_margin else {}) for i, row in enumerate(rows)]
    data = write(tmp_path / "pairs.jsonl", rows)
    updates = run(reward_model, tmp_path, model="tiny/policy", data=data, eval_data=data,
                  bias_prompts=0, pairs_per_step=PAIRS, epochs=3, lr=1e-3, **mine)

    for row in rows:
        for side in ("chosen", "rejected"):
            row[side] = [{"role": "assistant", "content": row[side]}]
    model = AutoModelForSequenceClassification.from_pretrained(
        "tiny/policy", num_labels=1, dtype=torch.float64)
    config = RewardConfig(output_dir=str(tmp_path / "trl"), max_length=None, **(THEIRS | his))
    trainer = RewardTrainer(model=model, args=config, processing_class=tokenizer(),
                            train_dataset=Dataset.from_list(rows))
    trainer.model.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert len(updates) == 3
    for update in updates:
        agree(f"reward_model.py {name}", update, *theirs(trainer, update.weights, batch))
