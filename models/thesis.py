"""The network of the thesis (Asymmetric Deep Multitask Learning, ali-609/Asymmetric-Deep-Multitask-Learning).

ResNet-50, a small BiFPN, and four heads of different shape.

Its layers, sizes and activations are the thesis's. Fixed is what kept it from working: the fusion weights were
uninitialised memory, so some levels had no signal; here they start equal, stay non-negative, and layers without a norm
start so that signals keep their size. The depth's ReLU has a rounded corner, so that no pixel is without gradient.

Example: `ThesisNet(Encoder(), {"boxes": ("box_grid", {"classes": 14, "slots": 10})}, (1024, 1024))`.
"""

import math
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from models.encoders import Encoder
from models.heads import count_cells
from models.layers import Features, apply_in_float32, enlarge, fill_bias, stride_of
from models.multitask import MultitaskNet

WIDTH = 256  # channels of every level of the neck
CELL = 128  # pixels, the side of a cell of the box grid
METRES = 123.0  # what the depth head's last layer counts in: the range of the thesis's 8-bit labels


class ThesisNet(MultitaskNet):
    """The encoder, the thesis's neck, and one of its heads for each output asked for.

    encoder: with features at strides 4 to 32; the thesis's is a pretrained ResNet-50.
    heads: name -> (output_format of its output, arguments of the head); the output formats are the keys of HEADS.
    size: (H, W) of the images, any, but it is fixed: the head for numbers has weights for every cell.
    """

    def __init__(self, encoder: Encoder, heads: dict[str, tuple[str, dict]], size: tuple[int, int]):
        if foreign := {output_format for output_format, _ in heads.values()} - HEADS.keys():
            raise ValueError(f"the thesis's network has no head for {', '.join(foreign)}, only {', '.join(HEADS)}")
        built: dict[str, nn.Module] = {
            name: HEADS[output_format](WIDTH, size, **arguments) for name, (output_format, arguments) in heads.items()
        }
        super().__init__(encoder, ThesisNeck(encoder.channels), built)


def keep_size(layer: Any) -> Any:
    """Weights that keep the size of a signal through this layer and a leaky ReLU (arXiv 1502.01852)."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="leaky_relu")
    nn.init.zeros_(layer.bias)
    return layer


class ThesisNeck(nn.Module):
    """Each level to WIDTH channels, then two BiFPN blocks; {"neck.4": ..., "neck.32": ...}.

    channels: {"encoder.4": channels, ...}, each stride twice the one before.
    """

    def __init__(self, channels: dict[str, int]):
        super().__init__()
        self.reads = tuple(sorted(channels, key=stride_of))
        self.channels = {f"neck.{stride_of(name)}": WIDTH for name in self.reads}
        self.laterals = nn.ModuleList(keep_size(nn.Conv2d(channels[name], WIDTH, 1)) for name in self.reads)
        self.blocks = nn.ModuleList(Block(len(self.reads)) for _ in range(2))

    def forward(self, features: Features) -> Features:
        levels = [lateral(features[name]) for lateral, name in zip(self.laterals, self.reads, strict=True)]
        for block in self.blocks:
            levels = block(levels)
        return dict(zip(self.channels, levels, strict=True))


class Block(nn.Module):
    """Once down (coarse to fine), once up (fine to coarse), over levels from fine to coarse."""

    def __init__(self, levels: int):
        super().__init__()
        self.down = nn.ModuleList(Fusion(2) for _ in range(levels - 1))
        # The coarsest level has no node on the way down: it fuses its input and the level below only.
        self.up = nn.ModuleList(Fusion(3 if level < levels - 1 else 2) for level in range(1, levels))

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        middle = [levels[-1]]
        for level, fuse in zip(levels[-2::-1], self.down, strict=True):
            middle.insert(0, fuse(level, enlarge(middle[0], 2, level.shape[-2:], mode="nearest")))
        result = [middle[0]]
        for level, between, fuse in zip(levels[1:-1], middle[1:-1], self.up, strict=False):
            result.append(fuse(level, between, halve(result[-1])))
        return [*result, self.up[-1](levels[-1], halve(result[-1]))]


class Fusion(nn.Module):
    """Weighted mean of maps of one size ("fast normalised fusion", arXiv 1911.09070), 1x1 convolution, leaky ReLU."""

    def __init__(self, inputs: int):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(inputs))
        self.convolution = keep_size(nn.Conv2d(WIDTH, WIDTH, 1))

    def forward(self, *inputs: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        weights = F.relu(self.weights)
        weights = weights / (weights.sum() + 1e-4)
        return F.leaky_relu(
            self.convolution(sum(weight * features for weight, features in zip(weights, inputs, strict=True)))
        )


def halve(features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
    """Half the size, rounded up, by nearest neighbour."""
    return features[..., ::2, ::2]


def double(inputs: int, outputs: int) -> nn.Sequential:
    """Transposed convolution to twice the size, leaky ReLU."""
    return nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1), nn.LeakyReLU())


class ThesisHead(nn.Module):
    """Reads one feature of `inputs` channels, in images of `size` = (H, W); outputs are float32, under autocast too."""

    reads: ClassVar[tuple[str, ...]]


class PixelHead(ThesisHead):
    """A dense map of `outputs` channels at the size of the image."""

    reads = ("neck.8",)

    def __init__(self, inputs: int, size: tuple[int, int] | None, outputs: int):
        super().__init__()
        self.layers = nn.Sequential(double(inputs, 256), double(256, 128), double(128, 64))
        self.last = nn.Conv2d(64, outputs, 3, padding=1)

    def forward(self, features: Features, size: tuple[int, int]) -> Float[Tensor, "B outputs H W"]:
        return apply_in_float32(self.last, self.layers(features["neck.8"])[..., : size[0], : size[1]])


class LogDepthHead(ThesisHead):
    """Natural logarithm of the depth in metres, at the size of the image.

    initial: the depth in metres near which the untrained head predicts everywhere.
    """

    reads = ("neck.4",)

    def __init__(self, inputs: int, size: tuple[int, int] | None, initial: float = 10.0):
        super().__init__()
        self.layers = nn.Sequential(
            double(inputs, 256), double(256, 128), nn.Conv2d(128, 64, 3, padding=1), nn.LeakyReLU()
        )
        self.last = nn.Conv2d(64, 1, 3, padding=1)
        nn.init.normal_(self.last.weight, std=1e-3)
        fill_bias(self.last, initial / METRES)

    def forward(self, features: Features, size: tuple[int, int]) -> Float[Tensor, "B H W"]:
        layers = self.layers(features["neck.4"])[..., : size[0], : size[1]]
        return log_softplus(METRES * apply_in_float32(self.last, layers).squeeze(1))


def log_softplus(metres: Float[Tensor, "B H W"]) -> Float[Tensor, "B H W"]:
    """log(log(1 + e^x)): the logarithm of a ReLU whose corner is rounded over the last metre, so it exists below 0 too.

    From 10 up it is log(x) to 5 parts in a million; far below 0 it is x itself, with the gradient 1.
    """
    # softplus(x) is e^x there, to one part in ten million; the clamp keeps the unused branch finite
    return torch.where(metres < -15, metres, F.softplus(metres.clamp(min=-15)).log())


class BoxGridOutput(NamedTuple):
    """The output of the box grid: for each cell of CELL x CELL pixels a number of slots, each of which is a box."""

    values: Float[Tensor, "B rows columns slots numbers"]
    """Logits of a slot: confidence; x and y of the box's middle, from the left and upper to the right and lower edge of
    the cell; its width and height, as shares of the image; one number for each class."""
    size: tuple[int, int]
    """(H, W) of the image."""


class BoxGridHead(ThesisHead):
    """`slots` boxes for each cell, a BoxGridOutput; an image has ceil(H / CELL) x ceil(W / CELL) cells."""

    reads = ("neck.16",)

    def __init__(self, inputs: int, size: tuple[int, int] | None, classes: int, slots: int):
        super().__init__()
        self.slots = slots
        layers = []
        for channels in (inputs, 512, 512):
            layers += [nn.Conv2d(channels, 512, 3, stride=2, padding=1), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Conv2d(512, slots * (5 + classes), 3, padding=1)

    def forward(self, features: Features, size: tuple[int, int]) -> BoxGridOutput:
        cells = apply_in_float32(self.last, self.layers(features["neck.16"]))
        assert cells.shape[-2:] == count_cells(size, CELL), (cells.shape, size)
        return BoxGridOutput(cells.permute(0, 2, 3, 1).unflatten(3, (self.slots, -1)), size)


class NumbersHead(ThesisHead):
    """`outputs` numbers for the whole image, (B, outputs), from every cell of the coarsest level."""

    reads = ("neck.32",)

    def __init__(self, inputs: int, size: tuple[int, int], outputs: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for units, following in [(inputs * math.prod(count_cells(size, 32)), 100), (100, 50), (50, 10)]:
            layers += [nn.Linear(units, following), nn.LeakyReLU()]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(10, outputs)

    def forward(self, features: Features, size: tuple[int, int]) -> Float[Tensor, "B outputs"]:
        return apply_in_float32(self.last, self.layers(features["neck.32"]))


HEADS: dict[str, type[ThesisHead]] = {
    "map": PixelHead,
    "log_depth": LogDepthHead,
    "box_grid": BoxGridHead,
    "numbers": NumbersHead,
}
