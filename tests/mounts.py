"""Programs in a mount namespace of their own: with read-only folders, or another /dev/shm. As root on Linux only."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def _allowed() -> bool:
    try:
        done = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


needs_mounts = pytest.mark.skipif(not _allowed(), reason="mounting in a namespace of one's own is not permitted")


def run_mounted(
    *arguments: object,
    read_only: Sequence[Path] = (),
    shm: str | None = None,
    cwd: Path | None = None,
    timeout: float = 200,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments.

    Args:
        read_only: folders that nothing can be written to.
        shm: size of /dev/shm, as mount takes it.
    """
    steps = [f"mount --bind '{folder}' '{folder}' && mount -o remount,ro,bind '{folder}'" for folder in read_only]
    if shm is not None:
        steps.append(f"mount -t tmpfs -o size={shm} tmpfs /dev/shm")
    script = " && ".join([*steps, 'exec "$@"'])
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=cwd)
