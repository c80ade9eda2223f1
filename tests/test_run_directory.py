"""Runs that start at once: each has a directory of its own, and a directory has one run."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from idml.config_cls import ClsConfig
from idml.errors import UserError
from idml.run import Run
from idml.run_directory import LOCK, DirectoryLock, new_directory, run_directory
from tests.test_distributed import launch
from tests.test_train_cls import ROOT

QUICK = ["--method", "baseline", "--model", "resnet8_cifar", "--max-steps", "1", "--batch-size", "8", "--threads", "1"]
QUICK += ["--dataset", "digits", "--no-verbose", "--no-introspect"]


def at_once(count: int, function: Callable[[], Any]) -> list[Any]:
    """What ``function`` gives, or the text of its error, in so many processes that call it at the same moment."""
    context = multiprocessing.get_context("fork")
    start, end, results = context.Barrier(count), context.Barrier(count), context.Queue()

    def process() -> None:
        start.wait()
        try:
            results.put(function())
        except UserError as error:
            results.put(f"error: {error}")
        end.wait(60)  # none has ended while another one begins

    processes = [context.Process(target=process) for _ in range(count)]
    for each in processes:
        each.start()
    found = [results.get(timeout=60) for _ in processes]
    for each in processes:
        each.join(60)
        assert each.exitcode == 0
    return found


def test_runs_of_one_second_get_a_directory_each(in_tmp: Path) -> None:
    for round in range(10):
        found = at_once(4, lambda name=f"a{round}": str(new_directory(name)))  # type: ignore[misc]
        assert len(set(found)) == 4 and all(Path(path).is_dir() for path in found), found
        assert all(re.fullmatch(rf"runs/a{round}-\d{{8}}-\d{{6}}(-[234])?", path) for path in found)


KEPT: list[Run] = []
"""Runs of a process: a run that nobody holds any more has ended, and its directory is free."""


def begun(folder: Path) -> Run:
    KEPT.append(Run(folder, ClsConfig()))
    return KEPT[-1]


def test_one_directory_has_one_run(tmp_path: Path) -> None:
    for round in range(10):
        folder = tmp_path / f"run {round}"
        if round % 2:
            folder.mkdir()
        found = at_once(3, lambda folder=folder: str(begun(folder).directory))  # type: ignore[misc]
        refused = [text for text in found if text.startswith("error: ")]
        assert len(refused) == 2 and str(folder) in found, found
        assert all("another run is writing to" in text and "give another --output-dir" in text for text in refused)
        Run(folder, ClsConfig())  # the first one has ended without a result: the directory is free


def test_a_finished_or_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    lock.release()
    lock.release()
    assert not list(tmp_path.iterdir())
    script = "from pathlib import Path\nfrom idml.run_directory import DirectoryLock\nimport time\n"
    script += f"lock = DirectoryLock(Path({str(tmp_path)!r}))\nprint('has it', flush=True)\ntime.sleep(60)"
    owner = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "has it\n"
    with pytest.raises(UserError, match=f"process {owner.pid} on "):
        DirectoryLock(tmp_path)
    owner.kill()
    owner.wait()
    DirectoryLock(tmp_path).release()


def test_a_place_that_cannot_be_written_to_is_told(in_tmp: Path) -> None:
    assert run_directory("anywhere", "name") == Path("anywhere")
    (in_tmp / "runs").write_text("a file")
    with pytest.raises(UserError, match="cannot make the run directory runs/name"):
        run_directory(None, "name")
    with pytest.raises(UserError, match="cannot write to the run directory runs/x: Not a directory"):
        Run(Path("runs/x"), ClsConfig())


def test_ranks_agree_on_the_directory(in_tmp: Path) -> None:
    done = launch(2, ROOT / "train_cls.py", *QUICK, cwd=in_tmp)
    assert done.returncode == 0, done.stderr
    (run,) = (in_tmp / "runs").iterdir()
    assert json.loads((run / "results.json").read_text())["processes"] == 2
    assert not (run / LOCK).exists()
    again = launch(2, ROOT / "train_cls.py", *QUICK, "--output-dir", str(run), cwd=in_tmp)
    assert again.returncode != 0 and "already holds a run" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--output-dir", "run"]])
def test_five_pairs_of_runs_started_at_once(in_tmp: Path, options: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for number in range(5):
        folder = in_tmp / str(number)
        folder.mkdir()
        command = [sys.executable, str(ROOT / "train_cls.py"), *QUICK, *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        pair = [subprocess.Popen(command, cwd=folder, env=environment, **pipes) for _ in range(2)]  # type: ignore[call-overload]
        said = [process.communicate(timeout=300) for process in pair]
        codes = sorted(process.returncode for process in pair)
        if options:
            assert codes == [0, 2], said
            errors = [line for _, text in said for line in text.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1 and ("another run is writing" in errors[0] or "already holds" in errors[0])
            assert (folder / "run/results.json").exists()
        else:
            assert codes == [0, 0], said
            assert len(list((folder / "runs").glob("*/results.json"))) == 2
