"""``idml.introspect``: any classifier in memory learns to say when it is wrong, what is new to it, when to refuse.

Letters in shapes: N images, C classes, S pixels.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from augment import normalise
from idml.data.image_dataset import ImageDataset, Preprocessing
from idml.data.names import composed
from idml.data.torch_loader import as_evaluated
from idml.errors import UserError
from idml.foreign import INSIDE, ForeignClassifier
from idml.foreign_weights import cut_origin, timm_preprocessing
from idml.given_images import Images, as_pil
from idml.introspecting import introspect_network, some_images
from idml.introspection.features import CACHE_BYTES
from idml.runtime import choose_device
from idml.spec import ModelSpec, Origin
from idml.trained import TrainedModel

USUAL_SIZE = 224
"""S where neither the module nor the images say one."""


def introspect(
    module: nn.Module,
    images: Images,
    labels: Sequence[int] | np.ndarray | Tensor,
    *,
    train_images: Images | None = None,
    train_labels: Sequence[int] | np.ndarray | Tensor | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    layers: Sequence[str] | None = None,
    cache_bytes: int = CACHE_BYTES,
    seed: int = 0,
    device: str = "auto",
    made_by: str | None = None,
) -> TrainedModel:
    """A classifier with P(wrong), novelty and thresholds; its logits are the module's own, to the bit.

    It takes one pass over the images, and seconds after that. Held-out images are the better the more there are: under
    100 nothing is calibrated, which is warned of. Where the network has not memorised its training images, they are
    worth giving too.

    Args:
        module: takes (B, 3, S, S) float32 and gives (B, C) logits: a tensor, or an output with ``logits`` in it. It is
            left as it is: the model has a copy of it (or the module itself, if it cannot be copied).
        images: that it was not trained on, N of them; see ``idml.trained.Images``.
        labels: (N,) integers in [0, C).
        train_images, train_labels: the same of images that it was trained on, if there are any at hand.
        classes: C names in the order of the labels; by default the numbers.
        preprocessing: how an image becomes the module's input; by default what timm records with its models, else
            ImageNet's mean and standard deviation at the size of the images, if all are squares of one size, or 224.
        layers: names of modules to look at, in place of those that are found.
        cache_bytes: of what is kept of the images meanwhile; beyond it fewer of them are read, as many of each class.
        seed: of all that is drawn.
        device: auto (cuda, then mps, then cpu), cpu, cuda or mps.
        made_by: for a model that is to be saved: what makes the module again, ``timm/NAME``, ``torchvision/NAME`` or
            ``package.module:function``.

    Raises:
        UserError: images and labels do not go together, or not with the module; it gives no logits, or has no layer to
            look at.
    """
    made: tuple[Origin, str] = ("module", "") if made_by is None else cut_origin(made_by)
    square = preprocessing or timm_preprocessing(module) or _usual(images)
    held_out = _dataset(images, labels, square, "images")
    train = None
    if (train_images is None) != (train_labels is None):
        raise UserError("expected train_images and train_labels together, got one of them")
    if train_images is not None and train_labels is not None:
        train = _dataset(train_images, train_labels, square, "train_images")
    place = choose_device(device)
    network = ForeignClassifier(_copied(module)).to(place).eval().requires_grad_(False)
    some = some_images(held_out, square).to(place)
    count = network.try_out(normalise(some, square.mean, square.std), layers)
    names = tuple(map(str, range(count))) if classes is None else tuple(composed(str(name)) for name in classes)
    if len(names) != count:
        raise UserError(f"the module gives {count} logits, and there are {len(names)} classes")
    _check_labels(held_out, count, "labels")
    if train is not None:
        _check_labels(train, count, "train_labels")
    fitted = introspect_network(
        network,
        "classification",
        count,
        square,
        train=train,
        held_out=held_out,
        names=None if layers is None else [INSIDE + name for name in layers],
        cache_bytes=cache_bytes,
        seed=seed,
    )
    described = fitted.introspection.spec
    if described.note:
        warnings.warn(f"P(wrong) is not calibrated: {described.note}", UserWarning, stacklevel=2)
    spec = ModelSpec(
        task="classification",
        model=made[1],
        model_kwargs={},
        classes=names,
        preprocessing=square,
        ism="off",
        uncertainty_dim=1,
        method=type(module).__name__,
        origin=made[0],
        features_of=network.features_of,
        feature_dim=network.feature_dim,
        introspection=described.as_json(),
    )
    source = Path(f"<{type(module).__name__} in memory>")
    return TrainedModel(network, spec, device=place, source=source, introspection=fitted.introspection)


def _copied(module: nn.Module) -> nn.Module:
    """Of the network inside torch.compile, or inside what spreads it over GPUs, whose hooks are not its own."""
    while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module) or (
        isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        and isinstance(inner := module.module, nn.Module)
    ):
        module = inner
    try:
        return copy.deepcopy(module)
    except Exception:  # locks, generators, tensors that were computed: whatever a module may hold
        return module


def _usual(images: Images) -> Preprocessing:
    """ImageNet's, at the size of the images if all are squares of one size."""
    sizes = {each.size for each in _each(images)}
    (width, height), *others = sizes or {(0, 1)}
    if width == height and not others:
        return Preprocessing(image_size=width, fit="whole")
    return Preprocessing(image_size=USUAL_SIZE)


def _each(images: Images) -> Iterator[Image.Image]:
    """One after the other: a list may be of photos that are not decoded yet."""
    if isinstance(images, Sequence):
        for image in images:
            yield from as_pil(image)
    else:
        yield from as_pil(images)


def _dataset(images: Images, labels: Any, square: Preprocessing, what: str) -> ImageDataset:
    """The images as evaluation shows them, in memory."""
    numbers = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if numbers.ndim != 1 or (numbers.dtype.kind not in "iu" and numbers.size):
        raise UserError(f"expected labels (N,) of integers, got {numbers.dtype} of shape {numbers.shape}")
    if not len(numbers):
        raise UserError(f"expected at least one of {what} with its label, got none")
    planes = np.empty((len(numbers), 3, square.image_size, square.image_size), np.uint8)
    count = 0
    for count, image in enumerate(_each(images), 1):
        if count <= len(planes):
            planes[count - 1] = as_evaluated(image, square).numpy()
    if count != len(numbers):
        raise UserError(f"expected a label for each of the {count} {what}, got {len(numbers)}")
    # As loaders take them, without a copy: see ``idml.data.torch_loader``.
    return ImageDataset(labels=numbers.astype(np.int64), classes=(), images=planes.transpose(0, 2, 3, 1))


def _check_labels(dataset: ImageDataset, count: int, what: str) -> None:
    low, high = int(dataset.labels.min()), int(dataset.labels.max())
    if low < 0 or high >= count:
        raise UserError(
            f"expected {what} from 0 to {count - 1}, for the module gives {count} logits; got {low} to {high}"
        )
