"""How strange an image is to a network: its distance to what the network knows, at several depths at once.

Letters in shapes: B and N images, F numbers of a standardised depth vector, Q dimensions of the density, C classes, M
steps of the table.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DIMENSIONS = 128
"""Q: principal components in which distances are measured (measured in benchmarks/introspection.py)."""

SHRINKAGE = 1e-2
"""Share of the mean variance that is added to each variance: directions in which known images hardly differ would
otherwise decide alone."""

FITTED_ON = 20_000
"""Images that the principal components are found from, at most."""

STEPS = 1_000
"""M: resolution of the table from strangeness to novelty."""


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
        covariance += SHRINKAGE * covariance.diagonal().mean() * torch.eye(count)
        # With L L' the inverse of the covariance, |L' x|^2 is the squared Mahalanobis distance.
        whitening = torch.linalg.cholesky(torch.linalg.inv(covariance.double())).float()
        self.projection.zero_()
        self.projection[:, :count] = components @ whitening
        self.means.zero_()
        self.means[:, :count] = means @ whitening

    @torch.no_grad()
    def rank(self, strangeness: Tensor) -> None:
        """Take the strangeness of N known images, which were not fitted to, as the measure of what is strange.

        Novelty is k / (N + 1) where k of them are less strange, rounded down to a step: with the new image counted among
        the known ones, as a conformal p-value has it, no image is ever said to be stranger than N / (N + 1).
        """
        ordered, count = strangeness.sort().values, len(strangeness)
        steps = torch.arange(1, len(self.table) + 1)
        needed = -((-steps * (count + 1)) // len(self.table))  # rounded up
        known = needed <= count
        self.table.copy_(torch.where(known, ordered[(needed - 1).clamp(max=count - 1)], torch.inf))
