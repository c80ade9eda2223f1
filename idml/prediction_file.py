"""Files of predictions, a line an image: CSV, Parquet and JSON lines with the same columns.

Letters in shapes: n images of a part, C classes.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from idml.embedding_file import Columns, pyarrow, written_whole
from idml.errors import UserError
from idml.predictions import Predictions

Format = Literal["csv", "parquet", "jsonl"]

COLUMNS = ("path", "class", "confidence", "p_wrong", "novelty", "decision", "classes")
"""Of every format.

- ``path``: of the image, as it was given or relative to the folder.
- ``class``: the answer; ``confidence``: its probability by the plain logits.
- ``p_wrong``: probability that the answer is wrong; ``novelty``: share of held-out known images that are less strange.
  Empty without an introspection.
- ``decision``: answer or refuse; empty where no risk was asked for.
- ``classes``: those that are named for a coverage, the likeliest first; ``|`` between them in CSV, a list elsewhere.
  Empty where no coverage was asked for.
"""

BETWEEN = "|"
"""Between the names of classes in CSV."""

NAMED, COUNTS = "named", "counts"
"""Columns of a part: positions of the classes that are named, of one image behind the other, and how many each has."""


def columns_of(predictions: Predictions) -> Columns:
    """The numbers of a part: ``label``, ``confidence``, ``p_wrong``, ``novelty`` and, with a coverage, ``counts`` (n,)
    and ``named``."""
    nothing = np.full(len(predictions), np.nan, np.float32)
    columns = {
        "label": predictions.labels.astype(np.int32),
        "confidence": predictions.confidence,
        "p_wrong": nothing if predictions.p_wrong is None else predictions.p_wrong,
        "novelty": nothing if predictions.novelty is None else predictions.novelty,
    }
    if predictions.sets is not None:
        order = np.argsort(-predictions.probabilities, axis=1, kind="stable").astype(np.int32)
        columns[NAMED] = order[np.take_along_axis(predictions.sets, order, axis=1)]
        columns[COUNTS] = predictions.sets.sum(1).astype(np.int32)
    return columns


def rows_of(
    paths: Sequence[str], columns: Columns, classes: Sequence[str], threshold: float | None
) -> Iterator[dict[str, Any]]:
    """The images of a part as plain values by the names of ``COLUMNS``; None for what is empty.

    Args:
        paths: n.
        columns: as ``columns_of`` gives them.
        classes: C names.
        threshold: of P(wrong), up to which an answer is given; None where no risk was asked for.
    """
    named = [] if COUNTS not in columns else np.split(columns[NAMED], np.cumsum(columns[COUNTS])[:-1])
    for row, path in enumerate(paths):
        p_wrong = columns["p_wrong"][row]
        yield {
            "path": path,
            "class": classes[columns["label"][row]],
            "confidence": _number(columns["confidence"][row]),
            "p_wrong": _number(p_wrong),
            "novelty": _number(columns["novelty"][row]),
            "decision": None if threshold is None else "answer" if p_wrong <= threshold else "refuse",
            "classes": [classes[label] for label in named[row]] if named else None,
        }


def _number(value: np.float32) -> float | None:
    """With as many digits as tell a float32; None for NaN."""
    return None if math.isnan(value) else float(str(value))


def format_of(out: Path) -> Format:
    """By the name of the file; UserError for any other."""
    kinds: dict[str, Format] = {".csv": "csv", ".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl"}
    if out.suffix.lower() not in kinds:
        raise UserError(
            f"--out {out.name}: expected a name that ends in .csv, .parquet or .jsonl, or - for the standard output"
        )
    return kinds[out.suffix.lower()]


def as_csv(row: dict[str, Any]) -> list[Any]:
    """A row of ``rows_of`` as the cells of a line of CSV."""
    cells = [BETWEEN.join(value) if isinstance(value, list) else value for value in row.values()]
    return ["" if cell is None else cell for cell in cells]


def write_rows(path: Path, kind: Format, parts: Iterable[list[dict[str, Any]]]) -> None:
    """Write a file, a part after the other; whole or not at all.

    Args:
        path: a file that is there is replaced.
        kind: its format.
        parts: rows as ``rows_of`` gives them.

    Raises:
        StorageError: the disk does not take it. UserError: Parquet without pyarrow.
    """
    with written_whole(path) as temporary:
        if kind == "parquet":
            _write_parquet(temporary, parts)
            return
        with temporary.open("w", newline="" if kind == "csv" else "\n", encoding="utf-8") as file:
            if kind == "csv":
                writer = csv.writer(file)
                writer.writerow(COLUMNS)
                for rows in parts:
                    writer.writerows(map(as_csv, rows))
            else:
                for rows in parts:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_parquet(path: Path, parts: Iterable[list[dict[str, Any]]]) -> None:
    arrow = pyarrow()
    number, text = arrow.float32(), arrow.string()
    kinds = (text, text, number, number, number, text, arrow.list_(text))
    schema = arrow.schema(list(zip(COLUMNS, kinds, strict=True)))
    with arrow.parquet.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for rows in parts:
            writer.write_table(arrow.Table.from_pylist(rows, schema=schema))
