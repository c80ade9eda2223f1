"""Exact nearest neighbours by cosine similarity, in chunks of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from idml import distributed
from idml.metrics.clustering import exact_products

CHUNK_BYTES = 256 << 20
"""Default bound on the memory of one step of the search."""

GROUP = 32
"""Most neighbouring columns of which only the largest is looked at first."""

TILE_COLUMNS, TILE_ROWS = 1 << 14, 512
"""A step's product of queries and gallery items: 32 MiB in float32, large enough for the full speed of a BLAS."""

LEAST_ROWS = 16
"""Fewer queries are filled up to so many: below, BLAS takes other routines, and equal items may differ in the last
bit of their similarity (seen with MKL from 1 to 7 rows, not from 16)."""

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
