"""The preprocessing scripts as a user runs them, on a small synthetic set and on damaged copies of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from a2d2.frames import list_frames
from a2d2.images import ImageError, decode_rgb_png, encode_png, write_bytes
from a2d2.synthetic import write_dataset
from preprocessing._pool import WorkerDiedError, map_units

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("camera", "segmentation", "depth_preprocess", "bounding_box", "steering_angle")


def run(script, data, out, *options):
    command = [sys.executable, ROOT / "preprocessing" / f"{script}.py", "--data", data, "--out", out, "--threads", "2"]
    return subprocess.run([*map(str, command), *options], capture_output=True, text=True, cwd="/")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    out = tmp_path_factory.mktemp("raw")
    write_dataset(out, scenes=2, frames=3, size=(240, 152), workers=1)
    return out / "camera_lidar_semantic_bboxes"


@pytest.fixture
def damaged(raw, tmp_path):
    """A copy to break; the bus folder comes along."""
    shutil.copytree(raw.parent, tmp_path / "raw")
    return tmp_path / "raw" / raw.name


def read_tree(root):
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and "reports" not in path.parts)
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_all_scripts_resume_and_agree_on_the_root(raw, tmp_path):
    out = tmp_path / "out"
    for script in SCRIPTS:
        result = run(script, raw, out, "--size", "96x64")
        assert result.returncode == 0, result.stderr
    first = read_tree(out)
    frame = list_frames(out, "segmentation")[0]
    classes = np.load(frame.path("segmentation"))
    assert classes.shape == (64, 96) and classes.dtype == np.uint8
    assert frame.path("image").is_file()
    for script in SCRIPTS:
        result = run(script, raw, out, "--size", "96x64")
        assert result.returncode == 0 and " 0 done" in result.stdout
    assert read_tree(out) == first
    other = tmp_path / "other"
    for shard in ("1/2", "2/2"):
        assert run("camera", raw, other, "--size", "96x64", "--shard", shard).returncode == 0
    assert read_tree(other).items() - first.items() == {("dataset.json", read_tree(other)["dataset.json"])}


def test_another_size_stops_and_overwrite_redoes(raw, tmp_path):
    assert run("segmentation", raw, tmp_path, "--size", "96x64").returncode == 0
    refused = run("segmentation", raw, tmp_path, "--size", "48x32")
    assert refused.returncode == 1
    assert "[96, 64]" in refused.stderr and "[48, 32]" in refused.stderr and "Traceback" not in refused.stderr
    assert run("segmentation", raw, tmp_path, "--size", "48x32", "--overwrite").returncode == 0
    for frame in list_frames(tmp_path, "segmentation"):
        assert np.load(frame.path("segmentation")).shape == (32, 48)


def test_bad_pictures_are_named_and_the_others_done(damaged, tmp_path):
    frames = list_frames(damaged, "label")
    broken = {}
    for frame, kind in zip(frames, ("cut", "flipped", "empty", "gray"), strict=False):
        path = frame.path("label")
        data = bytearray(path.read_bytes())
        if kind == "flipped":
            data[len(data) // 2] ^= 0x10
        content = {
            "cut": data[: len(data) // 2],
            "flipped": data,
            "empty": b"",
            "gray": cv2.imencode(".png", np.zeros((152, 240), np.uint8))[1].tobytes(),
        }[kind]
        path.write_bytes(bytes(content))
        broken[str(frame)] = kind
    out = tmp_path / "out"
    result = run("segmentation", damaged, out, "--size", "96x64")
    assert result.returncode == 3
    report = json.loads((out / "reports" / "segmentation.json").read_text())
    assert {row["frame"] for row in report["failed"]} == set(broken)
    assert report["done"] == len(frames) - len(broken)
    assert len(list_frames(out, "segmentation")) == report["done"]
    assert run("segmentation", damaged, out, "--size", "96x64", "--strict").returncode == 1


def test_foreign_colours_are_counted_and_become_nothing(damaged, tmp_path):
    frame = list_frames(damaged, "label")[0]
    label = np.full((152, 240, 3), (1, 2, 3), np.uint8)
    write_bytes(frame.path("label"), encode_png(label))
    assert run("segmentation", damaged, tmp_path / "out", "--size", "96x64").returncode == 0
    classes = np.load(frame.under(tmp_path / "out").path("segmentation"))
    assert (classes == 255).all()
    report = json.loads((tmp_path / "out" / "reports" / "segmentation.json").read_text())
    (noticed,) = report["noticed"]
    assert noticed["frame"] == str(frame) and noticed["pixels of unknown colour"] > 0.9 * classes.size


def test_an_npz_without_row_is_missing_input(damaged, tmp_path):
    frame = list_frames(damaged, "lidar")[0]
    np.savez(frame.path("lidar"), points=np.zeros((3, 3)))
    assert run("depth_preprocess", damaged, tmp_path / "out", "--size", "96x64").returncode == 0
    report = json.loads((tmp_path / "out" / "reports" / "depth.json").read_text())
    assert str(frame) in {row["frame"] for row in report["missing"]}
    assert not frame.under(tmp_path / "out").path("depth").exists()


def test_pickles_in_an_npz_are_not_run(damaged, tmp_path):
    frame = list_frames(damaged, "lidar")[0]
    hostile = np.array([partial(os.system, f"touch {tmp_path}/ran")], dtype=object)
    np.savez(frame.path("lidar"), row=hostile, col=hostile, depth=hostile)
    assert run("depth_preprocess", damaged, tmp_path / "out", "--size", "96x64").returncode == 3
    assert not (tmp_path / "ran").exists()


def test_wrong_use_and_missing_folders(raw, tmp_path):
    assert run("camera", raw, tmp_path / "out", "--size", "big").returncode == 2
    missing = run("camera", tmp_path / "nothing", tmp_path / "out")
    assert missing.returncode == 1 and "get_data.sh" in missing.stderr and "Traceback" not in missing.stderr


def test_killed_at_any_moment_nothing_is_torn(raw, tmp_path):
    assert run("camera", raw, tmp_path / "whole", "--size", "96x64", "--format", "png").returncode == 0
    whole = read_tree(tmp_path / "whole")
    command = [sys.executable, ROOT / "preprocessing" / "camera.py", "--data", raw, "--out", tmp_path / "out"]
    command = [*map(str, command), "--size", "96x64", "--format", "png", "--threads", "1"]
    for delay in (0.3, 0.5, 0.7):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for frame in list_frames(tmp_path / "out", "image_lossless"):
            decode_rgb_png(frame.path("image_lossless").read_bytes())
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert read_tree(tmp_path / "out") == whole


def work_or_die(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 5:
        raise ValueError("five")
    return number * number


def test_a_dead_worker_costs_its_own_unit_only():
    results = dict(map_units(work_or_die, range(1, 12), 2))
    assert isinstance(results[3], WorkerDiedError) and "SIGSEGV" in str(results[3])
    assert isinstance(results[5], ValueError)
    assert all(results[number] == number * number for number in range(1, 12) if number not in (3, 5))


@pytest.mark.parametrize("channels", [1, 4])
def test_only_rgb_pictures_are_read(channels):
    data = cv2.imencode(".png", np.zeros((4, 4, channels), np.uint8))[1].tobytes()
    with pytest.raises(ImageError, match="expected 8 bit RGB"):
        decode_rgb_png(data)
