"""Writing .beton files whole or not at all, and the command ``python -m idml ffcv-write``."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from idml.checks_cls import check_ranges
from idml.config import build_config, dump_config, option, parse_command_line
from idml.config_cls import ClsConfig, Dataset
from idml.data.beton import (
    JPEG_QUALITY,
    SIDECAR_FORMAT,
    BetonSettings,
    CannotWriteError,
    Mode,
    Sidecar,
    classes_digest,
    fingerprint,
    import_ffcv,
    sidecar_path,
)
from idml.data.crops import hash_uniform
from idml.data.image_dataset import ImageDataset
from idml.data.pixels import open_image, orientation, read_rgb, readable_error
from idml.errors import UserError

LARGEST_SIDE, LARGEST_IMAGE = 2**16 - 1, 2**31
"""Limits of the .beton format: sides are 16 bits, and an image lies in one page of at most 2^31 bytes."""

FOREIGN_AGE = 86400.0
"""Seconds after which another machine's unfinished file counts as left behind: no writer pauses for a day."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""The errors of a full disk, a full quota, and a limit on the size of files."""


def write_beton(
    dataset: ImageDataset,
    path: Path,
    settings: BetonSettings,
    *,
    source: str,
    split: str,
    workers: int,
    progress: bool = True,
    digest: str | None = None,
) -> Sidecar:
    """Write the images and labels of a data set as a .beton with its sidecar.

    The file grows under another name beside ``path`` and gets its own when it is complete and on the disk. If that
    fails, an earlier file at ``path`` stays as it was. Unfinished files that killed writers left behind are removed.

    Args:
        dataset: grey images in memory become RGB.
        path: ends in .beton.
        settings: how images are stored.
        source, split: for the sidecar.
        workers: threads that read and encode.
        progress: draw a bar (never when the output is not a terminal).
        digest: ``fingerprint(dataset)``, if it is known already.

    Returns:
        What the sidecar says.

    Raises:
        UserError: FFCV does not import, an image cannot be read, the disk is full or cannot be written.
    """
    if path.suffix != ".beton":
        raise UserError(f"--out: expected a name that ends in .beton, got {path}")
    ffcv_loader = import_ffcv()
    workers, digest = max(workers, 1), digest or fingerprint(dataset)
    jpeg = _jpeg_share(len(dataset), settings)
    with _replacing(sidecar_path(path)) as temporary_sidecar, _replacing(path) as temporary:
        ffcv_loader.write_images(
            temporary,
            _image_reader(dataset, settings, jpeg, ffcv_loader),
            dataset.labels,
            jpeg=jpeg,
            quality=settings.quality or JPEG_QUALITY,
            largest=_largest_image(dataset, settings, workers),
            workers=workers,
            progress=lambda samples: tqdm(samples, path.name, len(dataset), leave=False, disable=not progress or None),
        )
        sidecar = Sidecar(
            format=SIDECAR_FORMAT,
            source=source,
            split=split,
            count=len(dataset),
            bytes=temporary.stat().st_size,
            settings=settings,
            classes_sha256=classes_digest(dataset.classes),
            fingerprint=digest,
            ffcv=version("ffcv"),
            classes=dataset.classes,
        )
        text = json.dumps(dataclasses.asdict(sidecar), indent=1, ensure_ascii=False)
        temporary_sidecar.write_text(text, encoding="utf-8")
        # From here on nothing can fail for want of space. An old sidecar must never stand beside the new file.
        _sync(temporary)
        _sync(temporary_sidecar)
        sidecar_path(path).unlink(missing_ok=True)
    return sidecar


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; at the end it is renamed to ``path``, or removed if anything failed."""
    temporary = path.with_name(f"{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(path)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        reason = "there is no space left" if error.errno in FULL else error.strerror or str(error)
        raise CannotWriteError(f"cannot write {path}: {reason}; nothing was changed") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_left_behind(path: Path) -> None:
    """Remove the unfinished files of writers of ``path`` that are no more."""
    for temporary in path.parent.glob(f"{path.name}.tmp-*"):
        host, _, process = temporary.name.removeprefix(f"{path.name}.tmp-").rpartition("-")
        with contextlib.suppress(OSError, ValueError):
            if host == socket.gethostname():
                left = int(process) == os.getpid() or not Path("/proc", str(int(process))).exists()
            else:
                left = time.time() - temporary.stat().st_mtime > FOREIGN_AGE
            if left:
                temporary.unlink()


def _jpeg_share(count: int, settings: BetonSettings) -> np.ndarray:
    """(N,) bool: which images are encoded as JPEGs; in mode "proportion" by a hash, to be the same every time."""
    share = {"jpg": 1.0, "proportion": settings.compress_probability}.get(settings.mode, 0.0)
    return np.array([hash_uniform(0, 0, index, 0) < share for index in range(count)], bool)


def _reduced(width: int, height: int, max_side: int | None) -> tuple[int, int]:
    """(width, height) with the longer side at most ``max_side``."""
    ratio = min(1.0, (max_side or max(width, height)) / max(width, height))
    return max(round(width * ratio), 1), max(round(height * ratio), 1)


def _largest_image(dataset: ImageDataset, settings: BetonSettings, workers: int) -> int:
    """Bytes of the largest image as raw pixels; UserError if one is larger than the format allows."""

    def size(path: Path) -> tuple[int, int]:
        try:
            with open_image(path) as image:  # reads the header alone
                return image.size
        except Exception as error:
            raise UserError(f"{path} cannot be read: {readable_error(error)}") from None

    if dataset.images is not None:
        sizes = [(dataset.images.shape[2], dataset.images.shape[1])]
    else:
        with ThreadPoolExecutor(workers) as pool:
            sizes = list(pool.map(size, dataset.paths or (), chunksize=64))
    sizes = [_reduced(*size, settings.max_side) for size in sizes]
    largest = max(3 * width * height for width, height in sizes)
    if max(map(max, sizes)) > LARGEST_SIDE or largest > LARGEST_IMAGE:
        raise UserError(f"an image of {largest / 3e6:.0f} megapixels is too large for a .beton; give --max-side 2048")
    return largest


def _image_reader(
    dataset: ImageDataset, settings: BetonSettings, jpeg: np.ndarray, ffcv_loader: Any
) -> Callable[[int], Any]:
    """A function that gives the image of an index as it is to be stored: pixels, or the bytes of a JPEG file."""

    def fit(image: Image.Image) -> np.ndarray:
        size = _reduced(*image.size, settings.max_side)
        return np.asarray(image if size == image.size else image.resize(size, Image.Resampling.BICUBIC))

    def ready(path: Path) -> Any:
        """The file as it is, if it is an upright JPEG that needs no reduction and that the reading side decodes."""
        with open_image(path) as image:
            (width, height), fits = image.size, image.format == "JPEG" and image.mode in ("RGB", "L")
            fits = fits and orientation(image) == 1
        if not fits or _reduced(width, height, settings.max_side) != (width, height):
            return None
        data = path.read_bytes()
        fits = len(data) <= 3 * width * height and ffcv_loader.decodes(data, height, width)
        return ffcv_loader.StoredJpeg(data, height, width) if fits else None

    def read(index: int) -> Any:
        if dataset.images is not None:
            pixels = dataset.images[index]
            return fit(Image.fromarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels))
        assert dataset.paths is not None
        path = dataset.paths[index]
        try:
            keep = settings.mode == "unchanged" or (jpeg[index] and settings.quality is None)
            stored = ready(path) if keep else None
            return fit(read_rgb(path)) if stored is None else stored
        except Exception as error:
            raise UserError(f"{path} cannot be read: {readable_error(error)}") from None

    return read


@dataclasses.dataclass(kw_only=True, slots=True)
class WriteConfig:
    """Options of ``ffcv-write``. Those that say which images are meant are those of train_cls.py."""

    dataset: Dataset = option("fashion-mnist-mini", "as in train_cls.py; folder reads your own images")
    data_dir: str | None = option(None, "folder of the data")
    train_dir: str | None = option(None, "class folders to train on (dataset folder)")
    val_dir: str | None = option(None, "class folders to test on (dataset folder)")
    val_fraction: float = option(0.0, "lets one folder serve for training and test; all of its images are written")
    image_size: int | None = option(None, "side of small images in memory; give what the training will be given")
    download: bool = option(False, "let torchvision download what is not there")
    skip_bad_images: bool = option(False, "leave images out that cannot be decoded, and say how many")
    split: Literal["train", "test"] = option("train", "which part of the data set to write")
    out: str | None = option(None, "the file, X.beton; X.beton.json beside it will say what it holds")
    mode: Mode = option(
        "raw", "raw bytes (fast, large), jpg, by chance one or the other, or unchanged (see docs/ffcv.md)"
    )
    max_side: int | None = option(None, "reduce images to this longer side in pixels; default: as they are")
    quality: int | None = option(None, "of JPEGs, 1 to 100; default: JPEG files stay byte for byte, others get 95")
    compress_probability: float = option(0.5, "share of JPEGs in mode proportion")
    workers: int = option(os.cpu_count() or 1, "threads that read and encode; default: one for each CPU", "-j")
    verbose: bool = option(True, "progress bar (never drawn when the output is not a terminal)")


def ffcv_write(arguments: Sequence[str]) -> None:
    """``python -m idml ffcv-write --dataset ... --out X.beton``: one split of a data set as a .beton.

    Raises:
        UserError: bad options, bad data, or no space.
    """
    from idml.data.datasets import read_splits

    description = "Write one split of a data set as a .beton file, which train_cls.py --loader ffcv reads."
    file, flags, print_config = parse_command_line(
        WriteConfig, arguments, prog="python -m idml ffcv-write", description=description
    )
    config = build_config(WriteConfig, file | flags)
    if print_config:
        print(dump_config(config), end="")
        return
    if config.out is None:
        raise UserError("--out is missing: the .beton to write, as in --out train.beton")
    settings = BetonSettings(
        mode=config.mode,
        max_side=config.max_side,
        quality=config.quality,
        compress_probability=config.compress_probability,
    )
    shared = {field.name for field in dataclasses.fields(WriteConfig)} & {f.name for f in dataclasses.fields(ClsConfig)}
    # A batch of one: how large batches will be is not known here, and must not matter.
    reading = build_config(ClsConfig, {name: getattr(config, name) for name in shared} | {"batch_size": 1})
    check_ranges(reading)
    data = read_splits(reading)
    dataset: ImageDataset = getattr(data, config.split)
    whole, _ = dataset.origin or (dataset, None)  # what is held out is read from the same file
    started = time.perf_counter()
    sidecar = write_beton(
        whole,
        Path(config.out),
        settings,
        source=config.dataset,
        split=config.split,
        workers=config.workers,
        progress=config.verbose,
    )
    print(
        f"{config.out}: {sidecar.count} {config.split} images of {len(sidecar.classes)} classes, "
        f"{sidecar.bytes / 2**20:.1f} MiB, {settings.mode}, written in {time.perf_counter() - started:.1f} s"
    )
    if config.split == "train":
        print("the test images are written by the same command with --split test and another --out")
