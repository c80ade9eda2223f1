"""Classifiers of others with their weights, as files have them; and how images are to be prepared for them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from idml import lite0
from idml.backbones import ALIASES, timm_arguments
from idml.checkpoint import load_tensors, weights_file
from idml.data.image_dataset import Preprocessing
from idml.distributed import is_main
from idml.errors import UserError
from idml.foreign import build_foreign
from idml.pretrained import of_file, recognised
from idml.spec import Origin
from idml.weights import find_group, misfit, problems_of, told

KEY_FLAG = "--weights-key"

TRAINING_ONLY = ("AuxLogits.", "aux1.", "aux2.")
"""Classifiers of torchvision's Inception and GoogLeNet that only training uses; the networks are made without."""

EARLIER_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)$")
"""Names in torchvision's own files of DenseNet: its modules were called ``norm.1`` and are called ``norm1`` now."""


def cut_origin(name: str) -> tuple[Origin, str]:
    """Whose model a name is, and its name there: ``timm/NAME`` or ``NAME``, ``torchvision/NAME``, or
    ``package.module:function``."""
    if ":" in name:
        return "module", name
    library, slash, rest = name.partition("/")
    if slash and library == "torchvision":
        return "torchvision", rest
    if slash and library != "timm":
        raise UserError(
            f"expected timm/NAME, torchvision/NAME or package.module:function, got {name!r}: of others it is not known "
            "how to make them"
        )
    own = rest if slash else name
    return "timm", ALIASES.get(own, own)


def load_foreign(
    origin: Origin,
    name: str,
    weights: str | None,
    classes: int,
    *,
    arguments: Mapping[str, Any],
    image_size: int | None = None,
    key: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """A classifier with the weights of a file; rank 0 prints a line that says which tensors were taken.

    Args:
        origin, name: as ``cut_origin`` gives them.
        weights: a .pth, .pt or .safetensors file; None for those that a function of one's own gives its network.
        classes: C.
        arguments: further ones of the constructor.
        image_size: where it is given, timm's models for one size are made for it.
        key: the entry of the file to take.

    Returns:
        (the network, in evaluation mode; the arguments that it was made with).

    Raises:
        UserError: there is no such model, it cannot be made, the file cannot be read, or does not fit.
    """
    made_with = dict(arguments)
    if origin == "timm":
        name, made_with = timm_arguments(name, image_size, arguments)
    elif origin == "torchvision" and name in ("googlenet", "inception_v3") and _published(name, weights) is not None:
        made_with = {"transform_input": True} | made_with  # as torchvision itself makes them for these weights
    module = build_foreign(origin, name, classes, made_with)
    if weights is None:
        if origin != "module":
            raise UserError("--weights is missing: the file of the model's weights")
        return module.eval(), made_with
    _load(module, weights_file(weights), name, classes, key)
    return module.eval(), made_with


def _load(module: nn.Module, path: Path, name: str, classes: int, key: str | None) -> None:
    """All of the network's tensors from a file, or a UserError."""
    content, own = load_tensors(path, foreign=True), module.state_dict()
    content = {key: _of_today(value) for key, value in _of_today(content).items()}
    group, others = find_group(content, own, key, path, flag=KEY_FLAG)
    weights = dict(group.tensors)
    if lite0.has_these_names(weights):
        weights = lite0.renamed(weights, name.split(".")[0], path)
    if problems := problems_of(weights, own, TRAINING_ONLY):
        if other := _other_count(weights, own, problems, classes):
            raise UserError(
                f"{path} has a classifier of {other} classes, expected {classes}: name all of the model's classes with "
                "--classes FILE, a line each"
            )
        raise UserError(f"{path} does not fit {name}: {misfit(problems, group, own, content, optional=False)}")
    module.load_state_dict({name: value for name, value in weights.items() if name in own}, strict=False)
    if is_main():
        unused = [*(name for name in weights if name not in own), *group.left_out]
        print(told(group, others, unused, path, flag=KEY_FLAG), flush=True)


def _of_today(values: Any) -> Any:
    """Tensors by name, of torchvision's DenseNet as its modules are called now; anything else as it is."""
    if not isinstance(values, Mapping):
        return values
    return {EARLIER_DENSENET.sub(r"\1\2", name) if isinstance(name, str) else name: v for name, v in values.items()}


def _other_count(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], problems: list[str], classes: int) -> int:
    """Classes of the file, where nothing but their number keeps it from fitting; else 0."""
    differing = [name for name, value in own.items() if name in weights and weights[name].shape != value.shape]
    counts = {weights[name].shape[0] for name in differing if weights[name].ndim}
    same = all(
        own[name].ndim and own[name].shape[0] == classes and weights[name].shape[1:] == own[name].shape[1:]
        for name in differing
    )
    return counts.pop() if same and len(counts) == 1 and len(problems) == len(differing) else 0


def foreign_preprocessing(
    origin: Origin, name: str, module: nn.Module, weights: str | None, given: Mapping[str, Any]
) -> Preprocessing:
    """How images are prepared for a classifier of others.

    What counts, each before the next: what is given; what the file of weights says; what timm records with the model,
    or torchvision of its published weights of that file's name, else of the first it has published; ImageNet's mean
    and standard deviation at 224 pixels.

    Args:
        origin, name, weights: as for ``load_foreign``.
        module: the network.
        given: fields of ``Preprocessing``.

    Raises:
        UserError: a value is out of range.
    """
    base = timm_preprocessing(module)
    if base is None and origin == "torchvision":
        base = _of_torchvision(name, weights)
    values: dict[str, Any] = {} if weights is None else of_file(weights_file(weights))
    values |= given
    try:
        values |= {part: tuple(map(float, values[part])) for part in ("mean", "std") if part in values}
        return dataclasses.replace(base or Preprocessing(image_size=224), **values)
    except (TypeError, ValueError) as error:
        raise UserError(f"images cannot be prepared so: {error}") from None


def timm_preprocessing(module: nn.Module) -> Preprocessing | None:
    """What timm records with its models; None of other modules.

    A model that was made for one size has that one; 224 pixels where nothing says more.
    """
    recorded = getattr(module, "pretrained_cfg", None)
    if not isinstance(recorded, Mapping):
        return None
    size = getattr(getattr(module, "patch_embed", None), "img_size", None) or (recorded.get("input_size") or (224,))[1:]
    side = size if isinstance(size, int) else max(size, default=224)
    return Preprocessing(image_size=int(side), **recognised(recorded))


def _published(name: str, weights: str | None) -> Any:
    """torchvision's weights of that file's name; None where it has published none."""
    import torchvision

    found = torchvision.models.get_model_weights(name)
    return next((each for each in found if weights and Path(each.url).name == Path(weights).name), None)


def _of_torchvision(name: str, weights: str | None) -> Preprocessing:
    import torchvision

    chosen = _published(name, weights) or next(iter(torchvision.models.get_model_weights(name)))
    square = chosen.transforms()
    (side,), (resized,) = square.crop_size, square.resize_size
    about = {"mean": square.mean, "std": square.std, "interpolation": square.interpolation.value}
    return Preprocessing(image_size=side, **recognised(about | {"crop_pct": side / resized}))
