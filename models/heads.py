"""Heads: from named features to one output. A dense map, a log-depth map, boxes, or a few numbers.

Each is called as `head(features, size)`, with `size` = (H, W) of the image, and names the features it reads in
`head.reads`. Outputs are float32, under autocast too.
"""

import math
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead

from models.layers import Features, apply_in_float32, convolve, enlarge, fill_bias, group_norm, stride_of, zero_layer


class Adapter(nn.Module):
    """A residual 1x1 bottleneck that gives a head its own view of a shared feature; it starts as the identity."""

    def __init__(self, channels: int):
        super().__init__()
        bottleneck = max(channels // 4, 1)
        self.change = nn.Sequential(nn.Conv2d(channels, bottleneck, 1), nn.SiLU(), nn.Conv2d(bottleneck, channels, 1))
        zero_layer(self.change[-1])

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return features + self.change(features)


class Head(nn.Module):
    """What all heads share: the features they read, from fine to coarse.

    channels: all features there are, {"neck.4": channels, ...}.
    reads: names of those it reads. ValueError if there is no such feature.
    stop_gradient: the head learns, but does not move encoder and neck.
    adapter: see Adapter.
    """

    def __init__(
        self, channels: dict[str, int], reads: tuple[str, ...], stop_gradient: bool = False, adapter: bool = False
    ):
        super().__init__()
        if not reads:
            raise ValueError(f"a head must read at least one of {', '.join(channels)}")
        if unknown := [name for name in reads if name not in channels]:
            raise ValueError(f"a head cannot read {', '.join(unknown)}: the network offers {', '.join(channels)}")
        self.reads = tuple(sorted(reads, key=stride_of))
        self.strides = tuple(map(stride_of, self.reads))
        self.stop_gradient = stop_gradient
        self.adapters = nn.ModuleList(Adapter(channels[name]) if adapter else nn.Identity() for name in self.reads)

    def read(self, features: Features) -> list[Tensor]:
        """The maps this head works on, from fine to coarse."""
        maps = [features[name].detach() if self.stop_gradient else features[name] for name in self.reads]
        return [adapter(level) for adapter, level in zip(self.adapters, maps, strict=True)]


class LevelSum(nn.Module):
    """Each level convolved, enlarged to the finest and added up, as in panoptic FPN (arXiv 1901.02446)."""

    def __init__(self, channels: list[int], strides: tuple[int, ...], width: int):
        super().__init__()
        self.factors = [stride // strides[0] for stride in strides]
        self.convolutions = nn.ModuleList(convolve(inputs, width) for inputs in channels)

    def forward(self, levels: list[Tensor]) -> Tensor:
        size = levels[0].shape[-2:]
        terms = zip(self.convolutions, levels, self.factors, strict=True)
        return reduce(torch.add, (enlarge(convolution(level), factor, size) for convolution, level, factor in terms))


class MapHead(Head):
    """A dense map of `outputs` channels at the size of the image.

    width, layers: channels and number of the 3x3 convolutions on the summed levels.
    """

    def __init__(
        self,
        channels: dict[str, int],
        reads: tuple[str, ...] = ("neck.4", "neck.8", "neck.16", "neck.32"),
        outputs: int = 1,
        width: int = 128,
        layers: int = 1,
        **shared: bool,
    ):
        super().__init__(channels, reads, **shared)
        self.sum = LevelSum([channels[name] for name in self.reads], self.strides, width)
        self.convolutions = nn.Sequential(*(convolve(width, width) for _ in range(layers)))
        self.last = nn.Conv2d(width, outputs, 1)
        nn.init.normal_(self.last.weight, std=0.01)
        fill_bias(self.last, 0.0)

    def forward(self, features: Features, size: tuple[int, int]) -> Float[Tensor, "B outputs H W"]:
        summed = self.convolutions(self.sum(self.read(features)))
        return enlarge(apply_in_float32(self.last, summed), self.strides[0], size)


class Residual(nn.Module):
    """x + convolution(activation(norm(x))), twice; it starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        layers = []
        for _ in range(2):
            layers += [group_norm(width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
        self.change = nn.Sequential(*layers)
        zero_layer(self.change[-1])

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return features + self.change(features)


class DepthHead(Head):
    """Natural logarithm of the depth in metres, at the size of the image.

    width, layers: channels of the head, and number of its residual blocks of two 3x3 convolutions.
    initial: the depth in metres that an untrained head predicts everywhere.
    bins: 0 to regress the log-depth. Otherwise a softmax over as many centres, evenly spaced in log-depth from
        `nearest` to `farthest` metres, and the prediction is the expectation of the log-depth (AdaBins, arXiv
        2011.14141, with fixed centres), so its exponential is the geometric mean of the distribution.
    """

    def __init__(
        self,
        channels: dict[str, int],
        reads: tuple[str, ...] = ("neck.4",),
        width: int = 64,
        layers: int = 2,
        initial: float = 10.0,
        bins: int = 0,
        nearest: float = 1.0,
        farthest: float = 100.0,
        **shared: bool,
    ):
        super().__init__(channels, reads, **shared)
        if bins and not 0 < nearest < initial < farthest:
            raise ValueError(f"depths in metres must rise: nearest {nearest}, initial {initial}, farthest {farthest}")
        self.sum = LevelSum([channels[name] for name in self.reads], self.strides, width)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(layers)), group_norm(width), nn.SiLU())
        self.last = nn.Conv2d(width, bins or 1, 3, padding=1)
        nn.init.normal_(self.last.weight, std=0.01)
        centres = torch.linspace(math.log(nearest), math.log(farthest), bins) if bins else None
        self.register_buffer("centres", centres, persistent=False)
        fill_bias(self.last, math.log(initial))
        if bins:
            # A bell of standard deviation 0.5 (a factor of 1.6 in metres) around the initial log-depth.
            self.last.bias.data = -2 * (centres - math.log(initial)) ** 2

    def forward(self, features: Features, size: tuple[int, int]) -> Float[Tensor, "B H W"]:
        log_depth = apply_in_float32(self.last, self.blocks(self.sum(self.read(features))))
        if self.centres is not None:
            log_depth = (log_depth.softmax(dim=1) * self.centres.view(-1, 1, 1)).sum(dim=1, keepdim=True)
        return enlarge(log_depth, self.strides[0], size).squeeze(1)


class DetectionOutput(NamedTuple):
    """The output of a dense detector at each of its L = sum over strides of ceil(H/s) * ceil(W/s) locations.

    The locations run over the strides in order, and row by row within one; see `locate_cells`.
    """

    classes: Float[Tensor, "B L K"]
    """Logits, one sigmoid a class."""
    boxes: Float[Tensor, "B L 4"]
    """Distances from the location to the left, top, right and bottom edge, in pixels, > 0."""
    centreness: Float[Tensor, "B L"]
    """Logits of how central the location is in its box."""
    strides: tuple[int, ...]
    size: tuple[int, int]
    """(H, W) of the image."""


def count_cells(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Rows and columns of the cells that cover an image of `size` = (H, W)."""
    return -(-size[0] // stride), -(-size[1] // stride)


def locate_cells(
    size: tuple[int, int], strides: tuple[int, ...], device: torch.device | str = "cpu"
) -> Float[Tensor, "L 2"]:
    """(x, y) of the cell centres, (i + 0.5) * stride, in the coordinates of box edges: the image is [0, W] x [0, H].

    In a size that a stride does not divide, the centres of the last row or column may lie outside the image.
    """
    levels = []
    for stride in strides:
        rows, columns = count_cells(size, stride)
        y = (torch.arange(rows, device=device) + 0.5) * stride
        x = (torch.arange(columns, device=device) + 0.5) * stride
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        levels.append(torch.stack([grid_x, grid_y], dim=-1).reshape(-1, 2))
    return torch.cat(levels)


class DenseDetectionHead(Head):
    """An anchor-free dense detector (FCOS, arXiv 2006.09214): torchvision's two towers, shared by all levels.

    classes: number of object classes; there is none for the background.
    width, layers: channels and number of convolutions of each tower. Levels of another width pass a 1x1 convolution.

    Distances are stride * exp(scale of the level * regression), so that no location is ever without gradient, as those
    below zero are under the ReLU of torchvision's own forward.
    """

    def __init__(
        self,
        channels: dict[str, int],
        reads: tuple[str, ...] = ("neck.8", "neck.16", "neck.32", "neck.64", "neck.128"),
        classes: int = 1,
        width: int = 128,
        layers: int = 4,
        **shared: bool,
    ):
        super().__init__(channels, reads, **shared)
        self.entries = nn.ModuleList(
            nn.Identity() if channels[name] == width else nn.Conv2d(channels[name], width, 1) for name in self.reads
        )
        self.classification = FCOSClassificationHead(width, 1, classes, layers, norm_layer=group_norm)
        self.regression = FCOSRegressionHead(width, 1, layers, norm_layer=group_norm)
        # A level is for boxes that reach some 4 to 8 strides from their centre: start there, not at 1.
        nn.init.constant_(self.regression.bbox_reg.bias, math.log(4))
        self.scales = nn.Parameter(torch.ones(len(self.reads)))
        self._log_strides: dict[Any, Tensor] = {}

    def forward(self, features: Features, size: tuple[int, int]) -> DetectionOutput:
        classes, regression, centreness = [], [], []
        for entry, level, stride, scale in zip(
            self.entries, self.read(features), self.strides, self.scales.unbind(), strict=True
        ):
            level = entry(level)
            assert level.shape[-2:] == count_cells(size, stride), (level.shape, size, stride)
            tower = self.regression.conv(level)
            classes.append(
                list_cells(apply_in_float32(self.classification.cls_logits, self.classification.conv(level)))
            )
            regression.append(list_cells(apply_in_float32(self.regression.bbox_reg, tower)) * scale)
            centreness.append(list_cells(apply_in_float32(self.regression.bbox_ctrness, tower)).squeeze(2))
        # 1000 strides is wider than any image: the bound only keeps a diverging run finite. A product with the stride
        # is a sum of logarithms.
        spread = self.list_log_strides(size, regression[0])
        boxes = (torch.cat(regression, 1).clamp(max=math.log(1000)) + spread).exp()
        return DetectionOutput(torch.cat(classes, 1), boxes, torch.cat(centreness, 1), self.strides, size)

    def list_log_strides(self, size: tuple[int, int], like: Tensor) -> Float[Tensor, "L 1"]:
        """The logarithm of the stride of each location; made once for a size."""
        key = (size, like.device, like.dtype)
        if key not in self._log_strides:
            levels = [
                torch.full((math.prod(count_cells(size, stride)), 1), math.log(stride)) for stride in self.strides
            ]
            self._log_strides = {key: torch.cat(levels).to(like.device, like.dtype)}
        return self._log_strides[key]


def list_cells(level: Float[Tensor, "B C H W"]) -> Float[Tensor, "B HW C"]:
    """The cells of a map one after the other, row by row."""
    return level.flatten(2).transpose(1, 2)


class GridHead(Head):
    """A few numbers for the whole image, from features averaged over a coarse grid, which keeps where things are.

    grid: rows and columns, at any image size.
    width: channels kept of each level; hidden, layers: units and number of the hidden layers. The untrained head
        predicts 0.
    """

    def __init__(
        self,
        channels: dict[str, int],
        reads: tuple[str, ...] = ("encoder.32",),
        grid: tuple[int, int] = (4, 8),
        width: int = 128,
        hidden: int = 256,
        layers: int = 1,
        outputs: int = 1,
        **shared: bool,
    ):
        super().__init__(channels, reads, **shared)
        self.grid = grid
        self.entries = nn.ModuleList(convolve(channels[name], width, kernel=1) for name in self.reads)
        inputs = [width * math.prod(grid) * len(self.reads), *(layers - 1) * [hidden]]
        self.hidden = nn.Sequential(*(layer for units in inputs for layer in (nn.Linear(units, hidden), nn.SiLU())))
        self.last = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.last.weight)
        fill_bias(self.last, 0.0)

    def forward(self, features: Features, size: tuple[int, int]) -> Float[Tensor, "B outputs"]:
        average = partial(F.adaptive_avg_pool2d, output_size=self.grid)
        levels = zip(self.entries, self.read(features), strict=True)
        cells = torch.cat([average(entry(level)).flatten(1) for entry, level in levels], dim=1)
        return apply_in_float32(self.last, self.hidden(cells))
