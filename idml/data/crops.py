"""Which part of an image becomes the model's input: functions of sizes, seed, epoch and sample, whoever decodes.

The random numbers come from a hash of (seed, epoch, sample, draw) instead of a generator with a state, so a crop is the
same in every process and with every loader. Everything here is written in the subset of Python that numba compiles
(`idml.data.kernels` does), so that the loaders share the one definition.
"""

from __future__ import annotations

import math

import numpy as np

MASK = 0xFFFFFFFF


def hash_uniform(seed: int, epoch: int, sample: int, draw: int) -> float:
    """A number in [0, 1) with 32 random bits, fixed by its four arguments (each taken modulo 2^32).

    The mixing step is the 32-bit integer hash "lowbias32" of C. Wellons (2018), chained over the arguments.
    """
    state = 0x9E3779B9  # 2^32 / golden ratio: any odd constant without structure serves
    for value in (seed, epoch, sample, draw):
        state = (state ^ (value & MASK)) & MASK
        state = (((state ^ (state >> 16)) & MASK) * 0x7FEB352D) & MASK
        state = (((state ^ (state >> 15)) & MASK) * 0x846CA68B) & MASK
        state = (state ^ (state >> 16)) & MASK
    return state / 4294967296.0


def random_resized_crop(
    height: int, width: int, seed: int, epoch: int, sample: int, min_scale: float, max_scale: float
) -> tuple[int, int, int, int]:
    """The window of a random resized crop (Szegedy et al. 2015), as torchvision defines it.

    Args:
        height, width: of the image, in pixels.
        seed, epoch, sample: decide the draw.
        min_scale, max_scale: range of the window's share of the image's area; the aspect ratio is between 3/4 and 4/3.

    Returns:
        (top, left, height, width) in pixels, inside the image. After ten windows that did not fit, the largest central
        one whose aspect ratio is in range.
    """
    low, high = math.log(3.0 / 4.0), math.log(4.0 / 3.0)
    for attempt in range(10):
        area = height * width * (min_scale + (max_scale - min_scale) * hash_uniform(seed, epoch, sample, 4 * attempt))
        ratio = math.exp(low + (high - low) * hash_uniform(seed, epoch, sample, 4 * attempt + 1))
        w = int(round(math.sqrt(area * ratio)))
        h = int(round(math.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            top = int(hash_uniform(seed, epoch, sample, 4 * attempt + 2) * (height - h + 1))
            left = int(hash_uniform(seed, epoch, sample, 4 * attempt + 3) * (width - w + 1))
            return top, left, h, w
    h, w = height, width
    if width < height * 3.0 / 4.0:
        h = int(round(width / (3.0 / 4.0)))
    elif width > height * 4.0 / 3.0:
        w = int(round(height * (4.0 / 3.0)))
    return (height - h) // 2, (width - w) // 2, h, w


def center_crop(height: int, width: int, share: float) -> tuple[int, int, int, int]:
    """(top, left, side, side): the central square whose side is ``share`` of the shorter side."""
    side = max(int(round(min(height, width) * share)), 1)
    return (height - side) // 2, (width - side) // 2, side, side


def plan_train(
    heights: np.ndarray,
    widths: np.ndarray,
    samples: np.ndarray,
    seed: int,
    epoch: int,
    side: int,
    min_scale: float,
    max_scale: float,
) -> np.ndarray:
    """Random resized crops of B images.

    Args:
        heights, widths: (B,) int64, of the images, in pixels.
        samples: (B,) int64, the images' places in their data set.
        seed, epoch: decide the draw together with the sample.
        side: of the square result, in pixels.
        min_scale, max_scale: see ``random_resized_crop``.

    Returns:
        (B, 8) int64: the window's top, left, height, width; the height and width that it is resized to; top and left of
        the square kept of that.
    """
    plan = np.zeros((len(samples), 8), np.int64)
    for i in range(len(samples)):
        top, left, height, width = random_resized_crop(
            int(heights[i]), int(widths[i]), seed, epoch, int(samples[i]), min_scale, max_scale
        )
        plan[i, 0], plan[i, 1], plan[i, 2], plan[i, 3] = top, left, height, width
        plan[i, 4], plan[i, 5] = side, side
    return plan


def plan_eval(heights: np.ndarray, widths: np.ndarray, side: int, shorter: int) -> np.ndarray:
    """The plan (see ``plan_train``) of evaluation: shorter side to ``shorter`` pixels, then the central square.

    Rounding is that of torchvision's ``resize`` (down) and ``center_crop`` (half to even).
    """
    plan = np.zeros((len(heights), 8), np.int64)
    for i in range(len(heights)):
        height, width = heights[i], widths[i]
        new_height, new_width = shorter, shorter
        if width <= height:
            new_height = int(shorter * height / width)
        else:
            new_width = int(shorter * width / height)
        plan[i, 2], plan[i, 3], plan[i, 4], plan[i, 5] = height, width, new_height, new_width
        plan[i, 6], plan[i, 7] = int(round((new_height - side) / 2.0)), int(round((new_width - side) / 2.0))
    return plan


def plan_whole(side: int, count: int) -> np.ndarray:
    """The plan (see ``plan_train``) that takes ``count`` images of ``side`` x ``side`` pixels as they are."""
    plan = np.zeros((count, 8), np.int64)
    plan[:, 2:6] = side
    return plan
