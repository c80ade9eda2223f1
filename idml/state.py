"""Everything that a training run changes from step to step, as one value that a checkpoint can hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


@dataclasses.dataclass(kw_only=True, slots=True)
class TrainingState:
    """What moves during training.

    Attributes:
        model: the network in training.
        network: what is called in training: the model itself, or compiled, or wrapped for several processes.
        optimizer, schedule, scaler: the schedule counts steps; the scaler does nothing but for fp16.
        generator: CPU generator of augmentation and mixing.
        ema: moving average of the model, or None.
        loss: a loss with parameters of its own (proxies, say), or None.
        epoch, step: how many are done.
    """

    model: nn.Module
    network: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    generator: torch.Generator
    ema: ModelEmaV3 | None = None
    loss: nn.Module | None = None
    epoch: int = 0
    step: int = 0

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that figures are of: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that ``torch.load(weights_only=True)`` reads it back."""
        return {
            "model": self.evaluated_model.state_dict(),
            "trained_model": None if self.ema is None else self.model.state_dict(),
            "loss": None if self.loss is None else self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "epoch": self.epoch,
            "step": self.step,
        }
