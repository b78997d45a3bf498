"""The neck: a bidirectional feature pyramid (BiFPN, EfficientDet, arXiv 1911.09070) with levels at strides 4 to 128."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.layers import Features, enlarge, group_norm, stride_of

EXTRA_STRIDES = (64, 128)


class BiFPN(nn.Module):
    """From the encoder's features to as many levels of `width` channels, and two coarser ones.

    channels: {"encoder.4": channels, ...}, each stride twice the one before.
    repeats: how often information runs down to the fine levels and up again.
    Attribute `channels`: {"neck.4": width, ..., "neck.128": width}. The size of each level is its stride's share of
    the image, rounded up, at any image size. `recompute`: compute the fusions again in the backward pass, in place of
    keeping what they have computed.
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
        self.recompute = False
        fusions = [fusion for layer in self.layers for fusion in layer.fusions]
        # row i sums the weights of the fusion that weight i belongs to
        counts = torch.tensor([len(fusion.weights) for fusion in fusions])
        owner = torch.arange(len(fusions)).repeat_interleave(counts)
        self.register_buffer("same_fusion", (owner[:, None] == owner).float(), persistent=False)

    def forward(self, features: Features) -> Features:
        levels = [lateral(features[name]) for lateral, name in zip(self.laterals, self.reads, strict=True)]
        for _ in EXTRA_STRIDES:
            levels.append(shrink(levels[-1]))
        weights = self.normalise_weights(levels[0].dtype)
        for layer in self.layers:
            levels = layer(levels, weights, self.recompute and self.training)
        return dict(zip(self.channels, levels, strict=True))

    def normalise_weights(self, dtype: torch.dtype) -> Iterator[Float[Tensor, " n"]]:
        """The weights of each fusion in turn, >= 0, with the sum 1 but for a small number ("fast normalised fusion").

        Those of all fusions at once, because each alone would be half a dozen kernels on a few numbers.
        """
        fusions = [fusion for layer in self.layers for fusion in layer.fusions]
        weights = torch.cat([fusion.weights for fusion in fusions])
        with torch.autocast(weights.device.type, enabled=False):
            weights = F.relu(weights)
            weights = (weights / (self.same_fusion.to(weights.dtype) @ weights + 1e-4)).to(dtype)
        return iter(weights.split([len(fusion.weights) for fusion in fusions]))


class BiFPNLayer(nn.Module):
    """Once down (coarse to fine), once up (fine to coarse), over levels from fine to coarse."""

    def __init__(self, levels: int, width: int):
        super().__init__()
        self.down = nn.ModuleList(Fusion(2, width) for _ in range(levels - 1))
        # The coarsest level has no node on the way down: it fuses its input and the level below only.
        self.up = nn.ModuleList(Fusion(3 if i < levels - 2 else 2, width) for i in range(levels - 1))

    @property
    def fusions(self) -> list["Fusion"]:
        """In the order in which they run."""
        return [*self.down, *self.up]

    def forward(
        self, levels: list[Tensor], weights: Iterator[Float[Tensor, " n"]], recompute: bool = False
    ) -> list[Tensor]:
        def fuse(fusion: nn.Module, inputs: list[Tensor]) -> Tensor:
            if recompute:
                # nothing in a fusion draws random numbers
                return checkpoint(fusion, inputs, next(weights), use_reentrant=False, preserve_rng_state=False)
            return fusion(inputs, next(weights))

        middle = [levels[-1]]
        for level, fusion in zip(levels[-2::-1], self.down, strict=True):
            middle.insert(0, fuse(fusion, [level, enlarge(middle[0], 2, level.shape[-2:], mode="nearest")]))
        result = [middle[0]]
        for i, fusion in enumerate(self.up, start=1):
            inputs = (
                [levels[i], shrink(result[-1])] if i == len(levels) - 1 else [levels[i], middle[i], shrink(result[-1])]
            )
            result.append(fuse(fusion, inputs))
        return result


class Fusion(nn.Module):
    """Weighted sum of maps of one size, then a depthwise-separable 3x3 convolution.

    `weights` are those before BiFPN normalises them; they start equal.
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

    def forward(self, inputs: list[Tensor], weights: Float[Tensor, " n"]) -> Tensor:
        return self.convolution(WeightedSum.apply(weights, *inputs))


class WeightedSum(torch.autograd.Function):
    """sum(weights[i] * maps[i]); autograd alone would launch twice as many kernels for its gradient."""

    @staticmethod
    def forward(context: Any, weights: Float[Tensor, " n"], *maps: Tensor) -> Tensor:
        context.save_for_backward(weights, *maps)
        total = maps[0] * weights[0]
        for features, weight in zip(maps[1:], weights[1:].unbind(), strict=True):
            total.addcmul_(features, weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Any:
        weights, *maps = context.saved_tensors
        of_weights = torch.stack([(gradient * features).sum() for features in maps])
        return of_weights, *(gradient * weight for weight in weights.unbind())


def shrink(features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
    """Half the size, rounded up, by the maximum of each 2x2 cells: cell i covers exactly the cells 2 i and 2 i + 1."""
    return F.max_pool2d(features, 2, ceil_mode=True)
