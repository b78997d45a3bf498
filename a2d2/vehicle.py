"""The car that recorded A2D2, as far as a picture needs it: the path that an angle of the steering wheel means.

An Audi Q7 e-tron (arXiv 2004.06320). Wheelbase and steering ratio are the maker's nominal values; the ratio changes a
little with the angle, so a path is a picture and no measurement. The height of the camera was measured on the lidar
points of one frame: the road is a plane 1.68 m below it, parallel to the optical axis within 0.1 degrees.
"""

import numpy as np
from jaxtyping import Float64

from a2d2.calibration import Pose

WHEELBASE = 2.99  # metres
STEERING_RATIO = 15.8  # degrees of the steering wheel for one of the front wheels
CAMERA_HEIGHT = 1.68  # metres above the road
HALF_TRACK = 0.85  # metres from the middle of the car to its wheels
REAR_AXLE = 1.71  # metres behind the front cameras: the origin of the vehicle's frame (docs/a2d2-format.md, section 8)


def find_curvature(angle_deg: float) -> float:
    """1 / metres of the rear axle's path, left positive, at an angle of the steering wheel in degrees, left positive:
    the kinematic bicycle model."""
    return float(np.tan(np.deg2rad(angle_deg / STEERING_RATIO)) / WHEELBASE)


def trace_path(angle_deg: float, length: float = 40.0, points: int = 100) -> Float64[np.ndarray, "2 n 2"]:
    """The tracks of the left and the right wheels on the road, (x forward, y left) in metres from the rear axle."""
    curvature = find_curvature(angle_deg)
    along = np.linspace(0, length, points)
    turned = curvature * along
    if abs(curvature) < 1e-9:
        x, y = along, np.zeros_like(along)
    else:
        x, y = np.sin(turned) / curvature, (1 - np.cos(turned)) / curvature
    left = np.stack([-np.sin(turned), np.cos(turned)], axis=1) * HALF_TRACK
    middle = np.stack([x, y], axis=1)
    return np.stack([middle + left, middle - left])


def project_path(
    angle_deg: float, matrix: Float64[np.ndarray, "3 3"], pose: Pose | None, length: float = 40.0
) -> list[Float64[np.ndarray, "n 2"]]:
    """The tracks of the wheels in pixels (column, row) of the front camera with this pinhole matrix, as far as they are
    in front of it.

    pose: where the camera looks; by default straight ahead.
    """
    tracks = []
    for track in trace_path(angle_deg, length):
        x, y = track[:, 0] - REAR_AXLE, track[:, 1]
        if pose is not None:
            ahead = pose.axes[0, 0], pose.axes[0, 1]  # of the vehicle's forward axis along the camera's x and y
            norm = np.hypot(*ahead)
            x, y = (x * ahead[0] - y * ahead[1]) / norm, (x * ahead[1] + y * ahead[0]) / norm
        seen = x > 1.0
        column = matrix[0, 2] - matrix[0, 0] * y[seen] / x[seen]
        row = matrix[1, 2] + matrix[1, 1] * CAMERA_HEIGHT / x[seen]
        tracks.append(np.stack([column, row], axis=1))
    return tracks
