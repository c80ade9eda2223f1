"""The nearest image of each image, within its split, and how likely it is of another class. Q queries, N images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from idml.data.collection import Collection
from idml.embedder import IntrospectiveEmbedder
from idml.errors import UserError
from idml.introspection.calibration import search_evidence
from idml.metrics import nearest_neighbours
from idml.trained import Embeddings, TrainedModel


class Nearest(NamedTuple):
    """What Q queries found.

    Attributes:
        nearest: (Q,) int64, positions among all images.
        similarity: (Q,) float32, cosine.
        uncertainty: (Q,) float32, see ``Pools.score_name``.
    """

    nearest: np.ndarray
    similarity: np.ndarray
    uncertainty: np.ndarray


class Pools:
    """Which images each image is looked for among: those of its split, but for queries, which search the gallery.

    Args:
        model: a retrieval model.
        collection: N images.
        embeddings: of them.

    Raises:
        UserError: an image would be alone.
    """

    def __init__(self, model: TrainedModel, collection: Collection, embeddings: Embeddings) -> None:
        assert isinstance(model.network, IntrospectiveEmbedder)
        self.introspection, self.embeddings = model.introspection, embeddings
        self.device = model.device
        self.foresees = model.score_name == "P(wrong)"
        self.score_name = "1 - top similarity" if model.score_name == "none" else model.score_name
        self.calibrated_on = model.calibrated_on
        names = np.array(collection.splits)
        has_gallery = bool((names == "gallery").any())
        searched = {
            name: "gallery" if has_gallery and name in ("query", "test") else name
            for name in sorted(set(names.tolist()))
        }
        self.pool_of = np.array([searched[name] for name in names.tolist()])
        self.pools = {name: np.flatnonzero(names == name) for name in set(searched.values())}
        for query, pool in searched.items():
            if query == pool and len(self.pools[pool]) < 2:
                where = f"the split {pool} of {collection.source}" if pool else collection.source
                raise UserError(
                    f"{where} has one image, which has none to be compared with; a retrieval model needs two at least"
                )

    def search(self, queries: Embeddings, positions: np.ndarray) -> Nearest:
        """The nearest image of each query, itself excluded.

        Args:
            queries: embeddings of Q images, perhaps spoilt.
            positions: (Q,) int64, the images that they were made from.
        """
        found = Nearest(
            np.zeros(len(positions), np.int64), np.zeros(len(positions), np.float32), queries.uncertainty.copy()
        )
        for name in np.unique(self.pool_of[positions]):
            chosen, pool = np.flatnonzero(self.pool_of[positions] == name), self.pools[name]
            among, similarities = nearest_neighbours(
                self.embeddings.semantic[pool],
                min(2, len(pool) - int(np.isin(positions[chosen], pool).any())),
                query_embeddings=queries.semantic[chosen],
                families=pool,
                query_families=positions[chosen],
            )
            nearest = pool[among[:, 0].numpy()]
            found.nearest[chosen], found.similarity[chosen] = nearest, similarities[:, 0]
            if self.score_name == "1 - top similarity":
                found.uncertainty[chosen] = 1 - similarities[:, 0]
            elif self.foresees:
                found.uncertainty[chosen] = self._probability(queries, chosen, nearest, similarities)
        return found

    @torch.no_grad()
    def _probability(
        self, queries: Embeddings, chosen: np.ndarray, nearest: np.ndarray, similarities: torch.Tensor
    ) -> np.ndarray:
        """That the nearest image is of another class, from query and nearest image together."""
        known = self.embeddings
        assert queries.belief is not None and queries.foreseen_loss is not None
        assert known.belief is not None and known.foreseen_loss is not None
        evidence = search_evidence(
            torch.from_numpy(queries.belief[chosen]),
            torch.from_numpy(queries.foreseen_loss[chosen]),
            torch.from_numpy(known.belief[nearest]),
            torch.from_numpy(known.foreseen_loss[nearest]),
            similarities,
        )
        assert self.introspection is not None and self.introspection.search_calibration is not None
        return self.introspection.search_calibration(evidence.to(self.device)).cpu().numpy()
