"""What every reader gives: images (in memory or as paths), integer labels, class names."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch.nn import functional

from idml.data.pixels import check_pixels as check_pixels
from idml.data.pixels import read_rgb as read_rgb  # its place from before it had a module

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Per-channel statistics of ImageNet in [0, 1], as timm and torchvision use them."""

CROP_SHARE = 224 / 256
"""Side of the central crop at evaluation, as a share of the shorter side that it is cut from (He et al. 2016)."""

Fit = Literal["crop", "whole"]
Interpolation = Literal["bilinear", "bicubic"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageDataset:
    """N labelled images, held as one array or as paths.

    Attributes:
        labels: (N,) int64 in [0, len(classes)).
        classes: class names; position is label.
        images: (N, H, W, C) uint8 with C 1 or 3, or None when ``paths`` is given.
        paths: N image files, or None when ``images`` is given.
        origin: for a subset, the data set that it was taken from and the (N,) int64 positions there.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    images: np.ndarray | None = None
    paths: tuple[Path, ...] | None = None
    origin: tuple[ImageDataset, np.ndarray] | None = None

    def __post_init__(self) -> None:
        assert (self.images is None) != (self.paths is None)
        assert len(self.labels) == len(self.images if self.images is not None else self.paths or ())

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> ImageDataset:
        """The images at ``indices`` ((K,) int64), with all the classes."""
        whole, positions = self.origin or (self, np.arange(len(self)))
        return dataclasses.replace(
            self,
            labels=self.labels[indices],
            images=None if self.images is None else self.images[indices],
            paths=None if self.paths is None else tuple(self.paths[i] for i in indices),
            origin=(whole, positions[indices]),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How an image becomes the model's input; stored with every checkpoint.

    Attributes:
        image_size: side of the square input in pixels.
        mean, std: per channel, of images scaled to [0, 1].
        fit: how an image becomes a square of that size in evaluation. ``"crop"``: resized, and its centre cropped, as
            photos are; ``"whole"``: all of it, padded or resized, as in the data sets of small square images.
        crop_share: of ``"crop"``: the side of the crop as a share of the shorter side after resizing, in (0, 1].
        interpolation: of ``"crop"``: Pillow's filter by which an image is resized; it is widened when shrinking.

    Raises:
        ValueError: a value is out of its range, as in a file that somebody has changed.
    """

    image_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    fit: Fit = "crop"
    crop_share: float = CROP_SHARE
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ValueError(f"expected a {name} of three numbers, got {values}")
        if not min(self.std) > 0:
            raise ValueError(f"expected a std of positive numbers, got {self.std}")
        if not 0 < self.crop_share <= 1:
            raise ValueError(f"expected a crop_share between 0 and 1, got {self.crop_share}")
        for name, kinds in (("fit", get_args(Fit)), ("interpolation", get_args(Interpolation))):
            if getattr(self, name) not in kinds:
                raise ValueError(f"expected {name} {' or '.join(kinds)}, got {getattr(self, name)!r}")

    @property
    def resized_side(self) -> int:
        """Pixels of the shorter side that ``"crop"`` resizes an image to."""
        return round(self.image_size / self.crop_share)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SourceData:
    """What a reader found.

    Attributes:
        train: images to train on.
        test: images that the reported figures are of; None where the data set has no split of its own.
        preprocessing: see there.
        flip: whether a mirrored image keeps its class.
        crop_padding: pixels to pad with before a random crop, for images in memory; files get a random resized crop.
    """

    train: ImageDataset
    test: ImageDataset | None
    preprocessing: Preprocessing
    flip: bool = True
    crop_padding: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataSplits:
    """The splits of a run; ``val``, if any, was held out of ``train``, and the best epoch is then picked on it."""

    train: ImageDataset
    test: ImageDataset
    val: ImageDataset | None
    preprocessing: Preprocessing


def fit_square(images: np.ndarray, size: int) -> np.ndarray:
    """Images brought to ``size`` x ``size``.

    Up to 4 missing pixels are padded with zeros, evenly (28 -> 32, usual for MNIST's kind); else bilinear, antialiased.

    Args:
        images: (N, H, W, C) uint8.
        size: in pixels.

    Returns:
        (N, size, size, C) uint8.
    """
    height, width = images.shape[1:3]
    if (height, width) == (size, size):
        return images
    if 0 <= size - height <= 4 and 0 <= size - width <= 4:
        top, left = (size - height) // 2, (size - width) // 2
        pads = ((0, 0), (top, size - height - top), (left, size - width - left), (0, 0))
        return np.pad(images, pads)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    resized = functional.interpolate(batch, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def hold_out(dataset: ImageDataset, fraction: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """(rest, held out): ``fraction`` of every class (at least one image where it has two), drawn at random."""
    generator = np.random.default_rng(seed)
    held: list[np.ndarray] = []
    for label in range(len(dataset.classes)):
        members = np.flatnonzero(dataset.labels == label)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1) if len(members) > 1 else 0
        held.append(generator.permutation(members)[:count])
    held_indices = np.sort(np.concatenate(held))
    rest = np.setdiff1d(np.arange(len(dataset)), held_indices)
    return dataset.subset(rest), dataset.subset(held_indices)
