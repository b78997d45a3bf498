"""Checkpoints and weights: written whole, kept or left alone, read only when safe and sound."""

import ast
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from training.checkpoint import (
    WEIGHTS_FORMAT,
    load_newest_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
)
from training.files import whole_file, write_json

ROOT = Path(__file__).parent.parent
PICKLING_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"}

# Forks one writer after the other, kills each at a random moment, and prints how many kills met a save under way.
KILLING = """
import os, random, signal, sys, time, warnings
from pathlib import Path
import torch
from training.checkpoint import load_newest_checkpoint, save_checkpoint

warnings.simplefilter("error")
torch.set_num_threads(1)
folder = Path(sys.argv[1])

def save(step):
    save_checkpoint(folder, step, {"weight": torch.full((500_000,), float(step))}, keep=1)

save(1)
last = torn = 0
for _ in range(20):
    child = os.fork()
    if child == 0:
        for step in range(last + 1, 10**6):
            save(step)
    time.sleep(random.uniform(0.005, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    torn += any(folder.glob(".*.tmp"))
    step, state = load_newest_checkpoint(folder)
    assert step >= last and torch.equal(state["weight"], torch.full((500_000,), float(step)))
    last = step
save(last + 1)
print(torn)
"""


@pytest.fixture
def full_disk():
    """Let no file grow beyond 64 kB, which fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def list_names(folder):
    return sorted(path.name for path in folder.iterdir())


def make_state(value, size=10):
    return {"model": {"weight": torch.full((size,), float(value))}, "seen": [value, None, True], "betas": (0.9, 0.999)}


def test_checkpoint_comes_back_as_it_was(tmp_path):
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    generator = torch.Generator().manual_seed(5)
    state = {"model": layer.state_dict(), "optimizer": optimizer.state_dict(), "random": generator.get_state()}
    save_checkpoint(tmp_path, 12, state, keep=1)

    step, loaded = load_newest_checkpoint(tmp_path)

    assert step == 12
    assert loaded["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    for name, tensor in layer.state_dict().items():
        assert torch.equal(loaded["model"][name], tensor)
    for index, moments in state["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(loaded["optimizer"]["state"][index][name], tensor)
    assert torch.equal(loaded["random"], state["random"])


@pytest.mark.parametrize(
    ("value", "where"),
    [(np.float64(1), "state['a'][1]"), (np.zeros(2), "state['a'][1]"), (Path(), "state['a'][1]"), ({1.5: 0}, "1.5")],
)
def test_what_could_not_be_read_again_is_refused_before_writing(tmp_path, value, where):
    with pytest.raises(TypeError) as caught:
        save_checkpoint(tmp_path, 1, {"a": [0, value]}, keep=1)
    assert where in str(caught.value)
    assert list_names(tmp_path) == []


def test_newest_checkpoints_are_kept_and_later_ones_of_a_left_course_are_not(tmp_path):
    for step in (100, 200, 300):
        save_checkpoint(tmp_path, step, make_state(step), keep=2)
    assert list_names(tmp_path) == ["step_00000200.pt", "step_00000300.pt"]
    save_checkpoint(tmp_path, 250, make_state(250), keep=1)
    assert list_names(tmp_path) == ["step_00000250.pt"]


def test_folder_without_checkpoints_gives_none(tmp_path):
    assert load_newest_checkpoint(tmp_path) is None
    assert load_newest_checkpoint(tmp_path / "nowhere") is None


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit_of_the_weights(path):
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((10,), 2.0).numpy().tobytes()) + 20] ^= 1
    path.write_bytes(content)


def replace_by_other_content(path):
    torch.save([1, 2], path)


@pytest.mark.parametrize("damage", [cut_in_half, empty, flip_a_bit_of_the_weights, replace_by_other_content])
def test_broken_newest_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
    save_checkpoint(tmp_path, 1, make_state(1), keep=2)
    newest = save_checkpoint(tmp_path, 2, make_state(2), keep=2)
    damage(newest)
    with pytest.warns(UserWarning, match=r"skipping the broken checkpoint .*step_00000002\.pt"):
        step, state = load_newest_checkpoint(tmp_path)
    assert step == 1
    assert torch.equal(state["model"]["weight"], torch.ones(10))


def test_run_does_not_start_anew_when_all_checkpoints_are_broken(tmp_path):
    cut_in_half(save_checkpoint(tmp_path, 1, make_state(1), keep=1))
    with pytest.warns(UserWarning, match="broken"), pytest.raises(ValueError, match=r"no checkpoint in .* can be read"):
        load_newest_checkpoint(tmp_path)


class Malicious:
    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_foreign_checkpoint_runs_no_code(tmp_path):
    malicious = Malicious()
    malicious.target = tmp_path / "harm"
    torch.save({"step": 2, "state": malicious}, tmp_path / "step_00000002.pt")
    with pytest.warns(UserWarning, match="broken"), pytest.raises(ValueError, match="can be read"):
        load_newest_checkpoint(tmp_path)
    assert not malicious.target.exists()


def test_full_disk_leaves_the_older_checkpoint_and_says_what_to_do(tmp_path, full_disk):
    save_checkpoint(tmp_path, 1, make_state(1), keep=1)
    with pytest.raises(
        OSError, match=r"step_00000002\.pt cannot be written: File too large\. .* make room \(\d+ MB free there\)"
    ) as e:
        save_checkpoint(tmp_path, 2, make_state(2, size=100_000), keep=1)
    assert "make room" in str(e.value)
    assert list_names(tmp_path) == ["step_00000001.pt"]
    assert load_newest_checkpoint(tmp_path)[0] == 1


def test_full_disk_leaves_the_older_weights(tmp_path, full_disk):
    path = tmp_path / "best.safetensors"
    save_weights(path, {"a": torch.zeros(3)}, {})
    with pytest.raises(OSError, match=r"best\.safetensors cannot be written"):
        save_weights(path, {"a": torch.zeros(100_000)}, {})
    assert list_names(tmp_path) == ["best.safetensors"]
    assert torch.equal(load_weights(path)[0]["a"], torch.zeros(3))


def test_a_mistake_while_writing_is_reported_as_itself(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError, match=r"^mine$"), whole_file(tmp_path / "a") as file:
        file.write(b"new")
        raise RuntimeError("mine")
    assert (tmp_path / "a").read_text() == "old"
    assert list_names(tmp_path) == ["a"]


def test_killing_the_writer_twenty_times_always_leaves_a_checkpoint_that_loads(tmp_path):
    command = [sys.executable, "-c", KILLING, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "no kill met a save under way: the test has shown nothing"
    (remaining,) = list_names(tmp_path)
    assert remaining.startswith("step_")


def test_weights_come_back_with_their_header(tmp_path):
    shared = torch.randn(4)
    tensors = {
        "strided": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "one": shared,
        "same memory": shared,
        "half": torch.randn(3).to(torch.bfloat16),
        "count": torch.tensor(7),
        "trained": torch.nn.Parameter(torch.randn(2)),
    }
    header = {"step": 12, "size": (64, 32), "scores": {"ä": 0.5, "none": float("nan")}}
    save_weights(tmp_path / "best.safetensors", tensors, header)

    loaded, loaded_header = load_weights(tmp_path / "best.safetensors")

    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert loaded_header == {
        "format": WEIGHTS_FORMAT,
        "step": 12,
        "size": [64, 32],
        "scores": {"ä": 0.5, "none": None},
    }


def test_foreign_and_broken_weights_files_are_refused_with_the_way_out(tmp_path):
    path = tmp_path / "best.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no such weights file"):
        load_weights(path)
    safetensors.torch.save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="was not written by this project"):
        load_weights(path)
    save_weights(path, {"a": torch.zeros(300)}, {})
    cut_in_half(path)
    with pytest.raises(ValueError, match=r"is broken or no safetensors file .*copy it again"):
        load_weights(path)
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match="is a file of PyTorch, such as a checkpoint"):
        load_weights(path)
    header = json.dumps({"format": WEIGHTS_FORMAT + 1})
    safetensors.torch.save_file({"a": torch.zeros(3)}, path, metadata={"header": header})
    with pytest.raises(ValueError, match=f"has format {WEIGHTS_FORMAT + 1}.*update the program"):
        load_weights(path)


def test_json_knows_no_nan(tmp_path):
    content = {"a": float("nan"), "b": [float("inf"), 1, True, None, "x"], 3: np.float32(0.5), "t": torch.tensor(2)}
    write_json(tmp_path / "scores.json", content)
    text = (tmp_path / "scores.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": None, "b": [None, 1, True, None, "x"], "3": 0.5, "t": 2}
    assert "NaN" not in text


def find_unsafe_reading(source):
    """Return what in a Python source could run code from a file: unsafe torch.load, modules that pickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in PICKLING_MODULES]
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in PICKLING_MODULES:
                found.append(node.module)
            if node.module == "torch" and any(name.name == "load" for name in node.names):
                found.append("from torch import load")
        elif isinstance(node, ast.Call):
            given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            if ast.unparse(node.func) == "torch.load" and given.get("weights_only") is not True:
                found.append(ast.unparse(node))
            if given.get("allow_pickle") is True:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('a')",
        "torch.load('a', weights_only=False)",
        "torch.load('a', weights_only=chosen)",
        "from torch import load",
        "import pickle",
        "from pickle import loads",
        "import numpy as np\nnp.load('a', allow_pickle=True)",
    ],
)
def test_unsafe_reading_is_found(source):
    assert find_unsafe_reading(source)


def test_nothing_in_the_repository_reads_unsafely():
    skipped = {"Datasets", "runs", "build", "dist"}
    paths = [
        path
        for path in ROOT.rglob("*.py")
        if not any(part in skipped or part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]
    assert Path(__file__) in paths
    found = {str(path.relative_to(ROOT)): find_unsafe_reading(path.read_text(encoding="utf-8")) for path in paths}
    # these are messages to its own workers and from them, no files
    assert found.pop("preprocessing/_cluster.py") == ["pickle", "pickle"]
    assert {name: unsafe for name, unsafe in found.items() if unsafe} == {}
