"""ImageNet-1K (ILSVRC 2012) as its archives unpack: class folders, or the flat validation folder of the original."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from idml.data.image_dataset import ImageDataset
from idml.data.image_files import list_class_folders
from idml.data.walk import LeftOut, folders_of
from idml.errors import UserError
from idml.paths import missing

NUM_CLASSES, NUM_TRAIN, NUM_VAL = 1000, 1_281_167, 50_000
"""Classes and images of the full set (Russakovsky et al. 2015)."""

LAYOUT = (
    "DIR/train/n01440764/*.JPEG and DIR/val/n01440764/*.JPEG (or a flat DIR/val/ILSVRC2012_val_00000001.JPEG, with the "
    "development kit's data/ILSVRC2012_validation_ground_truth.txt and data/meta.mat below DIR); ImageNet can be had "
    "after registration at image-net.org"
)


def read_imagenet(root: Path) -> tuple[ImageDataset, ImageDataset]:
    """(train, val) of an ImageNet tree; classes are WordNet ids in sorted order, as everybody numbers them.

    A tree with other counts than the full set's (a subset of the classes, say) is read with a warning.

    Raises:
        UserError: a folder or the ground truth is missing, or does not fit.
    """
    left_out = LeftOut()
    train = list_class_folders(root / "train", layout=LAYOUT, left_out=left_out)
    val_dir = root / "val"
    if not val_dir.is_dir():
        raise UserError(f"{missing(val_dir)}; expected {LAYOUT}")
    if folders_of(val_dir):
        val = list_class_folders(val_dir, layout=LAYOUT, left_out=left_out)
        if val.classes != train.classes:
            raise UserError(f"{root}: train has {len(train.classes)} classes and val {len(val.classes)}, or other ones")
    else:
        val = _read_flat_val(root, val_dir, train.classes)
    left_out.warn(root)
    counts = (len(train.classes), len(train), len(val))
    if counts != (NUM_CLASSES, NUM_TRAIN, NUM_VAL):
        warnings.warn(
            f"{root} is not the full ImageNet-1K: {counts[0]} classes, {counts[1]} training and {counts[2]} validation "
            f"images in place of {NUM_CLASSES}, {NUM_TRAIN} and {NUM_VAL}",
            UserWarning,
            stacklevel=2,
        )
    return train, val


def _read_flat_val(root: Path, folder: Path, classes: tuple[str, ...]) -> ImageDataset:
    """The validation images in one folder, with the labels of the development kit."""
    paths = tuple(sorted(folder.glob("ILSVRC2012_val_*.JPEG")))
    if not paths:
        raise UserError(f"no images in {folder}; expected {LAYOUT}")
    truth = _find(root, "ILSVRC2012_validation_ground_truth.txt")
    wnids = _wnids_by_ilsvrc_id(_find(root, "meta.mat"))
    try:
        ids = [int(line) for line in truth.read_text(encoding="ascii").split()]
    except ValueError as error:
        raise UserError(f"{truth}: expected one class number a line: {error}") from None
    numbers = [int(path.stem.rsplit("_", 1)[1]) for path in paths]
    if max(numbers) > len(ids):
        raise UserError(f"{truth} has {len(ids)} labels, but there is an image {paths[int(np.argmax(numbers))].name}")
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    labels = []
    for path, number in zip(paths, numbers, strict=True):
        wnid = wnids.get(ids[number - 1])
        if wnid not in label_of:
            raise UserError(f"{path.name} is of class {wnid} (number {ids[number - 1]}), which is no folder of train/")
        labels.append(label_of[wnid])
    return ImageDataset(labels=np.array(labels, np.int64), classes=classes, paths=paths)


def _find(root: Path, name: str) -> Path:
    """The file in ``root``, or in one of the places where the development kit puts it."""
    for folder in (root, root / "data", root / "ILSVRC2012_devkit_t12" / "data", root / "devkit" / "data"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"no {name} below {root}; a flat val folder needs it: expected {LAYOUT}")


def _wnids_by_ilsvrc_id(path: Path) -> dict[int, str]:
    """The development kit's numbering of the classes (1..1000, not in sorted order), from ``meta.mat``."""
    from scipy.io import loadmat  # a dependency of scikit-learn

    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        pairs = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        return {int(identifier): str(wnid) for identifier, wnid in pairs}
    except (ValueError, KeyError, TypeError, IndexError, NotImplementedError) as error:
        raise UserError(f"{path} is not the development kit's meta.mat: {error}") from None
