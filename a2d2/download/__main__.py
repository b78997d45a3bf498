"""Fetches A2D2: resumes, verifies and unpacks its archives, or fetches single objects if the archives are gone.

sh get_data.sh                            # boxes, bus and calibration, into Datasets/
sh get_data.sh boxes --delete-archives    # deletes the archive once it is unpacked
sh get_data.sh --verify                   # compares the local files with the checksums recorded at download

It runs before anything is installed, so it needs only Python 3.9 and the standard library. docs/a2d2-format.md,
sections 1 and 2.1, describe the archives and their content. Every file is written under a temporary name that ends in
`.part` and renamed when it is complete, so a run can be killed at any time and started again.
"""

import argparse
import difflib
import os
import re
import signal
import sys
from pathlib import Path

from a2d2.console import allow_any_text
from a2d2.download.errors import DownloadError
from a2d2.download.parts import Settings, find_present_parts, get_parts, verify
from a2d2.download.sets import DEFAULT_PARTS, PARTS

ARCHIVES_URL = "https://aev-autonomous-driving-dataset.s3.eu-central-1.amazonaws.com"
# Recent pages name this bucket, which has single objects in place of archives. It has not been tested yet.
OBJECTS_URL = "https://audi-autonomous-driving-dataset.s3.amazonaws.com"


def read_url(variable: str, default: str, parser: argparse.ArgumentParser) -> str:
    """A base URL from the environment variable, without a slash at its end."""
    url = os.environ.get(variable) or default
    if not re.match(r"https?://[^/]", url):
        parser.error(f"{variable} is {url!r}, but it must begin with http:// or https://")
    return url.rstrip("/")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse and check the command line; wrong use ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="get_data.sh",
        description="Fetches A2D2 (licence CC BY-ND 4.0). It can be stopped at any time; the same command resumes.",
        epilog="Environment: A2D2_URL: server of the archives; A2D2_OBJECTS_URL: bucket of single objects, used if "
        "that server has no archive. Exit codes: 0 done, 1 error, 2 wrong use, 75 stopped: the same command resumes.",
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: {', '.join(DEFAULT_PARTS)})"
    )
    parser.add_argument(
        "--into",
        type=Path,
        default=Path(__file__).resolve().parents[2] / "Datasets",
        help="the folder for all parts (default: Datasets in this repository)",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--verify", action="store_true", help="fetch nothing, check the local files (default: all parts)"
    )
    action.add_argument("--delete-archives", action="store_true", help="delete each archive once it is unpacked")
    options = parser.parse_args(arguments)
    for name in options.parts:
        if name not in PARTS:
            close = difflib.get_close_matches(name, PARTS, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            parser.error(f"there is no part {name!r} among {', '.join(PARTS)}{hint}")
    options.archives_url = read_url("A2D2_URL", ARCHIVES_URL, parser)
    options.objects_url = read_url("A2D2_OBJECTS_URL", OBJECTS_URL, parser)
    return options


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code (0, 1, or 75 if it was stopped)."""
    allow_any_text()
    options = parse_arguments(arguments)
    settings = Settings(options.into, options.archives_url, options.objects_url, options.delete_archives)
    try:
        if options.verify:
            return verify(tuple(options.parts) or find_present_parts(settings.into) or PARTS, settings)
        get_parts(tuple(dict.fromkeys(options.parts)) or DEFAULT_PARTS, settings)
    except DownloadError as error:
        print(f"get_data.sh: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"get_data.sh: {error}; what was downloaded to {settings.into} is kept, run this again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nget_data.sh: stopped; what was downloaded is kept, run the same command to resume", file=sys.stderr)
        return 75
    return 0


def stop_on_signal(_number: int, _frame: object) -> None:
    """Makes SIGTERM end the program as Ctrl-C does."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop_on_signal)
    sys.exit(main(sys.argv[1:]))
