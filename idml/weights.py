"""Weights that other programs wrote: which of a file's tensors are meant, and by which names the model has them.

Programs put the tensors of a model under an entry of their checkpoint (``state_dict``, ``model``, and the average over
training as ``state_dict_ema``, ``model_ema``), and wrappers put their own names before those of the parameters, one
before the other. Neither is known by its name here: what counts is where the names of the model's tensors are.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from idml import lite0
from idml.errors import UserError

PREFERRED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "", "state_dict", "model")
"""Entries that are taken before others; timm too prefers averages. Empty: the tensors lie in the file itself."""

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What torch.compile, FSDP and activation checkpointing add to names, anywhere in them; no program calls a layer so."""

KEY_FLAG = "--pretrained-key"

SHOWN = 5
"""Names of tensors that a message gives."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Tensors of a file that may be the weights.

    Attributes:
        entry: of the file that they are under; empty where they lie in the file itself.
        prefix: what stands before the model's names, with the dot at its end; empty where nothing does.
        label: what ``--pretrained-key`` calls them.
        fits: how many have a name of the model's.
        tensors: those behind the prefix, by what follows it.
        left_out: the other names of the entry.
    """

    entry: str
    prefix: str
    label: str
    fits: int
    tensors: Mapping[str, Tensor]
    left_out: tuple[str, ...]

    @property
    def rank(self) -> int:
        """Place in ``PREFERRED``."""
        return PREFERRED.index(self.entry) if self.entry in PREFERRED else len(PREFERRED)


def find_group(
    content: Mapping[Any, Any], own: Collection[str], key: str | None, path: Path, *, flag: str = KEY_FLAG
) -> tuple[Group, tuple[str, ...]]:
    """The tensors of a file that are the model's weights.

    Args:
        content: of the file.
        own: names of the model's tensors.
        key: the entry to take, or the prefix; None takes the one that most names fit, an average before others.
        path: of the file, for the error.
        flag: by which a key is given.

    Returns:
        (these tensors; labels of others that would do as well).

    Raises:
        UserError: there are no tensors; there is no such key; or several would do equally well.
    """
    groups = list(_groups(content, own))
    if not groups:
        raise UserError(f"{path} has no tensors by name: it has {_names(list(map(str, content))) or 'nothing'}")
    chosen = groups
    if key is not None:
        chosen = [group for group in groups if key in (group.label, group.entry)]
        if not chosen:
            labels = _names(sorted(group.label for group in groups if group.label), most=20)
            there = f"it has {labels}" if labels else "its tensors are under no entry"
            raise UserError(f"{flag} {key}: {path} has no such weights: {there}")
    most = max(group.fits for group in chosen)
    best = sorted((group for group in chosen if group.fits == most), key=lambda group: group.rank)
    equal = [group.label for group in best if group.rank == best[0].rank and group.label]
    if most and len(equal) > 1:
        raise UserError(
            f"{path} has the model's weights more than once, as {' and '.join(equal)}: say which with {flag} {equal[0]}"
        )
    if not most:
        best.sort(key=lambda group: (-len(group.tensors), group.rank))
    # An average may lack what is not trained, which in a batch norm is three of five.
    others = [group.label for group in groups if group is not best[0] and 4 * group.fits > most and group.label]
    return best[0], tuple(others)


def _groups(content: Mapping[Any, Any], own: Collection[str]) -> Iterator[Group]:
    """Of each entry with tensors by name: the groups that most names fit, one if there is nothing to choose from."""
    entries = {"": content} | {str(key): value for key, value in content.items() if isinstance(value, Mapping)}
    for entry, values in entries.items():
        tensors = {_without_wrappers(str(name)): value for name, value in values.items() if isinstance(value, Tensor)}
        if not tensors:
            continue
        fits = Counter(prefix for name in tensors for prefix, rest in _splits(name) if _known(rest, own))
        most = max(fits.values(), default=0)
        prefixes = [prefix for prefix, count in fits.items() if count == most]
        if "" in prefixes or (len(prefixes) != 1 and 2 * most <= len(own)):  # none needed, or none found
            prefixes = [""]
        for prefix in prefixes:
            yield Group(
                entry=entry,
                prefix=prefix,
                label=entry if len(prefixes) == 1 else prefix.rstrip("."),
                fits=fits[prefix],
                tensors={n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)},
                left_out=tuple(name for name in tensors if not name.startswith(prefix)),
            )


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """``("", "a.b")`` and ``("a.", "b")`` of ``"a.b"``."""
    parts = name.split(".")
    for index in range(len(parts)):
        prefix = "".join(f"{part}." for part in parts[:index])
        yield prefix, ".".join(parts[index:])


def _known(name: str, own: Collection[str]) -> bool:
    """Whether it is a name of the model, or one that is translated to them."""
    return name in own or lite0.is_layer(name.rpartition(".")[0])


def _names(names: Collection[str], most: int = SHOWN) -> str:
    """The first of the names."""
    shown = list(names)[:most]
    return ", ".join(shown) + (", ..." if len(names) > most else "")


def told(group: Group, others: tuple[str, ...], unused: Collection[str], path: Path, *, flag: str = KEY_FLAG) -> str:
    """The line that says what is loaded.

    Args:
        group, others: as ``find_group`` gave them.
        unused: names of tensors that were not loaded.
        path: of the file.
        flag: by which another key is given.
    """
    verb = "is" if len(others) == 1 else "are"
    also = f" ({', '.join(others)} {verb} there too: {flag} {others[0]})" if others else ""
    left = f"; left out: {_names(unused)} ({len(unused)} tensors)" if unused else ""
    return f"weights: {group.label + ' of ' if group.label else ''}{path}{also}{left}"


def problems_of(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], ignored: tuple[str, ...]) -> list[str]:
    """What keeps the weights from being those of a model, a sentence each.

    Args:
        weights: by name.
        own: the model's.
        ignored: beginnings of names that the model may lack.
    """
    # Versions of torch before 0.4.1 did not count batches, and nothing of a trained batch norm depends on it.
    counted = ("num_batches_tracked",)
    problems = [f"{name} is missing" for name in own if name not in weights and not name.endswith(counted)]
    problems += [f"{name} is not in the model" for name in weights if name not in own and not name.startswith(ignored)]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    return sorted(problems)


def misfit(
    problems: list[str], group: Group, own: Collection[str], content: Mapping[Any, Any], *, optional: bool = True
) -> str:
    """The end of the error for weights that do not fit: what is wrong, and what the file holds instead.

    Args:
        problems: of ``problems_of``.
        group: what was found.
        own: names of the model's tensors.
        content: of the file, for the architecture that it names.
        optional: whether some may be left to chance, as in training.
    """
    count = len(group.tensors) + len(group.left_out)
    where = f" under {group.label}" if group.label else ""
    names = [*(group.prefix + name for name in group.tensors), *group.left_out]
    held = f"the file holds {count} tensors{where}: {_names(names)}"
    if isinstance(content.get("arch"), str):
        held += f", of the architecture {content['arch']}"
    if not group.fits:
        return f"none of its tensors has a name of the model's ({_names(own)}); {held}"
    more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
    advice = ". To start from random weights in their place, name their prefixes with --pretrained-allow-missing"
    return f"{'; '.join(problems[:10])}{more}; {held}{advice if optional else ''}"
