"""Shared fixtures: real images in the layouts that the readers expect, and a small torch thread count."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# Test processes run beside one another; two threads each would make all of them slower.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fashion() -> dict[str, np.ndarray]:
    """The embedded arrays: train_images (5000, 28, 28), train_labels, test_images (1000, 28, 28), test_labels."""
    embedded = resources.files("idml.data.embedded").joinpath("fashion_mnist_mini.npz")
    with embedded.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture
def image_folder(tmp_path: Path, fashion: dict[str, np.ndarray]) -> Path:
    """``photos/{train,val}/<class>/*.png``: three classes, 12 training and 4 test images each, enlarged to 40x36."""
    root = tmp_path / "photos"
    for split, source, count in (("train", "train", 12), ("val", "test", 4)):
        for label, name in enumerate(("bag", "boot", "coat")):
            folder = root / split / name
            folder.mkdir(parents=True)
            original = (8, 9, 4)[label]
            members = np.flatnonzero(fashion[f"{source}_labels"] == original)[:count]
            for number, index in enumerate(members):
                image = Image.fromarray(fashion[f"{source}_images"][index]).resize((40, 36))
                image.save(folder / f"{number:03d}.png")
    return root


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs in an empty folder, so that runs/ does not land in the source tree."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
