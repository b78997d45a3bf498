"""What programs print."""

import sys


def allow_any_text() -> None:
    """Let characters that the terminal's encoding lacks be printed as escapes: finished work must not end in an error
    because a path has an umlaut."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
