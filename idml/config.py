"""From YAML file and command line to one typed config; every mistake becomes a UserError of one line.

A config is a keyword-only dataclass whose fields are made with ``option``. jsonargparse does the typing because it
holds YAML values and flags to the same types, knows Optional, Literal and lists, and is actively released.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import math
import re
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from idml.errors import UserError, nearest
from idml.lists import ListKind, as_list, pair_value, split_flags
from idml.paths import nearest_path, with_user_paths

ConfigT = TypeVar("ConfigT")


def option(default: Any, help: str, *aliases: str, const: Any = None, kind: ListKind = "values") -> Any:
    """A config field: its default, its one-line help, further spellings of its flag (``"-j"``), where the flag may
    stand alone, the value it then has, and, of a list, how its values are told apart."""
    metadata = {"help": help, "aliases": aliases, "const": const, "kind": kind}
    return dataclasses.field(default=default, metadata=metadata)


def _list_kinds(config_class: type) -> dict[str, ListKind]:
    """Flag -> kind, of every list of a config."""
    hints = get_type_hints(config_class)
    lists = [field for field in dataclasses.fields(config_class) if _element_type(hints[field.name]) is not None]
    return {
        flag: field.metadata["kind"]
        for field in lists
        for flag in (f"--{field.name.replace('_', '-')}", *field.metadata["aliases"])
    }


def _element_type(annotation: Any) -> Any:
    """``list[int]`` and ``list[int] | None`` -> int; anything else -> None."""
    for candidate in (annotation, *get_args(annotation)):
        if get_origin(candidate) is list:
            return get_args(candidate)[0]
    return None


def build_parser(config_class: type, *, prog: str, description: str) -> jsonargparse.ArgumentParser:
    """A parser with a flag per field of ``config_class``, in both spellings, plus ``--config``, ``--print-config``."""
    parser = jsonargparse.ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", type=str, default=None, help="YAML file with any of the keys below")
    parser.add_argument("--print-config", "--print_config", action="store_true", help="print the resolved config, exit")
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        flags = list(dict.fromkeys([f"--{field.name.replace('_', '-')}", f"--{field.name}"]))
        flags += field.metadata["aliases"]
        annotation = hints[field.name]
        default = field.default
        help_text = field.metadata["help"].replace("%", "%%")
        if annotation is bool or annotation == (bool | None):
            yes_no = jsonargparse.ActionYesNo(no_prefix="no-")
            parser.add_argument(*flags, action=yes_no, nargs="?", default=default, help=help_text)
        elif (element := _element_type(annotation)) is not None:
            parser.add_argument(*flags, type=element, nargs="+", default=default, help=help_text)
        elif (const := field.metadata["const"]) is not None:
            parser.add_argument(*flags, type=annotation, nargs="?", const=const, default=default, help=help_text)
        else:
            parser.add_argument(*flags, type=annotation, default=default, help=help_text)
    return parser


def _choices(annotation: Any) -> tuple[str, ...]:
    """The values a Literal (or an optional one) allows; empty for other types."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(choice for part in get_args(annotation) for choice in _choices(part))
    return ()


def _type_name(annotation: Any) -> str:
    """A type as a user would say it: ``int``, ``a, b or c``, ``float or null``."""
    if choices := _choices(annotation):
        return "one of " + ", ".join(choices)
    if (element := _element_type(annotation)) is not None:
        what = {int: "whole numbers", float: "numbers"}.get(element, "values")
        return f"{what} separated by spaces or commas"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type_name(part) for part in get_args(annotation))
    if annotation is type(None):
        return "null"
    return getattr(annotation, "__name__", str(annotation))


REMOVED = ("uncertainty_loss", "uncertainty_share", "uncertainty_shifts")
"""Options of earlier versions, which trained the uncertainty head by loss prediction."""

INSTEAD = "was removed: P(wrong) and novelty are fitted after training now (--introspect, python -m idml introspect)"


def _readable(message: str, config_class: type) -> str:
    """The parser's error as one line that names the flag, what was expected and what was got."""
    hints = get_type_hints(config_class)
    message = " ".join(message.split())
    if unknown := re.search(r"unrecognized arguments: (\S+)", message):
        given = unknown.group(1).split("=")[0]
        known = [name.replace("_", "-") for name in hints]
        if given.lstrip("-").replace("-", "_") in REMOVED:
            return f"{given} {INSTEAD}"
        return f"unknown option {given}{nearest(given.lstrip('-').replace('_', '-'), known)}"
    if bad := re.search(r'Parser key "(\w+)".*(?:Got value|Given value): ?(.*)$', message):
        key, value = bad.groups()
        choices = _choices(hints[key])
        hint = nearest(value, choices) if choices else ""
        return f"--{key.replace('_', '-')}: expected {_type_name(hints[key])}, got {value!r}{hint}"
    return message


def _parse(parse: Callable[[], Any], config_class: type, where: str) -> dict[str, Any]:
    """The values that ``parse`` finds set, by field name; the parser's own printing is kept off the terminal."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return with_user_paths(vars(parse()))
    except argparse.ArgumentError as error:
        raise UserError(where + _readable(str(error), config_class)) from None


def read_config_file(path: str | Path, config_class: type) -> dict[str, Any]:
    """Values of a YAML config file, checked against the fields of ``config_class``.

    Raises:
        UserError: no such file, not a YAML mapping, an unknown key (with the nearest right name), or a bad value.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        near = "" if Path(path).exists() else f"; {nearest_path(Path(path))}"
        raise UserError(f"cannot read the config {path}: {error.strerror}{near}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file: {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: expected a YAML mapping of option: value, got a {type(values).__name__}")
    hints, kinds = get_type_hints(config_class), _list_kinds(config_class)
    normalised = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in REMOVED and name not in hints:
            if name == "uncertainty_loss" and value == "loss-prediction":
                warnings.warn(f"{path}: {key} {value} {INSTEAD}", UserWarning, stacklevel=2)
            continue
        if name not in hints:
            raise UserError(f"{path}: unknown key {key!r}{nearest(name, hints)}")
        if value is False and "off" in _choices(hints[name]):
            value = "off"  # YAML 1.1 reads a bare `off` as false
        if value is None:
            if type(None) not in get_args(hints[name]):
                raise UserError(f"{path}: {key}: expected {_type_name(hints[name])}, got null")
        elif _element_type(hints[name]) is not None:
            value = as_list(value, kinds[f"--{name.replace('_', '-')}"])
            if not isinstance(value, list):
                raise UserError(f"{path}: {key}: expected a list, got {value!r}")
        elif hints[name] in (bool, bool | None) and not isinstance(value, bool):
            raise UserError(f"{path}: {key}: expected true or false, got {value!r}")
        normalised[name] = value
    parser = build_parser(config_class, prog="", description="")
    return _parse(lambda: parser.parse_object(normalised, defaults=False), config_class, f"{path}: ")


def parse_command_line(
    config_class: type, argv: Sequence[str], *, prog: str, description: str
) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Values from ``--config`` and from the flags, each holding only what was really given.

    Flags may be spelled with ``-`` or ``_``. ``--help`` prints and exits with 0.

    Returns:
        (values of the file, values of the flags, whether ``--print-config`` was given).

    Raises:
        UserError: unknown option (with the nearest right name), bad value, unreadable file.
    """
    parser = build_parser(config_class, prog=prog, description=description)
    if any(argument in ("-h", "--help") for argument in argv):
        parser.print_help()
        raise SystemExit(0)
    spelled = split_flags([_underscore_flag(argument) for argument in argv], _list_kinds(config_class))
    flags = _parse(lambda: parser.parse_args(spelled, defaults=False), config_class, "")
    file = flags.pop("config", None)
    print_config = bool(flags.pop("print_config", False))
    return (read_config_file(file, config_class) if file else {}), flags, print_config


def _underscore_flag(argument: str) -> str:
    """``--no_nesterov`` -> ``--no-nesterov``, ``--mix_prob=1`` -> ``--mix-prob=1``: one spelling for all flags."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def build_config(config_class: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """An instance of ``config_class`` with ``values`` over its defaults."""
    return config_class(**values)


def dump_config(config: Any) -> str:
    """The config as YAML that ``--config`` reads back to an equal config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def joined(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings of which later ones win."""
    return {name: value for layer in layers for name, value in layer.items()}


def check_within(config: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """UserError for the first field, other than None, outside its (lowest, highest) value."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            expected = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise UserError(f"--{name.replace('_', '-')}: expected a value {expected}, got {value}")


def check_positive(config: Any, names: Sequence[str]) -> None:
    """UserError for the first of these fields, other than None, that is not a positive finite number."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: expected a positive number, got {value}")


def check_name_values(flag: str, arguments: Sequence[str] | None) -> None:
    """UserError for the first argument that is not name=value."""
    for argument in arguments or []:
        if not re.match(r"\s*[A-Za-z_]\w*\s*=", argument):
            raise UserError(f"--{flag}: expected name=value, got {argument!r}")
        try:
            pair_value(argument.split("=", 1)[1])
        except yaml.YAMLError:
            raise UserError(f"--{flag}: the value of {argument!r} cannot be read; quote it as in YAML") from None


def parse_name_values(arguments: Sequence[str] | None) -> dict[str, Any]:
    """``name=value`` arguments as keyword arguments; values are read as YAML: numbers, true/false, lists, else text."""
    pairs = (argument.split("=", 1) for argument in arguments or [])
    return {name.strip(): pair_value(value) for name, value in pairs}
