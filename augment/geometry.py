"""Flip and padded crop of a batch, with a draw of its own for every image. Shapes: B images, C, H, W."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def sample_flip(batch_size: int, *, prob: float = 0.5, generator: torch.Generator) -> Tensor:
    """(B,) bool: which images are mirrored, each with probability ``prob``; drawn from a CPU generator."""
    return torch.rand(batch_size, generator=generator) < prob


def apply_flip(images: Tensor, flip: Tensor) -> Tensor:
    """Mirror the chosen images left to right.

    Args:
        images: (B, C, H, W), any dtype.
        flip: (B,) bool.

    Returns:
        (B, C, H, W), same dtype.
    """
    return torch.where(flip.to(images.device, non_blocking=True).view(-1, 1, 1, 1), images.flip(3), images)


def sample_crop(batch_size: int, *, padding: int, generator: torch.Generator) -> Tensor:
    """(B, 2) int64: (top, left) of each image's window in the padded image, uniform in [0, 2 * padding]."""
    return torch.randint(2 * padding + 1, (batch_size, 2), generator=generator)


def apply_crop(images: Tensor, offsets: Tensor, *, padding: int) -> Tensor:
    """Pad every side with zeros and cut a window of the original size out of each image.

    Args:
        images: (B, C, H, W), any dtype; zeros are what is padded, so apply it before normalisation for black borders.
        offsets: (B, 2) int64 from ``sample_crop``.
        padding: pixels added on each side.

    Returns:
        (B, C, H, W), same dtype.
    """
    batch, channels, height, width = images.shape
    padded = functional.pad(images, (padding, padding, padding, padding))
    offsets = offsets.to(images.device, non_blocking=True)
    rows = (offsets[:, :1] + torch.arange(height, device=images.device)).view(batch, 1, height, 1)
    columns = (offsets[:, 1:] + torch.arange(width, device=images.device)).view(batch, 1, 1, width)
    return padded[
        torch.arange(batch, device=images.device).view(-1, 1, 1, 1),
        torch.arange(channels, device=images.device).view(1, -1, 1, 1),
        rows,
        columns,
    ]
