"""Backbones by name: timm's, and those of this package that are registered with timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from idml import cifar_resnet, googlenet, pyramidnet  # noqa: F401  (they register their models with timm)
from idml.errors import UserError, nearest

ALIASES = {"vit_small": "vit_small_patch16_224", "efficientnet": "efficientnet_b0"}
"""Names of families, as papers write them, and the member that is meant."""


def create_backbone(
    name: str, *, image_size: int | None = None, pretrained: bool = False, arguments: Mapping[str, Any] | None = None
) -> nn.Module:
    """A timm model without its classifier.

    Args:
        name: of a timm model, or of one of ``idml.cifar_resnet``, ``idml.pyramidnet`` and ``idml.googlenet``, or one of
            ``ALIASES``.
        image_size: pixels; passed on to models that are built for one input size (vision transformers).
        pretrained: take timm's weights, which it downloads when they are not in its cache; random otherwise.
        arguments: further ones for the model's constructor.

    Raises:
        UserError: timm has no such model (the nearest names are told), no weights for it or no way to get them, or the
            model does not take the arguments.
    """
    name, passed_on = timm_arguments(name, image_size, arguments)
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **passed_on)
    except Exception as error:  # whatever a model says of arguments and sizes, and a network of weights
        from idml.trial import advice, in_words, with_arguments  # it needs this module

        source = with_arguments(arguments) or (" with timm's weights" if pretrained else "")
        of_size = image_size is not None and not pretrained and not isinstance(error, TypeError)
        size = f" for images of {image_size} x {image_size} pixels" if of_size else ""
        hint = f"; {advice(name, image_size or 0, arguments)}" if of_size else ""
        raise UserError(f"model {name}{source} cannot be made{size}: {in_words(error)}{hint}") from None


def timm_arguments(
    name: str, image_size: int | None, arguments: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any]]:
    """(name, arguments) for ``timm.create_model``, ``num_classes`` aside; as for ``create_backbone``.

    Raises:
        UserError: timm has no such model (the nearest names are told).
    """
    name = ALIASES.get(name, name)
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise UserError(
            f"unknown model {name!r}{nearest(architecture, timm.list_models())} (timm.list_models() lists all)"
        )
    default_cfg = timm.get_pretrained_cfg(architecture)
    fixed = image_size is not None and default_cfg is not None and default_cfg.fixed_input_size
    sizes: dict[str, Any] = {"img_size": image_size} if fixed else {}
    return name, sizes | dict(arguments or {})


def infer_feature_dim(backbone: nn.Module) -> int:
    """D, the length of the features that ``backbone(images)`` gives.

    Read from the attributes that timm's models carry; any other module is tried on a black image of a few usual sizes.

    Raises:
        UserError: it cannot be found out; pass ``feature_dim`` to the model.
    """
    for attribute in ("head_hidden_size", "num_features"):
        value = getattr(backbone, attribute, None)
        if isinstance(value, int):
            return value
    return _try_out(backbone, dimensions=(2,))


def infer_map_dim(backbone: nn.Module) -> int:
    """H, the channels of the map that ``backbone.forward_features(images)`` gives, or else ``backbone(images)``.

    Layers that timm puts between that map and the classifier have no part in it; their parameters are frozen, since
    training on several processes forbids parameters that no loss reaches.

    Raises:
        UserError: it cannot be found out; pass ``feature_dim`` to the model.
    """
    if not hasattr(backbone, "forward_features") or not isinstance(backbone.num_features, int):
        return _try_out(backbone, dimensions=(2, 4))
    behind = ["head", "fc_norm", "attn_pool", "pre_logits", "fc", "classifier"]
    if getattr(backbone, "head_hidden_size", backbone.num_features) != backbone.num_features:
        behind += ["conv_head", "norm_head"]  # elsewhere, as in an EfficientNet, they come before the map
    for module in (getattr(backbone, name, None) for name in behind):
        if isinstance(module, nn.Module):
            for parameter in module.parameters():
                parameter.requires_grad_(False)
    return backbone.num_features


def _try_out(backbone: nn.Module, *, dimensions: tuple[int, ...]) -> int:
    """Channels of what the module gives for a black image of a usual size, if it has so many dimensions."""
    parameter = next(backbone.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    was_training = backbone.training
    backbone.eval()
    try:
        for size in (224, 32, 28, 64):
            for channels in (3, 1):
                try:
                    with torch.no_grad():
                        features = backbone(torch.zeros(1, channels, size, size, device=device))
                except (RuntimeError, ValueError):
                    continue  # this input size is not the module's; the next one may be
                if isinstance(features, Tensor) and features.ndim in dimensions:
                    return features.shape[1]
    finally:
        backbone.train(was_training)
    raise UserError(
        f"expected a backbone that gives (B, D) features or a map, and found no D for {type(backbone).__name__}: "
        "pass feature_dim=D, or set backbone.num_features"
    )
