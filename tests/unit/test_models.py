"""common.py: how models are loaded."""
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import modeling
from helpers.unit import V, gpt2, llama, refuses, save_reward_model


def load(path):
    return modeling.load_model(AutoModelForCausalLM, str(path), "cpu")


def test_dropout_is_off_in_train_mode(tmp_path):
    """eval() is not enough: gradient checkpointing needs train()."""
    ids = torch.randint(V, (2, 20))
    gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    ours, missing = load(tmp_path)
    ours.train()
    assert not torch.equal(plain(ids).logits, plain(ids).logits)
    assert torch.equal(ours(ids).logits, ours(ids).logits) and not missing
    assert torch.equal(ours(ids).logits, plain.eval()(ids).logits)


def test_weights_are_float32(tmp_path):
    """bfloat16 weights would lose updates of 1e-6, however the folder stores them."""
    stored = llama().bfloat16()
    stored.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.lm_head.weight, stored.lm_head.weight.float())


def test_context_length(tmp_path):
    for name, model in (("llama", llama()), ("gpt2", gpt2())):  # each has its own name for it
        model.save_pretrained(tmp_path / name)
        assert modeling.context_length(str(tmp_path / name)) == 64


@pytest.mark.parametrize("name", [
    "runs/missing", "tiny/missing", "/missing/folder", "a/b/c", "", "common.py", "tests"])
def test_missing_models(name):
    refuses(lambda: load(name), name)


@pytest.mark.parametrize("damage", ["no config", "config", "no weights", "pickle", "cut", "noise"])
def test_damaged_models(tmp_path, damage):
    """A pickle can run code when it is loaded, so weights come from safetensors only."""
    model = llama()
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "no config":
        config.unlink()
    if damage == "config":
        config.write_text(config.read_text()[:50])
    if damage in ("no weights", "pickle"):
        weights.unlink()
    if damage == "pickle":
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    if damage == "noise":
        weights.write_bytes(bytes(range(256)) * 4)
    refuses(lambda: load(tmp_path), tmp_path)


def test_what_is_not_a_causal_lm(tmp_path, tokenizer):
    """Missing layers, or the head of a reward model, whose tied embeddings would pass for a language model's."""
    save_reward_model(tmp_path / "reward", tokenizer, tie_word_embeddings=True)
    refuses(lambda: modeling.load_causal_lm(str(tmp_path / "reward"), "cpu"), tmp_path / "reward", "not a causal LM",
            "score.weight")
    model = llama()
    model.config.num_hidden_layers = 3  # one more than it has
    model.save_pretrained(tmp_path / "short")
    refuses(lambda: modeling.load_causal_lm(str(tmp_path / "short"), "cpu"), "not a causal LM: it has no weights for")
    _, missing = modeling.load_model(AutoModelForSequenceClassification, "tiny/policy", "cpu", num_labels=1)
    assert missing == {"score.weight"} or list(missing) == ["score.weight"]


def test_a_frozen_model_in_bfloat16_is_what_autocast_makes_of_it():
    """No number changes. A head that is shared with the embeddings gets weights of its own: they stay float32."""
    model, ids = llama().eval(), torch.randint(V, (3, 9))
    model.lm_head.weight = model.model.embed_tokens.weight
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits
        frozen = modeling.freeze(model, bf16=True)
        assert torch.equal(frozen(ids).logits, expected)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert {m.weight.dtype for m in frozen.modules() if isinstance(m, torch.nn.Linear)} == {torch.bfloat16}
    assert frozen.model.embed_tokens.weight.dtype == torch.float32
