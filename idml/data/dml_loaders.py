"""The loaders of a retrieval run: training (random or class-balanced), test, gallery, validation."""

from __future__ import annotations

import dataclasses
from typing import Any

from idml.checks_dml import IN_PACKAGE
from idml.config_dml import DmlConfig
from idml.data.image_dataset import ImageDataset
from idml.data.loaders import split_loader
from idml.data.retrieval_data import RetrievalData
from idml.data.torch_loader import Loader
from idml.distributed import rank, world_size

EVAL_BATCH_SIZE = 128
"""Images of an evaluation step on each rank: nothing depends on it but memory."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DmlLoaders:
    """This rank's loaders: ``gallery`` where queries search one apart, ``val`` where classes are held out."""

    train: Loader
    test: Loader
    gallery: Loader | None
    val: Loader | None


def build_dml_loaders(data: RetrievalData, config: DmlConfig, *, pin_memory: bool) -> DmlLoaders:
    """The loaders that a config asks for; FFCV's .beton files are written where they are needed.

    Raises:
        UserError: FFCV was asked for and is not there, or a .beton cannot be written.
    """
    shared: dict[str, Any] = {
        "image_size": data.preprocessing.image_size,
        "workers": config.workers,
        "rank": rank(),
        "world_size": world_size(),
        "pin_memory": pin_memory,
        "crop_share": data.preprocessing.crop_share,
        "interpolation": data.preprocessing.interpolation,
    }
    training = {"batch_size": config.batch_size, "train": True, "seed": config.seed, "per_class": config.IPC, **shared}
    evaluation = {"batch_size": EVAL_BATCH_SIZE, "train": False, **shared}
    return DmlLoaders(
        train=_loader(data.train, config, "train", training),
        test=_loader(data.test, config, "test", evaluation),
        gallery=_loader(data.gallery, config, "gallery", evaluation) if data.gallery else None,
        val=_loader(data.val, config, "val", evaluation) if data.val else None,
    )


def _loader(dataset: ImageDataset, config: DmlConfig, split: str, arguments: dict[str, Any]) -> Loader:
    # Which classes are held out depends on the seed: a .beton for each, or runs beside one another would share a file.
    held_out = f"-held-out-{config.val_fraction:g}-s{config.seed}" if config.val_fraction and split != "test" else ""
    return split_loader(
        dataset,
        loader=config.loader,
        in_package=config.dataset in IN_PACKAGE,
        source=config.dataset + held_out,
        split=split,
        cache_dir=config.cache_dir,
        **arguments,
    )
