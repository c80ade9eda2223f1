"""Images of any folder, and those that a model was trained on: names, splits, labels, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from idml.config_cls import ClsConfig
from idml.config_dml import DmlConfig
from idml.data.collection import read_collection, trained_on
from idml.errors import UserError


@pytest.fixture
def photo(fashion: dict[str, np.ndarray]) -> Image.Image:
    return Image.fromarray(fashion["test_images"][0])


def put(photo: Image.Image, root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        photo.save(root / name)
    return root


def test_class_and_split_are_folders(tmp_path: Path, photo: Image.Image) -> None:
    put(photo, tmp_path, "train/cat/1.jpg", "train/dog/deep/er/2.PNG", "test/cat/3.webp", "bird/4.jpeg", "5.bmp")
    put(photo, tmp_path, "gallery/6.png", "Train/7.png", "train/8.png")
    found = read_collection(tmp_path)
    rows = {name: (split, label) for name, split, label in zip(found.names, found.splits, found.labels, strict=True)}
    assert rows == {
        "5.bmp": ("", None),
        "Train/7.png": ("", "Train"),  # only the names that are known stand for a split
        "bird/4.jpeg": ("", "bird"),
        "gallery/6.png": ("gallery", None),
        "test/cat/3.webp": ("test", "cat"),
        "train/8.png": ("train", None),
        "train/cat/1.jpg": ("train", "cat"),
        "train/dog/deep/er/2.PNG": ("train", "dog"),
    }
    assert found.names == tuple(sorted(rows)) and found.dataset.classes == ("Train", "bird", "cat", "dog")
    assert found.dataset.paths == tuple(tmp_path / name for name in found.names)
    assert (found.root, found.source, len(found)) == (tmp_path, str(tmp_path), 8)


def test_a_subset_keeps_its_names(tmp_path: Path, photo: Image.Image) -> None:
    found = read_collection(put(photo, tmp_path, "a/1.png", "b/2.png", "c/3.png"))
    part = found.subset(np.array([2, 0]))
    assert part.names == ("c/3.png", "a/1.png") and part.labels == ("c", "a")
    assert part.dataset.paths == (tmp_path / "c/3.png", tmp_path / "a/1.png")
    assert part.dataset.classes == found.dataset.classes


def test_other_files_are_left_out_and_told_of(tmp_path: Path, photo: Image.Image) -> None:
    put(photo, tmp_path, "a/1.png", ".hidden/2.png", "a/._1.png", "a/.cache/3.png")
    for name in ("notes.txt", "a/labels.csv", "README"):
        (tmp_path / name).write_text("text", encoding="utf-8")
    with pytest.warns(UserWarning, match=r"left out 3 files that are no images: 1 \.csv, 1 \.txt, 1 README$"):
        found = read_collection(tmp_path)
    assert found.names == ("a/1.png",)


def test_images_that_do_not_decode(tmp_path: Path, photo: Image.Image) -> None:
    put(photo, tmp_path, "a/1.png", "a/3.png")
    whole = (tmp_path / "a/1.png").read_bytes()
    (tmp_path / "a/2.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b").mkdir()
    (tmp_path / "b/4.jpg").write_text("text", encoding="utf-8")
    with pytest.raises(UserError, match=r"2\.png"):
        read_collection(tmp_path)
    with pytest.warns(UserWarning, match="2 "):
        found = read_collection(tmp_path, skip_bad_images=True, workers=2)
    assert found.names == ("a/1.png", "a/3.png") and found.labels == ("a", "a") and found.splits == ("", "")
    for name in found.names:
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning, match="4 "), pytest.raises(UserError, match=r"no image in .* can be decoded"):
        read_collection(tmp_path, skip_bad_images=True)


def test_folders_without_images(tmp_path: Path, photo: Image.Image) -> None:
    with pytest.raises(UserError, match=r"no images in .*of type .*\.jpg.*expected images anywhere below DIR"):
        read_collection(tmp_path)
    with pytest.raises(UserError, match=r"no folder .*none: the nearest that exists is .*; expected images anywhere"):
        read_collection(tmp_path / "none")
    put(photo, tmp_path, "1.png")
    with pytest.raises(UserError, match="no folder"):
        read_collection(tmp_path / "1.png")


@pytest.mark.skipif(os.name != "posix", reason="names of bytes are of POSIX")
def test_names_that_are_no_text(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "plain.png")
    (tmp_path / "plain.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.png"))
    (name,) = read_collection(tmp_path).names
    assert name.isprintable() and name.startswith("caf") and name.encode("utf-8")


def test_links_in_circles_end(tmp_path: Path, photo: Image.Image) -> None:
    put(photo, tmp_path, "a/1.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert read_collection(tmp_path).names == ("a/1.png",)


def config_of(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in type(config).__dataclass_fields__}


def test_images_in_memory_that_a_classifier_was_trained_on(fashion: dict[str, np.ndarray]) -> None:
    found = trained_on(config_of(ClsConfig(dataset="fashion-mnist-mini", image_size=28, val_fraction=0.1)))
    splits = np.array(found.splits)
    assert {name: int((splits == name).sum()) for name in set(found.splits)} == {
        "train": 4500,
        "val": 500,
        "test": 1000,
    }
    assert len(set(found.names)) == len(found) == 6000 and "test/17" in found.names and found.root is None
    test = found.subset(np.flatnonzero(splits == "test"))
    assert test.dataset.images is not None
    assert (test.dataset.images[..., 0] == fashion["test_images"]).all()
    assert (test.dataset.labels == fashion["test_labels"]).all() and test.labels[0] is not None
    assert test.names[17] == "test/17" and found.source == "fashion-mnist-mini"


def test_files_that_a_classifier_was_trained_on(image_folder: Path) -> None:
    config = ClsConfig(dataset="folder", data_dir=str(image_folder), batch_size=8, val_fraction=0.25)
    found = trained_on(config_of(config))
    assert found.splits.count("val") == 9
    assert len(found) == 48 and found.root == image_folder
    assert found.names[0] == "train/bag/000.png" and found.splits[0] == "train"
    assert found.names[-1] == "val/coat/003.png" and found.splits[-1] == "test"  # the images that figures are of
    assert found.labels[-1] == "coat"
    with pytest.raises(UserError, match="gone"):
        trained_on(config_of(ClsConfig(dataset="folder", data_dir=str(image_folder / "gone"))))


def clothes(root: Path, fashion: dict[str, np.ndarray]) -> DmlConfig:
    """Six classes of four images below ``root``, and the config of a retrieval run on them."""
    for label in range(6):
        for number, index in enumerate(np.flatnonzero(fashion["test_labels"] == label)[:4]):
            put(Image.fromarray(fashion["test_images"][index]), root, f"class {label}/{number}.png")
    return DmlConfig(dataset="folder", data_dir=str(root), batch_size=4, image_size=32, ks=[1], val_fraction=0.0)


def test_what_a_retrieval_model_was_trained_on(tmp_path: Path, fashion: dict[str, np.ndarray]) -> None:
    """Classes of the splits are others, and together they are all."""
    found = trained_on(config_of(clothes(tmp_path, fashion)))
    assert found.dataset.classes == tuple(f"class {label}" for label in range(6)) and len(found) == 24
    assert all(name.startswith(f"{label}/") for name, label in zip(found.names, found.labels, strict=True))
    of_split = {
        split: {found.labels[i] for i in np.flatnonzero(np.array(found.splits) == split)} for split in found.splits
    }
    assert set(of_split) == {"train", "test"} and not of_split["train"] & of_split["test"]


def test_options_that_a_checkpoint_has_too_many_or_too_few(
    image_folder: Path, tmp_path: Path, fashion: dict[str, np.ndarray]
) -> None:
    """A checkpoint of another version of this project: an earlier one held nothing out unless it was asked to."""
    config = config_of(ClsConfig(dataset="folder", data_dir=str(image_folder), batch_size=8))
    del config["introspect"], config["val_fraction"]
    found = trained_on(config | {"an_option_of_tomorrow": 3, "uncertainty_loss": "loss-prediction"})
    assert len(found) == 48 and set(found.splits) == {"train", "test"}
    config = config_of(clothes(tmp_path / "clothes", fashion))
    del config["introspect"], config["val_fraction"]
    assert set(trained_on(config | {"uncertainty_share": 0.5}).splits) == {"train", "test"}
