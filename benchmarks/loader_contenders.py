"""The loaders that `bench_loader.py` compares, each giving float32 batches as its own users would have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_loader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from augment import apply_crop, apply_flip, normalise, sample_crop, sample_flip
from idml.config_cls import parse_cls_config
from idml.data.beton import BetonSettings, import_ffcv
from idml.data.datasets import read_splits
from idml.data.image_dataset import IMAGENET_MEAN, IMAGENET_STD, ImageDataset, fit_square
from idml.data.image_files import list_class_folders
from idml.data.loaders import LoaderName, build_loader
from idml.errors import UserError

CIFAR_BATCH, JPEG_BATCH, JPEG_SIDE, PADDING = 128, 64, 500, 4
PHOTO_QUALITY = 90
TO_GPU = ", to GPU"
"""Behind the name of a loader whose bytes are left to a GPU to crop, flip and normalise."""

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True, slots=True)
class Contender:
    """A loader: ``epoch(number)`` gives its batches; ``loader`` is what it is made of."""

    epoch: Callable[[int], Batches]
    loader: Any


def release(contenders: dict[str, Contender]) -> None:
    """End the loaders' processes and threads before others are measured."""
    contenders.clear()


class InMemory(Dataset):
    """Images in memory, each made a PIL image and transformed, as torchvision's data sets of small images do it."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels.tolist()
        self.transform: Callable[[Image.Image], Tensor] | None = None  # timm sets this attribute

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index])
        return self.transform(image) if self.transform else image, self.labels[index]


def ours(loader: Any, padding: int, *, to_gpu: bool = False) -> Contender:
    """One of our loaders, and what the training script does with its batches.

    ``to_gpu`` stops at the loader's bytes: with a GPU the rest is done there, by the same functions.
    """
    if to_gpu:
        return Contender(loader.epoch, loader)

    def epoch(number: int) -> Batches:
        generator = torch.Generator().manual_seed(number)
        for images, labels in loader.epoch(number):
            offsets = sample_crop(len(images), padding=padding, generator=generator)
            flip = sample_flip(len(images), generator=generator)
            images = apply_crop(images, offsets, padding=padding, flip=flip) if padding else apply_flip(images, flip)
            yield normalise(images, IMAGENET_MEAN, IMAGENET_STD), labels

    return Contender(epoch, loader)


def torch_recipe(dataset: Any, batch_size: int, workers: int, crop: Any) -> Contender:
    """The recipe of torchvision's documentation and references: transforms in worker processes."""
    dataset.transform = transforms.Compose(
        [
            crop,
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    options: dict[str, Any] = {"persistent_workers": True, "worker_init_fn": one_thread}
    loader = DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, drop_last=True, **options)
    return Contender(lambda _number: iter(loader), loader)


def one_thread(_worker: int) -> None:
    """A worker process with one thread, which is torch's own default there."""
    torch.set_num_threads(1)


def timm_recipe(dataset: Any, batch_size: int, workers: int, size: int) -> Contender:
    """timm's loader, without its prefetcher, which needs a GPU; plain crop and flip."""
    loader = create_loader(
        dataset,
        input_size=(3, size, size),
        batch_size=batch_size,
        is_training=True,
        color_jitter=0.0,
        num_workers=workers,
        use_prefetcher=False,
        device=torch.device("cpu"),
        persistent_workers=workers > 0,
    )
    return Contender(lambda _number: iter(loader), loader)


def ffcv_recipe(written: Any, batch_size: int, workers: int, *, padding: int) -> Contender:
    """FFCV's own loader with its documentation's transforms, on the file that one of our loaders has written."""
    import_ffcv()
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, RandomTranslate, Squeeze, ToTensor, ToTorchImage

    side = written.image_size
    crop = [SimpleRGBImageDecoder()] if padding else [RandomResizedCropRGBImageDecoder((side, side))]
    moved = [RandomTranslate(padding=padding)] if padding else []
    mean, std = (255 * np.array(values) for values in (IMAGENET_MEAN, IMAGENET_STD))
    last = [NormalizeImage(mean, std, np.float32), ToTensor(), ToTorchImage()]
    pipelines = {
        "image": [*crop, RandomHorizontalFlip(), *moved, *last],
        "label": [IntDecoder(), ToTensor(), Squeeze(1)],
    }
    loader = Loader(
        str(written.path),
        batch_size,
        num_workers=workers,
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines=pipelines,
    )
    return Contender(lambda _number: iter(loader), loader)


def cifar_contenders(folder: Path, count: int) -> dict[str, Callable[[int], Contender]]:
    """What is compared at 32 pixels: the embedded Fashion-MNIST images, as often as it takes, in RGB."""
    data = read_splits(parse_cls_config(["--dataset", "fashion-mnist-mini"], description="")[0]).train
    assert data.images is not None
    rows = np.arange(count) % len(data)
    images = np.repeat(fit_square(data.images, 32)[rows], 3, axis=3)
    dataset = ImageDataset(labels=data.labels[rows], classes=data.classes, images=images)
    shared: dict[str, Any] = {"source": "cifar-size", "split": "train", "cache_dir": folder, "verbose": False}
    shared |= {"batch_size": CIFAR_BATCH, "image_size": 32, "train": True}

    def recipe(kind: LoaderName, *, to_gpu: bool = False) -> Callable[[int], Contender]:
        return lambda workers: ours(
            build_loader(dataset, loader=kind, workers=workers, **shared), PADDING, to_gpu=to_gpu
        )

    return {
        "torchvision": lambda workers: torch_recipe(
            InMemory(images, dataset.labels), CIFAR_BATCH, workers, transforms.RandomCrop(32, padding=PADDING)
        ),
        "timm": lambda workers: timm_recipe(InMemory(images, dataset.labels), CIFAR_BATCH, workers, 32),
        "FFCV's own": lambda workers: ffcv_recipe(
            build_loader(dataset, loader="ffcv", workers=1, **shared), CIFAR_BATCH, workers, padding=PADDING
        ),
        "ours, torch": recipe("torch"),
        "ours, FFCV": recipe("ffcv"),
        f"ours, torch{TO_GPU}": recipe("torch", to_gpu=True),
        f"ours, FFCV{TO_GPU}": recipe("ffcv", to_gpu=True),
    }


def make_photos(folder: Path, count: int) -> None:
    """``count`` different JPEGs of 500 pixels in 20 class folders, out of the 20 ImageNet photos of foolbox."""
    try:
        import foolbox
    except ImportError:
        raise UserError("the photos come from the package foolbox: pip install foolbox") from None
    sources = sorted((Path(foolbox.__file__).parent / "data").glob("imagenet_*"))
    generator = np.random.default_rng(0)
    for number in range(count):
        source = sources[number % len(sources)]
        with Image.open(source) as image:
            photo = image.convert("RGB")
        # A window of 60 to 100 % of each side, mirrored by chance, enlarged or reduced to 500 pixels.
        width, height = (round(side * generator.uniform(0.6, 1.0)) for side in photo.size)
        left, top = generator.integers(0, photo.width - width + 1), generator.integers(0, photo.height - height + 1)
        photo = photo.crop((left, top, left + width, top + height))
        if generator.random() < 0.5:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        scale = JPEG_SIDE / max(photo.size)
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BICUBIC)
        target = folder / source.stem / f"{number:05d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        photo.save(target, quality=PHOTO_QUALITY)


def jpeg_contenders(folder: Path, count: int) -> dict[str, Callable[[int], Contender]]:
    """What is compared on photos."""
    photos = folder / "photos" / "train"
    make_photos(photos, count)
    dataset = list_class_folders(photos, layout="class folders")
    shared: dict[str, Any] = {"source": "photos", "split": "train", "verbose": False}
    shared |= {"batch_size": JPEG_BATCH, "image_size": 224, "train": True}

    def places(settings: BetonSettings | None) -> dict[str, Any]:
        name = "default" if settings is None else f"{settings.mode}-{settings.max_side}"
        return {"cache_dir": folder / name, "settings": settings}

    def recipe(
        kind: LoaderName, settings: BetonSettings | None = None, *, to_gpu: bool = False
    ) -> Callable[[int], Contender]:
        return lambda workers: ours(
            build_loader(dataset, loader=kind, workers=workers, **shared, **places(settings)), 0, to_gpu=to_gpu
        )

    def their_own(settings: BetonSettings | None = None) -> Callable[[int], Contender]:
        return lambda workers: ffcv_recipe(
            build_loader(dataset, loader="ffcv", workers=1, **shared, **places(settings)),
            JPEG_BATCH,
            workers,
            padding=0,
        )

    return {
        "torchvision": lambda workers: torch_recipe(
            ImageFolder(photos), JPEG_BATCH, workers, transforms.RandomResizedCrop(224)
        ),
        "timm": lambda workers: timm_recipe(ImageFolder(photos), JPEG_BATCH, workers, 224),
        "FFCV's own": their_own(),
        "FFCV's own, raw": their_own(BetonSettings(mode="raw")),
        "FFCV's own, raw, 400": their_own(BetonSettings(mode="raw", max_side=400)),
        "ours, torch": recipe("torch"),
        "ours, FFCV": recipe("ffcv"),
        "ours, FFCV, raw": recipe("ffcv", BetonSettings(mode="raw")),
        "ours, FFCV, raw, 400": recipe("ffcv", BetonSettings(mode="raw", max_side=400)),
        f"ours, torch{TO_GPU}": recipe("torch", to_gpu=True),
        f"ours, FFCV{TO_GPU}": recipe("ffcv", to_gpu=True),
        f"ours, FFCV, raw{TO_GPU}": recipe("ffcv", BetonSettings(mode="raw"), to_gpu=True),
    }
