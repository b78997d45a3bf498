"""Losses of several tasks -> the gradients of one update.

Each task's loss is divided by one number for the whole cycle, so micro-batches of any make-up combine exactly. One
head's graph is alive at a time: its gradient with respect to the shared features is kept, and the features' own graph
is walked once a micro-batch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number; the update was not made."""


class LossWeights:
    """`weights()` for the coming cycle, `observe(losses)` after it.

    normalise: "none", or "init": each loss is divided by its mean over the first `window` cycles that had it; until
    these are over by the mean so far.
    """

    def __init__(self, names: Sequence[str], fixed: Mapping[str, float], normalise: str = "none", window: int = 100):
        self.fixed = {name: fixed.get(name, 1.0) for name in names}
        self.normalise, self.window = normalise, window
        self.sums, self.seen = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)

    def weights(self) -> dict[str, float]:
        if self.normalise == "none":
            return dict(self.fixed)
        return {
            name: weight / max(self.sums[name] / self.seen[name], 1e-6) if self.seen[name] else weight
            for name, weight in self.fixed.items()
        }

    def observe(self, losses: Mapping[str, float]) -> None:
        for name, loss in losses.items():
            if self.seen[name] < self.window:
                self.sums[name] += loss
                self.seen[name] += 1

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "seen": dict(self.seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums, self.seen = dict(state["sums"]), dict(state["seen"])


class Normaliser:
    """What the loss of each task is divided by in a cycle, from the counts of its labels.

    This is the count of the cycle itself, but for tasks whose empty labels have a loss (`learns_from_empty`). With
    their own count, 0 or few, such cycles would have a gradient of many times the usual one, so they are divided by the
    mean count of the last `window` cycles that had any. It is at least 1, and no number of empty cycles lowers it.
    """

    def __init__(self, tasks: Mapping[str, Any], window: int = 1000):
        self.tasks, self.window = tasks, window
        self.means, self.seen = dict.fromkeys(tasks, 0.0), dict.fromkeys(tasks, 0)

    def find_divisors(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Name -> divisor of the cycle with these counts. Tasks that have nothing to learn from in it are left out:
        those with count 0, and of those that learn from empty labels the ones that have not met a count yet."""
        divisors = {}
        for name, count in counts.items():
            if count:
                self.seen[name] += 1
                self.means[name] += (count - self.means[name]) / min(self.seen[name], self.window)
            divisors[name] = self.means[name] if getattr(self.tasks[name], "learns_from_empty", False) else float(count)
        return {name: divisor for name, divisor in divisors.items() if divisor}

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self.means), "seen": dict(self.seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.means, self.seen = dict(state["means"]), dict(state["seen"])


def move(batch: Any, device: torch.device) -> Any:
    """All tensors of a batch on the device."""
    return tree_map(lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, batch)


def take_rows(target: Any, rows: Tensor) -> Any:
    """Rows of a collated target, whatever its structure."""
    return tree_map(lambda leaf: leaf[rows.to(leaf.device)], target)


def find_rows(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name -> the rows of the batch that have its label; names without any are left out."""
    rows = {name: labelled.nonzero()[:, 0] for name, labelled in batch["labelled"].items()}
    return {name: found for name, found in rows.items() if len(found)}


def backward_cycle(
    net: torch.nn.Module,
    cycle: Sequence[Mapping[str, Any]],
    tasks: Mapping[str, Any],
    weights: Mapping[str, float],
    device: torch.device,
    autocast: Callable,
    memory_format: torch.memory_format = torch.contiguous_format,
    normaliser: Normaliser | None = None,
) -> dict[str, float]:
    """Add the gradients of one cycle to the network's parameters; return each task's loss, divided as `normaliser` says
    (by default by its count).

    Tasks that have no labelled row in the cycle, or only such that say nothing (as a class map that is all ignored),
    are left out, and their heads' gradients stay None. NonFiniteError, naming the task and the frames, before anything
    is updated. A micro-batch with a `seed` seeds what its layers draw, as DropPath does.
    """
    rows = [find_rows(batch) for batch in cycle]
    counts: dict[str, int] = {}
    for batch, found in zip(cycle, rows, strict=True):
        for name, indices in found.items():
            counts[name] = counts.get(name, 0) + tasks[name].count(take_rows(batch["targets"][name], indices))
    divisors = (normaliser or Normaliser(tasks)).find_divisors(counts)
    rows = [{name: indices for name, indices in found.items() if name in divisors} for found in rows]

    losses: dict[str, list[Tensor]] = {}
    origins: dict[str, list[list[str]]] = {}
    for batch, found in zip(cycle, rows, strict=True):
        if not found:
            continue
        if "seed" in batch:
            torch.manual_seed(batch["seed"])
        image = batch["image"].to(device, non_blocking=True).to(memory_format=memory_format)
        size = tuple(image.shape[-2:])
        with autocast():
            features = net.shared_features(image, found)
        leaves = {key: value.detach().requires_grad_() for key, value in features.items()}
        for name, indices in found.items():
            target = move(take_rows(batch["targets"][name], indices), device)
            with autocast():
                everyone = len(indices) == len(image)
                output = net.run_head(name, leaves, size, None if everyone else indices.to(device))
            loss = tasks[name].loss(output, target) / divisors[name]
            losses.setdefault(name, []).append(loss.detach())
            origins.setdefault(name, []).append([batch["frame"][index] for index in indices.tolist()])
            (loss * weights[name]).backward()
        # features of a frozen encoder need no gradient
        reached = [key for key, leaf in leaves.items() if leaf.grad is not None and features[key].requires_grad]
        if reached:
            torch.autograd.backward([features[key] for key in reached], [leaves[key].grad for key in reached])

    values = {name: torch.stack(parts).tolist() for name, parts in losses.items()}
    for name, parts in values.items():
        bad = sorted(
            {
                frame
                for part, frames in zip(parts, origins[name], strict=True)
                if not math.isfinite(part)
                for frame in frames
            }
        )
        if bad:
            raise NonFiniteError(f"the loss of {name} is not finite on a micro-batch of {', '.join(bad)}")
    return {name: sum(parts) for name, parts in values.items()}
