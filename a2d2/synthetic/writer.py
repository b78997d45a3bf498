"""Writes small synthetic scenes in the raw A2D2 format, for the demo and the tests.

Distorted camera and label PNGs, lidar npz, label3D and camera JSON, bus signals, `cams_lidars.json`, `class_list.json`.
The files depend on the seed only, not on the number of workers; finished scenes are not written again. Unless
all is to be complete, some frames lack some labels, and A2D2's known defects occur (docs/a2d2-format.md, section 10).
"""

import io
import multiprocessing
import os
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from a2d2.boxes import find_hull
from a2d2.calibration import Calibration, load_calibration, map_centres
from a2d2.checks.known import FRONT_MATRIX, FULL_SIZE
from a2d2.classes import COLOUR_NAMES
from a2d2.frames import Frame, bus_path
from a2d2.images import encode_png, read_json, sweep_temporary, write_bytes, write_json
from a2d2.synthetic.render import render_camera, scan_lidars
from a2d2.synthetic.world import Item, Moment, World, build_world

VIEW = "front_center"
_FARTHEST_BOX = 80.0  # metres; A2D2 does not label far objects
_FEWEST_PIXELS = 40  # visible pixels of a labelled object, in a picture of 960 x 604
_START = datetime(2020, 3, 2, 8, 0, 0, tzinfo=UTC)  # after the last drive of A2D2
_BUS_SAMPLES = 21

# docs/a2d2-format.md, section 8; all digits are published for front_center only
_CAMERAS = {
    "front_left": ((825.102, 824.194, 959.462, 642.449), (972.209, 971.139, 959.779, 631.221), (-0.037519, -0.005757)),
    "front_right": ((812.140, 811.025, 999.365, 650.772), (966.532, 965.205, 976.425, 636.880), (-0.055302, 0.010081)),
    "side_left": ((821.968, 822.163, 989.876, 654.829), (970.069, 970.299, 972.363, 639.873), (-0.043374, 0.0)),
    "side_right": ((817.821, 817.963, 1004.414, 646.039), (966.131, 966.298, 978.181, 633.558), (-0.042989, 0.0)),
    "rear_center": ((820.105, 821.806, 994.854, 647.741), (966.614, 968.618, 976.181, 635.484), (-0.050297, 0.019883)),
}
_CAMERA_ORIGINS = {
    "front_left": (1.711, 0.58, 0.943),
    "front_right": (1.711, -0.58, 0.943),
    "side_left": (0.651, 0.58, 0.943),
    "side_right": (0.651, -0.58, 0.943),
    "rear_center": (-0.409, 0.0, 0.943),
}
# rough viewing directions in degrees; docs/a2d2-format.md, section 8, has the exact ones, and no file depends on them
_CAMERA_HEADINGS = {"front_left": 45, "front_right": -45, "side_left": 90, "side_right": -90, "rear_center": 180}
_LIDARS = {
    "front_center": ((1.7184, 0, 1.12014), (-0.00784, -0.99993, -0.00913), (0.98072, -0.00591, -0.19533)),
    "front_left": ((1.71155, 0.63093, 1.11836), (0.99972, -0.02247, -0.00765), (0.01358, 0.80574, -0.59211)),
    "front_right": ((1.70572, -0.65463, 1.11621), (-0.99986, 0.01066, 0.01281), (-0.01623, -0.79801, -0.60242)),
    "rear_left": ((-0.43095, 0.58801, 1.14796), (0.94294, -0.00744, 0.33288), (0.09088, 0.96754, -0.23580)),
    "rear_right": ((-0.43359, -0.60503, 1.11831), (-0.94611, 0.02228, -0.32309), (0.06774, -0.96195, -0.26470)),
}


def _scale_matrix(values: tuple[float | int, ...], size: tuple[int, int]) -> list[list[float]]:
    fx, fy, cx, cy = values
    x, y = size[0] / FULL_SIZE[0], size[1] / FULL_SIZE[1]
    cx, cy = map_centres(np.array([cx, cy]), FULL_SIZE, size).tolist()
    return [[fx * x, 0.0, cx], [0.0, fy * y, cy], [0.0, 0.0, 1.0]]


def describe_rig(size: tuple[int, int]) -> dict:
    """The content of cams_lidars.json for pictures of (width, height) `size`."""
    cameras = {
        VIEW: {
            "tstamp_delay": 25000,
            "view": {
                "origin": [1.711045726422736, -5.735179668849011e-09, 0.9431449279047172],
                "x-axis": [0.9997595802751106, 0.021372184646008877, -0.004900139956328717],
                "y-axis": [-0.021482638328964472, 0.9994877740097232, -0.02372100030596073],
            },
            "Lens": "Telecam",
            "CamMatrix": _scale_matrix(FRONT_MATRIX, size),
            "CamMatrixOriginal": _scale_matrix(
                (1844.1774422790927, 1841.5212239377258, 964.42990523863864, 679.5331911948183), size
            ),
            "Distortion": [[-0.2611312587700434, 0.0, 0.0, 0.0, 0.0]],
            "Resolution": list(size),
        }
    }
    for name, (matrix, original, distortion) in _CAMERAS.items():
        heading = np.deg2rad(_CAMERA_HEADINGS[name])
        cameras[name] = {
            "tstamp_delay": 25000,
            "view": {
                "origin": list(_CAMERA_ORIGINS[name]),
                "x-axis": [float(np.cos(heading)), float(np.sin(heading)), 0.0],
                "y-axis": [float(-np.sin(heading)), float(np.cos(heading)), 0.0],
            },
            "Lens": "Fisheye",
            "CamMatrix": _scale_matrix(matrix, size),
            "CamMatrixOriginal": _scale_matrix(original, size),
            "Distortion": [[*distortion, 0.0, 0.0]],
            "Resolution": list(size),
        }
    lidars = {
        name: {"view": {"origin": list(origin), "x-axis": list(x), "y-axis": list(y)}}
        for name, (origin, x, y) in _LIDARS.items()
    }
    view = {"origin": [0.0, 0.0, 0.0], "x-axis": [1.0, 0.0, 0.0], "y-axis": [0.0, 1.0, 0.0]}
    extent = {"x-range": [-1.0, 4.0], "y-range": [-1.25, 1.25], "z-range": [-0.75, 1.5]}
    return {"vehicle": {"view": view, "ego-dimensions": extent}, "lidars": lidars, "cameras": cameras}


def name_scene(index: int) -> str:
    """A scene name "YYYYMMDD_hhmmss" that A2D2 does not have."""
    return (_START + timedelta(minutes=7 * index, seconds=11 * index)).strftime("%Y%m%d_%H%M%S")


def list_scene_frames(index: int, frames: int, root: Path, seed: int) -> list[Frame]:
    """The frames of a scene; their ids rise with gaps."""
    gaps = np.random.default_rng([seed, index, 2]).integers(20, 200, frames)
    return [Frame(name_scene(index), VIEW, f"{number:09d}", root) for number in np.cumsum(gaps)]


# ---------------------------------------------------------------- files of a frame


def describe_boxes(moment: Moment, camera, shown: dict[int, int], rng: np.random.Generator) -> dict:
    """The content of label3D: the objects that are near enough and visible; some frames have exact duplicates."""
    entries = []
    fewest = _FEWEST_PIXELS * camera.recorded_size[0] * camera.recorded_size[1] / (960 * 604)
    for number, item in enumerate(moment.items):
        corners = item.corners()
        hull = find_hull(corners, camera)
        if hull is None or item.centre[0] > _FARTHEST_BOX or shown.get(number, 0) < fewest:
            continue
        entries.append(_describe_box(item, corners, hull, camera, shown[number], len(entries)))
    if entries and rng.random() < 0.06:
        entries += [entries[rng.integers(len(entries))]] * int(rng.integers(1, 4))
    return {f"box_{number}": entry for number, entry in enumerate(entries)}


def _describe_box(item: Item, corners: np.ndarray, hull: np.ndarray, camera, pixels: int, number: int) -> dict:
    width, height = camera.size
    clipped = np.clip(hull, 0, [width, height, width, height])
    area = (clipped[2] - clipped[0]) * (clipped[3] - clipped[1])
    whole = (hull[2] - hull[0]) * (hull[3] - hull[1])
    if (corners[:, 0] > 0.1).all():
        unclipped = hull
    else:  # as in A2D2, corners near or behind the camera give boxes of arbitrary size
        x = np.where(np.abs(corners[:, :1]) < 0.1, 0.1, np.abs(corners[:, :1]))
        pixel = camera.project(np.concatenate([x, corners[:, 1:]], axis=1))
        unclipped = np.concatenate([pixel.min(axis=0), pixel.max(axis=0)])
    return {
        "2d_bbox": [round(float(value), 4) for value in unclipped],
        "3d_points": corners.tolist(),
        "alpha": 0.0,
        "axis": [0.0, 0.0, 1.0 if item.yaw >= 0 else -1.0],
        "center": [float(value) for value in item.centre],
        "class": item.kind,
        "id": number,
        "occlusion": float(np.clip(1 - pixels / max(0.75 * area, 1), 0, 1).round(2)),
        "rot_angle": abs(float(item.yaw)),
        "size": [float(value) for value in item.size],
        "truncation": float(np.clip(1 - area / max(whole, 1e-9), 0, 1).round(2)),
    }


def encode_lidar(scan: dict[str, np.ndarray], camera, moment_us: int, broken: bool) -> bytes:
    """npz with A2D2's keys and dtypes; if `broken`, without the arrays that A2D2's defective files lack."""
    points = scan["points"]
    pixels = camera.project(points) if len(points) else np.zeros((0, 2))
    arrays = {
        "azimuth": scan["azimuth"].astype(np.float64),
        "row": pixels[:, 1],
        "lidar_id": scan["lidar_id"].astype(np.float64),
        "depth": points[:, 0],
        "reflectance": scan["reflectance"],
        "col": pixels[:, 0],
        "points": points,
        "timestamp": moment_us + np.linspace(-100000, 100000, len(points)).astype(np.int64),
        "distance": np.linalg.norm(points, axis=1),
    }
    if broken:
        for key in ("row", "col", "depth", "distance"):
            del arrays[key]
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def describe_bus(
    world: World, number: int, frame: Frame, moment_us: int, rng: np.random.Generator, complete: bool = False
) -> dict:
    """One item of the bus file: signals around the frame's time `moment_us`, with the frame's values at that time.

    complete: with a valid steering angle in any case.
    """
    offsets = (np.arange(_BUS_SAMPLES) - _BUS_SAMPLES // 2) * 10_000
    timestamps = (moment_us + offsets).tolist()
    angles = world.steering[number] + world.angle_rates[number] * offsets / 1e6
    magnitude = np.round(np.abs(angles) / 0.15) * 0.15
    sign = (angles < 0).astype(int)
    draw = 1.0 if complete else rng.random()
    if draw < 0.02:
        magnitude[:] = 614.10
    elif draw < 0.06:
        magnitude[rng.integers(0, 4, 2)] = 614.25
    speed = world.speeds[number] * 3.6
    signals = {
        "steering_angle": (np.abs(angles) * 0.21, "Unit_DegreOfArc"),
        "steering_angle_sign": (sign, None),
        "steering_angle_calculated": (magnitude.round(2), "Unit_DegreOfArc"),
        "steering_angle_calculated_sign": (sign, None),
        "vehicle_speed": (np.full(_BUS_SAMPLES, round(speed, 2)), "Unit_KiloMeterPerHour"),
        "angular_velocity_omega_z": (
            world.yaw_rates[number] + rng.normal(0, 0.1, _BUS_SAMPLES), "Unit_DegreOfArcPerSecon",
        ),
        "acceleration_x": (rng.normal(0, 0.2, _BUS_SAMPLES), "Unit_MeterPerSeconSquar"),
        "acceleration_y": (rng.normal(speed / 3.6 * np.deg2rad(world.yaw_rates[number]), 0.1, _BUS_SAMPLES),
                           "Unit_MeterPerSeconSquar"),
        "acceleration_z": (rng.normal(9.81, 0.2, _BUS_SAMPLES), "Unit_MeterPerSeconSquar"),
        "angular_velocity_omega_x": (rng.normal(0, 0.3, _BUS_SAMPLES), "Unit_DegreOfArcPerSecon"),
        "angular_velocity_omega_y": (rng.normal(0, 0.3, _BUS_SAMPLES), "Unit_DegreOfArcPerSecon"),
        "pitch_angle": (rng.normal(0, 0.3, _BUS_SAMPLES), "Unit_DegreOfArc"),
        "roll_angle": (rng.normal(0, 0.3, _BUS_SAMPLES), "Unit_DegreOfArc"),
        "accelerator_pedal": (np.full(_BUS_SAMPLES, 12.0), "Unit_PerCent"),
        "accelerator_pedal_gradient_sign": (np.zeros(_BUS_SAMPLES, dtype=int), None),
        "brake_pressure": (np.zeros(_BUS_SAMPLES), "Unit_Bar"),
        "driving_direction": (np.full(_BUS_SAMPLES, 1), None),
        "gear": (np.full(_BUS_SAMPLES, 11), None),
    }  # fmt: skip
    flexray = {
        name: {"timestamps": timestamps, "values": np.asarray(values).tolist(), "unit": unit}
        for name, (values, unit) in signals.items()
    }
    if 0.06 <= draw < 0.08:
        flexray["steering_angle_calculated"] = {"timestamps": [], "values": [], "unit": "Unit_DegreOfArc"}
    return {"frame_name": frame.path("camera_info").name, "timestamp": moment_us, "flexray": flexray}


@lru_cache(maxsize=1)
def _load_rig(path: Path) -> Calibration:
    """Cached for all scenes of a worker, because the cache of a camera's rays needs the same Camera object."""
    return load_calibration(path)


def write_scene(index: int, out: Path, frames: int, seed: int, roads: str = "winding", complete: bool = False) -> int:
    """Write all files of a scene, its bus file last; return the number of frames."""
    cv2.setNumThreads(1)
    root = out / "camera_lidar_semantic_bboxes"
    calibration = _load_rig(root / "cams_lidars.json")
    finished = bus_path(out / "camera_lidar_semantic_bus", name_scene(index))
    if finished.is_file():
        return frames
    world = build_world(seed, index, frames, roads)
    bus = []
    for number, frame in enumerate(list_scene_frames(index, frames, root, seed)):
        rng = np.random.default_rng([seed, index, number, 3])
        moment_us = int(datetime.strptime(frame.scene, "%Y%m%d_%H%M%S").replace(tzinfo=UTC).timestamp() * 1e6)
        moment_us += int(world.times[number] * 1e6)
        _write_frame(world.moment(number), frame, calibration, moment_us, rng, complete)
        if complete or rng.random() > 0.06:
            bus.append(describe_bus(world, number, frame, moment_us, rng, complete))
    write_json(finished, bus)
    return frames


def _write_frame(
    moment: Moment, frame: Frame, calibration: Calibration, moment_us: int, rng: np.random.Generator, complete: bool
) -> None:
    camera = calibration.cameras[VIEW]
    picture, label, shown = render_camera(moment, camera)
    has_label, has_lidar, has_boxes = (rng.random(3) > (0.06, 0.05, 0.06)) | complete
    write_bytes(frame.path("camera"), encode_png(picture))
    lidar_ids = {str(number): name for number, name in enumerate(calibration.lidars)}
    write_json(frame.path("camera_info"), {"cam_name": VIEW, "cam_tstamp": moment_us, "lidar_ids": lidar_ids})
    if has_label:
        write_bytes(frame.path("label"), encode_png(label))
    if has_lidar:
        scan = scan_lidars(moment, calibration, camera)
        write_bytes(
            frame.path("lidar"), encode_lidar(scan, camera, moment_us, broken=rng.random() < 0.02 and not complete)
        )
    if has_boxes:
        write_json(frame.path("label3D"), describe_boxes(moment, camera, shown, rng))


# ---------------------------------------------------------------- the dataset


def write_dataset(
    out: Path, scenes: int = 64, frames: int = 8, size: tuple[int, int] = (960, 604), seed: int = 0,
    workers: int | None = None, roads: str = "winding", complete: bool = False,
) -> None:  # fmt: skip
    """Write all scenes under `out`; resume if an earlier call was stopped. `size`: (width, height) of the pictures;
    `roads`: see `a2d2.synthetic.world.draw_road`; `complete`: every frame has all labels, and no file is defective.

    ValueError, with both values, if the folder contains a dataset made with other options.
    """
    out = Path(out)
    options = {"scenes": scenes, "frames": frames, "size": list(size), "seed": seed}
    options |= {} if roads == "winding" else {"roads": roads}
    options |= {"complete": True} if complete else {}
    path = out / "synthetic.json"
    if path.is_file():
        found = read_json(path)
        if found != options:
            raise ValueError(f"{out} was made with {found}, this call has {options}; delete it or choose another --out")
    else:
        root = out / "camera_lidar_semantic_bboxes"
        write_json(root / "cams_lidars.json", describe_rig(size))
        write_json(root / "class_list.json", COLOUR_NAMES)
        write_json(path, options)
    sweep_temporary(out)
    left = [
        index for index in range(scenes)
        if not bus_path(out / "camera_lidar_semantic_bus", name_scene(index)).is_file()
    ]  # fmt: skip
    if not left:
        return
    work = partial(write_scene, out=out, frames=frames, seed=seed, roads=roads, complete=complete)
    workers = min(workers or len(os.sched_getaffinity(0)), len(left))
    with tqdm(total=len(left) * frames, desc="synthetic scenes", unit="frame") as bar:
        if workers == 1:
            for index in left:
                bar.update(work(index))
            return
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by numpy in each worker; the workers run in parallel
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for written in pool.imap_unordered(work, left):
                bar.update(written)
