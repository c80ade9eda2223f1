"""Draw icons48.npz: icons by name, each drawn by 8 to 16 icon families, from what Iconify packs of them.

    npm install --prefix DIR $(python -m idml.data.embedded.icons --list-packages)
    pip install resvg-py==0.5.0
    python -m idml.data.embedded.icons --packages DIR --out icons48.npz

A class is a name that at least ``MIN_FAMILIES`` families give to an icon. Names are one that differ by the style alone
(home, home-outline, home-24-regular) or by the order of their words (bar-chart, chart-bar). A family gives one drawing,
in its preferred style. Icons that Iconify hides and the names that its aliases give to other icons are not used.
``icon_families`` has the families, all under permissive licences, and the versions of their packages. Left out are then

1. names of brands, names that mean several things, and second names of a thing (``icon_families``, by hand),
2. drawings that are blank or almost black, and drawings of a name that another family draws nearly the same
   (``COPY``): a chevron that twenty families draw to the pixel is one drawing,
3. names whose drawings look no more like one another than like anything else (``AGREEMENT``): drag, loading, sort,
4. names that look like a name with more drawings (``RESEMBLANCE``): those that most families which draw both draw
   nearly the same (dice-4 and dice-5), and those whose drawings cannot be told apart (``TOLD_APART``: octagon and
   circle), unless families that draw both tell them apart in one way (``CONSISTENT``: user-plus and user-minus),
5. drawings beyond ``MAX_FAMILIES`` of a name, by the SHA-256 of name and family, a draw that favours no family.

Names that have fewer than ``MIN_FAMILIES`` drawings after a step are left out too. The file has the arrays of
``idml.data.packs.PACK_ARRAYS``; next to it, icons48.LICENSES.txt names author, licence and address of each family.
Takes two minutes on a slow core, and gives the same bytes each time with the versions of requirements.lock.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np

from idml.data.embedded.icon_drawings import Drawings, Families, Packages, draw, read_package
from idml.data.embedded.icon_families import AMBIGUOUS, BRANDS, FAMILIES, SYNONYMS
from idml.data.embedded.icon_measures import INK, agreement, consistency, describe, resemblance, shrunk, told_apart
from idml.data.packs import split_classes
from idml.errors import UserError, run_main

MAX_FAMILIES = 16
"""Drawings of a name at most: link, star and calendar are drawn by sixty families, other names by eight."""

INKED = (0.01, 0.7)
"""Share of black in a drawing. Below are blank ones, above are white signs on a full square."""

COPY = 4.0
"""Mean absolute difference of two drawings at 24 px, of 255, below which they are nearly the same."""

COPYING_FAMILIES = 3
"""At least so many families must draw two names nearly the same for the names to be one."""

RESEMBLANCE = 0.95
"""Least correlation of the mean drawings of two names that are compared further. Two names of one thing have 1, give or
take the chance of few drawings."""

AGREEMENT = 0.62
"""Least probability that a drawing is more like another of its name than like one of another name; 40 of 663 names have
less, from compress (0.39) to cancel (0.61)."""

TOLD_APART = 0.7
"""Least share of drawings that are nearer to the mean of their own name than to that of another. Two names of one thing
have about 0.5, and with eight drawings each up to 0.7 by chance."""

CONSISTENT = 0.8
"""Least share of families that tell two names apart as the others do. Zoom-in and zoom-out have 1.0, user-plus and
user-minus 0.9, chat and comment 0.5; toggle-on and toggle-off 0.5, for some draw the one as others draw the other."""


def draw_order(drawings: Drawings) -> np.ndarray:
    """(N,) int64: the drawings by name, those of a name in the order of the SHA-256 of name and family."""
    keys = [
        (name, hashlib.sha256(f"{name}/{family}".encode()).hexdigest())
        for name, family in zip(drawings.names.tolist(), drawings.families.tolist(), strict=True)
    ]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__))


def copies(drawings: Drawings) -> np.ndarray:
    """(N,) bool: drawings nearly the same as one of the same name that comes before it in ``draw_order``."""
    small, copied = shrunk(drawings.images), np.zeros(len(drawings.names), bool)
    kept: list[int] = []
    for index in draw_order(drawings):
        kept = [other for other in kept if drawings.names[other] == drawings.names[index]]
        copied[index] = bool(kept) and np.abs(small[kept] - small[index]).mean(1).min() < COPY
        if not copied[index]:
            kept.append(index)
    return copied


def other_names(drawings: Drawings) -> set[str]:
    """Of each group of ``SYNONYMS`` all names but the one with the most drawings."""
    counts = {group: [int((drawings.names == name).sum()) for name in group] for group in SYNONYMS}
    return {name for group, drawn in counts.items() for name in group if name != group[int(np.argmax(drawn))]}


def unclear_names(drawings: Drawings) -> dict[str, float]:
    """{name: agreement} of the names whose drawings do not agree."""
    names, labels = np.unique(drawings.names, return_inverse=True)
    measured = agreement(describe(drawings.images), labels)
    return {str(name): float(value) for name, value in zip(names, measured, strict=True) if value < AGREEMENT}


def lookalikes(drawings: Drawings) -> dict[str, str]:
    """{name: the name that it looks like} of names to leave out: those with fewer drawings than the other."""
    features, small = describe(drawings.images), shrunk(drawings.images)
    names, counts = np.unique(drawings.names, return_counts=True)
    order = [str(name) for _, name in sorted(zip(-counts, names, strict=True))]
    members = {name: np.flatnonzero(drawings.names == name) for name in order}
    found: dict[str, str] = {}
    for place, name in enumerate(order):
        for other in order[:place]:
            here, there = members[name], members[other]
            if other in found or resemblance(features[here], features[there]) < RESEMBLANCE:
                continue
            _, first, second = np.intersect1d(drawings.families[here], drawings.families[there], return_indices=True)
            pairs = here[first], there[second]
            alike = np.abs(small[pairs[0]] - small[pairs[1]]).mean(1) < COPY
            copied = alike.sum() >= max(COPYING_FAMILIES, alike.size / 2)
            distinguished = (
                alike.size >= len(here) / 2 and consistency(*(features[pair] for pair in pairs)) >= CONSISTENT
            )
            if copied or (not distinguished and told_apart(features[here], features[there]) < TOLD_APART):
                found[name] = other
                break
    return found


def choose(drawings: Drawings) -> Drawings:
    """The drawings of the set, in order of name and then of family; says what is left out."""

    def say(step: str, names: list[str]) -> None:
        print(f"{step}: {len(names)} names left out: {', '.join(names) or 'none'}", flush=True)

    before = set(drawings.names.tolist())
    print(f"{len(before)} names, {len(drawings.names)} drawings", flush=True)
    drawings = drawings.without(set(BRANDS | AMBIGUOUS))
    say("brands", sorted(before & BRANDS))
    say("several meanings", sorted(before & AMBIGUOUS))
    others = other_names(drawings)
    drawings = drawings.without(others)
    say("other names of one thing", sorted(before & others))
    before = set(drawings.names.tolist())
    inked, darkest = 1 - drawings.images.mean((1, 2)) / 255, 255 - drawings.images.min((1, 2))
    drawings = drawings.keep((inked >= INKED[0]) & (inked <= INKED[1]) & (darkest > INK))
    drawings = drawings.keep(~copies(drawings))
    say("too few different drawings", sorted(before - set(drawings.names.tolist())))
    unclear = unclear_names(drawings)
    say(
        "drawings unlike one another",
        [f"{name} {unclear[name]:.2f}" for name in sorted(unclear, key=unclear.__getitem__)],
    )
    drawings = drawings.without(set(unclear))
    alike = lookalikes(drawings)
    say("like another name", [f"{name} (like {alike[name]})" for name in sorted(alike)])
    drawings = drawings.without(set(alike))
    order = draw_order(drawings)
    names = drawings.names[order]
    position = np.arange(len(order)) - np.searchsorted(names, names)
    return drawings.keep(np.sort(order[position < MAX_FAMILIES]))


def licence_text(packages: Packages, families: Families, name: str) -> str:
    """Name, version, author, licence and address of each family's packages, a section a family."""
    sections = [f"The drawings of {name} and where they are from. The licences are those that the packages state."]
    for family, sources in families.items():
        lines = [family]
        for source in sources:
            info = packages[source.package]["info"]
            author, licence = info["author"], info["license"]
            lines += [
                f"  {info['name']}, package @iconify-json/{source.package} {source.version}",
                f"    author   {author['name']}{', ' + author['url'] if author.get('url') else ''}",
                f"    licence  {licence['spdx']}{', ' + licence['url'] if licence.get('url') else ''}",
            ]
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def save(drawings: Drawings, packages: Packages, families: Families, out: Path) -> None:
    """Write the pack and, next to it, the licences; print the families and statistics of the training images."""
    classes, y = np.unique(drawings.names, return_inverse=True)
    vendors, vendor = np.unique(drawings.families, return_inverse=True)
    arrays = {
        "X": np.repeat(drawings.images[..., None], 3, axis=3),
        "y": y.astype(np.int16),
        "vendor": vendor.astype(np.uint8),
        "vendors": vendors,
        "classes": classes,
        "names": classes,
    }
    np.savez_compressed(out, **arrays)  # type: ignore[arg-type]
    licences = out.with_suffix(".LICENSES.txt")
    licences.write_text(licence_text(packages, families, out.name), encoding="utf-8")
    for family, sources in families.items():
        terms = "; ".join(
            f"{source.package} {packages[source.package]['info']['license']['spdx']}" for source in sources
        )
        print(f"{family:<16} {int((drawings.families == family).sum()):>5} images  {terms}")
    counts = np.bincount(y)
    print(f"{len(classes)} names, {len(vendors)} families, {len(y)} images, {counts.min()} to {counts.max()} a name")
    train = drawings.images[np.isin(y, split_classes(len(classes))[0])] / 255
    print(f"training images: mean {train.mean():.4f}, std {train.std():.4f}")
    print(f"{out.name}: {out.stat().st_size / 1e6:.2f} MB; {licences.name}")


def build(folder: Path, out: Path, families: Families = FAMILIES) -> None:
    """Draw the pack ``out`` from the packages below a folder.

    Raises:
        UserError: a package is missing or another one than asked for, or resvg-py is.
    """
    sources = [source for family in families.values() for source in family]
    packages = {source.package: read_package(folder, source) for source in sources}
    save(choose(draw(packages, families)), packages, families, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="folder of the npm install above")
    parser.add_argument("--out", type=Path, default=Path("icons48.npz"), help="file to write; default icons48.npz")
    parser.add_argument("--list-packages", action="store_true", help="print the packages with their versions, for npm")
    arguments = parser.parse_args()
    if arguments.list_packages:
        sources = [source for family in FAMILIES.values() for source in family]
        print(" ".join(f"@iconify-json/{source.package}@{source.version}" for source in sources))
        return
    if arguments.packages is None:
        raise UserError("--packages DIR is missing: the folder of the npm install above")
    build(arguments.packages, arguments.out)


if __name__ == "__main__":
    run_main(main)
