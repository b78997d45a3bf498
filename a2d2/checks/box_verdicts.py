"""Checks of label3D files: geometry, classes, duplicates, known numbers of a scene (docs/a2d2-format.md, section 6)."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from a2d2.checks.assumptions import DUPLICATE_SHARE, GEOMETRY_PIXELS
from a2d2.checks.check import Check, format_counts, format_some, make_check, skip_check
from a2d2.checks.facts import BoxFacts, FrameFacts
from a2d2.checks.known import (
    FULL_SIZE,
    MAIN_VIEW,
    REGRESSION,
    REGRESSION_CLASSES,
    REGRESSION_REMAINDER_NAME,
    REGRESSION_SCENE,
    list_regression,
)
from a2d2.checks.raw_set import RawSet
from a2d2.classes import OBJECT_CLASSES, find_object_class
from a2d2.frames import Frame


def check_boxes(raw: RawSet, frames: list[FrameFacts]) -> Iterator[Check]:
    frames = [facts for facts in frames if facts.boxes is not None]
    boxes = [(facts.frame, box) for facts in frames for box in facts.boxes]
    if not boxes:
        reason = "no boxes" if frames else "no label3D that can be read"
        yield from (skip_check(name, reason) for name in ("box_geometry", "box_classes", "box_duplicates"))
    else:
        yield _check_hulls(boxes)
        classes = Counter(box.label for _, box in boxes)
        foreign = {label: count for label, count in classes.items() if find_object_class(label) is None}
        where = format_some(dict.fromkeys(str(frame) for frame, box in boxes if box.label in foreign))
        text = f"{len(boxes):,} boxes in {len(frames):,} frames: {format_counts(classes)}"
        text += f"; foreign: {format_counts(foreign)}, in {where}" if foreign else ""
        yield make_check("box_classes", not foreign, text, classes=dict(classes.most_common()), foreign=foreign)
        yield _check_duplicates(frames, len(boxes))
    yield _check_regression(raw, frames)


def _check_hulls(boxes: list[tuple[Frame, BoxFacts]]) -> Check:
    residuals = {}
    for number, (frame, box) in enumerate(boxes):
        if box.residual is not None:
            residuals[number] = (box.residual, str(frame))
    if not residuals:
        return skip_check("box_geometry", "no box with 2d_bbox and all corners before the camera, or no calibration")
    values = np.array([value for value, _ in residuals.values()])
    beyond = Counter(frame for value, frame in residuals.values() if not value < GEOMETRY_PIXELS)
    middle = float(np.median(values))
    text = f"median {middle:.2g} px, at most {values.max():.2g} px, of {len(values):,} boxes"
    text += f" ({len(boxes) - len(values):,} have corners behind the camera)" if len(values) < len(boxes) else ""
    text += f"; above the limit in {beyond.total():,} boxes of {format_some(beyond)}" if beyond else ""
    return make_check(
        "box_geometry", middle < GEOMETRY_PIXELS, text, median=middle, largest=float(values.max()), boxes=len(values),
        beyond=dict(beyond),
    )  # fmt: skip


def _count_copies(facts: FrameFacts) -> Counter:
    """Number of boxes of a frame for each class and 2d_bbox; exact duplicates have the same class and 2d_bbox."""
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
    text += f", at most {most} copies of a box" if surplus else ""
    return make_check(
        "box_duplicates", total <= DUPLICATE_SHARE * boxes, text, surplus=total, boxes=boxes, most_copies=most,
        frames=surplus,
    )  # fmt: skip


def _measure_boxes(frames: list[FrameFacts], size: tuple[int, int]) -> dict[str, int | float]:
    """The numbers that `list_regression` lists, under the same names, measured on these frames."""
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
        return skip_check("box_regression", "the scene is not in this dataset")
    if here < REGRESSION["frames"]:
        return skip_check("box_regression", f"{here} of its {REGRESSION['frames']} frames are in this dataset")
    if len(of_scene) < here:
        return skip_check("box_regression", f"{len(of_scene)} of its {here} frames were read")
    camera = raw.cameras.get(MAIN_VIEW)
    found = _measure_boxes(of_scene, camera.recorded_size if camera else FULL_SIZE)
    known = list_regression()
    other = [name for name, (value, tolerance) in known.items() if not abs(found[name] - value) <= tolerance]
    text = f"{len(known) - len(other)} of {len(known)} numbers are the known ones"
    text += "; " + "; ".join(f"{name}: {found[name]:g}, known: {known[name][0]:g}" for name in other) if other else ""
    return make_check("box_regression", not other, text, found=found)
