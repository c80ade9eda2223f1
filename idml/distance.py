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
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, DotProductSimilarity, LpDistance
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
DistanceForm = Literal["similarity", "distance", "product"]

OFFSETS: dict[str, float] = {"released": 4.0, "live": 0.0}
"""Constant added to beta. 4 in the authors' retrieval code; the formula of the paper has none."""

RAW_PROXIES: dict[str, bool] = {"released": True, "live": False}
"""Whether alpha is taken to a proxy at its own length, as in the authors' code, or at length 1, as between two images.

To a proxy p of length n, alpha = 1 + n^2 - 2 n cos. Where n is large the cosine is hardly felt in it, and the weight is
nearly the same for every proxy; at length 1 alpha = 2 - 2 cos, twice what the similarity lacks to 1."""

SHORTEST = 1e-12
"""Length that a shorter vector is divided by, as in torch's ``normalize``."""


class IntrospectiveDistance(BaseDistance):
    """Cosine similarity, or Euclidean distance of unit vectors, weakened by the uncertainty of the pair.

    A row of D numbers is a proxy or class vector, which has no uncertainty. A longer row is an image: its first D
    numbers are the semantic embedding, the rest the uncertainty embedding. The comparison itself is between unit
    vectors, whatever the norms given, and so is alpha; ``"released"`` alone takes alpha between the unit embedding of
    an image and the *raw* proxy.

    Args:
        embedding_dim: D.
        variant: ``"live"`` is the formula of the paper, ``"released"`` that of the authors' retrieval code, with an
            offset of 4 and raw proxies. (Released ``u`` is of unit length: that is the embedder's part.)
        form: ``"similarity"`` is a ``CosineSimilarity`` to pytorch-metric-learning, ``sim' = 1 - (1 - sim) w``;
            ``"distance"`` is an ``LpDistance``, ``d' = d w``. ``"product"`` is a ``DotProductSimilarity`` of vectors as
            they are, whose inner product takes the place of the cosine, and their squared distance that of alpha. A
            loss that asks for one of these gets it.
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
            cls = {"similarity": _SimilarityForm, "distance": _DistanceForm, "product": _ProductForm}[form]
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
        """Similarity, alpha and beta of each pair; beta is (B, 1) where images are compared with proxies.

        There may be 100,000 proxies: the fewer steps over all pairs, the better.
        """

        def inner(x: Tensor, y: Tensor) -> Tensor:
            return (x * y).sum(1) if row_by_row else x @ y.T

        def column(values: Tensor | float) -> Tensor | float:
            return values[:, None] if isinstance(values, Tensor) and not row_by_row else values

        similarity = inner(query.semantic, reference.semantic)
        squares = column(query.sq_length) + reference.sq_length
        alpha = squares - 2 * column(query.length) * reference.length * similarity
        beta = query.uncertainty.square().sum(1)
        beta = beta if row_by_row else beta[:, None]
        if reference.uncertainty.shape[1]:
            beta = beta + reference.uncertainty.square().sum(1)
        if query.uncertainty.shape[1] and reference.uncertainty.shape[1]:
            # A square, but for rounding.
            beta = (beta + 2 * inner(query.uncertainty, reference.uncertainty)).clamp_min(0)
        return similarity, alpha, beta

    def _split(self, rows: Tensor) -> _Rows:
        width = rows.shape[1]
        if width < self.embedding_dim:
            raise ValueError(f"expected rows of at least embedding_dim = {self.embedding_dim} numbers, got {width}")
        rows = rows if rows.dtype == torch.float64 else rows.float()
        semantic, uncertainty = rows[:, : self.embedding_dim], rows[:, self.embedding_dim :]
        if self.form == "product":
            semantic = semantic.contiguous()  # as the plain loss has it: products are then the same to the last bit
            return _Rows(semantic, uncertainty, sq_length=semantic.square().sum(1))
        if width > self.embedding_dim or not RAW_PROXIES[self.variant]:
            return _Rows(functional.normalize(semantic, dim=1), uncertainty)
        # As ``normalize`` does it, but with the length, and its gradient, computed once.
        length = semantic.norm(dim=1)
        return _Rows(semantic / length.clamp_min(SHORTEST)[:, None], uncertainty, length, length**2)


class _Rows(NamedTuple):
    """Rows taken apart.

    Attributes:
        semantic: (B, D) whose inner products are the similarities: of unit length but for the form ``"product"``.
        uncertainty: (B, E) of images, (B, 0) of proxies.
        length: (B,) by which ``semantic`` is multiplied where alpha is measured.
        sq_length: (B,) squared length that it then has.
    """

    semantic: Tensor
    uncertainty: Tensor
    length: Tensor | float = 1.0
    sq_length: Tensor | float = 1.0


class _SimilarityForm(IntrospectiveDistance, CosineSimilarity):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.form = "similarity"


class _DistanceForm(IntrospectiveDistance, LpDistance):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.form = "distance"


class _ProductForm(IntrospectiveDistance, DotProductSimilarity):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.form = "product"
