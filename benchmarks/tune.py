"""Plain and live, tuned alike: each of eight losses on two sets; settings chosen on held-out training classes alone.

    python benchmarks/tune.py --icons icons48.npz                    about two hours on 2 CPU cores; resumable
    python benchmarks/tune.py --sets emoji-mini --losses MS          a part of it
    python benchmarks/tune.py --quick                                a few steps: that it runs

Both sides of a pair have the same tries: learning rate of the network and, of losses with proxies, their rate and the
norm that they start from, or the margin where a loss has one (``tries``). Every try trains on 70 % of the training
classes with two seeds; the best three go on with three more. What wins by mean R@1 on the other 30 % is then trained on
all training classes with ten seeds, and tested once. Test classes decide nothing. On icons each side keeps what won for
it on emoji-mini, and four learning rates are tried anew, with two seeds.

Tables go into docs/results.md, every run to benchmarks/results/tune.json and losses.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from typing import Any

import torch
from paired import write_between
from retrieval_sets import SETS, options_of
from studies import LIVE, PLAIN, RESULTS, ROOT, Figures, Run, Study, arguments_of, replaced, table

import train_dml
from idml.errors import UserError, run_main
from idml.losses import LOSSES

VARIANTS = {"plain": PLAIN, "live": LIVE}
FIRST, FURTHER, KEPT = (101, 102), (103, 104, 105), 3
"""Seeds of every try, seeds of the best ones, and how many those are; none of them is a seed of the test."""

HELD_OUT = 0.3
COLUMNS = {"R@1": "R@1", "MAP@R": "MAP@R", "R@1 other families": "other_families/R@1"}


ICON_RATES = ("5e-4", "1e-3", "2e-3", "4e-3")
"""Learning rates that are tried on icons."""


def tries(loss: str) -> list[tuple[str, ...]]:
    """The settings that are tried of a loss on emoji-mini: the same for plain and live.

    >>> len(tries("Proxy_Anchor")), len(tries("Triplet")), len(tries("MS"))
    (12, 12, 6)
    """
    rates = ("5e-4", "1e-3", "2e-3")
    if loss in ("Proxy_Anchor", "Proxy_NCA"):
        own = [("--loss-lr-factor", factor, *norm) for factor in ("10", "50") for norm in ((), ("--proxy-norm", "1"))]
    elif LOSSES[loss].margin is not None:
        published = LOSSES[loss].margin
        assert published is not None
        own = [("--mrg", f"{published * factor:g}") for factor in (0.5, 1, 1.5, 2)]
    else:
        rates, own = ("2.5e-4", "5e-4", "1e-3", "1.5e-3", "2e-3", "4e-3"), [()]
    return [("--lr", rate, *more) for rate, more in itertools.product(rates, own)]


def tries_on(data: str, loss: str, variant: str, chosen: dict[str, Any]) -> list[tuple[str, ...]]:
    """The settings that are tried on a set, as many for plain as for live.

    Args:
        chosen: what has won so far: set -> loss -> variant -> options.

    Raises:
        UserError: a set that takes over from another that has not been tuned.
    """
    if data == "emoji-mini":
        return tries(loss)
    try:
        won = chosen["emoji-mini"][loss][variant]
    except KeyError:
        raise UserError(f"tune.json has no settings of {loss} on emoji-mini: run --sets emoji-mini first") from None
    own = [word for name, value in zip(won[::2], won[1::2], strict=True) if name != "--lr" for word in (name, value)]
    return [("--lr", rate, *own) for rate in ICON_RATES]


def tuned(study: Study, data: str, loss: str, variant: str, arguments: argparse.Namespace) -> tuple[str, ...] | None:
    """The settings that win on held-out training classes; None while runs are missing."""
    base = [*options_of(data, loss, arguments.icons, quick=arguments.quick), *VARIANTS[variant]]
    base += ["--val-fraction", str(HELD_OUT)]
    tried = tries_on(data, loss, variant, study.content.get("chosen", {}))
    settings = {f"{data}, {loss} {variant}, {' '.join(options)}": options for options in tried}

    def means(names: list[str], seeds: tuple[int, ...]) -> dict[str, float] | None:
        runs = [
            Run(row=name, seed=seed, options=(*base, *settings[name]), change="tune:without_test")
            for seed in seeds
            for name in names
        ]
        rows = study.do(runs, processes=arguments.processes, deadline=arguments.deadline)
        if any(len(rows[name]) < len(seeds) for name in names):
            return None
        # A run that failed (see ``train``) has found nothing.
        return {name: statistics.mean(figures.get("R@1", 0.0) for figures in rows[name].values()) for name in names}

    first = means(list(settings), FIRST[: 1 if arguments.quick else None])
    if first is None:
        return None
    best = sorted(first, key=lambda name: -first[name])[:KEPT]
    found = first if arguments.quick or data != "emoji-mini" else means(best, FIRST + FURTHER)
    return None if found is None else settings[max(found, key=lambda name: found[name])]


def without_test() -> Any:
    """The held-out training classes in place of the test classes, which are then never looked at."""
    read = train_dml.read_retrieval_data

    def held_out(config: Any) -> Any:
        data = read(config)
        return dataclasses.replace(data, test=data.val, val=None, families=None)

    return replaced((train_dml, "read_retrieval_data", held_out))


def tested(study: Study, data: str, chosen: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> Figures:
    """Ten seeds of each tuned pair, on the test classes."""
    runs = []
    for seed in range(1, 2 if arguments.quick else 1 + arguments.seeds):
        for loss, of_loss in chosen.items():
            for variant, options in of_loss.items():
                base = options_of(data, loss, arguments.icons, quick=arguments.quick)
                runs.append(
                    Run(row=f"{data}, {loss} {variant}", seed=seed, options=(*base, *VARIANTS[variant], *options))
                )
    return study.do(runs, processes=arguments.processes, deadline=arguments.deadline)


def plain_row(name: str) -> str | None:
    """The row that a row is compared with."""
    return None if name.endswith("plain") else f"{name.split()[0]} plain"


def report(data: str, rows: Figures, chosen: dict[str, dict[str, Any]]) -> str:
    """The table of a set, with the settings that won."""
    named = {name.removeprefix(f"{data}, "): figures for name, figures in rows.items()}
    body = table(
        named, COLUMNS, first="R@1", plain=lambda name: None if "plain" in name else f"{name.split()[0]} plain"
    )
    settings = "; ".join(
        f"{loss} {variant} `{' '.join(options)}`" for loss, pair in chosen.items() for variant, options in pair.items()
    )
    return f"{body}\n\nSettings that won on held-out training classes: {settings}."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--icons", help="the .npz file of icons")
    parser.add_argument("--seeds", type=int, default=10, help="of the test")


def main() -> None:
    arguments = arguments_of(__doc__, add=add_arguments)
    if arguments.quick and arguments.icons is None:
        arguments.sets = [name for name in arguments.sets if name != "icons"]
    torch.set_num_threads(1)
    tuning, losses = (Study(RESULTS / name, quick=arguments.quick) for name in ("tune.json", "losses.json"))
    for data in arguments.sets:
        chosen: dict[str, dict[str, Any]] = {}
        for loss in arguments.losses:
            pair = {variant: tuned(tuning, data, loss, variant, arguments) for variant in VARIANTS}
            if all(options is not None for options in pair.values()):
                chosen[loss] = pair
        tuning.save(chosen=tuning.content.get("chosen", {}) | {data: chosen})
        rows = tested(losses, data, chosen, arguments)
        body = report(data, rows, chosen)
        print(f"\n{data}\n\n{body}\n", flush=True)
        if not arguments.no_docs:
            write_between(ROOT / "docs/results.md", f"losses {data}", body, script="tune.py")


if __name__ == "__main__":
    run_main(main)
