"""Using a model that was trained: ``idml.load``, and from images to embeddings, classes and uncertainty.

Letters in shapes: N images, C classes, D semantic and E uncertainty dimensions, S pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from augment import normalise
from idml.data.image_dataset import ImageDataset
from idml.data.torch_loader import TorchLoader, as_evaluated
from idml.embedder import EmbedderOutput, IntrospectiveEmbedder
from idml.errors import UserError
from idml.foreign import ForeignClassifier
from idml.given_images import Images as Images
from idml.given_images import as_pil as as_pil
from idml.introspection.introspected import Introspected
from idml.introspection.introspection import Introspection
from idml.introspection.refusal import class_sets
from idml.models import ClassifierOutput, IntrospectiveClassifier, uncertainty_score
from idml.paths import user_path
from idml.predictions import Embeddings as Embeddings
from idml.predictions import Predictions as Predictions
from idml.spec import ModelSpec, Task, fingerprint

CONFIG, WEIGHTS, HEADS = "config.json", "model.safetensors", "idml.safetensors"
"""Files of an exported model; the last only where the weights are in timm's layout."""

INTROSPECTION = "introspection."
"""What the names of an introspection begin with in an exported model."""


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

    def with_introspection(self, introspection: Introspection | None) -> TrainedModel:
        """The same network with another introspection, or with none; this model is not to be used any more."""
        if isinstance(self.whole, Introspected):
            self.whole.close()
        about = None if introspection is None else introspection.spec.as_json()
        spec = dataclasses.replace(self.spec, introspection=about)
        return TrainedModel(self.network, spec, device=self.device, source=self.source, introspection=introspection)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write all of it to a folder that ``load`` reads; whole or not at all.

        Args:
            folder: is made.
            overwrite: replace a model that is there.

        Raises:
            UserError: it is there already, cannot be written, or a module made the network of which no name is known.
        """
        from idml.loading import save_model  # it needs this module

        save_model(self, user_path(folder), overwrite=overwrite)

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


def load(source: str | Path, *, device: str = "auto", trust_module: bool = False) -> TrainedModel:
    """A trained model, ready to be used.

    Args:
        source: a run directory (its ``checkpoints/last.pt``, whose figures the run reports), a checkpoint file, or a
            folder that ``python -m idml introspect`` wrote, or ``export`` with ``--format safetensors`` or ``timm``.
        device: auto (cuda, then mps, then cpu), cpu, cuda or mps.
        trust_module: let a network of somebody's own be made by the function that the folder names,
            package.module:function, which runs code. Files of all other models are read without running any.

    Raises:
        UserError: there is no such thing, it is damaged, it is something else, or it names a function that is not
            trusted.
    """
    from idml.loading import load_model  # it needs this module

    return load_model(source, device=device, trust_module=trust_module)
