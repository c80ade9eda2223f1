"""The training scripts, killed at random moments and gone on with, end like runs that nobody killed: to the bit.

Each run is a process of its own that runs the script itself. All of them are forked from one server that has already
imported the libraries, so that a start takes a second and the kills fall into training, evaluation and saving.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import re
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.faults import FULL
from tests.test_resume import CLS, DML, same_end
from tests.test_train_cls import ROOT

RUNS = {
    "cls": ("train_cls.py", [*CLS, "--threads", "1", "--save-every-steps", "1", "--ema-decay", "0.9"]),
    "cls-ffcv": ("train_cls.py", [*CLS, "--threads", "1", "--save-every-steps", "2", "--loader", "ffcv"]),
    "dml": ("train_dml.py", [*DML, "--threads", "1", "--save-every-steps", "2"]),
}
MOMENTS = 25 if FULL else 4
SECONDS = 120
"""After so long a run hangs."""

CALLS = {
    "before a checkpoint is flushed": ("os", "fsync", 7),
    "while checkpoints are given new names": ("os", "link", 3),
    "before the newest gets its name": ("pathlib", "Path.replace", 6),
    "before metrics.jsonl is written": ("idml.run", "Run.write_epoch", 2),
    "within an evaluation": ("idml.distributed", "copy_from_main", 2),
    "before results.json": ("idml.run", "Run.finish", 1),
}
"""Where a run is killed by itself: the n-th call of a function, which a timer would seldom hit."""


def kill_at_call(module: str, name: str, count: int) -> None:
    """From now on the ``count``-th call of this function ends the process as SIGKILL does."""
    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), 0

    def killing(*arguments: object, **keywords: object) -> object:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    setattr(owner, last, killing)


def run_script(script: str, arguments: list[str], output: Path, kill: tuple[str, str, int] | None) -> None:
    """In the process that is to be killed: the script, as the interpreter would run it."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = [script, *arguments]
    if kill is not None:
        kill_at_call(*kill)
    runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.fixture(scope="module")
def context() -> multiprocessing.context.ForkServerContext:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train_cls", "train_dml", "tests.faults.test_kills"])
    return server


class Script:
    """One of the scripts with its options, run in processes of their own."""

    def __init__(self, context: multiprocessing.context.ForkServerContext, kind: str) -> None:
        self.context = context
        self.script, self.options = RUNS[kind]

    def start(self, run: Path, kill: tuple[str, str, int] | None = None) -> multiprocessing.Process:
        arguments = [*self.options, "--output-dir", str(run), "--resume", "auto", "--cache-dir", f"{run}-cache"]
        output = run.with_suffix(".log")
        process = self.context.Process(target=run_script, args=(self.script, arguments, output, kill))
        process.start()
        return process

    def finish(self, run: Path) -> float:
        """Let it run to its end; how long that took."""
        started = time.monotonic()
        process = self.start(run)
        process.join(SECONDS)
        assert process.exitcode == 0, run.with_suffix(".log").read_text()
        return time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_killed_at_random_moments(
    tmp_path: Path, context: multiprocessing.context.ForkServerContext, kind: str
) -> None:
    """Each run is killed until it has got to its end in spite of it; at least so many kills are made in all."""
    script = Script(context, kind)
    script.finish(tmp_path / "undisturbed")
    seconds = script.finish(tmp_path / "again")
    same_end(tmp_path / "undisturbed", tmp_path / "again")
    randomness = random.Random(5)
    kills, run_number, steps = 0, 0, []
    while kills < MOMENTS:
        run_number += 1
        run, ended = tmp_path / f"killed{run_number}", False
        while kills < MOMENTS and not ended:
            number = randomness.choice([signal.SIGKILL, signal.SIGTERM])
            process = script.start(run)
            process.join(randomness.uniform(0.05, 0.9) * seconds)
            if process.exitcode is None:
                os.kill(process.pid or 0, number)
                kills += 1
                with contextlib.suppress(FileNotFoundError):
                    steps.append(len((run / "metrics.jsonl").read_text().splitlines()))
            process.join(30)
            output = run.with_suffix(".log").read_text()
            assert process.exitcode in (0, 143, -number), output
            assert "Traceback" not in output
            ended = process.exitcode == 0
        script.finish(run)
        same_end(tmp_path / "undisturbed", run)
    print(json.dumps({"kills": kills, "runs": run_number, "epochs finished at each": steps}))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, context: multiprocessing.context.ForkServerContext) -> Path:
    run = tmp_path_factory.mktemp("kills") / "undisturbed"
    Script(context, "cls").finish(run)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("where", CALLS)
def test_killed_where_it_hurts(
    tmp_path: Path, undisturbed: Path, context: multiprocessing.context.ForkServerContext, where: str
) -> None:
    run = tmp_path / re.sub(r"\W+", "-", where)
    script = Script(context, "cls")
    process = script.start(run, CALLS[where])
    process.join(SECONDS)
    assert process.exitcode == -signal.SIGKILL, run.with_suffix(".log").read_text()
    script.finish(run)
    same_end(undisturbed, run)
