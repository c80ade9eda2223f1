"""Class folders of image files: listing them, and finding the files that do not decode before training starts."""

from __future__ import annotations

import dataclasses
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from idml.data.image_dataset import ImageDataset
from idml.data.names import class_name, printable
from idml.data.pixels import COMMON_SUFFIXES, as_rgb, has_8_bits, has_wide_grey, open_image, readable_error
from idml.data.splits import check_classes
from idml.data.walk import LeftOut, folders_of, images_below, images_in
from idml.distributed import is_main
from idml.errors import UserError
from idml.paths import missing

IMAGES_ARE = f"of type {' '.join(COMMON_SUFFIXES)} or any other that Pillow reads"
"""Which files are images, for errors."""


def list_class_folders(folder: Path, *, layout: str, left_out: LeftOut | None = None) -> ImageDataset:
    """All images below ``folder/<class>/``, classes and files in sorted order; see ``idml.data.walk``.

    Folders whose names are one class in other code points (``class_name``) are one class.

    Args:
        folder: holds one folder per class.
        layout: what is expected, for the error.
        left_out: gets what is no image, or in no class folder; None: it is warned of here.

    Raises:
        UserError: no such folder, no class folders, splits in place of classes, or a class without images.
    """
    if not folder.is_dir():
        raise UserError(f"{missing(folder)}; expected {layout}")
    found = LeftOut() if left_out is None else left_out
    folders = folders_of(folder)
    found.loose += images_in(folder, found)
    if not folders:
        raise UserError("; ".join([f"no class folders in {folder}", *found.sentences(), f"expected {layout}"]))
    check_classes(folder, folders, layout=layout)
    files: dict[str, list[Path]] = {}
    for each in folders:
        files.setdefault(class_name(each.name), []).extend(_images_of_class(each, folder, found))
    classes = tuple(sorted(files))
    if left_out is None:
        found.warn(folder)
    return ImageDataset(
        labels=np.repeat(np.arange(len(classes)), [len(files[name]) for name in classes]).astype(np.int64),
        classes=classes,
        paths=tuple(path for name in classes for path in files[name]),
    )


def _images_of_class(folder: Path, root: Path, left_out: LeftOut) -> list[Path]:
    others = LeftOut()
    files = images_below(folder, others, within=root)
    if not files:
        raise UserError("; ".join([f"no images in the class folder {folder} ({IMAGES_ARE})", *others.sentences()]))
    left_out.add(others)
    return files


def decoding_error(path: Path) -> str | None:
    """Why the file cannot be decoded to its last byte, or None. A JPEG is decoded small, which reads all of it."""
    return _examined(path)[0]


Greys = Literal["plain", "wide", "dark"]
"""Of an image: see ``LeftOut``."""


def _examined(path: Path) -> tuple[str | None, Greys]:
    """(why the file cannot be decoded or None, what greys it has)."""
    try:
        if os.path.islink(path) and not os.path.exists(path):
            return f"a link that leads nowhere, to {printable(str(path.readlink()))}", "plain"
        if path.exists() and not path.is_file():
            return "not a file", "plain"  # a pipe would be waited for
        with open_image(path) as image:
            image.draft("RGB", (1, 1))
            image.load()
            if has_8_bits(image):
                return None, "plain"
            brightest = np.asarray(as_rgb(image)).max()  # the conversion may fail
            if has_wide_grey(image):
                return None, "wide"
            return None, "dark" if image.mode.startswith("I") and 0 < brightest < 255 // 16 else "plain"
    except Exception as error:
        error = readable_error(error)
        if not isinstance(error, (OSError, ValueError)):
            raise
        return str(error) or type(error).__name__, "plain"


def without_unreadable(
    dataset: ImageDataset, *, skip: bool, workers: int, left_out: LeftOut | None = None
) -> ImageDataset:
    """The data set without the files that do not decode.

    Args:
        dataset: with ``paths``.
        skip: leave bad files out and warn with their number; otherwise any bad file is an error.
        workers: threads that decode.
        left_out: gets the images whose greys are scaled by a guess, or almost black.

    Raises:
        UserError: files do not decode and ``skip`` is off: their number and the first ten names.
    """
    assert dataset.paths is not None
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        examined = list(pool.map(_examined, dataset.paths, chunksize=64))
    if left_out is not None:
        left_out.wide += [path for path, (_, greys) in zip(dataset.paths, examined, strict=True) if greys == "wide"]
        left_out.dark += [path for path, (_, greys) in zip(dataset.paths, examined, strict=True) if greys == "dark"]
    bad = [(path, error) for path, (error, _) in zip(dataset.paths, examined, strict=True) if error is not None]
    if not bad:
        return dataset
    names = "; ".join(f"{path} ({error})" for path, error in bad[:10]) + (" ..." if len(bad) > 10 else "")
    summary = f"{len(bad)} of {len(dataset)} image files cannot be decoded: {names}"
    if not skip:
        raise UserError(f"{summary}. Repair or remove them, or go on without them with --skip-bad-images")
    if is_main():
        warnings.warn(f"left out: {summary}", UserWarning, stacklevel=2)
    good = np.array([index for index, (error, _) in enumerate(examined) if error is None], np.int64)
    return dataclasses.replace(dataset.subset(good), origin=None)  # nobody needs the bad files again
