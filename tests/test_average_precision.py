"""Detection's AP against COCO's own evaluation on many random sets."""

import contextlib

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tasks.box_scores import ImageBoxes, match_images, measure_calibration, measure_precision, split_errors
from tasks.detection import IGNORED, PADDING, SIZES, Detection

CLASSES = ("small", "large", "round")
FLOOR = 8.0  # pixels, the default of the protocol
TASK = Detection(Detection.Options(classes={"small": ["Car"], "large": ["Truck"], "round": ["Bicycle"]}))


def evaluate_by_coco(frames):
    """`ap`, `ap50`, `ap75` and `ap/<class>`, by COCO's own code.

    A box of unknown class is a crowd of every class. Detections below the floor of size count nowhere; COCO itself has
    no such rule, so they are not given to it.
    """
    truths, detections = [], []
    for image, (found, scores, labels, truth, known, crowd) in enumerate(frames, 1):
        for box, own, ignored in zip(truth.tolist(), known.tolist(), crowd.tolist(), strict=True):
            for each in range(len(CLASSES)) if own < 0 else [own]:
                about = {"id": len(truths) + 1, "iscrowd": int(ignored)}
                truths.append(about | make_annotation(image, each, box))
        for box, confidence, own in zip(found.tolist(), scores.tolist(), labels.tolist(), strict=True):
            if min(box[2] - box[0], box[3] - box[1]) >= FLOOR:
                detections.append(make_annotation(image, own, box) | {"score": confidence})
    dataset = {
        "info": {},
        "images": [{"id": image} for image in range(1, len(frames) + 1)],
        "annotations": truths,
        "categories": [{"id": number} for number in range(len(CLASSES))],
    }
    with contextlib.redirect_stdout(None):
        coco = COCO()
        coco.dataset = dataset
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(detections) if detections else COCO(), "bbox")
        evaluation.params.imgIds = [each["id"] for each in dataset["images"]]
        evaluation.params.catIds = [each["id"] for each in dataset["categories"]]
        evaluation.evaluate()
        evaluation.accumulate()
    tables = evaluation.eval["precision"][..., -1]  # thresholds, recalls, classes, sizes; 100 detections
    table = tables[:, :, :, 0]
    there = [number for number in range(len(CLASSES)) if (table[:, :, number] > -1).all()]
    scores = {"ap": table[:, :, there].mean(), "ap50": table[0][:, there].mean(), "ap75": table[5][:, there].mean()}
    scores |= {f"ap/{CLASSES[number]}": table[:, :, number].mean() for number in there}
    sizes = ((size, tables[:, :, :, place]) for place, size in enumerate(SIZES, 1))
    scores |= {f"ap_{size}": values[values > -1].mean() for size, values in sizes if (values > -1).any()}
    recall = evaluation.eval["recall"][:, :, 0, -1]
    return scores | {"ar100": recall[recall > -1].mean()}


def make_annotation(image, category, box):
    x1, y1, x2, y2 = box
    box = [x1, y1, x2 - x1, y2 - y1]
    return {"image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]}


def draw_boxes(rng, count, smallest, largest):
    corners = rng.uniform(0, 60, (count, 2))
    return np.concatenate([corners, corners + rng.uniform(smallest, largest, (count, 2))], axis=1)


def draw_set(rng):
    """Frames of (detections, scores, labels, boxes, classes, whether a crowd): some empty, some of few classes.

    Crowds are boxes that are hidden, too small or of unknown class (-1). Coordinates in whole steps of 5 pixels, which
    every second set has, bring equal overlaps and overlaps that are exactly a threshold.
    """
    frames = []
    classes = rng.choice(3, size=rng.integers(1, 4), replace=False)
    coarse = rng.random() < 0.5
    for _ in range(rng.integers(1, 6)):
        count = int(rng.integers(0, 6))
        truth = draw_boxes(rng, count, 11, 40)
        small = rng.random(count) < 0.1
        truth[small, 2:] = truth[small, :2] + 5
        known = np.where(rng.random(count) < 0.1, -1, rng.choice(classes, size=count))
        crowd = (rng.random(count) < 0.2) | (known < 0) | small
        near = truth[rng.integers(0, count, rng.integers(0, 12))] if count else np.zeros((0, 4))
        near = near + rng.normal(0, 2.0, near.shape)
        found = np.concatenate([near, draw_boxes(rng, rng.integers(0, 4), 3, 40)])
        if coarse:
            truth, found = (np.round(boxes / 5) * 5 for boxes in (truth, found))
            found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 5)
        scores = rng.choice([0.9, 0.8, 0.55, 0.5, 0.3, 0.1], len(found)).astype(np.float32)  # many ties
        labels = rng.integers(0, 3, len(found))
        frames.append((found.astype(np.float32), scores, labels, truth.astype(np.float32), known, crowd))
    return frames


def score(frames):
    return collect(frames).compute()


def collect(frames):
    metrics = TASK.metrics()
    for found, scores, labels, truth, known, crowd in frames:
        small = ((truth[:, 2:] - truth[:, :2]) < FLOOR).any(axis=1)
        assert crowd[small | (known < 0)].all()
        target = TASK.blank((128, 128), len(truth))
        target["boxes"][: len(truth)] = torch.from_numpy(truth)
        target["classes"][: len(truth)] = torch.from_numpy(np.where(crowd, IGNORED, known))
        target["known"][: len(truth)] = torch.from_numpy(known)
        # what is small or of unknown class is ignored though it can be seen
        target["visible"][: len(truth)] = torch.from_numpy(np.where(crowd & ~small & (known >= 0), 0.0, 1.0)).float()
        assert (target["classes"][len(truth) :] == PADDING).all()
        prediction = {
            "boxes": torch.from_numpy(found),
            "scores": torch.from_numpy(scores),
            "labels": torch.from_numpy(labels),
        }
        metrics.update([prediction], TASK.collate([target]))
    return metrics


def test_average_precision_is_that_of_coco_on_random_sets():
    compared = 0
    for seed in range(300):
        frames = draw_set(np.random.default_rng(seed))
        if all(crowd.all() for *_, crowd in frames):
            assert score(frames)["ap"] is None
            continue
        ours, theirs = score(frames), evaluate_by_coco(frames)
        assert {name for name, value in ours.items() if value is not None and name.startswith("a")} == set(theirs), seed
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, abs=1e-6), (seed, name)
        compared += 1
    assert compared >= 200


def test_detections_beyond_a_hundred_of_a_class_do_not_count():
    rng = np.random.default_rng(0)
    truth = np.array([[10.0, 10, 40, 40], [50, 50, 90, 90]], np.float32)
    corners = rng.uniform(0, 40, (150, 2))
    found = np.concatenate([np.concatenate([corners, corners + 12], axis=1), truth]).astype(np.float32)
    scores = np.concatenate([np.linspace(0.9, 0.3, 150), [0.95, 0.2]]).astype(np.float32)  # the second comes last
    frames = [(found, scores, np.zeros(152, int), truth, np.zeros(2, int), np.zeros(2, bool))]
    ours, theirs = score(frames), evaluate_by_coco(frames)
    assert ours["ap"] == pytest.approx(theirs["ap"], abs=1e-6) and 0 < theirs["ap"] < 0.6


@pytest.mark.parametrize(("hit_first", "expected"), [(True, 1.0), (False, 0.5)])
@pytest.mark.parametrize("images", [1, 2])
def test_of_equal_scores_the_detection_given_first_ranks_first(images, hit_first, expected):
    """COCO sorts by score and keeps the order of ties: within an image as given, then image after image."""
    hit, miss = [10.0, 10, 40, 40], [60.0, 60, 90, 90]
    order = [hit, miss] if hit_first else [miss, hit]
    parts = [order] if images == 1 else [[order[0]], [order[1]]]
    frames = []
    for boxes in parts:
        truth = np.array([hit] if hit in boxes else np.zeros((0, 4)), np.float32)
        nothing = np.zeros(len(boxes), int)
        scores = np.full(len(boxes), 0.5, np.float32)
        known = np.zeros(len(truth), int)
        frames.append((np.array(boxes, np.float32), scores, nothing, truth, known, known.astype(bool)))
    ours, theirs = score(frames), evaluate_by_coco(frames)
    assert theirs["ap"] == pytest.approx(expected) and ours["ap"] == pytest.approx(expected, abs=1e-6)


def test_average_precision_of_frames_that_count_several_times_is_that_of_copies():
    """Against COCO's own code on copies of the frames; a count of 0 leaves a frame out. Without equal scores in a
    frame, whose copies COCO would sort one copy after the other."""
    rng = np.random.default_rng(0)
    compared = 0
    for seed in range(60):
        frames = [
            (found, (scores + rng.uniform(0, 1e-3, len(scores))).astype(np.float32), *others)
            for found, scores, *others in draw_set(np.random.default_rng(seed))
        ]
        counts = rng.integers(0, 4, (3, len(frames))).astype(np.float64)
        values = collect(frames).resample(np.concatenate([counts, np.ones((1, len(frames)))]))
        copies = [
            [frame for frame, times in zip(frames, row, strict=True) for _ in range(int(times))] for row in counts
        ]
        for value, drawn in zip(values, [*copies, frames], strict=True):
            if all(crowd.all() for *_, crowd in drawn):
                assert np.isnan(value)
            else:
                assert value == pytest.approx(evaluate_by_coco(drawn)["ap"], abs=1e-6), seed
                compared += 1
    assert compared > 120


def test_the_score_of_a_frame_alone_is_that_of_a_set_of_it():
    frames = [frame for seed in range(20) for frame in draw_set(np.random.default_rng(seed))]
    for frame, value in zip(frames, collect(frames).score_frames(), strict=True):
        expected = None if frame[-1].all() else evaluate_by_coco([frame])["ap"]
        assert value == (None if expected is None else pytest.approx(expected, abs=1e-6))


def test_more_thresholds_and_chunks_change_nothing():
    frames = draw_set(np.random.default_rng(5))
    matches = match_images(collect(frames).images)
    counts = np.random.default_rng(1).integers(0, 3, (7, len(frames))).astype(np.float64)
    whole = measure_precision(matches, 3, counts)
    assert np.array_equal(whole, measure_precision(matches, 3, counts, room=1), equal_nan=True)


def box(x, y, size=20.0):
    return [x, y, x + size, y + size]


def split(found, labels, truth, classes, scores=None):
    found, truth = (np.array(boxes, np.float32).reshape(-1, 4) for boxes in (found, truth))
    scores = np.linspace(0.9, 0.5, len(found)).astype(np.float32) if scores is None else np.array(scores, np.float32)
    classes = np.array(classes, int)
    image = ImageBoxes(found, scores, np.array(labels, int), truth, classes, np.zeros(len(classes), bool))
    return split_errors([image], 3)


def test_every_error_of_a_box_is_of_its_kind():
    truth, classes = [box(0, 0), box(50, 50)], [0, 1]
    cases = {
        "class": ([box(0, 0), box(50, 50)], [0, 2]),
        "place": ([box(0, 0), box(60, 50)], [0, 1]),  # IoU 1/3
        "both": ([box(0, 0), box(60, 50)], [0, 2]),
        "duplicate": ([box(0, 0), box(1, 0), box(50, 50)], [0, 0, 1]),
        "background": ([box(0, 0), box(50, 50), box(90, 0)], [0, 1, 1]),
        "missed": ([box(0, 0)], [0]),
    }
    for kind, (found, labels) in cases.items():
        errors = split(found, labels, truth, classes)
        counted = {name: error["count"] for name, error in errors.items() if error["count"]}
        assert counted == ({kind: 1.0, "missed": 1.0} if kind == "both" else {kind: 1.0})
    nothing = split([box(0, 0), box(50, 50)], [0, 1], truth, classes)
    assert all(error == {"count": 0.0, "loss": 0.0} for error in nothing.values())


def test_what_an_error_costs_is_what_its_repair_would_gain():
    truth, classes = [box(0, 0), box(50, 50)], [0, 1]
    # class 0 is found, class 1 is not: AP50 is 1/2
    for kind, found, label in (("class", box(50, 50), 2), ("place", box(60, 50), 1)):
        errors = split([box(0, 0), found], [0, label], truth, classes)
        assert errors[kind]["loss"] == pytest.approx(0.5) and errors["missed"]["loss"] == 0
    assert split([box(0, 0)], [0], truth, classes)["missed"]["loss"] == pytest.approx(0.5)
    # two of class 0, a false one between them: precision 1 up to recall 0.5, then 2/3
    errors = split([box(0, 0), box(90, 90), box(50, 50)], [0, 0, 0], truth, [0, 0])
    assert errors["background"]["loss"] == pytest.approx(50 / 101 / 3, abs=1e-9)
    # the better of two wrong classes is the repair, and the other goes
    errors = split([box(0, 0), box(50, 50), box(51, 50)], [0, 2, 0], truth, classes)
    assert errors["class"] == {"count": 2.0, "loss": pytest.approx(0.5)}
    # where both kinds are wrong about one box, the repair is that of the higher score, as in TIDE's own program
    errors = split([box(0, 0), box(50, 50), box(60, 50)], [0, 2, 1], truth, classes)
    assert errors["class"] == {"count": 1.0, "loss": pytest.approx(0.5)} and errors["place"] == {
        "count": 1.0,
        "loss": 0.0,
    }


def test_calibration_is_the_mean_distance_of_score_and_hits():
    score_of = np.array([0.95, 0.95, 0.35, 0.31, 1.0])
    correct = np.array([True, False, True, False, True])
    # the bin from 0.9: three with the sum 2.9, two of them correct; that from 0.3: two with the sum 0.66, one correct
    expected = (abs(2.9 - 2) + abs(0.66 - 1)) / 5
    assert measure_calibration(score_of, correct) == pytest.approx(expected)
    assert measure_calibration(np.zeros(0), np.zeros(0, bool)) is None
