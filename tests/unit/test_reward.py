"""common.py: rewards, by a user's function and by a reward model."""
import asyncio
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import common
from helpers.unit import llama, refuses, save_reward_model, word_tokenizer

TURNS = [{"role": "user", "content": "is it so ?"}, {"role": "assistant", "content": "no"},
         {"role": "user", "content": "sure ?"}]
ROWS = [{"prompt": "hi", "answer": "a", "prompt_ids": [1]}, {"prompt": TURNS, "level": 3}]


# --- reward functions

def reward_function(tmp_path, source):
    (tmp_path / "rewards.py").write_text(source)
    return common.load_reward(f"{tmp_path}/rewards.py:reward", "cpu")


def returning(tmp_path, value):
    return reward_function(tmp_path, f"def reward(prompts, completions, **c): return {value}")


def test_a_reward_function_has_trls_signature(tmp_path):
    """Keywords; a column that a row lacks is None; a prompt of messages has a completion of messages."""
    seen = tmp_path / "seen.json"
    reward = reward_function(tmp_path, f"""
import json
def reward(**keywords):
    json.dump(keywords, open({str(seen)!r}, "w"))
    return [1, None]
""")
    values = reward(ROWS, ["b", "c"])
    assert json.loads(seen.read_text()) == {
        "prompts": ["hi", TURNS], "answer": ["a", None], "level": [None, 3],
        "completions": ["b", [{"role": "assistant", "content": "c"}]]}
    assert values.dtype == torch.float32 and values[0] == 1 and values[1].isnan()


@pytest.mark.parametrize("value", [
    "[len(c) for c in completions]", "(float(len(c)) for c in completions)",
    "__import__('numpy').array([len(c) for c in completions])",
    "__import__('torch').tensor([len(c) for c in completions])",
    "[True, __import__('numpy').float32(2)]"])
def test_a_reward_function_may_return_any_numbers(tmp_path, value):
    reward = returning(tmp_path, value)
    assert reward([{"prompt": "a"}, {"prompt": "b"}], ["x", "yy"]).tolist() == [1, 2]


def test_a_reward_function_may_be_a_coroutine(tmp_path):
    """As TRL's, also where a loop is running already, as in a notebook."""
    reward = reward_function(tmp_path, "import asyncio\nasync def reward(completions, **columns):\n"
                             "    await asyncio.sleep(0)\n    return [len(c) for c in completions]")
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    assert reward(rows, ["x", "yy"]).tolist() == [1, 2]

    async def notebook():
        return reward(rows, ["x", "yy"])
    assert asyncio.run(notebook()).tolist() == [1, 2]


def test_a_reward_file_is_a_module(tmp_path):
    """Dataclasses look up their module by name."""
    reward = reward_function(tmp_path, """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Rule:
    points: float
def reward(completions, **columns):
    return [Rule(2.0).points for _ in completions]
""")
    assert reward(ROWS, ["b", "c"]).tolist() == [2, 2]


@pytest.mark.parametrize("value, words", [
    ("[1.0]", "1 rewards for 2"),
    ("[1.0, 2.0, 3.0]", "3 rewards for 2"),
    ("[]", "0 rewards for 2"),
    ("[1.0, float('nan')]", "list of finite numbers"),
    ("[1.0, float('inf')]", "list of finite numbers"),
    ("[1.0, -float('inf')]", "list of finite numbers"),
    ("['1', '2']", "list of finite numbers"),
    ("'12'", "list of finite numbers"),
    ("[[1.0], [2.0]]", "list of finite numbers"),
    ("__import__('numpy').zeros((2, 3))", "list of finite numbers"),
    ("[1.0, 10 ** 400]", "list of finite numbers"),
    ("[1.0, 1e39]", "list of finite numbers"),  # infinite in float32
    ("None", "list of finite numbers"),
    ("3.0", "list of finite numbers"),
    ("{'a': 1, 'b': 2}", "list of finite numbers"),
    ("1 / 0", "ZeroDivisionError"),
    ("(_ for _ in ()).throw(RuntimeError('one\\ntwo'))", "RuntimeError: one"),
    ("(1 / 0 for c in completions)", "ZeroDivisionError"),
])
def test_reward_functions_that_fail(tmp_path, value, words):
    """One line with the function's name, whatever it raises or returns."""
    reward = returning(tmp_path, value)
    refuses(lambda: reward(ROWS, ["b", "c"]), f"{tmp_path}/rewards.py:reward", words)


def test_an_exception_in_a_reward_function_is_reported_with_its_line(tmp_path):
    reward = returning(tmp_path, "(\n    missing)")
    refuses(lambda: reward(ROWS, ["b", "c"]), "NameError", "missing", "rewards.py:2")
    reward = reward_function(tmp_path, "def reward(completions): return [1, 2]")
    refuses(lambda: reward(ROWS, ["b", "c"]), "TypeError", "prompts")


def test_reward_functions_that_do_not_load(tmp_path):
    name = f"{tmp_path}/missing.py"
    refuses(lambda: common.load_reward(f"{name}:reward", "cpu"), f"{name}: no such file")
    for source, words in [
            ("def other(): pass", "no function 'reward'"),
            ("reward = 3", "no function 'reward'"),
            ("import not_there", "not_there"), ("def reward(:", "SyntaxError"),
            ("raise RuntimeError('one\\ntwo')", "RuntimeError: one")]:
        refuses(lambda: reward_function(tmp_path, source), f"{tmp_path}/rewards.py", words)


def test_a_reward_file_without_its_function_is_not_looked_up_on_the_hub(monkeypatch):
    """`rewards.py` could be a hub id, and half a minute would pass until the network says no."""
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_: pytest.fail("looked up"))
    refuses(lambda: common.load_reward("rewards.py", "cpu"), "rewards.py: name a function", "file.py:FUNCTION")
    refuses(lambda: common.load_reward("rewards.py:", "cpu"), "rewards.py:: name a function")


def test_a_reward_model_whose_folder_is_named_like_a_file_of_python(tmp_path):
    shutil.copytree("tiny/reward_model", tmp_path / "rm.py")
    assert common.load_reward(str(tmp_path / "rm.py"), "cpu").model.config.num_labels == 1


# --- reward models

def head_on_last_token(model, ids):
    """The score of one conversation without padding, by the model's two parts."""
    with torch.no_grad():
        return model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()


QUESTIONS = [{"prompt": "what is it ?"}, {"prompt": [{"role": "system", "content": "word ."},
             {"role": "user", "content": "what is the word of yes ?"}]}, {"prompt": "is it"}]
ANSWERS = ["the word is water", "no", "yes it is . you want it very much , yes ?"]


@pytest.mark.parametrize("bias", [None, -1.25])
def test_a_reward_model_scores_the_last_token(tmp_path, tokenizer, bias):
    """By hand, one conversation at a time, whatever else is in the batch; the config's bias is added."""
    model = save_reward_model(tmp_path, tokenizer, reward_bias=bias)
    expected = []
    for row, answer in zip(QUESTIONS, ANSWERS):
        text = common.render(tokenizer, row["prompt"]) + answer + "<|end|>"
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in ids
        expected.append(head_on_last_token(model, ids) + (bias or 0))
    assert np.std(expected) > 0.05
    for tokens in (1, 30, 8192):  # per micro-batch
        reward = common.load_reward(str(tmp_path), "cpu", tokens=tokens)
        scores = reward(QUESTIONS, ANSWERS)
        assert scores.shape == (3,) and scores.dtype == torch.float32
        assert not scores.requires_grad
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        np.testing.assert_allclose(reward(QUESTIONS[::-1], ANSWERS[::-1]), expected[::-1], atol=1e-5)
    for i in range(3):
        assert reward(QUESTIONS[i:i + 1], ANSWERS[i:i + 1]).item() == pytest.approx(expected[i], abs=1e-5)


def test_a_reward_model_without_a_pad_token(tmp_path):
    """As transformers scores one conversation: at its last token, though that is the pad token now."""
    tokenizer = word_tokenizer(
        ["<unk>", "</s>", "a", "b", "c"], eos_token="</s>", template="{% for m in messages %}"
        "{{ m.content }} </s> {% endfor %}")
    model = save_reward_model(tmp_path, tokenizer, pad_token_id=None)
    texts = [["a b", "c"], ["b", "c c c a"], ["a", "a"]]
    ids = [tokenizer(f"{p} </s> {c} </s>").input_ids for p, c in texts]
    expected = [head_on_last_token(model, row) for row in ids]
    with torch.no_grad():
        np.testing.assert_allclose([model(torch.tensor([row])).logits.item() for row in ids], expected, atol=1e-5)
    reward = common.load_reward(str(tmp_path), "cpu")
    scores = reward([{"prompt": p} for p, _ in texts], [c for _, c in texts])
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert reward.model.config.pad_token_id is None  # the config is as it was


def test_a_reward_model_with_its_own_tokenizer(tmp_path):
    """Another tokenizer and template than the policy's: it scores text, not ids."""
    other = word_tokenizer(
        "<stop> bot: water is <pad> what it <unk> human: the ?".split(),
        "{% for m in messages %}{{ 'human: ' if m.role == 'user' else 'bot: ' }}"
        "{{ m.content }} {% endfor %}{{ 'bot:' if add_generation_prompt else '<stop>' }}",
        eos_token="<stop>", pad_token="<pad>")
    model = save_reward_model(tmp_path, other)
    reward = common.load_reward(str(tmp_path), "cpu")
    scores = reward([{"prompt": "what is it ?"}, {"prompt": "\n\nHuman: is it\n\nAssistant:"}],
                    ["it is the water", "what"])
    ids = [[8, 5, 3, 6, 10, 1, 6, 3, 9, 2, 0], [8, 3, 6, 1, 5, 0]]
    np.testing.assert_allclose(scores, [head_on_last_token(model, row) for row in ids], atol=1e-5)


def test_folders_that_are_not_reward_models(tmp_path, tokenizer):
    """A causal LM would silently get a random head; of two labels neither is the score."""
    two, causal = str(tmp_path / "two"), str(tmp_path / "causal")
    save_reward_model(two, tokenizer, num_labels=2)
    refuses(lambda: common.load_reward(two, "cpu"), two, "one label, and has 2")
    llama(vocab_size=len(tokenizer)).save_pretrained(causal)
    tokenizer.save_pretrained(causal)
    refuses(lambda: common.load_reward(causal, "cpu"), causal, "score.weight")
    config = json.loads((tmp_path / "causal/config.json").read_text())
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (tmp_path / "causal/config.json").write_text(json.dumps(config))  # one label, no head
    refuses(lambda: common.load_reward(causal, "cpu"), causal, "score.weight")
    for name in ("tiny/missing", "tests", str(tmp_path)):
        refuses(lambda: common.load_reward(name, "cpu"), name)


def test_conversations_longer_than_the_reward_models_context(tmp_path, tokenizer):
    save_reward_model(tmp_path, tokenizer, max_position_embeddings=10)
    reward = common.load_reward(str(tmp_path), "cpu")
    row = [{"prompt": "what is"}]  # <|user|> what is <|end|> <|assistant|> ... <|end|>
    assert reward(row, ["it is it is"]).isfinite().all()
    refuses(lambda: reward(row, ["it is it is it"]), "11 tokens", "context of 10")


def test_scores_that_are_not_finite(tmp_path, tokenizer):
    save_reward_model(tmp_path, tokenizer)
    reward = common.load_reward(str(tmp_path), "cpu")
    word = tokenizer.convert_tokens_to_ids("water")
    with torch.no_grad():
        reward.model.model.embed_tokens.weight[word] = torch.inf
    assert reward(QUESTIONS[:1], ["no"]).isfinite().all()
    refuses(lambda: reward(QUESTIONS[:2], ["no", "is water"]), tmp_path, "not finite", "is water", "--dtype float32")


def test_scores_under_bfloat16_are_float32(tmp_path, tokenizer):
    save_reward_model(tmp_path, tokenizer)
    plain, fast = (common.load_reward(str(tmp_path), "cpu", bf16)(QUESTIONS, ANSWERS) for bf16 in (False, True))
    assert fast.dtype == torch.float32 and 0 < (plain - fast).abs().max() < 0.1
    assert (fast.bfloat16() != fast).all()  # the head is not rounded to 8 bits


def test_a_mistake_is_one_line_on_stderr(tmp_path, tokenizer):
    """A whole process: what the libraries print as well, and the exit code."""
    save_reward_model(tmp_path / "model", tokenizer)
    llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    program = """
import sys
from flags import RunArgs, cli
from runtime import Run
def main(args):
    Run(args, "x.py").load_reward(name)([{"prompt": "is"}], ["it " * 300])
*names, last = sys.argv[1:]
del sys.argv[1:]
for name in names:
    try:
        cli(main, RunArgs, "")
    except SystemExit as stop:
        assert stop.code == 2
name = last
cli(main, RunArgs, "")
"""
    run = subprocess.run([sys.executable, "-c", program, tmp_path / "causal", tmp_path / "model"],
                         capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == "", run.stderr
    first, second = run.stderr.splitlines()
    assert first.startswith(f"error: {tmp_path}/causal: ") and "score.weight" in first
    assert second.startswith(f"error: {tmp_path}/model: ") and "the reward model's context of 64" in second
