"""A user's own images for classification: class folders, in splits or not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from idml.data.image_dataset import Preprocessing, SourceData
from idml.data.image_files import list_class_folders, without_unreadable
from idml.data.splits import Splits, find_splits, slashed
from idml.data.walk import LeftOut, images_in
from idml.errors import UserError
from idml.paths import missing

if TYPE_CHECKING:
    from idml.config_cls import ClsConfig

FOLDER_LAYOUT = "one folder per class with images in it, as DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg"


def read_folder(config: ClsConfig) -> SourceData:
    """A user's own images: ``--train-dir`` and ``--val-dir``, or ``--data-dir`` with train/ and val/ (or test/), or one
    ``--data-dir`` of class folders from which ``--val-fraction`` is held out as the test images."""
    train_dir, test_dir, left_out = _own_folders(config)
    train = list_class_folders(train_dir, layout=FOLDER_LAYOUT, left_out=left_out)
    test = None if test_dir is None else list_class_folders(test_dir, layout=FOLDER_LAYOUT, left_out=left_out)
    if test is not None and test.classes != train.classes:
        only_train = sorted(set(train.classes) - set(test.classes))
        only_test = sorted(set(test.classes) - set(train.classes))
        raise UserError(
            f"the classes of {train_dir} and {test_dir} differ: only in the first {only_train[:5]}, only in the second "
            f"{only_test[:5]} ({len(train.classes)} and {len(test.classes)} classes)"
        )
    checked: dict[str, Any] = {"skip": config.skip_bad_images, "workers": config.workers, "left_out": left_out}
    try:
        train = without_unreadable(train, **checked)
        test = None if test is None else without_unreadable(test, **checked)
    finally:
        left_out.warn(Path(config.data_dir or train_dir))
    return SourceData(train=train, test=test, preprocessing=Preprocessing(image_size=config.image_size or 224))


def _own_folders(config: ClsConfig) -> tuple[Path, Path | None, LeftOut]:
    """(class folders to train on, those to test on or None where images are held out, what else lies there).

    Raises:
        UserError: a folder is missing, or it is not clear which is which.
    """
    if config.data_dir is None and config.train_dir is None:
        raise UserError(f"dataset folder needs --data-dir or --train-dir: {FOLDER_LAYOUT}")
    for flag, given in (("data", config.data_dir), ("train", config.train_dir), ("val", config.val_dir)):
        if given is not None and not Path(given).is_dir():
            raise UserError(f"--{flag}-dir: {missing(given)}; expected {FOLDER_LAYOUT}")
    left_out, splits = LeftOut(), Splits(labelled={}, flat={})
    root = Path(config.data_dir or config.train_dir or "")
    if config.data_dir is not None and (config.train_dir is None or config.val_dir is None):
        splits = find_splits(root)
    if config.train_dir is not None:
        train_dir = Path(config.train_dir)
    elif splits.folders:
        train_dir = _training_split(root, splits)
        left_out.loose += images_in(root, left_out)
    else:
        train_dir = root  # the classes lie in --data-dir itself
    test_dir = Path(config.val_dir) if config.val_dir else splits.labelled.get("val", splits.labelled.get("test"))
    if test_dir is None and config.val_fraction == 0:
        flat = [splits.flat[role] for role in ("val", "test") if role in splits.flat]
        reason = f" ({slashed(flat)} in it has no class folders)" if flat else ""
        raise UserError(
            f"no images to test on for {train_dir}{reason}: give --val-dir DIR, or put them in {root}/val, or hold "
            "some out with --val-fraction 0.1"
        )
    if config.train_dir is None:
        used = (train_dir, test_dir)
        left_out.unused += [each for each in (*splits.folders.values(), *splits.others) if each not in used]
    return train_dir, test_dir, left_out


def _training_split(root: Path, splits: Splits) -> Path:
    """The folder of the split train; UserError where there is none, or where it may as well be a class."""
    if "train" not in splits.labelled:
        there = slashed(list(splits.folders.values()))
        reason = f"no class folders in {slashed([splits.flat['train']])}" if "train" in splits.flat else "no train/"
        raise UserError(f"{root} has {there}, but {reason}; expected {FOLDER_LAYOUT}, or --train-dir and --val-dir")
    train = splits.labelled["train"]
    if len(splits.labelled) == 1 and len(splits.others) > 1:
        raise UserError(
            f"{train} has folders of images in it, as a split has; so {slashed(splits.others[:5])} beside it cannot be "
            f"classes. If it is a class too, move its images into {train} itself; if not, give --train-dir {train}"
        )
    return train
