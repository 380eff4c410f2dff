"""evaluation.py: win rates, pass@k and diagnostics, each against another way to the same number; and the evaluator."""
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import modeling
import evaluation
import grpo
from evaluation import Evaluator, length_controlled_win_rate, wilson_interval, win_rates
from helpers.unit import COMPLETIONS, EOS, PROMPTS, V, batch, llama, make_run, nan, refuses, word_tokenizer

WORDS = ["<pad>", "</s>"] + [f"w{i}" for i in range(V - 2)]


# --- win rates

def test_wilson_interval():
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson's formula, by hand
    low, high = wilson_interval(1.0, 300)
    assert high == pytest.approx(1.0) and 0.98 < low < 0.99  # where the normal interval has no width
    # it contains the true rate in about 95 % of experiments, counted exactly over all outcomes
    for p in (0.1, 0.5, 0.9):
        inside = sum(math.comb(50, k) * p**k * (1 - p)**(50 - k) for k in range(51)
                     if wilson_interval(k / 50, 50)[0] <= p <= wilson_interval(k / 50, 50)[1])
        assert 0.92 < inside < 0.98


def test_length_controlled_win_rate_is_the_optimum_of_the_penalized_likelihood():
    longer = torch.randint(-20, 30, (200,)).float()
    wins = (torch.rand(200) < (0.3 + longer / 30).sigmoid()).float()
    wins[:20] = 0.5
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    x = (longer.double() / longer.double().std(correction=0)).tanh()
    optimizer = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(
            weights[0] + weights[1] * x, wins.double(), reduction="sum") + weights.square().sum() / 18
        value.backward()
        return value
    optimizer.step(loss)
    rate, low, high = length_controlled_win_rate(wins.double(), longer.double())
    assert rate == pytest.approx(weights[0].sigmoid().item(), abs=1e-6) and low < rate < high


def test_length_controlled_win_rate_takes_the_length_out():
    """For a judge that looks at the length alone it is one half; for one that ignores it, the win rate."""
    torch.manual_seed(1)
    longer = torch.randn(4000).double() * 10 + 8
    by_length = (torch.rand(4000) < (2 * (longer / longer.std()).tanh()).sigmoid()).double()
    assert by_length.mean() > 0.6
    rate, low, high = length_controlled_win_rate(by_length, longer)
    assert low < 0.5 < high and high - low < 0.06
    rate, low, high = length_controlled_win_rate((torch.rand(4000) < 0.7).double(), longer)
    assert low < 0.7 < high
    # of experiments with the first judge, about 95 % contain one half
    inside = 0
    for _ in range(200):
        longer = torch.randn(150).double() + 0.8
        wins = (torch.rand(150) < (1.5 * (longer / longer.std(correction=0)).tanh()).sigmoid()).double()
        _, low, high = length_controlled_win_rate(wins, longer)
        inside += low <= 0.5 <= high
    assert 180 <= inside <= 199


def test_length_controlled_win_rate_if_all_win_or_all_lengths_are_equal():
    rate, low, high = length_controlled_win_rate(torch.ones(50).double(), torch.arange(50.0).double())
    assert 0.5 < low < rate < high < 1
    rate, *_ = length_controlled_win_rate(torch.tensor([1.0, 0, 0, 0] * 100).double(), torch.zeros(400).double())
    assert rate == pytest.approx(0.25, abs=0.01)


def test_win_rates_with_ties_unscored_rows_and_several_samples():
    zeros = torch.zeros(4).double()
    assert win_rates(torch.tensor([1.0, 0.0, -1.0, 2.0]).double(), zeros)["win_rate"] == pytest.approx(2.5 / 4)
    found = win_rates(torch.tensor([1.0, nan, -1.0, 2.0]).double(), zeros)
    assert found["win_rate"] == pytest.approx(2 / 3)
    assert (found["win_rate_low"], found["win_rate_high"]) == pytest.approx(wilson_interval(2 / 3, 3))
    # two per prompt: the mean over prompts of their means, and an interval for two prompts, not for four trials
    found = win_rates(torch.tensor([1.0, -1.0, 1.0, nan]).double(), zeros, samples=2)
    assert found["win_rate"] == pytest.approx((0.5 + 1) / 2)
    assert found["win_rate_low"] == pytest.approx(wilson_interval(0.75, 2)[0])
    assert win_rates(torch.full((2,), nan).double(), zeros[:2]) == {}


def test_more_samples_of_a_prompt_do_not_narrow_the_interval_at_equal_length():
    """As they are not independent: at most as narrow as for one sample per prompt."""
    ahead = torch.tensor([1.0, -1.0, 1.0] * 20).double()
    one = win_rates(ahead, torch.zeros(60).double())
    four = win_rates(ahead.repeat_interleave(4), torch.zeros(240).double(), samples=4)
    widths = [found["lc_win_rate_high"] - found["lc_win_rate_low"] for found in (one, four)]
    assert widths[1] == pytest.approx(widths[0], rel=0.05)


def test_pass_at_k_is_the_mean_over_all_subsets():
    right = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).double()
    for k in range(1, 6):
        for row, estimate in zip(right, evaluation.pass_at_k(right, k)):
            subsets = list(itertools.combinations(row.tolist(), k))
            assert estimate.item() == pytest.approx(sum(max(s) for s in subsets) / len(subsets))
    found = evaluation.pass_rates(right.view(-1), 5)
    assert found.keys() == {"pass_at_1", "pass_at_2", "pass_at_4"}
    assert found["pass_at_1"] == pytest.approx(right.mean().item())
    assert evaluation.pass_rates(right.view(-1) / 2, 5) == {} == evaluation.pass_rates(right.view(-1), 1)
    assert evaluation.pass_rates(torch.tensor([1.0, nan]), 2) == {}


# --- diagnostics

def test_length_correlation_is_within_groups():
    lengths = torch.randint(1, 40, (6, 5))
    scores = torch.randn(6, 5) + lengths / 20 + torch.arange(6)[:, None] * 100  # prompts differ by far more
    scores[2, 3] = nan
    centered = [np.array([(r, n) for r, n in zip(group.tolist(), some.tolist()) if r == r])
                for group, some in zip(scores, lengths)]
    centered = np.concatenate([c - c.mean(0) for c in centered])
    found = evaluation.length_correlation(scores.view(-1), lengths.view(-1), 5)
    assert found == pytest.approx(np.corrcoef(centered.T)[0, 1], abs=1e-5)
    assert evaluation.length_correlation(torch.ones(8), torch.arange(8), 4) == 0
    assert evaluation.length_correlation(torch.arange(8.0), torch.arange(8), 4) == pytest.approx(1)


def test_distinct_ngrams_are_counted_as_by_sets():
    ids, lengths = torch.randint(0, 3, (30, 12)), torch.randint(1, 13, (30,))
    mask = (torch.arange(12)[None] < lengths[:, None]).long()
    for n in (1, 2, 3):
        for row, length, found in zip(ids.tolist(), lengths.tolist(), evaluation.distinct_ngrams(ids, mask, n)):
            grams = [tuple(row[i:i + n]) for i in range(length - n + 1)]
            assert found.isnan() if not grams else found.item() == pytest.approx(len(set(grams)) / len(grams))
    assert evaluation.distinct_ngrams(ids[:, :2], mask[:, :2]).isnan().all()  # no 3-gram


def rollout(n=4):
    tokenizer = word_tokenizer(WORDS, eos_token="</s>", pad_token="<pad>")
    return common.Rollout(*batch(PROMPTS[:n], COMPLETIONS[:n]), tokenizer, torch.tensor([EOS]))


def test_metrics_of_a_rollout():
    """By hand; what is masked does not count."""
    some = rollout()  # lengths 4, 2, 6, 1; the third was truncated
    mask = some.mask
    entropy, logprobs = torch.rand(4, 6), -torch.rand(4, 6)
    ref_logprobs = logprobs - torch.rand(4, 6) * mask
    scores = torch.tensor([1.0, 3.0, nan, 2.0])
    found = {k: float(v) for k, v in evaluation.rollout_metrics(
        some, scores, logprobs, entropy, ref_logprobs, 2).items()}
    expected = {"reward": 2.0, "kl": (logprobs - ref_logprobs).sum().item() / 4, "length": 13 / 4, "truncated": 0.25,
                "entropy": entropy[mask == 1].mean().item(), "reward_std": np.std([1, 3, 2]), "unscored": 0.25,
                "distinct_3": 1.0, "zero_std_groups": 0.5, "zero_std_groups_right": 0.0,  # one score has no spread
                "length_correlation": -1.0}  # in the first group the shorter one is better
    assert found == pytest.approx(expected, abs=1e-5)
    assert list(found)[:2] == ["reward", "kl"]
    without = evaluation.rollout_metrics(some, scores, logprobs, entropy, logprobs, 2)
    assert without.keys() == expected.keys() - {"kl"}  # no reference, no KL
    with pytest.raises(modeling.UserError, match="--reward: it left out every completion"):
        evaluation.rollout_metrics(some, scores * nan, logprobs, entropy, logprobs, 2)


@pytest.mark.parametrize("scores, flat, right", [
    ([1, 1, 1, 1], 1.0, 1.0), ([0, 0, 1, 1], 1.0, 0.5), ([0, 1, 0, 0], 0.5, 0.0), ([0, 1, 2, 3], 0.0, 0.0),
    ([0.1, 0.1 + 1e-6, 5, 5], 1.0, 0.0)])
def test_groups_of_equal_rewards_are_counted(scores, flat, right):
    """zero_std_groups: the prompts are too easy or too hard; zero_std_groups_right: too easy."""
    zeros = torch.zeros(4, 6)
    found = evaluation.rollout_metrics(rollout(), torch.tensor(scores, dtype=torch.float32), zeros, zeros, zeros, 2)
    assert (found["zero_std_groups"], found["zero_std_groups_right"]) == (flat, right)


def test_shorten():
    assert evaluation.shorten("a\nb", 9) == "a / b"
    assert evaluation.shorten("x" * 20, 8) == "x" * 7 + "…"


# --- sample_with_generate

def test_sampling_with_transformers_generate(monkeypatch):
    """The mask ends with the first end of sequence, of any of the model's; the order and the frequencies are right,
    and the model's own generation_config neither matters nor changes."""
    model, tokenizer = llama().eval(), word_tokenizer(WORDS, eos_token="</s>", pad_token="<pad>")
    model.generation_config.update(
        do_sample=False, top_k=1, max_new_tokens=2, eos_token_id=[EOS, 7, 8], temperature=9.0)
    own = model.generation_config
    rows = [{"prompt_ids": prompt} for prompt in PROMPTS[:3] for _ in range(1000)]
    torch.manual_seed(0)
    found = evaluation.sample_with_generate(model.train(), rows, tokenizer, 8, temperature=0.7, batch_size=2000)
    assert model.generation_config is own and own.top_k == 1 and not model.training
    assert found.mask.shape[1] == found.mask.sum(1).max() == 8 and len(found.texts) == 3000
    ends = torch.tensor([EOS, 7, 8])
    for ids, mask in zip(found.completion_ids, found.mask):
        n = int(mask.sum())
        assert mask[:n].all() and not torch.isin(ids[:n - 1], ends).any() and (n == 8 or torch.isin(ids[n - 1], ends))
    for i, prompt in enumerate(PROMPTS[:3]):
        with torch.no_grad():
            probs = (model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
        first = found.completion_ids[i * 1000:(i + 1) * 1000, 0].bincount(minlength=V) / 1000
        assert (first - probs).abs().sum() / 2 < 0.08
        ids, mask = found.prompt_ids[i * 1000], found.prompt_mask[i * 1000]
        assert ids[mask == 1].tolist() == prompt


# --- the evaluator

ROWS = [{"prompt": f"w{i} w{i}", "prompt_ids": PROMPTS[i]} for i in range(3)]


def evaluator(tmp_path, reward, completions, rows=ROWS, **flags):
    """An Evaluator whose sampler gives some completions, one list of token lists per call; and what it wrote."""
    flags = dict(data="none.jsonl", eval_samples=len(completions[0]) // len(rows)) | flags
    run = make_run(grpo.Args(device="cpu", run_dir=str(tmp_path / "run"), **flags))
    run.dir.mkdir()
    run.tensorboard = None
    tokenizer = word_tokenizer(WORDS, eos_token="</s>", pad_token="<pad>")
    calls = iter(completions)

    def sample(model, some, group_size, run, tokenizer, generator):
        assert group_size == run.args.eval_samples and some == rows
        prompts = [row["prompt_ids"] for row in some for _ in range(group_size)]
        return common.Rollout(*batch(prompts, next(calls)), tokenizer, torch.tensor([EOS]))

    def read(name):
        return [json.loads(line) for line in (run.dir / name).read_text().splitlines()]
    return Evaluator(run, rows, reward, sample, tokenizer), read


def by_length(rows, texts):
    """The longer the better; None for a text of one word."""
    n = [len(text.split()) for text in texts]
    return torch.tensor([nan if k == 1 else float(k) for k in n])


FIRST = [[20, 21, EOS], [20, 21, 22, EOS], [20, 21, EOS]]
THEN = [[20, 21, 22, EOS], [20, 21, EOS], [20, 21, 22, 23, 24, 25]]


def test_an_evaluation_compares_with_the_references_completions(tmp_path, capsys):
    """Before the first step the policy is the reference: it is sampled once, and both are the same."""
    model = llama().eval()
    evaluate, read = evaluator(tmp_path, by_length, [FIRST, THEN])
    evaluate(0, model, model)
    evaluate(7, model, model, {"own": 5.0})
    start, later = read("metrics.jsonl")
    assert start["eval_reward"] == start["eval_reference_reward"] == pytest.approx(7 / 3, abs=1e-4)
    assert later["eval_reference_reward"] == start["eval_reference_reward"]
    assert start["eval_win_rate_by_reward"] == 0.5 and abs(start["eval_kl"]) < 1e-5
    assert (later["eval_win_rate_by_reward"], later["eval_reward"]) == pytest.approx((2 / 3, 11 / 3), abs=1e-4)
    assert (later["step"], later["eval_own"], later["eval_length"]) == (7, 5.0, pytest.approx(13 / 3, abs=1e-4))
    assert start["eval_truncated"] == 0 and later["eval_truncated"] == pytest.approx(1 / 3, abs=1e-4)
    samples = read("samples.jsonl")
    assert [row["step"] for row in samples] == [0] * 3 + [7] * 3
    assert all(row["completion"] == row["baseline"] for row in samples[:3])
    assert [row["baseline"] for row in samples[3:]] == [row["completion"] for row in read("baseline.jsonl")]
    assert samples[3]["reward"] == 3 and samples[3]["prompt"] == "w0 w0" and samples[3]["completion"] == " w18 w19 w20"
    assert "w0 w0 -> w18 w19 w20" in capsys.readouterr().out


def test_the_kl_is_that_of_the_sampled_tokens(tmp_path):
    """The sum over a completion of log pi - log pi_ref at the sampling temperature, averaged over completions."""
    policy, reference = llama().eval(), llama().eval()
    evaluate, read = evaluator(tmp_path, by_length, [FIRST, FIRST], temperature=0.7, reference="other")
    evaluate(0, policy, reference)
    rows = batch(PROMPTS[:3], FIRST)
    ours, theirs = (common.completion_logprobs(model, *rows, 0.7)[0] for model in (policy, reference))
    assert read("metrics.jsonl")[0]["eval_kl"] == pytest.approx((ours - theirs).sum().item() / 3, rel=1e-3)


def test_sample_lines_show_the_last_turn_and_no_number_where_there_is_none(tmp_path, capsys):
    rows = [{"prompt": "\n\nHuman: first\n\nAssistant: so\n\nHuman: last\n\nAssistant:", "prompt_ids": [18]}]
    evaluate, _ = evaluator(tmp_path, by_length, [[[20, EOS]]], rows)
    evaluate(0, llama().eval(), None)
    assert capsys.readouterr().out.splitlines()[-1] == "      last -> w18"


def test_unscored_completions_are_in_no_mean_and_no_win_rate(tmp_path):
    one = [[20, EOS], [20, 21, EOS], [20, 21, EOS]]  # the first has one word: no score
    evaluate, read = evaluator(tmp_path, by_length, [FIRST, one])
    evaluate(0, llama().eval(), None)
    evaluate(1, llama().eval(), None)
    found = read("metrics.jsonl")[1]
    assert found["eval_reward"] == 2 and found["eval_win_rate_by_reward"] == pytest.approx((0 + 0.5) / 2)
    assert "eval_kl" not in found and "reward" not in read("samples.jsonl")[3]


def test_another_reference_is_sampled_itself(tmp_path):
    """--reference: not the policy's first completions are the baseline, but the reference's."""
    evaluate, read = evaluator(tmp_path, by_length, [THEN, FIRST], reference="other")
    model = llama().eval()
    evaluate(0, model, model)
    found, = read("metrics.jsonl")
    assert (found["eval_reference_reward"], found["eval_win_rate_by_reward"]) == pytest.approx((7 / 3, 2 / 3), abs=1e-4)


def test_a_gold_reward_judges_and_pass_rates_are_the_rewards(tmp_path, monkeypatch):
    """Two samples per prompt, rewards of 0 and 1; the gold reward, if there is one, gives the win rate."""
    def zero_one(rows, texts):
        return torch.tensor([float(len(text.split()) > 2) for text in texts])
    (tmp_path / "gold.py").write_text(
        "def f(completions, **c):\n    return [-float(len(x.split())) for x in completions]\n")
    double = [[20, 21, EOS], [20, 21, 22, EOS], [20, 21, 22, EOS], [20, 21, 22, EOS], [20, 21, EOS], [20, 21, EOS]]
    longer = [row[:-1] + [22, EOS] for row in double]
    evaluate, read = evaluator(tmp_path, zero_one, [double, longer], gold=f"{tmp_path}/gold.py:f")
    evaluate(0, llama().eval(), None)
    evaluate(1, llama().eval(), None)
    start, later = read("metrics.jsonl")
    assert start["eval_pass_at_1"] == start["eval_reward"] == 0.5
    assert start["eval_pass_at_2"] == pytest.approx(2 / 3, abs=1e-4)  # of two prompts of three
    assert start["eval_reference_gold"] == start["eval_gold"] == -2.5 and "eval_reference_reward" not in start
    assert later["eval_win_rate"] == 0  # each is longer than the reference's: worse by gold
    rows = read("samples.jsonl")
    assert [row["prompt"] for row in rows[:6]] == ["w0 w0"] * 2 + ["w1 w1"] * 2 + ["w2 w2"] * 2


def test_without_rows_only_the_scripts_own_metrics_are_logged(tmp_path):
    evaluate, read = evaluator(tmp_path, by_length, [FIRST])
    evaluate.rows = []
    evaluate(0, None, None)
    assert not (evaluate.run.dir / "metrics.jsonl").exists()
    evaluate(0, None, None, {"loss": 1.0})
    assert read("metrics.jsonl") == [{"step": 0, "eval_loss": 1.0}]


def test_a_resumed_run_keeps_its_baseline_and_its_prompts(tmp_path, capsys):
    evaluate, read = evaluator(tmp_path, by_length, [FIRST])
    evaluate(0, llama().eval(), None)
    run = SimpleNamespace(dir=evaluate.run.dir, args=grpo.Args(data="none.jsonl"))
    run.args.resume = str(tmp_path / "run")
    (run.dir / "args.json").write_text(json.dumps(vars(run.args)))
    assert Evaluator(run, ROWS, by_length, None, None).baseline == read("baseline.jsonl")
    run.args.max_new_tokens = 99  # other completions: they cannot be compared with those
    assert Evaluator(run, ROWS, by_length, None, None).baseline == []
    assert "--max-new-tokens has changed" in capsys.readouterr().out
    assert run.outdated == [run.dir / "baseline.jsonl"]  # for Run.resume to delete
    refuses(lambda: Evaluator(run, ROWS[:2], by_length, None, None), "--resume", "held-out prompts", "--eval-samples")
    run.args.eval_samples = 2
    refuses(lambda: Evaluator(run, ROWS, by_length, None, None), "--resume", "held-out prompts", "--eval-samples")
