"""Fetches one file over HTTP: resumes it, retries, and refuses a response with other content."""

import email.utils
import http.client
import itertools
import os
import re
import ssl
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from a2d2.download.errors import (
    DownloadError,
    InterruptedTransferError,
    MissingError,
    OverlongPartError,
    WrongContentError,
)
from a2d2.download.files import CHUNK
from a2d2.download.progress import Progress, format_bytes

BLOCK = 512  # of a tar
# The last bytes that an earlier run wrote are fetched again, because after a power failure they may be zeros.
OVERLAP = 1 << 16
# Pauses before each retry. After an attempt that fetched new bytes, the list starts again.
RETRY_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 60.0)
TIMEOUT_S = 30
MD5_LINE = re.compile(r"([0-9a-fA-F]{32})\s+\*?(?:\./)?(\S.*)")


def open_url(url: str, start: int = 0) -> http.client.HTTPResponse:
    """Requests `url` from byte `start` on.

    Raises MissingError, InterruptedTransferError for temporary errors (no connection, 408, 429, 5xx), OverlongPartError
    if the file ends before `start`, and DownloadError for other errors.
    """
    # Without `identity`, a proxy may compress the response, and Content-Length would count the compressed bytes.
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        status = f"the server responds with {error.code} {error.reason}"
        if error.code in (403, 404, 410):
            raise MissingError(f"{url}: {status}") from error
        if error.code == 416:
            raise OverlongPartError from error
        if error.code in (408, 429) or error.code >= 500:
            retry_after = error.headers.get("Retry-After", "")
            pause_s = min(float(retry_after), 600.0) if retry_after.isdigit() else 0.0
            raise InterruptedTransferError(status, pause_s) from error
        raise DownloadError(f"{url}: {status}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DownloadError(f"{url}: its certificate is not trusted here ({reason.verify_message})") from error
        raise InterruptedTransferError(f"no response ({reason})") from error


def read_chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The chunks of the body. A broken connection raises InterruptedTransferError, an OSError comes from the disk."""
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise InterruptedTransferError(f"the connection broke ({error})") from error
        if not chunk:
            return
        yield chunk


def read_extent(url: str, response: http.client.HTTPResponse) -> tuple[int, int]:
    """(index of the first byte in this response, size of the whole file)."""
    if response.status == 206:
        extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if extent:
            return int(extent[1]), int(extent[2])
    elif response.headers.get("Content-Length", "").isdigit():
        return 0, int(response.headers["Content-Length"])
    raise DownloadError(f"{url}: the server does not send the file's size, so a complete file cannot be recognized")


def was_modified_after(response: http.client.HTTPResponse, part: Path) -> bool:
    """Whether the server's file is newer than `part`, which is then a part of an older file."""
    try:
        modified = email.utils.parsedate_to_datetime(response.headers["Last-Modified"]).timestamp()
    except (TypeError, ValueError):
        return False
    return modified > part.stat().st_mtime


def drop_bytes(chunks: Iterator[bytes], count: int) -> Iterator[bytes]:
    """The chunks without their first `count` bytes."""
    for chunk in chunks:
        if count < len(chunk):
            yield chunk[count:]
        count = max(count - len(chunk), 0)


def check_start(url: str, chunks: Iterator[bytes], fits: Callable[[bytes], bool], length: int) -> Iterator[bytes]:
    """The same chunks, after a check of their first `length` bytes; WrongContentError if `fits` returns False."""
    head = b""
    while len(head) < length:
        try:
            head += next(chunks)
        except StopIteration:
            raise InterruptedTransferError(f"the connection broke after {len(head)} bytes") from None
    if not fits(head[:length]):
        raise WrongContentError(
            f"{url}: the content is not the file; it begins with {head[:60]!r}, perhaps an error page: nothing of it "
            "was kept"
        )
    return itertools.chain([head], chunks)


def extend_part(
    url: str,
    part: Path,
    fits: Callable[[bytes], bool],
    on_start: Callable[[int, int], None],
    progress: Progress,
) -> None:
    """One request: appends to `part` the missing bytes of the file at `url`, or raises."""
    start = part.stat().st_size if part.exists() else 0
    try:
        response = open_url(url, start)
    except OverlongPartError:
        part.unlink()
        raise InterruptedTransferError("the file has changed on the server: starting again") from None
    with response:
        first, total = read_extent(url, response)
        if first not in (0, start):
            raise DownloadError(f"{url}: asked for the bytes from {start} on, the server sent those from {first} on")
        chunks = read_chunks(response)
        if first == 0:
            # This check comes before those of size and date, so that an error page does not delete `part`.
            chunks = check_start(url, chunks, fits, min(total, BLOCK))
        if start and (was_modified_after(response, part) or total < start):
            part.unlink()
            raise InterruptedTransferError("the file has changed on the server: starting again")
        on_start(start, total)
        if first < start:
            # The server ignores ranges. `part` is kept, in case the connection breaks again before its end.
            chunks = drop_bytes(chunks, start)
        with part.open("ab") as file:
            for chunk in chunks:
                file.write(chunk)
                progress.add(len(chunk))
    size = part.stat().st_size
    if size != total:
        raise InterruptedTransferError(f"the connection broke at {format_bytes(size)} of {format_bytes(total)}")


def drop_tail(part: Path) -> None:
    """Removes the last bytes of an earlier run, and keeps the file's modification time."""
    state = part.stat()
    os.truncate(part, max(state.st_size - OVERLAP, 0))
    os.utime(part, ns=(state.st_atime_ns, state.st_mtime_ns))


def retry(
    attempt: Callable[[], object], url: str, progress: Progress, measure: Callable[[], int] = lambda: 0
) -> object:
    """Calls `attempt()` until it returns, and returns its result; it is retried if it raises InterruptedTransferError.

    `measure()` returns the number of local bytes: an attempt that did not increase their maximum counts as failed.
    Raises DownloadError after more failures in a row than there are pauses.
    """
    farthest, failures = measure(), 0
    while True:
        try:
            return attempt()
        except InterruptedTransferError as error:
            here = measure()
            failures = 0 if here > farthest else failures + 1
            farthest = max(here, farthest)
            if failures > len(RETRY_PAUSES_S):
                raise DownloadError(
                    f"{url}: {error}; {failures} tries in a row fetched nothing new. What was downloaded is kept: run "
                    "the same command again later"
                ) from error
            pause_s = max(RETRY_PAUSES_S[max(failures - 1, 0)], error.pause_s)
            progress.note(f"{error}; next try in {pause_s:.0f} s")
        progress.wait(pause_s)


def fill_part(
    url: str,
    part: Path,
    fits: Callable[[bytes], bool],
    on_start: Callable[[int, int], None],
    progress: Progress,
) -> None:
    """Fetches `url` into `part` until it is complete; resumes an earlier run, and retries if the connection breaks.

    `fits(first bytes)` returns whether the content has the expected type. `on_start(start, total)` is called before
    anything is written, with the number of local bytes and the size of the file, and may raise. Raises MissingError,
    WrongContentError, and DownloadError if no retry fetched anything; `part` then stays for the next run.
    """
    if part.exists():
        drop_tail(part)
    retry(
        lambda: extend_part(url, part, fits, on_start, progress),
        url,
        progress,
        lambda: part.stat().st_size if part.exists() else 0,
    )


def looks_like_tar(head: bytes) -> bool:
    """Whether a file begins with a tar header that has a valid checksum."""
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def looks_like_json(head: bytes) -> bool:
    """Whether a file begins as a JSON object does."""
    return head.lstrip().startswith(b"{")


def looks_like_md5_list(head: bytes) -> bool:
    """Whether a file begins with `<32 hex digits> <name>`."""
    return MD5_LINE.match(head.decode(errors="replace").lstrip()) is not None
