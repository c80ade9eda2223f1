"""Images as people have them: turned by phones, beside system folders, behind links, in splits of any spelling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import train_cls
import train_dml
from idml.config_cls import ClsConfig
from idml.config_dml import DmlConfig
from idml.data.collection import read_collection
from idml.data.datasets import read_splits
from idml.data.image_files import list_class_folders
from idml.data.names import is_hidden, mentions_split, split_role
from idml.data.pixels import image_suffixes
from idml.data.retrieval_folder import list_folder
from idml.data.verify import verify_data
from idml.errors import UserError

SMALL = ["--model", "resnet8_cifar", "--image-size", "32", "--max-steps", "2", "--batch-size", "4", "--threads", "1"]
SMALL += ["--workers", "0", "--loader", "torch"]


def put(root: Path, *names: str, shade: int = 128) -> Path:
    """Small pictures at these paths."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((12, 10), 20 + number % 7).point(lambda grey: (grey + shade) // 2).save(root / name)
    return root


def put_classes(root: Path, classes: Sequence[str], count: int = 6) -> Path:
    """``count`` pictures a class."""
    for number, name in enumerate(classes):
        put(root, *(f"{name}/{index}.png" for index in range(count)), shade=40 * number)
    return root


def cls(root: Path, **values: Any) -> ClsConfig:
    defaults: dict[str, Any] = {"dataset": "folder", "data_dir": str(root), "image_size": 32, "batch_size": 2}
    defaults["val_fraction"] = 0.0
    return ClsConfig(**defaults | values)


def dml(root: Path, **values: Any) -> DmlConfig:
    defaults: dict[str, Any] = {
        "dataset": "folder",
        "data_dir": str(root),
        "image_size": 32,
        "batch_size": 4,
        "ks": [1],
    }
    defaults["val_fraction"] = 0.0
    return DmlConfig(**defaults | values)


def names_of(dataset: Any, root: Path) -> dict[str, str]:
    """Path below the root: class."""
    return {
        path.relative_to(root).as_posix(): dataset.classes[label]
        for path, label in zip(dataset.paths, dataset.labels, strict=True)
    }


# ---- hidden and system folders ----

HIDDEN = [
    ".@__thumb/1.png",
    ".ipynb_checkpoints/1-checkpoint.png",
    "@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg",
    "__MACOSX/._1.png",
    "$RECYCLE.BIN/1.png",
    "lost+found/1.png",
    "#recycle/1.png",
    "@Recycle/1.png",
    "System Volume Information/1.png",
    ".Trash-1000/files/1.png",
    "._1.png",
]


@pytest.fixture
def littered(tmp_path: Path) -> Path:
    """Four classes of 3 pictures, and at every depth what systems leave behind."""
    root = put_classes(tmp_path / "photos", "abcd", 3)
    for folder in ("", "a/", "a/deep/er/", "d/"):
        put(root, *(folder + name for name in HIDDEN))
        for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "Icon\r", "~$list.xlsx"):
            (root / folder / name).write_bytes(b"x")
    put(root, "a/deep/er/4.png")
    return root


def test_what_systems_leave_behind_is_no_image(littered: Path, recwarn: pytest.WarningsRecorder) -> None:
    expected = {f"{name}/{number}.png": name for name in "abcd" for number in range(3)} | {"a/deep/er/4.png": "a"}
    assert names_of(list_class_folders(littered, layout=""), littered) == expected
    assert names_of(read_collection(littered).dataset, littered) == expected
    listing = list_folder(littered, 0.5)
    assert {record.path.relative_to(littered).as_posix() for record in listing.records} == set(expected)
    assert listing.classes == ("a", "b", "c", "d")
    data = read_splits(cls(littered, val_fraction=0.3))
    assert len(data.train) + len(data.test) == 13
    verify_data(["--dataset", "folder", "--data-dir", str(littered), "--no-verbose"])
    assert not recwarn.list, "what nobody put there is not reported"


def test_ffcv_write_leaves_it_out_too(littered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from idml.data.ffcv_write import ffcv_write

    out = tmp_path / "train.beton"
    ffcv_write(
        ["--dataset", "folder", "--data-dir", str(littered), "--val-fraction", "0.3", "--out", str(out), "-j", "1"]
    )
    assert "13 train images of 4 classes" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["photos", "a.b", "eaDir", "MACOSX", "lost and found", "recycle", "thumbs"])
def test_names_that_are_not_hidden(name: str) -> None:
    assert not is_hidden(name)


# ---- formats ----


def test_every_format_that_pillow_reads_and_writes(tmp_path: Path) -> None:
    """Whatever can be written under a suffix is found by it; formats that need another program are not."""
    put_classes(tmp_path, "b", 1)
    written = set()
    for suffix, name in Image.registered_extensions().items():
        if name not in Image.SAVE or name in ("PDF", "EPS", "PALM", "BUFR", "GRIB", "HDF5", "WMF"):
            continue
        for mode in ("RGB", "L", "1"):
            try:
                path = tmp_path / "a" / f"x{suffix.upper()}"
                path.parent.mkdir(exist_ok=True)
                Image.effect_noise((32, 32), 50).convert(mode).save(path, name)
                written.add(path.name)
                break
            except (OSError, ValueError, KeyError):
                path.unlink(missing_ok=True)
    assert {"x.JFIF", "x.JPE", "x.WEBP", "x.AVIF", "x.TIF", "x.BMP", "x.GIF", "x.PPM", "x.MPO", "x.APNG"} <= written
    found = read_collection(tmp_path)
    assert {Path(name).name for name in found.names} == written | {"0.png"}
    assert {path.name for path in list_class_folders(tmp_path, layout="").paths or ()} == written | {"0.png"}


def test_what_is_no_image_by_its_suffix() -> None:
    suffixes = image_suffixes()
    assert not suffixes & {
        ".pdf",
        ".eps",
        ".ps",
        ".svg",
        ".mp4",
        ".mpg",
        ".h5",
        ".txt",
        ".npy",
        ".json",
        ".pcd",
        ".wmf",
        "",
    }


@pytest.mark.parametrize("script", ["cls", "dml"])
def test_files_left_out_are_counted_and_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str
) -> None:
    root = tmp_path / "photos"
    for split, classes in (("train", "abcd"), ("test", "abcd" if script == "cls" else "efgh")):
        put_classes(root / split, classes, 2)
        for number in range(5):
            (root / split / classes[0] / f"{number}.txt").write_text("x", encoding="utf-8")
        (root / split / classes[1] / "clip.MP4").write_bytes(b"x")
        (root / split / classes[2] / "IMG_1.HEIC").write_bytes(b"x")
        put(root, f"{split}/loose.png")
    main = train_cls.main if script == "cls" else train_dml.main
    extra = ["--ks", "1", "--no-nmi"] if script == "dml" else []
    main(["--dataset", "folder", "--data-dir", str(root), *SMALL, *extra, "--output-dir", str(tmp_path / "run")])
    errors = capsys.readouterr().err
    assert errors.count("left out 14 files that are no images: 10 .txt, 2 .heic, 2 .mp4") == 1
    assert "Pillow does not read .heic: convert them" in errors
    assert "left out 2 images in no class folder" in errors and "train/loose.png" in errors
    assert errors.count("warning:") == 1


def test_a_class_of_unread_files_says_what_they_are(tmp_path: Path) -> None:
    put_classes(tmp_path, "ab")
    (tmp_path / "c").mkdir()
    for number in range(3):
        (tmp_path / "c" / f"{number}.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no images in the class folder .*c \(of type \.jpg .*3 \.heic.*convert them"):
        list_class_folders(tmp_path, layout="")


# ---- links ----


@pytest.fixture
def linked(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """(folder whose classes and files are links, path below it: class)."""
    store = put_classes(tmp_path / "store", ["k1", "k2", "k3/inner"], 2)
    root = put_classes(tmp_path / "photos", ["plain", "partly"], 2)
    (root / "cat").symlink_to(store / "k1")
    (root / "dog").symlink_to(Path("..", "store", "k2"))  # relative
    (root / "partly" / "more").symlink_to(store / "k3")
    (root / "partly" / "single.png").symlink_to(store / "k1" / "0.png")
    expected = {f"{folder}/{number}.png": folder for folder in ("plain", "partly", "cat", "dog") for number in range(2)}
    expected |= {f"partly/more/inner/{number}.png": "partly" for number in range(2)} | {"partly/single.png": "partly"}
    return root, expected


def test_links_are_followed_alike_everywhere(linked: tuple[Path, dict[str, str]]) -> None:
    root, expected = linked
    assert names_of(list_class_folders(root, layout=""), root) == expected
    assert names_of(read_collection(root).dataset, root) == expected
    assert {record.path.relative_to(root).as_posix() for record in list_folder(root, 0.5).records} == set(expected)


def test_loops_of_links_end(linked: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    root, expected = linked
    (root / "plain" / "self").symlink_to(root / "plain")
    (root / "plain" / "up").symlink_to("..")
    (root / "plain" / "top").symlink_to(tmp_path)
    (tmp_path / "store" / "k2" / "back").symlink_to(root)
    (root / "here").symlink_to(root)
    (root / "above").symlink_to("..")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "two").symlink_to(tmp_path / "two")
    (tmp_path / "two" / "one").symlink_to(tmp_path / "one")
    put(tmp_path, "one/1.png", "two/2.png")
    (root / "plain" / "pair").symlink_to(tmp_path / "one")
    expected |= {"plain/pair/1.png": "plain", "plain/pair/two/2.png": "plain"}
    assert names_of(list_class_folders(root, layout=""), root) == expected
    assert names_of(read_collection(root).dataset, root) == expected


def test_links_to_nowhere_are_named(tmp_path: Path) -> None:
    root = put_classes(tmp_path / "photos", "abcd", 2)
    (root / "gone").symlink_to(tmp_path / "nas" / "gone")
    for read in (
        lambda: read_collection(root),
        lambda: list_folder(root, 0.5),
        lambda: list_class_folders(root, layout=""),
    ):
        with pytest.warns(UserWarning, match=r"left out 1 link to nowhere: .*photos/gone -> .*nas/gone"):
            read()
    (root / "gone").unlink()
    (root / "a" / "lost.png").symlink_to(tmp_path / "nas" / "lost.png")
    for read in (lambda: read_collection(root), lambda: read_splits(cls(root, val_fraction=0.3))):
        with pytest.raises(UserError, match=r"1 of 9 .*a/lost\.png \(a link that leads nowhere, to .*nas/lost\.png"):
            read()


# ---- classes and splits ----

VEHICLES = ("bus", "car", "train", "tram")


def test_a_class_called_train(tmp_path: Path) -> None:
    root = put_classes(tmp_path, VEHICLES)
    data = read_splits(cls(root, val_fraction=0.3))
    assert data.train.classes == VEHICLES
    found = read_collection(root)
    assert set(found.splits) == {""} and found.dataset.classes == VEHICLES
    assert all(name.startswith(f"{label}/") for name, label in zip(found.names, found.labels, strict=True))
    assert list_folder(root, 0.5).classes == VEHICLES


def test_a_class_called_train_within_splits(tmp_path: Path) -> None:
    root = tmp_path
    for split in ("train", "val"):
        put_classes(root / split, VEHICLES, 2)
    data = read_splits(cls(root))
    assert data.train.classes == data.test.classes == VEHICLES and len(data.train) == len(data.test) == 8
    found = read_collection(root)
    assert {(split, label) for split, label in zip(found.splits, found.labels, strict=True)} == {
        (split, label) for split in ("train", "val") for label in VEHICLES
    }


@pytest.mark.parametrize(("name", "others"), [("test", "ab"), ("val", "ab"), ("Training", "ab"), ("gallery", "ab")])
def test_other_classes_called_like_splits(tmp_path: Path, name: str, others: str) -> None:
    root = put_classes(tmp_path, [*others, name])
    assert set(read_splits(cls(root, val_fraction=0.3)).train.classes) == {*others, name}
    assert set(read_collection(root).labels) == {*others, name}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("TRAIN", "TEST"),
        ("trainset", "test_set"),
        ("training-data", "Validation"),
        ("train2017", "val2017"),
        ("Train Images", "Test Images"),
        ("train", "eval"),
        ("TrainingData", "valid"),
        ("01_train", "02_test"),
        ("ｔｒａｉｎ", "holdout"),
    ],
)
def test_splits_in_any_spelling(tmp_path: Path, train: str, test: str) -> None:
    put_classes(tmp_path / train, "abcd", 3)
    put_classes(tmp_path / test, "abcd", 2)
    data = read_splits(cls(tmp_path))
    assert (data.train.classes, len(data.train), len(data.test)) == (("a", "b", "c", "d"), 12, 8)
    found = read_collection(tmp_path)
    assert found.dataset.classes == ("a", "b", "c", "d")
    role = "test" if split_role(test) == "test" else "val"
    assert {name: found.splits.count(name) for name in set(found.splits)} == {"train": 12, role: 8}
    for letter in "abcd":
        (tmp_path / test / letter).rename(tmp_path / test / f"other {letter}")
    listing = list_folder(tmp_path, 0.5)
    assert {split: counts.images for split, counts in listing.counts().items()} == {"train": 12, "test": 8}
    assert not listing.problems


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (
            {"train": "ab", "Training": "ab", "val": "ab"},
            "Training/, train/ are both the train split by their names: rename",
        ),
        ({"Testing": "ab", "val": "ab"}, "has Testing/, val/, but no train/; expected one folder per class"),
        ({"Validation": "ab"}, "has Validation/, but no train/"),
        (
            {"cats_train": "ab", "cats_test": "ab"},
            "has splits in it \\(cats_test/, cats_train/\\), where class folders",
        ),
        ({"train1": "ab", "test1": "ab"}, "has splits in it \\(test1/, train1/\\)"),
        ({"Trainingsdaten": "ab", "Testdaten": "ab"}, "has splits in it \\(Testdaten/, Trainingsdaten/\\)"),
        ({"train": "", "test": ""}, "has test/, train/, but no class folders in train/"),
        (
            {"cat": ["train", "test"], "dog": ["train", "test"]},
            "class folder .*cat has splits in it .*: put classes into splits",
        ),
        ({"bus": "", "car": "", "train": ["steam", "diesel"]}, "so bus/, car/ beside it cannot be classes"),
    ],
)
def test_splits_that_are_not_clear_are_refused(tmp_path: Path, folders: dict[str, Any], expected: str) -> None:
    """By every reader that trains; never learned as classes."""
    for folder, classes in folders.items():
        if classes:
            put_classes(tmp_path / folder, classes, 2)
        else:
            put_classes(tmp_path, [folder], 2)
    with pytest.raises(UserError, match=expected):
        read_splits(cls(tmp_path, val_fraction=0.3))
    with pytest.raises(UserError):
        list_folder(tmp_path, 0.5)


def test_splits_given_as_a_folder_to_train_on(tmp_path: Path) -> None:
    for split in ("Training", "Testing"):
        put_classes(tmp_path / split, "ab", 2)
    with pytest.raises(UserError, match=r"has splits in it \(Testing/, Training/\), where class folders should be"):
        read_splits(cls(tmp_path, data_dir=None, train_dir=str(tmp_path), val_fraction=0.3))
    good = cls(tmp_path, data_dir=None, train_dir=str(tmp_path / "Training"), val_dir=str(tmp_path / "Testing"))
    assert len(read_splits(good).test) == 4


def test_a_folder_around_the_splits(tmp_path: Path) -> None:
    """As an archive unpacks: the folder to give is named."""
    for split in ("Training", "Testing"):
        put_classes(tmp_path / "archive" / split, "ab", 2)
    for read in (lambda: read_splits(cls(tmp_path, val_fraction=0.3)), lambda: list_folder(tmp_path, 0.5)):
        with pytest.raises(UserError, match=r"which has splits in it: give .*/archive in its place"):
            read()


def test_images_without_labels_beside_splits(tmp_path: Path) -> None:
    """As competitions hand them out: ``test/`` holds images alone."""
    put_classes(tmp_path / "train", "ab", 4)
    put(tmp_path, "test/1.png", "test/2.png")
    with pytest.raises(UserError, match=r"no images to test on .*\(test/ in it has no class folders\)"):
        read_splits(cls(tmp_path))
    with pytest.warns(UserWarning, match=r"test is not used"):
        assert len(read_splits(cls(tmp_path, val_fraction=0.25)).train) == 6
    found = read_collection(tmp_path)
    assert [label for split, label in zip(found.splits, found.labels, strict=True) if split == "test"] == [None, None]
    assert found.dataset.classes == ("a", "b")


def test_unused_folders_are_named(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        put_classes(tmp_path / split, "ab", 2)
    put(tmp_path, "drafts/1.png")
    with pytest.warns(UserWarning, match=r"test is not used; .*drafts is not used"):
        read_splits(cls(tmp_path))


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("train", "train"),
        ("trainval", "train"),
        ("Validation_Set", "val"),
        ("dev", "val"),
        ("test-images", "test"),
        ("queries", "query"),
        ("Gallery", "gallery"),
        ("trains", None),
        ("trainers", None),
        ("valley", None),
        ("testudo", None),
        ("data", None),
        ("01_train", "train"),
        ("test1", None),
        ("val2017", "val"),
        ("2017", None),
        ("tram", None),
    ],
)
def test_names_of_splits(name: str, role: str | None) -> None:
    assert split_role(name) == role
    assert mentions_split(name) or role is None or role in ("query", "gallery")
