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

from idml.heads import ForesightHead

if TYPE_CHECKING:
    from idml.config_cls import ClsConfig
    from idml.config_dml import DmlConfig


HEAD_LR, HEAD_WEIGHT_DECAY = 2e-3, 1e-2
"""Of AdamW for a foresight head. Its rate does not depend on the network's: nothing of the network learns from it."""


class WithHead(Optimizer):
    """One optimizer for the network and another for its foresight head, as one: for schedule, scaler and checkpoint.

    The head is a small network of its own that follows features which change all the time. AdamW does that at one rate
    for every backbone; at the network's own SGD it lags behind, or runs away with a rate that is a little higher.

    Args:
        network, head: over different parameters; their groups are this one's.
    """

    def __init__(self, network: Optimizer, head: Optimizer) -> None:
        self.parts = (network, head)
        super().__init__([dict(group) for part in self.parts for group in part.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Both of them."""
        assert closure is None, "a closure would be called twice"
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """``parts``, the states of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What ``state_dict`` gave; ValueError or KeyError where it is of other parameters, or of one optimizer."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


def of_foresight(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that loss prediction alone trains; none without."""
    own = ("uncertainty_head.", "directions")
    foresees = isinstance(getattr(model, "uncertainty_head", None), ForesightHead)
    return [parameter for name, parameter in model.named_parameters() if foresees and name.startswith(own)]


def with_head(network: Optimizer, model: nn.Module) -> Optimizer:
    """The network's optimizer, and AdamW for the foresight head where the model has one."""
    own = of_foresight(model)
    return WithHead(network, AdamW(own, lr=HEAD_LR, weight_decay=HEAD_WEIGHT_DECAY)) if own else network


def network_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All others."""
    own = {id(parameter) for parameter in of_foresight(model)}
    return [parameter for parameter in model.parameters() if id(parameter) not in own]


def build_optimizer(model: nn.Module, config: ClsConfig) -> Optimizer:
    """SGD over all parameters; with ``decay_bn_bias`` off, vectors and scalars (norm layers, biases) do not decay.

    A foresight head has an optimizer of its own.
    """
    trained = [p for p in network_parameters(model) if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1 or config.decay_bn_bias]
    vectors = [p for p in trained if not (p.ndim > 1 or config.decay_bn_bias)]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    nesterov = config.nesterov and config.momentum > 0
    fused = next(model.parameters()).is_cuda
    return with_head(SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=fused), model)


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
    after the warm-up they are trained. A foresight head has an optimizer of its own.
    """
    groups: list[dict[str, Any]] = [{"params": network_parameters(model)}]
    if own := list(loss.parameters()):
        assert config.loss_lr_factor is not None
        groups.append({"params": own, "lr": config.lr * config.loss_lr_factor})
    shared: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    match config.optimizer:
        case "sgd":
            network: Optimizer = SGD(groups, momentum=0.9, nesterov=True, **shared)
        case "adam":
            network = Adam(groups, **shared)
        case "rmsprop":
            network = RMSprop(groups, alpha=0.9, momentum=0.9, **shared)
        case "adamw":
            network = AdamW(groups, **shared)
    return with_head(network, model)


def build_dml_schedule(optimizer: Optimizer, config: DmlConfig, *, steps_per_epoch: int) -> LRScheduler:
    """The released schedule, to be stepped after every optimizer step: times gamma after every few epochs."""
    return StepLR(optimizer, config.lr_decay_step * steps_per_epoch, config.lr_decay_gamma)
