"""Fashion-MNIST as studies need it: the first training images, perhaps with wrong labels planted among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from idml.data.datasets import read_idx

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""


def write_idx(path: Path, values: np.ndarray) -> None:
    """uint8 values as the data set's own reader takes them."""
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(head + values.tobytes())


def subset_of_fashion_mnist(folder: Path, count: int, *, wrong: float = 0.0, seed: int = 0) -> np.ndarray:
    """The first training images and all test images, as IDX files.

    Args:
        folder: to write to.
        count: training images.
        wrong: share of their labels that is changed to another class; both drawn at random.
        seed: of the draw.

    Returns:
        (count,) bool, whose labels were changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = (read_idx(FASHION_MNIST / f"train-{kind}.gz")[:count] for kind in _KINDS)
    generator = np.random.default_rng(seed)
    planted = np.zeros(count, bool)
    planted[generator.choice(count, round(wrong * count), replace=False)] = True
    given = np.where(planted, (labels + generator.integers(1, 10, count)) % 10, labels).astype(np.uint8)
    test = [read_idx(FASHION_MNIST / f"t10k-{kind}.gz") for kind in _KINDS]
    for part, values in (("train", (images, given)), ("t10k", test)):
        for kind, value in zip(_KINDS, values, strict=True):
            write_idx(folder / f"{part}-{kind}", value)
    return planted


_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")
