"""Uncertainty heads: what makes the uncertainty embedding out of what the backbone shows.

Letters in shapes: B images, D or H backbone features, E uncertainty dimensions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from idml.similarity import TEMPERATURE

MEAN_EXPONENT = 0.05
"""Mean of beta / (tau alpha) over the comparisons of each batch that a live model is trained on."""

TINY = 1e-30
"""Mean exponents below this count as it: u is then zero, or as good as zero, and stays so."""

GAIN_MOMENTUM = 0.1
"""Share of the newest batch in the gain of a classifier's head, as in torch's batch norm."""


class UncertaintyHead(nn.Linear):
    """The live uncertainty head of retrieval: a linear map of (B, H) features to (B, E), times a fixed small ``gain``.

    Small, not zero: beta is quadratic in u, so at zero its gradient is zero too. The smallness is in the gain and not
    in the weights, which are drawn from N(0, 1), because an adaptive optimizer moves every weight by about the learning
    rate, however small it is. Weights that are small themselves are overrun in a few steps: beta grows past the point
    where the loss would stop it, every ISM weight is then zero, and with it every gradient.

    With features of mean square 1, ``beta = |u|^2 = E H gain^2`` against a proxy. The pairs that an untrained network
    compares are close (alpha well under 1), so alpha is taken as 1/4, and the gain such that the exponent
    ``beta / (tau alpha)`` is ``MEAN_EXPONENT``. Features of another scale, or other distances, call for
    ``idml.losses.scale_uncertainty_head``, which measures them.

    Attributes:
        gain: 0-d float32 buffer, stored in checkpoints, not trained.
    """

    gain: Tensor

    def __init__(self, feature_dim: int, uncertainty_dim: int) -> None:
        super().__init__(feature_dim, uncertainty_dim)
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)
        gain = math.sqrt(MEAN_EXPONENT * TEMPERATURE / 4 / (uncertainty_dim * feature_dim))
        self.register_buffer("gain", torch.tensor(gain))

    def forward(self, features: Tensor) -> Tensor:
        """(B, H) -> (B, E)."""
        return super().forward(features) * self.gain


class RectifiedHead(nn.Linear):
    """The live uncertainty head of classification: ReLU of a linear map of (B, D) features to (B, E), brought to scale.

    In training u is relative to the batch (``scale``): the mean exponent of its comparisons is ``MEAN_EXPONENT``, with
    gradient through the mean, as in retrieval. The loss then learns which images are less sure than others, and nothing
    can be gained by making all of them unsure. In evaluation the scale is ``gain``, a running mean, as that of batch
    norm is.

    With weights of variance v, half the units are cut by the ReLU, so beta = E v |h|^2 / 2; and with the classifier's
    small rows alpha is about |h|^2. So the scale is about 1 at the start, for any D and C.

    Args:
        feature_dim: D.
        uncertainty_dim: E.
        temperature: tau.

    Attributes:
        gain: 0-d float32 buffer, stored in checkpoints, not trained; 1 where a checkpoint from before has none.
    """

    gain: Tensor

    def __init__(self, feature_dim: int, uncertainty_dim: int, temperature: float) -> None:
        super().__init__(feature_dim, uncertainty_dim)
        nn.init.normal_(self.weight, std=math.sqrt(2 * MEAN_EXPONENT * temperature / uncertainty_dim))
        nn.init.zeros_(self.bias)
        self.register_buffer("gain", torch.tensor(1.0))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, E), float32, >= 0, not yet to scale."""
        return functional.relu(functional.linear(features.float(), self.weight.float(), self.bias.float()))

    def scale(self, exponent: Tensor) -> Tensor:
        """What u is multiplied by, 0-d: in training by the batch, in evaluation ``gain``.

        Args:
            exponent: (B,) mean exponents of the images, from u as ``forward`` gives it, with gradient through u.
        """
        if not self.training:
            return self.gain
        return (MEAN_EXPONENT / exponent.mean().clamp_min(TINY)).sqrt()

    @torch.no_grad()
    def follow(self, exponent: Tensor) -> None:
        """Let the gain follow the scale of a batch (its mean exponent over all ranks, 0-d), once an optimizer step.

        Nothing happens where it is zero or not finite: the head is dead, or the step has failed.
        """
        usable = exponent.isfinite() & (exponent > 0)
        target = torch.where(usable, (MEAN_EXPONENT / exponent).sqrt(), self.gain)  # beta is quadratic in the gain
        self.gain.copy_(self.gain ** (1 - GAIN_MOMENTUM) * target**GAIN_MOMENTUM)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        state_dict.setdefault(f"{prefix}gain", torch.ones_like(self.gain))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
