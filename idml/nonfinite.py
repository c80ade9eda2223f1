"""Losses and gradients that are not finite: what is said of them, and what is done (``--on-nonfinite``)."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from idml import distributed
from idml.data.torch_loader import Loader
from idml.errors import TrainingError
from idml.run import Run, write_text
from idml.state import TrainingState


class Noted(NamedTuple):
    """A step: its number from 1 on, its number within the epoch from 0 on, learning rate, loss terms and norms."""

    step: int
    step_of_epoch: int
    learning_rate: float
    figures: Mapping[str, Tensor]


class FiniteGuard:
    """Looks at every step's loss, sooner or later, and has the batch's indices stored where it is not finite.

    With ``--on-nonfinite stop`` losses are looked at when ``check`` is called, as reading one makes a GPU wait; with
    ``skip`` at once, and the step is left out: weights, averages and batch norm's figures stay as they were.

    Args:
        run, state, loader: of the training.
    """

    def __init__(self, run: Run, state: TrainingState, loader: Loader) -> None:
        self.run, self.state, self.loader = run, state, loader
        self.skips = run.config.on_nonfinite == "skip"
        self.skipped = self._in_a_row = 0
        self._noted: list[Noted] = []
        self._batch_norm: list[tuple[Tensor, Tensor]] = []

    def begin(self) -> None:
        """To be called before the forward pass of a step."""
        if self.skips:
            norms = [m for m in self.state.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            self._batch_norm = [(b, b.clone()) for norm in norms if norm.training for b in norm.buffers()]

    def update(self, loss: Tensor, figures: Mapping[str, Tensor]) -> bool:
        """Step optimizer, scaler and schedule, unless the step is to be left out; count it either way.

        Args:
            loss: 0-d, of this rank; the gradients are there, averaged over the ranks.
            figures: 0-d each: terms of the loss, norms.

        Returns:
            Whether the step was taken.

        Raises:
            TrainingError: too many steps in a row were left out.
        """
        state = self.state
        noted = Noted(state.step + 1, len(state.epoch_losses), state.learning_rate, {"loss": loss, **figures})
        refused = self.skips and self._refuses(loss)
        if not refused:
            state.scaler.step(state.optimizer)
            state.scaler.update()
        state.schedule.step()
        state.step += 1
        state.epoch_losses.append(loss)
        if not refused:
            self._in_a_row = 0
            self._noted.append(noted)
            return True
        for buffer, before in self._batch_norm:
            buffer.copy_(before)
        self.skipped += 1
        self._in_a_row += 1
        message = self._report(noted)
        if self._in_a_row >= self.run.config.max_nonfinite:
            raise TrainingError(f"{message}. {self._in_a_row} steps in a row were left out (--max-nonfinite)")
        if distributed.is_main():
            warnings.warn(f"{message}; left out, {self.skipped} so far", UserWarning, stacklevel=2)
        return False

    def _refuses(self, loss: Tensor) -> bool:
        """Whether loss or gradient is not finite on any rank; under fp16 the scaler looks after the gradient itself."""
        bad = not math.isfinite(loss.item())
        if not bad and not self.state.scaler.is_enabled():
            gradients = [
                p.grad for group in self.state.optimizer.param_groups for p in group["params"] if p.grad is not None
            ]
            bad = not math.isfinite(torch.nn.utils.get_total_norm(gradients).item())
        return distributed.highest(int(bad)) == 1

    def check(self) -> None:
        """TrainingError at the first step since the last check whose loss is not finite."""
        noted, self._noted = self._noted, []
        for step in noted:
            if not self.skips and not math.isfinite(step.figures["loss"].item()):
                raise TrainingError(
                    f"{self._report(step)}; the last finite checkpoint is {self.run.last_checkpoint}. Try a lower "
                    "--lr, or --precision bf16 in place of fp16, or --on-nonfinite skip"
                )

    def _report(self, noted: Noted) -> str:
        """Store what is known of a step; the same in a sentence."""
        figures = {name: value.item() for name, value in noted.figures.items()}
        indices = self.loader.batches(self.state.epoch)[noted.step_of_epoch].tolist()
        paths = self.loader.dataset.paths
        known = {
            "step": noted.step,
            "epoch": self.state.epoch + 1,
            "rank": distributed.rank(),
            "learning_rate": noted.learning_rate,
            "figures": {name: value if math.isfinite(value) else str(value) for name, value in figures.items()},
            "indices": indices,
            "files": None if paths is None else [str(paths[index]) for index in indices],
        }
        path = self.run.directory / f"nonfinite-step{noted.step}-rank{distributed.rank()}.json"
        where = f"its images are listed in {path}"
        try:
            write_text(path, json.dumps(known, indent=1) + "\n")
        except OSError as error:
            where = f"its images could not be listed in {path} ({error.strerror})"
        told = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        rate = f"learning rate {noted.learning_rate:.3g}"
        return f"non-finite loss or gradient at step {noted.step}, {rate}: {told}; {where}"
