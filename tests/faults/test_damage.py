"""Damaged inputs: each ends in success or in one clear line and a documented exit code; nothing hangs."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from PIL import Image

import train_cls
import train_dml
from idml.errors import run_main
from tests.faults import FULL
from tests.test_resume import CLS, DML

CASES = 200 if FULL else 40
SECONDS = 60
"""After so long a case hangs."""


def damage(content: bytes, randomness: random.Random) -> bytes:
    """Cut off, overwritten, doubled, emptied, or with a few bits turned."""
    data = bytearray(content)
    place = randomness.randrange(max(len(data), 1))
    match randomness.choice(["cut", "bits", "zeros", "noise", "insert", "empty", "twice", "head"]):
        case "cut":
            return bytes(data[:place])
        case "bits":
            for _ in range(randomness.randint(1, 20)):
                data[randomness.randrange(len(data))] ^= 1 << randomness.randrange(8)
            return bytes(data)
        case "zeros":
            end = min(place + randomness.randint(1, 2000), len(data))
            data[place:end] = bytes(end - place)
            return bytes(data)
        case "noise":
            end = min(place + randomness.randint(1, 200), len(data))
            data[place:end] = randomness.randbytes(end - place)
            return bytes(data)
        case "insert":
            return bytes(data[:place]) + randomness.randbytes(randomness.randint(1, 50)) + bytes(data[place:])
        case "empty":
            return b""
        case "twice":
            return content + content
        case _:
            return randomness.randbytes(min(16, len(data))) + bytes(data[16:])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole inputs of every kind: a finished run, its config, photos in folders, a .beton, a table of labels."""
    base = tmp_path_factory.mktemp("inputs")
    generator = np.random.default_rng(1)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("a", "b", "c", "d"):
            folder = base / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((30, 24))
                image.save(folder / f"{number}.{'jpg' if number % 2 else 'png'}")
    options = ["--dataset", "folder", "--data-dir", str(base / "photos"), "--image-size", "16", "--batch-size", "8"]
    options += ["--model", "resnet8_cifar", "--epochs", "1", "--no-verbose"]
    cache = ["--loader", "ffcv", "--cache-dir", str(base / "cache")]
    train_cls.main([*options, *cache, "--output-dir", str(base / "folder-run")])
    train_cls.main([*CLS, "--max-steps", "2", "--output-dir", str(base / "run")])
    rows = ["path,label,split"]
    for path in sorted((base / "photos").rglob("*.*")):
        split = "train" if path.parent.name in "ab" else "test"
        rows.append(f"{path.relative_to(base / 'photos')},{path.parent.name},{split}")
    (base / "labels.csv").write_text("\n".join(rows) + "\n")
    return base


def image_case(inputs: Path, work: Path, randomness: random.Random) -> Callable[[], object]:
    shutil.copytree(inputs / "photos", work / "photos")
    for path in randomness.sample(sorted((work / "photos").rglob("*.*")), 3):
        path.write_bytes(damage(path.read_bytes(), randomness))
    options = ["--dataset", "folder", "--data-dir", str(work / "photos"), "--image-size", "16", "--batch-size", "8"]
    options += ["--model", "resnet8_cifar", "--max-steps", "1", "--no-verbose", "--cache-dir", str(work / "cache")]
    options += ["--loader", randomness.choice(["torch", "ffcv"])]
    options += ["--skip-bad-images"] if randomness.random() < 0.5 else []
    return lambda: train_cls.main([*options, "--output-dir", str(work / "out")])


def beton_case(inputs: Path, work: Path, randomness: random.Random) -> Callable[[], object]:
    shutil.copytree(inputs / "cache", work / "cache")
    chosen = randomness.choice(sorted((work / "cache").iterdir()))
    chosen.write_bytes(damage(chosen.read_bytes(), randomness))
    options = ["--dataset", "folder", "--data-dir", str(inputs / "photos"), "--image-size", "16", "--batch-size", "8"]
    options += ["--model", "resnet8_cifar", "--max-steps", "2", "--no-verbose", "--loader", "ffcv"]
    return lambda: train_cls.main([*options, "--cache-dir", str(work / "cache"), "--output-dir", str(work / "out")])


def checkpoint_case(inputs: Path, work: Path, randomness: random.Random) -> Callable[[], object]:
    shutil.copytree(inputs / "run", work / "run")
    for path in (work / "run/checkpoints").iterdir():
        if randomness.random() < 0.7:
            path.write_bytes(damage(path.read_bytes(), randomness))
    path = randomness.choice(sorted((work / "run/checkpoints").iterdir()))
    match randomness.choice(["resume", "eval", "pretrained"]):
        case "resume":
            return lambda: train_cls.main(["--resume", str(work / "run"), "--max-steps", "3"])
        case "eval":
            return lambda: train_cls.main(["--eval-only", "--checkpoint", str(path), "--output-dir", str(work / "out")])
        case _:
            options = [*CLS, "--pretrained", str(path), "--max-steps", "1", "--output-dir", str(work / "out")]
            return lambda: train_cls.main(options)


def config_case(inputs: Path, work: Path, randomness: random.Random) -> Callable[[], object]:
    config = work / "config.yaml"
    config.write_bytes(damage((inputs / "run/config.yaml").read_bytes(), randomness))
    return lambda: train_cls.main(["--config", str(config), "--max-steps", "1", "--output-dir", str(work / "out")])


def labels_case(inputs: Path, work: Path, randomness: random.Random) -> Callable[[], object]:
    table = work / "labels.csv"
    table.write_bytes(damage((inputs / "labels.csv").read_bytes(), randomness))
    options = ["--dataset", "csv", "--csv", str(table), "--data-dir", str(inputs / "photos"), "--ks", "1"]
    options += ["--batch-size", "4", "--max-steps", "1"]
    return lambda: train_dml.main([*DML, *options, "--output-dir", str(work / "out")])


KINDS = [image_case, beton_case, checkpoint_case, config_case, labels_case]


@pytest.fixture
def no_hang() -> Iterator[None]:
    """A case that takes too long fails."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"still running after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.usefixtures("no_hang")
@pytest.mark.parametrize("seed", range(CASES))
def test_damage_ends_in_success_or_one_line(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.chdir(tmp_path)
    randomness = random.Random(seed)
    case = KINDS[seed % len(KINDS)](inputs, tmp_path, randomness)
    capsys.readouterr()
    code: object = 0
    try:
        run_main(case)  # an exception that gets out of it is a traceback for the user
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    assert code in (0, 1, 2, 74), captured.err
    errors = [line for line in captured.err.splitlines() if not line.startswith("warning: ")]
    assert (len(errors) == 1 and errors[0].startswith("error: ")) if code else not errors, captured.err
    if code == 2 and (tmp_path / "out").exists():
        assert not (tmp_path / "out/results.json").exists()
