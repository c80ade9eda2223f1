"""``python -m idml predict``: what a classifier takes images for, and whether to believe it."""

from __future__ import annotations

import csv
import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from idml import distributed
from idml.commands.embed import check_new_file
from idml.commands.options import ImageOptions, check_shares, open_images, open_model, parse, with_files
from idml.config import option
from idml.data.collection import Collection
from idml.data.image_dataset import ImageDataset
from idml.data.image_files import without_unreadable
from idml.data.names import printable
from idml.embedding_file import Columns, pyarrow
from idml.embedding_parts import Parts, begin_parts, make_parts, parts_key
from idml.errors import UserError, nobody_reads
from idml.introspection_report import USUAL_CONFIDENCE
from idml.paths import nearest_path
from idml.prediction_file import COLUMNS, Format, as_csv, columns_of, format_of, rows_of, write_rows
from idml.signals import StopSignals
from idml.trained import TrainedModel

Thresholds = tuple[float | None, float | None]
"""Of P(wrong), and of the probability of a class; see ``TrainedModel.thresholds``."""

DESCRIPTION = """What a classifier takes images for: class, confidence, P(wrong), novelty and, with --max-risk, whether
to answer or to refuse. The images: a folder (--data-dir), or files. Under torchrun they are shared out; a stopped
command resumes when it is given again; --out - writes CSV to a pipe, a line as soon as it is known."""


@dataclasses.dataclass(kw_only=True, slots=True)
class PredictOptions(ImageOptions):
    """Options of ``predict``."""

    files: list[str] | None = option(
        None, "image files, in place of --data-dir; may stand without --files too", kind="paths"
    )
    out: str | None = option(None, "file to write: .csv, .parquet or .jsonl; - writes CSV to the standard output", "-o")
    max_risk: float | None = option(None, "refuse where more than this share of answers would be wrong, 0.05 say")
    confidence: float | None = option(None, "with which --max-risk is kept; default: 0.95")
    coverage: float | None = option(
        None, "name as many classes as it takes for the true one to be among them in this share of images"
    )
    overwrite: bool = option(False, "replace the file where it exists")


def predict(arguments: Sequence[str]) -> None:
    """Run the command; see the module.

    Raises:
        UserError: bad options, no classifier, no images, or a promise that cannot be given. StorageError: the disk does
            not take the file.
    """
    config = parse(PredictOptions, with_files(arguments, PredictOptions), name="predict", description=DESCRIPTION)
    if config is None:
        return
    out, kind = _output(config)
    with StopSignals() as signals:
        model = open_model(config)
        if model.task != "classification":
            raise UserError(
                f"{model.source} is a retrieval model: it has no classes to predict. See python -m idml search"
            )
        confidence = USUAL_CONFIDENCE if config.confidence is None else config.confidence
        thresholds = model.thresholds(config.max_risk, confidence, config.coverage)
        if model.introspection is None:
            warnings.warn(
                f"{model.source} has no introspection: p_wrong and novelty stay empty. To have them: python -m idml "
                "introspect --checkpoint ... --data-dir ... --out ...",
                UserWarning,
                stacklevel=2,
            )
        distributed.setup(model.device.type)
        collection = distributed.from_main(lambda: _images(config, model))
        if out is None:
            _stream(model, collection, config, thresholds)
        else:
            _write(out, kind, model, collection, config, thresholds, signals)
        distributed.shutdown()


def _output(config: PredictOptions) -> tuple[Path | None, Format]:
    """(file, or None for the standard output; format); UserError where it cannot be."""
    check_shares(config, ("max_risk", "confidence", "coverage"))
    if config.confidence is not None and config.max_risk is None:
        warnings.warn("--confidence has no effect without --max-risk", UserWarning, stacklevel=2)
    if config.files and config.data_dir is not None:
        raise UserError("expected a folder (--data-dir) or files, got both")
    if config.out is None:
        raise UserError(
            "--out is missing: the file to write, P.csv, P.parquet or P.jsonl, or - for the standard output"
        )
    if config.out == "-":
        if distributed.world_size() > 1:
            raise UserError("--out - is one stream, of one process: under torchrun give a file")
        return None, "csv"
    out = Path(config.out)
    kind = format_of(out)
    check_new_file(out, "--out", overwrite=config.overwrite)
    if kind == "parquet":
        pyarrow()
    return out, kind


def _images(config: PredictOptions, model: TrainedModel) -> Collection:
    """Files, or those of a folder; UserError where there are none, or they do not decode."""
    if not config.files:
        return open_images(config, model)
    for name in config.files:
        path = Path(name)
        if path.is_dir():
            raise UserError(f"{path} is a folder: give it as --data-dir {path}")
        if not os.path.lexists(path):
            raise UserError(f"no image {path}: {nearest_path(path)}")
    labels = np.full(len(config.files), -1, np.int64)
    whole = ImageDataset(labels=labels, classes=(), paths=tuple(map(Path, config.files)))
    good = without_unreadable(whole, skip=config.skip_bad_images, workers=config.workers)
    if not len(good):
        raise UserError("none of the files can be decoded")
    names = tuple(printable(str(path)) for path in good.paths or ())
    return Collection(dataset=good, names=names, splits=("",) * len(good), root=None, source="files")


def _predicted(
    model: TrainedModel, dataset: ImageDataset, config: PredictOptions, thresholds: Thresholds
) -> Iterator[Columns]:
    """What is stored of some images, a batch at a time."""
    for embeddings in model.embed_dataset(dataset, batch_size=config.batch_size, workers=config.workers):
        yield columns_of(model.predictions_of(embeddings, *thresholds))


def _stream(model: TrainedModel, collection: Collection, config: PredictOptions, thresholds: Thresholds) -> None:
    """CSV on the standard output, a batch as soon as it is done. A reader that ends early ends the command too."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    quiet, start = None if config.verbose else True, 0
    with tqdm(total=len(collection), desc="predicting", unit="image", leave=False, disable=quiet) as progress:
        try:
            writer.writerow(COLUMNS)
            sys.stdout.flush()
            for columns in _predicted(model, collection.dataset, config, thresholds):
                end = start + len(columns["label"])
                rows = rows_of(collection.names[start:end], columns, model.classes, thresholds[0])
                writer.writerows(map(as_csv, rows))
                sys.stdout.flush()
                progress.update(end - start)
                start = end
        except BrokenPipeError:
            if not nobody_reads():
                raise
            # What is still in the buffer would be tried once more at the end of the program.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write(
    out: Path,
    kind: Format,
    model: TrainedModel,
    collection: Collection,
    config: PredictOptions,
    thresholds: Thresholds,
    signals: StopSignals,
) -> None:
    """A file, from parts that any number of processes make."""
    key = distributed.from_main(lambda: parts_key(model, collection, config.batch_size, "predict", config.coverage))
    parts = Parts(out, key, len(collection), config.batch_size)
    signals.message = f"stopped; finished parts are in {parts.folder}. Give the same command again to go on"
    started = time.perf_counter()
    done = distributed.from_main(lambda: begin_parts(parts, "predicted"))
    make_parts(
        parts,
        done,
        collection.dataset,
        lambda dataset: _predicted(model, dataset, config, thresholds),
        doing="predicting",
        verbose=config.verbose,
    )
    distributed.barrier()
    if distributed.is_main():
        answered: list[bool] = []

        def rows() -> Iterator[list[dict[str, Any]]]:
            for number, span in enumerate(parts.rows):
                names = collection.names[span.start : span.stop]
                found = list(rows_of(names, parts.read(number), model.classes, thresholds[0]))
                answered.extend(row["decision"] == "answer" for row in found)
                yield found

        write_rows(out, kind, rows())
        parts.remove()
        before = sum(len(parts.rows[number]) for number in done)
        print(_summary(out, config, answered, before, time.perf_counter() - started), flush=True)
    distributed.barrier()


def _summary(out: Path, config: PredictOptions, answered: Sequence[bool], before: int, seconds: float) -> str:
    """One line of what was done."""
    earlier = f" ({before} of them before)" if before else ""
    rate = (len(answered) - before) / max(seconds, 1e-9)
    share = ""
    if config.max_risk is not None:
        share = f", {sum(answered) / len(answered):.1%} answered at a risk of {config.max_risk:g}"
    return f"predicted {len(answered)} images{earlier} in {seconds:.1f} s ({rate:.0f} images/s){share}: {out}"
