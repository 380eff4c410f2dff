"""reward_model.py: its loss and its metrics by hand, how pairs become tokens, its head, and the zero of its scale."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import modeling
import reward_model
from helpers.unit import PAIRS, close, gpt2, llama, make_run, qwen2, refuses, word_tokenizer
from reward_model import encode_pairs


# --- pair_loss, calibration_error, correlation

def test_pair_loss_against_its_formula():
    chosen, rejected = torch.tensor([1.0, -0.5, 3.0]), torch.tensor([0.0, 1.0, 3.0])
    margin = torch.tensor([0.0, 0.5, 1.0])
    for smoothing, centering in ((0.0, 0.0), (0.1, 0.0), (0.2, 0.01)):
        loss = reward_model.pair_loss(chosen, rejected, margin, smoothing, centering)
        for i, (c, r, m) in enumerate(zip(chosen.tolist(), rejected.tolist(), margin.tolist())):
            right, swapped = (math.log1p(math.exp(-(d - m))) for d in (c - r, r - c))
            expected = (1 - smoothing) * right + smoothing * swapped + centering * (c + r) ** 2
            assert loss[i].item() == pytest.approx(expected, rel=1e-5)
    one = reward_model.pair_loss(torch.tensor([1.1]), torch.zeros(1), 1.0, 0.2)
    assert one.item() == pytest.approx(0.958, abs=1e-3)  # over pairs of which a fifth is swapped


def test_pair_loss_recovers_the_bradley_terry_probability():
    """Over many labels of one pair, the minimum is where sigmoid(r_w - r_l) is the fraction that chose it."""
    z = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], line_search_fn="strong_wolfe", max_iter=50)
    zero = torch.zeros(1)

    def closure():
        optimizer.zero_grad()
        loss = 0.8 * reward_model.pair_loss(z, zero).sum() + 0.2 * reward_model.pair_loss(zero, z).sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    assert z.sigmoid().item() == pytest.approx(0.8, abs=1e-4)


def test_calibration_error():
    sure = torch.tensor([0.9] * 10)  # says 0.9 and is always right: off by 0.1
    assert reward_model.calibration_error(sure) == pytest.approx(0.1, abs=1e-6)
    honest = torch.tensor([0.75] * 3 + [0.25])  # the chosen one had 0.75, three times of four
    assert reward_model.calibration_error(honest) == pytest.approx(0.0, abs=1e-6)
    assert reward_model.calibration_error(torch.cat([sure, honest])) == pytest.approx(0.1 * 10 / 14, abs=1e-6)


def test_correlation_against_numpy():
    a, b = torch.randn(50), torch.randn(50)
    assert reward_model.correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-5)
    assert reward_model.correlation(a, torch.ones(50)) == 0.0


# --- load_scorer

def test_a_new_head_starts_with_std_one_over_the_root_of_d_plus_one(tokenizer, monkeypatch):
    calls, normal = [], torch.nn.init.normal_
    monkeypatch.setattr(torch.nn.init, "normal_", lambda *a, **k: calls.append((
        tuple(a[0].shape) if a else (), k)) or normal(*a, **k))
    model = reward_model.load_scorer("tiny/policy", tokenizer, "cpu")
    assert ((1, 128), {"std": 129 ** -0.5}) in calls
    assert model.score.weight.std().item() == pytest.approx(129 ** -0.5, rel=0.3)


def test_a_reward_model_keeps_its_head(tokenizer, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "normal_", lambda *a, **k: a[0])
    plain = common.load_reward("tiny/reward_model", "cpu").model
    model = reward_model.load_scorer("tiny/reward_model", tokenizer, "cpu")
    assert torch.equal(model.score.weight, plain.score.weight)


def test_a_pad_token_that_is_the_end_of_sequence_is_replaced(tmp_path):
    """transformers reads the score before the first pad token, so an answer's end would not be read."""
    tokenizer = word_tokenizer([f"w{i}" for i in range(38)] + ["<unk>", "<end>"], eos_token="<end>", pad_token="<end>")
    llama().save_pretrained(tmp_path)
    model = reward_model.load_scorer(str(tmp_path), tokenizer, "cpu").eval()
    assert tokenizer.pad_token == "<|pad|>" and model.config.pad_token_id == tokenizer.pad_token_id == 40
    assert model.get_input_embeddings().num_embeddings == 41
    ids = [5, 6, tokenizer.eos_token_id]
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state
        expected = model.score(hidden[0, -1])
        # also for whoever loads it with transformers alone, in a padded batch
        padded = torch.tensor([ids + [40, 40]])
        close(model(padded, attention_mask=(padded != 40).long()).logits[0], expected, rtol=1e-4, atol=1e-5)
    close(common.score_ids(model, [ids, ids * 3])[:1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [llama, gpt2, qwen2])
def test_rows_of_one_prompt_share_its_forward_pass(make, tmp_path, monkeypatch):
    """Scores and gradients are those of each row alone, in float64; one row may be the beginning of another."""
    make().save_pretrained(tmp_path)
    tokenizer = word_tokenizer([f"w{i}" for i in range(38)] + ["<unk>", "<end>"], eos_token="<end>", pad_token="<unk>")
    model = reward_model.load_scorer(str(tmp_path), tokenizer, "cpu").double()
    rows = [[5, 6, 7, 8, 9], [5, 6, 7, 8], [11, 12, 13], [5, 6, 7, 10, 9, 8], [14, 15, 16, 17], [11, 12, 18]]
    weights = torch.tensor([1.0, 2.0, -3.0, 0.5, 1.5, -1.0])
    found = []
    for prompts in ((), ["a", "a", "b", "a", "c", "b"]):
        monkeypatch.setattr(modeling, "sharing_pays", lambda *sizes: len(prompts) > 0)
        model.zero_grad()
        seen = []
        hook = model.base_model.register_forward_hook(lambda module, inputs, output: seen.append(
            output[0].shape[:2].numel()))
        scores = common.score_ids(model, rows, prompts)
        hook.remove()
        (scores * weights).sum().backward()
        found.append((scores.detach(), torch.cat([p.grad.flatten() for p in model.parameters()]), sum(seen)))
    alone = torch.cat([common.score_ids(model, [row]).detach() for row in rows])
    close(found[0][0], alone, rtol=0, atol=1e-5)
    close(found[1][0], alone, rtol=0, atol=1e-5)
    different = [[5, 6], [7, 8]], ["a", "a"]  # no token in common
    close(common.score_ids(model, *different).detach(), common.score_ids(model, different[0]).detach(), rtol=0, atol=1e-6)
    model.config.pad_token_id = 9  # transformers reads before a row's last pads
    close(common.score_ids(model, rows, ["a", "a", "b", "a", "c", "b"]).detach(),
          torch.cat([common.score_ids(model, [row]).detach() for row in rows]), rtol=0, atol=1e-5)
    assert (found[0][1] - found[1][1]).norm() < 1e-5 * found[0][1].norm() and found[1][2] < found[0][2]


# --- pairs and their tokens

def test_a_pair_is_two_whole_conversations(tokenizer):
    pairs = encode_pairs(tokenizer, PAIRS[:3], "rows", 192, "")
    for row, pair in zip(PAIRS, pairs):
        prompt, chosen, rejected = common.encode(tokenizer, [
            common.render(tokenizer, row["prompt"], *answer) for answer in ([], [row["chosen"]], [row["rejected"]])])
        assert (pair["chosen_ids"], pair["rejected_ids"]) == (chosen, rejected)
        assert pair["prompt_length"] == len(prompt) and chosen[:len(prompt)] == prompt
        assert {k: pair[k] for k in row} == row


def test_equal_pairs_are_left_out_and_counted(tokenizer, capsys):
    same = {"prompt": "what is green and green ?", "chosen": "it is white .", "rejected": "it is white ."}
    pairs = encode_pairs(tokenizer, [same, same] + PAIRS, "rows", 192, "")
    assert len(pairs) == len(PAIRS)
    assert f"of {len(PAIRS) + 2} pairs, 0 were cut to 192 tokens, and 2 left out" in capsys.readouterr().out
    encode_pairs(tokenizer, PAIRS, "rows", 192, "")
    assert capsys.readouterr().out == ""
    refuses(lambda: encode_pairs(tokenizer, [same], "rows", 192, ""), "rows: no pair is left")


def test_pairs_that_a_cut_makes_equal_are_left_out(tokenizer, capsys):
    """The difference is lost with the beginning, so there is nothing to choose between."""
    early = {"prompt": "what is green and green ?", "chosen": "white . " + "it is good . " * 30,
             "rejected": "one . " + "it is good . " * 30}
    assert len(encode_pairs(tokenizer, [early] + PAIRS, "rows", 40, "")) == len(PAIRS)
    out = capsys.readouterr().out
    assert "1 were cut to 40 tokens" in out and "1 left out because their answers are equal" in out


def test_a_cut_takes_the_same_beginning_from_both(tokenizer):
    """So that both answers follow the same prompt; an answer that is too long alone loses its own beginning."""
    rows = [{"prompt": "what is it ? " * 10, "chosen": "it is water .", "rejected": "no ."},
            {"prompt": "what is it ?", "chosen": "it is good . " * 12, "rejected": "no ."}]
    whole, cut = (encode_pairs(tokenizer, rows, "rows", longest, "") for longest in (192, 30))
    n = len(whole[0]["chosen_ids"]) - 30
    assert cut[0]["chosen_ids"] == whole[0]["chosen_ids"][n:] and len(cut[0]["chosen_ids"]) == 30
    assert cut[0]["rejected_ids"] == whole[0]["rejected_ids"][n:]
    assert cut[0]["prompt_length"] == whole[0]["prompt_length"] - n
    assert cut[1]["chosen_ids"] == whole[1]["chosen_ids"][-30:] and cut[1]["prompt_length"] == 0
    assert cut[1]["rejected_ids"] == whole[1]["rejected_ids"][whole[1]["prompt_length"]:]


def test_the_margin_is_a_column(tokenizer):
    rows = [{**row, "gap": i / 2} for i, row in enumerate(PAIRS[:3])]
    assert [pair["margin_of_pair"] for pair in encode_pairs(tokenizer, rows, "rows", 192, "gap")] == [0, 0.5, 1]
    assert [pair["margin_of_pair"] for pair in encode_pairs(tokenizer, rows, "rows", 192, "")] == [0, 0, 0]
    for bad in (None, "1"):
        rows[1]["gap"] = bad
        refuses(lambda: encode_pairs(tokenizer, rows, "rows", 192, "gap"),
                "rows: the column 'gap' must hold a number")


# --- scores, gradients and metrics

@pytest.fixture
def model(tokenizer):
    return reward_model.load_scorer("tiny/policy", tokenizer, "cpu").eval()


@pytest.fixture
def pairs(tokenizer):
    return encode_pairs(tokenizer, PAIRS[:12], "rows", 192, "")


def test_scores_are_those_of_each_conversation_alone(model, pairs):
    with torch.no_grad():
        found = reward_model.score_pairs(model, pairs, make_run())
        for side, scores in zip(("chosen_ids", "rejected_ids"), found):
            for pair, score in zip(pairs, scores):
                hidden = model.model(torch.tensor([pair[side]])).last_hidden_state
                assert score.item() == pytest.approx(model.score(hidden[0, -1]).item(), abs=1e-4)
    assert reward_model.pair_length(pairs[0]) == 2 * max(len(pairs[0][k]) for k in ("chosen_ids", "rejected_ids"))


def test_micro_batches_change_no_gradient(model, pairs):
    """With a margin and centering, as in main's step 2."""
    def gradient(groups):
        model.zero_grad()
        for group in groups:
            margin = torch.tensor([float(len(pair["chosen"]) % 3) for pair in group])
            loss = reward_model.pair_loss(*reward_model.score_pairs(model, group, make_run()), margin, 0.1, 0.01)
            (loss.sum() / len(pairs)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    whole, parts = gradient([pairs]), gradient([pairs[:1], pairs[1:6], pairs[6:]])
    assert whole.norm() > 1e-4 and (parts - whole).norm() / whole.norm() < 1e-3


def test_metrics_of_held_out_pairs(tokenizer):
    """By kind, by which answer is longer, and over all, against the scores of common.load_reward; micro-batches
    change nothing."""
    rows = [json.loads(line) for line in Path("tiny/preferences.jsonl").read_text().splitlines()][-120:]
    model = reward_model.load_scorer("tiny/reward_model", tokenizer, "cpu")
    pairs = encode_pairs(tokenizer, rows, "rows", 192, "")
    runs = [make_run(reward_model.Args(device="cpu", eval_by="kind", micro_batch_tokens=n)) for n in (8192, 300)]
    found, others = ({k: float(v) for k, v in reward_model.evaluate(model.train(), pairs, run).items()} for run in runs)
    assert not model.training and found == pytest.approx(others, abs=1e-4)
    reward = common.load_reward("tiny/reward_model", "cpu")
    chosen, rejected = (reward(rows, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    right = (chosen > rejected).float()
    assert found["accuracy"] == pytest.approx(right.mean().item(), abs=1e-6)
    assert found["loss"] == pytest.approx(-(chosen - rejected).sigmoid().log().mean().item(), abs=1e-4)
    scores = torch.cat([chosen, rejected])
    assert found["reward"] == pytest.approx(scores.mean().item(), abs=1e-4)
    assert found["reward_std"] == pytest.approx(scores.std().item(), abs=1e-4)
    assert found["ece"] == pytest.approx(reward_model.calibration_error((chosen - rejected).sigmoid()), abs=1e-4)
    kinds = sorted({row["kind"] for row in rows})
    assert len(kinds) > 2
    for kind in kinds:
        here = torch.tensor([row["kind"] == kind for row in rows])
        assert found[f"accuracy_{kind}"] == pytest.approx(right[here].mean().item(), abs=1e-6)
    lengths = [torch.tensor([len(tokenizer(row[k].strip(), add_special_tokens=False).input_ids) for row in rows])
               for k in ("chosen", "rejected")]
    assert found["accuracy_longer"] == pytest.approx(right[lengths[0] > lengths[1]].mean().item(), abs=1e-6)
    assert found["accuracy_shorter"] == pytest.approx(right[lengths[0] < lengths[1]].mean().item(), abs=1e-6)
    assert found["length_correlation"] == pytest.approx(np.corrcoef(scores, torch.cat(lengths))[0, 1], abs=1e-4)


def test_ties_count_half(tokenizer, pairs):
    model = reward_model.load_scorer("tiny/policy", tokenizer, "cpu")
    torch.nn.init.zeros_(model.score.weight)
    found = reward_model.evaluate(model, pairs, make_run(reward_model.Args(device="cpu")))
    assert found["accuracy"] == 0.5 and not any(name.startswith("accuracy_g") for name in found)


# --- center

def test_the_mean_score_of_the_references_completions_becomes_zero(tokenizer, capsys):
    model = reward_model.load_scorer("tiny/reward_model", tokenizer, "cpu")
    model.config.reward_bias = 3.0  # an earlier bias is replaced
    reference = modeling.load_causal_lm("tiny/policy", "cpu")
    prompts = common.encode_prompts(tokenizer, PAIRS * 5, "rows", 150)
    run = make_run(reward_model.Args(device="cpu", max_new_tokens=16))
    reward_model.center(model, tokenizer, reference, prompts, tokenizer, run)
    bias = model.config.reward_bias
    assert f"reward_bias {bias:.4f}" in capsys.readouterr().out and bias != 3.0

    def scores(seed):
        run.args.seed = seed
        run.generator(0)
        rollout = reward_model.sample_with_generate(reference, prompts, tokenizer, 16)
        assert 0 < rollout.truncated.sum() < len(prompts)  # these do not count
        return common.score_texts(model, tokenizer, [common.render(tokenizer, row["prompt"], text) for row, text, cut in
                                                     zip(prompts, rollout.texts, rollout.truncated) if not cut])
    assert scores(0).mean().item() == pytest.approx(0, abs=1e-4)  # the same completions
    fresh = scores(1)
    assert abs(fresh.mean()) < 0.35 * fresh.std() and fresh.std() > 0.05
