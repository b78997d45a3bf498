"""Whether a raw set is what this project believes A2D2 to be: the assumptions, and a verdict on each.

The first-hour checks of the format notes, section 11, on whatever is there. A check says what was found and one of
three verdicts: "ok", "differs", or "not checkable" where the files it needs are not there. `preprocessing/check.py`
reads the files with `a2d2/check_facts.py` on a pool; known numbers are in `a2d2/check_known.py`, the table and the JSON
in `a2d2/check_report.py`.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

from a2d2 import bus
from a2d2.calibration import Camera, load_calibration, map_centres
from a2d2.check_facts import (
    PICTURE_TYPE,
    YAW_RATE,
    BoxFacts,
    BusFacts,
    FrameFacts,
    read_bus_scene,
    read_frame,
)
from a2d2.check_known import (
    BARE_SCENES,
    BOX_SCENES,
    BUS_SCENES,
    CAMERA_FOLDERS,
    FULL_SIZE,
    LABEL_SUMS,
    LARGEST_MAGNITUDE,
    LENS_POINTS,
    LIDAR_TYPES,
    MAIN_VIEW,
    MATCHED_FRAMES,
    REGRESSION,
    REGRESSION_CLASSES,
    REGRESSION_REMAINDER_NAME,
    REGRESSION_SCENE,
    SCENES,
    UNMAPPED,
    list_regression,
)  # fmt: skip
from a2d2.classes import COLOUR_NAMES, OBJECT_CLASSES, find_object_class
from a2d2.frames import RAW_KINDS, Frame, bus_path, find_bus_root, find_calibration, index_frames, list_scenes
from a2d2.splits import split_frames

OK, DIFFERS, NOT_CHECKABLE = "ok", "differs", "not checkable"

# how far off is "differs"; where the notes only say "about" or "well below", that is put in a number here
LENS_PIXELS = 1.0
GEOMETRY_PIXELS = 1.0
DEPTH_METRES = 1e-3
LIDAR_POINTS = (1e3, 1e5)
DUPLICATE_SHARE = 0.1
ANGLE_SAMPLES = (15, 30)
SENTINEL_SHARE = 0.1
MOST = 0.5  # of the files or frames
SAMPLE_WAIT_US = 100_000
FASTER_KMH = 10.0
LEAST_CORRELATION = 0.3
LEAST_TURNS = 10


@dataclass(frozen=True)
class Assumption:
    """`needed`: training depends on it, so a difference is an error. `source`: section of the format notes."""

    text: str
    source: str
    needed: bool = False


# Needed is what would make labels wrong without anybody noticing, or leave a task without any. What the scripts and
# the index handle frame by frame (missing and damaged files, duplicates, sentinels) is not.
ASSUMPTIONS = {
    "calibration": Assumption("cams_lidars.json can be read", "8", needed=True),
    "views": Assumption("the calibration has every camera that has frames", "8", needed=True),
    "lens": Assumption(f"the lens moves seven points as known, within {LENS_PIXELS:g} px", "8", needed=True),
    "colour_list": Assumption(f"class_list.json is the table of {len(COLOUR_NAMES)} colours", "5", needed=True),
    "scenes": Assumption("the scenes are A2D2's, and all are there", "2.2"),
    "frame_counts": Assumption("as many files in each scene as known", "2.2"),
    "complete_frames": Assumption("every frame has a file of every kind", "11.2"),
    "readable": Assumption("every file can be read", "10"),
    "frame_times": Assumption("every camera JSON has a cam_tstamp, and they rise with the id", "3"),
    "picture_type": Assumption("pictures are 8 bit RGB PNGs of the calibration's size", "5", needed=True),
    "colours": Assumption("every label pixel has a colour of the table", "5", needed=True),
    "lidar_mapped": Assumption("most npz have row, col and depth", "4", needed=True),
    "lidar_unmapped": Assumption("those without are the 15 that are known", "10"),
    "lidar_keys": Assumption("an npz has the nine known arrays", "4"),
    "lidar_types": Assumption("of the known types", "4"),
    "lidar_points": Assumption("a frame has in the order of 10,000 points", "4"),
    "lidar_finite": Assumption("every coordinate is a finite number", "4"),
    "lidar_range": Assumption("row and col lie in the picture, but for a pixel", "4"),
    "lidar_geometry": Assumption(
        f"row and col are the projected points, within {GEOMETRY_PIXELS:g} px", "4", needed=True
    ),
    "lidar_depth": Assumption(f"depth is x, within {DEPTH_METRES * 1000:g} mm", "4", needed=True),
    "lidar_distance": Assumption(f"distance is the points' norm, within {DEPTH_METRES * 1000:g} mm", "4"),
    "box_geometry": Assumption(
        f"2d_bbox is the hull of the projected corners, median within {GEOMETRY_PIXELS:g} px", "6.1", needed=True
    ),
    "box_classes": Assumption(f"every box is of one of the {len(OBJECT_CLASSES)} classes", "6.3", needed=True),
    "box_duplicates": Assumption(f"at most {DUPLICATE_SHARE:.0%} of the boxes are exact duplicates", "6.2"),
    "box_regression": Assumption(f"scene {REGRESSION_SCENE} has exactly the known boxes", "6.2"),
    "bus_scenes": Assumption("the scenes with bus signals are the 21 known ones, and all are there", "2.2"),
    "bus_items": Assumption("a scene has as many bus items as frames, or more", "7"),
    "bus_join": Assumption("most frames find their bus item by name", "7", needed=True),
    "bus_signals": Assumption("the angle and its sign are in most items", "7", needed=True),
    "bus_motion": Assumption("speed and yaw rate are in most items", "7"),
    "bus_samples": Assumption("about 21 samples of the angle an item, and as many signs", "7"),
    "bus_sentinels": Assumption(f"at most {SENTINEL_SHARE:.0%} of the angle's samples are 614.10 or 614.25", "7.1"),
    "bus_magnitudes": Assumption(
        f"the angle's magnitude is in 0..{LARGEST_MAGNITUDE:g} degrees, sign apart", "7.1", needed=True
    ),
    "bus_times": Assumption("an item's time is its frame's, and a sample is near", "7"),
    "bus_sign": Assumption(
        f"the signed angle goes with the yaw rate above {FASTER_KMH:g} km/h: r >= {LEAST_CORRELATION:g}",
        "7.1",
        needed=True,
    ),
}


@dataclass(frozen=True)
class Check:
    """One line of the table: what was found of an assumption; `details` go to the JSON."""

    name: str
    verdict: str
    found: str
    details: dict = field(default_factory=dict)

    @property
    def fails(self) -> bool:
        """Whether training must not be trusted with this set."""
        return self.verdict == DIFFERS and ASSUMPTIONS[self.name].needed


@dataclass(frozen=True)
class RawSet:
    """A raw root, listed but not read. `kind`: "boxes" or "semantic"; `cameras` is empty where the calibration cannot
    be read, and `calibration_error` says why; `every`: each that many-th frame is read."""

    root: Path
    kind: str
    index: dict[Frame, frozenset[str]]
    cameras: dict[str, Camera]
    calibration_error: str
    bus_root: Path | None
    every: int = 1

    def list_units(self) -> list:
        """What there is to read: names of scenes with a bus file (they take longest), then frames with their kinds."""
        frames = list(self.index.items())[:: self.every]
        return [*self.list_bus_scenes(), *frames]

    def list_bus_scenes(self) -> list[str]:
        if self.bus_root is None:
            return []
        return [scene for scene in list_scenes(self.bus_root) if bus_path(self.bus_root, scene).is_file()]


def open_set(root: Path, calibration: Path | None = None, bus_root: Path | None = None, every: int = 1) -> RawSet:
    """List a raw root; the files that belong to it are looked for where they usually lie unless they are named."""
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
    """On a worker: one unit of `RawSet.list_units`."""
    if isinstance(unit, str):
        return read_bus_scene(unit, bus_root)
    return read_frame(*unit, cameras, decode_pictures)


def bind_reader(raw: RawSet, decode_pictures: bool) -> partial:
    """What a pool calls with each unit of this set."""
    return partial(read_unit, cameras=raw.cameras, bus_root=raw.bus_root, decode_pictures=decode_pictures)


def blame_unit(unit: str | tuple, reason: str) -> FrameFacts | BusFacts:
    """The facts of a unit that was never read, because it took its worker with it."""
    if isinstance(unit, str):
        return BusFacts(unit, damaged=reason)
    return FrameFacts(unit[0], damaged=dict.fromkeys(unit[1], reason))


# ---------------------------------------------------------------- verdicts


def check_set(raw: RawSet, frames: list[FrameFacts], buses: list[BusFacts]) -> list[Check]:
    """All checks, in the order of ASSUMPTIONS. `frames`, `buses`: what reading the units gave, sorted."""
    checks = [
        *_check_calibration(raw),
        *_check_listing(raw),
        *_check_files(raw, frames, buses),
        _check_colours(frames),
        *_check_lidar(raw, frames),
        *_check_boxes(raw, frames),
        *_check_bus(raw, frames, buses),
    ]
    order = list(ASSUMPTIONS)
    return sorted(checks, key=lambda check: order.index(check.name))


def _judge(name: str, holds: bool, found: str, /, **details: object) -> Check:
    return Check(name, OK if holds else DIFFERS, found, details)


def _skip(name: str, reason: str, /, **details: object) -> Check:
    return Check(name, NOT_CHECKABLE, reason, details)


def _name_some(names: Iterable[object], limit: int = 3) -> str:
    names = [str(name) for name in names]
    rest = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _name_counts(counts: dict[str, int], limit: int = 5) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return _name_some((f"{name} {count:,}" for name, count in ordered), limit)


def _check_calibration(raw: RawSet) -> Iterator[Check]:
    yield _judge("calibration", not raw.calibration_error, raw.calibration_error or f"{len(raw.cameras)} cameras")
    views = sorted({frame.view for frame in raw.index})
    if raw.calibration_error:
        yield _skip("views", "no calibration")
    else:
        absent = [view for view in views if view not in raw.cameras]
        text = f"lacks {', '.join(absent)}" if absent else f"frames of {', '.join(views)}"
        yield _judge("views", not absent, text, absent=absent)
    yield _check_lens(raw)
    yield _check_colour_list(raw.root)


def _check_lens(raw: RawSet) -> Check:
    camera = raw.cameras.get(MAIN_VIEW)
    if camera is None:
        return _skip("lens", f"no calibration of {MAIN_VIEW}")
    recorded, known = (np.array(list(points), dtype=np.float64) for points in (LENS_POINTS, LENS_POINTS.values()))
    try:
        # the same lens over another number of pixels is the same lens
        found = camera.undistort(map_centres(recorded, FULL_SIZE, camera.recorded_size))
    except Exception as error:  # numbers that are no camera, whatever OpenCV makes of them
        return _judge("lens", False, f"the calibration of {MAIN_VIEW} cannot be used ({error})")
    error = float(np.abs(map_centres(found, camera.size, FULL_SIZE) - known).max())
    return _judge("lens", error <= LENS_PIXELS, f"off by up to {error:.2f} px", largest_px=error)


def _check_colour_list(root: Path) -> Check:
    path = next(
        (place / "class_list.json" for place in (root, root.parent) if (place / "class_list.json").is_file()), None
    )
    if path is None:
        return _skip("colour_list", "no class_list.json")
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        return _judge("colour_list", False, f"{path} is no JSON file of colours ({error})")
    other = sorted(key for key in found.keys() | COLOUR_NAMES.keys() if found.get(key) != COLOUR_NAMES.get(key))
    text = f"{len(found)} colours" + (f", {len(other)} otherwise: {_name_some(other)}" if other else "")
    return _judge("colour_list", not other, text, differing=other)


def _check_listing(raw: RawSet) -> Iterator[Check]:
    known = BOX_SCENES if raw.kind == "boxes" else SCENES
    yield _compare_scenes("scenes", {frame.scene for frame in raw.index}, known.keys())
    yield _check_box_counts(raw) if raw.kind == "boxes" else _check_label_sums(raw)
    yield _check_complete(raw)


def _compare_scenes(name: str, found: set[str], known: Iterable[str]) -> Check:
    known = set(known)
    absent, foreign = sorted(known - found), sorted(found - known)
    details = {"absent": absent, "foreign": foreign}
    if not found & known:
        return _skip(name, f"{len(found)} scenes, none of A2D2's", **details)
    text = f"{len(found & known)} of {len(known)} scenes"
    if foreign:
        return _judge(name, False, f"{text}, and {len(foreign)} that are not known: {_name_some(foreign)}", **details)
    if absent:
        return _skip(name, f"{text}; not here: {_name_some(absent, 20)}", **details)
    return _judge(name, True, text, **details)


def count_files(raw: RawSet) -> dict[tuple[str, str], Counter]:
    """(scene, view) -> kind -> number of files, sorted."""
    counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for frame, kinds in raw.index.items():
        counts[frame.scene, frame.view].update(kinds)
    return dict(sorted(counts.items()))


def _check_box_counts(raw: RawSet) -> Check:
    """A kind of which the set has no file at all was left out on purpose, and is not held against each scene."""
    counts = {scene: count for (scene, view), count in count_files(raw).items() if view == MAIN_VIEW}
    here = [scene for scene in BOX_SCENES if scene in counts]
    if not here:
        return _skip("frame_counts", "no scene whose number is known")
    kinds = [kind for kind in RAW_KINDS if any(kind in count for count in counts.values())]
    other = {
        scene: {"known": BOX_SCENES[scene]} | {kind: counts[scene][kind] for kind in kinds}
        for scene in here
        if any(counts[scene][kind] != BOX_SCENES[scene] for kind in kinds)
    }
    total = sum(BOX_SCENES[scene] for scene in here)
    text = f"{len(here) - len(other)} of {len(here)} scenes that are here have the known numbers ({total:,} frames)"
    if other:
        scene, numbers = next(iter(other.items()))
        shown = ", ".join(f"{kind} {number}" for kind, number in numbers.items() if kind != "known")
        text += f"; {scene} has {shown}, known: {numbers['known']}"
        text += f"; likewise {_name_some(list(other)[1:])}" if len(other) > 1 else ""
    return _judge("frame_counts", not other, text, scenes=other)


def _check_label_sums(raw: RawSet) -> Check:
    labels = [frame for frame, kinds in raw.index.items() if "label" in kinds]
    here = {frame.scene for frame in labels}
    parts = split_frames(labels, "paper") if here >= SCENES.keys() else {}
    found = {}
    for name, (scenes, part, known) in LABEL_SUMS.items():
        if here >= set(scenes):
            number = len(parts[part]) if part else sum(frame.scene in scenes for frame in labels)
            found[name] = {"found": number, "known": known}
    if parts:
        folders = len({(frame.scene, frame.view) for frame in labels})
        matched = sum({"camera", "camera_info", "label"} <= kinds for kinds in raw.index.values())
        found["cameras of all scenes"] = {"found": folders, "known": CAMERA_FOLDERS}
        found["with picture and camera JSON"] = {"found": matched, "known": MATCHED_FRAMES}
    if not found:
        return _skip("frame_counts", "no scenes whose number of labels is known")
    other = [name for name, row in found.items() if row["found"] != row["known"]]
    named = other or found
    text = _name_some(
        (f"{name}: {found[name]['found']:,} labels, known: {found[name]['known']:,}" for name in named), 6
    )
    return _judge("frame_counts", not other, text, sums=found)


def _list_expected_kinds(raw: RawSet, scene: str) -> set[str]:
    expected = set(RAW_KINDS)
    if raw.kind == "semantic":
        expected.discard("label3D")
    if scene in BARE_SCENES:
        expected -= {"lidar", "camera_info"}
    return expected


def _check_complete(raw: RawSet) -> Check:
    if not raw.index:
        return _skip("complete_frames", "no frames")
    missing: dict[str, list[str]] = {kind: [] for kind in RAW_KINDS}
    whole = 0
    for frame, kinds in raw.index.items():
        absent = _list_expected_kinds(raw, frame.scene) - kinds
        whole += not absent
        for kind in absent:
            missing[kind].append(str(frame))
    missing = {kind: names for kind, names in missing.items() if names}
    text = f"{whole:,} of {len(raw.index):,} frames"
    if missing:
        text += "; without " + "; without ".join(
            f"{kind}: {len(names):,} ({_name_some(names, 2)})" for kind, names in missing.items()
        )
    return _judge("complete_frames", not missing, text, without=missing)


def list_damaged(raw: RawSet, frames: list[FrameFacts], buses: list[BusFacts]) -> list[dict[str, str]]:
    """{"file", "reason"} of each damaged file, sorted; of a bus file with bad items, one row an item."""
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


def _check_files(raw: RawSet, frames: list[FrameFacts], buses: list[BusFacts]) -> Iterator[Check]:
    damaged = list_damaged(raw, frames, buses)
    read = sum(len(raw.index[facts.frame]) for facts in frames) + len(buses)
    text = f"{read:,} files read" + (f", of one frame in {raw.every}" if raw.every > 1 else "")
    if damaged:
        text += f"; {len(damaged):,} damaged: " + _name_some(dict.fromkeys(Path(row["file"]).name for row in damaged))
    yield _judge("readable", not damaged, text) if read else _skip("readable", "no files")
    yield _check_times(raw, frames)
    yield _check_pictures(raw, frames)


def _check_times(raw: RawSet, frames: list[FrameFacts]) -> Check:
    frames = [
        facts for facts in frames if "camera_info" in raw.index[facts.frame] and "camera_info" not in facts.damaged
    ]
    if not frames:
        return _skip("frame_times", "no camera JSON that can be read")
    lacking = [str(facts.frame) for facts in frames if facts.moment is None]
    known = [facts for facts in frames if facts.moment is not None]
    falling = [
        str(later.frame)
        for earlier, later in pairwise(known)
        if (earlier.frame.scene, earlier.frame.view) == (later.frame.scene, later.frame.view)
        and later.moment <= earlier.moment
    ]
    text = f"cam_tstamp in {len(known):,} of {len(frames):,}"
    text += f"; none in {_name_some(lacking)}" if lacking else ""
    text += f"; not later than the frame before: {_name_some(falling)}" if falling else ""
    return _judge("frame_times", not lacking and not falling, text, lacking=lacking, falling=falling)


def _check_pictures(raw: RawSet, frames: list[FrameFacts]) -> Check:
    types: Counter[str] = Counter()
    other = []
    for facts in frames:
        camera = raw.cameras.get(facts.frame.view)
        for kind, (width, height, *found) in facts.pictures.items():
            types[f"{width}x{height} {found[0]} bit {found[1]}"] += 1
            has_size = camera is None or (width, height) == camera.recorded_size
            if tuple(found) != PICTURE_TYPE or not has_size:
                other.append(facts.frame.path(kind).name)
    if not types:
        return _skip("picture_type", "no pictures that can be read")
    text = _name_counts(types) + (f"; other than it should be: {_name_some(other)}" if other else "")
    return _judge("picture_type", not other, text, types=dict(types), other=other)


def _check_colours(frames: list[FrameFacts]) -> Check:
    labels = [facts for facts in frames if facts.label]
    if not labels:
        return _skip("colours", "no labels that can be read")
    pixels, occurrences, foreign_colours = Counter(), Counter(), Counter()
    for facts in labels:
        pixels.update(facts.label.known)
        occurrences.update(facts.label.known.keys())
        foreign_colours.update(facts.label.foreign_colours)
    foreign = {str(facts.frame): facts.label.foreign for facts in labels if facts.label.foreign}
    unknown, total = sum(foreign.values()), pixels.total() + sum(foreign.values())
    text = f"{unknown:,} unknown of {total:,} pixels of {len(labels):,} labels"
    if unknown:
        text += (
            f", in {len(foreign):,} of them: {_name_counts(foreign, 3)}; colours: {_name_counts(foreign_colours, 3)}"
        )
    text += f"; {len(pixels)} of the {len(COLOUR_NAMES)} colours occur"
    histogram = {
        colour: {"name": name, "pixels": pixels[colour], "labels": occurrences[colour]}
        for colour, name in COLOUR_NAMES.items()
    }
    return _judge(
        "colours", not unknown, text, unknown=unknown, pixels=total, labels=len(labels), frames=foreign,
        foreign_colours=dict(foreign_colours.most_common(20)), histogram=histogram,
    )  # fmt: skip


def _check_lidar(raw: RawSet, frames: list[FrameFacts]) -> Iterator[Check]:
    frames = [facts for facts in frames if facts.lidar]
    if not frames:
        yield from (_skip(name, "no npz that can be read") for name in ASSUMPTIONS if name.startswith("lidar_"))
        return
    mapped = [facts for facts in frames if facts.lidar.is_mapped]
    unmapped = [facts.frame for facts in frames if not facts.lidar.is_mapped]
    text = f"{len(mapped):,} of {len(frames):,}"
    yield _judge("lidar_mapped", len(mapped) > MOST * len(frames), text, mapped=len(mapped), files=len(frames))
    yield _check_unmapped(raw, [facts.frame for facts in frames], unmapped)
    yield from _check_arrays(mapped)
    points = sorted(facts.lidar.points for facts in frames)
    middle = median(points)
    text = f"{points[0]:,} to {points[-1]:,}, median {middle:,.0f}"
    low, high = LIDAR_POINTS
    yield _judge("lidar_points", low <= middle <= high, text, least=points[0], median=middle, most=points[-1])
    bad = {str(facts.frame): facts.lidar.not_finite for facts in frames if facts.lidar.not_finite}
    text = f"{sum(bad.values()):,} of {sum(points):,} points are not" + (f": {_name_counts(bad, 3)}" if bad else "")
    yield _judge("lidar_finite", not bad, text, points=bad)
    yield _check_range(frames)
    residual = {facts.frame: max(facts.lidar.residual) for facts in frames if facts.lidar.residual}
    yield _check_largest("lidar_geometry", residual, GEOMETRY_PIXELS, "px", "points ahead, with row and col")
    for name, attribute in (("lidar_depth", "depth_error"), ("lidar_distance", "distance_error")):
        errors = {facts.frame: getattr(facts.lidar, attribute) for facts in frames}
        errors = {frame: error for frame, error in errors.items() if error is not None}
        yield _check_largest(name, errors, DEPTH_METRES, "m", "both arrays")


def _check_unmapped(raw: RawSet, read: list[Frame], unmapped: list[Frame]) -> Check:
    known = {(scene, MAIN_VIEW, f"{number:09d}") for scene, numbers in UNMAPPED.items() for number in numbers}
    expected = {str(frame) for frame in read if (frame.scene, frame.view, frame.id) in known}
    found = {str(frame) for frame in unmapped}
    more, fewer = sorted(found - expected), sorted(expected - found)
    text = f"{len(found):,} without; {len(expected)} of the 15 are here"
    text += f"; not known: {_name_some(more)}" if more else ""
    text += f"; known, but whole: {_name_some(fewer)}" if fewer else ""
    # the list is that of the boxes set; section 10: "the semantic set has more"
    holds = not fewer and (not more or raw.kind == "semantic")
    return _judge("lidar_unmapped", holds, text, found=sorted(found), not_known=more, known_but_whole=fewer)


def _check_arrays(mapped: list[FrameFacts]) -> Iterator[Check]:
    if not mapped:
        yield from (_skip(name, "no npz with row, col and depth") for name in ("lidar_keys", "lidar_types"))
        return
    sets, types, other = Counter(), Counter(), []
    for facts in mapped:
        found = facts.lidar.types
        sets[" ".join(sorted(found))] += 1
        types.update(f"{name} {kind}" for name, kind in found.items())
        if any(found[name] != LIDAR_TYPES[name] for name in found.keys() & LIDAR_TYPES.keys()):
            other.append(facts.frame)
    lacking = Counter(name for facts in mapped for name in LIDAR_TYPES if name not in facts.lidar.types)
    surplus = Counter(name for facts in mapped for name in facts.lidar.types if name not in LIDAR_TYPES)
    text = f"{sets[' '.join(sorted(LIDAR_TYPES))]:,} of {len(mapped):,} files with row, col and depth"
    text += f"; without {_name_counts(lacking)}" if lacking else ""
    text += f"; besides {_name_counts(surplus)}" if surplus else ""
    yield _judge("lidar_keys", not lacking and not surplus, text, key_sets=dict(sets))
    foreign = {
        name: count
        for name, count in types.items()
        if LIDAR_TYPES.get(name.split()[0], name.split()[1]) != name.split()[1]
    }
    text = f"{len(mapped) - len(other):,} of {len(mapped):,}" + (f"; {_name_counts(foreign)}" if foreign else "")
    yield _judge("lidar_types", not foreign, text, types=dict(sorted(types.items())))


def _check_range(frames: list[FrameFacts]) -> Check:
    frames = [facts for facts in frames if facts.lidar.off_picture is not None]
    if not frames:
        return _skip("lidar_range", "no npz with row and col, or no calibration")
    rows = [value for facts in frames for value in facts.lidar.rows]
    columns = [value for facts in frames for value in facts.lidar.columns]
    off = {str(facts.frame): facts.lidar.off_picture for facts in frames if facts.lidar.off_picture}
    border = sum(facts.lidar.off_pixels for facts in frames)
    text = f"row {min(rows):.2f} to {max(rows):.2f}, col {min(columns):.2f} to {max(columns):.2f}; "
    text += f"{border:,} points round to no pixel"
    text += f"; {sum(off.values()):,} lie farther off: {_name_counts(off, 3)}" if off else ""
    return _judge(
        "lidar_range", not off, text, row=[min(rows), max(rows)], col=[min(columns), max(columns)],
        round_to_no_pixel=border, farther_off=off,
    )  # fmt: skip


def _check_largest(name: str, errors: dict[Frame, float], limit: float, unit: str, needs: str) -> Check:
    """The largest error of each file, held against the limit; NaN and infinity are beyond any."""
    if not errors:
        return _skip(name, f"no npz with {needs}, or no calibration" if unit == "px" else f"no npz with {needs}")
    beyond = {str(frame): error for frame, error in errors.items() if not error < limit}
    largest = max(errors.values())
    text = f"at most {largest:.2g} {unit} in {len(errors):,} files"
    text += f"; beyond in {len(beyond):,}: {_name_some(beyond)}" if beyond else ""
    return _judge(name, not beyond, text, largest=largest, files=len(errors), beyond=beyond)


def _check_boxes(raw: RawSet, frames: list[FrameFacts]) -> Iterator[Check]:
    frames = [facts for facts in frames if facts.boxes is not None]
    boxes = [(facts.frame, box) for facts in frames for box in facts.boxes]
    if not boxes:
        reason = "no boxes" if frames else "no label3D that can be read"
        yield from (_skip(name, reason) for name in ("box_geometry", "box_classes", "box_duplicates"))
    else:
        yield _check_hulls(boxes)
        classes = Counter(box.label for _, box in boxes)
        foreign = {label: count for label, count in classes.items() if find_object_class(label) is None}
        where = _name_some(dict.fromkeys(str(frame) for frame, box in boxes if box.label in foreign))
        text = f"{len(boxes):,} boxes in {len(frames):,} frames: {_name_counts(classes)}"
        text += f"; foreign: {_name_counts(foreign)}, in {where}" if foreign else ""
        yield _judge("box_classes", not foreign, text, classes=dict(classes.most_common()), foreign=foreign)
        yield _check_duplicates(frames, len(boxes))
    yield _check_regression(raw, frames)


def _check_hulls(boxes: list[tuple[Frame, BoxFacts]]) -> Check:
    residuals = {}
    for number, (frame, box) in enumerate(boxes):
        if box.residual is not None:
            residuals[number] = (box.residual, str(frame))
    if not residuals:
        return _skip("box_geometry", "no box with 2d_bbox and all corners ahead, or no calibration")
    values = np.array([value for value, _ in residuals.values()])
    beyond = Counter(frame for value, frame in residuals.values() if not value < GEOMETRY_PIXELS)
    middle = float(np.median(values))
    text = f"median {middle:.2g} px, at most {values.max():.2g} px, of {len(values):,} boxes"
    text += f" ({len(boxes) - len(values):,} have corners behind the camera)" if len(values) < len(boxes) else ""
    text += f"; beyond in {beyond.total():,} boxes of {_name_some(beyond)}" if beyond else ""
    return _judge(
        "box_geometry", middle < GEOMETRY_PIXELS, text, median=middle, largest=float(values.max()), boxes=len(values),
        beyond=dict(beyond),
    )  # fmt: skip


def _count_copies(facts: FrameFacts) -> Counter:
    """Boxes of a frame by class and 2d_bbox, which are the same in exact duplicates."""
    return Counter((box.label, box.bounds) for box in facts.boxes if box.bounds is not None)


def _check_duplicates(frames: list[FrameFacts], boxes: int) -> Check:
    surplus, most = {}, 1
    for facts in frames:
        copies = _count_copies(facts)
        if len(copies) < copies.total():
            surplus[str(facts.frame)] = copies.total() - len(copies)
            most = max(most, *copies.values())
    total = sum(surplus.values())
    text = f"{total:,} of {boxes:,} boxes ({total / boxes:.1%}) in {len(surplus):,} of {len(frames):,} frames"
    text += f", up to {most} times the same" if surplus else ""
    return _judge(
        "box_duplicates", total <= DUPLICATE_SHARE * boxes, text, surplus=total, boxes=boxes, most_copies=most,
        frames=surplus,
    )  # fmt: skip


def _measure_boxes(frames: list[FrameFacts], size: tuple[int, int]) -> dict[str, int | float]:
    """The numbers of REGRESSION, of the classes and of REGRESSION_PIXELS, by the same names."""
    copies = [_count_copies(facts) for facts in frames]
    boxes = [box for facts in frames for box in facts.boxes]
    x1, y1, x2, y2 = np.array([box.bounds for box in boxes if box.bounds is not None]).reshape(-1, 4).T
    width, height = size
    classes = Counter(find_object_class(box.label) for box in boxes)
    outside = (x2 <= 0) | (y2 <= 0) | (x1 >= width) | (y1 >= height)
    ids = [int(facts.frame.id) for facts in frames]
    named = {
        OBJECT_CLASSES[index]: classes[index] for index, known in enumerate(REGRESSION_CLASSES) if known is not None
    }
    return {
        "frames": len(frames),
        "first id": min(ids),
        "last id": max(ids),
        "boxes": len(boxes),
        "most boxes of a frame": max(len(facts.boxes) for facts in frames),
        "frames without a box": sum(not facts.boxes for facts in frames),
        "surplus duplicates": sum(count.total() - len(count) for count in copies),
        "frames with duplicates": sum(count.total() > len(count) for count in copies),
        "most copies of a box": max((max(count.values(), default=0) for count in copies), default=0),
        "boxes partly outside": int(((x1 < 0) | (y1 < 0) | (x2 > width) | (y2 > height)).sum() - outside.sum()),
        "boxes wholly outside": int(outside.sum()),
        "boxes wider or taller than the picture": int(((x2 - x1 > width) | (y2 - y1 > height)).sum()),
        **named,
        REGRESSION_REMAINDER_NAME: sum(
            classes[index] for index, known in enumerate(REGRESSION_CLASSES) if known is None
        ),
        "smallest x1": float(x1.min(initial=np.inf)),
        "smallest y1": float(y1.min(initial=np.inf)),
        "largest x2": float(x2.max(initial=-np.inf)),
        "largest y2": float(y2.max(initial=-np.inf)),
        "smallest width": float((x2 - x1).min(initial=np.inf)),
        "smallest height": float((y2 - y1).min(initial=np.inf)),
    }


def _check_regression(raw: RawSet, frames: list[FrameFacts]) -> Check:
    here = sum(frame.scene == REGRESSION_SCENE and "label3D" in kinds for frame, kinds in raw.index.items())
    of_scene = [facts for facts in frames if facts.frame.scene == REGRESSION_SCENE]
    if not here:
        return _skip("box_regression", "the scene is not here")
    if here < REGRESSION["frames"]:
        return _skip("box_regression", f"{here} of its {REGRESSION['frames']} frames are here")
    if len(of_scene) < here:
        return _skip("box_regression", f"{len(of_scene)} of its {here} frames were read")
    camera = raw.cameras.get(MAIN_VIEW)
    found = _measure_boxes(of_scene, camera.recorded_size if camera else FULL_SIZE)
    known = list_regression()
    other = [name for name, (value, tolerance) in known.items() if not abs(found[name] - value) <= tolerance]
    text = f"{len(known) - len(other)} of {len(known)} numbers"
    text += "; " + "; ".join(f"{name}: {found[name]:g}, known: {known[name][0]:g}" for name in other) if other else ""
    return _judge("box_regression", not other, text, found=found)


def _check_bus(raw: RawSet, frames: list[FrameFacts], buses: list[BusFacts]) -> Iterator[Check]:
    names = [name for name in ASSUMPTIONS if name.startswith("bus_")]
    if not buses:
        yield from (_skip(name, "no bus signals beside the set") for name in names)
        return
    yield _compare_scenes("bus_scenes", {facts.scene for facts in buses}, BUS_SCENES)
    buses = [facts for facts in buses if not facts.damaged]
    yield from _check_join(raw, buses)
    items = sum(len(facts.moments) for facts in buses)
    if not items:
        yield from (_skip(name, "no bus items that can be read") for name in names[names.index("bus_signals") :])
        return
    yield from _check_signals(buses, items)
    yield from _check_samples(buses)
    yield _check_bus_times(frames, buses)
    yield _check_sign(buses)


def _check_join(raw: RawSet, buses: list[BusFacts]) -> Iterator[Check]:
    """Frames are those with a picture of the one camera that the bus files name."""
    wanted = defaultdict(set)
    for frame, kinds in raw.index.items():
        if frame.view == MAIN_VIEW and "camera" in kinds:
            wanted[frame.scene].add(frame.path("camera_info").name)
    rows = {
        facts.scene: {
            "items": len(facts.moments),
            "frames": len(wanted[facts.scene]),
            "joined": len(wanted[facts.scene] & facts.moments.keys()),
        }
        for facts in buses
        if wanted[facts.scene]
    }
    if not rows:
        reason = f"no scene with both bus signals and pictures of {MAIN_VIEW}"
        yield from (_skip(name, reason) for name in ("bus_items", "bus_join"))
        return
    items, count, joined = (sum(row[key] for row in rows.values()) for key in ("items", "frames", "joined"))
    short = [
        f"{scene} {row['items']} for {row['frames']}" for scene, row in rows.items() if row["items"] < row["frames"]
    ]
    text = f"{items:,} items for {count:,} frames of {len(rows):,} scenes"
    text += f"; fewer items than frames in {len(short):,}: {_name_some(short)}" if short else ""
    yield _judge("bus_items", not short, text, scenes=rows)
    text = f"{joined:,} of {count:,} frames ({joined / count:.1%})"
    yield _judge("bus_join", joined > MOST * count, text, joined=joined, frames=count)


def _check_signals(buses: list[BusFacts], items: int) -> Iterator[Check]:
    signals = Counter()
    for facts in buses:
        signals.update(facts.signals)
    for check, names in (("bus_signals", (bus.ANGLE, f"{bus.ANGLE}_sign")), ("bus_motion", (bus.SPEED, YAW_RATE))):
        text = f"of {items:,} items: " + ", ".join(f"{name} {signals[name] / items:.1%}" for name in names)
        holds = all(signals[name] > MOST * items for name in names)
        yield _judge(check, holds, text, items=items, signals=dict(signals.most_common()))


def _check_samples(buses: list[BusFacts]) -> Iterator[Check]:
    lengths = Counter()
    for facts in buses:
        lengths.update(facts.lengths)
    empty = lengths.pop(0, 0)
    samples, sentinels = (sum(getattr(facts, name) for facts in buses) for name in ("samples", "sentinels"))
    if not samples:
        yield from (
            _skip(name, "no sample of the angle") for name in ("bus_samples", "bus_sentinels", "bus_magnitudes")
        )
        return
    middle = median(lengths.elements())
    unequal = sum(facts.unequal for facts in buses)
    text = f"median {middle:g}, {min(lengths)} to {max(lengths)}; none in {empty:,} items; "
    text += f"other numbers of signs in {unequal:,} items"
    low, high = ANGLE_SAMPLES
    yield _judge(
        "bus_samples", low <= middle <= high and not unequal, text, lengths=dict(sorted(lengths.items())), empty=empty,
        unequal=unequal,
    )  # fmt: skip
    text = f"{sentinels:,} of {samples:,} samples ({sentinels / samples:.1%})"
    yield _judge("bus_sentinels", sentinels <= SENTINEL_SHARE * samples, text, sentinels=sentinels, samples=samples)
    spans = [facts.magnitudes for facts in buses if facts.magnitudes]
    if not spans:
        yield _skip("bus_magnitudes", "no usable sample of the angle")
        return
    least, greatest = min(low for low, _ in spans), max(high for _, high in spans)
    text = f"{least:g} to {greatest:g}, sentinels apart"
    yield _judge("bus_magnitudes", least >= 0 and greatest <= LARGEST_MAGNITUDE, text, least=least, greatest=greatest)


def _check_bus_times(frames: list[FrameFacts], buses: list[BusFacts]) -> Check:
    moments = {name: moment for facts in buses for name, moment in facts.moments.items()}
    pairs = {
        str(facts.frame): (moments[name], facts.moment)
        for facts in frames
        if (name := facts.frame.path("camera_info").name) in moments and facts.moment is not None
    }
    waits = [wait for facts in buses for wait in facts.waits]
    if not pairs and not waits:
        return _skip("bus_times", "no times to compare")
    other = [name for name, (item, frame) in pairs.items() if item != frame]
    late = sum(wait > SAMPLE_WAIT_US for wait in waits)
    text = f"{len(pairs) - len(other):,} of {len(pairs):,} frames"
    text += f"; another time in {_name_some(other)}" if other else ""
    text += f"; nearest sample at most {max(waits) / 1000:g} ms away" if waits else ""
    text += f", in {late:,} items more than {SAMPLE_WAIT_US / 1000:g} ms" if late else ""
    return _judge("bus_times", not other and not late, text, other=other, late=late, compared=len(pairs))


def _correlate(turns: list[tuple[float, float]]) -> float | None:
    """Pearson's r; None for too few frames, or for angles or rates that are all the same."""
    if len(turns) < LEAST_TURNS:
        return None
    angles, rates = np.array(turns).T
    if not (angles.std() > 0 and rates.std() > 0):
        return None
    return float(np.corrcoef(angles, rates)[0, 1])


def list_turns(facts: BusFacts) -> list[tuple[float, float]]:
    """(angle, yaw rate) of the frames that drive fast enough for a turn of the wheel to be one of the car."""
    return [
        (turn.angle, turn.yaw_rate)
        for turn in facts.turns.values()
        if turn.yaw_rate is not None and turn.speed is not None and turn.speed > FASTER_KMH
    ]


def _check_sign(buses: list[BusFacts]) -> Check:
    of_scenes = {facts.scene: list_turns(facts) for facts in buses}
    turns = [turn for of_scene in of_scenes.values() for turn in of_scene]
    found = _correlate(turns)
    if found is None:
        reason = f"{len(turns)} frames with angle, speed and yaw rate are too few, or all are the same"
        return _skip("bus_sign", reason)
    details = {scene: _correlate(of_scene) for scene, of_scene in of_scenes.items()}
    opposed = [scene for scene, r in details.items() if r is not None and r < 0]
    text = f"r = {found:.3f} over {len(turns):,} frames"
    text += f"; negative in {_name_some(opposed)}" if opposed else ""
    return _judge("bus_sign", found >= LEAST_CORRELATION, text, r=found, frames=len(turns), scenes=details)
