"""The real files of A2D2; the environment variable A2D2_REAL names their folder."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from a2d2.boxes import convert_boxes, read_label3d
from a2d2.calibration import load_calibration, map_edges
from a2d2.classes import COLOUR_NAMES, IGNORE, colour_table
from a2d2.derive import look_up_classes, reduce_picture
from a2d2.frames import find_calibration, list_frames
from a2d2.images import read_rgb_png
from a2d2.lidar import read_lidar, splat_depth

pytestmark = pytest.mark.skipif("A2D2_REAL" not in os.environ, reason="A2D2_REAL names no folder with real files")
DERIVED = (1024, 640)


@pytest.fixture
def root():
    return Path(os.environ["A2D2_REAL"]) / "camera_lidar_semantic_bboxes"


@pytest.fixture
def camera(root):
    return load_calibration(find_calibration(root)).cameras["front_center"]


def test_the_colour_list_is_ours(root):
    assert json.loads((root / "class_list.json").read_text()) == COLOUR_NAMES


def test_every_label_pixel_is_found_by_exact_colour(root, camera):
    frames = list_frames(root, "label")
    assert frames
    for frame in frames:
        label = read_rgb_png(frame.path("label"), camera.recorded_size)
        assert (colour_table()[label.astype(int) @ (1 << 16, 1 << 8, 1)] != IGNORE).all(), frame
        for size in (DERIVED, (512, 320)):
            _, unknown = look_up_classes(label, camera.resize(size))
            assert unknown == 0, frame


def test_pictures_are_as_good_as_undistorting_at_full_size(root, camera):
    for frame in list_frames(root, "camera"):
        picture = read_rgb_png(frame.path("camera"), camera.recorded_size)
        full = cv2.undistort(picture, camera.original, camera.distortion, None, camera.matrix)
        reference = cv2.resize(full, DERIVED, interpolation=cv2.INTER_AREA)
        assert cv2.PSNR(reduce_picture(picture, camera.resize(DERIVED)), reference) >= 40, frame


def test_lidar_lands_where_its_points_project(root, camera):
    for frame in list_frames(root, "lidar"):
        points = np.load(frame.path("lidar"))["points"]
        found = read_lidar(frame.path("lidar"))
        pixels = camera.project(points)
        assert np.abs(pixels - np.stack([found["col"], found["row"]], axis=1)).max() < 1e-6
        depth = splat_depth(**found, full=camera.recorded_size, derived=DERIVED)
        small = np.floor(camera.resize(DERIVED).project(points) + 0.5).astype(int)
        inside = ((small >= 0) & (small < DERIVED)).all(axis=1)
        at = depth[small[inside, 1], small[inside, 0]]
        assert (at > 0).all() and (at <= np.round(points[inside, 0] * 256)).all()


def test_the_boxes_frame_gives_its_four_boxes(root, camera):
    (frame,) = list_frames(root, "label3D")
    entries = read_label3d(frame.path("label3D"))
    boxes = convert_boxes(entries, camera, DERIVED)
    assert [box["class"] for box in boxes] == ["Truck", "Cyclist", "Cyclist", "Car"]
    given = map_edges(np.array([entry["2d_bbox"] for entry in entries]), camera.recorded_size, DERIVED)
    assert np.abs(np.array([box["box"] for box in boxes]) - given).max() < 0.2
