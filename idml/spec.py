"""What it takes to make a trained model again: plain values, read from a checkpoint or from a JSON file."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from idml.backbones import create_backbone
from idml.config import parse_name_values
from idml.data.image_dataset import Preprocessing
from idml.data.names import composed
from idml.embedder import IntrospectiveEmbedder, Pool
from idml.errors import UserError
from idml.foreign import ForeignClassifier, build_foreign
from idml.introspection.introspection import Introspection, IntrospectionSpec, Task
from idml.models import IntrospectiveClassifier, IsmVariant
from idml.similarity import TEMPERATURE

Origin = Literal["idml", "timm", "torchvision", "module"]

SMALL_DATASETS = (
    "fashion-mnist-mini",
    "fashion-mnist",
    "digits",
    "cifar10",
    "cifar100",
    "emoji-mini",
    "emoji",
    "icons",
)
"""Data sets whose images are shown whole; checkpoints from before ``Preprocessing.fit`` was stored give their names."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """The architecture of a model, its classes, and how images are brought to it.

    Attributes:
        task: classification, or retrieval.
        model: name of the backbone; model_kwargs: further arguments of it.
        classes: of the training images. In classification, position is label.
        preprocessing: see there.
        ism, temperature, uncertainty_dim: see ``IntrospectiveClassifier``.
        embedding_size, pool, l2_norm: of retrieval, see ``IntrospectiveEmbedder``.
        method, dataset: what it was trained by and on, for people to read.
        origin: whose network it is: ``idml``, or ``timm``, ``torchvision`` or ``module``, where ``model`` is its name
            there (of a module package.module:function, which makes it from ``model_kwargs``; empty where it is known in
            memory alone).
        features_of, feature_dim: of others' networks, see ``ForeignClassifier.watch``.
        introspection: ``IntrospectionSpec`` as plain values; None where there is none.
    """

    task: Task
    model: str
    model_kwargs: dict[str, Any]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    ism: IsmVariant
    temperature: float = TEMPERATURE
    uncertainty_dim: int
    embedding_size: int | None = None
    pool: Pool = "avg+max"
    l2_norm: bool = True
    method: str = ""
    dataset: str = ""
    origin: Origin = "idml"
    features_of: str = ""
    feature_dim: int = 0
    introspection: dict[str, Any] | None = None

    def build_introspection(self) -> Introspection | None:
        """The introspection, before its state is loaded; None where there is none.

        Raises:
            UserError: it cannot be made from these values.
        """
        if self.introspection is None:
            return None
        try:
            return Introspection(IntrospectionSpec.from_json(self.introspection))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the introspection cannot be made from what is stored of it: {error!r}") from None

    def build(self) -> IntrospectiveClassifier | IntrospectiveEmbedder | ForeignClassifier:
        """The network with random weights, in training mode.

        Raises:
            UserError: it cannot be made from these values.
        """
        if self.origin != "idml":
            module = build_foreign(self.origin, self.model, len(self.classes), self.model_kwargs)
            network = ForeignClassifier(module)
            network.watch(self.features_of, self.feature_dim or len(self.classes))
            return network
        backbone = create_backbone(self.model, image_size=self.preprocessing.image_size, arguments=self.model_kwargs)
        try:
            if self.task == "classification":
                return IntrospectiveClassifier(
                    backbone,
                    len(self.classes),
                    uncertainty_dim=self.uncertainty_dim,
                    ism=self.ism,
                    temperature=self.temperature,
                )
            return IntrospectiveEmbedder(
                backbone,
                self.embedding_size or 0,
                self.uncertainty_dim,
                self.pool,
                self.ism,
                l2_norm=self.l2_norm,
            )
        except ValueError as error:
            raise UserError(f"the model cannot be made from what is stored of it: {error}") from None

    def as_json(self) -> dict[str, Any]:
        """Plain values, which ``from_json`` takes back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> ModelSpec:
        """What ``as_json`` gave.

        Args:
            values: with any order of keys, and perhaps others.
            where: a file's name, for the error.

        Raises:
            UserError: values are missing, or of another kind.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        chosen = {name: value for name, value in values.items() if name in known}
        try:
            square = dict(chosen["preprocessing"])
            square |= {name: tuple(map(float, square[name])) for name in ("mean", "std")}
            chosen["preprocessing"] = Preprocessing(**square | {"image_size": int(square["image_size"])})
            chosen["classes"] = tuple(composed(str(name)) for name in chosen["classes"])
            chosen["model_kwargs"] = dict(chosen["model_kwargs"])
            return cls(**chosen)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where} does not describe a model of this project: {error!r}") from None

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any], where: str) -> ModelSpec:
        """Of a checkpoint as ``read_checkpoint`` gives it; ``where`` is its file's name, for the error.

        Raises:
            UserError: its config lacks something.
        """
        config = checkpoint["config"]
        retrieval = "embedding_size" in config
        fit = {"fit": "whole" if config.get("dataset") in SMALL_DATASETS else "crop"}
        method = config.get("method") or f"{config.get('loss')} + ISM {config.get('ism')}"
        taken = ["model", "ism", "dataset", *(("embedding_size", "pool") if retrieval else ())]
        values: dict[str, Any] = {name: config[name] for name in taken if name in config}
        values |= {
            "task": "retrieval" if retrieval else "classification",
            "model_kwargs": parse_name_values(config.get("model_kwargs")),
            "classes": checkpoint["classes"],
            "preprocessing": fit | dict(checkpoint["preprocessing"]),
            "temperature": config.get("temperature", TEMPERATURE),
            "uncertainty_dim": config.get("uncertainty_dim") or config.get("embedding_size"),
            "method": method,
            "introspection": (checkpoint.get("introspection") or {}).get("spec"),
        }
        if retrieval:
            values["l2_norm"] = bool(config.get("l2_norm", True))
        return cls.from_json(values, where)


def load_state(model: nn.Module, state: Mapping[str, Any], where: str) -> None:
    """Load weights into a model that was built for them.

    Raises:
        UserError: names or shapes differ.
    """
    try:
        model.load_state_dict(dict(state))
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = "; ".join(" ".join(line.split()) for line in str(error).splitlines()[1:4])
        raise UserError(f"the weights in {where} are not those of the model that it describes: {reason}") from None


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that change with any weight, name or calibration of a model."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        assert isinstance(value, Tensor)
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
