"""Seconds and peak memory of the retrieval figures, against scikit-learn and pytorch-metric-learning.

    python benchmarks/bench_retrieval_metrics.py --quick        every part at a small size, in seconds
    python benchmarks/bench_retrieval_metrics.py                the sizes below; scikit-learn takes minutes
    python benchmarks/bench_retrieval_metrics.py --parts pml    one of them

Parts:
    sop       60,502 x 512, 11,316 classes, the size of the test set of Stanford Online Products: all figures with NMI
    released  6,000 x 512, 1,100 classes: against scikit-learn's NearestNeighbors and KMeans, which the released code
              calls. Its KMeans took the best of 10 seedings by default until 1.4, and takes 1 since: both are run
    pml       6,000 x 512 in 1,100 and in 100 classes: against AccuracyCalculator of pytorch-metric-learning. Needs
              faiss (pip install faiss-cpu), which is no dependency of this project
    million   1,000,000 x 128 without NMI; by default for the queries that --million-queries says, all of them being
              searched where it is 1000000
    curve     1,000, 10,000, 100,000 and 1,000,000 points of 128 numbers in a tenth as many classes, every one of them a
              query, without NMI: seconds and peak memory; AccuracyCalculator beside it up to 10,000 (with faiss). A
              size that would take more than --limit seconds, by the growth so far, is left out and says so

The points are unit vectors: random class centres plus Gaussian noise of --noise times a centre's length. Each part runs
in a process of its own, whose peak memory is read afterwards. What is compared is timed in turn in each round, and the
ratio is that of the medians, so that a machine that slows down meanwhile does not favour one; the load of the machine
before a part is noted, for other programs slow down many small parallel steps most. OMP_NUM_THREADS sets the threads of
both sides. Writes benchmarks/results/retrieval-metrics.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from idml.environment import git_commit, hardware, versions
from idml.metrics import retrieval, retrieval_metrics
from idml.metrics.clustering import agreement

RESULTS = Path(__file__).parent / "results" / "retrieval-metrics.json"


def clustered_points(count: int, dimensions: int, classes: int, noise: float) -> tuple[Tensor, Tensor]:
    """(count, dimensions) unit vectors about random class centres, and their (count,) classes; the same every time."""
    generator = torch.Generator().manual_seed(0)
    centres = functional.normalize(torch.randn(classes, dimensions, generator=generator), dim=1)
    labels = torch.randint(classes, (count,), generator=generator)
    points = torch.empty(count, dimensions)
    for rows in torch.arange(count).split(1 << 16):  # so that a million do not need twice their memory
        wobble = torch.randn(len(rows), dimensions, generator=generator) * (noise / dimensions**0.5)
        points[rows] = functional.normalize(centres[labels[rows]] + wobble, dim=1)
    return points, labels


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    started = time.perf_counter()
    value = function()
    return time.perf_counter() - started, value


def in_turn(rounds: int, functions: dict[str, Callable[[], Any]]) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each function in each round, and what it returned in the last."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    values = {}
    for _ in range(rounds):
        for name, function in functions.items():
            taken, values[name] = timed(function)
            seconds[name].append(taken)
    return seconds, values


def sop(arguments: argparse.Namespace) -> dict[str, Any]:
    count, classes = (3000, 560) if arguments.quick else (60502, 11316)
    points, labels = clustered_points(count, 512, classes, arguments.noise)
    spent: list[float] = []
    cluster = retrieval.clustering_metrics

    def timed_clustering(*positional: Any, **named: Any) -> dict[str, float]:
        seconds, value = timed(lambda: cluster(*positional, **named))
        spent.append(seconds)
        return value

    retrieval.clustering_metrics = timed_clustering
    seconds, metrics = timed(lambda: retrieval_metrics(points, labels, ks=(1, 10, 100, 1000)))
    sizes = {"points": [count, 512], "classes": classes}
    return sizes | {"seconds": seconds, "of_which_clustering": spent[0], "metrics": metrics}


def released(arguments: argparse.Namespace) -> dict[str, Any]:
    from sklearn.cluster import KMeans
    from sklearn.neighbors import NearestNeighbors

    count, classes = (1000, 180) if arguments.quick else (6000, 1100)
    points, labels = clustered_points(count, 512, classes, arguments.noise)
    array = points.numpy()

    def neighbours() -> float:
        found = torch.as_tensor(NearestNeighbors(n_neighbors=9).fit(array).kneighbors(array)[1])
        return (labels[found[:, 1]] == labels).double().mean().item()

    def clusters(restarts: int) -> dict[str, float]:
        found = KMeans(len(labels.unique()), n_init=restarts, random_state=0).fit(array)
        nmi, f1 = agreement(torch.as_tensor(found.labels_).long(), labels)
        return {"NMI": nmi, "F1": f1}

    functions: dict[str, Callable[[], Any]] = {
        "ours": lambda: retrieval_metrics(points, labels),
        "ours_10_restarts": lambda: retrieval_metrics(points, labels, restarts=10),
        "sklearn_neighbours": neighbours,
        "sklearn_kmeans_n_init_1": lambda: clusters(1),
    }
    seconds, values = in_turn(arguments.rounds, functions)
    more, values["sklearn_kmeans_n_init_10"] = timed(lambda: clusters(10))  # once: it takes ten times as long
    seconds["sklearn_kmeans_n_init_10"] = [more]
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    one, ten = (medians["sklearn_neighbours"] + medians[f"sklearn_kmeans_n_init_{n}"] for n in (1, 10))
    return {
        "points": [count, 512],
        "classes": classes,
        "seconds": seconds,
        "ratios": {
            "sklearn n_init=10 to ours": ten / medians["ours"],
            "sklearn n_init=1 to ours": one / medians["ours"],
            "sklearn n_init=10 to ours with 10 restarts": ten / medians["ours_10_restarts"],
        },
        "values": values,
    }


def pml(arguments: argparse.Namespace) -> dict[str, Any]:
    try:
        import faiss  # type: ignore[import-not-found]
    except ImportError:
        return {"skipped": "faiss is not installed (pip install faiss-cpu)"}
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    names = {"P@1": "precision_at_1", "RP": "r_precision", "MAP@R": "mean_average_precision_at_r"}
    calculator = AccuracyCalculator(include=tuple(names.values()), k="max_bin_count", device=torch.device("cpu"))
    found: dict[str, Any] = {"faiss": faiss.__version__}
    for classes in (180, 20) if arguments.quick else (1100, 100):
        count = 1000 if arguments.quick else 6000
        points, labels = clustered_points(count, 512, classes, 1.5 * arguments.noise)
        seconds, values = in_turn(
            max(arguments.rounds, 5),
            {
                "ours": lambda points=points, labels=labels: retrieval_metrics(points, labels, nmi=False),  # type: ignore[misc]
                "pml": lambda points=points, labels=labels: calculator.get_accuracy(points, labels),  # type: ignore[misc]
            },
        )
        ours, theirs = values["ours"], values["pml"]
        found[f"{classes} classes"] = {
            "points": [count, 512],
            "seconds": seconds,
            "ratio": statistics.median(seconds["pml"]) / statistics.median(seconds["ours"]),
            "ours": ours,
            "differences": {name: abs(ours[name] - theirs[other]) for name, other in names.items()},
        }
    return found


def million(arguments: argparse.Namespace) -> dict[str, Any]:
    count, queries = (20_000, 2_000) if arguments.quick else (1_000_000, arguments.million_queries)
    points, labels = clustered_points(count, 128, count // 10, arguments.noise)
    options: dict[str, Any] = {}
    if queries < count:
        # Every item its own family: a query is not found by itself, as in the full search.
        numbers = torch.arange(count)
        options = {"families": numbers, "query_families": numbers[:queries]}
        options |= {"query_embeddings": points[:queries], "query_labels": labels[:queries]}
    seconds, metrics = timed(lambda: retrieval_metrics(points, labels, nmi=False, **options))
    return {
        "points": [count, 128],
        "queries": queries,
        "whole": queries == count,
        "seconds": seconds,
        "metrics": metrics,
    }


def curve(arguments: argparse.Namespace) -> dict[str, Any]:
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    found: dict[str, Any] = {}
    previous: tuple[int, float] | None = None
    for count in (500, 1_000, 2_000) if arguments.quick else (1_000, 10_000, 100_000, 1_000_000):
        # The search grows with the square of the number, at least.
        expected = 0.0 if previous is None else previous[1] * (count / previous[0]) ** 2
        if expected > arguments.limit:
            found[f"{count}"] = {"skipped": f"about {expected:.0f} s, more than --limit {arguments.limit:g}"}
            print(f"{count} points left out: {found[f'{count}']['skipped']}", file=sys.stderr)
            continue
        points, labels = clustered_points(count, 128, count // 10, arguments.noise)
        functions: dict[str, Callable[[], Any]] = {"ours": partial(retrieval_metrics, points, labels, nmi=False)}
        if count <= 10_000 and importlib.util.find_spec("faiss") is not None:
            calculator = AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu"))
            functions["pml"] = partial(calculator.get_accuracy, points, labels)
        seconds, values = in_turn(arguments.rounds if count <= 10_000 else 1, functions)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        found[f"{count}"] = {
            "points": [count, 128],
            "seconds": seconds,
            "ratios": {"pml to ours": medians["pml"] / medians["ours"]} if "pml" in medians else {},
            # Sizes grow, so the peak of the process so far is that of this size.
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "metrics": values["ours"],
        }
        previous = (count, medians["ours"])
    return {"sizes": found}


PARTS = {"sop": sop, "released": released, "pml": pml, "million": million, "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes; writes retrieval-metrics-quick.json")
    parser.add_argument("--out", default=None, help="file of the results, in place of the one below results/")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--noise", type=float, default=1.5)
    parser.add_argument("--million-queries", type=int, default=10_000)
    parser.add_argument("--limit", type=float, default=300, help="seconds that one size of the curve may take")
    parser.add_argument("--in-this-process", action="store_true", help="run one part and print its JSON")
    arguments = parser.parse_args()

    if arguments.in_this_process:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = PARTS[arguments.parts[0]](arguments)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
        print(json.dumps(result | {"peak_gib": peak / 2**20, "peak_gib_after_imports": before / 2**20}))
        return

    path = RESULTS.with_stem(RESULTS.stem + "-quick") if arguments.quick else RESULTS
    path = Path(arguments.out) if arguments.out else path
    # Parts that are not run now keep what was measured before, with the commit and machine of then.
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    for name in arguments.parts:
        options = ["--rounds", str(arguments.rounds), "--noise", str(arguments.noise)]
        options += ["--limit", str(arguments.limit)]
        options += ["--million-queries", str(arguments.million_queries), *(["--quick"] if arguments.quick else [])]
        command = [sys.executable, __file__, "--parts", name, "--in-this-process", *options]
        about = {
            "hardware": hardware(),
            "load_before": os.getloadavg()[0],
            "versions": {**versions(), "scikit-learn": importlib.metadata.version("scikit-learn")},
            "commit": git_commit(),
            "options": options,
        }
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        parts[name] = json.loads(done.stdout.splitlines()[-1]) | about
        print(f"{name}: {json.dumps(parts[name], indent=1)}", flush=True)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"parts": parts}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
