"""PyramidNet for 32x32 images (Han, Kim and Kim, CVPR 2017, "Deep pyramidal residual networks"), registered with timm.

A 3x3 convolution to 16 channels, then N blocks in three stages of n, then BN, ReLU and global average pooling. The
second and third stage halve the resolution, as in a ResNet; the width, instead of doubling there, grows a little in
every block. With the additive rule block k = 1..N has

    D_k = 16 + k * alpha / N, rounded        (the last block: 16 + alpha)

channels, and gives D_k of them (basic blocks, depth 6n + 2) or 4 D_k (bottleneck blocks, depth 9n + 2).

- A block begins with a batch normalisation without ReLU and ends with one, and nothing follows the addition:
  BN, 3x3, BN, ReLU, 3x3, BN; or BN, 1x1, BN, ReLU, 3x3, BN, ReLU, 1x1, BN.
- Shortcuts have no parameters: the new channels are zero, appended after the old ones, and where the resolution
  halves the shortcut is average-pooled 2x2.
- Rounding is to the nearest integer, halves up, as in the authors' Torch code. The paper prints a floor in every step
  of a recursion, by which alpha = 48 would never widen PyramidNet-110 at all; and a floor of the sum would give
  PyramidNet-200 (alpha 240, 100 classes) 26.7 M parameters, where Yun et al. 2019 (CutMix) report 26.8 M.
- The first convolution is followed by a batch normalisation without ReLU: from the authors' code.

``timm.create_model("pyramidnet110_a48_cifar", num_classes=10)`` works once this module has been imported, and so does
any other size: ``timm.create_model("pyramidnet_cifar", depth=110, alpha=64, bottleneck=True)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional

from idml.cifar_resnet import CifarBackbone, blocks_per_stage, cifar_default_cfgs, entry_point

STEM_CHANNELS = 16
"""Width before the first block, D_0 (paper)."""

VARIANTS: dict[str, dict[str, Any]] = {
    "pyramidnet110_a48_cifar": {"depth": 110, "alpha": 48},
    "pyramidnet110_a84_cifar": {"depth": 110, "alpha": 84},
    "pyramidnet110_a270_cifar": {"depth": 110, "alpha": 270},
    "pyramidnet110_a270_bottleneck_cifar": {"depth": 110, "alpha": 270, "bottleneck": True},
    "pyramidnet164_a270_bottleneck_cifar": {"depth": 164, "alpha": 270, "bottleneck": True},
    "pyramidnet200_a240_bottleneck_cifar": {"depth": 200, "alpha": 240, "bottleneck": True},
    "pyramidnet_cifar": {},  # the caller gives depth= and alpha=, and bottleneck=True if wanted
}
"""Name -> what it fixes of ``PyramidNet``; all but the 110-layer bottleneck network are in the paper's results."""


def block_widths(alpha: int, blocks: int) -> list[int]:
    """D_k of every block: the integers nearest to 16 + k * alpha / blocks, halves rounded up.

    >>> block_widths(alpha=10, blocks=4)
    [19, 21, 24, 26]
    """
    # In integers: a running float sum can fall on either side of a half.
    return [STEM_CHANNELS + (2 * alpha * k + blocks) // (2 * blocks) for k in range(1, blocks + 1)]


def widened_shortcut(x: Tensor, channels: int, stride: int) -> Tensor:
    """(B, C, H, W) -> (B, channels, H/s, W/s), average-pooled and padded with zero channels at the end.

    An odd H or W is rounded up, as a 3x3 convolution with stride 2 and padding 1 does.
    """
    if stride != 1:
        x = functional.avg_pool2d(x, stride, ceil_mode=True)
    extra = channels - x.shape[1]
    return functional.pad(x, (0, 0, 0, 0, 0, extra)) if extra else x


class BasicBlock(nn.Module):
    """BN, 3x3, BN, ReLU, 3x3, BN, and the shortcut: (B, in_channels, H, W) -> (B, channels, H/s, W/s)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(self.bn1(x))
        residual = self.conv2(functional.relu(self.bn2(residual), inplace=True))
        residual = self.bn3(residual)
        return residual + widened_shortcut(x, residual.shape[1], self.stride)


class Bottleneck(nn.Module):
    """BN, 1x1, BN, ReLU, 3x3, BN, ReLU, 1x1, BN, and the shortcut.

    (B, in_channels, H, W) -> (B, 4 channels, H/s, W/s); the stride is in the 3x3 convolution.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, self.expansion * channels, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(self.expansion * channels)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(self.bn1(x))
        residual = self.conv2(functional.relu(self.bn2(residual), inplace=True))
        residual = self.conv3(functional.relu(self.bn3(residual), inplace=True))
        residual = self.bn4(residual)
        return residual + widened_shortcut(x, residual.shape[1], self.stride)


class PyramidNet(CifarBackbone):
    """PyramidNet of depth 6n + 2, or 9n + 2 with bottleneck blocks, with timm's interface.

    Args:
        depth: 6n + 2, or 9n + 2 with ``bottleneck``.
        alpha: widening factor >= 1, the channels gained from the first block to the last.
        num_classes: length of the output; 0 gives the (B, D) pooled features, D = 16 + alpha, or 4 (16 + alpha) with
            ``bottleneck``.
        in_chans: channels of the image.
        bottleneck: bottleneck blocks instead of basic ones.

    Raises:
        ValueError: no network of these blocks has that depth, or alpha is out of range.
    """

    def __init__(
        self,
        depth: int,
        alpha: int,
        num_classes: int = 10,
        in_chans: int = 3,
        *,
        bottleneck: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        blocks_in_stage = blocks_per_stage(depth, bottleneck=bottleneck)
        if alpha < 1:
            raise ValueError(f"alpha must be at least 1, got {alpha}")
        block: type[BasicBlock] | type[Bottleneck] = Bottleneck if bottleneck else BasicBlock
        self.conv1 = nn.Conv2d(in_chans, STEM_CHANNELS, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        blocks: list[nn.Module] = []
        in_channels = STEM_CHANNELS
        for index, channels in enumerate(block_widths(alpha, 3 * blocks_in_stage)):
            stride = 2 if index in (blocks_in_stage, 2 * blocks_in_stage) else 1
            blocks.append(block(in_channels, channels, stride))
            in_channels = channels * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.num_features = in_channels
        self.bn2 = nn.BatchNorm2d(in_channels)
        widths = [channels * block.expansion for channels in block_widths(alpha, 3 * blocks_in_stage)]
        self._finish(num_classes, [STEM_CHANNELS, *widths[blocks_in_stage - 1 :: blocks_in_stage]])

    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        count = len(self.blocks) // 3
        last = self.blocks[2 * count :]
        return [
            lambda x: self.bn1(self.conv1(x)),
            self.blocks[:count],
            self.blocks[count : 2 * count],
            lambda x: functional.relu(self.bn2(last(x)), inplace=True),
        ]


default_cfgs = cifar_default_cfgs(VARIANTS)

for _name, _fixed in VARIANTS.items():
    # An attribute of this module as well: register_model lists the name in __all__, and pickle looks for it here.
    globals()[_name] = register_model(entry_point(PyramidNet, _name, _fixed))
