"""python -m idml audit, on digits with labels planted wrong and images planted twice, and on emoji."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import idml
import train_cls
import train_dml
from idml.audit.duplicates import near_duplicates
from idml.audit.figures import share_of
from idml.audit.gather import thumbnails_of
from idml.audit.label_errors import AGREEING, class_doubt, neighbour_doubt
from idml.audit.tables import FILES
from idml.commands.audit import audit
from idml.errors import UserError
from idml.metrics import nearest_neighbours

ROOT = Path(__file__).parents[1]
DIGITS = ["--dataset", "digits", "--model", "resnet8_cifar", "--batch-size", "32", "--schedule", "onecycle"]
EMOJI = ["--config", str(ROOT / "configs/quick/emoji_mini.yaml"), "--max-steps", "8", "--no-nmi"]
QUIET = ["--threads", "1", "--workers", "0", "--no-verbose"]
HOSTILE = "=<b onload=x>&'.png"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints: a classifier and a retrieval model with ISM and introspection, and plain ones without."""
    root = tmp_path_factory.mktemp("models")
    common = ["--no-verbose", "--val-fraction", "0.2", "--output-dir"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_cls.main([*DIGITS, "--epochs", "4", "--method", "ism", *common, str(root / "ism")])
        plain = [*DIGITS, "--epochs", "1", "--method", "baseline", "--no-introspect"]
        train_cls.main([*plain, *common, str(root / "plain")])
        train_dml.main([*EMOJI, "--ism", "live", *common, str(root / "retrieval")])
        train_dml.main([*EMOJI, "--ism", "off", "--no-introspect", *common, str(root / "plain retrieval")])
    return {name: root / name for name in ("ism", "plain", "retrieval", "plain retrieval")}


class Photos(NamedTuple):
    """A folder of digits, and what is wrong with it."""

    root: Path
    mislabelled: set[str]
    copies: set[frozenset[str]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """``{train,test}/<digit>/*.png``: 400 digits; 5 % are in another digit's folder, and 8 test images are training
    images saved again as JPEG or a little brighter."""
    from sklearn.datasets import load_digits

    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    bunch = load_digits()
    wrong = set(generator.permutation(400)[:20].tolist())
    mislabelled: set[str] = set()
    copies: set[frozenset[str]] = set()
    for number in range(400):
        pixels = Image.fromarray((bunch.images[number] * 15).astype(np.uint8)).resize(
            (64, 64), Image.Resampling.BICUBIC
        )
        label = int(bunch.target[number])
        given = (label + int(generator.integers(1, 10))) % 10 if number in wrong else label
        name = f"{'train' if number < 250 else 'test'}/{given}/{number:03d}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels.save(root / name)
        if number in wrong:
            mislabelled.add(name)
        elif number < 8:
            copy = f"test/{given}/copy{number}.{'jpg' if number % 2 else 'png'}"
            (root / copy).parent.mkdir(parents=True, exist_ok=True)
            if number % 2:
                pixels.save(root / copy, quality=80)
            else:
                pixels.point(lambda value: min(value + 5, 255)).save(root / copy)
            copies.add(frozenset((name, copy)))
    shutil.copy(root / "test/3" / next(p.name for p in (root / "test/3").iterdir()), root / "test/3" / HOSTILE)
    return Photos(root, mislabelled, copies)


class Audited(NamedTuple):
    out: Path
    images: list[dict[str, str]]
    metrics: dict[str, Any]
    page: str

    def table(self, name: str) -> list[dict[str, str]]:
        return read_table(self.out / name)


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run(model: Path, out: Path, *options: str) -> Audited:
    audit(["--checkpoint", str(model), "--out", str(out), *QUIET, *options])
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return Audited(out, read_table(out / "images.csv"), metrics, (out / "index.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(models: dict[str, Path], photos: Photos, tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """The digits, by the classifier with ISM."""
    out = tmp_path_factory.mktemp("audit") / "report"
    return run(models["ism"], out, "--data-dir", str(photos.root), "--shift-images", "60")


@pytest.fixture(scope="module")
def found(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """The emoji that the retrieval model was tested on."""
    return run(
        models["retrieval"], tmp_path_factory.mktemp("audit") / "emoji", "--splits", "test", "--shift-images", "40"
    )


# ---- what it finds ----


def test_the_answers_are_those_of_the_model(models: dict[str, Path], photos: Photos, report: Audited) -> None:
    model = idml.load(models["ism"])
    rows = {row["path"]: row for row in report.images}
    assert len(rows) == 400 + len(photos.copies) + 1
    assert sorted(path.name for path in report.out.iterdir()) == sorted(FILES)
    names = [row["path"] for row in report.images[::40]]
    predictions = model.predict([Image.open(photos.root / name) for name in names])
    for index, name in enumerate(names):
        row = rows[name]
        assert (row["split"], row["label"]) == tuple(name.split("/")[:2])
        assert row["predicted"] == predictions.classes[index]
        assert float(row["confidence"]) == pytest.approx(predictions.confidence[index], abs=1e-4)
        assert float(row["uncertainty"]) == pytest.approx(predictions.uncertainty[index], abs=1e-4)
        assert row["correct"] == str(row["label"] == row["predicted"]).lower()
    shares = {share["name"]: share for share in report.metrics["shares"]}
    for split in ("train", "test"):
        own = [row["correct"] == "true" for row in report.images if row["split"] == split]
        assert (shares[split]["images"], shares[split]["right"]) == (len(own), sum(own))
        assert shares[split]["low"] < np.mean(own) < shares[split]["high"]
    assert shares["test"]["share"] > 0.8  # the model has learned something
    assert report.metrics["judged"]["images"] == shares["test"]["images"]


def test_planted_label_errors_are_first(photos: Photos, report: Audited) -> None:
    ranked = report.table("label_errors.csv")
    doubts = [float(row["doubt"]) for row in ranked]
    assert doubts == sorted(doubts, reverse=True) and min(doubts) > 0.5
    first = {row["path"] for row in ranked[:20]}  # 5 %
    assert len(first & photos.mislabelled) >= 17
    assert report.metrics["label_errors"]["another_class_likelier"] == len(ranked) < 100
    assert all(row["label"] != row["suggested"] for row in ranked)


def test_planted_copies_are_found_across_splits_and_nothing_else(photos: Photos, report: Audited) -> None:
    pairs = report.table("duplicates.csv")
    across = {frozenset((row["first"], row["second"])) for row in pairs if row["across_splits"] == "true"}
    assert across == photos.copies
    within = [row for row in pairs if row["across_splits"] == "false"]
    assert len(within) == 1 and f"test/3/{HOSTILE}" in (within[0]["first"], within[0]["second"])
    assert [row["across_splits"] for row in pairs] == ["true"] * 8 + ["false"]
    assert report.metrics["duplicates"] == {"pairs": 9, "across_splits": 8, "labels_differ": 0}


def test_confusions_are_counted(report: Audited) -> None:
    judged = [row for row in report.images if row["split"] == "test"]
    expected: dict[tuple[str, str], int] = {}
    for row in judged:
        if row["correct"] == "false":
            key = (row["label"], row["predicted"])
            expected[key] = expected.get(key, 0) + 1
    rows = report.table("confusions.csv")
    assert {(row["label"], row["predicted"]): int(row["images"]) for row in rows} == expected
    of_label = sum(row["label"] == rows[0]["label"] for row in judged)
    assert float(rows[0]["share_of_label"]) == pytest.approx(int(rows[0]["images"]) / of_label, rel=1e-4)


def test_uncertainty_by_strength(report: Audited) -> None:
    rows = report.table("shifts.csv")
    assert {row["kind"] for row in rows} == {"blur", "noise", "crop", "mixup", "cutmix"} and len(rows) == 25
    clean = [row for row in rows if float(row["strength"]) == 0]
    assert len({row["mean_uncertainty"] for row in clean}) == 1
    assert all(row["auroc_against_clean"] == "" for row in clean)
    mixed = [row for row in rows if row["kind"] == "mixup"]
    assert [float(row["strength"]) for row in mixed] == [0, 12.5, 25, 37.5, 50]
    scores = [float(row["mean_uncertainty"]) for row in mixed]
    assert scores[-1] > scores[0] + 0.05
    assert float(mixed[-1]["auroc_against_clean"]) > 0.6


def test_what_the_model_would_refuse(models: dict[str, Path], report: Audited) -> None:
    """By the threshold that the model's own held-out images give, counted by hand."""
    model = idml.load(models["ism"])
    assert model.introspection is not None and model.calibrated_on == 288
    promise = model.introspection.promise(0.05, 0.95)
    assert promise is not None
    refusal = report.metrics["refusal"]
    assert refusal["promise"]["threshold"] == pytest.approx(promise.threshold) and promise.held_out == 288
    answered = {row["path"] for row in report.images if row["decision"] == "answer"}
    by_hand = {row["path"] for row in report.images if float(row["uncertainty"]) <= promise.threshold}
    assert answered == by_hand and {row["decision"] for row in report.images} == {"answer", "refuse"}
    assert refusal["answered"] == pytest.approx(len(answered) / len(report.images))
    judged = [row for row in report.images if row["split"] == "test"]
    for share in refusal["shares"]:
        own = [
            row for row in judged if share["name"] in ("all", {"answer": "answered"}.get(row["decision"], "refused"))
        ]
        assert (share["images"], share["right"]) == (len(own), sum(row["correct"] == "true" for row in own))
    shares = {share["name"]: share["share"] for share in refusal["shares"]}
    assert shares["answered"] > shares["all"] > shares["refused"]
    assert "Answered at 5\u00a0% risk" in Elements(report.page).text
    assert f"up to {100 * promise.threshold:.2f}\u00a0% are wrong" in Elements(report.page).text


def test_another_risk_is_another_threshold(models: dict[str, Path], photos: Photos, tmp_path: Path) -> None:
    options = ["--data-dir", str(photos.root), "--shift-images", "0", "--splits", "test", "--pictures", "2"]
    bold = run(models["ism"], tmp_path / "bold", *options, "--max-risk", "0.3")
    never = run(models["ism"], tmp_path / "never", *options, "--max-risk", "0.0001")
    assert bold.metrics["refusal"]["promise"]["max_risk"] == 0.3
    assert bold.metrics["refusal"]["answered"] > 0.8 and "Answered, and wrong" in bold.page
    assert "288 held-out images are not enough to promise it of this model" in never.page
    assert {row["decision"] for row in never.images} == {""} and never.metrics["refusal"]["promise"] is None


def test_what_is_new_to_the_model_is_found(
    models: dict[str, Path], photos: Photos, fashion: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Ten clothes among ninety digits."""
    digits = sorted((photos.root / "test").rglob("*[0-9].png"))[:90]
    for file in digits:
        (tmp_path / "mixed" / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "mixed" / file.parent.name)
    for number in range(10):
        Image.fromarray(fashion["test_images"][number]).save(tmp_path / f"mixed/1/clothes{number}.png")
    found = run(models["ism"], tmp_path / "out", "--data-dir", str(tmp_path / "mixed"), "--shift-images", "0")
    new = found.table("new_images.csv")
    assert [row["rank"] for row in new] == [str(rank) for rank in range(1, len(new) + 1)]
    assert {Path(row["path"]).stem[:7] for row in new[:10]} == {"clothes"}
    strangeness = [float(row["strangeness"]) for row in new]
    assert strangeness == sorted(strangeness, reverse=True)
    novel = {row["path"] for row in found.images if float(row["novelty"]) >= 0.99}
    assert novel == {row["path"] for row in new} and len(novel) < 60
    assert found.metrics["novelty"]["new_images"] == found.metrics["novelty"]["splits"][""]["new"] == len(new)
    rows = {row["path"]: row for row in found.images}
    names = [row["path"] for row in new[:3]]
    says = idml.load(models["ism"]).predict([Image.open(tmp_path / "mixed" / name) for name in names])
    assert says.novelty is not None
    np.testing.assert_allclose([float(rows[name]["novelty"]) for name in names], says.novelty, atol=2e-3)
    section = found.page.split('id="new"')[1].split("</section>")[0]
    assert "1/clothes" in section and f"{len(new)} of 100 images have 0.99 or more" in section


def test_retrieval_finds_what_brute_force_finds(models: dict[str, Path], found: Audited) -> None:
    from idml.commands.options import stored_config
    from idml.data.collection import trained_on

    model = idml.load(models["retrieval"])
    collection = trained_on(stored_config(model))
    chosen = collection.subset(np.flatnonzero(np.array(collection.splits) == "test"))
    semantic = np.concatenate([part.semantic for part in model.embed_dataset(chosen.dataset)])
    similarities = semantic @ semantic.T
    np.fill_diagonal(similarities, -2)
    rows = [row for row in found.images if row["split"] == "test"]
    assert [row["path"] for row in rows] == list(chosen.names)
    best = similarities.max(1)
    np.testing.assert_allclose([float(row["confidence"]) for row in rows], best, atol=1e-4)
    place = {name: index for index, name in enumerate(chosen.names)}
    to_named = similarities[np.arange(len(rows)), [place[row["nearest"]] for row in rows]]
    np.testing.assert_allclose(to_named, best, atol=1e-4)
    labels = np.array(chosen.labels)
    nearest = np.array([place[row["nearest"]] for row in rows])
    share = next(share for share in found.metrics["shares"] if share["name"] == "test")
    assert share["right"] == (labels[nearest] == labels).sum() > 0
    assert found.metrics["uncertainty"]["score"] == "P(wrong)"
    scores = np.array([float(row["uncertainty"]) for row in rows])
    assert (scores >= 0).all() and (scores <= 1).all() and scores.std() > 0.01


def test_an_unchanged_image_scores_as_it_did(found: Audited) -> None:
    """A spoilt image does not find the image that it was made from: it would, were it not left out."""
    rows = found.table("shifts.csv")
    every = np.array([float(row["uncertainty"]) for row in found.images if row["split"] == "test"])
    clean = next(float(row["mean_uncertainty"]) for row in rows if float(row["strength"]) == 0)
    slightly = next(row for row in rows if row["kind"] == "blur" and float(row["strength"]) > 0)
    assert abs(clean - every.mean()) < 4 * every.std() / 40**0.5
    assert float(slightly["mean_uncertainty"]) > clean - 0.2


def test_plain_models_say_so(models: dict[str, Path], photos: Photos, tmp_path: Path) -> None:
    options = ["--data-dir", str(photos.root), "--shift-images", "0", "--splits", "test", "--pictures", "4"]
    plain = run(models["plain"], tmp_path / "cls", *options)
    assert "This classifier has not been introspected" in plain.page
    assert "Nothing is promised: the model has not been introspected" in plain.page
    assert plain.metrics["novelty"] is None and plain.metrics["refusal"]["promise"] is None
    assert {(row["novelty"], row["decision"]) for row in plain.images} == {("", "")}
    assert plain.table("new_images.csv") == []
    assert "Reliability." in plain.page and "Not measured" in plain.page
    for row in plain.images:
        assert float(row["uncertainty"]) == pytest.approx(1 - float(row["confidence"]), abs=1e-5)
    # Digits are no emoji: a retrieval model does not mind.
    found = run(models["plain retrieval"], tmp_path / "dml", *options)
    assert "This retrieval model has not been introspected" in found.page
    assert "Reliability." not in found.page
    assert found.metrics["shares"][0]["name"] == "test" and found.metrics["shares"][0]["share"] > 0.2
    for row in found.images:
        assert float(row["uncertainty"]) == pytest.approx(1 - float(row["confidence"]), abs=1e-5)


def test_queries_search_the_gallery(models: dict[str, Path], photos: Photos, tmp_path: Path) -> None:
    for split, digits in (("query", "12"), ("gallery", "123")):
        for digit in digits:
            files = sorted((photos.root / ("test" if split == "query" else "train") / digit).iterdir())[:5]
            (tmp_path / split / digit).mkdir(parents=True)
            for file in files:
                shutil.copy(file, tmp_path / split / digit)
    found = run(models["retrieval"], tmp_path / "out", "--data-dir", str(tmp_path), "--shift-images", "5")
    assert {row["nearest"].split("/")[0] for row in found.images} == {"gallery"}
    assert all(row["nearest"] != row["path"] for row in found.images)
    assert found.metrics["judged"]["what"].endswith("query")


def test_without_labels(models: dict[str, Path], photos: Photos, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in sorted((photos.root / "test/1").iterdir()):
        shutil.copy(file, flat)
    with pytest.warns(UserWarning, match="no class folders"):
        flatly = run(models["ism"], tmp_path / "a", "--data-dir", str(flat), "--shift-images", "10")
    ignored = run(models["ism"], tmp_path / "b", "--data-dir", str(photos.root), "--no-labels", "--shift-images", "0")
    with pytest.warns(UserWarning, match="no class folders"):
        run(models["retrieval"], tmp_path / "c", "--data-dir", str(flat), "--shift-images", "0")
    for each in (flatly, ignored):
        assert each.metrics["shares"] == [] and each.metrics["labelled_images"] == 0
        assert all(row["label"] == row["correct"] == "" and row["predicted"] != "" for row in each.images)
        assert "have no labels" in each.page and "Likely label errors" not in each.page
        assert each.table("label_errors.csv") == []


# ---- the page ----


class Elements(HTMLParser):
    """Every element of a page with its attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained(report: Audited, found: Audited) -> None:
    for audited in (report, found):
        elements = Elements(audited.page)
        assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & {tag for tag, _ in elements.found}
        for tag, attributes in elements.found:
            assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
            for name in ("src", "href", "srcset", "data"):
                value = attributes.get(name)
                assert value is None or value.startswith(("data:image/", "#")), (tag, value)
            if tag == "img":
                assert attributes["alt"]
        policy = next(a["content"] for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
        assert policy is not None and "default-src 'none'" in policy and "img-src data:;" in policy
        style = audited.page.split("<style>")[1].split("</style>")[0]
        assert f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'" in policy
        assert "url(" not in style and "@import" not in style
        targets = {a["href"] for tag, a in elements.found if tag == "a"}
        assert targets <= {f"#{a['id']}" for _, a in elements.found if a.get("id")}
        assert len(audited.page) < 8_000_000


def test_names_of_files_are_text(report: Audited) -> None:
    elements = Elements(report.page)
    assert "b" not in {tag for tag, _ in elements.found}
    assert f"test/3/{HOSTILE}" in elements.text
    assert any(f"test/3/{HOSTILE}" in (a.get("alt") or "") for _, a in elements.found)


BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


def browse(page: Path, width: int, *options: str) -> str:
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},3000",
    ]
    done = subprocess.run([*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(report: Audited, found: Audited, tmp_path: Path, width: int) -> None:
    for audited in (report, found):
        # A copy that may run scripts tells its own width: the page itself may not.
        probe = "<script>document.title = document.documentElement.scrollWidth + ' ' + innerWidth + ' ' + "
        probe += "[...document.images].filter(i => i.complete && i.naturalWidth).length</script></body>"
        copy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", audited.page)
        copy = copy.replace(' loading="lazy"', "").replace("</body>", probe)
        (tmp_path / "copy.html").write_text(copy, encoding="utf-8")
        title = re.search("<title>(.*?)</title>", browse(tmp_path / "copy.html", width, "--dump-dom"))
        assert title is not None
        content, window, images = map(int, title.group(1).split())
        assert content <= window == width
        assert images == audited.page.count("<img ")
        picture = tmp_path / "page.png"
        browse(audited.out / "index.html", width, f"--screenshot={picture}")
        with Image.open(picture) as shot:
            pixels = np.asarray(shot.convert("RGB"), np.int16)
        assert pixels.shape == (3000, width, 3)
        # The title is dark letters on a light ground; styles are in force, or the ground would be white.
        ground = np.array([250, 250, 248])
        title_region = pixels[20:110]
        assert 0.01 < (title_region.max(2) < 100).mean() < 0.4
        assert (np.abs(title_region - ground).max(2) < 3).mean() > 0.5
        # There is something in every part, and pictures have many colours.
        assert all(part.std() > 5 for part in np.array_split(pixels[:2500], 5))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 150


# ---- parts ----


def test_doubt_of_a_classifier() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]])
    belief = torch.tensor([[0.1, 0.1, 0.8], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]])
    doubt, suggested = class_doubt(probabilities, belief, torch.tensor([0, 1, -1]))
    torch.testing.assert_close(doubt, torch.tensor([0.6, 0.3, torch.nan]), equal_nan=True)
    assert suggested.tolist() == [2, 2, 2]
    doubt, suggested = class_doubt(probabilities, None, torch.tensor([1, 1, 2]))
    torch.testing.assert_close(doubt, torch.tensor([0.8, 0.4, 0.5]))
    assert suggested.tolist() == [0, 2, 1]


def test_doubt_of_neighbours_against_loops(fashion: dict[str, np.ndarray]) -> None:
    """Pixels as embeddings; every image among the neighbours, so that nothing is cut off."""
    count = 60
    images = fashion["test_images"][:count].reshape(count, -1).astype(np.float32)
    labels = fashion["test_labels"][:count].astype(np.int64)
    labels[:3], labels[5] = -1, 77
    unit = images / np.linalg.norm(images, axis=1, keepdims=True)
    neighbours, similarities = (part.numpy() for part in nearest_neighbours(images, count - 1))
    doubt, suggested = neighbour_doubt(images, labels, neighbours, similarities)
    least = similarities[:, -1]
    for index in range(count):
        by_class: dict[int, list[float]] = {}
        for other in range(count):
            if other != index and labels[other] >= 0:
                by_class.setdefault(int(labels[other]), []).append(float(unit[index] @ unit[other]))
        own = sorted(by_class.pop(int(labels[index]), []), reverse=True)[:AGREEING]
        if labels[index] < 0 or not own:
            assert np.isnan(doubt[index])
            continue
        means = {}
        for label, values in by_class.items():
            top = sorted(values, reverse=True)[:AGREEING]
            means[label] = (sum(top) + (AGREEING - len(top)) * least[index]) / AGREEING
        best = max(means, key=lambda label: means[label])
        assert doubt[index] == pytest.approx(means[best] - np.mean(own), abs=1e-4)
        assert suggested[index] == best


def test_images_of_a_class_are_no_duplicates(fashion: dict[str, np.ndarray]) -> None:
    images = torch.from_numpy(fashion["test_images"][:300])[:, None].expand(-1, 3, -1, -1)
    labels = fashion["test_labels"][:300].astype(np.int64)
    darker = (images[:4].float() * 0.95).to(torch.uint8)
    thumbnails = thumbnails_of(torch.cat([images, darker]))
    # A model to which all images of a class are the same.
    labels = np.concatenate([labels, labels[:4]])
    semantic = np.eye(10, dtype=np.float32)[labels]
    neighbours = nearest_neighbours(semantic, 20)[0].numpy()
    splits = ("test",) * 300 + ("train",) * 4
    pairs = near_duplicates(semantic, thumbnails, neighbours, splits, labels)
    assert set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == {(i, 300 + i) for i in range(4)}
    assert pairs.across.all() and len(set(pairs.group.tolist())) == 4
    # Alike in pixels and not to the model, as hearts of two colours are.
    semantic[300:] = -semantic[300:]
    assert len(near_duplicates(semantic, thumbnails, neighbours, splits, labels)) == 0


def test_copies_with_another_label_and_pictures_of_one_grey() -> None:
    thumbnails = np.full((5, 1024), 200, np.uint8)
    thumbnails[3], thumbnails[4] = 100, np.arange(1024) % 251
    semantic = np.ones((5, 8), np.float32)
    labels = np.array([0, 0, 1, 0, 0])
    pairs = near_duplicates(semantic, thumbnails, np.array([[1], [0], [1], [1], [1]]), ("",) * 5, labels)
    found = list(zip(pairs.first.tolist(), pairs.second.tolist(), pairs.conflict.tolist(), strict=True))
    assert {pair[:2] for pair in found} == {(0, 1), (0, 2), (1, 2)}
    assert [conflict for *_, conflict in found] == [True, True, False]
    assert set(pairs.group.tolist()) == {0} and not pairs.across.any()


def test_intervals_are_those_of_the_book() -> None:
    """Wilson's interval of 8 in 10 by its formula: (p + z^2/2n +- z sqrt(p q/n + z^2/4n^2)) / (1 + z^2/n)."""
    share = share_of("x", np.array([True] * 8 + [False] * 2))
    assert (share.share, share.right, share.images) == (0.8, 8, 10)
    z, n, p = 1.959964, 10, 0.8
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert share.low == pytest.approx((p + z**2 / (2 * n) - half) / (1 + z**2 / n), abs=1e-5)
    assert share.high == pytest.approx((p + z**2 / (2 * n) + half) / (1 + z**2 / n), abs=1e-5)


# ---- bad input ----


def message(*arguments: str) -> str:
    """The error of a command that must not get anywhere."""
    with pytest.raises(UserError) as error:
        audit([*QUIET, *arguments])
    return str(error.value)


def test_bad_input_is_told_before_anything_is_written(models: dict[str, Path], photos: Photos, tmp_path: Path) -> None:
    out, data = ["--out", str(tmp_path / "out")], ["--data-dir", str(photos.root)]
    model = ["--checkpoint", str(models["ism"])]
    assert "--checkpoint is missing" in message(*data, *out)
    assert "no model at nowhere" in message("--checkpoint", "nowhere", *data, *out)
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    assert "other.pt" in message("--checkpoint", str(tmp_path / "other.pt"), *data, *out)
    (tmp_path / "empty").mkdir()
    assert "no images in" in message(*model, "--data-dir", str(tmp_path / "empty"), *out)
    assert "no folder" in message(*model, "--data-dir", str(tmp_path / "none"), *out)
    assert "--out is missing" in message(*model, *data)
    assert "no split val" in message(*model, *data, *out, "--splits", "val")
    assert "--duplicate-similarity" in message(*model, *data, *out, "--duplicate-similarity", "2")
    assert "--pictures" in message(*model, *data, *out, "--pictures", "0")
    for flag, value in (("--max-risk", "0"), ("--max-risk", "5"), ("--confidence", "1")):
        assert f"{flag}: expected a number between 0 and 1, got" in message(*model, *data, *out, flag, value)
    assert "cannot write" in message(*model, *data, "--out", "/dev/null/report")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    shutil.copy(photos.root / "test/3" / HOSTILE, tmp_path / "train/cat/1.png")
    unknown = message(*model, "--data-dir", str(tmp_path / "train"), *out)
    assert "1 of 1 class folders are no classes of the model (cat)" in unknown and "--no-labels" in unknown
    # One image has no other to be compared with.
    retrieval = ["--checkpoint", str(models["retrieval"])]
    assert "has one image" in message(*retrieval, "--data-dir", str(tmp_path / "train"), *out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "other.pt", "train"]


def test_photos_and_text_in_one_folder(models: dict[str, Path], photos: Photos, tmp_path: Path) -> None:
    folder = tmp_path / "mixed" / "3"
    folder.mkdir(parents=True)
    for file in sorted((photos.root / "test/3").iterdir())[:4]:
        shutil.copy(file, folder)
    (folder / "notes.txt").write_text("not an image")
    options = ["--data-dir", str(folder.parent), "--shift-images", "0"]
    with pytest.warns(UserWarning, match=r"left out 1 file that is no image: 1 \.txt"):
        assert len(run(models["ism"], tmp_path / "a", *options).images) == 4
    (folder / "broken.jpg").write_text("no image either")
    out = ["--out", str(tmp_path / "b")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "broken.jpg" in message("--checkpoint", str(models["ism"]), *options, *out)
        skipped = run(models["ism"], tmp_path / "b", *options, "--skip-bad-images")
    assert len(skipped.images) == 4


def test_an_existing_report_stays_unless_it_is_to_go(models: dict[str, Path], photos: Photos, tmp_path: Path) -> None:
    out = tmp_path / "report"
    out.mkdir()  # an empty folder is no obstacle
    options = ["--data-dir", str(photos.root), "--splits", "test", "--shift-images", "0"]
    run(models["plain"], out, *options)
    before = (out / "index.html").read_bytes()
    arguments = ["--checkpoint", str(models["ism"]), "--out", str(out), *options]
    assert "--overwrite" in message(*arguments)
    assert "no split val" in message(*arguments, "--overwrite", "--splits", "val")
    assert (out / "index.html").read_bytes() == before
    run(models["ism"], out, *options, "--overwrite")
    assert (out / "index.html").read_bytes() != before
    (out / "thesis.txt").write_text("mine")
    assert "thesis.txt" in message(*arguments, "--overwrite")
    assert "is a file" in message("--checkpoint", "x", "--out", str(out / "thesis.txt"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report"]


def test_from_the_command_line(models: dict[str, Path], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "idml",
        "audit",
        "--checkpoint",
        str(models["ism"]),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([*command, "--data-dir", str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no images in") and done.stderr.count("\n") == 1
    # Without --data-dir: what the model was trained on.
    done = subprocess.run(
        [*command, "--splits", "test", "--shift-images", "0", *QUIET], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "355 images, accuracy on test" in done.stdout and (tmp_path / "out/index.html").exists()
    assert re.search(r"\d+ new to the model, \d+\.\d% answered at a risk of 0\.05", done.stdout)
