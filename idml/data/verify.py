"""The command ``python -m idml verify-data``: all that is wrong with a retrieval data set, in one go."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from idml.config import build_config, check_within, dump_config, option, parse_command_line
from idml.data.cars import list_cars
from idml.data.image_files import decoding_error
from idml.data.listing import Counts, Listing, missing_files, split_problems
from idml.data.retrieval_data import RetrievalData
from idml.data.retrieval_folder import FOLDER_LAYOUT, list_csv, list_folder
from idml.data.retrieval_readers import list_cub, list_inshop, list_sop
from idml.errors import UserError

KnownDataset = Literal["cub", "cars", "sop", "SOP", "inshop", "Inshop", "folder", "csv", "emoji-mini", "emoji", "icons"]


@dataclasses.dataclass(kw_only=True, slots=True)
class VerifyConfig:
    """Options of ``verify-data``, with the meaning that they have in train_dml.py."""

    dataset: KnownDataset | None = option(None, "which data set to look at")
    data_dir: str | None = option(
        None, "folder that holds the data set's own folder; default ./data for published ones"
    )
    csv: str | None = option(
        None, "file with columns path,label[,split] (dataset csv); paths are relative to --data-dir"
    )
    test_fraction: float = option(
        0.5, "share of the classes that are tested on, where the data do not say (folder, csv)"
    )
    workers: int = option(os.cpu_count() or 1, "threads that decode; default: one for each CPU", "-j")
    verbose: bool = option(True, "progress bar (never drawn when the output is not a terminal)")


LISTERS: dict[str, Callable[[VerifyConfig], Listing]] = {
    "cub": lambda config: list_cub(Path(config.data_dir or "data")),
    "cars": lambda config: list_cars(Path(config.data_dir or "data")),
    "sop": lambda config: list_sop(Path(config.data_dir or "data")),
    "inshop": lambda config: list_inshop(Path(config.data_dir or "data")),
    "folder": lambda config: list_folder(_own_folder(config), config.test_fraction),
    "csv": lambda config: list_csv(config.csv, config.data_dir, config.test_fraction),
}


def verify_data(arguments: Sequence[str]) -> None:
    """``python -m idml verify-data --dataset D --data-dir DIR``: prints what was found and all that is wrong.

    Raises:
        UserError: bad options; or, after the report, something is wrong with the data: a summary in one line.
    """
    description = "Look whether a retrieval data set is whole: its lists, its files, and whether every image decodes."
    file, flags, print_config = parse_command_line(
        VerifyConfig, arguments, prog="python -m idml verify-data", description=description
    )
    config = build_config(VerifyConfig, file | flags)
    if print_config:
        print(dump_config(config), end="")
        return
    if config.dataset is None:
        raise UserError(f"--dataset is missing: one of {', '.join([*LISTERS, 'emoji-mini', 'emoji', 'icons'])}")
    check_within(config, {"test_fraction": (0.01, 0.99), "workers": (0, math.inf)})
    name = config.dataset.lower()
    if name not in LISTERS:
        _verify_pack(name, config)
    elif wrong := _verify_listing(LISTERS[name](config), config):
        raise UserError(f"{name}: {'; '.join(wrong)}; the report above names them")
    print("all good")


def _own_folder(config: VerifyConfig) -> Path:
    if config.data_dir is None:
        raise UserError(f"dataset folder needs --data-dir: {FOLDER_LAYOUT}")
    return Path(config.data_dir)


def _verify_listing(listing: Listing, config: VerifyConfig) -> list[str]:
    """Print the report of a listing; what is wrong, in words."""
    _print_item("data set", listing.name)
    _print_item("root", str(listing.root))
    _print_item("found as", listing.variant)
    _print_counts(listing.counts(), listing)
    problems = split_problems(listing)
    _print_findings("wrong lists, classes or counts", problems)
    paths = list(dict.fromkeys(record.path for record in listing.records))
    missing = missing_files(paths)
    _print_findings(f"missing files, of {len(paths)} listed", missing)
    gone = set(missing)
    undecodable = _print_undecodable([path for path in paths if path not in gone], config)
    counted = (
        (len(problems), "problems with lists, classes or counts"),
        (len(missing), "files missing"),
        (undecodable, "files do not decode"),
    )
    return [f"{count} {what}" for count, what in counted if count]


def _verify_pack(name: str, config: VerifyConfig) -> None:
    """Print the report of emoji or icons, all classes of them; their reader raises a UserError for what is wrong."""
    from idml.config_dml import DmlConfig
    from idml.data.emoji import read_emoji, read_emoji_mini
    from idml.data.icons import read_icons

    readers: dict[str, Callable[[DmlConfig], RetrievalData]]
    readers = {"emoji-mini": read_emoji_mini, "emoji": read_emoji, "icons": read_icons}
    data = readers[name](build_config(DmlConfig, {"dataset": name, "data_dir": config.data_dir, "min_families": 1}))
    _print_item("data set", name)
    parts = {"train": data.train, "test": data.test}
    _print_counts({split: Counts(len(part), len(np.unique(part.labels))) for split, part in parts.items()}, None)
    _print_item("images", "in memory, so all of them decode")


def _print_counts(counts: dict, listing: Listing | None) -> None:
    """One line per split, beside what the full published set has."""
    expected = dict(listing.expected or {}) if listing is not None else {}
    for split in {**expected, **counts}:
        beside = f" (full set: {expected[split]})" if split in expected else ""
        _print_item(split, f"{counts.get(split, Counts(0, 0))}{beside}")
    if listing is not None and listing.expected is not None:
        _print_item("full set", "yes, if no file is missing" if listing.is_full() else "no")


def _print_undecodable(paths: Sequence[Path], config: VerifyConfig) -> int:
    """Decode all files and print those that fail, with the reason; how many they are."""
    bad = [
        f"{path} ({error})"
        for path, error in zip(paths, _decoding_errors(paths, config), strict=True)
        if error is not None
    ]
    _print_findings(f"files that do not decode, of {len(paths)}", bad)
    return len(bad)


def _decoding_errors(paths: Sequence[Path], config: VerifyConfig) -> Iterator[str | None]:
    """Why each file does not decode, or None, in order."""
    with ThreadPoolExecutor(max(config.workers, 1)) as pool:
        errors = pool.map(decoding_error, paths)
        yield from tqdm(errors, total=len(paths), desc="decoding", disable=None if config.verbose else True)


def _print_item(name: str, text: str) -> None:
    print(f"{name:<10} {text}")


def _print_findings(what: str, items: Sequence[object]) -> None:
    """``what: none``, or the number and the first ten."""
    print(f"{what}: {len(items) or 'none'}", flush=True)
    for item in items[:10]:
        print(f"  {item}")
    if len(items) > 10:
        print(f"  ... and {len(items) - 10} more", flush=True)
