"""Promises: the exact bound against scipy, the guarantee by simulation on known distributions, sets of classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest
from torch import Tensor

from idml.introspection.refusal import as_arrays, binomial_upper_bound, class_sets, promised, set_threshold


@pytest.mark.parametrize(("errors", "count"), [(0, 1), (0, 50), (1, 20), (7, 200), (199, 200), (200, 200)])
@pytest.mark.parametrize("delta", [0.5, 0.05, 0.004])
def test_the_bound_is_the_exact_binomial_tail(errors: int, count: int, delta: float) -> None:
    bound = binomial_upper_bound(errors, count, delta)
    expected = binomtest(errors, count, alternative="less").proportion_ci(1 - delta, method="exact").high
    assert bound == pytest.approx(expected, abs=1e-12)
    if errors < count:
        assert binom.cdf(errors, count, bound) == pytest.approx(delta, rel=1e-6)


def draw(count: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """P(wrong) of 0.5 x^3, x uniform, and answers that are wrong with that probability: errors of 12.5 % in all."""
    p_wrong = 0.5 * generator.random(count) ** 3
    return torch.from_numpy(p_wrong), torch.from_numpy(generator.random(count) < p_wrong)


def true_risk(threshold: float) -> float:
    """Error rate among the answers up to a threshold of that distribution."""
    return threshold / 4


@pytest.mark.parametrize("max_risk", [0.05, 0.1])
def test_the_promise_is_kept(max_risk: float) -> None:
    """Over 400 draws of held-out images, the true risk is above what was promised in at most 5 %."""
    generator = np.random.default_rng(0)
    promises = [promised(*draw(1000, generator), max_risk=max_risk, confidence=0.95) for _ in range(400)]
    given = [promise for promise in promises if promise is not None]
    assert len(given) == 400
    broken = sum(true_risk(promise.threshold) > max_risk for promise in given)
    assert broken <= binom.ppf(0.99, 400, 0.05)
    assert all(promise.risk <= promise.bound <= max_risk for promise in given)
    # It is not bought by answering nothing: the best threshold would answer (8 max_risk)^(1/3) of the images.
    assert np.mean([promise.coverage for promise in given]) > 0.75 * (8 * max_risk) ** (1 / 3)


def test_a_better_score_answers_more() -> None:
    generator = np.random.default_rng(1)
    p_wrong, wrong = draw(2000, generator)
    good = promised(p_wrong, wrong, max_risk=0.1, confidence=0.95)
    shuffled = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    random = promised(shuffled, wrong, max_risk=0.1, confidence=0.95)
    assert good is not None and good.coverage > 0.6
    assert random is None or random.coverage < 0.05


def test_what_cannot_be_promised_is_not() -> None:
    p_wrong = torch.linspace(0, 1, 200)
    assert promised(p_wrong, torch.ones(200, dtype=torch.bool), max_risk=0.5, confidence=0.95) is None
    nothing_wrong = torch.zeros(30, dtype=torch.bool)
    assert promised(p_wrong[:30], nothing_wrong, max_risk=0.01, confidence=0.99) is None, "30 images are too few"
    everything = promised(p_wrong, torch.zeros(200, dtype=torch.bool), max_risk=0.05, confidence=0.95)
    assert everything is not None and everything.coverage > 0.97


def test_equal_scores_are_answered_together() -> None:
    p_wrong = torch.tensor([0.1] * 300 + [0.4] * 100)
    wrong = torch.tensor([False] * 300 + [True] * 50 + [False] * 50)
    promise = promised(p_wrong, wrong, max_risk=0.05, confidence=0.9)
    assert promise is not None
    assert (promise.threshold, promise.coverage, promise.risk) == (pytest.approx(0.1), 0.75, 0.0)


@pytest.mark.parametrize(("max_risk", "confidence"), [(0.0, 0.9), (1.0, 0.9), (0.1, 0.0), (0.1, 1.0)])
def test_shares_out_of_range(max_risk: float, confidence: float) -> None:
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        promised(torch.rand(9), torch.zeros(9, dtype=torch.bool), max_risk=max_risk, confidence=confidence)
    with pytest.raises(ValueError, match="got none"):
        promised(torch.zeros(0), torch.zeros(0, dtype=torch.bool), max_risk=0.1, confidence=0.9)


def test_sets_hold_the_true_class_as_often_as_promised() -> None:
    generator = torch.Generator().manual_seed(0)
    held = []
    for _ in range(200):
        logits = 2 * torch.randn(400, 7, generator=generator)
        probabilities = logits.softmax(1)
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        true = probabilities.gather(1, labels[:, None])[:, 0]
        threshold = set_threshold(true[:200], 0.9)
        assert threshold is not None
        held.append(class_sets(probabilities[200:], threshold).gather(1, labels[200:, None]).float().mean().item())
    assert 0.895 < np.mean(held) < 0.915


def test_sets_by_hand() -> None:
    assert set_threshold(torch.tensor([0.9, 0.2, 0.5, 0.7]), 0.8) == pytest.approx(0.2)
    assert set_threshold(torch.tensor([0.9, 0.2, 0.5, 0.7]), 0.9) is None, "four images cannot promise nine in ten"
    sets = class_sets(torch.tensor([[0.5, 0.3, 0.2], [0.3, 0.4, 0.3]]), 0.45)
    assert sets.tolist() == [[True, False, False], [False, True, False]], "the likeliest class is always named"


def test_what_is_stored_is_in_order() -> None:
    stored = as_arrays(torch.tensor([0.3, 0.1, 0.2]), torch.tensor([True, False, True]), torch.tensor([0.5, 0.6, 0.7]))
    assert stored["p_wrong"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert stored["wrong"].tolist() == [False, True, True]
    assert stored["true_probability"].tolist() == pytest.approx([0.6, 0.7, 0.5])
