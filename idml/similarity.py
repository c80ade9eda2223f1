"""The introspective similarity metric (ISM): the only place where its formula is written.

Letters used in shapes
    B  images in the batch        C  classes (or proxies)
    D  features of the backbone   E  uncertainty dimensions

Symbols of the paper
    alpha  squared semantic distance of a pair, ``|| s_x - s_y ||^2``
    beta   squared uncertainty of a pair, ``|| u_x + u_y ||^2`` (a class or proxy has ``u = 0``)
    tau    temperature

ISM pulls a comparison towards "the same" by the uncertainty of the pair, relative to how far apart it is:

    similarity form   sim' = 1 - (1 - sim) * w
    distance form     d'   = d * w
    weight            w    = exp(-(beta + offset) / (tau * alpha))

Source: Introspective Deep Metric Learning (Wang, Zheng, Zhu, Zhou, Lu; TPAMI 2023). Every function computes in
float32 (float64 if an input is float64) with autocast switched off, whatever the caller's precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

TEMPERATURE = 5.0
"""tau of the authors' released code, for retrieval and for classification alike."""

SQ_DISTANCE_FLOOR = 1e-4
"""Smallest alpha that is divided by.

Alpha is a difference of squares, so rounding can make it zero or negative. The floor bounds the gradient of the
exponent: 1 / (tau * floor) = 2000 per unit of beta, finite in float16 (largest value 65504) too.
"""


def _full_precision(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32, or in float64 if one of them is; TypeError for integers and complex numbers."""
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise TypeError(f"ISM needs floating-point tensors, got {tensor.dtype}")
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return [tensor.to(dtype) for tensor in tensors]


def _exponent(sq_distance: Tensor, sq_uncertainty: Tensor, temperature: float, offset: float) -> Tensor:
    """``-(beta + offset) / (tau * alpha)``, alpha kept at or above the floor."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if offset < 0:
        raise ValueError(f"offset must not be negative, got {offset}")
    return -(sq_uncertainty + offset) / (temperature * sq_distance.clamp_min(SQ_DISTANCE_FLOOR))


def introspective_weight(
    sq_distance: Tensor, sq_uncertainty: Tensor, *, temperature: float = TEMPERATURE, offset: float = 0.0
) -> Tensor:
    """ISM weight ``w = exp(-(beta + offset) / (tau * alpha))`` of each pair.

    Args:
        sq_distance: alpha, any floating dtype; values under ``SQ_DISTANCE_FLOOR`` count as the floor.
        sq_uncertainty: beta >= 0, any floating dtype, broadcastable with ``sq_distance``.
        temperature: tau > 0.
        offset: constant >= 0 added to beta (the released retrieval code uses 4).

    Returns:
        float32 or float64 in [0, 1], broadcast shape. 1 means that the comparison counts in full.

    Raises:
        TypeError: an input is not floating point. ValueError: temperature <= 0 or offset < 0.
    """
    with torch.autocast(sq_distance.device.type, enabled=False):
        sq_distance, sq_uncertainty = _full_precision(sq_distance, sq_uncertainty)
        return torch.exp(_exponent(sq_distance, sq_uncertainty, temperature, offset))


def introspective_exponent(
    sq_distance: Tensor, sq_uncertainty: Tensor, *, temperature: float = TEMPERATURE, offset: float = 0.0
) -> Tensor:
    """``(beta + offset) / (tau * alpha)`` >= 0 of each pair, of which ``introspective_weight`` is exp(-x).

    It tells small uncertainties apart that all have a weight of 1 in floating point. Arguments and errors are those of
    ``introspective_weight``.
    """
    with torch.autocast(sq_distance.device.type, enabled=False):
        sq_distance, sq_uncertainty = _full_precision(sq_distance, sq_uncertainty)
        return -_exponent(sq_distance, sq_uncertainty, temperature, offset)


def introspective_similarity(
    similarity: Tensor,
    sq_distance: Tensor,
    sq_uncertainty: Tensor,
    *,
    temperature: float = TEMPERATURE,
    offset: float = 0.0,
) -> Tensor:
    """Similarity form of the ISM: ``1 - (1 - similarity) * w``.

    With ``sq_uncertainty = 0`` and ``offset = 0`` it returns ``similarity`` exactly; as the uncertainty grows it goes
    to 1, from below where ``similarity < 1`` and from above where an unbounded logit exceeds 1.

    Args:
        similarity: cosine or logit of each pair, typically (B, C), any floating dtype.
        sq_distance: alpha >= 0, broadcastable with ``similarity``.
        sq_uncertainty: beta >= 0, broadcastable with ``similarity``: (B, 1) when it depends on the image alone.
        temperature: tau > 0.
        offset: constant >= 0 added to beta.

    Returns:
        float32 or float64, broadcast shape.

    Raises:
        TypeError: an input is not floating point. ValueError: temperature <= 0 or offset < 0.
    """
    with torch.autocast(similarity.device.type, enabled=False):
        similarity, sq_distance, sq_uncertainty = _full_precision(similarity, sq_distance, sq_uncertainty)
        exponent = _exponent(sq_distance, sq_uncertainty, temperature, offset)
        # 1 - (1 - s) e^x, rearranged: exact at x = 0 and free of the cancellation in 1 - (1 - s).
        return similarity - (1 - similarity) * torch.expm1(exponent)


def introspective_distance(
    distance: Tensor,
    sq_uncertainty: Tensor,
    *,
    temperature: float = TEMPERATURE,
    offset: float = 0.0,
    sq_distance: Tensor | None = None,
) -> Tensor:
    """Distance form of the ISM: ``distance * w``, with alpha = distance^2.

    With ``sq_uncertainty = 0`` and ``offset = 0`` it returns ``distance`` exactly; as the uncertainty grows
    it goes to 0.

    Args:
        distance: Euclidean (not squared) distance >= 0 of each pair, any shape and floating dtype.
        sq_uncertainty: beta >= 0, broadcastable with ``distance``.
        temperature: tau > 0.
        offset: constant >= 0 added to beta.
        sq_distance: alpha in place of distance^2, where the vectors are compared at another length than they have.

    Returns:
        float32 or float64, broadcast shape.

    Raises:
        TypeError: an input is not floating point. ValueError: temperature <= 0 or offset < 0.
    """
    with torch.autocast(distance.device.type, enabled=False):
        distance, sq_uncertainty = _full_precision(distance, sq_uncertainty)
        alpha = distance.square() if sq_distance is None else sq_distance.to(distance.dtype)
        return distance * torch.exp(_exponent(alpha, sq_uncertainty, temperature, offset))


def class_sq_distances(
    logits: Tensor, features: Tensor, weight: Tensor, bias: Tensor, *, bias_in_class_vector: bool = False
) -> Tensor:
    """Squared distance of each image to each class vector, from the logits: no second matrix product.

    The class vector is the row ``W_c`` of the classifier; the released code uses ``W_c + b_c``, the bias added to
    every coordinate (``bias_in_class_vector=True``). Since ``h . W_c = logit_c - b_c``,

        || h - W_c ||^2 = ||h||^2 + ||W_c||^2 - 2 (logit_c - b_c)

    and with the bias ``h . p_c = logit_c - b_c + b_c sum(h)`` and ``||p_c||^2 = ||W_c||^2 + 2 b_c sum(W_c) + D b_c^2``.

    Args:
        logits: (B, C), ``features @ weight.T + bias``.
        features: (B, D).
        weight: (C, D).
        bias: (C,).
        bias_in_class_vector: the released definition.

    Returns:
        (B, C), float32 or float64. Rounding can leave a value slightly under zero; the ISM functions clamp it.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, features, weight, bias = _full_precision(logits, features, weight, bias)
        inner = logits - bias  # (B, C)
        sq_norms = weight.square().sum(1)  # (C,)
        if bias_in_class_vector:
            inner = inner + features.sum(1, keepdim=True) * bias
            sq_norms = sq_norms + 2 * bias * weight.sum(1) + features.shape[1] * bias.square()
        return features.square().sum(1, keepdim=True) + sq_norms - 2 * inner
