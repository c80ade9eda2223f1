"""Figures of paired runs, and the tables made of them: what `reproduce.py` shares among its suites."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from scipy.stats import t

from idml.errors import UserError

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """Mean and spread of n values; standard deviation and half the interval are None for n = 1."""

    n: int
    mean: float
    spread: float | None
    half: float | None


def sample(values: Sequence[float]) -> Sample:
    """Mean, standard deviation, and half the 95 % interval of the mean by Student's t with n - 1 degrees of freedom."""
    mean, n = statistics.mean(values), len(values)
    if n == 1:
        return Sample(1, mean, None, None)
    spread = statistics.stdev(values)
    return Sample(n, mean, spread, float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * spread / n**0.5)


def paired_differences(values: Mapping[int, float], plain: Mapping[int, float]) -> list[float]:
    """Of each seed that both have: the value less the plain one."""
    return [values[seed] - plain[seed] for seed in values if seed in plain]


def percent(value: float, *, sign: bool = False) -> str:
    """A share as percent with one digit."""
    return f"{100 * value:{'+' if sign else ''}.1f}"


def mean_cell(values: Sequence[float], *, as_percent: bool = True) -> str:
    """Mean and standard deviation, in percent or as they are; "-" of no values."""
    if not values:
        return "-"
    found, show = sample(values), percent if as_percent else "{:.3f}".format
    return show(found.mean) + ("" if found.spread is None else f" ± {show(found.spread)}")


def difference_cells(values: Sequence[float]) -> list[str]:
    """Mean of the paired differences in points, and its 95 % interval."""
    if not values:
        return ["-", "-"]
    found = sample(values)
    if found.half is None:
        return [percent(found.mean, sign=True), "-"]
    low, high = (percent(found.mean + side * found.half, sign=True) for side in (-1, 1))
    return [percent(found.mean, sign=True), f"{low} to {high}"]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markers(name: str, script: str = "reproduce.py") -> tuple[str, str]:
    """The lines of a document between which a script of benchmarks/ writes ``name``."""
    return f"<!-- {name}: written by benchmarks/{script} -->", f"<!-- {name}: end -->"


def write_between(path: Path, name: str, body: str, script: str = "reproduce.py") -> None:
    """Replace what stands between the markers of ``name`` in a document; all other text stays.

    Raises:
        UserError: there is no such file, or it has not each marker once, in order.
    """
    begin, end = markers(name, script)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"{path} must have the lines '{begin}' and '{end}' once each, in this order")
    before, rest = text.split(begin)
    path.write_text(f"{before}{begin}\n\n{body.strip()}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")
