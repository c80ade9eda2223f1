"""The environment of several processes: left over, in part, wrong; and processes that do not come together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from idml import distributed, launch
from idml.errors import UserError
from tests.test_train_cls import ROOT

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
QUICK = ["--method", "baseline", "--model", "resnet8_cifar", "--max-steps", "1", "--batch-size", "8", "--threads", "1"]
QUICK += ["--dataset", "digits", "--no-introspect"]
PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}

SHORT = """
import sys
import idml.rendezvous
from idml.errors import run_main
idml.rendezvous.JOIN_SECONDS, idml.rendezvous.QUIET_SECONDS = 2.0, 0.5
import train_cls
run_main(train_cls.main)
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def run_script(folder: Path, script: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, *(["-c", SHORT] if script == "short" else [str(ROOT / script)]), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=folder)


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "3"},
        {"RANK": "3", "LOCAL_RANK": "3"},
        {"RANK": "none"},
        {"RANK": "1", "WORLD_SIZE": ""},
        {"LOCAL_RANK": "2"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3"},
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
    ],
)
def test_one_process_is_rank_0(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    launch.check_environment()
    assert (launch.rank(), launch.local_rank(), launch.world_size()) == (0, 0, 1)
    assert distributed.is_main()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WORLD_SIZE": "two"}, "whole number in the environment variable WORLD_SIZE, got 'two'"),
        ({"WORLD_SIZE": "-2"}, "whole number in the environment variable WORLD_SIZE, got '-2'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE to be at least 1, got 0"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK=1 is not below WORLD_SIZE=1"),
        ({"WORLD_SIZE": "2", "RANK": "2", **PLACE}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "x", **PLACE}, "environment variable RANK, got 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "x", **PLACE}, "environment variable LOCAL_RANK, got 'x'"),
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT are not set: start it with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR, MASTER_PORT are not set"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "host"}, "but MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "29500"}, "but MASTER_ADDR is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", **PLACE, "MASTER_PORT": "http"},
            "environment variable MASTER_PORT, got 'http'",
        ),
        ({"WORLD_SIZE": "2", "RANK": "1", **PLACE, "MASTER_PORT": "70000"}, "MASTER_PORT to be between 1 and 65535"),
    ],
)
def test_an_environment_that_cannot_be_is_told(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=expected) as caught:
        launch.check_environment()
    assert "torchrun" in str(caught.value)


@pytest.mark.parametrize("script", ["train_cls.py", "train_dml.py"])
def test_world_size_alone_is_one_line(tmp_path: Path, script: str) -> None:
    """Before anything else that is wrong: a batch of 64 does not divide among 3."""
    done = run_script(tmp_path, script, "--output-dir", "run", WORLD_SIZE="3")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr.startswith("error: WORLD_SIZE=3") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("variables", [{"RANK": "3"}, {"RANK": "abc", "LOCAL_RANK": "1"}])
def test_a_rank_left_over_costs_nothing(tmp_path: Path, variables: dict[str, str]) -> None:
    done = run_script(tmp_path, "train_cls.py", *QUICK, "--output-dir", "run", **variables)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/results.json").exists() and "run directory run" in done.stdout
    said = [line for line in done.stderr.splitlines() if "RANK=" in line]
    assert len(said) == 1 and "taken for left over" in said[0]
    failed = run_script(tmp_path, "train_cls.py", *QUICK, "--output-dir", "run", **variables)
    assert failed.returncode == 2 and "\nerror: run already holds a run" in "\n" + failed.stderr


def test_processes_that_do_not_come_end_the_others(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for variables, expected in (
        (own | {"RANK": "0"}, "1/2 clients joined"),
        (own | {"RANK": "1"}, "nothing listens there"),
        (own | {"RANK": "0", "MASTER_ADDR": "nowhere.invalid"}, "no machine of that name"),
        (own | {"RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}, "nothing listens there"),
    ):
        started = time.monotonic()
        done = run_script(tmp_path, "short", *QUICK, **variables)
        assert done.returncode == 2 and time.monotonic() - started < 60
        said = [line for line in done.stderr.splitlines() if not line.startswith("warning:")]
        assert len(said) == 2 and "waits for the others at" in said[0], done.stderr
        assert said[1].startswith(f"error (rank {variables['RANK']}): rank") and expected in said[1]
    assert not (tmp_path / "runs").exists()


def test_a_port_that_something_else_has_ends_too(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(8)
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for rank, expected in (("0", "address already in use"), ("1", "something else answers there")):
            done = run_script(tmp_path, "short", *QUICK, RANK=rank, **place)
            assert done.returncode == 2 and expected in done.stderr.splitlines()[-1], done.stderr
