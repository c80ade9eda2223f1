"""The second look: small networks that answer by themselves and foresee the loss of the network that they watch.

Letters in shapes: B images, F numbers of the depth vector, P folds, K numbers of a belief.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

HIDDEN = 128
"""Units of each of the two hidden layers that lead to each of the two things that a head says."""

REFERENCE = 1024
"""Inputs are scaled as if there were so many of them, so that one learning rate serves every network."""

VARIANCE_FLOOR = 1e-4
"""Added to the variance: a unit that hardly ever varies must not be blown up where it does."""

LARGEST_INPUT = 5.0
"""Standard deviations at which an input is cut off."""


class SecondLook(NamedTuple):
    """What P heads say of B images.

    Attributes:
        belief: (P, B, K) float32: what each head takes the image for, logits of classes or an embedding.
        foreseen_loss: (P, B) nats, > 0: the loss that each head expects of the network.
    """

    belief: Tensor
    foreseen_loss: Tensor


class Heads(nn.Module):
    """P heads over one standardised vector, computed together; each was fitted without a part of the images.

    Args:
        length: F.
        belief_dim: K.
        folds: P.

    Attributes:
        mean, variance: (F,) float32 buffers, of the vectors that were fitted to.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, length: int, belief_dim: int, folds: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(length))
        self.register_buffer("variance", torch.ones(length))
        self.scale = math.sqrt(REFERENCE / length)
        # Both branches of all heads have their first layer in one matrix: one product over the long vector.
        self.first = nn.Parameter(torch.randn(length, 2 * folds * HIDDEN) / math.sqrt(REFERENCE))
        self.first_bias = nn.Parameter(torch.zeros(2 * folds * HIDDEN))
        self.second = nn.Parameter(torch.empty(2 * folds, HIDDEN, HIDDEN))
        self.second_bias = nn.Parameter(torch.zeros(2 * folds, 1, HIDDEN))
        self.belief = nn.Parameter(torch.empty(folds, HIDDEN, belief_dim))
        self.belief_bias = nn.Parameter(torch.zeros(folds, 1, belief_dim))
        self.loss = nn.Parameter(torch.empty(folds, HIDDEN, 1))
        # One nat to begin with.
        self.loss_bias = nn.Parameter(torch.full((folds, 1, 1), math.log(math.expm1(1.0))))
        for weight in (self.second, self.belief, self.loss):
            nn.init.uniform_(weight, -(HIDDEN**-0.5), HIDDEN**-0.5)  # as torch's Linear
        self.folds = folds

    def standardised(self, vector: Tensor) -> Tensor:
        """(B, F), cut off and scaled."""
        unit = (vector - self.mean) * (self.variance + VARIANCE_FLOOR).rsqrt()
        return unit.clamp(-LARGEST_INPUT, LARGEST_INPUT) * self.scale

    def forward(self, vector: Tensor) -> SecondLook:
        """(B, F) float32 -> SecondLook."""
        hidden = functional.relu(torch.addmm(self.first_bias, self.standardised(vector), self.first))
        branches = hidden.unflatten(1, (2 * self.folds, HIDDEN)).transpose(0, 1)  # (2 P, B, HIDDEN)
        branches = functional.relu(torch.baddbmm(self.second_bias, branches, self.second))
        belief = torch.baddbmm(self.belief_bias, branches[: self.folds], self.belief)
        loss = torch.baddbmm(self.loss_bias, branches[self.folds :], self.loss)
        return SecondLook(belief, functional.softplus(loss)[..., 0])
