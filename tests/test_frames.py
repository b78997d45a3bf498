"""Frames: the rule that names files, and the index of the files on disk."""

import pytest

from a2d2.frames import (
    DERIVED_KINDS,
    RAW_KINDS,
    VIEWS,
    Frame,
    bus_path,
    find_bus_root,
    find_calibration,
    index_frames,
    list_frames,
    list_scenes,
    parse_frame,
)

SCENE = "20180807_145028"


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_names_are_those_of_the_dataset(tmp_path):
    frame = Frame(SCENE, "front_center", "000001617", tmp_path)
    assert str(frame.path("camera").relative_to(tmp_path)) == (
        "20180807_145028/camera/cam_front_center/20180807145028_camera_frontcenter_000001617.png"
    )
    assert frame.path("camera_info").name == "20180807145028_camera_frontcenter_000001617.json"
    assert frame.path("label3D").parent == tmp_path / SCENE / "label3D" / "cam_front_center"
    assert bus_path(tmp_path, SCENE) == tmp_path / SCENE / "bus" / "20180807145028_bus_signals.json"
    assert len({frame.path(kind) for kind in RAW_KINDS | DERIVED_KINDS}) == 10  # a derived PNG is named as the raw one


def test_frames_are_the_same_under_any_root(tmp_path):
    frame = Frame(SCENE, "side_left", "000000001", tmp_path)
    moved = frame.under(tmp_path / "derived")
    assert moved == frame and hash(moved) == hash(frame)
    assert moved.path("depth").is_relative_to(tmp_path / "derived")
    assert parse_frame(str(frame)) == frame
    assert parse_frame(f" {SCENE}/side_left/1\n", tmp_path).path("camera") == frame.path("camera")


@pytest.mark.parametrize(
    "text",
    [
        "",
        SCENE,
        f"{SCENE}/front_center",
        f"{SCENE}/frontcenter/000000001",
        "-2018/front_center/000000001",
        "20 18/front_center/000000001",
        f"{SCENE}/front_center/first",
        f"{SCENE}/front_center/²",
        f"{SCENE}/front_center/1234567890",
        f"{SCENE}/front_center/000000001/x",
    ],
)
def test_what_names_no_frame_is_refused(text):
    with pytest.raises(ValueError, match="scene/view/id"):
        parse_frame(text)


def test_foreign_files_are_no_frames(tmp_path):
    frames = [Frame(SCENE, view, f"{number:09d}", tmp_path) for view in VIEWS[:2] for number in (12, 3)]
    for frame in frames:
        touch(frame.path("camera"))
    folder = frames[0].path("camera").parent
    for name in (
        "notes.txt",
        "20180807145028_camera_frontcenter_000000099.jpg",  # another kind's extension
        "20180807145028_label_frontcenter_000000099.png",  # another kind's token
        "20180807145028_camera_frontleft_000000099.png",  # another view
        "20180808145028_camera_frontcenter_000000099.png",  # another scene
        "20180807145028_camera_frontcenter_99.png",
        ".20180807145028_camera_frontcenter_000000099.png.host.1.partial",
    ):
        touch(folder / name)
    touch(tmp_path / "README" / "camera" / "cam_front_center" / "20180807145028_camera_frontcenter_000000012.png")
    touch(tmp_path / "20180101_000000")  # a file, no scene
    assert list_scenes(tmp_path) == [SCENE]
    assert list_frames(tmp_path, "camera") == sorted(frames)
    assert [frame.id for frame in list_frames(tmp_path, "camera", ["front_left"])] == ["000000003", "000000012"]
    assert list_frames(tmp_path, "image") == [Frame(SCENE, "front_center", "000000099")]
    assert list_frames(tmp_path / "nowhere", "camera") == [] and list_scenes(tmp_path / "nowhere") == []


def test_the_index_holds_every_frame_with_the_kinds_it_has(tmp_path):
    first, second, third = (Frame(SCENE, "front_center", f"{number:09d}", tmp_path) for number in (1, 2, 3))
    for frame, kind in ((third, "depth"), (first, "image"), (first, "depth"), (second, "boxes")):
        touch(frame.path(kind))
    found = index_frames(tmp_path, iter(["image", "depth"]), iter(["front_center"]))
    assert list(found.items()) == [(first, {"image", "depth"}), (third, {"depth"})]


@pytest.mark.parametrize("place", ["camera_lidar_semantic_bus", "bus", "camera_lidar_semantic_bboxes", "."])
def test_the_bus_is_found_in_each_layout(tmp_path, place):
    data = tmp_path / "camera_lidar_semantic_bboxes"
    touch(Frame(SCENE, "front_center", "000000001", data).path("camera"))
    assert find_bus_root(data) is None
    touch(bus_path(tmp_path / place, SCENE))
    assert find_bus_root(data).resolve() == (tmp_path / place).resolve()


@pytest.mark.parametrize("place", ["semantic", ".", "camera_lidar_semantic_bboxes"])
def test_the_calibration_is_found_in_each_place(tmp_path, place):
    data = tmp_path / "semantic"
    data.mkdir()
    with pytest.raises(FileNotFoundError, match=r"get_data\.sh"):
        find_calibration(data)
    touch(tmp_path / place / "cams_lidars.json")
    assert find_calibration(data).resolve() == (tmp_path / place / "cams_lidars.json").resolve()
