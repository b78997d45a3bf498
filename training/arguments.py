"""Values of the command line that argparse does not check."""

import argparse
from collections.abc import Callable


def count(text: str, least: int = 1) -> int:
    """A whole number of `least` or more."""
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of {least} or more, not {text}")
    return number


def between(least: float, most: float) -> Callable[[str], float]:
    """For a number from `least` to `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be from {least:g} to {most:g}, not {text}")
        return value

    return read


def count_or_none(text: str) -> int:
    """A whole number of 0 or more."""
    return count(text, 0)
