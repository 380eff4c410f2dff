"""Whole runs with several rewards, resampled groups, a renewed reference, and a corrected sampler."""
import gc
import json
import shutil

import pytest
import torch

import common
import evaluation
import grpo
import modeling
import ppo
import runtime
from helpers.unit import refuses
from helpers.runs import (ON_POLICY, ROOT, SCRIPTS, TORCHRUN, checkpoints, command, evaluations_of, fails,
                          last_checkpoint, process, read, rows_of_data, run, same_tensors, small_flags, steps_of,
                          tensors, without_times)

REWARDS = """
def right(prompts, completions, answer, **columns):
    return [float(len(c[0]["content"]) % 3 == 0) for c in completions]

def short(prompts, completions, **columns):
    return [None if i == 0 else -len(c[0]["content"]) / 10 for i, c in enumerate(completions)]

def same(prompts, completions, **columns):
    return [1.0] * len(completions)
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    return f"{tmp_path}/rewards.py"


# --- several rewards

def test_several_rewards_are_logged_by_name(tmp_path, file):
    """In training and in evaluation, and summed by their weights; the run goes on with them."""
    log = run("ppo", tmp_path / "run", reward=(f"{file}:right", f"{file}:short", "tiny/reward_model"),
              reward_weights=(2.0, 1.0, 0.5))
    for row in log:
        prefix = "" if "loss" in row else "eval_"
        parts = [row[f"{prefix}reward/{part}"] for part in ("right", "short", "reward_model")]
        rows = 12 if prefix == "" else 4
        expected = 2 * parts[0] + parts[1] * (rows - 1) / rows + 0.5 * parts[2]  # one completion has no second
        assert row[f"{prefix}reward"] == pytest.approx(expected, abs=1e-3)
    saved = json.loads((tmp_path / "run/args.json").read_text())
    assert saved["reward"] == [f"{file}:right", f"{file}:short", "tiny/reward_model"]
    command("ppo", resume=tmp_path / "run", steps=3)
    assert [row["step"] for row in steps_of(read(tmp_path / "run/metrics.jsonl"))] == [1, 2, 3]


def test_one_reward_may_be_given_as_before(tmp_path):
    assert grpo.Args(reward="tiny/reward_model").reward == ("tiny/reward_model",)
    assert grpo.Args(reward=len).reward == (len,) and grpo.Args(reward=[len, "a"]).reward == (len, "a")


@pytest.mark.parametrize("name", ON_POLICY)
def test_normalized_rewards_are_logged_as_they_were(name, tmp_path, file):
    rows = steps_of(run(name, tmp_path / "run", reward=(f"{file}:right", f"{file}:short"), normalize_rewards=True,
                        eval_prompts=0))
    assert all(0 <= row["reward/right"] <= 1 and row["reward"] < 0.5 for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)


def test_divided_by_the_mean_rewards_have_no_penalty(capsys, tmp_path):
    for flags in (dict(truncation_penalty=1), dict(kl_in_reward=True), dict(normalize_rewards=True)):
        assert "--scale-rewards mean: for plain rewards" in fails(capsys, "grpo", scale_rewards="mean",
                                                          run_dir=tmp_path / "run", **flags)


def test_rewards_and_weights_are_checked(capsys, tmp_path):
    for weights in ((float("nan"), 1), 1.0, "12", (1, None)):
        refuses(lambda: grpo.Args(reward=("a", "b"), reward_weights=weights), "--reward-weights: must be 2 finite")
    for reward in (None, (), (3,), 3):
        refuses(lambda: grpo.Args(reward=reward), "--reward: name one or more")
    assert "--reward: given twice" in fails(capsys, "grpo", "--reward", "a", "--reward", "b", run_dir=tmp_path / "run")


def test_rewards_of_one_name_are_all_there(tmp_path, file):
    """Also if one has the name that another gets for its number."""
    (tmp_path / "others.py").write_text("def same_(completions, **c): return [5.0] * len(completions)\n")
    log = run("reinforce", tmp_path / "run", reward=(f"{file}:same", f"{tmp_path}/others.py:same_", f"{file}:same"))
    assert all(row.get("reward", row.get("eval_reward")) == 7 for row in log)


def test_on_resume_other_weights_score_the_reference_anew(tmp_path, file, capsys):
    flags = dict(reward=(f"{file}:right", f"{file}:short"), gold="", data=rows_of_data("grpo", tmp_path),
                 eval_data="tiny/heldout.jsonl")
    run("grpo", tmp_path / "run", **flags, reward_weights=(1.0, 1.0))
    command("grpo", "--resume", tmp_path / "run", "--steps", "3", "--reward-weights", "-1", "-1")
    assert "--reward-weights has changed" in capsys.readouterr().out
    last = evaluations_of(read(tmp_path / "run/metrics.jsonl"))[-1]
    baseline = read(tmp_path / "run/baseline.jsonl")
    assert last["eval_reference_reward"] == pytest.approx(sum(row["reward"] for row in baseline) / len(baseline), 1e-3)
    assert baseline[0]["reward"] == pytest.approx(-baseline[0]["reward/right"])  # the second leaves it out
    # the run is finished: nothing is sampled, and the next resume must not take the old scores for its own
    command("grpo", "--resume", tmp_path / "run", "--reward-weights", "2", "2")
    command("grpo", "--resume", tmp_path / "run", "--steps", "4")
    last = evaluations_of(read(tmp_path / "run/metrics.jsonl"))[-1]
    baseline = read(tmp_path / "run/baseline.jsonl")
    assert baseline[0]["reward"] == pytest.approx(2 * baseline[0]["reward/right"])
    assert last["eval_reference_reward"] == pytest.approx(sum(row["reward"] for row in baseline) / len(baseline), 1e-3)


@pytest.mark.parametrize("flags, words", [
    (dict(reward_weights="1"), "--reward-weights: must be 2 finite numbers"),
    (dict(normalize_rewards=True, group_size=1), "--normalize-rewards: needs a --group-size"),
    (dict(overlong_window=4), "--overlong-window: needs a --truncation-penalty"),
    (dict(overlong_window=40, truncation_penalty=1, max_new_tokens=12), "--overlong-window"),
    (dict(renew_reference_every=2, beta=0), "--renew-reference-every: --beta 0 has no reference"),
    (dict(renew_reference_every=2, lora_rank=2), "--renew-reference-every: not with --lora-rank")])
def test_flags_that_do_not_fit(flags, words, capsys, file, tmp_path):
    assert words in fails(capsys, "reinforce", "--reward", f"{file}:right", f"{file}:short", "--baseline", "none",
                          run_dir=tmp_path / "run", **flags)
    assert not (tmp_path / "run").exists()


def test_greedy_and_normalized_do_not_fit(capsys, tmp_path):
    assert "--normalize-rewards" in fails(capsys, "reinforce", normalize_rewards=True, baseline="greedy",
                                          run_dir=tmp_path / "run")


# --- dynamic sampling

def test_flat_groups_are_replaced(tmp_path, file, monkeypatch):
    """Up to --max-resamples times, with rows of the data; those that stay flat stay; the statistics are of what stays;
    what was drawn in vain is counted. Resumed, it ends the same."""
    calls, sample = [], grpo.sample

    def spy(model, rows, *rest):
        calls.append([row["prompt"] for row in rows])
        return sample(model, rows, *rest)
    monkeypatch.setattr(grpo, "sample", spy)
    flags = dict(reward=f"{file}:right", max_resamples=3, steps=3, prompts_per_step=6, group_size=2, eval_prompts=0,
                 lr_schedule="constant_with_warmup")
    log = steps_of(run("grpo", tmp_path / "whole", **flags))
    vain = sum(row["groups_replaced"] for row in log)
    assert vain == sum(map(len, calls)) - 3 * 6 > 3
    assert all(len(calls[i]) == 6 for i in (0,)) and len(calls) > 4
    data = [json.loads(line)["prompt"] for line in open(rows_of_data("grpo", tmp_path))]
    assert all(prompt in data for prompts in calls for prompt in prompts)
    without = steps_of(run("grpo", tmp_path / "without", **flags | dict(max_resamples=0)))
    assert sum(row["zero_std_groups"] for row in log) < sum(row["zero_std_groups"] for row in without)
    assert all(row["groups_replaced"] == 0 for row in without)
    run("grpo", tmp_path / "cut", **flags | dict(steps=2))
    command("grpo", resume=tmp_path / "cut", steps=3)
    assert same_tensors(last_checkpoint(tmp_path / "cut"), last_checkpoint(tmp_path / "whole"))


def test_if_all_groups_stay_flat_nothing_is_learned_and_one_line_says_so(tmp_path, file, capsys):
    log = steps_of(run("grpo", tmp_path / "run", reward=f"{file}:same", beta=0.0, steps=7, max_resamples=1,
                       eval_prompts=0))
    assert all(row["groups_replaced"] == 3 and row["zero_std_groups"] == 1 and row["grad_norm"] == 0 for row in log)
    out = capsys.readouterr().out
    assert out.count("warning: zero_std_groups was 1 in five steps in a row") == 1
    assert out.index("warning") > out.index("step    4") and "--group-size" in out


def test_cut_completions_are_said_in_one_line(tmp_path, capsys):
    run("reinforce", tmp_path / "run", steps=6, max_new_tokens=1, eval_prompts=0)
    assert capsys.readouterr().out.count("warning: truncated was 1 in five steps in a row") == 1


# --- the reference

@pytest.mark.parametrize("name, mix", [("grpo", 1.0), ("ppo", 0.25)])
def test_the_reference_moves_to_the_policy(name, mix, tmp_path, monkeypatch):
    """All the way, or a part of it; the run is resumed with the reference that it had, which is kept apart from a reward
    model whose folder is called `reference`."""
    (tmp_path / "reference").symlink_to(ROOT / "tiny/reward_model")
    seen, renew = {}, runtime.Run.renew_reference

    def spy(self, step, policy, reference):
        before = [p.clone() for p in reference.parameters()]
        renew(self, step, policy, reference)
        seen[step] = before, [p.clone() for p in policy.parameters()], [p.clone() for p in reference.parameters()]
    monkeypatch.setattr(runtime.Run, "renew_reference", spy)
    flags = dict(steps=5, renew_reference_every=2, reference_mix=mix, save_every=3, eval_every=3,
                 lr_schedule="constant_with_warmup", reward=str(tmp_path / "reference"))
    log = run(name, tmp_path / "whole", **flags)
    for step, (before, policy, after) in seen.items():
        for old, now, new in zip(before, policy, after):
            torch.testing.assert_close(new, old + mix * (now - old) if step % 2 == 0 else old)
    if mix == 1:
        by_step = {row["step"]: row for row in steps_of(log)}
        assert by_step[3]["kl"] == pytest.approx(0, abs=1e-4) and abs(by_step[2]["kl"]) > 1e-4
    run(name, tmp_path / "cut", **flags | dict(steps=3))
    command(name, resume=tmp_path / "cut", steps=5)
    assert same_tensors(last_checkpoint(tmp_path / "cut"), last_checkpoint(tmp_path / "whole"))
    logs = [without_times(read(tmp_path / folder / "metrics.jsonl")) for folder in ("cut", "whole")]
    assert logs[0] == logs[1]


def test_a_reference_of_another_shape_is_not_renewed(capsys, tmp_path):
    assert "--renew-reference-every" in fails(capsys, "grpo", reference="tiny/policy", renew_reference_every=1,
                                              run_dir=tmp_path / "run", max_kl=0, beta=0, lora_rank=2)


def test_renewal_stays_as_it_was_on_resume(tmp_path, capsys):
    run("grpo", tmp_path / "on", renew_reference_every=1)
    run("grpo", tmp_path / "off", steps=1, eval_prompts=0)
    for folder, flags in (("on", dict(renew_reference_every=0)), ("off", dict(renew_reference_every=1)),
                          ("on", dict(reference="tiny/policy"))):
        error = fails(capsys, "grpo", resume=tmp_path / folder, steps=3, **flags)
        assert "--renew-reference-every cannot be switched" in error or "--reference: cannot change" in error
    assert "--gold: cannot change" in fails(capsys, "grpo", resume=tmp_path / "on", steps=3,
                                            gold="tiny/reward_model")


def test_an_evaluation_that_fails_loses_no_renewal(tmp_path, monkeypatch):
    """The step is not saved before the reference has moved: the run goes on from the checkpoint before it."""
    flags = dict(renew_reference_every=2, steps=4, eval_every=2, save_every=1, lr_schedule="constant_with_warmup")
    run("grpo", tmp_path / "whole", **flags)
    (tmp_path / "gold.py").write_text("def gold(completions, **c): return [1.0] * len(completions)\n")
    evaluate = evaluation.Evaluator.__call__

    def fail(self, step, *rest):
        if step == 2:
            raise modeling.UserError("no")
        evaluate(self, step, *rest)
    monkeypatch.setattr(evaluation.Evaluator, "__call__", fail)
    with pytest.raises(SystemExit):
        command("grpo", **small_flags("grpo", tmp_path / "cut", **flags))
    monkeypatch.setattr(evaluation.Evaluator, "__call__", evaluate)
    gc.collect()
    assert checkpoints(tmp_path / "cut") == ["checkpoint-1"]
    command("grpo", resume=tmp_path / "cut")
    assert same_tensors(last_checkpoint(tmp_path / "cut"), last_checkpoint(tmp_path / "whole"))


TOGETHER = ("--prompts-per-step 6 --group-size 2 --max-new-tokens 12 --eval-prompts 4 --log-every 1 --device cpu "
            "--lr-schedule constant_with_warmup --save-every 2 --eval-every 2 --renew-reference-every 2 "
            "--max-resamples 2 --normalize-rewards --steps 4 "
            "--keep-checkpoints 2").split()


def test_two_processes_resample_together_and_resume_exactly_after_an_evaluation(tmp_path, file):
    """A process may have no flat group: it draws one as well, and both make the same number of attempts. An evaluation
    leaves FSDP's root gathered: checkpoints and the reference are of the shards all the same."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process(*TORCHRUN, "grpo.py", *TOGETHER, "--reward", f"{file}:right", f"{file}:same", "--run-dir", whole, cwd=ROOT)
    log = steps_of(read(whole / "metrics.jsonl"))
    assert len(log) == 4 and sum(row["groups_replaced"] for row in log) > 0
    assert all(abs(n - round(n)) < 1e-3 for n in (6 * row["zero_std_groups"] for row in log))  # whole groups
    assert log[2]["kl"] == pytest.approx(0, abs=1e-4) and log[1]["kl"] > 1e-3  # of the new reference, the old one
    shutil.copytree(whole, cut)  # as if it had been killed after step 2
    shutil.rmtree(cut / "checkpoint-4")
    process(*TORCHRUN, "grpo.py", "--resume", cut, cwd=ROOT)
    assert same_tensors(last_checkpoint(cut), last_checkpoint(whole))
    assert without_times(steps_of(read(cut / "metrics.jsonl"))) == without_times(log)


# --- the sampler

@pytest.mark.parametrize("name", ON_POLICY)
def test_with_an_exact_sampler_the_importance_weights_change_nothing(name, tmp_path):
    """They are 1 up to rounding, and cost no pass."""
    plain, capped = (run(name, tmp_path / f"cap-{cap:g}", importance_cap=cap, eval_prompts=0) for cap in (0.0, 2.0))
    for a, b in zip(steps_of(plain), steps_of(capped), strict=True):
        assert a["sampler_gap"] < 1e-5 and a["sampler_gap_max"] < 1e-3
        for key in ("loss", "grad_norm", "reward", "kl"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5)
    weights = [tensors(last_checkpoint(tmp_path / folder)) for folder in ("cap-0", "cap-2")]
    assert all(torch.allclose(weights[0][k], weights[1][k], atol=1e-4) for k in weights[0])


def test_with_one_update_the_importance_weights_need_no_second_pass(tmp_path, monkeypatch):
    calls, logprobs = [], grpo.completion_logprobs
    monkeypatch.setattr(grpo, "completion_logprobs", lambda *a, **k: calls.append(1) or logprobs(*a, **k))
    passes, rollout_logprobs = [], grpo.rollout_logprobs
    monkeypatch.setattr(grpo, "rollout_logprobs",
                        lambda model, rollout, batches, *rest: passes.append(len(batches)) or rollout_logprobs(
                            model, rollout, batches, *rest))
    run("grpo", tmp_path / "run", steps=1, beta=0.0, importance_cap=2.0, eval_prompts=0)
    assert passes == [0] and len(calls) == 1


@pytest.mark.parametrize("name, flags", [
    ("grpo", dict(loss_type="cispo", beta=0.0, clip_low=1.0)), ("ppo", dict(minibatches=1, whiten=False)),
    ("reinforce", dict(beta=0.0))])
def test_a_wrong_samplers_tokens_are_weighted(name, flags, tmp_path, monkeypatch):
    """The loss of each token is times min(pi_old / pi_sampler, cap): here 0.5 everywhere."""
    weights = common.importance_weights
    monkeypatch.setattr(SCRIPTS[name], "importance_weights", lambda *rest: weights(*rest) * 0.5)
    losses = [steps_of(run(name, tmp_path / f"{cap:g}", steps=1, importance_cap=cap, eval_prompts=0,
                           **flags))[0]["loss"] for cap in (0.0, 2.0)]
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-3) and losses[0] != 0


# --- ppo.py's own

@pytest.mark.parametrize("name, function", [("ppo", "token_rewards"), ("grpo", "group_advantages"),
                                            ("reinforce", "token_advantages")])
def test_the_window_is_used_in_each_script(name, function, tmp_path, monkeypatch):
    """What the algorithm gets is the score minus the penalty by length."""
    seen, original, rollouts = [], getattr(SCRIPTS[name], function), []
    monkeypatch.setattr(SCRIPTS[name], function,
                        lambda rewards, *rest: seen.append(rewards) or original(rewards, *rest))
    sample = SCRIPTS[name].sample
    monkeypatch.setattr(SCRIPTS[name], "sample", lambda *a: rollouts.append(sample(*a)) or rollouts[-1])
    run(name, tmp_path / "run", steps=1, eval_prompts=0, reward=lambda completions, **c: [2.0] * len(completions),
        overlong_window=8, truncation_penalty=3.0, beta=0.0, gold="", eval_data="tiny/heldout.jsonl")
    expected = 2 - 3 * ((rollouts[0].mask.sum(1) - 4) / 8).clamp(min=0)
    torch.testing.assert_close(seen[0].flatten(), expected.float())


def test_the_critics_lambda_is_for_what_it_learns(tmp_path, monkeypatch):
    lambdas, gae, values = [], ppo.gae, ppo.value_loss
    returns = []
    monkeypatch.setattr(ppo, "gae", lambda *a: lambdas.append(a[-1]) or gae(*a))
    monkeypatch.setattr(ppo, "value_loss", lambda new, old, target, clip: returns.append(target) or values(
        new, old, target, clip))
    run("ppo", tmp_path / "run", steps=1, eval_prompts=0, minibatches=1, critic_gae_lambda=1.0, gae_lambda=0.5,
        beta=0.0, max_grad_norm=1.0)
    assert lambdas == [0.5, 1.0]
    for row in torch.cat(returns):  # at lambda 1, without KL, the return of each token is the score
        row = row[row != 0]
        torch.testing.assert_close(row, row[:1].expand_as(row), rtol=1e-4, atol=1e-4)


def test_the_entropy_bonus_raises_the_entropy(tmp_path):
    """A reward that is always the same leaves the bonus alone: the entropy rises, and without it stays."""
    def entropy(bonus):
        log = steps_of(run("ppo", tmp_path / f"{bonus:g}", steps=4, entropy_bonus=bonus, beta=0.0, eval_prompts=0,
                           lr=1e-3, reward=lambda completions, **c: [0.0] * len(completions), gold="", whiten=False,
                           critic="tiny/policy", lr_schedule="constant_with_warmup", eval_data="tiny/heldout.jsonl"))
        return log[-1]["entropy"] - log[0]["entropy"]
    assert entropy(1.0) > 0.15 > abs(entropy(0.0))
