"""Weights from files: what fits is loaded, what does not is listed, and nothing in a file is executed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from idml import IntrospectiveClassifier, UserError
from idml.checkpoint import load_weights, read_checkpoint


def backbone() -> torch.nn.Module:
    return timm.create_model("resnet8_cifar", num_classes=0)


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("form", ["safetensors", "pth", "state_dict", "module prefix", "our checkpoint"])
def test_weights_are_loaded_from_every_form(tmp_path: Path, form: str) -> None:
    trained = timm.create_model("resnet8_cifar", num_classes=7)
    state = trained.state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(state, path)
    elif form == "our checkpoint":
        torch.save({"model": IntrospectiveClassifier(trained_copy(trained), 3).state_dict()}, path)
    else:
        wrapped = {f"module.{name}": value for name, value in state.items()} if form == "module prefix" else state
        torch.save({"state_dict": wrapped, "epoch": 3} if form == "state_dict" else wrapped, path)
    model = backbone()
    assert not same(model.state_dict(), state)
    load_weights(model, path)
    assert same(model.state_dict(), state)


def trained_copy(model: torch.nn.Module) -> torch.nn.Module:
    copy = backbone()
    copy.load_state_dict(model.state_dict(), strict=False)
    return copy


def test_what_does_not_fit_is_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    state = backbone().state_dict()
    del state["bn1.weight"]
    state["conv1.weight"] = torch.zeros(16, 1, 3, 3)
    state["head.extra"] = torch.zeros(2)
    torch.save(state, tmp_path / "w.pth")
    model = backbone()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(model, tmp_path / "w.pth")
    for expected in (
        "bn1.weight is missing",
        "conv1.weight has shape (16, 1, 3, 3), expected (16, 3, 3, 3)",
        "head.extra is not in the model",
        "--pretrained-allow-missing",
    ):
        assert expected in str(caught.value)
    assert same(before, model.state_dict())
    load_weights(model, tmp_path / "w.pth", allow_missing=["bn1", "conv1", "head"])
    assert torch.equal(model.state_dict()["conv1.weight"], before["conv1.weight"])
    assert torch.equal(model.state_dict()["bn1.bias"], state["bn1.bias"])


class Bomb:
    def __reduce__(self) -> tuple:
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "pt"])
@pytest.mark.parametrize("content", ["bomb", "text", "empty", "truncated", "missing"])
def test_a_hostile_or_damaged_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, content: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"w.{suffix}"
    if content == "bomb":
        torch.save({"model": Bomb()}, path)
    elif content == "truncated":
        torch.save(backbone().state_dict(), path)
        path.write_bytes(path.read_bytes()[:5000])
    elif content != "missing":
        path.write_bytes(b"" if content == "empty" else b"not a checkpoint")
    for read in (lambda: load_weights(backbone(), path), lambda: read_checkpoint(path)):
        with pytest.raises(UserError, match=str(path)) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_a_file_of_something_else_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save(backbone().state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"not a checkpoint of train_cls\.py or train_dml\.py: it has no model, config"):
        read_checkpoint(tmp_path / "w.pt")
