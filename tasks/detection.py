"""Object detection in 2-D boxes; primary metric AP (0.5:0.95).

Two box coders translate between boxes and the output of a head. Dense, FCOS (arXiv 2006.09214): every location of a
dense detector predicts the smallest box that contains it near the middle. Grid, after YOLO (arXiv 1506.02640): every
cell of a coarse grid has some slots, each of which predicts one of the boxes with their middle in the cell.

A2D2 does not label far objects, so boxes below a size or visible share, and boxes of unknown class, are ignored: they
are neither positive nor background in the loss, and crowd in the metric. The metric also leaves out predictions below
the size.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import batched_nms, box_iou, sigmoid_focal_loss

from a2d2.classes import OBJECT_CLASSES, OBJECT_GROUPINGS, find_object_class, object_colour
from a2d2.dataset import Geometry
from a2d2.frames import Frame
from models.heads import DenseDetectionHead, DetectionOutput, count_cells, locate_cells
from models.thesis import CELL, BoxGridHead, BoxGridOutput
from tasks.drawing import write_text
from tasks.options import DetectionOptions, DetectionProtocol
from tasks.task import Metrics, Task, load_json

PADDING, IGNORED = -1, -2  # classes of rows of a target that are no box, and of ignored boxes
BACKGROUND = -1  # in place of a box's row, of a location that has none; IGNORED where it may lie in an object
ROWS = ("boxes", "classes", "known", "visible")  # of a target, what has a row for each box
CENTRE_RADIUS = 1.5  # locations within so many strides of a box's centre predict it
DETECTIONS = 100  # at most, an image
CANDIDATES = 1000  # at most, an image before suppression
SLOTS = 10  # of a cell of the box grid
COORDINATES, EMPTY_SLOTS = 5.0, 0.5  # weights of two terms of the box grid's loss, as in YOLO's

Target = dict[str, Tensor]


def match_locations(
    size: tuple[int, int],
    strides: tuple[int, ...],
    boxes: Float32[np.ndarray, "N 4"],
    classes: Int64[np.ndarray, " N"],
) -> Int32[np.ndarray, " L"]:
    """For each location of an image of `size` = (H, W) the row of its box, or BACKGROUND, or IGNORED.

    A location is matched with the smallest box that contains it, whose centre is within CENTRE_RADIUS strides in x and
    y, and whose farthest edge is between 4 and 8 strides away (from 0 at the finest level, without limit at the
    coarsest). It is IGNORED if it has no box but lies in an ignored one. So only a few locations of each level can
    belong to a box, and only these are looked at.
    """
    steps = np.array(strides, dtype=np.float32)[:, None]
    cells = np.array([count_cells(size, stride) for stride in strides])  # rows and columns of each level
    first = np.cumsum([0, *cells.prod(axis=1)])
    rows = np.full(first[-1], BACKGROUND, dtype=np.int32)
    for level, stride in enumerate(strides):
        y, x = ((np.arange(count, dtype=np.float32) + 0.5) * stride for count in cells[level])
        left, top, right, bottom = boxes[classes == IGNORED].T[..., None]
        covered = ((top < y) & (y < bottom))[:, :, None] & ((left < x) & (x < right))[:, None]
        rows[first[level] : first[level + 1]][covered.any(axis=0).ravel()] = IGNORED

    wanted = np.flatnonzero(classes >= 0)
    near = np.arange(2 * math.ceil(CENTRE_RADIUS))  # of the cells of a row or column, those that can be near enough
    candidates = []
    for axis in (0, 1):  # box, level, cell
        middle = ((boxes[wanted, axis] + boxes[wanted, axis + 2]) / 2)[:, None, None]
        index = np.floor(middle / steps - CENTRE_RADIUS).astype(np.int64) + near
        place = (index.astype(np.float32) + 0.5) * steps
        low, high = place - boxes[wanted, axis, None, None], boxes[wanted, axis + 2, None, None] - place
        inside = (index >= 0) & (index < cells[:, 1 - axis, None])
        close = np.abs(place - middle) < CENTRE_RADIUS * steps
        candidates.append((index, inside & close & (np.minimum(low, high) > 0), np.maximum(low, high)))
    (column, fits_x, far_x), (row, fits_y, far_y) = candidates
    farthest = np.maximum(far_y[..., :, None], far_x[..., None, :])  # box, level, row, column
    least = np.where(steps == steps.min(), 0, 4 * steps)[:, :, None]
    most = np.where(steps == steps.max(), np.inf, 8 * steps)[:, :, None]
    fits = fits_y[..., :, None] & fits_x[..., None, :] & (farthest >= least) & (farthest < most)
    location = first[:-1, None, None] + row[..., :, None] * cells[:, 1, None, None] + column[..., None, :]
    areas = (boxes[wanted, 2] - boxes[wanted, 0]) * (boxes[wanted, 3] - boxes[wanted, 1])
    # the smallest, of equal ones the first, is written last
    for each in np.lexsort((-wanted, -areas)):
        rows[location[each][fits[each]]] = wanted[each]
    return rows


def measure_centreness(distances: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """1 in the middle of a box, 0 at its edges, from the distances to left, top, right and bottom."""
    left, top, right, bottom = distances.unbind(dim=-1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    down = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (across * down).sqrt()


def measure_giou(predicted: Float[Tensor, "*n 4"], truth: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """The generalised IoU (arXiv 1902.09630) of two boxes around the same location, from the distances to their left,
    top, right and bottom edges, all > 0.

    torchvision's picks out the boxes that overlap, for whose number a GPU would wait; boxes around a location always
    do.
    """
    common, hull = torch.minimum(predicted, truth), torch.maximum(predicted, truth)
    edges = (each.unbind(dim=-1) for each in (predicted, truth, common, hull))
    areas = [(left + right) * (top + bottom) for left, top, right, bottom in edges]
    union = areas[0] + areas[1] - areas[2]
    return areas[2] / union + union / areas[3] - 1


def choose_slots(cells: Int64[Tensor, " n"], overlaps: Float[Tensor, "n slots"]) -> Int64[Tensor, " n"]:
    """The slot of each box: in the order of the boxes, each takes the free slot of its cell that it overlaps most.

    cells: the cell of each box; overlaps: its IoU with the box that each slot of that cell predicts. -1 where no slot
    is free.
    """
    free = {cell: list(range(overlaps.shape[1])) for cell in cells.tolist()}
    chosen = []
    for cell, overlap in zip(cells.tolist(), overlaps.tolist(), strict=True):
        slot = max(free[cell], key=overlap.__getitem__, default=-1)
        if slot >= 0:
            free[cell].remove(slot)
        chosen.append(slot)
    return torch.tensor(chosen, dtype=torch.int64, device=cells.device)


class BoxCoder(ABC):
    """Translates between boxes of `classes` classes and the output of a head; Task describes the methods."""

    output_format: ClassVar[str]

    def __init__(self, options: DetectionOptions, classes: int):
        self.options, self.classes = options, classes

    @abstractmethod
    def head_arguments(self) -> dict[str, Any]:
        """Arguments of the head beside the features it reads."""

    @abstractmethod
    def head(self, channels: dict[str, int]) -> nn.Module:
        """The head on features of these names and channels."""

    def match(self, target: Target) -> Target:
        """The target of one image with its matches, if these depend on the boxes alone."""
        return target

    @abstractmethod
    def count(self, target: Target) -> Int64[Tensor, " B"]:
        """The number of positives of each image: locations or slots that are matched with a box."""

    @abstractmethod
    def loss(self, output: Any, target: Target) -> Float[Tensor, ""]:
        """The loss, summed over positives and background."""

    @abstractmethod
    def decode(self, output: Any) -> tuple[Float[Tensor, "B L 4"], Float[Tensor, "B L K"]]:
        """All predicted boxes, as edges in pixels of the network's input, and their scores for each class."""


class DenseBoxCoder(BoxCoder):
    """FCOS. Output: DetectionOutput. Positives are locations."""

    output_format = "boxes"

    def __init__(self, options: DetectionOptions, classes: int):
        super().__init__(options, classes)
        self._locations: dict[Any, Tensor] = {}

    def head_arguments(self) -> dict[str, Any]:
        return {"classes": self.classes}

    def head(self, channels: dict[str, int]) -> nn.Module:
        return DenseDetectionHead(channels, **self.head_arguments(), **self.options.head.model_dump())

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(sorted(int(name.rsplit(".", 1)[1]) for name in self.options.head.reads))

    def match(self, target: Target) -> Target:
        """With `match` int32 (L,), see match_locations; made once, in the process that loads the sample."""
        width, height = target["size"].tolist()
        rows = match_locations((height, width), self.strides, target["boxes"].numpy(), target["classes"].numpy())
        return target | {"match": torch.from_numpy(rows)}

    def count(self, target: Target) -> Int64[Tensor, " B"]:
        return (target["match"] >= 0).sum(dim=1)

    def loss(self, output: DetectionOutput, target: Target) -> Float[Tensor, ""]:
        """Focal loss of the classes, GIoU loss of the boxes, cross-entropy of the centre-ness, each a sum.

        All locations are computed and those without a box masked, because their number is not known on the host.
        """
        locations = self._locate(output)
        match = target["match"].long()
        positive, row = match >= 0, match.clamp(min=0)
        truth = target["boxes"].gather(1, row[..., None].expand(-1, -1, 4))
        distances = torch.cat([locations - truth[..., :2], truth[..., 2:] - locations], dim=2)
        distances = distances.masked_fill(~positive[..., None], 1.0)  # what is masked must be finite
        kinds = target["classes"].gather(1, row).masked_fill(~positive, PADDING)
        wanted = kinds[..., None] == torch.arange(self.classes, device=match.device)
        focal = sigmoid_focal_loss(output.classes, wanted.to(output.classes.dtype), reduction="none")
        central = F.binary_cross_entropy_with_logits(
            output.centreness, measure_centreness(distances).to(output.centreness.dtype), reduction="none"
        )
        of_box = 1 - measure_giou(output.boxes, distances) + central
        return focal.masked_fill((match == IGNORED)[..., None], 0.0).sum() + of_box.masked_fill(~positive, 0.0).sum()

    def _locate(self, output: DetectionOutput) -> Float[Tensor, "L 2"]:
        """The locations of an output, made once for a size."""
        key = (output.size, output.strides, output.boxes.device)
        if key not in self._locations:
            self._locations = {key: locate_cells(*key)}
        return self._locations[key]

    def decode(self, output: DetectionOutput) -> tuple[Float[Tensor, "B L 4"], Float[Tensor, "B L K"]]:
        locations = self._locate(output)
        edges = torch.cat([locations - output.boxes[..., :2], locations + output.boxes[..., 2:]], dim=2)
        return edges, (output.classes.sigmoid() * output.centreness.sigmoid()[..., None]).sqrt()


class GridBoxCoder(BoxCoder):
    """The thesis's box grid with the errors of its loss fixed. Output: BoxGridOutput. Positives are slots.

    The cell that contains a box's middle predicts it, with the slot that overlaps the box most; `rows` are y, `columns`
    are x. Boxes of one cell take their slots from large to small, so of more than SLOTS boxes the smallest get none:
    they are not learned, and they are no background either, because no slot of the cell is free then. Ignored boxes
    come last, and their slots have no loss.
    """

    output_format = "box_grid"

    def head_arguments(self) -> dict[str, Any]:
        return {"classes": self.classes, "slots": SLOTS}

    def head(self, channels: dict[str, int]) -> nn.Module:
        (name,) = BoxGridHead.reads
        return BoxGridHead(channels[name], None, **self.head_arguments())

    def count(self, target: Target) -> Int64[Tensor, " B"]:
        counts = []
        for boxes, classes, (width, height) in zip(
            target["boxes"], target["classes"], target["size"].tolist(), strict=True
        ):
            cells, _ = self._find_cells(boxes[classes >= 0], (height, width))
            counts.append(int(cells.bincount().clamp(max=SLOTS).sum()))
        return torch.tensor(counts, dtype=torch.int64)

    def loss(self, output: BoxGridOutput, target: Target) -> Float[Tensor, ""]:
        """Squared errors, each a sum: of the confidence, whose target is 0 in a free slot, else the IoU of its box with
        the ground truth; of the box's middle, and of the roots of its width and height; of its classes."""
        predicted_boxes = self._place_boxes(output).detach()
        height, width = output.size
        total = output.values.sum() * 0.0
        for row, values in enumerate(output.values.flatten(1, 2)):
            boxes, classes = target["boxes"][row], target["classes"][row]
            order = torch.cat([(classes >= 0).nonzero()[:, 0], (classes == IGNORED).nonzero()[:, 0]])
            boxes, classes = boxes[order], classes[order]
            cells, middles = self._find_cells(boxes, output.size)
            each = torch.arange(len(boxes), device=boxes.device)
            overlaps = box_iou(boxes, predicted_boxes[row, cells].flatten(0, 1)).unflatten(1, (len(boxes), SLOTS))[
                each, each
            ]
            slots = choose_slots(cells, overlaps)
            taken, positive = slots >= 0, (slots >= 0) & (classes >= 0)
            free = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
            free[cells[taken], slots[taken]] = False

            predicted = values[cells[positive], slots[positive]]
            # the root of a sigmoid, with a gradient that is finite even where the sigmoid rounds to 0
            predicted_roots = (F.logsigmoid(predicted[:, 3:5]) / 2).exp()
            roots = ((boxes[:, 2:] - boxes[:, :2]) / boxes.new_tensor([width, height])).sqrt()
            overlap = overlaps[each, slots][positive]
            total = (
                total
                + EMPTY_SLOTS * torch.where(free, values[..., 0].sigmoid(), 0.0).square().sum()
                + (predicted[:, 0].sigmoid() - overlap).square().sum()
                + COORDINATES * (predicted[:, 1:3].sigmoid() - middles[positive]).square().sum()
                + COORDINATES * (predicted_roots - roots[positive]).square().sum()
                + (predicted[:, 5:].sigmoid() - F.one_hot(classes[positive], self.classes)).square().sum()
            )
        return total

    def decode(self, output: BoxGridOutput) -> tuple[Float[Tensor, "B L 4"], Float[Tensor, "B L K"]]:
        values = output.values.flatten(1, 3).sigmoid()
        return self._place_boxes(output).flatten(1, 2), values[..., :1] * values[..., 5:]

    def _find_cells(
        self, boxes: Float[Tensor, "n 4"], size: tuple[int, int]
    ) -> tuple[Int64[Tensor, " n"], Float[Tensor, "n 2"]]:
        """The cell that contains each box's middle, counted row by row, and the middle's (x, y) in it, from 0 to 1."""
        rows, columns = count_cells(size, CELL)
        middles = (boxes[:, :2] + boxes[:, 2:]) / 2 / CELL
        # a sliver at the image's edge has its middle on that edge, by rounding
        corners = torch.minimum(middles.long(), torch.tensor([columns - 1, rows - 1], device=boxes.device))
        return corners[:, 1] * columns + corners[:, 0], middles - corners

    def _place_boxes(self, output: BoxGridOutput) -> Float[Tensor, "B cells slots 4"]:
        """The edges of every slot's box in pixels, cells row by row."""
        height, width = output.size
        corners = locate_cells(output.size, (CELL,), output.values.device)[:, None] - CELL / 2
        values = output.values.flatten(1, 2)[..., 1:5].sigmoid()
        middles = corners + values[..., :2] * CELL
        halves = values[..., 2:] * values.new_tensor([width, height]) / 2
        return torch.cat([middles - halves, middles + halves], dim=3)


BOX_CODERS: dict[str, type[BoxCoder]] = {"dense": DenseBoxCoder, "grid": GridBoxCoder}


class DetectionMetrics(Metrics):
    """`ap` (0.5:0.95), `ap50`, `ap75` and `ap/<class>`, as COCO defines them; None where the labels have no box.

    `best_iou`: the thesis's "mean best IoU", only for comparison with its tables. In an image with n boxes, the n
    top-scoring predictions are used; the IoU of a box is the best with any of them, of whatever class; the mean is over
    an image's boxes, then over images with boxes. The metric can be gamed: it uses the number of boxes in the ground
    truth, one prediction can match many boxes, and false positives and wrong classes have no cost.
    """

    def __init__(self, names: tuple[str, ...], protocol: DetectionProtocol):
        self.names, self.protocol = names, protocol
        # COCO's own thresholds, in double precision: the library's default ones are rounded to float32
        self.average = MeanAveragePrecision(
            backend="faster_coco_eval",
            class_metrics=True,
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
            sync_on_compute=False,  # else one rank that computes would wait for all others
        )
        self.average.warn_on_many_detections = False
        self.best_ious: list[float] = []

    def update(self, prediction: list[dict[str, Tensor]], target: Target) -> None:
        for row, image_prediction in enumerate(prediction):
            boxes = image_prediction["boxes"].cpu()
            predicted = {key: image_prediction[key].cpu()[self._are_large(boxes)] for key in image_prediction}
            truth_boxes, classes = target["boxes"][row].cpu(), target["classes"][row].cpu()
            known, visible = target["known"][row].cpu(), target["visible"][row].cpu()
            wanted, foreign = known >= 0, (classes != PADDING) & (known < 0)
            scored = wanted & self._are_large(truth_boxes) & (visible >= self.protocol.min_visible)
            # a box of unknown class may contain any object, so it is a crowd of every class
            every = torch.arange(len(self.names)).repeat_interleave(int(foreign.sum()))
            truth = {
                "boxes": torch.cat([truth_boxes[wanted], truth_boxes[foreign].repeat(len(self.names), 1)]),
                "labels": torch.cat([known[wanted], every]),
                "iscrowd": torch.cat([(~scored[wanted]).long(), torch.ones_like(every)]),
            }
            self.average.update([predicted], [truth])
            boxes = truth_boxes[scored]
            if len(boxes):
                top_scoring = predicted["boxes"][predicted["scores"].argsort(descending=True)[: len(boxes)]]
                overlaps = box_iou(boxes, top_scoring)
                self.best_ious.append(float(overlaps.amax(dim=1).mean()) if len(top_scoring) else 0.0)

    def _are_large(self, boxes: Float[Tensor, "n 4"]) -> Bool[Tensor, " n"]:
        """Whether both sides are as long as the protocol asks for."""
        return ((boxes[:, 2:] - boxes[:, :2]) >= self.protocol.min_size).all(dim=1)

    def merge(self, other: "DetectionMetrics") -> None:
        # by hand, because the library does not merge this metric
        for name, state in other.average.metric_state.items():
            getattr(self.average, name).extend(state)
        self.best_ious += other.best_ious

    def compute(self) -> dict[str, float | None]:
        if not self.best_ious:
            return {"ap": None, "ap50": None, "ap75": None, "best_iou": None}
        result = self.average.compute()
        scores = {"ap": result["map"], "ap50": result["map_50"], "ap75": result["map_75"]}
        by_class = zip(result["classes"].reshape(-1).tolist(), result["map_per_class"].reshape(-1), strict=True)
        scores |= {f"ap/{self.names[index]}": value for index, value in by_class}
        # the library returns -1 where there is no ground truth
        scores = {name: None if float(value) < 0 else float(value) for name, value in scores.items()}
        return scores | {"best_iou": float(np.mean(self.best_ious))}


class Detection(Task):
    """Label: the boxes of the derived file. Output: that of the box coder. Prediction, a dict for each image: `boxes`
    (n, 4) in pixels, `scores` (n,), `labels` (n,).

    Target, N >= max_boxes rows, as many as the label needs, the largest boxes first: `boxes` float32 (N, 4) edges
    x1, y1, x2, y2 in pixels; `classes` int64 (N,), PADDING for no box, IGNORED for an ignored box; `known` int64 (N,),
    the class also of ignored boxes, -1 if unknown; `visible` float32 (N,), the visible share; `size` int64 (2,), the
    (width, height) of the image. For the loss at most max_boxes rows, and what the box coder adds.
    """

    name: ClassVar[str] = "detection"
    kind: ClassVar[str] = "boxes"
    primary_metric: ClassVar[str] = "ap"
    better: ClassVar[str] = "higher"
    learns_from_empty: ClassVar[bool] = True  # all of it is background
    labels_for_statistics: ClassVar[int] = 2000  # small files, and frames with too many boxes are to be reported
    Options = DetectionOptions
    options: DetectionOptions

    def __init__(self, options: DetectionOptions | None = None, label_statistics: dict[str, Any] | None = None):
        super().__init__(options, label_statistics)
        classes = self.options.classes
        groups = OBJECT_GROUPINGS[classes] if isinstance(classes, str) else classes
        self.names = tuple(groups)
        members = {find_object_class(member): index for index, group in enumerate(groups.values()) for member in group}
        self.group_of = [members.get(index, -1) for index in range(len(OBJECT_CLASSES))]
        self.box_coder = BOX_CODERS[self.options.box_coder](self.options, len(self.names))

    def load(self, frame: Frame) -> list[dict] | None:
        content = load_json(frame.path(self.kind), "boxes")
        return None if content is None else content["boxes"]

    def blank(self, size: tuple[int, int], rows: int = 0) -> Target:
        rows = max(rows, self.options.max_boxes)
        return {
            "boxes": torch.zeros(rows, 4),
            "classes": torch.full((rows,), PADDING),
            "known": torch.full((rows,), -1),
            "visible": torch.ones(rows),
            "size": torch.tensor(size),
        }

    def transform(self, label: list[dict], geometry: Geometry) -> Target:
        target = self.blank(geometry.size, len(label))
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
        target["boxes"][: len(order)] = torch.from_numpy(clipped[order]).float()
        target["classes"][: len(order)] = torch.from_numpy(np.where(counts, known, IGNORED)[order])
        target["known"][: len(order)] = torch.from_numpy(known[order])
        target["visible"][: len(order)] = torch.from_numpy(visible[order]).float()
        return target

    def collate(self, targets: list[Target]) -> Target:
        """Rows of PADDING are added to the targets of frames with fewer boxes than the fullest of the batch."""
        padding = self.blank((0, 0), max(len(target["boxes"]) for target in targets))
        return default_collate(
            [
                {
                    name: torch.cat([value, padding[name][len(value) :]]) if name in ROWS else value
                    for name, value in target.items()
                }
                for target in targets
            ]
        )

    def prepare_loss(self, target: Target) -> Target:
        """The rows that training uses, those of the largest boxes, and their matches."""
        limited = {name: value[: self.options.max_boxes] if name in ROWS else value for name, value in target.items()}
        return self.box_coder.match(limited)

    def list_categories(self, label: list[dict]) -> set[str]:
        """The names of the classes of its boxes."""
        found = [find_object_class(box["class"]) for box in label]
        groups = {self.group_of[index] for index in found if index is not None} - {-1}
        return {self.names[group] for group in groups}

    def collect_statistics(self, labels: Iterable[Any], protocol: DetectionProtocol | None = None) -> None:
        """Only the constant baseline; frames with more boxes than training uses are reported as a warning."""
        counts = [len(label) for label in labels]
        fuller = sum(count > self.options.max_boxes for count in counts)
        if fuller:
            warnings.warn(
                f"{fuller} of {len(counts)} training frames looked at have more than {self.options.max_boxes} boxes, "
                f"up to {max(counts)}: their smallest are left out in training; raise tasks.detection.max_boxes to "
                "keep them",
                stacklevel=2,
            )
        self.label_statistics = {"constant": self.find_constant(counts)}

    def find_constant(self, labels: Iterable[Any], protocol: DetectionProtocol | None = None) -> str:
        return "no box"

    def predict_constant(self, target: Target) -> list[dict[str, Tensor]]:
        nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
        return [nothing for _ in target["classes"]]

    @property
    def output_format(self) -> str:
        return self.box_coder.output_format

    def head_arguments(self) -> dict[str, Any]:
        """`classes`: number of classes; for the box grid also `slots`, the number of boxes of a cell."""
        return self.box_coder.head_arguments()

    def head(self, channels: dict[str, int]) -> nn.Module:
        return self.box_coder.head(channels)

    def count(self, target: Target) -> Int64[Tensor, " B"]:
        """The number of positives: locations or slots that are matched with a box."""
        return self.box_coder.count(target)

    def loss(self, output: DetectionOutput | BoxGridOutput, target: Target) -> Float[Tensor, ""]:
        return self.box_coder.loss(output, target)

    def predict(self, output: DetectionOutput | BoxGridOutput, size: tuple[int, int]) -> list[dict[str, Tensor]]:
        height, width = output.size
        predictions = []
        for edges, scores in zip(*self.box_coder.decode(output), strict=True):
            best, index = scores.flatten().topk(min(CANDIDATES, scores.numel()))
            index, best = index[best > self.options.score_threshold], best[best > self.options.score_threshold]
            found, label = index // scores.shape[1], index % scores.shape[1]
            found = torch.minimum(edges[found].clamp(min=0), edges.new_tensor([width, height, width, height]))
            kept = batched_nms(found, best, label, self.options.nms_threshold)[:DETECTIONS]
            scale = edges.new_tensor([size[0] / width, size[1] / height] * 2)
            predictions.append({"boxes": found[kept] * scale, "scores": best[kept], "labels": label[kept]})
        return predictions

    def list_classes(self, classes: str | dict[str, tuple[str, ...]]) -> dict[str, set[int | None]]:
        groups = OBJECT_GROUPINGS[classes] if isinstance(classes, str) else classes
        return {group: {find_object_class(member) for member in members} for group, members in groups.items()}

    def metrics(self, protocol: DetectionProtocol | None = None) -> DetectionMetrics:
        return DetectionMetrics(self.names, protocol or DetectionProtocol())

    def _draw_box(self, picture: np.ndarray, box: list[float], color: tuple[int, int, int], text: str) -> None:
        x1, y1, x2, y2 = (round(value) for value in box)
        cv2.rectangle(picture, (x1, y1), (x2 - 1, y2 - 1), color, max(1, picture.shape[0] // 320), cv2.LINE_AA)
        if text and y2 - y1 > picture.shape[0] / 8:  # on a small box the text would hide the object
            write_text(picture, text, (x1, y1), color)

    def draw(self, image: UInt8[np.ndarray, "H W 3"], prediction: dict[str, Tensor]) -> UInt8[np.ndarray, "H W 3"]:
        """Boxes with a score of 0.3 or more, the top-scoring on top."""
        picture = image.copy()
        order = prediction["scores"].argsort()
        for row in order.tolist():
            label, score = int(prediction["labels"][row]), float(prediction["scores"][row])
            if score >= 0.3:
                self._draw_box(
                    picture, prediction["boxes"][row].tolist(), object_colour(label), f"{self.names[label]} {score:.2f}"
                )
        return picture

    def draw_label(self, image: UInt8[np.ndarray, "H W 3"], target: Target) -> UInt8[np.ndarray, "H W 3"]:
        """The boxes; ignored ones in gray, without text."""
        picture = image.copy()
        for box, label in zip(target["boxes"].tolist(), target["classes"].tolist(), strict=True):
            if label == IGNORED:
                self._draw_box(picture, box, (150, 150, 150), "")
            elif label != PADDING:
                self._draw_box(picture, box, object_colour(label), self.names[label])
        return picture
