"""Files and texts as they are on real machines: power cuts, odd paths, other encodings, no locks, keys given twice."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from raw_scenes import write_raw_set
from script_runs import ROOT, SCRIPTS, list_reasons, read_report, read_tree, run

from a2d2 import images
from a2d2.frames import list_frames
from a2d2.images import read_json, read_yaml, write_bytes

PRODUCES = dict(zip(SCRIPTS, ("image", "segmentation", "depth", "boxes", "steering"), strict=True))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_raw_set(tmp_path_factory.mktemp("raw"), frames=4)


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    for script in SCRIPTS:
        assert run(script, raw, out)[0] == 0
    return read_tree(out)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(images.os, "fsync", lambda file: order.append("fsync"))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append("rename"), replace(self, target))[1])
    write_bytes(tmp_path / "a" / "file", b"content")
    assert order == ["fsync", "rename"] and (tmp_path / "a" / "file").read_bytes() == b"content"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_file_without_content_is_not_finished(raw, whole, tmp_path, script):
    assert run(script, raw, tmp_path)[0] == 0
    first, second, *_ = (frame.path(PRODUCES[script]) for frame in list_frames(tmp_path, PRODUCES[script]))
    first.write_bytes(b"")
    code, printed = run(script, raw, tmp_path)
    assert code == 0 and "1 done" in printed, printed
    tree = {name: content for name, content in read_tree(tmp_path).items() if name != "dataset.json"}
    assert all(whole[name] == content for name, content in tree.items()) and second.stat().st_size > 0


@pytest.mark.parametrize("given", [".", "./", "..", "../NAME/."])
def test_the_folder_may_be_named_from_inside(raw, given):
    """By default the output is beside the raw dataset, and the bus signals are found there, whatever it is called."""
    scene = next(path for path in sorted(raw.iterdir()) if path.is_dir())
    folder = scene if given == ".." else raw
    out = raw.parent / "processed" / "48x32"
    try:
        for script in ("camera", "steering_angle"):
            command = [sys.executable, ROOT / "preprocessing" / f"{script}.py", "--size", "48x32"]
            command += ["--data", given.replace("NAME", raw.name)]
            result = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
        assert list_frames(out, "steering") and list_frames(out, "image") and not (raw / "processed").exists()
    finally:
        shutil.rmtree(out.parent, ignore_errors=True)


def test_the_raw_dataset_is_never_the_output(raw):
    before = read_tree(raw)
    code, printed = run("camera", raw, raw, "--format", "png")
    assert code == 2 and "is the raw dataset" in printed
    assert read_tree(raw) == before


WITHOUT_LOCKS = """
import fcntl, runpy, sys
def refuse(*arguments):
    raise OSError(9, "Bad file descriptor")
fcntl.flock = refuse
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_without_locks_the_scripts_go_on_with_a_word(raw, whole, tmp_path):
    for script in SCRIPTS:
        command = [ROOT / "preprocessing" / f"{script}.py", "--data", raw, "--out", tmp_path, "--size", "48x32"]
        result = subprocess.run(
            [sys.executable, "-c", WITHOUT_LOCKS, *map(str, command), "--threads", "1"], capture_output=True, text=True
        )
        assert result.returncode == 0 and "without locks (Bad file descriptor)" in result.stderr, result.stderr
    assert read_tree(tmp_path) == whole


def test_text_is_read_and_written_as_utf8_whatever_the_locale():
    """Every call that opens a text names its encoding."""
    for path in ROOT.rglob("*.py"):
        if {".venv", "tests"} & set(path.relative_to(ROOT).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            mode = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            owner = node.func.value if isinstance(node.func, ast.Attribute) else None
            foreign = isinstance(owner, ast.Name) and owner.id in (
                "tarfile",
                "safetensors",
                "os",
                "urllib",
                "Image",
                "av",
            )
            binary = any(set(each) <= set("rwab+") and "b" in each for each in mode)
            text = name in ("read_text", "write_text") and owner is not None
            if name == "open" and not foreign and not binary:
                text = True
            if text:
                assert any(word.arg == "encoding" for word in node.keywords), (path, node.lineno)


def test_what_the_terminal_cannot_show_does_not_turn_work_into_an_error(raw, tmp_path):
    out = tmp_path / "größe"
    command = [sys.executable, ROOT / "preprocessing" / "camera.py", "--data", raw, "--out", out, "--size", "48x32"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    result = subprocess.run([*map(str, command)], capture_output=True, env=environment)
    assert result.returncode == 0 and b"8 done" in result.stdout and b"Traceback" not in result.stderr


def test_a_key_given_twice_is_damage_and_not_the_last_of_the_two(raw, tmp_path):
    path = tmp_path / "twice.json"
    path.write_text('{"a": 1, "b": {"c": 1, "c": 2}}')
    with pytest.raises(ValueError, match="the key 'c' is given twice"):
        read_json(path)


def test_a_key_of_yaml_given_twice_is_named_and_one_that_is_overridden_is_not(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}\nd: [*b, *b]\n")
    assert read_yaml(path) == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 3}, "d": [{"x": 2}] * 2}
    path.write_text("a: {x: 1,\n  x: 2}\n")
    with pytest.raises(ValueError, match=r"file\.yaml, line 2: key 'x' is given again, first in line 1"):
        read_yaml(path)
    path.write_text("[" * 5000)
    with pytest.raises(ValueError, match="is not YAML"):
        read_yaml(path)


def plant_twice(path):
    """Give the first key of the first inner object again, with another value."""
    text = path.read_text()
    content = json.loads(text)
    key = next(iter(content))
    path.write_text(text.rstrip()[:-1] + f', "{key}": {json.dumps(content[key])}}}')


def test_labels_with_a_key_given_twice_fail_by_name(tmp_path):
    raw = write_raw_set(tmp_path / "raw", frames=3)
    frame = list_frames(raw, "label3D")[0]
    plant_twice(frame.path("label3D"))
    assert run("bounding_box", raw, tmp_path / "out")[0] == 3
    reasons = list_reasons(tmp_path / "out", "boxes")
    assert set(reasons) == {str(frame)} and "is given twice" in reasons[str(frame)]


def test_pictures_that_are_all_there_cost_no_reading_of_camera_files(raw, tmp_path):
    assert run("camera", raw, tmp_path)[0] == 0
    hooked = (
        "import runpy, sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == 'open' else None)\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        "    print('OPENED', sum('_camera_' in name for name in opened))\n"
    )
    command = [ROOT / "preprocessing" / "camera.py", "--data", raw, "--out", tmp_path, "--size", "48x32"]
    result = subprocess.run([sys.executable, "-c", hooked, *map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0 and "OPENED 0" in result.stdout, result
    assert read_report(tmp_path, "camera")["skipped"] == len(list_frames(raw, "camera"))
