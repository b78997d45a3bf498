"""Raw frame -> derived file: one function for each kind of file, which the preprocessing scripts run on their workers.

Every derived file is in the undistorted view at the derived size. A function returns the outcome of its frame; it
raises only errors that must stop the whole run, such as a full disk.
"""

import errno
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from pathlib import Path
from threading import get_ident

import cv2
import numpy as np
from jaxtyping import UInt8

from a2d2 import bus, images, lidar
from a2d2.boxes import convert_boxes, read_label3d
from a2d2.calibration import Camera, undistortion_maps
from a2d2.classes import IGNORE, colour_table, find_object_class
from a2d2.frames import Frame, bus_path, times_path

STOPPING_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Recipe:
    """What a worker needs besides the frame. `out`: folder of the preprocessed dataset; `cameras`: by view, at the
    derived size; `options`: those of the kind of file; `bus_root`: folder of the bus signals."""

    out: Path
    cameras: dict[str, Camera]
    options: dict = field(default_factory=dict)
    bus_root: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a frame. `status`: "done", "missing" (A2D2 has no such input) or "failed" (an input is damaged).

    `counts`: what the report lists as noticed, such as pixels of unknown colour.
    """

    frame: Frame
    status: str
    reason: str = ""
    counts: dict[str, int] = field(default_factory=dict)


def _report_errors(derive: Callable[[Frame, Recipe], Outcome]) -> Callable[[Frame, Recipe], Outcome]:
    """Return an error of the input as the frame's outcome; raise the errors of STOPPING_ERRORS."""

    @wraps(derive)
    def guarded(frame: Frame, recipe: Recipe) -> Outcome:
        try:
            return derive(frame, recipe)
        except FileNotFoundError as error:
            return Outcome(frame, "missing", f"no {error.filename}")
        except OSError as error:
            if error.errno in STOPPING_ERRORS:
                raise
            return Outcome(frame, "failed", f"{error.filename}: {error.strerror or error}")
        except Exception as error:  # a decoder may raise anything on a damaged file; the other frames must go on
            return Outcome(frame, "failed", f"{type(error).__name__}: {error}")

    return guarded


def _find_camera(frame: Frame, recipe: Recipe) -> Camera:
    if frame.view not in recipe.cameras:
        raise ValueError(f"the calibration has no camera {frame.view}; it has {', '.join(recipe.cameras)}")
    return recipe.cameras[frame.view]


@lru_cache(maxsize=16)
def _bilinear_maps(camera: Camera, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Fixed-point maps into a box-filtered picture: each pixel is the mean of the `block` (width, height) that starts
    there."""
    map_x, map_y = undistortion_maps(camera)
    return cv2.convertMaps(map_x - (block[0] - 1) / 2, map_y - (block[1] - 1) / 2, cv2.CV_16SC2)


@lru_cache(maxsize=16)
def _nearest_maps(camera: Camera) -> tuple[np.ndarray, int]:
    """Fixed-point map to the nearest recorded pixel, and the number of derived pixels outside the recorded image."""
    map_x, map_y = undistortion_maps(camera)
    nearest, _ = cv2.convertMaps(map_x, map_y, cv2.CV_16SC2, nninterpolation=True)
    width, height = camera.recorded_size
    inside = (nearest[..., 0] >= 0) & (nearest[..., 0] < width) & (nearest[..., 1] >= 0) & (nearest[..., 1] < height)
    return nearest, int(inside.size - inside.sum())


@lru_cache(maxsize=16)
def _get_buffers(size: tuple[int, int], thread: int) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W 4"]]:
    """Buffers for one view of (width, height) `size`, reused for all frames: allocating them costs more than filling.

    Each thread has its own buffers, because a dask worker may run several threads.
    """
    width, height = size
    return np.empty((height, width, 3), np.uint8), np.empty((height, width, 4), np.uint8)


def reduce_picture(picture: UInt8[np.ndarray, "h w 3"], camera: Camera) -> UInt8[np.ndarray, "H W 3"]:
    """A recorded picture -> the undistorted view at `camera.size`, without aliasing; black outside the recorded image.

    A box filter over the recorded pixels that a derived pixel covers, then bilinear interpolation. The result is close
    to undistorting at full size and averaging areas, but needs no second picture at full size: the filter overwrites
    `picture` in place.
    """
    block = tuple(
        max(1, round(full / derived)) for full, derived in zip(camera.recorded_size, camera.size, strict=True)
    )
    if block != (1, 1):
        picture = cv2.boxFilter(picture, -1, block, dst=picture, anchor=(0, 0), borderType=cv2.BORDER_REPLICATE)
    return cv2.remap(picture, *_bilinear_maps(camera, block), cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)


def look_up_classes(label: UInt8[np.ndarray, "h w 3"], camera: Camera) -> tuple[UInt8[np.ndarray, "H W"], int]:
    """A recorded label picture -> class map of the undistorted view, and the number of pixels of unknown colour.

    Uses nearest neighbour and exact colours: some of A2D2's colours differ by 18 levels only, so interpolating colours
    or matching similar ones would produce wrong classes (docs/a2d2-format.md, section 5). Pixels of unknown colour and
    pixels outside the recorded image are IGNORE.
    """
    nearest, outside = _nearest_maps(camera)
    colours, padded = _get_buffers(camera.size, get_ident())
    # black, the value outside the recorded image, is no label colour
    cv2.remap(label, nearest, None, cv2.INTER_NEAREST, dst=colours, borderMode=cv2.BORDER_CONSTANT)
    # As little-endian int32, blue, green, red and an alpha of 255 equal the packed colour minus 2^24. The table has
    # 2^24 entries, so this negative index selects the entry of the packed colour: the fastest way to look up this
    # many pixels.
    packed = cv2.cvtColor(colours, cv2.COLOR_RGB2BGRA, dst=padded).view("<i4")[..., 0]
    classes = np.take(colour_table(), packed)
    return classes, int(np.count_nonzero(classes == IGNORE)) - outside


@_report_errors
def derive_camera(frame: Frame, recipe: Recipe) -> Outcome:
    """Recorded camera PNG -> undistorted picture, JPEG or PNG by option `format`."""
    camera = _find_camera(frame, recipe)
    picture = reduce_picture(images.read_rgb_png(frame.path("camera"), camera.recorded_size), camera)
    target = frame.under(recipe.out)
    if recipe.options["format"] == "png":
        images.write_bytes(target.path("image_lossless"), images.encode_png(picture))
    else:
        images.write_bytes(target.path("image"), images.encode_jpeg(picture))
    return Outcome(frame, "done")


@_report_errors
def derive_segmentation(frame: Frame, recipe: Recipe) -> Outcome:
    """Recorded label PNG -> class map of the 38 classes."""
    camera = _find_camera(frame, recipe)
    label = images.read_rgb_png(frame.path("label"), camera.recorded_size)
    classes, unknown = look_up_classes(label, camera)
    images.write_npy(frame.under(recipe.out).path("segmentation"), classes)
    return Outcome(frame, "done", counts={"pixels of unknown colour": unknown} if unknown else {})


@_report_errors
def derive_depth(frame: Frame, recipe: Recipe) -> Outcome:
    """Lidar npz -> sparse depth PNG."""
    camera = _find_camera(frame, recipe)
    try:
        points = lidar.read_lidar(frame.path("lidar"))
    except lidar.MissingLidarError as error:
        return Outcome(frame, "missing", str(error))
    depth = lidar.splat_depth(**points, full=camera.recorded_size, derived=camera.size)
    images.write_bytes(frame.under(recipe.out).path("depth"), images.encode_png(depth))
    return Outcome(frame, "done")


@_report_errors
def derive_boxes(frame: Frame, recipe: Recipe) -> Outcome:
    """label3D -> visible 2-D boxes."""
    small = _find_camera(frame, recipe)
    full = small.resize(small.recorded_size)
    boxes = convert_boxes(read_label3d(frame.path("label3D")), full, small.size)
    images.write_json(frame.under(recipe.out).path("boxes"), {"boxes": boxes})
    foreign = Counter(box["class"] for box in boxes if find_object_class(box["class"]) is None)
    return Outcome(frame, "done", counts={f"boxes of unknown class {name!r}": n for name, n in foreign.items()})


def derive_steering(frames: list[Frame], recipe: Recipe) -> list[Outcome]:
    """Bus file of a scene -> one steering file for each of its frames; the bus file is parsed once."""
    try:
        items = bus.read_bus(bus_path(recipe.bus_root, frames[0].scene))
    except FileNotFoundError as error:
        return [Outcome(frame, "missing", f"no {error.filename}") for frame in frames]
    except (OSError, ValueError, TypeError) as error:
        return [Outcome(frame, "failed", f"{error}") for frame in frames]
    return [_derive_steering_frame(frame, recipe, items) for frame in frames]


def _derive_steering_frame(frame: Frame, recipe: Recipe, items: dict[str, dict]) -> Outcome:
    @_report_errors
    def derive(frame: Frame, recipe: Recipe) -> Outcome:
        item = items.get(frame.path("camera_info").name)
        if item is None:
            return Outcome(frame, "missing", "the bus file has no item for this frame")
        limit_ms = recipe.options.get("limit_ms", bus.LIMIT_MS)
        content = bus.convert_steering(item, limit_ms)
        if content is None:
            return Outcome(frame, "missing", bus.explain_missing(item, limit_ms))
        images.write_json(frame.under(recipe.out).path("steering"), content)
        return Outcome(frame, "done")

    return derive(frame, recipe)


def write_frame_times(frames: list[Frame], out: Path, overwrite: bool = False) -> None:
    """Write `frames.json` beside the derived pictures of each scene and camera: id -> `cam_tstamp` or null.

    `frames` are all frames of the raw dataset, not those of one shard, so every shard writes the same files. Times that
    are there already are kept and not read again, unless `overwrite`.
    """
    groups: dict[Path, list[Frame]] = {}
    for frame in sorted(frames):
        groups.setdefault(times_path(frame.under(out)), []).append(frame)
    for path, members in groups.items():
        known = {} if overwrite else read_frame_times(path)
        times = {frame.id: known.get(frame.id) or _read_timestamp(frame) for frame in members}
        if times != known:
            images.write_json(path, times)


def read_frame_times(path: Path) -> dict[str, int | None]:
    """What `write_frame_times` has written; {} if there is no such file, or a damaged one."""
    try:
        content = images.read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_timestamp(frame: Frame) -> int | None:
    try:
        return int(images.read_json(frame.path("camera_info"))["cam_tstamp"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # two scenes of A2D2 have no camera JSON at all (docs/a2d2-format.md, section 10)
