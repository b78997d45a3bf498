"""A grid trains what is missing and nothing else, and its tables say what its results are."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments import run as study_run
from experiments.analysis import (
    KEPT,
    ArmResults,
    compare_arms,
    draw_seeds,
    find_score_interval,
    gather_study,
    measure_recovery,
)
from experiments.cost import CostCounter
from experiments.grid import OWN, Arm, GridError, read_grid
from experiments.plots import draw_plots
from experiments.tables import format_study
from experiments.tabulate import fill_page
from scoring.compare import TaskResult
from tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
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
            (folder / "best.safetensors").write_bytes(b"1")
            labels = {name: {"s/front_center": ["000000001"]} for name in tasks}
            (folder / "assignment.json").write_text(json.dumps({"format": 1, "labels": labels}))
        return ""


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
    assert "Failed: single.depth.seed0." in text and "1 runs failed" in text
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


def test_results_are_small_enough_for_the_repository(small, tmp_path):
    grid = small()
    study_run.run_all(grid, grid.list_runs(), FakeWorker(tmp_path / "runs"), jobs=1)
    assert max(path.stat().st_size for path in (tmp_path / "results").iterdir()) < 20_000
    committed = list((ROOT / "experiments/results").rglob("*.json"))
    assert all(path.stat().st_size < 20_000 for path in committed)


def test_tables_disclose_the_tuning_and_plots_show_scores_by_labels(small, tmp_path):
    curves = {"title": "By labels", "tasks": ["depth"], "lines": {"single": ["single"], "student": ["student"]},
              "others": {"depth": {"somebody": 0.5}}}  # fmt: skip
    grid = small(curves=[curves])
    assert draw_plots(gather_study(grid, CostCounter(grid)), tmp_path / "empty") == []
    study_run.run_all(grid, grid.list_runs(), FakeWorker(tmp_path / "runs"), jobs=1)
    for run in grid.list_runs():  # as on the test subset, with three draws
        result = grid.read_result(run)
        scores = {
            task: score | {"draws": "0.5 0.6 0.7", "constant_draws": "2 2 2"} for task, score in result["val"].items()
        }
        grid.write_result(run, {key: value for key, value in result.items() if key not in OWN} | {KEPT: scores})
    study = gather_study(grid, CostCounter(grid))
    for run in grid.list_runs():  # a constant that is the same in every draw has none in a result, such as an AP of 0
        result = grid.read_result(run)
        scores = {task: score | {"constant_draws": None} for task, score in result[KEPT].items()}
        grid.write_result(run, {key: value for key, value in result.items() if key not in OWN} | {KEPT: scores})
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
    check("Extra inputs", arms=arms | {"student": arms["student"] | {"seds": [0]}})
    grid = small(arms=arms | {"student": arms["student"] | {"set": {"train.stebs": 3}}})
    with pytest.raises(GridError, match="did you mean 'steps'"):
        grid.resolve(grid.list_runs()[-1])


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
    assert measure_recovery(better, reference, goal) == pytest.approx(18.75 / 75)


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
