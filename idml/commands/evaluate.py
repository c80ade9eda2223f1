"""``python -m idml evaluate``: the figures of a trained model on labelled images."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from idml.commands.options import ImageOptions, open_model, parse, stored_config
from idml.config import option
from idml.data.collection import Collection, read_collection
from idml.errors import UserError
from idml.evaluating import Tested, classifier_figures, of_folder, of_training, retrieval_figures
from idml.run import write_text
from idml.run_directory import stored_if_possible
from idml.trained import TrainedModel

DESCRIPTION = """The figures of a model on the test images of the data set that it was trained on, as its run reports
them, or on a labelled folder of your own: accuracy and calibration, or what a search finds; and what each score of
uncertainty is worth."""

FIGURES = {
    "top1": ("top-1", ".2%"),
    "top5": ("top-5", ".2%"),
    "nll": ("NLL", ".4f"),
    "ece": ("ECE", ".4f"),
    "error_ece": ("ECE of P(wrong)", ".4f"),
    "coverage_at_5_risk": ("answered at 5 % risk", ".1%"),
}
"""Figures of a classifier that are printed: key, name, format."""


@dataclasses.dataclass(kw_only=True, slots=True)
class EvaluateOptions(ImageOptions):
    """Options of ``evaluate``."""

    split: str | None = option(None, "of --data-dir: train, val, test, ...; default test, else val, else all images")
    ks: list[int] | None = option(None, "K of R@K, of a retrieval model; default: those of its training")
    nmi: bool = option(True, "cluster the embeddings of a retrieval model for NMI and F1")
    out: str | None = option(None, "JSON file to write the figures to as well", "-o")
    overwrite: bool = option(False, "replace the file where it exists")


def evaluate(arguments: Sequence[str]) -> None:
    """``python -m idml evaluate --checkpoint C [--data-dir D]``: prints the figures.

    Raises:
        UserError: bad options, no model, no labelled images, or labels that the model does not know.
    """
    config = parse(EvaluateOptions, arguments, name="evaluate", description=DESCRIPTION)
    if config is None:
        return
    out = None if config.out is None else Path(config.out)
    if out is not None and (out.is_dir() or (out.exists() and not config.overwrite)):
        raise UserError(f"{out} exists; give another --out, or --overwrite to replace it")
    model = open_model(config)
    _warn_without_effect(config, model)
    tested = _images(config, model)
    options: dict[str, Any] = {"batch_size": config.batch_size, "workers": config.workers, "verbose": config.verbose}
    if model.task == "classification":
        figures = classifier_figures(model, tested, **options)
    else:
        figures = retrieval_figures(model, tested, ks=config.ks, nmi=config.nmi, **options)
    figures = _without_nan(figures)
    about = {
        "checkpoint": str(model.source),
        "fingerprint": model.fingerprint,
        "images": len(tested.dataset),
        "of": tested.name,
        "score": {"name": model.score_name, "calibrated_on": model.calibrated_on},
    }
    print(as_text(about | figures))
    if out is not None:
        with stored_if_possible(out, "--out"):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, json.dumps(about | figures, indent=2) + "\n")
            print(f"the same in {out}")


def _images(config: EvaluateOptions, model: TrainedModel) -> Tested:
    """What is evaluated."""
    if config.data_dir is None:
        return of_training(stored_config(model))
    collection: Collection = read_collection(
        config.data_dir, skip_bad_images=config.skip_bad_images, workers=config.workers
    )
    return of_folder(collection, model, config.split)


def _warn_without_effect(config: EvaluateOptions, model: TrainedModel) -> None:
    """Warn of each option that changes nothing."""
    unused = []
    if model.task == "classification":
        unused += [("--ks", config.ks is not None), ("--no-nmi", not config.nmi)]
    reasons = dict.fromkeys((name for name, _ in unused), f"{model.source} is a classifier")
    if config.data_dir is None:
        own = [("--split", config.split is not None), ("--skip-bad-images", config.skip_bad_images)]
        reasons |= dict.fromkeys((name for name, _ in own), "no --data-dir is given")
        unused += own
    for name, given in unused:
        if given:
            warnings.warn(f"{name} has no effect: {reasons[name]}", UserWarning, stacklevel=2)


def _without_nan(value: Any) -> Any:
    """The same with None for numbers that are not finite: JSON has none."""
    if isinstance(value, Mapping):
        return {name: _without_nan(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(figures: Mapping[str, Any]) -> str:
    """The figures in a few lines, and the scores as a table."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    head = f"{figures['images']:,} images, {figures['of']}"
    if "top1" in figures:
        rows = [[(name, figures[key], form) for key, (name, form) in FIGURES.items() if key in figures]]
    else:
        keys = [key for key in figures if key.split("/")[-1].split("@")[0] in ("R", "RP", "MAP", "NMI", "F1")]
        rows = [[(key, figures[key], ".2%") for key in keys if "/" not in key]]
        removed = [(key.split("/")[1], figures[key], ".2%") for key in keys if "/" in key]
        rows += [removed] if removed else []
    texts = ["  ".join(f"{name} {shown(value, form)}" for name, value, form in row) for row in rows]
    texts[1:] = [f"without the query's family in the gallery: {text}" for text in texts[1:]]
    lines = [head, *texts, ""]
    columns = list(next(iter(figures["scores"].values())))
    width = max(len(name) for name in figures["scores"]) + 2
    lines.append("score".ljust(width) + "".join(column.rjust(13) for column in columns))
    for name, row in figures["scores"].items():
        mark = " *" if name == figures["score"]["name"] else ""
        lines.append((name + mark).ljust(width) + "".join(shown(value, ".4f").rjust(13) for value in row.values()))
    if figures["score"]["name"] in figures["scores"]:
        lines.append("* the model's own uncertainty. A high AUROC and a low AURC are good; an AUROC of 0.5 is chance")
    return "\n".join(lines)
