"""The synthetic dataset: it has A2D2's format, and picture, label, lidar, boxes and bus show the same scene."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from a2d2.bus import convert_steering, read_bus
from a2d2.calibration import load_calibration
from a2d2.classes import COLOUR_NAMES, IGNORE, OBJECT_CLASSES, colour_table
from a2d2.derive import look_up_classes
from a2d2.frames import SCENE_PATTERN, bus_path, find_bus_root, find_calibration, index_frames, list_frames
from a2d2.images import read_rgb_png
from a2d2.lidar import read_lidar
from a2d2.synthetic.render import measure_depth, render_camera
from a2d2.synthetic.world import World, build_lone_moment, build_world, draw_actor
from a2d2.synthetic.writer import describe_bus, describe_rig, list_scene_frames, write_dataset

ROOT = Path(__file__).parents[1]
SIZE = (240, 152)
SCENES, FRAMES, SEED = 3, 2, 0
BOXES = "camera_lidar_semantic_bboxes"
BUS = "camera_lidar_semantic_bus"
LIDAR_TYPES = {  # dtypes of the real lidar file (docs/a2d2-format.md, section 4)
    "azimuth": np.float64,
    "row": np.float64,
    "lidar_id": np.float64,
    "depth": np.float64,
    "reflectance": np.int64,
    "col": np.float64,
    "points": np.float64,
    "timestamp": np.int64,
    "distance": np.float64,
}
MAPPING = {"row", "col", "depth", "distance"}  # what A2D2's defective files lack


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic")
    write_dataset(out, SCENES, FRAMES, SIZE, SEED, workers=1)
    return out


@pytest.fixture(scope="module")
def camera(data):
    return load_calibration(data / BOXES / "cams_lidars.json").cameras["front_center"]


@pytest.fixture(scope="module")
def scans(data):
    """(frame, arrays) of every complete lidar file."""
    loaded = [(frame, dict(np.load(frame.path("lidar")))) for frame in list_frames(data / BOXES, "lidar")]
    whole = [(frame, arrays) for frame, arrays in loaded if set(arrays) >= MAPPING]
    assert whole
    return whole


def read_files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def find_moment(frame):
    """The state of the synthetic world that a frame shows."""
    for index in range(SCENES):
        frames = list_scene_frames(index, FRAMES, frame.root, SEED)
        if frame in frames:
            return build_world(SEED, index, FRAMES).moment(frames.index(frame))
    raise AssertionError(frame)


def test_files_do_not_depend_on_the_workers(data, tmp_path):
    write_dataset(tmp_path, SCENES, FRAMES, SIZE, SEED, workers=2)
    assert read_files(tmp_path) == read_files(data)


def test_another_seed_gives_other_pictures():
    items = [build_world(seed, 0, FRAMES).moment(0).items for seed in (0, 1)]
    assert items[0] != items[1]


def test_a_scene_that_was_stopped_is_finished_and_the_others_are_left_alone(data, tmp_path):
    write_dataset(tmp_path, 2, 1, SIZE, SEED, workers=1)
    before = read_files(tmp_path)
    scenes = sorted(path.name for path in (tmp_path / BUS).iterdir())
    bus_path(tmp_path / BUS, scenes[0]).unlink()
    stopped = list_frames(tmp_path / BOXES, "camera")[0]
    assert stopped.scene == scenes[0]
    stopped.path("camera").unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / BOXES / scenes[1]).rglob("*") if path.is_file()}
    write_dataset(tmp_path, 2, 1, SIZE, SEED, workers=1)
    assert read_files(tmp_path) == before
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_a_folder_made_with_other_options_is_refused_with_both(data):
    command = [sys.executable, "-m", "a2d2.synthetic", "--out", str(data), "--scenes", "5", "--size", "240x152"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"'scenes': {SCENES}" in done.stderr and "'scenes': 5" in done.stderr


def test_layout_is_found_by_the_readers(data):
    frames = list_frames(data / BOXES, "camera")
    assert len(frames) == SCENES * FRAMES
    assert all(SCENE_PATTERN.match(frame.scene) for frame in frames)
    assert find_bus_root(data / BOXES) == data / BUS
    assert find_calibration(data / BOXES) == data / BOXES / "cams_lidars.json"
    assert json.loads((data / BOXES / "class_list.json").read_text()) == COLOUR_NAMES
    for frame in frames:
        info = json.loads(frame.path("camera_info").read_text())
        assert info["cam_name"] == "front_center" and set(info) == {"cam_name", "cam_tstamp", "lidar_ids"}


def test_calibration_at_full_size_is_that_of_the_format_page(tmp_path):
    path = tmp_path / "cams_lidars.json"
    path.write_text(json.dumps(describe_rig((1920, 1208))))
    calibration = load_calibration(path)
    front = calibration.cameras["front_center"]
    assert front.matrix[0, 0] == 1687.3369140625 and front.matrix[1, 2] == pytest.approx(684.4193604186803, abs=1e-9)
    assert len(calibration.cameras) == 6 and len(calibration.lidars) == 5
    for name, camera in calibration.cameras.items():
        assert camera.lens == ("Telecam" if name == "front_center" else "Fisheye")


def test_calibration_scales_as_pixel_centres_do(tmp_path, camera):
    path = tmp_path / "cams_lidars.json"
    path.write_text(json.dumps(describe_rig((1920, 1208))))
    full = load_calibration(path).cameras["front_center"]
    np.testing.assert_allclose(full.resize(SIZE).matrix, camera.matrix, rtol=1e-12)


def test_lidar_files_have_the_real_keys_and_types(data):
    for frame in list_frames(data / BOXES, "lidar"):
        arrays = dict(np.load(frame.path("lidar")))
        assert set(arrays) in (set(LIDAR_TYPES), set(LIDAR_TYPES) - MAPPING)
        for key, array in arrays.items():
            assert array.dtype == LIDAR_TYPES[key], key
            assert array.shape == ((len(array), 3) if key == "points" else (len(array),)), key


def test_lidar_pixels_are_the_projection_of_the_points(scans, camera):
    for _, arrays in scans:
        points = arrays["points"]
        assert len(points) > 3000
        np.testing.assert_allclose(np.stack([arrays["col"], arrays["row"]], 1), camera.project(points), atol=1e-9)
        np.testing.assert_array_equal(arrays["depth"], points[:, 0])
        np.testing.assert_allclose(arrays["distance"], np.linalg.norm(points, axis=1), rtol=1e-12)


def test_lidar_points_lie_on_the_beams_of_the_scanner_the_frame_names(data, scans):
    calibration = load_calibration(data / BOXES / "cams_lidars.json")
    rig = calibration.cameras["front_center"].pose
    for frame, arrays in scans:
        names = json.loads(frame.path("camera_info").read_text())["lidar_ids"]
        assert set(names.values()) == set(calibration.lidars)
        for number in np.unique(arrays["lidar_id"]):
            scanner = calibration.lidars[names[str(int(number))]]
            points = arrays["points"][arrays["lidar_id"] == number] @ rig.axes.T + rig.origin
            x, y, z = ((points - scanner.origin) @ scanner.axes).T
            elevation = np.degrees(np.arctan2(z, np.hypot(x, y)))
            # sixteen beams at odd degrees; the axes are given to five digits
            off = np.abs(elevation - (np.round((elevation + 1) / 2) * 2 - 1))
            assert off.max() < 0.02, (frame, number, off.max())


def test_depth_is_that_of_the_scene_where_the_camera_sees_the_point(scans, camera):
    for frame, arrays in scans:
        ground_truth = measure_depth(find_moment(frame), camera, np.stack([arrays["col"], arrays["row"]], 1))
        behind = ground_truth - arrays["depth"]
        # a point is on the surface that the camera sees or behind it; noise at outlines is the only exception
        tolerance = 0.1 + 0.005 * arrays["depth"]
        assert (behind > tolerance).mean() < 0.01
        assert (np.abs(behind) < tolerance).mean() > 0.8


def test_boxes_are_the_hulls_of_their_corners(data, camera):
    found = 0
    for frame in list_frames(data / BOXES, "label3D"):
        for entry in json.loads(frame.path("label3D").read_text()).values():
            corners = np.array(entry["3d_points"])
            assert entry["class"] in OBJECT_CLASSES
            np.testing.assert_allclose(corners.mean(axis=0), entry["center"], atol=1e-9)
            edges = [np.linalg.norm(corners[a] - corners[b]) for a, b in ((0, 1), (0, 3), (0, 4))]
            np.testing.assert_allclose(edges, entry["size"], atol=1e-9)
            turn = entry["rot_angle"] * entry["axis"][2]
            forward = (corners[1] - corners[0])[:2] / entry["size"][0]
            np.testing.assert_allclose(forward, [math.cos(turn), math.sin(turn)], atol=1e-9)
            assert 0 <= entry["truncation"] <= 1 and 0 <= entry["occlusion"] <= 1
            if corners[:, 0].min() > 0.1:
                pixels = camera.project(corners)
                hull = [*pixels.min(axis=0), *pixels.max(axis=0)]
                np.testing.assert_allclose(entry["2d_bbox"], hull, atol=0.2)
                found += 1
    assert found > 5


def test_every_label_pixel_is_a_known_colour(data):
    table = colour_table()
    seen = set()
    for frame in list_frames(data / BOXES, "label"):
        label = read_rgb_png(frame.path("label"), SIZE).astype(np.uint32)
        classes = table[(label[..., 0] << 16) | (label[..., 1] << 8) | label[..., 2]]
        assert (classes != IGNORE).all()
        seen |= set(np.unique(classes))
    assert len(seen) >= 8


@pytest.mark.parametrize("kind", ["VanSUV", "Truck", "Bus"])
@pytest.mark.parametrize(("ahead", "left", "yaw"), [(14.0, 0.0, 0.0), (20.0, 4.5, 0.6), (24.0, -6.0, 2.0)])
def test_the_mask_of_a_lone_cuboid_fills_its_box(camera, kind, ahead, left, yaw):
    actor = draw_actor(np.random.default_rng(1), kind, 1, ahead, left)
    moment = build_lone_moment(actor, yaw)
    _, label, shown = render_camera(moment, camera)
    classes, unknown = look_up_classes(label, camera)
    vehicle = {"VanSUV": "Car 1", "Truck": "Truck 1", "Bus": "Truck 1"}[kind]
    wanted = colour_table()[int(next(colour for colour, name in COLOUR_NAMES.items() if name == vehicle)[1:], 16)]
    rows, columns = np.nonzero(classes == wanted)
    assert unknown == 0 and shown[0] > 0
    pixels = camera.project(moment.items[0].corners())
    (left_edge, top), (right, bottom) = pixels.min(axis=0), pixels.max(axis=0)
    gaps = [columns.min() - left_edge, rows.min() - top, right - columns.max(), bottom - rows.max()]
    # nearest neighbour shifts a pixel by at most half a recorded and half a derived pixel
    assert min(gaps) > -1.5 and max(gaps) < 2


def test_the_wheel_turns_as_the_car_does(data):
    angles, rates = [], []
    for index in range(12):
        world = build_world(SEED, index, FRAMES)
        for number, frame in enumerate(list_scene_frames(index, FRAMES, data / BOXES, SEED)):
            item = describe_bus(world, number, frame, 1_700_000_000_000_000, np.random.default_rng(index))
            steering = convert_steering(item)
            if steering is not None:
                assert abs(steering["angle_deg"] - world.steering[number]) < 1.5
                angles.append(steering["angle_deg"])
                rates.append(np.median(item["flexray"]["angular_velocity_omega_z"]["values"]))
    assert np.corrcoef(angles, rates)[0, 1] > 0.85
    assert max(np.abs(angles)) > 25


def test_bus_items_name_camera_frames(data):
    names = {frame.path("camera_info").name: frame for frame in list_frames(data / BOXES, "camera_info")}
    joined = 0
    for scene in sorted({frame.scene for frame in names.values()}):
        for name, item in read_bus(bus_path(data / BUS, scene)).items():
            assert item["timestamp"] == json.loads(names[name].path("camera_info").read_text())["cam_tstamp"]
            joined += 1
    assert joined > SCENES * FRAMES / 2


def test_real_roads_have_the_tails_of_real_steering():
    """Against docs/a2d2-format.md, section 7.1: median 6, 90 % under 83, 99 % under 379, best constant 31 degrees."""
    angles = np.concatenate([World(1, index, 4, "real").steering for index in range(250)])
    median, tenth, hundredth = np.quantile(np.abs(angles), [0.5, 0.9, 0.99])
    assert 4 < median < 8 and 60 < tenth < 115 and 280 < hundredth < 500
    assert 25 < np.abs(angles - np.median(angles)).mean() < 40
    winding = np.concatenate([World(1, index, 4).steering for index in range(20)])
    assert np.abs(winding).max() < 120  # those of the demo are as they were


def test_a_complete_dataset_lacks_nothing(tmp_path):
    write_dataset(tmp_path, scenes=3, frames=4, size=(120, 76), workers=1, roads="real", complete=True)
    root = tmp_path / "camera_lidar_semantic_bboxes"
    found = index_frames(root, ("camera", "label", "lidar", "label3D"))
    assert len(found) == 12 and all(len(kinds) == 4 for kinds in found.values())
    for frame in found:
        read_lidar(frame.path("lidar"))  # none is defective
        items = read_bus(bus_path(find_bus_root(root), frame.scene))
        assert convert_steering(items[frame.path("camera_info").name], 100.0) is not None
    with pytest.raises(ValueError, match="was made with"):
        write_dataset(tmp_path, scenes=3, frames=4, size=(120, 76), workers=1)
