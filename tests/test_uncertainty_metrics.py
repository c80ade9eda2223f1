"""Figures of an uncertainty against cases worked out by hand, definitions, scikit-learn and torch-uncertainty."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from torch import Tensor

from idml.metrics import auroc, calibration_metrics, risk_coverage, selective_metrics


def bools(text: str) -> Tensor:
    """``"+-+"``: right, wrong, right."""
    return torch.tensor([sign == "+" for sign in text])


# --- worked out by hand ---------------------------------------------------------------------------------------------


def test_four_images_by_hand() -> None:
    scores, right = torch.tensor([0.4, 0.1, 0.3, 0.2]), bools("-++-")  # in order of the scores: + - + -
    curve = risk_coverage(scores, right)
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 2 / 4])
    assert curve.reachable.all()
    found = selective_metrics(scores, right, coverage=0.75, risk=0.4)
    aurc = (0 + 1 / 2 + 1 / 3 + 1 / 2) / 4
    assert found == pytest.approx(
        {
            "error_auroc": 3 / 4,
            "aurc": aurc,
            "e_aurc": aurc - (0 + 0 + 1 / 3 + 1 / 2) / 4,
            # Errors among all: 0, 0, 1/4, 1/4, 2/4 at coverages 0, 1/4, 1/2, 3/4, 1.
            "augrc": (0 + 0 + 1 / 4 + 1 / 4 + 1 / 4) / 4,
            "risk_at_coverage": 1 / 3,
            "coverage_at_risk": 0.75,  # the risk falls again after 1/2
        }
    )


@pytest.mark.parametrize("count", [1, 2, 7])
def test_all_right_and_all_wrong(count: int) -> None:
    scores = torch.linspace(0, 1, count)
    found = selective_metrics(scores, torch.ones(count, dtype=torch.bool))
    assert math.isnan(found.pop("error_auroc"))
    assert found == {"aurc": 0, "e_aurc": 0, "augrc": 0, "risk_at_coverage": 0, "coverage_at_risk": 1}
    found = selective_metrics(scores, torch.zeros(count, dtype=torch.bool))
    assert math.isnan(found.pop("error_auroc"))
    assert found == pytest.approx({"aurc": 1, "e_aurc": 0, "augrc": 0.5, "risk_at_coverage": 1, "coverage_at_risk": 0})


def test_equal_scores_say_nothing() -> None:
    right = bools("++-+-+++++")
    found = selective_metrics(torch.full((10,), 0.3), right)
    assert found["error_auroc"] == 0.5
    assert found["aurc"] == pytest.approx(0.2) and found["augrc"] == pytest.approx(0.1)
    assert found["risk_at_coverage"] == pytest.approx(0.2)
    assert found["coverage_at_risk"] == 0  # a threshold keeps all of them or none
    assert selective_metrics(torch.full((10,), 0.3), right, risk=0.2)["coverage_at_risk"] == 1
    assert risk_coverage(torch.full((10,), 0.3), right).reachable.tolist() == [False] * 9 + [True]


def test_a_perfect_score_has_no_excess() -> None:
    right = bools("+-++-+")
    found = selective_metrics((~right).float(), right, coverage=4 / 6, risk=0.0)
    assert found["error_auroc"] == 1 and found["e_aurc"] == 0
    assert found["risk_at_coverage"] == 0 and found["coverage_at_risk"] == pytest.approx(4 / 6)


def test_coverage_of_a_share_that_is_no_round_number() -> None:
    """0.8 of 35 is 28, though 0.8 * 35 is more than that for a computer."""
    right = bools("+" * 28 + "-" * 7)
    assert selective_metrics(torch.arange(35.0), right)["risk_at_coverage"] == 0


# --- against definitions and other libraries ------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6))
def test_ties_are_the_mean_over_all_orders(images: list[tuple[int, bool]]) -> None:
    """Every order of equal scores, in exact fractions."""
    count = len(images)
    curves = []
    for order in itertools.permutations(range(count)):
        if all(images[a][0] <= images[b][0] for a, b in itertools.pairwise(order)):
            wrong = list(itertools.accumulate(int(not images[i][1]) for i in order))
            curves.append([Fraction(errors, kept) for kept, errors in enumerate(wrong, 1)])
    expected = [sum(column) / len(curves) for column in zip(*curves, strict=True)]
    scores = torch.tensor([float(score) for score, _ in images])
    right = torch.tensor([answer for _, answer in images])
    assert risk_coverage(scores, right).risk.tolist() == pytest.approx([float(risk) for risk in expected])
    found = selective_metrics(scores, right)
    assert found["aurc"] == pytest.approx(float(sum(expected) / count))
    best = sorted((not answer for _, answer in images))
    ideal = sum(Fraction(sum(best[:kept]), kept) for kept in range(1, count + 1)) / count
    assert found["e_aurc"] == pytest.approx(float(sum(expected) / count - ideal), abs=1e-12)
    accuracy = right.double().mean().item()
    if 0 < accuracy < 1:
        assert found["error_auroc"] == pytest.approx(roc_auc_score(~right.numpy(), scores.numpy()))
        expected_augrc = (1 - found["error_auroc"]) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2
        assert found["augrc"] == pytest.approx(expected_augrc)


@pytest.fixture(scope="module")
def predictions() -> tuple[Tensor, Tensor]:
    """Probabilities and labels of 2,000 images, right in about two of three."""
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(2000, 7, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((1.5 * logits).softmax(1), 1, generator=generator)[:, 0]
    return logits.softmax(1), labels


def test_selective_figures_agree_with_torch_uncertainty(predictions: tuple[Tensor, Tensor]) -> None:
    from torch_uncertainty.metrics import AUGRC, AURC, CovAtxRisk, RiskAtxCov

    probabilities, labels = predictions
    scores, right = 1 - probabilities.max(1).values, probabilities.argmax(1) == labels
    assert 0.3 < right.double().mean() < 0.9
    count = len(labels)
    curve = risk_coverage(scores, right)

    def theirs(metric: object) -> float:
        metric.update(probabilities, labels)  # type: ignore[attr-defined]
        return float(metric.compute())  # type: ignore[attr-defined]

    # Theirs is the trapezoidal rule from 1 / N on, stretched to length 1.
    trapezoid = torch.trapezoid(curve.risk, curve.coverage) / (1 - 1 / count)
    assert theirs(AURC()) == pytest.approx(trapezoid.item(), rel=1e-6)
    trapezoid = torch.trapezoid(curve.risk * curve.coverage, curve.coverage) / (1 - 1 / count)
    assert theirs(AUGRC()) == pytest.approx(trapezoid.item(), rel=1e-6)
    for at in (0.1, 0.5, 0.8):
        found = selective_metrics(scores, right, coverage=at, risk=at / 4)
        assert found["risk_at_coverage"] == pytest.approx(theirs(RiskAtxCov(at)), rel=1e-6)
        assert found["coverage_at_risk"] == pytest.approx(theirs(CovAtxRisk(at / 4)), rel=1e-6)
    # The two rules differ by a term of 1 / N.
    assert selective_metrics(scores, right)["aurc"] == pytest.approx(theirs(AURC()), abs=1 / count)


def test_calibration_agrees_with_scikit_learn_and_torch_uncertainty(predictions: tuple[Tensor, Tensor]) -> None:
    from torch_uncertainty.metrics import AdaptiveCalibrationError
    from torchmetrics.functional.classification import multiclass_calibration_error

    probabilities, labels = predictions
    found = calibration_metrics(probabilities, labels)
    assert found["nll"] == pytest.approx(log_loss(labels.numpy(), probabilities.numpy(), labels=range(7)))
    brier = brier_score_loss(labels.numpy(), probabilities.numpy(), labels=range(7), scale_by_half=False)
    assert found["brier"] == pytest.approx(brier)
    expected = multiclass_calibration_error(probabilities, labels, 7, n_bins=15)
    assert found["ece"] == pytest.approx(expected.item(), abs=1e-6)
    for bins in (8, 15):
        metric = AdaptiveCalibrationError(task="multiclass", num_classes=7, num_bins=bins)
        metric.update(probabilities.float(), labels)
        # 15 does not divide 2,000: theirs may cut elsewhere by an image.
        tolerance = 1e-6 if bins == 8 else 2e-3
        found = calibration_metrics(probabilities, labels, bins=bins)
        assert found["ece_equal_mass"] == pytest.approx(float(metric.compute()), abs=tolerance)


def test_calibration_by_hand() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    found = calibration_metrics(probabilities, torch.tensor([0, 1, 1, 1]), bins=2)
    # Equal mass: {0.6, 0.7} both right, {0.8, 0.9} one right.
    assert found["ece_equal_mass"] == pytest.approx((2 * 0.35 + 2 * 0.35) / 4)
    assert found["ece"] == pytest.approx(abs(0.75 - 0.75), abs=1e-6)  # all four are in the upper of two bins
    assert found["nll"] == pytest.approx(-np.log([0.9, 0.2, 0.7, 0.6]).mean())
    assert found["brier"] == pytest.approx((2 * 0.01 + 2 * 0.64 + 2 * 0.09 + 2 * 0.16) / 4)
    one = calibration_metrics(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert one == {"ece": 1, "ece_equal_mass": 1, "nll": math.inf, "brier": 2}


def test_auroc() -> None:
    assert auroc(torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.1])) == 3.5 / 4
    assert math.isnan(auroc(torch.zeros(0), torch.ones(3)))
    with pytest.raises(ValueError, match="finite scores, got 1"):
        auroc(torch.tensor([math.inf]), torch.ones(3))


# --- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "right", "options", "message"),
    [
        (torch.zeros(0), torch.zeros(0, dtype=torch.bool), {}, "at least one image"),
        (torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool), {}, "floating point"),
        (torch.tensor([math.nan]), torch.ones(1, dtype=torch.bool), {}, "finite"),
        (torch.zeros(3), torch.ones(2, dtype=torch.bool), {}, r"\(3,\) of torch.bool, got \(2,\)"),
        (torch.zeros(3), torch.ones(3, dtype=torch.bool), {"coverage": 0.0}, r"coverage in \(0, 1\]"),
        (torch.zeros(3), torch.ones(3, dtype=torch.bool), {"risk": 1.1}, r"risk in \[0, 1\]"),
    ],
)
def test_wrong_scores_are_refused(scores: Tensor, right: Tensor, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_metrics(scores, right, **options)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "N >= 1"),
        (torch.ones(2, 1), torch.zeros(2, dtype=torch.long), "C >= 2"),
        (torch.randn(2, 3), torch.zeros(2, dtype=torch.long), "sum to 1"),
        (torch.full((2, 2), 0.5), torch.tensor([0, 2]), r"labels in \[0, 2\)"),
        (torch.full((2, 2), 0.5), torch.tensor([0.0, 1.0]), "of integers"),
    ],
)
def test_wrong_probabilities_are_refused(probabilities: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_metrics(probabilities, labels)
