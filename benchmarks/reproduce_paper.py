"""The paper suite of `reproduce.py`: the published rows, each by its config, on whatever real data set is there."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from paired import markdown_table

from idml.config_cls import parse_cls_config
from idml.config_dml import parse_dml_config
from idml.data.datasets import read_splits
from idml.data.retrieval_datasets import read_retrieval_data
from idml.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CLASSIFICATION, RETRIEVAL = ("imagenet", "cifar100", "cifar10"), ("cub", "cars", "sop")
NO_DATA = "not run here: data set not available"
CLS_KEYS = {"top-1": "top1", "top-5": "top5"}


def published_rows() -> list[str]:
    """Names of the rows, as ``cub/idml_margin``, in the order of the tables."""
    return [
        f"{dataset}/{path.stem}"
        for dataset in (*CLASSIFICATION, *RETRIEVAL)
        for path in sorted((ROOT / "configs" / dataset).glob("*.yaml"))
    ]


def header(row: str) -> dict[str, str]:
    """The comment lines at the head of a row's config, by their first word; a line that goes on is joined."""
    found: dict[str, str] = {}
    key = ""
    for line in (ROOT / f"configs/{row}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if new := re.match(r"# ([A-Z]\w+)  +(.*)", line):
            key, found[new[1]] = new[1], new[2]
        elif key:
            found[key] += " " + line.lstrip("# ")
    return found


def published_figures(text: str) -> dict[str, float]:
    """The header's figures in percent: ``R@1 70.7, NMI 73.5 %`` or ``84.08 / 96.46 % top-1 / top-5``.

    Raises:
        ValueError: it is neither.
    """
    if named := re.findall(r"([A-Z][\w@]*(?:@\w+)?) (\d+(?:\.\d+)?)", text):
        return {name: float(value) for name, value in named}
    if unnamed := re.match(r"([\d. /]+) % ([\w /-]+)$", text):
        values, names = ([part.strip() for part in unnamed[i].split("/")] for i in (1, 2))
        return dict(zip(names, map(float, values), strict=True))
    raise ValueError(f"no figures in {text!r}")


def missing_data(dataset: str, data_dir: str) -> str | None:
    """Why a data set cannot be trained on here, or None where it can."""
    row = next(row for row in published_rows() if row.startswith(dataset + "/"))
    options = ["--config", str(ROOT / f"configs/{row}.yaml"), "--data-dir", data_dir_of(dataset, data_dir)]
    try:
        if dataset in CLASSIFICATION:
            read_splits(parse_cls_config(options, description="")[0])
        else:
            read_retrieval_data(parse_dml_config(options, description="")[0])
    except UserError as error:
        return str(error)
    return None


def data_dir_of(dataset: str, data_dir: str) -> str:
    """ImageNet has a folder of its own, as in the commands of its configs; the other readers look for theirs."""
    return str(Path(data_dir) / "imagenet") if dataset == "imagenet" else data_dir


def train_row(row: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run a row, or go on with it, and its figures; where that fails, the reason."""
    dataset = row.split("/")[0]
    script = "train_cls.py" if dataset in CLASSIFICATION else "train_dml.py"
    run = folder / row.replace("/", "-")
    options = ["--config", f"configs/{row}.yaml", "--data-dir", data_dir_of(dataset, arguments.data_dir)]
    options += arguments.options
    python = ["python"]
    if arguments.processes > 1:
        python = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.processes)]
    command = [*python, script, *options]
    if not (run / "results.json").exists():
        print(f"{row}: {' '.join(command)}", flush=True)
        again = ["--resume", "auto", "--output-dir", str(run)]
        done = subprocess.run(
            [sys.executable, *command[1:], *again], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ
        )
        if done.returncode != 0 or not (run / "results.json").exists():
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"{row} failed: {reason}", file=sys.stderr)
            return {"status": f"failed: {reason}", "command": " ".join(command)}
    stored = json.loads((run / "results.json").read_text(encoding="utf-8"))
    about = {key: stored[key] for key in ("git_commit", "hardware", "processes", "wall_seconds", "versions", "seed")}
    return {"status": "run", "final": stored["final"], "command": " ".join(command), **about}


def run_rows(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Every row: published figures, and what is to say of it here.

    Raises:
        UserError: data are there, but no GPU, and ``--on-cpu`` was not given.
    """
    known = published_rows()
    rows: dict[str, dict[str, Any]] = {}
    reasons: dict[str, str | None] = {}
    for row in known:
        about = header(row)
        rows[row] = {
            "published": published_figures(about["Published"]),
            "cost": about["Cost"],
            "status": "not asked for",
        }
        if arguments.rows and row not in arguments.rows:
            continue
        dataset = row.split("/")[0]
        if dataset not in reasons:
            reasons[dataset] = missing_data(dataset, arguments.data_dir)
            if reasons[dataset] is not None:
                print(f"{dataset}: {reasons[dataset]}", file=sys.stderr)
        if reasons[dataset] is not None:
            rows[row] |= {"status": NO_DATA, "reason": reasons[dataset]}
            continue
        if not (torch.cuda.is_available() or arguments.on_cpu):
            raise UserError(
                f"{row} is a training of {about['Cost'].split(':')[0]} and there is no GPU; --on-cpu starts it anyway, "
                "--rows picks others"
            )
        rows[row] |= train_row(row, arguments, folder)
    return rows


def ours(final: dict[str, Any], name: str) -> float | None:
    """A figure of a run in percent, by its published name."""
    value = final.get(CLS_KEYS.get(name, name))
    return None if value is None else 100 * value


def paper_tables(rows: dict[str, dict[str, Any]], options: list[str]) -> str:
    """A Markdown table for each data set."""
    parts = []
    for dataset in (*CLASSIFICATION, *RETRIEVAL):
        lines, digits = [], 2 if dataset in CLASSIFICATION else 1  # as printed
        for row, about in rows.items():
            if not row.startswith(dataset + "/"):
                continue
            published = about["published"]
            here = {name: ours(about.get("final", {}), name) for name in published}
            shown = ", ".join(f"{name} {value:.{digits}f}" for name, value in here.items() if value is not None)
            less = ", ".join(f"{name} {v - published[name]:+.{digits}f}" for name, v in here.items() if v is not None)
            figures = ", ".join(f"{name} {value:.{digits}f}" for name, value in published.items())
            lines.append([row.split("/")[1], figures, shown or about["status"], less or "-"])
        parts.append(
            f"### {dataset}\n\n" + markdown_table(["row", "published, %", "here, %", "difference, points"], lines)
        )
    changed = f"Not the published recipe, but with: `{' '.join(options)}`\n\n" if options else ""
    return changed + "\n\n".join(parts)
