"""``idml.introspect``: modules in memory, of seven families and of one's own; their logits stay as they are."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import idml
from augment import normalise
from idml.data.image_dataset import Preprocessing
from idml.errors import UserError
from idml.introspection import fit
from idml.metrics.uncertainty import auroc
from tests.introspection.test_layers import NETWORKS


def small_network(classes: int = 10) -> nn.Module:
    """A convolutional network of a few thousand weights."""
    layers: list[nn.Module] = []
    for before, after in ((3, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, classes))


SQUARE = Preprocessing(image_size=8, mean=(0.3,) * 3, std=(0.35,) * 3, fit="whole")


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8, 1) uint8 and labels, in a random order."""
    data, order = load_digits(), np.random.default_rng(0).permutation(1797)
    return np.uint8(data.images * 255 / 16)[order, ..., None], data.target[order].astype(np.int64)


@pytest.fixture(scope="module")
def trained(digits: tuple[np.ndarray, np.ndarray]) -> nn.Module:
    """A few steps on the first 600 digits."""
    images, labels = (torch.from_numpy(part[:600]) for part in digits)
    inputs = normalise(images.movedim(3, 1).expand(-1, 3, -1, -1), SQUARE.mean, SQUARE.std)
    torch.manual_seed(0)
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for start in [*range(0, 600, 60)] * 2:
        loss = nn.functional.cross_entropy(network(inputs[start : start + 60]), labels[start : start + 60])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network  # in training mode: it is left so


@pytest.fixture(scope="module")
def model(trained: nn.Module, digits: tuple[np.ndarray, np.ndarray]) -> idml.TrainedModel:
    return idml.introspect(
        trained,
        digits[0][600:1200],
        digits[1][600:1200],
        train_images=digits[0][:600],
        train_labels=digits[1][:600],
        preprocessing=SQUARE,
        device="cpu",
    )


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does not matter what the heads have learned."""
    monkeypatch.setattr(fit, "LEAST_STEPS", 3)
    monkeypatch.setattr(fit, "PASSES", 0)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_of_seven_families_stay_as_they_are(name: str, fashion: dict[str, np.ndarray]) -> None:
    """To the bit, on real images; the module given is not touched."""
    make, size, _, features = NETWORKS[name]
    torch.manual_seed(0)
    module = make().train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    square = Preprocessing(image_size=size)
    images, labels = fashion["test_images"][:104, ..., None], fashion["test_labels"][:104] % 5
    model = idml.introspect(module, images, labels.astype(np.int64), preprocessing=square, device="cpu")
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items()) and module.training
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())
    prepared = model.prepare(images[:9])
    with torch.no_grad():
        expected = copy.deepcopy(module).eval()(normalise(prepared, square.mean, square.std))
    output = model.outputs(prepared)
    assert torch.equal(output.logits, expected)  # type: ignore[union-attr]
    assert output.scores is not None and output.semantic.shape == (9, features)
    for score in (output.scores.p_wrong, output.scores.novelty):
        assert score.shape == (9,) and ((score >= 0) & (score <= 1)).all()
    found = model.predict(images[:9])
    np.testing.assert_allclose(found.probabilities, expected.softmax(1).numpy(), atol=1e-6)


def test_what_it_says_of_other_images(model: idml.TrainedModel, digits: tuple[np.ndarray, np.ndarray]) -> None:
    found = model.predict(digits[0][1200:], max_risk=0.1, coverage=0.9)
    wrong = found.labels != digits[1][1200:]
    assert 10 < wrong.sum() < 300 and model.calibrated_on == 600 and model.score_name == "P(wrong)"
    assert found.p_wrong is not None and found.answered is not None and found.sets is not None
    p_wrong, doubt = torch.from_numpy(found.p_wrong), torch.from_numpy(1 - found.confidence)
    bad = torch.from_numpy(wrong)
    assert auroc(p_wrong[bad], p_wrong[~bad]) > auroc(doubt[bad], doubt[~bad])
    assert abs(found.p_wrong.mean() - wrong.mean()) < 0.05, "calibrated"
    threshold, least = model.thresholds(0.1, 0.95, 0.9)
    assert threshold is not None and least is not None
    np.testing.assert_array_equal(found.answered, found.p_wrong <= threshold)
    assert found.answered.mean() > 0.3 and wrong[found.answered].mean() < 0.12
    named = found.sets[np.arange(len(wrong)), digits[1][1200:]]
    assert 0.86 < named.mean() < 0.97 and found.sets.sum(1).mean() < 4
    assert found.sets.any(1).all(), "at least the likeliest class is named"
    noise = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    strange = model.predict(noise).novelty
    assert strange is not None and np.median(strange) > 0.95
    assert found.novelty is not None and 0.3 < found.novelty.mean() < 0.7


@pytest.mark.usefixtures("few_steps")
def test_the_same_seed_gives_the_same(trained: nn.Module, digits: tuple[np.ndarray, np.ndarray]) -> None:
    state = torch.get_rng_state()
    both = [
        idml.introspect(trained, digits[0][600:750], digits[1][600:750], preprocessing=SQUARE, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert both[0].fingerprint == both[1].fingerprint != both[2].fingerprint
    assert torch.equal(torch.get_rng_state(), state), "global generators are left as they were"


class Dictionary(nn.Module):
    """Logits in a dictionary, as other libraries give them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(images)}


@pytest.mark.usefixtures("few_steps")
def test_wrapped_modules(trained: nn.Module, model: idml.TrainedModel, digits: tuple[np.ndarray, np.ndarray]) -> None:
    """Inside a dictionary, and inside what spreads a module over GPUs."""
    given = (digits[0][600:710], digits[1][600:710])
    expected = model.predict(digits[0][:5]).probabilities
    for wrapped in (Dictionary(trained), nn.DataParallel(trained)):
        found = idml.introspect(wrapped, *given, preprocessing=SQUARE, device="cpu")
        np.testing.assert_array_equal(found.predict(digits[0][:5]).probabilities, expected)


@pytest.mark.usefixtures("few_steps")
def test_layers_by_name(trained: nn.Module, digits: tuple[np.ndarray, np.ndarray]) -> None:
    given = (digits[0][600:710], digits[1][600:710])
    found = idml.introspect(trained, *given, preprocessing=SQUARE, layers=["2", "5"])
    assert found.introspection is not None
    maps = found.introspection.spec.layers.maps
    assert [(layer.name, layer.channels) for layer in maps] == [("module.2", 8), ("module.5", 16)]
    with pytest.raises(UserError, match="no module 'conv1'"):
        idml.introspect(trained, *given, preprocessing=SQUARE, layers=["conv1"])


@pytest.mark.usefixtures("few_steps")
def test_it_is_saved_where_it_can_be_made_again(
    model: idml.TrainedModel,
    trained: nn.Module,
    digits: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=r"give introspect\(\.\.\., made_by=\.\.\.\)"):
        model.save(tmp_path / "model")
    given = (digits[0][600:750], digits[1][600:750])
    named = idml.introspect(
        trained, *given, preprocessing=SQUARE, made_by="tests.test_introspect:small_network", device="cpu"
    )
    named.save(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    with pytest.raises(UserError, match=r"would run code.*trust_module=True"):
        idml.load(tmp_path / "model")
    again = idml.load(tmp_path / "model", device="cpu", trust_module=True)
    assert again.fingerprint == named.fingerprint and again.calibrated_on == 150
    first, second = named.outputs(named.prepare(digits[0][:7])), again.outputs(again.prepare(digits[0][:7]))
    assert torch.equal(first.logits, second.logits)  # type: ignore[union-attr]
    assert torch.equal(first.scores.p_wrong, second.scores.p_wrong)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="exists; give another"):
        named.save(tmp_path / "model")
    other = idml.introspect(trained, *given, preprocessing=SQUARE, made_by="tests.test_introspect:other_network")
    with pytest.raises(UserError, match="are not those of the model"):
        other.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def other_network() -> nn.Module:
    """Not the one that is introspected."""
    return small_network(7)


class Opaque(nn.Module):
    """No layer inside."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


class Rows(nn.Module):
    """Logits of another shape."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(2)


class Sum(nn.Module):
    """One row for all images."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_network()

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images).sum(0, keepdim=True)


class NotANumber(nn.Module):
    """Overflows on bright images."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_network()

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images) / 0


class Fails(nn.Module):
    """Takes other images."""

    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("expected 5 channels\nand more")


IMAGES = np.zeros((120, 8, 8, 1), np.uint8)
LABELS = np.arange(120) % 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": LABELS[:100]}, "expected a label for each of the 120 images, got 100"),
        ({"labels": LABELS + 1}, "expected labels from 0 to 9, for the module gives 10 logits; got 1 to 10"),
        ({"labels": LABELS - 1}, "got -1 to 8"),
        ({"labels": LABELS / 2}, r"expected labels \(N,\) of integers, got float64"),
        ({"labels": LABELS[:, None]}, r"of shape \(120, 1\)"),
        ({"images": [], "labels": []}, "expected at least one of images with its label, got none"),
        ({"images": ["a.jpg"] * 120}, "got str"),
        ({"classes": ["a", "b"]}, "the module gives 10 logits, and there are 2 classes"),
        ({"train_images": IMAGES}, "expected train_images and train_labels together"),
        ({"train_images": IMAGES, "train_labels": LABELS + 5}, "expected train_labels from 0 to 9"),
        ({"module": Opaque(), "labels": LABELS % 3}, "Opaque has no layer to look at"),
        ({"module": Rows()}, r"gives \(B, C\) logits, got a tensor \(2, 3, 64\)"),
        ({"module": Sum()}, r"gives \(B, C\) logits, got \(1, 10\) for 2 images"),
        ({"module": NotANumber()}, "numbers that are not finite for"),
        ({"module": Fails()}, r"does not take images of shape \(3, 8, 8\): expected 5 channels$"),
        ({"made_by": "keras/resnet"}, "expected timm/NAME, torchvision/NAME or package.module:function"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    torch.manual_seed(0)
    given = {"module": small_network(), "images": IMAGES, "labels": LABELS, "preprocessing": SQUARE} | change
    with pytest.raises(UserError, match=message) as caught:
        idml.introspect(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("few_steps")
def test_what_cannot_be_calibrated_is_said_and_marked(
    trained: nn.Module, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    """Too few held-out images, or all of them right, or all wrong."""
    images, labels = digits[0][600:800], digits[1][600:800]
    right = idml.introspect(trained, images, labels, preprocessing=SQUARE).predict(images).labels
    for count, given, reason in (
        (99, labels, "99 held-out images, at least 100 are needed"),
        (200, right, "0 of 200 held-out answers are wrong"),
        (200, (right + 1) % 10, "200 of 200 held-out answers are wrong"),
    ):
        with pytest.warns(UserWarning, match=rf"P\(wrong\) is not calibrated: {reason}"):
            model = idml.introspect(trained, images[:count], given[:count], preprocessing=SQUARE)
        assert model.calibrated_on == 0 and model.spec.introspection is not None
        assert (model.spec.introspection["calibrated"], model.spec.introspection["note"]) == (False, reason)
        found = model.predict(images[:5])
        assert found.p_wrong is not None and np.isfinite(found.p_wrong).all()
        for promise in ({"max_risk": 0.1}, {"coverage": 0.9}):
            with pytest.raises(UserError, match=rf"can promise nothing: {reason}"):
                model.predict(images[:5], **promise)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        idml.introspect(trained, images[:100], labels[:100], preprocessing=SQUARE)


@pytest.mark.usefixtures("few_steps")
def test_images_that_are_all_alike(trained: nn.Module, digits: tuple[np.ndarray, np.ndarray]) -> None:
    """One image, and one image a class: nothing varies, or not within classes."""
    first = np.array([np.flatnonzero(digits[1] == label)[0] for label in range(10)])
    for chosen in (first[:1].repeat(120), first.repeat(12)):
        model = idml.introspect(trained, digits[0][chosen], digits[1][chosen], preprocessing=SQUARE)
        found = model.predict(digits[0][:50])
        assert found.novelty is not None and found.p_wrong is not None
        assert np.isfinite(found.p_wrong).all() and found.novelty.mean() > 0.8, "all others are new"


@pytest.mark.parametrize(
    ("promise", "message"),
    [
        ({"max_risk": 0.0}, "max_risk must be between 0 and 1, got 0"),
        ({"max_risk": 0.1, "confidence": 1.0}, "confidence must be between 0 and 1"),
        ({"coverage": 1.0}, "coverage must be between 0 and 1"),
        ({"max_risk": 1e-5}, "a risk of 1e-05 cannot be promised with confidence 0.95 by 600 held-out images"),
        ({"coverage": 0.9999}, "a coverage of 0.9999 cannot be promised by 600 held-out images"),
    ],
)
def test_promises_that_cannot_be_given(model: idml.TrainedModel, promise: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.predict(IMAGES[:2], **promise)
