"""What `python -m idml search` finds and how long it takes: exactly, with indexes of faiss, and in introspective order.

    python benchmarks/bench_search.py --quick            every part at a small size, in a minute or two
    python benchmarks/bench_search.py                    20,000 image files and the curve; about ten minutes on 2 cores
    python benchmarks/bench_search.py --parts curve      embeddings alone

Parts:
    files  --images files, each an emoji of a class that the model was not trained on, turned, moved, scaled and made
           darker or lighter, written to a temporary folder. `embed` goes over them; 1,000 of them search the others.
           recall@10 is the share of the 10 nearest of the exact search that are found; P@10 the share of those found
           that show the query's emoji. The introspective order is compared with the same order of all images, not only
           of the 100 nearest. The model is trained by configs/quick/emoji_mini.yaml first, or given by --checkpoint.
    curve  recall@10 and time over the number of embeddings, up to --most: unit vectors of 128 numbers about random
           centres, ten to a centre, and 1,000 queries drawn in the same way.

Times of a search are for all queries in one call, the faster of two calls, and for one query a call; that of HNSW and
IVF-PQ includes that what they find is compared by the embeddings themselves. Writes benchmarks/results/search.json.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from bench_retrieval_metrics import clustered_points
from PIL import Image, ImageEnhance
from timing import conditions, parser, results_path, store

from idml.data.emoji import load_embedded, split_classes
from idml.embedding_file import EmbeddingTable, read_table
from idml.index import EmbeddingIndex, IndexType, Neighbours
from idml.search import introspective_dissimilarities, ism_settings
from idml.trained import Embeddings

ROOT = Path(__file__).resolve().parents[1]
KINDS: tuple[IndexType, ...] = ("exact", "flat", "hnsw", "ivfpq")
K, ALONE = 10, 50
"""Neighbours, and queries that are also searched for one at a time."""


def write_images(folder: Path, count: int) -> None:
    """``folder/<emoji>/<number>.jpg``, 96 pixels, of the emoji that the model is not trained on; always the same."""
    pack = load_embedded()
    chosen = np.flatnonzero(np.isin(pack.labels, split_classes(len(pack.classes))[1]))
    generator = np.random.default_rng(0)
    for number in range(count):
        source = chosen[number % len(chosen)]
        angle, zoom, light = generator.uniform(-25, 25), generator.uniform(0.75, 1.25), generator.uniform(0.6, 1.3)
        shift = generator.uniform(-8, 8, 2)
        image = Image.fromarray(pack.images[source]).resize((96, 96), Image.Resampling.BICUBIC)
        image = image.rotate(angle, Image.Resampling.BICUBIC, translate=tuple(shift), fillcolor="white")
        side, half = 96 / zoom, 48.0
        box = (half - side / 2, half - side / 2, half + side / 2, half + side / 2)
        corners = (side / 96, 0, box[0], 0, side / 96, box[1])
        image = image.transform((96, 96), Image.Transform.AFFINE, corners, Image.Resampling.BICUBIC, fillcolor="white")
        path = folder / pack.classes[pack.labels[source]] / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        ImageEnhance.Brightness(image).enhance(light).save(path, quality=85)


def run_program(*command: object) -> tuple[str, float, float]:
    """What a program of this project prints, its seconds on the clock, and of all CPUs."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    program = [sys.executable, *map(str, command)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=environment)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def faster_of_two(function: Callable[[], Any]) -> tuple[Any, float]:
    """The value, and the seconds of the faster call."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        value = function()
        seconds.append(time.perf_counter() - started)
    return value, min(seconds)


def recall(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean share of each row of ``expected`` (Q, k) that is in the same row of ``found``."""
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, expected, strict=True)]))


def measure(
    embeddings: np.ndarray, queries: np.ndarray, left_out: np.ndarray | None
) -> tuple[dict[str, dict[str, Any]], dict[str, Neighbours]]:
    """Building, size, time and recall of each kind of index, and what each found."""
    rows: dict[str, dict[str, Any]] = {}
    found: dict[str, Neighbours] = {}
    for kind in KINDS:
        index = EmbeddingIndex(embeddings, kind, "benchmark")
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            index.open(Path(folder) / "E.parquet")
            built = time.perf_counter() - started
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
        found[kind], seconds = faster_of_two(lambda index=index: index.search(queries, K, left_out=left_out))  # type: ignore[misc]
        started = time.perf_counter()
        for row in range(ALONE):
            index.search(queries[row : row + 1], K, left_out=None if left_out is None else left_out[row : row + 1])
        alone = time.perf_counter() - started
        rows[kind] = {
            "recall@10": recall(found[kind].indices, found["exact"].indices),
            "ms_a_query": 1000 * seconds / len(queries),
            "ms_one_query_alone": 1000 * alone / ALONE,
            "built_seconds": None if kind == "exact" else built,
            "megabytes": None if kind == "exact" else size / 1e6,
        }
    return rows, found


def files(arguments: argparse.Namespace) -> dict[str, Any]:
    """The part ``files``."""
    count, queries = (1500, 100) if arguments.quick else (arguments.images, 1000)
    with tempfile.TemporaryDirectory() as base:
        folder, checkpoint, out = Path(base) / "images", arguments.checkpoint, Path(base) / "E.parquet"
        write_images(folder, count)
        if checkpoint is None:
            checkpoint = Path(base) / "run"
            options = ["--config", ROOT / "configs/quick/emoji_mini.yaml", "--ism", "live", "--val-fraction", "0.2"]
            options += ["--no-verbose", "--output-dir", checkpoint, *(["--max-steps", "20"] if arguments.quick else [])]
            run_program(ROOT / "train_dml.py", *options, "--threads", torch.get_num_threads())
        options = ["--data-dir", folder, "--out", out, "--no-verbose", "--threads", torch.get_num_threads()]
        said, wall, cpu = run_program("-m", "idml", "embed", "--checkpoint", checkpoint, *options)
        rate = re.search(r"\((\d+) images/s\)", said)
        assert rate is not None
        table = read_table(out)
        embed = {
            "images": count,
            "images_per_second": int(rate.group(1)),
            "wall_seconds_of_the_command": wall,
            "cpu_seconds_of_the_command": cpu,
            "parquet_megabytes": out.stat().st_size / 1e6,
            "model": table.about["model"],
            "dimensions": table.about["dimensions"],
        }
    chosen = np.sort(np.random.default_rng(1).permutation(count)[:queries])
    rows, found = measure(table.numbers["embedding"], table.numbers["embedding"][chosen], chosen)
    labels = np.array(table.labels)

    def precision(indices: np.ndarray) -> dict[str, float]:
        right = labels[indices] == labels[chosen][:, None]
        return {"P@1": float(right[:, 0].mean()), "P@10": float(right[:, :K].mean())}

    for kind in KINDS:
        rows[kind] |= precision(found[kind].indices)
    if "uncertainty_embedding" in table.numbers:
        rows["introspective"], orders = introspective(table, chosen, found["exact"])
        rows["introspective"] |= precision(orders)
    return {"embed": embed, "queries": queries, "search": rows}


def introspective(table: EmbeddingTable, chosen: np.ndarray, exact: Neighbours) -> tuple[dict[str, Any], np.ndarray]:
    """The introspective order of the 100 nearest against that of all images; and the (Q, 10) found."""
    numbers = {name: values[chosen] for name, values in table.numbers.items()}
    embedded = Embeddings(
        semantic=numbers["embedding"],
        uncertainty=numbers["uncertainty"],
        uncertainty_embedding=numbers["uncertainty_embedding"],
    )
    settings = ism_settings(table, Path("E.parquet"))
    index = EmbeddingIndex(table.numbers["embedding"], "exact", "benchmark")

    def reranked() -> np.ndarray:
        candidates = index.search(embedded.semantic, 100, left_out=chosen).indices
        apart = introspective_dissimilarities(embedded, table, candidates, **settings)
        return np.take_along_axis(candidates, np.argsort(apart, axis=1, kind="stable")[:, :K], 1)

    orders, seconds = faster_of_two(reranked)
    everything = np.tile(np.arange(len(table)), (min(len(chosen), 100), 1))
    apart = introspective_dissimilarities(first_of(embedded, len(everything)), table, everything, **settings)
    apart[np.arange(len(everything)), chosen[: len(everything)]] = np.inf
    whole = np.argsort(apart, axis=1, kind="stable")[:, :K]
    return {
        "recall@10": recall(orders, exact.indices),
        "recall@10_of_the_introspective_order_of_all": recall(orders[: len(whole)], whole),
        "same_nearest_as_exact": float((orders[:, 0] == exact.indices[:, 0]).mean()),
        "ms_a_query": 1000 * seconds / len(chosen),
    }, orders


def first_of(embedded: Embeddings, count: int) -> Embeddings:
    """The first ``count`` images."""
    return Embeddings(
        semantic=embedded.semantic[:count],
        uncertainty=embedded.uncertainty[:count],
        uncertainty_embedding=embedded.uncertainty_embedding[:count],
    )


def curve(arguments: argparse.Namespace) -> dict[str, Any]:
    """The part ``curve``."""
    sizes = [700, 3000] if arguments.quick else [n for n in (1000, 10_000, 100_000, 1_000_000) if n <= arguments.most]
    queries = 100 if arguments.quick else 1000
    rows = {}
    for size in sizes:
        points, _ = clustered_points(size + queries, 128, max(size // 10, 1), noise=1.0)
        embeddings = points.numpy()
        rows[str(size)] = measure(embeddings[:size], embeddings[size:], None)[0]
    return {"dimensions": 128, "queries": queries, "search": rows}


def print_rows(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """A Markdown table."""
    columns = {
        "recall@10": ".3f",
        "ms_a_query": ".3f",
        "ms_one_query_alone": ".1f",
        "built_seconds": ".1f",
        "megabytes": ".1f",
    }
    columns |= {"P@1": ".3f", "P@10": ".3f"} if any("P@1" in row for row in rows.values()) else {}
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in rows.items():
        cells = ["-" if row.get(key) is None else format(row[key], form) for key, form in columns.items()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run the parts and store their figures."""
    made = parser(__doc__, parts=("files", "curve"))
    made.add_argument("--images", type=int, default=20_000, help="files that are generated")
    made.add_argument("--checkpoint", default=None, help="run directory of a model; default: one is trained")
    made.add_argument("--most", type=int, default=100_000, help="embeddings at the end of the curve")
    arguments = made.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(torch.get_num_threads())
    path = results_path("search", quick=arguments.quick, out=arguments.out)
    made_with = conditions() | {"faiss": faiss.__version__}
    if "files" in arguments.parts:
        figures = files(arguments)
        store(path, "files", figures, made_with)
        print(f"embed: {figures['embed']}")
        print_rows(f"{figures['embed']['images']} image files, {figures['queries']} queries", figures["search"])
        print(f"introspective: {figures['search'].get('introspective')}")
    if "curve" in arguments.parts:
        figures = curve(arguments)
        store(path, "curve", figures, made_with)
        for size, rows in figures["search"].items():
            print_rows(f"{size} embeddings, {figures['queries']} queries", rows)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
