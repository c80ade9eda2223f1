"""IDML: image models that know what they do not know (Introspective Deep Metric Learning, TPAMI 2023)."""

from idml._version import __version__
from idml.embedder import EmbedderOutput, IntrospectiveEmbedder
from idml.errors import TrainingError, UserError
from idml.models import ClassifierOutput, IntrospectiveClassifier, uncertainty_score
from idml.similarity import introspective_distance, introspective_similarity, introspective_weight

__all__ = [
    "ClassifierOutput",
    "EmbedderOutput",
    "IntrospectiveClassifier",
    "IntrospectiveEmbedder",
    "TrainingError",
    "UserError",
    "__version__",
    "introspective_distance",
    "introspective_similarity",
    "introspective_weight",
    "uncertainty_score",
]
