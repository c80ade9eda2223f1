"""Many small trainings, side by side and resumable: what the studies of this folder share.

A study is a list of runs, each a row's name, a seed and the options of a training script. Every run that ends is stored
at once with its options and commit, so a study that was stopped continues, and one that is called again with more seeds
makes only the new ones. Trainings run within long-lived processes of one CPU thread, which import torch once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from paired import difference_cells, markdown_table, mean_cell, paired_differences

from idml.environment import git_commit, hardware, versions
from idml.errors import TrainingError, UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
PLAIN = ["--ism", "off"]
LIVE = ["--ism", "live"]
RUNS_OF_A_PROCESS = 50
"""Trainings after which a process is replaced by a new one, so that nothing grows without end."""

MAIN = ("R@1", "top1")
"""What is printed of a run, where it has it."""

Figures = dict[str, dict[int, dict[str, Any]]]
"""What a study has measured: row -> seed -> figure -> value."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        row: of the table that it belongs to.
        seed: of the training.
        options: of the script, without the seed.
        script: ``train_dml`` or ``train_cls``.
        change: what is done to the package before, as "module:function:argument" of a function in this folder that
            takes the argument, a text, and gives a context manager; empty: nothing.
    """

    row: str
    seed: int
    options: tuple[str, ...]
    script: str = "train_dml"
    change: str = ""


def public(options: Sequence[str]) -> str:
    """Options as they are stored: without the places of this machine."""
    return " ".join(
        Path(text).name if before == "--data-dir" or before == "--pretrained" else text.removeprefix(f"{ROOT}/")
        for before, text in zip(["", *options], options, strict=False)
    )


def train(run: Run) -> dict[str, Any]:
    """The figures of a run's last epoch, and the lowest of an evaluated epoch but the first.

    Called in a process of its own, where nothing else is printed.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    torch.set_num_threads(1)
    script = importlib.import_module(run.script)
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(contextlib.redirect_stderr(said))
        drawing = [name for name in ("draw_neighbours", "draw_projection", "log_projector") if hasattr(script, name)]
        stack.enter_context(replaced(*((script, name, lambda *_args, **_kwargs: None) for name in drawing)))
        if run.change:
            module, function, *argument = run.change.split(":")
            stack.enter_context(getattr(importlib.import_module(module), function)(*argument))
        own = ["--seed", str(run.seed), "--output-dir", f"{folder}/run", "--threads", "1", "--no-verbose"]
        # The ISM alone: every training image is trained on, and nothing follows the last epoch.
        own += ["--no-introspect", *([] if "--val-fraction" in run.options else ["--val-fraction", "0"])]
        started = time.perf_counter()
        try:
            results = script.main([*run.options, *own])
        except TrainingError as error:  # a setting of a tuning may well be one that does not train
            return {"failed": str(error).split(";")[0], "wall_seconds": round(time.perf_counter() - started, 1)}
        except Exception as error:
            raise RuntimeError(f"{run.row}, seed {run.seed}: {error}\n{said.getvalue()[-2000:]}") from error
        seconds = time.perf_counter() - started
        lines = (Path(folder) / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        epochs = [json.loads(line) for line in lines][1:]  # the first is anything between chance and good
    measured = {key: [epoch[key] for epoch in epochs if key in epoch] for key in MAIN}
    lowest = {f"lowest/{key}": min(values) for key, values in measured.items() if values}
    final = lowest | {key: value for key, value in results["final"].items() if isinstance(value, (int, float))}
    return final | {"wall_seconds": round(seconds, 1)}


class Study:
    """Runs by row and seed, kept in a JSON file.

    Args:
        path: of that file; what it holds of earlier calls is taken over.
        quick: nothing of earlier calls is taken over.
    """

    def __init__(self, path: Path, *, quick: bool = False) -> None:
        self.path = path.with_stem(f"{path.stem}-quick") if quick else path
        self.content: dict[str, Any] = {"runs": {}}
        if self.path.exists() and not quick:
            self.content = json.loads(self.path.read_text(encoding="utf-8"))

    def do(self, runs: Sequence[Run], *, processes: int, deadline: float | None = None) -> Figures:
        """Make the runs that are not stored yet, in their order; figures of those that are done.

        Args:
            runs: of any rows and seeds.
            processes: side by side, each of one thread.
            deadline: ``time.monotonic()`` after which no further one is started.

        Raises:
            UserError: a stored run of this row and seed had other options.
        """
        missing = [run for run in runs if self._stored(run) is None]
        print(f"{len(runs) - len(missing)} of {len(runs)} runs are stored", flush=True)
        for run, figures in _trained(missing, processes, deadline):
            about = {"options": public(run.options), "change": run.change, "commit": git_commit()}
            self.content["runs"].setdefault(run.row, {})[str(run.seed)] = about | {"figures": figures}
            self.save()
            shown = figures.get("failed") or next(f"{name} {figures[name]:.4f}" for name in MAIN if name in figures)
            print(f"{run.row}, seed {run.seed}: {shown}, {figures['wall_seconds']:.0f} s", flush=True)
        found: Figures = {run.row: {} for run in runs}
        for run in runs:
            if (stored := self._stored(run)) is not None:
                found[run.row][run.seed] = stored["figures"]
        return found

    def _stored(self, run: Run) -> dict[str, Any] | None:
        stored = self.content["runs"].get(run.row, {}).get(str(run.seed))
        wanted = (public(run.options), run.change)
        if stored is not None and (stored["options"], stored["change"]) != wanted:
            raise UserError(
                f"{self.path.name} has {run.row!r} of seed {run.seed} with the options '{stored['options']}' "
                f"{stored['change']}, wanted '{wanted[0]}' {wanted[1]}: take that row out of it, or give another --out"
            )
        return stored

    def save(self, **further: Any) -> None:
        """Write everything, and what else is given, whole or not at all."""
        self.content |= further | {"hardware": hardware(), "versions": versions()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        new.replace(self.path)


def _trained(runs: Sequence[Run], processes: int, deadline: float | None) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Runs as they end, with their figures."""
    if not runs:
        return

    def in_time() -> Iterator[Run]:
        for run in runs:
            if deadline is not None and time.monotonic() > deadline:
                print("warning: no further run is started, the time is up", file=sys.stderr)
                return
            yield run

    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=RUNS_OF_A_PROCESS) as pool:
        waiting: list[tuple[Run, Any]] = []
        for run in in_time():
            waiting.append((run, pool.apply_async(train, (run,))))
            while len(waiting) > processes:
                done = waiting.pop(0)
                yield done[0], done[1].get()
        for run, result in waiting:
            yield run, result.get()
        pool.close()
        pool.join()  # the processes end by themselves, and clean up


def arguments_of(description: str | None, *, add: Callable[[argparse.ArgumentParser], None]) -> argparse.Namespace:
    """The command line of a study: its own arguments and those that all have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add(parser)
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, each of one thread")
    parser.add_argument("--minutes", type=float, help="start no run after this time; call again to continue")
    parser.add_argument("--quick", action="store_true", help="a few steps, one seed: that it runs; nothing is kept")
    parser.add_argument("--no-docs", action="store_true", help="store and print, leave docs/results.md as it is")
    arguments = parser.parse_args()
    if arguments.processes < 1:
        raise UserError(f"--processes: expected at least 1, got {arguments.processes}")
    arguments.deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    arguments.no_docs = arguments.no_docs or arguments.quick
    return arguments


def of(figures: dict[int, dict[str, Any]], key: str) -> dict[int, float]:
    """One figure of a row, by seed, where it was measured."""
    return {seed: values[key] for seed, values in figures.items() if values.get(key) is not None}


def table(rows: Figures, columns: dict[str, str], *, first: str, plain: Callable[[str], str | None]) -> str:
    """Mean and spread of each row, and the paired difference of its ``first`` figure to another row.

    Args:
        rows: as ``Study.do`` gives them.
        columns: title -> figure; in percent unless the title is NLL or seconds.
        first: title of the column whose differences are given, in points.
        plain: name of the row that a row is compared with, or None.
    """
    as_they_are = ("NLL", "seconds")
    head = ["", "n", *(title if title in as_they_are else f"{title}, %" for title in columns)]
    head += [f"{first} difference, points", "95 % interval"]
    lines = []
    for name, figures in rows.items():
        if not figures:
            continue
        cells = [
            mean_cell(list(of(figures, key).values()), as_percent=title not in as_they_are)
            for title, key in columns.items()
        ]
        other = plain(name)
        pairs = (
            [] if other is None else paired_differences(of(figures, columns[first]), of(rows[other], columns[first]))
        )
        lines.append([name, str(len(figures)), *cells, *difference_cells(pairs)])
    return markdown_table(head, lines)


@contextlib.contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes of objects replaced for a while: (object, name, value)."""
    before = [(thing, name, thing.__dict__[name]) for thing, name, _ in changes]
    for thing, name, value in changes:
        setattr(thing, name, value)
    try:
        yield
    finally:
        for thing, name, value in before:
            setattr(thing, name, value)
