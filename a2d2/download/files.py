"""Files on disk: atomic writes, checks of free space, checksums, and the lock of a folder."""

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

from a2d2.download.errors import DownloadError
from a2d2.download.progress import Progress, format_bytes

CHUNK = 1 << 20


def write_json(path: Path, content: dict) -> None:
    """Writes `content` to `path` atomically."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def add_part_suffix(path: Path) -> Path:
    """The temporary name of `path` while it is incomplete. It is always the same, so a rerun overwrites it."""
    return path.with_name(path.name + ".part")


def publish(part: Path, target: Path) -> None:
    """Renames a complete file to its final name, after its bytes have been flushed to the disk."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)


def has_size(path: Path, size: int) -> bool:
    """Whether `path` is a file of `size` bytes."""
    return path.is_file() and path.stat().st_size == size


def check_space(folder: Path, needed: int, purpose: str) -> None:
    """Raises DownloadError if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"{purpose}: {format_bytes(needed)} are needed in {folder}, {format_bytes(free)} are free: "
            "free some space, or choose another disk with --into"
        )


def compute_digests(path: Path, algorithms: tuple[str, ...], label: str) -> dict[str, str]:
    """{algorithm: hex digest} of a file, in one pass."""
    # Systems in FIPS mode refuse md5 without usedforsecurity=False.
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    with path.open("rb") as file, Progress(label) as progress:
        progress.start(0, path.stat().st_size)
        while chunk := file.read(CHUNK):
            for one in hashes.values():
                one.update(chunk)
            progress.add(len(chunk))
    return {name: one.hexdigest() for name, one in hashes.items()}


def lock_folder(folder: Path) -> int:
    """Locks a folder, so that two runs never write the same `.part`; returns the file descriptor to close at the end.

    Raises DownloadError if another run has locked it. On a file system without locks, the folder stays unlocked.
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
