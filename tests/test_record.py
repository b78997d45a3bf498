"""What a run was trained on is a fact: however the data change, no trained frame is a test frame."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from derived_root import SCENES, write_identity, write_root
from tiny_run import are_same_weights, read_log, run_train, stop_at_check, write_config

import evaluate
import visualize
from a2d2.frames import Frame, list_frames
from a2d2.images import encode_jpeg, encode_png, read_json, write_bytes, write_json
from tasks import TASKS
from training.checkpoint import load_weights, save_weights
from training.record import Record
from training.sampling import write_assignment

NEW_SCENES = tuple(f"201801{day:02d}_000000" for day in range(4, 10))


@pytest.fixture
def root(tmp_path):
    write_root(tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def config(root, tmp_path):
    return write_config(tmp_path / "tiny.yaml", root)


def add_frame(root, scene, identity, steering=None):
    frame = Frame(scene, "front_center", identity, root)
    write_bytes(frame.path("image"), encode_jpeg(np.full((64, 64, 3), 90, np.uint8)))
    write_bytes(frame.path("depth"), encode_png(np.full((64, 64), 20 * 256, np.uint16)))
    if steering is not None:
        add_steering(frame, steering)
    return frame


def add_steering(frame, angle):
    samples = {"angles_deg": [angle], "timestamps_us": [1000]}
    write_json(frame.path("steering"), {"angle_deg": angle, "speed_kmh": 30.0, **samples})


def train_whole(config, folder, *options):
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, folder, *options) == 0
    return folder


def train_until_stopped(config, folder, *options, number=3):
    with pytest.MonkeyPatch.context() as patch:
        stop_at_check(patch, number)
        assert run_train(patch, config, folder, *options) == 75


def score(capsys, *arguments):
    """The exit code, the JSON results, and what was printed to stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["evaluate.py", *map(str, arguments), "--format", "json", "--workers", "0"])
        capsys.readouterr()
        code = evaluate.main()
    out, err = capsys.readouterr()
    return code, json.loads(out)["runs"] if out.strip() else {}, err


def read_record(folder):
    return Record.from_json((folder / "record.json").read_text())


def list_scored(results, run):
    return {name for row in results[run].values() for name in row["scored_frames"]}


def grow(root):
    for day, scene in enumerate(NEW_SCENES):
        add_frame(root, scene, "000000001", steering=40.0 * day)
    add_frame(root, SCENES[0], "000000007", steering=-90.0)
    add_frame(root, SCENES[2], "000000008", steering=-90.0)


def test_the_record_says_what_a_run_was_trained_on_and_survives_its_text(config, tmp_path):
    record = read_record(train_whole(config, tmp_path / "run"))
    assert [len(record.subsets[subset]) for subset in ("train", "val", "test")] == [2, 2, 2]
    assert set(record.labels) == {"segmentation", "depth", "detection", "steering"}
    assert Record.from_json(record.to_json()) == record
    _, header = load_weights(tmp_path / "run" / "best.safetensors")
    assert Record.from_dict(header["record"]).subsets == record.subsets


@pytest.mark.parametrize("subset", ["val", "test"])
def test_no_growth_of_the_data_makes_a_trained_frame_a_test_frame(config, root, tmp_path, capsys, subset):
    run = train_whole(config, tmp_path / "run")
    record = read_record(run)
    before = score(capsys, run, "--split", subset)[1]
    grow(root)
    code, results, err = score(capsys, run, "--split", subset)
    assert code == 0 and list_scored(results, "run") <= set(record.subsets[subset])
    assert results == before
    assert "8 frames in" in err and "in no subset of run: left out" in err


def test_scenes_that_are_removed_or_moved_do_not_move_frames_between_subsets(config, root, tmp_path, capsys):
    run = train_whole(config, tmp_path / "run")
    record = read_record(run)
    trained_scene = record.subsets["train"][0].split("/")[0]
    shutil.rmtree(root / trained_scene)
    root.rename(tmp_path / "elsewhere")
    code, results, _ = score(capsys, run, "--split", "test", "--data", tmp_path / "elsewhere")
    assert code == 0 and list_scored(results, "run") <= set(record.subsets["test"])
    shutil.rmtree(tmp_path / "elsewhere" / record.subsets["test"][0].split("/")[0])
    code, results, err = score(capsys, run, "--split", "test", "--data", tmp_path / "elsewhere")
    assert code == 1 and not results and "no test frames of run" in err


def test_all_frames_may_be_scored_and_the_trained_ones_are_counted(config, root, tmp_path, capsys):
    run = train_whole(config, tmp_path / "run")
    grow(root)
    code, results, err = score(capsys, run, "--split", "all")
    assert code == 0 and len(list_scored(results, "run")) == 5 + 8  # one frame has no label
    assert "run was trained on 2 of these frames" in err


@pytest.mark.parametrize("number", [1, 3, 4])
def test_a_resume_after_the_data_grew_is_the_run_that_was_never_stopped(config, root, tmp_path, number, capsys):
    whole = train_whole(config, tmp_path / "whole")
    train_until_stopped(config, tmp_path / "run", number=number)
    grow(root)
    # a label for a frame of each subset that had none
    for names in read_record(whole).subsets.values():
        for name in names:
            frame = Frame(*name.split("/"), root)
            if not frame.path("steering").exists():
                add_steering(frame, 77.0)
    capsys.readouterr()
    train_whole(config, tmp_path / "run", "--resume")
    said = capsys.readouterr().out
    assert "8 frames are new since this run started" in said and "labels of steering are new" in said
    assert are_same_weights(tmp_path / "run", whole)
    assert read_log(tmp_path / "run") == read_log(whole)
    assert json.loads((tmp_path / "run/best.json").read_text()) == json.loads((whole / "best.json").read_text())


def test_a_resume_without_a_frame_or_label_it_needs_is_refused(config, root, tmp_path, capsys):
    train_until_stopped(config, tmp_path / "run")
    record = read_record(tmp_path / "run")
    name = next(each for each in record.subsets["train"] if each in record.labels["depth"])
    frame = Frame(*name.split("/"), root)
    kept = frame.path("depth").read_bytes()
    frame.path("depth").unlink()
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / "run", "--resume") == 1
    assert f"labels of depth that this run uses are not in {root} any more, such as that of {name}" in (
        capsys.readouterr().err
    )
    frame.path("depth").write_bytes(kept)
    frame.path("image").unlink()
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / "run", "--resume") == 1
    assert f"1 train frames of this run are not in {root} any more, such as {name}" in capsys.readouterr().err


def test_labels_made_with_other_options_are_other_labels(config, root, tmp_path, capsys):
    train_until_stopped(config, tmp_path / "run")
    content = json.loads((root / "dataset.json").read_text())
    write_identity(root, kinds=content["kinds"] | {"steering": {"limit_ms": 5.0}})
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / "run", "--resume") == 1
    assert "the options of a kind of label are not those" in capsys.readouterr().err


def test_a_moved_dataset_and_other_free_keys_do_not_stop_a_resume(config, root, tmp_path):
    whole = train_whole(config, tmp_path / "whole")
    train_until_stopped(config, tmp_path / "run")
    root.rename(tmp_path / "moved")
    free = [f"data.roots=[{tmp_path / 'moved'}]", "evaluate.micro_batch=1", "train.save_every=1", "data.workers=1"]
    train_whole(config, tmp_path / "run", "--resume", *free)
    ours, theirs = (load_weights(folder / "best.safetensors")[0] for folder in (tmp_path / "run", whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # another number of frames at a time rounds in another way
    for mine, other in zip(read_log(tmp_path / "run"), read_log(whole), strict=True):
        assert mine.pop("kind") == other.pop("kind")
        for name in [name for name in mine if name.endswith("skill")]:  # of two alike scores little may remain
            assert mine.pop(name) == pytest.approx(other.pop(name), rel=1e-5, abs=1e-7)
        assert mine == pytest.approx(other, rel=1e-5)


def test_more_steps_are_another_run_and_the_message_says_how(config, tmp_path, capsys):
    run = train_whole(config, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, run, "--resume", "train.steps=6") == 1
    said = capsys.readouterr().err
    assert "train.steps was 4, now 6. The learning rate follows a schedule" in said
    assert f"train.init={run}" in said


def test_a_run_that_starts_from_another_never_scores_what_that_was_trained_on(config, root, tmp_path, capsys):
    first = train_whole(config, tmp_path / "first")
    trained = set(read_record(first).subsets["train"])
    options = [f"train.init={first}", "data.split_seed=1", "tasks.detection=null", "seed=5"]
    capsys.readouterr()
    second = train_whole(config, tmp_path / "second", *options)
    record = read_record(second)
    assert set(record.inherited) == trained and set(record.subsets["train"]) != trained
    assert not trained & ({*record.subsets["val"], *record.subsets["test"]})
    assert "frames are left out: the run this one starts from was trained on them" in capsys.readouterr().out
    before, after = (load_weights(folder / "best.safetensors")[0] for folder in (first, second))
    alone = train_whole(config, tmp_path / "alone", *options[1:])
    differences = [
        sum(float((each[name] - before[name]).abs().sum()) for name in each if name.startswith("encoder."))
        for each in (after, load_weights(alone / "best.safetensors")[0])
    ]
    assert differences[0] < 0.2 * differences[1]
    # the weights of a run as those of an encoder, by the same rule
    third = train_whole(
        config, tmp_path / "third", f"model.encoder.weights={first / 'best.safetensors'}", "data.split_seed=1"
    )
    assert set(read_record(third).inherited) == trained


def test_runs_with_other_subsets_are_scored_on_frames_that_none_was_trained_on(config, root, tmp_path, capsys):
    grow(root)
    runs = [train_whole(config, tmp_path / f"run{seed}", f"data.split_seed={seed}") for seed in (0, 1)]
    records = [read_record(run) for run in runs]
    common = set(records[0].subsets["test"]) & set(records[1].subsets["test"])
    code, results, err = score(capsys, *runs, "--split", "test")
    if not common:
        assert code == 1 and "no test frames of run0, run1" in err
        return
    assert code == 0 and "are not test frames of all runs: left out" in err
    for run in ("run0", "run1"):
        assert list_scored(results, run) <= common
    for task in results["run0"]:
        assert results["run0"][task]["scored_frames"] == results["run1"][task]["scored_frames"]


def test_a_picture_says_of_each_run_whether_it_was_trained_on_this_frame(config, root, tmp_path, monkeypatch):
    runs = [train_whole(config, tmp_path / f"run{seed}", f"data.split_seed={seed}") for seed in (0, 1)]
    panels, draw = [], visualize.draw_panel
    monkeypatch.setattr(visualize, "draw_panel", lambda panel, *given, **named: panels.append(panel) or draw(panel))
    names = sorted({name for run in runs for each in read_record(run).subsets.values() for name in each})
    for name in names:
        panels.clear()
        monkeypatch.setattr(
            "sys.argv", ["visualize.py", *map(str, runs), "--frames", name, "--output", str(tmp_path / "panels")]
        )
        assert visualize.main() == 0
        (panel,) = panels
        notes = {model.name: model.note for model in panel.models}
        for run in runs:
            assert ("trained on this frame" in notes[run.name]) == (name in read_record(run).subsets["train"])


def test_weights_without_a_record_are_refused_or_marked(config, tmp_path, capsys):
    run = train_whole(config, tmp_path / "run")
    tensors, header = load_weights(run / "best.safetensors")
    del header["record"]
    save_weights(tmp_path / "old.safetensors", tensors, {k: v for k, v in header.items() if k != "format"})
    code, _, err = score(capsys, tmp_path / "old.safetensors", "--split", "test")
    assert code == 2 and "--trained-frames unknown" in err
    code, results, _ = score(capsys, tmp_path / "old.safetensors", "--split", "test", "--trained-frames", "unknown")
    assert code == 0 and all(row["trained_frames"] == "unknown" for row in results["old"].values())
    table = evaluate.format_table(results)
    assert "old*" in table and "* old: it is unknown whether it was trained on these frames" in table


def test_statistics_are_of_the_labels_that_are_trained_on(config, root, tmp_path):
    """Under the symmetric regime a frame that lacks a label is not trained on, so its other labels do not count."""
    options = ["data.labels=symmetric", "data.split=all"]
    before = read_record(train_whole(config, tmp_path / "before", *options)).label_statistics
    add_frame(root, NEW_SCENES[0], "000000001", steering=85.0)
    after = read_record(train_whole(config, tmp_path / "after", *options)).label_statistics
    assert after == before
    as_is = read_record(train_whole(config, tmp_path / "as_is", "data.split=all")).label_statistics
    assert as_is["steering"] != before["steering"]


def test_a_changed_assignment_is_noticed(config, tmp_path, capsys):
    """Edited; or missing, and the labels are assigned in another way now."""
    run = tmp_path / "run"
    train_until_stopped(config, run)
    kept = (run / "assignment.json").read_text()
    (run / "assignment.json").write_text(write_assignment(["a/b/c"], {"depth": []}))
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, run, "--resume") == 1
    assert "assigned to tasks in another way now" in capsys.readouterr().err
    (run / "assignment.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.assign_labels", lambda has, *_: {name: [0] for name in has})
        assert run_train(patch, config, run, "--resume") == 1
    assert "assigned to tasks in another way now" in capsys.readouterr().err
    (run / "assignment.json").write_text(kept)
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, run, "--resume") == 0


def test_a_run_goes_on_with_its_assignment_whatever_became_of_the_file_it_came_from(config, tmp_path, capsys):
    given = tmp_path / "given.json"
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / "first") == 0
    first = (tmp_path / "first/assignment.json").read_text()
    given.write_text(first)
    options = [f"data.labels={{file: {given}}}", "data.labels_seed=5"]
    train_until_stopped(config, tmp_path / "run", *options)
    given.unlink()
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / "run", "--resume", *options) == 0
        assert run_train(patch, config, tmp_path / "other", *options) == 1
    assert f"the file {given} cannot be read" in capsys.readouterr().err
    assert (tmp_path / "run/assignment.json").read_text() == first
    weights = [load_weights(tmp_path / name / "best.safetensors")[0] for name in ("first", "run")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def prepare_counting(config, *options):
    """The label statistics of a new start, and how many label files it opened."""
    import train
    from tasks.options import OPTIONS
    from training.config import load_config

    opened = []
    with pytest.MonkeyPatch.context() as patch:
        for task in TASKS.values():
            load = task.load
            patch.setattr(task, "load", lambda self, frame, load=load: (opened.append(frame), load(self, frame))[1])
        setup = train.prepare(load_config(config, list(options), OPTIONS))
    return dict(setup.record.label_statistics), len(opened)


def test_label_statistics_are_computed_once_for_the_same_labels_and_anew_for_others(config, root):
    first, opened = prepare_counting(config, "data.split=all")
    again, none = prepare_counting(config, "data.split=all")
    assert opened > 0 and none == 0 and again == first
    # another option, another regime, another protocol: other statistics, and those of the other tasks are kept
    other, opened = prepare_counting(config, "data.split=all", "tasks.segmentation.class_balance=0.5")
    assert opened == 4 and other["segmentation"] != first["segmentation"] and other["depth"] == first["depth"]
    assert prepare_counting(config, "data.split=all", "data.labels=symmetric")[1] > 0
    near, _ = prepare_counting(config, "data.split=all", "evaluate.protocol.depth.cap=20")
    assert near["depth"] != first["depth"]
    # a label written anew, and one changed in place
    frame = next(frame for frame in list_frames(root, "steering"))
    frame.path("steering").unlink()
    add_steering(frame, 85.0)
    changed, opened = prepare_counting(config, "data.split=all")
    assert opened > 0 and changed["steering"] != first["steering"] and changed["depth"] == first["depth"]
    text = frame.path("steering").read_text()
    with frame.path("steering").open("w") as file:
        file.write(text.replace("85.0", "-85.0"))
    assert prepare_counting(config, "data.split=all")[0]["steering"] != changed["steering"]


def test_boxes_beyond_the_limit_are_told_at_every_start(config, root):
    for frame in list_frames(root, "boxes"):
        label = read_json(frame.path("boxes"))
        write_json(frame.path("boxes"), label | {"boxes": label["boxes"][:1] * 5})
    for limit, told in ((4, True), (4, True), (5, False)):  # the second time from kept statistics
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prepare_counting(config, "data.split=all", f"tasks.detection.max_boxes={limit}")
        messages = [str(each.message) for each in caught]
        assert any("more than 4 boxes, up to 5" in message for message in messages) == told, messages


def test_a_root_that_cannot_be_written_to_is_no_obstacle(config, root):
    (root / "reports").write_text("a file where a folder would be")
    assert prepare_counting(config, "data.split=all")[1] > 0
