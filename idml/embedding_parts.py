"""Parts of a file that is made of images: what a stopped ``embed``, ``predict`` or ``introspect`` goes on from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from idml import distributed
from idml._version import __version__
from idml.data.collection import Collection
from idml.data.image_dataset import ImageDataset
from idml.data.pixels import PIXELS_VERSION
from idml.embedding_file import Columns, written_whole
from idml.trained import TrainedModel

MOST_BATCHES, USUAL_PARTS = 16, 64
"""A part is of so many batches at most, and there are about so many parts of a small folder: enough to be dealt out to
several processes, few enough for the file system."""


class Parts:
    """The parts of ``E.parquet``, each a file in ``E.parquet.parts/``, written whole or not at all.

    Which images are in a part, and in which batches they go through the network, depends on the number of images and
    the batch size alone: any number of processes, stopped however often, makes the same file.

    Args:
        out: the file that is being made.
        key: of model and images, see ``parts_key``.
        count: number of images.
        batch_size: of the network's batches.
    """

    def __init__(self, out: Path, key: str, count: int, batch_size: int) -> None:
        batches = math.ceil(count / batch_size)
        size = batch_size * min(MOST_BATCHES, math.ceil(batches / USUAL_PARTS))
        self.folder, self.key = out.with_name(out.name + ".parts"), key
        self.rows = [range(start, min(start + size, count)) for start in range(0, count, size)]

    def path(self, number: int) -> Path:
        """Where a part is, or will be."""
        return self.folder / f"{self.key}-{number:06d}.npz"

    def write(self, number: int, columns: Columns) -> None:
        """Store a part; StorageError where the disk does not take it."""
        assert _length(columns) == len(self.rows[number])
        arrays: dict[str, Any] = dict(columns)
        with written_whole(self.path(number)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    def read(self, number: int) -> Columns:
        """A part; OSError or ValueError where it is missing or damaged (the format has checksums)."""
        try:
            with np.load(self.path(number), allow_pickle=False) as arrays:
                columns = {name: arrays[name] for name in arrays.files}
        except (zipfile.BadZipFile, EOFError, KeyError) as error:
            raise ValueError(f"{self.path(number)} is damaged: {error}") from None
        if _length(columns) != len(self.rows[number]):
            raise ValueError(f"{self.path(number)} is not of as many images as it should be")
        return columns

    def begin(self) -> list[int]:
        """Make the folder, remove what is of another model or other images, and say which parts are there already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        done = []
        for number in range(len(self.rows)):
            with contextlib.suppress(OSError, ValueError):
                self.read(number)
                done.append(number)
        kept = {self.path(number) for number in done}
        for path in self._files():
            if path not in kept:
                path.unlink()
        return done

    def others(self) -> int:
        """Number of parts in the folder that are of another model, or of other images."""
        return sum(not path.name.startswith(self.key) for path in self._files() if path.suffix == ".npz")

    def remove(self) -> None:
        """The folder and the parts in it; anything that somebody else has put there stays."""
        for path in self._files():
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        """Parts and what is left of parts that were not written to their end."""
        return sorted([*self.folder.glob("????????????????-??????.npz"), *self.folder.glob(".*.npz.*.tmp")])


def _length(columns: Columns) -> int:
    return len(next(iter(columns.values()), ()))


def begin_parts(parts: Parts, what: str) -> list[int]:
    """Numbers of the parts that are there already, and a line that says so.

    Args:
        parts: of a file.
        what: was done with the images, for the line.
    """
    others = parts.others()
    done = parts.begin()
    if others:
        print(f"{others} parts in {parts.folder} were of another model or of other images: not used, removed")
    if done:
        print(f"going on: {sum(len(parts.rows[number]) for number in done)} images were {what} before", flush=True)
    return done


def make_parts(
    parts: Parts,
    done: Sequence[int],
    dataset: ImageDataset,
    columns: Callable[[ImageDataset], Iterator[Columns]],
    *,
    doing: str,
    verbose: bool,
) -> None:
    """This rank's share of the parts that are not there yet.

    Args:
        parts: of a file about ``dataset``.
        done: numbers of the parts that are there.
        dataset: all of the images.
        columns: of some of them, in batches of the size that ``parts`` was made for.
        doing: what the progress bar says.
        verbose: draw it.
    """
    missing = sorted(set(range(len(parts.rows))) - set(done))
    own = missing[distributed.rank() :: distributed.world_size()]
    if not own:
        return
    # Parts are whole numbers of batches, but for the last one of all: one loader's batches are theirs.
    chosen = dataset.subset(np.concatenate([np.array(parts.rows[number]) for number in own]))
    quiet = None if verbose and distributed.is_main() else True
    waiting: list[Columns] = []
    numbers = iter(own)
    number = next(numbers)
    with tqdm(total=len(chosen), desc=doing, unit="image", leave=False, disable=quiet) as progress:
        for batch in columns(chosen):
            waiting.append(batch)
            progress.update(_length(batch))
            if sum(map(_length, waiting)) == len(parts.rows[number]):
                parts.write(number, {name: np.concatenate([each[name] for each in waiting]) for name in waiting[0]})
                waiting, number = [], next(numbers, -1)


def parts_key(model: TrainedModel, collection: Collection, batch_size: int, *more: Any) -> str:
    """16 hexadecimal digits that change with the model, with the list of images, their sizes and times, and with
    ``more`` plain values."""
    digest = hashlib.sha256()
    about = [
        __version__,
        PIXELS_VERSION,
        model.fingerprint,
        model.device.type,
        batch_size,
        model.spec.as_json(),
        collection.source,
        *more,
    ]
    digest.update(json.dumps([about, collection.names, collection.splits, collection.labels], default=str).encode())
    if collection.dataset.images is not None:
        digest.update(np.ascontiguousarray(collection.dataset.images).data)
    for path in collection.dataset.paths or ():
        found = path.stat()
        digest.update(f"{found.st_size} {found.st_mtime_ns} ".encode())
    return digest.hexdigest()[:16]
