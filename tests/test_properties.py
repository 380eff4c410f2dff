"""For any rows and any masks: what must hold however odd they are (hypothesis)."""
import gzip
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import dpo
import grpo
import ppo

settings.register_profile("suite", max_examples=60, deadline=None)
settings.load_profile("suite")
TEXT = st.text(max_size=300)
PROMPT = TEXT.filter(str.strip)
TURNS = st.lists(PROMPT, min_size=1, max_size=4).map(
    lambda texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)])


def written(folder, rows: list[dict], ascii_only: bool, zipped: bool) -> str:
    path = folder / ("rows.jsonl.gz" if zipped else "rows.jsonl")
    with (gzip.open if zipped else open)(path, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=ascii_only) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def tokenizer():
    return common.load_tokenizer("tiny/policy")


@given(st.lists(st.tuples(PROMPT | TURNS.filter(lambda turns: len(turns) % 2 == 1), TEXT), min_size=1, max_size=5),
       st.booleans(), st.booleans())
def test_prompts_are_read_as_they_were_written(folder, rows, ascii_only, zipped):
    rows = [{"prompt": prompt, "other": other} for prompt, other in rows]
    assert common.read_prompts(written(folder, rows, ascii_only, zipped)) == rows


@given(st.lists(st.tuples(PROMPT, TEXT, TEXT), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_pairs_are_read_as_they_were_written_empty_answers_too(folder, rows, ascii_only, as_turns):
    def answer(text):
        return [{"role": "assistant", "content": text}] if as_turns else text
    read = common.read_pairs(written(folder, [
        {"prompt": p, "chosen": answer(a), "rejected": answer(b)} for p, a, b in rows], ascii_only, False))
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in read] == rows


@given(PROMPT, TEXT, TEXT)
def test_a_prompt_inside_both_answers_is_cut_off_and_nothing_lost(prompt, chosen, rejected):
    whole = [f"\n\nHuman: {prompt}\n\nAssistant:{answer}" for answer in (chosen, rejected)]
    beginning, *answers = common.split_pair("row", *whole)
    assert [beginning + answer for answer in answers] == whole and beginning.endswith("\n\nAssistant:")


@given(st.lists(PROMPT | TURNS.filter(lambda turns: len(turns) % 2 == 1), min_size=1, max_size=4))
def test_any_prompt_becomes_tokens(tokenizer, prompts):
    rows = common.encode(tokenizer, [common.render(tokenizer, prompt) for prompt in prompts])
    assert all(rows)
    # beside another row, and padded, it is what it is alone
    assert rows[0] == common.encode(tokenizer, [common.render(tokenizer, prompts[0])])[0]


def test_very_long_rows_are_read_whole_and_left_out_aloud(folder, tokenizer, capsys):
    rows = [{"prompt": "cat " * 100_000}, {"prompt": "a ?"}]
    read = common.read_prompts(written(folder, rows, False, True))
    assert read == rows
    kept, prompts = common.encode_prompts(tokenizer, read, "rows", 100, 50)
    assert kept == rows[1:] and len(prompts) == 1 and "left out 1 of 2 rows" in capsys.readouterr().out


def test_half_a_character_is_named(folder, capsys):
    """JSON can spell a lone surrogate, which no text has and no tokenizer takes."""
    path = folder / "half.jsonl"
    path.write_text('{"prompt": "fine \\ud83d\\ude00"}\n{"prompt": "broken \\ud83d"}\n')
    with pytest.raises(SystemExit) as stop:
        common.read_prompts(str(path))
    assert stop.value.code == 2 and f"{path}:2: holds half a character" in capsys.readouterr().err


@given(st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=6), st.sampled_from(["left", "right"]))
def test_padding_keeps_each_row_and_the_mask_counts_it(rows, side):
    ids, mask = common.pad(rows, 0, side)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    for row, i, m in zip(rows, ids, mask):
        assert i[m.bool()].tolist() == row
        edge = m.flip(0) if side == "left" else m
        assert edge.tolist() == sorted(edge.tolist(), reverse=True)  # no hole


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 20), st.integers(1, 2000))
def test_micro_batches_hold_every_row_once_within_their_limits(lengths, size, tokens):
    lengths = torch.tensor(lengths)
    parts = common.micro_batches(lengths, size, tokens)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(lengths)))
    for part in parts:
        longest = int(lengths[part].max())
        assert len(part) <= size and (len(part) == 1 or longest * len(part) <= tokens)
        assert int(lengths[part].min()) >= 0.7 * longest
    assert [int(lengths[part].max()) for part in parts] == sorted((int(lengths[p].max()) for p in parts), reverse=True)


@given(st.lists(st.integers(1, 500), min_size=2, max_size=60), st.integers(1, 20), st.integers(1, 2000), st.integers(2, 5))
def test_processes_share_every_row_and_pass_equally_often(lengths, size, tokens, n):
    """Each row is one process's; all have as many micro-batches, and none an empty one; items likewise."""
    n, lengths = min(n, len(lengths)), torch.tensor(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "ranks", lambda: n)
        per_process, items = [], []
        for rank in range(n):
            patch.setattr(common, "rank", lambda: rank)
            per_process.append(common.micro_batches(lengths, size, tokens))
            items.append(common.share(list(range(len(lengths)))))
            alone = common.micro_batches(lengths, size, tokens, shared=False)
            assert sorted(torch.cat(alone).tolist()) == list(range(len(lengths)))
    assert len({len(parts) for parts in per_process}) == 1
    assert all(len(part) for parts in per_process for part in parts)
    assert sorted(i for parts in per_process for part in parts for i in part.tolist()) == list(range(len(lengths)))
    assert sum(items, []) == list(range(len(lengths))) and max(map(len, items)) - min(map(len, items)) <= 1


def test_too_few_rows_for_the_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(common, "ranks", lambda: 3)
    common.enough(3, "--pairs-per-step")
    with pytest.raises(SystemExit) as stop:
        common.enough(2, "--pairs-per-step")
    assert stop.value.code == 2 and "--pairs-per-step: 2 are too few for 3 processes" in capsys.readouterr().err


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=40),
       min_size=2, max_size=2), st.integers(2, 60))
def test_cut_pairs_fit_and_keep_the_prompts_end_and_the_answers_beginning(prompt, answers, longest):
    short, shorter = dpo.cut(prompt, answers, longest)
    assert len(short) + max(map(len, shorter)) <= longest and short and all(shorter)
    assert short == prompt[-len(short):] and all(b == a[:len(b)] for a, b in zip(answers, shorter))
    if len(prompt) + max(map(len, answers)) <= longest:
        assert (short, shorter) == (prompt, answers)


MASKS = st.lists(st.integers(0, 7), min_size=1, max_size=6).map(
    lambda lengths: torch.tensor([[int(t < n) for t in range(7)] for n in lengths]))


@given(MASKS, st.integers(0, 2**31))
def test_whatever_the_mask_means_and_advantages_are_finite_and_zero_outside(mask, seed):
    values = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spoiled = values.masked_fill(mask == 0, 1e6)  # what is outside has no say
    for of in (values, spoiled):
        whitened = common.masked_whiten(of, mask)
        assert whitened.isfinite().all() and (whitened[mask == 0] == 0).all()
    assert torch.allclose(common.masked_mean(values, mask), common.masked_mean(spoiled, mask))
    assert torch.allclose(common.masked_whiten(values, mask), common.masked_whiten(spoiled, mask))
    advantages, returns = ppo.gae(values * mask, values * mask, mask, 1.0, 0.95)
    assert advantages.isfinite().all() and (advantages[mask == 0] == 0).all() and (returns[mask == 0] == 0).all()
    for loss_type in ("grpo", "dapo", "dr_grpo"):
        weights = grpo.token_weights(mask, loss_type, 7)
        assert weights.isfinite().all() and (weights[mask == 0] == 0).all()
        assert loss_type == "dr_grpo" or math.isclose(weights.sum(), float(mask.any()), abs_tol=1e-6)


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=5), st.integers(0, 2**31))
def test_log_probs_are_those_of_each_row_alone(rows, seed):
    """Whatever the lengths beside it, and whatever stands in the padding."""
    model = test_log_probs_are_those_of_each_row_alone.model
    generator = torch.Generator().manual_seed(seed)
    prompts, answers = ([torch.randint(5, 100, (row[i],), generator=generator).tolist() for row in rows] for i in (0, 1))
    prompt_ids, prompt_mask = common.pad(prompts, 3, "left")
    ids, mask = common.pad(answers, 4, "right")
    with torch.no_grad():
        logprobs, entropy = common.completion_logprobs(model, prompt_ids, prompt_mask, ids, mask)
        for i, (prompt, answer) in enumerate(zip(prompts, answers)):
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
            alone = logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
            assert torch.allclose(logprobs[i, :len(answer)], alone, atol=2e-5)
            assert torch.allclose(entropy[i, :len(answer)], -(logits.exp() * logits).sum(-1), atol=2e-5)
    assert (logprobs[mask == 0] == 0).all() and (entropy[mask == 0] == 0).all()


test_log_probs_are_those_of_each_row_alone.model = None


@pytest.fixture(autouse=True, scope="module")
def policy():
    test_log_probs_are_those_of_each_row_alone.model, _ = common.load_model(
        grpo.AutoModelForCausalLM, "tiny/policy", "cpu")
