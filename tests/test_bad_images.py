"""Image files of every kind, good and bad, through both loaders: what is trained on, what is refused, and how."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train_cls
import train_dml
from idml.data.image_dataset import ImageDataset, read_rgb
from idml.data.image_files import list_class_folders, printable
from idml.data.torch_loader import TorchLoader
from idml.errors import TrainingError, UserError

OPTIONS = [
    "--dataset",
    "folder",
    "--model",
    "resnet8_cifar",
    "--image-size",
    "16",
    "--epochs",
    "1",
    "--batch-size",
    "8",
]
OPTIONS += ["--no-verbose"]


def write_good(folder: Path, photo: Image.Image) -> int:
    """Files that are unusual and fine; how many."""
    photo.resize((1, 1)).save(folder / "one pixel.png")
    grey = np.asarray(photo.convert("L"), np.uint16) * 257
    Image.fromarray(grey).save(folder / "sixteen bits.png")
    Image.fromarray(grey).save(folder / "sixteen bits.tiff")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    frames = [photo, photo.rotate(90), photo.rotate(180)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:])
    photo.resize((20_000, 12)).save(folder / "wide.png")
    photo.convert("RGBA").save(folder / "transparent.png")
    photo.convert("P").save(folder / "palette.png")
    photo.convert("1").save(folder / "black and white.png")
    photo.save(folder / "name with\na newline.png")
    photo.save(os.fsencode(folder) + b"/no text \xff\xfe.png", format="PNG")
    (folder / "link.png").symlink_to(folder / "palette.png")
    (folder / "circle").symlink_to(folder)  # a folder that holds itself is not walked into
    return 13


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that says it has side^2 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * 10))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def write_bad(folder: Path, photo: Image.Image) -> int:
    """Files that no one can decode, or should; how many."""
    photo.resize((90, 90)).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "header only.jpg").write_bytes(whole[:100])
    (folder / "zero bytes.png").write_bytes(b"")
    (folder / "text.jpeg").write_text("<html>404</html>")
    (folder / "bomb.png").write_bytes(bomb(11_000))
    (folder / "larger bomb.png").write_bytes(bomb(30_000))
    (folder / "nowhere.png").symlink_to(folder / "does not exist.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    os.mkfifo(folder / "pipe.png")
    return 9


@pytest.fixture
def photo(fashion: dict[str, np.ndarray]) -> Image.Image:
    return Image.fromarray(fashion["train_images"][3]).convert("RGB").resize((40, 40))


@pytest.mark.parametrize("loader", ["torch", "ffcv"])
def test_unusual_files_are_trained_on(image_folder: Path, tmp_path: Path, photo: Image.Image, loader: str) -> None:
    count = write_good(image_folder / "train/bag", photo)
    other = image_folder / "train" / "a class\nin two lines"
    other.mkdir()
    (image_folder / "train" / "loop").symlink_to(image_folder / "train" / "loop")
    photo.save(other / "x.png")
    test_other = image_folder / "val" / "a class\nin two lines"
    test_other.mkdir()
    photo.save(test_other / "x.png")
    folders = list_class_folders(image_folder / "train", layout="")
    assert folders.classes == ("a class\\nin two lines", "bag", "boot", "coat")
    assert (folders.labels == 1).sum() == 12 + count
    options = ["--data-dir", str(image_folder), "--loader", loader, "--cache-dir", str(tmp_path / "cache")]
    results = train_cls.main([*OPTIONS, *options, "--output-dir", str(tmp_path / "run")])
    assert results is not None
    assert np.isfinite(results["final"]["train_loss"])


def test_sixteen_bits_keep_their_grey_levels(tmp_path: Path, photo: Image.Image) -> None:
    write_good(tmp_path, photo)
    grey = np.asarray(photo.convert("L"))
    for name in ("sixteen bits.png", "sixteen bits.tiff"):
        np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / name))[..., 1], grey)


@pytest.mark.parametrize("loader", ["torch", "ffcv"])
def test_bad_files_stop_the_run_before_it_starts(
    image_folder: Path, tmp_path: Path, photo: Image.Image, loader: str
) -> None:
    count = write_bad(image_folder / "train/bag", photo)
    options = ["--data-dir", str(image_folder), "--loader", loader, "--cache-dir", str(tmp_path / "cache")]
    options += ["--output-dir", str(tmp_path / "run")]
    with pytest.raises(UserError) as refused:
        train_cls.main([*OPTIONS, *options])
    message = str(refused.value)
    assert f"{count} of {36 + count} image files cannot be decoded" in message
    assert "--skip-bad-images" in message
    for name in ("truncated.jpg", "zero bytes.png", "bomb.png", "circle.png", "pipe.png"):
        assert name in message
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    results = train_cls.main([*OPTIONS, *options, "--skip-bad-images"])
    assert results is not None and np.isfinite(results["final"]["train_loss"])


def test_only_ten_names_are_told(image_folder: Path, tmp_path: Path) -> None:
    for number in range(14):
        (image_folder / "train/boot" / f"bad{number:02d}.png").write_bytes(b"x")
    with pytest.raises(UserError) as refused:
        train_cls.main([*OPTIONS, "--data-dir", str(image_folder), "--output-dir", str(tmp_path / "run")])
    assert "14 of 50 image files" in str(refused.value)
    assert str(refused.value).count(".png (") == 10


def test_retrieval_skips_and_tells(
    image_folder: Path, tmp_path: Path, photo: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "classes"
    folder.mkdir()
    for split in ("train", "val"):
        for source in (image_folder / split).iterdir():
            source.rename(folder / f"{source.name}-{split}")
    write_bad(folder / "bag-train", photo)
    write_good(folder / "bag-train", photo)
    options = [*OPTIONS, "--data-dir", str(folder), "--ks", "1", "--output-dir", str(tmp_path / "run")]
    options += ["--val-fraction", "0"]
    with pytest.raises(UserError, match=r"3 of 70 images are missing: .*circle\.png"):
        train_dml.main(options)
    for name in ("nowhere.png", "circle.png", "pipe.png"):
        (folder / "bag-train" / name).unlink()
    with pytest.raises(UserError, match=r"6 of .* image files cannot be decoded"):
        train_dml.main(options)
    (folder / "bag-train/circle.png").symlink_to(folder / "bag-train/circle.png")
    capsys.readouterr()
    results = train_dml.main([*options, "--skip-bad-images"])
    assert results is not None
    assert json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))["final"]["epoch"] == 1
    assert capsys.readouterr().err.count("truncated.jpg") == 1


def test_a_folder_that_cannot_be_listed(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even root gets past this one: the system call itself fails."""
    scandir = os.scandir

    def refusing(path: str | os.PathLike[str]) -> object:
        if os.fspath(path).endswith("boot"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"cannot read the folder .*boot: Permission denied"):
        list_class_folders(image_folder / "train", layout="")


def test_names_as_text() -> None:
    assert printable("Grün ✓ 猫") == "Grün ✓ 猫"
    assert printable("a\tb\n\x00") == "a\\tb\\n\\x00"
    assert printable(os.fsdecode(b"\xff")) == "\\udcff"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_during_training_is_named(image_folder: Path, workers: int) -> None:
    paths = tuple(sorted((image_folder / "train/bag").iterdir()))
    paths[3].write_bytes(paths[3].read_bytes()[:200])
    dataset = ImageDataset(labels=np.zeros(len(paths), np.int64), classes=("bag",), paths=paths)
    loader = TorchLoader(dataset, batch_size=4, image_size=16, train=True, workers=workers)
    with pytest.raises(TrainingError, match=r"003\.png could not be read during training: ") as caught:
        list(loader.epoch(0))
    assert "Traceback" not in str(caught.value)
