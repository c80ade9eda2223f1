"""Benchmarks in their quick form: that they run, and what they store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from augment import SHIFTS
from idml.scores import FORESIGHT_SCORES, FREE_SCORES, ISM_SCORES
from tests.test_train_cls import ROOT


@pytest.mark.slow
def test_the_uncertainty_benchmark(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks/uncertainty.py"), "--quick", "--processes", "1"]
    command += ["--methods", "baseline", "ism", "ism + foresight", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "figures-quick.json").read_text(encoding="utf-8"))
    rows = stored["fashion-mnist"]["rows"]
    assert list(rows["baseline"][0]["scores"]) == list(FREE_SCORES)
    assert list(rows["ism"][0]["scores"]) == [*FREE_SCORES, *ISM_SCORES]
    assert list(rows["ism + foresight"][0]["scores"]) == [*FREE_SCORES, *ISM_SCORES, *FORESIGHT_SCORES]
    chance = rows["baseline"][0]["scores"]["random"]
    assert all(0.4 < chance[name] < 0.6 for name in ("error_auroc", *SHIFTS, "other set"))
    assert rows["baseline"][0]["run"]["top1"] < 1
    assert set(stored["digits"]["rows"]) == {"baseline", "ism + foresight"}
    found = stored["retrieval"]["rows"]
    free = {"1 - top similarity", "gap to the second", "-|feature|", "random"}
    assert set(found["ProxyAnchor live"][0]["scores"]) == free | {"|u|"}
    own = found["ProxyAnchor live + foresight"][0]["scores"]
    assert set(own) == free | {"foreseen loss", "belief apart", "P(wrong)"}
    less = stored["retrieval"]["differences"]["ProxyAnchor live + foresight"]["R@1, less that of ProxyAnchor off"]
    runs = [found[name][0]["run"]["R@1"] for name in ("ProxyAnchor live + foresight", "ProxyAnchor off")]
    assert less == [runs[0] - runs[1]]
    assert "| ism + foresight |" in done.stdout and "| ProxyAnchor live |" in done.stdout
