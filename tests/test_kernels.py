"""The compiled code against Pillow."""

from __future__ import annotations

import ctypes
import io
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from idml.data.beton import import_ffcv
from idml.errors import UserError

PHOTO = load_sample_images().images[0]
"""(427, 640, 3) uint8."""

EXACT_UP_TO = 13
"""The last version of Pillow whose resizing is known to the last bit; for later ones a difference of 1 is let pass."""


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    try:
        import_ffcv()
    except UserError as error:
        pytest.skip(str(error))
    from idml.data import kernels

    return kernels


def assert_as_pillow(ours: np.ndarray, theirs: np.ndarray) -> None:
    allowed = 0 if int(Image.__version__.split(".")[0]) <= EXACT_UP_TO else 1
    assert np.abs(ours.astype(int) - theirs).max() <= allowed


FILTERS = pytest.mark.parametrize("filter", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])


def resampled(
    kernels: ModuleType, pixels: np.ndarray, plan: np.ndarray, side: int, filter: Image.Resampling
) -> np.ndarray:
    planes = np.empty((3, side, side), np.uint8)
    kernels.resample(pixels, plan, planes, filter == Image.Resampling.BICUBIC)
    return planes.transpose(1, 2, 0)


@FILTERS
@pytest.mark.parametrize("pixels", [PHOTO, (PHOTO > 127).astype(np.uint8) * 255], ids=["photo", "black and white"])
def test_windows_are_resized_as_pillow_does(kernels: ModuleType, filter: Image.Resampling, pixels: np.ndarray) -> None:
    """Beside edges of black and white a cubic goes below 0 and above 255."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(1, 427), rng.integers(1, 640)
        top, left = rng.integers(0, 427 - height + 1), rng.integers(0, 640 - width + 1)
        window = Image.fromarray(pixels[top : top + height, left : left + width])
        new_height, new_width = (int(size) for size in rng.integers(8, 260, 2))
        side = min(new_height, new_width)
        y, x = rng.integers(0, new_height - side + 1), rng.integers(0, new_width - side + 1)
        theirs = np.asarray(window.resize((new_width, new_height), filter))
        plan = np.array([top, left, height, width, new_height, new_width, y, x])
        assert_as_pillow(resampled(kernels, pixels, plan, side, filter), theirs[y : y + side, x : x + side])


@FILTERS
@pytest.mark.parametrize("size", [(20, 5), (5, 20), (20, 10), (21, 10), (19, 10), (10, 10), (1, 1)])
def test_small_images_around_the_change_of_order(
    kernels: ModuleType, size: tuple[int, int], filter: Image.Resampling
) -> None:
    image = Image.fromarray(np.ascontiguousarray(PHOTO[100 : 100 + size[0], 200 : 200 + size[1]]))
    for new in [(new_height, new_width) for new_height in range(4, 24) for new_width in range(4, 24)]:
        theirs = np.asarray(image.resize((new[1], new[0]), filter))
        side = min(new)
        ours = resampled(kernels, np.asarray(image), np.array([0, 0, *size, *new, 0, 0]), side, filter)
        assert_as_pillow(ours, theirs[:side, :side])


def jpeg(pixels: np.ndarray, **options: int | bool) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{"quality": 95}, {"quality": 75, "subsampling": 0}, {"progressive": True}])
def test_jpegs_are_decoded_as_pillow_does(kernels: ModuleType, options: dict[str, int | bool]) -> None:
    stored = [jpeg(PHOTO[:101, :99], **options), jpeg(PHOTO[200:301, 300:399], **options)]
    data = np.frombuffer(b"".join(stored), np.uint8)
    sizes = np.array([len(one) for one in stored])
    columns = np.array([[kernels.JPEG] * 2, [101] * 2, [99] * 2, [0, sizes[0]], sizes])
    plan = np.array([[1, 2, 98, 97, 98, 97, 0, 0]] * 2)
    images = np.zeros((2, 3, 64, 64), np.uint8)
    assert kernels.decode_images(data, *columns, np.array([1, 0]), plan, images, False) == -1
    for one, image in zip(reversed(stored), images, strict=True):
        theirs = np.asarray(Image.open(io.BytesIO(one)))[1:65, 2:66]
        np.testing.assert_array_equal(image.transpose(1, 2, 0), theirs)


def test_damaged_jpeg_is_reported_by_its_place(kernels: ModuleType) -> None:
    whole = jpeg(PHOTO[:64, :64])
    data = np.frombuffer(whole + whole[: len(whole) // 2], np.uint8)
    columns = np.array([[kernels.JPEG] * 2, [64] * 2, [64] * 2, [0, len(whole)], [len(whole), len(whole) // 2]])
    plan = np.array([[0, 0, 64, 64, 64, 64, 0, 0]] * 3)
    images = np.zeros((3, 3, 64, 64), np.uint8)
    assert kernels.decode_images(data, *columns, np.array([0, 0, 1]), plan, images, False) == 2


def test_address_is_that_of_the_library(kernels: ModuleType) -> None:
    asked = []

    def address_of(name: str) -> int:
        asked.append(name)
        return ctypes.cast(getattr(import_ffcv().libffcv, name), ctypes.c_void_p).value or 0

    kernels.link(address_of)
    assert asked == ["tjInitDecompress", "tjDecompress2", "tjDestroy"]
