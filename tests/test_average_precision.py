"""Detection's AP against COCO's evaluation, written out plainly, on many random sets."""

import numpy as np
import pytest
import torch

from tasks.detection import IGNORED, PADDING, Detection

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
CLASSES = ("small", "large", "round")
MOST = 100  # detections of a class that count in an image
FLOOR = 8.0  # pixels, the default of the protocol
TASK = Detection(Detection.Options(classes={"small": ["Car"], "large": ["Truck"], "round": ["Bicycle"]}))


def measure_overlaps(found, truth, crowd):
    """IoU of each detection with each box; with a crowd, the share of the detection that is in it."""
    overlaps = np.zeros((len(found), len(truth)))
    for i, (x1, y1, x2, y2) in enumerate(found.tolist()):  # in double precision
        for j, (u1, v1, u2, v2) in enumerate(truth.tolist()):
            common = max(0.0, min(x2, u2) - max(x1, u1)) * max(0.0, min(y2, v2) - max(y1, v1))
            area, other = (x2 - x1) * (y2 - y1), (u2 - u1) * (v2 - v1)
            overlaps[i, j] = common / (area if crowd[j] else area + other - common)
    return overlaps


def match(overlaps, crowd, threshold):
    """For the detections of an image, best first: 1 for a hit, 0 for a miss, None for one that does not count.

    Each takes the free box with which it overlaps most, of equal ones the last, a crowd only where no other box fits; a
    crowd stays free.
    """
    order = [j for j in range(len(crowd)) if not crowd[j]] + [j for j in range(len(crowd)) if crowd[j]]
    taken, results = set(), []
    for row in overlaps:
        best, chosen = min(threshold, 1 - 1e-10), None
        for j in order:
            if j in taken and not crowd[j]:
                continue
            if chosen is not None and not crowd[chosen] and crowd[j]:
                break
            if row[j] >= best:
                best, chosen = row[j], j
        if chosen is None:
            results.append(0)
        elif crowd[chosen]:
            results.append(None)
        else:
            taken.add(chosen)
            results.append(1)
    return results


def average_precision(images, threshold):
    """AP of one class; None where no image has a box of it that is no crowd."""
    scores, results, positives = [], [], 0
    for found, confidence, truth, crowd in images:
        order = np.argsort(-confidence, kind="mergesort")[:MOST]
        positives += sum(not each for each in crowd)
        hits = match(measure_overlaps(found[order], truth, crowd), crowd, threshold)
        scores += confidence[order].tolist()
        results += hits
    if positives == 0:
        return None
    order = np.argsort(-np.array(scores), kind="mergesort")
    hits = np.array([results[index] for index in order if results[index] is not None], dtype=float)
    true = np.cumsum(hits)
    recall, precision = true / positives, true / np.arange(1, len(hits) + 1)
    for index in range(len(precision) - 1, 0, -1):
        precision[index - 1] = max(precision[index - 1], precision[index])
    places = np.searchsorted(recall, RECALLS, side="left")
    return float(np.mean([precision[place] if place < len(precision) else 0.0 for place in places]))


def evaluate_plainly(frames):
    """`ap`, `ap50`, `ap75` and `ap/<class>`, as COCO's summary has them.

    A box of unknown class is a crowd of every class. Detections below the floor of size count nowhere; COCO itself has
    no such rule.
    """
    by_class = {}
    for number, name in enumerate(CLASSES):
        images = []
        for found, scores, labels, truth, known, crowd in frames:
            mine = (labels == number) & ((found[:, 2:] - found[:, :2]) >= FLOOR).all(axis=1)
            # ignored boxes come last; the order of the others decides between equal overlaps
            own = np.concatenate([np.flatnonzero(known == number), np.flatnonzero(known < 0)])
            images.append((found[mine], scores[mine], truth[own], crowd[own].tolist()))
        values = [average_precision(images, threshold) for threshold in THRESHOLDS]
        if values[0] is not None:
            by_class[name] = values
    table = np.array(list(by_class.values()))
    scores = {"ap": float(table.mean()), "ap50": float(table[:, 0].mean()), "ap75": float(table[:, 5].mean())}
    return scores | {f"ap/{name}": float(np.mean(values)) for name, values in by_class.items()}


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
        ours, plain = score(frames), evaluate_plainly(frames)
        assert {name for name, value in ours.items() if value is not None} - {"best_iou"} == set(plain), seed
        for name, value in plain.items():
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
    ours, plain = score(frames), evaluate_plainly(frames)
    assert ours["ap"] == pytest.approx(plain["ap"], abs=1e-6) and 0 < plain["ap"] < 0.6


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
    ours, plain = score(frames), evaluate_plainly(frames)
    assert plain["ap"] == pytest.approx(expected) and ours["ap"] == pytest.approx(expected, abs=1e-6)
