"""Signals that ask a run to stop: the step is finished, the state is saved, and the program ends with a known code."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
"""128 + the signal's number, as shells report it; SIGUSR1, sent by clusters before a preemption, counts as SIGTERM."""

SAME_SIGNAL_SECONDS = 1.0
"""A second SIGINT that comes sooner is the first one again: torchrun passes on what the terminal has already sent."""


AGAIN_SECONDS = 0.05
"""After so long a signal is sent again that came where it could not be told of."""

PR_SET_PDEATHSIG = 1
"""Of Linux's ``prctl``: the signal that this process gets when its parent ends (linux/prctl.h)."""


class Interrupted(BaseException):
    """A signal ended the run. Like KeyboardInterrupt, nothing that handles errors in general takes it for one.

    Args:
        number: the signal.
        message: what was saved, and how to go on.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message or f"stopped by {signal.Signals(number).name}")
        self.exit_code = EXIT_CODES[signal.Signals(number)]

    @classmethod
    def with_code(cls, code: int, message: str) -> Interrupted:
        """For a rank that another rank's signal stops, of which it knows the exit code."""
        return cls(next(number for number, own in EXIT_CODES.items() if own == code), message)


class StopSignals:
    """While it is entered, SIGTERM, SIGINT and SIGUSR1 raise ``Interrupted``, or are noted inside ``deferred``.

    A second SIGINT ends the process at once, whatever it is doing. Outside the main thread, where Python takes no
    signals, entering it does nothing.

    Attributes:
        received: the first signal that came, or None.
        message: what is said when one stops the program: what has been saved, once something has.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.message = ""
        self._deferred = False
        self._write = self._wakeup_before = -1
        self._before: dict[signal.Signals, Any] = {}
        self._hook_before: Any = sys.unraisablehook
        self._again: threading.Timer | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in EXIT_CODES}
            read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            threading.Thread(target=_end_on_second_sigint, args=(read,), daemon=True, name="signals").start()
            self._hook_before, sys.unraisablehook = sys.unraisablehook, self._raised_in_vain
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if not self._before:
            return
        self._restore()
        if self.received is None or error is None or isinstance(error, Interrupted):
            return
        # Another rank heard of the signal where it could stop at once, and is gone from what this one waited for; or
        # Python made another error of it, as it does in the middle of a class being made by an import.
        from torch import distributed as dist  # slow to import, and this module is needed by every command

        left_alone = isinstance(error, RuntimeError) and dist.is_initialized()
        if left_alone or any(isinstance(reason, Interrupted) for reason in reasons(error)):
            raise Interrupted(self.received, self.message) from None

    def _restore(self) -> None:
        sys.unraisablehook = self._hook_before
        if self._again is not None:
            self._again.cancel()
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write)  # ends the thread
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals are noted in ``received``; the caller looks at it where it can stop. Not to be nested."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            if self._deferred:
                # print() is not safe here: the signal may have come in the middle of one.
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"finishing the step, then saving\n")
        if not self._deferred:
            raise Interrupted(self.received, self.message)

    def _raised_in_vain(self, raised: sys.UnraisableHookArgs) -> None:
        """``Interrupted`` in a finalizer or the like, which no exception gets out of: once more, a little later."""
        if not isinstance(raised.exc_value, Interrupted) or self.received is None:
            self._hook_before(raised)
            return
        # Not SIGINT, of which a second one ends the process at once.
        self._again = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), signal.SIGTERM))
        self._again.daemon = True
        self._again.start()


def reasons(error: BaseException) -> Iterator[BaseException]:
    """What the error came of, and that of, and so on."""
    reason = error.__cause__ or error.__context__
    while reason is not None:
        yield reason
        reason = reason.__cause__ or reason.__context__


def _end_on_second_sigint(signals: int) -> None:
    """In a thread of its own, since Python calls handlers only between two steps of the main thread, which may be long.

    Args:
        signals: descriptor from which the numbers of signals are read, until it is closed on the other side.
    """
    first: float | None = None
    while received := os.read(signals, 1):
        if received[0] not in {int(number) for number in EXIT_CODES}:
            continue
        now = time.monotonic()
        if first is None:
            first = now
        elif received[0] == signal.SIGINT and now - first > SAME_SIGNAL_SECONDS:
            os._exit(EXIT_CODES[signal.SIGINT])
    os.close(signals)


def stop_when_parent_dies() -> None:
    """From now on the end of the parent, torchrun say, counts as SIGTERM (Linux; elsewhere nothing happens).

    Otherwise ranks would train on unseen when torchrun is killed, or by a signal that it does not pass on.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def worker_init(_worker: int) -> None:
    """In a loader's worker process: it leaves SIGINT and SIGUSR1 to the main process, and SIGTERM ends it as usual.

    So does SIGBUS, of which torch would print a line in the worker; the main process says what it was.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGBUS, signal.SIG_DFL)
