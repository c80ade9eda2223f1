"""k-means of embeddings, and how well its clusters match the classes: NMI and pair-counting F1.

scikit-learn's ``KMeans`` is the measure of quality, but at the size of a retrieval test set, where a class has five to
ten images and so there are thousands of clusters, its seeding takes many minutes. This one does the same, greedy
k-means++ and Lloyd's iteration to convergence, in a few large matrix products, on the CPU or on a GPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

POOL_BYTES = 64 << 20
"""Memory for the distances of the candidates of the seeding. Fixed, because the draws depend on it."""

POOL_ROUNDS = 3
"""How often a candidate of the seeding that was not the best of its trial is tried again. On five data sets of 1,800 to
6,000 points the inertia after up to 4 rounds was that of 1 (within the spread of seeds), and worse after 8."""

TILE_ELEMENTS = 1 << 22
"""Point-to-centre products held at a time, 16 MiB in float32: about what stays in a processor's cache."""


class Clustering(NamedTuple):
    """k clusters of N points of D dimensions.

    Attributes:
        labels: (N,) int64 in 0..k - 1, on the device of the points. A cluster is empty only if there are fewer than k
            different points.
        centres: (k, D), the means of the clusters, in the dtype of the points.
        inertia: sum over the points of the squared distance to their centre.
        iterations: of Lloyd, until no point changed its cluster (or the limit).
    """

    labels: Tensor
    centres: Tensor
    inertia: float
    iterations: int


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Within it, float32 matrix products are float32 through and through: no TF32, no bf16, no autocast."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within it, CPU operations of this thread take one core: for many small ones, whose threads would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def clustering_metrics(embeddings: Tensor, labels: Tensor, *, restarts: int = 1, seed: int = 0) -> dict[str, float]:
    """NMI and F1 of the k-means clustering of the embeddings, with as many clusters as there are classes.

    Args:
        embeddings: (N, D) float32 or float64, finite; clustered as they are, so normalise them first.
        labels: (N,) int64, the classes, on the same device.
        restarts, seed: as in ``kmeans``.

    Returns:
        ``NMI`` and ``F1`` of ``agreement``.
    """
    found = kmeans(embeddings, len(labels.unique()), restarts=restarts, seed=seed)
    nmi, f1 = agreement(found.labels, labels)
    return {"NMI": nmi, "F1": f1}


def agreement(clusters: Tensor, classes: Tensor) -> tuple[float, float]:
    """How well N points' clusters match their classes; numbering them otherwise changes nothing.

    Args:
        clusters, classes: (N,) int64, N >= 1.

    Returns:
        NMI in [0, 1]: mutual information over the arithmetic mean of the two entropies; 1 if both entropies are 0.
        F1 in [0, 1]: of the pairs of points, "in one cluster" being foreseen and "in one class" the truth, counted in
        integers; 1 if there is no pair of either kind.

    Example:
        >>> nmi, f1 = agreement(torch.tensor([5, 5, 5, 7]), torch.tensor([0, 0, 1, 1]))
        >>> round(f1, 3)  # of 3 pairs in a cluster 1 is right, of 2 pairs in a class 1 is found
        0.4
    """
    _, cluster = clusters.unique(return_inverse=True)
    names, of_class = classes.unique(return_inverse=True)
    cells, counts = (cluster * len(names) + of_class).unique(return_counts=True)
    cluster_sizes, class_sizes = cluster.bincount(), of_class.bincount()

    total = len(clusters)
    expected = cluster_sizes[cells // len(names)].double() * class_sizes[cells % len(names)].double()
    shared = counts.double()
    information = (shared / total * (shared * total / expected).log()).sum().item()
    entropies = entropy(cluster_sizes) + entropy(class_sizes)
    nmi = 2 * information / entropies if entropies > 0 else 1.0

    found, together, alike = pairs(counts), pairs(cluster_sizes), pairs(class_sizes)
    f1 = 2 * found / (together + alike) if together + alike else 1.0
    return min(max(nmi, 0.0), 1.0), f1


def entropy(sizes: Tensor) -> float:
    """Entropy in nats of a partition into parts of these sizes (int64, above 0)."""
    shares = sizes.double() / sizes.sum()
    return -(shares * shares.log()).sum().item()


def pairs(sizes: Tensor) -> int:
    """How many unordered pairs lie within parts of these sizes (int64)."""
    return int((sizes * (sizes - 1) // 2).sum())


@torch.no_grad()
def kmeans(points: Tensor, k: int, *, restarts: int = 1, max_iterations: int = 300, seed: int = 0) -> Clustering:
    """k-means: greedy k-means++ seeding, then Lloyd's iteration until no point changes its cluster.

    Each seed is the best, by the inertia it leaves, of 2 + floor(ln k) points drawn with probability proportional to
    the squared distance to the nearest seed so far (Arthur and Vassilvitskii 2007; so many trials as in scikit-learn).
    An empty cluster takes the point that is farthest from its centre. Beside a copy of the points and some columns of N
    numbers it needs about 150 MB.

    Args:
        points: (N, D) float32 or float64, finite, on any device.
        k: how many clusters, 1..N.
        restarts: how many seedings; the clustering of least inertia is kept. scikit-learn's default is 1, too.
        max_iterations: limit on Lloyd's iteration; scikit-learn's default.
        seed: of the draws, which are made on the CPU whatever the device.

    Returns:
        The clustering; the same for the same input, seed, device and number of threads.

    Raises:
        ValueError: points of another shape or dtype, k outside 1..N, or restarts or max_iterations below 1.
    """
    if points.ndim != 2 or points.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected points (N, D) of float32 or float64, got {tuple(points.shape)} of {points.dtype}")
    if not 1 <= k <= len(points):
        raise ValueError(f"expected 1 to {len(points)} clusters, as there are {len(points)} points, got {k}")
    if restarts < 1 or max_iterations < 1:
        raise ValueError(f"expected restarts and max_iterations above 0, got {restarts} and {max_iterations}")
    generator = torch.Generator().manual_seed(seed)
    best: Clustering | None = None
    with exact_products(points.device):
        middle = points.mean(0)  # differences of small numbers are exact to more digits than those of large ones
        points = points - middle
        for _ in range(restarts):
            found = lloyd(points, points[choose_seeds(points, k, generator)], max_iterations)
            if best is None or found.inertia < best.inertia:
                best = found
    assert best is not None
    return best._replace(centres=best.centres + middle)


def choose_seeds(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++: (k,) int64, the seeds as rows of ``points`` (N, D).

    Candidates are drawn many at a time, so that their distances are one matrix product, and stay valid while seeds are
    added by rejection: drawn with probability p, kept with probability p_now / p (distances never grow), a candidate
    follows p_now. If every point coincides with a seed before there are k of them, the rest are any points.
    """
    count, trials = len(points), 2 + int(math.log(k))
    pool_size = max(trials, min(POOL_BYTES // (points.element_size() * count), trials * k))
    lengths, transposed = points.square().sum(1), points.t()

    def squared_distances(rows: Tensor) -> Tensor:
        products = torch.addmm(lengths, points[rows], transposed, alpha=-2)
        return products.add_(lengths[rows, None])  # (rows, N)

    first = torch.randint(count, (1,), generator=generator).to(points.device)
    closest = squared_distances(first)[0].clamp_(min=0)  # (N,), to the nearest seed so far
    seeds = [first]
    while len(seeds) < k:
        cumulative = closest.cpu().cumsum(0, dtype=torch.float64)  # torch has no deterministic one for CUDA
        if not cumulative[-1] > 0:
            seeds.append(torch.randint(count, (k - len(seeds),), generator=generator).to(points.device))
            break
        draws = torch.rand(2, pool_size, dtype=torch.float64, generator=generator)
        pool = torch.searchsorted(cumulative, draws[0] * cumulative[-1], right=True).clamp_(max=count - 1)
        pool = pool.to(points.device)
        hurdle = draws[1].to(points.device) * closest[pool]
        distances = squared_distances(pool)
        with one_thread():
            closest = use_pool(pool, distances, hurdle, closest, seeds, k, trials)
    return torch.cat(seeds)


def use_pool(
    pool: Tensor, distances: Tensor, hurdle: Tensor, closest: Tensor, seeds: list[Tensor], k: int, trials: int
) -> Tensor:
    """Add seeds, up to k, from a pool of candidates, and return the squared distances (N,) to the nearest seed then.

    Args:
        pool: (P,) int64, the candidates, drawn in proportion to ``closest`` as it is now.
        distances: (P, N), squared, from them to all points.
        hurdle: (P,), what a candidate's own ``closest`` must exceed for it to count as drawn from what it is by then.
        closest: (N,), squared distance to the nearest seed so far.
        seeds: of (1,) int64 each; appended to.
        trials: how many candidates the best is chosen from.
    """
    used = False
    for _ in range(POOL_ROUNDS):
        start = 0
        while len(seeds) < k:
            kept = (closest[pool[start:]] > hurdle[start:]).nonzero()[:trials, 0] + start
            if len(kept) == 0 or (len(kept) < trials and used):  # better a new pool than a choice of fewer
                break
            used = True
            start = int(kept[-1]) + 1
            nearer = torch.minimum(distances[kept], closest)  # (trials, N)
            winner = nearer.sum(1).argmin()
            closest = nearer[winner].clamp_(min=0)
            seeds.append(pool[kept[winner]].view(1))
    return closest


def lloyd(points: Tensor, centres: Tensor, max_iterations: int) -> Clustering:
    """Lloyd's iteration from ``centres`` (k, D), each time looking only at the centres that moved.

    The score of a point x at a centre c is x.c - |c|^2 / 2: the squared distance is |x|^2 minus twice it. ``bound`` is
    never below a point's best score at any centre but its own. What is new since the last iteration are the centres
    that moved; only points for which the bound, which centres that have moved since may have set, decides nothing are
    compared with all centres.
    """
    k, centres = len(centres), centres.clone()
    own, labels, bound = best_two(points, centres)
    iterations = 1
    moved = torch.ones(k, dtype=torch.bool, device=points.device)
    while iterations < max_iterations:
        moved = fill_empty(labels, own, points, k) | moved
        update_means(points, labels, centres, moved)
        iterations += 1
        before = labels.clone()
        if 2 * int(moved.sum()) > k:
            own, labels, bound = best_two(points, centres)
        else:
            reassign(points, centres, moved, own, labels, bound)
        changed = labels != before
        if not changed.any():
            break
        moved = torch.zeros_like(moved)
        moved[labels[changed]] = moved[before[changed]] = True
    own = (points * centres[labels]).sum(1) - centres.square().sum(1)[labels] / 2
    inertia = (points.square().sum(1) - 2 * own).clamp_(min=0).sum(dtype=torch.float64)
    return Clustering(labels, centres, float(inertia), iterations)


def tiles(rows: int, columns: int) -> list[slice]:
    """The rows in pieces that have about TILE_ELEMENTS products with all columns."""
    height = max(TILE_ELEMENTS // max(columns, 1), 64)
    return [slice(start, start + height) for start in range(0, rows, height)]


def best_two(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best score of each of the N points, the centre it is at (of equals any), and the next best score: (N,) each."""
    offsets, transposed = centres.square().sum(1) / -2, centres.t()
    parts = []
    for rows in tiles(len(points), len(centres)):
        scores = torch.addmm(offsets, points[rows], transposed)
        best, at = scores.max(1)
        parts.append((best, at, scores.scatter_(1, at[:, None], -math.inf).amax(1)))
    best, at, second = (torch.cat(column) for column in zip(*parts, strict=True))
    return best, at, second


def reassign(points: Tensor, centres: Tensor, moved: Tensor, own: Tensor, labels: Tensor, bound: Tensor) -> None:
    """``best_two`` in place, given that it was right but for the centres that ``moved`` (k,) marks."""
    numbers = moved.nonzero()[:, 0]
    column = torch.full((len(centres),), -1, device=points.device).index_copy_(
        0, numbers, torch.arange(len(numbers), device=points.device)
    )
    near, transposed = centres[numbers], centres[numbers].t()
    offsets = near.square().sum(1) / -2
    undecided = []
    for rows in tiles(len(points), len(numbers)):
        scores = torch.addmm(offsets, points[rows], transposed)
        mine = column[labels[rows]]
        with_own = (mine >= 0).nonzero()[:, 0]
        own[rows][with_own] = scores[with_own, mine[with_own]]
        scores[with_own, mine[with_own]] = -math.inf
        best, at = scores.max(1)
        leave = ((best > own[rows]) & (best >= bound[rows])).nonzero()[:, 0]
        lost = (bound[rows] > own[rows]) & (bound[rows] > best)
        undecided.append(lost)
        # A point that leaves has its old centre and the other moved ones as new rivals; one that stays, the moved ones.
        rival = best.clone()
        rival[leave] = torch.maximum(scores[leave].scatter_(1, at[leave, None], -math.inf).amax(1), own[rows][leave])
        own[rows][leave] = best[leave]
        labels[rows][leave] = numbers[at[leave]]
        bound[rows] = torch.maximum(bound[rows], rival)
    lost = torch.cat(undecided).nonzero()[:, 0]
    if len(lost):
        own[lost], labels[lost], bound[lost] = best_two(points[lost], centres)


def fill_empty(labels: Tensor, own: Tensor, points: Tensor, k: int) -> Tensor:
    """Give each empty cluster the point farthest from its centre, in place; returns (k,) which clusters changed."""
    sizes = torch.bincount(labels, minlength=k)
    changed = torch.zeros(k, dtype=torch.bool, device=labels.device)
    empty = (sizes == 0).nonzero()[:, 0]
    if len(empty) == 0:
        return changed
    distances = points.square().sum(1) - 2 * own
    for cluster in empty.tolist():
        distances[sizes[labels] < 2] = -math.inf  # the last point of a cluster stays
        point = int(distances.argmax())
        if not distances[point] > 0:
            break
        donor = int(labels[point])
        sizes[donor] -= 1
        sizes[cluster] = 1
        labels[point] = cluster
        distances[point] = -math.inf
        changed[donor] = changed[cluster] = True
    return changed


def update_means(points: Tensor, labels: Tensor, centres: Tensor, moved: Tensor) -> None:
    """Write the means of the clusters that ``moved`` (k,) marks into ``centres``; an empty one keeps its place.

    Added up in the order of the points, so that the result is the same every time, on a GPU too.
    """
    members = moved[labels].nonzero()[:, 0]
    members = members[labels[members].sort(stable=True).indices]
    numbers, sizes = labels[members].unique_consecutive(return_counts=True)
    centres[numbers] = torch.segment_reduce(points[members], "mean", lengths=sizes)
