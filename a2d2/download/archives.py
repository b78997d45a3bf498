"""Fetches archives, checks every member, then unpacks them."""

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from a2d2.download.checksums import fetch_md5_list, record_checksum
from a2d2.download.errors import DownloadError
from a2d2.download.files import CHUNK, add_part_suffix, check_space, publish
from a2d2.download.progress import Progress
from a2d2.download.sets import check_scenes, find_missing, find_relative_path, write_marker
from a2d2.download.transfer import BLOCK, fill_part, looks_like_tar


@dataclass(frozen=True)
class Member:
    """One file inside an archive."""

    path: str  # relative to the folder of the set
    offset: int  # of its first byte in the archive
    size: int


def describe_forbidden(member: tarfile.TarInfo) -> str:
    """The type of a member that is refused, for the error message; "" for a plain file or a folder."""
    if member.issym() or member.islnk():
        return f"a link to {member.linkname!r}"
    if member.isdev():
        return "a device or pipe"
    if member.issparse() or not (member.isreg() or member.isdir()):
        return f"a member of type {member.type!r}"
    return ""


def list_members(archive: Path, folder: str) -> list[Member]:
    """The files in an archive, each checked; of two files with the same name, the last one counts.

    Reads headers only. Raises DownloadError for links, devices, names that lead out of the folder, for a truncated
    archive, and for an archive without any scene.
    """
    members, end = {}, 0
    try:
        with tarfile.open(archive, "r:") as tar:
            while member := tar.next():
                # A negative size would move tarfile back to an earlier header, in an endless loop.
                if member.size < 0 or member.offset < end:
                    raise DownloadError(f"{archive} is broken at byte {member.offset}: remove it and run this again")
                if kind := describe_forbidden(member):
                    raise DownloadError(
                        f"{archive} contains {member.name!r}, {kind}, which A2D2 does not use: nothing was unpacked; "
                        "find out where the archive comes from"
                    )
                path = find_relative_path(member.name, folder, str(archive))
                end = member.offset_data
                if member.isreg():
                    end += -(-member.size // BLOCK) * BLOCK
                    members[path] = Member(path, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise DownloadError(f"{archive} is no complete archive ({error}): remove it and run this again") from error
    # tarfile treats a header that it cannot read as the end of the archive. The real end is a block of zeros.
    with archive.open("rb") as file:
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise DownloadError(f"{archive} is cut off or broken at byte {end}: remove it and run this again")
    check_scenes(members, str(archive))
    return list(members.values())


def unpack(archive: Path, target: Path, label: str) -> None:
    """Unpacks an archive into the folder `target`, or resumes an unpacking that was interrupted.

    Every member is checked before the first is written. Files that exist with the right size are not written again.
    """
    members = list_members(archive, target.name)
    target.mkdir(parents=True, exist_ok=True)
    missing = find_missing(target, members, f"to unpack {archive.name}")
    with archive.open("rb") as source, Progress(label) as progress:
        progress.start(0, sum(member.size for member in missing))
        for member in missing:
            source.seek(member.offset)
            write_member(source, member.size, target / member.path, progress)
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
    """Fetches an archive and its checksum. Raises MissingError if the server does not have the archive."""
    part = add_part_suffix(archive)
    listed = fetch_md5_list(f"{url}/Checksums.txt", archive.parent / "checksums_archives.txt", archive.name)
    with Progress(label) as progress:

        def on_start(start: int, total: int) -> None:
            # The unpacked files need as much space as the archive.
            check_space(archive.parent, total - start + total, f"to fetch and unpack {archive.name}")
            progress.start(start, total)

        fill_part(f"{url}/{archive.name}", part, looks_like_tar, on_start, progress)
    record_checksum(part, archive.name, archive.parent, listed.get(archive.name, ""))
    publish(part, archive)
