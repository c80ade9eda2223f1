"""All that a network can say of itself, as one module that is stored with it.

Letters in shapes: B images, C classes, F numbers of the depth vector, K numbers of a belief, P folds, N held out.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from idml.introspection.calibration import (
    EVIDENCE,
    SEARCH_EVIDENCE,
    ErrorCalibration,
    classifier_evidence,
    log_loss_evidence,
)
from idml.introspection.depths import vector_length
from idml.introspection.heads import Heads
from idml.introspection.layers import Layers
from idml.introspection.novelty import Novelty
from idml.introspection.refusal import Promise, promised, set_threshold
from idml.metrics.uncertainty import auroc

Task = Literal["classification", "retrieval"]

BELIEF_DIM = 128
"""K of a retrieval model: length of the head's own embedding."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IntrospectionSpec:
    """The shapes of an introspection: plain values, from which it is built before its state is loaded.

    Attributes:
        task: classification, or retrieval.
        layers: what is looked at.
        classes: C, of the images that it was fitted to.
        folds: P heads, each fitted without a part of the held-out images; 1 where none were held out.
        held_out: N images that it was calibrated on; 0 where none were.
        calibrated: whether P(wrong) is a calibrated probability.
        fitted_on: images that the heads learned from.
        note: why it is not calibrated; empty where it is.
    """

    task: Task
    layers: Layers
    classes: int
    folds: int
    held_out: int = 0
    calibrated: bool = False
    fitted_on: int = 0
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back; ``from_json`` takes them."""
        return dataclasses.asdict(self) | {"layers": self.layers.as_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> IntrospectionSpec:
        """What ``as_json`` gave."""
        return cls(**(values | {"layers": Layers.from_json(values["layers"])}))


class Scores(NamedTuple):
    """What an introspection says of B images; without gradient.

    Attributes:
        p_wrong: (B,) in [0, 1]: probability that the top answer is wrong; in retrieval that the nearest neighbour is of
            another class, from the image alone.
        novelty: (B,) in [0, 1]: share of held-out known images that are less strange.
        strangeness: (B,) squared distance to what the network knows.
        foreseen_loss: (B,) nats.
        belief: (B, C) what the heads answer by themselves, logits; (B, K) of unit length in retrieval.
        coordinates: (B, Q) where the image lies among known ones; see ``Novelty``.
    """

    p_wrong: Tensor
    novelty: Tensor
    strangeness: Tensor
    foreseen_loss: Tensor
    belief: Tensor
    coordinates: Tensor


class Introspection(nn.Module):
    """Heads, calibration, novelty and what was held out; fitted by ``idml.introspection.fit``.

    Args:
        spec: its shapes.
    """

    held_p_wrong: Tensor
    held_wrong: Tensor
    held_true_probability: Tensor

    def __init__(self, spec: IntrospectionSpec) -> None:
        super().__init__()
        self.spec = spec
        length = vector_length(spec.layers)
        classify = spec.task == "classification"
        self.heads = Heads(length, spec.classes if classify else BELIEF_DIM, spec.folds)
        self.novelty = Novelty(length, spec.classes)
        self.calibration = ErrorCalibration(len(EVIDENCE) if classify else 1)
        self.search_calibration = None if classify else ErrorCalibration(len(SEARCH_EVIDENCE))
        self.register_buffer("held_p_wrong", torch.zeros(spec.held_out))
        self.register_buffer("held_wrong", torch.zeros(spec.held_out, dtype=torch.bool))
        self.register_buffer("held_true_probability", torch.zeros(spec.held_out if classify else 0))
        self.requires_grad_(False)

    def forward(self, vector: Tensor, logits: Tensor | None) -> Scores:
        """Scores of a batch.

        Args:
            vector: (B, F) float32, see ``depth_vector``.
            logits: (B, C) of a classifier; None of a retrieval model.
        """
        look = self.heads(vector)
        coordinates = self.novelty.coordinates(self.heads.standardised(vector))
        strangeness = self.novelty.strangeness(coordinates)
        if logits is not None:
            evidence = classifier_evidence(logits.float(), look.belief, look.foreseen_loss).mean(0)
            belief = look.belief.log_softmax(-1).mean(0)
        else:
            evidence = log_loss_evidence(look.foreseen_loss).mean(0)[:, None]
            belief = functional.normalize(look.belief.mean(0), dim=1)
        p_wrong, novelty = self.calibration(evidence), self.novelty.novelty(strangeness)
        return Scores(p_wrong, novelty, strangeness, look.foreseen_loss.mean(0), belief, coordinates)

    def promise(self, max_risk: float, confidence: float = 0.95) -> Promise | None:
        """The threshold of P(wrong) under which at most ``max_risk`` of the answers are wrong; None: not to be had.

        Raises:
            ValueError: a share out of range, or nothing was held out.
        """
        return promised(self.held_p_wrong, self.held_wrong, max_risk=max_risk, confidence=confidence)

    def held_out_auroc(self) -> float:
        """The probability that P(wrong) is higher for a held-out image that was answered wrongly than for one that was
        answered rightly; of a retrieval model, for the nearest neighbours. NaN where there are none of both, or nothing
        is calibrated: the heads may have learned from these very images."""
        if not self.spec.calibrated:
            return math.nan
        wrong = self.held_wrong
        return auroc(self.held_p_wrong[wrong].cpu(), self.held_p_wrong[~wrong].cpu())

    def set_threshold(self, coverage: float) -> float | None:
        """Least probability of the classes that are named so that the true one is among them; None: not to be had."""
        return set_threshold(self.held_true_probability, coverage)
