"""Reading checkpoints and weight files, without ever executing what they hold."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from idml import lite0
from idml.data.names import composed
from idml.distributed import is_main
from idml.errors import UserError
from idml.paths import nearest_path
from idml.torch_file import load_torch_file
from idml.weights import find_group, misfit, problems_of, told

CHECKPOINT_KEYS: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "config": dict,
    "classes": (list, tuple),
    "preprocessing": dict,
}
"""What every checkpoint has, and of what type."""


def read_checkpoint(path: str | Path, *, lazily: bool = False) -> dict[str, Any]:
    """A checkpoint of this project: ``model`` (state), ``config``, ``classes``, ``preprocessing`` and the rest.

    Args:
        path: of the file.
        lazily: see ``load_torch_file``.

    Raises:
        UserError: there is no such file, it is damaged, or it is something else.
    """
    checkpoint = load_tensors(Path(path), lazily=lazily)
    if missing := wrong_entries(checkpoint, CHECKPOINT_KEYS):
        raise UserError(f"{path} is not a checkpoint of train_cls.py or train_dml.py: {missing}")
    checkpoint["classes"] = [composed(str(name)) for name in checkpoint["classes"]]
    return without_loss_prediction(checkpoint, path)


EARLIER_HEADS = ("uncertainty_head.", "directions", "calibration.", "search_calibration.")
"""Names of what loss prediction, which earlier versions trained with, has put into a checkpoint."""


def without_loss_prediction(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """A checkpoint of an earlier version whose uncertainty head foresaw losses, as one of a plain network.

    Its answers and embeddings are as they were; the head is left out, and a warning says how to have more than it gave.
    """
    if checkpoint["config"].get("uncertainty_loss", "none") == "none":
        return checkpoint
    warnings.warn(
        f"{path} was trained with loss prediction, which this version does not have: its answers are as they were, "
        "P(wrong) is not. To have it again: python -m idml introspect --checkpoint ... --data-dir ...",
        UserWarning,
        stacklevel=3,
    )
    kept = {name: value for name, value in checkpoint["model"].items() if not name.startswith(EARLIER_HEADS)}
    config = checkpoint["config"] | {"ism": "off", "uncertainty_loss": "none"}
    return checkpoint | {"model": kept, "config": config}


def wrong_entries(content: Mapping[str, Any], expected: Mapping[str, type | tuple[type, ...]]) -> str:
    """What of ``expected`` a file does not have, or has as something else; empty where all is there."""
    missing = [key for key in expected if key not in content]
    others = [key for key, kind in expected.items() if key in content and not isinstance(content[key], kind)]
    problems = [f"it has no {', '.join(missing)}"] if missing else []
    return "; ".join(problems + [f"its {key} is a {type(content[key]).__name__}" for key in others])


def load_tensors(path: Path, *, foreign: bool = False, lazily: bool = False) -> dict[str, Any]:
    """The content of a .safetensors file, or of a .pth/.pt file that holds tensors and plain values only.

    Args:
        path: of the file.
        foreign, lazily: see ``load_torch_file``.

    Raises:
        UserError: there is no such file, it is damaged, or it is something else.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the file in it")
    if not path.is_file():
        raise UserError(f"no such file: {path}; {nearest_path(path)}")
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except Exception as error:  # a reader that is fed damaged bytes may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path} is damaged, or holds more than tensors: {reason}") from None
    content = load_torch_file(path, foreign=foreign, lazily=lazily)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a dictionary of tensors, got a {type(content).__name__}")
    return content


def weights_file(pretrained: str | Path) -> Path:
    """The file that ``--pretrained`` means: a path, or the package of ``idml.lite0``.

    Raises:
        UserError: the package is meant, and not installed.
    """
    path = Path(pretrained)
    return lite0.package_file() if lite0.is_package(str(pretrained)) and not path.exists() else path


def load_weights(
    backbone: nn.Module, pretrained: str | Path, *, key: str | None = None, allow_missing: Sequence[str] = ()
) -> None:
    """Load a file of weights into a backbone; rank 0 prints a line that says which of its tensors were taken.

    Where the tensors are in the file, and what wrappers have put before their names, is found out by their names (see
    ``idml.weights``). Weights of the file's own classifier (the name that timm records for the architecture) are not
    needed and left out.

    Args:
        backbone: changed in place, only when everything fits.
        pretrained: a .pth, .pt or .safetensors file, or the package of ``idml.lite0``.
        key: the entry of the file to take, ``state_dict`` for example; by default an average (EMA) before others.
        allow_missing: prefixes of names that the file may lack, have in another shape, or have too many.

    Raises:
        UserError: the file cannot be read, there is no such key, or names or shapes differ (the first ten are listed).
    """
    path = weights_file(pretrained)
    content = load_tensors(path, foreign=True)
    own = backbone.state_dict()
    group, others = find_group(content, own, key, path)
    weights, about = dict(group.tensors), getattr(backbone, "pretrained_cfg", None) or {}
    architecture = about.get("architecture") or type(backbone).__name__
    if lite0.has_these_names(weights):
        weights = lite0.renamed(weights, architecture, path)
    classifiers = about.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)

    problems = problems_of(weights, own, tuple(f"{name}." for name in classifiers))
    problems = [problem for problem in problems if not problem.startswith(tuple(allow_missing) or ("\0",))]
    if problems:
        raise UserError(f"{path} does not fit the model {architecture}: {misfit(problems, group, own, content)}")
    fitting = {name: value for name, value in weights.items() if name in own and value.shape == own[name].shape}
    backbone.load_state_dict(fitting, strict=False)
    if is_main():
        unused = [*(name for name in weights if name not in fitting), *group.left_out]
        print(told(group, others, unused, path), flush=True)
