"""The curves of an audit as SVG pictures with a transparent ground."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from idml.audit.answers import Answers
from idml.audit.shifts import KINDS, Shift
from idml.plots import reliability_figure, risk_coverage_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def as_svg_uri(figure: Figure) -> str:
    """A matplotlib figure as ``data:image/svg+xml``; the same figure gives the same text."""
    import matplotlib  # slow to import: only where used

    text = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "idml"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(text.getvalue()).decode("ascii")


def risk_coverage(answers: Answers) -> str:
    """Of the judged images, the score beside the free one."""
    scores = {answers.score_name: answers.uncertainty, answers.free_name: answers.free}
    chosen = {name: torch.from_numpy(values[answers.judged]) for name, values in scores.items()}
    return as_svg_uri(risk_coverage_figure(chosen, torch.from_numpy(answers.right[answers.judged])))


def reliability(answers: Answers) -> str:
    """Of the judged images; the score must be a probability."""
    score = torch.from_numpy(np.clip(answers.uncertainty[answers.judged], 0, 1))
    wrong = torch.from_numpy(~answers.right[answers.judged])
    return as_svg_uri(reliability_figure(score, wrong, name=answers.score_name))


def shift_curve(kind: str, shifts: Sequence[Shift], score_name: str) -> str:
    """Mean score and AUROC against clean images, by strength."""
    import matplotlib.figure  # slow to import: only where used

    own = [shift for shift in shifts if shift.kind == kind]
    strengths = [shift.strength for shift in own]
    figure = matplotlib.figure.Figure(figsize=(3.4, 3.6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    above.plot(strengths, [shift.mean_uncertainty for shift in own], "o-", color="k", markersize=4, linewidth=1.2)
    above.set(ylabel=f"mean {score_name}")
    above.set_ylim(bottom=min(0.0, *(shift.mean_uncertainty for shift in own)))
    below.axhline(0.5, linestyle=":", color="0.5")
    below.plot(strengths[1:], [shift.auroc for shift in own[1:]], "s--", color="k", markersize=4, linewidth=1.2)
    below.set(ylabel="AUROC", ylim=(0.4, 1.02), xlabel=KINDS[kind][1])
    if min(shift.auroc for shift in own[1:]) < 0.42:
        below.set_ylim(0, 1.02)
    return as_svg_uri(figure)
