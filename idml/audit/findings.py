"""All that an audit finds, before it is written down."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from idml.audit.answers import OF_SPLIT, Answers
from idml.audit.duplicates import Duplicates
from idml.audit.figures import Confusion, Share
from idml.audit.judgement import NEW, New, Refusal
from idml.audit.shifts import Shift
from idml.data.collection import Collection
from idml.environment import hardware, versions
from idml.trained import TrainedModel

LIKELY_WRONG = 0.95
"""From this probability on, a classifier's label is called likely wrong. With 5 % of Fashion-MNIST's labels planted
wrong, 81 to 83 % of what it then names is planted, and 87 to 92 % of what is planted is named (three models)."""

FENCE = 1.5
"""Of a retrieval model a label stands out where its doubt is so many interquartile ranges above the upper quartile
(Tukey 1977): how near classes are to one another differs from model to model. With 5 % of the labels of 5,181 emoji
planted wrong, 71 % of what stands out is planted, and 61 % of what is planted stands out (R@1 48 %)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What ``python -m idml audit`` has found.

    Attributes:
        model, collection, answers: see there.
        shares: right answers by split; empty without labels.
        selective: ``uncertainty_figures``; empty without labels.
        new: what is new to the model; None where it has not been introspected.
        refusal: what it would refuse; None where it cannot promise anything, for the reason in refusal_note.
        lone: judged images of which no other has the class.
        ranked: (R,) int64, the labelled images for which another class is likelier, the most doubtful first.
        likely_wrong: how many of them, the first, are called likely wrong (``LIKELY_WRONG``), or stand out (``FENCE``).
        duplicates, confusions, shifts: see there.
        seconds: that it took.
    """

    model: TrainedModel
    collection: Collection
    answers: Answers
    shares: list[Share]
    selective: dict[str, Any]
    new: New | None
    refusal: Refusal | None
    refusal_note: str
    lone: int
    ranked: np.ndarray
    likely_wrong: int
    duplicates: Duplicates
    confusions: list[Confusion]
    shifts: list[Shift]
    seconds: float

    @property
    def figure_name(self) -> str:
        """What the share of right answers is called."""
        return "accuracy" if self.model.task == "classification" else "R@1"

    @property
    def headline(self) -> Share:
        """Right answers of the judged images; there must be some."""
        split = self.answers.judged_split.removeprefix(OF_SPLIT)
        return next((share for share in self.shares if share.name == split), self.shares[-1])


def ranked_doubts(answers: Answers, *, retrieval: bool) -> tuple[np.ndarray, int]:
    """``Findings.ranked`` and ``Findings.likely_wrong``."""
    # Of a classifier half the probability; of a retrieval model as near to another class as to its own.
    least = 0.0 if retrieval else 0.5
    doubt = np.nan_to_num(answers.doubt, nan=-np.inf)
    order = np.argsort(-doubt, kind="stable")
    ranked = order[doubt[order] > least]
    if not retrieval:
        return ranked, int((doubt >= LIKELY_WRONG).sum())
    if not len(ranked):
        return ranked, 0
    low, high = np.percentile(answers.doubt[np.isfinite(answers.doubt)], [25, 75])
    return ranked, int((doubt[ranked] > high + FENCE * (high - low)).sum())


def as_metrics(found: Findings, options: dict[str, Any]) -> dict[str, Any]:
    """The figures, for ``metrics.json``."""
    spec, answers, duplicates = found.model.spec, found.answers, found.duplicates
    names, counts = np.unique(np.array(found.collection.splits), return_counts=True)
    return {
        "model": {
            "task": spec.task,
            "method": spec.method,
            "backbone": spec.model,
            "trained_on": spec.dataset,
            "fingerprint": found.model.fingerprint,
        },
        "images": len(found.collection),
        "labelled_images": int(answers.labelled.sum()),
        "images_by_split": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        "figure": found.figure_name,
        "shares": [dataclasses.asdict(share) for share in found.shares],
        "judged": {"what": answers.judged_split, "images": int(answers.judged.sum()), "lone_images": found.lone},
        "uncertainty": {
            "score": answers.score_name,
            "is_probability": answers.is_probability,
            "calibrated_on": answers.calibrated_on,
            "mean": float(answers.uncertainty.mean()),
            "selective": found.selective,
        },
        "novelty": _novelty_metrics(found.new),
        "refusal": _refusal_metrics(found),
        "label_errors": {"likely": found.likely_wrong, "another_class_likelier": len(found.ranked)},
        "duplicates": {
            "pairs": len(duplicates),
            "across_splits": int(duplicates.across.sum()),
            "labels_differ": int(duplicates.conflict.sum()),
        },
        "confusions": len(found.confusions),
        "shifts": [
            {name: value for name, value in dataclasses.asdict(shift).items() if name != "example"}
            for shift in found.shifts
        ],
        "options": options,
        "seconds": round(found.seconds, 1),
        "hardware": hardware(),
        "versions": versions(),
    }


def _novelty_metrics(new: New | None) -> dict[str, Any] | None:
    if new is None:
        return None
    splits = {split.name: {"images": split.images, "new": split.new} for split in new.splits}
    return {"new_from": NEW, "ranked": new.ranked, "new_images": new.count, "splits": splits}


def _refusal_metrics(found: Findings) -> dict[str, Any]:
    if found.refusal is None:
        return {"promise": None, "note": found.refusal_note}
    return {
        "promise": dataclasses.asdict(found.refusal.promise),
        "answered": found.refusal.share,
        "shares": [dataclasses.asdict(share) for share in found.refusal.shares],
    }
