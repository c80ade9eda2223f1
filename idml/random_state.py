"""The state of every random generator of a process, as values that ``torch.load(weights_only=True)`` reads back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from idml import distributed


def random_state(generator: torch.Generator, device: torch.device) -> dict[str, Any]:
    """The states of Python, NumPy, torch, the GPU's generator and ``generator`` (of augmentation and mixing)."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "generator": generator.get_state(),
    }


@contextlib.contextmanager
def generator_kept() -> Iterator[None]:
    """Leave Python's generator as it was: scikit-learn's import, where rich is installed, draws from it."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator for one step of this rank: the same after a resume, and apart from every other draw."""
    return torch.Generator().manual_seed(((seed + 1) * 1_000_003 + distributed.rank()) * 100_003 + step)


def set_random_state(state: dict[str, Any], generator: torch.Generator, device: torch.device) -> None:
    """Bring every generator back to what ``random_state`` gave; the GPU's only where it was stored from one."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    generator.set_state(state["generator"])
