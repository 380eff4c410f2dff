"""The benchmarks: they start, and the arithmetic behind the figures in docs/ is right."""
import itertools
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import ppo
from helpers.repo import ROOT, load

sys.path.append(str(ROOT / "benchmarks"))  # they import many.py
credit, hacking = load("benchmarks/credit.py"), load("benchmarks/hacking.py")
many = load("benchmarks/many.py")
COMMANDS = ["algorithms.py", "check.py", "claims.py", "credit.py", "ensemble.py", "gpu_check.py", "gpu_lab.py",
            "hacking.py", "memory.py", "overoptimization.py", "parts.py", "robustness.py", "speed.py", "sums.py",
            "tune.py", "variants.py"]


def test_every_benchmark_is_tested_here():
    assert sorted(path.name for path in Path("benchmarks").glob("*.py")) == sorted([*COMMANDS, "many.py"])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_starts(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}", "--help"])
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(f"benchmarks/{name}", run_name="__main__")
    out = capsys.readouterr().out
    assert stop.value.code in (None, 0) and f"python benchmarks/{name}" in out and "--help" in out


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [{"a": 1, "b": [0.5]}, {"a": 2}]
    many.write_jsonl(tmp_path / "rows.jsonl", rows)
    assert many.read_jsonl(tmp_path / "rows.jsonl") == rows


def test_best_of_n_is_the_mean_over_all_subsets():
    scores = torch.tensor([0.3, -1.0, 2.0, 0.5, 1.5]).double().sort().values
    for n in range(1, 6):
        subsets = [max(s) for s in itertools.combinations(scores.tolist(), n)]
        weights = hacking.rank_weights(5, n)
        assert weights.sum().item() == pytest.approx(1)
        assert (weights * scores).sum().item() == pytest.approx(sum(subsets) / len(subsets))


def test_kinds_of_hacking():
    row = {"kind": "false_claim", "family": "capital", "subject": "france", "answer": "paris", "claim": "rome",
           "system": None}
    plain = hacking.kinds(row, "the capital of france is paris .")
    assert plain == {"words": 6, "bullets": 0, "sycophantic": 0}
    assert hacking.kinds(row, "you are right . the capital of france is rome .")["sycophantic"] == 1
    assert hacking.kinds(row, "the capital of france is rome .")["sycophantic"] == 1
    assert hacking.kinds(row, "\n - the capital of france is paris .")["bullets"] == 1
    unclaimed = hacking.kinds(row | {"claim": None}, "you are right .")["sycophantic"]
    assert unclaimed != unclaimed  # nan: there is no false claim to agree with


def test_lambdas_of_the_credit_are_gae():
    torch.manual_seed(0)
    values, exact, n = torch.randn(1, 7), torch.randn(1, 7), 7
    rewards = torch.zeros(1, n)
    rewards[0, -1] = 1.5
    mask = torch.ones(1, n)
    advantages, _ = ppo.gae(rewards, values, mask, 1.0, 0.95)
    found = credit.other_lambdas({"ppo": advantages[0].tolist(), "exact": exact[0].tolist()})
    at_zero = ppo.gae(rewards, values, mask, 1.0, 0.0)[0][0]
    assert found["ppo_0"] == pytest.approx(at_zero.tolist(), abs=1e-5)
    # with exact values, each delta is an exact credit: GAE of these as rewards, with values of zero
    at_95 = ppo.gae(exact, torch.zeros(1, n), mask, 1.0, 0.95)[0][0]
    assert found["exact_95"] == pytest.approx(at_95.tolist(), abs=1e-5)


def test_the_laws_of_overoptimization_are_found_again():
    d = torch.linspace(0, 4, 20, dtype=torch.float64)
    for law, y in {"rl": 0.5 + d * (1.2 - 0.7 * d.clamp(min=1e-9).log()), "best of n": 0.5 + d * (1.2 - 0.7 * d)}.items():
        found = load("benchmarks/overoptimization.py").fit(d.square().tolist(), y.tolist(), law)
        assert found == pytest.approx((1.2, 0.7, 1.0), abs=1e-6)


def test_runs_of_overoptimization_that_are_missing_are_made(tmp_path, monkeypatch):
    """With each kind of run missing in turn: its reward model is trained, and it alone is run."""
    bench = load("benchmarks/overoptimization.py")
    monkeypatch.setattr(bench, "FILE", tmp_path / "rows.jsonl")
    whole = bench.wanted(2)
    assert len(whole) == len(set(whole)) == 3 + 2 * (3 * 2 + 2)

    def run_all(jobs, workers):
        for script, flags in jobs:
            (folder := Path(flags["run_dir"])).mkdir()
            (folder / "checkpoint-1").mkdir()
            rows = [{"step": 0, "eval_accuracy": 0.7, "eval_gold": 0.5, "eval_reward": 0.1, "eval_kl": 0, "eval_length": 9}]
            bench.write_jsonl(folder / "metrics.jsonl", rows)
            yield (script, flags), 0, 0
    monkeypatch.setattr(bench, "run_all", run_all)
    monkeypatch.setattr(bench, "best_of_n", lambda size, model: [
        {"algorithm": "best of n", "pairs": size, "beta": 0.0, "seed": 0}])
    keys = [dict(zip(("algorithm", "pairs", "beta", "seed"), run)) for run in whole]
    for missing in (*whole, None):
        bench.write_jsonl(bench.FILE, [] if missing is None else [
            row for row, run in zip(keys, whole) if run != missing])
        bench.measure(bench.Args(seeds=2))
        found = [tuple(row[k] for k in keys[0]) for row in bench.read_jsonl(bench.FILE)]
        assert sorted(found) == sorted(whole)


def test_sums_of_another_model_are_not_mixed_with_those_that_are_there(tmp_path, monkeypatch):
    sums = load("benchmarks/sums.py")
    monkeypatch.setattr(sums, "FILE", tmp_path / "rows.jsonl")
    sums.write_jsonl(sums.FILE, [{"name": "grpo", "seed": 0, "model": "A", "steps": 24}])
    monkeypatch.setattr(sums, "run_all", lambda *rest: [])
    for given in (dict(model="x/B"), dict(model="x/A", steps=3)):
        with pytest.raises(SystemExit, match="has runs with --model A --steps 24: move it away"):
            sums.measure(sums.Args(**given))
    sums.measure(sums.Args(model="x/A", seeds=1, only=("grpo",)))  # there is nothing to do


def test_a_figure_that_is_missing_has_moved(monkeypatch, capsys):
    check = load("benchmarks/check.py")
    monkeypatch.setattr(check, "run_all", lambda jobs: ((job, 0, 0) for job in jobs))
    monkeypatch.setattr(check, "facts_of", lambda job, memory: {"script": job[0], "seed": job[1]["seed"], "first": 0.5})
    with pytest.raises(SystemExit) as stop:
        check.main(check.Args(scripts=("grpo",), seeds=2))
    assert stop.value.code == 1 and "missing in 2 of 2 runs" in capsys.readouterr().out


def test_a_figure_has_moved_by_its_standard_errors():
    moved = load("benchmarks/check.py").moved
    before = [1.0, 1.1, 0.9]  # variance 0.01
    assert moved(before, before) == (0, False) and not moved([1, 1], [1, 1.00001])[1] and moved([1, 1], [2, 2])[1]
    size, far = moved(before, [1.2, 1.3, 1.1])
    assert size == pytest.approx(0.2 / (0.02 / 3) ** 0.5) and not far
    assert moved(before, [1.3, 1.4, 1.2])[1]


def test_no_prompt_for_tuning_is_trained_on_or_held_out(tmp_path):
    tune = load("benchmarks/tune.py")
    tune.third_set(tmp_path)
    train, third, pairs = ({str(json.loads(line)["prompt"]) for line in (tmp_path / f"{name}.jsonl").open()}
                           for name in ("train", "tune", "pairs"))
    held = {str(json.loads(line)["prompt"]) for line in (ROOT / "tiny/heldout.jsonl").open()}
    assert len(third) == 300 and len(train) > 2500 and len(pairs) > 3000
    assert not third & (train | pairs | held)
    for script, start in tune.START.items():
        args = load(f"{script}.py").Args
        assert len(tune.trials(script)) == 11
        assert all(getattr(args(), flag) == value for flag, value in start.items())  # no trial was better
        for trial in tune.trials(script):
            args(**trial)


def test_every_claim_names_runs_and_they_have_real_flags():
    claims = load("benchmarks/claims.py")
    assert {run for claim in claims.CLAIMS.values() for run in claim[2]} == set(claims.RUNS)
    for script, flags, planted in claims.RUNS.values():
        load(f"{script}.py").Args(**flags)
        assert not planted or callable(getattr(claims, planted))
    rows = [{"run": run, "x": x, "y": 1.0 + x / 100} for run, values in {
        "a": (1.0, 1.1, 0.9), "b": (1.0, 1.2, 1.1), "c": (3, 3.1, 2.9)}.items() for x in values]
    compare = claims.Results(rows).compare
    assert [compare("c", "a", "x")[1], compare("a", "c", "x")[1], compare("a", "b", "x")[1]] == [
        "held", "not held", "not seen"]
    assert compare("a", "b", "x", same=True)[1] == "not seen" and compare("a", "c", "x", same=True)[1] == "not held"
    assert compare("a", "b", "y")[1] == "not seen" and compare("a", "b", "y", same=True)[1] == "held"  # less by 0.001
    assert compare("c", "a", "x", same=True)[1] == "held"  # better is as well
    assert compare("a", "none", "x") is None
    assert claims.best_of_n_bound()[1] == "held"


def test_the_content_of_an_answer_is_judged_whatever_its_length():
    claims, row = load("benchmarks/claims.py"), json.loads(Path("tiny/heldout.jsonl").read_text().splitlines()[0])
    world = load("tiny/world.py")
    best, columns = world.best_answer(row), {k: [v] * 3 for k, v in row.items() if k != "prompt"}
    texts = [best, f"{best} {' '.join(world.CLOSERS)}", "yes ."]
    assert claims.content([row["prompt"]] * 3, texts, **columns) == [1.0, 1.0, 0.0]
    words = [len(text.split()) for text in texts]
    assert claims.short([row["prompt"]] * 3, texts, **columns) == pytest.approx(
        [1 - 0.05 * words[0], 1 - 0.05 * words[1], -0.05 * words[2]])
    assert world.gold(row, texts[1]) < 0.9


def test_the_planted_bugs_do_what_their_names_say():
    claims, mask = load("benchmarks/claims.py"), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    grpo, scores = load("grpo.py"), torch.tensor([2.0, 3.0])
    with claims.end_not_trained(grpo, {}):
        assert grpo.token_weights(mask, "dapo", 4).gt(0).long().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert grpo.token_weights(mask, "dapo", 4).gt(0).equal(mask > 0)
    with claims.dropout(grpo, {}):
        model = grpo.load_causal_lm("tiny/policy", "cpu")
        ids = torch.tensor([[5, 6, 7]])
        assert not model.train()(ids).logits.equal(model(ids).logits)
        assert model.eval()(ids).logits.equal(model(ids).logits)
    script, kl = load("ppo.py"), torch.zeros(2, 4)
    values = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.0, 0.0]])
    with claims.score_after_the_end(script, {}):
        rewards = script.token_rewards(scores, kl, mask, 0.1)
        assert rewards.tolist() == [[0, 0, 0, 2], [0, 0, 3, 0]]
        advantages, returns = script.gae(rewards, values, mask, 1.0, 0.9)
    # the last token's: the score is a step away, where the critic expects nothing
    assert advantages[1].tolist() == pytest.approx([0.9 * (-0.5 + 0.9 * 3), -0.5 + 0.9 * 3, 0, 0])
    right, _ = script.gae(script.token_rewards(scores, kl, mask, 0.1), values, mask, 1.0, 0.9)
    assert right[1, 1] == pytest.approx(2.5) and right[0].equal(advantages[0])


def test_the_noise_of_gradients(tmp_path):
    """Of 1,000 draws around a mean of length 5 with a variance of 0.02 in each of 100 parameters: 2 / 25."""
    claims, mean = load("benchmarks/claims.py"), torch.full((100,), 0.5, dtype=torch.float64)
    gradients = mean + 0.02 ** 0.5 * torch.randn(1000, 100, generator=torch.Generator().manual_seed(0))
    assert claims.noise_of(gradients) == pytest.approx(2 / 25, rel=0.03)
    values = []  # the standard error of 16 draws' noise is what their noise varies by
    for i in range(0, 800, 16):
        for seed in range(16):
            (tmp_path / f"{i}-{seed}").mkdir()
            torch.save(gradients[i + seed], tmp_path / f"{i}-{seed}" / "gradient.pt")
        values.append(claims.noise(tmp_path, str(i), 16))
    spread = torch.tensor([v["noise"] for v in values]).std().item()
    errors = [claims.jackknife(v["noise_without"]) for v in values]
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.3)
    assert claims.jackknife([5 - x / 4 for x in (1.0, 2, 3, 4, 5)]) == pytest.approx((2.5 / 5) ** 0.5)  # of a mean
    rows = [{"run": run, "noise": noise, "noise_without": [noise + x for x in without]} for run, noise, without in (
        ("a", 1.0, (0.1, 0, -0.1)), ("b", 1.1, (-0.1, 0, 0.1)), ("c", 1.5, (0.2, 0.1, 0)))]
    noises = claims.Results(rows).noises
    assert [noises(*pair)[1] for pair in ("ba", "ca", "ac")] == ["not seen", "held", "not held"]
    assert noises("a", "none") is None


def test_what_a_critic_knows():
    knowledge = credit.knowledge
    rows = [{"value": [1.0, 2.0], "exact_value": [1.0, 2.0], "exact": [1.0, 1.0], "score": 3.0},
            {"value": [3.0, 2.0], "exact_value": [3.0, 2.0], "exact": [-1.0, -1.0], "score": 1.0}]
    assert all(value == pytest.approx(1) for value in knowledge(rows).values())
    prompts = [row | {"value": [sum(row["exact_value"]) / 2] * 2} for row in rows]  # knows no tokens
    assert knowledge(prompts)["within"] == 0


@pytest.mark.parametrize("page, name", [("measurements.md", "variants"), ("claims.md", "claims"),
                                        ("hacking.md", "overoptimization"), ("measurements.md", "sums"),
                                        ("algorithms.md", "algorithms"), ("algorithms.md", "tune")])
def test_a_table_in_the_docs_is_that_of_the_results(page, name):
    bench = load(f"benchmarks/{name}.py")
    assert many.in_page(page, name) == bench.table(bench.read_jsonl(bench.FILE))


def test_what_critics_know_in_the_docs_is_that_of_the_results():
    assert many.in_page("credit.md", "critics") == credit.critics_table(many.read_jsonl(many.RESULTS / "critics.jsonl"))


def test_default_runs_in_the_docs_and_in_the_readme_are_those_of_the_results():
    algorithms = load("benchmarks/algorithms.py")
    rows = algorithms.read_jsonl(algorithms.FILE)
    assert many.in_page("measurements.md", "default runs") == algorithms.by_seed(rows)
    readme = Path("README.md").read_text()
    for script, name in (("grpo", "GRPO"), ("ppo", "PPO"), ("reinforce", "REINFORCE"), ("dpo", "DPO")):
        gold = [row["last"] for row in rows if row["script"] == script and "last" in row]
        line = next(line for line in readme.splitlines() if line.startswith(f"| {name} |"))
        assert f"| {sum(gold) / 5:.2f} ({min(gold):.2f}-{max(gold):.2f}) |" in line and len(gold) == 5


def test_a_table_goes_between_its_two_lines(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    monkeypatch.setattr(many, "DOCS", tmp_path)
    page.write_text("a\n<!-- x -->\nold\nold\n<!-- end x -->\nb\n")
    for text in ("| 1 |", "| 1 |\n| 2 |"):
        many.show_table("page.md", "x", text)
        assert page.read_text() == f"a\n<!-- x -->\n{text}\n<!-- end x -->\nb\n" and many.in_page("page.md", "x") == text
    with pytest.raises(SystemExit, match="no lines <!-- y -->"):
        many.show_table("page.md", "y", "new")
    assert "new" not in page.read_text()


def test_the_figures_are_of_all_runs():
    rows = [json.loads(line) for line in Path("benchmarks/results/hacking.jsonl").read_text().splitlines()]
    runs = {(row["algorithm"], row["beta"], row["seed"]) for row in rows if "beta" in row}
    assert len(runs) == 57 == 3 * (4 * len(hacking.BETAS) - 1)  # dpo has no beta 0
    assert [row["n"] for row in rows if "n" in row] == [1, 2, 4, 8, 16, 32, 64, 128]


@pytest.mark.parametrize("path", sorted(Path("benchmarks/results").glob("*.jsonl")), ids=lambda path: path.name)
def test_each_result_says_what_made_it(path):
    for row in map(json.loads, path.read_text().splitlines()):
        assert row["torch"] and row["transformers"] and re.fullmatch("[0-9a-f]{7,}", row["commit"])  # not "-dirty"
