"""Which images of a folder a network was trained on and which are held out, for an introspection.

Letters in shapes: N images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from idml.data.collection import Collection
from idml.data.image_dataset import ImageDataset
from idml.errors import UserError
from idml.evaluating import labelled_as, labelled_images
from idml.introspecting import check_given, chosen_images
from idml.introspection.introspection import Task


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Divided:
    """Labelled images of a folder.

    Attributes:
        images: all of them; their labels are positions in the model's classes, of a retrieval model in the classes of
            their group.
        held_out, train: (N,) int64 positions, ascending.
    """

    images: Collection
    held_out: np.ndarray
    train: np.ndarray

    def part(self, positions: np.ndarray) -> ImageDataset:
        """Some of the images."""
        return self.images.dataset.subset(positions)

    def chosen(self, task: Task, numbers: int, cache_bytes: int, seed: int) -> Divided:
        """Those of the images that are read; see ``idml.introspecting.chosen_images``.

        Raises:
            UserError: there are too few.
        """
        held_out, train = self.part(self.held_out), self.part(self.train)
        check_given(task, train, held_out)
        held, known = chosen_images(train, held_out, numbers, cache_bytes, seed)
        order = np.concatenate([self.held_out[held], self.train[known]])
        places = np.arange(len(order))
        return Divided(images=self.images.subset(order), held_out=places[: len(held)], train=places[len(held) :])


def divided(collection: Collection, task: Task, classes: Sequence[str]) -> Divided:
    """The labelled images of a folder, divided into those of the training and others.

    Of a classifier, the images of a split ``train`` are those that it was trained on; without splits all are held out.
    Of a retrieval model, the images of classes that it was trained on are, whatever their split, and other classes are
    held out.

    Args:
        collection: of the folder.
        task: of the model.
        classes: of its training.

    Raises:
        UserError: no image has a label; a classifier does not know a class; or none is of a retrieval model's classes.
    """
    labelled = labelled_images(collection)
    if task == "classification":
        dataset = labelled_as(labelled, classes)
        known = np.array(labelled.splits) == "train"
    else:
        trained = set(classes)
        names = np.array(labelled.labels)
        known = np.array([name in trained for name in names])
        if not known.any():
            known_ones = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
            raise UserError(
                f"no image of {collection.source} is of a class that the model was trained on ({len(classes)}: "
                f"{known_ones}): a retrieval model is introspected with images of its training classes, and calibrated "
                "on those of others"
            )
        labels = np.empty(len(names), np.int64)
        for group in (known, ~known):
            labels[group] = np.unique(names[group], return_inverse=True)[1]
        dataset = dataclasses.replace(labelled.dataset, labels=labels, origin=None)
    images = dataclasses.replace(labelled, dataset=dataset)
    return Divided(images=images, held_out=np.flatnonzero(~known), train=np.flatnonzero(known))
