"""What the commands have in common: their options, and opening a model and its images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import idml.checkpoint
from idml.config import build_config, check_within, dump_config, option, parse_command_line
from idml.data.collection import Collection, read_collection, trained_on
from idml.errors import UserError
from idml.runtime import keep_freed_memory, seed_everything
from idml.trained import TrainedModel, load

CommandT = TypeVar("CommandT", bound="ModelOptions")


@dataclasses.dataclass(kw_only=True, slots=True)
class ModelOptions:
    """Options of every command that uses a model."""

    checkpoint: str | None = option(None, "run directory, checkpoint file, or folder that export wrote")
    trust_module: bool = option(
        False, "let the function that the folder of a model of your own names make its network, which runs code"
    )
    device: str = option("auto", "auto (cuda, then mps, then cpu), cpu, cuda or mps")
    batch_size: int = option(64, "images that go through the network at once", "-b")
    workers: int = option(min(os.cpu_count() or 1, 8), "processes that decode images; default: one for each CPU", "-j")
    threads: int | None = option(None, "CPU threads for torch; default: torch's own choice")
    verbose: bool = option(True, "progress bar (never drawn when the output is not a terminal)")


@dataclasses.dataclass(kw_only=True, slots=True)
class ImageOptions(ModelOptions):
    """Those of a command that goes over a folder of images too."""

    data_dir: str | None = option(
        None, "folder of images, DIR/[split/][class/]*.jpg; default: the data set that the model was trained on"
    )
    skip_bad_images: bool = option(False, "leave images out that cannot be decoded, and say how many")


def parse(config_class: type[CommandT], arguments: Sequence[str], *, name: str, description: str) -> CommandT | None:
    """The options of a command; None where ``--print-config`` has printed them.

    Raises:
        UserError: bad options, or no ``--checkpoint``.
    """
    file, flags, print_config = parse_command_line(
        config_class, arguments, prog=f"python -m idml {name}", description=description
    )
    config = build_config(config_class, file | flags)
    if print_config:
        print(dump_config(config), end="")
        return None
    check_within(config, {"batch_size": (1, float("inf")), "workers": (0, float("inf")), "threads": (1, float("inf"))})
    return config


def check_shares(config: Any, names: Sequence[str]) -> None:
    """UserError for the first of these options that is given and not between 0 and 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected a number between 0 and 1, got {value}")


def with_files(arguments: Sequence[str], config_class: type) -> list[str]:
    """The arguments of a command with its files behind ``--files``: those that belong to no option, at any place."""
    fields = dataclasses.fields(config_class)
    switches = {"--print-config", "--help", "-h"}
    for field in fields:
        if field.type in (bool, "bool"):
            switches |= {f"--{field.name.replace('_', '-')}", f"--no-{field.name.replace('_', '-')}"}
    rest: list[str] = []
    files: list[str] = []
    waiting = False  # whether an option's value comes next
    for argument in arguments:
        if waiting:
            rest.append(argument)
            waiting = False
        elif argument == "--files":
            continue
        elif argument.startswith("--files="):
            files.append(argument.removeprefix("--files="))
        elif argument.startswith("-") and argument != "-":
            rest.append(argument)
            waiting = "=" not in argument and argument.replace("_", "-") not in switches
        else:
            files.append(argument)
    return [*rest, *(["--files", *files] if files else [])]


def open_model(config: ModelOptions) -> TrainedModel:
    """The model of ``--checkpoint``; UserError where there is none."""
    if config.checkpoint is None:
        raise UserError("--checkpoint is missing: a run directory, a checkpoint file, or a folder that export wrote")
    seed_everything(0, threads=config.threads)
    model = load(config.checkpoint, device=config.device, trust_module=config.trust_module)
    keep_freed_memory(model.device)
    return model


def open_images(config: ImageOptions, model: TrainedModel) -> Collection:
    """The images of ``--data-dir``, or of the data set that the model was trained on.

    Raises:
        UserError: there are none, or they do not decode; or neither is known.
    """
    if config.data_dir is not None:
        return read_collection(config.data_dir, skip_bad_images=config.skip_bad_images, workers=config.workers)
    return trained_on(stored_config(model))


def stored_config(model: TrainedModel) -> dict[str, Any]:
    """The config that the model was trained with; UserError for an exported model, which has none."""
    if model.source.is_dir():
        raise UserError(f"{model.source} does not say what it was trained on: give --data-dir DIR")
    return idml.checkpoint.read_checkpoint(model.source)["config"]
