"""A backbone with two heads: semantic (classification or embedding) and uncertainty, joined by the ISM.

Letters in shapes: B images, C classes, D backbone features (of the semantic embedding in retrieval), E uncertainty
dimensions (see ``idml.similarity``).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from idml.backbones import create_backbone, infer_feature_dim, infer_map_dim
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


def uncertainty_score(output: ClassifierOutput | EmbedderOutput) -> Tensor:
    """One number per image, higher for a more ambiguous image: the Euclidean norm of its uncertainty embedding.

    Args:
        output: what the model returned for B images.

    Returns:
        (B,) float32, >= 0; all zero when ISM is off.
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


class EmbedderOutput(NamedTuple):
    """What ``IntrospectiveEmbedder`` returns, in training and in evaluation alike; all float32.

    Attributes:
        semantic: (B, D) of unit length (unless ``l2_norm`` is off): what is compared at test time.
        uncertainty: (B, E); all zero when ISM is off.
        norm: (B,) length of the semantic embedding before it was normalised.
    """

    semantic: Tensor
    uncertainty: Tensor
    norm: Tensor

    def joint(self) -> Tensor:
        """(B, D + E): [semantic | uncertainty], as ``IntrospectiveDistance`` takes them."""
        return torch.cat([self.semantic, self.uncertainty], dim=1)


class UncertaintyHead(nn.Linear):
    """The live uncertainty head of retrieval: a linear map of (B, H) features to (B, E), times a fixed small ``gain``.

    Small, not zero: beta is quadratic in u, so at zero its gradient is zero too. The smallness is in the gain and not
    in the weights, which are drawn from N(0, 1), because an adaptive optimizer moves every weight by about the learning
    rate, however small it is. Weights that are small themselves are overrun in a few steps: beta grows past the point
    where the loss would stop it, every ISM weight is then zero, and with it every gradient.

    With features of mean square 1, ``beta = |u|^2 = E H gain^2`` against a proxy. The pairs that an untrained network
    compares are close (alpha well under 1), so alpha is taken as 1/4, and the gain such that the exponent
    ``beta / (tau alpha)`` is ``INITIAL_EXPONENT``. Features of another scale, or other distances, call for
    ``idml.losses.scale_uncertainty_head``, which measures them.

    Attributes:
        gain: 0-d float32 buffer, stored in checkpoints, not trained.
    """

    gain: Tensor

    def __init__(self, feature_dim: int, uncertainty_dim: int) -> None:
        super().__init__(feature_dim, uncertainty_dim)
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)
        gain = math.sqrt(INITIAL_EXPONENT * TEMPERATURE / 4 / (uncertainty_dim * feature_dim))
        self.register_buffer("gain", torch.tensor(gain))

    def forward(self, features: Tensor) -> Tensor:
        """(B, H) -> (B, E)."""
        return super().forward(features) * self.gain


Pool = Literal["avg+max", "avg", "max"]


class IntrospectiveEmbedder(nn.Module):
    """An embedding for retrieval that also says how ambiguous an image is.

    Args:
        backbone: a timm model name; or a timm model, whose feature map is pooled; or any module that maps images to a
            (B, H, h, w) map or to (B, H) features.
        embedding_dim: D, length of the semantic embedding.
        uncertainty_dim: E, length of the uncertainty embedding; by default D, as released.
        pool: how a feature map (or the patch tokens of a transformer) becomes one feature; ``"avg+max"`` is the sum of
            both, as released.
        ism: ``"live"``: u is a linear map of the feature; ``"released"``: u is made unit length too, which in the
            authors' code leaves its head without any gradient from proxies; ``"off"``: no uncertainty head.
        l2_norm: semantic embeddings of unit length.
        feature_dim: H, needed only for a module from which it cannot be found out.

    Raises:
        ValueError: an argument is out of range, or H cannot be found out.
        UserError: ``backbone`` is a name that timm does not know.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        embedding_dim: int = 512,
        uncertainty_dim: int | None = None,
        pool: Pool = "avg+max",
        ism: IsmVariant = "live",
        *,
        l2_norm: bool = True,
        feature_dim: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (("ism", ism, IsmVariant), ("pool", pool, Pool)):
            if value not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}; got {value!r}")
        uncertainty_dim = embedding_dim if uncertainty_dim is None else uncertainty_dim
        if embedding_dim < 1 or uncertainty_dim < 1:
            raise ValueError(
                f"embedding_dim and uncertainty_dim must be at least 1, got {embedding_dim} and {uncertainty_dim}"
            )
        self.backbone = create_backbone(backbone) if isinstance(backbone, str) else backbone
        self.feature_dim = feature_dim or infer_map_dim(self.backbone)
        self.embedding_dim, self.uncertainty_dim = embedding_dim, uncertainty_dim
        self.pool, self.ism, self.l2_norm = pool, ism, l2_norm
        self.semantic_head = nn.Linear(self.feature_dim, embedding_dim)
        head = UncertaintyHead if ism == "live" else nn.Linear
        self.uncertainty_head = None if ism == "off" else head(self.feature_dim, uncertainty_dim)
        # The released code starts this head so, and leaves the other one to torch's default.
        nn.init.kaiming_normal_(self.semantic_head.weight, mode="fan_out")
        nn.init.zeros_(self.semantic_head.bias)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, H): the backbone's last map, pooled; float32.

        Raises:
            ValueError: the backbone gives something of another shape.
        """
        forward = getattr(self.backbone, "forward_features", self.backbone)
        skip = int(getattr(self.backbone, "num_prefix_tokens", 0))
        features = pool_features(forward(images), self.pool, self.feature_dim, skip=skip)
        if features.ndim != 2 or features.shape[1] != self.feature_dim:
            raise ValueError(f"expected backbone features of {self.feature_dim} channels, got {tuple(features.shape)}")
        return features.float()

    def forward(self, images: Tensor) -> EmbedderOutput:
        """Semantic and uncertainty embedding of a batch.

        Args:
            images: (B, 3, S, S), in the floating dtype and range that the backbone expects.
        """
        features = self.features(images)
        with torch.autocast(features.device.type, enabled=False):
            semantic = self.semantic_head(features)
            norm = semantic.norm(dim=1)
            semantic = functional.normalize(semantic, dim=1) if self.l2_norm else semantic
            if self.uncertainty_head is None:
                return EmbedderOutput(semantic, features.new_zeros(len(features), self.uncertainty_dim), norm)
            uncertainty = self.uncertainty_head(features)
            if self.ism == "released" and self.l2_norm:
                uncertainty = functional.normalize(uncertainty, dim=1)
        return EmbedderOutput(semantic, uncertainty, norm)


def pool_features(features: Tensor, pool: Pool, channels: int, *, skip: int = 0) -> Tensor:
    """One feature of (B, H) from a map (B, H, h, w) or (B, h, w, H), from tokens (B, T, H), or from itself.

    Args:
        features: what a backbone gives.
        pool: mean, maximum, or the sum of both.
        channels: H, which tells the two orders of a map apart.
        skip: tokens in front that stand for no patch.
    """
    if features.ndim == 2:
        return features
    if features.ndim == 4:
        last = features.shape[1] != channels and features.shape[3] == channels
        features = features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2)
        skip = 0
    if features.ndim != 3:
        raise ValueError(f"expected a feature map, tokens or features, got shape {tuple(features.shape)}")
    places = features[:, skip:]  # (B, places, H)
    if pool == "avg":
        return places.mean(1)
    # max(dim) gives the gradient to one of equal places, as max pooling does; amax would share it out.
    highest = places.max(1).values
    return highest if pool == "max" else places.mean(1) + highest
