"""From image files to pixels: which formats are read, and how any picture becomes an upright RGB image of 8 bits."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

PIXELS_VERSION = 2
"""Raised whenever a file becomes other pixels than before, so that what was made of files (.beton, parts of embeddings)
is made again. 2: upright (EXIF), wide greys scaled by their range."""

EXCLUDED = {
    "EPS": "pages, which Pillow has drawn by another program",
    "WMF": "drawings, which Pillow renders on Windows alone",
    "MPEG": "films, of which Pillow only tells the size",
    "BUFR": "measurements, which Pillow leaves to other packages",
    "GRIB": "measurements, which Pillow leaves to other packages",
    "HDF5": "measurements, which Pillow leaves to other packages",
    "PCD": "Photo CDs of the nineties; files with this suffix are point clouds today",
}
"""Formats that Pillow opens and that are not read here, and why."""

COMMON_SUFFIXES = (".jpg", ".png", ".webp", ".tif")
"""Named in errors, for all of them."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image upright, by its orientation (EXIF 2.3, tag 274). Pillow's own function rewrites the other tags,
too, and fails where one of them is damaged."""

METADATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
"""Where an image keeps its orientation."""

SIXTEEN_BITS = 65535.0

_8_BIT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")


_reading_tags = threading.Lock()
"""What hides warnings hides them from all threads, and must not be left in another order than it was entered."""


def image_suffixes() -> frozenset[str]:
    """The suffixes of all files that are read, in lower case: those of Pillow's formats but for ``EXCLUDED``."""
    suffixes = Image.registered_extensions()
    read = Image.OPEN.keys() - EXCLUDED.keys() | {"MPO"}  # MPO has no entry of its own: it opens as a JPEG
    return frozenset(suffix for suffix, name in suffixes.items() if name in read)


def check_pixels(image: Image.Image) -> None:
    """ValueError for an opened, not yet decoded image of so many pixels that it may be a decompression bomb."""
    width, height = image.size
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels are more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million; it may be a "
            "decompression bomb"
        )


def open_image(path: Path) -> Image.Image:
    """The file as Pillow's image, not yet decoded; to be closed.

    Raises:
        OSError, ValueError, SyntaxError or Image.DecompressionBombError: Pillow knows no such format, it is one of
            ``EXCLUDED``, or too large.
    """
    image = Image.open(path)
    try:
        if image.format in EXCLUDED:
            raise ValueError(f"{image.format} files are not read: {EXCLUDED[image.format]}")
        check_pixels(image)
    except ValueError:
        image.close()
        raise
    return image


def read_rgb(path: Path) -> Image.Image:
    """The file as an upright RGB image; see ``as_rgb``. Of an animation it is the first picture.

    Raises:
        OSError or ValueError, whatever it is about the file that Pillow stumbles over; also where it is too large.
    """
    try:
        with open_image(path) as image:
            return as_rgb(image)
    except Exception as error:
        raise readable_error(error) from None


def readable_error(error: Exception) -> Exception:
    """Of what reading a file has raised: the same if it is an OSError or ValueError, else a ValueError that says it.

    A format's reader may raise anything when it is fed damaged bytes. What torch raises when a loader's process ends is
    not about the file.
    """
    if isinstance(error, (OSError, ValueError)) or str(error).startswith("DataLoader worker"):
        return error
    return ValueError(f"{error}" if isinstance(error, (SyntaxError, Image.DecompressionBombError)) else repr(error))


def orientation(image: Image.Image) -> int:
    """How the image is stored, 1 (upright) to 8; see ``TURNS``. 1 where that is not said, or damaged."""
    try:
        with _reading_tags, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # it would complain of each damaged tag of each photo
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow parses the tags of a damaged file as far as it can, and fails in many ways
        return 1
    return value if value in TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """The image as it is meant to be seen, which is itself where it is stored so."""
    image.load()  # some formats keep the orientation behind the pixels, and TIFF turns them while it decodes
    turn = TURNS.get(orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in METADATA:  # or it would be turned once more
        turned.info.pop(key, None)
    return turned


def as_rgb(image: Image.Image) -> Image.Image:
    """The image upright and in RGB, a new one; palettes, CMYK and greys of any depth are converted.

    Greys of more than 8 bits are scaled: those of 16 bits by their full range, others as ``scaled_grey`` says. Opacity
    is dropped.

    Raises:
        ValueError: no pixel is a finite number.
    """
    seen = upright(image)
    if seen.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(seen) >> 8).astype(np.uint8)).convert("RGB")
    if has_wide_grey(image):
        return Image.fromarray(scaled_grey(np.asarray(seen))).convert("RGB")
    if seen.mode == "I":
        return Image.fromarray(np.clip(np.asarray(seen) >> 8, 0, 255).astype(np.uint8)).convert("RGB")
    return seen.convert("RGB")


def has_wide_grey(image: Image.Image) -> bool:
    """Whether its pixels are floating numbers or integers of 32 bits, of which no format says what white is."""
    # Pillow gives a PGM of more than 8 bits as 32, brought to 16 bits; so did its older versions a PNG.
    return image.mode == "F" or (image.mode == "I" and image.format not in ("PPM", "PNG"))


def has_8_bits(image: Image.Image) -> bool:
    """Whether the conversion to RGB cannot fail."""
    return image.mode in _8_BIT_MODES


def scaled_grey(values: np.ndarray) -> np.ndarray:
    """Greys of an unknown range as 8 bits.

    Floating numbers from 0 to 1 are scaled by 255. Numbers from 0 up to 255, or up to 65535, are taken as of 8 or 16
    bits if the highest is more than a sixteenth of that. All others are scaled from the image's own lowest number to
    its highest, so that nothing comes out black that is not. Numbers that are not finite become the lowest, +inf the
    highest.

    Args:
        values: (H, W) of any real type.

    Returns:
        (H, W) uint8.

    Raises:
        ValueError: no number is finite.
    """
    floating = values.dtype.kind == "f"
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("none of its pixels is a finite number")
    low, high = float(values[finite].min()), float(values[finite].max())
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    if low >= 0:
        tops = [top for top in (255.0, SIXTEEN_BITS) if top / 16 < high <= top]
        tops = [1.0] if floating and high <= 1 else tops
        low, high = (0.0, tops[0]) if tops else (low, high)
    if low == high:  # nothing to be seen
        return np.full(values.shape, 128 if low else 0, np.uint8)
    return np.round((values - low) * (255.0 / (high - low))).astype(np.uint8)
