"""Plots the metrics of several runs in one picture, one color per run:

    python tools/plot.py runs/grpo-A runs/reinforce-B
    python tools/plot.py runs/* --smooth 5 --out all.png

Thin lines are training metrics, thick lines with markers those of evaluation (eval_*). The
background is transparent, for white and dark pages. Runs may still be in progress.
"""
import json
import math
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback, not even from imports

import tyro  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
from flags import PosInt, RunArgs, cli  # noqa: E402
from modeling import UserError  # noqa: E402

# close to Okabe and Ito's hues, with a contrast of at least 3:1 to white and to GitHub's dark page
COLORS = ["#0067e0", "#c28600", "#cc249f", "#296b65", "#0099f0", "#a34800"]
LINES = ["-", "--", ":"]  # the first for as many runs as there are colors, and so on
GRAY = "#787878"
STYLE = {
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "text.color": GRAY, "axes.labelcolor": GRAY, "axes.titlecolor": GRAY, "axes.edgecolor": GRAY,
    "xtick.color": GRAY, "ytick.color": GRAY, "grid.color": GRAY, "grid.alpha": 0.25,
    "axes.grid": True, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "savefig.dpi": 160, "figure.constrained_layout.h_pad": 0.06}
THIN, THICK = {"lw": 1, "alpha": 0.7}, {"lw": 2.4, "marker": "o", "markersize": 4.5}
PANELS = [("reward", "reward"), ("gold reward", "gold"), ("KL (nats per completion)", "kl"),
          ("length (tokens)", "length"), ("entropy (nats per token)", "entropy"),
          ("accuracy", "accuracy")]  # title, metric (in evaluation: eval_METRIC)


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args:
    runs: tuple[str, ...]
    """run folders"""
    out: str = "curves.png"
    """.png file to write"""
    smooth: PosInt = 1
    """average training metrics over this many steps (5 to 50)"""

    resume = ""  # not a flag: cli asks for it
    __post_init__ = RunArgs.__post_init__  # checks the bounds


def read_run(run: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each metric of a run; an incomplete last line is left out."""
    path, curves = Path(run) / "metrics.jsonl", {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError as error:
        raise UserError(f"{run}: not a run: {path} cannot be read: {error.strerror}")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            step = row["step"] + 0
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}:{number}: not a JSON object with a step")
        for key, value in row.items():
            if isinstance(value, int | float) and abs(value) < 1e300:  # neither nan nor infinite
                curves.setdefault(key, []).append((step, value))
    return curves


def short_names(runs: list[str]) -> list[str]:
    """The last part of each path, or as many parts as make it unique."""
    paths = [Path(run).parts for run in runs]
    fewest = [next(n for n in range(1, len(parts) + 1)
                   if [p[-n:] for p in paths].count(parts[-n:]) == 1) for parts in paths]
    return [str(Path(*parts[-n:])) for parts, n in zip(paths, fewest)]


def smoothed(points: list[tuple[int, float]], n: int) -> list[tuple[int, float]]:
    """The mean of each value and up to n - 1 values before it."""
    windows = [[y for _, y in points[max(0, i + 1 - n):i + 1]] for i in range(len(points))]
    return [(step, sum(window) / len(window)) for (step, _), window in zip(points, windows)]


def draw(curves: dict[str, dict], panels: list[tuple], smooth: int):
    """The figure, with the legend above the panels. curves: the metrics of each run, by name."""
    from matplotlib.figure import Figure
    columns = min(3, len(panels))
    rows, width = math.ceil(len(panels) / columns), max(6.4, 3.3 * columns)
    figure = Figure(figsize=(width, 2.5 * rows + 0.6), layout="constrained")
    styles = [{"color": COLORS[j % len(COLORS)], "ls": LINES[j // len(COLORS) % len(LINES)]}
             for j in range(len(curves))]
    for i, (title, key) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1, title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        for run, style in zip(curves.values(), styles):
            axes.plot(*zip(*smoothed(run.get(key, []), smooth)), **style | THIN)
            axes.plot(*zip(*run.get(f"eval_{key}", [])), **style | THICK)
    figure.supxlabel("step", fontsize="medium")
    keys = [axes.plot([], [], **style, lw=2.4)[0] for style in styles]
    keys += [axes.plot([], [], color=GRAY, **style)[0] for style in (THIN, THICK)]
    names = [name.replace("$", r"\$") for name in curves] + ["training", "held-out"]
    figure.legend(keys, names, loc="outside upper center",
                  ncols=max(1, int(14 * width) // (max(map(len, names)) + 8)))
    return figure


def main(args: Args):
    out, runs = Path(args.out), list(dict.fromkeys(map(os.path.abspath, args.runs)))
    if not runs:
        raise UserError("no run: name one or more run folders, such as runs/*")
    if out.suffix != ".png" or not out.parent.is_dir():
        raise UserError(f"--out {out}: must be a .png file in a folder that exists")
    curves = dict(zip(short_names(runs), map(read_run, runs)))
    found = set().union(*curves.values())
    panels = [(title, key) for title, key in PANELS if found & {key, f"eval_{key}"}]
    if not panels:
        raise UserError(f"{', '.join(args.runs)}: no metric to plot yet")
    try:
        from matplotlib import rc_context
        with rc_context(STYLE):
            draw(curves, panels, args.smooth).savefig(out)
    except ImportError:
        raise UserError("matplotlib is missing: pip install matplotlib")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}")
    s = ["", "s"]
    print(f"{out}: {len(runs)} run{s[len(runs) > 1]}, {len(panels)} panel{s[len(panels) > 1]}")


if __name__ == "__main__":
    cli(main, Args, __doc__)
