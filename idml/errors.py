"""Errors that a user can act on, and how they end a program: one line, a documented exit code, no traceback."""

from __future__ import annotations

import difflib
import io
import os
import select
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from idml.signals import Interrupted, reasons

EXIT_BAD_INPUT = 2
EXIT_TRAINING_FAILED = 1
EXIT_STORAGE = 74  # EX_IOERR of sysexits.h
EXIT_BROKEN_PIPE = 141  # as a shell says it of a program that SIGPIPE has ended


class UserError(ValueError):
    """Bad input. The message says what was expected, what was got and what to do; the program exits with code 2."""

    exit_code = EXIT_BAD_INPUT


class TrainingError(RuntimeError):
    """Training cannot go on (a non-finite loss, say); the program exits with code 1."""

    exit_code = EXIT_TRAINING_FAILED


class StorageError(RuntimeError):
    """The disk does not take what must be kept; the program exits with code 74."""

    exit_code = EXIT_STORAGE


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """``"; did you mean a, b?"`` with the names closest to ``name``, or an empty string when none is close."""
    spelled = {known.lower(): known for known in names}
    matches = [spelled[match] for match in difflib.get_close_matches(name.lower(), spelled, n=count, cutoff=0.5)]
    return f"; did you mean {', '.join(matches)}?" if matches else ""


def run_main(main: Callable[[], None]) -> None:
    """Run ``main`` and end the process: an error of this module becomes one line on stderr and its exit code.

    So does a signal that has stopped a run.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold bytes that are no text
    threading.excepthook = _quiet_about_tensorboard
    sys.unraisablehook = _quiet_about_readers
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        if not nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    except Interrupted as stop:
        if not _one_of_several() or os.environ.get("RANK", "0") == "0":
            print(" ".join(str(stop).split()), file=sys.stderr, flush=True)
        leave(stop.exit_code)
    except (UserError, TrainingError, StorageError) as error:
        _say(str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        # Torch raises it in the main thread, wherever that is, when it hears of the end of a loader's process; whatever
        # was being done may make another error of it.
        died = [str(reason) for reason in (error, *reasons(error)) if str(reason).startswith("DataLoader worker")]
        if not died and _left_alone(error):
            _say("another process has ended, with a line of its own that says why")
            sys.stdout.flush()
            os._exit(EXIT_TRAINING_FAILED)
        if not died:
            raise
        known = next((reason for reason in died if "signal" in reason), died[0])
        advice = "they are mostly short of memory, shared or other: give fewer --workers, then go on with --resume"
        if "Bus error" in known:
            advice = "shared memory was full: docker run --shm-size 1g gives more, --workers 0 needs none"
        _say(f"a process that reads images has died: {known} ({advice})")
        sys.stdout.flush()
        os._exit(EXIT_TRAINING_FAILED)  # an orderly exit ends the other processes, and torch raises this for each
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def nobody_reads() -> bool:
    """Whether what the output went to (head, say) has ended; a process that reads images breaks another pipe."""
    poll = select.poll()
    poll.register(sys.stdout.fileno())
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _one_of_several() -> bool:
    """Whether the environment says so; errors are told before `idml.launch` has found anything wrong with it, too."""
    size = os.environ.get("WORLD_SIZE", "1").strip()
    return size.isdecimal() and int(size) > 1


def _left_alone(error: Exception) -> bool:
    """Whether another rank is gone from what this one waited for."""
    gone = ("closed by peer", "reset by peer")
    return _one_of_several() and isinstance(error, RuntimeError) and any(words in str(error).lower() for words in gone)


def _say(error: str) -> None:
    """The one line on stderr."""
    rank = f" (rank {os.environ['RANK']})" if _one_of_several() and "RANK" in os.environ else ""
    print(f"error{rank}: {' '.join(error.split())}", file=sys.stderr, flush=True)


def _quiet_about_tensorboard(failure: threading.ExceptHookArgs) -> None:
    """Threads that fail are told of as usual, but for TensorBoard's: its next call raises the same error."""
    if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__name__ == "_AsyncWriterThread"):
        threading.__excepthook__(failure)


def _quiet_about_readers(unraisable: Any) -> None:
    """Where torch hears of the end of a loader's process while Python tidies up, its error cannot be raised: the loader
    finds the process missing all the same, and one line says so."""
    if not str(unraisable.exc_value).startswith("DataLoader worker"):
        sys.__unraisablehook__(unraisable)


def leave(code: int) -> NoReturn:
    """End the process with this code; under torchrun at once, since other ranks may never come to a common end."""
    if _one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
