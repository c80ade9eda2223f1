"""Images a second and CPU seconds an image: our two loaders against torchvision's recipe and timm's loader.

    python benchmarks/bench_loader.py                 about 6 minutes on 2 cores; needs foolbox, whose photos it takes
    python benchmarks/bench_loader.py --quick         few images, two rounds: that it runs
    python benchmarks/bench_loader.py --parts cifar   one of them

An epoch is timed from asking for the first batch to having the last one as the network takes it: float32, cropped,
flipped, normalised, shuffled anew. Contenders run in turn within a round, ratios are taken within rounds. What comes
before (writing the .beton, compiling, starting workers) is the first epoch, told apart. CPU seconds count all threads
and all worker processes, since a network wants those cores too. torch has one thread in every process,
and memory that is freed is kept (`idml.runtime.keep_freed_memory`), for our loaders and for the peers.

cifar  32-pixel RGB images in memory, crop with 4 pixels of padding and flip (timm's loader has no such crop: its own
       random resized crop), batches of 128
jpeg   500-pixel JPEGs, made from the 20 ImageNet photos of the package foolbox by cropping, resizing and mirroring;
       random resized crop to 224 and flip, batches of 64

"FFCV's own" is ffcv.Loader with its documentation's transforms, on the file that ours reads; it is measured
afterwards, in another process.
ours, FFCV is what a run with --loader ffcv does by itself (JPEG files byte for byte); "raw" is the default of
`idml ffcv-write`; "raw, 400" reduces images to 400 pixels, so that crops are no longer those of the files. "to GPU"
stops at the bytes that our loaders give: with a GPU, cropping small images, flipping and normalising are done there.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the scripts do; see idml.runtime.keep_freed_memory

import numpy as np
import torch
from loader_contenders import Contender, cifar_contenders, jpeg_contenders, release
from timing import Taken, conditions, parser, ratios, results_path, store

from idml.errors import run_main
from idml.runtime import keep_freed_memory

PEERS = ("torchvision", "timm")
SAME_FILE = "FFCV's own, same file"


def cpu_seconds() -> float:
    """Of this process and all that it has started, ended ones included."""
    ticks = os.sysconf("SC_CLK_TCK")
    ended = os.times()
    own = time.process_time() + ended.children_user + ended.children_system  # in finer steps than the clock's ticks
    return own + sum(spent / ticks for spent in _spent_by_children(os.getpid()))


def _spent_by_children(parent: int) -> Iterator[int]:
    """Clock ticks of every living child process, and of theirs."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == parent:
            yield sum(map(int, fields[11:15]))
            yield from _spent_by_children(int(stat.parent.name))


def one_epoch(contender: Contender, number: int) -> tuple[Taken, int]:
    """Seconds of an epoch, and how many images it had."""
    wall, cpu, count = time.perf_counter(), cpu_seconds(), 0
    for images, labels in contender.epoch(number):
        assert images.ndim == 4 and len(images) == len(labels)
        count += len(images)
    return Taken(time.perf_counter() - wall, cpu_seconds() - cpu), count


def measure(make: dict[str, Callable[[int], Contender]], workers: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Every contender's figures with so many workers, by name."""
    rows: dict[str, dict[str, Any]] = {}
    contenders: dict[str, Contender] = {}
    for name, build in make.items():
        started = time.perf_counter()
        contenders[name] = build(workers)
        built = time.perf_counter() - started
        first, count = one_epoch(contenders[name], 0)
        rows[name] = {"build_seconds": built, "first_epoch_seconds": first.wall, "images": count}
    found: dict[str, list[Taken]] = {name: [] for name in make}
    names = list(make)
    for number in range(1, rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken, count = one_epoch(contenders[name], number)
            found[name].append(taken)
            rows[name]["images"] = count
    release(contenders)
    for name, row in rows.items():
        row["images_per_second"] = [row["images"] / taken.wall for taken in found[name]]
        row["cpu_seconds_per_image"] = float(np.median([taken.cpu / row["images"] for taken in found[name]]))
        row["times_as_fast_as"] = {}
        for peer in rows.keys() & PEERS:
            share = rows[peer]["images"] / row["images"]  # an epoch may drop the last batch
            pairs = [(t.wall / share, o.wall) for t, o in zip(found[peer], found[name], strict=True)]
            row["times_as_fast_as"][peer] = ratios(pairs)
    return rows


def in_a_child(function: Callable[[], Any]) -> Any:
    """What a function returns, from a process of its own: FFCV's own threads spin on and change torch's number."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(function()))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("the process that measured FFCV's own loader has failed") from None
    finally:
        child.join()


def counterpart(name: str) -> str:
    """FFCV's own loader of the file that one of ours reads, and that gives the same: float32, normalised."""
    return name.replace("ours, FFCV", "FFCV's own") if name.startswith("ours, FFCV") else ""


def print_rows(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """A Markdown table."""
    peers = (*PEERS, SAME_FILE)
    head = ["", "images/s", "CPU ms/image", *(f"x {peer} (quartiles)" for peer in peers), "first epoch s", "built in s"]
    print(f"\n{title}\n\n| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name, row in rows.items():
        cells = [f"{np.median(row['images_per_second']):,.0f}", f"{1000 * row['cpu_seconds_per_image']:.3f}"]
        for peer in peers:
            ratio = row["times_as_fast_as"].get(peer)
            told = ratio and f"{ratio['ratio']:.2f} ({ratio['spread'][0]:.2f} to {ratio['spread'][1]:.2f})"
            cells.append(told or "-")
        cells += [f"{row['first_epoch_seconds']:.2f}", f"{row['build_seconds']:.2f}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def targets(rows: dict[str, dict[str, Any]], part: str) -> dict[str, bool]:
    """What the project aims at, and whether these figures reach it."""
    aim = {"cifar": 15.0, "jpeg": 4.0}[part]

    def ratio(name: str, peer: str = "torchvision") -> float:
        return rows[name]["times_as_fast_as"][peer]["ratio"]

    names = [name for name in rows if name.startswith("ours")]
    aimed = [name for name in names if "FFCV" in name or part == "cifar"]
    found = {f"{name}: at least {aim:g} x torchvision": ratio(name) >= aim for name in aimed}
    slower = [name for name in names if min(ratio(name, peer) for peer in rows[name]["times_as_fast_as"]) < 1]
    return found | {"none of ours slower than a peer": not slower}


def main() -> None:
    made = parser(__doc__, parts=("cifar", "jpeg"))
    made.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--images", type=int, help="default 20,000 of cifar's size, 2,000 JPEGs")
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads or 1)
    keep_freed_memory(torch.device("cpu"))
    rounds = 2 if arguments.quick else arguments.rounds
    path = results_path("loader", quick=arguments.quick, out=arguments.out)
    for part in arguments.parts:
        made_with, figures = conditions(), {}
        count = arguments.images or {"cifar": 20_000, "jpeg": 2_000}[part] // (10 if arguments.quick else 1)
        with tempfile.TemporaryDirectory() as folder:
            build = cifar_contenders if part == "cifar" else jpeg_contenders
            make = build(Path(folder), count)
            theirs = {name: build for name, build in make.items() if name.startswith("FFCV's own")}
            for workers in arguments.workers:
                rows = measure({name: build for name, build in make.items() if name not in theirs}, workers, rounds)
                for name, build in theirs.items():
                    own = next(each for each in make if counterpart(each) == name)
                    rows[name] = in_a_child(partial(measure, {name: build}, workers, rounds))[name]
                    speeds = (rows[each]["images_per_second"] for each in (own, name))
                    rows[own]["times_as_fast_as"][SAME_FILE] = ratios(list(zip(*speeds, strict=True)))
                title = (
                    f"{part}, {count} images, {workers} worker(s), n = {rounds} epochs in turn, {made_with['hardware']}"
                )
                print_rows(title, rows)
                reached = targets(rows, part)
                for text, yes in reached.items():
                    print(f"{'reached' if yes else 'MISSED'}: {text}")
                figures[f"{workers} workers"] = {"rows": rows, "targets": reached}
        store(path, part, {"images": count, "rounds": rounds, **figures}, made_with)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    run_main(main)
