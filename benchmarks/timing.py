"""How alternatives are timed: in one process, in turn, in pairs; and how what was measured is stored.

    seconds = in_turn({"plain": plain, "ours": ours}, budget=60)
    rows = compared(seconds, to="plain")

In every round each function runs once, and every round starts with another one of them; the ratio of two is taken
within a round, and the median over the rounds is what is reported. A machine that slows down meanwhile then slows both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import quantile_test

from idml.environment import git_commit, hardware, versions

RESULTS = Path(__file__).resolve().parent / "results"
FEWEST, MOST = 3, 400
"""Rounds, whatever the time allows."""


@dataclasses.dataclass(frozen=True, slots=True)
class Taken:
    """What one call took, in seconds: on the clock, and of all of the process's threads together."""

    wall: float
    cpu: float


def taken(function: Callable[[], Any], device: torch.device | None = None) -> Taken:
    """Run a function once, to the end of what it has a GPU do."""
    wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    wait(device)
    return Taken(time.perf_counter() - wall, time.process_time() - cpu)


def wait(device: torch.device | None) -> None:
    """Until a GPU has done what it was given."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(
    functions: Mapping[str, Callable[[], Any]],
    *,
    budget: float,
    rounds: int | None = None,
    warmup: int = 2,
    device: torch.device | None = None,
) -> dict[str, list[Taken]]:
    """Time alternatives in turn.

    Args:
        functions: by name; each is called ``warmup`` times and then once a round.
        budget: seconds that the rounds may take, by what the warm-up took; at least ``FEWEST`` rounds are made.
        rounds: in place of the number that fits the budget.
        warmup: calls that are not counted.
        device: that the functions use.

    Returns:
        What each took, round by round.
    """
    for number in range(warmup):
        spent = {name: taken(function, device).wall for name, function in functions.items()}
        if number == 0 and sum(spent.values()) > budget / FEWEST:
            break
    if rounds is None:
        rounds = min(max(int(budget / max(sum(spent.values()), 1e-9)), FEWEST), MOST) if warmup else FEWEST
    names = list(functions)
    found: dict[str, list[Taken]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(taken(functions[name], device))
    return found


def compared(found: Mapping[str, Sequence[Taken]], *, to: str) -> dict[str, dict[str, Any]]:
    """Of each alternative: its median time, and how it compares with one of them, round by round.

    Returns:
        By name: ``seconds`` (median), ``ratio`` (median of this one's time over that of ``to`` in the same round),
        ``interval`` (95 % confidence interval of that median, or lowest and highest where there are too few rounds for
        one), ``spread`` (first and third quartile of the ratios), ``cpu_ratio`` (the same ratio of CPU seconds, which
        other programs on the machine disturb less) and ``n``.
    """
    return {
        name: {
            "seconds": statistics.median(each.wall for each in times),
            **ratios([(one.wall, other.wall) for one, other in zip(times, found[to], strict=True)]),
            "cpu_ratio": statistics.median(one.cpu / other.cpu for one, other in zip(times, found[to], strict=True))
            if all(other.cpu > 0 for other in found[to])
            else None,
        }
        for name, times in found.items()
    }


def ratios(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Median, 95 % interval and quartiles of the ratios within pairs of times."""
    values = sorted(one / other for one, other in pairs)
    interval = quantile_test(values, q=1.0, p=0.5).confidence_interval()
    low, high = (interval.low, interval.high) if interval.low == interval.low else (values[0], values[-1])
    first, _, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {
        "ratio": statistics.median(values),
        "interval": [float(low), float(high)],
        "spread": [first, third],
        "n": len(values),
    }


def conditions() -> dict[str, Any]:
    """What a measurement was made with and on; of paths in the command only the last part."""
    arguments = [Path(text).name if "/" in text and not text.startswith("-") else text for text in sys.argv[1:]]
    return {
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "versions": versions(),
        "commit": git_commit(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments]),
    }


def results_path(name: str, *, quick: bool, out: str | None = None) -> Path:
    """Where figures go: ``benchmarks/results/NAME.json``, ``NAME-quick.json`` of a quick run, or ``out``."""
    return Path(out) if out else RESULTS / f"{name}{'-quick' if quick else ''}.json"


def store(path: Path, part: str, figures: Mapping[str, Any], made_with: Mapping[str, Any]) -> None:
    """Put one part into a file of results; parts not measured now keep what they had, and the conditions of then."""
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    parts[part] = {**figures, **made_with}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"parts": parts}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def print_comparison(title: str, rows: Mapping[str, Mapping[str, Any]], *, to: str) -> None:
    """A Markdown table of what ``compared`` gives."""
    print(f"\n{title}\n\n| | ms | / {to} | 95 % | quartiles | CPU / {to} | n |\n|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        cpu = "-" if row["cpu_ratio"] is None else f"{row['cpu_ratio']:.3f}"
        low, high, first, third = (f"{bound:.3f}" for bound in (*row["interval"], *row["spread"]))
        times = f"{1000 * row['seconds']:.2f} | {row['ratio']:.3f}"
        print(f"| {name} | {times} | {low} to {high} | {first} to {third} | {cpu} | {row['n']} |")
    sys.stdout.flush()


def parser(description: str | None, *, parts: Sequence[str]) -> argparse.ArgumentParser:
    """The options that the benchmarks have in common."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; writes NAME-quick.json")
    made.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="what is measured")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    made.add_argument("--threads", type=int, default=None, help="CPU threads of torch; default: its own choice")
    made.add_argument("--out", default=None, help="file of the results, in place of benchmarks/results/NAME.json")
    return made
