"""Optimizers: the foresight head has one of its own, and both act as one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import MultiStepLR

from idml import IntrospectiveClassifier
from idml.config_cls import parse_cls_config
from idml.optim import HEAD_LR, HEAD_WEIGHT_DECAY, WithHead, build_optimizer, build_schedule, of_foresight


def classifier(uncertainty_loss: str) -> IntrospectiveClassifier:
    torch.manual_seed(0)
    return IntrospectiveClassifier("resnet8_cifar", 5, uncertainty_dim=8, uncertainty_loss=uncertainty_loss)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: MultiStepLR, steps: range) -> None:
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        images, labels = torch.randn(6, 3, 32, 32, generator=generator), torch.arange(6) % 5
        output = model.eval()(images)
        loss = nn.functional.cross_entropy(output.logits, labels) + output.foresight.foreseen_loss.log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def both(model: nn.Module) -> WithHead:
    own = {id(p) for p in of_foresight(model)}
    network = SGD([p for p in model.parameters() if id(p) not in own], lr=0.1, momentum=0.9, weight_decay=1e-4)
    return WithHead(network, AdamW(of_foresight(model), lr=HEAD_LR, weight_decay=HEAD_WEIGHT_DECAY))


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_every_parameter_is_in_one_of_them_and_the_head_in_its_own() -> None:
    model = classifier("loss-prediction")
    config, _ = parse_cls_config(["--lr", "0.3", "--no-decay-bn-bias"], description="")
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, WithHead)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {id(p): HEAD_LR if n.startswith("uncertainty_head.") else 0.3 for n, p in model.named_parameters()}
    assert rate == expected
    schedule = build_schedule(optimizer, config, steps_per_epoch=10, total_steps=10)
    peak = [0.0] * len(optimizer.param_groups)
    for _ in range(9):
        optimizer.step()
        schedule.step()
        peak = [max(a, b) for a, b in zip(peak, schedule.get_last_lr(), strict=True)]
    assert peak == pytest.approx([0.3, 0.3, HEAD_LR], rel=0.05)


def test_without_a_foresight_head_there_is_one_optimizer() -> None:
    config, _ = parse_cls_config([], description="")
    assert type(build_optimizer(classifier("none"), config)) is SGD


def test_both_do_what_each_does_alone() -> None:
    model = classifier("loss-prediction")
    twin = copy.deepcopy(model)
    optimizer, apart = both(model), both(twin).parts
    train(model, optimizer, MultiStepLR(optimizer, [2], gamma=0.1), range(4))
    schedules = [MultiStepLR(part, [2], gamma=0.1) for part in apart]

    class Each:
        zero_grad = staticmethod(lambda: [part.zero_grad() for part in apart])
        step = staticmethod(lambda: [part.step() for part in apart])

    class Schedules:
        step = staticmethod(lambda: [schedule.step() for schedule in schedules])

    train(twin, Each(), Schedules(), range(4))  # type: ignore[arg-type]
    assert same(model, twin)


def test_a_stored_state_goes_on_as_if_nothing_had_been(tmp_path: object) -> None:
    model = classifier("loss-prediction")
    optimizer = both(model)
    schedule = MultiStepLR(optimizer, [3], gamma=0.1)
    train(model, optimizer, schedule, range(2))
    stored = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    train(model, optimizer, schedule, range(2, 5))
    other = classifier("loss-prediction")
    fresh = both(other)
    later = MultiStepLR(fresh, [3], gamma=0.1)
    other.load_state_dict(stored[0])
    fresh.load_state_dict(stored[1])
    later.load_state_dict(stored[2])
    train(other, fresh, later, range(2, 5))
    assert same(model, other)
    with pytest.raises(KeyError):
        fresh.load_state_dict(SGD(model.parameters(), lr=0.1).state_dict())
