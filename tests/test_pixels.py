"""From files to pixels: orientation in every format and wherever files are read, greys of any depth, errors."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

import train_cls
from idml.audit.pictures import Pictures
from idml.commands.embed import embed
from idml.contact_sheet import _tile
from idml.data.beton import BetonSettings, Mode, beton_matches, fingerprint, import_ffcv, sidecar_path
from idml.data.collection import read_collection
from idml.data.ffcv_write import write_beton
from idml.data.image_dataset import ImageDataset
from idml.data.image_files import decoding_error
from idml.data.loaders import build_loader
from idml.data.pixels import TURNS, as_rgb, read_rgb, scaled_grey
from idml.data.torch_loader import TorchLoader
from idml.embedding_file import read_table
from idml.errors import UserError
from idml.trained import load

ORIENTATION = 274
BACK = {1: (), 2: ("FLIP_LEFT_RIGHT",), 3: ("ROTATE_180",), 4: ("FLIP_TOP_BOTTOM",), 5: ("TRANSPOSE",)}
BACK |= {6: ("ROTATE_90",), 7: ("TRANSVERSE",), 8: ("ROTATE_270",)}
"""How an upright image is stored under each orientation, so that a viewer turns it back."""

FORMATS: dict[str, dict[str, Any]] = {
    "jpg": {"quality": 100, "subsampling": 0},
    "png": {},
    "webp": {"lossless": True},
    "tif": {},
    "tiff": {"compression": "tiff_lzw"},
    "avif": {"quality": 100, "subsampling": "4:4:4"},
    "mpo": {"quality": 100, "subsampling": 0},
}
CLOSE = {"jpg": 3, "mpo": 3, "avif": 6}
"""Levels by which a lossy format changes a pixel on average at the most."""


def photo(width: int = 48, height: int = 36) -> Image.Image:
    return Image.fromarray(load_sample_image("flower.jpg")).resize((width, height))


def save_turned(image: Image.Image, path: Path, turned: int, **options: Any) -> Path:
    """The image stored under an orientation, as a phone does it."""
    stored = image
    for name in BACK[turned]:
        stored = stored.transpose(Image.Transpose[name])
    if path.suffix in (".tif", ".tiff"):
        stored.save(path, tiffinfo={ORIENTATION: turned}, **options)
    else:
        exif = Image.Exif()
        exif[ORIENTATION] = turned
        if path.suffix == ".mpo":
            options |= {"save_all": True, "append_images": [stored]}
        stored.save(path, exif=exif, **options)
    return path


def apart(first: Any, second: Any) -> float:
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    return float("inf") if first.shape != second.shape else float(np.abs(first - second).mean())


# ---- orientation ----


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("turned", BACK)
def test_every_orientation_in_every_format(tmp_path: Path, suffix: str, turned: int) -> None:
    path = save_turned(photo(), tmp_path / f"x.{suffix}", turned, **FORMATS[suffix])
    image = read_rgb(path)
    assert image.size == (48, 36)
    assert apart(image, photo()) <= CLOSE.get(suffix, 0)
    assert apart(as_rgb(image), image) == 0, "it is turned once"
    with Image.open(path) as opened:
        assert apart(as_rgb(opened), image) == 0
    assert decoding_error(path) is None


def test_turns_are_pillows() -> None:
    for turned in TURNS:
        image = photo()
        image.getexif()[ORIENTATION] = turned
        assert apart(as_rgb(image), ImageOps.exif_transpose(image)) == 0


def test_orientation_in_xmp(tmp_path: Path) -> None:
    stored = photo().transpose(Image.Transpose.ROTATE_90)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    stored.save(tmp_path / "x.webp", lossless=True, xmp=xmp)
    image = read_rgb(tmp_path / "x.webp")
    assert apart(image, photo()) == 0 and apart(as_rgb(image), image) == 0


@pytest.mark.parametrize("value", [0, 9, 77])
def test_orientations_that_there_are_not(tmp_path: Path, value: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    photo().save(tmp_path / "x.png", exif=exif)
    assert apart(read_rgb(tmp_path / "x.png"), photo()) == 0


def test_damaged_tags_cost_no_image(tmp_path: Path) -> None:
    """Every byte of the tags once: the image is read, turned or not."""
    path = save_turned(photo(), tmp_path / "x.jpg", 6, quality=100, subsampling=0)
    whole = bytearray(path.read_bytes())
    start = whole.index(b"Exif\0\0") + 6
    length = int.from_bytes(whole[start - 8 : start - 6], "big") - 8
    ways = (photo(), photo().transpose(Image.Transpose.ROTATE_90))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place in range(start, start + length):
            damaged = bytearray(whole)
            damaged[place] ^= 0xFF
            path.write_bytes(damaged)
            turns = (*TURNS.values(),)
            seen = read_rgb(path)
            assert min(apart(seen, way) for way in (*ways, *(ways[1].transpose(turn) for turn in turns))) < 4
            assert decoding_error(path) is None


@pytest.fixture
def phone(tmp_path: Path) -> ImageDataset:
    """Ten JPEG files, one for each orientation and two that say nothing; all show the same."""
    folder = tmp_path / "phone" / "flower"
    folder.mkdir(parents=True)
    paths = [save_turned(photo(), folder / f"{turned}.jpg", turned, quality=100, subsampling=0) for turned in BACK]
    for name in ("plain", "again"):
        paths.append(folder / f"{name}.jpg")
        photo().save(paths[-1], quality=100, subsampling=0)
    labels = np.zeros(10, np.int64)
    return ImageDataset(labels=labels, classes=("flower",), paths=tuple(paths))


def write_settings() -> list[BetonSettings]:
    modes: tuple[Mode, ...] = ("raw", "jpg", "proportion", "unchanged")
    settings = [BetonSettings(mode=mode) for mode in modes]
    return [*settings, BetonSettings(mode="jpg", quality=90), BetonSettings(mode="jpg", max_side=40)]


@pytest.mark.parametrize("settings", write_settings(), ids=str)
def test_ffcv_stores_upright_images_in_every_mode(tmp_path: Path, phone: ImageDataset, settings: BetonSettings) -> None:
    try:
        import_ffcv()
    except UserError as error:
        pytest.skip(str(error))
    path = tmp_path / "x.beton"
    write_beton(phone, path, settings, source="a test", split="train", workers=2, progress=False)
    common: dict[str, Any] = {"batch_size": 10, "image_size": 32, "seed": 1, "source": "a test", "split": "train"}
    for train in (False, True):
        theirs = build_loader(phone, loader="ffcv", beton=path, train=train, **common)
        ours = build_loader(phone, loader="torch", train=train, **common)
        images, expected = (next(each.epoch(0))[0].float() for each in (theirs, ours))
        tolerance = 12 if settings.max_side else 8
        assert (images - expected).abs().mean((1, 2, 3)).max() < (
            0.01 if settings.mode in ("raw", "unchanged") else tolerance
        )
    evaluated = next(build_loader(phone, loader="ffcv", beton=path, train=False, **common).epoch(0))[0].float()
    assert (evaluated - evaluated[8]).abs().mean((1, 2, 3)).max() < 8, "all ten show the same"


def test_a_beton_that_kept_the_turn_does_not_match(tmp_path: Path, phone: ImageDataset) -> None:
    try:
        import_ffcv()
    except UserError as error:
        pytest.skip(str(error))
    path = tmp_path / "phone" / "flower-train.beton"
    write_beton(phone, path, BetonSettings(), source="a test", split="train", workers=1, progress=False)
    assert beton_matches(path, phone) is None
    sidecar = json.loads(sidecar_path(path).read_text(encoding="utf-8"))
    sidecar_path(path).write_text(json.dumps(sidecar | {"format": 1}), encoding="utf-8")
    assert sidecar["fingerprint"] == fingerprint(phone), "its images are the same"
    assert "of another version of this project" in (beton_matches(path, phone) or "")
    loader = build_loader(phone, loader="ffcv", source="a", split="train", batch_size=2, image_size=32, train=False)
    assert loader.path == path and json.loads(sidecar_path(path).read_text())["format"] == 2, "it is written again"  # type: ignore[attr-defined]


def test_upright_in_the_torch_loader_and_in_pictures(phone: ImageDataset) -> None:
    loader = TorchLoader(phone, batch_size=10, image_size=32, train=False)
    (images, _), at = next(loader.epoch(0)), loader.images_at(range(10))
    assert torch.equal(images, at)
    assert (images.float() - images[8].float()).abs().mean((1, 2, 3)).max() < 4
    assert phone.paths is not None
    for tiles in ([_tile(path).float() for path in phone.paths],):
        assert max((tile - tiles[8]).abs().mean().item() for tile in tiles) < 4
    collection = read_collection(phone.paths[0].parent.parent)
    pictures = Pictures(collection)
    assert {(pictures.of(index).width, pictures.of(index).height) for index in range(10)} == {(48, 36)}


# ---- the example: two classes that differ by the direction of stripes ----


def write_stripes(root: Path, *, turned: bool) -> Path:
    """``root/{train,val}/{across,down}``; half of the files stored turned, as phones do, where asked for."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 20)):
        for name in ("across", "down"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                wave = 128 + 100 * np.sin(np.arange(36) * rng.uniform(0.8, 1.4) + rng.uniform(0, 6))
                pixels = np.tile(wave[:, None], (1, 36)) + rng.normal(0, 10, (36, 36))
                pixels = np.clip(pixels if name == "across" else pixels.T, 0, 255).astype(np.uint8)
                image = Image.fromarray(pixels).convert("RGB")
                path = root / split / name / f"{number}.jpg"
                save_turned(image, path, 6 if turned and number % 2 else 1, quality=95)
    return root


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the pictures and a model of them in ``run``."""
    root = tmp_path_factory.mktemp("stripes")
    write_stripes(root / "photos", turned=True)
    write_stripes(root / "upright", turned=False)
    options = ["--dataset", "folder", "--data-dir", str(root / "photos"), "--method", "baseline", "--no-flip"]
    options += ["--model", "resnet8_cifar", "--epochs", "6", "--batch-size", "8", "--lr", "0.02", "--no-verbose"]
    options += ["--loader", "torch", "--workers", "0", "--threads", "1", "--image-size", "32"]
    train_cls.main([*options, "--output-dir", str(root / "run")])
    return root


def test_turned_stripes_are_told_apart(stripes: Path) -> None:
    results = json.loads((stripes / "run/results.json").read_text(encoding="utf-8"))
    assert results["final"]["top1"] == 1.0
    model = load(stripes / "run", device="cpu")
    paths = [stripes / "photos/val" / name / f"{number}.jpg" for name in ("across", "down") for number in range(6)]
    assert model.predict([Image.open(path) for path in paths]).classes == ("across",) * 6 + ("down",) * 6


def test_embeddings_of_turned_files_are_those_of_upright_ones(stripes: Path) -> None:
    tables = []
    for name in ("photos", "upright"):
        out = stripes / f"{name}.npz"
        embed(["--checkpoint", str(stripes / "run"), "--data-dir", str(stripes / name), "--out", str(out), "-j", "0"])
        tables.append(read_table(out).numbers["embedding"])
    scale = np.abs(tables[1]).mean()
    assert np.abs(tables[0] - tables[1]).mean() < 0.1 * scale, "but for the JPEGs' own noise"


# ---- greys of more than 8 bits ----

RAMP = np.linspace(0, 1, 24 * 16).reshape(16, 24)
EIGHT = np.round(255 * RAMP)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP.astype(np.float32), EIGHT),
        (RAMP * 0.5, EIGHT / 2),
        (RAMP * 255, EIGHT),
        (RAMP * 100, RAMP * 100),
        (RAMP * 65535, EIGHT),
        (RAMP * 3 - 1.5, EIGHT),
        (RAMP * 1.03, EIGHT),
        (RAMP * 1e9, EIGHT),
        (RAMP * 1e-9 - 1, EIGHT),
        ((RAMP * 255).astype(np.int32), EIGHT),
        ((RAMP * 65535).astype(np.int32), EIGHT),
        ((RAMP * 4095).astype(np.int32), EIGHT),
        ((RAMP * (2**31 - 1)).astype(np.int32), EIGHT),
        ((RAMP * 1000 - 500).astype(np.int32), EIGHT),
        ((RAMP > 0.5).astype(np.int32), 255 * (RAMP > 0.5)),
        (np.zeros((4, 4)), np.zeros((4, 4))),
        (np.zeros((4, 4), np.int32), np.zeros((4, 4))),
        (np.full((4, 4), 1e6), np.full((4, 4), 128)),
    ],
)
def test_greys_are_scaled_by_their_range(values: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(scaled_grey(values) - expected).max() <= 1


def test_numbers_that_are_not_finite() -> None:
    values = RAMP.copy()
    values[0, :3] = np.nan, np.inf, -np.inf
    found = scaled_grey(values)
    assert found[0, :3].tolist() == [2, 255, 2] and np.abs(found[1:] - EIGHT[1:]).max() <= 1
    with pytest.raises(ValueError, match="none of its pixels is a finite number"):
        scaled_grey(np.full((3, 3), np.nan))


def write_wide(folder: Path) -> dict[str, Path]:
    """The ramp in all formats that hold such numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {
        "float.tiff": Image.fromarray(RAMP.astype(np.float32)),
        "float lzw.tif": Image.fromarray(RAMP.astype(np.float32)),
        "float.pfm": Image.fromarray(RAMP.astype(np.float32)),
        "integer.tiff": Image.fromarray((RAMP * 2e9).astype(np.int32)),
        "sixteen.png": Image.fromarray((RAMP * 65535).astype(np.uint16)),
        "sixteen.tiff": Image.fromarray((RAMP * 65535).astype(np.uint16)),
        "sixteen.pgm": Image.fromarray((RAMP * 65535).astype(np.int32)),
    }
    for name, image in images.items():
        image.save(folder / name, **({"compression": "tiff_lzw"} if "lzw" in name else {}))
    return {name: folder / name for name in images}


def test_files_of_wide_greys(tmp_path: Path) -> None:
    for name, path in write_wide(tmp_path).items():
        pixels = np.asarray(read_rgb(path), np.int64)
        expected = EIGHT[::-1] if name.endswith(".pfm") and pixels[0, 0, 0] > 200 else EIGHT
        assert np.abs(pixels - expected[..., None]).max() <= 1, name
        assert decoding_error(path) is None


def test_a_dark_image_of_16_bits_stays_dark(tmp_path: Path) -> None:
    dark = (RAMP * 2000).astype(np.uint16)
    for name in ("dark.png", "dark.tiff"):
        Image.fromarray(dark).save(tmp_path / name)
    Image.fromarray(dark.astype(np.int32)).save(tmp_path / "dark.pgm")
    for name in ("dark.png", "dark.tiff", "dark.pgm"):
        assert np.asarray(read_rgb(tmp_path / name)).max() == 2000 >> 8, name
    with pytest.warns(
        UserWarning, match=r"3 images of 16 bits use less than a sixteenth of that range and are almost black"
    ):
        read_collection(tmp_path)


def test_scaled_images_are_reported_once(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_wide(tmp_path / folder)
    with pytest.warns(
        UserWarning, match=r"8 images of floating numbers or 32-bit integers are scaled by the range"
    ) as caught:
        assert len(read_collection(tmp_path)) == 14
    assert len(caught) == 1


def test_images_of_nothing_are_refused(tmp_path: Path) -> None:
    write_wide(tmp_path / "a")
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "a" / "nan.tiff")
    with pytest.raises(UserError, match=r"1 of 8 .*nan\.tiff \(none of its pixels is a finite number\)"):
        read_collection(tmp_path)


def test_predictions_of_images_in_memory(stripes: Path) -> None:
    model = load(stripes / "run", device="cpu")
    wave = (128 + 100 * np.sin(np.arange(36) * 1.1)).round() / 255
    across = np.tile(wave[:, None], (1, 36)).astype(np.float32)
    images = [
        Image.fromarray(across),
        Image.fromarray(across.T.copy()),
        Image.fromarray((across * 2e9).astype(np.int32)),
    ]
    assert model.predict(images).classes == ("across", "down", "across")
    with pytest.raises(UserError, match="cannot be read: none of its pixels is a finite number"):
        model.predict(Image.fromarray(np.full((8, 8), np.nan, np.float32)))


# ---- what is refused ----


def test_pages_are_not_drawn(tmp_path: Path) -> None:
    """Pillow would start Ghostscript for a file that says it is one, whatever its suffix."""
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    (tmp_path / "x.jpg").write_bytes(text)
    with pytest.raises(ValueError, match="EPS files are not read"):
        read_rgb(tmp_path / "x.jpg")
    assert "EPS files are not read" in (decoding_error(tmp_path / "x.jpg") or "")


def test_whatever_a_format_raises_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a loader's process, too: it would end the run with a traceback."""
    photo().save(tmp_path / "x.png")
    dataset = ImageDataset(labels=np.zeros(1, np.int64), classes=("a",), paths=(tmp_path / "x.png",))
    for error in (
        KeyError("tag"),
        IndexError("index out of range"),
        Image.DecompressionBombError("too many"),
        MemoryError(),
    ):
        monkeypatch.setattr(Image, "open", lambda *_args, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(ValueError, match=r"tag|index out of range|too many|MemoryError"):
            read_rgb(tmp_path / "x.png")
        assert decoding_error(tmp_path / "x.png")
        with pytest.raises(Exception, match=r"x\.png could not be read during training"):
            next(TorchLoader(dataset, batch_size=1, image_size=32, train=False).epoch(0))
