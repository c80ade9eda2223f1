"""What an introspection is, in plain values and in words: for ``introspect``, ``info`` and ``predict``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from idml.foreign import INSIDE
from idml.introspection.depths import vector_length
from idml.introspection.fit import Fitted
from idml.introspection.introspection import Introspection
from idml.introspection.layers import Layers

USUAL_RISK, USUAL_CONFIDENCE = 0.05, 0.95
"""Of the promise that ``info`` shows."""


def describe_introspection(introspection: Introspection | None) -> dict[str, Any] | None:
    """What is stored of an introspection, as plain values.

    Returns:
        ``task``, ``layers`` (name, kind, channels of each map), ``features`` (D), ``vector`` (numbers of an image),
        ``heads``, ``fitted_on`` and ``held_out`` (images), ``calibrated``, ``note`` (why it is not), ``error_rate`` and
        ``error_auroc`` on the held-out images, and ``promise``: with ``confidence``, at most ``max_risk`` of the
        answers with P(wrong) up to ``threshold`` are wrong; ``coverage`` is their share of the held-out images,
        ``risk`` their error rate. What is not known is None. A retrieval model promises nothing: it searches among
        other classes than those that were held out. None where there is no introspection.
    """
    if introspection is None:
        return None
    spec = introspection.spec
    auroc = introspection.held_out_auroc()
    promises = spec.calibrated and spec.task == "classification"
    promise = introspection.promise(USUAL_RISK, USUAL_CONFIDENCE) if promises else None
    return {
        "task": spec.task,
        "layers": [dataclasses.asdict(layer) | {"name": _own_name(layer.name)} for layer in spec.layers.maps],
        "features": spec.layers.feature_dim,
        "vector": vector_length(spec.layers),
        "heads": spec.folds,
        "fitted_on": spec.fitted_on,
        "held_out": spec.held_out,
        "calibrated": spec.calibrated,
        "note": spec.note,
        "error_rate": introspection.held_wrong.double().mean().item() if spec.held_out else None,
        "error_auroc": None if math.isnan(auroc) else auroc,
        "promise": None if promise is None else dataclasses.asdict(promise),
    }


def introspection_text(about: Mapping[str, Any] | None) -> dict[str, str]:
    """The same in words, by what is told."""
    if about is None:
        return {"introspection": "none: see python -m idml introspect"}
    places = [f"{layer['name']} ({layer['channels']})" for layer in about["layers"]]
    places += [f"the {about['features']} features"] if about["features"] else []
    state = f"calibrated on {about['held_out']:,} held-out images"
    if not about["calibrated"]:
        state = f"not calibrated: {about['note']}"
    elif about["error_auroc"] is not None:
        state += f", error AUROC {about['error_auroc']:.4f} on them"
    heads = f"{about['heads']} head{'s' if about['heads'] > 1 else ''}"
    lines = {
        "introspection": f"{heads}, fitted on {about['fitted_on']:,} images, {state}",
        "looked at": ", ".join(places),
    }
    if about["calibrated"] and about["task"] == "classification":
        lines["promise"] = _promise_text(about["promise"], USUAL_RISK, USUAL_CONFIDENCE, about["held_out"])
    return lines


def promise_text(introspection: Introspection, max_risk: float, confidence: float) -> str:
    """Of a calibrated introspection: where it can answer, or that it cannot promise it."""
    promise = introspection.promise(max_risk, confidence)
    stored = None if promise is None else dataclasses.asdict(promise)
    return _promise_text(stored, max_risk, confidence, introspection.spec.held_out)


def _promise_text(promise: Mapping[str, Any] | None, max_risk: float, confidence: float, held_out: int) -> str:
    if promise is None:
        return (
            f"a risk of {max_risk:g} cannot be promised with confidence {confidence:g} by {held_out:,} held-out images"
        )
    return (
        f"with confidence {confidence:g}, at most {max_risk:.3g} of the answers with P(wrong) up to "
        f"{promise['threshold']:.4f} are wrong: that is {promise['coverage']:.1%} of the held-out images, of which "
        f"{promise['risk']:.2%} were wrong"
    )


def coverage_text(introspection: Introspection, coverage: float) -> str:
    """Of a calibrated introspection: which classes are named so that the true one is among them."""
    least, held_out = introspection.set_threshold(coverage), introspection.spec.held_out
    if least is None:
        return f"a coverage of {coverage:g} cannot be promised by {held_out:,} held-out images"
    return f"for a coverage of {coverage:g} the classes with a probability of {least:.4g} and more are named"


def fitted_text(fitted: Fitted, *, classify: bool) -> list[str]:
    """What the fit has found, a line each."""
    about, introspection = fitted.about, fitted.introspection
    spec = introspection.spec
    held = about["held_out_images_read"]
    lines = [f"looked at {looked_at(spec.layers)}"]
    if classify:
        errors = {"held-out": about["error_held_out"], "training": about["error_train"]}
        rates = [f"{rate:.2%} on the {name} images" for name, rate in errors.items() if rate is not None]
        memorised = about["error_train"] is not None and not about["training_images_learned_from"]
        lines.append(
            f"error rate {', '.join(rates)}"
            f"{', which are memorised, so the heads learned from the others alone' if memorised else ''}"
        )
    elif held:
        wrong = introspection.held_wrong.double().mean().item()
        lines.append(f"error rate {wrong:.2%}: held-out images whose nearest other one is of another class")
    if about["error_auroc"] is not None:
        free = "1 - max softmax" if classify else "1 - similarity"
        lines.append(
            f"error AUROC {about['error_auroc']:.4f} of P(wrong), {about['error_auroc_free']:.4f} of {free}, on the "
            f"{held:,} held-out images"
        )
    return lines


def looked_at(layers: Layers) -> str:
    """The places in a network, in words."""
    places = [f"{_own_name(layer.name)} ({layer.channels})" for layer in layers.maps]
    places += [f"the {layers.feature_dim} features"] if layers.feature_dim else []
    return f"{', '.join(places)}: {vector_length(layers):,} numbers an image"


def _own_name(name: str) -> str:
    """Of a module, as its own network calls it."""
    return name.removeprefix(INSIDE)
