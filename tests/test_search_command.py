"""python -m idml search, as it is run: what is found, indexes kept and made anew, pictures, mistakes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import faiss.contrib.torch_utils  # noqa: F401  (as pytorch-metric-learning does, and replaces search by another)
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.neighbors import NearestNeighbors

import idml
import idml.index
import train_cls
from idml.commands.embed import embed
from idml.commands.search import search
from idml.contact_sheet import MOST_ROWS
from idml.embedding_file import EmbeddingTable, read_table
from idml.index import EmbeddingIndex, ivfpq_shape
from idml.retrieval_evaluation import Embedded, evidence_of
from idml.search import introspective_dissimilarities
from idml.similarity import introspective_similarity
from tests.calibrated_models import write_calibrating_searched
from tests.one_line import error_of
from tests.tiny_models import train_tiny, write_photos, write_searched

QUICK = ["--threads", "1", "--workers", "0", "--no-verbose"]
KINDS = ("retrieval live", "retrieval off", "retrieval released", "ISM alone")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``photos/<class>/*.png``, 60 of them; ``<kind>/`` models, ``<kind>.parquet`` their embeddings. The live one is
    trained on more images of the same classes, of which enough are held out to calibrate it."""
    folder = tmp_path_factory.mktemp("search")
    photos = write_searched(folder)
    given = dict.fromkeys(KINDS, photos) | {
        "retrieval live": write_calibrating_searched(folder / "more"),
        "ISM alone": write_photos(folder / "labelled"),
    }
    for kind in KINDS:
        train_tiny(kind, given[kind], folder / kind)
        arguments = ["--checkpoint", folder / kind, "--data-dir", photos, "--out", folder / f"{kind}.parquet"]
        embed([*map(str, arguments), *QUICK])
    return folder


def run(*arguments: object) -> None:
    search([*map(str, arguments), *QUICK])


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    return error_of(capsys, lambda: run(*arguments))


def results(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def other_photo(base: Path, name: str = "query.png") -> Path:
    """An image that is not in the index."""
    path = base / name
    Image.open(base / "photos/class 7/003.png").rotate(10).save(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_by_another_library(base: Path, tmp_path: Path, kind: str) -> None:
    query, out = other_photo(base), tmp_path / "new" / "results.csv"
    run("--index", base / f"{kind}.parquet", "--query", query, "-k", 7, "--out", out)
    table, model = read_table(base / f"{kind}.parquet"), idml.load(base / kind)
    own = model.embed(Image.open(query))
    oracle = NearestNeighbors(n_neighbors=7, metric="cosine").fit(table.numbers["embedding"])
    distances, indices = oracle.kneighbors(own.semantic)
    lines = results(out)
    assert [line["path"] for line in lines] == [table.paths[index] for index in indices[0]]
    assert [line["label"] for line in lines] == [table.labels[index] for index in indices[0]]
    np.testing.assert_allclose([float(line["similarity"]) for line in lines], 1 - distances[0], atol=1e-5)
    assert [line["rank"] for line in lines] == [str(rank) for rank in range(1, 8)]
    assert {line["query"] for line in lines} == {str(query)} and {line["query_label"] for line in lines} == {""}
    if kind == "retrieval off":
        assert lines[0]["query_uncertainty"] == lines[0]["uncertainty"] == ""
    else:
        assert float(lines[0]["query_uncertainty"]) == pytest.approx(float(own.uncertainty[0]), rel=1e-4)
    assert all(line["log_introspective_dissimilarity"] == "" for line in lines)


def test_queries_of_the_index_do_not_find_themselves(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, index = tmp_path / "r.csv", base / "retrieval live.parquet"
    run("-i", index, "-q", base / "photos", other_photo(base), "-k", 3, "-o", out)
    said = capsys.readouterr().out
    assert "60 of 61 queries are in the index, and left out of the own results" in said
    assert "of 60 queries with labels" in said and "(41 more queries)" in said
    lines = results(out)
    assert len(lines) == 61 * 3
    own = {line["query"]: line for line in lines if line["query"].endswith(line["path"])}
    assert not own
    assert all(line["query_label"] == Path(line["query"]).parent.name for line in lines[:180])
    # By any way that leads to it: a link to its folder, a relative path.
    (tmp_path / "link").symlink_to(base / "photos")
    monkeypatch.chdir(base / "photos" / "class 2")
    for query in (tmp_path / "link" / "class 2" / "001.png", "../class 2/001.png"):
        run("-i", index, "-q", query, "-k", 59)
        said = capsys.readouterr().out
        assert f"{query} is in the index, and left out" in said
        assert "class 2/002.png" in said and "  class 2/001.png" not in said
    moved = shutil.copytree(base / "photos", tmp_path / "moved")
    run("-i", index, "-q", moved / "class 2/001.png", "-k", 60, "--data-dir", base / "photos")
    assert "  class 2/001.png" in capsys.readouterr().out  # a copy is another file
    run("-i", index, "-q", moved / "class 2/001.png", "-k", 59, "--data-dir", moved)
    assert "is in the index" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["retrieval live", "retrieval released", "ISM alone"])
def test_the_introspective_order(base: Path, tmp_path: Path, kind: str) -> None:
    """By the formula as it is written in the paper, in float64 NumPy; all 59 others, so nothing is cut off before."""
    index, query, out = base / f"{kind}.parquet", base / "photos/class 4/002.png", tmp_path / "r.csv"
    run("--index", index, "--query", query, "-k", 59, "--introspective", "--out", out)
    table = read_table(index)
    s, u = (table.numbers[name].astype(np.float64) for name in ("embedding", "uncertainty_embedding"))
    own = table.paths.index("class 4/002.png")
    unit = s / np.linalg.norm(s, axis=1, keepdims=True)
    raw = s if kind == "ISM alone" else unit
    alpha = np.maximum(np.square(raw - raw[own]).sum(1), 1e-4)
    beta = np.square(u + u[own]).sum(1) + (4 if kind == "retrieval released" else 0)
    expected = np.log(np.maximum(1 - unit @ unit[own], 1e-12)) - beta / (5 * alpha)
    order = [index for index in np.argsort(expected) if index != own]
    lines = results(out)
    found = np.array([float(line["log_introspective_dissimilarity"]) for line in lines])
    np.testing.assert_allclose(found, expected[order], rtol=1e-3, atol=1e-3)
    assert [line["path"] for line in lines[:5]] == [table.paths[index] for index in order[:5]]
    assert [line["path"] for line in lines] != [table.paths[index] for index in np.argsort(-unit @ unit[own])[1:]]


def test_the_introspective_order_is_that_of_the_similarity(base: Path) -> None:
    table = read_table(base / "ISM alone.parquet")
    model = idml.load(base / "ISM alone")
    embedded = model.embed([Image.open(base / "photos" / path) for path in table.paths[:4]])
    chosen = np.tile(np.arange(30, 60), (4, 1))
    found = introspective_dissimilarities(embedded, table, chosen, temperature=5.0, offset=0.0)
    s, u = (torch.from_numpy(table.numbers[name].copy()) for name in ("embedding", "uncertainty_embedding"))
    cosine = torch.nn.functional.cosine_similarity(s[:4, None], s[None, 30:], dim=2)
    alpha = (s[:4, None] - s[None, 30:]).square().sum(2)
    beta = (u[:4, None] + u[None, 30:]).square().sum(2)
    np.testing.assert_allclose(1 - np.exp(found), introspective_similarity(cosine, alpha, beta), atol=1e-4)


def test_the_probability_of_another_class_is_that_of_evaluation(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.csv"
    arguments = ["--index", base / "retrieval live.parquet", "--query", base / "photos", "--out", out]
    run(*arguments, "-k", 1)
    assert "P(nearest is of another class) was calibrated on 120 held-out images" in capsys.readouterr().out
    table, model = read_table(base / "retrieval live.parquet"), idml.load(base / "retrieval live")
    numbers = {name: torch.from_numpy(values.copy()) for name, values in table.numbers.items()}
    embedded = Embedded(
        semantic=numbers["embedding"],
        uncertainty=numbers["uncertainty"],
        norm=numbers["uncertainty"],
        labels=torch.zeros(60),
        foreseen_loss=numbers["foreseen_loss"],
        belief=numbers["belief"],
    )
    similarity = numbers["embedding"] @ numbers["embedding"].T
    similarities, neighbours = similarity.fill_diagonal_(-2).topk(2)
    assert model.introspection is not None and model.introspection.search_calibration is not None
    assert int(model.introspection.search_calibration.fitted_on) == model.calibrated_on == 120
    expected = model.introspection.search_calibration(evidence_of(embedded, embedded, neighbours, similarities))
    found = [float(line["p_other_class"]) for line in results(out)]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert max(found) - min(found) > 1e-4
    run(*arguments, "-k", 5, "--introspective", "--overwrite")  # of the nearest by the cosine here too
    np.testing.assert_allclose([float(line["p_other_class"]) for line in results(out)][::5], found, atol=1e-6)


def test_novelty_among_the_images_that_are_searched(base: Path, tmp_path: Path) -> None:
    """The share of the images whose nearest other one is nearer than the query's, by brute force; itself left out."""
    out, inverted = tmp_path / "r.csv", tmp_path / "inverted.png"
    ImageOps.invert(Image.open(base / "photos/class 1/000.png").convert("L")).save(inverted)
    copy = shutil.copy(base / "photos/class 2/001.png", tmp_path / "copy.png")
    run("--index", base / "retrieval live.parquet", "--query", base / "photos", copy, inverted, "-k", 1, "--out", out)
    table = read_table(base / "retrieval live.parquet")
    points = table.numbers["coordinates"].astype(np.float64)
    apart = np.linalg.norm(points[:, None] - points, axis=2)
    np.fill_diagonal(apart, np.inf)
    nearest = apart.min(1)
    expected = (nearest[None] < nearest[:, None]).mean(1)
    lines = results(out)
    rows = [table.paths.index(str(Path(line["query"]).relative_to(base / "photos"))) for line in lines[:60]]
    np.testing.assert_allclose([float(line["novelty"]) for line in lines[:60]], expected[rows], atol=1 / 60 + 1e-6)
    assert float(lines[60]["novelty"]) < 0.02, "a copy of an image that is searched is nothing new"
    assert float(lines[61]["novelty"]) > 0.9, "black on white is not searched"
    run("--index", base / "retrieval off.parquet", "--query", inverted, "--out", tmp_path / "off.csv")
    assert results(tmp_path / "off.csv")[0]["novelty"] == "", "without an introspection it is not known"


@pytest.fixture(scope="module")
def pixels(fashion: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(5000, 784) images and (50, 784) queries: real vectors, of all lengths."""
    return (
        fashion["train_images"].reshape(5000, -1).astype(np.float32),
        fashion["test_images"][:50].reshape(50, -1).astype(np.float32),
    )


@pytest.mark.parametrize(("kind", "least"), [("flat", 1.0), ("hnsw", 0.98), ("ivfpq", 0.9)])
def test_an_index_finds_what_is_near(pixels: tuple[np.ndarray, np.ndarray], kind: str, least: float) -> None:
    images, queries = pixels
    index = EmbeddingIndex(images, kind, "f" * 16)  # type: ignore[arg-type]
    index.build()
    exact = EmbeddingIndex(images, "exact", "f" * 16).search(queries, 10)
    found = index.search(queries, 10)
    pairs = list(zip(exact.indices, found.indices, strict=True))
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in pairs]) >= least
    assert all(len(set(row)) == 10 for row in found.indices)
    if kind == "flat":
        assert (found.indices == exact.indices).mean() > 0.99  # but for equals, by rounding
        np.testing.assert_allclose(found.similarities, exact.similarities, atol=1e-5)
    # What is left out is not found, and the next is found in its place.
    left_out = exact.indices[:, 0]
    again = index.search(queries, 9, left_out=left_out)
    assert not (again.indices == left_out[:, None]).any()
    if kind == "flat":
        assert (again.indices == exact.indices[:, 1:]).mean() > 0.99
    more = {"hnsw": {"ef_search": 1000}, "ivfpq": {"nprobe": 10_000}}.get(kind, {})
    wider = index.search(queries, 10, **more)
    assert sum(len(set(a) & set(b)) for a, b in zip(exact.indices, wider.indices, strict=True)) >= sum(
        len(set(a) & set(b)) for a, b in pairs
    )


def test_shapes_of_ivfpq() -> None:
    assert ivfpq_shape(20_000, 512) == (512, 64, 8)
    assert ivfpq_shape(1_000_000, 128) == (4000, 32, 8)
    assert ivfpq_shape(624, 16) == (16, 4, 4)
    assert ivfpq_shape(5000, 7) == (128, 1, 7)


def test_an_index_is_kept_and_made_anew_when_it_is_of_something_else(
    pixels: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, queries = pixels[0][:1000], pixels[1]
    beside = tmp_path / "E.parquet"
    path = tmp_path / "E.parquet.hnsw.faiss"

    def opened(vectors: np.ndarray = images, fingerprint: str = "a" * 16) -> str:
        index = EmbeddingIndex(vectors, "hnsw", fingerprint)
        said = index.open(beside)
        exact = EmbeddingIndex(vectors, "exact", fingerprint).search(queries, 1)
        assert (index.search(queries, 1).indices == exact.indices).mean() > 0.9
        return said.removeprefix(f"index {path} ").split(":")[0]

    assert opened() == "is new"
    before = path.read_bytes()
    assert opened() == "read" and path.read_bytes() == before
    assert opened(fingerprint="b" * 16) == "is of another model"
    assert opened(images[:999], "b" * 16) == "is of another number of images"
    assert opened(images[:999] * 2, "b" * 16) == "is of other embeddings, or has other settings"
    assert opened(images[:999] * 2, "b" * 16) == "read"
    monkeypatch.setattr(idml.index, "HNSW_LINKS", 16)
    assert opened(images[:999] * 2, "b" * 16) == "is of other embeddings, or has other settings"
    monkeypatch.undo()
    opened()
    path.write_bytes(path.read_bytes()[:-50])
    assert opened() == "is damaged"
    path.with_suffix(".json").unlink()
    assert opened() == "does not say what it is of"
    assert opened() == "read"
    assert sorted(found.name for found in tmp_path.iterdir()) == [path.with_suffix(".json").name, path.name][::-1]


def test_the_command_with_an_index(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = shutil.copy(base / "retrieval live.parquet", tmp_path / "E.parquet")
    tables = []
    for kind in ("exact", "flat", "hnsw", "hnsw"):
        run("--index", index, "--query", base / "photos/class 1/000.png", "-k", 5, "--index-type", kind)
        said = capsys.readouterr().out.splitlines()
        tables.append([line for line in said if "class" in line and line.startswith("  ")])
        if kind != "exact":
            assert [line for line in said if line.startswith("index ")]
    assert len(tables[0]) == 5 and all(table == tables[0] for table in tables)
    assert said[1].endswith("E.parquet.hnsw.faiss read")
    with pytest.warns(UserWarning, match="--nprobe has no effect without --index-type ivfpq"):
        run("--index", index, "--query", base / "photos/class 1/000.png", "--nprobe", 3)
    error = fails(capsys, "--index", index, "--query", base / "photos", "--index-type", "ivfpq")
    assert "ivfpq needs at least 624 images" in error and "there are 60" in error


def test_an_index_that_cannot_be_kept_is_warned_of(base: Path, tmp_path: Path) -> None:
    index = shutil.copy(base / "retrieval live.parquet", tmp_path / "E.parquet")
    (tmp_path / "E.parquet.flat.faiss").mkdir()
    with pytest.warns(UserWarning, match="the index is not kept: could not write"):
        run("--index", index, "--query", other_photo(base), "--index-type", "flat")


@pytest.mark.parametrize(
    ("name", "kind"), [("s.jpg", "JPEG"), ("s.JPEG", "JPEG"), ("s.webp", "WEBP"), ("s.tiff", "TIFF"), ("s.png", "PNG")]
)
def test_a_contact_sheet_is_what_its_name_says(base: Path, tmp_path: Path, name: str, kind: str) -> None:
    run("-i", base / "retrieval off.parquet", "-q", other_photo(base), "-k", 5, "--sheet", tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with Image.open(tmp_path / name) as sheet:
        assert sheet.format == kind
        assert np.array(sheet.convert("RGB")).std() > 20


def test_the_contact_sheet(base: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    index = base / "retrieval live.parquet"
    run("--index", index, "--query", base / "photos", "-k", 5, "--sheet", sheet, "--out", tmp_path / "r.csv")
    picture = np.array(Image.open(sheet).convert("RGB")).astype(int)
    columns, rows = 6, MOST_ROWS
    width, height = picture.shape[1] // columns, (picture.shape[0] - 6) // rows
    lines = results(tmp_path / "r.csv")
    for row in (0, 7, 49):
        for column in range(1, columns):
            frame = picture[row * height + 6 + 40, column * width + 6 - 3 : column * width + 6]  # on its left side
            line = lines[row * 5 + column - 1]
            green = (np.abs(frame - [0x1A, 0x8F, 0x3C]).sum(1) == 0).all()
            assert green == (line["label"] == line["query_label"]), (row, column)
    # Without labels no frames; with no file any more, grey.
    moved = tmp_path / "moved"
    moved.mkdir()
    with pytest.warns(UserWarning, match="shown as a grey square; where the images have moved"):
        run("-i", index, "-q", other_photo(base), "-k", 5, "--sheet", sheet, "--overwrite", "--data-dir", moved)
    picture = np.array(Image.open(sheet).convert("RGB"))
    assert (picture[6:102, width + 6 : width + 102] == 128).all()
    assert (picture[46, width + 3 : width + 6] == 255).all()


def test_images_that_have_no_files(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Embeddings of the data set that the model was trained on, held in memory."""
    options = ["--dataset", "digits", "--model", "resnet8_cifar", "--method", "ism", "--max-steps", "1", *QUICK]
    train_cls.main([*options, "--output-dir", str(tmp_path / "run")])
    embed(["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "E.parquet"), *QUICK])
    capsys.readouterr()
    run("-i", tmp_path / "E.parquet", "-q", other_photo(base), "-k", 3, "--sheet", tmp_path / "sheet.png")
    assert "train/" in capsys.readouterr().out
    picture = np.array(Image.open(tmp_path / "sheet.png").convert("RGB"))
    tile = picture[6:102, 108 + 6 : 108 + 102]
    assert tile.min() < 60 < 200 < tile.max()  # a digit, and no grey square


def test_queries_that_are_none(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = ["--index", base / "retrieval live.parquet"]
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "empty").mkdir()
    assert "--query is missing" in fails(capsys, *index)
    assert "no query" in fails(capsys, *index, "--query", tmp_path / "nowhere.png")
    error = fails(capsys, *index, "--query", tmp_path / "notes.txt")
    assert "notes.txt is no image that can be decoded" in error
    assert "no images in" in fails(capsys, *index, "--query", tmp_path / "empty")
    mixed = shutil.copytree(base / "photos" / "class 3", tmp_path / "mixed")
    (mixed / "notes.txt").write_text("no picture")
    (mixed / "broken.png").write_text("no picture")
    with pytest.warns(UserWarning, match="left out 1 file that is no image"):
        assert "broken.png" in fails(capsys, *index, "--query", mixed)
    with pytest.warns(UserWarning, match="left out: 1 of 7 image files cannot be decoded"):
        run(*index, "--query", mixed, "--skip-bad-images")
    assert "for 6 queries" in capsys.readouterr().out


def test_how_many(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--index", base / "retrieval live.parquet", "--query", other_photo(base)]
    assert "--k: expected a value at least 1, got 0" in fails(capsys, *arguments, "-k", 0)
    assert "expected a value at least 1, got -5" in fails(capsys, *arguments, "-k", -5)
    assert "-k: expected at most 60, the number of images in" in fails(capsys, *arguments, "-k", 61)
    own = ["--index", base / "retrieval live.parquet", "--query", base / "photos/class 1/000.png"]
    assert "-k: expected at most 59, since" in fails(capsys, *own, "-k", 60)
    run(*arguments, "-k", 60)


def test_files_that_are_no_index(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = ["--query", other_photo(base)]
    whole = (base / "retrieval live.parquet").read_bytes()
    path = tmp_path / "E.parquet"
    assert "--index is missing" in fails(capsys, *query)
    assert "no file" in fails(capsys, *query, "--index", path)
    path.write_text("no Parquet")
    assert "is neither a Parquet nor an npz file" in fails(capsys, *query, "--index", path)
    path.write_bytes(whole[:-100])
    assert "is damaged, or no Parquet file" in fails(capsys, *query, "--index", path)
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 0xFF
    path.write_bytes(flipped)
    assert "is damaged" in fails(capsys, *query, "--index", path)
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a.png"], "vector": [[1.0, 2.0]]}), path)
    assert "was not written by `python -m idml embed`: it has no column split" in fails(capsys, *query, "--index", path)
    stripped = pyarrow.parquet.read_table(base / "retrieval live.parquet").replace_schema_metadata({})
    pyarrow.parquet.write_table(stripped, path)
    assert "nothing in it says which model" in fails(capsys, *query, "--index", path)
    np.savez(tmp_path / "E.npz", embedding=np.zeros((3, 2)))
    assert "was not written by" in fails(capsys, *query, "--index", tmp_path / "E.npz")


def rewritten(table: EmbeddingTable, source: Path, path: Path, **about: object) -> Path:
    """The same file with another description."""
    stored = pyarrow.parquet.read_table(source)
    described = json.dumps(table.about | about)
    pyarrow.parquet.write_table(stored.replace_schema_metadata({"idml": described}), path)
    return path


def test_another_model_is_an_error(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index, query = base / "retrieval live.parquet", ["--query", other_photo(base)]
    error = fails(capsys, *query, "--index", index, "--checkpoint", base / "retrieval off")
    assert "embeddings of two models cannot be compared" in error
    error = fails(capsys, *query, "--index", index, "--checkpoint", base / "ISM alone")
    assert "has embeddings of 16 dimensions" in error and "makes ones of 64" in error
    table = read_table(index)
    gone = rewritten(table, index, tmp_path / "E.parquet", checkpoint=str(tmp_path / "gone.pt"))
    assert "is not at" in fails(capsys, *query, "--index", gone)
    run(*query, "--index", gone, "--checkpoint", base / "retrieval live")
    wide = rewritten(table, index, tmp_path / "E.parquet", dimensions=table.about["dimensions"] | {"semantic": 32})
    assert "is damaged: its column embedding is not 60 vectors of 32 numbers" in fails(capsys, *query, "--index", wide)
    bare = tmp_path / "bare.pt"
    torch.save(torch.load(base / "retrieval live/checkpoints/last.pt", weights_only=True)["model"], bare)
    assert "bare.pt" in fails(capsys, *query, "--index", index, "--checkpoint", bare)
    assert "no model at" in fails(capsys, *query, "--index", index, "--checkpoint", tmp_path / "nowhere")


def test_options_that_cannot_be(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    query = ["--query", other_photo(base)]
    off = [*query, "--index", base / "retrieval off.parquet"]
    assert "trained with ISM off" in fails(capsys, *off, "--introspective")
    (tmp_path / "r.csv").write_text("precious")
    assert "r.csv exists; give another --out, or --overwrite" in fails(capsys, *off, "--out", tmp_path / "r.csv")
    assert "is a folder" in fails(capsys, *off, "--sheet", tmp_path)
    for name in ("sheet", "sheet.txt", "sheet.png.bak"):
        assert "that ends in .png, .jpg" in fails(capsys, *off, "--sheet", tmp_path / name)
    assert "no folder" in fails(capsys, *off, "--data-dir", tmp_path / "nowhere")
    assert "--index-type: expected one of exact, flat, hnsw, ivfpq" in fails(capsys, *off, "--index-type", "annoy")
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert "pip install 'idml[search]', or take --index-type exact" in fails(capsys, *off, "--index-type", "flat")
    run(*off)
    assert os.listdir(tmp_path) == ["r.csv"] and (tmp_path / "r.csv").read_text() == "precious"
