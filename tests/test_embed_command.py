"""python -m idml embed, as it is run: what is in the file, stopped and gone on with, shared out, mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import idml
from idml.commands.embed import embed
from idml.embedding_file import read_table
from idml.embedding_parts import Parts
from tests.one_line import error_of
from tests.test_distributed import launch
from tests.test_train_cls import ROOT
from tests.tiny_models import train_tiny, write_photos, write_searched

QUICK = ["--threads", "1", "--workers", "0", "--no-verbose"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("runs")
    photos, searched = write_photos(base / "photos"), write_searched(base / "searched")
    kinds = {"live": photos, "off": photos, "retrieval live": searched, "retrieval off": searched}
    return {kind: train_tiny(kind, data, base / kind) for kind, data in kinds.items()}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, fashion: dict[str, np.ndarray]) -> Path:
    """300 photos, ``photos/class 3/007.png`` and so on; 60 parts with a batch size of 1."""
    root = tmp_path_factory.mktemp("many") / "photos"
    for number, (image, label) in enumerate(zip(fashion["train_images"], fashion["train_labels"], strict=True)):
        if number == 300:
            break
        folder = root / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return root


def run(*arguments: object) -> None:
    embed([*map(str, arguments), *QUICK])


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    return error_of(capsys, lambda: run(*arguments))


@pytest.mark.parametrize("kind", ["live", "off", "retrieval live", "retrieval off"])
def test_the_file_has_what_the_model_says(
    runs: dict[str, Path], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_photos(tmp_path / "photos", test=2)
    Image.open(next(photos.rglob("*.png"))).save(photos / "alone.png")
    out = tmp_path / "new folder" / "E.parquet"
    run("--checkpoint", runs[kind], "--data-dir", photos, "--out", out)
    assert "embedded 43 images in" in capsys.readouterr().out
    assert list(out.parent.iterdir()) == [out]
    table, model = read_table(out), idml.load(runs[kind])
    assert table.paths == sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    row = table.paths.index("val/class 1/001.png")
    assert (table.splits[row], table.labels[row]) == ("val", "class 1")
    assert (table.splits[0], table.labels[0], table.paths[0]) == (None, None, "alone.png")
    expected = model.embed([Image.open(photos / path) for path in table.paths])
    np.testing.assert_allclose(table.numbers["embedding"], expected.semantic, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(table.numbers["uncertainty"], expected.uncertainty, rtol=1e-4, atol=1e-5)
    about = table.about
    assert (about["fingerprint"], about["score"]) == (model.fingerprint, model.score_name)
    assert about["preprocessing"]["image_size"] == 32 and about["data_dir"] == str(photos)
    introspected = kind in ("live", "retrieval live")
    assert ("uncertainty_embedding" in table.numbers) == introspected
    for name in ("foreseen_loss", "novelty", "coordinates"):
        assert (name in table.numbers) == introspected, name
    assert ("belief" in table.numbers) == (kind == "retrieval live")
    if kind == "retrieval off":
        assert np.isnan(table.numbers["uncertainty"]).all()
    elif introspected:
        np.testing.assert_allclose(
            table.numbers["uncertainty_embedding"], expected.uncertainty_embedding, rtol=1e-3, atol=1e-5
        )
        np.testing.assert_allclose(table.numbers["foreseen_loss"], expected.foreseen_loss, rtol=1e-4)
        np.testing.assert_allclose(table.numbers["novelty"], expected.novelty, atol=2e-3)  # it has steps
        assert expected.coordinates is not None and table.numbers["coordinates"].shape == (43, 128)
        largest = np.abs(expected.coordinates).max()
        np.testing.assert_allclose(table.numbers["coordinates"], expected.coordinates, atol=1e-4 * largest)
        assert about["dimensions"]["coordinates"] == 128
    if kind == "retrieval live":
        np.testing.assert_allclose(table.numbers["belief"], expected.belief, rtol=1e-3, atol=1e-5)
    if kind in ("live", "off"):
        assert table.top_classes is not None
        assert [row[0] for row in table.top_classes] == list(model.predictions_of(expected).classes)
        assert len(table.top_classes[0]) == 3  # as many as there are
        np.testing.assert_allclose(table.numbers["top_probabilities"].sum(1), 1, rtol=1e-5)


def test_what_other_programs_read(runs: dict[str, Path], many: Path, tmp_path: Path) -> None:
    """Vectors of one length, null for what is not known, the description in the file's metadata."""
    out = tmp_path / "E.parquet"
    run("--checkpoint", runs["retrieval off"], "--data-dir", many, "--out", out)
    table = pyarrow.parquet.read_table(out)
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds == {
        "path": "string",
        "split": "string",
        "label": "string",
        "embedding": "fixed_size_list<element: float>[16]",
        "uncertainty": "float",
    }
    assert table["uncertainty"].null_count == len(table) == 300
    assert json.loads(table.schema.metadata[b"idml"])["dimensions"] == {"semantic": 16}


def test_npz_has_the_same(runs: dict[str, Path], many: Path, tmp_path: Path) -> None:
    both = []
    for name in ("E.parquet", "E.npz"):
        run("--checkpoint", runs["live"], "--data-dir", many, "--out", tmp_path / name)
        both.append(read_table(tmp_path / name))
    assert both[0].about == both[1].about and both[0].top_classes == both[1].top_classes
    assert (both[0].paths, both[0].splits, both[0].labels) == (both[1].paths, both[1].splits, both[1].labels)
    assert set(both[0].numbers) == set(both[1].numbers)
    for name, values in both[0].numbers.items():
        np.testing.assert_array_equal(values, both[1].numbers[name])


def test_two_processes_write_what_one_writes(runs: dict[str, Path], many: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", runs["retrieval live"], "--data-dir", many, "-b", 8]
    run(*arguments, "--out", tmp_path / "one.parquet")
    command = ["embed", *map(str, arguments), *QUICK, "--out", str(tmp_path / "two.parquet")]
    done = launch(2, ROOT / "idml" / "__main__.py", *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("embedded 300 images") == 1
    assert (tmp_path / "two.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()
    assert not (tmp_path / "two.parquet.parts").exists()


@pytest.mark.slow
def test_a_mistake_that_one_process_finds_ends_all(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    command = ["embed", "--checkpoint", str(runs["live"]), "--data-dir", "empty", "--out", "E.parquet"]
    done = launch(2, ROOT / "idml" / "__main__.py", *command, cwd=tmp_path)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error (rank")]
    assert errors and all("no images in empty" in line for line in errors), done.stderr


@pytest.fixture(scope="module")
def stopped(runs: dict[str, Path], many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where embed was killed in the middle, by SIGKILL."""
    folder = tmp_path_factory.mktemp("stopped")
    command = [sys.executable, "-m", "idml", "embed", "--checkpoint", str(runs["retrieval live"])]
    command += ["--data-dir", str(many), "--out", str(folder / "E.parquet"), "-b", "1", *QUICK]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(folder.glob("E.parquet.parts/*-*.npz"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "E.parquet").exists()
    return folder


def test_a_killed_command_goes_on(
    runs: dict[str, Path], many: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "again")
    parts = sorted(folder.glob("E.parquet.parts/*-*.npz"))
    assert 5 <= len(parts) < 60
    parts[1].write_bytes(parts[1].read_bytes()[:-100])  # damaged: made anew
    arguments = ["--checkpoint", runs["retrieval live"], "--data-dir", many, "-b", 1]
    run(*arguments, "--out", folder / "E.parquet")
    said = capsys.readouterr().out
    assert f"going on: {5 * (len(parts) - 1)} images were embedded before" in said
    assert "embedded 300 images" in said
    run(*arguments, "--out", tmp_path / "undisturbed.parquet")
    assert (folder / "E.parquet").read_bytes() == (tmp_path / "undisturbed.parquet").read_bytes()
    assert list(folder.iterdir()) == [folder / "E.parquet"]


def test_parts_of_another_model_or_of_other_images_are_not_used(
    runs: dict[str, Path], many: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other_images = shutil.copytree(many, tmp_path / "photos")
    first, second = sorted(other_images.rglob("*.png"))[:2]
    first.write_bytes(second.read_bytes())
    for name, run_directory, data in (("model", runs["retrieval off"], many), ("images", None, other_images)):
        folder = shutil.copytree(stopped, tmp_path / name)
        (folder / "E.parquet.parts" / "notes.txt").write_text("mine")
        checkpoint = run_directory or runs["retrieval live"]
        run("--checkpoint", checkpoint, "--data-dir", data, "-b", 1, "--out", folder / "E.parquet")
        said = capsys.readouterr().out
        assert "of another model or of other images: not used, removed" in said
        assert "going on" not in said
        assert read_table(folder / "E.parquet").about["fingerprint"] == idml.load(checkpoint).fingerprint
        assert [path.name for path in (folder / "E.parquet.parts").iterdir()] == ["notes.txt"]


def test_parts_cover_every_image_once_in_whole_batches() -> None:
    for count, batch in ((1, 64), (64, 64), (65, 64), (100_003, 64), (300, 1), (5000, 7)):
        parts = Parts(Path("E.parquet"), "0" * 16, count, batch)
        assert [index for rows in parts.rows for index in rows] == list(range(count))
        assert all(len(rows) % batch == 0 for rows in parts.rows[:-1])
        assert max(map(len, parts.rows)) <= 16 * batch


def test_an_existing_file_is_kept(
    runs: dict[str, Path], image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "E.parquet"
    out.write_text("precious")
    arguments = ["--checkpoint", runs["live"], "--data-dir", image_folder, "--out", out]
    assert "E.parquet exists; give another --out, or --overwrite" in fails(capsys, *arguments)
    assert out.read_text() == "precious"
    run(*arguments, "--overwrite")
    assert len(read_table(out)) == 48


def test_checkpoints_that_are_none(
    image_folder: Path, tmp_path: Path, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bare, text = tmp_path / "bare.pt", tmp_path / "notes.pt"
    torch.save(torch.load(runs["live"] / "checkpoints/last.pt", weights_only=True)["model"], bare)
    text.write_text("not a checkpoint")
    rest = ["--data-dir", image_folder, "--out", tmp_path / "E.parquet"]
    assert "--checkpoint is missing" in fails(capsys, *rest)
    assert "no model at" in fails(capsys, *rest, "--checkpoint", tmp_path / "nowhere")
    assert "bare.pt" in fails(capsys, *rest, "--checkpoint", bare)
    assert "notes.pt" in fails(capsys, *rest, "--checkpoint", text)
    assert not list(tmp_path.glob("E.parquet*"))


def test_folders_that_cannot_be_embedded(
    runs: dict[str, Path], image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "E.parquet"
    rest = ["--checkpoint", runs["live"], "--out", out]
    assert "no images in" in fails(capsys, *rest, "--data-dir", tmp_path / "empty")
    assert "no folder" in fails(capsys, *rest, "--data-dir", tmp_path / "nowhere")
    (image_folder / "train" / "bag" / "notes.txt").write_text("bags")
    (image_folder / "train" / "bag" / "broken.jpg").write_text("no picture")
    with pytest.warns(UserWarning, match=r"left out 1 file that is no image: 1 \.txt"):
        assert "broken.jpg" in fails(capsys, *rest, "--data-dir", image_folder)
    with pytest.warns(UserWarning, match="left out: 1 of 49 image files cannot be decoded"):
        run(*rest, "--data-dir", image_folder, "--skip-bad-images")
    assert len(read_table(out)) == 48 and "train/bag/broken.jpg" not in read_table(out).paths


def test_outputs_that_cannot_be(
    runs: dict[str, Path], image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--checkpoint", runs["live"], "--data-dir", image_folder]
    assert "--out is missing" in fails(capsys, *rest)
    assert "is a folder" in fails(capsys, *rest, "--out", tmp_path)
    assert "ends in .parquet or .npz" in fails(capsys, *rest, "--out", tmp_path / "E.csv")
    assert "give --out E.npz" in fails(capsys, *rest, "--out", tmp_path / "E.parquet", "--format", "npz")
    (tmp_path / "file").write_text("")
    assert "cannot make the folder" in fails(capsys, *rest, "--out", tmp_path / "file" / "E.parquet")


def test_without_pyarrow_the_extra_is_named(
    runs: dict[str, Path],
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    rest = ["--checkpoint", runs["live"], "--data-dir", image_folder]
    assert "pip install 'idml[search]', or take --format npz" in fails(capsys, *rest, "--out", tmp_path / "E.parquet")
    run(*rest, "--out", tmp_path / "E.npz")
    assert len(read_table(tmp_path / "E.npz")) == 48


def test_without_a_folder_the_images_trained_on(runs: dict[str, Path], tmp_path: Path) -> None:
    run("--checkpoint", runs["live"], "--out", tmp_path / "E.parquet")
    table = read_table(tmp_path / "E.parquet")
    assert len(table) == 60 and set(table.labels) == {"class 0", "class 1", "class 2"}
    assert (Path(table.about["data_dir"]) / table.paths[0]).is_file()
