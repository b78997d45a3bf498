"""The mean teacher (arXiv 1703.01780): the EMA weights say what the network learns where there is no true label.

It sees the same geometry as the network, the picture and its mirror image, without changes of colour, blur and holes;
what holes hide from the network is not learned, as with true labels and files of pseudo-labels.
What it is sure of enough is the tasks' business, by the rules that files of pseudo-labels have.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from training.cycle import Cycle, move


class MeanTeacher:
    """Called with a cycle, it adds what `net`, in evaluation mode, says: soft_targets, soft_rows and soft_counts of
    each micro-batch, for its `taught` rows.

    size: (width, height) of the images. autocast: opens a context of mixed precision.
    """

    def __init__(
        self, net: nn.Module, tasks: Mapping[str, Any], size: tuple[int, int], device: torch.device, autocast: Callable
    ):
        self.net, self.tasks, self.size, self.device, self.autocast = net, tasks, size, device, autocast

    def __call__(self, cycle: Cycle) -> Cycle:
        return [batch | self._ask(batch) if batch["taught"] else batch for batch in cycle]

    @torch.no_grad()
    def _ask(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        image, rows = batch["clean"].to(self.device, non_blocking=True), move(batch["taught"], self.device)
        with self.autocast():
            outputs, mirrored = self.net(image, rows), self.net(image.flip(3), rows)
        targets = {}
        for name in rows:
            said = self.tasks[name].blend([(outputs[name], False), (mirrored[name], True)], self.size)
            holes = [batch["holes"][row] for row in batch["taught"][name].tolist()]
            targets[name] = self.tasks[name].prepare_soft(said, holes)
        counts = {name: self.tasks[name].count_soft(target).cpu() for name, target in targets.items()}
        return {"soft_targets": targets, "soft_rows": dict(batch["taught"]), "soft_counts": counts}
