"""Steering-wheel angle in degrees, left positive, from one frame; primary metric MAE.

A single frame does not show which way the driver will take at a junction, so the skill is limited.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from a2d2.dataset import Geometry
from a2d2.frames import Frame
from models.heads import GridHead
from tasks.drawing import write_text
from tasks.options import SteeringOptions, TaskProtocol
from tasks.task import Metrics, Task, load_json, widen

LOSSES = {"smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss}
TURNS = ((0, 5), (5, 20), (20, 60), (60, np.inf))  # degrees, for MAE by how sharp the turn is


def find_frame_sample(content: dict) -> int | None:
    """Index of the sample at the frame's time: one that equals `angle_deg`; None if no sample does.

    Of several, as on a straight road, the nearest to the middle of the samples, because they surround the frame's time
    (docs/a2d2-format.md, section 7).
    """
    times = np.array(content["timestamps_us"], dtype=np.float64)
    same = np.flatnonzero(np.array(content["angles_deg"]) == content["angle_deg"])
    return int(same[np.abs(times[same] - np.median(times)).argmin()]) if len(same) else None


class SteeringMetrics(Metrics):
    """`mae`, `rmse` (degrees), `r2`, and `mae/0-5deg` ... by the size of the true angle, of the angle at the frame's
    time; `mae/horizon` of all samples, where there are several."""

    def __init__(self):
        self.predictions: list[Tensor] = []
        self.targets: list[Tensor] = []

    def update(self, prediction: Float[Tensor, "B horizon"], target: Float[Tensor, "B horizon"]) -> None:
        self.predictions.append(prediction.double().cpu())
        self.targets.append(target.double().cpu())

    def merge(self, other: "SteeringMetrics") -> None:
        self.predictions += other.predictions
        self.targets += other.targets

    def compute(self) -> dict[str, float | None]:
        if not self.targets or sum(map(len, self.targets)) == 0:
            return {"mae": None}
        target = torch.cat(self.targets)
        errors = torch.cat(self.predictions) - target
        error, target = errors[:, 0], target[:, 0]
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
        if errors.shape[1] > 1:
            scores["mae/horizon"] = float(errors.abs().mean())
        return scores


class Steering(Task):
    """Label and target: float32 (horizon,), degrees, left positive: the angle at the frame's time, then those of the
    bus samples after it; the last is repeated where fewer follow. Output: (B, horizon), in units of `scale_deg`.
    Prediction: (B, horizon), degrees.
    """

    name: ClassVar[str] = "steering"
    kind: ClassVar[str] = "steering"
    primary_metric: ClassVar[str] = "mae"
    better: ClassVar[str] = "lower"
    unit: ClassVar[str] = "deg"
    resolution: ClassVar[float] = 0.15  # docs/a2d2-format.md, section 7.1
    labels_for_statistics: ClassVar[int] = 2000  # files of a few bytes
    Options = SteeringOptions
    options: SteeringOptions

    def load(self, frame: Frame) -> Float32[np.ndarray, " horizon"] | None:
        path, horizon = frame.path(self.kind), self.options.horizon
        content = load_json(path, *(("angle_deg",) if horizon == 1 else ("angle_deg", "angles_deg", "timestamps_us")))
        if content is None:
            return None
        if horizon == 1:
            return np.array([content["angle_deg"]], dtype=np.float32)
        start = find_frame_sample(content)
        if start is None:
            raise ValueError(f"{path}: its angle_deg is none of its angles_deg; delete it and run preprocessing again")
        following = content["angles_deg"][start : start + horizon]
        return np.array(following + following[-1:] * (horizon - len(following)), dtype=np.float32)

    def blank(self, size: tuple[int, int]) -> Float32[Tensor, " horizon"]:
        return torch.zeros(self.options.horizon)

    def transform(self, label: Float32[np.ndarray, " horizon"], geometry: Geometry) -> Float32[Tensor, " horizon"]:
        return torch.from_numpy(-label if geometry.flip else label)

    def list_categories(self, label: Float32[np.ndarray, " horizon"]) -> set[str]:
        """The range of TURNS that the angle at the frame's time is in."""
        return {f"{low}" for low, high in TURNS if low <= abs(label[0]) < high}

    def collect_statistics(self, labels: Iterable[Any], protocol: TaskProtocol | None = None) -> None:
        labels = list(labels)
        spread = float(np.std([label[0] for label in labels])) if len(labels) > 1 else 0.0
        self.label_statistics = {
            "constant": self.find_constant(labels),
            "scale_deg": self.options.scale_deg or max(spread, 1.0),
        }

    def find_constant(self, labels: Iterable[Any], protocol: TaskProtocol | None = None) -> float | None:
        """The median of the angles at the frames' times."""
        angles = [label[0] for label in labels]
        return float(np.median(angles)) if angles else None

    def predict_constant(self, target: Float[Tensor, "B horizon"]) -> Float[Tensor, "B horizon"]:
        return torch.full_like(target, self.label_statistics["constant"])

    @property
    def output_format(self) -> str:
        return "numbers"

    def head_arguments(self) -> dict[str, Any]:
        """`outputs`: how many samples of the angle."""
        return {"outputs": self.options.horizon}

    def head(self, channels: dict[str, int]) -> nn.Module:
        return GridHead(channels, **self.head_arguments(), **self.options.head.model_dump())

    def count(self, target: Float[Tensor, "B horizon"]) -> Int64[Tensor, " B"]:
        """Frames."""
        return torch.ones(len(target), dtype=torch.int64)

    def loss(self, output: Float[Tensor, "B horizon"], target: Float[Tensor, "B horizon"]) -> Float[Tensor, ""]:
        """On angles in units of `scale_deg`; the mean over the horizon, so that its length has no influence."""
        wanted = target / self.label_statistics["scale_deg"]
        return LOSSES[self.options.loss](widen(output), wanted, reduction="sum") / self.options.horizon

    def predict(self, output: Float[Tensor, "B horizon"], size: tuple[int, int]) -> Float[Tensor, "B horizon"]:
        return output.float() * self.label_statistics["scale_deg"]

    def metrics(self, protocol: TaskProtocol | None = None) -> SteeringMetrics:
        return SteeringMetrics()

    def draw(self, image: np.ndarray, prediction: Float[Tensor, " horizon"]) -> np.ndarray:
        """A steering wheel turned by the angle at the frame's time, and that angle as text."""
        angle = float(prediction[0])
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

    def draw_label(self, image: np.ndarray, target: Float[Tensor, " horizon"]) -> np.ndarray:
        return self.draw(image, target)
