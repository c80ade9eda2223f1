"""How the processes of a run come together, within a limit of time, or say in one line that they do not."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta

from torch import distributed as dist
from torch.distributed.constants import default_pg_timeout

from idml.errors import UserError
from idml.launch import master, rank, world_size

JOIN_SECONDS = 180.0
"""That processes wait for one another at the start: on clusters some begin a minute or two after others."""

QUIET_SECONDS = 10.0
"""After which a process that waits says so."""


def join(backend: str) -> None:
    """Make the process group that the environment describes.

    Raises:
        UserError: not all of its processes come within ``JOIN_SECONDS``.
    """
    with _watched():
        try:
            dist.init_process_group(backend, store=_meet(), rank=rank(), world_size=world_size())
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(_alone(" ".join(str(error).split()).split(" Exception raised from")[0])) from None


def _alone(reason: str) -> str:
    """What is said where processes do not come together."""
    return (
        f"rank {rank()} of {world_size()} did not meet the others at {':'.join(map(str, master()))} (MASTER_ADDR, "
        f"MASTER_PORT) within {JOIN_SECONDS:.0f} s: {reason.rstrip('.')}. Are all of them running, with the same two "
        "variables, and the port free? torchrun sees to that"
    )


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Say that this process waits, if it waits long, and end it if that never ends: torch's own limits have holes."""

    def give_up() -> None:
        print(f"error (rank {rank()}): {_alone('something else answers there')}", file=sys.stderr, flush=True)
        os._exit(UserError.exit_code)

    told = f"rank {rank()} of {world_size()} waits for the others at {':'.join(map(str, master()))}"
    timers = [
        threading.Timer(QUIET_SECONDS, lambda: print(told, file=sys.stderr, flush=True)),
        threading.Timer(2 * JOIN_SECONDS, give_up),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _meet() -> dist.Store:
    """The store that all processes share, once all of them have come to it."""
    limit = timedelta(seconds=JOIN_SECONDS)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    _wait_for_main(listens=agent or rank() > 0)
    # After a restart torchrun's store still has the addresses of the processes before (pytorch issue 135712). On one
    # machine the number of restarts, the same on every rank, tells them apart; several machines count differently.
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if agent else 0
    if agent and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 and rank() == 0:
            warnings.warn(
                "torchrun on several machines can only restart with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
                "environment",
                UserWarning,
                stacklevel=2,
            )
        restarts = 0
    found, own_rank, size = next(dist.rendezvous("env://", timeout=limit))
    store = dist.PrefixStore(f"restart{restarts}", found)
    store.set(f"rank {own_rank}", "here")
    for number in range(size):
        try:
            store.wait([f"rank {number}"], limit)
        except dist.DistStoreError:
            raise RuntimeError(f"rank {number} did not come") from None
    store.set_timeout(default_pg_timeout)  # of what comes later, as torch has it
    return store


def _wait_for_main(*, listens: bool) -> None:
    """Until rank 0's machine is known by its name and, if so asked, something ``listens`` there.

    On clusters both come about only once rank 0 has been started. Torch prints a warning for each try in vain.
    """
    address, end = master(), time.monotonic() + JOIN_SECONDS
    while True:
        try:
            socket.getaddrinfo(*address)
            if listens:
                socket.create_connection(address, timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                known = "no machine of that name" if isinstance(error, socket.gaierror) else "nothing listens there"
                raise RuntimeError(f"{known} ({error.strerror or error})") from None
        time.sleep(0.2)
