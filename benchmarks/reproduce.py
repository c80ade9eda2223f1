"""What the methods are worth: paired seeds on small data, and the published rows on whatever real data are here.

    python benchmarks/reproduce.py --suite small                        Fashion-MNIST and emoji: hours on 2 cores
    python benchmarks/reproduce.py --suite small --quick                a few steps of each: that it runs
    python benchmarks/reproduce.py --suite small --parts retrieval --seeds 1 2 --minutes 40
    python benchmarks/reproduce.py --suite paper --data-dir data        the rows of configs/{imagenet,...,sop}

small: the six classification methods (and the ISM ones with loss prediction) on Fashion-MNIST, and the eight retrieval
losses, each plain, released and live, on emoji (--emoji FILE.npz, or the ones in the package). Every run is one of
train_cls.py or train_dml.py; a seed gives all methods the same images in the same order, so the difference of an
introspective run to its plain counterpart is taken seed by seed. Runs that --runs DIR holds whole are not made again,
as long as their options are those wanted; a suite that --minutes or a user stops goes on from there.

paper: each row by its config, with --resume auto. What is not here is said to be not run. Give further options of the
training scripts behind --, as in: --rows cifar10/baseline -- --max-steps 5

The tables go into docs/results.md between its markers, the pictures beside it, every figure with seeds, commands,
hardware, versions and commit to benchmarks/results/reproduce.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from paired import write_between
from reproduce_paper import paper_tables, published_rows, run_rows
from reproduce_small import (
    CLS_METRICS,
    CLS_MODEL,
    DML_METRICS,
    Variant,
    classification_variants,
    retrieval_variants,
    run_all,
    table,
    values_of,
)
from result_pictures import draw
from uncertainty import METHOD_NAMES, TRAINING_IMAGES

from idml.environment import git_commit, hardware, versions
from idml.errors import UserError, nearest, run_main
from idml.losses import LOSSES

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("classification", "retrieval")


def parse_arguments() -> argparse.Namespace:
    """The command line; what stands behind ``--`` is for the training scripts."""
    argv, options = sys.argv[1:], []
    if "--" in argv:
        argv, options = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("small", "paper"), required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of the small suite")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the small suite")
    parser.add_argument("--methods", nargs="+", choices=METHOD_NAMES, help="of classification; default all")
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), help="of retrieval; default all")
    parser.add_argument("--images", type=int, default=TRAINING_IMAGES, help="Fashion-MNIST training images")
    parser.add_argument("--model", default=CLS_MODEL, help=f"on Fashion-MNIST; default {CLS_MODEL}")
    parser.add_argument("--epochs", type=int, default=4, help="on Fashion-MNIST")
    parser.add_argument("--emoji", help="the .npz of the emoji pack; default the emoji in the package")
    parser.add_argument("--emoji-epochs", type=int, default=6, help="on emoji")
    parser.add_argument("--minutes", type=float, help="start no run of the small suite after this time")
    parser.add_argument(
        "--data-dir", default="data", help="of the paper suite; ImageNet is looked for in imagenet/ there"
    )
    parser.add_argument("--rows", nargs="+", help="of the paper suite, as cub/idml_margin; default all")
    parser.add_argument("--on-cpu", action="store_true", help="train published rows without a GPU too")
    parser.add_argument(
        "--processes", type=int, help="small: runs side by side, default 2; paper: of torchrun, default 1"
    )
    parser.add_argument(
        "--runs", type=Path, help="folder of the runs; finished ones are not made again; paper: runs/paper by default"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/reproduce.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/results.md", help="document that holds the tables")
    parser.add_argument("--no-docs", action="store_true", help="tables are printed and stored, the document stays")
    parser.add_argument("--quick", action="store_true", help="small: a few steps, one seed, nothing into the document")
    arguments = parser.parse_args(argv)
    arguments.options = options
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """UserError for what would only show after hours, or be of no effect."""
    if arguments.processes is None:
        arguments.processes = 2 if arguments.suite == "small" else 1
    if arguments.suite == "small" and arguments.options:
        raise UserError(
            "options behind -- are for --suite paper; the small suite has --epochs, --images, --emoji-epochs"
        )
    for row in arguments.rows or []:
        if row not in published_rows():
            raise UserError(f"--rows: there is no published row {row}{nearest(row, published_rows())}")
    if arguments.emoji is not None and not Path(arguments.emoji).is_file():
        raise UserError(f"--emoji: there is no file {arguments.emoji}")
    positive = ("images", "epochs", "emoji_epochs", "processes")
    for name in positive:
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(arguments, name)}")
    if arguments.quick:
        arguments.seeds, arguments.out = arguments.seeds[:1], arguments.out.with_stem(arguments.out.stem + "-quick")
    elif not (arguments.no_docs or arguments.docs.is_file()):
        raise UserError(f"--docs: there is no file {arguments.docs}")


def about_runs(variants: list[Variant], rows: dict[str, Any], part: str, arguments: argparse.Namespace) -> str:
    """A line that says what the figures of a table are of."""
    runs = [run for figures in rows.values() for run in figures.values()]
    if part == "classification":
        images = "5,000" if arguments.quick else f"{round(0.9 * arguments.images):,}"
        data = f"Fashion-MNIST, {images} training images (a tenth more held out), {arguments.epochs} epochs"
    else:
        epochs = f"{arguments.emoji_epochs} epochs"
        data = f"{'emoji pack' if arguments.emoji else 'emoji in the package'}, 32 pixels, unseen classes, {epochs}"
    data += ", stopped after a few steps" if arguments.quick else ""
    machines = ", ".join(sorted({run["hardware"] for run in runs}))
    minutes = sum(run["wall_seconds"] for run in runs) / 60
    counts = sorted({len(figures) for figures in rows.values() if figures})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return (
        f"{data}; {', '.join(sorted({run['model'] for run in runs}))}; last epoch; n = {seeds} seed(s); {machines}; "
        f"{len(runs)} runs of {minutes:.0f} minutes in all, beside other programs"
    )


def small(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both parts of the small suite, their tables and pictures."""
    found: dict[str, Any] = {}
    for part in arguments.parts:
        classify = part == "classification"
        variants = classification_variants(arguments, folder) if classify else retrieval_variants(arguments)
        metrics = CLS_METRICS if classify else DML_METRICS
        rows = run_all(variants, arguments, folder)
        if not any(rows.values()):
            raise UserError(f"--minutes {arguments.minutes}: no run of {part} is done; give more time")
        plain_of = {variant.name: variant.plain for variant in variants}
        about = about_runs(variants, rows, part, arguments)
        body = f"{table(rows, plain_of, metrics)}\n\n{about}."
        print(f"\n{part}\n\n{body}", flush=True)
        found[part] = {"rows": rows, "plain_of": plain_of, "about": about, **describe()}
        if not (arguments.quick or arguments.no_docs):
            picture = arguments.docs.parent / "images" / f"results_{part}.png"
            metric = next(iter(metrics))
            values = {name: values_of(runs, metric) for name, runs in rows.items()}
            draw(picture, values, plain_of, metrics[metric], about)
            body += f"\n\n![Each row's seeds and its paired differences to the plain row](images/{picture.name})"
            write_between(arguments.docs, part, body)
    return found


def describe() -> dict[str, Any]:
    """What every stored result comes with."""
    arguments = [Path(text).name if "/" in text and not text.startswith("-") else text for text in sys.argv[1:]]
    return {
        "hardware": hardware(),
        "versions": versions(),
        "commit": git_commit(),
        "command": " ".join(["python", "benchmarks/reproduce.py", *arguments]),
    }


def paper(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The published rows, and their tables."""
    rows = run_rows(arguments, folder)
    body = paper_tables(rows, arguments.options)
    print(body)
    if not (arguments.quick or arguments.no_docs):
        write_between(arguments.docs, "paper", body)
    return {"paper": {"rows": rows, **describe()}}


def main() -> None:
    arguments = parse_arguments()
    check(arguments)
    torch.set_num_threads(1)
    started = time.monotonic()
    # Parts that are not run now keep what was measured before.
    stored = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        # Published rows take days: their runs stay, to be gone on with.
        default = Path(temporary) if arguments.suite == "small" else ROOT / "runs/paper"
        folder = (arguments.runs or default).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        stored |= small(arguments, folder) if arguments.suite == "small" else paper(arguments, folder)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    print(f"\nstored in {arguments.out} after {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    run_main(main)
