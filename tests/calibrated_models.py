"""Photos of which so many are held out that P(wrong) is calibrated; models of ``tests.tiny_models`` train on them."""

from __future__ import annotations

from pathlib import Path

from tests.tiny_models import write_photos


def write_calibrating_photos(root: Path) -> Path:
    """``root/{train,val}/<class>/*.png``: 108 of the 360 training images are held out by ``--val-fraction 0.3``."""
    return write_photos(root, train=120)


def write_calibrating_searched(root: Path) -> Path:
    """``root/photos/<class>/*.png``: two of the five training classes, 60 images each, are held out by 0.4."""
    write_photos(root / "all", classes=10, train=60, test=0)
    (root / "all" / "train").rename(root / "photos")
    return root / "photos"
