"""What a model answers, and how sure it is, in the same terms for classifiers and for retrieval models.

The answer of a classifier is its top class; that of a retrieval model is the class of the nearest image. N images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from idml.audit.gather import Gathered
from idml.audit.label_errors import neighbour_doubt
from idml.audit.search import Pools
from idml.data.collection import Collection
from idml.errors import UserError
from idml.metrics import nearest_neighbours
from idml.trained import TrainedModel

NEIGHBOURS = 20
"""Nearest images, by their semantic embeddings, that are looked at for label errors of retrieval and for duplicates."""

JUDGED = ("test", "query", "val")
"""Splits that the figures are of, the first that there is: a model knows the images that it was trained on."""

OF_SPLIT = "the images of the split "
"""Before the name of the split, in ``Answers.judged_split``."""

Score = Callable[[Tensor, np.ndarray], Tensor]
"""(B, 3, S, S) uint8 images, perhaps spoilt, and the (B,) positions of the images that they were made from -> (B,)
uncertainty."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Of N images.

    Attributes:
        classes: names; labels and answers are positions in it.
        labels, predicted: (N,) int64; -1 where there is none.
        confidence: (N,) float32, probability of the top class; of retrieval the cosine similarity of the nearest image.
        uncertainty: (N,) float32, high where the answer is probably wrong; score_name says what it is.
        is_probability: whether it is the probability of an error, calibrated or not.
        calibrated_on: number of held-out images that it was calibrated on; 0: it was not.
        free: (N,) float32, what any model gives for nothing, and free_name.
        label_probability: (N,) float32, of a classifier; NaN where there is no label.
        doubt: (N,) float32, high where the label is probably wrong, see ``label_errors``; NaN where there is no label
            or nothing to tell it by.
        suggested: (N,) int64, the class that is meant instead.
        nearest: (N,) int64, of a retrieval model.
        neighbours, similarities: (N, k), by semantic embedding, among all images.
        judged: (N,) bool, the labelled images that figures are of; judged_split: what they are, in words.
        score: uncertainty of other versions of the images.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    uncertainty: np.ndarray
    score_name: str
    is_probability: bool
    calibrated_on: int
    free: np.ndarray
    free_name: str
    label_probability: np.ndarray | None
    doubt: np.ndarray
    suggested: np.ndarray
    nearest: np.ndarray | None
    neighbours: np.ndarray
    similarities: np.ndarray
    judged: np.ndarray
    judged_split: str
    score: Score

    @property
    def labelled(self) -> np.ndarray:
        """(N,) bool."""
        return self.labels >= 0

    @property
    def right(self) -> np.ndarray:
        """(N,) bool, whether the answer is the label; False where there is no label."""
        return (self.labels >= 0) & (self.predicted == self.labels)


def labels_for(model: TrainedModel, collection: Collection, *, use_labels: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) int64 labels, -1 where there is none, and the classes that they are positions in.

    A classifier's own classes; one whose name has a slash, which no folder can have, is meant by an underscore there.

    Args:
        use_labels: otherwise the images have none.

    Raises:
        UserError: a classifier does not know some of the classes.
    """
    names, given = collection.dataset.classes, collection.dataset.labels
    if not use_labels:
        return np.full(len(given), -1, np.int64), model.classes if model.task == "classification" else names
    if model.task == "retrieval":
        return given, names
    position = {name.replace("/", "_"): label for label, name in enumerate(model.classes)}
    position |= {name: label for label, name in enumerate(model.classes)}
    present = [names[label] for label in np.unique(given[given >= 0])]
    if unknown := [name for name in present if name not in position]:
        raise UserError(
            f"{collection.source}: {len(unknown)} of {len(present)} class folders are no classes of the model "
            f"({_some(unknown)}); it knows {_some(model.classes)}. Rename them, or give --no-labels to audit without"
        )
    table = np.array([*(position.get(name, -1) for name in names), -1], np.int64)
    return table[given], model.classes


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def answers_of(
    model: TrainedModel, collection: Collection, gathered: Gathered, labels: np.ndarray, classes: tuple[str, ...]
) -> Answers:
    """Put together what the model says of the images.

    Args:
        gathered: of the collection's images, by this model.
        labels, classes: as ``labels_for`` gives them.
    """
    semantic = torch.from_numpy(gathered.embeddings.semantic)
    count = min(NEIGHBOURS, len(semantic) - 1)
    neighbours, similarities = np.zeros((len(semantic), 0), np.int64), np.zeros((len(semantic), 0), np.float32)
    if count:
        neighbours, similarities = (part.numpy() for part in nearest_neighbours(semantic, count))
    judged, judged_split = judged_images(collection.splits, labels)
    common = {
        "classes": classes,
        "labels": labels,
        "neighbours": neighbours,
        "similarities": similarities,
        "judged": judged,
        "judged_split": judged_split,
    }
    of_task = _of_classifier if model.task == "classification" else _of_retrieval
    return of_task(model, collection, gathered, common)


def judged_images(splits: tuple[str, ...], labels: np.ndarray) -> tuple[np.ndarray, str]:
    """The labelled images that figures are of, (N,) bool, and what they are in words."""
    names, labelled = np.array(splits), labels >= 0
    for split in JUDGED:
        if (chosen := labelled & (names == split)).any():
            return chosen, OF_SPLIT + split
    return labelled, "the training images" if (names == "train").all() else "all labelled images"


def _of_classifier(model: TrainedModel, collection: Collection, gathered: Gathered, common: dict) -> Answers:
    assert gathered.predicted is not None and gathered.confidence is not None
    assert gathered.doubt is not None and gathered.suggested is not None

    def score(images: Tensor, _: np.ndarray) -> Tensor:
        return torch.from_numpy(model.embeddings_of(model.outputs(images)).uncertainty)

    return Answers(
        **common,
        predicted=gathered.predicted,
        confidence=gathered.confidence,
        uncertainty=gathered.embeddings.uncertainty,
        score_name=model.score_name,
        is_probability=model.score_name != "|u|",
        calibrated_on=model.calibrated_on,
        free=1 - gathered.confidence,
        free_name="1 - max softmax",
        label_probability=gathered.label_probability,
        doubt=gathered.doubt,
        suggested=gathered.suggested,
        nearest=None,
        score=score,
    )


def _of_retrieval(model: TrainedModel, collection: Collection, gathered: Gathered, common: dict) -> Answers:
    pools = Pools(model, collection, gathered.embeddings)
    everyone = np.arange(len(collection))
    found = pools.search(gathered.embeddings, everyone)
    doubt, suggested = neighbour_doubt(
        gathered.embeddings.semantic, common["labels"], common["neighbours"], common["similarities"]
    )

    def score(images: Tensor, positions: np.ndarray) -> Tensor:
        embeddings = model.embeddings_of(model.outputs(images))
        return torch.from_numpy(pools.search(embeddings, positions).uncertainty)

    return Answers(
        **common,
        predicted=common["labels"][found.nearest],
        confidence=found.similarity,
        uncertainty=found.uncertainty,
        score_name=pools.score_name,
        is_probability=model.score_name == "P(wrong)",
        calibrated_on=pools.calibrated_on,
        free=1 - found.similarity,
        free_name="1 - top similarity",
        label_probability=None,
        doubt=doubt,
        suggested=suggested,
        nearest=found.nearest,
        score=score,
    )
