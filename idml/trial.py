"""A trial before training: whether a network takes images of the sizes that it will be shown, and which it takes."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from idml.backbones import timm_arguments
from idml.config import parse_name_values
from idml.distributed import world_size
from idml.embedder import IntrospectiveEmbedder
from idml.errors import UserError
from idml.models import IntrospectiveClassifier
from idml.runtime import autocast

STEPS = (32, 16, 14, 12, 8, 7, 64, 56, 28)
"""Sizes that backbones take are mostly multiples of one of these: strides, patches, windows of 7 patches."""

MOST_TRIALS = 14
"""Sizes that are tried out for an error's sake, at the most."""


def try_out(
    model: IntrospectiveClassifier | IntrospectiveEmbedder,
    config: Any,
    image_size: int,
    training_sizes: Iterable[int],
    steps: Sequence[int],
) -> None:
    """UserError unless the network takes two images of every size, in training and in evaluation; one where it has to.

    Nothing is changed by it: random generators, batch norm's figures and everything else are as they were.

    Args:
        model: on its device.
        config: of the run; gives the backbone's name and arguments, and the precision.
        image_size: of evaluation, in pixels.
        training_sizes: of training.
        steps: images of each training step of an epoch, over all ranks.
    """
    device = next(model.parameters()).device

    def failure(size: int, training: bool, count: int = 2) -> str | None:
        with _untouched(model, device), torch.no_grad(), autocast(device, config.precision):
            model.train(training)
            for module in model.modules() if config.bn_freeze else ():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
            # Not all of the model in training: its heads keep running figures, and ask the other ranks for theirs.
            function: Callable[[Tensor], Any] = model.features if training else model
            return _failure(function, torch.zeros(count, 3, size, size, device=device))

    arguments, sizes = parse_name_values(config.model_kwargs), sorted(set(training_sizes))
    if config.eval_only:
        sizes, steps = [], []
    for size, training in [(image_size, False), *((size, True) for size in sizes)]:
        reason = failure(size, training)
        if reason is None:
            continue
        named = f"model {config.model}{with_arguments(arguments)}"
        if size == image_size:
            raise UserError(
                f"{named} does not take images of {size} x {size} pixels ({reason}); "
                f"{advice(config.model, size, arguments, training=training)}"
            )
        fitting = [str(each) for each in range(32, sizes[-1] + 1, 32) if failure(each, True) is None]
        built = " made for" if _of_one_size(config.model) else " with --image-size"
        raise UserError(
            f"{named},{built} {image_size}, does not take the {size} x {size} pixels of --progressive ({reason}); of "
            f"32 to {sizes[-1]} it takes {' and '.join(fitting) or 'none'}"
            + ("; --model-kwargs dynamic_img_size=true may help" if _of_one_size(config.model) else "")
        )
    if steps and min(steps) // world_size() == 1 and (reason := failure(sizes[0], True, 1)) is not None:
        raise UserError(
            f"a step of {min(steps)} images gives {'each process' if world_size() > 1 else 'the network'} one, which "
            f"{config.model} cannot train on ({reason}): take a --batch-size of at least {2 * world_size()}, more "
            "images, or --bn-freeze"
        )


def _of_one_size(name: str) -> bool:
    """Whether a model is made for one input size."""
    config = timm.get_pretrained_cfg(timm_arguments(name, None, None)[0].split(".")[0])
    return config is not None and config.fixed_input_size


def with_arguments(arguments: Mapping[str, Any] | None) -> str:
    """For a message: `` with arguments a=1, b=2``, or nothing."""
    return f" with arguments {', '.join(f'{key}={value}' for key, value in arguments.items())}" if arguments else ""


def _failure(function: Callable[[Tensor], Any], images: Tensor) -> str | None:
    """What goes wrong, in a few words, or None."""
    try:
        function(images)
    except Exception as error:  # whatever a model of somebody else's says
        return in_words(error)
    return None


def in_words(error: Exception) -> str:
    """An error as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"


@contextlib.contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Every generator, buffer and mode of the model as it was before; what evaluation has cached is dropped."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for buffer, before in buffers:
            buffer.copy_(before)
        model.train()  # by their own methods: some modules keep what they have computed from their weights
        for module, training in modes:
            module.training = training


def advice(name: str, wanted: int, arguments: Mapping[str, Any] | None, *, training: bool = False) -> str:
    """What to do where a backbone does not take images of ``wanted`` pixels: sizes that it takes, if there are any."""
    sizes = fitting_sizes(name, wanted, arguments or {}, training=training)
    if not sizes:
        return "no other size helps: take another --model, or other --model-kwargs"
    return f"it takes {' or '.join(map(str, sizes))}: --image-size {sizes[0]}"


def fitting_sizes(name: str, wanted: int, arguments: Mapping[str, Any], *, training: bool = False) -> list[int]:
    """Up to three sizes that a backbone takes, the nearest to ``wanted`` first; each has been tried out."""
    found: list[int] = []
    for size in _candidates(name, wanted, arguments):
        if any((each < wanted) == (size < wanted) for each in found[1:]):
            continue  # there is one on this side already, beside that which the model was published for
        timm_name, passed_on = timm_arguments(name, size, arguments)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                backbone = timm.create_model(timm_name, num_classes=0, **passed_on).train(training)
                backbone(torch.zeros(2, 3, size, size))
        except Exception:  # whatever a model says of a size that it does not take
            continue
        found.append(size)
    return sorted(found, key=lambda size: abs(size - wanted))


def _candidates(name: str, wanted: int, arguments: Mapping[str, Any]) -> list[int]:
    """Sizes to try: what the model was published for, and multiples of usual strides next to ``wanted``."""
    config = timm.get_pretrained_cfg(timm_arguments(name, None, None)[0].split(".")[0])
    own = [arguments.get("img_size")]
    if config is not None:
        own += [shape[-1] for shape in (config.input_size, config.min_input_size) if shape is not None]
    near = [size for step in STEPS for size in (wanted // step * step, -(-wanted // step) * step)]
    sizes = [size for size in [*own, *near] if isinstance(size, int) and size >= 8 and size != wanted]
    return list(dict.fromkeys(sizes))[:MOST_TRIALS]
