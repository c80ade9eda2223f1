"""Emoji: what is embedded, how it is split, the reader of whole packs, and what it says about bad ones."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from idml.data.emoji import (
    EMOJI_MEAN,
    EMOJI_STD,
    load_embedded,
    read_emoji,
    read_emoji_mini,
    vendor_families,
)
from idml.data.packs import Pack, split_classes
from idml.data.retrieval_data import RetrievalData
from idml.errors import UserError

PERMISSIVE = ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "twemoji", "emojione")
FOLDER = Path(str(resources.files("idml.data.embedded")))


def config(data_dir: Path | None = None, image_size: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(data_dir=None if data_dir is None else str(data_dir), image_size=image_size)


@pytest.fixture(scope="module")
def pack() -> Pack:
    return load_embedded()


@pytest.fixture(scope="module")
def mini() -> RetrievalData:
    return read_emoji_mini(config())


@pytest.fixture
def arrays(pack: Pack) -> dict[str, np.ndarray]:
    """The first 20 classes of emoji-mini in the layout of a whole pack, sorted by class as such packs are."""
    chosen = np.flatnonzero(pack.labels < 20)
    chosen = chosen[np.argsort(pack.labels[chosen], kind="stable")]
    codes, names = zip(*(name.split(" ", 1) for name in pack.classes[:20]), strict=True)
    return {
        "X": pack.images[chosen],
        "y": pack.labels[chosen],
        "vendor": pack.vendor[chosen],
        "vendors": np.array(pack.vendors),
        "classes": np.array(codes),
        "cat": np.array(["Symbols"] * 20),
        "names": np.array(names),
    }


def test_every_embedded_class_is_drawn_once_by_each_of_the_permissive_vendors(pack: Pack) -> None:
    assert len(pack.classes) >= 300 and len(set(pack.classes)) == len(pack.classes)
    assert pack.vendors == PERMISSIVE
    assert (FOLDER / "emoji_mini.npz").stat().st_size <= 4_000_000
    assert pack.images.shape == (6 * len(pack.classes), 64, 64, 3)
    assert len(set(zip(pack.labels.tolist(), pack.vendor.tolist(), strict=True))) == len(pack.images)


def test_the_licence_file_names_every_set_with_its_package_and_licence() -> None:
    sections = (FOLDER / "emoji_mini.LICENSE").read_text().split("\n\n")
    for vendor in PERMISSIVE:
        (section,) = [text for text in sections if text.split()[0] == vendor]
        assert f"@iconify-json/{vendor} 1.2." in section
        assert any(name in section for name in ("Apache License 2.0", "MIT License", "CC-BY-4.0"))


def test_the_licence_file_has_the_versions_of_the_build_script() -> None:
    from idml.data.embedded.emoji_mini import CLASSES, VENDORS

    text = (FOLDER / "emoji_mini.LICENSE").read_text()
    assert tuple(VENDORS) == PERMISSIVE
    assert all(f"@iconify-json/{vendor} {version}\n" in text for vendor, version in VENDORS.items())
    assert f"{6 * CLASSES:,} drawings of {CLASSES} emoji" in text


def test_drawings_are_on_white_not_blank_and_no_two_classes_look_alike(pack: Pack) -> None:
    corners = pack.images[:, [0, 0, -1, -1], [0, -1, 0, -1]].reshape(len(pack.images), -1)
    assert ((corners == 255).all(1)).mean() > 0.9, "some fill the square"
    inked = (pack.images[:, ::2, ::2, 1] < 250).mean((1, 2))
    assert inked.min() > 0.02
    for vendor in range(6):
        images = pack.images[pack.vendor == vendor]
        assert len({image.tobytes() for image in images}) == len(images)
        small = images[:, 1::4, 1::4].reshape(len(images), -1).astype(np.int16)
        nearest = [np.abs(np.delete(small, i, 0) - small[i]).mean(1).min() for i in range(0, len(small), 8)]
        assert min(nearest) > 1, pack.vendors[vendor]


def test_classes_of_training_and_test_are_apart_and_cover_all(mini: RetrievalData, pack: Pack) -> None:
    assert not set(mini.train.classes) & set(mini.test.classes)
    assert set(mini.train.classes) | set(mini.test.classes) == set(pack.classes)
    for part in (mini.train, mini.test):
        assert len(part.classes) == len(pack.classes) // 2
        assert np.bincount(part.labels, minlength=len(part.classes)).tolist() == [6] * len(part.classes)
    name = mini.test.classes[mini.test.labels[100]]
    assert any((image == mini.test.images[100]).all() for image in pack.images[pack.labels == pack.classes.index(name)])
    assert mini.flip is False and mini.gallery is None


def test_the_split_stays_what_it_was() -> None:
    """A change of NumPy's generator would make figures of different versions incomparable."""
    train, test = split_classes(20)
    assert train.tolist() == SPLIT_OF_20
    assert sorted([*train, *test]) == list(range(20))
    assert [len(half) for half in split_classes(7)] == [3, 4]


SPLIT_OF_20 = [2, 3, 4, 6, 8, 10, 11, 13, 16, 19]


def test_both_halves_have_every_category(mini: RetrievalData) -> None:
    with np.load(FOLDER / "emoji_mini.npz", allow_pickle=False) as stored:
        topics = dict(
            zip(
                (f"{c} {n}" for c, n in zip(stored["classes"], stored["names"], strict=True)),
                stored["categories"].tolist(),
                strict=True,
            )
        )
    shares = [
        {topic: sum(topics[name] == topic for name in part.classes) / len(part.classes) for topic in topics.values()}
        for part in (mini.train, mini.test)
    ]
    assert len(shares[0]) >= 8
    assert all(abs(shares[0][topic] - shares[1][topic]) < 0.06 for topic in shares[0])


def test_families_join_the_sets_of_one_vendor(mini: RetrievalData, pack: Pack) -> None:
    names = ("emojione", "emojione-v1", "fluent-emoji", "fluent-emoji-flat", "fxemoji", "noto", "noto-v1", "openmoji")
    ids = vendor_families(names).tolist()
    assert [ids[0] == ids[1], ids[2] == ids[3], ids[5] == ids[6]] == [True] * 3
    assert len(set(ids)) == 5
    assert len(set(vendor_families(("fluent", "fluent-flat", "noto")).tolist())) == 2
    tested = pack.vendor[np.isin(pack.labels, split_classes(len(pack.classes))[1])]
    assert np.array_equal(mini.families, vendor_families(pack.vendors)[tested])


def test_the_stated_mean_and_deviation_are_those_of_the_training_images(mini: RetrievalData) -> None:
    values = np.arange(256) / 255
    for channel in range(3):
        counts = np.bincount(mini.train.images[..., channel].ravel(), minlength=256)
        mean = np.average(values, weights=counts)
        assert abs(mean - EMOJI_MEAN[channel]) < 6e-5
        assert abs(np.average((values - mean) ** 2, weights=counts) ** 0.5 - EMOJI_STD[channel]) < 6e-5
    assert mini.preprocessing.mean == EMOJI_MEAN and mini.preprocessing.image_size == 64


def test_raw_pixels_find_the_same_emoji_and_fewer_without_the_family(mini: RetrievalData) -> None:
    features = 255 - mini.test.images.reshape(-1, 16, 4, 16, 4, 3).mean((2, 4)).reshape(len(mini.test), -1)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    similarity = features @ features.T
    np.fill_diagonal(similarity, -1)
    found = (mini.test.labels[similarity.argmax(1)] == mini.test.labels).mean()
    similarity[mini.families[:, None] == mini.families] = -1
    found_elsewhere = (mini.test.labels[similarity.argmax(1)] == mini.test.labels).mean()
    assert 0.3 < found_elsewhere < found < 0.9, "chance is 0.003"


def test_another_image_size(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    save(tmp_path / "pack.npz", arrays)
    data = read_emoji(config(tmp_path, image_size=32))
    assert data.preprocessing.image_size == 32
    chosen = arrays["X"][np.isin(arrays["y"], split_classes(20)[0])]
    blocks = chosen.reshape(60, 32, 2, 32, 2, 3).mean((2, 4))
    assert data.train.images.shape == blocks.shape
    assert np.abs(data.train.images - blocks).mean() < 8, "close to averaging 2x2 pixels"


@pytest.mark.parametrize("given", ["file", "folder", "named"])
def test_a_whole_pack_is_read(tmp_path: Path, arrays: dict[str, np.ndarray], given: str) -> None:
    name = "emoji64.npz" if given == "named" else "mine.npz"
    np.savez(tmp_path / name, **arrays)
    if given == "named":
        (tmp_path / "other.npz").write_bytes(b"")
    data = read_emoji(config(tmp_path / name if given == "file" else tmp_path))
    train, test = split_classes(20)
    assert data.train.classes == tuple(f"{arrays['classes'][i]} {arrays['names'][i]}" for i in train)
    for part, classes in ((data.train, train), (data.test, test)):
        assert np.array_equal(part.images, arrays["X"][np.isin(arrays["y"], classes)])
        assert part.labels.dtype == np.int64 and part.labels.tolist() == np.repeat(np.arange(10), 6).tolist()
    assert data.families.tolist() == [0, 0, 2, 2, 4, 5] * 10


def save(path: Path, arrays: dict[str, np.ndarray], **changed: np.ndarray | None) -> None:
    np.savez(path, **{name: a for name, a in (arrays | changed).items() if a is not None})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda a: {"vendor": None}, r"has no array vendor, integers \(N,\).*it has X, y"),
        (lambda a: {"X": a["X"].astype(np.float32)}, r"X must be uint8 \(N, S, S, 3\).*got float32 \(120, 64, 64, 3\)"),
        (lambda a: {"X": a["X"][..., 0]}, r"X must be uint8 .*got uint8 \(120, 64, 64\)"),
        (lambda a: {"X": a["X"][:, 1:]}, r"X must be uint8 .*got uint8 \(120, 63, 64, 3\)"),
        (lambda a: {"X": a["X"][:0]}, "X is empty"),
        (lambda a: {"y": a["y"] + 0.5}, r"y must be integers \(N,\).*got float64"),
        (lambda a: {"y": a["y"][:-1]}, "y must be as long as X, 120; got 119"),
        (lambda a: {"y": a["y"] + 1}, r"y must be 0 to 19 \(20 classes\), got 20"),
        (lambda a: {"vendor": a["vendor"] - 1}, r"vendor must be 0 to 5 \(6 vendors\), got -1"),
        (lambda a: {"classes": np.where(a["classes"] == a["classes"][3], a["classes"][2], a["classes"])}, "twice"),
        (lambda a: {"y": np.where(a["y"] == 7, 8, a["y"])}, "has no image"),
        (lambda a: {"names": a["names"][:-2]}, "names must be as long as classes, 20; got 18"),
        (lambda a: {"names": np.arange(20)}, r"names must be strings \(C,\)"),
        (lambda a: {"classes": a["classes"].astype(object)}, "array classes cannot be read.*allow_pickle=False"),
        (lambda a: {n: a[n][:18] for n in ("X", "y", "vendor")} | {n: a[n][:3] for n in ("classes", "names")}, "got 3"),
    ],
)
def test_a_pack_that_is_not_in_the_layout_is_told(
    tmp_path: Path, arrays: dict[str, np.ndarray], change: Callable, expected: str
) -> None:
    save(tmp_path / "bad.npz", arrays, **change(arrays))
    with pytest.raises(UserError, match=rf"bad\.npz.*{expected}") as caught:
        read_emoji(config(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_told(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path / "pack.npz"
    save(path, arrays)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html>not found</html>", arrays["y"].tobytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"pack\.npz is not a whole \.npz file"):
            read_emoji(config(path))
    middle = whole.index(arrays["X"][60].tobytes()[:3000])
    path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    with pytest.raises(UserError, match=r"pack\.npz: array X cannot be read"):
        read_emoji(config(path))


def test_a_missing_pack_is_told(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    with pytest.raises(UserError, match=r"dataset emoji needs --data-dir.*emoji-mini"):
        read_emoji(config())
    with pytest.raises(UserError, match=r"no file or folder .*nowhere"):
        read_emoji(config(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"has no \.npz file; expected one, or emoji64\.npz"):
        read_emoji(config(tmp_path))
    for name in ("a.npz", "b.npz"):
        save(tmp_path / name, arrays)
    with pytest.raises(UserError, match=r"has 2 \.npz files \(a\.npz, b\.npz\)"):
        read_emoji(config(tmp_path))
