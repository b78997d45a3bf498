"""The specialist for a number: PilotNet (arXiv 1604.07316), a quarter of a million parameters on a strip of road.

Example: `PilotNet("angle")(torch.rand(1, 3, 640, 1024))["angle"]` has the shape (1, 1).
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Features, apply_in_float32
from models.multitask import MultitaskNet

STRIP = (66, 200)


class PilotNet(MultitaskNet):
    """One head `name` of `outputs` numbers, (B, outputs). The untrained network predicts 0."""

    def __init__(self, name: str, outputs: int = 1):
        super().__init__(PilotNetBackbone(), None, {name: NumberHead(outputs)})


def cut_strip(image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 h w"]:
    """The lowest part of the image that has the strip's proportions, in the middle of its width, as 66 x 200 pixels.

    In a front camera's picture of 1.6:1 this is the road: the lower half, from a little below the horizon.
    """
    height, width = image.shape[-2:]
    rows = min(height, max(1, round(width * STRIP[0] / STRIP[1])))
    columns = min(width, max(1, round(rows * STRIP[1] / STRIP[0])))
    left = (width - columns) // 2
    strip = image[..., height - rows :, left : left + columns]
    return F.interpolate(strip, STRIP, mode="bilinear", antialias=True)


class PilotNetBackbone(nn.Module):
    """Five convolutions without padding: {"backbone.8": (B, 64, 1, 18)} of any image."""

    def __init__(self):
        super().__init__()
        layers = []
        for inputs, outputs, kernel, stride in [
            (3, 24, 5, 2),
            (24, 36, 5, 2),
            (36, 48, 5, 2),
            (48, 64, 3, 1),
            (64, 64, 3, 1),
        ]:
            layers += [nn.Conv2d(inputs, outputs, kernel, stride), nn.ELU()]
        self.convolutions = nn.Sequential(*layers)

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> Features:
        """RGB in 0..1."""
        return {"backbone.8": self.convolutions(2 * cut_strip(image) - 1)}


class NumberHead(nn.Module):
    """Three hidden layers on the flattened map."""

    reads = ("backbone.8",)

    def __init__(self, outputs: int):
        super().__init__()
        layers = []
        for inputs, units in [(64 * 18, 100), (100, 50), (50, 10)]:
            layers += [nn.Linear(inputs, units), nn.ELU()]
        self.hidden = nn.Sequential(nn.Flatten(), *layers)
        self.last = nn.Linear(10, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, features: Features, size: tuple[int, int]) -> Float[Tensor, "B outputs"]:
        return apply_in_float32(self.last, self.hidden(features["backbone.8"]))
