"""Whatever ends a training, its work is kept: signals to the whole group, errors anywhere, a second owner."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from derived_root import write_root
from tiny_run import are_same_weights, read_log, run_train, write_config

import train
from a2d2.frames import list_frames
from training import owner
from training.checkpoint import load_newest_checkpoint
from training.loading import explain_memory, explain_worker_death
from training.owner import FolderInUseError, Owner
from training.stopping import STOPS, StopFlag, StoppedError

ROOT = Path(__file__).resolve().parent.parent

# Trains, and sends a signal to the whole group where the named function is called for the n-th time.
SIGNALLING = """
import importlib, os, signal, sys
import train
module, name, number, which = sys.argv[1:5]
owner = importlib.import_module(module)
*classes, function = name.split(".")
for each in classes:
    owner = getattr(owner, each)
whole, calls = getattr(owner, function), []

def signalling(*arguments, **options):
    calls.append(1)
    if len(calls) == int(number):
        os.killpg(0, getattr(signal, which))
    return whole(*arguments, **options)

setattr(owner, function, signalling)
sys.argv = ["train.py", *sys.argv[5:]]
sys.exit(train.main())
"""
PLACES = {
    "loading": ("train", "start_record", 1),
    "training": ("training.updates", "CycleUpdate.step", 2),
    "evaluation": ("tasks.segmentation", "SegmentationMetrics.update", 1),
    "saving": ("training.run", "save_checkpoint", 1),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    write_root(folder / "root")
    return write_config(folder / "tiny.yaml", folder / "root", workers=2)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, folder, "data.workers=0") == 0
    return folder


def start(*command):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # as many threads as in this process, because other numbers round differently
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


@pytest.mark.parametrize(
    ("place", "which"),
    [(place, "SIGTERM") for place in PLACES] + [("training", which) for which in ("SIGINT", "SIGUSR1", "SIGHUP")],
)
def test_a_signal_to_the_whole_group_leaves_a_checkpoint_and_the_resumed_run_is_the_whole_one(
    config, whole, tmp_path, place, which
):
    run = tmp_path / "run"
    process = start("-c", SIGNALLING, *PLACES[place], which, "--config", config, "--run", run)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, (out, err)
    assert "Traceback" not in err and "DataLoader" not in err and "--resume goes on from" in err
    step, _ = load_newest_checkpoint(run / "checkpoints")
    assert step == {"loading": 0, "training": 2, "evaluation": 2, "saving": 2}[place]
    assert not (run / "owner.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, run, "--resume", "data.workers=0") == 0
    assert are_same_weights(run, whole)
    assert read_log(run) == read_log(whole)


@pytest.mark.parametrize("number", STOPS)
def test_every_signal_that_asks_to_stop_is_heard(number):
    flag = StopFlag()
    flag.check()
    signal.raise_signal(number)
    with pytest.raises(StoppedError):
        flag.check()


def wait_for_imports(process):
    """Until a script loads PyTorch, its slowest import, however slow the machine is."""
    deadline = time.monotonic() + 120
    maps = Path(f"/proc/{process.pid}/maps")
    while "/torch/lib/" not in maps.read_text(errors="replace"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def test_a_signal_during_the_imports_is_a_stop_as_well(config, tmp_path):
    process = start("train.py", "--config", config, "--run", tmp_path / "run")
    wait_for_imports(process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75 and "Traceback" not in err


@pytest.mark.parametrize("script", ["evaluate.py", "visualize.py"])
def test_an_interrupt_of_the_other_scripts_is_one_line(script, tmp_path):
    process = start(script, tmp_path / "run")
    wait_for_imports(process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err.splitlines() == [f"{script[:-3]}: interrupted"]


def damage(root, kind, scene=0):
    """Cut a file of the kind short; its path and its content before."""
    path = list_frames(root, kind)[scene].path(kind)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path, content


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_validation_picture_costs_no_training(config, whole, tmp_path, capsys, workers):
    root = config.parent / "root"
    record = json.loads((whole / "record.json").read_text())
    (folder, (identity, *_)), *_ = record["subsets"]["val"].items()
    (frame,) = [each for each in list_frames(root, "image") if str(each) == f"{folder}/{identity}"]
    content = frame.path("image").read_bytes()
    frame.path("image").write_bytes(content[:200])
    try:
        with pytest.MonkeyPatch.context() as patch:
            assert run_train(patch, config, tmp_path / "run", f"data.workers={workers}") == 1
    finally:
        frame.path("image").write_bytes(content)
    err = capsys.readouterr().err
    assert sum(line.startswith("train: ") and str(frame.path("image")) in line for line in err.splitlines()) == 1
    assert "Traceback" not in err and "DataLoader" not in err
    assert load_newest_checkpoint(tmp_path / "run" / "checkpoints")[0] == 2
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / "run", "--resume", "data.workers=0") == 0
    assert are_same_weights(tmp_path / "run", whole) and read_log(tmp_path / "run") == read_log(whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_label_between_steps_is_one_line_and_the_steps_are_saved(config, whole, tmp_path, capsys, workers):
    def fail(self, frame, whole_load=train.Task.has_label):
        raise ValueError(f"{frame.path(self.kind)} is damaged")

    with pytest.MonkeyPatch.context() as patch:
        from tasks.depth import Depth

        load, calls = Depth.load, []

        def load_twice(self, frame):
            calls.append(1)
            return load(self, frame) if len(calls) < 4 else fail(self, frame)

        patch.setattr(Depth, "load", load_twice)
        assert run_train(patch, config, tmp_path / "run", f"data.workers={workers}") == 1
    err = capsys.readouterr().err
    assert "is damaged" in err and "Traceback" not in err and "--resume goes on from there" in err
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / "run", "--resume", "data.workers=0") == 0
    assert are_same_weights(tmp_path / "run", whole) and read_log(tmp_path / "run") == read_log(whole)


def test_a_worker_that_is_killed_is_one_line_that_names_the_options(config, tmp_path, capsys):
    parent = os.getpid()
    with pytest.MonkeyPatch.context() as patch:
        from a2d2.dataset import FrameDataset

        def die(self, key):
            assert os.getpid() != parent
            os.kill(os.getpid(), signal.SIGKILL)

        patch.setattr(FrameDataset, "__getitem__", die)
        assert run_train(patch, config, tmp_path / "run", "data.workers=1") == 1
    err = capsys.readouterr().err
    assert "probably for lack of memory" in err and "data.workers" in err and "train.micro_batch" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("unable to open shared memory object </torch_1> in read-write mode"), "/dev/shm full"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"), "/dev/shm full"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "lack of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "the GPU is out of memory"),
        (MemoryError(), "memory has run out"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "has run out"),
    ],
)
def test_memory_that_runs_out_is_one_line_that_names_the_options(error, words):
    said = explain_memory(error) or explain_worker_death(error)
    assert words in said and "\n" not in said and "train.micro_batch" in said
    assert explain_memory(RuntimeError("shapes differ")) is explain_worker_death(RuntimeError("shapes differ")) is None


def test_the_log_of_a_run_killed_before_its_first_checkpoint_starts_anew(config, whole, tmp_path):
    run = tmp_path / "run"

    def kill(*arguments):
        raise SystemExit(9)  # as little is done after it as after kill -9: it is no Exception

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.run.save_checkpoint", kill)
        with pytest.raises(SystemExit):
            run_train(patch, config, run, "data.workers=0")
    assert [line["step"] for line in read_log(run)] == [1, 2]
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, run, "--resume", "data.workers=0") == 0
    assert are_same_weights(run, whole) and read_log(run) == read_log(whole)


@pytest.mark.parametrize("times", [1, 2])
def test_a_run_killed_behind_the_line_of_an_evaluation_has_that_line_once(config, whole, tmp_path, times):
    """Killed right after the last evaluation is logged, and resumed once or twice."""
    run = tmp_path / "run"
    for number in range(times):
        with pytest.MonkeyPatch.context() as patch:
            event = train.Run.save_best

            def kill(self, state, header, scores, event=event):
                event(self, state, header, scores)
                if state.progress.step == 2:
                    raise SystemExit(9)

            patch.setattr(train.Run, "save_best", kill)
            with pytest.raises(SystemExit):
                run_train(patch, config, run, "data.workers=0", *(["--resume"] if number else []))
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            assert run_train(patch, config, run, "--resume", "data.workers=0") == 0
        assert are_same_weights(run, whole) and read_log(run) == read_log(whole)


def test_a_resume_says_that_it_starts_anew_or_that_all_is_done(config, tmp_path, capsys):
    for said in (f"{tmp_path / 'run'} holds no run yet: it starts anew", "is finished: all 4 steps are done"):
        with pytest.MonkeyPatch.context() as patch:
            assert run_train(patch, config, tmp_path / "run", "--resume", "data.workers=0") == 0
        assert said in capsys.readouterr().out


# one owner


def test_a_second_training_in_a_folder_is_refused_with_who_holds_it(config, tmp_path, capsys):
    run = tmp_path / "run"
    process = start("train.py", "--config", config, "--run", run, "train.steps=100000")
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        with pytest.MonkeyPatch.context() as patch:
            assert run_train(patch, config, run, "--resume", "train.steps=100000") == 1
        err = capsys.readouterr().err
        assert f"is in use by another training (process {process.pid} on {socket.gethostname()}" in err
        assert "make room" not in err
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    # kill -9 leaves the file behind, and no lock
    assert (run / "owner.json").exists()
    Owner(run).release()
    assert not (run / "owner.json").exists()


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(*arguments):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(owner.fcntl, "flock", refuse)


def write_owner(folder, host, process, age):
    path = folder / "owner.json"
    path.write_text(json.dumps({"host": host, "process": process, "since": "2026-01-01 00:00:00"}))
    os.utime(path, (time.time() - age,) * 2)


@pytest.mark.parametrize(
    ("host", "process", "age", "free"),
    [
        ("another", 1, 10, False),  # alive on another machine
        ("another", 1, 1000, True),  # not touched for long
        (None, 1, 10, False),  # process 1 of this machine is alive
        (None, 2**22 + 1, 10, True),  # no such process
    ],
)
def test_without_locks_the_owner_is_judged_by_its_process_and_its_touch(tmp_path, no_locks, host, process, age, free):
    write_owner(tmp_path, host or socket.gethostname(), process, age)
    if free:
        mine = Owner(tmp_path)
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()} on"):
            Owner(tmp_path)
        mine.release()
        Owner(tmp_path).release()
    else:
        with pytest.raises(FolderInUseError, match=f"process {process} on {host or socket.gethostname()}"):
            Owner(tmp_path)


def test_a_lock_that_does_not_reach_another_machine_is_not_enough(tmp_path):
    write_owner(tmp_path, "another", 1, 10)
    with pytest.raises(FolderInUseError, match="process 1 on another"):
        Owner(tmp_path)


def test_an_owner_in_an_empty_folder_leaves_nothing(tmp_path):
    Owner(tmp_path / "new").release()
    assert not (tmp_path / "new").exists()
