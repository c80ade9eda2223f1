"""Embedding a data set with a trained model, and the figures of searching in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from augment import normalise
from idml.config_dml import DmlConfig
from idml.data.image_dataset import Preprocessing
from idml.data.retrieval_data import RetrievalData
from idml.data.torch_loader import Loader
from idml.distributed import gather_interleaved
from idml.metrics import nearest_neighbours, retrieval_auroc, retrieval_metrics
from idml.models import uncertainty_score
from idml.runtime import autocast

NEIGHBOURS = 5
"""Nearest neighbours that pictures show."""

CLUSTER_EVERY_EPOCH = 20_000
"""Up to so many test images are clustered after every evaluation, more after the last one only."""


class Embedded(NamedTuple):
    """A data set's embeddings, in its order, on the CPU.

    Attributes:
        semantic: (N, D) float32.
        uncertainty: (N,) norm of the uncertainty embedding.
        norm: (N,) length of the semantic embedding before it was normalised.
        labels: (N,) int64.
    """

    semantic: Tensor
    uncertainty: Tensor
    norm: Tensor
    labels: Tensor


class Found(NamedTuple):
    """What the test images found: the figures, and per query (Q,) the nearest ones.

    Attributes:
        metrics: R@K, RP, MAP@R, P@1, the R-AUROC of three scores; NMI and F1 where asked for; the same with the query's
            family removed from the gallery, as ``other_families/R@1`` and so on, where the data have families.
        neighbours: (Q, 5) int64 positions in the gallery, nearest first.
        similarities: (Q, 5) their cosine similarities.
        right: (Q,) bool, whether the nearest one is of the query's class.
    """

    metrics: dict[str, float]
    neighbours: Tensor
    similarities: Tensor
    right: Tensor


@torch.no_grad()
def embed(model: nn.Module, loader: Loader, preprocessing: Preprocessing, precision: str) -> Embedded:
    """Every image of all ranks' loaders once, in evaluation mode; the model is left in that mode.

    Args:
        model: an introspective embedder.
        loader: gives this rank's share of the images, uint8, in evaluation order.
        preprocessing: mean and standard deviation to normalise with.
        precision: of the backbone, ``fp32``, ``bf16`` or ``fp16``.

    Returns:
        All embeddings, in the data set's order, on every rank.
    """
    model.eval()
    device = next(model.parameters()).device
    batches = []
    for images, labels in loader.epoch(0):
        images = normalise(images.to(device, non_blocking=True), preprocessing.mean, preprocessing.std)
        with autocast(device, precision):
            output = model(images)
        columns = (output.semantic, uncertainty_score(output), output.norm)
        batches.append([*(column.float().cpu() for column in columns), labels])
    return Embedded(*gather_interleaved([torch.cat(columns) for columns in zip(*batches, strict=True)]))


def search(
    test: Embedded,
    gallery: Embedded | None,
    data: RetrievalData,
    config: DmlConfig,
    device: torch.device,
    *,
    last: bool,
) -> Found:
    """The figures of a retrieval, computed on ``device``, the queries dealt out to the ranks.

    Args:
        test: embeddings of the test images.
        gallery: of the gallery; None where the test images search one another.
        data: gives families.
        config: K, clustering, lone queries.
        device: where to compute.
        last: whether training is over; large sets are clustered only then.
    """
    assert config.ks is not None
    searched = test if gallery is None else gallery
    embeddings, labels = searched.semantic.to(device), searched.labels.to(device)
    queries: dict[str, Any] = {} if gallery is None else {"query_embeddings": test.semantic.to(device)}
    query_labels: dict[str, Any] = {} if gallery is None else {"query_labels": test.labels.to(device)}
    nmi = config.nmi and (last or len(searched.labels) <= CLUSTER_EVERY_EPOCH)
    options: dict[str, Any] = {
        "ks": tuple(config.ks),
        "lone": config.lone_queries,
        "seed": config.seed,
        "split_over_ranks": True,
    }
    metrics = retrieval_metrics(embeddings, labels, nmi=nmi, **options, **queries, **query_labels)
    if data.families is not None:
        families = torch.from_numpy(data.families).to(device)
        removed = retrieval_metrics(embeddings, labels, nmi=False, families=families, **options)
        metrics |= {f"other_families/{name}": value for name, value in removed.items()}
    count = min(NEIGHBOURS, len(embeddings) - (gallery is None))
    neighbours, similarities = (part.cpu() for part in nearest_neighbours(embeddings, count, **queries))
    right = searched.labels[neighbours[:, 0]] == test.labels
    scores = {"uncertainty": test.uncertainty, "norm": -test.norm, "similarity": 1 - similarities[:, 0]}
    if config.ism == "off":
        del scores["uncertainty"]
    metrics |= {f"R-AUROC {name}": retrieval_auroc(score, right) for name, score in scores.items()}
    return Found(metrics, neighbours, similarities, right)
