"""Is the uncertainty any good? Every score of every method beside those that cost nothing, several seeds each.

    python benchmarks/uncertainty.py --emoji emoji64.npz     Fashion-MNIST, digits, emoji
    python benchmarks/uncertainty.py --parts fashion-mnist   only the first
    python benchmarks/uncertainty.py --quick                 a few steps on the embedded sets: that it runs

Classification: ResNet-20 on 20,000 images of Fashion-MNIST (a tenth of them held out to calibrate on), tested on its
10,000 test images; ResNet-8 on scikit-learn's digits. Of each score: how well it ranks the errors (error AUROC, AURC,
E-AURC, AUGRC, risk at 80 % coverage, coverage at 5 % risk) and how well it tells clean test images from the same ones
mixed, cut, blurred, noisy and cropped, and from the other data set of the two (AUROC).
Retrieval: ProxyAnchor off and live on the emoji pack (a tenth of the training classes held out), tested on unseen
classes: the same, an error being a nearest neighbour of another class.

The six methods are those of the paper; "+ foresight" is the same method with --uncertainty-loss loss-prediction.

Prints Markdown tables for each part (mean and standard deviation over the seeds), and what the pairs differ by; every
figure goes to benchmarks/results/uncertainty.json with hardware, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from augment import SHIFTS, normalise, shift_images
from idml.checkpoint import read_checkpoint
from idml.config_cls import METHODS, parse_cls_config
from idml.config_dml import parse_dml_config
from idml.data.datasets import read_idx, read_splits
from idml.data.image_dataset import ImageDataset, Preprocessing
from idml.data.retrieval_datasets import read_retrieval_data
from idml.data.torch_loader import TorchLoader
from idml.environment import git_commit, hardware, versions
from idml.errors import run_main
from idml.foresight import SEARCH_EVIDENCE, search_evidence
from idml.metrics import auroc, calibration_metrics, nearest_neighbours, selective_metrics
from idml.models import uncertainty_score
from idml.scores import FREE_SCORES, classifier_scores
from train_cls import build_model as build_classifier
from train_dml import build_model as build_embedder

ROOT = Path(__file__).resolve().parents[1]
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
TRAINING_IMAGES = 20_000
SHIFTED_IMAGES = 2_000
"""Test images that are shifted, the first of them, and compared with all clean ones."""

COLUMNS = {
    "error_auroc": "error AUROC",
    "e_aurc": "E-AURC",
    "aurc": "AURC",
    "augrc": "AUGRC",
    "risk_at_coverage": "risk at 80 %",
    "coverage_at_risk": "coverage at 5 %",
    **{kind: kind for kind in SHIFTS},
    "other set": "other set",
}

FORESIGHT = " + foresight"
"""Behind the name of a method that is trained with loss prediction."""

METHOD_NAMES = [*METHODS, *(name + FORESIGHT for name, (ism, _) in METHODS.items() if ism != "off")]
PAIRS = {
    "ism + foresight": "baseline",
    "idml-mixup + foresight": "mixup",
    "idml-cutmix + foresight": "cutmix",
    "ProxyAnchor live + foresight": "ProxyAnchor off",
}
"""What each method with foresight is compared with: the same, plain."""

MORE_SEEDS = (
    *("mixup", "idml-mixup + foresight"),
    *("ProxyAnchor off", "ProxyAnchor live + foresight"),
)
"""The pairs that ``--more-seeds`` adds seeds to."""

ON_DIGITS = ("baseline", "ism", "ism + foresight", "mixup", "idml-mixup", "idml-mixup + foresight")
"""Digits are for checking what Fashion-MNIST says: these methods."""

Scores = dict[str, Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]


def subset_of_fashion_mnist(folder: Path, count: int = TRAINING_IMAGES) -> None:
    """The first training images and all test images, as IDX files that the data set's own reader takes."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            values = read_idx(FASHION_MNIST / f"{part}-{kind}.gz")
            values = values[:count] if part == "train" else values
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            (folder / f"{part}-{kind}").write_bytes(head + values.tobytes())


def train(script: str, options: list[str], run: Path) -> None:
    """One run of a training script, unless an earlier call has left it whole."""
    if (run / "results.json").exists():
        return
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, str(ROOT / script), *options, "--threads", "1", "--no-verbose", "--output-dir", str(run)]
    started = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    print(f"{run.name}: {time.perf_counter() - started:.0f} s", flush=True)


def batches(images: ImageDataset, size: int) -> Batches:
    """The images as an evaluation sees them, uint8."""
    return TorchLoader(images, batch_size=250, image_size=size, train=False, workers=0).epoch(0)


def rank_and_tell(scores: Scores, right: Tensor, shifted: dict[str, Scores]) -> dict[str, dict[str, float]]:
    """The figures of every score: how it ranks the errors of clean images, and tells these from shifted ones."""
    rows = {}
    for name, score in scores.items():
        rows[name] = selective_metrics(score, right)
        rows[name] |= {kind: auroc(others[name], score) for kind, others in shifted.items() if name in others}
    return rows


def score_all(score: Callable[[Tensor], Scores], clean: Batches, kind: str | None, seed: int) -> Scores:
    """Scores of all images, clean or shifted; the same shifts for every model."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Scores] = []
    for images, labels in clean:
        found.append(score(images if kind is None else shift_images(images, labels, kind, generator)))
    return {name: torch.cat([batch[name] for batch in found]) for name in found[0]}


def measure_classifier(run: Path) -> dict[str, Any]:
    """All figures of a trained classifier on its test images."""
    config, _ = parse_cls_config(["--eval-only", "--checkpoint", str(run / "checkpoints/last.pt")], description="")
    data = read_splits(config)
    model = build_classifier(config, data)
    model.load_state_dict(read_checkpoint(run / "checkpoints/last.pt")["model"])
    model.eval()
    size, generator = data.preprocessing.image_size, torch.Generator().manual_seed(0)
    probabilities: list[Tensor] = []

    @torch.no_grad()
    def score(images: Tensor) -> Scores:
        output = model(normalise(images, data.preprocessing.mean, data.preprocessing.std))
        probabilities.append(output.logits.softmax(1))
        return classifier_scores(model, output, generator)

    scores = score_all(score, batches(data.test, size), None, 0)
    chances, labels = torch.cat(probabilities), torch.from_numpy(data.test.labels)
    right = chances.argmax(1) == labels
    some = data.test.subset(np.arange(min(SHIFTED_IMAGES, len(data.test))))
    shifted = {kind: score_all(score, batches(some, size), kind, 1) for kind in SHIFTS}
    name = "fashion-mnist-mini" if config.dataset == "digits" else "digits"
    other, _ = parse_cls_config(["--dataset", name, "--image-size", str(size)], description="")
    shifted["other set"] = score_all(score, batches(read_splits(other).test, size), None, 0)
    run_figures = {"top1": right.double().mean().item()} | calibration_metrics(chances, labels)
    return {"run": run_figures, "scores": rank_and_tell(scores, right, shifted)}


def measure_embedder(run: Path) -> dict[str, Any]:
    """All figures of a trained embedder on its test images, which search one another."""
    checkpoint = read_checkpoint(run / "checkpoints/last.pt")
    config, _ = parse_dml_config(["--config", str(run / "config.yaml"), "--output-dir", str(run)], description="")
    data = read_retrieval_data(config)
    model = build_embedder(config, len(data.train.classes))
    model.load_state_dict(checkpoint["model"])
    model.eval()
    preprocessing: Preprocessing = data.preprocessing
    generator = torch.Generator().manual_seed(0)
    labels = torch.from_numpy(data.test.labels)

    @torch.no_grad()
    def embed(images: Tensor) -> Scores:
        output = model(normalise(images, preprocessing.mean, preprocessing.std))
        found = {"semantic": output.semantic, "-|feature|": -output.norm}
        found["random"] = torch.rand(len(images), generator=generator)
        if output.foreseen_loss is not None:
            found |= {"foreseen loss": output.foreseen_loss, "altered": output.altered}
            return found | {"belief": output.belief}
        return found | ({"|u|": uncertainty_score(output)} if config.ism != "off" else {})

    clean = score_all(embed, batches(data.test, preprocessing.image_size), None, 0)
    gallery = clean["semantic"]
    neighbours, similarities = nearest_neighbours(gallery, 2)
    right = labels[neighbours[:, 0]] == labels

    def scores_of(found: Scores, nearest: Tensor, near: Tensor) -> Scores:
        """Of queries with their (Q,) nearest and (Q, 2) similarities."""
        scores = {"1 - top similarity": 1 - near[:, 0], "gap to the second": near[:, 1] - near[:, 0]}
        scores |= {name: value for name, value in found.items() if value.ndim == 1}
        if "belief" in found:
            shown = (clean["belief"][nearest], clean["foreseen loss"][nearest])
            evidence = search_evidence(found["belief"], found["foreseen loss"], *shown, near)
            scores["belief apart"] = evidence[:, SEARCH_EVIDENCE.index("belief")]
            scores["P(wrong)"] = model.search_calibration(evidence)
        return scores

    scores = scores_of(clean, neighbours[:, 0], similarities)
    shifted = {}
    for kind in SHIFTS:
        found = score_all(embed, batches(data.test, preprocessing.image_size), kind, 1)
        # The clean image of a shifted one is left out of what it finds, as it is for the clean ones.
        among = found["semantic"] @ gallery.T
        among.fill_diagonal_(-1)
        near, nearest = among.topk(2, dim=1)
        shifted[kind] = scores_of(found, nearest[:, 0], near)
    return {"run": {"R@1": right.double().mean().item()}, "scores": rank_and_tell(scores, right, shifted)}


Job = tuple[str, list[str]]
"""A training script and its options."""

Measure = Callable[[Path], dict[str, Any]]


def train_and_measure(jobs: dict[str, Job], measure: Measure, folder: Path, processes: int) -> list[dict[str, Any]]:
    """The figures of several runs, trained beside one another; a job's name is that of its folder.

    What an earlier call has left whole in the folder is neither trained nor measured again.
    """

    def work(name: str) -> dict[str, Any]:
        train(*jobs[name], folder / name)
        stored = folder / name / "uncertainty.json"
        if not stored.exists():
            figures = measure(folder / name) | {"run name": name}
            stored.write_text(json.dumps(figures) + "\n", encoding="utf-8")
        return json.loads(stored.read_text(encoding="utf-8"))

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(work, jobs))


def rows_of(
    variants: dict[str, Job], measure: Measure, arguments: argparse.Namespace, folder: Path, prefix: str
) -> dict[str, list[dict[str, Any]]]:
    """A row of runs for each variant, one a seed."""
    jobs: dict[str, Job] = {}
    row_of: list[str] = []
    for name, (script, options) in variants.items():
        for seed in [*arguments.seeds, *(arguments.more_seeds if name in MORE_SEEDS else [])]:
            short = name.replace(FORESIGHT, "-foresight").replace(" ", "-")
            jobs[f"{prefix}{short}-s{seed}"] = (script, [*options, "--seed", str(seed)])
            row_of.append(name)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for name, figures in zip(row_of, train_and_measure(jobs, measure, folder, arguments.processes), strict=True):
        rows[name].append(figures)
    return rows


def classification(
    names: Iterable[str], arguments: argparse.Namespace, folder: Path, options: list[str], prefix: str
) -> dict[str, list[dict[str, Any]]]:
    """Methods on one data set."""
    variants: dict[str, Job] = {}
    for name in names:
        method, *foresight = name.split(FORESIGHT)
        chosen = [*options, "--method", method]
        if METHODS[method][0] != "off":
            chosen += ["--uncertainty-loss", "loss-prediction" if foresight else "none"]
        variants[name] = ("train_cls.py", chosen)
    return rows_of(variants, measure_classifier, arguments, folder, prefix)


def fashion_mnist(arguments: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Six methods, and three with foresight, on Fashion-MNIST."""
    if arguments.quick:
        options = ["--dataset", "fashion-mnist-mini", "--model", "resnet8_cifar", "--max-steps", "10"]
    else:
        subset_of_fashion_mnist(folder / "fashion-mnist")
        options = ["--dataset", "fashion-mnist", "--data-dir", str(folder / "fashion-mnist"), "--loader", "torch"]
        options += ["--model", "resnet20_cifar", "--image-size", "28", "--batch-size", "128"]
        options += ["--epochs", str(arguments.epochs)]
    names = arguments.methods or METHOD_NAMES
    return classification(names, arguments, folder, [*options, "--val-fraction", "0.1"], "")


def digits(arguments: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The same on scikit-learn's digits."""
    options = ["--dataset", "digits", "--model", "resnet8_cifar", "--val-fraction", "0.2", "--batch-size", "32"]
    options += ["--epochs", "1" if arguments.quick else "6"]
    names = [name for name in ON_DIGITS if arguments.methods is None or name in arguments.methods]
    return classification(names, arguments, folder, options, "digits-")


def retrieval(arguments: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """ProxyAnchor, plain, live, and live with foresight."""
    options = ["--config", str(ROOT / "configs/quick/emoji.yaml"), "--mix", "none", "--val-fraction", "0.1"]
    if arguments.quick:
        options += ["--dataset", "emoji-mini", "--max-steps", "4"]
    else:
        options += ["--data-dir", str(Path(arguments.emoji).resolve()), "--loader", "torch"]
    kinds = {
        "ProxyAnchor off": ["--ism", "off"],
        "ProxyAnchor live": ["--ism", "live", "--uncertainty-loss", "none"],
        "ProxyAnchor live" + FORESIGHT: ["--ism", "live", "--uncertainty-loss", "loss-prediction"],
    }
    variants: dict[str, Job] = {name: ("train_dml.py", [*options, *kind]) for name, kind in kinds.items()}
    return rows_of(variants, measure_embedder, arguments, folder, "emoji-")


def cell(values: list[float]) -> str:
    """Mean and standard deviation."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def print_table(rows: dict[str, list[dict[str, Any]]]) -> None:
    """A Markdown table: a line for every score of every method, the method's own figures in the same line."""
    own = list(next(iter(rows.values()))[0]["run"])
    head = ["method", "n", *own, "score", *COLUMNS.values()]
    print("\n| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for method, runs in rows.items():
        figures = [str(len(runs)), *(cell([run["run"][key] for run in runs]) for key in own)]
        for score in runs[0]["scores"]:
            cells = [
                cell([run["scores"][score][key] for run in runs]) if key in runs[0]["scores"][score] else "-"
                for key in COLUMNS
            ]
            print("| " + " | ".join([method, *figures, score, *cells]) + " |")


def differences(rows: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, list[float]]]:
    """Per seed, for each method with foresight, what the issue of the method is judged by.

    Of the run itself: the error AUROC and E-AURC of P(wrong) less those of the best free score in the same run. Against
    the plain method with the same seed: the accuracy, or R@1.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for name, other in PAIRS.items():
        if name not in rows:
            continue
        free = "1 - max softmax" if "1 - max softmax" in rows[name][0]["scores"] else "1 - top similarity"
        baselines = [key for key in rows[name][0]["scores"] if key in (*FREE_SCORES, "1 - top similarity")]
        columns: dict[str, list[float]] = {}
        for score in ("P(wrong)", "belief" if free == "1 - max softmax" else "foreseen loss"):
            columns[f"error AUROC, {score} less {free}"] = [
                run["scores"][score]["error_auroc"] - run["scores"][free]["error_auroc"] for run in rows[name]
            ]
        columns["E-AURC, P(wrong) less the lowest of the free scores"] = [
            run["scores"]["P(wrong)"]["e_aurc"] - min(run["scores"][key]["e_aurc"] for key in baselines)
            for run in rows[name]
        ]
        if other in rows:
            key = next(iter(rows[name][0]["run"]))
            pairs = zip(rows[name], rows[other], strict=False)
            columns[f"{key}, less that of {other}"] = [mine["run"][key] - its["run"][key] for mine, its in pairs]
        found[name] = columns
    return found


def print_differences(found: dict[str, dict[str, list[float]]]) -> None:
    """A Markdown table of means with 95 % intervals (Student's t over the seeds)."""
    from scipy.stats import t

    print("\n| method | difference | n | mean | 95 % interval |\n|---|---|---|---|---|")
    for name, columns in found.items():
        for what, values in columns.items():
            count, mean = len(values), statistics.mean(values)
            interval = "-"
            if count > 1:
                half = t.ppf(0.975, count - 1) * statistics.stdev(values) / count**0.5
                interval = f"{mean - half:+.4f} to {mean + half:+.4f}"
            print(f"| {name} | {what} | {count} | {mean:+.4f} | {interval} |")


def without_places(options: list[str]) -> list[str]:
    """The options without the folder of the runs, and files by their names alone."""
    kept = [text for before, text in zip(["", *options], options, strict=False) if "--runs" not in (before, text)]
    return [Path(text).name if text.endswith(".npz") else text for text in kept]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--emoji", help="the .npz of the emoji pack")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--more-seeds", type=int, nargs="*", default=[4, 5], help=f"of {', '.join(MORE_SEEDS)}")
    parser.add_argument("--methods", nargs="+", choices=METHOD_NAMES, help="of classification; default all")
    parser.add_argument("--epochs", type=int, default=4, help="on Fashion-MNIST")
    parser.add_argument("--processes", type=int, default=2, help="runs beside one another, one thread each")
    parser.add_argument("--runs", type=Path, help="folder of the runs; those that are whole are not trained again")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/uncertainty.json")
    parser.add_argument("--quick", action="store_true", help="a few steps on the embedded sets, one seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if "retrieval" in arguments.parts and not arguments.quick and arguments.emoji is None:
        parser.error("--emoji is needed (or --quick, or --parts fashion-mnist digits)")
    if arguments.quick:
        arguments.seeds, arguments.more_seeds, arguments.out = (
            [1],
            [],
            arguments.out.with_stem(arguments.out.stem + "-quick"),
        )
    # Parts that are not run now keep what was measured before.
    stored = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.runs or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for part in arguments.parts:
            rows = PARTS[part](arguments, folder)
            print_table(rows)
            print_differences(differences(rows))
            print(f"{hardware()}")
            stored[part] = {
                "rows": rows,
                "differences": differences(rows),
                "seeds": [*arguments.seeds, *arguments.more_seeds],
                "hardware": hardware(),
                "versions": versions(),
                "commit": git_commit(),
                "command": " ".join(["python", "benchmarks/uncertainty.py", *without_places(sys.argv[1:])]),
            }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    print(f"stored in {arguments.out}")


PARTS = {"fashion-mnist": fashion_mnist, "digits": digits, "retrieval": retrieval}

if __name__ == "__main__":
    run_main(main)
