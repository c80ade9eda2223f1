"""A retrieval step with Mixup, in one forward pass and in two; and the loss by the number of classes.

    python benchmarks/bench_dml.py --quick
    python benchmarks/bench_dml.py                      under 8 minutes on 2 CPU cores
    python benchmarks/bench_dml.py --parts loss --classes 100 11318

Parts:
    step  ProxyAnchor with Mixup and frozen batch norm (ResNet-50; 224 pixels, batches of 120 and 512 in bf16 on a
          GPU, 128 pixels and 16 in float32 on the CPU). "one forward" is train_dml.py: images and mixed images go
          through the network together. "two forwards" differs in that alone; "released arithmetic" computes the loss
          too as the authors' code does. The target is released / one forward >= 1.5.
    loss  ProxyAnchor forward and backward on a batch of 120 embeddings of 512 + 512 numbers, for 100 to 100,000
          classes: pytorch-metric-learning's, ours with ISM off, live and released, and the released formula restated.
          Seconds, and the most memory it takes beyond embeddings, proxies and their gradients.

Writes benchmarks/results/dml.json.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the scripts do; see idml.runtime.keep_freed_memory

import torch
from pytorch_metric_learning.losses import ProxyAnchorLoss
from timing import compared, conditions, in_turn, parser, print_comparison, results_path, store
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

import train_dml
from idml.config_dml import parse_dml_config
from idml.data.dml_loaders import build_dml_loaders
from idml.data.retrieval_datasets import read_retrieval_data
from idml.embedder import EmbedderOutput, IntrospectiveEmbedder
from idml.errors import run_main
from idml.losses import MetricLoss, scale_uncertainty_head
from idml.nonfinite import FiniteGuard
from idml.optim import build_dml_optimizer, build_dml_schedule
from idml.run import Run
from idml.runtime import choose_device, freeze_batch_norm, keep_freed_memory, place_model, seed_everything
from idml.state import TrainingState

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's notes about itself

CLASSES = (100, 1_000, 11_318, 100_000)
ALPHA, MARGIN, TEMPERATURE, OFFSET = 32.0, 0.1, 5.0, 4.0
"""Of the released loss."""


class TwoForwards(nn.Module):
    """In place of ``train_dml.Parts``: each batch of images goes through the network by itself, as released."""

    def __init__(self, model: IntrospectiveEmbedder) -> None:
        super().__init__()
        self.model = model

    def forward(self, *parts: Tensor) -> list[EmbedderOutput]:
        return [self.model(images) for images in parts]


class RestatedLoss(MetricLoss):
    """The released ISM ProxyAnchor with a product for the cosine, another for alpha, and masks of ones and zeros."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        assert self.proxies is not None
        semantic, uncertainty = embeddings[:, : self.embedding_dim], embeddings[:, self.embedding_dim :]
        cosine = functional.normalize(semantic, dim=1) @ functional.normalize(self.proxies, dim=1).T
        squares = semantic.square().sum(1, keepdim=True) + self.proxies.square().sum(1)
        alpha = squares - 2 * semantic @ self.proxies.T
        beta = uncertainty.square().sum(1, keepdim=True).expand_as(alpha)
        similarity = 1 - (1 - cosine) * torch.exp(-(beta + OFFSET) / (TEMPERATURE * alpha))
        own = functional.one_hot(labels, len(self.proxies)).float()
        pull = torch.where(own == 1, torch.exp(-ALPHA * (similarity - MARGIN)), torch.zeros_like(similarity)).sum(0)
        push = torch.where(own == 0, torch.exp(ALPHA * (similarity + MARGIN)), torch.zeros_like(similarity)).sum(0)
        present = (own.sum(0) > 0).sum()
        return torch.log(1 + pull).sum() / present + torch.log(1 + push).sum() / len(self.proxies)


class Training:
    """A retrieval training, of which ``step`` makes one step of train_dml.py on the same images every time."""

    def __init__(
        self, variant: str, folder: Path, device: torch.device, *, model: str, size: int, batch: int, ism: str
    ) -> None:
        options = ["--dataset", "emoji-mini", "--model", model, "--image-size", str(size), "--batch-size", str(batch)]
        options += ["--loss", "Proxy_Anchor", "--ism", ism, "--mix", "mixup", "--bn-freeze", "1", "--warm", "0"]
        options += ["--precision", "fp32" if device.type == "cpu" else "bf16", "--lr", "1e-4"]
        options += ["--val-fraction", "0"]
        self.config = config = parse_dml_config(options, description="")[0]
        seed_everything(config.seed)
        self.data = read_retrieval_data(config)
        classes = len(self.data.train.classes)
        built = train_dml.build_model(config)
        place_model(built, device, channels_last=config.channels_last, sync_bn=False, tf32=config.tf32)
        self.model, self.loss = built, train_dml.build_loss(config, classes).to(device)
        if variant == "released arithmetic":
            self.loss.__class__ = RestatedLoss
        freeze_batch_norm(self.model)
        with contextlib.redirect_stdout(None):  # it says which loaders it takes
            loaders = build_dml_loaders(self.data, config, pin_memory=False)
        chosen = list(range(batch))
        self.images = loaders.train.images_at(chosen).to(device)
        self.labels = torch.arange(batch, device=device) % classes
        scale_uncertainty_head(
            self.model, self.loss, train_dml.normalised(self.images, config, self.data.preprocessing)
        )
        optimizer = build_dml_optimizer(self.model, self.loss, config)
        self.state = TrainingState(
            model=self.model,
            network=train_dml.wrap(self.model, config) if variant == "one forward" else TwoForwards(self.model),
            loss=self.loss,
            optimizer=optimizer,
            schedule=build_dml_schedule(optimizer, config, steps_per_epoch=100),
            scaler=torch.amp.GradScaler(device.type, enabled=False),
            generator=torch.Generator().manual_seed(config.seed),
            seed=config.seed,
            own_share=False,
        )
        self.guard = FiniteGuard(Run(folder / variant, config), self.state, loaders.train)

    def step(self) -> None:
        """One step, as ``train_dml.train_epoch`` takes it."""
        state, config = self.state, self.config
        state.network.train()
        freeze_batch_norm(self.model)
        images = train_dml.crop_and_flip(self.images, self.data, state.generator, len(self.images))
        images = train_dml.normalised(images, config, self.data.preprocessing)
        batch = train_dml.mix(images, self.labels, config, state.generator, len(images))
        train_dml.step(state, self.guard, images, batch, config, len(images))
        state.epoch_losses.clear()
        self.guard._noted.clear()


def measure_step(device: torch.device, batch: int, budget: float, *, quick: bool) -> dict[str, Any]:
    """A step with one forward pass against one with two."""
    size = 224 if device.type == "cuda" else 128
    settings: dict[str, Any] = {"model": "resnet50", "size": size, "batch": batch}
    if quick:
        settings = {"model": "resnet8_cifar", "size": 32, "batch": 8}
    found: dict[str, Any] = {**settings, "bn_freeze": True, "mix": "mixup", "ism": {}}
    for ism, variants in {
        "released": ("one forward", "two forwards", "released arithmetic"),
        "live": ("one forward", "two forwards"),
    }.items():
        with tempfile.TemporaryDirectory() as folder:
            trainings = {name: Training(name, Path(folder), device, ism=ism, **settings) for name in variants}
            steps: dict[str, Callable[[], None]] = {name: each.step for name, each in trainings.items()}
            times = in_turn(steps, budget=budget / 2, rounds=3 if quick else None, device=device)
        rows = found["ism"][ism] = compared(times, to="one forward")
        shape = f"{settings['model']}, {settings['batch']} images of {settings['size']} pixels"
        print_comparison(f"a step with Mixup, ISM {ism}, {shape}", rows, to="one forward")
    return found


def peak_mib(function: Callable[[], Any], device: torch.device) -> float:
    """The most memory of torch's that a call takes beyond what is held before it, in MiB."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0)) / 2**20


def losses(classes: int, device: torch.device, dimensions: int) -> dict[str, nn.Module]:
    """The losses that are compared."""
    made: dict[str, nn.Module] = {
        "pytorch-metric-learning": ProxyAnchorLoss(classes, dimensions, margin=MARGIN, alpha=ALPHA),
        "off": MetricLoss("Proxy_Anchor", classes, dimensions, ism="off"),
        "live": MetricLoss("Proxy_Anchor", classes, dimensions, ism="live"),
        "released": MetricLoss("Proxy_Anchor", classes, dimensions, ism="released"),
        "released, restated": RestatedLoss("Proxy_Anchor", classes, dimensions, ism="released"),
    }
    return {name: loss.to(device) for name, loss in made.items()}


def forward_and_backward(loss: nn.Module, embeddings: Tensor, labels: Tensor) -> Tensor:
    """The loss of a batch, with gradients of embeddings and proxies."""
    introspective = getattr(loss, "ism", "off") != "off"
    given = embeddings if introspective else embeddings[:, : loss.proxies.shape[1]]
    given = given.detach().requires_grad_()
    loss.zero_grad(set_to_none=False)
    value: Tensor = loss(given, labels)
    value.backward()
    return value.detach()


def measure_loss(classes: int, device: torch.device, budget: float, *, quick: bool) -> dict[str, Any]:
    """Seconds and memory of each loss for one number of classes."""
    batch, dimensions = (8, 16) if quick else (120, 512)
    torch.manual_seed(0)
    semantic = functional.normalize(torch.randn(batch, dimensions), dim=1)
    uncertainty = functional.normalize(torch.randn(batch, dimensions), dim=1)
    whole = torch.cat([semantic, uncertainty], dim=1).to(device)
    labels = torch.randint(classes, (batch,)).to(device)
    compare = losses(classes, device, dimensions)

    calls = {name: partial(forward_and_backward, loss, whole, labels) for name, loss in compare.items()}
    values = {name: call().item() for name, call in calls.items()}
    rows = compared(in_turn(calls, budget=budget, rounds=3 if quick else None, device=device), to="off")
    for name, call in calls.items():
        rows[name] |= {"peak_mib": peak_mib(call, device), "loss": values[name]}
    print_comparison(f"ProxyAnchor forward and backward, {classes:,} classes, {batch} embeddings", rows, to="off")
    print("\npeak MiB: " + ", ".join(f"{name} {row['peak_mib']:.1f}" for name, row in rows.items()), flush=True)
    return {"classes": classes, "batch": batch, "dimensions": dimensions, "losses": rows}


def main() -> None:
    options = parser(__doc__, parts=("step", "loss"))
    options.add_argument("--batches", nargs="+", type=int, default=None, help="default: 120 and 512 on a GPU, 16 here")
    options.add_argument("--classes", nargs="+", type=int, default=None, help="default: 100 1000 11318 100000")
    options.add_argument("--seconds", type=float, default=150, help="that the timed calls of one part may take")
    arguments = options.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    keep_freed_memory(device)
    path = results_path("dml", quick=arguments.quick, out=arguments.out)
    if "step" in arguments.parts:
        batches = arguments.batches or ((120, 512) if device.type == "cuda" else (16,))
        for batch in batches:
            made_with = conditions()
            found = measure_step(device, batch, arguments.seconds / len(batches), quick=arguments.quick)
            store(path, f"step, {device.type}, {found['batch']} images", found, made_with)
    if "loss" in arguments.parts:
        counts = arguments.classes or ((10, 30) if arguments.quick else CLASSES)
        made_with = conditions()
        each = arguments.seconds / len(counts)
        rows = {str(count): measure_loss(count, device, each, quick=arguments.quick) for count in counts}
        store(path, f"loss, {device.type}", {"by_classes": rows}, made_with)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    run_main(main)
