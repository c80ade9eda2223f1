"""Every published row has a config, and each value in it is the recipe's; the CutMix authors' flags say the same."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from idml.backbones import create_backbone
from idml.config_cls import ClsConfig, parse_cls_config, parse_model_kwargs
from idml.cutmix_flags import translate_cutmix_flags
from idml.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"

# Written from the paper's table and the authors' recipes, apart from the files: method -> (ISM, mixing).
ROWS = {
    "baseline": ("off", "none"),
    "ism": ("released", "none"),
    "mixup": ("off", "mixup"),
    "idml_mixup": ("released", "mixup"),
    "cutmix": ("off", "cutmix"),
    "idml_cutmix": ("released", "cutmix"),
}
IMAGENET = {
    "model": "resnet50", "epochs": 300, "batch_size": 256, "lr": 0.1, "lr_milestones": [75, 150, 225],
    "image_size": 224, "color_jitter": 0.4, "lighting": 0.1, "uncertainty_dim": 512, "crop_padding": None,
}  # fmt: skip
CIFAR = {
    "model": "pyramidnet200_a240_bottleneck_cifar", "epochs": 300, "batch_size": 64, "lr": 0.25, "image_size": 32,
    "lr_milestones": [150, 225], "color_jitter": 0.0, "lighting": 0.0, "uncertainty_dim": 128, "crop_padding": 4,
}  # fmt: skip
ALL = {
    "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4, "decay_bn_bias": True, "schedule": "step", "lr_gamma": 0.1,
    "temperature": 5.0, "flip": True, "label_smoothing": 0.0, "ema_decay": 0.0, "mix_alpha": 1.0, "warmup_epochs": 0.0,
    "progressive": None, "tta": "none", "bn_freeze": False, "precision": "fp32",
}  # fmt: skip
PUBLISHED = {
    "imagenet": ["76.32 / 92.95", "76.94 / 93.24", "77.42 / 93.60", "77.95 / 93.93", "78.60 / 94.08", "79.04 / 94.47"],
    "cifar100": ["83.55 / 96.31", "84.08 / 96.46", "84.22 / 95.96", "84.59 / 96.79", "85.53 / 97.03", "85.65 / 97.21"],
    "cifar10": ["96.15", "96.43", "96.91", "97.13", "97.12", "97.32"],
}


def parse(*arguments: str) -> ClsConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return parse_cls_config(arguments, description="")[0]


@pytest.mark.parametrize("dataset", PUBLISHED)
@pytest.mark.parametrize("row", ROWS)
def test_each_value_is_the_recipes(dataset: str, row: str) -> None:
    file = CONFIGS / dataset / f"{row}.yaml"
    config = parse("--config", str(file))
    ism, mix = ROWS[row]
    imagenet = dataset == "imagenet"
    expected = ALL | (IMAGENET if imagenet else CIFAR) | {"dataset": dataset, "ism": ism, "mix": mix}
    expected["mix_prob"] = {"none": 0.0, "mixup": 1.0, "cutmix": 1.0 if imagenet else 0.5}[mix]
    if ism == "off":
        del expected["uncertainty_dim"]
    assert {name: getattr(config, name) for name in expected} == expected
    header = file.read_text(encoding="utf-8").split("\ndataset:")[0]
    assert f"# Published  {PUBLISHED[dataset][list(ROWS).index(row)]} %" in header
    command = re.search(r"# Command +.*train_cls.py --config (\S+)", header)
    assert command is not None and CONFIGS.parent / command.group(1) == file
    assert "# Cost " in header
    assert imagenet or "PyramidNet-200" in header


def test_there_is_a_config_for_each_of_the_18_rows_and_no_other() -> None:
    found = {(file.parent.name, file.stem) for name in PUBLISHED for file in (CONFIGS / name).glob("*")}
    assert found == {(dataset, row) for dataset in PUBLISHED for row in ROWS}
    assert len(found) == 18


COMMAND = (
    "--net_type pyramidnet --dataset cifar100 --depth 200 --alpha 240 --batch_size 64 --lr 0.25 --expname PyraNet200 "
    "--epochs 300 --beta 1.0 --cutmix_prob 0.5 --no-verbose"
)
NOT_THE_RECIPE = {"output_dir", "expname", "verbose", "workers", "model", "model_kwargs"}
FROM_THE_DATA = {"image_size", "crop_padding", "flip"}


def difference(first: ClsConfig, second: ClsConfig) -> set[str]:
    return (
        {name for name in ClsConfig.__slots__ if getattr(first, name) != getattr(second, name)}
        - NOT_THE_RECIPE
        - FROM_THE_DATA
    )


def test_the_cutmix_command_says_what_the_config_says() -> None:
    config = parse(*COMMAND.split())
    assert difference(config, parse("--config", str(CONFIGS / "cifar100/idml_cutmix.yaml"))) == set()
    assert (config.output_dir, config.verbose) == ("runs/PyraNet200", False)
    with_kwargs = create_backbone(config.model, arguments=parse_model_kwargs(config))
    named = create_backbone("pyramidnet200_a240_bottleneck_cifar")
    assert {k: v.shape for k, v in with_kwargs.state_dict().items()} == {
        k: v.shape for k, v in named.state_dict().items()
    }


def test_the_plain_rows_through_cutmix_flags() -> None:
    plain = parse(*COMMAND.split(), "--ism", "off")
    assert difference(plain, parse("--config", str(CONFIGS / "cifar100/cutmix.yaml"))) <= {"uncertainty_dim"}
    no_mixing = parse(*COMMAND.replace("--beta 1.0 --cutmix_prob 0.5", "").split())
    assert difference(no_mixing, parse("--config", str(CONFIGS / "cifar100/ism.yaml"))) == set()


def test_the_imagenet_command_with_short_flags() -> None:
    command = "--net_type resnet --dataset imagenet -b 256 --lr 0.1 --depth 50 --epochs 300 --expname R50 -j 40"
    config = parse(*command.split(), "--beta", "1.0", "--cutmix_prob", "1.0", "--no-verbose", "--data-dir", "x")
    assert difference(config, parse("--config", str(CONFIGS / "imagenet/idml_cutmix.yaml"))) == {"data_dir"}
    assert (config.model, config.workers) == ("resnet50", 40)
    shorter = parse(*command.replace("300", "100").split())
    assert shorter.lr_milestones == [30, 60, 90]


def test_a_command_line_of_our_own_is_left_alone() -> None:
    assert translate_cutmix_flags(["--lr", "1"]) == ({}, ["--lr", "1"])


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("--net_type pyramidnet --dataset cifar10 --depth 200", "needs --alpha"),
        ("--net_type pyramidnet --dataset imagenet --depth 200 --alpha 240", "for cifar10 and cifar100"),
        ("--net_type densenet --dataset cifar10 --depth 200", "densenet"),
        ("--net_type resnet --dataset cifar10", "--depth"),
        ("--net_type resnet --dataset cifar10 --depth 20 --cutmix_prob 2", "between 0 and 1, got 2"),
        ("--net_type resnet --dataset cifar10 --depth 20 --expnam x", "unknown option --expnam"),
    ],
)
def test_mistakes_in_cutmix_flags(command: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        parse(*command.split())
