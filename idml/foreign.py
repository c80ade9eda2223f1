"""Trained classifiers of others: timm's, torchvision's, modules of one's own. They stay as they are.

Letters in shapes: B images, C classes, D features.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from idml.errors import UserError, nearest
from idml.introspection.layers import find_layers, logits_of
from idml.models import ClassifierOutput


class ForeignClassifier(nn.Module):
    """Any module that gives (B, C) logits, with the named output of this project; its logits are the module's own.

    Args:
        module: gives logits: a tensor, or an output with ``logits`` in it.

    Attributes:
        feature_dim: D, of what goes into the last linear layer; C where there is no such layer. Known once the module
            has been tried on images: ``try_out``.
    """

    ism = "off"
    uncertainty_dim = 1

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.feature_dim = 0
        self._features: list[Tensor] = []

    def try_out(self, images: Tensor) -> None:
        """Find the input of the last linear layer, by one pass of (B, 3, S, S) images, B >= 2.

        Raises:
            UserError: the module does not take the images, or gives no logits.
        """
        try:
            layers = find_layers(self.module, images)
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"the model does not take images of shape {tuple(images.shape[1:])}: {reason}") from None
        self.watch(layers.features_of, layers.feature_dim)
        if not self.feature_dim:
            with torch.no_grad():
                self.feature_dim = logits_of(self.module(images)).shape[1]

    def watch(self, features_of: str, feature_dim: int) -> None:
        """Take the input of the module of that name for the features; logits where the name is empty."""
        self.feature_dim = feature_dim
        if features_of:
            self.module.get_submodule(features_of).register_forward_pre_hook(self._keep)

    def _keep(self, _module: nn.Module, given: tuple[Any, ...]) -> None:
        self._features[:] = [given[0].flatten(1)]

    def forward(self, images: Tensor) -> ClassifierOutput:
        """(B, 3, S, S) -> ClassifierOutput, without uncertainty."""
        logits = logits_of(self.module(images))
        features = self._features.pop() if self._features else logits
        return ClassifierOutput(logits, logits, features.float(), logits.new_zeros(len(logits), self.uncertainty_dim))


def build_foreign(origin: str, name: str, classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    """A classifier of another library with random weights.

    Args:
        origin: ``timm``, ``torchvision``, or ``module``: ``name`` is then package.module:function, called with
            ``arguments``; the current folder is looked in too.
        classes: C.
        arguments: further ones of its constructor.

    Raises:
        UserError: there is no such model, or it cannot be made.
    """
    if origin == "timm":
        import timm

        if not timm.is_model(name.split(".")[0]):
            raise UserError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
        make, own = timm.create_model, {"model_name": name, "num_classes": classes}
    elif origin == "torchvision":
        import torchvision

        names = torchvision.models.list_models(module=torchvision.models)
        if name not in names:
            raise UserError(f"torchvision has no classifier {name!r}{nearest(name, names)}")
        make, own = torchvision.models.get_model, {"name": name, "num_classes": classes, "weights": None}
        own |= {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    else:
        make, own = _function(name), {}
    try:
        return make(**own, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the model {name} cannot be made with {dict(arguments)}: {error}") from None


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    if not function:
        raise UserError(f"expected package.module:function that makes the network, got {name!r}")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot import {name}: {error}") from None
