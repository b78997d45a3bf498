"""Lidar, boxes and bus: derived content of raw files, compared with a simple computation of the same."""

import json

import numpy as np
import pytest

from a2d2.boxes import NEAR_METRES, convert_boxes, find_hull, read_label3d
from a2d2.bus import convert_steering, explain_missing, read_bus
from a2d2.calibration import Camera, Pose
from a2d2.lidar import MissingLidarError, read_lidar, splat_depth

FULL, DERIVED = (200, 100), (100, 50)
CAMERA = Camera(
    name="front_center",
    lens="Telecam",
    matrix=np.array([[100.0, 0.0, 99.5], [0.0, 100.0, 49.5], [0.0, 0.0, 1.0]]),
    original=np.eye(3),
    distortion=np.zeros(5),
    recorded_size=FULL,
    size=FULL,
    pose=Pose(np.zeros(3), np.eye(3)),
)


def splat(points, full=FULL, derived=DERIVED):
    row, column, depth = np.array(points, dtype=float).reshape(-1, 3).T
    return splat_depth(row, column, depth, full=full, derived=derived)


def test_the_nearest_point_of_a_pixel_wins_whatever_the_order():
    rng = np.random.default_rng(0)
    # few pixels and many points, some outside and some too far
    points = rng.uniform((-5, -5, 0), (105, 205, 300), (5000, 3))
    expected = np.zeros((5, 10), dtype=np.uint16)
    for row, column, depth in points:
        y, x = int(np.floor((row + 0.5) / 20)), int(np.floor((column + 0.5) / 20))
        value = round(depth * 256)
        if 0 <= y < 5 and 0 <= x < 10 and 1 <= value <= 65535 and not 0 < expected[y, x] <= value:
            expected[y, x] = value
    assert (expected > 0).all()
    for _ in range(3):
        assert (splat(rng.permutation(points), derived=(10, 5)) == expected).all()


def test_pixel_centres_are_at_integers():
    for row, column, at in ((0, 0, (0, 0)), (1.49, 1.49, (0, 0)), (1.5, 1.49, (1, 0)), (99.49, 199.49, (49, 99))):
        depth = splat([(row, column, 10)])
        assert depth[at] == 2560 and (depth > 0).sum() == 1
    assert not splat([(-0.51, 0, 10), (0, -0.51, 10), (99.5, 0, 10), (0, 199.5, 10)]).any()


def test_depths_that_cannot_be_stored_are_dropped_and_not_wrapped():
    assert not splat([(0, 0, 0), (4, 4, -5), (8, 8, 0.001), (12, 12, 256), (16, 16, 1e9)]).any()
    assert splat([(0, 0, 65535 / 256)])[0, 0] == 65535 and splat([(0, 0, 1 / 256)])[0, 0] == 1
    # a dropped point does not hide points behind it
    assert splat([(0, 0, 0), (0, 0, -5), (0, 0, 50)])[0, 0] == 50 * 256


def test_no_points_are_an_image_without_depth():
    depth = splat([])
    assert depth.shape == (50, 100) and depth.dtype == np.uint16 and not depth.any()


def write_npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


@pytest.mark.parametrize("prefix", ["", "pcloud_attr."])
def test_points_that_do_not_count_are_left_out(tmp_path, prefix):
    values = np.arange(6, dtype=float)
    arrays = {name: values.copy() for name in ("row", "col", "depth")}
    arrays["row"][1], arrays["col"][2], arrays["depth"][3] = np.nan, np.inf, -np.inf
    arrays["valid"] = np.array([True, True, True, True, False, True])
    path = write_npz(tmp_path / "lidar.npz", **{prefix + name: array for name, array in arrays.items()})
    found = read_lidar(path)
    assert {name: list(array) for name, array in found.items()} == {"row": [0, 5], "col": [0, 5], "depth": [0, 5]}


def test_a_file_without_the_mapping_is_told_from_a_damaged_one(tmp_path):
    ones = np.ones(3)
    with pytest.raises(MissingLidarError, match=r"no row, col in the npz; it has depth, points"):
        read_lidar(write_npz(tmp_path / "a.npz", points=ones, depth=ones))
    with pytest.raises(ValueError, match="equal length"):
        read_lidar(write_npz(tmp_path / "b.npz", row=ones, col=ones, depth=np.ones(4)))
    np.save(tmp_path / "c.npz.npy", ones)
    with pytest.raises(ValueError, match="npz"):
        read_lidar(tmp_path / "c.npz.npy")
    with pytest.raises(FileNotFoundError):
        read_lidar(tmp_path / "d.npz")


def test_a_damaged_npz_is_a_value_error_wherever_the_damage_is(tmp_path):
    points = {name: np.random.default_rng(0).uniform(0, 50, 40) for name in ("row", "col", "depth")}
    path = write_npz(tmp_path / "lidar.npz", **points)
    data = path.read_bytes()
    damages = [data[:length] for length in range(0, len(data), 13)]
    damages += [data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :] for at in range(len(data))]
    refused = 0
    for damaged in damages:
        path.write_bytes(damaged)
        try:
            found = read_lidar(path)
        except ValueError:
            refused += 1
        else:
            assert all((found[name] == points[name]).all() for name in points)
    assert refused > 0.7 * len(damages)


def make_corners(low, high):
    return np.array([[x, y, z] for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])])


def make_entry(corners, **fields):
    pixels = CAMERA.project(corners)
    bounds = [*pixels.min(axis=0), *pixels.max(axis=0)]
    return {"class": "Car", "id": 1, "2d_bbox": bounds, "3d_points": corners.tolist()} | fields


AHEAD = make_corners((10.0, -1.0, -1.0), (14.0, 1.0, 1.0))


def test_a_box_ahead_is_the_hull_of_its_corners():
    entry = make_entry(AHEAD, occlusion=1.0, truncation=0.5)
    (box,) = convert_boxes([entry], CAMERA, DERIVED)
    # 1 m to each side at 10 m with a focal length of 100: 10 pixels about the middle, half of that derived
    assert box["box"] == [45, 20, 55, 30]
    assert box["visible"] == 1 and box["distance_m"] == 12
    assert (box["class"], box["id"], box["occlusion"], box["truncation"]) == ("Car", 1, 1.0, 0.5)
    for without in ("2d_bbox", "3d_points"):
        (other,) = convert_boxes([entry | {without: None}], CAMERA, DERIVED)
        assert other["box"] == box["box"]
    shuffled = np.random.default_rng(0).permutation(AHEAD)
    assert (find_hull(shuffled, CAMERA) == find_hull(AHEAD, CAMERA)).all()


def test_a_box_at_the_border_is_clipped_and_says_so():
    corners = make_corners((10.0, 9.0, -1.0), (10.5, 11.0, 1.0))  # its middle lies on the left border
    (box,) = convert_boxes([make_entry(corners)], CAMERA, DERIVED)
    assert box["box"][0] == 0 and box["box"][2] == pytest.approx(50 - 50 * 9 / 10.5, abs=1e-3)
    assert box["visible"] == pytest.approx((10 - 900 / 105) / (11 - 900 / 105), abs=1e-3)
    outside = make_corners((10.0, 11.0, -1.0), (10.5, 12.0, 1.0))
    assert convert_boxes([make_entry(outside)], CAMERA, DERIVED) == []


def test_what_is_behind_the_camera_does_not_count():
    behind = make_corners((-14.0, -1.0, -1.0), (-10.0, 1.0, 1.0))
    assert find_hull(behind, CAMERA) is None
    assert convert_boxes([make_entry(behind)], CAMERA, DERIVED) == []
    # a lorry beside the car, which begins behind the camera: the box goes from its far end to the right border
    beside = make_corners((-5.0, -4.0, -1.0), (8.0, -2.0, 2.0))
    (box,) = convert_boxes([make_entry(beside)], CAMERA, DERIVED)
    assert box["box"] == [50 + 50 * 2 / 8, 0, 100, 50]
    # random points of the lorry in front of the camera project into the hull
    points = np.random.default_rng(0).uniform((NEAR_METRES, -4, -1), (8, -2, 2), (2000, 3))
    hull, pixels = find_hull(beside, CAMERA), CAMERA.project(points)
    assert (pixels >= hull[:2]).all() and (pixels <= hull[2:]).all()


def test_exact_duplicates_are_dropped_and_nothing_else():
    entry = make_entry(AHEAD)
    moved = make_entry(AHEAD + np.array([0, 0.01, 0]))
    boxes = convert_boxes([entry, entry | {"id": 2}, entry | {"class": "VanSUV"}, moved], CAMERA, DERIVED)
    assert [(box["class"], box["id"]) for box in boxes] == [("Car", 1), ("VanSUV", 1), ("Car", 1)]
    assert convert_boxes([], CAMERA, DERIVED) == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"class": None}, "class"),
        ({"2d_bbox": None, "3d_points": None}, "neither 3d_points nor 2d_bbox"),
        ({"3d_points": [[1, 2, 3]]}, "8 x 3"),
        ({"2d_bbox": [1, 2, 3, float("nan")]}, "finite"),
        ({"2d_bbox": ["a", "b", "c", "d"]}, "no numbers"),
        ({"3d_points": [[1, 2], [3]]}, "no numbers"),
    ],
)
def test_an_entry_that_is_no_box_is_named(fields, words):
    with pytest.raises(ValueError, match=f"box 77.*{words}"):
        convert_boxes([make_entry(AHEAD, id=77) | fields], CAMERA, DERIVED)


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"box_0": 1}', b"\xff\xfe\x00"])
def test_a_file_that_holds_no_boxes_is_refused(tmp_path, content):
    path = tmp_path / "label3D.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"JSON|object of boxes"):
        read_label3d(path)
    path.write_text("{}")
    assert read_label3d(path) == []


TIMES = [1000, 2000, 3000]


def make_item(values, signs, times=TIMES, sign_times=None, **fields):
    return {
        "frame_name": "20180807145028_camera_frontcenter_000000091.json",
        "timestamp": 2100,
        "flexray": {
            "steering_angle_calculated": {"timestamps": times, "values": values},
            "steering_angle_calculated_sign": {"timestamps": sign_times or times[: len(signs)], "values": signs},
        },
    } | fields


def test_left_is_positive_and_the_nearest_sample_counts():
    steering = convert_steering(make_item([1.5, 3.0, 4.5], [0, 1, 0]))
    assert steering == {
        "angle_deg": -3.0,
        "speed_kmh": None,
        "angles_deg": [1.5, -3.0, 4.5],
        "timestamps_us": TIMES,
    }
    assert convert_steering(make_item([1.5, 3.0, 4.5], [0, 1, 0], timestamp=9999))["angle_deg"] == 4.5
    assert convert_steering(make_item([1.5, 3.0, 4.5], [0, 1, 0], timestamp=None))["angle_deg"] == -3.0


@pytest.mark.parametrize("unusable", [614.10, 614.25, None, float("nan")])
def test_samples_that_mean_nothing_are_dropped(unusable):
    steering = convert_steering(make_item([1.5, unusable, 4.5], [1, 1, 1]))
    assert steering["angles_deg"] == [-1.5, -4.5] and steering["timestamps_us"] == [1000, 3000]
    assert steering["angle_deg"] == -4.5
    assert convert_steering(make_item([unusable] * 3, [0, 0, 0])) is None
    json.dumps(steering, allow_nan=False)


def test_the_largest_true_angle_is_no_sentinel():
    assert convert_steering(make_item([613.95, 600.0, 0.0], [0, 1, 0]))["angles_deg"] == [613.95, -600.0, 0.0]


def test_signs_are_matched_by_time():
    steering = convert_steering(make_item([1.5, 3.0, 4.5], [1, 0], sign_times=[2900, 1200]))
    assert steering["angles_deg"] == [1.5, 3.0, -4.5]
    steering = convert_steering(make_item([1.5, 3.0, 4.5], [0, 2, 1]))
    assert steering["angles_deg"] == [1.5, -4.5]  # 2 is no sign


@pytest.mark.parametrize("flexray", [{}, None, {"steering_angle_calculated": {"timestamps": [1], "values": [2.0]}}])
def test_no_angle_is_never_zero(flexray):
    assert convert_steering(make_item([], [], flexray=flexray)) is None
    assert convert_steering(make_item([], [], times=[])) is None


def test_values_without_their_times_are_an_error():
    with pytest.raises(ValueError, match="3 timestamps and 2 values"):
        convert_steering(make_item([1.5, 3.0], [0, 0, 0]))


@pytest.mark.parametrize("order", [[2, 1, 0], [1, 2, 0], [2, 0, 1]])
def test_the_order_in_the_file_is_not_the_order_of_time(order):
    values, signs = [1.5, 3.0, 4.5], [0, 1, 0]
    expected = convert_steering(make_item(values, signs))
    shuffled = make_item(
        [values[index] for index in order], [signs[index] for index in order], times=[TIMES[index] for index in order]
    )
    assert convert_steering(shuffled) == expected
    shuffled = make_item([values[index] for index in order], signs, [TIMES[index] for index in order], TIMES)
    assert convert_steering(shuffled) == expected


@pytest.mark.parametrize("offset_us", [-37_000_000, -100_999, 101_101, 37_000_000])
def test_a_sample_far_from_the_moment_is_no_sample(offset_us):
    far = [time + offset_us for time in TIMES]
    item = make_item([1.5, 3.0, 4.5], [0, 1, 0], times=far)
    assert convert_steering(item) is None
    gap = min(abs(time - 2100) for time in far)
    assert gap > 100_000
    assert explain_missing(item) == f"nearest sample {gap / 1000:.0f} ms away"
    assert convert_steering(item, limit_ms=40_000.0)["timestamps_us"] == sorted(far)
    # the sign may have a clock of its own, and the speed too
    item = make_item([1.5, 3.0, 4.5], [0, 1, 0], sign_times=[time + offset_us for time in far])
    assert convert_steering(item) is None and "sign" in explain_missing(item) and "ms away" in explain_missing(item)
    item = make_item([1.5, 3.0, 4.5], [0, 0, 0])
    item["flexray"]["vehicle_speed"] = {"timestamps": far, "values": [30.0, 40.0, 50.0]}
    assert convert_steering(item)["speed_kmh"] is None


def test_an_item_without_a_time_takes_the_middle_of_its_samples_as_long_as_one_is_near_it():
    item = make_item([1.5, 3.0, 4.5], [0, 1, 0])
    del item["timestamp"]
    assert convert_steering(item)["angle_deg"] == -3.0
    item = make_item([1.5, 3.0], [0, 1], times=[1000, 1_001_000], timestamp=None)
    assert convert_steering(item) is None and explain_missing(item) == "nearest sample 500 ms away"


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1e3])
def test_samples_in_another_unit_of_time_are_no_samples(unit):
    start = 1_533_653_462_000_000
    times = [int((start + 20_000 * index) * unit) for index in range(3)]
    assert convert_steering(make_item([1.5, 3.0, 4.5], [0, 1, 0], times=times, timestamp=start)) is None


def test_the_speed_is_that_of_the_moment():
    item = make_item([1.5, 3.0, 4.5], [0, 0, 0])
    item["flexray"]["vehicle_speed"] = {"timestamps": [1900, 2090, 2500], "values": [30.0, None, 50.0]}
    assert convert_steering(item)["speed_kmh"] == 30


def test_items_are_found_by_name_and_not_by_index(tmp_path):
    path = tmp_path / "bus.json"
    first, second = make_item([], []) | {"frame_name": "b.json"}, make_item([], []) | {"frame_name": "a.json"}
    path.write_text(json.dumps([first, {"no": "name"}, "no item", second]))
    assert read_bus(path) == {"b.json": first, "a.json": second}
    for content in ("[{", "{}", "\x00"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"bus\.json"):
            read_bus(path)
