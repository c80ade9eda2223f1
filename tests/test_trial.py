"""The trial before training: sizes and arguments that a network does not take, told in one line; nothing is moved."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import train_cls
import train_dml
from idml.backbones import create_backbone
from idml.embedder import IntrospectiveEmbedder
from idml.errors import UserError, run_main
from idml.models import IntrospectiveClassifier
from idml.trial import fitting_sizes, try_out
from tests.tiny_models import write_photos, write_searched

OPTIONS = ["--batch-size", "8", "--max-steps", "1", "--threads", "1", "--workers", "0", "--loader", "torch"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few photos for each of the two scripts."""
    root = tmp_path_factory.mktemp("images")
    return {"cls": write_photos(root / "photos", train=4, test=2), "dml": write_searched(root / "searched")}


@pytest.fixture
def photos(in_tmp: Path, written: dict[str, Path]) -> dict[str, list[str]]:
    """Options of the two scripts for them."""
    common = ["--dataset", "folder", "--val-fraction", "0", *OPTIONS, "--data-dir"]
    return {
        "cls": [*common, str(written["cls"]), "--method", "baseline"],
        "dml": [*common, str(written["dml"]), "--ism", "off"],
    }


def refused(script: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error with exit code 2, before there is a run."""
    main = train_cls.main if script == "cls" else train_dml.main
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: main(arguments))  # type: ignore[arg-type, return-value]
    assert stop.value.code == 2 and not Path("runs").exists()
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def config(model: str, *model_kwargs: str) -> SimpleNamespace:
    return SimpleNamespace(
        model=model, model_kwargs=list(model_kwargs), precision="fp32", bn_freeze=False, eval_only=False
    )


def network(name: str, size: int, *, retrieval: bool = False) -> nn.Module:
    torch.manual_seed(0)
    backbone = create_backbone(name, image_size=size)
    if retrieval:
        return IntrospectiveEmbedder(backbone, 16)
    return IntrospectiveClassifier(backbone, 3)


@pytest.mark.parametrize("name", ["resnet8_cifar", "resnet10t", "levit_128s"])
@pytest.mark.parametrize("retrieval", [False, True])
def test_nothing_is_moved(name: str, retrieval: bool) -> None:
    size = 224 if name.startswith("levit") else 32
    model = network(name, size, retrieval=retrieval)
    model.backbone.get_submodule(next(key for key, _ in model.backbone.named_modules() if "bn" in key)).eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()]  # noqa: NPY002
    try_out(model, config(name), size, [size], [8])
    try_out(model, config(name), size, [], [8])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(parameter.grad is None for parameter in model.parameters())
    # What LeViT keeps of its weights in evaluation is not that of the trial.
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_() if "attention_bias" in key else parameter.mul_(0.9)
    fresh = network(name, size, retrieval=retrieval)
    fresh.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, size, size)
    for each in (model, fresh):
        for module in each.modules():
            module.training = False
    torch.testing.assert_close(model(images).semantic, fresh(images).semantic)


def test_it_takes_no_time() -> None:
    model = network("resnet20_cifar", 32)
    try_out(model, config("resnet20_cifar"), 32, [32], [8])
    started = time.perf_counter()
    try_out(model, config("resnet20_cifar"), 32, [32], [8])
    assert time.perf_counter() - started < 0.5, "0.01 s on an idle machine"


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("crossvit_tiny_240", 224, r"does not take images of 224 x 224 pixels \(.*it takes 240: --image-size 240"),
        ("nest_tiny", 100, r"cannot be made for images of 100 x 100 .*it takes 96 or 128 or 224: --image-size 96"),
        ("mvitv2_tiny", 100, r"does not take images of 100 x 100 .*IndexError.*it takes 96 or 128"),
        ("test_vit", 100, r"does not take images of 100 x 100 .*divisible by patch size.*it takes 96 or"),
        ("inception_v3", 32, r"does not take images of 32 x 32 .*Kernel size.*it takes 299"),
    ],
)
def test_sizes_that_a_model_does_not_take(name: str, size: int, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        try_out(network(name, size), config(name), size, [size], [8])


def test_a_size_that_is_told_is_taken() -> None:
    for size in fitting_sizes("halonet_h1", 100, {}):
        try_out(network("halonet_h1", size), config("halonet_h1"), size, [size], [8])
    assert fitting_sizes("resnet8_cifar", 32, {"in_chans": 1}) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "resnet8_cifar", "--image-size", "32", "--model-kwargs", "in_chans=1"], "no other size helps"),
        (["--model", "resnet10t", "--image-size", "64", "--model-kwargs", "drop_path_rate=2"], "no other size helps"),
        (
            ["--model", "resnet10t", "--image-size", "64", "--model-kwargs", "layers=1,1"],
            "with arguments layers=[1, 1]",
        ),
        (["--model", "resnet10t", "--image-size", "64", "--model-kwargs", "features_only=true"], "expected a backbone"),
        (["--model", "test_vit", "--image-size", "64", "--model-kwargs", "patch_size=0"], "ZeroDivisionError"),
        (
            ["--model", "vit_tiny_patch16_224", "--image-size", "64", "--model-kwargs", "depth=1,img_size=32"],
            "it takes 32: --image-size 32",
        ),
        (["--model", "nest_tiny", "--image-size", "100"], "it takes 96 or 128"),
    ],
)
@pytest.mark.parametrize("script", ["cls", "dml"])
def test_no_run_is_begun(
    photos: dict[str, list[str]], capsys: pytest.CaptureFixture[str], script: str, arguments: list[str], expected: str
) -> None:
    error = refused(script, [*photos[script], *arguments], capsys)
    assert expected in error


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            ["vit_tiny_patch16_224", "--model-kwargs", "depth=1"],
            "made for 160, does not take the 64 x 64 pixels of --pro",
        ),
        (["inception_v3"], "does not take the 64 x 64 pixels of --progressive .* of 32 to 96 it takes 96"),
    ],
)
def test_every_size_of_a_progressive_training_is_tried(
    photos: dict[str, list[str]], capsys: pytest.CaptureFixture[str], model: list[str], expected: str
) -> None:
    arguments = [*photos["cls"], "--image-size", "160", "--progressive", "64,96", "--epochs", "6"]
    assert re.search(expected, refused("cls", [*arguments, "--model", *model], capsys))
    if model[0].startswith("vit"):
        train_cls.main([*arguments, "--model", *model, "dynamic_img_size=true", "--output-dir", "run"])


@pytest.mark.parametrize(("name", "size"), [("coat_tiny", 64), ("efficientvim_m1", 64), ("crossvit_tiny_240", 240)])
def test_backbones_that_give_several_maps(name: str, size: int) -> None:
    """Pooled as the backbone pools them, in training and in evaluation."""
    model = network(name, size, retrieval=True)
    try_out(model, config(name), size, [size], [8])
    images = torch.rand(2, 3, size, size)
    output = model(images)
    output.semantic.sum().backward()
    trained = [each for key, each in model.backbone.named_parameters() if each.requires_grad]
    assert all(each.grad is not None for each in trained) and len(trained) > 20
    model.eval()
    with torch.no_grad():
        expected = nn.functional.normalize(model.semantic_head(model.backbone(images)), dim=1)
        torch.testing.assert_close(model(images).semantic, expected)


def test_a_backbone_without_a_way_to_pool_is_told() -> None:
    class Two(nn.Module):
        num_features = 4

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward_features(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [self.layer(images.mean((2, 3)))] * 2

    with pytest.raises(UserError, match="expected a feature map, tokens or features from the backbone, got a list"):
        try_out(IntrospectiveEmbedder(Two(), 8), config("resnet8_cifar"), 32, [32], [8])


def test_coat_trains_for_retrieval(photos: dict[str, list[str]]) -> None:
    arguments = [*photos["dml"], "--model", "coat_tiny", "--image-size", "64", "--warm", "0", "--no-nmi"]
    results = train_dml.main([*arguments, "--output-dir", "run"])
    assert 0 <= results["final"]["R@1"] <= 1
