"""Figures of a retrieval model: R@K, RP, MAP@R, NMI and F1 from its embeddings.

Neighbours are exact, by cosine similarity, and are searched in chunks: what is held at a time is bounded by
``chunk_bytes`` and never grows with the square of the number of images.

    >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> figures = retrieval_metrics(embeddings, torch.tensor([0, 0, 1, 1]), ks=(1, 2))
    >>> figures["R@1"], figures["MAP@R"], figures["NMI"]
    (1.0, 1.0, 1.0)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from idml import distributed
from idml.metrics.clustering import clustering_metrics
from idml.metrics.neighbours import (
    CHUNK_BYTES,
    Array,
    Search,
    as_integers,
    check_ks,
    matches,
    neighbours_in_chunks,
    prepare,
)
from idml.metrics.uncertainty import auroc, checked

FEW = 32
"""Neighbours that are searched for first where an R@K asks for more: K = 1000 costs three times as much as 32."""

LONE = ("miss", "exclude")


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
    values, correct = checked(scores, right)
    return auroc(values[~correct], values[correct])


def count_references(search: Search, gallery_labels: Tensor, query_labels: Tensor) -> Tensor:
    """R, (Q,) int64: how many gallery items of its class each query can find."""
    count = matches(gallery_labels, query_labels)
    if search.families is None:
        return count - int(search.itself)
    # One number for each (label, family) that there is.
    both = torch.stack([torch.cat([gallery_labels, query_labels]), torch.cat(search.families)], dim=1)
    keys = both.unique(dim=0, return_inverse=True)[1]
    return count - matches(keys[: len(gallery_labels)], keys[len(gallery_labels) :])


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
