"""A classifier with two heads, semantic and uncertainty, joined by the ISM. For retrieval see ``idml.embedder``.

Letters in shapes: B images, C classes, D backbone features, E uncertainty dimensions (see ``idml.similarity``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from idml.backbones import create_backbone, infer_feature_dim
from idml.heads import RectifiedHead
from idml.introspection.introspection import Scores
from idml.similarity import (
    TEMPERATURE,
    class_sq_distances,
    introspective_exponent,
    introspective_similarity,
)

if TYPE_CHECKING:
    from idml.embedder import EmbedderOutput

IsmVariant = Literal["live", "released", "off"]


def check_choices(*choices: tuple[str, Any, Any]) -> None:
    """ValueError for the first (name, value, Literal type) whose value is none of those allowed."""
    for name, value, allowed in choices:
        if value not in get_args(allowed):
            raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}; got {value!r}")


class ClassifierOutput(NamedTuple):
    """What ``IntrospectiveClassifier`` returns, in training and in evaluation alike; all float32.

    Attributes:
        logits: (B, C) plain logits: what is used for prediction.
        introspective_logits: (B, C) ISM-weighted logits: what is trained. The very same tensor as ``logits`` when ISM
            is off.
        semantic: (B, D) backbone feature.
        uncertainty: (B, E) >= 0; all zero when ISM is off.
        exponent: (B,) ISM exponent of each image, its mean over the classes, of a live model before u is brought to
            scale; without gradient; None when ISM is off.
        scores: what the introspection says of each image; None where there is none.
    """

    logits: Tensor
    introspective_logits: Tensor
    semantic: Tensor
    uncertainty: Tensor
    exponent: Tensor | None = None
    scores: Scores | None = None


def uncertainty_score(output: ClassifierOutput | EmbedderOutput) -> Tensor:
    """Length of the uncertainty embedding of the ISM, which has no unit; all zero when ISM is off.

    It says how far the ISM weakens the comparisons of an image. For a probability that the answer is wrong, a novelty
    score and a threshold see ``idml.introspect``.

    Args:
        output: what the model returned for B images.

    Returns:
        (B,) float32, >= 0.
    """
    return output.uncertainty.float().norm(dim=1)


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
        check_choices(("ism", ism, IsmVariant))
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
        self.uncertainty_head: nn.Linear | None = None
        if ism == "live":
            self.uncertainty_head = RectifiedHead(self.feature_dim, uncertainty_dim, temperature)
        elif ism == "released":
            self.uncertainty_head = nn.Linear(self.feature_dim, uncertainty_dim)

    @torch.no_grad()
    def follow(self, exponent: Tensor) -> None:
        """Note the scale of a live model's u for evaluation; to be called once a step of training.

        Without it |u| has another unit in evaluation than in training; nothing else depends on it. Nothing to be done
        for other variants.

        Args:
            exponent: mean of ``ClassifierOutput.exponent`` over the step's images, of all ranks; 0-d.
        """
        if isinstance(self.uncertainty_head, RectifiedHead):
            self.uncertainty_head.follow(exponent)

    def forward(self, images: Tensor) -> ClassifierOutput:
        """Logits and uncertainty of a batch.

        Args:
            images: (B, 3, H, W), in the floating dtype and range that the backbone expects.

        Returns:
            ClassifierOutput.

        Raises:
            ValueError: the backbone's features are not (B, D).
        """
        features = self.features(images)
        # The heads run in float32: alpha is a difference of squares, and their cost is nothing beside the backbone's.
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            weight, bias = self.classifier.weight.float(), self.classifier.bias.float()
            logits = functional.linear(features, weight, bias)
            head = self.uncertainty_head
            if head is None:
                uncertainty = features.new_zeros(features.shape[0], self.uncertainty_dim)
                return ClassifierOutput(logits, logits, features, uncertainty)
            released = not isinstance(head, RectifiedHead)
            sq_distances = class_sq_distances(logits, features, weight, bias, bias_in_class_vector=released)
            if isinstance(head, RectifiedHead):
                uncertainty = head(features)
            else:
                uncertainty = functional.relu(functional.linear(features, head.weight.float(), head.bias.float()))
            beta = uncertainty.square().sum(1, keepdim=True)
            with torch.no_grad():  # an exponent is beta times that of beta = 1
                of_one = introspective_exponent(sq_distances, torch.ones_like(beta), temperature=self.temperature).mean(
                    1
                )
            exponent = beta[:, 0] * of_one
            if isinstance(head, RectifiedHead):
                scale = head.scale(exponent)
                uncertainty, beta = uncertainty * scale, beta * scale**2
            introspective_logits = introspective_similarity(logits, sq_distances, beta, temperature=self.temperature)
            return ClassifierOutput(logits, introspective_logits, features, uncertainty, exponent.detach())

    def features(self, images: Tensor) -> Tensor:
        """(B, D) features."""
        features = self.backbone(images)
        if features.ndim != 2 or features.shape[1] != self.feature_dim:
            raise ValueError(
                f"expected backbone features of shape (B, {self.feature_dim}), got {tuple(features.shape)}; "
                "a timm backbone must be created with num_classes=0"
            )
        return features
