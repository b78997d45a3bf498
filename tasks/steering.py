"""Steering-wheel angle in degrees, left positive, from one frame; primary metric MAE.

A single frame does not show which way the driver will take at a junction, so the skill is limited.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from matplotlib.axes import Axes
from matplotlib.patches import Circle
from torch import Tensor, nn
from torch.nn import functional as F

from a2d2.dataset import Geometry
from a2d2.frames import Frame
from a2d2.images import encode_json
from a2d2.vehicle import STEERING_RATIO, WHEELBASE, project_path
from models.heads import GridHead
from tasks.drawing import (
    MISSED,
    TRUTH,
    Entry,
    View,
    outline,
    show_image,
    write_note,
)
from tasks.options import SteeringOptions, TaskProtocol
from tasks.task import Metrics, SoftTarget, Task, TeacherOutput, average_rows, load_json, widen

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

    def score_frames(self) -> list[float | None]:
        pairs = zip(self.predictions, self.targets, strict=True)
        return [float(error) for one, other in pairs for error in (one - other)[:, 0].abs()]

    def resample(self, counts: Float64[np.ndarray, "R n"]) -> Float64[np.ndarray, " R"]:
        return average_rows(self.score_frames(), counts)


class Steering(Task):
    """Label and target: float32 (horizon,), degrees, left positive: the angle at the frame's time, then those of the
    bus samples after it; the last is repeated where fewer follow. Output: (B, horizon), in units of `scale_deg`.
    Prediction: (B, horizon), degrees.
    """

    name: ClassVar[str] = "steering"
    kind: ClassVar[str] = "steering"
    confidence_kind: ClassVar[str] = "steering_confidence"
    primary_metric: ClassVar[str] = "mae"
    better: ClassVar[str] = "lower"
    group_titles: ClassVar[Mapping[str, str]] = {"mae": "MAE in degrees by size of the true angle"}
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

    def encode_prediction(self, prediction: Float[Tensor, " horizon"]) -> bytes:
        """`angle_deg` at the frame's time; with a horizon also `angles_deg`, which begin with it."""
        angles = [float(angle) for angle in prediction]
        return encode_json({"angle_deg": angles[0]} | ({"angles_deg": angles} if len(angles) > 1 else {}))

    def load_prediction(
        self, path: Path, about: Mapping[str, Any], size: tuple[int, int], own: tuple[int, int]
    ) -> Float[Tensor, " horizon"]:
        """Only the angle at the frame's time, repeated, where the file has no others."""
        content = load_json(path, "angle_deg")
        if content is None:
            raise FileNotFoundError(f"there is no {path}")
        angles = content.get("angles_deg", [content["angle_deg"]] * self.options.horizon)
        if not isinstance(angles, list):
            raise ValueError(f"{path}: its angles_deg is {angles}, expected a list of numbers in degrees")
        angles = angles[: self.options.horizon]
        try:
            found = torch.tensor(angles, dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: its angles are no numbers ({error})") from error
        if found.shape != (self.options.horizon,) or not found.isfinite().all():
            raise ValueError(f"{path} has the angles {angles}, expected {self.options.horizon} numbers in degrees")
        return found

    def batch_predictions(self, predictions: list[Tensor]) -> Float[Tensor, "B horizon"]:
        return torch.stack(predictions)

    def describe_units(self, focal_length: float) -> str:
        return f"{self.name}: degrees of the steering wheel of A2D2's car, left positive"

    def export_names(self) -> dict[str, str]:
        return {"steering": "float32 (batch, horizon): degrees of the steering wheel, left positive"}

    def encode_confidence(
        self, output: Float[Tensor, "B horizon"], mirrored: Float[Tensor, "B horizon"], prediction: Any,
        size: tuple[int, int],
    ) -> list[bytes]:  # fmt: skip
        """JSON: `spread_deg`, the distance of the angle from that on the mirrored image, which has the other sign."""
        spread = (self.predict(output, size) + self.predict(mirrored, size))[:, 0].abs()
        return [encode_json({"spread_deg": float(value)}) for value in spread]

    def convert_output(self, output: Float[Tensor, "B horizon"], other: "Steering") -> Float[Tensor, "B horizon"]:
        return output * (self.label_statistics["scale_deg"] / other.label_statistics["scale_deg"])

    def blend(
        self,
        outputs: Sequence[TeacherOutput],
        size: tuple[int, int],
        calibration: Mapping[str, Any] | None = None,
        speakers: Sequence[Any] | None = None,
    ) -> SoftTarget:
        """`angles` float32 (B, horizon), the mean over teachers and mirror images, whose angles have the other sign,
        and `spread` (B,), how far the greatest of the angles at the frame's time is from the least, in degrees."""
        each = torch.stack([self.predict(output, size) * (-1.0 if mirrored else 1.0) for output, mirrored in outputs])
        return {"angles": each.mean(dim=0), "spread": each[..., 0].amax(dim=0) - each[..., 0].amin(dim=0)}

    def describe_agreement(self, size: tuple[int, int]) -> dict[str, Any]:
        return self.describe_soft_files(size) | {"horizon": self.options.horizon}

    def find_teacher_conflict(self, teacher: "Steering") -> str | None:
        own, given = self.options.horizon, teacher.options.horizon
        if given < own:
            return (
                f"their teacher predicts {given} samples of the angle, this network {own}: set tasks.steering.horizon "
                f"to {given} or less, or take a teacher with {own} or more"
            )
        return None

    def encode_soft(
        self, said: SoftTarget, row: int, size: tuple[int, int], calibration: Mapping[str, Any] | None = None
    ) -> dict[str, bytes]:
        return {
            self.kind: self.encode_prediction(said["angles"][row]),
            self.confidence_kind: encode_json({"spread_deg": float(said["spread"][row])}),
        }

    def load_soft(
        self, frame: Frame, about: Mapping[str, Mapping[str, Any]], own: tuple[int, int]
    ) -> tuple[Float32[np.ndarray, " horizon"], float] | None:
        try:
            angles = self.load_prediction(frame.path(self.kind), about[self.kind], own, own).numpy()
        except FileNotFoundError:
            return None
        path = frame.path(self.confidence_kind)
        content = load_json(path, "spread_deg")
        if content is None or not isinstance(content["spread_deg"], float | int):
            raise ValueError(f"{path} is missing, or its spread_deg is no number; make it again")
        return angles, float(content["spread_deg"])

    def transform_soft(self, said: tuple[Float32[np.ndarray, " horizon"], float], geometry: Geometry) -> SoftTarget:
        return {"angles": self.transform(said[0], geometry), "spread": torch.tensor(said[1])}

    def count_soft(self, target: SoftTarget) -> Float64[Tensor, " B"]:
        """Frames."""
        return self.count(target["angles"]).double()

    def soft_loss(self, output: Float[Tensor, "B horizon"], target: SoftTarget) -> Float[Tensor, ""]:
        """On the frames that teachers are sure of."""
        options, found = self.options.pseudo, widen(output)
        wanted = target["angles"].to(found.dtype) / self.label_statistics["scale_deg"]
        each = LOSSES[self.options.loss](found, wanted, reduction="none").mean(dim=1)
        weights = (target["spread"] <= options.threshold).to(found.dtype)
        if options.weighting == "confidence":
            weights = weights * (-target["spread"].to(found.dtype) / options.threshold).exp()
        return (each * weights).sum()

    def metrics(self, protocol: TaskProtocol | None = None) -> SteeringMetrics:
        return SteeringMetrics()

    def draw(self, axes: Axes, view: View, prediction: Any = None, target: Any = None) -> None:
        """The path on the road that the angle at the frame's time means, a dial of the steering wheel, and the angle;
        of a prediction together with the true one."""
        show_image(axes, view, dark=0.15)
        truth = None if target is None else float(target[0])
        found = None if prediction is None else float(prediction[0])
        drawn = [(truth, TRUTH, "true"), (found, MISSED, "predicted")]
        lines = []
        for angle, color, name in drawn:
            if angle is None:
                continue
            view.shown[name] = (color, name == "predicted")
            if view.matrix is not None:
                for track in project_path(angle, view.matrix, view.pose):
                    axes.plot(
                        track[:, 0] + 0.5, track[:, 1] + 0.5, color=color, linewidth=1.4, path_effects=outline(7.0),
                        linestyle="-" if name == "true" else (0, (4, 1.5)),
                    )  # fmt: skip
            lines.append(f"{name} {abs(angle):.1f}° {'left' if angle > 0 else 'right'}")
        axes.set_xlim(0, view.size[0])
        axes.set_ylim(view.size[1], 0)
        write_note(axes, view, "\n".join(lines))
        self._draw_dial(axes, view, [(angle, color) for angle, color, _ in drawn if angle is not None])

    @staticmethod
    def _draw_dial(axes: Axes, view: View, angles: list[tuple[float, str]]) -> None:
        """A steering wheel in the upper right corner, with a hand for each angle; straight ahead is up."""
        width, height = view.size
        radius = height * 0.11
        centre = np.array([width - radius * 1.35, radius * 1.35])
        axes.add_patch(
            Circle((centre[0], centre[1]), radius, facecolor=(0, 0, 0, 0.45), edgecolor="white", linewidth=1.0)
        )
        for angle, color in angles:
            # a turn to the left goes against the clock
            tip = centre + radius * np.array([-np.sin(np.deg2rad(angle)), -np.cos(np.deg2rad(angle))])
            axes.plot(*np.stack([centre, tip], axis=1), color=color, linewidth=1.8, solid_capstyle="round")
        axes.plot(*centre, "o", color="white", markersize=2)

    def record(self, prediction: Any = None, target: Any = None, camera: Any = None) -> list[tuple[str, Any]]:
        """The angle at the frame's time in degrees, as a curve over time."""
        import rerun

        angles = target if prediction is None else prediction
        return [("steering", rerun.Scalars(float(angles[0])))]

    def list_key(self, view: View) -> list[Entry]:
        every = {"true": (TRUTH, False)} if view.labels else {}
        shown = every | {"predicted": (MISSED, True)} if view.steady else view.shown
        entries = [Entry(name, color, dashed) for name, (color, dashed) in shown.items()]
        if view.matrix is not None:
            how = f"bicycle model, wheelbase {WHEELBASE} m, nominal steering ratio {STEERING_RATIO}"
            return [*entries, Entry(f"lines: path of the wheels ({how})")]
        return [*entries, Entry("no path on the road without a known front camera")]
