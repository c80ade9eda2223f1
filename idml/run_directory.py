"""Which directory a run writes to, that no other run does so meanwhile, and what is done where it cannot be written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import socket
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

from idml import distributed
from idml.errors import UserError

LOCK = ".lock"
"""File in a run directory that its process has locked; it is removed at the end of the run."""

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""What a file system answers that has no locks."""


def run_directory(given: str | None, name: str) -> Path:
    """``given``, or a new directory ``runs/<name>-<date>-<time>``, with a number behind it where that is taken.

    Rank 0 decides. To be called on every rank.

    Raises:
        UserError: nothing can be written there.
    """
    return Path(given) if given else distributed.from_main(lambda: new_directory(name))


def new_directory(name: str) -> Path:
    """Make the directory: whoever makes it has it, however many start in the same second."""
    stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    numbered = (stem.with_name(f"{stem.name}-{number}") for number in itertools.count(2))
    for path in itertools.chain([stem], numbered):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError:
            if path.parent.is_dir():
                continue
            raise UserError(f"cannot make the run directory {path}: {path.parent} is a file") from None
        except OSError as error:
            raise UserError(f"cannot make the run directory {path}: {error.strerror}; give --output-dir DIR") from None
        return path
    raise AssertionError("numbers do not end")


@contextlib.contextmanager
def stored_if_possible(place: Path, instead: str) -> Iterator[None]:
    """What is written here is written if it can be; else a warning says so: the figures are on the screen already.

    Args:
        place: file or folder that is written.
        instead: option that names another one.
    """
    try:
        yield
    except OSError as error:
        warnings.warn(
            f"the figures could not be stored in {place} ({error.strerror or error}); {instead} names another place",
            UserWarning,
            stacklevel=3,
        )


class DirectoryLock:
    """Keeps other processes from a run directory for as long as this one lives, on every machine that sees it.

    A POSIX lock: it ends with the process however that ends, and processes that read images do not inherit it.

    Args:
        directory: an existing one.

    Raises:
        UserError: another process has it.
        OSError: nothing can be written there.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK
        self.descriptor = _locked(self.path)
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._close = weakref.finalize(self, os.close, self.descriptor)

    def release(self) -> None:
        """Let others have the directory."""
        if self._close.alive:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self._close()


def _locked(path: Path) -> int:
    """A descriptor of the file, which is made if it is not there, and locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, path)
            # What was opened may have been removed by its owner since.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        owner = os.read(descriptor, 200).decode(errors="replace").strip() or "it has just begun"
        raise UserError(
            f"another run is writing to {path.parent} ({owner}): give another --output-dir, or wait for its end"
        ) from None
