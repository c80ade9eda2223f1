"""The loop over an epoch's batches that both scripts share: progress, log, checks, saving, stopping."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor
from tqdm import tqdm

from idml import distributed
from idml.data.torch_loader import Loader
from idml.nonfinite import FiniteGuard
from idml.saving import Saver


def run_epoch(
    saver: Saver, loader: Loader, total_steps: int, take_step: Callable[[FiniteGuard, Tensor, Tensor, int], None]
) -> dict[str, float]:
    """What is left of a pass over the training images, ending early at ``total_steps``.

    Args:
        saver: of the run and its state; it stops the run after a step where a signal has asked for that.
        loader: of the training images.
        total_steps: of the whole run.
        take_step: is given the guard, images (b, 3, S, S) and labels (b,) of this rank's share, on the device, and how
            many images the batch has over all ranks; it adds one step to the state.

    Returns:
        ``images_per_second`` over all ranks, and ``seconds``, of the steps taken here.
    """
    run, state, config = saver.run, saver.state, saver.run.config
    guard, done = FiniteGuard(run, state, loader), len(state.epoch_losses)
    # An epoch that --max-steps ended may have been stopped before its evaluation: nothing is left of it then.
    sizes = loader.global_sizes()[done:] if state.step < total_steps else []
    quiet = None if config.verbose and distributed.is_main() else True  # None: quiet unless it writes to a terminal
    batches = loader.epoch(state.epoch, start=done) if sizes else ()
    progress = tqdm(batches, f"epoch {state.epoch + 1}", len(loader), leave=False, disable=quiet, initial=done)
    started = time.perf_counter()
    for (images, labels), global_size in zip(progress, sizes, strict=True):
        rate = state.learning_rate
        images, labels = images.to(state.device, non_blocking=True), labels.to(state.device, non_blocking=True)
        take_step(guard, images, labels, global_size)
        # Reading the loss makes a GPU wait, so it is done now and then.
        if state.device.type == "cpu" or state.step % config.log_every == 0:
            guard.check()
        if state.step % config.log_every == 0:
            loss = state.last_loss()
            run.log_scalar("step/loss", loss, state.step)
            run.log_scalar("step/lr", rate, state.step)
            progress.set_postfix(loss=f"{loss:.3f}")
        saver.after_step(guard.check)
        if state.step == total_steps:
            break
    guard.check()
    seconds = time.perf_counter() - started
    images_seen = sum(sizes[: len(state.epoch_losses) - done])
    return {"images_per_second": round(images_seen / max(seconds, 1e-9), 1), "seconds": round(seconds, 2)}
