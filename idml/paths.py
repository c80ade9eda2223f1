"""Paths that users write, in flags and in files: ``~``, letters in other code points, and what to say of wrong ones."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from idml.data.names import composed

READ_OPTIONS = frozenset(
    {
        "config",
        "data_dir",
        "train_dir",
        "val_dir",
        "csv",
        "checkpoint",
        "pretrained",
        "resume",
        "index",
        "weights",
        "classes",
    }
)
"""Options of all programs that name what is there already."""

WRITTEN_OPTIONS = frozenset({"cache_dir", "output_dir", "out", "sheet"})
"""Options that name what is written."""

PATH_LISTS = frozenset({"query", "files"})
"""Options that are lists of paths."""


def expanded(path: str) -> str:
    """The path with a leading ``~`` replaced by the home directory; shells leave it as it is in ``--data-dir=~/x``."""
    return os.path.expanduser(path)


def user_path(path: str | Path) -> Path:
    """What a user means by a path: ``~`` replaced, and each name in the code points that the disk has it in.

    macOS stores "ä" as two code points and most keyboards give one; the names look alike and are different files.
    """
    path = Path(expanded(str(path)))
    if os.path.lexists(path):
        return path
    found = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        if not os.path.lexists(found / part):
            same = [name for name in _names_in(found) if composed(name) == composed(part)]
            if len(same) != 1:
                return path
            part = same[0]
        found = found / part
    return found


def with_user_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of options, in which those that are paths are what the user means by them."""
    found = dict(values)
    for name, value in values.items():
        if name in PATH_LISTS and isinstance(value, list):
            found[name] = [str(user_path(each)) for each in value]
        elif name in WRITTEN_OPTIONS and isinstance(value, str):
            found[name] = expanded(value)
        elif name in READ_OPTIONS and isinstance(value, str) and (value.startswith("~") or not value.isascii()):
            found[name] = str(user_path(value))
    return found


def missing(path: str | Path, what: str = "folder") -> str:
    """Why there is no such folder or file, in words: what is there in its place, or the nearest that exists.

    Args:
        path: at which there is none.
        what: was expected.
    """
    if os.path.islink(path) and not os.path.exists(path):
        return f"no {what} {path}: it is a link that leads nowhere, to {os.readlink(path)}"
    if os.path.exists(path):
        return f"no {what} {path}: it is a {'folder' if os.path.isdir(path) else 'file'}"
    return f"no {what} {path}: {nearest_path(Path(path))}"


def nearest_path(path: Path) -> str:
    """Of a path that does not exist: how far it does, and what looks like the rest, in words."""
    parent = path.parent
    while not os.path.exists(parent) and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        return f"{parent} is a file"
    shown = "the current folder" if parent == Path() else str(parent)
    below = path.parts[len(parent.parts) :]
    near = _nearest(below[0], _names_in(parent))
    if near is None:
        return f"the nearest that exists is {shown}"
    whole = parent.joinpath(near, *below[1:])
    return f"the nearest that exists is {shown}; did you mean {whole if os.path.exists(whole) else parent / near}?"


def _nearest(name: str, names: list[str]) -> str | None:
    """The one of the names that looks most like it, capital letters and code points aside."""
    plain = {composed(each).casefold(): each for each in names}
    found = difflib.get_close_matches(composed(name).casefold(), plain, n=1, cutoff=0.5)
    return plain[found[0]] if found else None


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
