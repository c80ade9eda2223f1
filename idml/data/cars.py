"""Cars196 in both of the forms that it was published in, split by class as metric learning does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from idml.data.listing import Counts, Listing, Record, Split, find_root, inside, split_by_number
from idml.errors import UserError

FOLDERS = ("cars196", "cars", "stanford_cars")
NUM_CLASSES, LAST_TRAIN = 196, 98
COUNTS: dict[Split, Counts] = {"train": Counts(8054, 98), "test": Counts(8131, 98)}
"""The 16,185 images of Krause et al. 2013 by the halves of the class list (Song et al. 2016)."""

ONE_FILE = "cars_annos.mat"
TRAIN_LIST, TEST_LIST, UNLABELLED = "cars_train_annos.mat", "cars_test_annos_withlabels.mat", "cars_test_annos.mat"
LAYOUT = (
    f"cars196 with {ONE_FILE} and car_ims/000001.jpg and so on, or with devkit/{TRAIN_LIST}, cars_train/00001.jpg, "
    f"devkit/{TEST_LIST} and cars_test/00001.jpg and so on"
)


def list_cars(data_dir: Path) -> Listing:
    """All annotated images. The 8,144 + 8,041 of the development kit are of the classification task: they are merged.

    Raises:
        UserError: no annotations at all.
    """
    markers = [folder + name for folder in ("", "devkit/") for name in (ONE_FILE, TRAIN_LIST, TEST_LIST, UNLABELLED)]
    root = find_root(data_dir, FOLDERS, markers, expected=f"Cars196: expected {LAYOUT}")
    rows: list[tuple[Path, int]] = []
    problems: list[str] = []
    kit = _find(root, TRAIN_LIST) or _find(root, TEST_LIST) or _find(root, UNLABELLED)
    use_kit = kit is not None and not (_find(root, ONE_FILE) and (root / "car_ims").is_dir())
    parts = [(TRAIN_LIST, "cars_train"), (TEST_LIST, "cars_test")] if use_kit else [(ONE_FILE, "")]
    for name, folder in parts:
        path = _find(root, name)
        try:
            if path is None:
                raise UserError(_absent(root, name))
            rows += _read_annotations(path, root / folder if folder else root)
        except UserError as error:
            problems.append(str(error))
    numbers = sorted({number for _, number in rows})
    label_of = {number: label for label, number in enumerate(numbers)}
    split_of = split_by_number(numbers, LAST_TRAIN)
    names = _class_names(root)
    return Listing(
        name="Cars196",
        root=root,
        variant="development kit, cars_train/ and cars_test/ merged" if use_kit else f"{ONE_FILE} and car_ims/",
        classes=tuple(names[number - 1] if number <= len(names) else f"class {number}" for number in numbers),
        records=tuple(Record(path, label_of[number], split_of(number)) for path, number in rows),
        problems=tuple(problems),
        expected=COUNTS,
        must_be_full=numbers == list(range(1, NUM_CLASSES + 1)),
    )


def _find(root: Path, name: str) -> Path | None:
    """The file in the development kit or beside it."""
    return next((folder / name for folder in (root / "devkit", root) if (folder / name).is_file()), None)


def _absent(root: Path, name: str) -> str:
    text = f"no {name} in {root / 'devkit'} or {root}"
    if name == TEST_LIST and _find(root, UNLABELLED):
        text += f"; {UNLABELLED} has no classes, and retrieval needs those of the test images, too: get {TEST_LIST}"
    return text


def _load(path: Path, variable: str) -> Any:
    """A variable of a MATLAB file.

    Raises:
        UserError: the file is no MATLAB file, is damaged, or does not have it.
    """
    from scipy.io import loadmat  # takes long to import

    try:
        return np.atleast_1d(loadmat(path, squeeze_me=True, variable_names=[variable])[variable])
    except KeyError:
        raise UserError(f"{path} has no variable {variable!r}: it is not the file of Cars196") from None
    except Exception as error:  # scipy raises a dozen kinds for damaged files, some of them bare
        raise UserError(f"{path} is not a whole MATLAB file ({error}); download it again") from None


def _read_annotations(path: Path, folder: Path) -> list[tuple[Path, int]]:
    """(file, class number) of every annotation; fields are taken by name or, where they have other names, by place.

    Places: ``cars_annos.mat`` has the path first and the class sixth, the development kit the class fifth, the file
    name sixth, both with the bounding box in four fields between or before.
    """
    annotations = _load(path, "annotations")
    fields = annotations.dtype.names or ()
    name, number = ("relative_im_path", "class") if path.name == ONE_FILE else ("fname", "class")
    if name not in fields or number not in fields:
        places = (0, 5) if path.name == ONE_FILE else (5, 4)
        if len(fields) <= max(places):
            raise UserError(f"{path}: expected annotations with fields {name} and {number}, got {', '.join(fields)}")
        name, number = fields[places[0]], fields[places[1]]
    rows = []
    for position, (file, value) in enumerate(zip(annotations[name], annotations[number], strict=True), 1):
        try:
            parsed = int(value)
        except (TypeError, ValueError):
            parsed = 0
        if not 1 <= parsed <= NUM_CLASSES or not isinstance(file, str):
            raise UserError(
                f"{path}, annotation {position}: expected a path and a class from 1 to {NUM_CLASSES}, "
                f"got {file!r} and {value!r}"
            )
        try:
            rows.append((inside(folder, str(file)), parsed))
        except UserError as error:
            raise UserError(f"{path}, annotation {position}: {error}") from None
    return rows


def _class_names(root: Path) -> list[str]:
    """The 196 names ("AM General Hummer SUV 2000"), or none where neither file that has them is there and whole."""
    for name in (ONE_FILE, "cars_meta.mat"):
        path = _find(root, name)
        if path is not None:
            try:
                return [str(text) for text in _load(path, "class_names")]
            except UserError:
                continue
    return []
