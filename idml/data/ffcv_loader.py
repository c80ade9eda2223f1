"""FFCV: .beton files written and read. The only file that imports `ffcv`; import it through `beton.import_ffcv`.

Of FFCV this takes the file format (`DatasetWriter`, `RGBImageField`, `IntField`, `MemoryAllocator`, `Reader`) and the
libjpeg-turbo that it is linked with. What it replaces, and why (figures in docs/ffcv.md):

- `ffcv.Loader`: it compiles for seconds per loader, its crops ignore the seed, an iterator left early keeps its thread
  and memory for good, an error in that thread leaves the consumer waiting, and the memory of a batch is used again
  while the consumer may still hold it. Here a pool of threads, kept for the loader's life, fills a new tensor for each
  batch.
- `DatasetWriter.from_indexed_dataset`: it waits for ever when one of its processes fails (a full disk, a bad image).
  Here threads encode, and one thread writes, in order, so that the same images give the same file.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import itertools
import os
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numba.typed
import numpy as np
import torch
from torch import Tensor

from idml.data import crops, kernels
from idml.data.beton import check_beton
from idml.data.image_dataset import CROP_SHARE, ImageDataset, Interpolation, Preprocessing
from idml.data.torch_loader import CROP_SCALE, DealtBatches
from idml.errors import TrainingError, UserError

# FFCV sets torch to one thread when it is imported, and spends seconds compiling a typed dictionary of two entries that
# only its Python code reads; a plain one serves as well. It also starts numba's threads, which nothing here uses, and
# which, being oneTBB's, keep a process that may use one CPU only from ever ending.
_torch_threads, _typed_dict, _set_num_threads = torch.get_num_threads(), numba.typed.Dict, numba.set_num_threads
numba.typed.Dict, numba.set_num_threads = dict, lambda n: None
try:
    from ffcv import writer as ffcv_writer
    from ffcv.fields import IntField, RGBImageField
    from ffcv.libffcv import lib as libffcv
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.pipeline import compiler
    from ffcv.reader import Reader
    from ffcv.types import ALLOC_TABLE_TYPE
    from ffcv.writer import MIN_PAGE_SIZE, DatasetWriter

    compiler.set_num_threads = _set_num_threads
finally:
    numba.typed.Dict, numba.set_num_threads = _typed_dict, _set_num_threads
    torch.set_num_threads(_torch_threads)

# libffcv's own JPEG function is left aside: it takes the fast transform, and never frees a thread's decoder.
kernels.link(lambda name: ctypes.cast(getattr(libffcv, name), ctypes.c_void_p).value or 0)

T = TypeVar("T")


class _OwnMemory:
    """In place of FFCV's shared memory for metadata: here threads write, and /dev/shm of a container may be small."""

    def __init__(self, *, create: bool, size: int) -> None:
        self.buf = memoryview(bytearray(size))

    def close(self) -> None:
        """Nothing is shared."""

    unlink = close


ffcv_writer.shared_memory = types.SimpleNamespace(SharedMemory=_OwnMemory)

PART_BYTES = 2**19
"""Of a batch's images, that a thread gets at least: for less, handing it over takes longer than decoding."""

BATCHES_AHEAD = 3
"""Batches being decoded while one is used; FFCV's own default."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredJpeg:
    """An image that is a JPEG already: its bytes, and its size in pixels."""

    data: bytes
    height: int
    width: int


class _Writer(DatasetWriter):
    """FFCV's writer without its processes: one thread hands it finished images, in order."""

    def write(self, samples: Iterable[tuple[np.ndarray, np.ndarray, int]], count: int) -> None:
        """Write ``count`` samples: metadata row of the image (without its place), its bytes, its label."""
        self.num_samples = count
        self.prepare()
        try:
            metadata = np.zeros(count, self.metadata_type)
            image_field, label_field = self.metadata_type.names
            allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
            with allocator:
                for index, (row, stored, label) in enumerate(samples):
                    allocator.set_current_sample(index)
                    row["data_ptr"], page = allocator.malloc(len(stored))
                    page[:] = stored
                    metadata[image_field][index], metadata[label_field][index] = row, label
            self.metadata_sm.buf[:] = metadata.tobytes()
            self.finalize(allocator.allocations)
        finally:
            self.metadata_sm.close()
            self.metadata_sm.unlink()
        # The allocator's file is unbuffered, where a full disk may show as a short write and nothing else.
        pages = allocator.next_page_written.value * self.page_size
        expected = allocator.offset + pages + count * ALLOC_TABLE_TYPE.itemsize
        if os.path.getsize(self.fname) != expected:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_images(
    path: Path,
    read: Callable[[int], np.ndarray | StoredJpeg],
    labels: np.ndarray,
    *,
    jpeg: np.ndarray,
    quality: int,
    largest: int,
    workers: int,
    progress: Callable[[Iterable], Iterable],
) -> None:
    """Write a .beton with the fields ``image`` and ``label``.

    Args:
        path: of the file, overwritten in place.
        read: gives the image of an index, (H, W, 3) uint8 or ready JPEG bytes; called from several threads.
        labels: (N,) int64.
        jpeg: (N,) bool, which images are stored as JPEG, the others as raw bytes.
        quality: of the JPEGs encoded here, 1 to 100.
        largest: bytes of the largest image.
        workers: threads that read and encode.
        progress: wraps the iterable of samples.

    Raises:
        OSError: the file cannot be written; also what ``read`` raises.
    """
    page_size = max(MIN_PAGE_SIZE, 1 << (largest - 1).bit_length())
    fields = [RGBImageField("raw"), RGBImageField("jpg", jpeg_quality=quality)]
    writer = _Writer(str(path), {"image": fields[0], "label": IntField()}, page_size)

    def encode(index: int) -> tuple[np.ndarray, np.ndarray, int]:
        image, row, buffers = read(index), np.zeros(1, fields[0].metadata_type), []
        if isinstance(image, StoredJpeg):
            row["mode"], row["height"], row["width"] = kernels.JPEG, image.height, image.width
            return row[0], np.frombuffer(image.data, np.uint8), labels[index]

        def malloc(size: int) -> tuple[int, np.ndarray]:
            buffers.append(np.empty(size, np.uint8))
            return 0, buffers[-1]

        fields[int(jpeg[index])].encode(row, image, malloc)
        return row[0], buffers[-1], labels[index]

    with ThreadPoolExecutor(workers) as pool:
        try:
            writer.write(progress(_in_order(pool, encode, len(labels), ahead=4 * workers)), len(labels))
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(pool: ThreadPoolExecutor, function: Callable[[int], T], count: int, *, ahead: int) -> Iterator[T]:
    """``function`` of 0 to ``count - 1``, computed by the pool, at most ``ahead`` in advance."""
    pending: deque[Future[T]] = deque()
    for index in range(count):
        pending.append(pool.submit(function, index))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def decodes(data: bytes, height: int, width: int) -> bool:
    """Whether libjpeg-turbo decodes these JPEG bytes to that size without even a warning (Pillow is less strict)."""
    stored = np.frombuffer(data, np.uint8)
    columns = [np.array([value], np.int64) for value in (kernels.JPEG, height, width, 0, len(data), 0)]
    plan = np.array([[0, 0, height, width, height, width, 0, 0]], np.int64)
    return kernels.decode_images(stored, *columns, plan, np.empty((1, 3, 1, 1), np.uint8), False) < 0


@dataclasses.dataclass(frozen=True, slots=True)
class Beton:
    """An open .beton of N images.

    Attributes:
        data: the file's bytes, mapped into memory, (F,) uint8.
        modes, heights, widths, pointers, sizes: (N,) int64, see ``kernels.decode_images``.
        labels: (N,) int64.
    """

    data: np.ndarray
    modes: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    pointers: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


def open_beton(path: Path) -> Beton:
    """The images of a .beton file; nothing is decoded yet.

    Raises:
        UserError: it is not such a file, or it points outside itself.
    """
    damaged = UserError(f"{path} is damaged; write it again with: python -m idml ffcv-write")
    try:
        reader = Reader(str(path))
        data = np.asarray(np.memmap(path, np.uint8, mode="r"))
        image, label = (reader.metadata[name] for name in reader.metadata.dtype.names)
        columns = [image[name].astype(np.int64) for name in ("mode", "height", "width", "data_ptr")]
        modes, heights, widths, pointers = columns
        sizes = np.zeros(len(image), np.int64)
        sizes[reader.alloc_table["sample_id"]] = reader.alloc_table["size"]
    except (OSError, AssertionError, ValueError, IndexError, KeyError, TypeError, MemoryError):
        raise damaged from None
    raw = modes != kernels.JPEG
    inside = (sizes > 0) & (pointers >= 0) & (pointers + sizes <= len(data)) & (heights > 0) & (widths > 0)
    if not (inside.all() and (modes <= 1).all() and (sizes[raw] == (3 * heights * widths)[raw]).all()):
        raise damaged
    return Beton(data, modes, heights, widths, pointers, sizes, label.astype(np.int64))


class FfcvLoader(DealtBatches):
    """Batches of an ``ImageDataset`` out of a .beton; the contract of `idml.data.torch_loader`, and the same images.

    From a .beton of raw bytes, or of JPEG files stored as they are, every image is that of ``TorchLoader`` bit for bit,
    in training too. Where the .beton holds reduced images, crops are the same shares of them.

    Args:
        dataset: what the .beton was written from (or ``rows`` of it); gives labels, order and classes.
        beton: the file.
        rows: (N,) int64, the place in the .beton of each image of ``dataset``; by default they are all there in order.
        workers: threads that decode.

    The other arguments are those of ``TorchLoader``.

    Raises:
        UserError: the file is missing, truncated, or of other data.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        beton: Path,
        batch_size: int,
        image_size: int,
        train: bool,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        rows: np.ndarray | None = None,
        per_class: int | None = None,
        crop_share: float = CROP_SHARE,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        self.dataset, self.batch_size, self.train, self.seed = dataset, batch_size, train, seed
        self.rank, self.world_size, self.per_class = rank, world_size, per_class
        self.path, self.image_size = beton, image_size
        self._preprocessing = Preprocessing(image_size=image_size, crop_share=crop_share, interpolation=interpolation)
        self.sidecar = check_beton(beton, dataset.classes, len(dataset) if rows is None else None)
        self._beton = open_beton(beton)
        self._rows = np.arange(len(dataset)) if rows is None else rows
        self._check_contents()
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._workers = max(workers, 1)
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="ffcv")

    def _check_contents(self) -> None:
        """UserError unless labels, and for images in memory sizes, are the data set's."""
        rows, beton = self._rows, self._beton
        if rows.max() >= len(beton.labels) or (beton.labels[rows] != self.dataset.labels).any():
            raise UserError(f"the labels in {self.path} are not those of the data set; write it again")
        if self.dataset.images is None:
            return
        sides = np.concatenate([beton.heights[rows], beton.widths[rows]])
        if (sides != self.image_size).any():
            raise UserError(
                f"{self.path} holds images of {sides.min()} to {sides.max()} pixels, expected {self.image_size}: write "
                f"it again with --image-size {self.image_size} and without --max-side"
            )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from number ``start`` on; give a new ``epoch`` for each pass in training."""
        pending: deque[tuple[Tensor, Tensor, list[Future[None]]]] = deque()
        try:
            for indices in self.batches(epoch)[start:]:
                pending.append(self._start(indices, epoch))
                if len(pending) > BATCHES_AHEAD:
                    yield _finished(*pending.popleft())
            while pending:
                yield _finished(*pending.popleft())
        finally:  # the consumer may stop half-way
            for *_, parts in pending:
                for part in parts:
                    part.cancel()

    def images_at(self, indices: Sequence[int]) -> Tensor:
        """(len(indices), 3, S, S) uint8: chosen images of the data set as evaluation sees them, for pictures."""
        images = torch.empty((len(indices), 3, self.image_size, self.image_size), dtype=torch.uint8)
        self._decode(np.asarray(indices, np.int64), None, images.numpy())
        return images

    def _start(self, indices: np.ndarray, epoch: int) -> tuple[Tensor, Tensor, list[Future[None]]]:
        """Have a batch decoded, each thread a part of it: (images, being filled; labels; the parts)."""
        shape = (len(indices), 3, self.image_size, self.image_size)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin_memory)
        labels = torch.from_numpy(self.dataset.labels[indices])
        draw = epoch if self.train else None
        target = images.numpy()
        count = min(self._workers, len(indices), max(images.numel() // PART_BYTES, 1))
        bounds = [number * len(indices) // count for number in range(count + 1)]
        parts = [
            self._pool.submit(self._decode, indices[start:end], draw, target[start:end])
            for start, end in itertools.pairwise(bounds)
        ]
        return images, labels.pin_memory() if self._pin_memory else labels, parts

    def _decode(self, indices: np.ndarray, epoch: int | None, images: np.ndarray) -> None:
        """Fill ``images`` (B, 3, S, S) with those at ``indices``: cropped at random in ``epoch``, or for evaluation."""
        rows, beton, side, cubic = self._rows[indices], self._beton, images.shape[2], False
        if self.dataset.images is not None:
            plan = crops.plan_whole(side, len(rows))
        elif epoch is not None:
            sizes = beton.heights[rows], beton.widths[rows]
            plan = kernels.plan_train(*sizes, indices, self.seed, epoch, side, *CROP_SCALE)
        else:
            resized, cubic = self._preprocessing.resized_side, self._preprocessing.interpolation == "bicubic"
            plan = kernels.plan_eval(beton.heights[rows], beton.widths[rows], side, resized)
        stored = beton.data, beton.modes, beton.heights, beton.widths, beton.pointers, beton.sizes
        failed = kernels.decode_images(*stored, rows, plan, images, cubic)
        if failed >= 0:
            raise TrainingError(f"image {rows[failed]} in {self.path} does not decode; write the file again")


def _finished(images: Tensor, labels: Tensor, parts: list[Future[None]]) -> tuple[Tensor, Tensor]:
    """The batch once all its parts are decoded."""
    for part in parts:
        part.result()
    return images, labels
