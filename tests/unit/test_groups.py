"""common.py: several rewards, flat groups and their replacement, penalties on length, and what the sampler says."""
import types

import pytest
import torch

import common
import evaluation
import grpo
from helpers.unit import EOS, batch, llama, nan, refuses, word_tokenizer

WORDS = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(3, 40))]

ROWS = [{"prompt": "a"}, {"prompt": "b"}]
GROUPS = [row for row in ROWS for _ in range(3)]


def giving(*values):
    return lambda rows, completions: torch.tensor(values[:len(rows)], dtype=torch.float32)


def args(**flags):
    return types.SimpleNamespace(**dict(overlong_window=0, max_new_tokens=6) | flags)


def rollout(prompts, completions, sampler_logprobs=None):
    tokenizer = word_tokenizer(WORDS, eos_token="</s>", pad_token="<pad>")
    return common.Rollout(*batch(prompts, completions), tokenizer, torch.tensor([EOS]), sampler_logprobs)


# --- several rewards

@pytest.mark.parametrize("how, weights, expected", [
    ("sum", (), [3, 3, 1, nan]), ("sum", (2.0, -1.0), [0, 3, 2, nan]), ("min", (), [1, 0, 1, nan]),
    ("mean_minus_std", (), [1, 0, 1, nan]), ("min", (1.0, 0.25), [0.5, 0, 1, nan])])
def test_several_rewards_become_one(how, weights, expected):
    """By hand. What one leaves out the other decides; what both leave out has no score."""
    rewards = {"a": giving(1, 0, 1, nan), "b": giving(2, 3, nan, nan)}
    if weights == (2.0, -1.0):
        expected = [0, -3, 2, nan]
    scores = common.combine_rewards(rewards, weights, how)(ROWS * 2, ["x"] * 4)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32), equal_nan=True)
    assert list(scores.parts) == ["a", "b"] and scores.parts["b"][:2].tolist() == [2, 3]
    torch.testing.assert_close(scores.raw, scores, equal_nan=True)


def test_an_ensembles_spread_is_subtracted():
    """Three scores 1, 2, 6: mean 3, standard deviation sqrt(14 / 3)."""
    rewards = {name: giving(value) for name, value in zip("abc", (1.0, 2.0, 6.0))}
    score = common.combine_rewards(rewards, how="mean_minus_std")(ROWS[:1], ["x"])
    assert score.item() == pytest.approx(3 - (14 / 3) ** 0.5)


def test_rewards_are_normalized_within_their_groups():
    """GDPO: a reward of large numbers does not drown another; weights come after; the score before is kept."""
    large, small = [100.0, 300.0, 200.0, 5.0, 5.0, 5.0], [0.0, 0.0, 1.0, 1.0, nan, 0.0]
    rewards = {"large": giving(*large), "small": giving(*small)}
    scores = common.combine_rewards(rewards, (1.0, 0.5), normalize=True)(GROUPS, ["x"] * 6)
    z = 3 ** -0.5
    expected = [-1 - z / 2, 1 - z / 2, z, 0.5 ** 0.5 / 2, 0, -(0.5 ** 0.5) / 2]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-3, rtol=0)
    assert scores.raw[:3].tolist() == [100, 300, 200.5]
    assert list(scores.parts) == ["large", "small"] and scores.parts["large"].tolist() == large


def test_parts_are_in_the_metrics_by_name():
    rewards = {"right": giving(1, 0, 1, 1), "short": giving(4, 3, 2, nan)}
    some = rollout([[5]] * 4, [[6, EOS]] * 4)
    scores = common.combine_rewards(rewards, (1.0, 2.0), normalize=True)([ROWS[0]] * 4, some.texts)
    zeros = torch.zeros(4, 2)
    found = evaluation.rollout_metrics(some, scores, zeros, zeros, zeros, 4)
    assert (found["reward/right"], found["reward/short"]) == (0.75, 3)
    assert found["reward"] == (9 + 6 + 5 + 1) / 4  # as given, not as normalized


# --- the length

def test_the_penalty_grows_over_the_window():
    """DAPO, eq. 13: 0 up to the window, then by length, ended or not; without a window, what was cut."""
    some = rollout([[5]] * 5, [[6, EOS], [6] * 3 + [EOS], [6] * 4 + [EOS], [6] * 5 + [EOS], [6] * 6])
    assert some.overlong(args()).tolist() == [0, 0, 0, 0, 1]
    torch.testing.assert_close(some.overlong(args(overlong_window=3)), torch.tensor([0, 1 / 3, 2 / 3, 1, 1]))


# --- groups

def test_flat_groups():
    scores = torch.tensor([1, 1, 1, 0, 1, 0, nan, 2, 2, nan, nan, nan, 1, 1 + 1e-6, 1, 1, 1.1, nan])
    assert common.flat_groups(scores, 3).tolist() == [True, False, True, True, True, False]


def test_a_replaced_group_is_whole_and_nothing_else_changes():
    """Whole groups, in the new one's order, whatever the padding of either; what the new rollout has too many is not
    used; prompts and scores change in place."""
    prompts, others = [{"prompt": p} for p in "abc"], [{"prompt": "x"}, {"prompt": "y"}]
    old = rollout([[5]] * 2 + [[6, 7]] * 2 + [[8]] * 2, [[9, EOS], [9, 9, EOS], [6, EOS], [6, EOS], [7, EOS], [7]],
                  torch.arange(18.0).view(6, 3))
    new = rollout([[10, 11, 12]] * 2 + [[13]] * 2, [[5, 5, 5, EOS], [5, EOS], [8, EOS], [8, 8, EOS]],
                  100 + torch.arange(16.0).view(4, 4))
    scores, new_scores = torch.tensor([1.0, 1, 2, 3, 4, 4]), torch.tensor([7.0, 8, 9, 10])
    _, merged, _ = common.replace_groups(torch.tensor([True, False, True]), (prompts, old, scores),
                                         (others, new, new_scores))
    assert [row["prompt"] for row in prompts] == ["x", "b", "y"]
    assert scores.tolist() == [7, 8, 2, 3, 9, 10]
    assert merged.texts == [*new.texts[:2], *old.texts[2:4], *new.texts[2:]]
    rows = [(p[m == 1].tolist(), c[k == 1].tolist()) for p, m, c, k in zip(
        merged.prompt_ids, merged.prompt_mask, merged.completion_ids, merged.mask)]
    assert rows == [([10, 11, 12], [5, 5, 5, EOS]), ([10, 11, 12], [5, EOS]), ([6, 7], [6, EOS]), ([6, 7], [6, EOS]),
                    ([13], [8, EOS]), ([13], [8, 8, EOS])]
    assert merged.sampler_logprobs[1, :2].tolist() == [104, 105] and merged.sampler_logprobs[2, :2].tolist() == [6, 7]
    _, one, _ = common.replace_groups(torch.tensor([False, True, False]), (prompts, old, scores),
                                      (others, new, new_scores))
    assert one.texts == [*old.texts[:2], *new.texts[:2], *old.texts[4:]] and scores[2:4].tolist() == [7, 8]


def test_the_parts_of_the_scores_are_replaced_with_them():
    reward = common.combine_rewards({"a": giving(1, 2, 3, 4), "b": giving(5, 6, 7, 8)}, (1.0, 2.0), normalize=True)
    other = common.combine_rewards({"a": giving(10, 20), "b": giving(50, 60)}, (1.0, 2.0), normalize=True)
    old = rollout([[5]] * 4, [[6, EOS]] * 4)
    scores, new_scores = reward([ROWS[0]] * 2 + [ROWS[1]] * 2, old.texts), other([ROWS[0]] * 2, old.texts[:2])
    common.replace_groups(torch.tensor([False, True]), (list(ROWS), old, scores),
                          (ROWS[:1], rollout([[5]] * 2, [[6, EOS]] * 2), new_scores))
    assert scores.raw.tolist() == [11, 14, 110, 140]
    assert scores.parts["a"].tolist() == [1, 2, 10, 20] and scores.parts["b"].tolist() == [5, 6, 50, 60]


# --- the sampler

@pytest.fixture(scope="module")
def sampled():
    """A small model, and a rollout of it at temperature 0.7."""
    model = llama().eval()
    prompt_ids, prompt_mask = common.pad([[5, 6, 7], [9], [10, 11, 12, 13, 14]], "left")
    ids, mask, logprobs = grpo.generate(model, prompt_ids, prompt_mask, 8, 16, 0.7, torch.tensor([EOS]),
                                        torch.Generator().manual_seed(1))
    tokenizer = word_tokenizer(WORDS, eos_token="</s>", pad_token="<pad>")
    return model, common.Rollout(prompt_ids.repeat_interleave(8, 0), prompt_mask.repeat_interleave(8, 0), ids, mask,
                                 tokenizer, torch.tensor([EOS]), logprobs)


def gap(some, logprobs):
    found = evaluation.rollout_metrics(some, torch.arange(24.0), logprobs, logprobs, logprobs, 8)
    return found["sampler_gap"].item(), found["sampler_gap_max"].item()


def test_the_sampler_and_the_trainer_agree(sampled):
    model, some = sampled
    logprobs, _ = common.rollout_logprobs(model, some, [torch.arange(24)], 0.7)
    mean, largest = gap(some, logprobs)
    assert 0 < mean < 1e-5 and mean <= largest < 1e-4
    by_hand = (logprobs - some.sampler_logprobs).abs()[some.mask == 1]
    assert mean == pytest.approx(by_hand.mean().item()) and largest == pytest.approx(by_hand.max().item())


@pytest.mark.parametrize("fault", ["temperature", "position"])
def test_a_planted_fault_shows_in_the_gap(sampled, fault, monkeypatch):
    """A wrong temperature in training; positions that count the padding."""
    model, some = sampled
    if fault == "position":
        forward = type(model.model).forward

        def shifted(self, input_ids, position_ids=None, **kwargs):
            position_ids = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
            return forward(self, input_ids=input_ids, position_ids=position_ids * 2, **kwargs)
        monkeypatch.setattr(type(model.model), "forward", shifted)
    logprobs, _ = common.rollout_logprobs(model, some, [torch.arange(24)], 1.0 if fault == "temperature" else 0.7)
    mean, largest = gap(some, logprobs)
    print(f"sampler_gap with a wrong {fault}: mean {mean:.3f}, largest {largest:.2f}")
    assert mean > 0.01 and largest > 0.1


def test_importance_weights_have_a_cap_and_need_the_samplers_log_probs():
    old, sampler = torch.tensor([[-1.0, -1.0, -2.0]]), torch.tensor([[-1.0, -3.0, -1.0]])
    torch.testing.assert_close(common.importance_weights(old, sampler, 2.0),
                               torch.tensor([[1.0, 2.0, torch.tensor(-1.0).exp()]]))
    unknown = rollout([[5]], [[6, 7, EOS]])
    refuses(lambda: common.importance_weights(old, unknown.sampler_logprobs, 2.0), "--importance-cap")
    zeros = torch.zeros(1, 3)
    assert "sampler_gap" not in evaluation.rollout_metrics(unknown, torch.ones(1), zeros, zeros, zeros, 1)
