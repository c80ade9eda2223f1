"""Images of every degree of ambiguity, each with a draw of its own: for measuring how a score rises with it.

The kinds are those of ``augment.shifts``, which has one strength; here the strength of each image is drawn or given,
from hardly visible to more than there. Everything is uint8, as loaders give it. Shapes: B images, C, H, W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2.functional import gaussian_blur

from augment.shifts import SHIFTS, partners

BLUR_SIGMA = (0.01, 0.1)
"""Range of the standard deviation of the blur, as a share of the shorter side."""

NOISE_STD = (0.02, 0.3)
"""Range of the standard deviation of the noise, as a share of the range from black to white."""

CROP_SIDE = (0.35, 0.95)
"""Range of the sides of the part that a crop leaves, as a share."""

CLEAN_SHARE = 1 / 6
"""Share of images that stay as they are: as many as of each kind."""


class PerturbParams(NamedTuple):
    """One draw for a batch of B images.

    Attributes:
        kind: (B,) int64, position in ``kinds``.
        kinds: names; ``"clean"`` is the first.
        strength: (B,) float32, uniform in [0, 1): what of its range an image gets. Of mixed ones the share of the
            partner; blurred ones share that of the first of them.
        partner: (B,) int64, of another class wherever there is one.
        place: (B, 2) float32, uniform in [0, 1): top and left of a box, as a share of where it fits.
        noise_seed: of the generator of the noise.
    """

    kind: Tensor
    kinds: tuple[str, ...]
    strength: Tensor
    partner: Tensor
    place: Tensor
    noise_seed: int


class PerturbedBatch(NamedTuple):
    """A batch with a mixing weight for each image.

    Attributes:
        images: (B, C, H, W) uint8.
        labels_a: (B,) int64, of the images themselves.
        labels_b: (B,) int64, of their partners; equal to ``labels_a`` where nothing was mixed.
        lam: (B,) float32 in [0, 1], weight of ``labels_a``; 1 where nothing was mixed.
        clean: (B,) bool, the images that are as they were.
    """

    images: Tensor
    labels_a: Tensor
    labels_b: Tensor
    lam: Tensor
    clean: Tensor


def sample_perturbations(
    labels: Tensor, *, kinds: Sequence[str] = SHIFTS, clean: float = CLEAN_SHARE, generator: torch.Generator
) -> PerturbParams:
    """Draw how each image is perturbed: as many in every way, to one image.

    Args:
        labels: (B,) integer, by which partners are chosen.
        kinds: of ``augment.SHIFTS``; none leaves every image clean.
        clean: share of images that stay as they are, in [0, 1].
        generator: a CPU generator.

    Raises:
        ValueError: an unknown kind, or a share out of range.
    """
    if unknown := [kind for kind in kinds if kind not in SHIFTS]:
        raise ValueError(f"expected kinds of {', '.join(SHIFTS)}; got {', '.join(map(repr, unknown))}")
    if not 0 <= clean <= 1:
        raise ValueError(f"expected a share of clean images in [0, 1], got {clean}")
    count = len(labels)
    changed = round(count * (1 - clean)) if kinds else 0
    order = torch.randperm(count, generator=generator)
    return PerturbParams(
        kind=torch.where(order < changed, order % max(len(kinds), 1) + 1, 0),
        kinds=("clean", *kinds),
        strength=torch.rand(count, generator=generator),
        partner=partners(labels, generator),
        place=torch.rand(count, 2, generator=generator),
        noise_seed=int(torch.randint(2**63 - 1, (), generator=generator)),
    )


def apply_perturbations(images: Tensor, labels: Tensor, params: PerturbParams) -> PerturbedBatch:
    """The images, each perturbed in its own way; the input is left untouched.

    Args:
        images: (B, C, H, W) uint8.
        labels: (B,) int64.
        params: from ``sample_perturbations`` for these labels.

    Returns:
        PerturbedBatch on the images' device.

    Raises:
        ValueError: images of another dtype or shape, or parameters for another batch size.
    """
    if images.ndim != 4 or images.dtype != torch.uint8 or len(images) != len(params.kind):
        raise ValueError(
            f"expected {len(params.kind)} images (B, C, H, W) of uint8, got {tuple(images.shape)} of {images.dtype}"
        )
    labels = labels.to(images.device)
    partner = params.partner.to(images.device, non_blocking=True)
    result, lam = images.clone(), torch.ones(len(images))
    for number, kind in enumerate(params.kinds):
        chosen = (params.kind == number).nonzero()[:, 0]
        if kind == "clean" or not len(chosen):
            continue
        rows = chosen.to(images.device, non_blocking=True)
        own, strength, place = images[rows], params.strength[chosen], params.place[chosen]
        if kind == "mixup":
            lam[chosen] = 1 - strength
            changed = _mixed(own, images[partner[rows]], strength)
        elif kind == "cutmix":
            changed, lam[chosen] = _cut(own, images[partner[rows]], strength, place)
        elif kind == "blur":
            changed = _blurred(own, _within(BLUR_SIGMA, strength[0]).item())
        elif kind == "noise":
            changed = _noisy(own, _within(NOISE_STD, strength), params.noise_seed)
        else:
            changed = _cropped(own, _within(CROP_SIDE, 1 - strength), place)
        result[rows] = changed
    lam = lam.to(images.device, non_blocking=True)
    clean = (params.kind == 0).to(images.device, non_blocking=True)
    return PerturbedBatch(result, labels, torch.where(lam < 1, labels[partner], labels), lam, clean)


def _within(limits: tuple[float, float], share: Tensor) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * share


def _column(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images.device, non_blocking=True).view(-1, 1, 1, 1)


def _to_bytes(images: Tensor) -> Tensor:
    return images.round_().clamp_(0, 255).to(torch.uint8)


def _mixed(images: Tensor, others: Tensor, share: Tensor) -> Tensor:
    return _to_bytes(images.float().lerp_(others.float(), _column(share, images)))


def _cut(images: Tensor, others: Tensor, share: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """A box of about this share of the area from the others; and the exact share that is kept."""
    height, width = images.shape[2:]
    size = torch.tensor([height, width])
    box = (size * share[:, None].sqrt()).round().long()  # (b, 2)
    first = (place * (size + 1 - box)).long()
    last = first + box
    start, stop = (corner.to(images.device, non_blocking=True) for corner in (first, last))
    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    inside = (rows >= start[:, :1]) & (rows < stop[:, :1])
    across = (columns >= start[:, 1:]) & (columns < stop[:, 1:])
    mask = (inside[:, :, None] & across[:, None, :])[:, None]
    return torch.where(mask, others, images), 1 - box.prod(1) / (height * width)


def _blurred(images: Tensor, sigma: float) -> Tensor:
    sigma = sigma * min(images.shape[2:])
    # The kernel's half must be smaller than the image, whose border it mirrors.
    half = min(max(round(3 * sigma), 1), min(images.shape[2:]) - 1)
    if not half:
        return images
    # Along one side and then along the other: the same blur, at 2 instead of 2 * half + 1 products a pixel and weight.
    for kernel in ([2 * half + 1, 1], [1, 2 * half + 1]):
        images = gaussian_blur(images.float(), kernel, [sigma, sigma])
    return _to_bytes(images)


def _noisy(images: Tensor, std: Tensor, seed: int) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    noise = noise.to(images.device, non_blocking=True)
    return _to_bytes(images + 255 * _column(std, images) * noise)


def _cropped(images: Tensor, side: Tensor, place: Tensor) -> Tensor:
    """A part with sides of this share, enlarged."""
    middle = (2 * place - 1) * (1 - side[:, None])  # (b, 2) of top and left, in [-1, 1] across the image
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, 0, 2], theta[:, 1, 2] = middle[:, 1], middle[:, 0]
    grid = functional.affine_grid(theta.to(images.device, non_blocking=True), list(images.shape), align_corners=False)
    return _to_bytes(functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False))
