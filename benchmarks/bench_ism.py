"""What the ISM costs: one training step of train_cls.py with ISM off, live, released, and as the authors compute it.

    python benchmarks/bench_ism.py --quick              a ResNet-8, a few steps
    python benchmarks/bench_ism.py                      ResNet-20, ResNet-50, ViT-S; under 8 minutes
    python benchmarks/bench_ism.py --parts resnet50 --full --device cpu      at 224 pixels on the CPU too

A step is that of the script itself, from a batch of bytes on the device to changed weights. Alternatives:

    off                           the plain classifier; "off, again" is another one, and shows what noise there is
    live                          the default of --ism live
    released                      the authors' formula, computed from the logits
    released, restated            the same numbers the way the authors' code gets them: class vectors by sending an
                                  identity matrix through the classifier, then a second matrix product

On the CPU images are of 128 pixels and batches of 16 for ResNet-50 and ViT-S, unless --full. On a GPU: 224 pixels, bf16
and channels_last, once as it is and once under torch.compile. The target is live / off <= 1.01 for ResNet-50 on a GPU
and <= 1.03 for ResNet-20 on 2 CPU cores. Each part stores the profiler's dearest operations of some of them, and how
often a step makes the program wait for a GPU. Writes benchmarks/results/ism.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the scripts do; see idml.runtime.keep_freed_memory

import torch
from timing import compared, conditions, in_turn, parser, print_comparison, results_path, store
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

import train_cls
from idml import distributed
from idml.backbones import create_backbone
from idml.config_cls import ClsConfig, parse_cls_config
from idml.data.cls_loaders import build_cls_loaders
from idml.data.datasets import read_splits
from idml.errors import run_main
from idml.models import ClassifierOutput, IntrospectiveClassifier
from idml.nonfinite import FiniteGuard
from idml.optim import build_optimizer, build_schedule
from idml.run import Run
from idml.runtime import choose_device, keep_freed_memory, place_model, seed_everything
from idml.state import TrainingState

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's notes about itself

VARIANTS: dict[str, list[str]] = {
    "off": ["--ism", "off"],
    "off, again": ["--ism", "off"],
    "live": ["--ism", "live"],
    "released": ["--ism", "released"],
    "released, restated": ["--ism", "released"],
}
DEAREST = 12
"""Operations in a profile."""


@dataclasses.dataclass(frozen=True, slots=True)
class Network:
    """What is trained: timm name, pixels, images a step on a GPU and on the CPU, classes, uncertainty dimensions."""

    name: str
    size: int
    batch: int
    cpu_size: int
    cpu_batch: int
    classes: int
    uncertainty_dim: int


NETWORKS = {
    "resnet20": Network("resnet20_cifar", 32, 128, 32, 128, 10, 128),
    "resnet50": Network("resnet50", 224, 128, 128, 16, 1000, 512),
    "vit_s": Network("vit_small_patch16_224", 224, 128, 128, 16, 1000, 512),
}
QUICK = Network("resnet8_cifar", 32, 16, 32, 16, 10, 128)


class RestatedClassifier(IntrospectiveClassifier):
    """``released`` with the operations of the authors' code in place of ours; the numbers are the same."""

    def forward(self, images: Tensor) -> ClassifierOutput:
        features = self.backbone(images)
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            head = self.uncertainty_head
            assert isinstance(head, nn.Linear)
            logits, uncertainty = self.classifier(features), functional.relu(head(features))
            identity = torch.eye(features.shape[1], device=features.device)
            vectors = self.classifier(identity)  # (D, C): column c is W_c, with b_c added to every number
            squares = features.square().sum(1, keepdim=True) + vectors.square().sum(0, keepdim=True)
            alpha = squares - 2 * features @ vectors
            beta = uncertainty.square().sum(1, keepdim=True).expand_as(alpha)
            introspective = 1 - (1 - logits) * torch.exp(-beta / (self.temperature * alpha))
        return ClassifierOutput(logits, introspective, features, uncertainty)


class Training:
    """A training of one variant, of which ``step`` makes one step of train_cls.py on the same images every time."""

    def __init__(
        self,
        variant: str,
        network: Network,
        folder: Path,
        device: torch.device,
        *,
        on_cpu: bool,
        precision: str,
        compiled: bool,
    ) -> None:
        size, batch = (network.cpu_size, network.cpu_batch) if on_cpu else (network.size, network.batch)
        options = [*VARIANTS[variant], "--mix", "none", "--image-size", str(size), "--batch-size", str(batch)]
        options += ["--lr", "0.01", "--precision", precision, "--loader", "torch", "--val-fraction", "0"]
        options += ["--uncertainty-dim", str(network.uncertainty_dim)] if "off" not in variant else []
        options += ["--crop-padding", "4" if size < 64 else "0", *(["--compile"] if compiled else [])]
        self.config: ClsConfig = parse_cls_config(options, description="")[0]
        seed_everything(self.config.seed)
        self.data = read_splits(self.config)
        self.model = place_model(build(variant, network, size, self.config), device, channels_last=True,
                                 sync_bn=False, tf32=True)  # fmt: skip
        optimizer = build_optimizer(self.model, self.config)
        self.state = TrainingState(
            model=self.model,
            network=train_cls.wrap(self.model, self.config, device),
            optimizer=optimizer,
            schedule=build_schedule(optimizer, self.config, steps_per_epoch=1000, total_steps=100_000),
            scaler=torch.amp.GradScaler(device.type, enabled=False),
            generator=torch.Generator().manual_seed(self.config.seed),
            seed=self.config.seed,
            own_share=True,
        )
        with contextlib.redirect_stdout(None):  # it says which loader it takes
            loader = build_cls_loaders(self.data, self.config, pin_memory=False).train
        self.guard = FiniteGuard(Run(folder / variant, self.config), self.state, loader)
        chosen = list(range(batch))
        self.images = loader.images_at(chosen).to(device)
        self.labels = torch.tensor(self.data.train.labels[:batch]).to(device)

    def step(self) -> None:
        """One step, as ``train_cls.train_epoch`` takes it."""
        config, state, preprocessing = self.config, self.state, self.data.preprocessing
        self.model.train()
        images = train_cls.crop_and_flip(self.images, config, state.generator)
        batch = train_cls.colour_and_mix(images, self.labels, config, preprocessing, state.generator)
        train_cls.step(state, self.guard, batch, config, len(images) * distributed.world_size())
        state.epoch_losses.clear()
        if images.device.type == "cpu":
            self.guard.check()
        else:
            self.guard._noted.clear()  # the scripts look at losses every 50 steps


def build(variant: str, network: Network, size: int, config: ClsConfig) -> IntrospectiveClassifier:
    """The model of a variant."""
    make = RestatedClassifier if variant == "released, restated" else IntrospectiveClassifier
    return make(
        create_backbone(network.name, image_size=size),
        network.classes,
        uncertainty_dim=config.uncertainty_dim,
        ism=config.ism,
    )


def dearest(training: Training, device: torch.device, steps: int) -> list[dict[str, Any]]:
    """The operations that take the most time by themselves, with their share of a step."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            training.step()
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, attribute))
    whole = sum(getattr(event, attribute) for event in events) or 1
    return [
        {
            "operation": event.key,
            "self_ms_per_step": getattr(event, attribute) / 1000 / steps,
            "share": getattr(event, attribute) / whole,
            "calls_per_step": event.count / steps,
        }
        for event in events[:DEAREST]
    ]


def waits(training: Training) -> int | None:
    """How often a step makes the program wait for a GPU, by torch's own account; None on the CPU."""
    if training.images.device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        training.step()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def measure(
    network: Network, device: torch.device, *, on_cpu: bool, compiled: bool, budget: float, quick: bool
) -> dict[str, Any]:
    """The figures of all variants of one network."""
    precision = "fp32" if device.type == "cpu" else "bf16"
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"on_cpu": on_cpu, "precision": precision, "compiled": compiled}
        trainings = {name: Training(name, network, Path(folder), device, **settings) for name in VARIANTS}
        steps: dict[str, Callable[[], None]] = {name: training.step for name, training in trainings.items()}
        rounds = 3 if quick else None
        rows = compared(in_turn(steps, budget=budget, rounds=rounds, warmup=4, device=device), to="off")
        profiled = {name: dearest(trainings[name], device, 2 if quick else 10) for name in ("off", "live")}
        waited = {name: waits(training) for name, training in trainings.items()}
    images = trainings["off"].images
    return {
        "network": network.name,
        "images": list(images.shape),
        "precision": precision,
        "compiled": compiled,
        "variants": rows,
        "profile": profiled,
        "waits_per_step": waited,
    }


def main() -> None:
    options = parser(__doc__, parts=tuple(NETWORKS))
    options.add_argument("--full", action="store_true", help="sizes and batches of a GPU on the CPU too")
    options.add_argument("--seconds", type=float, default=100, help="that the timed steps of one part may take")
    arguments = options.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    keep_freed_memory(device)
    path = results_path("ism", quick=arguments.quick, out=arguments.out)
    networks = {"resnet8": QUICK} if arguments.quick else {name: NETWORKS[name] for name in arguments.parts}
    for name, network in networks.items():
        for compiled in (False, True) if device.type == "cuda" and not arguments.quick else (False,):
            made_with = conditions()
            figures = measure(
                network,
                device,
                on_cpu=device.type == "cpu" and not arguments.full,
                compiled=compiled,
                budget=arguments.seconds,
                quick=arguments.quick,
            )
            part = f"{name}, {device.type}{', compiled' if compiled else ''}"
            store(path, part, figures, made_with)
            title = f"{part}: {figures['images']}, {figures['precision']}, {made_with['hardware']}"
            print_comparison(title, figures["variants"], to="off")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    run_main(main)
