"""One pass of a model over the images, and what is kept of each: never a row of all class probabilities.

Letters in shapes: N images, B of a batch, C classes, D semantic dimensions, K of a belief.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2.functional import rgb_to_grayscale
from tqdm import tqdm

from idml.audit.label_errors import class_doubt
from idml.data.collection import Collection
from idml.models import ClassifierOutput
from idml.trained import Embeddings, TrainedModel

THUMBNAIL = 32
"""Side in pixels of the grey pictures that near-duplicates are looked for in."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gathered:
    """What a model says of N images, and how they look.

    Attributes:
        embeddings: without ``probabilities``, which would be (N, C).
        thumbnails: (N, ``THUMBNAIL`` ** 2) uint8, grey.
        predicted: (N,) int64, confidence: (N,) float32, label_probability: (N,) float32 (NaN without a label), doubt:
            (N,) float32 and suggested: (N,) int64 as ``class_doubt`` gives them; of a classifier, None otherwise.
    """

    embeddings: Embeddings
    thumbnails: np.ndarray
    predicted: np.ndarray | None = None
    confidence: np.ndarray | None = None
    label_probability: np.ndarray | None = None
    doubt: np.ndarray | None = None
    suggested: np.ndarray | None = None


def gather(
    model: TrainedModel, collection: Collection, labels: np.ndarray, *, batch_size: int, workers: int, verbose: bool
) -> Gathered:
    """Every image through the model once.

    Args:
        labels: (N,) int64, of a classifier positions in its classes; -1 where there is none.
        batch_size, workers: see ``TrainedModel.loader``.
        verbose: draw a progress bar, where the output is a terminal.
    """
    loader = model.loader(collection.dataset, batch_size=batch_size, workers=workers)
    parts: list[Embeddings] = []
    columns: list[dict[str, np.ndarray]] = []
    start = 0
    bar = tqdm(loader.epoch(0), total=len(loader), desc="images", unit="batch", disable=None if verbose else True)
    for images, _ in bar:
        output = model.outputs(images)
        parts.append(dataclasses.replace(model.embeddings_of(output), probabilities=None))
        kept = {"thumbnails": thumbnails_of(images)}
        if isinstance(output, ClassifierOutput):
            given = torch.from_numpy(labels[start : start + len(images)]).to(model.device)
            kept |= {name: value.cpu().numpy() for name, value in _of_classifier(output, given).items()}
        columns.append(kept)
        start += len(images)
    joined = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
    return Gathered(embeddings=Embeddings.joined(parts), **joined)


def thumbnails_of(images: Tensor) -> np.ndarray:
    """(B, ``THUMBNAIL`` ** 2) uint8: grey and small, of (B, 3, S, S) uint8 images."""
    grey = rgb_to_grayscale(images).float()
    small = functional.interpolate(grey, (THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True, align_corners=False)
    return small.round().clamp(0, 255).to(torch.uint8).flatten(1).cpu().numpy()


def _of_classifier(output: ClassifierOutput, labels: Tensor) -> dict[str, Tensor]:
    """The columns of a classifier's batch."""
    probabilities = output.logits.float().softmax(1)
    belief = None if output.scores is None else output.scores.belief.float().softmax(1)
    confidence, predicted = probabilities.max(1)
    doubt, suggested = class_doubt(probabilities, belief, labels)
    of_label = probabilities.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return {
        "predicted": predicted,
        "confidence": confidence,
        "label_probability": torch.where(labels < 0, torch.nan, of_label),
        "doubt": doubt,
        "suggested": suggested,
    }
