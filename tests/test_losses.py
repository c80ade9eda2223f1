"""The eight losses: their published settings, an oracle for each written from its paper, gradients, the start."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn

from idml.backbones import create_backbone
from idml.embedder import IntrospectiveEmbedder
from idml.heads import UncertaintyHead
from idml.losses import LOSSES, LossName, MetricLoss, scale_uncertainty_head
from tests.test_distance import oracle as introspective_oracle

D, E, CLASSES = 8, 3, 10
NAMES: tuple[LossName, ...] = ("Proxy_Anchor", "Proxy_NCA", "MS", "Contrastive", "Triplet", "Margin", "FastAP", "NPair")
VARIANTS = ["off", "live", "released"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def batch(labels: list[int] | None = None, dtype: torch.dtype = torch.float64, spread: float = 0.7) -> Any:
    """(B, D + E) with unit semantic rows around a place for each class, and labels."""
    generator = torch.Generator().manual_seed(5)
    classes = torch.tensor([4, 4, 4, 1, 1, 1, 7, 7, 7, 0, 0, 0] if labels is None else labels)
    places = torch.randn(CLASSES, D, generator=generator, dtype=dtype)
    # All of them around one direction, so that every loss has near pairs of different classes.
    semantic = 2.0 + places[classes] + spread * torch.randn(len(classes), D, generator=generator, dtype=dtype)
    uncertainty = 0.5 * torch.randn(len(classes), E, generator=generator, dtype=dtype)
    return torch.cat([nn.functional.normalize(semantic, dim=1), uncertainty], dim=1), classes


def test_the_table_has_the_eight_losses() -> None:
    assert tuple(LOSSES) == NAMES


def test_published_settings() -> None:
    loss = {name: MetricLoss(name, CLASSES, D) for name in NAMES}
    anchor, nca, ms = loss["Proxy_Anchor"].loss, loss["Proxy_NCA"].loss, loss["MS"].loss
    assert isinstance(anchor, losses.ProxyAnchorLoss) and isinstance(nca, losses.ProxyNCALoss)
    assert (anchor.alpha, anchor.margin, anchor.proxies.shape) == (32, 0.1, (CLASSES, D))
    assert (nca.softmax_scale, nca.proxies.shape) == (32, (CLASSES, D))
    assert isinstance(ms, losses.MultiSimilarityLoss) and (ms.alpha, ms.beta, ms.base) == (2, 50, 0.5)
    assert isinstance(loss["MS"].miner, miners.MultiSimilarityMiner) and loss["MS"].miner.epsilon == 0.1
    contrastive, triplet = loss["Contrastive"], loss["Triplet"]
    assert isinstance(contrastive.loss, losses.ContrastiveLoss) and contrastive.miner is None
    assert (contrastive.loss.pos_margin, contrastive.loss.neg_margin) == (0, 0.5)
    assert isinstance(triplet.loss, losses.TripletMarginLoss) and triplet.loss.margin == 0.1
    assert isinstance(triplet.miner, miners.TripletMarginMiner)
    assert (triplet.miner.type_of_triplets, triplet.miner.margin) == ("semihard", 0.1)
    margin = loss["Margin"]
    assert isinstance(margin.loss, losses.MarginLoss) and margin.loss.margin == 0.2 and margin.loss.nu == 0
    assert isinstance(margin.loss.beta, nn.Parameter) and margin.loss.beta.tolist() == pytest.approx([1.2] * CLASSES)
    assert isinstance(margin.miner, miners.DistanceWeightedMiner)
    assert (margin.miner.cutoff, margin.miner.nonzero_loss_cutoff) == (0.5, 1.4)
    assert isinstance(loss["FastAP"].loss, losses.FastAPLoss) and loss["FastAP"].loss.num_bins == 10
    assert isinstance(loss["NPair"].loss, losses.NPairsLoss) and loss["NPair"].miner is None
    factors = {name: LOSSES[name].lr_factor for name in NAMES if list(loss[name].parameters())}
    assert factors == {"Proxy_Anchor": 100, "Proxy_NCA": 100, "Margin": 50}


def test_margin_scale_and_temperature_can_be_chosen() -> None:
    loss = MetricLoss("Proxy_Anchor", CLASSES, D, margin=0.3, scale=16.0, temperature=2.0)
    assert (loss.loss.margin, loss.loss.alpha, loss.distance.temperature) == (0.3, 16.0, 2.0)
    triplet = MetricLoss("Triplet", CLASSES, D, margin=0.4)
    assert triplet.loss.margin == triplet.miner.margin == 0.4  # type: ignore[union-attr]


def comparisons(output: Tensor, loss: MetricLoss) -> tuple[Tensor, Tensor]:
    """Alpha and beta of the comparisons that the loss makes, from the formula; float64."""
    s, u = output[:, : loss.embedding_dim].double(), output[:, loss.embedding_dim :].double()
    unit = s if loss.distance.form == "product" else nn.functional.normalize(s, dim=1)
    if loss.proxies is not None:
        proxies = nn.functional.normalize(loss.proxies.detach().double(), dim=1)
        alpha, beta = (unit[:, None] - proxies).square().sum(2), u.square().sum(1, keepdim=True)
        return alpha, beta.expand_as(alpha)
    others = ~torch.eye(len(s), dtype=torch.bool)
    return (unit[:, None] - unit).square().sum(2)[others], (u[:, None] + u).square().sum(2)[others]


def compare(x: np.ndarray, y: np.ndarray, form: str, ism: str) -> np.ndarray:
    """The comparison of the loss, pair by pair: plain, or weakened by the uncertainty."""
    if ism != "off":
        return introspective_oracle(x, y, form=form, variant=ism, temperature=5.0, dim=D)
    return introspective_oracle(x[:, :D], y[:, :D], form=form, variant="live", temperature=5.0, dim=D)


def log_one_plus(exponents: list[float]) -> float:
    return math.log(1 + sum(math.exp(exponent) for exponent in exponents))


def proxy_anchor(x: np.ndarray, y: np.ndarray, ism: str, loss: MetricLoss) -> float:
    """Kim et al. 2020, equation 4."""
    s = compare(x, loss.proxies.detach().numpy(), "similarity", ism)  # type: ignore[union-attr]
    pulls = [log_one_plus([-32 * (s[i, c] - 0.1) for i in np.flatnonzero(y == c)]) for c in set(y)]
    pushes = [log_one_plus([32 * (s[i, c] + 0.1) for i in np.flatnonzero(y != c)]) for c in range(CLASSES)]
    return sum(pulls) / len(pulls) + sum(pushes) / CLASSES


def proxy_nca(x: np.ndarray, y: np.ndarray, ism: str, loss: MetricLoss) -> float:
    """Movshovitz-Attias et al. 2017, the own proxy among those divided by; squared distances, scale 32."""
    sq = compare(x, loss.proxies.detach().numpy(), "distance", ism) ** 2  # type: ignore[union-attr]
    return float(np.mean([32 * sq[i, c] + math.log(sum(np.exp(-32 * sq[i]))) for i, c in enumerate(y)]))


def multi_similarity(x: np.ndarray, y: np.ndarray, ism: str, loss: MetricLoss) -> float:
    """Wang et al. 2019, equations 11 to 15."""
    s, total = compare(x, x, "similarity", ism), 0.0
    for i in range(len(y)):
        same = [s[i, j] for j in range(len(y)) if y[j] == y[i] and j != i]
        other = [s[i, j] for j in range(len(y)) if y[j] != y[i]]
        hard_same = [value for value in same if value < max(other) + 0.1]
        hard_other = [value for value in other if value > min(same) - 0.1]
        total += log_one_plus([-2 * (value - 0.5) for value in hard_same]) / 2
        total += log_one_plus([50 * (value - 0.5) for value in hard_other]) / 50
    return total / len(y)


def mean_positive(values: list[float]) -> float:
    positive = [value for value in values if value > 0]
    return sum(positive) / len(positive)


def contrastive(x: np.ndarray, y: np.ndarray, ism: str, loss: MetricLoss) -> float:
    """Hadsell et al. 2006 without squares: means over the pairs that cost anything."""
    d = compare(x, x, "distance", ism)
    pairs = [(i, j) for i in range(len(y)) for j in range(len(y)) if i != j]
    pull = mean_positive([d[i, j] for i, j in pairs if y[i] == y[j]])
    return pull + mean_positive([0.5 - d[i, j] for i, j in pairs if y[i] != y[j]])


def triplet(x: np.ndarray, y: np.ndarray, ism: str, loss: MetricLoss) -> float:
    """Schroff et al. 2015: every triplet whose negative is farther than the positive, by at most the margin."""
    d, n = compare(x, x, "distance", ism), range(len(y))
    triplets = [(a, p, q) for a in n for p in n for q in n if a != p and y[a] == y[p] and y[a] != y[q]]
    semi_hard = [(a, p, q) for a, p, q in triplets if 0 < d[a, q] - d[a, p] <= 0.1]
    return mean_positive([d[a, p] - d[a, q] + 0.1 for a, p, q in semi_hard])


def margin(x: np.ndarray, y: np.ndarray, ism: str, loss: MetricLoss) -> float:
    """Wu et al. 2017, equation 7, on the triplets that the miner draws: beta 1.2, alpha 0.2."""
    torch.manual_seed(3)
    mined = loss.miner(torch.tensor(x[:, :D]), torch.tensor(y))  # type: ignore[misc]
    d = compare(x, x, "distance", ism)
    terms = [d[a, p] - 1.2 + 0.2 for a, p in zip(mined[0], mined[1], strict=True)]
    terms += [1.2 - d[a, n] + 0.2 for a, n in zip(mined[0], mined[2], strict=True)]
    return mean_positive([float(term) for term in terms])


def fast_ap(x: np.ndarray, y: np.ndarray, ism: str, loss: MetricLoss) -> float:
    """Cakir et al. 2019, equation 10: histograms over the squared distance with triangular bins at 0, 0.4, ..., 4."""
    sq, total = compare(x, x, "distance", ism) ** 2, 0.0
    for i in range(len(y)):
        histogram = np.zeros((2, 11))  # of the same class, of others
        for j in range(len(y)):
            if j != i:
                for k in range(11):
                    histogram[int(y[i] != y[j]), k] += max(0.0, 1 - abs(sq[i, j] - 0.4 * k) / 0.4)
        ap = 0.0
        for k in range(11):
            below = histogram[:, : k + 1].sum()
            ap += histogram[0, k] * histogram[0, : k + 1].sum() / below if below > 0 else 0.0
        total += 1 - ap / sum((y == y[i]) & (np.arange(len(y)) != i))
    return total / len(y)


def n_pair(x: np.ndarray, y: np.ndarray, ism: str, loss: MetricLoss) -> float:
    """Sohn 2016: a pair of each class; each anchor against the positives of all classes."""
    pairs = [np.flatnonzero(y == c)[:2] for c in sorted(set(y))]
    s = compare(x[[a for a, _ in pairs]], x[[p for _, p in pairs]], "product", ism)
    return float(np.mean([-s[i, i] + math.log(sum(np.exp(s[i]))) for i in range(len(pairs))]))


ORACLES: dict[LossName, Callable[[np.ndarray, np.ndarray, str, MetricLoss], float]] = dict(
    zip(NAMES, (proxy_anchor, proxy_nca, multi_similarity, contrastive, triplet, margin, fast_ap, n_pair), strict=True)
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ism", VARIANTS)
def test_loss_equals_an_oracle_from_its_paper(name: LossName, ism: Any) -> None:
    embeddings, labels = batch()
    loss = MetricLoss(name, CLASSES, D, ism=ism).double()
    compared = embeddings.clone()
    if ism == "live":  # uncertainties are relative to those of the batch
        alpha, beta = comparisons(embeddings, loss)
        compared[:, D:] *= (0.05 / (beta / (5 * alpha)).mean()).sqrt()
    expected = ORACLES[name](compared.numpy(), labels.numpy(), ism, loss)
    torch.manual_seed(3)
    assert loss(embeddings, labels).item() == pytest.approx(expected, rel=1e-6)
    assert expected > 0.01  # the batch has something to learn from


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ism", VARIANTS)
def test_what_receives_a_gradient(name: LossName, ism: Any) -> None:
    """Semantic always; uncertainty through a live loss; released proxies see none of a unit-length uncertainty."""
    embeddings, labels = batch(dtype=torch.float32)
    leaf = embeddings.requires_grad_()
    loss = MetricLoss(name, CLASSES, D, ism=ism)
    value = loss(leaf, labels)
    value.backward()
    assert value.ndim == 0 and value.dtype == torch.float32 and torch.isfinite(value)
    gradient = leaf.grad
    assert gradient is not None and torch.isfinite(gradient).all()
    assert (gradient[:, :D].abs().sum(1) > 0).any()
    assert (gradient[:, D:].abs().sum() > 0) == (ism != "off")
    for parameter in loss.parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
        trained = parameter.grad.reshape(CLASSES, -1).abs().sum(1) > 0
        # Proxies of absent classes are pushed away (by Proxy_Anchor; only as far as a float goes, by Proxy_NCA).
        assert trained.all() if name == "Proxy_Anchor" else trained[torch.unique(labels)].any()


@pytest.mark.parametrize("name", NAMES)
def test_training_the_losses_own_parameters_lowers_it(name: LossName) -> None:
    embeddings, labels = batch(dtype=torch.float32)
    loss = MetricLoss(name, CLASSES, D)
    own = list(loss.parameters())
    if name not in ("Proxy_Anchor", "Proxy_NCA", "Margin"):
        assert own == []
        return

    def value() -> Tensor:
        torch.manual_seed(0)
        return loss(embeddings, labels)

    before, optimizer = value().item(), torch.optim.SGD(own, lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        value().backward()
        optimizer.step()
    assert value().item() < before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ism", VARIANTS)
@pytest.mark.parametrize("labels", [[2] * 6, [0, 1, 2, 3, 4, 5], [3]])
@pytest.mark.parametrize("identical", [False, True])
def test_batches_with_little_or_nothing_to_compare(
    name: LossName, ism: Any, labels: list[int], identical: bool
) -> None:
    embeddings, targets = batch(labels, torch.float32)
    leaf = (embeddings[:1].repeat(len(labels), 1) if identical else embeddings).requires_grad_()
    value = MetricLoss(name, CLASSES, D, ism=ism)(leaf, targets)
    value.backward()
    assert torch.isfinite(value) and leaf.grad is not None and torch.isfinite(leaf.grad).all()
    no_pairs = len(set(labels)) == len(labels)
    one_class = len(set(labels)) == 1
    nothing = {
        "MS": no_pairs or one_class,
        "Triplet": no_pairs or one_class,
        "Margin": no_pairs or one_class,
        "NPair": no_pairs or one_class,
        "FastAP": no_pairs or one_class,  # of one class, every order is the right one
        "Contrastive": len(labels) == 1 or (one_class and identical),
    }
    if nothing.get(name, False):
        assert value.item() == pytest.approx(0, abs=1e-6)
        assert leaf.grad.abs().max() < 1e-6
    elif not identical and (name != "Contrastive" or one_class):  # images of other classes may be far enough apart
        assert value.item() > 0 and leaf.grad.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_miners_draw_from_torch_alone(name: LossName) -> None:
    embeddings, labels = batch(dtype=torch.float32)
    loss = MetricLoss(name, CLASSES, D)

    def value(numpy_seed: int, torch_seed: int = 1) -> float:
        np.random.seed(numpy_seed)  # noqa: NPY002  (what a library may draw from)
        torch.manual_seed(torch_seed)
        return loss(embeddings, labels).item()

    assert value(0) == value(1) == value(2)
    assert (len({value(0, seed) for seed in range(5)}) > 1) == (name == "Margin")


@pytest.mark.parametrize("name", ["Proxy_Anchor", "Proxy_NCA"])
@pytest.mark.parametrize("classes", [10, 100, 11_318])
def test_norm_that_proxies_start_from(name: LossName, classes: int) -> None:
    def norms(**arguments: Any) -> Tensor:
        proxies = MetricLoss(name, classes, 512, **arguments).proxies
        assert proxies is not None and proxies.shape == (classes, 512)
        directions = nn.functional.normalize(proxies[:10].detach(), dim=1)
        assert (directions @ directions.T - torch.eye(10)).abs().max() < 0.3  # in all directions
        return proxies.detach().norm(dim=1)

    for ism in VARIANTS:
        torch.testing.assert_close(norms(ism=ism, proxy_norm=0.7), torch.full((classes,), 0.7))
        # Of one start whatever the ISM is; Proxy_Anchor as released: normal, variance 2 / C.
        expected = math.sqrt(2 / classes * 512) if name == "Proxy_Anchor" else math.sqrt(512)
        assert norms(ism=ism).square().mean().sqrt().item() == pytest.approx(expected, rel=0.03)
        assert norms(ism=ism).std() > 0.01 * expected
    for arguments in ({}, {"proxy_norm": 0.7}):
        starts = []
        for ism in VARIANTS:
            torch.manual_seed(3)
            starts.append(MetricLoss(name, classes, 512, ism=ism, **arguments).proxies)
        assert all(torch.equal(start, starts[0]) for start in starts)


class Scaled(nn.Module):
    """A small network whose features have any scale."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.layers, self.scale = create_backbone("resnet8_cifar").eval(), scale

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images) * self.scale


def real_images(fashion: dict[str, np.ndarray], size: int = 32, count: int = 40) -> tuple[Tensor, Tensor]:
    """(count, 3, size, size), mean 0 and deviation 1, of all ten classes; labels."""
    order = np.argsort(fashion["train_labels"][:400], kind="stable")
    chosen = order[np.linspace(0, 399, count, dtype=int)]
    images = torch.tensor(fashion["train_images"][chosen], dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 255
    images = nn.functional.interpolate(images, size, mode="bilinear")
    return (images - images.mean()) / images.std(), torch.tensor(fashion["train_labels"][chosen]).long()


def mean_weight(model: IntrospectiveEmbedder, loss: MetricLoss, images: Tensor) -> float:
    """The mean ISM weight of the comparisons that the loss makes, from the formula."""
    with torch.no_grad():
        alpha, beta = comparisons(model.eval()(images).joint(), loss)
    return torch.exp(-beta / (5 * alpha.clamp_min(1e-4))).mean().item()


def check_start(model: IntrospectiveEmbedder, loss: MetricLoss, images: Tensor, labels: Tensor) -> None:
    """Close to the plain metric, but with a gradient for the head."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told = scale_uncertainty_head(model, loss, images)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"uncertainty_head.gain"}
    assert 0.9 <= told < 1.0
    assert told == pytest.approx(mean_weight(model, loss, images), abs=0.003)
    output = model(images)
    loss(output.joint(), labels).backward()
    head = model.uncertainty_head
    assert head is not None and head.weight.grad is not None
    assert torch.isfinite(head.weight.grad).all()
    assert (head.weight.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_live_uncertainties_count_relative_to_those_of_the_batch(name: LossName) -> None:
    """A loss that could make every image unsure would: Proxy_NCA lost 6 points of R@1 by it."""
    embeddings, labels = batch(dtype=torch.float64)
    loss = MetricLoss(name, CLASSES, D).double()

    def of(scale: float) -> tuple[Tensor, Tensor]:
        semantic, uncertainty = embeddings[:, :D], embeddings[:, D:].clone().requires_grad_()
        torch.manual_seed(0)
        value = loss(torch.cat([semantic, scale * uncertainty], dim=1), labels)
        (gradient,) = torch.autograd.grad(value, uncertainty)
        return value.detach(), gradient

    (value, gradient), (scaled, gradient_scaled) = of(1.0), of(40.0)
    torch.testing.assert_close(scaled, value, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradient_scaled, gradient, rtol=1e-5, atol=1e-8)
    assert gradient.abs().max() > 1e-6
    assert abs((gradient * embeddings[:, D:]).sum()) < 1e-6 * gradient.abs().sum()  # none towards more or less of it
    alpha, beta = comparisons(loss._relative(embeddings), loss)
    assert (beta / (5 * alpha)).mean().item() == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_only_live_is_relative(name: LossName) -> None:
    embeddings, labels = batch(dtype=torch.float64)
    for ism in ("off", "released"):
        loss = MetricLoss(name, CLASSES, D, ism=ism).double()
        assert loss._relative(embeddings) is embeddings
    nothing = torch.cat([embeddings[:, :D], torch.zeros(len(embeddings), E)], dim=1).requires_grad_()
    live = MetricLoss(name, CLASSES, D).double()
    torch.manual_seed(0)
    value = live(nothing, labels)
    value.backward()
    assert torch.isfinite(value) and nothing.grad is not None and torch.isfinite(nothing.grad).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-4, 0.01, 1.0, 100.0])
def test_training_starts_close_to_the_plain_metric(
    fashion: dict[str, np.ndarray], name: LossName, scale: float
) -> None:
    images, labels = real_images(fashion)
    model = IntrospectiveEmbedder(Scaled(scale), 16, 8)
    check_start(model, MetricLoss(name, 10, 16), images, labels)


@pytest.mark.parametrize("backbone", ["resnet18", "vit_small", "efficientnet", "googlenet"])
@pytest.mark.parametrize("name", ["Proxy_Anchor", "MS"])
def test_training_starts_close_with_any_backbone(fashion: dict[str, np.ndarray], backbone: str, name: LossName) -> None:
    images, labels = real_images(fashion, count=20)
    model = IntrospectiveEmbedder(create_backbone(backbone, image_size=32), 64)
    check_start(model, MetricLoss(name, 10, 64), images, labels)


def test_training_starts_close_with_as_many_classes_as_there_are(fashion: dict[str, np.ndarray]) -> None:
    images, labels = real_images(fashion, count=10)
    model = IntrospectiveEmbedder(Scaled(1.0), 512)
    check_start(model, MetricLoss("Proxy_Anchor", 11_318, 512), images, labels)


@pytest.mark.parametrize("name", ["Proxy_Anchor", "MS"])
def test_identical_images_do_not_break_the_start(fashion: dict[str, np.ndarray], name: LossName) -> None:
    images, _ = real_images(fashion)
    for probe in (images[:1].repeat(6, 1, 1, 1), torch.cat([images[:8], images[:8]])):
        model = IntrospectiveEmbedder(Scaled(1.0), 16, 8)
        assert 0.9 <= scale_uncertainty_head(model, MetricLoss(name, 10, 16), probe) < 1
        assert isinstance(model.uncertainty_head, UncertaintyHead) and model.uncertainty_head.gain > 0


@pytest.mark.parametrize("ism", ["off", "released"])
@pytest.mark.parametrize("training", [True, False])
def test_other_variants_keep_their_start(fashion: dict[str, np.ndarray], ism: Any, training: bool) -> None:
    images, _ = real_images(fashion)
    model = IntrospectiveEmbedder("resnet8_cifar", 16, ism=ism).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = MetricLoss("Proxy_Anchor", 10, 16, ism=ism)
    weight = scale_uncertainty_head(model, loss, images)
    assert (weight == 1.0) == (ism == "off") and 0 < weight <= 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training == training
