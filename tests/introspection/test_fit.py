"""The fit on real images: better than 1 - max softmax, calibrated, and nothing of the network is changed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from idml.data.image_dataset import ImageDataset, Preprocessing, fit_square
from idml.errors import UserError
from idml.introspecting import introspect_network
from idml.introspection import fit
from idml.introspection.calibration import ErrorCalibration, classifier_evidence, odds, search_evidence
from idml.introspection.depths import vector_length
from idml.introspection.features import CACHE_BYTES, Features, kept_positions
from idml.introspection.heads import Heads
from idml.introspection.introspected import Introspected
from idml.introspection.introspection import Introspection, IntrospectionSpec
from idml.introspection.layers import find_layers
from idml.metrics.uncertainty import auroc
from idml.models import IntrospectiveClassifier

SIZE = 16
SQUARE = Preprocessing(image_size=SIZE, mean=(0.3,) * 3, std=(0.35,) * 3, fit="whole")


def digits(chosen: np.ndarray) -> ImageDataset:
    data = load_digits()
    images = np.uint8(data.images[chosen] * 255 / 16)[..., None]
    names = tuple(map(str, range(10)))
    return ImageDataset(labels=data.target[chosen].astype(np.int64), classes=names, images=fit_square(images, SIZE))


def tensors(dataset: ImageDataset) -> tuple[Tensor, Tensor]:
    assert dataset.images is not None
    images = torch.from_numpy(dataset.images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).float() / 255
    return (images - 0.3) / 0.35, torch.from_numpy(dataset.labels)


@pytest.fixture(scope="module")
def trained() -> tuple[IntrospectiveClassifier, dict[str, ImageDataset]]:
    """A small network after a few steps on digits, and images that it was trained on, held out and tested on."""
    order = np.random.default_rng(0).permutation(1797)
    parts = {"train": order[:800], "held out": order[800:1300], "test": order[1300:]}
    data = {name: digits(chosen) for name, chosen in parts.items()}
    torch.manual_seed(0)
    model = IntrospectiveClassifier("resnet8_cifar", 10, ism="off")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, labels = tensors(data["train"])
    for number in range(40):
        chosen = torch.randperm(800, generator=torch.Generator().manual_seed(number))[:64]
        loss = nn.functional.cross_entropy(model(images[chosen]).logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), data


def introspected(
    trained: tuple[IntrospectiveClassifier, dict[str, ImageDataset]], *, train: bool = True, held_out: bool = True
) -> fit.Fitted:
    model, data = trained
    return introspect_network(
        model,
        "classification",
        10,
        SQUARE,
        train=data["train"] if train else None,
        held_out=data["held out"] if held_out else None,
    )


@pytest.mark.parametrize("train", [True, False])
def test_it_says_when_the_network_is_wrong(
    trained: tuple[IntrospectiveClassifier, dict[str, ImageDataset]], train: bool
) -> None:
    model, data = trained
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitted = introspected(trained, train=train)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    images, labels = tensors(data["test"])
    with torch.no_grad():
        plain, output = model(images), Introspected(model, fitted.introspection)(images)
    assert torch.equal(plain.logits, output.logits) and output.scores is not None
    wrong = output.logits.argmax(1) != labels
    assert 10 < wrong.sum() < 200
    p_wrong, free = output.scores.p_wrong, 1 - plain.logits.softmax(1).amax(1)
    assert auroc(p_wrong[wrong], p_wrong[~wrong]) > auroc(free[wrong], free[~wrong]) + 0.01
    assert abs(p_wrong.mean() - wrong.float().mean()) < 0.06, "calibrated"
    assert 0.01 < (output.scores.novelty > 0.9).float().mean() < 0.25
    noise = torch.randn(50, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        strange = Introspected(model, fitted.introspection)(noise).scores
    assert strange is not None and strange.novelty.min() > 0.95
    spec = fitted.introspection.spec
    assert (spec.calibrated, spec.note, spec.held_out, spec.folds) == (True, "", 500, 5)
    promise = fitted.introspection.promise(0.1)
    assert promise is not None
    answered = p_wrong <= promise.threshold
    assert wrong[answered].float().mean() < 0.13 and answered.float().mean() > 0.3


def test_the_same_seed_gives_the_same_and_it_can_be_stored(
    trained: tuple[IntrospectiveClassifier, dict[str, ImageDataset]],
) -> None:
    first, second = introspected(trained).introspection, introspected(trained).introspection
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    again = Introspection(IntrospectionSpec.from_json(first.spec.as_json()))
    again.load_state_dict(first.state_dict())
    vector, logits = torch.randn(3, first.heads.mean.shape[0]), torch.randn(3, 10)
    for one, other in zip(first(vector, logits), again(vector, logits), strict=True):
        assert torch.equal(one, other)


def test_without_held_out_images_nothing_is_calibrated(
    trained: tuple[IntrospectiveClassifier, dict[str, ImageDataset]],
) -> None:
    spec = introspected(trained, held_out=False).introspection.spec
    assert (spec.calibrated, spec.note, spec.folds) == (False, "no images were held out", 1)
    model, data = trained
    few = data["held out"].subset(np.arange(60))
    found = introspect_network(model, "classification", 10, SQUARE, train=data["train"], held_out=few)
    assert not found.introspection.spec.calibrated and "60 held-out images" in found.introspection.spec.note
    with pytest.raises(UserError, match="no images"):
        introspect_network(model, "classification", 10, SQUARE, train=None, held_out=None)


def test_what_a_network_has_memorised_is_not_learned_from() -> None:
    """A network without errors on its training images would teach the heads that it never errs."""
    generator = torch.Generator().manual_seed(0)
    layers = find_layers(IntrospectiveClassifier("resnet8_cifar", 10, ism="off"), torch.randn(2, 3, SIZE, SIZE))
    length = vector_length(layers)

    def features(count: int, errors: float) -> Features:
        labels = torch.randint(10, (count,), generator=generator)
        wrong = torch.rand(count, generator=generator) < errors
        logits = 5 * nn.functional.one_hot(torch.where(wrong, (labels + 1) % 10, labels), 10).float()
        nothing = torch.zeros(count, 0)
        vectors = torch.randn(count, length, generator=generator).half()
        return Features(vectors=vectors, labels=labels, semantic=nothing, logits=logits)

    held_out = features(300, 0.2)
    memorised = fit.fit_classifier(layers, 10, features(300, 0.0), held_out)
    honest = fit.fit_classifier(layers, 10, features(300, 0.15), held_out)
    assert not memorised.about["training_images_learned_from"] and memorised.about["images"] == 300
    assert honest.about["training_images_learned_from"] and honest.about["images"] == 600


def test_heads_of_folds_are_computed_as_if_alone() -> None:
    torch.manual_seed(0)
    heads, vector = Heads(30, 4, 3), torch.randn(5, 30)
    look = heads(vector)
    assert look.belief.shape == (3, 5, 4) and look.foreseen_loss.shape == (3, 5) and (look.foreseen_loss > 0).all()
    hidden = torch.relu(heads.standardised(vector) @ heads.first + heads.first_bias).view(5, 6, -1)
    for fold in range(3):
        second = torch.relu(hidden[:, fold] @ heads.second[fold] + heads.second_bias[fold])
        torch.testing.assert_close(second @ heads.belief[fold] + heads.belief_bias[fold], look.belief[fold])


def test_images_beyond_the_cache_are_drawn_evenly() -> None:
    labels = np.repeat(np.arange(5), [100, 50, 10, 5, 1])
    kept = kept_positions(labels, numbers=10, cache_bytes=20 * 40, seed=0)
    assert len(kept) == 40 and (np.diff(kept) > 0).all()
    assert np.bincount(labels[kept]).tolist() == [12, 12, 10, 5, 1] or np.bincount(labels[kept]).sum() == 40
    assert np.bincount(labels[kept])[4] == 1 and np.bincount(labels[kept])[3] == 5
    assert np.array_equal(kept_positions(labels, 10, 10**6, 0), np.arange(166))


def test_imagenet_fits_eight_gigabytes() -> None:
    """1,281,167 images of ResNet-50: F = 21,248 in half precision, 1,000 logits in float32."""
    labels, numbers = np.repeat(np.arange(1000), 1282)[:1_281_167], 21_248 + 2 * 1_000
    assert 2 * numbers * len(labels) == pytest.approx(60e9, rel=0.01)
    kept = kept_positions(labels, numbers, 8 * 10**9, 0)
    assert 2 * numbers * len(kept) <= 8 * 10**9 < 2 * numbers * (len(kept) + 1000)
    counts = np.bincount(labels[kept])
    assert counts.min() >= counts.max() - 1 and counts.min() > 150
    assert np.bincount(labels[kept_positions(labels, numbers, CACHE_BYTES, 0)]).min() == 46


def test_evidence_by_hand() -> None:
    logits, belief = torch.tensor([[2.0, 0.0]]), torch.tensor([[[0.0, 1.0]]])
    evidence = classifier_evidence(logits, belief, torch.tensor([[0.5]]))[0, 0]
    other = math.e / (1 + math.e)
    assert evidence.tolist() == pytest.approx([math.log(other / (1 - other)), math.log(0.5), -2.0], rel=1e-4)
    assert odds(torch.tensor([0.0, 1.0])).isfinite().all()
    found = search_evidence(
        torch.tensor([[1.0, 0.0]]), torch.tensor([0.5]), torch.tensor([[0.0, 1.0]]), torch.tensor([2.0]),
        torch.tensor([[0.9, 0.7]]),
    )  # fmt: skip
    assert found[0].tolist() == pytest.approx([1.0, math.log(0.5), math.log(2.0), 0.1, -0.2], abs=1e-6)


def test_calibration_is_a_logistic_regression_and_says_why_it_is_none() -> None:
    generator = torch.Generator().manual_seed(0)
    evidence = torch.randn(4000, 2, generator=generator)
    truth = torch.sigmoid(2 * evidence[:, 0] - 1)
    wrong = torch.rand(4000, generator=generator) < truth
    calibration = ErrorCalibration(2)
    torch.testing.assert_close(calibration(evidence), torch.sigmoid(evidence[:, 0]))  # what the head believes, before
    assert calibration.fit(evidence, wrong) == ""
    assert (calibration(evidence) - truth).abs().mean() < 0.02 and calibration.fitted_on == 4000
    for count, answers, reason in ((50, wrong[:50], "50 held-out images"), (200, wrong[:200] & False, "0 of 200")):
        assert reason in ErrorCalibration(2).fit(evidence[:count], answers)
