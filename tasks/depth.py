"""Monocular depth along the optical axis, in metres; primary metric AbsRel, capped at 80 m and averaged per image."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from torch import Tensor, nn
from torch.nn import functional as F

from a2d2.dataset import Geometry, Holes
from a2d2.frames import Frame
from a2d2.images import encode_png, read_depth_png
from a2d2.lidar import DEPTH_SCALE
from models.heads import DepthHead
from tasks.drawing import View, show_image, show_map, write_note
from tasks.options import DepthOptions, DepthProtocol
from tasks.task import Metrics, SoftTarget, Task, TeacherOutput, average_rows, hide_rows, load_file, load_gray, widen

RANGES = ((0, 20), (20, 40), (40, 80))  # metres, for scores by distance
COLORS = "viridis_r"  # near is bright
BY_RANGE = ("abs_rel", "rmse", "mae", "delta1")


def silog_losses(
    log_depth: Float[Tensor, "B H W"], target: Float[Tensor, "B H W"], valid: Tensor, lam: float
) -> Float[Tensor, " B"]:
    """Scale-invariant logarithmic error of each image (Eigen et al., arXiv 1406.2283), 0 where nothing is valid.

    mean(d^2) - lam * mean(d)^2 of d = log of the ratio, written as var(d) + (1 - lam) * mean(d)^2, which rounding
    cannot make negative. `valid`: a mask, or a weight of each pixel, 0 for one that does not count.
    """
    invalid = valid == 0
    difference = (widen(log_depth) - target.clamp(min=1e-3).log()).masked_fill(invalid, 0.0)
    if valid.dtype == torch.bool:
        count = valid.sum(dim=(1, 2)).clamp(min=1)
        mean = difference.sum(dim=(1, 2)) / count
        centred = (difference - mean[:, None, None]).masked_fill(invalid, 0.0)
        return centred.square().sum(dim=(1, 2)) / count + (1 - lam) * mean.square()
    shares = valid / valid.sum(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    mean = (difference * shares).sum(dim=(1, 2))
    centred = (difference - mean[:, None, None]).square() * shares
    return centred.sum(dim=(1, 2)) + (1 - lam) * mean.square()


class DepthMetrics(Metrics):
    """Averages over images of each image's scores (the protocol of monodepth2, arXiv 1806.01260).

    `abs_rel`, `sq_rel`, `rmse`, `rmse_log`, `silog` (x 100), `mae`, `delta1` to `delta3`, and of those in BY_RANGE
    `abs_rel/0-20m` ... by true distance. Images without a valid point do not count. Predictions are clamped to 0.1 m ..
    the cap; one that is not a number makes the scores none.
    """

    def __init__(self, cap: float):
        self.cap = cap
        self.rows: list[dict[str, float]] = []  # of each image its scores

    def update(self, prediction: Float[Tensor, "B H W"], target: Float[Tensor, "B H W"]) -> None:
        for image_prediction, image_target in zip(prediction, target, strict=True):
            valid = (image_target > 0) & (image_target <= self.cap)
            self.rows.append(self._score_image(image_prediction[valid], image_target[valid]) if valid.any() else {})

    def _score_image(self, prediction: Float[Tensor, " n"], target: Float[Tensor, " n"]) -> dict[str, float]:
        prediction, target = prediction.double().clamp(0.1, self.cap), target.double()
        scores = self._score_points(prediction, target)
        for near, far in RANGES:
            within = (target > near) & (target <= far)
            if within.any():
                of_range = self._score_points(prediction[within], target[within])
                scores |= {f"{name}/{near}-{far}m": of_range[name] for name in BY_RANGE}
        return scores

    @staticmethod
    def _score_points(prediction: Float[Tensor, " n"], target: Float[Tensor, " n"]) -> dict[str, float]:
        error = prediction - target
        log_ratio = (prediction / target).log()
        ratio = log_ratio.abs().exp()
        scores = {
            "abs_rel": (error.abs() / target).mean(),
            "sq_rel": (error.square() / target).mean(),
            "rmse": error.square().mean().sqrt(),
            "rmse_log": log_ratio.square().mean().sqrt(),
            "silog": 100 * log_ratio.var(correction=0).sqrt(),
            "mae": error.abs().mean(),
        }
        scores |= {f"delta{power}": (ratio < 1.25**power).double().mean() for power in (1, 2, 3)}
        return dict(zip(scores, torch.stack(list(scores.values())).tolist(), strict=True))

    def merge(self, other: "DepthMetrics") -> None:
        self.rows += other.rows

    def compute(self) -> dict[str, float | None]:
        collected: dict[str, list[float]] = {}
        for row in self.rows:
            for name, value in row.items():
                collected.setdefault(name, []).append(value)
        return {name: float(np.mean(values)) for name, values in collected.items()} or {"abs_rel": None}

    def score_frames(self) -> list[float | None]:
        return [row.get("abs_rel") for row in self.rows]

    def resample(self, counts: Float64[np.ndarray, "R n"]) -> Float64[np.ndarray, " R"]:
        return average_rows([row.get("abs_rel") for row in self.rows], counts)


def _draw_bar(axes: Axes, view: View, colors: ScalarMappable, label: str, ticks: list[float]) -> None:
    axes.axis("off")
    inner = axes.inset_axes((0.0, 0.62, 0.66, 0.3))
    bar = axes.figure.colorbar(colors, cax=inner, orientation="horizontal", ticks=ticks)
    bar.ax.minorticks_off()
    bar.ax.set_xticklabels([f"{tick:g}" for tick in ticks])
    bar.ax.tick_params(labelsize=view.text, length=2, pad=1)
    bar.set_label(label, fontsize=view.text, labelpad=1)
    bar.outline.set_linewidth(0.4)


def _encode_metres(metres: Float[Tensor, "H W"], least: int) -> bytes:
    stored = (metres.cpu().double() * DEPTH_SCALE).round().clamp(least, 65535)
    return encode_png(stored.numpy().astype(np.uint16))


class Depth(Task):
    """Label and target: float32 (H, W) metres, 0 where unknown. Output: log-depth (B, H, W). Prediction:
    metres (B, H, W).
    """

    name: ClassVar[str] = "depth"
    kind: ClassVar[str] = "depth"
    confidence_kind: ClassVar[str] = "depth_confidence"
    primary_metric: ClassVar[str] = "abs_rel"
    better: ClassVar[str] = "lower"
    group_titles: ClassVar[Mapping[str, str]] = {
        "abs_rel": "AbsRel by true distance",
        "rmse": "RMSE in metres by true distance",
        "mae": "MAE in metres by true distance",
        "delta1": "share within a factor of 1.25 (delta1) by true distance",
    }
    error_key: ClassVar[str] = "relative error at each point\nblack: 0, yellow: 0.5 or more"
    hub_tag: ClassVar[str] = "depth-estimation"
    resolution: ClassVar[float] = 1 / DEPTH_SCALE  # a step of the stored depth, at 1 m; farther away it is finer
    Options = DepthOptions
    options: DepthOptions

    def load(self, frame: Frame) -> Float32[np.ndarray, "H W"] | None:
        stored = load_file(frame.path(self.kind), read_depth_png)
        return None if stored is None else stored.astype(np.float32) / DEPTH_SCALE

    def blank(self, size: tuple[int, int]) -> Float32[Tensor, "H W"]:
        return torch.zeros(size[1], size[0])

    def transform(self, label: Float32[np.ndarray, "h w"], geometry: Geometry) -> Float32[Tensor, "H W"]:
        """A zoom makes things look nearer: depth is divided by the zoom, as if the focal length were the same."""
        depth = torch.from_numpy(geometry.hide(geometry.splat_nearest(label), 0))
        return depth if geometry.zoom == 1 else depth / geometry.zoom

    def find_constant(self, labels: Iterable[Any], protocol: DepthProtocol | None = None) -> float | None:
        """The depth that minimises AbsRel: the median of all points, weighted by 1 / (depth * points of the image)."""
        cap = (protocol or DepthProtocol()).cap
        depths, weights = np.zeros(0), np.zeros(0)
        points = [label[(label > 0) & (label <= cap)].astype(np.float64) for label in labels]
        if points:
            depths = np.concatenate(points)
            weights = np.concatenate([1 / (valid * max(len(valid), 1)) for valid in points])
        if len(depths) == 0:
            return None
        order = np.argsort(depths)
        total = np.cumsum(weights[order])
        return float(depths[order][np.searchsorted(total, total[-1] / 2)])

    def predict_constant(self, target: Float[Tensor, "B H W"]) -> Float[Tensor, "B H W"]:
        return torch.full_like(target, self.label_statistics["constant"])

    @property
    def output_format(self) -> str:
        return "log_depth"

    def head_arguments(self) -> dict[str, Any]:
        """`initial`: the depth in metres that an untrained head predicts: the constant baseline, else 10 m."""
        return {"initial": self.label_statistics.get("constant") or 10.0}

    def head(self, channels: dict[str, int]) -> nn.Module:
        # if the bins ended at the cap, only a distribution on the last bin alone could predict it
        farthest = 1.25 * self.options.cap
        return DepthHead(channels, farthest=farthest, **self.head_arguments(), **self.options.head.model_dump())

    def _valid(self, target: Float[Tensor, "B H W"]) -> Tensor:
        return (target > 0) & (target <= self.options.cap)

    def count(self, target: Float[Tensor, "B H W"]) -> Int64[Tensor, " B"]:
        """Images with a valid point: SILog is a number per image and not additive over pixels."""
        return self._valid(target).flatten(1).any(dim=1).long()

    def loss(self, output: Float[Tensor, "B H W"], target: Float[Tensor, "B H W"]) -> Float[Tensor, ""]:
        return silog_losses(output, target, self._valid(target), self.options.silog_lambda).sum()

    def predict(self, output: Float[Tensor, "B h w"], size: tuple[int, int]) -> Float[Tensor, "B H W"]:
        return self._resize(output, size).float().exp()

    def _resize(self, output: Float[Tensor, "B h w"], size: tuple[int, int]) -> Float[Tensor, "B H W"]:
        shape = (size[1], size[0])
        if tuple(output.shape[1:]) == shape:
            return output
        return F.interpolate(output[:, None], size=shape, mode="bilinear", align_corners=False)[:, 0]

    def encode_prediction(self, prediction: Float[Tensor, "H W"]) -> bytes:
        """KITTI's 16-bit PNG, metres x 256; as 0 means unknown there, the least is 1 / 256 m."""
        return _encode_metres(prediction, least=1)

    def load_prediction(
        self, path: Path, about: Mapping[str, Any], size: tuple[int, int], own: tuple[int, int]
    ) -> Float[Tensor, "H W"]:
        """ValueError where a pixel is unknown: what is not predicted cannot be scored."""
        stored = load_file(path, read_depth_png)
        if stored is None:
            raise FileNotFoundError(f"there is no {path}")
        if stored.shape != own[::-1]:
            raise ValueError(f"{path} is {stored.shape[1]}x{stored.shape[0]}, its dataset {own[0]}x{own[1]}")
        if not stored.all():
            raise ValueError(f"{path} has no prediction (0) for {(stored == 0).sum()} pixels; predict all of them")
        metres = torch.from_numpy(stored.astype(np.float32) / DEPTH_SCALE)
        return metres if size == own else self._resize(metres.log()[None], size)[0].exp()

    def batch_predictions(self, predictions: list[Tensor]) -> Float[Tensor, "B H W"]:
        return torch.stack(predictions)

    def describe_units(self, focal_length: float) -> str:
        return (
            f"{self.name}: metres for a focal length of {focal_length:.2f} x the width of the picture; with another "
            "lens they are off by the ratio of the focal lengths"
        )

    def export_names(self) -> dict[str, str]:
        return {"depth": "float32 (batch, H, W): metres along the optical axis"}

    def encode_confidence(
        self, output: Float[Tensor, "B h w"], mirrored: Float[Tensor, "B h w"], prediction: Any, size: tuple[int, int]
    ) -> list[bytes]:
        """16-bit gray PNG: the distance of the prediction from that on the mirrored image, metres x 256."""
        spread = (self.predict(output, size) - self.predict(mirrored, size).flip(2)).abs()
        return [_encode_metres(row, least=0) for row in spread]

    def blend(
        self,
        outputs: Sequence[TeacherOutput],
        size: tuple[int, int],
        calibration: Mapping[str, Any] | None = None,
        speakers: Sequence[Any] | None = None,
    ) -> SoftTarget:
        """`metres` float32 (B, H, W), the geometric mean over teachers and mirror images, and `spread` (B, H, W), how
        far the farthest of them is from the nearest, in metres."""
        each = torch.stack(
            [self._resize(output.flip(2) if mirrored else output, size).float() for output, mirrored in outputs]
        )
        return {"metres": each.mean(dim=0).exp(), "spread": each.amax(dim=0).exp() - each.amin(dim=0).exp()}

    def encode_soft(
        self, said: SoftTarget, row: int, size: tuple[int, int], calibration: Mapping[str, Any] | None = None
    ) -> dict[str, bytes]:
        return {
            self.kind: self.encode_prediction(said["metres"][row]),
            self.confidence_kind: _encode_metres(said["spread"][row], least=0),
        }

    def load_soft(
        self, frame: Frame, about: Mapping[str, Mapping[str, Any]], own: tuple[int, int]
    ) -> dict[str, np.ndarray] | None:
        try:
            metres = self.load_prediction(frame.path(self.kind), about[self.kind], own, own).numpy()
        except FileNotFoundError:
            return None
        stored = load_gray(frame.path(self.confidence_kind), metres.shape)
        return {"metres": metres, "spread": stored.astype(np.float32) / DEPTH_SCALE}

    def transform_soft(self, said: dict[str, np.ndarray], geometry: Geometry) -> SoftTarget:
        """0 metres where something is hidden."""
        metres = geometry.hide(geometry.sample_nearest(said["metres"]), 0)
        spread = geometry.sample_nearest(said["spread"])
        return {"metres": torch.from_numpy(metres / geometry.zoom), "spread": torch.from_numpy(spread / geometry.zoom)}

    def prepare_soft(self, said: SoftTarget, holes: Sequence[Holes] = ()) -> SoftTarget:
        return said | {"metres": hide_rows(said["metres"], holes, 0)}

    def count_soft(self, target: SoftTarget) -> Float64[Tensor, " B"]:
        """Images."""
        return self.count(target["metres"]).double()

    def soft_loss(self, output: Float[Tensor, "B H W"], target: SoftTarget) -> Float[Tensor, ""]:
        """SILog of each image on the pixels that teachers are sure of, times their share."""
        options = self.options.pseudo
        known = self._valid(target["metres"])
        weights = (known & (target["spread"] <= options.threshold)).to(widen(output).dtype)
        if options.weighting == "confidence":
            weights = weights * (-target["spread"] / options.threshold).exp()
        losses = silog_losses(output, target["metres"], weights, self.options.silog_lambda)
        return (losses * weights.sum(dim=(1, 2)) / known.sum(dim=(1, 2)).clamp(min=1)).sum()

    def metrics(self, protocol: DepthProtocol | None = None) -> DepthMetrics:
        return DepthMetrics((protocol or DepthProtocol()).cap)

    @property
    def _scale(self) -> LogNorm:
        """One scale of colours for all pictures of a run: evenly in log-depth from 3 m to the cap."""
        return LogNorm(3.0, self.options.cap, clip=True)

    def draw(self, axes: Axes, view: View, prediction: Any = None, target: Any = None) -> None:
        """A prediction as a map; a target as points that are large enough to see, near ones on top."""
        if prediction is not None:
            metres = prediction.cpu().numpy()
            show_map(axes, metres, cmap=COLORS, norm=self._scale)
            return
        self._draw_points(axes, view, target.cpu().numpy(), None, self._scale, COLORS)

    def _draw_points(
        self, axes: Axes, view: View, metres: np.ndarray, values: np.ndarray | None, scale: Normalize, colors: str
    ) -> None:
        show_image(axes, view, dark=0.6, gray=True)
        rows, columns = np.nonzero(metres)
        order = np.argsort(-metres[rows, columns])
        rows, columns = rows[order], columns[order]
        shown = metres if values is None else values
        points = view.inches * 72 / 110  # of the diameter: a hundred and ten side by side fill the field
        axes.scatter(
            columns + 0.5, rows + 0.5, s=points**2, c=shown[rows, columns], cmap=colors, norm=scale, marker="s",
            linewidths=0, rasterized=True,
        )  # fmt: skip
        axes.set_xlim(0, view.size[0])
        axes.set_ylim(view.size[1], 0)

    def count_key_lines(self, view: View, inches: float) -> float:
        return 2.6

    def record(self, prediction: Any = None, target: Any = None, camera: Any = None) -> list[tuple[str, Any]]:
        """A depth image in metres; of labels also their points in 3-D, coloured by distance."""
        import rerun

        metres = (target if prediction is None else prediction).cpu().numpy().astype(np.float32)
        image = rerun.DepthImage(metres, meter=1.0, depth_range=(0.0, self.options.cap))
        recorded: list[tuple[str, Any]] = [("camera/depth", image)]
        if prediction is None and camera is not None:
            rows, columns = np.nonzero(metres)
            ahead = metres[rows, columns]
            left = (camera[0, 2] - columns) / camera[0, 0] * ahead
            up = (camera[1, 2] - rows) / camera[1, 1] * ahead
            colors = matplotlib.colormaps[COLORS](self._scale(ahead))[:, :3]
            points = np.stack([ahead, left, up], axis=1)
            recorded.append(("world/lidar", rerun.Points3D(points, colors=colors, radii=0.05)))
        return recorded

    def draw_key(self, axes: Axes, view: View) -> None:
        """One bar of colours for ground truth and all predictions, in metres."""
        _draw_bar(axes, view, ScalarMappable(self._scale, COLORS), "metres along the optical axis", self._list_ticks())

    def _list_ticks(self) -> list[float]:
        ticks = [3.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0]
        return [tick for tick in ticks if tick < self.options.cap] + [self.options.cap]

    def draw_error(
        self, axes: Axes, view: View, prediction: Float[Tensor, "H W"], target: Float[Tensor, "H W"]
    ) -> None:
        """The relative error at each point of the label, from black (none) to yellow (half of the distance)."""
        metres = target.cpu().numpy()
        known = (metres > 0) & (metres <= self.options.cap)
        error = np.zeros_like(metres)
        error[known] = np.abs(prediction.cpu().numpy()[known] - metres[known]) / metres[known]
        self._draw_points(axes, view, np.where(known, metres, 0), error, Normalize(0, 0.5, clip=True), "inferno")
        mean = error[known].mean() if known.any() else 0.0
        write_note(axes, view, f"mean: {mean:.2f}")
