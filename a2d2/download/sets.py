"""The sets of A2D2: their folders, the paths of their files, and the marker of a complete set."""

import re
from collections.abc import Iterable
from pathlib import Path

from a2d2.download.errors import DownloadError
from a2d2.download.files import check_space, has_size, write_json

# Part -> its folder under Datasets/; this is also the archive's name without .tar and the prefix of the objects' keys.
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


def find_relative_path(name: str, folder: str, source: str) -> str:
    """The path of a member relative to the folder of its set; "" for that folder itself.

    The boxes and the semantic archive have a top-level folder with the name of the set, the bus archive does not
    (docs/a2d2-format.md, section 1). Raises DownloadError for every name that could lead out of the folder.
    """
    steps = [step for step in name.split("/") if step not in ("", ".")]
    if name.startswith("/") or ".." in steps or not all(SAFE_NAME.fullmatch(step) for step in steps):
        raise DownloadError(
            f"{source} contains {name!r}, a name that A2D2 does not use and that could lead out of {folder}: "
            "nothing was written; find out where the archive comes from"
        )
    return "/".join(steps[1:] if steps[:1] == [folder] else steps)


def check_scenes(paths: Iterable[str], source: str) -> None:
    """Raises DownloadError if none of the paths is in the folder of a scene, because `source` is then not A2D2."""
    if not any(SCENE.fullmatch(path.split("/")[0]) for path in paths):
        raise DownloadError(f"{source} contains no folder named like a scene (20180807_145028), so it is not A2D2")


def write_marker(target: Path, source: str, sizes: list[int]) -> None:
    """Marks `target` as complete, and records the number of its files and bytes."""
    write_json(target / MARKER, {"source": source, "members": len(sizes), "bytes": sum(sizes)})


def find_missing(target: Path, entries: list, label: str) -> list:
    """The entries (with `.path` and `.size`) that are not yet under `target`.

    Raises DownloadError, with the purpose `label`, if the disk has too little space for them.
    """
    missing = [entry for entry in entries if not has_size(target / entry.path, entry.size)]
    on_disk = sum(-(-entry.size // 4096) * 4096 for entry in missing)
    check_space(target, on_disk, label)
    return missing
