"""A training step never makes the program wait for a GPU, which would then wait for the program.

There need be no GPU: on torch's meta device nothing has a value, so whatever reads one fails.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_train_cls import ROOT

sys.path.append(str(ROOT / "benchmarks"))
bench_ism = importlib.import_module("bench_ism")


class BlockingCopies(TorchDispatchMode):
    """Counts copies from the CPU to the device that wait for what the device was given before."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].is_cpu and isinstance(result, Tensor) and result.is_meta:
            self.count += not (kwargs or {}).get("non_blocking", False)
        return result


def test_reading_and_copying_are_seen() -> None:
    with BlockingCopies() as copies:
        torch.ones(2).to("meta", non_blocking=True)
        assert copies.count == 0
        values = torch.ones(2).to("meta")
        assert copies.count == 1
    for read in (values.sum().item, values.cpu, lambda: values[values > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()


@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix"])
@pytest.mark.parametrize("variant", ["off", "live", "released"])
def test_a_classification_step_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, mix: str
) -> None:
    # The meta device has no autocast, which is not what this is about.
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_kwargs: contextlib.nullcontext())
    settings = {"on_cpu": True, "precision": "fp32", "compiled": False}
    training = bench_ism.Training(variant, bench_ism.QUICK, tmp_path, torch.device("meta"), **settings)
    training.config.mix, training.config.mix_prob = mix, 1.0
    with BlockingCopies() as copies:
        training.step()
    assert copies.count == 0
