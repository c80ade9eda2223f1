"""CUB, SOP and In-Shop in their exact layouts, of real photos, whole and damaged; and paths that lists give."""

from __future__ import annotations

import os
import random
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from idml.data.image_dataset import ImageDataset, read_rgb
from idml.data.listing import inside, missing_files
from idml.data.retrieval_data import RetrievalData
from idml.data.retrieval_readers import read_cub, read_inshop, read_sop
from idml.errors import UserError
from tests.test_published_datasets import photos


def config(data_dir: Path | str | None, **values: Any) -> Any:
    defaults = {"image_size": None, "skip_bad_images": False, "workers": 1, "csv": None, "test_fraction": 0.5}
    return SimpleNamespace(data_dir=None if data_dir is None else str(data_dir), **(defaults | values))


def write_photo(path: Path, number: int) -> None:
    """A crop of the photo ``number`` of 20, another one for each name, 60 pixels wide."""
    place = random.Random(path.name).randrange(40)
    photo = Image.open(photos("imagenet")[number % 20][0]).convert("RGB").crop((place, place, 180 + place, 150 + place))
    path.parent.mkdir(parents=True, exist_ok=True)
    photo.resize((60, 50)).save(path, quality=90) if path.suffix == ".jpg" else photo.resize((60, 50)).save(path)


def named(dataset: ImageDataset) -> dict[str, str]:
    """File name -> class name, with the labels checked: all used, from 0."""
    assert sorted(set(dataset.labels.tolist())) == list(range(len(dataset.classes)))
    assert dataset.labels.dtype == np.int64
    assert len({path.name for path in dataset.paths}) == len(dataset.paths)
    return {path.name: dataset.classes[label] for path, label in zip(dataset.paths, dataset.labels, strict=True)}


def counts(data: RetrievalData) -> list[tuple[int, int]]:
    parts = [data.train, data.test, *([data.gallery] if data.gallery is not None else [])]
    return [(len(part), len(np.unique(part.labels))) for part in parts]


def read_small(read: Callable[[Any], RetrievalData], data_dir: Path, **values: Any) -> RetrievalData:
    """Read a cut-down published set, which must say that it is one."""
    with pytest.warns(UserWarning, match="is not the full"):
        return read(config(data_dir, **values))


# ---- CUB ----


def write_cub(root: Path, numbers: Sequence[int] = (2, 99, 100, 101, 102, 200)) -> None:
    for number in numbers:
        for image in range(3):
            name = f"Bird_{number}_{image:04d}.jpg"
            write_photo(root / "images" / f"{number:03d}.Bird_{number}" / name, number)
        # The archive holds the forks that macOS makes.
        (root / "images" / f"{number:03d}.Bird_{number}" / f"._Bird_{number}.jpg").write_bytes(b"\0\5\x16\7")
    (root / "images" / "._001.Bird_1").mkdir()
    (root / "train_test_split.txt").write_text("1 0\n2 1\n")


@pytest.mark.parametrize("below", ["CUB_200_2011", "", "birds"])
def test_cub_splits_by_class_number(tmp_path: Path, below: str) -> None:
    write_cub(tmp_path / below)
    data = read_small(read_cub, tmp_path / below if below == "birds" else tmp_path)
    assert data.train.classes == ("Bird_2", "Bird_99", "Bird_100")
    assert data.test.classes == ("Bird_101", "Bird_102", "Bird_200")
    assert data.gallery is None
    assert data.preprocessing.image_size == 224
    for part in (data.train, data.test):
        assert len(part) == 9
        assert all(file.rsplit("_", 1)[0] == name for file, name in named(part).items())


@pytest.mark.parametrize(
    ("numbers", "train"),
    [((1, 2, 3, 4), ("Bird_1", "Bird_2")), ((150, 160, 170), ("Bird_150", "Bird_160"))],
)
def test_cub_classes_of_one_half_are_halved(tmp_path: Path, numbers: tuple[int, ...], train: tuple[str, ...]) -> None:
    write_cub(tmp_path, numbers)
    data = read_small(read_cub, tmp_path)
    assert data.train.classes == train
    assert data.test.classes == tuple(f"Bird_{number}" for number in numbers[2:])


def write_full_cub(root: Path) -> None:
    """All 200 classes with the published number of images: links to one photo."""
    write_photo(root / "photo.jpg", 0)
    lines = []
    for first, images in ((1, 5864), (101, 5924)):
        for image in range(images):
            name = f"{first + image % 100:03d}.Bird/Bird_{first}_{image:05d}.jpg"
            (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(root / "photo.jpg", root / "images" / name)
            lines.append(f"{len(lines) + 1} {name}\n")
    (root / "images.txt").write_text("".join(lines))


def test_the_full_cub_must_have_the_published_counts(tmp_path: Path) -> None:
    write_full_cub(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert counts(read_cub(config(tmp_path))) == [(5864, 100), (5924, 100)]
    (tmp_path / "images/101.Bird/Bird_101_00000.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 11788 images are missing: .*101\.Bird/Bird_101_00000\.jpg.*verify-data"):
        read_cub(config(tmp_path))
    (tmp_path / "images.txt").unlink()
    with pytest.raises(
        UserError, match="test: found 5923 images of 100 classes, expected 5924 images of 100 classes"
    ) as caught:
        read_cub(config(tmp_path))
    assert "train:" not in str(caught.value), "the other half is right"
    (tmp_path / "images.txt").write_text("1 001.Bird/Bird_1_00000.jpg\n")
    with pytest.raises(UserError, match=r"images\.txt lacks 58 images of .*001\.Bird: Bird_1_00100\.jpg"):
        read_cub(config(tmp_path))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda root: (root / "images/Sparrow").mkdir(), "Sparrow: expected .*001.Black_footed.* without a number"),
        (lambda root: (root / "images/002.Sparrow").mkdir(), "002.Sparrow: .*a second one of this number"),
        (lambda root: (root / "images/003.Sparrow").mkdir(), "no images in the class folder .*003.Sparrow"),
        (lambda root: (root / "images").rename(root / "pictures"), "no CUB-200-2011.*looked in.*--data-dir"),
    ],
)
def test_a_damaged_cub_is_told(tmp_path: Path, damage: Callable[[Path], None], expected: str) -> None:
    write_cub(tmp_path, (2, 150))
    damage(tmp_path)
    with pytest.raises(UserError, match=expected):
        read_cub(config(tmp_path))


def test_cub_of_one_class_is_told(tmp_path: Path) -> None:
    write_cub(tmp_path, (2,))
    with pytest.raises(UserError, match=r"at least 2 class folders .* got 1"):
        read_cub(config(tmp_path))


@pytest.mark.filterwarnings("ignore:.*is not the full CUB")
def test_published_images_are_only_decoded_to_skip_bad_ones(tmp_path: Path) -> None:
    write_cub(tmp_path)
    bad = tmp_path / "images/101.Bird_101/Bird_101_0001.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    assert bad in read_small(read_cub, tmp_path).test.paths
    with pytest.warns(UserWarning, match=r"left out: 1 of 9 image files .*Bird_101_0001"):
        data = read_cub(config(tmp_path, skip_bad_images=True))
    assert len(data.train) == 9
    assert len(data.test) == 8
    assert bad not in data.test.paths


def test_every_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    write_cub(tmp_path, (1, 2))
    original = Image.open(photos("imagenet")[3][0]).convert("RGB")
    folder = tmp_path / "images/001.Bird_1"
    for mode, suffix in (("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "png"), ("LA", "png"), ("1", "png")):
        original.convert(mode).save(folder / f"{mode}.{suffix}")
    data = read_small(read_cub, tmp_path)
    decoded = {path.stem: read_rgb(path) for path in data.train.paths if not path.stem.startswith("Bird")}
    assert len(decoded) == 6
    for mode, image in decoded.items():
        assert image.mode == "RGB"
        target = original.convert("L").convert("RGB") if mode in ("L", "LA", "1") else original
        difference = np.abs(np.asarray(image, float) - np.asarray(target, float)).mean()
        assert difference < {"P": 25, "1": 130}.get(mode, 8), mode


# ---- Stanford Online Products ----

SOP_TRAIN = ((1, 1, "bicycle"), (1, 1, "bicycle"), (2, 1, "bicycle"), (10, 2, "chair"))
SOP_TEST = ((11319, 1, "bicycle"), (11319, 1, "bicycle"), (11320, 2, "chair"), (11321, 2, "chair"))


def write_sop(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    number = 0
    for file, rows in (("Ebay_train.txt", SOP_TRAIN), ("Ebay_test.txt", SOP_TEST)):
        lines = ["image_id class_id super_class_id path\n"]
        for label, super_label, folder in rows:
            number += 1
            path = f"{folder}_final/{label}_{number}.JPG"
            write_photo(root / path, label)
            lines.append(f"{number} {label} {super_label} {path}\n")
        (root / file).write_text("".join(lines))


@pytest.mark.parametrize("below", ["Stanford_Online_Products", "Standford_Online_Products", ""])
def test_sop_takes_the_published_lists(tmp_path: Path, below: str) -> None:
    write_sop(tmp_path / below)
    data = read_small(read_sop, tmp_path)
    assert data.train.classes == ("bicycle 1", "bicycle 2", "chair 10"), "in the order of their numbers"
    assert data.test.classes == ("bicycle 11319", "chair 11320", "chair 11321")
    for part in (data.train, data.test):
        assert all(file.split("_")[0] == name.split()[1] for file, name in named(part).items())
    assert [path.name for path in data.train.paths] == ["1_1.JPG", "1_2.JPG", "2_3.JPG", "10_4.JPG"]


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda root: (root / "Ebay_test.txt").unlink(), r"cannot read .*Ebay_test\.txt: No such file"),
        (lambda root: (root / "Ebay_test.txt").write_text("image_id class_id\n"), r"Ebay_test\.txt lists no images"),
        (lambda root: (root / "Ebay_test.txt").write_bytes(b"\xff\xfe\0"), r"Ebay_test\.txt is not a text file"),
        (
            lambda root: replace_in(root / "Ebay_train.txt", " 2 chair_final/10_4.JPG", ""),
            r"Ebay_train\.txt, line 5: expected 4 columns, got 2",
        ),
        (
            lambda root: replace_in(root / "Ebay_train.txt", "3 2 1", "3 two 1"),
            "line 4: expected a class number.*'two'",
        ),
        (
            lambda root: replace_in(root / "Ebay_test.txt", " bicycle_final/", " /etc/"),
            r"line 2: .*below .*'/etc/11319",
        ),
        (lambda root: replace_in(root / "Ebay_test.txt", "chair_final/", "a/../../"), r"line 4: .*without '\.\.', got"),
        (
            lambda root: replace_in(root / "Ebay_test.txt", "11320", "10"),
            r"1 classes are in both training and test \('chair 10'\): .*not trained on",
        ),
        (
            lambda root: (root / "chair_final").rename(root / "away"),
            r"3 of 8 images are missing: .*chair_final/10_4\.JPG, .*11320_7\.JPG, .*11321_8\.JPG",
        ),
    ],
)
def test_a_damaged_sop_is_told(tmp_path: Path, damage: Callable[[Path], None], expected: str) -> None:
    write_sop(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=expected):
        read_sop(config(tmp_path))


def test_the_full_sop_by_its_counts(tmp_path: Path) -> None:
    write_photo(tmp_path / "bicycle_final/1.jpg", 0)
    first = 1
    for file, images, classes in (("Ebay_train.txt", 59_551, 11_318), ("Ebay_test.txt", 60_502, 11_316)):
        rows = [f"{row} {first + row % classes} 1 bicycle_final/1.jpg\n" for row in range(images)]
        (tmp_path / file).write_text("image_id class_id super_class_id path\n" + "".join(rows))
        first += classes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = read_sop(config(tmp_path))
    assert counts(data) == [(59_551, 11_318), (60_502, 11_316)]
    with (tmp_path / "Ebay_train.txt").open("a") as file:
        file.write("60000 1 1 bicycle_final/1.jpg\n")
    with pytest.warns(
        UserWarning, match="train 59552 images of 11318 classes.*in place of train 59551 images of 11318"
    ):
        read_sop(config(tmp_path))


def test_links_are_followed_and_broken_ones_are_missing(tmp_path: Path) -> None:
    write_sop(tmp_path / "disk")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/Stanford_Online_Products").symlink_to(tmp_path / "disk")
    image = tmp_path / "disk/chair_final/10_4.JPG"
    image.rename(tmp_path / "elsewhere.jpg")
    image.symlink_to(tmp_path / "elsewhere.jpg")
    assert len(read_small(read_sop, tmp_path / "data").train) == 4
    (tmp_path / "elsewhere.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 8 images are missing: .*10_4\.JPG"):
        read_sop(config(tmp_path / "data"))


# ---- In-Shop ----

INSHOP = (
    ("id_00000001", "train"),
    ("id_00000001", "train"),
    ("id_00000004", "train"),
    ("id_00000002", "query"),
    ("id_00000002", "gallery"),
    ("id_00000003", "query"),
    ("id_00000005", "gallery"),
    ("id_00000003", "gallery"),
)


def write_inshop(root: Path, partition: str = "Eval/list_eval_partition.txt", images: str = "Img") -> None:
    lines = [f"{len(INSHOP)}\n", "image_name item_id evaluation_status\n"]
    for number, (item, status) in enumerate(INSHOP):
        name = f"img/WOMEN/Dresses/{item}/{number:02d}_1_front.jpg"
        write_photo(root / images / name, int(item[-1]))
        lines.append(f"{name:<70} {item} {status}\n")
    (root / partition).parent.mkdir(parents=True, exist_ok=True)
    (root / partition).write_text("".join(lines))


@pytest.mark.parametrize(
    ("below", "partition", "images"),
    [
        ("Inshop_Clothes", "Eval/list_eval_partition.txt", "Img"),
        ("In-shop", "list_eval_partition.txt", ""),
        ("inshop", "Eval/list_eval_partition.txt", ""),
        ("In-shop Clothes Retrieval Benchmark", "list_eval_partition.txt", "Img"),
        ("", "Eval/list_eval_partition.txt", "Img"),
    ],
)
def test_inshop_queries_search_the_gallery(tmp_path: Path, below: str, partition: str, images: str) -> None:
    write_inshop(tmp_path / below, partition, images)
    data = read_small(read_inshop, tmp_path)
    assert data.train.classes == ("id_00000001", "id_00000004")
    assert data.test.classes == data.gallery.classes == ("id_00000002", "id_00000003", "id_00000005")
    assert [path.name[:2] for path in data.test.paths] == ["03", "05"]
    assert data.test.labels.tolist() == [0, 1]
    assert data.gallery.labels.tolist() == [0, 2, 1]
    assert data.train.labels.tolist() == [0, 0, 1]
    for part in (data.train, data.test, data.gallery):
        assert all(path.parent.name == part.classes[label] for path, label in zip(part.paths, part.labels, strict=True))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("8\nimage", "52712\nimage", "says in its first line that it lists '52712' images, but lists 8"),
        ("8\nimage", "8\nid_1 query\nimage", "line 3: expected train, query or gallery, got 'evaluation_status'"),
        ("query\n", "test\n", "line 6: expected train, query or gallery, got 'test'"),
        ("id_00000002 query", "id_00000004 query", "1 classes are in both training and test .'id_00000004'"),
        ("04_1_front", "14_1_front", r"1 of 8 images are missing: .*Img/img/WOMEN/Dresses/id_00000002/14_1_front\.jpg"),
        ("img/WOMEN/Dresses/id_00000005", "../WOMEN", r"line 9: expected a path below .*'\.\./WOMEN/06_1_front\.jpg'"),
        (" gallery", " query", "expected images of train and test, or of train, query and gallery, got train, query"),
    ],
)
def test_a_damaged_inshop_is_told(tmp_path: Path, old: str, new: str, expected: str) -> None:
    write_inshop(tmp_path)
    replace_in(tmp_path / "Eval/list_eval_partition.txt", old, new)
    with pytest.raises(UserError, match=expected):
        read_inshop(config(tmp_path))


def test_the_full_inshop_by_its_counts(tmp_path: Path) -> None:
    write_photo(tmp_path / "Img/img/1.jpg", 0)
    lines = ["52712", "image_name item_id evaluation_status"]
    for status, images, first, classes in (
        ("train", 25_882, 0, 3_997),
        ("query", 14_218, 3_997, 3_985),
        ("gallery", 12_612, 3_997, 3_985),
    ):
        lines += [f"img/1.jpg id_{first + row % classes:08d} {status}" for row in range(images)]
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(lines))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = read_inshop(config(tmp_path))
    assert counts(data) == [(25_882, 3_997), (14_218, 3_985), (12_612, 3_985)]


# ---- paths ----


@given(st.text(alphabet="./\\aC: \0", max_size=12))
def test_no_path_leads_out_of_the_folder(name: str) -> None:
    root = Path("/data/set")
    parts = re.split(r"[/\\]", name)
    harmless = name != "" and parts[0] != "" and ".." not in parts and "\0" not in name
    try:
        path = inside(root, name)
    except UserError:
        assert not harmless or name[1:2] == ":", "refused without need"
    else:
        assert harmless
        assert os.path.commonpath([root, os.path.normpath(path)]) == str(root)


def test_missing_files_are_found_in_order_and_folders_are_no_files(tmp_path: Path) -> None:
    write_photo(tmp_path / "a/1.jpg", 0)
    (tmp_path / "a/2.jpg").mkdir()
    paths = [tmp_path / name for name in ("b/1.jpg", "a/1.jpg", "a/2.jpg", "a/0.jpg")]
    assert missing_files(paths) == [paths[0], paths[2], paths[3]]
