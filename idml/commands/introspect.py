"""``python -m idml introspect``: a trained model learns to say when it is wrong, what is new to it, when to refuse."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from idml import distributed
from idml.commands.options import ImageOptions, check_shares, open_model, parse
from idml.config import check_name_values, check_positive, check_within, option, parse_name_values
from idml.data.collection import read_collection
from idml.data.image_dataset import Fit, ImageDataset, Interpolation
from idml.embedding_file import Columns
from idml.embedding_parts import Parts, begin_parts, make_parts, parts_key
from idml.errors import UserError
from idml.exporting import check_free
from idml.foreign import INSIDE
from idml.introspecting import Reading, fit_features
from idml.introspection.features import CACHE_BYTES, Features, kept_half
from idml.introspection.fit import Fitted
from idml.introspection.layers import Layers
from idml.introspection_images import Divided, divided
from idml.introspection_models import Foreign, foreign_model, read_classes
from idml.introspection_report import coverage_text, fitted_text, promise_text
from idml.loading import save_model
from idml.runtime import choose_device, seed_everything
from idml.signals import StopSignals
from idml.trained import TrainedModel

DESCRIPTION = """A trained model learns to say when it is wrong (P(wrong)), what is new to it (novelty), and when to
refuse, by one pass over images; its answers stay as they are, to the bit. The model: a run, a checkpoint or an exported
folder (--checkpoint), or a classifier of timm, torchvision or your own with its weights (--model, --weights). The
images: DIR/[split/]<class>/*.jpg; those of a split train are taken for the model's training images, others for
held-out ones. Under torchrun the images are shared out; a stopped command resumes when it is given again."""


@dataclasses.dataclass(kw_only=True, slots=True)
class IntrospectOptions(ImageOptions):
    """Options of ``introspect``."""

    data_dir: str | None = option(None, "folder of labelled images, DIR/[split/]<class>/*.jpg")
    model: str | None = option(
        None, "in place of --checkpoint: timm/NAME (or NAME), torchvision/NAME, or package.module:function"
    )
    weights: str | None = option(None, "of --model: .pth, .pt or .safetensors, the classifier included")
    weights_key: str | None = option(None, "entry of that file to take; default: the one that fits, averages first")
    classes: str | None = option(
        None, "of --model: file with the names of its classes, a line each; default: the class folders, sorted"
    )
    model_kwargs: list[str] | None = option(
        None, "of --model: further arguments of its constructor, name=value", kind="pairs"
    )
    image_size: int | None = option(None, "of --model: side of its input in pixels; default: see the documentation")
    mean: list[float] | None = option(None, "of --model: per channel, of images from 0 to 1")
    std: list[float] | None = option(None, "of --model: the same")
    fit: Fit | None = option(None, "of --model: crop (resize, then the centre) or whole (all of a small image)")
    crop_share: float | None = option(None, "of --model: side of the crop as a share of the shorter side")
    interpolation: Interpolation | None = option(None, "of --model: of the resizing")
    out: str | None = option(None, "folder to write, which every command takes as --checkpoint", "-o")
    overwrite: bool = option(False, "replace the model that is there")
    layers: list[str] | None = option(None, "modules to look at, by name; default: found over the depth of the network")
    cache_bytes: int = option(CACHE_BYTES, "bytes for what is kept of the images; beyond them fewer are read")
    max_risk: float = option(0.05, "share of answers that may be wrong, for the promise that is printed")
    confidence: float = option(0.95, "of the promise")
    coverage: float | None = option(None, "share of images whose true class is to be among those named, to print")
    seed: int = option(0, "of all that is drawn")


FOREIGN_ONLY = (
    *("weights", "weights_key", "classes", "model_kwargs", "image_size", "mean", "std", "fit", "crop_share"),
    "interpolation",
)
"""Options that say something of ``--model``."""


def introspect(arguments: Sequence[str]) -> None:
    """Run the command; see the module.

    Raises:
        UserError: bad options, no model, no images, or they do not go together. StorageError: the disk does not take
            what is read.
    """
    config = parse(IntrospectOptions, arguments, name="introspect", description=DESCRIPTION)
    if config is None:
        return
    out, data_dir = _check(config)
    started = time.perf_counter()
    seed_everything(0, threads=config.threads)
    device = choose_device(config.device)
    classes = None if config.classes is None else read_classes(config.classes)
    with StopSignals() as signals:
        own = None if config.checkpoint is None else open_model(config).with_introspection(None)
        distributed.setup(device.type)
        collection = distributed.from_main(
            lambda: read_collection(data_dir, skip_bad_images=config.skip_bad_images, workers=config.workers)
        )
        model = own or foreign_model(
            foreign_of(config), classes or collection.dataset.classes, collection.dataset, device, config.layers
        )
        images = distributed.from_main(lambda: divided(collection, model.task, model.classes))
        names = [INSIDE + name for name in config.layers or ()] if model.spec.origin != "idml" else config.layers
        reading = Reading(
            model.network, model.task, model.spec.preprocessing, images.images.dataset, names=names or None
        )
        numbers = reading.numbers(len(model.classes), model.spec.embedding_size or 0)
        chosen = images.chosen(model.task, numbers, config.cache_bytes, config.seed)
        key = distributed.from_main(
            lambda: parts_key(model, chosen.images, config.batch_size, "introspect", reading.layers.as_json())
        )
        parts = Parts(out, key, len(chosen.images), config.batch_size)
        signals.message = f"stopped; what was read is in {parts.folder}. Give the same command again to go on"
        done = distributed.from_main(lambda: begin_parts(parts, "read"))
        _read(reading, chosen, parts, done, config)
        distributed.barrier()
        reading.close()
        distributed.from_main(lambda: _finish(config, model, reading.layers, chosen, parts, started))
        distributed.barrier()
        distributed.shutdown()


def foreign_of(config: IntrospectOptions) -> Foreign:
    """What the options say of a classifier of others."""
    assert config.model is not None
    asked = ("image_size", "mean", "std", "fit", "crop_share", "interpolation")
    return Foreign(
        name=config.model,
        weights=config.weights,
        key=config.weights_key,
        arguments=parse_name_values(config.model_kwargs),
        preprocessing={name: getattr(config, name) for name in asked if getattr(config, name) is not None},
    )


def _check(config: IntrospectOptions) -> tuple[Path, str]:
    """(what to write, the folder of images); UserError for bad options, a warning for those without effect."""
    if (config.checkpoint is None) == (config.model is None):
        raise UserError(
            "expected a model, either --checkpoint (a run, a checkpoint file, an exported folder) or --model NAME "
            "--weights FILE"
        )
    if config.data_dir is None:
        raise UserError("--data-dir is missing: a folder of labelled images, DIR/[split/]<class>/*.jpg")
    if config.out is None:
        raise UserError("--out is missing: the folder to write the model to")
    check_shares(config, ("max_risk", "confidence", "coverage"))
    check_within(config, {"cache_bytes": (2**20, math.inf), "image_size": (1, math.inf)})
    check_positive(config, ["crop_share"])
    check_name_values("model-kwargs", config.model_kwargs)
    for name in FOREIGN_ONLY if config.checkpoint is not None else ():
        if getattr(config, name) is not None:
            flag = name.replace("_", "-")
            warnings.warn(f"--{flag} has no effect: it says something of --model", UserWarning, stacklevel=2)
    out = Path(config.out)
    check_free(out, overwrite=config.overwrite)
    return out, config.data_dir


def _read(reading: Reading, chosen: Divided, parts: Parts, done: Sequence[int], config: IntrospectOptions) -> None:
    """This rank's share of the features that are not there yet."""

    def columns(dataset: ImageDataset) -> Iterator[Columns]:
        loader = reading.loader(dataset, batch_size=config.batch_size, workers=config.workers)
        try:
            for images, _ in loader.epoch(0):
                with torch.inference_mode():
                    vectors, semantic, logits = reading.features(images)
                yield {
                    "vectors": kept_half(vectors).numpy(),
                    "semantic": semantic.half().cpu().numpy(),
                    "logits": logits.float().cpu().numpy(),
                }
        finally:
            loader.close()

    make_parts(parts, done, chosen.images.dataset, columns, doing="reading", verbose=config.verbose)


def _finish(
    config: IntrospectOptions, model: TrainedModel, layers: Layers, chosen: Divided, parts: Parts, started: float
) -> None:
    """Fit, write, say what was found; on the main process."""
    out = Path(str(config.out))
    features = _features(chosen, parts)
    read = time.perf_counter() - started
    train, held_out = (features.part(torch.from_numpy(part)) for part in (chosen.train, chosen.held_out))
    classes = len(model.classes)
    fitted = fit_features(layers, model.task, classes, train, held_out, config.seed)
    whole = model.with_introspection(fitted.introspection)
    save_model(whole, out, overwrite=config.overwrite, more={"introspected": fitted.about})
    parts.remove()
    print(report(config, whole, fitted, read), flush=True)
    print(f"written to {out} in {time.perf_counter() - started:.1f} s", flush=True)
    if note := fitted.introspection.spec.note:
        warnings.warn(f"P(wrong) is not calibrated: {note}", UserWarning, stacklevel=2)


def _features(chosen: Divided, parts: Parts) -> Features:
    """What was read of all images."""
    count, filled = len(chosen.images), 0
    columns: dict[str, torch.Tensor] = {}
    for number in range(len(parts.rows)):
        for name, values in parts.read(number).items():
            rows = torch.from_numpy(values)
            whole = columns.setdefault(name, rows.new_empty(count, rows.shape[1]))
            whole[filled : filled + len(rows)] = rows
        filled += len(parts.rows[number])
    return Features(labels=torch.from_numpy(chosen.images.dataset.labels), **columns)


def report(config: IntrospectOptions, model: TrainedModel, fitted: Fitted, seconds: float) -> str:
    """What was found, a line each."""
    about, introspection = fitted.about, fitted.introspection
    held, known = about["held_out_images_read"], about["train_images_read"]
    rate = (held + known) / max(seconds, 1e-9)
    looked, *lines = fitted_text(fitted, classify=model.task == "classification")
    read = f"read {held:,} held-out and {known:,} training images in {seconds:.1f} s ({rate:.0f} images/s)"
    if introspection.spec.calibrated and model.task == "classification":
        lines.append(f"promise: {promise_text(introspection, config.max_risk, config.confidence)}")
        if config.coverage is not None:
            lines.append(f"classes: {coverage_text(introspection, config.coverage)}")
    return "\n".join([looked, read, *lines])
