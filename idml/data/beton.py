""".beton files from the outside: what is in one (its sidecar), whether it fits a data set, writing one whole or not.

A sidecar X.beton.json lies beside each X.beton. It is written last, so a .beton that has one is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np

from idml.data.image_dataset import ImageDataset
from idml.data.pixels import PIXELS_VERSION
from idml.errors import UserError
from idml.paths import missing

Mode = Literal["raw", "jpg", "proportion", "unchanged"]

SIDECAR_FORMAT = PIXELS_VERSION
"""Number of what a sidecar says and of how files become pixels; a .beton of another number is written again."""

JPEG_QUALITY = 95
"""Of what has to be encoded where no quality was asked for; between FFCV's 90 and no loss that can be seen."""

WRITE = "write it with: python -m idml ffcv-write"

INSTEAD = "give --loader torch to go without, or see docs/ffcv.md for a wheel that needs no system library"


class CannotWriteError(UserError):
    """A .beton finds no place: a read-only or full disk, say."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BetonSettings:
    """How images are stored.

    Attributes:
        mode: raw bytes; JPEG; each image one of the two by chance; "unchanged": JPEG files byte for byte, all else raw,
            and with it JPEG files that are stored turned (EXIF).
        max_side: larger images are reduced until their longer side is this, in pixels.
        quality: of JPEGs, 1 to 100. None leaves JPEG files that need no reduction as they are, and encodes the rest at
            ``JPEG_QUALITY``.
        compress_probability: share of JPEGs in mode "proportion".
    """

    mode: Mode = "raw"
    max_side: int | None = None
    quality: int | None = None
    compress_probability: float = 0.5

    def __post_init__(self) -> None:
        if self.mode == "unchanged" and (self.quality is not None or self.max_side is not None):
            raise UserError("--mode unchanged: neither --quality nor --max-side has a place with it")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UserError(f"--quality: expected a value between 1 and 100, got {self.quality}")
        if self.max_side is not None and self.max_side < 8:
            raise UserError(f"--max-side: expected at least 8 pixels, got {self.max_side}")
        if not 0 <= self.compress_probability <= 1:
            raise UserError(
                f"--compress-probability: expected a value between 0 and 1, got {self.compress_probability}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """What a .beton holds.

    Attributes:
        format: ``SIDECAR_FORMAT``.
        source, split: for people: the data set and which part of it.
        count: images.
        bytes: size of the .beton.
        settings: how they are stored.
        classes, classes_sha256: their names, and the digest of these.
        fingerprint: see there; of the images that the file was written from.
        ffcv: version that wrote it.
    """

    format: int
    source: str
    split: str
    count: int
    bytes: int
    settings: BetonSettings
    classes_sha256: str
    fingerprint: str
    ffcv: str
    classes: tuple[str, ...]


def import_ffcv() -> ModuleType:
    """The module `idml.data.ffcv_loader`.

    Raises:
        UserError: FFCV is not installed or does not load; says why and what to do.
    """
    try:
        return importlib.import_module("idml.data.ffcv_loader")
    except Exception as error:  # a compiled package fails to load in any number of ways
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"FFCV cannot be imported ({reason}); {INSTEAD}") from None


def sidecar_path(path: Path) -> Path:
    """Where the sidecar of a .beton lies."""
    return path.with_name(path.name + ".json")


def classes_digest(classes: tuple[str, ...]) -> str:
    """SHA-256 of the class list, in hexadecimal."""
    return hashlib.sha256(json.dumps(list(classes)).encode()).hexdigest()


def fingerprint(dataset: ImageDataset) -> str:
    """A digest that changes with the images, their labels or their order.

    For images in memory that of their bytes; for files that of their names (below the folder that they share), sizes
    and times of change.

    Raises:
        UserError: a file is gone.
    """
    digest = hashlib.sha256(np.ascontiguousarray(dataset.labels).tobytes())
    if dataset.images is not None:
        digest.update(repr(dataset.images.shape).encode())
        digest.update(np.ascontiguousarray(dataset.images).data)
        return digest.hexdigest()
    assert dataset.paths is not None
    start = len(str(shared_folder(dataset)))
    for path in dataset.paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        digest.update(
            f"{str(path)[start:]}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape")
        )
    return digest.hexdigest()


def shared_folder(dataset: ImageDataset) -> Path:
    """The lowest folder that holds all files of the data set."""
    assert dataset.paths is not None
    return Path(os.path.commonpath({str(path.parent) for path in dataset.paths}))


def read_sidecar(path: Path) -> Sidecar:
    """The sidecar of the .beton at ``path``.

    Raises:
        UserError: the .beton or its sidecar is missing, or the sidecar is not one of this version.
    """
    if not path.is_file():
        raise UserError(f"{missing(path, 'file')}; {WRITE}")
    try:
        values = json.loads(sidecar_path(path).read_text(encoding="utf-8"))
        settings = BetonSettings(**values.pop("settings"))
        sidecar = Sidecar(**values | {"settings": settings, "classes": tuple(values["classes"])})
    except FileNotFoundError:
        raise UserError(f"{path} has no {sidecar_path(path).name} beside it that says what it holds; {WRITE}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{sidecar_path(path)} is not a sidecar of this version ({error}); {WRITE}") from None
    if sidecar.format != SIDECAR_FORMAT:
        raise UserError(
            f"{path} is of another version of this project: expected a sidecar of format {SIDECAR_FORMAT}, got "
            f"{sidecar.format}; {WRITE}"
        )
    return sidecar


def check_beton(path: Path, classes: tuple[str, ...], count: int | None) -> Sidecar:
    """The sidecar of a .beton that is whole and of these classes.

    Args:
        path: of the .beton.
        classes: names that it must have, in order.
        count: images that it must have; None leaves that open.

    Raises:
        UserError: missing, truncated, without sidecar, or of other data.
    """
    sidecar = read_sidecar(path)
    size = path.stat().st_size
    if size != sidecar.bytes:
        raise UserError(f"{path} is truncated or was replaced: expected {sidecar.bytes} bytes, got {size}; {WRITE}")
    other = f"{path} holds other data ({sidecar.source}, {sidecar.split})"
    if sidecar.classes_sha256 != classes_digest(classes):
        theirs = ", ".join(sidecar.classes[:3])
        raise UserError(
            f"{other}: expected {len(classes)} classes ({', '.join(classes[:3])}, ...), got {len(sidecar.classes)} "
            f"({theirs}, ...); {WRITE}"
        )
    if count is not None and sidecar.count != count:
        raise UserError(f"{other}: expected {count} images, got {sidecar.count}; {WRITE}")
    return sidecar


def beton_matches(
    path: Path, dataset: ImageDataset, settings: BetonSettings | None = None, *, digest: str | None = None
) -> str | None:
    """Why the .beton at ``path`` cannot serve for the data set, or None if it can.

    Args:
        path: of the .beton.
        dataset: what it should have been written from.
        settings: how the images should be stored; None accepts any.
        digest: ``fingerprint(dataset)``, if it is known already.
    """
    try:
        sidecar = check_beton(path, dataset.classes, len(dataset))
    except UserError as error:
        return str(error)
    if settings is not None and sidecar.settings != settings:
        return f"{path} was written with other settings: expected {settings}, got {sidecar.settings}"
    if sidecar.fingerprint != (digest or fingerprint(dataset)):
        return f"the images of {sidecar.source} have changed since {path} was written"
    return None
