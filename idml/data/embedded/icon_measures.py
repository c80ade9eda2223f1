"""How alike drawings are: what decides which icons make a clean set of classes."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.ndimage import binary_fill_holes, gaussian_filter

SIDE = 24
"""Side in pixels at which drawings are compared."""

BLUR = 1.5
"""Standard deviation in pixels of the blur, about the width of a stroke, so that lines nearly in one place count."""

ALIKE = 0.55
"""Mean similarity below which two classes do not resemble one another; any two drawings have 0.25 on average."""

INK = 64
"""Of 255; pixels that are darker than white by more are part of the drawing, and each drawing has some."""


def shrunk(images: np.ndarray) -> np.ndarray:
    """Drawings of (N, S, S) uint8, S a multiple of ``SIDE``, averaged to ``SIDE`` pixels: (N, SIDE ** 2) float32."""
    step = images.shape[1] // SIDE
    means = images.reshape(len(images), SIDE, step, SIDE, step).mean((2, 4), dtype=np.float32)
    return means.reshape(len(images), -1)


def describe(images: np.ndarray) -> np.ndarray:
    """What a drawing looks like wherever it lies and however large it is, and whether it is filled or outlined.

    The drawing and its silhouette (holes filled), each cut out along its bounding box, centred, scaled to ``SIDE``
    pixels, blurred, less its mean and of unit length, one behind the other.

    Args:
        images: (N, S, S) uint8, black on white, none of them blank.

    Returns:
        (N, 2 * SIDE ** 2) float32 of unit length.
    """
    rows = np.stack([_describe_one(255 - image) for image in images])
    rows -= rows.mean(2, keepdims=True)
    rows /= np.linalg.norm(rows, axis=2, keepdims=True) + 1e-6
    return rows.reshape(len(images), -1) / np.sqrt(2, dtype=np.float32)


def _describe_one(ink: np.ndarray) -> np.ndarray:
    """(2, SIDE ** 2) float32 of one drawing, (S, S) uint8, white on black."""
    drawn = ink > INK
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    silhouette = binary_fill_holes(drawn).astype(np.uint8) * 255
    return np.stack([_centred(part[box]).ravel() for part in (ink, silhouette)])


def _centred(part: np.ndarray) -> np.ndarray:
    """(SIDE, SIDE) float32: an image of any size whose longer side is made ``SIDE``, blurred."""
    scale = SIDE / max(part.shape)
    height, width = (max(1, round(length * scale)) for length in part.shape)
    resized = Image.fromarray(part).resize((width, height), Image.Resampling.BOX if scale < 1 else 2)
    canvas = np.zeros((SIDE, SIDE), np.float32)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    canvas[top : top + height, left : left + width] = np.asarray(resized)
    return gaussian_filter(canvas, BLUR, mode="constant")


def agreement(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How far the drawings of a class look like one another, and unlike those of others.

    The probability that a drawing of the class is more like another one of it than like a drawing of another class: 1
    where all of a class look alike, 0.5 where a name says nothing about how it is drawn. Two drawings are compared in
    all quarter turns, mirrored and not, and the best counts: magnets and spanners point anywhere.

    Args:
        features: (N, 2 * SIDE ** 2) float32 as ``describe`` gives them.
        labels: (N,) int64 in [0, C), at least two of each.

    Returns:
        (C,) float64 in [0, 1].
    """
    pictures = features.reshape(len(features), 2, SIDE, SIDE)
    turned = [np.rot90(pictures, turns, (2, 3)) for turns in range(4)]
    ways = [way.reshape(features.shape) for turn in turned for way in (turn, turn[..., ::-1])]
    result = np.zeros(labels.max() + 1)
    for label in range(len(result)):
        members = np.flatnonzero(labels == label)
        similarity = np.max([features[members] @ way.T for way in ways], axis=0)
        others = np.sort(similarity[:, labels != label], axis=1)
        ranks = []
        for row, index in enumerate(members):
            own = similarity[row, members[members != index]]
            ranks.append(np.searchsorted(others[row], own).mean() / others.shape[1])
        result[label] = np.mean(ranks)
    return result


def resemblance(first: np.ndarray, second: np.ndarray) -> float:
    """How alike two classes are: 1 where a drawing of one is as similar to those of the other as to those of its own.

    Args:
        first, second: (N, D), (M, D) float32 of unit length, at least two each.

    Returns:
        The mean similarity across the classes, over the geometric mean of those of two different drawings within; 0
        where it is below ``ALIKE``. With few drawings it may be above 1.
    """
    across = first.mean(0) @ second.mean(0)
    within = [_mean_similarity(features) for features in (first, second)]
    return float(across / np.sqrt(within[0] * within[1])) if min(*within, across) >= ALIKE else 0.0


def _mean_similarity(features: np.ndarray) -> float:
    """Of two different rows of (N, D) float32 of unit length."""
    total, count = features.sum(0), len(features)
    return float((total @ total - count) / (count * (count - 1)))


def told_apart(first: np.ndarray, second: np.ndarray) -> float:
    """How well two classes are told apart by the nearest of their means: 1 always, 0.5 not at all.

    Each drawing is compared with the means of the others (leave one out); the share that is right, averaged over the
    two classes. A mean of few drawings is longer than that of many; its expected length is taken in its place, the mean
    similarity of two different drawings.

    Args:
        first, second: (N, D), (M, D) float32 of unit length, at least two each.
    """
    sums, counts = [first.sum(0), second.sum(0)], [len(first), len(second)]
    inner = [_mean_similarity(first), _mean_similarity(second)]
    shares = []
    for own, features in enumerate((first, second)):
        other = 1 - own
        to_own = (features @ sums[own] - 1) / (counts[own] - 1)
        to_other = features @ sums[other] / counts[other]
        shares.append(np.mean(2 * to_own - inner[own] > 2 * to_other - inner[other]))
    return float(np.mean(shares))


def consistency(first: np.ndarray, second: np.ndarray) -> float:
    """Whether those who draw two classes draw them apart in the same way.

    The share of pairs whose difference points the way of the other pairs' mean difference: 1 where every family tells a
    plus from a minus alike, 0.5 or less where the two names of a thing got two drawings anyhow.

    Args:
        first, second: (K, D) float32 of unit length, drawings of the two classes; row k of both is by one family.

    Returns:
        In [0, 1]; 0 with fewer than two pairs.
    """
    difference = first - second
    difference /= np.linalg.norm(difference, axis=1, keepdims=True) + 1e-6
    if len(difference) < 2:
        return 0.0
    return float(np.mean(difference @ difference.sum(0) - np.square(difference).sum(1) > 0))
