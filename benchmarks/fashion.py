"""Fashion-MNIST as studies need it: the first training images, perhaps with wrong labels planted among them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np

from idml.data.datasets import read_idx

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""


def write_idx(path: Path, values: np.ndarray) -> None:
    """uint8 values as the data set's own reader takes them."""
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(head + values.tobytes())


def images_and_labels(part: str, *, embedded: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(N, 28, 28) and (N,) uint8 of ``train`` or ``test``: all of Debian's package, or the few inside ours."""
    if embedded:
        with (
            resources.files("idml.data.embedded").joinpath("fashion_mnist_mini.npz").open("rb") as file,
            np.load(file, allow_pickle=False) as arrays,
        ):
            return arrays[f"{part}_images"], arrays[f"{part}_labels"].astype(np.uint8)
    stem = {"train": "train", "test": "t10k"}[part]
    images, labels = (read_idx(FASHION_MNIST / f"{stem}-{kind}.gz") for kind in _KINDS)
    return images, labels


def subset_of_fashion_mnist(
    folder: Path, count: int, *, wrong: float = 0.0, seed: int = 0, embedded: bool = False
) -> np.ndarray:
    """The first training images and all test images, as IDX files.

    Args:
        folder: to write to.
        count: training images.
        wrong: share of their labels that is changed to another class; both drawn at random.
        seed: of the draw.
        embedded: take both from the 6,000 images inside the package idml.

    Returns:
        (count,) bool, whose labels were changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = (values[:count] for values in images_and_labels("train", embedded=embedded))
    generator = np.random.default_rng(seed)
    planted = np.zeros(count, bool)
    planted[generator.choice(count, round(wrong * count), replace=False)] = True
    given = np.where(planted, (labels + generator.integers(1, 10, count)) % 10, labels).astype(np.uint8)
    test = images_and_labels("test", embedded=embedded)
    for part, values in (("train", (images, given)), ("t10k", test)):
        for kind, value in zip(_KINDS, values, strict=True):
            write_idx(folder / f"{part}-{kind}", value)
    return planted


_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")
