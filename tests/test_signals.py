"""Signals sent to real processes: the step is finished, the state saved, the exit code as documented."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from idml.signals import Interrupted, StopSignals
from tests.test_resume import CLS, DML, same_end
from tests.test_train_cls import ROOT

LONG = [*CLS, "--epochs", "400", "--threads", "1"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


def start(*arguments: str, processes: int = 1, script: str = "train_cls.py") -> subprocess.Popen[str]:
    """A training script, really started; with ``processes`` above 1 through torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *torchrun, str(ROOT / script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def wait_for_lines(path: Path, count: int) -> None:
    """Until ``metrics.jsonl`` has so many epochs."""
    deadline = time.monotonic() + 120
    while not path.exists() or len(path.read_text(encoding="utf-8").splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Processes that the main thread of this one has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 143, marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value),
)
def test_a_signal_saves_and_ends(tmp_path: Path, number: signal.Signals, code: int) -> None:
    run = tmp_path / "run"
    program = start(*LONG, "--output-dir", str(run))
    wait_for_lines(run / "metrics.jsonl", 2)
    sent = time.monotonic()
    program.send_signal(number)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == code
    assert time.monotonic() - sent < 30
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("stopped after step ") and f"--resume {run}" in last
    assert not (run / "results.json").exists()
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line)


def test_a_second_sigint_ends_at_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    # One step of an epoch takes many seconds.
    slow = ["--dataset", "fashion-mnist-mini", "--model", "resnet56_cifar", "--batch-size", "2000", "--no-verbose"]
    program = start(*slow, "--threads", "1", "--output-dir", str(run))
    while not (run / "checkpoints/last.pt").exists():
        time.sleep(0.05)
    time.sleep(1)
    program.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert program.poll() is None, "it finishes its step"
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate(timeout=5)
    assert program.returncode == 130
    assert "finishing the step, then saving" in errors and "stopped after" not in errors


def test_a_signal_while_a_class_is_made_is_told_as_one() -> None:
    """Python makes a RuntimeError of it there; imports make hundreds of classes."""

    class Stopping:
        def __set_name__(self, _owner: type, _name: str) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped by SIGTERM"), StopSignals():
        type("Made", (), {"stopping": Stopping()})


def test_a_signal_within_a_finalizer_ends_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    """Python drops exceptions there, and prints a traceback."""
    hook = sys.unraisablehook

    class Stopping:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def work() -> None:
        Stopping()
        time.sleep(30)

    with pytest.raises(Interrupted) as stopped, StopSignals():
        work()
    assert stopped.value.exit_code == 130
    assert sys.unraisablehook is hook
    assert "Traceback" not in capfd.readouterr().err


def test_a_signal_before_training_ends_at_once(tmp_path: Path) -> None:
    program = start(*LONG, "--output-dir", str(tmp_path / "run"))
    time.sleep(0.3)  # importing
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=30) in (143, -signal.SIGTERM)
    assert not (tmp_path / "run").exists()


def test_a_worker_that_dies_says_why(tmp_path: Path, image_folder: Path) -> None:
    run = tmp_path / "run"
    options = ["--dataset", "folder", "--data-dir", str(image_folder), "--loader", "torch", "--workers", "1"]
    options += ["--model", "resnet8_cifar", "--image-size", "16", "--batch-size", "8", "--epochs", "400"]
    program = start(*options, "--no-verbose", "--threads", "1", "--output-dir", str(run))
    wait_for_lines(run / "metrics.jsonl", 2)
    os.kill(children(program.pid)[0], signal.SIGKILL)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 1
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    (line,) = lines
    assert line.startswith("error: a process that reads images has died: DataLoader worker ")
    assert "fewer --workers" in line and "--resume" in line
    assert "RuntimeError" not in errors


def test_a_reader_that_ends_early_is_no_error(tmp_path: Path) -> None:
    """As in ``idml info ... | head -1``."""
    script = tmp_path / "prints.py"
    script.write_text("from idml.errors import run_main\nrun_main(lambda: [print(n) for n in range(100_000)])\n")
    command = f"set -o pipefail; {sys.executable} {script} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (141, "0\n", "")


@pytest.mark.slow
@pytest.mark.parametrize(("script", "options"), [("train_cls.py", [*CLS, "--bn-freeze"]), ("train_dml.py", DML)])
def test_two_processes_stop_together_and_go_on(tmp_path: Path, script: str, options: list[str]) -> None:
    """SIGTERM to torchrun: both ranks stop after the same step; gone on with, the run ends like an undisturbed one."""
    options = [*options, "--epochs", "8", "--threads", "1"]
    whole = start(*options, "--output-dir", str(tmp_path / "undisturbed"), processes=2, script=script)
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    run = tmp_path / "stopped"
    program = start(*options, "--output-dir", str(run), processes=2, script=script)
    wait_for_lines(run / "metrics.jsonl", 2)
    sent = time.monotonic()
    program.send_signal(signal.SIGTERM)
    _, errors = program.communicate(timeout=60)
    assert time.monotonic() - sent < 30
    assert "stopped after step" in errors and "closed by peer" not in errors
    assert not (run / "results.json").exists()
    shutil.copytree(run, tmp_path / "one")
    again = start(*options, "--output-dir", str(run), "--resume", "auto", processes=2, script=script)
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert "going on from" in output
    same_end(tmp_path / "undisturbed", run)
    # One process, with the same images a step, goes on as well; only its random augmentation is another.
    alone = start(*options, "--output-dir", str(tmp_path / "one"), "--resume", "auto", script=script)
    output, errors = alone.communicate(timeout=300)
    assert alone.returncode == 0, errors
    assert "going on from" in output
    ends = [json.loads((tmp_path / name / "results.json").read_text())["final"] for name in ("undisturbed", "one")]
    assert ends[0]["step"] == ends[1]["step"] and ends[0]["epoch"] == ends[1]["epoch"] == 8


@pytest.mark.slow
def test_ranks_stop_when_torchrun_is_gone(tmp_path: Path) -> None:
    """SIGUSR1 ends torchrun, which does not pass it on; its ranks save and end."""
    run = tmp_path / "run"
    program = start(*LONG, "--bn-freeze", "--output-dir", str(run), processes=2)
    wait_for_lines(run / "metrics.jsonl", 2)
    ranks = children(program.pid)
    assert len(ranks) == 2
    program.send_signal(signal.SIGUSR1)
    _, errors = program.communicate(timeout=30)
    assert program.returncode == -signal.SIGUSR1
    assert "stopped after step" in errors and "Traceback" not in errors
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_torchrun_restarts_by_itself(tmp_path: Path) -> None:
    """A rank that dies is started again by ``--max-restarts``, and ``--resume auto`` goes on from what was saved."""
    options = [*CLS, "--epochs", "30", "--threads", "1", "--bn-freeze", "--resume", "auto"]
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    command = [*torchrun, str(ROOT / "train_cls.py"), *options, "--output-dir", str(run)]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    wait_for_lines(run / "metrics.jsonl", 2)
    os.kill(children(program.pid)[-1], signal.SIGKILL)
    output, errors = program.communicate(timeout=400)
    assert program.returncode == 0, errors
    assert output.count("going on from") == 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 31))
    assert (run / "results.json").exists()
