"""Mixup and CutMix: against NumPy, against torchvision's distributions, and the promises of the docstrings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2

from augment import (
    CutmixParams,
    MixedBatch,
    MixupParams,
    apply_cutmix,
    apply_mixup,
    mixed_cross_entropy,
    sample_cutmix,
    sample_mixup,
)

DRAWS = 2000
SIZE = (20, 28)  # height and width differ, so that neither can stand in for the other
SAME = 1e-3  # p-value of Kolmogorov-Smirnov below which two distributions count as different

Fashion = dict[str, np.ndarray]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def real_batch(fashion: Fashion, size: int, *, height: int = 28) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST: (size, 1, height, 28) uint8 and their labels."""
    images, labels = fashion["train_images"][:size, :height], fashion["train_labels"][:size]
    return torch.tensor(images).unsqueeze(1), torch.tensor(labels).long()


def constant_images(size: int, height: int, width: int) -> Tensor:
    """Image i is i + 1 all over: every pixel names the image it came from."""
    return torch.arange(1.0, size + 1).view(-1, 1, 1, 1).expand(size, 2, height, width).contiguous()


def numpy_mixup(images: np.ndarray, permutation: np.ndarray, lam: float) -> np.ndarray:
    mixed = [lam * images[i] + (1 - lam) * images[permutation[i]] for i in range(len(images))]
    return np.stack(mixed)


def numpy_cutmix(images: np.ndarray, permutation: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    top, left, bottom, right = box
    mixed = np.empty_like(images)
    for i, _, y, x in np.ndindex(images.shape[0], 1, images.shape[2], images.shape[3]):
        inside = top <= y < bottom and left <= x < right
        mixed[i, :, y, x] = images[permutation[i] if inside else i, :, y, x]
    return mixed


# --- applying -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 32])
def test_mixup_equals_numpy(fashion: Fashion, size: int) -> None:
    images, labels = real_batch(fashion, size)
    images = images.float() / 255
    params = sample_mixup(size, generator=generator(size))
    assert params is not None
    batch = apply_mixup(images, labels, params)
    expected = numpy_mixup(images.double().numpy(), params.permutation.numpy(), params.lam)
    np.testing.assert_allclose(batch.images.numpy(), expected, atol=1e-6)
    assert batch.labels_a.tolist() == labels.tolist()
    assert batch.labels_b.tolist() == [labels[i].item() for i in params.permutation.tolist()]
    assert batch.lam.item() == pytest.approx(params.lam, abs=1e-7)


@pytest.mark.parametrize("height", [28, 20])
@pytest.mark.parametrize("size", [1, 7])
def test_cutmix_equals_numpy(fashion: Fashion, size: int, height: int) -> None:
    images, labels = real_batch(fashion, size, height=height)
    for seed in range(5):
        params = sample_cutmix(size, (height, 28), generator=generator(seed))
        assert params is not None
        batch = apply_cutmix(images, labels, params)
        assert np.array_equal(
            batch.images.numpy(), numpy_cutmix(images.numpy(), params.permutation.numpy(), params.box)
        )
        assert batch.labels_a.tolist() == labels.tolist()
        assert batch.labels_b.tolist() == [labels[i].item() for i in params.permutation.tolist()]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    size=st.integers(2, 7),
    alpha=st.floats(0.05, 20),
)
def test_lam_is_the_share_of_pixels_kept(seed: int, height: int, width: int, size: int, alpha: float) -> None:
    params = sample_cutmix(size, (height, width), alpha=alpha, generator=generator(seed))
    assert params is not None
    images, labels = constant_images(size, height, width), torch.arange(size)
    batch = apply_cutmix(images, labels, params)
    kept = (batch.images == images).double().mean(dim=(1, 2, 3))
    moved = params.permutation != torch.arange(size)  # a fixed point of the permutation keeps everything
    torch.testing.assert_close(kept[moved], torch.full_like(kept[moved], params.lam), rtol=0, atol=1e-12)
    assert torch.equal(kept[~moved], torch.ones_like(kept[~moved]))
    assert batch.lam.item() == pytest.approx(params.lam, abs=1e-7)
    # What was not kept came from the partner, whose number labels_b holds.
    foreign = batch.images != images
    assert torch.equal(batch.images[foreign], (batch.labels_b + 1.0).view(-1, 1, 1, 1).expand_as(images)[foreign])


@pytest.mark.parametrize("apply", ["mixup", "cutmix"])
def test_the_input_is_left_alone(fashion: Fashion, apply: str) -> None:
    images, labels = real_batch(fashion, 8)
    images = images.float()
    kept_images, kept_labels = images.clone(), labels.clone()
    if apply == "mixup":
        batch = apply_mixup(images, labels, sample_mixup(8, generator=generator()))
    else:
        batch = apply_cutmix(images, labels, sample_cutmix(8, (28, 28), generator=generator()))
    assert not torch.equal(batch.images, images)
    batch.images.zero_()  # nor does the result share memory with it
    assert torch.equal(images, kept_images) and torch.equal(labels, kept_labels)


def test_an_unmixed_batch_is_the_batch(fashion: Fashion) -> None:
    images, labels = real_batch(fashion, 5)
    for batch in (apply_mixup(images, labels, None), apply_cutmix(images, labels, None)):
        assert batch.images is images
        assert batch.labels_a is batch.labels_b  # mixed_cross_entropy takes the plain loss by this
        assert torch.equal(batch.labels_a, labels)
        assert batch.lam.item() == 1 and batch.lam.dtype == torch.float32


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_mixup_at_the_ends_is_one_of_the_two_images(fashion: Fashion, lam: float) -> None:
    images, labels = real_batch(fashion, 6)
    images = images.float()
    permutation = torch.tensor([3, 4, 5, 0, 1, 2])
    batch = apply_mixup(images, labels, MixupParams(permutation, lam))
    assert torch.equal(batch.images, images if lam else images[permutation])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_cutmix_copies_pixels_of_any_dtype(fashion: Fashion, dtype: torch.dtype) -> None:
    images, labels = real_batch(fashion, 7)
    params = CutmixParams(torch.tensor([1, 2, 3, 4, 5, 6, 0]), (3, 5, 20, 11), 1 - 17 * 6 / 784)
    batch = apply_cutmix(images.to(dtype), labels, params)
    assert batch.images.dtype == dtype
    expected = numpy_cutmix(images.numpy(), params.permutation.numpy(), params.box)
    assert torch.equal(batch.images, torch.from_numpy(expected).to(dtype))


def test_mixup_in_bfloat16_rounds_once(fashion: Fashion) -> None:
    images, labels = real_batch(fashion, 7)
    images = images.bfloat16()
    params = MixupParams(torch.tensor([1, 2, 3, 4, 5, 6, 0]), 0.3)
    batch = apply_mixup(images, labels, params)
    assert batch.images.dtype == torch.bfloat16
    expected = numpy_mixup(images.double().numpy(), params.permutation.numpy(), params.lam)
    np.testing.assert_allclose(batch.images.double().numpy(), expected, rtol=2**-8, atol=0)


def test_mixup_of_bytes_is_refused(fashion: Fashion) -> None:
    images, labels = real_batch(fashion, 4)
    with pytest.raises(TypeError, match=r"torch\.uint8"):
        apply_mixup(images, labels, sample_mixup(4, generator=generator()))


def test_channels_last_images_give_the_same_and_stay_channels_last() -> None:
    images = torch.rand(6, 3, 12, 16, generator=generator())
    labels = torch.arange(6)
    mixup, cutmix = sample_mixup(6, generator=generator(1)), sample_cutmix(6, (12, 16), generator=generator(1))
    rearranged = images.contiguous(memory_format=torch.channels_last)
    assert rearranged.stride() != images.stride()
    for expected, batch in (
        (apply_mixup(images, labels, mixup), apply_mixup(rearranged, labels, mixup)),
        (apply_cutmix(images, labels, cutmix), apply_cutmix(rearranged, labels, cutmix)),
    ):
        assert torch.equal(batch.images, expected.images)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_gradients_reach_both_images_in_their_shares() -> None:
    images = torch.rand(3, 2, 6, 8, generator=generator(), requires_grad=True)
    labels, permutation = torch.arange(3), torch.tensor([1, 2, 0])
    weights = torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1, 1)  # which output a gradient came from

    (gradient,) = torch.autograd.grad(
        (apply_mixup(images, labels, MixupParams(permutation, 0.25)).images * weights).sum(), images
    )
    expected = 0.25 * weights + 0.75 * weights[[2, 0, 1]]  # image i is the partner of image i - 1
    torch.testing.assert_close(gradient, expected.expand_as(gradient))

    params = CutmixParams(permutation, (1, 2, 4, 7), 1 - 15 / 48)
    (gradient,) = torch.autograd.grad((apply_cutmix(images, labels, params).images * weights).sum(), images)
    expected = weights.expand(3, 2, 6, 8).clone()
    expected[:, :, 1:4, 2:7] = weights[[2, 0, 1]]
    torch.testing.assert_close(gradient, expected)


def test_the_batch_is_on_the_device_of_the_images() -> None:
    """ "meta" stands for an accelerator: it refuses to meet tensors of the CPU just the same."""
    images, labels = torch.empty(4, 1, 8, 8, device="meta"), torch.arange(4)
    permutation = torch.tensor([1, 0, 3, 2])
    for batch in (
        apply_mixup(images, labels, MixupParams(permutation, 0.5)),
        apply_cutmix(images, labels, CutmixParams(permutation, (0, 0, 8, 4), 0.5)),
        apply_mixup(images, labels, None),
        apply_cutmix(images, labels, None),
    ):
        assert {tensor.device.type for tensor in batch} == {"meta"}


def test_parameters_for_another_batch_are_refused(fashion: Fashion) -> None:
    images, labels = real_batch(fashion, 4)
    with pytest.raises(ValueError, match="batch of 4, got 5"):
        apply_mixup(images.float(), labels, sample_mixup(5, generator=generator()))
    with pytest.raises(ValueError, match="batch of 4, got 3"):
        apply_cutmix(images, labels, sample_cutmix(3, (28, 28), generator=generator()))


@pytest.mark.parametrize("box", [(0, 0, 21, 28), (0, 0, 20, 29), (-1, 0, 5, 5), (5, 6, 4, 8), (0, 24, 4, 20)])
def test_a_box_outside_the_images_is_refused(fashion: Fashion, box: tuple[int, int, int, int]) -> None:
    images, labels = real_batch(fashion, 2, height=20)
    with pytest.raises(ValueError, match=rf"20 x 28, got \({box[0]}, {box[1]}, {box[2]}, {box[3]}\)"):
        apply_cutmix(images, labels, CutmixParams(torch.tensor([1, 0]), box, 0.5))


# --- drawing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_alpha_that_is_no_beta_parameter_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"Beta parameter .* got {alpha}"):
        sample_mixup(4, alpha=alpha, generator=generator())
    with pytest.raises(ValueError, match=rf"Beta parameter .* got {alpha}"):
        sample_cutmix(4, SIZE, alpha=alpha, generator=generator())


@pytest.mark.parametrize("prob", [-0.1, 1.5, math.nan])
def test_prob_outside_0_to_1_is_refused(prob: float) -> None:
    with pytest.raises(ValueError, match=rf"prob .* got {prob}"):
        sample_mixup(4, prob=prob, generator=generator())
    with pytest.raises(ValueError, match=rf"prob .* got {prob}"):
        sample_cutmix(4, SIZE, prob=prob, generator=generator())


@pytest.mark.parametrize("prob", [0.0, 0.5, 1.0])
def test_batches_are_mixed_with_the_probability_asked_for(prob: float) -> None:
    source, count = generator(), 2000
    for draw in (
        lambda: sample_mixup(4, prob=prob, generator=source),
        lambda: sample_cutmix(4, SIZE, prob=prob, generator=source),
    ):
        mixed = sum(draw() is not None for _ in range(count))
        # At 0 and 1 the binomial law leaves one outcome, and the p-value of any other is 0.
        assert stats.binomtest(mixed, count, prob).pvalue > 1e-4


def test_draws_follow_the_generator_and_nothing_else() -> None:
    def draws(seed: int) -> list[tuple[list[int], float, tuple[int, ...]]]:
        source, found = generator(seed), []
        for _ in range(5):
            mixup, cutmix = sample_mixup(7, generator=source), sample_cutmix(7, SIZE, generator=source)
            assert mixup is not None and cutmix is not None
            found += [
                (mixup.permutation.tolist(), mixup.lam, ()),
                (cutmix.permutation.tolist(), cutmix.lam, cutmix.box),
            ]
        return found

    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state is what must not matter
    first = draws(3)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    assert draws(3) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert draws(4) != first
    assert len({tuple(permutation) for permutation, _, _ in first}) == len(first)  # it moves on from draw to draw


def test_an_unmixed_draw_moves_the_generator_too() -> None:
    source = generator()
    before = source.get_state()
    assert sample_mixup(4, prob=0.0, generator=source) is None
    assert not torch.equal(source.get_state(), before)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_pairs_are_a_permutation(size: int) -> None:
    source = generator()
    for _ in range(20):
        for params in (sample_mixup(size, generator=source), sample_cutmix(size, SIZE, generator=source)):
            assert params is not None
            assert params.permutation.dtype == torch.int64
            assert sorted(params.permutation.tolist()) == list(range(size))


@pytest.mark.parametrize("method", ["mixup", "cutmix"])
def test_every_image_is_as_likely_a_partner_as_any_other(method: str) -> None:
    """Rolling or flipping the batch would pair neighbours, or mirror images, every time."""
    source, size, count = generator(), 5, 2000
    seen = np.zeros((size, size))
    for _ in range(count):
        if method == "mixup":
            params: MixupParams | CutmixParams | None = sample_mixup(size, generator=source)
        else:
            params = sample_cutmix(size, SIZE, generator=source)
        assert params is not None
        seen[np.arange(size), params.permutation.numpy()] += 1
    # Rows and columns add up to `count`: (size - 1)^2 degrees of freedom, statistic scaled as for a random permutation.
    statistic = ((seen - count / size) ** 2 / (count / size)).sum() * (size - 1) / size
    assert stats.chi2.sf(statistic, (size - 1) ** 2) > 1e-4


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_lam_of_mixup_is_distributed_as_torchvision_s(alpha: float) -> None:
    ours = [params.lam for params in _mixup_draws(alpha)]
    torch.manual_seed(0)
    mixup = v2.MixUp(alpha=alpha, num_classes=2)
    image, labels = torch.zeros(2, 1, 2, 2), torch.arange(2)
    theirs = [mixup(image, labels)[1][0, 0].item() for _ in range(DRAWS)]
    assert stats.ks_2samp(ours, theirs).pvalue > SAME
    assert stats.kstest(ours, stats.beta(alpha, alpha).cdf).pvalue > SAME


def _mixup_draws(alpha: float) -> list[MixupParams]:
    source = generator()
    draws = [sample_mixup(2, alpha=alpha, generator=source) for _ in range(DRAWS)]
    return [params for params in draws if params is not None]


def test_boxes_of_cutmix_are_distributed_as_torchvision_s() -> None:
    height, width = SIZE
    images, labels, source = constant_images(2, height, width), torch.arange(2), generator()
    ours, theirs = [], []
    torch.manual_seed(0)
    cutmix = v2.CutMix(alpha=1.0, num_classes=2)
    for _ in range(DRAWS):
        params = sample_cutmix(2, SIZE, generator=source)
        assert params is not None
        top, left, bottom, right = params.box
        area = (bottom - top) * (right - left)
        ours.append((params.lam, area, bottom - top, right - left, top, left) if area else NO_BOX)
        mixed, soft_labels = cutmix(images, labels)
        theirs.append((soft_labels[0, 0].item(), *box_of((mixed[0, 0] != 1).numpy())) if soft_labels[0, 1] else NO_BOX)
    for name, mine, other in zip(
        ("lam", "area", "height", "width", "top", "left"),
        np.transpose(ours).round(6),
        np.transpose(theirs).round(6),
        strict=True,
    ):
        assert stats.ks_2samp(mine, other).pvalue > SAME, name


NO_BOX = (1.0, 0, 0, 0, -1, -1)  # a box without pixels has no place that could be seen


def box_of(changed: np.ndarray) -> tuple[int, int, int, int, int]:
    """Area, height, width, top and left of the pixels that changed, of which there must be some."""
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    return int(changed.sum()), len(rows), len(columns), int(rows[0]), int(columns[0])


# --- loss -----------------------------------------------------------------------------------------------------------


def numpy_cross_entropy(logits: np.ndarray, labels: np.ndarray, smoothing: float) -> float:
    """Mean over images of ``-sum_c q_c log softmax_c``, q the one-hot label smoothed towards uniform."""
    losses = []
    for row, label in zip(logits, labels, strict=True):
        log_softmax = row - row.max() - np.log(np.exp(row - row.max()).sum())
        target = np.full(len(row), smoothing / len(row))
        target[label] += 1 - smoothing
        losses.append(-(target * log_softmax).sum())
    return float(np.mean(losses))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_mixed_cross_entropy_equals_numpy(fashion: Fashion, lam: float, smoothing: float) -> None:
    logits = 3 * torch.randn(7, 10, generator=generator(), dtype=torch.float64)
    labels = real_batch(fashion, 7)[1]
    partners = labels.flip(0)
    batch = MixedBatch(torch.empty(7), labels, partners, torch.tensor(lam))
    loss = mixed_cross_entropy(logits, batch, label_smoothing=smoothing)
    expected = lam * numpy_cross_entropy(logits.numpy(), labels.numpy(), smoothing)
    expected += (1 - lam) * numpy_cross_entropy(logits.numpy(), partners.numpy(), smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # lam is float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_unmixed_cross_entropy_is_the_plain_one_to_the_bit(fashion: Fashion, smoothing: float) -> None:
    logits = 3 * torch.randn(7, 10, generator=generator())
    images, labels = real_batch(fashion, 7)
    plain = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    batch = apply_cutmix(images, labels, None)
    assert torch.equal(mixed_cross_entropy(logits, batch, label_smoothing=smoothing), plain)
    # Copied to another device and back, the two labels are no longer one tensor.
    copied = batch._replace(labels_b=labels.clone())
    assert torch.equal(mixed_cross_entropy(logits, copied, label_smoothing=smoothing), plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_has_the_dtype_of_the_logits(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(4, 3, generator=generator()).to(dtype), torch.tensor([0, 1, 2, 0])
    images = torch.rand(4, 1, 8, 8, generator=generator())
    mixed = apply_mixup(images, labels, MixupParams(torch.tensor([1, 2, 3, 0]), 0.3))
    assert mixed_cross_entropy(logits, mixed).dtype == dtype
    assert mixed_cross_entropy(logits, apply_mixup(images, labels, None)).dtype == dtype


def test_the_gradient_of_the_loss_weighs_the_labels_by_lam() -> None:
    logits = torch.zeros(1, 4, requires_grad=True)
    batch = MixedBatch(torch.empty(1), torch.tensor([0]), torch.tensor([2]), torch.tensor(0.75))
    mixed_cross_entropy(logits, batch).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.25 - 0.75, 0.25, 0.25 - 0.25, 0.25]]))
