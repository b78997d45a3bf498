"""Fetches the single objects of a bucket, for sets whose archives are gone."""

import functools
import hashlib
import http.client
import queue
import urllib.error
import urllib.parse
import urllib.request
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from a2d2.download.checksums import fetch_md5_list
from a2d2.download.errors import DownloadError, InterruptedTransferError, MissingError, WrongContentError
from a2d2.download.files import add_part_suffix
from a2d2.download.progress import Progress
from a2d2.download.sets import check_scenes, find_missing, find_relative_path, write_marker
from a2d2.download.transfer import fill_part, open_url, retry

OBJECT_THREADS = 8


@dataclass(frozen=True)
class StoredObject:
    """One file of a set in a bucket."""

    key: str
    path: str  # relative to the folder of the set
    size: int


def read_listing(url: str) -> bytes:
    """One page of a bucket's listing; one request."""
    with open_url(url) as response:
        try:
            return response.read()
        except (OSError, http.client.HTTPException) as error:
            raise InterruptedTransferError(f"the connection broke within the listing ({error})") from error


def list_objects(url: str, folder: str, progress: Progress) -> list[StoredObject]:
    """All files of a set in a bucket, by S3's ListObjectsV2 with 1000 files a page.

    Raises MissingError, WrongContentError for a page that is no listing, and DownloadError for other errors.
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
            # A key that ends in a slash is a folder that was created by hand.
            if not key.endswith("/"):
                path = find_relative_path(key, folder, url)
                found[path] = StoredObject(key, path, int(entry.findtext("{*}Size", "")))
        if root.findtext("{*}IsTruncated") != "true":
            return list(found.values())
        token = root.findtext("{*}NextContinuationToken", "")
        if token in ("", query.get("continuation-token")):
            raise WrongContentError(f"{address}: the listing is truncated, but has no token for the next page")
        query["continuation-token"] = token


def fetch_object(url: str, stored: StoredObject, target: Path, md5: str, progress: Progress) -> None:
    """Fetches one object into the folder `target`; `md5` is "" if the server lists none."""
    path = target / stored.path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = add_part_suffix(path)
    address = f"{url}/{urllib.parse.quote(stored.key)}"

    def on_start(_start: int, total: int) -> None:
        if total != stored.size:
            raise WrongContentError(f"{address}: {total} bytes, but {stored.size} in the listing: run this again")

    fill_part(address, part, lambda head: True, on_start, progress)
    if md5 and hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest() != md5:
        part.unlink()
        raise DownloadError(f"{address}: its md5 is not the one on the server's list: run this again")
    part.replace(path)


def sync_objects(url: str, target: Path, archives: Path, label: str) -> None:
    """Fetches the missing files of a set, object by object. Raises MissingError if the bucket lists no file."""
    with Progress(label) as progress:
        entries = list_objects(url, target.name, progress)
        if not entries:
            raise MissingError(f"{url} lists nothing under {target.name}/")
        check_scenes([entry.path for entry in entries], f"{url}/{target.name}/")
        target.mkdir(parents=True, exist_ok=True)
        missing = find_missing(target, entries, f"to fetch {target.name}")
        listed = fetch_md5_list(f"{url}/CHECKSUMS.txt", archives / "checksums_objects.txt", target.name)
        progress.start(0, sum(entry.size for entry in missing))
        fetch_objects(url, missing, target, listed, progress)
    write_marker(target, f"{url}/{target.name}/", [entry.size for entry in entries])


def fetch_objects(
    url: str, missing: list[StoredObject], target: Path, listed: dict[str, str], progress: Progress
) -> None:
    """Fetches objects on several threads; the first error stops all of them."""
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
