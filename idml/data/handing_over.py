"""Batches on their way from worker processes: through shared memory, or through a pipe where that is too small."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

SHARED_MEMORY = "/dev/shm"
"""Where Linux keeps what processes share: half of the machine's memory, or 64 MB in a container of Docker's."""

HandedOver: TypeAlias = "tuple[Tensor | np.ndarray, Tensor | np.ndarray]"


def hand_over(images: Tensor, labels: Tensor) -> HandedOver:
    """A batch as the main process is to get it: in shared memory, or as arrays, which go through a pipe.

    In a worker; elsewhere it is given back as it is. Left to torch, a batch that finds no room is lost without an
    error that anybody could catch, and the main process waits for it for ever.
    """
    if get_worker_info() is None:
        return images, labels
    try:
        return images.share_memory_(), labels.share_memory_()
    except (RuntimeError, OSError):
        return images.numpy(), labels.numpy()


def taken(batch: HandedOver, *, pin_memory: bool) -> tuple[Tensor, Tensor]:
    """The batch as tensors, in the main process; with a warning, once, if it came through a pipe."""
    images, labels = (torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in batch)
    if isinstance(batch[0], np.ndarray) or isinstance(batch[1], np.ndarray):
        _warn_of_pipe(images)
        if pin_memory:
            images, labels = images.pin_memory(), labels.pin_memory()
    return images, labels


_warned: set[str] = set()


def _warn_of_pipe(images: Tensor) -> None:
    if "pipe" not in _warned:
        _warned.add("pipe")
        size = images.numel() * images.element_size() / 1e6
        warnings.warn(
            f"shared memory is too small for batches of {size:.1f} MB ({room()}): they go through a pipe, which is "
            "slower. docker run --shm-size 1g (or --ipc host) gives more; --workers 0 or smaller batches need none",
            UserWarning,
            stacklevel=4,
        )


def room() -> str:
    """How much shared memory there is, in words."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return f"there is no {SHARED_MEMORY}"
    total, free = (blocks * status.f_frsize / 1e6 for blocks in (status.f_blocks, status.f_bavail))
    return f"{SHARED_MEMORY} has {total:.1f} MB, {free:.1f} MB free"


def no_workers(count: int, error: OSError) -> None:
    """Say that images are read by the main process, since no others could be started.

    Args:
        count: of processes.
        error: that came while they were started; what was made in part is dropped.
    """
    if "workers" not in _warned:
        _warned.add("workers")
        warnings.warn(
            f"{count} processes that read images could not be started ({error.strerror or error}; {room()}): the main "
            "process reads them, as with --workers 0, which is slower",
            UserWarning,
            stacklevel=3,
        )
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None  # torch's finalizer fails on what is in part
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def any_number_of_workers() -> Iterator[None]:
    """Without torch's warning of more workers than CPUs: they wait for disks too, and a default must suit everybody."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield
