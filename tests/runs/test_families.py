"""Families of models that compute differently: log-probs, gradients and samples are those of the plainest computation.
All of them: python tests/families_table.py"""
import pytest

import reinforce
from common import load_tokenizer
from helpers import families
from helpers.unit import make_run

KINDS = ["gemma3_text",  # windows
         "gpt_oss",  # windows and experts
         "opt",  # learned positions with an offset
         "bart",  # the decoder of an encoder and a decoder
         "mamba2",  # a state
         "jamba", "qwen3_next", "recurrent_gemma",  # a state in some layers, a cache in others
         "minimax",  # a cache of its own
         "llama4_text",  # chunks, and a body that is no plain model
         "phimoe"]  # random in train mode

REFUSED = {"bert, not a decoder": "other outputs in a batch", "xlnet, not causal": "other outputs in a batch",
           "xlm-roberta": "cannot be sampled from",  # positions from the pad token, which generate does not know
           "rwkv": "cannot be sampled from",  # a state that generate loses
           "reformer": "does not run on token ids alone",
           "phi3, long rope": "longer than the context of 8"}  # later a row changes with the longest of its batch


@pytest.mark.parametrize("name", KINDS)
def test_a_family_computes_what_its_plain_forward_pass_says(name):
    verdicts = families.verdicts(name)
    assert len(verdicts) >= 7 and all(text.startswith("ok ") for text in verdicts.values()), verdicts


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused(name):
    """In one line, when it is loaded, or when its rows are read."""
    verdicts = families.verdicts(name)
    refused = [text for text in verdicts.values() if text.startswith("refused: ")]
    assert len(refused) == 1 and REFUSED[name] in refused[0] and len(verdicts) <= 2, verdicts


def test_without_a_generator_a_recurrent_model_decodes_greedily():
    """ReMax's baseline, and transformers' generate in the place of the script's."""
    plain = families.tiny_model("mamba2")
    model = families.load(plain)
    run = make_run(reinforce.Args(device="cpu", max_new_tokens=6))
    rows = [{"prompt_ids": [5, 6, 7]}, {"prompt_ids": [9, 8]}]
    rollout = reinforce.sample(model, rows, 1, run, load_tokenizer("tiny/policy"), None)
    for row, ids, mask in zip(rows, rollout.completion_ids.tolist(), rollout.mask.tolist()):
        assert ids[:sum(mask)] == families.plain_greedy(plain, row["prompt_ids"], 6)[:sum(mask)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tiny_models(name):
    """Their log-probs are far from uniform, and no parameter is 0, or the same throughout."""
    model = families.tiny_model(name)
    for row in families.ROWS:
        assert families.plain_logprobs(model, *row)[0].std() > 0.5
    assert all(weights.std() > 0.01 for weights in model.parameters())
