"""The specialist for boxes: a one-stage, anchor-free detector with a cross-stage-partial backbone of its own.

Example: with `reads = ("backbone.8", "backbone.16", "backbone.32")` and `build_head = partial(DenseDetectionHead,
reads=reads, classes=14)`, `Yolo("boxes", build_head)(torch.rand(1, 3, 64, 96))["boxes"].classes` has the shape
(1, 126, 14).

Written from the papers: blocks from CSPNet (arXiv 1911.11929), pyramid pooling and path aggregation from YOLOv4
(arXiv 2004.10934), the anchor-free, decoupled head from YOLOX (arXiv 2107.08430), with FCOS's centre-ness in place of
an objectness. GroupNorm everywhere: batches here are small.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Features, convolve, enlarge, pad_to_multiple
from models.multitask import MultitaskNet


class Yolo(MultitaskNet):
    """One head `name`, a dense detector on features of the strides 8, 16 and 32.

    build_head: makes it, given the channels of the backbone's features; the head names the features it reads, and the
        strides for matching boxes are read from these names.
    width, depth: channels of the backbone at stride 2, and blocks in its short stages (the long ones have three times
        as many).
    """

    def __init__(self, name: str, build_head: Callable[[dict[str, int]], nn.Module], width: int = 56, depth: int = 2):
        backbone = YoloBackbone(width, depth)
        super().__init__(backbone, None, {name: build_head(backbone.channels)})


class Bottleneck(nn.Module):
    """1x1 and 3x3 convolution, added to the input if `residual`."""

    def __init__(self, width: int, residual: bool):
        super().__init__()
        self.change = nn.Sequential(convolve(width, width, kernel=1), convolve(width, width))
        self.residual = residual

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return features + self.change(features) if self.residual else self.change(features)


class PartialStage(nn.Module):
    """Half of the channels pass `depth` bottlenecks, half go round them; a 1x1 convolution joins the two."""

    def __init__(self, inputs: int, outputs: int, depth: int, residual: bool = True):
        super().__init__()
        half = outputs // 2
        self.through = nn.Sequential(
            convolve(inputs, half, kernel=1), *(Bottleneck(half, residual) for _ in range(depth))
        )
        self.around = convolve(inputs, half, kernel=1)
        self.join = convolve(2 * half, outputs, kernel=1)

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        return self.join(torch.cat([self.through(features), self.around(features)], dim=1))


class PyramidPooling(nn.Module):
    """Maxima over windows of 5, 9 and 13 cells (each is one of 5 over the one before), beside the map itself."""

    def __init__(self, width: int):
        super().__init__()
        self.enter = convolve(width, width // 2, kernel=1)
        self.join = convolve(width // 2 * 4, width, kernel=1)

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        maps = [self.enter(features)]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], 5, stride=1, padding=2))
        return self.join(torch.cat(maps, dim=1))


class YoloBackbone(nn.Module):
    """Five halvings, then path aggregation: {"backbone.8": ..., "backbone.16": ..., "backbone.32": ...}."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        w2, w4, w8, w16, w32 = (width * 2**level for level in range(5))
        self.channels = {"backbone.8": w8, "backbone.16": w16, "backbone.32": w32}
        self.to_8 = nn.Sequential(
            convolve(3, w2, kernel=5, stride=2),
            convolve(w2, w4, stride=2),
            PartialStage(w4, w4, depth),
            convolve(w4, w8, stride=2),
            PartialStage(w8, w8, 3 * depth),
        )
        self.to_16 = nn.Sequential(convolve(w8, w16, stride=2), PartialStage(w16, w16, 3 * depth))
        self.to_32 = nn.Sequential(convolve(w16, w32, stride=2), PartialStage(w32, w32, depth), PyramidPooling(w32))

        # Down from coarse to fine, then up again, each time beside the map of that size.
        self.narrow_32 = convolve(w32, w16, kernel=1)
        self.down_16 = PartialStage(2 * w16, w16, depth, residual=False)
        self.narrow_16 = convolve(w16, w8, kernel=1)
        self.down_8 = PartialStage(2 * w8, w8, depth, residual=False)
        self.halve_8 = convolve(w8, w8, stride=2)
        self.up_16 = PartialStage(2 * w8, w16, depth, residual=False)
        self.halve_16 = convolve(w16, w16, stride=2)
        self.up_32 = PartialStage(2 * w16, w32, depth, residual=False)

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> Features:
        """RGB in 0..1."""
        at_8 = self.to_8(pad_to_multiple(2 * image - 1, 32))
        at_16 = self.to_16(at_8)
        narrow_32 = self.narrow_32(self.to_32(at_16))
        narrow_16 = self.narrow_16(self.down_16(torch.cat([double(narrow_32), at_16], dim=1)))
        out_8 = self.down_8(torch.cat([double(narrow_16), at_8], dim=1))
        out_16 = self.up_16(torch.cat([self.halve_8(out_8), narrow_16], dim=1))
        out_32 = self.up_32(torch.cat([self.halve_16(out_16), narrow_32], dim=1))
        height, width = image.shape[-2:]
        return {
            name: features[..., : -(-height // stride), : -(-width // stride)]
            for (name, features), stride in zip(
                {"backbone.8": out_8, "backbone.16": out_16, "backbone.32": out_32}.items(), (8, 16, 32), strict=True
            )
        }


def double(features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C H W"]:
    """Twice the size, by repeating cells."""
    height, width = features.shape[-2:]
    return enlarge(features, 2, (2 * height, 2 * width), mode="nearest")
