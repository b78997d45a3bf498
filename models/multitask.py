"""One encoder, one neck, several heads: only the heads asked for run, each on the images it is asked for.

Example: `MultitaskNet(encoder, neck, {"a": head, "b": head})(image, {"a": None, "b": torch.tensor([0, 2])})` runs "a"
on all images and "b" on two of them.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from models.layers import Features

Rows = Int64[Tensor, " n"] | slice | None
"""Which images of a batch; None is all."""


def choose_rows(features: Tensor, rows: Rows) -> Tensor:
    """Images of a batch. `index_select`, because the gradient of plain indexing is slow where it is deterministic.

    The channels stay last in memory where they were.
    """
    if rows is None:
        return features
    if isinstance(rows, slice):
        return features[rows]
    if features.is_contiguous(memory_format=torch.channels_last):
        return features.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return features.index_select(0, rows)


class MultitaskNet(nn.Module):
    """Shared features, then heads.

    encoder: called with an image in 0..1, returns named features.
    neck: called with these, returns more of them; None for none.
    heads: name -> head, see models/heads.py.

    For training with one head's graph alive at a time: call `shared_features`, detach the features and let them require
    gradients, `run_head` and backward for each head, then send the gradients of the features through
    `torch.autograd.backward`, once.
    """

    def __init__(self, encoder: nn.Module, neck: nn.Module | None, heads: dict[str, nn.Module]):
        super().__init__()
        self.encoder = encoder
        self.neck = neck
        self.heads = nn.ModuleDict(heads)

    def forward(
        self,
        image: Float[Tensor, "B 3 H W"] | UInt8[Tensor, "B 3 H W"],
        rows: dict[str, Rows] | None = None,
    ) -> dict[str, object]:
        """The output of each head named in `rows`, on its rows of the batch; without `rows`, of all heads on all."""
        rows = dict.fromkeys(self.heads) if rows is None else rows
        features = self.shared_features(image, rows)
        size = (image.shape[-2], image.shape[-1])
        return {name: self.run_head(name, features, size, rows[name]) for name in rows}

    def shared_features(
        self,
        image: Float[Tensor, "B 3 H W"] | UInt8[Tensor, "B 3 H W"],
        names: Iterable[str] | None = None,
    ) -> Features:
        """All that the heads `names` (None: all heads) may read; the neck runs only if one of them reads it.

        image: RGB, float in 0..1 or uint8.
        """
        if image.dtype == torch.uint8:
            image = image.to(next(self.parameters()).dtype) / 255
        features = self.encoder(image)
        names = self.heads if names is None else names
        wanted = {feature for name in names for feature in self.heads[name].reads}
        if self.neck is not None and not wanted <= features.keys():
            features = features | self.neck(features)
        return features

    def run_head(self, name: str, features: Features, size: tuple[int, int], rows: Rows = None) -> object:
        """The output of one head, given the features and the (H, W) of the image."""
        head = self.heads[name]
        return head({key: choose_rows(features[key], rows) for key in head.reads}, size)

    def shared_parameters(self) -> list[nn.Parameter]:
        """Of encoder and neck."""
        neck = [] if self.neck is None else list(self.neck.parameters())
        return list(self.encoder.parameters()) + neck

    def head_parameters(self, name: str) -> list[nn.Parameter]:
        """Of one head."""
        return list(self.heads[name].parameters())
