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
from idml.errors import TrainingError
from idml.introspection.calibration import search_evidence
from idml.introspection.introspection import Introspection
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
        uncertainty: (N,) |u|; P(wrong) of the image alone where there is an introspection.
        norm: (N,) length of the semantic embedding before it was normalised.
        labels: (N,) int64.
        foreseen_loss: (N,) nats, and belief: (N, K) of unit length, of the introspection; NaN and (N, 0) without one.
    """

    semantic: Tensor
    uncertainty: Tensor
    norm: Tensor
    labels: Tensor
    foreseen_loss: Tensor
    belief: Tensor


class Found(NamedTuple):
    """What the test images found: the figures, and per query (Q,) the nearest ones.

    Attributes:
        metrics: R@K, RP, MAP@R, P@1, the R-AUROC of up to four scores; NMI and F1 where asked for; the same with the
            query's family removed from the gallery, as ``other_families/R@1`` and so on, where the data have families.
        neighbours: (Q, 5) int64 positions in the gallery, nearest first.
        similarities: (Q, 5) their cosine similarities.
        right: (Q,) bool, whether the nearest one is of the query's class.
        error_probability: (Q,) in [0, 1], that it is not, from query and nearest neighbour together; None without an
            introspection.
    """

    metrics: dict[str, float]
    neighbours: Tensor
    similarities: Tensor
    right: Tensor
    error_probability: Tensor | None = None


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

    Raises:
        TrainingError: some are not finite.
    """
    model.eval()
    device = next(model.parameters()).device
    batches = []
    for images, labels in loader.epoch(0):
        images = normalise(images.to(device, non_blocking=True), preprocessing.mean, preprocessing.std)
        with autocast(device, precision):
            output = model(images)
        norm, scores = output.norm, output.scores
        score = uncertainty_score(output) if scores is None else scores.p_wrong
        foreseen = torch.full_like(norm, torch.nan) if scores is None else scores.foreseen_loss
        belief = norm.new_zeros(len(norm), 0) if scores is None else scores.belief
        columns = [column.float().cpu() for column in (output.semantic, score, norm, foreseen, belief)]
        batches.append([*columns[:3], labels, *columns[3:]])
    embedded = Embedded(*gather_interleaved([torch.cat(columns) for columns in zip(*batches, strict=True)]))
    bad = int((~embedded.semantic.isfinite().all(1)).sum())
    if bad:
        raise TrainingError(
            f"non-finite embeddings of {bad} of {len(embedded.semantic)} images: the network has diverged, or its "
            "weights are damaged. Try a lower --lr, or --precision bf16 in place of fp16"
        )
    return embedded


def evidence_of(queries: Embedded, searched: Embedded, neighbours: Tensor, similarities: Tensor) -> Tensor:
    """(Q, 5) ``search_evidence`` of what queries found: (Q, k) neighbours, nearest first, and their similarities."""
    nearest = neighbours[:, 0]
    return search_evidence(
        queries.belief,
        queries.foreseen_loss,
        searched.belief[nearest],
        searched.foreseen_loss[nearest],
        similarities[:, :2],
    )


def held_out_metrics(held_out: Embedded, config: DmlConfig, device: torch.device) -> dict[str, float]:
    """R@K, RP, MAP@R and P@1 of held-out images that search one another, each under its name with ``val_`` before it.

    Args:
        held_out: embeddings of them all, on every rank; the queries are dealt out to the ranks.
        config: K, lone queries.
        device: that the metrics are computed on.
    """
    assert config.ks is not None
    metrics = retrieval_metrics(
        held_out.semantic.to(device),
        held_out.labels.to(device),
        ks=tuple(k for k in config.ks if k < len(held_out.labels)),
        nmi=False,
        lone=config.lone_queries,
        split_over_ranks=True,
    )
    return {f"val_{name}": value for name, value in metrics.items()}


def search(
    test: Embedded,
    gallery: Embedded | None,
    data: RetrievalData,
    config: DmlConfig,
    model: nn.Module,
    introspection: Introspection | None = None,
    *,
    last: bool,
) -> Found:
    """The figures of a retrieval, the queries dealt out to the ranks.

    Args:
        test: embeddings of the test images.
        gallery: of the gallery; None where the test images search one another.
        data: gives families.
        config: K, clustering, lone queries.
        model: whose embeddings they are; figures are computed on its device.
        introspection: of the model, if the embeddings have what it says.
        last: whether training is over; large sets are clustered only then.
    """
    assert config.ks is not None
    device = next(model.parameters()).device
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
    if config.ism == "off" and introspection is None:
        del scores["uncertainty"]
    probability = None
    if introspection is not None:
        assert introspection.search_calibration is not None
        evidence = evidence_of(test, searched, neighbours, similarities)
        with torch.no_grad():
            probability = scores["search"] = introspection.search_calibration(evidence.to(device)).cpu()
    metrics |= {f"R-AUROC {name}": retrieval_auroc(score, right) for name, score in scores.items()}
    return Found(metrics, neighbours, similarities, right, probability)
