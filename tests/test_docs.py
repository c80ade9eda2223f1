"""The Python in docs/ runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).parents[1] / "docs"


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
    text = (DOCS / "uncertainty.md").read_text(encoding="utf-8")
    block = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
    names: dict[str, Any] = {}
    exec(compile(block, "uncertainty.md", "exec"), names)
    assert names["score"].shape == (8,) and ((names["score"] > 0) & (names["score"] < 1)).all()
    assert names["model"].calibration.fitted_on == 8
