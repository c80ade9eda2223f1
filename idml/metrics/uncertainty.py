"""How good an uncertainty is: does it rank the errors, is it calibrated, does it notice images that are not clean.

All figures take scores that are high where the answer is probably wrong. Equal scores are in no order: each figure is
the mean over all orders of them, except where a threshold is meant, which cannot part them.

    >>> scores, right = torch.tensor([0.1, 0.2, 0.3, 0.9]), torch.tensor([True, True, True, False])
    >>> selective_metrics(scores, right)["error_auroc"]
    1.0
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from idml.metrics.neighbours import Array
from idml.random_state import generator_kept

ECE_BINS = 15
"""Bins of the expected calibration error (Guo et al. 2017)."""


class RiskCoverage(NamedTuple):
    """The share of errors among the images that are kept, as the most uncertain ones are refused.

    Attributes:
        coverage: (N,) float64, 1/N, 2/N, ..., 1: the share of images that is kept.
        risk: (N,) float64 in [0, 1], the share of errors among those kept: of equal scores, the mean over their orders.
        reachable: (N,) bool, whether a threshold on the score keeps just these.
    """

    coverage: Tensor
    risk: Tensor
    reachable: Tensor


def risk_coverage(scores: Array, right: Array) -> RiskCoverage:
    """The risk-coverage curve (El-Yaniv and Wiener 2010).

    Args:
        scores: (N,) floating point, finite, N >= 1: high means "probably wrong".
        right: (N,) bool, whether the answer is right.

    Raises:
        ValueError: wrong shape, dtype or length, no image, or a score that is not finite.
    """
    values, correct = checked(scores, right)
    count = len(values)
    order = values.argsort()
    values, errors = values[order], (~correct[order]).double()
    _, sizes = values.unique_consecutive(return_counts=True)
    ends = sizes.cumsum(0)
    errors_before = torch.cat([errors.new_zeros(1), errors.cumsum(0)])
    # Within a group of equal scores, errors are spread evenly.
    group = torch.arange(len(sizes)).repeat_interleave(sizes)
    starts = ends - sizes
    share = (errors_before[ends] - errors_before[starts]) / sizes
    kept = torch.arange(1, count + 1, dtype=torch.float64)
    wrong = errors_before[starts][group] + (kept - starts[group]) * share[group]
    reachable = torch.zeros(count, dtype=torch.bool)
    reachable[ends - 1] = True
    return RiskCoverage(kept / count, wrong / kept, reachable)


def selective_metrics(scores: Array, right: Array, *, coverage: float = 0.8, risk: float = 0.05) -> dict[str, float]:
    """How well a score tells wrong answers from right ones.

    Args:
        scores: (N,) floating point, finite, N >= 1: high means "probably wrong".
        right: (N,) bool, whether the answer is right.
        coverage: in (0, 1], for ``risk_at_coverage``.
        risk: in [0, 1], for ``coverage_at_risk``.

    Returns:
        - ``error_auroc``: the probability that a wrong answer has a higher score than a right one, equal ones counted
          half. 0.5 is chance; NaN where all are right or all are wrong.
        - ``aurc``: area under the risk-coverage curve, the mean of the risk at the coverages 1/N, 2/N, ..., 1 (Geifman
          and El-Yaniv 2017). Low is good; a score of no use has the share of errors.
        - ``e_aurc``: ``aurc`` less that of a score which ranks all errors last, the best that these answers allow
          (Geifman et al. 2019); never below 0.
        - ``augrc``: area under the curve of the share of all images that are kept and wrong (Traub et al. 2024), from
          coverage 0 by the trapezoidal rule; it is ``(1 - error_auroc) a (1 - a) + (1 - a)^2 / 2``, a being the
          accuracy.
        - ``risk_at_coverage``: the risk where ceil(``coverage`` N) images are kept.
        - ``coverage_at_risk``: the largest coverage that a threshold reaches with a risk of at most ``risk``; 0 where
          there is none.

    Raises:
        ValueError: as for ``risk_coverage``, or ``coverage`` or ``risk`` out of range.
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"expected a coverage in (0, 1], got {coverage}")
    if not 0 <= risk <= 1:
        raise ValueError(f"expected a risk in [0, 1], got {risk}")
    curve = risk_coverage(scores, right)
    values, correct = checked(scores, right)
    ideal = risk_coverage((~correct).double(), correct)
    kept_and_wrong = torch.cat([curve.risk.new_zeros(1), curve.risk * curve.coverage])
    admitted = curve.coverage[curve.reachable & (curve.risk <= risk)]
    aurc = curve.risk.mean().item()
    return {
        "error_auroc": auroc(values[~correct], values[correct]),
        "aurc": aurc,
        "e_aurc": max(aurc - ideal.risk.mean().item(), 0.0),
        "augrc": torch.trapezoid(kept_and_wrong, dx=1 / len(values)).item(),
        # Rounding must not ask for one image more: 0.8 * 35 is 28.000000000000004 for a computer.
        "risk_at_coverage": curve.risk[math.ceil(round(coverage * len(values), 9)) - 1].item(),
        "coverage_at_risk": admitted.max().item() if len(admitted) else 0.0,
    }


def auroc(higher: Array, lower: Array) -> float:
    """The probability that a score of the first group is higher than one of the second, equal ones counted half.

    Args:
        higher: (M,) floating point, finite: scores of images that should have high ones (wrong, mixed, blurred).
        lower: (N,) floating point, finite.

    Returns:
        In [0, 1], 0.5 being chance; NaN where a group is empty.

    Raises:
        ValueError: wrong shape or dtype, or a score that is not finite.
    """
    with generator_kept():
        from sklearn.metrics import roc_auc_score  # slow to import: only where used

    first, second = (_checked_scores(scores) for scores in (higher, lower))
    if not len(first) or not len(second):
        return float("nan")
    labels = torch.cat([torch.ones(len(first)), torch.zeros(len(second))])
    return float(roc_auc_score(labels.numpy(), torch.cat([first, second]).numpy()))


def calibration_metrics(probabilities: Array, labels: Array, *, bins: int = ECE_BINS) -> dict[str, float]:
    """How far a classifier's probabilities can be trusted.

    Args:
        probabilities: (N, C) floating point, rows summing to 1, N >= 1, C >= 2.
        labels: (N,) integer, in [0, C).
        bins: >= 1.

    Returns:
        - ``ece``: expected calibration error of the top label, bins of equal width (Guo et al. 2017).
        - ``ece_equal_mass``: the same with the images in order of confidence and cut into ``bins`` parts of the same
          size, to one image (Nguyen and O'Connor 2015). Of equal confidences some may come into the next part, in the
          order of the data.
        - ``nll``: mean negative log-likelihood of the true class, in nats. Infinite where a true class has 0.
        - ``brier``: mean over images of the squared distance to the one-hot label, summed over classes: in [0, 2].

    Raises:
        ValueError: wrong shape or dtype, labels out of range, or rows that are no probabilities.
    """
    from torchmetrics.functional.classification import binary_calibration_error

    chances, truth = _checked_probabilities(probabilities, labels)
    if bins < 1:
        raise ValueError(f"expected at least one bin, got {bins}")
    confidence, predicted = chances.max(dim=1)
    right = predicted == truth
    order = confidence.argsort(stable=True)
    parts = zip(confidence[order].tensor_split(bins), right[order].double().tensor_split(bins), strict=True)
    gaps = [(part.mean() - hits.mean()).abs() * len(part) for part, hits in parts if len(part)]
    return {
        "ece": binary_calibration_error(confidence.clamp(0, 1), right.long(), n_bins=bins).item(),
        "ece_equal_mass": (torch.stack(gaps).sum() / len(truth)).item(),
        "nll": -chances.gather(1, truth[:, None]).log().mean().item(),
        "brier": (chances - torch.nn.functional.one_hot(truth, chances.shape[1])).square().sum(1).mean().item(),
    }


def checked(scores: Array, right: Array) -> tuple[Tensor, Tensor]:
    """Scores as (N,) float64 and answers as (N,) bool on the CPU, or a ValueError."""
    values, correct = _checked_scores(scores), torch.as_tensor(right).detach().cpu()
    if correct.shape != values.shape or correct.dtype != torch.bool:
        raise ValueError(
            f"expected right {tuple(values.shape)} of torch.bool, got {tuple(correct.shape)} of {correct.dtype}"
        )
    if len(values) == 0:
        raise ValueError("expected at least one image, got none")
    return values, correct


def _checked_scores(scores: Array) -> Tensor:
    values = torch.as_tensor(scores).detach().cpu()
    if values.ndim != 1 or not values.is_floating_point():
        raise ValueError(f"expected scores (N,) of floating point, got {tuple(values.shape)} of {values.dtype}")
    if not values.isfinite().all():
        raise ValueError(f"expected finite scores, got {int((~values.isfinite()).sum())} that are not")
    return values.double()


def _checked_probabilities(probabilities: Array, labels: Array) -> tuple[Tensor, Tensor]:
    chances, truth = torch.as_tensor(probabilities).detach().cpu(), torch.as_tensor(labels).detach().cpu()
    if chances.ndim != 2 or chances.shape[1] < 2 or len(chances) == 0 or not chances.is_floating_point():
        raise ValueError(f"expected probabilities (N, C) with N >= 1, C >= 2, got {tuple(chances.shape)}")
    if truth.shape != chances.shape[:1] or truth.is_floating_point() or truth.dtype == torch.bool:
        raise ValueError(f"expected labels ({len(chances)},) of integers, got {tuple(truth.shape)} of {truth.dtype}")
    if truth.min() < 0 or truth.max() >= chances.shape[1]:
        raise ValueError(f"expected labels in [0, {chances.shape[1]}), got {int(truth.min())} to {int(truth.max())}")
    chances = chances.double()
    if not (chances.isfinite().all() and (chances >= 0).all() and ((chances.sum(1) - 1).abs() < 1e-3).all()):
        raise ValueError("expected rows of probabilities that sum to 1, got others: logits, maybe?")
    return chances, truth.long()
