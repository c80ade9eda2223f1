"""The training scripts, killed at random moments and gone on with, end like runs that nobody killed: to the bit."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults import FULL
from tests.test_resume import CLS, DML, same_end
from tests.test_train_cls import ROOT

RUNS = {
    "cls": ("train_cls.py", [*CLS, "--threads", "1", "--save-every-steps", "1", "--ema-decay", "0.9"]),
    "dml": ("train_dml.py", [*DML, "--threads", "1", "--save-every-steps", "2"]),
}
MOMENTS = 25 if FULL else 3
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}

# Ends itself, as SIGKILL does, at the n-th call of a function: in the middle of what a timer would seldom hit.
AT_CALL = """
import os, runpy, signal, sys, importlib
module, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
owner = importlib.import_module(module)
*path, last = name.split(".")
for part in path:
    owner = getattr(owner, part)
original, calls = getattr(owner, last), [0]
def killing(*arguments, **keywords):
    calls[0] += 1
    if calls[0] == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **keywords)
setattr(owner, last, killing)
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
CALLS = {
    "before a checkpoint is flushed": ("os", "fsync", 7),
    "while checkpoints are given new names": ("os", "link", 3),
    "before the newest gets its name": ("pathlib", "Path.replace", 6),
    "before metrics.jsonl is written": ("idml.run", "Run.write_epoch", 2),
    "within an evaluation": ("idml.distributed", "copy_from_main", 2),
    "before results.json": ("idml.run", "Run.finish", 1),
}


def command(script: str, options: list[str], run: Path) -> list[str]:
    return [str(ROOT / script), *options, "--output-dir", str(run), "--resume", "auto"]


def finish(script: str, options: list[str], run: Path) -> float:
    """Let it run to its end; how long that took."""
    started = time.monotonic()
    program = [sys.executable, *command(script, options, run)]
    done = subprocess.run(program, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_killed_at_random_moments(tmp_path: Path, kind: str) -> None:
    """Each run is killed until it has got to its end in spite of it; at least so many kills are made in all."""
    script, options = RUNS[kind]
    seconds = finish(script, options, tmp_path / "undisturbed")
    randomness = random.Random(5)
    kills = round_ = 0
    while kills < MOMENTS:
        round_ += 1
        run = tmp_path / f"killed{round_}"
        while kills < MOMENTS:
            number = randomness.choice([signal.SIGKILL, signal.SIGTERM])
            program = subprocess.Popen(
                [sys.executable, *command(script, options, run)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=ENVIRONMENT,
            )
            try:
                program.communicate(timeout=randomness.uniform(0.3, 1.0) * seconds)
            except subprocess.TimeoutExpired:
                program.send_signal(number)
                kills += 1
            _, errors = program.communicate(timeout=60)
            assert program.returncode in (0, 143, -number), errors
            assert "Traceback" not in errors
            if program.returncode == 0:
                break
        finish(script, options, run)
        same_end(tmp_path / "undisturbed", run)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("kills") / "undisturbed"
    finish(*RUNS["cls"], run)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("where", CALLS)
def test_killed_where_it_hurts(tmp_path: Path, undisturbed: Path, where: str) -> None:
    script, options = RUNS["cls"]
    run = tmp_path / re.sub(r"\W+", "-", where)
    module, name, count = CALLS[where]
    program = [sys.executable, "-c", AT_CALL, module, name, str(count), *command(script, options, run)]
    done = subprocess.run(program, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    finish(script, options, run)
    same_end(undisturbed, run)
