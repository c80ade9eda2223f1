"""Which loader is taken, and the .beton it reads: found, written, written again."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from idml.data import loaders
from idml.data.beton import BetonSettings, import_ffcv, read_sidecar, sidecar_path
from idml.data.ffcv_write import write_beton
from idml.data.image_dataset import ImageDataset
from idml.data.image_files import list_class_folders
from idml.data.loaders import build_loader
from idml.data.torch_loader import TorchLoader
from idml.errors import UserError

ARGUMENTS: dict[str, Any] = {"source": "folder", "split": "train", "batch_size": 8, "image_size": 32, "train": False}


@pytest.fixture
def _ffcv() -> None:
    try:
        import_ffcv()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def _no_ffcv(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise UserError("FFCV cannot be imported (ImportError: libopencv_core.so.406); give --loader torch")

    monkeypatch.setattr(loaders, "import_ffcv", fail)


@pytest.fixture
def folder(image_folder: Path) -> ImageDataset:
    """36 PNG files of three classes in photos/train."""
    return list_class_folders(image_folder / "train", layout="")


@pytest.fixture
def memory(fashion: dict[str, np.ndarray]) -> ImageDataset:
    labels = fashion["train_labels"][:50].astype(np.int64)
    images = np.pad(fashion["train_images"][:50, ..., None], ((0, 0), (2, 2), (2, 2), (0, 0)))
    return ImageDataset(labels=labels, classes=tuple("abcdefghij"), images=images)


def test_torch_on_request(folder: ImageDataset, capsys: pytest.CaptureFixture) -> None:
    assert isinstance(build_loader(folder, loader="torch", **ARGUMENTS), TorchLoader)
    assert capsys.readouterr().out == "train images: torch loader (asked for)\n"


@pytest.mark.usefixtures("_no_ffcv")
def test_auto_without_ffcv_takes_torch_and_says_why(folder: ImageDataset, capsys: pytest.CaptureFixture) -> None:
    assert isinstance(build_loader(folder, loader="auto", **ARGUMENTS), TorchLoader)
    printed = capsys.readouterr().out
    assert printed.startswith("train images: torch loader, because FFCV cannot be imported (ImportError: libopencv")
    with pytest.raises(UserError, match="FFCV cannot be imported"):
        build_loader(folder, loader="ffcv", **ARGUMENTS)


@pytest.mark.usefixtures("_ffcv")
def test_file_is_written_beside_the_data_reused_and_written_again(
    folder: ImageDataset, image_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert folder.paths is not None
    path = image_folder / "train.beton"
    loader = build_loader(folder, loader="auto", **ARGUMENTS)
    assert type(loader).__name__ == "FfcvLoader"
    printed = capsys.readouterr().out
    assert f"writing {path} (there is none yet)\n" in printed
    assert f"train images: FFCV loader (it imports), from {path} (unchanged, written now)\n" in printed
    torch_loader = build_loader(folder, loader="torch", verbose=False, **ARGUMENTS)
    for (a, _), (b, _) in zip(loader.epoch(0), torch_loader.epoch(0), strict=True):
        assert torch.equal(a, b)

    written = path.stat().st_mtime_ns
    build_loader(folder, loader="ffcv", **ARGUMENTS)
    assert path.stat().st_mtime_ns == written
    assert capsys.readouterr().out.splitlines()[-1].endswith("(unchanged, written earlier from the same images)")

    os.utime(folder.paths[0])
    build_loader(folder, loader="ffcv", **ARGUMENTS)
    assert path.stat().st_mtime_ns != written
    assert "the images of folder have changed since" in capsys.readouterr().out

    build_loader(folder, loader="ffcv", settings=BetonSettings(mode="jpg", quality=80), **ARGUMENTS)
    assert "was written with other settings" in capsys.readouterr().out
    assert read_sidecar(path).settings.quality == 80


@pytest.mark.usefixtures("_ffcv")
def test_damaged_file_is_written_again(folder: ImageDataset, image_folder: Path, capsys: pytest.CaptureFixture) -> None:
    path = image_folder / "train.beton"
    build_loader(folder, loader="auto", **ARGUMENTS)
    path.write_bytes(path.read_bytes()[:1000])
    build_loader(folder, loader="auto", **ARGUMENTS)
    sidecar_path(path).unlink()
    build_loader(folder, loader="auto", **ARGUMENTS)
    printed = capsys.readouterr().out
    assert "truncated or was replaced" in printed and "has no train.beton.json beside it" in printed


@pytest.mark.usefixtures("_ffcv")
def test_images_in_memory_go_to_the_cache(
    memory: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    build_loader(memory, loader="auto", verbose=False, **ARGUMENTS)
    assert (tmp_path / "xdg" / "idml" / "folder-train-32px.beton").is_file()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    build_loader(memory, loader="auto", verbose=False, **ARGUMENTS)
    assert (tmp_path / "home" / ".cache" / "idml" / "folder-train-32px.beton").is_file()


@pytest.mark.usefixtures("_ffcv")
def test_any_file_of_the_data_in_the_cache_folder_serves(
    folder: ImageDataset, memory: ImageDataset, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cache = tmp_path / "cache"
    other = {"source": "mine", "split": "x", "workers": 1, "progress": False}
    write_beton(memory, cache / "a.beton", BetonSettings(max_side=16), **other)  # images in memory are not resized
    write_beton(folder, cache / "b.beton", BetonSettings(max_side=36), **other)
    build_loader(folder, loader="auto", cache_dir=cache, **ARGUMENTS)
    assert f"from {cache / 'b.beton'} (raw, written earlier" in capsys.readouterr().out
    build_loader(memory, loader="auto", cache_dir=cache, **ARGUMENTS)
    assert f"writing {cache / 'folder-train-32px.beton'}" in capsys.readouterr().out
    build_loader(folder, loader="auto", cache_dir=cache, settings=BetonSettings(), **ARGUMENTS)
    assert len(list(cache.glob("*.beton"))) == 4


@pytest.mark.usefixtures("_ffcv")
def test_file_given_by_name_must_fit(folder: ImageDataset, memory: ImageDataset, tmp_path: Path) -> None:
    write_beton(folder, tmp_path / "x.beton", BetonSettings(), source="", split="", workers=1, progress=False)
    assert len(build_loader(folder, loader="ffcv", beton=tmp_path / "x.beton", **ARGUMENTS)) == 5
    with pytest.raises(UserError, match="holds other data"):
        build_loader(memory, loader="ffcv", beton=tmp_path / "x.beton", **ARGUMENTS)


@pytest.mark.usefixtures("_ffcv")
def test_subset_is_read_from_the_file_of_all(folder: ImageDataset, image_folder: Path) -> None:
    subset = np.array([30, 2, 17])
    both = [build_loader(folder, loader=name, subset=subset, **ARGUMENTS) for name in ("torch", "ffcv")]
    (a, a_labels), (b, b_labels) = (next(loader.epoch(0)) for loader in both)
    assert torch.equal(a, b) and a_labels.tolist() == b_labels.tolist() == [2, 0, 1]
    assert read_sidecar(image_folder / "train.beton").count == 36


@pytest.mark.usefixtures("_ffcv")
def test_a_user_without_a_home_has_the_torch_loader(
    memory: ImageDataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As in a container that runs under a number alone."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert isinstance(build_loader(memory, loader="auto", **ARGUMENTS), TorchLoader)
    assert "there is no home folder for it; --cache-dir DIR" in capsys.readouterr().out
    with pytest.raises(UserError, match="--cache-dir DIR names a place"):
        build_loader(memory, loader="ffcv", **ARGUMENTS)
    assert not isinstance(build_loader(memory, loader="ffcv", cache_dir=tmp_path, **ARGUMENTS), TorchLoader)


@pytest.mark.usefixtures("_ffcv")
def test_other_ranks_wait_for_rank_0(
    folder: ImageDataset, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(loaders, "POLL_SECONDS", 0.01)
    results = []
    waiting = threading.Thread(
        target=lambda: results.append(build_loader(folder, loader="auto", rank=1, world_size=2, **ARGUMENTS))
    )
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive() and not (image_folder / "train.beton").exists()
    assert capsys.readouterr().out == ""
    first = build_loader(folder, loader="auto", rank=0, world_size=2, **ARGUMENTS)
    waiting.join(20)
    seen = np.concatenate([*first.batches(0), *results[0].batches(0)])
    np.testing.assert_array_equal(np.sort(seen), np.arange(36))


@pytest.mark.usefixtures("_ffcv")
@pytest.mark.parametrize("world_size", [1, 2])
def test_class_balanced_batches_are_the_same_through_both_loaders(folder: ImageDataset, world_size: int) -> None:
    arguments = ARGUMENTS | {"batch_size": 12, "train": True, "per_class": 4, "seed": 3, "verbose": False}
    for rank in range(world_size):
        ours, theirs = (
            build_loader(folder, loader=name, rank=rank, world_size=world_size, **arguments)
            for name in ("torch", "ffcv")
        )
        assert len(ours) == len(theirs) == 3
        assert ours.global_sizes() == theirs.global_sizes() == [12, 12, 12]
        for epoch in (0, 1):
            for (a, a_labels), (b, b_labels), indices in zip(
                ours.epoch(epoch), theirs.epoch(epoch), ours.batches(epoch), strict=True
            ):
                assert a_labels.tolist() == b_labels.tolist() == folder.labels[indices].tolist()
                assert torch.equal(a, b)
                if world_size == 1:
                    assert a_labels.bincount().tolist() == [4, 4, 4]


def test_where_files_go(
    folder: ImageDataset, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def place(dataset: ImageDataset, split: str = "train", cache_dir: Path | None = None) -> Path:
        return loaders.default_beton(dataset, source="folder", split=split, cache_dir=cache_dir)

    assert place(folder) == image_folder / "train.beton"
    assert place(folder, "val") == image_folder / "train-val.beton"
    one = place(folder, cache_dir=tmp_path)
    other = list_class_folders((image_folder / "train").rename(tmp_path / "train"), layout="")
    assert one.parent == tmp_path and one.name.startswith("train-") and one != place(other, cache_dir=tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert place(other).parent == tmp_path / "xdg" / "idml"


@pytest.mark.usefixtures("_ffcv")
def test_full_disk_at_first_use_is_one_line(
    folder: ImageDataset, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image_folder / "train.beton").mkdir()
    (image_folder / "train.beton" / "x").touch()
    with pytest.raises(UserError, match=r"cannot write .*train\.beton.*; --cache-dir DIR names") as caught:
        build_loader(folder, loader="ffcv", **ARGUMENTS)
    assert "\n" not in str(caught.value)
    assert isinstance(build_loader(folder, loader="auto", **ARGUMENTS), TorchLoader)
    said = capsys.readouterr().out.splitlines()[-1]
    assert "torch loader, because FFCV cannot write" in said and "--cache-dir DIR" in said
    with pytest.raises(UserError, match="--cache-dir DIR"):  # other ranks wait for the file
        build_loader(folder, loader="auto", rank=0, world_size=2, **ARGUMENTS)
    assert not json.dumps([path.name for path in image_folder.iterdir()]).count("tmp")
