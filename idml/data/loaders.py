"""Which loader reads a data set, and the .beton that FFCV's needs: found, or written on first use."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from idml import distributed
from idml.data.beton import (
    WRITE,
    BetonSettings,
    CannotWriteError,
    beton_matches,
    check_beton,
    fingerprint,
    import_ffcv,
    read_sidecar,
    shared_folder,
)
from idml.data.ffcv_write import write_beton
from idml.data.image_dataset import ImageDataset
from idml.data.torch_loader import Loader, TorchLoader
from idml.errors import UserError

LoaderName = Literal["auto", "ffcv", "torch"]

POLL_SECONDS = 0.5
"""Between two looks of a waiting process for the file that rank 0 writes."""


def build_loader(
    dataset: ImageDataset,
    *,
    loader: LoaderName,
    source: str,
    split: str,
    cache_dir: str | Path | None = None,
    beton: str | Path | None = None,
    settings: BetonSettings | None = None,
    subset: np.ndarray | None = None,
    verbose: bool = True,
    **arguments: Any,
) -> Loader:
    """The loader asked for, and a printed line (by rank 0) that says which it is and why.

    ``auto`` takes FFCV where it imports. The .beton is looked for in ``cache_dir``, else beside the folder of the
    files, else in the user's cache: any one there that was written from this data serves. If none does, it is written,
    such that no image changes (``BetonSettings.mode`` "unchanged"); where it cannot be, ``auto`` takes torch's loader.
    Under torchrun rank 0 writes and the others wait until the file is there, however long that takes.

    Args:
        dataset: what to read.
        loader: auto, ffcv or torch.
        source, split: name of the data set and of this part of it, for messages, file name and sidecar.
        cache_dir: folder of .beton files.
        beton: a file to take in place of all that.
        settings: how images must be stored; by default any way serves.
        subset: (K,) int64: read only these images of ``dataset``, from the .beton of all of them.
        verbose: print the line.
        arguments: those of ``TorchLoader``: batch_size, image_size, train, seed, workers, rank, world_size, pin_memory.

    Raises:
        UserError: FFCV was asked for and does not import, or no .beton can be written; ``beton`` does not fit.
    """
    chosen = dataset if subset is None else dataset.subset(subset)
    verbose = verbose and arguments.get("rank", 0) == 0

    def say(text: str) -> None:
        if verbose:
            print(f"{split} images: {text}", flush=True)

    if loader == "torch":
        say("torch loader (asked for)")
        return TorchLoader(chosen, **arguments)
    try:
        ffcv_loader = import_ffcv()
    except UserError as error:
        if loader == "ffcv":
            raise
        say(f"torch loader, because {error}")
        return TorchLoader(chosen, **arguments)
    if beton is not None:
        path, how = Path(beton), "asked for"
        check_beton(path, dataset.classes, len(dataset))
    else:
        main = arguments.get("rank", 0) == 0
        try:
            path, how = _find_or_write(
                dataset, settings, source=source, split=split, cache_dir=cache_dir, main=main, say=say
            )
        except CannotWriteError as error:
            if loader == "ffcv" or (arguments.get("world_size", 1) > 1 and not isinstance(error, NowhereError)):
                raise UserError(f"{error}; --cache-dir DIR names a place for .beton files, or --loader torch") from None
            say(f"torch loader, because FFCV {error}; --cache-dir DIR names a place for .beton files")
            return TorchLoader(chosen, **arguments)
    mode = read_sidecar(path).settings.mode
    say(f"FFCV loader ({'it imports' if loader == 'auto' else 'asked for'}), from {path} ({mode}, {how})")
    return ffcv_loader.FfcvLoader(chosen, beton=path, rows=subset, **arguments)


def split_loader(
    dataset: ImageDataset,
    *,
    loader: LoaderName,
    in_package: bool,
    source: str,
    split: str,
    cache_dir: str | None,
    **arguments: Any,
) -> Loader:
    """The loader of one split of a run; a data set inside a package is too small for FFCV to gain anything.

    Arguments are those of ``build_loader``; a subset is read from the .beton of what it was taken from.
    """
    if loader == "auto" and in_package:
        if arguments.get("rank", 0) == 0:
            print(f"{split} images: torch loader, because {source} is small and in memory")
        return TorchLoader(dataset, **arguments)
    whole, rows = dataset.origin or (dataset, None)
    return build_loader(whole, subset=rows, loader=loader, source=source, split=split, cache_dir=cache_dir, **arguments)


class NowhereError(CannotWriteError):
    """There is no folder that a .beton could be written to: known before, and by every rank."""


def _find_or_write(
    dataset: ImageDataset,
    settings: BetonSettings | None,
    *,
    source: str,
    split: str,
    cache_dir: str | Path | None,
    main: bool,
    say: Callable[[str], None],
) -> tuple[Path, str]:
    """A .beton of the data set, and how it came about; ``main`` marks the process that writes it where there is none.

    Rank 0 decides. The others do not wait at a barrier until it has written: that would give up after minutes, where
    writing a large data set takes hours. If the writing process fails, torchrun ends them.
    """
    digest = fingerprint(dataset)

    def decide() -> tuple[Path | None, Path | None, str]:
        """(a file that is there; else where it is to be written; else why it cannot be)."""
        default = default_beton(dataset, source=source, split=split, cache_dir=cache_dir)
        if default is None:
            return None, None, "there is no home folder for it"
        found = find_beton(default, dataset, settings, digest)
        return found, default, "" if found else why_read_only(default.parent)

    found, default, reason = distributed.from_main(decide)
    if found is not None:
        return found, "written earlier from the same images"
    if default is None or reason:
        raise NowhereError(f"cannot write {default or 'its file'}: {reason}")
    if main:
        unfit = beton_matches(default, dataset, settings, digest=digest) or ""
        say(f"writing {default} ({unfit.removesuffix(f'; {WRITE}') if default.exists() else 'there is none yet'})")
        chosen, threads = settings or BetonSettings(mode="unchanged"), os.cpu_count() or 1
        write_beton(dataset, default, chosen, source=source, split=split, workers=threads, digest=digest)
    while not main and beton_matches(default, dataset, settings, digest=digest) is not None:
        time.sleep(POLL_SECONDS)
    return default, "written now"


def why_read_only(folder: Path) -> str:
    """Why no file can be made in a folder, which is made itself if it is not there; empty if one can be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def default_beton(dataset: ImageDataset, *, source: str, split: str, cache_dir: str | Path | None) -> Path | None:
    """Where the .beton of a data set is written when nobody says.

    In ``cache_dir``; without it beside the folder that holds the files (photos/train.beton for photos/train); for
    images in memory, or where that cannot be written, in the user's cache ($XDG_CACHE_HOME/idml, ~/.cache/idml); None
    for a user without a home, as containers have them.
    """
    cache = Path(cache_dir) if cache_dir else user_cache()
    if dataset.images is not None:
        return None if cache is None else cache / f"{source}-{split}-{dataset.images.shape[1]}px.beton"
    folder = Path(os.path.abspath(shared_folder(dataset)))
    name = split if folder.name == split else f"{folder.name}-{split}"
    if cache_dir is None and os.access(folder.parent, os.W_OK):
        return folder.parent / f"{name}.beton"
    # Two folders of one name must not share a file.
    return None if cache is None else cache / f"{name}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}.beton"


def user_cache() -> Path | None:
    """Where this package keeps files of a user; None where there is no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "idml")
    except RuntimeError:
        return None


def find_beton(default: Path, dataset: ImageDataset, settings: BetonSettings | None, digest: str) -> Path | None:
    """A .beton of the data set: ``default`` or, by name, any other in its folder; None if there is none."""
    for path in [default, *sorted(default.parent.glob("*.beton"))]:
        if beton_matches(path, dataset, settings, digest=digest) is None:
            reduced = read_sidecar(path).settings.max_side is not None
            if dataset.images is None or not reduced:  # images in memory are not resized while they are read
                return path
    return None
