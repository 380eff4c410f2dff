"""Low-rank adapters (--lora-rank), with the library peft."""
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

import common
import modeling
import runtime
from helpers.runs import (TORCHRUN, command, evaluations_of, fails, last_checkpoint, process,
                          read, rows_of_data, run, small_flags, steps_of, without_times)

LORA = dict(lora_rank=4, lr=1e-2)


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="needs the extra lora: pip install '.[lora]'")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize("name, dtype", [("grpo", "float32"), ("grpo", "bfloat16"), ("ppo", "float32"),
                                         ("reinforce", "float32"), ("dpo", "float32"), ("dpo", "bfloat16")])
def test_a_policy_is_trained_saved_merged_and_measured_against_itself(name, dtype, tmp_path, peft):
    log = run(name, tmp_path / "run", dtype=dtype, **LORA)
    checkpoint = tmp_path / "run/checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()

    merged = modeling.load_causal_lm(str(checkpoint), "cpu")
    assert not hasattr(merged, "peft_config") and {p.dtype for p in merged.parameters()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained("tiny/policy", dtype=torch.float32)
    beside = peft.PeftModel.from_pretrained(  # not merged
        AutoModelForCausalLM.from_pretrained("tiny/policy", dtype=torch.float32), checkpoint)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)  # transformers knows adapters
    for other in (beside, plain):
        torch.testing.assert_close(logits(merged), logits(other), atol=1e-4, rtol=1e-4)
    assert (logits(merged) - logits(base)).abs().max() > 0.1  # it learned something
    trained = dict(merged.named_parameters())
    for key, weight in base.named_parameters():
        assert torch.equal(weight, trained[key]) != key.endswith("proj.weight"), key

    first, last = evaluations_of(log)
    assert first["eval_kl"] == 0 and abs(last["eval_kl"]) > 1e-3  # of so few samples it may be negative


def test_a_checkpoint_loads_in_every_script(tmp_path, peft, capsys):
    """As the policy, which gets another adapter or not, as a reward, as a critic and as a reference."""
    run("dpo", tmp_path / "policy", **LORA)
    run("reward_model", tmp_path / "reward", **LORA)
    policy, reward = (str(last_checkpoint(tmp_path / name)) for name in ("policy", "reward"))
    changes = dict(steps=1, eval_prompts=2)
    run("grpo", tmp_path / "grpo", model=policy, reward=reward, reference="tiny/policy", **changes)
    log = run("ppo", tmp_path / "ppo", model=policy, reward=reward, lora_rank=2, reference=policy, **changes)
    assert log[0]["eval_kl"] == 0 and f"the critic starts from {reward}\n" in capsys.readouterr().out
    # an adapter on top of another is the model that its own run evaluated
    last = run("reinforce", tmp_path / "both", model=policy, reward=reward, lora_rank=2, **changes | dict(lr=1e-2))[-1]
    (found,) = run("reinforce", tmp_path / "found", model=str(tmp_path / "both/checkpoint-1"), reward=reward,
                   reference=policy, **changes | dict(steps=0))
    for metric in ("eval_reward", "eval_kl", "eval_length"):
        assert found[metric] == pytest.approx(last[metric], rel=1e-2) and last["eval_kl"] != 0
    run("dpo", tmp_path / "dpo", model=policy, gold=reward, eval_prompts=2)
    run("reward_model", tmp_path / "again", model=reward, reference=policy, epochs=0)
    assert fails(capsys, "grpo", model=reward, run_dir=tmp_path / "no").startswith(f"{reward}: not a causal LM")


def test_a_reward_model_is_saved_with_its_head_and_its_zero(tmp_path, peft):
    log = run("reward_model", tmp_path / "run", **LORA)
    checkpoint = str(last_checkpoint(tmp_path / "run"))
    model, missing = modeling.load_model(AutoModelForSequenceClassification, checkpoint, "cpu")
    assert not missing and model.config.reward_bias != 0 and model.config.num_labels == 1
    tokenizer = common.load_tokenizer(checkpoint)
    pairs = common.read_pairs(rows_of_data("reward_model", tmp_path))[-4:]
    chosen, rejected = (common.score_texts(model, tokenizer, [common.render(tokenizer, pair["prompt"], pair[side])
                                                              for pair in pairs]) for side in ("chosen", "rejected"))
    loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean().item()
    assert loss == pytest.approx(log[-1]["eval_loss"], abs=1e-3)
    plain = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32, num_labels=1)
    ids = torch.tensor(common.encode(tokenizer, [common.render(tokenizer, pairs[0]["prompt"], pairs[0]["chosen"])]))
    with torch.no_grad():
        assert plain(ids).logits.item() + model.config.reward_bias == pytest.approx(chosen[0].item(), abs=1e-3)


def test_the_reference_is_the_policy_without_its_adapter(peft, tmp_path):
    args = runtime.RunArgs(lora_rank=2, device="cpu", run_dir=str(tmp_path / "run"))
    model = modeling.load_causal_lm("tiny/policy", "cpu")
    before = logits(model)
    model = runtime.Run(args, "test").trainable(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter)
    after = logits(model)
    with runtime.reference_mode(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after) and not torch.allclose(after, before)
    assert trained and [p for p in model.parameters() if p.requires_grad] == trained  # it can be trained further


def test_a_run_is_resumed(tmp_path, peft):
    changes = LORA | dict(lr_schedule="constant_with_warmup", eval_prompts=0)
    run("ppo", tmp_path / "run", **changes | dict(steps=1))
    command("ppo", resume=tmp_path / "run", steps=2)
    run("ppo", tmp_path / "whole", **changes)
    a, b = (load_file(tmp_path / folder / "checkpoint-2/adapter_model.safetensors") for folder in ("run", "whole"))
    assert a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)
    assert [row["loss"] for row in read(tmp_path / "run/metrics.jsonl")] == [
        row["loss"] for row in read(tmp_path / "whole/metrics.jsonl")]


def test_gradient_checkpointing_changes_nothing(tmp_path, peft):
    logs = [steps_of(run("grpo", tmp_path / str(flag), gradient_checkpointing=flag, eval_prompts=0, lora_rank=2))
            for flag in (False, True)]
    norms = [[row["grad_norm"] for row in log] for log in logs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and norms[0][0] > 0


def test_without_the_library_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    flags = small_flags("grpo", tmp_path / "run", lora_rank=4)
    assert fails(capsys, "grpo", **flags) == "--lora-rank: pip install peft" and not (tmp_path / "run").exists()


def test_matrices_as_autocast_casts_them_change_no_number():
    model = modeling.load_causal_lm("tiny/policy", "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(model)
        modeling.freeze(model, True)
        assert torch.equal(logits(model), before)
    kinds = [p.dtype for p in model.parameters() if p.ndim == 2]
    assert kinds.count(torch.bfloat16) > len(kinds) // 2


def test_two_processes_train_the_adapter_of_one(peft, tmp_path):
    """The gradients of its matrices; those of A are zero at first, since B is."""
    cases = ["grpo-lora", "dpo-lora", "reward_model-lora"]
    for folder, launch in (("one", [sys.executable]), ("two", TORCHRUN)):
        (tmp_path / folder).mkdir()
        process(*launch, "tests/runs/gradients.py", tmp_path / folder, *cases)
    for name in cases:
        one, two = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("one", "two"))
        names = [key for key in one if key.startswith("0|") and ("lora_B" in key or "score" in key)]
        assert one.keys() == two.keys() and len(names) >= 28
        worst = max(((one[k] - two[k]).norm() / one[k].norm()).item() for k in names)
        print(f"{name}: {len(names)} gradients, the largest relative difference {worst:.1e}")
        assert worst < 1e-5
        adapters = [load_file(last_checkpoint(tmp_path / folder / name) / "adapter_model.safetensors")
                    for folder in ("one", "two")]
        assert adapters[0].keys() == adapters[1].keys() and len(adapters[0]) >= 56


@pytest.mark.parametrize("kind", ["bert", "deberta-v2"])
def test_an_encoder_without_a_pooler_becomes_a_reward_model_that_loads(kind, tmp_path, peft):
    """Its pooler is new and random: it is trained and saved, not only its head."""
    tokenizer = common.load_tokenizer("tiny/policy")
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32,
                                  num_hidden_layers=2, num_attention_heads=2, pad_token_id=tokenizer.pad_token_id)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    log = run("reward_model", tmp_path / "run", model=str(tmp_path / "base"), bias_prompts=0, **LORA)
    rows = common.read_pairs(rows_of_data("reward_model", tmp_path))[-4:]
    reward = common.load_reward(str(last_checkpoint(tmp_path / "run")), "cpu")
    chosen, rejected = (reward(rows, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean().item()
    assert loss == pytest.approx(evaluations_of(log)[-1]["eval_loss"], abs=1e-4)


def test_a_critic_from_a_causal_lm_with_lora_in_bfloat16(tmp_path, peft):
    """What its body can do is found out before its weights are frozen in bfloat16."""
    run("ppo", tmp_path / "run", lora_rank=4, dtype="bfloat16", critic="tiny/policy", steps=1, eval_prompts=0)
