"""What can go wrong with a download, and who hears of it."""


class DownloadError(Exception):
    """What went wrong and what to do, in one line for the user."""


class MissingError(DownloadError):
    """The server answers, but it does not have this file (403, 404 or 410)."""


class WrongContentError(DownloadError):
    """The server sent something else, such as an error page with status 200."""


class InterruptedTransferError(Exception):
    """The transfer broke off in a way that another try may mend. `pause_s`: the server's own wish, or 0."""

    def __init__(self, reason: str, pause_s: float = 0.0):
        super().__init__(reason)
        self.pause_s = pause_s


class OverlongPartError(Exception):
    """The server's file is shorter than what is here of it."""


class StoppedError(Exception):
    """Another thread has failed or the user has stopped the run."""
