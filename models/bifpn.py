"""The neck: a bidirectional feature pyramid (BiFPN, EfficientDet, arXiv 1911.09070) with levels at strides 4 to 128."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Features, enlarge, group_norm, stride_of

EXTRA_STRIDES = (64, 128)


class BiFPN(nn.Module):
    """From the encoder's features to as many levels of `width` channels, and two coarser ones.

    channels: {"encoder.4": channels, ...}, each stride twice the one before.
    repeats: how often information runs down to the fine levels and up again.
    Attribute `channels`: {"neck.4": width, ..., "neck.128": width}. The size of each level is its stride's share of
    the image, rounded up, at any image size.
    """

    def __init__(self, channels: dict[str, int], width: int = 128, repeats: int = 2):
        super().__init__()
        self.reads = tuple(sorted(channels, key=stride_of))
        strides = [stride_of(name) for name in self.reads]
        assert strides == [strides[0] * 2**i for i in range(len(strides))], strides
        assert EXTRA_STRIDES[0] == 2 * strides[-1], strides
        self.channels = {f"neck.{stride}": width for stride in (*strides, *EXTRA_STRIDES)}
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels[name], width, 1, bias=False), group_norm(width)) for name in self.reads
        )
        self.layers = nn.ModuleList(BiFPNLayer(len(self.channels), width) for _ in range(repeats))

    def forward(self, features: Features) -> Features:
        levels = [lateral(features[name]) for lateral, name in zip(self.laterals, self.reads, strict=True)]
        for _ in EXTRA_STRIDES:
            levels.append(shrink(levels[-1]))
        for layer in self.layers:
            levels = layer(levels)
        return dict(zip(self.channels, levels, strict=True))


class BiFPNLayer(nn.Module):
    """Once down (coarse to fine), once up (fine to coarse), over levels from fine to coarse."""

    def __init__(self, levels: int, width: int):
        super().__init__()
        self.down = nn.ModuleList(Fusion(2, width) for _ in range(levels - 1))
        # The coarsest level has no node on the way down: it fuses its input and the level below only.
        self.up = nn.ModuleList(Fusion(3 if i < levels - 2 else 2, width) for i in range(levels - 1))

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        middle = [levels[-1]]
        for level, fuse in zip(levels[-2::-1], self.down, strict=True):
            middle.insert(0, fuse([level, enlarge(middle[0], 2, level.shape[-2:], mode="nearest")]))
        result = [middle[0]]
        for i, fuse in enumerate(self.up, start=1):
            inputs = (
                [levels[i], shrink(result[-1])] if i == len(levels) - 1 else [levels[i], middle[i], shrink(result[-1])]
            )
            result.append(fuse(inputs))
        return result


class Fusion(nn.Module):
    """Weighted mean of maps of one size, then a depthwise-separable 3x3 convolution ("fast normalised fusion").

    The weights start equal and are kept non-negative by a ReLU.
    """

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(inputs))
        self.convolution = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            nn.Conv2d(width, width, 1, bias=False),
            group_norm(width),
        )

    def forward(self, inputs: list[Tensor]) -> Tensor:
        weights = F.relu(self.weights)
        weights = weights / (weights.sum() + 1e-4)
        return self.convolution(sum(weight * features for weight, features in zip(weights, inputs, strict=True)))


def shrink(features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
    """Half the size, rounded up, by the maximum of each 2x2 cells: cell i covers exactly the cells 2 i and 2 i + 1."""
    return F.max_pool2d(features, 2, ceil_mode=True)
