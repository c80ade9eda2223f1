"""Steps in parts: none of one image under batch norm, in either script, on one process or several; and what is said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import train_cls
import train_dml
from augment import apply_mixup
from idml.backbones import create_backbone
from idml.errors import run_main
from idml.parts import fewer_parts, least_images, part_count
from tests.test_distributed import launch
from tests.test_train_cls import ROOT
from tests.tiny_models import write_photos, write_searched

NORM, PLAIN = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.LayerNorm(3))
SMALL = ["--model", "resnet18", "--image-size", "32", "--epochs", "1", "--threads", "1", "--workers", "0"]
SMALL += ["--loader", "torch", "--dataset", "folder", "--no-verbose", "--val-fraction", "0"]


def config(grad_accum: int, *, bn_freeze: bool = False) -> SimpleNamespace:
    return SimpleNamespace(grad_accum=grad_accum, bn_freeze=bn_freeze)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 4), st.booleans())
def test_parts_are_no_smaller_than_they_may_be(share: int, parts: int, ranks: int, norm: bool) -> None:
    """Of this rank's images, the smallest share of all ranks or one more; together they are all images, in order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(ranks))
        size = share * ranks + ranks - 1
        count = part_count(NORM if norm else PLAIN, config(parts), size)
    assert 1 <= count <= parts
    for own in (share, share + 1):
        batch = apply_mixup(torch.arange(own * 1.0).reshape(-1, 1, 1, 1), torch.arange(own), None)
        pieces = [len(part.images) for part in train_cls.split(batch, count)]
        assert sum(pieces) == own and max(pieces) - min(pieces) <= 1
        assert min(pieces) >= min(own, 2 if norm else 1)
    assert count == parts or (count + 1) * (2 if norm else 1) > share


def test_where_batch_norm_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    assert least_images(create_backbone("resnet8_cifar"), frozen=False) == 2
    assert least_images(create_backbone("resnet8_cifar"), frozen=True) == 1
    assert least_images(create_backbone("test_vit"), frozen=False) == 1
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(create_backbone("resnet8_cifar"))
    assert least_images(synchronised, frozen=False) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert least_images(synchronised, frozen=False) == 1
    assert least_images(create_backbone("resnet8_cifar"), frozen=False) == 2


def test_what_is_said() -> None:
    assert fewer_parts(NORM, config(1), [6, 6, 1]) == fewer_parts(NORM, config(3), [6, 6, 7]) == ""
    said = fewer_parts(NORM, config(3), [6, 6, 2])
    assert said == "--grad-accum: steps of 2 images go through in 1 part, not 3: batch norm needs two images in each"
    assert "steps of 6 images go through in 3 parts, not 6, steps of 2" in fewer_parts(NORM, config(6), [6, 6, 2])
    assert fewer_parts(PLAIN, config(6), [6]) == fewer_parts(NORM, config(6, bn_freeze=True), [6]) == ""


@pytest.fixture
def photos(in_tmp: Path) -> list[str]:
    """26 training images of two classes."""
    return ["--data-dir", str(write_photos(in_tmp / "photos", classes=2, train=13, test=2))]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch-size", "6", "--grad-accum", "3"], "steps of 2 images go through in 1 part, not 3"),
        (["--batch-size", "6", "--grad-accum", "6"], "in 3 parts, not 6"),
        (["--batch-size", "12", "--grad-accum", "3"], "steps of 2 images go through in 1 part"),
        (["--batch-size", "1", "--bn-freeze", "--lr", "0.01"], ""),
        (["--batch-size", "25"], ""),
    ],
)
def test_no_part_of_one_image(
    photos: list[str], capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    train_cls.main([*SMALL, *photos, "--method", "ism", *options, "--output-dir", "run"])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("--grad-accum")]
    assert len(lines) == bool(said) and said in out


def test_steps_of_one_image_are_refused(photos: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: train_cls.main([*SMALL, *photos, "--method", "baseline", "--batch-size", "1"]))  # type: ignore[arg-type, return-value]
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        "which resnet18 cannot train on" in error and "--batch-size of at least 2" in error and "--bn-freeze" in error
    )
    assert not Path("runs").exists()
    train_cls.main(
        [*SMALL, *photos, "--method", "baseline", "--batch-size", "1", "--image-size", "64", "--max-steps", "2"]
    )


@pytest.mark.slow
def test_two_processes(photos: list[str], in_tmp: Path) -> None:
    """26 images in steps of 8: a last one of 2, one for each process, is joined to the one before."""
    options = [*SMALL, *photos, "--method", "ism", "--grad-accum", "4"]
    done = launch(2, ROOT / "train_cls.py", *options, "--batch-size", "8", "--output-dir", "run", cwd=in_tmp)
    assert done.returncode == 0, done.stderr
    assert "steps of 8 images go through in 2 parts, not 4" in done.stdout
    done = launch(2, ROOT / "train_cls.py", *SMALL, *photos, "--batch-size", "2", "--output-dir", "one", cwd=in_tmp)
    assert "gives each process one, which resnet18 cannot train on" in done.stderr and not (in_tmp / "one").exists()
    retrieval = [*SMALL, "--data-dir", str(write_searched(in_tmp / "searched")), "--ism", "off", "--no-nmi"]
    for more in ([], ["--IPC", "1"]):
        command = [*retrieval, "--batch-size", "2", *more, "--output-dir", "dml"]
        done = launch(2, ROOT / "train_dml.py", *command, cwd=in_tmp)
        assert "gives each process one, which resnet18 cannot train on" in done.stderr and not (in_tmp / "dml").exists()


@pytest.mark.parametrize("more", [["--batch-size", "7"], ["--batch-size", "29"], ["--batch-size", "6", "--IPC", "3"]])
def test_the_last_step_of_a_retrieval_epoch(in_tmp: Path, more: list[str]) -> None:
    """30 images: a last step of two, or of one, which is joined to the one before; classes in balance."""
    photos = ["--data-dir", str(write_searched(in_tmp / "searched"))]
    options = [*SMALL, *photos, "--ism", "off", "--no-nmi", "--warm", "0", "--mix", "mixup"]
    assert train_dml.main([*options, *more, "--output-dir", "run"])["final"]["step"] == 30 // int(more[1]) + (
        more[1] == "7"
    )  # type: ignore[index]
