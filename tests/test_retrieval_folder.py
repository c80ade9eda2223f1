"""A user's own images as folders and as tables, right and wrong."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from idml.data.retrieval_folder import read_csv, read_folder
from idml.errors import UserError
from tests.test_retrieval_readers import config, counts, named, write_photo

# ---- folder ----


def write_folders(root: Path, classes: Sequence[str], images: int = 2) -> None:
    for number, name in enumerate(classes):
        for image in range(images):
            write_photo(root / name / f"{root.name}_{name}_{image}.png", number)


@pytest.mark.parametrize(("test_fraction", "tested"), [(0.5, "def"), (0.4, "ef"), (0.01, "ef"), (0.99, "cdef")])
def test_the_last_classes_of_a_folder_are_tested(tmp_path: Path, test_fraction: float, tested: str) -> None:
    write_folders(tmp_path, "fbdeca")
    (tmp_path / ".cache").mkdir()
    data = read_folder(config(tmp_path, test_fraction=test_fraction, image_size=96))
    assert data.test.classes == tuple(tested)
    assert data.train.classes == tuple(sorted(set("abcdef") - set(tested)))
    for part in (data.train, data.test):
        assert all(file.split("_")[-2] == name for file, name in named(part).items())
    assert len(data.train) + len(data.test) == 12
    assert data.preprocessing.image_size == 96


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_with_its_own_split(tmp_path: Path, test: str) -> None:
    write_folders(tmp_path / "train", ["x", "b"])
    write_folders(tmp_path / test, ["c", "a"])
    data = read_folder(config(tmp_path))
    assert (data.train.classes, data.test.classes) == (("b", "x"), ("a", "c"))
    assert counts(data) == [(4, 2), (4, 2)]
    assert all(path.parent.parent.name == test for path in data.test.paths)


def test_a_folder_with_query_and_gallery(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", ["x", "b"])
    write_folders(tmp_path / "query", ["c", "a"], 1)
    write_folders(tmp_path / "gallery", ["c", "a", "d"], 3)
    data = read_folder(config(tmp_path))
    assert data.test.classes == data.gallery.classes == ("a", "c", "d")
    assert Counter(data.test.labels.tolist()) == {0: 1, 1: 1}
    assert Counter(data.gallery.labels.tolist()) == {0: 3, 1: 3, 2: 3}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_folders(tmp_path, ["bus", "car", "plane", "train"])
    assert read_folder(config(tmp_path)).test.classes == ("plane", "train")


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ({"": "abc"}, r"at least 4 classes, 2 to train on and 2 others to test, got 3 .*DIR/train/<class>"),
        (
            {"train": "abc", "test": "bcd"},
            r"2 classes are in both .*\('b', 'c'\).*one folder without train/, test/.*--test-",
        ),
        ({"train": "ab", "query": "cd"}, "expected query/ and gallery/ together, got only one"),
        ({"train": "ab", "query": "cd", "gallery": "cd", "test": "cd"}, "expected either test/ or query/ and gallery/"),
        ({"train": "ab", "query": "cd", "gallery": "ad"}, r"1 classes are in both training and test \('a'\)"),
    ],
)
def test_folders_that_do_not_fit_are_told(tmp_path: Path, folders: dict[str, str], expected: str) -> None:
    for folder, classes in folders.items():
        write_folders(tmp_path / folder, classes, 1)
    with pytest.raises(UserError, match=expected):
        read_folder(config(tmp_path))


def test_a_split_that_is_not_used_is_told(tmp_path: Path) -> None:
    for folder, classes in (("train", "ab"), ("test", "cd"), ("val", "ef")):
        write_folders(tmp_path / folder, classes, 1)
    with pytest.warns(UserWarning, match="val is not used"):
        assert read_folder(config(tmp_path)).test.classes == ("c", "d")


def test_own_images_are_decoded_before_training(tmp_path: Path) -> None:
    write_folders(tmp_path, "abcd")
    bad = sorted((tmp_path / "a").iterdir())[0]
    bad.write_bytes(b"")
    with pytest.raises(UserError, match=rf"1 of 4 image files cannot be decoded: {bad}.*--skip-bad-images"):
        read_folder(config(tmp_path))
    with pytest.warns(UserWarning, match="left out"):
        assert len(read_folder(config(tmp_path, skip_bad_images=True)).train) == 3


def test_a_folder_must_be_given_and_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs --data-dir"):
        read_folder(config(None))
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        read_folder(config(tmp_path / "nowhere"))


# ---- csv ----


def write_csv(root: Path, rows: Sequence[Sequence[str]], **options: Any) -> Path:
    """``table.csv`` of the rows, and a photo for every path in the column named so."""
    column = list(rows[0]).index("path")
    for number, row in enumerate(rows[1:]):
        write_photo(root / row[column], number)
    file = root / "table.csv"
    with file.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as stream:
        csv.writer(stream, **options).writerows(rows)
    return file


def test_a_table_without_split_is_split_by_class(tmp_path: Path) -> None:
    labels = ("10", "9", "100", "2", "2", "10")
    rows = [[f"a, b/{number}.jpg", "x", label] for number, label in enumerate(labels)]
    file = write_csv(tmp_path, [["path", "note", "label"], *rows], encoding="utf-8-sig", lineterminator="\r\n")
    data = read_csv(config(None, csv=str(file)))
    assert (data.train.classes, data.test.classes) == (("2", "9"), ("10", "100")), "numbers are sorted as such"
    assert named(data.train) == {"1.jpg": "9", "3.jpg": "2", "4.jpg": "2"}
    assert named(data.test) == {"0.jpg": "10", "2.jpg": "100", "5.jpg": "10"}


def test_a_table_with_split(tmp_path: Path) -> None:
    splits = {"train": "ab", "query": "cd", "gallery": "cde"}
    rows = [[label, split, f"{split}_{label}.jpg"] for split, labels in splits.items() for label in labels]
    file = write_csv(tmp_path / "images", [["label", "split", "path"], *rows])
    file = file.rename(tmp_path / "elsewhere.csv")
    data = read_csv(config(tmp_path / "images", csv=str(file)))
    assert data.train.classes == ("a", "b")
    assert data.test.classes == data.gallery.classes == ("c", "d", "e")
    assert [len(part) for part in (data.train, data.test, data.gallery)] == [2, 2, 3]
    file.write_text(file.read_text().replace("gallery,", "test,").replace("query,", "test,"))
    data = read_csv(config(tmp_path / "images", csv=str(file)))
    assert data.gallery is None
    assert [len(part) for part in (data.train, data.test)] == [2, 5]


GOOD = "path,label,split\na.jpg,x,train\nb.jpg,y,train\nc.jpg,z,test\nd.jpg,w,test\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty; expected columns path,label"),
        ("path,label\n\n , \n", "lists no images"),
        ("path;label\na.jpg;x\n", "the column 'path' is not among 'path;label' in the first line"),
        ("file,label\na.jpg,x\n", "the column 'path' is not among 'file', 'label'"),
        ("path,path,label\na.jpg,a.jpg,x\n", "the column 'path' is twice in"),
        (GOOD.replace("y,train", "y,trian"), "line 3: expected split train, test, .* got 'trian'; did you mean train"),
        (GOOD.replace("y,train", "y"), "line 3: expected split .* got ''"),
        (GOOD.replace("y,train", ",train"), "line 3: expected a label, got none"),
        (GOOD.replace("b.jpg", "b,c.jpg"), "line 3: expected 3 columns, got 4; put quotes around"),
        (GOOD.replace("c.jpg", "./a.jpg"), "line 4: .*a.jpg is in line 2 already"),
        (GOOD.replace("c.jpg", "../c.jpg"), r"line 4: expected a path below .* without '\.\.', got '\.\./c.jpg'"),
        (GOOD.replace("c.jpg", "/c.jpg").replace("y", ""), "line 3: expected a label.*; line 4: .*2 bad rows"),
        (GOOD.replace("z", "x"), r"1 classes are in both training and test \('x'\).*leave the column split out"),
        (GOOD.replace("test", "query"), "or of train, query and gallery, got train, query"),
        (GOOD.replace("test", "train"), "expected images of train and test, .*got train"),
        (GOOD.replace("c.jpg", "e.jpg").replace("d.jpg", "f.jpg"), "2 of 4 images are missing: .*e.jpg, .*f.jpg"),
        ("path,label\na.jpg,x\nb.jpg,y\nc.jpg,y\n", "at least 4 classes, .* got 2 in .*table.csv"),
        ('path,label\n"a.jpg,x\n', "is not a CSV file in UTF-8"),
        ("path,label\na.jpg,\udcff\n", "is not a CSV file in UTF-8"),
    ],
)
def test_a_bad_table_is_told(tmp_path: Path, text: str, expected: str) -> None:
    for name in "abcd":
        write_photo(tmp_path / f"{name}.jpg", 0)
    (tmp_path / "table.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=expected):
        read_csv(config(None, csv=str(tmp_path / "table.csv")))


def test_a_good_table_passes_what_the_bad_ones_do_not(tmp_path: Path) -> None:
    for name in "abcd":
        write_photo(tmp_path / f"{name}.jpg", 0)
    (tmp_path / "table.csv").write_text(GOOD)
    assert counts(read_csv(config(None, csv=str(tmp_path / "table.csv")))) == [(2, 2), (2, 2)]
    (tmp_path / "c.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1 of 2 image files cannot be decoded: .*c\.jpg"):
        read_csv(config(None, csv=str(tmp_path / "table.csv")))


def test_a_table_must_be_given_and_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs --csv FILE"):
        read_csv(config(tmp_path))
    with pytest.raises(UserError, match=r"cannot read .*table\.csv: No such file"):
        read_csv(config(None, csv=str(tmp_path / "table.csv")))
