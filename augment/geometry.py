"""Flip and padded crop of a batch, with a draw of its own for every image. Shapes: B images, C, H, W."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def sample_flip(batch_size: int, *, prob: float = 0.5, generator: torch.Generator) -> Tensor:
    """(B,) bool: which images are mirrored, each with probability ``prob``; drawn from a CPU generator.

    Raises:
        ValueError: prob outside [0, 1].
    """
    if not 0 <= prob <= 1:
        raise ValueError(f"prob must be in [0, 1], got {prob}")
    return torch.rand(batch_size, generator=generator) < prob


def apply_flip(images: Tensor, flip: Tensor) -> Tensor:
    """Mirror the chosen images left to right.

    Args:
        images: (B, C, H, W), any dtype.
        flip: (B,) bool.

    Returns:
        (B, C, H, W), same dtype.

    Raises:
        ValueError: ``flip`` is for another batch size.
    """
    _check_batch_size(images, flip)
    if _copied_one_by_one(images):
        mirrored = torch.empty_like(images, memory_format=torch.contiguous_format)
        source, target = images.numpy(), mirrored.numpy()
        for number, mirror in enumerate(flip.tolist()):
            target[number] = source[number, :, :, ::-1] if mirror else source[number]
        return mirrored
    return torch.where(flip.to(images.device, non_blocking=True).view(-1, 1, 1, 1), images.flip(3), images)


def sample_crop(batch_size: int, *, padding: int, generator: torch.Generator) -> Tensor:
    """(B, 2) int64: (top, left) of each image's window in the padded image, uniform in [0, 2 * padding].

    Raises:
        ValueError: padding < 0.
    """
    _check_padding(padding)
    return torch.randint(2 * padding + 1, (batch_size, 2), generator=generator)


def apply_crop(images: Tensor, offsets: Tensor, *, padding: int, fill: float = 0, flip: Tensor | None = None) -> Tensor:
    """Pad every side and cut a window of the original size out of each image, mirrored where asked for.

    Args:
        images: (B, C, H, W), any dtype; before normalisation, for black borders.
        offsets: (B, 2) int64 from ``sample_crop``.
        padding: pixels added on each side.
        fill: their value; 255 for drawings on white.
        flip: (B,) bool from ``sample_flip``; like ``apply_flip`` afterwards, in less time.

    Returns:
        (B, C, H, W), same dtype. A backward pass through it takes (2 * padding + 1)^2 times the memory of the images.

    Raises:
        ValueError: padding < 0, or the offsets are for another batch size or for more padding, or so is ``flip``.
    """
    _check_padding(padding)
    _check_batch_size(images, offsets)
    if flip is not None:
        _check_batch_size(images, flip)
    # A window that leaves the padded image is an assertion on a GPU, which takes the whole process down.
    if len(offsets) and not 0 <= int(offsets.min()) <= int(offsets.max()) <= 2 * padding:
        raise ValueError(f"expected offsets in [0, {2 * padding}], got {int(offsets.min())} to {int(offsets.max())}")
    height, width = images.shape[2:]
    padded = functional.pad(images, (padding, padding, padding, padding), value=fill)
    if _copied_one_by_one(images):
        cut = torch.empty_like(images, memory_format=torch.contiguous_format)
        source, target = padded.numpy(), cut.numpy()
        mirrored = [False] * len(images) if flip is None else flip.tolist()
        for number, ((top, left), mirror) in enumerate(zip(offsets.tolist(), mirrored, strict=True)):
            window = source[number, :, top : top + height, left : left + width]
            target[number] = window[:, :, ::-1] if mirror else window
        return cut
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view (B, C, 2 padding + 1, 2 padding + 1, H, W)
    tops, lefts = offsets.to(images.device, non_blocking=True).unbind(1)
    cut = windows[torch.arange(len(images), device=images.device), :, tops, lefts]
    return cut if flip is None else apply_flip(cut, flip)


def resize(images: Tensor, size: int) -> Tensor:
    """Square images brought to ``size`` pixels a side, bilinear with antialias, for progressive training.

    Args:
        images: (B, C, S, S) uint8.
        size: in pixels, at least 1.

    Returns:
        (B, C, size, size) uint8; ``images`` themselves when they have that size.
    """
    if images.shape[2:] == (size, size):
        return images
    # In float32, because torch interpolates bytes on the CPU only.
    resized = functional.interpolate(
        images.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return resized.round().clamp(0, 255).to(torch.uint8)


def _copied_one_by_one(images: Tensor) -> bool:
    """Whether numpy's plain copies, image by image, take a third of the time of one operation on the batch.

    They do for bytes on a CPU, which is what training crops and flips there; on a GPU each would be a kernel.
    """
    return images.device.type == "cpu" and images.dtype == torch.uint8


def _check_padding(padding: int) -> None:
    if padding < 0:
        raise ValueError(f"padding must not be negative, got {padding}")


def _check_batch_size(images: Tensor, parameters: Tensor) -> None:
    if len(parameters) != len(images):
        raise ValueError(f"expected parameters drawn for a batch of {len(images)}, got {len(parameters)}")
