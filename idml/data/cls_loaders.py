"""The loaders of a classification run: training, test, validation, and the probe of the uncertainty."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from idml.checks_cls import IN_PACKAGE
from idml.config_cls import ClsConfig
from idml.data.image_dataset import DataSplits, ImageDataset
from idml.data.loaders import split_loader
from idml.data.torch_loader import Loader, TorchLoader
from idml.distributed import rank, world_size

EVAL_BATCH_SIZE = 256
"""Images of an evaluation step on each rank: nothing depends on it but memory."""

PROBE_IMAGES = 1024
"""Training images whose uncertainty is measured clean and mixed after every epoch, spread over the training split."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClsLoaders:
    """This rank's loaders; ``val`` only where images were held out for it."""

    train: Loader
    test: Loader
    val: Loader | None
    probe: Loader


def build_cls_loaders(data: DataSplits, config: ClsConfig, *, pin_memory: bool) -> ClsLoaders:
    """The loaders that a config asks for; FFCV's .beton files are written where they are needed.

    Raises:
        UserError: FFCV was asked for and is not there, or a .beton cannot be written.
    """
    size = data.preprocessing.image_size
    shared: dict[str, Any] = {
        "workers": config.workers,
        "rank": rank(),
        "world_size": world_size(),
        "pin_memory": pin_memory,
        "crop_share": data.preprocessing.crop_share,
        "interpolation": data.preprocessing.interpolation,
    }
    evaluation: dict[str, Any] = {"batch_size": EVAL_BATCH_SIZE, "image_size": size, "train": False, **shared}
    training: dict[str, Any] = {
        "batch_size": config.batch_size,
        "image_size": config.progressive[1] if config.progressive else size,
        "train": True,
        "seed": config.seed,
        **shared,
    }
    probe = data.train.subset(np.linspace(0, len(data.train) - 1, min(PROBE_IMAGES, len(data.train)), dtype=int))
    return ClsLoaders(
        train=_loader(data.train, config, "train", training),
        test=_loader(data.test, config, "test", evaluation),
        val=_loader(data.val, config, "val", evaluation) if data.val else None,
        # Few images, once an epoch: not worth a second reader of the training .beton.
        probe=TorchLoader(probe, **evaluation),
    )


def _loader(dataset: ImageDataset, config: ClsConfig, split: str, arguments: dict[str, Any]) -> Loader:
    return split_loader(
        dataset,
        loader=config.loader,
        in_package=config.dataset in IN_PACKAGE,
        source=config.dataset,
        split=split,
        cache_dir=config.cache_dir,
        **arguments,
    )
