"""The contract of a task: everything that is true of one task and of nothing else lives behind these methods.

A label is what is on disk for one frame, as numpy or plain values. A target is the label as tensors at the size of the
training image; targets of a batch are collated by PyTorch's default. An output is what the task's head says; an answer
is the output in physical units, at the size of the labels it will be held against.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import UInt8
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from a2d2.dataset import Geometry
from a2d2.frames import Frame

Target = Tensor | dict[str, Tensor]


class TaskOptions(BaseModel):
    """Base of each task's own options: unknown keys are errors, defaults are checked, nothing changes later."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, frozen=True)


class HeadOptions(TaskOptions):
    """What all heads offer."""

    stop_gradient: bool = Field(False, description="train the head without moving encoder and neck")
    adapter: bool = Field(False, description="give the head a small residual layer on what it reads")


def load_file(path: Path, read: Callable[[Path], Any]) -> Any | None:
    """What `read` makes of a derived file; None if there is no file, ValueError naming it if it is damaged."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run preprocessing again") from error


def load_json(path: Path, *keys: str) -> dict | None:
    """The object in a derived JSON file, which must have all `keys`; None if there is no file."""
    content = load_file(path, lambda path: json.loads(path.read_text()))
    if content is None:
        return None
    for key in keys:
        if not (isinstance(content, dict) and key in content):
            raise ValueError(f"{path} has no {key!r}; delete it and run preprocessing again")
    return content


def widen(output: Tensor) -> Tensor:
    """At least float32, for a loss: half precision is too coarse for it, and what comes in float64 is left so."""
    return output.to(torch.promote_types(output.dtype, torch.float32))


class Metrics(ABC):
    """Collects answers and targets of many frames; `compute` gives named numbers, None for what is not defined."""

    @abstractmethod
    def update(self, answer: Any, target: Target) -> None:
        """Add a batch of labelled rows."""

    @abstractmethod
    def compute(self) -> dict[str, float | None]:
        """The scores over all that was added."""


class Task(ABC):
    """One task.

    `name`: its key in configs and tables. `kind`: the derived file that holds its label. `primary_metric`: the score that
    stands for it, a key of its metrics; `better` is "higher" or "lower"; `unit` is printed behind the primary metric.
    `label_statistics`: values found on the training labels by `fit`; JSON, kept in checkpoints.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    primary_metric: ClassVar[str]
    better: ClassVar[str]
    unit: ClassVar[str] = ""
    labels_for_statistics: ClassVar[int | None] = 500  # labels read by `fit`, evenly spaced; None: all
    Options: ClassVar[type[TaskOptions]]

    def __init__(self, options: TaskOptions | None = None, label_statistics: dict[str, Any] | None = None):
        self.options = options if options is not None else self.Options()
        self.label_statistics = dict(label_statistics or {})

    def has_label(self, frame: Frame) -> bool:
        """Whether the derived file is there; it is not opened."""
        return frame.path(self.kind).is_file()

    @abstractmethod
    def load(self, frame: Frame) -> Any | None:
        """The frame's label, or None if it has none. ValueError, with the file's name, if the file is damaged."""

    @abstractmethod
    def blank(self, size: tuple[int, int]) -> Target:
        """A target of the right shapes for a frame without label; `size` is the training image's (width, height)."""

    @abstractmethod
    def transform(self, label: Any, geometry: Geometry) -> Target:
        """The target of a label under an augmentation."""

    def collect_statistics(self, labels: Iterable[Any]) -> None:
        """Find what must be known of the training labels before training; fills `label_statistics`."""
        self.label_statistics = {"constant": self.find_constant(list(labels))}

    @abstractmethod
    def find_constant(self, labels: list[Any]) -> Any:
        """The one answer that serves the primary metric best on these labels, as JSON."""

    @abstractmethod
    def predict_constant(self, target: Target) -> Any:
        """The label_statistics constant as an answer to each row of a target."""

    @property
    @abstractmethod
    def output_format(self) -> str:
        """Which kind of output `loss` and `answer` understand, so that a network that brings its own heads can fit one.

        "map": a dense map of logits. "log_depth": a dense map of log-metres. "boxes": a dense detector's output.
        "box_grid": a grid of boxes. "numbers": a row of numbers.
        """

    def head_arguments(self) -> dict[str, Any]:
        """What a head for this task must know beside the features it reads, whoever builds it."""
        return {}

    @abstractmethod
    def head(self, channels: dict[str, int]) -> nn.Module:
        """The head on features of these names and channels."""

    @abstractmethod
    def count(self, target: Target) -> int:
        """What the loss is divided by, summed over labelled rows: pixels, images, positives or samples."""

    @abstractmethod
    def loss(self, output: Any, target: Target) -> Tensor:
        """The loss summed over labelled rows, a scalar in float32 or better; divide it by a count of at least one.

        What is no sum over the things counted, but one number of a row, is multiplied by the row's count.
        """

    @abstractmethod
    def predict(self, output: Any, size: tuple[int, int]) -> Any:
        """The output in physical units, for labels of (width, height) `size`."""

    @abstractmethod
    def metrics(self) -> Metrics:
        """A new, empty collection of scores."""

    @abstractmethod
    def draw(self, image: UInt8[np.ndarray, "H W 3"], answer: Any) -> UInt8[np.ndarray, "H W 3"]:
        """A picture of one row's answer, over the image."""

    @abstractmethod
    def draw_label(self, image: UInt8[np.ndarray, "H W 3"], target: Target) -> UInt8[np.ndarray, "H W 3"]:
        """A picture of one row's target, in the same manner."""

    def skill(self, score: float, constant: float) -> float:
        """How far a primary metric is from its constant predictor's: 0 is no better, 1 is perfect."""
        return score if self.better == "higher" else 1 - score / max(constant, 1e-9)
