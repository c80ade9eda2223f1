"""Command lines in the manner of the CutMix authors' script, on which the released IDML classification code builds.

``--net_type pyramidnet --dataset cifar100 --depth 200 --alpha 240 --batch_size 64 --lr 0.25 --expname NAME --epochs 300
--beta 1.0 --cutmix_prob 0.5 --no-verbose`` says what our options say in other words, with that script's schedule and
augmentation, and with ISM on as in the released code (``--ism off`` gives the plain row).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from idml.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def translate_cutmix_flags(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Translate a command line that has ``--net_type``; leave any other one alone.

    Returns:
        (values of our options that follow from it, the arguments that are ours already: ``--lr``, ``--epochs``, ...).

    Raises:
        UserError: a value is missing or bad, or the network does not exist.
    """
    if not any(argument.split("=")[0] in ("--net_type", "--net-type") for argument in argv):
        return {}, list(argv)
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--net_type", "--net-type", choices=("resnet", "pyramidnet"), required=True)
    parser.add_argument("--dataset", choices=("imagenet", "cifar10", "cifar100"), required=True)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--alpha", type=int, help="widening of PyramidNet")
    parser.add_argument("--bottleneck", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--cutmix_prob", "--cutmix-prob", type=float, default=0.0)
    given, rest = parser.parse_known_args(argv)
    if not 0 <= given.cutmix_prob <= 1:
        raise UserError(f"--cutmix_prob: expected a value between 0 and 1, got {given.cutmix_prob}")
    return _recipe(given) | _network(given), ["--dataset", given.dataset, "--epochs", str(given.epochs), *rest]


def _recipe(given: argparse.Namespace) -> dict[str, Any]:
    """ISM, mixing, schedule and augmentation of the authors' script."""
    imagenet = given.dataset == "imagenet"
    mixing = {"ism": "released", "mix": "none", "mix_prob": None}
    if given.beta > 0 and given.cutmix_prob > 0:
        mixing |= {"mix": "cutmix", "mix_alpha": given.beta, "mix_prob": given.cutmix_prob}
    if imagenet:
        every = 75 if given.epochs == 300 else 30
        milestones = list(range(every, given.epochs, every))
    else:
        milestones = [given.epochs // 2, given.epochs * 3 // 4]
    return mixing | {
        "schedule": "step",
        "lr_milestones": [milestone for milestone in milestones if milestone > 0],
        "color_jitter": 0.4 if imagenet else 0.0,
        "lighting": 0.1 if imagenet else 0.0,
        "uncertainty_dim": 512 if imagenet else 128,
    }


def _network(given: argparse.Namespace) -> dict[str, Any]:
    """The model's name and arguments."""
    if given.dataset == "imagenet":
        if given.net_type != "resnet":
            raise UserError(
                "--net_type pyramidnet is for cifar10 and cifar100; for imagenet take resnet, or --model NAME"
            )
        return {"model": f"resnet{given.depth}"}
    size = [f"depth={given.depth}", f"bottleneck={given.bottleneck}"]
    if given.net_type == "resnet":
        return {"model": "resnet_cifar", "model_kwargs": size}
    if given.alpha is None:
        raise UserError("--net_type pyramidnet needs --alpha, its widening (240 in the published rows)")
    return {"model": "pyramidnet_cifar", "model_kwargs": [*size, f"alpha={given.alpha}"]}
