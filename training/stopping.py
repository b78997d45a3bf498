"""A polite stop: a signal sets a flag, and the program leaves where it can be resumed."""

import signal
import sys


class StoppedError(Exception):
    """A signal asked the run to stop; what was done is saved."""


class StopFlag:
    """Set by the first Ctrl-C, SIGTERM or SIGUSR1, read between steps; the second signal ends the program at once."""

    def __init__(self):
        self.raised = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number, stack):
        if self.raised:
            sys.exit(128 + number)
        self.raised = True

    def check(self) -> None:
        """StoppedError if a signal has come."""
        if self.raised:
            raise StoppedError
