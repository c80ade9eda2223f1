"""What the environment says of several processes: RANK, WORLD_SIZE and the rest, as torchrun sets them.

One process is rank 0 of 1, whatever an earlier job has left in the environment.
"""

from __future__ import annotations

import os
import warnings

from idml.errors import UserError

PLACE = ("MASTER_ADDR", "MASTER_PORT")
"""Variables that say where rank 0 waits for the others."""


def _number(name: str, default: int) -> int:
    """A variable's whole number; ``default`` where it is not set or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise UserError(f"expected a whole number in the environment variable {name}, got {text!r}; {_advice()}")
    return int(text)


def _is_set(name: str) -> bool:
    return bool(os.environ.get(name, "").strip())


def _advice() -> str:
    return "start several processes with torchrun; for one, unset RANK, WORLD_SIZE and LOCAL_RANK"


def world_size() -> int:
    """How many processes there are over all machines; UserError for a WORLD_SIZE that is none."""
    size = _number("WORLD_SIZE", 1)
    if size < 1:
        raise UserError(f"expected WORLD_SIZE to be at least 1, got {size}; {_advice()}")
    return size


def rank() -> int:
    """Number of this process, from 0; UserError for a RANK that is none or not below WORLD_SIZE."""
    if not _is_set("WORLD_SIZE"):
        return 0
    number, size = _number("RANK", 0), world_size()
    if number >= size:
        raise UserError(f"RANK={number} is not below WORLD_SIZE={size}; {_advice()}")
    return number


def local_rank() -> int:
    """Number of this process on its machine: which GPU is its own."""
    return 0 if world_size() == 1 else _number("LOCAL_RANK", 0)


def check_environment() -> None:
    """UserError unless the environment describes one process, or one of several completely."""
    size = world_size()
    if rank() == 0 and size == 1:
        return
    local_rank()
    missing = [name for name in ("RANK", *PLACE) if not _is_set(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE={size} says that this is one of {size} processes, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: start it with torchrun --nproc-per-node {size}, or unset "
            "WORLD_SIZE for one process"
        )
    master()


def warn_of_leftovers() -> None:
    """Say that variables of another job are not taken for this one's."""
    left = [name for name in ("RANK", "LOCAL_RANK") if os.environ.get(name, "").strip() not in ("", "0")]
    if left and not _is_set("WORLD_SIZE"):
        warnings.warn(
            f"{' and '.join(f'{name}={os.environ[name]}' for name in left)} in the environment, but no WORLD_SIZE: "
            "taken for left over, this is one process (torchrun starts several)",
            UserWarning,
            stacklevel=3,
        )


def master() -> tuple[str, int]:
    """Name and port of the machine where rank 0 waits; UserError for a MASTER_PORT that is none."""
    port = _number("MASTER_PORT", 0)
    if not 0 < port < 2**16:
        raise UserError(f"expected MASTER_PORT to be between 1 and 65535, got {port}; {_advice()}")
    return os.environ["MASTER_ADDR"].strip(), port
