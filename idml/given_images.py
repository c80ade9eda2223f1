"""Images as programs have them, PIL's, arrays or tensors, brought to one kind.

Letters in shapes: N images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from idml.data.pixels import as_rgb
from idml.errors import UserError

Images: TypeAlias = "Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor]"
"""One image or many. Arrays are (H, W), (H, W, 1 or 3) or (N, H, W, 1 or 3); tensors (1 or 3, H, W) or (N, 1 or 3, H,
W). Integers are 0 to 255, floating numbers 0 to 1."""


def as_pil(images: Images) -> list[Image.Image]:
    """Every image as RGB; UserError as for ``TrainedModel.prepare``."""
    if isinstance(images, Image.Image):
        try:
            return [as_rgb(images)]
        except (OSError, ValueError) as error:  # it may not be decoded yet
            raise UserError(f"the image {getattr(images, 'filename', '')} cannot be read: {error}") from None
    if isinstance(images, np.ndarray):
        return _from_pixels(images, "an array", (2, 3, 4))
    if isinstance(images, Tensor):
        if images.ndim not in (3, 4):
            raise UserError(f"expected a tensor (3, H, W) or (N, 3, H, W), got shape {tuple(images.shape)}")
        pixels = images.detach().cpu().movedim(-3, -1)
        # NumPy has no bfloat16.
        return _from_pixels((pixels.float() if pixels.is_floating_point() else pixels).numpy(), "a tensor", (3, 4))
    if isinstance(images, Iterable) and not isinstance(images, (str, bytes)):
        found = [image for each in images for image in as_pil(each)]
        if found:
            return found
        raise UserError("expected at least one image, got none")
    raise UserError(
        f"expected images as PIL images, arrays or tensors, or a sequence of them, got {type(images).__name__} "
        "(open files with PIL.Image.open)"
    )


def _from_pixels(pixels: np.ndarray, what: str, dimensions: tuple[int, ...]) -> list[Image.Image]:
    """RGB images of (H, W), (H, W, c) or (N, H, W, c) numbers."""
    channels = 1 if pixels.ndim == 2 else pixels.shape[-1] if pixels.ndim else 0
    if pixels.ndim not in dimensions or channels not in (1, 3) or pixels.size == 0:
        raise UserError(f"expected {what} of images with 1 or 3 channels, got one of shape {pixels.shape}")
    if pixels.dtype.kind not in "uif":
        raise UserError(f"expected {what} of integers from 0 to 255, or floats from 0 to 1, got {pixels.dtype}")
    low, high = float(pixels.min()), float(pixels.max())
    top = 1.0 if np.issubdtype(pixels.dtype, np.floating) else 255.0
    if not (low >= 0 and high <= top):  # NaN too
        raise UserError(
            f"expected numbers of {what} of {pixels.dtype} between 0 and {top:.0f}, got {low:g} to {high:g}; give "
            "images as they are, the model normalises them itself"
        )
    if top == 1.0:
        pixels = np.round(pixels * 255.0)
    batch = pixels.astype(np.uint8)
    batch = batch[None, ..., None] if batch.ndim == 2 else batch[None] if batch.ndim == 3 else batch
    return [Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)).copy()) for image in batch]
