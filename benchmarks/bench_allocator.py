"""What a training step on the CPU costs with and without `idml.runtime.keep_freed_memory`.

    python benchmarks/bench_allocator.py              about 7 minutes on 2 cores
    python benchmarks/bench_allocator.py --quick

The settings hold for a process once and for all, so each alternative is a process of its own; they take turns. "Huge
pages too" is what the scripts do: THP_MEM_ALLOC_ENABLE, which torch reads when it is imported. A step is forward,
backward and SGD of a classifier in float32, without loading. Told beside the time: the most memory that the process
held, and its page faults in a step. Writes benchmarks/results/allocator.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import timm
import torch
from timing import conditions, parser, ratios, results_path, store
from torch.nn import functional

import idml.cifar_resnet  # noqa: F401  (registers with timm)
from idml.errors import run_main
from idml.runtime import keep_freed_memory

NETWORKS = {"resnet20": ("resnet20_cifar", 128, 32, 30), "resnet50": ("resnet50", 32, 224, 4)}
"""Name in timm, batch, pixels, timed steps in a process."""
QUICK = {"resnet8": ("resnet8_cifar", 32, 32, 3)}
WAYS = {"as glibc does": "0", "freed memory kept": "0", "huge pages too": "1"}
"""What THP_MEM_ALLOC_ENABLE is set to."""


def steps(model_name: str, batch: int, side: int, count: int, way: str, threads: int) -> dict[str, Any]:
    """Seconds of the median step, and what memory it took, in this process."""
    if way != "as glibc does":
        keep_freed_memory(torch.device("cpu"))
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(model_name, num_classes=10).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))
    seconds, faults = [], []
    for _ in range(count + 2):
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": statistics.median(seconds[2:]), "faults": statistics.median(faults[2:]), "peak_mib": peak}


def measure(network: tuple[str, int, int, int], rounds: int, threads: int) -> dict[str, Any]:
    """All ways in turn, each time in a new process."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        first = number % len(WAYS)
        for way in [*WAYS][first:] + [*WAYS][:first]:
            command = [sys.executable, __file__, "--child", json.dumps([*network, way, threads])]
            environment = os.environ | {"THP_MEM_ALLOC_ENABLE": WAYS[way]}
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            found[way].append(json.loads(done.stdout))
    seconds = {way: [each["seconds"] for each in processes] for way, processes in found.items()}
    plain = seconds["as glibc does"]
    return {
        way: {
            **{key: statistics.median(each[key] for each in processes) for key in processes[0]},
            **ratios(list(zip(seconds[way], plain, strict=True))),
            "processes": processes,
        }
        for way, processes in found.items()
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(steps(*json.loads(sys.argv[2]))))
        return
    made: argparse.ArgumentParser = parser(__doc__, parts=(*NETWORKS, *QUICK))
    made.set_defaults(parts=None)
    made.add_argument("--rounds", type=int, default=5, help="processes of each kind")
    arguments = made.parse_args()
    networks = QUICK if arguments.quick else NETWORKS
    path = results_path("allocator", quick=arguments.quick, out=arguments.out)
    for name in arguments.parts or networks:
        made_with = conditions()
        threads, rounds = arguments.threads or made_with["threads"], 2 if arguments.quick else arguments.rounds
        figures = measure((QUICK | NETWORKS)[name], rounds, threads)
        _, batch, side, count = (QUICK | NETWORKS)[name]
        print(f"\n{name}, {batch} images of {side} pixels, {count} steps in each of {rounds} processes, ", end="")
        print(f"{made_with['hardware']}, {threads} threads\n")
        print("| | ms a step | / as glibc does (interval) | page faults a step | most MiB |\n|---|---|---|---|---|")
        for way, row in figures.items():
            ratio = f"{row['ratio']:.3f} ({row['interval'][0]:.3f} to {row['interval'][1]:.3f})"
            print(f"| {way} | {1000 * row['seconds']:.0f} | {ratio} | {row['faults']:,.0f} | {row['peak_mib']:,.0f} |")
        store(
            path, name, {"batch": batch, "pixels": side, "steps": count, "threads": threads, "ways": figures}, made_with
        )
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    run_main(main)
