"""The options of loss prediction, which both scripts have: what they are by default, and which do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from augment import SHIFTS
from idml.config import check_within
from idml.errors import UserError, nearest

OPTIONS = ("uncertainty_share", "uncertainty_shifts")
"""Options that do nothing without loss prediction."""


def join_layers(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings of which later ones win; an uncertainty loss given before another ISM variant belonged to the first."""
    joined: dict[str, Any] = {}
    for layer in layers:
        if layer.get("ism", joined.get("ism")) != joined.get("ism"):
            joined |= {"uncertainty_loss": None, "uncertainty_shifts": None}
        joined |= layer
    return joined


def resolve_uncertainty(config: Any) -> None:
    """Fill in ``uncertainty_loss`` and ``uncertainty_shifts`` where they were left open, and check these options.

    Raises:
        UserError: loss prediction without ``--ism live``, an unknown kind of shift, a value out of range.
    """
    if config.uncertainty_loss is None:
        config.uncertainty_loss = "none"
    if config.uncertainty_loss != "none" and config.ism != "live":
        raise UserError(
            f"--uncertainty-loss {config.uncertainty_loss} trains the head of --ism live, and --ism is {config.ism}: "
            "give --uncertainty-loss none, or --ism live"
        )
    if config.uncertainty_loss == "none" and config.uncertainty_shifts == list(SHIFTS):
        config.uncertainty_shifts = None  # a saved config spells the default out
    elif config.uncertainty_loss != "none" and config.uncertainty_shifts is None:
        config.uncertainty_shifts = list(SHIFTS)
    for kind in config.uncertainty_shifts or ():
        if kind not in SHIFTS:
            raise UserError(
                f"--uncertainty-shifts: expected some of {', '.join(SHIFTS)}, got {kind!r}{nearest(kind, SHIFTS)}"
            )
    check_within(config, {"uncertainty_share": (0, 1)})


def unused_uncertainty(config: Any) -> dict[str, str]:
    """Those of the options that change nothing, and why."""
    if config.uncertainty_loss == "none":
        return dict.fromkeys(OPTIONS, "no loss is predicted (--uncertainty-loss none)")
    return {"uncertainty_shifts": "no image is shown to the head alone"} if config.uncertainty_share == 0 else {}
