"""Figures of a classifier: per image first, then as means, so that they can be pooled over batches and ranks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from idml.metrics.uncertainty import ECE_BINS, selective_metrics
from idml.models import ClassifierOutput, uncertainty_score


class Predictions(NamedTuple):
    """What is kept of each of N images; every field is (N,).

    Attributes:
        label: int64, the true class.
        predicted: int64, the class of the largest plain logit.
        rank: int64, how many plain logits are larger than the true class's: 0 is right, under 5 is right in the top 5.
        confidence: float32 in [0, 1], largest softmax probability of the plain logits.
        nll: float32, negative log-likelihood (nats) of the true class under the plain logits.
        loss: float32, cross-entropy (nats) of the introspective logits, the training criterion.
        uncertainty: float32, ``uncertainty_score``.
        p_wrong, novelty: float32 in [0, 1], of the introspection; NaN where there is none.
    """

    label: Tensor
    predicted: Tensor
    rank: Tensor
    confidence: Tensor
    nll: Tensor
    loss: Tensor
    uncertainty: Tensor
    p_wrong: Tensor
    novelty: Tensor


def predictions_of(output: ClassifierOutput, labels: Tensor) -> Predictions:
    """The per-image figures of one batch, on its device."""
    log_probabilities = functional.log_softmax(output.logits.float(), dim=1)
    confidence, predicted = log_probabilities.max(dim=1)
    true = log_probabilities.gather(1, labels[:, None])
    score = uncertainty_score(output)
    nothing = torch.full_like(score, torch.nan)
    return Predictions(
        label=labels,
        predicted=predicted,
        rank=(log_probabilities > true).sum(1),
        confidence=confidence.exp(),
        nll=-true[:, 0],
        loss=functional.cross_entropy(output.introspective_logits.float(), labels, reduction="none"),
        uncertainty=score,
        p_wrong=nothing if output.scores is None else output.scores.p_wrong,
        novelty=nothing if output.scores is None else output.scores.novelty,
    )


def classification_metrics(predictions: Predictions, num_classes: int) -> dict[str, float]:
    """Means over N images.

    Returns:
        ``top1`` and (above 5 classes) ``top5`` as shares of the images, ``loss`` and ``nll`` in nats, ``ece`` in
        [0, 1]: expected calibration error of the top label, 15 equal-width bins.

    Raises:
        ValueError: there is no image.
    """
    from torchmetrics.functional.classification import binary_calibration_error  # slow to import: only where used

    if len(predictions.label) == 0:
        raise ValueError("expected at least one image, got none")
    right = predictions.predicted == predictions.label
    metrics = {"top1": right.float().mean().item()}
    if num_classes > 5:
        metrics["top5"] = (predictions.rank < 5).float().mean().item()
    metrics["loss"] = predictions.loss.mean().item()
    metrics["nll"] = predictions.nll.mean().item()
    # The calibration error of "the top label is right" at its confidence is the top-label ECE.
    confidence = predictions.confidence.clamp(0, 1)
    metrics["ece"] = binary_calibration_error(confidence, right.long(), n_bins=ECE_BINS).item()
    return metrics


def uncertainty_metrics(predictions: Predictions, *, ism_on: bool) -> dict[str, float]:
    """What the scores are worth on N images, next to the score that every classifier gives for nothing.

    Args:
        predictions: of a model.
        ism_on: whether the model has an uncertainty embedding.

    Returns:
        With ISM ``uncertainty_test``, the mean of |u|. ``error_auroc_max_softmax``, ``e_aurc_max_softmax``: of
        1 - max softmax. With an introspection ``error_auroc``, ``e_aurc``, of ``p_wrong``; ``error_ece``, its
        calibration error as a probability; ``coverage_at_5_risk``, the share of images that could be answered with 5 %
        errors. See ``selective_metrics``. NaN where all answers are right, or all wrong, or not finite.
    """
    from torchmetrics.functional.classification import binary_calibration_error  # slow to import: only where used

    right = predictions.predicted == predictions.label
    metrics = {"uncertainty_test": predictions.uncertainty.mean().item()} if ism_on else {}
    if not predictions.confidence.isfinite().all():  # the network has diverged, which its loss says
        return metrics | dict.fromkeys(("error_auroc_max_softmax", "e_aurc_max_softmax"), math.nan)
    free = selective_metrics(1 - predictions.confidence, right)
    metrics |= {"error_auroc_max_softmax": free["error_auroc"], "e_aurc_max_softmax": free["e_aurc"]}
    if not predictions.p_wrong.isnan().any():
        figures = selective_metrics(predictions.p_wrong, right)
        metrics |= {"error_auroc": figures["error_auroc"], "e_aurc": figures["e_aurc"]}
        metrics["coverage_at_5_risk"] = figures["coverage_at_risk"]
        score = predictions.p_wrong.clamp(0, 1)
        metrics["error_ece"] = binary_calibration_error(score, (~right).long(), n_bins=ECE_BINS).item()
    return metrics


def concatenate(batches: list[Predictions]) -> Predictions:
    """The batches as one, on the CPU."""
    return Predictions(*(torch.cat(column).cpu() for column in zip(*batches, strict=True)))
