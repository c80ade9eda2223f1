"""What a GPU is used for: training images a second as a share of what the card can do, and retrieval figures on it.

    python benchmarks/bench_gpu.py                  under 2 minutes on a GPU
    python benchmarks/bench_gpu.py --quick          tiny, on a CPU too

rate     ResNet-50 at 224 pixels, bf16, channels_last, ISM off and live, as it is and compiled: images a second, and the
         operations a second that this is, as a share of what one large matrix product of the same precision reaches on
         the same card in the same round (and of the peak of its data sheet, where --peak-tflops gives that)
figures  60,502 embeddings of 512 numbers in 11,316 classes, the size of Stanford Online Products: R@K, RP, MAP@R and
         NMI on the device

The other questions for a GPU have scripts of their own, which take one where there is one; `make bench-gpu` runs all.
Writes benchmarks/results/gpu.json.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_ism import NETWORKS, QUICK, Training
from bench_retrieval_metrics import clustered_points
from bench_scaling import counted
from timing import conditions, in_turn, parser, results_path, store, taken

from idml.errors import run_main
from idml.metrics import retrieval_metrics
from idml.runtime import choose_device, keep_freed_memory

KS = (1, 10, 100, 1000)
"""Of R@K on Stanford Online Products."""


def rate(device: torch.device, budget: float, peak: float | None, *, quick: bool) -> dict[str, Any]:
    """Images a second of a training step, in operations and as a share of a matrix product's."""
    gpu = device.type == "cuda"
    network = QUICK if quick else NETWORKS["resnet50"]
    precision = torch.bfloat16 if gpu else torch.float32
    side = 8192 if gpu else 512
    left, right = (torch.randn(side, side, device=device, dtype=precision) for _ in range(2))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        steps: dict[str, Callable[[], Any]] = {"matrix product": partial(torch.matmul, left, right)}
        batches = {}
        for compiled in (False, True) if gpu and not quick else (False,):
            for variant in ("off", "live"):
                name = f"{variant}{', compiled' if compiled else ''}"
                settings: dict[str, Any] = {"precision": "bf16" if gpu else "fp32", "compiled": compiled}
                training = Training(variant, network, Path(folder) / name, device, on_cpu=not gpu, **settings)
                steps[name], batches[name] = training.step, len(training.images)
        times = in_turn(steps, budget=budget, rounds=3 if quick else None, warmup=4, device=device)
    size = network.size if gpu else network.cpu_size
    operations = counted(network.name, size, network.classes)["forward_and_backward"]
    product = [2 * side**3 / each.wall for each in times.pop("matrix product")]
    print(
        f"\n{network.name} at {size} pixels\n\n| | images/s | TFLOP/s | share of a matrix product |\n|---|---|---|---|"
    )
    for name, each in times.items():
        images = [batches[name] / one.wall for one in each]
        shares = sorted(rate * operations / most for rate, most in zip(images, product, strict=True))
        median = sorted(images)[len(images) // 2]
        row: dict[str, Any] = {"images_per_second": images, "batch": batches[name], "n": len(images)}
        row |= {"operations_per_second": median * operations, "share_of_matrix_product": shares[len(shares) // 2]}
        if peak is not None:
            row["share_of_data_sheet_peak"] = median * operations / (1e12 * peak)
        found[name] = row
        print(f"| {name} | {median:,.0f} | {median * operations / 1e12:.2f} | {row['share_of_matrix_product']:.3f} |")
    shape = {"network": network.name, "pixels": size, "operations_per_image": operations}
    return {**shape, "matrix_product": {"side": side, "operations_per_second": product}, "variants": found}


def figures(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """Seconds of all retrieval figures."""
    count, classes = (2_000, 400) if quick else (60_502, 11_316)
    points, labels = clustered_points(count, 512, classes, 1.5)
    points, labels = points.to(device), labels.to(device)
    values: dict[str, float] = {}
    call = partial(retrieval_metrics, points, labels, ks=KS)
    times = [taken(lambda: values.update(call()), device).wall for _ in range(2 if quick else 3)]
    print(f"\n{count:,} x 512, {classes:,} classes: {min(times):.2f} s, the first time {times[0]:.2f} s; {values}")
    return {"points": [count, 512], "classes": classes, "seconds": times, "metrics": values}


def main() -> None:
    options = parser(__doc__, parts=("rate", "figures"))
    options.add_argument("--peak-tflops", type=float, help="of the card's data sheet, bf16 with dense matrices")
    options.add_argument("--seconds", type=float, default=40, help="that the timed steps may take")
    arguments = options.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    keep_freed_memory(device)
    path = results_path("gpu", quick=arguments.quick, out=arguments.out)
    for name in arguments.parts:
        made_with = conditions()
        if name == "rate":
            found = rate(device, arguments.seconds, arguments.peak_tflops, quick=arguments.quick)
        else:
            found = figures(device, quick=arguments.quick)
        store(path, f"{name}, {device.type}", found, made_with)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    run_main(main)
