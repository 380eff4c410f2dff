"""flags.py and runtime.py: flags and their bounds, the rows of a step, statistics, the log, and what the command line prints.
Runs with checkpoints, with LoRA and with several processes are in tests/runs."""
import dataclasses
import json
import math
import signal
import sys

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
import reward_model
import runtime
from flags import RunArgs, cli, json_lines, read_json, saved_flags, write_json, write_whole
from helpers.unit import V, llama, make_run, nan, refuses
from runtime import Run

SCRIPTS = {"grpo": grpo, "ppo": ppo, "reinforce": reinforce, "dpo": dpo, "reward_model": reward_model}
ON_POLICY = ["grpo", "ppo", "reinforce"]


# --- bounds

def cases():
    """(script, flag, value, words): a value just outside of each flag's bounds."""
    everywhere = {"warmup": -1, "lora_rank": -1, "save_every": -1, "eval_every": -1,
                  "max_grad_norm": -1, "micro_batch_tokens": 0, "keep_checkpoints": 0, "log_every": 0, "lr": 0}
    on_policy = {"steps": -1, "prompts_per_step": 0, "max_new_tokens": 0, "temperature": 0, "truncation_penalty": -0.1,
                 "beta": -0.1, "epochs": 0, "minibatches": 0, "max_prompt_tokens": -1, "generate_batch_size": 0,
                 "eval_prompts": -1, "eval_samples": 0, "max_kl": -1, "clip_low": -0.1, "clip_high": -0.1}
    own = {"grpo": {}, "reinforce": {"moving_decay": 1.1, "group_size": 0},
           "ppo": {"group_size": 0, "critic_lr": 0, "critic_warmup": -1, "gamma": 1.5, "gae_lambda": -0.1,
                   "value_clip": -1, "target_kl": -1, "kl_target": -1, "kl_horizon": 0},
           "dpo": {"epochs": -1, "pairs_per_step": 0, "max_tokens": -1, "beta": 0, "label_smoothing": 0.5,
                   "simpo_margin": -1, "sft_weight": -1, "eval_pairs": 0, "eval_prompts": -1, "eval_samples": 0,
                   "max_new_tokens": 0, "temperature": 0, "generate_batch_size": 0},
           "reward_model": {"epochs": -1, "pairs_per_step": 0, "max_tokens": -1, "centering": -1,
                            "label_smoothing": 0.5, "bias_prompts": -1, "max_new_tokens": 0, "eval_pairs": 0}}
    words = {"label_smoothing": "from 0 to below 0.5", "gamma": "from 0 to 1", "gae_lambda": "from 0 to 1",
             "moving_decay": "from 0 to 1"}
    for script, flags in own.items():
        for flag, value in {**everywhere, **(on_policy if script in ON_POLICY else {}), **flags}.items():
            yield script, flag, value, words.get(flag, "at least 0" if value else "more than 0")


@pytest.mark.parametrize("script, flag, value, words", list(cases()))
def test_a_value_out_of_bounds_is_refused(script, flag, value, words):
    """Also when Args is made in Python. The default is inside."""
    Args = SCRIPTS[script].Args
    refuses(lambda: Args(**{flag: value}), f"--{flag.replace('_', '-')}: must be {words}")
    Args(**{flag: getattr(Args(), flag)})


@pytest.mark.parametrize("script", SCRIPTS)
def test_nan_and_infinity_are_refused_everywhere(script):
    Args = SCRIPTS[script].Args
    floats = [field.name for field in dataclasses.fields(Args) if isinstance(field.default, float)]
    assert {"lr", "max_grad_norm"} <= set(floats)
    for flag in floats:
        for value in (nan, math.inf, -math.inf):
            refuses(lambda: Args(**{flag: value}), f"--{flag.replace('_', '-')}: must be a finite number")


@pytest.mark.parametrize("flag, value", [
    ("gamma", 0.0), ("gamma", 1.0), ("beta", 0.0), ("value_clip", 0.0), ("steps", 0), ("epochs", 1), ("eval_every", 0)])
def test_a_value_on_its_bound_is_allowed(flag, value):
    assert getattr(ppo.Args(**{flag: value}), flag) == value


@pytest.mark.parametrize("script, flags, words", [
    ("grpo", dict(group_size=1), "--group-size"),
    ("reinforce", dict(group_size=1), "--baseline loo"),
    ("reinforce", dict(group_size=1, baseline="mean"), "--baseline mean"),
    ("ppo", dict(kl_target=6.0, beta=0.0), "--kl-target"),
    ("dpo", dict(loss_type="hinge", label_smoothing=0.1), "--loss-type hinge"),
    ("dpo", dict(loss_type="ipo", robust=True), "--loss-type ipo"),
    ("dpo", dict(robust=True), "--robust: needs --label-smoothing"),
    ("dpo", dict(max_tokens=1), "--max-tokens"),
    ("grpo", dict(minibatches=13, prompts_per_step=3, group_size=4), "--minibatches: more than")])
def test_flags_that_do_not_fit_together(script, flags, words):
    refuses(lambda: SCRIPTS[script].Args(**flags), words)


def test_a_group_of_one_is_allowed_where_no_group_is_needed():
    for baseline in ("none", "moving", "greedy"):
        reinforce.Args(group_size=1, baseline=baseline)
    ppo.Args(group_size=1)


@pytest.mark.parametrize("script", ON_POLICY)
def test_the_tiny_world_brings_its_own_evaluation(script):
    args = SCRIPTS[script].Args()
    assert (args.eval_data, args.gold) == ("tiny/heldout.jsonl", "tiny/world.py:gold_reward")
    args = SCRIPTS[script].Args(data="other.jsonl")
    assert (args.eval_data, args.gold) == ("", "")
    args = SCRIPTS[script].Args(eval_data="mine.jsonl", gold="mine.py:f")
    assert (args.eval_data, args.gold) == ("mine.jsonl", "mine.py:f")


# --- the command line

def command(monkeypatch, capsys, *flags, main=lambda args: None, Args=grpo.Args):
    """(exit code, stderr) of a command line."""
    monkeypatch.setattr(sys, "argv", ["script.py", *flags])
    with pytest.raises(SystemExit) as stop:
        cli(main, Args, "")
        raise SystemExit(0)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (("--beta", "-1"), "--beta: must be at least 0"), (("--lr", "nan"), "--lr: must be a finite number"),
    (("--temperature", "inf"), "--temperature: must be a finite number"),
    (("--steps", "-1"), "--steps: must be at least 0"), (("--group-size", "1"), "--group-size")])
def test_a_flag_out_of_bounds_is_one_line_and_exit_code_2(monkeypatch, capsys, flags, words):
    main = pytest.fail
    code, error = command(monkeypatch, capsys, *flags, main=main)
    assert code == 2 and error.startswith(f"error: {words}") and error.count("\n") == 1


def test_flags_arrive_in_main(monkeypatch, capsys):
    seen = []
    flags = ("--kl-in-reward", "--clip-high", "0.28", "--data", "x.jsonl")
    code, _ = command(monkeypatch, capsys, *flags, main=seen.append)
    assert code == 0 and (seen[0].kl_in_reward, seen[0].clip_high, seen[0].data) == (True, 0.28, "x.jsonl")


def raising(error):
    def main(args):
        raise error
    return main


@pytest.mark.parametrize("error, code, words", [
    (modeling.UserError("--this: is wrong"), 2, "error: --this: is wrong\n"),
    (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), 2, "--micro-batch-tokens"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "--gradient-checkpointing"),
    (MemoryError(), 2, "--micro-batch-tokens"),
    (RuntimeError("probability tensor contains either `inf`, `nan`"), 2, "lower --lr")])
def test_mistakes_and_full_memory_are_one_line(monkeypatch, capsys, error, code, words):
    found, line = command(monkeypatch, capsys, main=raising(error))
    assert found == code and words in line and line.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), KeyError("x"), ValueError("y")])
def test_a_defect_keeps_its_traceback(monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(type(error)):
        cli(raising(error), grpo.Args, "")


def test_saved_flags(tmp_path, monkeypatch, capsys):
    """The flags of a run; one line for a run of another script, of an older version, or for no run."""
    path = tmp_path / "args.json"

    def save(**flags):
        path.write_text(json.dumps(flags))
    save(**dataclasses.asdict(grpo.Args(lr=1e-6)), ran_with={"torch": "2"})
    flags = saved_flags(tmp_path, grpo.Args)
    assert grpo.Args(**flags) == grpo.Args(lr=1e-6)
    refuses(lambda: saved_flags(tmp_path, ppo.Args), f"--resume {tmp_path}", "another script", "--kl-estimator")
    # on the command line, flags given now win over the run's
    seen = []
    command(monkeypatch, capsys, "--resume", str(tmp_path), "--steps", "7", main=seen.append)
    assert (seen[0].lr, seen[0].steps, seen[0].resume) == (1e-6, 7, str(tmp_path))
    save(steps=3, lam=0.9)
    refuses(lambda: saved_flags(tmp_path, ppo.Args), f"--resume {tmp_path}", "older version", "start a new")
    path.write_text("{oops")
    refuses(lambda: saved_flags(tmp_path, grpo.Args), f"--resume {tmp_path}", "cannot be read")
    refuses(lambda: saved_flags(tmp_path / "none", grpo.Args), "--resume", "cannot be read")
    code, error = command(monkeypatch, capsys, "--resume", str(tmp_path / "none"))
    assert code == 2 and error.startswith("error: --resume") and error.count("\n") == 1


# --- the rows of a step

def run_of(rank=0, world_size=1, **flags):
    return make_run(rank=rank, world_size=world_size, **flags)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(1, 8), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_each_pass_over_the_data_is_a_permutation(n, per_process, world_size, seed, by_length):
    """The processes' parts of a step are disjoint and add up to it, and the steps to pass after pass."""
    rows, size = list(range(n)), per_process * world_size
    runs = [run_of(rank, world_size, seed=seed) for rank in range(world_size)]
    length = (lambda row: row % 7) if by_length else None
    seen, steps = [], -(-3 * n // size)
    for step in range(1, steps + 1):
        parts = [run.batch(rows, step, size, length=length) for run in runs]
        assert {len(part) for part in parts} == {per_process}
        seen += [row for place in zip(*parts) for row in place]
        assert all(run.step == step for run in runs)
    passes = [seen[i:i + n] for i in range(0, 3 * n, n)]
    for order in passes:
        assert sorted(order) == rows
    if n > 20:
        assert passes[0] != passes[1] != passes[2] and passes[0] != passes[2]


def test_the_order_is_a_function_of_seed_and_step():
    """Asked for out of turn, as by a resumed run, and whatever else was drawn: the same rows."""
    rows = list(range(100))
    first = run_of(seed=1)
    steps = [first.batch(rows, step, 8) for step in range(1, 30)]
    for step in (29, 3, 14):
        torch.manual_seed(step)
        assert run_of(seed=1).batch(rows, step, 8) == steps[step - 1]
    assert run_of(seed=2).batch(rows, 3, 8) != steps[2]


@pytest.mark.parametrize("n, size, passes, world_size, sizes", [
    (10, 4, 1, 1, [4, 4, 2]), (10, 4, 2, 1, [4, 4, 4, 4, 4]), (10, 4, 1, 2, [4, 4, 2]), (9, 4, 1, 2, [4, 4, 2]),
    (9, 4, 1, 4, [4, 4, 4]), (3, 8, 1, 1, [3]), (5, 4, 3, 1, [4, 4, 4, 3])])
def test_the_last_step_of_pairs_takes_what_is_left(n, size, passes, world_size, sizes):
    """Each process gets as many as the others; if they cannot share equally, up to world_size - 1 more are taken."""
    rows = list(range(n))
    runs = [run_of(rank, world_size) for rank in range(world_size)]
    seen = []
    for step, expected in enumerate(sizes, 1):
        parts = [run.batch(rows, step, size, passes) for run in runs]
        assert sum(map(len, parts)) == expected and len({len(part) for part in parts}) == 1
        seen += [row for place in zip(*parts) for row in place]
    assert math.ceil(n * passes / size) == len(sizes)  # as the scripts count their steps
    assert all(sorted(seen[i * n:(i + 1) * n]) == rows for i in range(passes))
    assert len(seen) - passes * n < world_size


def test_rows_of_similar_length_are_batched_together():
    """In batches shuffled among each other; the incomplete one stays last."""
    lengths = torch.randint(1, 1000, (133,)).tolist()
    rows = list(enumerate(lengths))
    run = run_of()
    batches = [run.batch(rows, step, 8, passes=1, length=lambda row: row[1]) for step in range(1, 18)]
    assert sorted(sum(batches, [])) == rows and [len(batch) for batch in batches] == [8] * 16 + [5]
    spread = [max(n for _, n in batch) - min(n for _, n in batch) for batch in batches[:16]]
    assert max(spread) < 200  # of a thousand, where random batches have about 800
    means = [sum(n for _, n in batch) / len(batch) for batch in batches]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_a_step_that_cannot_be_shared_equally_is_refused(monkeypatch):
    for name, value in {"is_initialized": True, "get_rank": 0, "get_world_size": 3}.items():
        monkeypatch.setattr(runtime.dist, name, lambda value=value: value)
    refuses(lambda: Run(grpo.Args(device="cpu", prompts_per_step=4), "unit.py"), "--prompts-per-step", "3 processes")
    refuses(lambda: Run(dpo.Args(device="cpu", pairs_per_step=32), "unit.py"), "--pairs-per-step", "3 processes")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 6))
def test_held_out_rows_are_shared_by_the_processes(n, world_size):
    rows = list(range(n))
    if n < world_size:
        return refuses(lambda: run_of(0, world_size).share(rows), f"{n} held-out rows", f"{world_size} processes")
    parts = [run_of(rank, world_size).share(rows) for rank in range(world_size)]
    assert sum(parts, []) == rows and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_random_numbers_of_a_step():
    """A function of seed, step and process: no two share a stream, and a resumed run draws the same."""
    def draw(seed, step, rank):
        return torch.rand(4, generator=run_of(rank, 2, seed=seed).generator(step)).tolist()
    settings_ = [(seed, step, rank) for seed in (0, 1) for step in (0, 1, 2, 1000) for rank in (0, 1)]
    drawn = [draw(*s) for s in settings_]
    torch.manual_seed(5)
    assert [draw(*s) for s in settings_] == drawn
    assert len({tuple(d) for d in drawn}) == len(drawn)
    run_of(seed=3).generator(7)  # also seeds what draws without a generator: transformers' generate
    first = torch.rand(3)
    torch.rand(9)
    run_of(seed=3).generator(7)
    assert torch.equal(torch.rand(3), first)


def test_due():
    run = run_of()
    run.steps = 7
    assert [step for step in range(1, 8) if run.due(3, step)] == [3, 6, 7]
    assert [step for step in range(1, 8) if run.due(0, step)] == [7]  # 0: only at the end
    run.stopped = True
    assert run.due(0, 2) and run.due(3, 2)


# --- micro-batches and statistics

def test_micro_batches_are_commons_by_the_flag():
    lengths = torch.randint(1, 40, (20,))
    found = list(run_of(micro_batch_tokens=100).micro_batches(lengths))
    assert [g.tolist() for g in found] == [g.tolist() for g in common.micro_batches(lengths, 100)]
    rows = torch.tensor([3, 9, 4])
    found = list(run_of(micro_batch_tokens=30).micro_batches(lengths, rows))
    assert [g.tolist() for g in found] == [g.tolist() for g in common.micro_batches(lengths, 30, rows)]


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 30), st.integers(2, 5), st.integers(1, 1000))
def test_every_process_makes_equally_many_passes(data, n, world_size, tokens):
    """None of them empty, each row in one, though lengths differ between processes (as a step's rows do)."""
    some_lengths = st.lists(st.integers(1, 300), min_size=n, max_size=n)
    lengths = [torch.tensor(data.draw(some_lengths)) for _ in range(world_size)]
    run = run_of(micro_batch_tokens=tokens)
    most = max(len(common.micro_batches(some, tokens)) for some in lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.dist, "is_initialized", lambda: True)
        patch.setattr(runtime.dist, "get_rank", lambda: 1)
        patch.setattr(runtime.dist, "all_reduce", lambda x, op: x.fill_(most))
        for some in lengths:
            groups = list(run.micro_batches(some))
            assert len(groups) == most and all(len(group) for group in groups)
            assert sorted(torch.cat(groups).tolist()) == list(range(n))
            assert all(len(g) == 1 or len(g) * some[g].max() <= tokens for g in groups)


def test_a_share_that_is_one_row_smaller_repeats_a_row(monkeypatch):
    """In evaluation, all processes still make equally many passes."""
    run = run_of(micro_batch_tokens=1)
    monkeypatch.setattr(runtime.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(runtime.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(runtime.dist, "all_reduce", lambda x, op: x.fill_(4))
    groups = [group.tolist() for group in run.micro_batches(torch.tensor([5, 4, 3]))]
    assert len(groups) == 4 and {i for group in groups for i in group} == {0, 1, 2}


def test_means_in_one_process():
    values, mask = torch.randn(5, 4), torch.rand(5, 4) < 0.5
    torch.testing.assert_close(runtime.global_mean(values, mask), common.masked_mean(values, mask))
    assert runtime.global_mean(values, mask & False) == 0
    parts = [{"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.0, 4.0])},
             {"a": torch.tensor([6.0]), "b": torch.tensor([2.0])}]
    found = runtime.global_means(parts)  # over rows, not over parts
    assert {name: value.item() for name, value in found.items()} == {"a": 3.0, "b": 2.0}
    x = torch.ones(3)
    assert runtime.all_sum(x) is x and runtime.gather_objects([1, 2]) == [1, 2] and runtime.rank() == 0


def test_bfloat16_is_chosen_where_it_is_faster(monkeypatch):
    def chosen(dtype):
        run = run_of(dtype=dtype)
        run.trainable(small)
        return run.bf16
    small = modeling.load_causal_lm("tiny/policy", "cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert chosen("bfloat16") and not chosen("float32")
    assert not chosen("auto")  # for a small model the casts cost more than the products gain
    monkeypatch.setattr(small, "num_parameters", lambda: 135_000_000)
    assert chosen("auto") and not chosen("float32")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert not chosen("auto")  # slower there: docs/measurements.md


def test_the_first_model_decides_on_bfloat16_and_the_learning_rate(monkeypatch):
    """A small critic of a large policy runs in the precision in which the reference was frozen, and a large one of
    a small policy asks for no --lr."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    policy, critic = modeling.load_causal_lm("tiny/policy", "cpu"), modeling.load_causal_lm("tiny/policy", "cpu")
    for large, bf16, lr in ((policy, True, 1e-6), (critic, False, grpo.Args.lr)):
        with monkeypatch.context() as patch:
            patch.setattr(large, "num_parameters", lambda: 135_000_000)
            run = make_run(args=grpo.Args(lr=lr, device="cpu"))
            run.trainable(policy)
            assert run.bf16 == bf16
            run.trainable(critic)
            assert run.bf16 == bf16


def test_a_model_without_an_adapter_is_its_own_reference():
    model = llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with runtime.reference_mode(model), runtime.reference_mode(None):
        pass
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_gradients_are_scaled_down_to_their_largest_norm():
    run, model = run_of(max_grad_norm=0.5), torch.nn.Linear(2, 1, bias=False)
    for gradient, expected in (([3.0, 4.0], [0.3, 0.4]), ([0.03, 0.04], [0.03, 0.04])):
        model.weight.grad = torch.tensor([gradient])
        assert run.clip_grad_norm(model) == pytest.approx(math.hypot(*gradient))  # the norm before
        torch.testing.assert_close(model.weight.grad, torch.tensor([expected]), atol=1e-5, rtol=1e-5)


def test_rows_with_outputs_that_are_not_finite_are_named():
    run, model = run_of(), llama().eval()
    rows = [{"prompt": "fine", "prompt_ids": [5, 6]}, {"prompt": "broken", "prompt_ids": [7, 8]},
            {"prompt": "answered", "prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [8]}]
    run.batch(rows, 1, 3)
    with torch.no_grad():
        model.model.embed_tokens.weight[8] = nan
    model.lm_head.weight.grad = torch.full((V, 32), nan)
    refuses(lambda: run.clip_grad_norm(model), "step 1: the gradient is not finite", "'broken'", "'answered'", "--lr")
    with pytest.raises(modeling.UserError) as error:
        run.clip_grad_norm(model)
    assert "'fine'" not in str(error.value)
    run.batch(rows[:1], 4, 1)
    model.model.embed_tokens.weight.data[8] = 0
    refuses(lambda: run.clip_grad_norm(model), "step 4")


# --- the log

@pytest.fixture
def opened(tmp_path):
    """open(**flags): a Run whose folder is open. Ctrl-C works as before afterwards."""
    before = signal.getsignal(signal.SIGINT)

    def open_(args=None, **flags):
        run = make_run(args or RunArgs(device="cpu", run_dir=str(tmp_path / "run"), **flags))
        run.steps = 10
        assert run.resume(None) == 1
        return run
    yield open_
    signal.signal(signal.SIGINT, before)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_in_the_log(opened, capsys):
    """Five digits, the seconds of its phases, and no nan, which JSON has not; five metrics are printed."""
    run = opened(log_every=2)
    capsys.readouterr()
    for step in (1, 2):
        run.phase("generate")
        run.phase("update")
        run.log(step, {"reward": torch.tensor(1 / 3), "kl": nan, "a": 1, "b": 2.0, "c": 3, "d": 4, "lr": 1.23456789e-6})
    first, second = lines(run.dir / "metrics.jsonl")
    assert list(first)[:3] == ["step", "reward", "a"] and "kl" not in first
    assert first["reward"] == 0.33333 and first["lr"] == 1.2346e-6 and second["step"] == 2
    assert first["seconds"] == pytest.approx(first["seconds_generate"] + first["seconds_update"], abs=1e-3)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(printed) == 1 and printed[0].split() == "step 2 reward 0.333 a 1 b 2 c 3 d 4".split()


def test_an_evaluation_in_the_log(opened, capsys):
    """Printed at each step, with its intervals; it starts no clock and stops no run."""
    run = opened(log_every=100)
    capsys.readouterr()
    run._interrupts.append(1)
    run.log(3, {"win_rate": 0.64667, "win_rate_low": 0.5911, "win_rate_high": 0.6987, "kl": 1e9}, "eval_")
    assert lines(run.dir / "metrics.jsonl") == [{
        "step": 3, "eval_win_rate": 0.64667, "eval_win_rate_low": 0.5911, "eval_win_rate_high": 0.6987,
        "eval_kl": 1e9}]
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith("step    3  eval_win_rate 0.647 (0.59 to 0.70)") and not run.stopped


@pytest.mark.parametrize("max_kl, kl, stopped", [(0.0, 99.0, False), (5.0, 4.9, False), (5.0, 5.1, True)])
def test_max_kl_stops_a_run(opened, tmp_path, capsys, max_kl, kl, stopped):
    run = opened(grpo.Args(device="cpu", run_dir=str(tmp_path / "run"), max_kl=max_kl))
    run.log(4, {"kl": kl})
    assert run.stopped == stopped and ("--max-kl" in capsys.readouterr().out) == stopped
    assert run.due(0, 4) == stopped  # evaluated and saved before it ends


def test_ctrl_c_stops_a_run_after_the_step(opened):
    run = opened()
    run.log(1, {"loss": 0.0})
    assert not run.stopped
    signal.raise_signal(signal.SIGINT)
    assert not run.stopped
    run.log(2, {"loss": 0.0})
    assert run.stopped
    with pytest.raises(KeyboardInterrupt):  # the second one stops at once
        signal.raise_signal(signal.SIGINT)


def test_a_new_run_leaves_its_flags_and_versions(opened):
    run = opened(seed=3)
    args = json.loads((run.dir / "args.json").read_text())
    assert args["seed"] == 3 and args["resume"] == "" and args["ran_with"]["torch"] == torch.__version__
    assert {"python", "transformers", "device", "processes", "commit"} <= args["ran_with"].keys()
    make_run(run_dir=str(run.dir))  # no step was made: nothing can be lost
    (run.dir / "metrics.jsonl").write_text("")
    refuses(lambda: make_run(run_dir=str(run.dir)), f"--run-dir: {run.dir} exists")


def test_devices_that_are_not_there():
    refuses(lambda: make_run(RunArgs(device="moon")), "--device moon")


def test_files_are_written_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, None]})
    assert read_json(path, "here") == {"a": [1, None]} and list(tmp_path.iterdir()) == [path]
    write_whole(path, "{oops")
    refuses(lambda: read_json(path, "here"), "here: ", str(path))
    assert json_lines([{"a": 1.5, "b": nan}, {"a": "x"}]) == '{"a": 1.5}\n{"a": "x"}\n'


def test_the_memory_of_models_is_printed(tmp_path, capsys):
    """A trained weight takes 16 bytes: itself, its gradient and AdamW's two moments; a frozen one its own 4."""
    run, model = make_run(), llama()
    run.trained, run.frozen = {"policy": (model, None, None)}, [("reference", modeling.freeze(llama(), False))]
    run._print_memory()
    policy, reference = capsys.readouterr().out.splitlines()
    n = sum(p.numel() for p in model.parameters())
    assert policy.startswith("policy") and f"{16 * n / 2**20:.1f} MiB" in policy and "trained" in policy
    assert reference.startswith("reference") and f"{4 * n / 2**20:.1f} MiB" in reference and "trained" not in reference
