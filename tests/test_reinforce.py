"""reinforce.py: its baselines, advantages and gradient by hand, and its steps."""
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import reinforce
from common import masked_whiten
from reinforce import baseline_of, policy_loss, token_advantages
from test_grpo_math import close, float64
from test_ppo import weights
from test_runs import SMALL, rows

nan = float("nan")


def run(tmp_path, name="run", **changes):
    reinforce.main(reinforce.Args(**(
        SMALL | dict(prompts_per_step=2, eval_every=0, run_dir=str(tmp_path / name)) | changes)))
    return rows(tmp_path / name / "metrics.jsonl")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- baseline_of

def test_baselines_by_hand():
    rewards = float64(1, 2, 6, 0, 0, 9)  # two groups of three
    for kind, expected in (("none", [0] * 6), ("mean", [3, 3, 3, 3, 3, 3]), ("moving", [0.7] * 6),
                           ("loo", [4, 3.5, 1.5, 4.5, 4.5, 0]), ("greedy", [5, 5, 5, 8, 8, 8])):
        greedy = float64(5, 5, 5, 8, 8, 8)
        close(baseline_of(rewards, 3, kind, 0.7, greedy), float64(*expected))


def test_loo_is_the_mean_times_g_over_g_minus_one():
    rewards = torch.randn(40, dtype=torch.float64)
    loo, mean = (rewards - baseline_of(rewards, 8, kind) for kind in ("loo", "mean"))
    close(loo, mean * 8 / 7)


def test_what_is_left_out_is_in_no_baseline():
    rewards = float64(1, nan, 2, 6, nan, 0, nan, 9)  # groups of four
    mean, loo = (baseline_of(rewards, 4, kind) for kind in ("mean", "loo"))
    close(mean, float64(3, 3, 3, 3, 4.5, 4.5, 4.5, 4.5))
    kept = ~rewards.isnan()
    close(loo[kept], float64(4, 3.5, 1.5, 9, 0))
    # and learns nothing, whatever the baseline
    for kind in ("none", "mean", "moving", "loo", "greedy"):
        baseline = baseline_of(rewards, 4, kind, 1.0, torch.ones(8).double())
        A = token_advantages(rewards, baseline, torch.zeros(8, 2), torch.ones(8, 2), 0.1, "token", False)
        assert A[~kept].abs().sum() == 0 and A.isfinite().all()


def test_a_completion_whose_others_are_left_out():
    # nothing to compare it with: it is its own mean, and learns nothing
    rewards = float64(5, nan, nan)
    assert baseline_of(rewards, 3, "mean")[0] == 5 and baseline_of(rewards, 3, "loo")[0] == 5


@pytest.mark.parametrize("kind", ["none", "moving", "loo", "greedy"])
def test_a_baseline_does_not_know_the_completion_it_is_for(kind):
    rewards, greedy = torch.randn(2, 8).double()
    changed = rewards.clone()
    changed[2] += 10
    before, after = (baseline_of(r, 4, kind, 0.3, greedy) for r in (rewards, changed))
    assert before[2] == after[2]


# --- token_advantages

REWARDS, BASELINE = float64(3, -1, nan), float64(1, 1, 1)
KL = float64([0.5, -1, 2], [1, 9, 9], [1, 1, 1])  # the 9s are behind the end
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])


def test_the_completion_s_kl_is_in_its_reward_already():
    A = token_advantages(REWARDS, BASELINE, KL, MASK, 0.1, "completion", False)
    close(A, float64([2, 2, 2], [-2, 0, 0], [0, 0, 0]))


def test_a_token_answers_for_its_own_kl_and_what_follows():
    # to come: 1.5, 1, 2 in the first, 1 in the second; a tenth of that is taken off
    A = token_advantages(REWARDS, BASELINE, KL, MASK, 0.1, "token", False)
    close(A, float64([1.85, 1.9, 1.8], [-2.1, 0, 0], [0, 0, 0]))


@pytest.mark.parametrize("kl_in", ["completion", "token"])
def test_normalised_over_the_tokens_that_have_a_reward(kl_in):
    A = token_advantages(REWARDS, BASELINE, KL, MASK, 0.1, kl_in, True)
    plain = token_advantages(REWARDS, BASELINE, KL, MASK, 0.1, kl_in, False)
    kept = torch.stack([plain[0, 0], plain[0, 1], plain[0, 2], plain[1, 0]])
    expected = (kept - kept.mean()) / kept.std(correction=0)
    close(torch.stack([A[0, 0], A[0, 1], A[0, 2], A[1, 0]]), expected, rtol=1e-6)
    assert A[2].abs().sum() == 0 and A[1, 1:].abs().sum() == 0


# --- policy_loss

def test_on_the_first_update_it_is_advantage_times_log_prob():
    logprobs = (-torch.rand(2, 3)).double().requires_grad_()
    A, mask = torch.randn(2, 3).double(), torch.tensor([[1, 1, 1], [1, 1, 0]])
    loss, low, high = policy_loss(logprobs, logprobs.detach(), A, mask, 0.2, 0.2)
    loss.sum().backward()
    close(logprobs.grad, -A * mask)
    assert not low.any() and not high.any()


# old log-probs so that the completion's ratio is 2 * 0.75 = 1.5 or 0.8 * 0.5 = 0.4; the clip
# at 0.8 and 1.2 stops the gradient where the ratio has gone where A pushes, and nowhere else
@pytest.mark.parametrize("ratios, A, grad, low, high", [
    ((2, 0.75), (1, 1), (0, 0), (False, False), (True, True)),
    ((2, 0.75), (-1, -1), (1.5, 1.5), (False, False), (False, False)),
    ((0.8, 0.5), (1, 1), (-0.4, -0.4), (False, False), (False, False)),
    ((0.8, 0.5), (-1, -1), (0, 0), (True, True), (False, False)),
    ((2, 0.75), (1, -1), (0, 1.5), (False, False), (True, False)),  # --kl-in token: A differs
    ((2, 0.55), (1, 1), (-1.1, -1.1), (False, False), (False, False)),  # 1.1, though one is 2
    ((3, 1), (0, 0), (0, 0), (False, False), (False, False))])
def test_the_ratio_is_the_completion_s_and_its_clip_stops_the_gradient(ratios, A, grad, low, high):
    logprobs = float64([-1.0, -2.0, -5.0]).requires_grad_()
    old = logprobs.detach() - float64([math.log(r) for r in (*ratios, 1e6)])  # junk behind the end
    mask = torch.tensor([[1, 1, 0]])
    loss, below, above = policy_loss(logprobs, old, float64([*A, 7]), mask, 0.2, 0.2)
    loss.sum().backward()
    close(logprobs.grad, float64([*grad, 0]))
    assert (tuple(below[0, :2].tolist()), tuple(above[0, :2].tolist())) == (low, high)


def test_the_gradient_is_that_of_the_importance_weighted_return():
    """d/d logits of ratio(y) * A(y), with pi(y) in the ratio, against autograd through the ratio."""
    logits = torch.randn(5, 3, 4, dtype=torch.float64).requires_grad_()
    ids, A = torch.randint(4, (5, 3)), torch.randn(5).double()
    mask = (torch.arange(3) < torch.tensor([3, 1, 2, 3, 2])[:, None]).long()
    def logprobs():
        return logits.log_softmax(-1).gather(-1, ids[:, :, None])[:, :, 0] * mask
    old = logprobs().detach() + 0.1 * torch.randn(5, 3).double() * mask
    loss, _, _ = policy_loss(logprobs(), old, A[:, None] * mask, mask, 1.0, 1e9)
    ours = torch.autograd.grad(loss.sum(), logits)[0]
    plain = -((logprobs() - old).sum(1).exp() * A).sum()
    close(ours, torch.autograd.grad(plain, logits)[0])


# --- whole steps

OPTIONS = [
    *(dict(baseline=b, kl_in=k) for b, k in (("none", "token"), ("mean", "completion"),
                                             ("moving", "token"), ("greedy", "completion"))),
    dict(normalise=True, kl_in="token", epochs=2, minibatches=2), dict(beta=0.0, dtype="bfloat16"),
    dict(truncated="mask", max_new_tokens=4), dict(truncated="penalise", gradient_checkpointing=True),
    dict(group_size=1, prompts_per_step=1, baseline="moving")]


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
@pytest.mark.filterwarnings("error::UserWarning")
def test_every_option_runs(tmp_path, changes):
    log = run(tmp_path, **changes)
    assert len(log) == 2 and all(math.isfinite(x) for r in log for x in r.values())
    assert max(r["grad_norm"] for r in log) > 0 or "max_new_tokens" in changes


def test_the_first_update_has_ratio_one_and_later_ones_do_not(tmp_path, monkeypatch):
    ratios, loss = [], policy_loss
    monkeypatch.setattr(reinforce, "policy_loss", lambda new, old, *rest: ratios.append(
        (new - old).detach().abs().max().item()) or loss(new, old, *rest))
    run(tmp_path, steps=1, epochs=2, micro_batch_size=100, lr=1e-3)
    zero = [r == 0 for r in ratios]  # of micro-batch after micro-batch
    assert zero == sorted(zero, reverse=True) and 0 < sum(zero) < len(zero)


def test_without_kl_one_update_makes_one_forward_pass(tmp_path, monkeypatch):
    loads, calls = [], []
    load, logprobs = reinforce.load_model, reinforce.completion_logprobs
    monkeypatch.setattr(reinforce, "load_model", lambda *a, **k: loads.append(a) or load(*a, **k))
    monkeypatch.setattr(reinforce, "completion_logprobs",
                        lambda *a: calls.append(a) or logprobs(*a))
    log = run(tmp_path, beta=0.0, steps=1, micro_batch_size=100, temperature=0.7)
    assert len(loads) == 1 and sum(len(a[4]) for a in calls) == 8 and "kl" not in log[0]  # each row once
    assert calls[0][-1] == 0.7  # the temperature of the sampling


def test_the_kl_is_off_the_reward_before_the_baseline(tmp_path, monkeypatch):
    """A drifted policy pays: the rewards that the baseline sees are the scores less beta * KL."""
    seen, baseline, advantages = [], baseline_of, token_advantages
    monkeypatch.setattr(reinforce, "baseline_of", lambda r, *a: seen.append([r]) or baseline(r, *a))
    monkeypatch.setattr(reinforce, "token_advantages", lambda r, b, kl, *a: seen[-1].append(
        kl) or advantages(r, b, kl, *a))
    log = run(tmp_path, beta=0.5, lr=3e-3, reward="tiny/world.py:gold_reward")
    rewards, kl = seen[1]
    assert log[1]["kl"] == pytest.approx(kl.sum(1).mean().item(), rel=1e-3) and log[1]["kl"] != 0
    assert rewards.mean().item() == pytest.approx(log[1]["reward"] - 0.5 * log[1]["kl"], abs=1e-3)


def test_the_loss_is_a_mean_over_completions_of_sums_over_tokens(tmp_path, monkeypatch):
    """No token counts for less in a long completion; what is left out is not in the mean's n."""
    seen, loss, advantages = [], policy_loss, token_advantages
    monkeypatch.setattr(reinforce, "policy_loss", lambda *a: seen.append(loss(*a)[0].detach()) or loss(*a))
    path = tmp_path / "half.py"
    path.write_text("def f(completions, **c):\n    return [None if i % 2 else i + 0.5 for i in range(len(completions))]\n")
    log = run(tmp_path, reward=f"{path}:f", steps=1, micro_batch_size=100)
    assert log[0]["left_out"] == 0.5 and sum(map(len, seen)) == 8
    assert log[0]["loss"] == pytest.approx(sum(s.sum().item() for s in seen) / 4, rel=1e-3)


def test_masked_completions_have_no_part_in_the_normalisation(tmp_path, monkeypatch):
    """What is not learned from sets neither the mean nor the scale of what is."""
    seen, advantages = {}, token_advantages
    monkeypatch.setattr(reinforce, "token_advantages", lambda r, b, kl, mask, *a: seen.update(
        mask=mask, A=advantages(r, b, kl, mask, *a)) or seen["A"])
    log = run(tmp_path, truncated="mask", max_new_tokens=9, steps=1, normalise=True)
    A = seen["A"][seen["mask"].bool()]
    assert 0 < log[0]["truncated"] < 1 and (seen["mask"].sum(1) == 0).float().mean() == log[0]["truncated"]
    assert A.mean().item() == pytest.approx(0, abs=1e-5) and log[0]["advantage_std"] == pytest.approx(1, abs=1e-2)


def test_masked_completions_stay_in_the_baseline(tmp_path, monkeypatch):
    seen, baseline = {}, baseline_of
    monkeypatch.setattr(reinforce, "baseline_of", lambda r, *a: seen.update(r=r) or baseline(r, *a))
    log = run(tmp_path, truncated="mask", max_new_tokens=3, steps=1)
    assert log[0]["truncated"] > 0 and log[0]["left_out"] == 0 and not seen["r"].isnan().any()


def test_the_greedy_baseline_is_one_completion_a_prompt_scored_alike(tmp_path, monkeypatch):
    calls, generate = [], reinforce.generate
    def spy(model, ids, mask, args, group_size, ends, pad_id, generator):
        calls.append((group_size, generator is None, len(ids)))
        return generate(model, ids, mask, args, group_size, ends, pad_id, generator)
    monkeypatch.setattr(reinforce, "generate", spy)
    seen, baseline = {}, baseline_of
    monkeypatch.setattr(reinforce, "baseline_of", lambda r, G, kind, moving, greedy: seen.update(
        greedy=greedy) or baseline(r, G, kind, moving, greedy))
    log = run(tmp_path, baseline="greedy", steps=1)
    assert calls == [(4, False, 2), (1, True, 2)]
    greedy = seen["greedy"].view(2, 4)
    assert (greedy == greedy[:, :1]).all() and greedy[0, 0] != greedy[1, 0]
    assert log[0]["baseline"] == pytest.approx(greedy.mean().item(), rel=1e-3)


def test_greedy_takes_the_likeliest_token(tmp_path):
    """Each token of it is the argmax of a plain forward pass."""
    from common import encode, load_model, load_tokenizer, pad, render
    tokenizer = load_tokenizer("tiny/policy")
    model, _ = load_model(AutoModelForCausalLM, "tiny/policy", "cpu")
    prompts = encode(tokenizer, [render(tokenizer, p) for p in (
        "what is the capital of france ?", "how do i make tea ?")])
    args = reinforce.Args(max_new_tokens=8, temperature=0.7)
    ids, mask = reinforce.generate(model, *pad(prompts, 0, "left"), args, 1,
                                   [tokenizer.eos_token_id], 0, None)
    for prompt, row, seen in zip(prompts, ids.tolist(), mask.tolist()):
        for t in range(sum(seen)):
            assert model(torch.tensor([prompt + row[:t]])).logits[0, -1].argmax() == row[t]


def test_the_moving_baseline_is_of_the_steps_before(tmp_path):
    path = tmp_path / "count.py"
    path.write_text("n = 0\ndef f(completions, **c):\n    global n\n    n += 1\n"
                    "    return [10.0 * n] * len(completions)\n")
    log = run(tmp_path, reward=f"{path}:f", baseline="moving", beta=0.0, steps=3, moving_decay=0.5)
    assert [r["baseline"] for r in log] == [0, 10, 15]  # 10, then half of 10 and half of 20


def test_micro_batches_change_no_gradient(tmp_path, monkeypatch):
    """With plain gradient descent, which hides nothing, the policy ends at the same place."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, **_: torch.optim.SGD(p, lr))
    start, moved = weights("tiny/policy"), []
    for size in (3, 100):
        run(tmp_path, str(size), micro_batch_size=size, steps=1, lr=0.1, minibatches=2, truncated="mask",
            reward="tiny/world.py:gold_reward", temperature=1.5)
        moved.append(weights(tmp_path / str(size) / "checkpoint") - start)
    assert moved[0].norm() > 1e-3
    assert (moved[1] - moved[0]).norm() / moved[0].norm() < 1e-3


def test_reinforce_learns_a_plain_reward(tmp_path):
    path = tmp_path / "short.py"
    path.write_text("def f(completions, **c):\n    return [-len(x[0]['content'].split()) / 5 for x in completions]\n")
    log = run(tmp_path, reward=f"{path}:f", steps=8, prompts_per_step=4, group_size=8, lr=2e-3,
              max_new_tokens=16, micro_batch_size=64)
    assert sum(r["reward"] for r in log[-3:]) / 3 > sum(r["reward"] for r in log[:3]) / 3 + 0.1
    assert log[-1]["kl"] > 0
