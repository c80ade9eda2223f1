"""What a frozen network gives for a data set, read once and kept in a bounded cache.

Letters in shapes: N images, F numbers of the depth vector, C classes, D semantic dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from idml.distributed import gather_interleaved

CACHE_BYTES = 2 * 2**30
"""Bytes of depth vectors and logits that are kept, over all images. ImageNet's 1,281,167 training images would need
60 GB with ResNet-50 (F = 21,248, 1,000 logits): 46,000 of them are read instead, 46 a class."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Of N images, on the CPU.

    Attributes:
        vectors: (N, F) float16.
        labels: (N,) int64.
        semantic: (N, D) float16, of a retrieval model, of unit length; (N, 0) of a classifier.
        logits: (N, C) float32, of a classifier; (N, 0) of a retrieval model.
    """

    vectors: Tensor
    labels: Tensor
    semantic: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, chosen: Tensor) -> Features:
        """Those at (M,) positions, or where a (N,) bool is true."""
        return Features(**{name: getattr(self, name)[chosen] for name in _NAMES})


_NAMES = tuple(field.name for field in dataclasses.fields(Features))


def kept_positions(labels: np.ndarray, numbers: int, cache_bytes: int, seed: int) -> np.ndarray:
    """Which images of a data set are read: all, or as many of each class, drawn at random, as fit into the cache.

    Args:
        labels: (N,) integers.
        numbers: float16 numbers kept of each image.
        cache_bytes: of them all.
        seed: of the draw.

    Returns:
        (M,) int64 ascending positions, M >= 2.
    """
    most = max(cache_bytes // (2 * numbers), 2)
    if len(labels) <= most:
        return np.arange(len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    # The first images of every class, then the second ones, and so on: a draw with equal shares.
    turn = np.empty(len(labels), np.int64)
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.flatnonzero(np.diff(labels[by_class], prepend=labels[by_class][0] - 1))
    turn[by_class] = np.arange(len(labels)) - np.repeat(starts, np.diff(np.append(starts, len(labels))))
    return np.sort(order[np.argsort(turn[order], kind="stable")][:most])


def kept_half(vectors: Tensor) -> Tensor:
    """(B, F) float16 on the CPU.

    It has no value above 65504: what is larger is as good as that, for inputs that are cut off at 5 deviations.
    """
    return vectors.half().cpu().nan_to_num(nan=0.0, posinf=65504.0, neginf=-65504.0)


def read_features(batches: Iterable[tuple[Tensor, Tensor]], look: Callable[[Tensor], tuple[Tensor, ...]]) -> Features:
    """One pass over this rank's share of a data set; the features of all ranks, in the order of the data set.

    Args:
        batches: (images, labels) in evaluation order.
        look: images -> (vectors (B, F), semantic (B, D), logits (B, C)), of a network in evaluation mode.
    """
    rows: list[tuple[Tensor, ...]] = []
    with torch.inference_mode():
        for images, labels in batches:
            vectors, semantic, logits = look(images)
            rows.append((kept_half(vectors), labels.cpu(), semantic.half().cpu(), logits.float().cpu()))
    columns = [torch.cat(column) for column in zip(*rows, strict=True)]
    return Features(**dict(zip(_NAMES, gather_interleaved(columns), strict=True)))
