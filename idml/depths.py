"""What a backbone shows at several depths, as one vector an image: its last layer has forgotten blur and noise.

Letters in shapes: B images, D backbone features, F numbers of the vector.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_DEPTHS = 4
"""Maps that are taken, spread over the depth and the last one among them: a ResNet has four stages."""

GRID = 2
"""Each map is averaged over GRID x GRID parts: where a thing lies tells a pasted box from a whole image."""


class DepthReader:
    """Takes maps out of a backbone's forward pass, by timm's ``forward_intermediates``.

    Of a backbone without it (any module of one's own), the features that it gives are all there is.

    Args:
        backbone: gives maps or features.
        feature_dim: D, of what it gives.

    Attributes:
        indices: which of the backbone's intermediate maps are taken; empty where it has none to give.
        length: F.
    """

    def __init__(self, backbone: nn.Module, feature_dim: int) -> None:
        channels = [info["num_chs"] for info in getattr(backbone, "feature_info", None) or []]
        if not callable(getattr(backbone, "forward_intermediates", None)):
            channels = []
        count = min(MAX_DEPTHS, len(channels))
        self.indices = [round((number + 1) * len(channels) / count) - 1 for number in range(count)]
        self.length = sum(channels[index] for index in self.indices) * (GRID**2 + 1) if channels else feature_dim

    def __call__(self, backbone: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(what ``backbone.forward_features(images)`` gives, the maps); the maps are empty where there are none."""
        if not self.indices:
            return getattr(backbone, "forward_features", backbone)(images), []
        forward: Any = backbone.forward_intermediates
        final, maps = forward(images, indices=self.indices)
        return final, maps

    def vector(self, maps: list[Tensor], features: Tensor) -> Tensor:
        """(B, F) float32, without gradient: mean of each part and maximum of each map; else the (B, D) features."""
        if not maps:
            return features.detach().float()
        parts = []
        for each in maps:
            each = each.detach().float()
            parts += [functional.adaptive_avg_pool2d(each, GRID), highest(each)]
        return torch.cat([part.flatten(1) for part in parts], dim=1)


def highest(maps: Tensor) -> Tensor:
    """``maps.amax((2, 3))`` of (B, C, H, W), which on the CPU takes long for channels_last maps of few channels.

    There it is taken over the rows first, as rows of W C numbers that lie side by side.
    """
    if maps.is_contiguous() or not maps.is_contiguous(memory_format=torch.channels_last):
        return maps.amax((2, 3))
    across = maps.permute(0, 2, 3, 1).flatten(2).amax(1)  # (B, W C)
    return across.unflatten(1, (maps.shape[3], maps.shape[1])).amax(1)
