"""The retrieval data that a config asks for, checked for what would make training fail or mean nothing."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping

import numpy as np

from idml.config_dml import DmlConfig, default_ks
from idml.data.emoji import read_emoji, read_emoji_mini
from idml.data.icons import read_icons
from idml.data.image_dataset import ImageDataset
from idml.data.retrieval_data import RetrievalData, hold_out_classes
from idml.data.retrieval_folder import read_csv, read_folder
from idml.data.retrieval_readers import read_cars, read_cub, read_inshop, read_sop
from idml.distributed import is_main, world_size
from idml.errors import UserError
from idml.introspection_options import DEFAULT_HELD_OUT
from idml.losses import LOSSES
from idml.pretrained import with_weights_preprocessing

READERS: Mapping[str, Callable[[DmlConfig], RetrievalData]] = {
    "cub": read_cub,
    "cars": read_cars,
    "sop": read_sop,
    "inshop": read_inshop,
    "folder": read_folder,
    "csv": read_csv,
    "emoji-mini": read_emoji_mini,
    "emoji": read_emoji,
    "icons": read_icons,
}


def read_retrieval_data(config: DmlConfig) -> RetrievalData:
    """The data of a config; where it leaves ``image_size``, ``flip`` and ``crop_padding`` open, they are filled in.

    Images are prepared as the run's weights expect them (see ``with_weights_preprocessing``).

    Raises:
        UserError: data missing or damaged, fewer than two classes on a side, no class with two test images, fewer
            images than a batch, fewer classes than a class-balanced batch has, fewer test images than a K of R@K; or
            the run's weights cannot be read.
    """
    data = READERS[config.dataset](config)
    _check_classes(data.train, "training")
    _check_classes(data.test, "test")
    assert config.val_fraction is not None, "filled in when the options are read"
    if config.val_fraction > 0:
        try:
            train, val = hold_out_classes(data.train, config.val_fraction, config.seed)
            data = dataclasses.replace(data, train=train, val=val)
        except UserError as error:
            if config.val_fraction != DEFAULT_HELD_OUT:
                raise
            if is_main():
                warnings.warn(f"all classes are trained on: {error}", stacklevel=2)
    searched = data.test if data.gallery is None else data.gallery
    if data.gallery is None and np.bincount(data.test.labels).max() < 2:
        raise UserError("no class has two test images, so there is nothing to retrieve")
    if data.gallery is not None and not np.isin(data.test.labels, data.gallery.labels).any():
        raise UserError("no class of the query images is in the gallery, so there is nothing to retrieve")
    if config.batch_size > len(data.train):
        raise UserError(f"--batch-size {config.batch_size} is larger than the {len(data.train)} training images")
    if config.IPC is not None and config.batch_size // config.IPC > len(data.train.classes):
        raise UserError(
            f"a batch of {config.batch_size} with --IPC {config.IPC} has {config.batch_size // config.IPC} classes; "
            f"there are {len(data.train.classes)}: take a larger --IPC or a smaller --batch-size"
        )
    for name, split in (("test", data.test), ("gallery", data.gallery), ("validation", data.val)):
        if split is not None and len(split) < world_size():
            raise UserError(f"{len(split)} {name} images are too few for {world_size()} processes: each needs one")
    most = len(searched) - (1 if data.gallery is None else 0)
    assert config.ks is not None
    if config.ks == default_ks(config.dataset) and config.ks[-1] > most:
        config.ks = [k for k in config.ks if k <= most]
        if is_main():
            warnings.warn(f"R@K for K = {config.ks} only: a query has {most} images to search", stacklevel=2)
    if config.ks[-1] > most:
        raise UserError(f"--ks {config.ks[-1]}: each query has only {most} images to be found among")
    _warn_of_lonely_batches(data.train, config)
    config.image_size = data.preprocessing.image_size
    config.flip = data.flip if config.flip is None else config.flip
    config.crop_padding = data.crop_padding if config.crop_padding is None else config.crop_padding
    preprocessing = with_weights_preprocessing(data.preprocessing, config)
    return dataclasses.replace(data, preprocessing=preprocessing, flip=config.flip, crop_padding=config.crop_padding)


def _warn_of_lonely_batches(train: ImageDataset, config: DmlConfig) -> None:
    """Warn where an image has less than one other of its class in a random batch, and the loss learns from pairs."""
    if config.IPC is not None or not LOSSES[config.loss].needs_pairs or config.eval_only or not is_main():
        return
    shares = np.bincount(train.labels) / len(train)
    partners = (config.batch_size - 1) * float(np.square(shares).sum())
    if partners < 1:
        warnings.warn(
            f"{config.loss} learns from images of one class, and in a random batch of {config.batch_size} an image has "
            f"{partners:.2f} others of its class on average: --IPC 4 puts four of each class in a batch",
            UserWarning,
            stacklevel=2,
        )


def _check_classes(dataset: ImageDataset, name: str) -> None:
    if len(dataset) == 0:
        raise UserError(f"there are no {name} images")
    labels, count = dataset.labels, len(dataset.classes)
    if labels.min() < 0 or labels.max() >= count:
        raise UserError(f"labels of the {name} images must be 0 to {count - 1}, got {labels.min()} to {labels.max()}")
    if len(np.unique(labels)) < 2:
        raise UserError(f"expected {name} images of at least 2 classes, got {dataset.classes[int(labels[0])]!r} only")
