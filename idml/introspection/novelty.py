"""How strange an image is to a network: its distance to what the network knows, at several depths at once.

Letters in shapes: B and N images, F numbers of a standardised depth vector, Q dimensions of the density, C classes, M
steps of the table.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DIMENSIONS = 128
"""Q: principal components in which distances are taken; benchmarks/introspection.py compares the score with others."""

SHRINKAGE = 1e-2
"""Share of the mean variance that is added to each variance: directions in which known images hardly differ would
otherwise decide alone."""

LEAST_WITHIN = 1e-6
"""Least variance within classes, as a share of that of all images."""

FITTED_ON = 20_000
"""Images that the principal components are found from, at most."""

STEPS = 1_000
"""M: resolution of the table from strangeness to novelty."""


INDEX_SAMPLE, LEAST_SAMPLE, COMPARISONS, ENTRIES = 2_000, 200, 200_000_000, 2**24
"""Of ``index_novelty``: images of an index that a query is compared with, at most, at least, and as many as so many
distances allow; distances that are in memory at once."""


class Novelty(nn.Module):
    """Mahalanobis distance to the nearest class mean, in the principal components of the depth vector; and its rank.

    ``strangeness`` is that squared distance. ``novelty`` is the share of held-out known images that are less strange:
    one less a conformal p-value, so that 0.99 means "stranger than 99 % of what I know".

    Args:
        length: F; classes: C; dimensions: Q; steps: M.

    Attributes:
        centre: (F,) float32 buffer; projection: (F, Q), to coordinates in which the covariance within classes is one;
        means: (C, Q) of the classes; table: (M,) strangeness of held-out images, ascending, infinite before ``rank``.
    """

    centre: Tensor
    projection: Tensor
    means: Tensor
    table: Tensor

    def __init__(self, length: int, classes: int, dimensions: int = DIMENSIONS, steps: int = STEPS) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(length))
        self.register_buffer("projection", torch.zeros(length, dimensions))
        self.register_buffer("means", torch.zeros(classes, dimensions))
        self.register_buffer("table", torch.full((steps,), torch.inf))

    def coordinates(self, vectors: Tensor) -> Tensor:
        """(B, F) standardised -> (B, Q)."""
        return (vectors - self.centre) @ self.projection

    def strangeness(self, found: Tensor) -> Tensor:
        """(B, Q) coordinates -> (B,) squared distance to the nearest class mean, float32, >= 0."""
        squares = found.square().sum(1, keepdim=True) + self.means.square().sum(1) - 2 * found @ self.means.T
        return squares.amin(1).clamp_min(0)

    def novelty(self, strangeness: Tensor) -> Tensor:
        """(B,) strangeness -> (B,) in [0, 1]."""
        return (strangeness[:, None] > self.table).float().mean(1)

    @torch.no_grad()
    def fit(self, vectors: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        """Find components, means and the covariance within classes.

        Args:
            vectors: (N, F) standardised, of any floating dtype: made float32 a part at a time.
            labels: (N,) int64 in [0, C). A class without an image keeps its mean at the centre of all.
            generator: draws the images that components are found from.
        """
        chosen = torch.randperm(len(vectors), generator=generator)[:FITTED_ON]
        some = vectors[chosen].float()
        self.centre.copy_(some.mean(0))
        dimensions = self.projection.shape[1]
        count = min(dimensions, len(some) - 1, some.shape[1])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            _, _, components = torch.svd_lowrank(some - self.centre, q=min(count + 8, *some.shape), niter=4)
        components = components[:, :count]
        found = torch.cat([(part.float() - self.centre) @ components for part in vectors.split(4096)])
        sums = found.new_zeros(len(self.means), count).index_add_(0, labels, found)
        counts = labels.bincount(minlength=len(self.means)).clamp_min(1)
        means = sums / counts[:, None]
        within = found - means[labels]
        covariance = within.T @ within / len(within)
        # Where all images of each class look alike (one image a class, say), there is no variance within classes.
        least = (LEAST_WITHIN * found.var(0).mean()).clamp_min(torch.finfo(found.dtype).tiny * 1e6)
        covariance += SHRINKAGE * covariance.diagonal().mean().maximum(least) * torch.eye(count)
        # With L L' the inverse of the covariance, |L' x|^2 is the squared Mahalanobis distance.
        whitening = torch.linalg.cholesky(torch.linalg.inv(covariance.double())).float()
        self.projection.zero_()
        self.projection[:, :count] = components @ whitening
        self.means.zero_()
        self.means[:, :count] = means @ whitening

    @torch.no_grad()
    def rank(self, strangeness: Tensor) -> None:
        """Take the strangeness of N known images, which were not fitted to, as the measure of what is strange.

        Novelty is k / (N + 1) where k of them are less strange, rounded down to a step: with the new image counted
        among the known ones, as a conformal p-value has it, no image is said to be stranger than N / (N + 1).
        """
        ordered, count = strangeness.sort().values, len(strangeness)
        steps = torch.arange(1, len(self.table) + 1)
        needed = -((-steps * (count + 1)) // len(self.table))  # rounded up
        known = needed <= count
        self.table.copy_(torch.where(known, ordered[(needed - 1).clamp(max=count - 1)], torch.inf))


def index_novelty(
    queries: Tensor, index: Tensor, *, left_out: Tensor | None = None, sample: int = INDEX_SAMPLE, seed: int = 0
) -> Tensor:
    """How strange images are among those that are searched, whatever the network was trained on.

    It is the share of the index's own images whose nearest other image is nearer than the query's nearest one: 0 for a
    copy of an image of the index, 1 for what lies further away than any of them does from the rest.

    Args:
        queries: (Q, d) coordinates of the queries, see ``Novelty.coordinates``; float32.
        index: (N, d) of the images that are searched.
        left_out: (Q,) int64 position of each query in the index itself, which is no neighbour of its own; -1 elsewhere.
        sample: images of the index that are compared with, at most; fewer of a large index, see ``LEAST_SAMPLE``.
        seed: of the draw.

    Returns:
        (Q,) float32 in [0, 1]; NaN where the index has no two images.
    """
    count = len(index)
    if count < 2:
        return queries.new_full((len(queries),), torch.nan)
    compared = min(sample, count, max(LEAST_SAMPLE, COMPARISONS // count))
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:compared].to(index.device)
    usual = _nearest_distance(index[chosen], index, chosen).sort().values
    nowhere = torch.full((len(queries),), -1, device=index.device)
    own = _nearest_distance(queries, index, nowhere if left_out is None else left_out)
    return torch.searchsorted(usual, own).float() / compared  # the number of those that are smaller


def _nearest_distance(points: Tensor, index: Tensor, left_out: Tensor) -> Tensor:
    """(Q,) distance to the nearest row of the index but for the one at ``left_out``."""
    squares = index.square().sum(1)
    found = points.new_empty(len(points))
    height = max(1, ENTRIES // len(index))
    for start in range(0, len(points), height):
        rows = slice(start, start + height)
        apart = squares - 2 * points[rows] @ index.T  # without |q|^2, which is the same for all
        inside = (left_out[rows] >= 0).nonzero()[:, 0]
        apart[inside, left_out[rows][inside]] = torch.inf
        # The difference itself has no cancellation: 0 for a copy.
        found[rows] = (points[rows] - index[apart.argmin(1)]).norm(dim=1)
    return found
