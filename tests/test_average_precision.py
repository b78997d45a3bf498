"""Detection's AP against COCO's own evaluation on many random sets."""

import contextlib

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tasks.detection import IGNORED, PADDING, Detection

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
                about = {"id": len(truths) + 1, "iscrowd": int(ignored), "area": 1.0}
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
    table = evaluation.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, classes; all sizes, 100 detections
    there = [number for number in range(len(CLASSES)) if (table[:, :, number] > -1).all()]
    scores = {"ap": table[:, :, there].mean(), "ap50": table[0][:, there].mean(), "ap75": table[5][:, there].mean()}
    return scores | {f"ap/{CLASSES[number]}": table[:, :, number].mean() for number in there}


def make_annotation(image, category, box):
    x1, y1, x2, y2 = box
    return {"image_id": image, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1]}


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
    return metrics.compute()


def test_average_precision_is_that_of_coco_on_random_sets():
    compared = 0
    for seed in range(300):
        frames = draw_set(np.random.default_rng(seed))
        if all(crowd.all() for *_, crowd in frames):
            assert score(frames)["ap"] is None
            continue
        ours, theirs = score(frames), evaluate_by_coco(frames)
        assert {name for name, value in ours.items() if value is not None} - {"best_iou"} == set(theirs), seed
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
