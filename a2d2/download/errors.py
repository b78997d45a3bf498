"""The errors of a download; DownloadError and its subclasses are shown to the user."""


class DownloadError(Exception):
    """An error for the user; the message is one line: what went wrong and what to do."""


class MissingError(DownloadError):
    """The server does not have this file (status 403, 404 or 410)."""


class WrongContentError(DownloadError):
    """The server sent something else, such as an error page with status 200."""


class InterruptedTransferError(Exception):
    """The transfer failed in a way that a retry may fix. `pause_s`: seconds that the server asks to wait, or 0."""

    def __init__(self, reason: str, pause_s: float = 0.0):
        super().__init__(reason)
        self.pause_s = pause_s


class OverlongPartError(Exception):
    """The partial file is longer than the server's file."""


class StoppedError(Exception):
    """Another thread has failed or the user has stopped the run."""
