"""``python -m idml embed``: embeddings and uncertainty of images, as a Parquet or npz file."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from idml import distributed
from idml._version import __version__
from idml.commands.options import ImageOptions, open_images, open_model, parse
from idml.config import option
from idml.data.collection import Collection
from idml.data.image_dataset import ImageDataset
from idml.embedder import IntrospectiveEmbedder
from idml.embedding_file import Columns, Format, pyarrow, write_table
from idml.embedding_parts import Parts, begin_parts, make_parts, parts_key
from idml.errors import UserError
from idml.introspection.introspection import BELIEF_DIM
from idml.signals import StopSignals
from idml.trained import Embeddings, TrainedModel

TOP_CLASSES = 5
"""Classes that are stored of each image; all of them where the model has fewer."""

DESCRIPTION = """Embeddings and uncertainty of every image below a folder, as a Parquet file (or npz). Under torchrun
the images are shared out; a stopped command goes on where it was when it is given again."""


@dataclasses.dataclass(kw_only=True, slots=True)
class EmbedOptions(ImageOptions):
    """Options of ``embed``."""

    out: str | None = option(None, "file to write, E.parquet or E.npz", "-o")
    format: Format | None = option(None, "parquet or npz; default: by the name of --out, else parquet")
    overwrite: bool = option(False, "replace the file where it exists")


def embed(arguments: Sequence[str]) -> None:
    """Run the command; see the module.

    Raises:
        UserError: bad options, no model, no images. StorageError: the disk does not take the file.
    """
    config = parse(EmbedOptions, arguments, name="embed", description=DESCRIPTION)
    if config is None:
        return
    out, kind = _output(config)
    with StopSignals() as signals:
        model = open_model(config)
        distributed.setup(model.device.type)
        collection = distributed.from_main(lambda: open_images(config, model))
        parts = Parts(
            out,
            distributed.from_main(lambda: parts_key(model, collection, config.batch_size)),
            len(collection),
            config.batch_size,
        )
        signals.message = f"stopped; finished parts are in {parts.folder}. Give the same command again to go on"
        started = time.perf_counter()
        done = distributed.from_main(lambda: begin_parts(parts, "embedded"))

        def columns(dataset: ImageDataset) -> Iterator[Columns]:
            for found in model.embed_dataset(dataset, batch_size=config.batch_size, workers=config.workers):
                yield columns_of(found, model)

        make_parts(parts, done, collection.dataset, columns, doing="embedding", verbose=config.verbose)
        distributed.barrier()
        if distributed.is_main():
            about = describe(model, collection)
            texts: dict[str, Any] = {
                "path": collection.names,
                "split": [split or None for split in collection.splits],
                "label": collection.labels,
            }
            write_table(out, kind, about, texts, (parts.read(number) for number in range(len(parts.rows))))
            parts.remove()
            before = sum(len(parts.rows[number]) for number in done)
            print(_summary(out, about, len(collection), before, time.perf_counter() - started), flush=True)
        distributed.barrier()
        distributed.shutdown()


def _output(config: EmbedOptions) -> tuple[Path, Format]:
    """File and format; UserError where they do not go together, or the file exists."""
    if config.out is None:
        raise UserError("--out is missing: the file to write, E.parquet or E.npz")
    out = Path(config.out)
    by_name: Format = "npz" if out.suffix.lower() == ".npz" else "parquet"
    if config.format is None and out.suffix.lower() not in ("", ".npz", ".parquet", ".pq"):
        raise UserError(
            f"--out {out.name}: expected a name that ends in .parquet or .npz; --format says it for any name"
        )
    kind = config.format or by_name
    if kind != by_name and out.suffix.lower() in (".npz", ".parquet"):
        raise UserError(f"--format {kind} for a file named {out.name}: give --out {out.with_suffix('.' + kind).name}")
    check_new_file(out, "--out", overwrite=config.overwrite)
    if kind == "parquet":
        pyarrow()
    return out, kind


def check_new_file(path: Path, flag: str, *, overwrite: bool) -> None:
    """Make the folder for a file that is to be written.

    Raises:
        UserError: the file is there and may not be replaced, or it cannot be written there.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder: expected the name of a file")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; give another {flag}, or --overwrite to replace it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot make the folder {path.parent}: {error.strerror}") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{flag} {path}: the folder {path.parent} cannot be written to")


def columns_of(embeddings: Embeddings, model: TrainedModel) -> Columns:
    """The columns of numbers of a file of embeddings; see ``idml.embedding_file``."""
    columns = {"embedding": embeddings.semantic, "uncertainty": embeddings.uncertainty}
    if model.spec.ism != "off":
        columns["uncertainty_embedding"] = embeddings.uncertainty_embedding
    if embeddings.foreseen_loss is not None:
        columns["foreseen_loss"] = embeddings.foreseen_loss
    if embeddings.novelty is not None and embeddings.coordinates is not None:
        columns["novelty"], columns["coordinates"] = embeddings.novelty, embeddings.coordinates
    if embeddings.belief is not None:
        columns["belief"] = embeddings.belief
    if embeddings.probabilities is not None:
        top = np.argsort(-embeddings.probabilities, axis=1, kind="stable")[:, :TOP_CLASSES]
        columns["top_classes"] = top.astype(np.int32)
        columns["top_probabilities"] = np.take_along_axis(embeddings.probabilities, top, axis=1)
    return columns


def describe(model: TrainedModel, collection: Collection) -> dict[str, Any]:
    """What a file of embeddings says of itself: plain values."""
    spec, network = model.spec, model.network
    semantic = network.embedding_dim if isinstance(network, IntrospectiveEmbedder) else network.feature_dim
    dimensions = {"semantic": semantic}
    if spec.ism != "off":
        dimensions["uncertainty"] = spec.uncertainty_dim
    if model.task == "classification":
        dimensions["top"] = min(TOP_CLASSES, len(spec.classes))
    if model.introspection is not None:
        dimensions["coordinates"] = model.introspection.novelty.projection.shape[1]
        if model.task == "retrieval":
            dimensions["belief"] = BELIEF_DIM
    return {
        "idml_version": __version__,
        "fingerprint": model.fingerprint,
        "checkpoint": str(model.source.resolve()),
        "task": model.task,
        "model": spec.model,
        "method": spec.method,
        "trained_on": spec.dataset,
        "classes": list(spec.classes) if model.task == "classification" else [],
        "score": model.score_name,
        "calibrated_on": model.calibrated_on,
        "ism": spec.ism,
        "temperature": spec.temperature,
        "l2_norm": spec.l2_norm if model.task == "retrieval" else False,
        "dimensions": dimensions,
        "preprocessing": dataclasses.asdict(spec.preprocessing),
        "data_dir": None if collection.root is None else str(collection.root.resolve()),
        "source": collection.source,
        "images": len(collection),
    }


def _summary(out: Path, about: dict[str, Any], count: int, before: int, seconds: float) -> str:
    """One line of what was done."""
    earlier = f" ({before} of them before)" if before else ""
    score = "no uncertainty" if about["score"] == "none" else f"uncertainty {about['score']}"
    rate = (count - before) / max(seconds, 1e-9)
    return (
        f"embedded {count} images{earlier} in {seconds:.1f} s ({rate:.0f} images/s), {about['dimensions']['semantic']} "
        f"dimensions, {score}: {out} ({out.stat().st_size / 1e6:.1f} MB)"
    )
