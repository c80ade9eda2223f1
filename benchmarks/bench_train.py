"""An epoch of training end to end, and the start-up: ours against the scripts that a user would take instead.

    python benchmarks/bench_train.py                                   ours and a loop written by hand
    python benchmarks/bench_train.py --cutmix-pytorch DIR --timm DIR --torchvision DIR     and those, about 12 minutes
    python benchmarks/bench_train.py --quick

Fetch the peers first, they are not part of this project: github.com/clovaai/CutMix-PyTorch,
github.com/huggingface/pytorch-image-models, github.com/pytorch/vision (its references/classification is what is run).
Every script trains its own way with the same options: batches of 128, SGD, float32, two workers, one thread a process,
then evaluates. The images are the Fashion-MNIST in the package, in RGB at 32 pixels, as often as it takes.

network  ResNet-20 (on a CPU the network takes nearly all the time)
loading  a linear layer on mean colours in its place: what is left is loading and the loop, as with a fast GPU
startup  seconds from the start of the process to the end of the first and of the second step, ResNet-18; ours once with
         empty caches (numba's, and no .beton) and then with them

images/s are those between the first and the last step of an epoch; "whole" is the wall time of the command.
"in memory": arrays are in CIFAR10's place (ours reads IDX files); "PNG files": class folders, random resized crops.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timing import conditions, parser, results_path, store

from idml.config_cls import parse_cls_config
from idml.data.datasets import read_splits
from idml.data.image_dataset import fit_square
from idml.errors import UserError, run_main

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OWN = "train_cls.py"
BATCH, WORKERS = 128, 2
PEERS = {
    "CutMix-PyTorch": ("cutmix_pytorch", "train.py"),
    "timm": ("timm", "train.py"),
    "torchvision": ("torchvision", "references/classification/train.py"),
}

Contender = tuple[str, list[str], list[str]]
"""A script, options of ``timed_script.py``, and the script's own options."""


def write_images(folder: Path, count: int, tested: int) -> None:
    """The same images in the forms that the scripts read: IDX files, arrays, PNG files in class folders."""
    data = read_splits(parse_cls_config(["--dataset", "fashion-mnist-mini", "--image-size", "28"], description="")[0])
    arrays: dict[str, np.ndarray] = {}
    for part, split, number, idx in (("train", data.train, count, "train"), ("test", data.test, tested, "t10k")):
        assert split.images is not None
        rows = np.arange(number) % len(split)
        labels, images = split.labels[rows].astype(np.uint8), split.images[rows]
        (folder / "idx").mkdir(exist_ok=True)
        for kind, values in (("images-idx3-ubyte", images[..., 0]), ("labels-idx1-ubyte", labels)):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            (folder / "idx" / f"{idx}-{kind}").write_bytes(head + values.tobytes())
        arrays[f"{part}_images"] = np.repeat(fit_square(images, 32), 3, axis=3)
        arrays[f"{part}_labels"] = labels
        for number, (image, label) in enumerate(zip(arrays[f"{part}_images"], labels, strict=True)):
            place = folder / "png" / {"train": "train", "test": "val"}[part] / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number:06d}.png", compress_level=1)
    np.savez(folder / "images.npz", **arrays)


def contenders(arguments: Any, folder: Path, model: str, epochs: int) -> dict[str, Contender]:
    """What is run, by name."""
    common = ["--method", "baseline", "--model", model, "--epochs", str(epochs), "--batch-size", str(BATCH)]
    common += ["--workers", str(WORKERS), "--threads", "1", "--no-verbose", "--image-size", "32"]
    common += ["--val-fraction", "0"]  # as many images as the others train on, and no introspection
    common += ["--cache-dir", str(folder / "cache")]
    memory = [*common, "--dataset", "fashion-mnist", "--data-dir", str(folder / "idx")]
    files = [*common, "--dataset", "folder", "--data-dir", str(folder / "png")]
    script, known = str(ROOT / OWN), ["--register", model] if model != "resnet18" else []
    found: dict[str, Contender] = {
        "ours, torch, in memory": (script, known, [*memory, "--loader", "torch"]),
        "ours, FFCV, in memory": (script, known, [*memory, "--loader", "ffcv"]),
        "ours, FFCV, PNG files": (script, known, [*files, "--loader", "ffcv"]),
    }
    arrays = ["--images", str(folder / "images.npz")]
    bare = [model, str(epochs), str(BATCH), str(WORKERS)]
    found["bare loop, in memory"] = (str(HERE / "bare_loop.py"), [*arrays, *known], bare)
    loading = ["--epochs", str(epochs), "-j", str(WORKERS)]
    cutmix = ["--net_type", "resnet", "--dataset", "cifar10", "--depth", "20", "--no-bottleneck", "--no-verbose"]
    timm = [
        "--dataset",
        "torch/cifar10",
        "--data-dir",
        str(folder),
        "--num-classes",
        "10",
        "--input-size",
        "3",
        "32",
        "32",
    ]
    timm += ["--device", "cpu", "--no-prefetcher", "--color-jitter", "0", "--warmup-epochs", "0"]
    vision = ["--data-path", str(folder / "png"), "--device", "cpu", "--print-freq", "1000"]
    vision += ["--train-crop-size", "32", "--val-resize-size", "32", "--val-crop-size", "32"]
    options = {
        "CutMix-PyTorch": [*cutmix, *loading, "--batch_size", str(BATCH), "--lr", "0.1"],
        "timm": [*timm, *loading, "--model", model, "-b", str(BATCH), "--lr", "0.1"],
        "torchvision": [*vision, *loading, "--model", model, "-b", str(BATCH)],
    }
    for name, (flag, path) in PEERS.items():
        place = getattr(arguments, flag)
        if place is not None:
            kind = "PNG files" if name == "torchvision" else "in memory"
            found[f"{name}, {kind}"] = (
                str(Path(place).resolve() / path),
                [*arrays, *known, *(["--old"] if name == "CutMix-PyTorch" else [])],
                options[name],
            )
    return found


def run(contender: Contender, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """One run of a script: when it stepped, its wall time, its CPU time."""
    script, own, options = contender
    with tempfile.TemporaryDirectory(dir=folder) as place:
        record = Path(place) / "record.json"
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
        command = [
            sys.executable,
            str(HERE / "timed_script.py"),
            str(record),
            repr(started),
            *own,
            "--",
            script,
            *options,
        ]
        if Path(script).name == OWN:  # which sets this before it imports torch; here timed_script.py has imported it
            environment = environment | {"THP_MEM_ALLOC_ENABLE": "1"}
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
        whole = time.time() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode != 0 or not record.exists():
            raise UserError(f"{script} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        steps = json.loads(record.read_text(encoding="utf-8"))["steps"]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"steps": len(steps), "first": steps[0], "second": steps[1], "last": steps[-1], "whole": whole, "cpu": cpu}


def in_turn(
    runs: dict[str, Contender], rounds: int, folder: Path, environment: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Every script once a round, each round from another one on."""
    names, found = list(runs), {name: [] for name in runs}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(run(runs[name], folder, environment))
            print(f"  {name}: {found[name][-1]['whole']:.1f} s", file=sys.stderr, flush=True)
    return found


def compare(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians over the rounds, and ratios taken within them."""

    def speed(run: dict[str, Any]) -> float:
        return BATCH * (run["steps"] - 1) / (run["last"] - run["first"])

    peers = [name for name in found if not name.startswith("ours")]
    rows: dict[str, dict[str, Any]] = {}
    for name, runs in found.items():
        rows[name] = {key: statistics.median(run[key] for run in runs) for key in ("first", "second", "whole", "cpu")}
        rows[name] |= {"images_per_second": statistics.median(map(speed, runs)), "runs": runs}
        if name.startswith("ours"):
            rounds = range(len(runs))
            against = {peer: [speed(runs[i]) / speed(found[peer][i]) for i in rounds] for peer in peers}
            rows[name]["times_as_fast_as"] = {peer: statistics.median(values) for peer, values in against.items()}
            fastest = [speed(runs[i]) / max(speed(found[peer][i]) for peer in peers) for i in rounds]
            rows[name]["times_the_fastest_peer"] = statistics.median(fastest)
    return rows


def print_epochs(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """A Markdown table of speeds."""
    print(f"\n{title}\n\n| | images/s | whole s | CPU s | x fastest peer | x each peer |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        each = ", ".join(f"{peer.split(',')[0]} {ratio:.2f}" for peer, ratio in row.get("times_as_fast_as", {}).items())
        fastest = f"{row['times_the_fastest_peer']:.2f}" if each else "-"
        cells = f"{row['images_per_second']:,.0f} | {row['whole']:.1f} | {row['cpu']:.1f}"
        print(f"| {name} | {cells} | {fastest} | {each or '-'} |", flush=True)


def print_startup(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """A Markdown table of start-ups."""
    print(f"\n{title}\n\n| | first step after s | second step after s |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['first']:.1f} | {row['second']:.1f} |", flush=True)


def measure(part: str, arguments: Any, environment: dict[str, str]) -> dict[str, Any]:
    """One part: its figures, printed too."""
    model = {"network": "resnet20_cifar", "loading": "pooled_linear", "startup": "resnet18"}[part]
    count = {"network": 3_840, "loading": 25_600, "startup": 512}[part] // (10 if arguments.quick else 1)
    count = max(arguments.images or count, 3 * BATCH)
    rounds = 1 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder, count, tested=256)
        caches = {"NUMBA_CACHE_DIR": str(folder / "numba"), "XDG_CACHE_HOME": str(folder / "cache")}
        runs, environment = contenders(arguments, folder, model, epochs=1), environment | caches
        cold = {name: [run(each, folder, environment)] for name, each in runs.items() if "FFCV" in name}
        found = in_turn(runs, rounds, folder, environment)
        rows = compare(found)
        for name, first in cold.items():  # also what compiles and writes before anything is timed
            rows[f"{name}, empty caches"] = compare({name: first, "-": first})[name]
    title = f"{part}: {model}, {count} images, n = {rounds}, {arguments.hardware}"
    if part == "startup":
        print_startup(title, rows)
    else:
        print_epochs(title, {name: row for name, row in rows.items() if "empty caches" not in name})
    return {"model": model, "images": count, "rounds": rounds, "rows": rows}


def main() -> None:
    made = parser(__doc__, parts=("network", "loading", "startup"))
    for name, (flag, path) in PEERS.items():
        made.add_argument(f"--{flag.replace('_', '-')}", metavar="DIR", help=f"folder of {name}, which has {path}")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--images", type=int, help="to train on, in place of each part's own number")
    arguments = made.parse_args()
    for flag, path in PEERS.values():
        place = getattr(arguments, flag)
        if place is not None and not (Path(place) / path).is_file():
            raise UserError(f"--{flag.replace('_', '-')}: expected the folder that has {path}, got {place}")
    threads = str(arguments.threads or 1)
    torch.set_num_threads(int(threads))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    path = results_path("train", quick=arguments.quick, out=arguments.out)
    for part in arguments.parts:
        made_with = conditions()
        arguments.hardware = made_with["hardware"]
        store(path, part, measure(part, arguments, environment), made_with)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    run_main(main)
