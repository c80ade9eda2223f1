"""Images of every degree of ambiguity: each kind against what it is meant to do to real photos, draws and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from augment import SHIFTS, apply_perturbations, sample_perturbations
from tests.test_shifts import LABELS, photos  # noqa: F401  (a fixture)


def draw(kind: str, strength: float, seed: int = 0):
    """Parameters that do one thing, at one strength, to every image of ``LABELS``."""
    params = sample_perturbations(LABELS, kinds=[kind], generator=torch.Generator().manual_seed(seed))
    return params._replace(kind=torch.ones_like(params.kind), strength=torch.full_like(params.strength, strength))


def test_a_batch_has_as_many_of_every_kind() -> None:
    labels = torch.arange(24) % 4
    params = sample_perturbations(labels, generator=torch.Generator().manual_seed(0))
    assert params.kinds == ("clean", *SHIFTS)
    assert params.kind.bincount().tolist() == [4] * 6
    assert (labels[params.partner] != labels).all()
    half = sample_perturbations(labels, kinds=["blur", "crop"], clean=0.5, generator=torch.Generator().manual_seed(0))
    assert half.kind.bincount().tolist() == [12, 6, 6]
    again = sample_perturbations(labels, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True) if isinstance(a, Tensor))


def test_clean_images_stay_and_the_input_is_left_alone(photos: Tensor) -> None:  # noqa: F811
    before = photos.clone()
    params = sample_perturbations(LABELS, generator=torch.Generator().manual_seed(3))
    batch = apply_perturbations(photos, LABELS, params)
    assert torch.equal(photos, before)
    assert batch.images.dtype == torch.uint8 and batch.images.shape == photos.shape
    assert torch.equal(batch.clean, params.kind == 0) and batch.clean.any()
    assert torch.equal(batch.images[batch.clean], photos[batch.clean])
    unmixed = ~torch.isin(params.kind, torch.tensor([1, 2]))
    assert (batch.lam[unmixed] == 1).all() and torch.equal(batch.labels_b[unmixed], LABELS[unmixed])
    assert (batch.images != photos).flatten(1).any(1)[~batch.clean].all()


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_mixup_is_the_weighted_mean(photos: Tensor, share: float) -> None:  # noqa: F811
    params = draw("mixup", share)
    batch = apply_perturbations(photos, LABELS, params)
    expected = (1 - share) * photos.double() + share * photos[params.partner].double()
    assert (batch.images.double() - expected).abs().max() <= 0.51
    assert batch.lam.tolist() == pytest.approx([1 - share] * 8)
    assert torch.equal(batch.labels_b, LABELS[params.partner])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
def test_cutmix_keeps_the_share_of_pixels_that_lam_says(share: float) -> None:
    both = torch.cat([torch.zeros(4, 3, 40, 30, dtype=torch.uint8), torch.full((4, 3, 40, 30), 255, dtype=torch.uint8)])
    batch = apply_perturbations(both, LABELS, draw("cutmix", share))
    kept = (batch.images == both).double().mean((1, 2, 3))
    assert kept.tolist() == pytest.approx(batch.lam.tolist(), abs=1e-6)
    assert batch.lam.tolist() == pytest.approx([1 - share] * 8, abs=0.05)


def test_noise_has_the_standard_deviation_of_its_strength() -> None:
    grey = torch.full((8, 3, 64, 64), 128, dtype=torch.uint8)
    for strength, expected in ((0.0, 0.02), (0.5, 0.16)):
        noisy = apply_perturbations(grey, LABELS, draw("noise", strength)).images
        assert ((noisy.double() - 128) / 255).std().item() == pytest.approx(expected, rel=0.05)


def test_blur_takes_away_detail_and_more_of_it_when_stronger(photos: Tensor) -> None:  # noqa: F811
    def detail(images: Tensor) -> float:
        return images.double().diff(dim=3).abs().mean().item()

    weak, strong = (apply_perturbations(photos, LABELS, draw("blur", s)).images for s in (0.0, 0.9))
    assert detail(strong) < 0.5 * detail(weak) < 0.5 * detail(photos)


def test_a_crop_is_a_part_of_the_image(photos: Tensor) -> None:  # noqa: F811
    gradient = torch.arange(64).repeat(64, 1).mul(4).to(torch.uint8).expand(8, 3, 64, 64).contiguous()
    params = draw("crop", 1.0)  # the smallest part: 0.35 of the side
    cropped = apply_perturbations(gradient, LABELS, params).images[:, 0].float()
    span = cropped[:, :, -1].mean(1) - cropped[:, :, 0].mean(1)
    assert span.tolist() == pytest.approx([0.35 * 63 * 4] * 8, abs=4)
    left = cropped[:, :, 0].mean(1)
    assert left.tolist() == pytest.approx((params.place[:, 1] * 0.65 * 64 * 4).tolist(), abs=6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.sampled_from([(1, 1), (3, 5), (8, 8)]), st.integers(0, 1000))
def test_any_batch_and_size_works(count: int, size: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, *size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (count,), generator=generator)
    batch = apply_perturbations(images, labels, sample_perturbations(labels, generator=generator))
    assert batch.images.shape == images.shape and ((batch.lam >= 0) & (batch.lam <= 1)).all()


def test_errors(photos: Tensor) -> None:  # noqa: F811
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="got 'rain'"):
        sample_perturbations(LABELS, kinds=["rain"], generator=generator)
    with pytest.raises(ValueError, match=r"clean images in \[0, 1\], got 2"):
        sample_perturbations(LABELS, clean=2, generator=generator)
    params = sample_perturbations(LABELS, generator=generator)
    with pytest.raises(ValueError, match="expected 8 images"):
        apply_perturbations(photos[:3], LABELS[:3], params)
    with pytest.raises(ValueError, match="uint8"):
        apply_perturbations(photos.float(), LABELS, params)
