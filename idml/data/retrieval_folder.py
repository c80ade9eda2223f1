"""A user's own images for retrieval: class folders, or a table of paths and labels."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from idml.data.image_files import list_class_folders
from idml.data.listing import SPLITS, Listing, Record, Split, first_ten, inside, retrieval_data
from idml.data.names import Role, class_name, split_role
from idml.data.retrieval_data import RetrievalData
from idml.data.splits import find_splits, slashed
from idml.data.walk import LeftOut, images_in
from idml.errors import UserError, nearest
from idml.paths import missing, nearest_path, user_path

if TYPE_CHECKING:
    from idml.config_dml import DmlConfig

FOLDER_LAYOUT = (
    "one folder per class with images in it, as DIR/<class>/*.jpg (--test-fraction says how many classes are tested), "
    "or as DIR/train/<class>/*.jpg and DIR/test/<class>/*.jpg with other classes in test (or query and gallery)"
)
CSV_LAYOUT = "columns path,label and perhaps split (train, test, query or gallery), separated by commas"

MIN_CLASSES = 2
"""Of each side: with one class every image found is right."""


def read_folder(config: DmlConfig) -> RetrievalData:
    """Class folders in ``--data-dir``, all decoded once before training.

    Raises:
        UserError: no such folders, too few classes, classes in both training and test, or files that do not decode.
    """
    if config.data_dir is None:
        raise UserError(f"dataset folder needs --data-dir: {FOLDER_LAYOUT}")
    return retrieval_data(list_folder(Path(config.data_dir), config.test_fraction), config, check_files=True)


def list_folder(root: Path, test_fraction: float) -> Listing:
    """All images below ``root/train`` and ``root/test`` (or ``val``, or ``query`` and ``gallery``), or of class folders
    in ``root`` itself, of which the last ``test_fraction`` in sorted order are tested.

    Raises:
        UserError: folders are missing, empty, or contradict one another, or there are too few classes.
    """
    if not root.is_dir():
        raise UserError(f"{missing(root)}; expected {FOLDER_LAYOUT}")
    left_out = LeftOut()
    splits = _split_folders(root, left_out)
    if not splits:
        images = list_class_folders(root, layout=FOLDER_LAYOUT, left_out=left_out)
        assert images.paths is not None
        boundary = _first_test_class(len(images.classes), test_fraction, f"{root} ({FOLDER_LAYOUT})")
        left_out.warn(root)
        records = [
            Record(path, int(label), "train" if label < boundary else "test")
            for path, label in zip(images.paths, images.labels, strict=True)
        ]
        return Listing(
            name="folder", root=root, variant="one folder per class", classes=images.classes, records=tuple(records)
        )
    left_out.loose += images_in(root, left_out)
    parts = {
        split: list_class_folders(folder, layout=FOLDER_LAYOUT, left_out=left_out) for split, folder in splits.items()
    }
    left_out.warn(root)
    classes = tuple(sorted({name for part in parts.values() for name in part.classes}))
    label_of = {name: label for label, name in enumerate(classes)}
    records = [
        Record(path, label_of[part.classes[label]], split)
        for split, part in parts.items()
        for path, label in zip(part.paths or (), part.labels, strict=True)
    ]
    folders = slashed(list(splits.values()))
    return Listing(
        name="folder",
        root=root,
        variant=folders,
        classes=classes,
        records=tuple(records),
        disjoint_hint=f"put all class folders in one folder without {folders} and use --test-fraction 0.5, or rename "
        "classes that only have the name in common",
    )


def _split_folders(root: Path, left_out: LeftOut) -> dict[Split, Path]:
    """The folders of the splits; empty where class folders lie in ``root`` itself (one may be called train).

    Raises:
        UserError: there are splits, but not those that it takes.
    """
    found = find_splits(root)
    there = found.labelled
    if not found.folders:
        return {}
    if flat := [folder for role, folder in found.flat.items() if role == "train" or not there.keys() - {"train"}]:
        raise UserError(f"{root}: there are no class folders in {slashed(flat)}; expected {FOLDER_LAYOUT}")
    if "train" not in there or len(there) == 1:
        names = slashed(list(there.values()))
        lacks = "test/" if "train" in there else "train/"
        raise UserError(f"{root} has {names} with class folders in it, but no {lacks}; expected {FOLDER_LAYOUT}")
    if ("query" in there) != ("gallery" in there):
        raise UserError(f"{root}: expected query/ and gallery/ together, got only one of them")
    if "query" in there and "test" in there:
        raise UserError(f"{root}: expected either test/ or query/ and gallery/, got all three: move one away")
    roles: tuple[Role, ...] = ("train", "test" if "test" in there else "val")
    chosen: dict[Split, Role] = {"train": "train", "test": roles[1]}
    if "query" in there:
        chosen = {"train": "train", "query": "query", "gallery": "gallery"}
    used = {split: there[role] for split, role in chosen.items()}
    left_out.unused += [folder for folder in (*found.folders.values(), *found.others) if folder not in used.values()]
    return used


def _first_test_class(count: int, test_fraction: float, where: str) -> int:
    """The position from which on classes are tested, at least two on either side."""
    if count < 2 * MIN_CLASSES:
        raise UserError(
            f"expected at least {2 * MIN_CLASSES} classes, {MIN_CLASSES} to train on and {MIN_CLASSES} others to test, "
            f"got {count} in {where}"
        )
    tested = min(max(round(test_fraction * count), MIN_CLASSES), count - MIN_CLASSES)
    return count - tested


def read_csv(config: DmlConfig) -> RetrievalData:
    """The images of ``--csv``, all decoded once before training.

    Raises:
        UserError: the table is missing or damaged, too few classes, classes in both training and test, or files that
            are missing or do not decode.
    """
    return retrieval_data(list_csv(config.csv, config.data_dir, config.test_fraction), config, check_files=True)


def list_csv(file: str | None, data_dir: str | None, test_fraction: float) -> Listing:
    """All rows of a table with columns path, label and perhaps split; others are ignored, paths are of ``data_dir``.

    Without the column split, the last ``test_fraction`` of the sorted labels are tested. Labels that are all whole
    numbers are sorted as such.

    Raises:
        UserError: the file or a column is missing, there are no rows, or there are too few classes.
    """
    if file is None:
        raise UserError(f"dataset csv needs --csv FILE with {CSV_LAYOUT}")
    path = Path(file)
    root = Path(data_dir) if data_dir is not None else path.parent
    if path.exists() and not root.is_dir():
        raise UserError(f"{missing(root)}; expected the folder that the paths in {path} are of")
    rows, problems = _read_rows(path, root)
    labels = {label for _, label, _ in rows}
    numbers = all(label.isdecimal() for label in labels)
    classes = tuple(sorted(labels, key=lambda label: (int(label) if numbers else 0, label)))
    label_of = {name: label for label, name in enumerate(classes)}
    boundary = 0
    if not problems and all(split is None for _, _, split in rows):
        boundary = _first_test_class(len(classes), test_fraction, str(path))
    return Listing(
        name="csv",
        root=root,
        variant=str(path),
        classes=classes,
        records=tuple(
            Record(image, label_of[label], split or ("train" if label_of[label] < boundary else "test"))
            for image, label, split in rows
        ),
        problems=(f"{path}: {first_ten(problems, '; ')} ({len(problems)} bad rows)",) if problems else (),
        disjoint_hint="leave the column split out and use --test-fraction 0.5, or give other classes the split test",
    )


def _read_rows(file: Path, root: Path) -> tuple[list[tuple[Path, str, Split | None]], list[str]]:
    """(path, label, split or None) of every good row, and what is wrong with the bad ones."""
    rows: list[tuple[Path, str, Split | None]] = []
    problems: list[str] = []
    first_line: dict[Path, int] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            table = csv.reader(stream, strict=True)
            header = [name.strip() for name in next(table, [])]
            _check_header(file, header)
            for fields in table:
                if not any(field.strip() for field in fields):
                    continue
                try:
                    image, label, split = _parse_row(header, fields, root)
                    image = image if os.path.lexists(image) else user_path(image)
                    if image in first_line:
                        raise UserError(f"{image} is in line {first_line[image]} already")
                    first_line[image] = table.line_num
                    rows.append((image, label, split))
                except UserError as error:
                    problems.append(f"line {table.line_num}: {error}")
    except OSError as error:
        near = "" if os.path.lexists(file) else f"; {nearest_path(file)}"
        raise UserError(f"cannot read {file}: {error.strerror}{near}; expected a file with {CSV_LAYOUT}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} is not a CSV file in UTF-8 ({error}); expected {CSV_LAYOUT}") from None
    if not rows and not problems:
        raise UserError(f"{file} lists no images; expected {CSV_LAYOUT}")
    return rows, problems


def _check_header(file: Path, header: Sequence[str]) -> None:
    if not header:
        raise UserError(f"{file} is empty; expected {CSV_LAYOUT}")
    for column in ("path", "label"):
        if header.count(column) != 1:
            found = "twice" if column in header else f"not among {', '.join(map(repr, header[:10]))}"
            raise UserError(f"{file}: the column {column!r} is {found} in the first line; expected {CSV_LAYOUT}")


def _parse_row(header: Sequence[str], fields: list[str], root: Path) -> tuple[Path, str, Split | None]:
    """UserError for a row without path or label, with a split that is none, or with more columns than the header."""
    if any(fields[len(header) :]):
        raise UserError(
            f"expected {len(header)} columns, got {len(fields)}; put quotes around a path with a comma in it"
        )
    row = dict(zip(header, [*fields, *[""] * (len(header) - len(fields))], strict=False))
    label = class_name(row["label"].strip())
    if not label:
        raise UserError("expected a label, got none")
    image = inside(root, row["path"].strip())
    if "split" not in row:
        return image, label, None
    value = row["split"].strip()
    for split in SPLITS:
        if split in (value, split_role(value)):
            return image, label, split
    raise UserError(f"expected split train, test, query or gallery, got {value!r}{nearest(value, SPLITS)}")
