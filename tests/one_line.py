"""The one line that an error of a user's is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from idml.errors import run_main


def error_of(capsys: pytest.CaptureFixture[str], program: Callable[[], object]) -> str:
    """What a program says on stderr before it exits with code 2: one line, and nothing else."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(program)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error
