"""``python -m idml evaluate``: a run's own figures again, other folders, and what cannot be evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import idml
import train_dml
from idml.commands.evaluate import evaluate
from idml.commands.export import export
from idml.data.image_dataset import read_rgb
from idml.errors import UserError
from idml.evaluating import of_training, retrieval_figures
from tests.tiny_models import train_tiny, write_photos, write_searched


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/, searched/, runs/live, runs/off, runs/retrieval."""
    root = tmp_path_factory.mktemp("evaluate")
    write_photos(root / "photos")
    write_searched(root / "searched")
    for kind in ("live", "off"):
        train_tiny(kind, root / "photos", root / "runs" / kind)
    train_tiny("retrieval live", root / "searched/photos", root / "runs" / "retrieval")
    return root


def figures_of(run: Path, out: Path, *options: str) -> dict[str, Any]:
    evaluate(["--checkpoint", str(run), "--out", str(out), "--threads", "1", "--workers", "0", *options])
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["live", "off", "retrieval"])
def test_a_runs_own_figures_come_out(root: Path, tmp_path: Path, name: str) -> None:
    run = root / "runs" / name
    final = json.loads((run / "results.json").read_text(encoding="utf-8"))["final"]
    figures = figures_of(run, tmp_path / "metrics.json")
    of_the_test = {"top1", "loss", "nll", "ece", "error_auroc", "e_aurc", "error_ece", "R@1", "R@8", "RP", "MAP@R"}
    of_the_test |= {"R-AUROC uncertainty", "R-AUROC search", "R-AUROC similarity", "R-AUROC norm"}
    compared = of_the_test & set(final)
    assert len(compared) >= 4
    for key in compared:
        assert figures[key] == pytest.approx(final[key], abs=1e-5), key
    assert figures["images"] == (30 if name == "retrieval" else 24)
    assert figures["fingerprint"] == idml.load(run, device="cpu").fingerprint


def test_the_scores_by_hand(root: Path, tmp_path: Path) -> None:
    """Error AUROC by scikit-learn from what ``predict`` says of the files."""
    model = idml.load(root / "runs" / "live", device="cpu")
    paths = sorted((root / "photos" / "val").rglob("*.png"))
    found = model.predict([read_rgb(path) for path in paths])
    wrong = np.array([path.parent.name != name for path, name in zip(paths, found.classes, strict=True)])
    figures = figures_of(root / "runs" / "live", tmp_path / "a.json", "--data-dir", str(root / "photos"))
    assert figures["of"] == f"val images of {root / 'photos'}"
    assert figures["top1"] == pytest.approx(1 - wrong.mean(), abs=1e-6)
    assert 0 < wrong.sum() < len(wrong)
    assert found.p_wrong is not None
    for name, score in (("P(wrong)", found.p_wrong), ("1 - max softmax", 1 - found.confidence)):
        assert figures["scores"][name]["error_auroc"] == pytest.approx(roc_auc_score(wrong, score), abs=1e-6)
        assert set(figures["scores"][name]) == {"error_auroc", "aurc", "e_aurc"}
    assert figures["score"]["name"] == "P(wrong)" and next(iter(figures["scores"])) == "P(wrong)"


def test_an_exported_model_has_the_same_figures(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    export(["--checkpoint", str(root / "runs" / "live"), "--format", "timm", "--out", str(out)])
    options = ("--data-dir", str(root / "photos"))
    first = figures_of(root / "runs" / "live", tmp_path / "a.json", *options)
    second = figures_of(out, tmp_path / "b.json", *options)
    assert first | {"checkpoint": ""} == second | {"checkpoint": ""}
    with pytest.raises(UserError, match="does not say what it was trained on: give --data-dir"):
        figures_of(out, tmp_path / "c.json")


def test_splits_of_a_folder(root: Path, tmp_path: Path) -> None:
    run, options = root / "runs" / "off", ("--data-dir", str(root / "photos"))
    assert figures_of(run, tmp_path / "a.json", *options, "--split", "train")["images"] == 36
    assert figures_of(run, tmp_path / "b.json", *options)["images"] == 24
    with pytest.raises(UserError, match=r"--split tst: .* has train, val"):
        figures_of(run, tmp_path / "c.json", *options, "--split", "tst")
    flat = ("--data-dir", str(root / "photos" / "train"))
    assert figures_of(run, tmp_path / "d.json", *flat)["images"] == 36


def test_a_query_and_a_gallery(root: Path, tmp_path: Path) -> None:
    """By hand: which gallery image is nearest."""
    folder = tmp_path / "shop"
    for split, number in (("query", 0), ("gallery", 1), ("gallery", 2)):
        for label in range(6):
            source = root / f"searched/photos/class {label}/{number:03d}.png"
            target = folder / split / f"class {label}" / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    figures = figures_of(root / "runs" / "retrieval", tmp_path / "a.json", "--data-dir", str(folder), "--ks", "1", "3")
    model = idml.load(root / "runs" / "retrieval", device="cpu")
    query, gallery = (sorted((folder / split).rglob("*.png")) for split in ("query", "gallery"))
    vectors = [model.embed([read_rgb(path) for path in paths]).semantic for paths in (query, gallery)]
    order = np.argsort(-(vectors[0] @ vectors[1].T), axis=1)
    right = np.array(
        [[gallery[i].parent.name == path.parent.name for i in row] for path, row in zip(query, order, strict=True)]
    )
    assert figures["images"] == 6 and {"R@1", "R@3", "NMI"} <= set(figures) and "R@2" not in figures
    assert figures["R@1"] == pytest.approx(right[:, 0].mean())
    assert figures["R@3"] == pytest.approx(right[:, :3].any(1).mean())


def test_k_is_capped_only_where_it_was_not_asked_for(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "few"
    for label in range(2):
        shutil.copytree(root / f"photos/val/class {label}", folder / f"class {label}")
    for path in sorted(folder.rglob("*.png")):
        if path.stem > "001":
            path.unlink()
    run, options = root / "runs" / "retrieval", ("--data-dir", str(folder))
    assert {"R@1", "R@2"} == {key for key in figures_of(run, tmp_path / "a.json", *options) if key.startswith("R@")}
    with pytest.raises(UserError, match=r"--ks: expected values between 1 and 3.*got \[8\]"):
        figures_of(run, tmp_path / "b.json", *options, "--ks", "8")


def test_folders_that_have_no_figures(root: Path, tmp_path: Path) -> None:
    photo = root / "photos/val/class 0/000.png"
    flat, other, lone = tmp_path / "flat", tmp_path / "other", tmp_path / "lone"
    for folder, name in ((flat, "1.png"), (other, "tulip/1.png"), (lone, "a/1.png"), (lone, "b/1.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder / name)
    live, retrieval = root / "runs" / "live", root / "runs" / "retrieval"
    for run, folder, message in (
        (live, flat, "no image of .* has a label: figures need class folders"),
        (live, other, "has 1 classes that the model was not trained on: tulip; it knows 3: class 0"),
        (retrieval, lone, "no class has two images"),
        (live, tmp_path / "none", "no folder"),
    ):
        with pytest.raises(UserError, match=message):
            figures_of(run, tmp_path / "a.json", "--data-dir", str(folder))
    (lone / "class 0").mkdir()
    (lone / "class 0" / "2.png").write_bytes(photo.read_bytes()[:100])
    with pytest.raises(UserError, match=r"2\.png"):
        figures_of(live, tmp_path / "a.json", "--data-dir", str(lone))


def test_images_without_a_label_are_left_out_with_a_warning(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(root / "photos" / "val", folder)
    shutil.copy(folder / "class 0/000.png", folder / "stray.png")
    with pytest.warns(UserWarning, match="1 images have no label"):
        assert figures_of(root / "runs" / "live", tmp_path / "a.json", "--data-dir", str(folder))["images"] == 24


def test_all_answers_right(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Figures that cannot be are null in the file and a dash on the screen."""
    model = idml.load(root / "runs" / "live", device="cpu")
    paths = sorted((root / "photos").rglob("*.png"))
    found = model.predict([read_rgb(path) for path in paths])
    for number, (path, name) in enumerate(zip(paths, found.classes, strict=True)):
        target = tmp_path / "right" / name / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    figures = figures_of(root / "runs" / "live", tmp_path / "a.json", "--data-dir", str(tmp_path / "right"))
    assert figures["top1"] == 1 and figures["error_auroc"] is None
    assert figures["scores"]["P(wrong)"] == {"error_auroc": None, "aurc": 0, "e_aurc": 0}
    assert " - " in capsys.readouterr().out


def test_options_without_effect_warn(root: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has no effect") as caught:
        figures_of(root / "runs" / "live", tmp_path / "a.json", "--ks", "1", "--no-nmi", "--split", "test")
    told = " ".join(str(warning.message) for warning in caught)
    assert all(f"{flag} has no effect" in told for flag in ("--ks", "--no-nmi", "--split"))


def test_a_file_is_not_replaced_unasked(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "metrics.json"
    out.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="exists; give another --out, or --overwrite"):
        figures_of(root / "runs" / "off", out)
    assert out.read_text(encoding="utf-8") == "mine"
    assert figures_of(root / "runs" / "off", out, "--overwrite")["images"] == 24


def test_data_that_have_moved(root: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(root / "runs/live/checkpoints/last.pt", weights_only=True)
    checkpoint["config"]["data_dir"] = str(tmp_path / "gone")
    torch.save(checkpoint, tmp_path / "moved.pt")
    with pytest.raises(UserError, match="gone"):
        figures_of(tmp_path / "moved.pt", tmp_path / "a.json")


@pytest.mark.slow
def test_families_and_clusters_of_the_emoji(tmp_path: Path) -> None:
    """The whole of a retrieval run's figures, on images in memory."""
    options = ["--dataset", "emoji-mini", "--model", "resnet8_cifar", "--image-size", "32", "--max-steps", "3"]
    options += ["--embedding-size", "32", "--warm", "0", "--no-verbose", "--threads", "1"]
    train_dml.main([*options, "--output-dir", str(tmp_path / "run")])
    final = json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))["final"]
    model = idml.load(tmp_path / "run", device="cpu")
    config = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["config"]
    tested = of_training(config)
    figures = retrieval_figures(model, tested, ks=None, nmi=True, batch_size=64, workers=0, verbose=False)
    for key in ("R@1", "MAP@R", "NMI", "F1", "other_families/R@1", "R-AUROC uncertainty"):
        assert figures[key] == pytest.approx(final[key], abs=2e-3), key
    with pytest.raises(UserError, match="expected K of at most"):
        retrieval_figures(model, tested, ks=[1679], nmi=False, batch_size=64, workers=0, verbose=False)
    assert Image.fromarray(tested.dataset.images[0]).size == (32, 32)
