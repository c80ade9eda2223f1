"""The two-headed embedder: its output, its pooling against hand-made maps, and every backbone it promises."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from idml import UserError
from idml.backbones import ALIASES, create_backbone
from idml.checkpoint import load_weights
from idml.embedder import EmbedderOutput, IntrospectiveEmbedder, pool_features
from idml.heads import UncertaintyHead
from idml.losses import MetricLoss

VARIANTS = ["live", "released", "off"]


class Map(nn.Module):
    """A network that gives a (B, channels, 4, 4) map of 16 x 16 images."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, channels, 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(self.convolution(images))


def images(count: int = 4, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def embedder(ism: Any = "live", **arguments: Any) -> IntrospectiveEmbedder:
    torch.manual_seed(1)
    return IntrospectiveEmbedder(Map(), 5, 3, ism=ism, **({"feature_dim": 6} | arguments))


@pytest.mark.parametrize("ism", VARIANTS)
@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_output_equals_the_definition(ism: str, l2_norm: bool, training: bool) -> None:
    model = embedder(ism, l2_norm=l2_norm).train(training)
    nn.init.normal_(model.semantic_head.bias)
    output = model(images())
    assert isinstance(output, EmbedderOutput)
    feature = model.backbone(images()).detach().double().numpy()
    feature = feature.mean((2, 3)) + feature.max((2, 3))  # (4, 6)

    def head(layer: nn.Linear) -> np.ndarray:
        return feature @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    semantic = head(model.semantic_head)
    np.testing.assert_allclose(output.norm.detach(), np.linalg.norm(semantic, axis=1), rtol=1e-5)
    np.testing.assert_allclose(output.semantic.detach(), unit(semantic) if l2_norm else semantic, rtol=1e-4, atol=1e-5)
    if ism == "off":
        expected = np.zeros((4, 3))
    else:
        assert model.uncertainty_head is not None
        # The live head is small by its gain, not by its weights.
        expected = head(model.uncertainty_head) * (model.uncertainty_head.gain.item() if ism == "live" else 1)
        expected = unit(expected) if ism == "released" and l2_norm else expected
        assert np.abs(expected).min() > 0
    np.testing.assert_allclose(output.uncertainty.detach(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(output.joint(), torch.cat([output.semantic, output.uncertainty], dim=1))


def test_off_has_no_uncertainty_head() -> None:
    model = embedder("off")
    assert model.uncertainty_head is None
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"backbone", "semantic_head"}


def test_the_contract_of_arguments() -> None:
    model = IntrospectiveEmbedder("resnet8_cifar")
    assert (model.embedding_dim, model.uncertainty_dim, model.pool, model.ism) == (512, 512, "avg+max", "live")
    model = IntrospectiveEmbedder("resnet8_cifar", embedding_dim=32, uncertainty_dim=8, pool="max", ism="released")
    output = model(images(2, 32))
    assert output.semantic.shape == (2, 32) and output.uncertainty.shape == (2, 8) and output.norm.shape == (2,)
    assert IntrospectiveEmbedder("resnet8_cifar", 32).uncertainty_dim == 32


HAND_MADE = torch.tensor([[[[1.0, 5.0], [2.0, 4.0]], [[-1.0, -3.0], [-2.0, -6.0]], [[0.0, 0.0], [0.0, 8.0]]]])
AVERAGE, MAXIMUM = [3.0, -3.0, 2.0], [5.0, -1.0, 8.0]  # of the three channels


@pytest.mark.parametrize("pool", ["avg", "max", "avg+max"])
def test_pooling_of_a_hand_made_map(pool: Any) -> None:
    expected = torch.tensor(
        [{"avg": a, "max": m, "avg+max": a + m}[pool] for a, m in zip(AVERAGE, MAXIMUM, strict=True)]
    )[None]
    assert torch.equal(pool_features(HAND_MADE, pool, 3), expected)
    assert torch.equal(pool_features(HAND_MADE.contiguous(memory_format=torch.channels_last), pool, 3), expected)
    last = HAND_MADE.permute(0, 2, 3, 1)  # as Swin gives it
    assert torch.equal(pool_features(last, pool, 3), expected)
    assert torch.equal(pool_features(last, pool, 3, skip=1), expected)  # a map has no prefix tokens
    tokens = torch.cat([torch.full((1, 2, 3), 100.0), last.flatten(1, 2)], dim=1)  # (1, 2 + 4, 3)
    assert torch.equal(pool_features(tokens, pool, 3, skip=2), expected)
    assert not torch.equal(pool_features(tokens, pool, 3), expected)
    assert torch.equal(pool_features(expected, pool, 3), expected)


def test_a_map_as_wide_as_it_has_channels_is_taken_channels_first() -> None:
    square = torch.arange(27.0).reshape(1, 3, 3, 3)
    assert torch.equal(pool_features(square, "avg", 3), square.mean((2, 3)))


def test_the_maximum_passes_its_gradient_to_one_place() -> None:
    tied = torch.ones(1, 1, 2, 2, requires_grad=True)
    pool_features(tied, "max", 1).sum().backward()
    assert tied.grad is not None and sorted(tied.grad.flatten().tolist()) == [0, 0, 0, 1]


@pytest.mark.parametrize("shape", [(2, 3, 4, 4, 4), (3,)])
def test_pooling_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="feature map, tokens or features"):
        pool_features(torch.ones(shape), "avg", 3)


def backbone_of(name: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    return create_backbone(name, image_size=size)


PROMISED = {
    "resnet18": (512, 64), "resnet34": (512, 64), "resnet50": (2048, 64), "resnet101": (2048, 64),
    "googlenet": (1024, 64), "vit_small": (384, 32), "efficientnet": (1280, 64), "resnet8_cifar": (64, 32),
    "mobilenetv3_small_100": (576, 64), "convnext_atto": (320, 64), "swin_tiny_patch4_window7_224": (768, 64),
}  # fmt: skip

BEHIND_THE_MAP = {"mobilenetv3_small_100": {"conv_head"}, "convnext_atto": {"head"}}
"""What timm has between the map and the classifier."""


@pytest.mark.parametrize("name", PROMISED)
def test_promised_backbones_train_all_their_parameters(name: str) -> None:
    """Training on several processes forbids a trainable parameter that no loss reaches."""
    channels, size = PROMISED[name]
    model = IntrospectiveEmbedder(backbone_of(name, size), 16, 8)
    assert model.feature_dim == channels
    output = model(images(2, size))
    assert output.semantic.shape == (2, 16) and output.uncertainty.shape == (2, 8)
    torch.testing.assert_close(output.semantic.norm(dim=1), torch.ones(2))
    (output.joint() * torch.randn(2, 24)).sum().backward()
    unreached = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unreached == []
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    frozen = {n.split(".")[1] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == BEHIND_THE_MAP.get(name, set())
    with torch.no_grad():
        assert [field.shape for field in model.eval()(images(2, size))[:3]] == [field.shape for field in output[:3]]


@pytest.mark.parametrize("name", ["resnet34", "googlenet", "swin_tiny_patch4_window7_224"])
def test_average_pooling_is_timms_own_feature(name: str) -> None:
    """Where nothing lies between the map and the classifier, the backbone itself pools by the mean."""
    backbone = backbone_of(name, 64).eval()
    model = IntrospectiveEmbedder(backbone, 4, pool="avg").eval()
    with torch.no_grad():
        ours, theirs = model.features(images(2, 64)), backbone(images(2, 64))
    assert theirs.std() > 0
    torch.testing.assert_close(ours / theirs.std(), theirs / theirs.std(), rtol=1e-4, atol=1e-4)


def test_patch_tokens_are_pooled_and_the_class_token_is_not() -> None:
    backbone = backbone_of("vit_small", 32).eval()
    model = IntrospectiveEmbedder(backbone, 4, pool="max").eval()
    with torch.no_grad():
        tokens = backbone.forward_features(images(2, 32))  # type: ignore[operator]
        assert tokens.shape == (2, 1 + 4, 384)
        assert torch.equal(model.features(images(2, 32)), tokens[:, 1:].amax(1))


def test_aliases_are_models_of_timm() -> None:
    assert {"vit_small", "efficientnet"} == set(ALIASES)
    assert all(timm.is_model(name) for name in ALIASES.values())
    with pytest.raises(UserError, match=r"unknown model .resnet51.*did you mean resnet5"):
        IntrospectiveEmbedder("resnet51")


def test_modules_of_ones_own() -> None:
    """A map is pooled, features are taken as they are; their length is found by trying."""
    gives_map = nn.Sequential(nn.Conv2d(3, 7, 3, 2), nn.BatchNorm2d(7), nn.ReLU())
    gives_features = nn.Sequential(gives_map, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for backbone in (gives_map, gives_features):
        before = {name: value.clone() for name, value in backbone.state_dict().items()}
        model = IntrospectiveEmbedder(backbone, 5, pool="avg")
        assert model.feature_dim == 7 and backbone.training
        assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
        model.eval()
        with torch.no_grad():
            expected = gives_map(images()).mean((2, 3))
            torch.testing.assert_close(model.features(images()), expected)
    with pytest.raises(ValueError, match="feature_dim=D"):
        IntrospectiveEmbedder(nn.Linear(3, 4))
    wrong = IntrospectiveEmbedder(nn.Flatten(), 5, feature_dim=7)
    with pytest.raises(ValueError, match=r"features of 7 channels, got \(4, 768\)"):
        wrong(images())


def test_names_with_a_classifier_and_ready_made_timm_models_are_alike() -> None:
    torch.manual_seed(0)
    ready = timm.create_model("resnet8_cifar", num_classes=10)
    model = IntrospectiveEmbedder(ready, 4)
    assert model.feature_dim == 64 and model(images(2, 32)).semantic.shape == (2, 4)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ism", VARIANTS)
def test_heads_stay_in_float32_under_autocast(precision: torch.dtype, ism: Any) -> None:
    model = embedder(ism)
    with torch.autocast("cpu", precision):
        features, output = model.features(images()), model(images())
    assert {field.dtype for field in (features, *output[:3])} == {torch.float32}
    semantic = functional.linear(features, model.semantic_head.weight, model.semantic_head.bias)
    torch.testing.assert_close(output.norm, semantic.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(output.semantic, functional.normalize(semantic, dim=1), rtol=1e-6, atol=1e-7)
    output.joint().square().mul(torch.randn(4, 8)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("dims", [(64, 512), (2048, 512), (512, 16)])
def test_the_start_of_the_live_head_follows_its_derivation(dims: tuple[int, int]) -> None:
    """Features of mean square 1 and pairs at alpha = 1/4 have the mean exponent 0.05."""
    features, width = dims
    torch.manual_seed(0)
    head = IntrospectiveEmbedder(nn.Flatten(), 4, width, feature_dim=features).uncertainty_head
    assert isinstance(head, UncertaintyHead) and not head.bias.any()
    assert head.weight.std().item() == pytest.approx(1, rel=0.05)
    beta = head(torch.randn(200, features)).square().sum(1)
    assert (beta / (5 * 0.25)).mean().item() == pytest.approx(0.05, rel=0.1)


def test_the_released_start() -> None:
    """Semantic head: kaiming, fan out; uncertainty head: torch's own start, uniform up to 1 / sqrt(H)."""
    model = IntrospectiveEmbedder(nn.Flatten(), 512, 512, ism="released", feature_dim=768)
    assert not model.semantic_head.bias.any()
    assert model.semantic_head.weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.02)
    head = model.uncertainty_head
    assert head is not None and head.bias.any()
    bound = 1 / math.sqrt(768)
    assert head.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert head.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("aux_logits", [True, False])
def test_torchvisions_googlenet_weights_load_from_a_file(tmp_path: Path, aux_logits: bool) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.googlenet(weights=None, aux_logits=aux_logits, init_weights=False, transform_input=True)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    theirs.train()(images(8, 64))  # running statistics as after training, without which the signal dies away
    theirs.eval()
    torch.save(theirs.state_dict(), tmp_path / "googlenet.pth")
    ours = create_backbone("googlenet").eval()
    theirs.fc = nn.Identity()
    with torch.no_grad():
        assert theirs(images(2, 64)).std() > 0.05
        assert not torch.allclose(ours(images(2, 64)), theirs(images(2, 64)), rtol=0.1, atol=0.1)
        load_weights(ours, tmp_path / "googlenet.pth")
        torch.testing.assert_close(ours(images(2, 64)), theirs(images(2, 64)))
        torch.testing.assert_close(
            IntrospectiveEmbedder(ours, 4, pool="avg").eval().features(images(2, 64)), theirs(images(2, 64))
        )


def test_googlenet_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = create_backbone("googlenet").state_dict()
    del state["conv1.conv.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"conv1\.conv\.weight is missing"):
        load_weights(create_backbone("googlenet"), tmp_path / "part.pth")
    with pytest.raises(UserError, match="takes num_classes and dropout, got depth"):
        create_backbone("googlenet", arguments={"depth": 3})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"ism": "alive"}, "live, released, off; got 'alive'"),
        ({"pool": "mean"}, r"avg\+max, avg, max; got 'mean'"),
        ({"embedding_dim": 0}, "at least 1, got 0 and 3"),
        ({"uncertainty_dim": 0}, "at least 1, got 5 and 0"),
    ],
)
def test_bad_arguments_carry_the_value(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        IntrospectiveEmbedder(**({"backbone": Map(), "embedding_dim": 5, "uncertainty_dim": 3} | arguments))


def test_plain_and_live_start_from_the_same_network_and_proxies() -> None:
    """So that a comparison by seeds differs in the ISM alone."""

    def start(ism: Any) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = IntrospectiveEmbedder("resnet8_cifar", 32, ism=ism)
        proxies = MetricLoss("Proxy_Anchor", 10, 32, ism=ism).proxies
        assert proxies is not None
        return model.state_dict() | {"proxies": proxies.detach()}

    plain, live = start("off"), start("live")
    assert all(torch.equal(value, live[name]) for name, value in plain.items())
    assert len(live) > len(plain)
