"""The ISM as a distance of pytorch-metric-learning: one argument makes any of its losses and miners introspective.

    from pytorch_metric_learning import losses
    loss = losses.MultiSimilarityLoss(distance=IntrospectiveDistance(512))
    loss(torch.cat([semantic, uncertainty], dim=1), labels)

Letters in shapes: B and N rows, D semantic dimensions, E uncertainty dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, LpDistance
from torch import Tensor
from torch.nn import functional

from idml.similarity import (
    TEMPERATURE,
    introspective_distance,
    introspective_exponent,
    introspective_similarity,
    introspective_weight,
)

DistanceVariant = Literal["released", "live"]
DistanceForm = Literal["similarity", "distance"]

OFFSETS: dict[str, float] = {"released": 4.0, "live": 0.0}
"""Constant added to beta. 4 in the authors' retrieval code; the formula of the paper has none."""

SHORTEST = 1e-12
"""Length that a shorter vector is divided by, as in torch's ``normalize``."""


class IntrospectiveDistance(BaseDistance):
    """Cosine similarity, or Euclidean distance of unit vectors, weakened by the uncertainty of the pair.

    A row of D numbers is a proxy or class vector, which has no uncertainty. A longer row is an image: its first D
    numbers are the semantic embedding, the rest the uncertainty embedding. The comparison itself is between unit
    vectors, whatever the norms given; alpha is between the unit semantic embedding of an image and the *raw* proxy, as
    released, or between the unit embeddings of two images.

    Args:
        embedding_dim: D.
        variant: ``"live"`` is the formula of the paper, ``"released"`` that of the authors' retrieval code, with an
            offset of 4. (Released ``u`` is of unit length: that is the embedder's part.)
        form: ``"similarity"`` is a ``CosineSimilarity`` to pytorch-metric-learning, ``sim' = 1 - (1 - sim) w``;
            ``"distance"`` is an ``LpDistance``, ``d' = d w``. A loss that asks for one of these gets it.
        temperature: tau.
        power: the result is raised to it (2 for losses of squared distances).

    Raises:
        ValueError: unknown variant or form, D < 1, or (when called) a row shorter than D.
    """

    embedding_dim: int
    temperature: float
    offset: float

    def __new__(cls, *args: Any, form: DistanceForm = "similarity", **kwargs: Any) -> IntrospectiveDistance:
        if form not in get_args(DistanceForm):
            raise ValueError(f"form must be one of {', '.join(get_args(DistanceForm))}, got {form!r}")
        if cls is IntrospectiveDistance:
            cls = _SimilarityForm if form == "similarity" else _DistanceForm
        return super().__new__(cls)

    def __init__(
        self,
        embedding_dim: int,
        *,
        variant: DistanceVariant = "live",
        form: DistanceForm = "similarity",
        temperature: float = TEMPERATURE,
        power: float = 1,
    ) -> None:
        if variant not in OFFSETS:
            raise ValueError(f"variant must be one of {', '.join(OFFSETS)}, got {variant!r}")
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be at least 1, got {embedding_dim}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        super().__init__(power=power)
        self.embedding_dim, self.variant, self.form = embedding_dim, variant, form
        self.temperature, self.offset = temperature, OFFSETS[variant]

    def maybe_normalize(self, embeddings: Tensor, dim: int = 1, **kwargs: Any) -> Tensor:
        """The rows as they are: alpha needs a proxy's norm, so they are normalised where they are compared."""
        return embeddings

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """(B, D[+E]) and (N, D[+E]) -> (B, N)."""
        return self._compare(query_emb, ref_emb, row_by_row=False)

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """(B, D[+E]) and (B, D[+E]) -> (B,): row with row."""
        return self._compare(query_emb, ref_emb, row_by_row=True)

    def weights(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """(B, D[+E]) and (N, D[+E]) -> (B, N) ISM weights in [0, 1]; 1 where a comparison counts in full."""
        return self._of_pairs(introspective_weight, query_emb, ref_emb)

    def exponents(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """(B, D[+E]) and (N, D[+E]) -> (B, N) exponents x >= 0 of the weights exp(-x), also where those round to 1."""
        return self._of_pairs(introspective_exponent, query_emb, ref_emb)

    def _of_pairs(self, function: Callable[..., Tensor], query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        with torch.autocast(query_emb.device.type, enabled=False):
            alpha, beta = self._alpha_beta(self._split(query_emb), self._split(ref_emb), row_by_row=False)[1:]
            return function(alpha, beta, temperature=self.temperature, offset=self.offset)

    def _compare(self, query_emb: Tensor, ref_emb: Tensor, *, row_by_row: bool) -> Tensor:
        with torch.autocast(query_emb.device.type, enabled=False):
            query, reference = self._split(query_emb), self._split(ref_emb)
            similarity, alpha, beta = self._alpha_beta(query, reference, row_by_row=row_by_row)
            settings: dict[str, float] = {"temperature": self.temperature, "offset": self.offset}
            if self.is_inverted:
                result = introspective_similarity(similarity, alpha, beta, **settings)
            else:
                # Not the root of 2 - 2 cos: its rounding would be felt, and its gradient at zero is not finite.
                measure = functional.pairwise_distance if row_by_row else torch.cdist
                distance = measure(query.semantic, reference.semantic)
                result = introspective_distance(distance, beta, sq_distance=alpha, **settings)
        return result.to(query_emb.dtype)

    @staticmethod
    def _alpha_beta(query: _Rows, reference: _Rows, *, row_by_row: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Cosine, alpha and beta of each pair; beta is (B, 1) where images are compared with proxies.

        There may be 100,000 proxies: the fewer steps over all pairs, the better.
        """

        def inner(x: Tensor, y: Tensor) -> Tensor:
            return (x * y).sum(1) if row_by_row else x @ y.T

        def column(values: Tensor) -> Tensor:
            return values if row_by_row else values[:, None]

        cosine = inner(query.semantic, reference.semantic)
        length_q, length_r = (1.0 if rows.length is None else rows.length for rows in (query, reference))
        length_q = column(length_q) if isinstance(length_q, Tensor) else length_q
        alpha = (length_q**2 + length_r**2) - 2 * length_q * length_r * cosine
        beta = column(query.uncertainty.square().sum(1))
        if reference.uncertainty.shape[1]:
            beta = beta + reference.uncertainty.square().sum(1)
        if query.uncertainty.shape[1] and reference.uncertainty.shape[1]:
            beta = (beta + 2 * inner(query.uncertainty, reference.uncertainty)).clamp_min(
                0
            )  # a square, but for rounding
        return cosine, alpha, beta

    def _split(self, rows: Tensor) -> _Rows:
        width = rows.shape[1]
        if width < self.embedding_dim:
            raise ValueError(f"expected rows of at least embedding_dim = {self.embedding_dim} numbers, got {width}")
        rows = rows if rows.dtype == torch.float64 else rows.float()
        semantic, uncertainty = rows[:, : self.embedding_dim], rows[:, self.embedding_dim :]
        if width > self.embedding_dim:
            return _Rows(functional.normalize(semantic, dim=1), None, uncertainty)
        # As ``normalize`` does it, but with the length, and its gradient, computed once.
        length = semantic.norm(dim=1)
        return _Rows(semantic / length.clamp_min(SHORTEST)[:, None], length, uncertainty)


class _Rows(NamedTuple):
    """Rows taken apart.

    Attributes:
        semantic: (B, D) of unit length.
        length: (B,) that proxies had; None of images, which count as unit vectors.
        uncertainty: (B, E) of images, (B, 0) of proxies.
    """

    semantic: Tensor
    length: Tensor | None
    uncertainty: Tensor


class _SimilarityForm(IntrospectiveDistance, CosineSimilarity):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.form = "similarity"


class _DistanceForm(IntrospectiveDistance, LpDistance):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.form = "distance"
