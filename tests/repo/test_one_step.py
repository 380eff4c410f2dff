"""tools/one_step.py: what it prints, by hand: in float64, from the formulas, with none of the scripts' functions."""
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers

import grpo
import ppo
import reinforce
from helpers.repo import fails_as_command, load, read, user_error

tool = load("tools/one_step.py")
credit = tool.credit  # what the tool itself uses
SHOWN = 6e-4  # of a number with three decimals, and float32's rounding
SMALL = dict(prompts_per_step=3, group_size=4, max_new_tokens=12, eval_prompts=0, steps=1, device="cpu", lr=3e-3)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The worked example, its page, and its policy's folder."""
    folder = tmp_path_factory.mktemp("example")
    prompt, steps = tool.worked_example(folder, tool.Args().row, tool.Args().seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    blocks = tool.page(prompt, steps, tool.Args())
    return SimpleNamespace(steps=steps, blocks=blocks, policy=folder / "before/checkpoint-4")


def tables(blocks: list, heading: str) -> list:
    """The tables below a heading: for each, name of a column or a line -> numbers or texts."""
    start = blocks.index(heading) + 1
    end = next((i for i in range(start, len(blocks)) if str(blocks[i]).startswith("#")), len(blocks))
    return [block for block in blocks[start:end] if isinstance(block, list)]


def columns(table: list) -> dict:
    return {name: list(column) for name, *column in zip(*table)}


def lines(table: list) -> dict:
    return {name: [float(x) for x in row] for name, *row in table[1:]}


def close(shown, expected, rtol=2e-4, atol=SHOWN):
    shown = torch.tensor([float(x) for x in shown], dtype=torch.float64)
    torch.testing.assert_close(shown, torch.as_tensor(expected, dtype=torch.float64).detach(), rtol=rtol, atol=atol)


# --- by hand

def model64(kind, name):
    return kind.from_pretrained(name, dtype=torch.float64).eval()


def logprobs(model, prompt, answer) -> torch.Tensor:
    """log pi of each token of the answer: one row, no padding, no cache."""
    logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
    return torch.stack([logits[len(prompt) - 1 + t].log_softmax(-1)[token] for t, token in enumerate(answer)])


@pytest.fixture(scope="module")
def hand(example):
    """The numbers of the example, anew: lists with a tensor for each completion."""
    rollout = example.steps["grpo"].rollout
    prompt = rollout.prompt_ids[0][rollout.prompt_mask[0].bool()].tolist()
    answers = [ids[mask.bool()].tolist() for ids, mask in zip(rollout.completion_ids, rollout.mask)]
    policy, reference = (model64(transformers.AutoModelForCausalLM, name) for name in (example.policy, "tiny/policy"))
    judge = model64(transformers.AutoModelForSequenceClassification, "tiny/reward_model")
    tokenizer = transformers.AutoTokenizer.from_pretrained("tiny/reward_model")
    end, bias = tokenizer.convert_tokens_to_ids("<|end|>"), getattr(judge.config, "reward_bias", 0.0)

    def judged(ids):  # after each token of a conversation
        hidden = judge.model(input_ids=torch.tensor([ids]), use_cache=False)[0][0]
        return (hidden @ judge.score.weight.T)[:, 0] + bias
    with torch.no_grad():
        scores = torch.stack([judged(prompt + [t for t in answer if t != end] + [end])[-1] for answer in answers])
        values = [judged(prompt + answer)[len(prompt) - 1:-1] for answer in answers]
        pi = [logprobs(policy, prompt, answer) for answer in answers]
        pi_ref = [logprobs(reference, prompt, answer) for answer in answers]
    d = [a - b for a, b in zip(pi, pi_ref)]
    return SimpleNamespace(prompt=prompt, answers=answers, policy=policy, scores=scores, values=values, pi=pi,
                           pi_ref=pi_ref, d=d, k3=[(-x).exp() - 1 + x for x in d], beta=0.04)


def grpo_advantages(hand):
    r = hand.scores
    return (r - r.mean()) / (((r - r.mean()) ** 2).sum().div(3).sqrt() + 1e-4)


def ppo_numbers(hand):
    """r_t, delta_t, A_t, whitened A_t and R_t of each completion, by the sums of the papers."""
    rewards = [-hand.beta * d for d in hand.d]
    for reward, score in zip(rewards, hand.scores):
        reward[-1] += score
    deltas = [reward + torch.cat([value[1:], torch.zeros(1)]) - value for reward, value in zip(rewards, hand.values)]
    advantages = [torch.stack([sum(0.95 ** l * delta[t + l] for l in range(len(delta) - t)) for t in range(len(delta))])
                  for delta in deltas]
    together = torch.cat(advantages)
    mean, var = together.mean(), ((together - together.mean()) ** 2).mean()
    return (rewards, deltas, advantages, [(a - mean) / (var + 1e-8).sqrt() for a in advantages],
            [a + v for a, v in zip(advantages, hand.values)])


def reinforce_numbers(hand):
    """R, b and A of each completion."""
    R = hand.scores - hand.beta * torch.stack([d.sum() for d in hand.d])
    b = torch.stack([torch.cat([R[:i], R[i + 1:]]).mean() for i in range(4)])
    return R, b, R - b


def losses(hand, pi: list) -> dict:
    """Each script's loss as a function of the log-probs, whose old values are hand.pi."""
    ratios = [(new - old).exp() for new, old in zip(pi, hand.pi)]
    d = [new - ref for new, ref in zip(pi, hand.pi_ref)]
    k3 = [(-x).exp() - 1 + x for x in d]
    A, whitened, A_reinforce = grpo_advantages(hand), ppo_numbers(hand)[3], reinforce_numbers(hand)[2]
    return {"grpo": sum((-ratio * a + hand.beta * k).mean() for ratio, a, k in zip(ratios, A, k3)) / 4,
            "ppo": -torch.cat([ratio * a for ratio, a in zip(ratios, whitened)]).mean(),
            "reinforce": -sum(a * new.sum() for a, new in zip(A_reinforce, pi)) / 4}


def test_scores_logprobs_and_kl(example, hand):
    shown, = tables(example.blocks, "## 1. Generate, 2. score")
    close(columns(shown)["r"], hand.scores)
    for i, table in enumerate(tables(example.blocks, "## 3. Log-probs and KL")):
        rows = lines(table)
        close(rows["log pi(y_t)"], hand.pi[i])
        close(rows["log pi_ref(y_t)"], hand.pi_ref[i])
        close(rows["d_t = log pi - log pi_ref"], hand.d[i])
        close(rows["k3_t = exp(-d_t) - 1 + d_t"], hand.k3[i])
    assert i == 3 and max(d.abs().max() for d in hand.d) > 0.05  # the policy is not the reference


def test_advantages(example, hand):
    shown, = tables(example.blocks, "### GRPO")
    close(columns(shown)["A = (r - mean of r) / (std of r + 0.0001)"], grpo_advantages(hand))
    by_hand = (hand.values, *ppo_numbers(hand))
    for i, table in enumerate(tables(example.blocks, "### PPO")):
        rows = lines(table)
        assert len(rows) == len(by_hand)
        for shown, expected in zip(rows.values(), by_hand):
            close(shown, expected[i], rtol=1e-3)
    shown, = tables(example.blocks, "### REINFORCE")
    _, r, kl, *shown = columns(shown).values()
    close(kl, [d.sum() for d in hand.d])
    for numbers, expected in zip(shown, reinforce_numbers(hand)):
        close(numbers, expected)


def test_loss_and_update(example, hand):
    """The losses; and what AdamW's first update, of every weight by lr * g / (|g| + eps), changes."""
    table, changes, ratios = tables(example.blocks, "## 5. Update")
    shown = {row[0]: [float(x) for x in row[2:]] for row in table[1:]}
    rewards, _, _, _, returns = ppo_numbers(hand)
    squares = torch.cat([(v - R) ** 2 / 2 for v, R in zip(hand.values, returns)])
    close(shown["PPO's critic"][:1], [squares.mean()], rtol=1e-3)
    shown_changes, shown_ratios = columns(changes), columns(ratios)
    close(shown_changes["log pi(y) before"], [x.sum() for x in hand.pi])
    weights = list(hand.policy.parameters())
    before = [weight.detach().clone() for weight in weights]
    for name in ("grpo", "ppo", "reinforce"):
        loss = losses(hand, [logprobs(hand.policy, hand.prompt, answer) for answer in hand.answers])[name]
        gradient = torch.autograd.grad(loss, weights)
        norm = torch.stack([(g ** 2).sum() for g in gradient]).sum().sqrt()
        close(shown[name.upper()], [loss.item(), norm.item()], rtol=2e-3)
        with torch.no_grad():
            for weight, g in zip(weights, gradient):
                g = g * min(1, 1 / norm)
                weight -= 1e-4 * g / (g.abs() + 1e-8)
            new = [logprobs(hand.policy, hand.prompt, answer) for answer in hand.answers]
            for weight, old in zip(weights, before):
                weight.copy_(old)
        close(shown_changes[name.upper()], [(a - b).sum() for a, b in zip(new, hand.pi)], rtol=0.02, atol=2e-3)
        for span, a, b in zip(shown_ratios[name.upper()], new, hand.pi):
            low, high = re.match(r"(\S+) to ([\d.]+)", span).groups()
            close([low, high], [(a - b).exp().min(), (a - b).exp().max()], rtol=0.01, atol=2e-3)


# --- the page

def test_all_scripts_have_sampled_the_same(example):
    first, *others = example.steps.values()
    for step in others:
        assert torch.equal(step.rollout.completion_ids, first.rollout.completion_ids)
        assert torch.equal(step.scores, first.scores)
    assert len(set(first.rollout.texts)) > 1 and not first.rollout.truncated.any()
    assert all(getattr(script, name).__module__ == script.__name__ for script, name in (
        (grpo, "group_advantages"), (ppo, "gae"), (reinforce, "baseline")))  # nothing is left recorded
    assert grpo.group_advantages.__name__ == "group_advantages"


def test_what_the_page_says_of_its_example(example):
    """The notes below the tables."""
    _, changes, _ = tables(example.blocks, "## 5. Update")
    change = {name: [float(x) for x in column] for name, column in columns(changes).items() if name}
    assert abs(change["r"][0] - change["r"][2]) < 0.2 and min(change["r"]) == change["r"][3]
    A = [float(x) for x in columns(tables(example.blocks, "### GRPO")[0])["A = (r - mean of r) / (std of r + 0.0001)"]]
    assert A[0] > 0 > A[3] and change["GRPO"][0] < 0 and change["REINFORCE"][0] < 0
    assert change["PPO"][3] > 0 > change["PPO"][2]
    lengths = example.steps["ppo"].rollout.mask.sum(1).tolist()
    assert (lengths[0], lengths[3]) == (8, 5)
    assert [text.split()[0] for text in example.steps["ppo"].rollout.texts] == ["violin", "howl", "trumpet", "violin"]
    other = tool.page("x", example.steps, tool.Args(seed=4))
    assert tool.NOTES[1] in example.blocks and tool.NOTES[1] not in other


def test_it_fits_a_terminal_of_100_columns(example):
    text = tool.rendered(example.blocks, markdown=False)
    assert max(map(len, text.splitlines())) <= 100 and "|" not in text.replace("<|end|>", "")


def pieces(text: str) -> tuple[list[str], list[float]]:
    """A page's words, without the width of its tables, and its numbers."""
    text = re.sub(r"-{3,}", "--", re.sub(r" +", " ", text))
    number = r"-?\d+\.\d+"
    return re.split(number, text.replace("-- |", "--|")), [float(x) for x in re.findall(number, text)]


def same_page(a: str, b: str) -> bool:
    (words, numbers), (other_words, others) = pieces(a), pieces(b)
    return words == other_words and len(numbers) == len(others) and all(
        abs(x - y) <= 0.003 + 0.02 * abs(y) for x, y in zip(numbers, others))


def test_the_committed_page_is_what_the_tool_makes(example):
    """But for rounding, which differs between machines."""
    committed, made = read("docs/one_step.md"), tool.rendered(example.blocks, markdown=True)
    assert same_page(committed, made), "run python tools/one_step.py --out docs/one_step.md"
    assert len(pieces(made)[1]) > 150 and not same_page(committed, made.replace("lambda", "gamma"))
    a_score = re.search(r"\| +(-?\d\.\d{3}) \|", committed).group(1)
    assert not same_page(committed.replace(a_score, f"{float(a_score) + 0.3:.3f}"), made)


# --- a run's tokens

def train(script, **flags):
    script.main(script.Args(**SMALL | flags))
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of ppo.py and one of grpo.py."""
    folder = tmp_path_factory.mktemp("runs")
    for script in (ppo, grpo):
        train(script, run_dir=str(folder / script.__name__))
    return folder


def shown(folder, capsys) -> str:
    capsys.readouterr()
    tool.main(tool.Args(run=str(folder), device="cpu"))
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_advantages_and_values_of_a_run(name, runs, capsys):
    out = shown(runs / name, capsys)
    run, script, models = credit.load_run(str(runs / name), "cpu")
    _, rollout, scores, advantages = credit.next_step(run, script, models, 1)
    A, V = ([float(x) for line in re.findall(rf"^ +{letter}  (.*)$", out, re.M) for x in line.split()]
            for letter in "AV")
    mask = rollout.mask.bool()
    assert A == [float(f"{x:+.2f}") for row, on in zip(advantages, mask) for x in row[on].tolist()]
    assert re.findall(r"^ {0,6}(-?\d+\.\d\d)  ", out, re.M) == [f"{score:.2f}" for score in scores]
    assert out.startswith(f"{name}.py, step 2: ") and ("there is no critic" in out) == (name == "grpo")
    assert max(map(len, out.splitlines()[1:])) <= 100
    expected = []
    for i, on in enumerate(mask if name == "ppo" else []):
        ids = torch.cat([rollout.prompt_ids[i][rollout.prompt_mask[i].bool()], rollout.completion_ids[i][on]])
        with torch.no_grad():  # one row, no padding
            values = models["critic"](input_ids=ids[None], use_cache=False).logits[0, :, 0]
        expected += values[len(ids) - 1 - int(on.sum()):-1].tolist()
    assert len(V) == len(expected) and all(abs(x - y) < 0.006 for x, y in zip(V, expected))


def test_colors_in_a_terminal(runs, monkeypatch, capsys):
    plain = shown(runs / "ppo", capsys)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = shown(runs / "ppo", capsys)
    n = sum(len(line.split()) for line in re.findall(r"^ +A  (.*)$", plain, re.M))
    assert out.count("\033[30;48;2;") == n > 8 and not re.search(r"^ +A  ", out, re.M)
    assert re.findall(r"^ +V  .*$", out, re.M) == re.findall(r"^ +V  .*$", plain, re.M) != []
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(runs / "ppo", capsys) == plain


def test_credit_lines_wrap_and_align():
    words, numbers = ["a"] + [" long" * 3] * 9, [0.5, -1.0] * 5
    found = tool.credit_lines(words, numbers, [2.0] * 10, "  1.00  ", colors=False)
    assert len(found) == 6 and max(map(len, found)) <= 100  # two lines of tokens, each over its A and V
    assert found[0].startswith("  1.00  a     long long long") and found[1].startswith("     A  +0.50 -1.00 ")
    assert found[2].startswith("     V  2.00  2.00 ") and found[3].startswith("        long")
    assert found[0].index("long") == found[1].index("-1.00") == found[2].index("2.00", 10)
    assert sum(line.count("-1.00") for line in found) == 5


def test_mistakes_are_one_line(runs, tmp_path, monkeypatch, capsys):
    def error(**flags):
        return user_error(lambda: tool.main(tool.Args(device="cpu", **flags)))
    assert "args.json cannot be read" in error(run=str(tmp_path / "none"))
    assert error(run="a", out="b.md").startswith("--out: only for the worked example")
    assert error(out=str(tmp_path / "no/page.md")) == f"--out: {tmp_path}/no: no such folder"
    assert error(row=10**6).startswith("--row: tiny/prompts.jsonl has ")
    assert error(row=0) == "--row: must be more than 0"
    shutil.copytree(runs / "ppo", tmp_path / "run", ignore=shutil.ignore_patterns("resume"))
    assert error(run=str(tmp_path / "run")) == (f"{tmp_path}/run/checkpoint-1: was saved with --no-resumable, so it "
                                                "holds the policy alone: no critic, and no state of the run")
    assert fails_as_command(monkeypatch, capsys, "tools/one_step.py", "nowhere").startswith("error: nowhere: ")
