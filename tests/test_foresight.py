"""Loss prediction: the head, what trains it, and the probability of an error, against definitions and scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional

from idml import IntrospectiveClassifier, IntrospectiveEmbedder, alteration_score, uncertainty_score
from idml.backbones import create_backbone
from idml.depths import DepthReader
from idml.foresight import (
    EVIDENCE,
    SEARCH_EVIDENCE,
    ErrorCalibration,
    alteration_loss,
    classifier_evidence,
    foresight_loss,
    prediction_loss,
    search_evidence,
)
from idml.heads import Foresight, ForesightHead
from idml.metrics import auroc
from tests.test_models import small_backbone
from tests.test_similarity import oracle_classifier


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- depths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet20_cifar", 32),
        ("resnet29_bottleneck_cifar", 32),
        ("pyramidnet_cifar", 32),
        ("resnet18", 64),
        ("vit_tiny_patch16_224", 224),
        ("efficientnet_b0", 64),
        ("googlenet", 64),
    ],
)
def test_maps_are_taken_without_changing_what_the_backbone_gives(name: str, size: int) -> None:
    arguments = {"depth": 20, "alpha": 12} if name == "pyramidnet_cifar" else {}
    backbone = create_backbone(name, image_size=size, arguments=arguments).eval()
    reader, images = DepthReader(backbone, backbone.num_features), random(2, 3, size, size)
    with torch.no_grad():
        final, maps = reader(backbone, images)
        assert torch.equal(final, backbone.forward_features(images))
        assert torch.equal(backbone.forward_head(final), backbone(images))
        vector = reader.vector(maps, final)
    assert len(maps) == 4 and vector.shape == (2, reader.length) and vector.dtype == torch.float32
    expected = [part for each in maps for part in (functional.adaptive_avg_pool2d(each, 2), each.amax((2, 3)))]
    assert torch.equal(vector, torch.cat([part.flatten(1) for part in expected], 1))


def test_of_a_module_of_ones_own_the_features_are_all_there_is() -> None:
    backbone = small_backbone()
    reader = DepthReader(backbone, 6)
    features, maps = reader(backbone, random(5, 3, 8, 8))
    assert maps == [] and reader.length == 6
    vector = reader.vector(maps, features)
    assert torch.equal(vector, features) and not vector.requires_grad


# --- the head --------------------------------------------------------------------------------------------------------


def test_a_head_starts_at_one_nat_and_is_never_zero() -> None:
    torch.manual_seed(0)
    head = ForesightHead(50, 16, 7)
    found = head(random(9, 50))
    assert found.uncertainty.shape == (9, 16) and found.belief.shape == (9, 7)
    assert (found.uncertainty > 0).all()
    assert found.foreseen_loss.mean().item() == pytest.approx(1, abs=0.3)
    torch.testing.assert_close(found.foreseen_loss, found.uncertainty.square().sum(1))


def test_running_figures_are_those_of_the_batches() -> None:
    head = ForesightHead(4, 2, 2)
    first, second = 3 + 2 * random(200, 4), random(200, 4, seed=1)
    head.note(first)
    torch.testing.assert_close(head.mean, first.mean(0))
    torch.testing.assert_close(head.variance, first.var(0, unbiased=False))
    head.note(second)
    torch.testing.assert_close(head.mean, 0.9 * first.mean(0) + 0.1 * second.mean(0))


def test_an_input_out_of_all_proportion_is_cut_off() -> None:
    head = ForesightHead(4, 2, 2)
    head.note(random(200, 4))
    usual, wild = head(torch.full((1, 4), 100.0)), head(torch.full((1, 4), 1e9))
    torch.testing.assert_close(usual.uncertainty, wild.uncertainty)


def test_alteration_loss_by_hand() -> None:
    """Clean images weigh as much as all others, and a mixed one counts by its smaller part."""
    altered = torch.tensor([0.0, 0.0, 2.0, -1.0])
    lam, clean = torch.tensor([1.0, 1.0, 1.0, 0.75]), torch.tensor([True, True, False, False])

    def cross_entropy(odds: float, target: float) -> float:
        chance = 1 / (1 + math.exp(-odds))
        return -target * math.log(chance) - (1 - target) * math.log(1 - chance)

    expected = (math.log(2) + (cross_entropy(2, 1) + cross_entropy(-1, 0.5)) / 2) / 2
    assert alteration_loss(altered, lam, clean).item() == pytest.approx(expected, rel=1e-6)
    only = alteration_loss(altered[:2], lam[:2], clean[:2])
    assert only.item() == pytest.approx(math.log(2) / 2), "no altered image, nothing to divide by"


def test_in_training_the_ism_is_relative_to_the_batch() -> None:
    """However large the foreseen losses are: on average, over |h|^2, the exponent is the usual one."""
    model = classifier().train()
    with torch.no_grad():
        last = model.uncertainty_head.foresee[-1]
        last.bias += 3
    output = model(random(16, 3, 32, 32))
    assert output.foresight is not None and output.foresight.foreseen_loss.mean() > 10
    ratio = output.uncertainty.square().sum(1) / output.semantic.square().sum(1)
    assert ratio.mean().item() == pytest.approx(0.05 * model.temperature, rel=1e-4)
    assert model.uncertainty_head.usual_loss > 1.9, "it takes the batch's mean in"


def test_alteration_score_learns_to_tell_altered_images() -> None:
    """Digits and noisy digits, features of an untrained backbone: the head alone is trained."""
    images = torch.from_numpy(load_digits().images[:400]).float()[:, None].expand(-1, 3, -1, -1) / 8 - 1
    noisy = images + 0.7 * random(*images.shape)
    both, clean = torch.cat([images, noisy]), torch.arange(800) < 400
    model = classifier().train()
    optimizer = torch.optim.AdamW(model.uncertainty_head.parameters(), lr=2e-3)
    for step in range(25):
        chosen = torch.randint(600, (64,), generator=torch.Generator().manual_seed(step)) + 100
        foresight, _ = model.foresee(both[chosen])
        optimizer.zero_grad()
        alteration_loss(foresight.altered, torch.ones(64), clean[chosen]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        scores = alteration_score(model(both[torch.cat([torch.arange(100), torch.arange(700, 800)])]))
    assert auroc(scores[100:], scores[:100]) > 0.9
    with pytest.raises(ValueError, match="loss-prediction"):
        alteration_score(IntrospectiveClassifier("resnet8_cifar", 5).eval()(both[:1]))


# --- the model -------------------------------------------------------------------------------------------------------


def classifier(**arguments: Any) -> IntrospectiveClassifier:
    torch.manual_seed(0)
    settings = {"uncertainty_dim": 8, "uncertainty_loss": "loss-prediction"} | arguments
    return IntrospectiveClassifier("resnet8_cifar", 5, **settings)


def test_introspective_logits_are_the_formula_with_the_foreseen_loss_as_beta() -> None:
    model = classifier(temperature=2.0).eval()
    output = model(random(3, 3, 32, 32))
    assert output.foresight is not None
    # beta over |h|^2 is the loss relative to what is usual (one nat here, before training), times 0.05 tau.
    ratio = output.uncertainty.square().sum(1) / output.semantic.square().sum(1)
    torch.testing.assert_close(ratio, 0.05 * 2.0 * output.foresight.foreseen_loss)
    case = {
        "features": output.semantic,
        "weight": model.classifier.weight,
        "bias": model.classifier.bias,
        "uncertainty": output.uncertainty,
    }
    case = {name: tensor.detach().double().numpy() for name, tensor in case.items()}
    expected = oracle_classifier(case, "live", 2.0)[1]
    np.testing.assert_allclose(output.introspective_logits.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def gradients(model: nn.Module) -> dict[str, bool]:
    return {name: p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters()}


def test_the_head_never_reaches_the_backbone_and_the_ism_never_reaches_the_head() -> None:
    model, images = classifier().train(), random(8, 3, 32, 32)
    labels, one = torch.arange(8) % 5, torch.ones(8)
    output = model(images)
    foresight = output.foresight
    assert foresight is not None
    loss = foresight_loss(
        foresight.foreseen_loss, foresight.belief, output.logits, labels, labels, one, torch.ones(8).bool()
    )
    loss = loss + alteration_loss(foresight.altered, one, labels > 2)
    loss.backward()
    found = gradients(model)
    assert all(reached == name.startswith("uncertainty_head.") for name, reached in found.items()), found
    model.zero_grad()
    functional.cross_entropy(model(images).introspective_logits, labels).backward()
    found = gradients(model)
    assert not any(reached for name, reached in found.items() if name.startswith("uncertainty_head."))
    assert found["backbone.conv1.weight"] and found["classifier.weight"]


def test_spoilt_images_leave_no_trace_in_the_backbone() -> None:
    model, images = classifier().train(), random(8, 3, 32, 32)
    model.backbone.blocks[0].bn1.eval()  # as --bn-freeze leaves it
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    foresight, logits = model.foresee(images)
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert not logits.requires_grad
    (foresight.foreseen_loss.sum() + foresight.belief.sum() + foresight.altered.sum()).backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images).logits, logits)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision(precision: torch.dtype) -> None:
    model = classifier().train()
    with torch.autocast("cpu", dtype=precision):
        output = model(random(4, 3, 32, 32))
        foresight, _ = model.foresee(random(4, 3, 32, 32))
    values = [output.logits, output.uncertainty, output.evidence, output.error_probability, *foresight]
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in values if value is not None)


def test_embedder_keeps_the_head_to_itself_and_its_belief_is_a_unit_vector() -> None:
    torch.manual_seed(0)
    model = IntrospectiveEmbedder("resnet8_cifar", 16, 8, uncertainty_loss="loss-prediction", num_classes=5).train()
    output = model(random(6, 3, 32, 32))
    assert output.belief is not None and output.foreseen_loss is not None
    torch.testing.assert_close(output.belief.norm(dim=1), torch.ones(6))
    assert model.belief_logits(output.belief).shape == (6, 5)
    assert output.joint().shape == (6, 24)
    (output.foreseen_loss.sum() + model.belief_logits(output.belief)[:, 0].sum()).backward()
    reached = {name for name, found in gradients(model).items() if found}
    assert reached and all(name.startswith(("uncertainty_head.", "directions")) for name in reached)
    assert ((uncertainty_score(output) > 0) & (uncertainty_score(output) < 1)).all()


@pytest.mark.parametrize("ism", ["off", "released"])
def test_only_live_foresees(ism: Any) -> None:
    with pytest.raises(ValueError, match=f"needs ism 'live', got '{ism}'"):
        classifier(ism=ism)
    with pytest.raises(ValueError, match="uncertainty_loss must be one of none, loss-prediction"):
        classifier(uncertainty_loss="guess")
    with pytest.raises(ValueError, match="needs num_classes"):
        IntrospectiveEmbedder("resnet8_cifar", 16, uncertainty_loss="loss-prediction")


# --- what trains it --------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 20), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_the_best_prediction_is_the_mean(losses: list[float]) -> None:
    actual = torch.tensor(losses, dtype=torch.float64)
    mean = actual.mean()
    best = prediction_loss(mean.expand(len(actual)), actual)
    for other in (mean * 0.7, mean * 1.4):
        assert prediction_loss(other.expand(len(actual)), actual) > best


def test_foresight_loss_by_hand() -> None:
    foreseen, logits = torch.tensor([0.5, 2.0]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    belief = torch.tensor([[1.0, 0.0], [5.0, 0.0]])
    labels_a, labels_b, lam = torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([1.0, 0.25])
    # CE of (2, 0) for class 0 is log(1 + e^-2); of (0, 0) it is log 2 for either class.
    first, second = math.log1p(math.exp(-2)), math.log(2)
    predicted = ((0.5 - first * math.log(0.5 + 1e-6)) + (2.0 - second * math.log(2.0 + 1e-6))) / 2
    answers = torch.tensor([True, False])
    found = foresight_loss(foreseen, belief, logits, labels_a, labels_b, lam, answers)
    assert found.item() == pytest.approx(predicted + math.log1p(math.exp(-1)), rel=1e-5)
    both = foresight_loss(foreseen, belief, logits, labels_a, labels_b, lam, torch.tensor([True, True]))
    of_second = 0.25 * math.log1p(math.exp(-5)) + 0.75 * (5 + math.log1p(math.exp(-5)))
    assert both.item() == pytest.approx(predicted + (math.log1p(math.exp(-1)) + of_second) / 2, rel=1e-5)
    none = foresight_loss(foreseen, belief, logits, labels_a, labels_b, lam, torch.tensor([False, False]))
    assert none.item() == pytest.approx(predicted, rel=1e-5)


# --- evidence and probability ----------------------------------------------------------------------------------------


def test_evidence_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0]])
    foresight = Foresight(torch.tensor([[0.6, 0.8]]), torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([0.0]))
    found = dict(zip(EVIDENCE, classifier_evidence(logits, foresight)[0].tolist(), strict=True))
    # The head gives class 0, which the classifier predicts, 1 / (2 + e); the log-odds of the rest is log(1 + e).
    expected = {"belief": math.log(1 + math.e), "foreseen loss": 0, "confidence": math.log(2 / math.exp(2))}
    assert found == pytest.approx(expected, abs=1e-5)
    belief = functional.normalize(random(4, 3), dim=1)
    losses, similarities = torch.tensor([1.0, 2.0]), torch.tensor([[0.9, 0.7], [0.4, 0.4]])
    rows = search_evidence(belief[:2], losses, belief[2:], losses.flip(0), similarities)
    named = dict(zip(SEARCH_EVIDENCE, rows.T.tolist(), strict=True))
    assert named["belief"] == pytest.approx((1 - (belief[:2] * belief[2:]).sum(1)).tolist())
    assert named["foreseen loss"] == pytest.approx([0, math.log(2)])
    assert named["foreseen loss of the nearest"] == pytest.approx([math.log(2), 0])
    assert named["1 - similarity"] == pytest.approx([0.1, 0.6])
    assert named["gap to the second"] == pytest.approx([-0.2, 0])
    lonely = search_evidence(belief[:2], losses, belief[2:], losses, similarities[:, :1])
    assert not lonely[:, -1].any()


def test_calibration_is_a_logistic_regression_of_real_errors() -> None:
    digits = load_digits()
    model = LogisticRegression(max_iter=2000, C=1e-4).fit(digits.data[:300], digits.target[:300])
    chances = torch.from_numpy(model.predict_proba(digits.data[300:]))
    wrong = chances.argmax(1) != torch.from_numpy(digits.target[300:])
    doubt = torch.logit(1 - chances.amax(1), eps=1e-6)
    evidence = torch.stack([doubt, random(len(doubt)).double()], 1).float()
    calibration = ErrorCalibration(2)
    torch.testing.assert_close(calibration(evidence), torch.sigmoid(evidence[:, 0]))  # before: the first piece alone
    assert calibration.fit(evidence[::2], wrong[::2]) and calibration.fitted_on == len(wrong[::2])
    found = calibration(evidence[1::2])
    assert found.mean().item() == pytest.approx(wrong[1::2].double().mean().item(), abs=0.03)
    oracle = LogisticRegression(C=1e4).fit(evidence[::2].numpy(), wrong[::2].numpy())
    expected = oracle.predict_proba(evidence[1::2].numpy())[:, 1]
    np.testing.assert_allclose(found.numpy(), expected, atol=0.03)  # scikit-learn's penalty is a small one
    again = ErrorCalibration(2)
    again.load_state_dict(calibration.state_dict())
    assert torch.equal(again(evidence), calibration(evidence))


@pytest.mark.parametrize("wrong", [torch.zeros(4).bool(), torch.ones(4).bool()])
def test_nothing_is_fitted_to_answers_of_one_kind(wrong: Tensor) -> None:
    calibration = ErrorCalibration(1)
    with pytest.warns(UserWarning, match=rf"not calibrated: {int(wrong.sum())} of 4 validation answers are wrong"):
        assert not calibration.fit(random(4, 1), wrong)
    assert calibration.fitted_on == 0 and calibration.weight.tolist() == [1]
