"""What a classification run shows: a line per epoch, histograms, and pictures in TensorBoard and as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from augment import MixedBatch, denormalise
from idml.data.image_dataset import DataSplits
from idml.data.torch_loader import TorchLoader
from idml.metrics.classification import Predictions
from idml.pictures import as_tensor, extremes_grid, mixed_grid, save_png
from idml.run import Run


def epoch_line(metrics: Mapping[str, Any]) -> str:
    """The figures of one epoch on one line."""
    line = f"epoch {metrics['epoch']:3d}  train loss {metrics['train_loss']:.3f}  test"
    line += f"  top-1 {metrics['top1']:.2%}  nll {metrics['nll']:.3f}  ece {metrics['ece']:.3f}"
    if "val_top1" in metrics:
        line += f"  val top-1 {metrics['val_top1']:.2%}"
    if "uncertainty_test" in metrics:
        line += f"  |u| test {metrics['uncertainty_test']:.2f} clean {metrics['uncertainty_train_clean']:.2f}"
        line += f" mixed {metrics['uncertainty_train_mixed']:.2f} active {metrics['active_uncertainty_units']:.0%}"
    return line + f"  {metrics['images_per_second']:.0f} images/s"


def draw_mixed(run: Run, batch: MixedBatch, data: DataSplits, step: int) -> None:
    """A grid of one mixed training batch with its lam, as ``pictures/mixed.png`` and in TensorBoard."""
    images = denormalise(batch.images[:16], data.preprocessing.mean, data.preprocessing.std).cpu()
    picture = mixed_grid(images, batch, data.train.classes)
    save_png(picture, run.directory / "pictures" / "mixed.png")
    run.tensorboard.add_image("mixed training images", as_tensor(picture), step)


def _ranking(predictions: Predictions, *, ism_on: bool) -> tuple[str, Tensor]:
    """Name and values of the score that images are ranked by: a plain classifier has no uncertainty embedding."""
    return ("|u|", predictions.uncertainty) if ism_on else ("1 - max softmax", 1 - predictions.confidence)


def log_histograms(run: Run, predictions: Predictions, epoch: int, *, ism_on: bool) -> None:
    """Histograms of the uncertainty score over all, rightly and wrongly classified test images."""
    name, scores = _ranking(predictions, ism_on=ism_on)
    right = predictions.predicted == predictions.label
    for group, chosen in (("all", scores), ("right", scores[right]), ("wrong", scores[~right])):
        if len(chosen):
            run.tensorboard.add_histogram(f"{name} of test images/{group}", chosen, epoch)


def draw_extremes(
    run: Run, predictions: Predictions, loader: TorchLoader, classes: Sequence[str], epoch: int, *, ism_on: bool
) -> None:
    """The eight most and eight least uncertain test images, as ``pictures/uncertain.png`` and in TensorBoard."""
    name, scores = _ranking(predictions, ism_on=ism_on)
    order = scores.argsort(descending=True, stable=True).tolist()
    count = min(8, len(order) // 2)
    chosen = order[:count] + order[len(order) - count :]
    captions = []
    for index in chosen:
        label, predicted = int(predictions.label[index]), int(predictions.predicted[index])
        captions.append(classes[label] if label == predicted else f"{classes[label]}, not {classes[predicted]}")
    picture = extremes_grid(loader.images_at(chosen), scores[chosen], captions, name=name)
    save_png(picture, run.directory / "pictures" / "uncertain.png")
    run.tensorboard.add_image("most and least uncertain test images", as_tensor(picture), epoch)
