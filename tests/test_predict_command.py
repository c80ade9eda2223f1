"""``python -m idml predict``, as it is run: what is in the file, pipes, stopped and resumed, mistakes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import idml
import train_cls
from idml.commands import predict as command
from idml.commands.predict import predict
from idml.data.names import printable
from idml.prediction_file import COLUMNS
from idml.trained import TrainedModel
from tests.calibrated_models import write_calibrating_photos
from tests.one_line import error_of
from tests.test_distributed import launch
from tests.test_train_cls import ROOT
from tests.tiny_models import train_tiny, write_searched

QUICK = ["--threads", "1", "--workers", "0", "--no-verbose"]
PROMISES = ["--max-risk", "0.1", "--coverage", "0.9"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``photos/val``: 24 images; ``runs/{good, plain, dml}``: a classifier that promises something, and others."""
    root = tmp_path_factory.mktemp("predict")
    options = ["--dataset", "folder", "--data-dir", str(write_calibrating_photos(root / "photos")), "--epochs", "3"]
    options += ["--model", "resnet8_cifar", "--image-size", "28", "--batch-size", "16", "--val-fraction", "0.3"]
    options += ["--method", "baseline", "--schedule", "onecycle", "--lr", "0.1", "--loader", "torch", *QUICK]
    train_cls.main([*options, "--output-dir", str(root / "runs/good")])
    train_tiny("off", root / "photos", root / "runs/plain")
    train_tiny("retrieval off", write_searched(root / "searched"), root / "runs/dml")
    return root


@pytest.fixture(scope="module")
def model(root: Path) -> idml.TrainedModel:
    return idml.load(root / "runs/good", device="cpu")


def run(*arguments: object) -> None:
    predict([*map(str, arguments), *QUICK])


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    return error_of(capsys, lambda: run(*arguments))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def given(root: Path) -> list[object]:
    return ["--checkpoint", root / "runs/good", "--data-dir", root / "photos/val"]


def test_the_file_has_what_the_model_says(
    root: Path, model: idml.TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "P.csv"
    run(*given(root), "--out", out, *PROMISES)
    said = capsys.readouterr().out
    rows = rows_of(out)
    assert [path.name for path in out.parent.iterdir()] == ["P.csv"] and tuple(rows[0]) == COLUMNS
    paths = sorted((root / "photos/val").rglob("*.png"))
    assert [row["path"] for row in rows] == [str(path.relative_to(root / "photos/val")) for path in paths]
    found = model.predict([Image.open(path) for path in paths], max_risk=0.1, coverage=0.9)
    assert [row["class"] for row in rows] == list(found.classes)
    for name, values, least in (
        ("confidence", found.confidence, 1e-5),
        ("p_wrong", found.p_wrong, 1e-4),
        ("novelty", found.novelty, 2e-3),
    ):
        assert values is not None
        np.testing.assert_allclose([float(row[name]) for row in rows], values, atol=least, err_msg=name)
    assert found.answered is not None and found.sets is not None and found.p_wrong is not None
    assert [row["decision"] == "answer" for row in rows] == found.answered.tolist()
    assert {row["decision"] for row in rows} == {"answer", "refuse"}, "the test is of both"
    for row, named, probabilities in zip(rows, found.sets, found.probabilities, strict=True):
        order = [label for label in np.argsort(-probabilities) if named[label]]
        assert row["classes"].split("|") == [model.classes[label] for label in order]
        assert row["classes"].split("|")[0] == row["class"]
    assert "predicted 24 images in" in said and f"{found.answered.mean():.1%} answered at a risk of 0.1: {out}" in said


def test_three_formats_have_the_same(root: Path, tmp_path: Path) -> None:
    for name in ("P.csv", "P.parquet", "P.jsonl"):
        run(*given(root), "--out", tmp_path / name, *PROMISES)
    table = pyarrow.parquet.read_table(tmp_path / "P.parquet")
    assert {field.name: str(field.type) for field in table.schema} == {
        "path": "string",
        "class": "string",
        "confidence": "float",
        "p_wrong": "float",
        "novelty": "float",
        "decision": "string",
        "classes": "list<element: string>",
    }
    lines = [json.loads(line) for line in (tmp_path / "P.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 24
    for row, line, cells in zip(table.to_pylist(), lines, rows_of(tmp_path / "P.csv"), strict=True):
        for name in ("confidence", "p_wrong", "novelty"):
            assert np.float32(line[name]) == np.float32(row[name]) == np.float32(cells[name])
        for name in ("path", "class", "decision"):
            assert row[name] == line[name] == cells[name]
        assert row["classes"] == line["classes"] == cells["classes"].split("|")


def test_what_was_not_asked_for_is_empty(root: Path, tmp_path: Path) -> None:
    run(*given(root), "--out", tmp_path / "P.csv")
    assert {(row["decision"], row["classes"]) for row in rows_of(tmp_path / "P.csv")} == {("", "")}
    run(*given(root), "--out", tmp_path / "P.jsonl")
    line = json.loads((tmp_path / "P.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert line["decision"] is None and line["classes"] is None and line["novelty"] is not None


def test_a_pipe_gets_the_same(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(*given(root), "--out", tmp_path / "P.csv", *PROMISES)
    capsys.readouterr()
    run(*given(root), "--out", "-", *PROMISES)
    assert capsys.readouterr().out.splitlines() == (tmp_path / "P.csv").read_text(encoding="utf-8").splitlines()


def test_a_pipe_is_written_while_it_goes_on_and_may_end_early(root: Path) -> None:
    """The first line is there while the command still runs; a reader that has enough ends it without a word."""
    arguments = [sys.executable, "-m", "idml", "predict", *map(str, given(root)), "--out", "-", "-b", "1", *QUICK]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True, bufsize=1
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == ",".join(COLUMNS) + "\n"
        assert process.stdout.readline().startswith("class 0/000.png,")
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(timeout=120) in (0, 141) and error == "", error


def test_files_in_place_of_a_folder(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = sorted((root / "photos/val").rglob("*.png"))[:2]
    model = ["--checkpoint", root / "runs/good"]
    run(first, *model, second, "--out", tmp_path / "a.csv")
    for number, files in enumerate((["--files", first, second], [f"--files={first}", second])):
        run(*model, "--out", tmp_path / f"b{number}.csv", *files)
        assert (tmp_path / "a.csv").read_text() == (tmp_path / f"b{number}.csv").read_text()
    assert [row["path"] for row in rows_of(tmp_path / "a.csv")] == [str(first), str(second)]
    out = ["--out", tmp_path / "c.csv"]
    assert "expected a folder (--data-dir) or files, got both" in fails(capsys, *given(root), first, *out)
    assert "no image" in fails(capsys, *model, root / "photos/val/class 0/0000.png", *out)
    assert "is a folder: give it as --data-dir" in fails(capsys, *model, root / "photos/val", *out)
    (tmp_path / "broken.png").write_text("no picture")
    assert "broken.png" in fails(capsys, *model, first, tmp_path / "broken.png", *out)
    with pytest.warns(UserWarning, match="1 of 2 image files cannot be decoded"):
        run(*model, first, tmp_path / "broken.png", "--skip-bad-images", *out)
    assert len(rows_of(tmp_path / "c.csv")) == 1


def test_a_stopped_command_resumes(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*given(root), "--out", tmp_path / "P.csv", "-b", 2]
    outputs, count = TrainedModel.outputs, 0

    def stops(self: TrainedModel, images: Any) -> Any:
        nonlocal count
        count += len(images)
        if count > 12:
            raise KeyboardInterrupt
        return outputs(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(TrainedModel, "outputs", stops)
        with pytest.raises(KeyboardInterrupt):
            run(*arguments)
    assert len(list(tmp_path.glob("P.csv.parts/*.npz"))) == 6 and not (tmp_path / "P.csv").exists()
    seen: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            TrainedModel, "outputs", lambda self, images: (seen.append(len(images)), outputs(self, images))[1]
        )
        run(*arguments)
    said = capsys.readouterr().out
    assert "going on: 12 images were predicted before" in said and "predicted 24 images (12 of them before)" in said
    assert sum(seen) == 12 and [path.name for path in tmp_path.iterdir()] == ["P.csv"]
    run(*given(root), "--out", tmp_path / "undisturbed.csv", "-b", 2)
    assert (tmp_path / "P.csv").read_bytes() == (tmp_path / "undisturbed.csv").read_bytes()


def test_another_risk_needs_no_other_pass(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts do not depend on the risk; a disk that is full leaves them."""

    def full(*_given: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(command, "write_rows", full)
        with pytest.raises(OSError, match="No space"):
            run(*given(root), "--out", tmp_path / "P.csv")
    with monkeypatch.context() as patch:
        patch.setattr(TrainedModel, "outputs", full)
        run(*given(root), "--out", tmp_path / "P.csv", "--max-risk", 0.1)
    assert "going on: 24 images were predicted before" in capsys.readouterr().out
    assert {row["decision"] for row in rows_of(tmp_path / "P.csv")} == {"answer", "refuse"}


@pytest.mark.slow
def test_two_processes_write_what_one_writes(root: Path, tmp_path: Path) -> None:
    run(*given(root), "--out", tmp_path / "one.csv", "-b", 2, *PROMISES)
    arguments = ["predict", *map(str, given(root)), "--out", str(tmp_path / "two.csv"), "-b", "2", *PROMISES, *QUICK]
    done = launch(2, ROOT / "idml" / "__main__.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    done = launch(2, ROOT / "idml" / "__main__.py", *arguments[:3], *arguments[3:5], "--out", "-")
    assert done.returncode != 0 and "--out - is one stream, of one process" in done.stderr


def test_a_model_without_an_introspection(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--checkpoint", root / "runs/plain", "--data-dir", root / "photos/val"]
    with pytest.warns(UserWarning, match=r"has no introspection: p_wrong and novelty stay empty.*idml introspect"):
        run(*rest, "--out", tmp_path / "P.csv")
    rows = rows_of(tmp_path / "P.csv")
    assert {(row["p_wrong"], row["novelty"], row["decision"]) for row in rows} == {("", "", "")}
    assert all(0 < float(row["confidence"]) <= 1 for row in rows)
    out = ["--out", tmp_path / "Q.csv"]
    for promise in (["--max-risk", 0.1], ["--coverage", 0.9]):
        assert "can promise nothing: it has no introspection" in fails(capsys, *rest, *out, *promise)
    dml = ["--checkpoint", root / "runs/dml", "--data-dir", root / "photos/val"]
    assert "is a retrieval model: it has no classes to predict" in fails(capsys, *dml, *out)
    assert [path.name for path in tmp_path.iterdir()] == ["P.csv"]


def test_promises_that_cannot_be_given(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = [*given(root), "--out", tmp_path / "P.csv"]
    error = fails(capsys, *rest, "--max-risk", 0.0001)
    assert "a risk of 0.0001 cannot be promised with confidence 0.95 by 108 held-out images: allow" in error
    assert "a coverage of 0.999 cannot be promised by 108 held-out images" in fails(capsys, *rest, "--coverage", 0.999)
    for flag, value in (("--max-risk", 1), ("--max-risk", -0.1), ("--confidence", 0), ("--coverage", 90)):
        message = f"{flag}: expected a number between 0 and 1, got {float(value):g}"
        assert message in fails(capsys, *rest, flag, value), flag
    assert list(tmp_path.iterdir()) == []
    with pytest.warns(UserWarning, match="--confidence has no effect without --max-risk"):
        run(*rest, "--confidence", 0.9)


def test_a_higher_confidence_answers_no_more(
    root: Path, model: idml.TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*given(root), "--out", tmp_path / "P.csv", "--max-risk", 0.1, "--confidence", 0.5)
    bold, usual = (model.thresholds(0.1, confidence, None)[0] for confidence in (0.5, 0.95))
    assert bold is not None and usual is not None and bold > usual
    rows = rows_of(tmp_path / "P.csv")
    assert [row["decision"] == "answer" for row in rows] == [float(row["p_wrong"]) <= bold for row in rows]
    error = fails(capsys, *given(root), "--out", tmp_path / "Q.csv", "--max-risk", 0.1, "--confidence", 0.9999)
    assert "cannot be promised with confidence 0.9999" in error


def test_outputs_that_cannot_be(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--out is missing" in fails(capsys, *given(root))
    assert "--checkpoint is missing" in fails(capsys, "--data-dir", root / "photos", "--out", tmp_path / "P.csv")
    for name in ("P.txt", "P", "P.npz"):
        assert "that ends in .csv, .parquet or .jsonl, or -" in fails(capsys, *given(root), "--out", tmp_path / name)
    (tmp_path / "P.csv").write_text("precious")
    assert "P.csv exists; give another --out, or --overwrite" in fails(
        capsys, *given(root), "--out", tmp_path / "P.csv"
    )
    assert (tmp_path / "P.csv").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    rest = ["--checkpoint", root / "runs/good", "--out", tmp_path / "Q.csv"]
    assert "no images in" in fails(capsys, *rest, "--data-dir", tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'idml[search]'" in fails(capsys, *given(root), "--out", tmp_path / "P.parquet")
    run(*given(root), "--out", tmp_path / "P.csv", "--overwrite")
    assert len(rows_of(tmp_path / "P.csv")) == 24
    assert sorted(path.name for path in tmp_path.iterdir()) == ["P.csv", "empty"]


def test_names_that_need_care(root: Path, tmp_path: Path) -> None:
    """Commas, quotes and line breaks in names of files, the last as everywhere; a folder without classes."""
    names = ['a "b", c.png', "line\nbreak.png", "=1+1.png"]
    source = next((root / "photos/val").rglob("*.png"))
    (tmp_path / "odd").mkdir()
    for name in names:
        shutil.copy(source, tmp_path / "odd" / name)
    run("--checkpoint", root / "runs/good", "--data-dir", tmp_path / "odd", "--out", tmp_path / "P.csv")
    assert sorted(row["path"] for row in rows_of(tmp_path / "P.csv")) == sorted(map(printable, names))
