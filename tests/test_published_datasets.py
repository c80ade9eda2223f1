"""ImageNet's tree and CIFAR's pickles in their exact formats, of real images, through readers, configs and loaders."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR10, CIFAR100

import train_cls
from idml.config_cls import ClsConfig
from idml.data.datasets import read_splits
from idml.errors import UserError
from tests.test_distributed import launch
from tests.test_train_cls import ROOT

CONFIGS = ROOT / "configs"


def photos(kind: str) -> list[tuple[Path, int]]:
    """(file, label) of the 20 real images of ImageNet, CIFAR-10 or CIFAR-100 in the package foolbox."""
    spec = importlib.util.find_spec("foolbox")
    if spec is None or spec.origin is None:
        pytest.skip("the package foolbox (extra `test`), whose sample photos are used, is not installed")
    files = sorted((Path(spec.origin).parent / "data").glob(f"{kind}_*"))
    assert len(files) == 20
    return [(file, int(file.stem.rsplit("_", 1)[1])) for file in files]


# ---- ImageNet ----

KIT = Path("ILSVRC2012_devkit_t12") / "data"


def wnid(label: int) -> str:
    return f"n{10_000_000 + label:08d}"


def write_imagenet(root: Path, *, flat: bool) -> dict[str, int]:
    """Ten classes; three crops of each photo to train on, the photo itself to validate. Returns the labels of val."""
    chosen = {label: file for file, label in photos("imagenet")}
    labels = sorted(chosen)[:10]
    numbers = list(np.random.default_rng(0).permutation(10) + 1)  # the kit numbers classes in an order of its own
    truth, val = [], {}
    for position, label in enumerate(labels):
        photo = Image.open(chosen[label]).convert("RGB")
        folder = root / "train" / wnid(label)
        folder.mkdir(parents=True)
        for number in range(3):
            box = (number * 5, number * 9, photo.width - 10, photo.height - 4 * number)
            photo.crop(box).save(folder / f"{wnid(label)}_{number}.JPEG", quality=90)
        name = f"ILSVRC2012_val_{position + 1:08d}.JPEG"
        place = root / "val" if flat else root / "val" / wnid(label)
        place.mkdir(parents=True, exist_ok=True)
        photo.save(place / name, quality=90)
        val[name] = position
        truth.append(numbers[position])
    if flat:
        kit = root / "ILSVRC2012_devkit_t12" / "data"
        kit.mkdir(parents=True)
        (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number}\n" for number in truth))
        synsets = np.zeros(10, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
        for row, (number, label) in enumerate(sorted(zip(numbers, labels, strict=True))):
            synsets[row] = (int(number), wnid(label), "a word")
        savemat(kit / "meta.mat", {"synsets": synsets[:, None]})
    return val


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imagenet")
    write_imagenet(root, flat=False)
    return root


@pytest.mark.parametrize("flat", [False, True])
def test_imagenet_labels(tmp_path: Path, flat: bool) -> None:
    val = write_imagenet(tmp_path, flat=flat)
    with pytest.warns(UserWarning, match="not the full ImageNet-1K: 10 classes, 30 training and 10 validation"):
        data = read_splits(ClsConfig(dataset="imagenet", data_dir=str(tmp_path), batch_size=4, val_fraction=0.0))
    assert {path.name: label for path, label in zip(data.test.paths, data.test.labels, strict=True)} == val
    assert all(
        path.parent.name == data.train.classes[label]
        for path, label in zip(data.train.paths, data.train.labels, strict=True)
    )


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda root: (root / KIT / "meta.mat").unlink(), r"no meta\.mat below"),
        (
            lambda root: (root / KIT / "meta.mat").write_bytes(b"x" * 200),
            r"is not the .*meta\.mat",
        ),
        (
            lambda root: (root / KIT / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n"),
            r"has 2 labels, but there is an image ILSVRC2012_val_00000010",
        ),
        (
            lambda root: (root / KIT / "ILSVRC2012_validation_ground_truth.txt").write_text("a\n"),
            "one class number a line",
        ),
        (lambda root: [path.unlink() for path in (root / "val").iterdir()], r"no images in .*val"),
    ],
)
def test_a_damaged_imagenet_is_told(tmp_path: Path, damage, expected: str) -> None:
    write_imagenet(tmp_path, flat=True)
    damage(tmp_path)
    with pytest.raises(UserError, match=expected):
        read_splits(ClsConfig(dataset="imagenet", data_dir=str(tmp_path), batch_size=4))


# ---- CIFAR ----


def write_cifar(
    root: Path, name: str, fashion: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> dict[str, np.ndarray]:
    """The python version of CIFAR in its format, from its own images, and its checksums in torchvision's list."""
    kind, fine = (CIFAR10, 10) if name == "cifar10" else (CIFAR100, 100)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    images = np.stack([np.asarray(Image.open(file).convert("RGB")) for file, _ in photos(name)])
    labels = np.array([label for _, label in photos(name)])
    key = "labels" if fine == 10 else "fine_labels"
    # All classes must be there: copies of the images, one for each class.
    train_images = np.concatenate([images[np.arange(fine) % 20], images])
    train_labels = np.concatenate([np.arange(fine), labels])
    checksums = {}
    parts = np.array_split(np.arange(len(train_labels)), len(kind.train_list))
    contents = dict(zip((file for file, _ in kind.train_list), parts, strict=True))
    for file, chosen in contents.items():
        checksums[file] = write_pickle(folder / file, train_images[chosen], train_labels[chosen], key)
    test_file = kind.test_list[0][0]
    checksums[test_file] = write_pickle(folder / test_file, images, labels, key)
    names = [f"class {number}" for number in range(fine)]
    meta = {"label_names": names} if fine == 10 else {"fine_label_names": names}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(meta))
    digest = hashlib.md5((folder / kind.meta["filename"]).read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": digest})
    monkeypatch.setattr(kind, "train_list", [[file, checksums[file]] for file, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[test_file, checksums[test_file]]])
    return {"train_images": train_images, "train_labels": train_labels, "test_images": images, "test_labels": labels}


def write_pickle(path: Path, images: np.ndarray, labels: np.ndarray, key: str) -> str:
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    path.write_bytes(pickle.dumps({"data": rows, key: labels.tolist()}))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path: Path, fashion: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    expected = write_cifar(tmp_path, name, fashion, monkeypatch)
    data = read_splits(ClsConfig(dataset=name, data_dir=str(tmp_path), batch_size=4, val_fraction=0.0))
    for split, part in (("train", data.train), ("test", data.test)):
        assert np.array_equal(part.images, expected[f"{split}_images"])
        assert np.array_equal(part.labels, expected[f"{split}_labels"])
    assert data.train.classes[3] == "class 3"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_pickle_of_another_checksum_is_never_loaded(
    tmp_path: Path, fashion: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_cifar(tmp_path, name, fashion, monkeypatch)
    kind = CIFAR10 if name == "cifar10" else CIFAR100

    class Bomb:
        def __reduce__(self) -> tuple:
            return (tmp_path / "exploded").touch, ()

    (tmp_path / kind.base_folder / kind.train_list[0][0]).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=rf"no {name} in .*published checksums.*--download"):
        read_splits(ClsConfig(dataset=name, data_dir=str(tmp_path)))
    assert not (tmp_path / "exploded").exists()


# ---- every published row, shrunk ----

# The learning rate is for batches of 64 and more.
SHRUNK = ["--max-steps", "2", "--batch-size", "4", "--lr", "0.01", "--workers", "1", "--threads", "1", "--no-verbose"]


def shrunk_run(file: Path, data_dir: Path, tmp_path: Path, size: int, *options: str) -> dict:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "not the full|.*is not the full ImageNet-1K")
        places = [
            "--data-dir",
            str(data_dir),
            "--cache-dir",
            str(tmp_path / "cache"),
            "--output-dir",
            str(tmp_path / "run"),
        ]
        results = train_cls.main(["--config", str(file), "--image-size", str(size), *SHRUNK, *places, *options])
    assert results is not None
    assert results["final"]["step"] == 2
    assert np.isfinite(results["final"]["nll"])
    return results


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(CONFIGS.glob("imagenet/*.yaml")), ids=lambda file: file.stem)
def test_imagenet_rows_run(imagenet: Path, tmp_path: Path, file: Path) -> None:
    shrunk_run(file, imagenet, tmp_path, 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", sorted(CONFIGS.glob("cifar*/*.yaml")), ids=lambda file: f"{file.parent.name}-{file.stem}"
)
def test_cifar_rows_run(
    tmp_path: Path, fashion: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    write_cifar(tmp_path / "data", file.parent.name, fashion, monkeypatch)
    shrunk_run(file, tmp_path / "data", tmp_path, 16)


@pytest.mark.slow
def test_todays_imagenet_recipe_runs(imagenet: Path, tmp_path: Path) -> None:
    shrunk_run(
        CONFIGS / "quick/imagenet_resnet50_16.yaml", imagenet, tmp_path, 64,
        "--progressive", "32", "64", "--model", "resnet18", "--precision", "fp32", "--lr", "0.01",
    )  # fmt: skip


@pytest.mark.slow
def test_the_cutmix_command_prints_what_its_readers_look_for(
    tmp_path: Path, fashion: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar(tmp_path / "data", "cifar100", fashion, monkeypatch)
    monkeypatch.chdir(tmp_path)
    command = (
        "--net_type pyramidnet --dataset cifar100 --depth 20 --alpha 24 --batch_size 64 --lr 0.25 --expname PyraNet "
        "--epochs 3 --beta 1.0 --cutmix_prob 0.5 --no-verbose -j 1 --data-dir data --cache-dir cache"
    )
    results = train_cls.main(command.split())
    printed = capsys.readouterr().out
    errors = re.search(
        r"Best accuracy \(top-1 and 5 error\): (\S+) (\S+)\nLast accuracy \(top-1 and 5 error\): (\S+)", printed
    )
    assert errors is not None
    assert float(errors.group(1)) == pytest.approx(100 - 100 * results["best"]["top1"])
    assert float(errors.group(3)) == pytest.approx(100 - 100 * results["final"]["top1"])
    assert (tmp_path / "runs/PyraNet/results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["torch", "ffcv"])
def test_imagenet_in_two_processes(imagenet: Path, tmp_path: Path, loader: str) -> None:
    if loader == "ffcv" and importlib.util.find_spec("ffcv") is None:
        pytest.skip("FFCV is not installed")
    options = [
        "--config",
        str(CONFIGS / "imagenet/idml_cutmix.yaml"),
        "--data-dir",
        str(imagenet),
        "--image-size",
        "32",
    ]
    options += ["--model", "resnet18", "--loader", loader, "--cache-dir", str(tmp_path / "cache")]
    done = launch(2, ROOT / "train_cls.py", *options, *SHRUNK, "--output-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))
    assert results["processes"] == 2
    assert (tmp_path / "cache").is_dir() == (loader == "ffcv")
