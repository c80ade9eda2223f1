"""The run directory: config, metrics, results, checkpoints, TensorBoard. Every file is written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from idml import distributed
from idml.config import dump_config
from idml.distributed import is_main, world_size
from idml.environment import git_commit, hardware, versions
from idml.errors import StorageError, TrainingError, UserError
from idml.pictures import as_tensor, save_png
from idml.run_directory import DirectoryLock

QUEUED_EVENTS = 1000
"""Events that wait for TensorBoard's thread; with a full queue and a thread that has failed, a writer would hang."""


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, flush it to disk, and rename it into place."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Run:
    """A run directory being written.

    Holds ``config.yaml``, ``metrics.jsonl`` (a line an epoch), ``results.json`` (only once the run is complete),
    ``checkpoints/``, ``tensorboard/`` and ``pictures/``.

    Under torchrun rank 0 alone writes; on the other ranks every method does nothing.

    Args:
        directory: made if it is not there.
        config: the resolved config, a dataclass.
        stored: the checkpoint that the run is to go on from.

    Raises:
        UserError: without ``stored``, the directory already holds a run; another process writes to it; it cannot be
            written. On every rank: to be called on each.
    """

    def __init__(self, directory: Path, config: Any, *, stored: Mapping[str, Any] | None = None) -> None:
        self.directory, self.config = directory, config
        self.started = time.time()
        self.history: list[dict[str, Any]] = list(stored["history"]) if stored else []
        self._seconds_before = stored["seconds"] if stored else 0.0
        self._warned: set[str] = set()
        self._log: SummaryWriter | None = None
        self._lock: DirectoryLock | None = None
        distributed.from_main(lambda: self._claim(stored is not None))

    def _claim(self, resumed: bool) -> None:
        """Make the directory, keep others from it and write the config; UserError where that cannot be."""
        directory, config = self.directory, self.config
        if config.wandb:
            require_wandb()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = DirectoryLock(directory)
            if not resumed and ((directory / "metrics.jsonl").exists() or (directory / "results.json").exists()):
                self._lock.release()
                raise UserError(
                    f"{directory} already holds a run; give another --output-dir, or remove it, or go on: --resume auto"
                )
            for name in ("checkpoints", "tensorboard", "pictures"):
                (directory / name).mkdir(exist_ok=True)
            write_text(directory / "config.yaml", dump_config(dataclasses.replace(config, resume=None)))
        except OSError as error:
            raise UserError(f"cannot write to the run directory {directory}: {error.strerror}") from None
        if config.wandb:
            start_wandb(directory, dataclasses.asdict(config))

    def begin(self, stored: Mapping[str, Any] | None) -> None:
        """Open TensorBoard; to be called once it is certain that the run can start, or go on.

        Args:
            stored: the checkpoint that the run goes on from; its files are now brought to where that is.

        Raises:
            UserError: the files cannot be written.
        """
        if not is_main():
            return
        if stored is not None:
            try:
                self._repair()
            except OSError as error:
                raise UserError(f"cannot write to the run directory {self.directory}: {error.strerror}") from None
        purge_from = None if stored is None else stored["step"] + 1
        folder = self.directory / "tensorboard"
        # TensorBoard reads files in the order of their names, which begin with the second and go on with what has none.
        while any(folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.05)
        self._log = SummaryWriter(str(folder), purge_step=purge_from, max_queue=QUEUED_EVENTS)

    def _repair(self) -> None:
        """Bring the files of a run that was cut off to where its checkpoint is: nothing torn, nothing twice."""
        (self.directory / "results.json").unlink(missing_ok=True)
        lines = "".join(json.dumps(metrics) + "\n" for metrics in self.history)
        path = self.directory / "metrics.jsonl"
        if self.history and (not path.exists() or path.read_bytes() != lines.encode()):
            write_text(path, lines)
        elif not self.history:
            path.unlink(missing_ok=True)
        for left in self.directory.rglob("*.tmp"):
            left.unlink()

    def seconds(self) -> float:
        """Wall time of the run so far, that before an interruption included."""
        return self._seconds_before + time.time() - self.started

    def _failed(self, what: str, error: Exception) -> None:
        """Warn, once for each file, of something beside checkpoints that could not be written."""
        if what not in self._warned:
            self._warned.add(what)
            reason = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[-1]
            warnings.warn(f"could not write {what} in {self.directory} ({reason}); training goes on", stacklevel=3)

    @contextlib.contextmanager
    def _logging(self) -> Iterator[SummaryWriter]:
        """TensorBoard, whose failures do not end a training."""
        assert self._log is not None
        try:
            yield self._log
        except (OSError, ValueError) as error:  # ValueError: its file was closed after an earlier failure
            self._failed("TensorBoard files", error)

    def log_scalar(self, name: str, value: float, step: int) -> None:
        """One number for TensorBoard."""
        if self._log is not None:
            with self._logging() as log:
                log.add_scalar(name, value, step)

    def log_histogram(self, name: str, values: Tensor, step: int) -> None:
        """A histogram for TensorBoard."""
        if self._log is not None:
            with self._logging() as log:
                log.add_histogram(name, values, step)

    def log_picture(self, name: str, title: str, picture: Image.Image, step: int) -> None:
        """``pictures/<name>.png``, and the same in TensorBoard under ``title``."""
        if self._log is not None:
            try:
                save_png(picture, self.directory / "pictures" / f"{name}.png")
            except OSError as error:
                self._failed("pictures", error)
            with self._logging() as log:
                log.add_image(title, as_tensor(picture), step)

    def add_epoch(self, metrics: Mapping[str, Any], *, pick_by: str) -> bool:
        """Add an epoch to the history, which the next checkpoint holds; ``write_epoch`` then makes it visible.

        Args:
            metrics: has ``epoch`` and, where it was evaluated, the metric that ``pick_by`` names (larger is better).
            pick_by: decides which evaluated epoch is the best.

        Returns:
            Whether this is the best epoch so far.
        """
        self.history.append(
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        )
        return self.best(pick_by) is self.history[-1]

    def best(self, pick_by: str) -> dict[str, Any] | None:
        """The evaluated epoch with the largest ``pick_by``, the first of several; None before any."""
        measured = [metrics for metrics in self.history if metrics.get(pick_by) is not None]
        return max(measured, key=lambda metrics: metrics[pick_by], default=None)

    def write_epoch(self) -> None:
        """Append the last epoch to ``metrics.jsonl`` and TensorBoard."""
        if self._log is None:
            return
        metrics = self.history[-1]
        try:
            with (self.directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._failed("metrics.jsonl", error)
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and name != "epoch":
                self.log_scalar(name, value, metrics["epoch"])

    def amend_epoch(self, metrics: Mapping[str, Any]) -> None:
        """Further figures of the last epoch, or others in their place, in ``metrics.jsonl`` and TensorBoard."""
        before = self.history[-1]
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        self.history[-1] = before | known
        if self._log is None:
            return
        try:
            write_text(self.directory / "metrics.jsonl", "".join(json.dumps(each) + "\n" for each in self.history))
        except OSError as error:
            self._failed("metrics.jsonl", error)
        for name, value in known.items():
            if isinstance(value, (int, float)) and value != before.get(name):
                self.log_scalar(name, value, before["epoch"])

    def log_projector(self, embeddings: Tensor, names: Sequence[str], images: Tensor, step: int) -> None:
        """Embeddings for TensorBoard's projector, each with its name and its image.

        Args:
            embeddings: (N, D).
            names: N texts.
            images: (N, 3, S, S) in [0, 1]; N S^2 of at most 8192^2 pixels, the largest sprite the projector takes.
            step: that they belong to.
        """
        if self._log is not None:
            with self._logging() as log:
                log.add_embedding(embeddings, list(names), images, step, tag="test")

    @property
    def last_checkpoint(self) -> Path:
        """Where the newest checkpoint is."""
        return self.directory / "checkpoints" / "last.pt"

    @property
    def writes(self) -> bool:
        """Whether this rank is the one that writes."""
        return is_main()

    def has_picture(self, name: str) -> bool:
        """Whether ``pictures/<name>.png`` has been drawn, or is not this rank's to draw."""
        return self._log is None or (self.directory / "pictures" / f"{name}.png").exists()

    def check_finite(self, what: str, value: float, step: int) -> None:
        """TrainingError if a figure of the evaluation after ``step`` is infinite or not a number."""
        if not math.isfinite(value):
            raise TrainingError(
                f"non-finite {what} ({value}) after step {step}; the last finite checkpoint is {self.last_checkpoint}. "
                "Try a lower --lr, or --precision bf16 in place of fp16"
            )

    def finish(self, *, pick_by: str, picked_on: str, **about: Any) -> dict[str, Any]:
        """Write ``results.json``, with ``about`` among its values, and close TensorBoard; returns what was written."""
        best = self.best(pick_by)
        assert best is not None
        results = {
            "final": self.history[-1],
            "best": best | {"picked_on": picked_on},
            "config": f"{self.directory / 'config.yaml'}",
            "method": self.config.method,
            "dataset": self.config.dataset,
            "model": self.config.model,
            "seed": self.config.seed,
            **about,
            "versions": versions(),
            "git_commit": git_commit(),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "hardware": hardware(),
            "processes": world_size(),
            "wall_seconds": round(self.seconds(), 3),
        }
        if self._log is not None:
            try:
                write_text(self.directory / "results.json", json.dumps(results, indent=2) + "\n")
            except OSError as error:
                raise StorageError(f"could not write {self.directory / 'results.json'} ({error.strerror})") from None
            with self._logging() as log:
                log.close()
            if self.config.wandb:
                require_wandb().finish()
        if self._lock is not None:
            self._lock.release()
        return results


def require_wandb() -> ModuleType:
    """The package wandb; UserError when it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise UserError("--wandb needs the package wandb: pip install 'idml[wandb]', or pip install wandb") from None


def start_wandb(directory: Path, config: dict[str, Any]) -> None:
    """Have Weights & Biases mirror what goes to TensorBoard from now on."""
    require_wandb().init(project="idml", name=directory.name, dir=str(directory), config=config, sync_tensorboard=True)
