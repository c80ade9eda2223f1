"""Class folders of image files: listing them, and finding the files that do not decode before training starts."""

from __future__ import annotations

import dataclasses
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from idml.data.image_dataset import ImageDataset, check_pixels
from idml.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


def list_class_folders(folder: Path, *, layout: str) -> ImageDataset:
    """All images below ``folder/<class>/``, classes and files in sorted order; hidden files (``._*``) are left out.

    Args:
        folder: holds one folder per class.
        layout: what is expected, for the error.

    Raises:
        UserError: no such folder, no class folders, or a class without images.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; expected {layout}")
    names = sorted(entry.name for entry in _entries(folder) if _is_folder(entry) and not entry.name.startswith("."))
    if not names:
        raise UserError(f"no class folders in {folder}; expected {layout}")
    classes = [printable(name) for name in names]
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        files = [
            Path(parent, file)
            for parent, _, below in os.walk(folder / name, onerror=_unreadable)
            for file in below
            if not file.startswith(".") and Path(file).suffix.lower() in IMAGE_SUFFIXES
        ]
        if not files:
            raise UserError(
                f"no images in the class folder {folder / name} (of type {' '.join(sorted(IMAGE_SUFFIXES))})"
            )
        paths += sorted(files)
        labels += [label] * len(files)
    return ImageDataset(labels=np.array(labels, np.int64), classes=tuple(classes), paths=tuple(paths))


def printable(name: str) -> str:
    """The name of a file or folder as text that can be written anywhere: other characters and bytes are escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in name
    )


def _unreadable(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; a link that leads nowhere, or in circles, is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def decoding_error(path: Path) -> str | None:
    """Why the file cannot be decoded to its last byte, or None. A JPEG is decoded small, which reads all of it."""
    try:
        if path.exists() and not path.is_file():
            return "not a file"  # a pipe would be waited for
        with Image.open(path) as image:
            check_pixels(image)
            image.draft("RGB", (1, 1))
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error) or type(error).__name__
    return None


def without_unreadable(dataset: ImageDataset, *, skip: bool, workers: int) -> ImageDataset:
    """The data set without the files that do not decode.

    Args:
        dataset: with ``paths``.
        skip: leave bad files out and warn with their number; otherwise any bad file is an error.
        workers: threads that decode.

    Raises:
        UserError: files do not decode and ``skip`` is off: their number and the first ten names.
    """
    assert dataset.paths is not None
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        errors = list(pool.map(decoding_error, dataset.paths, chunksize=64))
    bad = [(path, error) for path, error in zip(dataset.paths, errors, strict=True) if error is not None]
    if not bad:
        return dataset
    names = "; ".join(f"{path} ({error})" for path, error in bad[:10]) + (" ..." if len(bad) > 10 else "")
    summary = f"{len(bad)} of {len(dataset)} image files cannot be decoded: {names}"
    if not skip:
        raise UserError(f"{summary}. Repair or remove them, or go on without them with --skip-bad-images")
    warnings.warn(f"left out: {summary}", UserWarning, stacklevel=2)
    good = np.array([index for index, error in enumerate(errors) if error is None], np.int64)
    return dataclasses.replace(dataset.subset(good), origin=None)  # nobody needs the bad files again
