"""Shifted images: what each kind does to real photos, and that partners are of another class."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_sample_images
from torch import Tensor

from augment import SHIFTS, partners, shift_images


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """(8, 3, 64, 48) uint8, four parts of each of two photos."""
    flower, china = (torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images)
    parts = [photo[:, 100 + 64 * i : 164 + 64 * i, 200:248] for photo in (flower, china) for i in range(4)]
    return torch.stack(parts)


LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def shifted(photos: Tensor, kind: str, seed: int = 0) -> Tensor:
    return shift_images(photos, LABELS, kind, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", SHIFTS)
def test_every_kind_changes_every_image_in_the_same_way_each_time(photos: Tensor, kind: str) -> None:
    before = photos.clone()
    result = shifted(photos, kind)
    assert result.shape == photos.shape and result.dtype == torch.uint8
    assert torch.equal(photos, before)
    assert (result != photos).flatten(1).any(1).all()
    assert torch.equal(result, shifted(photos, kind))
    if kind != "blur":
        assert not torch.equal(result, shifted(photos, kind, seed=1))


def test_mixed_images_lie_half_way_and_cut_ones_take_half_the_area(photos: Tensor) -> None:
    partner = partners(LABELS, torch.Generator().manual_seed(0))
    expected = (photos.double() + photos[partner].double()) / 2
    assert (shifted(photos, "mixup").double() - expected).abs().max() <= 0.5
    cut = shifted(photos, "cutmix")
    assert ((cut == photos) | (cut == photos[partner])).all()
    black, white = torch.zeros(2, 3, 64, 48, dtype=torch.uint8), torch.full((2, 3, 64, 48), 255, dtype=torch.uint8)
    both = torch.cat([black, white])
    cut = shift_images(both, torch.tensor([0, 0, 1, 1]), "cutmix", torch.Generator().manual_seed(0))
    taken = (cut != both).flatten(1).double().mean(1)
    assert taken.tolist() == pytest.approx([45 * 34 / (64 * 48)] * 4)


def test_blur_smooths_and_noise_has_its_deviation(photos: Tensor) -> None:
    def roughness(images: Tensor) -> float:
        return images.double().diff(dim=3).abs().mean().item()

    assert roughness(shifted(photos, "blur")) < 0.5 * roughness(photos)
    grey = torch.full((8, 3, 64, 48), 128, dtype=torch.uint8)
    noise = shifted(grey, "noise").double()
    assert noise.mean().item() == pytest.approx(128, abs=1)
    assert noise.std().item() == pytest.approx(0.2 * 255, rel=0.05)


def test_a_crop_is_a_quarter_enlarged(photos: Tensor) -> None:
    ramp = torch.arange(64, dtype=torch.uint8)[:, None].expand(64, 48).expand(2, 3, 64, 48).contiguous()
    cropped = shift_images(ramp, torch.tensor([0, 1]), "crop", torch.Generator().manual_seed(0))
    heights = cropped.flatten(1).int()
    assert (heights.max(1).values - heights.min(1).values).tolist() == [31, 31]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(0, 5))
def test_partners_are_of_another_class_wherever_that_can_be(labels: list[int], seed: int) -> None:
    found = partners(torch.tensor(labels), torch.Generator().manual_seed(seed))
    assert sorted(found.tolist()) == list(range(len(labels)))
    same = sum(labels[i] == labels[j] for i, j in enumerate(found.tolist()))
    most = max(labels.count(label) for label in labels)
    assert same == max(2 * most - len(labels), 0)


def test_wrong_input_is_refused(photos: Tensor) -> None:
    with pytest.raises(ValueError, match="mixup, cutmix, blur, noise, crop; got 'rain'"):
        shifted(photos, "rain")
    with pytest.raises(ValueError, match=r"uint8, got \(8, 3, 64, 48\) of torch.float32"):
        shifted(photos.float(), "blur")
