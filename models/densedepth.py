"""The specialist for depth: DenseNet-169 and a decoder that climbs back over skips, DenseDepth (arXiv 1812.11941).

Example: `DenseDepth("depth", Encoder("densenet169", strides=STRIDES))(torch.rand(1, 3, 64, 96))["depth"]` has the shape
(1, 64, 96).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders import Encoder
from models.layers import Features, apply_in_float32, enlarge, fill_bias, group_norm
from models.multitask import MultitaskNet

STRIDES = (2, 4, 8, 16, 32)


class DenseDepth(MultitaskNet):
    """One head `name`: natural logarithm of the depth in metres, (B, H, W).

    encoder: with features at STRIDES; the paper's is a pretrained DenseNet-169.
    initial: the depth in metres that the untrained head predicts everywhere.

    Unlike the paper's, the decoder has GroupNorm, and the skips leave the encoder after its dense blocks, where they
    have more, through a 1x1 convolution to the paper's channels. As there, the prediction is at half the size.
    """

    def __init__(self, name: str, encoder: Encoder, initial: float = 10.0):
        backbone = DenseDepthBackbone(encoder)
        super().__init__(backbone, None, {name: LogDepthHead(backbone.channels, initial)})


class DenseDepthBackbone(nn.Module):
    """Encoder and decoder: {"backbone.2": (B, C, H / 2, W / 2)}."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder
        assert list(encoder.channels) == [f"encoder.{stride}" for stride in STRIDES], encoder.channels
        *skips, deepest = encoder.channels.values()
        self.entry = nn.Conv2d(deepest, deepest, 1)
        self.skips, self.steps = nn.ModuleList(), nn.ModuleList()
        # The paper's DenseNet-169 has transitions of 256, 128 and 64 channels, and 64 in the first convolution.
        channels = deepest
        for skip, width in zip(reversed(skips), (256, 128, 64, 64), strict=True):
            self.skips.append(nn.Conv2d(skip, width, 1))
            self.steps.append(Step(channels + width, channels // 2))
            channels = channels // 2
        self.channels = channels

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> Features:
        """RGB in 0..1."""
        *skips, deepest = self.encoder(image).values()
        features = self.entry(deepest)
        for reduce, step, skip in zip(self.skips, self.steps, reversed(skips), strict=True):
            features = step(torch.cat([enlarge(features, 2, skip.shape[-2:]), reduce(skip)], dim=1))
        return {"backbone.2": features}


class Step(nn.Sequential):
    """Two 3x3 convolutions of the decoder."""

    def __init__(self, inputs: int, outputs: int):
        layers = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), group_norm(outputs), nn.LeakyReLU(0.2)]
        super().__init__(*layers)


class LogDepthHead(nn.Module):
    """A 3x3 convolution at half the size, then enlarged."""

    reads = ("backbone.2",)

    def __init__(self, channels: int, initial: float):
        super().__init__()
        self.last = nn.Conv2d(channels, 1, 3, padding=1)
        nn.init.normal_(self.last.weight, std=0.01)
        fill_bias(self.last, math.log(initial))

    def forward(self, features: Features, size: tuple[int, int]) -> Float[Tensor, "B H W"]:
        return enlarge(apply_in_float32(self.last, features["backbone.2"]), 2, size).squeeze(1)
