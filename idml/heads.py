"""Uncertainty heads: what makes the uncertainty embedding out of what the backbone shows.

Letters in shapes: B images, C classes, H backbone features, F numbers from several depths, E uncertainty dimensions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from idml.distributed import moments_over_ranks
from idml.similarity import TEMPERATURE

MEAN_EXPONENT = 0.05
"""Mean of beta / (tau alpha) over the comparisons of a live model: in retrieval of each batch, in classification of the
recent ones."""

GAIN_MOMENTUM = 0.1
"""Share of the newest batch in what the gain of a classifier's head follows, as in torch's batch norm."""

HIDDEN = 128
"""Units of each of the two hidden layers that lead to each of the three things that a foresight head says."""

STATISTICS_MOMENTUM = 0.1
"""Share of the newest batch in the running mean and variance, as in torch's batch norm."""

VARIANCE_FLOOR = 1e-4
"""Added to the variance: a unit that hardly ever varies must not be blown up where it does."""

LARGEST_INPUT = 5.0
"""Standard deviations at which an input is cut off: early in training features run ahead of their running figures."""


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
    """The live uncertainty head of classification: ReLU of a linear map of (B, D) features to (B, E), times ``gain``.

    The gain follows what the head gives, so that the mean exponent of the comparisons stays at ``MEAN_EXPONENT``: the
    loss then learns which images are less sure than others, and cannot be lowered by making all of them unsure, which
    ends in plain logits that are too sure of themselves.

    With weights of variance v, half the units are cut by the ReLU, so beta = E v |h|^2 / 2; and with the classifier's
    small rows alpha is about |h|^2. The mean exponent of the first step follows for any D and C.

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
        """(B, D) -> (B, E), float32, >= 0."""
        linear = functional.linear(features.float(), self.weight.float(), self.bias.float())
        return functional.relu(linear) * self.gain

    @torch.no_grad()
    def follow(self, exponent: Tensor) -> None:
        """Let the gain follow the mean exponent of a batch (all ranks' images, 0-d), once an optimizer step.

        Nothing happens where it is zero or not finite: the head is dead, or the step has failed.
        """
        usable = exponent.isfinite() & (exponent > 0)
        factor = (MEAN_EXPONENT / exponent).pow(GAIN_MOMENTUM / 2)  # beta is quadratic in the gain
        self.gain.mul_(torch.where(usable, factor, torch.ones_like(factor)))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        state_dict.setdefault(f"{prefix}gain", torch.ones_like(self.gain))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class Foresight(NamedTuple):
    """What a ``ForesightHead`` says of B images.

    Attributes:
        uncertainty: (B, E) float32, > 0. Its squared length is the loss, in nats, that the head expects.
        belief: (B, K) float32: what the head itself takes the image for.
        altered: (B,) float32, log-odds that the image is not as the clean training images are: mixed, cut, blurred,
            noisy, cropped, or unlike them in another way.
    """

    uncertainty: Tensor
    belief: Tensor
    altered: Tensor

    @property
    def foreseen_loss(self) -> Tensor:
        """(B,) nats, > 0."""
        return self.uncertainty.square().sum(1)


class ForesightHead(nn.Module):
    """An uncertainty head that foresees the loss of an image, takes a second look at what it shows, and notices that
    it is not as training images are.

    All of it comes from what the backbone shows at several depths, without gradient to it. The second look is what
    tells errors from right answers: a classifier's last layer knows nothing of its errors that its own probabilities do
    not say already, while a second one that sees other features errs on other images. The loss is no measure of how an
    image was altered: a clean image may be harder than a blurred one. Hence the third.

    Inputs are standardised by their running figures and scaled as if there were ``reference`` of them, so that one
    learning rate serves every backbone.

    Args:
        input_dim: F.
        uncertainty_dim: E.
        belief_dim: K: the number of classes, or the length of an embedding.

    Attributes:
        gain: 0-d float32 buffer: of u in the ISM, see ``idml.losses.scale_uncertainty_head``. Not in ``foreseen_loss``.
        usual_loss: 0-d float32 buffer, nats: running mean of the losses foreseen of training images.
    """

    gain: Tensor
    usual_loss: Tensor
    mean: Tensor
    variance: Tensor
    batches: Tensor
    reference = 1024

    def __init__(self, input_dim: int, uncertainty_dim: int, belief_dim: int) -> None:
        super().__init__()
        self.scale = math.sqrt(self.reference / input_dim)
        self.register_buffer("gain", torch.tensor(1.0))
        self.register_buffer("usual_loss", torch.tensor(1.0))
        self.register_buffer("mean", torch.zeros(input_dim))
        self.register_buffer("variance", torch.ones(input_dim))
        self.register_buffer("batches", torch.tensor(0))
        self.foresee, self.believe, self.notice = (
            self._layers(input_dim, dim) for dim in (uncertainty_dim, belief_dim, 1)
        )
        # One nat to begin with, whatever E: E softplus(bias)^2 = 1.
        last = self.foresee[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias, math.log(math.expm1(uncertainty_dim**-0.5)))

    def _layers(self, input_dim: int, output_dim: int) -> nn.Sequential:
        first = nn.Linear(input_dim, HIDDEN)
        nn.init.normal_(first.weight, std=self.reference**-0.5)
        nn.init.zeros_(first.bias)
        return nn.Sequential(first, nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, output_dim))

    def forward(self, vector: Tensor) -> Foresight:
        """(B, F) float32, without gradient, -> Foresight."""
        standardised = (vector - self.mean) * (self.variance + VARIANCE_FLOOR).rsqrt()
        standardised = standardised.clamp(-LARGEST_INPUT, LARGEST_INPUT) * self.scale
        uncertainty = functional.softplus(self.foresee(standardised))
        return Foresight(uncertainty, self.believe(standardised), self.notice(standardised)[:, 0])

    @torch.no_grad()
    def note_losses(self, mean: Tensor) -> None:
        """Let the running mean of foreseen losses take in that of a batch, 0-d, of all ranks' images."""
        self.usual_loss.lerp_(mean, STATISTICS_MOMENTUM)

    @torch.no_grad()
    def note(self, vector: Tensor) -> None:
        """Let the running mean and variance take in a batch; to be called before the forward pass of a step.

        Under DDP it is the batch of all ranks: figures that differed by rank would be lost with a checkpoint.
        """
        momentum = torch.where(self.batches == 0, 1.0, STATISTICS_MOMENTUM).to(vector)
        mean, variance = moments_over_ranks(vector)
        self.mean.lerp_(mean, momentum)
        self.variance.lerp_(variance, momentum)
        self.batches += 1
