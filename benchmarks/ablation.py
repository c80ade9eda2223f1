"""Which part of the ISM does what: one thing changed at a time, paired by seed, on two retrieval sets.

    python benchmarks/ablation.py --icons icons48.npz            about an hour and a half on 2 CPU cores; resumable
    python benchmarks/ablation.py --sets emoji-mini --losses Proxy_Anchor
    python benchmarks/ablation.py --quick                        a few steps: that it runs

Every row is trained with the settings that won for *plain* in `benchmarks/tune.py`, on all training classes, and tested
on the others. What is not an option of the script is changed in this process by the functions below, each of which says
what it takes away. Differences are to plain and to live, seed by seed.

The tables go into docs/results.md, every run to benchmarks/results/ablation.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

import torch
from paired import difference_cells, markdown_table, mean_cell, paired_differences, write_between
from retrieval_sets import SETS, options_of
from studies import LIVE, PLAIN, RESULTS, ROOT, Figures, Run, Study, arguments_of, of, replaced
from torch import Tensor
from torch.nn import functional

from idml import losses as idml_losses
from idml.distance import IntrospectiveDistance
from idml.errors import UserError, run_main
from idml.heads import MEAN_EXPONENT, UncertaintyHead
from idml.losses import MetricLoss

FIXED_BETA = 0.5
"""Beta whose exponent is 0.05 at alpha = 2 (orthogonal unit vectors), tau = 5."""

ANY = {
    "plain": (PLAIN, ""),
    "live": (LIVE, ""),
    "beta is its batch mean": (LIVE, "mean_beta"),
    "beta is fixed, 0.5": (LIVE, "fixed_beta"),
    "u without gradient to the backbone": (LIVE, "detached"),
    "u not relative to the batch": (LIVE, "own_scale"),
    "mean exponent 0.0125": (LIVE, "exponent:0.0125"),
    "mean exponent 0.2": (LIVE, "exponent:0.2"),
}
"""What is changed for every loss: options, and the function that changes the package."""

FURTHER = {
    "plain, proxies from norm 3.2": ([*PLAIN, "--proxy-norm", "3.2"], ""),
    "proxies from norm 3.2": ([*LIVE, "--proxy-norm", "3.2"], ""),
    "alpha to raw proxies": (LIVE, "raw_proxies"),
    "alpha to raw proxies from norm 3.2": ([*LIVE, "--proxy-norm", "3.2"], "raw_proxies"),
    "u of 512 numbers": ([*LIVE, "--uncertainty-dim", "512"], ""),
    "u with ReLU": (LIVE, "relu"),
    "mean exponent 0.025": (LIVE, "exponent:0.025"),
    "mean exponent 0.1": (LIVE, "exponent:0.1"),
    "tau 1": ([*LIVE, "--temperature", "1"], ""),
    "tau 20": ([*LIVE, "--temperature", "20"], ""),
    "tau 1, u not relative": ([*LIVE, "--temperature", "1"], "own_scale"),
    "tau 20, u not relative": ([*LIVE, "--temperature", "20"], "own_scale"),
    "plain, Mixup": ([*PLAIN, "--mix", "mixup"], ""),
    "Mixup": ([*LIVE, "--mix", "mixup"], ""),
    "plain, CutMix": ([*PLAIN, "--mix", "cutmix"], ""),
    "CutMix": ([*LIVE, "--mix", "cutmix"], ""),
}
"""What is changed besides, of ``MANY``."""

MANY = (("emoji-mini", "Proxy_Anchor"),)
LOSSES = ("Proxy_Anchor", "Proxy_NCA", "MS", "Contrastive")


def mean_beta() -> Any:
    """What each image says of itself is taken away: beta is its mean over the comparisons."""
    return _other_beta(lambda beta: beta.mean().expand_as(beta))


def fixed_beta() -> Any:
    """All that is learned is taken away: beta is a constant, as in the released retrieval code."""
    changes = [(MetricLoss, "_relative", lambda self, embeddings: embeddings)]
    return _other_beta(lambda beta: torch.full_like(beta, FIXED_BETA), *changes)


def _other_beta(change: Any, *further: tuple[Any, str, Any]) -> Any:
    before = IntrospectiveDistance.__dict__["_alpha_beta"].__func__

    def changed(query: Any, reference: Any, *, row_by_row: bool) -> tuple[Tensor, Tensor, Tensor]:
        similarity, alpha, beta = before(query, reference, row_by_row=row_by_row)
        return similarity, alpha, change(beta)

    return replaced((IntrospectiveDistance, "_alpha_beta", staticmethod(changed)), *further)


def detached() -> Any:
    """The head learns, but nothing of it reaches the backbone."""
    before = UncertaintyHead.forward
    return replaced((UncertaintyHead, "forward", lambda self, features: before(self, features.detach())))


def relu() -> Any:
    """u >= 0, as in classification: uncertainties of two images add up and cannot cancel."""
    before = UncertaintyHead.forward
    return replaced((UncertaintyHead, "forward", lambda self, features: functional.relu(before(self, features))))


def own_scale() -> Any:
    """u is not relative to the batch: its gain is set before training and stays."""
    scale = idml_losses.scale_uncertainty_head
    done: list[int] = []

    def once(model: Any, loss: Any, images: Tensor) -> float:
        if not done:
            done.append(1)
            return scale(model, loss, images)
        return loss.ism_weight(model.eval()(images).joint())

    import train_dml

    return replaced(
        (MetricLoss, "_relative", lambda self, embeddings: embeddings), (train_dml, "scale_uncertainty_head", once)
    )


def exponent(value: str) -> Any:
    """Another mean exponent than ``MEAN_EXPONENT``."""
    return replaced((idml_losses, "MEAN_EXPONENT", float(value)))


def raw_proxies() -> Any:
    """Alpha to proxies at their own length, as in the released code."""
    import idml.distance

    return replaced((idml.distance, "RAW_PROXIES", {"released": True, "live": True}))


def settings_of(data: str, loss: str) -> list[str]:
    """The options that won for plain.

    Raises:
        UserError: that set and loss have not been tuned.
    """
    path = RESULTS / "tune.json"
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    try:
        return list(stored["chosen"][data][loss]["plain"])
    except KeyError:
        raise UserError(f"{path.name} has no settings of {loss} on {data}: run benchmarks/tune.py first") from None


def runs_of(data: str, loss: str, arguments: argparse.Namespace) -> list[Run]:
    """All rows of a loss, seed by seed."""
    settings = ["--lr", "1e-3"] if arguments.quick else settings_of(data, loss)
    base = [*options_of(data, loss, arguments.icons, quick=arguments.quick), *settings]
    variants = ANY | (FURTHER if (data, loss) in MANY else {})
    return [
        Run(
            row=f"{data}, {loss}: {name}",
            seed=seed,
            options=(*base, *options),
            change=f"ablation:{change}" if change else "",
        )
        for seed in range(1, 2 if arguments.quick else 1 + arguments.seeds)
        for name, (options, change) in variants.items()
    ]


def report(rows: Figures, prefix: str) -> str:
    """A table of a loss: each row's R@1, less plain's and less live's."""
    found: Mapping[str, dict[int, float]] = {
        name.removeprefix(prefix): of(figures, "R@1") for name, figures in rows.items() if name.startswith(prefix)
    }
    head = ["", "n", "R@1, %", "less plain, points", "95 % interval", "less live, points", "95 % interval"]
    lines = []
    for name, values in found.items():
        cells = [name, str(len(values)), mean_cell(list(values.values()))]
        for other in ("plain", "live"):
            cells += difference_cells([] if name == other else paired_differences(values, found[other]))
        lines.append(cells)
    return markdown_table(head, lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--icons", help="the .npz file of icons")
    parser.add_argument("--seeds", type=int, default=10)


def main() -> None:
    arguments = arguments_of(__doc__, add=add_arguments)
    if arguments.quick and arguments.icons is None:
        arguments.sets = [name for name in arguments.sets if name != "icons"]
    torch.set_num_threads(1)
    study = Study(RESULTS / "ablation.json", quick=arguments.quick)
    for data in arguments.sets:
        for loss in arguments.losses:
            runs = runs_of(data, loss, arguments)
            rows = study.do(runs, processes=arguments.processes, deadline=arguments.deadline)
            body = report(rows, f"{data}, {loss}: ")
            print(f"\n{data}, {loss}\n\n{body}\n", flush=True)
            if not arguments.no_docs:
                write_between(ROOT / "docs/results.md", f"ablation {data} {loss}", body, script="ablation.py")
    study.save(mean_exponent=MEAN_EXPONENT)


if __name__ == "__main__":
    run_main(main)
