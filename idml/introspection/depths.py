"""What a network shows at several depths, as one vector an image: its last layer has forgotten blur and noise.

Letters in shapes: B images, D features, c channels of a map, F numbers of the vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from idml.introspection.layers import Kind, Layers

GRID = 2
"""Each map is averaged over GRID x GRID parts: where a thing lies tells a pasted box from a whole image."""


SMALL = 1024
"""Places of a map up to which a product is faster than torch's pooling (measured on an AMD EPYC)."""


def vector_length(layers: Layers) -> int:
    """F."""
    return sum(layer.channels for layer in layers.maps) * (GRID**2 + 1) + layers.feature_dim


def depth_vector(layers: Layers, maps: Mapping[str, Tensor], features: Tensor | None) -> Tensor:
    """(B, F) float32, without gradient: the mean of each part and the maximum of each map, then the features.

    Args:
        layers: what is looked at.
        maps: name of a layer -> its output.
        features: (B, D), or None where there are none.
    """
    return joined(layers, {layer.name: map_vector(maps[layer.name], layer.kind) for layer in layers.maps}, features)


def joined(layers: Layers, vectors: Mapping[str, Tensor], features: Tensor | None) -> Tensor:
    """The same of the ``map_vector`` of each layer's output."""
    parts = [vectors[layer.name] for layer in layers.maps]
    if layers.feature_dim:
        assert features is not None
        parts.append(features.detach().float())
    return torch.cat(parts, dim=1)


def map_vector(values: Tensor, kind: Kind) -> Tensor:
    """(B, 5 c) float32, without gradient: the mean of each part of a map, and its maximum."""
    with torch.autocast(values.device.type, enabled=False):
        maps = channels_first(values.detach().float(), kind)
        return torch.cat([averages(maps), highest(maps)], dim=1)


def channels_first(values: Tensor, kind: Kind) -> Tensor:
    """A (B, c, h, w) map of any output; tokens that fill no square, but for a few in front, are one column."""
    if kind == "channels first":
        return values
    if kind == "channels last":
        return values.permute(0, 3, 1, 2)
    side = math.isqrt(values.shape[1])
    grid = values[:, values.shape[1] - side**2 :].transpose(1, 2)
    # A class token and a few registers stand in front of the patches of a square; other counts are not of a square.
    if values.shape[1] - side**2 > side:
        return values.transpose(1, 2)[..., None]
    return grid.unflatten(2, (side, side))


def averages(maps: Tensor) -> Tensor:
    """``adaptive_avg_pool2d(maps, GRID).flatten(1)`` of (B, c, h, w), which on the CPU takes long for small maps.

    There it is a product with the share that each place has in each part.
    """
    height, width = maps.shape[2:]
    if maps.device.type != "cpu" or not maps.is_contiguous() or height * width > SMALL:
        return functional.adaptive_avg_pool2d(maps, GRID).flatten(1)
    rows, columns = _shares(height), _shares(width)
    shares = (rows[:, None, :, None] * columns[None, :, None, :]).reshape(GRID**2, height * width).to(maps.dtype)
    return (maps.flatten(2) @ shares.T).flatten(1)


def _shares(size: int) -> Tensor:
    """(GRID, size) float64: part i is the mean from floor(i size / GRID) to ceil((i + 1) size / GRID)."""
    part, place = torch.arange(GRID)[:, None], torch.arange(size)
    inside = ((place >= part * size // GRID) & (place < ((part + 1) * size + GRID - 1) // GRID)).double()
    return inside / inside.sum(1, keepdim=True)


def highest(maps: Tensor) -> Tensor:
    """``maps.amax((2, 3))`` of (B, C, H, W), which on the CPU takes long for channels_last maps of few channels.

    There it is taken over the rows first, as rows of W C numbers that lie side by side.
    """
    if maps.is_contiguous() or not maps.is_contiguous(memory_format=torch.channels_last):
        return maps.amax((2, 3))
    across = maps.permute(0, 2, 3, 1).flatten(2).amax(1)  # (B, W C)
    return across.unflatten(1, (maps.shape[3], maps.shape[1])).amax(1)
