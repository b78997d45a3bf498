"""Semantic segmentation, a class for every pixel; primary metric mIoU over the classes that occur in the labels."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from a2d2.classes import IGNORE, load_grouping
from a2d2.dataset import Geometry
from a2d2.frames import Frame
from models.heads import MapHead
from tasks.drawing import blend
from tasks.options import SegmentationOptions, TaskProtocol
from tasks.task import Metrics, Task, load_file, widen

LEAST_SHARE = 1e-3  # of the training pixels: rarer classes are weighted like a class with this share


def measure_lovasz(probabilities: Float[Tensor, "C n"], truth: Bool[Tensor, "C n"]) -> Float[Tensor, ""]:
    """Lovasz-Softmax (arXiv 1705.08790): the Lovasz extension of 1 - IoU, mean over those of the C classes that occur
    in `truth`, the ground truth.

    An ignored pixel must have the probability 0 and no class: its error and its share are then 0.
    """
    errors, order = torch.where(truth, 1 - probabilities, probabilities).sort(dim=1, descending=True)
    of_class = truth.gather(1, order)
    size = truth.sum(dim=1, keepdim=True)
    # intersection and union if this pixel and all with larger errors are wrong
    intersection = size - of_class.cumsum(dim=1)
    union = size + (~of_class).cumsum(dim=1)
    # by how much the IoU falls when this pixel is wrong too: the difference of the quotients in closed form, which has
    # no rounding error
    missed = 1 / union.to(errors.dtype)
    invented = intersection.to(errors.dtype) / (union * (union - 1)).clamp(min=1)
    return mean_of_occurring((errors * torch.where(of_class, missed, invented)).sum(dim=1), truth)


def mean_of_occurring(values: Float[Tensor, " C"], truth: Bool[Tensor, "C n"]) -> Float[Tensor, ""]:
    """The mean over the classes that occur, by a mask: to pick them out would make a GPU wait for their number."""
    occurs = truth.any(dim=1)
    return torch.where(occurs, values, 0.0).sum() / occurs.sum().clamp(min=1)


def measure_dice(probabilities: Float[Tensor, "C n"], truth: Bool[Tensor, "C n"]) -> Float[Tensor, ""]:
    """1 - the Dice coefficient (arXiv 1707.03237), mean over those of the C classes that occur in `truth`."""
    common = (probabilities * truth).sum(dim=1)
    size = truth.sum(dim=1)
    # a class that does not occur is left out; its quotient must be finite all the same
    return mean_of_occurring(1 - 2 * common / (probabilities.sum(dim=1) + size).clamp(min=1e-6), truth)


@contextlib.contextmanager
def _any_order() -> Iterator[None]:
    """Suspend PyTorch's determinism: integer sums are equal in any order, and the deterministic count is far slower."""
    strict = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)


class SegmentationMetrics(Metrics):
    """`miou`: mean over the classes of the grouping that occur in the labels; `iou/<class>`; `pixel_accuracy`."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        # without `sync_on_compute` one rank that computes would wait for all others
        self.jaccard = MulticlassJaccardIndex(
            len(names), ignore_index=IGNORE, average="none", validate_args=False, sync_on_compute=False
        )

    def update(self, prediction: UInt8[Tensor, "B H W"], target: UInt8[Tensor, "B H W"]) -> None:
        with _any_order():
            self.jaccard.to(prediction.device).update(prediction, target)

    def __getstate__(self) -> dict[str, Any]:
        self.jaccard.cpu()  # another process has no use for a tensor on this one's GPU
        return self.__dict__

    def merge(self, other: "SegmentationMetrics") -> None:
        if other.jaccard.update_called:  # and so is that of the merged one
            other.jaccard.merge_state({"confmat": self.jaccard.confmat.to(other.jaccard.device)})
            self.jaccard = other.jaccard

    def compute(self) -> dict[str, float | None]:
        confusion = self.jaccard.confmat
        occurs = (confusion.sum(dim=1) > 0).tolist()
        if not any(occurs):
            return {"miou": None, "pixel_accuracy": None}
        values = self.jaccard.compute().tolist()
        scores: dict[str, float | None] = {
            "miou": float(np.mean([value for value, there in zip(values, occurs, strict=True) if there])),
            "pixel_accuracy": float(confusion.diag().sum() / confusion.sum()),
        }
        for name, value, there in zip(self.names, values, occurs, strict=True):
            scores[f"iou/{name}"] = value if there else None
        return scores


class Segmentation(Task):
    """Label and target: uint8 (H, W) class ids of the grouping, 255 for "ignored". Output: logits (B, C, H, W).
    Prediction: uint8 (B, H, W) class ids.
    """

    name: ClassVar[str] = "segmentation"
    kind: ClassVar[str] = "segmentation"
    primary_metric: ClassVar[str] = "miou"
    better: ClassVar[str] = "higher"
    Options = SegmentationOptions
    options: SegmentationOptions

    def __init__(self, options: SegmentationOptions | None = None, label_statistics: dict[str, Any] | None = None):
        super().__init__(options, label_statistics)
        self.grouping = load_grouping(self.options.classes)
        self._weights: dict[tuple[Any, ...], Tensor] = {}

    def load(self, frame: Frame) -> UInt8[np.ndarray, "H W"] | None:
        classes = load_file(frame.path(self.kind), lambda path: np.load(path, allow_pickle=False))
        if classes is None:
            return None
        if classes.ndim != 2 or classes.dtype != np.uint8:
            raise ValueError(f"{frame.path(self.kind)}: expected uint8 (H, W), found {classes.dtype} {classes.shape}")
        return self.grouping.table[classes]

    def blank(self, size: tuple[int, int]) -> UInt8[Tensor, "H W"]:
        return torch.full((size[1], size[0]), IGNORE, dtype=torch.uint8)

    def transform(self, label: UInt8[np.ndarray, "h w"], geometry: Geometry) -> UInt8[Tensor, "H W"]:
        return torch.from_numpy(geometry.sample_nearest(label))

    def list_categories(self, label: UInt8[np.ndarray, "H W"]) -> set[str]:
        """The names of the classes that occur."""
        occurring = np.flatnonzero(np.bincount(label.ravel(), minlength=256)[: len(self.grouping.names)])
        return {self.grouping.names[index] for index in occurring}

    def collect_statistics(self, labels: Iterable[Any], protocol: TaskProtocol | None = None) -> None:
        """The majority class, and the class weights of the loss, whose mean over all pixels is one."""
        totals = self._count_pixels(labels)
        # a class of a few stray pixels, or of none in the sample, would otherwise rule the loss where it occurs
        shares = np.maximum(totals / max(totals.sum(), 1.0), LEAST_SHARE)
        weights = shares**-self.options.class_balance
        weights *= totals.sum() / max((weights * totals).sum(), 1e-9)
        self.label_statistics = {"constant": int(totals.argmax()), "class_weights": weights.tolist()}

    def find_constant(self, labels: Iterable[Any], protocol: TaskProtocol | None = None) -> int:
        """The majority class."""
        return int(self._count_pixels(labels).argmax())

    def _count_pixels(self, labels: Iterable[Any]) -> Float64[np.ndarray, " C"]:
        totals = np.zeros(256)
        for label in labels:
            totals += np.bincount(label.ravel(), minlength=256)
        return totals[: len(self.grouping.names)]

    def predict_constant(self, target: UInt8[Tensor, "B H W"]) -> UInt8[Tensor, "B H W"]:
        return torch.full_like(target, self.label_statistics["constant"])

    @property
    def output_format(self) -> str:
        return "map"

    def head_arguments(self) -> dict[str, Any]:
        """`outputs`: the number of classes."""
        return {"outputs": len(self.grouping.names)}

    def head(self, channels: dict[str, int]) -> nn.Module:
        return MapHead(channels, **self.head_arguments(), **self.options.head.model_dump())

    def count(self, target: UInt8[Tensor, "B H W"]) -> Int64[Tensor, " B"]:
        """Valid pixels."""
        return (target != IGNORE).flatten(1).sum(dim=1)

    def loss(self, output: Float[Tensor, "B C H W"], target: UInt8[Tensor, "B H W"]) -> Float[Tensor, ""]:
        """Cross-entropy and the optional region terms, at full size: at a quarter of it thin classes are lost."""
        logits = widen(output)
        weights = self._load_class_weights(logits.dtype, logits.device)
        total = F.cross_entropy(logits, target.long(), weights, ignore_index=IGNORE, reduction="sum")
        if self.options.lovasz or self.options.dice:
            total = total + sum(map(self._measure_regions, logits, target))
        return total

    def _measure_regions(self, logits: Float[Tensor, "C H W"], target: UInt8[Tensor, "H W"]) -> Float[Tensor, ""]:
        """The weighted terms of one image over the classes in its label, times its valid pixels.

        These terms are no sums over pixels. Multiplied by the image's pixels, and divided by the pixels of all images
        later, they give the pixel-weighted mean over images, for any division into micro-batches and ranks.
        """
        valid = target != IGNORE
        probabilities = (logits.softmax(dim=0) * valid).flatten(1)
        truth = target.flatten() == torch.arange(len(logits), device=target.device)[:, None]
        terms = ((self.options.lovasz, measure_lovasz), (self.options.dice, measure_dice))
        return valid.sum() * sum(weight * measure(probabilities, truth) for weight, measure in terms if weight)

    def _load_class_weights(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " C"] | None:
        """The class weights on the device, which are copied there once; None if there are none."""
        weights = self.label_statistics.get("class_weights")
        if weights is None:
            return None
        key = (dtype, device, *weights)
        if key not in self._weights:
            self._weights = {key: torch.tensor(weights, dtype=dtype, device=device)}
        return self._weights[key]

    def predict(self, output: Float[Tensor, "B C h w"], size: tuple[int, int]) -> UInt8[Tensor, "B H W"]:
        if tuple(output.shape[2:]) != (size[1], size[0]):
            output = F.interpolate(output, size=(size[1], size[0]), mode="bilinear", align_corners=False)
        return output.argmax(dim=1).to(torch.uint8)

    def list_classes(self, classes: str) -> tuple[str, ...]:
        return load_grouping(classes).names

    def metrics(self, protocol: TaskProtocol | None = None) -> SegmentationMetrics:
        return SegmentationMetrics(self.grouping.names)

    def draw(self, image: UInt8[np.ndarray, "H W 3"], prediction: UInt8[Tensor, "H W"]) -> UInt8[np.ndarray, "H W 3"]:
        classes = prediction.cpu().numpy()
        picture = blend(image, self.grouping.palette[classes], 0.6)
        return np.where((classes == IGNORE)[..., None], image, picture)

    def draw_label(self, image: UInt8[np.ndarray, "H W 3"], target: UInt8[Tensor, "H W"]) -> np.ndarray:
        return self.draw(image, target)
