"""When the state of a run is saved, and what happens when it cannot be."""

from __future__ import annotations

import dataclasses
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from idml import distributed
from idml.checkpoint_files import write_checkpoint
from idml.data.image_dataset import DataSplits
from idml.data.retrieval_data import RetrievalData
from idml.errors import StorageError, UserError
from idml.introspection.introspection import Introspection
from idml.resume import same_length
from idml.run import Run
from idml.signals import Interrupted, StopSignals
from idml.state import TrainingState

FAILURES = 3
"""So many checkpoints in a row that cannot be written end the run."""


class Saver:
    """Saves a run's state: at the end of epochs, every so often within them, and when a signal asks the run to stop.

    Args:
        run, state, data: what is saved, and where.
        signals: noted ones stop the run after a step.
    """

    def __init__(self, run: Run, state: TrainingState, data: DataSplits | RetrievalData, signals: StopSignals) -> None:
        self.run, self.state, self.data, self.signals = run, state, data, signals
        self.failures = 0
        self.introspection: Introspection | None = None
        self._saved_at, self._saved_step = time.monotonic(), state.step

    def start(self, stored: Mapping[str, Any] | None) -> None:
        """Bring the state to that of a checkpoint, or save the state that training starts from.

        Raises:
            UserError: the checkpoint does not fit, or the disk is too full.
        """
        self._check_space()
        if stored is None:
            self.run.begin(None)
            with self.signals.deferred():
                self.save()
            self.stop_if_asked()
            return
        path = self.run.config.resume
        try:
            self.state.load_state_dict(stored, same_schedule=same_length(stored, self.run.config))
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path} does not fit this run: {error}") from None
        self.run.begin(stored)
        self._saved_step = self.state.step
        if self.run.writes:
            print(resume_message(path, self.state), flush=True)

    def end_epoch(self, metrics: Mapping[str, Any], *, pick_by: str) -> None:
        """An epoch has been evaluated: count it, save, and only then make its figures visible."""
        self.state.epoch, self.state.epoch_losses = self.state.epoch + 1, []
        is_best = self.run.add_epoch(metrics, pick_by=pick_by)
        self.save(best=is_best)
        self.run.write_epoch()

    def end_introspection(self, metrics: Mapping[str, Any], introspection: Introspection) -> None:
        """The network has been introspected: what the last epoch's figures become, and a checkpoint with it."""
        self.introspection = introspection
        self.run.amend_epoch(metrics)
        self.save(last_chance=True)

    def stop_if_asked(self) -> None:
        """Raise ``Interrupted`` if this rank has got a signal; to be called where the state has just been saved."""
        if self.signals.received is not None:
            raise Interrupted(self.signals.received, self.signals.message)

    def after_step(self, check: Callable[[], None]) -> None:
        """Save if it is time; save and raise ``Interrupted`` if a rank has got a signal. To be called on every rank.

        Args:
            check: raises where the state is not worth saving; called before it is.
        """
        config, received = self.run.config, self.signals.received
        since = self.state.step - self._saved_step
        due = config.save_every_steps is not None and since >= config.save_every_steps
        if (
            config.save_every_minutes is not None
            and time.monotonic() - self._saved_at >= 60 * config.save_every_minutes
        ):
            due = True
        code = Interrupted(received).exit_code if received is not None else int(due)
        code = distributed.highest(code)
        if code == 0:
            return
        check()
        self.save(last_chance=code > 1)
        if code > 1:
            raise Interrupted.with_code(code, self.signals.message)

    def save(self, *, best: bool = False, last_chance: bool = False) -> None:
        """Write ``last.pt`` (and, before it, ``best.pt``). To be called on every rank.

        A failure is warned of, and what was there before stays.

        Raises:
            StorageError: it failed three times in a row, or there is no other chance.
        """
        content = self._content()
        self.signals.message = (
            f"stopped after step {self.state.step}; the state is in {self.run.last_checkpoint}. Go on with --resume "
            f"{self.run.directory}"
        )
        self._saved_at, self._saved_step = time.monotonic(), self.state.step
        if not self.run.writes:
            return
        folder = self.run.directory / "checkpoints"
        try:
            if best:
                write_checkpoint(folder / "best.pt", content)
            write_checkpoint(folder / "last.pt", content, keep=self.run.config.keep_checkpoints)
        except OSError as error:
            self.failures += 1
            reason = f"could not write a checkpoint to {folder} ({error.strerror or error})"
            if self.failures >= FAILURES or last_chance:
                raise StorageError(
                    f"{reason}, {self.failures} time(s) in a row; the earlier one is still there"
                ) from None
            warnings.warn(f"{reason}; the earlier one is still there, trying again later", UserWarning, stacklevel=2)
        else:
            self.failures = 0

    def _content(self) -> dict[str, Any]:
        about = {
            "config": dataclasses.asdict(self.run.config) | {"resume": None},
            "classes": list(self.data.train.classes),
            "train_images": len(self.data.train),
            "preprocessing": dataclasses.asdict(self.data.preprocessing),
            "history": self.run.history,
            "seconds": self.run.seconds(),
        }
        if self.introspection is not None:
            about["introspection"] = stored_introspection(self.introspection)
        return self.state.state_dict() | about

    def _check_space(self) -> None:
        """UserError where the disk has no room for the checkpoints that the run keeps and the one being written."""
        if not self.run.writes:
            return
        count = self.run.config.keep_checkpoints + 2
        needed = count * estimated_bytes(self.state)
        free = shutil.disk_usage(self.run.directory).free
        if free < needed:
            raise UserError(
                f"{self.run.directory}: {count} checkpoints (--keep-checkpoints {self.run.config.keep_checkpoints}, "
                f"the best, and the one being written) need about {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
                "make room, or give another --output-dir"
            )


def stored_introspection(introspection: Introspection) -> dict[str, Any]:
    """What a checkpoint has of an introspection: ``spec``, plain values, and ``state``, tensors."""
    return {"spec": introspection.spec.as_json(), "state": introspection.state_dict()}


def estimated_bytes(state: TrainingState) -> int:
    """Bytes of a checkpoint: every tensor of model, average and loss, and what the optimizer keeps of each."""

    def size(module: nn.Module | None) -> int:
        return 0 if module is None else sum(t.numel() * t.element_size() for t in module.state_dict().values())

    def kept(optimizer: Optimizer) -> int:
        copies = 2 if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop)) else 1
        return copies * sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])

    average = None if state.ema is None else state.ema.module
    return size(state.model) + size(average) + size(state.loss) + kept(state.optimizer)


def resume_message(path: str, state: TrainingState) -> str:
    """What is said when a run goes on."""
    where = f"{len(state.epoch_losses)} steps into epoch {state.epoch + 1}" if state.epoch_losses else "between epochs"
    return f"going on from {path}: step {state.step}, {where}"
