"""Device, precision and seeds: what the machine contributes to a run."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from idml.distributed import local_rank, world_size
from idml.errors import UserError

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc's malloc.h: see mallopt(3)."""


def choose_device(name: str) -> torch.device:
    """The device for ``auto``, ``cpu``, ``cuda`` or ``mps``; UserError when it is asked for and absent."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, present in available.items() if present)
    if not available[name]:
        raise UserError(
            f"--device {name}: torch {torch.__version__} sees no such device here; take --device auto or cpu"
        )
    if name == "cuda" and world_size() > 1:
        count = torch.cuda.device_count()
        if local_rank() >= count or (count > 1 and "LOCAL_RANK" not in os.environ):
            given = os.environ.get("LOCAL_RANK", "not set")
            raise UserError(
                f"--device cuda: torch sees {count} GPU(s) here and LOCAL_RANK is {given}; expected a process for each "
                "GPU, numbered from 0 on each machine, as torchrun --nproc-per-node starts them"
            )
        torch.cuda.set_device(local_rank())
        return torch.device("cuda", local_rank())
    return torch.device(name)


def keep_freed_memory(device: torch.device) -> None:
    """Have glibc keep what a step on the CPU frees, for the next step; nothing happens elsewhere.

    By itself it gives large tensors back to the system, which hands them out again page by page and zeroed. Here
    tensors of up to 32 MiB, the most that glibc allows, are never given back. For larger ones the scripts set
    THP_MEM_ALLOC_ENABLE before torch is imported: torch then asks for pages of 2 MiB. Figures of both, in time and in
    memory: docs/speed.md. Where one of glibc's own variables is set, the user has decided.
    """
    chosen = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys()
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc" and not chosen:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, 32 * 2**20)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)


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


def place_model(model: nn.Module, device: torch.device, *, channels_last: bool, sync_bn: bool, tf32: bool) -> nn.Module:
    """The model on its device and in its memory layout; with synchronised batch norm if asked for.

    Raises:
        UserError: synchronised batch norm on a device for which torch has none.
    """
    if tf32 and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    if sync_bn:
        if device.type != "cuda":
            raise UserError(
                "--sync-bn: torch synchronises batch norm on GPUs only; on the CPU take --bn-freeze, or neither"
            )
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


def freeze_batch_norm(model: nn.Module) -> None:
    """Batch norm in evaluation mode, its scale and shift without gradient; to be done again after ``model.train()``."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.requires_grad_(False)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards in the mode that it was in: frozen batch norm stays frozen."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for the backbone: bf16 or fp16, or nothing for fp32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")
