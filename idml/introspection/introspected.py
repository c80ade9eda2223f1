"""A frozen network together with its introspection: one forward pass, the network's own output and the scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from idml.introspection.depths import joined, map_vector
from idml.introspection.introspection import Introspection
from idml.introspection.layers import Layers, Watcher


class Looked(nn.Module):
    """A network whose depth vector comes with its output; the output is the network's own, to the bit.

    Args:
        network: gives a named tuple with ``semantic`` (B, D), and ``logits`` if it is a classifier.
        layers: what is looked at.
    """

    def __init__(self, network: nn.Module, layers: Layers) -> None:
        super().__init__()
        self.network, self.layers = network, layers
        self._watcher = Watcher(network, layers, map_vector)

    def forward(self, images: Tensor) -> tuple[Any, Tensor]:
        """(what the network gives, (B, F) float32)."""
        with self._watcher.watching():
            output = self.network(images)
            with torch.autocast(images.device.type, enabled=False):
                return output, joined(self.layers, self._watcher.maps, output.semantic)

    def close(self) -> None:
        """The network is watched no more."""
        self._watcher.remove()


class Introspected(nn.Module):
    """A network and its introspection.

    Args:
        network: as for ``Looked``, whose output has a field ``scores``.
        introspection: fitted to it.
    """

    def __init__(self, network: nn.Module, introspection: Introspection) -> None:
        super().__init__()
        self.network, self.introspection = network, introspection
        self._look = [Looked(network, introspection.spec.layers)]  # in a list: it is no second copy of the network

    def close(self) -> None:
        """The network is watched no more."""
        self._look[0].close()

    def forward(self, images: Tensor) -> Any:
        """The network's output, with ``scores``."""
        output, vector = self._look[0](images)
        with torch.autocast(images.device.type, enabled=False):
            return output._replace(scores=self.introspection(vector, getattr(output, "logits", None)))
