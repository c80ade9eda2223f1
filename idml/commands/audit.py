"""``python -m idml audit``: a page that shows what a model is unsure of, what is new to it, which labels look wrong."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from idml.audit.answers import answers_of, labels_for
from idml.audit.duplicates import SIMILARITY, near_duplicates
from idml.audit.figures import confusions_of, lone_images, shares_by_split, uncertainty_figures
from idml.audit.findings import Findings, ranked_doubts
from idml.audit.gather import gather
from idml.audit.judgement import what_is_new, what_is_refused
from idml.audit.report import Report
from idml.audit.shifts import measure_shifts
from idml.commands.options import ImageOptions, check_shares, open_images, open_model, parse
from idml.config import check_within, option
from idml.data.collection import Collection
from idml.data.names import split_role
from idml.errors import UserError
from idml.trained import TrainedModel

DESCRIPTION = """Write a page that shows what a model is unsure of, what is new to it, what it would refuse, and which
labels look wrong."""


@dataclasses.dataclass(kw_only=True, slots=True)
class AuditOptions(ImageOptions):
    """Options of ``python -m idml audit``."""

    out: str | None = option(None, "folder of the report: index.html, CSV files, metrics.json")
    overwrite: bool = option(False, "replace the report in that folder")
    splits: list[str] | None = option(None, "audit these splits only, e.g. test; default: all")
    labels: bool = option(True, "folders are classes; --no-labels: they are not, say nothing of right and wrong")
    pictures: int = option(24, "pictures in each section at the most")
    shift_images: int = option(300, "images that are blurred, cropped and so on to see what it does; 0: none")
    duplicate_similarity: float = option(
        SIMILARITY, "least cosine similarity of near-duplicates to the model; they must be alike in pixels as well"
    )
    max_risk: float = option(0.05, "share of the answers that may be wrong, for what the model would refuse")
    confidence: float = option(0.95, "with which it is kept")
    seed: int = option(0, "of the sample of images that are blurred and so on")


def audit(arguments: Sequence[str]) -> None:
    """``python -m idml audit --checkpoint C --data-dir DIR --out REPORT``.

    Raises:
        UserError: bad options, no model, no images, labels that the model does not know, or a report that exists.
        StorageError: the report cannot be written.
    """
    config = parse(AuditOptions, arguments, name="audit", description=DESCRIPTION)
    if config is None:
        return
    most = float("inf")
    check_within(config, {"pictures": (1, 500), "shift_images": (0, most), "duplicate_similarity": (-1, 1)})
    check_within(config, {"seed": (0, 2**32 - 1)})
    check_shares(config, ("max_risk", "confidence"))
    if config.out is None:
        raise UserError("--out is missing: a folder for the report")
    started = time.perf_counter()
    with Report(Path(config.out), overwrite=config.overwrite) as report:
        model = open_model(config)
        collection = chosen_splits(open_images(config, model), config.splits)
        found = examine(model, collection, config, started)
        report.write(found, pictures=config.pictures, options=_options(config))
    print(_summary(found, report.page))


def chosen_splits(collection: Collection, splits: list[str] | None) -> Collection:
    """The images of these splits, or all; UserError for a split that there is not."""
    if splits is None:
        return collection
    there = sorted(set(collection.splits))
    splits = [name if name in there or split_role(name) not in there else str(split_role(name)) for name in splits]
    if unknown := [name for name in splits if name not in there]:
        known = ", ".join(name for name in there if name) or "none"
        raise UserError(f"--splits: no split {', '.join(unknown)} in {collection.source} (splits: {known})")
    return collection.subset(np.flatnonzero(np.isin(np.array(collection.splits), splits)))


def examine(model: TrainedModel, collection: Collection, config: AuditOptions, started: float) -> Findings:
    """All that is to be found."""
    labels, classes = labels_for(model, collection, use_labels=config.labels)
    if config.labels and (labels < 0).all():
        warnings.warn(
            f"{collection.source} has no class folders: nothing can be said of right and wrong",
            UserWarning,
            stacklevel=2,
        )
    gathered = gather(
        model, collection, labels, batch_size=config.batch_size, workers=config.workers, verbose=config.verbose
    )
    answers = answers_of(model, collection, gathered, labels, classes)
    some = bool(answers.judged.any())
    ranked, likely = ranked_doubts(answers, retrieval=model.task == "retrieval")
    duplicates = near_duplicates(
        gathered.embeddings.semantic,
        gathered.thumbnails,
        answers.neighbours,
        collection.splits,
        labels,
        similarity=config.duplicate_similarity,
    )
    refusal, note = what_is_refused(model, answers, max_risk=config.max_risk, confidence=config.confidence)
    options = {"count": config.shift_images, "batch_size": config.batch_size, "seed": config.seed}
    return Findings(
        model=model,
        collection=collection,
        answers=answers,
        shares=shares_by_split(answers, collection.splits) if some else [],
        selective=uncertainty_figures(answers) if some else {},
        new=what_is_new(model, gathered.embeddings, collection.splits),
        refusal=refusal,
        refusal_note=note,
        lone=lone_images(answers) if model.task == "retrieval" else 0,
        ranked=ranked,
        likely_wrong=likely,
        duplicates=duplicates,
        confusions=confusions_of(answers),
        shifts=measure_shifts(model, collection, answers, **options) if config.shift_images else [],
        seconds=time.perf_counter() - started,
    )


def _options(config: AuditOptions) -> dict:
    """Those that change what is found."""
    names = ["splits", "labels", "shift_images", "duplicate_similarity", "max_risk", "confidence", "seed"]
    names.append("skip_bad_images")
    return {name: getattr(config, name) for name in names}


def _summary(found: Findings, page: Path) -> str:
    """What was found, in a line."""
    parts = [f"{len(found.collection):,} images"]
    if found.shares:
        head = found.headline
        where = f" on {head.name}" if head.name else ""
        parts.append(f"{found.figure_name}{where} {head.share:.2%} ({head.low:.2%} to {head.high:.2%})")
        wrong = "labels likely wrong" if found.model.task == "classification" else "labels that stand out"
        parts.append(f"{found.likely_wrong:,} {wrong}")
    if found.new is not None and found.new.ranked:
        parts.append(f"{found.new.count:,} new to the model")
    if found.refusal is not None:
        parts.append(f"{found.refusal.share:.1%} answered at a risk of {found.refusal.promise.max_risk:g}")
    across = int(found.duplicates.across.sum())
    parts.append(f"{len(found.duplicates):,} near-duplicates ({across:,} across splits)")
    return f"{page}: " + ", ".join(parts) + f"; {found.seconds:.0f} s"
