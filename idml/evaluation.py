"""Running a classifier over a data set, and probing what its uncertainty says of clean and of mixed images."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from augment import CutmixParams, MixupParams, apply_cutmix, apply_mixup, normalise
from idml.data.image_dataset import Preprocessing
from idml.data.torch_loader import Loader
from idml.distributed import all_reduce_sum, gather_interleaved
from idml.introspection.introspection import Scores
from idml.metrics.classification import Predictions, concatenate, predictions_of
from idml.models import ClassifierOutput, uncertainty_score
from idml.runtime import autocast


class Evaluation(NamedTuple):
    """Figures of a data set.

    Attributes:
        predictions: per image.
        active_units: share of uncertainty units that were positive for at least one image.
        mixed_scores: (M,) uncertainty scores of mixed images, where they were measured.
    """

    predictions: Predictions
    active_units: float
    mixed_scores: Tensor | None = None


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader, preprocessing: Preprocessing, precision: str, *, flip: bool = False
) -> Evaluation:
    """Every image of all ranks' loaders once, in evaluation mode; the model is left in that mode.

    Args:
        model: an introspective classifier.
        loader: gives this rank's share of the images, uint8, in evaluation order.
        preprocessing: mean and standard deviation to normalise with.
        precision: of the backbone, ``fp32``, ``bf16`` or ``fp16``.
        flip: average with the mirror image: the probabilities of both logits, and the uncertainty.

    Returns:
        The figures of all images, in the data set's order, on every rank.
    """
    model.eval()
    device = next(model.parameters()).device
    batches: list[Predictions] = []
    active: Tensor | None = None
    for images, labels in loader.epoch(0):
        images = normalise(images.to(device, non_blocking=True), preprocessing.mean, preprocessing.std)
        with autocast(device, precision):
            output = model(images)
            if flip:
                output = average(output, model(images.flip(3)))
        batches.append(predictions_of(output, labels.to(device, non_blocking=True)))
        fired = (output.uncertainty > 0).any(dim=0)
        active = fired if active is None else active | fired
    assert active is not None, "read_splits makes sure that every rank has an image"
    active_units = (all_reduce_sum(active.float()) > 0).float().mean().item()
    return Evaluation(Predictions(*gather_interleaved(concatenate(batches))), active_units)


def average(first: ClassifierOutput, second: ClassifierOutput) -> ClassifierOutput:
    """Two outputs for the same images as one: probabilities averaged (as log-probabilities), embeddings averaged."""

    def log_mean(a: Tensor, b: Tensor) -> Tensor:
        return torch.logaddexp(a.log_softmax(1), b.log_softmax(1)) - math.log(2)

    def mean(a: Any, b: Any) -> Any:
        return None if a is None or b is None else (a + b) / 2

    scores = None
    if first.scores is not None and second.scores is not None:
        scores = Scores(*map(mean, first.scores, second.scores))
    return ClassifierOutput(
        log_mean(first.logits, second.logits),
        log_mean(first.introspective_logits, second.introspective_logits),
        mean(first.semantic, second.semantic),
        mean(first.uncertainty, second.uncertainty),
        mean(first.exponent, second.exponent),
        scores,
    )


@torch.no_grad()
def probe_uncertainty(
    model: nn.Module, loader: Loader, preprocessing: Preprocessing, precision: str, *, mix: str
) -> tuple[Tensor, Tensor]:
    """Uncertainty scores of the loader's images as they are, and mixed half and half with one another.

    Args:
        model, loader, preprocessing, precision: as for ``evaluate``; the images should be of the training split.
        mix: ``"cutmix"`` takes the left half of each image from its partner; anything else averages the two.

    Returns:
        (N,) clean and (N,) mixed, on the CPU and on every rank; the pairs are the same in every call.
    """
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    clean: list[Tensor] = []
    mixed: list[Tensor] = []
    for images, labels in loader.epoch(0):
        images = normalise(images.to(device, non_blocking=True), preprocessing.mean, preprocessing.std)
        permutation = torch.randperm(len(images), generator=generator)
        height, width = images.shape[2:]
        if mix == "cutmix":
            batch = apply_cutmix(
                images, labels, CutmixParams(permutation, (0, 0, height, width // 2), 1 - width // 2 / width)
            )
        else:
            batch = apply_mixup(images, labels, MixupParams(permutation, 0.5))
        with autocast(device, precision):
            clean.append(uncertainty_score(model(images)))
            mixed.append(uncertainty_score(model(batch.images)))
    columns = gather_interleaved([torch.cat(clean).cpu(), torch.cat(mixed).cpu()])
    return columns[0], columns[1]
