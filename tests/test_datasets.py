"""The readers on real files in the expected layouts, and what they say when something is wrong."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from idml.config_cls import ClsConfig
from idml.data import datasets
from idml.data.crops import random_resized_crop
from idml.data.datasets import DEBIAN_FASHION_MNIST, read_idx, read_splits
from idml.data.embedded.fashion_mnist_mini import first_of_each_class
from idml.data.image_dataset import ImageDataset, fit_square, hold_out, read_rgb
from idml.data.torch_loader import TorchLoader
from idml.errors import UserError


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()) if path.suffix == ".gz" else header + array.tobytes())


def write_fashion_mnist(folder: Path, fashion: dict[str, np.ndarray], suffix: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, split, count in (("train", "train", 300), ("t10k", "test", 100)):
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", fashion[f"{split}_images"][:count])
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", fashion[f"{split}_labels"][:count])


def folder_config(root: Path, **values: object) -> ClsConfig:
    defaults = {"dataset": "folder", "data_dir": str(root), "image_size": 32, "batch_size": 8, "workers": 0}
    return ClsConfig(**(defaults | {"val_fraction": 0.0} | values))


def test_the_embedded_data_is_balanced_and_real(fashion: dict[str, np.ndarray]) -> None:
    data = read_splits(ClsConfig(val_fraction=0.0))
    assert (len(data.train), len(data.test), data.val) == (5000, 1000, None)
    assert np.bincount(data.train.labels).tolist() == [500] * 10
    assert np.bincount(data.test.labels).tolist() == [100] * 10
    assert data.train.images.shape == (5000, 32, 32, 1)
    assert np.array_equal(data.train.images[7, 2:30, 2:30, 0], fashion["train_images"][7])
    assert data.train.images[:, :2].max() == 0, "28 pixels are padded to 32"
    train = {image.tobytes() for image in fashion["train_images"]}
    assert not any(image.tobytes() in train for image in fashion["test_images"]), "no test image is a training image"


@pytest.mark.skipif(
    not DEBIAN_FASHION_MNIST.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed"
)
def test_the_embedded_data_is_what_its_script_cuts_from_the_full_set(fashion: dict[str, np.ndarray]) -> None:
    images = read_idx(DEBIAN_FASHION_MNIST / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(DEBIAN_FASHION_MNIST / "t10k-labels-idx1-ubyte.gz")
    assert images.shape == (10000, 28, 28)
    assert np.array_equal(images[first_of_each_class(labels, 100)], fashion["test_images"])
    data = read_splits(ClsConfig(dataset="fashion-mnist", val_fraction=0.1))
    assert (len(data.train), len(data.val), len(data.test)) == (54000, 6000, 10000)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_fashion_mnist_from_a_folder(tmp_path: Path, fashion: dict[str, np.ndarray], suffix: str, below: str) -> None:
    write_fashion_mnist(tmp_path / below, fashion, suffix)
    data = read_splits(ClsConfig(dataset="fashion-mnist", data_dir=str(tmp_path), image_size=28, val_fraction=0.0))
    assert np.array_equal(data.train.images[..., 0], fashion["train_images"][:300])
    assert np.array_equal(data.test.labels, fashion["test_labels"][:100])


def test_missing_fashion_mnist_says_where_it_looked_and_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path}.*train-images-idx3-ubyte.*dataset-fashion-mnist.*--download"):
        read_splits(ClsConfig(dataset="fashion-mnist", data_dir=str(tmp_path)))


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "empty", "another magic"])
def test_a_damaged_idx_file_is_named(tmp_path: Path, fashion: dict[str, np.ndarray], damage: str) -> None:
    write_fashion_mnist(tmp_path, fashion, ".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    damaged = {
        "truncated": whole[: len(whole) // 2],
        "not gzip": b"<html>not found</html>",
        "empty": b"",
        "another magic": gzip.compress(b"\0\0\x0d\x03" + b"\0" * 50),
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=str(path)):
        read_splits(ClsConfig(dataset="fashion-mnist", data_dir=str(tmp_path)))


def test_digits_are_split_evenly_and_not_flipped() -> None:
    config = ClsConfig(dataset="digits", val_fraction=0.0)
    data = read_splits(config)
    assert len(data.train) + len(data.test) == 1797
    share = np.bincount(data.test.labels) / (np.bincount(data.train.labels) + np.bincount(data.test.labels))
    assert (np.abs(share - 0.2) < 0.01).all()
    assert config.flip is False
    assert data.train.images.max() == 255


def test_fit_square_pads_small_gaps_and_resizes_large_ones(fashion: dict[str, np.ndarray]) -> None:
    images = fashion["test_images"][:4, :, :, None]
    assert np.array_equal(fit_square(images, 31)[:, 1:29, 1:29], images)
    smaller = fit_square(images, 14)
    blocks = images.reshape(4, 14, 2, 14, 2, 1).mean((2, 4))
    assert np.abs(smaller.astype(float) - blocks).mean() < 8, "close to averaging 2x2 pixels"


def test_hold_out_takes_the_same_share_of_every_class(fashion: dict[str, np.ndarray]) -> None:
    dataset = ImageDataset(
        labels=fashion["test_labels"].astype(np.int64),
        classes=tuple("abcdefghij"),
        images=fashion["test_images"][..., None],
    )
    rest, held = hold_out(dataset, 0.13, seed=0)
    assert np.bincount(held.labels).tolist() == [13] * 10
    assert len(rest) + len(held) == 1000
    both = {image.tobytes() for image in rest.images} & {image.tobytes() for image in held.images}
    assert not both
    again = hold_out(dataset, 0.13, seed=0)[1]
    other = hold_out(dataset, 0.13, seed=1)[1]
    assert np.array_equal(held.images, again.images)
    assert not np.array_equal(held.images, other.images)


def test_a_folder_with_train_and_val(image_folder: Path) -> None:
    data = read_splits(folder_config(image_folder))
    assert data.train.classes == ("bag", "boot", "coat")
    assert (len(data.train), len(data.test), data.val) == (36, 12, None)
    named = zip(data.train.paths, data.train.labels, strict=True)
    assert all(path.parent.name == data.train.classes[label] for path, label in named)


def test_a_folder_given_as_two_directories_or_as_one(image_folder: Path) -> None:
    two = folder_config(
        image_folder, data_dir=None, train_dir=str(image_folder / "train"), val_dir=str(image_folder / "val")
    )
    assert (len(read_splits(two).train), len(read_splits(two).test)) == (36, 12)
    one = read_splits(folder_config(image_folder / "train", val_fraction=0.25))
    assert (len(one.train), len(one.test), one.val) == (27, 9, None)
    both = read_splits(folder_config(image_folder, val_fraction=0.25))
    assert (len(both.train), len(both.val), len(both.test)) == (27, 9, 12)


def test_what_introspects_is_not_what_tests(image_folder: Path) -> None:
    """Class folders alone: a share is the test, and where the model is introspected another share is held out."""
    alone = str(image_folder / "train")
    plain = read_splits(folder_config(image_folder, data_dir=alone, val_fraction=0.25))
    data = read_splits(folder_config(image_folder, data_dir=alone, val_fraction=0.25, introspect=True))
    assert plain.val is None and data.val is not None
    assert [len(plain.train), len(plain.test)] == [27, 9]
    assert [len(data.train), len(data.val), len(data.test)] == [21, 6, 9]
    assert data.test.paths == plain.test.paths
    assert len({*data.train.paths, *data.val.paths, *data.test.paths}) == 36


def test_every_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    from sklearn.datasets import load_sample_image

    photo = Image.fromarray(load_sample_image("flower.jpg")).resize((60, 40))
    reference = np.asarray(photo, float)
    for name, image, tolerance in (
        ("grey.png", photo.convert("L"), 60),
        ("palette.png", photo.quantize(64), 12),
        ("rgba.png", photo.convert("RGBA"), 0),
        ("cmyk.jpg", photo.convert("CMYK"), 12),
        ("progressive.jpg", photo, 12),
    ):
        image.save(tmp_path / name, **({"progressive": True, "quality": 95} if name == "progressive.jpg" else {}))
        pixels = np.asarray(read_rgb(tmp_path / name), float)
        assert pixels.shape == (40, 60, 3)
        assert np.abs(pixels - reference).mean() <= tolerance, name


@pytest.mark.parametrize(
    ("arrange", "expected"),
    [
        (lambda root: shutil.rmtree(root), r"no images to test on|no folder"),
        (lambda root: [shutil.rmtree(root / "train" / name) for name in ("bag", "boot", "coat")], "no class folders"),
        (lambda root: [path.unlink() for path in (root / "train" / "boot").iterdir()], r"no images in .*boot"),
        (lambda root: shutil.rmtree(root / "val" / "boot"), r"differ: only in the first \['boot'\]"),
        (lambda root: shutil.rmtree(root / "val"), r"no images to test on.*--val-fraction"),
        (
            lambda root: [shutil.rmtree(root / split / name) for split in ("train", "val") for name in ("bag", "boot")],
            r"at least 2 classes, got 'coat' only",
        ),
    ],
)
def test_a_wrong_folder_is_told(image_folder: Path, arrange, expected: str) -> None:
    arrange(image_folder)
    with pytest.raises(UserError, match=expected):
        read_splits(folder_config(image_folder))


def test_a_missing_data_dir_names_the_folder_and_the_layout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*nowhere.*DIR/train/<class>/\*\.jpg"):
        read_splits(folder_config(tmp_path / "nowhere", val_fraction=0.1))
    with pytest.raises(UserError, match="needs --data-dir or --train-dir"):
        read_splits(ClsConfig(dataset="folder"))


def test_a_batch_larger_than_the_data_is_an_error(image_folder: Path) -> None:
    with pytest.raises(UserError, match="--batch-size 37 is larger than the 36 training images"):
        read_splits(folder_config(image_folder, batch_size=37))


def damage_three(root: Path) -> list[Path]:
    """A truncated PNG, a truncated JPEG and a text file under an image's name."""
    png, jpeg, text = root / "train/bag/000.png", root / "train/bag/zzz.jpg", root / "train/coat/notes.jpg"
    Image.open(root / "train/bag/001.png").convert("RGB").resize((300, 300)).save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[:-200])
    png.write_bytes(png.read_bytes()[:-60])
    text.write_text("no image")
    return [png, jpeg, text]


def test_bad_images_are_counted_and_named(image_folder: Path) -> None:
    bad = damage_three(image_folder)
    with pytest.raises(UserError) as caught:
        read_splits(folder_config(image_folder))
    assert "3 of 38 image files cannot be decoded" in str(caught.value)
    assert all(str(path) in str(caught.value) for path in bad)
    assert "--skip-bad-images" in str(caught.value)


def test_bad_images_are_skipped_on_request(image_folder: Path) -> None:
    bad = damage_three(image_folder)
    with pytest.warns(UserWarning, match="left out: 3 of 38"):
        data = read_splits(folder_config(image_folder, skip_bad_images=True))
    assert len(data.train) == 35
    assert not set(bad) & set(data.train.paths)
    loader = TorchLoader(data.train, batch_size=8, image_size=32, train=True)
    assert sum(len(images) for images, _ in loader.epoch(0)) == 35


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_depend_on_seed_and_epoch_not_on_workers(image_folder: Path, workers: int) -> None:
    dataset = read_splits(folder_config(image_folder)).train

    def epoch(number: int, seed: int = 0) -> list:
        loader = TorchLoader(dataset, batch_size=10, image_size=24, train=True, seed=seed, workers=workers)
        return [(images.numpy(), labels.numpy()) for images, labels in loader.epoch(number)]

    reference = TorchLoader(dataset, batch_size=10, image_size=24, train=True)
    for (images, labels), (again, same) in zip(epoch(1), reference.epoch(1), strict=True):
        assert np.array_equal(images, again.numpy())
        assert np.array_equal(labels, same.numpy())
    assert not np.array_equal(epoch(1)[0][0], epoch(2)[0][0])
    assert not np.array_equal(epoch(1)[0][0], epoch(1, seed=3)[0][0])


def test_evaluation_resizes_and_crops_as_torchvision_does(image_folder: Path) -> None:
    from torchvision.transforms import v2

    dataset = read_splits(folder_config(image_folder)).test
    oracle = v2.Compose([v2.Resize(37), v2.CenterCrop(32), v2.PILToTensor()])  # 37 = round(32 * 256 / 224)
    loader = TorchLoader(dataset, batch_size=5, image_size=32, train=False)
    batches = list(loader.epoch(0))
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    images = np.concatenate([images.numpy() for images, _ in batches])
    for image, path in zip(images, dataset.paths, strict=True):
        assert np.array_equal(image, oracle(Image.open(path).convert("RGB")).numpy())


def test_random_resized_crops_lie_inside_and_have_torchvisions_distribution() -> None:
    import torch
    from scipy.stats import ks_2samp
    from torchvision.transforms import RandomResizedCrop

    height, width, count = 120, 200, 4000
    ours = np.array([random_resized_crop(height, width, 1, 2, sample, 0.08, 1.0) for sample in range(count)])
    top, left, h, w = ours.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3, column
    assert ks_2samp(h * w, theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3
    assert len({tuple(crop) for crop in ours}) > count * 0.9


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_outside_the_classes_are_told(
    monkeypatch: pytest.MonkeyPatch, fashion: dict[str, np.ndarray], label: int
) -> None:
    source = datasets.read_fashion_mnist_mini(ClsConfig())
    source.train.labels[17] = label
    monkeypatch.setitem(datasets.READERS, "digits", lambda config: source)
    with pytest.raises(UserError, match=rf"labels of the training images must be 0 to 9, got {label}"):
        read_splits(ClsConfig(dataset="digits"))


def test_fewer_images_than_processes_is_an_error(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "13")
    with pytest.raises(UserError, match="12 test images are too few for 13 processes"):
        read_splits(folder_config(image_folder))
