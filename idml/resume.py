"""Going on with a run: which checkpoint, with which config, and what of it may be another one than before."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from idml.checkpoint_files import newest_checkpoint, read_verified
from idml.config import check_positive, check_within, option
from idml.data.image_dataset import ImageDataset
from idml.errors import UserError
from idml.paths import nearest_path


@dataclasses.dataclass(kw_only=True, slots=True)
class SavingOptions:
    """Options of both scripts about what survives: saving, going on, and losses that are not finite."""

    resume: str | None = option(
        None, "auto: go on with the run in --output-dir if there is one; or a run directory, or a checkpoint file"
    )
    save_every_steps: int | None = option(None, "save a checkpoint within an epoch too, after so many steps")
    save_every_minutes: float | None = option(None, "save a checkpoint within an epoch too, after so many minutes")
    keep_checkpoints: int = option(2, "newest checkpoints kept (last.pt, last-1.pt, ...), beside the best")
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop", "skip leaves out a step whose loss or gradient is not finite"
    )
    max_nonfinite: int = option(10, "with --on-nonfinite skip: stop after so many such steps in a row")


def check_saving(config: SavingOptions) -> None:
    """UserError for the first of these options that is out of its range."""
    check_within(
        config, {"save_every_steps": (1, math.inf), "keep_checkpoints": (1, 1000), "max_nonfinite": (1, math.inf)}
    )
    check_positive(config, ("save_every_minutes",))


def unused_saving(config: SavingOptions) -> dict[str, str]:
    """Those of these options that change nothing, and why."""
    return {} if config.on_nonfinite == "skip" else {"max_nonfinite": "--on-nonfinite is stop"}


MAY_CHANGE = {
    *(field.name for field in dataclasses.fields(SavingOptions)),
    *("epochs", "max_steps", "eval_every", "nmi", "ks", "lone_queries", "tta"),  # how long, and what is measured
    *("workers", "loader", "cache_dir", "data_dir", "train_dir", "val_dir", "csv", "download", "skip_bad_images"),
    *("device", "gpu", "threads", "compile", "tf32", "channels_last", "deterministic", "grad_accum"),
    *("output_dir", "expname", "remark", "wandb", "log_every", "verbose", "eval_only", "checkpoint"),
    # The weights are those of the checkpoint.
    *("pretrained", "pretrained_key", "pretrained_allow_missing", "batch_size_per_gpu"),
}
"""Options that a run may be gone on with another value of. The images are compared by themselves."""


def find_checkpoint(resume: str, output_dir: str | None) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that ``--resume`` means, and what it holds; None for ``auto`` where there is none yet.

    Raises:
        UserError: there is no such file or directory, or what is there cannot be read.
    """
    if resume == "auto":
        if output_dir is None:
            raise UserError("--resume auto goes on with the run in --output-dir DIR, which was not given")
        return newest_checkpoint(Path(output_dir))
    path = Path(resume)
    if path.is_dir():
        found = newest_checkpoint(path)
        if found is None:
            raise UserError(f"--resume {path}: there is no checkpoint in {path / 'checkpoints'}")
        return found
    if not path.exists():
        raise UserError(
            f"--resume {path}: expected auto, a run directory or a checkpoint file; there is no such path: "
            f"{nearest_path(path)}"
        )
    return path, read_verified(path)


def resumed_layer(config_class: type, values: Mapping[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """What the checkpoint of ``--resume`` contributes to the config, below everything that was given.

    Args:
        config_class: of the script that is to go on.
        values: what was given on the command line and in ``--config``.

    Returns:
        (the checkpoint, None where there is none to go on from; the options it was trained with, ``output_dir`` being
        its run directory).

    Raises:
        UserError: there is nothing to go on from, or it is a run of the other script.
    """
    resume = values.get("resume")
    if resume is None:
        return None, {}
    if values.get("eval_only"):
        raise UserError("give --resume or --eval-only, not both")
    directory = values.get("output_dir")
    if directory is None and values.get("expname") is not None:
        directory = str(Path("runs") / values["expname"])
    found = find_checkpoint(resume, directory)
    if found is None:
        return None, {}
    path, checkpoint = found
    known = {field.name for field in dataclasses.fields(config_class)}
    stored = checkpoint["config"]
    if ("loss" in stored) != ("loss" in known):  # only a retrieval run has one to choose
        script = "train_dml.py" if "loss" in stored else "train_cls.py"
        raise UserError(f"{path} is a checkpoint of {script}; go on with that script")
    layer = {name: value for name, value in stored.items() if name in known}
    layer["output_dir"] = str(path.resolve().parent.parent if resume != "auto" else directory)
    if "expname" in layer:
        layer["expname"] = None  # the directory is known already
    return path, layer


def planned_steps(config: Any, steps_per_epoch: int) -> int:
    """Steps of the whole run."""
    return min(config.epochs * steps_per_epoch, config.max_steps or config.epochs * steps_per_epoch)


def check_same_run(checkpoint: Mapping[str, Any], config: Any, train: ImageDataset, steps_per_epoch: int) -> None:
    """UserError, with every difference, unless the checkpoint's run can be gone on with by this config on these images.

    Args:
        checkpoint: as ``read_verified`` gives it.
        config: of the run to be.
        train: its training images.
        steps_per_epoch: of the run to be.
    """
    stored_config = checkpoint["config"]
    differences = []
    if stored_config.get("uncertainty_loss", "none") != "none":
        differences.append("it was trained with loss prediction, which this version does not have")
    for field in dataclasses.fields(config):
        before, now = stored_config.get(field.name), getattr(config, field.name)
        if field.name in stored_config and field.name not in MAY_CHANGE and before != now:
            differences.append(f"--{field.name.replace('_', '-')} was {before}, now {now}")
    stored = tuple(checkpoint["classes"])
    if stored != train.classes:
        pairs = zip(train.classes, stored, strict=False)
        first = next((f"{now} in place of {before}" for now, before in pairs if now != before), "more or fewer")
        differences.append(f"the classes are others: {len(stored)} before, now {len(train.classes)} ({first})")
    if checkpoint["train_images"] != len(train):
        differences.append(f"there were {checkpoint['train_images']} training images, now {len(train)}")
    steps = planned_steps(config, steps_per_epoch)
    if checkpoint["step"] > steps:
        differences.append(f"{checkpoint['step']} steps are done, and only {steps} asked for (--epochs, --max-steps)")
    if differences:
        raise UserError(
            f"cannot go on with the run of {checkpoint['config'].get('output_dir') or 'this checkpoint'}: "
            f"{'; '.join(differences)}. Give what it was trained with, or start a new run in another --output-dir"
        )


def same_length(checkpoint: Mapping[str, Any], config: Any) -> bool:
    """Whether the run is as long as it was meant to be."""
    return all(checkpoint["config"].get(name) == getattr(config, name) for name in ("epochs", "max_steps"))
