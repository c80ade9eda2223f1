"""A backbone with two heads: semantic classification and uncertainty, joined by the ISM.

Letters in shapes: B images, C classes, D backbone features, E uncertainty dimensions (see ``idml.similarity``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from idml import cifar_resnet, pyramidnet  # noqa: F401  (they register their models with timm)
from idml.errors import UserError, nearest
from idml.similarity import TEMPERATURE, class_sq_distances, introspective_similarity

IsmVariant = Literal["live", "released", "off"]

INITIAL_EXPONENT = 0.05
"""Mean ISM exponent at initialisation of ``live``: every comparison starts at weight exp(-0.05) = 0.95, so training
starts close to the plain classifier while the uncertainty head already receives gradient."""


class ClassifierOutput(NamedTuple):
    """What ``IntrospectiveClassifier`` returns, in training and in evaluation alike; all float32.

    Attributes:
        logits: (B, C) plain logits: what is used for prediction.
        introspective_logits: (B, C) ISM-weighted logits: what is trained. The very same tensor as ``logits`` when ISM
            is off.
        semantic: (B, D) backbone feature.
        uncertainty: (B, E) >= 0; all zero when ISM is off.
    """

    logits: Tensor
    introspective_logits: Tensor
    semantic: Tensor
    uncertainty: Tensor


def uncertainty_score(output: ClassifierOutput) -> Tensor:
    """One number per image, higher for a more ambiguous image: the Euclidean norm of its uncertainty embedding.

    Args:
        output: what the model returned for B images.

    Returns:
        (B,) float32, >= 0; all zero when ISM is off.
    """
    return output.uncertainty.float().norm(dim=1)


def create_backbone(
    name: str, *, image_size: int | None = None, pretrained: bool = False, arguments: Mapping[str, Any] | None = None
) -> nn.Module:
    """A timm model without its classifier.

    Args:
        name: of a timm model, or of one of ``idml.cifar_resnet`` and ``idml.pyramidnet``.
        image_size: pixels; passed on to models that are built for one input size (vision transformers).
        pretrained: take timm's weights, which it downloads when they are not in its cache; random otherwise.
        arguments: further ones for the model's constructor.

    Raises:
        UserError: timm has no such model (the nearest names are told), no weights for it or no way to get them, or the
            model does not take the arguments.
    """
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise UserError(
            f"unknown model {name!r}{nearest(architecture, timm.list_models())} timm.list_models() lists all"
        )
    default_cfg = timm.get_pretrained_cfg(architecture)
    fixed = image_size is not None and default_cfg is not None and default_cfg.fixed_input_size
    sizes: dict[str, Any] = {"img_size": image_size} if fixed else {}
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **(sizes | dict(arguments or {})))
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        # timm tells a wrong argument by a TypeError, weights it cannot have by one of the others.
        source = f" with arguments {dict(arguments)}" if arguments else " with timm's weights" if pretrained else ""
        raise UserError(f"model {name}{source} cannot be made: {error}") from None


def infer_feature_dim(backbone: nn.Module) -> int:
    """D, the length of the features that ``backbone(images)`` gives.

    Read from the attributes that timm's models carry; any other module is tried on a black image of a few usual sizes.

    Raises:
        ValueError: it cannot be found out; pass ``feature_dim`` to the model.
    """
    for attribute in ("head_hidden_size", "num_features"):
        value = getattr(backbone, attribute, None)
        if isinstance(value, int):
            return value
    parameter = next(backbone.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    was_training = backbone.training
    backbone.eval()
    try:
        for size in (224, 32, 28, 64):
            for channels in (3, 1):
                try:
                    with torch.no_grad():
                        features = backbone(torch.zeros(1, channels, size, size, device=device))
                except (RuntimeError, ValueError):
                    continue  # this input size is not the module's; the next one may be
                if isinstance(features, Tensor) and features.ndim == 2:
                    return features.shape[1]
    finally:
        backbone.train(was_training)
    raise ValueError(
        f"expected a backbone that gives (B, D) features, and found no D for {type(backbone).__name__}: "
        "pass feature_dim=D, or set backbone.num_features"
    )


class IntrospectiveClassifier(nn.Module):
    """A classifier that also says how ambiguous an image is, and learns from ISM-weighted logits.

    Args:
        backbone: a timm model name, or any module that maps images to (B, D) features.
        num_classes: C >= 2.
        uncertainty_dim: E, length of the uncertainty embedding (released code: 512 for ImageNet, 128 for CIFAR).
        ism: ``"live"`` measures the distance to the weight row of a class; ``"released"`` is the formula of the
            authors' code, where the bias is added to every coordinate of the class vector; ``"off"`` is the plain
            classifier, with no uncertainty head at all.
        temperature: tau of the ISM (released code: 5).
        feature_dim: D, needed only for a module from which it cannot be found out.

    Raises:
        ValueError: an argument is out of range, or D cannot be found out.
        UserError: ``backbone`` is a name that timm does not know.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int,
        *,
        uncertainty_dim: int = 512,
        ism: IsmVariant = "live",
        temperature: float = TEMPERATURE,
        feature_dim: int | None = None,
    ) -> None:
        super().__init__()
        if ism not in get_args(IsmVariant):
            raise ValueError(f"ism must be one of {', '.join(get_args(IsmVariant))}; got {ism!r}")
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if uncertainty_dim < 1:
            raise ValueError(f"uncertainty_dim must be at least 1, got {uncertainty_dim}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.backbone = create_backbone(backbone) if isinstance(backbone, str) else backbone
        self.feature_dim = feature_dim or infer_feature_dim(self.backbone)
        self.num_classes = num_classes
        self.uncertainty_dim = uncertainty_dim
        self.ism = ism
        self.temperature = temperature
        self.classifier = nn.Linear(self.feature_dim, num_classes)
        self.uncertainty_head = None if ism == "off" else nn.Linear(self.feature_dim, uncertainty_dim)
        if ism == "live":
            self._initialise_near_plain()

    def _initialise_near_plain(self) -> None:
        """Scale the uncertainty head so that the mean exponent beta / (tau * alpha) is ``INITIAL_EXPONENT``.

        With weights of variance v, half the units are cut by the ReLU, so beta = E * v * ||h||^2 / 2; and with the
        classifier's small rows alpha is about ||h||^2. The ratio depends on neither D nor C.
        """
        assert self.uncertainty_head is not None
        std = math.sqrt(2 * INITIAL_EXPONENT * self.temperature / self.uncertainty_dim)
        nn.init.normal_(self.uncertainty_head.weight, std=std)
        nn.init.zeros_(self.uncertainty_head.bias)

    def forward(self, images: Tensor) -> ClassifierOutput:
        """Logits and uncertainty of a batch.

        Args:
            images: (B, 3, H, W), in the floating dtype and range that the backbone expects.

        Returns:
            ClassifierOutput.

        Raises:
            ValueError: the backbone's features are not (B, D).
        """
        features = self.backbone(images)
        if features.ndim != 2 or features.shape[1] != self.feature_dim:
            raise ValueError(
                f"expected backbone features of shape (B, {self.feature_dim}), got {tuple(features.shape)}; "
                "a timm backbone must be created with num_classes=0"
            )
        # The heads run in float32: alpha is a difference of squares, and their cost is nothing beside the backbone's.
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            weight, bias = self.classifier.weight.float(), self.classifier.bias.float()
            logits = functional.linear(features, weight, bias)
            if self.uncertainty_head is None:
                uncertainty = features.new_zeros(len(features), self.uncertainty_dim)
                return ClassifierOutput(logits, logits, features, uncertainty)
            head = self.uncertainty_head
            uncertainty = functional.relu(functional.linear(features, head.weight.float(), head.bias.float()))
            sq_distances = class_sq_distances(
                logits, features, weight, bias, bias_in_class_vector=self.ism == "released"
            )
            introspective_logits = introspective_similarity(
                logits, sq_distances, uncertainty.square().sum(1, keepdim=True), temperature=self.temperature
            )
        return ClassifierOutput(logits, introspective_logits, features, uncertainty)
