"""Reading files that ``torch.save`` wrote, of this project and of others, without ever running what they hold.

Torch's own restricted unpickler (``weights_only=True``) reads them. Other training programs put more than tensors into
their checkpoints: options, paths, numbers of NumPy. For the types that are common there, the unpickler is given what
can do nothing: NumPy's own functions, for example, would take any bytes of a file for addresses of objects.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch.serialization import get_safe_globals, safe_globals

from idml.errors import UserError


class Inert:
    """Stands for an object that is not needed: it takes any arguments and any state, and keeps nothing."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Inert:
        """As if without arguments."""
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __setstate__(self, _state: Any) -> None: ...


def plain_dict(*_args: Any) -> dict[Any, Any]:
    """An empty dictionary, to be filled; for a ``defaultdict``."""
    return {}


def plain_list(*_args: Any) -> list[Any]:
    """An empty list, to be filled; for a ``deque``."""
    return []


def _stand_ins() -> dict[str, Any]:
    pathlibs = ("pathlib", "pathlib._local")  # the second from Python 3.13 on
    arrays = ("numpy.core.multiarray", "numpy._core.multiarray")
    table: list[tuple[Any, list[str]]] = [
        (argparse.Namespace, ["argparse.Namespace"]),
        (plain_dict, ["collections.defaultdict"]),
        (plain_list, ["collections.deque"]),
        *((kind, [f"builtins.{kind.__name__}"]) for kind in (bool, int, float, str, list, tuple, dict)),
        (PurePosixPath, [f"{m}.{name}" for m in pathlibs for name in ("Path", "PosixPath", "PurePosixPath")]),
        (PureWindowsPath, [f"{m}.{name}" for m in pathlibs for name in ("WindowsPath", "PureWindowsPath")]),
        (Inert, [f"{m}.{name}" for m in arrays for name in ("scalar", "_reconstruct")]),
        (Inert, ["numpy.dtype", "numpy.ndarray", "types.SimpleNamespace", "torch.torch_version.TorchVersion"]),
        (Inert, [f"datetime.{name}" for name in ("datetime", "date", "timedelta")]),
    ]
    return {name: stand_in for stand_in, names in table for name in names}


STAND_INS = _stand_ins()
"""By the name that a file gives: what is built in its place. Nothing here reads, writes, calls or imports anything."""

_CLASS = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")
"""Where torch's error names what a file would build."""

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def load_torch_file(path: Path, *, foreign: bool = False, lazily: bool = False) -> Any:
    """What ``torch.save`` wrote, with its tensors on the CPU.

    Args:
        path: of the file.
        foreign: let ``STAND_INS`` take the place of what programs other than this one write beside tensors.
        lazily: leave tensors on the disk until they are looked at, where the file's format allows it; for a look at
            what else is in a large file.

    Raises:
        UserError: it is damaged, or has an object that is none of these and no plain value (its class is named).
    """
    given = set(get_safe_globals())  # what a program that imports this has allowed by itself stays allowed
    stand_ins = STAND_INS if foreign else {}
    allowed: list[Any] = [(stand_in, name) for name, stand_in in stand_ins.items() if (stand_in, name) not in given]
    try:
        with safe_globals(allowed):
            mapped = lazily and zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    except Exception as error:  # an unpickler that is fed damaged bytes may raise anything
        raise UserError(_reason(path, error)) from None


def _reason(path: Path, error: Exception) -> str:
    """One line; torch goes on to advise what would run the file's code."""
    text = _ESCAPES.sub("", str(error))
    if found := _CLASS.search(text):
        name = found.group(1) if "." in found.group(1) else f"builtins.{found.group(1)}"
        return (
            f"{path} holds {name}, which is not read: building it could run code. In the program that wrote the file, "
            "write the weights alone: torch.save(model.state_dict(), 'weights.pth')"
        )
    told = text.split("WeightsUnpickler error: ")[-1].removeprefix("Weights only load failed.").split(" In PyTorch")[0]
    lines = [" ".join(line.split()) for line in told.splitlines() if line.strip()]
    reason = lines[0] if lines else ""
    if not isinstance(error, (RuntimeError, ValueError, OSError)) or not reason:
        reason = f"{type(error).__name__} {reason}".strip()
    return f"{path} is damaged, or holds more than tensors and plain values: {reason}"
