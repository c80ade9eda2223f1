"""What a trained model says of images, as arrays.

Letters in shapes: N images, C classes, D semantic and E uncertainty dimensions, K numbers of a belief, Q coordinates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Embeddings:
    """What a model says of N images; arrays on the CPU.

    Attributes:
        semantic: (N, D) float32; of unit length where the model was trained so.
        uncertainty: (N,) float32, higher for a less certain image; ``TrainedModel.score_name`` says what it means.
        uncertainty_embedding: (N, E) float32; zeros where ISM is off.
        novelty: (N,) float32 in [0, 1], share of held-out known images that are less strange; foreseen_loss: (N,)
            float32, nats; coordinates: (N, Q) float32, where the image lies among known ones; belief: (N, K) float32,
            of a retrieval model. All None without an introspection.
        probabilities: (N, C) float32, of a classifier; None of a retrieval model.
    """

    semantic: np.ndarray
    uncertainty: np.ndarray
    uncertainty_embedding: np.ndarray
    novelty: np.ndarray | None = None
    foreseen_loss: np.ndarray | None = None
    coordinates: np.ndarray | None = None
    belief: np.ndarray | None = None
    probabilities: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.semantic)

    @classmethod
    def joined(cls, parts: Sequence[Embeddings]) -> Embeddings:
        """Those of several batches, in their order; at least one."""
        columns: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            pieces = [getattr(part, field.name) for part in parts]
            columns[field.name] = None if pieces[0] is None else np.concatenate(pieces)
        return cls(**columns)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """What a classifier takes N images for.

    Attributes:
        labels: (N,) int64, positions in the model's classes.
        classes: N names.
        confidence: (N,) float32, the probability of the top class by the plain logits.
        probabilities: (N, C) float32.
        uncertainty: (N,) float32; see ``TrainedModel.score_name``.
        p_wrong, novelty: (N,) float32 in [0, 1]; None without an introspection.
        answered: (N,) bool, whether the answer is given under the ``max_risk`` asked for; None where none was.
        sets: (N, C) bool, the classes that are named under the ``coverage`` asked for; None where none was.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    confidence: np.ndarray
    probabilities: np.ndarray
    uncertainty: np.ndarray
    p_wrong: np.ndarray | None = None
    novelty: np.ndarray | None = None
    answered: np.ndarray | None = None
    sets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)
