"""Fetches A2D2: resumes, verifies and unpacks its archives, or syncs single objects where the archives are gone.

sh get_data.sh                            # boxes, bus and calibration, into Datasets/
sh get_data.sh boxes --delete-archives    # frees the archive's space once it is unpacked
sh get_data.sh --verify                   # checks what is here against what was recorded when it arrived

It runs before anything is installed, so it needs Python 3.9 and the standard library alone. The archives and what
they hold are described in the A2D2 format notes, sections 1 and 2.1. Everything is written under a temporary name
that ends in `.part` and renamed when it is whole, so a run can be killed at any moment and started again.
"""

import argparse
import difflib
import email.utils
import fcntl
import functools
import hashlib
import http.client
import itertools
import json
import os
import queue
import re
import shutil
import signal
import ssl
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import xml.etree.ElementTree
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

ARCHIVES_URL = "https://aev-autonomous-driving-dataset.s3.eu-central-1.amazonaws.com"
# Recent pages name this bucket, with single objects in place of archives. Nobody has checked yet that it answers.
OBJECTS_URL = "https://audi-autonomous-driving-dataset.s3.amazonaws.com"

# Part -> its folder under Datasets/, which is the archive's name without .tar and the prefix of its objects.
SETS = {
    "boxes": "camera_lidar_semantic_bboxes",
    "semantic": "camera_lidar_semantic",
    "bus": "camera_lidar_semantic_bus",
}
CALIBRATION = "cams_lidars.json"
PARTS = (*SETS, "calibration")
DEFAULT_PARTS = ("boxes", "bus", "calibration")

MARKER = ".unpacked.json"
BLOCK = 512  # of a tar
CHUNK = 1 << 20
# The last bytes that a killed run wrote are fetched again: after a power cut they may be zeros.
OVERLAP = 1 << 16
# Waits before each new try. A try that brought new bytes starts the list again.
RETRY_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 60.0)
TIMEOUT_S = 30
OBJECT_THREADS = 8

SAFE_NAME = re.compile(r"[A-Za-z0-9 ._()+-]+")
SCENE = re.compile(r"\d{8}_\d{6}")
MD5_LINE = re.compile(r"([0-9a-fA-F]{32})\s+\*?(?:\./)?(\S.*)")


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


# ---------------------------------------------------------------------------------------------------------------
# What the user sees


def format_bytes(count: int) -> str:
    """`count` bytes as a person says it, in powers of 1000 as disks are sold: "48.0 GB"."""
    if count < 1000:
        return f"{count} B"
    size = float(count)
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} TB"


def format_seconds(seconds: float) -> str:
    """`seconds` as hours, minutes and seconds: "2:05:09"."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


class Progress:
    """One line with share, rate and time left: redrawn on a terminal, printed once a minute into a file.

    `with Progress(label) as progress` leaves the terminal at the start of a fresh line. Threads may share it. Once
    `stop` is set, `add` and `wait` raise StoppedError.
    """

    RATE_WINDOW_S = 20.0

    def __init__(self, label: str):
        self.label = label
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._terminal = sys.stderr.isatty()
        self._line_is_open = False
        self.start(0, 0)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._line_is_open:
                self._draw()
            self._end_line()

    def start(self, done: int, total: int) -> None:
        """Sets the count to `done` of `total` bytes; what was done before does not enter the rate."""
        with self._lock:
            self._done, self._total = done, total
            self._samples = deque([(time.monotonic(), done)])
            self._shown = time.monotonic()

    def add(self, count: int) -> None:
        """Counts `count` more bytes and draws the line if it is time."""
        if self.stop.is_set():
            raise StoppedError
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._shown >= (0.2 if self._terminal else 60.0):
                self._shown = now
                self._samples.append((now, self._done))
                while now - self._samples[0][0] > self.RATE_WINDOW_S and len(self._samples) > 2:
                    self._samples.popleft()
                self._draw()

    def wait(self, seconds: float) -> None:
        """Sleeps, but not longer than the run lasts."""
        if self.stop.wait(seconds):
            raise StoppedError

    def note(self, text: str) -> None:
        """Prints a line of its own."""
        with self._lock:
            self._end_line()
            print(f"{self.label}: {text}", file=sys.stderr, flush=True)

    def _draw(self) -> None:
        (begun, before), (now, done) = self._samples[0], (time.monotonic(), self._done)
        rate = (done - before) / max(now - begun, 1e-6)
        left = format_seconds(max(self._total - done, 0) / rate) if rate > 0 else "?"
        share = min(done / self._total, 1.0) if self._total else 0.0
        text = f"{self.label}: {share:4.0%} of {format_bytes(self._total)}, {format_bytes(int(rate))}/s, {left} left"
        if self._terminal:
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
            self._line_is_open = True
        else:
            print(text, file=sys.stderr, flush=True)

    def _end_line(self) -> None:
        if self._line_is_open:
            print(file=sys.stderr)
            self._line_is_open = False


# ---------------------------------------------------------------------------------------------------------------
# Files and space


def write_json(path: Path, content: dict) -> None:
    """Writes `content` to `path`, whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def add_part_suffix(path: Path) -> Path:
    """The name under which `path` is written until it is whole. Always the same, so a rerun clears what it left."""
    return path.with_name(path.name + ".part")


def publish(part: Path, target: Path) -> None:
    """Gives a finished file its final name, after its bytes have reached the disk."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)


def has_size(path: Path, size: int) -> bool:
    """Whether `path` is a file of `size` bytes."""
    return path.is_file() and path.stat().st_size == size


def check_space(folder: Path, needed: int, purpose: str) -> None:
    """Raises DownloadError when the disk that holds `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"{purpose}: {format_bytes(needed)} are needed in {folder}, {format_bytes(free)} are free: "
            "make room, or choose another disk with --into"
        )


def compute_digests(path: Path, algorithms: tuple[str, ...], label: str) -> dict[str, str]:
    """{algorithm: hex digest} of a file, in one pass."""
    # A strict system refuses md5 unless it is told that nothing secret depends on it.
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    with path.open("rb") as file, Progress(label) as progress:
        progress.start(0, path.stat().st_size)
        while chunk := file.read(CHUNK):
            for one in hashes.values():
                one.update(chunk)
            progress.add(len(chunk))
    return {name: one.hexdigest() for name, one in hashes.items()}


def hold_folder(folder: Path) -> int:
    """Takes the lock of a folder, so that two runs never write the same `.part`; returns what to close at the end.

    Raises DownloadError when another run has it. A file system without locks is used without.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise DownloadError(f"another get_data.sh is at work in {folder}: wait for it, or stop it") from None
    except OSError:
        pass
    return handle


# ---------------------------------------------------------------------------------------------------------------
# One file over HTTP


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


# ---------------------------------------------------------------------------------------------------------------
# Checksums


def read_records(archives: Path) -> dict[str, dict]:
    """{file name: {"size": bytes, "sha256": hex}} of what arrived first; {} when nothing has."""
    path = archives / "checksums.json"
    return json.loads(path.read_text()) if path.exists() else {}


def record_arrival(path: Path, name: str, archives: Path, md5: str) -> None:
    """Hashes a file that has arrived, compares it with the server's list and with what arrived first, and records it.

    `md5` is the server's value, "" where it has none. A file that the server's own list contradicts is removed.
    """
    digests = compute_digests(path, ("sha256", "md5") if md5 else ("sha256",), f"{name}: checking")
    if md5 and digests["md5"] != md5:
        path.unlink()
        raise DownloadError(
            f"{name} has the md5 {digests['md5']}, the server's list says {md5}: it was removed, run this again"
        )
    records = read_records(archives)
    found = {"size": path.stat().st_size, "sha256": digests["sha256"]}
    if records.setdefault(name, found) != found:
        raise DownloadError(
            f"{name} has the sha256 {digests['sha256']}, what arrived first had {records[name]['sha256']}: if it was "
            f"replaced on the server, remove its entry from {archives / 'checksums.json'}; if not, remove {path}"
        )
    write_json(archives / "checksums.json", records)


def fetch_md5_list(url: str, path: Path, wanted: str) -> dict[str, str]:
    """{name: md5} for the names on the server's list that begin with `wanted`; {} where there is no list."""
    if not path.exists():
        part = add_part_suffix(path)
        try:
            with Progress("checksums: fetching") as progress:
                fill_part(url, part, looks_like_md5_list, progress.start, progress)
        except (MissingError, WrongContentError):
            return {}
        publish(part, path)
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = (MD5_LINE.fullmatch(line.strip()) for line in file)
        return {line[2]: line[1].lower() for line in lines if line and line[2].startswith(wanted)}


# ---------------------------------------------------------------------------------------------------------------
# Archives


def find_place(name: str, folder: str, source: str) -> str:
    """Where a member goes, relative to the folder of its set: "" for that folder itself.

    The boxes and the semantic archive wrap their scenes in a folder of their own name, the bus archive does not
    (A2D2 format notes, section 1). Raises DownloadError for every name that could lead elsewhere.
    """
    steps = [step for step in name.split("/") if step not in ("", ".")]
    if name.startswith("/") or ".." in steps or not all(SAFE_NAME.fullmatch(step) for step in steps):
        raise DownloadError(
            f"{source} holds {name!r}, a name that A2D2 does not use and that could lead out of {folder}: "
            "nothing of it was written; find out where it comes from"
        )
    return "/".join(steps[1:] if steps[:1] == [folder] else steps)


@dataclass(frozen=True)
class Member:
    """One file inside an archive."""

    place: str  # relative to the folder of the set
    offset: int  # of its first byte in the archive
    size: int


def name_kind(member: tarfile.TarInfo) -> str:
    """What a member is, for the message that refuses it; "" for a plain file or a folder."""
    if member.issym() or member.islnk():
        return f"a link to {member.linkname!r}"
    if member.isdev():
        return "a device or pipe"
    if member.issparse() or not (member.isreg() or member.isdir()):
        return f"a member of type {member.type!r}"
    return ""


def list_members(archive: Path, folder: str) -> list[Member]:
    """The files in an archive, each checked; the last one wins where two share a name.

    Reads headers only. Raises DownloadError for links, devices, names that lead elsewhere, for an archive that ends
    too early and for one without any scene.
    """
    members, end = {}, 0
    try:
        with tarfile.open(archive, "r:") as tar:
            while member := tar.next():
                # A negative size would send tarfile back to where it has been, for ever.
                if member.size < 0 or member.offset < end:
                    raise DownloadError(f"{archive} is broken at byte {member.offset}: remove it and run this again")
                if kind := name_kind(member):
                    raise DownloadError(
                        f"{archive} holds {member.name!r}, {kind}, which A2D2 does not use: nothing of it was written; "
                        "find out where it comes from"
                    )
                place = find_place(member.name, folder, str(archive))
                end = member.offset_data
                if member.isreg():
                    end += -(-member.size // BLOCK) * BLOCK
                    members[place] = Member(place, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise DownloadError(f"{archive} is no whole archive ({error}): remove it and run this again") from error
    # To tarfile, a header that it cannot read is the end. The real end is a block of zeros.
    with archive.open("rb") as file:
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise DownloadError(f"{archive} is cut off or broken at byte {end}: remove it and run this again")
    check_scenes(members, str(archive))
    return list(members.values())


def check_scenes(places: Iterable[str], source: str) -> None:
    """Raises DownloadError when none of the places lies in a scene's folder: then this is not A2D2."""
    if not any(SCENE.fullmatch(place.split("/")[0]) for place in places):
        raise DownloadError(f"{source} holds no folder named like a scene (20180807_145028), so it is not A2D2")


def write_marker(target: Path, source: str, sizes: list[int]) -> None:
    """Says that `target` holds all that `source` has: so many files, so many bytes."""
    write_json(target / MARKER, {"source": source, "members": len(sizes), "bytes": sum(sizes)})


def find_missing(target: Path, entries: list, label: str) -> list:
    """The entries (with `.place` and `.size`) that are not yet under `target`, if there is room for them."""
    missing = [entry for entry in entries if not has_size(target / entry.place, entry.size)]
    on_disk = sum(-(-entry.size // 4096) * 4096 for entry in missing)
    check_space(target, on_disk, label)
    return missing


def unpack(archive: Path, target: Path, label: str) -> None:
    """Unpacks an archive into the folder `target`; finishes an unpacking that was interrupted.

    Every member is checked before the first is written. A member that has the right size is not written again.
    """
    members = list_members(archive, target.name)
    target.mkdir(parents=True, exist_ok=True)
    missing = find_missing(target, members, f"to unpack {archive.name}")
    with archive.open("rb") as source, Progress(label) as progress:
        progress.start(0, sum(member.size for member in missing))
        for member in missing:
            source.seek(member.offset)
            write_member(source, member.size, target / member.place, progress)
    write_marker(target, archive.name, [member.size for member in members])


def write_member(source: BinaryIO, size: int, path: Path, progress: Progress) -> None:
    """Copies the next `size` bytes of `source` to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = add_part_suffix(path)
    with part.open("wb") as file:
        for begin in range(0, size, CHUNK):
            chunk = source.read(min(CHUNK, size - begin))
            file.write(chunk)
            progress.add(len(chunk))
    part.replace(path)


def fetch_archive(url: str, archive: Path, label: str) -> None:
    """Fetches an archive and its checksum. Raises MissingError where the server has none."""
    part = add_part_suffix(archive)
    listed = fetch_md5_list(f"{url}/Checksums.txt", archive.parent / "checksums_archives.txt", archive.name)
    with Progress(label) as progress:

        def admit(start: int, total: int) -> None:
            # What comes out of a tar needs the room of the tar once more.
            check_space(archive.parent, total - start + total, f"to fetch and unpack {archive.name}")
            progress.start(start, total)

        fill_part(f"{url}/{archive.name}", part, looks_like_tar, admit, progress)
    record_arrival(part, archive.name, archive.parent, listed.get(archive.name, ""))
    publish(part, archive)


# ---------------------------------------------------------------------------------------------------------------
# Single objects


@dataclass(frozen=True)
class StoredObject:
    """One file of a set in a bucket."""

    key: str
    place: str  # relative to the folder of the set
    size: int


def read_listing(url: str) -> bytes:
    """One page of a bucket's listing; one request."""
    with open_url(url) as response:
        try:
            return response.read()
        except (OSError, http.client.HTTPException) as error:
            raise InterruptedTransferError(f"the listing broke off ({error})") from error


def list_objects(url: str, folder: str, progress: Progress) -> list[StoredObject]:
    """All files of a set in a bucket, by S3's ListObjectsV2, a thousand a page.

    Raises MissingError, WrongContentError for a page that is no listing, and DownloadError.
    """
    query = {"list-type": "2", "prefix": f"{folder}/"}
    found = {}
    while True:
        address = f"{url}/?{urllib.parse.urlencode(query)}"
        page = retry(functools.partial(read_listing, address), address, progress)
        try:
            root = xml.etree.ElementTree.fromstring(page)
        except xml.etree.ElementTree.ParseError as error:
            raise WrongContentError(f"{address}: this is not a listing but {page[:60]!r}") from error
        for entry in root.iterfind("{*}Contents"):
            key = entry.findtext("{*}Key", "")
            # A key that ends in a slash is a folder that somebody made by hand.
            if not key.endswith("/"):
                place = find_place(key, folder, url)
                found[place] = StoredObject(key, place, int(entry.findtext("{*}Size", "")))
        if root.findtext("{*}IsTruncated") != "true":
            return list(found.values())
        token = root.findtext("{*}NextContinuationToken", "")
        if token in ("", query.get("continuation-token")):
            raise WrongContentError(f"{address}: the listing says that it goes on, but not where")
        query["continuation-token"] = token


def fetch_object(url: str, stored: StoredObject, target: Path, md5: str, progress: Progress) -> None:
    """Fetches one object to its place; `md5` is "" where the server lists none."""
    path = target / stored.place
    path.parent.mkdir(parents=True, exist_ok=True)
    part = add_part_suffix(path)
    address = f"{url}/{urllib.parse.quote(stored.key)}"

    def admit(_start: int, total: int) -> None:
        if total != stored.size:
            raise WrongContentError(f"{address}: {total} bytes, but the listing says {stored.size}: run this again")

    fill_part(address, part, lambda head: True, admit, progress)
    if md5 and hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest() != md5:
        part.unlink()
        raise DownloadError(f"{address}: its md5 is not the one on the server's list: run this again")
    part.replace(path)


def sync_objects(url: str, target: Path, archives: Path, label: str) -> None:
    """Fetches what is missing of a set, object by object. Raises MissingError where the bucket has none of it."""
    with Progress(label) as progress:
        entries = list_objects(url, target.name, progress)
        if not entries:
            raise MissingError(f"{url} lists nothing under {target.name}/")
        check_scenes([entry.place for entry in entries], f"{url}/{target.name}/")
        target.mkdir(parents=True, exist_ok=True)
        missing = find_missing(target, entries, f"to fetch {target.name}")
        listed = fetch_md5_list(f"{url}/CHECKSUMS.txt", archives / "checksums_objects.txt", target.name)
        progress.start(0, sum(entry.size for entry in missing))
        fetch_objects(url, missing, target, listed, progress)
    write_marker(target, f"{url}/{target.name}/", [entry.size for entry in entries])


def fetch_objects(
    url: str, missing: list[StoredObject], target: Path, listed: dict[str, str], progress: Progress
) -> None:
    """Fetches objects on several threads; the first error stops them all."""
    waiting = queue.SimpleQueue()
    for entry in missing:
        waiting.put(entry)

    def work() -> None:
        while True:
            try:
                entry = waiting.get_nowait()
            except queue.Empty:
                return
            fetch_object(url, entry, target, listed.get(entry.key, ""), progress)

    with ThreadPoolExecutor(OBJECT_THREADS) as threads:
        try:
            for worker in as_completed([threads.submit(work) for _ in range(OBJECT_THREADS)]):
                worker.result()
        except BaseException:
            progress.stop.set()
            raise


# ---------------------------------------------------------------------------------------------------------------
# Parts


@dataclass(frozen=True)
class Order:
    """What the user asked for."""

    into: Path
    archives_url: str
    objects_url: str
    delete_archives: bool

    @property
    def archives(self) -> Path:
        """Where archives wait, and the checksums of all that arrived."""
        return self.into / "archives"


def get_set(name: str, order: Order) -> None:
    """Brings one set into its folder: fetches its archive and unpacks it, or syncs its objects."""
    target = order.into / SETS[name]
    archive = order.archives / f"{SETS[name]}.tar"
    if not (target / MARKER).exists():
        try:
            if not archive.exists():
                fetch_archive(order.archives_url, archive, f"{name}: fetching")
        except MissingError as error:
            print(f"get_data.sh: {error}; trying single objects from {order.objects_url}", file=sys.stderr)
            sync_or_explain(order, target, error, f"{name}: fetching objects")
        else:
            if archive.name not in read_records(order.archives):
                record_arrival(archive, archive.name, order.archives, "")
            unpack(archive, target, f"{name}: unpacking")
    if order.delete_archives:
        archive.unlink(missing_ok=True)
    print(f"{name}: {json.loads((target / MARKER).read_text())['members']} files in {target}")


def sync_or_explain(order: Order, target: Path, no_archive: MissingError, label: str) -> None:
    """Syncs the objects of a set; where these are missing too, says both."""
    try:
        sync_objects(order.objects_url, target, order.archives, label)
    except MissingError as no_objects:
        raise DownloadError(
            f"{no_archive}; {no_objects}: set A2D2_URL or A2D2_OBJECTS_URL to a place that has {target.name}"
        ) from no_objects


def get_calibration(order: Order) -> None:
    """Brings cams_lidars.json into the root, from either location or from the boxes set."""
    target = order.into / CALIBRATION
    if not target.exists():
        part = order.archives / f"{CALIBRATION}.part"
        fetch_calibration(order, part)
        check_json(part)
        record_arrival(part, CALIBRATION, order.archives, "")
        publish(part, target)
    print(f"calibration: {target}")


def fetch_calibration(order: Order, part: Path) -> None:
    """Fills `part` with cams_lidars.json. Raises MissingError where none of the three places has it."""
    with Progress("calibration: fetching") as progress:
        for url in (order.archives_url, order.objects_url):
            try:
                fill_part(f"{url}/{CALIBRATION}", part, looks_like_json, progress.start, progress)
                return
            except MissingError as error:
                missing = error
    copy = order.into / SETS["boxes"] / CALIBRATION
    if not copy.exists():
        raise missing
    shutil.copyfile(copy, part)


def check_json(path: Path) -> None:
    """Removes a file that is no JSON, and raises DownloadError."""
    try:
        json.loads(path.read_text())
    except ValueError as error:
        path.unlink()
        raise DownloadError(f"{CALIBRATION}: what arrived is no JSON ({error}): run this again") from error


def verify_part(name: str, order: Order) -> list[str]:
    """Checks one part against what was recorded; returns a line for each finding, those that fail begin with "!"."""
    target = order.into / SETS.get(name, CALIBRATION)
    file = order.archives / f"{SETS[name]}.tar" if name in SETS else target
    findings = []
    if file.exists():
        record = read_records(order.archives).get(file.name, {})
        sha256 = compute_digests(file, ("sha256",), f"{name}: checking")["sha256"]
        if not record:
            findings.append(f"! {file} has no recorded checksum: run this without --verify first")
        elif sha256 != record["sha256"]:
            findings.append(f"! {file} has changed: sha256 {sha256}, recorded {record['sha256']}: remove it, run again")
        else:
            findings.append(f"{file} is as it arrived: sha256 {sha256}")
    if name in SETS and target.exists():
        findings.append(verify_folder(target))
    return findings or [f"! nothing of {name} is in {order.into}"]


def verify_folder(target: Path) -> str:
    """Compares the files in an unpacked set with its marker, by number and size."""
    if not (target / MARKER).exists():
        return f"! {target} is not finished: run this without --verify"
    expected = json.loads((target / MARKER).read_text())
    sizes = [path.stat().st_size for path in target.rglob("*") if path.is_file() and path.name != MARKER]
    found = f"{len(sizes)} files of {sum(sizes)} bytes"
    if len(sizes) < expected["members"] or sum(sizes) < expected["bytes"]:
        return (
            f"! {target} has {found}, not {expected['members']} of {expected['bytes']}: "
            f"remove {target / MARKER} and run this without --verify"
        )
    return f"{target} is whole: {found}"


def verify(parts: tuple[str, ...], order: Order) -> int:
    """Prints the findings for each part; returns 1 if one of them fails, else 0."""
    findings = [finding for name in parts for finding in verify_part(name, order)]
    print("\n".join(findings))
    return int(any(finding.startswith("!") for finding in findings))


# ---------------------------------------------------------------------------------------------------------------
# The command


def read_url(variable: str, default: str, parser: argparse.ArgumentParser) -> str:
    """A base URL from the environment, without a slash at its end."""
    url = os.environ.get(variable) or default
    if not re.match(r"https?://[^/]", url):
        parser.error(f"{variable} is {url!r}, but it must begin with http:// or https://")
    return url.rstrip("/")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line, checked; wrong use ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="get_data.sh",
        description="Fetches A2D2 (licence CC BY-ND 4.0). Stop it and start it again at any time: it goes on.",
        epilog="A2D2_URL: where the archives are; A2D2_OBJECTS_URL: the bucket of single objects, used where they are "
        "not. Exit codes: 0 done, 1 an error, 2 wrong use, 75 stopped, run again to go on.",
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: {', '.join(DEFAULT_PARTS)})"
    )
    parser.add_argument(
        "--into",
        type=Path,
        default=Path(__file__).resolve().parent.parent / "Datasets",
        help="the folder for all parts (default: Datasets in this repository)",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--verify", action="store_true", help="fetch nothing, check what is here (default: all parts)")
    action.add_argument("--delete-archives", action="store_true", help="remove each archive once it is unpacked")
    options = parser.parse_args(arguments)
    for name in options.parts:
        if name not in PARTS:
            close = difflib.get_close_matches(name, PARTS, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            parser.error(f"there is no part {name!r} among {', '.join(PARTS)}{hint}")
    options.archives_url = read_url("A2D2_URL", ARCHIVES_URL, parser)
    options.objects_url = read_url("A2D2_OBJECTS_URL", OBJECTS_URL, parser)
    return options


def find_present_parts(into: Path) -> tuple[str, ...]:
    """The parts of which anything is here."""
    present = {folder.name for folder in into.glob("*")} | {file.stem for file in into.glob("archives/*.tar")}
    return tuple(name for name in PARTS if SETS.get(name, CALIBRATION) in present)


def get_parts(parts: tuple[str, ...], order: Order) -> None:
    """Brings all parts, one after the other, each in its place."""
    order.archives.mkdir(parents=True, exist_ok=True)
    lock = hold_folder(order.archives)
    try:
        for name in parts:
            if name in SETS:
                get_set(name, order)
            else:
                get_calibration(order)
    finally:
        os.close(lock)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code (0, 1, or 75 when it was stopped and can go on)."""
    options = parse_arguments(arguments)
    order = Order(options.into, options.archives_url, options.objects_url, options.delete_archives)
    try:
        if options.verify:
            return verify(tuple(options.parts) or find_present_parts(order.into) or PARTS, order)
        get_parts(tuple(dict.fromkeys(options.parts)) or DEFAULT_PARTS, order)
    except DownloadError as error:
        print(f"get_data.sh: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"get_data.sh: {error}; what has arrived in {order.into} is kept, run this again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nget_data.sh: stopped; what has arrived is kept, run the same command to go on", file=sys.stderr)
        return 75
    return 0


def stop_on_signal(_number: int, _frame: object) -> None:
    """Makes a polite kill end like Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop_on_signal)
    sys.exit(main(sys.argv[1:]))
