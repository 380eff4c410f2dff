"""common.py: rows of data, in the forms that public data sets have."""
import gzip
import importlib.util
import json
import sys
import types
from types import SimpleNamespace

import pytest

import common
from helpers.unit import PAIRS, refuses, says, write

USER = [{"role": "user", "content": "is it so ?"}]
TURNS = [{"role": "system", "content": "be short"}, *USER,
         {"role": "assistant", "content": "no"}, {"role": "user", "content": "sure ?"}]
SYSTEM, LAST = TURNS[:1], TURNS[-1:]
A = "\n\nHuman: a\n\nAssistant:"  # the beginning of a transcript


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_blank_lines_are_skipped_and_unicode_is_kept(tmp_path, name):
    text = "größer 🙂 \u2028 zwei"
    path = write(tmp_path / name, {"a": 1}, "", '{"a": "%s"}' % text, "  ", {"b": None})
    assert common.read_rows(path) == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": text}), (f"{path}:5", {"b": None})]


def test_prompts_may_be_strings_or_messages(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"prompt": "hi", "answer": 3}, {"prompt": TURNS})
    assert common.read_prompts(path) == [{"prompt": "hi", "answer": 3}, {"prompt": TURNS}]


def test_prompts_in_another_column(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"question": "hi", "prompt": "old", "answer": 3})
    assert common.read_prompts(path, "question") == [{"question": "hi", "prompt": "hi", "answer": 3}]


def test_prompts_of_pairs(tmp_path):
    """The prompt is inside both answers, in a column of its own, or in part in either: as read_pairs has it."""
    rows = [row for row, _ in FORMS.values()]
    path = write(tmp_path / "rows.jsonl", *rows)
    prompts = [row["prompt"] for row in common.read_prompts(path)]
    assert prompts == [row["prompt"] for row in common.read_pairs(path)]
    assert prompts == [prompt for _, (prompt, _, _) in FORMS.values()]
    path = write(tmp_path / "rows.jsonl", {"prompt": "hi", "chosen": None, "rejected": None})  # of a merged data set
    assert common.read_prompts(path)[0]["prompt"] == "hi"


FORMS = {  # name: row, (prompt, chosen, rejected)
    "strings": ({"prompt": "hi", "chosen": " b", "rejected": " c"}, ("hi", " b", " c")),
    "messages": ({"prompt": TURNS, "chosen": "b", "rejected": "c"}, (TURNS, "b", "c")),
    "answers as lists of one message": (
        {"prompt": USER, "chosen": says("b"), "rejected": says("c")}, (USER, "b", "c")),
    "string prompt, answers as lists of one message": (
        {"prompt": "hi", "chosen": says("b"), "rejected": says("c")}, ("hi", "b", "c")),
    "whole conversations": (
        {"chosen": TURNS + says("b"), "rejected": TURNS + says("c")}, (TURNS, "b", "c")),
    "whole conversations and a prompt": (  # UltraFeedback
        {"prompt": "is it so ?", "chosen": USER + says("b"), "rejected": USER + says("c")}, (USER, "b", "c")),
    "whole conversations, equal answers": (
        {"chosen": USER + says("b"), "rejected": USER + says("b")}, (USER, "b", "b")),
    "transcript": ({"chosen": A + " yes", "rejected": A + " no"}, (A, " yes", " no")),
    "transcript, answers with the same beginning": (  # split at the turn, not inside the answer
        {"chosen": A + " yes it is", "rejected": A + " yes it is not so"}, (A, " yes it is", " yes it is not so")),
    "transcript of several turns": (
        {"chosen": A + " b" + A + " well yes", "rejected": A + " b" + A + " well no"},
        (A + " b" + A, " well yes", " well no")),
    "transcript with two turns of the assistant": (
        {"chosen": A + " b\n\nAssistant: yes", "rejected": A + " b\n\nAssistant: no"},
        (A + " b\n\nAssistant:", " yes", " no")),
    "transcript with paragraphs in the answer": (
        {"chosen": A + " well\n\nyes", "rejected": A + " well\n\nno"}, (A, " well\n\nyes", " well\n\nno")),
    "plain strings, split at a space and not inside a word": (
        {"chosen": "the sky is blue", "rejected": "the sky is black"}, ("the sky is", " blue", " black")),
    # a prompt beside whole conversations: nothing is lost and nothing is there twice
    **{f"a prompt beside conversations: {name}": (
        {"prompt": prompt, "chosen": shared + says("b"), "rejected": shared + says("c")}, (whole, "b", "c"))
       for name, prompt, shared, whole in [
           ("none", None, TURNS, TURNS),
           ("the whole", TURNS, TURNS, TURNS),
           ("their beginning", TURNS[:2], TURNS, TURNS),
           ("their system prompt", SYSTEM, TURNS, TURNS),
           ("their first question", "is it so ?", TURNS, TURNS),
           ("their first question, with a space", "is it so ? ", TURNS, TURNS),
           ("their last question", "sure ?", TURNS, TURNS),
           ("a system prompt before them", SYSTEM, USER, SYSTEM + USER),
           ("the history before them", TURNS[:3], LAST, TURNS),
           ("one that holds them", TURNS, LAST, TURNS),
           ("one that overlaps", TURNS[:2], TURNS[1:], TURNS),
           ("a question that they go on from", "is it so ?", TURNS[2:], TURNS[1:]),
           ("a transcript", A, [{"role": "user", "content": "a"}], [{"role": "user", "content": "a"}])]},
    "a prompt beside transcripts": ({"prompt": "a", "chosen": A + " b", "rejected": A + " c"}, (A, " b", " c")),
    "a transcript beside transcripts": ({"prompt": A, "chosen": A + " b", "rejected": A + " c"}, (A, " b", " c")),
    "a transcript beside answers": ({"prompt": A, "chosen": " b", "rejected": " c"}, (A, " b", " c")),
    "a system prompt beside transcripts": (
        {"prompt": SYSTEM, "chosen": A + " b", "rejected": A + " c"},
        (SYSTEM + [{"role": "user", "content": "a"}], " b", " c")),
    "an answer about transcripts": (  # messages have no turns inside
        {"prompt": USER, "chosen": says("it is" + A), "rejected": says("c")}, (USER, "it is" + A, "c")),
    "messages are compared by role and content": (
        {"prompt": [{**USER[0], "id": 1}], "chosen": [{**USER[0], "time": 2}, {**says("b")[0], "time": 4}],
         "rejected": [{**USER[0], "time": 3}, *says("c")]}, ([{**USER[0], "time": 2}], "b", "c")),
}


@pytest.mark.parametrize("name", FORMS)
def test_pairs(tmp_path, name):
    """Other columns are kept."""
    row, (prompt, chosen, rejected) = FORMS[name]
    path = write(tmp_path / "rows.jsonl", {**row, "margin": 2})
    assert common.read_pairs(path) == [{"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": 2}]


def in_parts(messages: list[dict]) -> list[dict]:
    """The same, each content as a list of two parts."""
    return [{**m, "content": [{"type": "text", "text": m["content"][:2]}, {"type": "text", "text": m["content"][2:]}]}
            for m in messages]


def test_parts_of_text_are_joined(tmp_path):
    path = write(tmp_path / "rows.jsonl", {
        "prompt": in_parts(SYSTEM), "chosen": in_parts(USER + says("b .")), "rejected": USER + in_parts(says("c ."))})
    row = {"prompt": SYSTEM + USER, "chosen": "b .", "rejected": "c ."}
    assert common.read_pairs(path) == [row]
    assert common.read_prompts(write(tmp_path / "rows.jsonl", {"prompt": in_parts(TURNS)})) == [{"prompt": TURNS}]


IMAGE = {"type": "image", "image": "cat.png"}


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("content", [
    None, 3, IMAGE, [{"type": "text", "text": "a"}, IMAGE], [{"type": "text", "text": None}]], ids=str)
def test_content_that_is_no_text_is_named(tmp_path, column, content):
    row = {"prompt": USER, "chosen": says("b"), "rejected": says("c")}
    row[column] = [{**row[column][0], "content": content}]
    path = write(tmp_path / "rows.jsonl", row)
    last = content[-1] if isinstance(content, list) else content
    words = f"{path}:1: '{column}': a message's content must be text, not {json.dumps(last)}"
    refuses(lambda: common.read_pairs(path), words)
    refuses(lambda: common.read_prompts(path), words)


@pytest.mark.parametrize("answer", [
    " b\n\nHuman: d\n\nAssistant: e", " b\n\nHuman: d", "\n\nHuman: d", " b\n\nAssistant: e"])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_transcripts_that_part_before_their_last_turn_are_left_out(tmp_path, capsys, side, answer):
    """A human's turn must not be trained as an answer. Anthropic's HH has such rows, so the others are kept."""
    fine, other = {"chosen": A + " b", "rejected": A + " c"}, {"chosen": A + " c", "rejected": A + " c"}
    path = write(tmp_path / "rows.jsonl", fine, {**other, side: A + answer}, fine,
                 {"prompt": A, "chosen": " c", "rejected": " c", side: answer})
    rows = common.read_pairs(path)
    assert rows == [{"prompt": A, "chosen": " b", "rejected": " c"}] * 2
    out = capsys.readouterr().out
    assert f"{path}: left out 2 pairs" in out and f"{path}:2" in out and out.count("\n") == 1


def test_pairs_with_the_prompt_in_another_column(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"question": "hi", "chosen": "b", "rejected": "c"})
    assert common.read_pairs(path, "question")[0]["prompt"] == "hi"


@pytest.mark.parametrize("row, words", [
    ('{"prompt": "a"', "not JSON"),
    ("nothing", "not JSON"),
    ("[1, 2]", "JSON object"),
    ('"text"', "JSON object"),
    ("3", "JSON object"),
    ({"question": "a"}, "only question"),
    ({"prompt": ""}, "'prompt' is missing or empty"),
    ({"prompt": " \n"}, "'prompt' is missing or empty"),
    ({"prompt": "\n\nHuman:"}, "'prompt' is missing or empty"),
    ({"prompt": []}, "not empty"),
    ({"prompt": None}, "'prompt' must be a string or a list of messages"),
    ({"prompt": 3}, "'prompt' must be a string or a list of messages"),
    ({"prompt": [{"role": "user"}]}, "messages"),
    ({"prompt": ["hi"]}, "messages"),
    ({"prompt": TURNS[:3]}, "ends with the assistant's turn"),
    ({"prompt": A + " b"}, "ends with the assistant's turn"),
    ({"chosen": USER, "rejected": "text"}, "'chosen'"),
    ({"chosen": 3, "rejected": "b"}, "'chosen' must be"),
])
def test_bad_prompts_name_their_line(tmp_path, row, words):
    path = write(tmp_path / "rows.jsonl", {"prompt": "fine"}, "", row)
    refuses(lambda: common.read_prompts(path), f"{path}:3:", words)


@pytest.mark.parametrize("row, words", [
    ({"prompt": "a", "chosen": "b"}, "'rejected'"),
    ({"prompt": "a", "completion": "b"}, "'chosen'"),
    ({"prompt": "a", "chosen": 3, "rejected": "b"}, "'chosen' must be a string or a list"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "'rejected' must be a string or a list"),
    ({"prompt": "a", "chosen": [], "rejected": "b"}, "not empty"),
    ({"prompt": "", "chosen": "b", "rejected": "c"}, "'prompt' is missing or empty"),
    ({"prompt": "", "chosen": "a b", "rejected": "a c"}, "'prompt' is missing or empty"),
    ({"prompt": [3], "chosen": "b", "rejected": "c"}, "messages"),
    ({"chosen": 3, "rejected": "b"}, "'chosen' must be a string or a list"),
    ({"chosen": "abc", "rejected": "abd"}, "beginning"),
    ({"chosen": "x", "rejected": "y"}, "beginning"),
    ({"chosen": USER + says("b"), "rejected": "text"}, "must both be"),
    ({"chosen": says("b"), "rejected": says("c")}, "'prompt' is missing or empty"),
    ({"chosen": USER + says("b"), "rejected": TURNS + says("c")}, "last message"),
    ({"chosen": TURNS + says("b"), "rejected": TURNS + says("c") + USER}, "last message"),
    # half of a conversation must not be taken for an answer
    ({"prompt": USER, "chosen": says("b"), "rejected": says("c") + USER + says("d")}, "last message"),
    ({"prompt": USER, "chosen": USER + says("b"), "rejected": "c"}, "last message"),
    # only the assistant's message is an answer
    ({"chosen": TURNS, "rejected": TURNS[:3] + USER}, "end with the assistant's turn"),
    ({"prompt": USER, "chosen": says("b"), "rejected": [{"role": "tool", "content": "c"}]},
     "end with the assistant's turn"),
    # and the prompt goes before it
    ({"prompt": TURNS[:3], "chosen": "b", "rejected": "c"}, "prompt ends with the assistant's turn"),
    ({"prompt": TURNS[:3], "chosen": says("b"), "rejected": says("c")}, "prompt ends with the assistant's turn"),
    ({"chosen": TURNS[:3] + says("b"), "rejected": TURNS[:3] + says("c")}, "prompt ends with the assistant's turn"),
    ({"prompt": A + " b", "chosen": "b", "rejected": "c"}, "prompt ends with the assistant's turn"),
    # these are two conversations
    ({"prompt": "what ?", "chosen": USER + says("b"), "rejected": USER + says("c")}, "do not continue 'prompt'"),
    ({"prompt": LAST, "chosen": SYSTEM + USER + says("b"), "rejected": SYSTEM + USER + says("c")},
     "do not continue 'prompt'"),
    ({"prompt": [{"role": "system", "content": "be long"}], "chosen": TURNS + says("b"),
      "rejected": TURNS + says("c")}, "do not continue 'prompt'"),
    ({"prompt": "what ?", "chosen": A + " b", "rejected": A + " c"}, "do not continue 'prompt'"),
])
def test_bad_pairs_name_their_line(tmp_path, row, words):
    fine = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write(tmp_path / "rows.jsonl", fine, "", row)
    refuses(lambda: common.read_pairs(path), f"{path}:3:", words)


ZIPPED = gzip.compress(b'{"prompt": "is it so ?"}\n' * 50, mtime=0)
UNREADABLE = {
    "empty.jsonl": b"", "blank.jsonl": b"\n \n",
    "latin.jsonl": '{"prompt": "größer"}\n'.encode("latin-1"),
    "utf-16.jsonl": '{"prompt": "a"}\n'.encode("utf-16"),
    "binary.jsonl": b"\x80\x00\xff\xfe\n",
    "text.jsonl.gz": b'{"prompt": "hi"}\n',
    "cut.jsonl.gz": ZIPPED[:-12],
    "method.jsonl.gz": ZIPPED[:2] + b"\xff" + ZIPPED[3:],
    "inside.jsonl.gz": ZIPPED[:10] + b"\xff" + ZIPPED[11:],  # an invalid block type
    "sum.jsonl.gz": ZIPPED[:-8] + b"\x00" * 4 + ZIPPED[-4:],
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files(tmp_path, name):
    (tmp_path / name).write_bytes(UNREADABLE[name])
    refuses(lambda: common.read_prompts(str(tmp_path / name)), tmp_path / name)


@pytest.mark.parametrize("name", ["missing.jsonl", "tiny/missing.jsonl", "a/b/c.jsonl"])
def test_missing_files(name):
    refuses(lambda: common.read_rows(name), name, "no such file")


@pytest.mark.parametrize("name", ["tests", ""])
def test_folders_are_no_files(name):
    refuses(lambda: common.read_rows(name), name, "not a file")


def test_a_lone_surrogate_is_reported_with_its_line(tmp_path):
    """JSON can spell half a character, which no tokenizer takes."""
    path = tmp_path / "half.jsonl"
    path.write_text('{"prompt": "fine \\ud83d\\ude00"}\n{"prompt": "broken \\ud83d"}\n')
    refuses(lambda: common.read_prompts(str(path)), f"{path}:2: holds half a character")


def test_hub_datasets(monkeypatch):
    """owner/name[[:config]:split]; without the library, or where the hub has none, one line says so."""
    calls, hub = [], types.ModuleType("datasets")

    def load_dataset(name, *config, split):
        calls.append((name, *config, split))
        if name == "no/such":
            raise RuntimeError("not found\nat all")
        return [{"prompt": "a"}, {"prompt": "b"}]
    hub.load_dataset, hub.__spec__ = load_dataset, importlib.util.spec_from_loader("datasets", None)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert common.read_rows("an/owner") == [("an/owner[0]", {"prompt": "a"}), ("an/owner[1]", {"prompt": "b"})]
    assert len(common.read_prompts("an/owner:test")) == len(common.read_prompts("an/owner:main:test")) == 2
    assert calls == [("an/owner", "train"), ("an/owner", "test"), ("an/owner", "main", "test")]
    refuses(lambda: common.read_rows("no/such"), "no/such: not read from the hub: not found")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuses(lambda: common.read_rows("an/owner:test"), "an/owner:test: no such file", "pip install datasets")


# --- training and held-out rows

def test_the_last_rows_are_held_out(tmp_path, tokenizer):
    path = write(tmp_path / "pairs.jsonl", *PAIRS)
    args = SimpleNamespace(data=path, eval_data="", eval_pairs=4, prompt_column="prompt")
    assert common.load_pairs(args, tokenizer) == (PAIRS[:-4], PAIRS[-4:])
    args.eval_pairs = len(PAIRS)
    refuses(lambda: common.load_pairs(args, tokenizer), f"{path}: {len(PAIRS)} rows", "--eval-pairs 30", "--eval-data")
    args.eval_data, args.eval_pairs = write(tmp_path / "other.jsonl", *PAIRS[:3]), 2
    assert common.load_pairs(args, tokenizer) == (PAIRS, PAIRS[:2])
    assert common.hold_out([1, 2], 0, "rows", "--flag") == ([1, 2], [])


def test_training_and_held_out_prompts_have_their_tokens(tmp_path, tokenizer):
    rows = [{"prompt": f"what is {n} ?"} for n in "a b c d e".split()]
    args = SimpleNamespace(model="tiny/policy", data=write(tmp_path / "rows.jsonl", *rows), eval_data="",
                           eval_prompts=2, prompt_column="prompt", max_new_tokens=8, max_prompt_tokens=0)
    train, held_out = common.load_prompts(args, tokenizer)
    assert [row["prompt"] for row in train + held_out] == [row["prompt"] for row in rows] and len(held_out) == 2
    for row in train + held_out:
        assert row["prompt_ids"] == common.encode(tokenizer, [common.render(tokenizer, row["prompt"])])[0]
    args.eval_data, args.eval_prompts = args.data, 1
    train, held_out = common.load_prompts(args, tokenizer)
    assert len(train) == 5 and held_out == train[:1]
    args.eval_prompts = 0
    assert common.load_prompts(args, tokenizer) == (train, [])
    args.eval_data = ""
    assert common.load_prompts(args, tokenizer) == (train, [])
    args.max_new_tokens = 190  # the context has 192
    refuses(lambda: common.load_prompts(args, tokenizer), "prompt 1, 'what is a ?', has ", "room for 2")
    args.eval_prompts = 5
    args.max_new_tokens = 8
    refuses(lambda: common.load_prompts(args, tokenizer), "5 rows", "--eval-prompts 5")
