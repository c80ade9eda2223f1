"""The loaders of a classification run: training, test, validation, and the probe of the uncertainty."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from idml.config_cls import ClsConfig
from idml.data.image_dataset import DataSplits
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
    """The loaders that a config asks for, FFCV's .beton files written where they are needed."""
    size = data.preprocessing.image_size
    ranks: dict[str, Any] = {"rank": rank(), "world_size": world_size(), "pin_memory": pin_memory}
    evaluation: dict[str, Any] = {"batch_size": EVAL_BATCH_SIZE, "image_size": size, "train": False, **ranks}
    probe = data.train.subset(np.linspace(0, len(data.train) - 1, min(PROBE_IMAGES, len(data.train)), dtype=int))
    return ClsLoaders(
        train=TorchLoader(
            data.train,
            batch_size=config.batch_size,
            image_size=config.progressive[1] if config.progressive else size,
            train=True,
            seed=config.seed,
            workers=config.workers,
            **ranks,
        ),
        test=TorchLoader(data.test, workers=config.workers, **evaluation),
        val=TorchLoader(data.val, workers=config.workers, **evaluation) if data.val else None,
        probe=TorchLoader(probe, workers=config.workers, **evaluation),
    )
