"""Facts about one raw frame, or about the bus file of one scene, collected by reading each file once.

`a2d2/checks/verdicts.py` checks them. Reading does not raise errors of a file: the reason is stored with the facts, so
that one damaged file does not prevent the check of the others.
"""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8, UInt32

from a2d2 import bus
from a2d2.boxes import NEAR_METRES, find_hull, read_label3d
from a2d2.calibration import Camera
from a2d2.classes import COLOUR_NAMES
from a2d2.frames import Frame, bus_path
from a2d2.images import ImageError, decode_rgb_png, read_json, read_png_header

PICTURE_TYPE = (8, "RGB")  # bits per channel and colour type of a camera or label PNG (docs/a2d2-format.md, section 5)
MAPPING = ("row", "col", "depth")  # the arrays of an npz that depth labels need
DEPTH_BINS = np.arange(301.0)  # edges of a histogram in metres; farther points count in the last bin
YAW_RATE = "angular_velocity_omega_z"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_MOST_FOREIGN_COLOURS = 20  # unknown colours listed for a label; a label that was stored as JPEG has thousands

PictureHeader = tuple[int, int, int, str]  # width, height, bits per channel, colour type


@dataclass
class LabelFacts:
    """Pixels of a label. `known`: of each known colour "#rrggbb"; `foreign`: of all other colours together;
    `foreign_colours`: of the most frequent of these."""

    known: dict[str, int]
    foreign: int
    foreign_colours: dict[str, int]


@dataclass
class LidarFacts:
    """An npz of lidar points. `types`: array name -> dtype; `points`: number of points; `not_finite`: number of points
    with a value that is not finite.

    The other fields are None if an array that they need is missing. They cover the finite, valid points. `rows`,
    `columns`: least and greatest value; `off_pixels`: number of points that round to no pixel of the picture;
    `off_picture`: number of points more than a pixel outside; `residual`: the largest |col - projected| and
    |row - projected| in pixels, of points in front of the camera; `depth_error`, `distance_error`: the largest
    |depth - x| and |distance - norm| in metres; `depths`: histogram over DEPTH_BINS.
    """

    types: dict[str, str]
    points: int
    not_finite: int
    rows: tuple[float, float] | None = None
    columns: tuple[float, float] | None = None
    off_pixels: int | None = None
    off_picture: int | None = None
    residual: tuple[float, float] | None = None
    depth_error: float | None = None
    distance_error: float | None = None
    depths: np.ndarray | None = None

    @property
    def is_mapped(self) -> bool:
        """Whether the file has row, col and depth of the points; the files with a known defect do not."""
        return all(name in self.types for name in MAPPING)


class BoxFacts(NamedTuple):
    """A box. `bounds`: 2d_bbox in pixels; `residual`: the largest difference in pixels between 2d_bbox and the hull of
    the projected corners, None if a corner is behind the camera or a value is missing; `distance`: metres to the centre
    of the corners."""

    label: str
    bounds: tuple[float, float, float, float] | None
    residual: float | None
    distance: float | None


@dataclass
class FrameFacts:
    """Facts about the files of a frame. `damaged`: kind of file -> reason; `pictures`: kind -> header; `timestamp`:
    `cam_tstamp` in microseconds. A field is None if its file is missing, damaged, or a picture of another type."""

    frame: Frame
    damaged: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, PictureHeader] = field(default_factory=dict)
    timestamp: int | None = None
    label: LabelFacts | None = None
    lidar: LidarFacts | None = None
    boxes: list[BoxFacts] | None = None


class Turn(NamedTuple):
    """Steering of a frame: angle in degrees (left positive), speed in km/h, yaw rate in degrees/s (left positive)."""

    angle: float
    speed: float | None
    yaw_rate: float | None


@dataclass
class BusFacts:
    """Facts about the bus file of a scene. `damaged`: the reason, "" for a readable file.

    `timestamps`: frame_name -> the item's time in microseconds or None; `damaged_items`: frame_name -> reason;
    `signals`: signal -> number of items in which it has values; `lengths`: number of values of the angle -> number of
    items; `unequal`: number of items with more or fewer signs than magnitudes of the angle; `samples`: number of
    samples of the angle; `sentinels`: number of sentinels among them; `magnitudes`: least and greatest of the others;
    `sample_gaps`: for each item, microseconds from its time to the nearest sample; `turns`: frame_name -> steering, if
    the angle is usable.
    """

    scene: str
    damaged: str = ""
    timestamps: dict[str, int | None] = field(default_factory=dict)
    damaged_items: dict[str, str] = field(default_factory=dict)
    signals: Counter = field(default_factory=Counter)
    lengths: Counter = field(default_factory=Counter)
    unequal: int = 0
    samples: int = 0
    sentinels: int = 0
    magnitudes: tuple[float, float] | None = None
    sample_gaps: list[int] = field(default_factory=list)
    turns: dict[str, Turn] = field(default_factory=dict)


# ---------------------------------------------------------------- a frame


def read_frame(
    frame: Frame, kinds: Iterable[str], cameras: dict[str, Camera], decode_pictures: bool = False
) -> FrameFacts:
    """Read the frame's raw files of these kinds.

    Facts that need a camera are None if `cameras` does not have the frame's view. Labels are decoded; only the header
    and the end of a camera picture are read, unless `decode_pictures`.
    """
    facts = FrameFacts(frame)
    camera = cameras.get(frame.view)
    with np.errstate(all="ignore"):  # damaged numbers may overflow; the results are checked
        for kind in sorted(kinds):
            try:
                _read_file(kind, frame.path(kind), camera, facts, decode_pictures)
            except OSError as error:
                facts.damaged[kind] = error.strerror or str(error)
            except Exception as error:  # a decoder may raise anything on a damaged file
                facts.damaged[kind] = str(error) or type(error).__name__
    return facts


def _read_file(kind: str, path: Path, camera: Camera | None, facts: FrameFacts, decode_pictures: bool) -> None:
    match kind:
        case "camera":
            facts.pictures[kind] = _check_picture(path, decode_pictures)
        case "camera_info":
            facts.timestamp = _read_timestamp(path)
        case "label":
            _read_label(path, camera, facts)
        case "lidar":
            facts.lidar = _read_lidar(path, camera)
        case "label3D":
            _read_boxes(path, camera, facts)


def _check_picture(path: Path, decode: bool) -> PictureHeader:
    """The header of a PNG; ImageError if the file is truncated or, with `decode`, damaged anywhere."""
    if decode:
        data = path.read_bytes()
        header = read_png_header(data)
        if header[2:] == PICTURE_TYPE:
            decode_rgb_png(data)
        return header
    with path.open("rb") as file:
        header = read_png_header(file.read(33))
        file.seek(-len(_PNG_END), os.SEEK_END)
        if file.read() != _PNG_END:
            raise ImageError("a damaged PNG (it is truncated: its last chunk is missing)")
    return header


def _read_timestamp(path: Path) -> int | None:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError("no camera JSON: expected an object")
    timestamp = content.get("cam_tstamp")
    return timestamp if isinstance(timestamp, int) and not isinstance(timestamp, bool) else None


def _read_label(path: Path, camera: Camera | None, facts: FrameFacts) -> None:
    data = path.read_bytes()
    header = read_png_header(data)
    foreign_size = camera is not None and header[:2] != camera.recorded_size
    if header[2:] == PICTURE_TYPE and not foreign_size:
        facts.label = count_colours(decode_rgb_png(data))
    facts.pictures["label"] = header


@cache
def _known_colours() -> UInt32[np.ndarray, "55"]:
    """The known colours as r * 65536 + g * 256 + b, sorted."""
    return np.array(sorted(int(text[1:], 16) for text in COLOUR_NAMES), dtype=np.uint32)


def count_colours(label: UInt8[np.ndarray, "h w 3"]) -> LabelFacts:
    """Count a label's pixels by exact colour.

    Labels consist of uniform areas, so runs of equal pixels are sorted instead of pixels, which is ten times as fast.
    """
    packed = cv2.cvtColor(label, cv2.COLOR_RGB2BGRA).view("<u4").ravel()
    starts = np.concatenate([[0], np.flatnonzero(packed[1:] != packed[:-1]) + 1])
    lengths = np.diff(starts, append=packed.size)
    colours, inverse = np.unique(packed[starts] & 0xFFFFFF, return_inverse=True)
    pixels = np.bincount(inverse, weights=lengths).astype(np.int64)
    is_known = np.isin(colours, _known_colours())
    order = np.argsort(-pixels[~is_known], kind="stable")[:_MOST_FOREIGN_COLOURS]
    return LabelFacts(
        known=_name_colours(colours[is_known], pixels[is_known]),
        foreign=int(pixels[~is_known].sum()),
        foreign_colours=_name_colours(colours[~is_known][order], pixels[~is_known][order]),
    )


def _name_colours(colours: np.ndarray, pixels: np.ndarray) -> dict[str, int]:
    return {f"#{colour:06x}": int(count) for colour, count in zip(colours, pixels, strict=True)}


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz, without pickle; prefixes of the raw fusion set's names are removed, which gives the names
    of the labelled datasets."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
    except OSError:
        raise
    except Exception as error:  # a damaged zip raises zlib's, zipfile's, struct's and other errors
        raise ValueError(f"a damaged npz, or one with other than plain arrays ({error})") from error
    return {key.removeprefix("pcloud_attr.").removeprefix("pcloud_"): array for key, array in arrays.items()}


def _read_lidar(path: Path, camera: Camera | None) -> LidarFacts:
    arrays = _read_arrays(path)
    lengths = {name: len(array) if array.ndim else None for name, array in arrays.items()}
    if len(set(lengths.values())) > 1 or None in lengths.values():
        raise ValueError(
            f"arrays of different lengths: {', '.join(f'{key} {n}' for key, n in sorted(lengths.items()))}"
        )
    count = next(iter(lengths.values()), 0)
    finite = np.ones(count, dtype=bool)
    for array in arrays.values():
        if array.dtype.kind == "f":
            finite &= np.isfinite(array.reshape(count, -1)).all(axis=1)
    facts = LidarFacts(
        types={name: str(array.dtype) for name, array in sorted(arrays.items())},
        points=count,
        not_finite=int(count - finite.sum()),
    )
    keep = finite & arrays["valid"].astype(bool) if "valid" in arrays else finite
    measured = {
        name: arrays[name][keep].astype(np.float64)
        for name in (*MAPPING, "distance", "points")
        if name in arrays and keep.any()
    }
    _measure_lidar(measured, camera, facts)
    return facts


def _measure_lidar(arrays: dict[str, np.ndarray], camera: Camera | None, facts: LidarFacts) -> None:
    """Fill in the facts that these arrays, which are not empty, allow to measure."""
    points = arrays.get("points")
    if "depth" in arrays:
        facts.depths = np.histogram(np.clip(arrays["depth"], 0, DEPTH_BINS[-1]), DEPTH_BINS)[0].astype(np.int32)
    if points is not None and "depth" in arrays:
        facts.depth_error = float(np.abs(arrays["depth"] - points[:, 0]).max())
    if points is not None and "distance" in arrays:
        facts.distance_error = float(np.abs(arrays["distance"] - np.linalg.norm(points, axis=1)).max())
    if "row" not in arrays or "col" not in arrays:
        return
    pixels = np.stack([arrays["col"], arrays["row"]], axis=1)
    facts.columns, facts.rows = (
        (float(low), float(high)) for low, high in zip(pixels.min(axis=0), pixels.max(axis=0), strict=True)
    )
    if camera is None:
        return
    size = np.array(camera.recorded_size)
    rounded = np.floor(pixels + 0.5)
    facts.off_pixels = int(((rounded < 0) | (rounded > size - 1)).any(axis=1).sum())
    facts.off_picture = int(((pixels < -1) | (pixels > size)).any(axis=1).sum())
    if points is not None and (points[:, 0] > 0).any():
        ahead = points[:, 0] > 0
        column, row = np.abs(camera.project(points[ahead]) - pixels[ahead]).max(axis=0)
        facts.residual = (float(column), float(row))


def _read_boxes(path: Path, camera: Camera | None, facts: FrameFacts) -> None:
    """Fill in the boxes that can be read; the first entry that cannot be read is the reason in `damaged`."""
    facts.boxes = []
    for number, entry in enumerate(read_label3d(path)):
        try:
            facts.boxes.append(_read_box(entry, camera))
        except (TypeError, ValueError) as error:
            facts.damaged.setdefault("label3D", f"entry {number}: {error}")


def _read_box(entry: dict, camera: Camera | None) -> BoxFacts:
    label = entry.get("class")
    if not isinstance(label, str):
        raise ValueError(f"its class is {label!r}, expected a string")
    bounds, corners = _to_array(entry, "2d_bbox", (4,)), _to_array(entry, "3d_points", (8, 3))
    residual = distance = None
    if corners is not None:
        distance = float(np.linalg.norm(corners.mean(axis=0)))
    if corners is not None and bounds is not None and camera is not None and (corners[:, 0] >= NEAR_METRES).all():
        residual = float(np.abs(find_hull(corners, camera) - bounds).max())
    return BoxFacts(label, None if bounds is None else tuple(bounds.tolist()), residual, distance)


def _to_array(entry: dict, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
    if entry.get(key) is None:
        return None
    array = np.array(entry[key], dtype=np.float64)
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"{key} is not {' x '.join(map(str, shape))} finite numbers")
    return array


# ---------------------------------------------------------------- the bus file of a scene


def read_bus_scene(scene: str, root: Path) -> BusFacts:
    """Read the bus file of a scene under `root`."""
    facts = BusFacts(scene)
    try:
        items = bus.read_bus(bus_path(root, scene))
    except OSError as error:
        facts.damaged = error.strerror or str(error)
        return facts
    except Exception as error:  # the error becomes the file's reason; the other files are still read
        facts.damaged = str(error)
        return facts
    for name, item in items.items():
        try:
            _read_item(name, item, facts)
        except Exception as error:
            facts.damaged_items[name] = str(error)
    return facts


def _read_item(name: str, item: dict, facts: BusFacts) -> None:
    timestamp = item.get("timestamp")
    facts.timestamps[name] = timestamp if isinstance(timestamp, int) and not isinstance(timestamp, bool) else None
    for signal, content in (item.get("flexray") or {}).items():
        facts.signals[signal] += bool((content or {}).get("values"))
    timestamps, magnitudes = bus.read_signal(item, bus.ANGLE)
    facts.lengths[len(magnitudes)] += 1
    if len(magnitudes):
        facts.unequal += len(bus.read_signal(item, f"{bus.ANGLE}_sign")[1]) != len(magnitudes)
    sentinels = bus.is_sentinel(magnitudes)
    facts.samples += len(magnitudes)
    facts.sentinels += int(sentinels.sum())
    angles = magnitudes[~sentinels & np.isfinite(magnitudes)]
    if len(angles):
        low, high = facts.magnitudes or (np.inf, -np.inf)
        facts.magnitudes = (min(low, float(angles.min())), max(high, float(angles.max())))
    if len(timestamps) and facts.timestamps[name] is not None:
        facts.sample_gaps.append(int(np.abs(timestamps - facts.timestamps[name]).min()))
    steering = bus.convert_steering(item)
    if steering is not None:
        yaw_rates = bus.read_signal(item, YAW_RATE)[1]
        yaw_rates = yaw_rates[np.isfinite(yaw_rates)]
        yaw_rate = float(np.median(yaw_rates)) if len(yaw_rates) else None
        facts.turns[name] = Turn(steering["angle_deg"], steering["speed_kmh"], yaw_rate)
