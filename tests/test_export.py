"""A network as ONNX gives what PyTorch gives; its card says what it is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from derived_root import write_root
from tiny_run import make_run

import export
from a2d2.frames import list_frames
from a2d2.images import read_image
from experiment import load_trained

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    write_root(folder / "root")
    return make_run(folder)


@pytest.fixture
def call(capsys):
    """Run the script in this process: its exit code, and what it said of errors."""

    def run_export(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["export.py", *map(str, arguments)])
            capsys.readouterr()
            try:
                code = export.main()
            except SystemExit as stop:  # of the parser
                code = stop.code
        return code, capsys.readouterr().err

    return run_export


def test_onnx_gives_what_pytorch_gives(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    # in a process of its own, where shapes are not checked, because the exporter cannot trace the checks
    command = [sys.executable, str(ROOT / "export.py"), str(run), "--onnx", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "6 pictures compared" in done.stdout and "depth: largest difference" in done.stdout
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    trained = load_trained(run, torch.device("cpu"))
    images = torch.stack(
        [
            torch.from_numpy(read_image(frame.path("image"))).permute(2, 0, 1)
            for frame in list_frames(run.parent / "root", "image")
        ]
    )
    found = dict(
        zip([each.name for each in session.get_outputs()], session.run(None, {"image": images.numpy()}), strict=True)
    )
    with torch.no_grad():
        outputs = trained.net(images)
        for name in ("segmentation", "depth", "steering"):
            ours = trained.tasks[name].predict(outputs[name], trained.size).numpy()
            assert ours.shape == found[name].shape and np.abs(ours.astype(float) - found[name]).max() < 1e-2, name
        boxes = trained.tasks["detection"].export_output(outputs["detection"], trained.size)
    assert np.allclose(boxes["boxes"], found["boxes"], atol=1e-3) and np.allclose(
        boxes["scores"], found["scores"], atol=1e-5
    )
    meta = session.get_modelmeta().custom_metadata_map
    assert (
        json.loads(meta["files"])["segmentation"]["classes"][1] == "Road"
        and "uint8 (batch, 3, 64, 64)" in meta["input"]
    )
    assert set(json.loads(meta["outputs"])) == set(found)


def test_a_card_has_what_the_hub_shows(run, call):
    assert call(run, "--card") == (0, "")
    text = (run / "README.md").read_text()
    head, body = text.split("---\n")[1:3]
    meta = yaml.safe_load(head)
    assert meta["license"] == "other" and "depth-estimation" in meta["tags"]
    scores = json.loads((run / "best.json").read_text())["scores"]
    assert f"| depth | val | abs_rel | {scores['depth']['score']:.4g} |" in body
    assert "- depth: metres for a focal length of 0.78 x the width" in body and "- steering: degrees" in body
    assert "CC BY-ND 4.0" in body and "Frames: train 2, val 2, test 2." in body


def test_scores_of_other_weights_do_not_come_into_a_card(run, tmp_path, call):
    shutil.copy(run / "best.json", tmp_path / "best.json")
    shutil.copy(run / "best.safetensors", tmp_path / "other.safetensors")
    assert call(tmp_path / "other.safetensors", "--card") == (0, "")
    assert "Not known" in (tmp_path / "README.md").read_text()
    scores = {"runs": {run.name: {"depth": {"weights": "0" * 64}}}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    code, errors = call(run, "--card", "--scores", tmp_path / "scores.json")
    assert code == 2 and "with other weights than" in errors


def test_mistakes_are_one_line(run, tmp_path, call):
    for arguments, code, words in (
        ([run], 2, "nothing to do"),
        ([tmp_path, "--card"], 1, "has no best.safetensors"),
        ([run, "--onnx", tmp_path], 2, "is a folder; name a file"),
        ([run, "--card", "--scores", run / "best.json"], 2, "--scores has no run"),
    ):
        found, errors = call(*arguments)
        assert found == code and words in errors.splitlines()[-1]
