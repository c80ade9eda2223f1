"""Crops: the hash behind them, torchvision's definitions, and the compiled versions."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from idml.data import crops

needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba, which comes with FFCV, is not installed"
)


def draw_crops(count: int, height: int, width: int) -> np.ndarray:
    """(count, 4) windows of an image."""
    return np.array([crops.random_resized_crop(height, width, 1, 2, i, 0.08, 1.0) for i in range(count)])


def test_hash_is_uniform_and_every_argument_matters() -> None:
    values = np.array([crops.hash_uniform(1, 0, sample, draw) for sample in range(2000) for draw in range(5)])
    counts = np.histogram(values, bins=10, range=(0, 1))[0]
    # Chi-squared with 9 degrees of freedom: 27.9 is its 0.1 % point.
    assert ((counts - 1000) ** 2 / 1000).sum() < 27.9
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.04
    base = (3, 4, 5, 6)
    changed = [crops.hash_uniform(*(v + (i == place) for i, v in enumerate(base))) for place in range(4)]
    assert len({crops.hash_uniform(*base), *changed}) == 5


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 2**31), st.integers(0, 1000), st.integers(0, 10**6))
def test_crop_lies_inside_the_image(height: int, width: int, seed: int, epoch: int, sample: int) -> None:
    top, left, h, w = crops.random_resized_crop(height, width, seed, epoch, sample, 0.08, 1.0)
    assert 0 <= top <= height - h and 0 <= left <= width - w
    assert h >= 1 and w >= 1


def test_crops_are_distributed_as_torchvisions() -> None:
    ours = draw_crops(3000, 300, 400)
    torch.manual_seed(0)
    image = torch.empty(3, 300, 400)
    theirs = np.array([v2.RandomResizedCrop.make_params(v2.RandomResizedCrop(224), [image]) for _ in range(3000)])
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs])
    # Three standard errors of the difference of two means of 3000.
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 3 * np.sqrt(2 / 3000) * theirs.std(0)).all()
    assert np.abs(ours.std(0) / theirs.std(0) - 1).max() < 0.06


def test_image_too_narrow_for_any_window_gets_the_central_one() -> None:
    top, left, height, width = crops.random_resized_crop(400, 10, 0, 0, 0, 0.9, 1.0)
    assert (left, width) == (0, 10)
    assert height == round(10 / 0.75) and top == (400 - height) // 2
    assert crops.random_resized_crop(10, 400, 0, 0, 0, 0.9, 1.0) == (0, (400 - 13) // 2, 10, 13)


def test_center_crop() -> None:
    assert crops.center_crop(100, 60, 0.5) == (35, 15, 30, 30)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (401, 299), (256, 256), (90, 1000), (37, 36)])
def test_eval_plan_is_torchvisions_resize_and_center_crop(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    plan = crops.plan_eval(np.array([height]), np.array([width]), 224, 256)[0]
    assert plan[:4].tolist() == [0, 0, height, width]
    resized = image.resize((int(plan[5]), int(plan[4])), Image.Resampling.BILINEAR)
    ours = np.asarray(resized)[plan[6] : plan[6] + 224, plan[7] : plan[7] + 224]
    theirs = np.asarray(transforms.center_crop(transforms.resize(image, [256]), [224, 224]))
    np.testing.assert_array_equal(ours, theirs)


def test_whole_plan_takes_everything() -> None:
    np.testing.assert_array_equal(crops.plan_whole(32, 2), [[0, 0, 32, 32, 32, 32, 0, 0]] * 2)


@needs_numba
def test_compiled_crops_equal_python_over_10000_draws() -> None:
    from idml.data import kernels

    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 3000, (2, 10_000))
    samples = rng.integers(0, 2**40, 10_000)
    for count, seed, epoch in ((5000, 0, 0), (5000, 2**31, 299)):
        part = slice(0, count) if seed == 0 else slice(count, None)
        arguments = heights[part], widths[part], samples[part], seed, epoch, 224, 0.08, 1.0
        np.testing.assert_array_equal(kernels.plan_train(*arguments), crops.plan_train(*arguments))
    np.testing.assert_array_equal(
        kernels.plan_eval(heights, widths, 224, 256), crops.plan_eval(heights, widths, 224, 256)
    )
    assert kernels.hash_uniform(-1, 2, 3, 4) == crops.hash_uniform(-1, 2, 3, 4)
    assert math.isclose(kernels.hash_uniform(1, 2, 3, 4), crops.hash_uniform(1, 2, 3, 4), rel_tol=0)
