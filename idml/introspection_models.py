"""A classifier of others as a model of this project, before it is introspected."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from augment import normalise
from idml.data.image_dataset import ImageDataset
from idml.data.names import class_name
from idml.errors import UserError
from idml.foreign import ForeignClassifier
from idml.foreign_weights import cut_origin, foreign_preprocessing, load_foreign
from idml.introspecting import some_images
from idml.paths import missing, user_path
from idml.spec import ModelSpec
from idml.trained import TrainedModel


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Foreign:
    """What is known of a classifier of others.

    Attributes:
        name: timm/NAME or NAME, torchvision/NAME, or package.module:function.
        weights: file of its weights; None for those that the function gives.
        key: the entry of that file.
        arguments: further ones of the constructor.
        preprocessing: fields of ``Preprocessing`` that are known.
    """

    name: str
    weights: str | None
    key: str | None
    arguments: Mapping[str, Any]
    preprocessing: Mapping[str, Any]


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Names of classes, a line each, in the order of the labels.

    Raises:
        UserError: there is no such file, it is no text, or has a name twice or fewer than two.
    """
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"--classes: {missing(path, 'file')}; expected names of classes, a line each")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes: {path} cannot be read: {error}") from None
    names = tuple(class_name(line) for line in lines if line)
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise UserError(f"--classes: {path} has {', '.join(twice[:5])} more than once")
    if len(names) < 2:
        raise UserError(f"--classes: {path} has {len(names)} names, expected two or more")
    return names


def foreign_model(
    asked: Foreign, classes: tuple[str, ...], images: ImageDataset, device: torch.device, layers: Sequence[str] | None
) -> TrainedModel:
    """The classifier on its device, tried out on a few of the images; without an introspection.

    Args:
        asked: what is known of it.
        classes: its names, in the order of the labels.
        images: that it is to look at.
        device: see there.
        layers: names of modules in it that are to be looked at; None leaves it open.

    Raises:
        UserError: it cannot be made, its weights do not fit, it does not take the images, or gives other logits.
    """
    origin, name = cut_origin(asked.name)
    size = asked.preprocessing.get("image_size")
    module, arguments = load_foreign(
        origin, name, asked.weights, len(classes), arguments=asked.arguments, image_size=size, key=asked.key
    )
    square = foreign_preprocessing(origin, name, module, asked.weights, asked.preprocessing)
    network = ForeignClassifier(module).to(device).eval().requires_grad_(False)
    some = some_images(images, square).to(device)
    count = network.try_out(normalise(some, square.mean, square.std), layers)
    if count != len(classes):
        raise UserError(
            f"the model gives {count} logits, and there are {len(classes)} classes: name all of the model's classes "
            "with --classes FILE, a line each"
        )
    spec = ModelSpec(
        task="classification",
        model=name,
        model_kwargs=arguments,
        classes=classes,
        preprocessing=square,
        ism="off",
        uncertainty_dim=1,
        method="not known",
        origin=origin,
        features_of=network.features_of,
        feature_dim=network.feature_dim,
    )
    source = Path(asked.weights or asked.name)
    return TrainedModel(network, spec, device=device, source=source)
