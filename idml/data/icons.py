"""Icons as a retrieval data set: a class is a name, an image one icon family's drawing of it, 48 px, black on white.

``python -m idml.data.embedded.icons`` draws the pack. Half of the classes are to train on, half to search among, where
a query looks for other families' drawings of what it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from idml.data.image_dataset import Preprocessing
from idml.data.packs import Pack, find_pack, load_pack, retrieval_data, split_classes
from idml.data.retrieval_data import RetrievalData
from idml.errors import UserError

if TYPE_CHECKING:
    from idml.config_dml import DmlConfig

ICON_SIZE = 48
"""Side of the stored images in pixels."""

ICON_MEAN, ICON_STD = (0.7708,) * 3, (0.4019,) * 3
"""Over the training images of icons48, in [0, 1]; ``idml.data.embedded.icons`` prints them."""

CROP_PADDING = 3
"""A shift of up to 3 of 48 pixels: families leave margins of 0 to about 4 pixels."""


def read_icons(config: DmlConfig) -> RetrievalData:
    """The pack that ``--data-dir`` names: the .npz file, or a folder with one .npz in it or with icons48.npz.

    Each family of the pack is one of ``RetrievalData.families`` too: related ones were joined when it was drawn.

    Raises:
        UserError: no pack there; one that is damaged, not in the layout or in colour; one with fewer families than
            ``config.min_families``, or with fewer than two classes on a side that so many families draw.
    """
    path = find_pack(config.data_dir, "icons", "icons48.npz", "python -m idml.data.embedded.icons draws it")
    pack = load_pack(path)
    if not (pack.images == pack.images[..., :1]).all():
        raise UserError(f"{path}: X must be black on white, as icons are, but has colours; for emoji: --dataset emoji")
    return retrieval_data(
        pack,
        Preprocessing(image_size=config.image_size or ICON_SIZE, mean=ICON_MEAN, std=ICON_STD, fit="whole"),
        families=np.arange(len(pack.vendors)),
        crop_padding=CROP_PADDING,
        drawn=enough_families(pack, config.min_families, str(path)),
    )


def enough_families(pack: Pack, least: int, where: str) -> np.ndarray:
    """(C,) bool: the classes that at least ``least`` families draw.

    Raises:
        UserError: the pack has fewer families, or fewer than two such classes to train or to test on.
    """
    present = len(np.unique(pack.vendor))
    if present < least:
        raise UserError(f"{where}: --min-families {least} asks for more icon families than the {present} it has")
    pairs = np.unique(np.stack([pack.labels, pack.vendor]), axis=1)
    drawn = np.bincount(pairs[0], minlength=len(pack.classes)) >= least
    counts = [int(drawn[half].sum()) for half in split_classes(len(pack.classes))]
    if min(counts) < 2:
        raise UserError(
            f"{where}: --min-families {least} leaves {counts[0]} classes to train and {counts[1]} to test on; expected "
            "at least 2 each: take a smaller number"
        )
    return drawn
