"""From the gradients of cycles to new weights: two ways behind one interface.

A cycle is a list of micro-batches. `CycleUpdate` makes one step of one optimizer for all parameters after each.
`AsyncUpdate` gives the shared part and every head an optimizer of its own, which steps when it has seen enough samples.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from training.balancing import NonFiniteError

Cycle = Sequence[Mapping[str, Any]]
Backward = Callable[..., dict[str, float]]
"""`backward(cycle, weights={name: weight})` adds the gradients of a cycle's weighted losses to those the parameters
have, and returns the losses."""

SHARED = "encoder"  # in the config, the group of all that no head owns


class Update(ABC):
    """Changes the weights of `net`: `step` once for each cycle.

    net: with `shared_parameters()`, `head_parameters(name)`, `encoder` and `heads`.
    options: the `train` block of a config.
    """

    def __init__(self, net: Any, options: Any, backward: Backward):
        self.net, self.options, self.backward = net, options, backward

    @abstractmethod
    def step(
        self, number: int, cycle: Cycle, weights: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, int | float]]:
        """Learn from cycle `number` (from 0). Returns its losses, and what else is worth a line in the log.

        NonFiniteError, naming the frames, before any weight is changed.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on as if nothing had happened, as tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; the weights themselves are the network's business."""


class CycleUpdate(Update):
    """AdamW on all parameters after every cycle, with warm-up, cosine decay and clipping."""

    def __init__(self, net: nn.Module, options: Any, backward: Backward):
        super().__init__(net, options, backward)
        self.optimizer = build_optimizer(net, options.optimizer)
        # it does nothing but for fp16
        self.device = next(net.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "fp16")

    def step(
        self, number: int, cycle: Cycle, weights: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, int | float]]:
        factor = find_lr_factor(number, self.options.steps, self.options.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        # `scale` also makes the scaler's own state, which `unscale_` needs; the losses are scaled by their weights
        scale = float(self.scaler.scale(torch.ones((), device=self.device)))
        losses = self.backward(cycle, weights={name: weight * scale for name, weight in weights.items()})
        if not losses:
            return losses, {"gradient_norm": 0.0, "lr_factor": factor}
        self.scaler.unscale_(self.optimizer)
        limit = self.options.optimizer.clip
        norm = float(nn.utils.clip_grad_norm_(self.net.parameters(), math.inf if limit is None else limit))
        if not self.scaler.is_enabled():
            check_norm(norm, cycle)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return losses, {"gradient_norm": norm, "lr_factor": factor}

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


class AsyncUpdate(Update):
    """An Adam for each group, at a constant rate: SHARED, which is encoder and neck, and every head by its name.

    A group's gradients add up over cycles. It steps after the cycle in which its count of samples, the labelled rows
    that gave it gradients, reaches its `samples`; then its gradients are cleared and it counts from 0. A head waits for
    its own samples, the shared part counts those of all tasks.

    Every sample is a cycle of its own. Its loss is multiplied by its weight and divided by the `samples` of
    its task's head. So a head follows the mean over its samples, and in the shared part a sample of task t weighs
    weight_t / samples_t, however many samples that collects.
    """

    def __init__(self, net: nn.Module, options: Any, backward: Backward):
        super().__init__(net, options, backward)
        self.parameters = {SHARED: net.shared_parameters()} | {name: net.head_parameters(name) for name in net.heads}
        self.optimizers = {
            name: torch.optim.Adam(parameters, lr=options.groups[name].lr)
            for name, parameters in self.parameters.items()
        }
        self.counts = dict.fromkeys(self.parameters, 0)
        self.steps = dict.fromkeys(self.parameters, 0)

    def step(
        self, number: int, cycle: Cycle, weights: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, int | float]]:
        samples: dict[str, int] = dict.fromkeys(self.net.heads, 0)
        sums: dict[str, float] = dict.fromkeys(self.net.heads, 0.0)
        groups = self.options.groups
        shares = {name: weights[name] / groups[name].samples for name in samples}
        for batch in cycle:
            for row in range(len(batch["image"])):
                for name, loss in self.backward([take_sample(batch, row)], weights=shares).items():
                    samples[name] += 1
                    sums[name] += loss
        losses = {name: sums[name] / count for name, count in samples.items() if count}
        gradients = [parameter.grad for parameter in self.net.parameters() if parameter.grad is not None]
        check_norm(float(nn.utils.get_total_norm(gradients)), cycle)

        for name, count in samples.items():
            self.counts[name] += count
            if not getattr(self.net.heads[name], "stop_gradient", False):
                self.counts[SHARED] += count
        for name, optimizer in self.optimizers.items():
            if self.counts[name] >= groups[name].samples:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                self.counts[name] = 0
                self.steps[name] += 1
        return losses, {f"steps/{name}": steps for name, steps in self.steps.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "counts": dict(self.counts),
            "steps": dict(self.steps),
            "gradients": {name: [each.grad for each in parameters] for name, parameters in self.parameters.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts, self.steps = dict(state["counts"]), dict(state["steps"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
            for parameter, gradient in zip(self.parameters[name], state["gradients"][name], strict=True):
                parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)


UPDATES: dict[str, type[Update]] = {"cycle": CycleUpdate, "async": AsyncUpdate}


def take_sample(batch: Mapping[str, Any], row: int) -> dict[str, Any]:
    """One row of a batch as a batch, with a seed of its own."""
    rest = {key: value for key, value in batch.items() if key not in ("frame", "seed")}
    sample = tree_map(lambda leaf: leaf[row : row + 1], rest) | {"frame": [batch["frame"][row]]}
    if "seed" in batch:
        sample["seed"] = random.Random(f"{batch['seed']} {row}").getrandbits(63)
    return sample


def build_optimizer(net: nn.Module, options: Any) -> torch.optim.AdamW:
    """AdamW: a smaller learning rate for the encoder, no decay on norms and biases."""
    encoder = {id(parameter) for parameter in net.encoder.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in net.parameters():
        groups.setdefault((id(parameter) in encoder, parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "base_lr": options.lr * (options.encoder_lr_factor if in_encoder else 1),
                "weight_decay": options.weight_decay if decays else 0.0,
            }
            for (in_encoder, decays), parameters in groups.items()
        ],
        lr=options.lr,
        betas=options.betas,
    )


def find_lr_factor(step: int, steps: int, options: Any) -> float:
    """Linear warm-up, then a cosine down to `final_factor`, which is the last step's; the step counts from 0."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    progress = min((step + 1 - options.warmup_steps) / max(1, steps - options.warmup_steps), 1)
    return options.final_factor + (1 - options.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))


def check_norm(norm: float, cycle: Cycle) -> None:
    """NonFiniteError if a gradient's norm is no number."""
    if not math.isfinite(norm):
        drawn = sorted({frame for batch in cycle for frame in batch["frame"]})
        raise NonFiniteError(f"the gradient is not finite; frames of this step: {', '.join(drawn)}")
