"""Classification: three mixings, each plain and with the ISM in several geometries, paired by seed.

    python benchmarks/classification.py                       both sets: hours on 2 CPU cores; resumable
    python benchmarks/classification.py --sets embedded       ten seeds on the images in the package: an hour
    python benchmarks/classification.py --sets recipe         the course of the learning rate of the quick config
    python benchmarks/classification.py --quick               a few steps: that it runs

recipe: which course of the learning rate `configs/quick/fashion_mnist_mini.yaml` takes, chosen on a fifth of its
training images, and how low the accuracy falls after an epoch with it; three seeds.
embedded: ResNet-8 on the 5,000 training images in the package, `configs/quick/fashion_mnist_mini.yaml`, ten seeds;
alpha in other geometries, five.
fashion-mnist: ResNet-20 on the first 10,000 training images of Fashion-MNIST at 28 pixels, 12 epochs, five seeds, the
10,000 test images. Every row of a seed starts from the same weights and sees the same images, mixed in the same way.
Figures are of plain logits, except in the rows of cosine logits, which are a plain and an introspective classifier of
their own.

The tables go into docs/results.md, every run to benchmarks/results/classification.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fashion import subset_of_fashion_mnist
from paired import write_between
from studies import RESULTS, ROOT, Figures, Run, Study, arguments_of, replaced, table
from torch import Tensor
from torch.nn import functional

import train_cls
from idml import models
from idml.errors import run_main
from idml.similarity import introspective_similarity

MIXES = {"none": "", "mixup": "Mixup", "cutmix": "CutMix"}
VARIANTS = {
    "plain": (["--ism", "off"], ""),
    "live": (["--ism", "live"], ""),
    "released": (["--ism", "released"], ""),
    "live, unit vectors": (["--ism", "live"], "unit"),
    "cosine logits, plain": (["--ism", "off"], "cosine"),
    "cosine logits, live": (["--ism", "live"], "cosine"),
}
"""Options, and the function that changes the package."""

METHODS, GEOMETRY_SEEDS = ("plain", "live", "released"), 5
"""Variants that a user can choose; and seeds of the others."""

SETS = {
    "embedded": (["--config", str(ROOT / "configs/quick/fashion_mnist_mini.yaml")], 10, tuple(VARIANTS)),
    "fashion-mnist": (
        [
            *("--dataset", "fashion-mnist", "--model", "resnet20_cifar", "--image-size", "28"),
            *("--batch-size", "128", "--epochs", "12"),
        ],
        5,
        METHODS,
    ),
}
"""Options, seeds, and the variants that are trained."""

RECIPES = {
    "one-cycle to 0.1": ("--lr", "0.1", "--schedule", "onecycle"),
    "one-cycle to 0.05": ("--lr", "0.05", "--schedule", "onecycle"),
    "one-cycle to 0.02": ("--lr", "0.02", "--schedule", "onecycle"),
    "cosine from 0.1": ("--lr", "0.1", "--schedule", "cosine"),
}
"""Courses of the learning rate that are tried for the quick config; the others are compared with the first."""

TRAINING_IMAGES = 10_000
COSINE_SCALE = 16.0
"""Of cosine logits; of the order of the 16 to 64 that normalised softmax losses take."""

RECIPE_COLUMNS = {"top-1": "top1", "lowest top-1 from epoch 2 on": "lowest/top1", "NLL": "nll"}
COLUMNS = {"top-1": "top1", "NLL": "nll", "ECE": "ece"}


def held_out() -> Any:
    """The held-out training images in place of the test images, which are then never looked at."""
    read = train_cls.read_splits

    def changed(config: Any) -> Any:
        data = read(config)
        return dataclasses.replace(data, test=data.val, val=None)

    return replaced((train_cls, "read_splits", changed))


def unit() -> Any:
    """Alpha between the unit feature and the unit weight row; logits stay as they are."""

    def alpha(logits: Tensor, features: Tensor, weight: Tensor, bias: Tensor, **_: Any) -> Tensor:
        lengths = features.norm(dim=1, keepdim=True) * weight.norm(dim=1)
        return 2 - 2 * (logits - bias) / lengths.clamp_min(1e-12)

    return replaced((models, "class_sq_distances", alpha))


@contextlib.contextmanager
def cosine() -> Iterator[None]:
    """Logits are scaled cosines, and the ISM is of the cosine: plain and live alike."""
    before = models.IntrospectiveClassifier.forward

    def forward(self: Any, images: Tensor) -> models.ClassifierOutput:
        output = before(self, images)
        cosines = functional.linear(
            functional.normalize(output.semantic, dim=1), functional.normalize(self.classifier.weight, dim=1)
        )
        changed = cosines
        if self.ism != "off":  # u is to scale with alpha between unit vectors
            beta = output.uncertainty.square().sum(1, keepdim=True)
            changed = introspective_similarity(cosines, 2 - 2 * cosines, beta, temperature=self.temperature)
        return output._replace(logits=COSINE_SCALE * cosines, introspective_logits=COSINE_SCALE * changed)

    with unit(), replaced((models.IntrospectiveClassifier, "forward", forward)):
        yield


def runs_of(data: str, folder: Path, arguments: argparse.Namespace) -> list[Run]:
    """All runs of a set, seed by seed."""
    if data == "recipe":
        quick = ["--max-steps", "3"] if arguments.quick else []
        options = [*SETS["embedded"][0], "--loader", "torch", "--val-fraction", "0.2"]
        return [
            Run(
                row=f"recipe, {mix}: {variant}, {recipe}",
                seed=seed,
                options=(*options, *course, "--mix", mix, *VARIANTS[variant][0], *quick),
                script="train_cls",
                change="classification:held_out",
            )
            for seed in range(101, 102 if arguments.quick else 101 + (arguments.seeds or 3))
            for mix in ("none", "cutmix")
            for variant in ("plain", "live")
            for recipe, course in RECIPES.items()
        ]
    options, seeds, variants = SETS[data]
    options = [*options, "--loader", "torch", "--eval-every", "1000"]
    if data == "fashion-mnist":
        options += ["--data-dir", str(folder)]
    if arguments.quick:
        options += ["--max-steps", "3"]
    seeds = 1 if arguments.quick else arguments.seeds or seeds
    geometries = min(seeds, GEOMETRY_SEEDS)
    return [
        Run(
            row=f"{data}, {mix}: {variant}",
            seed=seed,
            options=(*options, "--mix", mix, *VARIANTS[variant][0]),
            script="train_cls",
            change=f"classification:{VARIANTS[variant][1]}" if VARIANTS[variant][1] else "",
        )
        for chosen, count in ((METHODS, seeds), (set(variants).difference(METHODS), geometries))
        for seed in range(1, 1 + count)
        for mix in MIXES
        for variant in variants
        if variant in chosen
    ]


def plain_row(name: str) -> str | None:
    """The row that a row is compared with."""
    mix, variant = name.split(": ")
    plain = "cosine logits, plain" if variant.startswith("cosine") else "plain"
    return None if variant == plain else f"{mix}: {plain}"


def before_row(name: str) -> str | None:
    """Of a recipe: the same with the first one."""
    first = next(iter(RECIPES))
    before = ", ".join([*name.split(", ")[:1], first])
    return None if name.endswith(first) else before


def report(rows: Figures, data: str) -> str:
    """Three tables: differences in accuracy, in NLL and in ECE."""
    named = {name.removeprefix(f"{data}, "): figures for name, figures in rows.items()}
    if data == "recipe":
        return table(named, RECIPE_COLUMNS, first="top-1", plain=before_row)
    accuracy = table(named, COLUMNS, first="top-1", plain=plain_row)
    nll = table(named, {"NLL": "nll"}, first="NLL", plain=plain_row)
    ece = table(named, {"ECE": "ece"}, first="ECE", plain=plain_row)
    return (
        f"{accuracy}\n\nThe same for the NLL, differences in hundredths of a nat:\n\n{nll}"
        f"\n\nThe same for the ECE:\n\n{ece}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sets", nargs="+", choices=["recipe", *SETS], default=["recipe", *SETS])
    parser.add_argument("--seeds", type=int, help="default 10 on embedded, 5 on fashion-mnist, 3 of the recipe")


def main() -> None:
    arguments = arguments_of(__doc__, add=add_arguments)
    torch.set_num_threads(1)
    if arguments.quick:
        arguments.sets = ["recipe", "embedded"]
    study = Study(RESULTS / "classification.json", quick=arguments.quick)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "fashion-mnist"
        if "fashion-mnist" in arguments.sets:
            subset_of_fashion_mnist(folder, TRAINING_IMAGES)
        for data in arguments.sets:
            runs = runs_of(data, folder, arguments)
            rows = study.do(runs, processes=arguments.processes, deadline=arguments.deadline)
            body = report(rows, data)
            print(f"\n{data}\n\n{body}\n", flush=True)
            if not arguments.no_docs:
                write_between(ROOT / "docs/results.md", f"classification {data}", body, script="classification.py")


if __name__ == "__main__":
    run_main(main)
