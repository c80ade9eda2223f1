"""What a run was made on: packages, commit and machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "timm", "numpy", "ffcv", "tensorboard", "pytorch-metric-learning")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a result; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_commit() -> str | None:
    """Commit of this source tree, with ``-dirty`` when it has changes; None outside a git checkout.

    Figures that benchmarks have stored in the tree do not count as changes of it.
    """
    folder = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10)
        # Without the lock that git takes to refresh its index: it would stay where git is ended for taking too long.
        asked = ["status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results"]
        status = subprocess.run(
            ["git", "--no-optional-locks", *asked],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def hardware() -> str:
    """The machine in words: GPU if there is one, else processor and torch's thread count."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux: the name from platform stands
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} CPU threads"
