"""Draw docs/images/ism.png out of idml/similarity.py.

python docs/ism_picture.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot

from idml.similarity import introspective_distance, introspective_similarity, introspective_weight

BETAS = {0.0: "-", 0.1: "--", 1.0: "-.", 5.0: ":"}
"""beta and the style of its line: told apart without colour."""

ANGLES = {0.9: "-", 0.5: "--", 0.0: "-.", -0.5: ":"}
"""Cosine of a pair, and the style of its line."""


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images" / "ism.png"
    pyplot.rcParams.update({"font.size": 8, "lines.linewidth": 1.4, "lines.color": "black"})
    figure, (weights, similarities, distances) = pyplot.subplots(1, 3, figsize=(9, 3), layout="constrained")
    draw_weights(weights)
    draw_similarities(similarities)
    draw_distances(distances)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def draw_weights(axes: Any) -> None:
    """The weight of a pair of unit vectors against alpha, which is then between 0 and 4."""
    alpha = torch.linspace(0, 4, 401)
    for beta, style in BETAS.items():
        axes.plot(
            alpha, introspective_weight(alpha, torch.tensor(beta)), style, color="black", label=f"beta = {beta:g}"
        )
    axes.set(title="weight", xlabel="alpha, squared distance", ylim=(-0.03, 1.05))
    axes.legend(loc="lower right", frameon=False)


def draw_similarities(axes: Any) -> None:
    """Cosine similarity of pairs of unit vectors, as their uncertainty grows."""
    beta = torch.linspace(0, 20, 401)
    for cosine, style in ANGLES.items():
        similarity = torch.tensor(cosine)
        changed = introspective_similarity(similarity, 2 - 2 * similarity, beta)
        axes.plot(beta, changed, style, color="black", label=f"sim = {cosine:g}")
    axes.set(title="sim', similarity form", xlabel="beta, squared uncertainty", ylim=(-0.55, 1.05))
    axes.legend(loc="lower right", frameon=False)


def draw_distances(axes: Any) -> None:
    """Distance of pairs of unit vectors, between 0 and 2."""
    distance = torch.linspace(0, 2, 401)
    for beta, style in BETAS.items():
        axes.plot(distance, introspective_distance(distance, torch.tensor(beta)), style, color="black")
    axes.set(title="d', distance form", xlabel="d, distance", ylim=(-0.05, 2.05))
    axes.legend([f"beta = {beta:g}" for beta in BETAS], loc="upper left", frameon=False)


if __name__ == "__main__":
    main()
