"""Checks whether a raw dataset is as this project assumes: a verdict on each assumption.

The checks are those of docs/a2d2-format.md, section 11. Each reports what was found and one of three verdicts: "ok",
"differs", or "not checkable" if the files that it needs are missing.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from a2d2.calibration import map_centres
from a2d2.checks.assumptions import ASSUMPTIONS, LENS_PIXELS
from a2d2.checks.box_verdicts import check_boxes
from a2d2.checks.bus_verdicts import check_bus
from a2d2.checks.check import Check, compare_scenes, format_counts, format_some, make_check, skip_check
from a2d2.checks.facts import PICTURE_TYPE, BusFacts, FrameFacts
from a2d2.checks.known import (
    BARE_SCENES,
    BOX_SCENES,
    CAMERA_FOLDERS,
    FULL_SIZE,
    LABEL_SUMS,
    LENS_POINTS,
    MAIN_VIEW,
    MATCHED_FRAMES,
    SCENES,
)
from a2d2.checks.lidar_verdicts import check_lidar
from a2d2.checks.raw_set import RawSet, count_files, list_damaged
from a2d2.classes import COLOUR_NAMES
from a2d2.frames import RAW_KINDS
from a2d2.images import read_json
from a2d2.splits import split_frames


def check_set(raw: RawSet, frames: list[FrameFacts], buses: list[BusFacts]) -> list[Check]:
    """All checks, in the order of ASSUMPTIONS. `frames`, `buses`: the facts of the units, sorted."""
    checks = [
        *_check_calibration(raw),
        *_check_listing(raw),
        *_check_files(raw, frames, buses),
        _check_colours(frames),
        *check_lidar(raw, frames),
        *check_boxes(raw, frames),
        *check_bus(raw, frames, buses),
    ]
    order = list(ASSUMPTIONS)
    return sorted(checks, key=lambda check: order.index(check.name))


def _check_calibration(raw: RawSet) -> Iterator[Check]:
    yield make_check("calibration", not raw.calibration_error, raw.calibration_error or f"{len(raw.cameras)} cameras")
    views = sorted({frame.view for frame in raw.index})
    if raw.calibration_error:
        yield skip_check("views", "no calibration")
    else:
        absent = [view for view in views if view not in raw.cameras]
        text = f"lacks {', '.join(absent)}" if absent else f"frames of {', '.join(views)}"
        yield make_check("views", not absent, text, absent=absent)
    yield _check_lens(raw)
    yield _check_colour_list(raw.root)


def _check_lens(raw: RawSet) -> Check:
    camera = raw.cameras.get(MAIN_VIEW)
    if camera is None:
        return skip_check("lens", f"no calibration of {MAIN_VIEW}")
    recorded, known = (np.array(list(points), dtype=np.float64) for points in (LENS_POINTS, LENS_POINTS.values()))
    try:
        # LENS_POINTS are pixels of FULL_SIZE; a recording of another size has the same lens
        found = camera.undistort(map_centres(recorded, FULL_SIZE, camera.recorded_size))
    except Exception as error:  # OpenCV may raise anything on numbers that describe no camera
        return make_check("lens", False, f"the calibration of {MAIN_VIEW} cannot be used ({error})")
    error = float(np.abs(map_centres(found, camera.size, FULL_SIZE) - known).max())
    return make_check("lens", error <= LENS_PIXELS, f"off by up to {error:.2f} px", largest_px=error)


def _check_colour_list(root: Path) -> Check:
    path = next(
        (folder / "class_list.json" for folder in (root, root.parent) if (folder / "class_list.json").is_file()), None
    )
    if path is None:
        return skip_check("colour_list", "no class_list.json")
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError) as error:
        return make_check("colour_list", False, f"{path} is no JSON file of colours ({error})")
    other = sorted(key for key in found.keys() | COLOUR_NAMES.keys() if found.get(key) != COLOUR_NAMES.get(key))
    text = f"{len(found)} colours" + (f", {len(other)} differ: {format_some(other)}" if other else "")
    return make_check("colour_list", not other, text, differing=other)


def _check_listing(raw: RawSet) -> Iterator[Check]:
    known = BOX_SCENES if raw.kind == "boxes" else SCENES
    yield compare_scenes("scenes", {frame.scene for frame in raw.index}, known.keys())
    yield _check_box_counts(raw) if raw.kind == "boxes" else _check_label_sums(raw)
    yield _check_complete(raw)


def _check_box_counts(raw: RawSet) -> Check:
    """A kind of file that the whole dataset lacks was left out on purpose, so it is not compared."""
    counts = {scene: count for (scene, view), count in count_files(raw).items() if view == MAIN_VIEW}
    here = [scene for scene in BOX_SCENES if scene in counts]
    if not here:
        return skip_check("frame_counts", "no scene whose number of frames is known")
    kinds = [kind for kind in RAW_KINDS if any(kind in count for count in counts.values())]
    other = {
        scene: {"known": BOX_SCENES[scene]} | {kind: counts[scene][kind] for kind in kinds}
        for scene in here
        if any(counts[scene][kind] != BOX_SCENES[scene] for kind in kinds)
    }
    total = sum(BOX_SCENES[scene] for scene in here)
    text = f"{len(here) - len(other)} of {len(here)} scenes of this dataset have the known numbers ({total:,} frames)"
    if other:
        scene, numbers = next(iter(other.items()))
        shown = ", ".join(f"{kind} {number}" for kind, number in numbers.items() if kind != "known")
        text += f"; {scene} has {shown}, known: {numbers['known']}"
        text += f"; likewise {format_some(list(other)[1:])}" if len(other) > 1 else ""
    return make_check("frame_counts", not other, text, scenes=other)


def _check_label_sums(raw: RawSet) -> Check:
    labels = [frame for frame, kinds in raw.index.items() if "label" in kinds]
    here = {frame.scene for frame in labels}
    subsets = split_frames(labels, "paper") if here >= SCENES.keys() else {}
    found = {}
    for name, (scenes, subset, known) in LABEL_SUMS.items():
        if here >= set(scenes):
            number = len(subsets[subset]) if subset else sum(frame.scene in scenes for frame in labels)
            found[name] = {"found": number, "known": known}
    if subsets:
        folders = len({(frame.scene, frame.view) for frame in labels})
        matched = sum({"camera", "camera_info", "label"} <= kinds for kinds in raw.index.values())
        found["cameras of all scenes"] = {"found": folders, "known": CAMERA_FOLDERS}
        found["with picture and camera JSON"] = {"found": matched, "known": MATCHED_FRAMES}
    if not found:
        return skip_check("frame_counts", "no scenes whose number of labels is known")
    other = [name for name, row in found.items() if row["found"] != row["known"]]
    named = other or found
    text = format_some(
        (f"{name}: {found[name]['found']:,} labels, known: {found[name]['known']:,}" for name in named), 6
    )
    return make_check("frame_counts", not other, text, sums=found)


def _list_expected_kinds(raw: RawSet, scene: str) -> set[str]:
    expected = set(RAW_KINDS)
    if raw.kind == "semantic":
        expected.discard("label3D")
    if scene in BARE_SCENES:
        expected -= {"lidar", "camera_info"}
    return expected


def _check_complete(raw: RawSet) -> Check:
    if not raw.index:
        return skip_check("complete_frames", "no frames")
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
            f"{kind}: {len(names):,} ({format_some(names, 2)})" for kind, names in missing.items()
        )
    return make_check("complete_frames", not missing, text, without=missing)


def _check_files(raw: RawSet, frames: list[FrameFacts], buses: list[BusFacts]) -> Iterator[Check]:
    damaged = list_damaged(raw, frames, buses)
    read = sum(len(raw.index[facts.frame]) for facts in frames) + len(buses)
    text = f"{read:,} files read" + (f", of one frame in {raw.every}" if raw.every > 1 else "")
    if damaged:
        text += f"; {len(damaged):,} damaged: " + format_some(dict.fromkeys(Path(row["file"]).name for row in damaged))
    yield make_check("readable", not damaged, text) if read else skip_check("readable", "no files")
    yield _check_times(raw, frames)
    yield _check_pictures(raw, frames)


def _check_times(raw: RawSet, frames: list[FrameFacts]) -> Check:
    frames = [
        facts for facts in frames if "camera_info" in raw.index[facts.frame] and "camera_info" not in facts.damaged
    ]
    if not frames:
        return skip_check("frame_times", "no camera JSON that can be read")
    lacking = [str(facts.frame) for facts in frames if facts.timestamp is None]
    known = [facts for facts in frames if facts.timestamp is not None]
    falling = [
        str(later.frame)
        for earlier, later in pairwise(known)
        if (earlier.frame.scene, earlier.frame.view) == (later.frame.scene, later.frame.view)
        and later.timestamp <= earlier.timestamp
    ]
    text = f"cam_tstamp in {len(known):,} of {len(frames):,}"
    text += f"; none in {format_some(lacking)}" if lacking else ""
    text += f"; not later than the frame before: {format_some(falling)}" if falling else ""
    return make_check("frame_times", not lacking and not falling, text, lacking=lacking, falling=falling)


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
        return skip_check("picture_type", "no pictures that can be read")
    text = format_counts(types) + (f"; of another type or size: {format_some(other)}" if other else "")
    return make_check("picture_type", not other, text, types=dict(types), other=other)


def _check_colours(frames: list[FrameFacts]) -> Check:
    labels = [facts for facts in frames if facts.label]
    if not labels:
        return skip_check("colours", "no labels that can be read")
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
            f", in {len(foreign):,} of them: {format_counts(foreign, 3)}; colours: {format_counts(foreign_colours, 3)}"
        )
    text += f"; {len(pixels)} of the {len(COLOUR_NAMES)} colours occur"
    histogram = {
        colour: {"name": name, "pixels": pixels[colour], "labels": occurrences[colour]}
        for colour, name in COLOUR_NAMES.items()
    }
    return make_check(
        "colours", not unknown, text, unknown=unknown, pixels=total, labels=len(labels), frames=foreign,
        foreign_colours=dict(foreign_colours.most_common(20)), histogram=histogram,
    )  # fmt: skip
