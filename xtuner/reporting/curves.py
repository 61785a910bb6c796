"""Curves of runs, read from their ``metrics.jsonl``: as a picture and in the terminal."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xtuner.utils.errors import UserError, Where
from xtuner.utils.files import written_aside
from xtuner.utils.lang import tr

FILE = "metrics.jsonl"
SHOWN = (
    "loss",
    "val/loss",
    "reward_acc",
    "reward_margin",
    "chosen_rewards",
    "rejected_rewards",
    "lr",
    "grad_norm",
    "tokens_per_sec",
)
TITLES = {
    "loss": "loss",
    "val/loss": "validation loss",
    "reward_acc": "reward accuracy",
    "reward_margin": "reward margin",
    "chosen_rewards": "chosen rewards",
    "rejected_rewards": "rejected rewards",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_sec": "tokens/s",
}
BARS = "▁▂▃▄▅▆▇█"


@dataclass
class Run:
    """The curves of one run: name of the number -> (iterations, values)."""

    name: str
    curves: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)


def read_run(folder: Path) -> Run:
    """Read the metrics of a run.

    Args:
        folder: its work dir.

    Raises:
        UserError: when there are none.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(
            tr("there is no {file} in this folder.", file=FILE),
            hint=tr("give the work dir of a training."),
            where=Where(str(folder)),
        )
    run = Run(folder.resolve().name)
    for text in path.read_text("utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the last line of a run that was killed
            continue
        for name, value in line.items():
            if isinstance(value, (int, float)):
                places, values = run.curves.setdefault(name, ([], []))
                places.append(line["iter"])
                values.append(value)
    return run


def draw(runs: Sequence[Run], out: Path, names: Sequence[str] = SHOWN) -> None:
    """Draw the curves that the runs have, one panel each, into a PNG file.

    Args:
        runs: one line of its own colour for each.
        out: the file.
        names: which numbers, in order.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    there = [name for name in names if any(name in run.curves for run in runs)]
    if not there:
        return
    columns = min(2, len(there))
    rows = -(-len(there) // columns)
    width, height = 5.5 * columns, 3.4 * rows  # inches, as the margins below
    figure = Figure(figsize=(width, height))
    # A layout engine would take as long again as drawing.
    figure.subplots_adjust(
        left=0.7 / width,
        right=1 - 0.15 / width,
        bottom=0.5 / height,
        top=1 - 0.35 / height,
        wspace=0.2,
        hspace=0.35,
    )
    FigureCanvasAgg(figure)
    for place, name in enumerate(there, start=1):
        axes = figure.add_subplot(rows, columns, place)
        for colour, run in enumerate(runs):
            if name not in run.curves:
                continue
            iterations, values = run.curves[name]
            _line(axes, iterations, values, f"C{colour}", run.name, smooth=name != "lr")
        axes.set_title(TITLES.get(name, name), loc="left", fontsize=11)
        axes.set_xlabel("iteration", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(runs) > 1 and place == 1:
            axes.legend(frameon=False, fontsize=8)
    with written_aside(out) as aside:
        figure.savefig(aside, dpi=120, format="png")


def _line(
    axes: object,
    iterations: list[float],
    values: list[float],
    colour: str,
    label: str,
    *,
    smooth: bool,
) -> None:
    """One curve; a long noisy one is pale, with its running mean on top."""
    plot = axes.plot  # type: ignore[attr-defined]
    marker = "o" if len(values) == 1 else ""
    if not smooth or len(values) < 50:
        plot(iterations, values, color=colour, label=label, linewidth=1.6, marker=marker)
        return
    plot(iterations, values, color=colour, alpha=0.25, linewidth=1)
    plot(iterations, running_mean(values, 0.9), color=colour, label=label, linewidth=1.6)


def running_mean(values: Sequence[float], keep: float) -> list[float]:
    """The exponentially weighted mean up to each value; not finite ones are passed over."""
    means: list[float] = []
    total = weight = 0.0
    for value in values:
        if value == value and abs(value) != float("inf"):
            total = keep * total + (1 - keep) * value
            weight = keep * weight + (1 - keep)
        means.append(total / weight if weight else value)
    return means


def text_curves(run: Run, width: int = 48) -> list[str]:
    """The curves of a run as lines of text: a row of bars, then first, last and range."""
    lines = [run.name]
    for name in SHOWN:
        if name not in run.curves:
            continue
        values = [v for v in run.curves[name][1] if v == v and abs(v) != float("inf")]
        if not values:
            continue
        numbers = f"{values[0]:.4g} -> {values[-1]:.4g}  [{min(values):.4g}, {max(values):.4g}]"
        lines.append(f"  {TITLES[name]:<16} {_bars(values, width):<{width}}  {numbers}")
    return lines


def _bars(values: Sequence[float], width: int) -> str:
    count = min(width, len(values))
    cuts = [round(n * len(values) / count) for n in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts) if b > a]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)
