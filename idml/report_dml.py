"""What a retrieval run shows: a line per epoch, neighbours of a few queries, projections of the test embeddings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from idml.data.retrieval_data import RetrievalData
from idml.introspection.introspection import IntrospectionSpec
from idml.pictures import neighbour_grid, save_png
from idml.run import Run, write_text

if TYPE_CHECKING:
    from idml.data.dml_loaders import DmlLoaders
    from idml.retrieval_evaluation import Embedded, Found

QUERIES = 8
"""Queries in the picture of neighbours, spread over the test images."""

PROJECTED = 1_000
"""Test images in TensorBoard's projector, whole classes of them: their sprites must fit one picture."""

SPRITE_SIZE = 64
"""Pixels of a side of an image in the projector."""

COLOURED_CLASSES = 10
"""Classes with a colour of their own in the projection; more could not be told apart."""


def epoch_line(metrics: Mapping[str, Any]) -> str:
    """The figures of one epoch on one line, or, where the data have families, on two."""
    line = f"epoch {metrics['epoch']:3d}  train loss {metrics['train_loss']:.3f}"
    if "val_R@1" in metrics:
        line += f"  held out  R@1 {metrics['val_R@1']:.1%}  MAP@R {metrics['val_MAP@R']:.1%}"
    if "R@1" in metrics:
        line += f"  test  {_retrieval(metrics, '')}"
        line += f"  R-AUROC 1-sim {metrics['R-AUROC similarity']:.3f}"
        if "R-AUROC uncertainty" in metrics:
            line += f" u {metrics['R-AUROC uncertainty']:.3f}"
            line += f"  ISM weight {metrics['ism_weight']:.3f}"
    line += f"  {metrics['images_per_second']:.0f} images/s"
    if "other_families/R@1" in metrics:
        line += f"\n           without the query's family in the gallery  {_retrieval(metrics, 'other_families/')}"
    return line


def introspection_line(metrics: Mapping[str, Any], spec: IntrospectionSpec) -> str:
    """What the introspection is worth on the test images, on one line."""
    how = (
        f"calibrated on {spec.held_out} images of held-out classes"
        if spec.calibrated
        else f"not calibrated: {spec.note}"
    )
    return (
        f"introspection  R-AUROC of P(nearest is wrong) {metrics['R-AUROC search']:.3f} (1 - similarity "
        f"{metrics['R-AUROC similarity']:.3f}), of the image alone {metrics['R-AUROC uncertainty']:.3f}  {how}"
    )


def _retrieval(metrics: Mapping[str, Any], prefix: str) -> str:
    recalls = [name for name in metrics if name.startswith(f"{prefix}R@")]
    names = [*recalls, *(f"{prefix}{name}" for name in ("RP", "MAP@R", "NMI", "F1"))]
    return "  ".join(f"{name.removeprefix(prefix)} {metrics[name]:.1%}" for name in names if name in metrics)


def _neighbour_picture(
    found: Found, tested: Embedded, loaders: DmlLoaders, data: RetrievalData, *, ism_on: bool
) -> Image.Image:
    """Eight queries, each with its five nearest, framed by right and wrong."""
    queries = np.linspace(0, len(data.test) - 1, min(QUERIES, len(data.test)), dtype=int).tolist()
    searched = data.test if data.gallery is None else data.gallery
    loader = loaders.test if loaders.gallery is None else loaders.gallery
    rows = []
    for query in queries:
        neighbours = found.neighbours[query].tolist()
        images = torch.cat([loaders.test.images_at([query]), loader.images_at(neighbours)])
        name = data.test.classes[int(data.test.labels[query])]
        caption = f"|u| {tested.uncertainty[query]:.3g}" if ism_on else f"norm {tested.norm[query]:.3g}"
        if found.error_probability is not None:
            caption = f"P(wrong) {found.error_probability[query]:.2f}"
        captions = [f"{caption}\n{name}"]
        for neighbour, similarity in zip(neighbours, found.similarities[query].tolist(), strict=True):
            captions.append(f"sim {similarity:.2f}\n{searched.classes[int(searched.labels[neighbour])]}")
        right = [bool(searched.labels[neighbour] == data.test.labels[query]) for neighbour in neighbours]
        rows.append((images, captions, right))
    return neighbour_grid(rows)


def draw_neighbours(
    run: Run, found: Found, tested: Embedded, loaders: DmlLoaders, data: RetrievalData, epoch: int, *, ism_on: bool
) -> None:
    """``pictures/neighbours.png``, and the same in TensorBoard."""
    if run.writes:
        picture = _neighbour_picture(found, tested, loaders, data, ism_on=ism_on)
        run.log_picture("neighbours", "test queries and their nearest", picture, epoch)


def principal_components(embeddings: Tensor) -> Tensor:
    """(N, D) -> (N, 2): coordinates along the two directions of largest variance."""
    centred = embeddings.double() - embeddings.double().mean(0)
    _, _, directions = torch.pca_lowrank(centred, q=min(2, *centred.shape), center=False, niter=8)
    return (centred @ directions).float()


def draw_projection(run: Run, tested: Embedded, data: RetrievalData, epoch: int, *, ism_on: bool) -> None:
    """``pictures/projection.png``: the test embeddings in two principal components, a few classes in colour.

    The size of a point grows with the image's uncertainty.
    """
    if not run.writes:
        return
    import matplotlib.figure  # slow to import: only where used
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    points = principal_components(tested.semantic).numpy()
    labels, counts = np.unique(data.test.labels, return_counts=True)
    common = labels[np.argsort(-counts, kind="stable")[:COLOURED_CLASSES]]
    rank = tested.uncertainty.argsort().argsort().float() / len(points) if ism_on else torch.full((len(points),), 0.3)
    sizes = 4 + 24 * rank.numpy()
    figure = matplotlib.figure.Figure(figsize=(8, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(points[:, 0], points[:, 1], s=sizes, color="0.85", label="other classes")
    for number, label in enumerate(common):
        own = data.test.labels == label
        name = data.test.classes[int(label)]
        axes.scatter(
            points[own, 0],
            points[own, 1],
            s=sizes[own],
            color=f"C{number}",
            marker="osD^v"[number % 5],
            label=name[:30],
        )
    title = "test embeddings, two principal components" + (", larger: more uncertain" if ism_on else "")
    axes.set(title=title, xlabel="first component", ylabel="second component")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    run.log_picture("projection", "test embeddings", picture, epoch)


def log_projector(run: Run, tested: Embedded, loaders: DmlLoaders, data: RetrievalData, epoch: int) -> None:
    """Test embeddings of whole classes, up to ``PROJECTED`` images, in TensorBoard's projector, with their images."""
    if not run.writes:
        return
    order = np.argsort(data.test.labels, kind="stable")[:PROJECTED]
    images = loaders.test.images_at(order.tolist()).float().div(255)
    if images.shape[2] > SPRITE_SIZE:
        images = torch.nn.functional.interpolate(images, SPRITE_SIZE, mode="bilinear", antialias=True)
    names = [data.test.classes[int(data.test.labels[index])] for index in order]
    run.log_projector(tested.semantic[torch.from_numpy(order)], names, images.clamp(0, 1), epoch)


def write_retrieval(
    directory: Path, found: Found, tested: Embedded, loaders: DmlLoaders, data: RetrievalData, *, ism_on: bool
) -> None:
    """``metrics.json`` and ``neighbours.png`` in a folder."""
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "metrics.json", json.dumps(found.metrics, indent=2) + "\n")
    save_png(_neighbour_picture(found, tested, loaders, data, ism_on=ism_on), directory / "neighbours.png")
