"""Trained classifiers of others: timm's, torchvision's, modules of one's own. They stay as they are.

Letters in shapes: B images, C classes, D features.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from idml.errors import UserError, nearest
from idml.introspection.layers import find_layers, logits_of
from idml.models import ClassifierOutput
from idml.runtime import evaluation_mode

INSIDE = "module."
"""What stands before the names of a module of others in the network that wraps it."""


class ForeignClassifier(nn.Module):
    """Any module that gives (B, C) logits, with the named output of this project; its logits are the module's own.

    Args:
        module: gives logits: a tensor, or an output with ``logits`` in it.

    Attributes:
        features_of: name of the module inside whose input is the feature vector, the last linear layer; empty where
            there is none.
        feature_dim: D, of that; C where there is no such layer. Both are known after ``try_out`` or ``watch``.
    """

    ism = "off"
    uncertainty_dim = 1

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.features_of, self.feature_dim = "", 0
        self._features: list[Tensor] = []

    def try_out(self, images: Tensor, names: Sequence[str] | None = None) -> int:
        """Find the input of the last linear layer, by passes of (B, 3, S, S) images, B >= 2.

        Args:
            images: as the module takes them, on its device.
            names: of modules inside that are to be looked at, which are tried too.

        Returns:
            C, the number of logits.

        Raises:
            UserError: the module does not take the images, gives no logits, or has nothing to look at.
        """
        try:
            layers = find_layers(self.module, images, names)
            with torch.no_grad(), evaluation_mode(self.module):
                logits = logits_of(self.module(images))
        except UserError:
            raise
        except Exception as error:  # a module of somebody's own may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"the model does not take images of shape {tuple(images.shape[1:])}: {reason}") from error
        if len(logits) != len(images):
            raise UserError(
                f"expected a network that gives (B, C) logits, got {tuple(logits.shape)} for {len(images)} images"
            )
        self.watch(layers.features_of, layers.feature_dim or logits.shape[1])
        return logits.shape[1]

    def watch(self, features_of: str, feature_dim: int) -> None:
        """Take the input of a module inside for the features.

        Args:
            features_of: its name; empty: the logits are the features.
            feature_dim: D.

        Raises:
            UserError: there is no such module.
        """
        modules = dict(self.module.named_modules())
        if features_of not in modules:
            raise UserError(f"the network has no module {features_of!r}{nearest(features_of, modules)}")
        self.features_of, self.feature_dim = features_of, feature_dim
        if features_of:
            modules[features_of].register_forward_pre_hook(self._keep)

    def _keep(self, _module: nn.Module, given: tuple[Any, ...]) -> None:
        self._features[:] = [given[0].flatten(1)]

    def forward(self, images: Tensor) -> ClassifierOutput:
        """(B, 3, S, S) -> ClassifierOutput, without uncertainty."""
        logits = logits_of(self.module(images))
        features = self._features.pop() if self._features else logits
        return ClassifierOutput(
            logits, logits, features.float(), logits.new_zeros(logits.shape[0], self.uncertainty_dim)
        )


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
    make: Any
    own: dict[str, Any]
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
        made = make(**own, **arguments)
    except Exception as error:  # a function of somebody's own may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        with_these = f" with {dict(arguments)}" if arguments else ""
        raise UserError(f"the model {name} cannot be made{with_these}: {reason}") from error
    if not isinstance(made, nn.Module):
        raise UserError(f"{name} does not make a torch.nn.Module: it gives a {type(made).__name__}")
    return made


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    if not module or not function:
        raise UserError(f"expected package.module:function that makes the network, got {name!r}")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # importing runs the module
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot import {name}: {reason}") from error
