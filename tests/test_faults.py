"""Faults that preprocessing survives: killed at any moment, a full disk, two runs at once, foreign names.

docs/faults.md lists these faults, each with its test.
"""

import ast
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from raw_scenes import VIEW, write_raw_set
from script_runs import ROOT, SCRIPTS, SIZE, finish, read_report, read_tree, run, start, wait_for

from a2d2.frames import list_frames
from preprocessing._common import Kind, run_script

FRAMES = 60  # of each of the two scenes
PRODUCES = dict(zip(SCRIPTS, ("image", "segmentation", "depth", "boxes", "steering"), strict=True))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_raw_set(tmp_path_factory.mktemp("raw"), frames=FRAMES)


@pytest.fixture(scope="module")
def undisturbed(raw, tmp_path_factory):
    """The files that all five scripts write without a fault."""
    out = tmp_path_factory.mktemp("undisturbed")
    for script in SCRIPTS:
        assert run(script, raw, out)[0] == 0
    return read_tree(out)


def test_killed_twenty_times_at_random_moments_the_files_are_those_of_an_undisturbed_run(raw, undisturbed, tmp_path):
    rng = random.Random(0)
    interrupted = 0
    for number in range(20):
        script = SCRIPTS[number % len(SCRIPTS)]
        # a finished kind would not be written again, so delete half of its files
        done = list_frames(tmp_path, PRODUCES[script])
        for frame in rng.sample(done, len(done) // 2):
            frame.path(PRODUCES[script]).unlink()
        before = len(list_frames(tmp_path, PRODUCES[script]))
        process = start(script, raw, tmp_path)
        wait_for(lambda script=script, before=before, process=process: (
            len(list_frames(tmp_path, PRODUCES[script])) > before or process.poll() is not None
        ))  # fmt: skip
        time.sleep(rng.uniform(0, 0.03))
        interrupted += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        # every file with its final name is complete
        found = {name: data for name, data in read_tree(tmp_path).items() if not Path(name).name.startswith(".")}
        assert all(undisturbed[name] == data for name, data in found.items() if name != "dataset.json")
    assert interrupted >= 10  # else most kills came too late
    for script in SCRIPTS:
        assert run(script, raw, tmp_path)[0] == 0
    assert read_tree(tmp_path).keys() == undisturbed.keys()  # nothing is left over
    assert read_tree(tmp_path) == undisturbed


def test_two_runs_at_once_leave_what_one_leaves(raw, undisturbed, tmp_path):
    for script in SCRIPTS:
        processes = [start(script, raw, tmp_path) for _ in range(2)]
        assert [finish(process)[0] for process in processes] == [0, 0]
    assert read_tree(tmp_path) == undisturbed


@functools.cache
def find_namespace():
    """The command that runs a process with its own mounts, as root or in a user namespace; None if neither works."""
    for command in (["unshare", "-m"], ["unshare", "-rm"]):
        trial = [*command, "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
        try:
            if subprocess.run(trial, capture_output=True).returncode == 0:
                return command
        except OSError:
            return None
    return None


ON_SMALL_DISK = """
mount -t tmpfs -o size=$SPACE none "$DISK"
"$@"; echo "first exit code $?"
find "$DISK" -name '.*' -type f
cp -r "$DISK/out" "$KEPT/first"
mount -o remount,size=64m "$DISK"
"$@"; echo "second exit code $?"
cp -r "$DISK/out" "$KEPT/second"
"""


@pytest.mark.skipif(find_namespace() is None, reason="no small file system can be mounted here")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_full_disk_gives_one_line_and_no_broken_file_and_the_rerun_finishes(raw, undisturbed, tmp_path, script):
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    command = [sys.executable, ROOT / "preprocessing" / f"{script}.py", "--data", raw, "--out", disk / "out"]
    command += ["--threads", "2", "--size", f"{SIZE[0]}x{SIZE[1]}"]
    result = subprocess.run(
        [*find_namespace(), "sh", "-c", ON_SMALL_DISK, "sh", *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "DISK": str(disk), "KEPT": str(kept), "SPACE": "200k"},
        timeout=60,
    )
    assert "first exit code 1" in result.stdout and "second exit code 0" in result.stdout, result
    assert not re.findall(r"\.partial", result.stdout)
    (line,) = [line for line in result.stderr.splitlines() if "No space left on device" in line]
    assert str(disk) in line and "make room" in line and "Traceback" not in result.stderr
    first, second = read_tree(kept / "first"), read_tree(kept / "second")
    assert first and all(undisturbed[name] == data for name, data in first.items() if name != "dataset.json")
    labels = [frame.path(PRODUCES[script]).name for frame in list_frames(kept / "second", PRODUCES[script])]
    assert len(labels) == 2 * FRAMES and len(labels) > len(list_frames(kept / "first", PRODUCES[script]))
    assert all(undisturbed[name] == data for name, data in second.items() if name != "dataset.json")


def fill_disk(frame, recipe):
    raise OSError(28, os.strerror(28), str(frame.under(recipe.out).path("depth")))


def test_a_full_disk_stops_the_run_in_one_line(raw, tmp_path, capsys):
    """The same without a small file system: the error is raised by a stub."""
    arguments = Namespace(
        data=raw, out=tmp_path, size=SIZE, view=VIEW, threads=1, shard=(1, 1), overwrite=False, strict=False
    )
    arguments.calibration = arguments.bus = arguments.cluster = None
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            run_script(Kind(name="depth", raw="lidar", produces="depth", derive=fill_disk), arguments)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 1
    assert "_depth_frontcenter_000000001.png: No space left on device; make room" in capsys.readouterr().err


def list_sources():
    return [path for path in ROOT.rglob("*.py") if not {".venv", "tests"} & set(path.relative_to(ROOT).parts)]


def test_nothing_writes_through_a_memory_map():
    """On a full disk, a write to a memory map kills its process with SIGBUS, which cannot be handled as an error."""
    for path in list_sources():
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"memmap", "open_memmap", "mmap"}, path


def test_npz_and_npy_are_never_unpickled():
    for path in list_sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and any(word.arg == "allow_pickle" for word in node.keywords):
                (word,) = [word for word in node.keywords if word.arg == "allow_pickle"]
                assert isinstance(word.value, ast.Constant) and word.value.value is False, (path, node.lineno)


def test_a_foreign_box_class_is_kept_counted_and_never_one_of_ours(tmp_path):
    root = write_raw_set(tmp_path / "raw", frames=1)
    frame = list_frames(root, "label3D")[0]
    boxes = json.loads(frame.path("label3D").read_text())
    boxes["box_0"]["class"] = "Spaceship"
    frame.path("label3D").write_text(json.dumps(boxes))
    assert run("bounding_box", root, tmp_path / "out")[0] == 0
    stored = json.loads(frame.under(tmp_path / "out").path("boxes").read_text())["boxes"]
    assert [box["class"] for box in stored] == ["Spaceship", "Car"]
    (noticed,) = read_report(tmp_path / "out", "boxes")["noticed"]
    assert noticed == {"frame": str(frame), "boxes of unknown class 'Spaceship'": 1}


def test_missing_files_of_a_frame_stop_no_other_kind(tmp_path):
    root = write_raw_set(tmp_path / "raw", frames=2)
    frames = list_frames(root, "camera")
    for kind, frame in zip(("camera", "label", "lidar", "label3D"), frames, strict=True):
        frame.path(kind).unlink()
    for script in SCRIPTS[:4]:
        code, printed = run(script, root, tmp_path / "out")
        assert code == 0 and "3 done" in printed, printed
    for kind, frame in zip(("image", "segmentation", "depth", "boxes"), frames, strict=True):
        assert list_frames(tmp_path / "out", kind) == [other for other in frames if other != frame]


def test_the_table_of_faults_names_tests_that_exist():
    rows = re.findall(r"`(tests/\w+\.py)::(\w+)`", (ROOT / "docs" / "faults.md").read_text())
    assert len(rows) >= 14
    for file, name in rows:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), (file, name)


def test_a_class_map_never_holds_more_than_classes_and_nothing(undisturbed):
    maps = [name for name in undisturbed if "_segmentation_" in name]
    assert len(maps) == 2 * FRAMES
    for name in maps[:3]:
        header = undisturbed[name].index(b"\n") + 1
        values = np.frombuffer(undisturbed[name][header:], np.uint8)
        assert len(values) == SIZE[0] * SIZE[1] and set(np.unique(values)) <= {*range(38), 255}
