"""The ISM against an oracle written in float64 NumPy straight from the formula, and its properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idml.similarity import (
    SQ_DISTANCE_FLOOR,
    class_sq_distances,
    introspective_distance,
    introspective_similarity,
    introspective_weight,
)

FLOATS = st.floats(-50, 50, allow_nan=False, width=32)
POSITIVE = st.floats(2**-9, 100, width=32)


def oracle_similarity(similarity: float, alpha: float, beta: float, temperature: float, offset: float) -> float:
    return 1 - (1 - similarity) * math.exp(-(beta + offset) / (temperature * alpha))


def random_case(seed: int, images: int = 5, classes: int = 7, features: int = 11) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "features": np.abs(generator.normal(size=(images, features))),
        "weight": generator.normal(size=(classes, features)) * 0.3,
        "bias": generator.normal(size=classes) * 0.5,
        "uncertainty": np.maximum(generator.normal(size=(images, 4)), 0),
    }


def oracle_classifier(case: dict[str, np.ndarray], variant: str, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances and introspective logits, one pair at a time, without any of the library's shortcuts."""
    images, classes = len(case["features"]), len(case["weight"])
    alphas, logits = np.empty((images, classes)), np.empty((images, classes))
    for i in range(images):
        for c in range(classes):
            h, w, b = case["features"][i], case["weight"][c], case["bias"][c]
            class_vector = w + b if variant == "released" else w
            alphas[i, c] = ((h - class_vector) ** 2).sum()
            beta = (case["uncertainty"][i] ** 2).sum()
            logits[i, c] = oracle_similarity((h * w).sum() + b, alphas[i, c], beta, temperature, 0.0)
    return alphas, logits


def tensors(case: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=dtype) for name, value in case.items()}


@pytest.mark.parametrize("variant", ["live", "released"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.float16, 0.05), (torch.bfloat16, 0.3)],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_class_form_equals_the_oracle(variant: str, dtype: torch.dtype, tolerance: float, seed: int) -> None:
    case = random_case(seed)
    expected_alpha, expected_logits = oracle_classifier(case, variant, 5.0)
    t = tensors(case, dtype)
    # The library never sees more than the inputs' precision, so the logits are formed from the rounded inputs.
    exact = {name: value.double() for name, value in t.items()}
    logits = (exact["features"] @ exact["weight"].T + exact["bias"]).to(torch.promote_types(dtype, torch.float32))
    alpha = class_sq_distances(
        logits, t["features"], t["weight"], t["bias"], bias_in_class_vector=variant == "released"
    )
    beta = t["uncertainty"].float().square().sum(1, keepdim=True)
    result = introspective_similarity(logits, alpha, beta if dtype != torch.float64 else beta.double())
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(alpha.numpy(), expected_alpha, atol=tolerance, rtol=tolerance)
    if dtype == torch.float64:
        tolerance = 1e-6  # beta went through float32
    np.testing.assert_allclose(result.numpy(), expected_logits, atol=tolerance, rtol=tolerance)


def test_the_two_variants_differ_where_the_bias_is_not_zero() -> None:
    case = random_case(3)
    assert np.abs(oracle_classifier(case, "live", 5.0)[1] - oracle_classifier(case, "released", 5.0)[1]).max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("temperature", "offset"), [(5.0, 0.0), (5.0, 4.0), (0.7, 1.5)])
def test_both_forms_equal_the_oracle(dtype: torch.dtype, temperature: float, offset: float) -> None:
    generator = np.random.default_rng(7)
    # Rounded to the dtype first: the functions are exact in float32 on whatever they are given.
    similarity, distance, beta = (
        torch.tensor(values).to(dtype)
        for values in (
            generator.uniform(-1, 1, (6, 4)),
            generator.uniform(0.1, 2, (6, 4)),
            generator.gamma(1, 1, (6, 1)),
        )
    )
    result = introspective_similarity(
        similarity, distance.float().square(), beta, temperature=temperature, offset=offset
    )
    shrunk = introspective_distance(distance, beta, temperature=temperature, offset=offset)
    for i in range(6):
        for c in range(4):
            s, d, b = float(similarity[i, c]), float(distance[i, c]), float(beta[i, 0])
            assert float(result[i, c]) == pytest.approx(
                oracle_similarity(s, d * d, b, temperature, offset), rel=1e-5, abs=1e-6
            )
            assert float(shrunk[i, c]) == pytest.approx(
                d * math.exp(-(b + offset) / (temperature * d * d)), rel=1e-5, abs=1e-6
            )


@given(st.lists(FLOATS, min_size=1, max_size=20), POSITIVE)
def test_no_uncertainty_gives_the_plain_metric_exactly(values: list[float], alpha: float) -> None:
    similarity = torch.tensor(values)
    zero, sq_distance = torch.zeros(()), torch.full_like(similarity, alpha)
    assert torch.equal(introspective_similarity(similarity, sq_distance, zero), similarity)
    assert torch.equal(introspective_similarity(similarity, torch.zeros_like(similarity), zero), similarity)
    distance = similarity.abs()
    assert torch.equal(introspective_distance(distance, zero), distance)


@given(FLOATS, POSITIVE, st.lists(st.floats(0, 1e4, width=32), min_size=2, max_size=10))
def test_similarity_moves_towards_one_as_uncertainty_grows(
    similarity: float, alpha: float, uncertainties: list[float]
) -> None:
    beta = torch.tensor(sorted(uncertainties))
    result = introspective_similarity(torch.full_like(beta, similarity), torch.tensor(alpha), beta).double()
    gap = (result - 1).abs()
    assert (gap[1:] <= gap[:-1] + 1e-5 * (1 + abs(similarity))).all()
    limit = introspective_similarity(torch.tensor(similarity), torch.tensor(alpha), torch.tensor(1e9))
    assert float(limit) == pytest.approx(1, abs=1e-5)


@given(POSITIVE, POSITIVE)
def test_distance_moves_towards_zero_as_uncertainty_grows(distance: float, beta: float) -> None:
    d = torch.tensor(distance)
    smaller, larger = introspective_distance(d, torch.tensor(beta)), introspective_distance(d, torch.tensor(2 * beta))
    assert 0 <= larger <= smaller <= d
    assert introspective_distance(d, torch.tensor(1e9)) == 0


@given(POSITIVE, st.floats(0, 100, width=32), st.floats(0.1, 50), st.floats(0, 10))
def test_weight_is_the_ratio_of_the_forms(distance: float, beta: float, temperature: float, offset: float) -> None:
    d, b = torch.tensor(distance, dtype=torch.float64), torch.tensor(beta, dtype=torch.float64)
    weight = introspective_weight(d.square(), b, temperature=temperature, offset=offset)
    assert 0 <= weight <= 1
    shrunk = introspective_distance(d, b, temperature=temperature, offset=offset)
    assert float(shrunk) == pytest.approx(float(weight * d))
    similarity = introspective_similarity(d * 0, d.square(), b, temperature=temperature, offset=offset)
    assert float(similarity) == pytest.approx(float(1 - weight), abs=1e-12)


@settings(deadline=None)
@given(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([0.0, 1e-8, 1e-4, 0.3, 4.0]),
    st.sampled_from([0.0, 1e-8, 1e-2, 1.0, 60.0]),
    st.sampled_from([-1.0, 0.0, 0.5, 1.0, 30.0]),
    st.sampled_from([0.0, 4.0]),
)
def test_gradients_are_finite(dtype: torch.dtype, alpha: float, beta: float, similarity: float, offset: float) -> None:
    inputs = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (similarity, alpha, beta)]
    introspective_similarity(*inputs, offset=offset).backward()
    distance = torch.tensor(math.sqrt(alpha), dtype=dtype, requires_grad=True)
    uncertainty = torch.tensor(beta, dtype=dtype, requires_grad=True)
    introspective_distance(distance, uncertainty, offset=offset).backward()
    for tensor in (*inputs, distance, uncertainty):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


@pytest.mark.parametrize("variant", ["live", "released"])
@pytest.mark.parametrize("zero_uncertainty", [True, False])
def test_gradients_are_finite_when_an_image_lies_on_its_class_vector(variant: str, zero_uncertainty: bool) -> None:
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    bias = torch.tensor([0.5, -0.5, 0.0])
    released = variant == "released"
    features = (weight + bias[:, None] if released else weight).clone().requires_grad_()
    uncertainty = torch.zeros(3, 2) if zero_uncertainty else torch.ones(3, 2)
    uncertainty.requires_grad_()
    weight.requires_grad_()
    logits = features @ weight.T + bias
    alpha = class_sq_distances(logits, features, weight, bias, bias_in_class_vector=released)
    assert alpha.diagonal().abs().max() < 1e-4
    introspective_similarity(logits, alpha, uncertainty.square().sum(1, keepdim=True)).sum().backward()
    for tensor in (features, uncertainty, weight):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


def test_alpha_under_the_floor_counts_as_the_floor() -> None:
    beta = torch.tensor(1e-4)
    at_floor = introspective_weight(torch.tensor(SQ_DISTANCE_FLOOR), beta)
    assert introspective_weight(torch.tensor(-1.0), beta) == introspective_weight(torch.tensor(0.0), beta) == at_floor


def test_autocast_does_not_reach_inside() -> None:
    generator = torch.Generator().manual_seed(1)
    features, weight = torch.randn(8, 64, generator=generator), torch.randn(5, 64, generator=generator)
    bias = torch.zeros(5)
    logits = features @ weight.T
    expected = class_sq_distances(logits, features, weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = class_sq_distances(logits, features, weight, bias)
        similar = introspective_similarity(logits.bfloat16(), inside, torch.ones(8, 1, dtype=torch.bfloat16))
    assert torch.equal(inside, expected)
    assert similar.dtype == torch.float32


def test_shapes_broadcast_to_batch_by_classes() -> None:
    assert introspective_similarity(torch.rand(3, 4), torch.rand(3, 4), torch.rand(3, 1)).shape == (3, 4)
    assert introspective_similarity(torch.rand(3, 4), torch.rand(()), torch.rand(1, 4)).shape == (3, 4)
    assert introspective_distance(torch.rand(3, 4), torch.rand(3, 1)).shape == (3, 4)


@pytest.mark.parametrize(("keyword", "value"), [("temperature", 0.0), ("temperature", -1.0), ("offset", -0.5)])
def test_a_bad_constant_is_named_with_its_value(keyword: str, value: float) -> None:
    one = torch.ones(())
    for function, inputs in (
        (introspective_similarity, (one, one, one)),
        (introspective_distance, (one, one)),
        (introspective_weight, (one, one)),
    ):
        with pytest.raises(ValueError, match=f"{keyword}.*{value}"):
            function(*inputs, **{keyword: value})


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="int64"):
        introspective_similarity(torch.ones(2, dtype=torch.int64), torch.ones(2), torch.ones(2))
