"""The checkpoints of a run on disk: written whole or not at all, the last few kept, and read only when undamaged."""

from __future__ import annotations

import contextlib
import os
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from idml.checkpoint import read_checkpoint, wrong_entries
from idml.errors import UserError

TO_GO_ON: dict[str, type | tuple[type, ...]] = {
    "optimizer": dict,
    "schedule": dict,
    "scaler": dict,
    "random": list,
    "epoch_losses": torch.Tensor,
    "epoch": int,
    "step": int,
    "train_images": int,
    "history": list,
    "seconds": (int, float),
}
"""What a checkpoint has beside the model, and of what type, for its run to be gone on with."""


def write_checkpoint(path: Path, content: dict[str, Any], *, keep: int = 1) -> None:
    """Write a checkpoint beside its place, flush it to disk, and rename it into place.

    Args:
        path: ``<name>.pt``; ``<name>-1.pt`` is then the one before it, ``<name>-2.pt`` the one before that.
        content: tensors and plain values.
        keep: how many of them there are, the new one included.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # torch's own word for a write that failed
                raise OSError(f"could not write {temporary}: {error}") from None
            file.flush()
            os.fsync(file.fileno())
        _rotate(path, keep)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _rotate(path: Path, keep: int) -> None:
    """Give the file at ``path`` the name of the one before it, and so on; ``path`` itself stays where links can be."""
    names = [path, *(path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, keep))]
    for older, newer in zip(reversed(names[1:]), reversed(names[:-1]), strict=True):
        if not newer.exists():
            continue
        if newer is not path:
            newer.replace(older)
            continue
        with contextlib.suppress(FileNotFoundError):
            older.unlink()
        try:
            os.link(newer, older)
        except OSError:  # a file system without hard links
            newer.replace(older)


def _sync_folder(folder: Path) -> None:
    """Have renames in a folder written to disk, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_verified(path: Path) -> dict[str, Any]:
    """A checkpoint whose checksums (CRC-32 of every tensor, which torch stores) have been compared with its content.

    Raises:
        UserError: there is no such file, it is damaged, or it is something else.
    """
    if path.is_file():
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{path} is damaged: {error}") from None
        if damaged is not None:
            raise UserError(f"{path} is damaged: the checksum of {damaged} is wrong")
    content = read_checkpoint(path)
    if missing := wrong_entries(content, TO_GO_ON):
        raise UserError(f"{path} has a model, but not what is needed to go on with its run: {missing}")
    if content["step"] < 0 or content["epoch"] < 0 or not all(isinstance(line, dict) for line in content["history"]):
        raise UserError(f"{path} is damaged: its counts of epochs and steps, or its history, cannot be")
    return content


def newest_checkpoint(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint of a run directory, and what it holds; a damaged newer one is warned of.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        UserError: there are some, and every one is damaged.
    """
    problems = []
    for path in _candidates(directory / "checkpoints"):
        try:
            content = read_verified(path)
        except UserError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem}; going on from {path.name}, step {content['step']}", UserWarning, stacklevel=2)
        return path, content
    if problems:
        raise UserError(f"no checkpoint in {directory} can be read: {'; '.join(problems)}")
    return None


def _candidates(folder: Path) -> Iterator[Path]:
    """Existing checkpoints, the newest first, the best last."""
    older = sorted(folder.glob("last-*.pt"), key=lambda path: (len(path.name), path.name))
    return (path for path in [folder / "last.pt", *older, folder / "best.pt"] if path.exists())
