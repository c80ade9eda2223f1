"""Images per second of a training step under each precision, memory layout and compiler setting, as a ratio to fp32.

    python benchmarks/bench_precision.py                                  ResNet-50 at 224 px where there is a GPU
    python benchmarks/bench_precision.py --model resnet8_cifar --size 32 --batch-size 16 --steps 3     a small CPU

Every setting is timed in turn in each of the rounds, and the ratio is that of the medians, so that a machine that slows
down meanwhile does not favour one of them. Prints a table and writes benchmarks/results/precision-<device>.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional

from idml.environment import git_commit, hardware, versions
from idml.models import IntrospectiveClassifier
from idml.optim import SGD
from idml.runtime import autocast, choose_device, place_model


def step_function(arguments: argparse.Namespace, precision: str, channels_last: bool, compile_: bool):  # type: ignore[no-untyped-def]
    """A closure that does one training step on fixed random images (the time does not depend on their content)."""
    device = choose_device("auto")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    model = IntrospectiveClassifier(arguments.model, 1000, ism="live")
    place_model(model, device, channels_last=channels_last, sync_bn=False, tf32=precision == "tf32")
    network = torch.compile(model) if compile_ else model
    optimizer = SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    images = torch.randn(arguments.batch_size, 3, arguments.size, arguments.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last) if channels_last else images
    labels = torch.arange(arguments.batch_size, device=device) % 1000

    def step() -> None:
        with autocast(device, precision if precision in ("bf16", "fp16") else "fp32"):
            output = network(images)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(functional.cross_entropy(output.introspective_logits, labels)).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def seconds_per_step(step, steps: int) -> float:  # type: ignore[no-untyped-def]
    """Mean seconds of ``steps`` steps, the GPU waited for."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronise()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise()
    return (time.perf_counter() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--model", default="resnet50" if gpu else "resnet8_cifar")
    parser.add_argument("--size", type=int, default=224 if gpu else 32)
    parser.add_argument("--batch-size", type=int, default=256 if gpu else 32)
    parser.add_argument("--steps", type=int, default=20 if gpu else 3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()

    precisions = ("fp32", "tf32", "bf16", "fp16") if gpu else ("fp32", "bf16")
    # Compiling for a CPU takes minutes a setting.
    compiled = (False,) if arguments.no_compile or not gpu else (False, True)
    settings = list(itertools.product(precisions, (False, True), compiled))
    times: dict[tuple[str, bool, bool], list[float]] = {setting: [] for setting in settings}
    for _ in range(arguments.rounds):
        for setting in settings:  # made anew each time, so that only one model holds memory
            step = step_function(arguments, *setting)
            seconds_per_step(step, 3)  # warm-up, compilation
            times[setting].append(seconds_per_step(step, arguments.steps))
            torch.compiler.reset()

    medians = {setting: statistics.median(values) for setting, values in times.items()}
    base = medians[("fp32", False, False)]
    print(f"{hardware()}; {arguments.model} at {arguments.size} px, batch {arguments.batch_size}")
    print("| precision | channels_last | compiled | images/s | ratio to fp32 |\n|---|---|---|---|---|")
    rows = []
    for (precision, channels_last, compile_), seconds in medians.items():
        rate, ratio = arguments.batch_size / seconds, base / seconds
        print(f"| {precision} | {channels_last} | {compile_} | {rate:.0f} | {ratio:.2f} |")
        row = {"precision": precision, "channels_last": channels_last, "compile": compile_}
        rows.append(
            row | {"images_per_second": rate, "ratio": ratio, "seconds": times[(precision, channels_last, compile_)]}
        )
    result = {
        "hardware": hardware(),
        "versions": versions(),
        "commit": git_commit(),
        "settings": vars(arguments),
        "rows": rows,
    }
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(0) if gpu else "cpu").lower()
    path = Path(__file__).parent / "results" / f"precision-{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
