"""preprocessing/check.py: it reports the content of a dataset, and exactly the defects that a test planted."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from raw_scenes import encode, write_raw_set

from a2d2.bus import ANGLE, SENTINELS
from a2d2.calibration import load_calibration
from a2d2.checks.assumptions import ASSUMPTIONS
from a2d2.checks.facts import (
    YAW_RATE,
    BoxFacts,
    BusFacts,
    FrameFacts,
    LidarFacts,
    Turn,
    count_colours,
    read_bus_scene,
    read_frame,
)
from a2d2.checks.known import (
    BARE_SCENES,
    BOX_SCENES,
    REGRESSION_CLASSES,
    REGRESSION_REMAINDER,
    REGRESSION_SCENE,
    SCENES,
    UNMAPPED,
)
from a2d2.checks.plots import draw_angles, draw_boxes
from a2d2.checks.raw_set import RawSet, bind_reader, mark_damaged, open_set
from a2d2.checks.report import build_report
from a2d2.classes import COLOUR_NAMES, OBJECT_CLASSES
from a2d2.frames import VIEWS, Frame, bus_path, find_bus_root, list_frames, list_scenes
from a2d2.images import read_rgb_png
from a2d2.synthetic.writer import write_dataset

ROOT = Path(__file__).resolve().parent.parent
VIEW = "front_center"
OK, DIFFERS, NOT_CHECKABLE = "ok", "differs", "not checkable"
SIZE = (240, 152)


def run(*arguments):
    command = [sys.executable, ROOT / "preprocessing/check.py", "--threads", "2", *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd="/", timeout=120)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done


def check(root, **options):
    """The report of a raw dataset, read in this process."""
    raw = open_set(root, **options)
    return build_report(raw, map(bind_reader(raw, False), raw.list_units()))


def read_verdicts(report):
    return {check.name: check.verdict for check in report.checks}


def details(report, name):
    return next(check.details for check in report.checks if check.name == name)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    out = tmp_path_factory.mktemp("clean")
    write_dataset(out, scenes=5, frames=4, size=SIZE, workers=1)
    return out / "camera_lidar_semantic_bboxes"


@pytest.fixture(scope="module")
def verdicts(clean):
    return read_verdicts(check(clean))


@pytest.fixture
def root(clean, tmp_path):
    """A copy of the clean dataset, which a test may damage."""
    return Path(shutil.copytree(clean.parent, tmp_path / "set")) / clean.name


def edit_json(path, change):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def edit_npz(path, change):
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **(change(arrays) or arrays))


def edit_bus(root, change):
    """Change every bus item of the dataset in place."""
    bus_root = find_bus_root(root)
    for scene in list_scenes(bus_root):
        edit_json(bus_path(bus_root, scene), lambda items: [change(item) or item for item in items])


def list_mapped(root):
    return [frame for frame in list_frames(root, "lidar") if "row" in np.load(frame.path("lidar")).files]


def list_boxed(root):
    frames = list_frames(root, "label3D")
    return [frame for frame in frames if len(json.loads(frame.path("label3D").read_text())) > 1]


# ---------------------------------------------------------------- what is there


def test_a_clean_set_is_what_it_is(clean, verdicts, tmp_path):
    done = run("--data", clean, "--out", tmp_path)
    assert done.returncode == 0, done.stdout
    out = tmp_path / clean.name
    content = json.loads((out / "check.json").read_text())
    assert {row["name"]: row["verdict"] for row in content["checks"]} == verdicts
    assert verdicts.keys() == ASSUMPTIONS.keys()
    assert content["failed"] == [] and content["damaged"] == [] and content["set"] == "boxes"
    for name, verdict in verdicts.items():
        allowed = {OK} if ASSUMPTIONS[name].needed else {OK, NOT_CHECKABLE, DIFFERS}
        assert verdict in allowed, name
    for row in content["counts"]:
        for kind, pattern in (("camera", "camera/*/*.png"), ("label", "label/*/*"), ("lidar", "lidar/*/*")):
            assert row[kind] == len(list((clean / row["scene"]).glob(pattern)))
    assert str(out) in done.stdout and "training depends on" not in done.stdout.splitlines()[-2]
    for name in ("classes", "depth", "boxes", "angles"):
        assert min(decode_rgb_png_of_plot(out / f"{name}.png").shape[:2]) > 400
    assert not list(out.glob(".*"))

    # counted again, pixel by pixel
    pixels = Counter()
    for frame in list_frames(clean, "label"):
        colours, counts = np.unique(read_rgb_png(frame.path("label")).reshape(-1, 3), axis=0, return_counts=True)
        pixels.update({f"#{r:02x}{g:02x}{b:02x}": int(n) for (r, g, b), n in zip(colours, counts, strict=True)})
    histogram = next(row["details"]["histogram"] for row in content["checks"] if row["name"] == "colours")
    assert {colour: row["pixels"] for colour, row in histogram.items() if row["pixels"]} == pixels


def decode_rgb_png_of_plot(path):
    import cv2

    return cv2.imread(str(path))


@pytest.mark.skipif("A2D2_REAL" not in os.environ, reason="A2D2_REAL names no folder with real files")
def test_the_real_files_are_what_they_are(tmp_path):
    data = Path(os.environ["A2D2_REAL"]) / "camera_lidar_semantic_bboxes"
    done = run("--data", data, "--out", tmp_path)
    assert done.returncode == 0, done.stdout
    content = json.loads((tmp_path / data.name / "check.json").read_text())
    rows = {row["name"]: row for row in content["checks"]}
    assert content["frames"] == 5 and content["damaged"] == []
    totals = {kind: sum(row[kind] for row in content["counts"]) for kind in ("camera", "label", "lidar", "label3D")}
    assert totals == {"camera": 4, "label": 4, "lidar": 1, "label3D": 1}
    assert rows["colours"]["details"]["unknown"] == 0
    assert rows["colours"]["details"]["pixels"] == 4 * 1920 * 1208
    assert rows["lidar_geometry"]["details"]["largest"] < 1e-6
    assert rows["lidar_points"]["details"]["median"] == 8196
    assert rows["lidar_depth"]["details"]["largest"] == 0
    assert rows["box_geometry"]["details"]["largest"] < 0.2 and rows["box_geometry"]["details"]["boxes"] == 4
    assert all(rows[name]["verdict"] == NOT_CHECKABLE for name in rows if name.startswith("bus_"))
    assert rows["scenes"]["verdict"] == NOT_CHECKABLE and len(rows["scenes"]["details"]["absent"]) == 14
    differing = {name for name, row in rows.items() if row["verdict"] == DIFFERS}
    assert differing == {"frame_counts", "complete_frames"}
    assert not (tmp_path / data.name / "angles.png").exists()


def test_colours_are_counted_as_pixel_by_pixel():
    rng = np.random.default_rng(0)
    table = np.array([[int(text[at : at + 2], 16) for at in (1, 3, 5)] for text in COLOUR_NAMES], np.uint8)
    foreign = np.array([[0, 0, 0], [1, 2, 3], [255, 255, 255]], np.uint8)
    colours = np.concatenate([table, foreign])
    for shape, block in (((1, 1), 1), ((7, 5), 1), ((30, 40), 6), ((16, 16), 16)):
        small = rng.integers(0, len(colours), (-(-shape[0] // block), -(-shape[1] // block)))
        chosen = np.kron(small, np.ones((block, block), int))[: shape[0], : shape[1]]
        facts = count_colours(colours[chosen])
        counts = Counter(chosen.ravel().tolist())
        assert facts.known == {text: counts[i] for i, text in enumerate(COLOUR_NAMES) if counts[i]}
        expected = {f"#{r:02x}{g:02x}{b:02x}": counts[55 + i] for i, (r, g, b) in enumerate(foreign) if counts[55 + i]}
        assert facts.foreign_colours == expected and facts.foreign == sum(expected.values())


def test_of_thousands_of_foreign_colours_the_most_frequent_are_named():
    picture = np.random.default_rng(1).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    picture[:10] = (1, 2, 3)
    facts = count_colours(picture)
    assert facts.foreign + sum(facts.known.values()) == 3600
    assert len(facts.foreign_colours) == 20 and facts.foreign_colours["#010203"] >= 600


# ---------------------------------------------------------------- planted defects


def paint_labels(root):
    first, second = (frame.path("label") for frame in list_frames(root, "label")[:2])
    for path, pixels in ((first, 3), (second, 2)):
        label = read_rgb_png(path)
        label[5, 10 : 10 + pixels] = (1, 2, 3)
        path.write_bytes(encode(label))
    frames = [str(frame) for frame in list_frames(root, "label")[:2]]
    return {"unknown": 5, "frames": dict(zip(frames, (3, 2), strict=True)), "foreign_colours": {"#010203": 5}}


def shift_rows(root):
    frame = list_mapped(root)[1]
    # only points of the upper half, so that none leaves the picture
    edit_npz(frame.path("lidar"), lambda arrays: {**arrays, "row": arrays["row"] + 3 * (arrays["row"] < 76)})
    return {"largest": pytest.approx(3), "beyond": {str(frame): pytest.approx(3)}}


def shift_columns(root):
    frame = list_mapped(root)[0]
    edit_npz(frame.path("lidar"), lambda arrays: {**arrays, "col": arrays["col"] + 4 * (arrays["col"] < 120)})
    return {"largest": pytest.approx(4), "beyond": {str(frame): pytest.approx(4)}}


def stretch_depths(root):
    frame = list_mapped(root)[2]
    farthest = np.load(frame.path("lidar"))["depth"].max()
    edit_npz(frame.path("lidar"), lambda arrays: {**arrays, "depth": arrays["depth"] * 1.1})
    return {"largest": pytest.approx(0.1 * farthest), "beyond": {str(frame): pytest.approx(0.1 * farthest)}}


def confuse_distances(root):
    frame = list_mapped(root)[2]
    edit_npz(frame.path("lidar"), lambda arrays: {**arrays, "distance": arrays["distance"] + 0.5})
    return {"largest": pytest.approx(0.5), "beyond": {str(frame): pytest.approx(0.5)}}


def forget_rows(root):
    mapped, all_frames = list_mapped(root), list_frames(root, "lidar")
    edit_npz(mapped[0].path("lidar"), lambda arrays: {key: array for key, array in arrays.items() if key != "row"})
    lacking = sorted({str(frame) for frame in all_frames} - {str(frame) for frame in mapped[1:]})
    return {"found": lacking, "not_known": lacking, "known_but_whole": []}


def lose_points(root):
    def lose(arrays):
        arrays["points"][:7, 1] = np.nan
        arrays["points"][7, 2] = np.inf

    frame = list_mapped(root)[0]
    edit_npz(frame.path("lidar"), lose)
    return {"points": {str(frame): 8}}


def push_points_off(root):
    """Move points and their pixels together, so that the geometry stays consistent."""
    camera = load_calibration(root / "cams_lidars.json").cameras[VIEW]

    def push(arrays):
        arrays["points"][:5] = [10.0, 60.0, 0.0]
        arrays["col"][:5], arrays["row"][:5] = camera.project(arrays["points"][:5]).T
        arrays["depth"], arrays["distance"] = arrays["points"][:, 0], np.linalg.norm(arrays["points"], axis=1)

    frame = list_mapped(root)[0]
    edit_npz(frame.path("lidar"), push)
    return {"farther_off": {str(frame): 5}, "round_to_no_pixel": 5}


def change_types(root):
    edit_npz(list_mapped(root)[0].path("lidar"), lambda arrays: {**arrays, "row": arrays["row"].astype(np.float32)})
    return {}


def add_array(root):
    edit_npz(list_mapped(root)[0].path("lidar"), lambda arrays: {**arrays, "boundary": arrays["row"]})
    return {}


def duplicate_boxes(root):
    boxes = before = 0
    surplus = {}
    for frame in list_frames(root, "label3D"):
        content = json.loads(frame.path("label3D").read_text())
        if frame == list_boxed(root)[0]:
            first = next(iter(content.values()))
            content |= {f"copy_{number}": first for number in range(40)}
            frame.path("label3D").write_text(json.dumps(content))
        keys = [(entry["class"], tuple(entry["2d_bbox"])) for entry in content.values()]
        boxes += len(keys)
        before += len(keys) - len(set(keys))
        if len(keys) > len(set(keys)):
            surplus[str(frame)] = len(keys) - len(set(keys))
    return {"surplus": before, "boxes": boxes, "frames": surplus}


def rename_classes(root):
    def rename(content):
        for number, entry in enumerate(content.values()):
            entry["class"] = ("Spaceship", "Utility Vehicle", "motor_biker")[min(number, 2)]

    frame = list_boxed(root)[0]
    edit_json(frame.path("label3D"), rename)
    return {"foreign": {"Spaceship": 1}}


def shift_boxes(root):
    def shift(content):
        for entry in content.values():
            entry["2d_bbox"] = [value + 5 for value in entry["2d_bbox"]]

    for frame in list_frames(root, "label3D"):
        edit_json(frame.path("label3D"), shift)
    return {"median": pytest.approx(5, abs=0.01), "largest": pytest.approx(5, abs=0.01)}


def flip_signs(root):
    r = details(check(root), "bus_sign")["r"]

    def flip(item):
        signs = item["flexray"][f"{ANGLE}_sign"]
        signs["values"] = [1 - sign for sign in signs["values"]]

    edit_bus(root, flip)
    return {"r": pytest.approx(-r)}


def scatter_angles(root):
    """Yaw rates that do not depend on the angle."""
    rng = np.random.default_rng(3)

    def scatter(item):
        rate = item["flexray"]["angular_velocity_omega_z"]
        rate["values"] = [float(rng.choice([-1, 1]))] * len(rate["values"])

    edit_bus(root, scatter)
    return {}


def plant_sentinels(root):
    totals = Counter()

    def plant(item):
        signal = item["flexray"][ANGLE]
        signal["values"][:5] = [614.10, 614.25, 614.10, 614.25, 614.25][: len(signal["values"])]
        totals["samples"] += len(signal["values"])
        totals["sentinels"] += sum(value in SENTINELS for value in signal["values"])

    edit_bus(root, plant)
    return {"samples": totals["samples"], "sentinels": totals["sentinels"]}


def plant_negative_magnitudes(root):
    def plant(item):
        values = item["flexray"][ANGLE]["values"]
        item["flexray"][ANGLE]["values"] = [*values[:-1], -3.0] if values else values

    edit_bus(root, plant)
    return {"least": -3}


def rename_items(root):
    edit_bus(root, lambda item: item | {"frame_name": item["frame_name"].replace("camera", "lidar")})
    return {"joined": 0, "frames": len(list_frames(root, "camera"))}


def move_items_in_time(root):
    moved = []

    def move(item):
        if not moved:
            moved.append(item["frame_name"])
            return item | {"timestamp": item["timestamp"] + 1}
        return item

    edit_bus(root, move)
    frame = next(frame for frame in list_frames(root, "camera") if frame.path("camera_info").name == moved[0])
    return {"other": [str(frame)], "late": 0}


def shorten_sign_lists(root):
    items = []

    def shorten(item):
        signal = item["flexray"][f"{ANGLE}_sign"]
        if item["flexray"][ANGLE]["values"] and len(items) < 2:
            items.append(item)
            signal["values"], signal["timestamps"] = signal["values"][:-1], signal["timestamps"][:-1]

    edit_bus(root, shorten)
    return {"unequal": 2}


def forget_speeds(root):
    def forget(item):
        del item["flexray"]["vehicle_speed"]

    edit_bus(root, forget)
    return {}


def forget_signs(root):
    def forget(item):
        item["flexray"][f"{ANGLE}_sign"] = {"timestamps": [], "values": []}

    edit_bus(root, forget)
    return {}


def remove_label(root):
    before = details(check(root), "complete_frames")["without"].get("label", [])
    frame = list_frames(root, "label")[0]
    frame.path("label").unlink()
    return {"label": sorted([*before, str(frame)])}


def write_gray_label(root):
    frame = list_frames(root, "label")[0]
    frame.path("label").write_bytes(encode(read_rgb_png(frame.path("label"))[..., 0].copy()))
    return {"other": [frame.path("label").name]}


def write_small_picture(root):
    frame = list_frames(root, "camera")[0]
    frame.path("camera").write_bytes(encode(read_rgb_png(frame.path("camera"))[:100].copy()))
    return {"other": [frame.path("camera").name]}


def bend_lens(root):
    def bend(content):
        content["cameras"][VIEW]["Distortion"] = [[0.2, 0, 0, 0, 0]]

    edit_json(root / "cams_lidars.json", bend)
    return {}


def recolour_list(root):
    edit_json(root / "class_list.json", lambda content: content | {"#ff0000": "Cart 1"})
    return {"differing": ["#ff0000"]}


def forget_times(root):
    first = list_frames(root, "camera_info")[0]
    edit_json(first.path("camera_info"), lambda content: {"cam_name": VIEW})
    return {"lacking": [str(first)], "falling": []}


def turn_time_back(root):
    first, second = list_frames(root, "camera_info")[:2]
    moment = json.loads(first.path("camera_info").read_text())["cam_tstamp"]
    edit_json(second.path("camera_info"), lambda content: content | {"cam_tstamp": moment})
    bus = bus_path(find_bus_root(root), second.scene)
    name = second.path("camera_info").name
    edit_json(
        bus, lambda items: [item | {"timestamp": moment} if item["frame_name"] == name else item for item in items]
    )
    return {"lacking": [], "falling": [str(second)]}


# function that plants a defect -> the check that must find it, and others whose verdict may change
DEFECTS = {
    paint_labels: ("colours",),
    shift_rows: ("lidar_geometry",),
    shift_columns: ("lidar_geometry",),
    stretch_depths: ("lidar_depth",),
    confuse_distances: ("lidar_distance",),
    forget_rows: ("lidar_unmapped",),
    lose_points: ("lidar_finite",),
    push_points_off: ("lidar_range",),
    change_types: ("lidar_types",),
    add_array: ("lidar_keys",),
    duplicate_boxes: ("box_duplicates",),
    rename_classes: ("box_classes",),
    shift_boxes: ("box_geometry",),
    flip_signs: ("bus_sign",),
    scatter_angles: ("bus_sign",),
    plant_sentinels: ("bus_sentinels",),
    plant_negative_magnitudes: ("bus_magnitudes",),
    rename_items: ("bus_join", "bus_times"),
    move_items_in_time: ("bus_times",),
    shorten_sign_lists: ("bus_samples",),
    forget_speeds: ("bus_motion", "bus_sign"),
    forget_signs: ("bus_signals", "bus_samples", "bus_sign"),
    remove_label: ("complete_frames",),
    write_gray_label: ("picture_type",),
    write_small_picture: ("picture_type",),
    bend_lens: ("lens",),
    recolour_list: ("colour_list",),
    forget_times: ("frame_times",),
    turn_time_back: ("frame_times", "bus_times"),
}


@pytest.mark.parametrize("plant", DEFECTS, ids=lambda plant: plant.__name__)
def test_a_planted_defect_is_found_and_nothing_else(root, verdicts, plant):
    expected = plant(root)
    report = check(root)
    name, *touched = DEFECTS[plant]
    found = read_verdicts(report)
    assert found[name] == DIFFERS
    changed = {other for other in found if found[other] != verdicts[other]}
    assert changed <= {name, *touched}
    failed = {each for each in {name} | changed if found[each] == DIFFERS}
    assert set(report.list_failed()) == {each for each in failed if ASSUMPTIONS[each].needed}
    values = details(report, name)
    values = values["without"] if name == "complete_frames" else values
    assert {key: values[key] for key in expected} == expected
    json.dumps(report.describe(), allow_nan=False)


def test_a_few_bad_boxes_are_named_but_no_failure(root, verdicts):
    def shift(content):
        content["box_0"]["2d_bbox"][0] -= 9

    frame = list_boxed(root)[0]
    edit_json(frame.path("label3D"), shift)
    report = check(root)
    assert read_verdicts(report)["box_geometry"] == OK
    assert details(report, "box_geometry")["beyond"] == {str(frame): 1}


def test_damaged_files_are_named_and_the_rest_is_checked(root, verdicts, tmp_path):
    damaged = {}

    def damage(path, content):
        path.write_bytes(content)
        damaged[str(path)] = path

    camera, label, lidar, boxes = (list_frames(root, kind) for kind in ("camera", "label", "lidar", "label3D"))
    cut = camera[0].path("camera")
    damage(cut, cut.read_bytes()[:-500])
    damage(camera[1].path("camera"), b"")
    damage(camera[2].path("camera_info"), b'{"cam_tstamp": ')
    data = bytearray(label[0].path("label").read_bytes())
    data[len(data) // 2] ^= 1
    damage(label[0].path("label"), bytes(data))
    damage(label[1].path("label"), b"<html>503</html>")
    damage(lidar[0].path("lidar"), lidar[0].path("lidar").read_bytes()[:3000])
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, row=np.array([{}], dtype=object), col=np.zeros(1), depth=np.zeros(1))
    damage(lidar[1].path("lidar"), pickled.read_bytes())
    damage(boxes[0].path("label3D"), b"[1, 2]")
    damage(boxes[1].path("label3D"), json.dumps({"box_0": {"class": 7}, "box_1": {"class": "Car"}}).encode())
    damage(bus_path(find_bus_root(root), camera[0].scene), b"[{")

    done = run("--data", root, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout  # no failure: preprocessing reports and skips such files
    content = json.loads((tmp_path / "out" / root.name / "check.json").read_text())
    assert {row["file"] for row in content["damaged"]} == damaged.keys()
    assert all(row["reason"] for row in content["damaged"]) and len(content["damaged"]) == len(damaged)
    for path in damaged.values():
        assert path.name in done.stdout
    found = {row["name"]: row["verdict"] for row in content["checks"]}
    changed = {name for name in found if found[name] != verdicts[name]}
    assert changed <= {"readable", "lidar_unmapped", "bus_items"} and found["readable"] == DIFFERS
    classes = next(row["details"]["classes"] for row in content["checks"] if row["name"] == "box_classes")
    entries = [json.loads(frame.path("label3D").read_text()).values() for frame in boxes[2:]]
    assert classes == Counter(entry["class"] for frame in entries for entry in frame) + Counter(["Car"])


def test_a_flipped_bit_inside_a_picture_is_found_when_it_is_decoded(root):
    path = list_frames(root, "camera")[0].path("camera")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(bytes(data))
    for decode, damaged in ((False, 0), (True, 1)):
        raw = open_set(root)
        report = build_report(raw, map(bind_reader(raw, decode), raw.list_units()))
        assert len(report.describe()["damaged"]) == damaged


def test_whatever_a_file_holds_reading_does_not_raise(root):
    rng = np.random.default_rng(5)
    raw = open_set(root)
    frame = next(frame for frame, kinds in raw.index.items() if len(kinds) == 5)
    bus_file = bus_path(raw.bus_root, frame.scene)
    numbers = [b"NaN", b"1e999", b"-1e308", b"null", b'"x"', b"[]", b"{}", b"99999999999999999999", b"true"]
    for kind in (*raw.index[frame], "bus"):
        path = bus_file if kind == "bus" else frame.path(kind)
        whole = path.read_bytes()
        for _ in range(25):
            data = bytearray(whole)
            at = int(rng.integers(len(data)))
            if path.suffix == ".json" and rng.random() < 0.7:
                digits = [i for i in range(len(data)) if data[i : i + 1] in b"0123456789[{" and data[i - 1] in b" :[,"]
                at = int(rng.choice(digits))
                data[at : at + 1] = numbers[rng.integers(len(numbers))]
            elif rng.random() < 0.3:
                data = data[:at]
            else:
                data[at] ^= 1 << rng.integers(8)
            path.write_bytes(bytes(data))
            unit = frame.scene if kind == "bus" else (frame, raw.index[frame])
            report = build_report(raw, [bind_reader(raw, True)(unit)])
            json.dumps(report.describe(), allow_nan=False)
            report.format()
        path.write_bytes(whole)


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"cameras": {"front_center": {}}}', None])
def test_without_a_calibration_the_rest_is_checked(root, verdicts, content):
    path = root / "cams_lidars.json"
    path.unlink() if content is None else path.write_bytes(content)
    report = check(root)
    found = read_verdicts(report)
    if content == b"{}":
        assert found["calibration"] == DIFFERS
    assert report.list_failed() == ["calibration"]
    needing = {"views", "lens", "lidar_range", "lidar_geometry", "box_geometry"}
    assert {name for name in found if found[name] != verdicts[name]} == {"calibration", *needing}
    assert all(found[name] == NOT_CHECKABLE for name in needing)


def test_a_camera_the_calibration_lacks_is_a_failure(root):
    def remove(content):
        del content["cameras"][VIEW]

    edit_json(root / "cams_lidars.json", remove)
    assert check(root).list_failed() == ["views"]


def test_a_frame_that_kills_its_worker_is_named(clean):
    raw = open_set(clean)
    units = raw.list_units()
    read = bind_reader(raw, False)
    scene, (frame, kinds) = units[0], units[-1]
    facts = [mark_damaged(unit, "killed") if unit in (units[0], units[-1]) else read(unit) for unit in units]
    damaged = build_report(raw, facts).describe()["damaged"]
    expected = {str(bus_path(raw.bus_root, scene)), *(str(frame.path(kind)) for kind in kinds)}
    assert {row["file"] for row in damaged} == expected and {row["reason"] for row in damaged} == {"killed"}


# ---------------------------------------------------------------- the known numbers


def make_set(kind, files, cameras=None):
    """A raw dataset that consists of a listing only: {(scene, view, id): kinds}."""
    index = {Frame(scene, view, f"{number:09d}"): frozenset(kinds) for (scene, view, number), kinds in files.items()}
    return RawSet(Path("raw"), kind, dict(sorted(index.items())), cameras or {}, "", None)


ALL_KINDS = ("camera", "camera_info", "label", "lidar", "label3D")


def test_scenes_and_frames_are_compared_with_the_known_ones():
    files = {(scene, VIEW, number): ALL_KINDS for scene, frames in BOX_SCENES.items() for number in range(frames)}
    assert len(files) == 12497
    whole = read_verdicts(build_report(make_set("boxes", files), []))
    assert whole["scenes"] == whole["frame_counts"] == whole["complete_frames"] == OK

    part = {key: kinds for key, kinds in files.items() if key[0] in ("20181204_170238", "20181107_133258")}
    report = build_report(make_set("boxes", part), [])
    assert read_verdicts(report)["scenes"] == NOT_CHECKABLE and read_verdicts(report)["frame_counts"] == OK
    assert len(details(report, "scenes")["absent"]) == 16

    del part["20181204_170238", VIEW, 5]
    part["20181107_133258", VIEW, 7] = ("camera", "label3D")
    report = build_report(make_set("boxes", part), [])
    assert read_verdicts(report)["frame_counts"] == DIFFERS
    assert details(report, "frame_counts")["scenes"] == {
        "20181107_133258": {
            "known": 117,
            "camera": 117,
            "camera_info": 116,
            "label": 116,
            "lidar": 116,
            "label3D": 117,
        },
        "20181204_170238": {"known": 112} | dict.fromkeys(ALL_KINDS, 111),
    }
    without = details(report, "complete_frames")["without"]
    assert without == {kind: ["20181107_133258/front_center/000000007"] for kind in ("camera_info", "label", "lidar")}

    # a kind of file that the whole dataset lacks is no difference
    images = dict.fromkeys(files, ("camera", "label3D"))
    assert read_verdicts(build_report(make_set("boxes", images), []))["frame_counts"] == OK

    files["20200101_000000", VIEW, 1] = ALL_KINDS
    report = build_report(make_set("boxes", files), [])
    assert read_verdicts(report)["scenes"] == DIFFERS and details(report, "scenes")["foreign"] == ["20200101_000000"]


def make_semantic_files():
    """A listing with all sums of docs/a2d2-format.md; the numbers of the other scenes are invented."""
    numbers = dict.fromkeys(BARE_SCENES, 1398)
    numbers |= {"20181108_084007": 2000, "20181108_091945": 2500, "20181108_103155": 2003}
    numbers |= {"20181016_125231": 893, "20181204_170238": 7332 - 2000 - 893}
    numbers |= {"20181108_141609": 1000, "20181204_154421": 1246, "20181008_095521": 1500}
    others = sorted(SCENES.keys() - numbers.keys())
    left = 41277 - sum(numbers.values())
    numbers |= {scene: left // len(others) + (rank < left % len(others)) for rank, scene in enumerate(others)}
    views = {scene: [VIEW] for scene in SCENES}
    for scene in (others * 6)[:26]:
        views[scene].append(VIEWS[len(views[scene])])
    files = {}
    for scene, count in numbers.items():
        kinds = ("camera", "label") if scene in BARE_SCENES else ALL_KINDS[:4]
        for number in range(count):
            # of the divided scene 500 frames train and 1000 validate
            identity = number + (54500 if scene == "20181008_095521" else 0)
            files[scene, views[scene][number % len(views[scene])], identity] = kinds
    return files


def test_the_semantic_set_is_compared_by_its_sums():
    files = make_semantic_files()
    report = build_report(make_set("semantic", files), [])
    sums = details(report, "frame_counts")["sums"]
    assert {name: row["found"] for name, row in sums.items()} == {name: row["known"] for name, row in sums.items()}
    assert len(sums) == 8 and read_verdicts(report)["frame_counts"] == read_verdicts(report)["scenes"] == OK
    assert read_verdicts(report)["complete_frames"] == OK  # two scenes have neither lidar nor camera JSON, as known

    few = {key: kinds for key, kinds in files.items() if key[0] in BARE_SCENES}
    report = build_report(make_set("semantic", few), [])
    assert list(details(report, "frame_counts")["sums"]) == ["the scenes without lidar"]
    del few[next(iter(few))]
    report = build_report(make_set("semantic", few), [])
    assert details(report, "frame_counts")["sums"] == {"the scenes without lidar": {"found": 2795, "known": 2796}}
    assert read_verdicts(report)["frame_counts"] == DIFFERS and read_verdicts(report)["scenes"] == NOT_CHECKABLE


def make_regression_scene():
    """893 frames with all known numbers of that scene's boxes; everything else is invented."""
    copies = [10] + [5] * 18 + [4] * 19  # 138 surplus boxes in 38 frames
    sizes = copies + [19] + [4] * 689 + [3] * 165
    assert sum(sizes) == 3446 and len(sizes) == 893
    named = dict(zip(OBJECT_CLASSES, REGRESSION_CLASSES, strict=True))
    named["Trailer"], named["CaravanTransporter"] = 20, REGRESSION_REMAINDER - 20
    named["Car"] -= sum(copies)
    labels = iter([label for label, count in named.items() for _ in range(count)])
    ids = np.linspace(1665, 185665, 893).astype(int)
    frames, number = [], 0
    for rank, (size, identity) in enumerate(zip(sizes, ids, strict=True)):
        if rank < len(copies):
            boxes = [BoxFacts("Car", (100.0, 100.0, 200.0, 200.0), 0.1, 10.0)] * size
        else:
            boxes = []
            for _ in range(size):
                small = number * 1e-3  # no two boxes are the same
                if number == 0:
                    bounds = (-12521.0, -1989.0, 6699.0, 6848.0)
                elif number < 101:
                    bounds = (-10.0 - small, 100.0, 1915.0, 200.0)
                elif number < 875:
                    bounds = (-5.0 - small, 100.0, 60.0, 200.0)
                elif number == 875:
                    bounds = (100.0, 100.0, 120.1, 150.6)
                else:
                    bounds = (100.0 + small, 100.0, 200.0 + small, 200.0)
                boxes.append(BoxFacts(next(labels), bounds, 0.1, 20.0))
                number += 1
        frames.append(FrameFacts(Frame(REGRESSION_SCENE, VIEW, f"{identity:09d}"), boxes=boxes))
    return frames


def test_the_regression_scene_has_exactly_the_known_boxes():
    frames = make_regression_scene()
    raw = make_set("boxes", {(REGRESSION_SCENE, VIEW, int(facts.frame.id)): ALL_KINDS for facts in frames})

    def check_scene(facts, listing=raw):
        report = build_report(listing, facts)
        return next(check for check in report.checks if check.name == "box_regression")

    assert check_scene(frames).verdict == OK, check_scene(frames).found
    assert check_scene(frames[::2]).verdict == NOT_CHECKABLE
    part = {(REGRESSION_SCENE, VIEW, int(facts.frame.id)): ALL_KINDS for facts in frames[1:]}
    assert check_scene(frames[1:], make_set("boxes", part)).verdict == NOT_CHECKABLE

    frames[500].boxes[0] = frames[500].boxes[0]._replace(label="Bus")
    was = make_regression_scene()[500].boxes[0].label
    found = check_scene(frames)
    assert found.verdict == DIFFERS and "Bus: 187, known: 186" in found.found and f"{was}: " in found.found
    frames = make_regression_scene()
    frames[0].boxes.pop()
    found = check_scene(frames).found
    assert "boxes: 3445, known: 3446" in found and "surplus duplicates: 137, known: 138" in found
    assert "most copies of a box: 9, known: 10" in found


def test_files_without_row_are_compared_with_the_known_fifteen():
    known = [Frame(scene, VIEW, f"{number:09d}") for scene, numbers in UNMAPPED.items() for number in numbers]
    assert len(known) == 15
    whole = [Frame(scene, VIEW, f"{number:09d}") for scene in UNMAPPED for number in range(1000, 1010)]
    arrays = dict.fromkeys(("points", "row", "col", "depth"), "float64")

    def check_frames(kind, frames, lacking):
        raw = make_set(kind, {(frame.scene, frame.view, int(frame.id)): ALL_KINDS for frame in frames})
        facts = [
            FrameFacts(frame, lidar=LidarFacts({"points": "float64"} if frame in lacking else arrays, 9000, 0))
            for frame in frames
        ]
        report = build_report(raw, facts)
        return (
            read_verdicts(report)["lidar_unmapped"],
            details(report, "lidar_unmapped"),
            read_verdicts(report)["lidar_mapped"],
        )

    frames = [*known, *whole]
    assert check_frames("boxes", frames, known)[0] == OK
    assert check_frames("boxes", whole, [])[0] == OK  # none of the 15 is in this dataset
    verdict, found, _ = check_frames("boxes", frames, known[1:])
    assert verdict == DIFFERS and found["known_but_whole"] == [str(known[0])] and found["not_known"] == []
    verdict, found, _ = check_frames("boxes", frames, [*known, whole[3]])
    assert verdict == DIFFERS and found["known_but_whole"] == [] and found["not_known"] == [str(whole[3])]
    # the semantic set has more such files, which are not listed
    assert check_frames("semantic", frames, [*known, whole[3]])[0] == OK
    assert check_frames("semantic", frames, known[1:])[0] == DIFFERS
    assert [check_frames("boxes", whole, whole[:some])[2] for some in (19, 20)] == [OK, DIFFERS]


def test_only_turns_of_a_moving_car_tell_the_sign():
    """The wheel of a standing or parking car turns, but the car does not."""
    turns = {f"fast {angle}": Turn(float(angle), 30.0, 0.2 * angle) for angle in range(-10, 11)}
    turns |= {f"slow {angle}": Turn(float(angle * 50), 9.0, -0.1 * angle) for angle in range(-10, 11)}
    timestamps = dict.fromkeys(turns)
    signals = Counter(dict.fromkeys((ANGLE, f"{ANGLE}_sign", "vehicle_speed", YAW_RATE), len(turns)))
    raw = replace(make_set("boxes", {("20180807_145028", VIEW, 1): ALL_KINDS}), bus_root=Path("bus"))
    report = build_report(raw, [BusFacts("20180807_145028", timestamps=timestamps, signals=signals, turns=turns)])
    assert read_verdicts(report)["bus_sign"] == OK
    assert details(report, "bus_sign")["r"] == pytest.approx(1) and details(report, "bus_sign")["frames"] == 21


# ---------------------------------------------------------------- sets of other shapes


def test_a_set_with_six_cameras_is_checked_with_each_camera(root, tmp_path):
    data = Path(shutil.copytree(root, tmp_path / "semantic" / "camera_lidar_semantic"))
    for scene in list_scenes(data):
        shutil.rmtree(data / scene / "label3D", ignore_errors=True)
    cameras = load_calibration(data / "cams_lidars.json").cameras
    source = next(frame for frame in list_frames(data, "label") if frame.path("camera").is_file())
    points = np.random.default_rng(0).uniform([5, -2, -1], [30, 2, 1], (50, 3))
    for view in VIEWS[1:]:
        frame = Frame(source.scene, view, "000000005", data)
        for kind in ("camera", "camera_info", "label"):
            frame.path(kind).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source.path(kind), frame.path(kind))
        frame.path("lidar").parent.mkdir(parents=True)
        column, row = cameras[view].project(points).T
        np.savez(frame.path("lidar"), points=points, row=row, col=column, depth=points[:, 0])
    report = check(data)
    assert report.raw.kind == "semantic" and report.list_failed() == []
    assert read_verdicts(report)["lidar_geometry"] == OK and read_verdicts(report)["box_geometry"] == NOT_CHECKABLE
    assert {row["view"] for row in report.list_counts()} == set(VIEWS)
    without = details(report, "complete_frames")["without"]
    assert "label3D" not in without

    column, row = cameras[VIEW].project(points).T
    frame = Frame(source.scene, "side_left", "000000005", data)
    np.savez(frame.path("lidar"), points=points, row=row, col=column, depth=points[:, 0])
    report = check(data)
    assert report.list_failed() == ["lidar_geometry"]
    assert list(details(report, "lidar_geometry")["beyond"]) == [str(frame)]


def test_bus_signals_are_found_in_either_layout(clean, root, verdicts):
    folder = root.parent / "camera_lidar_semantic_bus"
    for scene in list_scenes(folder):
        (folder / scene).rename(root.parent / scene)
    folder.rmdir()
    assert read_verdicts(check(root)) == verdicts  # scene folders beside the raw dataset
    for scene in list_scenes(root.parent):
        shutil.move(root.parent / scene / "bus", root / scene / "bus")
        (root.parent / scene).rmdir()
    assert read_verdicts(check(root)) == verdicts  # in the scene folders of the raw dataset
    for scene in list_scenes(root):
        shutil.rmtree(root / scene / "bus")
    found = read_verdicts(check(root))
    assert all(found[name] == NOT_CHECKABLE for name in found if name.startswith("bus_"))


def test_the_hand_made_set_gives_its_own_numbers(tmp_path):
    report = check(write_raw_set(tmp_path, frames=3))
    duplicates = details(report, "box_duplicates")
    assert (duplicates["surplus"], duplicates["boxes"]) == (6, 18)
    assert details(report, "bus_sentinels") == {"sentinels": 6, "samples": 18}
    assert details(report, "bus_samples")["lengths"] == {3: 6}
    assert details(report, "lidar_range")["farther_off"] == {str(frame): 1 for frame in report.raw.index}
    assert read_verdicts(report)["bus_sign"] == NOT_CHECKABLE  # an angle that never changes has no correlation
    assert read_verdicts(report)["bus_motion"] == DIFFERS  # there is no yaw rate
    assert report.list_failed() == []


def test_a_sample_of_frames_is_said_to_be_one(clean):
    report = check(clean, every=3)
    assert len(report.frames) == -(-len(report.raw.index) // 3)
    assert "of one frame in 3" in next(check.found for check in report.checks if check.name == "readable")
    assert (
        read_verdicts(report)["complete_frames"] == read_verdicts(check(clean))["complete_frames"]
    )  # listing reads no files, so it covers all frames


def test_many_turns_and_boxes_are_drawn_as_densities():
    turns = {str(number): Turn(number / 10 - 200, 50.0, number / 100 - 20) for number in range(4000)}
    assert draw_angles([BusFacts("20180807_145028", turns=turns)])
    boxes = [BoxFacts("Car", (0.0, 0.0, 1.0 + number, 9.0 + number), 0.0, 5.0) for number in range(4000)]
    assert draw_boxes([FrameFacts(Frame("20180807_145028", VIEW, "000000001"), boxes=boxes)], None)
    assert draw_angles([]) is None and draw_boxes([], None) is None


def test_missing_files_are_facts_too(clean, tmp_path):
    frame = Frame("20180807_145028", VIEW, "000000001", tmp_path)
    assert read_frame(frame, ["camera", "lidar"], {}).damaged.keys() == {"camera", "lidar"}
    assert read_bus_scene(frame.scene, tmp_path).damaged == "No such file or directory"


# ---------------------------------------------------------------- the script


def test_exit_codes_and_several_roots(root, clean, tmp_path):
    other = root.rename(root.with_name("other"))
    label = list_frames(other, "label")[0].path("label")
    picture = read_rgb_png(label)
    picture[0, 0] = (1, 2, 3)
    label.write_bytes(encode(picture))
    both = run("--data", clean, other, "--out", tmp_path)
    assert both.returncode == 1 and "training depends on colours" in both.stdout
    for name, failed in ((clean.name, []), ("other", ["colours"])):
        assert json.loads((tmp_path / name / "check.json").read_text())["failed"] == failed
    assert run("--data", other, "--sample", "0").returncode == 2
    assert run("--date", other).returncode == 2
    twice = run("--data", clean, clean, "--out", tmp_path)
    assert twice.returncode == 2 and "one after the other" in twice.stderr
    for wrong in (["--data", tmp_path / "nothing"], ["--data", tmp_path], ["--data", clean, "--bus", tmp_path / "no"]):
        done = run(*wrong)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


def test_reports_lie_beside_the_raw_root_by_default(root):
    done = run("--data", root, "--sample", "5")
    out = root.parent / "processed" / "check" / root.name
    assert done.returncode == 0 and str(out) in done.stdout and (out / "check.json").is_file()
    angles = out / "angles.png"
    assert angles.is_file()
    shutil.rmtree(root.parent / "camera_lidar_semantic_bus")
    run("--data", root, "--sample", "5")
    assert not angles.exists()  # the plot of an earlier run would show data that no longer exist


def test_the_script_starts_without_torch_and_matplotlib():
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'preprocessing')!r}]; import check; "
        "print({'torch', 'matplotlib'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "set()", done.stderr
