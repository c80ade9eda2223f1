"""R@K, RP, MAP@R: worked by hand, against a plain search with ties, pytorch-metric-learning and two processes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import Tensor

from idml.metrics import nearest_neighbours, neighbours, retrieval, retrieval_auroc, retrieval_metrics
from idml.metrics.clustering import clustering_metrics
from tests.test_clustering import blobs
from tests.test_distributed import launch

# Vectors of length 1 whose products are exact, so that ties are ties whatever the order of summation.
EXACT = [[sign * float(i == axis) for i in range(4)] for axis in range(4) for sign in (1, -1)]
EXACT += [[0.5 if bits >> i & 1 else -0.5 for i in range(4)] for bits in range(16)]


def on_a_circle(*degrees: float) -> Tensor:
    """(N, 2) vectors of these angles and of lengths 1, 2, 3 ..., which must not matter."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    lengths = torch.arange(1.0, len(degrees) + 1, dtype=torch.float64)
    return torch.stack([angles.cos(), angles.sin()], dim=1) * lengths[:, None]


def plain_neighbours(
    gallery: np.ndarray, queries: np.ndarray, gallery_families: np.ndarray, query_families: np.ndarray
) -> list[list[int]]:
    """Each query's gallery items, nearest first and of equals the lower index first, without its family."""
    found = []
    for query, family in zip(queries, query_families, strict=True):
        ranked = sorted((-float(np.dot(query, item)), index) for index, item in enumerate(gallery))
        found.append([index for _, index in ranked if gallery_families[index] != family])
    return found


def plain_figures(
    neighbours: list[list[int]], gallery_labels: list[int], query_labels: list[int], ks: list[int], *, exclude: bool
) -> dict[str, float]:
    """The definitions, one query at a time."""
    hits: dict[int, list[bool]] = {k: [] for k in ks}
    first, rp, average = [], [], []
    for ranked, label in zip(neighbours, query_labels, strict=True):
        relevant = [gallery_labels[index] == label for index in ranked]
        references = sum(relevant)
        if references or not exclude:
            for k in ks:
                hits[k].append(any(relevant[:k]))
        if references:
            first.append(relevant[0])
            rp.append(sum(relevant[:references]) / references)
            precisions = [sum(relevant[: i + 1]) / (i + 1) for i in range(references) if relevant[i]]
            average.append(sum(precisions) / references)

    def mean(values: list[Any]) -> float:
        return sum(values) / len(values) if values else math.nan

    figures = {f"R@{k}": mean(hits[k]) for k in ks}
    return figures | {"P@1": mean(first), "RP": mean(rp), "MAP@R": mean(average)}


# --- by hand --------------------------------------------------------------------------------------------------------


def test_figures_by_hand() -> None:
    """Neighbours of 0 deg (class A): 10 A, 30 B, 70 A -> R = 2, RP 1/2, MAP@R (1/1) / 2. And so on:

    of 10 deg (A): 0 A, 30 B, 70 A -> the same. Of 30 deg (B, lone): 10 A, 0 A, 70 A. Of 70 deg (A): 30 B, 10 A, 0 A ->
    RP 1/2, MAP@R (1/2) / 2.
    """
    embeddings, labels = on_a_circle(0, 10, 30, 70), torch.tensor([5, 5, -2, 5])
    found = retrieval_metrics(embeddings, labels, ks=(1, 2, 3), nmi=False)
    assert found == pytest.approx(
        {"R@1": 2 / 4, "R@2": 3 / 4, "R@3": 3 / 4, "P@1": 2 / 3, "RP": 1 / 2, "MAP@R": (1 / 2 + 1 / 2 + 1 / 4) / 3}
    )
    found = retrieval_metrics(embeddings, labels, ks=(1, 2, 3), nmi=False, lone="exclude")
    assert found == pytest.approx(
        {"R@1": 2 / 3, "R@2": 1, "R@3": 1, "P@1": 2 / 3, "RP": 1 / 2, "MAP@R": (1 / 2 + 1 / 2 + 1 / 4) / 3}
    )


def test_itself_is_excluded_by_index_not_by_place() -> None:
    """Of four copies the nearest "other" of item 3 is item 0: dropping the first column would leave 1, or itself."""
    embeddings, labels = torch.ones(4, 3), torch.tensor([0, 0, 1, 1])
    indices, similarities = nearest_neighbours(embeddings, 3)
    assert indices.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    torch.testing.assert_close(similarities, torch.ones(4, 3))
    found = retrieval_metrics(embeddings, labels, ks=(1, 2, 3), nmi=False)
    assert found == {"R@1": 0.5, "R@2": 0.5, "R@3": 1.0, "P@1": 0.5, "RP": 0.5, "MAP@R": 0.5}


def test_queries_and_gallery_by_hand() -> None:
    """Nothing is excluded by index: a query that equals the gallery item of its number finds it first."""
    gallery, queries = on_a_circle(0, 20, 50, 90), on_a_circle(0, 51, 84)
    labels, query_labels = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 7])
    found = retrieval_metrics(
        gallery, labels, query_embeddings=queries, query_labels=query_labels, ks=(1, 3, 4), nmi=False
    )
    # Query 0: 0, 20, 50, 90 -> right, wrong. Query 51: 50, 20, 90, 0 -> wrong, wrong. Query 84 is lone.
    assert found == pytest.approx({"R@1": 1 / 3, "R@3": 2 / 3, "R@4": 2 / 3, "P@1": 1 / 2, "RP": 1 / 4, "MAP@R": 1 / 4})
    indices, _ = nearest_neighbours(gallery, 4, query_embeddings=queries)
    assert indices.tolist() == [[0, 1, 2, 3], [2, 1, 3, 0], [3, 2, 1, 0]]


def test_the_family_is_left_out() -> None:
    """Items 0 and 1 are copies of one picture: without the copy item 0 has only item 3 of its class left."""
    embeddings, labels = on_a_circle(0, 1, 10, 40, 50), torch.tensor([0, 0, 1, 0, 1])
    families = torch.tensor([9, 9, 4, 5, 6])
    indices, _ = nearest_neighbours(embeddings, 3, families=families)
    assert indices.tolist() == [[2, 3, 4], [2, 3, 4], [1, 0, 3], [4, 2, 1], [3, 2, 1]]
    with_copy = retrieval_metrics(embeddings, labels, ks=(1,), nmi=False)
    without = retrieval_metrics(embeddings, labels, ks=(1,), nmi=False, families=families)
    assert with_copy["R@1"] == 2 / 5
    assert without == {"R@1": 0.0, "P@1": 0.0, "RP": 0.0, "MAP@R": 0.0}


def test_a_query_that_can_find_fewer_than_its_chunk_searches_for() -> None:
    """Items 0..29 are one family, so they find 10 items; the others find 39, and all are searched in one chunk."""
    embeddings = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    families = torch.arange(40).clamp(min=29)
    search = neighbours.prepare(embeddings, None, families, None)
    ((rows, indices, similarities),) = neighbours.neighbours_in_chunks(search, torch.full((40,), 39), 1 << 28)
    assert indices.max() < 40
    assert similarities.isfinite().sum(1)[rows.argsort()].tolist() == [10] * 30 + [39] * 10
    found = retrieval_metrics(embeddings, torch.zeros(40, dtype=torch.long), families=families, nmi=False)
    assert found["RP"] == found["MAP@R"] == 1


def test_without_any_reference_means_are_nan() -> None:
    found = retrieval_metrics(on_a_circle(0, 10, 20), torch.arange(3), ks=(1, 2))
    assert found["R@1"] == found["R@2"] == 0
    assert all(math.isnan(found[name]) for name in ("P@1", "RP", "MAP@R"))
    assert found["NMI"] == found["F1"] == 1  # three clusters, three classes


def test_clustering_is_over_gallery_and_queries() -> None:
    points, labels = blobs(200, 16, 30, 2.0)
    found = retrieval_metrics(
        points[:120], labels[:120], query_embeddings=points[120:], query_labels=labels[120:], seed=3
    )
    expected = clustering_metrics(torch.nn.functional.normalize(points, dim=1), labels, seed=3)
    assert {name: found[name] for name in ("NMI", "F1")} == pytest.approx(expected)
    assert 0.3 < expected["NMI"] < 0.95


# --- against independent code ---------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_everything_equals_a_plain_search(data: st.DataObject) -> None:
    """Ties galore, lone classes, families, two kinds of queries, tiles and groups of a few columns."""
    vectors = st.sampled_from(range(len(EXACT)))
    items = data.draw(st.lists(st.tuples(vectors, st.integers(0, 4), st.integers(0, 9)), min_size=2, max_size=50))
    apart = data.draw(st.booleans())
    asking = data.draw(st.lists(st.tuples(vectors, st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=20))
    asking = asking if apart else items
    gallery, queries = (np.array([EXACT[vector] for vector, _, _ in group]) for group in (items, asking))
    (labels, kin), (query_labels, query_kin) = (
        ([label for _, label, _ in group], [family for _, _, family in group]) for group in (items, asking)
    )
    use_families = data.draw(st.booleans())
    if not use_families:
        kin = list(range(len(items)))
        query_kin = [-1] * len(asking) if apart else kin
    rankings = plain_neighbours(gallery, queries, np.array(kin), np.array(query_kin))
    available = min(map(len, rankings))
    if available == 0:
        return
    ks = data.draw(st.lists(st.integers(1, available), min_size=1, max_size=3, unique=True))

    options: dict[str, Any] = {"chunk_bytes": data.draw(st.sampled_from([1, 1 << 14, 1 << 28]))}
    if apart:
        options["query_embeddings"] = torch.tensor(queries, dtype=torch.float32) * 3
    if use_families:
        options["families"] = np.array(kin)
        if apart:
            options["query_families"] = np.array(query_kin)
    embeddings = torch.tensor(gallery, dtype=torch.float32)
    exclude = data.draw(st.booleans())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "TILE_COLUMNS", data.draw(st.sampled_from([1, 8, 1 << 14])))
        patch.setattr(neighbours, "GROUP", data.draw(st.sampled_from([1, 4, 32])))
        patch.setattr(retrieval, "FEW", data.draw(st.sampled_from([1, 2, 32])))
        patch.setattr(neighbours, "TILE_ROWS", data.draw(st.sampled_from([1, 5, 512])))
        indices, _ = nearest_neighbours(embeddings, max(ks), **options)
        if apart:
            options["query_labels"] = torch.tensor(query_labels)
        found = retrieval_metrics(
            embeddings, torch.tensor(labels), ks=ks, nmi=False, lone="exclude" if exclude else "miss", **options
        )
    assert indices.tolist() == [ranked[: max(ks)] for ranked in rankings]
    expected = plain_figures(rankings, labels, query_labels, ks, exclude=exclude)
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6), width=st.sampled_from([32, 320, 1280]), k=st.integers(1, 32), levels=st.integers(1, 200)
)
def test_the_largest_are_those_of_a_full_sort(seed: int, width: int, k: int, levels: int) -> None:
    """In groups of 4 to 32 or none, as k and the width make it, and from one to many different values a row."""
    source = np.random.default_rng(seed)
    scores = source.integers(levels, size=(5, width)).astype(np.float32)
    scores[source.random((5, width)) < 0.1] = -np.inf
    scores[0, 3:] = -np.inf
    values, columns = neighbours.largest(torch.tensor(scores), k)
    for row in range(5):
        expected = np.lexsort([np.arange(width), -scores[row]])[:k]
        finite = np.isfinite(scores[row][expected])  # which of the -inf are taken is all the same
        assert columns[row].numpy()[finite].tolist() == expected[finite].tolist()
        assert values[row].tolist() == scores[row][expected].tolist()


@pytest.mark.parametrize(("classes", "noise"), [(150, 1.2), (12, 2.5)])
def test_as_pytorch_metric_learning(classes: int, noise: float) -> None:
    points, labels = blobs(1200, 64, classes, noise)
    names = {"P@1": "precision_at_1", "RP": "r_precision", "MAP@R": "mean_average_precision_at_r"}
    calculator = AccuracyCalculator(
        include=tuple(names.values()),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=CustomKNN(CosineSimilarity(), batch_size=256),
    )
    points = points.float()
    theirs, ours = calculator.get_accuracy(points, labels), retrieval_metrics(points, labels, nmi=False)
    assert {name: ours[name] for name in names} == pytest.approx(
        {name: theirs[other] for name, other in names.items()}, abs=1e-6
    )
    assert 0.1 < ours["MAP@R"] < 0.9


def test_similarities_are_cosines() -> None:
    points = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    indices, similarities = nearest_neighbours(points, 7)
    exact = torch.nn.functional.cosine_similarity(points.double()[:, None], points.double()[indices], dim=2)
    torch.testing.assert_close(similarities.double(), exact, rtol=0, atol=1e-6)
    assert similarities.dtype == torch.float32 and indices.dtype == torch.int64
    assert nearest_neighbours(points.double(), 7)[1].dtype == torch.float64


# --- size, place and precision --------------------------------------------------------------------------------------


def test_chunks_change_nothing() -> None:
    """Classes of 1 to 100 items, in float64 so that no rounding decides; 1 byte is one query at a time."""
    source = torch.Generator().manual_seed(0)
    points = torch.randn(500, 12, generator=source, dtype=torch.float64)
    labels = torch.cat([torch.zeros(100, dtype=torch.long), torch.randint(1, 100, (400,), generator=source)])
    whole, (indices, similarities) = retrieval_metrics(points, labels, nmi=False), nearest_neighbours(points, 9)
    for chunk_bytes in (1, 1 << 16, 1 << 20):
        found = retrieval_metrics(points, labels, nmi=False, chunk_bytes=chunk_bytes)
        assert found == pytest.approx(whole, abs=1e-12)
        chunked, values = nearest_neighbours(points, 9, chunk_bytes=chunk_bytes)
        assert torch.equal(chunked, indices)
        torch.testing.assert_close(values, similarities)


def test_copies_tie_wherever_they_are() -> None:
    """In float32, over several tiles, the copies of an item come in order of their index."""
    points = torch.randn(50, 33, generator=torch.Generator().manual_seed(0)).repeat(81, 1)
    for chunk_bytes in (1, 1 << 18, 1 << 28):
        indices, _ = nearest_neighbours(points, 20, query_embeddings=points[:50], chunk_bytes=chunk_bytes)
        assert indices.tolist() == [[query + 50 * copy for copy in range(20)] for query in range(50)]


MEMORY = """
import json, resource, torch
from idml.metrics import retrieval_metrics
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
points, labels = torch.randn(10000, 16), torch.arange(10000) // 10
retrieval_metrics(points[:500], labels[:500], nmi=False)
before = peak()
retrieval_metrics(points, labels, nmi=False, chunk_bytes=16 << 20)
few = peak() - before
retrieval_metrics(points[:3000], torch.zeros(3000, dtype=torch.long), nmi=False, chunk_bytes=16 << 20)
print(json.dumps([few, peak() - before]))
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """All similarities of 10,000 items would be 381 MiB; all neighbours of 3,000 of one class, at least 103 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=200, check=True)
    few, one_class = json.loads(done.stdout.splitlines()[-1])  # MiB
    assert few < 60
    assert one_class < 80


SPLIT = """
import json, sys, torch
from pathlib import Path
from idml import distributed
from idml.metrics import neighbours, retrieval_metrics
torch.set_num_threads(1)
distributed.setup("cpu")
neighbours.TILE_ROWS = 32
calls = []
original = neighbours.search_chunk
neighbours.search_chunk = lambda search, rows, *rest: calls.append(len(rows)) or original(search, rows, *rest)
points, labels = torch.load(sys.argv[1])
found = retrieval_metrics(points, labels, ks=(1, 100, 2), split_over_ranks=True)
Path(f"{sys.argv[1]}-{distributed.rank()}.json").write_text(json.dumps([found, sum(calls)]))
distributed.shutdown()
"""


def test_two_processes_give_the_result_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points, labels = blobs(500, 16, 60, 2.0)
    script, data = tmp_path / "split.py", tmp_path / "data.pt"
    script.write_text(SPLIT)
    torch.save((points.float(), labels), data)
    done = launch(2, script, str(data))
    assert done.returncode == 0, done.stderr
    (first, some), (second, others) = (json.loads((tmp_path / f"data.pt-{rank}.json").read_text()) for rank in (0, 1))
    monkeypatch.setattr(neighbours, "TILE_ROWS", 32)
    one = retrieval_metrics(
        points.float(), labels, ks=(1, 100, 2), split_over_ranks=True
    )  # no process group: as without
    assert one == first == second
    assert 0 < one["NMI"] < 1 and 0 < one["RP"] < 1
    assert some + others > 500 and min(some, others) >= 240  # each did its half, and some searched farther again


def test_numpy_and_half_precision_and_gradients() -> None:
    points, labels = blobs(150, 8, 20, 1.5)
    expected = retrieval_metrics(points, labels)
    frozen = points.numpy().copy()
    frozen.flags.writeable = False
    assert retrieval_metrics(frozen, labels.numpy().astype(np.uint8)) == expected
    learnt = points.clone().requires_grad_()
    assert retrieval_metrics(learnt, labels.int()) == expected
    half = points.half()
    assert retrieval_metrics(half, labels) == retrieval_metrics(half.float(), labels)


def test_autocast_and_reduced_precision_change_nothing() -> None:
    points = blobs(300, 32, 30, 2.0)[0].float()
    expected = nearest_neighbours(points, 5)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = nearest_neighbours(points, 5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_length_does_not_matter(scale: float) -> None:
    """Squares of these lengths are beyond float32."""
    points = torch.tensor(EXACT, dtype=torch.float32)
    assert torch.equal(nearest_neighbours(points * scale, 6)[0], nearest_neighbours(points, 6)[0])


def test_a_zero_vector_is_similar_to_nothing() -> None:
    indices, similarities = nearest_neighbours(torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, -1.0]]), 2)
    assert indices.tolist() == [[1, 2], [0, 2], [0, 1]]
    torch.testing.assert_close(similarities, torch.tensor([[0.0, 0.0], [0.0, -1.0], [0.0, -1.0]]))


# --- uncertainty against right neighbours ---------------------------------------------------------------------------


def test_auroc_by_hand() -> None:
    """Wrong at 0.9 and 0.5, right at 0.5, 0.2, 0.1: of 6 pairs 5 are in order and 1 is a tie."""
    scores = torch.tensor([0.9, 0.5, 0.5, 0.2, 0.1])
    right = torch.tensor([False, False, True, True, True])
    assert retrieval_auroc(scores, right) == pytest.approx(5.5 / 6)
    assert retrieval_auroc(-scores.double().numpy(), right.numpy()) == pytest.approx(0.5 / 6)
    assert math.isnan(retrieval_auroc(scores, torch.ones(5, dtype=torch.bool)))
    assert math.isnan(retrieval_auroc(scores, torch.zeros(5, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("scores", "right", "message"),
    [
        (torch.zeros(3, 1), torch.ones(3, dtype=torch.bool), r"scores \(N,\).*\(3, 1\)"),
        (torch.zeros(3), torch.ones(4, dtype=torch.bool), r"right \(3,\).*got \(4,\)"),
        (torch.zeros(3), torch.ones(3), "torch.bool, got .*float32"),
        (torch.tensor([0.0, math.nan, 1.0]), torch.ones(3, dtype=torch.bool), "finite scores, got 1"),
    ],
)
def test_auroc_of_wrong_input_is_refused(scores: Tensor, right: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_auroc(scores, right)


# --- wrong input ----------------------------------------------------------------------------------------------------

POINTS, LABELS = torch.eye(5), torch.arange(5)


@pytest.mark.parametrize(
    ("embeddings", "labels", "options", "message"),
    [
        (torch.zeros(5), LABELS, {}, r"embeddings \(N, D\).*got \(5,\)"),
        (torch.zeros(0, 4), LABELS[:0], {}, r"above 0, got \(0, 4\)"),
        (POINTS.long(), LABELS, {}, "floating point dtype, got torch.int64"),
        (POINTS / torch.tensor([1, 1, 0, 1, 1.0]), LABELS, {}, "inf or NaN in 5 of 5 rows, first in 0"),
        (POINTS + torch.tensor([0, 0, 0, math.nan, 0.0])[:, None], LABELS, {}, "in 1 of 5 rows, first in 3"),
        (POINTS, LABELS[:4], {}, r"labels \(5,\), one for each embedding, got \(4,\)"),
        (POINTS, LABELS.float(), {}, "labels of an integer dtype, got torch.float32"),
        (POINTS, LABELS > 2, {}, "labels of an integer dtype, got torch.bool"),
        (POINTS, LABELS, {"ks": (1, 5)}, "K of at most 4.*got 5"),
        (POINTS, LABELS, {"ks": (0,)}, r"int above 0.*got \[0\]"),
        (POINTS, LABELS, {"ks": (1.0,)}, r"int above 0.*got \[1.0\]"),
        (POINTS, LABELS, {"ks": ()}, r"at least one, got \[\]"),
        (POINTS, LABELS, {"ks": (3,), "families": torch.tensor([0, 0, 0, 1, 2])}, "K of at most 2.*got 3"),
        (POINTS, LABELS, {"families": torch.zeros(4, dtype=torch.long)}, r"families \(5,\)"),
        (POINTS, LABELS, {"query_families": LABELS}, "query_families only beside"),
        (POINTS, LABELS, {"lone": "drop"}, "'miss', 'exclude'.*got 'drop'"),
        (POINTS, LABELS, {"chunk_bytes": 0, "ks": (1,)}, "chunk_bytes above 0, got 0"),
        (POINTS, LABELS, {"query_embeddings": POINTS}, "both or neither"),
        (POINTS, LABELS, {"query_embeddings": POINTS[:, :3], "query_labels": LABELS}, r"\(Q, 5\) .*got \(5, 3\)"),
        (POINTS, LABELS, {"query_embeddings": POINTS, "query_labels": LABELS[:2]}, r"query_labels \(5,\)"),
        (
            POINTS,
            LABELS,
            {"query_embeddings": POINTS, "query_labels": LABELS, "families": LABELS},
            "query_families beside families",
        ),
    ],
)
def test_wrong_input_is_refused(embeddings: Tensor, labels: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(embeddings, labels, **({"ks": (1, 2)} | options))
