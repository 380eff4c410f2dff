"""Families of models that compute differently: log-probs, gradients and samples are those of the plainest computation.
All of them: python tests/families_table.py"""
import pytest

from helpers import families

KINDS = ["gemma3_text",  # windows
         "gpt_oss",  # windows and experts
         "opt",  # learned positions with an offset
         "bart",  # the decoder of an encoder and a decoder
         "xlm-roberta",  # positions that are counted from the pad token
         "mamba2", "rwkv",  # a state
         "jamba", "qwen3_next", "recurrent_gemma",  # a state in some layers, a cache in others
         "minimax",  # a cache of its own
         "llama4_text",  # chunks, and a body that is no plain model
         "phimoe"]  # random in train mode


@pytest.mark.parametrize("name", KINDS)
def test_a_family_computes_what_its_plain_forward_pass_says(name):
    verdicts = families.verdicts(name)
    assert verdicts.keys() == families.CHECKS.keys()
    assert all(text.startswith("ok ") for text in verdicts.values()), verdicts


@pytest.mark.parametrize("name", ["bert, not a decoder", "xlnet, not causal"])
def test_what_sees_the_tokens_to_come_is_refused(name):
    verdicts = families.verdicts(name)
    assert all(text.startswith("refused: ") for text in verdicts.values()), verdicts


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tiny_models(name):
    """Their log-probs are far from uniform, and no parameter is 0, or the same throughout."""
    model = families.tiny_model(name)
    for row in families.ROWS:
        assert families.plain_logprobs(model, *row)[0].std() > 0.5
    assert all(weights.std() > 0.01 for weights in model.parameters())
