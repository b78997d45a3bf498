"""The log of a run: complete lines, the same file after a resume, and trackers that never stop a run."""

import json
import shutil
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.log import RunLog, write_environment


def read_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def without_times(lines):
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def log_steps(log, first, last):
    for step in range(first, last + 1):
        log.event("train", step, **{"loss/height": 1 / step})
        if step % 2 == 0:
            log.event("evaluate", step, error=step)


def test_event_is_on_disk_at_once_with_nan_as_null(tmp_path, capsys):
    log = RunLog(tmp_path / "run", tensorboard=False)
    log.event("train", 3, **{"loss/height": 0.25, "frames": 8, "norm": float("nan")})
    log.event("train", 4, loss=torch.tensor(0.5), error=np.float32(0.25))
    line, other = read_lines(tmp_path / "run")
    assert (other["loss"], other["error"]) == (0.5, 0.25)
    assert line.pop("time") > 1e9
    assert line == {"kind": "train", "step": 3, "loss/height": 0.25, "frames": 8, "norm": None}
    assert capsys.readouterr().out.splitlines()[0] == "train step 3: loss/height 0.25  frames 8  norm nan"


def test_resumed_log_equals_that_of_a_run_never_stopped(tmp_path):
    with RunLog(tmp_path / "whole", tensorboard=False) as log:
        log_steps(log, 1, 8)
    with RunLog(tmp_path / "stopped", tensorboard=False) as log:
        log_steps(log, 1, 6)
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')

    with RunLog(tmp_path / "stopped", tensorboard=False) as log:
        log.truncate_after(4)
        log_steps(log, 5, 8)

    assert without_times(read_lines(tmp_path / "stopped")) == without_times(read_lines(tmp_path / "whole"))
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["metrics.jsonl"]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    with RunLog(tmp_path) as log:
        log_steps(log, 1, 4)
    with RunLog(tmp_path) as log:
        log.truncate_after(2)
        log_steps(log, 3, 5)
    accumulator = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = accumulator.Scalars("train/loss/height")
    assert [event.step for event in scalars] == [1, 2, 3, 4, 5]
    assert [event.value for event in scalars] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])


class FakeRun:
    def __init__(self, fails):
        self.fails, self.logged, self.finished = fails, [], False

    def log(self, scalars, step):
        if self.fails:
            raise ConnectionError("no network")
        self.logged.append((scalars, step))

    def finish(self):
        self.finished = True


@pytest.mark.parametrize("failure", ["not installed", "at the start", "later"])
def test_failing_tracker_warns_once_and_the_run_goes_on(tmp_path, monkeypatch, failure):
    def fail(**options):
        raise ConnectionError("no network")

    module = types.SimpleNamespace(init=fail if failure == "at the start" else lambda **options: FakeRun(fails=True))
    # None in sys.modules makes the import fail.
    monkeypatch.setitem(sys.modules, "wandb", None if failure == "not installed" else module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with RunLog(tmp_path, tensorboard=False, wandb={"project": "p"}) as log:
            log_steps(log, 1, 3)
    assert [str(warning.message).split(" fails")[0] for warning in caught] == ["W&B"]
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 2, 3]


def test_tracker_gets_its_options_and_all_events(tmp_path, monkeypatch):
    run, given = FakeRun(fails=False), {}
    monkeypatch.setitem(
        sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: given.update(options) or run)
    )
    with RunLog(tmp_path / "name", tensorboard=False, wandb={"project": "p", "mode": "offline"}) as log:
        log.event("train", 1, loss=0.5)
    assert given == {"dir": str(tmp_path / "name"), "name": "name", "project": "p", "mode": "offline"}
    assert run.logged == [({"train/loss": 0.5}, 1)]
    assert run.finished


def test_environment_explains_the_run(tmp_path):
    write_environment(tmp_path, ["train.py", "--config", "my config.yaml"])
    content = json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))
    assert content["command"] == "train.py --config 'my config.yaml'"
    assert content["python"] == ".".join(map(str, sys.version_info[:3]))
    assert content["packages"]["torch"] is not None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_environment_names_the_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    def run_git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    def read_git():
        write_environment(tmp_path / ".git", ["train.py"])
        return json.loads((tmp_path / ".git" / "environment.json").read_text(encoding="utf-8"))["git"]

    monkeypatch.setattr("training.log.__file__", str(tmp_path / "log.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert read_git() == {"commit": None, "changed": None}
    run_git("init")
    (tmp_path / "log.py").write_text("a")
    run_git("add", ".")
    run_git("commit", "-m", "a")
    assert read_git() == {"commit": run_git("rev-parse", "HEAD"), "changed": False}
    (tmp_path / "log.py").write_text("b")
    assert read_git() == {"commit": run_git("rev-parse", "HEAD"), "changed": True}
