"""What P(wrong) and novelty are compared with: free scores, temperature, the detectors of pytorch-ood, cleanlab."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from introspection_runs import Look
from torch import Tensor
from torch.nn import functional

from idml.introspection.fit import wrong_answers
from idml.trained import TrainedModel

Score = Callable[[Look], Tensor]


def temperature(logits: Tensor, labels: Tensor) -> float:
    """That of the least cross-entropy (Guo et al. 2017), by a search over a grid of its logarithm."""
    grid = torch.linspace(-2, 2, 401).exp()
    losses = torch.stack([functional.cross_entropy(logits / value, labels) for value in grid])
    return grid[losses.argmin()].item()


def free_scores(test: Look, held_out: Look) -> dict[str, Tensor]:
    """Scores that cost nothing, and a logistic regression over them that was fitted to held-out images."""
    from sklearn.linear_model import LogisticRegression

    def of(look: Look) -> dict[str, Tensor]:
        chances = look.features.logits.softmax(1)
        largest = chances.topk(2, dim=1).values
        return {
            "1 - max softmax": 1 - largest[:, 0],
            "entropy": torch.special.entr(chances).sum(1),
            "margin": largest[:, 1] - largest[:, 0],
        }

    found, fitted_on = of(test), of(held_out)
    scale = temperature(held_out.features.logits, held_out.features.labels)
    found["temperature scaling"] = 1 - (test.features.logits / scale).softmax(1).amax(1)
    wrong = wrong_answers(held_out.features).numpy()
    if 0 < wrong.sum() < len(wrong):
        columns = [torch.stack(list(each.values()), 1).double().numpy() for each in (fitted_on, of(test))]
        regression = LogisticRegression(C=100.0, max_iter=1000).fit(columns[0], wrong)
        found["logistic regression of these"] = torch.from_numpy(regression.predict_proba(columns[1])[:, 1])
    return found


def detectors(model: TrainedModel, train: Look) -> dict[str, Score]:
    """Novelty of this project, and each detector of pytorch-ood that works on features or logits; high: not known.

    Those of features look at the last features, as published, and at the same depth vector as ours where that is cheap.
    """
    found: dict[str, Score] = {"novelty (ours)": lambda look: look.strangeness}
    found["1 - max softmax"] = lambda look: 1 - look.features.logits.softmax(1).amax(1)
    try:
        from pytorch_ood import detector as peers
    except ImportError:
        print("pytorch-ood is not installed: its detectors are left out")
        return found
    dim = model.introspection.spec.layers.feature_dim if model.introspection is not None else 0
    head = model.network.classifier
    weight, bias = head.weight.detach(), head.bias.detach()

    def last(look: Look) -> Tensor:
        return look.features.vectors[:, -dim:].float()

    def of_logits(name: str, peer: Any) -> None:
        found[name] = lambda look: torch.as_tensor(peer.predict_logits(look.features.logits)).float()

    def of_features(name: str, peer: Any, part: Callable[[Look], Tensor]) -> None:
        found[name] = lambda look: torch.as_tensor(peer.predict_features(part(look))).float()

    of_logits("energy", peers.EnergyBased(None))
    of_logits("max logit", peers.MaxLogit(None))
    of_logits("GEN", peers.GEN(None))
    of_logits("KL matching", peers.KLMatching(None).fit_logits(train.features.logits, train.features.labels))
    labels = train.features.labels
    fitted = {
        "Mahalanobis": peers.Mahalanobis(None),
        "relative Mahalanobis": peers.RMD(None),
        "kNN": peers.KNN(None, k=50),
        "ViM": peers.ViM(None, d=dim // 2, w=weight, b=bias),
    }
    for name, peer in fitted.items():
        of_features(name, peer.fit_features(last(train), labels), last)
    every = train.features.vectors.float()
    centre, spread = every.mean(0), every.std(0).clamp_min(1e-3)

    def standardised(look: Look) -> Tensor:
        return ((look.features.vectors.float() - centre) / spread).clamp(-5, 5)

    of_features("kNN, several depths", peers.KNN(None, k=50).fit_features(standardised(train), labels), standardised)
    return found


class SCORES:
    """Rankings of labels that are compared with the audit's."""

    @staticmethod
    def out_of_sample(vectors: Tensor, labels: Tensor, folds: int = 5) -> np.ndarray:
        """(N, C) probabilities of a linear classifier over the depth vectors, each from folds without the image."""
        from sklearn.linear_model import SGDClassifier
        from sklearn.model_selection import cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        linear = make_pipeline(StandardScaler(), SGDClassifier(loss="log_loss", alpha=1e-3, random_state=0))
        values = vectors.float().numpy()
        return cross_val_predict(linear, values, labels.numpy(), cv=folds, method="predict_proba")

    @staticmethod
    def cleanlab(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray | None:
        """cleanlab's label quality, turned around; None where it is not installed."""
        try:
            from cleanlab.rank import get_label_quality_scores
        except ImportError:
            print("cleanlab is not installed: its ranking is left out")
            return None
        return 1 - get_label_quality_scores(labels, probabilities, method="normalized_margin")
