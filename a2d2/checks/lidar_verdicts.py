"""Checks of lidar files: keys, types, geometry and depth (docs/a2d2-format.md, section 4)."""

from collections import Counter
from collections.abc import Iterator
from statistics import median

from a2d2.checks.assumptions import ASSUMPTIONS, DEPTH_METRES, GEOMETRY_PIXELS, LIDAR_POINTS, MOST
from a2d2.checks.check import Check, format_counts, format_some, make_check, skip_check
from a2d2.checks.facts import FrameFacts
from a2d2.checks.known import LIDAR_TYPES, MAIN_VIEW, UNMAPPED
from a2d2.checks.raw_set import RawSet
from a2d2.frames import Frame


def check_lidar(raw: RawSet, frames: list[FrameFacts]) -> Iterator[Check]:
    frames = [facts for facts in frames if facts.lidar]
    if not frames:
        yield from (skip_check(name, "no npz that can be read") for name in ASSUMPTIONS if name.startswith("lidar_"))
        return
    mapped = [facts for facts in frames if facts.lidar.is_mapped]
    unmapped = [facts.frame for facts in frames if not facts.lidar.is_mapped]
    text = f"{len(mapped):,} of {len(frames):,}"
    yield make_check("lidar_mapped", len(mapped) > MOST * len(frames), text, mapped=len(mapped), files=len(frames))
    yield _check_unmapped(raw, [facts.frame for facts in frames], unmapped)
    yield from _check_arrays(mapped)
    points = sorted(facts.lidar.points for facts in frames)
    middle = median(points)
    text = f"{points[0]:,} to {points[-1]:,}, median {middle:,.0f}"
    low, high = LIDAR_POINTS
    yield make_check("lidar_points", low <= middle <= high, text, least=points[0], median=middle, most=points[-1])
    bad = {str(facts.frame): facts.lidar.not_finite for facts in frames if facts.lidar.not_finite}
    text = f"{sum(bad.values()):,} of {sum(points):,} points are not finite"
    text += f": {format_counts(bad, 3)}" if bad else ""
    yield make_check("lidar_finite", not bad, text, points=bad)
    yield _check_range(frames)
    residual = {facts.frame: max(facts.lidar.residual) for facts in frames if facts.lidar.residual}
    yield _check_largest(
        "lidar_geometry", residual, GEOMETRY_PIXELS, "px", "row and col of points in front of the camera"
    )
    for name, attribute in (("lidar_depth", "depth_error"), ("lidar_distance", "distance_error")):
        errors = {facts.frame: getattr(facts.lidar, attribute) for facts in frames}
        errors = {frame: error for frame, error in errors.items() if error is not None}
        yield _check_largest(name, errors, DEPTH_METRES, "m", "both arrays")


def _check_unmapped(raw: RawSet, read: list[Frame], unmapped: list[Frame]) -> Check:
    known = {(scene, MAIN_VIEW, f"{number:09d}") for scene, numbers in UNMAPPED.items() for number in numbers}
    expected = {str(frame) for frame in read if (frame.scene, frame.view, frame.id) in known}
    found = {str(frame) for frame in unmapped}
    more, fewer = sorted(found - expected), sorted(expected - found)
    text = f"{len(found):,} without; {len(expected)} of the 15 are in this dataset"
    text += f"; not among the 15: {format_some(more)}" if more else ""
    text += f"; among the 15, but complete: {format_some(fewer)}" if fewer else ""
    # the 15 are files of the boxes set; the semantic set has more (docs/a2d2-format.md, section 10)
    holds = not fewer and (not more or raw.kind == "semantic")
    return make_check("lidar_unmapped", holds, text, found=sorted(found), not_known=more, known_but_whole=fewer)


def _check_arrays(mapped: list[FrameFacts]) -> Iterator[Check]:
    if not mapped:
        yield from (skip_check(name, "no npz with row, col and depth") for name in ("lidar_keys", "lidar_types"))
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
    text += f"; without {format_counts(lacking)}" if lacking else ""
    text += f"; additional {format_counts(surplus)}" if surplus else ""
    yield make_check("lidar_keys", not lacking and not surplus, text, key_sets=dict(sets))
    foreign = {
        name: count
        for name, count in types.items()
        if LIDAR_TYPES.get(name.split()[0], name.split()[1]) != name.split()[1]
    }
    text = f"{len(mapped) - len(other):,} of {len(mapped):,}" + (f"; {format_counts(foreign)}" if foreign else "")
    yield make_check("lidar_types", not foreign, text, types=dict(sorted(types.items())))


def _check_range(frames: list[FrameFacts]) -> Check:
    frames = [facts for facts in frames if facts.lidar.off_picture is not None]
    if not frames:
        return skip_check("lidar_range", "no npz with row and col, or no calibration")
    rows = [value for facts in frames for value in facts.lidar.rows]
    columns = [value for facts in frames for value in facts.lidar.columns]
    off = {str(facts.frame): facts.lidar.off_picture for facts in frames if facts.lidar.off_picture}
    border = sum(facts.lidar.off_pixels for facts in frames)
    text = f"row {min(rows):.2f} to {max(rows):.2f}, col {min(columns):.2f} to {max(columns):.2f}; "
    text += f"{border:,} points round to no pixel"
    text += f"; {sum(off.values()):,} lie farther outside: {format_counts(off, 3)}" if off else ""
    return make_check(
        "lidar_range", not off, text, row=[min(rows), max(rows)], col=[min(columns), max(columns)],
        round_to_no_pixel=border, farther_off=off,
    )  # fmt: skip


def _check_largest(name: str, errors: dict[Frame, float], limit: float, unit: str, needs: str) -> Check:
    """Compare the largest error of each file with the limit; NaN and infinity exceed every limit."""
    if not errors:
        return skip_check(name, f"no npz with {needs}, or no calibration" if unit == "px" else f"no npz with {needs}")
    beyond = {str(frame): error for frame, error in errors.items() if not error < limit}
    largest = max(errors.values())
    text = f"at most {largest:.2g} {unit} in {len(errors):,} files"
    text += f"; above the limit in {len(beyond):,}: {format_some(beyond)}" if beyond else ""
    return make_check(name, not beyond, text, largest=largest, files=len(errors), beyond=beyond)
