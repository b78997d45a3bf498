"""Derived labels against the exact geometry of synthetic scenes: lidar, picture and boxes agree in one view."""

import json

import cv2
import numpy as np
import pytest

from a2d2.boxes import convert_boxes
from a2d2.calibration import load_calibration, map_centres
from a2d2.classes import CLASSES
from a2d2.dataset import Geometry
from a2d2.derive import look_up_classes
from a2d2.lidar import DEPTH_SCALE, splat_depth
from a2d2.synthetic.render import measure_depth, render_camera, scan_lidars
from a2d2.synthetic.world import build_lone_moment, build_world, draw_actor
from a2d2.synthetic.writer import describe_rig

SIZE, DERIVED = (960, 604), (512, 320)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    path = tmp_path_factory.mktemp("rig") / "cams_lidars.json"
    path.write_text(json.dumps(describe_rig(SIZE)))
    return load_calibration(path)


@pytest.fixture(scope="module")
def camera(calibration):
    return calibration.cameras["front_center"]


def test_scanned_points_lie_on_the_scene(calibration, camera):
    moment = build_world(3, 1, 2).moment(0)
    scan = scan_lidars(moment, calibration, camera, step=1.0)
    pixels = camera.project(scan["points"])
    ground_truth = measure_depth(moment, camera, pixels)
    error = scan["points"][:, 0] - ground_truth
    # no point is in front of the surface that the camera sees; by parallax, some points are behind it
    assert (error > -0.15).mean() > 0.99
    assert (np.abs(error) < 0.15).mean() > 0.8


def test_derived_depth_is_the_scenes_within_the_pixels_footprint(calibration, camera):
    moment = build_world(3, 2, 2).moment(1)
    points = scan_lidars(moment, calibration, camera, step=0.5)["points"]
    pixels = camera.project(points)
    seen = np.abs(points[:, 0] - measure_depth(moment, camera, pixels)) < 0.15
    points, pixels = points[seen], pixels[seen]
    depth = splat_depth(pixels[:, 1], pixels[:, 0], points[:, 0], SIZE, DERIVED) / DEPTH_SCALE
    rows, columns = np.nonzero(depth)
    assert len(rows) > 500
    small = camera.resize(DERIVED)
    nearest, farthest = np.full(len(rows), np.inf), np.zeros(len(rows))
    for right in np.linspace(-0.5, 0.5, 7):
        for down in np.linspace(-0.5, 0.5, 7):
            found = measure_depth(moment, small, np.stack([columns + right, rows + down], axis=1))
            nearest, farthest = np.minimum(nearest, found), np.maximum(farthest, found)
    value = depth[rows, columns]
    assert ((value > nearest - 0.2) & (value < farthest + 0.2)).mean() > 0.98


@pytest.mark.parametrize("kind, label", [("VanSUV", "Car"), ("Truck", "Truck")])
@pytest.mark.parametrize("pose", [(9.0, 0.5, 0.3), (15.0, -4.0, -0.5), (30.0, 6.0, 2.0)])
def test_a_lone_vehicle_fills_its_box(camera, kind, label, pose):
    forward, left, yaw = pose
    actor = draw_actor(np.random.default_rng(5), kind, 1, forward, left)
    moment = build_lone_moment(actor, yaw)
    _, picture, shown = render_camera(moment, camera)
    assert shown[0] > 100
    classes, unknown = look_up_classes(picture, camera.resize(DERIVED))
    assert unknown == 0
    entry = {"class": kind, "3d_points": moment.items[0].corners().tolist()}
    ((box,),) = [[found["box"] for found in convert_boxes([entry], camera, DERIVED)]]
    rows, columns = np.nonzero(classes == CLASSES.index(label))
    mask = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert (mask[:2] >= np.array(box[:2]) - 1).all() and (mask[2:] <= np.array(box[2:]) + 1).all()
    assert np.abs(mask - np.array(box)).max() <= 2


def test_picture_and_label_come_from_one_cast(camera):
    moment = build_world(3, 4, 2).moment(0)
    picture, label, _ = render_camera(moment, camera)
    assert picture.shape == label.shape == (SIZE[1], SIZE[0], 3)
    sky = (label == (135, 206, 255)).all(axis=2)
    assert sky.any() and not sky.all()
    inner = cv2.erode(sky.astype(np.uint8), np.ones((5, 5))) > 0
    outer = cv2.dilate(sky.astype(np.uint8), np.ones((5, 5))) == 0
    assert picture[inner].mean() > picture[outer].mean() + 30


def test_centres_of_derived_pixels_come_back(camera):
    grid = np.random.default_rng(0).uniform(0, 300, (20, 2))
    assert np.allclose(map_centres(map_centres(grid, DERIVED, SIZE), SIZE, DERIVED), grid)


@pytest.mark.parametrize("flip", [False, True])
def test_a_sparse_map_that_shrinks_keeps_the_nearest_point_of_each_new_pixel(flip):
    rng = np.random.default_rng(0)
    full = np.where(rng.random((64, 96)) < 0.05, rng.uniform(2, 80, (64, 96)), 0)
    for factor in (2, 4):
        blocks = full.reshape(64 // factor, factor, 96 // factor, factor).transpose(0, 2, 1, 3)
        blocks = np.where(blocks == 0, np.inf, blocks).min(axis=(2, 3))
        expected = np.where(np.isinf(blocks), 0, blocks)
        small = Geometry((96, 64), (0, 0, 96, 64), (96 // factor, 64 // factor), flip).splat_nearest(full)
        np.testing.assert_array_equal(small, expected[:, ::-1] if flip else expected)
    # under a zoom, from a map of half the image's resolution: the same points
    half = Geometry((96, 64), (0, 0, 96, 64), (48, 32)).splat_nearest(full)
    cropped = Geometry((96, 64), (24, 16, 48, 32), (48, 32), flip).splat_nearest(half)
    cut = half[8:24, 12:36]
    np.testing.assert_array_equal(np.sort(cropped[cropped > 0]), np.sort(cut[cut > 0]))


def test_a_sparse_map_that_grows_stays_sparse():
    rng = np.random.default_rng(1)
    full = np.where(rng.random((32, 48)) < 0.1, rng.uniform(2, 80, (32, 48)), 0)
    large = Geometry((48, 32), (0, 0, 48, 32), (144, 96)).splat_nearest(full)
    assert (large > 0).sum() == (full > 0).sum()
    np.testing.assert_array_equal(large[1::3, 1::3], full)
    np.testing.assert_array_equal(Geometry.identity((48, 32)).splat_nearest(full), full)
