"""Values of the command line that argparse does not check."""

import argparse


def count(text: str, least: int = 1) -> int:
    """A whole number of `least` or more."""
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of {least} or more, not {text}")
    return number


def count_or_none(text: str) -> int:
    """A whole number of 0 or more."""
    return count(text, 0)
