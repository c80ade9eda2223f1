"""Has anything become slower? A few ratios in about 2 minutes on 2 cores, against those that are stored.

    make bench-quick
    python benchmarks/bench_quick.py --store      the ratios of now become those that later runs are compared with

Every ratio is of two things timed in turn in this process, so that it says the same on machines of different speed; it
is not the same on machines of different kinds, and busy ones are noisy: a ratio that has moved by more than 10 % is
reported, with its 95 % interval, and nothing fails. The stored ratios are those of benchmarks/results/quick.json.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the scripts do; see idml.runtime.keep_freed_memory

import bench_dml
import bench_ism
import torch
from bench_loader import measure as measure_loaders
from bench_retrieval_metrics import clustered_points
from loader_contenders import cifar_contenders
from timing import RESULTS, compared, conditions, in_turn, parser, store

from idml.errors import UserError, run_main
from idml.metrics import retrieval_metrics
from idml.runtime import keep_freed_memory

MOVED = 0.10
"""Share by which a ratio must have changed to be told."""

CPU = torch.device("cpu")
Ratios = dict[str, dict[str, Any]]


def steps(budget: float, rounds: int | None) -> Ratios:
    """Classification steps (ResNet-8, 64 images of 32 pixels) in units of one with ISM off."""
    network = bench_ism.Network("resnet8_cifar", 32, 64, 32, 64, 10, 128)
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"on_cpu": True, "precision": "fp32", "compiled": False}
        names = ("off", "live", "released, restated")
        made = {name: bench_ism.Training(name, network, Path(folder), CPU, **settings) for name in names}
        rows = compared(in_turn({n: t.step for n, t in made.items()}, budget=budget, rounds=rounds), to="off")
    return {f"step: {name} / off": rows[name] for name in names[1:]}


def forwards(budget: float, rounds: int | None) -> Ratios:
    """A retrieval step with Mixup: two forward passes in units of one."""
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"model": "resnet8_cifar", "size": 32, "batch": 32, "ism": "live"}
        names = ("one forward", "two forwards")
        made = {name: bench_dml.Training(name, Path(folder), CPU, **settings) for name in names}
        rows = compared(in_turn({n: t.step for n, t in made.items()}, budget=budget, rounds=rounds), to="one forward")
    return {"retrieval step: two forwards / one": rows["two forwards"]}


def losses(budget: float, rounds: int | None) -> Ratios:
    """ProxyAnchor over 5,000 classes in units of the plain one."""
    embeddings = torch.nn.functional.normalize(torch.randn(64, 256), dim=1)
    labels = torch.randint(5_000, (64,))
    compare = bench_dml.losses(5_000, CPU, 128)
    calls = {name: partial(bench_dml.forward_and_backward, compare[name], embeddings, labels) for name in compare}
    rows = compared(in_turn(calls, budget=budget, rounds=rounds), to="off")
    return {f"ProxyAnchor loss: {name} / off": rows[name] for name in ("live", "released, restated")}


def figures(budget: float, rounds: int | None) -> Ratios:
    """R@K, RP and MAP@R of 3,000 points: ours in units of pytorch-metric-learning's."""
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    points, labels = clustered_points(3_000, 128, 300, 1.5)
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(include=names, k="max_bin_count", device=CPU)
    calls: dict[str, Callable[[], Any]] = {
        "ours": partial(retrieval_metrics, points, labels, nmi=False),
        "peer": partial(calculator.get_accuracy, points, labels),
    }
    rows = compared(in_turn(calls, budget=budget, rounds=rounds), to="peer")
    return {"retrieval figures: ours / pytorch-metric-learning": rows["ours"]}


def loaders(budget: float, rounds: int | None) -> Ratios:
    """An epoch of 4,000 images of CIFAR's size with one worker: torchvision's recipe in units of ours."""
    with tempfile.TemporaryDirectory() as folder:
        skipped = "FFCV" if importlib.util.find_spec("ffcv") is None else "FFCV's own"  # which compiles for seconds
        make = {name: build for name, build in cifar_contenders(Path(folder), 4_000).items() if skipped not in name}
        rows = measure_loaders(make, 1, rounds or max(round(budget / 4), 3))
    own = {name: row for name, row in rows.items() if name.startswith("ours") and "GPU" not in name}
    return {f"loader: torchvision / {name}": row["times_as_fast_as"]["torchvision"] for name, row in own.items()}


MEASURED: Mapping[str, Callable[[float, int | None], Ratios]] = {
    "steps": steps,
    "forwards": forwards,
    "losses": losses,
    "figures": figures,
    "loaders": loaders,
}


def report(now: Ratios, stored: Ratios) -> list[str]:
    """A table of all ratios; returns the names of those that have moved."""
    moved = []
    print("| ratio | stored | now | 95 % | |\n|---|---|---|---|---|")
    for name, row in now.items():
        low, high = row["interval"]
        before = stored[name]["ratio"] if name in stored else None
        change = None if before is None else row["ratio"] / before - 1
        word = "new" if change is None else ""
        if change is not None and before is not None and abs(change) > MOVED:
            moved.append(name)
            word = f"moved by {100 * change:+.0f} %" + (", within its noise" if low <= before <= high else "")
        told = "-" if before is None else f"{before:.3f}"
        print(f"| {name} | {told} | {row['ratio']:.3f} | {low:.3f} to {high:.3f} | {word} |")
    return moved


def main() -> None:
    options = parser(__doc__, parts=tuple(MEASURED))
    options.add_argument("--store", action="store_true", help="keep the ratios of now for later runs")
    options.add_argument("--seconds", type=float, default=16, help="that the timed calls of one part may take")
    arguments = options.parse_args()
    if arguments.device == "cuda":
        raise UserError("bench_quick.py measures on the CPU alone; leave --device out")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory(CPU)
    path = Path(arguments.out) if arguments.out else RESULTS / "quick.json"
    made_with, now = conditions(), {}
    for name in arguments.parts:
        try:
            now |= MEASURED[name](arguments.seconds, 2 if arguments.quick else None)
        except Exception:  # whatever it is: the others are worth having, and this reports, it does not judge
            print(f"{name} could not be measured:\n{traceback.format_exc()}", flush=True)
    there = path.exists()
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"] if there else {}
    stored = {name: row for part in parts.values() for name, row in part["ratios"].items()}
    moved = report(now, stored)
    print(f"\nmoved by more than {100 * MOVED:.0f} %: {', '.join(moved) if moved else 'nothing'}" if there else "")
    gone = [name for name in stored if name not in now and arguments.parts == list(MEASURED)]
    if gone:
        print(f"stored but not measured now: {', '.join(gone)}")
    if there and not arguments.store:
        about = next(iter(parts.values()))
        print(f"compared with {path} ({about['hardware']}, commit {about['commit']}); now {made_with['hardware']}")
        return
    store(path, "ratios", {"ratios": now}, made_with)
    print(f"stored in {path}")


if __name__ == "__main__":
    run_main(main)
