"""What becomes of predicted boxes: matches with the ground truth as COCO makes them, and the scores made of matches.

Average precision is measured by a library (tasks/detection.py). What it cannot do is here: average precision of frames
that count several times, as a bootstrap draws them; precision and recall at every score; why predictions are wrong,
after TIDE (arXiv 2008.08115); and how far scores are off as probabilities (arXiv 2004.13546, confidence alone).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the IoU
RECALLS = np.linspace(0.0, 1.0, 101)
LIMIT = 100  # predictions of a class in an image, the top-scoring
BACKGROUND_IOU = 0.1  # a wrong prediction that overlaps no object more than that is on the background
CALIBRATION_BINS = 10

NO_TRUTH, IS_MATCHED, IS_IGNORED = -1, 1, 2
ERRORS = ("class", "place", "both", "duplicate", "background", "missed")


@dataclass(frozen=True)
class ImageBoxes:
    """The boxes of one image. Predictions: `boxes` (n, 4) as edges in pixels, `scores` (n,), `labels` (n,). Ground
    truth: `truth` (m, 4), `classes` (m,), and whether a box is `ignored` (m,), a crowd in COCO's words."""

    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    labels: Int64[np.ndarray, " n"]
    truth: Float[np.ndarray, "m 4"]
    classes: Int64[np.ndarray, " m"]
    ignored: Bool[np.ndarray, " m"]


@dataclass(frozen=True)
class Matches:
    """What became of each of n predictions of one or more images with m boxes, at each of T thresholds.

    `image` (n,): which image; `label`, `score` (n,). `correct` and `ignored` (T, n): whether it has a box of its class
    to itself, or lies in an ignored one; else it is wrong. `row` (n,): the box, counted in its image, that it has at
    the first threshold, else NO_TRUTH; `index` (n,): its own place in its image. `truth_image`, `truth_class` (m,): of
    the boxes that are not ignored. `found` (m,): whether they are at the first threshold.
    """

    image: Int64[np.ndarray, " n"]
    label: Int64[np.ndarray, " n"]
    score: Float64[np.ndarray, " n"]
    correct: Bool[np.ndarray, "T n"]
    ignored: Bool[np.ndarray, "T n"]
    row: Int64[np.ndarray, " n"]
    index: Int64[np.ndarray, " n"]
    truth_image: Int64[np.ndarray, " m"]
    truth_class: Int64[np.ndarray, " m"]
    found: Bool[np.ndarray, " m"]


def measure_overlaps(
    boxes: Float[np.ndarray, "n 4"], truth: Float[np.ndarray, "m 4"], ignored: Bool[np.ndarray, " m"]
) -> Float64[np.ndarray, "n m"]:
    """The IoU of each pair; with an ignored box the share of the prediction that lies in it, as COCO has it for crowds.

    0 for boxes without an area.
    """
    boxes, truth = boxes.astype(np.float64), truth.astype(np.float64)
    low = np.maximum(boxes[:, None, :2], truth[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], truth[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    own, theirs = ((each[:, 2:] - each[:, :2]).prod(axis=1) for each in (boxes, truth))
    whole = np.where(ignored[None], own[:, None], own[:, None] + theirs[None] - common)
    return np.divide(common, whole, out=np.zeros_like(common), where=whole > 0)


def match_images(images: Sequence[ImageBoxes], thresholds: Float64[np.ndarray, " T"] = THRESHOLDS) -> Matches:
    """Match the predictions of images with their boxes, class by class, the top-scoring prediction first.

    A prediction takes, of the boxes of its class that are free and overlap it by the threshold or more, the one that
    overlaps it most; if there is none, an ignored one, which stays free for others.
    """
    parts = [_match_image(number, image, thresholds) for number, image in enumerate(images)]
    names = Matches.__dataclass_fields__
    if not parts:
        return Matches(**{name: _make_empty(name, len(thresholds)) for name in names})
    return Matches(**{name: np.concatenate([part[name] for part in parts], axis=-1) for name in names})


def _make_empty(name: str, thresholds: int) -> np.ndarray:
    if name in ("correct", "ignored"):
        return np.zeros((thresholds, 0), dtype=bool)
    return np.zeros(0, dtype={"score": np.float64, "found": bool}.get(name, np.int64))


def _match_image(number: int, image: ImageBoxes, thresholds: np.ndarray) -> dict[str, np.ndarray]:
    order = np.argsort(-image.scores.astype(np.float64), kind="stable")
    counted = np.zeros(len(order), dtype=bool)  # of each class the top-scoring
    for label in np.unique(image.labels):
        counted[order[image.labels[order] == label][:LIMIT]] = True
    order = order[counted[order]]
    overlaps = measure_overlaps(image.boxes, image.truth, image.ignored)
    correct = np.zeros((len(thresholds), len(order)), dtype=bool)
    ignored = np.zeros_like(correct)
    rows = np.full(len(order), NO_TRUTH, dtype=np.int64)
    taken = np.zeros((len(thresholds), len(image.truth)), dtype=bool)
    # COCO's own tolerance, so that an overlap of exactly a threshold is one on every machine
    enough = np.minimum(thresholds, 1 - 1e-10)[:, None]
    for position, index in enumerate(order):
        same = np.flatnonzero(image.classes == image.labels[index])
        if not len(same):
            continue
        reached = overlaps[index, same] >= enough
        free = reached & ~image.ignored[same] & ~taken[:, same]
        # of equal overlaps the last, as in COCO's code
        best = same[len(same) - 1 - np.where(free, overlaps[index, same], -1.0)[:, ::-1].argmax(axis=1)]
        hit = free.any(axis=1)
        correct[:, position] = hit
        taken[hit, best[hit]] = True
        ignored[:, position] = ~hit & (reached & image.ignored[same]).any(axis=1)
        if hit[0]:
            rows[position] = best[0]
    wanted = ~image.ignored
    return {
        "image": np.full(len(order), number, dtype=np.int64),
        "label": image.labels[order].astype(np.int64),
        "score": image.scores[order].astype(np.float64),
        "correct": correct,
        "ignored": ignored,
        "row": rows,
        "index": order.astype(np.int64),
        "truth_image": np.full(int(wanted.sum()), number, dtype=np.int64),
        "truth_class": image.classes[wanted].astype(np.int64),
        "found": taken[0, wanted],
    }


def measure_precision(
    matches: Matches, classes: int, counts: Float64[np.ndarray, "R images"] | None = None, room: int = 4_000_000
) -> Float64[np.ndarray, "R classes"]:
    """The average precision of each class, as COCO defines it: the mean over RECALLS and over the thresholds.

    counts: how often each image counts, in each of R draws; by default every image once, in one draw. `room`: so many
    numbers are worked on at a time. NaN for a class of which the images of a draw have no box.
    """
    if counts is None:
        counts = np.ones((1, int(max(matches.image.max(initial=-1), matches.truth_image.max(initial=-1)) + 1)))
    result = np.full((len(counts), classes), np.nan)
    for label in np.unique(matches.truth_class).tolist():
        wanted = matches.truth_image[matches.truth_class == label]
        own = np.flatnonzero(matches.label == label)
        own = own[np.argsort(-matches.score[own], kind="stable")]
        chunk = max(1, room // max(len(own), 1))
        for start in range(0, len(counts), chunk):
            part = counts[start : start + chunk]
            truths = part[:, wanted].sum(axis=1)
            total = np.zeros(len(part))
            for correct, ignored in zip(matches.correct, matches.ignored, strict=True):
                total += trace_precision(part, matches.image[own], correct[own], ignored[own], truths).mean(axis=1)
            means = total / len(matches.correct)
            result[start : start + chunk, label] = np.where(truths > 0, means, np.nan)
    return result


def trace_precision(
    counts: Float64[np.ndarray, "R images"],
    image: Int64[np.ndarray, " n"],
    correct: Bool[np.ndarray, " n"],
    ignored: Bool[np.ndarray, " n"],
    truths: Float64[np.ndarray, " R"],
) -> Float64[np.ndarray, "R 101"]:
    """The precision at each of RECALLS, the best at this or any higher recall, and 0 where that recall is not reached.

    image, correct, ignored: of the predictions of one class, from the highest score to the lowest. truths: how many
    boxes there are to find.
    """
    kept = ~ignored
    weights = counts[:, image[kept]]
    hits = correct[kept]
    found = (weights * hits).cumsum(axis=1)[:, hits]
    shown = weights.cumsum(axis=1)[:, hits]
    result = np.zeros((len(counts), len(RECALLS)))
    if found.shape[1] == 0:
        return result
    # recall rises only where a box is found, so these places tell the whole curve
    precision = np.divide(found, shown, out=np.zeros_like(found), where=shown > 0)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = found / np.maximum(truths, 1e-9)[:, None]
    for row in range(len(counts)):
        place = np.searchsorted(recall[row], RECALLS, side="left")
        reached = place < recall.shape[1]
        result[row, reached] = precision[row, place[reached]]
    return result


def measure_calibration(score: Float64[np.ndarray, " n"], correct: Bool[np.ndarray, " n"]) -> float | None:
    """The expected calibration error of scores: over bins of equal width, the mean distance between the mean score and
    the share of correct predictions, weighted by their number; None without predictions."""
    if len(score) == 0:
        return None
    place = np.minimum((score * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    sums = (np.bincount(place, values, CALIBRATION_BINS) for values in (score, correct.astype(np.float64)))
    scores, hits = sums
    return float(np.abs(scores - hits).sum() / len(score))


def split_errors(images: Sequence[ImageBoxes], classes: int) -> dict[str, dict[str, float]]:
    """Why predictions are wrong at IoU 0.5: of each of ERRORS the `count`, and the `loss`, by how much AP50 would be
    higher if all errors of this kind were repaired.

    A wrong prediction is of the first kind that applies: "place" overlaps a box of its class by BACKGROUND_IOU to 0.5;
    "class" overlaps one of another class by 0.5 or more; "duplicate" one of its class that a prediction has already;
    "background" overlaps none by BACKGROUND_IOU; "both" is what remains, a box of another class that it overlaps too
    little. "missed" is a box that has neither a prediction nor one of the errors "class" and "place". Repairs, as
    TIDE's own program makes them: place and class make the prediction that has the top score of all these for a box
    that is not found correct, and drop the others of their kind; both, duplicate and background drop predictions;
    missed drops boxes.
    """
    matches = match_images(images, THRESHOLDS[:1])
    kind = np.full(len(matches.image), "", dtype="<U10")
    target = np.full(len(matches.image), NO_TRUTH, dtype=np.int64)
    first = np.searchsorted(matches.image, np.arange(len(images) + 1))
    truth_first = np.searchsorted(matches.truth_image, np.arange(len(images) + 1))
    missed = ~matches.found
    for number, image in enumerate(images):
        rows = slice(first[number], first[number + 1])
        wrong = np.flatnonzero(~matches.correct[0, rows] & ~matches.ignored[0, rows]) + rows.start
        wanted = ~image.ignored
        truth, of = image.truth[wanted], image.classes[wanted]
        found = matches.found[truth_first[number] : truth_first[number + 1]]
        overlaps = measure_overlaps(image.boxes[matches.index[wrong]], truth, np.zeros(len(truth), dtype=bool))
        for place, row in enumerate(wrong):
            kind[row], best = _explain(overlaps[place], of == matches.label[row])
            if kind[row] in ("class", "place"):
                target[row] = truth_first[number] + best
        explained = target[rows][target[rows] >= 0] - truth_first[number]
        missed[truth_first[number] + explained[~found[explained]]] = False
    before = _average(matches, classes)
    return {
        name: {
            "count": float((missed if name == "missed" else kind == name).sum()),
            "loss": max(_average(_repair(matches, name, kind, target, missed), classes) - before, 0.0),
        }
        for name in ERRORS
    }


def _explain(overlaps: np.ndarray, same: np.ndarray) -> tuple[str, int]:
    own, other = np.where(same, overlaps, -1.0), np.where(same, -1.0, overlaps)
    if not len(overlaps):
        return "background", NO_TRUTH
    least = THRESHOLDS[0]
    if BACKGROUND_IOU <= own.max() < least:
        return "place", int(own.argmax())
    if other.max() >= least:
        return "class", int(other.argmax())
    if own.max() >= least:
        return "duplicate", NO_TRUTH
    if overlaps.max() <= BACKGROUND_IOU:
        return "background", NO_TRUTH
    return "both", NO_TRUTH


def _average(matches: Matches, classes: int) -> float:
    each = measure_precision(matches, classes)[0]
    return float(np.nanmean(each)) if np.isfinite(each).any() else 0.0


def _repair(matches: Matches, name: str, kind: np.ndarray, target: np.ndarray, missed: np.ndarray) -> Matches:
    own = kind == name
    kept, correct, label = ~own, matches.correct.copy(), matches.label.copy()
    if name in ("class", "place"):
        # of both kinds, as one prediction alone can be the repaired one of a box
        rows = np.flatnonzero((target >= 0) & ~matches.found[target.clip(min=0)])
        rows = rows[np.argsort(-matches.score[rows], kind="stable")]
        _, top = np.unique(target[rows], return_index=True)  # of each box the first, which has the highest score
        rows = rows[top][own[rows[top]]]
        kept[rows], correct[0, rows], label[rows] = True, True, matches.truth_class[target[rows]]
    there = ~missed if name == "missed" else np.ones(len(missed), dtype=bool)
    return Matches(
        matches.image[kept], label[kept], matches.score[kept], correct[:, kept], matches.ignored[:, kept],
        matches.row[kept], matches.index[kept], matches.truth_image[there], matches.truth_class[there],
        matches.found[there],
    )  # fmt: skip
