"""Figures of a retrieval model: R@K, RP, MAP@R, NMI and F1 from its embeddings.

Neighbours are exact, by cosine similarity, and are searched in chunks: what is held at a time is bounded by
``chunk_bytes`` and never grows with the square of the number of images.

    >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> figures = retrieval_metrics(embeddings, torch.tensor([0, 0, 1, 1]), ks=(1, 2))
    >>> figures["R@1"], figures["MAP@R"], figures["NMI"]
    (1.0, 1.0, 1.0)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from idml import distributed
from idml.metrics.clustering import clustering_metrics, exact_products

CHUNK_BYTES = 256 << 20
"""Default bound on the memory of one step of the search."""

GROUP = 32
"""Most neighbouring columns of which only the largest is looked at first."""

TILE_COLUMNS, TILE_ROWS = 1 << 14, 512
"""A step's product of queries and gallery items: 32 MiB in float32, large enough for the full speed of a BLAS."""

LEAST_ROWS = 16
"""Fewer queries are filled up to so many: below, BLAS takes other routines, and equal items may differ in the last
bit of their similarity (seen with MKL from 1 to 7 rows, not from 16)."""

FEW = 32
"""Neighbours that are searched for first where an R@K asks for more: K = 1000 costs three times as much as 32."""

LONE = ("miss", "exclude")

Array = Tensor | np.ndarray


class Search(NamedTuple):
    """Who looks for whom.

    Attributes:
        gallery: (N, D) unit vectors.
        queries: (Q, D) unit vectors; the gallery itself where everyone looks for all others.
        itself: whether query i is gallery item i, which is then no neighbour of its own.
        families: (N,) and (Q,) int64: an item of a query's family is no neighbour of it; None where there are none.
    """

    gallery: Tensor
    queries: Tensor
    itself: bool
    families: tuple[Tensor, Tensor] | None


def retrieval_metrics(
    embeddings: Array,
    labels: Array,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    query_embeddings: Array | None = None,
    query_labels: Array | None = None,
    families: Array | None = None,
    query_families: Array | None = None,
    lone: str = "miss",
    nmi: bool = True,
    restarts: int = 1,
    chunk_bytes: int = CHUNK_BYTES,
    seed: int = 0,
    split_over_ranks: bool = False,
) -> dict[str, float]:
    """R@K, P@1, RP, MAP@R, and NMI and F1 of a k-means clustering.

    A reference of a query is a gallery item of its class, itself excluded by index; a query without one is lone. For a
    query with R references, and neighbours in order of falling cosine similarity (of equals, the lower index first):

    - R@K: whether there is a reference among the first K;
    - RP: the share of references among the first R;
    - MAP@R: (1/R) sum over i = 1..R of P(i) rel(i), with rel(i) = 1 where neighbour i is a reference, else 0, and P(i)
      the share of references among the first i (Musgrave et al. 2020).

    Each is the mean over the queries. Embeddings are L2-normalised first, and all products are true float32 (float64
    for float64), never TF32.

    Args:
        embeddings: (N, D) floating point, finite; half precision is computed as float32. A zero vector has similarity 0
            to all. Tensors are used on their device (those on MPS on the CPU), NumPy arrays on the CPU.
        labels: (N,) integers, the classes.
        ks: the K of R@K, from 1 to the number of gallery items that any query can choose from.
        query_embeddings, query_labels: (Q, D) and (Q,). Given, these are the queries and ``embeddings`` the gallery,
            and nothing is excluded by index. Otherwise every item is a query among all others.
        families: (N,) integers: gallery items of a query's family are removed for it (copies from one source, say).
        query_families: (Q,) integers, of the queries where these are given.
        lone: whether lone queries count as a "miss" in R@K, as in the released code, or R@K is to "exclude" them. P@1,
            RP and MAP@R always exclude them.
        nmi: whether to cluster, which takes longer than the rest; else there is no NMI and F1.
        restarts, seed: of the clustering, see ``kmeans``.
        chunk_bytes: bound on the memory of the neighbour search beside the (normalised) embeddings; at the least what
            one query's max(K, R) neighbours need. k-means takes some 150 MB whatever this is. Changes no result but
            where similarities agree to the last bit or so, and a BLAS rounds products of other sizes otherwise.
        split_over_ranks: share out the queries to the processes of the process group; each must call this with the
            same arguments and has the same result. Rank 0 alone clusters.

    Returns:
        Shares in [0, 1]: ``R@<K>`` for each K, ``P@1`` (R@1 without lone queries), ``RP``, ``MAP@R`` and, if asked for,
        ``NMI`` and ``F1`` (see ``agreement``) of as many clusters as there are classes, over all items: gallery and
        queries together where they are apart. A mean over no query, because all are lone, is NaN.

    Raises:
        ValueError: wrong shape, dtype or length, no item, a value that is not finite, or a K that is out of range.
    """
    if lone not in LONE:
        raise ValueError(f"expected lone to be one of {LONE}, got {lone!r}")
    if (query_embeddings is None) != (query_labels is None):
        raise ValueError("expected both or neither of query_embeddings and query_labels, got one")
    search = prepare(embeddings, query_embeddings, families, query_families)
    device = search.gallery.device
    gallery_labels = as_integers("labels", labels, len(search.gallery), device)
    labels_of_queries = gallery_labels
    if query_labels is not None:
        labels_of_queries = as_integers("query_labels", query_labels, len(search.queries), device)
    check_ks(ks, search)

    references = count_references(search, gallery_labels, labels_of_queries)
    split = split_over_ranks and dist.is_initialized()

    def figures(wanted: Tensor) -> Tensor:
        found = torch.zeros(len(search.queries), len(ks) + 3, dtype=torch.float64, device=device)
        for rows, indices, _ in neighbours_in_chunks(search, wanted, chunk_bytes, split=split):
            right = gallery_labels[indices] == labels_of_queries[rows, None]
            found[rows] = figures_of(right, references[rows], ks)
        return reduce(found) if split else found

    # Most queries have a reference among the first few neighbours, which answers every R@K. The others search again.
    per_query = figures(references.clamp(min=min(max(ks), FEW)))
    if max(ks) > FEW:
        short = (references > 0) & (references < max(ks))  # had not been searched for so many
        missed = short & (per_query[:, list(ks).index(max(ks))] == 0)
        per_query = torch.where(missed[:, None], figures(max(ks) * missed), per_query)

    served = references > 0
    means = per_query[served].mean(0).tolist()
    recalls = means if lone == "exclude" else per_query.mean(0).tolist()
    metrics = {f"R@{k}": recalls[column] for column, k in enumerate(ks)}
    metrics |= dict(zip(("P@1", "RP", "MAP@R"), means[len(ks) :], strict=True))
    if nmi:
        everything, everyones = search.gallery, gallery_labels
        if not search.itself:
            everything = torch.cat([search.gallery, search.queries])
            everyones = torch.cat([gallery_labels, labels_of_queries])
        clustering = {"NMI": 0.0, "F1": 0.0}
        if not split or distributed.is_main():
            clustering = clustering_metrics(everything, everyones, restarts=restarts, seed=seed)
        if split:
            whole = reduce(torch.tensor(list(clustering.values()), dtype=torch.float64, device=device))
            clustering = dict(zip(clustering, whole.tolist(), strict=True))
        metrics |= clustering
    return metrics


def nearest_neighbours(
    embeddings: Array,
    k: int,
    *,
    query_embeddings: Array | None = None,
    families: Array | None = None,
    query_families: Array | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """The k nearest gallery items of each query, exactly, by cosine similarity.

    Args:
        k: from 1 to the number of gallery items that any query can choose from.
        embeddings, query_embeddings, families, query_families, chunk_bytes: as in ``retrieval_metrics``.

    Returns:
        indices: (Q, k) int64, nearest first and of equals the lower index first, itself excluded by index.
        similarities: (Q, k) in [-1, 1] up to rounding, float32 (float64 for float64). Both are on the device of the
        embeddings.

    Raises:
        ValueError: as ``retrieval_metrics``.
    """
    search = prepare(embeddings, query_embeddings, families, query_families)
    check_ks([k], search)
    count, device = len(search.queries), search.gallery.device
    indices = torch.empty(count, k, dtype=torch.long, device=device)
    similarities = torch.empty(count, k, dtype=search.gallery.dtype, device=device)
    for rows, found, values in neighbours_in_chunks(search, torch.full((count,), k), chunk_bytes):
        indices[rows], similarities[rows] = found, values
    return indices, similarities


def retrieval_auroc(scores: Array, right: Array) -> float:
    """AUROC with which a score foresees that a query's nearest neighbour is wrong.

    Args:
        scores: (Q,) floating point, finite: high means "probably wrong", as an uncertainty does.
        right: (Q,) bool, whether the nearest neighbour is of the query's class.

    Returns:
        The probability in [0, 1] that a query answered wrongly has a higher score than one answered rightly, equal
        scores counted half: 0.5 is chance. NaN where all are right or all are wrong, as there is nothing to tell apart.

    Raises:
        ValueError: wrong shape, dtype or length, or a score that is not finite.
    """
    from sklearn.metrics import roc_auc_score  # slow to import: only where used

    values, correct = torch.as_tensor(scores).detach().cpu(), torch.as_tensor(right).detach().cpu()
    if values.ndim != 1 or not values.is_floating_point():
        raise ValueError(f"expected scores (Q,) of floating point, got {tuple(values.shape)} of {values.dtype}")
    if correct.shape != values.shape or correct.dtype != torch.bool:
        raise ValueError(
            f"expected right {tuple(values.shape)} of torch.bool, got {tuple(correct.shape)} of {correct.dtype}"
        )
    if not values.isfinite().all():
        raise ValueError(f"expected finite scores, got {int((~values.isfinite()).sum())} that are not")
    if correct.all() or not correct.any():
        return float("nan")
    return float(roc_auc_score((~correct).numpy(), values.double().numpy()))


# --- the input ------------------------------------------------------------------------------------------------------


def prepare(
    embeddings: Array, query_embeddings: Array | None, families: Array | None, query_families: Array | None
) -> Search:
    """Check and normalise what ``retrieval_metrics`` is given; raises ValueError."""
    gallery = unit_vectors("embeddings", embeddings)
    queries = gallery
    if query_embeddings is not None:
        queries = unit_vectors("query_embeddings", query_embeddings)
        if (queries.shape[1], queries.dtype, queries.device) != (gallery.shape[1], gallery.dtype, gallery.device):
            raise ValueError(
                f"expected query_embeddings (Q, {gallery.shape[1]}) of {gallery.dtype} on {gallery.device} like the "
                f"embeddings, got {tuple(queries.shape)} of {queries.dtype} on {queries.device}"
            )
    itself = query_embeddings is None
    if query_families is not None and (itself or families is None):
        raise ValueError("expected query_families only beside families and query_embeddings, got them without")
    if families is None:
        return Search(gallery, queries, itself, None)
    of_gallery = of_queries = as_integers("families", families, len(gallery), gallery.device)
    if not itself:
        if query_families is None:
            raise ValueError("expected query_families beside families and query_embeddings, got none")
        of_queries = as_integers("query_families", query_families, len(queries), gallery.device)
    return Search(gallery, queries, itself, (of_gallery, of_queries))


def as_tensor(array: Any) -> Tensor:
    """A tensor, without gradient, of a tensor, a NumPy array (also one that is not writable) or a list."""
    if isinstance(array, np.ndarray):
        array = np.require(array, requirements=["C", "W"])
    return torch.as_tensor(array).detach()


def unit_vectors(name: str, embeddings: Array) -> Tensor:
    """A normalised copy, float32 or float64; ValueError unless (N, D), N and D above 0, floating point, finite."""
    raw = as_tensor(embeddings)
    if raw.device.type == "mps":
        raw = raw.cpu()  # it has no float64, in which the figures are added up
    if raw.ndim != 2 or 0 in raw.shape:
        raise ValueError(f"expected {name} (N, D) with N and D above 0, got {tuple(raw.shape)}")
    if not raw.is_floating_point():
        raise ValueError(f"expected {name} of a floating point dtype, got {raw.dtype}")
    vectors = raw if raw.dtype == torch.float64 else raw.float()
    largest = vectors.abs().amax(1, keepdim=True)  # inf or NaN if any component is
    if not largest.isfinite().all():
        bad = (~largest[:, 0].isfinite()).nonzero()[:, 0].tolist()
        raise ValueError(f"expected finite {name}, got inf or NaN in {len(bad)} of {len(raw)} rows, first in {bad[0]}")
    # Divided by the largest component, squares neither overflow nor vanish.
    vectors = vectors / largest.where(largest > 0, 1)
    return vectors.div_(vectors.norm(dim=1, keepdim=True).clamp_(min=torch.finfo(vectors.dtype).tiny))


def as_integers(name: str, values: Array, count: int, device: torch.device) -> Tensor:
    """(count,) int64 on the device; ValueError if it is not (count,) of integers."""
    integers = as_tensor(values)
    if integers.shape != (count,):
        raise ValueError(f"expected {name} ({count},), one for each embedding, got {tuple(integers.shape)}")
    if integers.is_floating_point() or integers.is_complex() or integers.dtype == torch.bool:
        raise ValueError(f"expected {name} of an integer dtype, got {integers.dtype}")
    return integers.to(device, torch.long)


def check_ks(ks: Sequence[int], search: Search) -> None:
    """ValueError unless every K is a positive int, and every query has so many items to choose from."""
    wrong = [k for k in ks if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1]
    if len(ks) == 0 or wrong:
        raise ValueError(f"expected every K to be an int above 0, and at least one, got {list(ks)}")
    available = len(search.gallery) - int(search.itself)
    if search.families is not None:
        available = len(search.gallery) - int(matches(*search.families).max())
    if max(ks) > available:
        raise ValueError(
            f"expected K of at most {available}, as many gallery items as there are for every query (itself and its "
            f"family are none), got {max(ks)}"
        )


def matches(gallery_keys: Tensor, query_keys: Tensor) -> Tensor:
    """(Q,) int64: how many of the (N,) gallery keys equal each of the (Q,) query keys."""
    ordered = gallery_keys.sort().values
    return torch.searchsorted(ordered, query_keys, right=True) - torch.searchsorted(ordered, query_keys)


def count_references(search: Search, gallery_labels: Tensor, query_labels: Tensor) -> Tensor:
    """R, (Q,) int64: how many gallery items of its class each query can find."""
    count = matches(gallery_labels, query_labels)
    if search.families is None:
        return count - int(search.itself)
    # One number for each (label, family) that there is.
    both = torch.stack([torch.cat([gallery_labels, query_labels]), torch.cat(search.families)], dim=1)
    keys = both.unique(dim=0, return_inverse=True)[1]
    return count - matches(keys[: len(gallery_labels)], keys[len(gallery_labels) :])


# --- figures --------------------------------------------------------------------------------------------------------


def figures_of(right: Tensor, references: Tensor, ks: Sequence[int]) -> Tensor:
    """(h, len(ks) + 3) float64 of h queries: R@K for each K, P@1, RP and MAP@R; the last two 0 where R is 0.

    Args:
        right: (h, n) bool, whether the query's neighbours, nearest first, are references; n >= max(max(ks), R).
        references: (h,) int64, R.
    """
    columns = [right[:, :k].any(1) for k in ks] + [right[:, 0]]
    counted = references.clamp(min=1)
    place = torch.arange(1, right.shape[1] + 1, device=right.device)
    relevant = right & (place <= references[:, None])
    precision = relevant.cumsum(1) / place.double()  # (h, n)
    columns += [relevant.sum(1) / counted.double(), (precision * relevant).sum(1) / counted]
    return torch.stack([column.double() for column in columns], dim=1)


def reduce(values: Tensor) -> Tensor:
    """Sum over the processes, by way of the GPU where the process group needs that."""
    through = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    return distributed.all_reduce_sum(values.to(through)).to(values.device)


# --- the search -----------------------------------------------------------------------------------------------------


def neighbours_in_chunks(
    search: Search, wanted: Tensor, chunk_bytes: int, *, split: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The neighbours of all queries, some queries at a time.

    Args:
        wanted: (Q,) int64, how many neighbours each query needs at least, 0 for one to be passed over: a query of a
            large class does not make the others search for as many.
        split: yield only this process' chunks; they are cut as if there were one process.

    Yields:
        (h,) int64 numbers of the queries, (h, n) int64 their neighbours and (h, n) their similarities, n being the
        largest number wanted among them. Entries beyond what a query can choose from are of similarity -inf.
    """
    order = wanted.cpu().sort(descending=True, stable=True)
    start = number = 0
    count = int((wanted > 0).sum())
    while start < count:
        k = int(order.values[start])
        height, width = chunk_shape(k, len(search.gallery), search.gallery.element_size(), chunk_bytes)
        rows = order.indices[start : min(start + height, count)].to(search.gallery.device)
        if not split or number % distributed.world_size() == distributed.rank():
            with torch.no_grad(), exact_products(search.gallery.device):
                values, indices = search_chunk(search, rows, k, width)
            yield rows, indices, values
        start, number = start + height, number + 1


def chunk_shape(k: int, gallery_size: int, element_size: int, chunk_bytes: int) -> tuple[int, int]:
    """Queries and gallery items of one step, for it to take about ``chunk_bytes`` (at the least one query's needs)."""
    if chunk_bytes < 1:
        raise ValueError(f"expected chunk_bytes above 0, got {chunk_bytes}")
    width = min(gallery_size, max(TILE_COLUMNS, 4 * k))
    while True:
        # A similarity, what selecting among them takes (with its index, when most are sorted), and the k found, in
        # two copies each while merging, with the float64 and int64 columns made of them.
        row = width * (element_size + (24 if 8 * k > width else 8)) + 128 * k
        height = chunk_bytes // row
        if height >= LEAST_ROWS or width <= max(k, 1024):
            return max(1, min(height, TILE_ROWS)), width
        width = max(width // 2, 1)


def search_chunk(search: Search, rows: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
    """The k nearest of the queries ``rows`` (h,): similarities and indices, (h, k) each; -inf where there are none.

    The gallery is gone through in tiles of about ``width`` items, the best so far being carried along.
    """
    count, height = len(search.gallery), len(rows)
    k = min(k, count)
    queries = search.queries[rows]
    if height < LEAST_ROWS:
        queries = torch.cat([queries, queries.new_zeros(LEAST_ROWS - height, queries.shape[1])])
    pieces = -(-count // width)
    width = -(-count // pieces)  # alike, so that none is narrow
    buffer = queries.new_empty(len(queries), -(-width // GROUP) * GROUP)
    best: tuple[Tensor, Tensor] | None = None
    for start in range(0, count, width):
        tile = search.gallery[start : start + width]
        torch.mm(queries, tile.t(), out=buffer[:, : len(tile)])
        buffer[:, len(tile) :] = -torch.inf
        scores = buffer[:height]
        if search.families is not None:
            kin = search.families[1][rows, None] == search.families[0][start : start + width]
            scores[:, : len(tile)].masked_fill_(kin, -torch.inf)
        elif search.itself:
            inside = ((rows >= start) & (rows < start + len(tile))).nonzero()[:, 0]
            scores[inside, rows[inside] - start] = -torch.inf
        values, columns = largest(scores, min(k, len(tile)))
        columns = columns.clamp_(max=len(tile) - 1).add_(start)  # what is of similarity -inf may lie beyond the tile
        if best is not None:
            # The sort is stable, and what came before has lower indices.
            both, order = torch.cat([best[0], values], 1).sort(dim=1, descending=True, stable=True)
            values, columns = both[:, :k], torch.cat([best[1], columns], 1).gather(1, order[:, :k])
        best = values, columns
    assert best is not None
    return best


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of scores (h, n), n a multiple of GROUP and k <= n: values and columns, (h, k) each.

    In falling order and of equals the lower column first, also where some of the equals are left out.
    """
    height, width = scores.shape
    if k == width:
        values, columns = scores.sort(dim=1, descending=True, stable=True)
        return values, columns
    group = GROUP
    while group * group * (k + 1) > width:  # fewer groups than there are candidates in those chosen
        group //= 2
    if group > 2:
        # The k + 1 largest values are within the k + 1 groups of the largest maxima.
        groups = scores.view(height, -1, group).amax(2).topk(k + 1, sorted=False).indices
        rows = torch.arange(height, device=scores.device)[:, None] * (width // group)
        candidates = scores.view(-1, group)[groups + rows].flatten(1)
        values, at = candidates.topk(k + 1)
        columns = groups.gather(1, at // group) * group + at % group
    else:
        values, columns = scores.topk(k + 1)
    # topk takes any of equals: where the first left out equals the last taken, count them off from the left.
    doubtful = ((values[:, -2] == values[:, -1]) & (values[:, -1] > -torch.inf)).nonzero()[:, 0]
    columns = columns[:, :k].contiguous()
    for rows in doubtful.split(64):
        columns[rows] = first_of_equals(scores[rows], values[rows, k - 1], k)
    columns = columns.sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def first_of_equals(scores: Tensor, least: Tensor, k: int) -> Tensor:
    """(h, k) the columns of scores (h, n) above ``least`` (h,), the k-th largest, and the first that equal it."""
    above = scores > least[:, None]
    equal = scores == least[:, None]
    vacant = k - above.sum(1, keepdim=True)
    taken = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= vacant))
    return taken.nonzero()[:, 1].view(-1, k)
