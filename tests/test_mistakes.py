"""A mistake of the user is one line that says what is wrong and what to do, and no traceback."""

import os
import subprocess
import sys

import pytest
from derived_root import write_root
from script_runs import ROOT
from test_protocol import score
from tiny_run import run_train, write_config

from a2d2.frames import list_frames


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    write_root(folder / "root")
    return write_config(folder / "tiny.yaml", folder / "root")


def explain(capsys, config, folder, *options):
    """The exit code and the one line of a training that cannot be."""
    with pytest.MonkeyPatch.context() as patch:
        code = run_train(patch, config, folder, *options)
    lines = [line for line in capsys.readouterr().err.splitlines() if "it/s]" not in line]
    assert not folder.exists()
    return code, lines[-1]


def test_a_regime_that_leaves_no_label_blames_the_labels_that_are_missing(config, tmp_path, capsys):
    root = config.parent / "root"
    kept = {frame.path("depth"): frame.path("depth").read_bytes() for frame in list_frames(root, "depth")}
    for path in kept:
        path.unlink()
    try:
        code, line = explain(capsys, config, tmp_path / "run", "data.labels=symmetric")
        assert code == 1 and "no training frame has a label for depth: run the preprocessing" in line
        assert "steering" not in line
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    # each task has labels, but no frame has all
    moved = [frame.path("steering") for frame in list_frames(root, "depth") if frame.path("steering").exists()]
    for path in moved:
        path.rename(path.with_suffix(".away"))
    other = next(frame for frame in list_frames(root, "image") if not frame.path("depth").exists())
    other.path("steering").write_bytes(moved[0].with_suffix(".away").read_bytes())
    try:
        code, line = explain(capsys, config, tmp_path / "run", "data.labels=symmetric", "data.split=all")
        assert code == 1 and "data.labels=symmetric leaves no training frame" in line and "steering 1" in line
    finally:
        other.path("steering").unlink()
        for path in moved:
            path.with_suffix(".away").rename(path)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["train.precision=fp16", "train.device=cpu"], 2, "fp16 is for a GPU; take fp32 or bf16"),
        (["train.device=cuda:7"], 2, "train.device = 'cuda:7'"),
        (["train.init=nowhere"], 1, "no run folder or weights file nowhere"),
        (["data.roots=[nowhere]"], 1, "nowhere is no preprocessed dataset"),
    ],
)
def test_what_cannot_be_trained_is_one_line(config, tmp_path, capsys, options, code, words):
    found, line = explain(capsys, config, tmp_path / "run", *options)
    assert (found, words in line) == (code, True), line


def test_a_checkpoint_is_no_weights_file_and_the_message_says_what_is(config, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / "run") == 0
    (checkpoint, *_) = (tmp_path / "run" / "checkpoints").glob("*.pt")
    code, _, err = score(capsys, checkpoint)
    assert code == 1 and "checkpoint to resume from" in err and "best.safetensors" in err and "copy it again" not in err


def test_names_with_umlauts_train_and_resume_under_any_locale(config, tmp_path):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    classes = "{Fußgänger: [Pedestrian], Übrige: [Car]}"
    path = config.with_name("klaß.yaml")
    path.write_text(config.read_text() + "\n", encoding="utf-8")
    options = [f"tasks.detection.classes={classes}", "train.steps=1", "tasks.depth=null", "tasks.segmentation=null"]
    for said in (b"best weights", b"is finished"):
        command = [sys.executable, "train.py", "--config", path, "--run", tmp_path / "größe", *options, "--resume"]
        result = subprocess.run([*map(os.fsencode, command)], cwd=ROOT, capture_output=True, env=environment)
        assert result.returncode == 0 and said in result.stdout, (result.stdout, result.stderr)
        assert b"Traceback" not in result.stderr
    assert "Fußgänger" in (tmp_path / "größe" / "config.yaml").read_text(encoding="utf-8")
