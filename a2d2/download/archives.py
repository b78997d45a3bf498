"""Archives: fetched, every member checked, then unpacked."""

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from a2d2.download.checksums import fetch_md5_list, record_arrival
from a2d2.download.errors import DownloadError
from a2d2.download.files import CHUNK, add_part_suffix, check_space, publish
from a2d2.download.progress import Progress
from a2d2.download.sets import check_scenes, find_missing, find_place, write_marker
from a2d2.download.transfer import BLOCK, fill_part, looks_like_tar


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
