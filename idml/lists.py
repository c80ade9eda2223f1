"""Lists of values as people write them: on a command line and in a config file, separated by spaces or commas."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import yaml

ListKind = Literal["values", "pairs", "paths"]
"""Values end at a space or comma; pairs are name=value, where a value may hold commas; paths are taken as they are."""

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

NEXT_PAIR = re.compile(r"\s*[A-Za-z_]\w*\s*=(?!=)")
"""What behind a comma begins another pair."""


def split_flags(arguments: Sequence[str], kinds: Mapping[str, ListKind]) -> list[str]:
    """A command line whose lists have an argument for each value: ``--ks 1,2`` and ``--ks=1,2`` -> ``--ks 1 2``.

    Args:
        arguments: flags spelled as in ``kinds``.
        kinds: of every flag that takes a list.
    """
    found: list[str] = []
    kind: ListKind = "paths"  # outside of a list nothing is split
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in kinds:
            kind = kinds[name]
            found += [name, *(split_values([value], kind) if equals else [])]
        elif argument.startswith("-") and not NUMBER.match(argument):
            kind = "paths"
            found.append(argument)
        else:
            found += split_values([argument], kind)
    return found


def split_values(texts: Iterable[str], kind: ListKind) -> list[str]:
    """The values in these texts, none of them empty (but for paths)."""
    if kind == "paths":
        return list(texts)
    pieces: list[str] = []
    for text in texts:
        if kind == "pairs":
            pieces += _pairs(text)
        else:
            text = text.strip()
            bracketed = text.startswith("[") and text.endswith("]")  # as in a config file
            pieces += re.split(r"[\s,]+", text[1:-1] if bracketed else text)
    return [piece for piece in pieces if piece]


def _pairs(text: str) -> Iterator[str]:
    """The name=value pairs of a text; a comma within quotes or brackets, or within a value, parts nothing."""
    start, depth, quote = 0, 0, ""
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0 and (NEXT_PAIR.match(text, place + 1) or not text[place + 1 :].strip()):
            yield text[start:place].strip()
            start = place + 1
    yield text[start:].strip()


def as_list(value: Any, kind: ListKind) -> Any:
    """A list out of a config file: as it is, or spelled ``1, 2``, as one value, or (pairs) as a mapping.

    What cannot be meant as a list is given back as it is.
    """
    if kind == "pairs" and isinstance(value, Mapping):
        return [f"{name}={_as_yaml(each)}" for name, each in value.items()]
    if isinstance(value, str):
        return split_values([value], kind)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [value]
    return value


def _as_yaml(value: Any) -> str:
    """On one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()


def pair_value(text: str) -> Any:
    """The value behind ``name=``: a number, true or false, a list, else text; numbers with commas are a list.

    Read as YAML, but for numbers as 1e-3, which YAML takes for text.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 1 and all(NUMBER.fullmatch(part) for part in parts):
        return [pair_value(part) for part in parts]
    value = yaml.safe_load(text)
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) and not _quoted(text) else value


def _quoted(text: str) -> bool:
    return text.strip()[:1] in ("'", '"')
