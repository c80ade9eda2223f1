"""Where is looked inside a network: found by themselves, named, and never a change of what the network gives."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from idml.errors import UserError
from idml.introspection.depths import channels_first, depth_vector, vector_length
from idml.introspection.layers import Layers, Watcher, find_layers, logits_of

NETWORKS: dict[str, tuple[Any, int, list[int], int]] = {
    # network, input size, channels of the maps that are looked at, D
    "resnet": (lambda: timm.create_model("resnet10t", num_classes=5), 64, [64, 128, 256, 512], 512),
    "convnext": (lambda: timm.create_model("convnext_atto", num_classes=5), 64, [40, 80, 160, 320], 320),
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64), 64, [192] * 4, 192),
    "swin": (lambda: torchvision.models.swin_t(weights=None, num_classes=5), 64, [96, 192, 384, 768], 768),
    "efficientnet": (lambda: timm.create_model("tf_efficientnet_lite0", num_classes=5), 64, [24, 40, 112, 1280], 1280),
    "mobilenet": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=5), 64, [16, 24, 288, 288], 1024),
    "densenet": (lambda: torchvision.models.densenet121(num_classes=5), 64, [128, 256, 512, 1024], 1024),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_are_found_and_the_logits_stay_as_they_are(name: str) -> None:
    make, size, channels, features = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        before = network(images)
    layers = find_layers(network, images)
    assert layers.feature_dim == features
    if name != "mobilenet":  # whose stages differ by version
        assert [layer.channels for layer in layers.maps] == channels
    watcher = Watcher(network, layers)
    with torch.no_grad(), watcher.watching():
        after = network(images)
        vector = depth_vector(layers, watcher.maps, watcher.features)
    assert torch.equal(before, after)
    assert vector.shape == (3, vector_length(layers)) and vector.dtype == torch.float32 and vector.isfinite().all()
    assert not watcher.maps and watcher.features is None, "nothing is held afterwards"
    network(images)
    assert not watcher.maps, "nothing is kept outside"
    assert Layers.from_json(layers.as_json()) == layers


def test_training_mode_and_batch_norm_are_left_alone() -> None:
    network = timm.create_model("resnet10t", num_classes=5).train()
    network.layer1.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    find_layers(network, torch.randn(2, 3, 64, 64))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_named_layers() -> None:
    network = timm.create_model("resnet10t", num_classes=5)
    layers = find_layers(network, torch.randn(2, 3, 64, 64), ["layer2", "layer3.0"])
    assert [layer.name for layer in layers.maps] == ["layer2", "layer3.0"]
    with pytest.raises(UserError, match="no module 'layer9'; did you mean layer4"):
        find_layers(network, torch.randn(2, 3, 64, 64), ["layer9"])
    with pytest.raises(UserError, match="module 'fc' gives no map"):
        find_layers(network, torch.randn(2, 3, 64, 64), ["fc"])


class Rows(nn.Module):
    """A module of one's own: logits in a dictionary, a 1 x 1 convolution as the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.last(self.body(images)).flatten(1)}


def test_a_module_of_ones_own() -> None:
    layers = find_layers(Rows(), torch.randn(2, 3, 16, 16))
    assert (layers.features_of, layers.feature_dim) == ("last", 6)
    assert [layer.channels for layer in layers.maps] == [6]


def test_a_module_with_no_layer_to_look_at() -> None:
    class Opaque(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3))

    with pytest.raises(UserError, match=r"Opaque has no layer to look at.*--layers"):
        find_layers(Opaque(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("output", [torch.zeros(2, 3, 4), {"out": torch.zeros(2, 3)}, "text", None])
def test_what_are_no_logits(output: Any) -> None:
    with pytest.raises(UserError, match=r"expected a network that gives \(B, C\) logits, got"):
        logits_of(output)


def test_maps_of_every_kind_become_channels_first() -> None:
    maps = torch.arange(2 * 5 * 3 * 3).view(2, 5, 3, 3).float()
    assert torch.equal(channels_first(maps, "channels first"), maps)
    assert torch.equal(channels_first(maps.permute(0, 2, 3, 1), "channels last"), maps)
    tokens = maps.flatten(2).transpose(1, 2)
    assert torch.equal(channels_first(tokens, "tokens"), maps)
    with_class_token = torch.cat([torch.full((2, 1, 5), -1.0), tokens], dim=1)
    assert torch.equal(channels_first(with_class_token, "tokens"), maps)
    assert channels_first(tokens[:, :8], "tokens").shape == (2, 5, 8, 1), "eight tokens fill no square"


def test_the_vector_by_hand() -> None:
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    layers = find_layers(Rows(), torch.randn(2, 3, 4, 4))
    layers = Layers(tuple(type(layers.maps[0])("m", "channels first", 1) for _ in range(1)), "f", 2)
    vector = depth_vector(layers, {"m": maps}, torch.tensor([[7.0, 8.0]]))
    assert vector.tolist() == [[2.5, 4.5, 10.5, 12.5, 15.0, 7.0, 8.0]]
