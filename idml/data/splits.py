"""Which folders are splits (train, val, test, query, gallery) and which are classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from idml.data.names import Role, mentions_split, printable, split_role
from idml.data.walk import folders_of, has_images
from idml.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """The splits below a folder.

    Attributes:
        labelled: those with class folders.
        flat: those with images and no class folders.
        others: folders with images that are no splits; not looked for where there are no splits.
    """

    labelled: dict[Role, Path]
    flat: dict[Role, Path]
    others: tuple[Path, ...] = ()

    @property
    def folders(self) -> dict[Role, Path]:
        """All of them."""
        return self.labelled | self.flat


def find_splits(root: Path) -> Splits:
    """The splits in ``root``, in any spelling of their names.

    A folder of such a name is a split if class folders lie below it; else it is a class, called "train" for example.
    Beside a split with class folders, and where nothing else is there, folders of other splits may hold images alone.

    Raises:
        UserError: two folders are the same split; or one cannot be read.
    """
    folders = folders_of(root)
    roles = {folder: role for folder in folders if (role := split_role(folder.name)) is not None}
    with_classes = {folder: role for folder, role in roles.items() if has_class_folders(folder)}
    labelled: dict[Role, Path] = {}
    for folder, role in with_classes.items():
        if role in labelled:
            raise UserError(
                f"{root}: {slashed([labelled[role], folder])} are both the {role} split by their names: rename one, or "
                "move it away"
            )
        labelled[role] = folder
    # An empty folder is no class, and an empty split has to be named.
    rest = {folder: role for folder, role in roles.items() if folder not in with_classes and role not in labelled}
    if not roles:
        return Splits(labelled={}, flat={})
    others = tuple(folder for folder in folders if folder not in roles and has_images(folder))
    if not labelled and (others or len(set(rest.values())) < 2):
        return Splits(labelled={}, flat={})
    flat: dict[Role, Path] = {}
    for folder, role in rest.items():
        flat.setdefault(role, folder)
    return Splits(labelled=labelled, flat=flat, others=others)


def has_class_folders(folder: Path) -> bool:
    """Whether there is a folder with images in it."""
    return any(has_images(each) for each in folders_of(folder))


def check_classes(root: Path, folders: Sequence[Path], *, layout: str) -> None:
    """UserError where folders that are about to be classes are splits, or hold splits.

    Args:
        root: in which they lie.
        folders: the classes.
        layout: what is expected.
    """
    splits = find_splits(root)
    found = list(splits.labelled.values())
    if len(found) < 2 and len(found) < len(folders):  # one of several may be a class that is called train
        found = [folder for folder in folders if mentions_split(folder.name) and has_class_folders(folder)]
        found = found if len(found) == len(folders) else []
    if found:
        raise UserError(f"{root} has splits in it ({slashed(found)}), where class folders should be; expected {layout}")
    if splits.flat:
        flat = list(splits.flat.values())
        raise UserError(f"{root}: there are images, but no class folders, in {slashed(flat)}; expected {layout}")
    for folder in folders:
        inner = {role: each for each in folders_of(folder) if (role := split_role(each.name)) and has_images(each)}
        if "train" in inner and len(inner) > 1:
            if len(folders) == 1:
                raise UserError(f"{root} has nothing but {folder}, which has splits in it: give {folder} in its place")
            raise UserError(
                f"the class folder {folder} has splits in it ({slashed(list(inner.values()))}): put classes into "
                f"splits, as in {root / 'train' / folder.name}; expected {layout}"
            )


def slashed(folders: Sequence[Path]) -> str:
    """Names of folders, for messages."""
    return ", ".join(f"{printable(folder.name)}/" for folder in folders)
