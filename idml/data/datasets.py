"""Readers: one function per data set, each giving the splits or a UserError that says what is missing and where."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np

from idml.config_cls import ClsConfig
from idml.data.classification_folder import read_folder
from idml.data.image_dataset import (
    DataSplits,
    ImageDataset,
    Preprocessing,
    SourceData,
    fit_square,
    hold_out,
)
from idml.data.image_files import without_unreadable
from idml.data.imagenet import LAYOUT as IMAGENET_LAYOUT
from idml.data.imagenet import read_imagenet
from idml.distributed import world_size
from idml.errors import UserError
from idml.paths import missing
from idml.pretrained import with_weights_preprocessing
from idml.random_state import generator_kept

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FASHION_MEAN, FASHION_STD = (0.2860,) * 3, (0.3530,) * 3
"""Mean and standard deviation over the 60,000 training images in [0, 1]; ``fashion_mnist_mini.py`` prints them."""

CROP_PADDING = 4
"""Pixels padded before the random crop of 32-pixel images (He et al. 2016)."""


def _fashion_preprocessing(size: int) -> Preprocessing:
    return Preprocessing(image_size=size, mean=FASHION_MEAN, std=FASHION_STD, fit="whole")


DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def _gray(images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], size: int) -> ImageDataset:
    """(N, H, W) uint8 images as a data set of (N, size, size, 1)."""
    return ImageDataset(labels=labels.astype(np.int64), classes=classes, images=fit_square(images[..., None], size))


def read_fashion_mnist_mini(config: ClsConfig) -> SourceData:
    """The 6,000 embedded Fashion-MNIST images: 5,000 to train on, 1,000 to test on, balanced."""
    size = config.image_size or 32
    embedded = resources.files("idml.data.embedded").joinpath("fashion_mnist_mini.npz")
    with embedded.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        train = _gray(arrays["train_images"], arrays["train_labels"], FASHION_CLASSES, size)
        test = _gray(arrays["test_images"], arrays["test_labels"], FASHION_CLASSES, size)
    return SourceData(train=train, test=test, preprocessing=_fashion_preprocessing(size), crop_padding=CROP_PADDING)


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes (the format of MNIST), gzipped or not, as a uint8 array.

    Raises:
        UserError: it is not such a file, or its length is not what its header says.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    dimensions = data[3] if len(data) > 3 and data[:3] == b"\0\0\x08" else 0
    header = 4 + 4 * dimensions
    shape = tuple(int(n) for n in np.frombuffer(data[4:header], ">u4")) if dimensions and len(data) >= header else ()
    if not shape or len(data) - header != int(np.prod(shape)):
        raise UserError(f"{path} is not a whole IDX file of bytes; download it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_fashion_mnist(config: ClsConfig) -> SourceData:
    """The full Fashion-MNIST, 60,000 + 10,000 images, from ``--data-dir``, the Debian package, or a download."""
    size = config.image_size or 32
    if config.download:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(config.data_dir or "data", download=True)
    roots = [Path(config.data_dir or "data")]
    folders = [folder for root in roots for folder in (root, root / "FashionMNIST" / "raw", root / "raw")]
    if config.data_dir is None:
        folders.append(DEBIAN_FASHION_MNIST)
    for folder in folders:
        for suffix in ("", ".gz"):
            names = [f"{part}-{kind}{suffix}" for part in ("train", "t10k") for kind in _IDX_KINDS]
            if all((folder / name).is_file() for name in names):
                arrays = [read_idx(folder / name) for name in names]
                train = _gray(arrays[0], arrays[1], FASHION_CLASSES, size)
                test = _gray(arrays[2], arrays[3], FASHION_CLASSES, size)
                return SourceData(
                    train=train, test=test, preprocessing=_fashion_preprocessing(size), crop_padding=CROP_PADDING
                )
    gone = f" (there is {missing(roots[0])})" if config.data_dir is not None and not roots[0].is_dir() else ""
    raise UserError(
        f"no Fashion-MNIST in {', '.join(map(str, folders))}{gone}: expected train-images-idx3-ubyte[.gz], "
        "train-labels-idx1-ubyte[.gz] and the same for t10k; install the Debian package dataset-fashion-mnist, "
        "or give --download, or --data-dir with the folder that has them"
    )


_IDX_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")


def read_digits(config: ClsConfig) -> SourceData:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; every fifth image of a class is for the test."""
    with generator_kept():
        from sklearn.datasets import load_digits

    size = config.image_size or 32
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    dataset = _gray(images, bunch.target, tuple(str(name) for name in bunch.target_names), size)
    position = np.zeros(len(dataset), np.int64)
    for label in range(len(dataset.classes)):
        members = dataset.labels == label
        position[members] = np.arange(members.sum())
    test = position % 5 == 4
    return SourceData(
        train=dataset.subset(np.flatnonzero(~test)),
        test=dataset.subset(np.flatnonzero(test)),
        preprocessing=Preprocessing(image_size=size, fit="whole"),
        flip=False,
        crop_padding=CROP_PADDING,
    )


CIFAR_MEAN, CIFAR_STD = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)
"""Statistics that the CutMix recipe normalises CIFAR-10 and CIFAR-100 with."""


def read_cifar(config: ClsConfig) -> SourceData:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009), 50,000 + 10,000 images, from the python pickles in ``--data-dir``.

    torchvision reads them, and only after their checksums were found right: a pickle can run anything.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if config.dataset == "cifar10" else CIFAR100
    root, size = config.data_dir or "data", config.image_size or 32
    try:
        train, test = (kind(root, train=is_train, download=config.download) for is_train in (True, False))
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0] if Path(root).is_dir() else f"there is {missing(root)}"
        raise UserError(
            f"no {config.dataset} in {root} ({reason}): expected {root}/{kind.base_folder} as its "
            f"archive {kind.filename} unpacks, with the published checksums; put it there, or give --download"
        ) from None
    splits = [
        ImageDataset(
            labels=np.array(part.targets, np.int64), classes=tuple(part.classes), images=fit_square(part.data, size)
        )
        for part in (train, test)
    ]
    preprocessing = Preprocessing(image_size=size, mean=CIFAR_MEAN, std=CIFAR_STD, fit="whole")
    return SourceData(train=splits[0], test=splits[1], preprocessing=preprocessing, crop_padding=CROP_PADDING)


def read_imagenet_splits(config: ClsConfig) -> SourceData:
    """ImageNet-1K: trained on train/, figures of val/. Its files are checked as they are read, not all beforehand."""
    if config.data_dir is None:
        raise UserError(f"dataset imagenet needs --data-dir: {IMAGENET_LAYOUT}")
    train, val = read_imagenet(Path(config.data_dir))
    if config.skip_bad_images:
        train = without_unreadable(train, skip=True, workers=config.workers)
        val = without_unreadable(val, skip=True, workers=config.workers)
    return SourceData(train=train, test=val, preprocessing=Preprocessing(image_size=config.image_size or 224))


READERS: dict[str, Callable[[ClsConfig], SourceData]] = {
    "fashion-mnist-mini": read_fashion_mnist_mini,
    "fashion-mnist": read_fashion_mnist,
    "digits": read_digits,
    "cifar10": read_cifar,
    "cifar100": read_cifar,
    "imagenet": read_imagenet_splits,
    "folder": read_folder,
}


def read_splits(config: ClsConfig) -> DataSplits:
    """The data that a config asks for, checked for what would make training fail or mean nothing.

    Where the config leaves ``image_size``, ``flip`` and ``crop_padding`` open, the data set's own values are filled in.
    Images are prepared as the run's weights expect them (see ``with_weights_preprocessing``).
    ``--val-fraction`` holds images out of the training images: as validation split, and, where the data set has no test
    split, the same share before that as the test images; without ``--introspect`` there are then no others.

    Raises:
        UserError: data missing or damaged, one class only, an empty class, fewer images than a batch; or the run's
            weights cannot be read.
    """
    source = READERS[config.dataset](config)
    train, test, val = source.train, source.test, None
    _check_labels(train, "training")
    assert config.val_fraction is not None, "filled in when the options are read"
    own_test = test is not None
    if test is None:
        train, test = hold_out(train, config.val_fraction, config.seed)
    # What introspects a model is not to be what tests it.
    if config.val_fraction > 0 and (own_test or config.introspect):
        train, val = hold_out(train, config.val_fraction, config.seed)
    _check_labels(test, "test")
    if config.batch_size > len(train):
        raise UserError(f"--batch-size {config.batch_size} is larger than the {len(train)} training images")
    for name, split in (("test", test), ("validation", val)):
        if split is not None and len(split) < world_size():
            advice = "; --val-fraction 0 holds none out" if split is val else ""
            raise UserError(
                f"{len(split)} {name} images are too few for {world_size()} processes: each needs one{advice}"
            )
    config.image_size = source.preprocessing.image_size
    config.flip = source.flip if config.flip is None else config.flip
    config.crop_padding = source.crop_padding if config.crop_padding is None else config.crop_padding
    preprocessing = with_weights_preprocessing(source.preprocessing, config)
    return DataSplits(train=train, test=test, val=val, preprocessing=preprocessing)


def _check_labels(dataset: ImageDataset, name: str) -> None:
    """UserError unless there are images, at least two classes, and every label is one of them and every class used."""
    classes, labels = dataset.classes, dataset.labels
    if len(dataset) == 0:
        raise UserError(f"there are no {name} images")
    outside = labels[(labels < 0) | (labels >= len(classes))]
    if len(outside):
        raise UserError(f"labels of the {name} images must be 0 to {len(classes) - 1}, got {outside[0]}")
    counts = np.bincount(labels, minlength=len(classes))
    if (counts > 0).sum() < 2:
        raise UserError(f"expected {name} images of at least 2 classes, got {classes[int(counts.argmax())]!r} only")
    if name == "training" and (counts == 0).any():
        raise UserError(f"no {name} image is left of class {classes[int(counts.argmin())]!r}")
