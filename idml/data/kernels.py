"""Machine code for the FFCV loader: windows, JPEG decoding and Pillow's resizing, for a batch, without the GIL.

Compiled by numba on first use (some seconds) and kept on disk for later runs. Each compiled function calls only those
of its own file, because numba's cache looks for changes in that file alone.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from PIL import Image

from idml.data import crops

JPEG = 0
"""Mode of an image that FFCV stores as JPEG; 1 is raw bytes."""

WEIGHT_BITS = 22
"""Bits behind the point of Pillow's filter weights: 32, less 8 of the pixel, less 2 against overflow."""

TALL_FIRST = int(Image.__version__.split(".")[0]) >= 13
"""From Pillow 13 on, heights that shrink much more than widths are resized first; earlier versions never do that."""

ACCURATE_DCT = 4096
"""TJFLAG_ACCURATEDCT of libjpeg-turbo's turbojpeg.h; Pillow decodes this way too. FFCV's own decoder takes the fast
transform, which is off by 1.3/255 on average on a photo of quality 95."""

_u32, _pointer = numba.types.uint32, numba.types.uintp
_SIGNATURES = {
    "tjInitDecompress": _pointer(),
    "tjDecompress2": numba.int32(
        _pointer, _pointer, numba.types.ulong, _pointer, *(numba.int32,) * 3, numba.int32, numba.int32
    ),
    "tjDestroy": numba.int32(_pointer),
}
"""Functions of turbojpeg.h: (handle, data, size, pixels, width, bytes a line, height, format, flags) decodes."""


def _external(name: str) -> Any:
    """A C function for compiled code; ``link`` gives it its address, which therefore is not in the cache on disk."""
    return numba.types.ExternalFunction(f"idml_{name}", _SIGNATURES[name])


_tj_init, _tj_decompress, _tj_destroy = map(_external, _SIGNATURES)


def link(address_of: Callable[[str], int]) -> None:
    """Connect the compiled code with libjpeg-turbo, before the first call; ``address_of(name)`` finds a function."""
    for name in _SIGNATURES:
        llvmlite.binding.add_symbol(f"idml_{name}", address_of(name))


def compiled(function: Callable, **callees: Callable) -> Callable:
    """``function`` compiled, kept on disk where there is a folder to keep it in.

    Args:
        function: plain Python.
        callees: compiled functions for the plain ones that ``function`` calls by these names.
    """
    if callees:
        function = types.FunctionType(function.__code__, {**function.__globals__, **callees}, function.__name__)
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(nogil=True)(function)


hash_uniform = compiled(crops.hash_uniform)
random_resized_crop = compiled(crops.random_resized_crop, hash_uniform=hash_uniform)
plan_train = compiled(crops.plan_train, random_resized_crop=random_resized_crop)
plan_eval = compiled(crops.plan_eval)


@compiled
def filter_weights(
    size: int, new_size: int, first: int, count: int, cubic: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of a filter along one axis, widened when shrinking, as Pillow has them.

    Args:
        size, new_size: of the axis, before and after.
        first, count: which of the new pixels are wanted.
        cubic: Pillow's BICUBIC, Keys' (1981) cubic with a = -0.5; else BILINEAR, a triangle.

    Returns:
        For each wanted pixel the first old pixel and the number of them, (count,) int32, and their weights,
        (count, most) int32 in units of 2^-WEIGHT_BITS.
    """
    scale = size / new_size
    inverse = 1.0 / max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * max(scale, 1.0)
    starts, lengths = np.empty(count, np.int32), np.empty(count, np.int32)
    weights = np.zeros((count, int(math.ceil(support)) * 2 + 1), np.int32)
    exact = np.empty(weights.shape[1], np.float64)
    for i in range(count):
        center = (first + i + 0.5) * scale
        start = max(int(center - support + 0.5), 0)
        length = min(int(center + support + 0.5), size) - start
        total = 0.0
        for k in range(length):
            distance = abs((k + start - center + 0.5) * inverse)
            if not cubic:
                exact[k] = max(1.0 - distance, 0.0)
            elif distance < 1.0:
                exact[k] = (1.5 * distance - 2.5) * distance * distance + 1.0
            elif distance < 2.0:
                exact[k] = (((distance - 5.0) * distance + 8.0) * distance - 4.0) * -0.5
            else:
                exact[k] = 0.0
            total += exact[k]
        for k in range(length):
            weight = exact[k] / total * (1 << WEIGHT_BITS)
            weights[i, k] = int(weight + 0.5) if weight >= 0.0 else int(weight - 0.5)
        starts[i], lengths[i] = start, length
    return starts, lengths, weights


@compiled
def resample_width(  # type: ignore[no-untyped-def]
    pixels, top, count, left, starts, lengths, weights, cubic, result
):
    """``count`` rows from ``top`` on of (H, W, 3) uint8 pixels, filtered along the width.

    ``result`` gets them as (3, count, len(starts)) uint8, one plane for each colour, as the batch has them. Only
    a cubic can leave the range of a byte.
    """
    half, one, largest = np.int32(1 << (WEIGHT_BITS - 1)), np.uint64(1), np.int32((256 << WEIGHT_BITS) - 1)
    for y in range(count):
        line = pixels[top + y].reshape(3 * pixels.shape[1])
        reds, greens, blues = result[0, y], result[1, y], result[2, y]
        for x in range(len(starts)):
            red, green, blue = half, half, half
            place = np.uint64(3 * (left + starts[x]))  # unsigned, which spares numba's check for negative indices
            for k in range(lengths[x]):
                weight = weights[x, k]
                red = np.int32(red + np.int32(line[place]) * weight)
                green = np.int32(green + np.int32(line[place + one]) * weight)
                blue = np.int32(blue + np.int32(line[place + one + one]) * weight)
                place += one + one + one
            if cubic:
                red, green, blue = max(red, np.int32(0)), max(green, np.int32(0)), max(blue, np.int32(0))
                red, green, blue = min(red, largest), min(green, largest), min(blue, largest)
            reds[x], greens[x], blues[x] = red >> WEIGHT_BITS, green >> WEIGHT_BITS, blue >> WEIGHT_BITS


@compiled
def resample_height(  # type: ignore[no-untyped-def]
    pixels, left, count, top, starts, lengths, weights, cubic, result
):
    """``count`` columns from ``left`` on of (H, W) uint8 numbers, filtered along the height.

    ``result`` gets them as (len(starts), count) uint8. The sum runs over whole lines, so that it becomes vector code;
    the three numbers of a pixel may stand beside one another, or in planes of their own.
    """
    total = np.empty(count, np.int32)
    for y in range(len(starts)):
        for j in range(count):
            total[j] = 1 << (WEIGHT_BITS - 1)
        for k in range(lengths[y]):
            weight = weights[y, k]
            line = pixels[top + starts[y] + k, left : left + count]
            for j in range(count):
                total[j] += np.int32(line[j]) * weight
        line = result[y]
        if cubic:
            for j in range(count):
                line[j] = min(max(total[j] >> WEIGHT_BITS, 0), 255)
        else:
            for j in range(count):
                line[j] = total[j] >> WEIGHT_BITS


@compiled
def resample(pixels, plan, image, cubic):  # type: ignore[no-untyped-def]
    """A window of an image, resized as Pillow resizes (bit for bit up to Pillow 13), and of that the square wanted.

    Args:
        pixels: (H, W, 3) uint8, contiguous.
        plan: (8,) int64, see ``crops.plan_train``.
        image: (3, side, side) uint8, the square: the result.
        cubic: see ``filter_weights``.
    """
    side = image.shape[1]
    height, width, new_height, new_width = plan[2], plan[3], plan[4], plan[5]
    y_starts, y_lengths, y_weights = filter_weights(height, new_height, plan[6], side, cubic)
    x_starts, x_lengths, x_weights = filter_weights(width, new_width, plan[7], side, cubic)
    top, left, last = y_starts[0], x_starts[0], side - 1
    # The order of the two passes matters to the last bit, because the result between them is rounded.
    if TALL_FIRST and height > new_height and height - new_height > 2 * (width - new_width):
        columns = x_starts[last] + x_lengths[last] - left
        lines = np.empty((side, columns, 3), np.uint8)
        flat, flat_lines = pixels.reshape(pixels.shape[0], 3 * pixels.shape[1]), lines.reshape(side, 3 * columns)
        first = 3 * (plan[1] + left)
        resample_height(flat, first, 3 * columns, plan[0], y_starts, y_lengths, y_weights, cubic, flat_lines)
        resample_width(lines, 0, side, -left, x_starts, x_lengths, x_weights, cubic, image)
        return
    rows = y_starts[last] + y_lengths[last] - top
    planes = np.empty((3, rows, side), np.uint8)
    resample_width(pixels, plan[0] + top, rows, plan[1], x_starts, x_lengths, x_weights, cubic, planes)
    for colour in range(3):
        resample_height(planes[colour], 0, side, -top, y_starts, y_lengths, y_weights, cubic, image[colour])


@compiled
def decode_images(  # type: ignore[no-untyped-def]
    data, modes, heights, widths, pointers, sizes, rows, plans, images, cubic
):
    """Decode, crop and resize images of a .beton.

    Args:
        data: the file's bytes, (F,) uint8.
        modes, heights, widths, pointers, sizes: (N,) int64: how, how large and where each image is stored.
        rows: (B,) int64, the images wanted.
        plans: (B, 8) int64, see ``crops.plan_train``.
        images: (B, 3, S, S) uint8, the result.
        cubic: resize by Pillow's BICUBIC in place of its BILINEAR.

    Returns:
        The position in ``rows`` of the first image that does not decode, or -1.
    """
    side = images.shape[2]
    handle = np.uint64(0)
    failed = -1
    for i in range(len(rows)):
        row = rows[i]
        height, width = heights[row], widths[row]
        stored = data[pointers[row] : pointers[row] + sizes[row]]
        if modes[row] == JPEG:
            if handle == 0:
                handle = _tj_init()
            pixels = np.empty((height, width, 3), np.uint8)
            status = _tj_decompress(
                handle, stored.ctypes.data, stored.size, pixels.ctypes.data, width, 0, height, 0, ACCURATE_DCT
            )
            if status != 0:
                failed = i
                break
        else:
            pixels = stored.reshape((height, width, 3))
        if plans[i, 2] != plans[i, 4] or plans[i, 3] != plans[i, 5]:
            resample(pixels, plans[i], images[i], cubic)
            continue
        top, left = plans[i, 0] + plans[i, 6], plans[i, 1] + plans[i, 7]
        for y in range(side):
            line = pixels[top + y, left : left + side]
            red, green, blue = images[i, 0, y], images[i, 1, y], images[i, 2, y]
            for x in range(side):
                red[x], green[x], blue[x] = line[x, 0], line[x, 1], line[x, 2]
    if handle != 0:
        _tj_destroy(handle)
    return failed
