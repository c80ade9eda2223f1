"""The eight retrieval losses: pytorch-metric-learning's, with the published settings, plain or introspective.

``LOSSES`` is the table; ``MetricLoss`` joins a loss with its miner and with the distance that makes it introspective.
Letters in shapes: B images, C training classes, D semantic and E uncertainty dimensions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pytorch_metric_learning import distances, losses, miners
from torch import Tensor, nn

from idml.distance import DistanceForm, IntrospectiveDistance
from idml.embedder import IntrospectiveEmbedder
from idml.heads import MEAN_EXPONENT, TINY, UncertaintyHead
from idml.models import IsmVariant
from idml.similarity import TEMPERATURE

LossName = Literal["Proxy_Anchor", "Proxy_NCA", "MS", "Contrastive", "Triplet", "Margin", "FastAP", "NPair"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossSettings:
    """One row of the table.

    Attributes:
        build: makes the loss from its distance, the number of classes C, D, the margin and the scale.
        plain: makes the distance of the plain loss.
        form: of the ISM that takes its place.
        power: of that distance.
        miner: makes the miner from a distance and the margin, or None.
        mines_semantic: the miner looks at the semantic embeddings alone.
        margin, scale: published; None where the loss has none.
        lr_factor: learning rate of the loss's own parameters in units of that of the network.
        needs_pairs: without two images of a class in a batch there is nothing to learn from it.
    """

    build: Callable[..., losses.BaseMetricLossFunction]
    plain: Callable[[], distances.BaseDistance]
    form: DistanceForm
    power: float = 1
    miner: Callable[..., miners.BaseMiner] | None = None
    mines_semantic: bool = False
    margin: float | None = None
    scale: float | None = None
    lr_factor: float = 1.0
    needs_pairs: bool = True


def _proxy_anchor(distance: Any, num_classes: int, dim: int, margin: float, scale: float) -> Any:
    return losses.ProxyAnchorLoss(num_classes, dim, margin=margin, alpha=scale, distance=distance)


def _proxy_nca(distance: Any, num_classes: int, dim: int, margin: None, scale: float) -> Any:
    return losses.ProxyNCALoss(num_classes, dim, softmax_scale=scale, distance=distance)


def _multi_similarity(distance: Any, num_classes: int, dim: int, margin: None, scale: None) -> Any:
    return losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5, distance=distance)


def _contrastive(distance: Any, num_classes: int, dim: int, margin: float, scale: None) -> Any:
    return losses.ContrastiveLoss(pos_margin=0, neg_margin=margin, distance=distance)


def _triplet(distance: Any, num_classes: int, dim: int, margin: float, scale: None) -> Any:
    return losses.TripletMarginLoss(margin=margin, distance=distance)


def _margin(distance: Any, num_classes: int, dim: int, margin: float, scale: None) -> Any:
    return losses.MarginLoss(margin=margin, nu=0, beta=1.2, learn_beta=True, num_classes=num_classes, distance=distance)


def _fast_ap(distance: Any, num_classes: int, dim: int, margin: None, scale: None) -> Any:
    return losses.FastAPLoss(num_bins=10, distance=distance)


def _n_pair(distance: Any, num_classes: int, dim: int, margin: None, scale: None) -> Any:
    return losses.NPairsLoss(distance=distance)


LOSSES: Mapping[LossName, LossSettings] = {
    # Kim et al. 2020: alpha 32, delta 0.1, proxies at 100 times the learning rate.
    "Proxy_Anchor": LossSettings(
        build=_proxy_anchor, plain=distances.CosineSimilarity, form="similarity",
        margin=0.1, scale=32.0, lr_factor=100.0, needs_pairs=False,
    ),
    # Movshovitz-Attias et al. 2017; scale 32 in the released trainer.
    "Proxy_NCA": LossSettings(
        build=_proxy_nca, plain=lambda: distances.LpDistance(power=2), form="distance", power=2,
        scale=32.0, lr_factor=100.0, needs_pairs=False,
    ),
    # Wang et al. 2019: alpha 2, beta 50, lambda 0.5, pairs mined at epsilon 0.1.
    "MS": LossSettings(
        build=_multi_similarity, plain=distances.CosineSimilarity, form="similarity",
        miner=lambda distance, margin: miners.MultiSimilarityMiner(epsilon=0.1, distance=distance),
    ),
    # Hadsell et al. 2006; margin 0.5 in the released trainer.
    "Contrastive": LossSettings(build=_contrastive, plain=distances.LpDistance, form="distance", margin=0.5),
    # Schroff et al. 2015, semi-hard; margin 0.1 in the released trainer.
    "Triplet": LossSettings(
        build=_triplet, plain=distances.LpDistance, form="distance", margin=0.1,
        miner=lambda distance, margin: miners.TripletMarginMiner(
            margin=margin, type_of_triplets="semihard", distance=distance
        ),
    ),
    # Wu et al. 2017: alpha 0.2, beta 1.2 (learned, one a class), negatives drawn by distance with cut-offs 0.5 and 1.4.
    # Their beta learns at a rate of its own, which Roth et al. 2020 set to 5e-4 for a network at 1e-5: 50 times.
    "Margin": LossSettings(
        build=_margin, plain=distances.LpDistance, form="distance", margin=0.2, lr_factor=50.0,
        # The density of distances that it divides by is that of unit vectors in D dimensions.
        miner=lambda distance, margin: miners.DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.4),
        mines_semantic=True,
    ),
    # Cakir et al. 2019: 10 bins of squared distance.
    "FastAP": LossSettings(
        build=_fast_ap, plain=lambda: distances.LpDistance(power=2), form="distance", power=2
    ),
    # Sohn 2016; the released trainer compares by the inner product and leaves out the penalty on norms.
    "NPair": LossSettings(
        build=_n_pair, plain=lambda: distances.DotProductSimilarity(normalize_embeddings=False), form="product"
    ),
}  # fmt: skip
"""Every loss by the name that the released trainer gives it (Margin and FastAP: that of the paper's table)."""


class MetricLoss(nn.Module):
    """A loss of the table with its miner; plain or introspective.

    ``"live"`` takes uncertainties relative to those of the batch: u is multiplied such that the mean exponent of the
    comparisons that the loss makes is ``MEAN_EXPONENT``. The mean weight is then at least exp(-MEAN_EXPONENT) = 0.95,
    the exponential being convex, for any backbone, scale of features, number of classes and loss, and in every step.
    Which images are more or less sure than others is left to be learnt, while nothing is gained by making all of them
    unsure: without this, u runs away with Proxy_NCA.

    Args:
        name: key of ``LOSSES``.
        num_classes: C, of the training images.
        embedding_dim: D.
        ism: ``"off"`` is the plain loss; else the variant of the ``IntrospectiveDistance``.
        temperature: tau.
        margin, scale: in place of the published ones.
        proxy_norm: norm that each proxy starts from. By default proxies start as those of pytorch-metric-learning's
            loss do, whatever ``ism`` is: normal, of variance 2 / C (Proxy_Anchor, as released) or of a norm of
            sqrt(D / 3) to sqrt(D) (Proxy_NCA).
    """

    def __init__(
        self,
        name: LossName,
        num_classes: int,
        embedding_dim: int,
        *,
        ism: IsmVariant = "live",
        temperature: float = TEMPERATURE,
        margin: float | None = None,
        scale: float | None = None,
        proxy_norm: float | None = None,
    ) -> None:
        super().__init__()
        settings = LOSSES[name]
        margin = settings.margin if margin is None else margin
        scale = settings.scale if scale is None else scale
        self.embedding_dim, self.ism, self.mines_semantic = embedding_dim, ism, settings.mines_semantic
        self.distance = settings.plain()
        if ism != "off":
            self.distance = IntrospectiveDistance(
                embedding_dim, variant=ism, form=settings.form, temperature=temperature, power=settings.power
            )
        self.loss = settings.build(self.distance, num_classes, embedding_dim, margin, scale)
        self.miner = None if settings.miner is None else settings.miner(self.distance, margin)
        if self.proxies is not None and proxy_norm is not None:
            with torch.no_grad():
                nn.init.normal_(self.proxies).mul_(proxy_norm / self.proxies.norm(dim=1, keepdim=True))

    @property
    def proxies(self) -> nn.Parameter | None:
        """(C, D) of a loss that has proxies, else None."""
        return getattr(self.loss, "proxies", None)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: (B, D + E), [semantic | uncertainty]; the plain loss looks at the first D numbers only.
            labels: (B,) int64 in [0, C).

        Returns:
            0-d, float32; zero, with a gradient of zero, where the batch has nothing to compare.
        """
        semantic = embeddings[:, : self.embedding_dim]
        embeddings = semantic if self.ism == "off" else self._relative(embeddings)
        if self.miner is None:
            return self.loss(embeddings, labels)
        mined = self.miner((semantic if self.mines_semantic else embeddings).detach(), labels)
        return self.loss(embeddings, labels, mined)

    def _relative(self, embeddings: Tensor) -> Tensor:
        """(B, D + E) with u scaled to ``MEAN_EXPONENT``, with gradient through the mean; unless live, as they are."""
        if self.ism != "live" or (self.proxies is None and len(embeddings) < 2):
            return embeddings
        semantic, uncertainty = embeddings.split([self.embedding_dim, embeddings.shape[1] - self.embedding_dim], dim=1)
        exponent = self._comparisons("exponents", torch.cat([semantic.detach(), uncertainty], dim=1)).mean()
        return torch.cat([semantic, uncertainty * (MEAN_EXPONENT / exponent.clamp_min(TINY)).sqrt()], dim=1)

    def _comparisons(self, what: Literal["weights", "exponents"], embeddings: Tensor) -> Tensor:
        """What the distance says of the comparisons that the loss makes among these, in any shape."""
        assert isinstance(self.distance, IntrospectiveDistance)
        measure = getattr(self.distance, what)
        if self.proxies is not None:
            return measure(embeddings, self.proxies.detach().to(embeddings))
        return measure(embeddings, embeddings)[~torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)]

    @torch.no_grad()
    def ism_weight(self, embeddings: Tensor) -> float:
        """Mean ISM weight of the comparisons that the loss would make: images with proxies, or with one another."""
        return 1.0 if self.ism == "off" else self._comparisons("weights", self._relative(embeddings)).mean().item()


@torch.no_grad()
def scale_uncertainty_head(model: IntrospectiveEmbedder, loss: MetricLoss, images: Tensor) -> float:
    """Scale a live model's uncertainty head to what its loss makes of it: ``MEAN_EXPONENT`` among these images.

    For the loss that changes nothing, as it scales u itself; it is for those who use u later, in a search. Other
    variants are left as they are.

    Args:
        model: its head's gain is changed in place.
        loss: the loss that it is trained with.
        images: (B, 3, S, S), B >= 2, normalised; of the training classes.

    Returns:
        The mean ISM weight of the loss's comparisons among these images, in (0, 1].
    """
    was_training = model.training
    embeddings = model.eval()(images).joint()
    if model.ism == "live":
        assert isinstance(model.uncertainty_head, UncertaintyHead)
        exponent = loss._comparisons("exponents", embeddings.double()).mean().item()
        if exponent > 0:  # else there is nothing to compare, or nothing in the features
            model.uncertainty_head.gain.mul_(math.sqrt(MEAN_EXPONENT / exponent))
    model.train(was_training)
    return loss.ism_weight(embeddings)
