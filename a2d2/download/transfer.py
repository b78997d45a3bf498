"""One file over HTTP: resumed where it broke off, tried again, and refused if it is something else."""

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
# The last bytes that a killed run wrote are fetched again: after a power cut they may be zeros.
OVERLAP = 1 << 16
# Waits before each new try. A try that brought new bytes starts the list again.
RETRY_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 60.0)
TIMEOUT_S = 30
MD5_LINE = re.compile(r"([0-9a-fA-F]{32})\s+\*?(?:\./)?(\S.*)")


def open_url(url: str, start: int = 0) -> http.client.HTTPResponse:
    """Asks for `url` from byte `start` on.

    Raises MissingError, InterruptedTransferError for what may pass (no connection, 408, 429, 5xx), OverlongPartError
    when the file ends before `start`, and DownloadError for the rest.
    """
    # Without `identity`, a proxy may compress the answer, and its length would be that of other bytes.
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"the server answers {error.code} {error.reason}"
        if error.code in (403, 404, 410):
            raise MissingError(f"{url}: {answer}") from error
        if error.code == 416:
            raise OverlongPartError from error
        if error.code in (408, 429) or error.code >= 500:
            wish = error.headers.get("Retry-After", "")
            pause_s = min(float(wish), 600.0) if wish.isdigit() else 0.0
            raise InterruptedTransferError(answer, pause_s) from error
        raise DownloadError(f"{url}: {answer}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DownloadError(f"{url}: its certificate is not trusted here ({reason.verify_message})") from error
        raise InterruptedTransferError(f"no answer ({reason})") from error


def read_chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body as it arrives. A broken connection raises InterruptedTransferError, so that an OSError is the disk's."""
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise InterruptedTransferError(f"the connection broke ({error})") from error
        if not chunk:
            return
        yield chunk


def read_extent(url: str, response: http.client.HTTPResponse) -> tuple[int, int]:
    """(first byte that this answer brings, size of the whole file)."""
    if response.status == 206:
        extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if extent:
            return int(extent[1]), int(extent[2])
    elif response.headers.get("Content-Length", "").isdigit():
        return 0, int(response.headers["Content-Length"])
    raise DownloadError(f"{url}: the server does not say how long the file is, so nobody can tell when it is whole")


def was_modified_after(response: http.client.HTTPResponse, part: Path) -> bool:
    """Whether the server's file is newer than the piece of it that is here, which then belongs to an older one."""
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
    """The same chunks, once their first `length` bytes are found to be of the kind asked for."""
    head = b""
    while len(head) < length:
        try:
            head += next(chunks)
        except StopIteration:
            raise InterruptedTransferError(f"the connection broke after {len(head)} bytes") from None
    if not fits(head[:length]):
        raise WrongContentError(
            f"{url}: this is not the file but something that begins with {head[:60]!r}, perhaps an error page: "
            "nothing of it was kept"
        )
    return itertools.chain([head], chunks)


def extend_part(
    url: str,
    part: Path,
    fits: Callable[[bytes], bool],
    admit: Callable[[int, int], None],
    progress: Progress,
) -> None:
    """One request: appends to `part` what it lacks of the file at `url`, or raises."""
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
            # Before anything is concluded from its size and date: an error page must not cost what is here.
            chunks = check_start(url, chunks, fits, min(total, BLOCK))
        if start and (was_modified_after(response, part) or total < start):
            part.unlink()
            raise InterruptedTransferError("the file has changed on the server: starting again")
        admit(start, total)
        if first < start:
            # The server ignores ranges. Keeping what is here loses nothing if it is cut off once more.
            chunks = drop_bytes(chunks, start)
        with part.open("ab") as file:
            for chunk in chunks:
                file.write(chunk)
                progress.add(len(chunk))
    size = part.stat().st_size
    if size != total:
        raise InterruptedTransferError(f"the connection broke at {format_bytes(size)} of {format_bytes(total)}")


def drop_tail(part: Path) -> None:
    """Takes off the last bytes that an earlier run left, without making the file look newer than it is."""
    state = part.stat()
    os.truncate(part, max(state.st_size - OVERLAP, 0))
    os.utime(part, ns=(state.st_atime_ns, state.st_mtime_ns))


def retry(
    attempt: Callable[[], object], url: str, progress: Progress, measure: Callable[[], int] = lambda: 0
) -> object:
    """What `attempt()` returns, once it returns; it raises InterruptedTransferError where another try may help.

    `measure()` says how many bytes are here: a try that brought none beyond the farthest so far counts as failed.
    Raises DownloadError after as many failures in a row as there are pauses.
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
                    f"{url}: {error}; {failures} tries in a row brought nothing new. What has arrived is kept: run the "
                    "same command again later"
                ) from error
            pause_s = max(RETRY_PAUSES_S[max(failures - 1, 0)], error.pause_s)
            progress.note(f"{error}; next try in {pause_s:.0f} s")
        progress.wait(pause_s)


def fill_part(
    url: str,
    part: Path,
    fits: Callable[[bytes], bool],
    admit: Callable[[int, int], None],
    progress: Progress,
) -> None:
    """Fetches `url` into `part` until it is whole, from where an earlier run left it, with new tries when it breaks.

    `fits(first bytes)` says whether they are of the kind asked for; `admit(start, total)` hears how many bytes are
    here and how many there are, before anything is written, and may raise. Raises MissingError, WrongContentError,
    and DownloadError when all tries in a row have brought nothing; `part` then stays for the next run.
    """
    if part.exists():
        drop_tail(part)
    retry(
        lambda: extend_part(url, part, fits, admit, progress),
        url,
        progress,
        lambda: part.stat().st_size if part.exists() else 0,
    )


def looks_like_tar(head: bytes) -> bool:
    """Whether a file begins with a tar header whose checksum fits."""
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
