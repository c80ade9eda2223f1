"""The tables of docs/speed.md, from the figures that the benchmarks have stored in benchmarks/results/.

    python benchmarks/speed_page.py

Nothing is measured here. Each table says what it is of: hardware, n, commit, command.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench_loader import PEERS, SAME_FILE
from paired import markdown_table, write_between
from timing import RESULTS

from idml.errors import UserError, run_main

SCRIPT = "speed_page.py"
PAGE = Path(__file__).resolve().parents[1] / "docs/speed.md"

Part = Mapping[str, Any]


def parts_of(name: str) -> dict[str, Part]:
    """What a benchmark has stored, by part; UserError where it has not run."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise UserError(f"there is no {path.name} in benchmarks/results/: run the benchmark that writes it first")
    parts: dict[str, Part] = json.loads(path.read_text(encoding="utf-8"))["parts"]
    return parts


def about(part: Part) -> str:
    """What the figures of a table were measured on and with."""
    versions = ", ".join(f"{name} {part['versions'][name]}" for name in ("torch", "timm", "ffcv"))
    command = re.sub(r"(--(?:cutmix-pytorch|timm|torchvision)) \S+", r"\1 DIR", part["command"])
    return f"{part['hardware']}; {versions}; commit {short(part['commit'])}; `{command}`."


def short(commit: str) -> str:
    """A commit's first letters, and whether the tree had changes."""
    return commit[:9] + ("-dirty" if commit.endswith("-dirty") else "")


def interval(row: Mapping[str, Any], digits: int = 3) -> str:
    """A ratio with the 95 % interval of its median."""
    low, high = (f"{bound:.{digits}f}" for bound in row["interval"])
    return f"{row['ratio']:.{digits}f} ({low} to {high})"


def step() -> str:
    """The training step, with and without ISM."""
    parts = parts_of("ism")
    names = [name for name in next(iter(parts.values()))["variants"] if name != "off"]
    rows = []
    for name in ["off", *names]:
        cells = []
        for part in parts.values():
            row = part["variants"][name]
            cells += [f"{1000 * row['seconds']:.0f}", "1" if name == "off" else interval(row)]
        rows.append([name, *cells])
    head = [""]
    for name, part in parts.items():
        count, _, side, _ = part["images"]
        head += [f"{name.split(',')[0]}, {count} images of {side} px, ms", "/ off (95 %)"]
    counts = ", ".join(str(part["variants"]["live"]["n"]) for part in parts.values())
    return f"{markdown_table(head, rows)}\n\nn = {counts} rounds; {about(next(iter(parts.values())))}"


def profile() -> str:
    """Where the time of a step of the first network goes."""
    name, part = next(iter(parts_of("ism").items()))
    profiled = part["profile"]
    tables = {way: {row["operation"]: row for row in rows} for way, rows in profiled.items()}
    last = tables[list(tables)[-1]]
    rows = [
        [f"`{operation}`", *(f"{each[operation]['self_ms_per_step']:.1f}" if operation in each else "-"
                             for each in tables.values())]
        for operation in list(last)[:8]
    ]  # fmt: skip
    return f"{name.split(',')[0]}, ms a step by itself\n\n{markdown_table(['operation', *tables], rows)}"


def allocator() -> str:
    """What freed memory that is kept is worth."""
    rows = []
    for name, part in parts_of("allocator").items():
        for way, row in part["ways"].items():
            cells = [
                f"{1000 * row['seconds']:.0f}",
                interval(row, 2),
                f"{row['faults']:,.0f}",
                f"{row['peak_mib']:,.0f}",
            ]
            rows.append([f"{name}, {part['batch']} of {part['pixels']} px: {way}", *cells])
    part = next(iter(parts_of("allocator").values()))
    n = next(iter(part["ways"].values()))["n"]
    head = ["", "ms a step", "/ as glibc does", "page faults a step", "most MiB"]
    return f"{markdown_table(head, rows)}\n\nn = {n} processes of each kind, in turn; {about(part)}"


def loader(kind: str) -> Callable[[], str]:
    """A table of the loaders: ``cifar`` or ``jpeg``."""

    def made() -> str:
        part = parts_of("loader")[kind]
        measured = {key: value for key, value in part.items() if key.endswith("workers")}
        head = [""]
        for workers in measured:
            head += [f"images/s, {workers.replace('1 workers', '1 worker')}", "x torchvision", "x timm"]
            head += ["x FFCV's own", "CPU ms an image"]
        rows = []
        for name in next(iter(measured.values()))["rows"]:
            cells = [name]
            for each in measured.values():
                row = each["rows"][name]
                times = row["times_as_fast_as"]
                cells += [f"{sorted(row['images_per_second'])[len(row['images_per_second']) // 2]:,.0f}"]
                cells += [f"{times[peer]['ratio']:.1f}" if peer in times else "-" for peer in (*PEERS, SAME_FILE)]
                cells += [f"{1000 * row['cpu_seconds_per_image']:.3f}"]
            rows.append(cells)
        return f"{markdown_table(head, rows)}\n\n{part['images']:,} images; n = {part['rounds']} epochs; {about(part)}"

    return made


def train() -> str:
    """An epoch, end to end."""
    tables = []
    for name in ("network", "loading"):
        part = parts_of("train")[name]
        rows = []
        for script, row in part["rows"].items():
            if "empty caches" in script:
                continue
            fastest = f"{row['times_the_fastest_peer']:.2f}" if "times_the_fastest_peer" in row else "-"
            cutmix = [ratio for peer, ratio in row.get("times_as_fast_as", {}).items() if "CutMix" in peer]
            times = f"{cutmix[0]:.2f}" if cutmix else "-"
            rows.append([script, f"{row['images_per_second']:,.0f}", f"{row['cpu']:.1f}", fastest, times])
        head = [f"{name}: {part['model']}", "images/s", "CPU s of the command", "x fastest peer", "x CutMix-PyTorch"]
        tables.append(
            markdown_table(head, rows) + f"\n\n{part['images']:,} images; n = {part['rounds']}; {about(part)}"
        )
    return "\n\n".join(tables)


def startup() -> str:
    """From the start of the process to its first and second step."""
    part = parts_of("train")["startup"]
    rows = [
        [name, f"{row['first']:.1f}", f"{row['second']:.1f}", f"{row['cpu']:.1f}"] for name, row in part["rows"].items()
    ]
    head = ["", "first step after s", "second step after s", "CPU s of the command"]
    return f"{markdown_table(head, rows)}\n\n{part['model']}; n = {part['rounds']}; {about(part)}"


def retrieval_step() -> str:
    """A retrieval step with Mixup."""
    (part,) = (each for name, each in parts_of("dml").items() if name.startswith("step"))
    rows = [
        [f"ISM {ism}: {name}", f"{1000 * row['seconds']:.0f}", interval(row), str(row["n"])]
        for ism, found in part["ism"].items()
        for name, row in found.items()
    ]
    text = f"{part['model']}, {part['batch']} images of {part['size']} pixels; {about(part)}"
    return f"{markdown_table(['', 'ms a step', '/ one forward (95 %)', 'n'], rows)}\n\n{text}"


def loss() -> str:
    """ProxyAnchor by the number of classes."""
    (part,) = (each for name, each in parts_of("dml").items() if name.startswith("loss"))
    head, names = ["classes"], list(next(iter(part["by_classes"].values()))["losses"])
    rows = []
    for found in part["by_classes"].values():
        cells = [f"{found['classes']:,}"]
        for name in names:
            row = found["losses"][name]
            cells.append(f"{1000 * row['seconds']:.1f} ms, x {interval(row, 2)}, {row['peak_mib']:,.1f} MiB")
        rows.append(cells)
    return f"{markdown_table([*head, *names], rows)}\n\nx: of the time of off, in the same round (95 %); {about(part)}"


def curve() -> str:
    """Retrieval figures by the number of points."""
    part = parts_of("retrieval-metrics")["curve"]
    rows = []
    for count, row in part["sizes"].items():
        if "skipped" in row:
            rows.append([f"{int(count):,}", f"not run: {row['skipped']}", "-", "-"])
            continue
        seconds = sorted(row["seconds"]["ours"])[len(row["seconds"]["ours"]) // 2]
        ratio = f"{row['ratios']['pml to ours']:.1f}" if row["ratios"] else "-"
        rows.append([f"{int(count):,}", f"{seconds:.2f}", ratio, f"{row['peak_gib']:.2f}"])
    head = ["points of 128 numbers", "s", "x pytorch-metric-learning", "most GiB of the process so far"]
    command = f"`python benchmarks/bench_retrieval_metrics.py --parts curve`; commit {short(part['commit'])}"
    return f"{markdown_table(head, rows)}\n\nTen points to a class; {part['hardware']}; {command}."


def quick() -> str:
    """The ratios that `make bench-quick` compares with."""
    part = parts_of("quick")["ratios"]
    rows = [[name, interval(row, 2), str(row["n"])] for name, row in part["ratios"].items()]
    return f"{markdown_table(['ratio', '', 'n'], rows)}\n\n{about(part)}"


TABLES: dict[str, Callable[[], str]] = {
    "step": step,
    "profile": profile,
    "allocator": allocator,
    "loader cifar": loader("cifar"),
    "loader jpeg": loader("jpeg"),
    "train": train,
    "startup": startup,
    "retrieval step": retrieval_step,
    "loss": loss,
    "curve": curve,
    "quick": quick,
}


def main() -> None:
    for name, make in TABLES.items():
        write_between(PAGE, name, make(), script=SCRIPT)
        print(f"{name}: written")


if __name__ == "__main__":
    run_main(main)
