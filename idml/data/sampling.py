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


def balanced_batches(
    labels: np.ndarray,
    batch_size: int,
    per_class: int,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[np.ndarray]:
    """Class-balanced batches of one epoch for one rank: ``per_class`` images of each of several classes.

    An epoch has ``num_balanced_batches`` steps. Classes come in turn, in a random order that is drawn anew when all
    have come; so do the images of a class. No image comes twice in a batch unless its class has fewer than
    ``per_class``.

    Args:
        labels: (N,) int64.
        batch_size: images of a step over all ranks, a multiple of ``per_class`` and of ``world_size``, of at most as
            many classes as there are.
        per_class: M >= 1.
        seed, epoch: decide everything.
        rank, world_size: each global batch is dealt out to the ranks in turn, as in ``train_batches``.

    Returns:
        A list of (batch_size / world_size,) int64 index arrays.

    Raises:
        ValueError: the batch does not divide into classes, or there are too few classes.
    """
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    classes = batch_size // per_class
    if batch_size % per_class or not 1 <= classes <= len(members):
        raise ValueError(
            f"batches of {batch_size} images, {per_class} a class, need a multiple of {per_class} and no more than "
            f"{len(members)} classes"
        )
    generator = np.random.default_rng((seed, epoch))
    class_queue = np.zeros(0, np.int64)
    image_queues: list[np.ndarray] = [np.zeros(0, np.int64)] * len(members)
    batches = []
    for _ in range(num_balanced_batches(len(labels), batch_size)):
        class_queue = _refill(class_queue, np.arange(len(members)), classes, generator)
        chosen, class_queue = class_queue[:classes], class_queue[classes:]
        batch = []
        for label in chosen:
            own, queue = members[label], image_queues[label]
            queue = _refill(queue, own, per_class, generator)
            batch.append(queue[:per_class])
            image_queues[label] = queue[per_class:]
        batches.append(np.concatenate(batch)[rank::world_size])
    return batches


def _refill(queue: np.ndarray, items: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """The queue with whole permutations of ``items`` behind it until it has ``count``: everything comes in turn.

    Items that still wait are kept out of the places that are taken next, so that none comes twice in a batch.
    """
    while len(queue) < count:
        fresh = generator.permutation(items)
        ahead = fresh[~np.isin(fresh, queue)][: count - len(queue)]
        queue = np.concatenate([queue, ahead, fresh[~np.isin(fresh, ahead)]])
    return queue


def num_balanced_batches(num_samples: int, batch_size: int) -> int:
    """Length of ``balanced_batches``: as many whole batches as there are images for, at least one."""
    return max(num_samples // batch_size, 1)


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
