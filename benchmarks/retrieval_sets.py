"""The two retrieval sets of the studies, and how each loss is trained on them."""

from __future__ import annotations

from pathlib import Path

from idml.errors import UserError
from idml.losses import LOSSES

COMMON = ["--mix", "none", "--model", "resnet8_cifar", "--image-size", "32", "--embedding-size", "128", "--warm", "0"]
COMMON += ["--batch-size", "32", "--bn-freeze", "0", "--lr-decay-gamma", "0.5", "--eval-every", "1000", "--no-nmi"]
COMMON += ["--loader", "torch"]

SETS = {
    "emoji-mini": ["--dataset", "emoji-mini", "--epochs", "6", "--lr-decay-step", "3"],
    "icons": ["--dataset", "icons", "--epochs", "4", "--lr-decay-step", "2"],
}
"""About 320 steps of 32 images on emoji-mini, 490 on icons."""

STEPS = 3
"""Of a quick run."""


def options_of(data: str, loss: str, icons: str | None, *, quick: bool = False) -> list[str]:
    """What every run of a loss on a set has; rates, margins and the ISM are its own.

    Args:
        data: key of ``SETS``.
        loss: key of ``LOSSES``.
        icons: the .npz file of icons (``python -m idml.data.embedded.icons`` makes it).
        quick: a few steps only.

    Raises:
        UserError: icons are asked for, and there is no file of them.
    """
    options = [*COMMON, *SETS[data], "--loss", loss]
    if data == "icons":
        if icons is None or not Path(icons).exists():
            raise UserError(f"the set of icons needs --icons FILE.npz, got {icons}; see idml/data/embedded/icons.py")
        options += ["--data-dir", str(Path(icons).resolve())]
    if LOSSES[loss].needs_pairs:
        options += ["--IPC", "4"]
    if loss == "NPair":  # products of unit vectors are a small range for its softmax
        options += ["--l2-norm", "0"]
    return [*options, "--max-steps", str(STEPS)] if quick else options
