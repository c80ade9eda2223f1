"""``python -m idml verify-data``: a report of everything that is wrong, then exit code 2 and one line."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from idml.__main__ import main
from idml.data import verify as verify_module
from idml.data.verify import verify_data
from idml.errors import UserError, run_main
from tests.test_cars import write_kit, write_one_file
from tests.test_retrieval_folder import GOOD, write_csv, write_folders
from tests.test_retrieval_readers import write_cub, write_full_cub, write_inshop, write_photo, write_sop

Output = pytest.CaptureFixture[str]


def verify(dataset: str, data_dir: Path, *options: str) -> None:
    verify_data(["--dataset", dataset, "--data-dir", str(data_dir), "-j", "2", *options])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("dataset", "write", "found"),
    [
        (
            "cub",
            write_cub,
            ["train      9 images of 3 classes (full set: 5864 images of 100 classes)", "full set   no"],
        ),
        ("cars", write_one_file, ["found as   cars_annos.mat and car_ims/", "test       3 images of 2 classes"]),
        ("cars", write_kit, ["found as   development kit, cars_train/ and cars_test/ merged"]),
        ("sop", write_sop, ["data set   Stanford Online Products", "(full set: 60502 images of 11316 classes)"]),
        ("SOP", write_sop, ["files that do not decode, of 8: none"]),
        ("inshop", write_inshop, ["query      2 images of 2 classes (full set: 14218 images of 3985 classes)"]),
        ("Inshop", write_inshop, ["gallery    3 images of 3 classes"]),
        ("folder", lambda root: write_folders(root, "abcde"), ["train      6 images of 3 classes\n"]),
    ],
)
def test_good_data_are_described(
    tmp_path: Path, capsys: Output, dataset: str, write: Callable[[Path], None], found: list[str]
) -> None:
    write(tmp_path)
    verify(dataset, tmp_path)
    printed = capsys.readouterr()
    assert printed.out.endswith("all good\n")
    assert str(tmp_path) in printed.out
    assert all(line in printed.out for line in found), printed.out
    assert printed.err == "", "no bar where there is no terminal"


def test_a_good_table_is_described(tmp_path: Path, capsys: Output) -> None:
    rows = [[f"{label}.jpg", label] for label in "abcd"]
    file = write_csv(tmp_path, [["path", "label"], *rows])
    verify_data(["--dataset", "csv", "--csv", str(file), "--test-fraction", "0.5"])
    assert "test       2 images of 2 classes\n" in capsys.readouterr().out


def test_missing_and_damaged_files_and_lists_are_told_together(tmp_path: Path, capsys: Output) -> None:
    write_sop(tmp_path)
    (tmp_path / "Ebay_test.txt").unlink()
    (tmp_path / "bicycle_final/1_2.JPG").unlink()
    truncate(tmp_path / "chair_final/10_4.JPG")
    with pytest.raises(
        UserError,
        match=r"^sop: 1 problems with lists, classes or counts; 1 files missing; 1 files do not decode; the report",
    ):
        verify("sop", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-6].startswith("wrong lists, classes or counts: 1")
    assert "cannot read" in lines[-5] and "Ebay_test.txt" in lines[-5]
    assert lines[-4:-2] == ["missing files, of 4 listed: 1", f"  {tmp_path}/bicycle_final/1_2.JPG"]
    assert lines[-2] == "files that do not decode, of 3: 1"
    assert lines[-1].startswith(f"  {tmp_path}/chair_final/10_4.JPG (") and "Truncated File Read" in lines[-1]


def test_the_first_ten_are_named(tmp_path: Path, capsys: Output) -> None:
    names = [f"{number:02d}.jpg" for number in range(24)]
    rows = [[name, "abcd"[number % 4]] for number, name in enumerate(names)]
    file = write_csv(tmp_path, [["path", "label"], *rows])
    for name in names[:11]:
        (tmp_path / name).unlink()
    for name in names[11:23]:
        truncate(tmp_path / name)
    with pytest.raises(UserError, match=r"^csv: 11 files missing; 12 files do not decode"):
        verify("csv", tmp_path, "--csv", str(file))
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("missing files, of 24 listed: 11")
    assert lines[start + 1 : start + 11] == [f"  {tmp_path}/{name}" for name in names[:10]]
    assert lines[start + 11 : start + 13] == ["  ... and 1 more", "files that do not decode, of 13: 12"]
    assert [line.split()[0] for line in lines[start + 13 : start + 23]] == [
        f"{tmp_path}/{name}" for name in names[11:21]
    ]
    assert lines[start + 23 :] == ["  ... and 2 more"]


def test_bad_rows_do_not_hide_bad_files(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "table.csv").write_text(GOOD.replace("y,train", "y,trian"))
    write_photo(tmp_path / "a.jpg", 0)
    with pytest.raises(UserError, match=r"^csv: 1 problems .*; 2 files missing; the report"):
        verify("csv", tmp_path, "--csv", str(tmp_path / "table.csv"))
    printed = capsys.readouterr().out
    assert "line 3: expected split" in printed
    assert f"  {tmp_path}/c.jpg\n  {tmp_path}/d.jpg\n" in printed


def test_the_full_cub_and_one_image_less(tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    write_full_cub(tmp_path)
    decoded: list[Path] = []
    monkeypatch.setattr(verify_module, "decoding_error", decoded.append)  # all are links to one photo
    verify("cub", tmp_path)
    assert "full set   yes" in capsys.readouterr().out
    assert len(set(decoded)) == len(decoded) == 11788
    (tmp_path / "images/007.Bird/Bird_1_00006.jpg").unlink()
    with pytest.raises(UserError, match=r"^cub: 1 files missing; the report"):
        verify("cub", tmp_path)
    assert f"  {tmp_path}/images/007.Bird/Bird_1_00006.jpg\n" in capsys.readouterr().out


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["idml", *arguments])
    try:
        run_main(main)
    except SystemExit as end:
        return end.code
    return 0


def test_exit_codes_and_the_final_line(tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cub(tmp_path)
    arguments = ("verify-data", "--dataset", "cub", "--data-dir", str(tmp_path))
    assert run_command(monkeypatch, *arguments) == 0
    truncate(tmp_path / "images/101.Bird_101/Bird_101_0001.jpg")
    capsys.readouterr()
    assert run_command(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: cub: 1 files do not decode; the report above names them\n"
    assert "Bird_101_0001.jpg (" in printed.out and "all good" not in printed.out


def test_help_names_the_data_sets(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_command(monkeypatch, "verify-data", "--help") == 0
    printed = capsys.readouterr().out
    assert "--data-dir" in printed and "inshop" in printed
    assert run_command(monkeypatch, "--help") == 0
    assert "verify-data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "--dataset is missing: one of cub, cars, sop, inshop, folder, csv, emoji-mini, emoji"),
        (("--dataset", "cup"), r"--dataset: expected one of cub, .*, got 'cup'; did you mean cub"),
        (("--dataset", "cifar10"), r"--dataset: expected one of cub, .*emoji.*, got 'cifar10'"),
        (("--data-dirs", "x"), "unknown option --data-dirs; did you mean data-dir"),
        (("--dataset", "folder"), "dataset folder needs --data-dir"),
        (("--dataset", "csv"), "dataset csv needs --csv FILE"),
        (("--dataset", "cub", "--data-dir", "nowhere"), "no CUB-200-2011.*there is no folder nowhere"),
        (("--dataset", "folder", "--data-dir", ".", "--test-fraction", "1.5"), "between 0.01 and 0.99, got 1.5"),
        (("--dataset", "folder", "--data-dir", ".", "--test-fraction", "0"), "between 0.01 and 0.99, got 0"),
        (("--dataset", "folder", "--data-dir", ".", "--workers", "-1"), "--workers: expected a value at least 0"),
    ],
)
def test_bad_options_are_told(in_tmp: Path, arguments: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        verify_data(arguments)


def test_a_bar_is_drawn_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    write_sop(tmp_path)
    for options, drawn in (((), True), (("--no-verbose",), False)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        verify("sop", tmp_path, *options)
        assert ("8/8" in terminal.getvalue()) == drawn


def test_the_emoji_in_the_package_are_good(capsys: Output) -> None:
    verify_data(["--dataset", "emoji-mini"])
    printed = capsys.readouterr().out
    assert "\ntrain " in printed and "\ntest " in printed and printed.endswith("all good\n")
