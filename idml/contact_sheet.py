"""A picture of what queries found: each query with its nearest images, their scores and labels."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from idml.data.collection import Collection
from idml.data.pixels import read_rgb
from idml.embedding_file import EmbeddingTable
from idml.pictures import TILE, as_tensor, neighbour_grid
from idml.search import Found

MOST_ROWS, MOST_NEIGHBOURS = 50, 20
"""Queries and neighbours that a sheet shows at most: with more it would be too large to be looked at."""

Pictures = Callable[[int], Tensor]
"""From an image's position in the file of embeddings to its (3, TILE, TILE) uint8 picture."""


def contact_sheet(found: Found, pictures: Pictures) -> Image.Image:
    """One row for each of the first queries; green frames where the label is the query's, red ones where it is not.

    Args:
        found: what queries found.
        pictures: of the images in the table.
    """
    queries, table, rows = found.queries, found.table, []
    for row in range(min(len(queries), MOST_ROWS)):
        chosen = found.indices[row, :MOST_NEIGHBOURS]
        labels = [table.labels[index] for index in chosen]
        images = torch.stack([_tile(queries.paths[row]), *(pictures(int(index)) for index in chosen)])
        captions = [f"{_of_query(row, found)}\n{queries.labels[row] or queries.paths[row].name}"]
        for column, (index, label) in enumerate(zip(chosen, labels, strict=True)):
            apart = "" if found.introspective is None else f"  {found.introspective[row, column]:.1f}"
            captions.append(f"{found.similarities[row, column]:.3f}{apart}\n{label or Path(table.paths[index]).name}")
        known = queries.labels[row] is not None and None not in labels
        rows.append((images, captions, [label == queries.labels[row] for label in labels] if known else []))
    return neighbour_grid(rows)


def _of_query(row: int, found: Found) -> str:
    """What is known of a query, in a few letters."""
    if found.other_class is not None:
        return f"P(other) {found.other_class[row]:.2f}"
    if found.table.about["score"] == "none":
        return "query"
    return f"u {found.embedded.uncertainty[row]:.3g}"


def pictures_of_files(table: EmbeddingTable, root: Path) -> Pictures:
    """Those of the files below ``root``; a grey square, and one warning, for files that are not there any more."""
    gone: list[str] = []

    def picture(index: int) -> Tensor:
        try:
            return _tile(root / table.paths[index])
        except (OSError, ValueError):
            if not gone:
                warnings.warn(
                    f"{root / table.paths[index]} cannot be read any more and is shown as a grey square; where the "
                    "images have moved, give their folder as --data-dir",
                    UserWarning,
                    stacklevel=2,
                )
            gone.append(table.paths[index])
            return torch.full((3, TILE, TILE), 128, dtype=torch.uint8)

    return picture


def pictures_in_memory(table: EmbeddingTable, collection: Collection) -> Pictures:
    """Those of a data set that has no files."""
    place = {name: index for index, name in enumerate(collection.names)}
    images = collection.dataset.images
    assert images is not None

    def picture(index: int) -> Tensor:
        pixels = images[place[table.paths[index]]]
        return _as_tile(Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy()))

    return picture


def _tile(path: Path) -> Tensor:
    return _as_tile(read_rgb(path))


def _as_tile(image: Image.Image) -> Tensor:
    """(3, TILE, TILE) uint8: all of the image, on white."""
    small = max(image.size) < TILE
    method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return as_tensor(ImageOps.pad(image, (TILE, TILE), method=method, color="white"))
