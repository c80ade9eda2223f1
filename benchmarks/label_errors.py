"""Does the audit find wrong labels? Five in a hundred are planted, and looked for in the top 5 % of each ranking.

    python benchmarks/label_errors.py           Fashion-MNIST, three methods, three seeds
    python benchmarks/label_errors.py --quick   a few steps on the embedded set: that it runs

5 % of the labels of 20,000 training images, drawn at random, are changed to another class, drawn at random. A model is
trained on them (ResNet-20, 4 epochs, a tenth of the images held out, with their wrong labels), and audits the images
that it was trained on and those held out. Of each ranking: the share of the planted errors among the first 5 % of the
images, over all, and over those held out alone. Random would find 5 %.

- ``loss``: cross-entropy of the given label by the plain logits, the usual baseline.
- ``audit``: what ``python -m idml audit`` ranks by (for a plain classifier the same order as the loss).
- ``belief loss``: the same as the loss, by the uncertainty head's own answer alone.
- ``disagrees, low P(wrong)``: images taken for another class, those that the model is surest of first.
- ``normalised loss``: less the class's mean probability of its own label, as confident learning has it (Northcutt et
  al. 2021).
- ``random``.

Prints a Markdown table; every figure goes to benchmarks/results/label_errors.json with hardware, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from uncertainty import FASHION_MNIST, ROOT, TRAINING_IMAGES, cell, train, without_places

from idml.audit.label_errors import class_doubt
from idml.commands.options import stored_config
from idml.data.collection import trained_on
from idml.data.datasets import read_idx
from idml.environment import git_commit, hardware, versions
from idml.errors import run_main
from idml.models import ClassifierOutput, uncertainty_score
from idml.trained import TrainedModel, load

METHODS = ("baseline", "ism", "idml-mixup")
SHARE = 0.05
"""Of the labels that are planted wrong, and of the ranking that is looked at."""


def write_idx(path: Path, values: np.ndarray) -> None:
    """uint8 values as the data set's own reader takes them."""
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(head + values.tobytes())


def plant(folder: Path, seed: int, *, quick: bool) -> None:
    """Fashion-MNIST with wrong labels in its training images, and ``true.npy`` with the right ones."""
    folder.mkdir(parents=True, exist_ok=True)
    if quick:
        with resources.files("idml.data.embedded").joinpath("fashion_mnist_mini.npz").open("rb") as file:
            arrays = dict(np.load(file))
        images, labels = arrays["train_images"], arrays["train_labels"]
        test = arrays["test_images"], arrays["test_labels"]
    else:
        parts = [
            [read_idx(FASHION_MNIST / f"{part}-{kind}.gz") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
            for part in ("train", "t10k")
        ]
        images, labels = (values[:TRAINING_IMAGES] for values in parts[0])
        test = parts[1][0], parts[1][1]
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(labels), round(SHARE * len(labels)), replace=False)
    given = labels.copy()
    given[chosen] = (labels[chosen] + generator.integers(1, 10, len(chosen))) % 10
    for part, values in (("train", (images, given)), ("t10k", test)):
        write_idx(folder / f"{part}-images-idx3-ubyte", values[0])
        write_idx(folder / f"{part}-labels-idx1-ubyte", values[1])
    np.save(folder / "true.npy", labels)


def rankings(model: TrainedModel, output: ClassifierOutput, labels: Tensor) -> dict[str, Tensor]:
    """Scores of a batch by every ranking, high where the label is probably wrong."""
    probabilities = output.logits.float().softmax(1)
    losses = torch.nn.functional.cross_entropy(output.logits.float(), labels, reduction="none")
    belief = None if output.foresight is None else output.foresight.belief.float().softmax(1)
    found = {"loss": losses, "audit": class_doubt(probabilities, belief, labels)[0]}
    unsure = 1 - probabilities.amax(1)
    if output.foresight is not None:
        found["belief loss"] = torch.nn.functional.cross_entropy(
            output.foresight.belief.float(), labels, reduction="none"
        )
        unsure = uncertainty_score(output)
    disagrees = probabilities.argmax(1) != labels
    found["disagrees, low P(wrong)"] = torch.where(disagrees, 2 - unsure, unsure)
    return found | {"of label": probabilities.gather(1, labels[:, None])[:, 0]}


def measure(run: Path, data: Path, seed: int) -> dict[str, Any]:
    """What each ranking finds of a trained model's training images."""
    model = load(run)
    collection = trained_on(stored_config(model))
    collection = collection.subset(np.flatnonzero(np.array(collection.splits) != "test"))
    true = true_labels(data, collection.dataset.images)
    given = torch.from_numpy(collection.dataset.labels)
    planted = true != given.numpy()
    batches = [
        rankings(model, model.outputs(images), labels)
        for images, labels in model.loader(collection.dataset, batch_size=250).epoch(0)
    ]
    scores = {name: torch.cat([batch[name] for batch in batches]).numpy() for name in batches[0]}
    of_label = scores.pop("of label")
    usual = np.array([of_label[given == label].mean() for label in range(10)])
    scores["normalised loss"] = usual[given] - of_label
    scores["random"] = np.random.default_rng(seed).random(len(given))
    held_out = np.array(collection.splits) == "val"
    figures = {
        name: {"all": found_in_top(score, planted), "held out": found_in_top(score[held_out], planted[held_out])}
        for name, score in scores.items()
    }
    likely = scores["audit"] >= 0.95
    named = {"images": int(likely.sum()), "planted": int((likely & planted).sum())}
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    return {"top1": results["final"]["top1"], "planted": int(planted.sum()), "rankings": figures, "likely": named}


def true_labels(data: Path, images: np.ndarray | None) -> np.ndarray:
    """(N,) the labels that images had before some were planted; found by their pixels, as a run reorders them."""
    assert images is not None
    originals, labels = read_idx(data / "train-images-idx3-ubyte"), np.load(data / "true.npy")
    known = {image.tobytes(): label for image, label in zip(originals, labels, strict=True)}
    side = originals.shape[1]
    margin = (images.shape[1] - side) // 2  # small images are padded to the model's size
    inner = images[:, margin : margin + side, margin : margin + side, 0]
    return np.array([known[np.ascontiguousarray(image).tobytes()] for image in inner])


def found_in_top(score: np.ndarray, planted: np.ndarray) -> float:
    """Share of the planted errors among the first 5 %."""
    first = np.argsort(-score, kind="stable")[: round(SHARE * len(score))]
    return float(planted[first].sum() / planted.sum())


def print_table(rows: dict[str, list[dict[str, Any]]]) -> None:
    """A Markdown table: a line for every ranking of every method."""
    print(
        "\n| method | n | top-1 (%) | ranking | found in the top 5 % | of those held out |\n|---|---|---|---|---|---|"
    )
    for method, runs in rows.items():
        top1 = [100 * run["top1"] for run in runs]
        head = f"| {method} | {len(runs)} | {statistics.mean(top1):.1f} |"
        for ranking in runs[0]["rankings"]:
            cells = [cell([run["rankings"][ranking][part] for run in runs]) for part in ("all", "held out")]
            print(head, ranking, "|", " | ".join(cells), "|")
            head = "| | | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--runs", type=Path, help="folder of the runs; those that are whole are not trained again")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/label_errors.json")
    parser.add_argument("--quick", action="store_true", help="a few steps on the embedded set, one seed, two methods")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.quick:
        arguments.seeds, arguments.methods = [1], ["baseline", "ism"]
        arguments.out = arguments.out.with_stem(arguments.out.stem + "-quick")
    started = time.perf_counter()
    rows: dict[str, list[dict[str, Any]]] = {method: [] for method in arguments.methods}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.runs or Path(temporary)).resolve()
        for seed in arguments.seeds:
            data = folder / f"data-s{seed}"
            plant(data, seed, quick=arguments.quick)
            options = ["--dataset", "fashion-mnist", "--data-dir", str(data), "--loader", "torch", "--image-size", "28"]
            options += ["--val-fraction", "0.1", "--batch-size", "128", "--seed", str(seed)]
            options += ["--model", "resnet8_cifar" if arguments.quick else "resnet20_cifar"]
            options += ["--max-steps", "60"] if arguments.quick else ["--epochs", str(arguments.epochs)]
            for method in arguments.methods:
                run = folder / f"{method}-s{seed}"
                train("train_cls.py", [*options, "--method", method], run)
                rows[method].append(measure(run, data, seed))
    print_table(rows)
    print(hardware())
    stored = {
        "rows": rows,
        "seeds": arguments.seeds,
        "hardware": hardware(),
        "versions": versions(),
        "commit": git_commit(),
        "seconds": round(time.perf_counter() - started),
        "command": " ".join(["python", "benchmarks/label_errors.py", *without_places(sys.argv[1:])]),
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    print(f"stored in {arguments.out}")


if __name__ == "__main__":
    run_main(main)
