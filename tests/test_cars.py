"""Cars196 in both of its forms, with real struct arrays in the .mat files, whole and damaged."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from idml.data.retrieval_readers import read_cars
from idml.errors import UserError
from tests.test_retrieval_readers import config, counts, named, read_small, write_photo

BOX = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
ONE_FILE_FIELDS = ("relative_im_path", *BOX, "class", "test")
KIT_FIELDS = (*BOX, "class", "fname")


def annotations(rows: Sequence[tuple], fields: Sequence[str]) -> np.ndarray:
    """A 1 x N struct array as MATLAB stores it: every value is a matrix of its own."""
    array = np.empty((1, len(rows)), dtype=[(field, "O") for field in fields])
    for column, row in enumerate(rows):
        array[0, column] = tuple(
            np.array([value]) if isinstance(value, str) else np.array([[value]], np.uint8) for value in row
        )
    return array


def class_names(count: int) -> np.ndarray:
    names = np.empty((1, count), object)
    for number in range(1, count + 1):
        names[0, number - 1] = np.array([f"Make Model {number}"])
    return names


CAR_CLASSES = (196, 98, 99, 1, 98, 196)


def write_one_file(root: Path, fields: Sequence[str] = ONE_FILE_FIELDS, classes: Sequence[int] = CAR_CLASSES) -> None:
    rows = []
    for number, label in enumerate(classes, 1):
        write_photo(root / f"car_ims/{number:06d}.jpg", label)
        rows.append((f"car_ims/{number:06d}.jpg", 1, 2, 30, 40, label, number % 2))
    contents = {"annotations": annotations(rows, fields), "class_names": class_names(196)}
    savemat(root / "cars_annos.mat", contents)


def write_kit(root: Path, fields: Sequence[str] = KIT_FIELDS, labels_beside: bool = False) -> None:
    (root / "devkit").mkdir(parents=True)
    for part, name, classes in (
        ("cars_train", "cars_train_annos.mat", CAR_CLASSES[:4]),
        ("cars_test", "cars_test_annos_withlabels.mat", CAR_CLASSES[4:]),
    ):
        rows = []
        for number, label in enumerate(classes, 1):
            write_photo(root / part / f"{number:05d}.jpg", label)
            rows.append((1, 2, 30, 40, label, f"{number:05d}.jpg"))
        beside = labels_beside and part == "cars_test"
        savemat((root if beside else root / "devkit") / name, {"annotations": annotations(rows, fields)})
    savemat(root / "devkit/cars_meta.mat", {"class_names": class_names(196)})


@pytest.mark.parametrize("below", ["cars196", "cars", "stanford_cars", ""])
def test_cars_splits_by_class_number(tmp_path: Path, below: str) -> None:
    (tmp_path / below).mkdir(exist_ok=True)
    write_one_file(tmp_path / below)
    data = read_small(read_cars, tmp_path)
    assert data.train.classes == ("Make Model 1", "Make Model 98")
    assert data.test.classes == ("Make Model 99", "Make Model 196")
    assert named(data.train) == {
        "000002.jpg": "Make Model 98",
        "000004.jpg": "Make Model 1",
        "000005.jpg": "Make Model 98",
    }
    assert named(data.test) == {
        "000001.jpg": "Make Model 196",
        "000003.jpg": "Make Model 99",
        "000006.jpg": "Make Model 196",
    }


@pytest.mark.parametrize("beside", [False, True])
def test_the_development_kit_is_merged_and_then_split_by_class(tmp_path: Path, beside: bool) -> None:
    write_kit(tmp_path / "stanford_cars", labels_beside=beside)
    data = read_small(read_cars, tmp_path)
    found = {
        (f"{path.parent.name}/{path.name}", part.classes[label])
        for part in (data.train, data.test)
        for path, label in zip(part.paths, part.labels, strict=True)
    }
    parts = [f"cars_train/{number:05d}.jpg" for number in (1, 2, 3, 4)] + ["cars_test/00001.jpg", "cars_test/00002.jpg"]
    assert found == {(file, f"Make Model {label}") for file, label in zip(parts, CAR_CLASSES, strict=True)}
    assert data.train.classes == ("Make Model 1", "Make Model 98")
    assert {path.parent.name for path in data.train.paths} == {"cars_train", "cars_test"}


def test_cars_fields_of_other_names_are_taken_by_place(tmp_path: Path) -> None:
    write_one_file(tmp_path, fields=tuple("abcdefg"))
    write_kit(tmp_path / "kit", fields=tuple("abcdef"))
    by_place = [counts(read_small(read_cars, folder)) for folder in (tmp_path, tmp_path / "kit")]
    assert by_place == [[(3, 2), (3, 2)], [(3, 2), (3, 2)]]


def test_the_full_cars_must_have_the_published_counts(tmp_path: Path) -> None:
    write_photo(tmp_path / "car_ims/000001.jpg", 0)
    classes = [1 + image % 98 for image in range(8054)] + [99 + image % 98 for image in range(8131)]

    def write(chosen: Sequence[int]) -> None:
        rows = [("car_ims/000001.jpg", label) for label in chosen]
        savemat(tmp_path / "cars_annos.mat", {"annotations": annotations(rows, ("relative_im_path", "class"))})

    write(classes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = read_cars(config(tmp_path))
    assert counts(data) == [(8054, 98), (8131, 98)]
    assert data.train.classes[0] == "class 1", "without class_names"
    write(range(1, 197))
    with pytest.raises(
        UserError, match="train: found 98 images of 98 classes, expected 8054 images of 98 classes; test: found 98"
    ):
        read_cars(config(tmp_path))


def damaged_cars(root: Path, how: str) -> None:
    file = root / "cars_annos.mat"
    if how == "text":
        file.write_text("<html>not found</html>\n" * 20)
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:600])
    elif how == "noise":
        data = bytearray(file.read_bytes())
        data[150:400] = random.Random(0).randbytes(250)
        file.write_bytes(bytes(data))
    elif how == "other variable":
        savemat(file, {"synsets": np.arange(3)})
    elif how == "few fields":
        savemat(file, {"annotations": annotations([("car_ims/000001.jpg", 1)], ("file", "box"))})
    elif how == "no class":
        savemat(file, {"annotations": annotations([("car_ims/000001.jpg", 197)], ("relative_im_path", "class"))})
    elif how == "escape":
        savemat(file, {"annotations": annotations([("../car.jpg", 1)], ("relative_im_path", "class"))})
    elif how == "missing image":
        (root / "car_ims/000003.jpg").unlink()


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("text", r"cars_annos\.mat is not a whole MATLAB file"),
        ("empty", r"cars_annos\.mat is not a whole MATLAB file"),
        ("truncated", r"cars_annos\.mat is not a whole MATLAB file"),
        ("noise", r"cars_annos\.mat is not a whole MATLAB file"),
        ("other variable", r"cars_annos\.mat has no variable 'annotations'"),
        ("few fields", "expected annotations with fields relative_im_path and class, got file, box"),
        ("no class", "annotation 1: expected a path and a class from 1 to 196, got .*000001.jpg.* 197"),
        ("escape", r"annotation 1: expected a path below .* without '\.\.', got '\.\./car\.jpg'"),
        ("missing image", r"1 of 6 images are missing: .*car_ims/000003\.jpg"),
    ],
)
def test_damaged_cars_are_told(tmp_path: Path, how: str, expected: str) -> None:
    write_one_file(tmp_path)
    damaged_cars(tmp_path, how)
    with pytest.raises(UserError, match=expected):
        read_cars(config(tmp_path))


def test_test_annotations_without_labels_are_not_enough(tmp_path: Path) -> None:
    write_kit(tmp_path)
    labelled = tmp_path / "devkit/cars_test_annos_withlabels.mat"
    labelled.rename(tmp_path / "devkit/cars_test_annos.mat")
    with pytest.raises(UserError, match=r"no cars_test_annos_withlabels\.mat.*cars_test_annos\.mat has no classes"):
        read_cars(config(tmp_path))
    (tmp_path / "devkit/cars_train_annos.mat").unlink()
    with pytest.raises(UserError, match=r"no cars_train_annos\.mat.*; no cars_test_annos_withlabels\.mat"):
        read_cars(config(tmp_path))


def test_no_cars_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"no Cars196: .*looked in {tmp_path}/cars196, .*--data-dir"):
        read_cars(config(tmp_path))
