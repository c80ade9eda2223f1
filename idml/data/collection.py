"""Images to use a model on: a folder of any layout, or the data set that the model was trained on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from idml.data.image_dataset import ImageDataset
from idml.data.image_files import IMAGES_ARE, without_unreadable
from idml.data.names import class_name, printable
from idml.data.splits import find_splits
from idml.data.walk import LeftOut, images_below
from idml.errors import UserError
from idml.paths import missing, user_path

LAYOUT = (
    "images anywhere below DIR; the first folder of an image's path is its class, or, where class folders lie below "
    "it, a split (train, val, test, query, gallery)"
)
"""What a folder may look like, for errors."""

HELD_NOTHING_OUT: dict[str, Any] = {"val_fraction": 0.0}
"""What a checkpoint that does not say so was trained with: earlier versions held nothing out by default."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Collection:
    """N images that may or may not have labels.

    Attributes:
        dataset: the images; its labels are positions in its own classes, -1 where there is none.
        names: N paths relative to the folder, with forward slashes; or names such as ``test/17`` for images in memory.
        splits: N names of splits, empty where there is none.
        root: the folder, or None for images in memory.
        source: the folder's path, or the data set's name.
    """

    dataset: ImageDataset
    names: tuple[str, ...]
    splits: tuple[str, ...]
    root: Path | None
    source: str

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def labels(self) -> tuple[str | None, ...]:
        """N names of classes; None where there is none."""
        return tuple(None if label < 0 else self.dataset.classes[label] for label in self.dataset.labels)

    def subset(self, indices: np.ndarray) -> Collection:
        """The images at ``indices`` ((K,) int64), with all the classes."""
        return dataclasses.replace(
            self,
            dataset=self.dataset.subset(indices),
            names=tuple(self.names[index] for index in indices),
            splits=tuple(self.splits[index] for index in indices),
        )


def read_collection(folder: str | Path, *, skip_bad_images: bool = False, workers: int = 1) -> Collection:
    """All images below a folder, in sorted order; every file is decoded once.

    In ``DIR/train/cat/1.jpg`` train is the split and cat the class, in ``DIR/cat/1.jpg`` cat is the class, and
    ``DIR/1.jpg`` has neither; see ``find_splits``. Files of other kinds are left out, and their number is warned of.

    Args:
        folder: see ``LAYOUT``.
        skip_bad_images: leave images out that do not decode, with a warning; otherwise they are an error.
        workers: threads that decode.

    Raises:
        UserError: no such folder, no image in it, two folders for one split, or images that do not decode.
    """
    root = user_path(folder)
    if not root.is_dir():
        raise UserError(f"{missing(root)}; expected {LAYOUT}")
    left_out = LeftOut()
    paths = images_below(root, left_out)
    if not paths:
        left_out.warn(root)
        raise UserError(f"no images in {root} ({IMAGES_ARE}); expected {LAYOUT}")
    names = [path.relative_to(root).as_posix() for path in paths]
    split_of = {path.name: role for role, path in find_splits(root).folders.items()}
    found = [_split_and_class(name, split_of) for name in names]
    classes = tuple(sorted({label for _, label in found if label is not None}))
    position = {name: label for label, name in enumerate(classes)}
    labels = np.array([-1 if label is None else position[label] for _, label in found], np.int64)
    whole = ImageDataset(labels=labels, classes=classes, paths=tuple(paths))
    try:
        good = without_unreadable(whole, skip=skip_bad_images, workers=workers, left_out=left_out)
    finally:
        left_out.warn(root)
    if not len(good):
        raise UserError(f"no image in {root} can be decoded")
    place = {path: index for index, path in enumerate(paths)}
    kept = [place[path] for path in good.paths or ()]
    return Collection(
        dataset=good,
        names=tuple(printable(names[index]) for index in kept),
        splits=tuple(found[index][0] for index in kept),
        root=root,
        source=str(root),
    )


def _split_and_class(name: str, split_of: Mapping[str, str]) -> tuple[str, str | None]:
    """Of a relative path: the split, or an empty string, and the class, or None; ``split_of`` names of folders."""
    folders = name.split("/")[:-1]
    split = split_of[folders.pop(0)] if folders and folders[0] in split_of else ""
    return split, class_name(folders[0]) if folders else None


def trained_on(config: Mapping[str, Any]) -> Collection:
    """The data set that a checkpoint's config names, all of its splits; nothing that was held out is told apart.

    Args:
        config: as a checkpoint holds it.

    Raises:
        UserError: the data are not where they were.
    """
    if "embedding_size" in config:
        return _retrieval_images(config)
    return _classification_images(config)


def _classification_images(config: Mapping[str, Any]) -> Collection:
    from idml.config import build_config
    from idml.config_cls import ClsConfig
    from idml.data.datasets import read_splits

    known = {field.name for field in dataclasses.fields(ClsConfig)}
    values = HELD_NOTHING_OUT | {name: value for name, value in config.items() if name in known}
    data = read_splits(build_config(ClsConfig, values | {"pretrained": None}))  # that file may be gone by now
    parts = {"train": data.train, "val": data.val, "test": data.test}
    return _joined({name: part for name, part in parts.items() if part is not None}, str(config["dataset"]))


def _retrieval_images(config: Mapping[str, Any]) -> Collection:
    from idml.config import build_config
    from idml.config_dml import DmlConfig
    from idml.data.retrieval_datasets import read_retrieval_data

    known = {field.name for field in dataclasses.fields(DmlConfig)}
    values = HELD_NOTHING_OUT | {name: config[name] for name in known if name in config}
    data = read_retrieval_data(build_config(DmlConfig, values | {"pretrained": None}))
    parts = {"train": data.train, "val": data.val, "test": data.test, "gallery": data.gallery}
    return _joined({name: part for name, part in parts.items() if part is not None}, str(config["dataset"]))


def _joined(parts: Mapping[str, ImageDataset], source: str) -> Collection:
    """The splits of a data set as one, images named by split and number, or by path."""
    classes = tuple(sorted({name for part in parts.values() for name in part.classes}))
    first = next(iter(parts.values()))
    if all(part.classes == first.classes for part in parts.values()):
        classes = first.classes
    position = {name: label for label, name in enumerate(classes)}
    labels = [np.array([position[part.classes[label]] for label in part.labels], np.int64) for part in parts.values()]
    in_memory = first.images is not None
    paths = () if in_memory else tuple(path for part in parts.values() for path in part.paths or ())
    root = None if in_memory else Path(os.path.commonpath([path.parent for path in paths]))
    names: list[str] = []
    for name, part in parts.items():
        names += [f"{name}/{index}" for index in range(len(part))] if in_memory else []
    dataset = ImageDataset(
        labels=np.concatenate(labels),
        classes=classes,
        images=np.concatenate([part.images for part in parts.values() if part.images is not None])
        if in_memory
        else None,
        paths=None if in_memory else paths,
    )
    return Collection(
        dataset=dataset,
        names=tuple(names) if root is None else tuple(printable(path.relative_to(root).as_posix()) for path in paths),
        splits=tuple(name for name, part in parts.items() for _ in range(len(part))),
        root=root,
        source=source,
    )
