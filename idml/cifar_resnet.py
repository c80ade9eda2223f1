"""Residual networks for 32x32 images (He et al. 2016, "Deep residual learning", section 4.2), registered with timm.

A 3x3 convolution, then three stages of n blocks with 16, 32 and 64 channels, the second and third stage halving the
resolution, then global average pooling.

- Basic blocks: depth 6n + 2. Shortcuts across stages are free of parameters (subsampling and zero padding,
  "option A"). ResNet-20 has 0.27 M parameters, ResNet-110 has 1.7 M.
- Bottleneck blocks: depth 9n + 2, and every stage gives four times its channels: 64, 128 and 256. Batch normalisation
  and ReLU follow the convolutions, as in the paper's figure 5: this is the unit that He et al. 2016b ("Identity
  mappings in deep residual networks", figure 4a) call "original", not their pre-activation one. Shortcuts that change
  the width or the resolution are a 1x1 convolution and a batch normalisation ("option B", the paper's choice for its
  bottleneck networks); all others are the identity. The stride is in the 3x3 convolution, where the CutMix authors
  have it, not in the first 1x1 one. ResNet-164 has 1.7 M parameters. He et al. 2016b
  warm up with learning rate 0.01 for 400 steps before they go to 0.1; without, the loss leaps at the start.

``timm.create_model("resnet20_cifar", num_classes=10)`` works once ``idml.backbones`` has been imported, and so
does any other depth: ``timm.create_model("resnet_cifar", depth=38, bottleneck=True)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional

DEPTHS = (8, 14, 20, 32, 44, 56, 110)
BOTTLENECK_DEPTHS = (29, 164)

VARIANTS: dict[str, dict[str, Any]] = {
    **{f"resnet{depth}_cifar": {"depth": depth} for depth in DEPTHS},
    **{f"resnet{depth}_bottleneck_cifar": {"depth": depth, "bottleneck": True} for depth in BOTTLENECK_DEPTHS},
    "resnet_cifar": {},  # the caller gives depth=, and bottleneck=True if wanted
}
"""Name -> what it fixes of ``CifarResNet``."""


def cifar_default_cfgs(names: Iterable[str]) -> dict[str, Any]:
    """What timm wants to know of a ``CifarBackbone`` that has no pretrained weights, for each name."""
    cfg = {
        "input_size": (3, 32, 32),
        "num_classes": 10,
        "pool_size": (8, 8),
        "first_conv": "conv1",
        "classifier": "fc",
    }
    return generate_default_cfgs(dict.fromkeys(names, cfg))


def entry_point(model_class: type[nn.Module], name: str, fixed: dict[str, Any]) -> Callable[..., nn.Module]:
    """The function that timm calls for ``timm.create_model(name, **kwargs)``.

    Args:
        model_class: what it builds.
        name: of the model.
        fixed: arguments of ``model_class`` that the name stands for; giving one of them again is a TypeError.
    """

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(model_class, name, pretrained, **fixed, **kwargs)

    # timm registers a function under its __name__, and looks up the default_cfgs of its __module__.
    create.__name__ = create.__qualname__ = name
    create.__module__ = model_class.__module__
    return create


def blocks_per_stage(depth: int, *, bottleneck: bool) -> int:
    """n, the number of blocks in each of three stages.

    Args:
        depth: convolutions and the classifier: 6n + 2, or 9n + 2 for bottleneck blocks.
        bottleneck: three convolutions a block instead of two.

    Raises:
        ValueError: there is no such n >= 1.
    """
    step = 9 if bottleneck else 6
    if depth < step + 2 or (depth - 2) % step:
        kind = "bottleneck" if bottleneck else "basic"
        raise ValueError(f"depth must be {step}n + 2 with n >= 1 for {kind} blocks, got {depth}")
    return (depth - 2) // step


class CifarBackbone(nn.Module):
    """timm's interface to a network that ends in average pooling and a linear classifier.

    A subclass sets ``num_features``, makes its layers, calls ``_finish`` and defines ``stages``.

    Attributes:
        num_features: D, channels of the last feature map; ``head_hidden_size`` is the same.
        num_classes: length of the output; 0 for features.
        fc: the classifier, or the identity.
        feature_info: channels of the map after each of ``stages``, under the name that timm has for them.
    """

    num_features: int
    head_hidden_size: int
    num_classes: int
    fc: nn.Module
    feature_info: list[dict[str, int]]
    drop_rate: float

    def _finish(self, num_classes: int, channels: list[int]) -> None:
        """Add the classifier, and draw the weights of the convolutions (normal of variance 2 / fan_out, He 2015).

        Args:
            num_classes: 0 for features.
            channels: of the map after each of ``stages``.
        """
        self.feature_info = [{"num_chs": number} for number in channels]
        self.head_hidden_size = self.num_features
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier with random weights, or none with 0."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        """The network up to the last map, cut after the first convolution and wherever the resolution falls."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) float -> (B, D, H/4, W/4), rounded up; >= 0."""
        return self.forward_intermediates(x, indices=[])[0]

    def forward_intermediates(self, x: Tensor, indices: list[int]) -> tuple[Tensor, list[Tensor]]:
        """timm's: (the last map, those after the stages that ``indices`` name)."""
        return through_stages(self.stages(), x, indices)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, D, H/4, W/4) -> (B, num_classes), or the (B, D) feature."""
        x = torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1)
        if self.drop_rate:
            x = functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def through_stages(
    stages: list[Callable[[Tensor], Tensor]], x: Tensor, indices: list[int]
) -> tuple[Tensor, list[Tensor]]:
    """(What the last stage gives, what those at ``indices`` give)."""
    outputs = []
    for number, stage in enumerate(stages):
        x = stage(x)
        if number in indices:
            outputs.append(x)
    return x, outputs


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut: (B, in_channels, H, W) -> (B, channels, H/s, W/s)."""

    expansion = 1

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


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut: (B, in_channels, H, W) -> (B, 4 channels, H/s, W/s)."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        x = functional.relu(self.bn2(self.conv2(x)), inplace=True)
        return functional.relu(self.bn3(self.conv3(x)) + shortcut, inplace=True)


class CifarResNet(CifarBackbone):
    """ResNet of depth 6n + 2, or 9n + 2 with bottleneck blocks, with timm's interface.

    Args:
        depth: 6n + 2, or 9n + 2 with ``bottleneck``.
        num_classes: length of the output; 0 gives the (B, D) pooled features, D = 64, or 256 with ``bottleneck``.
        in_chans: channels of the image.
        bottleneck: bottleneck blocks instead of basic ones.
        drop_rate: share of the pooled features that dropout removes in training; timm's train.py passes it always.

    Raises:
        ValueError: no network of these blocks has that depth.
    """

    def __init__(
        self, depth: int, num_classes: int = 10, in_chans: int = 3, *, bottleneck: bool = False, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        blocks_in_stage = blocks_per_stage(depth, bottleneck=bottleneck)
        block: type[BasicBlock] | type[Bottleneck] = Bottleneck if bottleneck else BasicBlock
        self.num_features = 64 * block.expansion
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        in_channels = 16
        for channels, first_stride in ((16, 1), (32, 2), (64, 2)):
            for index in range(blocks_in_stage):
                blocks.append(block(in_channels, channels, first_stride if index == 0 else 1))
                in_channels = channels * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self._finish(num_classes, [16, *(channels * block.expansion for channels in (16, 32, 64))])

    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        count = len(self.blocks) // 3
        return [
            lambda x: functional.relu(self.bn1(self.conv1(x)), inplace=True),
            *(self.blocks[stage * count : (stage + 1) * count] for stage in range(3)),
        ]


default_cfgs = cifar_default_cfgs(VARIANTS)

for _name, _fixed in VARIANTS.items():
    # An attribute of this module as well: register_model lists the name in __all__, and pickle looks for it here.
    globals()[_name] = register_model(entry_point(CifarResNet, _name, _fixed))
