"""Near-duplicates: images that are alike to the model and pixel by pixel. N images, P pairs, T pixels of a thumbnail.

Alike to the model alone would call all images of a class duplicates; alike in pixels alone a red heart and a blue one.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from idml.metrics import nearest_neighbours

SIMILARITY = 0.95
"""Least cosine similarity of the semantic embeddings."""

CORRELATION, DIFFERENCE = 0.99, 8.0
"""Least correlation and largest mean difference (of 255) of the grey thumbnails. Chosen by eye on Fashion-MNIST and
emoji: a copy that was saved again as JPEG, made smaller or a little brighter passes, another shirt does not."""

PIXEL_NEIGHBOURS = 5
"""Candidates per image by its pixels, beside those by its embedding."""

CHUNK = 1 << 14
"""Pairs that are compared at a time: 128 MB."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Duplicates:
    """P pairs, those across splits first, then those with different labels, then the most alike.

    Attributes:
        first, second: (P,) int64 positions.
        similarity: (P,) float32, cosine of the embeddings; correlation: (P,) float32 and difference: (P,) float32 (of
            255), of the thumbnails.
        across: (P,) bool, whether they are in different splits; conflict: (P,) bool, whether they are labelled
            differently.
        group: (P,) int64, the same number for all pairs of images that hang together.
    """

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray
    correlation: np.ndarray
    difference: np.ndarray
    across: np.ndarray
    conflict: np.ndarray
    group: np.ndarray

    def __len__(self) -> int:
        return len(self.first)


def near_duplicates(
    semantic: np.ndarray,
    thumbnails: np.ndarray,
    neighbours: np.ndarray,
    splits: tuple[str, ...],
    labels: np.ndarray,
    *,
    similarity: float = SIMILARITY,
) -> Duplicates:
    """The pairs among the nearest neighbours in embedding and in pixels that are alike in both.

    Args:
        semantic: (N, D) float32.
        thumbnails: (N, T) uint8, grey, T a square of an even number.
        neighbours: (N, k) int64, of each image by its embedding.
        splits: N names.
        labels: (N,) int64; -1 where there is none.
        similarity: least cosine of the embeddings.
    """
    first, second = _candidates(thumbnails, neighbours)
    alike = [
        _compare(semantic, thumbnails, first[start : start + CHUNK], second[start : start + CHUNK])
        for start in range(0, len(first), CHUNK)
    ]
    figures = np.concatenate(alike, axis=1) if alike else np.zeros((3, 0), np.float32)
    kept = (figures[0] >= similarity) & (figures[1] >= CORRELATION) & (figures[2] <= DIFFERENCE)
    first, second, figures = first[kept], second[kept], figures[:, kept]
    names = np.array(splits)
    across = names[first] != names[second]
    conflict = (labels[first] != labels[second]) & (labels[first] >= 0) & (labels[second] >= 0)
    # lexsort takes its last key first.
    order = np.lexsort((figures[2], -figures[1].round(3), ~conflict, ~across))
    first, second = first[order], second[order]
    count = len(thumbnails)
    _, group = connected_components(coo_array((np.ones(len(first)), (first, second)), (count, count)), directed=False)
    _, numbers = np.unique(group[first], return_inverse=True)
    return Duplicates(
        first=first,
        second=second,
        similarity=figures[0, order],
        correlation=figures[1, order],
        difference=figures[2, order],
        across=across[order],
        conflict=conflict[order],
        group=numbers.astype(np.int64),
    )


def _candidates(thumbnails: np.ndarray, neighbours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (lower, higher) that are neighbours by embedding or by pixels, each once."""
    count, side = len(thumbnails), round(thumbnails.shape[1] ** 0.5)
    found = [neighbours]
    if count > 1:
        coarse = thumbnails.reshape(count, side // 2, 2, side // 2, 2).mean((2, 4), dtype=np.float32).reshape(count, -1)
        coarse -= coarse.mean(1, keepdims=True)  # the cosine is then the correlation
        found.append(nearest_neighbours(coarse, min(PIXEL_NEIGHBOURS, count - 1))[0].numpy())
    both = np.concatenate(found, axis=1)
    own = np.repeat(np.arange(count), both.shape[1])
    pairs = np.unique(np.minimum(own, both.ravel()) * count + np.maximum(own, both.ravel()))
    return pairs // count, pairs % count


def _compare(semantic: np.ndarray, thumbnails: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(3, P): similarity, correlation, difference."""
    cosine = _cosine(semantic[first], semantic[second])
    one, other = thumbnails[first].astype(np.float32), thumbnails[second].astype(np.float32)
    difference = np.abs(one - other).mean(1)
    one -= one.mean(1, keepdims=True)
    other -= other.mean(1, keepdims=True)
    # Pictures of one grey have no correlation; they are alike if they are of the same grey.
    flat = (np.abs(one).max(1) < 2) & (np.abs(other).max(1) < 2)
    return np.stack([cosine, np.where(flat, difference < 2, _cosine(one, other)), difference]).astype(np.float32)


def _cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(1) / np.maximum(lengths, 1e-12)
