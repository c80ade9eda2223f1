"""``python -m idml introspect``, as it is run: what comes out, logits to the bit, stopped and resumed, mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import idml
from augment import normalise
from idml.commands import introspect as command
from idml.commands.audit import audit
from idml.commands.embed import embed
from idml.commands.evaluate import evaluate
from idml.commands.export import export
from idml.commands.introspect import introspect
from idml.commands.search import search
from idml.embedding_file import read_table
from idml.introspecting import Reading
from idml.introspection import fit
from tests.calibrated_models import write_calibrating_searched
from tests.one_line import error_of
from tests.test_distributed import launch
from tests.test_train_cls import ROOT
from tests.tiny_models import train_tiny, write_photos

QUICK = ["--threads", "1", "--workers", "0", "--no-verbose"]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the heads learn is the matter of tests/introspection."""
    monkeypatch.setattr(fit, "LEAST_STEPS", 10)
    monkeypatch.setattr(fit, "PASSES", 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``photos/{train,val}``: 120 images each of three classes; ``runs/{cls,dml}``: plain models, the second of five of
    the ten classes in ``searched/photos``."""
    root = tmp_path_factory.mktemp("introspect")
    write_photos(root / "photos", train=40, test=40)
    write_calibrating_searched(root / "searched")
    train_tiny("off", root / "photos", root / "runs/cls")
    train_tiny("retrieval off", root / "searched/photos", root / "runs/dml")
    return root


@pytest.fixture(scope="module")
def introspected(root: Path) -> Path:
    """The classifier, introspected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "LEAST_STEPS", 50)
        patch.setattr(fit, "PASSES", 0)
        run("--checkpoint", root / "runs/cls", "--data-dir", root / "photos", "--out", root / "introspected")
    return root / "introspected"


def run(*arguments: object) -> None:
    introspect([*map(str, arguments), *QUICK])


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    return error_of(capsys, lambda: run(*arguments))


def pictures(root: Path, count: int = 9) -> list[Image.Image]:
    return [Image.open(path) for path in sorted((root / "photos/val").rglob("*.png"))[::13][:count]]


def logits_of(model: idml.TrainedModel, images: list[Image.Image]) -> Tensor:
    return model.outputs(model.prepare(images)).logits  # type: ignore[union-attr]


# ---- what comes out ----


def test_a_run(root: Path, introspected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--checkpoint", root / "runs/cls", "--data-dir", root / "photos", "--out", tmp_path / "new", "--coverage", 0.9)
    said = capsys.readouterr().out
    assert "looked at backbone.blocks.0 (16), backbone.blocks.1 (32), backbone.blocks.2 (64), the 64 features" in said
    assert "read 120 held-out and 120 training images in" in said and "error rate " in said
    assert "of P(wrong)," in said and "promise: " in said and "classes: for a coverage of 0.9" in said
    assert f"written to {tmp_path / 'new'} in" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"], "what was read is gone"
    before, after = (idml.load(path, device="cpu") for path in (root / "runs/cls", introspected))
    images = pictures(root)
    assert torch.equal(logits_of(before, images), logits_of(after, images))
    assert before.classes == after.classes and before.introspection is None and after.calibrated_on == 120
    spec = after.spec.introspection
    assert spec is not None and (spec["held_out"], spec["fitted_on"], spec["folds"]) == (120, 240, 5)
    about = json.loads((introspected / "config.json").read_text(encoding="utf-8"))
    answers, paths = _answers(after, root / "photos/val")
    wrong = np.mean([name != path.parent.name for name, path in zip(answers, paths, strict=True)])
    assert about["introspected"]["error_held_out"] == pytest.approx(wrong)
    assert about["introspection"]["held_out"] == 120


def _answers(model: idml.TrainedModel, folder: Path) -> tuple[tuple[str, ...], list[Path]]:
    paths = sorted(folder.rglob("*.png"))
    return model.predict([Image.open(path) for path in paths]).classes, paths


def test_every_command_takes_it(root: Path, introspected: Path, tmp_path: Path) -> None:
    given = ["--checkpoint", str(introspected), "--data-dir", str(root / "photos")]
    evaluate([*given, "--out", str(tmp_path / "m.json"), "--threads", "1", "--workers", "0"])
    figures = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    assert figures["score"] == {"name": "P(wrong)", "calibrated_on": 120} and "novelty" in figures["scores"]
    embed([*given, "--out", str(tmp_path / "E.parquet"), *QUICK])
    table = read_table(tmp_path / "E.parquet")
    assert len(table) == 240 and "novelty" in table.numbers and table.about["score"] == "P(wrong)"
    search(["--index", str(tmp_path / "E.parquet"), "--query", str(root / "photos/val/class 0/000.png"), *QUICK])
    audit([*given, "--out", str(tmp_path / "report"), "--shift-images", "0", "--pictures", "2", *QUICK])
    metrics = json.loads((tmp_path / "report/metrics.json").read_text(encoding="utf-8"))
    assert metrics["novelty"]["ranked"] and metrics["uncertainty"]["calibrated_on"] == 120
    export([*given, "--format", "safetensors", "--out", str(tmp_path / "again")])
    assert idml.load(tmp_path / "again").fingerprint == idml.load(introspected).fingerprint
    # Once more, with other images: it replaces the introspection and not the network.
    run("--checkpoint", introspected, "--data-dir", root / "photos/val", "--out", tmp_path / "twice")
    twice = idml.load(tmp_path / "twice", device="cpu")
    assert twice.calibrated_on == 120 and twice.fingerprint != idml.load(introspected).fingerprint
    images = pictures(root)
    assert torch.equal(logits_of(twice, images), logits_of(idml.load(introspected, device="cpu"), images))


def own_network() -> nn.Module:
    """A module of somebody's own, of three classes."""
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


OTHERS: dict[str, Any] = {
    "timm/resnet10t": (lambda: timm.create_model("resnet10t", num_classes=3), ["--image-size", 64]),
    "vit_tiny_patch16_224": (
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=48, depth=3),
        ["--image-size", 48, "--model-kwargs", "depth=3"],
    ),
    "torchvision/mobilenet_v3_small": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=3),
        ["--image-size", 64],
    ),
    "tests.test_introspect_command:own_network": (
        own_network,
        ["--image-size", 32, "--fit", "whole", "--mean", 0.5, 0.5, 0.5, "--std", 0.2, 0.2, 0.2],
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_classifiers_of_others(root: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, options = OTHERS[name]
    torch.manual_seed(0)
    module = make().eval()
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    given = ["--model", name, "--weights", tmp_path / "weights.safetensors", "--data-dir", root / "photos/val"]
    run(*given, *options, "--out", tmp_path / "model")
    assert "read 120 held-out and 0 training images" in capsys.readouterr().out
    model = idml.load(tmp_path / "model", device="cpu", trust_module=":" in name)
    square = model.spec.preprocessing
    assert square.image_size == options[1] and model.calibrated_on == 120
    prepared = model.prepare(pictures(root))
    with torch.no_grad():
        expected = module(normalise(prepared, square.mean, square.std))
    assert torch.equal(model.outputs(prepared).logits, expected)  # type: ignore[union-attr]
    for kind in ("torchscript", *(["timm"] if "vit" in name or "timm" in name else [])):
        out = tmp_path / kind
        export([
            *("--checkpoint", str(tmp_path / "model"), "--format", kind, "--out", str(out)),
            *(["--trust-module"] if ":" in name else []),
        ])  # fmt: skip
        assert "novelty" in json.loads(_description(out))["outputs" if kind == "torchscript" else "introspection"] or (
            kind == "timm"
        )
    if (tmp_path / "timm").exists():
        plain = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(plain(normalise(prepared, square.mean, square.std)), expected)
        assert idml.load(tmp_path / "timm", device="cpu").fingerprint == model.fingerprint


def _description(out: Path) -> str:
    return (out / "config.json" if out.is_dir() else out.with_name(f"{out.name}.json")).read_text(encoding="utf-8")


def test_names_of_classes_from_a_file(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A network of more classes than the folder has: its file of names says which is which."""
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t", num_classes=5).state_dict(), tmp_path / "five.pth")
    (tmp_path / "names.txt").write_text("other\nclass 2\nclass 0\nclass 1\nmore\n", encoding="utf-8")
    given = ["--model", "resnet10t", "--weights", tmp_path / "five.pth", "--data-dir", root / "photos/val"]
    given += ["--image-size", 64, "--out", tmp_path / "model"]
    assert "has a classifier of 5 classes, expected 3: name all" in fails(capsys, *given)
    assert not (tmp_path / "model").exists()
    run(*given, "--classes", tmp_path / "names.txt")
    model = idml.load(tmp_path / "model", device="cpu")
    assert model.classes == ("other", "class 2", "class 0", "class 1", "more")
    answers, paths = _answers(model, root / "photos/val")
    about = json.loads((tmp_path / "model/config.json").read_text(encoding="utf-8"))["introspected"]
    wrong = np.mean([name != path.parent.name for name, path in zip(answers, paths, strict=True)])
    assert about["error_held_out"] == pytest.approx(wrong)


def test_a_retrieval_model(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the folder's classes are those of the training; the others calibrate."""
    run("--checkpoint", root / "runs/dml", "--data-dir", root / "searched/photos", "--out", tmp_path / "model")
    assert "read 300 held-out and 300 training images" in capsys.readouterr().out
    before, after = (idml.load(path, device="cpu") for path in (root / "runs/dml", tmp_path / "model"))
    images = pictures(root)
    first, second = before.embed(images), after.embed(images)
    np.testing.assert_array_equal(first.semantic, second.semantic)
    assert after.calibrated_on == 300 and second.belief is not None and np.isnan(first.uncertainty).all()
    given = ["--checkpoint", str(tmp_path / "model"), "--data-dir", str(root / "searched/photos")]
    embed([*given, "--out", str(tmp_path / "E.parquet"), *QUICK])
    capsys.readouterr()
    search(["--index", str(tmp_path / "E.parquet"), "--query", str(root / "searched/photos/class 1/000.png"), *QUICK])
    assert "P(nearest is of another class) was calibrated on 300 held-out images" in capsys.readouterr().out


def test_fewer_images_than_are_there(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many as fit into the cache, held-out ones first, of each class alike."""
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "weights.pth")
    chosen = ["--model", "resnet10t", "--weights", tmp_path / "weights.pth", "--image-size", 32]
    chosen += ["--data-dir", root / "photos", "--out", tmp_path / "model"]
    assert "--cache-bytes: expected a value" in fails(capsys, *chosen, "--cache-bytes", 1000)
    run(*chosen, "--cache-bytes", 2**20)
    said = capsys.readouterr().out
    assert "3,072 numbers an image" in said
    most = 2**20 // (2 * (3072 + 2 * 3))  # in half precision, but for the logits
    assert f"read 120 held-out and {most - 120} training images" in said and most == 170


# ---- stopped and resumed ----


def test_a_stopped_command_resumes(
    root: Path, introspected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after a hundred images, resumed with what was read, but for a part that was damaged."""
    out, count = tmp_path / "model", 0
    given = ["--checkpoint", root / "runs/cls", "--data-dir", root / "photos", "--out", out, "-b", 5]
    features = Reading.features

    def stops(self: Reading, images: Tensor) -> Any:
        nonlocal count
        count += len(images)
        if count > 100:
            raise KeyboardInterrupt
        return features(self, images)

    monkeypatch.setattr(Reading, "features", stops)
    with pytest.raises(KeyboardInterrupt):
        run(*given)
    parts = sorted(tmp_path.glob("model.parts/*.npz"))
    assert len(parts) == 20 and not out.exists()
    parts[3].write_bytes(parts[3].read_bytes()[:-40])
    seen: list[int] = []
    monkeypatch.setattr(Reading, "features", lambda self, images: (seen.append(len(images)), features(self, images))[1])
    capsys.readouterr()
    run(*given)
    assert "going on: 95 images were read before" in capsys.readouterr().out
    assert sum(seen) == 240 - 95 and [path.name for path in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    monkeypatch.setattr(fit, "LEAST_STEPS", 10)
    monkeypatch.setattr(fit, "PASSES", 0)
    run(*given[:-3], tmp_path / "undisturbed", "-b", 5)
    assert idml.load(out).fingerprint == idml.load(tmp_path / "undisturbed").fingerprint


def test_a_fit_that_fails_leaves_what_was_read(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other layers what was read is of no use, and that is said."""
    given = ["--checkpoint", root / "runs/cls", "--data-dir", root / "photos", "--out", tmp_path / "model"]

    def fails_to_fit(*_given: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(command, "fit_features", fails_to_fit)
        with pytest.raises(MemoryError):
            run(*given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.parts"]
    with monkeypatch.context() as patch:
        patch.setattr(Reading, "features", fails_to_fit)  # every image is there already
        run(*given)
    assert "going on: 240 images were read before" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(command, "fit_features", fails_to_fit)
        with pytest.raises(MemoryError):
            run(*given, "--overwrite")
    run(*given, "--overwrite", "--layers", "backbone.blocks.1")
    said = capsys.readouterr().out
    assert "were of another model or of other images: not used, removed" in said
    assert "looked at backbone.blocks.1 (32), the 64 features: 224 numbers an image" in said


@pytest.mark.slow
def test_two_processes_find_what_one_finds(root: Path, tmp_path: Path) -> None:
    given = ["--checkpoint", root / "runs/cls", "--data-dir", root / "photos", *QUICK, "-b", 8]
    for count, name in ((2, "two"), (1, "one")):
        arguments = ["introspect", *map(str, given), "--out", str(tmp_path / name)]
        done = launch(count, ROOT / "idml" / "__main__.py", *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("read 120 held-out and 120 training images") == 1
    assert idml.load(tmp_path / "two").fingerprint == idml.load(tmp_path / "one").fingerprint


# ---- bad input ----


def test_what_cannot_be_calibrated_is_said_and_marked(root: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    for path in sorted((root / "photos/val").rglob("*.png"))[::2]:
        target = few / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    with pytest.warns(UserWarning, match=r"not calibrated: 60 held-out images, at least 100 are needed"):
        run("--checkpoint", root / "runs/cls", "--data-dir", few, "--out", tmp_path / "few model")
    model = idml.load(root / "runs/cls", device="cpu")
    answers, paths = _answers(model, root / "photos")
    for number, (name, path) in enumerate(zip(answers, paths, strict=True)):
        target = tmp_path / "right" / name / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    with pytest.warns(UserWarning, match=r"not calibrated: 0 of 240 held-out answers are wrong"):
        run("--checkpoint", root / "runs/cls", "--data-dir", tmp_path / "right", "--out", tmp_path / "right model")
    for name in ("few model", "right model"):
        marked = idml.load(tmp_path / name)
        assert marked.calibrated_on == 0 and marked.spec.introspection is not None
        assert marked.spec.introspection["note"] and not marked.spec.introspection["calibrated"]


class NoLayer(nn.Module):
    """Means of the colours for logits."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * self.one  # type: ignore[operator]


class Map(nn.Module):
    """A map where logits should be."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images)


def no_module() -> str:
    return "no module"


def test_models_that_are_none(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    rest = ["--data-dir", root / "photos/val", "--out", out, "--image-size", 32]
    here = "tests.test_introspect_command"
    for name, message in (
        (f"{here}:NoLayer", "NoLayer has no layer to look at"),
        (f"{here}:Map", "expected a network that gives (B, C) logits, got a tensor (2, 3, 32, 32)"),
        (f"{here}:no_module", "does not make a torch.nn.Module: it gives a str"),
        (f"{here}:nothing", f"cannot import {here}:nothing"),
        ("resnet10x", "unknown model 'resnet10x'; did you mean"),
        ("torchvision/resnet17", "torchvision has no classifier 'resnet17'; did you mean"),
        ("keras/resnet", "expected timm/NAME, torchvision/NAME or package.module:function"),
        ("resnet10t", "--weights is missing"),
    ):
        assert message in fails(capsys, "--model", name, *rest), name
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "resnet.pth")
    (tmp_path / "notes.pth").write_text("no weights")
    for name, weights, message in (
        ("resnet10t", "none.pth", "none.pth"),
        ("resnet10t", "notes.pth", "notes.pth"),
        ("mobilenetv3_small_050", "resnet.pth", "does not fit mobilenetv3_small_050"),
        ("torchvision/resnet18", "resnet.pth", "does not fit resnet18"),
    ):
        assert message in fails(capsys, "--model", name, "--weights", tmp_path / weights, *rest), (name, weights)
    assert not list(tmp_path.glob("model*"))


def test_folders_that_do_not_go_with_the_model(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = root / "photos/val/class 0/000.png"
    for name in ("flat/1.png", "tulips/tulip/1.png", "others/x/1.png", "others/y/2.png", "one/class 0/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, tmp_path / name)
    (tmp_path / "empty").mkdir()
    for run_name, folder, message in (
        ("cls", "flat", "no image of"),
        ("cls", "tulips", "tulip"),
        ("cls", "empty", "no images in"),
        ("cls", "nowhere", "no folder"),
        ("cls", "one", "there are no images to introspect with: expected at least two"),
        ("dml", "others", "is of a class that the model was trained on (5: class 0, class 1"),
    ):
        rest = ["--data-dir", tmp_path / folder, "--out", tmp_path / "model"]
        assert message in fails(capsys, "--checkpoint", root / "runs" / run_name, *rest), folder
    assert not list(tmp_path.glob("model*"))


def test_options_that_cannot_be(
    root: Path, introspected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = ["--data-dir", root / "photos"], ["--out", tmp_path / "model"]
    model = ["--checkpoint", root / "runs/cls"]
    assert "expected a model, either --checkpoint" in fails(capsys, *data, *out)
    assert "expected a model, either --checkpoint" in fails(capsys, *model, "--model", "resnet10t", *data, *out)
    assert "--data-dir is missing" in fails(capsys, *model, *out)
    assert "--out is missing" in fails(capsys, *model, *data)
    assert "no model at" in fails(capsys, "--checkpoint", tmp_path / "nowhere", *data, *out)
    for flag, value in (("--max-risk", 0), ("--confidence", 1), ("--coverage", 1.5)):
        message = f"{flag}: expected a number between 0 and 1, got {float(value):g}"
        assert message in fails(capsys, *model, *data, *out, flag, value)
    assert "no module 'layer9'" in fails(capsys, *model, *data, *out, "--layers", "layer9")
    assert "gives no map of the images" in fails(capsys, *model, *data, *out, "--layers", "classifier")
    for text, message in (("a\nb\na\n", "has a more than once"), ("a\n", "has 1 names"), (None, "--classes: ")):
        names = tmp_path / "names.txt"
        names.unlink(missing_ok=True)
        if text is not None:
            names.write_text(text, encoding="utf-8")
        assert message in fails(capsys, "--model", "resnet10t", *data, *out, "--classes", names)
    with pytest.warns(UserWarning, match="--weights has no effect: it says something of --model"):
        fails(capsys, *model, *data, *out, "--weights", "w.pth", "--layers", "layer9")
    assert "exists; give another --out, or --overwrite" in fails(capsys, *model, *data, "--out", introspected)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    error = fails(capsys, *model, *data, "--out", tmp_path / "mine", "--overwrite")
    assert "is a folder, but no exported model" in error
    assert not list(tmp_path.glob("model*")) and (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
