"""Using a model that was trained: ``idml.load``, and from images to embeddings, classes and uncertainty.

Letters in shapes: N images, C classes, D semantic and E uncertainty dimensions, K numbers of a belief, S pixels.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from augment import normalise
from idml.checkpoint import load_tensors, read_checkpoint
from idml.checkpoint_files import newest_checkpoint
from idml.data.image_dataset import ImageDataset
from idml.data.pixels import as_rgb
from idml.data.torch_loader import TorchLoader, as_evaluated
from idml.embedder import EmbedderOutput, IntrospectiveEmbedder
from idml.errors import UserError
from idml.foreign import ForeignClassifier
from idml.introspection.introspected import Introspected
from idml.introspection.introspection import Introspection
from idml.introspection.refusal import class_sets
from idml.models import ClassifierOutput, IntrospectiveClassifier, uncertainty_score
from idml.paths import nearest_path, user_path
from idml.runtime import choose_device
from idml.spec import ModelSpec, Task, fingerprint, load_state

Images: TypeAlias = "Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor]"
"""One image or many. Arrays are (H, W), (H, W, 1 or 3) or (N, H, W, 1 or 3); tensors (1 or 3, H, W) or (N, 1 or 3, H,
W). Integers are 0 to 255, floating numbers 0 to 1."""

CONFIG, WEIGHTS, HEADS = "config.json", "model.safetensors", "idml.safetensors"
"""Files of an exported model; the last only where the weights are in timm's layout."""


INTROSPECTION = "introspection."
"""What the names of an introspection begin with in an exported model."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Embeddings:
    """What a model says of N images; arrays on the CPU.

    Attributes:
        semantic: (N, D) float32; of unit length where the model was trained so.
        uncertainty: (N,) float32, higher for a less certain image; ``TrainedModel.score_name`` says what it means.
        uncertainty_embedding: (N, E) float32; zeros where ISM is off.
        novelty: (N,) float32 in [0, 1], share of held-out known images that are less strange; foreseen_loss: (N,)
            float32, nats; coordinates: (N, Q) float32, where the image lies among known ones; belief: (N, K) float32,
            of a retrieval model. All None without an introspection.
        probabilities: (N, C) float32, of a classifier; None of a retrieval model.
    """

    semantic: np.ndarray
    uncertainty: np.ndarray
    uncertainty_embedding: np.ndarray
    novelty: np.ndarray | None = None
    foreseen_loss: np.ndarray | None = None
    coordinates: np.ndarray | None = None
    belief: np.ndarray | None = None
    probabilities: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.semantic)

    @classmethod
    def joined(cls, parts: Sequence[Embeddings]) -> Embeddings:
        """Those of several batches, in their order; at least one."""
        columns: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            pieces = [getattr(part, field.name) for part in parts]
            columns[field.name] = None if pieces[0] is None else np.concatenate(pieces)
        return cls(**columns)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """What a classifier takes N images for.

    Attributes:
        labels: (N,) int64, positions in the model's classes.
        classes: N names.
        confidence: (N,) float32, the probability of the top class by the plain logits.
        probabilities: (N, C) float32.
        uncertainty: (N,) float32; see ``TrainedModel.score_name``.
        p_wrong, novelty: (N,) float32 in [0, 1]; None without an introspection.
        answered: (N,) bool, whether the answer is given under the ``max_risk`` asked for; None where none was.
        sets: (N, C) bool, the classes that are named under the ``coverage`` asked for; None where none was.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    confidence: np.ndarray
    probabilities: np.ndarray
    uncertainty: np.ndarray
    p_wrong: np.ndarray | None = None
    novelty: np.ndarray | None = None
    answered: np.ndarray | None = None
    sets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)


class TrainedModel:
    """A network in evaluation mode, with all that belongs to it; see ``load``.

    Attributes:
        network: classifier or embedder.
        introspection: what it says of itself; None where it has not been fitted.
        spec: architecture, classes, preprocessing.
        device: where it computes.
        source: the file that it was read from.
        fingerprint: 16 hexadecimal digits, of its weights.
    """

    def __init__(
        self,
        network: IntrospectiveClassifier | IntrospectiveEmbedder | ForeignClassifier,
        spec: ModelSpec,
        *,
        device: torch.device,
        source: Path,
        introspection: Introspection | None = None,
    ) -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.introspection = None if introspection is None else introspection.to(device).eval()
        self.whole = network if introspection is None else Introspected(network, introspection).eval()
        self.fingerprint = fingerprint(self.whole)
        self.spec, self.device, self.source = spec, device, source

    def state(self) -> dict[str, Tensor]:
        """All weights, those of the introspection with ``INTROSPECTION`` before their names; contiguous."""
        found = dict(self.network.state_dict())
        if self.introspection is not None:
            found |= {INTROSPECTION + name: value for name, value in self.introspection.state_dict().items()}
        return {name: value.contiguous() for name, value in found.items()}

    @property
    def task(self) -> Task:
        """Classification, or retrieval."""
        return self.spec.task

    @property
    def classes(self) -> tuple[str, ...]:
        """Of the training images."""
        return self.spec.classes

    @property
    def score_name(self) -> str:
        """What ``uncertainty`` is: ``P(wrong)`` in [0, 1]; ``|u|``, without unit; ``1 - max softmax`` of a plain
        classifier; ``none`` of a plain retrieval model, where it is NaN."""
        if self.introspection is not None:
            return "P(wrong)"
        if self.spec.ism != "off":
            return "|u|"
        return "1 - max softmax" if self.task == "classification" else "none"

    @property
    def calibrated_on(self) -> int:
        """Number of held-out images that ``P(wrong)`` was calibrated on; 0: it was not, or is another score."""
        return 0 if self.introspection is None else int(self.introspection.calibration.fitted_on)

    def prepare(self, images: Images) -> Tensor:
        """(N, 3, S, S) uint8 on the CPU: the images as evaluation shows them to the model.

        Raises:
            UserError: an image is of another kind, shape or range than ``Images`` says.
        """
        return torch.stack([as_evaluated(image, self.spec.preprocessing) for image in as_pil(images)])

    @torch.inference_mode()
    def outputs(self, images: Tensor) -> ClassifierOutput | EmbedderOutput:
        """What the network gives for (N, 3, S, S) uint8 images, as ``prepare`` makes them; on the model's device."""
        square = self.spec.preprocessing
        return self.whole(normalise(images.to(self.device, non_blocking=True), square.mean, square.std))

    def embeddings_of(self, output: ClassifierOutput | EmbedderOutput) -> Embeddings:
        """The same as arrays."""
        found: dict[str, Any] = {
            "semantic": output.semantic,
            "uncertainty_embedding": output.uncertainty,
            "uncertainty": uncertainty_score(output),
        }
        if isinstance(output, ClassifierOutput):
            probabilities = output.logits.float().softmax(1)
            found["probabilities"] = probabilities
            if self.spec.ism == "off":
                found["uncertainty"] = 1 - probabilities.amax(1)
        elif self.spec.ism == "off":
            found["uncertainty"] = torch.full_like(output.norm, torch.nan)
        if output.scores is not None:
            found["uncertainty"], found["novelty"] = output.scores.p_wrong, output.scores.novelty
            found["foreseen_loss"] = output.scores.foreseen_loss
            found["coordinates"] = output.scores.coordinates
            if not isinstance(output, ClassifierOutput):
                found["belief"] = output.scores.belief
        arrays: dict[str, Any] = {
            name: None if value is None else value.float().cpu().numpy() for name, value in found.items()
        }
        return Embeddings(**arrays)

    def embed(self, images: Images, *, batch_size: int = 64) -> Embeddings:
        """Embeddings and uncertainty of images.

        Args:
            images: see ``Images``; at least one.
            batch_size: how many go through the network at once.

        Raises:
            UserError: as ``prepare``.
        """
        prepared = self.prepare(images)
        return Embeddings.joined([self.embeddings_of(self.outputs(part)) for part in prepared.split(batch_size)])

    def predict(
        self,
        images: Images,
        *,
        batch_size: int = 64,
        max_risk: float | None = None,
        confidence: float = 0.95,
        coverage: float | None = None,
    ) -> Predictions:
        """Classes and uncertainty of images.

        Args:
            images, batch_size: as in ``embed``.
            max_risk: give an answer only where, with ``confidence``, at most this share of answers is wrong.
            coverage: name as many classes as it takes for the true one to be among them in this share of images.

        Raises:
            UserError: as ``prepare``; or this is a retrieval model, which has no classes; or the promise cannot be
                given by what was held out.
        """
        if self.task != "classification":
            raise UserError(
                f"{self.source} is a retrieval model: it has no classes to predict. Use embed(), and compare embeddings"
            )
        thresholds = self.thresholds(max_risk, confidence, coverage)
        return self.predictions_of(self.embed(images, batch_size=batch_size), *thresholds)

    def thresholds(
        self, max_risk: float | None, confidence: float, coverage: float | None
    ) -> tuple[float | None, float | None]:
        """(threshold of P(wrong), least probability of a named class) for what is promised; None where nothing is.

        Raises:
            UserError: there is no introspection, nothing was held out for it, or the promise cannot be given.
        """
        if max_risk is None and coverage is None:
            return None, None
        if self.introspection is None or not self.introspection.spec.calibrated:
            why = "it has no introspection" if self.introspection is None else self.introspection.spec.note
            raise UserError(
                f"{self.source} can promise nothing: {why}. See python -m idml introspect, with held-out images"
            )
        held_out = self.introspection.spec.held_out
        try:
            promise = None if max_risk is None else self.introspection.promise(max_risk, confidence)
            least = None if coverage is None else self.introspection.set_threshold(coverage)
        except ValueError as error:
            raise UserError(str(error)) from None
        if max_risk is not None and promise is None:
            raise UserError(
                f"a risk of {max_risk:g} cannot be promised with confidence {confidence:g} by {held_out} held-out "
                "images: allow a higher risk, or hold out more"
            )
        if coverage is not None and least is None:
            raise UserError(
                f"a coverage of {coverage:g} cannot be promised by {held_out} held-out images: ask for less"
            )
        return None if promise is None else promise.threshold, least

    def predictions_of(
        self, embeddings: Embeddings, threshold: float | None = None, least: float | None = None
    ) -> Predictions:
        """The classes in a classifier's embeddings; ``threshold`` and ``least`` as ``thresholds`` gives them."""
        probabilities = embeddings.probabilities
        assert probabilities is not None
        labels = probabilities.argmax(1)
        judged = self.introspection is not None
        return Predictions(
            labels=labels,
            classes=tuple(self.classes[label] for label in labels),
            confidence=probabilities.max(1),
            probabilities=probabilities,
            uncertainty=embeddings.uncertainty,
            p_wrong=embeddings.uncertainty if judged else None,
            novelty=embeddings.novelty,
            answered=None if threshold is None else embeddings.uncertainty <= threshold,
            sets=None if least is None else class_sets(torch.from_numpy(probabilities), least).numpy(),
        )

    def loader(
        self, dataset: ImageDataset, *, batch_size: int = 64, workers: int = 0, rank: int = 0, world_size: int = 1
    ) -> TorchLoader:
        """Batches of a data set as evaluation shows them, this rank's share; see ``idml.data.torch_loader``.

        Images in memory must be as the readers of this project make them for the model's size.
        """
        square = self.spec.preprocessing
        return TorchLoader(
            dataset,
            batch_size=batch_size,
            image_size=square.image_size,
            train=False,
            workers=workers,
            rank=rank,
            world_size=world_size,
            fit=square.fit,
            crop_share=square.crop_share,
            interpolation=square.interpolation,
        )

    def embed_dataset(self, dataset: ImageDataset, *, batch_size: int = 64, workers: int = 0) -> Iterator[Embeddings]:
        """The embeddings of a data set, a batch at a time, in its order."""
        for images, _ in self.loader(dataset, batch_size=batch_size, workers=workers).epoch(0):
            yield self.embeddings_of(self.outputs(images))


def load(source: str | Path, *, device: str = "auto") -> TrainedModel:
    """A trained model, ready to be used.

    Args:
        source: a run directory (its ``checkpoints/last.pt``, whose figures the run reports), a checkpoint file, or a
            folder that ``python -m idml export`` wrote with ``--format safetensors`` or ``timm``.
        device: auto (cuda, then mps, then cpu), cpu, cuda or mps.

    Raises:
        UserError: there is no such thing, it is damaged, or it is something else.
    """
    path = user_path(source)
    if not path.exists():
        raise UserError(
            f"no model at {path}: expected a run directory, a checkpoint file, or an exported folder; "
            f"{nearest_path(path)}"
        )
    if path.is_dir() and (path / CONFIG).is_file():
        return _load_exported(path, device)
    if path.is_dir():
        found = newest_checkpoint(path)
        if found is None:
            raise UserError(
                f"no model in {path}: expected a run directory with checkpoints/last.pt, or a folder with {CONFIG} and "
                f"{WEIGHTS}"
            )
        path, checkpoint = found
    else:
        checkpoint = read_checkpoint(path)
    spec = ModelSpec.from_checkpoint(checkpoint, str(path))
    network, introspection = spec.build(), spec.build_introspection()
    load_state(network, checkpoint["model"], str(path))
    if introspection is not None:
        load_state(introspection, checkpoint["introspection"]["state"], f"the introspection of {path}")
    return TrainedModel(network, spec, device=choose_device(device), source=path, introspection=introspection)


def _load_exported(folder: Path, device: str) -> TrainedModel:
    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read: {error}") from None
    if not isinstance(described, dict) or not isinstance(described.get("idml"), dict):
        raise UserError(f"{folder / CONFIG} does not describe a model of this project: it has no object idml")
    spec = ModelSpec.from_json(described["idml"], str(folder / CONFIG))
    network = spec.build()
    if "timm_classifiers" in described["idml"]:
        from idml.timm_folder import read_timm_folder  # it needs this module

        state = read_timm_folder(folder, described["idml"])
    else:
        state = load_tensors(folder / WEIGHTS)
    introspection = spec.build_introspection()
    own = {name: value for name, value in state.items() if not name.startswith(INTROSPECTION)}
    load_state(network, own, str(folder / WEIGHTS))
    if introspection is not None:
        rest = {name.removeprefix(INTROSPECTION): value for name, value in state.items() if name not in own}
        load_state(introspection, rest, f"the introspection in {folder}")
    return TrainedModel(network, spec, device=choose_device(device), source=folder, introspection=introspection)


def as_pil(images: Images) -> list[Image.Image]:
    """Every image as RGB; UserError as for ``TrainedModel.prepare``."""
    if isinstance(images, Image.Image):
        try:
            return [as_rgb(images)]
        except (OSError, ValueError) as error:  # it may not be decoded yet
            raise UserError(f"the image {getattr(images, 'filename', '')} cannot be read: {error}") from None
    if isinstance(images, np.ndarray):
        return _from_pixels(images, "an array", (2, 3, 4))
    if isinstance(images, Tensor):
        if images.ndim not in (3, 4):
            raise UserError(f"expected a tensor (3, H, W) or (N, 3, H, W), got shape {tuple(images.shape)}")
        pixels = images.detach().cpu().movedim(-3, -1)
        # NumPy has no bfloat16.
        return _from_pixels((pixels.float() if pixels.is_floating_point() else pixels).numpy(), "a tensor", (3, 4))
    if isinstance(images, Iterable) and not isinstance(images, (str, bytes)):
        found = [image for each in images for image in as_pil(each)]
        if found:
            return found
        raise UserError("expected at least one image, got none")
    raise UserError(
        f"expected images as PIL images, arrays or tensors, or a sequence of them, got {type(images).__name__} "
        "(open files with PIL.Image.open)"
    )


def _from_pixels(pixels: np.ndarray, what: str, dimensions: tuple[int, ...]) -> list[Image.Image]:
    """RGB images of (H, W), (H, W, c) or (N, H, W, c) numbers."""
    channels = 1 if pixels.ndim == 2 else pixels.shape[-1] if pixels.ndim else 0
    if pixels.ndim not in dimensions or channels not in (1, 3) or pixels.size == 0:
        raise UserError(f"expected {what} of images with 1 or 3 channels, got one of shape {pixels.shape}")
    if pixels.dtype.kind not in "uif":
        raise UserError(f"expected {what} of integers from 0 to 255, or floats from 0 to 1, got {pixels.dtype}")
    low, high = float(pixels.min()), float(pixels.max())
    top = 1.0 if np.issubdtype(pixels.dtype, np.floating) else 255.0
    if not (low >= 0 and high <= top):  # NaN too
        raise UserError(
            f"expected numbers of {what} of {pixels.dtype} between 0 and {top:.0f}, got {low:g} to {high:g}; give "
            "images as they are, the model normalises them itself"
        )
    if top == 1.0:
        pixels = np.round(pixels * 255.0)
    batch = pixels.astype(np.uint8)
    batch = batch[None, ..., None] if batch.ndim == 2 else batch[None] if batch.ndim == 3 else batch
    return [Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)).copy()) for image in batch]
