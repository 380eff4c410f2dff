"""common.py: conversations as text and as tokens, padding, and rollouts."""
import copy
import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import common
import modeling
import dpo
import evaluation
from helpers.unit import EOS, llama, refuses, word_tokenizer, write

USER = [{"role": "user", "content": "is it so ?"}]
TURNS = [{"role": "system", "content": "be short"}, *USER,
         {"role": "assistant", "content": "no"}, {"role": "user", "content": "sure ?"}]


@pytest.fixture
def plain(tokenizer):
    """The same words, no chat template."""
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize("prompt, text", [
    ("is it ?", "<|user|>is it ?<|end|>"),
    (USER, "<|user|>is it so ?<|end|>"),
    (TURNS, "<|system|>be short<|end|><|user|>is it so ?<|end|><|assistant|>no<|end|><|user|>sure ?<|end|>"),
    ("\n\nHuman: a b\n\nAssistant: c\n\nHuman: d\n\ne\n\nAssistant:",
     "<|user|>a b<|end|><|assistant|>c<|end|><|user|>d\n\ne<|end|>"),
    ("\n\nHuman: a b", "<|user|>a b<|end|>"),
    ("Human: a b", "<|user|>Human: a b<|end|>"),
])
def test_render_with_a_template(tokenizer, prompt, text):
    """A string is the user's turn and a transcript is parsed; then the assistant's turn begins, or is there."""
    assert common.render(tokenizer, prompt) == text + "<|assistant|>"
    for completion in ("yes it is", " yes it is\n"):  # transcripts leave a space at the beginning
        assert common.render(tokenizer, prompt, completion) == text + "<|assistant|>yes it is<|end|>"


def test_render_changes_no_argument(tokenizer):
    prompt = copy.deepcopy(TURNS)
    common.render(tokenizer, prompt, "yes")
    assert prompt == TURNS


def test_render_without_a_template(plain):
    """Strings are concatenated as they are, transcripts too; the end-of-sequence token is there once."""
    for prompt in ("  the sky is", "\n\nHuman: a\n\nAssistant:"):
        assert common.render(plain, prompt) == prompt
        assert common.render(plain, prompt, " blue ") == prompt + " blue <|end|>"
        assert common.render(plain, prompt, " blue<|end|>") == prompt + " blue<|end|>"
        ids, = common.encode(plain, [common.render(plain, prompt, " blue")])
        assert ids.count(plain.eos_token_id) == 1 and ids[-1] == plain.eos_token_id
    refuses(lambda: common.render(plain, USER), "tiny/policy", "chat template")
    refuses(lambda: common.render(plain, USER, "yes"), "tiny/policy", "chat template")
    plain.eos_token = None
    assert common.render(plain, "a", " b") == "a b"


def test_a_template_that_refuses_a_prompt(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    refuses(lambda: common.render(tokenizer, TURNS), "chat template refuses", "roles must")


def test_special_tokens_are_written_once():
    """By the chat template, or else by the tokenizer: no text begins twice."""
    tokenizer = word_tokenizer(["<unk>", "<s>", "</s>", "a", "b"], bos_token="<s>")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    assert common.encode(tokenizer, ["a b", "b"]) == [[1, 3, 4], [1, 4]]
    tokenizer.chat_template = "{{ bos_token }} {{ messages[0].content }}"
    assert common.encode(tokenizer, [common.render(tokenizer, "a b")]) == [[1, 3, 4]]


def test_a_tokenizer_needs_no_pad_token(tmp_path):
    word_tokenizer(["<unk>", "</s>", "a"], eos_token="</s>").save_pretrained(tmp_path / "a")
    (tmp_path / "a/config.json").write_text('{"model_type": "llama"}')
    assert common.load_tokenizer(str(tmp_path / "a")).pad_token is None
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").write_text('{"model_type": "llama"}')
    refuses(lambda: common.load_tokenizer(str(tmp_path / "b")), tmp_path / "b", "no tokenizer")


@pytest.mark.parametrize("name", [
    "runs/missing", "tiny/missing", "/missing/folder", "a/b/c", "", "common.py", "tests"])
def test_missing_tokenizers(name):
    refuses(lambda: common.load_tokenizer(name), name)


def test_prompts_that_are_too_long(tokenizer, capsys):
    """Above the limit they are skipped and counted; a prompt without room for a completion is an error."""
    rows = [{"prompt": "what is it"}, {"prompt": " ".join(["what"] * 10)}, {"prompt": "is"}]
    n = [3 + 3, 10 + 3, 1 + 3]  # <|user|> ... <|end|> <|assistant|>
    kept = common.encode_prompts(tokenizer, rows, "rows", room=13)
    assert [{"prompt": row["prompt"]} for row in kept] == rows and capsys.readouterr().out == ""
    assert [len(row["prompt_ids"]) for row in kept] == n and "prompt_ids" not in rows[0]
    kept = common.encode_prompts(tokenizer, rows, "rows", room=6, longest=6)
    assert [row["prompt"] for row in kept] == ["what is it", "is"]
    assert [len(row["prompt_ids"]) for row in kept] == [6, 4]
    out = capsys.readouterr().out
    assert "rows: skipped 1 of 3 rows" in out and out.count("\n") == 1
    tokens = tokenizer.convert_ids_to_tokens(kept[0]["prompt_ids"])
    assert tokens == ["<|user|>", "what", "is", "it", "<|end|>", "<|assistant|>"]
    assert common.encode_prompts(tokenizer, [], "rows", room=13) == []
    for room, longest, words in [
            (12, 0, f"rows: prompt 2, {str(rows[1]['prompt'])[:60]!r}, has 13 tokens"),
            (3, 5, "rows: prompt 3"), (99, 3, "rows: no prompt has at most 3 tokens"),
            (0, 0, "--max-new-tokens: leaves no room for a prompt")]:
        refuses(lambda: common.encode_prompts(tokenizer, rows, "rows", room, longest), words)


@pytest.mark.parametrize("begins, template", [
    ("<|user|>", None), ("<|im_start|>", "<|im_start|>{{ messages[0].role }} {{ messages[0].content }}"),
    ("[INST]", "{{ bos_token }} [INST] {{ messages[0].content }} [/INST]"),
    ("<s>", "{{ bos_token }} [INST] {{ messages[0].content }} [/INST]")])
def test_prompts_in_the_template_already_are_pointed_out_once(tmp_path, tokenizer, capsys, begins, template):
    """Otherwise the model would see two templates, one around the other."""
    tokenizer.bos_token, tokenizer.chat_template = "<s>", template or tokenizer.chat_template
    for messages in (False, True):
        prompts = ["what ?", "<a> b", "[1] who ?", f" {begins}user what ?", f"{begins} who ?"]
        prompts = [[{"role": "user", "content": text}] if messages else text for text in prompts]
        path = write(tmp_path / "rows.jsonl", *[{"prompt": p, "chosen": "b", "rejected": "c"} for p in prompts])
        args = SimpleNamespace(model="tiny/policy", data=path, eval_data="", prompt_column="prompt", eval_prompts=1,
                               max_new_tokens=8, max_prompt_tokens=0, eval_pairs=1)
        for load in (common.load_prompts, common.load_pairs):
            load(args, tokenizer)
            out = capsys.readouterr().out
            assert f"{path}: row 4: the prompt begins with {begins}," in out and out.count("\n") == 1
    path = write(tmp_path / "rows.jsonl", {"prompt": "a <|user|> b"}, {"prompt": "<a> b"})
    common.read_prompts(path, "prompt", tokenizer)
    tokenizer.chat_template = None  # the way to train on text that is rendered already
    common.read_prompts(write(tmp_path / "rows.jsonl", {"prompt": f"{begins} b"}), "prompt", tokenizer)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("own, both, alone", [(None, [2], []), (7, [2, 7], [7]), ([9, 2, 7], [2, 7, 9], [2, 7, 9])])
def test_eos_token_ids_are_the_models_and_the_tokenizers(own, both, alone):
    tokenizer, model = word_tokenizer(["<unk>", "a", "</s>"], eos_token="</s>"), llama()
    model.generation_config.eos_token_id = own
    assert common.eos_token_ids(model, tokenizer).tolist() == both
    tokenizer.eos_token = None
    assert common.eos_token_ids(model, tokenizer).tolist() == alone


def test_pad():
    rows = [[1, 2, 3], [4], []]
    ids, mask = common.pad(rows, "left", pad_id=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4], [9, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    ids, mask = common.pad(rows, "right", pad_id=3)  # a pad token that a row contains
    assert ids.tolist() == [[1, 2, 3], [4, 3, 3], [3, 3, 3]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64


def test_a_rollout_knows_lengths_texts_and_what_was_truncated():
    """The end-of-sequence token is part of a completion, also where it is the pad token; a completion that ends
    with another token was truncated, whatever stands in its padding."""
    tokenizer = word_tokenizer(["<unk>", "</s>", "a", "b", "c"], eos_token="</s>", pad_token="</s>")
    prompt_ids, prompt_mask = common.pad([[2, 3], [4], [2]], "left", pad_id=EOS)
    completion_ids, mask = common.pad([[2, 3, EOS], [3, 3], [EOS]], "right", pad_id=EOS)
    rollout = common.Rollout(prompt_ids, prompt_mask, completion_ids, mask, tokenizer, torch.tensor([EOS]))
    assert rollout.lengths.tolist() == [5, 3, 2]
    assert rollout.truncated.tolist() == [False, True, False]
    assert rollout.texts == [" a b", " b b", ""]  # without a chat template they continue the prompt
    rows = torch.tensor([2, 0])
    for part, whole in zip(rollout.tokens(rows), (prompt_ids, prompt_mask, completion_ids, mask)):
        assert torch.equal(part, whole[rows])
    two = common.Rollout(prompt_ids, prompt_mask, completion_ids, mask, tokenizer, torch.tensor([EOS, 3]))
    assert two.truncated.tolist() == [False, False, False]


# --- tokenizers as people have them

CHAT = ("{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}")
WORDS = ["<unk>", "<|end|>", "<|user|>", "<|assistant|>", "<s>", "<answer>", "a", "b", "c"]


def a_rollout(tokenizer, completion, prompt=(6,), eos=EOS):
    return common.Rollout(*common.pad([prompt], "left"), *common.pad([completion], "right"), tokenizer,
                          torch.tensor([eos]))


def test_special_tokens_in_a_completion_reach_the_reward():
    """Only the end of sequence is taken off: it is not what was said, `<answer>` is."""
    tokenizer = word_tokenizer(WORDS, CHAT, eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>"]})
    assert a_rollout(tokenizer, [6, 5, 7, 5, EOS]).texts == ["a <answer> b <answer>"]
    assert a_rollout(tokenizer, [6, 5, 7]).texts == ["a <answer> b"]


def test_a_completion_without_a_template_keeps_its_first_space():
    """Metaspace decoders drop a text's first space, and a reward model would read `what is theblue`."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "</s>", "▁the", "▁blue", "bell"])},
                                       unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    assert tokenizer.decode([3]) == "blue"
    assert a_rollout(tokenizer, [3, 4, EOS], [2]).texts == [" bluebell"]
    assert a_rollout(tokenizer, [4, EOS], [2]).texts == ["bell"]
    tokenizer.chat_template = CHAT
    assert a_rollout(tokenizer, [3, EOS], [2]).texts == ["blue"]  # an answer, not a continuation


def test_an_end_of_sequence_that_the_tokenizer_appends_is_there_once():
    """Never at the end of a prompt, and after an answer once."""
    tokenizer = word_tokenizer(WORDS, bos_token="<s>", eos_token="<|end|>")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|end|>", special_tokens=[("<s>", 4), ("<|end|>", 1)])
    assert common.encode(tokenizer, ["a b", "a b <|end|>"]) == [[4, 6, 7], [4, 6, 7, 1]]


def test_a_template_that_drops_reasoning_is_refused():
    """Two answers that differ in what is dropped would become equal."""
    tokenizer = word_tokenizer(WORDS, "{% for m in messages %}{{ m.content.split('</think>')[-1] | trim }}{% endfor %}")
    assert common.render(tokenizer, "a", "  b\n c ") == "ab\n c"
    refuses(lambda: common.render(tokenizer, "a", "<think>b</think>c"), "drops", "<think>b", "chat_template.jinja")


@pytest.mark.parametrize("n, cut", [(0, [4, 6, 7, 8]), (1, [4, 7, 8]), (2, [4, 8]), (3, [4])])
def test_a_cut_from_the_front_keeps_the_first_special_token(n, cut):
    """BERT's head reads [CLS], and a Llama without its <s> is another model."""
    tokenizer = word_tokenizer(WORDS, bos_token="<s>", eos_token="<|end|>")
    assert common.without_beginning(tokenizer, [4, 6, 7, 8], n) == cut
    assert common.without_beginning(tokenizer, [6, 7, 8], n) == [6, 7, 8][n:]


def test_a_token_that_the_model_does_not_embed(tmp_path):
    """Chat tokens that were added without resizing; a pad token like that is harmless."""
    tokenizer = word_tokenizer(WORDS, CHAT, eos_token="<|end|>")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path)
    llama(vocab_size=9).save_pretrained(tmp_path)
    ours = common.load_tokenizer(str(tmp_path))
    assert common.encode(ours, [common.render(ours, "a", "b")]) == [[2, 6, 1, 3, 7, 1]]
    refuses(lambda: common.encode(ours, ["a <pad>"]), tmp_path, "'<pad>' (id 9)", "embeds 9", "resize")


@pytest.mark.parametrize("pad_token_id", [-1, 40, 1000, None])
def test_a_pad_id_out_of_range(tmp_path, pad_token_id):
    model = llama()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": pad_token_id}))
    loaded = modeling.load_causal_lm(str(tmp_path), "cpu")
    ids = torch.arange(5, 15)[None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_a_tokenizer_with_neither_pad_nor_end_of_sequence(tokenizer):
    """Completions then end at the length limit."""
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.chat_template = None
    policy = llama(vocab_size=len(tokenizer))
    policy.generation_config.eos_token_id = policy.config.eos_token_id = None
    assert common.eos_token_ids(policy, tokenizer).tolist() == []
    rows = [{"prompt_ids": ids} for ids in common.encode(tokenizer, ["what is a cat ?", "why ?"])]
    assert evaluation.sample_with_generate(policy, rows, tokenizer, 4).truncated.all()
    assert dpo.end_once([5, 6], [], None) == [5, 6]


def test_the_same_tokens_but_for_padding():
    ours, theirs, other = (word_tokenizer(words, eos_token="<|end|>") for words in (
        WORDS, WORDS, WORDS[:-2] + ["c", "b"]))
    theirs.add_special_tokens({"pad_token": "<|pad|>"})
    assert common.same_tokens(ours, theirs) and common.same_tokens(theirs, ours)
    assert not common.same_tokens(ours, other)
    theirs.add_tokens(["new"])
    assert common.same_tokens(ours, theirs) and not common.same_tokens(theirs, ours)
