"""Where to look inside a network: a few maps over its depth and the input of its last layer, found by one forward pass.

Letters in shapes: B images, C classes, D features, c channels of a map.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from idml.errors import UserError, nearest

MAX_MAPS = 4
"""Maps that are looked at, the last one among them: a ResNet has four stages."""

Kind = Literal["channels first", "channels last", "tokens"]


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """A module whose output is looked at.

    Attributes:
        name: of the module in the network.
        kind: of its output: (B, c, h, w), (B, h, w, c) or (B, tokens, c).
        channels: c.
    """

    name: str
    kind: Kind
    channels: int


@dataclasses.dataclass(frozen=True, slots=True)
class Layers:
    """What is looked at in a network; plain values, which are stored with a model.

    Attributes:
        maps: over the depth, in the order in which they are computed.
        features_of: name of the module whose input is the feature vector (the classifier); empty where there is none,
            or where the network gives its features itself.
        feature_dim: D; 0 where there are none.
    """

    maps: tuple[Layer, ...]
    features_of: str = ""
    feature_dim: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back; ``from_json`` takes them."""
        return dataclasses.asdict(self) | {"maps": [dataclasses.asdict(layer) for layer in self.maps]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Layers:
        """What ``as_json`` gave."""
        maps = tuple(Layer(each["name"], each["kind"], each["channels"]) for each in values["maps"])
        return cls(maps, values["features_of"], values["feature_dim"])


def logits_of(output: Any) -> Tensor:
    """The (B, C) logits in what a network gives: a tensor, or an attribute, key or first item ``logits``.

    Raises:
        UserError: there is no such thing.
    """
    found = output
    if not isinstance(found, Tensor):
        found = getattr(output, "logits", None)
    if found is None and isinstance(output, dict):
        found = output.get("logits")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.ndim != 2:
        got = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(output).__name__}"
        raise UserError(f"expected a network that gives (B, C) logits, got {got}")
    return found


def find_layers(network: nn.Module, images: Tensor, names: Sequence[str] | None = None) -> Layers:
    """Look for the layers of a network.

    Looked at are the modules that follow one another on the main path: stages or blocks. Of each size of map (h x w)
    the last output is taken, of the four smallest sizes. A network with fewer than three sizes, a vision transformer,
    say, is looked at in four places spread over its blocks. The features are what goes into the linear layer that gives
    the logits.

    Args:
        network: gives logits (see ``logits_of``), or, of this project, a named output. Left in the mode it was in.
        images: (B, 3, S, S), B >= 2, as the network takes them.
        names: of modules to look at, in place of those found.

    Raises:
        UserError: a name is not of a module that gives a map, or nothing is found.
    """
    modules = dict(network.named_modules())
    for name in names or ():
        if name not in modules:
            raise UserError(f"the network has no module {name!r}{nearest(name, list(modules))}")
    seen: list[tuple[str, Tensor, Tensor]] = []  # name, input, output, in the order in which they are done
    output = _watched_pass(network, images, seen)
    found = {name: layer for name, _, value in seen if (layer := _layer(name, value, len(images))) is not None}
    sizes = {name: _size(value, found[name].kind) for name, _, value in seen if name in found}
    if names is not None:
        for name in names:
            if name not in found:
                raise UserError(
                    f"the module {name!r} gives no map of the images: expected (B, c, h, w) or (B, tokens, c)"
                )
        maps = [found[name] for name in names]
    else:
        maps = _spread(found, sizes, network)
    classifier, feature_dim = _classifier(output, seen, modules)
    if not maps and not feature_dim:
        raise UserError(
            f"{type(network).__name__} has no layer to look at: no module of it gives a map, and no linear layer gives "
            "its logits. Name modules with --layers"
        )
    return Layers(tuple(maps), classifier, feature_dim)


def _watched_pass(network: nn.Module, images: Tensor, seen: list[tuple[str, Tensor, Tensor]]) -> Any:
    """One forward pass in evaluation mode that notes what every module is given and gives."""

    def note(name: str) -> Any:
        def hook(_module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            output = output[0] if isinstance(output, (tuple, list)) and output else output
            if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
                seen.append((name, given[0], output))

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in network.named_modules() if name]
    training = [module for module in network.modules() if module.training]
    try:
        with torch.no_grad():
            return network.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


def _layer(name: str, value: Tensor, count: int) -> Layer | None:
    """How a module's output is looked at; None where it is no map of the images."""
    if value.ndim not in (3, 4) or len(value) != count or not value.is_floating_point():
        return None
    if value.ndim == 3:
        return Layer(name, "tokens", value.shape[2]) if value.shape[1] > 1 else None
    if value.shape[2] == value.shape[3] or value.shape[1] != value.shape[2]:
        return Layer(name, "channels first", value.shape[1]) if value.shape[2] * value.shape[3] > 1 else None
    return Layer(name, "channels last", value.shape[3])


def _size(value: Tensor, kind: Kind) -> tuple[int, ...]:
    """Of the map; tokens have one number."""
    if kind == "tokens":
        return (value.shape[1],)
    return tuple(value.shape[2:]) if kind == "channels first" else tuple(value.shape[1:3])


def _spread(found: dict[str, Layer], sizes: dict[str, tuple[int, ...]], network: nn.Module) -> list[Layer]:
    """The layers that are looked at by themselves; ``found`` is in the order of computation."""
    row = _main_row(found, network)
    last_of_size = {sizes[name]: name for name in row}
    if len(last_of_size) >= 3 or len(row) < MAX_MAPS:
        chosen = sorted(last_of_size.values(), key=row.index)[-MAX_MAPS:]
    else:
        longest = Counter(sizes[name] for name in row).most_common(1)[0][0]
        row = [name for name in row if sizes[name] == longest]
        count = min(MAX_MAPS, len(row))
        chosen = [row[round((number + 1) * len(row) / count) - 1] for number in range(count)]
    return [found[name] for name in chosen]


def _main_row(found: dict[str, Layer], network: nn.Module) -> list[str]:
    """The modules that follow one another on the main path: the outermost ones of which at least four give maps."""
    level = [name for name, _ in network.named_children()]
    modules = dict(network.named_modules())
    row: list[str] = []
    while level:
        level = [inner for name in level for inner in _without_containers(name, modules)]
        row = [name for name in found if name in set(level)]
        if len(row) >= MAX_MAPS:
            break
        level = [f"{name}.{child}" for name in level for child, _ in modules[name].named_children()]
    return row or list(found)


def _without_containers(name: str, modules: dict[str, nn.Module]) -> list[str]:
    """The module, or what a row of modules holds, at any depth of rows within rows."""
    module = modules[name]
    if not isinstance(module, (nn.Sequential, nn.ModuleList)):
        return [name]
    return [inner for child, _ in module.named_children() for inner in _without_containers(f"{name}.{child}", modules)]


def _classifier(output: Any, seen: list[tuple[str, Tensor, Tensor]], modules: dict[str, nn.Module]) -> tuple[str, int]:
    """(module whose input is the feature vector, D); ("", D) where the network gives its features itself."""
    own = getattr(output, "semantic", None)
    if isinstance(own, Tensor):
        return "", own.shape[1]
    logits = logits_of(output)
    for name, given, value in reversed(seen):
        if isinstance(modules[name], (nn.Linear, nn.Conv2d)) and value.flatten(1).shape == logits.shape:
            features = given.flatten(1) if given.ndim == 4 else given
            if features.ndim == 2 and torch.equal(value.flatten(1), logits):
                return name, features.shape[1]
    return "", 0


class Watcher:
    """Keeps what the chosen modules give in a forward pass. Hooks stay until ``remove``: exports trace them too.

    Args:
        network: that is watched.
        layers: of it.
        look: what is kept of a map: by default all of it. Done at once, so that the map's memory can be used again.

    Attributes:
        maps: name of a layer -> what is kept of its output.
        features: (B, D), what went into the module ``features_of``.
    """

    def __init__(
        self, network: nn.Module, layers: Layers, look: Callable[[Tensor, Kind], Tensor] | None = None
    ) -> None:
        self.layers, self._look = layers, look
        self.maps: dict[str, Tensor] = {}
        self.features: Tensor | None = None
        self.active = False
        self._handles: list[RemovableHandle] = []
        modules = dict(network.named_modules())
        for layer in layers.maps:
            # No closure: a copy of the network, pickled or not, has hooks that fill its own watcher.
            self._handles.append(modules[layer.name].register_forward_hook(partial(self._keep, layer)))
        if layers.features_of:
            self._handles.append(modules[layers.features_of].register_forward_pre_hook(self._keep_input))

    def _keep(self, layer: Layer, _module: nn.Module, _given: Any, output: Any) -> None:
        if self.active:
            output = output[0] if isinstance(output, (tuple, list)) else output
            self.maps[layer.name] = output if self._look is None else self._look(output, layer.kind)

    def _keep_input(self, _module: nn.Module, given: tuple[Any, ...]) -> None:
        if self.active:
            self.features = given[0].flatten(1)

    def remove(self) -> None:
        """The network is watched no more."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it the maps of a forward pass are kept; afterwards nothing holds them."""
        self.active = True
        try:
            yield
        finally:
            self.active, self.features = False, None
            self.maps.clear()
