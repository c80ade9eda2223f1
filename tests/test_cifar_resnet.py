"""CIFAR ResNets: published sizes, blocks against an independent forward pass, registration, and learning."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

import idml.data.embedded
from idml import IntrospectiveClassifier, cifar_resnet
from idml.cifar_resnet import BasicBlock, Bottleneck, CifarBackbone, CifarResNet


def build(name: str, **kwargs: object) -> CifarBackbone:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def shapes(name: str, **kwargs: object) -> dict[str, torch.Size]:
    """Shape of every parameter and buffer, without spending memory or time on their values."""
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in build(name, **kwargs).state_dict().items()}


def parameter_counts(name: str, **kwargs: object) -> tuple[int, int]:
    """With 10 and with 100 classes."""
    with torch.device("meta"):
        model = build(name, num_classes=10, **kwargs)
        count_10 = sum(parameter.numel() for parameter in model.parameters())
        model.reset_classifier(100)
        return count_10, sum(parameter.numel() for parameter in model.parameters())


def fashion_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, 1, 32, 32) float images of the embedded data set, and their labels."""
    folder = Path(idml.data.embedded.__file__).parent
    with np.load(folder / "fashion_mnist_mini.npz") as arrays:
        images, labels = arrays["train_images"][:count], arrays["train_labels"][:count]
    padded = functional.pad(torch.from_numpy(images).float().unsqueeze(1) / 255, (2, 2, 2, 2))
    return (padded - 0.3) / 0.35, torch.from_numpy(labels).long()


def loss_before_and_after_training(model: nn.Module) -> tuple[float, float]:
    """Cross-entropy of 16 images before and after ten steps on them."""
    images, labels = fashion_images(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(11):
        loss = functional.cross_entropy(model(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


def randomise_batch_norms(module: nn.Module) -> None:
    """Statistics and affine parameters that are not 0 and 1, so that leaving one out shows."""
    for submodule in module.modules():
        if isinstance(submodule, nn.BatchNorm2d):
            nn.init.uniform_(submodule.weight, 0.5, 1.5)
            nn.init.normal_(submodule.bias)
            nn.init.normal_(submodule.running_mean)
            nn.init.uniform_(submodule.running_var, 0.5, 1.5)


def apply_layers(
    state: dict[str, torch.Tensor], layers: str, x: torch.Tensor, stride: int, strided: str
) -> torch.Tensor:
    """Run "bn1 conv1 relu ..." with the weights of a block, the stride in the layer ``strided``."""
    for layer in layers.split():
        if layer == "relu":
            x = x.clamp_min(0)
        elif layer.startswith("bn"):
            mean, var, weight, bias = (
                state[f"{layer}.{key}"].view(1, -1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
            )
            x = (x - mean) / (var + 1e-5).sqrt() * weight + bias
        else:
            weight = state[f"{layer}.weight"]
            x = functional.conv2d(x, weight, stride=stride if layer == strided else 1, padding=weight.shape[-1] // 2)
    return x


def block_output_shapes(model: CifarBackbone, images: torch.Tensor) -> list[tuple[int, ...]]:
    """(channels, height, width) after every block."""
    seen: list[tuple[int, ...]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:])))
    with torch.no_grad():
        model.eval()(images)
    return seen


# Million parameters as He et al. 2016 print them in table 6.
@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_parameter_count_rounds_to_the_papers(depth: int, millions: float) -> None:
    count = parameter_counts(f"resnet{depth}_cifar")[0] / 1e6
    assert round(count, 1 if millions > 1 else 2) == millions


def test_exact_parameter_counts() -> None:
    # By hand: 432 + 32 in the stem; 2 * 9 * 16**2 + 64 in a block of the first stage, 3 of them; and so on.
    assert parameter_counts("resnet20_cifar")[0] == 269_722
    # The results table of osmr/imgclsmob, an independent implementation.
    assert parameter_counts("resnet164_bottleneck_cifar") == (1_704_154, 1_727_284)


@pytest.mark.parametrize("name", [name for name, fixed in cifar_resnet.VARIANTS.items() if fixed])
def test_named_entry_is_the_generic_one_with_its_arguments(name: str) -> None:
    assert shapes(name) == shapes("resnet_cifar", **cifar_resnet.VARIANTS[name])


@pytest.mark.parametrize("name", ["resnet14_cifar", "resnet29_bottleneck_cifar"])
def test_named_and_generic_entry_draw_the_same_weights(name: str) -> None:
    named, generic = build(name), build("resnet_cifar", **cifar_resnet.VARIANTS[name])
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(named.eval()(images), generic.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "features"), [({"depth": 8}, 64), ({"depth": 11, "bottleneck": True}, 256)], ids=["basic", "bottleneck"]
)
class TestInterface:
    def test_output_shapes(self, kwargs: dict, features: int) -> None:
        images = torch.randn(2, 3, 32, 32)
        model = build("resnet_cifar", num_classes=0, **kwargs)
        assert model(images).shape == (2, features)
        assert model.num_features == model.head_hidden_size == features
        model = build("resnet_cifar", num_classes=10, **kwargs).eval()
        assert model(images).shape == (2, 10)
        maps = model.forward_features(images)
        assert maps.shape == (2, features, 8, 8)
        pooled = maps.mean((2, 3))
        torch.testing.assert_close(model.forward_head(maps, pre_logits=True), pooled)
        torch.testing.assert_close(model(images), pooled @ model.fc.weight.T + model.fc.bias)

    def test_reset_classifier(self, kwargs: dict, features: int) -> None:
        model = build("resnet_cifar", num_classes=10, **kwargs)
        model.reset_classifier(3)
        assert model.num_classes == 3
        assert model.get_classifier() is model.fc
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
        model.reset_classifier(0)
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, features)

    def test_one_input_channel(self, kwargs: dict, features: int) -> None:
        model = build("resnet_cifar", num_classes=0, in_chans=1, **kwargs)
        assert model(torch.randn(2, 1, 28, 28)).shape == (2, features)

    def test_sizes_that_do_not_divide_by_four_round_up(self, kwargs: dict, features: int) -> None:
        model = build("resnet_cifar", **kwargs)
        assert model.forward_features(torch.randn(1, 3, 30, 33)).shape == (1, features, 8, 9)

    def test_training_lowers_the_loss(self, kwargs: dict, features: int) -> None:
        before, after = loss_before_and_after_training(build("resnet_cifar", num_classes=10, in_chans=1, **kwargs))
        assert after < 0.9 * before

    def test_every_parameter_gets_gradient(self, kwargs: dict, features: int) -> None:
        model = build("resnet_cifar", num_classes=10, in_chans=1, **kwargs)
        images, labels = fashion_images(8)
        functional.cross_entropy(model(images), labels).backward()
        assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


def test_resolution_halves_at_the_second_and_third_stage() -> None:
    images = torch.zeros(1, 3, 32, 32)
    assert block_output_shapes(build("resnet14_cifar"), images) == (
        [(16, 32, 32)] * 2 + [(32, 16, 16)] * 2 + [(64, 8, 8)] * 2
    )
    assert block_output_shapes(build("resnet29_bottleneck_cifar"), images) == (
        [(64, 32, 32)] * 3 + [(128, 16, 16)] * 3 + [(256, 8, 8)] * 3
    )


@pytest.mark.parametrize(("in_channels", "channels", "stride"), [(6, 6, 1), (6, 12, 2)])
def test_basic_block_equals_the_oracle(in_channels: int, channels: int, stride: int) -> None:
    torch.manual_seed(0)
    block = BasicBlock(in_channels, channels, stride).double().eval()
    randomise_batch_norms(block)
    x = torch.randn(2, in_channels, 8, 8, dtype=torch.float64)
    expected = apply_layers(block.state_dict(), "conv1 bn1 relu conv2 bn2", x, stride, strided="conv1")
    before = (channels - in_channels) // 2
    expected[:, before : before + in_channels] += x[:, :, ::stride, ::stride]
    torch.testing.assert_close(block(x), expected.clamp_min(0))


@pytest.mark.parametrize(("in_channels", "stride"), [(16, 1), (16, 2), (6, 1)], ids=["identity", "stride", "width"])
def test_bottleneck_block_equals_the_oracle(in_channels: int, stride: int) -> None:
    torch.manual_seed(0)
    block = Bottleneck(in_channels, 4, stride).double().eval()
    randomise_batch_norms(block)
    state = block.state_dict()
    x = torch.randn(2, in_channels, 8, 8, dtype=torch.float64)
    expected = apply_layers(state, "conv1 bn1 relu conv2 bn2 relu conv3 bn3", x, stride, strided="conv2")
    if stride == 1 and in_channels == 16:
        expected += x
    else:
        projection = {key.replace("0.", "conv.").replace("1.", "bn."): value for key, value in state.items()}
        projection = {key.removeprefix("shortcut."): value for key, value in projection.items()}
        expected += apply_layers(projection, "conv bn", x, stride, strided="conv")
    torch.testing.assert_close(block(x), expected.clamp_min(0))


@pytest.mark.parametrize("depth", [-4, 2, 7, 11, 21])
def test_invalid_depth_of_basic_blocks(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"6n \+ 2 .* basic blocks, got {depth}$"):
        CifarResNet(depth)


@pytest.mark.parametrize("depth", [-7, 2, 10, 14, 32])
def test_invalid_depth_of_bottleneck_blocks(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"9n \+ 2 .* bottleneck blocks, got {depth}$"):
        build("resnet_cifar", depth=depth, bottleneck=True)


def test_a_name_and_an_argument_that_contradict_each_other() -> None:
    with pytest.raises(TypeError, match="depth"):
        build("resnet20_cifar", depth=32)
    with pytest.raises(TypeError, match=r"missing .* 'depth'"):
        build("resnet_cifar")


@pytest.mark.parametrize("name", cifar_resnet.VARIANTS)
def test_registered_with_timm(name: str) -> None:
    assert name in timm.list_models(module="cifar_resnet")
    create = timm.model_entrypoint(name)
    assert pickle.loads(pickle.dumps(create)) is create
    assert create.__module__ == "idml.cifar_resnet"
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.input_size, cfg.num_classes) == ((3, 32, 32), 10)


def test_bottleneck_as_a_backbone_of_the_classifier() -> None:
    model = IntrospectiveClassifier("resnet29_bottleneck_cifar", 10, uncertainty_dim=8)
    output = model(torch.randn(4, 3, 32, 32))
    assert model.feature_dim == 256
    functional.cross_entropy(output.introspective_logits, torch.arange(4)).backward()
    assert model.uncertainty_head.weight.grad.any()
    assert model.backbone.conv1.weight.grad.any()


def test_dropout_of_the_pooled_features() -> None:
    model = build("resnet8_cifar", num_classes=0, drop_rate=0.5)
    images = fashion_images(8)[0].expand(-1, 3, -1, -1)
    plain = model.eval()(images)
    dropped = (model.train().forward_head(torch.ones(8, 64, 8, 8)) == 0).float().mean()
    assert 0.4 < dropped < 0.6
    without = build("resnet8_cifar", num_classes=0)
    without.load_state_dict(model.state_dict())
    assert torch.equal(without.eval()(images), plain)
