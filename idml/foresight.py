"""Training of an uncertainty head by loss prediction, and the probability of an error that comes out of it.

The head learns to foresee each image's own loss (Yoo and Kweon 2019), from features without gradient to the backbone
(Kirchhof et al. 2024), and beside it to answer by itself: a second look. Letters in shapes: B images, C classes.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional

from idml.heads import Foresight
from idml.random_state import generator_kept

SHARPNESS = 16.0
"""Scale of the cosines between a retrieval head's belief and its class directions; of the order of the 16 to 32 that
losses by normalised softmax take."""

EVIDENCE = ("belief", "foreseen loss", "confidence")
"""What speaks for a wrong class: see ``classifier_evidence``."""

SEARCH_EVIDENCE = ("belief", "foreseen loss", "foreseen loss of the nearest", "1 - similarity", "gap to the second")
"""What speaks for a wrong nearest neighbour: see ``search_evidence``."""


def prediction_loss(foreseen: Tensor, actual: Tensor) -> Tensor:
    """How wrong foreseen losses were: ``mean(foreseen - actual log foreseen)``, the Poisson deviance.

    It is smallest where ``foreseen`` is the expectation of ``actual``, for any non-negative quantity, and its gradient
    by log(foreseen) is ``foreseen - actual``: an image that was thought easy and is not cannot blow it up.

    Args:
        foreseen: (B,) nats, > 0.
        actual: (B,) nats, >= 0; no gradient flows to it.

    Returns:
        0-d.
    """
    return functional.poisson_nll_loss(foreseen, actual.detach(), log_input=False, eps=1e-6)


def mixed_losses(logits: Tensor, labels_a: Tensor, labels_b: Tensor, lam: Tensor) -> Tensor:
    """(B,) ``lam CE(logits, labels_a) + (1 - lam) CE(logits, labels_b)`` in nats, lam being 0-d or (B,)."""
    loss_a = functional.cross_entropy(logits, labels_a, reduction="none")
    loss_b = functional.cross_entropy(logits, labels_b, reduction="none")
    return lam * loss_a + (1 - lam) * loss_b


def foresight_loss(
    foreseen: Tensor,
    belief_logits: Tensor,
    logits: Tensor,
    labels_a: Tensor,
    labels_b: Tensor,
    lam: Tensor,
    answers: Tensor,
) -> Tensor:
    """What an uncertainty head is trained by: prediction of the loss, and its own answers.

    Args:
        foreseen: (B,) losses that the head expects, in nats.
        belief_logits: (B, C), what the head answers.
        logits: (B, C) of the model itself: its loss is what is to be foreseen. No gradient flows to it.
        labels_a, labels_b: (B,) int64.
        lam: (B,) weight of ``labels_a``.
        answers: (B,) bool, the images that the head learns to answer for: not those that were spoilt for it to be
            unsure of.

    Returns:
        0-d, nats.
    """
    logits = logits.detach().float()
    predicted = prediction_loss(foreseen, mixed_losses(logits, labels_a, labels_b, lam))
    own = mixed_losses(belief_logits, labels_a, labels_b, lam)
    return predicted + (own * answers).sum() / answers.sum().clamp_min(1)


def alteration_loss(altered: Tensor, lam: Tensor, clean: Tensor) -> Tensor:
    """What the head learns to notice altered images by: cross-entropy, clean and altered images weighing the same.

    A mixed image is altered by as much as its smaller part weighs: twice that.

    Args:
        altered: (B,) log-odds, of images that the backbone has seen as in evaluation, clean ones among them: those that
            it is trained on differ from all of them by batch norm.
        lam: (B,) in [0, 1], 1 where nothing was mixed.
        clean: (B,) bool.

    Returns:
        0-d, nats.
    """
    target = torch.where(clean, 0.0, torch.where(lam < 1, 2 * torch.minimum(lam, 1 - lam), 1.0))
    losses = functional.binary_cross_entropy_with_logits(altered, target, reduction="none")
    means = [(losses * chosen).sum() / chosen.sum().clamp_min(1) for chosen in (clean, ~clean)]
    return (means[0] + means[1]) / 2


def odds(probability: Tensor) -> Tensor:
    """log(p / (1 - p)), p kept 1e-6 away from 0 and 1."""
    return torch.logit(probability.float(), eps=1e-6)


def log_loss_evidence(foreseen_loss: Tensor) -> Tensor:
    """(B,) log of foreseen losses in nats, kept finite."""
    return foreseen_loss.clamp_min(1e-6).log()


def classifier_evidence(logits: Tensor, foresight: Foresight) -> Tensor:
    """(B, 3) of what speaks for the top answer being wrong; see ``EVIDENCE``.

    - the log-odds that the head gives another class than the one predicted;
    - the log of the foreseen loss;
    - the log-odds of 1 - max softmax.
    """
    predicted = logits.argmax(1, keepdim=True)
    disbelief = 1 - foresight.belief.softmax(1).gather(1, predicted)[:, 0]
    doubt = 1 - logits.softmax(1).amax(1)
    return torch.stack([odds(disbelief), log_loss_evidence(foresight.foreseen_loss), odds(doubt)], dim=1)


def search_evidence(
    belief: Tensor, foreseen_loss: Tensor, nearest_belief: Tensor, nearest_foreseen_loss: Tensor, similarities: Tensor
) -> Tensor:
    """(Q, 5) of what speaks for the nearest neighbour being of another class; see ``SEARCH_EVIDENCE``.

    Args:
        belief: (Q, K) of unit length, of the queries; foreseen_loss: (Q,) nats.
        nearest_belief, nearest_foreseen_loss: the same of each query's nearest neighbour.
        similarities: (Q, 2) cosine similarities of the nearest and the second nearest; or (Q, 1) where there is none.
    """
    apart = 1 - (belief * nearest_belief).sum(1)
    gap = similarities[:, -1] - similarities[:, 0]
    losses = (log_loss_evidence(foreseen_loss), log_loss_evidence(nearest_foreseen_loss))
    return torch.stack([apart, *losses, 1 - similarities[:, 0], gap], dim=1)


class ErrorCalibration(nn.Module):
    """From evidence to the probability that the top answer is wrong: a logistic regression, stored with the model.

    Until it is fitted, it says what the head itself believes: the first piece of evidence is a log-odds already.

    Attributes:
        weight: (k,) float32 buffer; bias: 0-d.
        fitted_on: 0-d int64 buffer, the number of images that it was fitted on; 0 before.
    """

    weight: Tensor
    bias: Tensor
    fitted_on: Tensor

    def __init__(self, pieces: int) -> None:
        super().__init__()
        self.register_buffer("weight", functional.one_hot(torch.tensor(0), pieces).float())
        self.register_buffer("bias", torch.tensor(0.0))
        self.register_buffer("fitted_on", torch.tensor(0))

    def forward(self, evidence: Tensor) -> Tensor:
        """(B, k) -> (B,) in [0, 1]."""
        return torch.sigmoid(evidence @ self.weight + self.bias)

    @torch.no_grad()
    def fit(self, evidence: Tensor, wrong: Tensor) -> bool:
        """Fit on images that the model was not trained on.

        Args:
            evidence: (N, k), finite.
            wrong: (N,) bool, whether the top answer was wrong.

        Returns:
            Whether it was fitted: not where all answers are right, or all wrong (a warning says so).
        """
        with generator_kept():
            from sklearn.linear_model import LogisticRegression  # slow to import: only where used

        evidence, wrong = evidence.cpu().double(), wrong.cpu()
        count = int(wrong.sum())
        if not 0 < count < len(wrong):
            warnings.warn(
                f"the probability of an error is not calibrated: {count} of {len(wrong)} validation answers are wrong",
                UserWarning,
                stacklevel=2,
            )
            return False
        # Pieces of one scale, so that the small penalty (scikit-learn's default) means the same for each.
        mean, spread = evidence.mean(0), evidence.std(0).clamp_min(1e-6)
        found = LogisticRegression().fit(((evidence - mean) / spread).numpy(), wrong.numpy())
        weight = torch.from_numpy(found.coef_[0]) / spread
        self.weight.copy_(weight)
        self.bias.copy_(float(found.intercept_[0]) - weight @ mean)
        self.fitted_on.fill_(len(wrong))
        return True
