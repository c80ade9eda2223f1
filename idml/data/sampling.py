"""Which images are in which batch of which epoch, on which rank: pure functions of seed and epoch."""

from __future__ import annotations

import math

import numpy as np


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """(N,) int64: a permutation that depends on seed and epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(num_samples)


def train_batches(
    num_samples: int, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> list[np.ndarray]:
    """The shuffled batches of one epoch for one rank: over all ranks every sample comes exactly once.

    Each global batch is dealt out to the ranks in turn. A last batch of fewer than two images per rank (which batch
    normalisation could not use) is joined to the one before.

    Args:
        num_samples: N.
        batch_size: images of a step over all ranks, a multiple of ``world_size``.
        seed, epoch: decide the order.
        rank, world_size: this process and how many there are.

    Returns:
        A list of (b,) int64 index arrays, of the same length on every rank.
    """
    order = epoch_order(num_samples, seed=seed, epoch=epoch)
    starts = list(range(0, num_samples, batch_size))
    if len(starts) > 1 and num_samples - starts[-1] < 2 * world_size:
        starts.pop()
    ends = [*starts[1:], num_samples]
    return [order[start:end][rank::world_size] for start, end in zip(starts, ends, strict=True)]


def global_batch_sizes(num_samples: int, batch_size: int, world_size: int = 1) -> list[int]:
    """Images of each step of an epoch over all ranks; their sum is ``num_samples``."""
    steps = num_train_batches(num_samples, batch_size, world_size)
    return [batch_size] * (steps - 1) + [num_samples - (steps - 1) * batch_size]


def eval_batches(num_samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
    """All samples in order, dealt out to the ranks in batches of ``batch_size`` per rank, the last one partial."""
    own = np.arange(rank, num_samples, world_size)
    return [own[start : start + batch_size] for start in range(0, len(own), batch_size)]


def num_train_batches(num_samples: int, batch_size: int, world_size: int = 1) -> int:
    """Length of ``train_batches``, that is steps of an epoch."""
    full = math.ceil(num_samples / batch_size)
    return full - 1 if full > 1 and num_samples - (full - 1) * batch_size < 2 * world_size else full
