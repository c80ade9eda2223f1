"""A file that would run something when it is unpickled, put in every place from which a file is read: it never runs."""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import socket
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import train_cls
import train_dml
from idml.errors import UserError
from idml.tables import print_table
from tests.test_cars import write_one_file
from tests.test_resume import CLS, DML


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self.path, "w")


@pytest.fixture
def went_off(tmp_path: Path) -> Path:
    """The file that a bomb makes."""
    return tmp_path / "went-off"


def test_the_bomb_works(went_off: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(went_off)))
    assert went_off.exists()


def npz(path: Path, **arrays: np.ndarray) -> None:
    np.savez(path, allow_pickle=True, **arrays)


def in_checkpoint(path: Path, bomb: Bomb) -> None:
    torch.save({"model": {}, "config": {"model": bomb}, "classes": [], "preprocessing": {}, "step": 0}, path)


PLACES = ["resume", "eval", "pretrained pth", "pretrained bare pickle", "pretrained safetensors", "emoji object array"]
PLACES += ["emoji bare pickle", "cars_annos.mat", "config yaml", "config tag", "beton", "beton sidecar", "emoji in zip"]


@pytest.mark.parametrize("place", PLACES)
def test_no_file_is_run(tmp_path: Path, went_off: Path, image_folder: Path, place: str) -> None:
    bomb, out = Bomb(went_off), ["--output-dir", str(tmp_path / "out")]
    one = ["--max-steps", "1", *out]
    call: Callable[[], Any]
    match place:
        case "resume" | "eval":
            (tmp_path / "run/checkpoints").mkdir(parents=True)
            path = tmp_path / "run/checkpoints/last.pt"
            in_checkpoint(path, bomb)
            flags = (
                ["--resume", str(tmp_path / "run")] if place == "resume" else ["--eval-only", "--checkpoint", str(path)]
            )
            call = lambda: train_cls.main([*flags, *out])  # noqa: E731
        case "pretrained pth" | "pretrained bare pickle" | "pretrained safetensors":
            path = tmp_path / ("weights.safetensors" if "safetensors" in place else "weights.pth")
            if place == "pretrained pth":
                torch.save({"state_dict": {"conv1.weight": bomb}}, path)
            else:
                path.write_bytes(pickle.dumps(bomb))
            call = lambda: train_cls.main([*CLS, "--pretrained", str(path), *one])  # noqa: E731
        case "emoji object array" | "emoji bare pickle" | "emoji in zip":
            path = tmp_path / "pack.npz"
            if place == "emoji object array":
                fine = dict.fromkeys(("y", "vendor", "vendors", "classes", "names"), np.zeros(3))
                npz(path, X=np.array([bomb], dtype=object), **fine)
            elif place == "emoji bare pickle":
                path.write_bytes(pickle.dumps(bomb))
            else:
                with zipfile.ZipFile(path, "w") as archive:
                    for name in ("X", "y", "vendor", "vendors", "classes", "names"):
                        archive.writestr(f"{name}.npy", pickle.dumps(bomb))
            call = lambda: train_dml.main([*DML, "--dataset", "emoji", "--data-dir", str(path), *one])  # noqa: E731
        case "cars_annos.mat":
            write_one_file(tmp_path / "data/cars196")
            (tmp_path / "data/cars196/cars_annos.mat").write_bytes(pickle.dumps(bomb))
            call = lambda: train_dml.main(["--dataset", "cars", "--data-dir", str(tmp_path / "data"), *one])  # noqa: E731
        case "config yaml" | "config tag":
            config = tmp_path / "config.yaml"
            tag = "!!python/object/apply:builtins.open" if place == "config yaml" else "!!python/name:os.system"
            config.write_text(f"lr: {tag} [{went_off}, w]\n")
            call = lambda: train_cls.main(["--config", str(config), *one])  # noqa: E731
        case _:
            options = ["--dataset", "folder", "--data-dir", str(image_folder), "--image-size", "16", "--loader", "ffcv"]
            options += ["--model", "resnet8_cifar", "--batch-size", "8", "--cache-dir", str(tmp_path / "cache")]
            train_cls.main([*options, "--max-steps", "1", "--no-verbose", "--output-dir", str(tmp_path / "first")])
            suffix = "*.beton" if place == "beton" else "*.beton.json"
            for path in (tmp_path / "cache").glob(suffix):
                path.write_bytes(pickle.dumps(bomb))
            call = lambda: train_cls.main([*options, *one])  # noqa: E731
    if place.startswith("beton"):  # the file in the cache may also be written again
        with contextlib.suppress(UserError):
            call()
    else:
        with pytest.raises(UserError):
            call()
    assert not went_off.exists()


def test_tables_read_no_code(tmp_path: Path, went_off: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_bytes(pickle.dumps(Bomb(went_off)))
    with pytest.raises(UserError):
        print_table([str(run)])
    assert not went_off.exists()


def test_a_checkpoint_of_ours_has_no_code(tmp_path: Path) -> None:
    """Nothing but tensors and plain values: what unpickling it calls is torch's own rebuilding of tensors."""
    run = tmp_path / "run"
    train_dml.main([*DML, "--max-steps", "1", "--output-dir", str(run)])
    with zipfile.ZipFile(run / "checkpoints/last.pt") as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    names = [argument for opcode, argument, _ in pickletools.genops(content) if opcode.name == "GLOBAL"]
    assert names and set(names) <= {
        *("torch._utils _rebuild_tensor_v2", "collections OrderedDict"),
        *(f"torch {kind}Storage" for kind in ("Float", "Long", "Byte", "Bool")),
    }
    assert not [
        opcode for opcode, _, _ in pickletools.genops(content) if opcode.name in ("STACK_GLOBAL", "INST", "OBJ")
    ]


@pytest.mark.parametrize(("script", "options"), [(train_cls, CLS), (train_dml, DML)], ids=["cls", "dml"])
def test_nothing_is_asked_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: ModuleType, options: list[str]
) -> None:
    """Training and evaluation, with TensorBoard and pictures: no name is looked up, and nobody is called."""
    asked: list[object] = []

    def refuse(*arguments: object, **_options: object) -> None:
        asked.append(arguments)
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(OSError, match="no network"):
        urllib.request.urlopen("http://localhost:9/")
    asked.clear()
    script.main([*options, "--max-steps", "1", "--output-dir", str(tmp_path / "run")])
    assert asked == []
    assert (tmp_path / "run/results.json").exists()
