"""From what speaks for a wrong answer to its probability. Letters in shapes: B and N images, Q queries, C classes, k
pieces of evidence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from idml.random_state import generator_kept

EVIDENCE = ("belief", "foreseen loss", "confidence")
"""What speaks for a wrong class: see ``classifier_evidence``."""

SEARCH_EVIDENCE = ("belief", "foreseen loss", "foreseen loss of the nearest", "1 - similarity", "gap to the second")
"""What speaks for a wrong nearest neighbour: see ``search_evidence``."""

LEAST_HELD_OUT = 100
"""Images without which nothing is calibrated: the probability of a share of 5 % is then known to plus or minus 4 %."""


def odds(probability: Tensor) -> Tensor:
    """log(p / (1 - p)), p kept 1e-6 away from 0 and 1."""
    return torch.logit(probability.float(), eps=1e-6)


def log_loss_evidence(foreseen_loss: Tensor) -> Tensor:
    """Log of foreseen losses in nats, of any shape, kept finite."""
    return foreseen_loss.clamp_min(1e-6).log()


def classifier_evidence(logits: Tensor, belief: Tensor, foreseen_loss: Tensor) -> Tensor:
    """(..., B, 3) of what speaks for the top answer being wrong; see ``EVIDENCE``.

    - the log-odds that a head gives another class than the one predicted;
    - the log of the foreseen loss;
    - the log-odds of 1 - max softmax.

    Args:
        logits: (B, C) of the network.
        belief: (..., B, C) logits of heads; foreseen_loss: (..., B) nats.
    """
    predicted = logits.argmax(1, keepdim=True).expand(*belief.shape[:-1], 1)
    disbelief = 1 - belief.softmax(-1).gather(-1, predicted)[..., 0]
    doubt = odds(1 - logits.softmax(1).amax(1)).expand_as(disbelief)
    return torch.stack([odds(disbelief), log_loss_evidence(foreseen_loss), doubt], dim=-1)


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
    def fit(self, evidence: Tensor, wrong: Tensor) -> str:
        """Fit to images that the network was not trained on.

        Args:
            evidence: (N, k), finite.
            wrong: (N,) bool, whether the top answer was wrong.

        Returns:
            Why it was not fitted, in words; empty where it was: there must be ``LEAST_HELD_OUT`` images, some right and
            some wrong.
        """
        with generator_kept():
            from sklearn.linear_model import LogisticRegression  # slow to import: only where used

        evidence, wrong = evidence.cpu().double(), wrong.cpu()
        count = int(wrong.sum())
        if len(wrong) < LEAST_HELD_OUT:
            return f"{len(wrong)} held-out images, at least {LEAST_HELD_OUT} are needed"
        if not 0 < count < len(wrong):
            return f"{count} of {len(wrong)} held-out answers are wrong"
        # Pieces of one scale, so that the small penalty (scikit-learn's default) means the same for each.
        mean, spread = evidence.mean(0), evidence.std(0).clamp_min(1e-6)
        found = LogisticRegression().fit(((evidence - mean) / spread).numpy(), wrong.numpy())
        weight = torch.from_numpy(found.coef_[0]) / spread
        self.weight.copy_(weight)
        self.bias.copy_(float(found.intercept_[0]) - weight @ mean)
        self.fitted_on.fill_(len(wrong))
        return ""
