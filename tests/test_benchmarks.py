"""Benchmarks in their quick form: that they run, and what they store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from augment import SHIFTS
from idml.scores import FREE_SCORES, ISM_SCORES
from tests.test_train_cls import ROOT


@pytest.mark.slow
def test_the_uncertainty_benchmark(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks/uncertainty.py"), "--quick", "--processes", "1"]
    command += ["--methods", "baseline", "idml-cutmix", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "figures-quick.json").read_text(encoding="utf-8"))
    rows = stored["classification"]["rows"]
    assert list(rows["baseline"][0]["scores"]) == list(FREE_SCORES)
    assert list(rows["idml-cutmix"][0]["scores"]) == [*FREE_SCORES, *ISM_SCORES]
    chance = rows["baseline"][0]["scores"]["random"]
    assert all(0.4 < chance[name] < 0.6 for name in ("error_auroc", *SHIFTS, "other set"))
    assert rows["baseline"][0]["run"]["top1"] < 1
    found = stored["retrieval"]["rows"]["ProxyAnchor live"][0]["scores"]
    assert set(found) == {"1 - top similarity", "-|feature|", "random", "|u|"}
    assert "| idml-cutmix |" in done.stdout and "| ProxyAnchor live |" in done.stdout
