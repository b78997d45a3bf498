"""What imported labels look like, in a few numbers: what tells that a file held other units than it was read with.

Depth in millimetres, disparities, angles in radians and boxes of two corners all make files that are read without an
error. What is certainly wrong is refused where it is read; here is what only a person can judge.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from a2d2.classes import IGNORE
from a2d2.images import read_depth_png, read_json
from a2d2.imported import ImportFilesError, Job
from a2d2.lidar import DEPTH_SCALE

SAMPLE = 100  # pictures whose files are read
FEW = 20  # of fewer angles or boxes nothing is said
CUT = 0.95  # a box of which less is in its picture is cut
MUCH = 0.2  # a share of boxes that are cut beyond which something is wrong


def describe_labels(jobs: Sequence[Job], classes: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Lines of numbers about the labels of imported pictures, and lines of what is doubtful about these; of files those
    of up to SAMPLE pictures, evenly among all. `classes`: of the masks, by id. ImportFilesError for a derived file that
    is damaged."""
    masks = [job for job in jobs if job.mask is not None]
    depth = [job for job in jobs if job.depth is not None]
    boxes = [job for job in jobs if job.boxes is not None]
    angles = [job.angle for job in jobs if job.angle is not None]
    parts = []
    if masks:
        parts.append(_describe_masks(_spread(masks), classes))
    if depth:
        parts.append(_describe_depth(_spread(depth)))
    if boxes:
        parts.append(_describe_boxes(_spread(boxes)))
    if angles:
        parts.append(_describe_angles(angles))
    return [fact for fact, _ in parts], [doubt for _, doubt in parts if doubt]


def _spread(jobs: Sequence[Job]) -> list[Job]:
    return [jobs[index] for index in np.linspace(0, len(jobs) - 1, min(len(jobs), SAMPLE)).astype(int)]


def _read(job: Job, kind: str, read: Callable[[Path], Any]) -> Any:
    path = job.frame.path(kind)
    try:
        return read(path)
    except (ValueError, EOFError, KeyError, TypeError) as error:
        raise ImportFilesError(
            f"{path} is damaged ({error}); delete it, and the same command makes it again"
        ) from error


def _describe_masks(jobs: Sequence[Job], classes: Sequence[str]) -> tuple[str, str]:
    counts = np.zeros(256, dtype=np.int64)
    for job in jobs:
        mask = _read(job, "segmentation", lambda path: np.load(path, allow_pickle=False))
        counts += np.bincount(mask.ravel(), minlength=256)
    shares = counts / counts.sum()
    order = sorted(range(len(classes)), key=lambda index: -shares[index])
    named = [f"{classes[index]} {shares[index]:.1%}" for index in order if counts[index]]
    absent = [classes[index] for index in range(len(classes)) if not counts[index]]
    text = f"segmentation: {', '.join([*named[:8], *['...'] * (len(named) > 8)])}"
    text += f"; nothing {shares[IGNORE]:.1%}" + (f"; no pixel of {', '.join(absent[:5])}" if absent else "")
    text += ", ..." * (len(absent) > 5)
    return f"{text}; in {len(jobs)} pictures", "" if named else "segmentation: no pixel is of any class that is listed"


def _describe_depth(jobs: Sequence[Job]) -> tuple[str, str]:
    upper, lower = [], []
    for job in jobs:
        metres = _read(job, "depth", read_depth_png) / DEPTH_SCALE
        for half, found in zip(np.array_split(metres, 2), (upper, lower), strict=True):
            found.append(half[half > 0])
    above, below = np.concatenate(upper), np.concatenate(lower)
    every = np.concatenate([above, below])
    if not len(every):
        return f"depth: none in {len(jobs)} pictures", "depth: all of it is 0, which stands for unknown"
    text = f"depth: median {np.median(every):.1f} m, 99 % under {np.quantile(every, 0.99):.1f} m"
    if not len(above) or not len(below):
        return f"{text}, in {len(jobs)} pictures", ""
    text += f"; upper half {np.median(above):.1f} m, lower half {np.median(below):.1f} m; in {len(jobs)} pictures"
    doubt = "depth: the lower half is farther than the upper one, as disparities would be; metres x 256 are asked for"
    return text, doubt if np.median(below) > np.median(above) else ""


def _describe_boxes(jobs: Sequence[Job]) -> tuple[str, str]:
    found = [box for job in jobs for box in _read(job, "boxes", lambda path: read_json(path)["boxes"])]
    if not found:
        return f"boxes: none in {len(jobs)} pictures", ""
    classes = Counter(box["class"] for box in found)
    edges = np.array([box["box"] for box in found])
    width, height = np.median(edges[:, 2:] - edges[:, :2], axis=0)
    cut = sum(box["visible"] < CUT for box in found) / len(found)
    named = ", ".join(f"{name} {number}" for name, number in classes.most_common(5)) + ", ..." * (len(classes) > 5)
    text = f"boxes: {named}; median {width:.0f}x{height:.0f} pixels, {cut:.0%} reach beyond their picture"
    doubt = (
        f"boxes: {cut:.0%} reach beyond their picture: COCO's are [x, y, width, height], not two corners, in pixels of "
        "the picture as it is given"
    )
    return f"{text}; in {len(jobs)} pictures", doubt if len(found) >= FEW and cut > MUCH else ""


def _describe_angles(angles: Sequence[float]) -> tuple[str, str]:
    sizes = np.abs(angles)
    left, right = (sum(sign * angle > 0 for angle in angles) for sign in (1, -1))
    text = (
        f"steering: median |angle| {np.median(sizes):.3g} degrees, 99 % under {np.quantile(sizes, 0.99):.3g}; "
        f"{left} to the left, {right} to the right"
    )
    doubt = ""
    if len(angles) >= FEW and sizes.max() > 0:
        if sizes.max() <= 2 * math.pi:
            doubt = f"steering: no angle is beyond {sizes.max():.2f} degrees: are they radians? Degrees are asked for"
        elif not left or not right:
            doubt = "steering: all angles turn to one side: is the sign missing? Left is positive, right is negative"
    return text, doubt
