"""train.py, evaluate.py and visualize.py as a user runs them, on a small synthetic set."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from a2d2.dataset import DatasetError, FrameDataset, index_roots
from a2d2.images import read_image
from a2d2.synthetic.writer import write_dataset
from tasks import TASKS
from training.checkpoint import load_weights
from training.config import load_config

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {name: task.Options for name, task in TASKS.items()}


def run(script, *arguments, cwd=ROOT):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def derived(tmp_path_factory):
    out = tmp_path_factory.mktemp("set")
    write_dataset(out, scenes=4, frames=3, size=(240, 152), workers=1)
    for script in ("camera", "segmentation", "depth_preprocess", "bounding_box", "steering_angle"):
        data = out / "camera_lidar_semantic_bboxes"
        result = run(
            f"preprocessing/{script}.py", "--data", data, "--out", out / "d", "--size", "128x64", "--threads", "2"
        )
        assert result.returncode == 0, result.stderr
    return out / "d"


@pytest.fixture(scope="module")
def trained(derived, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = run("train.py", *list_arguments(derived, folder))
    assert result.returncode == 0, result.stderr
    return folder


def list_arguments(derived, folder):
    return ["--config", ROOT / "configs/debug.yaml", "--run", folder, f"data.roots=[{derived}]"]


def test_a_run_folder_has_all_that_is_promised(trained):
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "best.safetensors", "best.json", "checkpoints"):
        assert (trained / name).exists(), name
    assert any((trained / "tensorboard").iterdir())
    _, header = load_weights(trained / "best.safetensors")
    assert {"model", "tasks", "fitted", "input_size", "cameras", "split", "step", "assignment"} <= header.keys()


def test_a_run_is_not_overwritten(derived, trained):
    again = run("train.py", *list_arguments(derived, trained))
    assert again.returncode == 1 and "--resume" in again.stderr
    other = run("train.py", *list_arguments(derived, trained), "--resume", "train.optimizer.lr=0.5")
    assert other.returncode == 1 and "train.optimizer.lr was 0.001, now 0.5" in other.stderr


def test_mistakes_are_one_line(derived, tmp_path):
    typo = run("train.py", *list_arguments(derived, tmp_path / "r"), "train.stebs=3")
    assert typo.returncode == 2 and "did you mean 'steps'" in typo.stderr
    nowhere = run("train.py", *list_arguments(tmp_path / "nothing", tmp_path / "r"))
    assert nowhere.returncode == 1 and "preprocessing/" in nowhere.stderr and "Traceback" not in nowhere.stderr
    assert not (tmp_path / "r").exists()
    none = run("evaluate.py", tmp_path / "nothing")
    assert none.returncode == 1 and "no run folder" in none.stderr


def test_weights_alone_can_be_scored_and_drawn(trained, tmp_path):
    alone = tmp_path / "copy.safetensors"
    alone.write_bytes((trained / "best.safetensors").read_bytes())
    scored = run("evaluate.py", alone, "--split", "all", "--format", "json", "--workers", "0")
    assert scored.returncode == 0, scored.stderr
    scores = json.loads(scored.stdout)["runs"]["copy"]
    assert set(scores) == set(TASKS) and scores["depth"]["frames"] > 0
    assert all({"headline", "score", "constant", "skill"} <= row.keys() for row in scores.values())
    drawn = run("visualize.py", alone, "--split", "train", "--count", "1", "--output", tmp_path / "panels")
    assert drawn.returncode == 0, drawn.stderr
    (path,) = (tmp_path / "panels").glob("*.png")
    assert read_image(path).shape[1] == 1432  # the width of a page, 7.16 inches, at 200 pixels an inch


def test_every_shipped_config_loads():
    lists = {"classes.yaml", "split.yaml", "two-roots-split.yaml"}
    grids = {path for path in (ROOT / "configs/study").glob("*.yaml") if path.name != "base.yaml"}  # in test_study.py
    configs = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path not in grids]
    configs = [path for path in configs if path.name not in lists]
    assert len(configs) >= 9
    for path in configs:
        load_config(path, [], OPTIONS)


def test_the_sample_is_as_documented(derived):
    frames, roots = index_roots([derived], ["front_center"])
    tasks = {name: task() for name, task in TASKS.items()}
    dataset = FrameDataset(frames, roots, tasks)
    sample = dataset[0]
    assert sample["image"].shape == (3, 64, 128) and sample["image"].dtype == torch.uint8
    assert sample["camera"].shape == (3, 3) and sample["frame"] == str(frames[0])
    there = {name for name, task in tasks.items() if task.has_label(frames[0])}
    assert set(sample["targets"]) == there
    with pytest.raises(DatasetError, match="two roots"):
        index_roots([derived, Path(str(derived) + "/../d")], ["front_center"])


ALLOWED = {
    "a2d2": {"a2d2"},
    "models": {"models"},
    "training": {"training"},
    "tasks": {"tasks", "a2d2", "models"},
    "preprocessing": {"preprocessing", "a2d2", "_common"},
    "scoring": {"scoring", "a2d2", "tasks", "training", "experiment"},
    "pictures": {"pictures", "scoring", "a2d2", "tasks", "training", "experiment"},
    "experiments": {
        "experiments",
        "pictures",
        "scoring",
        "a2d2",
        "tasks",
        "training",
        "experiment",
        "evaluate",
    },
}


def list_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", ALLOWED)
def test_import_directions(package):
    ours = {*ALLOWED, "experiment", "train", "evaluate", "predict", "visualize", "export", "pseudo_label", "_common"}
    for path in (ROOT / package).rglob("*.py"):
        found = set(list_imports(path))
        assert found & ours <= ALLOWED[package], path
        if package == "a2d2" and path.name != "dataset.py":
            assert not found & {"torch", "torchvision"}, path
