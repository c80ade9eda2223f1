"""Device, precision and seeds: what the machine contributes to a run."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from idml.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device for ``auto``, ``cpu``, ``cuda`` or ``mps``; UserError when it is asked for and absent."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, present in available.items() if present)
    if not available[name]:
        raise UserError(
            f"--device {name}: torch {torch.__version__} sees no such device here; take --device auto or cpu"
        )
    return torch.device(name)


def seed_everything(seed: int, *, deterministic: bool = False, threads: int | None = None) -> None:
    """Seed Python, NumPy and torch; forbid algorithms whose results vary; set torch's CPU threads."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (for libraries that still draw from the global state)
    torch.manual_seed(seed)
    if threads is not None:
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch's determinism asks of cuBLAS
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for the backbone: bf16 or fp16, or nothing for fp32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")
