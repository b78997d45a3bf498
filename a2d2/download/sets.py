"""The sets and their folders: which there are, which file belongs where, and what says that one is complete."""

import re
from collections.abc import Iterable
from pathlib import Path

from a2d2.download.errors import DownloadError
from a2d2.download.files import check_space, has_size, write_json

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
SAFE_NAME = re.compile(r"[A-Za-z0-9 ._()+-]+")
SCENE = re.compile(r"\d{8}_\d{6}")


def find_place(name: str, folder: str, source: str) -> str:
    """Where a member goes, relative to the folder of its set: "" for that folder itself.

    The boxes and the semantic archive wrap their scenes in a folder of their own name, the bus archive does not
    (docs/a2d2-format.md, section 1). Raises DownloadError for every name that could lead elsewhere.
    """
    steps = [step for step in name.split("/") if step not in ("", ".")]
    if name.startswith("/") or ".." in steps or not all(SAFE_NAME.fullmatch(step) for step in steps):
        raise DownloadError(
            f"{source} holds {name!r}, a name that A2D2 does not use and that could lead out of {folder}: "
            "nothing of it was written; find out where it comes from"
        )
    return "/".join(steps[1:] if steps[:1] == [folder] else steps)


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
