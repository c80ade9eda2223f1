"""Colour operations on a batch: from bytes to what the model takes.

The ImageNet recipe runs them in this order: uint8 images, geometry, ``apply_color_jitter``, ``apply_lighting``,
``normalise``. All three take uint8 or floating point in [0, 255] and return float32. They leave their input alone
unless ``inplace=True``, which is for the second and third link of the chain: on a CPU a new tensor costs more than the
arithmetic that fills it. Shapes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION = range(3)
"""Columns of ``ColorJitterParams.factors`` and values of ``ColorJitterParams.order``."""

GREY_WEIGHTS = (0.2989, 0.587, 0.114)
"""Red, green and blue in luma (ITU-R BT.601), rounded as torchvision rounds them so that results agree with it."""

CACHED_ELEMENTS = 2**17
"""Elements of float32 that a processor's second cache holds with room to spare: half a MiB."""

LIGHTING_EIGENVALUES = (0.2175, 0.0188, 0.0045)
"""Of the colours of ImageNet's pixels in [0, 1]; Krizhevsky et al. 2012, with the figures of fb.resnet.torch."""

LIGHTING_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
"""Rows are red, green, blue; columns are the eigenvectors of ``LIGHTING_EIGENVALUES``. Same source."""

_ORDERS = torch.tensor(list(itertools.permutations(range(3))))


class ColorJitterParams(NamedTuple):
    """One draw of colour jitter for each image.

    Attributes:
        factors: (B, 3) float32, >= 0: of brightness, contrast and saturation; 1 changes nothing.
        order: (B, 3) int64, each row a permutation of ``BRIGHTNESS``, ``CONTRAST``, ``SATURATION``: the operation that
            comes first, second and third.
    """

    factors: Tensor
    order: Tensor


def sample_color_jitter(
    batch_size: int,
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    generator: torch.Generator,
) -> ColorJitterParams:
    """Draw colour jitter, for each image on its own: factors uniform in [max(0, 1 - x), 1 + x], any order of the three
    operations equally likely.

    Args:
        batch_size: B, any number >= 1.
        brightness, contrast, saturation: the x of each factor, >= 0; 0.4 in the ImageNet recipe of fb.resnet.torch,
            which CutMix follows.
        generator: a CPU generator.

    Raises:
        ValueError: a strength is negative, infinite or not a number.
    """
    factors = torch.empty(3, batch_size)
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    for column, (name, strength) in zip(factors, strengths.items(), strict=True):
        if not 0 <= strength < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {strength}")
        column.uniform_(max(0.0, 1 - strength), 1 + strength, generator=generator)
    order = _ORDERS[torch.randint(len(_ORDERS), (batch_size,), generator=generator)]
    return ColorJitterParams(factors.T.contiguous(), order)


def apply_color_jitter(images: Tensor, params: ColorJitterParams, *, inplace: bool = False) -> Tensor:
    """Brightness, contrast and saturation of each image, in the image's own order.

    Each operation blends the image with a duller one, ``factor * image + (1 - factor) * duller``, and clips to
    [0, 255]. Duller is black for brightness, the mean of the grey image for contrast, the grey image for saturation.

    Args:
        images: (B, 3, H, W) RGB, uint8 or floating point in [0, 255].
        params: from ``sample_color_jitter``.
        inplace: write into ``images``, which must then be float32.

    Returns:
        (B, 3, H, W) float32 in [0, 255]. Besides it, one channel of the batch is needed while it runs.

    Raises:
        ValueError: the images are not RGB, or the parameters are for another batch size.
        TypeError: ``inplace`` with images that are not float32.
    """
    _check_rgb(images, len(params.factors))
    adjusted = _float32(images, inplace)
    order = params.order.to(images.device, non_blocking=True)
    factors = params.factors.to(images.device, non_blocking=True).gather(1, order)  # now in the order of application
    red, green, blue = GREY_WEIGHTS
    grey = torch.empty_like(adjusted[:, :1])  # (B, 1, H, W)
    for position in range(3):
        operation = order[:, position].view(-1, 1, 1, 1)
        factor = factors[:, position].view(-1, 1, 1, 1)
        # Not a matrix product: autocast and TF32 would round the colours.
        grey.copy_(adjusted[:, :1]).mul_(red).add_(adjusted[:, 1:2], alpha=green).add_(adjusted[:, 2:], alpha=blue)
        mean = grey.mean(dim=(2, 3), keepdim=True)
        # The three operations differ in this one channel alone, so all images go through the same arithmetic.
        duller = grey.mul_(operation == SATURATION).add_(mean * (operation == CONTRAST))
        adjusted.lerp_(duller, 1 - factor).clamp_(0, 255)
    return adjusted


def sample_lighting(batch_size: int, *, std: float = 0.1, generator: torch.Generator) -> Tensor:
    """Draw PCA lighting (Krizhevsky et al. 2012): how far each image goes along the eigenvectors of ImageNet's colours.

    Args:
        batch_size: B, any number >= 1.
        std: of the normal distribution with mean 0, in eigenvalues; 0.1 in the paper.
        generator: a CPU generator.

    Returns:
        (B, 3) float32.

    Raises:
        ValueError: ``std`` is negative, infinite or not a number.
    """
    if not 0 <= std < math.inf:
        raise ValueError(f"std must be finite and not negative, got {std}")
    return std * torch.randn(batch_size, 3, generator=generator)


def apply_lighting(images: Tensor, weights: Tensor, *, inplace: bool = False) -> Tensor:
    """Add one colour to all pixels of an image: the sum of ``weight * eigenvalue * eigenvector``, times 255.

    Args:
        images: (B, 3, H, W) RGB, uint8 or floating point in [0, 255].
        weights: (B, 3) from ``sample_lighting``.
        inplace: write into ``images``, which must then be float32.

    Returns:
        (B, 3, H, W) float32. Not clipped, as in the recipe: it may leave [0, 255] by a few units.

    Raises:
        ValueError: the images are not RGB, or the weights are for another batch size.
        TypeError: ``inplace`` with images that are not float32.
    """
    _check_rgb(images, len(weights))
    steps = weights * torch.tensor(LIGHTING_EIGENVALUES, device=weights.device)
    eigenvectors = torch.tensor(LIGHTING_EIGENVECTORS, device=weights.device)
    shift = 255 * (steps.view(-1, 1, 3) * eigenvectors).sum(2)  # (B, 3), a value for red, green and blue
    return _float32(images, inplace).add_(shift.to(images.device, non_blocking=True).view(-1, 3, 1, 1))


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float], *, inplace: bool = False) -> Tensor:
    """``(images / 255 - mean) / std``, on the images' device.

    Args:
        images: (B, C, H, W) uint8, or floating point in [0, 255].
        mean, std: C values each, of images scaled to [0, 1].
        inplace: write into ``images``, which must then be float32.

    Returns:
        (B, C, H, W) float32.

    Raises:
        ValueError: ``mean`` or ``std`` does not have C values.
        TypeError: ``inplace`` with images that are not float32.
    """
    shift, scale = 255 * _per_channel(mean, images), 255 * _per_channel(std, images)
    if inplace or images.device.type != "cpu":
        return _float32(images, inplace).sub_(shift).div_(scale)
    result = torch.empty_like(images, dtype=torch.float32)
    # Some images at a time, so that the three passes find them in the processor's cache.
    few = max(CACHED_ELEMENTS * len(images) // max(images.numel(), 1), 1)
    for first in range(0, len(images), few):
        result[first : first + few].copy_(images[first : first + few]).sub_(shift).div_(scale)
    return result


def denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of ``normalise``, rounded: (B, C, H, W) floating point -> uint8.

    Raises:
        ValueError: ``mean`` or ``std`` does not have C values.
    """
    shift, scale = _per_channel(mean, images), _per_channel(std, images)
    return ((images.float() * scale + shift) * 255).round().clamp(0, 255).to(torch.uint8)


def _float32(images: Tensor, inplace: bool) -> Tensor:
    """The images in float32: a copy that may be written to, or the images themselves where the caller allows that."""
    if not inplace:
        return images.to(torch.float32, copy=True)
    if images.dtype != torch.float32:
        raise TypeError(f"inplace needs float32 images, got {images.dtype}")
    return images


def _per_channel(values: Sequence[float], images: Tensor) -> Tensor:
    # Broadcasting would take one value for three channels, and make three channels of one.
    if len(values) != images.shape[1]:
        raise ValueError(f"expected a value for each of {images.shape[1]} channels, got {len(values)}")
    return torch.tensor(values, dtype=torch.float32).to(images.device, non_blocking=True).view(1, -1, 1, 1)


def _check_rgb(images: Tensor, batch_size: int) -> None:
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"expected RGB images (B, 3, H, W), got {tuple(images.shape)}")
    if batch_size != len(images):
        raise ValueError(f"expected parameters drawn for a batch of {len(images)}, got {batch_size}")
