"""k-means against scikit-learn and a plain Lloyd, NMI and F1 against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import pair_confusion_matrix
from torch import Tensor

from idml.metrics import clustering
from idml.metrics.clustering import agreement, choose_seeds, clustering_metrics, exact_products, kmeans, lloyd


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(count: int, dimensions: int, classes: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit vectors about random class centres, float64, and their classes, each of which has a point."""
    source = generator(seed)
    centres = torch.nn.functional.normalize(torch.randn(classes, dimensions, generator=source).double(), dim=1)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (count - classes,), generator=source)])
    points = centres[labels] + torch.randn(count, dimensions, generator=source).double() * noise / dimensions**0.5
    return torch.nn.functional.normalize(points, dim=1), labels


# --- agreement of clusters and classes ------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 3), st.integers(0, 4)), min_size=1, max_size=30))
def test_nmi_and_f1_equal_scikit_learn(drawn: list[tuple[int, int]]) -> None:
    clusters, classes = (torch.tensor(column) for column in zip(*drawn, strict=True))
    nmi, f1 = agreement(clusters, classes)
    assert nmi == pytest.approx(normalized_mutual_info_score(classes, clusters), abs=1e-12)
    (_, false), (missed, found) = pair_confusion_matrix(classes, clusters)
    wrong = false + missed
    assert f1 == (pytest.approx(2 * found / (2 * found + wrong), abs=1e-15) if found + wrong else 1.0)
    renamed = agreement(clusters * 1000 + 7, -classes)
    assert renamed == pytest.approx((nmi, f1), abs=1e-12)


def test_agreement_by_hand() -> None:
    """Clusters {0, 1, 2}, {3} and classes {0, 1}, {2, 3}: MI = H(clusters) + ln 2 - (1/2 ln 2 + 2 * 1/4 ln 4)."""
    nmi, f1 = agreement(torch.tensor([5, 5, 5, 7]), torch.tensor([0, 0, 1, 1]))
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert nmi == pytest.approx((entropy + np.log(2) - 1.5 * np.log(2)) / ((entropy + np.log(2)) / 2))
    assert f1 == pytest.approx(2 * 1 / (3 + 2))


def test_pairs_are_counted_in_integers() -> None:
    """300,000 points in one cluster are 45 milliard pairs, above what float32 and int32 count."""
    clusters = torch.zeros(300_000, dtype=torch.long)
    classes = torch.cat([torch.zeros(299_999, dtype=torch.long), torch.ones(1, dtype=torch.long)])
    together, alike = 300_000 * 299_999 // 2, 299_999 * 299_998 // 2
    assert agreement(clusters, classes)[1] == 2 * alike / (together + alike)


@pytest.mark.parametrize(("clusters", "classes", "nmi"), [([3], [0], 1.0), ([0, 1, 2], [4, 5, 6], 1.0)])
def test_without_a_pair_f1_is_1(clusters: list[int], classes: list[int], nmi: float) -> None:
    assert agreement(torch.tensor(clusters), torch.tensor(classes)) == (nmi, 1.0)


# --- Lloyd ----------------------------------------------------------------------------------------------------------


def plain_lloyd(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels on convergence and the number of assignments, or of the iteration that empties a cluster, in NumPy."""
    labels = np.full(len(points), -1)
    for iteration in range(1, 1000):
        new = ((points[:, None] - centres[None]) ** 2).sum(2).argmin(1)
        if np.array_equal(new, labels):
            return labels, iteration
        labels = new
        assert len(np.unique(labels)) == len(centres), "choose another example"
        centres = np.stack([points[labels == number].mean(0) for number in range(len(centres))])
    raise AssertionError("no convergence")


@pytest.mark.parametrize("seed", range(12))
def test_lloyd_is_plain_lloyd(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the shortcuts nothing is seen: same clusters, as many iterations; and they were taken."""
    shortcuts = []
    original = clustering.reassign

    def counted(points: Tensor, centres: Tensor, moved: Tensor, *rest: Tensor) -> None:
        shortcuts.append(int(moved.sum()))
        original(points, centres, moved, *rest)

    monkeypatch.setattr(clustering, "reassign", counted)
    points, _ = blobs(400, 6, 30, 1.5, seed)
    start = points[torch.randperm(400, generator=generator(seed))[:30]]
    found = lloyd(points, start, 300)
    labels, iterations = plain_lloyd(points.numpy(), start.numpy())
    assert found.labels.tolist() == labels.tolist()
    assert found.iterations == iterations
    means = torch.stack([points[found.labels == number].mean(0) for number in range(30)])
    torch.testing.assert_close(found.centres, means)
    inertia = (points - means[found.labels]).square().sum().item()
    assert found.inertia == pytest.approx(inertia, rel=1e-9)
    assert len(shortcuts) >= 2 and min(shortcuts) < 30


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    points, _ = blobs(700, 12, 60, 1.5)
    whole = kmeans(points, 60)
    monkeypatch.setattr(clustering, "TILE_ELEMENTS", 1)  # the least height is 64 points
    tiled = kmeans(points, 60)
    assert torch.equal(whole.labels, tiled.labels) and whole.iterations == tiled.iterations


def test_an_empty_cluster_takes_the_farthest_point() -> None:
    points = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [40.0]])
    found = lloyd(points, torch.tensor([[1.0], [1.0], [12.0]]), 300)  # of two equal centres one is nobody's nearest
    assert found.labels.bincount(minlength=3).min() > 0
    groups = {tuple(points[found.labels == number, 0].tolist()) for number in range(3)}
    assert groups == {(0.0, 1.0, 2.0), (10.0, 11.0), (40.0,)}
    assert found.inertia == pytest.approx(2.5, abs=1e-5)


def test_more_clusters_than_different_points() -> None:
    points = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(5, 1)
    found = kmeans(points, 4)
    assert found.inertia == pytest.approx(0, abs=1e-6)
    assert found.labels[0] != found.labels[1]
    assert found.labels.min() >= 0 and found.labels.max() < 4
    collapsed = kmeans(torch.ones(9, 3), 3)
    assert collapsed.inertia == pytest.approx(0, abs=1e-6) and collapsed.iterations < 5


def test_the_ends_of_k() -> None:
    points, _ = blobs(50, 4, 50, 1.0)
    one, all_ = kmeans(points, 1), kmeans(points, 50)
    torch.testing.assert_close(one.centres[0], points.mean(0))
    assert sorted(all_.labels.tolist()) == list(range(50))
    assert all_.inertia == pytest.approx(0, abs=1e-9)


# --- seeding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool_bytes", [1, 1 << 12, 64 << 20])
def test_every_far_group_gets_a_seed(pool_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random seeds cover 25 of 40 groups on average. The pool is drawn anew for each seed, in parts, or at once."""
    monkeypatch.setattr(clustering, "POOL_BYTES", pool_bytes)
    source = generator()
    points = (torch.randn(40, 8, generator=source) * 100).repeat(20, 1) + torch.randn(800, 8, generator=source) * 1e-2
    for seed in range(5):
        assert sorted((choose_seeds(points, 40, generator(seed)) % 40).tolist()) == list(range(40))


def test_candidates_are_drawn_by_squared_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one trial a step, the second seed is plain k-means++: probability proportional to squared distance."""
    monkeypatch.setattr(clustering.math, "log", lambda _: -1)  # 2 + log k trials
    points, counts = torch.tensor([[0.0], [1.0], [2.0]]), np.zeros((3, 3))
    for seed in range(1500):
        first, second = choose_seeds(points, 2, generator(seed)).tolist()
        counts[first, second] += 1
    shares = counts / counts.sum(1, keepdims=True)
    np.testing.assert_allclose(shares, [[0, 0.2, 0.8], [0.5, 0, 0.5], [0.8, 0.2, 0]], atol=0.08)


@pytest.mark.parametrize(("count", "dimensions", "classes", "noise"), [(1500, 64, 250, 1.0), (1200, 128, 30, 2.5)])
def test_as_good_as_scikit_learn(count: int, dimensions: int, classes: int, noise: float) -> None:
    """NMI within 0.5 points (means over seeds), in float32; seeds at random would lose 5 points in the first case."""
    points, labels = blobs(count, dimensions, classes, noise)
    points = points.float()
    ours = [kmeans(points, classes, seed=seed) for seed in range(6)]
    theirs = [KMeans(classes, n_init=1, random_state=seed).fit(points.numpy()) for seed in range(6)]
    score = np.mean([agreement(found.labels, labels)[0] for found in ours])
    expected = np.mean([normalized_mutual_info_score(labels, found.labels_) for found in theirs])
    assert score > expected - 0.005
    inertia = np.mean([found.inertia for found in ours])
    assert inertia < 1.01 * np.mean([found.inertia_ for found in theirs])


def test_digits_as_scikit_learn() -> None:
    """Real images, pixels 0..16, not normalised: the best of 8 seedings is the same optimum, or a better one."""
    points, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    found = kmeans(points.float(), 10, restarts=8)
    reference = KMeans(10, n_init=8, random_state=0).fit(points.numpy())
    assert found.inertia < 1.001 * reference.inertia_
    assert abs(agreement(found.labels, labels)[0] - normalized_mutual_info_score(labels, reference.labels_)) < 0.005


# --- promises -------------------------------------------------------------------------------------------------------


def test_draws_follow_the_seed_and_nothing_else() -> None:
    points, _ = blobs(300, 8, 40, 2.0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = kmeans(points, 40, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(kmeans(points, 40, seed=3).labels, first.labels)
    assert not torch.equal(kmeans(points, 40, seed=4).labels, first.labels)


def test_the_best_restart_is_kept() -> None:
    points, _ = blobs(300, 8, 40, 2.0)
    one = [kmeans(points, 40, seed=seed).inertia for seed in range(5)]
    five = [kmeans(points, 40, restarts=5, seed=seed).inertia for seed in range(5)]
    assert all(after <= before for after, before in zip(five, one, strict=True))  # the first seeding is the same
    assert sum(five) < 0.999 * sum(one)


def test_points_far_from_the_origin() -> None:
    """In float32 the squared length of these points is known to about 1, the distances between them are about 1."""
    points = blobs(300, 8, 30, 0.7)[0].float()
    shifted = kmeans(points + 1000, 30)
    assert shifted.inertia == pytest.approx(kmeans(points, 30).inertia, rel=1e-2)
    torch.testing.assert_close(shifted.centres[shifted.labels], (points + 1000), rtol=0, atol=1.5)


def test_no_autocast_and_the_settings_are_left_as_they_were() -> None:
    points = blobs(200, 8, 20, 1.0)[0].float()
    plain, threads = kmeans(points, 20), torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert kmeans(points, 20).inertia == plain.inertia
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
        with exact_products(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.get_num_threads() == threads


def test_figures_of_embeddings() -> None:
    points, labels = blobs(120, 16, 10, 0.3)
    assert clustering_metrics(points, labels * 7 - 3) == {"NMI": pytest.approx(1), "F1": 1.0}
    shuffled = labels[torch.randperm(120, generator=generator())]
    assert clustering_metrics(points, shuffled)["NMI"] < 0.5


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        (torch.zeros(5), {"k": 2}, r"\(N, D\).*got \(5,\)"),
        (torch.zeros(5, 2, dtype=torch.long), {"k": 2}, "float32 or float64, got .*int64"),
        (torch.zeros(5, 2), {"k": 6}, "1 to 5 clusters.*got 6"),
        (torch.zeros(5, 2), {"k": 0}, "1 to 5 clusters.*got 0"),
        (torch.zeros(5, 2), {"k": 2, "restarts": 0}, "above 0, got 0 and 300"),
        (torch.zeros(5, 2), {"k": 2, "max_iterations": 0}, "above 0, got 1 and 0"),
    ],
)
def test_wrong_input_is_refused(points: Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans(points, **options)
