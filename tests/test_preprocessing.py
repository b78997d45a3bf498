"""The preprocessing scripts as a user runs them, on a small raw dataset and on damaged copies of it."""

import errno
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from raw_scenes import ANGLE, CORNERS, POINTS, RECORDED, VIEW, draw_picture, encode, project, write_raw_set
from script_runs import ROOT, SCRIPTS, SIZE, finish, list_reasons, read_report, read_tree, run, start, wait_for

from a2d2.classes import CLASSES
from a2d2.frames import bus_path, list_frames
from a2d2.images import read_depth_png, read_image
from preprocessing._pool import WorkerDiedError, map_units


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_raw_set(tmp_path_factory.mktemp("raw"))


@pytest.fixture
def damaged(tmp_path):
    """A raw dataset that the test may damage."""
    return write_raw_set(tmp_path / "raw")


@pytest.fixture(scope="module")
def derived(raw, tmp_path_factory):
    """A preprocessed dataset with all kinds, by seven processes at once: each script, and two of them twice."""
    out = tmp_path_factory.mktemp("derived") / "out"
    for process in [start(script, raw, out, threads="1") for script in (*SCRIPTS, "camera", "steering_angle")]:
        code, printed = finish(process)
        assert code == 0, printed
    return out


def test_the_derived_files_hold_what_was_recorded(raw, derived):
    raw_frames = list_frames(raw, "camera")
    for kind in ("image", "segmentation", "depth", "boxes", "steering"):
        assert list_frames(derived, kind) == raw_frames
    frame = raw_frames[0].under(derived)

    # the lens hardly shifts the middle, where the picture is 2 x column, 3 x row, column + row
    middle = read_image(frame.path("image"))[16, 24].astype(int)
    assert np.abs(middle - (2 * 48.5, 3 * 32.5, 81)).max() <= 6

    classes = np.load(frame.path("segmentation"))
    assert classes.shape == (32, 48) and classes.dtype == np.uint8
    assert classes[8, 24] == CLASSES.index("Sky") and classes[24, 24] == CLASSES.index("RD normal street")

    depth = read_depth_png(frame.path("depth"))
    column, row = np.floor((project(POINTS[:3]) + 0.5) * 0.5).astype(int).T
    assert (depth[row, column] == POINTS[:3, 0] * 256).all() and (depth > 0).sum() == 3

    (box,) = json.loads(frame.path("boxes").read_text())["boxes"]
    pixels = (project(CORNERS) + 0.5) * 0.5
    assert np.allclose(box["box"], [*pixels.min(axis=0), *pixels.max(axis=0)], atol=1e-3)
    assert (box["class"], box["id"], box["visible"]) == ("Car", 0, 1)

    steering = json.loads(frame.path("steering").read_text())
    assert steering["angle_deg"] == ANGLE and steering["speed_kmh"] == 20 and steering["angles_deg"] == [1.5, ANGLE]


def test_the_root_knows_how_it_was_made(derived):
    identity = json.loads((derived / "dataset.json").read_text())
    assert identity["size"] == list(SIZE) and set(identity["cameras"]) == {VIEW}
    assert set(identity["kinds"]) == {"camera", "segmentation", "depth", "boxes", "steering"}
    assert identity["kinds"]["camera"] == {"format": "jpg"}
    assert not list(derived.rglob(".*"))
    for frame in list_frames(derived, "image"):
        times = json.loads((frame.path("image").parent / "frames.json").read_text())
        assert times[frame.id] == 1_500_000_000_000_000 + int(frame.id) * 1_000_000


@pytest.mark.parametrize("script", SCRIPTS)
def test_finished_frames_are_left_alone(raw, derived, script):
    def list_written():
        return {path: path.stat().st_ino for path in derived.rglob("*_front*")}

    before = list_written()
    code, printed = run(script, raw, derived)
    assert code == 0 and " 0 done, 8 skipped" in printed
    assert list_written() == before


def test_shards_write_what_one_run_writes(raw, derived, tmp_path):
    whole = {name: data for name, data in read_tree(derived).items() if "/camera/" in name}
    for shard, done in (("1/3", 3), ("2/3", 3), ("3/3", 2)):
        code, printed = run("camera", raw, tmp_path / "out", "--shard", shard, threads="1")
        assert code == 0 and f"{done} done, 0 skipped" in printed
    shards = read_tree(tmp_path / "out")
    del shards["dataset.json"]
    assert shards == whole


def test_another_size_or_option_is_refused_and_overwrite_redoes(raw, tmp_path):
    out = tmp_path / "out"
    assert run("camera", raw, out)[0] == 0
    before = read_tree(out)
    code, printed = run("camera", raw, out, "--size", "24x16")
    assert code == 1 and "[48, 32]" in printed and "[24, 16]" in printed and "--overwrite" in printed
    code, printed = run("camera", raw, out, "--format", "png")
    assert code == 1 and "jpg" in printed and "png" in printed
    assert read_tree(out) == before

    assert run("camera", raw, out, "--size", "24x16", "--overwrite")[0] == 0
    for frame in list_frames(out, "image"):
        assert read_image(frame.path("image")).shape == (16, 24, 3)


def test_overwriting_one_kind_never_leaves_two_sizes(raw, tmp_path):
    assert run("bounding_box", raw, tmp_path)[0] == 0
    assert run("steering_angle", raw, tmp_path)[0] == 0
    before = read_tree(tmp_path)
    code, printed = run("bounding_box", raw, tmp_path, "--size", "24x16", "--overwrite")
    assert code == 1 and "another --out" in printed and "steering" in printed
    assert read_tree(tmp_path) == before


def test_bad_pictures_are_named_and_the_others_done(damaged, tmp_path):
    frames = list_frames(damaged, "label")
    whole = frames[0].path("label").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x10
    shape = (RECORDED[1], RECORDED[0])
    contents = {
        "damaged": whole[: len(whole) // 2],
        "damaged PNG": bytes(flipped),
        "empty": b"",
        "gray": encode(np.zeros(shape, np.uint8)),
        "RGBA": encode(np.zeros((*shape, 4), np.uint8)),
        "no PNG": cv2.imencode(".jpg", np.zeros((*shape, 3), np.uint8))[1].tobytes(),
        "96x64": encode(np.zeros((8, 8, 3), np.uint8)),
    }
    for frame, content in zip(frames, contents.values(), strict=False):
        frame.path("label").write_bytes(content)
    out = tmp_path / "out"
    code, printed = run("segmentation", damaged, out)
    assert code == 3 and "1 done, 0 skipped, 0 missing input, 7 failed" in printed
    reasons = list_reasons(out, "segmentation")
    assert list(reasons) == [str(frame) for frame in frames[:7]]
    assert all(word in reason for word, reason in zip(contents, reasons.values(), strict=True)), reasons
    assert list_frames(out, "segmentation") == frames[7:]

    assert run("segmentation", damaged, out, "--strict")[0] == 1
    for frame in frames[:7]:
        frame.path("label").write_bytes(whole)
    code, printed = run("segmentation", damaged, out, "--strict")
    assert code == 0 and "7 done, 1 skipped" in printed


def test_foreign_colours_are_counted_and_become_nothing(damaged, tmp_path):
    frame = list_frames(damaged, "label")[0]
    label = np.full((RECORDED[1], RECORDED[0], 3), (1, 2, 3), np.uint8)
    frame.path("label").write_bytes(encode(label))
    assert run("segmentation", damaged, tmp_path / "out")[0] == 0
    classes = np.load(frame.under(tmp_path / "out").path("segmentation"))
    assert (classes == 255).all()
    (noticed,) = read_report(tmp_path / "out", "segmentation")["noticed"]
    assert noticed["frame"] == str(frame) and noticed["pixels of unknown colour"] > 0.9 * classes.size


def test_lidar_without_row_is_missing_and_damaged_lidar_fails(damaged, tmp_path):
    frames = list_frames(damaged, "lidar")
    np.savez(frames[0].path("lidar"), points=POINTS)
    out = tmp_path / "out"
    code, printed = run("depth_preprocess", damaged, out)
    assert code == 0 and "7 done, 0 skipped, 1 missing input, 0 failed" in printed
    ((name, reason),) = list_reasons(out, "depth", "missing").items()
    assert name == str(frames[0]) and "row" in reason

    cut = frames[1].path("lidar").read_bytes()[:300]
    frames[1].path("lidar").write_bytes(cut)
    hostile = np.array([partial(os.system, f"touch {tmp_path}/ran")], dtype=object)
    np.savez(frames[2].path("lidar"), row=hostile, col=hostile, depth=hostile)
    assert run("depth_preprocess", damaged, out, "--overwrite")[0] == 3
    assert set(list_reasons(out, "depth")) == {str(frames[1]), str(frames[2])}
    assert not (tmp_path / "ran").exists()


def test_gaps_in_the_bus_are_missing_input(damaged, tmp_path):
    frames = list_frames(damaged, "camera")
    first, second = sorted({frame.scene for frame in frames})
    path = bus_path(damaged.parent / "camera_lidar_semantic_bus", first)
    items = json.loads(path.read_text())
    del items[0]
    items[0]["flexray"] = {}
    path.write_text(json.dumps(items))
    bus_path(damaged.parent / "camera_lidar_semantic_bus", second).write_text("[{")
    code, printed = run("steering_angle", damaged, tmp_path / "out")
    assert code == 3 and "2 done, 0 skipped, 2 missing input, 4 failed" in printed
    assert set(list_reasons(tmp_path / "out", "steering", "missing")) == {str(frames[0]), str(frames[1])}
    assert {frame.scene for frame in list_frames(tmp_path / "out", "steering")} == {first}


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (("--size", "big"), "1024x640"),
        (("--shard", "3/2"), "shard"),
        (("--threads", "0"), "threads"),
        (("--view", "top"), "front_center"),
        (("--colour", "red"), "--colour"),
    ],
)
def test_wrong_use(raw, tmp_path, options, hint):
    command = [sys.executable, ROOT / "preprocessing" / "camera.py", "--data", raw, "--out", tmp_path / "out"]
    result = subprocess.run([*map(str, command), *options], capture_output=True, text=True)
    assert result.returncode == 2 and hint in result.stderr
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_there(raw, tmp_path):
    code, printed = run("camera", tmp_path / "nothing", tmp_path / "out")
    assert code == 1 and "get_data.sh" in printed and str(tmp_path / "nothing") in printed
    code, printed = run("camera", raw, tmp_path / "out", "--view", "rear_center")
    assert code == 1 and "rear_center" in printed


def hold_up(frame):
    """Replace the frame's label by a named pipe without a writer, so that its worker waits; return the label."""
    path = frame.path("label")
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    return content


def open_read_pipe(path):
    """The write end of the named pipe, or None before a worker reads it; the worker waits while it is open."""
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        assert error.errno == errno.ENXIO
        return None


def test_stopped_on_request_it_goes_on_later(damaged, tmp_path):
    frame = list_frames(damaged, "label")[5]
    content = hold_up(frame)
    process = start("segmentation", damaged, tmp_path / "out", threads="1")
    wait_for(lambda: len(list_frames(tmp_path / "out", "segmentation")) == 5)
    process.send_signal(signal.SIGTERM)
    code, printed = finish(process)
    assert code == 75 and "same command" in printed
    frame.path("label").unlink()
    frame.path("label").write_bytes(content)
    code, printed = run("segmentation", damaged, tmp_path / "out")
    assert code == 0 and "3 done, 5 skipped" in printed


def test_a_killed_worker_costs_its_frame_only(damaged, tmp_path):
    frame = list_frames(damaged, "label")[2]
    hold_up(frame)
    process = start("segmentation", damaged, tmp_path / "out", threads="1")
    pipe = wait_for(lambda: open_read_pipe(frame.path("label")))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (worker,) = [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(worker, signal.SIGKILL)
    os.close(pipe)
    code, printed = finish(process)
    assert code == 3 and "7 done, 0 skipped, 0 missing input, 1 failed" in printed
    ((name, reason),) = list_reasons(tmp_path / "out", "segmentation").items()
    assert name == str(frame) and "SIGKILL" in reason


class StubbornError(Exception):
    """Can be pickled but not unpickled."""

    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


def work_or_die(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 4:
        sys.exit(7)
    if number == 5:
        raise ValueError("five")
    if number == 6:
        raise StubbornError("six", "seven")
    return number * number


def test_dead_workers_cost_their_own_units_only():
    results = dict(map_units(work_or_die, range(1, 12), 2))
    assert isinstance(results[3], WorkerDiedError) and "SIGSEGV" in str(results[3])
    assert isinstance(results[4], WorkerDiedError) and "7" in str(results[4])
    assert isinstance(results[5], ValueError) and str(results[5]) == "five"
    assert isinstance(results[6], Exception)
    assert all(results[number] == number * number for number in (1, 2, *range(7, 12)))


def test_leaving_early_ends_the_workers():
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    units = map_units(work_or_die, range(8, 100), 2)
    next(units)
    during = children.read_text().split()
    units.close()
    assert len(set(during) - set(children.read_text().split())) == 2


def test_a_lossless_picture_differs_by_resampling_only(raw, tmp_path):
    assert run("camera", raw, tmp_path, "--size", "96x64", "--format", "png", threads="1")[0] == 0
    frame = list_frames(tmp_path, "image_lossless")[0]
    picture = read_image(frame.path("image_lossless")).astype(int)
    middle = (slice(24, 40), slice(36, 60))  # where the lens shifts pixels little
    assert np.abs(picture - draw_picture().astype(int))[middle].max() <= 6
