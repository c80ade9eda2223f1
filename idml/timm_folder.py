"""A model as a folder in timm's own layout, with this project's heads beside it: written, and read back.

``config.json`` and ``model.safetensors`` are the plain classifier (of a retrieval model: the backbone) as timm knows
it; ``idml.safetensors`` holds the rest. ``idml.load`` puts both together again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from idml.backbones import timm_arguments
from idml.checkpoint import load_tensors
from idml.errors import UserError
from idml.foreign import ForeignClassifier
from idml.models import IntrospectiveClassifier
from idml.trained import HEADS, WEIGHTS, TrainedModel


def build_timm(model: TrainedModel) -> tuple[nn.Module, tuple[str, ...]]:
    """The plain classifier as a timm model, with its weights; of a retrieval model, the backbone.

    Returns:
        (the timm model, in evaluation mode; timm's names of its classifier: none of a retrieval model, and more than
        one where the model averages over them).

    Raises:
        UserError: timm's own model of that name is not this backbone with one linear classifier.
    """
    spec = model.spec
    count = len(spec.classes) if spec.task == "classification" else 0
    name, arguments = timm_arguments(spec.model, spec.preprocessing.image_size, spec.model_kwargs)
    made = timm.create_model(name.split(".")[0], num_classes=count, **arguments)
    if spec.origin not in ("idml", "timm"):
        raise UserError(f"{spec.model} is a {spec.origin} model, not timm's: take --format safetensors")
    if isinstance(model.network, ForeignClassifier):
        made.load_state_dict(model.network.module.state_dict())
        return made.eval(), ()
    weights = dict(model.network.backbone.state_dict())
    recorded = (getattr(made, "pretrained_cfg", None) or {}).get("classifier") or ()
    classifiers = () if count == 0 else (recorded,) if isinstance(recorded, str) else tuple(recorded)
    if isinstance(model.network, IntrospectiveClassifier):
        own = model.network.classifier.state_dict()
        weights |= {f"{classifier}.{part}": value for classifier in classifiers for part, value in own.items()}
    try:
        made.load_state_dict(weights)
    except RuntimeError as error:
        reason = "; ".join(" ".join(line.split()) for line in str(error).splitlines()[1:3])
        raise UserError(
            f"timm's {name} is not this backbone with one linear classifier ({reason}): take --format safetensors"
        ) from None
    return made.eval(), classifiers


def write_timm_folder(model: TrainedModel, folder: Path, about: Mapping[str, Any]) -> None:
    """Write the folder; ``about`` is put into its ``config.json``.

    Raises:
        UserError: as for ``build_timm``, or timm cannot describe the model.
    """
    made, classifiers = build_timm(model)
    square = model.spec.preprocessing
    config = {**about, "idml": model.spec.as_json() | {"timm_classifiers": list(classifiers)}}
    config["pretrained_cfg"] = {"tag": "idml"}  # else that of timm's weights for this architecture
    if model.task == "classification":
        config["label_names"] = list(model.classes)
    data = {
        "input_size": (3, square.image_size, square.image_size),
        "mean": square.mean,
        "std": square.std,
        "interpolation": square.interpolation if square.fit == "crop" else "bilinear",
        "crop_pct": square.crop_share if square.fit == "crop" else 1.0,
        "crop_mode": "center",
    }
    try:
        save_for_hf(made, str(folder), model_config=config, safe_serialization=True, data_config=data)
    except (KeyError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"timm cannot describe {model.spec.model} ({error!r}): take --format safetensors") from None
    inside = ("module.",) if model.spec.origin == "timm" else ("backbone.", *(["classifier."] if classifiers else []))
    save_file({name: value for name, value in model.state().items() if not name.startswith(inside)}, folder / HEADS)


def read_timm_folder(folder: Path, described: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a folder that ``write_timm_folder`` wrote, under the names that ``load_state`` expects.

    Args:
        folder: with ``idml.safetensors``.
        described: the object ``idml`` of its ``config.json``.

    Raises:
        UserError: a file is missing or damaged.
    """
    weights, state = load_tensors(folder / WEIGHTS), load_tensors(folder / HEADS)
    classifiers = tuple(f"{name}." for name in described.get("timm_classifiers") or ())
    if described.get("origin") == "timm":
        return state | {f"module.{name}": value for name, value in weights.items()}
    for name, value in weights.items():
        if not name.startswith(classifiers):
            state[f"backbone.{name}"] = value
        elif name.startswith(classifiers[0]):
            state[f"classifier.{name.removeprefix(classifiers[0])}"] = value
    return state
