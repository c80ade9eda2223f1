"""What the names of files and folders mean: a class, a split, or nothing that anybody put there."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

Role = Literal["train", "val", "test", "query", "gallery"]

SYSTEM_NAMES = frozenset(
    {
        *("__macosx", "network trash folder", "temporary items"),  # macOS
        *("thumbs.db", "ehthumbs.db", "desktop.ini"),  # Windows
        *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000"),
        *("@eadir", "#recycle", "#snapshot", "@tmp", "@sharebin"),  # Synology
        *("@recycle", "@recently-snapshot", "@__thumb"),  # QNAP
        *("lost+found", "__pycache__", "icon\r"),
    }
)
"""Names, in small letters, of what systems put into folders and do not hide by a dot."""

_FILLERS = "data|dataset|set|split|subset|folder|files|images|image|imgs|img|photos|pictures|samples|part|dir|\\d{4}"
"""Words, and years, that the name of a split may have beside it."""

_ROLE_NAMES: dict[Role, str] = {
    "train": "training|train|trainval",
    "val": "validation|validate|valid|val|evaluation|eval|development|dev|holdout",
    "test": "testing|test",
    "query": "queries|query|probe",
    "gallery": "gallery",
}
_ROLES = {
    role: re.compile(f"\\d{{0,2}}(?:{_FILLERS})*(?:{names})(?:{_FILLERS})*") for role, names in _ROLE_NAMES.items()
}
_MENTIONS = re.compile(r"(?<![^\W\d_])(?:train|test|valid|eval|val(?![^\W\d_])|dev(?![^\W\d_]))")


def printable(name: str) -> str:
    """The name of a file or folder as text that can be written anywhere: other characters and bytes are escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in name
    )


def composed(name: str) -> str:
    """The name in NFC: macOS stores "ä" as two code points (NFD), other systems and keyboards as one."""
    return unicodedata.normalize("NFC", name)


def class_name(name: str) -> str:
    """The class that the name of a folder or a row of a table stands for, in whatever code points it is written."""
    return composed(printable(name))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or a system's own: thumbnails, recycle bins, checkpoints of notebooks."""
    return name.startswith((".", "~$")) or name.casefold() in SYSTEM_NAMES


def split_role(name: str) -> Role | None:
    """The split that a folder of this name may be, in any spelling: ``TRAIN``, ``Training``, ``test_set``, ``val2017``.

    Whether it is one is for what lies in it to say: a class may be called so, too.
    """
    letters = re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", name).casefold())
    return next((role for role, pattern in _ROLES.items() if pattern.fullmatch(letters)), None)


def mentions_split(name: str) -> bool:
    """Whether a word of the name starts like that of a split, as in ``cats_train`` or ``Testdaten``."""
    return bool(_MENTIONS.search(unicodedata.normalize("NFKC", name).casefold())) or split_role(name) is not None
