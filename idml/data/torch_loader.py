"""The loader that needs nothing but torch and torchvision: arrays in memory, or files decoded by worker processes.

Contract of every loader: ``len(loader)`` batches; ``loader.epoch(e)`` yields ``(images, labels)``, images uint8
(b, 3, S, S), labels int64 (b,); the order in training depends on seed and epoch alone; evaluation is in the data set's
order with the last partial batch kept.
"""

from __future__ import annotations

import atexit
import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from idml.data.crops import random_resized_crop
from idml.data.handing_over import HandedOver, any_number_of_workers, hand_over, no_workers, taken
from idml.data.image_dataset import (
    CROP_SHARE,
    Fit,
    ImageDataset,
    Interpolation,
    Preprocessing,
    fit_square,
)
from idml.data.pixels import read_rgb
from idml.data.sampling import (
    balanced_batches,
    eval_batches,
    global_batch_sizes,
    num_balanced_batches,
    num_train_batches,
    train_batches,
)
from idml.errors import TrainingError
from idml.signals import worker_init

CROP_SCALE = (0.08, 1.0)
"""Share of the area in a random resized crop (Szegedy et al. 2015; torchvision's default)."""


def as_evaluated(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """(3, S, S) uint8: an RGB image as evaluation shows it to a model; not yet normalised.

    Args:
        image: of any size.
        preprocessing: gives S and how to get there. Of an image that is no square, "whole" takes the central square.
    """
    size = preprocessing.image_size
    if preprocessing.fit == "crop":
        filter_mode = InterpolationMode(preprocessing.interpolation)
        image = transforms.resize(image, [preprocessing.resized_side], interpolation=filter_mode)
        return transforms.pil_to_tensor(transforms.center_crop(image, [size, size]))
    square = transforms.center_crop(image, [min(image.size)] * 2)
    return torch.from_numpy(fit_square(np.array(square)[None], size)[0]).permute(2, 0, 1).contiguous()


class Loader(Protocol):
    """What every loader offers; see the module's contract."""

    dataset: ImageDataset

    def __len__(self) -> int: ...

    def batches(self, epoch: int) -> list[np.ndarray]:
        """The indices of each batch of ``epoch`` on this rank."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from number ``start`` on; give a new ``epoch`` for each pass in training."""

    def global_sizes(self) -> list[int]:
        """Images of each training step of an epoch over all ranks."""

    def images_at(self, indices: Sequence[int]) -> Tensor:
        """(len(indices), 3, S, S) uint8: chosen images of the data set as evaluation sees them, for pictures."""


class DealtBatches:
    """What every loader has in common: which images are in which batch on this rank."""

    dataset: ImageDataset
    batch_size: int
    train: bool
    seed: int
    rank: int
    world_size: int
    per_class: int | None = None

    def batches(self, epoch: int) -> list[np.ndarray]:
        """The indices of each batch of ``epoch`` on this rank."""
        ranks = {"rank": self.rank, "world_size": self.world_size}
        if self.train and self.per_class is not None:
            order = {"seed": self.seed, "epoch": epoch}
            return balanced_batches(self.dataset.labels, self.batch_size, self.per_class, **order, **ranks)
        if self.train:
            return train_batches(len(self.dataset), self.batch_size, seed=self.seed, epoch=epoch, **ranks)
        return eval_batches(len(self.dataset), self.batch_size, **ranks)

    def __len__(self) -> int:
        if self.train and self.per_class is not None:
            return num_balanced_batches(len(self.dataset), self.batch_size)
        if self.train:
            return num_train_batches(len(self.dataset), self.batch_size, self.world_size)
        return len(self.batches(0))

    def global_sizes(self) -> list[int]:
        """Images of each training step of an epoch over all ranks."""
        if self.per_class is not None:
            return [self.batch_size] * len(self)
        return global_batch_sizes(len(self.dataset), self.batch_size, self.world_size)


class _Batches(Dataset):
    """Fetches whole batches: one array lookup for images in memory, else one decoded file after the other."""

    def __init__(self, dataset: ImageDataset, preprocessing: Preprocessing, train: bool, seed: int) -> None:
        self.dataset, self.preprocessing, self.train, self.seed = dataset, preprocessing, train, seed
        # (N, C, S, S), so that a batch is N copies of what lies together. No copy where that is its order already.
        self.planes = None if dataset.images is None else np.ascontiguousarray(dataset.images.transpose(0, 3, 1, 2))

    def __getitems__(self, batch: tuple[int, np.ndarray]) -> HandedOver | TrainingError:
        # An error is handed over and raised by ``TorchLoader``: torch would wrap it in a worker's traceback.
        try:
            return hand_over(*self.fetch(*batch))
        except TrainingError as error:
            return error

    def fetch(self, epoch: int, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) uint8 and labels (B,)."""
        labels = torch.from_numpy(self.dataset.labels[indices])
        if self.planes is not None:
            return torch.from_numpy(self.planes.take(indices, axis=0)).expand(-1, 3, -1, -1).contiguous(), labels
        return torch.stack([self._decode(int(index), epoch) for index in indices]), labels

    def _decode(self, index: int, epoch: int) -> Tensor:
        """(3, S, S) uint8: random resized crop in training, resize and centre crop at evaluation."""
        assert self.dataset.paths is not None
        try:
            image = read_rgb(self.dataset.paths[index])
        except (OSError, ValueError) as error:
            raise TrainingError(f"{self.dataset.paths[index]} could not be read during training: {error}") from None
        if not self.train:
            return as_evaluated(image, self.preprocessing)
        top, left, height, width = random_resized_crop(image.height, image.width, self.seed, epoch, index, *CROP_SCALE)
        size = [self.preprocessing.image_size] * 2
        return transforms.pil_to_tensor(transforms.resized_crop(image, top, left, height, width, size, antialias=True))


class _EpochBatchSampler:
    """Yields the ``batches`` of ``epoch`` as (epoch, indices): workers know the epoch."""

    def __init__(self) -> None:
        self.epoch = 0
        self.batches: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        for batch in self.batches:
            yield self.epoch, batch


def _identity(batch: Any) -> Any:
    return batch


_with_workers: weakref.WeakSet[TorchLoader] = weakref.WeakSet()
"""Loaders whose worker processes have been started."""


def close_loaders() -> None:
    """End the worker processes of all loaders.

    Otherwise multiprocessing ends them by SIGTERM when the interpreter ends, and torch, which still watches them,
    raises an error that nobody can catch.
    """
    for loader in list(_with_workers):
        with contextlib.suppress(RuntimeError):  # torch raises it where a worker was killed just now
            loader.close()


def _close_at_exit() -> None:
    """Have ``close_loaders`` called before all that has been registered so far, torch's own callbacks included."""
    atexit.unregister(close_loaders)
    atexit.register(close_loaders)


class TorchLoader(DealtBatches):
    """Batches of an ``ImageDataset``; see the module's contract.

    Worker processes are started by the first epoch and stay for the next ones, until the loader is closed, forgotten,
    or the program ends.

    Args:
        dataset: in memory or as files.
        batch_size: images of a step over all ranks in training; per rank at evaluation.
        image_size: S in pixels; images in memory must have it already.
        train: shuffle and crop at random, or evaluate.
        seed: of order and crops.
        workers: processes that decode files; images in memory use none.
        rank, world_size: this process and how many there are.
        pin_memory: page-locked batches, for copies to a GPU that do not block.
        per_class: in training, images of each class in a batch (see ``balanced_batches``); None: random batches.
        fit, crop_share, interpolation: at evaluation, how a file becomes a square (see ``Preprocessing``).
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_size: int,
        image_size: int,
        train: bool,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        per_class: int | None = None,
        fit: Fit = "crop",
        crop_share: float = CROP_SHARE,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        self.dataset, self.batch_size, self.train, self.seed = dataset, batch_size, train, seed
        self.rank, self.world_size, self.per_class = rank, world_size, per_class
        self._sampler = _EpochBatchSampler()
        workers = workers if dataset.paths is not None else 0
        preprocessing = Preprocessing(
            image_size=image_size, fit=fit, crop_share=crop_share, interpolation=interpolation
        )
        self._fetch = _Batches(dataset, preprocessing, train, seed)
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._loader = self._with(workers)

    def _with(self, workers: int) -> DataLoader[Any]:
        with any_number_of_workers():
            return DataLoader(
                self._fetch,
                batch_sampler=self._sampler,  # type: ignore[arg-type]  # torch passes on whatever it yields
                collate_fn=_identity,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=self._pin_memory,
                worker_init_fn=worker_init if workers else None,
                # Its own, so that starting an epoch anew draws nothing from the generator that training draws from.
                generator=torch.Generator(),
            )

    def _start(self) -> Iterator[Any]:
        """The batches that the sampler has; the first time, worker processes are started, if they can be."""
        try:
            with any_number_of_workers():
                return iter(self._loader)
        except OSError as error:
            if not self._loader.num_workers:
                raise
            no_workers(self._loader.num_workers, error)
        self._loader = self._with(0)
        return iter(self._loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from number ``start`` on; give a new ``epoch`` for each pass in training."""
        self._sampler.epoch, self._sampler.batches = epoch, self.batches(epoch)[start:]
        if self._loader.num_workers:
            _with_workers.add(self)
        batches = self._start()
        if self._loader.num_workers:
            _close_at_exit()
        while True:
            try:
                batch = next(batches, None)
            except (ConnectionError, EOFError, FileNotFoundError):
                # As torch says it where a process dies at another moment; ``run_main`` knows these words.
                raise RuntimeError("DataLoader worker died while it handed a batch over") from None
            if batch is None:
                return
            if isinstance(batch, TrainingError):
                raise batch
            yield taken(batch, pin_memory=self._pin_memory)

    def images_at(self, indices: Sequence[int]) -> Tensor:
        """(len(indices), 3, S, S) uint8: chosen images of the data set as evaluation sees them, for pictures."""
        return self._fetch.fetch(0, np.array(indices))[0]

    def close(self) -> None:
        """End the worker processes, once they have finished what they are at; another epoch starts new ones."""
        _with_workers.discard(self)
        workers, self._loader._iterator = self._loader._iterator, None
        if workers is not None:
            workers._shutdown_workers()  # type: ignore[attr-defined]  # torch itself calls it when it drops them
