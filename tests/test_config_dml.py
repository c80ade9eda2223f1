"""Options of train_dml.py: the released trainer's defaults and spellings, what follows from what, and mistakes."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from idml import config_dml
from idml.config import dump_config
from idml.config_dml import DmlConfig, parse_dml_config
from idml.errors import UserError


def parse(*arguments: str) -> DmlConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return parse_dml_config(arguments, description="")[0]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


RELEASED = {
    "loss": "Proxy_Anchor", "embedding_size": 512, "epochs": 60, "optimizer": "adamw", "weight_decay": 1e-4,
    "lr": 1e-4, "lr_decay_step": 10, "lr_decay_gamma": 0.5, "alpha": 32.0, "mrg": 0.1, "loss_lr_factor": 100.0,
    "clip_value": 10.0, "workers": 4, "seed": 1, "IPC": None, "warm": 1, "l2_norm": 1,
    "model": "resnet50", "gpu": None, "temperature": 5.0, "mix_alpha": 1.0, "pool": "avg+max", "batch_size": 120,
}  # fmt: skip
OURS = {
    "ism": "live", "mix": "none", "uncertainty_dim": 512, "dataset": "emoji-mini", "pretrained": None,
    "precision": "fp32", "nmi": True, "ks": [1, 2, 4, 8], "lone_queries": "miss", "eval_only": False,
    "bn_freeze": 0,
}  # fmt: skip


def test_defaults_are_the_released_trainers() -> None:
    config = parse()
    assert {name: getattr(config, name) for name in RELEASED} == RELEASED
    assert {name: getattr(config, name) for name in OURS} == OURS
    # Released networks start from ImageNet weights, batch norm frozen; one that does not must have its own figures.
    assert parse("--pretrained").bn_freeze == 1
    assert parse("--pretrained", "weights.pth").bn_freeze == 1


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (("--embedding-size", "64"), "embedding_size", 64),
        (("--embedding_size=64",), "embedding_size", 64),
        (("--sz-embedding", "64"), "embedding_size", 64),
        (("--sz_embedding", "64"), "embedding_size", 64),
        (("--lr-decay-step", "3"), "lr_decay_step", 3),
        (("--lr_decay_gamma", "0.25"), "lr_decay_gamma", 0.25),
        (("--bn-freeze", "0"), "bn_freeze", 0),
        (("--bn_freeze", "1"), "bn_freeze", 1),
        (("--l2-norm", "0"), "l2_norm", 0),
        (("--IPC", "4"), "IPC", 4),
        (("--ipc", "4"), "IPC", 4),
        (("--gpu", "-1"), "gpu", -1),
        (("--gpu-id", "-1"), "gpu", -1),
        (("--gpu_id=0",), "gpu", 0),
        (("-b", "60"), "batch_size", 60),
        (("-j", "2", "--dataset", "emoji"), "workers", 2),
        (("--optimizer", "rmsprop"), "optimizer", "rmsprop"),
        (("--no-nmi",), "nmi", False),
        (("--flip",), "flip", True),
        (("--no-flip",), "flip", False),
        (("--ks", "8", "1", "2", "1"), "ks", [1, 2, 8]),
        (("--ks", "8,1", "2,1"), "ks", [1, 2, 8]),
        (("--ks=8,1,2", "--lr=1"), "ks", [1, 2, 8]),
        (("--pretrained",), "pretrained", "timm"),
        (("--pretrained", "a.pth"), "pretrained", "a.pth"),
        (("--pretrained", "--lr", "1e-3"), "pretrained", "timm"),
        (("--model-kwargs", "drop_path_rate=0.1", "depth=3"), "model_kwargs", ["drop_path_rate=0.1", "depth=3"]),
        (("--warm", "0"), "warm", 0),
        (("--max-steps", "null"), "max_steps", None),
        (("--dataset", "Inshop", "--pretrained"), "dataset", "inshop"),
        (("--dataset", "SOP", "--pretrained"), "dataset", "sop"),
    ],
)
def test_spellings(arguments: tuple[str, ...], name: str, value: object) -> None:
    assert getattr(parse(*arguments), name) == value


@pytest.mark.parametrize("loss", ["Proxy_Anchor", "Proxy_NCA", "MS", "Contrastive", "Triplet", "NPair"])
def test_the_released_names_of_losses(loss: str) -> None:
    assert parse("--loss", loss).loss == loss


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), {"mix": "none", "val_fraction": 0.1, "introspect": True}),
        (("--ism", "live"), {"mix": "none"}),
        (("--ism", "released", "--dataset", "cub", "--pretrained"), {"mix": "mixup", "val_fraction": 0.0}),
        (("--dataset", "SOP", "--pretrained"), {"mix": "mixup", "val_fraction": 0.0, "introspect": False}),
        (("--dataset", "cars", "--pretrained", "--val-fraction", "0.2"), {"val_fraction": 0.2, "introspect": True}),
        (("--val-fraction", "0"), {"introspect": False}),
        (("--no-introspect",), {"val_fraction": 0.1, "introspect": False}),
        (("--ism", "off", "--dataset", "cub", "--pretrained"), {"mix": "none"}),
        (("--ism", "off"), {"mix": "none"}),
        (("--ism", "off", "--mix", "mixup"), {"mix": "mixup"}),
        (("--ism", "live", "--mix", "none"), {"mix": "none"}),
        (("--mix", "cutmix"), {"mix": "cutmix"}),
        (("--embedding-size", "64"), {"uncertainty_dim": 64}),
        (("--embedding-size", "64", "--uncertainty-dim", "16"), {"uncertainty_dim": 16}),
        (("--loss", "Triplet"), {"mrg": 0.1, "alpha": None}),
        (("--loss", "Contrastive"), {"mrg": 0.5, "alpha": None}),
        (("--loss", "Margin"), {"mrg": 0.2, "alpha": None, "loss_lr_factor": 50.0}),
        (("--loss", "Proxy_NCA"), {"mrg": None, "alpha": 32.0, "loss_lr_factor": 100.0}),
        (("--loss", "MS"), {"mrg": None, "alpha": None}),
        (("--loss", "Margin", "--mrg", "0.3"), {"mrg": 0.3}),
        (("--mrg", "0"), {"mrg": 0.0}),
        (("--alpha", "16"), {"alpha": 16.0}),
        (("--dataset", "sop", "--pretrained"), {"ks": [1, 10, 100, 1000], "data_dir": "data"}),
        (("--dataset", "inshop", "--pretrained"), {"ks": [1, 10, 20, 30, 40, 50], "data_dir": "data"}),
        (("--dataset", "cub", "--pretrained", "--data-dir", "x"), {"ks": [1, 2, 4, 8], "data_dir": "x"}),
        (("--dataset", "csv", "--csv", "some/where/list.csv"), {"data_dir": "some/where"}),
        (("--dataset", "csv", "--csv", "a/list.csv", "--data-dir", "b"), {"data_dir": "b"}),
        (("--dataset", "folder", "--data-dir", "b"), {"data_dir": "b"}),
    ],
)
def test_what_follows_from_what(arguments: tuple[str, ...], expected: dict[str, Any]) -> None:
    config = parse(*arguments)
    assert {name: getattr(config, name) for name in expected} == expected


def test_method_is_loss_and_variant() -> None:
    assert parse("--loss", "MS").method == "MS + ISM live"
    assert parse("--ism", "off").method == "Proxy_Anchor"


def test_defaults_file_and_flags_in_that_order(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "lr: 0.3\nepochs: 7\nism: off\nIPC: 2\n")
    config = parse("--config", file, "--lr", "0.4")
    assert (config.lr, config.epochs, config.ism, config.mix, config.IPC, config.seed) == (0.4, 7, "off", "none", 2, 1)
    assert parse("--config", file, "--ism", "live", "--dataset", "cub", "--pretrained").mix == "mixup"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--ism", "off"),
        ("--loss", "MS"),
        ("--loss", "Proxy_NCA", "--ism", "released", "--mix", "none"),
        ("--loss", "Margin", "--IPC", "4", "--optimizer", "sgd"),
        ("--dataset", "SOP", "--pretrained", "--gpu", "-1"),
        ("--dataset", "csv", "--csv", "a/list.csv"),
    ],
)
def test_the_saved_config_reads_back_equal(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    config = parse(*arguments)
    assert parse("--config", write(tmp_path / "saved.yaml", dump_config(config))) == config


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--losss", "MS"), r"unknown option --losss; did you mean .*loss"),
        (("--embeding-size", "3"), r"unknown option --embeding-size; did you mean embedding-size"),
        (
            ("--loss", "ProxyAnchor"),
            r"--loss: expected one of Proxy_Anchor,.*NPair, got 'ProxyAnchor'; did you mean Proxy_Anchor",
        ),
        (("--ism", "on"), r"--ism: expected one of live, released, off, got 'on'"),
        (("--dataset", "cup"), r"--dataset: expected one of cub.*got 'cup'; did you mean cub"),
        (("--mix", "mixed"), r"--mix: .*got 'mixed'"),
        (("--optimizer", "lamb"), r"--optimizer: expected one of adamw, adam, sgd, rmsprop, got 'lamb'"),
        (("--lr", "fast"), r"--lr: expected float, got 'fast'"),
        (("--lr", "0"), r"--lr: expected a positive number, got 0"),
        (("--lr", "nan"), r"--lr: expected float, got 'nan'"),
        (("--lr", "inf"), r"--lr: expected float, got 'inf'"),
        (("--alpha", "-1"), r"--alpha: expected a positive number, got -1"),
        (("--temperature", "0"), r"--temperature: expected a positive number, got 0"),
        (("--proxy-norm", "0"), r"--proxy-norm: expected a positive number, got 0"),
        (("--mix-alpha", "0"), r"--mix-alpha: expected a positive number, got 0"),
        (("--mrg", "-0.1"), r"--mrg: expected a value at least 0, got -0.1"),
        (("--bn-freeze", "2"), r"--bn-freeze: expected a value between 0 and 1, got 2"),
        (("--bn-freeze", "yes"), r"--bn-freeze: expected int or null, got 'yes'"),
        (("--bn-freeze", "0.5"), r"--bn-freeze: expected int or null, got '0.5'"),
        (("--l2-norm", "-1"), r"--l2-norm: expected a value between 0 and 1, got -1"),
        (("--epochs", "0"), r"--epochs: expected a value at least 1, got 0"),
        (("--epochs", "2.5"), r"--epochs: expected int, got '2.5'"),
        (("--batch-size", "1"), r"--batch-size: expected a value at least 2, got 1"),
        (("--warm", "-1"), r"--warm: expected a value at least 0, got -1"),
        (("--lr-decay-step", "0"), r"--lr-decay-step: expected a value at least 1, got 0"),
        (("--lr-decay-gamma", "1.5"), r"--lr-decay-gamma: expected a value between 0 and 1, got 1.5"),
        (("--clip-value", "-1"), r"--clip-value: expected a value at least 0, got -1"),
        (("--clip-value", "nan"), r"--clip-value: expected float, got 'nan'"),
        (("--weight-decay", "-1"), r"--weight-decay: expected a value at least 0"),
        (("--embedding-size", "0"), r"--embedding-size: expected a value at least 1, got 0"),
        (("--uncertainty-dim", "0"), r"--uncertainty-dim: expected a value at least 1, got 0"),
        (("--test-fraction", "1"), r"--test-fraction: expected a value between 0.01 and 0.99, got 1"),
        (("--image-size", "4"), r"--image-size: expected a value at least 8, got 4"),
        (("--gpu", "-2"), r"--gpu: expected a value at least -1, got -2"),
        (("--seed", "-1"), r"--seed: expected a value between 0 and 2147483648, got -1"),
        (("--ks", "0", "1"), r"--ks: expected positive whole numbers, got \[0, 1\]"),
        (("--ks", "x"), r"--ks.*'x'"),
        (("--IPC", "0"), r"--IPC: expected a value between 1 and 120, got 0"),
        (("--IPC", "7"), r"--batch-size 120 is not a multiple of --IPC 7"),
        (("--IPC", "240"), r"--IPC: expected a value between 1 and 120, got 240"),
        (("--dataset", "csv"), r"dataset csv needs --csv FILE"),
        (("--model-kwargs", "depth"), r"--model-kwargs: expected name=value, got 'depth'"),
        (("--eval-only",), r"--eval-only needs --checkpoint FILE"),
        (("--config", "no-such.yaml"), r"cannot read the config no-such.yaml: No such file"),
        (("--uncertainty-loss", "loss-prediction"), r"--uncertainty-loss was removed: .*python -m idml introspect"),
        (("--uncertainty-shifts", "2"), r"--uncertainty-shifts was removed"),
        (("stray",), r"stray"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batchsize: 3\n", "unknown key 'batchsize'; did you mean batch_size"),
        ("lr: fast\n", "--lr: expected float, got 'fast'"),
        ("epochs: null\n", "epochs: expected int, got null"),
        ("bn_freeze: true\n", "bn.freeze"),
        ("ks: {at: 3}\n", "expected a list, got {'at': 3}"),
        ("- 1\n", "expected a YAML mapping"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        parse("--config", write(tmp_path / "a.yaml", text))
    assert "a.yaml" in str(caught.value)


def test_a_batch_divides_over_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_dml, "world_size", lambda: 7)
    with pytest.raises(UserError, match=r"--batch-size 120 \(over all processes\) does not divide by 7 processes"):
        parse()
    assert parse("--batch-size", "70").batch_size == 70


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--ism", "off", "--temperature", "3"), r"--temperature 3.0 has no effect: ism is off"),
        (("--ism", "off", "--uncertainty-dim", "3"), r"--uncertainty-dim 3 has no effect: ism is off"),
        (("--mix", "none", "--mix-alpha", "2"), r"--mix-alpha 2.0 has no effect: nothing is mixed"),
        (("--loss", "MS", "--alpha", "2"), r"--alpha 2.0 has no effect: MS has no scale"),
        (("--loss", "Proxy_NCA", "--mrg", "0.2"), r"--mrg 0.2 has no effect: Proxy_NCA has no margin"),
        (("--loss", "Triplet", "--proxy-norm", "2"), r"--proxy-norm 2.0 has no effect: Triplet has no proxies"),
        (("--loss", "FastAP", "--loss-lr-factor", "2"), r"--loss-lr-factor 2.0 has no effect: FastAP has no param"),
        (("--data-dir", "x"), r"--data-dir x has no effect: dataset emoji-mini comes with"),
        (("--workers", "2"), r"--workers 2 has no effect: dataset emoji-mini is held in memory"),
        (("--skip-bad-images",), r"--skip-bad-images True has no effect: dataset emoji-mini is held in memory"),
        (("--cache-dir", "x"), r"--cache-dir x has no effect: the loader is torch"),
        (("--test-fraction", "0.3"), r"--test-fraction 0.3 has no effect: dataset emoji-mini has its own classes"),
        (
            ("--no-introspect", "--cache-bytes", "2000000"),
            r"--cache-bytes 2000000 has no effect: nothing is read after",
        ),
        (("--csv", "a/list.csv", "--dataset", "folder"), r"--csv a/list.csv has no effect: it belongs to dataset csv"),
        (("--pretrained-allow-missing", "fc"), r"no effect: there is no --pretrained FILE"),
        (("--pretrained", "--pretrained-allow-missing", "fc"), r"no effect: there is no --pretrained FILE"),
        (("--checkpoint", "x.pt"), r"--checkpoint x.pt has no effect: it is for --eval-only"),
        (("--output-dir", "x", "--remark", "y"), r"--remark y has no effect: --output-dir names"),
        (("--epochs", "3", "--warm", "3"), r"--warm 3 of 3 epochs: the backbone is never trained"),
        (("--dataset", "cub"), r"resnet50 starts from random weights"),
        (("--dataset", "inshop", "--model", "vit_small"), r"vit_small starts from random weights"),
    ],
)
def test_what_has_no_effect_is_warned_of_once(
    arguments: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match=expected) as caught:
        parse_dml_config(arguments, description="")
    assert len(caught) == 1
    monkeypatch.setattr("idml.checks_dml.is_main", lambda: False)
    parse(*arguments)  # raises at a warning


def test_a_value_from_a_file_that_is_the_default_is_no_surprise(tmp_path: Path) -> None:
    parse("--config", write(tmp_path / "a.yaml", "ism: off\ntemperature: 5.0\nmix_alpha: 1.0\n"))


def checkpoint(path: Path, config: dict[str, Any]) -> str:
    torch.save({"config": config, "model": {}, "classes": (), "preprocessing": {}}, path)
    return str(path)


def test_evaluation_takes_the_options_of_the_checkpoint(tmp_path: Path) -> None:
    trained = parse(
        *("--loss", "MS", "--embedding-size", "64", "--ism", "released"),
        *("--output-dir", "runs/x", "--gpu", "0", "--pretrained"),
    )
    file = checkpoint(tmp_path / "last.pt", dataclasses.asdict(trained))
    config = parse("--eval-only", "--checkpoint", file, "--batch-size", "60")
    assert (config.loss, config.embedding_size, config.ism, config.batch_size) == ("MS", 64, "released", 60)
    assert (config.output_dir, config.gpu, config.pretrained, config.eval_only) == (None, None, None, True)
    other = checkpoint(tmp_path / "cls.pt", {"dataset": "cifar10", "ism": "live"})
    with pytest.raises(UserError, match=r"cls\.pt is a checkpoint of train_cls\.py"):
        parse("--eval-only", "--checkpoint", other)


def test_print_config_is_told_apart() -> None:
    assert parse_dml_config(["--print-config"], description="")[1]
    assert not parse_dml_config([], description="")[1]
