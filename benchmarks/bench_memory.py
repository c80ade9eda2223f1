"""Memory, open files, threads and shared memory of both training scripts over many epochs: do they stay flat?

    python benchmarks/bench_memory.py --epochs 3 --images 200     in a minute
    python benchmarks/bench_memory.py                             30 epochs of 1,000 images, each of them evaluated

The scripts themselves run, with both loaders and --workers 2, on JPEG files made of Fashion-MNIST. After each epoch
/proc is read (Linux): proportional set size of process and workers, the shared part of it, descriptors, threads.
The slope is that of a least-squares line through the epochs after the first five. Prints a table and writes
benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from idml.config_cls import ClsConfig
from idml.data.datasets import read_splits
from idml.environment import git_commit, hardware, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
SETTLED = 5
"""Epochs after which caches and pools of memory have found their size."""


def write_images(folder: Path, count: int) -> None:
    """``train/CLASS/N.jpg`` and ``val/CLASS/N.jpg``: ``count`` and a fifth of it."""
    splits = read_splits(ClsConfig(dataset="fashion-mnist-mini"))
    for name, split, wanted in (("train", splits.train, count), ("val", splits.test, count // 5)):
        assert split.images is not None
        for number in range(wanted):
            path = folder / name / f"class{split.labels[number]}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(split.images[number, ..., 0]).save(path, quality=95)


def family(pid: int) -> list[int]:
    """The process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += family(int(child))
    return found


def look(pid: int) -> dict[str, float]:
    """What the process and its workers hold now; sizes in MB."""
    total = {"memory": 0.0, "shared": 0.0, "descriptors": 0.0, "threads": 0.0, "processes": 0.0}
    for member in family(pid):
        sizes = dict(line.split(":", 1) for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()[1:])
        total["memory"] += int(sizes["Pss"].split()[0]) / 1000
        total["shared"] += int(sizes["Pss_Shmem"].split()[0]) / 1000
        total["descriptors"] += len(os.listdir(f"/proc/{member}/fd"))
        total["threads"] += len(os.listdir(f"/proc/{member}/task"))
        total["processes"] += 1
    return total


def watch(command: list[str], run: Path) -> list[dict[str, float]]:
    """Run the script; one entry for each epoch, taken when its line in metrics.jsonl appears."""
    found: list[dict[str, float]] = []
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (run.parent / f"{run.name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while process.poll() is None:
            lines = run / "metrics.jsonl"
            if lines.exists() and len(lines.read_text().splitlines()) > len(found):
                try:
                    found.append(look(process.pid))
                except (FileNotFoundError, ProcessLookupError, IndexError):  # a worker, or the run, ended meanwhile
                    time.sleep(0.01)
                    continue
            time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{(run.parent / f'{run.name}.log').read_text()}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--images", type=int, default=1000)
    arguments = parser.parse_args()

    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "photos", arguments.images)
        both = ["--model", "resnet8_cifar", "--image-size", "16", "--threads", "1", "--workers", "2", "--no-verbose"]
        both += ["--dataset", "folder", "--cache-dir", str(folder / "cache"), "--batch-size", "100"]
        both += ["--val-fraction", "0"]
        photos, retrieval = str(folder / "photos"), ["--embedding-size", "16", "--ks", "1", "--bn-freeze", "0"]
        scripts = {
            "train_cls.py": ["--data-dir", photos, "--method", "idml-cutmix", "--ema-decay", "0.99"],
            # Half of the classes are tested, none of which is trained on.
            "train_dml.py": ["--data-dir", f"{photos}/train", "--test-fraction", "0.5", *retrieval],
        }
        for script, own in scripts.items():
            for loader in ("torch", "ffcv"):
                run = folder / f"{script[:-3]}-{loader}"
                options = [*own, *both, "--loader", loader, "--epochs", str(arguments.epochs)]
                command = [sys.executable, str(ROOT / script), *options, "--output-dir", str(run)]
                epochs = watch(command, run)
                settled = [epoch["memory"] for epoch in epochs[SETTLED:]]
                slope = float(np.polyfit(range(len(settled)), settled, 1)[0]) if len(settled) > 1 else float("nan")
                parts[f"{script} {loader}"] = {"slope_mb_per_epoch": slope, "epochs": epochs}
                print(f"\n{script}, {loader} loader: {slope:+.2f} MB an epoch after the first {SETTLED}")
                for number, epoch in enumerate(epochs, 1):
                    if number in (1, 2, SETTLED, len(epochs) // 2, len(epochs)):
                        print(
                            f"  epoch {number:3d}  " + "  ".join(f"{key} {value:.0f}" for key, value in epoch.items())
                        )
    result = {
        "hardware": hardware(),
        "versions": versions(),
        "commit": git_commit(),
        "epochs": arguments.epochs,
        "images": arguments.images,
        "runs": parts,
    }
    path = RESULTS / ("memory.json" if arguments.epochs >= 30 else "memory-quick.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
