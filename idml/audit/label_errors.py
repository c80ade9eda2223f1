"""How likely a label is wrong, by what a model makes of the image. B or N images, C classes, k neighbours.

On Fashion-MNIST with planted errors (``benchmarks/introspection.py``) the probability of the given label finds more of
them than any ranking by how sure the model is of another class: where two classes are hard to tell apart, it is sure of
the wrong one often enough.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

AGREEING = 10
"""Most images of a class that are asked, of a retrieval model. With all of them it would be far from outliers of its
own class; with one, a wrong label beside it would speak for a wrong one: the first 5 % then hold 60 % in place of
86 % of planted errors (8,000 images of Fashion-MNIST), and 68 % in place of 67 % of those of emoji, six images a class.
"""

ROWS = 512
"""Images that are compared with their class at a time."""


def class_doubt(probabilities: Tensor, belief: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of a classifier's images.

    Args:
        probabilities: (B, C), by the plain logits.
        belief: (B, C), what the introspection's heads answer by themselves; None where there is none.
        labels: (B,) int64; -1 where there is none.

    Returns:
        doubt: (B,) float32 in [0, 1], the probability that the label is wrong: 1 less that of the label, averaged over
        logits and belief; NaN without a label. suggested: (B,) int64, the likeliest class but the label.
    """
    both = probabilities if belief is None else (probabilities + belief) / 2
    known = labels.clamp(min=0)[:, None]
    doubt = 1 - both.gather(1, known)[:, 0]
    others = both.scatter(1, known, -1.0)
    suggested = torch.where(labels < 0, both.argmax(1), others.argmax(1))
    return torch.where(labels < 0, torch.nan, doubt), suggested


def neighbour_doubt(
    semantic: np.ndarray, labels: np.ndarray, neighbours: np.ndarray, similarities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of a retrieval model's images: whether the nearest ones agree on another class, and are nearer than its own.

    Votes alone would not do: where a class has six images, five neighbours of another class are nothing unusual.

    Args:
        semantic: (N, D) float32.
        labels: (N,) int64; -1 where there is none.
        neighbours, similarities: (N, k), of each image by its embedding, nearest first.

    Returns:
        doubt: (N,) float32 in [-2, 2]: mean cosine similarity of the ``AGREEING`` nearest images of another class, less
        that of the nearest of its own class (of as many as there are); NaN where there is no label, or no other image
        of the class. suggested: (N,) int64, the other class; the label itself where no neighbour is of another.
    """
    doubt, suggested = np.full(len(labels), np.nan, np.float32), labels.copy()
    unit = semantic / np.maximum(np.linalg.norm(semantic, axis=1, keepdims=True), 1e-12)
    counts = np.bincount(labels[labels >= 0]) if (labels >= 0).any() else np.zeros(0, np.int64)
    for label in np.flatnonzero(counts > 1).tolist():
        members = np.flatnonzero(labels == label)
        for start in range(0, len(members), ROWS):
            rows = members[start : start + ROWS]
            to_own = unit[rows] @ unit[members].T
            to_own[np.arange(len(rows)), start + np.arange(len(rows))] = -np.inf
            count = min(AGREEING, len(members) - 1)
            own = np.partition(to_own, -count, axis=1)[:, -count:].mean(1)
            of_others = labels[neighbours[rows]]
            other, best = _nearest_other(of_others, similarities[rows], label)
            doubt[rows], suggested[rows] = other - own, np.where(best < 0, label, best)
    return doubt, suggested


def _nearest_other(classes: np.ndarray, similarities: np.ndarray, own: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) mean similarity of the ``AGREEING`` nearest images of the nearest other class, and that class or -1.

    Images beyond the k neighbours count as if they were as near as the last of these.
    """
    last = similarities[:, -1:]
    alike = classes[:, :, None] == classes[:, None, :]  # (rows, k, k)
    earlier = np.tril(np.ones(alike.shape[1:], bool))
    taken = (alike & earlier).sum(2) <= AGREEING
    gain = (alike * (taken * (similarities - last))[:, None, :]).sum(2) / AGREEING  # of the class of each neighbour
    gain[(classes == own) | (classes < 0)] = -1
    best = gain.argmax(1)
    rows = np.arange(len(classes))
    found = np.where(gain[rows, best] < 0, -1, classes[rows, best])
    return last[:, 0] + np.maximum(gain[rows, best], 0), found
