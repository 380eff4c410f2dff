"""What users get wrong: each case ends in one line on stderr that begins as said here, with exit code 2, and no file
of the user's is changed. @ stands for a folder of bad files, made by `bad` below."""
import gzip
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import common
import modeling
from helpers.runs import PAIRWISE, SCRIPTS, fails, run

ONE_STEP = dict(steps=1, prompts_per_step=3, group_size=4, max_new_tokens=8, eval_prompts=2, data="@/prompts.jsonl")
FLAGS = {"grpo": ONE_STEP, "ppo": ONE_STEP, "reinforce": ONE_STEP,
         "dpo": dict(data="@/pairs.jsonl", eval_pairs=2, eval_prompts=2, max_new_tokens=8),
         "reward_model": dict(data="@/pairs.jsonl", eval_pairs=2, bias_prompts=0)}

NEGATIVE, ZERO = "must be at least 0", "must be more than 0"
CASES = [  # script, flags, the beginning of the message
    # flags (all bounds: test_runtime.py)
    ("grpo", dict(steps=-1), f"--steps: {NEGATIVE}"),
    ("grpo", dict(beta=-1), f"--beta: {NEGATIVE}"),
    ("grpo", dict(group_size=0), f"--group-size: {ZERO}"),
    ("grpo", dict(temperature=0), f"--temperature: {ZERO}"),
    ("grpo", dict(max_grad_norm=-1), f"--max-grad-norm: {NEGATIVE}"),
    ("grpo", dict(temperature="nan"), "--temperature: must be a finite number"),
    ("grpo", dict(lr="inf"), "--lr: must be a finite number"),
    ("grpo", dict(group_size=1), "--group-size: a group of 1"),
    ("grpo", dict(minibatches=13), "--minibatches: more than"),
    ("grpo", dict(device="moon"), "--device moon: "),
    ("grpo", dict(run_dir="@/pairs.jsonl/run"), "--run-dir: @/pairs.jsonl/run cannot be made: Not a directory"),
    *[(name, dict(run_dir="@/folder"), "--run-dir: @/folder exists") for name in SCRIPTS],
    ("ppo", dict(gamma=1.5), "--gamma: must be from 0 to 1"),
    ("ppo", dict(gae_lambda=-0.1), "--gae-lambda: must be from 0 to 1"),
    ("ppo", dict(value_clip=-1.0), f"--value-clip: {NEGATIVE}"),
    ("ppo", dict(critic_warmup=-1), f"--critic-warmup: {NEGATIVE}"),
    ("ppo", dict(target_kl=-1.0), f"--target-kl: {NEGATIVE}"),
    ("ppo", dict(critic_lr=0.0), f"--critic-lr: {ZERO}"),
    ("ppo", dict(kl_horizon=0), f"--kl-horizon: {ZERO}"),
    ("ppo", dict(kl_target=6.0, beta=0.0), "--kl-target: needs a --beta above 0"),
    ("ppo", dict(critic="tiny/none"), "tiny/none: no such model folder"),
    ("ppo", dict(critic="@/other-words"), "--critic @/other-words: its tokenizer is not the policy's"),
    ("ppo", dict(critic="@/short"), "--critic @/short: its context is shorter than the policy's"),
    ("reinforce", dict(group_size=1), "--group-size: --baseline loo needs"),
    ("reinforce", dict(group_size=1, baseline="mean"), "--group-size: --baseline mean needs"),
    ("reinforce", dict(moving_decay=1.5), "--moving-decay: must be from 0 to 1"),
    ("dpo", dict(label_smoothing=0.5), "--label-smoothing: must be from 0 to below 0.5"),
    ("dpo", dict(loss_type="hinge", label_smoothing=0.1), "--loss-type hinge: "),
    ("dpo", dict(loss_type="ipo", robust=True), "--loss-type ipo: "),
    ("dpo", dict(beta=0.0), f"--beta: {ZERO}"),
    ("dpo", dict(max_tokens=1), "--max-tokens: "),
    ("dpo", dict(max_tokens=-1), f"--max-tokens: {NEGATIVE}"),
    ("dpo", dict(sft_weight=-1.0), f"--sft-weight: {NEGATIVE}"),
    ("dpo", dict(simpo_margin=-1.0), f"--simpo-margin: {NEGATIVE}"),
    ("dpo", dict(eval_pairs=0), f"--eval-pairs: {ZERO}"),
    ("dpo", dict(pairs_per_step=0), f"--pairs-per-step: {ZERO}"),
    ("reward_model", dict(label_smoothing=0.7), "--label-smoothing: must be from 0 to below 0.5"),
    ("reward_model", dict(centering=-1.0), f"--centering: {NEGATIVE}"),
    ("reward_model", dict(bias_prompts=-1), f"--bias-prompts: {NEGATIVE}"),
    ("reward_model", dict(margin_column="price"), "@/pairs.jsonl: the column 'price' must hold a number, not None, as for"),
    ("reward_model", dict(eval_by="price"), "--eval-by price: no held-out pair has that column"),
    ("reward_model", dict(bias_prompts=2, reference="tiny/reward_model"), "tiny/reward_model: not a causal LM"),
    # models
    ("grpo", dict(model="tiny/none"), "tiny/none: no such model folder"),
    ("grpo", dict(model="tiny/world.py"), "tiny/world.py: no such model folder"),
    ("grpo", dict(model="@/folder"), "@/folder: not a model: the folder has no config.json"),
    ("grpo", dict(model="@/config-damaged"), "@/config-damaged: its config does not load: "),
    ("grpo", dict(model="@/type-unknown"), "@/type-unknown: its config does not load: "),
    ("grpo", dict(model="@/weights-damaged"), "@/weights-damaged: does not load as a CausalLM model"),
    ("grpo", dict(model="@/weights-gone"), "@/weights-gone: does not load as a CausalLM model"),
    ("grpo", dict(model="@/pickle"), "@/pickle: does not load as a CausalLM model"),
    ("grpo", dict(model="@/remote-code"), "@/remote-code: its config does not load: "),
    ("grpo", dict(model="@/no-tokenizer"), "@/no-tokenizer: no tokenizer loads from it"),
    ("grpo", dict(model="@/a-layer-short"), "@/a-layer-short: not a causal LM: it has no weights for"),
    ("grpo", dict(model="tiny/reward_model"), "tiny/reward_model: not a causal LM"),
    ("grpo", dict(model="@/template-raises"), "@/template-raises: its chat template refuses the prompt"),
    ("grpo", dict(model="@/no-template", data="@/messages.jsonl"), "@/no-template: has no chat template"),
    ("grpo", dict(reference="tiny/none"), "tiny/none: no such model folder"),
    ("grpo", dict(reference="tiny/reward_model"), "tiny/reward_model: not a causal LM"),
    ("grpo", dict(reference="@/policy-other-words"), "--reference @/policy-other-words: its tokenizer is not"),
    ("dpo", dict(model="@/weights-damaged"), "@/weights-damaged: does not load as a CausalLM model"),
    ("dpo", dict(reference="tiny/reward_model"), "tiny/reward_model: not a causal LM"),
    ("reward_model", dict(model="tiny/none"), "tiny/none: no such model folder"),
    ("reward_model", dict(model="@/weights-damaged"), "@/weights-damaged: does not load as a SequenceClassification"),
    ("grpo", dict(reward="tiny/policy"), "tiny/policy: not a reward model: it needs one label, and has no weights"),
    ("grpo", dict(reward="@/two-labels"), "@/two-labels: not a reward model: it needs one label, and has 2"),
    ("grpo", dict(reward="@/short"), "@/short: reads 8 tokens, and the longest prompt with --max-new-tokens"),
    ("dpo", dict(gold="tiny/policy"), "tiny/policy: not a reward model"),
    # rows
    ("grpo", dict(data="none.jsonl"), "none.jsonl: no such file"),
    ("grpo", dict(data="@/folder"), "@/folder: not a file"),
    ("grpo", dict(data="nobody/nothing:train"), "nobody/nothing:train: no"),
    ("grpo", dict(data="@/not-json.jsonl"), "@/not-json.jsonl:2: not JSON"),
    ("grpo", dict(data="@/deep.jsonl"), "@/deep.jsonl:1: not JSON"),
    ("grpo", dict(data="@/surrogate.jsonl"), "@/surrogate.jsonl:1: holds half a character"),
    ("grpo", dict(data="@/list.jsonl"), "@/list.jsonl:1: expected a JSON object"),
    ("grpo", dict(data="@/number.jsonl"), "@/number.jsonl:1: expected a JSON object"),
    ("grpo", dict(data="@/empty.jsonl"), "@/empty.jsonl: holds no rows"),
    ("grpo", dict(data="@/blank.jsonl"), "@/blank.jsonl: holds no rows"),
    ("grpo", dict(data="@/question.jsonl"), "@/question.jsonl:1: no column 'prompt', only question"),
    ("grpo", dict(data="@/question.jsonl", prompt_column="q"), "@/question.jsonl:1: no column 'q', only question"),
    *[("grpo", dict(data=f"@/{name}.jsonl"), f"@/{name}.jsonl:1: 'prompt' must be a string or a list") for name in (
        "prompt-number", "prompt-no-turns", "prompt-no-content")],
    ("grpo", dict(data="@/prompt-empty.jsonl"), "@/prompt-empty.jsonl:1: 'prompt' is missing or empty"),
    ("grpo", dict(data="@/prompt-answered.jsonl"), "@/prompt-answered.jsonl:1: the prompt ends with the assistant's"),
    *[("grpo", dict(data=f"@/{name}"), f"@/{name}: cannot be read as text") for name in (
        "utf-16.jsonl", "latin-1.jsonl", "not-gzip.jsonl.gz", "cut.jsonl.gz")],
    ("grpo", dict(data="@/one.jsonl"), "@/one.jsonl: 1 rows, and --eval-prompts 2 are held out"),
    ("grpo", dict(data="@/long.jsonl"), "@/long.jsonl: prompt 1, '"),
    ("grpo", dict(data="@/long.jsonl", max_prompt_tokens=2), "@/long.jsonl: no prompt has at most 2 tokens: raise --max-prompt-tokens"),
    ("grpo", dict(max_new_tokens=5000), "--max-new-tokens: leaves no room for a prompt"),
    ("grpo", dict(eval_data="@/question.jsonl"), "@/question.jsonl:1: no column 'prompt'"),
    ("dpo", dict(data="tiny/prompts.jsonl"), "tiny/prompts.jsonl:1: pairs need "),
    ("dpo", dict(sample_data="@/question.jsonl"), "@/question.jsonl:1: no column 'prompt'"),
    ("dpo", dict(eval_data="tiny/prompts.jsonl"), "tiny/prompts.jsonl:1: pairs need "),
    *[(name, dict(data="@/pair-numbers.jsonl"), "@/pair-numbers.jsonl:1: 'chosen' must be a string or a list")
      for name in PAIRWISE],
    ("dpo", dict(data="@/pair-strangers.jsonl"), "@/pair-strangers.jsonl:1: no 'prompt', and chosen and rejected"),
    ("dpo", dict(data="@/pair-turns.jsonl"), "@/pair-turns.jsonl:1: chosen and rejected "),
    ("dpo", dict(data="@/pair-mixed.jsonl"), "@/pair-mixed.jsonl:1: 'chosen' and 'rejected' must both be strings"),
    ("dpo", dict(data="@/pair-no-prompt.jsonl"), "@/pair-no-prompt.jsonl:1: 'prompt' is missing or empty"),
    *[(name, dict(data="@/pair-equal.jsonl"), "@/pair-equal.jsonl: no pair is left") for name in PAIRWISE],
    *[(name, dict(data="@/one-pair.jsonl"), "@/one-pair.jsonl: 1 rows, and --eval-pairs 2 are held out")
      for name in PAIRWISE],
    ("reward_model", dict(data="@/prompts.jsonl"), "@/prompts.jsonl:1: pairs need "),
    # reward functions
    ("grpo", dict(reward="@/none.py:f"), "@/none.py: no such file"),
    ("grpo", dict(reward="@/rewards.py"), "@/rewards.py: name a function of that file"),
    ("grpo", dict(reward="@/rewards.py:nothing"), "@/rewards.py: has no function 'nothing'"),
    ("grpo", dict(reward="@/rewards.py:constant"), "@/rewards.py: has no function 'constant'"),
    ("grpo", dict(reward="@/syntax.py:f"), "@/syntax.py: cannot be imported: SyntaxError"),
    ("grpo", dict(reward="@/imports.py:f"), "@/imports.py: cannot be imported: ModuleNotFoundError"),
    ("grpo", dict(reward="@/rewards.py:raises"), "@/rewards.py:raises: raised ZeroDivisionError"),
    ("grpo", dict(reward="@/rewards.py:few"), "@/rewards.py:few: returned 1 rewards for"),
    ("grpo", dict(reward="@/rewards.py:many"), "@/rewards.py:many: returned"),
    *[("grpo", dict(reward=f"@/rewards.py:{name}"), f"@/rewards.py:{name}: must return a list of finite numbers")
      for name in ("nan", "infinite", "texts", "returns_none", "one_number")],
    ("grpo", dict(reward="@/rewards.py:all_none", eval_prompts=0), "--reward: it left out every completion of a step"),
    ("ppo", dict(reward="@/rewards.py:nan"), "@/rewards.py:nan: must return a list of finite numbers"),
    ("reinforce", dict(reward="@/rewards.py:raises"), "@/rewards.py:raises: raised ZeroDivisionError"),
    ("dpo", dict(gold="@/rewards.py:raises"), "@/rewards.py:raises: raised ZeroDivisionError"),
    # runs to resume
    ("grpo", dict(resume="@/none"), "--resume @/none: @/none/args.json cannot be read: "),
    ("grpo", dict(resume="@/folder"), "--resume @/folder: @/folder/args.json cannot be read: "),
    ("ppo", dict(resume="@/run"), "--resume @/run: a run of another script: it has --kl-estimator"),
    *[(name, dict(resume="@/run-old"), "--resume @/run-old: made by an older version") for name in SCRIPTS],
    ("grpo", dict(resume="@/run-begun"), "--resume @/run-begun: it has no checkpoint yet"),
    ("grpo", dict(resume="@/run-damaged"),
     "--resume @/run-damaged: @/run-damaged/checkpoint-1/resume/state.json cannot be read: "),
    ("grpo", dict(resume="@/run-torn"), "--resume @/run-torn: @/run-torn/checkpoint-1 is damaged, or does not fit"),
    ("grpo", dict(resume="@/run", steps=2, model="@/small"),
     "--resume @/run: @/run/checkpoint-1 is damaged, or does not fit these flags: "),
    ("ppo", dict(resume="@/run-state"),
     "--resume @/run-state: @/run-state/checkpoint-1 is damaged, or does not fit these flags: "),
    # the place in the data, and the learning rate's, are counted in these
    *[("grpo", dict(resume="@/run", steps=2) | change, f"--resume @/run: --{flag} stays {value}: for another one, "
       "start a new run with --model @/run/checkpoint-1") for change, flag, value in (
        (dict(prompts_per_step=6), "prompts-per-step", 3), (dict(minibatches=2), "minibatches", 1),
        (dict(epochs=2), "epochs", 1), (dict(seed=1), "seed", 0))],
    ("grpo", dict(resume="@/run-2", steps=1), "--resume @/run-2: it has made 2 steps, more than the 1 of now"),
    ("dpo", dict(resume="@/run-pairs", pairs_per_step=4), "--resume @/run-pairs: --pairs-per-step stays 2"),
    ("grpo", dict(resume="@/run-renamed", steps=9), "--resume @/run-renamed: @/run-renamed/checkpoint-7 is damaged, or "
     "does not fit these flags: its folder is named 7, and it is of step 1"),
    ("dpo", dict(max_new_tokens=192), "--max-new-tokens: leaves no room for a prompt"),
    ("dpo", dict(max_new_tokens=190), "@/pairs.jsonl: no prompt has at most 2 tokens: lower --max-new-tokens, or set "
     "--eval-prompts 0"),
    ("reward_model", dict(max_new_tokens=190, bias_prompts=4), "@/pairs.jsonl: no prompt has at most 2 tokens: lower "
     "--max-new-tokens, or set --bias-prompts 0"),
    *[(name, {flag: "@/bias-text"}, "@/bias-text: config.json: reward_bias must be a number, not 'x'")
      for name, flag in (("grpo", "reward"), ("ppo", "critic"))],
    ("grpo", dict(reward="@/bias-null"), "@/bias-null: config.json: reward_bias must be a number, not None"),
    *[("grpo", dict(resume="@/run", steps=2) | change, "--resume @/run: other held-out prompts")
      for change in (dict(eval_samples=2), dict(eval_prompts=1), dict(eval_data="@/one.jsonl"))],
]

REWARDS = '''
constant = 1
def raises(completions, **columns): return [1 / 0]
def few(completions, **columns): return [0.0]
def many(completions, **columns): return [0.0] * (len(completions) + 1)
def nan(completions, **columns): return [float("nan")] * len(completions)
def infinite(completions, **columns): return [float("inf")] * len(completions)
def texts(completions, **columns): return ["one"] * len(completions)
def returns_none(completions, **columns): pass
def one_number(completions, **columns): return 1.0
def all_none(completions, **columns): return [None] * len(completions)
'''


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """The folder of bad files."""
    at = tmp_path_factory.mktemp("bad")
    make_rows(at)
    make_models(at)
    make_runs(at)
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files(at)}
    yield at
    assert before == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files(at)}


def files(folder: Path) -> dict:
    """When each file was written, and its size; without what Python and flock make."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and path.name != "lock"}


def make_rows(at: Path):
    def rows(name: str, *lines):
        (at / f"{name}.jsonl").write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))

    some = {"prompt": "what is a cat ?"}
    turns = [{"role": "user", "content": "a ?"}, {"role": "assistant", "content": "b ."}]
    rows("prompts", *[some] * 6)
    rows("pairs", *[{**some, "chosen": f"yes {w} .", "rejected": "no ."} for w in "a b c d e f".split()])
    rows("one", some)
    rows("one-pair", {**some, "chosen": "yes .", "rejected": "no ."})
    rows("not-json", some, "{oops", some, some)
    rows("deep", "[" * 100_000)
    rows("surrogate", '{"prompt": "\\ud83d"}')
    rows("list", "[1, 2]")
    rows("number", "3")
    rows("empty")
    rows("blank", "", "  ")
    rows("question", {"question": "a ?"})
    rows("prompt-number", {"prompt": 3})
    rows("prompt-empty", {"prompt": "  "})
    rows("prompt-no-turns", {"prompt": []})
    rows("prompt-no-content", {"prompt": [{"role": "user"}]})
    rows("prompt-answered", {"prompt": turns})
    rows("messages", *[{"prompt": turns[:1]}] * 6)
    rows("long", {"prompt": "a " * 300}, *[some] * 5)
    rows("pair-numbers", *[{**some, "chosen": 1, "rejected": 2}] * 4)
    rows("pair-strangers", *[{"chosen": "yes", "rejected": "no"}] * 4)
    rows("pair-turns", *[{"chosen": turns, "rejected": [{"role": "user", "content": "c ?"}, turns[1]]}] * 4)
    rows("pair-mixed", *[{"chosen": turns, "rejected": "no"}] * 4)
    rows("pair-no-prompt", *[{"prompt": "", "chosen": "yes", "rejected": "no"}] * 4)
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


def make_models(at: Path):
    def model(name: str, base: str = "policy") -> Path:
        shutil.copytree(f"tiny/{base}", at / name)
        return at / name

    def change(path: Path, **values):
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    (model("config-damaged") / "config.json").write_text("{oops")
    change(model("type-unknown") / "config.json", model_type="nonesuch", architectures=["Nonesuch"])
    weights = model("weights-damaged") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (model("weights-gone") / "model.safetensors").unlink()
    pickled = model("pickle")
    torch.save(modeling.load_causal_lm("tiny/policy", "cpu").state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    change(model("remote-code") / "config.json", model_type="theirs", auto_map={
        "AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"})
    (at / "remote-code/theirs.py").write_text("raise SystemExit('their code ran')\n")
    bare = model("no-tokenizer")
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    layers = json.loads(Path("tiny/policy/config.json").read_text())["num_hidden_layers"]
    change(model("a-layer-short") / "config.json", num_hidden_layers=layers + 1)
    change(model("short", "reward_model") / "config.json", max_position_embeddings=8)
    change(model("bias-text", "reward_model") / "config.json", reward_bias="x")
    change(model("bias-null", "reward_model") / "config.json", reward_bias=None)
    tokenizer = common.load_tokenizer("tiny/policy")
    sizes = dict(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                 num_attention_heads=1)
    LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=2)).save_pretrained(at / "two-labels")
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(at / "small")
    for name in ("two-labels", "small"):
        tokenizer.save_pretrained(at / name)
    for path in (model("other-words", "reward_model"), model("policy-other-words")):
        path /= "tokenizer.json"
        path.write_text(re.sub('"cat": [0-9]+', '"cat": 0', path.read_text()))
    for name, template in (("template-raises", "{{ raise_exception('no such role') }}"), ("no-template", None)):
        tokenizer = common.load_tokenizer("tiny/policy")
        tokenizer.chat_template = template
        (model(name) / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(at / name)


def make_runs(at: Path):
    flags = ONE_STEP | dict(data=str(at / "prompts.jsonl"), gold="")
    run("grpo", at / "run", **flags)
    run("grpo", at / "run-2", **flags | dict(steps=2))
    run("ppo", at / "run-state", **flags)
    run("dpo", at / "run-pairs", **FLAGS["dpo"] | dict(data=str(at / "pairs.jsonl"), pairs_per_step=2, eval_prompts=0))
    for name in ("begun", "damaged", "torn", "renamed"):
        shutil.copytree(at / "run", at / f"run-{name}")
    (at / "run-renamed/checkpoint-1").rename(at / "run-renamed/checkpoint-7")
    shutil.rmtree(at / "run-begun/checkpoint-1")
    (at / "run-damaged/checkpoint-1/resume/state.json").write_text("{oops")
    for path in (at / "run-torn/checkpoint-1/resume").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:1000])
    path = at / "run-state/checkpoint-1/resume/state.json"
    state = json.loads(path.read_text())
    del state["beta_factor"]
    path.write_text(json.dumps(state))
    old = at / "run-old/checkpoint/resume"  # as the first edition left it
    old.mkdir(parents=True)
    (old / "state.json").write_text('{"step": 40, "first": []}')
    (at / "run-old/metrics.jsonl").write_text('{"step": 40, "loss": 0.1}\n')
    (at / "run-old/args.json").write_text(json.dumps(dict(
        model="tiny/policy", data="tiny/prompts.jsonl", steps=40, kl_in="loss", truncated="keep", lam=0.95, resume="")))


@pytest.mark.parametrize("name, flags, words", CASES, ids=[f"{name}: {words[:60]}" for name, _, words in CASES])
def test_bad_input(name, flags, words, bad, tmp_path, capsys):
    run_dir = tmp_path / "run"
    given = flags if "resume" in flags else FLAGS[name] | dict(run_dir=str(run_dir), device="cpu") | flags
    given = {flag: value.replace("@", str(bad)) if isinstance(value, str) else value for flag, value in given.items()}
    before = files(bad)
    error = fails(capsys, name, **given)
    assert error.startswith(words.replace("@", str(bad))), error
    assert files(bad) == before
    # a reward is known to be bad once it is called, and then no checkpoint is written
    assert not run_dir.exists() or {"reward", "gold"} & flags.keys() and not list(run_dir.glob("checkpoint*"))


def test_there_are_enough_of_them():
    assert len(CASES) >= 130 and {name for name, *_ in CASES} == SCRIPTS.keys()
