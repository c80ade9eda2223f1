"""Pictures of paired runs, told apart by the shape of the marks and not by colour."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from paired import paired_differences, sample

SHAPES = {"plain": "o", "released": "s", "live": "^", "foresight": "D"}
FILLED = {"plain": "white", "released": "0.75", "live": "black", "foresight": "0.45"}


def kind_of(name: str) -> str:
    """Which shape a row has."""
    for kind in ("released", "foresight", "live"):
        if kind in name:
            return kind
    return "live" if name.startswith(("ism", "idml-")) else "plain"


def draw_values(axes: Axes, rows: Mapping[str, Sequence[float]], title: str) -> None:
    """A line a row: every seed as a small cross, the mean as a mark, the standard deviation as a bar."""
    for place, (name, values) in enumerate(rows.items()):
        found, kind = sample([100 * value for value in values]), kind_of(name)
        axes.plot([100 * value for value in values], [place] * len(values), "x", color="0.5", markersize=4)
        style = {"markersize": 7, "markerfacecolor": FILLED[kind], "color": "black", "capsize": 3, "linewidth": 1}
        axes.errorbar(found.mean, place, xerr=found.spread or 0, fmt=SHAPES[kind], **style)
    name_lines(axes, list(rows), title)


def draw_differences(axes: Axes, rows: Mapping[str, Sequence[float]], title: str) -> None:
    """A line a row: the paired differences as small crosses, their mean, and its 95 % interval where n > 1."""
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    largest = max((abs(100 * value) for values in rows.values() for value in values), default=1.0)
    for place, (name, values) in enumerate(rows.items()):
        found, kind = sample([100 * value for value in values]), kind_of(name)
        axes.plot([100 * value for value in values], [place] * len(values), "x", color="0.5", markersize=4)
        style = {"markersize": 7, "markerfacecolor": FILLED[kind], "color": "black", "capsize": 3, "linewidth": 1}
        axes.errorbar(found.mean, place, xerr=found.half or 0, fmt=SHAPES[kind], **style)
    # The intervals of two seeds are so wide that they would hide everything else: they run out of the picture.
    axes.set_xlim(-2.2 * largest, 2.2 * largest)
    name_lines(axes, list(rows), title)


def name_lines(axes: Axes, names: list[str], title: str) -> None:
    """The names of the rows at the side, from top to bottom."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)


def draw(
    path: Path, values: Mapping[str, Mapping[int, float]], plain_of: Mapping[str, str | None], metric: str, about: str
) -> None:
    """A PNG with the values of all rows on the left, and their paired differences to the plain rows on the right.

    Args:
        path: of the picture.
        values: shares in [0, 1] by row and seed.
        plain_of: the row that each is compared with, or None.
        metric: name of the values.
        about: what was run, for the line below.
    """
    shown = {name: list(row.values()) for name, row in values.items() if row}
    pairs = {
        name: paired_differences(row, values.get(plain_of.get(name) or "", {})) for name, row in values.items() if row
    }
    pairs = {name: found for name, found in pairs.items() if found}
    figure = Figure(figsize=(10, 1.6 + 0.28 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    draw_values(left, shown, f"{metric}, %\nmean, standard deviation, each seed")
    draw_differences(right, pairs, f"{metric} less plain, points\nmean, 95 % interval, each pair")
    figure.supxlabel("\n".join(textwrap.wrap(about, 120)), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
