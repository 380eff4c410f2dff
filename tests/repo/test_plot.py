"""tools/plot.py: the picture, its colors, and the errors for folders that are not runs."""
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install matplotlib")
from matplotlib import rc_context  # noqa: E402
from matplotlib.image import imread  # noqa: E402

from helpers.repo import load, user_error  # noqa: E402

plot = load("tools/plot.py")


def write_run(folder: Path, *rows: dict, end: str = "") -> str:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return str(folder)


GRPO = [{"step": 0, "eval_reward": -0.3, "eval_gold": 0.5, "eval_kl": 0.0, "eval_length": 10.9},
        {"step": 1, "reward": 0.5, "kl": 0.1, "entropy": 0.2, "length": 9.5, "lr": 1e-4},
        {"step": 2, "reward": 1.0, "kl": 0.2, "entropy": 0.2, "length": 9.0, "lr": 1e-4},
        {"step": 2, "eval_reward": 0.7, "eval_gold": 0.8, "eval_kl": 0.2, "eval_length": 8.5}]
DPO = [{"step": 0, "eval_loss": 0.69, "eval_accuracy": 0.5},
       {"step": 1, "loss": 0.69, "accuracy": 0.56}]


def linear(color: str) -> list[float]:
    parts = [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    return [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]


def contrast(a: str, b: str) -> float:
    """WCAG 2.2's contrast ratio."""
    low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in map(linear, (a, b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("color", [*plot.COLORS, plot.GRAY])
def test_a_color_shows_on_white_and_on_githubs_dark_page(color):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # known
    assert contrast(color, "#ffffff") >= 3 and contrast(color, "#0d1117") >= 3


def test_colors_are_apart_for_the_color_blind():
    """Distance in OKLab, as seen with each kind of dichromacy (Machado et al. 2009, severity 1)."""
    seen_by = {
        "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]}
    to_lms = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
    to_lab = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]

    def times(matrix, vector):
        return [sum(m * v for m, v in zip(row, vector)) for row in matrix]
    for kind, matrix in seen_by.items():
        seen = [[min(1, max(0, x)) for x in times(matrix, linear(c))] for c in plot.COLORS]
        labs = [times(to_lab, [x ** (1 / 3) for x in times(to_lms, rgb)]) for rgb in seen]
        nearest = min(math.dist(a, b) for a, b in itertools.combinations(labs, 2))
        assert nearest > 0.07, kind


def test_two_runs_make_one_picture_as_a_command(tmp_path):
    runs = [write_run(tmp_path / "a/run", *GRPO),
            write_run(tmp_path / "b/run", *GRPO, end='{"step": 3, "rew')]
    out = tmp_path / "curves.png"
    command = [sys.executable, "tools/plot.py", *runs, runs[0] + "/", "--out", out, "--smooth", "2"]
    for _ in range(2):  # the second time over the first
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}: 2 runs, 5 panels\n", "")
    pixels = imread(out)
    assert pixels[0, 0, 3] == 0 and pixels[..., 3].max() == 1  # transparent, and not empty


def test_what_is_drawn(tmp_path):
    runs = [write_run(tmp_path / "a", *GRPO), write_run(tmp_path / "$b$ $c$", *DPO)]
    curves = dict(zip(plot.short_names(runs), map(plot.read_run, runs)))
    with rc_context(plot.STYLE):
        figure = plot.draw(curves, [("reward", "reward"), ("accuracy", "accuracy")], smooth=2)
        figure.canvas.draw()
    reward, accuracy = figure.axes
    lines = [(line.get_color(), line.get_xydata().tolist()) for line in reward.lines]
    first, second, *_ = plot.COLORS
    assert lines == [(first, [[1, 0.5], [2, 0.75]]), (first, [[0, -0.3], [2, 0.7]])]
    assert {line.get_color() for line in accuracy.lines if len(line.get_xydata())} == {second}
    legend, = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["a", r"\$b\$ \$c\$", "training", "held-out"]
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_more_runs_than_colors_differ_by_their_lines():
    curves = {f"run{i}": {"reward": [(1, i), (2, i)]} for i in range(3 * len(plot.COLORS))}
    axes, = plot.draw(curves, [("reward", "reward")], 1).axes
    lines = [line for line in axes.lines if len(line.get_xydata())]
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(looks) == len(curves)


def test_names_are_the_shortest_that_differ():
    assert plot.short_names(["/r/a/x", "/r/b/x", "/r/y"]) == ["a/x", "b/x", "y"]
    assert plot.short_names(["/r/a", "/r/r/a"]) == ["/r/a", "r/r/a"]
    assert plot.short_names(["/r/a"]) == ["a"]


def test_a_value_that_is_not_a_number_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", {"step": 1, "reward": float("nan"), "kl": float("inf")},
                    {"step": 2, "reward": 1.0, "kl": None})
    assert plot.read_run(run) == {"step": [(1, 1), (2, 2)], "reward": [(2, 1.0)]}


@pytest.mark.parametrize("flags, line", [
    (dict(runs=()), "no run: name one or more run folders, such as runs/*"),
    (dict(runs=("@/nowhere",)),
     "@/nowhere: not a run: @/nowhere/metrics.jsonl cannot be read: No such file"),
    (dict(runs=("@/run/metrics.jsonl",)), "@/run/metrics.jsonl: not a run: "),
    (dict(runs=("@/run", "@/torn")), "@/torn/metrics.jsonl:2: not a JSON object with a step"),
    (dict(runs=("@/list",)), "@/list/metrics.jsonl:1: not a JSON object with a step"),
    (dict(runs=("@/text",)), "@/text/metrics.jsonl:1: not a JSON object with a step"),
    (dict(runs=("@/empty",)), "@/empty: no metric to plot yet"),
    (dict(out="@/curves.pdf"), "--out @/curves.pdf: must be a .png file in a folder that exists"),
    (dict(out="@/nowhere/curves.png"),
     "--out @/nowhere/curves.png: must be a .png file in a folder that exists"),
    (dict(out="@/folder.png"), "--out @/folder.png: cannot be written: Is a directory"),
    (dict(smooth=0), "--smooth: must be more than 0"), (dict(smooth=-2), "--smooth: must be more than 0")])
def test_a_mistake_is_one_line(tmp_path, flags, line):
    write_run(tmp_path / "run", *GRPO)
    write_run(tmp_path / "torn", GRPO[0], end='{"step": 1, "rew\n{"step": 2}\n')
    write_run(tmp_path / "list", [1, 2])
    write_run(tmp_path / "text", {"step": "one", "reward": 1.0})
    write_run(tmp_path / "empty", {"step": 1, "lr": 1.0}, end='{"step": 2, "reward": 1.0}')
    (tmp_path / "folder.png").mkdir()

    def at(value):
        return value.replace("@", str(tmp_path)) if isinstance(value, str) else value
    flags = {"runs": ("@/run",), "out": "@/curves.png"} | flags
    flags = {k: tuple(map(at, v)) if isinstance(v, tuple) else at(v) for k, v in flags.items()}
    said = user_error(lambda: plot.main(plot.Args(**flags)))
    assert said.replace(str(tmp_path), "@").startswith(line)
    assert not (tmp_path / "curves.png").exists()


def test_a_mistake_on_the_command_line_is_one_line_and_code_2(tmp_path):
    done = subprocess.run([sys.executable, "tools/plot.py", tmp_path / "none"], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path}/none: not a run: ")


def test_without_matplotlib_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = write_run(tmp_path / "run", *GRPO)
    said = user_error(plot.main, plot.Args(runs=(run,), out=str(tmp_path / "curves.png")))
    assert said == "matplotlib is missing: pip install matplotlib"
