"""The parts that a user can ask for: fetched into their folders, or verified there."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from a2d2.download.archives import fetch_archive, unpack
from a2d2.download.checksums import read_records, record_checksum
from a2d2.download.errors import DownloadError, MissingError
from a2d2.download.files import compute_digests, lock_folder, publish
from a2d2.download.objects import sync_objects
from a2d2.download.progress import Progress
from a2d2.download.sets import CALIBRATION, MARKER, PARTS, SETS
from a2d2.download.transfer import fill_part, looks_like_json


@dataclass(frozen=True)
class Settings:
    """What the command line and the environment set."""

    into: Path
    archives_url: str
    objects_url: str
    delete_archives: bool

    @property
    def archives(self) -> Path:
        """Folder of the archives and of the recorded checksums."""
        return self.into / "archives"


def get_set(name: str, settings: Settings) -> None:
    """Fetches one set into its folder: its archive, which it unpacks, or its single objects."""
    target = settings.into / SETS[name]
    archive = settings.archives / f"{SETS[name]}.tar"
    if not (target / MARKER).exists():
        try:
            if not archive.exists():
                fetch_archive(settings.archives_url, archive, f"{name}: fetching")
        except MissingError as error:
            print(f"get_data.sh: {error}; trying single objects from {settings.objects_url}", file=sys.stderr)
            sync_or_explain(settings, target, error, f"{name}: fetching objects")
        else:
            if archive.name not in read_records(settings.archives):
                record_checksum(archive, archive.name, settings.archives, "")
            unpack(archive, target, f"{name}: unpacking")
    if settings.delete_archives:
        archive.unlink(missing_ok=True)
    print(f"{name}: {json.loads((target / MARKER).read_text(encoding='utf-8'))['members']} files in {target}")


def sync_or_explain(settings: Settings, target: Path, no_archive: MissingError, label: str) -> None:
    """Fetches the objects of a set; if these are missing too, raises DownloadError with both reasons."""
    try:
        sync_objects(settings.objects_url, target, settings.archives, label)
    except MissingError as no_objects:
        raise DownloadError(
            f"{no_archive}; {no_objects}: set A2D2_URL or A2D2_OBJECTS_URL to a server that has {target.name}"
        ) from no_objects


def get_calibration(settings: Settings) -> None:
    """Fetches cams_lidars.json from one of the two servers, or copies it from the boxes set."""
    target = settings.into / CALIBRATION
    if not target.exists():
        part = settings.archives / f"{CALIBRATION}.part"
        fetch_calibration(settings, part)
        check_json(part)
        record_checksum(part, CALIBRATION, settings.archives, "")
        publish(part, target)
    print(f"calibration: {target}")


def fetch_calibration(settings: Settings, part: Path) -> None:
    """Writes cams_lidars.json to `part`. Raises MissingError if neither the servers nor the boxes set have it."""
    with Progress("calibration: fetching") as progress:
        for url in (settings.archives_url, settings.objects_url):
            try:
                fill_part(f"{url}/{CALIBRATION}", part, looks_like_json, progress.start, progress)
                return
            except MissingError as error:
                missing = error
    copy = settings.into / SETS["boxes"] / CALIBRATION
    if not copy.exists():
        raise missing
    shutil.copyfile(copy, part)


def check_json(path: Path) -> None:
    """Removes a file that is no JSON, and raises DownloadError for it."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        path.unlink()
        raise DownloadError(f"{CALIBRATION}: the downloaded file is no JSON ({error}): run this again") from error


def verify_part(name: str, settings: Settings) -> list[str]:
    """Compares one part with its records; returns one line for each finding, with a leading "!" if it is an error."""
    target = settings.into / SETS.get(name, CALIBRATION)
    file = settings.archives / f"{SETS[name]}.tar" if name in SETS else target
    findings = []
    if file.exists():
        record = read_records(settings.archives).get(file.name, {})
        sha256 = compute_digests(file, ("sha256",), f"{name}: checking")["sha256"]
        if not record:
            findings.append(f"! {file} has no recorded checksum: run this without --verify first")
        elif sha256 != record["sha256"]:
            findings.append(f"! {file} has changed: sha256 {sha256}, recorded {record['sha256']}: remove it, run again")
        else:
            findings.append(f"{file} is unchanged: sha256 {sha256}")
    if name in SETS and target.exists():
        findings.append(verify_folder(target))
    return findings or [f"! {settings.into} has no file of {name}"]


def verify_folder(target: Path) -> str:
    """Compares the number and the size of the files in an unpacked set with its marker; returns a finding."""
    if not (target / MARKER).exists():
        return f"! {target} is incomplete: run this without --verify"
    expected = json.loads((target / MARKER).read_text(encoding="utf-8"))
    sizes = [path.stat().st_size for path in target.rglob("*") if path.is_file() and path.name != MARKER]
    found = f"{len(sizes)} files of {sum(sizes)} bytes"
    if len(sizes) < expected["members"] or sum(sizes) < expected["bytes"]:
        return (
            f"! {target} has {found}, not {expected['members']} of {expected['bytes']}: "
            f"remove {target / MARKER} and run this without --verify"
        )
    return f"{target} is complete: {found}"


def verify(parts: tuple[str, ...], settings: Settings) -> int:
    """Prints the findings of each part; returns 1 if one of them is an error, else 0."""
    findings = [finding for name in parts for finding in verify_part(name, settings)]
    print("\n".join(findings))
    return int(any(finding.startswith("!") for finding in findings))


def find_present_parts(into: Path) -> tuple[str, ...]:
    """The parts of which some file exists under `into`."""
    present = {folder.name for folder in into.glob("*")} | {file.stem for file in into.glob("archives/*.tar")}
    return tuple(name for name in PARTS if SETS.get(name, CALIBRATION) in present)


def get_parts(parts: tuple[str, ...], settings: Settings) -> None:
    """Fetches all parts, one after the other."""
    settings.archives.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(settings.archives)
    try:
        for name in parts:
            if name in SETS:
                get_set(name, settings)
            else:
                get_calibration(settings)
    finally:
        os.close(lock)
