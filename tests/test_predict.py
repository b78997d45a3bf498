"""Predictions as files: scored as the run they come from, whole or not at all, on frames and on any pictures."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from derived_root import MATRIX, SIZE, write_root
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_run import make_run

import evaluate
import predict
import visualize
from a2d2.classes import CLASSES
from a2d2.dataset import Geometry
from a2d2.frames import list_frames
from a2d2.images import encode_jpeg, encode_png, read_depth_png, read_json, write_bytes, write_json, write_npy
from a2d2.predictions import list_pictures, read_any_picture
from tasks import TASKS
from training.checkpoint import load_weights, save_weights
from training.record import Record

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("set")


@pytest.fixture(scope="module")
def run(folder):
    """A run whose network predicts something: boxes get scores above the threshold."""
    write_root(folder / "root")
    return make_run(folder, "tasks.detection.score_threshold=0.001", "evaluate.protocol.detection.min_size=1")


@pytest.fixture
def call(capsys):
    """Run a script in this process: its exit code, and what it printed."""

    def run_script(module, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            workers = [] if module is visualize else ["--workers", "0"]
            patch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, arguments), *workers])
            capsys.readouterr()
            code = module.main()
        return code, *capsys.readouterr()

    return run_script


def read_tree(folder):
    """Every file but reports, by its path: its content."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "reports" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def pictures(tmp_path):
    """Pictures of several kinds and sizes, of which two have the same name, and what is no picture."""
    folder = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    color = rng.integers(0, 255, (40, 72, 3), dtype=np.uint8)
    for name in ("a/0001.jpg", "b/0001.jpg"):
        write_bytes(folder / name, encode_jpeg(color if name[0] == "a" else color[::-1]))
    write_bytes(folder / "b/0001.png", encode_png(color[:, :50]))
    write_bytes(folder / "notes.txt", b"no picture")
    return folder


def test_files_score_as_the_run_does(run, tmp_path, call):
    out = tmp_path / "out"
    assert call(predict, run, "--out", out)[0] == 0
    code, text, _ = call(evaluate, run, out, "--split", "all", "--format", "json")
    runs = json.loads(text)["runs"]
    assert code == 0 and set(runs) == {"run", "out"}
    for task in TASKS:
        ours, theirs = runs["run"][task], runs["out"][task]
        assert ours["scored_frames"] == theirs["scored_frames"] and ours["constant"] == theirs["constant"]
        # metres are stored in steps of 1/256
        for name, value in ours["metrics"].items():
            assert theirs["metrics"][name] == (None if value is None else pytest.approx(value, rel=1e-3, abs=1e-6)), (
                name
            )
    assert runs["run"]["segmentation"]["metrics"] == runs["out"]["segmentation"]["metrics"]
    assert any(read_json(frame.path("boxes"))["boxes"] for frame in list_frames(out, "boxes"))


def test_scores_depend_on_no_batch_and_no_order(run, tmp_path, call, monkeypatch):
    """Of the same predictions; equal scores of boxes, whose order COCO keeps, do not occur here."""
    out = tmp_path / "out"
    assert call(predict, run, "--out", out)[0] == 0
    options = [out, "--split", "all", "--format", "json"]
    found = [json.loads(call(evaluate, *options, "--micro-batch", size)[1])["runs"]["out"] for size in (1, 4)]
    choose = evaluate.choose_frames
    monkeypatch.setattr(evaluate, "choose_frames", lambda *given: (choose(*given)[0][::-1], []))
    found.append(json.loads(call(evaluate, *options)[1])["runs"]["out"])
    for task in TASKS:
        first = found[0][task]
        by_frame = dict(zip(first["scored_frames"], first["frame_scores"], strict=True))
        for other in (each[task] for each in found[1:]):
            assert dict(zip(other["scored_frames"], other["frame_scores"], strict=True)) == by_frame
            for name, value in first["metrics"].items():
                assert other["metrics"][name] == (value if value is None else pytest.approx(value, abs=1e-12)), name


def test_files_say_what_made_them(run, folder, tmp_path, call):
    out = tmp_path / "out"
    assert call(predict, run, "--out", out, "--split", "val", "--tasks", "segmentation", "steering")[0] == 0
    about = read_json(out / "dataset.json")
    header = about["predictions"]
    assert about["size"] == list(SIZE) and set(about["kinds"]) == {"segmentation", "steering"}
    assert len(about["kinds"]["segmentation"]["classes"]) == 19
    assert header["weights"] == hashlib.sha256((run / "best.safetensors").read_bytes()).hexdigest()
    assert header["input_size"] == list(SIZE) and header["source"] == str(folder / "root")
    record = load_weights(run / "best.safetensors")[1]["record"]
    assert header["record"] == json.loads(json.dumps(record))
    frames = set(Record.from_dict(record).subsets["val"])
    assert frames and {str(frame) for frame in list_frames(out, "steering")} == frames
    assert not list_frames(out, "depth")


def test_confidence_is_a_file_more_of_each_kind(run, tmp_path, call):
    out = tmp_path / "out"
    assert call(predict, run, "--out", out, "--confidence")[0] == 0
    frames = list_frames(out, "segmentation")
    for task in TASKS.values():
        assert list_frames(out, task.confidence_kind) == frames
    frame = frames[0]
    probability = read_depth_png(frame.path("segmentation_confidence")) / 65535
    assert probability.shape == SIZE[::-1] and probability.min() >= 1 / 19 and probability.max() <= 1
    boxes, scores = read_json(frame.path("boxes"))["boxes"], read_json(frame.path("boxes_confidence"))["scores"]
    assert [box["score"] for box in boxes] == scores == sorted(scores, reverse=True)
    assert read_json(frame.path("steering_confidence"))["spread_deg"] >= 0


def test_confidence_of_a_symmetric_network_has_no_spread():
    """What a mirrored picture must give: the mirrored depth, and the angle with the other sign."""
    depth, steering = TASKS["depth"](), TASKS["steering"](label_statistics={"scale_deg": 10.0})
    output = torch.rand(1, 8, 16).log()
    (stored,) = depth.encode_confidence(output, output.flip(2), None, (16, 8))
    assert not cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_UNCHANGED).any()
    (stored,) = depth.encode_confidence(output, (output.exp() + 1).log().flip(2), None, (16, 8))
    assert (cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_UNCHANGED) == 256).all()
    (stored,) = steering.encode_confidence(torch.tensor([[0.5]]), torch.tensor([[-0.5]]), None, (16, 8))
    assert json.loads(stored) == {"spread_deg": 0.0}
    (stored,) = steering.encode_confidence(torch.tensor([[0.5]]), torch.tensor([[0.5]]), None, (16, 8))
    assert json.loads(stored) == {"spread_deg": 10.0}


def test_a_run_that_was_stopped_goes_on_and_shards_make_the_same_files(run, tmp_path, call):
    whole = tmp_path / "whole"
    assert call(predict, run, "--out", whole, "--micro-batch", "1")[0] == 0
    out = tmp_path / "out"
    for shard in ("2/2", "1/2"):
        assert call(predict, run, "--out", out, "--micro-batch", "1", "--shard", shard)[0] == 0
    assert read_tree(out) == read_tree(whole)
    victim = list_frames(out, "depth")[0].path("depth")
    victim.unlink()
    empty = list_frames(out, "boxes")[1].path("boxes")
    empty.write_bytes(b"")
    code, text, _ = call(predict, run, "--out", out, "--micro-batch", "1")
    assert code == 0 and "2 done, 4 skipped, 0 failed" in text
    assert read_tree(out) == read_tree(whole)
    before = victim.stat().st_mtime_ns
    assert "6 done, 0 skipped" in call(predict, run, "--out", out, "--overwrite")[1]
    assert victim.stat().st_mtime_ns != before


def test_a_killed_run_leaves_whole_files_only(run, tmp_path):
    command = [sys.executable, str(ROOT / "predict.py"), str(run), "--out", str(tmp_path / "out"), "--micro-batch", "1"]
    whole = tmp_path / "whole"
    subprocess.run([*command[:4], str(whole), *command[5:]], check=True, capture_output=True)
    wanted = read_tree(whole)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list_frames(tmp_path / "out", "segmentation"):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = read_tree(tmp_path / "out")
    assert all(found[name] == wanted[name] for name in found if not Path(name).name.startswith("."))
    subprocess.run(command, check=True, capture_output=True)
    assert read_tree(tmp_path / "out") == wanted  # what was half written is swept


def test_other_weights_or_options_are_not_mixed(run, tmp_path, call):
    out = tmp_path / "out"
    assert call(predict, run, "--out", out, "--tasks", "steering")[0] == 0
    tensors, header = load_weights(run / "best.safetensors")
    del header["format"]
    name = next(name for name in tensors if name.startswith("heads.steering") and name.endswith("bias"))
    tensors[name] = tensors[name] + 1
    other = tmp_path / "other.safetensors"
    save_weights(other, tensors, header)
    code, _, err = call(predict, other, "--out", out, "--tasks", "steering")
    assert code == 1 and "made otherwise" in err and "weights" in err and err.rstrip().endswith("with --overwrite")
    code, _, err = call(predict, run, "--out", out, "--precision", "bf16")
    assert code == 1 and 'precision is "fp32", now "bf16"' in err
    # another task of the same weights is no other kind of prediction
    assert call(predict, run, "--out", out, "--tasks", "depth", "--format", "kitti")[0] == 0
    assert (out / "kitti").is_dir()
    assert set(read_json(out / "dataset.json")["kinds"]) == {"steering", "depth"}
    # those that are made again leave nothing of the others behind
    assert call(predict, other, "--out", out, "--tasks", "steering", "--split", "val", "--overwrite")[0] == 0
    assert not list_frames(out, "depth") and len(list_frames(out, "steering")) == 2
    assert not (out / "kitti").exists()
    code, _, err = call(predict, run, "--out", run)
    assert code == 1 and "is not empty and holds no predictions" in err


def test_a_dataset_is_not_overwritten_by_predictions(run, folder, call):
    before = read_tree(folder / "root")
    code, _, err = call(predict, run, "--out", folder / "root", "--overwrite")
    assert code == 1 and "holds a preprocessed dataset" in err and read_tree(folder / "root") == before


def test_pictures_keep_their_place_and_size(run, pictures, tmp_path, call):
    out = tmp_path / "out"
    code, text, _ = call(predict, run, "--images", pictures, "--out", out)
    assert code == 0 and text.count("the camera of these pictures is unknown") == 1
    assert "1 files that are no pictures are left out" in text and "depth: metres for a focal length of 0.78 x" in text
    # without a task that has a unit there is nothing to say
    only = call(predict, run, "--images", pictures, "--out", tmp_path / "only", "--tasks", "segmentation")
    assert only[0] == 0 and "unknown" not in only[1]
    for name, size in (("a/0001.jpg", (40, 72)), ("b/0001.jpg", (40, 72)), ("b/0001.png", (40, 50))):
        assert np.load(out / "segmentation" / f"{name}.npy").shape == size
        assert read_depth_png(out / "depth" / f"{name}.png").shape == size
        assert np.isfinite(read_json(out / "steering" / f"{name}.json")["angle_deg"])
        for box in read_json(out / "boxes" / f"{name}.json")["boxes"]:
            x1, y1, x2, y2 = box["box"]
            assert 0 <= x1 < x2 <= size[1] and 0 <= y1 < y2 <= size[0]
    assert read_json(out / "dataset.json")["size"] is None
    code, text, err = call(evaluate, out, run)
    assert code == 1 and "nothing to score" in err and "run of step" in text and "out of step" not in text


def test_predictions_among_the_pictures_are_no_pictures(run, folder, pictures, tmp_path, call):
    """A depth map is a PNG too: the second run of the same command must not take it for a photograph."""
    out = pictures / "predictions"
    assert call(predict, run, "--images", pictures, "--out", out)[0] == 0
    code, text, _ = call(predict, run, "--images", pictures, "--out", out)
    assert code == 0 and "0 done, 3 skipped, 0 failed" in text
    assert {path.relative_to(out / "depth").parts[0] for path in (out / "depth").rglob("*.png")} == {"a", "b"}
    code, _, errors = call(predict, run, "--images", folder / "root", "--out", tmp_path / "out")
    assert code != 0 and "is a preprocessed dataset, with labels among its pictures: use --data" in errors


def test_predictions_of_pictures_are_drawn(run, pictures, tmp_path, call):
    out, panels = tmp_path / "out", tmp_path / "panels"
    assert call(predict, run, "--images", pictures, "--out", out)[0] == 0
    code, text, _ = call(visualize, out, "--output", panels)
    assert code == 0 and "3 pictures in" in text
    assert {path.relative_to(panels).as_posix() for path in panels.rglob("*.png")} == {
        "a/0001.jpg.png",
        "b/0001.jpg.png",
        "b/0001.png.png",
    }
    code, _, errors = call(visualize, out, "--worst", "2", "--task", "depth")
    assert code == 2 and "--worst is for frames of a dataset; out is about other pictures" in errors
    (pictures / "b/0001.png").unlink()
    code, _, errors = call(visualize, out, "--output", panels)
    assert code == 1 and "1 of the pictures that" in errors and "b/0001.png" in errors


def test_predictions_are_not_scored_on_pictures_of_another_view(run, folder, tmp_path, call):
    """Equal names of frames do not make equal pictures; another size of the same view does no harm."""
    out, other = tmp_path / "out", tmp_path / "other"
    assert call(predict, run, "--out", out)[0] == 0
    shutil.copytree(folder / "root", other)

    def set_camera(root, matrix):
        about = read_json(root / "dataset.json")
        cameras = {view: camera | {"matrix": matrix.tolist()} for view, camera in about["cameras"].items()}
        write_json(root / "dataset.json", about | {"cameras": cameras})

    set_camera(other, np.diag([1.1, 1.1, 1.0]) @ MATRIX)
    for module in (evaluate, visualize):
        code, _, errors = call(module, out, "--data", other, "--split", "all")
        assert code == 1 and "of another field of view" in errors and "Traceback" not in errors
    assert call(evaluate, run, "--data", other, "--split", "all")[0] == 0  # a network is given its pictures
    large = tmp_path / "large"
    write_root(large, (2 * SIZE[0], 2 * SIZE[1]))
    set_camera(large, Geometry.identity(SIZE, (2 * SIZE[0], 2 * SIZE[1])).map_camera(MATRIX))
    assert call(evaluate, out, "--data", large, "--split", "all")[0] == 0


def test_files_and_folders_have_their_path_from_what_they_have_in_common(pictures):
    listed, videos, others = list_pictures([pictures / "a", pictures / "b/0001.png"])
    assert [str(picture.place) for picture in listed] == ["a/0001.jpg", "b/0001.png"] and not videos and not others
    (one,), _, _ = list_pictures([pictures / "a/0001.jpg"])
    assert str(one.place) == "0001.jpg"
    # a file that is named twice is one picture
    assert len(list_pictures([pictures / "a", pictures / "a/0001.jpg"])[0]) == 1


def test_a_broken_picture_is_named_and_skipped(run, pictures, tmp_path, call):
    whole = (pictures / "a/0001.jpg").read_bytes()
    (pictures / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (pictures / "empty.png").write_bytes(b"")
    (pictures / "page.jpeg").write_text("<html>503</html>")
    code, text, err = call(predict, run, "--images", pictures, "--out", tmp_path / "out")
    assert code == 3 and "3 done, 0 skipped, 3 failed" in text
    for name in ("cut.jpg", "empty.png", "page.jpeg"):
        assert f"{pictures / name}: no picture, or a damaged one" in err
    report = read_json(tmp_path / "out/reports/predict.json")
    assert [each["frame"] for each in report["failed"]] == ["cut.jpg", "empty.png", "page.jpeg"]
    # the same command goes on with what is left, and names them again
    code, text, _ = call(predict, run, "--images", pictures, "--out", tmp_path / "out")
    assert code == 3 and "0 done, 3 skipped, 3 failed" in text


def test_pictures_of_other_types_are_read_as_they_are_shown(tmp_path):
    from PIL import Image

    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(np.dstack([gray] * 3 + [255 - gray])).save(tmp_path / "alpha.png")
    for name in ("gray.png", "deep.png", "alpha.png"):
        assert np.array_equal(read_any_picture(tmp_path / name), np.dstack([gray] * 3)), name
    turned = Image.fromarray(np.dstack([gray] * 3))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held upright
    turned.crop((0, 0, 16, 8)).save(tmp_path / "turned.png", exif=exif)
    assert read_any_picture(tmp_path / "turned.png").shape == (16, 8, 3)
    Image.fromarray(gray[:8]).save(tmp_path / "turned.tif", exif=exif)
    assert np.array_equal(read_any_picture(tmp_path / "turned.tif")[..., 0], np.rot90(gray[:8], -1))


def test_a_damaged_frame_of_a_dataset_is_named_and_skipped(run, folder, tmp_path, call):
    root = tmp_path / "root"
    shutil.copytree(folder / "root", root)
    frame = list_frames(root, "image")[2]
    frame.path("image").write_bytes(frame.path("image").read_bytes()[:-200])
    code, text, err = call(predict, run, "--data", root, "--out", tmp_path / "out")
    assert code == 3 and "5 done, 0 skipped, 1 failed" in text and str(frame.path("image")) in err


def test_a_full_disk_is_one_line(run, tmp_path, call, monkeypatch):
    def refuse(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(predict, "write_bytes", refuse)
    code, _, err = call(predict, run, "--out", tmp_path / "out")
    assert (
        code == 1 and "No space left on device" in err and "the same command goes on" in err and "Traceback" not in err
    )


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--images", "nowhere"], 1, "no file or folder nowhere"),
        (["--images", str(ROOT / "README.md")], 1, "is no picture or video"),
        (["--images", str(ROOT / "configs")], 1, "no pictures in"),
        (["--data", "nowhere"], 1, "nowhere is no preprocessed dataset"),
        (["--images", "x", "--split", "val"], 2, "--split is for frames of a dataset"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, call, arguments, code, words):
    found, _, err = call(predict, run, *arguments, "--out", tmp_path / "out")
    (line,) = [line for line in err.splitlines() if line.strip()]
    assert found == code and words in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("annotated", [None, ["Car", "VanSUV"]])
def test_coco_files_give_cocos_tools_our_average_precision(run, tmp_path, call, annotated):
    """Also of frames without a label, and of classes that are not annotated, which COCO itself does not have."""
    out, root = tmp_path / "out", shutil.copytree(run.parent / "root", tmp_path / "root")
    if annotated is not None:
        about = read_json(root / "dataset.json")
        about["kinds"]["boxes"]["annotated_classes"] = annotated
        write_json(root / "dataset.json", about)
    code, text, _ = call(predict, run, "--data", root, "--out", out, "--format", "coco")
    assert code == 0 and "COCO: " in text
    truth = COCO(str(out / "coco/images.json"))
    evaluation = COCOeval(truth, truth.loadRes(str(out / "coco/detections.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    options = ["--data", root, "--split", "all", "--format", "json", "--min-size", "0", "--min-visible", "0"]
    ours = json.loads(call(evaluate, out, *options)[1])["runs"]["out"]["detection"]["score"]
    assert ours == pytest.approx(evaluation.stats[0], abs=1e-6)
    crowds: dict[str, int] = {}
    names = {image["id"]: image["file_name"] for image in truth.dataset["images"]}
    for each in truth.dataset["annotations"]:
        if each["iscrowd"] and each["bbox"] == [0, 0, *SIZE]:
            crowds[names[each["image_id"]]] = crowds.get(names[each["image_id"]], 0) + 1
    labelled = set(map(str, list_frames(root, "boxes")))
    expected = {str(frame): 5 for frame in list_frames(root, "image") if str(frame) not in labelled}
    assert crowds == expected | ({} if annotated is None else dict.fromkeys(labelled, 4))


def test_kitti_files_are_the_depth_maps(run, tmp_path, call):
    assert call(predict, run, "--out", tmp_path / "out", "--format", "kitti")[0] == 0
    for frame in list_frames(tmp_path / "out", "depth"):
        assert (tmp_path / f"out/kitti/depth/{frame}.png").read_bytes() == frame.path("depth").read_bytes()
    code, _, err = call(predict, run, "--out", tmp_path / "other", "--format", "kitti", "--tasks", "steering")
    assert code == 2 and "needs predictions of depth" in err


# ---------------------------------------------------------------- predictions of other programs


def write_foreign(out, root, change=lambda content: None):
    """What another system might write: the labels themselves, as predictions, in classes of its own."""
    content = {
        "format": 1,
        "size": list(SIZE),
        "kinds": {
            "segmentation": {"classes": list(CLASSES)},
            "depth": {},
            "boxes": {"classes": {name: list(own) for name, own in GROUPS.items()}},
            "steering": {},
        },
        "predictions": {},
    }
    change(content)
    write_json(out / "dataset.json", content)
    for frame in list_frames(root, "segmentation"):
        write_npy(frame.under(out).path("segmentation"), np.load(frame.path("segmentation")))
    for frame in list_frames(root, "depth"):
        depth = read_depth_png(frame.path("depth"))
        write_bytes(frame.under(out).path("depth"), encode_png(np.where(depth == 0, 2560, depth).astype(np.uint16)))
    names = {member: group for group, members in GROUPS.items() for member in members}
    for frame in list_frames(root, "boxes"):
        boxes = [box | {"class": names[box["class"]], "score": 0.9} for box in read_json(frame.path("boxes"))["boxes"]]
        write_json(frame.under(out).path("boxes"), {"boxes": boxes})
    for frame in list_frames(root, "steering"):
        write_json(frame.under(out).path("steering"), {"angle_deg": read_json(frame.path("steering"))["angle_deg"]})


NOT_FINITE = '{"boxes": [{"box": [0, 0, 1, NaN], "class": "cars", "score": 1}]}'
GROUPS = {
    "cars": ["Car", "VanSUV"],
    "trucks": ["Truck", "UtilityVehicle", "Trailer", "CaravanTransporter", "EmergencyVehicle"],
    "bus": ["Bus"],
    "people": ["Pedestrian"],
    "animals": ["Animal"],
    "two": ["Cyclist", "MotorBiker", "Bicycle", "Motorcycle"],
}


def test_perfect_predictions_of_another_program_have_perfect_scores(run, folder, tmp_path, call):
    """In its own classes: 38 in place of 19, six groups of boxes in place of five."""
    write_foreign(tmp_path / "oracle", folder / "root")
    options = ["--split", "all", "--format", "json", "--data", folder / "root", "--trained-frames", "unknown"]
    code, text, _ = call(evaluate, tmp_path / "oracle", *options)
    alone = json.loads(text)["runs"]["oracle"]
    scores = {task: row["score"] for task, row in alone.items()}
    assert code == 0 and scores == {"segmentation": 1.0, "depth": 0.0, "detection": 1.0, "steering": 0.0}
    assert all(row["constant"] is None and row["skill"] is None for row in alone.values())
    # beside a run it has that run's constant baseline
    both = json.loads(call(evaluate, run, tmp_path / "oracle", *options)[1])["runs"]
    for task, row in both["oracle"].items():
        assert row["constant"] == both["run"][task]["constant"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["kinds"]["segmentation"]["classes"].__setitem__(3, "Lorry"), "no class 'Lorry'"),
        (lambda c: c["kinds"]["segmentation"].pop("classes"), "does not say which `classes`"),
        (lambda c: c["kinds"]["boxes"]["classes"]["cars"].append("Spaceship"), "no class 'Spaceship'"),
        (lambda c: c["kinds"]["boxes"]["classes"].pop("bus"), "its classes are"),
        (lambda c: c["kinds"]["boxes"]["classes"]["people"].append("Bus"), "its classes are"),
    ],
)
def test_classes_that_cannot_be_mapped_are_not_scored(folder, tmp_path, call, change, words):
    write_foreign(tmp_path / "oracle", folder / "root", change)
    options = ["--split", "all", "--data", folder / "root", "--trained-frames", "unknown"]
    code, text, _ = call(evaluate, tmp_path / "oracle", *options)
    assert code == 0 and "not scored, because" in text and words in text


def test_a_class_that_is_none_of_the_scored_ones_is_wrong(folder, tmp_path, call):
    out = tmp_path / "oracle"
    write_foreign(out, folder / "root")
    for frame in list_frames(out, "segmentation"):
        write_npy(frame.path("segmentation"), np.full(SIZE[::-1], 37, np.uint8))  # rain dirt, which the 19 classes lack
    options = ["--split", "all", "--format", "json", "--data", folder / "root", "--trained-frames", "unknown"]
    row = json.loads(call(evaluate, out, *options)[1])["runs"]["oracle"]["segmentation"]
    assert row["score"] == 0.0 and row["metrics"]["pixel_accuracy"] == 0.0


@pytest.mark.parametrize(
    ("kind", "spoil", "words"),
    [
        ("segmentation", lambda path: path.unlink(), "has no prediction of segmentation for 1 of"),
        ("segmentation", lambda path: write_npy(path, np.zeros((8, 8), np.uint8)), "is 8x8, its dataset 64x64"),
        ("segmentation", lambda path: write_npy(path, np.zeros(SIZE[::-1], np.float32)), "expected uint8"),
        ("depth", lambda path: write_bytes(path, encode_png(np.zeros(SIZE[::-1], np.uint16))), "no prediction (0) for"),
        ("depth", lambda path: path.write_bytes(path.read_bytes()[:-40]), "is damaged"),
        (
            "boxes",
            lambda path: write_json(path, {"boxes": [{"box": [0, 0, 1, 1], "class": "cars"}]}),
            "needs box, class",
        ),
        (
            "boxes",
            lambda path: path.write_text('{"boxes": [{"box": [0, 0, 1, NaN], "class": "cars", "score": 1}]}'),
            "fin",
        ),
        (
            "boxes",
            lambda path: write_json(path, {"boxes": [{"box": [40, 9, 12, 20], "class": "cars", "score": 0.5}]}),
            "has the box [40.0, 9.0, 12.0, 20.0], whose edges are not x1 <= x2",
        ),
        (
            "boxes",
            lambda path: write_json(path, {"boxes": [{"box": [0, 0, 9, 9], "class": "cars", "score": 98}]}),
            "has the score 98, which is not from 0 to 1",
        ),
        ("steering", lambda path: write_json(path, {"angle_deg": None}), "angle"),
        ("steering", lambda path: write_json(path, {"angles": [1]}), "has no 'angle_deg'"),
    ],
)
def test_damaged_or_missing_predictions_are_named(folder, tmp_path, call, kind, spoil, words):
    out = tmp_path / "oracle"
    write_foreign(out, folder / "root")
    spoil(list_frames(out, kind)[0].path(kind))
    options = ["--split", "all", "--data", folder / "root", "--trained-frames", "unknown"]
    code, text, err = call(evaluate, out, *options)
    assert code == 1 and words in err and "Traceback" not in err and not text


def shorten_video(path):
    """Write a video of 40 frames whose file ends in the middle; return its path."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (64, 48))
    rng = np.random.default_rng(0)
    for _ in range(40):
        writer.write(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    writer.release()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def test_a_video_gives_files_and_panels(run, tmp_path, call):
    pytest.importorskip("av")
    from pictures.video import write_video

    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(5)]
    write_video(tmp_path / "in/drive.mp4", iter(frames), 10.0)
    code, text, _ = call(predict, run, "--images", tmp_path / "in", "--out", tmp_path / "out")
    assert code == 0 and "5 done" in text
    names = sorted(path.name for path in (tmp_path / "out/segmentation/drive.mp4").iterdir())
    assert names == [f"{number:06d}.npy" for number in range(5)]
    capture = cv2.VideoCapture(str(tmp_path / "out/panels/drive.mp4.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 5 and capture.get(cv2.CAP_PROP_FPS) == 10
    cut_off = shorten_video(tmp_path / "drive.avi")
    code, text, err = call(predict, run, "--images", cut_off, "--out", tmp_path / "short")
    assert code == 3 and "1 failed" in text and "drive.avi says it has 40 frames, and only" in err
    (tmp_path / "in/broken.mp4").write_bytes((tmp_path / "in/drive.mp4").read_bytes()[:300])
    code, text, err = call(predict, run, "--images", tmp_path / "in", "--out", tmp_path / "out")
    assert code == 3 and "0 done, 5 skipped, 1 failed" in text and "broken.mp4: no video, or a damaged one" in err


def test_two_at_once_on_one_folder_are_safe(run, tmp_path):
    command = [sys.executable, str(ROOT / "predict.py"), str(run), "--micro-batch", "1", "--workers", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, "--out", str(tmp_path / "out")], env=environment, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], env=environment, check=True, capture_output=True)
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "whole")
