"""Embeddings and uncertainty of images as a step of a scikit-learn pipeline."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from idml.data.image_dataset import DataSplits, ImageDataset, Preprocessing, hold_out
from idml.data.names import composed
from idml.data.pixels import read_rgb
from idml.data.torch_loader import as_evaluated
from idml.errors import UserError
from idml.paths import missing, user_path
from idml.pretrained import with_weights_preprocessing
from idml.random_state import random_state, set_random_state
from idml.trained import Embeddings, as_pil, load

LARGEST_SIZE = 224
"""Pixels of a side that ``image_size=None`` goes up to: what most backbones were made for."""

SIZE_STEP = 32
"""Such sizes are multiples of this, by which most backbones shrink an image."""

CHUNK = 256
"""Images that are opened at a time."""

NOT_OPTIONS = {
    *("model", "method", "image_size", "epochs", "batch_size", "val_fraction", "seed", "device", "output_dir"),
    *("dataset", "data_dir", "train_dir", "val_dir", "download", "skip_bad_images", "loader", "workers", "cache_dir"),
    *("checkpoint", "eval_only", "resume", "expname", "verbose", "progressive"),
}
"""Options of train_cls.py that are parameters here, or have no place here."""


class IntrospectiveTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Trains a classifier on labelled images, or takes a trained model, and turns images into embeddings.

    Images are an array (N, H, W), (N, H, W, 1) or (N, H, W, 3), integers from 0 to 255 or floating numbers from 0 to 1;
    a tensor (N, 1 or 3, H, W) of the same; or N of PIL images, single arrays and paths of files. They are held in
    memory at the model's size: large collections are for ``train_cls.py``.

    Args:
        model: timm's name of the backbone, or one of this project; for images of 32 pixels or so ``resnet20_cifar``.
        method: one of the six methods of ``train_cls.py``.
        image_size: side of the square that images are brought to; None takes the shorter side of the images, rounded up
            to a multiple of 32, and at most 224.
        epochs: passes over the training images.
        batch_size: images a step; fewer where there are fewer.
        val_fraction: share of the images that are held out in ``fit``, on which the score is calibrated to be the
            probability of an error; 0 holds none out.
        seed: of weights, order and augmentation; the global generators are left as they were.
        options: any other option of ``train_cls.py``, ``{"lr": 0.05, "flip": False}`` for example.
        checkpoint: a run directory, checkpoint file or exported folder: ``fit`` then only loads it.
        output_dir: run directory of the training; None keeps none.
        device: auto, cpu, cuda or mps.
        verbose: print what a training prints.

    Attributes:
        model_: ``TrainedModel``.
        classes_: (C,) the values of ``y``, or names of the checkpoint's classes. Position is the model's label.
        results_: figures of the last epoch, on the held-out images (without any: on the training images); empty with
            ``checkpoint``.

    Raises:
        UserError: bad parameters, images or labels; it is a ValueError.
    """

    def __init__(
        self,
        model: str = "resnet20_cifar",
        method: str = "ism",
        *,
        image_size: int | None = None,
        epochs: int = 10,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        seed: int = 1,
        options: Mapping[str, Any] | None = None,
        checkpoint: str | Path | None = None,
        output_dir: str | Path | None = None,
        device: str = "auto",
        verbose: bool = False,
    ) -> None:
        self.model = model
        self.method = method
        self.image_size = image_size
        self.epochs = epochs
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.options = options
        self.checkpoint = checkpoint
        self.output_dir = output_dir
        self.device = device
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on images and their labels; with ``checkpoint``, load it.

        Args:
            X: N images, see the class. With ``checkpoint`` they are not looked at.
            y: (N,) labels of at least two classes. With ``checkpoint`` not needed.
        """
        if self.checkpoint is not None:
            self._warn_without_effect()
            self.model_ = load(self.checkpoint, device=self.device)
            self.classes_ = np.array(self.model_.classes)
            self.results_: dict[str, Any] = {}
        else:
            images = _images(X)
            self.classes_, labels = _labels(y, len(images))
            self._train(images, labels)
        spec = self.model_.spec
        self._n_features_out = spec.embedding_size or self.model_.network.feature_dim
        return self

    def transform(self, X: Any) -> np.ndarray:
        """(N, D) float32: the semantic embeddings of N images."""
        return self.embed(X).semantic

    def score_uncertainty(self, X: Any) -> np.ndarray:
        """(N,) float32, higher for a more ambiguous image; ``model_.score_name`` says what it is.

        Raises:
            UserError: a plain retrieval model has no score.
        """
        found = self.embed(X)
        if self.model_.score_name == "none":
            raise UserError(f"{self.model_.source} is a plain retrieval model (ISM off): it has no uncertainty")
        return found.uncertainty

    def embed(self, X: Any) -> Embeddings:
        """All that the model says of N images, in one pass."""
        check_is_fitted(self, "model_")
        images = _images(X)
        chunks = (images[start : start + CHUNK] for start in range(0, len(images), CHUNK))
        return Embeddings.joined(
            [self.model_.embed([_opened(image) for image in chunk], batch_size=self.batch_size) for chunk in chunks]
        )

    def _train(self, images: Sequence[Any], labels: np.ndarray) -> None:
        """Train as ``train_cls.py`` does, and take the model of the last epoch."""
        from idml.config_cls import parse_cls_config
        from idml.signals import StopSignals

        config, _ = parse_cls_config(self._arguments(), description="")
        size = self.image_size or _usual_size(images)
        whole_images = Preprocessing(image_size=size, fit="whole")
        square = with_weights_preprocessing(whole_images, config, verbose=self.verbose)
        pixels = torch.stack([as_evaluated(as_pil(_opened(image))[0], square) for image in images])
        names = tuple(str(name) for name in self.classes_)
        whole = ImageDataset(labels=labels, classes=names, images=pixels.permute(0, 2, 3, 1).numpy())
        train, val = hold_out(whole, config.val_fraction, config.seed) if config.val_fraction else (whole, None)
        if val is not None and not len(val):
            raise UserError(f"val_fraction {self.val_fraction}: no class has two images, so none can be held out")
        config.image_size, config.batch_size = size, min(config.batch_size, len(train))
        config.flip = True if config.flip is None else config.flip
        config.crop_padding = 4 if config.crop_padding is None else config.crop_padding
        data = DataSplits(train=train, test=whole if val is None else val, val=val, preprocessing=square)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_generators_kept())
            folder = self.output_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="idml-"))
            config.output_dir = str(folder)
            if not self.verbose:
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            self.results_ = importlib.import_module("train_cls").run_config(config, StopSignals(), data)["final"]
            self.model_ = load(folder, device=self.device)

    def _arguments(self) -> list[str]:
        """The command line of ``train_cls.py`` that this training is."""
        options = dict(self.options or {})
        if taken := sorted(NOT_OPTIONS & set(options)):
            raise UserError(
                f"options: {', '.join(taken)} cannot be given there: a parameter of its own, or none at all"
            )
        own = {
            name: getattr(self, name) for name in ("model", "method", "epochs", "batch_size", "val_fraction", "seed")
        }
        own |= {
            "device": self.device,
            "verbose": bool(self.verbose),
            "dataset": "folder",
            "loader": "torch",
            "workers": 0,
        }
        own["image_size"] = self.image_size
        arguments: list[str] = []
        for name, value in (own | options).items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, (list, tuple)):
                arguments += [flag, *map(str, value)]
            elif value is not None:
                arguments.append(f"{flag}={str(value).lower() if isinstance(value, bool) else value}")
        return arguments

    def _warn_without_effect(self) -> None:
        """Warn of each parameter that a training alone would read."""
        read = ("checkpoint", "device", "batch_size")
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if name not in ("self", *read) and getattr(self, name) != parameter.default:
                reason = "the checkpoint is loaded as it is"
                warnings.warn(f"{name}={getattr(self, name)!r} has no effect: {reason}", UserWarning, stacklevel=3)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.three_d_array = False, True
        tags.target_tags.required = self.checkpoint is None
        tags.no_validation = True
        return tags


def _images(X: Any) -> Sequence[Any]:
    """N images or paths, one by one."""
    if isinstance(X, (str, bytes, Path, Image.Image)) or not hasattr(X, "__len__"):
        raise UserError(f"expected N images as an array, a tensor or a sequence, got one {type(X).__name__}")
    if isinstance(X, np.ndarray) and X.dtype.kind not in "OUS" and X.ndim not in (3, 4):
        raise UserError(
            f"expected images (N, H, W) or (N, H, W, 3), got an array of shape {X.shape}; reshape rows of pixels"
        )
    if isinstance(X, Tensor) and X.ndim != 4:
        raise UserError(f"expected a tensor (N, 1 or 3, H, W), got shape {tuple(X.shape)}")
    if len(X) == 0:
        raise UserError("expected at least one image, got none")
    return list(X)


def _opened(image: Any) -> Any:
    """The image of a path; anything else as it is."""
    if not isinstance(image, (str, Path)):
        return image
    path = user_path(image)
    if not path.exists():
        raise UserError(f"{image} is no image that can be read: {missing(path, 'image')}")
    try:
        return read_rgb(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{image} is no image that can be read: {error}") from None


def _labels(y: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """((C,) the classes, (N,) int64 positions in them)."""
    if y is None:
        raise UserError("fit needs y, the labels of the images; or give checkpoint, a model that is trained already")
    given = np.asarray(y)
    if given.dtype.kind in "UO":
        named = [composed(name) if isinstance(name, str) else name for name in given.ravel().tolist()]
        given = np.array(named, given.dtype if given.dtype.kind == "O" else None).reshape(given.shape)
    if given.shape != (count,):
        raise UserError(f"expected y of shape ({count},), a label for each image, got {given.shape}")
    if given.dtype.kind == "f" and not np.isfinite(given).all():
        raise UserError("expected labels in y, got some that are not finite")
    classes, labels = np.unique(given, return_inverse=True)
    if len(classes) < 2:
        raise UserError(f"expected labels of at least 2 classes in y, got {classes.tolist()} only")
    return classes, labels.astype(np.int64)


def _usual_size(images: Sequence[Any]) -> int:
    """See ``image_size``; by the first images."""
    sides = [min(as_pil(_opened(image))[0].size) for image in images[:CHUNK]]
    return min(SIZE_STEP * -(-int(np.median(sides)) // SIZE_STEP), LARGEST_SIZE)


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Bring Python's, NumPy's and torch's global generators, and torch's threads, back to how they were."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator, threads = torch.Generator(), torch.get_num_threads()
    state = random_state(generator, device)
    try:
        yield
    finally:
        set_random_state(state, generator, device)
        torch.set_num_threads(threads)
