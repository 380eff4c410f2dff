"""Models, tokenizers and rows as people have them: kinds of public bug reports, each right or refused in one line."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, BertConfig, BertForSequenceClassification, LlamaConfig,
                          LlamaForTokenClassification, MixtralConfig, MixtralForCausalLM, MptConfig, Phi3Config,
                          RobertaConfig, RobertaForSequenceClassification)

import common
import dpo
import modeling
import ppo
import reward_model
from helpers.families import plain_logits, plain_logprobs
from helpers.unit import (COMPLETIONS, PROMPTS, V, batch, close, gpt2, llama, refuses, save_reward_model, says,
                          word_tokenizer, write)

WORDS = "<unk> <|end|> <|user|> <|assistant|> </s> a b c 's ,".split() + [f"w{i}" for i in range(10, V)]
TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
            "{% if add_generation_prompt %}<|assistant|> {% endif %}")
SMALL = dict(vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
             num_labels=1, pad_token_id=0, bos_token_id=None, eos_token_id=None)
ROW, USER = {"prompt": "a b"}, [{"role": "user", "content": "a"}]


def words(template=TEMPLATE, eos_token="<|end|>", **special):
    return word_tokenizer(WORDS, template, eos_token=eos_token, pad_token="<unk>", **special)


def save(path, model, tokenizer=words()) -> str:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path, remove="", **new):
    weights = {key: value for key, value in load_file(path).items() if key != remove}
    save_file(weights | new, path, metadata={"format": "pt"})


# --- tokenizers

@pytest.mark.parametrize("named", [True, False])  # as <|eot_id|> of Llama 3's base
def test_a_template_that_ends_an_answer_with_another_token_than_eos(named):
    """Qwen2.5's base has <|endoftext|> as eos, and <|im_end|> in its template (ms-swift#3113, trl#2059)."""
    tokenizer = words(eos_token="</s>", **{"additional_special_tokens": ["<|end|>"]} if named else {})
    eos_ids = common.eos_token_ids(llama(eos_token_id=None), tokenizer)
    rollout = common.Rollout(*common.pad([[5]] * 3, "left"), *common.pad([[6, 7, 1], [6, 4], [6, 7]], "right"),
                             tokenizer, eos_ids)
    assert rollout.truncated.tolist() == [False, False, True] and rollout.texts == ["b c", "b", "b c"]
    assert eos_ids.tolist() == [1, 4]


def test_decoded_text_is_what_was_generated(tmp_path):
    """Not `a's, b`, as clean_up_tokenization_spaces makes it (transformers#16438)."""
    save(tmp_path, llama(), words(clean_up_tokenization_spaces=True))
    assert common.load_tokenizer(str(tmp_path)).decode([5, 8, 9, 6]) == "a 's , b"


# --- models

def test_a_trained_bias_of_a_reward_model(tmp_path):
    """transformers would load the model without it (trl#1783)."""
    save_reward_model(tmp_path, words())
    edit_weights(tmp_path / "model.safetensors", **{"score.bias": torch.ones(1)})
    refuses(lambda: common.load_reward(str(tmp_path), "cpu"), f"{tmp_path}: not a reward model: it has weights that "
            "LlamaForSequenceClassification lacks, score.bias")


def test_a_reward_model_of_another_architecture(tmp_path):
    """Code of its own (ArmoRM: reward-bench PR#135), or a score for each token."""
    own, each = tmp_path / "own", save(tmp_path / "each", LlamaForTokenClassification(LlamaConfig(**SMALL)))
    save_reward_model(own, words())
    edit(own / "config.json", architectures=["RewardModelWithGating"])
    for name, kind in ((own, "RewardModelWithGating"), (each, "LlamaForTokenClassification")):
        refuses(lambda: common.load_reward(str(name), "cpu"), f"{name}: not a reward model, but a {kind}")


def test_an_encoder_is_a_reward_model_but_no_critic(tmp_path, capsys):
    """Also if its tokenizer fits: each of its outputs depends on the tokens to come."""
    policy = save(tmp_path / "policy", llama())
    name = save(tmp_path / "bert", BertForSequenceClassification(BertConfig(**SMALL)))
    reward, args = common.load_reward(name, "cpu"), ppo.Args(model=policy, reward=name)
    ppo.load_critic(args, reward, common.load_tokenizer(policy), "cpu")
    assert capsys.readouterr().out == f"the critic starts from {policy}\n" and reward([ROW], ["c"]).isfinite().all()
    args.critic = name
    refuses(lambda: ppo.load_critic(args, reward, words(), "cpu"), name, "an encoder attends to later tokens")


def test_a_reward_model_without_a_template_says_so(tmp_path, capsys):
    """It sees the prompt and the completion with nothing between them (trl#1702)."""
    for name, template, notices in (("plain", None, 1), ("chat", TEMPLATE, 0)):
        save_reward_model(tmp_path / name, words(template))
        common.load_reward(str(tmp_path / name), "cpu")([ROW] * 2, [" c", " b"])
        out = capsys.readouterr().out
        assert out.count("\n") == out.count(f"{tmp_path / name}: has no chat template") == notices


def test_a_reward_model_whose_template_drops_reasoning(tmp_path, capsys):
    """A policy may sample anything, so no run must end there; the rest is scored (trl#6966)."""
    save_reward_model(tmp_path, words(TEMPLATE.replace("m.content", "m.content.split('</think>')[-1] | trim")))
    reward = common.load_reward(str(tmp_path), "cpu")
    plain = reward([ROW] * 2, ["b", "c"])
    assert capsys.readouterr().out == "" and plain[0] != plain[1]
    for _ in range(2):
        close(reward([ROW] * 2, ["<think> a </think> b", "c"]), plain, rtol=0, atol=1e-6)
    out = capsys.readouterr().out
    assert f"{tmp_path}: its chat template drops a part" in out and "</think> b'" in out and out.count("\n") == 1


def test_robertas_context():
    """Its positions begin after the pad token's, so 514 of them hold 512 tokens; one more is an index error."""
    tokenizer, model = words(None), RobertaForSequenceClassification(RobertaConfig(**SMALL | dict(
        max_position_embeddings=514, pad_token_id=1))).eval()
    assert modeling.context_length(model) == 512
    assert common.score_texts(model, tokenizer, ["a " * 512]).isfinite().all()
    refuses(lambda: common.score_texts(model, tokenizer, ["a", "a " * 513]), "513 tokens", "context of 512")


@pytest.mark.parametrize("key", ["model.layers.0.mlp.up_proj.weight_scale", "model.layers.2.mlp.up_proj.weight"])
def test_weights_that_the_model_lacks(tmp_path, key):
    """The scales of a quantized model (unsloth#39), or a layer more than the config says."""
    save(tmp_path, llama())
    edit_weights(tmp_path / "model.safetensors", **{key: torch.ones(48, 32)})
    refuses(lambda: modeling.load_causal_lm(str(tmp_path), "cpu"), f"{tmp_path}: not a causal LM: it has weights that "
            f"LlamaForCausalLM lacks, {key}")


@pytest.mark.parametrize("flags", [{"return_dict": False}, {"output_router_logits": True}], ids=str)
def test_a_config_that_changes_what_a_model_returns(tmp_path, flags):
    """A tuple, or the routers' logits too (trl#2038)."""
    model = llama() if "return_dict" in flags else MixtralForCausalLM(MixtralConfig(**SMALL | dict(
        num_key_value_heads=1, num_local_experts=4, initializer_range=0.3)))
    save(tmp_path, model.eval())
    edit(tmp_path / "config.json", **flags)
    with torch.no_grad():
        ours, _ = common.completion_logprobs(modeling.load_causal_lm(str(tmp_path), "cpu"), *batch())
        for row, prompt, completion in zip(ours, PROMPTS, COMPLETIONS):
            close(row[:len(completion)], plain_logprobs(model, prompt, completion)[0], rtol=1e-4, atol=1e-5)


def test_mpts_context(tmp_path):
    MptConfig(vocab_size=V, max_seq_len=32).save_pretrained(tmp_path)
    assert modeling.context_length(str(tmp_path)) == 32


@pytest.mark.parametrize("config, kind, context", [
    (Phi3Config, "longrope", 16), (LlamaConfig, "dynamic", 16), (LlamaConfig, "yarn", 64)])
def test_the_context_of_a_rope(tmp_path, config, kind, context):
    """Where it depends on the longest row, a row must not change with others (transformers PR#33129)."""
    original = dict(original_max_position_embeddings=16)
    rope = dict(rope_type=kind, rope_theta=1e4, factor=4.0, **original)
    rope |= dict(short_factor=[1.0] * 4, long_factor=[8.0] * 4) if kind == "longrope" else {}
    config(**SMALL, **original, max_position_embeddings=64, rope_parameters=rope).save_pretrained(tmp_path)
    assert modeling.context_length(str(tmp_path)) == context


def test_a_model_that_is_random_in_train_mode(tmp_path):
    """Two passes would differ, and the ratio from 1; as with Mixtral's jitter, which is no dropout to a config."""
    model = gpt2(resid_pdrop=0.5).train()
    refuses(lambda: modeling.check_forward(model), "GPT2LMHeadModel gives a row other outputs", "train mode")
    modeling.check_forward(model.eval())
    assert model.cache_is_exact and not model.training
    save(tmp_path, MixtralForCausalLM(MixtralConfig(**SMALL | dict(num_key_value_heads=1, router_jitter_noise=0.5))))
    refuses(lambda: modeling.load_causal_lm(str(tmp_path), "cpu"), tmp_path, "train mode")


def test_an_adapter_of_another_library(tmp_path):
    """It has its base's config.json (sglang#374); one that lacks a weight is another model (peft#2566)."""
    peft = pytest.importorskip("peft", reason="needs the extra lora: pip install '.[lora]'")
    base = AutoModelForCausalLM.from_pretrained(save(tmp_path / "base", llama()))
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    name, file = str(tmp_path / "adapter"), tmp_path / "adapter/adapter_model.safetensors"
    assert not (tmp_path / "adapter/config.json").exists()
    with torch.no_grad():
        close(*(plain_logits(m, PROMPTS[2]) for m in (modeling.load_causal_lm(name, "cpu"), model)), rtol=0, atol=1e-4)
    edit_weights(file, remove=next(key for key in load_file(file) if "lora_A" in key))
    refuses(lambda: modeling.load_causal_lm(name, "cpu"), name, "missing adapter keys", "lora_A")


# --- rows

def test_a_message_with_tool_calls(tmp_path):
    """What is called would not be seen, and two answers could become equal (trl PR#3597)."""
    call = [{"role": "assistant", "content": "b", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]
    fine = {"prompt": USER, "chosen": says("b"), "rejected": says("c")}
    for column, value in (("prompt", USER + call + USER), ("chosen", call), ("rejected", call)):
        path = write(tmp_path / "rows.jsonl", fine, {**fine, column: value})
        for read in (common.read_pairs, common.read_prompts):
            refuses(lambda: read(path), f"{path}:2: '{column}': tool calls are not supported")


@pytest.mark.parametrize("system", ["be short", "be short\nand kind"])
def test_columns_that_other_libraries_put_into_the_prompt(tmp_path, capsys, system):
    """trl PR#2455, LlamaFactory#5743."""
    extra = {"system": system, "tools": [{"name": "f"}], "chat_template_kwargs": {"enable_thinking": False}}
    path = write(tmp_path / "rows.jsonl", {"prompt": USER}, *[{"prompt": USER, **extra}] * 2)
    common.read_prompts(path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" is not read")[0] for line in lines] == [f"{path}: the column {name!r}" for name in extra]
    held = {"prompt": [{"role": "system", "content": system}, *USER], "system": system, "tools": None}
    common.read_prompts(write(tmp_path / "rows.jsonl", held, {"prompt": USER, "system": ""}))
    assert capsys.readouterr().out == ""


def test_answers_that_begin_with_their_prompt(tmp_path, capsys):
    """It would be there twice (OpenRLHF#909)."""
    rows = [{"prompt": p, "chosen": p + " b", "rejected": p + " c"} for p in ("a", "a b")]
    other = {"prompt": "a", "chosen": "b", "rejected": "a c"}
    for column, more, notices in (("prompt", [], 1), ("none", [], 0), ("prompt", [other], 0)):
        path = write(tmp_path / "rows.jsonl", *rows, *more)
        assert common.read_pairs(path, column)[1]["chosen"] == ("a b b" if column == "prompt" else " b")
        out = capsys.readouterr().out
        assert out.count("\n") == out.count(f"{path}: each answer begins with its prompt") == notices


@pytest.mark.parametrize("margin", ["NaN", "Infinity", "-Infinity", "null"])
def test_a_margin_that_is_no_number(tmp_path, margin):
    """Python's JSON reads NaN, and the loss would be NaN."""
    path = write(tmp_path / "rows.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": %s}' % margin)
    rows = common.read_pairs(path)
    assert len(reward_model.encode_pairs(words(), rows, path, 64, "")) == 1
    refuses(lambda: reward_model.encode_pairs(words(), rows, path, 64, "margin"), path, "must hold a number", "'margin'")


def test_an_empty_answer_without_an_end_of_sequence(capsys):
    """It has no token to learn from, and a mean over its tokens is 0 / 0 (LlamaFactory#3364)."""
    rows = [{"prompt": "a", "chosen": " b", "rejected": rejected} for rejected in ("", " c")]
    pairs = dpo.encode_pairs(words(None, eos_token=None), rows, "rows", 64, [])
    assert [(pair["chosen_ids"], pair["rejected_ids"]) for pair in pairs] == [([6], [7])]
    assert "and 1 left out because their answers are equal or empty" in capsys.readouterr().out


def test_columns_with_the_names_of_a_reward_functions_arguments():
    """They would be there twice (unsloth-zoo PR#832)."""
    rows, seen = [{"prompt": "a", "prompts": "x", "completions": ["y"], "answer": 3}], {}
    scores = common.call_reward("f", lambda **keywords: seen.update(keywords) or [1.0], rows, ["b"], "cpu")
    assert scores.tolist() == [1] and seen == {"prompts": ["a"], "completions": ["b"], "answer": [3]}


def test_a_file_that_begins_with_a_byte_order_mark(tmp_path):
    for name in ("rows.jsonl", "rows.jsonl.gz"):  # as files from Windows do
        assert common.read_prompts(write(tmp_path / name, "\ufeff" + json.dumps(ROW))) == [ROW]
