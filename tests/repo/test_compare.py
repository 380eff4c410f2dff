"""tools/compare.py: judgments by keys in a real terminal, through a pipe, and by functions."""
import fcntl
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import common
import modeling
import evaluation
import reward_model
import world
from helpers.repo import ROOT, fails_as_command, load, user_error

compare = load("tools/compare.py")

JUDGES = """
import sys
sys.path.append("tiny")
import world

keys = iter("12=s1")
def typed(prompt, first, second, **columns):
    return next(keys)

def gold(prompt, first, second, **columns):
    ahead = world.gold(columns, first) - world.gold(columns, second)
    return "1" if ahead > 0 else "2" if ahead < 0 else "="

def one(prompt, first, second, **columns):
    return "1"

calls = []
def at_the_third(what):
    def judge(prompt, first, second, **columns):
        calls.append(first)
        return "1" if len(calls) < 3 else what()
    return judge

raises = at_the_third(lambda: 1 / 0)
exits = at_the_third(lambda: sys.exit(0))
nonsense = at_the_third(lambda: "first")
nothing = at_the_third(lambda: None)
interrupts = at_the_third(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
"""


def rows(path: Path) -> list[dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


@pytest.fixture
def judged(tmp_path):
    """judged(judge, **flags) -> pairs, ties and skips, of the file out.jsonl."""
    (tmp_path / "judges.py").write_text(JUDGES)

    def run(judge: str = "", out: str = "out.jsonl", **flags):
        judge = f"{tmp_path}/judges.py:{judge}" if judge else ""
        compare.main(compare.Args(**{"out": str(tmp_path / out), "judge": judge, "device": "cpu",
                                     "max_new_tokens": 12} | flags))
        return rows(tmp_path / out), rows((tmp_path / out).with_suffix(".ties.jsonl"))
    return run


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model with other answers: the policy with flatter probabilities."""
    folder = tmp_path_factory.mktemp("models") / "other"
    model = modeling.load_causal_lm(str(ROOT / "tiny/policy"), "cpu")
    model.get_output_embeddings().weight.data.mul_(0.7)
    model.save_pretrained(folder)
    common.load_tokenizer(str(ROOT / "tiny/policy")).save_pretrained(folder)
    return str(folder)


# --- in a terminal

class Terminal:
    """compare.py in a pseudo-terminal, which it controls."""

    def __init__(self, *flags: str):
        self.master, self.slave = pty.openpty()
        self.settings = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [sys.executable, "tools/compare.py", "--device", "cpu", *flags], cwd=ROOT,
            stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        self.said = ""

    def wait_for(self, text: str):
        """Reads until the text appears, from where the last wait ended."""
        end = time.time() + 120
        while text not in self.said:
            assert time.time() < end and select.select([self.master], [], [], 120)[0], self.said
            self.said += os.read(self.master, 4096).decode()
        before, _, self.said = self.said.partition(text)
        return before + text

    def press(self, key: bytes):
        os.write(self.master, key)

    def ends(self) -> tuple[int, str]:
        code = self.process.wait(timeout=60)
        assert termios.tcgetattr(self.slave) == self.settings
        os.close(self.slave)
        try:
            while more := os.read(self.master, 4096).decode():
                self.said += more
        except OSError:  # the other end is closed
            pass
        os.close(self.master)
        return code, self.said


def test_judging_by_keys_with_ctrl_c_in_between_equals_judging_at_once(tmp_path, judged, other, monkeypatch, capsys):
    """Keys need no Enter, other keys are ignored, and a judgment is in the file before the next question."""
    out = tmp_path / "typed.jsonl"
    flags = ["--b", other, "--prompts", "6", "--max-new-tokens", "24"]
    pairs, ties = judged("typed", b=other, prompts=6, max_new_tokens=24)
    shown = sum(row["judgment"] != "equal" for row in pairs + ties)
    assert shown == 5  # as many as there are keys: choose other --prompts if the tiny policy changes

    terminal = Terminal("--out", str(out), *flags)
    for key in (b"1", b"2"):
        said = terminal.wait_for("q (stop): ")
        assert re.search(r"prompt \d of 6\s+(system|user): ", said) and "--- 2 ---" in said
        assert not termios.tcgetattr(terminal.slave)[3] & termios.ICANON
        terminal.press(key)
    terminal.wait_for("q (stop): ")
    assert [row["judgment"] for row in rows(out)] == ["1", "2"]
    for key in (b"\x1b[1~", b"x"):  # Home, which sends a 1, and a letter
        terminal.press(key)
        terminal.wait_for("q (stop): ")
    terminal.press(b"\x03")
    code, said = terminal.ends()
    assert code == 130 and "Traceback" not in said
    assert said.split() and len(said.strip().splitlines()) == 1 and str(out) in said
    assert [row["judgment"] for row in rows(out)] == ["1", "2"]
    ties_path = tmp_path / "typed.ties.jsonl"
    assert {row["judgment"] for row in rows(ties_path)} <= {"equal"}

    out.write_text(out.read_text() + '{"row": 5, "prom')  # what a kill leaves
    monkeypatch.setattr(sys, "stdin", io.StringIO("=s1"))  # a process costs seconds to start
    capsys.readouterr()
    judged(out="typed.jsonl", b=other, prompts=6, max_new_tokens=24)
    said = capsys.readouterr().out
    assert f"{out}: its last line was incomplete and was dropped" in said
    assert "has 2 pairs, and" in said
    assert re.findall(r"^prompt (\d) of 6$", said, re.M) == ["4", "5", "6"]
    wins = [row["model_chosen"] for row in rows(out)].count("tiny/policy")
    tied = sum(row["judgment"] in ("=", "equal") for row in ties)
    n = 3 + tied
    low, high = evaluation.wilson_interval((wins + tied / 2) / n, n)
    said = " ".join(said.split())
    assert (f"win rate of tiny/policy over {other}: {(wins + tied / 2) / n:.4f}, 95 % interval "
            f"{low:.4f} to {high:.4f}: {wins} won, {3 - wins} lost, ties count half") in said
    assert f"{n} judged, {tied} of them tied ({tied - 1} not shown: equal texts), and 1 sk" in said
    assert "the one shown first was chosen 2 times of 3: 0.6667" in said

    def without_judge(rows):
        return [{k: v for k, v in row.items() if k != "chosen_by"} for row in rows]
    assert without_judge(rows(out)) == without_judge(pairs)
    assert without_judge(rows(ties_path)) == without_judge(ties)


# --- by a function

def test_reward_model_reads_what_a_judge_by_gold_chose(tmp_path, judged, capsys):
    pairs, ties = judged("gold", prompts=24)
    said = capsys.readouterr().out
    assert f"{len(pairs)} pairs collected in {tmp_path}/out.jsonl" in said
    assert "win rate" not in said and "shown first was chosen" in said
    data = common.read_rows("tiny/heldout.jsonl")
    for row in pairs:
        source = data[row["row"] - 1][1]
        assert row["prompt"] == source["prompt"] and row["family"] == source["family"]
        assert world.gold(source, row["chosen"]) > world.gold(source, row["rejected"])
    for row in ties:
        golds = {world.gold(data[row["row"] - 1][1], row[k]) for k in ("first", "second")}
        assert len(golds) == 1 and (row["judgment"] == "equal") == (row["first"] == row["second"])
    assert sorted(row["row"] for row in pairs + ties) == list(range(1, 25))
    assert len(pairs) > 8
    read = common.read_pairs(str(tmp_path / "out.jsonl"))
    assert [row["chosen"] for row in read] == [row["chosen"] for row in pairs]
    reward_model.main(reward_model.Args(
        data=str(tmp_path / "out.jsonl"), eval_pairs=4, epochs=1, pairs_per_step=4, bias_prompts=0,
        run_dir=str(tmp_path / "run"), device="cpu"))
    assert len(list(tmp_path.glob("run/checkpoint-*/model.safetensors"))) == 1


def test_the_order_is_random_and_the_judge_is_not_told(judged, other, capsys):
    pairs, _ = judged("one", b=other, prompts=24)
    first = [row["model_chosen"] for row in pairs]
    assert len(first) > 10 and 0.2 < first.count(other) / len(first) < 0.8
    assert f"was chosen {len(first)} times of {len(first)}: 1.0000" in capsys.readouterr().out
    anew, _ = judged("one", out="anew.jsonl", b=other, prompts=6, seed=1)
    assert [row["chosen"] for row in anew] != [row["chosen"] for row in pairs[:len(anew)]]


@pytest.mark.parametrize("judge, words", [
    ("raises", "raised ZeroDivisionError: division by zero"),
    ("exits", "raised SystemExit: 0"),
    ("nonsense", """must return "1", "2", "=" or "s", not 'first'"""),
    ("nothing", """must return "1", "2", "=" or "s", not None""")])
def test_an_error_in_a_judge_is_one_line_and_nothing_is_lost(judge, words, judged, tmp_path):
    said = user_error(judged, judge, prompts=8)
    assert f"{judge}: tiny/heldout.jsonl: row " in said and words in said
    before = rows(tmp_path / "out.jsonl")
    assert len(before) == 2 and f"row {before[1]['row']}:" not in said
    pairs, ties = judged("one", prompts=8)
    assert pairs[:2] == before and len(pairs + ties) == 8


def test_ctrl_c_while_a_judge_decides_loses_nothing(judged, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        judged("interrupts", prompts=12)
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 130 and "\n" not in said
    assert said.endswith(f"stopped by Ctrl-C: judgments so far are in {tmp_path}/out.jsonl; the same command continues")
    assert len(rows(tmp_path / "out.jsonl")) == 2


# --- through a pipe, and what is refused

def test_a_pipe_that_ends_or_stops(judged, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n2"))
    said = user_error(judged, prompts=12)
    assert len(rows(tmp_path / "out.jsonl")) == 2
    left = 12 - len(rows(tmp_path / "out.jsonl") + rows(tmp_path / "out.ties.jsonl"))
    rest = f"{left} of 12 prompts are left; the same command continues"
    assert said == f"stdin ended: {rest}"
    monkeypatch.setattr(sys, "stdin", io.StringIO("1q"))
    pairs, _ = judged(prompts=12)
    assert [row["judgment"] for row in pairs] == ["1", "2", "1"]
    said = capsys.readouterr().out
    assert re.search(r"stopped: \d of 12 prompts are left; the same command continues\n$", said)


def test_a_file_of_another_comparison_is_refused_and_left_as_it_is(judged, tmp_path, other):
    out = tmp_path / "out.jsonl"
    judged("one", prompts=4)
    before = out.read_bytes()
    for flags, words in [
            (dict(b=other), "other models"), (dict(data="tiny/prompts.jsonl"), "other --data"),
            (dict(seed=1), "other flags"), (dict(temperature=0.5), "other flags")]:
        said = user_error(judged, "one", **flags)
        assert words in said and f"{tmp_path}/out." in said
        assert out.read_bytes() == before
    for content in (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n', b"[1]\n", b"3\n",
                    b'{"row": "x"}\n', b'{"row": 0}\n', b"my notes\n", b"my notes", b"\xff\n"):
        (tmp_path / "mine.jsonl").write_bytes(content)
        assert "mine.jsonl" in user_error(judged, "one", out="mine.jsonl")
        assert (tmp_path / "mine.jsonl").read_bytes() == content
    with open(out, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process" in user_error(judged, "one", prompts=4)


@pytest.mark.parametrize("end", [1, 12, -1])
def test_half_a_line_is_dropped_and_judged_anew(end, judged, tmp_path, capsys):
    pairs, ties = judged("one", prompts=3)
    out = tmp_path / "out.jsonl"
    lines = out.read_text().splitlines(True)
    out.write_text("".join(lines[:-1]) + lines[-1][:end])
    assert judged("one", prompts=3) == (pairs, ties)
    assert f"{out}: its last line was incomplete and was dropped" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (dict(a="tiny/none"), "tiny/none: no such model folder"),
    (dict(b="tiny/reward_model"), "tiny/reward_model: not a causal LM"),
    (dict(data="none.jsonl"), "none.jsonl: no such file"),
    (dict(prompt_column="q"), "tiny/heldout.jsonl:1: no column 'q'"),
    (dict(out="/dev/null/pairs.jsonl"), "--out /dev/null/pairs.jsonl: cannot be written: "),
    (dict(out="pairs.txt"), "--out pairs.txt: must end with .jsonl"),
    (dict(judge="none.py:f"), "none.py: no such file"),
    (dict(judge="judges.py"), "--judge judges.py: name a function"),
    (dict(prompts=-1), "--prompts: must be at least 0"), (dict(temperature=0.0), "--temperature: must be more than 0"),
    (dict(max_new_tokens=0), "--max-new-tokens: must be more than 0"), (dict(device="moon"), "--device moon")])
def test_what_users_get_wrong(flags, words, tmp_path):
    def run():
        out = str(tmp_path / "out.jsonl")
        compare.main(compare.Args(**{"out": out, "device": "cpu"} | flags))
    assert words in user_error(run)


def test_nothing_that_steers_the_terminal_reaches_it(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = compare.plain("a\x1b[2Jb\rc\u202ed\n  x = 1\n\nlong " + "word " * 20)
    assert text.startswith("a\ufffd[2Jb c\ufffdd\n  x = 1\n\nlong word")
    assert all(c.isprintable() or c == "\n" for c in text) and max(map(len, text.split("\n"))) <= 40


def test_wilson_interval():
    assert evaluation.wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_an_error_is_one_line_on_the_command_line(tmp_path, monkeypatch, capsys):
    for name in ("pairs.txt", "pairs.ties.jsonl"):  # the latter has another comparison's ties
        error = fails_as_command(monkeypatch, capsys, "tools/compare.py", "--out", tmp_path / name)
        assert error == f"error: --out {tmp_path}/{name}: must end with .jsonl, and not with .ties.jsonl\n"
