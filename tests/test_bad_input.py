"""What users get wrong: each case ends with one line on stderr, that begins as said here, exit code 2,
and no file of the user's changed. @ stands for a folder of bad files, made by `bad` below."""
import gzip
import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import common
import dpo
import grpo
import ppo
import reinforce
import reward_model

SCRIPTS = {"grpo": grpo, "ppo": ppo, "reinforce": reinforce, "dpo": dpo, "reward_model": reward_model}
SMALL = {
    "grpo": dict(steps=1, prompts_per_step=3, group_size=4, max_new_tokens=8, eval_prompts=2, device="cpu"),
    "dpo": dict(data="@/pairs.jsonl", eval_pairs=2, eval_prompts=2, device="cpu"),
    "reward_model": dict(data="@/pairs.jsonl", eval_pairs=2, bias_prompts=0, device="cpu")}
SMALL["ppo"] = SMALL["reinforce"] = SMALL["grpo"]

NEGATIVE, ZERO = "must not be negative", "must be more than 0"
CASES = [  # script, flags, the first words of the line
    # flags
    *[("grpo", {flag: -1}, f"--{flag.replace('_', '-')}: {NEGATIVE}") for flag in (
        "steps", "lora_rank", "eval_every", "save_every", "warmup", "beta", "max_prompt_tokens", "reward_timeout")],
    *[("grpo", {flag: 0}, f"--{flag.replace('_', '-')}: {ZERO}") for flag in (
        "prompts_per_step", "max_new_tokens", "temperature", "lr", "epochs", "minibatches", "micro_batch_size",
        "tokens_per_micro_batch", "generate_batch_size", "log_every", "eval_prompts", "keep")],
    ("grpo", dict(temperature=float("nan")), f"--temperature: {ZERO}"),
    ("grpo", dict(lr=float("nan")), f"--lr: {ZERO}"),
    ("grpo", dict(group_size=1), "--group-size: a group of 1"),
    ("grpo", dict(minibatches=13), "--minibatches: more than"),
    ("grpo", dict(top_p=0.0), "--top-p: must be more than 0 and at most 1"),
    ("grpo", dict(top_p=1.5), "--top-p: must be more than 0 and at most 1"),
    ("grpo", dict(device="moon"), "--device moon: "),
    ("grpo", dict(run_dir="@/pairs.jsonl/run"), "--run-dir: @/pairs.jsonl/run cannot be made: Not a directory"),
    ("grpo", dict(run_dir="@/folder"), "--run-dir: @/folder exists already"),
    ("ppo", dict(gamma=1.5), "--gamma: must be between 0 and 1"),
    ("ppo", dict(lam=-0.1), "--lam: must be between 0 and 1"),
    ("ppo", dict(value_clip=-1.0), f"--value-clip: {NEGATIVE}"),
    ("ppo", dict(critic_warmup=-1), f"--critic-warmup: {NEGATIVE}"),
    ("ppo", dict(target_kl=-1.0), f"--target-kl: {NEGATIVE}"),
    ("ppo", dict(critic_lr=0.0), f"--critic-lr: {ZERO}"),
    ("ppo", dict(kl_horizon=0), f"--kl-horizon: {ZERO}"),
    ("ppo", dict(kl_target=6.0, beta=0.0), "--kl-target: needs a --beta above 0"),
    ("ppo", dict(critic="tiny/none"), "tiny/none: no such model folder"),
    ("ppo", dict(critic="@/other-words"), "--critic @/other-words: its tokenizer is not the policy's"),
    ("reinforce", dict(group_size=1), "--group-size: --baseline loo needs"),
    ("reinforce", dict(group_size=1, baseline="mean"), "--group-size: --baseline mean needs"),
    ("reinforce", dict(moving_decay=1.0), "--moving-decay: must be"),
    ("dpo", dict(label_smoothing=0.5), "--label-smoothing: must be"),
    ("dpo", dict(loss_type="hinge", label_smoothing=0.1), "--loss-type hinge: has no --label-smoothing"),
    ("dpo", dict(loss_type="ipo", robust=True), "--loss-type ipo: has no --label-smoothing"),
    ("dpo", dict(beta=0.0), f"--beta: {ZERO}"),
    ("dpo", dict(max_tokens=1), "--max-tokens: must leave room"),
    ("dpo", dict(sft_weight=-1.0), f"--sft-weight: {NEGATIVE}"),
    ("dpo", dict(eval_pairs=0), f"--eval-pairs: {ZERO}"),
    ("dpo", dict(run_dir="@/folder"), "--run-dir: @/folder exists already"),
    ("reward_model", dict(label_smoothing=0.7), "--label-smoothing: must be"),
    ("reward_model", dict(centering=-1.0), f"--centering: {NEGATIVE}"),
    ("reward_model", dict(margin_column="price"), "@/pairs.jsonl: a row has no number in the column 'price'"),
    ("reward_model", dict(bias_prompts=2, reference="tiny/reward_model"), "tiny/reward_model: no causal LM"),
    # models
    ("grpo", dict(model="tiny/none"), "tiny/none: no such model folder"),
    ("grpo", dict(model="tiny/world.py"), "tiny/world.py: no such model folder"),
    ("grpo", dict(model="@/folder"), "@/folder: no model: the folder has no config.json"),
    ("grpo", dict(model="@/config-damaged"), "@/config-damaged: no "),
    ("grpo", dict(model="@/type-unknown"), "@/type-unknown: no "),
    ("grpo", dict(model="@/weights-damaged"), "@/weights-damaged: no CausalLM model loads from it"),
    ("grpo", dict(model="@/weights-gone"), "@/weights-gone: no CausalLM model loads from it"),
    ("grpo", dict(model="@/pickle"), "@/pickle: no CausalLM model loads from it"),
    ("grpo", dict(model="@/remote-code"), "@/remote-code: no "),
    ("grpo", dict(model="@/no-tokenizer"), "@/no-tokenizer: no tokenizer loads from it"),
    ("grpo", dict(model="@/a-layer-short"), "@/a-layer-short: no causal LM: it has no weights for"),
    ("grpo", dict(model="tiny/reward_model"), "tiny/reward_model: no causal LM"),
    ("grpo", dict(model="@/template-raises"), "@/template-raises: its chat template refuses the prompt"),
    ("grpo", dict(model="@/no-template", data="@/messages.jsonl"), "@/no-template: has no chat template"),
    ("dpo", dict(model="@/weights-damaged"), "@/weights-damaged: no CausalLM model loads from it"),
    ("reward_model", dict(model="@/weights-damaged"), "@/weights-damaged: no SequenceClassification model loads"),
    ("grpo", dict(reward="tiny/policy"), "tiny/policy: not a reward model"),
    ("grpo", dict(reward="@/two-labels"), "@/two-labels: not a reward model: it has 2 labels"),
    # rows
    ("grpo", dict(data="none.jsonl"), "none.jsonl: no such file"),
    ("grpo", dict(data="@/folder"), "@/folder: no such file"),
    ("grpo", dict(data="nobody/nothing:train"), "nobody/nothing:train: no"),
    ("grpo", dict(data="@/not-json.jsonl"), "@/not-json.jsonl:2: not JSON"),
    ("grpo", dict(data="@/list.jsonl"), "@/list.jsonl:1: a JSON object is expected"),
    ("grpo", dict(data="@/number.jsonl"), "@/number.jsonl:1: a JSON object is expected"),
    ("grpo", dict(data="@/empty.jsonl"), "@/empty.jsonl: holds no rows"),
    ("grpo", dict(data="@/blank.jsonl"), "@/blank.jsonl: holds no rows"),
    ("grpo", dict(data="@/question.jsonl"), "@/question.jsonl:1: no column 'prompt', only question"),
    ("grpo", dict(data="@/question.jsonl", prompt_column="q"), "@/question.jsonl:1: no column 'q', only question"),
    ("grpo", dict(data="@/prompt-number.jsonl"), "@/prompt-number.jsonl:1: 'prompt' must be a text or a list"),
    ("grpo", dict(data="@/prompt-empty.jsonl"), "@/prompt-empty.jsonl:1: 'prompt' must be a text or a list"),
    ("grpo", dict(data="@/prompt-no-turns.jsonl"), "@/prompt-no-turns.jsonl:1: 'prompt' must be a text or a list"),
    ("grpo", dict(data="@/prompt-no-content.jsonl"), "@/prompt-no-content.jsonl:1: 'prompt' must be a text or a list"),
    ("grpo", dict(data="@/prompt-answered.jsonl"), "@/prompt-answered.jsonl:1: the prompt ends with the assistant's"),
    ("grpo", dict(data="@/utf-16.jsonl"), "@/utf-16.jsonl: cannot be read as text"),
    ("grpo", dict(data="@/latin-1.jsonl"), "@/latin-1.jsonl: cannot be read as text"),
    ("grpo", dict(data="@/not-gzip.jsonl.gz"), "@/not-gzip.jsonl.gz: cannot be read as text"),
    ("grpo", dict(data="@/cut.jsonl.gz"), "@/cut.jsonl.gz: cannot be read as text"),
    ("grpo", dict(data="@/one.jsonl"), "@/one.jsonl: 1 rows, which --eval-prompts 2 holds out"),
    ("grpo", dict(data="@/long.jsonl"), "@/long.jsonl: row 1: its prompt has 30"),
    ("grpo", dict(data="@/long.jsonl", max_prompt_tokens=2), "@/long.jsonl: no row has a prompt of at most 2 tokens"),
    ("grpo", dict(eval_data="@/question.jsonl"), "@/question.jsonl:1: no column 'prompt'"),
    ("dpo", dict(data="tiny/prompts.jsonl"), "tiny/prompts.jsonl:1: pairs need the columns 'chosen' and 'rejected'"),
    ("dpo", dict(data="@/pair-numbers.jsonl"), "@/pair-numbers.jsonl:1: 'chosen' and 'rejected' must be texts"),
    ("dpo", dict(data="@/pair-strangers.jsonl"), "@/pair-strangers.jsonl:1: no 'prompt', and chosen and rejected"),
    ("dpo", dict(data="@/pair-turns.jsonl"), "@/pair-turns.jsonl:1: chosen and rejected must be the same messages"),
    ("dpo", dict(data="@/pair-mixed.jsonl"), "@/pair-mixed.jsonl:1: 'chosen' and 'rejected' must be both texts"),
    ("dpo", dict(data="@/pair-equal.jsonl"), "@/pair-equal.jsonl: no pair is left to learn from"),
    ("dpo", dict(data="@/one-pair.jsonl"), "@/one-pair.jsonl: 1 rows, which --eval-pairs 2 holds out"),
    ("dpo", dict(reference_dir="@/pairs.jsonl/cache"), "--reference-dir: @/pairs.jsonl/cache"),
    ("reward_model", dict(data="@/pair-equal.jsonl"), "@/pair-equal.jsonl: no pair is left to learn from"),
    ("reward_model", dict(data="@/pair-numbers.jsonl"), "@/pair-numbers.jsonl:1: 'chosen' and 'rejected' must be"),
    # reward functions
    ("grpo", dict(reward="@/none.py:f"), "@/none.py: no such file"),
    ("grpo", dict(reward="@/rewards.py"), "@/rewards.py: name the function in it"),
    ("grpo", dict(reward="@/rewards.py:nothing"), "@/rewards.py: has no function 'nothing'"),
    ("grpo", dict(reward="@/rewards.py:constant"), "@/rewards.py: has no function 'constant'"),
    ("grpo", dict(reward="@/syntax.py:f"), "@/syntax.py: cannot be imported: SyntaxError"),
    ("grpo", dict(reward="@/imports.py:f"), "@/imports.py: cannot be imported: ModuleNotFoundError"),
    ("grpo", dict(reward="@/rewards.py:raises"), "@/rewards.py:raises: raised ZeroDivisionError"),
    ("grpo", dict(reward="@/rewards.py:few"), "@/rewards.py:few: returned 1 rewards for"),
    ("grpo", dict(reward="@/rewards.py:many"), "@/rewards.py:many: returned"),
    ("grpo", dict(reward="@/rewards.py:nan"), "@/rewards.py:nan: must return a list of finite numbers"),
    ("grpo", dict(reward="@/rewards.py:infinite"), "@/rewards.py:infinite: must return a list of finite numbers"),
    ("grpo", dict(reward="@/rewards.py:texts"), "@/rewards.py:texts: must return a list of finite numbers"),
    ("grpo", dict(reward="@/rewards.py:returns_none"), "@/rewards.py:returns_none: must return a list of finite"),
    ("grpo", dict(reward="@/rewards.py:one_number"), "@/rewards.py:one_number: must return a list of finite numbers"),
    ("grpo", dict(reward="@/rewards.py:all_left_out", eval_every=0),
     "--reward @/rewards.py:all_left_out: left out every completion of step 1"),
    ("grpo", dict(reward="@/rewards.py:hangs", reward_timeout=0.2),
     "@/rewards.py:hangs: took more than --reward-timeout 0.2 seconds"),
    ("ppo", dict(reward="@/rewards.py:nan"), "@/rewards.py:nan: must return a list of finite numbers"),
    ("reinforce", dict(reward="@/rewards.py:raises"), "@/rewards.py:raises: raised ZeroDivisionError"),
    ("dpo", dict(gold="@/rewards.py:raises"), "@/rewards.py:raises: raised ZeroDivisionError"),
    # runs to go on with
    ("grpo", dict(resume="@/none"), "--resume @/none: no run: "),
    ("grpo", dict(resume="@/folder"), "--resume @/folder: no run: "),
    ("ppo", dict(resume="@/run"), "--resume @/run: a run of another script: it has --kl-in"),
    ("grpo", dict(resume="@/run-begun"), "--resume @/run-begun: it has no checkpoint yet"),
    ("grpo", dict(resume="@/run-damaged"), "--resume @/run-damaged: @/run-damaged/checkpoint/resume/state.json is damaged"),
    ("grpo", dict(resume="@/run-torn"), "--resume @/run-torn: @/run-torn/checkpoint is damaged, or does not"),
    ("grpo", dict(resume="@/run", data="@/one-more.jsonl"), "--resume @/run: --data now gives 5 rows"),
]

REWARDS = '''
import time
constant = 1
def raises(completions, **c): return [1 / 0]
def few(completions, **c): return [0.0]
def many(completions, **c): return [0.0] * (len(completions) + 1)
def nan(completions, **c): return [float("nan")] * len(completions)
def infinite(completions, **c): return [float("inf")] * len(completions)
def texts(completions, **c): return ["1"] * len(completions)
def returns_none(completions, **c): pass
def one_number(completions, **c): return 1.0
def all_left_out(completions, **c): return [None] * len(completions)
def hangs(completions, **c): time.sleep(60)
'''


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    """The folder of bad files."""
    at = tmp_path_factory.mktemp("bad")

    def rows(name: str, *lines):
        (at / f"{name}.jsonl").write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))

    def model(name: str, base: str = "policy") -> Path:
        shutil.copytree(f"tiny/{base}", at / name)
        return at / name

    def change(path: Path, **values):
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    some = {"prompt": "what is a cat ?"}
    rows("prompts", *[some] * 6)
    rows("pairs", *[{**some, "chosen": f"yes {w} .", "rejected": "no ."} for w in "a b c d e f".split()])
    rows("one", some)
    rows("one-more", *[some] * 7)
    rows("one-pair", {**some, "chosen": "yes .", "rejected": "no ."})
    rows("not-json", some, "{oops", some, some)
    rows("list", "[1, 2]")
    rows("number", "3")
    rows("empty")
    rows("blank", "", "  ")
    rows("question", {"question": "a ?"})
    rows("prompt-number", {"prompt": 3})
    rows("prompt-empty", {"prompt": "  "})
    rows("prompt-no-turns", {"prompt": []})
    rows("prompt-no-content", {"prompt": [{"role": "user"}]})
    turns = [{"role": "user", "content": "a ?"}, {"role": "assistant", "content": "b ."}]
    rows("prompt-answered", {"prompt": turns})
    rows("messages", *[{"prompt": turns[:1]}] * 6)
    rows("long", {"prompt": "a " * 300}, *[some] * 5)
    rows("pair-numbers", *[{**some, "chosen": 1, "rejected": 2}] * 4)
    rows("pair-strangers", *[{"chosen": "yes", "rejected": "no"}] * 4)
    rows("pair-turns", *[{"chosen": turns, "rejected": [{"role": "user", "content": "c ?"}, turns[1]]}] * 4)
    rows("pair-mixed", *[{"chosen": turns, "rejected": "no"}] * 4)
    rows("pair-equal", *[{**some, "chosen": "yes .", "rejected": "yes ."}] * 4)
    (at / "utf-16.jsonl").write_bytes(json.dumps(some).encode("utf-16"))
    (at / "latin-1.jsonl").write_bytes('{"prompt": "caf\u00e9 ?"}'.encode("latin-1"))
    (at / "not-gzip.jsonl.gz").write_text(json.dumps(some))
    (at / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(some).encode() * 50)[:-12])
    (at / "rewards.py").write_text(REWARDS)
    (at / "syntax.py").write_text("def f(:\n")
    (at / "imports.py").write_text("import a_module_that_nobody_has\n")
    (at / "folder").mkdir()
    (at / "folder/precious.txt").write_text("precious")

    (model("config-damaged") / "config.json").write_text("{oops")
    change(model("type-unknown") / "config.json", model_type="nonesuch", architectures=["Nonesuch"])
    weights = model("weights-damaged") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (model("weights-gone") / "model.safetensors").unlink()
    pickled = model("pickle")
    torch.save(common.load_model(grpo.AutoModelForCausalLM, "tiny/policy", "cpu")[0].state_dict(),
               pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    change(model("remote-code") / "config.json", model_type="theirs", auto_map={
        "AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"})
    (at / "remote-code/theirs.py").write_text("raise SystemExit('their code ran')\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if name == "tokenizer.json":
            model("no-tokenizer")
        (at / "no-tokenizer" / name).unlink()
    layers = json.loads(Path("tiny/policy/config.json").read_text())["num_hidden_layers"]
    change(model("a-layer-short") / "config.json", num_hidden_layers=layers + 1)
    for name, template in (("template-raises", "{{ raise_exception('no such role') }}"), ("no-template", None)):
        tokenizer = common.load_tokenizer("tiny/policy")
        tokenizer.chat_template = template
        (model(name) / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(at / name)
    tokenizer = common.load_tokenizer("tiny/policy")
    LlamaForSequenceClassification(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_labels=2)).save_pretrained(at / "two-labels")
    tokenizer.save_pretrained(at / "two-labels")
    tokenizer.add_tokens(["zebraic"])
    tokenizer.save_pretrained(model("other-words", "reward_model"))

    grpo.main(grpo.Args(**SMALL["grpo"] | {"data": str(at / "pairs.jsonl"), "run_dir": str(at / "run"), "eval_every": 0}))
    for name in ("begun", "damaged", "torn"):
        shutil.copytree(at / "run", at / f"run-{name}")
    shutil.rmtree(at / "run-begun/checkpoint")
    (at / "run-damaged/checkpoint/resume/state.json").write_text("{oops")
    for path in (at / "run-torn/checkpoint/resume").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:1000])
    return at


def digests(folder: Path) -> dict:
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*")
            if p.is_file() and "__pycache__" not in p.parts and p.name != "lock"}


@pytest.mark.parametrize("script, flags, words", CASES, ids=[f"{s}: {w[:60]}" for s, _, w in CASES])
def test_bad_input(script, flags, words, bad, tmp_path, monkeypatch, capsys):
    at = {k: v.replace("@", str(bad)) if isinstance(v, str) else v
          for k, v in {**SMALL[script], "run_dir": str(tmp_path / "run"),
                           **({"reference_dir": str(tmp_path / "reference")} if script == "dpo" else {}), **flags}.items()}
    before = digests(bad)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        if "resume" in flags:  # takes the command line, where the run's own flags come in
            flags = [x for k in flags for x in (f"--{k}", at[k])]
            monkeypatch.setattr(sys, "argv", [script, *flags])
            common.command_line(SCRIPTS[script].main, SCRIPTS[script].Args, "")
        else:
            SCRIPTS[script].main(SCRIPTS[script].Args(**at))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    assert error.startswith("error: " + words.replace("@", str(bad))), error
    assert digests(bad) == before
    run = tmp_path / "run"
    assert not run.exists() or "reward" in flags or "gold" in flags  # known to be bad once it is called


def test_there_are_enough_of_them():
    assert len(CASES) >= 60
