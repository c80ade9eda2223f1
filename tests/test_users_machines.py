"""What users' machines do: read-only disks, little shared memory. The real programs in real mounts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.mounts import ROOT, needs_mounts, run_mounted
from tests.tiny_models import train_tiny, write_photos, write_searched

pytestmark = needs_mounts


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``photos/{train,val}/<class>/*.png`` and ``searched/``; ``off`` and ``retrieval off``: runs on them."""
    folder = tmp_path_factory.mktemp("machines")
    train_tiny("off", write_photos(folder / "photos"), folder / "off")
    train_tiny("retrieval off", write_searched(folder / "searched"), folder / "retrieval off")
    return folder


@pytest.mark.parametrize(("script", "kind", "figure"), [("cls", "off", "top1 "), ("dml", "retrieval off", "R@1 ")])
def test_figures_of_a_run_on_a_read_only_disk(base: Path, tmp_path: Path, script: str, kind: str, figure: str) -> None:
    checkpoint = base / kind / "checkpoints/last.pt"
    options = ["--eval-only", "--checkpoint", checkpoint]
    done = run_mounted(ROOT / f"train_{script}.py", *options, read_only=[base], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert figure in done.stdout.splitlines()[-1]
    (said,) = (line for line in done.stderr.splitlines() if "stored" in line)
    assert said.startswith("warning: the figures could not be stored in") and "Read-only file system" in said
    assert "--output-dir names another place" in said
    elsewhere = [*options, "--output-dir", tmp_path / "here"]
    done = run_mounted(ROOT / f"train_{script}.py", *elsewhere, read_only=[base], cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "here/metrics.json").exists(), done.stderr


@pytest.mark.parametrize("kind", ["off", "retrieval off"])
def test_evaluate_on_a_read_only_disk(base: Path, tmp_path: Path, kind: str) -> None:
    options = ["--checkpoint", base / kind, "--workers", "0", "--out", base / "new" / "figures.json"]
    done = run_mounted("-m", "idml", "evaluate", *options, read_only=[base], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("R@1" if kind.startswith("retrieval") else "top-1") in done.stdout and "the same in" not in done.stdout
    (said,) = done.stderr.splitlines()
    assert said.startswith("warning: the figures could not be stored in") and "--out names another place" in said


@pytest.mark.parametrize("script", ["cls", "dml"])
def test_data_and_home_that_cannot_be_written_to(base: Path, tmp_path: Path, script: str) -> None:
    """FFCV's files find no place: torch's loader is taken, or --cache-dir named."""
    pytest.importorskip("ffcv")
    home = tmp_path / "home"
    home.mkdir()
    photos = base / ("photos" if script == "cls" else "searched/photos")
    options = ["--dataset", "folder", "--data-dir", photos, "--model", "resnet8_cifar", "--image-size", "32"]
    options += ["--max-steps", "2", "--batch-size", "8", "--threads", "1", "--workers", "0"]

    def train(loader: str, *more: object) -> subprocess.CompletedProcess[str]:
        arguments = [ROOT / f"train_{script}.py", *options, "--loader", loader, *more]
        return run_mounted(*arguments, read_only=[base, home], cwd=tmp_path, HOME=str(home), XDG_CACHE_HOME="")

    done = train("auto", "--output-dir", "auto")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "images: " in line]
    assert said and all("torch loader, because FFCV cannot write" in line for line in said)
    assert all("Read-only file system; --cache-dir DIR names a place" in line for line in said)
    done = train("ffcv", "--output-dir", "ffcv")
    assert done.returncode == 2 and not (tmp_path / "ffcv").exists()
    (error,) = (line for line in done.stderr.splitlines() if not line.startswith("warning:"))
    assert error.startswith("error: cannot write") and "--cache-dir DIR names a place" in error
    done = train("ffcv", "--output-dir", "ffcv", "--cache-dir", tmp_path / "betons")
    assert done.returncode == 0 and list((tmp_path / "betons").glob("*.beton")), done.stderr


SHARED = ["--dataset", "folder", "--model", "resnet8_cifar", "--image-size", "128", "--batch-size", "18"]
SHARED += ["--workers", "2", "--loader", "torch", "--epochs", "2", "--threads", "1", "--no-verbose"]


def without_speed(line: str) -> str:
    return line.rpartition("  ")[0]


@pytest.mark.parametrize(("shm", "expected"), [("256k", "go through a pipe"), ("16k", "could not be started")])
@pytest.mark.parametrize("script", ["cls", pytest.param("dml", marks=pytest.mark.slow)])
def test_little_shared_memory(base: Path, tmp_path: Path, script: str, shm: str, expected: str) -> None:
    """A batch has 0.9 MB. The same figures as without worker processes, and one line that says what there is."""
    photos = base / ("photos" if script == "cls" else "searched/photos")
    own = ["--method", "baseline"] if script == "cls" else ["--ism", "off", "--no-nmi"]
    arguments = [ROOT / f"train_{script}.py", *SHARED, *own, "--data-dir", photos]
    done = run_mounted(*arguments, "--output-dir", "run", shm=shm, cwd=tmp_path, timeout=100)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "/dev/shm has 0.0 MB" in line or "/dev/shm has 0.3 MB" in line]
    assert len(said) == 1 and said[0].startswith("warning: ") and expected in said[0], done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    plain = run_mounted(*arguments, "--workers", "0", "--output-dir", "plain", cwd=tmp_path)
    lines = [[without_speed(line) for line in each.stdout.splitlines() if "epoch" in line] for each in (done, plain)]
    assert lines[0] == lines[1] and len(lines[0]) >= 2


def test_a_command_with_little_shared_memory(base: Path, tmp_path: Path) -> None:
    options = ["--checkpoint", base / "off", "--data-dir", base / "photos", "--workers", "2", "--out", "E.npz"]
    done = run_mounted("-m", "idml", "embed", *options, shm="64k", cwd=tmp_path, timeout=100)
    assert done.returncode == 0 and (tmp_path / "E.npz").exists(), done.stderr
    assert len(done.stderr.splitlines()) == 1 and "/dev/shm has 0.1 MB" in done.stderr


@pytest.mark.slow
def test_the_shared_memory_of_docker_at_224_pixels(base: Path, tmp_path: Path) -> None:
    """64 MB, batches of 54 MB, four processes."""
    arguments = [
        ROOT / "train_cls.py",
        *SHARED,
        "--method",
        "baseline",
        "--data-dir",
        write_photos(base / "many", train=120),
    ]
    arguments += [
        "--image-size",
        "224",
        "--batch-size",
        "360",
        "--workers",
        "4",
        "--epochs",
        "1",
        "--val-fraction",
        "0",
    ]
    done = run_mounted(*arguments, "--output-dir", "run", shm="64m", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    done = run_mounted(*arguments, "--batch-size", "64", "--output-dir", "small", shm="64m", cwd=tmp_path, timeout=600)
    assert done.returncode == 0 and (tmp_path / "small/results.json").exists(), done.stderr


BUS_ERROR = """
import os, signal, sys, torch.utils.data, train_cls
from idml.data.torch_loader import _Batches
from idml.errors import run_main
original = _Batches.fetch
def fetch(self, epoch, indices):
    if torch.utils.data.get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGBUS)
    return original(self, epoch, indices)
_Batches.fetch = fetch
run_main(train_cls.main)
"""


def test_a_bus_error_is_one_line(base: Path, tmp_path: Path) -> None:
    arguments = [*SHARED, "--method", "baseline", "--data-dir", base / "photos", "--output-dir", "run"]
    done = run_mounted("-c", BUS_ERROR, *arguments, cwd=tmp_path)
    assert done.returncode == 1
    (said,) = done.stderr.splitlines()
    assert said.startswith("error: a process that reads images has died") and "shared" in said
