"""Files of weights as other programs write them: entries, averages, wrappers, options beside them, and what is said."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import os
import pathlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn

import train_cls
import train_dml
from idml.backbones import create_backbone
from idml.checkpoint import load_weights, read_checkpoint
from idml.errors import UserError
from idml.torch_file import STAND_INS, load_torch_file

MODEL = "resnet8_cifar"
State = dict[str, Tensor]


def state_of(seed: int, **options: Any) -> State:
    torch.manual_seed(seed)
    return timm.create_model(MODEL, **{"num_classes": 7} | options).state_dict()


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def assert_loaded(path: Path, expected: State, **options: Any) -> None:
    model = create_backbone(MODEL)
    load_weights(model, path, **options)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


# ---- averages, and other entries ----


def test_the_average_is_taken_and_the_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As timm's train.py --model-ema writes it."""
    plain, average, path = state_of(1), state_of(2), tmp_path / "w.pth.tar"
    torch.save({"epoch": 3, "arch": MODEL, "state_dict": plain, "state_dict_ema": average}, path)
    assert_loaded(path, average)
    assert capsys.readouterr().out == (
        f"weights: state_dict_ema of {path} (state_dict is there too: --pretrained-key state_dict); "
        "left out: fc.weight, fc.bias (2 tensors)\n"
    )
    assert_loaded(path, plain, key="state_dict")
    assert "weights: state_dict of" in capsys.readouterr().out
    torch.save({"state_dict": plain, "state_dict_ema": None}, path)
    assert_loaded(path, plain)
    assert f"weights: state_dict of {path}; left out" in capsys.readouterr().out


def test_what_timms_own_saver_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=7)
    average = ModelEmaV3(timm.create_model(MODEL, num_classes=7))
    args = argparse.Namespace(model=MODEL, data_dir=pathlib.Path("/data"), mean=None, lr=0.1)
    optimizer, folder = torch.optim.AdamW(model.parameters()), str(tmp_path)
    saver = CheckpointSaver(
        model, optimizer, args=args, model_ema=average, checkpoint_dir=folder, recovery_dir=folder, decreasing=False
    )
    saver.save_checkpoint(0, metric=np.float64(0.5))
    (path,) = tmp_path.glob("checkpoint-0*")
    assert_loaded(path, average.module.state_dict())
    assert_loaded(path, model.state_dict(), key="state_dict")


def test_the_average_of_torchvisions_reference_script(tmp_path: Path) -> None:
    """It is an AveragedModel, which puts module. before the names and counts in n_averaged."""
    plain, average, path = state_of(1), state_of(2), tmp_path / "model_9.pth"
    average_model = torch.optim.swa_utils.AveragedModel(timm.create_model(MODEL, num_classes=7))
    average_model.module.load_state_dict(average)
    torch.save({"model": plain, "model_ema": average_model.state_dict(), "epoch": 9}, path)
    assert_loaded(path, average)
    assert_loaded(path, plain, key="model")


def test_an_average_without_what_is_not_trained_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plain = state_of(1)
    average = {name: value for name, value in state_of(2).items() if "running" not in name and "tracked" not in name}
    torch.save({"state_dict": plain, "ema": average}, tmp_path / "w.pth")
    assert_loaded(tmp_path / "w.pth", plain)
    assert "(ema is there too: --pretrained-key ema)" in capsys.readouterr().out


@pytest.mark.parametrize("entry", ["net", "network", "model_state_dict", "params", "module"])
def test_an_entry_of_any_name(tmp_path: Path, entry: str) -> None:
    state = state_of(1)
    content = {entry: state, "optimizer": {"state": {0: {"momentum": torch.zeros(3)}}}, "best": torch.tensor(0.5)}
    torch.save(content, tmp_path / "w.pth")
    assert_loaded(tmp_path / "w.pth", state)


def test_which_of_two_must_be_said(tmp_path: Path) -> None:
    first, second, path = state_of(1), state_of(2), tmp_path / "w.pth"
    torch.save({"net_a": first, "net_b": second}, path)
    with pytest.raises(UserError, match=r"more than once, as net_a and net_b: say which with --pretrained-key net_a$"):
        load_weights(create_backbone(MODEL), path)
    assert_loaded(path, second, key="net_b")
    # MoCo has both of its encoders in one entry, beside a queue.
    both = prefixed(first, "module.encoder_q.") | prefixed(second, "module.encoder_k.")
    torch.save({"state_dict": both | {"module.queue": torch.zeros(4)}}, path)
    with pytest.raises(UserError, match=r"as module\.encoder_q and module\.encoder_k: say which"):
        load_weights(create_backbone(MODEL), path)
    assert_loaded(path, first, key="module.encoder_q")
    # DINO's teacher is the average of its student.
    torch.save({"student": prefixed(first, "module.backbone."), "teacher": prefixed(second, "backbone.")}, path)
    assert_loaded(path, second)


@pytest.mark.parametrize(
    ("content", "there"),
    [
        ({"state_dict": state_of(1), "optimizer": {}}, "it has state_dict$"),
        (state_of(1), "its tensors are under no entry$"),
    ],
)
def test_a_key_that_is_not_there(tmp_path: Path, content: Any, there: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"--pretrained-key nonsense: .*w\.pth has no such weights: {there}"):
        load_weights(create_backbone(MODEL), tmp_path / "w.pth", key="nonsense")


def test_a_file_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"has no tensors by name: it has epoch, args$"):
        load_weights(create_backbone(MODEL), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"is a folder: give the file in it$"):
        load_weights(create_backbone(MODEL), tmp_path)


# ---- wrappers ----

PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "module.model.backbone."]
PREFIXES += [
    "backbone.module._orig_mod.",
    "encoder.",
    "_forward_module.model.",
    "_fsdp_wrapped_module.",
    "trunk.visual.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_wrappers_in_any_order(tmp_path: Path, prefix: str, kind: str) -> None:
    state, path = state_of(1), tmp_path / f"w.{kind}"
    wrapped = prefixed(state, prefix)
    if kind == "safetensors":
        save_file(wrapped, path)
    else:
        torch.save({"state_dict": wrapped, "epoch": 1}, path)
    assert_loaded(path, state)


def test_wrappers_within_a_model(tmp_path: Path) -> None:
    """Of blocks that were compiled, or whose activations are checkpointed, by themselves."""
    state = state_of(1)
    inner = {
        name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module._orig_mod."): value
        for name, value in prefixed(state, "module.").items()
    }
    assert any("_orig_mod" in name for name in inner)
    torch.save(inner, tmp_path / "w.pth")
    assert_loaded(tmp_path / "w.pth", state)


class WithWrapperNames(nn.Module):
    """A network whose own layers are called like wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.model, self.module = nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 5)


@pytest.mark.parametrize("prefix", ["", "model.", "module.backbone.", "backbone.model.module."])
def test_a_models_own_layers_are_no_wrappers(tmp_path: Path, prefix: str) -> None:
    trained, fresh = WithWrapperNames(), WithWrapperNames()
    torch.save(prefixed(trained.state_dict(), prefix), tmp_path / "w.pth")
    load_weights(fresh, tmp_path / "w.pth")
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in fresh.state_dict().items())


def test_what_is_not_the_backbones_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = state_of(1)
    more = {f"criterion.{name}": torch.zeros(2) for name in "abcdef"}
    torch.save({"state_dict": prefixed(state, "model.") | more}, tmp_path / "w.pth")
    assert_loaded(tmp_path / "w.pth", state)
    line = capsys.readouterr().out
    assert line.endswith("left out: fc.weight, fc.bias, criterion.a, criterion.b, criterion.c, ... (8 tensors)\n"), (
        "names without the wrapper"
    )


def test_weights_of_another_network_say_what_they_are(tmp_path: Path) -> None:
    torch.save({"arch": "vit_b_16", "model": timm.create_model("test_vit").state_dict()}, tmp_path / "w.pth")
    with pytest.raises(UserError) as caught:
        load_weights(create_backbone(MODEL), tmp_path / "w.pth")
    count = len(timm.create_model("test_vit").state_dict())
    assert str(caught.value) == (
        f"{tmp_path / 'w.pth'} does not fit the model {MODEL}: none of its tensors has a name of the model's "
        "(conv1.weight, bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var, ...); the file holds "
        f"{count} tensors under model: cls_token, pos_embed, patch_embed.proj.weight, patch_embed.proj.bias, "
        "blocks.0.norm1.weight, ..., of the architecture vit_b_16"
    )


def test_weights_that_fit_in_part_say_what_they_have(tmp_path: Path) -> None:
    state = prefixed(state_of(1), "module.")
    del state["module.bn1.weight"]
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"bn1\.weight is missing; the file holds \d+ tensors under state_dict: module\."
    ):
        load_weights(create_backbone(MODEL), tmp_path / "w.pth")


def test_files_from_before_torch_counted_batches(tmp_path: Path) -> None:
    """Torchvision's oldest weights have no num_batches_tracked."""
    state = {name: value for name, value in state_of(1).items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pth")
    model = create_backbone(MODEL)
    load_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state if not name.startswith("fc."))


# ---- what is beside the weights ----

BESIDE: dict[str, Any] = {
    "args of argparse": argparse.Namespace(
        lr=0.1, data=pathlib.PosixPath("/data"), out=pathlib.PureWindowsPath("c:/x")
    ),
    "defaultdict": collections.defaultdict(list, {"loss": [1.0, 2.0]}),
    "OrderedDict": collections.OrderedDict(a=1),
    "Counter": collections.Counter({30: 1, 60: 1}),
    "deque": collections.deque([1, 2], maxlen=20),
    "numbers of NumPy": [np.float64(0.5), np.int64(3), np.float32(1), np.bool_(True)],
    "arrays of NumPy": [np.arange(3.0), np.array(["a"]), np.array([1, None], dtype=object)],
    "random state of NumPy": np.random.RandomState(0).get_state(),
    "times": [datetime.datetime(2024, 1, 2), datetime.timedelta(seconds=3)],
    "version of torch": torch.__version__,
    "device": torch.device("cpu"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("kind", BESIDE)
def test_training_checkpoints_of_other_programs(tmp_path: Path, kind: str, zipped: bool) -> None:
    state, path = state_of(1), tmp_path / "w.pth"
    content = {"arch": MODEL, "epoch": 3, "state_dict": state, "optimizer": {"param_groups": []}, "args": BESIDE[kind]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    before = torch.serialization.get_safe_globals()
    assert_loaded(path, state)
    assert set(torch.serialization.get_safe_globals()) == set(before)
    assert load_torch_file(path, foreign=True, lazily=True)["epoch"] == 3


class Bomb:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch went-off",)


class Evil:
    """Would run a function of Python's own."""

    def __reduce__(self) -> tuple:
        return eval, ("open('went-off', 'w')",)


class Address:
    """Eight bytes that NumPy would take for the address of an object: the process crashes when it looks there."""

    class Type:
        def __reduce__(self) -> tuple:
            return np.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 0)

    def __reduce__(self) -> tuple:
        return np._core.multiarray.scalar, (self.Type(), b"\x01" * 8)


class Options:
    """A class of the program that wrote the file."""


@pytest.mark.parametrize(
    ("hostile", "named"),
    [
        (Bomb(), "posix.system"),
        (Evil(), "builtins.eval"),
        (functools.partial(print, "x"), "functools.partial"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (Options(), "tests.test_weights.Options"),
        (argparse.Namespace(inner=collections.defaultdict(Options)), "tests.test_weights.Options"),
        (np.random.default_rng(0), "numpy.random._pickle.__generator_ctor"),
    ],
    ids=["function", "builtin", "partial", "layer", "own class", "factory", "generator"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("script", [train_cls, train_dml], ids=["cls", "dml"])
def test_a_class_in_the_way_is_named_and_nothing_is_run(
    in_tmp: Path, hostile: Any, named: str, zipped: bool, script: Any
) -> None:
    torch.save({"model": state_of(1), "args": hostile}, "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as caught:
        script.main(["--model", MODEL, "--pretrained", "w.pth"])
    assert str(caught.value) == (
        f"w.pth holds {named}, which is not read: building it could run code. In the program that wrote the file, "
        "write the weights alone: torch.save(model.state_dict(), 'weights.pth')"
    )
    assert os.listdir() == ["w.pth"]


def test_bytes_are_never_taken_for_addresses(tmp_path: Path) -> None:
    """With NumPy's own functions allowed, as torch proposes, this file ends the process with a segmentation fault."""
    state = state_of(1)
    torch.save({"state_dict": state, "best": Address()}, tmp_path / "w.pth")
    assert_loaded(tmp_path / "w.pth", state)


def test_stand_ins_do_nothing() -> None:
    """No function among them but those of this file, and no type that looks at the disk."""
    plain = {bool, int, float, str, list, tuple, dict, argparse.Namespace}
    pure = {pathlib.PurePosixPath, pathlib.PureWindowsPath}
    others = {stand_in for stand_in in STAND_INS.values() if stand_in not in plain | pure}
    assert {stand_in.__module__ for stand_in in others} == {"idml.torch_file"}
    assert not any(issubclass(kind, pathlib.Path) for kind in pure)


def test_checkpoints_of_this_project_have_no_stand_ins(tmp_path: Path) -> None:
    """Where one is resumed, an option must not turn into something else."""
    content = {"model": {}, "config": {"lr": np.float64(0.1)}, "classes": [], "preprocessing": {}}
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"holds numpy\._core\.multiarray\.scalar, which is not read"):
        read_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x05K\x01.", b"PK\x03\x04" + b"\0" * 40])
def test_damage_is_one_line_without_escape_codes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    for options in ({}, {"foreign": True}, {"foreign": True, "lazily": True}):
        with pytest.raises(UserError, match=r"is damaged, or holds more than tensors and plain values: .") as caught:
            load_torch_file(tmp_path / "w.pth", **options)
        assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
        assert "weights_only" not in str(caught.value)


# ---- the option ----


@pytest.mark.parametrize("script", [train_cls, train_dml], ids=["cls", "dml"])
def test_the_key_reaches_the_file_and_warns_without_one(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], script: Any
) -> None:
    torch.save({"state_dict": state_of(1), "state_dict_ema": state_of(2)}, "w.pth")
    options = ["--model", MODEL, "--image-size", "32", "--max-steps", "1", "--lr", "1e-12", "--output-dir", "run"]
    options += ["--loader", "torch", "--batch-size", "8", "--no-verbose", "--no-introspect"]
    options += ["--no-nmi"] if script is train_dml else []
    script.main([*options, "--pretrained", "w.pth", "--pretrained-key", "state_dict"])
    assert "weights: state_dict of w.pth (state_dict_ema is there too" in capsys.readouterr().out
    stored = torch.load("run/checkpoints/last.pt", weights_only=True)["model"]["backbone.conv1.weight"]
    torch.testing.assert_close(stored, state_of(1)["conv1.weight"], atol=1e-6, rtol=0)
    script.main(["--pretrained", "--pretrained-key", "state_dict", "--print-config"])
    expected = "warning: --pretrained-key state_dict has no effect: there is no --pretrained FILE"
    assert expected in capsys.readouterr().err
