"""Thresholds with a promise: which answers to give so that few are wrong, which classes to name so that one is right.

Letters in shapes: N held-out images, B images, C classes.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Promise:
    """Answer where P(wrong) is at most ``threshold``, and the error rate among answers is promised.

    Attributes:
        max_risk, confidence: with this confidence the error rate among answered images is at most ``max_risk``.
        threshold: of P(wrong).
        coverage: share of the held-out images that are answered.
        risk: share of errors among those.
        bound: upper bound of the error rate, at most ``max_risk``.
        held_out: N.
    """

    max_risk: float
    confidence: float
    threshold: float
    coverage: float
    risk: float
    bound: float
    held_out: int


def binomial_upper_bound(errors: int, count: int, delta: float) -> float:
    """The largest error rate under which at most ``errors`` of ``count`` are seen with probability ``delta`` or more.

    The exact tail of the binomial distribution (Clopper and Pearson 1934); 1 where all are errors.
    """
    from scipy.stats import beta  # slow to import: only where used

    return 1.0 if errors >= count else float(beta.ppf(1 - delta, errors + 1, count - errors))


def promised(p_wrong: Tensor, wrong: Tensor, *, max_risk: float, confidence: float) -> Promise | None:
    """The threshold that answers most images with a guaranteed risk (Geifman and El-Yaniv 2017, algorithm SGR).

    A binary search over the images in order of P(wrong): each of its ceil(log2 N) steps bounds the error rate among the
    images below a threshold by the exact binomial tail, with an equal share of ``1 - confidence`` for each step. So all
    bounds hold at once with the confidence asked for, whichever step is taken. The images must be of the distribution
    that is promised for, and not have been used for the score.

    Args:
        p_wrong: (N,) in [0, 1].
        wrong: (N,) bool.
        max_risk: in (0, 1).
        confidence: in (0, 1).

    Returns:
        The promise; None where none of the steps can give it.

    Raises:
        ValueError: a share out of range, or no image.
    """
    for name, value in (("max_risk", max_risk), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    count = len(p_wrong)
    if count == 0:
        raise ValueError("expected held-out images, got none")
    order = p_wrong.argsort(stable=True)
    scores, errors = p_wrong[order].double(), wrong[order].long().cumsum(0)
    steps = max(math.ceil(math.log2(count)), 1)
    low, high = 0, count - 1
    best: Promise | None = None
    for _ in range(steps):
        middle = (low + high + 1) // 2
        threshold = scores[middle].item()
        answered = int((scores <= threshold).sum())  # a threshold cannot part equal scores
        seen = int(errors[answered - 1])
        bound = binomial_upper_bound(seen, answered, (1 - confidence) / steps)
        if bound <= max_risk:
            coverage, risk = answered / count, seen / answered
            if best is None or coverage > best.coverage:
                best = Promise(max_risk, confidence, threshold, coverage, risk, bound, count)
            low = middle
        else:
            high = max(middle - 1, 0)
    return best


def set_threshold(true_probability: Tensor, coverage: float) -> float | None:
    """The least probability that a class must have to be named, so that the true one is among the named ones.

    Split conformal prediction with the least ambiguous sets (Sadinle, Lei and Wasserman 2019): over draws of held-out
    and new images together, the true class is among the named ones with probability ``coverage`` or more.

    Args:
        true_probability: (N,) probability of the true class of each held-out image.
        coverage: in (0, 1).

    Returns:
        The threshold; None where N is too small for that coverage.

    Raises:
        ValueError: coverage out of range.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must be between 0 and 1, got {coverage}")
    count = len(true_probability)
    rank = math.floor((1 - coverage) * (count + 1) + 1e-9)  # of the ascending probabilities; 1 - 0.8 is not quite 0.2
    return None if rank < 1 else true_probability.double().sort().values[rank - 1].item()


def class_sets(probabilities: Tensor, threshold: float) -> Tensor:
    """(B, C) bool: the classes that are named; at least the likeliest one."""
    named = probabilities >= threshold
    return named.scatter(1, probabilities.argmax(1, keepdim=True), True)


def as_arrays(p_wrong: Tensor, wrong: Tensor, true_probability: Tensor) -> dict[str, Tensor]:
    """What is stored of held-out images, so that promises can be asked for later: each (N,), in order of P(wrong)."""
    order = torch.argsort(p_wrong, stable=True)
    return {
        "p_wrong": p_wrong[order].float(),
        "wrong": wrong[order],
        "true_probability": true_probability[order].float(),
    }
