"""Colour jitter against torchvision, lighting and normalisation against NumPy, on photographs."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from augment import (
    ColorJitterParams,
    apply_color_jitter,
    apply_lighting,
    denormalise,
    normalise,
    sample_color_jitter,
    sample_lighting,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
REFERENCE_OPERATIONS = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation)
ORDERS = list(itertools.permutations(range(3)))
ROUNDING = 1e-3  # of values up to 255: a few float32 steps of 3e-5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def photographs() -> Tensor:
    """Windows of scikit-learn's two photographs, a temple under a bright sky and a flower: (12, 3, 40, 56) uint8."""
    windows = [
        photograph[top : top + 40, left : left + 56]
        for photograph in load_sample_images().images
        for top in (0, 190, 380)
        for left in (100, 400)
    ]
    return torch.from_numpy(np.stack(windows)).permute(0, 3, 1, 2).contiguous()


def every_order(factors: tuple[float, float, float]) -> ColorJitterParams:
    """The same factors in each of the six orders, twice over: parameters for all photographs."""
    return ColorJitterParams(torch.tensor([factors] * 12), torch.tensor(ORDERS * 2))


def torchvision_jitter(images: Tensor, params: ColorJitterParams) -> Tensor:
    """One operation after another on one image after another, in [0, 1] as torchvision wants it."""
    adjusted = []
    for image, factors, order in zip(
        images.double() / 255, params.factors.tolist(), params.order.tolist(), strict=True
    ):
        for operation in order:
            image = REFERENCE_OPERATIONS[operation](image, factors[operation])
        adjusted.append(image * 255)
    return torch.stack(adjusted).float()


# --- colour jitter --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", range(3))
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4, 3.0])
def test_each_operation_equals_torchvision_s(operation: int, factor: float) -> None:
    images, factors = photographs(), torch.ones(12, 3)
    factors[:, operation] = factor
    params = ColorJitterParams(factors, torch.tensor([ORDERS[0]] * 12))
    expected = torch.stack([REFERENCE_OPERATIONS[operation](image / 255, factor) * 255 for image in images])
    torch.testing.assert_close(apply_color_jitter(images, params), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("factors", [(1.4, 1.4, 1.4), (0.6, 1.4, 0.7), (1.3, 0.6, 1.2)])
def test_orders_are_followed_as_torchvision_would(factors: tuple[float, float, float]) -> None:
    images, params = photographs()[:1].expand(12, -1, -1, -1), every_order(factors)
    adjusted = apply_color_jitter(images, params)
    torch.testing.assert_close(adjusted, torchvision_jitter(images, params), rtol=0, atol=ROUNDING)
    different = {tuple(image.flatten().round().tolist()) for image in adjusted}
    assert len(different) > 1  # clipping makes the order matter, or following it would prove nothing


def test_drawn_parameters_give_what_torchvision_gives() -> None:
    for seed in range(5):
        params = sample_color_jitter(12, brightness=0.4, contrast=0.9, saturation=2.0, generator=generator(seed))
        adjusted = apply_color_jitter(photographs(), params)
        torch.testing.assert_close(adjusted, torchvision_jitter(photographs(), params), rtol=0, atol=ROUNDING)


@settings(max_examples=30, deadline=None)
@given(
    factors=st.tuples(*[st.floats(0, 4, width=32)] * 3),
    order=st.sampled_from(ORDERS),
    colour=st.tuples(*[st.floats(0, 255, width=32)] * 3),
)
def test_images_of_one_colour_against_the_formula(
    factors: tuple[float, float, float], order: tuple[int, int, int], colour: tuple[float, float, float]
) -> None:
    """Of such an image the mean grey and the grey of a pixel are one number, so three scalars tell the whole result."""
    expected = np.array(colour)
    for operation in order:
        grey = 0.2989 * expected[0] + 0.587 * expected[1] + 0.114 * expected[2]
        duller = grey if operation else 0.0
        expected = np.clip(factors[operation] * expected + (1 - factors[operation]) * duller, 0, 255)
    images = torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 5, 4)
    adjusted = apply_color_jitter(images, ColorJitterParams(torch.tensor([factors]), torch.tensor([order])))
    np.testing.assert_allclose(adjusted.numpy(), np.broadcast_to(expected.reshape(1, 3, 1, 1), (1, 3, 5, 4)), atol=0.01)


def test_factors_of_one_change_nothing() -> None:
    images = photographs()
    params = sample_color_jitter(12, brightness=0, contrast=0, saturation=0, generator=generator())
    assert torch.equal(apply_color_jitter(images, params), images.float())


def test_an_image_s_result_does_not_depend_on_its_batch() -> None:
    params = sample_color_jitter(12, generator=generator())
    adjusted = apply_color_jitter(photographs(), params)
    for i in (0, 7):
        alone = ColorJitterParams(params.factors[i : i + 1], params.order[i : i + 1])
        lonely = apply_color_jitter(photographs()[i : i + 1], alone)[0]
        torch.testing.assert_close(lonely, adjusted[i], rtol=0, atol=ROUNDING)  # the mean may add up in another order


def test_jitter_gradients_equal_torchvision_s() -> None:
    """torchvision differentiates a chain of out-of-place operations, apply_color_jitter one that overwrites itself."""
    params = every_order((1.3, 0.7, 1.4))
    weights = torch.rand(12, 3, 40, 56, generator=generator())
    gradients = []
    for jitter in (apply_color_jitter, torchvision_jitter):
        images = photographs().float().requires_grad_()
        gradients += torch.autograd.grad((jitter(images, params) * weights).sum(), images)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0, 2.5])
def test_factors_are_uniform_between_their_bounds(strength: float) -> None:
    params = sample_color_jitter(
        5000, brightness=strength, contrast=strength / 2, saturation=strength / 4, generator=generator()
    )
    assert params.factors.shape == (5000, 3) and params.factors.dtype == torch.float32
    for column, x in zip(params.factors.T.double().numpy(), (strength, strength / 2, strength / 4), strict=True):
        low, high = max(0.0, 1 - x), 1 + x
        assert low - 1e-6 <= column.min() and column.max() <= high + 1e-6
        if x:
            assert stats.kstest(column, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    if strength:
        # Three equal strengths would hide it if one draw served all three columns.
        assert abs(np.corrcoef(params.factors.T.numpy()) - np.eye(3)).max() < 4 / math.sqrt(5000)


def test_all_orders_are_equally_likely() -> None:
    order = sample_color_jitter(6000, generator=generator()).order
    assert order.dtype == torch.int64
    seen = [int((order == torch.tensor(permutation)).all(1).sum()) for permutation in ORDERS]
    assert sum(seen) == 6000
    assert stats.chisquare(seen).pvalue > 1e-4


# --- lighting -------------------------------------------------------------------------------------------------------


def numpy_lighting(images: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Krizhevsky et al. 2012, section 4.1: add [p1, p2, p3] [a1 l1, a2 l2, a3 l3]^T to every pixel."""
    eigenvalues = np.array([0.2175, 0.0188, 0.0045])
    eigenvectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    np.testing.assert_allclose(eigenvectors.T @ eigenvectors, np.eye(3), atol=1e-3)  # the columns are the p
    lit = []
    for image, alphas in zip(images / 255, weights, strict=True):
        colour = sum(alpha * value * p for alpha, value, p in zip(alphas, eigenvalues, eigenvectors.T, strict=True))
        lit.append(255 * (image + colour[:, None, None]))
    return np.stack(lit)


def test_lighting_equals_numpy() -> None:
    weights = sample_lighting(12, std=0.5, generator=generator())
    expected = numpy_lighting(photographs().double().numpy(), weights.double().numpy())
    lit = apply_lighting(photographs(), weights)
    np.testing.assert_allclose(lit.numpy(), expected, rtol=0, atol=ROUNDING)
    assert lit.max() > 255  # the recipe does not clip


def test_the_first_component_is_the_brightness() -> None:
    """The largest by far, and nearly grey: all three colours move alike, downwards for a positive weight."""
    lit = apply_lighting(torch.zeros(1, 3, 2, 2), torch.tensor([[1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(lit[0, :, 0, 0].numpy(), 255 * 0.2175 * np.array([-0.5675, -0.5808, -0.5836]), rtol=1e-5)


@pytest.mark.parametrize("std", [0.0, 0.1, 2.0])
def test_lighting_is_normal_with_the_deviation_asked_for(std: float) -> None:
    weights = sample_lighting(3000, std=std, generator=generator())
    assert weights.shape == (3000, 3) and weights.dtype == torch.float32
    if std:
        for column in weights.T.double().numpy():
            assert stats.kstest(column, stats.norm(scale=std).cdf).pvalue > 1e-3
        assert abs(np.corrcoef(weights.T.numpy()) - np.eye(3)).max() < 4 / math.sqrt(3000)
    else:
        assert not weights.any()


def test_lighting_under_autocast_keeps_full_precision() -> None:
    weights = sample_lighting(12, generator=generator())
    expected = apply_lighting(photographs(), weights), apply_color_jitter(photographs(), every_order((1.4, 0.6, 1.2)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(apply_lighting(photographs(), weights), expected[0])
        assert torch.equal(apply_color_jitter(photographs(), every_order((1.4, 0.6, 1.2))), expected[1])


# --- normalisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_normalise_equals_numpy(dtype: torch.dtype) -> None:
    expected = photographs().numpy() / 255 - np.array(MEAN).reshape(3, 1, 1)
    expected /= np.array(STD).reshape(3, 1, 1)
    normalised = normalise(photographs().to(dtype), MEAN, STD)
    assert normalised.dtype == torch.float32
    np.testing.assert_allclose(normalised.numpy(), expected, rtol=0, atol=1e-5)


def test_denormalise_gives_every_byte_back() -> None:
    images = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(denormalise(normalise(images, MEAN, STD), MEAN, STD), images)


def test_denormalise_clips_what_no_byte_can_hold() -> None:
    images = torch.tensor([-100.0, 100.0]).view(1, 1, 1, 2)
    assert denormalise(images, [0.5], [0.25]).flatten().tolist() == [0, 255]


@pytest.mark.parametrize("function", [normalise, denormalise])
def test_mean_and_std_need_a_value_per_channel(function: type) -> None:
    with pytest.raises(ValueError, match="each of 3 channels, got 1"):
        function(torch.zeros(2, 3, 4, 4), [0.5], STD)
    with pytest.raises(ValueError, match="each of 1 channels, got 3"):
        function(torch.zeros(2, 1, 4, 4), [0.5], STD)


# --- what all of them promise ---------------------------------------------------------------------------------------

OPERATIONS = {
    "jitter": lambda images, **flags: apply_color_jitter(images, every_order((1.4, 0.6, 0.8)), **flags),
    "lighting": lambda images, **flags: apply_lighting(images, sample_lighting(12, generator=generator()), **flags),
    "normalise": lambda images, **flags: normalise(images, MEAN, STD, **flags),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPERATIONS)
def test_bytes_and_floats_give_the_same_float32_and_stay_as_they_were(name: str, dtype: torch.dtype) -> None:
    images = photographs().to(dtype)  # bfloat16 holds every byte exactly
    kept = images.clone()
    result = OPERATIONS[name](images)
    assert result.dtype == torch.float32
    assert torch.equal(result, OPERATIONS[name](photographs()))
    assert torch.equal(images, kept)


@pytest.mark.parametrize("name", OPERATIONS)
def test_in_place_gives_the_same_in_the_same_memory(name: str) -> None:
    images = photographs().float()
    expected = OPERATIONS[name](images)
    result = OPERATIONS[name](images, inplace=True)
    assert result.data_ptr() == images.data_ptr()
    assert torch.equal(images, expected)
    with pytest.raises(TypeError, match=r"float32 images, got torch\.uint8"):
        OPERATIONS[name](photographs(), inplace=True)


@pytest.mark.parametrize("name", OPERATIONS)
def test_channels_last_images_give_the_same_and_stay_channels_last(name: str) -> None:
    result = OPERATIONS[name](photographs().contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(result, OPERATIONS[name](photographs()), rtol=0, atol=ROUNDING)
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", OPERATIONS)
def test_parameters_on_the_cpu_serve_images_elsewhere(name: str) -> None:
    """ "meta" stands for an accelerator: it refuses to meet tensors of the CPU just the same."""
    assert OPERATIONS[name](photographs().to("meta")).device.type == "meta"


def test_draws_follow_the_generator_and_nothing_else() -> None:
    def draws(seed: int) -> list[Tensor]:
        source = generator(seed)
        jitter = [tensor for _ in range(2) for tensor in sample_color_jitter(9, generator=source)]
        return [*jitter, *(sample_lighting(9, generator=source) for _ in range(2))]

    torch.manual_seed(1)
    first = draws(5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert all(torch.equal(again, before) for again, before in zip(draws(5), first, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not torch.equal(first[i], first[j]) for i, j in ((0, 2), (1, 3), (4, 5)))  # the generator moves on
    assert not torch.equal(draws(6)[0], first[0])


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_strengths_that_are_none_are_refused(value: float) -> None:
    for name in ("brightness", "contrast", "saturation"):
        with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
            sample_color_jitter(4, **{name: value}, generator=generator())
    with pytest.raises(ValueError, match=f"std must be .* got {value}"):
        sample_lighting(4, std=value, generator=generator())


@pytest.mark.parametrize("size", [1, 11, 13])
def test_parameters_for_another_batch_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"batch of 12, got {size}"):
        apply_color_jitter(photographs(), sample_color_jitter(size, generator=generator()))
    with pytest.raises(ValueError, match=f"batch of 12, got {size}"):
        apply_lighting(photographs(), sample_lighting(size, generator=generator()))


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 4, 8, 8), (3, 8, 8)])
def test_images_that_are_not_rgb_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"\(B, 3, H, W\), got \({shape[0]}, {shape[1]}, "):
        apply_color_jitter(torch.zeros(shape), sample_color_jitter(shape[0], generator=generator()))
    with pytest.raises(ValueError, match=rf"\(B, 3, H, W\), got \({shape[0]}, {shape[1]}, "):
        apply_lighting(torch.zeros(shape), sample_lighting(shape[0], generator=generator()))
