"""ProxyAnchor on emoji, plain, plain with Mixup, released and live, several seeds each: R@1 and what else is measured.

    python benchmarks/emoji_retrieval.py --data-dir emoji64.npz      the full pack: half of its classes for training
    python benchmarks/emoji_retrieval.py --quick                     the embedded set, a few steps: that it runs

The first row compares the images themselves, reduced to 16 x 16 pixels. Every run is `train_dml.py` with
`configs/quick/emoji.yaml` and seed 1, 2, ...; mean and standard deviation over the seeds go to a Markdown table, every
figure to a JSON file with hardware, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from idml.config_dml import parse_dml_config
from idml.data.retrieval_datasets import read_retrieval_data
from idml.environment import hardware, versions
from idml.metrics import retrieval_metrics

ROOT = Path(__file__).resolve().parents[1]

VARIANTS = {
    "plain": ["--ism", "off", "--mix", "none"],
    "plain, Mixup": ["--ism", "off", "--mix", "mixup"],
    "released": ["--ism", "released", "--mix", "mixup"],
    "live": ["--ism", "live", "--mix", "mixup", "--uncertainty-loss", "none"],
    "live, no Mixup": ["--ism", "live", "--mix", "none", "--uncertainty-loss", "none"],
}
COLUMNS = {
    "R@1": "R@1",
    "R@1 other families": "other_families/R@1",
    "MAP@R": "MAP@R",
    "NMI": "NMI",
    "R-AUROC u": "R-AUROC uncertainty",
    "R-AUROC norm": "R-AUROC norm",
    "R-AUROC 1-sim": "R-AUROC similarity",
    "ISM weight": "ism_weight",
}


def train(variant: str, seed: int, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run of the training script, or what an earlier call in the same ``--runs`` folder left; its results."""
    directory = folder / f"{variant.replace(', ', '-').replace(' ', '-')}-s{seed}"
    command = [sys.executable, str(ROOT / "train_dml.py"), "--config", str(ROOT / "configs/quick/emoji.yaml")]
    command += [
        *VARIANTS[variant],
        "--seed",
        str(seed),
        "--threads",
        "1",
        "--no-verbose",
        "--output-dir",
        str(directory),
    ]
    if arguments.quick:
        command += ["--dataset", "emoji-mini", "--max-steps", "4"]
    else:
        command += ["--data-dir", arguments.data_dir]
    if (directory / "results.json").exists():
        return json.loads((directory / "results.json").read_text(encoding="utf-8"))
    shutil.rmtree(directory, ignore_errors=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    print(
        f"{variant}, seed {seed}: R@1 {results['final']['R@1']:.4f}, {time.perf_counter() - started:.0f} s", flush=True
    )
    return results


def thumbnails(arguments: argparse.Namespace) -> dict[str, float]:
    """The figures of no network at all: images of 16 x 16 pixels as vectors, less their mean."""
    own = ["--dataset", "emoji-mini"] if arguments.quick else ["--data-dir", arguments.data_dir]
    config, _ = parse_dml_config(["--config", str(ROOT / "configs/quick/emoji.yaml"), *own], description="")
    test = read_retrieval_data(config)
    assert test.test.images is not None and test.families is not None
    images = torch.from_numpy(test.test.images).permute(0, 3, 1, 2).float()
    vectors = torch.nn.functional.adaptive_avg_pool2d(images, 16).flatten(1)
    labels, families = torch.from_numpy(test.test.labels), torch.from_numpy(test.families)
    vectors -= vectors.mean(0)
    figures = retrieval_metrics(vectors, labels, ks=(1,))
    removed = retrieval_metrics(vectors, labels, ks=(1,), families=families, nmi=False)
    return figures | {f"other_families/{name}": value for name, value in removed.items()}


def cell(values: list[float]) -> str:
    """Mean and standard deviation in percent."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="the .npz of the pack, or the folder that holds it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--processes", type=int, default=2, help="runs beside one another, one thread each")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / f"emoji-{time.strftime('%Y%m%d-%H%M%S')}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/emoji-retrieval.json")
    parser.add_argument("--quick", action="store_true", help="four steps on the embedded set, one seed, nothing stored")
    arguments = parser.parse_args()
    if not arguments.quick and arguments.data_dir is None:
        parser.error("--data-dir is needed (or --quick)")
    seeds = range(1, 1 + (1 if arguments.quick else arguments.seeds))
    jobs = [(variant, seed) for seed in seeds for variant in arguments.variants]
    with ThreadPoolExecutor(arguments.processes) as pool:
        results = list(pool.map(lambda job: train(*job, arguments, arguments.runs), jobs))

    print("| ProxyAnchor | " + " | ".join(COLUMNS) + " |\n|---" + "|---" * len(COLUMNS) + "|")
    rows = {"16 x 16 pixels": [thumbnails(arguments)]}
    for variant in arguments.variants:
        finals = [result["final"] for (name, _), result in zip(jobs, results, strict=True) if name == variant]
        rows[variant] = finals
    for variant, finals in rows.items():
        cells = [cell([f[key] for f in finals]) if key in finals[0] else "-" for key in COLUMNS.values()]
        print(f"| {variant} | " + " | ".join(cells) + " |")
    print(f"\nn = {len(seeds)} seed(s), mean ± standard deviation, in percent; last epoch; {hardware()}")
    if not arguments.quick:
        stored = {
            "runs": rows,
            "config": (ROOT / "configs/quick/emoji.yaml").read_text(encoding="utf-8"),
            "seeds": list(seeds),
            "hardware": hardware(),
            "versions": versions(),
            "git_commit": sorted({str(result["git_commit"]) for result in results}),
            "command": " ".join(["python", "benchmarks/emoji_retrieval.py", *sys.argv[1:]]),
        }
        arguments.out.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        print(f"stored in {arguments.out}")


if __name__ == "__main__":
    main()
