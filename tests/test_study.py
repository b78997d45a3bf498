"""A grid trains what is missing and nothing else, and its tables say what its results are."""

import argparse
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments import run as study_run
from experiments import tabulate
from experiments.analysis import (
    KEPT,
    ArmResults,
    compare_arms,
    complete_arm,
    draw_seeds,
    find_score_interval,
    gather_study,
    measure_recovery,
)
from experiments.cost import CostCounter, Work
from experiments.grid import Arm, GridError, read_grid
from experiments.plots import draw_plots
from experiments.tables import format_study
from experiments.tabulate import fill_page
from scoring.compare import TaskResult
from tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments/results"
GRIDS = [path for path in sorted((ROOT / "configs/study").glob("*.yaml")) if path.name != "base.yaml"]
SMALL = {
    "base": "configs/study/base.yaml",
    "dataset": {"about": "none", "processed": "64x64", "training_frames": 8, "labelled_frames": 8},
    "tuning": {"share": 0.5, "settings": [{"train.optimizer.lr": 1e-3}, {"train.optimizer.lr": 2e-3}]},
    "arms": {
        "single": {"title": "single", "networks": "single", "tasks": ["depth", "steering"], "seeds": [0, 1],
                   "tuned": "single", "set": {"data.labels": "as_is"}},
        "student": {"title": "student", "networks": "shared", "tasks": ["depth", "steering"], "seeds": [0, 1],
                    "teachers": "single", "set": {"data.labels": "as_is", "tasks.depth.pseudo.threshold": 3.0}},
    },
    "comparisons": [{"title": "Both", "reference": "single", "arms": ["student"]}],
}  # fmt: skip


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_run_of_the_shipped_grids_has_a_config(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    grid = read_grid(path)
    runs = grid.list_runs()
    places = {run.name: place for place, run in enumerate(runs)}
    assert len(places) == len(runs) > 5
    for run in runs:
        assert tuple(grid.resolve(run, tuned=False).tasks) == run.tasks
        assert all(places[needed.name] < places[run.name] for needed in run.teachers)


@pytest.mark.parametrize("path", [path for path in GRIDS if (RESULTS / path.stem).is_dir()], ids=lambda path: path.stem)
def test_the_results_page_has_the_tables_of_the_results(path, monkeypatch):
    """Made again from experiments/results/ as tabulate.py makes them, to the last letter."""
    monkeypatch.chdir(ROOT)
    grid = read_grid(path.relative_to(ROOT))
    page = Path("RESULTS.md").read_text(encoding="utf-8")
    assert fill_page(Path("RESULTS.md"), gather_study(grid, CostCounter(grid))) == page


SUMMARY = {
    "One label a frame": {
        "sharing alone": "shared",
        "pseudo-labels alone: self-training of single tasks": "single-task + self-training",
        "both": "shared + pseudo-labels",
        "both, twice the steps (two seeds)": "shared + pseudo-labels, 2 x the steps",
        "neither: single tasks, three times the steps (two seeds)": "single-task, 3 x the steps",
    },
    "Three times the steps": {
        "sharing alone, longer": "shared, 3 x the steps",
        "pseudo-labels alone, longer": "single-task + self-training, all 3 x the steps",
        "both, longer": "shared + pseudo-labels, all 3 x the steps",
    },
    "Another encoder": {
        "sharing alone, from scratch": "shared, second encoder",
        "pseudo-labels alone, from scratch": "single-task + self-training, second encoder",
        "both, from scratch": "shared + pseudo-labels, second encoder",
    },
}
"""Rows of the tables written by hand in RESULTS.md, by the title of the comparison that they are taken from."""


def test_the_numbers_of_the_summary_are_those_of_the_tables():
    """Written by hand above the tables, and in the README's first lines."""
    page = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    known = []
    for title, names in SUMMARY.items():
        rows = {
            cells[0]: [re.sub(r" ±.*", "", cell) for cell in cells[1:]]
            for line in page.partition(f"### {title}\n")[2].partition("\n### ")[0].splitlines()
            if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) > 10
        }
        columns = ["Delta-m %", "95 % interval", "segmentation %", "depth %", "detection %", "steering %"]
        order = [rows["arm"].index(name) for name in columns]  # of the two intervals the first is that of Delta-m
        assert rows["arm"].index("Delta-m %") + 1 == order[1]
        for told, arm in names.items():
            (line,) = [line for line in page.splitlines() if line.startswith(f"| {told} |")]
            assert [cell.strip() for cell in line.strip("|").split("|")][1:] == [rows[arm][number] for number in order]
            known += rows[arm][: order[1] + 1]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("[RESULTS.md]")[0]
    for text in (readme, page.partition("![")[0]):
        told = re.findall(r"[+-]\d+\.\d", text)
        assert told and all(any(number in cell for cell in known) for number in told), told
    told, _, tables = page.partition("\n<!-- configs/study/main.yaml -->\n")
    told = re.findall(r"[+-]\d+\.\d", told.partition("\n## How far this goes\n")[0])
    there = set(re.findall(r"[+-]\d+\.\d", tables))
    assert told and not set(told) - there, set(told) - there


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)

    def make(**changes):
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(SMALL | changes))
        return read_grid(tmp_path / "grid.yaml", {}, tmp_path / "results")

    return make


class FakeWorker(study_run.Worker):
    """Leaves what train.py and pseudo_label.py would, and keeps the commands. `spoil`: a run that fails, and how;
    `skills`: of some runs."""

    def __init__(self, runs, spoil=(), skills=()):
        super().__init__(runs, 1, "cpu")
        self.commands, self.spoil, self.skills = [], dict(spoil), dict(skills)

    def call(self, command, log):
        self.commands.append(command)
        folder = Path(command[command.index("--run" if command[0] == "train.py" else "--out") + 1])
        if folder.name in self.spoil:
            raise study_run.RunError(f"{folder.name} ended with exit code 1: {self.spoil[folder.name]}; see {log}")
        folder.mkdir(parents=True, exist_ok=True)
        if command[0] == "train.py":
            values = dict(each.split("=", 1) for each in command if "=" in each)
            tasks = [name for name in TASKS if values.get(f"tasks.{name}") != "null"]
            better = self.skills.get(folder.name, float(values.get("train.optimizer.lr", 0)) * 100)
            scores = {
                name: {"headline": TASKS[name].primary_metric, "score": 1 - better, "constant": 2.0, "skill": better,
                       "frames": 5}
                for name in tasks
            }  # fmt: skip
            (folder / "best.json").write_text(json.dumps({"skill": better, "step": 1, "scores": scores}))
            (folder / "best.safetensors").write_bytes(b"1")  # the same each time, as training is
            labels = {name: {"s/front_center": ["000000001"]} for name in tasks}
            (folder / "assignment.json").write_text(json.dumps({"format": 1, "labels": labels}))
        return ""


@pytest.mark.parametrize(("given", "threads"), [(None, 3), ("1", 1)])
def test_programs_get_their_share_of_the_cores_or_what_the_environment_says(tmp_path, monkeypatch, given, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    said = study_run.Worker(tmp_path, 3, "cpu").call(
        ["-c", "import os; print(os.environ['OMP_NUM_THREADS'])"], tmp_path / "log"
    )
    assert int(said.split()[-1]) == threads


def list_trained(worker):
    return [Path(each[each.index("--run") + 1]).name for each in worker.commands if each[0] == "train.py"]


def test_what_is_missing_is_trained_in_order_and_once(small, tmp_path):
    grid = small()
    runs = grid.list_runs()
    worker = FakeWorker(tmp_path / "runs")
    assert study_run.run_all(grid, runs, worker, jobs=1) == len(runs) == 4 + 4 + 2
    trained = list_trained(worker)
    assert trained[:4] == [f"single.{task}.setting{number}" for number in (0, 1) for task in ("depth", "steering")]
    assert trained[-1] == "student.shared.seed1" and trained.index("student.shared.seed0") > trained.index(
        "single.depth.seed0"
    )
    command = next(
        each for each in worker.commands if "single.depth.seed0" in each[-2] or 'run="single.depth.seed0"' in each
    )
    assert "train.optimizer.lr=0.002" in command  # the setting that was better on validation
    student = next(each for each in worker.commands if 'run="student.shared.seed1"' in each)
    (roots,) = [json.loads(each.partition("=")[2]) for each in student if each.startswith("data.pseudo.roots")]
    assert [Path(root).name for root in roots] == ["single.depth.seed1", "single.steering.seed1"]
    again = FakeWorker(tmp_path / "elsewhere")
    assert study_run.run_all(grid, runs, again, jobs=1) == 0 and not again.commands
    (tmp_path / "results/single.depth.seed1.json").write_text('{"format": 1, "dig')  # cut off
    assert study_run.run_all(grid, runs, again, jobs=1) == 1 and list_trained(again) == ["single.depth.seed1"]


def test_students_that_begin_at_once_make_their_teachers_labels_once_at_a_time(small, tmp_path):
    """Also where only the results of teachers and of the run that calibrates them were kept, and both are trained
    again."""

    class Watching(FakeWorker):
        active, crowded = (), ()

        def call(self, command, log):
            folder = command[command.index("--run" if command[0] == "train.py" else "--out") + 1]
            self.crowded += (folder,) if folder in self.active else ()
            self.active += (folder,)
            time.sleep(0.05)
            super().call(command, log)
            self.active = tuple(other for other in self.active if other != folder)
            return ""

    arms = {
        **SMALL["arms"],
        "single": SMALL["arms"]["single"] | {"calibrated_by": "held"},
        "held": SMALL["arms"]["single"] | {"title": "held", "seeds": [0], "tasks": ["depth"]},
        "self": SMALL["arms"]["student"] | {"title": "self", "networks": "single"},
    }
    grid = small(arms=arms)
    runs = grid.list_runs()
    study_run.run_all(grid, runs, FakeWorker(tmp_path / "gone"), jobs=1)
    for path in (tmp_path / "results").glob("s*.seed?.json"):
        if path.name.startswith(("student", "self")):
            path.unlink()
        else:
            path.write_text(json.dumps(json.loads(path.read_text()) | {KEPT: {}}))
    worker = Watching(tmp_path / "runs")
    assert study_run.run_all(grid, runs, worker, jobs=4) == 2 + 4
    assert not worker.crowded
    trained = list_trained(worker)
    assert trained.count("held.depth.seed0") == trained.count("single.depth.seed0") == 1
    # the kept result was that of other weights
    assert KEPT not in json.loads((tmp_path / "results/single.depth.seed0.json").read_text())
    labelled = [each for each in worker.commands if each[0] == "pseudo_label.py" and "single.depth" in each[1]]
    assert len(labelled) >= 2 and all("--calibrate" in each for each in labelled)


def test_finals_are_whole_runs_and_none_is_trained_twice(small, tmp_path):
    settings = [
        {"train.optimizer.lr": lr, "train.optimizer.weight_decay": wd} for lr in (1e-3, 2e-3) for wd in (0, 0.1)
    ]
    tuning = {"share": 0.5, "settings": settings, "finals": "train.optimizer.lr"}
    grid = small(tuning=tuning)
    runs = [run for run in grid.list_runs() if run.arm == "single" and run.network == "depth"]
    worker = FakeWorker(tmp_path / "runs", skills={"single.depth.setting1": 0.5, "single.depth.finalist0": 0.6})
    assert study_run.run_all(grid, runs, worker, jobs=1) == len(runs) == 4 + 2 + 2
    trained = list_trained(worker)
    assert sorted(trained) == sorted(run.name for run in runs if run.name != "single.depth.seed0")  # that is finalist0
    found = {run.name: grid.read_result(run) for run in runs}
    weight_decay = {name: result["options"]["train.optimizer.weight_decay"] for name, result in found.items()}
    # of each rate the better weight decay, then the better rate of whole runs, though it was worse in the first round
    assert (weight_decay["single.depth.finalist0"], weight_decay["single.depth.finalist1"]) == (0.1, 0)
    assert found["single.depth.seed1"]["options"]["train.optimizer.lr"] == 1e-3
    assert grid.resolve(runs[4]).train.steps == 2 * grid.resolve(runs[0]).train.steps
    assert found["single.depth.seed0"]["skill"] == 0.6
    assert (tmp_path / "runs/single.depth.seed0/best.safetensors").is_file()
    with pytest.raises(GridError, match="every setting must have the option"):
        small(tuning=tuning | {"finals": "train.optimizer.betas"})


def test_a_result_of_another_config_does_not_count(small, tmp_path):
    grid = small()
    study_run.run_all(grid, grid.list_runs(), FakeWorker(tmp_path / "runs"), jobs=1)
    arms = json.loads(json.dumps(SMALL["arms"]))
    arms["single"]["set"]["train.schedule.final_factor"] = 0.5
    changed = small(arms=arms)
    left = [run.name for run in changed.list_runs() if not study_run.is_done(changed, run)]
    assert len(left) == len(changed.list_runs())  # students learn from other teachers now
    (tmp_path / "results/single.depth.seed0.json").write_text('{"format": 2, "digest": "0"}')  # whole, and no result
    assert not study_run.is_done(small(), small().list_runs()[4])
    study_run.run_all(grid, grid.list_runs(), FakeWorker(tmp_path / "runs"), jobs=1)
    arms = json.loads(json.dumps(SMALL["arms"]))
    arms["student"]["title"] = "another title"
    same = small(arms=arms)
    assert all(study_run.is_done(same, run) for run in same.list_runs())


def test_a_loss_that_is_not_finite_is_a_result_and_a_full_disk_is_none(small, tmp_path):
    grid = small()
    spoil = {"single.depth.seed0": "the loss of depth is not finite on a micro-batch of x"}
    runs = [run for run in grid.list_runs() if run.arm == "single"]
    study_run.run_all(grid, runs, FakeWorker(tmp_path / "runs", spoil), jobs=1)
    found = {run.name: grid.read_result(run) for run in runs}
    assert "is not finite" in found["single.depth.seed0"]["failed"] and not found["single.depth.seed1"]["failed"]
    text = format_study(gather_study(grid, CostCounter(grid)))
    assert "| single " in text and "| student " not in text  # what has no result is not in the table of scores
    assert "Failed: single.depth.seed0." in text and "1 runs failed" in text
    assert "Failed runs: single (1)." in text  # also where there is nothing to compare
    # a student of it has failed, too, and the grid goes on
    students = [run for run in grid.list_runs() if run.arm == "student"]
    study_run.run_all(grid, [*runs, *students], FakeWorker(tmp_path / "runs"), jobs=1)
    first, second = (grid.read_result(run) for run in students)
    assert first["failed"] == "its teacher single.depth.seed0 has failed" and not second["failed"]
    for path in (tmp_path / "results").glob("*seed*"):
        path.unlink()
    with pytest.raises(study_run.RunError, match="No space"):
        study_run.run_all(grid, runs, FakeWorker(tmp_path / "runs", {"single.depth.seed1": "No space left"}), jobs=1)
    assert not (tmp_path / "results/single.depth.seed1.json").exists()


def test_weights_that_a_result_is_not_about_are_none(small, tmp_path):
    """Results travel by git, weights stay: in a folder of that name there may be those of another config."""
    grid = small()
    runs = grid.list_runs()
    folder = tmp_path / "runs"
    study_run.run_all(grid, runs, FakeWorker(folder), jobs=1)
    student = next(run for run in runs if run.name == "student.shared.seed0")
    assert set(grid.read_result(student)["teachers"]) == {"single.depth.seed0", "single.steering.seed0"}
    assert read_plan(grid, runs, folder)["single"] == ["4", "0", "0"]
    (folder / "single.depth.seed0/best.safetensors").write_bytes(b"of another config")
    grid.result_path(student).unlink()
    plan = read_plan(grid, runs, folder)
    assert plan["single"] == ["4", "0", "1"] and plan["student"] == ["1", "1", "0"]
    assert read_plan(grid, runs, tmp_path / "elsewhere")["single"] == ["4", "0", "2"]  # those of its seed
    worker = FakeWorker(folder)
    study_run.run_all(grid, runs, worker, jobs=1)
    assert list_trained(worker) == ["single.depth.seed0", "student.shared.seed0"]
    assert gather_study(grid, CostCounter(grid)).strangers == []
    # a student of weights that are no more those of the teacher's result is named
    result = grid.read_result(runs[-1])
    teachers = result["teachers"] | {"single.depth.seed1": "another digest"}
    grid.write_result(runs[-1], result | {"teachers": teachers})
    study = gather_study(grid, CostCounter(grid))
    assert study.strangers == ["student.shared.seed1"]
    assert "1 students, such as student.shared.seed1" in format_study(study)


def read_plan(grid, runs, folder):
    """Arm -> done, left, again."""
    lines = study_run.describe_plan(grid, runs, folder).splitlines()
    return {line.split()[0]: line.split()[1:4] for line in lines}


def test_only_the_weights_of_a_result_are_scored(small, tmp_path, monkeypatch):
    grid = small()
    runs = [run for run in grid.list_runs() if run.arm == "single" and not run.is_tuning]
    study_run.run_all(grid, grid.list_runs(), FakeWorker(tmp_path / "runs"), jobs=1)
    (tmp_path / "runs/single.depth.seed1/best.safetensors").write_bytes(b"of another config")
    scored = []
    monkeypatch.setattr(tabulate, "load_trained", lambda folder, device: scored.append(folder.name))
    about = {"subset": "test", "frames": "x", "resampled": 3, "scores": {}}
    monkeypatch.setattr(tabulate, "score_run", lambda trained, subset, device, arguments: about)
    arguments = argparse.Namespace(runs=tmp_path / "runs", device="cpu")
    assert tabulate.open_test(grid, runs, arguments) == ["single.depth.seed1"]
    assert sorted(scored) == ["single.depth.seed0", "single.steering.seed0", "single.steering.seed1"]
    assert tabulate.open_test(grid, runs, arguments) == ["single.depth.seed1"] and len(scored) == 3  # once


def test_a_folder_of_a_twin_with_other_weights_is_replaced(small, tmp_path):
    tuning = SMALL["tuning"] | {"finals": "train.optimizer.lr"}
    grid = small(tuning=tuning)
    runs = [run for run in grid.list_runs() if run.arm == "single" and run.network == "depth"]
    stale = tmp_path / "runs/single.depth.seed0"
    stale.mkdir(parents=True)
    (stale / "best.safetensors").write_bytes(b"of the setting that was better before")
    study_run.run_all(grid, runs, FakeWorker(tmp_path / "runs"), jobs=1)
    assert (stale / "best.safetensors").read_bytes() == b"1"


def test_a_result_says_what_was_trained_though_tuning_has_changed_meanwhile(small, tmp_path):
    grid = small()

    class Pulling(FakeWorker):
        def call(self, command, log):
            if Path(command[command.index("--run") + 1]).name == "single.depth.seed0":  # and git pull comes between
                path = tmp_path / "results/single.depth.setting0.json"
                path.write_text(json.dumps(json.loads(path.read_text()) | {"skill": 0.9}))
            return super().call(command, log)

    *tuning, first, _ = [run for run in grid.list_runs() if run.arm == "single" and run.network == "depth"]
    study_run.run_all(grid, tuning, FakeWorker(tmp_path / "runs"), jobs=1)
    study_run.perform(grid, first, Pulling(tmp_path / "runs"), Work())
    assert json.loads(grid.result_path(first).read_text())["options"]["train.optimizer.lr"] == 2e-3
    assert grid.read_result(first) is None  # by now another rate is the better one


def test_scores_of_another_subset_or_of_other_frames_are_not_compared(small, tmp_path):
    grid = small()
    study_run.run_all(grid, grid.list_runs(), FakeWorker(tmp_path / "runs"), jobs=1)
    for run in grid.list_runs():
        keep_scores(grid, run, subset="val")
    assert gather_study(grid, CostCounter(grid)).subset == "val"  # those of validation, not these under a wrong name
    assert gather_study(small(subset="val"), CostCounter(grid)).arms["single"].scores[0]["depth"].draws is not None
    for run in grid.list_runs():
        keep_scores(grid, run)
    assert gather_study(grid, CostCounter(grid)).subset == "test"
    keep_scores(grid, grid.list_runs()[-1], frames="fewer")
    with pytest.raises(
        ValueError, match=r"single\.depth\.seed0 and student\.shared\.seed1 were scored on unlike frames"
    ):
        gather_study(grid, CostCounter(grid))
    keep_scores(grid, grid.list_runs()[-1], resampled=100)
    with pytest.raises(ValueError, match="unlike frames"):
        gather_study(grid, CostCounter(grid))
    result = grid.read_result(grid.list_runs()[-1])
    result["val"]["depth"]["frames"] = 4
    grid.write_result(grid.list_runs()[-1], {key: value for key, value in result.items() if key != KEPT})
    with pytest.raises(ValueError, match=r"\(depth: 5, 4\)"):
        gather_study(grid, CostCounter(grid))


def test_results_are_small_enough_for_the_repository(small, tmp_path):
    grid = small()
    study_run.run_all(grid, grid.list_runs(), FakeWorker(tmp_path / "runs"), jobs=1)
    assert max(path.stat().st_size for path in (tmp_path / "results").iterdir()) < 20_000
    committed = list((ROOT / "experiments/results").rglob("*.json"))
    assert all(path.stat().st_size < 20_000 for path in committed)


def keep_scores(grid, run, **about):
    """As tabulate.py keeps scores on the test subset, with three draws."""
    result = grid.read_result(run)
    draws = {"draws": "0.5 0.6 0.7", "constant_draws": "2 2 2"}
    scores = {task: score | draws for task, score in result["val"].items()}
    about = {"subset": "test", "frames": "all", "resampled": 3, "scores": scores} | about
    grid.write_result(run, result | {KEPT: about})


def test_tables_disclose_the_tuning_and_plots_show_scores_by_labels(small, tmp_path):
    curves = {"title": "By labels", "tasks": ["depth"], "lines": {"single": ["single"], "student": ["student"]},
              "others": {"depth": {"somebody": 0.5}}}  # fmt: skip
    grid = small(curves=[curves])
    assert draw_plots(gather_study(grid, CostCounter(grid)), tmp_path / "empty") == []
    study_run.run_all(grid, grid.list_runs(), FakeWorker(tmp_path / "runs"), jobs=1)
    for run in grid.list_runs():
        keep_scores(grid, run)
    study = gather_study(grid, CostCounter(grid))
    for run in grid.list_runs():  # a constant that is the same in every draw has none in a result, such as an AP of 0
        result = grid.read_result(run)
        scores = {task: score | {"constant_draws": None} for task, score in result[KEPT]["scores"].items()}
        grid.write_result(run, result | {KEPT: result[KEPT] | {"scores": scores}})
    assert format_study(gather_study(grid, CostCounter(grid))) == format_study(study)
    assert [(each.network, each.options["train.optimizer.lr"], each.taken) for each in study.tuning] == [
        ("depth", 1e-3, False), ("steering", 1e-3, False), ("depth", 2e-3, True), ("steering", 2e-3, True)
    ]  # fmt: skip
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in format_study(study).splitlines() if "|" in line
    ]
    assert ["50%", "0.001", "0.1000", "0.1000"] in rows and ["50%", "0.002", "**0.2000**", "**0.2000**"] in rows
    page = tmp_path / "page.md"
    mark = f"{grid.path.as_posix()} -->\n"
    page.write_text(f"before\n<!-- {mark}stale\n<!-- end of {mark}after\n")
    filled = fill_page(page, study)
    page.write_text(filled)
    assert filled.startswith("before\n<!--") and filled.endswith("-->\nafter\n") and "stale" not in filled
    assert "\n### Tuning\n" in filled and fill_page(page, study) == filled
    page.write_text(f"<!-- end of {mark}")
    with pytest.raises(ValueError, match="must have the line"):
        fill_page(page, study)
    assert fill_page(tmp_path / "none.md", study) == format_study(study)
    low, high = find_score_interval(study.arms["single"], "depth")
    assert 0.5 <= low < high <= 0.7
    assert [path.name for path in draw_plots(study, tmp_path / "plots")] == ["both.png", "by_labels.png"]
    with pytest.raises(GridError, match="no arm 'nobody'"):
        small(curves=[curves | {"lines": {"single": ["nobody"]}}])


def test_mistakes_in_a_grid_are_named(small):
    def check(message, **changes):
        with pytest.raises(GridError, match=message):
            small(**changes).list_runs()

    arms = SMALL["arms"]
    check("no such arm", arms=arms | {"student": arms["student"] | {"teachers": "nobody"}})
    check("have no seed 7", arms=arms | {"student": arms["student"] | {"seeds": [7]}})
    check("no such arm|there is no arm", comparisons=[{"title": "x", "reference": "nobody", "arms": ["single"]}])
    check(
        "wait for each other", arms={name: arm | {"teachers": "student", "tuned": None} for name, arm in arms.items()}
    )
    check("compares 'single' with itself", comparisons=[{"title": "x", "reference": "single", "arms": ["single"]}])
    both = SMALL["comparisons"][0]
    check("two plots would be called both.png", comparisons=[both, both | {"title": "Both?"}])
    check("Extra inputs", arms=arms | {"student": arms["student"] | {"seds": [0]}})
    grid = small(arms=arms | {"student": arms["student"] | {"set": {"train.stebs": 3}}})
    with pytest.raises(GridError, match="did you mean 'steps'"):
        grid.resolve(grid.list_runs()[-1])
    # also in what is cut down to the tasks of a run
    for options in ({"data.labels": {"budget": {"depth": 0.1, "steerng": 0.1}}}, {"data.hold_out": {"dept": 0.2}}):
        grid = small(arms=arms | {"student": arms["student"] | {"set": {"data.labels": "as_is"} | options}})
        with pytest.raises(GridError, match=r"steerng|dept"):
            grid.resolve(grid.list_runs()[-1], tuned=False)
    synthetic = {"out": "Datasets/other", "scenes": 4, "frames": 2, "size": "480x302", "seed": 1, "roads": "real"}
    grid = small(dataset=synthetic | {"processed": "160x96"})
    with pytest.raises(GridError, match=r"Datasets/other/processed/160x96, and data\.roots"):
        grid.resolve(grid.list_runs()[0])


def test_a_key_given_twice_and_another_split_are_seen(small, tmp_path):
    text = yaml.safe_dump(SMALL) + yaml.safe_dump({"arms": SMALL["arms"]})
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(GridError, match=r"line \d+: key 'arms' is given again"):
        read_grid(tmp_path / "twice.yaml")
    split = tmp_path / "split.yaml"
    arms = {
        "x": SMALL["arms"]["single"] | {"tuned": None, "set": {"data.split": "listed", "data.split_file": str(split)}}
    }
    digests = []
    for content in ("train: [a]", "train: [a]  # the same", "train: [b]"):
        split.write_text(content)
        grid = small(arms=arms, tuning=None, comparisons=[])
        digests.append(grid.digest(grid.list_runs()[0]))
    assert digests[0] == digests[1] != digests[2]


# ---------------------------------------------------------------- comparisons


def make_arm(name, scores, seeds=(0, 1)):
    """scores: task -> one score for each seed."""
    arm = ArmResults(name, Arm(title=name, networks="single", seeds=seeds), expected=tuple(scores))
    for place, seed in enumerate(seeds):
        arm.scores[seed] = {
            task: TaskResult(TASKS[task](), values[place], 40.0, np.full(50, values[place]), np.full(50, 40.0))
            for task, values in scores.items()
        }
    return arm


def test_an_arm_against_a_reference_by_hand():
    reference = make_arm("a", {"detection": [0.2, 0.4], "steering": [20.0, 10.0]})
    better = make_arm("b", {"detection": [0.3, 0.4], "steering": [15.0, 10.0]})
    found = compare_arms(better, reference)
    assert found.terms == pytest.approx({"detection": 25.0, "steering": 12.5})
    assert found.delta_m == pytest.approx(18.75) and found.without == pytest.approx(
        {"detection": 12.5, "steering": 25.0}
    )
    # skills: 0.2, 0.4 and 1 - 20/40, 1 - 10/40 against 0.3, 0.4 and 1 - 15/40, 1 - 10/40
    assert found.skill == pytest.approx(((0.3 + 0.625) / 2 - (0.2 + 0.5) / 2) / 2)
    assert found.probability == pytest.approx((0.5 + 1 + 0 + 1) / 4)
    # with the frames fixed, the interval is that of drawing two seeds in pairs: 37.5 (twice the first), 18.75 or 0
    assert found.interval == pytest.approx((0.0, 37.5))
    goal = make_arm("c", {"detection": [0.4, 0.8], "steering": [10.0, 5.0]})
    assert measure_recovery(better, reference, goal) == (pytest.approx(18.75 / 75), 2)
    assert found.deviation == pytest.approx(18.75 * 2**0.5)  # of 37.5 and 0
    # the seeds that all three have: a third run of two of them is not in it
    del goal.scores[1]
    assert measure_recovery(better, reference, goal) == (pytest.approx(37.5 / 75), 1)
    goal.expected = ("detection",)
    assert measure_recovery(better, reference, goal) is None


def test_tasks_that_a_reference_does_not_train_are_those_of_another_arm(small, tmp_path):
    reference, rest = (
        make_arm("a", {"detection": [0.2, 0.4]}),
        make_arm("r", {"depth": [0.2], "detection": [9.0]}, (0,)),
    )
    found = compare_arms(make_arm("b", {"depth": [0.1, 0.1], "detection": [0.3, 0.4]}), complete_arm(reference, rest))
    assert found.seeds == [0]  # the second has no depth on the side of the reference
    assert found.terms == pytest.approx({"depth": 50.0, "detection": 50.0}) and found.delta_m == pytest.approx(50.0)
    assert set(reference.scores[0]) == {"detection"} and "depth" not in reference.expected  # itself as it was
    arms = SMALL["arms"] | {
        "half": SMALL["arms"]["single"] | {"title": "half", "tasks": ["steering"], "tuned": "single"}
    }
    half = {"title": "Half", "reference": "half", "rest": "single", "arms": ["student"], "goal": "student"}
    grid = small(arms=arms, comparisons=[half])
    worker = FakeWorker(tmp_path / "runs", skills={"student.shared.seed0": 0.5, "student.shared.seed1": 0.5})
    study_run.run_all(grid, grid.list_runs(), worker, 1)
    text = format_study(gather_study(grid, CostCounter(grid)))
    assert "Against half (`half`), in depth against single (`single`)." in text
    (row,) = [line for line in text.partition("## Half\n")[2].splitlines() if line.startswith("| student")]
    assert row.rstrip("| ").endswith("100%"), row
    shutil.rmtree(grid.results)
    worker = FakeWorker(tmp_path / "again", spoil={"single.depth.seed0": "the loss is not finite"})
    study_run.run_all(grid, grid.list_runs(), worker, 1)
    text = format_study(gather_study(grid, CostCounter(grid))).partition("## Half\n")[2]
    assert "Failed runs: single (1), student (1)." in text  # also where the rest is what lacks
    for named, rest in (("half", "half"), ("single", "half")):
        with pytest.raises(GridError, match="trains no task that"):
            small(arms=arms, comparisons=[half | {"reference": named, "rest": rest}])


def test_seeds_that_one_arm_lacks_are_left_out_and_tasks_too():
    reference = make_arm("a", {"detection": [0.2, 0.4], "steering": [20.0, 10.0]})
    single = make_arm("b", {"detection": [0.5]}, seeds=(1,))
    found = compare_arms(single, reference)
    assert found.seeds == [1] and found.terms == pytest.approx({"detection": 25.0}) and found.probability is None
    del reference.scores[1]["steering"]
    assert compare_arms(single, reference) is None  # a seed counts only when all networks of the arm have it
    assert draw_seeds(3, 10).max() == 2


def test_costs_count_images_and_the_teachers(small):
    grid = small()
    counter = CostCounter(grid)
    by_name = {run.name: counter.count(run, tuned=False) for run in grid.list_runs()}
    teacher, student = by_name["single.depth.seed0"], by_name["student.shared.seed0"]
    assert teacher.images == 1200 * 2 and teacher.teacher_flops == 0
    assert by_name["single.depth.setting0"].images == 600 * 2
    assert student.images == 1200 * 4
    both = teacher.flops + by_name["single.steering.seed0"].flops
    assert student.teacher_flops == pytest.approx(both, rel=0.05) and student.teacher_flops > both


def test_what_calibrates_teachers_is_counted(small):
    single = SMALL["arms"]["single"]
    held = single | {"title": "held", "seeds": [0], "tasks": ["depth"]}
    grid = small(arms=SMALL["arms"] | {"single": single | {"calibrated_by": "held"}, "held": held})
    by_name = {run.name: CostCounter(grid).count(run, tuned=False) for run in grid.list_runs()}
    before = small()
    (student,) = [run for run in before.list_runs() if run.name == "student.shared.seed0"]
    added = (
        by_name["student.shared.seed0"].teacher_flops - CostCounter(before).count(student, tuned=False).teacher_flops
    )
    assert added == pytest.approx(by_name["held.depth.seed0"].flops)


def test_the_passes_of_a_mean_teacher_by_hand(small):
    """It is asked from its first step on, on pictures and mirror images, by the heads that have no true label."""
    arm = {"title": "x", "networks": "shared", "tasks": ["depth", "steering"], "seeds": [0]}
    labels = {"data.labels": "one_task"}
    taught = {"train.mean_teacher": {"from_step": 300}}
    grid = small(
        tuning=None, comparisons=[], arms={"plain": arm | {"set": labels}, "taught": arm | {"set": labels | taught}}
    )
    counter = CostCounter(grid)
    plain, taught = (counter.count(run) for run in grid.list_runs())
    forward = counter._measure(grid.resolve(grid.list_runs()[0]))
    depth, steering = forward.heads["depth"], forward.heads["steering"]
    assert plain.flops == 1200 * 3 * (4 * forward.shared + 2 * depth + 2 * steering)
    asked = 2 * (4 * forward.shared + 2 * steering + 2 * depth)
    assert taught.flops - plain.flops == 900 * (asked + 3 * (2 * depth + 2 * steering))
    assert taught.images == plain.images == 1200 * 4


def test_labels_that_come_from_two_datasets_are_never_on_one_frame(small):
    arm = {
        "title": "x",
        "networks": "shared",
        "tasks": ["depth", "steering"],
        "seeds": [0],
        "set": {"data.labels": "as_is"},
    }
    apart = small(
        tuning=None, comparisons=[], arms={"x": arm}, dataset=SMALL["dataset"] | {"together": [["depth"], ["steering"]]}
    )
    counter = CostCounter(apart)
    work = counter.count(apart.list_runs()[0])
    forward = counter._measure(apart.resolve(apart.list_runs()[0]))
    assert work.flops == 1200 * 3 * (4 * forward.shared + 2 * forward.heads["depth"] + 2 * forward.heads["steering"])
