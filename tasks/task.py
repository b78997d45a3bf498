"""The contract of a task: everything that is true of one task and of nothing else is behind these methods.

A *label* is what is on disk for one frame, as NumPy arrays or plain values. A *target* is the label as tensors at the
size of the training image; `collate` makes a batch of targets. An *output* is what the task's
head returns. A *prediction* is the output in physical units, at the size of the labels that it is compared with.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, UInt16
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.utils.data import default_collate

from a2d2.dataset import Geometry, Holes
from a2d2.frames import Frame
from a2d2.images import read_depth_png, read_json
from tasks.drawing import Entry, View, arrange, draw_legend
from tasks.options import TaskOptions, TaskProtocol

Target = Any
"""What `transform` returns: a tensor or a dict of tensors. Every task has a type of its own here."""

TeacherOutput = tuple[Any, bool]
"""An output on a batch of images, and whether these were mirrored left to right."""

SoftTarget = dict[str, Tensor]
"""What teachers say, and how sure they are: tensors, with a first dimension for the images of a batch. Every task has
keys of its own here."""


def load_file(path: Path, read: Callable[[Path], Any]) -> Any | None:
    """The result of `read` for a derived file; None if the file is missing, ValueError naming it if it is damaged."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run preprocessing again") from error


def load_gray(path: Path, shape: tuple[int, ...]) -> UInt16[np.ndarray, "H W"]:
    """The 16-bit map that says how sure another map of this shape is. ValueError if it is missing, damaged or of
    another shape."""
    stored = load_file(path, read_depth_png)
    if stored is None or stored.shape != shape:
        raise ValueError(f"{path} is missing, or of another size than the map beside it; make both again")
    return stored


def load_json(path: Path, *keys: str) -> dict | None:
    """The object in a derived JSON file, which must have all `keys`; None if the file is missing."""
    content = load_file(path, read_json)
    if content is None:
        return None
    for key in keys:
        if not (isinstance(content, dict) and key in content):
            raise ValueError(f"{path} has no {key!r}; delete it and run preprocessing again")
    return content


def hide_rows(maps: Tensor, holes: Sequence[Holes], nothing: int | float) -> Tensor:
    """Maps (B, H, W) with the value for "nothing" in the holes of each row."""
    if not any(holes):
        return maps
    maps = maps.clone()
    size = (maps.shape[2], maps.shape[1])
    for row, own in zip(maps, holes, strict=True):
        for rows, columns in Geometry(size, (0, 0, *size), size, holes=own).list_holes():
            row[rows, columns] = nothing
    return maps


def find_common_classes(given: Mapping[Path, Mapping[str, Any]]) -> tuple[str, ...] | None:
    """The class names of several datasets; None where they are A2D2's. ValueError, with both, if they differ."""
    lists = {path: tuple(about["classes"]) if about.get("classes") else None for path, about in given.items()}
    (first, names), *others = lists.items() or [(Path(), None)]
    for path, its in others:
        if its != names:
            listed = [f"{where}: {', '.join(found) if found else 'those of A2D2'}" for where, found in
                      ((first, names), (path, its))]  # fmt: skip
            raise ValueError(f"the datasets have labels of different classes: {'; '.join(listed)}")
    return names


def widen(output: Tensor) -> Tensor:
    """Cast to float32 for a loss, because half precision is too coarse for it; float64 stays float64."""
    return output.to(torch.promote_types(output.dtype, torch.float32))


def average_rows(values: Sequence[float | None], counts: Float64[np.ndarray, "R n"]) -> Float64[np.ndarray, " R"]:
    """The mean of n values in each of R draws, in which each counts so often; None is left out, NaN if none counts."""
    known = np.array([value is not None for value in values], dtype=bool)
    filled = np.array([0.0 if value is None else value for value in values])
    total = counts @ known
    return np.divide(counts @ filled, total, out=np.full(len(counts), np.nan), where=total > 0)


class Metrics(ABC):
    """Collects predictions and targets of many frames and computes named scores of them all."""

    @abstractmethod
    def update(self, prediction: Any, target: Target) -> None:
        """Add a batch of rows that have a label."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Add the rows of another collection of the same kind, as if they had come after its own."""

    @abstractmethod
    def compute(self) -> dict[str, float | None]:
        """The scores over all rows; None for a score that is not defined on them."""

    @abstractmethod
    def score_frames(self) -> list[float | None]:
        """The primary metric of each row alone, in the order of the updates; None where it is not defined."""

    @abstractmethod
    def resample(self, counts: Float64[np.ndarray, "R n"]) -> Float64[np.ndarray, " R"]:
        """The primary metric if each of the n rows had counted so often, in each of R draws; NaN where it is not
        defined. With every count 1 it is that of `compute`."""

    def describe(self) -> dict[str, Any]:
        """What is no single number and belongs into a report, such as curves, as JSON has it."""
        return {}


class Task(ABC):
    """One task.

    `name`: key of the task in configs and tables. `kind`: kind of the derived file that contains its label;
    `confidence_kind`: of the file that says how sure a prediction is.
    `primary_metric`: the score that stands for the task, a key of its metrics; `better`: "higher" or "lower"; `unit`:
    printed behind the primary metric.
    `label_statistics`: values that `collect_statistics` computes from the training labels, as JSON; kept in weights
    files.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    confidence_kind: ClassVar[str]
    primary_metric: ClassVar[str]
    better: ClassVar[str]
    unit: ClassVar[str] = ""
    resolution: ClassVar[float] = 0.0  # of the labels, in units of the primary metric where lower is better
    learns_from_empty: ClassVar[bool] = False  # whether a label of count 0 says something, as that of an empty frame
    group_titles: ClassVar[Mapping[str, str]] = {}  # of metrics "<group>/<member>", what a plot of a group shows
    error_key: ClassVar[str] = ""  # what `draw_error` draws; empty for a task without it
    hub_tag: ClassVar[str] = ""  # what the Hugging Face hub calls the task
    labels_for_statistics: ClassVar[int] = 500  # labels that are read for them at most, evenly spaced
    Options: ClassVar[type[TaskOptions]]

    def __init__(self, options: TaskOptions | None = None, label_statistics: dict[str, Any] | None = None):
        self.options = options if options is not None else self.Options()
        self.label_statistics = dict(label_statistics or {})

    def has_label(self, frame: Frame) -> bool:
        """Whether the frame's derived file exists; it is not opened."""
        return frame.path(self.kind).is_file()

    def adopt_classes(self, given: Mapping[Path, Mapping[str, Any]]) -> TaskOptions:
        """The options, with the classes of the datasets where they say so; `given`: what the dataset.json of each
        dataset that has labels of this kind says of them. ValueError for datasets of different classes."""
        return self.options

    @property
    def foreign_classes(self) -> tuple[str, ...]:
        """The classes by id, where they are those of another dataset; () for A2D2's, and for a task without classes."""
        return ()

    def find_label_conflict(self, about: Mapping[str, Any]) -> str | None:
        """Why labels that a dataset.json describes so cannot be read, because their ids mean other classes; None if
        they can."""
        given, wanted = tuple(about.get("classes", ())), self.foreign_classes
        if given == wanted:
            names = about.get("annotated_classes")
            return None if names is None else self.find_annotated_conflict(names)
        named, own = (", ".join(names) or "those of A2D2" for names in (given, wanted))
        return (
            f"its labels of {self.name} have the classes {named}, and {own} are expected; tasks.{self.name}.classes: "
            "root takes those of a dataset"
        )

    @abstractmethod
    def load(self, frame: Frame) -> Any | None:
        """The frame's label; None if it has none. ValueError, with the file's name, if the file is damaged."""

    @abstractmethod
    def blank(self, size: tuple[int, int]) -> Target:
        """A target that says nothing, of the right shapes; `size` is (width, height) of the training image."""

    def collate(self, targets: list[Target]) -> Target:
        """The targets of several samples as one batch of targets, with a row for each."""
        return default_collate(targets)

    @abstractmethod
    def transform(self, label: Any, geometry: Geometry) -> Target:
        """The target of a label under an augmentation."""

    def find_annotated_conflict(self, names: Any) -> str | None:
        """Why `limit_classes` cannot take a dataset's `annotated_classes`; None if it can."""
        return (
            f"annotated_classes is for boxes; in labels of {self.name} what is not annotated has their value for that"
        )

    def limit_classes(self, target: Target, names: Sequence[str]) -> Target:
        """The target of a frame in which the classes `names` alone are annotated: that nothing of another class is
        there does not mean that nothing of it is in the picture."""
        raise NotImplementedError

    def find_unannotated(self, names: Sequence[str] | None) -> list[int]:
        """The classes, by number, of which labels need not show every object, where the dataset annotates the classes
        `names` alone, None for all."""
        return []

    def list_categories(self, label: Any) -> set[str]:
        """What a label shows, such as its classes, of which some may be rare; for the option `oversample_below`."""
        return set()

    def collect_statistics(self, labels: Iterable[Any], protocol: Any = None) -> None:
        """Compute what training needs of the training labels, and store it in `label_statistics`."""
        self.label_statistics = {"constant": self.find_constant(list(labels), protocol)}

    def find_doubt(self) -> str | None:
        """What a user should know about how the options fit the training labels, by their label statistics; None where
        there is nothing to say."""
        return None

    def list_annotated(self, lists: Iterable[Sequence[str] | None]) -> dict[str, Any]:
        """Label statistics that say which classes the training labels annotate, {} where these are all; `lists`: the
        `annotated_classes` of each dataset with such labels, None where all objects have a label."""
        return {}

    @abstractmethod
    def find_constant(self, labels: list[Any], protocol: Any = None) -> Any:
        """The constant baseline: the one prediction with the best primary metric on these labels under the protocol,
        as JSON."""

    @abstractmethod
    def predict_constant(self, target: Target) -> Any:
        """The constant baseline as the prediction for each row of a target."""

    @property
    @abstractmethod
    def output_format(self) -> str:
        """The kind of output that `loss` and `predict` read, and that a specialist's own head must have, too.

        "map": a dense map of logits. "log_depth": a dense map of log-metres. "boxes": the output of a dense detector.
        "box_grid": a grid of boxes. "numbers": a row of numbers.
        """

    def head_arguments(self) -> dict[str, Any]:
        """Arguments of every head for this task, also of a specialist's: such as the number of classes."""
        return {}

    @abstractmethod
    def head(self, channels: dict[str, int]) -> nn.Module:
        """The task's own head; `channels`: the available features and their numbers of channels."""

    def prepare_loss(self, target: Target) -> Target:
        """The target of one sample with all that `count` and `loss` need, made where the sample is loaded."""
        return target

    @abstractmethod
    def count(self, target: Target) -> Int64[Tensor, " n"]:
        """Of each row of a prepared target, what the loss is divided by: its pixels, images, positives or frames."""

    @abstractmethod
    def loss(self, output: Any, target: Target) -> Tensor:
        """The loss summed over the rows of a prepared target, a scalar in float32 or better; the caller divides it by
        a count >= 1.

        A term that is one number for a row, and no sum over the things counted, is multiplied by the row's count.
        Nothing in it may depend on values on the host, as the number of elements of a mask: a GPU would wait.
        """

    @abstractmethod
    def predict(self, output: Any, size: tuple[int, int]) -> Any:
        """The output in physical units, for labels of (width, height) `size`."""

    @abstractmethod
    def metrics(self, protocol: Any = None) -> Metrics:
        """A new, empty collection of scores; `protocol`: what is scored, an `Options.Protocol`, by default its own
        defaults. The task's options do not limit what is scored."""

    def for_protocol(self, protocol: TaskProtocol) -> "Task":
        """The task that loads labels and scores by the protocol: with its classes, if these are not the run's own."""
        classes = getattr(protocol, "classes", None)
        if classes is None or classes == getattr(self.options, "classes", None):
            return self
        scorer = type(self)(self.options.model_copy(update={"classes": classes}), self.label_statistics)
        scorer.label_statistics = {**self.label_statistics, "constant": self.translate_constant(scorer)}
        return scorer

    def translate_constant(self, scorer: Any) -> Any:
        """The constant baseline in the classes of `scorer`, a task of this kind."""
        return self.label_statistics.get("constant")

    def translate(self, prediction: Any, scorer: Any) -> Any:
        """A batch of predictions in the classes of `scorer`."""
        return prediction

    def complete_protocol(self, protocol: TaskProtocol) -> TaskProtocol:
        """The protocol, with this run's own choice where it leaves one open."""
        own = {name: getattr(self.options, name) for name, value in protocol if value is None}
        return protocol.model_copy(update=own)

    def find_conflict(self, protocol: TaskProtocol) -> str | None:
        """Why predictions of this run cannot be scored by the protocol, such as classes that are coarser than those
        that are scored; None if they can."""
        return None

    def describe_files(self) -> dict[str, Any]:
        """What a reader of files with predictions must know, as JSON: such as the classes that ids mean."""
        return {}

    def find_file_conflict(self, about: Mapping[str, Any]) -> str | None:
        """Why this task cannot read files that `describe_files` described so; None if it can."""
        return None

    @abstractmethod
    def encode_prediction(self, prediction: Any) -> bytes:
        """The content of the file of `kind` with one row's prediction, in the format of a label."""

    @abstractmethod
    def load_prediction(self, path: Path, about: Mapping[str, Any], size: tuple[int, int], own: tuple[int, int]) -> Any:
        """One row's prediction for labels of (width, height) `size`, from a file that was made at size `own`; `about`:
        what `describe_files` said when it was written.

        FileNotFoundError, or ValueError that names a damaged file.
        """

    @abstractmethod
    def batch_predictions(self, predictions: list[Any]) -> Any:
        """Rows as `load_prediction` returns them as one batch, as `predict` returns it."""

    def describe_units(self, focal_length: float) -> str:
        """What a prediction means on a picture of an unknown camera; empty where there is nothing to say.

        focal_length: that of the training pictures, in widths of the picture.
        """
        return ""

    def export_names(self) -> dict[str, str]:
        """The tensors that `export_output` returns, and what each is."""
        return {self.name: f"{self.name} in physical units"}

    def export_output(self, output: Any, size: tuple[int, int]) -> dict[str, Tensor]:
        """An output as tensors of fixed shape that need no other program's code to be understood; for ONNX."""
        return {self.name: self.predict(output, size)}

    @abstractmethod
    def encode_confidence(self, output: Any, mirrored: Any, prediction: Any, size: tuple[int, int]) -> list[bytes]:
        """For each row of outputs of an image and of its mirror image the content of the file of kind `confidence`, how
        sure the predictions are; what that means is the task's own."""

    def convert_output(self, output: Any, other: Any) -> Any:
        """An output of this run in the units of another run's task of this kind, with its label statistics."""
        return output

    @abstractmethod
    def blend(
        self,
        outputs: Sequence[TeacherOutput],
        size: tuple[int, int],
        calibration: Mapping[str, Any] | None = None,
        speakers: Sequence[Any] | None = None,
    ) -> SoftTarget:
        """What one or several teachers say about a batch, from their outputs on it and on its mirror image, at (width,
        height) `size`; `calibration`: what `calibrate` has found for these teachers; `speakers`: of each output the
        task of the run that it is of, None if it is this one."""

    def describe_agreement(self, size: tuple[int, int]) -> dict[str, Any]:
        """What teachers that are averaged must have in common, as JSON; `size`: (width, height) of their input."""
        return self.describe_soft_files(size)

    def join_teachers(self, teachers: Sequence[Any]) -> "Task":
        """The task as these teachers, tasks of this kind of which this is the first, have learned it together."""
        return self

    def calibrate(self, said: Iterable[tuple[SoftTarget, Target]]) -> dict[str, Any]:
        """What makes the confidence of teachers that of frequencies, as JSON, from what they say about batches that
        they were not trained on, and the targets; {} for a task whose confidence has a unit of its own."""
        return {}

    @property
    def soft_kind(self) -> str:
        """The kind of file that a frame has if teachers say something about it."""
        return self.kind

    @property
    def soft_kinds(self) -> tuple[str, ...]:
        """The kinds of file that `load_soft` reads of each frame."""
        return self.kind, self.confidence_kind

    def describe_soft_files(self, size: tuple[int, int]) -> dict[str, dict[str, Any]]:
        """Of each kind of file that `encode_soft` writes what a reader must know, as JSON; `size`: (width, height) of
        the teachers' input."""
        return {self.kind: self.describe_files(), self.confidence_kind: {}}

    def find_soft_conflict(self, about: Mapping[str, Mapping[str, Any]], size: tuple[int, int]) -> str | None:
        """Why this task cannot learn from files of its `soft_kind` and others that were described so, by kind, with its
        options and an input of (width, height) `size`; None if it can."""
        return self.find_file_conflict(about[self.kind])

    def find_pseudo_conflict(self, online: bool) -> str | None:
        """Why this task cannot learn from teachers with its options; None if it can. `online`: the teacher is the
        network's own EMA."""
        return None

    def find_teacher_conflict(self, teacher: Any) -> str | None:
        """Why this task cannot learn from a teacher's task of this kind, for a reason that is not in its files; None if
        it can."""
        return None

    @abstractmethod
    def encode_soft(
        self, said: SoftTarget, row: int, size: tuple[int, int], calibration: Mapping[str, Any] | None = None
    ) -> dict[str, bytes]:
        """The files of one row of a batch, by kind: the prediction in the format of a label, and how sure it is;
        `size`: (width, height) of the pictures on disk; `calibration`: as for `blend`."""

    @abstractmethod
    def load_soft(self, frame: Frame, about: Mapping[str, Mapping[str, Any]], own: tuple[int, int]) -> Any | None:
        """What teachers say about a frame, from files that `encode_soft` has written at size `own`; None if they are
        not there. `about`: what was said of each kind of file when they were written. ValueError that names a damaged
        file."""

    @abstractmethod
    def transform_soft(self, said: Any, geometry: Geometry) -> SoftTarget:
        """The soft target of one frame under an augmentation, with all that `soft_loss` needs."""

    def prepare_soft(self, said: SoftTarget, holes: Sequence[Holes] = ()) -> SoftTarget:
        """What `blend` returns at the size of the student's input, with all that `soft_loss` needs; `holes`: of each
        row what is hidden of the student's image, and so is not learned, none where they are left out."""
        return said

    def collate_soft(self, targets: list[SoftTarget]) -> SoftTarget:
        """Those of several frames as a batch."""
        return default_collate(targets)

    @abstractmethod
    def count_soft(self, target: SoftTarget) -> Float64[Tensor, " B"]:
        """Of each row what the soft loss is divided by, as `count` for labels; what teachers are not sure of counts
        too, so that few sure pixels do not weigh like many."""

    @abstractmethod
    def soft_loss(self, output: Any, target: SoftTarget) -> Tensor:
        """The loss on what teachers say, summed over the rows, as `loss`; what they are too unsure of, by the options
        `pseudo`, is left out."""

    @abstractmethod
    def draw(self, axes: Axes, view: View, prediction: Any = None, target: Target | None = None) -> None:
        """Draw one row's prediction over the picture, or, without one, its target; with both, what is right and wrong
        in the prediction may be shown. What a legend needs is noted in `view.shown`."""

    def list_key(self, view: View) -> list[Entry]:
        """The legend of what was drawn on this view."""
        return []

    def count_key_lines(self, view: View, inches: float) -> float:
        """Lines of text that `draw_key` needs in a field of this width."""
        return float(len(arrange(self.list_key(view), inches, view.text)))

    def draw_key(self, axes: Axes, view: View) -> None:
        """Explain the colours of what was drawn on this view, in a field of its own."""
        draw_legend(axes, self.list_key(view), view.text)

    def record(
        self, prediction: Any = None, target: Target | None = None, camera: Float[np.ndarray, "3 3"] | None = None
    ) -> list[tuple[str, Any]]:
        """One row's prediction, or its target, for the Rerun viewer: paths of entities and what is logged there.

        camera: given with a target, the pinhole matrix, for what is shown in 3-D too.
        """
        return []

    def draw_error(self, axes: Axes, view: View, prediction: Any, target: Target) -> None:
        """Draw where one row's prediction is wrong, and how much."""
        raise NotImplementedError

    def skill(self, score: float, constant: float) -> float | None:
        """A primary metric relative to that of the constant baseline: 0 is no better than it, 1 is perfect.

        None where the error of the constant is at or below the resolution of the labels: there is nothing to gain, and
        a quotient would be noise.
        """
        if self.better == "higher":
            return score
        return 1 - score / constant if constant > self.resolution else None
