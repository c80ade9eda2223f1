"""The ISM inside pytorch-metric-learning: an oracle written pair by pair in float64, its limits, gradients, users."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning import distances, losses, miners
from torch import Tensor

from idml.distance import IntrospectiveDistance

D, E = 6, 3
FORMS = ["similarity", "distance"]
ALL_FORMS = [*FORMS, "product"]
VARIANTS = ["live", "released"]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def rows(count: int, width: int, seed: int, *, norm: float | None = None) -> np.ndarray:
    """Random rows; of a semantic part of the given norm, or as they come."""
    result = np.random.default_rng(seed).normal(size=(count, width))
    if norm is not None:
        result[:, :D] *= norm / np.linalg.norm(result[:, :D], axis=1, keepdims=True)
    result[:, D:] *= 0.7
    return result


def oracle_pair(x: np.ndarray, y: np.ndarray, *, form: str, variant: str, temperature: float, dim: int = D) -> float:
    """The published formula for one pair; a row of ``dim`` numbers is a proxy, whose raw norm counts in released alpha.

    The form "product" compares vectors as they are, whatever the variant.
    """
    unit_x, unit_y = (row[:dim] / np.linalg.norm(row[:dim]) for row in (x, y))
    place_x, place_y = (
        row[:dim] if form == "product" or (variant == "released" and len(row) == dim) else unit
        for row, unit in ((x, unit_x), (y, unit_y))
    )  # where alpha is measured
    alpha = sum((a - b) ** 2 for a, b in zip(place_x, place_y, strict=True))
    width = max(len(x), len(y)) - dim
    u_x, u_y = (row[dim:] if len(row) > dim else np.zeros(width) for row in (x, y))
    beta = sum((a + b) ** 2 for a, b in zip(u_x, u_y, strict=True))
    offset = {"live": 0.0, "released": 4.0}[variant]
    weight = math.exp(-(beta + offset) / (temperature * max(alpha, 1e-4)))
    if form == "distance":
        return float(np.linalg.norm(unit_x - unit_y)) * weight
    return 1 - (1 - float(place_x @ place_y if form == "product" else unit_x @ unit_y)) * weight


def oracle(x: np.ndarray, y: np.ndarray, **settings: Any) -> np.ndarray:
    return np.array([[oracle_pair(a, b, **settings) for b in y] for a in x])


def operands(kind: str, size: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Images of any norm with images, or with proxies of norms around 3."""
    width = D if kind == "proxies" else D + E
    return rows(size, D + E, 1), rows(size, width, 2, norm=3.0 if kind == "proxies" else None)


def images_at(semantic: Tensor, uncertainty: Tensor) -> Tensor:
    return torch.cat([semantic, uncertainty], dim=1)


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["images", "proxies"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matrix_and_pairs_equal_the_oracle(form: Any, variant: Any, kind: str, dtype: torch.dtype) -> None:
    x, y = (torch.tensor(operand).to(dtype) for operand in operands(kind))
    # What the distance sees are the rounded numbers, so the oracle starts from those too.
    expected = oracle(x.double().numpy(), y.double().numpy(), form=form, variant=variant, temperature=3.0)
    distance = IntrospectiveDistance(D, variant=variant, form=form, temperature=3.0)
    matrix, pairs = distance(x, y), distance.pairwise_distance(x, y)
    assert matrix.dtype == pairs.dtype == dtype
    tolerance = max(TOLERANCE[dtype], 1e-5 if form == "distance" else 0)  # torch adds 1e-6 to each coordinate
    np.testing.assert_allclose(matrix.double().numpy(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    np.testing.assert_allclose(pairs.double().numpy(), expected.diagonal(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_power_is_that_of_the_result(form: Any) -> None:
    x = rows(4, D + E, 3)
    expected = oracle(x, x, form=form, variant="live", temperature=5.0) ** 2
    matrix = IntrospectiveDistance(D, form=form, power=2)(torch.tensor(x))
    np.testing.assert_allclose(matrix.numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["images", "proxies"])
def test_weights_are_those_of_the_oracle(variant: Any, kind: str) -> None:
    x, y = operands(kind)
    weights = IntrospectiveDistance(D, variant=variant).weights(torch.tensor(x), torch.tensor(y)).numpy()
    plain = oracle(x, y, form="distance", variant="live", temperature=math.inf)
    np.testing.assert_allclose(weights * plain, oracle(x, y, form="distance", variant=variant, temperature=5.0))
    assert (weights > 0).all() and (weights < 1).all()


@pytest.mark.parametrize("form", FORMS)
def test_live_does_not_feel_the_length_of_a_proxy_and_released_does(form: Any) -> None:
    """At norm 3.2 alpha is 11.2 - 6.4 cos, of which little is the cosine: the ISM was inert there."""
    x, proxies = (torch.tensor(operand) for operand in operands("proxies"))
    unit = proxies / proxies.norm(dim=1, keepdim=True)
    cosine = (x[:, :D] / x[:, :D].norm(dim=1, keepdim=True)) @ unit.T
    live, released = (IntrospectiveDistance(D, variant=variant, form=form) for variant in VARIANTS)  # type: ignore[arg-type]
    for length in (0.05, 1.0, 3.2, 40.0):
        torch.testing.assert_close(live(x, length * unit), live(x, unit), rtol=1e-12, atol=1e-12)
        beta = x[:, D:].square().sum(1, keepdim=True)
        torch.testing.assert_close(live.weights(x, length * unit), torch.exp(-beta / (5 * (2 - 2 * cosine))))
        alpha = 1 + length**2 - 2 * length * cosine
        torch.testing.assert_close(released.weights(x, length * unit), torch.exp(-(beta + 4) / (5 * alpha)))


@pytest.mark.parametrize(
    ("form", "plain"),
    [
        ("similarity", distances.CosineSimilarity),
        ("distance", distances.LpDistance),
        ("product", lambda: distances.DotProductSimilarity(normalize_embeddings=False)),
    ],
)
@pytest.mark.parametrize("size", [5, 40])  # torch.cdist computes larger matrices in another way
@pytest.mark.parametrize("kind", ["images", "proxies"])
def test_plain_is_recovered_exactly_without_uncertainty(form: Any, plain: Any, size: int, kind: str) -> None:
    x, y = (torch.tensor(operand, dtype=torch.float32) for operand in operands(kind, size))
    x[:, D:] = 0
    y[:, D:] = 0
    distance = IntrospectiveDistance(D, form=form)
    bare_x, bare_y = x[:, :D].contiguous(), y[:, :D].contiguous()
    assert torch.equal(distance(x, y), plain()(bare_x, bare_y))
    compared = [bare if form == "product" else torch.nn.functional.normalize(bare, dim=1) for bare in (bare_x, bare_y)]
    torch.testing.assert_close(
        distance.pairwise_distance(x, y), plain().pairwise_distance(*compared), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_uncertainty_moves_every_pair_towards_the_same(variant: Any) -> None:
    semantic = torch.tensor(rows(6, D, 4))
    direction = torch.tensor(rows(6, E, 5)).abs()  # all of one sign: beta of each pair grows with the scale
    off = ~torch.eye(6, dtype=torch.bool)
    similarity = IntrospectiveDistance(D, variant=variant, form="similarity")
    distance = IntrospectiveDistance(D, variant=variant, form="distance")
    scales = [0.0, 0.3, 1.0, 3.0, 100.0]
    similarities = torch.stack([similarity(images_at(semantic, scale * direction))[off] for scale in scales])
    lengths = torch.stack([distance(images_at(semantic, scale * direction))[off] for scale in scales])
    assert (similarities.diff(dim=0)[:-1] > 0).all() and (lengths.diff(dim=0)[:-1] < 0).all()
    torch.testing.assert_close(similarities[-1], torch.ones_like(similarities[-1]), rtol=0, atol=1e-6)
    torch.testing.assert_close(lengths[-1], torch.zeros_like(lengths[-1]), rtol=0, atol=1e-6)


def degenerate(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images, and proxies or images, at a place where a careless formula divides by zero."""
    x, proxies = rows(4, D + E, 6, norm=1.0), rows(4, D, 7, norm=3.0)
    if name == "on the proxy":
        proxies = x[:, :D].copy()
    elif name == "on the proxy, certain":
        proxies = x[:, :D].copy()
        x[:, D:] = 0
    elif name == "duplicates":
        x[1:] = x[0]
        return x, x
    elif name == "certain duplicates":
        x[1:] = x[0]
        x[:, D:] = 0
        return x, x
    elif name == "certain":
        x[:, D:] = 0
    elif name == "zero proxies":
        proxies[:] = 0
    elif name == "huge uncertainty":
        x[:, D:] = 1e4
    elif name == "opposite uncertainty":
        x[1] = np.concatenate([x[1, :D], -x[0, D:]])
        return x, x
    return x, proxies


CASES = ["on the proxy", "on the proxy, certain", "duplicates", "certain duplicates", "certain", "huge uncertainty"]
CASES += ["opposite uncertainty"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_finite(case: str, form: Any, variant: Any, dtype: torch.dtype, autocast: bool) -> None:
    x, y = (torch.tensor(operand).to(dtype).requires_grad_() for operand in degenerate(case))
    distance = IntrospectiveDistance(D, variant=variant, form=form)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        matrix, pairs = distance(x, y), distance.pairwise_distance(x, y)
    assert torch.isfinite(matrix).all() and torch.isfinite(pairs).all()
    for result in (matrix.sum(), pairs.sum()):
        gradients = torch.autograd.grad(result, [x, y], retain_graph=True)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_vectors_have_finite_gradients(form: Any, variant: Any, dtype: torch.dtype) -> None:
    x, proxies = (torch.tensor(operand).to(dtype) for operand in degenerate("zero proxies"))
    x[0, :D] = 0
    for y in (proxies, x.clone()):
        leaves = [x.clone().requires_grad_(), y.requires_grad_()]
        result = IntrospectiveDistance(D, variant=variant, form=form)(*leaves)
        assert torch.isfinite(result).all()
        assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(result.sum(), leaves))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(form: Any, precision: torch.dtype) -> None:
    x, y = (torch.tensor(operand, dtype=torch.float32) for operand in operands("images", 30))
    distance = IntrospectiveDistance(D, form=form)
    with torch.autocast("cpu", precision):
        inside, pairs, weights = distance(x, y), distance.pairwise_distance(x, y), distance.weights(x, y)
    assert torch.equal(inside, distance(x, y))
    assert torch.equal(pairs, distance.pairwise_distance(x, y))
    assert torch.equal(weights, distance.weights(x, y))


@pytest.mark.parametrize("form", ALL_FORMS)
def test_gradient_equals_finite_differences(form: Any) -> None:
    x, y = (torch.tensor(operand).requires_grad_() for operand in operands("proxies", 3))
    distance = IntrospectiveDistance(D, form=form)
    assert torch.autograd.gradcheck(distance, (x, y))
    assert torch.autograd.gradcheck(distance.pairwise_distance, (x, y), atol=1e-4)


def test_released_unit_uncertainty_has_no_gradient_from_proxies_and_live_has() -> None:
    """The known defect of the released code: beta is the constant 1 on the unit sphere."""
    torch.manual_seed(0)
    semantic = torch.nn.functional.normalize(torch.randn(8, D, dtype=torch.float64), dim=1)
    proxies = torch.randn(5, D, dtype=torch.float64)
    raw = torch.randn(8, E, dtype=torch.float64, requires_grad=True)
    mixture = torch.randn(8, 5, dtype=torch.float64)
    for form in FORMS:
        released = IntrospectiveDistance(D, variant="released", form=form)  # type: ignore[arg-type]
        unit = raw / raw.norm(dim=1, keepdim=True)
        (gradient,) = torch.autograd.grad((released(images_at(semantic, unit), proxies) * mixture).sum(), raw)
        assert gradient.abs().max() < 1e-15
        np.testing.assert_allclose(  # offset 4 + 1 = tau: exp(-1 / alpha)
            released.weights(images_at(semantic, unit), proxies).detach().numpy(),
            np.exp(-1 / (semantic[:, None] - proxies).square().sum(2).numpy()),
        )
        live = IntrospectiveDistance(D, form=form)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad((live(images_at(semantic, raw), proxies) * mixture).sum(), raw)
        assert (gradient.abs().max(1).values > 1e-4).all()


# Each loss with the form it is given and the plain distance of which that is the introspective one.
FURTHER_LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "CircleLoss": ("similarity", {}),
    "TupletMarginLoss": ("similarity", {}),
    "NTXentLoss": ("similarity", {}),
    "SupConLoss": ("similarity", {}),
    "MultiSimilarityLoss": ("similarity", {}),
    "NormalizedSoftmaxLoss": ("similarity", {"num_classes": 4, "embedding_size": D}),
    "SoftTripleLoss": ("similarity", {"num_classes": 4, "embedding_size": D, "centers_per_class": 2}),
    "DynamicSoftMarginLoss": ("distance", {}),
    "FastAPLoss": ("distance", {}),
    "GeneralizedLiftedStructureLoss": ("distance", {}),
    "IntraPairVarianceLoss": ("similarity", {}),
    "LiftedStructureLoss": ("distance", {}),
    "NCALoss": ("distance", {}),
    "ContrastiveLoss": ("distance", {}),
}  # fmt: skip


def plain_of(form: str) -> distances.BaseDistance:
    return distances.CosineSimilarity() if form == "similarity" else distances.LpDistance()


def batch(classes: int = 4, per_class: int = 4) -> tuple[Tensor, Tensor]:
    """(16, D + E) float32 with unit semantic rows near their class, and their labels."""
    generator = torch.Generator().manual_seed(8)
    labels = torch.arange(classes).repeat_interleave(per_class)
    semantic = torch.randn(classes, D, generator=generator)[labels]
    semantic = torch.nn.functional.normalize(semantic + 0.9 * torch.randn(len(labels), D, generator=generator), dim=1)
    return images_at(semantic, 0.6 * torch.randn(len(labels), E, generator=generator)), labels


@pytest.mark.parametrize("name", FURTHER_LOSSES)
def test_losses_that_know_nothing_of_it_become_introspective(name: str) -> None:
    form, arguments = FURTHER_LOSSES[name]
    embeddings, labels = batch()

    def loss_of(distance: distances.BaseDistance, rows: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same weights, where the loss has any
        return getattr(losses, name)(distance=distance, **arguments)(rows, labels)

    certain = images_at(embeddings[:, :D], torch.zeros(len(labels), E))
    plain = loss_of(plain_of(form), embeddings[:, :D])
    torch.testing.assert_close(loss_of(IntrospectiveDistance(D, form=form), certain), plain)  # type: ignore[arg-type]
    leaf = embeddings.requires_grad_()
    loss = loss_of(IntrospectiveDistance(D, form=form), leaf)  # type: ignore[arg-type]
    assert abs(loss.item() - plain.item()) > 1e-3
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert torch.isfinite(gradient).all()
    assert gradient[:, :D].abs().max() > 0 and gradient[:, D:].abs().max() > 0


FURTHER_MINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BatchHardMiner": ("distance", {}),
    "BatchEasyHardMiner": ("similarity", {}),
    "MultiSimilarityMiner": ("similarity", {"epsilon": 0.05}),
    "PairMarginMiner": ("distance", {"pos_margin": 0.7, "neg_margin": 1.0}),
    "TripletMarginMiner": ("distance", {"margin": 0.1, "type_of_triplets": "semihard"}),
    "DistanceWeightedMiner": ("distance", {}),
    "UniformHistogramMiner": ("distance", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FURTHER_MINERS)
def test_miners_that_know_nothing_of_it_become_introspective(name: str) -> None:
    form, arguments = FURTHER_MINERS[name]
    embeddings, labels = batch()

    def mined(distance: distances.BaseDistance, rows: Tensor) -> list[list[int]]:
        torch.manual_seed(0)
        return [indices.tolist() for indices in getattr(miners, name)(distance=distance, **arguments)(rows, labels)]

    introspective = IntrospectiveDistance(D, form=form)  # type: ignore[arg-type]
    certain = images_at(embeddings[:, :D], torch.zeros(len(labels), E))
    if name == "DistanceWeightedMiner":  # it takes the number of dimensions from the rows
        certain = embeddings[:, :D]
    plain = mined(plain_of(form), embeddings[:, :D])
    assert mined(introspective, certain) == plain
    uncertain = mined(introspective, embeddings)
    assert uncertain != plain and all(uncertain)
    if len(uncertain) == 3:
        anchors, positives, negatives = uncertain
    else:
        anchors, positives, other, negatives = uncertain
        assert (labels[other] != labels[negatives]).all()
    assert (labels[anchors] == labels[positives]).all() and len(set(labels[negatives].tolist())) > 1


def test_an_image_of_no_certainty_is_everybodys_hardest_negative() -> None:
    embeddings, labels = batch()
    embeddings[5, D:] = 50
    anchors, _, negatives = miners.BatchHardMiner(distance=IntrospectiveDistance(D, form="distance"))(
        embeddings, labels
    )
    assert set(negatives[labels[anchors] != labels[5]].tolist()) == {5}


@pytest.mark.parametrize(
    ("make", "right", "wrong"),
    [
        (lambda distance: losses.FastAPLoss(distance=distance), "distance", "similarity"),
        (lambda distance: miners.DistanceWeightedMiner(distance=distance), "distance", "similarity"),
        (lambda distance: losses.CircleLoss(distance=distance), "similarity", "distance"),
        (lambda distance: losses.TupletMarginLoss(distance=distance), "similarity", "distance"),
    ],
)
def test_a_loss_that_asks_for_one_form_gets_it(make: Any, right: Any, wrong: Any) -> None:
    distance = IntrospectiveDistance(D, form=right)
    assert make(distance).distance is distance
    with pytest.raises(AssertionError, match="requires the distance metric"):
        make(IntrospectiveDistance(D, form=wrong))


def test_the_forms_point_in_opposite_directions() -> None:
    similarity, distance = (IntrospectiveDistance(D, form=form) for form in ("similarity", "distance"))  # type: ignore[arg-type]
    assert similarity.is_inverted and not distance.is_inverted
    assert (similarity.form, distance.form, IntrospectiveDistance(D).form) == ("similarity", "distance", "similarity")
    near, far = torch.tensor(0.9), torch.tensor(0.2)
    assert similarity.smallest_dist(near, far) == near and distance.smallest_dist(near, far) == far


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"variant": "alive"}, "one of released, live, got 'alive'"),
        ({"form": "cosine"}, "one of similarity, distance, product, got 'cosine'"),
        ({"embedding_dim": 0}, "at least 1, got 0"),
        ({"temperature": 0.0}, "positive, got 0.0"),
        ({"temperature": math.nan}, "positive, got nan"),
    ],
)
def test_bad_arguments_carry_the_value(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        IntrospectiveDistance(**({"embedding_dim": D} | arguments))


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_too_short_are_refused(form: Any) -> None:
    distance = IntrospectiveDistance(D, form=form)
    for call in (distance, distance.pairwise_distance, distance.weights):
        with pytest.raises(ValueError, match=f"at least embedding_dim = {D} numbers, got {D - 1}"):
            call(torch.ones(2, D), torch.ones(2, D - 1))
