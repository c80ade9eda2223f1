"""Flip and padded crop: against torchvision image by image, and the distribution of the draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from augment import apply_crop, apply_flip, resize, sample_crop, sample_flip

DTYPES = [torch.uint8, torch.float32, torch.bfloat16]

Fashion = dict[str, np.ndarray]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def real_images(fashion: Fashion, size: int, height: int = 28, width: int = 28) -> Tensor:
    """Fashion-MNIST cut to (size, 3, height, width) uint8; the channels are three different images."""
    images = torch.tensor(fashion["train_images"][: 3 * size])
    return images.view(size, 3, 28, 28)[:, :, :height, :width].contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7])
def test_flip_equals_torchvision(fashion: Fashion, size: int, dtype: torch.dtype) -> None:
    images = real_images(fashion, size, 20).to(dtype)
    flip = torch.arange(size) % 2 == 0
    flipped = apply_flip(images, flip)
    expected = [reference.hflip(image) if mirror else image for image, mirror in zip(images, flip, strict=True)]
    assert flipped.dtype == dtype
    assert torch.equal(flipped, torch.stack(expected))
    assert torch.equal(apply_flip(flipped, flip), images)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("height", "width", "padding"), [(28, 28, 4), (20, 28, 2), (5, 3, 7), (28, 20, 0)])
def test_crop_equals_torchvision(fashion: Fashion, height: int, width: int, padding: int, dtype: torch.dtype) -> None:
    images = real_images(fashion, 7, height, width).to(dtype)
    offsets = sample_crop(7, padding=padding, generator=generator())
    cropped = apply_crop(images, offsets, padding=padding)
    expected = [
        reference.crop(reference.pad(image, [padding]), top, left, height, width)
        for image, (top, left) in zip(images, offsets.tolist(), strict=True)
    ]
    assert cropped.dtype == dtype
    assert torch.equal(cropped, torch.stack(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_crop_that_flips_is_a_crop_and_a_flip(fashion: Fashion, dtype: torch.dtype) -> None:
    images = real_images(fashion, 7, 20).to(dtype)
    offsets, flip = sample_crop(7, padding=3, generator=generator()), torch.arange(7) % 2 == 0
    together = apply_crop(images, offsets, padding=3, fill=9, flip=flip)
    assert torch.equal(together, apply_flip(apply_crop(images, offsets, padding=3, fill=9), flip))
    with pytest.raises(ValueError, match="batch of 7, got 2"):
        apply_crop(images, offsets, padding=3, flip=flip[:2])


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 28),
    width=st.integers(1, 28),
    padding=st.integers(0, 6),
    data=st.data(),
    size=st.integers(1, 4),
)
def test_crop_moves_every_pixel_by_its_offset(
    fashion: Fashion, height: int, width: int, padding: int, data: st.DataObject, size: int
) -> None:
    images = real_images(fashion, size, height, width)
    offset = st.integers(0, 2 * padding)
    offsets = torch.tensor(data.draw(st.lists(st.tuples(offset, offset), min_size=size, max_size=size)))
    cropped = apply_crop(images, offsets, padding=padding).numpy()
    padded = np.zeros((size, 3, height + 2 * padding, width + 2 * padding), np.uint8)
    padded[:, :, padding : padding + height, padding : padding + width] = images.numpy()
    for image, window, (top, left) in zip(padded, cropped, offsets.tolist(), strict=True):
        assert np.array_equal(window, image[:, top : top + height, left : left + width])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [0, 128, 255])
def test_the_padding_has_the_colour_asked_for(fashion: Fashion, dtype: torch.dtype, fill: int) -> None:
    images = real_images(fashion, 6, 20).to(dtype)
    offsets = sample_crop(6, padding=3, generator=generator())
    cropped = apply_crop(images, offsets, padding=3, fill=fill)
    expected = [
        reference.crop(reference.pad(image, [3], fill=fill), top, left, 20, 28)
        for image, (top, left) in zip(images, offsets.tolist(), strict=True)
    ]
    assert cropped.dtype == dtype
    assert torch.equal(cropped, torch.stack(expected))
    corner = apply_crop(images, torch.zeros(6, 2, dtype=torch.int64), padding=3, fill=fill)
    assert (corner[:, :, :3] == fill).all() and (corner[:, :, :, :3] == fill).all()
    assert torch.equal(corner[:, :, 3:, 3:], images[:, :, :-3, :-3])


@pytest.mark.parametrize("padding", [0, 4])
def test_the_middle_window_is_the_image(fashion: Fashion, padding: int) -> None:
    images = real_images(fashion, 5)
    assert torch.equal(apply_crop(images, torch.full((5, 2), padding), padding=padding), images)


def test_channels_last_images_give_the_same(fashion: Fashion) -> None:
    images = real_images(fashion, 6, 20)
    rearranged = images.contiguous(memory_format=torch.channels_last)
    assert rearranged.stride() != images.stride()
    flip, offsets = sample_flip(6, generator=generator()), sample_crop(6, padding=3, generator=generator())
    assert torch.equal(apply_flip(rearranged, flip), apply_flip(images, flip))
    assert torch.equal(apply_crop(rearranged, offsets, padding=3), apply_crop(images, offsets, padding=3))


def test_the_input_is_left_alone(fashion: Fashion) -> None:
    images = real_images(fashion, 4)
    kept = images.clone()
    apply_flip(images, torch.tensor([True, False, True, False])).zero_()
    apply_crop(images, torch.zeros(4, 2, dtype=torch.int64), padding=2).zero_()
    assert torch.equal(images, kept)


def test_gradients_go_back_to_where_the_pixels_came_from(fashion: Fashion) -> None:
    images = real_images(fashion, 3, 6, 8).float().requires_grad_()
    weights = torch.rand(3, 3, 6, 8, generator=generator())
    flip = torch.tensor([True, False, True])
    (gradient,) = torch.autograd.grad((apply_flip(images, flip) * weights).sum(), images)
    assert torch.equal(gradient, apply_flip(weights, flip))

    offsets = torch.tensor([[0, 4], [2, 2], [3, 1]])
    (gradient,) = torch.autograd.grad((apply_crop(images, offsets, padding=2) * weights).sum(), images)
    # A window moved by (top - padding, left - padding) is undone by the window moved the other way.
    assert torch.equal(gradient, apply_crop(weights, 4 - offsets, padding=2))


def test_parameters_on_the_cpu_serve_images_elsewhere() -> None:
    """ "meta" stands for an accelerator: it refuses to meet tensors of the CPU just the same."""
    images = torch.empty(4, 1, 8, 6, device="meta")
    assert apply_flip(images, sample_flip(4, generator=generator())).device.type == "meta"
    cropped = apply_crop(images, sample_crop(4, padding=2, generator=generator()), padding=2)
    assert cropped.device.type == "meta" and cropped.shape == images.shape


@pytest.mark.parametrize("prob", [0.0, 0.2, 0.5, 1.0])
def test_flips_have_the_probability_asked_for(prob: float) -> None:
    flip = sample_flip(20_000, prob=prob, generator=generator())
    # At 0 and 1 the binomial law leaves one outcome, and the p-value of any other is 0.
    assert stats.binomtest(int(flip.sum()), len(flip), prob).pvalue > 1e-4


def test_crop_offsets_are_uniform_and_independent() -> None:
    padding, count = 3, 49_000
    offsets = sample_crop(count, padding=padding, generator=generator())
    assert offsets.shape == (count, 2)
    seen = np.zeros((2 * padding + 1, 2 * padding + 1))
    np.add.at(seen, tuple(offsets.T.numpy()), 1)  # IndexError at a value above 2 * padding
    assert offsets.min() == 0
    assert stats.chisquare(seen.ravel()).pvalue > 1e-4


def test_draws_follow_the_generator_and_nothing_else() -> None:
    def draws(seed: int) -> list[Tensor]:
        source = generator(seed)
        return [sample_flip(64, generator=source) for _ in range(2)] + [
            sample_crop(64, padding=4, generator=source) for _ in range(2)
        ]

    torch.manual_seed(1)
    first = draws(5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert all(torch.equal(again, before) for again, before in zip(draws(5), first, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[2], first[3])
    assert not torch.equal(draws(6)[0], first[0])


def test_errors_name_the_value(fashion: Fashion) -> None:
    images = real_images(fashion, 4)
    for prob in (-0.5, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"got {prob}"):
            sample_flip(4, prob=prob, generator=generator())
    with pytest.raises(ValueError, match="got -1"):
        sample_crop(4, padding=-1, generator=generator())
    with pytest.raises(ValueError, match="got -2"):
        apply_crop(images, torch.zeros(4, 2, dtype=torch.int64), padding=-2)
    with pytest.raises(ValueError, match="batch of 4, got 1"):
        apply_flip(images, torch.tensor([True]))
    with pytest.raises(ValueError, match="batch of 4, got 5"):
        apply_crop(images, sample_crop(5, padding=2, generator=generator()), padding=2)
    with pytest.raises(ValueError, match=r"offsets in \[0, 4\], got 0 to 5"):
        apply_crop(images, torch.tensor([[0, 0], [1, 5], [2, 2], [3, 3]]), padding=2)
    with pytest.raises(ValueError, match=r"offsets in \[0, 4\], got -1 to 3"):
        apply_crop(images, torch.tensor([[0, 0], [1, -1], [2, 2], [3, 3]]), padding=2)


@pytest.mark.parametrize("size", [16, 20, 28, 40])
def test_resize_equals_torchvision(fashion: dict[str, np.ndarray], size: int) -> None:
    images = torch.from_numpy(fashion["test_images"][:6])[:, None].expand(-1, 3, -1, -1)
    resized = resize(images, size)
    oracle = reference.resize(images, [size, size], antialias=True)
    assert resized.dtype == torch.uint8
    assert (resized.int() - oracle.int()).abs().max() <= 1
