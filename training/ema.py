"""EMA: an exponential moving average of a network's weights, which is what is validated and kept."""

import copy
import math

import torch
from torch import Tensor, nn


class EmaWeights:
    """The EMA of a network's weights; the decay rises over the first `ramp` steps, so that early weights fade soon.

    `net` is a network of its own in evaluation mode. Buffers are copied, not averaged.
    """

    def __init__(self, net: nn.Module, decay: float, ramp: int):
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.decay, self.ramp = decay, ramp

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Move towards the weights of `net` after its step number `step`, counted from 1."""
        decay = self.decay * (1 - math.exp(-step / self.ramp)) if self.ramp else self.decay
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1 - decay)
        for buffer, current in zip(self.net.buffers(), net.buffers(), strict=True):
            buffer.copy_(current)

    def state_dict(self) -> dict[str, Tensor]:
        return self.net.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.net.load_state_dict(state)
