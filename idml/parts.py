"""In how many parts a step's images go through the network (``--grad-accum``): none of one image under batch norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from idml.distributed import world_size


def least_images(model: nn.Module, *, frozen: bool) -> int:
    """How many images a part needs: two where batch norm trains, for of one it would know no variance; else one.

    Args:
        model: with or without batch norm.
        frozen: whether its batch norm is kept as it is.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    over_ranks = world_size() > 1 and all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    return 1 if frozen or over_ranks or not norms else 2


def part_count(model: nn.Module, config: Any, global_size: int) -> int:
    """Parts of a step of ``global_size`` images over all ranks, the same on every rank; each has enough images."""
    if config.grad_accum == 1:
        return 1
    share = global_size // world_size()
    return max(min(config.grad_accum, share // least_images(model, frozen=bool(config.bn_freeze))), 1)


def fewer_parts(model: nn.Module, config: Any, steps: Sequence[int]) -> str:
    """Which steps go through in fewer parts than asked for, in words; empty if none does.

    Args:
        steps: images of each step of an epoch over all ranks.
    """
    parts = {size: part_count(model, config, size) for size in sorted(set(steps), reverse=True)}
    changed = [
        f"steps of {size} images go through in {count} part{'s' if count > 1 else ''}, not {config.grad_accum}"
        for size, count in parts.items()
        if count < config.grad_accum
    ]
    why = "batch norm needs two images in each" if least_images(model, frozen=bool(config.bn_freeze)) == 2 else ""
    return f"--grad-accum: {', '.join(changed)}{': ' + why if why else ''}" if changed else ""
