"""Anyone's pictures and labels become a dataset that trains, and nothing in them is taken for something else."""

import contextlib
import io
import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml
from derived_root import SIZE, write_root
from matplotlib.figure import Figure
from PIL import Image
from tiny_run import make_run, run_train, write_config

import evaluate
import train
from a2d2.dataset import DatasetError, FrameDataset, index_roots, read_dataset
from a2d2.frames import list_frames, parse_frame
from a2d2.images import ImageError, encode_png, read_depth_png, read_image, read_json, write_bytes
from a2d2.imported import (
    ClassList,
    ImportFilesError,
    find_key,
    list_files,
    name_scenes,
    read_angles,
    read_class_list,
    read_coco,
    read_mask,
)
from a2d2.splits import read_listed, split_frames
from models.heads import DetectionOutput
from models.thesis import BoxGridOutput
from tasks import TASKS
from tasks.drawing import View
from tasks.options import OPTIONS
from training.checkpoint import load_weights
from training.config import load_config

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "preprocessing"))
import import_data  # noqa: E402

NAMES = ["road", "car", "sky"]
WIDTH, HEIGHT = SIZE


def call(*arguments):
    command = [sys.executable, str(ROOT / "preprocessing/import_data.py"), *map(str, arguments), "--threads", "1"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def call_here(*arguments, check=0):
    """The same in this process, without workers, which takes a fraction of the time; `check`: the code it must have."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("sys.argv", ["import_data.py", *map(str, arguments)])
        patch.setattr(import_data, "stop_on_termination", lambda: None)
        patch.setattr(import_data, "allow_any_text", lambda: None)
        patch.setattr(
            import_data._pool, "map_units", lambda work, units, workers: ((each, work(each)) for each in units)
        )
        with pytest.raises(SystemExit) as stop:
            import_data.main()
    assert stop.value.code == check, (out.getvalue(), err.getvalue())
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def write_pictures(folder, drives=4, each=2, suffix="_image"):
    """Pictures in a folder for each drive, with masks of ids, COCO's boxes, depth and angles for some of them."""
    images, annotations, angles = [], [], ["picture,angle_deg"]
    for number in range(drives * each):
        rng = np.random.default_rng(number)
        place = f"drive {number // each}/frame{number}"
        picture = rng.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        write_bytes(folder / "images" / f"{place}{suffix}.png", encode_png(picture))
        if number % 4 != 3:
            mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
            mask[10:40, 8:30] = 1
            mask[:5] = 2
            mask[60:] = 9
            (folder / "masks" / place).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(folder / "masks" / f"{place}_label.png")
        images.append({"id": 100 + number, "file_name": f"{place}{suffix}.png", "width": WIDTH, "height": HEIGHT})
        annotations.append({"id": number, "image_id": 100 + number, "category_id": 7, "bbox": [8, 10, 22, 30]})
        angles.append(f"{place}{suffix}.png,{number * 1.5 - 3}")
        depth = np.zeros((HEIGHT, WIDTH), np.uint16)
        depth[20:40:3, 10:50:4] = 256 * (5 + number)
        write_bytes(folder / "depth" / f"{place}.png", encode_png(depth))
    annotations[0]["bbox"] = [50, 50, 30, 30]
    annotations[1]["iscrowd"] = 1
    content = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "car"}]}
    (folder / "boxes.json").write_text(json.dumps(content))
    (folder / "angles.csv").write_text("\n".join(angles))
    (folder / "classes.yaml").write_text(yaml.safe_dump({"classes": NAMES}))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def root(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "root"
    result = call(
        "--images", source / "images", "--masks", source / "masks", "--classes", source / "classes.yaml", "--boxes",
        source / "boxes.json", "--depth", source / "depth", "--angles", source / "angles.csv", "--out", out,
        "--format", "png",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "8 pictures in 4 scenes at 64x64; labels: segmentation 6, depth 8, boxes 8, steering 8" in result.stdout
    assert f"{6 * 4 * WIDTH} pixels of id 9 are in no class" in result.stdout
    return out


def test_every_label_is_where_it_belongs(source, root):
    frames = list_frames(root, "image_lossless")
    listed = read_json(root / "pictures.json")
    assert len(frames) == len(listed) == 8 and {frame.scene for frame in frames} == {f"drive_{n}" for n in range(4)}
    tasks = {
        "segmentation": TASKS["segmentation"](OPTIONS["segmentation"](classes=dict.fromkeys(NAMES, (0, 0, 9)))),
        "depth": TASKS["depth"](),
        "detection": TASKS["detection"](OPTIONS["detection"](classes=["car"], min_size=1)),
        "steering": TASKS["steering"](),
    }
    for frame in frames:
        key = listed[str(frame)]
        number = int(key.rpartition("frame")[2])
        assert np.array_equal(read_image(frame.path("image_lossless")), read_image(source / f"images/{key}_image.png"))
        labels = {name: task.load(frame) for name, task in tasks.items()}
        assert (labels["segmentation"] is None) == (number % 4 == 3)
        if number % 4 != 3:
            mask = labels["segmentation"]
            assert mask[20, 20] == 1 and mask[2, 2] == 2 and mask[50, 50] == 0 and (mask[60:] == 255).all()
        assert labels["depth"].max() == 5 + number
        assert labels["steering"].tolist() == [number * 1.5 - 3]
        (box,) = labels["detection"]
        assert box["box"] == ([50, 50, 64, 64] if number == 0 else [8, 10, 30, 40])
        assert box["visible"] == pytest.approx(14 * 14 / 900 if number == 0 else 1.0, abs=1e-4)
        assert box["class"] == ("crowd" if number == 1 else "car")


def test_the_same_command_goes_on_and_takes_in_what_is_new(tmp_path):
    write_pictures(tmp_path, drives=2)
    arguments = ["--images", tmp_path / "images", "--out", tmp_path / "out"]
    assert call(*arguments).returncode == 0
    before = read_json(tmp_path / "out/pictures.json")
    extra = tmp_path / "images/drive 0/a_new_one.png"
    write_bytes(extra, encode_png(np.full((HEIGHT, WIDTH, 3), 9, np.uint8)))
    (tmp_path / "images/drive 1/broken.png").write_bytes(b"\x89PNG nothing")
    write_bytes(tmp_path / "images/drive 1/wide.png", encode_png(np.full((HEIGHT, 2 * WIDTH, 3), 9, np.uint8)))
    result = call(*arguments)
    assert result.returncode == 3 and "1 done, 4 skipped, 2 failed" in result.stdout
    after = read_json(tmp_path / "out/pictures.json")
    assert before.items() <= after.items() and len(after) == 7
    failed = read_json(tmp_path / "out/reports/import.json")["failed"]
    assert [each["picture"] for each in failed] == ["drive 1/broken", "drive 1/wide"]
    assert "which is not the shape of 64x64" in failed[1]["reason"]
    assert len(list_frames(tmp_path / "out", "image")) == 5
    masks = ["--masks", tmp_path / "masks", "--classes", tmp_path / "classes.yaml"]
    assert "5 done" not in call(*arguments, *masks, "--size", "32x32").stdout
    assert "holds another dataset: size is [64, 64], now [32, 32]" in call(*arguments, "--size", "32x32").stderr


def test_colours_are_looked_up_exactly(tmp_path):
    write_pictures(tmp_path, drives=1)
    for path in (tmp_path / "masks").rglob("*.png"):
        colours = np.full((HEIGHT, WIDTH, 3), (10, 20, 30), np.uint8)
        colours[:8] = (10, 20, 31)
        write_bytes(path, encode_png(colours))
    (tmp_path / "classes.yaml").write_text("classes: {grass: [10, 20, 30], wall: [1, 2, 3]}")
    arguments = ["--images", tmp_path / "images", "--masks", tmp_path / "masks", "--classes", tmp_path / "classes.yaml"]
    result = call(*arguments, "--out", tmp_path / "out")
    assert result.returncode == 0 and f"{2 * 8 * WIDTH} pixels of colour #0a141f are in no class" in result.stdout
    (first, *_) = list_frames(tmp_path / "out", "segmentation")
    mask = np.load(first.path("segmentation"))
    assert (mask[:8] == 255).all() and (mask[8:] == 0).all()
    (tmp_path / "classes.yaml").write_text("classes: [grass, wall]")
    result = call(*arguments, "--out", tmp_path / "ids")
    assert result.returncode == 3 and "has colours, and the classes are given as ids" in result.stderr


def test_mistakes_are_named_before_anything_is_written(source, tmp_path):
    out = ["--out", tmp_path / "out"]
    images = ["--images", source / "images"]
    cases = {
        "there is no folder": ["--images", tmp_path / "nothing"],
        "go together": [*images, "--masks", source / "masks"],
        "has the name of a picture": [*images, "--depth", source / "images", "--masks", tmp_path, "--classes",
                                      source / "classes.yaml"],
        "is no regular expression": [*images, "--group-by", "("],
        "does not match": [*images, "--group-by", "city"],
        "none of its": [*images, "--angles", tmp_path / "other.csv"],
    }  # fmt: skip
    (tmp_path / "other.csv").write_text("picture,angle_deg\nx.png,3\n")
    for message, arguments in cases.items():
        result = call(*arguments, *out)
        assert result.returncode in (1, 2) and message in result.stderr, (message, result.stderr)
        assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()


def test_names_that_belong_together(tmp_path):
    assert (
        find_key(PurePosixPath("a/b_image.jpg"))
        == find_key(PurePosixPath("a/b_label.png"))
        == find_key(PurePosixPath("a/b.png"))
        == "a/b"
    )
    assert find_key(PurePosixPath("a/_image.jpg")) == "a/_image"
    assert name_scenes(["x/a", "x/y/b", "c"], "folder") == {"x/a": "x", "x/y/b": "x_y", "c": "all"}
    assert name_scenes(["run01_3", "run02_4"], r"run\d+") == {"run01_3": "run01", "run02_4": "run02"}
    with pytest.raises(ImportFilesError, match="would both be the scene 'a_b'"):
        name_scenes(["a/b/1", "a_b/2"], "folder")
    for name in ("x.png", "x_image.png"):
        write_bytes(tmp_path / name, b"1")
    with pytest.raises(ImportFilesError, match="have one name"):
        list_files(tmp_path, {".png"})


def test_folders_are_searched_as_they_are_seen(tmp_path):
    """Links are followed, but in no circle, and what is hidden is left out."""
    for place in ("elsewhere/far", "images/a/near", "images/.thumbnails/near", "images/a/.hidden"):
        write_bytes(tmp_path / f"{place}.png", b"1")
    (tmp_path / "images/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/a/circle").symlink_to(tmp_path / "images")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "images/a")
    (tmp_path / "images/a/forth").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/up").symlink_to(tmp_path)
    assert set(list_files(tmp_path / "images", {".png"})) == {
        "a/near", "link/far", "a/forth/far", "link/back/near",
    }  # fmt: skip


def test_folders_of_any_script_are_scenes_of_their_own():
    scenes = name_scenes(["日本/a", "中国/a", "straße/a", "strase/a"], "folder")
    assert len(set(scenes.values())) == 4 and scenes["strase/a"] == "strase"
    assert name_scenes(["日本/a"], "folder") == {"日本/a": scenes["日本/a"]}  # whatever else is there
    # those of an import before keep their name, with what has come since
    before = {"日本/a": "scene"}
    assert name_scenes(["日本/a", "日本/b"], "folder", "", before) == {"日本/a": "scene", "日本/b": "scene"}
    assert name_scenes(["x/a"], "folder", "mine") == {"x/a": "mine_x"}
    for prefix in ("a/b", "_", "ä"):
        with pytest.raises(ImportFilesError, match="--prefix"):
            name_scenes(["x/a"], "folder", prefix)
    with pytest.raises(ImportFilesError, match="the scene 'reports'"):
        name_scenes(["reports/a"], "folder")


def test_datasets_with_folders_of_equal_names_are_used_together(tmp_path):
    for name in ("one", "two"):
        own, _ = write_few(tmp_path / name)
        call_here(*own)
    with pytest.raises(DatasetError, match=r"in two roots, .*--prefix"):
        index_roots([tmp_path / "one/out", tmp_path / "two/out"], ["front_center"])
    call_here("--images", tmp_path / "two/images", "--prefix", "two", "--out", tmp_path / "new")
    frames, _ = index_roots([tmp_path / "one/out", tmp_path / "new"], ["front_center"])
    assert sorted({frame.scene for frame in frames}) == ["a", "b", "two_a", "two_b"]
    assert "'a' now" in call_here("--images", tmp_path / "two/images", "--out", tmp_path / "new", check=1).stderr


def test_what_is_written_is_never_read_as_a_source(tmp_path):
    own, _ = write_few(tmp_path)
    assert "would be read the next time" in call_here(*own[:2], "--out", tmp_path / "images/a/out", check=2).stderr


def test_labels_in_a_format_that_changes_values_are_counted(tmp_path):
    own, masks = write_few(tmp_path)
    (tmp_path / "masks/a/x.png").rename(tmp_path / "masks/a/x.jpg")
    result = call_here(*own, *masks).stdout
    assert "--masks: 1 files, such as" in result and "x.jpg, are not read" in result and ".bmp .gif .png" in result


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes: [a, a]", "twice"),
        ("classes: {a: [1, 2]}", "no colour"),
        ("names: [a]", "must hold"),
        ("[", "not YAML"),
        ("classes: {a: [1, 2, 3], b: [1, 2, 3]}", "twice"),
        ("classes: {a: [1, 2, 300]}", "no colour"),
        ("classes: [road, no]", "the class False is no text"),
        ("classes: [road, 12]", "the class 12 is no text"),
        ("classes: {road: [1, 2, 3], 7: [1, 2, 4]}", "the class 7 is no text"),
        ("classes: [road, ' ']", "the class ' ' is no text"),
    ],
)
def test_a_list_of_classes_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ImportFilesError, match=message):
        read_class_list(tmp_path / "c.yaml")


def test_boxes_and_angles_that_cannot_be_used(tmp_path):
    def check(read, text, message, keys=("a/x",)):
        (tmp_path / "file").write_text(text)
        with pytest.raises(ImportFilesError, match=message):
            read(tmp_path / "file", keys)

    coco = {"images": [{"id": 1, "file_name": "x.jpg"}], "categories": [{"id": 1, "name": "car"}], "annotations": []}
    check(read_coco, "{}", "is no file of COCO")
    check(read_coco, json.dumps(coco), "may be a/x or b/x", ("a/x", "b/x"))
    check(read_coco, json.dumps(coco), "none of its 1 file names", ("a/y",))
    wrong = coco | {"annotations": [{"id": 5, "image_id": 1, "category_id": 1, "bbox": [0, 0, -1, 2]}]}
    check(read_coco, json.dumps(wrong), "annotation 5 has the box")
    check(read_coco, json.dumps(wrong | {"annotations": [wrong["annotations"][0] | {"image_id": 3}]}), "of no image")
    check(read_angles, "file,angle\na/x,1\n", "its columns are")
    check(read_angles, "picture,angle_deg\na/x.png,left\n", "line 2: 'left' is no angle")
    check(read_angles, "picture,angle_deg\na/x.png,nan\n", "is no angle")
    check(read_angles, "picture,angle_deg\na/x.png,1\na/x.jpg,2\n", "is there twice")
    (tmp_path / "file").write_text(json.dumps(coco))
    assert read_coco(tmp_path / "file", ["a/x"]).of_key == {"a/x": []}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [("id", 1, "a/x.jpg"), ("id", 1, "b/x.jpg")]}, "id 1 of images is there twice"),
        ({"images": [("id", 1, "a/x.jpg"), ("id", 2, "a/x.png")]}, "images 1 and 2 are one picture, a/x"),
        ({"images": [("id", 1, "a/x.jpg"), ("id", "2", "b/x.jpg")]}, "such as 1 and '2'"),
        ({"images": [("id", 1, "")]}, "image 1: '' is no name"),
        ({"images": [("id", 1, ".")]}, "image 1: '.' is no name"),
        ({"images": [("id", 1, "c/x.jpg")]}, "none of its 1 file names, such as 'c/x.jpg'"),
        ({"images": [{"id": 1, "file_name": "a/x.jpg", "width": 0, "height": 8}]}, "has the size 0x8"),
        ({"categories": []}, "there are no categories"),
        ({"categories": [{"id": 1, "name": "crowd"}]}, "is called 'crowd'"),
        ({"categories": [{"id": 1, "name": None}]}, "category 1 has the name None"),
        ({"categories": [{"id": 1, "name": " "}]}, "category 1 has the name ' '"),
        ({"categories": [{"id": 1, "name": "car"}, {"id": 1, "name": "bus"}]}, "id 1 of categories is there twice"),
        ({"categories": [{"id": 1, "name": "car"}, {"id": "2", "name": "bus"}]}, "such as 1 and '2'"),
        ({"category_id": 9}, r"annotation 5 is of no category there is \(category_id 9\)"),
        ({"bbox": None}, "annotation 5 has the box None"),
        ({"bbox": [1, 2, 3]}, "annotation 5 has the box"),
        ({"bbox": [0, 0, 1, 10**400]}, "annotation 5 has the box"),
        ({"images": [{"id": 1, "file_name": "a/x.jpg", "width": 1e400, "height": 8}]}, "has the size infx8"),
        ({"image_id": [1]}, "annotation 5 is of no image"),
    ],
)
def test_a_file_of_boxes_that_may_mean_something_else_is_refused(tmp_path, change, message):
    change = dict(change)
    annotation = {"id": 5, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 2]}
    annotation |= {key: change.pop(key) for key in list(change) if key in annotation}
    content = {
        "images": [{"id": 1, "file_name": "a/x.jpg", "width": None, "height": None}],
        "categories": [{"id": 1, "name": "car"}], "annotations": [annotation],
    } | change  # fmt: skip
    content["images"] = [
        {each[0]: each[1], "file_name": each[2]} if isinstance(each, tuple) else each for each in content["images"]
    ]
    (tmp_path / "file").write_text(json.dumps(content))
    with pytest.raises(ImportFilesError, match=message):
        read_coco(tmp_path / "file", ["a/x", "b/x"])


def test_a_name_in_a_list_is_that_of_its_picture_alone(tmp_path):
    """A name with folders is no other folder's picture, and a dot in a name without an ending begins none."""
    names = ["a/x.jpg", "b/x.jpg", "y.jpg", "frame.001", "frame.002", "frame", "d/e/z_image"]
    content = {"images": [{"id": name, "file_name": name} for name in names], "annotations": []}
    (tmp_path / "file").write_text(json.dumps(content | {"categories": [{"id": 1, "name": "car"}]}))
    found = read_coco(tmp_path / "file", ["a/x", "c/y", "frame.001", "frame.002", "c/d/e/z", "e/z"])
    assert set(found.of_key) == {"a/x", "c/y", "frame.001", "frame.002", "c/d/e/z"}
    assert found.others == ("b/x.jpg", "frame")
    (tmp_path / "file").write_text("picture,angle_deg\n" + "".join(f"{name},1\n" for name in names))
    found, others = read_angles(tmp_path / "file", ["a/x", "frame.001", "frame.002"])
    assert set(found) == {"a/x", "frame.001", "frame.002"} and others == ["b/x.jpg", "y.jpg", "frame", "d/e/z_image"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture,angle_deg\nx.png,3,5\n", "line 2: it has 3 cells, and there are 2 columns"),
        ("picture,angle_deg,angle_deg\nx.png,3,5\n", "2 columns angle_deg"),
        ("picture,angle_deg\nx.png,1_0\n", "'1_0' is no angle"),
        ("picture,angle_deg\n,3\n", "line 2: '' is no name"),
        ("picture,angle_deg\n.,3\n", "line 2: '.' is no name"),
    ],
)
def test_a_file_of_angles_that_may_mean_something_else_is_refused(tmp_path, text, message):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ImportFilesError, match=message):
        read_angles(tmp_path / "file", ["x"])


@pytest.mark.parametrize(("size", "turned", "reason"), [
    ((16, 8), 1, ""), ((8, 4), 1, ""), ((8, 16), 1, "so its labels must be"), ((16, 8), 6, "so its labels must be"),
    ((8, 16), 6, ""), ((16, 16), 1, "in the file of the boxes is 16x16"),
])  # fmt: skip
def test_boxes_are_those_of_the_picture_as_it_is_shown(tmp_path, size, turned, reason):
    exif = Image.Exif()
    exif[0x0112] = turned
    write_mask(tmp_path / "images/x.png", np.zeros((8, 16, 3), np.uint8), exif=exif)
    image = {"id": 1, "file_name": "x.png", "width": size[0], "height": size[1]}
    boxes = [{"image_id": 1, "category_id": 1, "bbox": box} for box in ([0, 0, 2, 2], [1, 1, 0, 3], [99, 0, 1, 1])]
    content = {"images": [image, {"id": 2, "file_name": "gone.png"}], "annotations": boxes}
    (tmp_path / "boxes.json").write_text(json.dumps(content | {"categories": [{"id": 1, "name": "car"}]}))
    own = ["--images", tmp_path / "images", "--boxes", tmp_path / "boxes.json", "--out", tmp_path / "out"]
    result = call_here(*own, check=3 if reason else 0)
    assert reason in result.stderr and "--boxes: 1 names are of no picture, such as gone.png" in result.stdout
    if not reason:
        assert "labels: boxes 1" in result.stdout
        assert "1 boxes without an area" in result.stdout and "1 boxes outside the picture" in result.stdout
    else:
        assert "labels: boxes 0" in result.stdout


# ---------------------------------------------------------------- a second command on one folder


def write_few(folder, places=("a/x", "b/y"), mask=None):
    """Small pictures, each of another gray, and masks of id 1 or `mask`."""
    for number, place in enumerate(places):
        write_bytes(folder / f"images/{place}.png", encode_png(np.full((8, 8, 3), 9 + number, np.uint8)))
        write_mask(folder / f"masks/{place}.png", np.ones((8, 8), np.uint8) if mask is None else mask)
    (folder / "classes.yaml").write_text("classes: [road, car]")
    return ["--images", folder / "images", "--out", folder / "out"], [
        "--masks", folder / "masks", "--classes", folder / "classes.yaml",
    ]  # fmt: skip


def stop(*arguments, **options):
    raise KeyboardInterrupt


def write_mask(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def load_masks(out):
    listed = read_json(out / "pictures.json")
    return {listed[str(frame)]: np.load(frame.path("segmentation")) for frame in list_frames(out, "segmentation")}


@pytest.mark.parametrize("what", ["interrupted", "failing", "deleted"])
def test_no_label_of_another_class_list_stays(tmp_path, what, monkeypatch):
    own, masks = write_few(tmp_path)
    call_here(*own, *masks)
    (tmp_path / "classes.yaml").write_text("classes: [sky, tree]")
    assert "segmentation made with" in call_here(*own, *masks, check=1).stderr
    if what == "interrupted":
        monkeypatch.setattr(import_data, "sweep_temporary", stop)
    elif what == "failing":
        (tmp_path / "masks/a/x.png").write_bytes(b"no mask")
    else:
        (tmp_path / "masks/a/x.png").unlink()
    call_here(*own, *masks, "--overwrite", check={"interrupted": 75, "failing": 3, "deleted": 0}[what])
    assert list(load_masks(tmp_path / "out")) == ([] if what == "interrupted" else ["b/y"])
    assert read_dataset(tmp_path / "out").options["segmentation"] == {"classes": ["sky", "tree"]}


def test_a_picture_is_in_a_dataset_once(tmp_path):
    own, _ = write_few(tmp_path)
    call_here(*own)
    assert "'a/x' is in" in call_here(*own, "--group-by", "./.", check=1).stderr
    message = call_here("--images", tmp_path / "images/a", "--out", tmp_path / "out", check=1).stderr
    assert "as 'a/x' of --images" in message
    assert len(list_frames(tmp_path / "out", "image")) == len(read_json(tmp_path / "out/pictures.json")) == 2


def test_pictures_of_another_folder_replace_none_of_the_same_name(tmp_path):
    own, masks = write_few(tmp_path)
    call_here(*own, *masks)
    (tmp_path / "images").rename(tmp_path / "moved")
    assert "0 done, 2 skipped" in call_here("--images", tmp_path / "moved", *own[2:]).stdout
    write_bytes(tmp_path / "images/a/x.png", encode_png(np.full((8, 8, 3), 200, np.uint8)))
    message = call_here(*own, check=1).stderr
    assert "holds 'a/x' of --images" in message and "another folder" in message
    result = call_here(*own, "--overwrite").stdout
    assert "segmentation of changed pictures, such as 'a/x', is removed" in result and "'b/y': they stay" in result
    assert list(load_masks(tmp_path / "out")) == ["b/y"]
    (frame, _) = list_frames(tmp_path / "out", "image")
    assert read_image(frame.path("image"))[0, 0, 0] == 200


@pytest.mark.parametrize("killed", [False, True])
def test_what_has_changed_since_is_imported_again(tmp_path, killed, monkeypatch):
    own, masks = write_few(tmp_path)
    call_here(*own, *masks)
    assert "0 done, 2 skipped" in call_here(*own, *masks).stdout
    write_mask(tmp_path / "masks/a/x.png", np.zeros((8, 8), np.uint8))
    if killed:
        with monkeypatch.context() as patch:
            patch.setattr(import_data, "tqdm", stop)
            assert "'a/x'" in call_here(*own, *masks, check=75).stdout
    result = call_here(*own, *masks).stdout
    assert killed or ("1 pictures are imported again" in result and "'a/x'" in result)
    assert "1 done, 1 skipped" in result
    assert {key: mask.max() for key, mask in load_masks(tmp_path / "out").items()} == {"a/x": 0, "b/y": 1}
    (tmp_path / "masks/a/x.png").unlink()
    assert "segmentation of 'a/x': they stay" in call_here(*own, *masks).stdout
    call_here(*own, *masks, "--overwrite")
    assert list(load_masks(tmp_path / "out")) == ["b/y"]
    shutil.rmtree(tmp_path / "images/b")
    assert "1 pictures of" in call_here(*own).stdout
    (tmp_path / "out/sources.json").unlink()  # as imports of before have none
    assert "of 1 pictures have changed is not known" in call_here(*own).stdout
    (tmp_path / "angles.csv").write_text("picture,angle_deg\na/x.png,3\n")
    call_here(*own, "--angles", tmp_path / "angles.csv")
    (tmp_path / "angles.csv").write_text("picture,angle_deg\na/x.png,4\n")
    call_here(*own, "--angles", tmp_path / "angles.csv")
    (frame,) = list_frames(tmp_path / "out", "steering")
    assert read_json(frame.path("steering"))["angle_deg"] == 4


def test_a_folder_that_is_no_import_of_these_pictures_is_refused(tmp_path):
    own, _ = write_few(tmp_path)
    call_here(*own)
    listing = tmp_path / "out/pictures.json"
    whole = listing.read_text()
    for content in (None, "{}", '{"a/front_center/000000000": 3}', '{"a": "b"}', "[]"):
        listing.unlink(missing_ok=True)
        if content is not None:
            listing.write_text(content)
        message = call_here(*own, check=1).stderr
        assert "put" in message and "or import into another folder" in message, content
    listing.write_text(whole)
    about = tmp_path / "out/dataset.json"
    about.write_text(json.dumps(read_json(about) | {"predictions": {}}))
    assert "holds predictions" in call_here(*own, check=1).stderr
    about.write_text("[]")
    assert "does not describe" in call_here(*own, check=1).stderr
    about.write_text("{}")
    assert "holds another dataset: format is None" in call_here(*own, check=1).stderr


def test_classes_that_are_annotated_may_be_added_by_hand(tmp_path):
    own, _ = write_few(tmp_path)
    image = {"id": 1, "file_name": "a/x.png", "width": 8, "height": 8}
    boxes = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "bus"}]}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    own += ["--boxes", tmp_path / "boxes.json"]
    call_here(*own)
    about = tmp_path / "out/dataset.json"
    content = read_json(about)
    for value, then in ((["car"], {"annotated_classes": ["car"]}), (None, {})):
        content["kinds"]["boxes"]["annotated_classes"] = value
        about.write_text(json.dumps(content))
        call_here(*own)
        assert read_json(about)["kinds"]["boxes"] == {"classes": ["car", "bus"]} | then


def test_a_first_command_that_failed_binds_nothing(tmp_path):
    own, masks = write_few(tmp_path, mask=np.full((8, 8, 3), (1, 2, 3), np.uint8))
    result = call_here(*own, *masks, "--size", "16x16", "--group-by", "./.", check=3)
    assert "0 pictures in 0 scenes at 16x16; labels: segmentation 0" in result.stdout
    (tmp_path / "classes.yaml").write_text("classes: {road: [1, 2, 3]}")
    assert "2 pictures in 2 scenes at 8x8; labels: segmentation 2" in call_here(*own, *masks).stdout
    assert len(read_json(tmp_path / "out/pictures.json")) == 2


def test_a_report_keeps_what_was_noticed_before(tmp_path):
    own, masks = write_few(tmp_path, mask=np.full((8, 8), 7, np.uint8))
    call_here(*own, *masks)
    before = read_json(tmp_path / "out/reports/import.json")["noticed"]
    call_here(*own, *masks)
    assert read_json(tmp_path / "out/reports/import.json")["noticed"] == before != []


# ---------------------------------------------------------------- training on it

OWN = ["tasks.segmentation.classes=root", "tasks.detection.classes=root", "tasks.detection.min_size=1"]


def test_tasks_take_their_classes_from_the_dataset(root, tmp_path, capsys):
    (tmp_path / "root").symlink_to(root)
    (tmp_path / "split.yaml").write_text(
        'train: [drive_0, "drive_1", drive_2/front_center/000000000]\nval: ["drive_3*"]'
    )
    split = ["data.split=listed", f"data.split_file={tmp_path / 'split.yaml'}"]
    run = make_run(tmp_path, *OWN, *split, "train.steps=1", "train.evaluate_every=1")
    _, header = load_weights(run / "best.safetensors")
    assert list(header["tasks"]["segmentation"]["classes"]) == NAMES and header["tasks"]["detection"]["classes"] == [
        "car"
    ]
    record = json.loads((run / "record.json").read_text())["subsets"]
    assert record["val"] == {"drive_3/front_center": ["000000000", "000000001"]} and not record["test"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["evaluate.py", str(run), "--workers", "0", "--details", "--draws", "0"])
        assert evaluate.main() == 0
    assert "iou/road" in capsys.readouterr().out


def test_labels_of_other_classes_are_never_read_as_if_they_were_the_same(root, tmp_path, capsys):
    """Ids 0 to 2 are classes of A2D2, too: without a check they would be."""
    write_root(tmp_path / "root")
    own = make_run(tmp_path, "train.steps=1", "train.evaluate_every=1")
    frames, roots = index_roots([root], ["front_center"])
    with pytest.raises(DatasetError, match="road, car, sky, and those of A2D2 are expected"):
        FrameDataset(frames, roots, {"segmentation": TASKS["segmentation"]()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["evaluate.py", str(own), "--data", str(root), "--split", "all", "--workers", "0"])
        assert evaluate.main() == 1
        assert "those of A2D2 are expected" in capsys.readouterr().err
        config = write_config(tmp_path / "c.yaml", root, split="by_scene")
        assert run_train(patch, config, tmp_path / "a") == 1
        assert "classes: root takes those of a dataset" in capsys.readouterr().err
        both = f"data.roots=[{root}, {tmp_path / 'root'}]"
        assert run_train(patch, config, tmp_path / "b", both, *OWN) == 1
        message = capsys.readouterr().err
        assert "of different classes" in message and "road, car, sky" in message and "those of A2D2" in message
        assert run_train(patch, config, tmp_path / "c", "data.split=paper") == 1
        assert "drive_0 is none of these" in capsys.readouterr().err


def test_two_datasets_with_unlike_labels_train_together(source, tmp_path):
    """Masks in one, boxes and angles in the other: asymmetric labels as they come."""
    own = ["--masks", source / "masks", "--classes", source / "classes.yaml"]
    assert call("--images", source / "images", *own, "--out", tmp_path / "masks").returncode == 0
    write_root(tmp_path / "root")
    for frame in list_frames(tmp_path / "root", "segmentation"):
        frame.path("segmentation").unlink()
    content = read_json(tmp_path / "root/dataset.json")
    del content["kinds"]["segmentation"]
    (tmp_path / "root/dataset.json").write_text(json.dumps(content))
    config = write_config(tmp_path / "c.yaml", tmp_path / "root", split="by_scene")
    both = [f"data.roots=[{tmp_path / 'masks'}, {tmp_path / 'root'}]", "tasks.segmentation.classes=root"]
    setup = train.prepare(load_config(config, both, OPTIONS))
    of = {name: {setup.frames[index].root.name for index in indices} for name, indices in setup.assignment.items()}
    assert of == {"segmentation": {"masks"}, "depth": {"root"}, "detection": {"root"}, "steering": {"root"}}
    imported = [frame for frame in setup.frames if frame.root.name == "masks"]
    assert torch.isnan(FrameDataset(imported, setup.data.roots, {})[0]["camera"]).all()
    assert read_dataset(tmp_path / "masks").cameras == {}


def test_of_a_class_that_is_not_annotated_nothing_is_background(source, tmp_path):
    """Neither for the loss nor for the score; and of one that is, everything is, as before."""
    boxes = json.loads((source / "boxes.json").read_text())
    boxes["categories"].append({"id": 8, "name": "sign"})
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    arguments = ["--images", source / "images", "--boxes", tmp_path / "boxes.json", "--out"]
    assert call(*arguments, tmp_path / "all").returncode == 0
    assert call(*arguments, tmp_path / "cars", "--annotated-classes", "car").returncode == 0
    result = call(*arguments, tmp_path / "none", "--annotated-classes", "bus")
    assert result.returncode == 2 and "bus: the classes of" in result.stderr and "car, sign" in result.stderr

    batches, own = {}, {}
    for coder in ("dense", "grid"):
        options = OPTIONS["detection"](classes=["car", "sign"], min_size=1, box_coder=coder)
        task = TASKS["detection"](options)
        for name in ("all", "cars"):
            frames, roots = index_roots([tmp_path / name], ["front_center"])
            dataset = FrameDataset(frames, roots, {"detection": task}, for_training=True)
            batches[name] = dataset.collate([dataset[2], dataset[3]])["targets"]["detection"]
        for kind, target in batches.items():
            torch.manual_seed(0)
            if coder == "dense":
                count = target["match"].shape[1]
                given = torch.randn(2, count, 2, requires_grad=True)
                output = DetectionOutput(
                    given, torch.rand(2, count, 4) + 1, torch.zeros(2, count), task.box_coder.strides, (64, 64)
                )
            else:
                given = torch.randn(2, 1, 1, 10, 7, requires_grad=True)
                output = BoxGridOutput(given, (64, 64))
            task.loss(output, target).backward()
            own[coder, kind] = given.grad
    assert batches["all"]["annotated"].all() and batches["cars"]["annotated"].tolist() == [[True, False]] * 2
    assert own["dense", "all"][..., 1].abs().min() > 0 and (own["dense", "cars"][..., 1] == 0).all()
    assert torch.equal(own["dense", "all"][..., 0], own["dense", "cars"][..., 0])
    confidence, signs = own["grid", "cars"][..., 0], own["grid", "cars"][..., -1]
    assert (signs == 0).all() and 0 < (confidence != 0).sum() < (own["grid", "all"][..., 0] != 0).sum()

    # a car that is found, and two signs that may be there
    found = {
        "boxes": torch.tensor([[8.0, 10, 30, 40], [40, 40, 60, 60], [2, 2, 20, 20]]),
        "scores": torch.tensor([0.5, 0.9, 0.8]), "labels": torch.tensor([0, 1, 1]),
    }  # fmt: skip
    scores = {}
    for kind, target in batches.items():
        metrics = task.metrics()
        metrics.update([found, found], target)
        scores[kind] = metrics.compute()
    assert scores["cars"]["ap"] == pytest.approx(1.0) and scores["cars"]["ece"] == pytest.approx(0.5)
    assert scores["cars"]["errors/background"] == 0 < scores["all"]["errors/background"]
    # pictures: a sign that is said where none is annotated is not drawn as false, and the picture is no ignored box
    shown = {}
    for kind in ("all", "cars"):
        frames, roots = index_roots([tmp_path / kind], ["front_center"])
        target = FrameDataset(frames, roots, {"detection": task}, for_training=False)[2]["targets"]["detection"]
        view = View(np.zeros((64, 64, 3), np.uint8), inches=2.0)
        axes = Figure().add_subplot()
        task.draw(axes, view, found, target)
        boxes_drawn = [patch for patch in axes.patches if not patch.get_fill()]  # the others lie behind text
        shown[kind] = len(boxes_drawn), set(view.shown)
    assert shown == {"all": (3, {"found", "false"}), "cars": (1, {"found"})}
    with pytest.raises(DatasetError, match="annotated_classes = \\['tram'\\]: must be a list of some of car, sign"):
        content = read_json(tmp_path / "cars/dataset.json")
        content["kinds"]["boxes"]["annotated_classes"] = ["tram"]
        (tmp_path / "cars/dataset.json").write_text(json.dumps(content))
        frames, roots = index_roots([tmp_path / "cars"], ["front_center"])
        FrameDataset(frames, roots, {"detection": task})


def test_a_listed_split_says_what_it_cannot_do(tmp_path):
    frames = [parse_frame(f"{scene}/front_center/{number:09d}") for scene in ("a", "b_1", "b_2") for number in range(2)]
    subsets = split_frames(frames, "listed", listed={"train": ["a"], "val": ["b_*"]})
    assert [len(members) for members in subsets.values()] == [2, 4, 0]
    with pytest.raises(ValueError, match="'c' under val, and there is no such"):
        split_frames(frames, "listed", listed={"train": ["a"], "val": ["c"]})
    with pytest.raises(ValueError, match=r"under train \(a\) and val"):
        split_frames(frames, "listed", listed={"train": ["a"], "val": ["a/front_center/000000001"]})
    (tmp_path / "s.yaml").write_text("training: [a]")
    with pytest.raises(ValueError, match="must hold lists"):
        read_listed(tmp_path / "s.yaml")
    with pytest.raises(ValueError, match="cannot be read"):
        read_listed(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_pictures_that_a_phone_has_turned_are_turned(tmp_path, ending):
    """And masks as their pictures."""
    exif = Image.Exif()
    exif[0x0112] = 6
    ids = np.arange(6, dtype=np.uint8).reshape(2, 3)
    write_mask(tmp_path / f"images/a.{ending}", np.repeat(ids[..., None], 3, axis=2), exif=exif)
    write_mask(tmp_path / f"masks/a.{ending}", ids, exif=exif)
    (tmp_path / "classes.yaml").write_text("classes: [a, b, c, d, e, f]")
    masks = ["--masks", tmp_path / "masks", "--classes", tmp_path / "classes.yaml", "--format", "png"]
    call_here("--images", tmp_path / "images", *masks, "--out", tmp_path / "out")
    assert read_dataset(tmp_path / "out").size == (2, 3)
    (frame,) = list_frames(tmp_path / "out", "image_lossless")
    shown = [[3, 0], [4, 1], [5, 2]]
    assert np.load(frame.path("segmentation")).tolist() == shown
    assert read_image(frame.path("image_lossless"))[..., 0].tolist() == shown


def write_png(path, bits, colour, rows):
    """A PNG as the standard says, because Pillow writes no gray of two or four bits; rows: packed bytes of each."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    width = len(rows[0]) * 8 // bits
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0))
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b""))


IDS = ClassList(tuple(NAMES))
COLOURS = ClassList(("a", "b"), ((0, 0, 0), (1, 1, 1)))


def test_a_mask_is_read_with_the_ids_that_it_stores(tmp_path):
    path = tmp_path / "m.png"
    write_png(path, 2, 0, [bytes([0b00011011])])
    assert read_mask(path, IDS)[0].tolist() == [[0, 1, 2, 255]] and read_mask(path, IDS)[1] == {"id 3": 1}
    write_png(path, 4, 0, [bytes([0x02, 0xF1])])
    assert read_mask(path, IDS)[0].tolist() == [[0, 2, 255, 1]] and read_mask(path, IDS)[1] == {"id 15": 1}
    write_png(path, 1, 0, [bytes([0b01000001])])
    assert read_mask(path, IDS)[0].tolist() == [[0, 1, 0, 0, 0, 0, 0, 1]]
    write_mask(path, np.array([[0, 2, 300]], np.uint16))
    assert read_mask(path, IDS)[0].tolist() == [[0, 2, 255]]
    write_mask(tmp_path / "m.tif", np.array([[0, 2, -1]], np.float32))
    assert read_mask(tmp_path / "m.tif", IDS)[0].tolist() == [[0, 2, 255]]


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("classes", [IDS, COLOURS])
def test_a_mask_of_more_bits_than_are_read_is_refused(tmp_path, ending, classes):
    """Their high bytes alone would be ids and colours, too."""
    for channels in (3, 4):
        cv2.imwrite(str(tmp_path / f"m.{ending}"), np.full((4, 4, channels), 300, np.uint16))
        with pytest.raises(ImageError, match=r"m.* has colours of 16 bits"):
            read_mask(tmp_path / f"m.{ending}", classes)


@pytest.mark.parametrize(("mode", "classes", "message"), [
    ("CMYK", IDS, "holds no ids"), ("CMYK", COLOURS, "holds no RGB colours"), ("LAB", IDS, "holds no ids"),
    ("F", IDS, "holds fractions"), ("F", COLOURS, "holds no RGB colours"), ("L", COLOURS, "holds no RGB colours"),
])  # fmt: skip
def test_a_mask_of_neither_ids_nor_colours_is_refused(tmp_path, mode, classes, message):
    Image.new(mode, (4, 4), 1 if mode == "L" else 0.5 if mode == "F" else None).save(tmp_path / "m.tif")
    with pytest.raises(ImageError, match=message):
        read_mask(tmp_path / "m.tif", classes)


def test_a_damaged_label_is_named_and_not_its_picture(tmp_path):
    own, masks = write_few(tmp_path)
    mask = tmp_path / "masks/a/x.png"
    mask.write_bytes(mask.read_bytes()[:-30])
    assert f"first failure: {mask}: no mask, or a damaged one" in call_here(*own, *masks, check=3).stderr
    for data in (b"no PNG", mask.read_bytes(), encode_png(np.zeros((8, 8, 3), np.uint8))):
        (tmp_path / "depth.png").write_bytes(data)
        with pytest.raises(ImageError, match=r"depth\.png: "):
            read_depth_png(tmp_path / "depth.png")


@pytest.mark.parametrize("right", [True, False])
def test_labels_in_other_units_are_seen_in_what_is_printed(tmp_path, right):
    """Depth as disparity, boxes of two corners, angles in radians: all of them are read without an error."""
    places = [f"a/{number:02}" for number in range(24)]
    own, masks = write_few(tmp_path, places, None if right else np.full((8, 8), 2, np.uint8))  # ids from 1, not from 0
    for place in places:
        metres = np.array([40, 40, 40, 20, 8, 8, 8, 4])[:, None] * np.ones((1, 8))
        stored = metres * 256 if right else 30000 / metres
        write_bytes(tmp_path / f"depth/{place}.png", encode_png(stored.astype(np.uint16)))
    angles = [(-1) ** number * (number + 5) * (1 if right else np.pi / 180) for number in range(24)]
    lines = [f"{place},{angle}" for place, angle in zip(places, angles, strict=True)]
    (tmp_path / "angles.csv").write_text("\n".join(["picture,angle_deg", *lines]))
    corner = [4, 5, 3, 3] if right else [4, 5, 7, 8]
    content = {
        "images": [{"id": number, "file_name": f"{place}.png"} for number, place in enumerate(places)],
        "categories": [{"id": 1, "name": "car"}],
        "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": corner} for n in range(24)],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    more = ["--depth", tmp_path / "depth", "--boxes", tmp_path / "boxes.json", "--angles", tmp_path / "angles.csv"]
    more = [*masks, *more]
    for _ in range(2):  # said again by a command that finds all done
        result = call_here(*own, *more)
        if right:
            assert "look at it" not in result.stderr
            assert (
                "depth: median 14.0 m, 99 % under 40.0 m; upper half 40.0 m, lower half 8.0 m; in 24 pictu"
                in result.stdout
            )
            assert "segmentation: car 100.0%; nothing 0.0%; no pixel of road; in 24 pictures" in result.stdout
            assert "boxes: car 24; median 3x3 pixels, 0% reach beyond their picture; in 24 pictures" in result.stdout
            assert "median |angle| 16.5 degrees, 99 % under 27.8; 12 to the left, 12 to the right" in result.stdout
        else:
            told = [line for line in result.stderr.splitlines() if line.startswith("look at it: ")]
            words = ["no pixel is of any class", "disparities", "not two corners", "radians"]
            assert len(told) == 4 and all(word in line for word, line in zip(words, told, strict=True))
            assert "median 4x3 pixels, 100% reach beyond" in result.stdout
    for angle, message in (("7.5", "one side"), ("0", None)):  # a sign in a column of its own; a car that stands
        (tmp_path / "angles.csv").write_text(
            "\n".join(["picture,angle_deg", *(f"{place},{angle}" for place in places)])
        )
        stderr = call_here(*own, *more[-2:]).stderr
        assert (message in stderr) if message else ("look at it" not in stderr)
    damaged = next(iter(list_frames(tmp_path / "out", "depth"))).path("depth")
    damaged.write_bytes(b"no PNG")
    assert f"{damaged} is damaged" in call_here(*own, *more[4:6], check=1).stderr
    content["annotations"] = [{**each, "bbox": [0.5, 0.6, 0.4, 0.4]} for each in content["annotations"]]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    assert "shares of the picture" in call_here(*own, *more[6:8], check=1).stderr
