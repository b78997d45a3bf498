"""`cams_lidars.json` -> camera models: projection, lens distortion, undistortion maps, mapping to the derived size.

Two image geometries (docs/a2d2-format.md, section 0): camera and label PNGs are distorted, as recorded; lidar, boxes and
everything derived live in the undistorted pinhole view of `CamMatrix`. Integer coordinates are pixel centres. Points
are metres in the camera's frame: x forward, y left, z up.
"""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, Float32


@dataclass(frozen=True)
class Pose:
    """Where a sensor sits in the vehicle's frame: `origin` in metres; columns of `axes` are its x, y and z axes."""

    origin: Float[np.ndarray, " 3"]
    axes: Float[np.ndarray, "3 3"]


@dataclass(frozen=True, eq=False)  # compared by identity, so that maps can be cached by camera
class Camera:
    """One camera. `matrix` is the undistorted pinhole view at `size`, `original` the recorded one at `recorded_size`.

    Sizes are (width, height). `distortion` belongs to `original`: five values for a Telecam (OpenCV's k1, k2, p1, p2,
    k3), four for a Fisheye (OpenCV's fisheye model).
    """

    name: str
    lens: str
    matrix: Float[np.ndarray, "3 3"]
    original: Float[np.ndarray, "3 3"]
    distortion: Float[np.ndarray, " k"]
    recorded_size: tuple[int, int]
    size: tuple[int, int]
    pose: Pose

    def project(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 2"]:
        """Points in front of the camera (x > 0) -> undistorted pixels (column, row); docs/a2d2-format.md, section 4."""
        x, y, z = np.asarray(points, dtype=np.float64).T
        column = self.matrix[0, 2] - self.matrix[0, 0] * y / x
        row = self.matrix[1, 2] - self.matrix[1, 1] * z / x
        return np.stack([column, row], axis=1)

    def distort(self, pixels: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """Undistorted pixels at `size` -> the recorded pixels at `recorded_size` that show the same thing."""
        focal = np.array([self.matrix[0, 0], self.matrix[1, 1]])
        return self._record((np.asarray(pixels, dtype=np.float64) - self.matrix[:2, 2]) / focal)

    def undistort(self, pixels: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """Recorded pixels -> undistorted pixels at `size`: the inverse of `distort`."""
        focal = np.array([self.matrix[0, 0], self.matrix[1, 1]])
        return self.undistort_to_tangents(pixels) * focal + self.matrix[:2, 2]

    def undistort_to_tangents(self, pixels: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """Recorded pixels -> (-y / x, -z / x) of their viewing rays: what each recorded pixel looks at.

        For a Telecam a fixed-point iteration on `_record`, which contracts well at A2D2's mild distortion.
        """
        pixels = np.asarray(pixels, dtype=np.float64)
        if self.lens == "Fisheye":
            criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 100, 1e-12)
            flat = cv2.fisheye.undistortPoints(pixels[:, None], self.original, self.distortion, criteria=criteria)
            return flat[:, 0]
        focal = np.array([self.original[0, 0], self.original[1, 1]])
        tangents = (pixels - self.original[:2, 2]) / focal
        for _ in range(100):
            step = (self._record(tangents) - pixels) / focal
            tangents = tangents - step
            if np.abs(step).max(initial=0) < 1e-10:
                break
        return tangents

    def _record(self, tangents: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """(-y / x, -z / x) of viewing rays -> recorded pixels: the lens (OpenCV's two camera models)."""
        if self.lens == "Fisheye":
            return cv2.fisheye.distortPoints(tangents[:, None], self.original, self.distortion)[:, 0]
        k1, k2, p1, p2, k3 = self.distortion
        x, y = tangents.T
        square = x * x + y * y
        radial = 1 + square * (k1 + square * (k2 + square * k3))
        bent_x = x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x)
        bent_y = y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y
        focal = np.array([self.original[0, 0], self.original[1, 1]])
        return np.stack([bent_x, bent_y], axis=1) * focal + self.original[:2, 2]

    def resize(self, size: tuple[int, int]) -> "Camera":
        """The same view drawn at another size; the recorded geometry stays as it is."""
        scale = np.array(size) / np.array(self.size)
        matrix = self.matrix.copy()
        matrix[0, 0], matrix[1, 1] = matrix[0, 0] * scale[0], matrix[1, 1] * scale[1]
        matrix[:2, 2] = map_centres(matrix[:2, 2], self.size, size)
        return replace(self, matrix=matrix, size=(int(size[0]), int(size[1])))


def map_centres(pixels: Float[np.ndarray, "*n 2"], full: tuple[int, int], derived: tuple[int, int]) -> np.ndarray:
    """Pixel positions at the full size -> at the derived size, pixel centres at integers."""
    scale = np.array(derived, dtype=np.float64) / np.array(full)
    return (np.asarray(pixels) + 0.5) * scale - 0.5


def map_edges(boxes: Float[np.ndarray, "*n 4"], full: tuple[int, int], derived: tuple[int, int]) -> np.ndarray:
    """Boxes [x1, y1, x2, y2] given by pixel positions at the full size -> box edges at the derived size, unclipped.

    A pixel's centre is at an integer in the first and at (i + 0.5) in the second: edges fill [0, W] x [0, H].
    """
    scale = np.array(derived, dtype=np.float64) / np.array(full)
    return (np.asarray(boxes) + 0.5) * np.concatenate([scale, scale])


@lru_cache(maxsize=16)
def undistortion_maps(camera: Camera) -> tuple[Float32[np.ndarray, "h w"], Float32[np.ndarray, "h w"]]:
    """For each pixel of the view at `camera.size`: the column and the row in the recorded image that it shows.

    Positions may lie outside the recorded image. Built once for a camera; do not write to them.
    """
    build = cv2.fisheye.initUndistortRectifyMap if camera.lens == "Fisheye" else cv2.initUndistortRectifyMap
    maps = build(camera.original, camera.distortion, np.eye(3), camera.matrix, camera.size, cv2.CV_32FC1)
    for array in maps:
        array.setflags(write=False)
    return maps


def _read_pose(entry: dict) -> Pose:
    """A view's axes in the file are orthonormal x and y; z = x times y (docs/a2d2-format.md, section 8)."""
    x, y = (np.array(entry["view"][name], dtype=np.float64) for name in ("x-axis", "y-axis"))
    return Pose(np.array(entry["view"]["origin"], dtype=np.float64), np.stack([x, y, np.cross(x, y)], axis=1))


@dataclass(frozen=True)
class Calibration:
    """All cameras by view ("front_center") and the poses of all lidars by name."""

    cameras: dict[str, Camera]
    lidars: dict[str, Pose]


def load_calibration(path: Path) -> Calibration:
    """Read `cams_lidars.json`. ValueError names what is missing or out of place."""
    try:
        content = json.loads(Path(path).read_text())
        cameras = {name: _read_camera(name, entry) for name, entry in content["cameras"].items()}
        lidars = {name: _read_pose(entry) for name, entry in content.get("lidars", {}).items()}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file ({error}); get it again with `sh get_data.sh calibration`") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no A2D2 calibration: {error!r} is missing or of another kind") from error
    return Calibration(cameras, lidars)


def _read_camera(name: str, entry: dict) -> Camera:
    lens = entry["Lens"]
    if lens not in ("Telecam", "Fisheye"):
        raise ValueError(f"camera {name}: lens {lens!r} is neither Telecam nor Fisheye")
    width, height = entry["Resolution"]
    return Camera(
        name=name,
        lens=lens,
        matrix=np.array(entry["CamMatrix"], dtype=np.float64),
        original=np.array(entry["CamMatrixOriginal"], dtype=np.float64),
        distortion=np.array(entry["Distortion"], dtype=np.float64).ravel(),
        recorded_size=(int(width), int(height)),
        size=(int(width), int(height)),
        pose=_read_pose(entry),
    )
