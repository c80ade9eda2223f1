"""Introspecting a network: one pass over images that it was trained on and over held-out ones, then the fit.

Letters in shapes: B images, S pixels, F numbers of the depth vector, D semantic dimensions, C classes.
"""

from __future__ import annotations

import math
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
from idml.introspection.fit import Fitted, fit_classifier, fit_retrieval, wrong_answers
from idml.introspection.introspected import Introspected, Looked
from idml.introspection.introspection import Introspection, IntrospectionSpec, Task
from idml.introspection.layers import Layers, find_layers
from idml.metrics import nearest_neighbours
from idml.metrics.uncertainty import auroc
from idml.runtime import autocast, evaluation_mode

BATCH_SIZE = 128
"""Images of a forward pass on each rank: nothing depends on it but memory."""

TRIED = 2
"""Images that the layers are found with."""


class Reading:
    """A frozen network that is looked at, in evaluation mode, and how images are brought to it.

    Args:
        network: gives a named output of this project; on its device.
        task: classification, or retrieval.
        preprocessing: of the images.
        some: images to find the layers with.
        names: of modules to look at, in place of those found.
        precision: of the network, as in training.

    Attributes:
        layers: what is looked at.

    Raises:
        UserError: the network has no layer to look at, or a name is not of one.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        preprocessing: Preprocessing,
        some: ImageDataset,
        *,
        names: Sequence[str] | None = None,
        precision: str = "fp32",
    ) -> None:
        self.task, self.preprocessing, self.precision = task, preprocessing, precision
        parameter = next(network.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.layers = find_layers(network, self._prepared(some_images(some, preprocessing)), names)
        self._look = Looked(network, self.layers)

    def numbers(self, classes: int, dimensions: int) -> int:
        """Of float16 that are kept of an image: its vector, and C logits of float32 or D semantic dimensions."""
        return vector_length(self.layers) + (2 * classes if self.task == "classification" else dimensions)

    def loader(self, dataset: ImageDataset, *, batch_size: int = BATCH_SIZE, **further: Any) -> TorchLoader:
        """Batches of a data set as evaluation shows them."""
        return _loader(dataset, self.preprocessing, batch_size=batch_size, **further)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, S, S) uint8 -> (vectors (B, F), semantic (B, D) of a retrieval model, logits (B, C) of a classifier).

        Raises:
            UserError: what the network gives is not finite.
        """
        with autocast(self.device, self.precision):
            output, vector = self._look(self._prepared(images))
        logits = getattr(output, "logits", None)
        given = output.semantic if logits is None else logits
        bad = int((~torch.isfinite(given).all(1)).sum())
        if bad:
            raise UserError(
                f"the network gives numbers that are not finite for {bad} of {len(given)} images of a batch"
            )
        nothing = vector.new_zeros(len(vector), 0)
        if logits is not None:
            return vector, nothing, logits
        return vector, nn.functional.normalize(output.semantic, dim=1), nothing

    def read(self, dataset: ImageDataset, workers: int) -> Features:
        """One pass over a data set, of which each rank reads its share; the features of all on every rank."""
        ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
        loader = self.loader(dataset, workers=workers, **ranks)
        try:
            return read_features(loader.epoch(0), self.features)
        finally:
            loader.close()

    def close(self) -> None:
        """The network is watched no more."""
        self._look.close()

    def _prepared(self, images: Tensor) -> Tensor:
        square = self.preprocessing
        return normalise(images.to(self.device, non_blocking=True), square.mean, square.std)


def some_images(dataset: ImageDataset, preprocessing: Preprocessing) -> Tensor:
    """(``TRIED``, 3, S, S) uint8: the first images of a data set as evaluation shows them."""
    first = dataset.subset(np.arange(min(TRIED, len(dataset))))
    return _loader(first, preprocessing, batch_size=TRIED).images_at((np.arange(TRIED) % len(first)).tolist())


def _loader(dataset: ImageDataset, preprocessing: Preprocessing, **further: Any) -> TorchLoader:
    return TorchLoader(
        dataset,
        image_size=preprocessing.image_size,
        train=False,
        fit=preprocessing.fit,
        crop_share=preprocessing.crop_share,
        interpolation=preprocessing.interpolation,
        **further,
    )


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
        What was fitted; ``about`` has the figures of ``fit_features``, and the ``seconds`` of all of it.

    Raises:
        UserError: the network has no layer to look at; or in retrieval, no training images were given.
    """
    given, started = check_given(task, train, held_out), time.perf_counter()
    with evaluation_mode(network):
        reading = Reading(network, task, preprocessing, given[0], names=names, precision=precision)
        try:
            numbers = reading.numbers(classes, getattr(network, "embedding_dim", 0))
            positions = chosen_images(train, held_out, numbers, cache_bytes, seed)
            # What is held out is read first: it is what calibrates.
            held, trained = (
                None if part is None else reading.read(part.subset(chosen), workers)
                for part, chosen in zip((held_out, train), positions, strict=True)
            )
        finally:
            reading.close()
    fitted = distributed.from_main(lambda: fit_features(reading.layers, task, classes, trained, held, seed))
    fitted.introspection.to(reading.device)
    return Fitted(fitted.introspection, fitted.about | {"seconds": round(time.perf_counter() - started, 2)})


def introspect_trained(network: nn.Module, task: Task, data: Any, config: Any) -> tuple[Introspected, dict[str, Any]]:
    """The last phase of a training: the network with what it can say of itself, and about the fit.

    Args:
        network: that was trained; it stays as it is.
        task: classification, or retrieval.
        data: of the run, with ``train``, ``val`` (or None) and ``preprocessing``.
        config: of the run, with the options of ``IntrospectionOptions``, ``precision``, ``workers`` and ``seed``.
    """
    if data.val is None and distributed.is_main():
        what = "images" if task == "classification" else "classes"
        print(f"warning: no {what} were held out (--val-fraction), so P(wrong) will not be calibrated", flush=True)
    fitted = introspect_network(
        network,
        task,
        len(data.train.classes),
        data.preprocessing,
        train=data.train,
        held_out=data.val,
        cache_bytes=config.cache_bytes,
        precision=config.precision,
        workers=config.workers,
        seed=config.seed,
    )
    return Introspected(network, fitted.introspection), fitted.about


def check_given(task: Task, train: ImageDataset | None, held_out: ImageDataset | None) -> list[ImageDataset]:
    """The data sets that have images; UserError where they do not suffice."""
    given = [part for part in (train, held_out) if part is not None and len(part)]
    if sum(map(len, given)) < TRIED:
        raise UserError("there are no images to introspect with: expected at least two")
    if task == "retrieval" and (train is None or not len(train)):
        raise UserError("a retrieval model is introspected with images of classes that it was trained on, and got none")
    return given


def chosen_images(
    train: ImageDataset | None, held_out: ImageDataset | None, numbers: int, cache_bytes: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the (held-out, training) images that are read, as many as fit; held-out ones come first."""
    left, found = cache_bytes, []
    for part in (held_out, train):
        if part is None or not len(part):
            found.append(np.zeros(0, np.int64))
            continue
        found.append(kept_positions(part.labels, numbers, left, seed))
        left = max(left - 2 * numbers * len(found[-1]), 0)
    return found[0], found[1]


def fit_features(
    layers: Layers, task: Task, classes: int, train: Features | None, held_out: Features | None, seed: int
) -> Fitted:
    """Fit to features that were read; to be called on one rank.

    Returns:
        What was fitted. ``about`` also has ``train_images_read`` and ``held_out_images_read``; and ``error_auroc`` of
        P(wrong) and ``error_auroc_free`` of what is to be had for nothing, 1 - max softmax or 1 - top similarity, both
        on the held-out images (None where all or none of them are wrong, the first also where nothing is calibrated):
        in classification each image is judged by a head that has not seen it.
    """
    train, held_out = (None if part is None or not len(part) else part for part in (train, held_out))
    if task == "classification":
        fitted = fit_classifier(layers, classes, train, held_out, seed=seed)
    else:
        assert train is not None
        fitted = fit_retrieval(layers, train, held_out, seed=seed)
    read = {"train": train, "held_out": held_out}
    counts = {f"{name}_images_read": 0 if part is None else len(part) for name, part in read.items()}
    aurocs = {
        "error_auroc": fitted.introspection.held_out_auroc(),
        "error_auroc_free": math.nan if held_out is None else _free_auroc(task, held_out),
    }
    told = {name: None if math.isnan(value) else value for name, value in aurocs.items()}
    return Fitted(fitted.introspection, fitted.about | counts | told)


def _free_auroc(task: Task, held_out: Features) -> float:
    """Of 1 - max softmax, or, of images that search one another, 1 - similarity; NaN where it cannot be."""
    if task == "classification":
        wrong, score = wrong_answers(held_out), 1 - held_out.logits.double().softmax(1).amax(1)
    elif len(held_out) > 1:
        neighbours, similarities = nearest_neighbours(held_out.semantic.float(), 1)
        wrong, score = held_out.labels[neighbours[:, 0]] != held_out.labels, 1 - similarities[:, 0]
    else:
        return math.nan
    return auroc(score[wrong], score[~wrong])


def with_stored_introspection(network: nn.Module, checkpoint: Mapping[str, Any]) -> nn.Module:
    """The network with the introspection of a checkpoint, on its device; the network itself where there is none."""
    stored = checkpoint.get("introspection")
    if stored is None:
        return network
    introspection = Introspection(IntrospectionSpec.from_json(stored["spec"]))
    introspection.load_state_dict(stored["state"])
    return Introspected(network, introspection.to(next(network.parameters()).device))
