"""How images must be prepared for the weights that a run has: those that it starts from, or those of its checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, get_args

import timm

from idml.backbones import timm_arguments
from idml.checkpoint import load_tensors, read_checkpoint, weights_file
from idml.data.image_dataset import Interpolation, Preprocessing
from idml.distributed import is_main
from idml.errors import UserError

if TYPE_CHECKING:
    from idml.config_cls import ClsConfig
    from idml.config_dml import DmlConfig

PROTOCOL = ("cub", "cars", "sop", "inshop")
"""Data sets whose published figures are of images resized to 256/224 of the size and cropped (released trainer); only
mean and standard deviation follow the weights there."""

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of weight files that timm's models have on their hub; ``config.json`` beside one belongs to it."""


def with_weights_preprocessing(
    preprocessing: Preprocessing, config: ClsConfig | DmlConfig, *, verbose: bool = True
) -> Preprocessing:
    """The preprocessing of a data set with mean, standard deviation, crop share and interpolation that weights expect.

    A run that resumes, or only evaluates, takes those of its checkpoint. Pretrained weights have their own; where
    neither the file nor timm says anything of them, those of the data set stay. Images that are shown whole are not
    cropped. Rank 0 prints a line where pretrained weights decide.

    Args:
        preprocessing: of the data set, for training from random weights.
        config: of the run.
        verbose: print the line.

    Raises:
        UserError: the weights, or the checkpoint, cannot be read; or timm has no such model.
    """
    stored = config.resume or (config.checkpoint if config.eval_only else None)
    if stored is not None:
        return _replaced(preprocessing, read_checkpoint(stored, lazily=True)["preprocessing"], stored)
    if config.pretrained is None:
        return preprocessing
    expected = _of_timm(config.model)
    if config.pretrained != "timm":
        expected |= of_file(weights_file(config.pretrained))
    if preprocessing.fit == "whole" or config.dataset in PROTOCOL:
        expected = {name: expected[name] for name in ("mean", "std") if name in expected}
    result = _replaced(preprocessing, expected, config.pretrained)
    if expected and verbose and is_main():
        print(_told(result, cropped="crop_share" in expected), flush=True)
    return result


def _replaced(preprocessing: Preprocessing, values: Mapping[str, Any], where: str | Path) -> Preprocessing:
    """``preprocessing`` with those of the values that weights decide; UserError where they cannot be."""
    chosen = {name: values[name] for name in ("mean", "std", "crop_share", "interpolation") if name in values}
    try:
        chosen |= {name: tuple(map(float, chosen[name])) for name in ("mean", "std") if name in chosen}
        return dataclasses.replace(preprocessing, **chosen)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: its preprocessing cannot be used: {error}") from None


def _told(preprocessing: Preprocessing, *, cropped: bool) -> str:
    """The line about what the weights expect."""
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    line = f"images are normalised as the weights expect: mean {mean}, std {std}"
    if cropped:
        filter_name, share = preprocessing.interpolation, preprocessing.crop_share
        line += f"; evaluation resizes by {filter_name} and crops {share:.4g} of the side"
    return line


def _of_timm(model: str) -> dict[str, Any]:
    """What timm records of the weights of a model; nothing of networks of this project that have none.

    Raises:
        UserError: timm has no such model.
    """
    name, _ = timm_arguments(model, None, None)
    try:
        recorded = timm.get_pretrained_cfg(name)
    except RuntimeError:  # no such weights; making the model says so
        return {}
    own = timm.model_entrypoint(name.split(".")[0]).__module__.startswith("idml.")
    if recorded is None or (own and not recorded.has_weights):
        return {}
    return recognised(dataclasses.asdict(recorded))


def of_file(path: Path) -> dict[str, Any]:
    """What a file of weights says of their preprocessing, if anything.

    A checkpoint of this project has it; timm's hub has it in ``config.json`` beside the file; the checkpoints of timm's
    and torchvision's training scripts have the options of their run.
    """
    found: dict[str, Any] = {}
    if path.name in HUB_FILES and path.with_name("config.json").is_file():
        found |= _of_hub(path.with_name("config.json"))
    if path.suffix == ".safetensors":
        return found
    content = load_tensors(path, foreign=True, lazily=True)
    for entry in ("args", "preprocessing"):
        values = content.get(entry)
        if isinstance(values, Mapping):
            found |= recognised(values)
        elif hasattr(values, "__dict__"):
            found |= recognised(vars(values))
    return found


def _of_hub(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    found: dict[str, Any] = {}
    for place in (described, _entry(described, "pretrained_cfg"), _entry(_entry(described, "idml"), "preprocessing")):
        if isinstance(place, Mapping):
            found |= recognised(place)
    return found


def _entry(values: Any, name: str) -> Any:
    return values.get(name) if isinstance(values, Mapping) else None


def recognised(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of options by timm's, torchvision's or this project's names: those that decide the preprocessing and are set.

    A single number stands for all channels, as in timm. A crop share above 1, by which timm pads, becomes 1; filters
    other than those of ``Interpolation`` are left to the default.
    """
    found: dict[str, Any] = {}
    for name in ("mean", "std"):
        numbers = values.get(name)
        if isinstance(numbers, (list, tuple)) and all(map(_is_number, numbers)) and len(numbers) in (1, 3):
            found[name] = tuple(float(number) for number in numbers) * (3 // len(numbers))
    share = values.get("crop_share", values.get("crop_pct"))
    cropped, resized = values.get("val_crop_size"), values.get("val_resize_size")  # torchvision's
    if share is None and _is_number(cropped) and _is_number(resized) and resized > 0:
        share = cropped / resized
    if _is_number(share) and share > 0:
        found["crop_share"] = min(float(share), 1.0)
    if values.get("interpolation") in get_args(Interpolation):
        found["interpolation"] = values["interpolation"]
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)
