"""From a checkpoint or an exported folder to a model, and from a model to such a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from idml.checkpoint import load_tensors, read_checkpoint
from idml.checkpoint_files import newest_checkpoint
from idml.errors import UserError
from idml.exporting import check_free, describe, written_whole
from idml.paths import nearest_path, user_path
from idml.run import write_text
from idml.runtime import choose_device
from idml.spec import ModelSpec, load_state
from idml.trained import CONFIG, INTROSPECTION, WEIGHTS, TrainedModel


def load_model(source: str | Path, *, device: str, trust_module: bool) -> TrainedModel:
    """See ``idml.load``."""
    path = user_path(source)
    if not path.exists():
        raise UserError(
            f"no model at {path}: expected a run directory, a checkpoint file, or an exported folder; "
            f"{nearest_path(path)}"
        )
    if path.is_dir() and (path / CONFIG).is_file():
        return _load_exported(path, device, trust_module=trust_module)
    if path.is_dir():
        found = newest_checkpoint(path)
        if found is None:
            raise UserError(
                f"no model in {path}: expected a run directory with checkpoints/last.pt, or a folder with {CONFIG} and "
                f"{WEIGHTS}"
            )
        path, checkpoint = found
    else:
        checkpoint = read_checkpoint(path)
    spec = ModelSpec.from_checkpoint(checkpoint, str(path))
    network, introspection = spec.build(), spec.build_introspection()
    load_state(network, checkpoint["model"], str(path))
    if introspection is not None:
        load_state(introspection, checkpoint["introspection"]["state"], f"the introspection of {path}")
    return TrainedModel(network, spec, device=choose_device(device), source=path, introspection=introspection)


def _load_exported(folder: Path, device: str, *, trust_module: bool) -> TrainedModel:
    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read: {error}") from None
    if not isinstance(described, dict) or not isinstance(described.get("idml"), dict):
        raise UserError(f"{folder / CONFIG} does not describe a model of this project: it has no object idml")
    spec = ModelSpec.from_json(described["idml"], str(folder / CONFIG))
    if spec.origin == "module" and not trust_module:
        raise UserError(
            f"the network in {folder} is made by {spec.model or 'nothing that is known'}, which would run code: if you "
            "know that function, give --trust-module, or load(..., trust_module=True)"
        )
    network = spec.build()
    if "timm_classifiers" in described["idml"]:
        from idml.timm_folder import read_timm_folder  # slow to import: only where used

        state = read_timm_folder(folder, described["idml"])
    else:
        state = load_tensors(folder / WEIGHTS)
    introspection = spec.build_introspection()
    own = {name: value for name, value in state.items() if not name.startswith(INTROSPECTION)}
    load_state(network, own, str(folder / WEIGHTS))
    if introspection is not None:
        rest = {name.removeprefix(INTROSPECTION): value for name, value in state.items() if name not in own}
        load_state(introspection, rest, f"the introspection in {folder}")
    return TrainedModel(network, spec, device=choose_device(device), source=folder, introspection=introspection)


def write_folder(model: TrainedModel, place: Path, about: Mapping[str, Any]) -> None:
    """Write a folder that ``load_model`` reads; it must not be there yet.

    Args:
        model: all of it.
        place: the folder.
        about: of ``config.json``, see ``idml.exporting.describe``.
    """
    place.mkdir()
    save_file(model.state(), place / WEIGHTS, metadata={"format": "pt"})
    write_text(place / CONFIG, json.dumps(dict(about), indent=2) + "\n")


def save_model(
    model: TrainedModel, out: Path, *, overwrite: bool = False, more: Mapping[str, Any] | None = None
) -> None:
    """Write a folder whole or not at all, once what was written has been read back as the same model.

    Args:
        model: all of it.
        out: the folder.
        overwrite: replace an exported model that is there.
        more: further entries of ``config.json``.

    Raises:
        UserError: it is there already, cannot be written, or the network cannot be made again.
    """
    check_rebuilt(model.spec)
    check_free(out, overwrite=overwrite)
    with written_whole(out) as place:
        write_folder(model, place, describe(model, "uint8") | dict(more or {}))
        again = load_model(place, device="cpu", trust_module=True)
        if again.fingerprint != model.fingerprint:
            raise UserError(f"what was written to {out} is not the model: nothing was kept")


def check_rebuilt(spec: ModelSpec) -> None:
    """UserError where nothing says how the network is made."""
    if spec.origin == "module" and not spec.model:
        raise UserError(
            "the model cannot be saved, since a stored model is made again by name: give introspect(..., made_by=...) "
            "timm/NAME, torchvision/NAME or package.module:function"
        )
