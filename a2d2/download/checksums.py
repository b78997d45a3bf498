"""Checksums: the server's lists, and a record of the checksums at the first download."""

import json
from pathlib import Path

from a2d2.download.errors import DownloadError, MissingError, WrongContentError
from a2d2.download.files import add_part_suffix, compute_digests, publish, write_json
from a2d2.download.progress import Progress
from a2d2.download.transfer import MD5_LINE, fill_part, looks_like_md5_list


def read_records(archives: Path) -> dict[str, dict]:
    """{file name: {"size": bytes, "sha256": hex}} at the first download; {} before the first one."""
    path = archives / "checksums.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record_checksum(path: Path, name: str, archives: Path, md5: str) -> None:
    """Hashes a downloaded file, compares it with the server's list and with the first download, and records it.

    `md5` is the server's value, "" if it has none. Raises DownloadError if one of the two differs; a file with another
    md5 than the server's is removed.
    """
    digests = compute_digests(path, ("sha256", "md5") if md5 else ("sha256",), f"{name}: checking")
    if md5 and digests["md5"] != md5:
        path.unlink()
        raise DownloadError(
            f"{name} has the md5 {digests['md5']}, the server's list has {md5}: it was removed, run this again"
        )
    records = read_records(archives)
    found = {"size": path.stat().st_size, "sha256": digests["sha256"]}
    if records.setdefault(name, found) != found:
        raise DownloadError(
            f"{name} has the sha256 {digests['sha256']}, the file that arrived first had {records[name]['sha256']}: if "
            f"it was replaced on the server, remove its entry from {archives / 'checksums.json'}; if not, remove {path}"
        )
    write_json(archives / "checksums.json", records)


def fetch_md5_list(url: str, path: Path, wanted: str) -> dict[str, str]:
    """{name: md5} for the names on the server's list that begin with `wanted`; {} if the server has no list."""
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
