"""Steps that are not finite, full disks, checkpoints that cannot be written: what is lost, and what is said."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train_cls
import train_dml
from idml import checkpoint_files, saving
from idml.checkpoint_files import read_verified, write_checkpoint
from idml.embedder import EmbedderOutput, IntrospectiveEmbedder
from idml.errors import StorageError, TrainingError, UserError
from idml.models import ClassifierOutput, IntrospectiveClassifier
from idml.saving import estimated_bytes
from idml.state import TrainingState
from tests.test_resume import CLS, DML
from tests.test_train_cls import ROOT


@pytest.fixture
def broken_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """``broken_steps({3})``: the third training forward pass gives logits that are not numbers."""
    forward = IntrospectiveClassifier.forward
    count = [0]

    def breaking(steps: set[int]) -> None:
        def broken(self: IntrospectiveClassifier, images: torch.Tensor) -> ClassifierOutput:
            output = forward(self, images)
            if self.training:
                count[0] += 1
                if count[0] in steps:
                    return output._replace(introspective_logits=output.introspective_logits * math.nan)
            return output

        monkeypatch.setattr(IntrospectiveClassifier, "forward", broken)

    return breaking


def test_a_step_that_is_not_finite_can_be_left_out(
    tmp_path: Path, broken_steps: Callable[[set[int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    broken_steps({3, 4})
    run = tmp_path / "run"
    options = ["--on-nonfinite", "skip", "--ema-decay", "0.9", "--output-dir", str(run)]
    results = train_cls.main([*CLS, *options])
    told = capsys.readouterr().err
    assert "at step 3" in told and "left out, 1 so far" in told and "left out, 2 so far" in told
    assert results is not None and math.isfinite(results["final"]["train_loss"])
    assert results["final"]["step"] == 18
    stored = json.loads((run / "nonfinite-step3-rank0.json").read_text(encoding="utf-8"))
    assert (stored["step"], stored["epoch"], stored["figures"]["loss"]) == (3, 1, "nan")
    assert math.isfinite(stored["figures"]["|uncertainty|"]) and stored["figures"]["|uncertainty|"] > 0
    assert len(stored["indices"]) == len(set(stored["indices"])) == 240
    assert (run / "nonfinite-step4-rank0.json").exists() and not (run / "nonfinite-step5-rank0.json").exists()
    state = torch.load(run / "checkpoints/last.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for part in ("model", "trained_model") for v in state[part].values())


def test_a_step_left_out_changes_nothing(tmp_path: Path, broken_steps: Callable[[set[int]], None]) -> None:
    """One step, and the same one and another that is left out, end with the same weights and batch norm figures."""
    options = [*CLS, "--on-nonfinite", "skip", "--schedule", "step"]
    train_cls.main([*options, "--max-steps", "1", "--output-dir", str(tmp_path / "one")])
    broken_steps({2})
    train_cls.main([*options, "--max-steps", "2", "--output-dir", str(tmp_path / "two")])
    one, two = (torch.load(tmp_path / n / "checkpoints/last.pt", weights_only=True)["model"] for n in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_too_many_in_a_row_stop_the_run(tmp_path: Path, broken_steps: Callable[[set[int]], None]) -> None:
    broken_steps({2, 4, 5, 6})
    options = ["--on-nonfinite", "skip", "--max-nonfinite", "3", "--output-dir", str(tmp_path / "run")]
    with pytest.raises(TrainingError, match=r"step 6, .*3 steps in a row were left out"):
        train_cls.main([*CLS, *options])


def test_stopping_says_what_is_known_and_saves_nothing_broken(tmp_path: Path) -> None:
    for main, arguments, norm in ((train_cls.main, CLS, "|uncertainty|"), (train_dml.main, DML, "|proxies|")):
        run = tmp_path / norm
        options = ["--lr", "1e19", "--save-every-steps", "1", "--output-dir", str(run)]
        if main is train_dml.main:
            options += ["--optimizer", "sgd", "--clip-value", "0"]
        with pytest.raises(TrainingError) as stopped:
            main([*arguments, *options])
        assert norm in str(stopped.value) and "its images are listed in" in str(stopped.value)
        (told,) = run.glob("nonfinite-step*-rank0.json")
        assert len(json.loads(told.read_text(encoding="utf-8"))["indices"]) == 240
        state = torch.load(run / "checkpoints/last.pt", weights_only=True)
        assert all(torch.isfinite(loss) for loss in state["epoch_losses"])


def test_an_evaluation_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps may have been finite, and the network be one that gives no numbers for a test image."""
    forward = IntrospectiveClassifier.forward

    def broken(self: IntrospectiveClassifier, images: torch.Tensor) -> ClassifierOutput:
        output = forward(self, images)
        bad = torch.zeros(len(images), 1)
        bad[0] = 0 if self.training else math.nan
        return output._replace(logits=output.logits + bad, introspective_logits=output.introspective_logits + bad)

    monkeypatch.setattr(IntrospectiveClassifier, "forward", broken)
    with pytest.raises(
        TrainingError, match=r"non-finite test loss \(nan\) after step 1; the last finite checkpoint is"
    ):
        train_cls.main([*CLS, "--max-steps", "1", "--output-dir", str(tmp_path / "run")])
    embed = IntrospectiveEmbedder.forward

    def broken_too(self: IntrospectiveEmbedder, images: torch.Tensor) -> EmbedderOutput:
        output = embed(self, images)
        return output if self.training else output._replace(semantic=output.semantic * math.nan)

    monkeypatch.setattr(IntrospectiveEmbedder, "forward", broken_too)
    for held_out, expected in (("0.1", "168 of 168"), ("0", "1680 of 1680")):
        options = ["--max-steps", "1", "--val-fraction", held_out, "--output-dir", str(tmp_path / f"run {held_out}")]
        with pytest.raises(TrainingError, match=f"non-finite embeddings of {expected} images: .* a lower --lr"):
            train_dml.main([*DML, *options])


FULL_DISK = """
import resource, signal, sys
import train_cls
from idml.errors import run_main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
run_main(lambda: train_cls.main(sys.argv[2:]))
"""


def with_small_files(largest: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The training in a process whose files cannot grow past ``largest`` bytes: writes fail as on a full disk."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FULL_DISK, str(largest), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_checkpoints_that_cannot_be_written_end_the_run_after_three(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = with_small_files(100_000, *CLS, "--save-every-steps", "1", "--output-dir", str(run))
    assert done.returncode == 74, done.stderr
    lines = done.stderr.splitlines()
    assert sum("could not write a checkpoint" in line and "trying again later" in line for line in lines) == 2
    assert lines[-1].startswith("error: could not write a checkpoint") and "3 time(s) in a row" in lines[-1]
    assert "Traceback" not in done.stderr
    assert not list(run.rglob("*.tmp")) and not list((run / "checkpoints").iterdir())


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    content = {"model": {"w": torch.arange(10)}, "config": {}, "classes": [], "preprocessing": {}}
    content |= {"optimizer": {}, "schedule": {}, "scaler": {}, "random": [], "epoch_losses": torch.zeros(0)}
    content |= {"epoch": 1, "step": 1, "train_images": 1, "history": [], "seconds": 1.0}
    write_checkpoint(path, content, keep=2)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large|could not write"):
            write_checkpoint(path, content | {"more": torch.zeros(10_000)}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {"last.pt"}

    def no_links(*_arguments: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(checkpoint_files.os, "link", no_links)
    for step in (2, 3):
        write_checkpoint(path, content | {"step": step}, keep=2)
    assert [read_verified(tmp_path / name)["step"] for name in ("last.pt", "last-1.pt")] == [3, 2]
    assert {p.name for p in tmp_path.iterdir()} == {"last.pt", "last-1.pt"}


def test_an_introspection_that_cannot_be_written_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no later chance: the run is not finished, and goes on with the introspection once there is room."""
    original = saving.write_checkpoint

    def full(path: Path, content: dict[str, Any], *, keep: int = 1) -> None:
        if "introspection" in content:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, content, keep=keep)

    monkeypatch.setattr("idml.introspection.fit.LEAST_STEPS", 20)
    options = [*CLS, "--introspect", "--max-steps", "1", "--output-dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_checkpoint", full)
        with pytest.raises(StorageError, match="No space left on device"):
            train_cls.main(options)
    assert not (tmp_path / "run/results.json").exists()
    results = train_cls.main(["--resume", str(tmp_path / "run")])
    assert results is not None and "error_auroc" in results["final"]
    assert "introspection" in read_verified(tmp_path / "run/checkpoints/last.pt")


def test_tensorboard_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    """Its file is let grow to 10 kB, checkpoints are not written past the start: the training goes to its end."""
    run = tmp_path / "run"
    script = FULL_DISK.replace("import train_cls\n", "import train_cls, idml.saving\n" + KEEP_CHECKPOINTS)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, "10000", *CLS, "--output-dir", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert sum("could not write TensorBoard files" in line for line in done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert json.loads((run / "results.json").read_text(encoding="utf-8"))["final"]["epoch"] == 3


KEEP_CHECKPOINTS = """
def unlimited(path, content, *, keep=1):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        write(path, content, keep=keep)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
write, idml.saving.write_checkpoint = idml.saving.write_checkpoint, unlimited
"""


def test_a_disk_too_small_is_noticed_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1_000_000

    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage)
    with pytest.raises(UserError, match=r"52 checkpoints .* need about 0\.03 GB, 0\.00 GB are free; make room"):
        train_cls.main([*CLS, "--keep-checkpoints", "50", "--output-dir", str(tmp_path / "run")])
    assert not list((tmp_path / "run/checkpoints").iterdir())


@pytest.mark.parametrize("ema", [[], ["--ema-decay", "0.9"]])
def test_the_estimate_of_a_checkpoint_is_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: list[str]
) -> None:
    estimates: list[int] = []
    original = TrainingState.state_dict

    def estimating(self: TrainingState) -> dict[str, object]:
        estimates.append(estimated_bytes(self))
        return original(self)

    monkeypatch.setattr(TrainingState, "state_dict", estimating)
    train_cls.main([*CLS, *ema, "--model", "resnet20_cifar", "--max-steps", "1", "--output-dir", str(tmp_path / "run")])
    size = (tmp_path / "run/checkpoints/last.pt").stat().st_size
    assert estimates[-1] == pytest.approx(size, rel=0.1)
