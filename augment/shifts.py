"""Images that a model should be unsure about: mixed, blurred, noisy, cropped. For measuring, not for training.

Every function takes and gives uint8, as loaders give it, so that a shifted image goes the way of a clean one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2.functional import gaussian_blur

BLUR_SIGMA = 1 / 16
"""Standard deviation of the blur as a share of the shorter side: 2 pixels of 32."""

NOISE_STD = 0.2
"""Standard deviation of the noise as a share of the range from black to white."""

CROP_SIDE = 0.5
"""Sides of the part that a crop leaves, as a share: a quarter of the area."""

SHIFTS = ("mixup", "cutmix", "blur", "noise", "crop")


def shift_images(images: Tensor, labels: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """A batch as a model should be less sure of it.

    Args:
        images: (B, 3, H, W) uint8.
        labels: (B,) integer; partners of mixed images are of another class wherever there is one.
        kind: ``"mixup"``: the mean of two images (lam 1/2). ``"cutmix"``: a box of half the area, at a random place, is
            taken from the other image. ``"blur"``, ``"noise"``: Gaussian, see ``BLUR_SIGMA`` and ``NOISE_STD``.
            ``"crop"``: a random quarter, enlarged.
        generator: a CPU generator.

    Returns:
        (B, 3, H, W) uint8, on the images' device.

    Raises:
        ValueError: another kind, or images of another dtype or shape.
    """
    if images.ndim != 4 or images.dtype != torch.uint8:
        raise ValueError(f"expected images (B, C, H, W) of uint8, got {tuple(images.shape)} of {images.dtype}")
    kinds: dict[str, Callable[[], Tensor]] = {
        "mixup": lambda: _mixed(images, partners(labels, generator)),
        "cutmix": lambda: _cut(images, partners(labels, generator), generator),
        "blur": lambda: _blurred(images),
        "noise": lambda: _noisy(images, generator),
        "crop": lambda: _cropped(images, generator),
    }
    if kind not in kinds:
        raise ValueError(f"expected one of {', '.join(SHIFTS)}; got {kind!r}")
    return kinds[kind]()


def partners(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A permutation that gives each image one of another class, or as many of them as there can be.

    Args:
        labels: (B,) integer.
        generator: a CPU generator.

    Returns:
        (B,) int64 on the labels' device, of which nothing is read: that would make a GPU wait.
    """
    shuffled = torch.randperm(len(labels), generator=generator).to(labels.device, non_blocking=True)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    # Moved on by the largest class's size, no class meets itself unless it has more than half of the images.
    largest = (labels[:, None] == labels).sum(1).max()
    place = torch.arange(len(labels), device=labels.device)
    found = torch.empty_like(by_class)
    found[by_class] = by_class[(place + largest) % len(labels)]
    return found


def _mixed(images: Tensor, partner: Tensor) -> Tensor:
    return ((images.int() + images[partner.to(images.device)].int() + 1) // 2).to(torch.uint8)


def _cut(images: Tensor, partner: Tensor, generator: torch.Generator) -> Tensor:
    height, width = images.shape[2:]
    box = round(height * 0.5**0.5), round(width * 0.5**0.5)
    tops, lefts = _places((height - box[0], width - box[1]), len(images), generator)
    rows, columns = torch.arange(height), torch.arange(width)
    inside = (rows >= tops[:, None]) & (rows < tops[:, None] + box[0])
    across = (columns >= lefts[:, None]) & (columns < lefts[:, None] + box[1])
    mask = (inside[:, :, None] & across[:, None, :])[:, None].to(images.device)
    return torch.where(mask, images[partner.to(images.device)], images)


def _blurred(images: Tensor) -> Tensor:
    sigma = BLUR_SIGMA * min(images.shape[2:])
    size = 2 * max(round(3 * sigma), 1) + 1
    return gaussian_blur(images, [size, size], [sigma, sigma])


def _noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return (images + 255 * NOISE_STD * noise).round_().clamp_(0, 255).to(torch.uint8)


def _cropped(images: Tensor, generator: torch.Generator) -> Tensor:
    height, width = images.shape[2:]
    part = max(round(height * CROP_SIDE), 1), max(round(width * CROP_SIDE), 1)
    tops, lefts = _places((height - part[0], width - part[1]), len(images), generator)
    parts = [
        image[:, top : top + part[0], left : left + part[1]]
        for image, top, left in zip(images, tops.tolist(), lefts.tolist(), strict=True)
    ]
    larger = functional.interpolate(torch.stack(parts).float(), (height, width), mode="bilinear", align_corners=False)
    return larger.round_().to(torch.uint8)


def _places(room: tuple[int, int], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Top and left of a part for each image, uniform over where it fits."""
    tops = torch.randint(room[0] + 1, (count,), generator=generator)
    lefts = torch.randint(room[1] + 1, (count,), generator=generator)
    return tops, lefts
