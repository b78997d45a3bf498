"""Monocular depth along the optical axis, in metres; primary metric AbsRel, capped at 80 m and averaged per image."""

from collections.abc import Iterable
from typing import Any, ClassVar

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from a2d2.dataset import Geometry
from a2d2.frames import Frame
from a2d2.images import read_depth_png
from a2d2.lidar import DEPTH_SCALE
from models.heads import DepthHead
from tasks.drawing import blend, write_text
from tasks.options import DepthOptions, DepthProtocol
from tasks.task import Metrics, Task, load_file, widen

RANGES = ((0, 20), (20, 40), (40, 80))  # metres, for AbsRel by distance


def silog_losses(
    log_depth: Float[Tensor, "B H W"], target: Float[Tensor, "B H W"], valid: Tensor, lam: float
) -> Float[Tensor, " B"]:
    """Scale-invariant logarithmic error of each image (Eigen et al., arXiv 1406.2283), 0 where nothing is valid.

    mean(d^2) - lam * mean(d)^2 of d = log of the ratio, written as var(d) + (1 - lam) * mean(d)^2, which rounding
    cannot make negative.
    """
    invalid = ~valid
    difference = (widen(log_depth) - target.clamp(min=1e-3).log()).masked_fill(invalid, 0.0)
    count = valid.sum(dim=(1, 2)).clamp(min=1)
    mean = difference.sum(dim=(1, 2)) / count
    centred = (difference - mean[:, None, None]).masked_fill(invalid, 0.0)
    return centred.square().sum(dim=(1, 2)) / count + (1 - lam) * mean.square()


class DepthMetrics(Metrics):
    """Averages over images of each image's scores (the protocol of monodepth2, arXiv 1806.01260).

    `abs_rel`, `sq_rel`, `rmse`, `rmse_log`, `silog` (x 100), `mae`, `delta1` to `delta3`, and `abs_rel/0-20m` ... by
    true distance. Images without a valid point do not count. Predictions are clamped to 0.1 m .. the cap.
    """

    def __init__(self, cap: float):
        self.cap = cap
        self.rows: dict[str, list[float]] = {}

    def _add(self, name: str, value: Tensor) -> None:
        self.rows.setdefault(name, []).append(float(value))

    def update(self, prediction: Float[Tensor, "B H W"], target: Float[Tensor, "B H W"]) -> None:
        for image_prediction, image_target in zip(prediction, target, strict=True):
            valid = (image_target > 0) & (image_target <= self.cap)
            if valid.any():
                self._update_image(image_prediction[valid].double().clamp(0.1, self.cap), image_target[valid].double())

    def _update_image(self, prediction: Float[Tensor, " n"], target: Float[Tensor, " n"]) -> None:
        relative = (prediction - target).abs() / target
        log_ratio = (prediction / target).log()
        ratio = log_ratio.abs().exp()
        self._add("abs_rel", relative.mean())
        self._add("sq_rel", ((prediction - target).square() / target).mean())
        self._add("rmse", (prediction - target).square().mean().sqrt())
        self._add("rmse_log", log_ratio.square().mean().sqrt())
        self._add("silog", 100 * log_ratio.var(correction=0).sqrt())
        self._add("mae", (prediction - target).abs().mean())
        for power in (1, 2, 3):
            self._add(f"delta{power}", (ratio < 1.25**power).double().mean())
        for near, far in RANGES:
            within = (target > near) & (target <= far)
            if within.any():
                self._add(f"abs_rel/{near}-{far}m", relative[within].mean())

    def merge(self, other: "DepthMetrics") -> None:
        for name, values in other.rows.items():
            self.rows.setdefault(name, []).extend(values)

    def compute(self) -> dict[str, float | None]:
        if not self.rows:
            return {"abs_rel": None}
        return {name: float(np.mean(values)) for name, values in self.rows.items()}


class Depth(Task):
    """Label and target: float32 (H, W) metres, 0 where unknown. Output: log-depth (B, H, W). Prediction:
    metres (B, H, W).
    """

    name: ClassVar[str] = "depth"
    kind: ClassVar[str] = "depth"
    primary_metric: ClassVar[str] = "abs_rel"
    better: ClassVar[str] = "lower"
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
        depth = torch.from_numpy(geometry.splat_nearest(label))
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
        if tuple(output.shape[1:]) != (size[1], size[0]):
            shape = (size[1], size[0])
            output = F.interpolate(output[:, None], size=shape, mode="bilinear", align_corners=False)[:, 0]
        return output.float().exp()

    def metrics(self, protocol: DepthProtocol | None = None) -> DepthMetrics:
        return DepthMetrics((protocol or DepthProtocol()).cap)

    def _color(self, metres: np.ndarray) -> np.ndarray:
        """Colours from bright (near) to dark (far), evenly in log-depth from 3 m to the cap."""
        share = np.log(np.clip(metres, 3, self.options.cap) / 3) / np.log(self.options.cap / 3)
        return (matplotlib.colormaps["inferno"](1 - share)[..., :3] * 255).astype(np.uint8)

    def draw(self, image: np.ndarray, prediction: Float[Tensor, "H W"]) -> np.ndarray:
        metres = prediction.cpu().numpy()
        picture = blend(image, self._color(metres), 0.85)
        return write_text(picture, f"{metres.min():.1f} to {metres.max():.1f} m")

    def draw_label(self, image: np.ndarray, target: Float[Tensor, "H W"]) -> np.ndarray:
        """The points, enlarged so that they are visible, near ones on top."""
        metres = target.cpu().numpy()
        picture = blend(image, np.zeros_like(image), 0.5)
        reach = max(1, metres.shape[1] // 400)
        rows, columns = np.nonzero(metres)
        order = np.argsort(-metres[rows, columns])
        rows, columns = rows[order], columns[order]
        colors = self._color(metres[rows, columns])
        for down in range(-reach, reach + 1):
            for right in range(-reach, reach + 1):
                y = np.clip(rows + down, 0, metres.shape[0] - 1)
                x = np.clip(columns + right, 0, metres.shape[1] - 1)
                picture[y, x] = colors
        return picture
