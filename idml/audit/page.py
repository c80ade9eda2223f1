"""From findings to one HTML page that needs nothing else: no script, no network, pictures and styles within it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from idml._version import __version__
from idml.audit import plots
from idml.audit.figures import Confusion, Share
from idml.audit.findings import Findings
from idml.audit.pictures import Picture, Pictures, picture_of
from idml.audit.shifts import KINDS
from idml.environment import hardware

PAIRS, OF_PAIR = 6, 4
"""Pairs of classes that are shown, and pictures of each in either direction."""


def render(found: Findings, *, pictures: int) -> str:
    """The page.

    Args:
        pictures: in each section at the most.

    Returns:
        HTML. Everything that comes from file names or classes is escaped; a Content-Security-Policy forbids scripts and
        every request.
    """
    environment = Environment(
        loader=PackageLoader("idml.audit"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assert environment.loader is not None
    style = environment.loader.get_source(environment, "page.css")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    environment.filters |= {"percent": percent, "interval": interval, "number": lambda value: f"{value:,}"}
    view = View(found, pictures)
    return environment.get_template("page.html").render(
        view=view,
        found=found,
        answers=found.answers,
        spec=found.model.spec,
        style=Markup(style),  # a file of this package
        style_hash=f"sha256-{digest}",
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        hardware=hardware(),
    )


def percent(value: float, digits: int = 1) -> str:
    """0.123 -> ``12.3 %``, which is not broken between lines."""
    return f"{100 * value:.{digits}f}\u00a0%"


def interval(share: Share) -> str:
    """``12.3 to 14.5 %``."""
    return f"{100 * share.low:.1f} to {100 * share.high:.1f}\u00a0%"


class View:
    """What the template shows, section by section.

    Args:
        found: see there.
        count: pictures in each section at the most.
    """

    def __init__(self, found: Findings, count: int) -> None:
        self.found, self.count = found, count
        self.answers, self.names = found.answers, found.collection.names
        self.classes = found.answers.classes
        self.pictures = Pictures(found.collection)
        self.retrieval = found.model.task == "retrieval"
        self.labelled = bool(found.shares)

    def score(self, value: float) -> str:
        """An uncertainty in its unit."""
        return percent(value) if self.answers.is_probability else f"{value:.3g}"

    def name_of(self, label: int) -> str:
        """Of a class."""
        return "no label" if label < 0 else self.classes[label]

    def card(self, position: int, *lines: str, note: str = "") -> dict[str, Any]:
        """A picture with its caption; ``note`` is for emphasis."""
        picture: Picture = self.pictures.of(position)
        name = self.names[position]
        return {"picture": picture, "name": name, "lines": lines, "note": note, "alt": f"{name}: {', '.join(lines)}"}

    def _plain(self, position: int, note: str | None = None) -> dict[str, Any]:
        label, predicted = int(self.answers.labels[position]), int(self.answers.predicted[position])
        what = "nearest" if self.retrieval else "says"
        lines = [f"label {self.name_of(label)}"] if label >= 0 else []
        if predicted >= 0:
            right = " (right)" if label == predicted else " (wrong)" if label >= 0 else ""
            lines.append(f"{what} {self.name_of(predicted)}{right}")
        return self.card(position, *lines, note=note or self.score(float(self.answers.uncertainty[position])))

    def strangest(self) -> list[dict[str, Any]]:
        """The images that are the strangest to the model."""
        new = self.found.new
        return [] if new is None else [self._plain(i, f"novelty {new.novelty[i]:.3f}") for i in self._first(new.order)]

    def answered_wrongly(self) -> list[dict[str, Any]]:
        """Those that it would answer, and wrongly, the surest first."""
        refusal = self.found.refusal
        return [] if refusal is None else [self._plain(i) for i in self._first(refusal.wrong)]

    def _first(self, order: np.ndarray) -> list[int]:
        return order[: self.count].tolist()

    def extremes(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The most and the least uncertain images."""
        order = np.argsort(-self.answers.uncertainty, kind="stable")
        count = min(self.count, len(order))
        return [self._plain(int(i)) for i in order[:count]], [self._plain(int(i)) for i in order[::-1][:count]]

    def label_errors(self) -> list[dict[str, Any]]:
        """The labels that are the most doubtful."""
        cards = []
        for position in self.found.ranked[: self.count].tolist():
            lines = [f"label {self.name_of(int(self.answers.labels[position]))}"]
            lines.append(f"rather {self.name_of(int(self.answers.suggested[position]))}")
            doubt = float(self.answers.doubt[position])
            note = f"nearer by {doubt:.2f}" if self.retrieval else f"label {percent(1 - doubt, 2)}"
            cards.append(self.card(position, *lines, note=note))
        return cards

    def duplicates(self) -> list[dict[str, Any]]:
        """A pair of each group of near-duplicates, in their order."""
        pairs, groups = self.found.duplicates, np.bincount(self.found.duplicates.group)
        seen: set[int] = set()
        shown: list[dict[str, Any]] = []
        for number in range(len(pairs)):
            group = int(pairs.group[number])
            if group in seen or len(shown) == max(self.count // 2, 1):
                continue
            seen.add(group)
            cards = []
            for position in (int(pairs.first[number]), int(pairs.second[number])):
                split, label = self.found.collection.splits[position], int(self.answers.labels[position])
                lines = [f"split {split}"] if split else []
                cards.append(self.card(position, *lines, *([f"label {self.name_of(label)}"] if label >= 0 else [])))
            marks = ["across splits"] if pairs.across[number] else []
            marks += ["labels differ"] if pairs.conflict[number] else []
            marks += [f"{groups[group] - 1} more pairs in this group"] if groups[group] > 1 else []
            difference = f"differ by {pairs.difference[number]:.1f} of 255 on average"
            shown.append({"cards": cards, "text": ", ".join([*marks, difference])})
        return shown

    def confused(self) -> list[dict[str, Any]]:
        """Pairs of classes, both directions together, the most frequent first."""
        by_pair: dict[tuple[int, int], list[Confusion]] = {}
        for each in self.found.confusions:
            pair = (min(each.label, each.predicted), max(each.label, each.predicted))
            by_pair.setdefault(pair, []).append(each)
        frequent = sorted(by_pair.values(), key=lambda both: -sum(each.count for each in both))[:PAIRS]
        return [{"title": self._pair_title(both), "sides": [self._side(each) for each in both]} for both in frequent]

    def _pair_title(self, both: Sequence[Confusion]) -> str:
        return f"{self.name_of(both[0].label)} and {self.name_of(both[0].predicted)}"

    def _side(self, each: Confusion) -> dict[str, Any]:
        plural = "image" if each.count == 1 else "images"
        text = f"{each.count} {plural} of {self.name_of(each.label)} ({percent(each.share)} of the class) taken for "
        text += self.name_of(each.predicted)
        cards = []
        for position in each.images[:OF_PAIR].tolist():
            cards.append(self.card(position, note=self.score(float(self.answers.uncertainty[position]))))
            if self.retrieval:
                assert self.answers.nearest is not None
                nearest = int(self.answers.nearest[position])
                cards.append(self.card(nearest, f"nearest: {self.name_of(int(self.answers.labels[nearest]))}"))
        return {"text": text, "cards": cards[: 2 * OF_PAIR if not self.retrieval else OF_PAIR]}

    def risk_coverage(self) -> str:
        """The plot."""
        return plots.risk_coverage(self.answers)

    def reliability(self) -> str:
        """The plot."""
        return plots.reliability(self.answers)

    def shifts(self) -> list[dict[str, Any]]:
        """For each kind its curve, and the first image at every strength."""
        kinds = []
        for kind, (name, unit, _) in KINDS.items():
            own = [shift for shift in self.found.shifts if shift.kind == kind]
            if own:
                strip = [(picture_of(shift.example), f"{shift.strength:.0f}") for shift in own]
                last = own[-1]
                text = (
                    f"mean {self.score(own[0].mean_uncertainty)} on clean images, "
                    f"{self.score(last.mean_uncertainty)} at the strongest; AUROC {last.auroc:.2f}"
                )
                curve = plots.shift_curve(kind, own, self.answers.score_name)
                kinds.append({"name": name, "unit": unit, "curve": curve, "strip": strip, "text": text})
        return kinds
