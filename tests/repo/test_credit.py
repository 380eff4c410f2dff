"""tools/credit.py: the advantages it prints are those of the run's next step, bit for bit."""
import hashlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import common
import grpo
import ppo
import reinforce
from checkpoints import checksums
from helpers.repo import ROOT, load, user_error

credit = load("tools/credit.py")
SMALL = dict(prompts_per_step=3, group_size=4, max_new_tokens=16, eval_prompts=0, steps=1, device="cpu", lr=3e-3)
CASES = {  # script, its flags, and the function whose result is the advantages
    "grpo": (grpo, {}, "group_advantages"),
    "grpo, KL in the reward": (grpo, dict(kl_in_reward=True, scale_rewards="batch", beta=0.5), "group_advantages"),
    "grpo without reference": (grpo, dict(beta=0.0, truncation_penalty=0.5), "group_advantages"),
    "ppo": (ppo, dict(critic_lr=3e-3), "gae"),
    "ppo, beta adapted, bfloat16": (ppo, dict(kl_target=0.01, kl_horizon=12, whiten=False, gae_lambda=0.5,
                                             mask_truncated=True, dtype="bfloat16"), "gae"),
    "reinforce": (reinforce, {}, "token_advantages"),
    "reinforce, moving baseline": (reinforce, dict(baseline="moving", kl_per_token=True), "token_advantages"),
    "reinforce, greedy baseline": (reinforce, dict(baseline="greedy", whiten=True, beta=0.0), "token_advantages"),
    "ppo, LoRA": (ppo, dict(lora_rank=2), "gae"),
    "grpo, LoRA": (grpo, dict(lora_rank=2, kl_in_reward=True), "group_advantages")}


def train(script, **flags):
    script.main(script.Args(**SMALL | flags))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the run's own handler would keep its lock


def files(folder) -> dict:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def lines(out: str) -> list[tuple[float, list[float], str]]:
    """(score, advantages, text) of each printed completion."""
    found = re.findall(r"^(?:best |worst) +(\S+)  (.*)$", out, re.M)
    number = r"\[([+-]\d+\.\d\d)\]"
    return [(float(score), [float(x) for x in re.findall(number, line)], re.sub(number, "", line))
            for score, line in found]


@pytest.mark.parametrize("case", CASES)
def test_the_advantages_are_those_of_the_next_step(case, tmp_path, monkeypatch, capsys):
    script, flags, name = CASES[case]
    if flags.get("lora_rank") and not importlib.util.find_spec("peft"):
        pytest.skip("peft is missing: pip install peft")
    run = tmp_path / "run"
    train(script, **flags, run_dir=str(run))
    results, function = [], getattr(script, name)

    def spy(*arguments, **keywords):
        results.append(function(*arguments, **keywords))
        return results[-1]
    monkeypatch.setattr(script, name, spy)
    before, _ = files(run), capsys.readouterr()
    credit.main(credit.Args(str(run), prompts=3, device="cpu"))
    printed = lines(capsys.readouterr().out)
    assert files(run) == before
    train(script, **flags, resume=str(run), steps=2)
    ours, theirs = (result if isinstance(result, torch.Tensor) else result[0] for result in results[:2])
    assert torch.equal(ours, theirs) and ours.abs().max() > 0

    assert len(printed) == 6  # the best and the worst of three prompts
    for (best, *_), (worst, *_) in zip(printed[::2], printed[1::2]):
        assert best >= worst
    for _, numbers, _ in printed:
        one_for_all = script is grpo or (script is reinforce and not flags.get("kl_per_token"))
        assert numbers and (not one_for_all or len(set(numbers)) == 1)
    if name != "gae" or not ppo.Args(**flags).whiten:  # what is printed is in what was computed
        rounded = {f"{x:+.2f}" for x in ours.flatten().tolist()} | {"+0.00", "-0.00"}
        assert {f"{x:+.2f}" for _, numbers, _ in printed for x in numbers} <= rounded
    if script is ppo:
        assert any(len(set(numbers)) > 1 for _, numbers, _ in printed)
    if case == "grpo":
        assert all(set(worst) == {0.0} or max(worst) < 0 < min(best)
                   for (_, best, _), (_, worst, _) in zip(printed[::2], printed[1::2]))


def test_the_models_are_those_of_the_last_checkpoint(tmp_path, monkeypatch):
    """The critic too, which no other file of the checkpoint holds."""
    made = {}
    for name in ("load_critic", "load_causal_lm"):
        function = getattr(ppo, name)

        def remember(*arguments, name=name, function=function):
            return made.setdefault(name, function(*arguments))
        monkeypatch.setattr(ppo, name, remember)
    train(ppo, run_dir=str(tmp_path / "run"), critic_lr=3e-3)
    trained = made["load_critic"].state_dict(), made["load_causal_lm"].state_dict()
    monkeypatch.undo()
    run, script, models = credit.load_run(str(tmp_path / "run"), "cpu")
    assert script is ppo and run.state["step"] == 1
    for model, weights in zip((models["critic"], models["policy"]), trained):
        assert weights and all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    initial = ppo.load_critic(run.args, run.reward, common.load_tokenizer("tiny/policy"), "cpu")
    assert any(not torch.equal(a, b) for a, b in zip(initial.parameters(), models["critic"].parameters()))


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("credit") / "run"
    train(grpo, run_dir=str(run))
    return run


def test_a_renewed_reference_is_refused(a_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(a_run, copy)
    flags = json.loads((copy / "args.json").read_text())
    (copy / "args.json").write_text(json.dumps(flags | {"renew_reference_every": 1}))
    with pytest.raises(common.UserError, match="--renew-reference-every"):
        credit.load_run(str(copy), "cpu")


def test_nothing_runs_that_a_checkpoint_holds(a_run, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    copy = tmp_path / "run"
    shutil.copytree(a_run, copy)
    folder = copy / "checkpoint-1/resume"
    saved = json.loads((folder / "state.json").read_text())
    (folder / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(common.UserError, match="damaged: a file has changed"):
        credit.load_run(str(copy), "cpu")
    (folder / "state.json").write_text(json.dumps(saved | {"checksums": checksums(folder)}))
    with pytest.raises(common.UserError, match="would run posix.system"):
        credit.load_run(str(copy), "cpu")
    assert not (tmp_path / "ran").exists()
    for state in ({}, {"step": 1}, saved | {"step": "1"}, saved | {"rows": None}):
        (folder / "state.json").write_text(json.dumps(state))
        with pytest.raises(common.UserError, match="damaged"):
            credit.load_run(str(copy), "cpu")


def test_as_a_command_and_what_it_prints(a_run):
    done = subprocess.run([sys.executable, "tools/credit.py", a_run, "--prompts", "2"], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(lines(done.stdout)) == 4 and len(done.stdout.splitlines()) == 6 and "\033" not in done.stdout
    prompts = [row["prompt"][-1]["content"] for row in common.read_prompts("tiny/prompts.jsonl")]
    assert all(prompt in prompts for prompt in done.stdout.splitlines()[::3])
    assert all(text.endswith("<|end|>") or len(text.split()) >= 15 for *_, text in lines(done.stdout))


def test_completions_without_a_score_are_left_out(a_run, tmp_path, capsys):
    (tmp_path / "reward.py").write_text(
        "def reward(prompts, completions, **columns):\n"
        "    return [None, 1.0, None, 0.0] * (len(prompts) // 8) + [None] * 4 + [0.5, None, None, 2.0]\n")
    flags = json.loads((a_run / "args.json").read_text()) | {"reward": f"{tmp_path}/reward.py:reward"}
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "checkpoint-1").symlink_to(a_run / "checkpoint-1")
    (copy / "args.json").write_text(json.dumps(flags))
    credit.main(credit.Args(str(copy), prompts=3, device="cpu"))
    assert [score for score, *_ in lines(capsys.readouterr().out)] == [1.0, 0.0, 2.0, 0.5]


def test_credit_line():
    tokenizer = common.load_tokenizer("tiny/policy")
    ids = torch.tensor(tokenizer("a lily \n is", add_special_tokens=False).input_ids)
    advantages = torch.linspace(-1, 1, len(ids))
    line = credit.credit_line(tokenizer, ids, advantages, colors=False)
    assert line == "a[-1.00] lily[-0.33] \\n[+0.33] is[+1.00]"
    line = credit.credit_line(tokenizer, ids, advantages, colors=True)
    assert line.startswith("\033[30;48;2;255;55;55ma\033[0m") and "48;2;55;255;55m is" in line
    assert re.sub(r"\033\[[\d;]*m", "", line) == "a lily \\n is"
    zeros = credit.credit_line(tokenizer, ids[:1], torch.zeros(1), colors=True)
    assert zeros == "\033[30;48;2;255;255;255ma\033[0m"  # white


@pytest.mark.parametrize("terminal, no_color, colors", [(True, None, True), (True, "", True), (True, "1", False),
                                                       (False, None, False)])
def test_colors_only_in_a_terminal_and_without_NO_COLOR(terminal, no_color, colors, a_run, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    credit.main(credit.Args(str(a_run), prompts=1, device="cpu"))
    out = capsys.readouterr().out
    assert ("\033[30;48;2;" in out) == colors and bool(re.search(r"\[[+-]\d", out)) != colors


def test_errors_are_one_line(a_run, tmp_path):
    def error(folder, **flags):
        return user_error(lambda: credit.main(credit.Args(str(folder), **flags)))
    assert error(tmp_path / "none").startswith(f"{tmp_path}/none: {tmp_path}/none/args.json cannot be read: ")
    assert error(a_run, prompts=0) == "--prompts: must be more than 0"
    other = tmp_path / "other"
    other.mkdir()
    (other / "args.json").write_text('{"loss_type": "sigmoid", "ran_with": {}}')
    assert error(other) == f"{other}: not a run of grpo.py, ppo.py or reinforce.py in this version"
    (other / "args.json").write_text((a_run / "args.json").read_text())
    assert error(other) == f"{other}: has no checkpoint yet"
    (other / "checkpoint-1/resume").mkdir(parents=True)
    assert "state.json cannot be read" in error(other)
    (other / "checkpoint-1/resume/state.json").write_text('{"step": 1}')
    assert error(other).startswith(f"{other}/checkpoint-1 is damaged: ")
    assert error(a_run, device="moon").startswith("--device moon: ")
