"""The files beside the page: CSV for every section, and all figures as JSON."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from idml.audit.answers import Answers
from idml.audit.duplicates import Duplicates
from idml.audit.figures import Confusion
from idml.audit.judgement import New, Refusal
from idml.audit.shifts import KINDS, Shift
from idml.data.collection import Collection

FILES = (
    "index.html",
    "images.csv",
    "label_errors.csv",
    "new_images.csv",
    "duplicates.csv",
    "confusions.csv",
    "shifts.csv",
    "metrics.json",
)
"""All files of a report."""


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Numbers with six digits; an empty cell for what there is not."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([_cell(value) for value in row] for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value)).lower()
    if isinstance(value, (float, np.floating)):
        return "" if math.isnan(value) else f"{value:.6g}"
    return "" if value is None else value


def _name(classes: tuple[str, ...], label: int) -> str | None:
    return None if label < 0 else classes[label]


def write_images(
    path: Path, collection: Collection, answers: Answers, new: New | None, refusal: Refusal | None
) -> None:
    """A row for each image, in the collection's order."""
    header = ["path", "split", "label", "predicted", "correct", "confidence", "uncertainty", "label_doubt"]
    header += ["label_probability" if answers.nearest is None else "nearest", "novelty", "decision"]

    right = answers.right

    def rows() -> Iterable[list[Any]]:
        for index, name in enumerate(collection.names):
            label = int(answers.labels[index])
            last: Any
            if answers.nearest is not None:
                last = collection.names[answers.nearest[index]]
            else:
                assert answers.label_probability is not None
                last = answers.label_probability[index]
            yield [
                name,
                collection.splits[index],
                _name(answers.classes, label),
                _name(answers.classes, int(answers.predicted[index])),
                None if label < 0 else right[index],
                answers.confidence[index],
                answers.uncertainty[index],
                answers.doubt[index],
                last,
                None if new is None else new.novelty[index],
                None if refusal is None else "answer" if refusal.answered[index] else "refuse",
            ]

    write_csv(path, header, rows())


def write_label_errors(path: Path, collection: Collection, answers: Answers, ranked: np.ndarray) -> None:
    """The images at ``ranked``, in that order."""
    header = ["rank", "path", "split", "label", "suggested", "doubt", "predicted", "confidence", "uncertainty"]
    write_csv(
        path,
        header,
        (
            [
                rank,
                collection.names[index],
                collection.splits[index],
                _name(answers.classes, int(answers.labels[index])),
                _name(answers.classes, int(answers.suggested[index])),
                answers.doubt[index],
                _name(answers.classes, int(answers.predicted[index])),
                answers.confidence[index],
                answers.uncertainty[index],
            ]
            for rank, index in enumerate(ranked.tolist(), start=1)
        ),
    )


def write_new_images(path: Path, collection: Collection, answers: Answers, new: New | None) -> None:
    """The images that are new to the model, the strangest first."""
    header = ["rank", "path", "split", "label", "predicted", "novelty", "strangeness", "uncertainty"]
    chosen = [] if new is None else new.order[: new.count].tolist()
    rows = (
        [
            rank,
            collection.names[index],
            collection.splits[index],
            _name(answers.classes, int(answers.labels[index])),
            _name(answers.classes, int(answers.predicted[index])),
            new.novelty[index],
            new.strangeness[index],
            answers.uncertainty[index],
        ]
        for rank, index in enumerate(chosen, start=1)
        if new is not None
    )
    write_csv(path, header, rows)


def write_duplicates(path: Path, collection: Collection, answers: Answers, duplicates: Duplicates) -> None:
    """A row for each pair."""
    header = ["first", "second", "first_split", "second_split", "first_label", "second_label", "across_splits"]
    header += ["labels_differ", "similarity", "correlation", "grey_difference", "group"]

    def row(number: int) -> list[Any]:
        pair = (int(duplicates.first[number]), int(duplicates.second[number]))
        return [
            *(collection.names[index] for index in pair),
            *(collection.splits[index] for index in pair),
            *(_name(answers.classes, int(answers.labels[index])) for index in pair),
            duplicates.across[number],
            duplicates.conflict[number],
            duplicates.similarity[number],
            duplicates.correlation[number],
            duplicates.difference[number],
            int(duplicates.group[number]),
        ]

    write_csv(path, header, (row(number) for number in range(len(duplicates))))


def write_confusions(path: Path, answers: Answers, confusions: Sequence[Confusion]) -> None:
    """A row for each class taken for another."""
    rows = ([answers.classes[c.label], answers.classes[c.predicted], c.count, c.share] for c in confusions)
    write_csv(path, ["label", "predicted", "images", "share_of_label"], rows)


def write_shifts(path: Path, shifts: Sequence[Shift]) -> None:
    """A row for each kind and strength."""
    header = ["kind", "strength", "strength_is", "mean_uncertainty", "auroc_against_clean", "images"]
    rows = ([s.kind, s.strength, KINDS[s.kind][1], s.mean_uncertainty, s.auroc, s.images] for s in shifts)
    write_csv(path, header, rows)


def write_metrics(path: Path, figures: dict[str, Any]) -> None:
    """JSON; a figure that there is not is null."""
    path.write_text(json.dumps(_plain(figures), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
