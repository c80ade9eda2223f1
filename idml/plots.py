"""Curves of an uncertainty as pictures, readable in black and white."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from idml.metrics.uncertainty import ECE_BINS, risk_coverage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = ("-", "--", "-.", ":")


def as_picture(figure: Figure) -> Image.Image:
    """A matplotlib figure as an RGB picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import: only where used

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def risk_coverage_plot(scores: Mapping[str, Tensor], right: Tensor) -> Image.Image:
    """``risk_coverage_figure`` as a picture."""
    return as_picture(risk_coverage_figure(scores, right))


def risk_coverage_figure(scores: Mapping[str, Tensor], right: Tensor) -> Figure:
    """The share of errors among the images that are kept, as the most uncertain ones are refused.

    Args:
        scores: name -> (N,) score, high where the answer is probably wrong; up to four.
        right: (N,) bool, whether the answer is right.
    """
    import matplotlib.figure  # slow to import: only where used

    figure = matplotlib.figure.Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    best = {"errors last (the best there is)": (~right).double()}
    for (name, values), line in zip((dict(scores) | best).items(), LINES, strict=False):
        curve = risk_coverage(values, right)
        axes.plot(100 * curve.coverage.numpy(), 100 * curve.risk.numpy(), line, color="k", label=name, linewidth=1.2)
    axes.set(xlabel="coverage (% of the images kept)", ylabel="risk (% wrong among them)", xlim=(0, 100))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def reliability_plot(probabilities: Tensor, happened: Tensor, *, name: str, bins: int = ECE_BINS) -> Image.Image:
    """``reliability_figure`` as a picture."""
    return as_picture(reliability_figure(probabilities, happened, name=name, bins=bins))


def reliability_figure(probabilities: Tensor, happened: Tensor, *, name: str, bins: int = ECE_BINS) -> Figure:
    """How often what has a probability happens: bins of equal width, the number of images in each below.

    Args:
        probabilities: (N,) in [0, 1].
        happened: (N,) bool.
        name: of the probability.
        bins: >= 1.
    """
    import matplotlib.figure  # slow to import: only where used

    bin_of = (probabilities.double() * bins).long().clamp(0, bins - 1)
    counts = torch.bincount(bin_of, minlength=bins)
    filled = counts > 0
    means = [
        torch.bincount(bin_of, values.double(), bins)[filled] / counts[filled] for values in (probabilities, happened)
    ]
    figure = matplotlib.figure.Figure(figsize=(5, 5), layout="constrained")
    axes, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 1], [0, 1], ":", color="0.5", label="calibrated")
    axes.plot(means[0].numpy(), means[1].numpy(), "o-", color="k", markersize=4, linewidth=1.2, label=name)
    axes.set(ylabel="share that is wrong", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize=8)
    below.bar((np.arange(bins) + 0.5) / bins, counts.numpy(), 0.9 / bins, color="0.6")
    below.set(xlabel="probability of an error", ylabel="images", yscale="log")
    return figure
