"""The images that a retrieval data set says it has, before anything was decoded; checking them, and making splits.

A lister (``list_cub`` and others) writes down what it finds and what is wrong, without stopping at the first problem:
``verify-data`` prints all of it, while a reader turns it into one UserError.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from idml.data.image_dataset import ImageDataset, Preprocessing
from idml.data.image_files import without_unreadable
from idml.data.retrieval_data import RetrievalData
from idml.data.walk import LeftOut
from idml.errors import UserError
from idml.paths import missing

if TYPE_CHECKING:
    from idml.config_dml import DmlConfig

Split = Literal["train", "test", "query", "gallery"]
SPLITS: tuple[Split, ...] = ("train", "test", "query", "gallery")

DISJOINT = "retrieval is tested on classes that were not trained on"


class Record(NamedTuple):
    """One image: its file, the position of its class in ``Listing.classes``, and what it is for."""

    path: Path
    label: int
    split: Split


class Counts(NamedTuple):
    """Images and classes of a split."""

    images: int
    classes: int

    def __str__(self) -> str:
        return f"{self.images} images of {self.classes} classes"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """What was found of a data set; files are not looked at yet.

    Attributes:
        name: of the data set, as in "CUB-200-2011".
        root: the folder that it lies in.
        variant: which of the accepted layouts was found.
        classes: all class names, in the order that labels follow.
        records: all images.
        problems: what is wrong with the lists themselves; records may be incomplete then.
        expected: counts of the full published set by split; None for a user's own images.
        must_be_full: all classes of the full set are there, so that other counts are an error and not a smaller set.
        disjoint_hint: what to do where a class is in both training and test.
    """

    name: str
    root: Path
    variant: str
    classes: tuple[str, ...]
    records: tuple[Record, ...]
    problems: tuple[str, ...] = ()
    expected: Mapping[Split, Counts] | None = None
    must_be_full: bool = False
    disjoint_hint: str = "download the data set again"

    def counts(self) -> dict[Split, Counts]:
        """Images and classes of each split that has any."""
        by_split = {split: [record.label for record in self.records if record.split == split] for split in SPLITS}
        return {split: Counts(len(labels), len(set(labels))) for split, labels in by_split.items() if labels}

    def is_full(self) -> bool:
        """Whether the counts are those of the full published set."""
        return self.expected is not None and self.counts() == dict(self.expected)


def first_ten(items: Sequence[object], separator: str = ", ") -> str:
    """The first ten items as text, with ``...`` where there are more."""
    return separator.join(map(str, items[:10])) + (f"{separator}..." if len(items) > 10 else "")


_ESCAPES = re.compile(r"\A\Z|(\A|[/\\])\.\.([/\\]|\Z)|\0")
"""Nothing, ``..`` between slashes, a zero byte."""

_ABSOLUTE = re.compile(r"\A[A-Za-z]:|\A[/\\]|\A~[/\\]")
"""A Windows drive, a leading slash, the home directory."""


def inside(root: Path, name: str) -> Path:
    """The path below ``root`` that a data file gives, relative or absolute; links below ``root`` may lead anywhere.

    Raises:
        UserError: the path is empty, lies elsewhere, has ``..`` in it, or is none at all.
    """
    if _ESCAPES.search(name):
        raise UserError(f"expected a path below {root} without '..', got {name!r}")
    if not _ABSOLUTE.search(name):
        return root / name
    given = os.path.expanduser(name)
    # With its folder's links followed, but not its own, as below the root.
    real = os.path.join(os.path.realpath(os.path.dirname(given)), os.path.basename(given))
    for path in (given, real):
        for folder in (os.path.abspath(root), os.path.realpath(root)):
            if path.startswith(os.path.join(folder, "")):
                return root / os.path.relpath(path, folder)
    raise UserError(
        f"expected a path below {os.path.abspath(root)}, got {name!r}, which lies elsewhere: give --data-dir with a "
        "folder that holds all images"
    )


def find_root(data_dir: Path, names: Iterable[str], markers: Iterable[str], *, expected: str) -> Path:
    """The first of ``data_dir/<name>`` and ``data_dir`` itself that has one of ``markers`` in it.

    Raises:
        UserError: there is none.
    """
    candidates = [*(data_dir / name for name in names), data_dir]
    for folder in candidates:
        if any((folder / marker).exists() for marker in markers):
            return folder
    looked = ", ".join(map(str, candidates)) + ("" if data_dir.is_dir() else f" (there is {missing(data_dir)})")
    raise UserError(f"no {expected}; looked in {looked}; give --data-dir with the folder that has it")


def missing_files(paths: Iterable[Path]) -> list[Path]:
    """The paths at which there is no file, in their order; each folder is listed once, and links are followed."""
    folders: dict[Path, set[str]] = {}
    missing = []
    for path in paths:
        names = folders.get(path.parent)
        if names is None:
            names = folders[path.parent] = _files_in(path.parent)
        # A file system that ignores case lists other names than it opens.
        if path.name not in names and not (names and path.is_file()):
            missing.append(path)
    return missing


def _files_in(folder: Path) -> set[str]:
    def is_file(entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_file()
        except OSError:  # a link that leads in circles
            return False

    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if is_file(entry)}
    except OSError:
        return set()


def split_problems(listing: Listing) -> list[str]:
    """What is wrong with the splits as a whole: lists, parts, classes and counts (but not files), as sentences."""
    if listing.problems:
        return list(listing.problems)  # what follows from them would hide them
    found = listing.counts()
    if set(found) not in ({"train", "test"}, {"train", "query", "gallery"}):
        return [f"expected images of train and test, or of train, query and gallery, got {', '.join(found) or 'none'}"]
    train, other = (
        {record.label for record in listing.records if (record.split == "train") == is_train}
        for is_train in (True, False)
    )
    if both := sorted(train & other):
        names = first_ten([repr(listing.classes[label]) for label in both])
        return [f"{len(both)} classes are in both training and test ({names}): {DISJOINT}; {listing.disjoint_hint}"]
    if listing.must_be_full and not listing.is_full():
        assert listing.expected is not None
        wrong = [
            f"{split}: found {found[split]}, expected {counts}"
            for split, counts in listing.expected.items()
            if found[split] != counts
        ]
        return [f"all classes are there, but not the images: {'; '.join(wrong)}"]
    return []


def not_full(listing: Listing) -> str | None:
    """For a published set that is smaller than the full one: the sentence that says so."""
    if listing.expected is None or listing.is_full():
        return None
    found, full = (
        ", ".join(f"{split} {counts}" for split, counts in table.items())
        for table in (listing.counts(), listing.expected)
    )
    classes = len({record.label for record in listing.records})
    return f"not the full {listing.name}: {classes} classes, {found}, in place of {full}"


def retrieval_data(listing: Listing, config: DmlConfig, *, check_files: bool) -> RetrievalData:
    """The splits of a listing; labels count from 0 over the training classes and over the test classes.

    Args:
        listing: what a lister found.
        config: gives ``image_size``, ``skip_bad_images``, ``workers``.
        check_files: decode every image before training, as for a user's own (otherwise only to skip bad ones).

    Raises:
        UserError: something is wrong with the lists, counts or files; all of it in one message.
    """
    problems = split_problems(listing)
    # A user's own files are all decoded, and then those that are missing are left out with the bad ones.
    skips_missing = check_files and config.skip_bad_images
    if not skips_missing and (missing := missing_files(record.path for record in listing.records)):
        problems.append(f"{len(missing)} of {len(listing.records)} images are missing: {first_ten(missing)}")
    if problems:
        raise UserError(
            f"{listing.name} in {listing.root}: {'; '.join(problems)}. python -m idml verify-data tells all that is "
            "wrong"
        )
    if sentence := not_full(listing):
        warnings.warn(f"{listing.root} is {sentence}", UserWarning, stacklevel=3)

    left_out = LeftOut()

    def dataset(split: Split) -> ImageDataset:
        train_side = split == "train"
        used = np.unique([record.label for record in listing.records if (record.split == "train") == train_side])
        chosen = [record for record in listing.records if record.split == split]
        labels = np.searchsorted(used, [record.label for record in chosen]).astype(np.int64)
        paths = tuple(record.path for record in chosen)
        images = ImageDataset(labels=labels, classes=tuple(listing.classes[label] for label in used), paths=paths)
        if not (check_files or config.skip_bad_images):
            return images
        return without_unreadable(images, skip=config.skip_bad_images, workers=config.workers, left_out=left_out)

    splits: tuple[Split, ...] = ("train", "test") if "test" in listing.counts() else ("train", "query", "gallery")
    parts = {split: dataset(split) for split in splits}
    left_out.warn(listing.root)
    return RetrievalData(
        train=parts["train"],
        test=parts["test"] if "test" in parts else parts["query"],
        gallery=parts.get("gallery"),
        preprocessing=Preprocessing(image_size=config.image_size or 224),
    )


def split_by_number(numbers: Sequence[int], last_train: int) -> Callable[[int], Split]:
    """Which split a class number belongs to: up to ``last_train`` is trained on, the rest tested, as published.

    Where one side would be empty (a cut-down set), the first half of the numbers is trained on.
    """
    ordered = sorted(set(numbers))
    if ordered and (ordered[-1] <= last_train or ordered[0] > last_train):
        last_train = ordered[(len(ordered) - 1) // 2]
    return lambda number: "train" if number <= last_train else "test"
