"""docs/: the Python in it runs as it is printed, links lead somewhere, the site is built, tutorial and notebook run."""

from __future__ import annotations

import csv
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from idml import introspective_distance, introspective_similarity
from idml.config_cls import parse_cls_config
from idml.config_dml import parse_dml_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md"), *DOCS.glob("*.ipynb")])

MACHINE_PATHS = re.compile(r"/(?:tmp|work|home|root|Users|usr)/")


def run_blocks(page: str) -> list[dict[str, Any]]:
    """Run each block of Python of a page; the names that each leaves."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    names: list[dict[str, Any]] = []
    for block in blocks:
        names.append({})
        exec(compile(block, page, "exec"), names[-1])
    return names


def test_the_retrieval_page() -> None:
    torch.manual_seed(0)
    loss, figures = run_blocks("retrieval.md")
    assert torch.isfinite(loss["loss"]) and loss["rows"].shape == (8, 256)
    loss["loss"].backward()
    assert loss["model"].uncertainty_head.weight.grad.abs().sum() > 0
    assert {"R@1", "R@10", "NMI"} <= set(figures["figures"])


def test_the_uncertainty_page() -> None:
    torch.manual_seed(0)
    (names,) = run_blocks("uncertainty.md")
    found = names["found"]
    assert names["model"].calibrated_on == 600 and len(found) == 1197
    assert 0 <= found.p_wrong.min() <= found.p_wrong.max() <= 1 and 0.3 < found.novelty.mean() < 0.7
    labels = names["digits"].target[600:]
    assert 0.86 < found.sets[np.arange(1197), labels].mean() < 0.95, "nine in ten sets hold the true class"


@pytest.mark.parametrize("part", ["errors", "novelty", "near", "promise", "labels", "memorised"])
def test_where_the_benchmark_writes(part: str) -> None:
    """benchmarks/introspection.py finds a place for each of its tables, once, and in order."""
    text = (DOCS / "uncertainty.md").read_text(encoding="utf-8")
    begin, end = f"<!-- {part}: written by benchmarks/introspection.py -->", f"<!-- {part}: end -->"
    assert text.count(begin) == text.count(end) == 1 and text.index(begin) < text.index(end)


def test_how_ism_works() -> None:
    (names,) = run_blocks("how-ism-works.md")
    assert names["plain"].item() == pytest.approx(0.2, abs=1e-7)
    assert names["unsure"].item() == pytest.approx(0.706, abs=5e-4)
    assert names["nothing"].item() == 1
    assert torch.isfinite(names["same"].grad)


def test_the_table_of_gradients() -> None:
    """Of ``how-ism-works.md``, against what autograd makes of the formula."""
    alpha = torch.linspace(0.05, 3.9, 50, dtype=torch.float64)
    for beta in (0.1, 1.0, 7.0):
        sim, b = (1 - alpha / 2).requires_grad_(), torch.full_like(alpha, beta, requires_grad=True)
        introspective_similarity(sim, 2 - 2 * sim, b).sum().backward()
        z = beta / (5 * alpha)
        torch.testing.assert_close(sim.grad, torch.exp(-z) * (1 + z))
        torch.testing.assert_close(b.grad, torch.exp(-z) / 10)
        assert (sim.grad <= 1).all()
        distance = alpha.sqrt().requires_grad_()
        introspective_distance(distance, torch.full_like(alpha, beta)).sum().backward()
        torch.testing.assert_close(distance.grad, torch.exp(-z) * (1 + 2 * z))
        assert distance.grad.max() <= 1.2131


def test_from_pytorch_metric_learning() -> None:
    torch.manual_seed(0)
    losses, figures = run_blocks("from-pytorch-metric-learning.md")
    losses["introspective"].backward()
    assert losses["rows"].shape == (8, 256) and torch.isfinite(losses["plain"])
    assert losses["model"].uncertainty_head.weight.grad.abs().sum() > 0
    assert figures["after"]["RP"] > 0


def test_from_timm_cutmix_and_proxyanchor() -> None:
    torch.manual_seed(0)
    for page in ("from-timm.md", "from-cutmix-pytorch.md"):
        (names,) = run_blocks(page)
        names["loss"].backward()
        assert names["model"].uncertainty_head.weight.grad.abs().sum() > 0, page
    (names,) = run_blocks("from-proxyanchor.md")
    assert torch.isfinite(names["loss"]) and names["criterion"].proxies.grad.abs().sum() > 0


@pytest.mark.parametrize("page", ["from-cutmix-pytorch.md", "from-proxyanchor.md", "from-timm.md"])
def test_command_lines_of_the_pages_on_moving_here(page: str) -> None:
    """Each is taken as it stands, without a warning."""
    text = (DOCS / page).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    python train_(cls|dml)\.py (.*)$", text, re.MULTILINE)
    assert lines
    for script, line in lines:
        parse: Any = parse_cls_config if script == "cls" else parse_dml_config
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            config, _ = parse(line.split(), description="")
        assert config.ism in ("live", "released", "off") and config.batch_size > 0


def text_of(page: Path) -> str:
    """A page without its code; of a notebook, the cells of text."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        nbformat = pytest.importorskip("nbformat")
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.sub(r"^(`{3,})[^\n]*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What code hosts call the headings of a page: lower case, hyphens for spaces, no other marks."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text_of(page), re.MULTILINE):
        name = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", name).replace(" ", "-")
        found.add(next(each for each in [name, *(f"{name}-{n}" for n in range(1, 100))] if each not in found))
    return found


def broken_links(page: Path) -> Iterator[str]:
    """Links and images of a page that lead to no file, or to no heading."""
    text = re.sub(r"`[^`\n]+`", "", "\n".join(line for line in text_of(page).splitlines() if line[:4] != "    "))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists():
            yield f"{page.relative_to(ROOT)}: {target}: there is no {name}"
        elif anchor and anchor not in anchors(path):
            yield f"{page.relative_to(ROOT)}: {target}: no such heading; there are {sorted(anchors(path))}"


def test_links_lead_somewhere() -> None:
    assert len(PAGES) > 15
    broken = [problem for page in PAGES for problem in broken_links(page)]
    assert not broken, "\n".join(broken)


def test_broken_links_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# A page: two!\n\n[a](no.md) [b](page.md#a-page-two) [c](#a-page) ![d](no.png)\n\n    [e](no.md)\n"
    )
    assert [problem.split(": ")[1] for problem in broken_links(page)] == ["no.md", "#a-page", "no.png"]


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("myst_nb")
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", tmp_path / "doctrees"]
    done = subprocess.run([*command, DOCS, tmp_path / "site"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in ("index", "tutorial", "notebook", "how-ism-works", "commands/audit"):
        assert (tmp_path / "site" / f"{page}.html").stat().st_size > 3000
    assert (tmp_path / "site" / "_images" / "ism.png").is_file()


def test_the_picture_of_the_ism_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ism_picture.py", str(tmp_path / "ism.png")])
    runpy.run_path(str(DOCS / "ism_picture.py"), run_name="__main__")
    with Image.open(tmp_path / "ism.png") as drawn, Image.open(DOCS / "images" / "ism.png") as stored:
        assert drawn.size == stored.size
        assert len(np.unique(np.asarray(drawn.convert("L")))) > 10
        red, green, blue = drawn.convert("RGB").split()
        assert red.tobytes() == green.tobytes() == blue.tobytes()  # black and white


def test_the_notebook_is_stored_with_its_outputs() -> None:
    nbformat = pytest.importorskip("nbformat")
    path = DOCS / "notebook.ipynb"
    assert path.stat().st_size < 500_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    for output in outputs:
        assert output.output_type != "error" and output.get("name") != "stderr"
        text = output.get("text", "") + "".join(output.get("data", {}).get("text/plain", ""))
        assert not MACHINE_PATHS.search(text), text


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    out = tmp_path / "notebook.ipynb"
    command = [sys.executable, DOCS / "run_notebook.py", "--short", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    stored, ran = (nbformat.read(path, as_version=4) for path in (DOCS / "notebook.ipynb", out))
    for before, after in zip(stored.cells, ran.cells, strict=True):
        kinds = [[output.output_type for output in cell.get("outputs", [])] for cell in (before, after)]
        assert kinds[0] == kinds[1], after.source


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    folder = tmp_path / "tutorial"
    command = [sys.executable, DOCS / "tutorial.py", "--short", "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for made in ("report/index.html", "similar-report/index.html", "clothes.parquet", "clothes.onnx", "similar.png"):
        assert (folder / made).stat().st_size > 5000, made
    # After two epochs the audit already names most of the images that were put into a wrong folder.
    planted = set((folder / "planted.txt").read_text().split())
    with open(folder / "report" / "label_errors.csv", newline="") as file:
        named = [Path(row["path"]).name for row in csv.DictReader(file)]
    assert len(planted) == 20 and len(planted & set(named[:200])) >= 10


def test_the_tutorial_does_not_write_over_a_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, DOCS / "tutorial.py", "--folder", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "exists; give the name of a new folder" in done.stderr
