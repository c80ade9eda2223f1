"""What queries find in a file of embeddings: their neighbours, the introspective order, the probability of an error.

Letters in shapes: N images in the file, Q queries, D semantic and E uncertainty dimensions, k neighbours.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from idml.data.collection import read_collection
from idml.data.image_dataset import ImageDataset
from idml.data.image_files import decoding_error, printable
from idml.embedder import IntrospectiveEmbedder
from idml.embedding_file import EmbeddingTable
from idml.errors import UserError
from idml.index import EmbeddingIndex
from idml.introspection.calibration import search_evidence
from idml.introspection.novelty import index_novelty
from idml.metrics.neighbours import CHUNK_BYTES
from idml.paths import nearest_path
from idml.similarity import introspective_exponent
from idml.trained import Embeddings, TrainedModel

RERANKED, RERANKED_PER_K = 100, 10
"""The introspective order is of the max(100, 10 k) nearest."""

LEAST = 1e-12
"""Least 1 - cos of which a logarithm is taken: of copies of one image."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Queries:
    """Q images that look for others.

    Attributes:
        paths: Q files.
        names: as they are shown.
        labels: Q names of classes; None where it is not known.
        positions: (Q,) int64 where the file is in the index itself; -1 where it is not.
    """

    paths: list[Path]
    names: list[str]
    labels: list[str | None]
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What Q queries found.

    Attributes:
        queries: Q images.
        embedded: what the model says of them.
        table: that was searched.
        indices: (Q, k) int64 positions in the file, best first.
        similarities: (Q, k) cosine similarities.
        introspective: (Q, k) float64, log of one less the introspective similarity, by which they are then in order;
            None where not asked for.
        other_class: (Q,) probability in [0, 1] that the nearest image, by cosine similarity, is of another class than
            the query; None where the model does not say.
        novelty: (Q,) share of the index's own images whose nearest other one is nearer, see ``index_novelty``; None
            where there are no coordinates.
    """

    queries: Queries
    embedded: Embeddings
    table: EmbeddingTable
    indices: np.ndarray
    similarities: np.ndarray
    introspective: np.ndarray | None = None
    other_class: np.ndarray | None = None
    novelty: np.ndarray | None = None


def read_queries(
    given: Sequence[str], table: EmbeddingTable, root: Path | None, *, skip_bad_images: bool, workers: int
) -> Queries:
    """Files, and the images below folders.

    Args:
        given: files and folders.
        table: that is searched; a query in it has its label from there.
        root: the folder that the table's paths are relative to; None where they are no files.
        skip_bad_images: see ``read_collection``.
        workers: threads that decode.

    Raises:
        UserError: there is no such file, it is no image, or the folder has none.
    """
    paths: list[Path] = []
    labels: list[str | None] = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            collection = read_collection(path, skip_bad_images=skip_bad_images, workers=workers)
            paths += collection.dataset.paths or ()
            labels += collection.labels
            continue
        if not path.exists():
            raise UserError(f"no query {path}: expected an image, or a folder of images; {nearest_path(path)}")
        if error := decoding_error(path):
            raise UserError(f"the query {path} is no image that can be decoded: {error}")
        paths.append(path)
        labels.append(None)
    positions = np.array(_positions(paths, table, root), np.int64)
    labels = [label if at < 0 else table.labels[at] for label, at in zip(labels, positions, strict=True)]
    return Queries(paths=paths, names=[printable(str(path)) for path in paths], labels=labels, positions=positions)


def _positions(paths: Sequence[Path], table: EmbeddingTable, root: Path | None) -> list[int]:
    """Where files are in the index, by their paths, whatever links lead to them; -1 where they are not."""
    if root is None:
        return [-1] * len(paths)
    place = {name: index for index, name in enumerate(table.paths)}
    folders: dict[str, list[str]] = {}
    for name in {os.path.dirname(name) for name in table.paths}:
        folders.setdefault(os.path.realpath(root / name), []).append(name)
    return [_position(path, root.resolve(), place, folders) for path in paths]


def _position(path: Path, root: Path, place: Mapping[str, int], folders: Mapping[str, Sequence[str]]) -> int:
    """See ``_positions``; ``folders`` are those of the index, by where they really are."""
    # Its folder's links followed and not its own, as in listing; and its own too.
    for candidate in (Path(os.path.abspath(path)), path.parent.resolve() / path.name, path.resolve()):
        names = [os.path.join(folder, printable(candidate.name)) for folder in folders.get(str(candidate.parent), ())]
        if candidate.is_relative_to(root):
            names.append(printable(candidate.relative_to(root).as_posix()))
        if found := [place[name] for name in names if name in place]:
            return found[0]
    return -1


def embed_queries(model: TrainedModel, queries: Queries, *, batch_size: int, workers: int) -> Embeddings:
    """The queries as the model sees them."""
    dataset = ImageDataset(labels=np.full(len(queries), -1), classes=(), paths=tuple(queries.paths))
    return Embeddings.joined(list(model.embed_dataset(dataset, batch_size=batch_size, workers=workers)))


def check_model(model: TrainedModel, table: EmbeddingTable, path: Path) -> None:
    """UserError where the embeddings are not the model's."""
    network, about = model.network, table.about
    width = network.embedding_dim if isinstance(network, IntrospectiveEmbedder) else network.feature_dim
    if width != about["dimensions"]["semantic"]:
        raise UserError(
            f"{path} has embeddings of {about['dimensions']['semantic']} dimensions, {model.source} makes ones of "
            f"{width}: expected the model that the file was made with, {about.get('checkpoint')}"
        )
    if model.fingerprint != about["fingerprint"]:
        raise UserError(
            f"{path} was made with the model {about['fingerprint']} ({about.get('checkpoint')}), {model.source} is "
            f"{model.fingerprint}: embeddings of two models cannot be compared. Give the model of then, or make the "
            "file again with embed"
        )


def find(
    queries: Queries,
    embedded: Embeddings,
    table: EmbeddingTable,
    index: EmbeddingIndex,
    model: TrainedModel,
    *,
    k: int,
    introspective: Mapping[str, float] | None,
    **wide: Any,
) -> Found:
    """The k nearest images of each query, itself left out where it is in the index.

    Args:
        embedded: the queries.
        table: with ``uncertainty_embedding`` for the introspective order, with ``belief`` and ``foreseen_loss`` for the
            probability of another class, and with ``coordinates`` for the novelty.
        index: of the table's embeddings.
        model: that both are of.
        k: 1 to the number of images that each query can choose from.
        introspective: order by the introspective similarity, with these settings of it; None: by the cosine.
        wide: see ``EmbeddingIndex.search``.
    """
    available = len(table) - int((queries.positions >= 0).any())
    calibrated = model.task == "retrieval" and model.introspection is not None and "belief" in table.numbers
    count = max(k, 2 if calibrated else 1) if introspective is None else max(RERANKED, RERANKED_PER_K * k)
    found = index.search(embedded.semantic, min(count, available), left_out=queries.positions, **wide)
    other_class = None
    if calibrated:
        other_class = _other_class(embedded, table, model, found.indices[:, 0], found.similarities[:, :2])
    indices, similarities, apart = found.indices, found.similarities, None
    if introspective is not None:
        apart = introspective_dissimilarities(embedded, table, indices, **introspective)
        order = np.argsort(apart, axis=1, kind="stable")
        indices, similarities, apart = (np.take_along_axis(each, order, 1) for each in (indices, similarities, apart))
    return Found(
        queries=queries,
        embedded=embedded,
        table=table,
        indices=indices[:, :k],
        similarities=similarities[:, :k],
        introspective=None if apart is None else apart[:, :k],
        other_class=other_class,
        novelty=_novelty(embedded, table, queries.positions) if model.task == "retrieval" else None,
    )


def _novelty(embedded: Embeddings, table: EmbeddingTable, positions: np.ndarray) -> np.ndarray | None:
    """(Q,) novelty among the images of the file; None where coordinates are not known."""
    if embedded.coordinates is None or "coordinates" not in table.numbers:
        return None
    both = (embedded.coordinates, np.require(table.numbers["coordinates"], requirements="W"))  # torch takes no others
    queries, index = map(torch.from_numpy, both)
    return index_novelty(queries, index, left_out=torch.from_numpy(positions)).numpy()


def ism_settings(table: EmbeddingTable, path: Path) -> dict[str, float]:
    """Temperature and offset of the model's ISM.

    Raises:
        UserError: the model has none, so that nothing can be ordered by it.
    """
    from idml.distance import OFFSETS  # slow to import: only where used

    about = table.about
    if about["ism"] == "off" or "uncertainty_embedding" not in table.numbers:
        raise UserError(
            f"--introspective: the images in {path} have no uncertainty embedding, since their model was trained with "
            "ISM off; take a model with ISM, or search without"
        )
    offset = OFFSETS[about["ism"]] if about["task"] == "retrieval" else 0.0
    return {"temperature": about["temperature"], "offset": offset}


def introspective_dissimilarities(
    embedded: Embeddings, table: EmbeddingTable, candidates: np.ndarray, *, temperature: float, offset: float
) -> np.ndarray:
    """log(1 - sim') of queries and images, sim' being the cosine weakened by the uncertainty of both.

    The logarithm, because sim' itself rounds to 1 for near images that the model is unsure of. alpha is the squared
    distance of the semantic embeddings, as long as they are in training: of unit length in retrieval, and as they come
    from the backbone in classification. beta is ``|u_x + u_y|^2`` and the offset.

    Args:
        embedded: Q queries.
        table: of the N images.
        candidates: (Q, m) int64, the images that each query is compared with.
        temperature, offset: see ``ism_settings``.

    Returns:
        (Q, m) float64.
    """
    about, unit = table.about, table.about["task"] == "retrieval"
    width = max(about["dimensions"]["semantic"], about["dimensions"]["uncertainty"])
    height = max(1, CHUNK_BYTES // (8 * 4 * width * candidates.shape[1]))
    found = np.empty(candidates.shape)
    for start in range(0, len(candidates), height):
        rows = slice(start, start + height)
        chosen = candidates[rows]  # (h, m)
        query = torch.from_numpy(embedded.semantic[rows])[:, None].double()
        images = _rows(table, "embedding", chosen).double()  # (h, m, D)
        sq_apart = (functional.normalize(query, dim=2) - functional.normalize(images, dim=2)).square().sum(2)
        alpha = sq_apart if unit else (query - images).square().sum(2)
        doubt = torch.from_numpy(embedded.uncertainty_embedding[rows])[:, None] + _rows(
            table, "uncertainty_embedding", chosen
        )
        exponent = introspective_exponent(alpha, doubt.double().square().sum(2), temperature=temperature, offset=offset)
        # 1 - cos is half the squared distance of unit vectors, without the cancellation.
        found[rows] = ((sq_apart / 2).clamp_min(LEAST).log() - exponent).numpy()
    return found


def _rows(table: EmbeddingTable, name: str, chosen: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(table.numbers[name][chosen])


@torch.no_grad()
def _other_class(
    embedded: Embeddings, table: EmbeddingTable, model: TrainedModel, nearest: np.ndarray, similarities: np.ndarray
) -> np.ndarray:
    """(Q,) probability that the nearest image is of another class, from both images and how near it is."""
    assert model.introspection is not None and model.introspection.search_calibration is not None
    assert embedded.belief is not None and embedded.foreseen_loss is not None
    evidence = search_evidence(
        torch.from_numpy(embedded.belief),
        torch.from_numpy(embedded.foreseen_loss),
        _rows(table, "belief", nearest),
        _rows(table, "foreseen_loss", nearest),
        torch.from_numpy(similarities),
    )
    return model.introspection.search_calibration(evidence.to(model.device)).cpu().numpy()
