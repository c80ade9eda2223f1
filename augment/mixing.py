"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of a batch, on its device.

Images are paired by a random permutation of the batch, never by rolling or flipping it: neighbours in a class-balanced
batch are of one class. Shapes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


class MixedBatch(NamedTuple):
    """A batch after mixing, as one value.

    Attributes:
        images: (B, C, H, W).
        labels_a: (B,) labels of the images themselves.
        labels_b: (B,) labels of their partners; equal to ``labels_a`` in a batch that was not mixed.
        lam: weight of ``labels_a`` in [0, 1], a 0-d float32 tensor on the images' device; 1 in a batch not mixed.
    """

    images: Tensor
    labels_a: Tensor
    labels_b: Tensor
    lam: Tensor


class MixupParams(NamedTuple):
    """One draw of Mixup: the partner of each image, (B,) int64, and the weight ``lam`` of the image itself."""

    permutation: Tensor
    lam: float


class CutmixParams(NamedTuple):
    """One draw of CutMix.

    Attributes:
        permutation: (B,) int64, the partner of each image.
        box: (top, left, bottom, right) in pixels, bottom and right exclusive: the part taken from the partner.
        lam: exact share of pixels kept, ``1 - box area / (H * W)``.
    """

    permutation: Tensor
    box: tuple[int, int, int, int]
    lam: float


def _sample_lam(alpha: float, prob: float, generator: torch.Generator) -> float | None:
    """lam ~ Beta(alpha, alpha) with probability ``prob``, else None. Always takes two draws from the generator."""
    if not 0 < alpha < math.inf:
        raise ValueError(f"the Beta parameter must be positive and finite, got {alpha}")
    if not 0 <= prob <= 1:
        raise ValueError(f"prob must be in [0, 1], got {prob}")
    mix = torch.rand((), generator=generator).item() < prob
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    # torch.distributions takes no generator, NumPy's Beta does.
    return float(np.random.default_rng(seed).beta(alpha, alpha)) if mix else None


def sample_mixup(
    batch_size: int, *, alpha: float = 1.0, prob: float = 1.0, generator: torch.Generator
) -> MixupParams | None:
    """Draw Mixup for one batch.

    Args:
        batch_size: B, any number >= 1.
        alpha: lam ~ Beta(alpha, alpha); 1 (uniform) in the released recipes.
        prob: probability in [0, 1] that the batch is mixed at all.
        generator: a CPU generator.

    Returns:
        MixupParams, or None where the batch stays as it is.

    Raises:
        ValueError: alpha <= 0 or infinite, or prob outside [0, 1].
    """
    lam = _sample_lam(alpha, prob, generator)
    if lam is None:
        return None
    return MixupParams(torch.randperm(batch_size, generator=generator), lam)


def sample_cutmix(
    batch_size: int,
    image_size: tuple[int, int],
    *,
    alpha: float = 1.0,
    prob: float = 1.0,
    generator: torch.Generator,
) -> CutmixParams | None:
    """Draw CutMix for one batch: a box with sides H sqrt(1 - lam) and W sqrt(1 - lam), its centre uniform over the
    image, clipped at the border; lam then becomes the exact share of pixels kept.

    Args:
        batch_size: B, any number >= 1.
        image_size: (H, W) in pixels.
        alpha: lam ~ Beta(alpha, alpha); 1 (uniform) in the published recipe, where it is called beta.
        prob: probability in [0, 1] that the batch is mixed at all (published: 0.5 on CIFAR, 1.0 on ImageNet).
        generator: a CPU generator.

    Returns:
        CutmixParams, or None where the batch stays as it is.

    Raises:
        ValueError: alpha <= 0 or infinite, or prob outside [0, 1].
    """
    lam = _sample_lam(alpha, prob, generator)
    if lam is None:
        return None
    permutation = torch.randperm(batch_size, generator=generator)
    height, width = image_size
    box_height, box_width = int(height * math.sqrt(1 - lam)), int(width * math.sqrt(1 - lam))
    centre_y = int(torch.randint(height, (), generator=generator))
    centre_x = int(torch.randint(width, (), generator=generator))
    top, bottom = max(centre_y - box_height // 2, 0), min(centre_y + box_height // 2, height)
    left, right = max(centre_x - box_width // 2, 0), min(centre_x + box_width // 2, width)
    return CutmixParams(permutation, (top, left, bottom, right), 1 - (bottom - top) * (right - left) / (height * width))


def _unmixed(images: Tensor, labels: Tensor) -> MixedBatch:
    labels = labels.to(images.device)
    return MixedBatch(images, labels, labels, _lam_tensor(1.0, images))


def apply_mixup(images: Tensor, labels: Tensor, params: MixupParams | None) -> MixedBatch:
    """``lam * images + (1 - lam) * partners``.

    Args:
        images: (B, C, H, W), floating point.
        labels: (B,) int64.
        params: from ``sample_mixup``; None leaves the batch as it is.

    Returns:
        MixedBatch on the device of ``images``; where nothing is mixed it holds ``images`` itself.

    Raises:
        ValueError: the permutation is for another batch size.
        TypeError: the images are integers, which have no room for an average.
    """
    if params is None:
        return _unmixed(images, labels)
    if not images.is_floating_point():
        raise TypeError(f"Mixup needs floating-point images, got {images.dtype}; normalise them first")
    permutation = _permutation_for(images, params.permutation)
    labels = labels.to(images.device)
    mixed = images[permutation].lerp_(images, params.lam)
    return MixedBatch(mixed, labels, labels[permutation], _lam_tensor(params.lam, images))


def apply_cutmix(images: Tensor, labels: Tensor, params: CutmixParams | None) -> MixedBatch:
    """The images with one box each replaced by the same box of their partners; the input is left untouched.

    Args:
        images: (B, C, H, W), any dtype.
        labels: (B,) int64.
        params: from ``sample_cutmix``; None leaves the batch as it is.

    Returns:
        MixedBatch on the device of ``images``; where nothing is mixed it holds ``images`` itself.

    Raises:
        ValueError: the permutation is for another batch size, or the box leaves the images.
    """
    if params is None:
        return _unmixed(images, labels)
    permutation = _permutation_for(images, params.permutation)
    labels = labels.to(images.device)
    top, left, bottom, right = params.box
    height, width = images.shape[2:]
    # Slices would clip such a box in silence, and lam would no longer be the share of pixels kept.
    if not (0 <= top <= bottom <= height and 0 <= left <= right <= width):
        raise ValueError(
            f"expected a box (top, left, bottom, right) inside images of {height} x {width}, got {params.box}"
        )
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[permutation, :, top:bottom, left:right]
    return MixedBatch(mixed, labels, labels[permutation], _lam_tensor(params.lam, images))


def _lam_tensor(lam: float, images: Tensor) -> Tensor:
    return torch.full((), lam, dtype=torch.float32, device=images.device)  # a copy from the CPU would make a GPU wait


def _permutation_for(images: Tensor, permutation: Tensor) -> Tensor:
    if len(permutation) != len(images):
        raise ValueError(f"expected parameters drawn for a batch of {len(images)}, got {len(permutation)}")
    return permutation.to(images.device, non_blocking=True)


def mixed_cross_entropy(logits: Tensor, batch: MixedBatch, *, label_smoothing: float = 0.0) -> Tensor:
    """``lam * CE(logits, labels_a) + (1 - lam) * CE(logits, labels_b)``, averaged over the batch.

    Args:
        logits: (B, C).
        batch: the batch that the logits belong to.
        label_smoothing: in [0, 1).

    Returns:
        0-d loss, dtype of ``logits``. Where nothing was mixed it is the plain cross-entropy, exactly.
    """
    loss_a = functional.cross_entropy(logits, batch.labels_a, label_smoothing=label_smoothing)
    if batch.labels_b is batch.labels_a:
        return loss_a
    loss_b = functional.cross_entropy(logits, batch.labels_b, label_smoothing=label_smoothing)
    # lam is float32 and would raise the dtype of the sum.
    return (batch.lam * loss_a + (1 - batch.lam) * loss_b).to(loss_a.dtype)
