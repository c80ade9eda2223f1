"""Options of train_cls.py: every default once, with its reason; how methods, files and flags are joined; checks."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from idml.config import build_config, option, parse_command_line
from idml.errors import UserError
from idml.models import IsmVariant
from idml.similarity import TEMPERATURE

Mix = Literal["none", "mixup", "cutmix"]
Method = Literal["baseline", "ism", "mixup", "idml-mixup", "cutmix", "idml-cutmix"]
Dataset = Literal["fashion-mnist-mini", "fashion-mnist", "digits", "folder"]

METHODS: dict[Method, tuple[IsmVariant, Mix]] = {
    "baseline": ("off", "none"),
    "ism": ("live", "none"),
    "mixup": ("off", "mixup"),
    "idml-mixup": ("live", "mixup"),
    "cutmix": ("off", "cutmix"),
    "idml-cutmix": ("live", "cutmix"),
}
"""The six methods: what each says about ISM and mixing. ``--ism released`` picks the other variant of the last kind."""


@dataclasses.dataclass(kw_only=True, slots=True)
class ClsConfig:
    """Everything that decides a classification run. Units: learning rates per step, sizes in pixels."""

    method: Method = option("idml-cutmix", "one of the six methods; sets --ism and --mix")
    ism: IsmVariant = option("live", "live, released (the authors' code to the letter) or off (plain classifier)")
    mix: Mix = option("cutmix", "how training batches are mixed")
    mix_prob: float | None = option(None, "share of batches mixed; default 0.5 for cutmix (its CIFAR recipe), else 1.0")
    mix_alpha: float = option(1.0, "lam ~ Beta(alpha, alpha); 1 in every published recipe")
    temperature: float = option(TEMPERATURE, "tau of the ISM; 5 in the released code")
    uncertainty_dim: int = option(128, "length of the uncertainty embedding; released: 128 for CIFAR, 512 for ImageNet")

    model: str = option("resnet20_cifar", "any timm model name, or resnet{8,14,20,32,44,56,110}_cifar")
    image_size: int | None = option(
        None, "side of the square input; default 32 for the small data sets, 224 for folders"
    )

    dataset: Dataset = option("fashion-mnist-mini", "fashion-mnist-mini is inside the package; folder reads your own")
    data_dir: str | None = option(None, "folder of the data; for `folder` it holds train/ and val/ or the classes")
    train_dir: str | None = option(None, "class folders to train on (dataset folder)")
    val_dir: str | None = option(None, "class folders to test on (dataset folder)")
    download: bool = option(False, "let torchvision download Fashion-MNIST into --data-dir when it is not there")
    val_fraction: float = option(0.0, "share of the training images held out; the best epoch is then picked on them")
    skip_bad_images: bool = option(False, "leave images out that cannot be decoded, and say how many")
    workers: int = option(2, "processes that decode image files; small data sets stay in memory and need none", "-j")
    crop_padding: int | None = option(
        None, "zeros added before a random crop; default 4 for small images in memory, else 0"
    )
    flip: bool | None = option(None, "mirror half of the images; default yes, except for digits")

    epochs: int = option(10, "passes over the training images")
    max_steps: int | None = option(None, "stop after this many steps; the schedule ends there too")
    batch_size: int = option(64, "images a step; 64 in the CIFAR recipe", "-b")
    lr: float = option(0.1, "peak learning rate; 0.1 for batches of 64 to 256 (He et al. 2016)")
    momentum: float = option(0.9, "of SGD; 0.9 in the published recipes")
    nesterov: bool = option(True, "Nesterov's momentum, as in the published recipes")
    weight_decay: float = option(1e-4, "1e-4 in the published recipes")
    decay_bn_bias: bool = option(True, "apply weight decay to batch norm and biases too, as the published recipes do")
    schedule: Literal["step", "cosine", "onecycle"] = option("onecycle", "course of the learning rate, step by step")
    lr_milestones: list[int] | None = option(None, "epochs after which step multiplies; default 50 %% and 75 %% of all")
    lr_gamma: float = option(0.1, "factor of the step schedule")
    warmup_epochs: float = option(0.0, "linear warm-up before step or cosine")
    label_smoothing: float = option(0.0, "mass spread over the other classes")
    ema_decay: float = option(0.0, "above 0: evaluate an exponential moving average of the weights, e.g. 0.999")

    seed: int = option(1, "of weights, order, augmentation and mixing")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "auto takes cuda, then mps, then cpu")
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "of the backbone; the ISM always computes in float32")
    deterministic: bool = option(False, "forbid algorithms whose results vary from run to run")
    threads: int | None = option(None, "CPU threads for torch; default: torch's own choice")
    output_dir: str | None = option(None, "run directory; default runs/<data set>-<method>-s<seed>-<time>")
    log_every: int = option(50, "steps between entries in TensorBoard and checks for non-finite losses")
    verbose: bool = option(True, "progress bar (never drawn when the output is not a terminal)")


def _expand_method(layer: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A layer of settings with its ``method`` spelled out as ``ism`` and ``mix``; UserError where they contradict."""
    layer = dict(layer)
    method = layer.get("method")
    if method is None:
        return layer
    ism, mix = METHODS[method]
    if (layer.get("ism", ism) == "off") != (ism == "off"):
        raise UserError(f"{source}: method {method} contradicts ism {layer['ism']}; give one of the two")
    if layer.get("mix", mix) != mix:
        raise UserError(f"{source}: method {method} contradicts mix {layer['mix']}; give one of the two")
    # A mix_prob of an earlier layer belonged to that layer's method.
    return {"ism": ism, "mix": mix, "mix_prob": None} | layer


def parse_cls_config(argv: Sequence[str], *, description: str) -> tuple[ClsConfig, bool]:
    """The config that a command line asks for: defaults, then ``--config``, then flags.

    ``method`` in a later layer replaces ``ism`` and ``mix`` of an earlier one. Options that have no effect warn.

    Returns:
        (config with every value resolved, whether ``--print-config`` was given).

    Raises:
        UserError: unknown option, bad value, contradiction, value out of range.
    """
    file, flags, print_config = parse_command_line(ClsConfig, argv, prog="train_cls.py", description=description)
    values = _expand_method(file, "--config") | _expand_method(flags, "command line")
    config = build_config(ClsConfig, values)
    ism_on, mix = config.ism != "off", config.mix
    config.method = next(m for m, (i, x) in METHODS.items() if (i != "off") == ism_on and x == mix)
    if config.mix_prob is None:
        config.mix_prob = {"none": 0.0, "cutmix": 0.5, "mixup": 1.0}[mix]
    _check_ranges(config)
    _warn_without_effect(config, set(file) | set(flags))
    return config, print_config


def _check_ranges(config: ClsConfig) -> None:
    """UserError for the first value outside its range."""
    ranges: dict[str, tuple[float, float]] = {
        "mix_prob": (0, 1),
        "val_fraction": (0, 0.9),
        "label_smoothing": (0, 0.999),
        "ema_decay": (0, 0.999999),
        "momentum": (0, 0.9999),
        "weight_decay": (0, math.inf),
        "lr_gamma": (0, 1),
        "warmup_epochs": (0, config.epochs),
        "epochs": (1, math.inf),
        "batch_size": (1, math.inf),
        "max_steps": (1, math.inf),
        "uncertainty_dim": (1, math.inf),
        "workers": (0, math.inf),
        "crop_padding": (0, math.inf),
        "image_size": (8, math.inf),
        "threads": (1, math.inf),
        "log_every": (1, math.inf),
        "seed": (0, 2**31),
    }
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            expected = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise UserError(f"--{name.replace('_', '-')}: expected a value {expected}, got {value}")
    for name in ("lr", "mix_alpha", "temperature"):
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: expected a positive number, got {value}")
    if any(not 1 <= milestone <= config.epochs for milestone in config.lr_milestones or []):
        raise UserError(f"--lr-milestones: expected epochs between 1 and {config.epochs}, got {config.lr_milestones}")


def _warn_without_effect(config: ClsConfig, given: set[str]) -> None:
    """Warn about each option that was given, differs from its default, and is read by nobody in this run."""
    unused: dict[str, str] = {}
    if config.mix == "none":
        unused |= dict.fromkeys(("mix_prob", "mix_alpha"), "nothing is mixed (--mix none)")
    if config.ism == "off":
        unused |= dict.fromkeys(("temperature", "uncertainty_dim"), "ISM is off (--ism off)")
    if config.schedule != "step":
        unused |= dict.fromkeys(("lr_milestones", "lr_gamma"), f"the schedule is {config.schedule}, not step")
    if config.schedule == "onecycle":
        unused["warmup_epochs"] = "the one-cycle schedule warms up by itself"
    if config.dataset != "folder":
        unused |= dict.fromkeys(
            ("train_dir", "val_dir", "workers", "skip_bad_images"), f"dataset {config.dataset} is held in memory"
        )
    if config.dataset != "fashion-mnist":
        unused["download"] = f"dataset {config.dataset} is not downloaded"
    if config.dataset in ("fashion-mnist-mini", "digits"):
        unused["data_dir"] = f"dataset {config.dataset} comes with an installed package"
    defaults = ClsConfig()
    for name, reason in unused.items():
        value = getattr(config, name)
        is_default = value == getattr(defaults, name) or (name == "mix_prob" and value == 0)
        if name in given and not is_default:
            warnings.warn(f"--{name.replace('_', '-')} {value} has no effect: {reason}", UserWarning, stacklevel=2)
