"""What every reader of a retrieval data set gives: images to train on, and images of other classes to search among."""

from __future__ import annotations

import dataclasses

import numpy as np

from idml.data.image_dataset import ImageDataset, Preprocessing
from idml.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalData:
    """The splits of a retrieval data set; training and test classes are disjoint.

    Attributes:
        train: images to train on; labels count from 0 over the training classes.
        test: the images that search; labels count from 0 over the test classes.
        gallery: the images that are searched, labels as in ``test``; None where the test images search one another.
        preprocessing: how an image becomes the model's input.
        flip: whether a mirrored image keeps its class.
        crop_padding: pixels to pad with before a random crop, for images in memory; files get a random resized crop.
        crop_fill: value of those pixels, 0 to 255.
        val: images of training classes that were held out, labels from 0 over these; they search one another, and the
            probability of an error is calibrated on them. None where none were held out.
        families: (len(test),) int64, or None. Images of one family are so alike (two sets of emoji by one vendor, say)
            that figures are also given with the query's family removed from the gallery.
    """

    train: ImageDataset
    test: ImageDataset
    gallery: ImageDataset | None = None
    val: ImageDataset | None = None
    preprocessing: Preprocessing
    flip: bool = True
    crop_padding: int = 0
    crop_fill: int = 0
    families: np.ndarray | None = None

    def __post_init__(self) -> None:
        assert self.families is None or len(self.families) == len(self.test)
        assert self.gallery is None or self.gallery.classes == self.test.classes


def hold_out_classes(dataset: ImageDataset, fraction: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """(rest, held out): ``fraction`` of the classes, at least two on either side, drawn at random; labels count anew.

    Raises:
        UserError: there are fewer than four classes, or no held-out class has two images.
    """
    count = len(dataset.classes)
    if count < 4:
        raise UserError(
            f"--val-fraction {fraction}: holding classes out takes 4 training classes, got {count}; "
            "--val-fraction 0 holds none out"
        )
    order = np.random.default_rng(seed).permutation(count)
    held = min(max(round(fraction * count), 2), count - 2)
    rest, val = (_of_classes(dataset, np.sort(chosen)) for chosen in (order[held:], order[:held]))
    if np.bincount(val.labels).max(initial=0) < 2:
        raise UserError(
            f"--val-fraction {fraction}: none of the {held} held-out classes has two images; "
            "--val-fraction 0 holds none out"
        )
    return rest, val


def _of_classes(dataset: ImageDataset, chosen: np.ndarray) -> ImageDataset:
    """The images of some classes ((K,) int64, ascending), labelled from 0 over these."""
    part = dataset.subset(np.flatnonzero(np.isin(dataset.labels, chosen)))
    # Its labels are no longer those of what it was taken from: a .beton of its own.
    return dataclasses.replace(
        part,
        labels=np.searchsorted(chosen, part.labels).astype(np.int64),
        classes=tuple(dataset.classes[index] for index in chosen),
        origin=None,
    )
