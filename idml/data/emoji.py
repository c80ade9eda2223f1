"""Emoji as a retrieval data set: a class is a code point, an image one vendor's drawing of it, 64 px on white.

``emoji-mini`` lies in the package; ``emoji`` reads a pack in the layout of ``PACK_ARRAYS``. Both are split alike: half
of the classes to train on, half to search among, where a query looks for other vendors' drawings of its character.
"""

from __future__ import annotations

import dataclasses
import io
import zipfile
import zlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from idml.data.image_dataset import ImageDataset, Preprocessing, fit_square
from idml.data.retrieval_data import RetrievalData
from idml.errors import UserError

if TYPE_CHECKING:
    from idml.config_dml import DmlConfig

EMOJI_SIZE = 64
"""Side of the stored images in pixels."""

EMOJI_MEAN, EMOJI_STD = (0.8308, 0.7843, 0.7430), (0.2801, 0.2713, 0.3263)
"""Over the training images of emoji-mini, in [0, 1]; ``idml.data.embedded.emoji_mini`` prints them."""

CROP_PADDING = 4
"""A shift of up to 4 of 64 pixels: vendors leave margins of 0 to about 5 pixels, so the model should not see them."""

SPLIT_SEED = 0
"""Shuffles the classes before they are halved, which mixes the categories: code points are sorted by topic. With it,
raw 16x16 pixels of the 686 test classes of emoji64 (white minus colour, cosine) give the known R@1 of 0.488, and 0.380
with all images of the query's family (its own vendor's too) removed from the gallery."""

FAMILIES = {
    "noto-v1": "noto",
    "fluent": "fluent-emoji",
    "fluent-flat": "fluent-emoji",
    "fluent-emoji-flat": "fluent-emoji",
    "emojione-v1": "emojione",
}
"""Vendors that redrew their own emoji, often by retouching; each other vendor is a family of its own."""

PACK_ARRAYS = {
    "X": "uint8 (N, S, S, 3): RGB on white",
    "y": "integers (N,): class of each image",
    "vendor": "integers (N,): vendor of each image",
    "vendors": "strings (V,): names of the vendors",
    "classes": "strings (C,): code points, 1f600 for example",
    "names": "strings (C,): what the classes are called",
}
"""Arrays that a pack must have; it may have others."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EmojiPack:
    """All drawings, before they are split.

    Attributes:
        images: (N, S, S, 3) uint8.
        labels: (N,) int64, position in ``classes``.
        vendor: (N,) int64, position in ``vendors``.
        vendors: names of the icon sets.
        classes: "1f600 grinning-face" and so on.
    """

    images: np.ndarray
    labels: np.ndarray
    vendor: np.ndarray
    vendors: tuple[str, ...]
    classes: tuple[str, ...]


def read_emoji_mini(config: DmlConfig) -> RetrievalData:
    """The emoji inside the package: every class by six vendors, half of the classes to train on."""
    return _retrieval_data(load_embedded(), config.image_size or EMOJI_SIZE)


def read_emoji(config: DmlConfig) -> RetrievalData:
    """The pack that ``--data-dir`` names: the .npz file, or a folder with one .npz in it or with emoji64.npz.

    Raises:
        UserError: no pack there, or one that is damaged or not in the layout.
    """
    return _retrieval_data(load_pack(find_pack(config.data_dir)), config.image_size or EMOJI_SIZE)


def load_embedded() -> EmojiPack:
    """emoji_mini.npz, unpacked: images (N, 64, 64, 3), sorted by vendor and then by class."""
    embedded = resources.files("idml.data.embedded").joinpath("emoji_mini.npz")
    with embedded.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        labels, vendor = arrays["y"].astype(np.int64), arrays["vendor"].astype(np.int64)
        vendors = tuple(map(str, arrays["vendors"]))
        images = [unpack_sheet(arrays[f"sheet_{name}"], int((vendor == i).sum())) for i, name in enumerate(vendors)]
        classes = _class_names(arrays["classes"], arrays["names"])
    return EmojiPack(images=np.concatenate(images), labels=labels, vendor=vendor, vendors=vendors, classes=classes)


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


def split_classes(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(classes to train on, classes to test on): two halves of ``range(count)`` in ascending order, drawn at random.

    The draw depends on ``count`` alone. An odd class more is for the test.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    return np.sort(order[: count // 2]), np.sort(order[count // 2 :])


def vendor_families(vendors: tuple[str, ...]) -> np.ndarray:
    """(V,) int64: a number for each vendor, shared by those that ``FAMILIES`` holds for one.

    >>> vendor_families(("noto", "twemoji", "noto-v1")).tolist()
    [0, 1, 0]
    """
    stems = [FAMILIES.get(name, name) for name in vendors]
    return np.array([stems.index(stem) for stem in stems], np.int64)


def find_pack(data_dir: str | None) -> Path:
    """The .npz file that ``--data-dir`` means.

    Raises:
        UserError: not given, not there, or a folder with no .npz or with several and no emoji64.npz.
    """
    layout = "the .npz pack of emoji, or a folder with that file in it"
    if data_dir is None:
        raise UserError(f"dataset emoji needs --data-dir: {layout}; emoji-mini is inside the package and needs none")
    path = Path(data_dir)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"no file or folder {path}; --data-dir must be {layout}")
    if (path / "emoji64.npz").is_file():
        return path / "emoji64.npz"
    found = sorted(path.glob("*.npz"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5])
        got = f"has {len(found)} .npz files ({names})" if found else "has no .npz file"
        raise UserError(f"the folder {path} {got}; expected one, or emoji64.npz: give the file itself as --data-dir")
    return found[0]


def load_pack(path: Path) -> EmojiPack:
    """A pack in the layout of ``PACK_ARRAYS``, checked. Nothing in the file is run: pickles are refused.

    Raises:
        UserError: cannot be read, an array is missing, or is not what the layout says.
    """
    arrays = _load_arrays(path)
    for name in PACK_ARRAYS:
        _check_array(path, name, arrays[name])
    images, vendors, codes = arrays["X"], arrays["vendors"], arrays["classes"]
    _check_length(path, arrays, ("y", "vendor"), "X")
    _check_length(path, arrays, ("names",), "classes")
    for name, names in (("y", "classes"), ("vendor", "vendors")):
        values, count = arrays[name], len(arrays[names])
        outside = values[(values < 0) | (values >= count)]
        if len(outside):
            raise UserError(f"{path}: {name} must be 0 to {count - 1} ({count} {names}), got {outside[0]}")
        unique, times = np.unique(arrays[names], return_counts=True)
        if len(unique) < count:
            raise UserError(f"{path}: {names} must differ from one another, got {str(unique[times.argmax()])!r} twice")
    drawings = np.bincount(arrays["y"].astype(np.int64), minlength=len(codes))
    if (drawings == 0).any():
        raise UserError(f"{path}: class {str(codes[drawings.argmin()])!r} has no image; leave it out of classes")
    if len(codes) < 4:
        raise UserError(f"{path}: expected at least 4 classes, two to train and two to test on, got {len(codes)}")
    return EmojiPack(
        images=images,
        labels=arrays["y"].astype(np.int64),
        vendor=arrays["vendor"].astype(np.int64),
        vendors=tuple(map(str, vendors)),
        classes=_class_names(codes, arrays["names"]),
    )


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of ``PACK_ARRAYS`` from an .npz file, unchecked, or a UserError that names what cannot be read."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a whole .npz file; copy or make it again")
    arrays, name = {}, ""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in PACK_ARRAYS if name not in file.files]
            if missing:
                expected = f"{missing[0]}, {PACK_ARRAYS[missing[0]]}"
                raise UserError(f"{path} has no array {expected}; it has {', '.join(file.files) or 'none'}")
            for name in PACK_ARRAYS:
                arrays[name] = file[name]
                if not isinstance(arrays[name], np.ndarray):  # numpy gives the bytes of a member that is no array
                    raise ValueError("it is no array")
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path}: array {name} cannot be read ({error}); expected {PACK_ARRAYS.get(name, 'an .npz file')}"
        ) from None
    return arrays


def _check_array(path: Path, name: str, array: np.ndarray) -> None:
    """UserError unless the array has the type and the number of dimensions that the layout says."""
    if name == "X":
        square = array.ndim == 4 and array.shape[1] == array.shape[2] > 0 and array.shape[3] == 3
        right = array.dtype == np.uint8 and square
    else:
        right = array.ndim == 1 and array.dtype.kind in ("U" if name in ("vendors", "classes", "names") else "iu")
    if not right:
        raise UserError(f"{path}: {name} must be {PACK_ARRAYS[name]}; got {array.dtype} {array.shape}")


def _check_length(path: Path, arrays: dict[str, np.ndarray], names: tuple[str, ...], reference: str) -> None:
    """UserError unless the arrays are as long as the reference, which is not empty."""
    expected = len(arrays[reference])
    if expected == 0:
        raise UserError(f"{path}: {reference} is empty; expected {PACK_ARRAYS[reference]}")
    for name in names:
        if len(arrays[name]) != expected:
            raise UserError(f"{path}: {name} must be as long as {reference}, {expected}; got {len(arrays[name])}")


def _class_names(codes: np.ndarray, names: np.ndarray) -> tuple[str, ...]:
    return tuple(f"{code} {name}" for code, name in zip(codes, names, strict=True))


def _retrieval_data(pack: EmojiPack, size: int) -> RetrievalData:
    """The pack with its classes halved and its images brought to ``size`` pixels."""
    train, test = split_classes(len(pack.classes))
    indices = np.flatnonzero(np.isin(pack.labels, test))
    return RetrievalData(
        train=_of_classes(pack, train, size),
        test=_of_classes(pack, test, size),
        preprocessing=Preprocessing(image_size=size, mean=EMOJI_MEAN, std=EMOJI_STD, fit="whole"),
        flip=False,  # a mirrored arrow, hand or letter is another character
        crop_padding=CROP_PADDING,
        crop_fill=255,
        families=vendor_families(pack.vendors)[pack.vendor[indices]],
    )


def _of_classes(pack: EmojiPack, chosen: np.ndarray, size: int) -> ImageDataset:
    """The images of some classes ((K,) int64, ascending), in the pack's order, labelled from 0 over these classes."""
    indices = np.flatnonzero(np.isin(pack.labels, chosen))
    return ImageDataset(
        labels=np.searchsorted(chosen, pack.labels[indices]).astype(np.int64),
        classes=tuple(pack.classes[i] for i in chosen),
        images=fit_square(pack.images[indices], size),
    )
