"""`cams_lidars.json` -> camera models: projection, lens distortion, undistortion maps, mapping to the derived size.

There are two image geometries (docs/a2d2-format.md, section 0): camera and label PNGs are distorted, as recorded;
lidar, boxes and all derived files are in the undistorted pinhole view of `CamMatrix`. Integer coordinates are pixel
centres. Points are in metres in the camera's coordinate frame: x forward, y left, z up.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, Float32

from a2d2.images import read_json


@dataclass(frozen=True)
class Pose:
    """Pose of a sensor in the vehicle's coordinate frame: `origin` in metres; columns of `axes`: its x, y, z axes."""

    origin: Float[np.ndarray, " 3"]
    axes: Float[np.ndarray, "3 3"]


@dataclass(frozen=True, eq=False)  # compared by identity, so that maps can be cached by camera
class Camera:
    """One camera. `matrix`: intrinsics of the undistorted view at `size`; `original`: those of the recorded image.

    Sizes are (width, height); the recorded image has `recorded_size`. `distortion` belongs to `original`: five values
    for a Telecam (OpenCV's k1, k2, p1, p2, k3), four for a Fisheye (OpenCV's fisheye model).
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
        """Undistorted pixels at `size` -> the recorded pixels at `recorded_size` of the same viewing rays."""
        focal = np.array([self.matrix[0, 0], self.matrix[1, 1]])
        return self._record((np.asarray(pixels, dtype=np.float64) - self.matrix[:2, 2]) / focal)

    def undistort(self, pixels: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """Recorded pixels -> undistorted pixels at `size`: the inverse of `distort`."""
        focal = np.array([self.matrix[0, 0], self.matrix[1, 1]])
        return self.undistort_to_tangents(pixels) * focal + self.matrix[:2, 2]

    def undistort_to_tangents(self, pixels: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """Recorded pixels -> (-y / x, -z / x) of their viewing rays.

        For a Telecam by fixed-point iteration on `_record`, which converges fast because A2D2's distortion is mild.
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
        """(-y / x, -z / x) of viewing rays -> recorded pixels, by OpenCV's two models of a lens."""
        if self.lens == "Fisheye":
            return cv2.fisheye.distortPoints(tangents[:, None], self.original, self.distortion)[:, 0]
        k1, k2, p1, p2, k3 = self.distortion
        x, y = tangents.T
        square = x * x + y * y
        radial = 1 + square * (k1 + square * (k2 + square * k3))
        distorted_x = x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x)
        distorted_y = y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y
        focal = np.array([self.original[0, 0], self.original[1, 1]])
        return np.stack([distorted_x, distorted_y], axis=1) * focal + self.original[:2, 2]

    def resize(self, size: tuple[int, int]) -> "Camera":
        """The same view at another (width, height); the recorded geometry does not change."""
        scale = np.array(size) / np.array(self.size)
        matrix = self.matrix.copy()
        matrix[0, 0], matrix[1, 1] = matrix[0, 0] * scale[0], matrix[1, 1] * scale[1]
        matrix[:2, 2] = map_centres(matrix[:2, 2], self.size, size)
        return replace(self, matrix=matrix, size=(int(size[0]), int(size[1])))


def map_centres(pixels: Float[np.ndarray, "*n 2"], full: tuple[int, int], derived: tuple[int, int]) -> np.ndarray:
    """Pixel positions at size `full` -> at size `derived`, both (width, height); pixel centres are at integers."""
    scale = np.array(derived, dtype=np.float64) / np.array(full)
    return (np.asarray(pixels) + 0.5) * scale - 0.5


def map_edges(boxes: Float[np.ndarray, "*n 4"], full: tuple[int, int], derived: tuple[int, int]) -> np.ndarray:
    """Boxes [x1, y1, x2, y2] in pixel positions at size `full` -> box edges at size `derived`, unclipped.

    Pixel centres are at integers in the input and at i + 0.5 in the output, whose edges lie in [0, W] x [0, H].
    """
    scale = np.array(derived, dtype=np.float64) / np.array(full)
    return (np.asarray(boxes) + 0.5) * np.concatenate([scale, scale])


@lru_cache(maxsize=16)
def undistortion_maps(camera: Camera) -> tuple[Float32[np.ndarray, "h w"], Float32[np.ndarray, "h w"]]:
    """For each pixel of the view at `camera.size`: its column and its row in the recorded image.

    Positions may lie outside the recorded image. The maps are cached by camera, and read-only for that reason.
    """
    build = cv2.fisheye.initUndistortRectifyMap if camera.lens == "Fisheye" else cv2.initUndistortRectifyMap
    maps = build(camera.original, camera.distortion, np.eye(3), camera.matrix, camera.size, cv2.CV_32FC1)
    for array in maps:
        array.setflags(write=False)
    return maps


def _read_pose(entry: dict) -> Pose:
    """The file has orthonormal axes x and y of a view; z is their cross product (docs/a2d2-format.md, section 8)."""
    x, y = (np.array(entry["view"][name], dtype=np.float64) for name in ("x-axis", "y-axis"))
    return Pose(np.array(entry["view"]["origin"], dtype=np.float64), np.stack([x, y, np.cross(x, y)], axis=1))


@dataclass(frozen=True)
class Calibration:
    """All cameras by view ("front_center") and the poses of all lidars by name."""

    cameras: dict[str, Camera]
    lidars: dict[str, Pose]


def load_calibration(path: Path) -> Calibration:
    """Read `cams_lidars.json`. ValueError if the file is no JSON or lacks a value; the message names what is wrong."""
    try:
        try:
            content = read_json(path)
        except ValueError as error:
            raise ValueError(
                f"{path} is no JSON file ({error}); get it again with `sh get_data.sh calibration`"
            ) from error
        cameras = {name: _read_camera(name, entry) for name, entry in content["cameras"].items()}
        lidars = {name: _read_pose(entry) for name, entry in content.get("lidars", {}).items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no A2D2 calibration: {error!r} is missing or has another type") from error
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
