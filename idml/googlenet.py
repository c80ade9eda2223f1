"""torchvision's GoogLeNet under timm's interface, for timm has none."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn
from torchvision.models import GoogLeNet, GoogLeNet_Weights
from torchvision.models import googlenet as torchvision_googlenet


class GoogLeNetBackbone(GoogLeNet):
    """GoogLeNet (Szegedy et al. 2015) with batch norm and without its auxiliary classifiers, for images from 15 pixels.

    Attributes:
        num_features: 1024, channels of the last feature map.
        num_classes: length of the output; 0 for features.
        pretrained_cfg: the names of the classifiers in torchvision's weight files, which are not needed.
    """

    num_features = head_hidden_size = 1024

    def __init__(self, num_classes: int = 0, dropout: float = 0.0) -> None:
        # torchvision's weights expect mean and standard deviation 0.5; this makes them so from ImageNet's statistics.
        super().__init__(num_classes or 1, aux_logits=False, transform_input=True, init_weights=True, dropout=dropout)
        self.num_classes = num_classes
        self.pretrained_cfg = {"classifier": ("fc", "aux1", "aux2")}
        if num_classes == 0:
            self.fc = nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) float -> (B, 1024, H/32, W/32), rounded up; >= 0."""
        x = self.conv3(self.conv2(self.maxpool1(self.conv1(self._transform_input(x)))))
        x = self.inception3b(self.inception3a(self.maxpool2(x)))
        for name in "abcde":
            x = getattr(self, f"inception4{name}")(x if name != "a" else self.maxpool3(x))
        return self.inception5b(self.inception5a(self.maxpool4(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 1024, h, w) -> (B, num_classes), or the (B, 1024) feature."""
        x = torch.flatten(self.avgpool(x), 1)
        return x if pre_logits else self.fc(self.dropout(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes), or (B, 1024) when there are none."""
        return self.forward_head(self.forward_features(x))


@register_model
def googlenet(pretrained: bool = False, num_classes: int = 0, dropout: float = 0.0, **unused: Any) -> nn.Module:
    """GoogLeNet; ``pretrained`` downloads torchvision's ImageNet weights, of which the classifiers are left out."""
    known = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only"}
    if set(unused) - known:
        raise TypeError(f"googlenet takes num_classes and dropout, got {', '.join(sorted(set(unused) - known))}")
    model = GoogLeNetBackbone(num_classes, dropout)
    if pretrained:
        source = torchvision_googlenet(weights=GoogLeNet_Weights.IMAGENET1K_V1)
        own = model.state_dict()
        state = source.state_dict()
        model.load_state_dict({name: state[name] for name in own if name in state}, strict=False)
    return model
