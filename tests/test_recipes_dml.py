"""Every row of the published retrieval tables has a config with the recipe's values; the published commands agree."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from idml.config_dml import DmlConfig, parse_dml_config

CONFIGS = Path(__file__).parents[1] / "configs"

# Written from the published tables and commands, apart from the files. R@1 of each loss, plain and introspective:
R1 = {
    "triplet": {"cub": (63.6, 65.3), "cars": (70.8, 73.7), "sop": (76.5, 77.4)},
    "proxy_nca": {"cub": (64.6, 66.0), "cars": (82.6, 85.5), "sop": (77.0, 78.3)},
    "fastap": {"cub": (65.1, 66.4), "cars": (81.6, 83.9), "sop": (75.9, 76.8)},
    "contrastive": {"cub": (65.6, 67.2), "cars": (82.7, 85.5), "sop": (76.4, 77.3)},
    "margin": {"cub": (65.9, 67.9), "cars": (82.6, 86.1), "sop": (78.5, 79.4)},
    "ms": {"cub": (67.3, 69.0), "cars": (83.3, 86.3), "sop": (78.1, 79.7)},
    "proxy_anchor": {"cub": (69.0, 70.7), "cars": (87.3, 90.6), "sop": (79.5, 81.5)},
}
# Further figures of IDML with ProxyAnchor.
FURTHER = {
    "cub": {"R@2": 80.2, "R@4": 87.9, "NMI": 73.5, "RP": 39.3, "MAP@R": 28.4},
    "cars": {"R@2": 94.5, "R@4": 97.1, "NMI": 76.9, "RP": 42.6, "MAP@R": 33.8},
    "sop": {"R@10": 92.7, "NMI": 92.3, "RP": 54.8, "MAP@R": 51.3},
}
LOSS = {
    "triplet": ("Triplet", {"mrg": 0.1, "alpha": None}),
    "proxy_nca": ("Proxy_NCA", {"mrg": None, "alpha": 32.0, "loss_lr_factor": 100.0}),
    "fastap": ("FastAP", {"mrg": None, "alpha": None}),
    "contrastive": ("Contrastive", {"mrg": 0.5, "alpha": None}),
    "margin": ("Margin", {"mrg": 0.2, "alpha": None, "loss_lr_factor": 50.0}),
    "ms": ("MS", {"mrg": None, "alpha": None}),
    "proxy_anchor": ("Proxy_Anchor", {"mrg": 0.1, "alpha": 32.0, "loss_lr_factor": 100.0}),
}
COMMANDS = {
    "cub": """CUDA_VISIBLE_DEVICES=0,1,2,3 python train.py --gpu -1 --loss Proxy_Anchor --model resnet50
        --embedding-size 512 --batch-size 120 --lr 6e-4   --dataset cub  --warm 5 --bn-freeze 1 --lr-decay-step 5""",
    "cars": """CUDA_VISIBLE_DEVICES=0,1,2,3 python train.py --gpu -1 --loss Proxy_Anchor --model resnet50
        --embedding-size 512 --batch-size 120 --lr 2.5e-4 --dataset cars --warm 5 --bn-freeze 1 --lr-decay-step 10""",
    "sop": """CUDA_VISIBLE_DEVICES=0,1,2,3 python train.py --gpu -1 --loss Proxy_Anchor --model resnet50
        --embedding-size 512 --batch-size 120 --lr 6e-4   --dataset SOP  --warm 5 --bn-freeze 1 --lr-decay-step 10
        --lr-decay-gamma 0.25""",
}
# What the commands say of each data set, and what the released trainer adds to it.
OF_DATASET = {
    "cub": {"lr": 6e-4, "lr_decay_step": 5, "lr_decay_gamma": 0.5, "ks": [1, 2, 4, 8]},
    "cars": {"lr": 2.5e-4, "lr_decay_step": 10, "lr_decay_gamma": 0.5, "ks": [1, 2, 4, 8]},
    "sop": {"lr": 6e-4, "lr_decay_step": 10, "lr_decay_gamma": 0.25, "ks": [1, 10, 100, 1000]},
}
ALL: dict[str, Any] = {
    "embedding_size": 512, "batch_size": 120, "warm": 5, "bn_freeze": 1, "epochs": 60, "optimizer": "adamw",
    "weight_decay": 1e-4, "clip_value": 10.0, "l2_norm": 1, "seed": 1, "image_size": 224, "pool": "avg+max",
    "temperature": 5.0, "mix_alpha": 1.0, "pretrained": "timm", "proxy_norm": None, "precision": "fp32", "flip": None,
    "max_steps": None, "lone_queries": "miss", "nmi": True, "uncertainty_dim": 512, "sync_bn": False,
}  # fmt: skip
TRAINING_IMAGES = {"cub": 5_864, "cars": 8_054, "sop": 59_551}
ROWS = [(f"{kind}_{loss}", kind, loss) for loss in R1 for kind in ("plain", "idml")]
ROWS.append(("released_proxy_anchor", "released", "proxy_anchor"))


def parse(*arguments: str) -> DmlConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return parse_dml_config(arguments, description="")[0]


def test_there_is_a_config_for_each_of_the_42_rows_and_3_as_released_and_no_other() -> None:
    found = {(file.parent.name, file.name) for name in COMMANDS for file in (CONFIGS / name).iterdir()}
    assert found == {(dataset, f"{row}.yaml") for dataset in COMMANDS for row, _, _ in ROWS}
    assert len(found) == 45


@pytest.mark.parametrize("dataset", COMMANDS)
@pytest.mark.parametrize(("row", "kind", "loss"), ROWS)
def test_each_value_is_the_recipes(dataset: str, row: str, kind: str, loss: str) -> None:
    file = CONFIGS / dataset / f"{row}.yaml"
    config = parse("--config", str(file))
    name, settings = LOSS[loss]
    expected = ALL | OF_DATASET[dataset] | settings | {"dataset": dataset, "loss": name}
    expected |= {"ism": {"plain": "off", "idml": "live", "released": "released"}[kind]}
    expected |= {"mix": "none" if kind == "plain" else "mixup"}
    expected["IPC"] = None
    if loss not in ("proxy_anchor", "proxy_nca"):  # no proxies: they need two images of a class in a batch
        expected |= {"IPC": 4, "lr": 1e-4}  # and the rate of the commands is for proxies; this is the trainer's default
    assert {field: getattr(config, field) for field in expected} == expected
    assert config.model.split(".") == ["resnet50", "tv_in1k"]  # the weights that the authors' torchvision gave


@pytest.mark.parametrize("dataset", COMMANDS)
@pytest.mark.parametrize(("row", "kind", "loss"), ROWS)
def test_each_header_has_command_figure_and_cost(dataset: str, row: str, kind: str, loss: str) -> None:
    file = CONFIGS / dataset / f"{row}.yaml"
    header = file.read_text(encoding="utf-8").split("\ndataset:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    command = re.search(r"^# Command +python train_dml.py --config (\S+) --data-dir data$", header, re.MULTILINE)
    assert command is not None and CONFIGS.parent / command.group(1) == file
    figures = {"R@1": R1[loss][dataset][0 if kind == "plain" else 1]}
    if loss == "proxy_anchor" and kind != "plain":
        figures |= FURTHER[dataset]
    published = ", ".join(f"{name} {value}" for name, value in figures.items())
    assert f"# Published  {published} %\n" in header
    cost = re.search(r"# Cost +([\d.e+]+) FLOP: 4.09 GMAC.* x ([\d,]+) images x 60 epochs(,\n# +x 2:)?", header)
    assert cost is not None and int(cost.group(2).replace(",", "")) == TRAINING_IMAGES[dataset]
    passes = 1 if kind == "plain" else 2
    assert bool(cost.group(3)) == (passes == 2)
    total = 4.09e9 * 2 * 3 * TRAINING_IMAGES[dataset] * 60 * passes  # a multiply-accumulate is two operations
    assert float(cost.group(1)) == pytest.approx(total, rel=0.05)
    assert "# Status " in header


def test_no_file_says_what_is_not_an_option() -> None:
    options = {field.name for field in dataclasses.fields(DmlConfig)}
    for dataset in COMMANDS:
        for file in (CONFIGS / dataset).iterdir():
            assert set(yaml.safe_load(file.read_text(encoding="utf-8"))) <= options - {"data_dir", "output_dir"}


def published(dataset: str, *more: str) -> DmlConfig:
    """The published command, verbatim after the name of the script."""
    arguments = COMMANDS[dataset].split("train.py")[1].split()
    with pytest.warns(UserWarning, match="resnet50 starts from random weights.*--pretrained"):
        return parse_dml_config([*arguments, *more], description="")[0]


def difference(first: DmlConfig, second: DmlConfig) -> dict[str, tuple[Any, Any]]:
    values = {name: (getattr(first, name), getattr(second, name)) for name in DmlConfig.__slots__}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


@pytest.mark.parametrize("dataset", COMMANDS)
def test_the_published_command_says_what_the_config_says(dataset: str) -> None:
    known = {
        "gpu": (-1, None),
        "model": ("resnet50", "resnet50.tv_in1k"),
        "pretrained": (None, "timm"),
        "image_size": (None, 224),  # taken from the data, which are files
    }
    live = parse("--config", str(CONFIGS / dataset / "idml_proxy_anchor.yaml"))
    released = parse("--config", str(CONFIGS / dataset / "released_proxy_anchor.yaml"))
    assert difference(published(dataset), live) == known
    assert difference(published(dataset, "--ism", "released"), released) == known
    assert difference(live, released) == {"ism": ("live", "released")}
    assert live.val_fraction == 0 and not live.introspect, "every training image is trained on"


def test_the_sop_of_the_published_command_is_sop() -> None:
    assert published("sop").dataset == "sop"
    assert published("sop").data_dir == "data"


def test_weights_silence_the_warning() -> None:
    arguments = COMMANDS["cub"].split("train.py")[1].split()
    assert parse(*arguments, "--pretrained").pretrained == "timm"
    assert parse(*arguments, "--pretrained", "mine.pth").pretrained == "mine.pth"
