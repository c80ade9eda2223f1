"""Introspecting a network: one pass over images that it was trained on and over held-out ones, then the fit.

Letters in shapes: B images, S pixels.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from augment import normalise
from idml import distributed
from idml.data.image_dataset import ImageDataset, Preprocessing
from idml.data.torch_loader import TorchLoader
from idml.errors import UserError
from idml.introspection.depths import vector_length
from idml.introspection.features import CACHE_BYTES, Features, kept_positions, read_features
from idml.introspection.fit import Fitted, fit_classifier, fit_retrieval
from idml.introspection.introspected import Introspected, Looked
from idml.introspection.introspection import Introspection, IntrospectionSpec, Task
from idml.introspection.layers import Layers, find_layers
from idml.runtime import autocast, evaluation_mode

BATCH_SIZE = 128
"""Images of a forward pass on each rank: nothing depends on it but memory."""

TRIED = 2
"""Images that the layers are found with."""


def introspect_network(
    network: nn.Module,
    task: Task,
    classes: int,
    preprocessing: Preprocessing,
    *,
    train: ImageDataset | None,
    held_out: ImageDataset | None,
    names: Sequence[str] | None = None,
    cache_bytes: int = CACHE_BYTES,
    precision: str = "fp32",
    workers: int = 0,
    seed: int = 0,
) -> Fitted:
    """Fit an introspection; to be called on every rank, each of which reads its share. The network stays as it is.

    Args:
        network: gives a named output of this project; on its device.
        task: classification, or retrieval.
        classes: C, of the logits or the training images.
        preprocessing: of the images.
        train: images that the network was trained on, labels as in training; None where there are none at hand.
        held_out: others; in retrieval of other classes, labels from 0.
        names: of modules to look at, in place of those found.
        cache_bytes: of the vectors that are read, over both data sets. Where more images than fit are given, as many of
            each class are drawn.
        precision: of the network, as in training.
        workers: processes that decode images.
        seed: of all that is drawn.

    Returns:
        What was fitted; ``about`` says how many images were read.

    Raises:
        UserError: the network has no layer to look at; or in retrieval, no training images were given.
    """
    device, started = next(network.parameters()).device, time.perf_counter()
    given = [part for part in (train, held_out) if part is not None and len(part)]
    if not given:
        raise UserError("there are no images to introspect with")
    if task == "retrieval" and train is None:
        raise UserError("a retrieval model is introspected with images of classes that it was trained on, and got none")

    def prepared(images: Tensor) -> Tensor:
        return normalise(images.to(device, non_blocking=True), preprocessing.mean, preprocessing.std)

    with evaluation_mode(network):
        layers = find_layers(network, prepared(_some_images(given[0], preprocessing)), names)
        numbers = vector_length(layers) + (classes if task == "classification" else 0)
        look = Looked(network, layers)
        read: dict[str, Features | None] = {"train": None, "held_out": None}
        # What is held out is read first: it is what calibrates.
        left = cache_bytes
        for name, dataset in (("held_out", held_out), ("train", train)):
            if dataset is None or not len(dataset):
                continue
            kept = kept_positions(dataset.labels, numbers, left, seed)
            read[name] = _read(look, dataset.subset(kept), prepared, preprocessing, precision, workers)
            left = max(left - 2 * numbers * len(kept), 0)
    fitted = _fit(layers, task, classes, read["train"], read["held_out"], seed)
    distributed.copy_from_main([*fitted.introspection.parameters(), *fitted.introspection.buffers()])
    about = fitted.about | {f"{name}_images_read": len(part) for name, part in read.items() if part is not None}
    fitted.introspection.to(device)
    return Fitted(fitted.introspection, about | {"seconds": round(time.perf_counter() - started, 2)})


def _fit(
    layers: Layers, task: Task, classes: int, train: Features | None, held_out: Features | None, seed: int
) -> Fitted:
    if task == "classification":
        return fit_classifier(layers, classes, train, held_out, seed=seed)
    assert train is not None
    return fit_retrieval(layers, train, held_out, seed=seed)


def _some_images(dataset: ImageDataset, preprocessing: Preprocessing) -> Tensor:
    chosen = np.resize(np.arange(len(dataset)), TRIED)
    return _loader(dataset.subset(np.arange(min(TRIED, len(dataset)))), preprocessing).images_at(
        (chosen % min(TRIED, len(dataset))).tolist()
    )


def _loader(dataset: ImageDataset, preprocessing: Preprocessing, **further: Any) -> TorchLoader:
    return TorchLoader(
        dataset,
        batch_size=BATCH_SIZE,
        image_size=preprocessing.image_size,
        train=False,
        fit=preprocessing.fit,
        crop_share=preprocessing.crop_share,
        interpolation=preprocessing.interpolation,
        **further,
    )


def _read(
    look: Looked,
    dataset: ImageDataset,
    prepared: Any,
    preprocessing: Preprocessing,
    precision: str,
    workers: int,
) -> Features:
    """This rank's share of the images, and then those of all."""
    device = next(look.parameters()).device

    def features(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with autocast(device, precision):
            output, vector = look(prepared(images))
        logits = getattr(output, "logits", None)
        nothing = vector.new_zeros(len(vector), 0)
        if logits is not None:
            return vector, nothing, logits
        return vector, torch.nn.functional.normalize(output.semantic, dim=1), nothing

    loader = _loader(
        dataset, preprocessing, workers=workers, rank=distributed.rank(), world_size=distributed.world_size()
    )
    try:
        return read_features(loader.epoch(0), features)
    finally:
        loader.close()


def with_stored_introspection(network: nn.Module, checkpoint: Mapping[str, Any]) -> nn.Module:
    """The network with the introspection of a checkpoint, on its device; the network itself where there is none."""
    stored = checkpoint.get("introspection")
    if stored is None:
        return network
    introspection = Introspection(IntrospectionSpec.from_json(stored["spec"]))
    introspection.load_state_dict(stored["state"])
    return Introspected(network, introspection.to(next(network.parameters()).device))
