"""Panels, curves, recordings and the report: what is in them, at the size of a page."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from derived_root import write_root
from tiny_run import make_run

import evaluate
import visualize
from a2d2.vehicle import STEERING_RATIO, WHEELBASE, find_curvature, project_path, trace_path
from experiment import load_trained
from pictures.curves import collect_curves, read_log
from pictures.panel import PAGE_WIDTH, Model, Panel, draw_panel, encode_figure, render_figure
from pictures.report import LIMIT, choose_ranks
from tasks import TASKS
from tasks.drawing import View, place_labels
from training.run import find_recipe

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("set")


@pytest.fixture(scope="module")
def runs(folder):
    """A run, one of another seed, and one of a single task."""
    write_root(folder / "root")
    alone = [f"tasks.{name}=null" for name in TASKS if name != "depth"]
    options = {"run": [], "seed": ["seed=1"], "depth": alone}
    return [make_run(folder, *given, name=name) for name, given in options.items()]


def call(module, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, arguments)])
        return module.main()


def make_panel(models=1, labels=True, without=()):
    """A panel of all tasks with hand-made predictions."""
    tasks = {name: task(label_statistics={"constant": 0, "scale_deg": 1.0}) for name, task in TASKS.items()}
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (80, 128, 3), dtype=np.uint8)
    boxes = torch.tensor([[10.0, 20, 50, 60], [60.0, 20, 80, 50]])
    target = tasks["detection"].blank((128, 80))
    target["boxes"][:2], target["classes"][:2], target["known"][:2] = boxes, torch.tensor([0, 1]), torch.tensor([0, 1])
    targets = {
        "segmentation": torch.from_numpy(rng.integers(0, 5, (80, 128)).astype(np.uint8)),
        "depth": torch.from_numpy(np.where(rng.random((80, 128)) < 0.1, 20.0, 0.0).astype(np.float32)),
        "detection": target,
        "steering": torch.tensor([30.0]),
    }
    predictions = {
        "segmentation": targets["segmentation"].clone(),
        "depth": torch.full((80, 128), 15.0),
        "detection": {
            "boxes": torch.cat([boxes[:1], torch.tensor([[90.0, 10, 120, 40]]), boxes[1:]]),
            "scores": torch.tensor([0.9, 0.8, 0.1]),
            "labels": torch.tensor([0, 0, 1]),
        },
        "steering": torch.tensor([-30.0]),
    }
    listed = [
        Model(f"model {number}", tasks, {k: v for k, v in predictions.items() if k not in without}, f"step {number}")
        for number in range(models)
    ]
    matrix = np.array([[112.0, 0, 64], [0, 118.0, 45], [0, 0, 1]])
    return Panel("scene/front_center/1", image, listed, tasks, targets if labels else {}, labels, matrix)


def list_texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts] + [each.get_text() for each in figure.texts]


@pytest.mark.parametrize("models", [1, 2, 3, 5])
def test_a_panel_has_the_photograph_once_and_a_row_for_each_task(models):
    panel = make_panel(models)
    figure = draw_panel(panel)
    photographs = [
        image
        for axes in figure.axes
        for image in axes.images
        if np.array_equal(np.asarray(image.get_array()), panel.image)
    ]
    # and under the boxes, which are drawn on it
    assert len(photographs) == 1 + (1 + models)
    texts = list_texts(figure)
    for name in TASKS:
        assert f"{name}: ground truth" in texts
    for number in range(models):
        assert texts.count(f"model {number}") == len(TASKS)
    assert figure.get_figwidth() == pytest.approx(PAGE_WIDTH, abs=0.01) or models >= 3


def test_what_is_written_can_be_read_on_paper():
    """No text is smaller than 5 points, those of labels; all others are 7."""
    figure = draw_panel(make_panel(2))
    sizes = {text.get_fontsize() for axes in figure.axes for text in axes.texts}
    sizes |= {text.get_fontsize() for text in figure.texts}
    assert min(sizes) >= 5 and sorted(sizes)[-1] == 7


def test_boxes_are_found_false_or_missed():
    texts = list_texts(draw_panel(make_panel(1), threshold=0.5))
    assert {"found", "false", "missed", "ground truth"} <= set(texts)
    assert "Car 0.90" in texts and "Car 0.80" in texts and "Truck 0.10" not in texts and texts.count("Truck") == 2
    assert any("score 0.5 or more" in text for text in texts)
    texts = list_texts(draw_panel(make_panel(1), threshold=0.05))
    assert "Truck 0.10" in texts and "missed" not in texts


def test_a_task_that_a_run_lacks_and_a_missing_label_are_said():
    panel = make_panel(1, without=("depth",))
    del panel.targets["segmentation"]
    texts = list_texts(draw_panel(panel, errors=True))
    assert "model 0 has no depth" in texts and "no label" in texts


def test_errors_are_in_rows_of_their_own():
    texts = list_texts(draw_panel(make_panel(1), errors=True))
    assert "segmentation: errors" in texts and "depth: errors" in texts and "detection: errors" not in texts
    assert "wrong: 0.0%" in texts and "mean: 0.25" in texts


def test_pictures_without_labels_show_predictions_alone():
    texts = list_texts(draw_panel(make_panel(1, labels=False)))
    assert "picture" in texts and "predicted" in texts and not any("ground truth" in text for text in texts)


def test_fields_lie_side_by_side_and_in_the_page():
    for models, labels in ((1, True), (4, True), (1, False)):
        figure = draw_panel(make_panel(models, labels), errors=labels)
        boxes = [axes.get_position() for axes in figure.axes]
        assert all(box.x0 >= -1e-6 and box.x1 <= 1 + 1e-6 and box.y0 >= -1e-6 and box.y1 <= 1 + 1e-6 for box in boxes)
        for place, one in enumerate(boxes):
            for other in boxes[:place]:
                apart = one.x1 <= other.x0 + 1e-6 or other.x1 <= one.x0 + 1e-6
                assert apart or one.y1 <= other.y0 + 1e-6 or other.y1 <= one.y0 + 1e-6


def test_all_frames_of_a_video_have_one_size():
    sizes = set()
    for classes in (1, 5, 19):
        panel = make_panel(1)
        panel.targets["segmentation"] = panel.targets["segmentation"] % classes
        panel.models[0].predictions["segmentation"] = (
            torch.arange(80 * 128, dtype=torch.int64).view(80, 128).remainder(classes).to(torch.uint8)
        )
        sizes.add(render_figure(draw_panel(panel, steady=True), 640).shape)
    assert len(sizes) == 1


@pytest.mark.parametrize("seed", range(10))
def test_labels_of_boxes_cover_no_others_and_stay_in_the_picture(seed):
    rng = np.random.default_rng(seed)
    view = View(np.zeros((200, 320, 3), np.uint8), inches=3.5)
    corners = rng.uniform(0, 280, (25, 2)) * [1, 0.6]
    boxes = np.concatenate([corners, corners + rng.uniform(5, 40, (25, 2))], axis=1).tolist()
    texts = ["Pedestrian 0.50"] * 25
    placed = [place for place in place_labels(view, boxes, texts, 5.0) if place is not None]
    wide, high = (len(texts[0]) * 0.6 + 0.6) * 5 * view.pixels_per_point, 5 * 1.3 * view.pixels_per_point
    assert len(placed) >= 5
    for place, (x, y) in enumerate(placed):
        assert 0 <= x <= 320 - wide + 1e-6 and 0 <= y <= 200 - high + 1e-6
        assert all(abs(x - a) >= wide - 1e-6 or abs(y - b) >= high - 1e-6 for a, b in placed[:place])


@pytest.mark.parametrize("style", ["png", "pdf", "svg"])
def test_pictures_are_the_same_bytes_each_time(style):
    one, other = (encode_figure(draw_panel(make_panel(1)), style) for _ in range(2))
    assert one == other and len(one) > 10_000
    if style == "svg":
        assert b"ground truth" in one  # text stays text
    if style == "png":
        picture = cv2.imdecode(np.frombuffer(one, np.uint8), cv2.IMREAD_UNCHANGED)
        assert picture.shape[2] == 3 and picture.shape[1] == round(PAGE_WIDTH * 200)


# ---------------------------------------------------------------- the path of the car


def test_the_path_is_that_of_the_bicycle_model():
    angle = 120.0
    radius = 1 / find_curvature(angle)
    assert radius == pytest.approx(WHEELBASE / np.tan(np.deg2rad(angle / STEERING_RATIO)))
    left, right = trace_path(angle, 20.0)
    middle = (left + right) / 2
    assert np.hypot(middle[:, 0], middle[:, 1] - radius) == pytest.approx(np.full(len(middle), radius))
    assert middle[-1, 1] > 0  # a turn to the left
    assert trace_path(-angle, 20.0)[0][:, 1] == pytest.approx(-right[:, 1])
    straight = trace_path(0.0, 20.0)
    assert straight[0][:, 1] == pytest.approx(0.85) and straight[1][:, 1] == pytest.approx(-0.85)


def test_a_turn_to_the_left_goes_left_in_the_picture():
    matrix = np.array([[900.0, 0, 512], [0, 950.0, 365], [0, 0, 1]])
    for angle, sign in ((60.0, -1), (-60.0, 1)):
        left, right = project_path(angle, matrix, None)
        assert sign * (left[-1, 0] - left[len(left) // 3, 0]) > 0
        assert (left[:, 0] < right[: len(left), 0]).all() and (np.diff(left[:, 1]) < 0).all()
        assert left[-1, 1] > 365  # below the horizon


# ---------------------------------------------------------------- runs


def test_only_runs_of_one_config_on_the_same_frames_are_seeds_of_each_other(runs):
    run, seed, depth = (load_trained(folder, torch.device("cpu")) for folder in runs)
    assert run.recipe[0] == seed.recipe[0] != depth.recipe[0] and (run.recipe[1], seed.recipe[1]) == (0, 1)
    fewer = dict(seed.record.subsets) | {"train": seed.record.subsets["train"][1:]}
    others = dataclasses.replace(seed.record, subsets=fewer)  # the same config, where data.roots is another dataset
    assert find_recipe(runs[1], others)[0] != run.recipe[0] and find_recipe(runs[1], None) is None


# ---------------------------------------------------------------- curves


def test_curves_are_the_values_of_the_log(runs):
    curves = collect_curves(read_log(runs[0]))
    steps, values = curves["loss of depth"]["depth"]
    events = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    trained = [event for event in events if event["kind"] == "train"]
    assert steps == [event["step"] for event in trained] and values == [event["loss/depth"] for event in trained]
    assert curves["segmentation: miou in validation"]["miou"][0] == [2, 4]
    assert curves["mean skill in validation"]["all"][0] == [2, 4]


def test_a_log_that_was_cut_off_is_read_and_a_damaged_one_named(runs, tmp_path):
    text = (runs[0] / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text[:-20])
    assert len(read_log(tmp_path)) == len(text.splitlines()) - 1
    (tmp_path / "metrics.jsonl").write_text("x\n" + text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
        read_log(tmp_path)
    with pytest.raises(ValueError, match="is it a run folder"):
        read_log(tmp_path / "nothing")


# ---------------------------------------------------------------- the script


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--count", "2", "--split", "all", "--format", "svg"], r"\d{8}_\d{6}_front_center_\d{9}\.svg"),
        (["--random", "2", "--split", "all", "--error"], r"\d{8}_\d{6}_front_center_\d{9}\.png"),
        (
            ["--worst", "2", "--task", "depth", "--split", "all"],
            r"worst0[12]_depth_\d{8}_\d{6}_front_center_\d{9}\.png",
        ),
        (["--scene", "20180101_000000", "--format", "pdf"], r"20180101_000000_front_center_00000000[12]\.pdf"),
    ],
)
def test_frames_are_chosen_and_drawn(runs, tmp_path, options, names):
    assert call(visualize, *runs, *options, "--output", tmp_path) == 0
    found = [path.name for path in tmp_path.iterdir()]
    assert len(found) == 2 and all(re.fullmatch(names, name) for name in found)


def test_the_worst_frames_are_those_with_the_worst_scores(runs, tmp_path, capsys):
    assert call(visualize, runs[0], "--worst", "3", "--task", "steering", "--split", "all", "--output", tmp_path) == 0
    drawn = [path.name.split("_", 2)[2].removesuffix(".png") for path in sorted(tmp_path.iterdir())]
    capsys.readouterr()
    assert call(evaluate, runs[0], "--split", "all", "--format", "json", "--workers", "0") == 0
    row = json.loads(capsys.readouterr().out)["runs"]["run"]["steering"]
    ranked = sorted(zip(row["frame_scores"], row["scored_frames"], strict=True), reverse=True)
    assert drawn == [frame.replace("/", "_") for _, frame in ranked]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--worst", "2"], 2, "--worst needs --task"),
        (["--worst", "2", "--task", "steering"], 2, "--worst needs --task with one of depth"),
        (["--video"], 2, "name it with --scene"),
        (["--scene", "20000101_000000"], 1, "no frames of scene 20000101_000000"),
        (["--frames", "20180101_000000/front_center/9"], 1, "no image of"),
    ],
)
def test_wrong_use_is_one_line(runs, tmp_path, capsys, options, code, words):
    assert call(visualize, runs[2], *options, "--output", tmp_path) == code
    assert words in capsys.readouterr().err


def test_a_scene_as_video_and_curves(runs, tmp_path):
    pytest.importorskip("av")
    assert call(visualize, runs[0], "--scene", "20180101_000000", "--video", "--output", tmp_path) == 0
    capture = cv2.VideoCapture(str(tmp_path / "20180101_000000.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 2
    assert call(visualize, *runs, "--curves", "--format", "pdf", "--output", tmp_path) == 0
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")


def test_two_runs_of_one_name_have_a_curve_each(runs, tmp_path):
    for place in ("first", "second"):
        shutil.copytree(runs[0], tmp_path / place / "run", ignore=shutil.ignore_patterns("checkpoints"))
    folders = [tmp_path / place / "run" for place in ("first", "second")]
    assert call(visualize, *folders, "--curves", "--format", "svg", "--output", tmp_path) == 0
    text = (tmp_path / "curves.svg").read_text()
    assert all(str(folder) in text for folder in folders)


def test_a_recording_passes_the_checker_of_its_own_program(runs, tmp_path):
    pytest.importorskip("rerun")
    path = tmp_path / "scene.rrd"
    assert call(visualize, *runs[:2], "--scene", "20180101_000000", "--rerun", path) == 0
    rerun = Path(sys.executable).with_name("rerun")
    done = subprocess.run([rerun, "rrd", "verify", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = subprocess.run([rerun, "rrd", "print", path], capture_output=True, text=True).stdout
    for entity in ("camera/image", "camera/depth/ground_truth", "world/lidar/ground_truth", "steering/seed"):
        assert entity in printed


# ---------------------------------------------------------------- the report


def test_ranks_are_of_the_metric():
    pairs = [("a", 3.0), ("b", 1.0), ("c", 2.0), ("d", 9.0)]
    assert choose_ranks(pairs, "lower") == {"best": "b", "median": "c", "worst": "d"}
    assert choose_ranks(pairs, "higher") == {"best": "d", "median": "a", "worst": "b"}
    assert choose_ranks([], "lower") == {}


@pytest.fixture(scope="module")
def report(runs, folder):
    path = folder / "report.html"
    options = ["--split", "all", "--baseline", runs[2], "--workers", "0", "--draws", "50", "--cost", "--report", path]
    assert call(evaluate, *runs[:2], *options) == 0
    return path


def test_a_report_is_one_page_of_limited_size(report):
    assert report.stat().st_size <= LIMIT
    text = report.read_text(encoding="utf-8")
    body = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", body)
    for words in ("Delta-m", "runs that differ by their seed alone", "Against depth", "Differences of the configs"):
        assert words in body
    assert body.count("data:image/jpeg;base64,") == 12  # best, median and worst of four tasks


def test_names_of_runs_cannot_break_the_page(runs, folder, tmp_path):
    name = "<script>alert(1)</script>"
    try:
        shutil.copytree(runs[0], tmp_path / name.replace("/", ""))
    except OSError:
        pytest.skip("this file system has no such names")
    path = tmp_path / "report.html"
    odd = tmp_path / name.replace("/", "")
    assert call(evaluate, odd, "--split", "all", "--workers", "0", "--draws", "0", "--report", path) == 0
    assert "<script>alert(1)" not in path.read_text(encoding="utf-8")


PROBE = """
<script>
window.addEventListener("load", () => setTimeout(() => {
  const table = document.querySelector("table.sortable"), heads = [...table.querySelectorAll("th")];
  const read = name => {
    const column = heads.findIndex(head => head.textContent === name);
    heads[column].click();
    return [...table.tBodies[0].rows].map(row => row.cells[column].textContent);
  };
  document.title = JSON.stringify({
    scores: read("score"), runs: read("run"), plots: document.querySelectorAll(".js-plotly-plot svg.main-svg").length,
    failed: window.failed || 0, buttons: [...document.querySelectorAll(".modebar-btn")].map(each => each.dataset.title),
    fetched: performance.getEntriesByType("resource").map(each => each.name)
      .filter(name => !name.startsWith("data:") && !name.startsWith("blob:")),
  });
}, 3000));
window.addEventListener("error", () => { window.failed = (window.failed || 0) + 1; });
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_the_report_sorts_it_and_fetches_nothing(report, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(report.read_text(encoding="utf-8").replace("</head>", f"{PROBE}</head>", 1), encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        "--disable-component-update", "--disable-features=NetworkTimeServiceQuerying",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--dump-dom",
        page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    title = re.search(r"<title>(.*?)</title>", done.stdout, flags=re.S)
    found = json.loads(title[1].replace("&quot;", '"'))
    assert found["failed"] == 0 and found["plots"] > 20
    scores = [float(text) for text in found["scores"] if text not in ("", "-")]
    assert scores == sorted(scores) and len(scores) == 9 and found["runs"] == sorted(found["runs"])
    assert found["fetched"] == []
    assert {text.split()[0] for text in found["buttons"]} == {"Download", "Zoom", "Reset"}  # none uploads a plot
