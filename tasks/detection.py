"""Object detection in 2-D boxes; primary metric AP (0.5:0.95).

Two box coders translate between boxes and the output of a head. Dense, FCOS (arXiv 2006.09214): every location of a
dense detector predicts the smallest box that contains it near the middle. Grid, after YOLO (arXiv 1506.02640): every
cell of a coarse grid has some slots, each of which predicts one of the boxes with their middle in the cell.

A2D2 does not label far objects, so boxes below a size or visible share, and boxes of unknown class, are ignored: they
are neither positive nor background in the loss, and crowd in the metric. The metric also leaves out predictions below
the size.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import batched_nms, box_iou, sigmoid_focal_loss

from a2d2.classes import OBJECT_CLASSES, OBJECT_GROUPINGS, find_object_class
from a2d2.dataset import Geometry, Holes
from a2d2.frames import Frame
from a2d2.images import encode_json
from models.heads import DenseDetectionHead, DetectionOutput, count_cells, locate_cells
from models.thesis import CELL, BoxGridHead, BoxGridOutput
from tasks.box_matching import IGNORED, match_locations, measure_centreness
from tasks.box_scores import (
    RECALLS,
    THRESHOLDS,
    ImageBoxes,
    match_images,
    measure_calibration,
    measure_overlaps,
    measure_precision,
    split_errors,
    trace_precision,
)
from tasks.drawing import (
    FALSE,
    FOUND,
    IGNORED_COLOR,
    MISSED,
    TRUTH,
    Entry,
    View,
    draw_box,
    place_labels,
    show_image,
    write_label,
)
from tasks.options import DetectionOptions, DetectionProtocol, TaskProtocol
from tasks.soft_boxes import (
    LogitCounts,
    blend_outputs,
    calibrate_probabilities,
    encode_locations,
    find_covered,
    find_learned,
    measure_focal,
    place_locations,
    read_locations,
    unblend,
)
from tasks.task import Metrics, SoftTarget, Task, TeacherOutput, find_common_classes, load_json

DENSE_KIND = "boxes_dense"  # of the file with what teachers say at every location
UNSURE = "unsure"  # in place of the class of a box that teachers are not sure of
PADDING = -1  # class of rows of a target that are no box
ROWS = ("boxes", "classes", "known", "visible")  # of a target, what has a row for each box
DETECTIONS = 100  # at most, an image
CANDIDATES = 1000  # at most, an image before suppression
SLOTS = 10  # of a cell of the box grid
COORDINATES, EMPTY_SLOTS = 5.0, 0.5  # weights of two terms of the box grid's loss, as in YOLO's

Target = dict[str, Tensor]


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
        focal = focal.masked_fill(~wanted & ~target["annotated"][:, None], 0.0)
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

            annotated = target["annotated"][row]
            free &= annotated.all()  # the confidence of a slot is that of any class
            one_hot = F.one_hot(classes[positive], self.classes)
            counts = (one_hot > 0) | annotated

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
                + torch.where(counts, predicted[:, 5:].sigmoid() - one_hot, 0.0).square().sum()
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


STYLES = {  # of boxes in pictures: colour, and whether the line is dashed
    "ground truth": (TRUTH, False),
    "predicted": (FOUND, False),
    "found": (FOUND, False),
    "false": (FALSE, False),
    "missed": (MISSED, True),
    "ignored": (IGNORED_COLOR, False),
}
SIZES = ("small", "medium", "large")  # COCO's, of an area under 32 x 32 and 96 x 96 pixels


class DetectionMetrics(Metrics):
    """`ap` (0.5:0.95), `ap50`, `ap75`, `ap/<class>`, `ap_<size>` and `ar100`, as COCO defines them; None where the
    labels have no box.

    `ece`: calibration error of the scores, see measure_calibration; `errors/<kind>`: how many, and `loss/<kind>`: what
    they cost in AP50, see split_errors.

    `best_iou`: the thesis's "mean best IoU", only for comparison with its tables. In an image with n boxes, the n
    top-scoring predictions are used; the IoU of a box is the best with any of them, of whatever class; the mean is over
    an image's boxes, then over images with boxes. The metric can be gamed: it uses the number of boxes in the ground
    truth, one prediction can match many boxes, and false positives and wrong classes have no cost.
    """

    def __init__(self, names: tuple[str, ...], protocol: DetectionProtocol):
        self.names, self.protocol = names, protocol
        self.images: list[ImageBoxes] = []

    def update(self, prediction: list[dict[str, Tensor]], target: Target) -> None:
        target = {name: value.cpu() for name, value in target.items()}
        for row, image_prediction in enumerate(prediction):
            found = {name: value.cpu() for name, value in image_prediction.items()}
            found = {name: value[self._are_large(found["boxes"])] for name, value in found.items()}
            boxes, classes, known = (target[name][row] for name in ("boxes", "classes", "known"))
            wanted, foreign = known >= 0, (classes != PADDING) & (known < 0)
            scored = wanted & self._are_large(boxes) & (target["visible"][row] >= self.protocol.min_visible)
            # a box of unknown class may contain any object, so it is a crowd of every class; so is the picture, of a
            # class that is not annotated
            every = torch.arange(len(self.names)).repeat_interleave(int(foreign.sum()))
            hidden = (~target["annotated"][row]).nonzero()[:, 0]
            picture = torch.cat([torch.zeros(2), target["size"][row]]).expand(len(hidden), 4)
            self.images.append(
                ImageBoxes(
                    found["boxes"].numpy(),
                    found["scores"].numpy(),
                    found["labels"].numpy(),
                    torch.cat([boxes[wanted], boxes[foreign].repeat(len(self.names), 1), picture]).numpy(),
                    torch.cat([known[wanted], every, hidden]).numpy(),
                    torch.cat([~scored[wanted], torch.ones(len(every) + len(hidden), dtype=torch.bool)]).numpy(),
                )
            )

    def _are_large(self, boxes: Float[Tensor, "n 4"]) -> Bool[Tensor, " n"]:
        """Whether both sides are as long as the protocol asks for."""
        return ((boxes[:, 2:] - boxes[:, :2]) >= self.protocol.min_size).all(dim=1)

    def merge(self, other: "DetectionMetrics") -> None:
        self.images += other.images

    def compute(self) -> dict[str, float | None]:
        best_ious = [value for value in map(_measure_best_iou, self.images) if value is not None]
        if not best_ious:
            return {"ap": None, "ap50": None, "ap75": None, "best_iou": None}
        result = self._average_precision()
        found = {"ap": result["map"], "ap50": result["map_50"], "ap75": result["map_75"]}
        by_class = zip(result["classes"].reshape(-1).tolist(), result["map_per_class"].reshape(-1), strict=True)
        found |= {f"ap/{self.names[index]}": value for index, value in by_class}
        found |= {f"ap_{size}": result[f"map_{size}"] for size in SIZES} | {"ar100": result["mar_100"]}
        # the library returns -1 where there is no ground truth
        scores = {name: None if float(value) < 0 else float(value) for name, value in found.items()}
        matches = match_images(self.images, THRESHOLDS[:1])
        shown = ~matches.ignored[0]
        scores["ece"] = measure_calibration(matches.score[shown], matches.correct[0, shown])
        for kind, error in split_errors(self.images, len(self.names)).items():
            scores |= {f"errors/{kind}": error["count"], f"loss/{kind}": error["loss"]}
        return scores | {"best_iou": float(np.mean(best_ious))}

    def _average_precision(self) -> dict[str, Tensor]:
        # COCO's own thresholds, in double precision: the library's default ones are rounded to float32
        average = MeanAveragePrecision(
            backend="faster_coco_eval",
            class_metrics=True,
            iou_thresholds=THRESHOLDS.tolist(),
            rec_thresholds=RECALLS.tolist(),
            sync_on_compute=False,  # else one rank that computes would wait for all others
        )
        average.warn_on_many_detections = False
        for image in self.images:
            predicted = {"boxes": image.boxes, "scores": image.scores, "labels": image.labels}
            truth = {"boxes": image.truth, "labels": image.classes, "iscrowd": image.ignored.astype(np.int64)}
            average.update(
                [{name: torch.from_numpy(value) for name, value in predicted.items()}],
                [{name: torch.from_numpy(value) for name, value in truth.items()}],
            )
        return average.compute()

    def score_frames(self) -> list[float | None]:
        scores = []
        for image in self.images:
            each = measure_precision(match_images([image]), len(self.names))[0]
            scores.append(float(np.nanmean(each)) if np.isfinite(each).any() else None)
        return scores

    def resample(self, counts: Float64[np.ndarray, "R n"]) -> Float64[np.ndarray, " R"]:
        each = measure_precision(match_images(self.images), len(self.names), counts)
        known = np.isfinite(each)
        sums = np.where(known, each, 0.0).sum(axis=1)
        return np.divide(sums, known.sum(axis=1), out=np.full(len(counts), np.nan), where=known.any(axis=1))

    def describe(self) -> dict[str, Any]:
        """`precision`: of each class that occurs, at IoU 0.5 and the recalls 0, 0.01 ... 1."""
        matches = match_images(self.images, THRESHOLDS[:1])
        once = np.ones((1, max(len(self.images), 1)))
        curves = {}
        for label, name in enumerate(self.names):
            own = np.flatnonzero(matches.label == label)
            own = own[np.argsort(-matches.score[own], kind="stable")]
            truths = np.array([float((matches.truth_class == label).sum())])
            if truths[0]:
                curve = trace_precision(
                    once, matches.image[own], matches.correct[0, own], matches.ignored[0, own], truths
                )
                curves[name] = curve[0].round(4).tolist()
        return {"precision": curves}


def _measure_best_iou(image: ImageBoxes) -> float | None:
    boxes = image.truth[~image.ignored]
    if not len(boxes):
        return None
    top_scoring = image.boxes[np.argsort(-image.scores, kind="stable")[: len(boxes)]]
    if not len(top_scoring):
        return 0.0
    overlaps = measure_overlaps(boxes, top_scoring, np.zeros(len(top_scoring), dtype=bool))
    return float(overlaps.max(axis=1).mean())


class Detection(Task):
    """Label: the boxes of the derived file. Output: that of the box coder. Prediction, a dict for each image: `boxes`
    (n, 4) in pixels, `scores` (n,), `labels` (n,).

    Target, N >= max_boxes rows, as many as the label needs, the largest boxes first: `boxes` float32 (N, 4) edges
    x1, y1, x2, y2 in pixels; `classes` int64 (N,), PADDING for no box, IGNORED for an ignored box; `known` int64 (N,),
    the class also of ignored boxes, -1 if unknown; `visible` float32 (N,), the visible share; `size` int64 (2,), the
    (width, height) of the image; `annotated` bool (K,), whether all objects of the class have a box. For the loss at
    most max_boxes rows, and what the box coder adds.
    """

    name: ClassVar[str] = "detection"
    kind: ClassVar[str] = "boxes"
    confidence_kind: ClassVar[str] = "boxes_confidence"
    primary_metric: ClassVar[str] = "ap"
    better: ClassVar[str] = "higher"
    group_titles: ClassVar[Mapping[str, str]] = {
        "ap": "AP by class",
        "errors": "number of errors of each kind (TIDE)",
        "loss": "AP50 lost by each kind of error (TIDE)",
    }
    hub_tag: ClassVar[str] = "object-detection"
    learns_from_empty: ClassVar[bool] = True  # all of it is background
    labels_for_statistics: ClassVar[int] = 2000  # small files, and frames with too many boxes are to be reported
    Options = DetectionOptions
    options: DetectionOptions

    def __init__(self, options: DetectionOptions | None = None, label_statistics: dict[str, Any] | None = None):
        super().__init__(options, label_statistics)
        classes = self.options.classes
        self.vocabulary = classes if isinstance(classes, tuple) else OBJECT_CLASSES
        groups: Mapping[str, Sequence[str]] = {name: (name,) for name in self.vocabulary}
        if not isinstance(classes, tuple):
            # the classes of the datasets are known when these are read, see adopt_classes
            groups = OBJECT_GROUPINGS["all" if classes == "root" else classes] if isinstance(classes, str) else classes
        self.names = tuple(groups)
        members = {self.find_class(member): index for index, group in enumerate(groups.values()) for member in group}
        self.group_of = [members.get(index, -1) for index in range(len(self.vocabulary))]
        self.box_coder = BOX_CODERS[self.options.box_coder](self.options, len(self.names))

    def find_class(self, name: str) -> int | None:
        """The row of a class in the vocabulary: A2D2's in any spelling, those of another dataset as they are
        written."""
        if self.vocabulary is OBJECT_CLASSES:
            return find_object_class(name)
        return self.vocabulary.index(name) if name in self.vocabulary else None

    def find_group(self, name: str) -> int:
        """The number of the class that boxes of this name count as; -1 if they are ignored."""
        found = self.find_class(name)
        return -1 if found is None else self.group_of[found]

    def adopt_classes(self, given: Mapping[Path, Mapping[str, Any]]) -> DetectionOptions:
        if self.options.classes != "root":
            return self.options
        return self.options.model_copy(update={"classes": find_common_classes(given) or "all"})

    @property
    def foreign_classes(self) -> tuple[str, ...]:
        return () if self.vocabulary is OBJECT_CLASSES else self.vocabulary

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
            "annotated": torch.ones(len(self.names), dtype=torch.bool),
        }

    def find_annotated_conflict(self, names: Any) -> str | None:
        if isinstance(names, list) and all(self.find_class(str(name)) is not None for name in names):
            return None
        return f"annotated_classes = {names}: must be a list of some of {', '.join(self.vocabulary)}"

    def limit_classes(self, target: Target, names: Sequence[str]) -> Target:
        """A group is annotated where all its classes are."""
        annotated = {self.find_class(name) for name in names}
        return target | {"annotated": torch.tensor([own <= annotated for own in self.members.values()])}

    def find_unannotated(self, names: Sequence[str] | None) -> list[int]:
        annotated = self.limit_classes({}, names)["annotated"].tolist() if names is not None else []
        return [index for index, known in enumerate(annotated) if not known]

    def list_annotated(self, lists: Iterable[Sequence[str] | None]) -> dict[str, Any]:
        """`annotated`: the groups all of whose classes are annotated in one of the datasets."""
        known: set[str] = set()
        for names in lists:
            own = {self.find_class(name) for name in names} if names is not None else {*range(len(self.vocabulary))}
            known |= {group for group, members in self.members.items() if members <= own}
        return {} if known == set(self.names) else {"annotated": [name for name in self.names if name in known]}

    @property
    def annotated(self) -> Bool[Tensor, " K"]:
        """Of each class whether the training labels said where it is and where it is not; of others the network has
        learned nothing."""
        known = self.label_statistics.get("annotated", self.names)
        return torch.tensor([name in known for name in self.names])

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
        visible *= 1 - geometry.measure_hidden(clipped)
        known = np.array([self.find_group(box["class"]) for box in label])
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
        """The target with its matches. Of more than `max_boxes` boxes the smallest are ignored: to leave them out would
        teach that there is background."""
        classes = target["classes"].clone()
        classes[(classes >= 0).nonzero()[self.options.max_boxes :, 0]] = IGNORED  # rows go from large to small
        return self.box_coder.match(target | {"classes": classes})

    def list_categories(self, label: list[dict]) -> set[str]:
        """The names of the classes of its boxes."""
        groups = {self.find_group(box["class"]) for box in label} - {-1}
        return {self.names[group] for group in groups}

    def collect_statistics(self, labels: Iterable[Any], protocol: DetectionProtocol | None = None) -> None:
        """The constant baseline, and `fuller`, where there are frames with more boxes than training learns: how many,
        of how many, and the number of boxes of the fullest."""
        counts = [sum(self.find_group(box["class"]) >= 0 for box in label) for label in labels]
        fuller = sum(count > self.options.max_boxes for count in counts)
        self.label_statistics = {"constant": self.find_constant(counts)}
        if fuller:
            self.label_statistics["fuller"] = [fuller, len(counts), max(counts)]

    def find_doubt(self) -> str | None:
        if "fuller" not in self.label_statistics:
            return None
        fuller, looked_at, most = self.label_statistics["fuller"]
        return (
            f"{fuller} of {looked_at} training frames looked at have more than {self.options.max_boxes} boxes, up to "
            f"{most}: their smallest are ignored in training; raise tasks.detection.max_boxes to keep them"
        )

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

    @property
    def members(self) -> dict[str, set[int | None]]:
        """Group -> the object classes in it."""
        return {
            name: {index for index, group in enumerate(self.group_of) if group == place}
            for place, name in enumerate(self.names)
        }

    def find_conflict(self, protocol: TaskProtocol) -> str | None:
        given = getattr(protocol, "classes", None)
        wanted = self.options.classes if given is None else given
        scorer = type(self)(self.options.model_copy(update={"classes": wanted}))
        if self.vocabulary != scorer.vocabulary or self._map_groups(self.members, scorer) is None:
            return f"its classes are {self.options.classes}, and {wanted} is scored"
        return None

    @staticmethod
    def _map_groups(own: Mapping[str, set[int | None]], scorer: "Detection") -> list[int] | None:
        """Of each own group the group of `scorer` it belongs to, -1 if to none; None if one belongs to several, or if
        the own groups lack a class that is scored."""
        table: list[int] = []
        for members in own.values():
            groups = {-1 if member is None else scorer.group_of[member] for member in members}
            if len(groups) != 1:
                return None
            table.append(groups.pop())
        scored = {member for member, group in enumerate(scorer.group_of) if group >= 0}
        return table if scored <= set().union(*own.values()) else None

    def translate(self, prediction: list[dict[str, Tensor]], scorer: "Detection") -> list[dict[str, Tensor]]:
        """What belongs to none of the classes of `scorer` is left out."""
        if scorer.group_of == self.group_of:
            return prediction
        return [self._translate_image(each, self.members, scorer) for each in prediction]

    @classmethod
    def _translate_image(
        cls, found: dict[str, Tensor], own: Mapping[str, set[int | None]], scorer: "Detection"
    ) -> dict[str, Tensor]:
        table = torch.tensor(cls._map_groups(own, scorer), device=found["labels"].device)
        labels = table[found["labels"]]
        return {name: value[labels >= 0] for name, value in (found | {"labels": labels}).items()}

    def describe_files(self) -> dict[str, Any]:
        """`classes`: group -> the classes of A2D2 in it; a box has the name of its group."""
        groups: dict[str, list[str]] = {name: [] for name in self.names}
        for index, group in enumerate(self.group_of):
            if group >= 0:
                groups[self.names[group]].append(self.vocabulary[index])
        return {"classes": groups}

    def find_file_conflict(self, about: Mapping[str, Any]) -> str | None:
        try:
            groups = {
                name: [(member, self.find_class(member)) for member in own] for name, own in about["classes"].items()
            }
        except (KeyError, AttributeError):
            return "its dataset.json does not say which `classes` of boxes there are"
        if unknown := [name for members in groups.values() for name, index in members if index is None]:
            return f"no class {unknown[0]!r} among {', '.join(self.vocabulary)}"
        if self._map_groups({name: {index for _, index in members} for name, members in groups.items()}, self) is None:
            return f"its classes are {about['classes']}, and {self.options.classes} is scored"
        return None

    def find_categories(self, box: Mapping[str, Any]) -> list[tuple[int, bool]]:
        """The classes a labelled box stands for, each with whether it is a crowd: of unknown class it is one of all."""
        group = self.find_group(box["class"])
        return [(group, False)] if group >= 0 else [(each, True) for each in range(len(self.names))]

    def encode_prediction(self, prediction: dict[str, Tensor]) -> bytes:
        """The boxes, the top-scoring first, each with `box`, `class` and `score`."""
        order = prediction["scores"].argsort(descending=True, stable=True).tolist()
        boxes, scores, labels = (prediction[name].tolist() for name in ("boxes", "scores", "labels"))
        return encode_json(
            {"boxes": [{"box": boxes[row], "class": self.names[labels[row]], "score": scores[row]} for row in order]}
        )

    def load_prediction(
        self, path: Path, about: Mapping[str, Any], size: tuple[int, int], own: tuple[int, int]
    ) -> dict[str, Tensor]:
        """In the classes of this task; boxes of other classes are left out."""
        content = load_json(path, "boxes")
        if content is None:
            raise FileNotFoundError(f"there is no {path}")
        groups = {name: {self.find_class(member) for member in members} for name, members in about["classes"].items()}
        names = list(groups)
        try:
            found = {
                "boxes": torch.tensor([each["box"] for each in content["boxes"]], dtype=torch.float32).view(-1, 4),
                "scores": torch.tensor([each["score"] for each in content["boxes"]], dtype=torch.float32),
                "labels": torch.tensor([names.index(each["class"]) for each in content["boxes"]], dtype=torch.int64),
            }
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: a box needs box, class and score, and one has not ({error!r})") from error
        if not all(value.isfinite().all() for value in found.values()):
            raise ValueError(f"{path} has a box or score that is not finite")
        if (turned := (found["boxes"][:, 2:] < found["boxes"][:, :2]).any(dim=1)).any():
            box = found["boxes"][turned][0].tolist()
            raise ValueError(f"{path} has the box {box}, whose edges are not x1 <= x2, y1 <= y2 (no width and height)")
        if (outside := (found["scores"] < 0) | (found["scores"] > 1)).any():
            raise ValueError(f"{path} has the score {found['scores'][outside][0]:g}, which is not from 0 to 1")
        found["boxes"] = found["boxes"] * torch.tensor([size[0] / own[0], size[1] / own[1]] * 2)
        return self._translate_image(found, groups, self)

    def batch_predictions(self, predictions: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        return predictions

    def export_names(self) -> dict[str, str]:
        suppressed = f"keep those above {self.options.score_threshold:g}, suppress by class above IoU "
        return {
            "boxes": "float32 (batch, L, 4): edges x1, y1, x2, y2 in pixels of the input, all locations",
            "scores": "float32 (batch, L, classes): the classes are listed under files; "
            f"{suppressed}{self.options.nms_threshold:g}, and keep {DETECTIONS} a picture",
        }

    def export_output(self, output: Any, size: tuple[int, int]) -> dict[str, Tensor]:
        boxes, scores = self.box_coder.decode(output)
        height, width = output.size
        edges = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))
        return {"boxes": edges, "scores": scores}

    def encode_confidence(
        self, output: Any, mirrored: Any, prediction: list[dict[str, Tensor]], size: tuple[int, int]
    ) -> list[bytes]:
        """JSON: `scores`, in the order of the boxes in their file."""
        scores = (each["scores"].sort(descending=True, stable=True).values.tolist() for each in prediction)
        return [encode_json({"scores": row}) for row in scores]

    @property
    def _strides(self) -> tuple[int, ...]:
        """Of the dense output. ValueError for the box grid."""
        if not isinstance(self.box_coder, DenseBoxCoder):
            raise ValueError("tasks.detection.box_coder: the box grid cannot teach, nor learn dense soft targets")
        return self.box_coder.strides

    def blend(
        self,
        outputs: Sequence[TeacherOutput],
        size: tuple[int, int],
        calibration: Mapping[str, Any] | None = None,
        speakers: Sequence["Detection"] | None = None,
    ) -> SoftTarget:
        """See blend_outputs; the probabilities are calibrated, those of classes that no teacher has learned are 0."""
        assert self._strides
        known = [each.annotated for each in (speakers or [self] * len(outputs))]
        said = blend_outputs(outputs, None if all(each.all() for each in known) else known)
        scores = calibrate_probabilities(said["scores"], (calibration or {}).get("dense"))
        if not (together := torch.stack(known).any(dim=0)).all():
            scores = scores.masked_fill(~together.to(scores.device), 0.0)
        return said | {"scores": scores}

    def join_teachers(self, teachers: Sequence["Detection"]) -> "Detection":
        together = torch.stack([each.annotated for each in teachers]).any(dim=0).tolist()
        statistics = {key: value for key, value in self.label_statistics.items() if key != "annotated"}
        if not all(together):
            statistics["annotated"] = [name for name, known in zip(self.names, together, strict=True) if known]
        return type(self)(self.options, statistics)

    def calibrate(self, said: Iterable[tuple[SoftTarget, Target]]) -> dict[str, Any]:
        """`dense`, and `boxes` after suppression: slope and offset of the logits of their scores. At a location the
        truth is whether it is matched with a box of the class, of a box whether it has one of its class to itself with
        an IoU of 0.5; ignored ones do not count."""
        dense, boxes = LogitCounts(), LogitCounts()
        pairs = [({name: value.cpu() for name, value in one.items()}, target) for one, target in said]
        for one, target in pairs:
            prepared = [self.prepare_loss({name: value[row] for name, value in target.items()})
                        for row in range(len(target["classes"]))]  # fmt: skip
            for row, each in enumerate(prepared):
                match = each["match"].long()
                kinds = each["classes"][match.clamp(min=0)].masked_fill(match < 0, PADDING)
                right = kinds[:, None] == torch.arange(len(self.names))
                known = (match != IGNORED)[:, None] & (right | each["annotated"])
                dense.add(one["scores"][row][known].numpy(), right[known].numpy())
        line = dense.fit()
        for one, target in pairs:
            moved = one | {"scores": calibrate_probabilities(one["scores"], line)}
            metrics = DetectionMetrics(self.names, DetectionProtocol(min_size=0.0, min_visible=0.0))
            found = [self._find_boxes(moved, row, None, tuple(one["size"][row].tolist()))
                     for row in range(len(target["classes"]))]  # fmt: skip
            counted = (target["classes"] >= 0) | (target["classes"] == PADDING)
            metrics.update(found, target | {"known": target["known"].where(counted, -1)})
            matches = match_images(metrics.images, THRESHOLDS[:1])
            shown = ~matches.ignored[0]
            boxes.add(matches.score[shown], matches.correct[0, shown])
        return {"dense": list(line), "boxes": list(boxes.fit())}

    def _find_boxes(
        self, said: SoftTarget, row: int, line: Sequence[float] | None, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """The boxes after suppression, for a picture of (width, height) `size`, with scores calibrated by the line."""
        (found,) = self.predict(unblend(said, self._strides, row), size)
        return found | {"scores": calibrate_probabilities(found["scores"], line)}

    @property
    def soft_kind(self) -> str:
        return DENSE_KIND if self.options.pseudo.targets == "dense" else self.kind

    @property
    def soft_kinds(self) -> tuple[str, ...]:
        return (self.soft_kind,)

    def describe_agreement(self, size: tuple[int, int]) -> dict[str, Any]:
        """Teachers may have learned different classes of those that they have in common."""
        dense = {"size": list(size), "strides": list(self._strides), "classes": list(self.names)}
        return {self.kind: self.describe_files(), DENSE_KIND: dense}

    def describe_soft_files(self, size: tuple[int, int]) -> dict[str, dict[str, Any]]:
        """With `annotated_classes` where the teachers have not learned all classes."""
        known = self.annotated.tolist()
        limits: dict[str, Any] = {}
        if not all(known):
            groups = self.describe_files()["classes"]
            names = [name for name, learned in zip(self.names, known, strict=True) if learned]
            limits["annotated_classes"] = [member for name in names for member in groups[name]]
        return {kind: about | limits for kind, about in self.describe_agreement(size).items()}

    def find_pseudo_conflict(self, online: bool) -> str | None:
        if self.options.pseudo.weighting != "equal":
            return (
                f"tasks.detection.pseudo.weighting={self.options.pseudo.weighting} has no effect: dense targets count "
                "by their probabilities anyway, and boxes alike; leave it at equal"
            )
        if online and not isinstance(self.box_coder, DenseBoxCoder):
            return "tasks.detection.box_coder=grid cannot teach, so it cannot go with train.mean_teacher; take dense"
        return None

    def find_soft_conflict(self, about: Mapping[str, Mapping[str, Any]], size: tuple[int, int]) -> str | None:
        if self.options.pseudo.targets == "boxes":
            return super().find_soft_conflict(about, size)
        if not isinstance(self.box_coder, DenseBoxCoder):
            return "the box grid cannot learn dense soft targets: take tasks.detection.pseudo.targets=boxes"
        own = {"size": list(size), "strides": list(self._strides), "classes": list(self.names)}
        given = about[DENSE_KIND]
        if differing := [name for name in own if own[name] != given.get(name)]:
            name = differing[0]
            return (
                f"their teacher has {name} {given.get(name)}, this network {own[name]}: take the same network, or "
                "tasks.detection.pseudo.targets=boxes"
            )
        groups, their = self.describe_files()["classes"], about.get(self.kind, {}).get("classes")
        if differing := [name for name in groups if their is not None and groups[name] != their.get(name)]:
            name = differing[0]
            return (
                f"their teacher's {name} is {', '.join(their.get(name, ()))}, that of this network "
                f"{', '.join(groups[name])}: give both the same tasks.detection.classes"
            )
        return None

    def encode_soft(
        self, said: SoftTarget, row: int, size: tuple[int, int], calibration: Mapping[str, Any] | None = None
    ) -> dict[str, bytes]:
        found = self._find_boxes(said, row, (calibration or {}).get("boxes"), size)
        return {self.kind: self.encode_prediction(found), DENSE_KIND: encode_locations(said, row)}

    def load_soft(
        self, frame: Frame, about: Mapping[str, Mapping[str, Any]], own: tuple[int, int]
    ) -> dict[str, Any] | None:
        """Dense: arrays; else `label`, the boxes as a label has them. `annotated`: the classes that the teachers have
        learned."""
        names = about[self.soft_kind].get("annotated_classes")
        annotated = np.ones(len(self.names), dtype=bool)
        if names is not None:
            annotated = self.limit_classes({}, names)["annotated"].numpy()
        if self.options.pseudo.targets == "boxes":
            try:
                found = self.load_prediction(frame.path(self.kind), about[self.kind], own, own)
            except FileNotFoundError:
                return None
            return {"label": self._choose_boxes(found), "annotated": annotated}
        size = tuple(about[DENSE_KIND]["size"])
        locations = sum(math.prod(count_cells(size[::-1], stride)) for stride in self._strides)
        path = frame.path(DENSE_KIND)
        try:
            stored = read_locations(path, len(self.names), locations)
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run pseudo_label.py again") from error
        return stored | {"size": np.array(size), "annotated": annotated}

    def _choose_boxes(self, found: dict[str, Tensor]) -> list[dict]:
        """Boxes of teachers as a label; those they are not sure of are of unknown class, and so ignored."""
        options = self.options.pseudo
        example = {group: self.vocabulary[index] for index, group in reversed(list(enumerate(self.group_of)))}
        return [
            {"box": box, "class": example[label] if score >= options.threshold else UNSURE, "visible": 1.0}
            for box, label, score in zip(*(found[name].tolist() for name in ("boxes", "labels", "scores")), strict=True)
            if score >= min(options.threshold, options.ignored_from)
        ]

    def transform_soft(self, said: dict[str, Any], geometry: Geometry) -> SoftTarget:
        annotated = {"annotated": torch.from_numpy(said["annotated"])}
        if "label" in said:
            return self.prepare_loss(self.transform(said["label"], geometry) | annotated)
        own = tuple(said["size"].tolist())
        return place_locations(said, own, self._strides, geometry, len(self.names)) | annotated

    def collate_soft(self, targets: list[SoftTarget]) -> SoftTarget:
        return default_collate(targets) if self.options.pseudo.targets == "dense" else self.collate(targets)

    def prepare_soft(self, said: SoftTarget, holes: Sequence[Holes] = ()) -> SoftTarget:
        device = said["scores"].device
        holes = holes or [()] * len(said["scores"])
        if self.options.pseudo.targets == "dense":
            hidden = torch.zeros(said["scores"].shape[:2], dtype=torch.bool, device=device)
            if any(holes):
                size = tuple(said["size"][0].tolist())
                covered = np.stack([find_covered(size, self._strides, own) for own in holes])
                hidden = torch.from_numpy(covered).to(device)
            annotated = self.annotated.to(device).expand(len(hidden), -1)
            limits = {"hidden": hidden, "annotated": annotated}
            return {name: said[name] for name in ("scores", "boxes", "centreness")} | limits
        targets = []
        sizes = map(tuple, said["size"].tolist())
        for row, (size, own) in enumerate(zip(sizes, holes, strict=True)):
            found = self._find_boxes(said, row, None, size)
            label = self._choose_boxes({name: value.cpu() for name, value in found.items()})
            geometry = replace(Geometry.identity(size), holes=own)
            target = self.transform(label, geometry) | {"annotated": self.annotated}
            targets.append(self.prepare_loss(target))
        return {name: value.to(device) for name, value in self.collate(targets).items()}

    def count_soft(self, target: SoftTarget) -> Float64[Tensor, " B"]:
        """Dense: the probabilities of the learned locations, added up; else positives."""
        if "scores" not in target:
            return self.count(target).double()
        learned = find_learned(target, self.options.pseudo.learned_share)
        return (target["scores"].amax(dim=2) * learned).double().sum(dim=1)

    def soft_loss(self, output: DetectionOutput | BoxGridOutput, target: SoftTarget) -> Float[Tensor, ""]:
        """Dense: quality focal loss of the classes; of the learned locations also GIoU loss and cross-entropy of the
        centre-ness, weighted by their probabilities. Of a class that the teachers have not learned nothing is."""
        if "scores" not in target:
            return self.loss(output, target)
        learned = find_learned(target, self.options.pseudo.learned_share)
        wanted = target["scores"].masked_fill(~learned[..., None], 0.0).to(output.classes.dtype)
        left_out = target["hidden"][..., None] | ~target["annotated"][:, None]
        focal = measure_focal(output.classes, wanted).masked_fill(left_out, 0.0)
        distances = target["boxes"].to(output.boxes.dtype).masked_fill(~learned[..., None], 1.0)
        central = F.binary_cross_entropy_with_logits(
            output.centreness, target["centreness"].to(output.centreness.dtype), reduction="none"
        )
        weights = wanted.amax(dim=2)
        return focal.sum() + ((1 - measure_giou(output.boxes, distances) + central) * weights).sum()

    def metrics(self, protocol: DetectionProtocol | None = None) -> DetectionMetrics:
        return DetectionMetrics(self.names, protocol or DetectionProtocol())

    def draw(self, axes: Axes, view: View, prediction: Any = None, target: Target | None = None) -> None:
        """Ground truth: its boxes, ignored ones thin and gray. A prediction, of boxes with a score of the view's
        threshold or more: those that are found, false, and, dashed, the missed ones; without ground truth all alike.

        A box is found if it has a box of its class to itself with an IoU of 0.5 or more.
        """
        show_image(axes, view)
        metrics = DetectionMetrics(self.names, DetectionProtocol(min_size=0.0, min_visible=0.0))
        ours = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
        if prediction is not None:
            ours = {name: value[prediction["scores"] >= view.threshold] for name, value in prediction.items()}
            view.shown["predicted" if target is None else "found"] = None  # the key says so where there is none, too
        if target is None:
            self._draw_boxes(axes, view, [(ours, row, "predicted") for row in range(len(ours["boxes"]))])
            return
        metrics.update([ours], self.collate([target]))
        (image,) = metrics.images
        # what training and the usual protocol ignore is neither found nor missed
        small = (target["classes"] == IGNORED)[target["known"] >= 0].numpy()
        ignored = image.ignored.copy()
        ignored[: len(small)] |= small
        image = replace(image, ignored=ignored)
        truth = {"boxes": torch.from_numpy(image.truth), "labels": torch.from_numpy(image.classes)}
        rows = np.flatnonzero(~ignored).tolist()
        # not that of the picture, where a class is not annotated
        of_boxes = len(ignored) - int((~target["annotated"]).sum())
        unseen = [(truth, row, "ignored") for row in np.flatnonzero(ignored[:of_boxes]).tolist()]
        if prediction is None:
            self._draw_boxes(axes, view, unseen + [(truth, row, "ground truth") for row in rows])
            return
        matches = match_images([image], THRESHOLDS[:1])
        found = set(matches.row[matches.row >= 0].tolist())
        drawn = unseen + [(truth, row, "missed") for row in rows if row not in found]
        for place, row in enumerate(matches.index.tolist()):
            if not matches.ignored[0, place]:
                drawn.append((ours, row, "found" if matches.correct[0, place] else "false"))
        self._draw_boxes(axes, view, drawn)

    def _draw_boxes(self, axes: Axes, view: View, drawn: list[tuple[dict[str, Tensor], int, str]]) -> None:
        """Each: boxes, the row of one, and what it is, one of STYLES."""
        labels = []
        for boxes, row, name in drawn:
            color, dashed = STYLES[name]
            box = boxes["boxes"][row].tolist()
            thin = name == "ignored"
            draw_box(axes, box, color, dashed, 0.6 if thin else 1.1)
            view.shown[name] = None
            if not thin:
                text = self.names[int(boxes["labels"][row])]
                score = float(boxes["scores"][row]) if "scores" in boxes else 2.0
                labels.append((score, box, f"{text} {score:.2f}" if "scores" in boxes else text, color))
        labels.sort(key=lambda label: -label[0])  # where there is no room for all, the top-scoring are written
        size = view.text * 0.75
        places = place_labels(view, [label[1] for label in labels], [label[2] for label in labels], size)
        for (_, _, text, color), place in zip(labels, places, strict=True):
            if place is not None:
                write_label(axes, view, place, text, color, size)
        axes.set_xlim(0, view.size[0])
        axes.set_ylim(view.size[1], 0)

    def record(self, prediction: Any = None, target: Target | None = None, camera: Any = None) -> list[tuple[str, Any]]:
        """Boxes with their classes, predicted ones with their scores."""
        import rerun

        if prediction is None:
            kept = target["classes"] >= 0
            boxes, names = target["boxes"][kept], [self.names[label] for label in target["classes"][kept].tolist()]
            color = TRUTH
        else:
            boxes, color = prediction["boxes"], FOUND
            pairs = zip(prediction["labels"].tolist(), prediction["scores"].tolist(), strict=True)
            names = [f"{self.names[label]} {score:.2f}" for label, score in pairs]
        red, green, blue = (round(255 * part) for part in to_rgb(color))
        edges = boxes.cpu().numpy()
        shown = rerun.Boxes2D(array=edges, array_format=rerun.Box2DFormat.XYXY, labels=names, colors=[red, green, blue])
        return [("camera/boxes", shown)]

    def list_key(self, view: View) -> list[Entry]:
        shown = view.shown
        if view.steady:
            shown = {name: STYLES[name] for name in STYLES if view.labels != (name == "predicted")}
        entries = [Entry(name, *STYLES[name]) for name in STYLES if name in shown]
        if {"found", "false", "missed"} & shown.keys():
            note = f"score {view.threshold:g} or more; found: IoU of 0.5 or more with a box of its class"
            return [*entries, Entry(note)]
        return [*entries, Entry(f"score {view.threshold:g} or more")] if "predicted" in shown else entries
