"""Images as data URIs, small enough that some hundred fit on a page."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io

import numpy as np
from PIL import Image

from idml.data.collection import Collection
from idml.data.pixels import read_rgb

SIDE = 176
"""Longest side of a picture in pixels: sharp at the size shown also where two pixels are one."""

TINY = 64
"""Up to so many pixels a side a picture is kept as it is, in PNG, and is enlarged without smoothing."""


@dataclasses.dataclass(frozen=True, slots=True)
class Picture:
    """What an <img> needs.

    Attributes:
        uri: ``data:image/...``.
        width, height: in pixels.
    """

    uri: str
    width: int
    height: int

    @property
    def tiny(self) -> bool:
        """Whether it should be enlarged without smoothing."""
        return max(self.width, self.height) <= TINY


class Pictures:
    """The images of a collection as pictures: all of each, not only what the model sees of it."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self.of = functools.cache(self._of)

    def _of(self, position: int) -> Picture:
        dataset = self.collection.dataset
        if dataset.images is not None:
            return picture_of(np.broadcast_to(dataset.images[position], (*dataset.images.shape[1:3], 3)))
        assert dataset.paths is not None
        return encoded(read_rgb(dataset.paths[position]))


def picture_of(pixels: np.ndarray) -> Picture:
    """Of (H, W, 3) uint8."""
    return encoded(Image.fromarray(np.ascontiguousarray(pixels)))


def encoded(image: Image.Image) -> Picture:
    """Of an RGB image, made smaller where it is large."""
    kind = "PNG" if max(image.size) <= TINY else "JPEG"
    if kind == "JPEG":
        image.thumbnail((SIDE, SIDE))
    text = io.BytesIO()
    image.save(text, kind, **({"optimize": True} if kind == "PNG" else {"quality": 82}))
    uri = f"data:image/{kind.lower()};base64," + base64.b64encode(text.getvalue()).decode("ascii")
    return Picture(uri, image.width, image.height)
