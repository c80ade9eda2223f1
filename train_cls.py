"""Train a classifier that knows what it does not know: baseline, Mixup and CutMix, each with and without ISM.

    python train_cls.py --method idml-cutmix                     six thousand real images inside the package
    python train_cls.py --method ism --dataset folder --data-dir photos --model resnet50
    python train_cls.py --config configs/cifar100/idml_cutmix.yaml --data-dir data
    torchrun --nproc-per-node 8 train_cls.py --config configs/imagenet/idml_cutmix.yaml --data-dir imagenet
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train_cls.py --config ...
    python train_cls.py --eval-only --checkpoint runs/NAME/checkpoints/last.pt

Any key of a config file is also a flag, and a flag wins. Results go to a new folder under runs/.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once; see idml.runtime.keep_freed_memory

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from augment import (
    MixedBatch,
    apply_color_jitter,
    apply_crop,
    apply_cutmix,
    apply_flip,
    apply_lighting,
    apply_mixup,
    mixed_cross_entropy,
    normalise,
    resize,
    sample_color_jitter,
    sample_crop,
    sample_cutmix,
    sample_flip,
    sample_lighting,
    sample_mixup,
)
from idml import distributed
from idml.backbones import create_backbone
from idml.checkpoint import load_weights, read_checkpoint
from idml.checkpoint_files import read_verified
from idml.config import dump_config
from idml.config_cls import ClsConfig, parse_cls_config, parse_model_kwargs
from idml.data.cls_loaders import ClsLoaders, build_cls_loaders
from idml.data.datasets import read_splits
from idml.data.image_dataset import DataSplits, Preprocessing
from idml.data.sampling import global_batch_sizes
from idml.data.torch_loader import Loader
from idml.environment import hardware
from idml.epoch_loop import run_epoch
from idml.errors import UserError, run_main
from idml.evaluation import Evaluation, evaluate, probe_uncertainty
from idml.introspecting import introspect_trained, with_stored_introspection
from idml.metrics.classification import classification_metrics, uncertainty_metrics
from idml.models import IntrospectiveClassifier
from idml.nonfinite import FiniteGuard
from idml.optim import build_optimizer, build_schedule
from idml.parts import fewer_parts, part_count
from idml.report_cls import (
    draw_extremes,
    draw_mixed,
    epoch_line,
    introspection_line,
    log_uncertainty,
    write_confusion,
)
from idml.resume import check_same_run, planned_steps
from idml.run import Run
from idml.run_directory import run_directory, stored_if_possible
from idml.runtime import (
    autocast,
    choose_device,
    freeze_batch_norm,
    keep_freed_memory,
    place_model,
    seed_everything,
)
from idml.saving import Saver
from idml.signals import StopSignals
from idml.state import TrainingState
from idml.trial import try_out


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Train or evaluate as the command line says; returns the figures (None for ``--print-config``)."""
    warnings.showwarning = lambda message, *_args, **_kwargs: print(f"warning: {message}", file=sys.stderr)
    distributed.check_environment()
    config, print_config = parse_cls_config(sys.argv[1:] if argv is None else argv, description=__doc__)
    if print_config:
        print(dump_config(config), end="")
        return None

    with StopSignals() as signals:
        return run_config(config, signals)


def run_config(config: ClsConfig, signals: StopSignals, data: DataSplits | None = None) -> dict[str, Any]:
    """Train or evaluate; whatever a user's mistake can break comes before the run directory is made.

    Args:
        config: of the run.
        signals: that may stop it.
        data: images to train and test on, in place of those that the config names.
    """
    device = choose_device(config.device)
    keep_freed_memory(device)
    distributed.setup(device.type)
    seed_everything(config.seed, deterministic=config.deterministic, threads=config.threads)
    data = read_splits(config) if data is None else data
    model = build_model(config, data)
    model = place_model(model, device, channels_last=config.channels_last, sync_bn=config.sync_bn, tf32=config.tf32)
    size = data.preprocessing.image_size
    steps = global_batch_sizes(len(data.train), config.batch_size, distributed.world_size())
    try_out(model, config, size, [progressive_size(config, epoch) or size for epoch in range(config.epochs)], steps)
    loaders = build_cls_loaders(data, config, pin_memory=device.type == "cuda")
    if config.eval_only:
        results = evaluate_checkpoint(config, data, model, loaders)
    else:
        stored = read_verified(Path(config.resume)) if config.resume else None
        if stored is not None:
            check_same_run(stored, config, data.train, len(loaders.train))
        name = f"{config.dataset}-{config.method}-s{config.seed}"
        run = Run(run_directory(config.output_dir, name), config, stored=stored)
        say(
            f"{config.method} (ism {config.ism}, mix {config.mix}), {config.model}, {config.dataset}: "
            f"{len(data.train)} training and {len(data.test)} test images of {len(data.train.classes)} classes; "
            f"{distributed.world_size()} process(es), {hardware()}\nrun directory {run.directory}"
        )
        if fewer := fewer_parts(model, config, steps):
            say(fewer)
        results = train(config, data, model, loaders, run, stored, signals)
    distributed.shutdown()
    return results


def build_model(config: ClsConfig, data: DataSplits) -> IntrospectiveClassifier:
    """The network of a config, with the weights that it starts from."""
    backbone = create_backbone(
        config.model,
        image_size=data.preprocessing.image_size,
        pretrained=config.pretrained == "timm" and config.resume is None,
        arguments=parse_model_kwargs(config),
    )
    if config.pretrained not in (None, "timm") and config.resume is None:
        allowed = config.pretrained_allow_missing or ()
        load_weights(backbone, config.pretrained, key=config.pretrained_key, allow_missing=allowed)
    return IntrospectiveClassifier(
        backbone,
        len(data.train.classes),
        uncertainty_dim=config.uncertainty_dim,
        ism=config.ism,
        temperature=config.temperature,
    )


def train(
    config: ClsConfig,
    data: DataSplits,
    model: nn.Module,
    loaders: ClsLoaders,
    run: Run,
    stored: Mapping[str, Any] | None,
    signals: StopSignals,
) -> dict[str, Any]:
    """All epochs, an evaluation and a checkpoint after each; returns what ``results.json`` holds.

    Args:
        config, data, model, loaders, run: of the training.
        stored: the checkpoint that it goes on from, or None.
        signals: that may stop it.
    """
    device = next(model.parameters()).device
    steps_per_epoch = len(loaders.train)
    total_steps = planned_steps(config, steps_per_epoch)
    if config.bn_freeze:
        freeze_batch_norm(model)
    optimizer = build_optimizer(model, config)
    state = TrainingState(
        model=model,
        network=wrap(model, config, device),
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config, steps_per_epoch=steps_per_epoch, total_steps=total_steps),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        generator=torch.Generator().manual_seed(config.seed + 1_000_003 * distributed.rank()),
        seed=config.seed,
        own_share=True,
        ema=ModelEmaV3(model, decay=config.ema_decay, use_warmup=True) if config.ema_decay > 0 else None,
    )
    saver = Saver(run, state, data, signals)
    saver.start(stored)
    pick_by = "val_top1" if loaders.val else "top1"
    test: Evaluation | None = None
    about: dict[str, Any] | None = None
    while state.step < total_steps or state.epoch_losses:
        with signals.deferred():
            speed = train_epoch(config, data, loaders.train, saver, total_steps)
            saver.save()
        saver.stop_if_asked()
        distributed.copy_from_main(state.evaluated_model.buffers())  # batch norm's running figures differ by rank
        metrics = {"epoch": state.epoch + 1, "step": state.step, "lr": state.learning_rate}
        metrics |= {"train_loss": state.mean_epoch_loss(), **speed}
        if evaluated := state.step >= total_steps or (state.epoch + 1) % config.eval_every == 0:
            figures, test = evaluate_model(config, data, loaders, state.evaluated_model)
            run.check_finite("test loss", figures["loss"] + figures["nll"], state.step)
            metrics |= figures
        with signals.deferred():
            saver.end_epoch(metrics, pick_by=pick_by)
            if evaluated and test is not None:
                log_uncertainty(run, test, config.ism, state.epoch)
        say(epoch_line(metrics))
        saver.stop_if_asked()

    if config.introspect:
        model, about = introspect_trained(state.evaluated_model, "classification", data, config)
        metrics, test = evaluate_model(config, data, loaders, model)
        saver.end_introspection(metrics, model.introspection)
        say(introspection_line(metrics, model.introspection.spec))
        log_uncertainty(run, test, config.ism, state.epoch)
    elif test is None:  # the run had been stopped between its last epoch and its end
        _, test = evaluate_model(config, data, loaders, state.evaluated_model)
    draw_extremes(run, test.predictions, loaders.test, data.train.classes, state.epoch)
    picked_on = "validation split" if loaders.val else "test set"
    results = run.finish(pick_by=pick_by, picked_on=picked_on, introspection=about)
    if config.expname is not None:  # the closing lines of the CutMix authors' script, which programs read
        for word, figures in (("Best", results["best"]), ("Last", results["final"])):
            errors = [100 * (1 - figures[key]) for key in ("top1", "top5") if key in figures]
            say(f"{word} accuracy (top-1 and 5 error): {' '.join(map(str, errors))}")
    return results


def evaluate_model(
    config: ClsConfig, data: DataSplits, loaders: ClsLoaders, model: nn.Module
) -> tuple[dict[str, Any], Evaluation]:
    """The figures of the model as it is now, and those of every test image."""
    classes, flip = data.train.classes, config.tta == "flip"
    measured = (data.preprocessing, config.precision)
    metrics: dict[str, Any] = {}
    if loaders.val:
        val = evaluate(model, loaders.val, *measured, flip=flip)
        metrics |= {f"val_{k}": v for k, v in classification_metrics(val.predictions, len(classes)).items()}
    test = evaluate(model, loaders.test, *measured, flip=flip)
    metrics |= classification_metrics(test.predictions, len(classes))
    metrics |= uncertainty_metrics(test.predictions, ism_on=config.ism != "off")
    if config.ism != "off":
        clean, mixed = probe_uncertainty(model, loaders.probe, *measured, mix=config.mix)
        test = test._replace(mixed_scores=mixed)
        metrics["uncertainty_train_clean"] = clean.mean().item()
        metrics["uncertainty_train_mixed"] = mixed.mean().item()
        metrics["active_uncertainty_units"] = test.active_units
    return metrics, test


def wrap(model: nn.Module, config: ClsConfig, device: torch.device) -> nn.Module:
    """What is called in training: the model compiled and distributed, as far as asked for."""
    network: nn.Module = torch.compile(model) if config.compile else model  # type: ignore[assignment]
    if distributed.world_size() > 1:
        network = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)
    return network


def train_epoch(
    config: ClsConfig, data: DataSplits, loader: Loader, saver: Saver, total_steps: int
) -> dict[str, float]:
    """What is left of a pass over the training images, ending early at ``total_steps``; returns its speed."""
    state, size = saver.state, progressive_size(config, saver.state.epoch)
    state.network.train()
    if config.bn_freeze:
        freeze_batch_norm(state.model)

    def take_step(guard: FiniteGuard, images: Tensor, labels: Tensor, global_size: int) -> None:
        images = images if size is None else resize(images, size)
        images = crop_and_flip(images, config, state.generator)
        batch = colour_and_mix(images, labels, config, data.preprocessing, state.generator)
        step(state, guard, batch, config, global_size)
        if batch.labels_b is not batch.labels_a and not saver.run.has_picture("mixed"):
            draw_mixed(saver.run, batch, data, state.step)

    return run_epoch(saver, loader, total_steps, take_step)


def step(
    state: TrainingState,
    guard: FiniteGuard,
    batch: MixedBatch,
    config: ClsConfig,
    global_size: int,
) -> None:
    """One optimizer step on this rank's share of a batch of ``global_size`` images.

    Every image weighs the same in the gradient, however unevenly a last batch falls to ranks and parts: a part's mean
    loss is weighted by its share of the global batch, and by the number of ranks, over which DDP averages. The state
    notes this rank's share of the batch's mean loss; the sum over the ranks is the mean itself.
    """
    guard.begin()
    state.optimizer.zero_grad(set_to_none=True)
    parts = split(batch, part_count(state.model, config, global_size))
    total, exponent = torch.zeros((), device=state.device), torch.zeros((), device=state.device)
    for number, part in enumerate(parts):
        distributed_network = isinstance(state.network, DistributedDataParallel)
        wait = distributed_network and number < len(parts) - 1
        with state.network.no_sync() if wait else contextlib.nullcontext():
            with autocast(state.device, config.precision):
                output = state.network(part.images)
            loss = mixed_cross_entropy(output.introspective_logits, part, label_smoothing=config.label_smoothing)
            share = len(part.images) / global_size
            total += loss.detach() * share
            exponent += 0 if output.exponent is None else output.exponent.mean() * share
            state.scaler.scale(loss * share * distributed.world_size()).backward()
    columns = {name: value for name, value in output._asdict().items() if isinstance(value, Tensor) and value.ndim == 2}
    figures = {f"|{name}|": value.detach().float().norm(dim=1).mean() for name, value in columns.items()}
    if guard.update(total, figures):
        if config.ism == "live":
            state.model.follow(distributed.all_reduce_sum(exponent))
        if state.ema is not None:
            state.ema.update(state.model, step=state.step)


def split(batch: MixedBatch, parts: int) -> list[MixedBatch]:
    """The batch in ``parts`` parts, whose sizes differ by one image at the most."""
    if parts == 1:
        return [batch]
    mixed = batch.labels_b is not batch.labels_a
    columns = (column.tensor_split(parts) for column in (batch.images, batch.labels_a, batch.labels_b))
    return [MixedBatch(images, a, b if mixed else a, batch.lam) for images, a, b in zip(*columns, strict=True)]


def crop_and_flip(images: Tensor, config: ClsConfig, generator: torch.Generator) -> Tensor:
    """(B, 3, S, S) uint8 -> the same, on the images' device; draws from a CPU generator."""
    count, padding = len(images), config.crop_padding
    offsets = sample_crop(count, padding=padding, generator=generator) if padding else None
    flip = sample_flip(count, generator=generator) if config.flip else None
    if offsets is not None:
        return apply_crop(images, offsets, padding=padding, flip=flip)
    return images if flip is None else apply_flip(images, flip)


def colour_and_mix(
    images: Tensor, labels: Tensor, config: ClsConfig, preprocessing: Preprocessing, generator: torch.Generator
) -> MixedBatch:
    """The rest of a training batch: colour, normalise, mix; all on the images' device.

    Args:
        images: (B, 3, S, S) uint8, cropped and flipped.
        labels: (B,) int64 on the same device.
        generator: CPU generator of every draw.
    """
    count, (height, width) = len(images), images.shape[2:]
    if config.color_jitter:
        strength = dict.fromkeys(("brightness", "contrast", "saturation"), config.color_jitter)
        images = apply_color_jitter(images, sample_color_jitter(count, **strength, generator=generator))
    if config.lighting:
        weights = sample_lighting(count, std=config.lighting, generator=generator)
        images = apply_lighting(images, weights, inplace=images.dtype == torch.float32)
    images = normalise(images, preprocessing.mean, preprocessing.std, inplace=images.dtype == torch.float32)
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    draw: dict[str, Any] = {"alpha": config.mix_alpha, "prob": config.mix_prob, "generator": generator}
    if config.mix == "cutmix":
        return apply_cutmix(images, labels, sample_cutmix(count, (height, width), **draw))
    return apply_mixup(images, labels, sample_mixup(count, **draw) if config.mix == "mixup" else None)


def progressive_size(config: ClsConfig, epoch: int) -> int | None:
    """Input size of an epoch in a progressive training, a multiple of 32 that grows linearly; None when it is fixed."""
    if config.progressive is None:
        return None
    first, last = config.progressive
    share = min(epoch / max(config.epochs - 2, 1), 1.0)  # the last two epochs are at full size
    return min(32 * round((first + share * (last - first)) / 32), last)


def evaluate_checkpoint(config: ClsConfig, data: DataSplits, model: nn.Module, loaders: ClsLoaders) -> dict[str, Any]:
    """The figures of a stored model on the test images, with its confusion matrix beside the checkpoint's run."""
    assert config.checkpoint is not None
    checkpoint = read_checkpoint(config.checkpoint)
    if tuple(checkpoint["classes"]) != data.train.classes:
        raise UserError(
            f"{config.checkpoint} knows {len(checkpoint['classes'])} classes ({', '.join(checkpoint['classes'][:3])}, "
            f"...), the data has {len(data.train.classes)} ({', '.join(data.train.classes[:3])}, ...)"
        )
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(f"{config.checkpoint} does not fit the model of this config: {error}") from None
    model = with_stored_introspection(model, checkpoint)
    test = evaluate(model, loaders.test, data.preprocessing, config.precision, flip=config.tta == "flip")
    metrics = classification_metrics(test.predictions, len(data.train.classes))
    metrics |= uncertainty_metrics(test.predictions, ism_on=config.ism != "off")
    default = Path(config.checkpoint).resolve().parent.parent / "evaluation"
    directory = Path(config.output_dir) if config.output_dir else default
    say(f"{len(data.test)} test images: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    if distributed.is_main():
        with stored_if_possible(directory, "--output-dir"):
            write_confusion(directory, test.predictions, data.train.classes, metrics, tta=config.tta)
            say(f"confusion matrix and figures in {directory}")
    return metrics


def say(text: str) -> None:
    """Print on rank 0."""
    if distributed.is_main():
        print(text, flush=True)


if __name__ == "__main__":
    run_main(main)
