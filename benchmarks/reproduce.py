"""The published rows, on whatever real data are here.

    python benchmarks/reproduce.py --data-dir data                  the rows of configs/{imagenet,cifar10,...,sop}
    python benchmarks/reproduce.py --data-dir data --rows cub/idml_margin -- --max-steps 5

Each row is trained by its config, with --resume auto. What is not here is said to be not run. Further options of the
training scripts go behind --. The table goes into docs/results.md between its markers, every figure with commands,
hardware, versions and commit to benchmarks/results/reproduce.json. What the method is worth on small data is measured
by tune.py, ablation.py, finetune.py and classification.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from paired import write_between
from reproduce_paper import paper_tables, published_rows, run_rows

from idml.environment import git_commit, hardware, versions
from idml.errors import UserError, nearest, run_main

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    """The command line; what stands behind ``--`` is for the training scripts."""
    argv, options = sys.argv[1:], []
    if "--" in argv:
        argv, options = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data", help="ImageNet is looked for in imagenet/ there")
    parser.add_argument("--rows", nargs="+", help="as cub/idml_margin; default all")
    parser.add_argument("--on-cpu", action="store_true", help="train published rows without a GPU too")
    parser.add_argument("--processes", type=int, default=1, help="of torchrun")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/paper", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/reproduce.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/results.md", help="document that holds the table")
    parser.add_argument("--no-docs", action="store_true", help="the table is printed and stored, the document stays")
    arguments = parser.parse_args(argv)
    arguments.options = options
    for row in arguments.rows or []:
        if row not in published_rows():
            raise UserError(f"--rows: there is no published row {row}{nearest(row, published_rows())}")
    if arguments.processes < 1:
        raise UserError(f"--processes: expected at least 1, got {arguments.processes}")
    if not (arguments.no_docs or arguments.docs.is_file()):
        raise UserError(f"--docs: there is no file {arguments.docs}")
    return arguments


def describe() -> dict[str, Any]:
    """What every stored result comes with."""
    arguments = [Path(text).name if "/" in text and not text.startswith("-") else text for text in sys.argv[1:]]
    return {
        "hardware": hardware(),
        "versions": versions(),
        "commit": git_commit(),
        "command": " ".join(["python", "benchmarks/reproduce.py", *arguments]),
    }


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    started = time.monotonic()
    folder = arguments.runs.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = run_rows(arguments, folder)
    body = paper_tables(rows, arguments.options)
    print(body)
    if not arguments.no_docs:
        write_between(arguments.docs, "paper", body)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"paper": {"rows": rows, **describe()}}, indent=1) + "\n", encoding="utf-8")
    print(f"\nstored in {arguments.out} after {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    run_main(main)
