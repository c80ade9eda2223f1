"""Icon families as npm packages of Iconify, and their drawings of the names that enough of them have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from idml.data.embedded.emoji_mini import render
from idml.data.embedded.icon_families import LICENCES, Source
from idml.data.icons import ICON_SIZE
from idml.errors import UserError

MIN_FAMILIES = 8
"""Families that must draw a name for it to be a class."""

Packages = Mapping[str, dict[str, Any]]
"""{package: its icons.json, with its info.json as ``info``}."""

Families = Mapping[str, tuple[Source, ...]]


class Drawings:
    """Drawings of icons, N of them, in one order: images (N, 48, 48) uint8, names and families (N,) strings."""

    def __init__(self, images: np.ndarray, names: np.ndarray, families: np.ndarray) -> None:
        self.images, self.names, self.families = images, names, families

    def keep(self, chosen: np.ndarray) -> Drawings:
        """Those of a mask or of indices, less the names that then have fewer than ``MIN_FAMILIES``."""
        names, families = self.names[chosen], self.families[chosen]
        unique, counts = np.unique(names, return_counts=True)
        enough = np.isin(names, unique[counts >= MIN_FAMILIES])
        return Drawings(self.images[chosen][enough], names[enough], families[enough])

    def without(self, names: set[str]) -> Drawings:
        return self.keep(~np.isin(self.names, sorted(names)))


def read_package(packages: Path, source: Source) -> dict[str, Any]:
    """The icons of one package and what is said of them (``info``).

    Raises:
        UserError: it is not there, of another version, or under another licence than those that are taken.
    """
    folder = packages / "node_modules" / "@iconify-json" / source.package
    folder = folder if folder.is_dir() else packages / source.package
    try:
        version = json.loads((folder / "package.json").read_text(encoding="utf-8"))["version"]
        icons, info = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("icons", "info"))
    except FileNotFoundError as error:
        raise UserError(f"no {error.filename}; --packages must be the folder of the npm install above") from None
    if version != source.version:
        raise UserError(f"{folder} is version {version}, expected {source.version}; npm install that one")
    if info["license"].get("spdx") not in LICENCES:
        raise UserError(f"{folder} is under {info['license'].get('spdx')}; expected one of {', '.join(LICENCES)}")
    return icons | {"info": info}


def icons_by_name(icons: dict[str, Any], styles: tuple[str, ...]) -> dict[str, str]:
    """{name: icon} of one package: an icon belongs to the longest style that it fits, a name to its first style.

    >>> icons_by_name({"home": {}, "home-fill": {}, "sun-fill": {}}, ("{}", "{}-fill"))
    {'home': 'home', 'sun': 'sun-fill'}
    """
    found: dict[str, tuple[int, str]] = {}
    for icon, drawing in sorted(icons.items()):
        fitting = []
        for rank, style in enumerate(styles):
            before, after = style.split("{}")
            if icon.startswith(before) and icon.endswith(after) and len(icon) > len(before) + len(after):
                fitting.append((len(style), rank, icon[len(before) : len(icon) - len(after)]))
        if fitting and not drawing.get("hidden"):
            _, rank, name = max(fitting)
            found[name] = min(found.get(name, (rank, icon)), (rank, icon))
    return {name: icon for name, (_, icon) in found.items()}


def word_key(name: str) -> str:
    """The same for names of the same words: chart-bar and bar-chart. Left-down is another corner than down-left.

    >>> word_key("chart-bar"), word_key("corner-left-down")
    ('bar-chart', 'corner-left-down')
    """
    return name if name.startswith("corner-") else "-".join(sorted(name.split("-")))


def draw(packages: Packages, families: Families) -> Drawings:
    """Every drawing of a name that enough families have, in order of name and then of family.

    Of the ways to order the words of a name, the most frequent one is its name, and each family's preferred.
    """
    found: dict[str, dict[str, dict[str, tuple[str, str]]]] = {}
    for family, sources in families.items():
        for source in sources:
            for name, icon in icons_by_name(packages[source.package]["icons"], source.styles).items():
                spelling = found.setdefault(word_key(name), {}).setdefault(name, {})
                spelling.setdefault(family, (source.package, icon))
    drawn: dict[str, dict[str, tuple[str, str]]] = {}
    for spellings in found.values():
        order = sorted(spellings, key=lambda name: (-len(spellings[name]), name))
        by_family = {family: icon for name in reversed(order) for family, icon in spellings[name].items()}
        if len(by_family) >= MIN_FAMILIES:
            drawn[order[0]] = by_family
    taken = [(name, family) for name in sorted(drawn) for family in families if family in drawn[name]]
    icons = [drawn[name][family] for name, family in taken]
    images = np.stack([render(packages[package], icon, ICON_SIZE)[..., 0] for package, icon in icons])
    return Drawings(images, np.array([name for name, _ in taken]), np.array([family for _, family in taken]))
