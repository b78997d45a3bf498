"""Object detection in 2-D boxes; headline AP (0.5:0.95).

FCOS (arXiv 2006.09214): every location of a dense detector answers for the smallest box that holds it near the middle.
A2D2 does not label far objects, so boxes below a size or visible share, and of unknown class, are ignored: neither
positive nor background in the loss, crowd in the metric; answers below the size are left out of the metric too.
"""

import warnings
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import batched_nms, generalized_box_iou_loss, sigmoid_focal_loss

from a2d2.classes import OBJECT_CLASSES, OBJECT_GROUPINGS, find_object_class, object_colour
from a2d2.dataset import Geometry
from a2d2.frames import Frame
from models.heads import DenseDetectionHead, DetectionOutput, locate_cells, spread_strides
from tasks.drawing import write_text
from tasks.task import HeadOptions, Metrics, Task, TaskOptions, load_json

PADDING, IGNORED = -1, -2  # classes of a target's rows that are no box, and of boxes that count for nothing
CENTRE_RADIUS = 1.5  # strides from a box's centre within which locations answer for it
DETECTIONS = 100  # at most, an image
CANDIDATES = 1000  # at most, an image before suppression

Target = dict[str, Tensor]


class DetectionHeadOptions(HeadOptions):
    reads: tuple[str, ...] = Field(
        ("neck.8", "neck.16", "neck.32", "neck.64", "neck.128"), description="features the head reads"
    )
    width: PositiveInt = Field(128, description="channels of its two towers")
    depth: PositiveInt = Field(4, description="convolutions of each tower")


class DetectionOptions(TaskOptions):
    classes: Literal["all", "merged", "object"] = Field("merged", description="A2D2's 14, five groups, or one class")
    min_size: NonNegativeFloat = Field(8.0, description="pixels; boxes with a shorter side are ignored")
    min_visible: float = Field(0.1, ge=0, le=1, description="boxes with a smaller share in the image are ignored")
    max_boxes: PositiveInt = Field(64, description="rows of a target; the largest boxes of a fuller frame are kept")
    score_threshold: float = Field(0.05, ge=0, le=1, description="answers below it are dropped")
    nms_threshold: float = Field(0.6, ge=0, le=1, description="of two answers of a class that overlap more, one goes")
    head: DetectionHeadOptions = DetectionHeadOptions()


def match_locations(
    locations: Float[Tensor, "L 2"],
    strides: Float[Tensor, " L"],
    boxes: Float[Tensor, "N 4"],
    classes: Int64[Tensor, " N"],
) -> tuple[Int64[Tensor, " L"], Bool[Tensor, " L"]]:
    """For each location the row of its box, -1 for background; and which locations lie in an ignored box.

    A location may answer for a box that holds it, whose centre is within CENTRE_RADIUS strides in x and y, and whose
    farthest edge is between 4 and 8 strides away (from 0 at the finest level, without end at the coarsest); of several
    it takes the smallest.
    """
    if len(boxes) == 0:
        none = torch.full((len(locations),), -1, dtype=torch.int64, device=locations.device)
        return none, torch.zeros_like(none, dtype=torch.bool)
    reach = torch.cat([locations[:, None] - boxes[None, :, :2], boxes[None, :, 2:] - locations[:, None]], dim=2)
    inside = reach.amin(dim=2) > 0
    ignored = (inside & (classes == IGNORED)).any(dim=1)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    near = (locations[:, None] - centres[None]).abs().amax(dim=2) < CENTRE_RADIUS * strides[:, None]
    farthest = reach.amax(dim=2)
    low = torch.where(strides == strides.min(), 0.0, 4 * strides)
    high = torch.where(strides == strides.max(), torch.inf, 8 * strides)
    fits = (farthest >= low[:, None]) & (farthest < high[:, None])
    candidates = inside & near & fits & (classes >= 0)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    area, row = torch.where(candidates, areas[None], torch.inf).min(dim=1)
    row = torch.where(area.isinf(), -1, row)
    return row, ignored & (row < 0)


def measure_centreness(distances: Float[Tensor, "n 4"]) -> Float[Tensor, " n"]:
    """1 in the middle of a box, 0 at its edges, of distances to left, top, right and bottom."""
    left, top, right, bottom = distances.unbind(dim=1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    down = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (across * down).sqrt()


class DetectionMetrics(Metrics):
    """`ap` (0.5:0.95), `ap50`, `ap75` and `ap/<class>`, as COCO defines them; None where there was nothing to find."""

    def __init__(self, names: tuple[str, ...], min_size: float):
        self.names, self.min_size = names, min_size
        self.average = MeanAveragePrecision(backend="faster_coco_eval", class_metrics=True)
        self.average.warn_on_many_detections = False
        self.found_any = False

    def update(self, answer: list[dict[str, Tensor]], target: Target) -> None:
        for row, image_answer in enumerate(answer):
            boxes = image_answer["boxes"].cpu()
            large = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1) >= self.min_size if len(boxes) else torch.zeros(0).bool()
            predicted = {key: image_answer[key].cpu()[large] for key in ("boxes", "scores", "labels")}
            truth_boxes, classes = target["boxes"][row].cpu(), target["classes"][row].cpu()
            known = target["known"][row].cpu()
            wanted, foreign = known >= 0, (classes == IGNORED) & (known < 0)
            # a box of unknown class may hold anything, so it is a crowd of every class
            every = torch.arange(len(self.names)).repeat_interleave(int(foreign.sum()))
            truth = {
                "boxes": torch.cat([truth_boxes[wanted], truth_boxes[foreign].repeat(len(self.names), 1)]),
                "labels": torch.cat([known[wanted], every]),
                "iscrowd": torch.cat([(classes[wanted] == IGNORED).long(), torch.ones_like(every)]),
            }
            self.found_any |= bool((classes >= 0).any())
            self.average.update([predicted], [truth])

    def compute(self) -> dict[str, float | None]:
        if not self.found_any:
            return {"ap": None, "ap50": None, "ap75": None}
        result = self.average.compute()
        scores = {"ap": result["map"], "ap50": result["map_50"], "ap75": result["map_75"]}
        by_class = zip(result["classes"].reshape(-1).tolist(), result["map_per_class"].reshape(-1), strict=True)
        scores |= {f"ap/{self.names[index]}": value for index, value in by_class}
        # -1 is the library's word for "no truth"
        return {name: None if float(value) < 0 else float(value) for name, value in scores.items()}


class Detection(Task):
    """Label: the derived file's boxes. Output: DetectionOutput. Answer, a dict for each image: `boxes` (n, 4) in
    pixels, `scores` (n,), `labels` (n,).

    Target, N = max_boxes rows: `boxes` float32 (N, 4) edges x1, y1, x2, y2 in pixels; `classes` int64 (N,), PADDING for
    no box, IGNORED for one that counts for nothing; `known` int64 (N,), the class also of ignored boxes, -1 if unknown;
    `size` int64 (2,), the (width, height) of the image.
    """

    name: ClassVar[str] = "detection"
    kind: ClassVar[str] = "boxes"
    headline: ClassVar[str] = "ap"
    better: ClassVar[str] = "higher"
    labels_to_fit: ClassVar[int | None] = None  # small files, and a frame with too many boxes must not go unnoticed
    Options = DetectionOptions

    def __init__(self, options: DetectionOptions | None = None, fitted: dict[str, Any] | None = None):
        super().__init__(options, fitted)
        self.groups = OBJECT_GROUPINGS[self.options.classes]
        self.names = tuple(self.groups)
        members = {member: index for index, group in enumerate(self.groups.values()) for member in group}
        self.group_of = [members[name] for name in OBJECT_CLASSES]

    def load(self, frame: Frame) -> list[dict] | None:
        content = load_json(frame.path(self.kind), "boxes")
        return None if content is None else content["boxes"]

    def blank(self, size: tuple[int, int]) -> Target:
        rows = self.options.max_boxes
        return {
            "boxes": torch.zeros(rows, 4),
            "classes": torch.full((rows,), PADDING),
            "known": torch.full((rows,), -1),
            "size": torch.tensor(size),
        }

    def transform(self, label: list[dict], geometry: Geometry) -> Target:
        target = self.blank(geometry.size)
        if not label:
            return target
        edges = geometry.map_boxes(np.array([box["box"] for box in label], dtype=np.float64))
        clipped = np.clip(edges, 0, [*geometry.size, *geometry.size])
        whole = (edges[:, 2:] - edges[:, :2]).prod(axis=1)
        extent = clipped[:, 2:] - clipped[:, :2]
        there = (extent > 0).all(axis=1)
        visible = np.array([box["visible"] for box in label]) * extent.prod(axis=1) / np.maximum(whole, 1e-9)
        found = [find_object_class(box["class"]) for box in label]
        known = np.array([-1 if index is None else self.group_of[index] for index in found])
        counts = (known >= 0) & (visible >= self.options.min_visible) & (extent.min(axis=1) >= self.options.min_size)
        order = [row for row in np.argsort(-extent.prod(axis=1), kind="stable") if there[row]]
        order = order[: self.options.max_boxes]
        target["boxes"][: len(order)] = torch.from_numpy(clipped[order]).float()
        target["classes"][: len(order)] = torch.from_numpy(np.where(counts, known, IGNORED)[order])
        target["known"][: len(order)] = torch.from_numpy(known[order])
        return target

    def fit(self, labels: Iterable[Any]) -> None:
        """Nothing is learned from the labels, but frames that do not fit into a target are reported."""
        counts = [len(label) for label in labels]
        fuller = sum(count > self.options.max_boxes for count in counts)
        if fuller:
            warnings.warn(
                f"{fuller} training frames hold more than {self.options.max_boxes} boxes, up to {max(counts)}: their "
                f"smallest are left out; raise tasks.detection.max_boxes to keep them",
                stacklevel=2,
            )
        self.fitted = {"constant": self.constant(counts)}

    def constant(self, labels: Iterable[Any]) -> str:
        return "no box"

    def answer_constant(self, target: Target) -> list[dict[str, Tensor]]:
        nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
        return [nothing for _ in target["classes"]]

    def head(self, channels: dict[str, int]) -> nn.Module:
        return DenseDetectionHead(channels, classes=len(self.names), **self.options.head.model_dump())

    def _match(self, target: Target, size: tuple[int, int], strides: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        device = target["boxes"].device
        locations, spread = locate_cells(size, strides, device), spread_strides(size, strides, device)
        matches = []
        for boxes, classes in zip(target["boxes"], target["classes"], strict=True):
            real = classes != PADDING
            rows, ignored = match_locations(locations, spread, boxes[real], classes[real])
            matches.append((rows, ignored))
        return matches

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(sorted(int(name.rsplit(".", 1)[1]) for name in self.options.head.reads))

    def count(self, target: Target) -> int:
        """Positives: locations that answer for a box."""
        if len(target["size"]) == 0:
            return 0
        width, height = target["size"][0].tolist()
        return sum(int((rows >= 0).sum()) for rows, _ in self._match(target, (height, width), self.strides))

    def loss(self, output: DetectionOutput, target: Target) -> Float[Tensor, ""]:
        """Focal loss of the classes, GIoU loss of the boxes, cross-entropy of the centre-ness, each a sum."""
        locations = locate_cells(output.size, output.strides, output.boxes.device)
        total = output.boxes.sum() * 0.0
        for row, (matched, ignored) in enumerate(self._match(target, output.size, output.strides)):
            positive = matched >= 0
            real = target["classes"][row] != PADDING
            boxes, classes = target["boxes"][row][real], target["classes"][row][real]
            wanted = torch.zeros_like(output.classes[row])
            wanted[positive, classes[matched[positive]]] = 1.0
            focal = sigmoid_focal_loss(output.classes[row], wanted, reduction="none")
            total = total + torch.where(ignored[:, None], 0.0, focal).sum()
            if not positive.any():
                continue
            places, truth = locations[positive], boxes[matched[positive]]
            told = output.boxes[row][positive]
            edges = torch.cat([places - told[:, :2], places + told[:, 2:]], dim=1)
            total = total + generalized_box_iou_loss(edges, truth, reduction="sum")
            distances = torch.cat([places - truth[:, :2], truth[:, 2:] - places], dim=1)
            total = total + F.binary_cross_entropy_with_logits(
                output.centreness[row][positive], measure_centreness(distances), reduction="sum"
            )
        return total

    def answer(self, output: DetectionOutput, size: tuple[int, int]) -> list[dict[str, Tensor]]:
        locations = locate_cells(output.size, output.strides, output.boxes.device)
        height, width = output.size
        scale = torch.tensor([size[0] / width, size[1] / height] * 2, device=output.boxes.device)
        answers = []
        for classes, boxes, centreness in zip(output.classes, output.boxes, output.centreness, strict=True):
            scores = (classes.sigmoid() * centreness.sigmoid()[:, None]).sqrt()
            best, place = scores.flatten().topk(min(CANDIDATES, scores.numel()))
            place, best = place[best > self.options.score_threshold], best[best > self.options.score_threshold]
            location, label = place // scores.shape[1], place % scores.shape[1]
            middle = locations[location]
            edges = torch.cat([middle - boxes[location, :2], middle + boxes[location, 2:]], dim=1)
            edges = torch.minimum(edges.clamp(min=0), edges.new_tensor([width, height, width, height]))
            kept = batched_nms(edges, best, label, self.options.nms_threshold)[:DETECTIONS]
            answers.append({"boxes": edges[kept] * scale, "scores": best[kept], "labels": label[kept]})
        return answers

    def metrics(self) -> DetectionMetrics:
        return DetectionMetrics(self.names, self.options.min_size)

    def _draw_box(self, picture: np.ndarray, box: list[float], color: tuple[int, int, int], words: str) -> None:
        x1, y1, x2, y2 = (round(value) for value in box)
        cv2.rectangle(picture, (x1, y1), (x2 - 1, y2 - 1), color, max(1, picture.shape[0] // 320), cv2.LINE_AA)
        if words and y2 - y1 > picture.shape[0] / 8:  # on small boxes the words would hide the thing itself
            write_text(picture, words, (x1, y1), color)

    def draw(self, image: UInt8[np.ndarray, "H W 3"], answer: dict[str, Tensor]) -> UInt8[np.ndarray, "H W 3"]:
        """Boxes of a score of 0.3 and more, the surest on top."""
        picture = image.copy()
        order = answer["scores"].argsort()
        for row in order.tolist():
            label, score = int(answer["labels"][row]), float(answer["scores"][row])
            if score >= 0.3:
                self._draw_box(
                    picture, answer["boxes"][row].tolist(), object_colour(label), f"{self.names[label]} {score:.2f}"
                )
        return picture

    def draw_label(self, image: UInt8[np.ndarray, "H W 3"], target: Target) -> UInt8[np.ndarray, "H W 3"]:
        """The boxes; ignored ones in gray without a word."""
        picture = image.copy()
        for box, label in zip(target["boxes"].tolist(), target["classes"].tolist(), strict=True):
            if label == IGNORED:
                self._draw_box(picture, box, (150, 150, 150), "")
            elif label != PADDING:
                self._draw_box(picture, box, object_colour(label), self.names[label])
        return picture
