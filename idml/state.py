"""Everything that a training run changes from step to step, as one value that a checkpoint holds."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from idml import distributed
from idml.random_state import random_state, set_random_state


@dataclasses.dataclass(kw_only=True, slots=True)
class TrainingState:
    """What moves during training.

    Attributes:
        model: the network in training.
        network: what is called in training: the model itself, or compiled, or wrapped for several processes.
        optimizer, schedule, scaler: the schedule counts steps; the scaler does nothing but for fp16.
        generator: CPU generator of augmentation and mixing.
        seed: of the run.
        ema: moving average of the model, or None.
        loss: a loss with parameters of its own (proxies, say), or None.
        own_share: every rank draws and has a loss for its own share of a batch, and these add up (classification);
            else every rank draws for the whole batch and has its whole loss (retrieval).
        epoch, step: how many are done. An epoch is done when it has been evaluated.
        epoch_losses: 0-d, of each step of the epoch that is not done; as many as steps of it are done.
    """

    model: nn.Module
    network: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    generator: torch.Generator
    seed: int
    own_share: bool
    ema: ModelEmaV3 | None = None
    loss: nn.Module | None = None
    epoch: int = 0
    step: int = 0
    epoch_losses: list[Tensor] = dataclasses.field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that figures are of: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def mean_epoch_loss(self) -> float:
        """Mean loss of the epoch's steps so far, over all ranks; steps that were left out (not finite) do not count."""
        losses = self._over_ranks(self.epoch_losses)
        return losses[losses.isfinite()].mean().item()

    def last_loss(self) -> float:
        """Loss of the last step, over all ranks."""
        return self._over_ranks(self.epoch_losses[-1:]).item()

    def _over_ranks(self, losses: list[Tensor]) -> Tensor:
        """(n,) losses of whole batches; to be called on every rank."""
        if not losses:
            return torch.zeros(0)
        stacked = torch.stack(losses)
        return distributed.all_reduce_sum(stacked) if self.own_share else stacked

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that ``torch.load(weights_only=True)`` reads it back.

        To be called on every rank at once: it collects the random states of all.
        """
        return {
            "model": self.evaluated_model.state_dict(),
            "trained_model": None if self.ema is None else self.model.state_dict(),
            "loss": None if self.loss is None else self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": distributed.gather_objects(random_state(self.generator, self.device)),
            "epoch_losses": self._over_ranks(self.epoch_losses).cpu(),
            "epoch": self.epoch,
            "step": self.step,
        }

    def load_state_dict(self, stored: Mapping[str, Any], *, same_schedule: bool) -> None:
        """Go back to a stored state.

        Args:
            stored: what ``state_dict`` gave.
            same_schedule: take the stored schedule; else the run was made longer or shorter, and this one is moved on.

        Raises:
            RuntimeError, ValueError, KeyError: it does not fit this model, loss or optimizer.
        """
        self.model.load_state_dict(stored["model"] if stored["trained_model"] is None else stored["trained_model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(stored["model"])
        if self.loss is not None:
            self.loss.load_state_dict(stored["loss"])
        if not same_schedule:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # no step of the optimizer lies between
                for _ in range(stored["step"]):
                    self.schedule.step()
        # How the optimizer computes belongs to the device; where the schedule differs, so do the rates.
        kept = ("fused", "foreach", "capturable", *(() if same_schedule else ("lr", "initial_lr")))
        own = [{name: group[name] for name in kept if name in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(stored["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)
        if same_schedule:
            self.schedule.load_state_dict(stored["schedule"])
        self.scaler.load_state_dict(stored["scaler"])
        self.epoch, self.step = stored["epoch"], stored["step"]
        # A rank's share of what has been summed up already: all of it on rank 0.
        losses = stored["epoch_losses"].to(self.device)
        losses = losses if distributed.is_main() or not self.own_share else torch.zeros_like(losses)
        self.epoch_losses = list(losses)
        states = stored["random"]
        if len(states) == distributed.world_size():
            set_random_state(states[distributed.rank()], self.generator, self.device)
        else:
            set_random_state(states[0], self.generator, self.device)
            if self.own_share:
                self.generator.manual_seed(self.seed + 1_000_003 * distributed.rank() + 7_919 * self.step)
