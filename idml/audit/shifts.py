"""Uncertainty against how strongly an image is blurred, made noisy, cropped or mixed with another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from augment.perturb import BLUR_SIGMA, CROP_SIDE, NOISE_STD, PerturbParams, apply_perturbations
from augment.shifts import partners
from idml.audit.answers import Answers
from idml.data.collection import Collection
from idml.metrics import auroc
from idml.trained import TrainedModel

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
"""Share of each kind's range; of ``mixup`` and ``cutmix`` half of it, since beyond a half the partner is in front."""

KINDS = {
    "blur": ("Blur", "standard deviation, % of the side", lambda share: 100 * _within(BLUR_SIGMA, share)),
    "noise": ("Noise", "standard deviation, % of black to white", lambda share: 100 * _within(NOISE_STD, share)),
    "crop": ("Crop", "area cut away, %", lambda share: 100 * (1 - _within(CROP_SIDE, 1 - share) ** 2)),
    "mixup": ("Mixing (Mixup)", "share of another image, %", lambda share: 50 * share),
    "cutmix": ("Mixing (CutMix)", "area of another image, %", lambda share: 50 * share),
}
"""Name for readers, what the strength is, and its value at a share of the range."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shift:
    """What one kind of change at one strength does to the uncertainty of the sample.

    Attributes:
        kind: of ``KINDS``; strength: in the unit that it gives; 0: unchanged.
        mean_uncertainty: in the unit of the score.
        auroc: the probability that a changed image has a higher score than a clean one; 0.5 is chance. Of the unchanged
            images NaN.
        images: their number.
        example: (S, S, 3) uint8, the first of them.
    """

    kind: str
    strength: float
    mean_uncertainty: float
    auroc: float
    images: int
    example: np.ndarray


def _within(limits: tuple[float, float], share: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * share


def measure_shifts(
    model: TrainedModel, collection: Collection, answers: Answers, *, count: int, batch_size: int, seed: int
) -> list[Shift]:
    """The scores of a random sample of images, spoilt in every way and strength.

    Args:
        count: images in the sample, of those that the figures are of, or of all where there are no labels.
        seed: of sample and perturbations.
    """
    among = np.flatnonzero(answers.judged) if answers.judged.any() else np.arange(len(collection))
    chosen = np.sort(np.random.default_rng(seed).permutation(among)[:count])
    images = model.loader(collection.dataset, batch_size=batch_size).images_at(chosen.tolist())
    # Partners of mixed images are to be of another class; of images without a label, what the model says counts.
    given, answered = answers.labels[chosen], answers.predicted[chosen]
    classes = torch.from_numpy(np.where(given < 0, answered, given))

    def scores(version: torch.Tensor) -> torch.Tensor:
        parts = zip(
            version.split(batch_size), np.split(chosen, range(batch_size, len(chosen), batch_size)), strict=True
        )
        return torch.cat([answers.score(part, positions) for part, positions in parts])

    clean = scores(images)
    found: list[Shift] = []
    for kind, share, draw in _draws(classes, seed):
        if share == 0:
            found.append(_shift(kind, 0.0, images, clean, None))
        else:
            spoilt = apply_perturbations(images, classes, draw).images
            found.append(_shift(kind, KINDS[kind][2](share), spoilt, scores(spoilt), clean))
    return found


def _draws(classes: torch.Tensor, seed: int) -> Iterator[tuple[str, float, PerturbParams]]:
    """Kind, share of its range, and the change of every image; places and partners are the same at all strengths."""
    generator = torch.Generator().manual_seed(seed)
    partner, place = partners(classes, generator), torch.rand(len(classes), 2, generator=generator)
    for kind in KINDS:
        mixed = 0.5 if kind in ("mixup", "cutmix") else 1.0
        for share in (0.0, *STRENGTHS):
            yield (
                kind,
                share,
                PerturbParams(
                    kind=torch.zeros(len(classes), dtype=torch.int64),
                    kinds=(kind,),
                    strength=torch.full((len(classes),), mixed * share),
                    partner=partner,
                    place=place,
                    noise_seed=seed,
                ),
            )


def _shift(kind: str, strength: float, images: torch.Tensor, scores: torch.Tensor, clean: torch.Tensor | None) -> Shift:
    return Shift(
        kind=kind,
        strength=strength,
        mean_uncertainty=scores.mean().item(),
        auroc=float("nan") if clean is None else auroc(scores, clean),
        images=len(scores),
        example=images[0].permute(1, 2, 0).numpy(),
    )
