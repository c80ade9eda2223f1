"""Emoji as a retrieval data set: a class is a code point, an image one vendor's drawing of it, 64 px on white.

``emoji-mini`` lies in the package; ``emoji`` reads a pack in the layout of ``packs.PACK_ARRAYS``. Both are split alike:
half of the classes to train on, half to search among, where a query looks for other vendors' drawings of its character.
"""

from __future__ import annotations

import io
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from idml.data.image_dataset import Preprocessing
from idml.data.packs import Pack, class_names, find_pack, load_pack, retrieval_data
from idml.data.packs import split_classes as split_classes  # its name from before there were other packs
from idml.data.retrieval_data import RetrievalData

if TYPE_CHECKING:
    from idml.config_dml import DmlConfig

EMOJI_SIZE = 64
"""Side of the stored images in pixels."""

EMOJI_MEAN, EMOJI_STD = (0.8308, 0.7843, 0.7430), (0.2801, 0.2713, 0.3263)
"""Over the training images of emoji-mini, in [0, 1]; ``idml.data.embedded.emoji_mini`` prints them."""

CROP_PADDING = 4
"""A shift of up to 4 of 64 pixels: vendors leave margins of 0 to about 5 pixels, so the model should not see them."""

FAMILIES = {
    "noto-v1": "noto",
    "fluent": "fluent-emoji",
    "fluent-flat": "fluent-emoji",
    "fluent-emoji-flat": "fluent-emoji",
    "emojione-v1": "emojione",
}
"""Vendors that redrew their own emoji, often by retouching; each other vendor is a family of its own."""


def read_emoji_mini(config: DmlConfig) -> RetrievalData:
    """The emoji inside the package: every class by six vendors, half of the classes to train on."""
    return _retrieval_data(load_embedded(), config.image_size)


def read_emoji(config: DmlConfig) -> RetrievalData:
    """The pack that ``--data-dir`` names: the .npz file, or a folder with one .npz in it or with emoji64.npz.

    Raises:
        UserError: no pack there, or one that is damaged or not in the layout.
    """
    path = find_pack(config.data_dir, "emoji", "emoji64.npz", "emoji-mini is inside the package and needs none")
    return _retrieval_data(load_pack(path), config.image_size)


def load_embedded() -> Pack:
    """emoji_mini.npz, unpacked: images (N, 64, 64, 3), sorted by vendor and then by class."""
    embedded = resources.files("idml.data.embedded").joinpath("emoji_mini.npz")
    with embedded.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        labels, vendor = arrays["y"].astype(np.int64), arrays["vendor"].astype(np.int64)
        vendors = tuple(map(str, arrays["vendors"]))
        images = [unpack_sheet(arrays[f"sheet_{name}"], int((vendor == i).sum())) for i, name in enumerate(vendors)]
        classes = class_names(arrays["classes"], arrays["names"])
    return Pack(images=np.concatenate(images), labels=labels, vendor=vendor, vendors=vendors, classes=classes)


def unpack_sheet(data: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` images of a contact sheet, row by row.

    Args:
        data: (bytes,) uint8, an image file whose sides are multiples of 64 pixels.

    Returns:
        (count, 64, 64, 3) uint8.
    """
    with Image.open(io.BytesIO(data.tobytes())) as image:
        sheet = np.asarray(image.convert("RGB"))
    rows, columns = sheet.shape[0] // EMOJI_SIZE, sheet.shape[1] // EMOJI_SIZE
    cells = sheet.reshape(rows, EMOJI_SIZE, columns, EMOJI_SIZE, 3).transpose(0, 2, 1, 3, 4)
    return cells.reshape(rows * columns, EMOJI_SIZE, EMOJI_SIZE, 3)[:count]


def vendor_families(vendors: tuple[str, ...]) -> np.ndarray:
    """(V,) int64: a number for each vendor, shared by those that ``FAMILIES`` holds for one.

    >>> vendor_families(("noto", "twemoji", "noto-v1")).tolist()
    [0, 1, 0]
    """
    stems = [FAMILIES.get(name, name) for name in vendors]
    return np.array([stems.index(stem) for stem in stems], np.int64)


def _retrieval_data(pack: Pack, size: int | None) -> RetrievalData:
    """The pack with its classes halved and its images brought to ``size`` pixels, if any is given."""
    preprocessing = Preprocessing(image_size=size or EMOJI_SIZE, mean=EMOJI_MEAN, std=EMOJI_STD, fit="whole")
    families = vendor_families(pack.vendors)
    return retrieval_data(pack, preprocessing, families=families, crop_padding=CROP_PADDING)
