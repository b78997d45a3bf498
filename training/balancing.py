"""How the losses of several tasks become one update: what each is divided by, and what it weighs.

A loss-side method gives weights for the coming cycle from the losses seen so far. A gradient-side method gives them
after the backward passes, from the Gramian of the tasks' gradients of the shared parameters
(training/gradient_methods.py). The given weights and the normalisation come before either. Only tasks that are present
enter: what is kept of a task is not touched by cycles without it.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from training.gradient_methods import GRADIENT_METHODS, GradientMethod


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number; the update was not made."""


class LossWeights:
    """The given weight of each task, divided by a mean of its loss so that losses of any scale have a like influence.

    normalise: "none"; "init": the mean over the first `window` cycles that had the task, until these are over the mean
    so far; "running": the mean over the last `window` of them.
    """

    def __init__(self, names: Sequence[str], fixed: Mapping[str, float], normalise: str = "none", window: int = 100):
        self.fixed = {name: fixed.get(name, 1.0) for name in names}
        self.normalise, self.window = normalise, window
        self.means, self.seen = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)

    def weights(self) -> dict[str, float]:
        if self.normalise == "none":
            return dict(self.fixed)
        return {
            name: weight / max(self.means[name], 1e-6) if self.seen[name] else weight
            for name, weight in self.fixed.items()
        }

    def observe(self, losses: Mapping[str, float]) -> None:
        for name, loss in losses.items():
            if self.normalise == "running" or self.seen[name] < self.window:
                self.seen[name] += 1
                self.means[name] += (loss - self.means[name]) / min(self.seen[name], self.window)

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self.means), "seen": dict(self.seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.means, self.seen = dict(state["means"]), dict(state["seen"])


class Normaliser:
    """What the loss of each task is divided by in a cycle, from the counts of its labels.

    This is the count of the cycle itself, but for tasks whose empty labels have a loss (`learns_from_empty`). With
    their own count, 0 or few, such cycles would have a gradient of many times the usual one, so they are divided by the
    mean count of the last `window` cycles that had any. It is at least 1, and no number of empty cycles lowers it.
    """

    def __init__(self, tasks: Mapping[str, Any], window: int = 1000):
        self.tasks, self.window = tasks, window
        self.means, self.seen = dict.fromkeys(tasks, 0.0), dict.fromkeys(tasks, 0)

    def find_divisors(self, counts: Mapping[str, int | float]) -> dict[str, float]:
        """Name -> divisor of the cycle with these counts, of the names that have a labelled row.

        Tasks that have nothing to learn from in it are left out: those with count 0, and of those that learn from empty
        labels the ones that have not met a count yet.
        """
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


class LossMethod(ABC):
    """Weights of a cycle from what the losses have been; without state unless it says so.

    options: those of `balancing.options`, complete. Losses come multiplied by the given weights and normalised.
    """

    def __init__(self, names: Sequence[str], options: Mapping[str, int | float]):
        self.names, self.options = tuple(names), dict(options)

    @abstractmethod
    def weigh(self, step: int, present: Sequence[str]) -> dict[str, float]:
        """The weight of each present task in cycle `step`, all > 0."""

    def observe(self, losses: Mapping[str, float]) -> None:  # noqa: B027 - most have nothing to learn
        """Learn the losses of the tasks that were present."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from there."""


class Sum(LossMethod):
    """Every task weighs 1."""

    def weigh(self, step: int, present: Sequence[str]) -> dict[str, float]:
        return dict.fromkeys(present, 1.0)


class Uncertainty(LossMethod):
    """Kendall et al., arXiv 1705.07115: loss * exp(-s) + s / 2 with a learned log-variance s for each task.

    The log-variances have an Adam of their own with the rate `lr`, which steps for present tasks only: the term s
    would otherwise make an absent task's log-variance fall for ever.
    """

    def __init__(self, names: Sequence[str], options: Mapping[str, int | float]):
        super().__init__(names, options)
        self.log_variances = {name: torch.zeros((), dtype=torch.float64, requires_grad=True) for name in names}
        self.optimizer = torch.optim.Adam(list(self.log_variances.values()), lr=options["lr"])

    def weigh(self, step: int, present: Sequence[str]) -> dict[str, float]:
        return {name: math.exp(-self.log_variances[name].item()) for name in present}

    def observe(self, losses: Mapping[str, float]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for name, loss in losses.items():
            (loss * (-self.log_variances[name]).exp() + self.log_variances[name] / 2).backward()
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        values = {name: value.item() for name, value in self.log_variances.items()}
        return {"log_variances": values, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, value in state["log_variances"].items():
                self.log_variances[name].fill_(value)
        self.optimizer.load_state_dict(state["optimizer"])


class DynamicAverage(LossMethod):
    """Dynamic weight average (Liu et al., arXiv 1803.10704): more weight to tasks whose loss falls more slowly.

    The mean loss of the last `window` cycles that had the task is divided by that of the `window` before; weights are
    T * softmax(quotient / temperature) over the T present tasks. The paper's window is an epoch; here a task has a
    window of its own, because tasks have epochs of different length. Until two are full the quotient is 1.
    """

    def __init__(self, names: Sequence[str], options: Mapping[str, int | float]):
        super().__init__(names, options)
        self.sums, self.seen = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
        self.means: dict[str, list[float]] = {name: [] for name in names}

    def weigh(self, step: int, present: Sequence[str]) -> dict[str, float]:
        quotients = {
            name: self.means[name][1] / max(self.means[name][0], 1e-12) if len(self.means[name]) == 2 else 1.0
            for name in present
        }
        return soften({name: value / self.options["temperature"] for name, value in quotients.items()})

    def observe(self, losses: Mapping[str, float]) -> None:
        for name, loss in losses.items():
            self.sums[name] += loss
            self.seen[name] += 1
            if self.seen[name] >= self.options["window"]:
                self.means[name] = [*self.means[name][-1:], self.sums[name] / self.seen[name]]
                self.sums[name], self.seen[name] = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        means = {name: list(values) for name, values in self.means.items()}
        return {"sums": dict(self.sums), "seen": dict(self.seen), "means": means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums, self.seen = dict(state["sums"]), dict(state["seen"])
        self.means = {name: list(values) for name, values in state["means"].items()}


class LastLosses(LossMethod):
    """Base of methods that divide by a task's loss: its exponential mean (decay 0.9) over the cycles that had it.

    The papers divide by the loss of the very batch. That would need all losses before the first backward pass, so all
    graphs at once.
    """

    def __init__(self, names: Sequence[str], options: Mapping[str, int | float]):
        super().__init__(names, options)
        self.means: dict[str, float] = {}

    def divide(self, present: Sequence[str]) -> dict[str, float]:
        """Name -> 1 / mean loss; for a task that has not been seen, 1."""
        return {name: 1 / max(self.means.get(name, 1.0), 1e-8) for name in present}

    def observe(self, losses: Mapping[str, float]) -> None:
        for name, loss in losses.items():
            self.means[name] = 0.9 * self.means.get(name, loss) + 0.1 * loss

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self.means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.means = dict(state["means"])


class Geometric(LastLosses):
    """The geometric mean of the losses (arXiv 1904.08492), whose gradient is that of their logarithms times the mean:
    the weight of a task is (geometric mean over the present tasks) / (its loss).

    The paper divides by the number of tasks as well.
    """

    def weigh(self, step: int, present: Sequence[str]) -> dict[str, float]:
        inverse = self.divide(present)
        mean = math.exp(-sum(map(math.log, inverse.values())) / len(present)) if present else 1.0
        return {name: mean * value for name, value in inverse.items()}


class Famo(LastLosses):
    """Fast adaptive multitask optimization (Liu et al., arXiv 2306.03792).

    The update goes along sum_t z_t * grad log(loss_t), z = softmax of a logit for each task, scaled so that the weights
    z_t / loss_t have the mean 1 / T times T: a task alone has the weight 1. The logits follow by an Adam (rate `lr`,
    decay `decay`) what the logarithms of the losses have lost: a task that has fallen little gains.

    The authors measure the loss before and after a step on the same batch, by a second forward pass; here it is the
    loss of the next cycle that has the task, which is noisier and costs nothing.
    """

    def __init__(self, names: Sequence[str], options: Mapping[str, int | float]):
        super().__init__(names, options)
        self.logits = {name: torch.zeros((), dtype=torch.float64, requires_grad=True) for name in names}
        self.optimizer = torch.optim.Adam(list(self.logits.values()), lr=options["lr"], weight_decay=options["decay"])
        self.last: dict[str, float] = {}

    def _soften(self, present: Sequence[str]) -> dict[str, Tensor]:
        shares = torch.stack([self.logits[name] for name in present]).softmax(dim=0)
        return dict(zip(present, shares.unbind(), strict=True))

    def weigh(self, step: int, present: Sequence[str]) -> dict[str, float]:
        if not present:
            return {}
        inverse = self.divide(present)
        weights = {name: share.item() * inverse[name] for name, share in self._soften(present).items()}
        scale = len(present) / sum(weights.values())
        return {name: scale * weight for name, weight in weights.items()}

    def observe(self, losses: Mapping[str, float]) -> None:
        change = {
            name: math.log(max(self.last[name], 1e-8)) - math.log(max(loss, 1e-8))
            for name, loss in losses.items()
            if name in self.last
        }
        if change:
            self.optimizer.zero_grad(set_to_none=True)
            shares = self._soften(list(change))
            torch.stack([shares[name] * value for name, value in change.items()]).sum().backward()
            self.optimizer.step()
        self.last |= losses
        super().observe(losses)

    def state_dict(self) -> dict[str, Any]:
        logits = {name: value.item() for name, value in self.logits.items()}
        own = {"logits": logits, "optimizer": self.optimizer.state_dict(), "last": dict(self.last)}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.last = dict(state["last"])
        with torch.no_grad():
            for name, value in state["logits"].items():
                self.logits[name].fill_(value)
        self.optimizer.load_state_dict(state["optimizer"])


class RandomWeights(LossMethod):
    """Random loss weighting (Lin et al., arXiv 2111.10603): T * softmax of T normal draws, new in every cycle.

    A task's draw is a function of the seed, the step and its name, so it does not depend on which others are present.
    """

    def weigh(self, step: int, present: Sequence[str]) -> dict[str, float]:
        seed = self.options["seed"]
        return soften({name: random.Random(f"weights {seed} {step} {name}").gauss(0, 1) for name in present})


class LabelFrequency(LossMethod):
    """For labels that are missing: a task weighs the inverse of the share of the last `window` cycles that had it.

    Over many cycles each task then has the influence that it would have if it were in every cycle (inverse propensity
    weighting), however rare its labels are. A weight is at most `limit`, so that the few labels of a very rare task are
    not noise of many times the usual gradient.

    It counts the labels actually seen, as PASAL (Information Fusion 120, 103038) is said to; of that paper no more than
    its title could be read, so nothing else is taken from it.
    """

    def __init__(self, names: Sequence[str], options: Mapping[str, int | float]):
        super().__init__(names, options)
        self.shares, self.cycles = dict.fromkeys(names, 1.0), 0

    def weigh(self, step: int, present: Sequence[str]) -> dict[str, float]:
        return {name: min(1 / max(self.shares[name], 1e-9), self.options["limit"]) for name in present}

    def observe(self, losses: Mapping[str, float]) -> None:
        self.cycles += 1
        rate = 1 / min(self.cycles, self.options["window"])
        for name in self.names:
            self.shares[name] += ((name in losses) - self.shares[name]) * rate

    def state_dict(self) -> dict[str, Any]:
        return {"shares": dict(self.shares), "cycles": self.cycles}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shares, self.cycles = dict(state["shares"]), state["cycles"]


def soften(values: Mapping[str, float]) -> dict[str, float]:
    """T * softmax over T names: their mean is 1."""
    if not values:
        return {}
    highest = max(values.values())
    powers = {name: math.exp(value - highest) for name, value in values.items()}
    return {name: len(powers) * power / math.fsum(powers.values()) for name, power in powers.items()}


LOSS_METHODS: dict[str, type[LossMethod]] = {
    "sum": Sum,
    "uncertainty": Uncertainty,
    "dwa": DynamicAverage,
    "famo": Famo,
    "rlw": RandomWeights,
    "geometric": Geometric,
    "label_frequency": LabelFrequency,
}


class Balancer:
    """The `balancing` block of a config at work.

    names: the tasks, in the order that every rank has. `gradient_method`: None for a loss-side method.
    ImportError, naming what to install, for a method whose solver is not there.
    """

    def __init__(self, names: Sequence[str], options: Any, seed: int = 0):
        self.scale = LossWeights(names, options.weights, options.normalise)
        given = options.complete_options() | {"seed": seed}
        method = options.method
        self.loss_method = LOSS_METHODS.get(method, Sum)(names, given)
        self.gradient_method: GradientMethod | None = (
            GRADIENT_METHODS[method](names, given) if method in GRADIENT_METHODS else None
        )
        self._given: dict[str, float] = {}

    def find_weights(self, step: int, present: Sequence[str]) -> dict[str, float]:
        """What the loss of each present task is multiplied by before its backward pass in cycle `step`."""
        given = self.scale.weights()
        # a task of weight 0 is not balanced against the others
        self._given = {name: given[name] for name in present if given[name] > 0}
        found = self.loss_method.weigh(step, list(self._given))
        return {name: given[name] * found.get(name, 0.0) for name in present}

    def observe(self, losses: Mapping[str, float]) -> None:
        """The losses of the cycle that `find_weights` was last asked about, as they are."""
        # the method sees the losses that it has weighed
        self.loss_method.observe(
            {name: losses[name] * weight for name, weight in self._given.items() if name in losses}
        )
        self.scale.observe(losses)

    def state_dict(self) -> dict[str, Any]:
        gradient = None if self.gradient_method is None else self.gradient_method.state_dict()
        return {"scale": self.scale.state_dict(), "loss": self.loss_method.state_dict(), "gradient": gradient}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scale.load_state_dict(state["scale"])
        self.loss_method.load_state_dict(state["loss"])
        if self.gradient_method is not None:
            self.gradient_method.load_state_dict(state["gradient"])
