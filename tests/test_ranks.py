"""Two ranks are one process: the same weights in float64 whatever each rank sees, the same scores, one set of files,
and one end for all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from derived_root import write_root
from tiny_run import CONFIG, read_log, run_train, write_config

import train
from tasks.options import OPTIONS
from training.checkpoint import load_newest_checkpoint
from training.config import GRADIENT_METHODS, load_config
from training.distributed import Ranks, join_ranks
from training.parts import check_ranks

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
from exactness import BAR, find_port  # noqa: E402
from exactness import compare as find_difference  # noqa: E402

STEPS = 20
# these, the other methods on losses, and more situations are in benchmarks/exactness.py
EXTRAS = ("cagrad", "upgrad", "dualproj", "fairgrad", "nashmtl")
CASES = {
    "every label": ["data.labels=as_is"],
    "symmetric": ["data.labels=symmetric", "train.cycle=2"],
    "one task a frame": ["data.labels=one_task"],
    "a budget": ["data.labels={budget: {segmentation: 0.5}}", "tasks.detection.oversample_below=0.9"],
    # of two tasks the ranks never see the same
    "unlike tasks": ["data.labels=one_at_a_time", "tasks.steering=null", "tasks.depth=null"],
    "late and early": ["tasks.depth.train={from_step: 7}", "tasks.detection.train={until_step: 12}"],
    "measured": ["balancing.measure_every=5"],
    "mean teacher": [
        "data.labels=one_task", "train.mean_teacher={ramp_steps: 5, from_step: 3, true_labels_only_from: 15}",
        "balancing.method=imtlg", "tasks.segmentation.pseudo.threshold=0.0", "tasks.depth.pseudo.threshold=1000",
        "data.augment={cutouts: 2, blur: 0.5, color: 0.3}",
    ],
    "validated": ["data.split=by_scene", "evaluate.micro_batch=1", "train.evaluate_every=10"],
} | {
    method: [f"balancing.method={method}", "data.labels=one_task", "balancing.normalise=running"]
    for method in ("famo", *GRADIENT_METHODS)
    if method not in EXTRAS
}  # fmt: skip
VALIDATED = ["data.split=by_scene", "evaluate.micro_batch=1", "train.evaluate_every=2"]
FAST = [
    "data.split=all",
    "train.precision=fp64",
    f"train.steps={STEPS}",
    "train.evaluate_every=20",
    "train.save_every=20",
    "model.encoder={name: test_resnet, pretrained: false, norm: group}",
    "tasks.detection.head={reads: [neck.8, neck.32], width: 32, layers: 1}",
]


def start_ranks(world, *command):
    port, processes = str(find_port()), []
    for rank in range(world):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=os.environ | variables, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    return processes


def finish(processes, timeout=300):
    """[(exit code, stdout, stderr)] of all; none may be left behind."""
    try:
        printed = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, printed, strict=True)]


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    """Case -> the folders of its run on one rank and on two; "small": the files of run_small."""
    folder = tmp_path_factory.mktemp("runs")
    started = []
    for world in (1, 2):
        cases = [[str(folder / f"{name} {world}"), [*FAST, *options]] for name, options in CASES.items()]
        content = {"config": str(config), "cases": cases, "small": str(folder / f"small {world}.pt")}
        (folder / f"{world}.json").write_text(json.dumps(content))
        started += start_ranks(world, "tests/rank_runs.py", folder / f"{world}.json")
    for code, out, err in finish(started, 900):
        assert code == 0, (out, err[-3000:])
    named = {name: (folder / f"{name} 1", folder / f"{name} 2") for name in CASES}
    return named | {"small": (folder / "small 1.pt", folder / "small 2.pt")}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_take_the_path_of_one(runs, case):
    one, two = runs[case]
    assert find_difference(one, two) <= BAR
    ours, theirs = read_log(one), read_log(two)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert {key: pytest.approx(value, rel=1e-7, abs=1e-9) for key, value in a.items() if key != "kind"} == {
            key: value for key, value in b.items() if key != "kind"
        }


def test_a_rank_without_any_label_makes_the_update_of_all(runs):
    one, two = (torch.load(path, weights_only=True) for path in runs["small"])
    assert not torch.equal(one["sum"]["encoder.layers.0.weight"], one["mgda"]["encoder.layers.0.weight"])
    for method, state in one.items():
        for name, tensor in state.items():
            assert float((two[method][name] - tensor).norm() / tensor.norm()) <= BAR, (method, name)


def test_the_cases_are_different_runs(runs):
    """Else the test above could pass on options that do nothing."""
    plain = load_net(runs["every label"][0])
    for name in CASES:
        net = load_net(runs[name][0])
        same = net.keys() == plain.keys() and all(torch.allclose(net[key], plain[key], atol=1e-6) for key in net)
        assert same == (name in ("every label", "measured", "sum")), name


def load_net(folder):
    return load_newest_checkpoint(folder / "checkpoints")[1]["net"]


def test_files_and_scores_are_those_of_one_process(runs):
    one, two = runs["validated"]
    assert sorted(path.name for path in one.rglob("*")) == sorted(path.name for path in two.rglob("*"))
    assert (one / "assignment.json").read_text() == (two / "assignment.json").read_text()
    assert (one / "record.json").read_text() == (two / "record.json").read_text()
    scores, again = (json.loads((folder / "best.json").read_text())["scores"] for folder in (one, two))
    for name, score in scores.items():
        assert score["frames"] == again[name]["frames"] > 0
        for key, value in score["metrics"].items():
            assert again[name]["metrics"][key] == (None if value is None else pytest.approx(value, rel=1e-9)), (
                name,
                key,
            )


def start_training(config, folder, *options, world=2):
    return start_ranks(world, "train.py", "--config", config, "--run", folder, "--resume", *FAST, *options)


def wait_for(path, processes):
    for _ in range(1200):
        if path.exists() or any(process.poll() is not None for process in processes):
            return
        time.sleep(0.05)


def test_a_signal_leaves_one_whole_checkpoint_and_other_ranks_go_on_from_it(config, runs, tmp_path):
    """Two ranks, stopped, then one rank: the run that was never stopped."""
    run = tmp_path / "run"
    options = ["train.save_every=2", "train.keep_checkpoints=20"]
    processes = start_training(config, run, *options)
    wait_for(run / "checkpoints/step_00000002.pt", processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    results = finish(processes)
    assert [code for code, *_ in results] == [75, 75], results
    assert "--resume goes on from" in results[0][2]
    assert "Traceback" not in results[1][2] and "stopped" not in results[1][2]
    assert not list(run.rglob("*.tmp")) and not (run / "owner.json").exists()
    step, _ = load_newest_checkpoint(run / "checkpoints")
    assert 2 <= step < STEPS
    for code, _, err in finish(start_training(config, run, *options, world=1)):
        assert code == 0, err
    assert find_difference(runs["every label"][0], run) <= BAR


def test_what_one_rank_meets_ends_all_with_one_line(config, tmp_path):
    """A damaged label that only the second rank reads, in a step that is then not made."""
    root = tmp_path / "root"
    write_root(root)
    own = write_config(tmp_path / "own.yaml", root)
    options = ["data.labels=one_at_a_time", "tasks.steering=null", "tasks.depth=null"]
    # label statistics are computed first, and kept
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, own, tmp_path / "first", *FAST, *options, "train.steps=1") == 0
    # the second stream is detection, and so the second rank's
    (label,) = root.glob("20180102_000000/boxes/*/*000000003.json")
    size, when = label.stat().st_size, label.stat()
    label.write_text("[" + " " * (size - 1))
    os.utime(label, ns=(when.st_atime_ns, when.st_mtime_ns))
    results = finish(start_training(own, tmp_path / "run", *options))
    assert [code for code, *_ in results] == [1, 1], results
    said = [line for line in results[0][2].splitlines() if "is damaged" in line]
    assert len(said) == 1 and label.name in said[0] and "Traceback" not in results[0][2]
    assert "damaged" not in results[1][2] and "Traceback" not in results[1][2]


def test_a_loss_that_is_not_finite_on_one_rank_is_named_by_all_before_the_update(config, tmp_path):
    code = (
        "import sys, os, torch; sys.path.insert(0, '.'); sys.argv = ['train.py', *sys.argv[1:]]\n"
        "from tasks.detection import Detection\n"
        "loss, calls = Detection.loss, []\n"
        "def spoil(self, output, target):\n"
        "    calls.append(1)\n"
        "    return loss(self, output, target) * (float('nan') if len(calls) == 3 else 1)\n"
        "Detection.loss = spoil\n"
        "import train\n"
        "sys.exit(train.main())\n"
    )
    options = ["data.labels=one_at_a_time", "tasks.steering=null", "tasks.depth=null", "train.save_every=1"]
    arguments = ["--config", config, "--run", tmp_path / "run", *FAST, *options]
    results = finish(start_ranks(2, "-c", code, *arguments))
    assert [each for each, *_ in results] == [1, 1], results
    assert "step 3: the loss of detection is not finite on a micro-batch of 2018" in results[0][2]
    assert "not finite" not in results[1][2] and load_newest_checkpoint(tmp_path / "run/checkpoints")[0] == 2


SIGNALLING = """
import os, signal, sys
sys.path.insert(0, ".")
from tasks.segmentation import SegmentationMetrics
update = SegmentationMetrics.update

def signalling(self, *arguments):
    if os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)
    update(self, *arguments)

SegmentationMetrics.update = signalling
import train
sys.exit(train.main())
"""


def test_a_signal_to_one_rank_in_validation_stops_all(config, tmp_path):
    arguments = ["--config", config, "--run", tmp_path / "run", *FAST, *VALIDATED]
    results = finish(start_ranks(2, "-c", SIGNALLING, *arguments))
    assert [code for code, *_ in results] == [75, 75], results
    assert "--resume goes on from" in results[0][2] and "Traceback" not in results[0][2] + results[1][2]
    assert load_newest_checkpoint(tmp_path / "run/checkpoints")[0] == 2


def test_what_the_first_rank_cannot_write_ends_all(config, tmp_path):
    """A file where the folder of checkpoints should be: the first save fails, on the first rank alone."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("in the way")
    results = finish(start_training(config, tmp_path / "run", "train.save_every=1"))
    assert [code for code, *_ in results] == [1, 1], results
    assert "checkpoints" in results[0][2] and "Traceback" not in results[0][2] + results[1][2]
    assert "checkpoints" not in results[1][2]


def test_a_rank_that_dies_ends_the_job_and_torchrun_resumes_it(config, tmp_path, runs):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--"]
    command += ["train.py", "--config", str(config), "--run", str(run), "--resume", *FAST, "train.save_every=2"]
    with log.open("w") as output:
        job = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=output, stderr=subprocess.STDOUT
        )
        wait_for(run / "checkpoints/step_00000002.pt", [job])
        victims = [each for each in Path("/proc").glob("[0-9]*/environ") if is_second_rank(each, job.pid)]
        assert len(victims) == 1, log.read_text()
        os.kill(int(victims[0].parent.name), signal.SIGKILL)
        try:
            assert job.wait(timeout=240) == 0, log.read_text()
        finally:
            job.kill()
    assert "what the rank that ended has printed says why" in log.read_text()
    assert find_difference(runs["every label"][0], run) <= BAR


def is_second_rank(environ, parent):
    try:
        stat = (environ.parent / "stat").read_text().rpartition(")")[2].split()
        return int(stat[1]) == parent and "RANK=1" in environ.read_text().split("\0")
    except (OSError, ValueError):
        return False


def test_ranks_that_would_have_nothing_to_do_are_refused_with_the_way_out(config, tmp_path):
    results = finish(start_training(config, tmp_path / "run", "data.labels=symmetric"))
    assert [code for code, *_ in results] == [2, 2], results
    assert "2 ranks share steps of 1 micro-batches" in results[0][2] and "train.cycle to 2 or more" in results[0][2]
    assert "micro-batches" not in results[1][2] and not (tmp_path / "run").exists()


def test_what_ranks_cannot_share_is_refused(config):
    groups = {name: {"lr": 1e-3, "samples": 2} for name in ("encoder", *CONFIG["tasks"])}
    options = ["train.update=async", "train.schedule={}", f"train.groups={json.dumps(groups)}"]
    with pytest.raises(train.WrongUseError, match=r"train\.update=async is for one process"):
        train.prepare(load_config(config, options, OPTIONS), ranks=Ranks(0, 2, 0))
    setup = train.prepare(load_config(config, ["model.encoder.norm=batch"], OPTIONS), ranks=Ranks(0, 2, 0))
    net = train.build_network(setup.config.model, setup.tasks, setup.size, False)
    with pytest.raises(ValueError, match=r"encoder\.backbone\.conv1\.1 normalises by the statistics of its micro-"):
        check_ranks(net, 2)
    check_ranks(net, 1)
    frozen = load_config(config, ["model.encoder.norm=frozen"], OPTIONS)
    check_ranks(train.build_network(frozen.model, setup.tasks, setup.size, False), 2)


def test_variables_that_make_no_sense_are_one_line(monkeypatch):
    assert join_ranks("cpu", 10.0).alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK is None, and must be a number: start the ranks with torchrun"):
        join_ranks("cpu", 10.0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="MASTER_ADDR, MASTER_PORT is not set"):
        join_ranks("cpu", 10.0)


def test_one_rank_sends_nothing():
    ranks = Ranks()
    tensor = torch.ones(3)
    ranks.add_up([tensor])
    assert ranks.agree([1.0, 2.0], None) == [1.0, 2.0] and ranks.gather("x") == ["x"] and ranks.lead(lambda: 5) == 5
    assert torch.equal(tensor, torch.ones(3)) and ranks.speaks
    with pytest.raises(OSError, match="full"):
        ranks.agree([], OSError("full"))
