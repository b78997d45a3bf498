"""A raw dataset on disk: its listing, and the units that a pool of workers reads."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from a2d2.calibration import Camera, load_calibration
from a2d2.checks.facts import BusFacts, FrameFacts, read_bus_scene, read_frame
from a2d2.frames import RAW_KINDS, Frame, bus_path, find_bus_root, find_calibration, index_frames, list_scenes


@dataclass(frozen=True)
class RawSet:
    """A raw dataset whose files are listed but not read. `kind`: "boxes" or "semantic"; `index`: frame -> kinds of its
    files; `cameras`: empty if the calibration cannot be read; `calibration_error`: the reason, else ""; `every`: one
    frame in so many is read."""

    root: Path
    kind: str
    index: dict[Frame, frozenset[str]]
    cameras: dict[str, Camera]
    calibration_error: str
    bus_root: Path | None
    every: int = 1

    def list_units(self) -> list:
        """The units of work: names of scenes with a bus file, which take longest, then (frame, kinds of its files)."""
        frames = list(self.index.items())[:: self.every]
        return [*self.list_bus_scenes(), *frames]

    def list_bus_scenes(self) -> list[str]:
        if self.bus_root is None:
            return []
        return [scene for scene in list_scenes(self.bus_root) if bus_path(self.bus_root, scene).is_file()]


def open_set(root: Path, calibration: Path | None = None, bus_root: Path | None = None, every: int = 1) -> RawSet:
    """List a raw dataset. `calibration` and `bus_root` are by default searched in the usual folders."""
    root = Path(root)
    index = index_frames(root, RAW_KINDS)
    has_boxes = any("label3D" in kinds for kinds in index.values()) or root.resolve().name.endswith("bboxes")
    cameras, error = {}, ""
    try:
        cameras = load_calibration(calibration or find_calibration(root)).cameras
    except (OSError, ValueError) as problem:
        error = str(problem)
    return RawSet(
        root, "boxes" if has_boxes else "semantic", index, cameras, error, bus_root or find_bus_root(root), every
    )


def read_unit(
    unit: str | tuple, cameras: dict[str, Camera], bus_root: Path | None, decode_pictures: bool
) -> FrameFacts | BusFacts:
    """Read one unit of `RawSet.list_units`; runs on a worker."""
    if isinstance(unit, str):
        return read_bus_scene(unit, bus_root)
    return read_frame(*unit, cameras, decode_pictures)


def bind_reader(raw: RawSet, decode_pictures: bool) -> partial:
    """The function that a pool calls with each unit of this dataset."""
    return partial(read_unit, cameras=raw.cameras, bus_root=raw.bus_root, decode_pictures=decode_pictures)


def mark_damaged(unit: str | tuple, reason: str) -> FrameFacts | BusFacts:
    """The facts of a unit that could not be read because its worker died: all its files count as damaged."""
    if isinstance(unit, str):
        return BusFacts(unit, damaged=reason)
    return FrameFacts(unit[0], damaged=dict.fromkeys(unit[1], reason))


def count_files(raw: RawSet) -> dict[tuple[str, str], Counter]:
    """(scene, view) -> kind -> number of files, sorted."""
    counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for frame, kinds in raw.index.items():
        counts[frame.scene, frame.view].update(kinds)
    return dict(sorted(counts.items()))


def list_damaged(raw: RawSet, frames: list[FrameFacts], buses: list[BusFacts]) -> list[dict[str, str]]:
    """{"file", "reason"} of each damaged file, sorted; a bus file has one row for each damaged item."""
    rows = [
        {"file": str(facts.frame.path(kind)), "reason": reason}
        for facts in frames
        for kind, reason in facts.damaged.items()
    ]
    for facts in buses:
        path = str(bus_path(raw.bus_root, facts.scene))
        if facts.damaged:
            rows.append({"file": path, "reason": facts.damaged})
        rows += [{"file": path, "reason": f"{name}: {reason}"} for name, reason in facts.damaged_items.items()]
    return sorted(rows, key=lambda row: (row["file"], row["reason"]))
