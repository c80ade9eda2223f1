"""``idml.load`` and what a loaded model says: the run's own figures, images of every kind, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import nn

import idml
from augment import normalise
from idml.commands.export import export
from idml.data.collection import read_collection
from idml.data.image_dataset import read_rgb
from idml.errors import UserError
from idml.introspection.introspected import Introspected
from idml.spec import ModelSpec, fingerprint, load_state
from idml.trained import Embeddings
from tests.calibrated_models import write_calibrating_photos, write_calibrating_searched
from tests.tiny_models import train_tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/, runs/{live, off, retrieval, plain}, exported/ of the first."""
    root = tmp_path_factory.mktemp("trained")
    write_calibrating_photos(root / "photos")
    write_calibrating_searched(root / "searched")
    for kind in ("live", "off"):
        train_tiny(kind, root / "photos", root / "runs" / kind)
    train_tiny("retrieval live", root / "searched/photos", root / "runs/retrieval")
    train_tiny("retrieval off", root / "searched/photos", root / "runs/plain")
    export(["--checkpoint", str(root / "runs/live"), "--format", "safetensors", "--out", str(root / "exported")])
    return root


@pytest.fixture(scope="module")
def model(root: Path) -> idml.TrainedModel:
    return idml.load(root / "runs" / "live", device="cpu")


@pytest.fixture
def clothes(fashion: dict[str, np.ndarray]) -> np.ndarray:
    """(6, 28, 28) uint8."""
    return fashion["test_images"][:6]


def assert_equal(first: Embeddings, second: Embeddings) -> None:
    for field in dataclasses.fields(Embeddings):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert (a is None) == (b is None), field.name
        if a is not None:
            # Coordinates are whitened: rounding is as large as their largest numbers make it. A novelty has steps.
            least = {"coordinates": 1e-4 * float(np.abs(a).max()), "novelty": 2e-3}.get(field.name, 1e-5)
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=least, err_msg=field.name)


@pytest.mark.parametrize("name", ["live", "off"])
def test_predictions_are_those_of_the_runs_figures(root: Path, name: str) -> None:
    model = idml.load(root / "runs" / name)
    final = json.loads((root / "runs" / name / "results.json").read_text(encoding="utf-8"))["final"]
    paths = sorted((root / "photos" / "val").rglob("*.png"))
    labels = np.array([int(path.parent.name[-1]) for path in paths])
    found = model.predict([read_rgb(path) for path in paths])
    assert (found.labels == labels).mean() == pytest.approx(final["top1"], abs=1e-6)
    nll = -np.log(found.probabilities[np.arange(len(labels)), labels]).mean()
    assert nll == pytest.approx(final["nll"], abs=1e-4)
    assert found.classes == tuple(model.classes[label] for label in found.labels)
    np.testing.assert_allclose(found.confidence, found.probabilities.max(1))
    np.testing.assert_allclose(found.probabilities.sum(1), 1, atol=1e-5)
    if name == "live":
        embedded = model.embed([read_rgb(path) for path in paths]).uncertainty_embedding
        assert np.linalg.norm(embedded, axis=1).mean() == pytest.approx(final["uncertainty_test"], abs=1e-5)
        assert found.p_wrong is not None and found.novelty is not None
        np.testing.assert_array_equal(found.uncertainty, found.p_wrong)
        assert roc_auc_score(found.labels != labels, found.p_wrong) == pytest.approx(final["error_auroc"], abs=1e-6)
        assert 0 <= found.novelty.min() <= found.novelty.max() <= 108 / 109
        assert model.score_name == "P(wrong)" and model.calibrated_on == 108
    else:
        assert found.p_wrong is None and found.novelty is None
        np.testing.assert_allclose(found.uncertainty, 1 - found.confidence, atol=1e-6)
        assert model.score_name == "1 - max softmax" and model.calibrated_on == 0


def test_embeddings_by_hand(root: Path, clothes: np.ndarray) -> None:
    """Through the network itself, from a checkpoint that torch reads."""
    model = idml.load(root / "runs/retrieval", device="cpu")
    checkpoint = torch.load(root / "runs/retrieval/checkpoints/last.pt", weights_only=True)
    images = model.prepare(clothes[..., None])
    square = checkpoint["preprocessing"]
    network = model.spec.build().eval()
    network.load_state_dict(checkpoint["model"])
    with torch.no_grad():
        output = network(normalise(images, square["mean"], square["std"]))
    introspection = model.spec.build_introspection()
    assert introspection is not None
    introspection.load_state_dict(checkpoint["introspection"]["state"])
    maps: dict[str, torch.Tensor] = {}
    for layer in introspection.spec.layers.maps:
        network.get_submodule(layer.name).register_forward_hook(
            lambda _module, _given, value, name=layer.name: maps.update({name: value})
        )
    with torch.no_grad():
        network(normalise(images, square["mean"], square["std"]))
        pooled = [
            torch.cat([nn.functional.adaptive_avg_pool2d(value, 2).flatten(1), value.amax((2, 3))], 1)
            for value in maps.values()
        ]
        scores = introspection(torch.cat([*pooled, output.semantic], 1), None)
    found = model.embed(list(clothes), batch_size=4)
    np.testing.assert_allclose(found.semantic, output.semantic.numpy(), atol=1e-6)
    np.testing.assert_allclose(found.uncertainty_embedding, output.uncertainty.numpy(), atol=1e-6)
    np.testing.assert_allclose(found.uncertainty, scores.p_wrong.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.foreseen_loss, scores.foreseen_loss.numpy(), rtol=1e-4)
    np.testing.assert_allclose(found.belief, scores.belief.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.novelty, scores.novelty.numpy(), atol=2e-3)
    assert model.calibrated_on == 120
    np.testing.assert_allclose(np.linalg.norm(found.semantic, axis=1), 1, atol=1e-5)
    assert len(found) == 6 and found.semantic.shape == (6, 16) and found.probabilities is None


def test_a_plain_retrieval_model_has_no_score(root: Path, clothes: np.ndarray) -> None:
    model = idml.load(root / "runs/plain")
    found = model.embed(list(clothes))
    assert model.score_name == "none" and np.isnan(found.uncertainty).all() and not found.uncertainty_embedding.any()
    with pytest.raises(UserError, match=r"is a retrieval model: it has no classes to predict\. Use embed"):
        model.predict(list(clothes))


def test_the_same_image_in_every_form(model: idml.TrainedModel, clothes: np.ndarray) -> None:
    """PIL images (grey, RGB, RGBA, palette), arrays, tensors, integers, floats: one result."""
    grey = [Image.fromarray(image) for image in clothes]
    expected = model.embed(grey)
    coloured = np.repeat(clothes[..., None], 3, axis=3)
    channels_first = torch.from_numpy(coloured).movedim(3, 1)
    forms: dict[str, Any] = {
        "RGB": [image.convert("RGB") for image in grey],
        "RGBA": [image.convert("RGBA") for image in grey],
        "list of arrays": list(clothes),
        "tuple": tuple(clothes),
        "(N, H, W, 1)": clothes[..., None],
        "(N, H, W, 3)": coloured,
        "wider integers": coloured.astype(np.int64),
        "floats": (coloured / 255).astype(np.float32),
        "float64": coloured / 255,
        "tensor": channels_first,
        "tensor (N, 1, H, W)": channels_first[:, :1],
        "tensor of floats": channels_first.float() / 255,
        "list of tensors": list(channels_first),
        "mixed": [grey[0], *clothes[1:3], *channels_first[3:]],
        "not writable": np.broadcast_to(clothes[..., None], (*clothes.shape, 3)),
        "generator": (image for image in clothes),
    }
    for name, images in forms.items():
        assert_equal(model.embed(images), expected), name
    one = model.embed(grey[0])
    assert len(one) == 1
    assert_equal(model.embed(clothes[0]), one)
    assert_equal(model.embed(channels_first[0]), one)


def test_sixteen_bits_and_bfloat16(model: idml.TrainedModel, tmp_path: Path, clothes: np.ndarray) -> None:
    """An image of 16 bits is the same from a file and from memory, and bright where it is; NumPy has no bfloat16."""
    deep = clothes.astype(np.uint16) * 257
    images = [Image.fromarray(image) for image in deep]
    assert images[0].mode == "I;16"
    assert_equal(model.embed(images), model.embed(list(clothes)))
    images[0].save(tmp_path / "deep.png")
    assert_equal(model.embed(read_rgb(tmp_path / "deep.png")), model.embed(images[0]))
    levels = torch.from_numpy(clothes // 64 * 64)[:, None]  # which bfloat16 holds to 1/510
    assert_equal(model.embed((levels / 255).bfloat16()), model.embed(levels))


def test_files_and_images_in_memory_are_prepared_alike(root: Path, model: idml.TrainedModel) -> None:
    collection = read_collection(root / "photos" / "val")
    batches = list(model.embed_dataset(collection.dataset, batch_size=10))
    assert [len(batch) for batch in batches] == [10, 10, 4]
    opened = [Image.open(path) for path in collection.dataset.paths or ()]
    assert_equal(Embeddings.joined(batches), model.embed(opened, batch_size=7))


def test_batches_change_nothing(model: idml.TrainedModel, clothes: np.ndarray) -> None:
    assert_equal(model.embed(list(clothes), batch_size=1), model.embed(list(clothes), batch_size=100))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one image, got none"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"got one of shape \(0, 8, 8, 3\)"),
        (np.zeros((8, 8, 2), np.uint8), r"1 or 3 channels, got one of shape \(8, 8, 2\)"),
        (np.zeros((2, 2, 8, 8, 3), np.uint8), "got one of shape"),
        (np.zeros(64, np.uint8), "got one of shape"),
        (np.float32(0.5), "got float32"),
        (np.full((8, 8), np.nan, np.float32), "between 0 and 1, got nan"),
        (np.full((8, 8), np.inf, np.float32), "between 0 and 1, got inf"),
        (np.full((8, 8, 3), 200.0), "between 0 and 1, got 200 to 200; give images as they are"),
        (np.full((8, 8, 3), -0.1), "between 0 and 1, got -0.1"),
        (np.full((8, 8, 3), 256), "between 0 and 255, got 256"),
        (np.full((8, 8, 3), -1), "between 0 and 255, got -1"),
        (torch.zeros(8, 8), r"tensor \(3, H, W\) or \(N, 3, H, W\), got shape \(8, 8\)"),
        (torch.zeros(8, 8, 3), "1 or 3 channels"),
        (torch.full((3, 8, 8), torch.nan), "got nan"),
        (["photo.jpg"], r"got str \(open files with PIL\.Image\.open\)"),
        ("photo.jpg", "got str"),
        (Path("photo.jpg"), "as PIL images, arrays or tensors"),
        (None, "got NoneType"),
        (3, "got int"),
        (np.array([["a", "b"]]), "or floats from 0 to 1, got <U1"),
        (np.zeros((8, 8), np.complex64), "got complex64"),
        (np.zeros((8, 8), bool), "integers from 0 to 255, or floats .* got bool"),
    ],
)
def test_images_that_are_none(model: idml.TrainedModel, images: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.embed(images)
    with pytest.raises(UserError, match=message):
        model.predict(images)


def test_every_way_to_name_a_model(root: Path, model: idml.TrainedModel, clothes: np.ndarray) -> None:
    expected = model.embed(list(clothes))
    for source in (root / "runs/live/checkpoints/last.pt", root / "exported", str(root / "runs/live")):
        loaded = idml.load(source, device="cpu")
        assert loaded.fingerprint == model.fingerprint and loaded.spec == model.spec
        assert_equal(loaded.embed(list(clothes)), expected)
        assert not loaded.network.training and not any(p.requires_grad for p in loaded.network.parameters())
    assert model.source == root / "runs/live/checkpoints/last.pt"
    best = idml.load(root / "runs/live/checkpoints/best.pt")
    assert best.source.name == "best.pt"


def test_a_damaged_newest_checkpoint(root: Path, tmp_path: Path) -> None:
    """The one before it, with a warning; and none, where all are damaged."""
    run = tmp_path / "run"
    shutil.copytree(root / "runs/live", run)
    for path in sorted((run / "checkpoints").iterdir()):
        if path.name != "last-1.pt":
            content = bytearray(path.read_bytes())
            content[len(content) // 2 : len(content) // 2 + 50] = b"\0" * 50
            path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"last\.pt is damaged.*going on from last-1\.pt"):
        idml.load(run)
    (run / "checkpoints" / "last-1.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        idml.load(run)


def damage(exported: Path, target: Path, change: Any) -> Path:
    """A copy of an exported folder whose config.json was changed."""
    shutil.copytree(exported, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(change(config)), encoding="utf-8")
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: {}, "has no object idml"),
        (lambda config: [1], "does not describe a model of this project"),
        (lambda config: {"idml": {}}, "does not describe a model of this project: KeyError"),
        (lambda config: {"idml": config["idml"] | {"preprocessing": 3}}, "does not describe a model"),
        (
            lambda config: {"idml": config["idml"] | {"model": "resnet9_cifar"}},
            "unknown model 'resnet9_cifar'; did you",
        ),
        (
            lambda config: {"idml": config["idml"] | {"ism": "on"}},
            "cannot be made from what is stored.*ism must be one",
        ),
        (
            lambda config: {"idml": config["idml"] | {"model": "resnet14_cifar"}},
            "are not those of the model.*Missing key",
        ),
        (
            lambda config: {"idml": config["idml"] | {"classes": ["a", "b"]}},
            "are not those of the model.*size mismatch",
        ),
        (lambda config: {"idml": config["idml"] | {"model_kwargs": {"depht": 3}}}, "with arguments.*cannot be made"),
    ],
)
def test_exported_folders_that_are_wrong(root: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        idml.load(damage(root / "exported", tmp_path / "wrong", change))


def test_exported_folders_that_are_damaged(root: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(root / "exported", broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        idml.load(broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no such file: .*model\.safetensors"):
        idml.load(broken)
    (broken / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        idml.load(broken)


def test_what_is_no_model(root: Path, tmp_path: Path) -> None:
    weights = {name: value.contiguous() for name, value in idml.load(root / "runs/off").network.state_dict().items()}
    torch.save(weights, tmp_path / "bare.pt")
    save_file(weights, tmp_path / "bare.safetensors")
    checkpoint = torch.load(root / "runs/off/checkpoints/last.pt", weights_only=True)
    torch.save(checkpoint | {"classes": 3}, tmp_path / "classes.pt")
    torch.save(checkpoint | {"config": {"dataset": "folder"}}, tmp_path / "config.pt")
    other = checkpoint["model"] | {"classifier.weight": torch.zeros(5, 64)}
    torch.save(checkpoint | {"model": other}, tmp_path / "other.pt")
    torch.save(checkpoint | {"model": {"classifier.weight": 3}}, tmp_path / "number.pt")
    (tmp_path / "photo.png").write_bytes((root / "photos/val/class 0/000.png").read_bytes())
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("bare.pt", "is not a checkpoint of train_cls.py or train_dml.py: it has no model, config"),
        ("bare.safetensors", "is not a checkpoint"),
        ("classes.pt", "its classes is a int"),
        ("config.pt", "does not describe a model of this project"),
        ("other.pt", "are not those of the model that it describes: size mismatch for classifier.weight"),
        ("number.pt", "are not those of the model"),
        ("photo.png", "is damaged, or holds more than"),
        ("empty", "expected a run directory with checkpoints/last.pt, or a folder with config.json"),
        ("nothing", "no model at .*nothing: expected a run directory"),
    ):
        with pytest.raises(UserError, match=message):
            idml.load(tmp_path / name)


def test_a_spec_goes_through_json(root: Path) -> None:
    for run in sorted((root / "runs").iterdir()):
        spec = idml.load(run).spec
        assert ModelSpec.from_json(json.loads(json.dumps(spec.as_json() | {"of tomorrow": 1})), "here") == spec


def test_checkpoints_from_before_a_field_existed(root: Path, clothes: np.ndarray) -> None:
    """Without an introspection, ``fit`` and ``method``, and with options that are gone: as they were trained then."""
    path = root / "runs/off/checkpoints/last.pt"
    checkpoint = torch.load(path, weights_only=True)
    config, square = dict(checkpoint["config"]), dict(checkpoint["preprocessing"])
    for name in ("temperature", "method"):
        config.pop(name)
    config |= {"uncertainty_loss": "loss-prediction", "uncertainty_share": 0.5}
    square.pop("fit")
    assert "introspection" not in checkpoint
    spec = ModelSpec.from_checkpoint(checkpoint | {"config": config, "preprocessing": square}, "here")
    assert (spec.introspection, spec.temperature, spec.preprocessing.fit) == (None, 5.0, "crop")
    old = checkpoint | {"config": config | {"dataset": "fashion-mnist"}, "preprocessing": square}
    assert ModelSpec.from_checkpoint(old, "here").preprocessing.fit == "whole"
    network = spec.build()
    load_state(network, checkpoint["model"], "here")
    assert fingerprint(network) == idml.load(path).fingerprint


def test_a_checkpoint_that_was_trained_with_loss_prediction(root: Path, tmp_path: Path, clothes: np.ndarray) -> None:
    """Its answers are as they were; a warning says how to have P(wrong) again."""
    checkpoint = torch.load(root / "runs/off/checkpoints/last.pt", weights_only=True)
    config = checkpoint["config"] | {"ism": "live", "uncertainty_loss": "loss-prediction", "uncertainty_share": 0.5}
    heads = {"uncertainty_head.depths.0.weight": torch.ones(2, 2), "calibration.weight": torch.ones(3)}
    torch.save(checkpoint | {"config": config, "model": checkpoint["model"] | heads}, tmp_path / "earlier.pt")
    with pytest.warns(UserWarning, match=r"earlier\.pt was trained with loss prediction.*python -m idml introspect"):
        model = idml.load(tmp_path / "earlier.pt", device="cpu")
    assert (model.spec.ism, model.introspection, model.score_name) == ("off", None, "1 - max softmax")
    expected = idml.load(root / "runs/off", device="cpu").predict(list(clothes)).probabilities
    np.testing.assert_array_equal(model.predict(list(clothes)).probabilities, expected)


def test_the_fingerprint_is_of_every_number(model: idml.TrainedModel) -> None:
    network, introspection = model.spec.build(), model.spec.build_introspection()
    assert introspection is not None and model.introspection is not None
    network.load_state_dict(model.network.state_dict())
    introspection.load_state_dict(model.introspection.state_dict())
    whole = Introspected(network, introspection)
    assert fingerprint(whole) == model.fingerprint == fingerprint(model.whole) != fingerprint(model.network)
    seen = {model.fingerprint}
    for name, value in whole.state_dict().items():
        before = value.clone()
        value.view(-1)[-1] = ~value.view(-1)[-1] if value.dtype == torch.bool else value.view(-1)[-1].nan_to_num() + 1
        seen.add(fingerprint(whole))
        value.copy_(before)
        assert fingerprint(whole) == model.fingerprint, name
    assert len(seen) == 1 + len(whole.state_dict()) and all(len(text) == 16 for text in seen)


def test_a_device_that_is_not_there(root: Path) -> None:
    absent = "cuda" if not torch.cuda.is_available() else "mps"
    with pytest.raises(UserError, match=f"--device {absent}: torch .* sees no such device"):
        idml.load(root / "exported", device=absent)
