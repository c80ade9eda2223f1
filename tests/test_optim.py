"""Optimizers: every parameter is in one group, at the rate that is its own."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD

from idml import IntrospectiveClassifier, IntrospectiveEmbedder
from idml.config_cls import parse_cls_config
from idml.config_dml import parse_dml_config
from idml.losses import MetricLoss
from idml.optim import build_dml_optimizer, build_optimizer


def test_vectors_do_not_decay_where_that_is_asked_for() -> None:
    model = IntrospectiveClassifier("resnet8_cifar", 5, uncertainty_dim=8)
    config, _ = parse_cls_config(["--lr", "0.3", "--no-decay-bn-bias"], description="")
    optimizer = build_optimizer(model, config)
    assert type(optimizer) is SGD
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(p): 1e-4 if p.ndim > 1 else 0.0 for p in model.parameters()}
    assert all(group["lr"] == 0.3 for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop"])
def test_the_parameters_of_a_loss_have_a_rate_of_their_own(name: str) -> None:
    torch.manual_seed(0)
    model, loss = IntrospectiveEmbedder("resnet8_cifar", 8), MetricLoss("Proxy_Anchor", 5, 8)
    config, _ = parse_dml_config(["--lr", "1e-3", "--loss-lr-factor", "30", "--optimizer", name], description="")
    optimizer = build_dml_optimizer(model, loss, config)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rate == {id(p): 1e-3 for p in model.parameters()} | {id(p): 3e-2 for p in loss.parameters()}
