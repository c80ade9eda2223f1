"""Draw emoji_mini.npz from the icon sets of six vendors, as Iconify packs them.

    npm install --prefix DIR @iconify-json/noto@1.2.9 @iconify-json/noto-v1@1.2.5 @iconify-json/fluent-emoji@1.2.7 \\
        @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/twemoji@1.2.5 @iconify-json/emojione@1.2.3
    pip install resvg-py==0.5.0
    python -m idml.data.embedded.emoji_mini --packages DIR

A class is a code point that all six sets draw. noto's chars.json says which icon a code point has; the chars.json of
twemoji and fluent-emoji-flat agree, and the three sets whose chars.json is empty use the same names. Left out are
sequences of several code points (skin tones, flags, keycaps, families), icons that Iconify hides, and near copies: a
class that some vendor draws much like a class taken before it (``NEAR_COPY``; most clock faces, say). Of what remains,
the first ``CLASSES`` in the order of the SHA-256 of the code point are taken, a draw that favours no category.

Stored are the arrays y and vendor (N,), vendors (6,), classes, names and categories (C,), and for each vendor
sheet_<name>: its images in order of class on one contact sheet, a lossless WebP file as bytes. Takes five minutes on
two slow cores, and gives the same bytes each time with Pillow 13.0.0.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from idml.data.emoji import EMOJI_SIZE
from idml.data.packs import split_classes
from idml.errors import UserError, run_main

VENDORS = {
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "fluent-emoji": "1.2.7",
    "fluent-emoji-flat": "1.2.6",
    "twemoji": "1.2.5",
    "emojione": "1.2.3",
}
"""Icon set -> version of its npm package @iconify-json/<set>."""

RESVG_PY = "0.5.0"
CLASSES = 560
"""As many as keep the file below 4 MB."""

NEAR_COPY = 4.0
"""Mean absolute difference of two drawings at 32 px, of 255, below which the later one is left out: identical drawings,
which are label noise, have 0, clock faces an hour apart 2 to 4, a locked and an unlocked padlock 1 to 40 by vendor."""

SHEET_COLUMNS = 28


def read_package(packages: Path, vendor: str) -> dict[str, dict[str, Any]]:
    """icons, chars and metadata of one package; the version must be the documented one."""
    folder = packages / "node_modules" / "@iconify-json" / vendor
    folder = folder if folder.is_dir() else packages / vendor
    try:
        version = json.loads((folder / "package.json").read_text())["version"]
        parts = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("icons", "chars", "metadata")}
    except FileNotFoundError as error:
        raise UserError(f"no {error.filename}; --packages must be the folder of the npm install above") from None
    if version != VENDORS[vendor]:
        raise UserError(f"{folder} is version {version}, expected {VENDORS[vendor]}; npm install that one")
    return parts


def common_icons(packages: dict[str, dict[str, dict[str, Any]]]) -> dict[str, str]:
    """Code point -> icon name, of single code points that all packages draw under one name, in order of SHA-256."""
    chars: dict[str, str] = packages["noto"]["chars"]

    def drawn_by_all(code: str, name: str) -> bool:
        icons = [package["icons"]["icons"].get(name) for package in packages.values()]
        agree = all(package["chars"].get(code, name) == name for package in packages.values())
        return agree and all(icon is not None and not icon.get("hidden") for icon in icons)

    codes = sorted(chars, key=lambda code: hashlib.sha256(code.encode()).hexdigest())
    return {code: chars[code] for code in codes if "-" not in code and drawn_by_all(code, chars[code])}


def render(icons: dict[str, Any], name: str, size: int = EMOJI_SIZE) -> np.ndarray:
    """(size, size, 3) uint8: an icon on white; one that is not square is centred."""
    try:
        resvg_py = importlib.import_module("resvg_py")
    except ImportError:
        raise UserError(f"drawing needs resvg-py; pip install resvg-py=={RESVG_PY}") from None
    if resvg_py.__version__ != RESVG_PY:
        raise UserError(f"resvg-py is {resvg_py.__version__}, expected {RESVG_PY}; pip install resvg-py=={RESVG_PY}")
    icon = icons["icons"][name]
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}  # those of the IconifyJSON format
    box = [icon.get(key, icons.get(key, default)) for key, default in defaults.items()]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    image = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))
    assert image.shape == (size, size, 3)
    return image


def choose(packages: dict[str, dict[str, dict[str, Any]]]) -> tuple[dict[str, str], np.ndarray]:
    """({code point: name} of the classes taken, by code point; their images, (V, C, 64, 64, 3) uint8)."""
    taken: dict[str, np.ndarray] = {}
    candidates = common_icons(packages)
    small = np.zeros((CLASSES, len(packages), EMOJI_SIZE * EMOJI_SIZE // 4 * 3), np.float32)
    for code, name in candidates.items():
        images = np.stack([render(package["icons"], name) for package in packages.values()])
        halved = images.reshape(len(images), EMOJI_SIZE // 2, 2, EMOJI_SIZE // 2, 2, 3).mean((2, 4))
        thumbnails = halved.reshape(len(images), -1).astype(np.float32)
        if taken and np.abs(small[: len(taken)] - thumbnails).mean(2).min() < NEAR_COPY:
            continue
        small[len(taken)] = thumbnails
        taken[code] = images
        if len(taken) == CLASSES:
            break
    order = sorted(taken, key=lambda code: int(code, 16))
    return {code: candidates[code] for code in order}, np.stack([taken[code] for code in order], 1)


def pack_sheet(images: np.ndarray) -> np.ndarray:
    """(bytes,) uint8: N images as one lossless WebP file, row by row; the rest of the last row is white."""
    rows = -(-len(images) // SHEET_COLUMNS)
    cells = np.full((rows * SHEET_COLUMNS, EMOJI_SIZE, EMOJI_SIZE, 3), 255, np.uint8)
    cells[: len(images)] = images
    sheet = cells.reshape(rows, SHEET_COLUMNS, EMOJI_SIZE, EMOJI_SIZE, 3).transpose(0, 2, 1, 3, 4)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(sheet).reshape(rows * EMOJI_SIZE, SHEET_COLUMNS * EMOJI_SIZE, 3)).save(
        buffer, "WEBP", lossless=True, quality=100, method=6
    )
    return np.frombuffer(buffer.getvalue(), np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of the npm install above")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("emoji_mini.npz"))
    arguments = parser.parse_args()
    packages = {vendor: read_package(arguments.packages, vendor) for vendor in VENDORS}
    classes, images = choose(packages)
    topics = {name: topic for topic, names in packages["noto"]["metadata"]["categories"].items() for name in names}
    arrays = {
        "y": np.tile(np.arange(len(classes), dtype=np.int16), len(VENDORS)),
        "vendor": np.repeat(np.arange(len(VENDORS), dtype=np.uint8), len(classes)),
        "vendors": np.array(list(VENDORS)),
        "classes": np.array(list(classes)),
        "names": np.array(list(classes.values())),
        "categories": np.array([topics[name] for name in classes.values()]),
    }
    for vendor, drawings in zip(VENDORS, images, strict=True):
        sheet = pack_sheet(drawings)
        arrays[f"sheet_{vendor}"] = sheet
        print(f"{vendor}: {len(drawings)} images, {len(sheet) / 1e6:.2f} MB", flush=True)
    np.savez_compressed(arguments.output, **arrays)  # type: ignore[arg-type]
    print(f"{arguments.output.name}: {len(classes)} classes, {arguments.output.stat().st_size / 1e6:.2f} MB")
    train = images[:, split_classes(len(classes))[0]].reshape(-1, 3) / 255
    print("training images: mean", train.mean(0).round(4).tolist(), "std", train.std(0).round(4).tolist())


if __name__ == "__main__":
    run_main(main)
