"""Files of embeddings: Parquet for databases, npz for NumPy; the same columns and the same description in both.

Letters in shapes: N images, D semantic and E uncertainty dimensions, K dimensions of a belief, T top classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import zipfile
from collections.abc import Collection as Names
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from idml.data.names import composed
from idml.errors import StorageError, UserError
from idml.paths import missing, user_path

Format = Literal["parquet", "npz"]
Columns = dict[str, np.ndarray]
"""Columns of numbers by name; see ``EmbeddingTable``."""

ABOUT = "idml"
"""Key of the description: in the metadata of a Parquet file, and the name of an array in an npz file."""

ROW_GROUP = 8192
"""Least rows of a group of a Parquet file, but for the last one: large enough to be read at full speed."""

TEXTS = ("path", "split", "label")
REQUIRED = ("embedding", "uncertainty")
DIMENSIONS = {
    "embedding": "semantic",
    "uncertainty_embedding": "uncertainty",
    "belief": "belief",
    "coordinates": "coordinates",
}
"""Column of vectors: its name among the dimensions of the description."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingTable:
    """What ``python -m idml embed`` wrote.

    Attributes:
        about: fingerprint and checkpoint of the model, task, score, dimensions, preprocessing, ``data_dir`` and so on.
        paths: N, relative to ``data_dir``.
        splits, labels: N names; None where there is none.
        numbers: ``embedding`` (N, D), ``uncertainty`` (N,) (NaN where there is no score), ``uncertainty_embedding``
            (N, E) with ISM, ``novelty`` and ``foreseen_loss`` (N,), ``coordinates`` (N, Q) and, of a retrieval model,
            ``belief`` (N, K) with an introspection, and of a classifier ``top_probabilities`` (N, T); all float32.
        top_classes: N times T names, of a classifier; else None.
    """

    about: dict[str, Any]
    paths: list[str]
    splits: list[str | None]
    labels: list[str | None]
    numbers: Columns
    top_classes: list[list[str]] | None = None

    def __len__(self) -> int:
        return len(self.paths)


def pyarrow() -> Any:
    """The package, with its module ``parquet``; UserError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "Parquet files need pyarrow, which is not installed: pip install 'idml[search]', or take --format npz"
        ) from None
    return pyarrow


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; the file takes its place only when it is whole and on the disk.

    Raises:
        StorageError: it cannot be written. What was there before is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"could not write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_table(
    path: Path,
    kind: Format,
    about: dict[str, Any],
    texts: dict[str, Sequence[str | None]],
    parts: Iterable[Columns],
) -> None:
    """Write a file of embeddings, a part after the other.

    Args:
        path: an existing file is replaced, by a whole one only.
        about: plain values, with ``classes`` where a part has top classes.
        texts: N values each for path, split and label.
        parts: one or more, of N rows in all: columns as in ``EmbeddingTable.numbers``; of a classifier, also
            ``top_classes`` (n, T), integers that stand for ``about["classes"]``.

    Raises:
        StorageError: it cannot be written. UserError: Parquet without pyarrow.
    """
    with written_whole(path) as temporary:
        if kind == "parquet":
            _write_parquet(temporary, about, texts, parts)
        else:
            _write_npz(temporary, about, texts, parts)


def _write_parquet(
    path: Path, about: dict[str, Any], texts: dict[str, Sequence[Any]], parts: Iterable[Columns]
) -> None:
    arrow, start, writer = pyarrow(), 0, None
    try:
        for group in _in_groups(parts, ROW_GROUP):
            end = start + len(group["embedding"])
            columns = {name: arrow.array(texts[name][start:end], arrow.string()) for name in TEXTS}
            columns |= {name: _as_arrow(arrow, name, values, about) for name, values in group.items()}
            table = arrow.table(columns).replace_schema_metadata({ABOUT: json.dumps(about)})
            if writer is None:
                # Vectors of random bits gain nothing from dictionaries; checksums tell a damaged file.
                writer = arrow.parquet.ParquetWriter(
                    path, table.schema, compression="zstd", use_dictionary=list(TEXTS), write_page_checksum=True
                )
            writer.write_table(table, row_group_size=len(table))
            start = end
    finally:
        if writer is not None:
            writer.close()


def _in_groups(parts: Iterable[Columns], least: int) -> Iterator[Columns]:
    """The same rows, ``least`` or more at a time but for the last ones."""
    waiting: list[Columns] = []
    for part in parts:
        waiting.append(part)
        if sum(len(each["embedding"]) for each in waiting) >= least:
            yield joined(waiting)
            waiting = []
    if waiting:
        yield joined(waiting)


def joined(parts: Sequence[Columns]) -> Columns:
    """The rows of all parts."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _as_arrow(arrow: Any, name: str, values: np.ndarray, about: dict[str, Any]) -> Any:
    """A column as Arrow has it: vectors as lists of one length, NaN as null, numbers of classes as their names."""
    if name == "top_classes":
        classes = about["classes"]
        return arrow.array([[classes[label] for label in row] for row in values.tolist()], arrow.list_(arrow.string()))
    if values.ndim == 1:
        return arrow.array(values, arrow.float32(), from_pandas=True)
    return arrow.FixedSizeListArray.from_arrays(arrow.array(values.reshape(-1), arrow.float32()), values.shape[1])


def _write_npz(path: Path, about: dict[str, Any], texts: dict[str, Sequence[Any]], parts: Iterable[Columns]) -> None:
    numbers = joined(list(parts))
    if "top_classes" in numbers:
        numbers["top_classes"] = np.array(about["classes"], dtype=str)[numbers["top_classes"]]
    arrays: dict[str, Any] = {name: np.array([value or "" for value in texts[name]], dtype=str) for name in TEXTS}
    arrays |= {ABOUT: np.array(json.dumps(about)), **numbers}
    with path.open("wb") as file:
        np.savez(file, **arrays)


def read_table(path: str | Path, *, wanted: Names[str] | None = None) -> EmbeddingTable:
    """Read what ``python -m idml embed`` wrote, of either format.

    Args:
        path: the format is told by the content.
        wanted: columns of numbers to be read beside ``embedding`` and ``uncertainty``; None: all.

    Raises:
        UserError: there is no such file, it is something else, or damaged.
    """
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"{missing(path, 'file')}; expected one that `python -m idml embed` wrote")
    with path.open("rb") as file:
        start = file.read(4)
    if start not in (b"PAR1", b"PK\x03\x04"):
        raise UserError(f"{path} is neither a Parquet nor an npz file; expected one that `python -m idml embed` wrote")
    table = _read_parquet(path, wanted) if start == b"PAR1" else _read_npz(path, wanted)
    _check(table, path)
    return dataclasses.replace(table, labels=[name and composed(name) for name in table.labels])


def _is_wanted(name: str, wanted: Names[str] | None) -> bool:
    return wanted is None or name in REQUIRED or name in wanted


def _read_parquet(path: Path, wanted: Names[str] | None) -> EmbeddingTable:
    arrow = pyarrow()
    try:
        with arrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            about = _about(path, (file.schema_arrow.metadata or {}).get(ABOUT.encode()), file.schema_arrow.names)
            names = [name for name in file.schema_arrow.names if name in TEXTS or _is_wanted(name, wanted)]
            table = file.read(columns=names)
    except (OSError, arrow.ArrowException) as error:
        raise UserError(f"{path} is damaged, or no Parquet file: {error}") from None
    numbers: Columns = {}
    top_classes = None
    for name in sorted(set(names) - set(TEXTS)):
        column = table.column(name).combine_chunks()
        if name == "top_classes":
            top_classes = column.to_pylist()
        elif name in DIMENSIONS or name == "top_probabilities":
            numbers[name] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1)
            width = about["dimensions"].get(DIMENSIONS.get(name, "top"), 0)
            if not width or len(numbers[name]) != len(table) * width:
                raise UserError(f"{path} is damaged: its column {name} is not {len(table)} vectors of {width} numbers")
            numbers[name] = numbers[name].reshape(len(table), width)
        elif name in ("uncertainty", "foreseen_loss", "novelty"):  # others may have added columns
            numbers[name] = column.to_numpy(zero_copy_only=False).astype(np.float32)
    texts = {name: table.column(name).to_pylist() for name in TEXTS}
    return EmbeddingTable(
        about=about,
        paths=texts["path"],
        splits=texts["split"],
        labels=texts["label"],
        numbers=numbers,
        top_classes=top_classes,
    )


def _read_npz(path: Path, wanted: Names[str] | None) -> EmbeddingTable:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            stored = arrays[ABOUT].item().encode() if ABOUT in arrays.files else None
            about = _about(path, stored, arrays.files)
            names = [name for name in arrays.files if name != ABOUT and name not in TEXTS and _is_wanted(name, wanted)]
            numbers = {name: arrays[name] for name in names}
            texts = {name: [value or None for value in arrays[name].tolist()] for name in TEXTS}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged, or no npz file: {error}") from None
    top_classes = numbers.pop("top_classes", None)
    return EmbeddingTable(
        about=about,
        paths=[name or "" for name in texts["path"]],
        splits=texts["split"],
        labels=texts["label"],
        numbers=numbers,
        top_classes=None if top_classes is None else top_classes.tolist(),
    )


def _about(path: Path, stored: bytes | None, columns: Sequence[str]) -> dict[str, Any]:
    """The description; UserError where the file has none."""
    missing = [name for name in (*TEXTS, *REQUIRED) if name not in columns]
    if stored is None or missing:
        lacks = f"it has no column {missing[0]}" if missing else "nothing in it says which model it is of"
        raise UserError(f"{path} was not written by `python -m idml embed`: {lacks}")
    about = json.loads(stored)
    if not isinstance(about, dict) or not {"fingerprint", "dimensions", "task", "ism"} <= about.keys():
        raise UserError(f"{path} was not written by `python -m idml embed`: its description is another")
    return about


def _check(table: EmbeddingTable, path: Path) -> None:
    """UserError unless there are rows, all columns have as many, and the embeddings are finite and as wide as said."""
    embedding, width = table.numbers["embedding"], table.about["dimensions"]["semantic"]
    if not len(table):
        raise UserError(f"{path} has no images in it")
    if embedding.ndim != 2 or embedding.shape[1] != width or any(len(c) != len(table) for c in table.numbers.values()):
        raise UserError(
            f"{path} is damaged: expected {len(table)} embeddings of {width} numbers, got {embedding.shape}"
        )
    finite = np.isfinite(embedding).all(1)
    if not finite.all():
        bad = int(np.flatnonzero(~finite)[0])
        raise UserError(
            f"{path}: {int((~finite).sum())} embeddings have inf or NaN in them, the first of {table.paths[bad]}; the "
            "model that it was made with is no good"
        )
