"""Errors that a user can act on, and how they end a program: one line, a documented exit code, no traceback."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable

EXIT_BAD_INPUT = 2
EXIT_TRAINING_FAILED = 1


class UserError(ValueError):
    """Bad input. The message says what was expected, what was got and what to do; the program exits with code 2."""

    exit_code = EXIT_BAD_INPUT


class TrainingError(RuntimeError):
    """Training cannot go on (a non-finite loss, say); the program exits with code 1."""

    exit_code = EXIT_TRAINING_FAILED


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """``"; did you mean a, b?"`` with the names closest to ``name``, or an empty string when none is close."""
    spelled = {known.lower(): known for known in names}
    matches = [spelled[match] for match in difflib.get_close_matches(name.lower(), spelled, n=count, cutoff=0.5)]
    return f"; did you mean {', '.join(matches)}?" if matches else ""


def run_main(main: Callable[[], None]) -> None:
    """Run ``main`` and end the process: a UserError or TrainingError becomes one line on stderr and its exit code."""
    try:
        main()
    except (UserError, TrainingError) as error:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"error{rank}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
