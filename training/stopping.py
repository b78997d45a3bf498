"""A polite stop: a signal sets a flag, and the program leaves where it can be resumed."""

import contextlib
import os
import signal
import sys
import types
from collections.abc import Iterator
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StoppedError(Exception):
    """A signal asked the run to stop; what was done is saved."""


class StopFlag:
    """Set by the first Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP, read between steps; a second Ctrl-C ends the program
    at once.

    A process forked from this one is no concern of these signals: whoever sends them to the whole group, as SLURM and a
    terminal do, still gets one stop.
    """

    def __init__(self):
        self.raised = False
        self._process = os.getpid()
        for number in STOPS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, stack: types.FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        # SLURM sends SIGTERM after the signal that was asked for, and a terminal that closes sends SIGHUP twice, so
        # only a second Ctrl-C is taken for impatience
        if self.raised and number == signal.SIGINT:
            sys.exit(128 + number)
        self.raised = True

    def check(self) -> None:
        """StoppedError if a signal has come."""
        if self.raised:
            raise StoppedError


class IgnoreStops:
    """Lets a process that loads data end with its parent and not by a signal; for a DataLoader's `worker_init_fn`.

    ending: an event that the parent sets before it may end the process by SIGTERM.
    """

    def __init__(self, ending: Any):
        self.ending = ending

    def __call__(self, worker: int) -> None:
        parent = os.getppid()

        def receive(number: int, stack: types.FrameType | None) -> None:
            if self.ending.is_set() or os.getppid() != parent:
                os._exit(0)

        for number in STOPS:
            signal.signal(number, receive if number == signal.SIGTERM else signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


@contextlib.contextmanager
def hold_stops() -> Iterator[None]:
    """Let signals wait while processes are started, which could not handle them in their first moments."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exit_on_interrupt(program: str) -> None:
    """End a program that has nothing to save with one line, and no traceback, on Ctrl-C."""

    def leave(number: int, stack: types.FrameType | None) -> None:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(128 + number)

    signal.signal(signal.SIGINT, leave)
