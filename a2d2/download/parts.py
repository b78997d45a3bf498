"""The parts that a user can ask for: brought into their folders, or verified there."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from a2d2.download.archives import fetch_archive, unpack
from a2d2.download.checksums import read_records, record_arrival
from a2d2.download.errors import DownloadError, MissingError
from a2d2.download.files import compute_digests, hold_folder, publish
from a2d2.download.objects import sync_objects
from a2d2.download.progress import Progress
from a2d2.download.sets import CALIBRATION, MARKER, PARTS, SETS
from a2d2.download.transfer import fill_part, looks_like_json


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
