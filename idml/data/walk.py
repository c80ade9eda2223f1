"""What lies below a folder: its images and what is left out, by the same rules wherever a folder is read.

Hidden files and folders do not count. Links are followed like what they lead to, but never in circles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from idml.data.names import is_hidden, printable
from idml.data.pixels import image_suffixes
from idml.distributed import is_main
from idml.errors import UserError

OWN_SUFFIXES = (".beton", ".beton.json")
"""Files that this project may have put beside the images itself."""

PHOTO_SUFFIXES = frozenset(
    {".heic", ".heif", ".hif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw"}
)
"""Photos that Pillow does not read."""

SHOWN = 5
"""Kinds and names of a sort that are listed."""


@dataclasses.dataclass(slots=True)
class LeftOut:
    """What was found below a folder and is not taken, to be reported once.

    Attributes:
        kinds: how many files of each suffix are no images; bare: one without a suffix.
        nowhere: links that lead to nothing.
        loose: images that lie in no class folder, where all others do.
        unused: folders with images that are neither class nor split.
        wide: images of which the range of greys is a guess, see ``scaled_grey``.
        dark: images of 16 bits that use little of their range.
    """

    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    bare: str = ""
    nowhere: list[Path] = dataclasses.field(default_factory=list)
    loose: list[Path] = dataclasses.field(default_factory=list)
    unused: list[Path] = dataclasses.field(default_factory=list)
    wide: list[Path] = dataclasses.field(default_factory=list)
    dark: list[Path] = dataclasses.field(default_factory=list)

    def add(self, other: LeftOut) -> None:
        """What was found in another folder."""
        self.kinds.update(other.kinds)
        self.bare = self.bare or other.bare
        for name in ("nowhere", "loose", "unused", "wide", "dark"):
            getattr(self, name).extend(getattr(other, name))

    def add_file(self, name: str) -> None:
        """A file that is no image."""
        if not name.endswith(OWN_SUFFIXES):
            suffix = printable(os.path.splitext(name)[1].lower())
            self.kinds[suffix] += 1
            self.bare = self.bare if suffix else printable(name)

    def _bare(self, number: int) -> str:
        return self.bare if number == 1 else "without a suffix"

    def sentences(self) -> list[str]:
        """All of it in words; empty where nothing was left out."""
        texts: list[str] = []
        if self.kinds:
            count = self.kinds.total()
            ordered = sorted(self.kinds.items(), key=lambda item: (-item[1], not item[0], item[0]))
            kinds = [f"{number} {kind or self._bare(number)}" for kind, number in ordered[:SHOWN]]
            more = len(self.kinds) - len(kinds)
            text = f"left out {_count(count, 'file')} that {'is no image' if count == 1 else 'are no images'}: "
            text += ", ".join(kinds)
            text += f" and {more} more kinds" if more > 0 else ""
            if photos := sorted(PHOTO_SUFFIXES & self.kinds.keys()):
                text += f" (Pillow does not read {', '.join(photos)}: convert them, to .jpg for example)"
            texts.append(text)
        if self.nowhere:
            links = [f"{printable(str(path))} -> {printable(_target(path))}" for path in self.nowhere]
            texts.append(f"left out {_count(len(links), 'link')} to nowhere: {_some(links)}")
        if self.loose:
            texts.append(
                f"left out {_count(len(self.loose), 'image')} in no class folder: {_some(list(map(str, self.loose)))}"
            )
        texts += [f"{printable(str(path))} is not used" for path in self.unused]
        if self.wide:
            count = len(self.wide)
            texts.append(
                f"{_count(count, 'image')} of floating numbers or 32-bit integers {_are(count)} scaled by the range of "
                f"the numbers: {_some(list(map(str, self.wide)))}"
            )
        if self.dark:
            count = len(self.dark)
            texts.append(
                f"{_count(count, 'image')} of 16 bits use less than a sixteenth of that range and {_are(count)} almost "
                f"black; numbers of 12 bits have to be scaled before: {_some(list(map(str, self.dark)))}"
            )
        return texts

    def warn(self, root: Path) -> None:
        """One warning that says all of it, by rank 0."""
        if (texts := self.sentences()) and is_main():
            warnings.warn(f"{printable(str(root))}: {'; '.join(texts)}", UserWarning, stacklevel=3)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _some(names: list[str]) -> str:
    return ", ".join(map(printable, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return "?"


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder and is not hidden, sorted by name.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; a link that leads nowhere, or in circles, is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def leads_nowhere(entry: os.DirEntry[str]) -> bool:
    """Whether it is a link to nothing, or to itself."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def folders_of(folder: Path) -> list[Path]:
    """The folders in a folder, links to other folders among them, sorted by name; UserError where it cannot be read."""
    folders = [entry for entry in entries_of(folder) if is_folder(entry)]
    way = (os.path.realpath(folder),)
    return [
        folder / entry.name
        for entry in folders
        if not entry.is_symlink() or not _leads_back(os.path.realpath(entry.path), way)
    ]


def images_below(folder: Path, left_out: LeftOut, *, within: Path | None = None) -> list[Path]:
    """All images below a folder, at any depth, sorted.

    Links that lead nowhere count as images where their names are those of images: they are found when they are decoded.

    Args:
        folder: that exists.
        left_out: gets what is none.
        within: the folder that all is read of, to which links do not lead back; by default ``folder``.

    Raises:
        UserError: a folder cannot be read.
    """
    return sorted(_walk(folder, image_suffixes(), left_out, within or folder))


def has_images(folder: Path) -> bool:
    """Whether there is an image below a folder, at any depth; UserError where one cannot be read."""
    return next(_walk(folder, image_suffixes(), LeftOut(), folder), None) is not None


def images_in(folder: Path, left_out: LeftOut) -> list[Path]:
    """The images that lie in the folder itself, sorted.

    ``left_out`` gets links that lead nowhere, but no other files: lists and licences have their place there.
    """
    suffixes, others = image_suffixes(), LeftOut()
    images = [path for entry in entries_of(folder) for path in _file(entry, folder, suffixes, others)]
    left_out.nowhere += others.nowhere
    return images


def _walk(folder: Path, suffixes: frozenset[str], left_out: LeftOut, within: Path) -> Iterator[Path]:
    start = os.path.realpath(folder)
    # Folder, where it really is, the real folders on the way to it, whether there is a link on that way.
    waiting: list[tuple[Path, str, tuple[str, ...], bool]] = [
        (folder, start, (os.path.realpath(within), start), folder.is_symlink())
    ]
    while waiting:
        here, real, way, linked = waiting.pop()
        for entry in entries_of(here):
            if not is_folder(entry):
                yield from _file(entry, here, suffixes, left_out)
                continue
            is_link = entry.is_symlink()
            inside = os.path.realpath(entry.path) if is_link else os.path.join(real, entry.name)
            if (is_link or linked) and _leads_back(inside, way):
                continue
            waiting.append((here / entry.name, inside, (*way, inside), linked or is_link))


def _leads_back(folder: str, way: tuple[str, ...]) -> bool:
    """Whether it is one of the folders on the way, or holds one, so that it would bring back what has been seen."""
    return any(each == folder or each.startswith(os.path.join(folder, "")) for each in way)


def _file(entry: os.DirEntry[str], folder: Path, suffixes: frozenset[str], left_out: LeftOut) -> Iterator[Path]:
    """The path of a file that is an image; anything else is noted."""
    if os.path.splitext(entry.name)[1].lower() in suffixes:
        with contextlib.suppress(OSError):
            if entry.is_dir():
                return
        yield folder / entry.name
    elif leads_nowhere(entry):
        left_out.nowhere.append(folder / entry.name)
    elif not is_folder(entry):
        left_out.add_file(entry.name)
