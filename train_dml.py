"""Train an embedding for retrieval that knows what it does not know: eight losses, each plain and introspective.

    python train_dml.py --config configs/quick/emoji_mini.yaml --ism live     emoji of six vendors inside the package
    python train_dml.py --dataset folder --data-dir photos --pretrained --loss MS --IPC 4
    python train_dml.py --config configs/cub/idml_proxy_anchor.yaml --data-dir data
    torchrun --nproc-per-node 4 train_dml.py --config configs/sop/idml_proxy_anchor.yaml --data-dir data
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train_dml.py --config ...
    python train_dml.py --gpu -1 ...                             all visible GPUs, without writing torchrun
    python train_dml.py --eval-only --checkpoint runs/NAME/checkpoints/last.pt

Any key of a config file is also a flag, and a flag wins. Results go to a new folder under runs/.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once; see idml.runtime.keep_freed_memory

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from augment import (
    MixedBatch,
    apply_crop,
    apply_cutmix,
    apply_flip,
    apply_mixup,
    normalise,
    sample_crop,
    sample_cutmix,
    sample_flip,
    sample_mixup,
)
from idml import distributed
from idml.backbones import create_backbone
from idml.checkpoint import load_weights, read_checkpoint
from idml.checkpoint_files import read_verified
from idml.config import dump_config, parse_name_values
from idml.config_dml import DmlConfig, parse_dml_config
from idml.data.dml_loaders import DmlLoaders, build_dml_loaders
from idml.data.image_dataset import Preprocessing
from idml.data.retrieval_data import RetrievalData
from idml.data.retrieval_datasets import read_retrieval_data
from idml.data.sampling import global_batch_sizes
from idml.embedder import EmbedderOutput, IntrospectiveEmbedder
from idml.environment import hardware
from idml.epoch_loop import run_epoch
from idml.errors import UserError, run_main
from idml.introspecting import introspect_trained, with_stored_introspection
from idml.losses import MetricLoss, scale_uncertainty_head
from idml.nonfinite import FiniteGuard
from idml.optim import build_dml_optimizer, build_dml_schedule
from idml.report_dml import (
    draw_neighbours,
    draw_projection,
    epoch_line,
    introspection_line,
    log_projector,
    write_retrieval,
)
from idml.resume import check_same_run, planned_steps
from idml.retrieval_evaluation import Embedded, Found, embed, held_out_metrics, search
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

PROBE_IMAGES = 120
"""Training images on which the ISM weight is measured: before training, to scale the head, and after every epoch."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Train or evaluate as the command line says; returns the figures (None for ``--print-config``)."""
    warnings.showwarning = lambda message, *_args, **_kwargs: print(f"warning: {message}", file=sys.stderr)
    distributed.check_environment()
    arguments = list(sys.argv[1:] if argv is None else argv)
    config, print_config = parse_dml_config(arguments, description=__doc__)
    if print_config:
        print(dump_config(config), end="")
        return None
    use_gpus(config, arguments)
    with StopSignals() as signals:
        return run_config(config, signals)


def run_config(config: DmlConfig, signals: StopSignals) -> dict[str, Any]:
    """Train or evaluate; whatever a user's mistake can break comes before the run directory is made."""
    device = choose_device(config.device)
    keep_freed_memory(device)
    distributed.setup(device.type)
    seed_everything(config.seed, deterministic=config.deterministic, threads=config.threads)
    data = read_retrieval_data(config)
    model = build_model(config)
    loss = build_loss(config, len(data.train.classes))
    model = place_model(model, device, channels_last=config.channels_last, sync_bn=config.sync_bn, tf32=config.tf32)
    size, world_size = data.preprocessing.image_size, distributed.world_size()
    steps = [config.batch_size] if config.IPC else global_batch_sizes(len(data.train), config.batch_size, world_size)
    try_out(model, config, size, [size], steps)
    loss = loss.to(device)
    loaders = build_dml_loaders(data, config, pin_memory=device.type == "cuda")
    if config.eval_only:
        results = evaluate_checkpoint(config, data, model, loaders)
    else:
        stored = read_verified(Path(config.resume)) if config.resume else None
        if stored is not None:
            check_same_run(stored, config, data.train, len(loaders.train))
        name = f"{config.dataset}-{config.loss}-{config.ism}-s{config.seed}{config.remark and '-' + config.remark}"
        run = Run(run_directory(config.output_dir, name), config, stored=stored)
        gallery = "" if data.gallery is None else f", a gallery of {len(data.gallery)},"
        sampling = (
            "random" if config.IPC is None else f"{config.IPC} images of each of {config.batch_size // config.IPC}"
        )
        say(
            f"{config.loss} (ism {config.ism}, mix {config.mix}), {config.model}, {config.dataset}: "
            f"{len(data.train)} training images of {len(data.train.classes)} classes and {len(data.test)} test images"
            f"{gallery} of {len(data.test.classes)} others; {len(loaders.train)} steps an epoch ({sampling} classes a "
            f"batch); {distributed.world_size()} process(es), {hardware()}\nrun directory {run.directory}"
        )
        results = train(config, data, model, loss, loaders, run, stored, signals)
    distributed.shutdown()
    return results


def use_gpus(config: DmlConfig, arguments: Sequence[str]) -> None:
    """What ``--gpu`` says: one GPU, or this very command again under torchrun, a process for each visible GPU."""
    if config.gpu is None or config.device == "cpu":
        return
    count = torch.cuda.device_count()
    if config.gpu >= 0:
        if config.gpu >= max(count, 1):
            raise UserError(f"--gpu {config.gpu}: torch sees {count} GPUs, numbered from 0; -1 takes all of them")
        if count:
            torch.cuda.set_device(config.gpu)
    if count == 0:
        say(f"--gpu {config.gpu}: there is no GPU here; training on the CPU")
    if config.gpu == -1 and count > 1 and "WORLD_SIZE" not in os.environ:
        if config.batch_size % count:
            raise UserError(f"--batch-size {config.batch_size} (over all GPUs) does not divide by {count} GPUs")
        print(f"--gpu -1: starting {count} processes through torchrun, one a GPU", flush=True)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        os.execv(sys.executable, [*torchrun, str(Path(__file__).resolve()), *arguments])


def build_model(config: DmlConfig) -> IntrospectiveEmbedder:
    """The network of a config, with the weights that it starts from."""
    backbone = create_backbone(
        config.model,
        image_size=config.image_size,
        pretrained=config.pretrained == "timm" and config.resume is None,
        arguments=parse_name_values(config.model_kwargs),
    )
    if config.pretrained not in (None, "timm") and config.resume is None:
        allowed = config.pretrained_allow_missing or ()
        load_weights(backbone, config.pretrained, key=config.pretrained_key, allow_missing=allowed)
    return IntrospectiveEmbedder(
        backbone,
        config.embedding_size,
        config.uncertainty_dim,
        config.pool,
        config.ism,
        l2_norm=bool(config.l2_norm),
    )


def build_loss(config: DmlConfig, num_classes: int) -> MetricLoss:
    """The loss of a config."""
    return MetricLoss(
        config.loss,
        num_classes,
        config.embedding_size,
        ism=config.ism,
        temperature=config.temperature,
        margin=config.mrg,
        scale=config.alpha,
        proxy_norm=config.proxy_norm,
    )


def train(
    config: DmlConfig,
    data: RetrievalData,
    model: IntrospectiveEmbedder,
    loss: MetricLoss,
    loaders: DmlLoaders,
    run: Run,
    stored: Mapping[str, Any] | None,
    signals: StopSignals,
) -> dict[str, Any]:
    """All epochs, an evaluation and a checkpoint after each; returns what ``results.json`` holds.

    Args:
        config, data, model, loss, loaders, run: of the training.
        stored: the checkpoint that it goes on from, or None.
        signals: that may stop it.
    """
    device = next(model.parameters()).device
    steps_per_epoch = len(loaders.train)
    total_steps = planned_steps(config, steps_per_epoch)
    if config.bn_freeze:
        freeze_batch_norm(model)
    probe = probe_images(data, loaders, device)
    if config.ism != "off" and stored is None:
        say(f"mean ISM weight before training {scale_uncertainty_head(model, loss, probe):.3f}")
    optimizer = build_dml_optimizer(model, loss, config)
    state = TrainingState(
        model=model,
        network=model,
        loss=loss,
        optimizer=optimizer,
        schedule=build_dml_schedule(optimizer, config, steps_per_epoch=steps_per_epoch),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        # The same on every rank: each draws for the whole batch and takes its own share.
        generator=torch.Generator().manual_seed(config.seed),
        seed=config.seed,
        own_share=False,
    )
    distributed.copy_from_main([*model.parameters(), *loss.parameters()])
    backbone = [parameter for parameter in model.backbone.parameters() if parameter.requires_grad]
    saver = Saver(run, state, data, signals)
    saver.start(stored)
    pick_by = "val_R@1" if loaders.val else "R@1"
    found: Found | None = None
    about: dict[str, Any] | None = None
    while state.step < total_steps or state.epoch_losses:
        if state.network is model or state.epoch == config.warm:
            for parameter in backbone:
                parameter.requires_grad_(state.epoch >= config.warm)
            state.network = wrap(model, config)
        with signals.deferred():
            speed = train_epoch(config, data, loaders, saver, total_steps)
            saver.save()
        saver.stop_if_asked()
        distributed.copy_from_main(model.buffers())  # batch norm's running figures differ by rank
        last = state.step >= total_steps
        metrics = {"epoch": state.epoch + 1, "step": state.step, "lr": state.learning_rate}
        metrics |= {"train_loss": state.mean_epoch_loss(), **speed}
        if last or (state.epoch + 1) % config.eval_every == 0:
            weight = scale_uncertainty_head(model, loss, probe)
            metrics |= evaluate_held_out(config, data, model, loaders)
            # With an introspection there is one more evaluation: large sets are clustered once.
            tested, found = evaluate_model(config, data, model, loaders, last=last and not config.introspect)
            metrics |= found.metrics
            if config.ism != "off":
                metrics["uncertainty_test"] = tested.uncertainty.mean().item()
                metrics["ism_weight"] = weight
        with signals.deferred():
            saver.end_epoch(metrics, pick_by=pick_by)
        say(epoch_line(metrics))
        saver.stop_if_asked()

    if config.introspect:
        introspected, about = introspect_trained(model, "retrieval", data, config)
        tested, found = evaluate_model(config, data, introspected, loaders, last=True)
        saver.end_introspection(found.metrics, introspected.introspection)
        say(introspection_line(found.metrics, introspected.introspection.spec))
    elif found is None:  # the run had been stopped between its last epoch and its end
        tested, found = evaluate_model(config, data, model, loaders, last=True)
    draw_neighbours(run, found, tested, loaders, data, state.epoch, ism_on=config.ism != "off")
    draw_projection(run, tested, data, state.epoch, ism_on=config.ism != "off")
    log_projector(run, tested, loaders, data, state.epoch)
    picked_on = "held-out training classes" if loaders.val else "test set"
    method = {"loss": config.loss, "ism": config.ism, "mix": config.mix}
    return run.finish(pick_by=pick_by, picked_on=picked_on, introspection=about, **method)


def evaluate_held_out(
    config: DmlConfig, data: RetrievalData, model: IntrospectiveEmbedder, loaders: DmlLoaders
) -> dict[str, float]:
    """R@K, RP and MAP@R of held-out training classes searching one another, as ``val_R@1`` and so on; empty of none."""
    if not loaders.val:
        return {}
    held_out = embed(model, loaders.val, data.preprocessing, config.precision)
    return held_out_metrics(held_out, config, next(model.parameters()).device)


def evaluate_model(
    config: DmlConfig, data: RetrievalData, model: nn.Module, loaders: DmlLoaders, *, last: bool
) -> tuple[Embedded, Found]:
    """The embeddings of the test images, and what they find; ``last`` as in ``search``."""
    tested = embed(model, loaders.test, data.preprocessing, config.precision)
    gallery = embed(model, loaders.gallery, data.preprocessing, config.precision) if loaders.gallery else None
    return tested, search(tested, gallery, data, config, model, getattr(model, "introspection", None), last=last)


class Parts(nn.Module):
    """The network for one or two batches of images: in one forward pass where no batch norm would mix them up.

    One call, so that under DDP the gradients of both parts are averaged once.
    """

    def __init__(self, network: nn.Module, model: IntrospectiveEmbedder) -> None:
        super().__init__()
        self.network, self.model = network, model

    def forward(self, *parts: Tensor) -> list[EmbedderOutput]:
        """An output for each part."""
        batch_norms = [module for module in self.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        if len(parts) == 1 or any(module.training for module in batch_norms):
            return [self.network(images) for images in parts]
        output = self.network(torch.cat(parts))
        columns = (output.semantic, output.uncertainty, output.norm)
        sizes = [len(images) for images in parts]
        return [EmbedderOutput(*part) for part in zip(*(column.split(sizes) for column in columns), strict=True)]


def wrap(model: IntrospectiveEmbedder, config: DmlConfig) -> nn.Module:
    """What is called in training: the model compiled and distributed, as far as asked for."""
    compiled: nn.Module = torch.compile(model) if config.compile else model  # type: ignore[assignment]
    network: nn.Module = Parts(compiled, model)
    if distributed.world_size() > 1:
        device = next(model.parameters()).device
        # Running figures of batch norm are rank 0's in every step: a checkpoint has those of rank 0 alone.
        network = DistributedDataParallel(
            network,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=not config.bn_freeze,
        )
    return network


def train_epoch(
    config: DmlConfig, data: RetrievalData, loaders: DmlLoaders, saver: Saver, total_steps: int
) -> dict[str, float]:
    """What is left of a pass over the training images, ending early at ``total_steps``; returns its speed."""
    state = saver.state
    state.network.train()
    if config.bn_freeze:
        freeze_batch_norm(state.model)

    def take_step(guard: FiniteGuard, images: Tensor, labels: Tensor, global_size: int) -> None:
        images = crop_and_flip(images, data, state.generator, global_size)
        images = normalised(images, config, data.preprocessing)
        batch = mix(images, labels, config, state.generator, global_size)
        step(state, guard, images, batch, config, global_size)

    return run_epoch(saver, loaders.train, total_steps, take_step)


def step(
    state: TrainingState,
    guard: FiniteGuard,
    images: Tensor,
    batch: MixedBatch,
    config: DmlConfig,
    global_size: int,
) -> None:
    """One optimizer step on this rank's share of a batch of ``global_size`` images.

    The loss is that of the whole batch, on every rank alike: ``loss(images)``, and with mixing ``+ lam loss(mixed, own
    labels) + (1 - lam) loss(mixed, partners' labels)``, as released. The state notes it.
    """
    loss_of, device = state.loss, images.device
    assert isinstance(loss_of, MetricLoss)
    mixed = batch.labels_b is not batch.labels_a
    guard.begin()
    state.optimizer.zero_grad(set_to_none=True)
    with autocast(device, config.precision):
        outputs = state.network(*([images, batch.images] if mixed else [images]))
    embeddings = [distributed.gather_batch(output.joint(), global_size) for output in outputs]
    labels, partners = (distributed.gather_batch(labels, global_size) for labels in (batch.labels_a, batch.labels_b))
    # Miners draw at random: the same on every rank, whatever else has been drawn.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed * 1_000_003 + state.step)
        loss = loss_of(embeddings[0], labels)
        figures = {"loss of the images": loss.detach()}
        if mixed:
            own, others = loss_of(embeddings[1], labels), loss_of(embeddings[1], partners)
            figures |= {"loss of mixed images, own labels": own.detach(), "partners' labels": others.detach()}
            loss = loss + batch.lam * own + (1 - batch.lam) * others
    state.scaler.scale(loss).backward()
    distributed.average_gradients(loss_of.parameters())
    if config.clip_value:
        state.scaler.unscale_(state.optimizer)
        trained = [*state.model.parameters(), *loss_of.parameters()]
        nn.utils.clip_grad_value_([p for p in trained if p.grad is not None], config.clip_value)
    figures["|semantic| before normalising"] = outputs[0].norm.detach().mean()
    figures["|uncertainty|"] = outputs[0].uncertainty.detach().norm(dim=1).mean()
    if loss_of.proxies is not None:
        figures["|proxies|"] = loss_of.proxies.detach().norm(dim=1).mean()
    guard.update(loss.detach(), figures)


def crop_and_flip(images: Tensor, data: RetrievalData, generator: torch.Generator, global_size: int) -> Tensor:
    """A training batch from the loader's bytes, cropped and flipped; on the images' device.

    Args:
        images: (b, 3, S, S) uint8, this rank's share of the batch.
        generator: CPU generator, in the same state on every rank: it draws for the whole batch.
        global_size: images of the whole batch.
    """
    own = slice(distributed.rank(), None, distributed.world_size())
    padding = data.crop_padding
    offsets = sample_crop(global_size, padding=padding, generator=generator)[own] if padding else None
    flip = sample_flip(global_size, generator=generator)[own] if data.flip else None
    if offsets is not None:
        return apply_crop(images, offsets, padding=padding, fill=data.crop_fill, flip=flip)
    return images if flip is None else apply_flip(images, flip)


def normalised(images: Tensor, config: DmlConfig, preprocessing: Preprocessing) -> Tensor:
    """(b, 3, S, S) uint8 -> float32, in the memory layout of the network."""
    images = normalise(images, preprocessing.mean, preprocessing.std)
    return images.contiguous(memory_format=torch.channels_last) if config.channels_last else images


def mix(images: Tensor, labels: Tensor, config: DmlConfig, generator: torch.Generator, global_size: int) -> MixedBatch:
    """The batch mixed as the config says; lam (and the box) are the same on every rank, partners of its own share."""
    if config.mix == "none":
        return apply_mixup(images, labels, None)
    seed = int(torch.randint(2**31, (), generator=generator)) + distributed.rank()
    permutation = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    if config.mix == "cutmix":
        size = (images.shape[2], images.shape[3])
        box = sample_cutmix(global_size, size, alpha=config.mix_alpha, generator=generator)
        assert box is not None
        return apply_cutmix(images, labels, box._replace(permutation=permutation))
    draw = sample_mixup(global_size, alpha=config.mix_alpha, generator=generator)
    assert draw is not None
    return apply_mixup(images, labels, draw._replace(permutation=permutation))


def probe_images(data: RetrievalData, loaders: DmlLoaders, device: torch.device) -> Tensor:
    """Training images spread over the data set, as evaluation sees them, normalised; the same on every rank."""
    chosen = np.linspace(0, len(data.train) - 1, min(PROBE_IMAGES, len(data.train)), dtype=int)
    images = loaders.train.images_at(chosen.tolist()).to(device)
    return normalise(images, data.preprocessing.mean, data.preprocessing.std)


def evaluate_checkpoint(
    config: DmlConfig, data: RetrievalData, model: IntrospectiveEmbedder, loaders: DmlLoaders
) -> dict[str, Any]:
    """The figures of a stored model on the test images, beside the checkpoint's run."""
    assert config.checkpoint is not None
    checkpoint = read_checkpoint(config.checkpoint)
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(f"{config.checkpoint} does not fit the model of this config: {error}") from None
    tested, found = evaluate_model(config, data, with_stored_introspection(model, checkpoint), loaders, last=True)
    default = Path(config.checkpoint).resolve().parent.parent / "evaluation"
    directory = Path(config.output_dir) if config.output_dir else default
    say(f"{len(data.test)} test images: " + ", ".join(f"{name} {value:.4f}" for name, value in found.metrics.items()))
    if distributed.is_main():
        with stored_if_possible(directory, "--output-dir"):
            write_retrieval(directory, found, tested, loaders, data, ism_on=config.ism != "off")
            say(f"figures and pictures in {directory}")
    return found.metrics


def say(text: str) -> None:
    """Print on rank 0."""
    if distributed.is_main():
        print(text, flush=True)


if __name__ == "__main__":
    run_main(main)
