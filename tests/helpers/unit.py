"""What unit tests share: small random models, padded batches, rows on disk, and a Run that has started nothing."""
import gzip
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM)

from common import pad
from flags import RunArgs
from modeling import UserError
from runtime import Run

nan = float("nan")
V, EOS, PAD = 40, 1, 0  # of the small models
COLORS = "green white black red yellow brown".split()
PAIRS = [{"prompt": f"what is {a} and {b} ?", "chosen": f"{a} and {b} is {b} .", "rejected": f"it is {a} ."}
         for a in COLORS for b in COLORS if a != b]


# --- checks

def refuses(call, *words):
    """call() raises a UserError of one line that contains the words."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert message and len(message.splitlines()) == 1, message
    for word in words:
        assert str(word) in message


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(a, b, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# --- models

def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{**dict(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=None, eos_token_id=EOS,
        pad_token_id=PAD), **changes}))


def gpt2(**changes):
    """Learned absolute positions: counting padding as positions would show."""
    return GPT2LMHeadModel(GPT2Config(**{**dict(
        vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3,
        bos_token_id=None, eos_token_id=EOS), **changes}))


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, bos_token_id=None,
        eos_token_id=EOS, pad_token_id=PAD))


def save_reward_model(path, tokenizer, reward_bias=None, **changes):
    """A random Llama reward model, saved with a tokenizer."""
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(LlamaConfig(**{**dict(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3, num_labels=1,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id), **changes})).eval()
    if reward_bias is not None:
        model.config.reward_bias = reward_bias
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def word_tokenizer(words, template=None, **special):
    """A word is a token; a space ends it. Ids follow the order of the words."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([w for w in words if w.startswith("<")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", chat_template=template, **special)


# --- batches

# lengths differ in both parts; the third completion was truncated, the others end by themselves
PROMPTS = [[5, 6, 7], [9], [10, 11, 12, 13, 14, 15, 16], [5, 9, 5, 9]]
COMPLETIONS = [[20, 21, 22, EOS], [23, EOS], [24, 25, 26, 27, 28, 29], [EOS]]


def batch(prompts=PROMPTS, completions=COMPLETIONS, pad_id=PAD, left=0, right=0):
    """prompt_ids, prompt_mask, completion_ids, mask, with more padding on either side."""
    prompt_ids, prompt_mask = pad(prompts, "left", pad_id=pad_id)
    completion_ids, mask = pad(completions, "right", pad_id=pad_id)
    grow = torch.nn.functional.pad
    return (grow(prompt_ids, (left, 0), value=pad_id), grow(prompt_mask, (left, 0)),
            grow(completion_ids, (0, right), value=pad_id), grow(mask, (0, right)))


# --- rows

def write(path, *rows) -> str:
    """The path of a file of rows: strings as they are, anything else as JSON."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (gzip.open if str(path).endswith(".gz") else open)(path, "wb").write(text.encode())
    return str(path)


def says(text):
    return [{"role": "assistant", "content": text}]


# --- runs

def make_run(args=None, rank=0, world_size=1, **flags) -> Run:
    """A Run on the CPU that has opened no folder, as if it were one of several processes."""
    run = Run(args or RunArgs(device="cpu", **flags), "unit.py")
    run.rank, run.world_size = rank, world_size
    return run
