"""What must hold for any rows, lengths and masks, however odd (hypothesis)."""
import gzip
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import modeling
import dpo
import grpo
import ppo
import reinforce
from helpers.unit import word_tokenizer

settings.register_profile("suite", max_examples=60, deadline=None)
settings.load_profile("suite")
# hypothesis takes strings from the code, too; these marks make a text a transcript (test_rows.py)
TEXT = st.text(max_size=300).filter(lambda text: "\n\nHuman:" not in text and "\n\nAssistant:" not in text)
PROMPT = TEXT.filter(str.strip)
TURNS = st.lists(PROMPT, min_size=1, max_size=4).map(
    lambda texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)])
ASKED = PROMPT | TURNS.filter(lambda turns: len(turns) % 2 == 1)  # ends with the user's turn


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


@pytest.fixture(scope="module")
def policy():
    return modeling.load_causal_lm("tiny/policy", "cpu").eval()


# --- rows and tokens

@given(st.lists(st.tuples(ASKED, TEXT), min_size=1, max_size=5), st.booleans(), st.booleans())
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
def test_a_prompt_inside_both_answers_is_split_off_and_nothing_is_lost(prompt, chosen, rejected):
    whole = [f"\n\nHuman: {prompt}\n\nAssistant:{answer}" for answer in (chosen, rejected)]
    beginning, *answers = common.split_pair("row", *whole)
    assert [beginning + answer for answer in answers] == whole and beginning.endswith("\n\nAssistant:")


@given(st.lists(ASKED, min_size=1, max_size=4))
def test_any_prompt_has_tokens(tokenizer, prompts):
    rows = common.encode(tokenizer, [common.render(tokenizer, prompt) for prompt in prompts])
    assert all(rows)
    # the same as alone
    assert rows[0] == common.encode(tokenizer, [common.render(tokenizer, prompts[0])])[0]


def test_very_long_rows_are_read_whole_and_their_skipping_is_printed(folder, tokenizer, capsys):
    rows = [{"prompt": "cat " * 100_000}, {"prompt": "a ?"}]
    read = common.read_prompts(written(folder, rows, False, True))
    assert read == rows
    kept = common.encode_prompts(tokenizer, read, "rows", 100, 50)
    assert [row["prompt"] for row in kept] == ["a ?"] and "skipped 1 of 2 rows" in capsys.readouterr().out


@given(st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=6), st.sampled_from(["left", "right"]),
       st.integers(0, 9))
def test_padding_keeps_each_row_and_the_mask_counts_it(rows, side, pad_id):
    ids, mask = common.pad(rows, side, pad_id=pad_id)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    for row, i, m in zip(rows, ids, mask):
        assert i[m.bool()].tolist() == row and (i[m == 0] == pad_id).all()
        edge = m.flip(0) if side == "left" else m
        assert edge.tolist() == sorted(edge.tolist(), reverse=True)  # no gap


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 2000))
def test_micro_batches_have_every_row_once_within_their_limits(lengths, tokens):
    lengths = torch.tensor(lengths)
    parts = common.micro_batches(lengths, tokens)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(lengths)))
    for part in parts:
        longest = int(lengths[part].max())
        assert len(part) == 1 or longest * len(part) <= tokens
        assert int(lengths[part].min()) >= 0.7 * longest
    assert [int(lengths[part].max()) for part in parts] == sorted((int(lengths[p].max()) for p in parts), reverse=True)


WORDS = word_tokenizer(["<end>"] + [f"w{i}" for i in range(10)], eos_token="<end>", pad_token="<end>")
IDS = st.lists(st.integers(1, 10), max_size=40)


@given(IDS.filter(len), st.lists(IDS, min_size=2, max_size=2, unique_by=tuple), st.integers(2, 60))
def test_cut_pairs_fit_and_keep_the_prompts_end_and_the_answers_beginning(prompt, answers, longest):
    def text(ids):
        return "".join(f" w{i - 1}" for i in ids)
    row = {"prompt": text(prompt), "chosen": text(answers[0]), "rejected": text(answers[1])}
    try:
        pair, = dpo.encode_pairs(WORDS, [row], "rows", longest, [0])
    except modeling.UserError:  # only what is cut off differs, or one answer begins with the other
        n = longest - min(len(prompt), longest // 2)
        assert (answers[0] + [0])[:n] == (answers[1] + [0])[:n]
        return
    short, kept = pair["prompt_ids"], [pair["chosen_ids"], pair["rejected_ids"]]
    answers = [answer + [0] for answer in answers]
    assert len(short) + max(map(len, kept)) <= longest and short and all(kept)
    assert short == prompt[-len(short):] and all(b == a[:len(b)] for a, b in zip(answers, kept))
    if len(prompt) + max(map(len, answers)) <= longest:
        assert (short, kept) == (prompt, answers)


# --- masks

MASKS = st.lists(st.integers(0, 7), min_size=1, max_size=6).map(
    lambda lengths: torch.tensor([[int(t < n) for t in range(7)] for n in lengths]))


@given(MASKS, st.integers(0, 2**31))
def test_for_any_mask_means_and_advantages_are_finite_and_zero_outside(mask, seed):
    values = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spoiled = values.masked_fill(mask == 0, 1e6)  # what is outside must not count
    for some in (values, spoiled):
        whitened = common.masked_whiten(some, mask)
        assert whitened.isfinite().all() and (whitened[mask == 0] == 0).all()
    assert torch.allclose(common.masked_mean(values, mask), common.masked_mean(spoiled, mask))
    assert torch.allclose(common.masked_whiten(values, mask), common.masked_whiten(spoiled, mask))
    advantages, returns = ppo.gae(values * mask, values * mask, mask, 1.0, 0.95)
    assert advantages.isfinite().all() and (advantages[mask == 0] == 0).all() and (returns[mask == 0] == 0).all()
    for loss_type in ("grpo", "dapo", "dr_grpo", "gspo", "cispo"):
        weights = grpo.token_weights(mask, loss_type, 7)
        assert weights.isfinite().all() and (weights[mask == 0] == 0).all()
        assert loss_type == "dr_grpo" or math.isclose(weights.sum(), float(mask.any()), abs_tol=1e-6)
    rewards = values[:, 0].masked_fill(values[:, 1] > 1, float("nan"))
    for kl_per_token in (False, True):
        for whiten in (False, True):
            advantages = reinforce.token_advantages(rewards, rewards * 0, spoiled, mask, 0.1, kl_per_token, whiten)
            assert advantages.isfinite().all() and (advantages[mask == 0] == 0).all()
            assert (advantages[rewards.isnan()] == 0).all()


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=5), st.integers(0, 2**31))
def test_log_probs_are_those_of_each_row_alone(policy, rows, seed):
    """Whatever the lengths in the batch, and whatever is in the padding."""
    generator = torch.Generator().manual_seed(seed)
    prompts, answers = ([torch.randint(5, 100, (row[i],), generator=generator).tolist() for row in rows]
                        for i in (0, 1))
    prompt_ids, prompt_mask = common.pad(prompts, "left", pad_id=3)
    ids, mask = common.pad(answers, "right", pad_id=4)
    with torch.no_grad():
        logprobs, entropy = common.completion_logprobs(policy, prompt_ids, prompt_mask, ids, mask)
        for i, (prompt, answer) in enumerate(zip(prompts, answers)):
            logits = policy(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
            alone = logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
            assert torch.allclose(logprobs[i, :len(answer)], alone, atol=2e-5)
            assert torch.allclose(entropy[i, :len(answer)], -(logits.exp() * logits).sum(-1), atol=2e-5)
    assert (logprobs[mask == 0] == 0).all() and (entropy[mask == 0] == 0).all()
