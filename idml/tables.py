"""Tables of finished runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from idml.errors import UserError
from idml.paths import nearest_path, user_path

CLASSIFICATION = {
    "top-1": ("top1", ".1%"),
    "top-5": ("top5", ".1%"),
    "NLL": ("nll", ".3f"),
    "ECE": ("ece", ".3f"),
    "error AUROC": ("error_auroc", ".3f"),
    "1 - max softmax": ("error_auroc_max_softmax", ".3f"),
    "answered at 5 % risk": ("coverage_at_5_risk", ".1%"),
    "u test": ("uncertainty_test", ".2f"),
    "u clean": ("uncertainty_train_clean", ".2f"),
    "u mixed": ("uncertainty_train_mixed", ".2f"),
    "active units": ("active_uncertainty_units", ".0%"),
}
"""Column of the table of a train_cls.py run: key in ``results.json``, format."""

RETRIEVAL = {
    "R@1": ("R@1", ".1%"),
    "R@2": ("R@2", ".1%"),
    "R@4": ("R@4", ".1%"),
    "R@10": ("R@10", ".1%"),
    "RP": ("RP", ".1%"),
    "MAP@R": ("MAP@R", ".1%"),
    "NMI": ("NMI", ".1%"),
    "F1": ("F1", ".1%"),
    "R@1 other families": ("other_families/R@1", ".1%"),
    "R-AUROC u": ("R-AUROC uncertainty", ".3f"),
    "R-AUROC search": ("R-AUROC search", ".3f"),
    "R-AUROC norm": ("R-AUROC norm", ".3f"),
    "R-AUROC 1-sim": ("R-AUROC similarity", ".3f"),
    "ISM weight": ("ism_weight", ".3f"),
}
"""The same for a train_dml.py run; columns that no run has are left out."""


def read_results(directory: Path) -> dict[str, Any]:
    """What ``results.json`` of a finished run holds; UserError when there is none."""
    path = directory / "results.json"
    if not directory.exists():
        raise UserError(f"{directory} is not a finished run: there is no such folder; {nearest_path(directory)}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} is not a finished run: {path} cannot be read ({error})") from None


def _rows(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Title and one row per run."""
    kinds = {"R@1" in run["final"] for run in runs}
    if len(kinds) > 1:
        raise UserError("runs of train_cls.py and of train_dml.py have no columns in common; give one kind at a time")
    columns = RETRIEVAL if kinds.pop() else CLASSIFICATION
    columns = {title: (key, form) for title, (key, form) in columns.items() if any(key in run["final"] for run in runs)}
    rows = [["method", *columns, "seconds"]]
    for run in runs:
        final = run["final"]
        figures = ["-" if final.get(key) is None else format(final[key], form) for key, form in columns.values()]
        rows.append([run["method"], *figures, f"{run['wall_seconds']:.0f}"])
    return rows


def print_table(arguments: Sequence[str]) -> None:
    """A Markdown table of run directories (figures of the last epoch), and where their pictures and logs are."""
    if not arguments:
        raise UserError("expected run directories: python -m idml table runs/a runs/b")
    directories = [user_path(argument) for argument in arguments]
    runs = [read_results(directory) for directory in directories]
    rows = _rows(runs)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print("\n".join(lines))
    first = runs[0]
    same = {(run["dataset"], run["model"], run["seed"]) for run in runs}
    if len(same) == 1:
        print(f"{first['dataset']}, {first['model']}, seed {first['seed']}, last epoch; {first['hardware']}")
    print("pictures: " + ", ".join(str(directory / "pictures") for directory in directories))
    common = directories[0].parent if len({directory.parent for directory in directories}) == 1 else directories[0]
    print(f"TensorBoard: .venv/bin/tensorboard --logdir {common}")
