"""Figures of classifiers and of retrieval models: pure functions, in bounded memory, on the device of their input."""

from idml.metrics.neighbours import nearest_neighbours
from idml.metrics.retrieval import retrieval_auroc, retrieval_metrics
from idml.metrics.uncertainty import auroc, calibration_metrics, risk_coverage, selective_metrics

__all__ = [
    "auroc",
    "calibration_metrics",
    "nearest_neighbours",
    "retrieval_auroc",
    "retrieval_metrics",
    "risk_coverage",
    "selective_metrics",
]
