"""The Python in docs/api.md and docs/commands/export.md runs as it is printed, on a model of a few steps."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from idml.commands.export import export
from tests.calibrated_models import write_calibrating_photos
from tests.test_docs import DOCS
from tests.tiny_models import train_tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with runs/clothes, photos/, model.onnx and timm-model/ in it."""
    folder = tmp_path_factory.mktemp("docs")
    write_calibrating_photos(folder / "all")
    train_tiny("live", folder / "all", folder / "runs" / "clothes")
    (folder / "photos").mkdir()
    for number, path in enumerate(sorted((folder / "all" / "val").rglob("*.png"))[:5], 1):
        shutil.copy(path, folder / "photos" / f"{number}.png")
    for kind, name in (("onnx", "model.onnx"), ("timm", "timm-model")):
        export(["--checkpoint", str(folder / "runs/clothes"), "--format", kind, "--out", str(folder / name)])
    for name in ("hubconf.py", "idml", "augment"):
        os.symlink(ROOT / name, folder / name)
    return folder


def run_blocks(page: str) -> list[dict[str, object]]:
    """Run each block of Python of a page; the names that each leaves."""
    blocks = (DOCS / page).read_text(encoding="utf-8").split("```python\n")[1:]
    names: list[dict[str, object]] = []
    for block in blocks:
        names.append({})
        exec(compile(block.split("```")[0], page, "exec"), names[-1])
    return names


def test_the_python_api(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    predicted, embedded, _, judged, scikit, hub = run_blocks("api.md")
    assert capsys.readouterr().out.count("wrong with a probability of") == 2
    assert judged["judged"].classes == ("coat", "bag", "boot") and judged["judged"].calibrated_on == 120  # type: ignore[attr-defined]
    assert np.shape(embedded["similarities"]) == (10, 10) and len(np.unique(embedded["least_sure"])) == 3
    assert predicted["model"].fingerprint == hub["model"].fingerprint  # type: ignore[attr-defined]
    assert scikit["accuracy"] > 0.3 and np.shape(scikit["scores"]) == (200,)  # type: ignore[operator]


def test_the_export_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    onnx, timm = run_blocks("commands/export.md")
    assert str(onnx["name"]).startswith("class ")
    assert 0 <= onnx["wrong"] <= 1 and 0 <= onnx["new"] <= 1  # type: ignore[operator]
    assert timm["model"].network.num_classes == timm["plain"].num_classes == 3  # type: ignore[attr-defined]
