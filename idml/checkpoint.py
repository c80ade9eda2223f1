"""Reading checkpoints and weight files, without ever executing what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from idml.errors import UserError

CHECKPOINT_KEYS: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "config": dict,
    "classes": (list, tuple),
    "preprocessing": dict,
}
"""What every checkpoint has, and of what type."""

OWN_HEADS = ("classifier", "semantic_head", "uncertainty_head", "directions", "calibration", "search_calibration")
"""What this project's models have beside a backbone."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of this project: ``model`` (state), ``config``, ``classes``, ``preprocessing`` and the rest.

    Raises:
        UserError: there is no such file, it is damaged, or it is something else.
    """
    checkpoint = load_tensors(Path(path))
    if missing := wrong_entries(checkpoint, CHECKPOINT_KEYS):
        raise UserError(f"{path} is not a checkpoint of train_cls.py or train_dml.py: {missing}")
    return checkpoint


def wrong_entries(content: Mapping[str, Any], expected: Mapping[str, type | tuple[type, ...]]) -> str:
    """What of ``expected`` a file does not have, or has as something else; empty where all is there."""
    missing = [key for key in expected if key not in content]
    others = [key for key, kind in expected.items() if key in content and not isinstance(content[key], kind)]
    problems = [f"it has no {', '.join(missing)}"] if missing else []
    return "; ".join(problems + [f"its {key} is a {type(content[key]).__name__}" for key in others])


def load_tensors(path: Path) -> dict[str, Any]:
    """The content of a .safetensors file, or of a .pth/.pt file that holds tensors and plain values only."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler that is fed damaged bytes may raise anything
        # Torch goes on to advise what would run the file's code.
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(" In PyTorch")[0]
        raise UserError(f"{path} is damaged, or holds more than tensors and plain values: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a dictionary of tensors, got a {type(content).__name__}")
    return content


def load_weights(backbone: nn.Module, path: str | Path, *, allow_missing: Sequence[str] = ()) -> None:
    """Load a file of weights into a backbone: a bare state, or one under ``state_dict`` or ``model``.

    Names may have a ``module.`` or ``backbone.`` before them. Weights of the file's own classifier (the name that timm
    records for the architecture) are not needed and left out.

    Args:
        backbone: changed in place, only when everything fits.
        path: .pth, .pt or .safetensors.
        allow_missing: prefixes of names that the file may lack, have in another shape, or have too many.

    Raises:
        UserError: the file cannot be read, or names or shapes differ (the first ten are told).
    """
    content: Mapping[str, Any] = load_tensors(Path(path))
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    weights = {_bare(name): value for name, value in content.items() if isinstance(value, Tensor)}
    own = backbone.state_dict()
    classifiers = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    ignored = (*(f"{name}." for name in (*classifiers, *OWN_HEADS)), "directions")

    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is not in the model" for name in weights if name not in own and not name.startswith(ignored)]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    problems = sorted(problem for problem in problems if not problem.startswith(tuple(allow_missing) or ("\0",)))
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(
            f"{path} does not fit the model: {'; '.join(problems[:10])}{more}. To go on with random weights in their "
            "place, name their prefixes with --pretrained-allow-missing"
        )
    fitting = {name: value for name, value in weights.items() if name in own and value.shape == own[name].shape}
    backbone.load_state_dict(fitting, strict=False)


def _bare(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    return name.removeprefix("module.").removeprefix("backbone.")
