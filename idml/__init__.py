"""IDML: image models that know what they do not know (Introspective Deep Metric Learning, TPAMI 2023)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from idml._version import __version__

if TYPE_CHECKING:
    from idml.embedder import EmbedderOutput, IntrospectiveEmbedder
    from idml.errors import TrainingError, UserError
    from idml.introspect import introspect
    from idml.models import ClassifierOutput, IntrospectiveClassifier, uncertainty_score
    from idml.similarity import introspective_distance, introspective_similarity, introspective_weight
    from idml.trained import Embeddings, Predictions, TrainedModel, load
    from idml.transformer import IntrospectiveTransformer

__all__ = [
    "ClassifierOutput",
    "EmbedderOutput",
    "Embeddings",
    "IntrospectiveClassifier",
    "IntrospectiveEmbedder",
    "IntrospectiveTransformer",
    "Predictions",
    "TrainedModel",
    "TrainingError",
    "UserError",
    "__version__",
    "introspect",
    "introspective_distance",
    "introspective_similarity",
    "introspective_weight",
    "load",
    "uncertainty_score",
]

_HOMES = {
    "ClassifierOutput": "models",
    "EmbedderOutput": "embedder",
    "Embeddings": "trained",
    "IntrospectiveClassifier": "models",
    "IntrospectiveEmbedder": "embedder",
    "IntrospectiveTransformer": "transformer",
    "Predictions": "trained",
    "TrainedModel": "trained",
    "TrainingError": "errors",
    "UserError": "errors",
    "introspect": "introspect",
    "introspective_distance": "similarity",
    "introspective_similarity": "similarity",
    "introspective_weight": "similarity",
    "load": "trained",
    "uncertainty_score": "models",
}
"""Module of each public name. Imported when it is first asked for (PEP 562): torch and timm take seconds, and
``python -m idml --help`` needs neither."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
