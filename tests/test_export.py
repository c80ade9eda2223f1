"""What export writes, run by what production runs it with, on real images, against the model itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import idml
from augment import normalise
from idml import exporting
from idml.commands.export import export
from idml.data.collection import read_collection
from idml.errors import UserError
from idml.models import uncertainty_score
from tests.calibrated_models import write_calibrating_photos, write_calibrating_searched
from tests.tiny_models import CLASSIFIERS, train_tiny


def kinds(*names: str, slow: tuple[str, ...]) -> list[Any]:
    """Parameters of a test: kinds of models, those that take long marked so."""
    return [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


KINDS = kinds(
    *("live", "retrieval live", "vit"),
    slow=("off", "released", "mobilenetv3", "retrieval off", "retrieval released", "retrieval vit"),
)
"""Models that every format but ONNX is tested on: each output that there may be, and each kind of backbone."""

ONNX_KINDS = kinds("retrieval live", slow=("off", "released", "mobilenetv3", "vit", "retrieval off", "retrieval vit"))


class Models:
    """Runs of tiny models, each trained when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.photos = write_calibrating_photos(root / "photos")
        self.searched = write_calibrating_searched(root / "searched")

    def __getitem__(self, kind: str) -> Path:
        run = self.root / "runs" / kind
        photos = self.photos if kind in CLASSIFIERS else self.searched
        return run if run.exists() else train_tiny(kind, photos, run)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def write(run: Path, kind: str, out: Path, *options: str) -> Path:
    export(["--checkpoint", str(run), "--format", kind, "--out", str(out), "--threads", "1", *options])
    return out


def real_images(models: Models, model: idml.TrainedModel, count: int) -> torch.Tensor:
    dataset = read_collection(models.photos).dataset
    images, _ = next(model.loader(dataset, batch_size=count).epoch(0))
    return images


def expected_outputs(model: idml.TrainedModel, images: torch.Tensor) -> dict[str, np.ndarray]:
    """By the model's own forward pass and nothing of the exporter."""
    square = model.spec.preprocessing
    with torch.no_grad():
        output = model.whole(normalise(images, square.mean, square.std))
        found = {"semantic": output.semantic}
        if model.task == "classification":
            found["logits"] = output.logits
            found["uncertainty"] = 1 - output.logits.softmax(1).max(1).values
        if model.spec.ism != "off":
            found |= {"uncertainty": uncertainty_score(output), "uncertainty_embedding": output.uncertainty}
        if output.scores is not None:
            found |= {"uncertainty": output.scores.p_wrong, "novelty": output.scores.novelty}
    return {name: value.numpy() for name, value in found.items()}


def assert_close(found: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        least = 1e-4 if name != "novelty" else 2e-3  # which has steps of 0.001
        np.testing.assert_allclose(np.asarray(found[name]), value, rtol=1e-4, atol=least, err_msg=name)


@pytest.mark.parametrize("kind", ONNX_KINDS)
def test_onnx_gives_the_models_numbers_for_any_number_of_images(models: Models, tmp_path: Path, kind: str) -> None:
    out = write(models[kind], "onnx", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    model = idml.load(models[kind], device="cpu")
    names = [output.name for output in session.get_outputs()]
    for count in (1, 2, 7):
        images = real_images(models, model, count)
        found = dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True))
        assert_close(found, expected_outputs(model, images))


def test_an_onnx_file_says_what_it_is(models: Models, tmp_path: Path) -> None:
    out = write(models["live"], "onnx", tmp_path / "model.onnx", "--input-type", "float32", "--opset", "20")
    loaded, model = onnx.load(str(out)), idml.load(models["live"], device="cpu")
    onnx.checker.check_model(loaded, full_check=True)
    assert {entry.domain: entry.version for entry in loaded.opset_import}[""] == 20
    stored = {entry.key: json.loads(entry.value) for entry in loaded.metadata_props}
    beside = json.loads((tmp_path / "model.onnx.json").read_text(encoding="utf-8"))
    assert stored["classes"] == beside["classes"] == ["class 0", "class 1", "class 2"]
    assert stored["score"] == {"name": "P(wrong)", "calibrated_on": model.calibrated_on} and model.calibrated_on == 108
    assert "probability" in stored["outputs"]["uncertainty"]["meaning"]
    assert "less strange" in stored["outputs"]["novelty"]["meaning"]
    assert beside["introspection"] == stored["introspection"] and stored["introspection"]["held_out"] == 108
    assert stored["fingerprint"] == model.fingerprint
    assert beside["input"]["dtype"] == "float32" and beside["input"]["shape"] == ["batch", 3, 32, 32]
    assert beside["checked"]["largest_difference"] < 1e-4 and beside["checked"]["batch_sizes"] == [1, 3, 16]
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for count in (1, 3):
        images = real_images(models, model, count)
        given = images.numpy().astype(np.float32) / 255
        found = dict(zip(names, session.run(None, {"images": given}), strict=True))
        assert_close(found, expected_outputs(model, images))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.load:FutureWarning")
def test_torchscript_gives_the_models_numbers(models: Models, tmp_path: Path, kind: str) -> None:
    out = write(models[kind], "torchscript", tmp_path / "model.pt")
    extra = {"idml.json": ""}
    loaded, model = torch.jit.load(str(out), _extra_files=extra), idml.load(models[kind], device="cpu")
    assert json.loads(extra["idml.json"])["fingerprint"] == model.fingerprint
    for count in (1, 5):
        images = real_images(models, model, count)
        with torch.no_grad():
            assert_close({k: v.numpy() for k, v in loaded(images).items()}, expected_outputs(model, images))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["safetensors", "timm"])
def test_folders_load_back_the_same_model(models: Models, tmp_path: Path, kind: str, layout: str) -> None:
    out = write(models[kind], layout, tmp_path / "model")
    before, after = idml.load(models[kind], device="cpu"), idml.load(out, device="cpu")
    assert after.fingerprint == before.fingerprint and after.spec == before.spec
    images = real_images(models, before, 4)
    for name, value in expected_outputs(before, images).items():
        assert (expected_outputs(after, images)[name] == value).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_timm_makes_the_plain_model(models: Models, tmp_path: Path, kind: str) -> None:
    out = write(models[kind], "timm", tmp_path / "model")
    model = idml.load(models[kind], device="cpu")
    square, images = model.spec.preprocessing, real_images(models, model, 4)
    inputs = normalise(images, square.mean, square.std)
    made = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    described = json.loads((out / "config.json").read_text(encoding="utf-8"))
    with torch.no_grad():
        if model.task == "classification":
            assert (made(inputs) == model.network(inputs).logits).all()
            arguments = described["model_args"]
            by_path = timm.create_model(
                described["architecture"], checkpoint_path=out / "model.safetensors", **arguments
            )
            assert (by_path.eval()(inputs) == model.network(inputs).logits).all()
            assert described["label_names"] == list(model.classes)
        else:
            assert (made.forward_features(inputs) == model.network.backbone.forward_features(inputs)).all()
    data = timm.data.resolve_model_data_config(made)
    assert list(data["input_size"]) == [3, square.image_size, square.image_size]
    assert (tuple(data["mean"]), tuple(data["std"])) == (square.mean, square.std)


def test_images_of_ones_own_to_compare_on(models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(models["live"], "safetensors", tmp_path / "model", "--data-dir", str(models.photos / "val" / "class 0"))
    assert "outputs logits, semantic, uncertainty, uncertainty_embedding, novelty; on 8 real" in capsys.readouterr().out
    with pytest.raises(UserError, match="no folder"):
        write(models["live"], "safetensors", tmp_path / "other", "--data-dir", str(tmp_path / "none"))
    assert not (tmp_path / "other").exists()


def test_an_export_that_is_not_the_model_is_removed(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that is off by 0.001: as if a runtime computed something else."""
    forward = exporting.ExportedGraph.forward
    monkeypatch.setattr(
        exporting.ExportedGraph,
        "forward",
        lambda self, images: {name: value + 1e-3 for name, value in forward(self, images).items()},
    )
    with pytest.raises(UserError, match=r"torchscript export: .* is 0\.00\d+ away"):
        write(models["live"], "torchscript", tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_scores_that_are_not_the_models_are_reported(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A novelty that is off by more than what rounding can do to a rank."""
    named = exporting.named_outputs
    monkeypatch.setattr(
        exporting.ExportedGraph,
        "forward",
        lambda self, images: {
            name: value * 0.9 if name == "novelty" else value
            for name, value in named(self.network((images.float() - self.shift) / self.scale), plain=True).items()
        },
    )
    with pytest.raises(UserError, match=r"torchscript export: novelty of \d+ images is 0\.0\d+ away"):
        write(models["off introspected"], "torchscript", tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_rank_may_be_a_step_away_where_an_image_lies_between_two(models: Models) -> None:
    """Held-out images lie where the table steps: rounding decides there, and must not end an export."""
    model = idml.load(models["off introspected"], device="cpu")
    assert model.introspection is not None
    novelty = model.introspection.novelty
    at_steps = novelty.table[novelty.table.isfinite()][::100]
    low, high = exporting.novelty_bounds(model, at_steps)
    assert (high > low).all() and (high - low < 0.03).all()
    for sign in (-1, 1):
        nearly = novelty.novelty(at_steps * (1 + sign * 1e-5)).numpy()
        assert ((low <= nearly) & (nearly <= high)).all()
    assert (novelty.novelty(at_steps * 1.5).numpy() > high).any()


def test_nothing_is_replaced_unasked(models: Models, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "1.txt").write_text("mine", encoding="utf-8")
    out = write(models["live"], "safetensors", tmp_path / "model")
    with pytest.raises(UserError, match=r"exists; give another --out, or --overwrite"):
        write(models["vit"], "safetensors", out)
    with pytest.raises(UserError, match="no exported model: it is not replaced"):
        write(models["vit"], "safetensors", photos, "--overwrite")
    assert (photos / "1.txt").read_text(encoding="utf-8") == "mine"
    write(models["vit"], "timm", out, "--overwrite")
    assert idml.load(out, device="cpu").spec.model == "vit_tiny_patch16_224"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "idml.safetensors", "model.safetensors"]


def test_a_package_that_is_missing_is_named(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"needs the package onnxscript: pip install 'idml\[onnx\]'"):
        write(models["live"], "onnx", tmp_path / "model.onnx")
    write(models["live"], "safetensors", tmp_path / "model")  # which needs none of them


def test_options_without_effect_warn(models: Models, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="--opset 20 has no effect") as caught:
        write(models["live"], "safetensors", tmp_path / "model", "--opset", "20", "--input-type", "float32")
    assert [str(warning.message) for warning in caught if "input-type" in str(warning.message)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnx", "--out", "x.onnx"], "--checkpoint is missing"),
        (["--checkpoint", "runs/none", "--out", "x.onnx"], "--format is missing"),
        (["--checkpoint", "runs/none", "--format", "onnx"], "--out is missing: where to write, model.onnx"),
        (["--checkpoint", "runs/none", "--format", "onnxx", "--out", "x"], "did you mean onnx"),
        (["--checkpoint", "runs/none", "--format", "timm", "--out", "x"], "no model at runs/none"),
        (
            ["--checkpoint", "x", "--format", "onnx", "--opset", "5", "--out", "x.onnx"],
            "--opset: expected a value between",
        ),
    ],
)
def test_mistakes(in_tmp: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        export(arguments)
    assert list(in_tmp.iterdir()) == []


def test_a_folder_with_a_part_missing(models: Models, tmp_path: Path) -> None:
    out = write(models["live"], "timm", tmp_path / "model")
    (out / "idml.safetensors").rename(tmp_path / "heads")
    with pytest.raises(UserError, match=r"no such file: .*idml\.safetensors"):
        idml.load(out)
    (tmp_path / "heads").rename(out / "idml.safetensors")
    weights = load_file(out / "model.safetensors")
    del weights["fc.weight"]
    save_file(weights, out / "model.safetensors")
    with pytest.raises(UserError, match=r"are not those of the model.*classifier\.weight"):
        idml.load(out)
