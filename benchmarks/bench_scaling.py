"""Images a second by the number of processes, and what ImageNet would take on 64 GPUs, on paper from measured parts.

    python benchmarks/bench_scaling.py --quick        a ResNet-8, a few steps
    python benchmarks/bench_scaling.py                1 and 2 processes on the CPU (gloo), or 1, 2, 4, 8 GPUs (NCCL)

Parts:
    processes  steps of train_cls.py under torchrun, every process with the same number of images and, on the CPU, one
               thread; off and live. Runs of one and of several processes take turns. Efficiency is
               images a second over those of one process times the number of processes. Also the seconds of an
               all-reduce of as many bytes as the network has gradients, by itself.
    paper      operations an image and parameters of ResNet-50 at 224 pixels, counted by torch; and from these, a GPU's
               peak, the network's speed and images a second of a loader's core: see docs/scaling.md. Each input is
               stored with where it comes from.

Writes benchmarks/results/scaling.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_ism import NETWORKS, QUICK, Network, Training
from timing import RESULTS, conditions, parser, results_path, store
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from idml import distributed
from idml.backbones import create_backbone
from idml.errors import run_main
from idml.models import IntrospectiveClassifier
from idml.runtime import choose_device

VARIANTS = ("off", "live")
ASSUMED = {
    "gpu_peak_flops": (312e12, "A100, bf16 with dense matrices: NVIDIA's data sheet; not measured"),
    "gpu_share_of_peak": (0.20, "assumption; not measured"),
    "network_bytes_per_second": (25e9, "a GPU's own 200 Gbit/s InfiniBand, as a DGX A100 has; not measured"),
    "gpus": (64, "8 machines of 8"),
    "epochs": (300, "of the published recipe"),
}
IMAGENET_IMAGES = 1_281_167


def seconds_of_steps(variant: str, network: Network, device: torch.device, steps: int) -> dict[str, Any]:
    """In a process under torchrun: the seconds of each step, and of an all-reduce of the gradients alone."""
    distributed.setup(device.type)
    on_cpu = device.type == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        precision = "fp32" if on_cpu else "bf16"
        training = Training(variant, network, Path(folder), device, on_cpu=on_cpu, precision=precision, compiled=False)
        spent = []
        for number in range(steps + 3):
            distributed.barrier()
            started = time.perf_counter()
            training.step()
            wait(device)
            distributed.barrier()
            if number >= 3:
                spent.append(time.perf_counter() - started)
    parameters = sum(p.numel() for p in training.model.parameters() if p.requires_grad)
    gradient = torch.zeros(parameters, device=device)
    reduced = []
    for _ in range(5):
        distributed.barrier()
        started = time.perf_counter()
        distributed.all_reduce_sum(gradient)
        wait(device)
        reduced.append(time.perf_counter() - started)
    found = {
        "step_seconds": spent,
        "all_reduce_seconds": reduced,
        "images_per_process": len(training.images),
        "parameters": parameters,
    }
    distributed.shutdown()
    return found


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_processes(count: int, variant: str, steps: int, device: str, *, quick: bool) -> dict[str, Any]:
    """Steps under torchrun with this number of processes; the figures of rank 0."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__]
    command += ["--as-process", variant, "--steps", str(steps), "--device", device, *(["--quick"] if quick else [])]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if device == "cpu" else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_processes(device: torch.device, steps: int, rounds: int, *, quick: bool) -> dict[str, Any]:
    """Images a second and efficiency of each number of processes."""
    most = torch.cuda.device_count() if device.type == "cuda" else 2
    counts = [count for count in (1, 2, 4, 8) if count <= most]
    rows: dict[str, Any] = {}
    for variant in VARIANTS:
        runs: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
        for _ in range(rounds):
            for count in counts:
                runs[count].append(run_processes(count, variant, steps, device.type, quick=quick))
        rows[variant] = by_count(runs)
        print(f"\n{variant}\n\n| processes | images/s | efficiency | MB sent a step and process | all-reduce ms |")
        print("|---|---|---|---|---|")
        for count, row in rows[variant].items():
            figures = f"{row['images_per_second']:.1f} | {row['efficiency']:.3f} | {row['sent_bytes'] / 1e6:.2f}"
            print(f"| {count} | {figures} | {1000 * row['all_reduce_seconds']:.2f} |", flush=True)
    return {"variants": rows, "backend": "nccl" if device.type == "cuda" else "gloo", "steps": steps, "rounds": rounds}


def by_count(runs: dict[int, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Of each number of processes, over its runs: median images a second of the runs, efficiency, bytes."""
    rates = {
        count: [count * run["images_per_process"] / statistics.median(run["step_seconds"]) for run in each]
        for count, each in runs.items()
    }
    rows = {}
    for count, each in runs.items():
        size = 4 * each[0]["parameters"]
        rows[str(count)] = {
            "images_per_second": statistics.median(rates[count]),
            "images_per_second_of_runs": rates[count],
            "efficiency": statistics.median(
                several / (count * one) for several, one in zip(rates[count], rates[1], strict=True)
            ),
            "images_per_process": each[0]["images_per_process"],
            "gradient_bytes": size,
            # What each process sends, and receives, in a ring: twice all but its own share.
            "sent_bytes": 2 * (count - 1) / count * size,
            "all_reduce_seconds": statistics.median(s for run in each for s in run["all_reduce_seconds"]),
            "n": len(each),
        }
    return rows


def counted(name: str = "resnet50", size: int = 224, classes: int = 1000) -> dict[str, float]:
    """Floating-point operations an image, and parameters, of a network that takes images of ``size`` pixels.

    A product and its sum are two operations. Convolutions and matrix products are counted, as torch does.
    """
    with torch.device("meta"):
        model = IntrospectiveClassifier(create_backbone(name, image_size=size), classes, ism="off")
        images, labels = torch.zeros(2, 3, size, size), torch.zeros(2, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter:
        features = model.backbone(images)
        logits = nn.functional.linear(features, model.classifier.weight, model.classifier.bias)
    forward = counter.get_total_flops() / len(images)
    with counter:
        logits = functional.linear(model.backbone(images), model.classifier.weight, model.classifier.bias)
        functional.cross_entropy(logits, labels).backward()
    whole = counter.get_total_flops() / len(images)
    return {"forward": forward, "forward_and_backward": whole, "parameters": sum(p.numel() for p in model.parameters())}


def loader_rates() -> dict[str, float]:
    """Images a second of a core, from 500-pixel JPEG files to 224 pixels; empty before bench_loader.py has run."""
    path = RESULTS / "loader.json"
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    rows = parts.get("jpeg", {}).get("1 workers", {}).get("rows", {})
    return {name: 1 / row["cpu_seconds_per_image"] for name, row in rows.items()}


def on_paper() -> dict[str, Any]:
    """What the published recipe costs on 64 GPUs, from what was counted here and what is assumed."""
    value = {name: assumed[0] for name, assumed in ASSUMED.items()}
    count = counted()
    per_gpu = value["gpu_share_of_peak"] * value["gpu_peak_flops"] / count["forward_and_backward"]
    gpus = int(value["gpus"])
    sent = 2 * (gpus - 1) / gpus * 4 * count["parameters"]
    exchange = sent / value["network_bytes_per_second"]
    batches = {}
    for batch in (256, 2048, 8192):
        compute = batch / gpus / per_gpu
        batches[str(batch)] = {
            "images_per_gpu": batch / gpus,
            "compute_ms": 1000 * compute,
            "exchange_ms": 1000 * exchange,
            "step_ms_if_overlapped": 1000 * max(compute, exchange),
            "efficiency_if_overlapped": compute / max(compute, exchange),
            "hours": max(compute, exchange) * IMAGENET_IMAGES / batch * value["epochs"] / 3600,
        }
    images = value["epochs"] * IMAGENET_IMAGES
    return {
        "assumed": {name: {"value": each[0], "source": each[1]} for name, each in ASSUMED.items()},
        "counted_per_image": count,
        "images_per_second_per_gpu": per_gpu,
        "images_per_second_per_machine": 8 * per_gpu,
        "sent_bytes_per_step": sent,
        "operations_in_all": images * count["forward_and_backward"],
        "gpu_hours": images / per_gpu / 3600,
        "batches": batches,
        "loader_images_per_second_per_core": loader_rates(),
        "loader_cores_per_machine": {name: 8 * per_gpu / rate for name, rate in loader_rates().items()},
    }


def main() -> None:
    options = parser(__doc__, parts=("processes", "paper"))
    options.add_argument("--steps", type=int, default=None, help="of each run; default 15")
    options.add_argument("--rounds", type=int, default=None, help="runs of each number of processes; default 3")
    options.add_argument("--as-process", choices=VARIANTS, default=None, help="what torchrun runs")
    arguments = options.parse_args()
    device = choose_device(arguments.device)
    steps, rounds = arguments.steps or (2 if arguments.quick else 15), arguments.rounds or (1 if arguments.quick else 3)
    if arguments.as_process:
        network = QUICK if arguments.quick else NETWORKS["resnet50" if device.type == "cuda" else "resnet20"]
        found = seconds_of_steps(arguments.as_process, network, device, steps)
        if distributed.is_main():
            print(json.dumps(found))
        return
    path = results_path("scaling", quick=arguments.quick, out=arguments.out)
    made_with = conditions()
    if "processes" in arguments.parts:
        store(
            path,
            f"processes, {device.type}",
            measure_processes(device, steps, rounds, quick=arguments.quick),
            made_with,
        )
    if "paper" in arguments.parts:
        paper = on_paper()
        store(path, "paper", paper, made_with)
        print(f"\non paper: {json.dumps(paper, indent=1)}")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    run_main(main)
