"""What an introspection says of the images: what is new to the model, and what it would refuse to answer. N images."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from idml.audit.answers import Answers
from idml.audit.figures import Share, share_of
from idml.introspection.calibration import LEAST_HELD_OUT
from idml.introspection.refusal import Promise
from idml.trained import Embeddings, TrainedModel

NEW = 0.99
"""From this novelty on an image is called new: of images like the held-out ones, one in a hundred is."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SplitNovelty:
    """New images of a split.

    Attributes:
        name: of the split; empty where there is none.
        images: of it; new: how many are.
    """

    name: str
    images: int
    new: int

    @property
    def share(self) -> float:
        """new / images."""
        return self.new / self.images


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class New:
    """How strange the images are to the model.

    Attributes:
        novelty: (N,) float32 in [0, 1]; strangeness: (N,) float32, which ranks alike and has no ties.
        order: (N,) int64, the strangest first.
        ranked: whether the model had enough held-out images to say what is new.
        count: images from ``NEW`` on, the first of ``order``; 0 where it is not known.
        splits: the same by split, and of all where there are several.
    """

    novelty: np.ndarray
    strangeness: np.ndarray
    order: np.ndarray
    ranked: bool
    count: int
    splits: list[SplitNovelty]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """What the model would answer under a promise.

    Attributes:
        promise: by the images that were held out for it.
        answered: (N,) bool; share: of all images.
        shares: right answers of the judged images: of all, of those answered, of those refused, as far as there are.
        wrong: (k,) int64, judged images that are answered wrongly, those that the model is surest of first.
    """

    promise: Promise
    answered: np.ndarray
    share: float
    shares: list[Share]
    wrong: np.ndarray


def what_is_new(model: TrainedModel, embeddings: Embeddings, splits: tuple[str, ...]) -> New | None:
    """See ``New``; None where the model has not been introspected."""
    if model.introspection is None:
        return None
    assert embeddings.novelty is not None and embeddings.coordinates is not None
    points = torch.from_numpy(embeddings.coordinates).to(model.device)
    strangeness = model.introspection.novelty.strangeness(points).cpu().numpy()
    ranked = model.introspection.spec.held_out >= LEAST_HELD_OUT
    new = embeddings.novelty >= NEW - 1e-6 if ranked else np.zeros(len(strangeness), bool)
    names = np.array(splits)
    found = [
        SplitNovelty(name=name, images=int((names == name).sum()), new=int(new[names == name].sum()))
        for name in sorted(set(splits), key=lambda name: (name != "train", name))
    ]
    if len(found) > 1:
        found.append(SplitNovelty(name="all", images=len(new), new=int(new.sum())))
    return New(
        novelty=embeddings.novelty,
        strangeness=strangeness,
        order=np.argsort(-strangeness, kind="stable"),
        ranked=ranked,
        count=int(new.sum()),
        splits=found,
    )


def what_is_refused(
    model: TrainedModel, answers: Answers, *, max_risk: float, confidence: float
) -> tuple[Refusal | None, str]:
    """What a classifier would refuse; or None and the reason, in words.

    Args:
        answers: of it.
        max_risk: share of the answers that may be wrong, with this ``confidence``.
    """
    introspection = model.introspection
    if introspection is None:
        return None, "the model has not been introspected"
    if model.task == "retrieval":
        return None, "a retrieval model searches among other classes than those that were held out"
    if not introspection.spec.calibrated:
        return None, f"P(wrong) is not calibrated: {introspection.spec.note}"
    promise = introspection.promise(max_risk, confidence)
    if promise is None:
        return None, f"{introspection.spec.held_out:,} held-out images are not enough to promise it of this model"
    answered = answers.uncertainty <= promise.threshold
    groups = {
        "all": answers.judged,
        "answered": answers.judged & answered,
        "refused": answers.judged & ~answered,
    }
    wrong = np.flatnonzero(answers.judged & answered & ~answers.right)
    return Refusal(
        promise=promise,
        answered=answered,
        share=float(answered.mean()),
        shares=[share_of(name, answers.right[chosen]) for name, chosen in groups.items() if chosen.any()],
        wrong=wrong[np.argsort(answers.uncertainty[wrong], kind="stable")],
    ), ""
