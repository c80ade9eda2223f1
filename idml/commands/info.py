"""``python -m idml info``: what a checkpoint is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from idml.checkpoint import read_checkpoint
from idml.checkpoint_files import TO_GO_ON
from idml.config import build_config, dump_config, option, parse_command_line
from idml.errors import UserError
from idml.introspection_report import describe_introspection, introspection_text
from idml.trained import CONFIG, HEADS, WEIGHTS, TrainedModel, load

SHOWN_CLASSES = 8
"""Names of classes that are printed; ``--json`` has them all."""


@dataclasses.dataclass(kw_only=True, slots=True)
class InfoConfig:
    """Options of ``info``."""

    checkpoint: str | None = option(
        None, "run directory, checkpoint file, or folder that export wrote; may stand without --checkpoint too"
    )
    json: bool = option(False, "print JSON")
    trust_module: bool = option(
        False, "let the function that the folder of a model of your own names make its network, which runs code"
    )


def info(arguments: Sequence[str]) -> None:
    """``python -m idml info CHECKPOINT [--json]``: prints what the checkpoint is.

    Raises:
        UserError: bad options, or there is no such model, it is damaged, or it is something else.
    """
    file, flags, print_config = parse_command_line(
        InfoConfig, _named(arguments), prog="python -m idml info", description="What a checkpoint is."
    )
    config = build_config(InfoConfig, file | flags)
    if print_config:
        print(dump_config(config), end="")
        return
    if config.checkpoint is None:
        raise UserError("expected a checkpoint: python -m idml info runs/NAME")
    about = describe_model(load(config.checkpoint, device="cpu", trust_module=config.trust_module))
    print(json.dumps(about, indent=2) if config.json else as_text(about))


def _named(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``--checkpoint`` before the one that stands alone; UserError where there are two."""
    found: list[str] = []
    alone: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        named = before in ("--checkpoint", "--config") or argument.startswith("-")
        (found if named else alone).append(argument)
    given = alone + [argument for argument in found if argument.split("=")[0] == "--checkpoint"]
    if len(given) > 1:
        raise UserError(f"expected one checkpoint, got {len(given)}: {' '.join(arguments)}")
    return [*found, *(f"--checkpoint={path}" for path in alone)]


def describe_model(model: TrainedModel) -> dict[str, Any]:
    """What is known of a model, as plain values: of its run too, where it is a checkpoint and not exported.

    Keys: ``source``, ``kind``, ``bytes``, ``fingerprint``, ``task``, ``method``, ``ism``, ``model``, ``model_kwargs``,
    ``parameters`` (in all, and by part), ``embedding_size``, ``uncertainty_dim``, ``classes``, ``preprocessing``,
    ``dataset``, ``score`` (name, and on how many images it was calibrated), ``origin`` (whose network it is),
    ``introspection`` (see ``describe_introspection``; None where there is none) and, of a checkpoint, ``run``: see
    ``_describe_run``.
    """
    spec, network = model.spec, model.network
    parts: dict[str, int] = {}
    for name, parameter in network.named_parameters():
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    about: dict[str, Any] = {
        "source": str(model.source),
        "kind": "checkpoint",
        "bytes": _bytes(model.source),
        "fingerprint": model.fingerprint,
        "task": spec.task,
        "method": spec.method,
        "ism": spec.ism,
        "model": spec.model,
        "model_kwargs": spec.model_kwargs,
        "parameters": {"all": sum(parts.values())} | parts,
        "embedding_size": spec.embedding_size or network.feature_dim,
        "uncertainty_dim": None if spec.ism == "off" else spec.uncertainty_dim,
        "classes": list(spec.classes),
        "preprocessing": dataclasses.asdict(spec.preprocessing),
        "dataset": spec.dataset,
        "score": {"name": model.score_name, "calibrated_on": model.calibrated_on},
        "origin": spec.origin,
        "introspection": describe_introspection(model.introspection),
    }
    if model.source.is_dir():
        about["kind"] = "exported, timm's layout" if (model.source / HEADS).is_file() else "exported"
        described = json.loads((model.source / CONFIG).read_text(encoding="utf-8"))
        about["versions"] = described.get("versions")
        return about
    checkpoint = read_checkpoint(model.source)
    if all(key in checkpoint for key in TO_GO_ON):
        about["kind"] = "checkpoint to go on from"
    about["run"] = _describe_run(checkpoint, model.source)
    return about


def _describe_run(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a checkpoint, and ``results.json`` of its run if there is one, say of the training.

    Returns:
        ``epochs`` and ``steps`` done, ``epochs_planned``, ``seed``, ``train_images``, ``seconds``, ``figures`` of the
        checkpoint's last epoch; ``versions``, ``hardware``, ``git_commit`` and ``command`` of a finished run, else
        None.
    """
    config, history = checkpoint["config"], checkpoint.get("history") or []
    run = {
        "epochs": checkpoint.get("epoch"),
        "epochs_planned": config.get("epochs"),
        "steps": checkpoint.get("step"),
        "seed": config.get("seed"),
        "train_images": checkpoint.get("train_images"),
        "seconds": checkpoint.get("seconds"),
        "figures": dict(history[-1]) if history else {},
    }
    results: Any = {}
    with contextlib.suppress(OSError, ValueError):  # the run is not finished, or the file was taken out of it
        results = json.loads((path.resolve().parent.parent / "results.json").read_text(encoding="utf-8"))
    finished = results if isinstance(results, dict) else {}
    return run | {name: finished.get(name) for name in ("versions", "hardware", "git_commit", "command")}


def _bytes(source: Path) -> int:
    """Of the file, or of the files of an exported model."""
    files = [source] if source.is_file() else [source / name for name in (WEIGHTS, HEADS)]
    return sum(file.stat().st_size for file in files if file.is_file())


def as_text(about: Mapping[str, Any]) -> str:
    """What ``describe_model`` gave, a line each."""
    square, score, classes = about["preprocessing"], about["score"], about["classes"]
    fitted = square["fit"]
    if fitted == "crop":
        fitted += f" of {square['crop_share']:g}, {square['interpolation']}"
    parts = ", ".join(f"{name} {count:,}" for name, count in about["parameters"].items() if name != "all")
    more = ", ..." if len(classes) > SHOWN_CLASSES else ""
    name = about["model"] if about["origin"] in ("idml", "module") else f"{about['origin']}/{about['model']}"
    lines = {
        "source": f"{about['source']} ({about['kind']}, {about['bytes'] / 1e6:.2f} MB)",
        "fingerprint": about["fingerprint"],
        "task": about["task"],
        "method": f"{about['method']} (ISM {about['ism']})",
        "backbone": " ".join([name, *(f"{name}={value}" for name, value in about["model_kwargs"].items())]),
        "parameters": f"{about['parameters']['all']:,} ({parts})",
        "embedding": f"{about['embedding_size']} semantic, {about['uncertainty_dim'] or 'no'} uncertainty dimensions",
        "classes": f"{len(classes)} trained on: {', '.join(classes[:SHOWN_CLASSES])}{more}",
        "images": f"{square['image_size']} x {square['image_size']} ({fitted}), mean "
        f"{' '.join(f'{value:.4f}' for value in square['mean'])}, std "
        f"{' '.join(f'{value:.4f}' for value in square['std'])}",
        "data set": about["dataset"] or "not known",
        "score": _score_text(score),
    }
    lines |= introspection_text(about["introspection"])
    if "run" in about:
        lines |= _run_text(about["run"])
    elif about.get("versions"):
        lines["versions"] = _versions_text(about["versions"])
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _score_text(score: Mapping[str, Any]) -> str:
    if score["name"] == "none":
        return "none: a plain retrieval model has no uncertainty"
    if score["name"] != "P(wrong)":
        return score["name"]
    count = score["calibrated_on"]
    return f"P(wrong), calibrated on {count:,} images" if count else "P(wrong), not calibrated"


def _run_text(run: Mapping[str, Any]) -> dict[str, str]:
    planned = f" of {run['epochs_planned']}" if run["epochs_planned"] is not None else ""
    unsaid = ("epoch", "step", "lr", "images_per_second", "seconds")
    figures = {name: value for name, value in run["figures"].items() if name not in unsaid}
    lines = {
        "trained": f"{run['epochs']}{planned} epochs, {run['steps']} steps, {run['train_images']} images, seed "
        f"{run['seed']}",
        "last epoch": ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        )
        or "none is finished",
    }
    if run["versions"]:
        lines["versions"] = _versions_text(run["versions"])
        lines["hardware"] = str(run["hardware"])
    return lines


def _versions_text(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
