"""What a classification run shows: a line per epoch, histograms, and pictures in TensorBoard and as PNG."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from augment import MixedBatch, denormalise
from idml.data.image_dataset import DataSplits
from idml.data.torch_loader import Loader
from idml.evaluation import Evaluation
from idml.introspection.introspection import IntrospectionSpec
from idml.metrics.classification import Predictions
from idml.metrics.uncertainty import ECE_BINS
from idml.pictures import extremes_grid, mixed_grid
from idml.plots import reliability_plot, risk_coverage_plot
from idml.random_state import generator_kept
from idml.run import Run, write_text


def epoch_line(metrics: Mapping[str, Any]) -> str:
    """The figures of one epoch on one line."""
    line = f"epoch {metrics['epoch']:3d}  train loss {metrics['train_loss']:.3f}"
    if "top1" in metrics:
        line += f"  test  top-1 {metrics['top1']:.2%}  nll {metrics['nll']:.3f}  ece {metrics['ece']:.3f}"
    if "val_top1" in metrics:
        line += f"  val top-1 {metrics['val_top1']:.2%}"
    if "uncertainty_train_mixed" in metrics:
        line += f"  u test {metrics['uncertainty_test']:.2f} clean {metrics['uncertainty_train_clean']:.2f}"
        line += f" mixed {metrics['uncertainty_train_mixed']:.2f} active {metrics['active_uncertainty_units']:.0%}"
    return line + f"  {metrics['images_per_second']:.0f} images/s"


def introspection_line(metrics: Mapping[str, Any], spec: IntrospectionSpec) -> str:
    """What the introspection is worth on the test images, on one line."""
    how = f"calibrated on {spec.held_out} held-out images" if spec.calibrated else f"not calibrated: {spec.note}"
    return (
        f"introspection  error AUROC {metrics['error_auroc']:.3f} (1 - max softmax "
        f"{metrics['error_auroc_max_softmax']:.3f})  answered at 5 % risk {metrics['coverage_at_5_risk']:.1%}  {how}"
    )


def write_confusion(
    directory: Path, predictions: Predictions, classes: Sequence[str], metrics: Mapping[str, float], *, tta: str
) -> None:
    """``confusion.csv`` (rows: true class, columns: predicted), ``confusion.png`` and ``metrics.json`` in a folder."""
    import matplotlib.figure  # slow to import: only where used

    with generator_kept():
        from sklearn.metrics import confusion_matrix
    directory.mkdir(parents=True, exist_ok=True)
    matrix = confusion_matrix(predictions.label, predictions.predicted, labels=range(len(classes)))
    with (directory / "confusion.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *classes])
        writer.writerows([name, *row] for name, row in zip(classes, matrix.tolist(), strict=True))
    figure = matplotlib.figure.Figure(figsize=(8, 7), layout="constrained")
    axes = figure.add_subplot()
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(1)
    figure.colorbar(axes.imshow(shares, cmap="gray_r", vmin=0, vmax=1), label="share of the true class")
    axes.set(xlabel="predicted class", ylabel="true class", title=f"top-1 {metrics['top1']:.2%}")
    if len(classes) <= 100:
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=min(9, 500 / len(classes)))
        axes.set_yticks(range(len(classes)), classes, fontsize=min(9, 500 / len(classes)))
    figure.savefig(directory / "confusion.png", dpi=120)
    write_text(directory / "metrics.json", json.dumps(dict(metrics) | {"tta": tta}, indent=2) + "\n")


def draw_mixed(run: Run, batch: MixedBatch, data: DataSplits, step: int) -> None:
    """A grid of one mixed training batch with its lam, as ``pictures/mixed.png`` and in TensorBoard."""
    images = denormalise(batch.images[:16], data.preprocessing.mean, data.preprocessing.std).cpu()
    run.log_picture("mixed", "mixed training images", mixed_grid(images, batch, data.train.classes), step)


def _ranking(predictions: Predictions) -> tuple[str, Tensor]:
    """Name and values of the score that images are ranked by."""
    if predictions.p_wrong.isnan().any():
        return "1 - max softmax", 1 - predictions.confidence
    return "P(wrong)", predictions.p_wrong


def log_uncertainty(run: Run, test: Evaluation, ism: str, epoch: int) -> None:
    """TensorBoard's view of the uncertainty: histograms, the risk-coverage curve, the reliability.

    The histograms are of the score over all, rightly and wrongly classified test images and, with ISM, of |u| over test
    images and mixed training images. Curves go to ``pictures/risk_coverage.png`` and, after the introspection,
    ``pictures/reliability.png`` too.
    """
    predictions = test.predictions
    name, scores = _ranking(predictions)
    right = predictions.predicted == predictions.label
    groups = {"all": scores, "right": scores[right], "wrong": scores[~right]}
    named = {f"{name} of test images/{group}": chosen for group, chosen in groups.items()}
    if ism != "off" and test.mixed_scores is not None:
        named |= {"|u|/test images": predictions.uncertainty, "|u|/mixed training images": test.mixed_scores}
    for title, chosen in named.items():
        if len(chosen):
            run.log_histogram(title, chosen, epoch)
    if not run.writes:
        return
    curves = {name: scores, "1 - max softmax": 1 - predictions.confidence}
    run.log_picture("risk_coverage", "risk and coverage on the test images", risk_coverage_plot(curves, right), epoch)
    if name == "P(wrong)":
        picture = reliability_plot(scores, ~right, name=f"{name}, {ECE_BINS} bins")
        run.log_picture("reliability", "reliability of P(wrong) on the test images", picture, epoch)


def draw_extremes(run: Run, predictions: Predictions, loader: Loader, classes: Sequence[str], epoch: int) -> None:
    """The eight most and eight least uncertain test images, as ``pictures/uncertain.png`` and in TensorBoard."""
    name, scores = _ranking(predictions)
    order = scores.argsort(descending=True, stable=True).tolist()
    count = min(8, len(order) // 2)
    chosen = order[:count] + order[len(order) - count :]
    captions = []
    for index in chosen:
        label, predicted = int(predictions.label[index]), int(predictions.predicted[index])
        captions.append(classes[label] if label == predicted else f"{classes[label]}, not {classes[predicted]}")
    picture = extremes_grid(loader.images_at(chosen), scores[chosen], captions, name=name)
    run.log_picture("uncertain", "most and least uncertain test images", picture, epoch)
