"""What teachers say: blended, kept as files, learned where there is no true label, and never learned where there is."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from derived_root import SIZE, write_root
from tiny_run import are_same_weights, make_run, read_log, run_train, stop_at_check, write_config
from torch.utils._pytree import tree_map

import pseudo_label
import train
from a2d2.dataset import GRAY, Augmentation, Geometry
from a2d2.frames import Frame, list_frames
from a2d2.images import encode_jpeg, read_json, write_json
from experiment import WrongUseError
from models.heads import DetectionOutput, count_cells, locate_cells
from models.thesis import CELL, BoxGridOutput
from tasks import TASKS
from tasks.box_matching import match_locations, measure_centreness
from tasks.detection import SLOTS
from tasks.options import OPTIONS, DetectionOptions
from tasks.soft_boxes import LogitCounts, blend_outputs, calibrate_probabilities, find_mirror_order, place_locations
from training.checkpoint import load_weights, save_weights
from training.config import ConfigError, load_config
from training.record import identify_pseudo
from training.run import find_recipe

HEAD = {"reads": ("neck.8", "neck.16", "neck.32"), "width": 32, "layers": 1}
STRIDES, (WIDTH, HEIGHT) = (8, 16, 32), SIZE
LOCATIONS = sum(int(np.prod(count_cells((HEIGHT, WIDTH), stride))) for stride in STRIDES)
ALL = "{one_task: [segmentation, depth, detection, steering]}"
SURE = [
    "tasks.segmentation.pseudo.threshold=0.0",
    "tasks.depth.pseudo.threshold=1000",
    "tasks.steering.pseudo.threshold=1000",
]


def make_task(name, **options):
    if name == "detection":
        options["head"] = HEAD
    statistics = {"steering": {"scale_deg": 20.0, "constant": 0.0}, "depth": {"constant": 10.0}}
    return TASKS[name](OPTIONS[name](**options), statistics.get(name))


def make_output(name, seed=0, batch=2):
    """An output of the task's head on a batch, as a tensor or as DetectionOutput."""
    torch.manual_seed(seed)
    if name == "segmentation":
        return torch.randn(batch, 19, HEIGHT, WIDTH) * 3
    if name == "depth":
        return torch.rand(batch, HEIGHT, WIDTH) + 2
    if name == "steering":
        return torch.randn(batch, 1)
    return DetectionOutput(
        torch.randn(batch, LOCATIONS, 5), torch.rand(batch, LOCATIONS, 4) * 20 + 1, torch.randn(batch, LOCATIONS),
        STRIDES, (HEIGHT, WIDTH),
    )  # fmt: skip


def mirror(name, output):
    """The output that a network without any preference for a side gives on the mirror image."""
    if name == "steering":
        return -output
    if name != "detection":
        return output.flip(-1)
    order = torch.from_numpy(find_mirror_order((HEIGHT, WIDTH), STRIDES))
    return output._replace(
        classes=output.classes[:, order], boxes=output.boxes[:, order][..., [2, 1, 0, 3]],
        centreness=output.centreness[:, order],
    )  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_a_mirror_image_that_says_the_same_changes_nothing(name):
    task, output = make_task(name), make_output(name)
    alone = task.blend([(output, False)], SIZE)
    both = task.blend([(output, False), (mirror(name, output), True)], SIZE)
    for key, value in alone.items():
        assert torch.allclose(value.double(), both[key].double(), atol=1e-5), key
    assert "spread" not in both or both["spread"].max() < 1e-3
    other = task.blend([(output, False), (output, True)], SIZE)
    assert any(not torch.allclose(value.double(), other[key].double()) for key, value in alone.items())


def test_disagreement_is_in_metres_and_degrees_and_never_relative_to_the_image():
    near, far = torch.full((1, 4, 4), 2.0).log(), torch.full((1, 4, 4), 5.0).log()
    said = make_task("depth").blend([(near, False), (far, True)], (4, 4))
    assert torch.allclose(said["spread"], torch.tensor(3.0)) and torch.allclose(
        said["metres"], torch.tensor(10.0).sqrt()
    )
    angles = make_task("steering").blend([(torch.tensor([[1.0]]), False), (torch.tensor([[0.5]]), True)], (4, 4))
    assert angles["spread"].tolist() == [30.0] and angles["angles"].tolist() == [[5.0]]


@pytest.mark.parametrize("name", TASKS)
def test_files_keep_what_was_said(name, tmp_path):
    task, output = make_task(name), make_output(name)
    said = task.blend([(output, False)], SIZE)
    frame = Frame("20180101_000000", "front_center", "000000001", tmp_path)
    for kind, content in task.encode_soft(said, 1, SIZE).items():
        frame.path(kind).parent.mkdir(parents=True, exist_ok=True)
        frame.path(kind).write_bytes(content)
    found = task.load_soft(frame, task.describe_soft_files(SIZE), SIZE)
    target = task.transform_soft(found, Geometry.identity(SIZE))
    online = task.prepare_soft(tree_map(lambda leaf: leaf[1:2], said))
    tolerance = {"metres": 1 / 256, "spread": 1 / 256, "scores": 0.011, "centreness": 0.5, "boxes": 30.0}
    for key, value in online.items():
        assert (value[0].double() - target[key].double()).abs().max() <= tolerance.get(key, 1e-4), key
    if name == "detection":  # locations that are not stored say nothing
        kept = said["scores"][1].amax(dim=1) >= 0.01
        assert torch.allclose(target["boxes"][kept], said["boxes"][1][kept])
        assert (target["scores"][~kept] == 0).all()
    again = Frame("20180101_000000", "front_center", "000000002", tmp_path)
    assert task.load_soft(again, task.describe_soft_files(SIZE), SIZE) is None


@pytest.mark.parametrize("name", ["segmentation", "depth", "steering"])
def test_a_sure_teacher_is_learned_like_a_label(name):
    """And one that is not sure enough is not learned at all."""
    task = make_task(name)
    output = make_output(name, seed=1).requires_grad_()
    label = {
        "segmentation": torch.randint(0, 19, (2, HEIGHT, WIDTH), dtype=torch.uint8),
        "depth": torch.rand(2, HEIGHT, WIDTH) * 50 + 3,
        "steering": torch.randn(2, 1) * 30,
    }[name]
    keys = {"segmentation": ("classes", "probability", 1.0, 0.0), "depth": ("metres", "spread", 0.0, 9.0),
            "steering": ("angles", "spread", 0.0, 99.0)}[name]  # fmt: skip
    shape = label.shape[:1] if name == "steering" else label.shape
    sure = {keys[0]: label, keys[1]: torch.full(shape, keys[2])}
    assert torch.allclose(task.soft_loss(output, sure), task.loss(output, label), rtol=1e-5)
    assert torch.equal(task.count_soft(sure), task.count(label).double())
    unsure = sure | {keys[1]: torch.full(shape, keys[3])}
    assert task.soft_loss(output, unsure) == 0
    assert torch.equal(task.count_soft(unsure), task.count_soft(sure))


def test_dense_soft_targets_pull_towards_what_the_teacher_said():
    """Descending the loss, the student comes to say what the teacher says where that was sure, and background else."""
    task = make_task("detection", pseudo={"learned_share": 0.1})
    teacher = make_output("detection", batch=1)
    target = task.prepare_soft(task.blend([(teacher, False)], SIZE))
    logits = torch.zeros(1, LOCATIONS, 5, requires_grad=True)
    sides = torch.full((1, LOCATIONS, 4), 3.0, requires_grad=True)
    middle = torch.zeros(1, LOCATIONS, requires_grad=True)
    optimizer = torch.optim.Adam([logits, sides, middle], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        output = DetectionOutput(logits, sides.exp(), middle, STRIDES, (HEIGHT, WIDTH))
        task.soft_loss(output, target).backward()
        optimizer.step()
    learned = target["scores"].amax(dim=2) >= target["scores"].amax(dim=2).topk(round(0.1 * LOCATIONS)).values[:, -1:]
    assert (logits.sigmoid() - target["scores"])[learned].abs().max() < 0.1
    assert logits.sigmoid()[~learned].max() < 0.25
    assert (sides.exp() / target["boxes"]).log()[learned].abs().median() < 0.1
    assert 0 < learned.sum() <= round(0.1 * LOCATIONS) + 1


def store(said):
    names = ("scores", "boxes", "centreness")
    return {"index": np.arange(LOCATIONS)} | {name: said[name][0].numpy() for name in names}


def place(said, geometry):
    return place_locations(store(said), SIZE, STRIDES, geometry, 5)


def test_locations_move_with_the_picture():
    said = blend_outputs([(make_output("detection", batch=1), False)])
    whole = Geometry.identity(SIZE)
    same = place(said, whole)
    assert all(torch.allclose(same[name], said[name][0]) for name in ("scores", "boxes", "centreness"))
    assert not same["hidden"].any()
    flipped = place(said, Geometry(SIZE, (0, 0, *SIZE), SIZE, flip=True))
    order = find_mirror_order((HEIGHT, WIDTH), STRIDES)
    assert torch.equal(flipped["scores"], said["scores"][0][order]) and not flipped["hidden"].any()
    assert torch.allclose(flipped["boxes"], said["boxes"][0][order][:, [2, 1, 0, 3]])
    hidden = place(said, Geometry(SIZE, (0, 0, *SIZE), SIZE, holes=((0.0, 0.0, 0.5, 1.0),)))["hidden"]
    assert hidden.float().mean() == pytest.approx(0.5)


def test_a_zoomed_box_is_where_the_zoomed_label_is():
    """A teacher that says one box at the location in its middle; the cells between stretched ones are no background."""
    centre = 5 * 8 + 2  # row 5, column 2 at stride 8: its middle is (20, 44)
    scores = torch.zeros(1, LOCATIONS, 5)
    scores[0, centre, 1] = 0.9
    boxes = torch.full((1, LOCATIONS, 4), 10.0)
    said = {"scores": scores, "boxes": boxes, "centreness": torch.ones(1, LOCATIONS)}
    geometry = Geometry(SIZE, (0, 16, 48, 48), SIZE)
    target = place(said, geometry)
    (row,) = target["scores"].amax(dim=1).nonzero()[:, 0].tolist()
    x, y = (row % 8 + 0.5) * 8, (row // 8 + 0.5) * 8
    left, top, right, bottom = target["boxes"][row].tolist()
    expected = geometry.map_boxes(np.array([[10.0, 34.0, 30.0, 54.0]]))[0]
    assert [x - left, y - top, x + right, y + bottom] == pytest.approx(expected.tolist(), abs=1e-4)
    assert target["hidden"].any() and not target["hidden"][row]


def test_what_a_zoom_leaves_of_soft_targets_is_what_true_labels_teach():
    """A teacher that says the true boxes at their own locations: wherever it is heard under a zoom, a true label would
    be matched with the same box, cut at the edges, of the same level, and with the same centre-ness."""
    rng, size, strides, heard = np.random.default_rng(0), (256, 192), (8, 16, 32), 0
    cells = locate_cells(size[::-1], strides).numpy()
    for zoom in (1.0, 1.3, 2.0):
        for _ in range(8):
            corners = rng.uniform(0, [200, 150], (6, 2))
            boxes = np.concatenate([corners, np.minimum(corners + rng.uniform(12, 150, (6, 2)), size)], axis=1)
            match = match_locations(size[::-1], strides, boxes.astype(np.float32), np.zeros(6, np.int64))
            index = np.flatnonzero(match >= 0)
            own = boxes[match[index]]
            distances = np.concatenate([cells[index] - own[:, :2], own[:, 2:] - cells[index]], axis=1)
            said = {"index": index, "scores": np.full((len(index), 1), 0.9), "boxes": distances.astype(np.float32),
                    "centreness": np.full(len(index), 0.5)}  # fmt: skip
            width, height = round(size[0] / zoom), round(size[1] / zoom)
            crop = (round(rng.random() * (size[0] - width)), round(rng.random() * (size[1] - height)), width, height)
            geometry = Geometry(size, crop, size)
            target = {name: value.numpy() for name, value in place_locations(said, size, strides, geometry, 1).items()}
            new = np.clip(geometry.map_boxes(boxes), 0, [*size, *size]).astype(np.float32)
            new = new[(new[:, 2:] > new[:, :2]).all(axis=1)]
            true = match_locations(size[::-1], strides, new, np.zeros(len(new), np.int64))
            taught = target["scores"][:, 0] > 0
            assert (true[taught] >= 0).all() and (zoom > 1 or (taught == (true >= 0)).all())
            assert (target["hidden"] | taught)[true >= 0].all()
            edges = np.concatenate([cells - target["boxes"][:, :2], cells + target["boxes"][:, 2:]], axis=1)[taught]
            assert (edges >= -0.01).all() and (edges <= np.array([*size, *size]) + 0.01).all()
            if zoom > 1:
                exact = measure_centreness(torch.from_numpy(target["boxes"][taught])).numpy()
                assert np.allclose(target["centreness"][taught], exact, atol=1e-4)
                heard += taught.sum()
    assert heard > 100


@pytest.mark.parametrize("name", TASKS)
def test_what_a_cutout_hides_is_not_learned_of_the_mean_teacher(name):
    """The same as of files: the left half of the second picture."""
    task, half = make_task(name), ((0.0, 0.0, 0.5, 1.0),)
    said = task.blend([(make_output(name), False)], SIZE)
    plain, hidden = task.prepare_soft(said), task.prepare_soft(said, [(), half])
    left_out = {"segmentation": lambda t: t["classes"] == 255, "depth": lambda t: t["metres"] == 0,
                "detection": lambda t: t["hidden"]}.get(name)  # fmt: skip
    if left_out is None:
        assert all(torch.equal(plain[key], hidden[key]) for key in plain)
        return
    assert not left_out(plain).any() and not left_out(hidden)[0].any()
    assert left_out(hidden)[1].float().mean() == pytest.approx(0.5)
    if name == "detection":
        boxes = make_task(name, pseudo={"targets": "boxes", "threshold": 0.0}, min_visible=1.0)
        counts = [boxes.count_soft(boxes.prepare_soft(said, holes)) for holes in ([(), ()], [(), half])]
        assert counts[0][0] == counts[1][0] and counts[0][1] > counts[1][1]


def test_the_box_grid_learns_boxes_of_teachers_and_cannot_teach():
    task = TASKS["detection"](DetectionOptions(box_coder="grid", pseudo={"targets": "boxes"}))
    label = [{"box": [4.0, 4, 40, 40], "class": "Car", "visible": 1.0}]
    said = {"label": label, "annotated": np.ones(5, dtype=bool)}
    target = task.collate_soft([task.transform_soft(said, Geometry.identity(SIZE))])
    rows, columns = count_cells((HEIGHT, WIDTH), CELL)
    output = BoxGridOutput(torch.zeros(1, rows, columns, SLOTS, 5 + 5), (HEIGHT, WIDTH))
    assert task.count_soft(target).tolist() == [1.0] and task.soft_loss(output, target) == task.loss(output, target)
    assert task.find_pseudo_conflict(online=False) is None
    assert "cannot teach" in task.find_pseudo_conflict(online=True)


def test_an_error_of_the_mean_teacher_ends_all_ranks():
    class Agreeing:
        def agree(self, numbers, problem):
            raise RuntimeError(f"all ranks: {problem}")

    def fail(cycle):
        raise ValueError("it has failed")

    setup = SimpleNamespace(tasks={}, ramp=None, ranks=Agreeing())
    with pytest.raises(RuntimeError, match="all ranks: it has failed"):
        train.take_cycle(iter([[]]), setup, SimpleNamespace(check=lambda: None), 0, fail)


def make_learned(*names, **options):
    task = make_task("detection", **options)
    groups = task.describe_files()["classes"]
    task.label_statistics |= task.list_annotated([[member for name in names for member in groups[name]]])
    return task


def test_a_class_is_the_mean_over_teachers_that_have_learned_it():
    whole = make_task("detection")
    first, second = whole.names[:2], whole.names[1:3]
    pair = [make_learned(*first), make_learned(*second)]
    outputs = [(make_output("detection", seed), False) for seed in (0, 1)]
    joined = pair[0].join_teachers(pair)
    assert joined.annotated.tolist() == [True, True, True, False, False] and whole.annotated.all()
    said = joined.blend(outputs, SIZE, {"dense": [1.0, 5.0]}, pair)
    plain = joined.blend(outputs, SIZE, None, pair)["scores"]
    one, two = (output.classes.sigmoid() for output, _ in outputs)
    assert torch.allclose(plain[..., 0], one[..., 0]) and torch.allclose(plain[..., 2], two[..., 2])
    assert torch.allclose(plain[..., 1], (one[..., 1] + two[..., 1]) / 2)
    assert (said["scores"][..., 3:] == 0).all()  # though the calibration raises small scores
    alone = plain[0].argmax(dim=1) == 0
    assert torch.equal(joined.blend(outputs, SIZE, None, pair)["boxes"][0][alone], outputs[0][0].boxes[0][alone])
    as_before = blend_outputs(outputs)
    same = whole.blend(outputs, SIZE, None, [whole, whole])
    assert all(torch.equal(same[name], as_before[name]) for name in as_before)


@pytest.mark.parametrize("targets", ["dense", "boxes"])
@pytest.mark.parametrize("way", ["files", "mean teacher"])
def test_what_teachers_have_not_learned_is_no_background(tmp_path, targets, way):
    teacher = make_learned("Car", pseudo={"targets": targets})
    said = teacher.blend([(make_output("detection", batch=1), False)], SIZE)
    student = make_task("detection", pseudo={"targets": targets})
    if way == "files":
        frame = Frame("20180101_000000", "front_center", "000000001", tmp_path)
        for kind, content in teacher.encode_soft(said, 0, SIZE).items():
            frame.path(kind).parent.mkdir(parents=True, exist_ok=True)
            frame.path(kind).write_bytes(content)
        found = student.load_soft(frame, teacher.describe_soft_files(SIZE), SIZE)
        target = student.collate_soft([student.transform_soft(found, Geometry.identity(SIZE))])
    else:
        target = teacher.prepare_soft(said)
    logits = torch.zeros(1, LOCATIONS, 5, requires_grad=True)
    student.soft_loss(make_output("detection", batch=1)._replace(classes=logits), target).backward()
    assert logits.grad[..., 0].any() and not logits.grad[..., 1:].any()


def test_scores_are_calibrated_by_a_line_that_keeps_their_order():
    rng = np.random.default_rng(0)
    honest = rng.beta(0.5, 3, 40000)
    right = rng.random(40000) < honest
    shown = 1 / (1 + np.exp(-(0.5 * np.log(honest / (1 - honest)) - 1)))  # too small, and too alike
    counts = LogitCounts()
    counts.add(shown, right)
    line = counts.fit()
    assert line == pytest.approx((2.0, 2.0), abs=0.1)
    moved = calibrate_probabilities(torch.from_numpy(shown), line).numpy()
    for low in (0.05, 0.2, 0.5):
        some = (moved >= low) & (moved < low + 0.1)
        assert right[some].mean() == pytest.approx(moved[some].mean(), abs=0.02)
    assert (np.diff(moved[np.argsort(shown)]) >= 0).all()
    nothing = LogitCounts()
    nothing.add(shown, np.zeros(40000, dtype=bool))
    assert nothing.fit() == (1.0, 0.0)


def test_boxes_that_a_teacher_is_not_sure_of_are_neither_object_nor_background():
    task = make_task("detection", pseudo={"targets": "boxes", "threshold": 0.5, "ignored_from": 0.2})
    found = {"boxes": torch.tensor([[4.0, 4, 30, 30], [34, 4, 60, 30], [4, 34, 30, 60]]),
             "labels": torch.tensor([1, 0, 2]), "scores": torch.tensor([0.8, 0.3, 0.1])}  # fmt: skip
    said = {"label": task._choose_boxes(found), "annotated": np.ones(5, dtype=bool)}
    target = task.transform_soft(said, Geometry.identity(SIZE))
    assert target["classes"][:3].tolist() == [1, -2, -1] or target["classes"][:3].tolist() == [-2, 1, -1]
    assert task.count_soft({key: value[None] for key, value in target.items()}) > 0


# ---------------------------------------------------------------- from teachers to a student


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The hand-made dataset four times, so that training has labels of all tasks to deal."""
    folder = tmp_path_factory.mktemp("set")
    root = folder / "root"
    for frame in write_root(root):
        for year in ("2019", "2020", "2021"):
            copy = Frame(year + frame.scene[4:], frame.view, frame.id, root)
            for kind in ("image", "segmentation", "depth", "boxes", "steering"):
                if frame.path(kind).is_file():
                    copy.path(kind).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(frame.path(kind), copy.path(kind))
    return folder


@pytest.fixture(scope="module")
def teachers(folder):
    """Of each task one that was trained on its share of the labels."""
    made = {}
    for name in TASKS:
        others = [f"tasks.{other}=null" for other in TASKS if other != name]
        head = ["tasks.detection.head={reads: [neck.8, neck.16], width: 32, layers: 1}"] * (name == "detection")
        options = [*others, *head, f"data.labels={ALL}", "train.steps=2", "train.evaluate_every=2"]
        made[name] = make_run(folder, *options, name=f"teacher_{name}")
    return made


def call(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pseudo_label.py", *map(str, arguments), "--workers", "0"])
        return pseudo_label.main()


@pytest.fixture(scope="module")
def labels(folder, teachers):
    assert call(*teachers.values(), "--out", folder / "pseudo") == 0
    return folder / "pseudo"


def list_student_options(labels, *more):
    head = "tasks.detection.head={reads: [neck.8, neck.16], width: 32, layers: 1}"
    return [f"data.labels={ALL}", f"data.pseudo.roots=[{labels}]", head, *SURE, *more]


def test_only_training_frames_get_pseudo_labels(labels, teachers):
    record = json.loads((teachers["depth"] / "record.json").read_text())
    trained = {f"{group}/{each}" for group, members in record["subsets"]["train"].items() for each in members}
    assert {str(frame) for frame in list_frames(labels, "depth")} == trained and trained
    header = read_json(labels / "dataset.json")["predictions"]
    assert [each["run"] for each in header["teachers"]] == [path.name for path in teachers.values()]
    assert all(len(each["weights"]) == 64 for each in header["teachers"])


def test_teachers_of_other_training_frames_are_refused(folder, teachers, tmp_path, capsys):
    other = make_run(folder, "data.split_seed=3", "tasks.depth=null", "tasks.segmentation=null", "tasks.detection=null",
                     "train.steps=1", name="other")  # fmt: skip
    assert call(teachers["depth"], other, "--out", tmp_path / "out") == 1
    assert "must have the same training frames" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_student_learns_from_teachers_only_where_no_true_label_is_used(folder, labels):
    config = load_config(write_config(folder / "s.yaml", folder / "root"), list_student_options(labels), OPTIONS)
    setup = train.prepare(config)
    for name, frames in setup.teachers.frames.items():
        used = {setup.frames[index] for index in setup.assignment[name]}
        assert used and not used & set(frames)
        assert used | set(frames) == set(setup.frames)
    for batch in next(train.load_cycles(setup, 0)):
        for name, rows in batch["soft_rows"].items():
            assert not set(rows.tolist()) & set(batch["rows"].get(name, torch.tensor([])).tolist())
            drawn = {batch["frame"][row] for row in rows.tolist()}
            assert drawn <= {str(frame) for frame in setup.teachers.frames[name]}


def test_frames_that_no_stream_draws_have_one_of_their_own(folder, labels):
    """Self-training of one task: it sees the frames of the others' labels with pseudo-labels alone."""
    options = list_student_options(labels, "tasks.depth=null", "tasks.segmentation=null", "tasks.detection=null")
    options = [each for each in options if "tasks.detection.head" not in each and "tasks.depth.pseudo" not in each
               and "tasks.segmentation.pseudo" not in each]  # fmt: skip
    config = load_config(
        write_config(folder / "s.yaml", folder / "root"), [*options, "data.pseudo.micro_batch=3"], OPTIONS
    )
    setup = train.prepare(config)
    own, others = next(train.load_cycles(setup, 0))
    assert "steering" in own["rows"] and not others["rows"]
    assert len(others["image"]) == 3 and others["soft_rows"]["steering"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["files", "mean teacher"])
def test_a_student_that_was_stopped_goes_on_as_if_it_had_not_been(folder, labels, tmp_path, kind):
    options = list_student_options(labels, "data.augment={scale: [1.0, 1.3], cutouts: 2, blur: 0.5}")
    if kind == "mean teacher":
        options = [each for each in options if "data.pseudo.roots" not in each] + ["train.mean_teacher={ramp_steps: 2}"]
    config = write_config(folder / "s.yaml", folder / "root")
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / "whole", *options) == 0
        with pytest.MonkeyPatch.context() as inner:
            stop_at_check(inner, 4)
            assert run_train(inner, config, tmp_path / "run", *options) == 75
        assert run_train(patch, config, tmp_path / "run", *options, "--resume") == 0
    assert are_same_weights(tmp_path / "run", tmp_path / "whole")
    log = read_log(tmp_path / "run")
    assert log == read_log(tmp_path / "whole")
    assert any(f"loss/{name}/pseudo" in line for line in log for name in TASKS)
    with pytest.MonkeyPatch.context() as patch:
        without = [each for each in options if "pseudo.roots" not in each and "mean_teacher" not in each]
        assert run_train(patch, config, tmp_path / "without", *without) == 0
    ours, theirs = (load_weights(tmp_path / each / "best.safetensors")[0] for each in ("without", "whole"))
    assert not all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_pseudo_labels_that_changed_or_do_not_fit_are_refused(folder, labels, teachers, tmp_path, capsys):
    config = write_config(folder / "s.yaml", folder / "root")
    with pytest.MonkeyPatch.context() as patch:
        stop_at_check(patch, 2)
        assert run_train(patch, config, tmp_path / "run", *list_student_options(labels)) == 75
    header = read_json(labels / "dataset.json")
    header["predictions"]["step"] = 99
    try:
        write_json(labels / "dataset.json", header)
        with pytest.MonkeyPatch.context() as patch:
            assert run_train(patch, config, tmp_path / "run", *list_student_options(labels), "--resume") == 1
    finally:
        header["predictions"]["step"] = 2
        write_json(labels / "dataset.json", header)
    assert "are not those this run started with" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        wide = "tasks.detection.head={reads: [neck.8, neck.16, neck.32], width: 32, layers: 1}"
        assert run_train(patch, config, tmp_path / "b", *list_student_options(labels, wide)) == 1
        assert "strides" in capsys.readouterr().err
        boxes = "tasks.detection.pseudo.targets=boxes"
        assert (
            run_train(patch, config, tmp_path / "c", *list_student_options(labels, wide, boxes, "train.steps=1")) == 0
        )
        assert run_train(patch, config, tmp_path / "d", *list_student_options(folder / "root")) == 1
        assert "make them with pseudo_label.py" in capsys.readouterr().err


def test_teachers_that_cannot_teach_together_or_here_are_refused(folder, teachers, tmp_path, capsys):
    def refuse(code, text, *arguments):
        assert call(*arguments, "--out", tmp_path / "out") == code
        assert text in capsys.readouterr().err and not (tmp_path / "out").exists()

    steering = teachers["steering"]
    refuse(2, "would count twice", steering, steering / "best.safetensors")
    tensors, header = load_weights(steering / "best.safetensors")
    header.pop("format")
    more = header | {"tasks": {"steering": header["tasks"]["steering"] | {"horizon": 2}}}
    last = [name for name, value in tensors.items() if value.shape[0] == 1 and name.startswith("heads.")]
    save_weights(tmp_path / "two.safetensors", tensors | {name: tensors[name].repeat(2, *[1] * (tensors[name].ndim - 1))
                                                          for name in last}, more)  # fmt: skip
    refuse(2, "horizon is 2, and was 1", steering, tmp_path / "two.safetensors")
    broken = {name: value * float("nan") if name in last else value for name, value in tensors.items()}
    save_weights(tmp_path / "nan.safetensors", broken, header)
    assert call(tmp_path / "nan.safetensors", "--out", tmp_path / "nan") == 1
    error = capsys.readouterr().err
    assert "nan does not answer in finite numbers about 20" in error and not list_frames(tmp_path / "nan", "steering")
    root = tmp_path / "root"
    shutil.copytree(folder / "root", root)
    about = read_json(root / "dataset.json")
    for camera in about["cameras"].values():
        camera["matrix"][0][0] *= 2
    write_json(root / "dataset.json", about)
    refuse(1, "pictures of another field of view", teachers["depth"], "--data", root)


def test_classes_and_horizon_of_a_teacher_must_fit():
    """Groups of one name with other members are other classes; a shorter horizon has nothing to say of later angles."""
    few, more = (make_task("detection", classes={"Vehicle": each}) for each in (["Car"], ["Car", "Bus"]))
    assert "Vehicle is Car, that of this network Car, Bus" in more.find_soft_conflict(
        few.describe_soft_files(SIZE), SIZE
    )
    assert few.find_soft_conflict(few.describe_soft_files(SIZE), SIZE) is None
    one, three = (make_task("steering", horizon=each) for each in (1, 3))
    assert "predicts 1 samples of the angle, this network 3" in three.find_teacher_conflict(one)
    assert one.find_teacher_conflict(three) is None


def test_a_teacher_of_tasks_that_are_not_wanted_is_not_asked_about_them():
    """Though its detection could not be averaged with that of the other."""
    grid, dense = TASKS["detection"](DetectionOptions(box_coder="grid")), make_task("detection")
    with pytest.MonkeyPatch.context() as patch:
        made = {"grid": {"detection": grid, "steering": make_task("steering")}, "dense": {"detection": dense}}
        patch.setattr(pseudo_label, "load_trained", lambda path, device: StandIn(str(path), made[str(path)]))
        found = pseudo_label.gather_teachers([Path("grid")], ["steering"], torch.device("cpu"), None)
        assert list(found.tasks) == ["steering"]
        with pytest.raises(ValueError, match="box grid cannot teach"):
            pseudo_label.gather_teachers([Path("dense"), Path("grid")], None, torch.device("cpu"), None)


class StandIn:
    """As much of a Trained as gathering teachers needs."""

    def __init__(self, name, tasks):
        self.name = self.path = self.digest = name
        self.tasks, self.size, self.net = tasks, SIZE, torch.nn.Identity()


@pytest.fixture
def start(folder, tmp_path, capsys):
    """Prepare a student that learns from a folder of pseudo-labels; returns the Setup."""

    def prepare(labels, *options, record=None):
        config = write_config(tmp_path / "start.yaml", folder / "root")
        return train.prepare(load_config(config, list_student_options(labels, *options), OPTIONS), record)

    return prepare


@pytest.fixture
def copy(labels, tmp_path):
    """A copy of the pseudo-labels that a test may spoil."""
    return shutil.copytree(labels, tmp_path / "labels")


def change_header(folder, change):
    content = read_json(folder / "dataset.json")
    change(content)
    write_json(folder / "dataset.json", content)


def test_pseudo_labels_that_are_not_finished_are_refused(copy, start):
    frames = list_frames(copy, "depth")
    frames[0].path("depth").unlink()
    with pytest.raises(ValueError, match=f"not finished: 1 of {len(frames)} frames have no depth file yet, such as 20"):
        start(copy)
    change_header(copy, lambda content: content.pop("pseudo_labels"))  # as it was written before
    frames[0].path("depth_confidence").unlink()
    assert len(start(copy).teachers.frames["depth"]) < len(frames)
    frames[1].path("depth_confidence").unlink()
    with pytest.raises(ValueError, match="have no depth_confidence file yet"):
        start(copy)


def test_pseudo_labels_of_other_pictures_with_the_same_names_are_refused(folder, copy, start, tmp_path):
    start(copy, "data.augment.flip=0.0")
    other = shutil.copytree(folder / "root", tmp_path / "other")
    for frame in list_frames(other, "image"):
        values = np.random.default_rng(7).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        frame.path("image").write_bytes(encode_jpeg(values.repeat(16, axis=0).repeat(16, axis=1)))
    with pytest.raises(ValueError, match="was made of other pictures with the same names, such as 20"):
        start(copy, f"data.roots=[{other}]")
    change_header(copy, lambda content: content.pop("pseudo_labels"))
    start(copy, f"data.roots=[{other}]")


def test_pseudo_labels_of_two_sets_of_pictures_are_not_mixed(folder, teachers, copy, tmp_path, capsys):
    root = shutil.copytree(folder / "root", tmp_path / "root")
    for frame in list_frames(root, "image"):
        frame.path("image").write_bytes(encode_jpeg(np.full((HEIGHT, WIDTH, 3), 9, dtype=np.uint8)))
    assert call(*teachers.values(), "--data", root, "--out", copy) == 1
    assert "holds pseudo-labels of other pictures with the same names" in capsys.readouterr().err


def test_pseudo_labels_of_one_of_two_datasets_with_other_cameras_are_learned(folder, copy, start, tmp_path):
    second = tmp_path / "second"
    for frame in list_frames(folder / "root", "image"):
        new = Frame("2030" + frame.scene[4:], frame.view, frame.id, second)
        for kind in ("image", "segmentation", "depth", "boxes", "steering"):
            if frame.path(kind).is_file():
                new.path(kind).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(frame.path(kind), new.path(kind))
    shutil.copy(folder / "root" / "dataset.json", second)
    change_header(second, lambda content: [each["matrix"][0].__setitem__(0, 99.0) for each in
                                           content["cameras"].values()])  # fmt: skip
    assert start(copy, f"data.roots=[{folder / 'root'}, {second}]").teachers.frames["depth"]


def test_damaged_pseudo_labels_are_named_in_one_line(copy, start):
    setup = start(copy)
    task, about = setup.tasks["detection"], read_json(copy / "dataset.json")["kinds"]
    frame = list_frames(copy, "boxes_dense")[0]
    whole = frame.path("boxes_dense").read_bytes()
    flipped = bytearray(whole)
    flipped[120:123] = bytes(byte ^ 0xFF for byte in flipped[120:123])
    np.savez(copy / "keyless.npz", index=np.zeros(0, np.int32))
    for content in (whole[: len(whole) // 2], bytes(flipped), b"", (copy / "keyless.npz").read_bytes()):
        frame.path("boxes_dense").write_bytes(content)
        with pytest.raises(ValueError, match=r"boxesdense.*npz is damaged .*run pseudo_label.py again"):
            task.load_soft(frame, about, SIZE)
    frame = list_frames(copy, "steering")[0]
    write_json(frame.path("steering"), {"angle_deg": 1.0, "angles_deg": 2.0})
    with pytest.raises(ValueError, match="its angles_deg is 2"):
        setup.tasks["steering"].load_soft(frame, about, SIZE)
    change_header(copy, lambda content: content.pop("kinds"))
    with pytest.raises(ValueError, match="does not say what its files mean"):
        start(copy)


def test_a_run_knows_its_pseudo_labels_by_their_content_wherever_they_lie(labels, copy, start, tmp_path):
    record = start(labels).record
    start(copy, record=record)  # another place
    start(copy, record=replace(record, pseudo=[identify_pseudo(each) for each in record.pseudo]))  # begun before
    config = {"seed": 0, "data": {"pseudo": {"roots": [str(labels)]}}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    recipe = find_recipe(tmp_path, record)
    config["data"]["pseudo"]["roots"] = [str(copy)]
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert find_recipe(tmp_path, record) == recipe
    assert find_recipe(tmp_path, replace(record, pseudo=["0" * 16])) != recipe
    frame = list_frames(copy, "steering")[0]
    write_json(frame.path("steering"), {"angle_deg": 99.0})
    with pytest.raises(ValueError, match="are not those this run started with"):
        start(copy, record=record)


def test_the_start_names_teachers_and_the_log_counts_what_they_say(folder, labels, tmp_path, capsys):
    config = write_config(folder / "s.yaml", folder / "root")
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / "run", *list_student_options(labels)) == 0
    assert (
        "are of teacher_segmentation, teacher_depth, teacher_detection, teacher_steering; no scores are calibrated"
        in ("".join(capsys.readouterr()))
    )
    line = next(line for line in read_log(tmp_path / "run") if "loss/depth/pseudo" in line)
    assert line["taught/depth"] > 0


def test_frames_that_a_teacher_was_trained_on_are_never_scored(folder, labels, tmp_path, capsys):
    """A student with another split would else be validated on what its teachers have seen."""
    config = write_config(folder / "s.yaml", folder / "root")
    loaded = load_config(config, list_student_options(labels, "data.split_seed=3"), OPTIONS)
    setup = train.prepare(loaded)
    trained = {str(frame) for frame in list_frames(labels, "depth")}
    assert not trained & {str(frame) for frame in setup.data.subsets["val"] + setup.data.subsets["test"]}
    assert "are left out" in "".join(capsys.readouterr())


def test_held_out_labels_calibrate_and_are_never_trained_on(folder, teachers, tmp_path, capsys):
    options = ["data.labels=as_is", "data.hold_out={detection: 0.5}", "train.steps=2",
               "tasks.detection.head={reads: [neck.8, neck.16], width: 32, layers: 1}"]  # fmt: skip
    run = make_run(folder, *options, name="held")
    content = json.loads((run / "assignment.json").read_text())
    kept, held = ({f"{group}/{each}" for group, members in content[part]["detection"].items() for each in members}
                  for part in ("labels", "held_out"))  # fmt: skip
    assert kept and held and not kept & held
    assert not {name.split("/")[0] for name in kept} & {name.split("/")[0] for name in held}
    setup = train.prepare(load_config(write_config(folder / "s.yaml", folder / "root"), options, OPTIONS))
    drawn = {
        batch["frame"][row]
        for cycle, _ in zip(train.load_cycles(setup, 0), range(2), strict=False)
        for batch in cycle
        for row in batch["rows"].get("detection", torch.tensor([])).tolist()
    }
    assert drawn and not drawn & held
    assert call(teachers["detection"], "--calibrate", run, "--out", tmp_path / "out") == 0
    line = read_json(tmp_path / "out" / "dataset.json")["predictions"]["calibration"]["detection"]
    assert line["labels"] == len(held) and len(line["dense"]) == len(line["boxes"]) == 2
    assert call(teachers["detection"], "--calibrate", teachers["detection"], "--out", tmp_path / "other") == 2
    assert "has held out no label" in capsys.readouterr().err

    def refuse(code, text, *calibrating):
        assert call(teachers["detection"], "--calibrate", *calibrating, "--out", tmp_path / "other") == code
        assert text in capsys.readouterr().err and not (tmp_path / "other").exists()

    refuse(2, "is calibrated by held already", run, run)
    own, copy = json.loads((run / "assignment.json").read_text()), tmp_path / "copy"
    shutil.copytree(run, copy)
    write_json(copy / "assignment.json", own | {"held_out": {"depth": own["held_out"]["detection"]}})
    refuse(2, "no confidence of the teachers' detection can be calibrated", copy)
    record = json.loads((teachers["detection"] / "record.json").read_text())
    write_json(copy / "assignment.json", own | {"held_out": {"detection": record["subsets"]["val"]}})
    refuse(1, "is scored on", copy)
    write_json(copy / "assignment.json", own)
    tensors, header = load_weights(run / "best.safetensors")
    header.pop("format")
    header["record"]["inherited"] = own["held_out"]["detection"]
    save_weights(copy / "best.safetensors", tensors, header)
    refuse(1, "of frames that the weights it began with", copy)


def test_weights_say_which_classes_their_labels_annotate(folder, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(folder / "root", root)
    about = read_json(root / "dataset.json")
    about["kinds"]["boxes"] = {"annotated_classes": ["Pedestrian", "Animal", "Car"]}
    write_json(root / "dataset.json", about)
    config = load_config(
        write_config(tmp_path / "s.yaml", root),
        ["tasks.detection.head={reads: [neck.8, neck.16], width: 32, layers: 1}"],
        OPTIONS,
    )
    setup = train.prepare(config)
    known = setup.tasks["detection"].label_statistics["annotated"]
    assert train.describe_model(setup)["fitted"]["detection"]["annotated"] == known == ["Pedestrian"]


def test_learning_that_would_never_happen_is_refused(folder, labels, monkeypatch):
    config = write_config(folder / "s.yaml", folder / "root")
    for key in ("data.pseudo.from_step", "train.mean_teacher.from_step"):
        options = list_student_options(labels) if "pseudo" in key else []
        with pytest.raises(ConfigError, match=f"{key}=4 is not below train.steps=4"):
            load_config(config, [*options, f"{key}=4"], OPTIONS)
    weighted = load_config(config, list_student_options(labels, "tasks.detection.pseudo.weighting=confidence"), OPTIONS)
    with pytest.raises(WrongUseError, match="weighting=confidence has no effect"):
        train.prepare(weighted)
    setup = train.prepare(load_config(config, ["data.labels=as_is"], OPTIONS))
    whole = {name: list(range(len(setup.frames))) for name in setup.tasks}
    asked = load_config(config, ["data.labels=as_is", "train.mean_teacher={}"], OPTIONS)
    train.check_learning(asked, setup.tasks, setup.frames, setup.labels, setup.assignment)
    with pytest.raises(WrongUseError, match="mean_teacher has nothing to say"):
        train.check_learning(asked, setup.tasks, setup.frames, setup.labels, whole)
    held = load_config(config, ["data.labels=as_is", "data.hold_out={depth: 0.5}"], OPTIONS)
    scene = [frame for frame in setup.frames if frame.scene == setup.frames[0].scene]
    with pytest.raises(WrongUseError, match="holds out no label of depth: whole scenes"):
        train.check_learning(held, setup.tasks, scene, setup.labels, {name: [0] for name in setup.tasks})


def test_the_mean_teacher_is_told_of_cutouts(folder):
    options = [f"data.labels={ALL}", "train.mean_teacher={}", "data.augment={cutouts: 4, flip: 0.0}"]
    setup = train.prepare(load_config(write_config(folder / "s.yaml", folder / "root"), options, OPTIONS))
    net = train.build_state(setup).ema.net
    autocast = train.choose_autocast("fp32", setup.device)
    ask, looked = train.MeanTeacher(net, setup.tasks, setup.size, setup.device, autocast), 0
    for batch in ask(next(train.load_cycles(setup, 0))):
        gray = (batch["image"] == GRAY).all(dim=1)
        for name, key, nothing in (("segmentation", "classes", 255), ("depth", "metres", 0)):
            if name in batch.get("soft_rows", ()):
                rows = batch["soft_rows"][name]
                assert (batch["soft_targets"][name][key][gray[rows]] == nothing).all()
                looked += int(gray[rows].sum())
    assert looked


def test_a_task_alone_has_the_labels_that_it_has_among_others(folder):
    config = write_config(folder / "s.yaml", folder / "root")
    together = train.prepare(load_config(config, [f"data.labels={ALL}"], OPTIONS))
    for name in TASKS:
        others = [f"tasks.{other}=null" for other in TASKS if other != name]
        alone = train.prepare(load_config(config, [f"data.labels={ALL}", *others], OPTIONS))
        assert alone.assignment[name] == together.assignment[name]
        assert len(alone.assignment[name]) < len(alone.labels[name] & set(alone.frames))
        with pytest.raises(ConfigError, match="would keep every label"):
            load_config(config, ["data.labels=one_task", *others], OPTIONS)


def test_augmentations_hide_the_same_of_picture_and_labels():
    rng = random.Random(1)
    geometry = Augmentation(cutouts=3).cut_out(Geometry.identity(SIZE), rng)
    while not geometry.holes:
        geometry = Augmentation(cutouts=3).cut_out(Geometry.identity(SIZE), rng)
    image = geometry.transform_image(torch.full((3, HEIGHT, WIDTH), 7, dtype=torch.uint8))
    hidden = (image[0] != 7).numpy()
    assert 0 < hidden.mean() < 1
    assert np.array_equal(geometry.hide(np.ones((HEIGHT, WIDTH)), 0) == 0, hidden)
    inside = np.array(
        [[value * side for value, side in zip(hole, (*SIZE, *SIZE), strict=True)] for hole in geometry.holes]
    )
    assert geometry.measure_hidden(inside) == pytest.approx(1.0)
    task = TASKS["detection"](DetectionOptions(min_size=1.0))
    label = [{"box": inside[0].tolist(), "class": "Car", "visible": 1.0}]
    assert task.transform(label, geometry)["classes"][0] == -2
    assert task.transform(label, Geometry.identity(SIZE))["classes"][0] == 0
