"""Residual networks for 32x32 images (He et al. 2016, section 4.2), registered with timm.

Depth 6n + 2: a 3x3 convolution, then three stages of n basic blocks with 16, 32 and 64 channels, the second and third
stage halving the resolution, then global average pooling. Shortcuts across stages are free of parameters
(subsampling and zero padding, "option A"). ResNet-20 has 0.27 M parameters, ResNet-110 has 1.7 M.

``timm.create_model("resnet20_cifar", num_classes=10)`` works once ``idml`` has been imported.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional

DEPTHS = (8, 14, 20, 32, 44, 56, 110)

default_cfgs = generate_default_cfgs(
    {
        f"resnet{depth}_cifar": {
            "input_size": (3, 32, 32),
            "num_classes": 10,
            "pool_size": (8, 8),
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for depth in DEPTHS
    }
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.extra_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride != 1:
            shortcut = shortcut[:, :, :: self.stride, :: self.stride]
        if self.extra_channels:
            half = self.extra_channels // 2
            shortcut = functional.pad(shortcut, (0, 0, 0, 0, half, self.extra_channels - half))
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 with timm's interface.

    Args:
        depth: 6n + 2.
        num_classes: length of the output; 0 gives the (B, 64) pooled features.
        in_chans: channels of the image.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 with n >= 1, got {depth}")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = 64
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        in_channels = 16
        for channels, first_stride in ((16, 1), (32, 2), (64, 2)):
            for index in range((depth - 2) // 6):
                blocks.append(BasicBlock(in_channels, channels, first_stride if index == 0 else 1))
                in_channels = channels
        self.blocks = nn.Sequential(*blocks)
        self.fc: nn.Module = nn.Linear(64, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(64, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, 64, H/4, W/4)."""
        return self.blocks(functional.relu(self.bn1(self.conv1(x)), inplace=True))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 64, H/4, W/4) -> (B, num_classes), or the (B, 64) feature."""
        x = torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _create(depth: int, pretrained: bool, **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, f"resnet{depth}_cifar", pretrained, depth=depth, **kwargs)


@register_model
def resnet8_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return _create(8, pretrained, **kwargs)


@register_model
def resnet14_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return _create(14, pretrained, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return _create(20, pretrained, **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return _create(32, pretrained, **kwargs)


@register_model
def resnet44_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return _create(44, pretrained, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return _create(56, pretrained, **kwargs)


@register_model
def resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return _create(110, pretrained, **kwargs)
