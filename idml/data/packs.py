"""Packs: .npz files with drawings of classes by vendors. Emoji and icons are read from them and split alike: half of
the classes to train on, half to search among."""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from pathlib import Path

import numpy as np

from idml.data.image_dataset import ImageDataset, Preprocessing, fit_square
from idml.data.retrieval_data import RetrievalData
from idml.data.walk import entries_of
from idml.errors import UserError
from idml.paths import missing

SPLIT_SEED = 0
"""Shuffles the classes before they are halved, which mixes the categories: code points are sorted by topic. With it,
raw 16x16 pixels of the 686 test classes of emoji64 (white minus colour, cosine) give the known R@1 of 0.488, and 0.380
with all images of the query's family (its own vendor's too) removed from the gallery."""

PACK_ARRAYS = {
    "X": "uint8 (N, S, S, 3): RGB on white",
    "y": "integers (N,): class of each image",
    "vendor": "integers (N,): vendor of each image",
    "vendors": "strings (V,): names of the vendors",
    "classes": "strings (C,): code points, 1f600 for example, or names",
    "names": "strings (C,): what the classes are called",
}
"""Arrays that a pack must have; it may have others."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """All drawings, before they are split.

    Attributes:
        images: (N, S, S, 3) uint8.
        labels: (N,) int64, position in ``classes``.
        vendor: (N,) int64, position in ``vendors``.
        vendors: names of the icon sets.
        classes: "1f600 grinning-face" and so on; "home" where code and name are one.
    """

    images: np.ndarray
    labels: np.ndarray
    vendor: np.ndarray
    vendors: tuple[str, ...]
    classes: tuple[str, ...]


def split_classes(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(classes to train on, classes to test on): two halves of ``range(count)`` in ascending order, drawn at random.

    The draw depends on ``count`` alone. An odd class more is for the test.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    return np.sort(order[: count // 2]), np.sort(order[count // 2 :])


def find_pack(data_dir: str | None, dataset: str, usual: str, hint: str) -> Path:
    """The .npz file that ``--data-dir`` means.

    Args:
        data_dir: the file, or a folder with it in.
        dataset: value of ``--dataset``, for the error.
        usual: the file's usual name, which is preferred where a folder has several .npz files.
        hint: where to get the data set, for the error.

    Raises:
        UserError: not given, not there, or a folder with no .npz or with several and none of the usual name.
    """
    layout = f"the .npz pack of {dataset}, or a folder with that file in it"
    if data_dir is None:
        raise UserError(f"dataset {dataset} needs --data-dir: {layout}; {hint}")
    path = Path(data_dir)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{missing(path, 'file or folder')}; --data-dir must be {layout}")
    if (path / usual).is_file():
        return path / usual
    found = [path / entry.name for entry in entries_of(path) if entry.name.endswith(".npz")]
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5])
        got = f"has {len(found)} .npz files ({names})" if found else "has no .npz file"
        raise UserError(f"the folder {path} {got}; expected one, or {usual}: give the file itself as --data-dir")
    return found[0]


def load_pack(path: Path) -> Pack:
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
    return Pack(
        images=images,
        labels=arrays["y"].astype(np.int64),
        vendor=arrays["vendor"].astype(np.int64),
        vendors=tuple(map(str, vendors)),
        classes=class_names(codes, arrays["names"]),
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


def class_names(codes: np.ndarray, names: np.ndarray) -> tuple[str, ...]:
    """Code and name of each class, or one of them where they are the same; both are (C,) strings."""
    pairs = zip(map(str, codes), map(str, names), strict=True)
    return tuple(code if code == name else f"{code} {name}" for code, name in pairs)


def retrieval_data(
    pack: Pack,
    preprocessing: Preprocessing,
    *,
    families: np.ndarray,
    crop_padding: int,
    drawn: np.ndarray | None = None,
) -> RetrievalData:
    """The pack with its classes halved and its images brought to ``preprocessing.image_size`` pixels.

    Args:
        families: (V,) int64, a number for each vendor, shared by those that draw nearly alike.
        crop_padding: pixels, see ``RetrievalData``.
        drawn: (C,) bool, the classes to take; they are chosen after the split, so that a class stays on its side.
    """
    halves = [half if drawn is None else half[drawn[half]] for half in split_classes(len(pack.classes))]
    train, test = halves
    indices = np.flatnonzero(np.isin(pack.labels, test))
    return RetrievalData(
        train=_of_classes(pack, train, preprocessing.image_size),
        test=_of_classes(pack, test, preprocessing.image_size),
        preprocessing=preprocessing,
        flip=False,  # a mirrored arrow, hand or letter is another character
        crop_padding=crop_padding,
        crop_fill=255,
        families=families[pack.vendor[indices]],
    )


def _of_classes(pack: Pack, chosen: np.ndarray, size: int) -> ImageDataset:
    """The images of some classes ((K,) int64, ascending), in the pack's order, labelled from 0 over these classes."""
    indices = np.flatnonzero(np.isin(pack.labels, chosen))
    return ImageDataset(
        labels=np.searchsorted(chosen, pack.labels[indices]).astype(np.int64),
        classes=tuple(pack.classes[i] for i in chosen),
        images=fit_square(pack.images[indices], size),
    )
