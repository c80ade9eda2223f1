"""IDML: image models that know what they do not know (Introspective Deep Metric Learning, TPAMI 2023)."""

from idml._version import __version__
from idml.embedder import EmbedderOutput, IntrospectiveEmbedder
from idml.errors import TrainingError, UserError
from idml.models import ClassifierOutput, IntrospectiveClassifier, uncertainty_score
from idml.similarity import introspective_distance, introspective_similarity, introspective_weight
from idml.trained import Embeddings, Predictions, TrainedModel, load

__all__ = [
    "ClassifierOutput",
    "EmbedderOutput",
    "Embeddings",
    "IntrospectiveClassifier",
    "IntrospectiveEmbedder",
    "Predictions",
    "TrainedModel",
    "TrainingError",
    "UserError",
    "__version__",
    "introspective_distance",
    "introspective_similarity",
    "introspective_weight",
    "load",
    "uncertainty_score",
]
