"""Fitting an introspection to features that were read once: seconds, and the network stays as it is.

Letters in shapes: N images, B of a batch, F numbers of the depth vector, C classes, P folds, D semantic dimensions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from idml.introspection.calibration import (
    LEAST_HELD_OUT,
    classifier_evidence,
    log_loss_evidence,
    search_evidence,
)
from idml.introspection.features import Features
from idml.introspection.heads import Heads
from idml.introspection.introspection import BELIEF_DIM, Introspection, IntrospectionSpec
from idml.introspection.layers import Layers
from idml.introspection.refusal import as_arrays
from idml.metrics import nearest_neighbours

FOLDS = 5
"""Parts of the held-out images; each head is fitted without one of them, which it is calibrated on."""

BATCH, LEARNING_RATE, WEIGHT_DECAY = 256, 2e-3, 1e-2
"""Of AdamW, with a rate that falls to zero as a cosine does."""

PASSES, LEAST_STEPS, MOST_STEPS = 8, 300, 3_000
"""Passes over the images, within these bounds of steps."""

CLASS_SCALE = 32.0
"""Scale of the cosines to class centres whose cross-entropy is foreseen: that of Proxy_Anchor and Proxy_NCA."""

SHARPNESS = 16.0
"""Scale of the cosines between a retrieval head's belief and its class directions; of the order of the 16 to 32 that
losses by normalised softmax take."""

MEMORISED = 0.5
"""Where the network errs on its training images less than this share of how often it errs on held-out ones, it has
memorised them: what the heads would learn from them is not what happens on others."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fitted:
    """An introspection, and what the fit has found.

    Attributes:
        introspection: in evaluation mode.
        about: figures for people and tables: error rates on training and held-out images, whether training images were
            learned from, steps.
    """

    introspection: Introspection
    about: dict[str, Any]


def wrong_answers(features: Features) -> Tensor:
    """(N,) bool, of a classifier."""
    return features.logits.argmax(1) != features.labels


def fit_classifier(
    layers: Layers, classes: int, train: Features | None, held_out: Features | None, *, seed: int = 0
) -> Fitted:
    """Fit to a classifier's features.

    Held-out images are dealt out to ``FOLDS`` parts: each head learns from the others, and what it says of its own part
    calibrates, ranks and promises. Training images are learned from too unless the network has memorised them.

    Args:
        layers: what was looked at.
        classes: C.
        train: images that the network was trained on, or None.
        held_out: images of the same kind that it was not trained on, or None.
        seed: of weights, parts and batches.

    Raises:
        ValueError: neither is given.
    """
    if train is None and held_out is None:
        raise ValueError("expected features of training images or of held-out ones, got neither")
    given = {"train": train, "held_out": held_out}
    errs = {name: None if part is None else wrong_answers(part).double().mean().item() for name, part in given.items()}
    enough = held_out is not None and len(held_out) >= LEAST_HELD_OUT
    memorised = enough and (errs["train"] or 0.0) < MEMORISED * (errs["held_out"] or 0.0)
    parts = [part for part in (None if memorised else train, held_out) if part is not None]
    vectors, labels, logits = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("vectors", "labels", "logits")
    )
    generator = torch.Generator().manual_seed(seed)
    folds = FOLDS if enough else 1
    fold = torch.full((len(labels),), -1)
    if held_out is not None and folds > 1:
        fold[len(labels) - len(held_out) :] = torch.randperm(len(held_out), generator=generator) % folds
    spec = IntrospectionSpec(
        task="classification",
        layers=layers,
        classes=classes,
        folds=folds,
        fitted_on=len(labels),
        held_out=0 if held_out is None else len(held_out),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        introspection = Introspection(spec)
    _standardise(introspection.heads, vectors)
    losses = functional.cross_entropy(logits, labels, reduction="none")
    steps = _learn(introspection.heads, vectors, labels, losses, fold, generator)
    density = train if train is not None else held_out
    assert density is not None
    introspection.novelty.fit(_standardised(introspection.heads, density.vectors), density.labels, generator)
    note = "no images were held out"
    if held_out is not None:
        note = _calibrate(introspection, held_out, fold[len(labels) - len(held_out) :], cross=train is None, seed=seed)
    introspection.spec = dataclasses.replace(spec, calibrated=not note, note=note)
    about = {f"error_{name}": value for name, value in errs.items()}
    about |= {
        "training_images_learned_from": train is not None and not memorised,
        "steps": steps,
        "images": len(labels),
    }
    return Fitted(introspection.eval(), about)


def fit_retrieval(layers: Layers, train: Features, held_out: Features | None, *, seed: int = 0) -> Fitted:
    """Fit to a retrieval model's features.

    The head learns an embedding of its own, by directions of the training classes, and to foresee how badly an image is
    told from other classes by its distance to their centres. What it says is calibrated on held-out classes, whose
    images search one another: on how often a nearest neighbour is wrong in a gallery like this one.

    Args:
        layers: what was looked at.
        train: images of training classes; labels from 0.
        held_out: images of classes that the network was not trained on, or None.
        seed: of weights and batches.
    """
    classes = int(train.labels.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    held = 0 if held_out is None else len(held_out)
    spec = IntrospectionSpec(task="retrieval", layers=layers, classes=1, folds=1, fitted_on=len(train), held_out=held)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        introspection = Introspection(spec)
        directions = torch.nn.Parameter(torch.randn(classes, BELIEF_DIM))
    _standardise(introspection.heads, train.vectors)
    semantic = functional.normalize(train.semantic.float(), dim=1)
    centres = functional.normalize(torch.zeros(classes, semantic.shape[1]).index_add_(0, train.labels, semantic), dim=1)
    losses = functional.cross_entropy(CLASS_SCALE * semantic @ centres.T, train.labels, reduction="none")
    fold = torch.full((len(train),), -1)
    steps = _learn(introspection.heads, train.vectors, train.labels, losses, fold, generator, directions)
    known = _standardised(introspection.heads, train.vectors)
    introspection.novelty.fit(known, torch.zeros_like(train.labels), generator)
    note = "no classes were held out"
    if held_out is not None:
        note = _calibrate_search(introspection, held_out)
    introspection.spec = dataclasses.replace(spec, calibrated=not note, note=note)
    return Fitted(introspection.eval(), {"steps": steps, "images": len(train)})


@torch.no_grad()
def _calibrate_search(introspection: Introspection, held_out: Features) -> str:
    """Calibrate on images of held-out classes that search one another; why not, in words, or an empty text."""
    parts = [introspection(part.float(), None) for part in held_out.vectors.split(4096)]
    belief, foreseen, strange = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("belief", "foreseen_loss", "strangeness")
    )
    introspection.novelty.rank(strange)
    neighbours, similarities = nearest_neighbours(held_out.semantic.float(), min(2, len(held_out) - 1))
    nearest = neighbours[:, 0]
    wrong = held_out.labels[nearest] != held_out.labels
    introspection.held_wrong.copy_(wrong)
    note = introspection.calibration.fit(log_loss_evidence(foreseen)[:, None], wrong)
    if not note:
        evidence = search_evidence(belief, foreseen, belief[nearest], foreseen[nearest], similarities)
        assert introspection.search_calibration is not None
        introspection.search_calibration.fit(evidence, wrong)
        stored = as_arrays(introspection.search_calibration(evidence), wrong, torch.zeros(len(wrong)))
        introspection.held_p_wrong.copy_(stored["p_wrong"])
        introspection.held_wrong.copy_(stored["wrong"])
    return note


def _standardise(heads: Heads, vectors: Tensor) -> None:
    """Note mean and variance of (N, F) vectors."""
    mean = torch.stack([part.double().sum(0) for part in vectors.split(4096)]).sum(0) / len(vectors)
    square = torch.stack([(part.double() - mean).square().sum(0) for part in vectors.split(4096)]).sum(0)
    heads.mean.copy_(mean)
    heads.variance.copy_(square / len(vectors))


def _standardised(heads: Heads, vectors: Tensor) -> Tensor:
    """(N, F) float16, made a part at a time."""
    return torch.cat([heads.standardised(part.float()).half() for part in vectors.split(4096)])


def _learn(
    heads: Heads,
    vectors: Tensor,
    labels: Tensor,
    losses: Tensor,
    fold: Tensor,
    generator: torch.Generator,
    directions: torch.nn.Parameter | None = None,
) -> int:
    """Train all heads at once, each on the images that are not of its fold; returns the steps.

    Args:
        directions: (C, K) of the classes, where a belief is an embedding; learned too.
    """
    heads.requires_grad_(True)
    learned = [*heads.parameters(), *([] if directions is None else [directions])]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batch = min(BATCH, len(labels))
    per_pass = max(len(labels) // batch, 1)
    steps = min(max(PASSES * per_pass, LEAST_STEPS), MOST_STEPS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.empty(0, dtype=torch.int64)
    with torch.enable_grad():
        for _ in range(steps):
            if len(order) < batch:
                order = torch.randperm(len(labels), generator=generator)
            chosen, order = order[:batch], order[batch:]
            look = heads(vectors[chosen].float())
            taken = (fold[chosen] != torch.arange(heads.folds)[:, None]).float()  # (P, B)
            belief = look.belief.flatten(0, 1)
            if directions is not None:
                belief = SHARPNESS * functional.normalize(belief, dim=1) @ functional.normalize(directions, dim=1).T
            own = functional.cross_entropy(belief, labels[chosen].repeat(heads.folds), reduction="none").view_as(taken)
            foreseen = functional.poisson_nll_loss(
                look.foreseen_loss, losses[chosen].expand_as(taken), log_input=False, eps=1e-6, reduction="none"
            )
            loss = ((own + foreseen) * taken).sum() / taken.sum() * heads.folds
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    heads.requires_grad_(False)
    return steps


@torch.no_grad()
def _calibrate(introspection: Introspection, held_out: Features, fold: Tensor, *, cross: bool, seed: int) -> str:
    """Calibrate by what each head says of the part that it has not seen; why not, in words, or an empty text.

    Args:
        cross: the density was fitted to the held-out images themselves: their ranks come from densities without them.
    """
    heads, novelty = introspection.heads, introspection.novelty
    evidence, strange = [], []
    for vectors, logits, part in zip(
        held_out.vectors.split(4096), held_out.logits.split(4096), fold.split(4096), strict=True
    ):
        look = heads(vectors.float())
        each = classifier_evidence(logits, look.belief, look.foreseen_loss)  # (P, B, 3)
        own = part.clamp(min=0)  # one head only where nothing was dealt out
        evidence.append(each.gather(0, own[None, :, None].expand(1, -1, each.shape[2]))[0])
        strange.append(novelty.strangeness(novelty.coordinates(heads.standardised(vectors.float()))))
    proof, strangeness = torch.cat(evidence), torch.cat(strange)
    if cross and heads.folds > 1:
        strangeness = _cross_fitted(introspection, held_out, fold, seed)
    wrong = wrong_answers(held_out)
    note = (
        introspection.calibration.fit(proof, wrong)
        if heads.folds > 1
        else (f"{len(held_out)} held-out images, at least {LEAST_HELD_OUT} are needed")
    )
    novelty.rank(strangeness)
    true = held_out.logits.softmax(1).gather(1, held_out.labels[:, None])[:, 0]
    for name, values in as_arrays(introspection.calibration(proof), wrong, true).items():
        getattr(introspection, f"held_{name}").copy_(values)
    return note


def _cross_fitted(introspection: Introspection, features: Features, fold: Tensor, seed: int) -> Tensor:
    """(N,) strangeness of images, each by a density of the same shape that was fitted without its part."""
    found = torch.empty(len(features))
    vectors = _standardised(introspection.heads, features.vectors)
    for number in range(int(fold.max()) + 1):
        own = fold == number
        other = type(introspection.novelty)(vectors.shape[1], len(introspection.novelty.means))
        other.fit(vectors[~own], features.labels[~own], torch.Generator().manual_seed(seed + number))
        found[own] = other.strangeness(other.coordinates(vectors[own].float()))
    return found
