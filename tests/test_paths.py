"""Paths and names as users write them: ``~``, accents in either form, absolute paths in tables, and mistyped ones."""

from __future__ import annotations

import csv
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import idml
import train_cls
import train_dml
from idml.audit.answers import labels_for
from idml.checkpoint import read_checkpoint
from idml.commands.embed import embed
from idml.commands.evaluate import evaluate
from idml.commands.info import info
from idml.commands.search import search
from idml.config_cls import parse_cls_config
from idml.config_dml import parse_dml_config
from idml.data.collection import read_collection
from idml.data.datasets import read_splits
from idml.data.ffcv_write import ffcv_write
from idml.data.image_files import list_class_folders
from idml.data.listing import inside
from idml.data.retrieval_folder import list_csv, list_folder
from idml.data.verify import verify_data
from idml.embedding_file import read_table
from idml.errors import UserError
from idml.evaluating import of_folder
from idml.paths import missing, user_path
from idml.tables import print_table
from tests.test_users_files import SMALL, cls, put_classes


def nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def nfd(name: str) -> str:
    return unicodedata.normalize("NFD", name)


# ---- class names in either form ----

CHEESE = ("Käse", "Brötchen", "Ünye", "한국")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``photos/{train (NFC), val (NFD)}`` and a model of them in ``run``."""
    root = tmp_path_factory.mktemp("mixed")
    put_classes(root / "photos/train", [nfc(name) for name in CHEESE])
    put_classes(root / "photos/val", [nfd(name) for name in CHEESE], 2)
    assert {path.name for path in (root / "photos/train").iterdir()}.isdisjoint(
        path.name for path in (root / "photos/val").iterdir()
    ), "the disk keeps them apart"
    train_cls.main(
        ["--dataset", "folder", "--data-dir", str(root / "photos"), *SMALL, "--output-dir", str(root / "run")]
    )
    return root


def test_classes_meet_in_one_form(mixed: Path) -> None:
    data = read_splits(cls(mixed / "photos"))
    assert data.train.classes == data.test.classes == tuple(sorted(map(nfc, CHEESE)))
    assert all(path.is_file() for path in (*data.train.paths, *data.test.paths)), (
        "files open by their names on the disk"
    )
    assert nfd("Käse") in {path.parent.name for path in data.test.paths}
    assert set(read_collection(mixed / "photos").dataset.classes) == set(data.train.classes)


def test_one_class_in_two_folders(tmp_path: Path) -> None:
    root = put_classes(tmp_path, [nfc("Käse"), nfd("Käse"), "b"], 2)
    found = list_class_folders(root, layout="")
    assert found.classes == (nfc("Käse"), "b") or found.classes == ("b", nfc("Käse"))
    assert np.bincount(found.labels).tolist() in ([4, 2], [2, 4])
    assert set(read_collection(root).dataset.classes) == {"b", nfc("Käse")}


def test_models_and_data_meet_in_one_form(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = idml.load(mixed / "run", device="cpu")
    collection = read_collection(mixed / "photos")
    labels, classes = labels_for(model, collection, use_labels=True)
    assert [classes[label] for label in labels] == list(collection.labels)
    assert len(of_folder(collection, model, "val").dataset) == 8
    evaluate(["--checkpoint", str(mixed / "run"), "--data-dir", str(mixed / "photos"), "-j", "0"])
    assert "8 images, val images" in capsys.readouterr().out
    out = str(tmp_path / "E.npz")
    embed(["--checkpoint", str(mixed / "run"), "--data-dir", str(mixed / "photos"), "--out", out, "-j", "0"])
    table = read_table(out)
    assert set(table.labels) == set(map(nfc, CHEESE))
    assert all((mixed / "photos" / path).is_file() for path in table.paths)


def test_a_checkpoint_with_names_in_the_other_form(mixed: Path, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "old.pt"
    stored = torch.load(mixed / "run/checkpoints/last.pt", weights_only=True)
    torch.save(stored | {"classes": [nfd(name) for name in stored["classes"]]}, path)
    assert read_checkpoint(path)["classes"] == sorted(map(nfc, CHEESE))
    arguments = ["--eval-only", "--checkpoint", str(path), "--output-dir", str(tmp_path / "out"), "--workers", "0"]
    assert train_cls.main(arguments) is not None
    assert idml.load(path, device="cpu").classes == tuple(sorted(map(nfc, CHEESE)))


def test_retrieval_splits_and_tables_in_either_form(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    put_classes(root / "train", ["a", "b"], 2)
    put_classes(root / "query", [nfc("Käse"), "d"], 1)
    put_classes(root / "gallery", [nfd("Käse"), "d"], 2)
    listing = list_folder(root, 0.5)
    assert listing.classes == tuple(sorted(["a", "b", nfc("Käse"), "d"])) and not listing.problems
    put_classes(root / "train", [nfd("Käse")], 2)
    from idml.data.listing import split_problems

    assert "1 classes are in both training and test" in split_problems(list_folder(root, 0.5))[0]


def test_transformer_labels_in_either_form() -> None:
    from idml.transformer import _labels

    classes, labels = _labels(np.array([nfc("Käse"), nfd("Käse"), "b"]), 3)
    assert classes.tolist() == sorted(["b", nfc("Käse")]) and labels[0] == labels[1] != labels[2]


# ---- tables ----


def write_table(root: Path, rows: list[tuple[str, str]], file: Path | None = None) -> Path:
    file = file or root / "table.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("path", "label"), *rows])
    return file


@pytest.fixture
def table_root(tmp_path: Path) -> Path:
    return put_classes(tmp_path / "photos", "abcd", 2)


def relative(listing: Any, root: Path) -> set[str]:
    return {record.path.relative_to(root).as_posix() for record in listing.records}


def test_absolute_paths_below_the_root(table_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{label}/{number}.png" for label in "abcd" for number in range(2)]
    file = write_table(
        table_root, [(str(table_root / name) if index % 2 else name, name[0]) for index, name in enumerate(names)]
    )
    assert relative(list_csv(str(file), str(table_root), 0.5), table_root) == set(names)
    assert relative(list_csv(str(file), None, 0.5), table_root) == set(names), "of the table's own folder"
    monkeypatch.chdir(tmp_path)
    found = list_csv("photos/table.csv", "photos", 0.5)
    assert relative(found, Path("photos")) == set(names) and not found.problems
    (tmp_path / "link").symlink_to(table_root)
    assert relative(list_csv(str(file), str(tmp_path / "link"), 0.5), tmp_path / "link") == set(names)
    through = write_table(table_root, [(str(tmp_path / "link" / name), name[0]) for name in names])
    assert relative(list_csv(str(through), str(table_root), 0.5), table_root) == set(names)
    monkeypatch.setenv("HOME", str(tmp_path))
    home = write_table(table_root, [(f"~/photos/{name}", name[0]) for name in names])
    assert relative(list_csv(str(home), str(table_root), 0.5), table_root) == set(names)


@pytest.mark.parametrize("name", ["/etc/hostname", "{root}x/a.png", "{root}/../x.png", "C:\\photos\\a.png", "~/a.png"])
def test_paths_outside_the_root_are_refused(table_root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere/at/all")
    name = name.format(root=table_root)
    with pytest.raises(UserError, match=r"expected a path below .*photos( without '\.\.')?, got "):
        inside(table_root, name)
    listing = list_csv(str(write_table(table_root, [(name, "a"), ("a/0.png", "a")])), None, 0.5)
    assert "line 2: expected a path below" in listing.problems[0]


def test_the_same_file_by_two_paths_is_found(table_root: Path) -> None:
    file = write_table(table_root, [("a/0.png", "a"), (str(table_root / "a/0.png"), "b")])
    assert "is in line 2 already" in list_csv(str(file), None, 0.5).problems[0]


def test_a_table_whose_files_have_other_code_points(table_root: Path) -> None:
    (table_root / "a" / "0.png").rename(table_root / "a" / nfd("größe.png"))
    rows = [(f"a/{nfc('größe.png')}", nfd("Käse")), ("a/1.png", nfc("Käse"))]
    rows += [(f"{label}/{number}.png", label) for label in "bcd" for number in range(2)]
    listing = list_csv(str(write_table(table_root, rows)), None, 0.5)
    assert nfc("Käse") in listing.classes and len(listing.classes) == 4
    assert all(record.path.is_file() for record in listing.records)


def test_splits_of_a_table_in_any_spelling(table_root: Path) -> None:
    rows = [("path", "label", "split")]
    rows += [(f"{label}/{n}.png", label, "TRAIN" if label in "ab" else "Testing") for label in "abcd" for n in range(2)]
    file = table_root / "table.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    assert {split: counts.images for split, counts in list_csv(str(file), None, 0.5).counts().items()} == {
        "train": 4,
        "test": 4,
    }


# ---- mistyped and short paths ----


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home directory and current folder, with ``photos/{train,val}`` in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        put_classes(tmp_path / "photos" / split, "ab", 4)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("photo", "no folder photo: the nearest that exists is the current folder; did you mean photos?"),
        ("photos/trian", "no folder photos/trian: the nearest that exists is photos; did you mean photos/train?"),
        (
            "Photos/train",
            "no folder Photos/train: the nearest that exists is the current folder; did you mean photos/train?",
        ),
        ("photos/train/x/y/z", "no folder photos/train/x/y/z: the nearest that exists is photos/train"),
        ("photos/train/a/0.png", "no folder photos/train/a/0.png: it is a file"),
        ("photos/train/a/0.png/x", "no folder photos/train/a/0.png/x: photos/train/a/0.png is a file"),
        ("gone", "no folder gone: it is a link that leads nowhere, to /mnt/nas"),
        ("quite other", "no folder quite other: the nearest that exists is the current folder"),
    ],
)
def test_what_is_said_of_a_wrong_path(home: Path, path: str, expected: str) -> None:
    (home / "gone").symlink_to("/mnt/nas")
    assert missing(path) == expected
    with pytest.raises(UserError) as error:
        read_collection(path)
    assert str(error.value).startswith(f"{expected}; expected images anywhere below DIR")


CLS = ["--dataset", "folder", *SMALL]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data-dir", "phtos"],
        ["--data-dir", "phtos", "--val-fraction", "0.3"],
        ["--train-dir", "phtos/train", "--val-dir", "photos/val"],
        ["--train-dir", "photos/train", "--val-dir", "phtos/val"],
        ["--data-dir", "photos", "--pretrained", "phtos/weights.pth"],
        ["--data-dir", "photos", "--resume", "phtos/run"],
        ["--config", "phtos/config.yaml"],
        ["--eval-only", "--checkpoint", "phtos/last.pt"],
    ],
)
def test_scripts_name_the_nearest_path(home: Path, arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"the nearest that exists is the current folder; did you mean photos") as error:
        train_cls.main([*CLS, *arguments])
    assert "\n" not in str(error.value)
    if not {"--train-dir", "--val-fraction", "--pretrained"} & set(arguments):
        with pytest.raises(UserError, match=r"the nearest that exists is the current folder; did you mean photos"):
            train_dml.main([*CLS, *arguments, "--ks", "1"])


def test_commands_name_the_nearest_path(home: Path, mixed: Path) -> None:
    run = str(mixed / "run")
    put_classes(home / "queries", "a", 1)
    embed(["--checkpoint", run, "--data-dir", "queries", "--out", "E.npz", "-j", "0"])
    for command, arguments in (
        (embed, ["--checkpoint", run, "--data-dir", "quries", "--out", "x.npz"]),
        (evaluate, ["--checkpoint", run, "--data-dir", "quries"]),
        (search, ["--index", "E.npz", "--query", "quries/a/0.png", "-k", "1"]),
        (search, ["--index", "quries.npz", "--query", "queries"]),
        (search, ["--index", "E.npz", "--query", "queries", "--data-dir", "quries", "-k", "1"]),
        (info, ["quries"]),
        (print_table, ["quries"]),
        (verify_data, ["--dataset", "folder", "--data-dir", "quries"]),
        (verify_data, ["--dataset", "csv", "--csv", "quries/table.csv"]),
        (verify_data, ["--dataset", "cub", "--data-dir", "quries"]),
        (verify_data, ["--dataset", "emoji", "--data-dir", "quries"]),
        (ffcv_write, ["--dataset", "folder", "--data-dir", "quries", "--out", "x.beton"]),
        (ffcv_write, ["--dataset", "imagenet", "--data-dir", "quries", "--out", "x.beton"]),
        (ffcv_write, ["--dataset", "fashion-mnist", "--data-dir", "quries", "--out", "x.beton"]),
        (ffcv_write, ["--dataset", "cifar10", "--data-dir", "quries", "--out", "x.beton"]),
    ):
        with pytest.raises(UserError, match=r"did you mean queries"):
            command(arguments)


def test_home_is_expanded_in_flags_and_files(home: Path) -> None:
    (home / "config.yaml").write_text("data_dir: ~/photos\ncache_dir: ~/cache\noutput_dir: ~/run\n", encoding="utf-8")
    config, _ = parse_cls_config(["--config=~/config.yaml", "--dataset", "folder"], description="")
    assert (config.data_dir, config.cache_dir) == (f"{home}/photos", f"{home}/cache")
    assert config.output_dir == f"{home}/run"
    config, _ = parse_cls_config(
        ["--dataset", "folder", "--train-dir=~/photos/train", "--val-dir=~/photos/val"], description=""
    )
    assert (config.train_dir, config.val_dir) == (f"{home}/photos/train", f"{home}/photos/val")
    table, _ = parse_dml_config(["--dataset", "csv", "--csv=~/t.csv", "--pretrained=~/w.pth"], description="")
    assert (table.csv, table.data_dir, table.pretrained) == (f"{home}/t.csv", str(home), f"{home}/w.pth")
    train_cls.main(["--data-dir=~/photos", "--output-dir=~/out", *CLS])
    assert (home / "out/results.json").is_file() and not (home / "~").exists()
    embed(["--checkpoint=~/out", "--data-dir=~/photos/val", "--out=~/E.npz", "-j", "0"])
    search(["--index=~/E.npz", "--query=~/photos/val/a/0.png", "-k", "1", "--out=~/found.csv", "--sheet=~/sheet.png"])
    assert (home / "found.csv").is_file() and (home / "sheet.png").is_file() and not (home / "~").exists()
    info(["--checkpoint=~/out"])
    print_table(["~/out"])
    assert idml.load("~/out", device="cpu").classes == ("a", "b")
    assert len(read_collection("~/photos")) == 16 and len(read_table("~/E.npz")) == 8


def test_paths_typed_with_other_code_points(home: Path) -> None:
    put_classes(home / nfd("Käse") / "Größe", "ab", 2)
    (home / nfd("Käse") / "Größe").rename(home / nfd("Käse") / nfd("Größe"))
    config, _ = parse_cls_config(["--dataset", "folder", "--data-dir", f"{nfc('Käse')}/{nfc('Größe')}"], description="")
    assert config.data_dir is not None and Path(config.data_dir).is_dir()
    assert user_path(nfc("Käse/Größe/c")) == Path(nfc("Käse/Größe/c")), "what is not there stays as it is"
    assert user_path("photos") == Path("photos") and user_path(home / "photos") == home / "photos"
    assert os.path.expanduser("~") == str(home)
