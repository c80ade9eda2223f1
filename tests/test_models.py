"""The two-headed classifier: its output, its variants, its backbones, and its use in somebody else's loop."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from idml import ClassifierOutput, IntrospectiveClassifier, UserError, uncertainty_score
from idml.backbones import infer_feature_dim
from idml.heads import RectifiedHead
from tests.test_similarity import oracle_classifier


def small_backbone(features: int = 6) -> nn.Module:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, features), nn.ReLU())
    backbone.num_features = features  # type: ignore[assignment]
    return backbone


def images(count: int = 5, size: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ism", ["live", "released"])
@pytest.mark.parametrize("training", [True, False])
def test_output_equals_the_oracle(ism: str, training: bool) -> None:
    torch.manual_seed(0)
    model = IntrospectiveClassifier(small_backbone(), 4, uncertainty_dim=3, ism=ism, temperature=2.0).train(training)
    nn.init.normal_(model.classifier.bias)
    output = model(images())
    case = {
        "features": output.semantic,
        "weight": model.classifier.weight,
        "bias": model.classifier.bias,
        "uncertainty": output.uncertainty,
    }
    case = {name: tensor.detach().double().numpy() for name, tensor in case.items()}
    np.testing.assert_allclose(
        output.introspective_logits.detach().numpy(), oracle_classifier(case, ism, 2.0)[1], rtol=1e-4, atol=1e-5
    )
    plain = case["features"] @ case["weight"].T + case["bias"]
    np.testing.assert_allclose(output.logits.detach().numpy(), plain, rtol=1e-5, atol=1e-6)
    head = model.uncertainty_head
    expected = functional.relu(head(output.semantic))
    if ism == "live" and training:  # relative to the batch
        expected = expected * (output.uncertainty.norm() / expected.norm())
    torch.testing.assert_close(output.uncertainty, expected)


def test_off_is_the_plain_classifier() -> None:
    model = IntrospectiveClassifier(small_backbone(), 4, ism="off", uncertainty_dim=3)
    output = model(images())
    assert output.introspective_logits is output.logits
    assert model.uncertainty_head is None
    assert output.uncertainty.shape == (5, 3)
    assert not output.uncertainty.any()
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"backbone", "classifier"}


@pytest.mark.parametrize("ism", ["live", "released", "off"])
def test_output_is_the_same_type_and_shape_in_training_and_evaluation(ism: str) -> None:
    model = IntrospectiveClassifier("resnet8_cifar", 10, uncertainty_dim=16, ism=ism)
    for training in (True, False):
        output = model.train(training)(images(3, 32))
        assert isinstance(output, ClassifierOutput)
        assert [tuple(field.shape) for field in output[:4]] == [(3, 10), (3, 10), (3, 64), (3, 16)]
        assert {field.dtype for field in output[:4]} == {torch.float32}
        assert output.scores is None, "these are of an introspection"
        assert (output.exponent is None) == (ism == "off")
        assert output.exponent is None or output.exponent.shape == (3,)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_heads_stay_in_float32_under_autocast(precision: torch.dtype) -> None:
    model = IntrospectiveClassifier(small_backbone(), 4, uncertainty_dim=3)
    with torch.autocast("cpu", dtype=precision):
        output = model(images())
        loss = functional.cross_entropy(output.introspective_logits, torch.zeros(5, dtype=torch.long))
    assert {field.dtype for field in output[:4]} == {torch.float32}
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_a_model_cast_to_bfloat16_runs() -> None:
    model = IntrospectiveClassifier(small_backbone(), 4, uncertainty_dim=3).bfloat16()
    output = model(images().bfloat16())
    assert torch.isfinite(output.introspective_logits).all()


@pytest.mark.parametrize(
    ("backbone", "classes", "size"),
    [("resnet8_cifar", 10, 32), ("resnet18", 100, 64), ("mobilenetv3_small_050", 7, 64)],
)
def test_live_starts_close_to_the_plain_classifier_and_its_head_learns(backbone: str, classes: int, size: int) -> None:
    torch.manual_seed(0)
    model = IntrospectiveClassifier(backbone, classes, ism="live", uncertainty_dim=128)
    output = model(images(16, size))
    weights = (1 - output.introspective_logits) / (1 - output.logits)
    assert 0.9 < weights.mean() < 1.0
    functional.cross_entropy(output.introspective_logits, torch.arange(16) % classes).backward()
    gradient = model.uncertainty_head.weight.grad
    # Features share a large mean, so a ReLU unit tends to be on or off for all images of an untrained network at once.
    assert (gradient.abs().sum(1) > 0).float().mean() > 0.4


def test_uncertainty_score_is_the_norm() -> None:
    output = IntrospectiveClassifier(small_backbone(), 4, uncertainty_dim=3)(images())
    expected = np.linalg.norm(output.uncertainty.detach().numpy(), axis=1)
    np.testing.assert_allclose(uncertainty_score(output).detach().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "efficientnet_b0", "vit_tiny_patch16_224"])
def test_feature_length_of_timm_models(name: str) -> None:
    backbone = timm.create_model(name, num_classes=0)
    with torch.no_grad():
        assert infer_feature_dim(backbone) == backbone.eval()(images(1, 224)).shape[1]


def test_feature_length_of_any_module_is_found_by_trying() -> None:
    backbone = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert infer_feature_dim(backbone) == 5
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    with pytest.raises(ValueError, match="feature_dim"):
        infer_feature_dim(nn.Linear(3, 4))
    assert IntrospectiveClassifier(nn.Linear(3, 4), 2, feature_dim=4)(torch.ones(2, 3)).logits.shape == (2, 2)


def test_a_backbone_with_its_classifier_on_is_refused() -> None:
    model = IntrospectiveClassifier(timm.create_model("resnet8_cifar", num_classes=10), 5)
    with pytest.raises(ValueError, match=r"\(B, 64\).*\(2, 10\).*num_classes=0"):
        model(images(2, 32))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"ism": "alive"}, "live, released, off.*'alive'"),
        ({"num_classes": 1}, "at least 2, got 1"),
        ({"uncertainty_dim": 0}, "at least 1, got 0"),
        ({"temperature": 0.0}, "positive, got 0.0"),
    ],
)
def test_bad_arguments_carry_the_value(arguments: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        IntrospectiveClassifier(**({"backbone": small_backbone(), "num_classes": 3} | arguments))


def test_an_unknown_model_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"resnet51.*did you mean.*resnet5"):
        IntrospectiveClassifier("resnet51", 10)


def test_the_lines_in_the_readme_train_a_classifier() -> None:
    """The README's plug-in example, run as it stands there."""
    readme = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    code = re.search(r"<!-- plug-in -->\n```python\n(.*?)```", readme, re.DOTALL)
    assert code is not None
    assert len(code.group(1).strip().splitlines()) <= 12
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, 64, 64, generator=generator), torch.tensor([0, 1, 2, 3]))] * 2
    scope: dict = {"loader": batches}
    exec(code.group(1), scope)
    assert scope["score"].shape == (4,)
    assert (scope["score"] > 0).all()
    assert scope["model"].uncertainty_head.weight.grad.abs().sum() > 0


def test_the_lines_in_the_readme_introspect_it() -> None:
    """The README's next example, with the classifier of the one before: nothing is right yet, which is said."""
    readme = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    code = re.search(r"<!-- introspect -->\n```python\n(.*?)```", readme, re.DOTALL)
    assert code is not None
    pixels = torch.randint(0, 256, (24, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = IntrospectiveClassifier("resnet8_cifar", 4, uncertainty_dim=8)
    scope: dict = {"model": model, "images": pixels, "labels": torch.arange(24) % 4}
    with pytest.warns(UserWarning, match="24 held-out images"):
        exec(code.group(1), scope)
    found = scope["introspected"].predict(pixels)
    assert len(found.p_wrong) == 24 and all(0 <= p <= 1 for p in found.p_wrong)


def mean_exponent(model: IntrospectiveClassifier) -> torch.Tensor:
    """Of all comparisons of some images, from what the model gives."""
    output = model(images())
    weight, bias = model.classifier.weight, model.classifier.bias
    distances = (output.semantic[:, None] - weight).square().sum(2)
    torch.testing.assert_close(output.logits, output.semantic @ weight.T + bias)
    return (output.uncertainty.square().sum(1, keepdim=True) / (5 * distances)).mean()


@pytest.mark.parametrize("factor", [1e-3, 1, 30])
def test_u_is_relative_to_the_batch_in_training(factor: float) -> None:
    """Whatever the head's weights grow to: a loss cannot be lowered by making all images unsure."""
    model = IntrospectiveClassifier(small_backbone(), 4, uncertainty_dim=64)
    head = model.uncertainty_head
    assert isinstance(head, RectifiedHead)
    with torch.no_grad():
        head.weight.mul_(factor)
    assert mean_exponent(model).item() == pytest.approx(0.05, rel=1e-4)
    functional.cross_entropy(model(images()).introspective_logits, torch.zeros(5, dtype=torch.long)).backward()
    assert head.weight.grad is not None
    along = (head.weight.grad * head.weight).sum() / (head.weight.grad.norm() * head.weight.norm())
    assert along.abs() < 1e-3, "nothing is gained by a common size"


def test_the_gain_follows_so_that_evaluation_has_the_scale_of_training() -> None:
    model = IntrospectiveClassifier(small_backbone(), 4, uncertainty_dim=64).eval()
    head = model.uncertainty_head
    assert isinstance(head, RectifiedHead) and head.gain == 1
    with torch.no_grad():
        head.weight.mul_(30)
    first = model(images()).exponent
    assert first is not None and first.mean() > 1
    torch.testing.assert_close(mean_exponent(model), first.mean(), rtol=1e-4, atol=0)
    model.follow(first.mean())
    torch.testing.assert_close(head.gain, (0.05 / first.mean()) ** 0.05, rtol=1e-5, atol=0)
    for _ in range(200):
        model.follow(first.mean())
    assert mean_exponent(model).item() == pytest.approx(0.05, rel=1e-3)
    gain = head.gain.clone()
    for unusable in (0.0, math.nan, math.inf):  # a dead head, a failed step
        model.follow(torch.tensor(unusable))
    assert torch.equal(head.gain, gain)


def test_a_checkpoint_without_gain_has_a_gain_of_one() -> None:
    model = IntrospectiveClassifier(small_backbone(), 4, uncertainty_dim=3)
    state = model.state_dict()
    assert isinstance(model.uncertainty_head, RectifiedHead)
    model.uncertainty_head.gain.fill_(7)
    del state["uncertainty_head.gain"]
    model.load_state_dict(state)
    assert model.uncertainty_head.gain == 1
    assert "uncertainty_head.gain" not in state, "what was given stays as it was"
