"""Inside the steps of a run: what reaches the losses, seen by spies on the scripts' own functions."""
import functools

import pytest
import torch

import common
import dpo
import grpo
import ppo
import reinforce
import runtime
from helpers import runs
from helpers.runs import GOLD, ON_POLICY, SCRIPTS, last_checkpoint, same_tensors, steps_of, weights, write

run = functools.partial(runs.run, resumable=False)  # quicker

HALF = "def f(completions, **columns):\n    return [None if i % 2 else i + 0.5 for i in range(len(completions))]\n"
WHOLE = dict(micro_batch_tokens=8192, eval_prompts=0, steps=1)  # one micro-batch, unless lengths differ a lot


def reward_file(folder, text: str) -> str:
    (folder / "reward.py").write_text(text)
    return f"{folder}/reward.py:f"


def spy(monkeypatch, module, name: str) -> list:
    """The arguments and the result of each call of a function, in the order of calls."""
    calls, function = [], getattr(module, name)

    def call(*args, **options):
        result = function(*args, **options)
        calls.append((args, result))
        return result
    monkeypatch.setattr(module, name, call)
    return calls


# --- grpo, ppo and reinforce

@pytest.mark.parametrize("name", ON_POLICY)
def test_the_first_update_has_ratio_1_and_later_ones_do_not(name, tmp_path, monkeypatch):
    losses = spy(monkeypatch, SCRIPTS[name], "policy_loss")
    log = run(name, tmp_path / "run", steps=1, eval_prompts=0, epochs=2, minibatches=2, lr=1e-3, micro_batch_tokens=64)
    is_one = [torch.equal(args[0].detach(), args[1]) for args, _ in losses]  # micro-batch after micro-batch
    assert is_one == sorted(is_one, reverse=True) and 0 < sum(is_one) < len(is_one)
    if name == "ppo":
        assert log[0]["approx_kl"] > 0 and log[0]["updates"] == 4


@pytest.mark.parametrize("name, beta, rollout_passes", [
    ("grpo", 0.0, 0), ("reinforce", 0.0, 0), ("ppo", 0.0, 1),  # ppo's rewards hold the KL of the old policy
    ("grpo", 0.1, 1), ("reinforce", 0.1, 2), ("ppo", 0.1, 2)])  # with beta the reference's pass as well
def test_no_model_is_loaded_and_no_forward_pass_made_without_need(name, beta, rollout_passes, tmp_path, monkeypatch):
    """With one update per rollout, its own pass gives the old log-probs; at beta 0 no reference is loaded."""
    script = SCRIPTS[name]
    loads = spy(monkeypatch, script, "load_causal_lm"), spy(monkeypatch, runtime, "load_causal_lm")
    update, rollout = spy(monkeypatch, script, "completion_logprobs"), spy(monkeypatch, common, "completion_logprobs")
    log = run(name, tmp_path / "run", beta=beta, temperature=0.7, minibatches=1, **WHOLE)
    assert [len(calls) for calls in loads] == [1, int(beta > 0)] and ("kl" in log[0]) == (beta > 0)
    assert sum(len(args[1]) for args, _ in update) == 12
    assert sum(len(args[1]) for args, _ in rollout) == 12 * rollout_passes
    assert {args[-1] for args, _ in update + rollout} == {0.7}  # the temperature of the sampling


@pytest.mark.parametrize("name, function", [("grpo", "group_advantages"), ("reinforce", "baseline")])
def test_masked_completions_stay_in_the_group(name, function, tmp_path, monkeypatch):
    """To take truncated completions out before the baseline would bias it."""
    calls = spy(monkeypatch, SCRIPTS[name], function)
    losses = spy(monkeypatch, SCRIPTS[name], "policy_loss")
    log = run(name, tmp_path / "run", mask_truncated=True, max_new_tokens=7, **WHOLE)
    assert 0 < log[0]["truncated"] < 1 and log[0]["unscored"] == 0
    (rewards, *_), _ = calls[0]
    assert len(rewards) == 12 and not rewards.isnan().any()
    masks = torch.cat([args[3].sum(1) for args, _ in losses])
    assert len(masks) == 12 and (masks > 0).all()  # log-probs too are those of whole completions


def test_truncated_completions_are_penalized(tmp_path, monkeypatch):
    """In the reward that is learned from; the reward that is logged is the reward's own."""
    calls = spy(monkeypatch, grpo, "group_advantages")
    log = run("grpo", tmp_path / "run", truncation_penalty=3.0, max_new_tokens=7, reward=GOLD, **WHOLE)
    (rewards, *_), _ = calls[0]
    assert log[0]["truncated"] > 0
    assert rewards.mean().item() == pytest.approx(log[0]["reward"] - 3 * log[0]["truncated"], abs=1e-4)


# --- ppo

def test_with_a_critic_of_zeros_the_advantage_is_the_reward_to_go(tmp_path, monkeypatch):
    """At gamma = lambda = 1: the score minus beta times the KL still to come."""
    calls = spy(monkeypatch, ppo, "gae")
    log = run("ppo", tmp_path / "run", critic="tiny/policy", gae_lambda=1.0, critic_gae_lambda=1.0,
              minibatches=1, whiten=False, **WHOLE)
    (rewards, values, mask, *_), (advantages, returns) = calls[0]
    tokens = mask.sum()
    assert values.abs().sum() == 0
    # the losses are means over all tokens: the ratio is 1, the value 0
    assert log[0]["loss"] == pytest.approx(-(advantages.sum() / tokens).item(), rel=1e-3)
    assert log[0]["value_loss"] == pytest.approx((returns.square().sum() / tokens / 2).item(), rel=1e-3)
    torch.testing.assert_close(advantages, rewards.flip(1).cumsum(1).flip(1) * mask, rtol=1e-5, atol=1e-5)
    assert advantages[:, 0].mean().item() == pytest.approx(log[0]["reward"], rel=1e-3)  # the KL is still 0
    assert log[0]["explained_variance"] <= 0


def test_a_perfect_critic_explains_all_variance(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "gae", lambda rewards, values, *_: (values.clone(), values))
    assert run("ppo", tmp_path / "run", **WHOLE)[0]["explained_variance"] == 1


def test_the_kl_in_the_rewards_is_that_of_the_policy_from_the_reference(tmp_path, monkeypatch):
    """log pi_old - log pi_ref of the sampled tokens, at the temperature of the sampling."""
    rewards, seen, rollout_logprobs = spy(monkeypatch, ppo, "token_rewards"), [], ppo.rollout_logprobs

    def logprobs(model, rollout, batches, temperature):
        result = rollout_logprobs(model, rollout, batches, temperature)
        seen.append((model, temperature, result[0].clone(), result[0]))
        return result
    monkeypatch.setattr(ppo, "rollout_logprobs", logprobs)
    log = run("ppo", tmp_path / "run", lr=3e-3, temperature=0.8, minibatches=1, **WHOLE | dict(steps=2))
    (policy, _, old, updated), (reference, _, ref, _) = seen[2:]  # of the second step
    assert policy is seen[0][0] and reference is seen[1][0] and policy is not reference
    assert all(temperature == 0.8 for _, temperature, *_ in seen)
    kl = rewards[1][0][1]
    torch.testing.assert_close(kl, old - ref)
    assert log[1]["kl"] == pytest.approx(kl.sum(1).mean().item(), rel=1e-3) and log[1]["kl"] != 0
    torch.testing.assert_close(old, updated, rtol=1e-4, atol=1e-4)  # the update's first pass says the same


def test_only_tokens_in_the_loss_are_whitened(tmp_path, monkeypatch):
    """Neither padding nor completions without a score are in the mean or the variance."""
    calls = spy(monkeypatch, ppo, "masked_whiten")
    run("ppo", tmp_path / "run", reward=reward_file(tmp_path, HALF), **WHOLE)
    _, mask, mean = calls[0][0]
    assert mask[1::2].sum() == 0 and (mask[::2, 0] == 1).all() and (mask[::2].sum(1) > 1).any()
    assert mean is runtime.global_mean


def test_the_critic_warms_up_alone(tmp_path):
    log = run("ppo", tmp_path / "run", critic_warmup=2, critic="tiny/policy", reward=GOLD, eval_prompts=0)
    assert same_tensors(tmp_path / "run/checkpoint-2", "tiny/policy")
    assert all(row["grad_norm"] == row["loss"] == 0 and row["value_loss"] > 0 for row in log)
    assert log[0]["value"] == 0 and log[1]["value"] != 0


def test_target_kl_ends_the_updates_of_a_rollout(tmp_path):
    """The policy's update at which the KL is too large is not made: it ends as with one epoch."""
    changes = dict(minibatches=1, lr_schedule="constant_with_warmup", **WHOLE)
    (row,) = run("ppo", tmp_path / "stopped", target_kl=1e-9, epochs=3, **changes)
    assert row["updates"] == 2 and row["approx_kl"] > 1e-9
    run("ppo", tmp_path / "one", epochs=1, **changes)
    stopped, one = (weights(last_checkpoint(tmp_path / folder)) for folder in ("stopped", "one"))
    assert torch.allclose(stopped, one, atol=1e-6)


def test_beta_follows_its_target(tmp_path):
    """The beta that is logged is the one that was used in the step."""
    log = run("ppo", tmp_path / "run", kl_target=0.001, kl_horizon=100, lr=1e-3, steps=3, eval_prompts=0)
    assert log[0]["beta"] == 0.04  # the KL of the first step is 0
    assert log[1]["beta"] == pytest.approx(0.04 * (1 - 0.2 * 12 / 100), rel=1e-4)
    assert (log[2]["beta"] > log[1]["beta"]) == (log[1]["kl"] > 0.001)


# --- reinforce

def test_the_kl_is_subtracted_from_the_reward_before_the_baseline(tmp_path, monkeypatch):
    baselines, advantages = spy(monkeypatch, reinforce, "baseline"), spy(monkeypatch, reinforce, "token_advantages")
    log = run("reinforce", tmp_path / "run", beta=0.5, lr=3e-3, reward=GOLD, eval_prompts=0)
    rewards, kl = baselines[1][0][0], advantages[1][0][2]
    assert log[1]["kl"] == pytest.approx(kl.sum(1).mean().item(), rel=1e-3) and log[1]["kl"] != 0
    assert rewards.mean().item() == pytest.approx(log[1]["reward"] - 0.5 * log[1]["kl"], abs=1e-3)
    run("reinforce", tmp_path / "tokens", beta=0.5, reward=GOLD, kl_per_token=True, eval_prompts=0)
    assert torch.equal(baselines[2][0][0], baselines[2][0][0].round(decimals=4))  # gold rewards as they are


def test_the_loss_is_a_mean_over_completions_of_sums_over_tokens(tmp_path, monkeypatch):
    """A token counts no less in a long completion; what has no score is not in the mean's n."""
    losses = spy(monkeypatch, reinforce, "policy_loss")
    log = run("reinforce", tmp_path / "run", reward=reward_file(tmp_path, HALF), **WHOLE)
    assert log[0]["unscored"] == 0.5 and sum(len(loss) for _, (loss, *_) in losses) == 12
    total = sum(loss.sum().item() for _, (loss, *_) in losses)
    assert log[0]["loss"] == pytest.approx(total / 6, rel=1e-3)


def test_masked_completions_are_not_in_the_whitening(tmp_path, monkeypatch):
    """What is not learned from sets neither the mean nor the scale of what is."""
    calls = spy(monkeypatch, reinforce, "token_advantages")
    log = run("reinforce", tmp_path / "run", mask_truncated=True, max_new_tokens=9, whiten=True, **WHOLE)
    (_, _, _, mask, *_), advantages = calls[0]
    assert 0 < log[0]["truncated"] < 1
    assert (mask.sum(1) == 0).double().mean().item() == pytest.approx(log[0]["truncated"], rel=1e-4)
    assert advantages[mask.bool()].mean().item() == pytest.approx(0, abs=1e-5)
    assert log[0]["advantage_std"] == pytest.approx(1, abs=1e-2)


def test_the_greedy_baseline_is_one_completion_per_prompt_with_the_same_reward(tmp_path, monkeypatch):
    samples, baselines = spy(monkeypatch, reinforce, "generate"), spy(monkeypatch, reinforce, "baseline")
    log = run("reinforce", tmp_path / "run", baseline="greedy", **WHOLE)
    # prompts, group size, whether the draw is random
    assert [(len(args[1]), args[3], args[7] is not None) for args, _ in samples] == [(3, 4, True), (3, 1, False)]
    greedy = baselines[0][0][4].view(3, 4)
    assert (greedy == greedy[:, :1]).all() and len(set(greedy[:, 0].tolist())) > 1
    assert log[0]["baseline"] == pytest.approx(greedy.mean().item(), rel=1e-3)


def test_the_moving_baseline_is_of_the_steps_before(tmp_path):
    count = ("n = 0\ndef f(completions, **columns):\n    global n\n    n += 1\n"
             "    return [10.0 * n] * len(completions)\n")
    log = run("reinforce", tmp_path / "run", reward=reward_file(tmp_path, count), baseline="moving", beta=0.0, steps=3,
              moving_decay=0.5, eval_prompts=0)
    assert [row["baseline"] for row in log] == [0, 10, 15]  # 10, then half of 10 and half of 20


# --- dpo and reward_model

COLORS = "green white black red yellow brown".split()
PAIRS = [{"prompt": f"what is {a} and {b} ?", "chosen": f"{a} and {b} is {b} .", "rejected": f"it is {a} ."}
         for a in COLORS for b in COLORS if a != b]


def test_the_reference_is_the_first_policy_throughout(tmp_path, monkeypatch):
    """It reads each pair once, before the policy does, which then has the same log-probs, and others at the end."""
    calls = spy(monkeypatch, dpo, "pair_logprobs")
    run("dpo", tmp_path / "run", eval_prompts=0, lr=1e-3, micro_batch_tokens=8192)
    models = [args[0] for args, _ in calls]
    reference, policy, n = models[0], models[-1], models.index(models[-1])
    assert policy not in models[:n] and reference not in models[n:]
    seen = {reference: {}, policy: {}}
    for (model, pairs, _), (chosen, _) in calls:
        for pair, value in zip(pairs, chosen.tolist()):
            seen[model].setdefault(str(pair["prompt_ids"] + pair["chosen_ids"]), []).append(value)
    assert seen[reference].keys() == seen[policy].keys()
    assert all(len(values) == 1 for values in seen[reference].values())
    held_out = {key: values for key, values in seen[policy].items() if len(values) == 2}
    assert len(held_out) == 4  # the others are read once
    for key, (first, last) in held_out.items():
        assert abs(first - seen[reference][key][0]) < 1e-4 and abs(last - first) > 1e-3


def test_the_margin_is_used(tmp_path):
    plain, wide = (steps_of(run("reward_model", tmp_path / str(margin), margin_column="gap", bias_prompts=0, data=write(
        tmp_path / f"{margin}.jsonl", *[{**pair, "gap": margin} for pair in PAIRS]))) for margin in (0.0, 5.0))
    assert wide[0]["loss"] > plain[0]["loss"] + 2
