"""Models of every kind, trained for a step or two on a few real images, for tests of what is done with models."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

import train_cls
import train_dml

COMMON = ["--max-steps", "2", "--no-verbose", "--loader", "torch", "--workers", "0", "--threads", "1", "--image-size"]
SMALL = ["--model", "resnet8_cifar", *COMMON, "32"]
VIT = ["--model", "vit_tiny_patch16_224", "--model-kwargs", "depth=3"]
INTROSPECTED = ["--val-fraction", "0.3"]
"""Images are held out, which an introspection is fitted with after training; without them none is."""
NOTHING_HELD_OUT = ["--val-fraction", "0"]
LIVE = ["--method", "ism", *INTROSPECTED]

CLASSIFIERS = {
    "off": ["--method", "mixup", *NOTHING_HELD_OUT, *SMALL],
    "off introspected": ["--method", "mixup", *INTROSPECTED, *SMALL],
    "live": [*LIVE, *SMALL],
    "ISM alone": ["--method", "ism", *NOTHING_HELD_OUT, *SMALL],
    "released": ["--method", "ism", "--ism", "released", *NOTHING_HELD_OUT, *SMALL],
    "resnet10t": [*LIVE, "--model", "resnet10t", *COMMON, "64"],
    "mobilenetv3": [*LIVE, "--model", "mobilenetv3_small_050", *COMMON, "64"],
    "vit": [*LIVE, *VIT, *COMMON, "48"],
}
"""Options of a run of train_cls.py, by what is particular about it."""

RETRIEVAL = ["--embedding-size", "16", "--warm", "0", "--bn-freeze", "0", "--no-nmi"]
CLASSES_HELD_OUT = ["--val-fraction", "0.4"]

EMBEDDERS = {
    "retrieval off": ["--ism", "off", *NOTHING_HELD_OUT, *RETRIEVAL, *SMALL],
    "retrieval live": ["--ism", "live", *CLASSES_HELD_OUT, *RETRIEVAL, *SMALL],
    "retrieval ISM alone": ["--ism", "live", *NOTHING_HELD_OUT, *RETRIEVAL, *SMALL],
    "retrieval released": ["--ism", "released", "--loss", "MS", *NOTHING_HELD_OUT, *RETRIEVAL, *SMALL],
    "retrieval vit": [*CLASSES_HELD_OUT, *VIT, *RETRIEVAL, *COMMON, "48"],
}
"""The same of train_dml.py."""


def write_photos(root: Path, *, classes: int = 3, train: int = 12, test: int = 8) -> Path:
    """``root/{train,val}/<class>/*.png``: clothes of Fashion-MNIST, enlarged to 40 x 36 pixels."""
    embedded = resources.files("idml.data.embedded").joinpath("fashion_mnist_mini.npz")
    with embedded.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        for split, source, count in (("train", "train", train), ("val", "test", test)):
            for label in range(classes):
                folder = root / split / f"class {label}"
                folder.mkdir(parents=True)
                members = np.flatnonzero(arrays[f"{source}_labels"] == label)[:count]
                for number, index in enumerate(members):
                    Image.fromarray(arrays[f"{source}_images"][index]).resize((40, 36)).save(
                        folder / f"{number:03d}.png"
                    )
    return root


def write_searched(root: Path) -> Path:
    """``root/<class>/*.png``: ten classes of six images, half of them to train on."""
    write_photos(root / "all", classes=10, train=6, test=0)
    (root / "all" / "train").rename(root / "photos")
    return root / "photos"


def train_tiny(kind: str, photos: Path, run: Path) -> Path:
    """Train a model on ``write_photos`` (a classifier) or ``write_searched``; gives the run directory."""
    if kind in CLASSIFIERS:
        options = ["--dataset", "folder", "--data-dir", str(photos), "--batch-size", "16", *CLASSIFIERS[kind]]
        train_cls.main([*options, "--output-dir", str(run)])
    else:
        options = ["--dataset", "folder", "--data-dir", str(photos), "--batch-size", "12", *EMBEDDERS[kind]]
        train_dml.main([*options, "--output-dir", str(run)])
    return run
