"""PyramidNet: published sizes, widths and blocks against independent oracles, registration, and learning."""

from __future__ import annotations

import pickle
from fractions import Fraction

import pytest
import timm
import torch
from torch.nn import functional

from idml import IntrospectiveClassifier, pyramidnet
from idml.pyramidnet import BasicBlock, Bottleneck, PyramidNet, block_widths
from tests.test_cifar_resnet import (
    apply_layers,
    block_output_shapes,
    build,
    fashion_images,
    loss_before_and_after_training,
    parameter_counts,
    randomise_batch_norms,
    shapes,
)


def oracle_widths(alpha: int, blocks: int) -> list[int]:
    """16 + k alpha / N by exact addition, then the nearest integer, halves up."""
    widths, width = [], Fraction(16)
    for _ in range(blocks):
        width += Fraction(alpha, blocks)
        lower = int(width)
        widths.append(lower + (width - lower >= Fraction(1, 2)))
    return widths


def oracle_parameter_count(depth: int, alpha: int, bottleneck: bool, num_classes: int) -> int:
    """Counted from the description: 2 per normalised channel, in * out * k * k per convolution."""
    total, features = 3 * 16 * 9 + 2 * 16, 16
    for width in oracle_widths(alpha, (depth - 2) // (3 if bottleneck else 2)):
        total += 2 * features
        if bottleneck:
            total += features * width + 2 * width + 9 * width**2 + 2 * width + 4 * width**2 + 2 * 4 * width
            features = 4 * width
        else:
            total += 9 * features * width + 2 * width + 9 * width**2 + 2 * width
            features = width
    return total + 2 * features + features * num_classes + num_classes


# The results table of osmr/imgclsmob, an independent implementation, for CIFAR-10 and CIFAR-100.
PUBLISHED_COUNTS = {
    "pyramidnet110_a48_cifar": (1_772_706, 1_778_556),
    "pyramidnet110_a84_cifar": (3_904_446, 3_913_536),
    "pyramidnet110_a270_cifar": (28_485_477, 28_511_307),
    "pyramidnet164_a270_bottleneck_cifar": (27_216_021, 27_319_071),
    "pyramidnet200_a240_bottleneck_cifar": (26_752_702, 26_844_952),
}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_parameter_count_is_the_published_one(name: str) -> None:
    assert parameter_counts(name) == PUBLISHED_COUNTS[name]


# The authors' table of results (README of jhkim89/PyramidNet): depth, alpha, bottleneck, output dimension, million
# parameters. An exact count of the same networks is up to 0.11 M, or 1 %, away from theirs.
@pytest.mark.parametrize(
    ("depth", "alpha", "bottleneck", "features", "millions"),
    [
        (110, 48, False, 64, 1.7),
        (110, 84, False, 100, 3.8),
        (110, 270, False, 286, 28.3),
        (164, 48, True, 256, 1.7),
        (164, 84, True, 400, 3.8),
        (164, 270, True, 1144, 27.0),
        (200, 240, True, 1024, 26.6),
        (236, 220, True, 944, 26.8),
        (272, 200, True, 864, 26.0),
    ],
)
def test_sizes_of_the_authors(depth: int, alpha: int, bottleneck: bool, features: int, millions: float) -> None:
    with torch.device("meta"):
        model = build("pyramidnet_cifar", depth=depth, alpha=alpha, bottleneck=bottleneck, num_classes=10)
    assert model.num_features == features
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert abs(count - millions) <= max(0.11, 0.01 * millions)


@pytest.mark.parametrize(
    ("depth", "alpha", "bottleneck"), [(8, 1, False), (20, 7, False), (11, 5, True), (110, 270, True), (29, 64, True)]
)
def test_parameter_count_equals_the_oracle(depth: int, alpha: int, bottleneck: bool) -> None:
    assert parameter_counts("pyramidnet_cifar", depth=depth, alpha=alpha, bottleneck=bottleneck) == (
        oracle_parameter_count(depth, alpha, bottleneck, 10),
        oracle_parameter_count(depth, alpha, bottleneck, 100),
    )


def test_widths_equal_the_oracle() -> None:
    for blocks in range(1, 100):
        for alpha in (1, 7, 48, 84, 240, 270):
            assert block_widths(alpha, blocks) == oracle_widths(alpha, blocks)
    # By hand: steps of 7.5, and halves go up.
    assert block_widths(270, 36)[:4] == [24, 31, 39, 46]


@pytest.mark.parametrize("name", [name for name, fixed in pyramidnet.VARIANTS.items() if fixed])
def test_named_entry_is_the_generic_one_with_its_arguments(name: str) -> None:
    assert shapes(name) == shapes("pyramidnet_cifar", **pyramidnet.VARIANTS[name])


def test_named_and_generic_entry_draw_the_same_weights() -> None:
    named = build("pyramidnet110_a48_cifar").eval()
    generic = build("pyramidnet_cifar", depth=110, alpha=48).eval()
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(named(images), generic(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "features"),
    [({"depth": 14, "alpha": 20}, 36), ({"depth": 11, "alpha": 20, "bottleneck": True}, 144)],
    ids=["basic", "bottleneck"],
)
class TestInterface:
    def test_output_shapes(self, kwargs: dict, features: int) -> None:
        images = torch.randn(2, 3, 32, 32)
        model = build("pyramidnet_cifar", num_classes=0, **kwargs)
        assert model(images).shape == (2, features)
        assert model.num_features == model.head_hidden_size == features
        model = build("pyramidnet_cifar", num_classes=10, **kwargs).eval()
        assert model(images).shape == (2, 10)
        maps = model.forward_features(images)
        assert maps.shape == (2, features, 8, 8)
        pooled = maps.mean((2, 3))
        torch.testing.assert_close(model.forward_head(maps, pre_logits=True), pooled)
        torch.testing.assert_close(model(images), pooled @ model.fc.weight.T + model.fc.bias)

    def test_reset_classifier(self, kwargs: dict, features: int) -> None:
        model = build("pyramidnet_cifar", num_classes=10, **kwargs)
        model.reset_classifier(3)
        assert model.num_classes == 3
        assert model.get_classifier() is model.fc
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
        model.reset_classifier(0)
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, features)

    def test_one_input_channel(self, kwargs: dict, features: int) -> None:
        model = build("pyramidnet_cifar", num_classes=0, in_chans=1, **kwargs)
        assert model(torch.randn(2, 1, 28, 28)).shape == (2, features)

    def test_sizes_that_do_not_divide_by_four_round_up(self, kwargs: dict, features: int) -> None:
        model = build("pyramidnet_cifar", **kwargs)
        assert model.forward_features(torch.randn(1, 3, 30, 33)).shape == (1, features, 8, 9)

    def test_training_lowers_the_loss(self, kwargs: dict, features: int) -> None:
        before, after = loss_before_and_after_training(build("pyramidnet_cifar", num_classes=10, in_chans=1, **kwargs))
        assert after < 0.9 * before

    def test_every_parameter_gets_gradient(self, kwargs: dict, features: int) -> None:
        model = build("pyramidnet_cifar", num_classes=10, in_chans=1, **kwargs)
        images, labels = fashion_images(8)
        functional.cross_entropy(model(images), labels).backward()
        assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


def test_resolution_halves_at_the_second_and_third_stage() -> None:
    images = torch.zeros(1, 3, 32, 32)
    assert block_output_shapes(build("pyramidnet_cifar", depth=14, alpha=21), images) == [
        *[(20, 32, 32), (23, 32, 32)],
        *[(27, 16, 16), (30, 16, 16)],
        *[(34, 8, 8), (37, 8, 8)],
    ]
    assert block_output_shapes(build("pyramidnet_cifar", depth=20, alpha=6, bottleneck=True), images) == [
        *[(68, 32, 32), (72, 32, 32)],
        *[(76, 16, 16), (80, 16, 16)],
        *[(84, 8, 8), (88, 8, 8)],
    ]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("block_class", "layers", "strided"),
    [
        (BasicBlock, "bn1 conv1 bn2 relu conv2 bn3", "conv1"),
        (Bottleneck, "bn1 conv1 bn2 relu conv2 bn3 relu conv3 bn4", "conv2"),
    ],
)
def test_block_equals_the_oracle(block_class: type, layers: str, strided: str, stride: int) -> None:
    torch.manual_seed(0)
    block = block_class(5, 7, stride).double().eval()
    randomise_batch_norms(block)
    x = torch.randn(2, 5, 8, 8, dtype=torch.float64)
    expected = apply_layers(block.state_dict(), layers, x, stride, strided)
    expected[:, :5] += x.reshape(2, 5, 8 // stride, stride, 8 // stride, stride).mean((3, 5))
    assert expected.min() < 0, "the case must tell whether a ReLU follows the addition"
    torch.testing.assert_close(block(x), expected)


def test_whole_network_equals_the_oracle() -> None:
    model = build("pyramidnet_cifar", depth=8, alpha=9, num_classes=3).double().eval()
    randomise_batch_norms(model)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    state = model.state_dict()
    x = apply_layers(state, "conv1 bn1", images, 1, strided="")
    for block in model.blocks:
        x = block(x)
    x = apply_layers(state, "bn2 relu", x, 1, strided="")
    torch.testing.assert_close(model(images), x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"])


@pytest.mark.parametrize("depth", [-4, 2, 7, 11, 111])
def test_invalid_depth_of_basic_blocks(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"6n \+ 2 .* basic blocks, got {depth}$"):
        PyramidNet(depth, 48)


@pytest.mark.parametrize("depth", [-7, 2, 10, 14, 201])
def test_invalid_depth_of_bottleneck_blocks(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"9n \+ 2 .* bottleneck blocks, got {depth}$"):
        build("pyramidnet_cifar", depth=depth, alpha=48, bottleneck=True)


@pytest.mark.parametrize("alpha", [0, -48])
def test_invalid_alpha(alpha: int) -> None:
    with pytest.raises(ValueError, match=f"alpha must be at least 1, got {alpha}$"):
        build("pyramidnet_cifar", depth=110, alpha=alpha)


def test_a_name_and_an_argument_that_contradict_each_other() -> None:
    with pytest.raises(TypeError, match="alpha"):
        build("pyramidnet110_a48_cifar", alpha=84)
    with pytest.raises(TypeError, match=r"missing .* 'depth' and 'alpha'"):
        build("pyramidnet_cifar")


@pytest.mark.parametrize("name", pyramidnet.VARIANTS)
def test_registered_with_timm(name: str) -> None:
    assert name in timm.list_models(module="pyramidnet")
    create = timm.model_entrypoint(name)
    assert pickle.loads(pickle.dumps(create)) is create
    assert create.__module__ == "idml.pyramidnet"
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.input_size, cfg.num_classes) == ((3, 32, 32), 10)


def test_pyramidnet_200_on_one_image() -> None:
    model = build("pyramidnet200_a240_bottleneck_cifar", num_classes=0).eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, 32, 32))
    assert features.shape == (1, 1024)
    assert features.isfinite().all()


def test_as_a_backbone_of_the_classifier() -> None:
    model = IntrospectiveClassifier("pyramidnet110_a48_cifar", 10, uncertainty_dim=8)
    output = model(torch.randn(4, 3, 32, 32))
    assert model.feature_dim == 64
    assert output.logits.shape == (4, 10)
    functional.cross_entropy(output.introspective_logits, torch.arange(4)).backward()
    assert model.uncertainty_head.weight.grad.any()
    assert model.backbone.conv1.weight.grad.any()
