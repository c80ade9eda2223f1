"""A classifier with two heads, semantic and uncertainty, joined by the ISM. For retrieval see ``idml.embedder``.

Letters in shapes: B images, C classes, D backbone features, E uncertainty dimensions (see ``idml.similarity``), F
numbers from several depths.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from idml.backbones import create_backbone, infer_feature_dim
from idml.depths import DepthReader
from idml.distributed import moments_over_ranks
from idml.foresight import EVIDENCE, ErrorCalibration, classifier_evidence
from idml.heads import MEAN_EXPONENT, Foresight, ForesightHead, RectifiedHead
from idml.runtime import evaluation_mode
from idml.similarity import (
    TEMPERATURE,
    class_sq_distances,
    introspective_exponent,
    introspective_similarity,
)

if TYPE_CHECKING:
    from idml.embedder import EmbedderOutput

IsmVariant = Literal["live", "released", "off"]

UncertaintyLoss = Literal["none", "loss-prediction"]
"""What trains the uncertainty head of ``live``: the ISM alone, or the losses that it is to foresee."""


def check_choices(*choices: tuple[str, Any, Any]) -> None:
    """ValueError for the first (name, value, Literal type) whose value is none of those allowed."""
    for name, value, allowed in choices:
        if value not in get_args(allowed):
            raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}; got {value!r}")


def check_uncertainty_loss(uncertainty_loss: UncertaintyLoss, ism: IsmVariant) -> None:
    """ValueError for one that there is not, or that the ISM variant has no head for."""
    check_choices(("uncertainty_loss", uncertainty_loss, UncertaintyLoss))
    if uncertainty_loss != "none" and ism != "live":
        raise ValueError(f"uncertainty_loss {uncertainty_loss!r} needs ism 'live', got {ism!r}")


class ClassifierOutput(NamedTuple):
    """What ``IntrospectiveClassifier`` returns, in training and in evaluation alike; all float32.

    Attributes:
        logits: (B, C) plain logits: what is used for prediction.
        introspective_logits: (B, C) ISM-weighted logits: what is trained. The very same tensor as ``logits`` when ISM
            is off.
        semantic: (B, D) backbone feature.
        uncertainty: (B, E) >= 0; all zero when ISM is off.
        evidence: (B, 3) what speaks for the top answer being wrong (``idml.foresight.EVIDENCE``), and
        error_probability: (B,) in [0, 1], what follows from it; None without loss prediction.
        foresight: of the head, with gradient to the head alone; None without loss prediction.
        exponent: (B,) ISM exponent of each image, its mean over the classes, without gradient; None when ISM is off.
    """

    logits: Tensor
    introspective_logits: Tensor
    semantic: Tensor
    uncertainty: Tensor
    evidence: Tensor | None = None
    error_probability: Tensor | None = None
    foresight: Foresight | None = None
    exponent: Tensor | None = None


def uncertainty_score(output: ClassifierOutput | EmbedderOutput) -> Tensor:
    """One number per image, higher for a more ambiguous image.

    With loss prediction it is the probability that the top answer is wrong (in retrieval: that the nearest neighbour is
    of another class), in [0, 1]; calibrated where images were held out for that (``--val-fraction``). Without, it is
    the Euclidean norm of the uncertainty embedding, which has no unit and is all zero when ISM is off.

    Args:
        output: what the model returned for B images.

    Returns:
        (B,) float32, >= 0.
    """
    if output.error_probability is not None:
        return output.error_probability
    return output.uncertainty.float().norm(dim=1)


def alteration_score(output: ClassifierOutput | EmbedderOutput) -> Tensor:
    """How likely an image is not as clean training images are: mixed, cut, blurred, noisy, cropped.

    Learned from images that were altered in training (``--uncertainty-shifts``); not calibrated.

    Args:
        output: of a model with loss prediction, for B images.

    Returns:
        (B,) float32 in [0, 1].

    Raises:
        ValueError: the model was made without loss prediction.
    """
    if isinstance(output, ClassifierOutput):
        altered = None if output.foresight is None else output.foresight.altered
    else:
        altered = output.altered
    if altered is None:
        raise ValueError("only a model with uncertainty_loss 'loss-prediction' notices altered images")
    return altered.detach().sigmoid()


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
        uncertainty_loss: ``"none"`` trains the head by the ISM alone; ``"loss-prediction"``, for ``"live"`` only, makes
            it foresee each image's loss from several depths of the backbone, which it never changes: to be trained by
            ``foresee`` and ``idml.foresight.foresight_loss`` too.
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
        uncertainty_loss: UncertaintyLoss = "none",
        feature_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_choices(("ism", ism, IsmVariant))
        check_uncertainty_loss(uncertainty_loss, ism)
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
        self.uncertainty_head: nn.Linear | ForesightHead | None = None
        self.depths = DepthReader(self.backbone, self.feature_dim)
        if uncertainty_loss == "loss-prediction":
            self.uncertainty_head = ForesightHead(self.depths.length, uncertainty_dim, num_classes)
            # The usual exponent, for an image as hard as most where alpha is the feature's squared length.
            self.uncertainty_head.gain.fill_(math.sqrt(MEAN_EXPONENT * temperature))
            self.calibration = ErrorCalibration(len(EVIDENCE))
        elif ism == "live":
            self.uncertainty_head = RectifiedHead(self.feature_dim, uncertainty_dim, temperature)
        elif ism == "released":
            self.uncertainty_head = nn.Linear(self.feature_dim, uncertainty_dim)

    @torch.no_grad()
    def follow(self, exponent: Tensor) -> None:
        """Keep the mean ISM exponent of a live model where it belongs; to be called once a step of training.

        Without it the gain of the uncertainty head stays as it is: the loss can then be lowered by making all images
        unsure. Nothing to be done for other variants.

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
        features, vector = self._features(images)
        # The heads run in float32: alpha is a difference of squares, and their cost is nothing beside the backbone's.
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            weight, bias = self.classifier.weight.float(), self.classifier.bias.float()
            logits = functional.linear(features, weight, bias)
            head = self.uncertainty_head
            if head is None:
                uncertainty = features.new_zeros(features.shape[0], self.uncertainty_dim)
                return ClassifierOutput(logits, logits, features, uncertainty)
            foresight = None
            if isinstance(head, ForesightHead):
                if self.training:
                    head.note(vector)
                foresight = head(vector)
                # In units of the feature's length, as alpha is: tau then means the same for every backbone. Relative to
                # what is usual: foreseen losses change by an order of magnitude in training, and are large where it
                # mixes; comparisons must not all be weakened by that. The head learns from what it foresees, not here.
                length = features.detach().norm(dim=1, keepdim=True)
                foreseen = foresight.foreseen_loss.detach()
                usual = moments_over_ranks(foreseen[:, None])[0][0] if self.training else head.usual_loss
                if self.training:
                    head.note_losses(usual)
                uncertainty = foresight.uncertainty.detach() * length * head.gain * usual.rsqrt()
            elif isinstance(head, RectifiedHead):
                uncertainty = head(features)
            else:
                uncertainty = functional.relu(functional.linear(features, head.weight.float(), head.bias.float()))
            sq_distances = class_sq_distances(
                logits, features, weight, bias, bias_in_class_vector=self.ism == "released"
            )
            beta = uncertainty.square().sum(1, keepdim=True)
            introspective_logits = introspective_similarity(logits, sq_distances, beta, temperature=self.temperature)
            with torch.no_grad():
                exponent = introspective_exponent(sq_distances, beta, temperature=self.temperature).mean(1)
            output = ClassifierOutput(logits, introspective_logits, features, uncertainty, exponent=exponent)
            if foresight is None:
                return output
            with torch.no_grad():
                evidence = classifier_evidence(logits, foresight)
                probability = self.calibration(evidence)
        return output._replace(evidence=evidence, error_probability=probability, foresight=foresight)

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) features, and the (B, F) vector from several depths that a ``ForesightHead`` looks at."""
        if not isinstance(self.uncertainty_head, ForesightHead) or not self.depths.indices:
            features = self.backbone(images)
            maps: list[Tensor] = []
        else:
            final, maps = self.depths(self.backbone, images)
            pool: Any = self.backbone.forward_head
            features = pool(final)
        if features.ndim != 2 or features.shape[1] != self.feature_dim:
            raise ValueError(
                f"expected backbone features of shape (B, {self.feature_dim}), got {tuple(features.shape)}; "
                "a timm backbone must be created with num_classes=0"
            )
        return features, self.depths.vector(maps, features)

    def foresee(self, images: Tensor) -> tuple[Foresight, Tensor]:
        """What the head says of images that the backbone does not learn from, seen as in evaluation; to train it by.

        Args:
            images: (B, 3, H, W), as for ``forward``.

        Returns:
            (Foresight with gradient to the head alone, (B, C) plain logits without gradient).
        """
        assert isinstance(self.uncertainty_head, ForesightHead)
        with torch.no_grad(), evaluation_mode(self.backbone):
            features, vector = self._features(images)
        with torch.autocast(features.device.type, enabled=False):
            if self.training:
                self.uncertainty_head.note(vector)
            return self.uncertainty_head(vector), self.classifier(features.float()).detach()
