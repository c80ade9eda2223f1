"""Pretrained weights bring their preprocessing: mean, standard deviation, crop and filter, wherever a model is used."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform

import idml
import train_cls
import train_dml
from augment import normalise
from idml.commands.embed import embed
from idml.commands.evaluate import evaluate
from idml.commands.export import export
from idml.commands.info import info
from idml.config_cls import ClsConfig
from idml.config_dml import DmlConfig
from idml.data.cls_loaders import build_cls_loaders
from idml.data.datasets import FASHION_MEAN, FASHION_STD, read_splits
from idml.data.dml_loaders import build_dml_loaders
from idml.data.image_dataset import CROP_SHARE, IMAGENET_MEAN, IMAGENET_STD, Preprocessing, read_rgb
from idml.data.retrieval_datasets import read_retrieval_data
from idml.data.torch_loader import as_evaluated
from idml.errors import UserError
from idml.pretrained import with_weights_preprocessing
from idml.spec import ModelSpec
from idml.transformer import IntrospectiveTransformer
from tests.test_published_datasets import photos
from tests.tiny_models import write_photos, write_searched

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
OWN_MEAN, OWN_STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)

VIT = "test_vit"
"""timm's smallest transformer; its weights want mean and std 0.5, a bicubic filter and a crop of 0.95."""

TRAIN = ["--model", VIT, "--max-steps", "1", "--no-verbose", "--workers", "0", "--threads", "1", "--batch-size", "12"]
TRAIN += ["--no-introspect", "--val-fraction", "0"]
RETRIEVAL = ["--embedding-size", "16", "--warm", "0", "--no-nmi"]


def about(preprocessing: Preprocessing) -> tuple[Any, ...]:
    return preprocessing.mean, preprocessing.std, preprocessing.crop_share, preprocessing.interpolation


PHOTOS, SMALL = Preprocessing(image_size=64), Preprocessing(image_size=32, mean=OWN_MEAN, std=OWN_STD, fit="whole")


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(0)
    torch.save(timm.create_model(VIT, img_size=64).state_dict(), tmp_path / "vit.pth")
    return str(tmp_path / "vit.pth")


def config(dml: bool = False, **values: Any) -> ClsConfig | DmlConfig:
    return (DmlConfig if dml else ClsConfig)(**{"dataset": "folder", "pretrained": "timm"} | values)


# ---- what is known of weights ----


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("resnet50", (IMAGENET_MEAN, IMAGENET_STD, 0.95, "bicubic")),
        ("vit_small_patch16_224", (HALF, HALF, 0.9, "bicubic")),
        ("vit_small", (HALF, HALF, 0.9, "bicubic")),
        ("inception_v3", (HALF, HALF, 0.875, "bicubic")),
        ("vit_base_patch16_clip_224.openai", (CLIP_MEAN, (0.26862954, 0.26130258, 0.27577711), 0.9, "bicubic")),
        ("googlenet", (IMAGENET_MEAN, IMAGENET_STD, 0.875, "bilinear")),
        ("test_resnet", (HALF, HALF, 0.95, "bilinear")),
        ("resnet20_cifar", (IMAGENET_MEAN, IMAGENET_STD, CROP_SHARE, "bilinear")),
    ],
)
@pytest.mark.parametrize("dml", [False, True])
def test_what_timm_records(model: str, expected: tuple[Any, ...], dml: bool) -> None:
    assert about(with_weights_preprocessing(PHOTOS, config(dml, model=model))) == expected
    small = with_weights_preprocessing(SMALL, config(dml, model=model, dataset="emoji" if dml else "digits"))
    own = model == "resnet20_cifar"  # nobody publishes weights of it: the data set's statistics stay
    assert about(small) == (OWN_MEAN if own else expected[0], OWN_STD if own else expected[1], CROP_SHARE, "bilinear")
    assert (small.fit, small.image_size) == ("whole", 32)
    assert with_weights_preprocessing(PHOTOS, config(dml, model=model, pretrained=None)) is PHOTOS


def test_published_retrieval_sets_keep_their_crop() -> None:
    for dataset in ("cub", "cars", "sop", "inshop"):
        found = with_weights_preprocessing(PHOTOS, config(True, dataset=dataset, model="vit_small"))
        assert about(found) == (HALF, HALF, CROP_SHARE, "bilinear")


def test_a_crop_that_timm_pads_is_the_whole_image() -> None:
    names = [name for name in timm.list_models() if timm.get_pretrained_cfg(name).crop_pct > 1]
    assert names
    assert with_weights_preprocessing(PHOTOS, config(model=names[0])).crop_share == 1


def test_an_unknown_model_is_one_line() -> None:
    with pytest.raises(UserError, match="unknown model 'resnet51'; did you mean"):
        with_weights_preprocessing(PHOTOS, config(model="resnet51"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, (HALF, HALF, 0.95, "bicubic")),
        (
            {"args": argparse.Namespace(mean=None, std=None, crop_pct=None, interpolation="")},
            (HALF, HALF, 0.95, "bicubic"),
        ),
        (
            {
                "args": argparse.Namespace(
                    mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], crop_pct=0.8, interpolation="bilinear"
                )
            },
            (OWN_MEAN, OWN_STD, 0.8, "bilinear"),
        ),
        ({"args": argparse.Namespace(mean=[0.25], std=[0.5])}, ((0.25,) * 3, HALF, 0.95, "bicubic")),
        (
            {"args": argparse.Namespace(val_resize_size=232, val_crop_size=224, interpolation="bilinear")},
            (HALF, HALF, 224 / 232, "bilinear"),
        ),
        (
            {"preprocessing": {"image_size": 28, "mean": OWN_MEAN, "std": OWN_STD, "fit": "whole"}},
            (OWN_MEAN, OWN_STD, 0.95, "bicubic"),
        ),
    ],
    ids=["nothing", "timm's, not set", "timm's", "one number", "torchvision's", "this project's"],
)
def test_what_a_file_says(tmp_path: Path, content: dict[str, Any], expected: tuple[Any, ...]) -> None:
    torch.save({"state_dict": {"a": torch.zeros(2)}} | content, tmp_path / "w.pth")
    found = with_weights_preprocessing(PHOTOS, config(model=VIT, pretrained=str(tmp_path / "w.pth")))
    assert about(found) == expected


def test_what_lies_beside_a_file_of_timms_hub(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    described = {"pretrained_cfg": {"mean": OWN_MEAN, "std": OWN_STD, "crop_pct": 0.8, "interpolation": "bilinear"}}
    (tmp_path / "config.json").write_text(json.dumps(described), encoding="utf-8")
    chosen = config(model=VIT, pretrained=str(tmp_path / "model.safetensors"))
    assert about(with_weights_preprocessing(PHOTOS, chosen)) == (OWN_MEAN, OWN_STD, 0.8, "bilinear")
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    other = config(model=VIT, pretrained=str(tmp_path / "other.safetensors"))
    assert with_weights_preprocessing(PHOTOS, other).mean == HALF, "config.json is not of this file"
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        with_weights_preprocessing(PHOTOS, chosen)


def test_values_that_cannot_be(tmp_path: Path) -> None:
    wrong = {"mean": OWN_MEAN, "std": (0.5, 0.5, 0.0)}
    torch.save({"state_dict": {"a": torch.zeros(2)}, "preprocessing": wrong}, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"w\.pth: its preprocessing cannot be used: expected a std of positive numbers"
    ):
        with_weights_preprocessing(PHOTOS, config(model=VIT, pretrained=str(tmp_path / "w.pth")))


@pytest.mark.parametrize(
    ("name", "value"),
    [("crop_share", 0), ("crop_share", 1.1), ("interpolation", "nearest"), ("fit", "squash"), ("mean", (0.5,))],
)
def test_preprocessing_is_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        Preprocessing(**{"image_size": 64, name: value})


def test_usual_sizes_are_what_they_were() -> None:
    """Evaluation without pretrained weights: round(256 / 224 of the size)."""
    assert all(Preprocessing(image_size=size).resized_side == round(size * (256 / 224)) for size in range(8, 2000))


# ---- in a run, and in all that is done with its model ----


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("data") / "photos")


def run_cls(photos: Path, weights: str, out: Path, *more: str) -> dict[str, Any]:
    options = ["--dataset", "folder", "--data-dir", str(photos), "--image-size", "64", "--loader", "torch"]
    results = train_cls.main([*TRAIN, *options, "--pretrained", weights, "--output-dir", str(out), *more])
    assert results is not None
    return results


def test_a_trained_model_prepares_photos_as_timm_does(
    tmp_path: Path, photo_folder: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_cls(photo_folder, weights, tmp_path / "run")
    line = (
        "images are normalised as the weights expect: mean 0.5 0.5 0.5, std 0.5 0.5 0.5; evaluation resizes by bicubic"
    )
    assert f"{line} and crops 0.95 of the side\n" in capsys.readouterr().out
    model = idml.load(tmp_path / "run")
    assert about(model.spec.preprocessing) == (HALF, HALF, 0.95, "bicubic")
    assert ModelSpec.from_json(json.loads(json.dumps(model.spec.as_json())), "here") == model.spec
    oracle = create_transform((3, 64, 64), mean=HALF, std=HALF, interpolation="bicubic", crop_pct=64 / 67)  # 67.4
    images = [Image.open(file).convert("RGB") for file, _ in photos("imagenet")[:3]]
    ours = normalise(model.prepare(images), model.spec.preprocessing.mean, model.spec.preprocessing.std)
    torch.testing.assert_close(ours, torch.stack([oracle(image) for image in images]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("loader", ["torch", "ffcv"])
def test_every_command_takes_them_from_the_model(
    tmp_path: Path, photo_folder: Path, weights: str, loader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when the file of weights is gone: a run that resumes, --eval-only, evaluate, info, embed, export."""
    if loader == "ffcv":
        pytest.importorskip("ffcv")
    run = tmp_path / "run"
    first = run_cls(photo_folder, weights, run, "--loader", loader, "--cache-dir", str(tmp_path / "cache"))["final"]
    Path(weights).unlink()
    checkpoint = str(run / "checkpoints/last.pt")
    again = train_cls.main(["--eval-only", "--checkpoint", checkpoint, "--output-dir", str(tmp_path / "again")])
    assert again is not None and again["nll"] == pytest.approx(first["nll"], abs=1e-5)
    model, files = idml.load(run), sorted((photo_folder / "val").rglob("*.png"))
    labels = np.array([int(path.parent.name[-1]) for path in files])
    found = model.predict([Image.open(path) for path in files])
    nll = -np.log(found.probabilities[np.arange(len(labels)), labels]).mean()
    assert nll == pytest.approx(first["nll"], abs=1e-4)
    capsys.readouterr()
    evaluate(["--checkpoint", str(run), "--out", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert figures["nll"] == pytest.approx(first["nll"], abs=1e-4)
    capsys.readouterr()
    info([str(run)])
    assert "64 x 64 (crop of 0.95, bicubic), mean 0.5000 0.5000 0.5000, std 0.5000" in capsys.readouterr().out
    export(["--checkpoint", str(run), "--format", "timm", "--out", str(tmp_path / "timm")])
    described = json.loads((tmp_path / "timm/config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
    assert (described["mean"], described["crop_pct"], described["interpolation"]) == (list(HALF), 0.95, "bicubic")
    train_cls.main(["--resume", str(run), "--max-steps", "2"])
    assert about(idml.load(run).spec.preprocessing) == (HALF, HALF, 0.95, "bicubic")


def test_small_images_in_memory_are_normalised_for_the_weights(tmp_path: Path, weights: str) -> None:
    options = ["--image-size", "64", "--pretrained", weights, "--output-dir", str(tmp_path / "run")]
    train_cls.main([*TRAIN, *options])
    found = idml.load(tmp_path / "run").spec.preprocessing
    assert about(found) == (HALF, HALF, CROP_SHARE, "bilinear") and found.fit == "whole"
    without = read_splits(ClsConfig(val_fraction=0.0)).preprocessing
    assert (without.mean, without.std) == (FASHION_MEAN, FASHION_STD)


@pytest.mark.parametrize("dataset", ["emoji-mini", "folder"])
def test_retrieval_takes_them_too(tmp_path: Path, weights: str, dataset: str) -> None:
    run, options = tmp_path / "run", ["--dataset", dataset, "--image-size", "64", "--loader", "torch"]
    if dataset == "folder":
        options += ["--data-dir", str(write_searched(tmp_path / "data"))]
    first = train_dml.main([*TRAIN, *RETRIEVAL, *options, "--pretrained", weights, "--output-dir", str(run)])
    assert first is not None
    Path(weights).unlink()
    found = idml.load(run).spec.preprocessing
    assert about(found)[:2] == (HALF, HALF)
    assert about(found)[2:] == ((0.95, "bicubic") if dataset == "folder" else (CROP_SHARE, "bilinear"))
    again = train_dml.main(["--eval-only", "--checkpoint", str(run / "checkpoints/last.pt"), "--no-nmi"])
    assert again is not None and again["R@1"] == first["final"]["R@1"]
    evaluate(["--checkpoint", str(run), "--no-nmi", "--out", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert figures["R@1"] == pytest.approx(first["final"]["R@1"])
    embed(["--checkpoint", str(run), "--out", str(tmp_path / "all.parquet")])


@pytest.mark.parametrize("dml", [False, True])
def test_training_images_are_shown_as_evaluation_shows_them(
    tmp_path: Path, photo_folder: Path, weights: str, dml: bool
) -> None:
    """Where they are measured or drawn; through FFCV, whose loader decodes by itself."""
    pytest.importorskip("ffcv")
    folder = write_searched(tmp_path / "data") if dml else photo_folder
    values: dict[str, Any] = {
        "data_dir": str(folder),
        "image_size": 64,
        "batch_size": 4,
        "model": VIT,
        "pretrained": weights,
        "val_fraction": 0.0,
    }
    values |= {"ks": [1]} if dml else {}
    chosen = config(dml, **values, loader="ffcv", cache_dir=str(tmp_path / "cache"))
    data = read_retrieval_data(chosen) if dml else read_splits(chosen)
    loaders = (build_dml_loaders if dml else build_cls_loaders)(data, chosen, pin_memory=False)
    for loader in (loaders.train, loaders.test):
        shown = as_evaluated(read_rgb(loader.dataset.paths[1]), data.preprocessing)
        assert torch.equal(loader.images_at([1])[0], shown)
        assert not torch.equal(shown, as_evaluated(read_rgb(loader.dataset.paths[1]), PHOTOS))


def test_weights_of_a_run_of_this_project_keep_its_preprocessing(tmp_path: Path, weights: str) -> None:
    """A second training on other images starts from the first one's checkpoint."""
    small = ["--model", "resnet8_cifar", "--max-steps", "1", "--no-verbose", "--no-introspect"]
    train_cls.main([*small, "--output-dir", str(tmp_path / "first")])
    first = str(tmp_path / "first/checkpoints/last.pt")
    train_cls.main([*small, "--dataset", "digits", "--pretrained", first, "--output-dir", str(tmp_path / "second")])
    found = idml.load(tmp_path / "second").spec.preprocessing
    assert (found.mean, found.std) == (FASHION_MEAN, FASHION_STD)


def test_the_transformer_takes_them_and_prints_nothing(
    weights: str, fashion: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = fashion["train_images"][:60], fashion["train_labels"][:60]
    options = {"pretrained": weights, "max_steps": 1}
    made = IntrospectiveTransformer(VIT, image_size=64, epochs=1, val_fraction=0, batch_size=20, options=options)
    made.fit(images, labels)
    assert about(made.model_.spec.preprocessing)[:2] == (HALF, HALF)
    assert capsys.readouterr().out == ""


def test_checkpoints_from_before_crop_and_filter_were_stored(tmp_path: Path, photo_folder: Path, weights: str) -> None:
    run_cls(photo_folder, weights, tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)
    for name in ("crop_share", "interpolation"):
        del checkpoint["preprocessing"][name]
    torch.save(checkpoint, tmp_path / "old.pt")
    assert about(idml.load(tmp_path / "old.pt").spec.preprocessing) == (HALF, HALF, CROP_SHARE, "bilinear")
    chosen = config(model=VIT, pretrained=None, eval_only=True, checkpoint=str(tmp_path / "old.pt"))
    assert about(with_weights_preprocessing(PHOTOS, chosen)) == (HALF, HALF, CROP_SHARE, "bilinear")
