"""Images that a classifier of clothes has never been shown: other data, and its own altered. All (N, 28, 28) uint8."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from fashion import FASHION_MNIST, images_and_labels
from torch.nn import functional

from augment import shift_images
from idml.data.emoji import load_embedded

COUNT = 2_000
"""Images of each set, at most."""


def clothes() -> tuple[np.ndarray, np.ndarray]:
    """(N, 28, 28) test images of Fashion-MNIST, and their labels: 10,000, or, without Debian's package, 1,000."""
    return images_and_labels("test", embedded=not FASHION_MNIST.is_dir())


def digits() -> np.ndarray:
    """scikit-learn's digits, 8 x 8, enlarged."""
    from sklearn.datasets import load_digits

    return _resized(np.uint8(load_digits().images * 255 / 16))


def emoji() -> np.ndarray:
    """Drawings in grey, white on black as clothes are."""
    images = load_embedded().images[:COUNT]
    return 255 - _resized(images.mean(3).astype(np.uint8))


def noise() -> np.ndarray:
    """Every pixel by itself."""
    return np.random.default_rng(0).integers(0, 256, (COUNT, 28, 28)).astype(np.uint8)


def flat() -> np.ndarray:
    """One grey each."""
    levels = np.random.default_rng(1).integers(0, 256, (COUNT, 1, 1))
    return np.broadcast_to(levels, (COUNT, 28, 28)).astype(np.uint8)


def turned() -> np.ndarray:
    """Clothes turned by 90 degrees."""
    return np.ascontiguousarray(np.rot90(clothes()[0][:COUNT], axes=(1, 2)))


def inverted() -> np.ndarray:
    """Clothes, black on white."""
    return 255 - clothes()[0][:COUNT]


def altered(kind: str) -> np.ndarray:
    """Clothes blurred, noisy or cropped, as ``augment.shift_images`` does it."""
    images, labels = (torch.from_numpy(values[:COUNT].copy()) for values in clothes())
    grey = images[:, None].expand(-1, 3, -1, -1).contiguous()
    return shift_images(grey, labels, kind, torch.Generator().manual_seed(2))[:, 0].numpy()


def _resized(images: np.ndarray) -> np.ndarray:
    values = torch.from_numpy(images)[:, None].float()
    small = functional.interpolate(values, (28, 28), mode="bilinear", antialias=True, align_corners=False)
    return small[:, 0].round().clamp(0, 255).to(torch.uint8).numpy()


SETS: dict[str, Callable[[], np.ndarray]] = {
    "digits": digits,
    "emoji": emoji,
    "noise": noise,
    "flat": flat,
    "turned": turned,
    "inverted": inverted,
    "blurred": lambda: altered("blur"),
    "noisy": lambda: altered("noise"),
    "cropped": lambda: altered("crop"),
}
"""Name -> images. The first four are far away from clothes, the others are clothes that were altered."""

FAR = ("digits", "emoji", "noise", "flat")
