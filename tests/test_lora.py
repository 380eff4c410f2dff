"""Low-rank adapters (--lora-rank), with the library peft."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import common
from test_many_processes import ENV, TORCHRUN

QUICK = {
    "grpo": ["--prompts-per-step", "2", "--group-size", "2", "--steps", "2", "--eval-prompts", "4"],
    "dpo": ["--pairs-per-step", "4", "--eval-pairs", "4", "--eval-prompts", "4"],
    "reward_model": ["--pairs-per-step", "4", "--eval-pairs", "4", "--bias-prompts", "4"]}
QUICK["ppo"] = QUICK["reinforce"] = QUICK["grpo"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "pairs.jsonl"
    with open("tiny/preferences.jsonl") as file:
        path.write_text("".join(line for line, _ in zip(file, range(16))))
    return str(path)


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="needs the extra lora: pip install '.[lora]'")


def run(script: str, tmp_path, pairs, *flags) -> Path:
    module = __import__(script)
    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    more = ["--data", pairs] if script in ("dpo", "reward_model") else []
    more += ["--reference-dir", str(tmp_path / "ref")] if script == "dpo" else []
    args = common.tyro.cli(module.Args, args=[*QUICK[script], *more, "--run-dir", str(folder),
                                              "--max-new-tokens", "8", "--lr", "1e-2", *flags])
    module.main(args)
    return folder


def logits(model) -> torch.Tensor:
    ids = torch.arange(5, 25)[None]
    return model.eval()(input_ids=ids).logits.detach()


@pytest.mark.parametrize("script", ["grpo", "ppo", "reinforce", "dpo"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_is_trained_saved_merged_and_measured_against_itself(script, dtype, tmp_path, pairs, peft):
    folder = run(script, tmp_path, pairs, "--lora-rank", "4", "--dtype", dtype)
    checkpoint = folder / "checkpoint"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()

    merged, missing = common.load_model(AutoModelForCausalLM, str(checkpoint), "cpu")
    assert not missing and not hasattr(merged, "peft_config")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained("tiny/policy", dtype=torch.float32)
    beside = peft.PeftModel.from_pretrained(  # not merged
        AutoModelForCausalLM.from_pretrained("tiny/policy", dtype=torch.float32), checkpoint)
    torch.testing.assert_close(logits(merged), logits(beside), atol=1e-4, rtol=1e-4)
    assert (logits(merged) - logits(base)).abs().max() > 0.1  # it learned something

    evals = [row for row in map(json.loads, open(folder / "metrics.jsonl")) if "eval_kl" in row]
    assert evals[0]["eval_kl"] == 0 and abs(evals[-1]["eval_kl"]) > 1e-3  # of so few samples it may be negative
    for name, weight in base.named_parameters():
        changed = not torch.equal(weight, dict(merged.named_parameters())[name])
        assert changed == (name.endswith("proj.weight")), name


def test_the_reference_is_the_policy_without_its_adapter(peft):
    model, _ = common.load_model(AutoModelForCausalLM, "tiny/policy", "cpu")
    before = logits(model)
    adapter = common.add_lora(model, 2, False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    after = logits(model)
    with common.as_reference(model, adapter, "cpu"):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after) and not torch.allclose(after, before)
    assert any(p.requires_grad for p in model.parameters())  # and it trains on


def test_a_reward_model_is_saved_with_its_head_and_its_zero(tmp_path, pairs, peft):
    folder = run("reward_model", tmp_path, pairs, "--lora-rank", "4")
    checkpoint = str(folder / "checkpoint")
    model, missing = common.load_model(AutoModelForSequenceClassification, checkpoint, "cpu")
    assert not missing and model.config.reward_bias != 0 and model.config.num_labels == 1
    tokenizer = common.load_tokenizer(checkpoint)
    evals = [row for row in map(json.loads, open(folder / "metrics.jsonl")) if "eval_loss" in row]
    rows = common.read_pairs(pairs)[-4:]
    sides = [common.score_texts(model, tokenizer, [common.render(tokenizer, row["prompt"], row[side])
                                                   for row in rows], 4) for side in ("chosen", "rejected")]
    loss = -torch.nn.functional.logsigmoid(sides[0] - sides[1]).mean().item()
    assert loss == pytest.approx(evals[-1]["eval_loss"], abs=1e-3)

    policy = run("grpo", tmp_path, pairs, "--reward", checkpoint)  # as a reward
    run("ppo", tmp_path, pairs, "--reward", checkpoint, "--lora-rank", "2")  # and as a critic
    with pytest.raises(SystemExit):
        run("grpo", tmp_path, pairs, "--model", checkpoint)
    run("grpo", tmp_path, pairs, "--model", str(policy / "checkpoint"), "--lora-rank", "2")


def test_gradient_checkpointing_changes_nothing(tmp_path, pairs, peft):
    a, b = (run("grpo", tmp_path, pairs, "--lora-rank", "2", *flag) / "metrics.jsonl"
            for flag in ([], ["--gradient-checkpointing"]))
    norms = [[row["grad_norm"] for row in map(json.loads, open(file)) if "grad_norm" in row] for file in (a, b)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and norms[0][0] > 0


def test_without_the_library_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    model, _ = common.load_model(AutoModelForCausalLM, "tiny/policy", "cpu")
    with pytest.raises(SystemExit) as stopped:
        common.add_lora(model, 4, False)
    assert stopped.value.code == 2 and "plain-rlhf[lora]" in capsys.readouterr().err


def test_a_reference_on_the_cpu_between_uses_changes_nothing(tmp_path, pairs):
    for script in ("grpo", "dpo"):
        a, b = (run(script, tmp_path, pairs, *flag) / "metrics.jsonl" for flag in ([], ["--offload-reference"]))
        rows = [[{k: v for k, v in json.loads(line).items() if "seconds" not in k and "per_second" not in k}
                 for line in open(file)] for file in (a, b)]
        assert rows[0] == rows[1]


def test_matrices_as_autocast_casts_them_change_no_number():
    model, _ = common.load_model(AutoModelForCausalLM, "tiny/policy", "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(model)
        common.freeze(model, True)
        assert torch.equal(logits(model), before)
    kinds = [p.dtype for p in model.parameters() if p.ndim == 2]
    assert kinds.count(torch.bfloat16) > len(kinds) // 2


def test_two_processes_train_the_adapter_of_one(peft, tmp_path):
    """The gradients of its matrices; those of A are zero at first, since B is."""
    for folder, launch in (("one", [sys.executable]), ("two", TORCHRUN)):
        done = subprocess.run([*launch, "tests/many_processes.py", tmp_path / folder, "grpo --lora-rank"], env=ENV,
                              capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / folder / "grpo --lora-rank.safetensors") for folder in ("one", "two"))
    names = [name for name in one if "lora_B" in name]
    assert one.keys() == two.keys() and len(names) == 28
    worst = max(((one[k] - two[k]).norm() / one[k].norm()).item() for k in names)
    print(f"grpo --lora-rank: {len(names)} gradients, the worst relative difference {worst:.1e}")
    assert worst < 1e-5
    adapters = [load_file(tmp_path / folder / "grpo --lora-rank/checkpoint/adapter_model.safetensors")
                for folder in ("one", "two")]
    assert adapters[0].keys() == adapters[1].keys() and len(adapters[0]) == 56
