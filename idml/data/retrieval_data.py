"""What every reader of a retrieval data set gives: images to train on, and images of other classes to search among."""

from __future__ import annotations

import dataclasses

import numpy as np

from idml.data.image_dataset import ImageDataset, Preprocessing


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
        families: (len(test),) int64, or None. Images of one family are so alike (two sets of emoji by one vendor, say)
            that figures are also given with the query's family removed from the gallery.
    """

    train: ImageDataset
    test: ImageDataset
    gallery: ImageDataset | None = None
    preprocessing: Preprocessing
    flip: bool = True
    crop_padding: int = 0
    crop_fill: int = 0
    families: np.ndarray | None = None

    def __post_init__(self) -> None:
        assert self.families is None or len(self.families) == len(self.test)
        assert self.gallery is None or self.gallery.classes == self.test.classes
