"""How whole runs with worker processes end: nothing on stderr, or one line."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from idml.data.torch_loader import TorchLoader, close_loaders
from tests.test_train_cls import ROOT
from tests.test_users_files import put_classes

OPTIONS = ["--model", "resnet8_cifar", "--image-size", "32", "--batch-size", "8", "--threads", "1", "--loader", "torch"]
OPTIONS += ["--max-steps", "2"]
ALL = ["--val-fraction", "0"]  # there are two classes to train on

RUNS = {
    "classes": ["train_cls.py", "--dataset", "folder", "--data-dir", "split", *OPTIONS],
    "retrieval": ["train_dml.py", "--dataset", "folder", "--data-dir", "photos", "--ks", "1", *ALL, *OPTIONS],
    "table": [
        "train_dml.py",
        "--dataset",
        "csv",
        "--csv",
        "photos/table.csv",
        "--ks",
        "1",
        "--eval-every",
        "2",
        *ALL,
        *OPTIONS,
    ],
}
EVALUATE = ["-m", "idml", "evaluate", "--checkpoint", "run classes 0", "--data-dir", "split"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """``photos/<class>``, ``photos/table.csv`` and ``split/{train,val}/<class>``."""
    put_classes(tmp_path / "photos", "abcd")
    for split in ("train", "val"):
        put_classes(tmp_path / "split" / split, "abc")
    with (tmp_path / "photos/table.csv").open("w", newline="", encoding="utf-8") as stream:
        rows = [(f"{label}/{number}.png", label) for label in "abcd" for number in range(6)]
        csv.writer(stream).writerows([("path", "label"), *rows])
    return tmp_path


def start(place: Path, arguments: list[str], **options: str) -> subprocess.Popen[str]:
    script = [str(ROOT / arguments[0]), *arguments[1:]] if arguments[0].endswith(".py") else arguments
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | options
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *script], cwd=place, text=True, env=environment, **pipes)  # type: ignore[call-overload]


def check_endings(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        out, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (0, ""), f"{process.args}: {out}"


def test_runs_that_succeed_say_nothing(place: Path) -> None:
    """With the default number of workers, of which there may be more than CPUs."""
    for kind, arguments in RUNS.items():
        check_endings(start(place, [*arguments, "--output-dir", f"run {kind} 0"]))
    check_endings(start(place, EVALUATE))


@pytest.mark.slow
def test_twenty_runs_that_succeed_say_nothing_under_load(place: Path) -> None:
    """Four programs at once, each with workers of its own: more than there are CPUs, while the last of them ends."""
    check_endings(start(place, [*RUNS["classes"], "--output-dir", "run classes 0"]))
    for time in range(1, 6):
        runs = [start(place, [*arguments, "--output-dir", f"run {kind} {time}"]) for kind, arguments in RUNS.items()]
        check_endings(*runs, start(place, EVALUATE))


@pytest.mark.parametrize("script", ["train_cls.py", "train_dml.py"])
def test_an_image_that_vanishes_while_workers_run(place: Path, script: str) -> None:
    arguments = RUNS["classes" if script == "train_cls.py" else "retrieval"]
    process = start(place, [*arguments[:-2], "--epochs", "500", "--output-dir", "run"])
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    for gone in (place / "split/train/a/3.png", place / "photos/a/3.png"):
        gone.unlink()
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 1, out
    assert errors.count("\n") == 1 and errors.startswith("error: ") and "a/3.png could not be read" in errors


@pytest.mark.parametrize(
    ("message", "size", "one_line"),
    [
        ("[pair.cc:547] Connection closed by peer [127.0.0.1]:5301", "2", True),
        ("[pair.cc:547] Connection closed by peer [127.0.0.1]:5301", "1", False),
        ("something else", "2", False),
    ],
)
def test_a_rank_whose_partner_is_gone(place: Path, message: str, size: str, one_line: bool) -> None:
    """One line, for it was not at fault; and a traceback for whatever else is raised."""
    code = f"def main():\n    raise RuntimeError({message!r})\nfrom idml.errors import run_main\nrun_main(main)"
    process = start(place, ["-c", code], WORLD_SIZE=size, RANK="1")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and (errors.count("\n") == 1) == one_line
    assert errors.startswith("error (rank 1): another process has ended") == one_line


def test_a_run_that_is_stopped_ends_with_one_line(place: Path) -> None:
    process = start(place, [*RUNS["classes"][:-2], "--epochs", "500", "--output-dir", "run"])
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    lines = [line for line in errors.splitlines() if line != "finishing the step, then saving"]
    assert process.returncode == 143 and len(lines) == 1 and lines[0].startswith("stopped after step")


SCRIPT = """
import sys
from idml.data.image_files import list_class_folders
from idml.data.torch_loader import TorchLoader
loader = TorchLoader(list_class_folders(__import__("pathlib").Path("photos"), layout=""), batch_size=4, image_size=32,
                     train=False, workers=2)
batches = loader.epoch(0)
next(batches)
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"), [("", 0), ("sys.exit(3)", 3), ("loader = None", 0), ("loader.close(); loader.close()", 0)]
)
def test_programs_of_ones_own_end_quietly(place: Path, end: str, code: int) -> None:
    """In the middle of an epoch, whoever still holds its iterator."""
    process = start(place, ["-c", SCRIPT.format(end=end)])
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (code, "")


def workers_of(loader: TorchLoader) -> list[int]:
    running = loader._loader._iterator
    return [] if running is None else [worker.pid for worker in running._workers]  # type: ignore[attr-defined]


def alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists() and "Z" not in Path(f"/proc/{process}/stat").read_text().split(")")[1][:3]


def test_workers_end_with_their_loader(place: Path) -> None:
    from idml.data.image_files import list_class_folders

    dataset = list_class_folders(place / "photos", layout="")
    loader = TorchLoader(dataset, batch_size=4, image_size=32, train=False, workers=2)
    first = [labels.tolist() for _, labels in loader.epoch(0)]
    processes = workers_of(loader)
    assert len(processes) == 2 and all(map(alive, processes))
    assert [labels.tolist() for _, labels in loader.epoch(1)] == first and workers_of(loader) == processes, "they stay"
    loader.close()
    assert not any(map(alive, processes)) and workers_of(loader) == []
    assert [labels.tolist() for _, labels in loader.epoch(2)] == first, "it starts new ones"
    processes = workers_of(loader)
    close_loaders()
    assert not any(map(alive, processes))
    assert next(loader.epoch(3))[1].tolist() == first[0]
    processes = workers_of(loader)
    del loader
    assert not any(map(alive, processes)), "no circle of references keeps them"


DELETED = """
from idml.errors import run_main
class Thing:
    def __init__(self, error):
        self.error = error
    def __del__(self):
        raise self.error
def main():
    Thing(RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."))
    Thing(ValueError("this is told"))
run_main(main)
"""


def test_what_torch_says_while_python_tidies_up(place: Path) -> None:
    """It cannot be raised there, and the loader says the same in a line of its own; other errors are still told of."""
    _, errors = start(place, ["-c", DELETED]).communicate(timeout=60)
    assert "this is told" in errors and "DataLoader worker" not in errors
