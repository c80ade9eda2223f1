"""torchvision's GoogLeNet under timm's interface, for timm has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torchvision.models import GoogLeNet, GoogLeNet_Weights
from torchvision.models import googlenet as torchvision_googlenet

from idml.cifar_resnet import through_stages
from idml.data.image_dataset import CROP_SHARE, IMAGENET_MEAN, IMAGENET_STD


class GoogLeNetBackbone(GoogLeNet):
    """GoogLeNet (Szegedy et al. 2015) with batch norm and without its auxiliary classifiers, for images from 15 pixels.

    Attributes:
        num_features: 1024, channels of the last feature map.
        num_classes: length of the output; 0 for features.
        pretrained_cfg: the names of the classifiers in torchvision's weight files, which are not needed.
    """

    num_features = head_hidden_size = 1024
    feature_info = ({"num_chs": 192}, {"num_chs": 480}, {"num_chs": 832}, {"num_chs": 1024})

    def __init__(self, num_classes: int = 0, dropout: float = 0.0) -> None:
        # torchvision's weights expect mean and standard deviation 0.5; this makes them so from ImageNet's statistics.
        super().__init__(num_classes or 1, aux_logits=False, transform_input=True, init_weights=True, dropout=dropout)
        self.num_classes = num_classes
        self.pretrained_cfg = {"classifier": ("fc", "aux1", "aux2")}
        if num_classes == 0:
            self.fc = nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) float -> (B, 1024, H/32, W/32), rounded up; >= 0."""
        return self.forward_intermediates(x, indices=[])[0]

    def forward_intermediates(self, x: Tensor, indices: list[int]) -> tuple[Tensor, list[Tensor]]:
        """timm's: (the last map, those at the resolutions H/4, H/8, H/16 and H/32 that ``indices`` name)."""

        def fourth(x: Tensor) -> Tensor:
            for name in "abcde":
                x = getattr(self, f"inception4{name}")(x if name != "a" else self.maxpool3(x))
            return x

        stages: list[Callable[[Tensor], Tensor]] = [
            lambda x: self.conv3(self.conv2(self.maxpool1(self.conv1(self._transform_input(x))))),
            lambda x: self.inception3b(self.inception3a(self.maxpool2(x))),
            fourth,
            lambda x: self.inception5b(self.inception5a(self.maxpool4(x))),
        ]
        return through_stages(stages, x, indices)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 1024, h, w) -> (B, num_classes), or the (B, 1024) feature."""
        x = torch.flatten(self.avgpool(x), 1)
        return x if pre_logits else self.fc(self.dropout(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes), or (B, 1024) when there are none."""
        return self.forward_head(self.forward_features(x))


WEIGHTS = GoogLeNet_Weights.IMAGENET1K_V1

default_cfgs = generate_default_cfgs(
    {
        "googlenet.tv_in1k": {
            "url": WEIGHTS.url,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "interpolation": "bilinear",
            "crop_pct": CROP_SHARE,
            "classifier": "fc",
        }
    }
)
"""Where timm looks what images the weights expect."""


@register_model
def googlenet(pretrained: bool = False, num_classes: int = 0, dropout: float = 0.0, **unused: Any) -> nn.Module:
    """GoogLeNet; ``pretrained`` downloads torchvision's ImageNet weights, of which the classifiers are left out."""
    known = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only"}
    if set(unused) - known:
        raise TypeError(f"googlenet takes num_classes and dropout, got {', '.join(sorted(set(unused) - known))}")
    model = GoogLeNetBackbone(num_classes, dropout)
    if pretrained:
        source = torchvision_googlenet(weights=WEIGHTS)
        own = model.state_dict()
        state = source.state_dict()
        model.load_state_dict({name: state[name] for name in own if name in state}, strict=False)
    return model
