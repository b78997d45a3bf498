"""The small layers and resizing rules that all networks here share."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Features = dict[str, Float[Tensor, "B _ _ _"]]
"""Feature maps by name. A name ends in the stride of the map: "encoder.8" of an (H, W) image has ceil(H/8) rows and
ceil(W/8) columns, and cell (i, j) covers the pixels from 8 i to 8 (i + 1) and from 8 j to 8 (j + 1)."""


def stride_of(name: str) -> int:
    """The stride that a feature's name ends in: 8 for "neck.8"."""
    return int(name.rsplit(".", 1)[1])


class GroupNorm(nn.GroupNorm):
    """GroupNorm that keeps the dtype of its input under autocast, which would cast it to float32 and so double what is
    kept for the backward pass. The kernel adds up in float32 and rounds mean and spread to the input's dtype."""

    def forward(self, features: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(features.device.type):
            return super().forward(features)
        with torch.autocast(features.device.type, enabled=False):
            weight, bias = self.weight.to(features.dtype), self.bias.to(features.dtype)
            return F.group_norm(features, self.num_groups, weight, bias, self.eps)


def group_norm(channels: int) -> GroupNorm:
    """GroupNorm (arXiv 1803.08494) with up to 32 groups of at least 4 channels.

    Fewer than 4 would erase a map of one cell: the coarsest level of a small image has no other values to compare with.
    """
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if g == 1 or (channels % g == 0 and channels // g >= 4))
    return GroupNorm(groups, channels)


def convolve(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution that keeps the size (but for its stride), GroupNorm, SiLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, group_norm(outputs), nn.SiLU())


def fill_bias(layer: Any, value: float) -> None:
    """Set every element of a layer's bias."""
    nn.init.constant_(layer.bias, value)


def zero_layer(layer: Any) -> None:
    """Set weights and bias of a layer to zero, so that a residual branch that ends in it starts as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def enlarge(
    features: Float[Tensor, "B C h w"], factor: int, size: Sequence[int], mode: str = "bilinear"
) -> Float[Tensor, "B C H W"]:
    """Resize by a whole factor, then cut to `size` = (H, W).

    An odd size has a last cell that reaches over the edge, so stretching to `size` itself would shift what all other
    cells show; cutting keeps every cell over its own pixels, at any size.
    """
    if factor > 1:
        corners = None if mode == "nearest" else False
        features = F.interpolate(features, scale_factor=factor, mode=mode, align_corners=corners)
    return features[..., : size[0], : size[1]]


def pad_to_multiple(image: Float[Tensor, "B C H W"], multiple: int) -> Float[Tensor, "B C h w"]:
    """Zeros at the right and the bottom, so that both sides are multiples of `multiple`."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple))


def apply_in_float32(layer: nn.Module, features: Tensor) -> Tensor:
    """`layer` outside autocast, in float32 (float64 stays).

    For last layers: bfloat16 has 8 significant bits, which is a step of 1.6 % in metres at a log-depth of 2.3.
    """
    with torch.autocast(features.device.type, enabled=False):
        return layer(features.to(torch.promote_types(features.dtype, torch.float32)))
