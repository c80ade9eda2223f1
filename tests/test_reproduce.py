"""`benchmarks/reproduce.py`: figures of pairs, what is reused, the document, and the published rows without data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from idml.errors import UserError
from tests.test_train_cls import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import paired
import reproduce
import reproduce_paper

DOCUMENT = "Before.\n\n{}\nBetween.\n\n{}\nAfter.\n"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/reproduce.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


def document(path: Path, *names: str) -> str:
    text = DOCUMENT.format(*("{}\nold\n{}\n".format(*paired.markers(name)) for name in names))
    path.write_text(text, encoding="utf-8")
    return text


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    ours, plain = {1: 0.81, 2: 0.84, 3: 0.80, 4: 0.83}, {1: 0.80, 2: 0.80, 3: 0.81, 4: 0.79, 5: 0.5}
    differences = paired.paired_differences(ours, plain)
    expected = ttest_rel(list(ours.values()), [plain[seed] for seed in ours]).confidence_interval(0.95)
    found = paired.sample(differences)
    assert found.n == 4
    assert found.half is not None
    np.testing.assert_allclose([found.mean - found.half, found.mean + found.half], expected)
    assert paired.difference_cells(differences)[0] == "+2.0"
    assert paired.difference_cells(differences[:1]) == ["+1.0", "-"]
    assert paired.difference_cells([]) == ["-", "-"]


def test_only_what_stands_between_the_markers_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "results.md"
    document(path, "first", "second")
    paired.write_between(path, "second", "new")
    text = path.read_text(encoding="utf-8")
    begin, end = paired.markers("second")
    assert f"{begin}\n\nnew\n\n{end}\n\nAfter." in text
    assert text.count("old") == 1
    paired.write_between(path, "second", "new")
    assert path.read_text(encoding="utf-8") == text
    with pytest.raises(UserError, match="once each"):
        paired.write_between(path, "third", "new")


def test_every_published_row_has_its_figures() -> None:
    rows = reproduce_paper.published_rows()
    assert len(rows) == 3 * 6 + 3 * 15
    figures = {row: reproduce_paper.published_figures(reproduce_paper.header(row)["Published"]) for row in rows}
    assert figures["cifar100/idml_cutmix"] == {"top-1": 85.65, "top-5": 97.21}
    assert figures["cifar10/baseline"] == {"top-1": 96.15}
    assert figures["sop/idml_proxy_anchor"] == {"R@1": 81.5, "R@10": 92.7, "NMI": 92.3, "RP": 54.8, "MAP@R": 51.3}
    assert all("R@1" in found or "top-1" in found for found in figures.values())


def test_rows_that_were_run_show_the_difference() -> None:
    final = {"top1": 0.8465, "top5": 0.9731}
    rows = {
        "cifar100/idml_cutmix": {"published": {"top-1": 85.65, "top-5": 97.21}, "status": "run", "final": final},
        "cub/idml_ms": {"published": {"R@1": 69.0}, "status": reproduce_paper.NO_DATA},
    }
    text = reproduce_paper.paper_tables(rows, [])
    cells = "top-1 85.65, top-5 97.21 | top-1 84.65, top-5 97.31 | top-1 -1.00, top-5 +0.10"
    assert f"| idml_cutmix | {cells} |" in text
    assert "| idml_ms | R@1 69.0 | not run here: data set not available | - |" in text


def test_without_data_every_row_says_so(tmp_path: Path) -> None:
    docs = tmp_path / "results.md"
    document(docs, "paper", "retrieval")
    done = run(
        *("--data-dir", str(tmp_path / "none"), "--runs", str(tmp_path / "runs")),
        *("--docs", str(docs), "--out", str(tmp_path / "figures.json")),
    )
    assert done.returncode == 0, done.stderr
    text = docs.read_text(encoding="utf-8")
    assert text.count("not run here: data set not available") == 63
    assert text.count("old") == 1
    stored = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["paper"]
    assert stored["rows"]["cub/idml_ms"]["status"] == "not run here: data set not available"
    assert "CUB_200_2011" in stored["rows"]["cub/idml_ms"]["reason"]
    assert {"hardware", "versions", "commit", "command"} < set(stored)


def test_mistakes_are_reported_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (["--rows", "cub/idml_mss"], "no published row cub/idml_mss; did you mean cub/idml_ms"),
        (["--processes", "0"], "--processes: expected at least 1, got 0"),
        (["--docs", str(tmp_path / "no.md")], "--docs: there is no file"),
    ):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments, "--runs", str(tmp_path / "runs")])
        with pytest.raises(UserError, match=re.escape(message)):
            reproduce.main()
    assert not list(tmp_path.iterdir())
