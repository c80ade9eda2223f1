"""Grids of captioned images for TensorBoard and PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from augment import MixedBatch
from idml.errors import UserError

TILE, MARGIN, FONT_SIZE = 96, 6, 11
"""Pixels: side of an image in a grid, space around it, height of the caption's letters."""

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".pdf": "PDF",
}
"""What a picture is written as, by the end of its name."""

QUALITY: dict[str, dict[str, Any]] = {
    "PNG": {"optimize": True},
    "JPEG": {"quality": 92, "subsampling": 0},
    "WEBP": {"lossless": True},
}
"""Pillow's options for a format; the small letters of captions must stay sharp."""


def captioned_grid(
    images: Tensor, captions: Sequence[str], *, columns: int = 8, titles: Sequence[str] = ()
) -> Image.Image:
    """A grid of images with a caption of up to two lines under each.

    Args:
        images: (N, 3, S, S) uint8.
        captions: N texts; a newline starts the second line.
        columns: images in a row.
        titles: one text for each row, written above it.

    Returns:
        An RGB picture.
    """
    font = ImageFont.load_default(FONT_SIZE)
    line = FONT_SIZE + 3
    title_height = line + 2 if titles else 0
    cell_width, cell_height = TILE + 2 * MARGIN, title_height + TILE + 2 * line + MARGIN
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * cell_width, rows * cell_height + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(index, columns)
        left, top = column * cell_width + MARGIN, row * cell_height + MARGIN
        if column == 0 and titles:
            draw.text((left, top), titles[row], fill="black", font=font)
        top += title_height
        tile = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        enlarge = Image.Resampling.NEAREST if tile.width < TILE else Image.Resampling.LANCZOS
        canvas.paste(tile.resize((TILE, TILE), enlarge), (left, top))
        for number, text in enumerate(caption.split("\n")[:2]):
            while text and draw.textlength(text, font) > TILE + MARGIN:
                text = text[:-1]
            draw.text((left, top + TILE + 1 + number * line), text, fill="black", font=font)
    return canvas


def as_tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) uint8, as TensorBoard takes it."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def mixed_grid(images: Tensor, batch: MixedBatch, classes: Sequence[str]) -> Image.Image:
    """Up to 16 images of a mixed batch, each over the weights and names of its two classes.

    Args:
        images: (B, 3, S, S) uint8, the batch's images before normalisation.
        batch: gives labels and lam.
        classes: class names.
    """
    lam = float(batch.lam)
    captions = [
        f"{lam:.2f} {classes[int(a)]}\n{1 - lam:.2f} {classes[int(b)]}"
        for a, b in zip(batch.labels_a[:16], batch.labels_b[:16], strict=True)
    ]
    return captioned_grid(images[:16], captions)


def extremes_grid(images: Tensor, scores: Tensor, captions: Sequence[str], *, name: str) -> Image.Image:
    """Two rows: the images with the highest scores, then those with the lowest.

    Args:
        images: (2K, 3, S, S) uint8, the K highest first.
        scores: (2K,), written under each image.
        captions: 2K texts of one line, written under the score.
        name: of the score, for the titles of the rows.
    """
    texts = [f"{score:.3g}\n{caption}" for score, caption in zip(scores.tolist(), captions, strict=True)]
    titles = (f"most uncertain test images ({name})", f"least uncertain test images ({name})")
    return captioned_grid(images, texts, columns=len(images) // 2, titles=titles)


def neighbour_grid(rows: Sequence[tuple[Tensor, Sequence[str], Sequence[bool]]]) -> Image.Image:
    """One row per query: the query, then its nearest images, framed green and full where right, red and dashed where
    wrong, so that they can be told apart without colours too.

    Args:
        rows: for each query, (1 + K, 3, S, S) uint8 images with the query first; 1 + K captions of up to two lines; and
            K times whether the neighbour is of the query's class.
    """
    columns = len(rows[0][0])
    captions = [caption for _, texts, _ in rows for caption in texts]
    canvas = captioned_grid(torch.cat([images for images, _, _ in rows]), captions, columns=columns)
    draw = ImageDraw.Draw(canvas)
    cell_width, cell_height = canvas.width // columns, (canvas.height - MARGIN) // len(rows)
    for row, (_, _, right) in enumerate(rows):
        for column, is_right in enumerate(right, start=1):
            left, top = column * cell_width + MARGIN, row * cell_height + MARGIN
            box = (left - 3, top - 3, left + TILE + 2, top + TILE + 2)
            draw.rectangle(box, outline="#1a8f3c" if is_right else "#d01f1f", width=3)
            for start in [] if is_right else range(0, TILE, 12):
                for edge in (box[1], box[3] - 2):
                    draw.rectangle((left + start, edge, left + start + 5, edge + 2), fill="white")
                for edge in (box[0], box[2] - 2):
                    draw.rectangle((edge, top + start, edge + 2, top + start + 5), fill="white")
    return canvas


def picture_format(path: Path, flag: str) -> str:
    """What the end of a picture's name says that it is: PNG, JPEG, ...; UserError for another end."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{flag} {path}: expected the name of a picture, that ends in {', '.join(FORMATS)}")
    return FORMATS[path.suffix.lower()]


def save_png(picture: Image.Image, path: Path) -> None:
    """Write the picture; an existing file is replaced only by a whole one."""
    temporary = path.with_name(path.name + ".tmp")
    picture.save(temporary, format="PNG", **QUALITY["PNG"])
    temporary.replace(path)
