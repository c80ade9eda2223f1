"""Checks of a retrieval config: values out of range, options that do not fit together, options without effect."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

from idml.config import check_name_values, check_positive, check_within
from idml.distributed import is_main
from idml.errors import UserError
from idml.introspection_options import unused_introspection
from idml.resume import check_saving, unused_saving

IN_PACKAGE = ("emoji-mini",)
"""Data sets that come with an installed package: small, and in memory in any case."""

IN_MEMORY = (*IN_PACKAGE, "emoji", "icons")

if TYPE_CHECKING:
    from idml.config_dml import DmlConfig


def check_ranges(config: DmlConfig) -> None:
    """UserError for the first value outside its range, or for options that contradict each other."""
    ranges: dict[str, tuple[float, float]] = {
        "embedding_size": (1, math.inf),
        "uncertainty_dim": (1, math.inf),
        "mrg": (0, math.inf),
        "loss_lr_factor": (0, math.inf),
        "l2_norm": (0, 1),
        "bn_freeze": (0, 1),
        "image_size": (8, math.inf),
        "test_fraction": (0.01, 0.99),
        "min_families": (1, math.inf),
        "val_fraction": (0, 0.9),
        "workers": (0, math.inf),
        "crop_padding": (0, math.inf),
        "IPC": (1, config.batch_size),
        "epochs": (1, math.inf),
        "max_steps": (1, math.inf),
        "batch_size": (2, math.inf),
        "weight_decay": (0, math.inf),
        "lr_decay_step": (1, math.inf),
        "lr_decay_gamma": (0, 1),
        "clip_value": (0, math.inf),
        "warm": (0, math.inf),
        "eval_every": (1, math.inf),
        "gpu": (-1, math.inf),
        "seed": (0, 2**31),
        "threads": (1, math.inf),
        "log_every": (1, math.inf),
    }
    check_within(config, ranges)
    check_saving(config)
    check_positive(config, ("lr", "mix_alpha", "temperature", "alpha", "proxy_norm"))
    if any(k < 1 for k in config.ks or []):
        raise UserError(f"--ks: expected positive whole numbers, got {config.ks}")
    if config.IPC is not None and config.batch_size % config.IPC:
        raise UserError(f"--batch-size {config.batch_size} is not a multiple of --IPC {config.IPC}")
    if config.dataset == "csv" and config.csv is None:
        raise UserError("dataset csv needs --csv FILE with columns path,label[,split]")
    check_name_values("model-kwargs", config.model_kwargs)


def warn_without_effect(config: DmlConfig, defaults: DmlConfig, given: set[str]) -> None:
    """Warn (once, on rank 0) of options that were given a value and change nothing, and of surprising choices."""
    from idml.losses import LOSSES

    settings = LOSSES[config.loss]
    unused: dict[str, str] = {}
    if config.ism == "off":
        unused["temperature"] = "ism is off"
        if config.uncertainty_dim != config.embedding_size:  # what a saved config has for "as the semantic one"
            unused["uncertainty_dim"] = "ism is off"
    if config.mix == "none":
        unused["mix_alpha"] = "nothing is mixed"
    if settings.scale is None:
        unused["alpha"] = f"{config.loss} has no scale"
    if settings.margin is None:
        unused["mrg"] = f"{config.loss} has no margin"
    if config.loss not in ("Proxy_Anchor", "Proxy_NCA"):
        unused["proxy_norm"] = f"{config.loss} has no proxies"
    if config.loss not in ("Proxy_Anchor", "Proxy_NCA", "Margin") and config.loss_lr_factor != settings.lr_factor:
        unused["loss_lr_factor"] = f"{config.loss} has no parameters"
    if config.dataset in IN_PACKAGE:
        unused["data_dir"] = f"dataset {config.dataset} comes with an installed package"
    if config.dataset in IN_MEMORY:
        in_memory = f"dataset {config.dataset} is held in memory"
        unused["skip_bad_images"] = in_memory
        if config.loader == "torch" or config.dataset in IN_PACKAGE:
            unused["workers"] = in_memory
    if config.loader == "torch" or (config.dataset in IN_PACKAGE and config.loader == "auto"):
        unused["cache_dir"] = "the loader is torch, not FFCV"
    if config.dataset not in ("folder", "csv"):
        unused["test_fraction"] = f"dataset {config.dataset} has its own classes to test on"
    if config.dataset != "icons":
        unused["min_families"] = f"it belongs to dataset icons, not {config.dataset}"
    if config.dataset != "csv":
        unused["csv"] = f"it belongs to dataset csv, not {config.dataset}"
    if config.pretrained in (None, "timm"):
        unused |= dict.fromkeys(("pretrained_key", "pretrained_allow_missing"), "there is no --pretrained FILE")
    if config.device == "cpu":
        unused["gpu"] = "--device cpu asks for none"
    unused |= unused_saving(config) | unused_introspection(config)
    if not config.eval_only:
        unused["checkpoint"] = "it is for --eval-only"
    if config.output_dir is not None:
        unused["remark"] = "--output-dir names the run directory"
    if not is_main():
        return
    for name, reason in unused.items():
        value = getattr(config, name)
        if name in given and value is not None and value != getattr(defaults, name):
            warnings.warn(f"--{name.replace('_', '-')} {value} has no effect: {reason}", UserWarning, stacklevel=2)
    if config.eval_only:
        return
    if config.pretrained is None and config.dataset in ("cub", "cars", "sop", "inshop"):
        warnings.warn(
            f"{config.model} starts from random weights; every published row starts from ImageNet weights: "
            "--pretrained downloads timm's, --pretrained FILE reads yours",
            UserWarning,
            stacklevel=2,
        )
    if config.warm >= config.epochs:
        warnings.warn(
            f"--warm {config.warm} of {config.epochs} epochs: the backbone is never trained", UserWarning, stacklevel=2
        )
