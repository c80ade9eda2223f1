"""The benchmarks against other loaders and scripts, in their quick form: that they run, and what they store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_train_cls import ROOT


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--quick", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)


def parts(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))["parts"]


@pytest.mark.slow
def test_the_loader_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    out = tmp_path / "loader.json"
    done = run("bench_loader.py", "--workers", "1", "--images", "256", "--out", str(out))
    assert done.returncode == 0, done.stderr
    for part in ("cifar", "jpeg"):
        rows = parts(out)[part]["1 workers"]["rows"]
        assert {"torchvision", "timm", "ours, torch", "ours, FFCV"} < set(rows)
        assert all(256 - 128 <= row["images"] <= 256 for row in rows.values())
        assert all(row["cpu_seconds_per_image"] > 0 for row in rows.values())
        assert rows["torchvision"]["times_as_fast_as"]["torchvision"]["ratio"] == 1
    assert {"hardware", "versions", "commit", "command"} < set(parts(out)["jpeg"])


@pytest.mark.slow
def test_the_training_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    out = tmp_path / "train.json"
    done = run("bench_train.py", "--parts", "loading", "startup", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = parts(out)["loading"]["rows"]
    assert all(row["runs"][0]["steps"] >= 3 for row in rows.values())
    ours, bare = rows["ours, FFCV, in memory"], rows["bare loop, in memory"]
    ratio = ours["images_per_second"] / bare["images_per_second"]
    assert ours["times_the_fastest_peer"] == pytest.approx(ratio)
    startup = parts(out)["startup"]["rows"]
    assert all(0 < row["first"] < row["second"] <= row["whole"] for row in startup.values())
    assert "ours, FFCV, PNG files, empty caches" in startup


def test_a_peer_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    done = run("bench_train.py", "--timm", str(tmp_path))
    assert done.returncode == 2
    assert f"--timm: expected the folder that has train.py, got {tmp_path}" in done.stderr
