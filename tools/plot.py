"""Curves of any runs side by side, one colour a run, in one picture:

    python tools/plot.py runs/grpo-A runs/reinforce-B
    python tools/plot.py runs/* --smooth 5 --out all.png

Thin lines are metrics of training, thick ones with markers the same on held-out rows (eval_*). The
background is transparent, for white and dark pages. A run may still be going on.
"""
import json
import math
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback, from the imports neither

import tyro  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import fail  # noqa: E402

# about Okabe and Ito's hues, each with a contrast of 3:1 or more to white and to GitHub's dark page
COLORS = ["#0067e0", "#c28600", "#cc249f", "#296b65", "#0099f0", "#a34800"]
LINES = ["-", "--", ":"]  # the first for as many runs as there are colours, and so on
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
          ("accuracy", "accuracy")]  # title, metric, which in evaluation is eval_METRIC


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """folders of runs"""
    out: str = "curves.png"
    """the picture, a .png file"""
    smooth: int = 1
    """metrics of training are the mean of so many steps, up to this one (5 to 50)"""


def read_run(run: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each metric of a run; a last line half written is left out."""
    path, curves = Path(run) / "metrics.jsonl", {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError as error:
        fail(f"{run}: no run: {path} cannot be read: {error.strerror}")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            step = row["step"] + 0
        except (ValueError, TypeError, KeyError):
            fail(f"{path}:{number}: not a JSON object with a step")
        for key, value in row.items():
            if isinstance(value, int | float) and abs(value) < 1e300:  # neither nan nor infinite
                curves.setdefault(key, []).append((step, value))
    return curves


def short_names(runs: list[str]) -> list[str]:
    """The last part of each path, or as many as tell it from the others."""
    paths = [Path(run).parts for run in runs]
    fewest = [next(n for n in range(1, len(parts) + 1)
                   if [p[-n:] for p in paths].count(parts[-n:]) == 1) for parts in paths]
    return [str(Path(*parts[-n:])) for parts, n in zip(paths, fewest)]


def smoothed(points: list[tuple[int, float]], n: int) -> list[tuple[int, float]]:
    """The mean of each value and the n - 1 before it, or of those there are."""
    windows = [[y for _, y in points[max(0, i + 1 - n):i + 1]] for i in range(len(points))]
    return [(step, sum(window) / len(window)) for (step, _), window in zip(points, windows)]


def draw(curves: dict[str, dict], panels: list[tuple], smooth: int):
    """The figure, with the legend above the panels. curves: those of each run, by its name."""
    from matplotlib.figure import Figure
    columns = min(3, len(panels))
    rows, width = math.ceil(len(panels) / columns), max(6.4, 3.3 * columns)
    figure = Figure(figsize=(width, 2.5 * rows + 0.6), layout="constrained")
    looks = [{"color": COLORS[j % len(COLORS)], "ls": LINES[j // len(COLORS) % len(LINES)]}
             for j in range(len(curves))]
    for i, (title, key) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1, title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        for run, look in zip(curves.values(), looks):
            axes.plot(*zip(*smoothed(run.get(key, []), smooth)), **look | THIN)
            axes.plot(*zip(*run.get(f"eval_{key}", [])), **look | THICK)
    figure.supxlabel("step", fontsize="medium")
    keys = [axes.plot([], [], **look, lw=2.4)[0] for look in looks]
    keys += [axes.plot([], [], color=GRAY, **look)[0] for look in (THIN, THICK)]
    names = [name.replace("$", r"\$") for name in curves] + ["training", "held-out"]
    figure.legend(keys, names, loc="outside upper center",
                  ncols=max(1, int(14 * width) // (max(map(len, names)) + 8)))
    return figure


def main(args: Args):
    out, runs = Path(args.out), list(dict.fromkeys(map(os.path.abspath, args.runs)))
    if not runs:
        fail("no run: name one folder or more, such as runs/*")
    if args.smooth < 1:
        fail("--smooth: must be more than 0")
    if out.suffix != ".png" or not out.parent.is_dir():
        fail(f"--out {out}: must be a .png file in a folder that exists")
    curves = dict(zip(short_names(runs), map(read_run, runs)))
    found = set().union(*curves.values())
    panels = [(title, key) for title, key in PANELS if found & {key, f"eval_{key}"}]
    if not panels:
        fail(f"{', '.join(args.runs)}: no value to plot yet")
    try:
        from matplotlib import rc_context
        with rc_context(STYLE):
            draw(curves, panels, args.smooth).savefig(out)
    except ImportError:
        fail("no matplotlib: pip install 'plain-rlhf[plot]'")
    except OSError as error:
        fail(f"--out {out}: cannot be written: {error.strerror}")
    s = ["", "s"]
    print(f"{out}: {len(runs)} run{s[len(runs) > 1]}, {len(panels)} panel{s[len(panels) > 1]}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
