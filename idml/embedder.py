"""An embedding for retrieval with two heads, semantic and uncertainty.

Letters in shapes: B images, D semantic and E uncertainty dimensions, H backbone features.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from idml.backbones import create_backbone, infer_map_dim
from idml.heads import UncertaintyHead
from idml.introspection.introspection import Scores
from idml.models import IsmVariant, check_choices


class EmbedderOutput(NamedTuple):
    """What ``IntrospectiveEmbedder`` returns, in training and in evaluation alike; all float32.

    Attributes:
        semantic: (B, D) of unit length (unless ``l2_norm`` is off): what is compared at test time.
        uncertainty: (B, E); all zero when ISM is off.
        norm: (B,) length of the semantic embedding before it was normalised.
        scores: what the introspection says of each image; None where there is none.
    """

    semantic: Tensor
    uncertainty: Tensor
    norm: Tensor
    scores: Scores | None = None

    def joint(self) -> Tensor:
        """(B, D + E): [semantic | uncertainty], as ``IntrospectiveDistance`` takes them."""
        return torch.cat([self.semantic, self.uncertainty], dim=1)


Pool = Literal["avg+max", "avg", "max"]


class IntrospectiveEmbedder(nn.Module):
    """An embedding for retrieval that also says how ambiguous an image is.

    Args:
        backbone: a timm model name; or a timm model, whose feature map is pooled; or any module that maps images to a
            (B, H, h, w) map or to (B, H) features.
        embedding_dim: D, length of the semantic embedding.
        uncertainty_dim: E, length of the uncertainty embedding; by default D, as released.
        pool: how a feature map (or the patch tokens of a transformer) becomes one feature; ``"avg+max"`` is the sum of
            both, as released. A backbone that gives several maps pools them itself.
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
        check_choices(("ism", ism, IsmVariant), ("pool", pool, Pool))
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
        self.uncertainty_head: nn.Linear | None = None
        if ism == "released":
            self.uncertainty_head = nn.Linear(self.feature_dim, uncertainty_dim)
        # The released code starts this head so, and leaves the other one to torch's default.
        nn.init.kaiming_normal_(self.semantic_head.weight, mode="fan_out")
        nn.init.zeros_(self.semantic_head.bias)
        if ism == "live":
            # What is drawn here is drawn beside the rest: plain and live start from the same network and proxies.
            with torch.random.fork_rng(devices=[]):
                self.uncertainty_head = UncertaintyHead(self.feature_dim, uncertainty_dim)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, H): the backbone's last map, pooled; float32.

        Raises:
            ValueError: the backbone gives something of another shape.
        """
        final = getattr(self.backbone, "forward_features", self.backbone)(images)
        skip = int(getattr(self.backbone, "num_prefix_tokens", 0))
        if isinstance(final, Tensor):
            features = pool_features(final, self.pool, self.feature_dim, skip=skip)
        else:
            features = pool_several(self.backbone, final)
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
                return EmbedderOutput(semantic, features.new_zeros(features.shape[0], self.uncertainty_dim), norm)
            uncertainty = self.uncertainty_head(features)
            if self.ism == "released" and self.l2_norm:
                uncertainty = functional.normalize(uncertainty, dim=1)
            return EmbedderOutput(semantic, uncertainty, norm)


def pool_several(backbone: nn.Module, maps: Any) -> Tensor:
    """(B, H) from several maps, as CoaT, CrossViT and EfficientViM give them: pooled as such a backbone pools them.

    Raises:
        ValueError: it has no way to.
    """
    pool = getattr(backbone, "forward_head", None)
    if pool is None:
        raise ValueError(f"expected a feature map, tokens or features from the backbone, got a {type(maps).__name__}")
    return pool(maps, pre_logits=True)


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
