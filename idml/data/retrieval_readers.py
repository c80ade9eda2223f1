"""CUB-200-2011, Cars196, Stanford Online Products and In-Shop, split by class, as metric learning does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from idml.data.cars import list_cars
from idml.data.listing import (
    Counts,
    Listing,
    Record,
    Split,
    find_root,
    first_ten,
    inside,
    retrieval_data,
    split_by_number,
)
from idml.data.retrieval_data import RetrievalData
from idml.data.walk import LeftOut, folders_of, images_in
from idml.errors import UserError

if TYPE_CHECKING:
    from idml.config_dml import DmlConfig

# ---- CUB-200-2011 ----

CUB_LAYOUT = "CUB_200_2011/images/001.Black_footed_Albatross/*.jpg (as CUB_200_2011.tgz unpacks)"
CUB_CLASSES, CUB_LAST_TRAIN = 200, 100
CUB_COUNTS: dict[Split, Counts] = {"train": Counts(5864, 100), "test": Counts(5924, 100)}
"""The 11,788 images of Wah et al. 2011 by the halves of the class list (Song et al. 2016)."""


def read_cub(config: DmlConfig) -> RetrievalData:
    """CUB-200-2011: classes 1 to 100 are trained on, 101 to 200 tested. Fewer classes are read with a warning.

    Raises:
        UserError: no such data, or all 200 classes with other counts than the published ones.
    """
    return retrieval_data(list_cub(Path(config.data_dir or "data")), config, check_files=False)


def list_cub(data_dir: Path) -> Listing:
    """All images of the class folders; ``train_test_split.txt`` is of the classification task and never read.

    Where all 200 class folders are there and so is ``images.txt``, images that only it has are listed, too: as missing.

    Raises:
        UserError: no such folder, or fewer than two classes in it.
    """
    root = find_root(data_dir, ["CUB_200_2011"], ["images"], expected=f"CUB-200-2011: expected {CUB_LAYOUT}")
    folders: dict[int, Path] = {}
    problems: list[str] = []
    for folder in folders_of(root / "images"):
        match = re.match(r"(\d+)\.", folder.name)
        if match is None or int(match.group(1)) in folders:
            got = "a second one of this number" if match else "a folder without a number"
            problems.append(f"{folder}: expected one folder per class, as 001.Black_footed_Albatross, got {got}")
        else:
            folders[int(match.group(1))] = folder
    if len(folders) < 2:
        raise UserError(f"expected at least 2 class folders in {root / 'images'}, got {len(folders)}: {CUB_LAYOUT}")

    numbers = sorted(folders)
    split_of = split_by_number(numbers, CUB_LAST_TRAIN)
    whole = numbers == list(range(1, CUB_CLASSES + 1))
    files = {number: {path.name for path in images_in(folders[number], LeftOut())} for number in numbers}
    if whole and (root / "images.txt").is_file():
        try:
            listed = _cub_list(root / "images.txt")
            for number in numbers:
                expected = listed.get(folders[number].name, set())
                if extra := sorted(files[number] - expected):
                    problems.append(f"images.txt lacks {len(extra)} images of {folders[number]}: {first_ten(extra)}")
                files[number] |= expected
        except UserError as error:
            problems.append(str(error))
    problems += [f"no images in the class folder {folders[number]}" for number in numbers if not files[number]]
    return Listing(
        name="CUB-200-2011",
        root=root,
        variant="images/<number>.<class>/*.jpg",
        classes=tuple(folders[number].name.split(".", 1)[1] for number in numbers),
        records=tuple(
            Record(folders[number] / name, label, split_of(number))
            for label, number in enumerate(numbers)
            for name in sorted(files[number])
        ),
        problems=tuple(problems),
        expected=CUB_COUNTS,
        must_be_full=whole,
    )


def _cub_list(path: Path) -> dict[str, set[str]]:
    """Image names by class folder from ``images.txt``, whose lines are ``number folder/name``."""
    listed: dict[str, set[str]] = {}
    for _, fields in _rows(path, 2, skip=0):
        folder, _, name = inside(Path(), fields[1]).as_posix().partition("/")
        listed.setdefault(folder, set()).add(name)
    return listed


# ---- Cars196 ----


def read_cars(config: DmlConfig) -> RetrievalData:
    """Cars196: classes 1 to 98 are trained on, 99 to 196 tested. Fewer classes are read with a warning.

    Raises:
        UserError: no such data, annotations missing or damaged, listed images missing, or all 196 classes with other
            counts than the published ones.
    """
    return retrieval_data(list_cars(Path(config.data_dir or "data")), config, check_files=False)


# ---- Stanford Online Products ----

SOP_FOLDERS = ("Stanford_Online_Products", "Standford_Online_Products")
"""The archive's name, and the README's of the released code."""

SOP_LISTS: dict[Split, str] = {"train": "Ebay_train.txt", "test": "Ebay_test.txt"}
SOP_LAYOUT = "Stanford_Online_Products with Ebay_train.txt, Ebay_test.txt and the folders bicycle_final/ and so on"
SOP_COUNTS: dict[Split, Counts] = {"train": Counts(59_551, 11_318), "test": Counts(60_502, 11_316)}
"""Song et al. 2016."""


def read_sop(config: DmlConfig) -> RetrievalData:
    """Stanford Online Products, with the published lists of training and test images.

    Raises:
        UserError: no such data, a list is missing or damaged, or listed images are missing.
    """
    return retrieval_data(list_sop(Path(config.data_dir or "data")), config, check_files=False)


def list_sop(data_dir: Path) -> Listing:
    """All images of ``Ebay_train.txt`` and ``Ebay_test.txt``: a header, then ``image_id class_id super_class_id path``.

    Raises:
        UserError: neither list is there.
    """
    root = find_root(data_dir, SOP_FOLDERS, SOP_LISTS.values(), expected=f"Stanford Online Products: {SOP_LAYOUT}")
    problems: list[str] = []
    rows: list[tuple[int, Path, Split]] = []
    names: dict[int, str] = {}
    for split, name in SOP_LISTS.items():
        try:
            for number, fields in _rows(root / name, 4, skip=1):
                path = _checked(root / name, number, root, fields[3])
                if not fields[1].isdecimal():
                    raise UserError(f"{root / name}, line {number}: expected a class number, got {fields[1]!r}")
                rows.append((int(fields[1]), path, split))
                names[int(fields[1])] = f"{path.parent.name.removesuffix('_final')} {fields[1]}"
        except UserError as error:
            problems.append(str(error))
    label_of = {number: label for label, number in enumerate(sorted(names))}
    return Listing(
        name="Stanford Online Products",
        root=root,
        variant="Ebay_train.txt and Ebay_test.txt",
        classes=tuple(names[number] for number in sorted(names)),
        records=tuple(Record(path, label_of[number], split) for number, path, split in rows),
        problems=tuple(problems),
        expected=SOP_COUNTS,
    )


# ---- In-Shop ----

INSHOP_FOLDERS = ("Inshop_Clothes", "In-shop", "inshop", "In-shop Clothes Retrieval Benchmark")
INSHOP_LISTS = ("Eval/list_eval_partition.txt", "list_eval_partition.txt")
INSHOP_LAYOUT = "Inshop_Clothes with Eval/list_eval_partition.txt and Img/img/ (img.zip unpacked in Img)"
INSHOP_COUNTS: dict[Split, Counts] = {
    "train": Counts(25_882, 3_997),
    "query": Counts(14_218, 3_985),
    "gallery": Counts(12_612, 3_985),
}
"""Liu et al. 2016 (DeepFashion)."""

_INSHOP_STATUS: dict[str, Split] = {"train": "train", "query": "query", "gallery": "gallery"}


def read_inshop(config: DmlConfig) -> RetrievalData:
    """DeepFashion's In-Shop Clothes Retrieval: query images search the gallery, both of items not trained on.

    Raises:
        UserError: no such data, the list is damaged or shorter than it says, or listed images are missing.
    """
    return retrieval_data(list_inshop(Path(config.data_dir or "data")), config, check_files=False)


def list_inshop(data_dir: Path) -> Listing:
    """All images of ``list_eval_partition.txt``: their number, a header, then ``image_name item_id status``.

    Raises:
        UserError: the list is not there.
    """
    root = find_root(data_dir, INSHOP_FOLDERS, INSHOP_LISTS, expected=f"In-Shop Clothes Retrieval: {INSHOP_LAYOUT}")
    partition = next(root / name for name in INSHOP_LISTS if (root / name).exists())
    base = root if not (root / "Img" / "img").is_dir() and (root / "img").is_dir() else root / "Img"
    problems: list[str] = []
    rows: list[tuple[Path, str, Split]] = []
    try:
        count = _first_line(partition)
        for number, (name, item, status) in _rows(partition, 3, skip=2):
            if status not in _INSHOP_STATUS:
                raise UserError(f"{partition}, line {number}: expected train, query or gallery, got {status!r}")
            rows.append((_checked(partition, number, base, name), item, _INSHOP_STATUS[status]))
        if count != str(len(rows)):
            problems.append(f"{partition} says in its first line that it lists {count!r} images, but lists {len(rows)}")
    except UserError as error:
        problems.append(str(error))
    classes = sorted({item for _, item, _ in rows})
    label_of = {item: label for label, item in enumerate(classes)}
    return Listing(
        name="In-Shop Clothes Retrieval",
        root=root,
        variant=f"{partition.relative_to(root)}, images below {base}",
        classes=tuple(classes),
        records=tuple(Record(path, label_of[item], split) for path, item, split in rows),
        problems=tuple(problems),
        expected=INSHOP_COUNTS,
    )


# ---- text lists ----


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; it comes with the data set") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; unpack it again") from None


def _first_line(path: Path) -> str:
    return next(iter(_lines(path)), "").strip()


def _rows(path: Path, columns: int, *, skip: int) -> list[tuple[int, list[str]]]:
    """(line number, fields) of a file of ``columns`` columns between blanks, without its first ``skip`` lines.

    Raises:
        UserError: it cannot be read, has no rows, or a row has another number of columns.
    """
    rows = [(number, line.split()) for number, line in enumerate(_lines(path), 1) if number > skip and line.strip()]
    if not rows:
        raise UserError(f"{path} lists no images; unpack it again")
    for number, fields in rows:
        if len(fields) != columns:
            raise UserError(f"{path}, line {number}: expected {columns} columns, got {len(fields)}; unpack it again")
    return rows


def _checked(file: Path, number: int, root: Path, name: str) -> Path:
    """The path that a line of a file gives, if it lies below ``root``."""
    try:
        return inside(root, name)
    except UserError as error:
        raise UserError(f"{file}, line {number}: {error}") from None
