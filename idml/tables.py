"""Tables of finished runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from idml.errors import UserError

COLUMNS = ("method", "top-1", "top-5", "NLL", "ECE", "u test", "u clean", "u mixed", "active units", "seconds")


def read_results(directory: Path) -> dict[str, Any]:
    """What ``results.json`` of a finished run holds; UserError when there is none."""
    path = directory / "results.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} is not a finished run: {path} cannot be read ({error})") from None


def _row(results: dict[str, Any]) -> list[str]:
    final = results["final"]

    def number(key: str, form: str) -> str:
        return format(final[key], form) if key in final else "-"

    return [
        results["method"],
        number("top1", ".1%"),
        number("top5", ".1%"),
        number("nll", ".3f"),
        number("ece", ".3f"),
        number("uncertainty_test", ".2f"),
        number("uncertainty_train_clean", ".2f"),
        number("uncertainty_train_mixed", ".2f"),
        number("active_uncertainty_units", ".0%"),
        f"{results['wall_seconds']:.0f}",
    ]


def print_table(arguments: Sequence[str]) -> None:
    """A Markdown table of run directories (figures of the last epoch), and where their pictures and logs are."""
    if not arguments:
        raise UserError("expected run directories: python -m idml table runs/a runs/b")
    directories = [Path(argument) for argument in arguments]
    runs = [read_results(directory) for directory in directories]
    rows = [list(COLUMNS), *map(_row, runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
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
