"""Augmentations of a batch tensor on its own device.

Every operation comes in two halves: ``sample_*`` draws parameters from an explicit generator on the CPU, so that the
draws are the same on every device, and ``apply_*`` is a pure function of the batch and those parameters.
"""

from augment.color import (
    ColorJitterParams,
    apply_color_jitter,
    apply_lighting,
    denormalise,
    normalise,
    sample_color_jitter,
    sample_lighting,
)
from augment.geometry import apply_crop, apply_flip, resize, sample_crop, sample_flip
from augment.mixing import (
    CutmixParams,
    MixedBatch,
    MixupParams,
    apply_cutmix,
    apply_mixup,
    mixed_cross_entropy,
    sample_cutmix,
    sample_mixup,
)
from augment.perturb import CLEAN_SHARE, PerturbedBatch, PerturbParams, apply_perturbations, sample_perturbations
from augment.shifts import SHIFTS, partners, shift_images

__all__ = [
    "CLEAN_SHARE",
    "SHIFTS",
    "ColorJitterParams",
    "CutmixParams",
    "MixedBatch",
    "MixupParams",
    "PerturbParams",
    "PerturbedBatch",
    "apply_color_jitter",
    "apply_crop",
    "apply_cutmix",
    "apply_flip",
    "apply_lighting",
    "apply_mixup",
    "apply_perturbations",
    "denormalise",
    "mixed_cross_entropy",
    "normalise",
    "partners",
    "resize",
    "sample_color_jitter",
    "sample_crop",
    "sample_cutmix",
    "sample_flip",
    "sample_lighting",
    "sample_mixup",
    "sample_perturbations",
    "shift_images",
]
