"""The figures of a trained model: on the test images of its own data set, or on labelled images of a folder."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from idml.config import build_config
from idml.config_dml import DmlConfig, default_ks
from idml.data.collection import Collection, trained_on
from idml.data.image_dataset import ImageDataset
from idml.data.names import split_role
from idml.data.retrieval_data import RetrievalData
from idml.data.retrieval_datasets import read_retrieval_data
from idml.embedder import IntrospectiveEmbedder
from idml.errors import UserError
from idml.foreign import ForeignClassifier
from idml.metrics.classification import classification_metrics, concatenate, predictions_of, uncertainty_metrics
from idml.metrics.uncertainty import selective_metrics
from idml.models import ClassifierOutput, IntrospectiveClassifier
from idml.retrieval_evaluation import Embedded, embed, search
from idml.runtime import autocast
from idml.scores import classifier_scores
from idml.trained import TrainedModel

RETRIEVAL_SCORES = {
    "search": "P(wrong) of query and nearest",
    "similarity": "1 - similarity",
    "norm": "-|embedding|",
}
"""Names of ``Found.metrics`` for scores of a retrieval, and what they are; ``uncertainty`` is the model's own."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tested:
    """Labelled images to measure a model on.

    Attributes:
        dataset: the images; labels are positions in the model's classes (classification), or in its own.
        gallery: of a retrieval: what is searched; None where the images search one another.
        families: see ``RetrievalData``.
        name: what the images are, in words.
        config: of the training, where they are the test images of its data set.
    """

    dataset: ImageDataset
    gallery: ImageDataset | None = None
    families: np.ndarray | None = None
    name: str
    config: Mapping[str, Any] | None = None

    @property
    def precision(self) -> str:
        """Of the backbone: that of the training, so that its figures come out; else fp32."""
        return "fp32" if self.config is None else str(self.config.get("precision", "fp32"))


def of_training(config: Mapping[str, Any]) -> Tested:
    """The test images of the data set that a checkpoint's config names.

    Raises:
        UserError: the data are not where they were.
    """
    name = f"test images of {config.get('dataset')}"
    if "embedding_size" in config:
        data = read_retrieval_data(_dml_config(config))
        return Tested(dataset=data.test, gallery=data.gallery, families=data.families, name=name, config=config)
    if config.get("tta", "none") != "none":
        warnings.warn(
            f"the run averaged over mirror images (--tta {config['tta']}); these figures are without",
            UserWarning,
            stacklevel=2,
        )
    whole = trained_on(config)
    test = whole.subset(np.flatnonzero(np.array(whole.splits) == "test"))
    return Tested(dataset=test.dataset, name=name, config=config)


def _dml_config(config: Mapping[str, Any]) -> DmlConfig:
    """A checkpoint's config as it was in its run, as far as this version knows its options."""
    known = {field.name for field in dataclasses.fields(DmlConfig)}
    stored = dict(config)
    values = {name: value for name, value in stored.items() if name in known}
    return build_config(DmlConfig, values | {"pretrained": None})  # that file may be gone by now


def of_folder(collection: Collection, model: TrainedModel, split: str | None) -> Tested:
    """The labelled images of a folder's split.

    Args:
        collection: of the folder.
        model: whose classes the labels must be, if it is a classifier.
        split: its name; None for ``test``, else ``val``, else, of a retrieval model, ``query`` that searches in
            ``gallery``, else all images.

    Raises:
        UserError: there is no such split, no label, or one that the model does not know.
    """
    there = set(collection.splits) - {""}
    if split is not None and split not in there and split_role(split) in there:
        split = split_role(split)
    if split is not None and split not in there:
        folders = ", ".join(sorted(there)) or "no folders of splits (train, test)"
        raise UserError(f"--split {split}: {collection.source} has {folders}")
    if split is None and model.task == "retrieval" and {"query", "gallery"} <= there:
        query, gallery = (labelled_images(collection, name).dataset for name in ("query", "gallery"))
        return Tested(dataset=query, gallery=gallery, name=f"query images of {collection.source} in its gallery")
    chosen = split or next((name for name in ("test", "val") if name in there), None)
    part = labelled_images(collection, chosen)
    name = f"{'all' if chosen is None else chosen} images of {collection.source}"
    if model.task == "retrieval":
        if np.bincount(part.dataset.labels).max() < 2:
            raise UserError(f"{name}: no class has two images, so nothing can be found")
        return Tested(dataset=part.dataset, name=name)
    return Tested(dataset=labelled_as(part, model.classes), name=name)


def labelled_images(collection: Collection, split: str | None = None) -> Collection:
    """The images of a split, or of all, that have a label; warns of those without.

    Raises:
        UserError: there are none.
    """
    inside = np.ones(len(collection), bool) if split is None else np.array(collection.splits) == split
    labelled = collection.dataset.labels >= 0
    without = int((inside & ~labelled).sum())
    if not (inside & labelled).any():
        raise UserError(
            f"no image of {collection.source} has a label: figures need class folders, DIR/[split/]<class>/*.jpg"
        )
    if without:
        warnings.warn(f"{without} images have no label (no class folder) and are left out", UserWarning, stacklevel=3)
    return collection.subset(np.flatnonzero(inside & labelled))


def labelled_as(collection: Collection, classes: Sequence[str]) -> ImageDataset:
    """Labelled images, with their labels as positions in a model's classes; UserError for a class that is not there."""
    position = {name: label for label, name in enumerate(classes)}
    used = [collection.dataset.classes[label] for label in np.unique(collection.dataset.labels)]
    unknown = [name for name in used if name not in position]
    if unknown:
        more = ", ..." if len(classes) > 5 else ""
        raise UserError(
            f"{collection.source} has {len(unknown)} classes that the model was not trained on: "
            f"{', '.join(unknown[:5])}; it knows {len(classes)}: {', '.join(classes[:5])}{more}"
        )
    renamed = np.array([position.get(name, -1) for name in collection.dataset.classes], np.int64)
    return dataclasses.replace(
        collection.dataset, labels=renamed[collection.dataset.labels], classes=tuple(classes), origin=None
    )


@torch.inference_mode()
def classifier_figures(
    model: TrainedModel, tested: Tested, *, batch_size: int, workers: int, verbose: bool
) -> dict[str, Any]:
    """Figures of a classifier.

    Returns:
        Those of ``classification_metrics`` and ``uncertainty_metrics``, under the names that ``results.json`` of a run
        has; and ``scores``: for each of ``classifier_scores`` its ``error_auroc``, ``aurc``
        and ``e_aurc``.
    """
    network = model.network
    assert isinstance(network, (IntrospectiveClassifier, ForeignClassifier))
    loader = model.loader(tested.dataset, batch_size=batch_size, workers=workers)
    generator = torch.Generator().manual_seed(0)
    batches, scores = [], []
    for images, labels in tqdm(loader.epoch(0), "images", len(loader), leave=False, disable=None if verbose else True):
        with autocast(model.device, tested.precision):
            output = model.outputs(images)
        assert isinstance(output, ClassifierOutput)
        batches.append(predictions_of(output, labels.to(model.device)))
        scores.append(classifier_scores(network, output, generator))
    predictions = concatenate(batches)
    figures: dict[str, Any] = classification_metrics(predictions, len(model.classes))
    figures |= uncertainty_metrics(predictions, ism_on=network.ism != "off")
    right = predictions.predicted == predictions.label
    joined: dict[str, Tensor] = {name: torch.cat([batch[name] for batch in scores]) for name in scores[0]}
    own = model.score_name
    names = [own, *(name for name in joined if name != own)]
    table = {name: selective_metrics(joined[name], right) for name in names}
    chosen = ("error_auroc", "aurc", "e_aurc")
    return figures | {"scores": {name: {key: row[key] for key in chosen} for name, row in table.items()}}


def retrieval_figures(
    model: TrainedModel,
    tested: Tested,
    *,
    ks: Sequence[int] | None,
    nmi: bool,
    batch_size: int,
    workers: int,
    verbose: bool,
) -> dict[str, Any]:
    """Figures of a retrieval model.

    Args:
        ks: the K of R@K; None for those of the training, or 1, 2, 4 and 8 as far as there are images.
        nmi: whether to cluster.

    Returns:
        Those of ``Found.metrics``, under the names that ``results.json`` of a run has; and ``scores``: for each score
        its ``R-AUROC``.

    Raises:
        UserError: a K is out of range.
    """
    network = model.network
    assert isinstance(network, IntrospectiveEmbedder)
    searched = len(tested.dataset) - 1 if tested.gallery is None else len(tested.gallery)
    if ks is not None and not all(1 <= k <= searched for k in ks):
        raise UserError(
            f"--ks: expected values between 1 and {searched}, the images that a query can find, got {list(ks)}"
        )
    config = _dml_config(tested.config) if tested.config is not None else DmlConfig(seed=0)
    default = [k for k in config.ks or default_ks("folder") if k <= searched]
    config = dataclasses.replace(
        config,
        ism=model.spec.ism,
        ks=sorted(set(ks)) if ks is not None else default,
        nmi=nmi,
    )
    data = RetrievalData(
        train=tested.dataset,
        test=tested.dataset,
        gallery=tested.gallery,
        preprocessing=model.spec.preprocessing,
        families=tested.families,
    )

    def embedded(dataset: ImageDataset) -> Embedded:
        loader = model.loader(dataset, batch_size=batch_size, workers=workers)
        return embed(model.whole, loader, model.spec.preprocessing, tested.precision)

    gallery = None if tested.gallery is None else embedded(tested.gallery)
    try:
        result = search(embedded(tested.dataset), gallery, data, config, network, model.introspection, last=True)
        metrics = result.metrics
    except ValueError as error:  # a K that is larger than what is left without a query's family
        raise UserError(f"the figures of {tested.name} cannot be had: {error}") from None
    prefix = "R-AUROC "
    found = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    names = {"uncertainty": model.score_name} | RETRIEVAL_SCORES
    return metrics | {"scores": {title: {"R-AUROC": found[name]} for name, title in names.items() if name in found}}
