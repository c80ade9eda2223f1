"""The figures of an audit: right answers by split, what the uncertainty is worth, which classes are taken for another.

N images.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import torch

from idml.audit.answers import Answers
from idml.metrics import selective_metrics
from idml.metrics.uncertainty import ECE_BINS

CONFIDENCE = 0.95
"""Of the intervals around shares."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Right answers among some images.

    Attributes:
        name: of the split; empty where there is none.
        images: their number; right: of which the answer is the label.
        share: right / images; low, high: its 95 % interval (Wilson 1927), as if images were drawn one by one.
    """

    name: str
    images: int
    right: int
    share: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Confusion:
    """Images of one class that were taken for another.

    Attributes:
        label, predicted: positions in the classes.
        count: of images; share: of the images of the class.
        images: (count,) int64 positions, those that the model was surest of first.
    """

    label: int
    predicted: int
    count: int
    share: float
    images: np.ndarray


def share_of(name: str, right: np.ndarray) -> Share:
    """Of (n,) bool, n >= 1."""
    from scipy.stats import binomtest  # slow to import: only where used

    interval = binomtest(int(right.sum()), len(right)).proportion_ci(CONFIDENCE, method="wilson")
    return Share(
        name=name,
        images=len(right),
        right=int(right.sum()),
        share=float(right.mean()),
        low=float(interval.low),
        high=float(interval.high),
    )


def shares_by_split(answers: Answers, splits: tuple[str, ...]) -> list[Share]:
    """Right answers of the labelled images of each split, in the order train, others, and of all."""
    names, labelled = np.array(splits), answers.labelled
    present = sorted(set(names[labelled].tolist()), key=lambda name: (name != "train", name))
    found = [share_of(name, answers.right[labelled & (names == name)]) for name in present]
    return found if len(found) < 2 else [*found, share_of("all", answers.right[labelled])]


def lone_images(answers: Answers) -> int:
    """Judged images of which no other has the class: of a retrieval model they cannot be right."""
    counts = Counter(answers.labels[answers.labelled].tolist())
    return sum(counts[label] == 1 for label in answers.labels[answers.judged].tolist())


def uncertainty_figures(answers: Answers) -> dict[str, Any]:
    """``selective_metrics`` of the score and of the free one over the judged images (at least one), and ``ece`` where
    the score is a probability: the mean distance between it and the share of errors, 15 bins of equal width."""
    from torchmetrics.functional.classification import binary_calibration_error  # slow to import: only where used

    right = torch.from_numpy(answers.right[answers.judged])
    score, free = (torch.from_numpy(values[answers.judged]) for values in (answers.uncertainty, answers.free))
    found: dict[str, Any] = {answers.score_name: selective_metrics(score, right)}
    found[answers.free_name] = selective_metrics(free, right)
    if answers.is_probability:
        ece = binary_calibration_error(score.clamp(0, 1), (~right).long(), n_bins=ECE_BINS)
        found[answers.score_name]["ece"] = ece.item()
    return found


def confusions_of(answers: Answers) -> list[Confusion]:
    """Every class taken for another among the judged images, the most frequent first."""
    wrong = np.flatnonzero(answers.judged & ~answers.right & (answers.predicted >= 0))
    wrong = wrong[np.argsort(answers.uncertainty[wrong], kind="stable")]
    of_label = Counter(answers.labels[answers.judged].tolist())
    pairs: dict[tuple[int, int], list[int]] = {}
    for position in wrong.tolist():
        pairs.setdefault((int(answers.labels[position]), int(answers.predicted[position])), []).append(position)
    return sorted(
        (
            Confusion(
                label=label,
                predicted=predicted,
                count=len(images),
                share=len(images) / of_label[label],
                images=np.array(images, np.int64),
            )
            for (label, predicted), images in pairs.items()
        ),
        key=lambda pair: (-pair.count, -pair.share, pair.label, pair.predicted),
    )
