"""Semantic segmentation, a class for every pixel; primary metric mIoU over the classes that occur in the labels."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_confusion_matrix

from a2d2.classes import IGNORE, choose_colours, load_grouping, map_classes
from a2d2.dataset import Geometry, Holes
from a2d2.frames import Frame
from a2d2.images import encode_npy, encode_png
from models.heads import MapHead
from tasks.drawing import FALSE, Entry, View, show_map, write_note
from tasks.options import SegmentationOptions, TaskProtocol
from tasks.task import (
    Metrics,
    SoftTarget,
    Task,
    TeacherOutput,
    find_common_classes,
    hide_rows,
    load_file,
    load_gray,
    widen,
)

PROBABILITY_SCALE = 65535  # of a stored probability of 1
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


def measure_mean_iou(regions: Float64[np.ndarray, "R 3 C"]) -> Float64[np.ndarray, " R"]:
    """Of each row the mean IoU over the classes that are labelled in it, from the numbers of pixels that are right,
    labelled and predicted; NaN where nothing is labelled."""
    right, labelled, predicted = regions.transpose(1, 0, 2)
    values = right / np.maximum(labelled + predicted - right, 1)
    occurring = (labelled > 0).sum(axis=1)
    sums = np.where(labelled > 0, values, 0.0).sum(axis=1)
    return np.divide(sums, occurring, out=np.full(len(regions), np.nan), where=occurring > 0)


class SegmentationMetrics(Metrics):
    """`miou`: mean over the classes of the grouping that occur in the labels; `iou/<class>`; `pixel_accuracy`.

    A predicted id that is no class of the grouping is wrong, whatever the label.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.confusion = np.zeros((len(names), len(names) + 1), dtype=np.int64)  # the last column is no class
        self.regions: list[np.ndarray] = []  # of each row uint32 (3, C): pixels that are right, labelled, predicted

    def update(self, prediction: UInt8[Tensor, "B H W"], target: UInt8[Tensor, "B H W"]) -> None:
        size = len(self.names) + 1
        # the library counts in one class more, for predictions that are none
        with _any_order():
            for row, wanted in zip(prediction.clamp(max=size - 1), target, strict=True):
                counts = multiclass_confusion_matrix(row, wanted, size, ignore_index=IGNORE, validate_args=False)
                matrix = counts.cpu().numpy()[:-1]
                self.confusion += matrix
                regions = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)[:-1]
                self.regions.append(np.stack(regions).astype(np.uint32))

    def merge(self, other: "SegmentationMetrics") -> None:
        self.confusion += other.confusion
        self.regions += other.regions

    def compute(self) -> dict[str, float | None]:
        labelled = self.confusion.sum(axis=1)
        right = self.confusion.diagonal()
        if not labelled.any():
            return {"miou": None, "pixel_accuracy": None}
        values = right / np.maximum(labelled + self.confusion[:, :-1].sum(axis=0) - right, 1)
        scores: dict[str, float | None] = {
            "miou": float(values[labelled > 0].mean()),
            "pixel_accuracy": float(right.sum() / labelled.sum()),
        }
        for name, value, count in zip(self.names, values.tolist(), labelled, strict=True):
            scores[f"iou/{name}"] = value if count else None
        return scores

    def score_frames(self) -> list[float | None]:
        each = measure_mean_iou(np.stack(self.regions).astype(np.float64)) if self.regions else np.zeros(0)
        return [float(value) if np.isfinite(value) else None for value in each]

    def resample(self, counts: Float64[np.ndarray, "R n"]) -> Float64[np.ndarray, " R"]:
        return measure_mean_iou(np.tensordot(counts, np.stack(self.regions).astype(np.float64), 1))

    def describe(self) -> dict[str, Any]:
        """`classes`, and `confusion`: pixels of each labelled class (row) by predicted class (column), of which the
        last is none of them."""
        return {"classes": list(self.names), "confusion": self.confusion.tolist()}


def _read_class_map(path: Path) -> UInt8[np.ndarray, "H W"]:
    classes = load_file(path, lambda path: np.load(path, allow_pickle=False))
    if classes is None:
        raise FileNotFoundError(f"there is no {path}")
    if classes.ndim != 2 or classes.dtype != np.uint8:
        raise ValueError(f"{path}: expected uint8 (H, W), found {classes.dtype} {classes.shape}")
    return classes


def _encode_probability(probability: Float[Tensor, "H W"]) -> bytes:
    return encode_png((probability.cpu().numpy() * PROBABILITY_SCALE).round().astype(np.uint16))


class Segmentation(Task):
    """Label and target: uint8 (H, W) class ids of the grouping, 255 for "ignored". Output: logits (B, C, H, W).
    Prediction: uint8 (B, H, W) class ids.
    """

    name: ClassVar[str] = "segmentation"
    kind: ClassVar[str] = "segmentation"
    confidence_kind: ClassVar[str] = "segmentation_confidence"
    primary_metric: ClassVar[str] = "miou"
    better: ClassVar[str] = "higher"
    group_titles: ClassVar[Mapping[str, str]] = {"iou": "IoU by class"}
    error_key: ClassVar[str] = "orange: wrong pixels\ndark: no label"
    hub_tag: ClassVar[str] = "image-segmentation"
    Options = SegmentationOptions
    options: SegmentationOptions

    def __init__(self, options: SegmentationOptions | None = None, label_statistics: dict[str, Any] | None = None):
        super().__init__(options, label_statistics)
        # the classes of the datasets are known when these are read, see adopt_classes
        self.grouping = load_grouping("all" if self.options.classes == "root" else self.options.classes)
        self._weights: dict[tuple[Any, ...], Tensor] = {}

    def adopt_classes(self, given: Mapping[Path, Mapping[str, Any]]) -> SegmentationOptions:
        if self.options.classes != "root":
            return self.options
        names = find_common_classes(given)
        if names is None:
            return self.options.model_copy(update={"classes": "all"})
        colours = next(iter(given.values())).get("colours") or choose_colours(len(names))
        classes = {name: tuple(colour) for name, colour in zip(names, colours, strict=True)}
        return self.options.model_copy(update={"classes": classes})

    @property
    def foreign_classes(self) -> tuple[str, ...]:
        return () if isinstance(self.options.classes, str) else self.grouping.names

    def load(self, frame: Frame) -> UInt8[np.ndarray, "H W"] | None:
        try:
            classes = _read_class_map(frame.path(self.kind))
        except FileNotFoundError:
            return None
        return self.grouping.table[classes]

    def blank(self, size: tuple[int, int]) -> UInt8[Tensor, "H W"]:
        return torch.full((size[1], size[0]), IGNORE, dtype=torch.uint8)

    def transform(self, label: UInt8[np.ndarray, "h w"], geometry: Geometry) -> UInt8[Tensor, "H W"]:
        return torch.from_numpy(geometry.hide(geometry.sample_nearest(label), IGNORE))

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
        return self._resize(output, size).argmax(dim=1).to(torch.uint8)

    def _resize(self, output: Float[Tensor, "B C h w"], size: tuple[int, int]) -> Float[Tensor, "B C H W"]:
        if tuple(output.shape[2:]) == (size[1], size[0]):
            return output
        return F.interpolate(output, size=(size[1], size[0]), mode="bilinear", align_corners=False)

    def find_conflict(self, protocol: TaskProtocol) -> str | None:
        wanted = getattr(protocol, "classes", None) or self.options.classes
        try:
            map_classes(self.grouping.names, load_grouping(wanted))
        except ValueError:
            return f"its classes are {self.options.classes}, and {wanted} is scored"
        return None

    def translate_constant(self, scorer: "Segmentation") -> int:
        return int(map_classes(self.grouping.names, scorer.grouping)[self.label_statistics["constant"]])

    def translate(self, prediction: UInt8[Tensor, "B H W"], scorer: "Segmentation") -> UInt8[Tensor, "B H W"]:
        if scorer.grouping is self.grouping:
            return prediction
        table = torch.from_numpy(map_classes(self.grouping.names, scorer.grouping))
        return table.to(prediction.device)[prediction.long()]

    def describe_files(self) -> dict[str, Any]:
        """`classes`: the names, by id."""
        return {"classes": list(self.grouping.names)}

    def find_file_conflict(self, about: Mapping[str, Any]) -> str | None:
        try:
            map_classes(tuple(about["classes"]), self.grouping)
        except KeyError:
            return "its dataset.json does not say which `classes` the ids of segmentation mean"
        except ValueError as error:
            return str(error)
        return None

    def encode_prediction(self, prediction: UInt8[Tensor, "H W"]) -> bytes:
        return encode_npy(prediction.cpu().numpy())

    def load_prediction(
        self, path: Path, about: Mapping[str, Any], size: tuple[int, int], own: tuple[int, int]
    ) -> UInt8[Tensor, "H W"]:
        """The ids of this task's classes; 255 for what is none of them, which is wrong wherever there is a label."""
        stored = _read_class_map(path)
        if stored.shape != own[::-1]:
            raise ValueError(f"{path} is {stored.shape[1]}x{stored.shape[0]}, its dataset {own[0]}x{own[1]}")
        table = map_classes(tuple(about["classes"]), self.grouping)
        return torch.from_numpy(Geometry.identity(own, size).sample_nearest(table[stored]))

    def batch_predictions(self, predictions: list[Tensor]) -> UInt8[Tensor, "B H W"]:
        return torch.stack(predictions)

    def export_names(self) -> dict[str, str]:
        return {"segmentation": "uint8 (batch, H, W): ids of the classes listed under files"}

    def encode_confidence(
        self, output: Float[Tensor, "B C h w"], mirrored: Any, prediction: Any, size: tuple[int, int]
    ) -> list[bytes]:
        """16-bit gray PNG: the probability of the predicted class x 65535."""
        best = self._resize(output, size).float().softmax(dim=1).amax(dim=1)
        return [_encode_probability(row) for row in best]

    def blend(
        self,
        outputs: Sequence[TeacherOutput],
        size: tuple[int, int],
        calibration: Mapping[str, Any] | None = None,
        speakers: Sequence[Any] | None = None,
    ) -> SoftTarget:
        """`classes` uint8 (B, H, W), and `probability` float32 (B, H, W) of them, the mean over teachers and mirror
        images."""
        each = [
            self._resize(output.flip(3) if mirrored else output, size).float().softmax(dim=1)
            for output, mirrored in outputs
        ]
        best = torch.stack(each).mean(dim=0).max(dim=1)
        return {"classes": best.indices.to(torch.uint8), "probability": best.values}

    def encode_soft(
        self, said: SoftTarget, row: int, size: tuple[int, int], calibration: Mapping[str, Any] | None = None
    ) -> dict[str, bytes]:
        return {
            self.kind: self.encode_prediction(said["classes"][row]),
            self.confidence_kind: _encode_probability(said["probability"][row]),
        }

    def load_soft(
        self, frame: Frame, about: Mapping[str, Mapping[str, Any]], own: tuple[int, int]
    ) -> dict[str, np.ndarray] | None:
        try:
            classes = self.load_prediction(frame.path(self.kind), about[self.kind], own, own).numpy()
        except FileNotFoundError:
            return None
        stored = load_gray(frame.path(self.confidence_kind), classes.shape)
        return {"classes": classes, "probability": stored.astype(np.float32) / PROBABILITY_SCALE}

    def transform_soft(self, said: dict[str, np.ndarray], geometry: Geometry) -> SoftTarget:
        return {
            "classes": self.transform(said["classes"], geometry),
            "probability": torch.from_numpy(geometry.sample_nearest(said["probability"])),
        }

    def prepare_soft(self, said: SoftTarget, holes: Sequence[Holes] = ()) -> SoftTarget:
        return said | {"classes": hide_rows(said["classes"], holes, IGNORE)}

    def count_soft(self, target: SoftTarget) -> Float64[Tensor, " B"]:
        """Pixels."""
        return self.count(target["classes"]).double()

    def soft_loss(self, output: Float[Tensor, "B C H W"], target: SoftTarget) -> Float[Tensor, ""]:
        """Cross-entropy on the pixels that teachers are sure of."""
        options, logits = self.options.pseudo, widen(output)
        weights = self._load_class_weights(logits.dtype, logits.device)
        each = F.cross_entropy(logits, target["classes"].long(), weights, ignore_index=IGNORE, reduction="none")
        probability = target["probability"].to(each.dtype)
        sure = (probability >= options.threshold).to(each.dtype)
        return (each * sure * (probability if options.weighting == "confidence" else 1.0)).sum()

    def metrics(self, protocol: TaskProtocol | None = None) -> SegmentationMetrics:
        return SegmentationMetrics(self.grouping.names)

    def draw(self, axes: Axes, view: View, prediction: Any = None, target: Any = None) -> None:
        """Colours over a gray picture; what has no class stays as it is."""
        classes = (target if prediction is None else prediction).cpu().numpy()
        colors = self.grouping.palette[classes]
        none = classes >= len(self.grouping.names)
        gray = view.image.mean(axis=2, keepdims=True)
        picture = np.where(none[..., None], view.image, 0.7 * colors + 0.3 * gray).astype(np.uint8)
        show_map(axes, picture)
        view.shown |= dict.fromkeys(np.unique(classes[~none]).tolist())
        if none.any():
            view.shown[IGNORE] = None

    def list_key(self, view: View) -> list[Entry]:
        names, colors = self.grouping.names, self.grouping.palette / 255
        shown = range(len(names)) if view.steady else sorted({*view.shown} - {IGNORE})
        entries = [Entry(names[index], colors[index], patch=True) for index in shown]
        without = IGNORE in view.shown or (view.steady and view.labels)
        return entries + [Entry("no class: as in the picture", "white", patch=True)] * without

    def record(self, prediction: Any = None, target: Any = None, camera: Any = None) -> list[tuple[str, Any]]:
        """A segmentation image, with names and colours of its classes."""
        import rerun

        classes = (target if prediction is None else prediction).cpu().numpy()
        about = [
            rerun.AnnotationInfo(id=index, label=name, color=self.grouping.palette[index].tolist())
            for index, name in enumerate(self.grouping.names)
        ]
        return [
            ("camera/segmentation", rerun.AnnotationContext(about)),
            ("camera/segmentation", rerun.SegmentationImage(classes)),
        ]

    def draw_error(
        self, axes: Axes, view: View, prediction: UInt8[Tensor, "H W"], target: UInt8[Tensor, "H W"]
    ) -> None:
        """Wrong pixels in colour, pixels without a label dark."""
        found, truth = prediction.cpu().numpy(), target.cpu().numpy()
        labelled = truth != IGNORE
        wrong = labelled & (found != truth)
        gray = np.repeat(view.image.mean(axis=2, keepdims=True), 3, axis=2)
        gray[~labelled] *= 0.3
        gray[wrong] = 0.2 * gray[wrong] + 0.8 * np.array(to_rgb(FALSE)) * 255
        show_map(axes, gray.astype(np.uint8))
        share = wrong.sum() / max(labelled.sum(), 1)
        write_note(axes, view, f"wrong: {share:.1%}")
