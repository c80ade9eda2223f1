"""Checks of a classification config: values out of range, options that do not fit together, options without effect."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

from idml.config import check_name_values, check_positive, check_within
from idml.distributed import world_size
from idml.errors import UserError
from idml.introspection_options import unused_introspection
from idml.resume import check_saving, unused_saving

IN_PACKAGE = ("fashion-mnist-mini", "digits")
"""Data sets that come with an installed package: small, and in memory in any case."""

if TYPE_CHECKING:
    from idml.config_cls import ClsConfig


def check_ranges(config: ClsConfig) -> None:
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
        "eval_every": (1, math.inf),
        "log_every": (1, math.inf),
        "seed": (0, 2**31),
        "batch_size_per_gpu": (1, math.inf),
        "grad_accum": (1, config.batch_size),
        "color_jitter": (0, 1),
        "lighting": (0, math.inf),
    }
    check_within(config, ranges)
    check_saving(config)
    check_positive(config, ("lr", "mix_alpha", "temperature"))
    if any(not 1 <= milestone <= config.epochs for milestone in config.lr_milestones or []):
        raise UserError(f"--lr-milestones: expected epochs between 1 and {config.epochs}, got {config.lr_milestones}")

    if config.progressive is not None and (
        len(config.progressive) != 2 or not 32 <= config.progressive[0] <= config.progressive[1]
    ):
        raise UserError(f"--progressive: expected two sizes, 32 <= first <= last, got {config.progressive}")
    if config.progressive is not None and config.dataset not in ("imagenet", "folder"):
        raise UserError(f"--progressive is for image files; dataset {config.dataset} is small")
    check_name_values("model-kwargs", config.model_kwargs)
    check_processes(config)


def check_processes(config: ClsConfig) -> None:
    """UserError unless a batch divides among the processes and their parts."""
    parts = world_size() * config.grad_accum
    if config.batch_size % parts:
        raise UserError(
            f"--batch-size {config.batch_size} (over all processes) does not divide by {world_size()} processes x "
            f"{config.grad_accum} parts (--grad-accum); take a multiple of {parts}, or --batch-size-per-gpu"
        )


def warn_without_effect(config: ClsConfig, defaults: ClsConfig, given: set[str]) -> None:
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
        unused |= dict.fromkeys(("train_dir", "val_dir"), f"they belong to dataset folder, not {config.dataset}")
    if config.dataset not in ("folder", "imagenet"):
        in_memory = f"dataset {config.dataset} is held in memory"
        unused["skip_bad_images"] = in_memory
        if config.loader == "torch" or (config.dataset in IN_PACKAGE and config.loader == "auto"):
            unused["workers"] = in_memory
    if config.loader == "torch" or (config.dataset in IN_PACKAGE and config.loader == "auto"):
        unused["cache_dir"] = "the loader is torch, not FFCV"
    if config.dataset not in ("fashion-mnist", "cifar10", "cifar100"):
        unused["download"] = f"dataset {config.dataset} is not downloaded"
    if config.pretrained in (None, "timm"):
        unused |= dict.fromkeys(("pretrained_key", "pretrained_allow_missing"), "there is no --pretrained FILE")
    unused |= unused_saving(config) | unused_introspection(config)
    if not config.eval_only:
        unused["checkpoint"] = "it is for --eval-only"
    if config.dataset in IN_PACKAGE:
        unused["data_dir"] = f"dataset {config.dataset} comes with an installed package"
    for name, reason in unused.items():
        value = getattr(config, name)
        is_default = value == getattr(defaults, name) or (name == "mix_prob" and value == 0)
        if name in given and not is_default:
            warnings.warn(f"--{name.replace('_', '-')} {value} has no effect: {reason}", UserWarning, stacklevel=2)
