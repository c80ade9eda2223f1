"""Cut fashion_mnist_mini.npz out of the full Fashion-MNIST.

    python -m idml.data.embedded.fashion_mnist_mini [--data-dir DIR]

Takes the first 500 training and the first 100 test images of each of the ten classes, in the order of the files, and
prints the mean and standard deviation of all 60,000 training images in [0, 1].
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from idml.data.datasets import DEBIAN_FASHION_MNIST, read_idx

TRAIN_PER_CLASS, TEST_PER_CLASS = 500, 100


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of the first ``count`` items of every class, in file order."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=DEBIAN_FASHION_MNIST)
    folder = parser.parse_args().data_dir
    arrays = {}
    for split, part, count in (("train", "train", TRAIN_PER_CLASS), ("test", "t10k", TEST_PER_CLASS)):
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
        if split == "train":
            print(f"training images: mean {images.mean() / 255:.4f}, std {images.std() / 255:.4f}")
        chosen = first_of_each_class(labels, count)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[chosen], labels[chosen]
    path = Path(__file__).with_name("fashion_mnist_mini.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, { ({k: v.shape for k, v in arrays.items()}) }")


if __name__ == "__main__":
    main()
