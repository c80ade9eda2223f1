"""Searching in stored embeddings by cosine similarity: exactly, or with an index of faiss that is kept beside the file.

Letters in shapes: N images that are searched, Q queries, D dimensions, k neighbours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from idml.embedding_file import written_whole
from idml.errors import StorageError, UserError
from idml.metrics.neighbours import CHUNK_BYTES, Search, neighbours_in_chunks, unit_vectors

IndexType = Literal["exact", "flat", "hnsw", "ivfpq"]

HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 128, 128
"""Of HNSW (Malkov and Yashunin 2016): links of a node, and nodes that are kept in view in building and in searching.
Between faiss's own 32, 40, 16, which is for speed, and what finds nearly all; measured in docs/commands/search.md."""

TRAINING_POINTS = 39
"""Least vectors for each centre that k-means finds; below, faiss warns."""

LEAST_IVFPQ = TRAINING_POINTS * 16
"""Fewest images for IVF-PQ: codes of 4 bits, which have 16 centres."""

PROBES = 32
"""Lists of IVF-PQ that are looked into."""

CANDIDATES = 10
"""The codes of IVF-PQ are coarse: so many times k are found by them, and the k best of these by the embeddings."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Neighbours:
    """What Q queries found.

    Attributes:
        indices: (Q, k) int64, nearest first.
        similarities: (Q, k) float32, their cosine similarities, computed from the embeddings whatever the index.
    """

    indices: np.ndarray
    similarities: np.ndarray


def faiss() -> Any:
    """The package; UserError where it is not installed."""
    try:
        import faiss
    except ImportError:
        raise UserError(
            "an index needs faiss, which is not installed: pip install 'idml[search]', or take --index-type exact"
        ) from None
    return faiss


class EmbeddingIndex:
    """N embeddings to search in.

    Args:
        embeddings: (N, D) float32, finite; compared at unit length.
        kind: ``"exact"`` compares with each; ``"flat"`` does the same in faiss; ``"hnsw"`` is a graph, ``"ivfpq"``
            lists of compressed vectors, which miss some neighbours and are faster in large sets.
        fingerprint: of the model.

    Raises:
        UserError: too few images for IVF-PQ; faiss is needed and not installed.
    """

    def __init__(self, embeddings: np.ndarray, kind: IndexType, fingerprint: str) -> None:
        if kind != "exact":
            faiss()
        if kind == "ivfpq" and len(embeddings) < LEAST_IVFPQ:
            raise UserError(
                f"--index-type ivfpq needs at least {LEAST_IVFPQ} images to learn its codes from, there are "
                f"{len(embeddings)}; take --index-type exact"
            )
        self.raw, self.embeddings = embeddings, unit_vectors("embeddings", embeddings).numpy()
        self.kind, self.fingerprint = kind, fingerprint
        self._index: Any = None

    def open(self, beside: Path) -> str:
        """Read the index that is kept beside a file of embeddings, or build it and keep it there.

        Args:
            beside: the file; the index is ``E.parquet.hnsw.faiss``, and what it is of ``E.parquet.hnsw.json``.

        Returns:
            What was done, for people; empty for an exact search, which has no index.
        """
        if self.kind == "exact":
            return ""
        path = beside.with_name(f"{beside.name}.{self.kind}.faiss")
        reason = self._read(path)
        if reason is None:
            return f"index {path} read"
        started = time.perf_counter()
        self.build()
        done = f"index {path} {reason}: built in {time.perf_counter() - started:.1f} s"
        try:
            self._write(path)
        except StorageError as error:
            warnings.warn(f"the index is not kept: {error}", UserWarning, stacklevel=2)
        return done

    def build(self) -> None:
        """Make the index of faiss in memory."""
        package = faiss()
        count, width = self.embeddings.shape
        if self.kind == "flat":
            index = package.IndexFlatIP(width)
        elif self.kind == "hnsw":
            index = package.IndexHNSWFlat(width, HNSW_LINKS)
            index.hnsw.efConstruction = HNSW_BUILD
        else:
            lists, pieces, bits = ivfpq_shape(count, width)
            index = package.IndexIVFPQ(package.IndexFlatL2(width), width, lists, pieces, bits)
            index.train(self.embeddings)
        index.add(self.embeddings)
        self._index = index

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        left_out: np.ndarray | None = None,
        ef_search: int | None = None,
        nprobe: int | None = None,
    ) -> Neighbours:
        """The k nearest of each query.

        Args:
            queries: (Q, D) float32.
            k: 1 to N, or to N - 1 where a query has an image that it leaves out.
            left_out: (Q,) int64, the image that is no neighbour of the query, itself say; -1: none.
            ef_search: of HNSW, nodes kept in view; nprobe: of IVF-PQ, lists looked into. More find more, and take
                longer.
        """
        left_out = np.full(len(queries), -1) if left_out is None else left_out
        available = len(self.embeddings) - int((left_out >= 0).any())
        assert 1 <= k <= available
        if self.kind == "exact":
            return self._search_exactly(queries, k, left_out)
        unit = unit_vectors("queries", queries).numpy()
        wanted = min(k + 1 if self.kind != "ivfpq" else max(CANDIDATES * k, 2), len(self.embeddings))
        self._look_wide(wanted, ef_search, nprobe)
        candidates = self._index.search(unit, wanted)[1]
        return self._best(unit, candidates, k, left_out)

    def _search_exactly(self, queries: np.ndarray, k: int, left_out: np.ndarray) -> Neighbours:
        """As ``nearest_neighbours``, but for a gallery that is of unit length already: no copy of it is made."""
        families = torch.arange(len(self.embeddings)), torch.from_numpy(left_out)
        search = Search(torch.from_numpy(self.embeddings), unit_vectors("queries", queries), False, families)
        indices = np.empty((len(queries), k), np.int64)
        similarities = np.empty((len(queries), k), np.float32)
        for rows, found, values in neighbours_in_chunks(search, torch.full((len(queries),), k), CHUNK_BYTES):
            indices[rows.numpy()], similarities[rows.numpy()] = found.numpy(), values.numpy()
        return Neighbours(indices=indices, similarities=similarities)

    def _look_wide(self, wanted: int, ef_search: int | None, nprobe: int | None) -> None:
        """Tell faiss how wide to look: by the index, since pytorch-metric-learning replaces ``search`` by one of torch
        tensors that takes no parameters."""
        if self.kind == "hnsw":
            self._index.hnsw.efSearch = max(ef_search or HNSW_SEARCH, wanted)
        elif self.kind == "ivfpq":
            self._index.nprobe = min(nprobe or PROBES, self._index.nlist)

    def _best(self, queries: np.ndarray, candidates: np.ndarray, k: int, left_out: np.ndarray) -> Neighbours:
        """The k best of (Q, m) candidates (-1: none) by the embeddings themselves; exactly where they are too few."""
        indices = np.empty((len(queries), k), np.int64)
        similarities = np.empty((len(queries), k), np.float32)
        for row, (query, found) in enumerate(zip(queries, candidates, strict=True)):
            own = np.sort(found[(found >= 0) & (found != left_out[row])])  # so that of equals the first comes first
            if len(own) < k:  # a graph with loose ends, or lists that are nearly empty
                own = np.flatnonzero(np.arange(len(self.embeddings)) != left_out[row])
            scores = self.embeddings[own] @ query
            best = np.argsort(-scores, kind="stable")[:k]
            indices[row], similarities[row] = own[best], scores[best]
        return Neighbours(indices=indices, similarities=similarities)

    def _described(self) -> dict[str, Any]:
        """What an index must be of, to be this one's."""
        count, width = self.embeddings.shape
        settings: dict[str, Any] = {"flat": {}, "hnsw": {"links": HNSW_LINKS, "build": HNSW_BUILD}}.get(self.kind, {})
        if self.kind == "ivfpq":
            settings = dict(zip(("lists", "pieces", "bits"), ivfpq_shape(count, width), strict=True))
        return {
            "index_type": self.kind,
            "fingerprint": self.fingerprint,
            "images": count,
            "dimensions": width,
            "embeddings_sha256": hashlib.sha256(np.ascontiguousarray(self.raw).data).hexdigest(),
            "settings": settings,
        }

    def _read(self, path: Path) -> str | None:
        """Take the index from a file; else why it is not to be used."""
        if not path.exists():
            return "is new"
        try:
            stored = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            digest = stored.pop("file_sha256")
            with path.open("rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == digest
        except (OSError, ValueError, KeyError, AttributeError):
            return "does not say what it is of"
        expected = self._described()
        for name, what in (("fingerprint", "model"), ("images", "number of images"), ("dimensions", "dimension")):
            if stored.get(name) != expected[name]:
                return f"is of another {what}"
        if stored != expected:
            return "is of other embeddings, or has other settings"
        if not whole:
            return "is damaged"
        try:
            self._index = faiss().read_index(str(path))
        except RuntimeError:
            return "cannot be read by this faiss"
        return None

    def _write(self, path: Path) -> None:
        """Keep the index, and beside it what it is of."""
        with written_whole(path) as temporary:
            try:
                faiss().write_index(self._index, str(temporary))
            except RuntimeError as error:  # faiss's own word for a write that failed
                raise StorageError(f"could not write {path}: {error}") from None
            with temporary.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            with contextlib.suppress(OSError):
                path.with_suffix(".json").unlink(missing_ok=True)  # in between, an index is of nothing
        with written_whole(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(self._described() | {"file_sha256": digest}, indent=1), encoding="utf-8")


def ivfpq_shape(count: int, width: int) -> tuple[int, int, int]:
    """Lists, pieces and bits of a piece for ``count`` vectors of ``width`` numbers.

    4 sqrt(N) lists, as faiss's guidelines say, where there are vectors enough to find their centres; pieces of 4
    numbers, 64 at most; 8 bits, or fewer where there are too few vectors for 256 centres.
    """
    lists = max(1, min(round(4 * math.sqrt(count)), count // TRAINING_POINTS))
    most = max(1, min(64, width // 4))
    pieces = next(pieces for pieces in range(most, 0, -1) if width % pieces == 0)
    bits = min(8, int(math.log2(max(count // TRAINING_POINTS, 2))))
    return lists, pieces, bits
