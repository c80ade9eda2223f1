"""What introspection after training is worth: errors, novelty, the promise, wrong labels, memorised networks, cost.

    python benchmarks/introspection.py --runs runs/introspection --weights FILE.pth     hours on 2 CPU cores; resumable
    python benchmarks/introspection.py --parts errors promise --seeds 1 2
    python benchmarks/introspection.py --quick                                          a few steps: that it runs

errors      does P(wrong) rank errors, beside what is free, temperature, flip averaging, an ensemble, MC dropout
novelty     does the density know other data, beside the detectors of pytorch-ood
promise     is the error rate above what was promised? Of the stored promise, and of 500 random splits of test images
labels      5 % wrong labels, planted: how many are in the top 5 %, beside loss and cleanlab
memorised   a network without errors on its training images: which images the heads should learn from
near        two classes held out of training: does novelty know them

pytorch-ood and cleanlab are needed for their rows (pip install pytorch-ood cleanlab). Tables go into
docs/uncertainty.md, figures to benchmarks/results/introspection.json with seeds, hardware, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from introspection_parts import errors, labels, memorised, near, novelty, promise
from introspection_runs import ROOT, SETTINGS
from paired import write_between

from idml.environment import git_commit, hardware, versions
from idml.errors import run_main
from idml.introspection import fit

PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "errors": errors,
    "novelty": novelty,
    "promise": promise,
    "labels": labels,
    "memorised": memorised,
    "near": near,
}
"""Each gives rows, and ``table``, a Markdown text."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--runs", type=Path, help="folder of the runs; those that are whole are not made again")
    parser.add_argument("--weights", help="of EfficientNet-Lite0")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/introspection.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/uncertainty.md")
    parser.add_argument("--no-docs", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a few steps, one seed, one setting")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.quick:
        arguments.seeds, arguments.settings = arguments.seeds[:1], arguments.settings[:1]
        arguments.out = arguments.out.with_stem(f"{arguments.out.stem}-quick")
        arguments.processes, fit.LEAST_STEPS = 1, 60
    stored = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        arguments.runs = (arguments.runs or Path(temporary)).resolve()
        for name in arguments.parts:
            started = time.perf_counter()
            found = PARTS[name](arguments)
            print(f"\n{name}\n\n{found['table']}\n", flush=True)
            found |= {"hardware": hardware(), "versions": versions(), "commit": git_commit(), "seeds": arguments.seeds}
            found["seconds"] = round(time.perf_counter() - started)
            stored[name] = found
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
            if not (arguments.quick or arguments.no_docs):
                write_between(arguments.docs, name, found["table"], script="introspection.py")
    print(f"stored in {arguments.out}", file=sys.stderr if arguments.quick else sys.stdout)


if __name__ == "__main__":
    run_main(main)
