"""Steering-wheel angle in degrees, left positive, from one frame; headline MAE.

A single frame cannot tell which way the driver will take at a junction: expect modest skill.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from a2d2.dataset import Geometry
from a2d2.frames import Frame
from models.heads import GridHead
from tasks.drawing import write_text
from tasks.task import HeadOptions, Metrics, Task, TaskOptions, load_json

TURNS = ((0, 5), (5, 20), (20, 60), (60, np.inf))  # degrees, for MAE by how sharp the turn is


class SteeringHeadOptions(HeadOptions):
    reads: tuple[str, ...] = Field(("encoder.32",), description="features the head reads, by name and stride")
    grid: tuple[PositiveInt, PositiveInt] = Field((4, 8), description="rows and columns of the pooled grid")
    width: PositiveInt = Field(64, description="channels kept of each cell")
    hidden: PositiveInt = Field(256, description="units of the hidden layer")


class SteeringOptions(TaskOptions):
    head: SteeringHeadOptions = SteeringHeadOptions()


class SteeringMetrics(Metrics):
    """`mae`, `rmse` (degrees), `r2`, and `mae/0-5deg` ... by the size of the true angle."""

    def __init__(self):
        self.answers: list[Tensor] = []
        self.targets: list[Tensor] = []

    def update(self, answer: Float[Tensor, " B"], target: Float[Tensor, " B"]) -> None:
        self.answers.append(answer.double().cpu())
        self.targets.append(target.double().cpu())

    def compute(self) -> dict[str, float | None]:
        if not self.targets or sum(map(len, self.targets)) == 0:
            return {"mae": None}
        answer, target = torch.cat(self.answers), torch.cat(self.targets)
        error = answer - target
        spread = (target - target.mean()).square().sum()
        scores: dict[str, float | None] = {
            "mae": float(error.abs().mean()),
            "rmse": float(error.square().mean().sqrt()),
            "r2": float(1 - error.square().sum() / spread) if spread > 0 else None,
        }
        for low, high in TURNS:
            within = (target.abs() >= low) & (target.abs() < high)
            name = f"mae/{low}-{high}deg" if np.isfinite(high) else f"mae/{low}deg-"
            scores[name] = float(error[within].abs().mean()) if within.any() else None
        return scores


class Steering(Task):
    """Label and target: float32 (), degrees, left positive. Output: (B, 1), in units of the training labels' spread."""

    name: ClassVar[str] = "steering"
    kind: ClassVar[str] = "steering"
    headline: ClassVar[str] = "mae"
    better: ClassVar[str] = "lower"
    unit: ClassVar[str] = "deg"
    labels_to_fit: ClassVar[int | None] = None  # they are a few bytes each
    Options = SteeringOptions

    def load(self, frame: Frame) -> float | None:
        content = load_json(frame.path(self.kind), "angle_deg")
        return None if content is None else float(content["angle_deg"])

    def blank(self, size: tuple[int, int]) -> Float32[Tensor, ""]:
        return torch.tensor(0.0)

    def transform(self, label: float, geometry: Geometry) -> Float32[Tensor, ""]:
        return torch.tensor(-label if geometry.flip else label)

    def fit(self, labels: Iterable[Any]) -> None:
        angles = list(labels)
        spread = float(np.std(angles)) if len(angles) > 1 else 0.0
        self.fitted = {"constant": self.constant(angles), "scale_deg": max(spread, 1.0)}

    def constant(self, labels: Iterable[Any]) -> float | None:
        """The median angle."""
        angles = list(labels)
        return float(np.median(angles)) if angles else None

    def answer_constant(self, target: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        return torch.full_like(target, self.fitted["constant"])

    @property
    def language(self) -> str:
        return "numbers"

    def head_arguments(self) -> dict[str, Any]:
        """`outputs`: how many numbers."""
        return {"outputs": 1}

    def head(self, channels: dict[str, int]) -> nn.Module:
        return GridHead(channels, **self.head_arguments(), **self.options.head.model_dump())

    def count(self, target: Float[Tensor, " B"]) -> int:
        """Samples."""
        return len(target)

    def loss(self, output: Float[Tensor, "B 1"], target: Float[Tensor, " B"]) -> Float[Tensor, ""]:
        """Smooth L1 of the angle in units of the training labels' standard deviation."""
        return F.smooth_l1_loss(output[:, 0].float(), target / self.fitted["scale_deg"], reduction="sum")

    def answer(self, output: Float[Tensor, "B 1"], size: tuple[int, int]) -> Float[Tensor, " B"]:
        return output[:, 0].float() * self.fitted["scale_deg"]

    def metrics(self) -> SteeringMetrics:
        return SteeringMetrics()

    def draw(self, image: np.ndarray, answer: Float[Tensor, ""]) -> np.ndarray:
        """A steering wheel turned by the angle, and the angle in words."""
        angle = float(answer)
        picture = image.copy()
        height, width = picture.shape[:2]
        radius, thick = max(height // 7, 8), max(height // 90, 1)
        centre = (width // 2, height - radius - height // 20)
        white, red = (255, 255, 255), (255, 59, 48)
        cv2.circle(picture, centre, radius, white, thick, cv2.LINE_AA)
        # the wheel's spokes point right, left and down; a turn to the left goes against the clock
        for spoke, color in ((0, white), (180, white), (270, white), (90, red)):
            direction = np.deg2rad(spoke + angle)
            tip = (round(centre[0] + radius * np.cos(direction)), round(centre[1] - radius * np.sin(direction)))
            start = centre if color == white else ((centre[0] + tip[0]) // 2, (centre[1] + tip[1]) // 2)
            cv2.line(picture, start, tip, color, thick, cv2.LINE_AA)
        side = "left" if angle > 0 else "right"
        return write_text(picture, f"{abs(angle):.1f} deg {side}")

    def draw_label(self, image: np.ndarray, target: Float[Tensor, ""]) -> np.ndarray:
        return self.draw(image, target)
