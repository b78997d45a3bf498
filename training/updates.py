"""From the gradients of cycles to new weights: two ways behind one interface.

A cycle is a list of micro-batches. `CycleUpdate` makes one step of one optimizer for all parameters after each.
`AsyncUpdate` gives the shared part and every head an optimizer of its own, which steps when it has seen enough samples.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from training.balancing import Balancer, NonFiniteError, Normaliser
from training.cycle import Cycle, CycleBackward, GradientRows, Reading, count_labels, find_task, name_soft

SHARED = "encoder"  # in the config, the group of all that no head owns
Measures = dict[str, int | float]


@dataclass(frozen=True)
class SoftCounts:
    """Of what teachers say in a cycle: the counts on all ranks, of tasks that have such rows, and what a task's loss on
    them weighs beside that on true labels."""

    counts: Mapping[str, int | float]
    weight: float


class Update(ABC):
    """Changes the weights of `net`: `step` once for each cycle.

    net: with `shared_parameters()`, `head_parameters(name)`, `encoder` and `heads`.
    options: the `train` block of a config.
    balance, normaliser: what the tasks weigh, and what their losses are divided by.
    """

    def __init__(self, net: Any, options: Any, backward: CycleBackward, balance: Balancer, normaliser: Normaliser):
        self.net, self.options, self.backward = net, options, backward
        self.balance, self.normaliser = balance, normaliser

    @abstractmethod
    def step(
        self,
        number: int,
        cycle: Cycle,
        counts: Mapping[str, int | float],
        measure: bool = False,
        soft: "SoftCounts | None" = None,
    ) -> tuple[dict[str, float], Measures]:
        """Learn from cycle `number` (from 0), of whose labels these are the counts on all ranks, of tasks that have
        labelled rows; `soft`: of what teachers say. Returns its losses, and what else is worth a line in the log;
        `measure`: more of it.

        NonFiniteError, naming the frames, before any weight is changed.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on as if nothing had happened, as tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; the weights themselves are the network's business."""


class CycleUpdate(Update):
    """AdamW on all parameters after every cycle, with warm-up, cosine decay and clipping.

    rows: where a gradient-side method, or a cycle that is measured, keeps the tasks' gradients; see GradientRows.
    """

    def __init__(
        self,
        net: Any,
        options: Any,
        backward: CycleBackward,
        balance: Balancer,
        normaliser: Normaliser,
        rows: str = "device",
    ):
        super().__init__(net, options, backward, balance, normaliser)
        self.optimizer = build_optimizer(net, options.optimizer)
        self.store: Any = rows
        self.rows: GradientRows | None = None
        self.soft_normaliser: Normaliser | None = None  # made when the first teacher says something
        # it does nothing but for fp16
        self.device = next(net.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "fp16")

    def step(
        self,
        number: int,
        cycle: Cycle,
        counts: Mapping[str, int | float],
        measure: bool = False,
        soft: SoftCounts | None = None,
    ) -> tuple[dict[str, float], Measures]:
        factor = find_lr_factor(number, self.options.steps, self.options.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        divisors = self.normaliser.find_divisors(counts)
        weights = self.balance.find_weights(number, list(divisors))
        soft_divisors, soft_weights = self._weigh_soft(soft, weights)
        divisors, weights = divisors | soft_divisors, weights | soft_weights
        measures: Measures = {"lr_factor": factor}
        if not divisors:
            self.balance.observe({})
            return {}, {"gradient_norm": 0.0} | measures
        rows = self._find_rows(measure)
        # `scale` also makes the scaler's own state, which `unscale_` needs; the losses are scaled by their weights
        scale = float(self.scaler.scale(torch.ones((), device=self.device))) if self.scaler.is_enabled() else 1.0
        self.backward.run(cycle, divisors, {name: weight * scale for name, weight in weights.items()}, rows)
        if self.scaler.is_enabled():
            reading, norm = self._step_scaled(divisors)
        else:
            reading = self.backward.read(divisors, rows)
            shares = self._combine(number, reading, rows, measures)
            norm = math.sqrt(max(reading.square + shares.pop("square"), 0.0))
            self._clip(norm)
            self.optimizer.step()
            weights = {key: weight * shares[find_task(key)] for key, weight in weights.items()}
        if rows is not None and self.balance.gradient_method is None:
            self.rows = None  # they were measured once, and are not needed in every cycle
        # methods balance by the losses on true labels; what is learned of teachers goes where these go
        self.balance.observe({name: loss for name, loss in reading.losses.items() if name not in soft_divisors})
        measures |= {f"weight/{name}": weight for name, weight in weights.items()}
        return reading.losses, {"gradient_norm": norm} | measures

    def _weigh_soft(
        self, soft: SoftCounts | None, weights: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Divisors and weights of the losses on what teachers say; that of a task without a true label in this cycle
        has the weight that is given in the config."""
        if soft is None:
            return {}, {}
        if self.soft_normaliser is None:
            self.soft_normaliser = Normaliser(self.normaliser.tasks)
        divisors = self.soft_normaliser.find_divisors(soft.counts)
        given = self.balance.scale.weights()
        return (
            {name_soft(name): divisor for name, divisor in divisors.items()},
            {name_soft(name): soft.weight * weights.get(name, given[name]) for name in divisors},
        )

    def _find_rows(self, measure: bool) -> GradientRows | None:
        if self.balance.gradient_method is None and not measure:
            return None
        if self.rows is None:
            self.rows = GradientRows(self.net.shared_parameters(), self.store)
        return self.rows

    def _combine(
        self, number: int, reading: Reading, rows: GradientRows | None, measures: Measures
    ) -> dict[str, float]:
        """The weight of each task's gradient in the shared one, which is set; and under "square" the shared one's
        squared norm as far as it is not in the reading's. Adds what the Gramian says to the measures."""
        if rows is None or reading.gramian is None:
            return {find_task(key): 1.0 for key in reading.losses} | {"square": 0.0}
        names = list(rows.rows)
        method = self.balance.gradient_method
        shares = dict.fromkeys(names, 1.0) if method is None else method.weigh(number, names, reading.gramian)
        vector = torch.tensor([shares[name] for name in names], dtype=torch.float64)
        if rows.parameters:
            rows.combine(shares, reading.reached)
        measures |= describe_gramian(names, reading.gramian, vector)
        return shares | {"square": float(vector @ reading.gramian @ vector)}

    def _clip(self, norm: float) -> None:
        limit = self.options.optimizer.clip
        if limit is not None and norm > limit:
            gradients = [parameter.grad for parameter in self.net.parameters() if parameter.grad is not None]
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))

    def _step_scaled(self, divisors: Mapping[str, float]) -> tuple[Reading, float]:
        """A step of fp16: where gradients have overflowed the scaler leaves the weights as they are, and lowers its
        scale."""
        reading = self.backward.read(divisors, check_gradient=False)
        self.scaler.unscale_(self.optimizer)
        limit = self.options.optimizer.clip
        norm = float(nn.utils.clip_grad_norm_(self.net.parameters(), math.inf if limit is None else limit))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return reading, norm

    def state_dict(self) -> dict[str, Any]:
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        if self.soft_normaliser is not None:
            state["soft_normaliser"] = self.soft_normaliser.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "soft_normaliser" in state:
            self.soft_normaliser = Normaliser(self.normaliser.tasks)
            self.soft_normaliser.load_state_dict(state["soft_normaliser"])
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

    For one process, because what a loss is divided by depends on the samples before it.
    """

    def __init__(self, net: Any, options: Any, backward: CycleBackward, balance: Balancer, normaliser: Normaliser):
        super().__init__(net, options, backward, balance, normaliser)
        self.parameters = {SHARED: net.shared_parameters()} | {name: net.head_parameters(name) for name in net.heads}
        self.optimizers = {
            name: torch.optim.Adam(parameters, lr=options.groups[name].lr)
            for name, parameters in self.parameters.items()
        }
        self.counts = dict.fromkeys(self.parameters, 0)
        self.steps = dict.fromkeys(self.parameters, 0)

    def step(
        self,
        number: int,
        cycle: Cycle,
        counts: Mapping[str, int | float],
        measure: bool = False,
        soft: SoftCounts | None = None,
    ) -> tuple[dict[str, float], Measures]:
        assert soft is None, "the config has checked that"
        samples: dict[str, int] = dict.fromkeys(self.net.heads, 0)
        sums: dict[str, float] = dict.fromkeys(self.net.heads, 0.0)
        groups = self.options.groups
        weights = self.balance.find_weights(number, list(samples))
        for batch in cycle:
            for row in range(len(batch["image"])):
                for name, loss in self._run_sample(take_sample(batch, row), weights).items():
                    samples[name] += 1
                    sums[name] += loss
        losses = {name: sums[name] / count for name, count in samples.items() if count}
        gradients = [parameter.grad for parameter in self.net.parameters() if parameter.grad is not None]
        if not math.isfinite(float(nn.utils.get_total_norm(gradients))):
            drawn = sorted({frame for batch in cycle for frame in batch["frame"]})
            raise NonFiniteError(f"the gradient is not finite; frames of this step: {', '.join(drawn)}")
        self.balance.observe(losses)

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

    def _run_sample(self, sample: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, float]:
        names = list(sample["rows"])
        counts, _ = count_labels(names, [sample])
        divisors = self.normaliser.find_divisors(dict(zip(names, map(int, counts), strict=True)))
        if not divisors:
            return {}
        shares = {name: weights[name] / self.options.groups[name].samples for name in divisors}
        self.backward.run([sample], divisors, shares)
        return self.backward.read(divisors, check_gradient=False).losses

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
    sample: dict[str, Any] = {
        "image": batch["image"][row : row + 1], "frame": [batch["frame"][row]], "targets": {}, "rows": {}, "counts": {}
    }  # fmt: skip
    for name, rows in batch["rows"].items():
        if len(place := (rows == row).nonzero()[:, 0]):
            sample["rows"][name] = torch.zeros(1, dtype=torch.int64)
            sample["targets"][name] = tree_map(lambda leaf, place=place: leaf[place], batch["targets"][name])
            sample["counts"][name] = batch["counts"][name][place]
    if "seed" in batch:
        sample["seed"] = random.Random(f"{batch['seed']} {row}").getrandbits(63)
    return sample


def build_optimizer(net: nn.Module, options: Any) -> torch.optim.AdamW:
    """AdamW: a smaller learning rate for the encoder, no decay on norms and biases; frozen parameters are left out."""
    encoder = {id(parameter) for parameter in net.encoder.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in net.parameters():
        if parameter.requires_grad:
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
        fused=True,  # one kernel for all parameters; the others read a counter of each from the GPU
    )


def find_lr_factor(step: int, steps: int, options: Any) -> float:
    """Linear warm-up, then a cosine down to `final_factor`, which is the last step's; the step counts from 0."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    progress = min((step + 1 - options.warmup_steps) / max(1, steps - options.warmup_steps), 1)
    return options.final_factor + (1 - options.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))


def describe_gramian(names: list[str], gramian: torch.Tensor, weights: torch.Tensor) -> Measures:
    """For the log, of the tasks' gradients of the shared parameters: their norms; the cosine of each pair; and the
    share of each task, the part of the weighted sum that lies along itself, so that the shares add up to 1."""
    norms = gramian.diagonal().clamp(min=0).sqrt()
    along = weights * (gramian @ weights)
    shares = along / along.sum() if along.sum() > 0 else torch.zeros_like(along)
    described: Measures = {f"gradient/norm/{name}": float(norm) for name, norm in zip(names, norms, strict=True)}
    described |= {f"gradient/share/{name}": float(share) for name, share in zip(names, shares, strict=True)}
    for i, one in enumerate(names):
        for j, other in enumerate(names[:i]):
            if norms[i] > 0 and norms[j] > 0:
                described[f"gradient/cosine/{other},{one}"] = float(gramian[i, j] / (norms[i] * norms[j]))
    return described
