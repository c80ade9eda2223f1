"""Icons: how the pack is drawn from packages of icon families, what is left out of it, its reader, and bad input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import train_dml
from idml.config_dml import parse_dml_config
from idml.data.embedded import icons
from idml.data.embedded.icon_drawings import icons_by_name
from idml.data.embedded.icon_families import AMBIGUOUS, BRANDS, FAMILIES, LICENCES, SYNONYMS, Source
from idml.data.embedded.icon_measures import agreement, consistency, describe, resemblance, told_apart
from idml.data.icons import ICON_MEAN, ICON_STD, read_icons
from idml.data.packs import Pack, load_pack, split_classes
from idml.data.verify import verify_data
from idml.errors import UserError, run_main

ROOT = Path(__file__).parents[1]
SHAPES = {
    "square": "M5 5h14v14h-14z",
    "circle": "M12 4a8 8 0 1 0 .01 0z",
    "triangle": "M12 4l9 16h-18z",
    "star": "M12 3l2.6 6 6.4.5-5 4.2 1.6 6.3-5.6-3.4-5.6 3.4 1.6-6.3-5-4.2 6.4-.5z",
    "plus": "M12 4v16M4 12h16",
    "ladder": "M7 3v18M17 3v18M7 8h10M7 13h10M7 18h10",
    "check": "M2 13l7 7 13-16",
    "arrow-left": "M20 12h-16M10 6l-6 6 6 6",
    "arrow-right": "M4 12h16M14 6l6 6-6 6",
    "arrow-up": "M12 20v-16M6 10l6-6 6 6",
    "home": "M3 12l9-8 9 8M6 10v10h12v-10M10 20v-6h4v6",
    "moon": "M15 3a9 9 0 1 0 6 12a8 8 0 0 1-6-12z",
    "flag": "M6 21v-18h13l-4 4 4 4h-13",
    "hourglass": "M6 3h12M6 21h12M7 3c0 6 10 12 10 18M17 3c0 6-10 12-10 18",
    "pause": "M8 4v16M16 4v16",
    "bar-chart": "M4 20h16M7 20v-6M12 20v-14M17 20v-10",
}
"""Paths of icons on 24 units, by the name that the small set has for them."""

DRAWN_BY_NINE = 9
SMALL: dict[str, tuple[Source, ...]] = {
    **{f"family-{k}": (Source(f"pack-{k}", "1.0.0", ("{}-outline", "{}")),) for k in range(DRAWN_BY_NINE)},
    "twin": (Source("twin", "1.0.0"),),
}
"""Nine families and one that copies the first."""


def body(path: str, k: int) -> str:
    """The drawing of family ``k``: its own line width, size and slant."""
    size, slant = 0.62 + 0.045 * k, 5 * (k % 5 - 2)
    return (
        f'<g transform="translate(12 12) skewX({slant}) scale({size:.2f}) translate(-12 -12)">'
        f'<path fill="none" stroke="currentColor" stroke-width="{1 + 0.7 * (k % 4):.2f}" d="{path}"/></g>'
    )


def family_icons(k: int) -> dict[str, dict[str, object]]:
    """What family ``k`` draws: all shapes, in two spellings, and what is to be left out."""
    found = {name: body(path, k) for name, path in SHAPES.items()}
    if k >= 6:  # the minority's order of words, and a style of its own
        found["chart-bar"] = found.pop("bar-chart")
        found["star-outline"], found["star"] = found["star"], found["circle"]
    if k == 5:  # the rarer order too, for another thing
        found["chart-bar"] = found["hourglass"]
    found["github"] = body(SHAPES["circle"] + SHAPES["pause"], k)
    found["nut"] = body(SHAPES["square"] + SHAPES["check"], k)
    found["hoop"] = found["circle"]
    found["muddle"] = body(list(SHAPES.values())[k + 1], k)
    found["blank"] = "<g/>"
    if k < 8:
        found["house"] = body("M3 12l9-9 9 9M5 10v10h14v-10", k)
    if k < 7:
        found["rare"] = body(SHAPES["check"] + SHAPES["pause"], k)
    drawn: dict[str, dict[str, object]] = {name: {"body": text} for name, text in found.items()}
    drawn["ghost"] = {"body": found["moon"], "hidden": True}
    return drawn


def write_package(folder: Path, name: str, drawn: dict[str, dict[str, object]], licence: str = "MIT") -> None:
    """One npm package as Iconify makes them."""
    package = folder / "node_modules" / "@iconify-json" / name
    package.mkdir(parents=True, exist_ok=True)
    info = {"name": name.title(), "author": {"name": f"Team of {name}", "url": f"https://example.org/{name}"}}
    info |= {"license": {"title": licence, "spdx": licence, "url": f"https://example.org/{name}/LICENSE"}}
    (package / "package.json").write_text(json.dumps({"name": f"@iconify-json/{name}", "version": "1.0.0"}))
    (package / "info.json").write_text(json.dumps(info))
    (package / "icons.json").write_text(json.dumps({"prefix": name, "icons": drawn, "width": 24, "height": 24}))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("npm")
    for k in range(DRAWN_BY_NINE):
        write_package(folder, f"pack-{k}", family_icons(k))
    write_package(folder, "twin", family_icons(0), licence="Apache-2.0")
    return folder


@pytest.fixture(scope="module")
def small(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack of the small set."""
    out = tmp_path_factory.mktemp("icons") / "icons48.npz"
    icons.build(packages, out, SMALL)
    return out


@pytest.fixture
def arrays(small: Path) -> dict[str, np.ndarray]:
    with np.load(small, allow_pickle=False) as stored:
        return dict(stored)


def config(data_dir: Path | None = None, **changed: object) -> SimpleNamespace:
    values = {"data_dir": None if data_dir is None else str(data_dir), "image_size": None, "min_families": 8}
    return SimpleNamespace(**values | changed)


def save(path: Path, arrays: dict[str, np.ndarray], **changed: np.ndarray | None) -> Path:
    np.savez(path, **{name: a for name, a in (arrays | changed).items() if a is not None})
    return path


def test_a_name_is_what_is_left_of_an_icon_without_its_style() -> None:
    drawn: dict[str, dict] = {"home": {}, "home-24-regular": {}, "home-24-filled": {}, "sun-24-filled": {}, "24": {}}
    styles = ("{}-24-regular", "{}-24-filled")
    assert icons_by_name(drawn, styles) == {"home": "home-24-regular", "sun": "sun-24-filled"}
    drawn = {"outline-home": {}, "baseline-home": {}, "baseline-sun": {"hidden": True}}
    assert icons_by_name(drawn, ("outline-{}", "baseline-{}")) == {"home": "outline-home"}
    assert icons_by_name({"bold": {}, "text-bold": {}}, ("{}", "{}-bold")) == {"bold": "bold", "text": "text-bold"}


def test_the_set_has_the_names_that_mean_one_thing_and_look_like_one(small: Path) -> None:
    pack = load_pack(small)
    assert set(pack.classes) == set(SHAPES), "no brand, no nut, no house beside home, no hoop, no muddle, nothing blank"
    assert pack.classes == tuple(sorted(pack.classes))
    assert pack.images.shape == (len(SHAPES) * DRAWN_BY_NINE, 48, 48, 3)
    pairs = list(zip(pack.labels.tolist(), pack.vendor.tolist(), strict=True))
    assert pairs == sorted(set(pairs)), "one drawing a family, in order"


def test_what_was_left_out_is_said(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    icons.build(packages, tmp_path / "icons48.npz", SMALL)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{len(SHAPES) + 7} names, {10 * (len(SHAPES) + 5) + 9 + 8} drawings"
    said = dict(line.split(": ", 1) for line in lines if "left out: " in line)
    assert {step: text.split(": ", 1)[1] for step, text in said.items() if step != "drawings unlike one another"} == {
        "brands": "github",
        "several meanings": "nut",
        "other names of one thing": "house",
        "too few different drawings": "blank, rare",
        "like another name": "hoop (like circle)",
    }
    assert "1 names left out: muddle 0." in said["drawings unlike one another"]
    assert any(line.split() == ["family-3", "16", "images", "pack-3", "MIT"] for line in lines)
    assert f"{len(SHAPES)} names, 10 families, {len(SHAPES) * 9} images, 9 to 9 a name" in lines


def test_drawings_are_black_on_white_and_those_of_a_copy_are_one(small: Path) -> None:
    pack = load_pack(small)
    assert (pack.images == pack.images[..., :1]).all()
    assert (pack.images[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 255).mean() > 0.95
    assert pack.images.min((1, 2, 3)).max() < 64, "every one has black in it"
    first, twin = pack.vendors.index("family-0"), pack.vendors.index("twin")
    drawers = [int(np.isin(pack.vendor[pack.labels == label], (first, twin)).sum()) for label in range(len(SHAPES))]
    assert drawers == [1] * len(SHAPES)


def test_the_preferred_style_and_order_of_words_are_drawn(small: Path) -> None:
    """Families 6 to 8 call a circle ``star`` and draw the star as ``star-outline``, their first style."""
    pack = load_pack(small)
    stars = pack.labels == pack.classes.index("star")
    features = describe(pack.images[..., 0])
    wanted = features[stars & (pack.vendor < 6)].mean(0)
    for family in range(6, 9):
        similarity = features[pack.vendor == family] @ wanted
        assert pack.labels[pack.vendor == family][similarity.argmax()] == pack.classes.index("star")
    charts = pack.labels == pack.classes.index("bar-chart")
    assert charts.sum() == DRAWN_BY_NINE
    fifth = pack.vendor == pack.vendors.index("family-5")
    similarity = features[fifth] @ features[charts & ~fifth].mean(0)
    assert charts[fifth][similarity.argmax()], "and not what it calls chart-bar"


def test_the_same_packages_give_the_same_bytes(packages: Path, small: Path, tmp_path: Path) -> None:
    icons.build(packages, tmp_path / "icons48.npz", SMALL)
    for name in ("icons48.npz", "icons48.LICENSES.txt"):
        assert (tmp_path / name).read_bytes() == (small.parent / name).read_bytes()


def test_a_name_has_so_many_drawings_at_most(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(icons, "MAX_FAMILIES", 8)
    icons.build(packages, tmp_path / "icons48.npz", SMALL)
    pack = load_pack(tmp_path / "icons48.npz")
    assert np.bincount(pack.labels).tolist() == [8] * len(SHAPES)
    assert len({int(v) for v in pack.vendor}) == 10, "the draw favours no family"


def test_every_family_has_its_licence_beside_the_file(small: Path) -> None:
    sections = small.with_name("icons48.LICENSES.txt").read_text().strip().split("\n\n")[1:]
    assert [section.split("\n")[0] for section in sections] == list(SMALL)
    assert "Twin, package @iconify-json/twin 1.0.0" in sections[-1]
    assert "Team of twin, https://example.org/twin\n" in sections[-1]
    assert sections[-1].endswith("licence  Apache-2.0, https://example.org/twin/LICENSE")


def test_the_families_of_the_set_are_permissive_and_pinned(capsys: pytest.CaptureFixture[str]) -> None:
    assert not [name for name in LICENCES if name.startswith(("GPL", "LGPL", "CC-BY", "MPL"))]
    sources = [source for family in FAMILIES.values() for source in family]
    assert len({source.package for source in sources}) == len(sources), "a package belongs to one family"
    assert all(source.version.count(".") == 2 for source in sources)
    assert all(style.count("{}") == 1 for source in sources for style in source.styles)
    for related in (("lucide", "feather"), ("material-symbols", "ic", "mdi"), ("ion", "famicons")):
        assert len({family for family, group in FAMILIES.items() for s in group if s.package in related}) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["icons", "--list-packages"])
        icons.main()
    listed = capsys.readouterr().out.split()
    assert len(listed) == len(sources) and "@iconify-json/feather@1.2.1" in listed


def test_lists_of_names_do_not_contradict_one_another() -> None:
    named = [name for group in SYNONYMS for name in group]
    assert len(named) == len(set(named))
    assert not BRANDS & AMBIGUOUS
    assert not (BRANDS | AMBIGUOUS) & set(named), "a group keeps a name that is then left out"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (
            lambda folder: write_package(folder, "pack-3", {}, licence="GPL-3.0"),
            "pack-3 is under GPL-3.0; expected one",
        ),
        (
            lambda folder: (folder / "package.json").write_text('{"version": "2.0.0"}'),
            "is version 2.0.0, expected 1.0.0",
        ),
        (lambda folder: (folder / "info.json").unlink(), "no .*info.json; --packages must be the folder"),
    ],
)
def test_other_packages_than_those_asked_for_are_an_error(tmp_path: Path, spoil: Callable, expected: str) -> None:
    for source in (Source("pack-2", "1.0.0"), Source("pack-3", "1.0.0")):
        write_package(tmp_path, source.package, family_icons(2))
    folder = tmp_path / "node_modules" / "@iconify-json" / "pack-3"
    spoil(tmp_path if expected.startswith("pack-3") else folder)
    families = {"two": (Source("pack-2", "1.0.0"),), "three": (Source("pack-3", "1.0.0"),)}
    with pytest.raises(UserError, match=expected):
        icons.build(tmp_path, tmp_path / "icons48.npz", families)
    assert not (tmp_path / "icons48.npz").exists()


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_names_of_one_thing_are_not_told_apart_and_names_of_two_are() -> None:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(2, 50))
    one, same, other = (unit(centre + 0.6 * generator.normal(size=(40, 50))) for centre in centres[[0, 0, 1]])
    assert resemblance(one, same) == pytest.approx(1, abs=0.1) and resemblance(one, other) == 0
    assert told_apart(one, other) > 0.95
    assert told_apart(one, same) < 0.65


def test_families_that_draw_a_difference_alike_are_consistent() -> None:
    generator = np.random.default_rng(0)
    families, sign = generator.normal(size=(30, 50)), generator.normal(size=50)
    assert consistency(unit(families), unit(families + sign)) == 1
    ways = generator.permutation(np.repeat([-1, 1], 15))[:, None]
    assert consistency(unit(families - ways * sign), unit(families + ways * sign)) < 0.6
    other = unit(generator.normal(size=(30, 50)))
    assert consistency(unit(families), other) < 0.8, "each its own difference"
    assert consistency(unit(families[:1]), unit(families[:1] + sign)) == 0


def test_agreement_is_high_for_one_shape_turned_about_and_low_for_any(small: Path) -> None:
    images = load_pack(small).images[..., 0]
    turned = np.stack([np.rot90(images[k], k % 4) for k in range(9)])  # nine drawings of one name
    mixed = np.concatenate([turned, images[9 + np.arange(9) * 14], images[60:80]])
    labels = np.repeat([0, 1, 2], [9, 9, 20])
    found = agreement(describe(mixed), labels)
    assert found[0] > 0.9 > 0.65 > found[1]


def test_classes_are_halved_and_images_are_as_stored(small: Path, arrays: dict[str, np.ndarray]) -> None:
    data = read_icons(config(small))
    for part, chosen in zip((data.train, data.test), split_classes(len(SHAPES)), strict=True):
        indices = np.isin(arrays["y"], chosen)
        assert part.classes == tuple(arrays["classes"][chosen].tolist())
        assert np.array_equal(part.images, arrays["X"][indices])
        assert part.labels.tolist() == np.repeat(np.arange(len(chosen)), 9).tolist()
    assert np.array_equal(data.families, arrays["vendor"][np.isin(arrays["y"], split_classes(len(SHAPES))[1])])
    assert data.flip is False and data.gallery is None and data.crop_padding == 3 and data.crop_fill == 255
    square = data.preprocessing
    assert (square.image_size, square.fit, square.mean, square.std) == (48, "whole", ICON_MEAN, ICON_STD)
    assert read_icons(config(small.parent, image_size=32)).train.images.shape[1:] == (32, 32, 3)


def test_classes_of_few_families_are_left_out_and_stay_on_their_side(
    tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    """Every third class loses two of its nine drawings: it has too few at 8, and enough at 7."""
    order = np.concatenate([np.arange(9)] * len(SHAPES))
    kept = (arrays["y"] % 3 > 0) | (order < 7)
    path = save(tmp_path / "icons.npz", arrays, **{name: arrays[name][kept] for name in ("X", "y", "vendor")})
    few, all_ = read_icons(config(path)), read_icons(config(path, min_families=7))
    whole = {name for name in arrays["classes"].tolist() if arrays["classes"].tolist().index(name) % 3}
    for part, before in ((few.train, all_.train), (few.test, all_.test)):
        assert part.classes == tuple(name for name in before.classes if name in whole)
        assert np.bincount(part.labels).tolist() == [9] * len(part.classes)
    assert len(all_.train.classes) + len(all_.test.classes) == len(SHAPES)
    assert len(few.families) == len(few.test)


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        (lambda a: {}, {"min_families": 11}, "--min-families 11 asks for more icon families than the 10 it has"),
        (lambda a: {}, {"min_families": 10}, "--min-families 10 leaves 0 classes to train and 0 to test on"),
        (lambda a: {"X": a["X"] // np.array([1, 2, 1], np.uint8)}, {}, "black on white.*--dataset emoji"),
        (lambda a: {"vendors": None}, {}, r"has no array vendors, strings \(V,\)"),
        (lambda a: {"X": a["X"][..., 0]}, {}, r"X must be uint8 .*got uint8 \(144, 48, 48\)"),
        (lambda a: {"y": a["y"] + 1}, {}, r"y must be 0 to 15"),
    ],
)
def test_a_set_that_does_not_do_is_one_line(
    tmp_path: Path, arrays: dict[str, np.ndarray], change: Callable, options: dict[str, int], expected: str
) -> None:
    path = save(tmp_path / "mine.npz", arrays, **change(arrays))
    with pytest.raises(UserError, match=rf"mine\.npz.*{expected}") as caught:
        read_icons(config(path, **options))
    assert "\n" not in str(caught.value)


def test_a_missing_pack_is_said(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    with pytest.raises(UserError, match=r"dataset icons needs --data-dir.*python -m idml\.data\.embedded\.icons"):
        read_icons(config())
    for name in ("a.npz", "b.npz"):
        save(tmp_path / name, arrays)
    with pytest.raises(UserError, match=r"has 2 \.npz files \(a\.npz, b\.npz\); expected one, or icons48\.npz"):
        read_icons(config(tmp_path))
    save(tmp_path / "icons48.npz", arrays)
    assert len(read_icons(config(tmp_path)).train) == 72


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "needs --data-dir"),
        (("--data-dir", "{pack}", "--min-families", "11"), "asks for more icon families than the 10 it has"),
        (("--data-dir", "{pack}", "--min-families", "0"), "--min-families: expected a value at least 1, got 0"),
        (("--data-dir", "{text}"), "is not a whole .npz file"),
    ],
)
def test_a_mistake_ends_training_before_it_starts(
    in_tmp: Path, small: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], expected: str
) -> None:
    (in_tmp / "notes.npz").write_text("no pack")
    arguments = [option.format(pack=small, text=in_tmp / "notes.npz") for option in options]
    with pytest.raises(SystemExit) as left:
        run_main(lambda: train_dml.main(["--dataset", "icons", "--model", "resnet8_cifar", *arguments]))
    assert left.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and expected in errors[0]
    assert [path.name for path in in_tmp.iterdir()] == ["notes.npz"]


def test_the_option_of_another_data_set_has_no_effect() -> None:
    with pytest.warns(
        UserWarning, match=r"--min-families 4 has no effect: it belongs to dataset icons, not emoji-mini"
    ):
        parse_dml_config(["--min-families", "4"], description="")


def test_two_steps_of_training(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["--config", str(ROOT / "configs/quick/icons.yaml"), "--data-dir", str(small), "--output-dir", str(run)]
    train_dml.main([*arguments, "--max-steps", "2", "--loader", "torch", "--log-every", "1", "--no-nmi"])
    results = json.loads((run / "results.json").read_text())
    figures = json.dumps(results)
    assert "other_families/" in figures and "R@1" in figures
    assert (run / "checkpoints/last.pt").is_file()


def test_the_set_is_verified(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify_data(["--dataset", "icons", "--data-dir", str(small)])
    printed = capsys.readouterr().out
    assert "72 images of 8 classes" in printed and printed.endswith("all good\n")


def test_the_split_of_a_pack_is_that_of_the_emoji() -> None:
    from idml.data import emoji, packs

    assert emoji.split_classes is packs.split_classes
    assert isinstance(emoji.load_embedded(), Pack)
