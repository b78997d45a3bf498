"""The specialist for dense maps: a U-Net (arXiv 1505.04597) of four levels and 31 million parameters.

Example: `UNet("map", outputs=19)(torch.rand(1, 3, 64, 96))["map"]` has the shape (1, 19, 64, 96).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.layers import Features, apply_in_float32, fill_bias, group_norm, pad_to_multiple
from models.multitask import MultitaskNet


class UNet(MultitaskNet):
    """One head `name` of `outputs` channels: logits (B, outputs, H, W)."""

    def __init__(self, name: str, outputs: int, width: int = 64):
        super().__init__(UNetBackbone(width), None, {name: PixelHead(width, outputs)})


def convolve_twice(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions as in the paper, but padded, and with GroupNorm: batches here are small."""
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), group_norm(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNetBackbone(nn.Module):
    """Down four times, doubling the channels, and up again with skips: {"backbone.1": (B, width, H, W)}."""

    def __init__(self, width: int):
        super().__init__()
        widths = [width * 2**level for level in range(5)]
        self.down = nn.ModuleList(convolve_twice(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[-2::-1])
        self.up = nn.ModuleList(convolve_twice(2 * w, w) for w in widths[-2::-1])

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> Features:
        """RGB in 0..1."""
        features = pad_to_multiple(2 * image - 1, 16)
        skips = []
        for level, convolutions in enumerate(self.down):
            if level > 0:
                features = nn.functional.max_pool2d(features, 2)
            features = convolutions(features)
            skips.append(features)
        for enlarge, convolutions, skip in zip(self.enlarge, self.up, skips[-2::-1], strict=True):
            features = convolutions(torch.cat([skip, enlarge(features)], dim=1))
        return {"backbone.1": features[..., : image.shape[-2], : image.shape[-1]]}


class PixelHead(nn.Module):
    """A 1x1 convolution at full size."""

    reads = ("backbone.1",)

    def __init__(self, channels: int, outputs: int):
        super().__init__()
        self.last = nn.Conv2d(channels, outputs, 1)
        nn.init.normal_(self.last.weight, std=0.01)
        fill_bias(self.last, 0.0)

    def forward(self, features: Features, size: tuple[int, int]) -> Float[Tensor, "B outputs H W"]:
        return apply_in_float32(self.last, features["backbone.1"])
