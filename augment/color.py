"""Colour operations on a batch: from bytes to what the model takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(images / 255 - mean) / std``, on the images' device.

    Args:
        images: (B, C, H, W) uint8, or floating point in [0, 255].
        mean, std: C values each, of images scaled to [0, 1].

    Returns:
        (B, C, H, W) float32.
    """
    scale = 255 * torch.tensor(std, device=images.device).view(1, -1, 1, 1)
    shift = 255 * torch.tensor(mean, device=images.device).view(1, -1, 1, 1)
    return (images.float() - shift) / scale


def denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of ``normalise``, rounded: (B, C, H, W) floating point -> uint8."""
    scale = torch.tensor(std, device=images.device).view(1, -1, 1, 1)
    shift = torch.tensor(mean, device=images.device).view(1, -1, 1, 1)
    return ((images.float() * scale + shift) * 255).round().clamp(0, 255).to(torch.uint8)
