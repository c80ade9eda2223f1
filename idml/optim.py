"""Optimizers and learning-rate schedules of both scripts, out of torch's parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

if TYPE_CHECKING:
    from idml.config_cls import ClsConfig
    from idml.config_dml import DmlConfig


def build_optimizer(model: nn.Module, config: ClsConfig) -> Optimizer:
    """SGD over all parameters; with ``decay_bn_bias`` off, vectors and scalars (norm layers, biases) do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1 or config.decay_bn_bias]
    vectors = [p for p in trained if not (p.ndim > 1 or config.decay_bn_bias)]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    nesterov = config.nesterov and config.momentum > 0
    fused = next(model.parameters()).is_cuda
    return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=fused)


def build_schedule(optimizer: Optimizer, config: ClsConfig, *, steps_per_epoch: int, total_steps: int) -> LRScheduler:
    """The schedule, to be stepped after every optimizer step.

    ``step`` multiplies by ``lr_gamma`` after each of ``lr_milestones`` (default: 50 % and 75 % of the steps, the CIFAR
    recipe); ``cosine`` falls to zero; ``onecycle`` rises over 30 % of the steps and falls to almost zero (Smith 2018,
    torch's defaults, momentum left alone). ``warmup_epochs`` puts a linear rise from 1 % before the first two.
    """
    if config.schedule == "onecycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, peaks, total_steps=total_steps, cycle_momentum=False)
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total_steps - 1)
    if config.schedule == "cosine":
        main: LRScheduler = CosineAnnealingLR(optimizer, T_max=max(total_steps - warmup, 1))
    else:
        if config.lr_milestones is not None:
            milestones = [epoch * steps_per_epoch for epoch in config.lr_milestones]
        else:
            milestones = [total_steps // 2, total_steps * 3 // 4]
        main = MultiStepLR(optimizer, [max(m - warmup, 1) for m in milestones], gamma=config.lr_gamma)
    if warmup == 0:
        return main
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.01, total_iters=warmup), main], milestones=[warmup])


def build_dml_optimizer(model: nn.Module, loss: nn.Module, config: DmlConfig) -> Optimizer:
    """The released trainer's optimizers, over the network and, at a learning rate of their own, the loss's parameters.

    SGD has momentum 0.9 (Nesterov), RMSprop alpha 0.9 and momentum 0.9, as released. Frozen parameters are in it too:
    after the warm-up they are trained.
    """
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if own := list(loss.parameters()):
        assert config.loss_lr_factor is not None
        groups.append({"params": own, "lr": config.lr * config.loss_lr_factor})
    shared: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    match config.optimizer:
        case "sgd":
            return SGD(groups, momentum=0.9, nesterov=True, **shared)
        case "adam":
            return Adam(groups, **shared)
        case "rmsprop":
            return RMSprop(groups, alpha=0.9, momentum=0.9, **shared)
    return AdamW(groups, **shared)


def build_dml_schedule(optimizer: Optimizer, config: DmlConfig, *, steps_per_epoch: int) -> LRScheduler:
    """The released schedule, to be stepped after every optimizer step: times gamma after every few epochs."""
    return StepLR(optimizer, config.lr_decay_step * steps_per_epoch, config.lr_decay_gamma)
