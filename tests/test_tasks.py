"""Each task: targets, metrics, matching, constants. What the losses cost is in test_exactness.py."""

import json
import math

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from a2d2.dataset import Geometry
from evaluate import format_table, mean_skill
from models.heads import DetectionOutput, count_cells, locate_cells
from tasks import TASKS
from tasks.box_matching import BACKGROUND
from tasks.depth import Depth, DepthMetrics
from tasks.detection import IGNORED, Detection, match_locations
from tasks.segmentation import Segmentation
from tasks.steering import Steering
from training.config import ConfigError, load_config, save_config

SIZE = (128, 64)
MIRROR = Geometry(SIZE, (0, 0, *SIZE), SIZE, flip=True)
SAME = Geometry.identity(SIZE)


def make_boxes():
    boxes = [
        ([10, 8, 60, 40], "Car"),
        ([70, 20, 100, 60], "Pedestrian"),
        ([3, 3, 8, 8], "Car"),
        ([90, 5, 120, 30], "Ufo"),
    ]
    return [{"box": box, "class": name, "visible": 1.0} for box, name in boxes]


@pytest.mark.parametrize("name", TASKS)
def test_blanks_collate_with_targets_and_count_nothing(name):
    task = TASKS[name]()
    label = {
        "segmentation": np.zeros(SIZE[::-1], np.uint8),
        "depth": np.ones(SIZE[::-1], np.float32),
        "detection": make_boxes(),
        "steering": np.array([3.0], np.float32),
    }[name]
    targets = [task.prepare_loss(target) for target in (task.blank(SIZE), task.transform(label, SAME))]
    counts = task.count(task.collate(targets)).tolist()
    # a blank angle is 0 degrees, which only says nothing because no row is made of it
    assert counts[1] > 0 and counts[0] == (1 if name == "steering" else 0)


def test_segmentation_counts_and_scores():
    task = Segmentation()
    label = np.random.default_rng(0).integers(0, 19, SIZE[::-1]).astype(np.uint8)
    label[:5] = 255
    target = task.transform(label, SAME)[None]
    assert task.count(target) == (label != 255).sum()
    metrics = task.metrics()
    metrics.update(target.clone(), target)
    assert metrics.compute()["miou"] == 1.0
    # of four pixels one is taken for the other class: IoU 2/3 and 1/2
    metrics = task.metrics()
    metrics.update(torch.tensor([[[1, 1, 1, 2]]], dtype=torch.uint8), torch.tensor([[[1, 1, 2, 2]]], dtype=torch.uint8))
    assert metrics.compute()["miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert task.find_constant([np.array([[1, 1, 3, 255, 255, 255]], np.uint8)]) == 1


def test_depth_constant_minimises_abs_rel():
    rng = np.random.default_rng(1)
    labels = [np.where(rng.random((6, 9)) < 0.5, rng.uniform(2, 70, (6, 9)), 0).astype(np.float32) for _ in range(4)]
    constant = Depth().find_constant(labels)

    def score(value):
        metrics = DepthMetrics(80.0)
        for label in labels:
            metrics.update(torch.full((1, 6, 9), value), torch.from_numpy(label)[None])
        return metrics.compute()["abs_rel"]

    assert score(constant) <= min(score(float(value)) for value in np.arange(2, 70, 0.25)) + 1e-6


def test_a_zoom_brings_depth_nearer():
    label = np.full(SIZE[::-1], 10, np.float32)
    zoomed = Depth().transform(label, Geometry(SIZE, (32, 16, 64, 32), SIZE))
    # each of the 64 x 32 points of the crop goes to one pixel; the rest stays unknown
    assert torch.equal(zoomed.unique(), torch.tensor([0.0, 5.0])) and int((zoomed > 0).sum()) == 64 * 32


def list_strides(size, strides):
    """The stride of each location."""
    return torch.cat([torch.full((math.prod(count_cells(size, stride)),), float(stride)) for stride in strides])


def brute_match(locations, strides, boxes, classes):
    rows = []
    for (x, y), stride in zip(locations.tolist(), strides.tolist(), strict=True):
        best, row = math.inf, -1
        for number, ((x1, y1, x2, y2), label) in enumerate(zip(boxes.tolist(), classes.tolist(), strict=True)):
            reach = (x - x1, y - y1, x2 - x, y2 - y)
            near = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) < 1.5 * stride
            low = 0 if stride == strides.min() else 4 * stride
            high = math.inf if stride == strides.max() else 8 * stride
            area = (x2 - x1) * (y2 - y1)
            if label >= 0 and min(reach) > 0 and near and low <= max(reach) < high and area < best:
                best, row = area, number
        rows.append(row)
    return rows


@pytest.mark.parametrize("size", [(75, 131), (64, 128)])
def test_matching_is_the_brute_force_one(size):
    rng = np.random.default_rng(2)
    corner = rng.uniform(0, 90, (12, 2))
    boxes = torch.from_numpy(np.concatenate([corner, corner + rng.uniform(5, 60, (12, 2))], axis=1)).float()
    classes = torch.from_numpy(rng.integers(-2, 3, 12))
    classes[classes == -1] = 0
    strides = (8, 16, 32)
    rows = match_locations(size, strides, boxes.numpy(), classes.numpy())
    locations, spread = locate_cells(size, strides), list_strides(size, strides)
    assert np.maximum(rows, -1).tolist() == brute_match(locations, spread, boxes, classes)
    assert (rows >= 0).any() and (rows == IGNORED).any()


@pytest.mark.parametrize("size", [(75, 131), (33, 257)])
def test_ignored_are_exactly_the_locations_in_ignored_boxes_that_match_none(size):
    rng = np.random.default_rng(3)
    corner = rng.uniform(0, 1, (14, 2)) * (size[1], size[0])
    boxes = torch.from_numpy(np.concatenate([corner, corner + rng.uniform(3, 50, (14, 2))], axis=1)).float()
    classes = torch.tensor([IGNORED, 0, 1] * 4 + [IGNORED] * 2)
    strides = (8, 16, 32, 64, 128)
    rows = match_locations(size, strides, boxes.numpy(), classes.numpy())
    held = [
        any(
            x1 < x < x2 and y1 < y < y2
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), classes.tolist(), strict=True)
            if label == IGNORED
        )
        for x, y in locate_cells(size, strides).tolist()
    ]
    ignored = (rows == IGNORED).tolist()
    assert ignored == [there and row < 0 for there, row in zip(held, rows.tolist(), strict=True)]
    assert any(ignored) and any(there and row >= 0 for there, row in zip(held, rows.tolist(), strict=True))


def test_without_boxes_every_location_is_background():
    rows = match_locations((75, 131), (8, 64), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    assert (rows == -1).all() and len(rows) == len(locate_cells((75, 131), (8, 64)))


def make_output(target, task, confidence=12.0):
    """A detector that says exactly what the target holds."""
    strides, size = task.box_coder.strides, SIZE[::-1]
    locations = locate_cells(size, strides)
    boxes, classes = target["boxes"], target["classes"]
    rows = task.prepare_loss(target)["match"]
    logits = torch.full((1, len(locations), len(task.names)), -confidence)
    distances = torch.ones(1, len(locations), 4)
    for place in (rows >= 0).nonzero()[:, 0].tolist():
        logits[0, place, classes[rows[place]]] = confidence
        box = boxes[rows[place]]
        distances[0, place] = torch.cat([locations[place] - box[:2], box[2:] - locations[place]])
    return DetectionOutput(logits, distances, torch.full((1, len(locations)), confidence), strides, size)


def test_perfect_detections_score_one_and_ignored_boxes_cost_nothing():
    task = Detection()
    target = task.transform(make_boxes(), SAME)
    assert (target["classes"] == IGNORED).sum() == 2  # the small one and the unknown one
    output = make_output(target, task)
    batch = default_collate([target])
    assert task.count(default_collate([task.prepare_loss(target)])) > 0
    metrics = task.metrics()
    metrics.update(task.predict(output, SIZE), batch)
    assert metrics.compute()["ap"] == pytest.approx(1.0)
    # a detection on the ignored boxes is no false positive
    ufo = torch.tensor([[90.0, 5, 120, 30]])
    prediction = {"boxes": ufo, "scores": torch.tensor([0.99]), "labels": torch.tensor([2])}
    metrics.update([prediction], batch | {"visible": torch.zeros_like(batch["visible"])})
    assert metrics.compute()["ap"] == pytest.approx(1.0)


def test_detection_mirrors():
    task = Detection(Detection.Options(head={"reads": ("neck.8", "neck.16", "neck.32", "neck.64")}))
    targets = (task.transform(make_boxes(), geometry) for geometry in (SAME, MIRROR))
    target, mirrored = (default_collate([task.prepare_loss(target)]) for target in targets)
    torch.manual_seed(0)
    maps = [torch.randn(1, 10, SIZE[1] // stride or 1, SIZE[0] // stride) for stride in task.box_coder.strides]

    def make(levels, flipped):
        cells = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        boxes = cells[..., 5:9].exp() * 8
        boxes = boxes[..., [2, 1, 0, 3]] if flipped else boxes
        return DetectionOutput(cells[..., :5], boxes, cells[..., 9], task.box_coder.strides, SIZE[::-1])

    straight = task.loss(make(maps, False), target)
    turned = task.loss(make([level.flip(3) for level in maps], True), mirrored)
    assert straight.item() == pytest.approx(turned.item(), rel=1e-5)
    assert task.count(target) == task.count(mirrored) > 0


def test_an_empty_frame_is_a_labelled_frame():
    task = Detection()
    target = default_collate([task.prepare_loss(task.transform([], SAME))])
    assert task.count(target) == 0
    output = make_output(task.transform([], SAME), task)
    assert task.loss(output, target).item() >= 0
    assert task.metrics().compute()["ap"] is None


def test_steering_turns_its_sign_and_scores_in_degrees():
    task = Steering()
    assert task.transform(np.array([12.0], np.float32), MIRROR).tolist() == [-12]
    task.collect_statistics(np.array([[0.0], [2.0], [40.0]]))
    assert task.label_statistics["constant"] == 2.0 and task.label_statistics["scale_deg"] == pytest.approx(
        math.sqrt(1604 / 3 - 14**2)
    )
    output = torch.tensor([[1.0], [0.0]])
    prediction = task.predict(output, SIZE)
    assert prediction[:, 0].tolist() == pytest.approx([task.label_statistics["scale_deg"], 0.0])
    metrics = task.metrics()
    metrics.update(torch.tensor([[10.0], [-10.0]]), torch.tensor([[12.0], [-40.0]]))
    scores = metrics.compute()
    assert scores["mae"] == 16 and scores["mae/5-20deg"] == 2 and scores["mae/20-60deg"] == 30
    assert "mae/horizon" not in scores
    assert task.skill(5.0, 10.0) == 0.5


def test_depth_trains_and_scores_within_its_cap_alone():
    task = Depth()
    near, far = torch.tensor([[[10.0, 0.0, 80.0]]]), torch.tensor([[[0.0, 80.5, 200.0]]])
    assert task.count(torch.cat([near, far, near])).tolist() == [1, 0, 1]
    assert task.loss(torch.randn(1, 1, 3), far).item() == 0
    metrics = task.metrics()
    metrics.update(torch.ones(1, 1, 3), far)
    assert metrics.compute() == {"abs_rel": None}


def test_depth_metrics_by_hand():
    metrics = DepthMetrics(80.0)
    # one image of two points and one of one: images weigh the same, not points
    prediction = torch.tensor([[[12.0, 30.0, 5.0]], [[500.0, 5.0, 5.0]]])
    metrics.update(prediction, torch.tensor([[[10.0, 40.0, 0.0]], [[50.0, 0.0, 0.0]]]))
    scores = metrics.compute()
    assert scores["abs_rel"] == pytest.approx(((0.2 + 0.25) / 2 + 0.6) / 2)  # 500 m is clamped to 80
    assert scores["sq_rel"] == pytest.approx(((0.4 + 2.5) / 2 + 18) / 2)
    assert scores["rmse"] == pytest.approx((math.sqrt((4 + 100) / 2) + 30) / 2)
    assert scores["mae"] == pytest.approx((6 + 30) / 2)
    assert scores["delta1"] == pytest.approx((0.5 + 0) / 2)  # 12/10 is below 1.25, 40/30 and 80/50 are not
    assert scores["delta2"] == pytest.approx((1 + 0) / 2)
    assert scores["delta3"] == 1
    assert scores["abs_rel/0-20m"] == pytest.approx(0.2)
    assert scores["abs_rel/20-40m"] == pytest.approx(0.25)
    assert scores["abs_rel/40-80m"] == pytest.approx(0.6)
    logs = [math.log(1.2), math.log(0.75)]
    spread = math.sqrt(sum(value**2 for value in logs) / 2 - (sum(logs) / 2) ** 2)
    assert scores["silog"] == pytest.approx(100 * spread / 2)  # a single point has no spread


def test_locations_in_an_ignored_box_are_neither_positive_nor_background():
    task = Detection()
    target = task.transform(make_boxes(), SAME)
    locations = locate_cells(SIZE[::-1], task.box_coder.strides)
    x1, y1, x2, y2 = 90, 5, 120, 30  # the box of unknown class
    inside = (locations > torch.tensor([x1, y1])).all(dim=1) & (locations < torch.tensor([x2, y2])).all(dim=1)
    prepared = default_collate([task.prepare_loss(target)])
    rows, ignored = prepared["match"][0], prepared["match"][0] == IGNORED
    assert (ignored | (rows >= 0))[inside].all() and ignored[inside].any()

    def loss_with(places):
        output = make_output(target, task)
        output.classes[0, places] = 3.0
        return task.loss(output, prepared).item()

    silent = loss_with(torch.zeros_like(ignored))
    assert loss_with(ignored) == pytest.approx(silent)
    background = ~ignored & (rows < 0)
    assert loss_with(background) > silent + 1


def test_a_frame_known_to_be_empty_teaches_that_there_is_nothing():
    task = Detection()
    batch = default_collate([task.prepare_loss(task.transform([], SAME))])
    quiet = make_output(task.transform([], SAME), task)
    loud = quiet._replace(classes=quiet.classes + 15)
    assert task.loss(quiet, batch).item() < 1e-3 < 1 < task.loss(loud, batch).item()
    # and it is scored: what is found there is wrong
    metrics = task.metrics()
    seen = task.transform(make_boxes()[:1], SAME)
    right = {"boxes": seen["boxes"][:1], "scores": torch.tensor([0.5]), "labels": seen["classes"][:1]}
    metrics.update([right], default_collate([seen]))
    assert metrics.compute()["ap"] == pytest.approx(1.0)
    metrics.update([right | {"scores": torch.tensor([0.9])}], batch)
    assert metrics.compute()["ap"] < 0.6


def test_classes_can_be_merged_by_the_config():
    task = Detection(Detection.Options(classes={"Wheels": ["bicycle", "Motorcycle"], "Feet": ["Pedestrian"]}))
    assert task.names == ("Wheels", "Feet") and task.head_arguments() == {"classes": 2}
    boxes = [
        ([10 * i, 0, 10 * i + 9, 20 - i], name) for i, name in enumerate(["Motorcycle", "Car", "Pedestrian", "Ufo"])
    ]
    target = task.transform([{"box": box, "class": name, "visible": 1.0} for box, name in boxes], SAME)
    # a class in no group is as one that is unknown
    assert target["classes"][:5].tolist() == [0, IGNORED, 1, IGNORED, -1]
    assert target["known"][:5].tolist() == [0, -1, 1, -1, -1]


@pytest.mark.parametrize(
    ("classes", "problem"),
    [
        ("megred", "must be all, merged, object, or a mapping {group: [class, ...], ...}"),
        ({}, "must be all, merged, object, or a mapping"),
        ({"A": "Car"}, "must be all, merged, object, or a mapping"),
        ({"A": []}, "group A is empty"),
        ({"A": ["Car", "Pedestrain"]}, "group A has the unknown class 'Pedestrain'; did you mean 'Pedestrian'?"),
        ({"A": ["Ufo"]}, "group A has the unknown class 'Ufo'; there are Car, Pedestrian, "),
        ({"A": ["Car"], "B": ["Bus", "car"]}, "'car' is in A and again in B: leave it in one of them"),
    ],
)
def test_classes_that_cannot_be_merged_are_named(tmp_path, classes, problem):
    (tmp_path / "x.yaml").write_text(json.dumps({"tasks": {"detection": {"classes": classes}}}))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "x.yaml", [], {"detection": Detection.Options})
    (line,) = caught.value.problems
    assert "tasks.detection.classes = " in line and problem in line


def test_merged_classes_survive_saving(tmp_path):
    (tmp_path / "x.yaml").write_text("tasks: {detection: {classes: {Z: [Car], A: [Bus, Truck]}}}")
    config = load_config(tmp_path / "x.yaml", [], {"detection": Detection.Options})
    save_config(config, tmp_path / "saved.yaml")
    again = load_config(tmp_path / "saved.yaml", ["run=x"], {"detection": Detection.Options})
    assert again == config and Detection(again.tasks["detection"]).names == ("Z", "A")
    header = json.loads(json.dumps(config.tasks["detection"].model_dump(mode="json")))
    assert Detection(Detection.Options(**header)).names == ("Z", "A")


def test_the_box_grid_has_no_options_for_its_head():
    with pytest.raises(ValueError, match="is for box_coder: dense; the box grid's head has no options"):
        Detection.Options(box_coder="grid", head={"width": 64})
    assert Detection.Options(box_coder="grid").head == Detection.Options().head


def test_of_too_many_boxes_the_largest_stay():
    task = Detection(Detection.Options(max_boxes=3))
    sides = [20, 50, 10, 40, 30]
    label = [{"box": [0, 0, side, side], "class": "Car", "visible": 1.0} for side in sides]
    target = task.transform(label, SAME)
    assert task.collate([target, task.transform([], SAME)])["boxes"][0, :, 2].tolist() == [50, 40, 30, 20, 10]  # scored
    largest = task.transform([label[index] for index in (1, 3, 4)], SAME)
    trained, wanted = (task.collate([task.prepare_loss(each)]) for each in (target, largest))
    assert torch.equal(trained["match"].clamp(min=BACKGROUND), wanted["match"])  # where the others lie is ignored
    assert (trained["match"] == IGNORED).any()
    assert task.count(trained) > 0


@pytest.mark.parametrize("box_coder", ["dense", "grid"])
def test_boxes_beyond_the_limit_are_neither_learned_nor_background(box_coder):
    """Ignored boxes, of whatever size, take no place of those that are learned."""
    task = Detection(Detection.Options(max_boxes=1, box_coder=box_coder))
    ignored, learned, beyond = ([left, 4, left + side, 4 + side] for left, side in ((0, 40), (48, 32), (96, 24)))
    label = [
        {"box": ignored, "class": "Car", "visible": 0.0},
        {"box": learned, "class": "Car", "visible": 1.0},
        {"box": beyond, "class": "Car", "visible": 1.0},
    ]
    target = task.transform(label, SAME)
    strides = [2**power for power in range(3, 8)]
    head = task.head({f"neck.{stride}": 8 for stride in strides})
    output = head(
        {f"neck.{stride}": torch.rand(1, 8, *count_cells(SIZE[::-1], stride)) for stride in strides}, SIZE[::-1]
    )

    def find_loss(classes):
        own = task.collate([task.prepare_loss(target | {"classes": torch.tensor(classes)})])
        return task.loss(output, own).item()

    given = target["classes"].tolist()
    assert given[:3] == [IGNORED, 0, 0]
    assert find_loss(given) == find_loss([IGNORED, 0, IGNORED, *given[3:]]) != find_loss([IGNORED, 0, -1, *given[3:]])
    assert int(task.count(task.collate([task.prepare_loss(target)]))) > 0


def test_limits_of_training_never_cut_the_truth_that_is_scored():
    task = Detection(Detection.Options(max_boxes=5))
    boxes = [[12 * index, 0, 12 * index + 10, 20 + index] for index in range(10)]
    target = task.collate(
        [task.transform([{"box": box, "class": "Car", "visible": 1.0} for box in boxes], Geometry.identity((128, 64)))]
    )
    five = torch.tensor(boxes[5:]).float()
    metrics = task.metrics()
    metrics.update([{"boxes": five, "scores": torch.ones(5), "labels": torch.zeros(5, dtype=torch.int64)}], target)
    assert metrics.compute()["ap"] == pytest.approx(51 / 101, abs=1e-6)


def test_boxes_that_a_crop_cuts_away_are_ignored_or_gone():
    task = Detection(Detection.Options(min_visible=0.4))
    right_half = Geometry(SIZE, (64, 0, 64, 64), (64, 64))
    label = [
        {"box": [0, 0, 60, 60], "class": "Car", "visible": 1.0},  # outside
        {"box": [44, 0, 74, 60], "class": "Car", "visible": 1.0},  # a third is left
        {"box": [54, 0, 104, 60], "class": "Car", "visible": 0.45},  # 4/5 of what was visible
        {"box": [80, 0, 110, 60], "class": "Car", "visible": 1.0},
    ]
    target = task.transform(label, right_half)
    assert target["boxes"][:4].tolist() == [[0, 0, 40, 60], [16, 0, 46, 60], [0, 0, 10, 60], [0, 0, 0, 0]]
    assert target["classes"][:4].tolist() == [IGNORED, 0, IGNORED, -1]


def test_skill_is_zero_at_the_constant_and_one_when_perfect():
    for name in ("depth", "steering"):
        assert TASKS[name]().skill(4.0, 4.0) == 0 and TASKS[name]().skill(0.0, 4.0) == 1
    for name in ("segmentation", "detection"):
        assert TASKS[name]().skill(0.3, 0.1) == 0.3


@pytest.mark.parametrize("name, constant", [("steering", 0.0), ("steering", 0.15), ("depth", 0.0)])
def test_there_is_no_skill_where_the_constant_is_within_the_labels_resolution(name, constant):
    assert TASKS[name]().skill(0.0085, constant) is None
    scores = {name: {"headline": "mae", "better": "lower", "unit": "", "score": 0.0085, "constant": constant}}
    scores[name] |= {"skill": None, "frames": 3, "metrics": {}}
    assert mean_skill(scores) is None and "resolution of the labels" in format_table({"run": scores})


def test_one_task_has_at_most_its_share_in_the_mean_skill():
    assert mean_skill({"a": {"skill": -8e6}, "b": {"skill": 0.5}, "c": {"skill": None}}) == -0.25


def test_a_stray_pixel_does_not_rule_the_class_weights():
    label = np.zeros((1000, 1000), np.uint8)
    label[0, 0] = 3
    for balance, most in ((0.5, 32), (1.0, 1000)):
        task = Segmentation(Segmentation.Options(class_balance=balance))
        task.collect_statistics([label])
        assert max(task.label_statistics["class_weights"]) <= most


def test_ap_uses_cocos_thresholds_in_double_precision():
    """Five boxes, of which three are found at once and a fourth at rank 64: recall is 0.6 and 0.8, on thresholds."""
    boxes = torch.tensor([[20.0 * index, 0, 20 * index + 15, 30] for index in range(5)])
    task = Detection()
    target = task.collate([task.transform([{"box": b, "class": "Car", "visible": 1} for b in boxes.tolist()], SAME)])
    wrong = torch.tensor([[0.0, 40, 15, 60]]).repeat(60, 1)
    found = torch.cat([boxes[:3], wrong, boxes[3:4]])
    metrics = task.metrics()
    metrics.update([{"boxes": found, "scores": torch.linspace(1, 0.1, 64), "labels": torch.zeros(64).long()}], target)
    # COCO: 61 thresholds up to a recall of 0.6 with precision 1, and 20 up to 0.8 with 4 of 64
    assert metrics.compute()["ap50"] == pytest.approx((61 + 20 * 4 / 64) / 101, abs=1e-6)


def test_class_weights_favour_rare_classes_and_keep_the_mean():
    label = np.array([[1] * 90 + [2] * 9 + [3]], np.uint8)
    task = Segmentation(Segmentation.Options(class_balance=0.5))
    task.collect_statistics([label])
    weights = np.array(task.label_statistics["class_weights"])
    assert weights[3] / weights[1] == pytest.approx(90**0.5) and weights[2] / weights[1] == pytest.approx(10**0.5)
    assert (weights[1] * 90 + weights[2] * 9 + weights[3]) / 100 == pytest.approx(1)
    alike = Segmentation()
    alike.collect_statistics([label])
    assert alike.label_statistics["class_weights"] == pytest.approx([1.0] * 19)
