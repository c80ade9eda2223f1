"""Train a classifier that knows what it does not know: baseline, Mixup and CutMix, each with and without ISM.

    python train_cls.py --method idml-cutmix                     six thousand real images inside the package
    python train_cls.py --method ism --dataset folder --data-dir photos --model resnet50
    python train_cls.py --config configs/quick/fashion_mnist_mini.yaml --seed 2

Any key of a config file is also a flag, and a flag wins. Results go to a new folder under runs/.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm import tqdm

from augment import (
    MixedBatch,
    apply_crop,
    apply_cutmix,
    apply_flip,
    apply_mixup,
    mixed_cross_entropy,
    normalise,
    sample_crop,
    sample_cutmix,
    sample_flip,
    sample_mixup,
)
from idml.config import dump_config
from idml.config_cls import ClsConfig, parse_cls_config
from idml.data.datasets import read_splits
from idml.data.image_dataset import DataSplits, Preprocessing
from idml.data.torch_loader import TorchLoader
from idml.errors import TrainingError, run_main
from idml.evaluation import evaluate, probe_uncertainty
from idml.metrics.classification import classification_metrics
from idml.models import IntrospectiveClassifier, create_backbone
from idml.optim import build_optimizer, build_schedule
from idml.report_cls import draw_extremes, draw_mixed, epoch_line, log_histograms
from idml.run import Run, default_run_directory, hardware
from idml.runtime import autocast, choose_device, seed_everything
from idml.state import TrainingState

EVAL_BATCH_SIZE = 256  # nothing depends on it but memory
PROBE_IMAGES = 1024  # training images whose uncertainty is measured clean and mixed after every epoch


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Train as the command line says; returns what ``results.json`` holds (None for ``--print-config``)."""
    warnings.showwarning = lambda message, *_args, **_kwargs: print(f"warning: {message}", file=sys.stderr)
    config, print_config = parse_cls_config(sys.argv[1:] if argv is None else argv, description=__doc__)
    if print_config:
        print(dump_config(config), end="")
        return None

    # Whatever a user's mistake can break comes before the run directory is made.
    device = choose_device(config.device)
    seed_everything(config.seed, deterministic=config.deterministic, threads=config.threads)
    data = read_splits(config)
    model = IntrospectiveClassifier(
        create_backbone(config.model, image_size=data.preprocessing.image_size),
        len(data.train.classes),
        uncertainty_dim=config.uncertainty_dim,
        ism=config.ism,
        temperature=config.temperature,
    ).to(device)
    name = f"{config.dataset}-{config.method}-s{config.seed}"
    run = Run(Path(config.output_dir) if config.output_dir else default_run_directory(name), config)
    print(
        f"{config.method} (ism {config.ism}, mix {config.mix}), {config.model}, {config.dataset}: {len(data.train)} "
        f"training and {len(data.test)} test images of {len(data.train.classes)} classes; {hardware()}\n"
        f"run directory {run.directory}"
    )
    return train(config, data, model, run)


def train(config: ClsConfig, data: DataSplits, model: IntrospectiveClassifier, run: Run) -> dict[str, Any]:
    """All epochs, an evaluation and a checkpoint after each; returns what ``results.json`` holds."""
    device = next(model.parameters()).device
    size = data.preprocessing.image_size
    shared: dict[str, Any] = {"image_size": size, "workers": config.workers, "pin_memory": device.type == "cuda"}
    train_loader = TorchLoader(data.train, batch_size=config.batch_size, train=True, seed=config.seed, **shared)
    test_loader = TorchLoader(data.test, batch_size=EVAL_BATCH_SIZE, train=False, **shared)
    val_loader = TorchLoader(data.val, batch_size=EVAL_BATCH_SIZE, train=False, **shared) if data.val else None
    probe = data.train.subset(np.linspace(0, len(data.train) - 1, min(PROBE_IMAGES, len(data.train)), dtype=int))
    probe_loader = TorchLoader(probe, batch_size=EVAL_BATCH_SIZE, train=False, **shared)

    total_steps = min(config.epochs * len(train_loader), config.max_steps or math.inf)
    optimizer = build_optimizer(model, config)
    state = TrainingState(
        model=model,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config, steps_per_epoch=len(train_loader), total_steps=int(total_steps)),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        generator=torch.Generator().manual_seed(config.seed),
        ema=ModelEmaV3(model, decay=config.ema_decay, use_warmup=True) if config.ema_decay > 0 else None,
    )
    ism_on, classes, measured = config.ism != "off", data.train.classes, (data.preprocessing, config.precision)
    pick_by = "val_top1" if val_loader else "top1"
    run.save_checkpoint("last", state, data)
    while state.step < total_steps:
        started = time.perf_counter()
        first_step = state.step
        train_loss = train_epoch(state, train_loader, config, data, run, int(total_steps))
        seconds = time.perf_counter() - started
        images_seen = sum(map(len, train_loader.batches(state.epoch)[: state.step - first_step]))
        state.epoch += 1

        metrics = {"epoch": state.epoch, "step": state.step, "lr": state.learning_rate, "train_loss": train_loss}
        test = evaluate(state.evaluated_model, test_loader, *measured)
        metrics |= classification_metrics(test.predictions, len(classes))
        if val_loader:
            val = evaluate(state.evaluated_model, val_loader, *measured)
            metrics |= {f"val_{k}": v for k, v in classification_metrics(val.predictions, len(classes)).items()}
        if ism_on:
            metrics["uncertainty_test"] = test.predictions.uncertainty.mean().item()
            metrics |= probe_uncertainty(state.evaluated_model, probe_loader, *measured, mix=config.mix)
            metrics["active_uncertainty_units"] = test.active_units
        metrics |= {"images_per_second": round(images_seen / seconds, 1), "seconds": round(seconds, 2)}
        check_finite("test loss", [metrics["loss"] + metrics["nll"]], [metrics["lr"]], state.step - 1, run)

        is_best = run.log_epoch(metrics, pick_by=pick_by)
        log_histograms(run, test.predictions, state.epoch, ism_on=ism_on)
        run.save_checkpoint("last", state, data)
        if is_best:
            run.save_checkpoint("best", state, data)
        print(epoch_line(metrics))

    draw_extremes(run, test.predictions, test_loader, classes, state.epoch, ism_on=ism_on)
    return run.finish(picked_on="validation split" if val_loader else "test set")


def train_epoch(
    state: TrainingState, loader: TorchLoader, config: ClsConfig, data: DataSplits, run: Run, total_steps: int
) -> float:
    """One pass over the training images, ending early at ``total_steps``; returns the mean loss of its steps."""
    state.model.train()
    device = next(state.model.parameters()).device
    losses: list[Tensor] = []
    rates: list[float] = []
    checked, first_step = 0, state.step
    quiet = None if config.verbose else True  # None: tqdm is quiet unless it writes to a terminal
    progress = tqdm(loader.epoch(state.epoch), f"epoch {state.epoch + 1}", len(loader), leave=False, disable=quiet)
    for images, labels in progress:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        batch = augment_and_mix(images, labels, config, data.preprocessing, state.generator)
        with autocast(device, config.precision):
            output = state.model(batch.images)
        loss = mixed_cross_entropy(output.introspective_logits, batch, label_smoothing=config.label_smoothing)
        rates.append(state.learning_rate)
        losses.append(loss.detach())
        state.optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.schedule.step()
        state.step += 1
        if state.ema is not None:
            state.ema.update(state.model, step=state.step)

        if batch.labels_b is not batch.labels_a and not run.has_picture("mixed"):
            draw_mixed(run, batch, data, state.step)
        # Reading the loss makes a GPU wait, so it is done now and then.
        if device.type == "cpu" or state.step % config.log_every == 0:
            check_finite("loss", losses[checked:], rates[checked:], first_step + checked, run)
            checked = len(losses)
            progress.set_postfix(loss=f"{losses[-1].item():.3f}")
        if state.step % config.log_every == 0:
            run.tensorboard.add_scalar("step/loss", losses[-1].item(), state.step)
            run.tensorboard.add_scalar("step/lr", rates[-1], state.step)
        if state.step == total_steps:
            break
    check_finite("loss", losses[checked:], rates[checked:], first_step + checked, run)
    return torch.stack(losses).mean().item()


def augment_and_mix(
    images: Tensor, labels: Tensor, config: ClsConfig, preprocessing: Preprocessing, generator: torch.Generator
) -> MixedBatch:
    """A training batch from the loader's bytes: crop, flip, normalise, mix; all on the images' device.

    Args:
        images: (B, 3, S, S) uint8.
        labels: (B,) int64 on the same device.
        generator: CPU generator of every draw.
    """
    count, (height, width) = len(images), images.shape[2:]
    if config.crop_padding:
        offsets = sample_crop(count, padding=config.crop_padding, generator=generator)
        images = apply_crop(images, offsets, padding=config.crop_padding)
    if config.flip:
        images = apply_flip(images, sample_flip(count, generator=generator))
    images = normalise(images, preprocessing.mean, preprocessing.std)
    draw = {"alpha": config.mix_alpha, "prob": config.mix_prob, "generator": generator}
    if config.mix == "cutmix":
        return apply_cutmix(images, labels, sample_cutmix(count, (height, width), **draw))
    return apply_mixup(images, labels, sample_mixup(count, **draw) if config.mix == "mixup" else None)


def check_finite(what: str, values: Sequence[Tensor | float], rates: list[float], first_step: int, run: Run) -> None:
    """TrainingError at the first value that is infinite or not a number, with its step and learning rate."""
    for offset, value in enumerate(values):
        if not math.isfinite(float(value)):
            raise TrainingError(
                f"non-finite {what} ({float(value)}) at step {first_step + offset + 1}, learning rate "
                f"{rates[offset]:.3g}; the last finite checkpoint is {run.last_checkpoint}. Try a lower --lr, or "
                "--precision bf16 in place of fp16"
            )


if __name__ == "__main__":
    run_main(main)
