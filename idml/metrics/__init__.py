"""Figures of classifiers and of retrieval models: pure functions, in bounded memory, on the device of their input."""

from idml.metrics.neighbours import nearest_neighbours
from idml.metrics.retrieval import retrieval_auroc, retrieval_metrics

__all__ = ["nearest_neighbours", "retrieval_auroc", "retrieval_metrics"]
