"""A hand-made raw dataset in A2D2's layout: small pictures whose derived files a test can compute."""

import json

import cv2
import numpy as np

from a2d2.frames import Frame, bus_path

RECORDED = (96, 64)
SCENES = ("20180101_000000", "20180102_000000")
VIEW = "front_center"
ROAD, SKY = (255, 0, 255), (135, 206, 255)  # the label: sky above, road below
ANGLE = -30.0  # of every frame, degrees: to the right
POINTS = np.array(
    [[10.0, 0.0, 0.0], [20.0, 2.0, -1.0], [40.0, -6.0, 3.0], [5.0, 30.0, 0.0]]
)  # the last is outside the picture
CORNERS = np.array([[x, y, z] for x in (18.0, 22.0) for y in (-3.0, -1.0) for z in (-1.5, 0.0)])

# front_center of docs/a2d2-format.md, section 8, whose pictures are 1920 x 1208
_MATRIX = [[1687.3369140625, 0, 965.43414055823814], [0, 1783.428466796875, 684.4193604186803], [0, 0, 1]]
_ORIGINAL = [[1844.1774422790927, 0, 964.42990523863864], [0, 1841.5212239377258, 679.5331911948183], [0, 0, 1]]
_DISTORTION = [[-0.2611312587700434, 0, 0, 0, 0]]


def _shrink(matrix):
    """The same lens on a sensor of RECORDED pixels, centres at integers."""
    matrix = np.array(matrix)
    scale = np.array(RECORDED) / (1920, 1208)
    matrix[0, 0], matrix[1, 1] = matrix[0, 0] * scale[0], matrix[1, 1] * scale[1]
    matrix[:2, 2] = (matrix[:2, 2] + 0.5) * scale - 0.5
    return matrix


def project(points):
    """Undistorted pixels (column, row) at the recorded size."""
    matrix, (x, y, z) = _shrink(_MATRIX), points.T
    return np.stack([matrix[0, 2] - matrix[0, 0] * y / x, matrix[1, 2] - matrix[1, 1] * z / x], axis=1)


def encode(picture):
    """RGB, RGBA or gray -> the bytes of a PNG."""
    if picture.ndim == 3:
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR if picture.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
    return cv2.imencode(".png", picture)[1].tobytes()


def draw_label():
    label = np.empty((RECORDED[1], RECORDED[0], 3), np.uint8)
    label[:32], label[32:] = SKY, ROAD
    return label


def draw_picture():
    """A smooth picture, which resampling and JPEG hardly change."""
    row, column = np.mgrid[: RECORDED[1], : RECORDED[0]]
    return np.stack([column * 2, row * 3, column + row], axis=2).astype(np.uint8)


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def _describe_calibration():
    view = {"origin": [1.7, 0.0, 0.9], "x-axis": [1.0, 0.0, 0.0], "y-axis": [0.0, 1.0, 0.0]}
    camera = {
        "view": view,
        "Lens": "Telecam",
        "CamMatrix": _shrink(_MATRIX).tolist(),
        "CamMatrixOriginal": _shrink(_ORIGINAL).tolist(),
        "Distortion": _DISTORTION,
        "Resolution": list(RECORDED),
    }
    return {"cameras": {VIEW: camera}, "lidars": {}}


def _describe_boxes():
    pixels = project(CORNERS)
    car = {
        "class": "Car",
        "id": 0,
        "2d_bbox": [*pixels.min(axis=0), *pixels.max(axis=0)],
        "3d_points": CORNERS.tolist(),
        "center": [20.0, -2.0, -0.75],
        "occlusion": 0.0,
        "truncation": 0.0,
    }
    behind = {"class": "Bus", "id": 2, "2d_bbox": [0, 0, 9, 9], "3d_points": (CORNERS - [60, 0, 0]).tolist()}
    return {"box_0": car, "box_1": car | {"id": 1}, "box_2": behind}


def _describe_bus(frame, timestamp):
    times = [timestamp - 20000, timestamp + 1000, timestamp + 30000]
    return {
        "frame_name": frame.path("camera_info").name,
        "timestamp": timestamp,
        "flexray": {
            "steering_angle_calculated": {"timestamps": times, "values": [1.5, abs(ANGLE), 614.25]},
            "steering_angle_calculated_sign": {"timestamps": times, "values": [0, 1, 0]},
            "vehicle_speed": {"timestamps": times, "values": [10.0, 20.0, 30.0]},
        },
    }


def write_raw_set(folder, frames=4):
    """Write two scenes of `frames` frames with all kinds of files; return the folder of the raw dataset."""
    root = folder / "camera_lidar_semantic_bboxes"
    _write(root / "cams_lidars.json", _describe_calibration())
    picture, label, boxes = encode(draw_picture()), encode(draw_label()), _describe_boxes()
    column, row = project(POINTS).T
    for scene in SCENES:
        items = []
        for number in range(1, frames + 1):
            frame = Frame(scene, VIEW, f"{number:09d}", root)
            timestamp = 1_500_000_000_000_000 + number * 1_000_000
            _write(frame.path("camera"), picture)
            _write(frame.path("camera_info"), {"cam_tstamp": timestamp})
            _write(frame.path("label"), label)
            _write(frame.path("label3D"), boxes)
            frame.path("lidar").parent.mkdir(parents=True, exist_ok=True)
            np.savez(frame.path("lidar"), points=POINTS, row=row, col=column, depth=POINTS[:, 0])
            items.append(_describe_bus(frame, timestamp))
        _write(bus_path(folder / "camera_lidar_semantic_bus", scene), items)
    return root
