"""One table, one ruler: what scores is the protocol's, the same for every run, and results come as they are made."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from derived_root import write_root
from tiny_run import make_run

import evaluate
from tasks import TASKS
from tasks.options import OPTIONS
from training.checkpoint import load_weights, save_weights

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("set")


@pytest.fixture(scope="module")
def run(folder):
    write_root(folder / "root")
    return make_run(folder)


def vary(run, name, change):
    """The same weights under another name, with a changed header."""
    tensors, header = load_weights(run / "best.safetensors")
    del header["format"]
    change(header)
    path = run.parent / f"{name}.safetensors"
    save_weights(path, tensors, header)
    return path


def score(capsys, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["evaluate.py", *map(str, arguments), "--workers", "0"])
        capsys.readouterr()
        code = evaluate.main()
    return code, *capsys.readouterr()


def test_the_options_of_every_task_are_those_of_the_table(run):
    assert {name: task.Options for name, task in TASKS.items()} == OPTIONS


def test_limits_of_training_do_not_touch_what_is_scored(run, capsys):
    def limit(header):
        header["tasks"]["depth"]["cap"] = 20.0
        header["tasks"]["detection"] |= {"min_size": 40.0, "min_visible": 0.95, "max_boxes": 1}

    limited = vary(run, "limited", limit)
    code, out, _ = score(capsys, run, limited, "--split", "all", "--format", "json")
    results = json.loads(out)["runs"]
    assert code == 0 and set(results) == {"run", "limited"}
    files = {row.pop("weights") for rows in results.values() for row in rows.values()}
    assert len(files) == 2 and results["run"] == results["limited"]


def test_the_protocol_is_printed_recorded_and_chosen_by_flags(run, capsys):
    code, out, _ = score(capsys, run, "--split", "all")
    assert code == 0 and "protocol: 64x64; segmentation classes=paper; depth cap=80.0; detection classes=merged" in out
    assert "all: 6 frames of" in out and "run of step" in out
    _, out, _ = score(capsys, run, "--split", "all", "--format", "json")
    far = json.loads(out)["runs"]["run"]
    assert far["depth"]["protocol"] == {"cap": 80.0, "size": [64, 64]}
    code, out, _ = score(
        capsys, run, "--split", "all", "--cap", "20", "--min-size", "17", "--size", "32x32", "--format", "json"
    )
    near = json.loads(out)["runs"]["run"]
    assert code == 0 and near["depth"]["protocol"] == {"cap": 20.0, "size": [32, 32]}
    assert near["depth"]["score"] != far["depth"]["score"] and "abs_rel/40-80m" not in near["depth"]["metrics"]
    assert near["detection"]["protocol"]["min_size"] == 17.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cap", "far"], "--cap far"),
        (["--cap", "-3"], "--cap -3"),
        (["--size", "32"], "--size 32: must be WIDTHxHEIGHT"),
        (["--min-visible", "2"], "--min-visible 2"),
        (["--detection-classes", "cars"], "--detection-classes cars"),
    ],
)
def test_a_wrong_value_of_the_protocol_is_one_line(run, capsys, flags, message):
    code, _, err = score(capsys, run, *flags)
    assert code == 2 and message in err and "Traceback" not in err and len(err.splitlines()) == 1


def test_runs_that_were_validated_differently_need_a_choice(run, capsys):
    other = vary(run, "other", lambda header: header["protocol"]["depth"].update(cap=30.0))
    code, _, err = score(capsys, run, other, "--split", "all")
    assert code == 2 and "depth.cap: 80.0 of run, 30.0 of other; choose with --cap" in err
    code, out, _ = score(capsys, run, other, "--split", "all", "--cap", "50")
    assert code == 0 and "other constant baselines" not in out
    # as after a training on other labels
    other = vary(run, "other", lambda header: header["fitted"]["depth"].update(constant=30.0))
    assert "depth: the runs have other constant baselines" in score(capsys, run, other, "--split", "all")[1]


def test_a_run_with_other_classes_is_marked_and_left_out(run, capsys):
    one = vary(run, "one", lambda header: header.update(tasks={"depth": {}, "steering": {}}))
    tensors, header = load_weights(run / "best.safetensors")
    header["tasks"]["detection"]["classes"] = {group: ["Car"] for group in ["vehicle"]}
    del header["format"]
    tensors = {name: each for name, each in tensors.items() if not name.startswith("heads.detection.")}
    from experiment import build_network, build_tasks
    from training.config import Model

    tasks = build_tasks({name: OPTIONS[name](**given) for name, given in header["tasks"].items()}, header["fitted"])
    net = build_network(Model(**header["model"]), tasks, (64, 64), load_pretrained=False)
    net.load_state_dict(tensors, strict=False)
    save_weights(run.parent / "cars.safetensors", net.state_dict(), header)
    code, out, err = score(capsys, run, run.parent / "cars.safetensors", one, "--split", "all")
    assert code == 1 and "one.safetensors does not fit" in err  # its file has more heads than tasks
    assert "cars, detection: not scored, because its classes are" in out
    (row,) = [line for line in out.splitlines() if line.startswith("cars") and "detection" in line.split()]
    assert row.split()[-4:] == ["-", "-", "-", "0"]
    assert "mean skills are over different tasks" in out


def test_results_come_as_they_are_made_whatever_fails_later(run, folder, capsys):
    out_file = folder / "scores.json"
    code, out, err = score(capsys, run, folder / "nothing", "--split", "all", "--output", out_file)
    assert code == 1 and "mean skill of" in out and "no run folder or weights file" in err
    assert set(json.loads(out_file.read_text())["runs"]) == {"run"}
    again = vary(run, "again", lambda header: None)
    with pytest.MonkeyPatch.context() as patch:
        calls, whole = [], evaluate.evaluate_source

        def fail_later(*given, **named):
            calls.append(1)
            if len(calls) == 2:
                raise ValueError("the picture is damaged")
            return whole(*given, **named)

        patch.setattr(evaluate, "evaluate_source", fail_later)
        code, out, err = score(capsys, run, again, "--split", "all")
    assert code == 1 and "evaluate: again: the picture is damaged" in err
    assert "mean skill of" in out and "again" not in out.splitlines()[1]


def test_an_output_that_cannot_be_is_said_before_anything_is_scored(run, folder, capsys):
    code, out, err = score(capsys, run, "--split", "all", "--output", folder)
    assert code == 2 and not out and "is a folder; name a file in it" in err and "make room" not in err
    code, out, err = score(capsys, run, "--split", "all", "--output", folder / "tiny.yaml" / "scores.json")
    assert code == 2 and not out and "is no folder" in err


def test_an_output_that_cannot_be_written_costs_no_result(run, folder, capsys):
    def refuse(path, content):
        raise OSError(f"{path} cannot be written: Permission denied")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "write_json", refuse)
        code, out, err = score(capsys, run, "--split", "all", "--output", folder / "scores.json")
    assert code == 1 and "mean skill of" in out and "Permission denied" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "-33"], "--limit: must be a whole number of 1 or more, not -33"),
        (["--limit", "0"], "--limit: must be"),
        (["--micro-batch", "0"], "--micro-batch: must be"),
        (["--workers", "-1"], "--workers: must be a whole number of 0 or more"),
    ],
)
def test_a_number_that_makes_no_sense_is_wrong_use(run, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        score(capsys, run, *flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_dataset_that_is_missing_is_named_with_the_flag_of_the_program(run, folder, capsys):
    code, _, err = score(capsys, run, "--data", folder / "nowhere")
    assert code == 1 and "give another folder in --data" in err and "data.roots" not in err


WATCHED = """
import atexit, runpy, sys
atexit.register(lambda: print("torch" in sys.modules, file=sys.stderr))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_watched(*command):
    """The result of a script, and whether it has loaded PyTorch at its end."""
    result = subprocess.run([sys.executable, "-c", WATCHED, *command], cwd=ROOT, capture_output=True, text=True)
    return result, result.stderr.splitlines()[-1] == "True"


@pytest.mark.parametrize("script", ["train", "evaluate", "visualize"])
def test_help_does_not_load_the_slow_libraries(script):
    result, loaded = run_watched(f"{script}.py", "--help")
    assert result.returncode == 0 and "usage:" in result.stdout and not loaded


def test_a_mistake_in_the_config_does_not_load_them_either():
    result, loaded = run_watched("train.py", "--config", "configs/demo.yaml", "train.stebs=3")
    assert result.returncode == 2 and "did you mean 'steps'" in result.stderr and not loaded
