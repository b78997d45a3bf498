"""Camera geometry against the sample points and numbers of docs/a2d2-format.md, section 8."""

import json

import numpy as np
import pytest

from a2d2.calibration import load_calibration, map_centres, map_edges, undistortion_maps

# front_center, docs/a2d2-format.md, section 8
FRONT_CENTER = {
    "tstamp_delay": 25000,
    "view": {
        "origin": [1.711045726422736, -5.735179668849011e-09, 0.9431449279047172],
        "x-axis": [0.9997595802751106, 0.021372184646008877, -0.004900139956328717],
        "y-axis": [-0.021482638328964472, 0.9994877740097232, -0.02372100030596073],
    },
    "Lens": "Telecam",
    "CamMatrix": [[1687.3369140625, 0, 965.43414055823814], [0, 1783.428466796875, 684.4193604186803], [0, 0, 1]],
    "CamMatrixOriginal": [
        [1844.1774422790927, 0, 964.42990523863864],
        [0, 1841.5212239377258, 679.5331911948183],
        [0, 0, 1],
    ],
    "Distortion": [[-0.2611312587700434, 0, 0, 0, 0]],
    "Resolution": [1920, 1208],
}
FISHEYE = {
    "view": {"origin": [1.711, 0.58, 0.943], "x-axis": [1, 0, 0], "y-axis": [0, 1, 0]},
    "Lens": "Fisheye",
    "CamMatrix": [[825.102, 0, 959.462], [0, 824.194, 642.449], [0, 0, 1]],
    "CamMatrixOriginal": [[972.209, 0, 959.779], [0, 971.139, 631.221], [0, 0, 1]],
    "Distortion": [[-0.037519, -0.005757, 0, 0]],
    "Resolution": [1920, 1208],
}


@pytest.fixture
def cameras(tmp_path):
    path = tmp_path / "cams_lidars.json"
    path.write_text(json.dumps({"cameras": {"front_center": FRONT_CENTER, "front_left": FISHEYE}, "lidars": {}}))
    return load_calibration(path).cameras


def test_sample_points_of_the_format_page(cameras):
    recorded = [(0, 0), (480, 604), (960, 604), (1440, 604), (0, 604), (960, 0), (1919, 1207)]
    expected = [(-68.5, -86.7), (513.5, 609.8), (961.4, 611.2), (1408.8, 609.9), (0, 604.4), (961, 0), (1954.7, 1263)]
    found = cameras["front_center"].undistort(np.array(recorded, dtype=float))
    assert np.abs(found - np.array(expected)).max() < 0.6


@pytest.mark.parametrize("view", ["front_center", "front_left"])
def test_distort_inverts_undistort(cameras, view):
    recorded = np.random.default_rng(0).uniform([0, 0], [1919, 1207], (200, 2))
    camera = cameras[view]
    assert np.abs(camera.distort(camera.undistort(recorded)) - recorded).max() < 1e-3


@pytest.mark.parametrize("view", ["front_center", "front_left"])
@pytest.mark.parametrize("size", [(1920, 1208), (1024, 640), (333, 177)])
def test_maps_agree_with_distort(cameras, view, size):
    camera = cameras[view].resize(size)
    map_x, map_y = undistortion_maps(camera)
    assert map_x.shape == (size[1], size[0])
    pixels = np.random.default_rng(1).integers([0, 0], size, (100, 2))
    expected = camera.distort(pixels.astype(float))
    found = np.stack([map_x[pixels[:, 1], pixels[:, 0]], map_y[pixels[:, 1], pixels[:, 0]]], axis=1)
    assert np.abs(found - expected).max() < 2e-3


def test_resized_camera_projects_where_the_full_pixels_map(cameras):
    camera = cameras["front_center"]
    points = np.random.default_rng(2).uniform([5, -3, -1], [60, 3, 2], (50, 3))
    full = camera.project(points)
    small = camera.resize((1024, 640)).project(points)
    assert np.allclose(small, map_centres(full, (1920, 1208), (1024, 640)), atol=1e-9)


def test_edges_fill_the_image():
    whole = map_edges(np.array([[-0.5, -0.5, 1919.5, 1207.5]]), (1920, 1208), (1024, 640))
    assert np.allclose(whole, [[0, 0, 1024, 640]])


def test_rays_look_through_their_pixels(cameras):
    camera = cameras["front_center"]
    recorded = np.array([[100.0, 200.0], [960.0, 604.0], [1800.0, 1100.0]])
    tangents = camera.undistort_to_tangents(recorded)
    points = np.concatenate([np.ones((3, 1)), -tangents], axis=1) * 20
    assert np.allclose(camera.project(points), camera.undistort(recorded), atol=1e-6)


def test_broken_calibrations_are_named(tmp_path):
    path = tmp_path / "cams_lidars.json"
    path.write_text("<html>")
    with pytest.raises(ValueError, match=r"cams_lidars\.json is no JSON"):
        load_calibration(path)
    path.write_text('{"cameras": {"front_center": {"Lens": "Telecam"}}}')
    with pytest.raises(ValueError, match="Resolution"):
        load_calibration(path)
