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
    parts = []
    for layer in layers.maps:
        each = channels_first(maps[layer.name].detach().float(), layer.kind)
        parts += [functional.adaptive_avg_pool2d(each, GRID).flatten(1), highest(each)]
    if layers.feature_dim:
        assert features is not None
        parts.append(features.detach().float())
    return torch.cat(parts, dim=1)


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


def highest(maps: Tensor) -> Tensor:
    """``maps.amax((2, 3))`` of (B, C, H, W), which on the CPU takes long for channels_last maps of few channels.

    There it is taken over the rows first, as rows of W C numbers that lie side by side.
    """
    if maps.is_contiguous() or not maps.is_contiguous(memory_format=torch.channels_last):
        return maps.amax((2, 3))
    across = maps.permute(0, 2, 3, 1).flatten(2).amax(1)  # (B, W C)
    return across.unflatten(1, (maps.shape[3], maps.shape[1])).amax(1)
