"""The small suite of `reproduce.py`: six classification methods on Fashion-MNIST, eight retrieval losses on emoji."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from paired import difference_cells, markdown_table, mean_cell, paired_differences
from uncertainty import FORESIGHT, METHOD_NAMES, TRAINING_IMAGES, Job, subset_of_fashion_mnist, train

from idml.config_cls import parse_cls_config
from idml.config_dml import parse_dml_config
from idml.errors import UserError
from idml.losses import LOSSES
from idml.resume import with_uncertainty_loss

ROOT = Path(__file__).resolve().parents[1]

CLS_MODEL = "resnet20_cifar"
"""The network that classification is measured with, unless --model says otherwise."""

ISM_OPTIONS = {
    "plain": ["--ism", "off"],
    "released": ["--ism", "released"],
    "live": ["--ism", "live", "--uncertainty-loss", "none"],
}
"""What a retrieval loss is trained with; ``live`` is the method alone, without loss prediction."""

PLAIN_OF = {
    name + more: plain
    for name, plain in {"ism": "baseline", "idml-mixup": "mixup", "idml-cutmix": "cutmix"}.items()
    for more in ("", FORESIGHT)
}
"""The plain counterpart of each introspective method: the same images, without the ISM."""

CLS_METRICS = {"top1": "top-1", "nll": "NLL", "ece": "ECE"}
DML_METRICS = {"R@1": "R@1", "MAP@R": "MAP@R", "other_families/R@1": "R@1 other families"}

PLACES = {"output_dir", "data_dir", "cache_dir", "loader", "workers", "threads", "verbose", "config", "resume"}
"""Options that change neither the images nor the network: a stored run may have others."""

Figures = dict[int, dict[str, Any]]
"""What a run's ``results.json`` holds of its last epoch, and where it came from; by seed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row of a table.

    Attributes:
        name: in the table.
        stem: of the run directories; the seed follows.
        job: the training script and its options but for the seed.
        plain: the name of the row that it is compared with, or None.
    """

    name: str
    stem: str
    job: Job
    plain: str | None = None


def classification_variants(arguments: argparse.Namespace, folder: Path) -> list[Variant]:
    """The methods on Fashion-MNIST, with the options (and run names) of ``benchmarks/uncertainty.py``."""
    if arguments.quick:
        options = ["--dataset", "fashion-mnist-mini", "--model", "resnet8_cifar", "--max-steps", "4"]
    else:
        subset_of_fashion_mnist(folder / "fashion-mnist", arguments.images)
        options = ["--dataset", "fashion-mnist", "--data-dir", str(folder / "fashion-mnist"), "--loader", "torch"]
        options += ["--model", arguments.model, "--image-size", "28", "--batch-size", "128"]
        options += ["--epochs", str(arguments.epochs)]
    variants = []
    for name in arguments.methods or METHOD_NAMES:
        method, *foresight = name.split(FORESIGHT)
        own = [*options, "--val-fraction", "0.1", "--method", method]
        if name in PLAIN_OF:
            own += ["--uncertainty-loss", "loss-prediction" if foresight else "none"]
        stem = name.replace(FORESIGHT, "-foresight")
        stem += "" if arguments.images == TRAINING_IMAGES else f"-{arguments.images}"
        stem += "" if arguments.model == CLS_MODEL else f"-{arguments.model}"
        variants.append(Variant(name=name, stem=stem, job=("train_cls.py", own), plain=PLAIN_OF.get(name)))
    return variants


def retrieval_variants(arguments: argparse.Namespace) -> list[Variant]:
    """Every loss, plain, released and live, on emoji; nothing is mixed, so that the ISM is all that differs."""
    if arguments.emoji is not None:
        config, pack = "configs/quick/emoji.yaml", ["--data-dir", str(Path(arguments.emoji).resolve())]
    else:
        config, pack = "configs/quick/emoji_mini.yaml", []
    options = ["--config", str(ROOT / config), *pack, "--mix", "none", "--loader", "torch", "--eval-every", "1000"]
    options += ["--max-steps", "2", "--no-nmi"] if arguments.quick else ["--epochs", str(arguments.emoji_epochs)]
    variants = []
    for loss in arguments.losses or LOSSES:
        own = [*options, "--loss", loss]
        if LOSSES[loss].needs_pairs:
            own += ["--IPC", "4"]
        if loss == "NPair":  # a product of unit vectors is too small a range for its softmax
            own += ["--l2-norm", "0"]
        for kind, ism in ISM_OPTIONS.items():
            name = loss if kind == "plain" else f"{loss} {kind}"
            stem = f"{'emoji' if pack else 'emoji-mini'}-{loss}-{kind}"
            plain = None if kind == "plain" else loss
            variants.append(Variant(name=name, stem=stem, job=("train_dml.py", [*own, *ism]), plain=plain))
    return variants


def check_stored(run: Path, script: str, options: list[str]) -> None:
    """UserError if the finished run in a folder was made with other options than those that are wanted."""
    parse: Callable[..., Any] = parse_cls_config if script == "train_cls.py" else parse_dml_config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself has warned of what has no effect
        wanted = dataclasses.asdict(parse(options, description="")[0])
    stored = with_uncertainty_loss(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    for name, value in wanted.items():
        # What the command leaves open, the data set decides; options of later versions did not exist yet.
        if name not in PLACES and value is not None and name in stored and stored[name] != value:
            raise UserError(
                f"{run} was made with {name} {stored[name]}, wanted {value}: give another --runs folder, or its options"
            )


def run_one(variant: Variant, seed: int, folder: Path) -> dict[str, Any]:
    """The figures of one run, trained now unless the folder holds it whole."""
    script, options = variant.job
    run = folder / f"{variant.stem}-s{seed}"
    options = [*options, "--seed", str(seed)]
    reused = (run / "results.json").exists()
    train(script, options, run)
    stored = json.loads((run / "results.json").read_text(encoding="utf-8"))
    about = {key: stored[key] for key in ("git_commit", "hardware", "wall_seconds", "versions", "model")}
    return {"final": stored["final"], "reused": reused, "command": public_command(script, options), **about}


def public_command(script: str, options: list[str]) -> str:
    """The command without the places of this machine."""
    kept = [
        Path(text).name if before == "--data-dir" else text.removeprefix(f"{ROOT}/")
        for before, text in zip(["", *options], options, strict=False)
    ]
    return " ".join(["python", script, *kept])


def run_all(variants: list[Variant], arguments: argparse.Namespace, folder: Path) -> dict[str, Figures]:
    """All runs, seed by seed: what a stopped suite has finished are whole pairs."""
    jobs = [(variant, seed) for seed in arguments.seeds for variant in variants]
    for variant, seed in jobs:  # before anything is trained
        run, (script, options) = folder / f"{variant.stem}-s{seed}", variant.job
        if (run / "results.json").exists():
            check_stored(run, script, [*options, "--seed", str(seed)])
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes

    def work(job: tuple[Variant, int]) -> dict[str, Any] | None:
        variant, seed = job
        late = deadline is not None and time.monotonic() > deadline
        if late and not (folder / f"{variant.stem}-s{seed}" / "results.json").exists():
            return None
        return run_one(variant, seed, folder)

    with ThreadPoolExecutor(arguments.processes) as pool:
        found = list(pool.map(work, jobs))
    left = sum(figures is None for figures in found)
    if left:
        print(f"warning: {left} of {len(jobs)} runs were left out after {arguments.minutes} minutes", file=sys.stderr)
    rows: dict[str, Figures] = {variant.name: {} for variant in variants}
    for (variant, seed), figures in zip(jobs, found, strict=True):
        if figures is not None:
            rows[variant.name][seed] = figures
    return rows


def values_of(runs: Figures, metric: str) -> dict[int, float]:
    """A figure of the last epoch, by seed, where it was measured."""
    return {seed: run["final"][metric] for seed, run in runs.items() if run["final"].get(metric) is not None}


def table(rows: Mapping[str, Figures], plain_of: Mapping[str, str | None], metrics: Mapping[str, str]) -> str:
    """Mean and spread of every row, and the paired difference of the first metric to the plain counterpart."""
    first = next(iter(metrics))
    head = ["", "n", *(title if key == "nll" else f"{title}, %" for key, title in metrics.items())]
    head += [f"{metrics[first]} less plain, points", "pairs", "95 % interval"]
    lines = []
    for name, runs in rows.items():
        if not runs:
            continue
        cells = [mean_cell(list(values_of(runs, key).values()), as_percent=key != "nll") for key in metrics]
        plain = rows.get(plain_of.get(name) or "", {})
        pairs = paired_differences(values_of(runs, first), values_of(plain, first))
        mean, interval = difference_cells(pairs)
        lines.append([name, str(len(runs)), *cells, mean, str(len(pairs)) if pairs else "-", interval])
    return markdown_table(head, lines)
