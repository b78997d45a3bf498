"""Metrics against independent implementations; intervals, comparisons and tables."""

import csv
import io
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

from a2d2.classes import CLASSES, IGNORE, load_grouping, map_classes
from pictures.report import describe_scores
from scoring.bootstrap import BLOCK_SECONDS, draw_counts, find_blocks, find_interval
from scoring.compare import (
    TaskResult,
    average_groups,
    average_skills,
    compare_pairs,
    compare_with_baseline,
    find_groups,
    share_constants,
    summarise_seeds,
)
from scoring.table import format_csv, format_latex, format_results, format_table
from tasks import TASKS
from tasks.depth import DepthMetrics
from tasks.segmentation import SegmentationMetrics
from tasks.steering import SteeringMetrics

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("a", "b", "c", "d")


def draw_maps(rng, count=6, size=(9, 12)):
    target = rng.integers(0, 3, (count, *size)).astype(np.uint8)  # of the four classes one never occurs
    target[rng.random(target.shape) < 0.2] = IGNORE
    target[0] = IGNORE  # a frame without a labelled pixel
    prediction = np.where(rng.random(target.shape) < 0.5, np.minimum(target, 3), rng.integers(0, 4, target.shape))
    return torch.from_numpy(prediction.astype(np.uint8)), torch.from_numpy(target)


@pytest.mark.parametrize("seed", range(20))
def test_miou_is_that_of_the_library_over_the_classes_that_occur(seed):
    prediction, target = draw_maps(np.random.default_rng(seed))
    metrics = SegmentationMetrics(NAMES)
    for rows in (slice(0, 2), slice(2, 3), slice(3, 6)):  # in batches of any size
        metrics.update(prediction[rows], target[rows])
    library = MulticlassJaccardIndex(4, ignore_index=IGNORE, average="none")
    library.update(prediction, target)
    scores, values = metrics.compute(), library.compute()
    occurring = [index for index in range(4) if (target == index).any()]
    assert scores["miou"] == pytest.approx(float(values[occurring].mean()), abs=1e-6)
    for index, name in enumerate(NAMES):
        expected = pytest.approx(float(values[index]), abs=1e-6) if index in occurring else None
        assert scores[f"iou/{name}"] == expected
    valid = target != IGNORE
    assert scores["pixel_accuracy"] == pytest.approx(float((prediction == target)[valid].double().mean()))
    confusion = np.array(metrics.describe()["confusion"])
    for truth in range(4):
        for found in range(4):
            assert confusion[truth, found] == int(((target == truth) & (prediction == found)).sum())


def test_names_of_both_groupings_mean_the_same():
    paper = load_grouping("paper")
    for index, name in enumerate(CLASSES):
        if name in paper.names:
            assert paper.table[index] == paper.names.index(name)
    assert np.array_equal(map_classes(CLASSES, paper)[:38], paper.table[:38])
    with pytest.raises(ValueError, match="no class 'Background'"):
        map_classes(paper.names, load_grouping("all"))


def draw_depths(rng, count=5, size=(8, 10)):
    target = rng.uniform(0.5, 120, (count, *size)) * (rng.random((count, *size)) < 0.4)
    target[1] = 0  # an image without a point
    prediction = np.maximum(target, 5) * rng.uniform(0.3, 2.5, target.shape)
    return prediction, target


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("cap", [80.0, 50.0])
def test_depth_metrics_are_their_formulas(seed, cap):
    prediction, target = draw_depths(np.random.default_rng(seed))
    metrics = DepthMetrics(cap)
    metrics.update(torch.from_numpy(prediction[:2]).float(), torch.from_numpy(target[:2]).float())
    metrics.update(torch.from_numpy(prediction[2:]).float(), torch.from_numpy(target[2:]).float())
    rows = []
    for own, truth in zip(prediction, target, strict=True):
        t = truth[(truth > 0) & (truth <= cap)]
        if not len(t):
            continue
        p = np.clip(own[(truth > 0) & (truth <= cap)], 0.1, cap)
        d, ratio = np.log(p) - np.log(t), np.maximum(p / t, t / p)
        row = {
            "abs_rel": np.mean(np.abs(p - t) / t),
            "sq_rel": np.mean((p - t) ** 2 / t),
            "rmse": np.sqrt(np.mean((p - t) ** 2)),
            "rmse_log": np.sqrt(np.mean(d**2)),
            "silog": 100 * np.sqrt(np.mean(d**2) - np.mean(d) ** 2),
            "mae": np.mean(np.abs(p - t)),
            "delta1": np.mean(ratio < 1.25),
            "delta2": np.mean(ratio < 1.25**2),
            "delta3": np.mean(ratio < 1.25**3),
        }
        for near, far in ((0, 20), (20, 40), (40, 80)):
            within = (t > near) & (t <= far)
            if within.any():
                row[f"abs_rel/{near}-{far}m"] = np.mean(np.abs(p - t)[within] / t[within])
                row[f"rmse/{near}-{far}m"] = np.sqrt(np.mean((p - t)[within] ** 2))
                row[f"mae/{near}-{far}m"] = np.mean(np.abs(p - t)[within])
                row[f"delta1/{near}-{far}m"] = np.mean(ratio[within] < 1.25)
        rows.append(row)
    scores = metrics.compute()
    assert set(scores) == {name for row in rows for name in row}
    for name, value in scores.items():
        assert value == pytest.approx(np.mean([row[name] for row in rows if name in row]), rel=1e-4), name


def test_a_prediction_that_is_not_finite_does_not_pass_as_a_number():
    metrics = DepthMetrics(80.0)
    metrics.update(torch.tensor([[[math.nan, 5.0]]]), torch.tensor([[[4.0, 5.0]]]))
    assert math.isnan(metrics.compute()["abs_rel"])


@pytest.mark.parametrize("seed", range(5))
def test_steering_metrics_are_those_of_the_library(seed):
    rng = np.random.default_rng(seed)
    target = torch.from_numpy(rng.normal(0, 40, (30, 1)))
    prediction = target + torch.from_numpy(rng.normal(0, 10, (30, 1)))
    metrics = SteeringMetrics()
    metrics.update(prediction[:7], target[:7])
    metrics.update(prediction[7:], target[7:])
    scores = metrics.compute()
    for name, library in (("mae", MeanAbsoluteError()), ("rmse", MeanSquaredError(squared=False)), ("r2", R2Score())):
        assert scores[name] == pytest.approx(float(library(prediction[:, 0], target[:, 0])), rel=1e-5), name
    sharp = target.abs()[:, 0] >= 60
    assert scores["mae/60deg-"] == pytest.approx(float((prediction - target).abs()[sharp].mean()))


def update(name, metrics, rng, rows):
    if name == "segmentation":
        metrics.update(*(each[rows] for each in draw_maps(rng)))
    elif name == "depth":
        metrics.update(*(torch.from_numpy(each[rows]) for each in draw_depths(rng, 6)))
    else:
        target = torch.from_numpy(rng.normal(0, 30, (6, 1)))
        metrics.update((target + 3)[rows], target[rows])


MAKERS = {
    "segmentation": lambda: SegmentationMetrics(NAMES),
    "depth": lambda: DepthMetrics(80.0),
    "steering": SteeringMetrics,
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_draw_is_a_score_of_copies_and_a_frame_alone_a_set_of_one(name):
    """`resample` against `compute` of the same rows given so often; detection has a test of its own."""
    primary = TASKS[name].primary_metric
    whole = MAKERS[name]()
    update(name, whole, np.random.default_rng(1), slice(0, 6))
    counts = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 2, 1, 3, 0], [3, 0, 0, 0, 0, 0]], dtype=np.float64)
    for row, value in zip(counts, whole.resample(counts), strict=True):
        drawn = MAKERS[name]()
        for place, times in enumerate(row.astype(int)):
            for _ in range(times):
                update(name, drawn, np.random.default_rng(1), slice(place, place + 1))
        expected = drawn.compute()[primary]
        assert np.isnan(value) if expected is None else value == pytest.approx(expected, abs=1e-9)
    for place, value in enumerate(whole.score_frames()):
        alone = MAKERS[name]()
        update(name, alone, np.random.default_rng(1), slice(place, place + 1))
        expected = alone.compute()[primary]
        assert value == (None if expected is None else pytest.approx(expected))


# ---------------------------------------------------------------- the bootstrap


def test_blocks_are_of_five_seconds_or_more_and_of_one_scene():
    rng = np.random.default_rng(0)
    scenes, times = [], []
    for scene, length in (("a", 31.0), ("b", 4.0), ("c", 9.9), ("d", 0.0)):
        own = np.unique(np.concatenate([[0.0, length], rng.uniform(0, length, 40 if length else 0)]))
        scenes += [scene] * len(own)
        times += (1.5e9 + own).tolist()
    blocks = find_blocks(scenes, times)
    lengths = {}
    for scene, time, block in zip(scenes, times, blocks.of_frame.tolist(), strict=True):
        lengths.setdefault((scene, block), []).append(time)
    names = [scene for scene, _ in lengths]
    assert len({block for _, block in lengths}) == len(lengths) == len(blocks.scene)
    assert names.count("b") == names.count("c") == names.count("d") == 1 and 4 <= names.count("a") <= 6
    starts = sorted(min(own) for (scene, _), own in lengths.items() if scene == "a")
    assert all(b - a >= BLOCK_SECONDS for a, b in itertools.pairwise(starts))
    assert max(times[: len([s for s in scenes if s == "a"])]) - starts[-1] >= BLOCK_SECONDS


def test_frames_without_a_time_are_one_block_of_their_scene_and_named():
    blocks = find_blocks(["a", "a", "a", "b", "b"], [0.0, 100.0, 106.0, None, 200.0])
    assert blocks.untimed == ("b",) and blocks.of_frame.tolist() == [0, 1, 1, 2, 2]


def test_draws_take_scenes_and_then_blocks_of_them():
    scenes = ["a"] * 30 + ["b"] * 10
    times = [float(second) for second in range(30)] + [float(second) for second in range(10)]
    blocks = find_blocks(scenes, times)
    counts = draw_counts(blocks, 4000)
    assert np.array_equal(counts, draw_counts(blocks, 4000)) and not np.array_equal(
        counts, draw_counts(blocks, 4000, 1)
    )
    for block in range(len(blocks.scene)):
        members = counts[:, blocks.of_frame == block]
        assert (members == members[:, :1]).all()  # the frames of a block come and go together
    assert counts.mean() == pytest.approx(1.0, rel=0.05)
    # both scenes are drawn, one twice, or the other twice
    drawn = (counts[:, :30] > 0).any(axis=1).astype(int) + 2 * (counts[:, 30:] > 0).any(axis=1)
    shares = np.bincount(drawn, minlength=4) / len(counts)
    assert shares[1:] == pytest.approx([0.25, 0.25, 0.5], abs=0.03)


def test_intervals_of_independent_scenes_hold_what_they_promise():
    """The mean of 40 scenes of one frame each: about 95 in 100 intervals contain the true mean."""
    rng = np.random.default_rng(0)
    counts = draw_counts(find_blocks([str(scene) for scene in range(40)], [0.0] * 40), 400)
    held = 0
    for _ in range(300):
        values = rng.normal(5, 2, 40)
        low, high = find_interval(counts @ values / counts.sum(axis=1))
        held += low <= 5 <= high
    assert 0.90 <= held / 300 <= 0.98


def test_alike_neighbours_make_no_interval_narrow():
    """Thirty frames a second are no more evidence than one: frames of a block are not drawn one by one."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, 12)  # of twelve blocks
    many = find_blocks(["a"] * 1800, [second / 30 for second in range(1800)])
    counts = draw_counts(many, 1000)
    dense = values[many.of_frame]
    low, high = find_interval(counts @ dense / counts.sum(axis=1))
    assert high - low > 2.5 * values.std() / math.sqrt(len(values))


def test_there_is_no_interval_without_anything_to_draw_from():
    assert find_interval(np.full(100, 0.5)) is None and find_interval(np.full(100, np.nan)) is None
    mostly = np.where(np.arange(100) < 90, np.nan, np.arange(100.0))
    assert find_interval(mostly) is None


# ---------------------------------------------------------------- comparisons


def result(task, score, constant, draws=None):
    return TaskResult(TASKS[task](), score, constant, draws, None if draws is None else np.full(len(draws), constant))


def test_delta_m_is_the_formula_with_and_without_each_task():
    results = {
        "one": {"depth": result("depth", 0.2, 0.5)},
        "two": {"detection": result("detection", 0.4, 0.0)},
        "three": {"steering": result("steering", 10.0, 20.0)},
        "all": {
            "depth": result("depth", 0.25, 0.5),
            "detection": result("detection", 0.3, 0.0),
            "steering": result("steering", 8.0, 20.0),
        },
    }
    groups = find_groups(dict.fromkeys(results))
    comparison = compare_with_baseline(results, groups, ["one", "two", "three"])
    (row,) = comparison["rows"].values()
    # lower is better for depth and steering
    assert row["terms"] == pytest.approx({"depth": -25.0, "detection": -25.0, "steering": 20.0})
    assert row["delta_m"] == pytest.approx(-10.0)
    assert row["without"] == pytest.approx({"depth": -2.5, "detection": -2.5, "steering": -25.0})
    # skills 0.5, 0.3, 0.6 against 0.6, 0.4, 0.5
    assert row["skill_difference"] == pytest.approx((0.5 + 0.3 + 0.6 - 0.6 - 0.4 - 0.5) / 3)


def test_a_baseline_of_zero_has_no_delta_m_but_a_difference_of_skills():
    results = {
        "base": {"detection": result("detection", 0.0, 0.0), "depth": result("depth", 0.25, 0.5)},
        "run": {"detection": result("detection", 0.1, 0.0), "depth": result("depth", 0.25, 0.5)},
    }
    row = compare_with_baseline(results, find_groups(dict.fromkeys(results)), ["base"])["rows"]["run"]
    assert row["terms"]["detection"] is None and row["delta_m"] is None
    assert row["without"] == {"detection": 0.0, "depth": None} and row["skill_difference"] == pytest.approx(0.05)


def test_runs_that_differ_by_their_seed_are_one_group():
    recipes = {"a": ("x", 0), "b": ("x", 1), "c": ("y", 0), "files of a": ("x", 0), "foreign": None, "other": None}
    groups = find_groups(recipes)
    assert groups == {
        "a": ["a", "b"],
        "c": ["c"],
        "files of a": ["files of a"],
        "foreign": ["foreign"],
        "other": ["other"],
    }


def test_seeds_have_mean_and_spread_and_pairs_a_probability():
    scores = {"a0": 10.0, "a1": 12.0, "a2": 14.0, "b0": 12.0, "b1": 20.0}
    results = {
        run: {"steering": result("steering", score, 20.0), "detection": result("detection", 0.5, 0.0)}
        for run, score in scores.items()
    }
    groups = {"a0": ["a0", "a1", "a2"], "b0": ["b0", "b1"]}
    seeds = summarise_seeds(results, groups)
    assert seeds["a0"]["steering"]["mean"] == 12 and seeds["a0"]["steering"]["spread"] == pytest.approx(2)
    assert seeds["b0"]["all"]["mean"] == pytest.approx((0.2 + 0.5) / 2)
    rows = {row["task"]: row for row in compare_pairs(results, groups)}
    # lower is better: of six pairs a wins four, and one is even
    assert rows["steering"]["probability"] == pytest.approx(4.5 / 6) and rows["steering"]["difference"] == -4
    assert rows["all"]["difference"] == pytest.approx(0.1)


def test_the_interval_of_a_difference_is_a_paired_one():
    rng = np.random.default_rng(0)
    common = rng.normal(10, 3, 1000)  # what is hard for one run is hard for the other
    results = {
        "a": {"steering": result("steering", 9.0, 20.0, common - 1 + rng.normal(0, 0.1, 1000))},
        "b": {"steering": result("steering", 10.0, 20.0, common)},
    }
    row = compare_pairs(results, {"a": ["a"], "b": ["b"]})[0]
    low, high = row["interval"]
    assert -1.3 < low < -1 < high < -0.7 and row["probability"] is None


def test_skills_of_draws_and_of_many_are_those_of_the_task():
    made = result("depth", 0.25, 0.5, np.array([0.25, 0.5, 5.0]))
    assert made.skill == 0.5 and made.skill_draws == pytest.approx([0.5, 0.0, -9.0])
    assert average_skills([0.5, None, -9.0]) == pytest.approx(-0.25) and average_skills([None]) is None


# ---------------------------------------------------------------- tables


def make_scores(miou, mae, interval=None):
    shared = {"constant": None, "unit": "", "frames": 3, "baseline_metrics": {}}
    return {
        "segmentation": shared
        | {"headline": "miou", "better": "higher", "score": miou, "skill": miou, "metrics": {"miou": miou}}
        | ({"interval": interval} if interval else {}),
        "steering": shared
        | {"headline": "mae", "better": "lower", "unit": "deg", "score": mae, "constant": 20.0, "skill": 1 - mae / 20}
        | {"metrics": {"mae": mae, "rmse": None}},
    }


def test_latex_has_the_best_in_bold_and_no_special_character():
    results = {"run_1 & 2%": make_scores(0.5, 10.0), "other": make_scores(0.25, 8.0)}
    text = format_latex(results, {}, {}, ["a note"])
    assert r"run\_1 \& 2\% & \textbf{0.5} & 10" in text and r"other & 0.25 & \textbf{8}" in text
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.replace(r"\&", "").count("&") for line in rows} == {3} and "% a note" in text
    grouped = {
        "groups": {"other": ["run_1 & 2%", "other"]},
        "seeds": {"other": {"steering": {"mean": 9.0, "spread": 1.4}}},
    }
    assert r"other (2 seeds)" in format_latex(results, grouped, {}, []) and r"$\pm$ 1.4" in format_latex(
        results, grouped, {}, []
    )


def test_what_cannot_be_compared_is_said_in_every_form():
    odd = make_scores(0.4, 9.0)
    odd["steering"] |= {"constant": 15.0, "skill": 0.4, "trained_frames": "unknown"}
    results = {"odd": odd, "run": make_scores(0.5, 10.0)}
    doubts = ["* odd: it is unknown whether it was trained on these frames", "steering: the runs have other constant"]
    page = describe_scores(SimpleNamespace(scores=results, outcomes={}, notes=["a note"], errors=[]))
    forms = [format_results(results, {}, {}, [], style) for style in ("text", "markdown", "latex")]
    for text in [*forms, page]:
        assert "odd*" in text and "run*" not in text and all(doubt in text for doubt in doubts)
    rows = list(csv.DictReader(io.StringIO(format_results(results, {}, {}, [], "csv"))))
    assert {(row["run"], row["trained_frames"]) for row in rows} == {("odd", "unknown"), ("run", "recorded")}


def test_mean_skills_in_latex_are_against_one_constant():
    # each against its own: 0.4 and 0.375
    own = {"a": {"steering": result("steering", 9.0, 15.0)}, "b": {"steering": result("steering", 10.0, 16.0)}}
    groups = {"a": ["a"], "b": ["b"]}
    skills = average_groups(share_constants(own), groups)
    assert skills == pytest.approx({"a": 0.4, "b": 1 / 3})
    results = {name: {"steering": make_scores(0.0, 1.0)["steering"]} for name in groups}
    text = format_latex(results, {"groups": groups, "skills": skills}, {}, [])
    assert r"a & \textbf{1} & \textbf{0.4}" in text and "& 0.3333" in text


def test_csv_has_one_value_a_line():
    text = format_csv({"a,b": make_scores(0.5, 10.0, (0.4, 0.6))}, {"a,b": {"parameters": 5}})
    rows = list(csv.DictReader(io.StringIO(text)))
    (miou,) = [row for row in rows if row["metric"] == "miou"]
    assert (miou["run"], miou["value"], miou["low"], miou["high"]) == ("a,b", "0.5", "0.4", "0.6")
    assert next(row["value"] for row in rows if row["metric"] == "rmse") == ""
    assert next(row["value"] for row in rows if row["metric"] == "parameters") == "5"
    assert next(row["value"] for row in rows if row["metric"] == "mean_skill") == "0.5"


def test_a_table_has_intervals_where_there_are_any():
    table = format_table({"run": make_scores(0.5, 10.0, (0.4, 0.6))})
    assert "95 % interval" in table and "0.4 .. 0.6" in table
    assert "95 % interval" not in format_table({"run": make_scores(0.5, 10.0)})
    markdown = format_table({"run": make_scores(0.5, 10.0, (0.4, 0.6))}, markdown=True).splitlines()
    assert {line.count("|") for line in markdown if line.startswith("|")} == {9}


MEMORY = """
import copy, json, resource, sys
import numpy as np, torch
from a2d2.dataset import Geometry
from tasks import TASKS
copies = int(sys.argv[1])
makers = {name: task(label_statistics={"scale_deg": 1.0}) for name, task in TASKS.items()}
parts = {name: task.metrics() for name, task in makers.items()}
boxes = [{"box": [10.0 * i, 10.0, 10.0 * i + 9, 40.0], "class": "Car", "visible": 1.0} for i in range(8)]
target = makers["detection"].collate([makers["detection"].transform(boxes, Geometry.identity((128, 80)))])
rng = torch.Generator().manual_seed(0)
for number in range(200):
    corner = torch.rand(30, 2, generator=rng) * 60
    found = {"boxes": torch.cat([corner, corner + 20], dim=1), "scores": torch.rand(30, generator=rng),
             "labels": torch.randint(0, 2, (30,), generator=rng)}
    parts["detection"].update([found], target)
    maps = torch.randint(0, 19, (2, 1, 40, 64), generator=rng, dtype=torch.uint8)
    parts["segmentation"].update(maps[0], maps[1])
    depth = torch.rand(2, 1, 40, 64, generator=rng) * 80
    parts["depth"].update(depth[0], depth[1])
    parts["steering"].update(torch.rand(1, 1), torch.rand(1, 1))
metrics = {name: task.metrics() for name, task in makers.items()}
for _ in range(copies):
    for name, metric in metrics.items():
        metric.merge(copy.deepcopy(parts[name]))
counts = np.random.default_rng(0).integers(0, 3, (100, 200 * copies)).astype(float)
for metric in metrics.values():
    metric.compute(), metric.resample(counts), metric.score_frames(), metric.describe()
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
"""


def test_ten_thousand_frames_need_a_bounded_memory():
    """With 30 boxes each, 100 draws, and all that a report asks for: less than 1.5 GiB more than 200 frames need."""
    used = {}
    for copies in (1, 50):
        command = [sys.executable, "-c", MEMORY, str(copies)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        used[copies] = json.loads(done.stdout.splitlines()[-1]) / 2**20  # GiB
    assert used[50] - used[1] < 1.5, used


def test_skills_are_compared_against_one_constant():
    """Runs with other training labels have other constant baselines: the same score is then no difference of skills."""
    results = {
        "a": {"steering": result("steering", 10.0, 20.0), "depth": result("depth", 0.2, 0.4)},
        "b": {"steering": result("steering", 10.0, 40.0), "depth": result("depth", 0.2, 0.4)},
    }
    groups = find_groups(dict.fromkeys(results))
    shared = share_constants(results, ["b"])
    assert [shared[run]["steering"].constant for run in "ab"] == [40.0, 40.0]
    assert (
        compare_pairs(shared, groups)[-1]["difference"] == 0 and compare_pairs(results, groups)[-1]["difference"] != 0
    )
    assert compare_with_baseline(shared, groups, ["b"])["rows"]["a"]["skill_difference"] == 0
