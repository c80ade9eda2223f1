"""Options of both scripts about the introspection that follows a training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container
from typing import Any

from idml.config import check_within, option
from idml.introspection.features import CACHE_BYTES
from idml.resume import SavingOptions

DEFAULT_HELD_OUT = 0.1
"""Share of the training images (in retrieval: classes) that is held out where a command leaves it open."""


@dataclasses.dataclass(kw_only=True, slots=True)
class IntrospectionOptions(SavingOptions):
    """What comes after the last epoch, beside what survives an interruption."""

    introspect: bool | None = option(
        None,
        "after the last epoch fit what says P(wrong) and novelty; default where images are held out",
    )
    cache_bytes: int = option(CACHE_BYTES, "bytes for the vectors that it reads; beyond them fewer images are read")


def resolve_introspection(config: Any, published: Container[str]) -> None:
    """Fill in what the command leaves open: ``published`` data sets keep every training image."""
    if config.val_fraction is None:
        config.val_fraction = 0.0 if config.dataset in published else DEFAULT_HELD_OUT
    if config.introspect is None:
        config.introspect = config.val_fraction > 0
    check_within(config, {"cache_bytes": (2**20, math.inf)})


def unused_introspection(config: Any) -> dict[str, str]:
    """Those of the options that change nothing, and why."""
    if config.eval_only:
        return dict.fromkeys(("introspect", "cache_bytes"), "--eval-only fits nothing; see python -m idml introspect")
    return {} if config.introspect else {"cache_bytes": "nothing is read after training (--no-introspect)"}
