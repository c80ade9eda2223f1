"""Novelty: the distance against scikit-learn and pytorch-ood, the ranks against a uniform distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_ood import detector as detectors
from scipy.stats import kstest
from sklearn.covariance import EmpiricalCovariance
from torch import Tensor

from idml.introspection import novelty as module
from idml.introspection.novelty import Novelty, index_novelty

F, C = 20, 4


def clusters(count: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """(count, F) around C places, with one covariance; labels."""
    generator = torch.Generator().manual_seed(seed)
    places = 4 * torch.randn(C, F, generator=torch.Generator().manual_seed(99))
    shape = torch.randn(F, F, generator=torch.Generator().manual_seed(98)) / F**0.5
    labels = torch.randint(C, (count,), generator=generator)
    return places[labels] + spread * torch.randn(count, F, generator=generator) @ shape, labels


def fitted(vectors: Tensor, labels: Tensor, dimensions: int = F) -> Novelty:
    found = Novelty(F, C, dimensions)
    found.fit(vectors, labels, torch.Generator().manual_seed(0))
    return found


def test_strangeness_is_the_mahalanobis_distance_to_the_nearest_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHRINKAGE", 0.0)
    vectors, labels = clusters(800, 1)
    found = fitted(vectors, labels)
    means = torch.stack([vectors[labels == c].mean(0) for c in range(C)])
    oracle = EmpiricalCovariance(assume_centered=True).fit((vectors - means[labels]).numpy())
    new = clusters(50, 2)[0]
    expected = np.min([oracle.mahalanobis((new - mean).numpy()) for mean in means], axis=0)
    np.testing.assert_allclose(found.strangeness(found.coordinates(new)).numpy(), expected, rtol=2e-3)


def test_novelty_among_images_that_are_searched_by_the_nearest_neighbours_of_pytorch_ood() -> None:
    index, queries = clusters(400, 1)[0], torch.cat([clusters(50, 2)[0], clusters(50, 3, spread=2.0)[0]])
    known = torch.zeros(400, dtype=torch.int64)
    own = detectors.KNN(None, k=1, normalize=False).fit_features(index, known).predict_features(queries)
    # Each image of the index is its own nearest; the second one counts.
    usual = detectors.KNN(None, k=2, normalize=False).fit_features(index, known).predict_features(index)
    expected = (usual[None] < own[:, None]).double().mean(1)
    found = index_novelty(queries, index, sample=400)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1.5 / 400)
    assert found[:50].mean() < 0.7 < found[50:].mean()
    # In the index itself an image is left out of its own neighbours: as many are less strange as its rank says.
    left = index_novelty(index[:60], index, left_out=torch.arange(60), sample=400)
    np.testing.assert_allclose(left.numpy(), (usual[None] < usual[:60, None]).double().mean(1).numpy(), atol=1.5 / 400)


def test_it_agrees_with_pytorch_ood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHRINKAGE", 0.0)
    vectors, labels = clusters(800, 1)
    peer = detectors.Mahalanobis(None).fit_features(vectors, labels)
    found, new = fitted(vectors, labels), clusters(200, 2, spread=2.0)[0]
    ours, theirs = found.strangeness(found.coordinates(new)), torch.as_tensor(peer.predict_features(new)).float()
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.999


def test_ranks_of_known_images_are_uniform() -> None:
    """One less novelty is a p-value: uniform over images like those that were held out."""
    vectors, labels = clusters(2000, 1)
    found = fitted(vectors, labels)
    found.rank(found.strangeness(found.coordinates(clusters(4000, 2)[0])))
    novelty = found.novelty(found.strangeness(found.coordinates(clusters(2000, 3)[0]))).numpy()
    assert kstest(novelty, "uniform").pvalue > 0.01
    assert found.novelty(torch.tensor([0.0, 1e9])).tolist() == pytest.approx([0.0, 0.999])
    far = found.novelty(found.strangeness(found.coordinates(clusters(300, 4)[0] + 30)))
    assert (far > 0.99).all()


def test_few_held_out_images_never_say_more_than_they_know() -> None:
    """With 19 known images, one that is stranger than all of them is stranger than 19 in 20, and no more."""
    vectors, labels = clusters(500, 1)
    found = fitted(vectors, labels)
    held = found.strangeness(found.coordinates(clusters(19, 2)[0]))
    found.rank(held)
    ordinary = [
        found.novelty(found.strangeness(found.coordinates(clusters(1, seed)[0]))).item() for seed in range(100, 400)
    ]
    assert found.novelty(torch.tensor([1e9])).item() == pytest.approx(0.95)
    assert np.mean(np.array(ordinary) > 0.9) < 0.2


def test_fewer_images_than_dimensions_and_classes_without_images() -> None:
    vectors, labels = clusters(12, 5)
    found = fitted(vectors, labels.clamp(max=1), dimensions=64)
    values = found.strangeness(found.coordinates(vectors))
    assert values.isfinite().all() and (found.projection[:, 11:] == 0).all()
    assert found.strangeness(found.coordinates(vectors + 100)).min() > values.max()


def test_the_same_draw_gives_the_same_density() -> None:
    vectors, labels = clusters(300, 1)
    first, second = fitted(vectors, labels), fitted(vectors, labels)
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))
