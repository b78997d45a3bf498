"""What programs are given on the command line, and what they print."""

import argparse
import sys


def parse_shard(text: str) -> tuple[int, int]:
    """ "i/n" -> (i, n), with 1 <= i <= n."""
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shard; write i/n, such as 1/8") from None
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"{text!r}: the first number must be between 1 and the second")
    return index, count


def allow_any_text() -> None:
    """Let characters that the terminal's encoding lacks be printed as escapes: finished work must not end in an error
    because a path has an umlaut."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
