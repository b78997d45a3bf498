"""label3D -> distinct, visible 2-D boxes at the derived size.

A2D2's `2d_bbox` is the bounding rectangle of the projected 3-D box, unclipped (docs/a2d2-format.md, section 6.1).
Corners behind the camera project to meaningless pixels, so where the corners are given, the rectangle is computed again
after clipping the box at a near plane.
"""

from itertools import combinations
from pathlib import Path

import numpy as np
from jaxtyping import Float

from a2d2.calibration import Camera, map_edges
from a2d2.images import read_json

NEAR_METRES = 0.1  # distance of the near plane; what is nearer to the camera is clipped before projecting


def read_label3d(path: Path) -> list[dict]:
    """The entries of a label3D file, in file order; an empty list for a frame that is labelled as empty.

    ValueError if the file is no JSON object of boxes.
    """
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"the file is no JSON ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise ValueError("the file is no label3D file: expected an object of boxes")
    return list(content.values())


def find_hull(corners: Float[np.ndarray, "8 3"], camera: Camera) -> Float[np.ndarray, " 4"] | None:
    """Bounds [x1, y1, x2, y2] of what a 3-D box shows in front of the near plane, in pixels of `camera`, unclipped.

    None if the whole box is behind the near plane. The segments between all pairs of corners are clipped, not only the
    twelve edges, so the order of the corners does not matter: the other segments are diagonals inside the box and do
    not widen the hull.
    """
    front = corners[:, 0] >= NEAR_METRES
    if not front.any():
        return None
    points = list(corners[front])
    for a, b in combinations(range(len(corners)), 2):
        if front[a] != front[b]:
            share = (NEAR_METRES - corners[a, 0]) / (corners[b, 0] - corners[a, 0])
            points.append(corners[a] + share * (corners[b] - corners[a]))
    pixels = camera.project(np.array(points))
    return np.concatenate([pixels.min(axis=0), pixels.max(axis=0)])


def convert_boxes(entries: list[dict], camera: Camera, size: tuple[int, int]) -> list[dict]:
    """Entries of label3D -> boxes as the derived file stores them.

    `camera` is the camera at its recorded size, `size` the derived (width, height). Each box: `box` [x1, y1, x2, y2],
    edges in derived pixels clipped to [0, W] x [0, H]; `class` as in the raw file; `visible`, the area after clipping
    divided by the area before; `distance_m`, metres to the centre of the box, or None; `occlusion`, `truncation`, `id`
    as in the raw file, or None. Only exact duplicates (the same class and geometry) and boxes wholly outside the image
    are dropped. ValueError for an entry without class or geometry.
    """
    boxes, seen = [], set()
    for entry in entries:
        label = entry.get("class")
        if not isinstance(label, str):
            raise ValueError(f"box {entry.get('id')}: its class is {label!r}, expected a string")
        corners, bounds = _read_array(entry, "3d_points", (8, 3)), _read_array(entry, "2d_bbox", (4,))
        if corners is None and bounds is None:
            raise ValueError(f"box {entry.get('id')} ({label}) has neither 3d_points nor 2d_bbox")
        identity = (label, tuple((bounds if bounds is not None else corners).ravel()))
        if identity in seen:
            continue
        seen.add(identity)
        hull = bounds if corners is None else find_hull(corners, camera)
        if hull is None:
            continue
        hull = map_edges(hull, camera.recorded_size, size)
        box = np.clip(hull, 0, [*size, *size])
        area = (box[2] - box[0]) * (box[3] - box[1])
        if not area > 0:
            continue
        boxes.append(
            {
                "box": [round(float(value), 3) for value in box],
                "class": label,
                "visible": float(area / ((hull[2] - hull[0]) * (hull[3] - hull[1]))),
                "distance_m": _measure_distance(entry, corners),
                "occlusion": entry.get("occlusion"),
                "truncation": entry.get("truncation"),
                "id": entry.get("id"),
            }
        )
    return boxes


def _read_array(entry: dict, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
    if entry.get(key) is None:
        return None
    try:
        array = np.array(entry[key], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"box {entry.get('id')}: {key} contains no numbers") from error
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"box {entry.get('id')}: {key} is not {' x '.join(map(str, shape))} finite numbers")
    return array


def _measure_distance(entry: dict, corners: np.ndarray | None) -> float | None:
    centre = _read_array(entry, "center", (3,))
    if centre is None:
        centre = None if corners is None else corners.mean(axis=0)
    return None if centre is None else round(float(np.linalg.norm(centre)), 3)
