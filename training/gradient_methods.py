"""Weights of tasks from the Gramian of their gradients, by torchjd's weightings.

The Gramian of T tasks is T x T, G[i, j] the inner product of the gradients of the shared parameters of tasks i and j.
Around the library: float64, because in float32 some weightings are wrong by orders of magnitude where losses differ in
scale; one task alone weighs 1, whatever a method makes of it; tasks without a gradient are left out, because a zero row
stops some methods; random orders are drawn from the seed and the step, not from PyTorch's global generator; state is
kept by the names of tasks, so that an absent task's is not touched and a resumed run has it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor
from torchjd import aggregation

Gramian = Float64[Tensor, "T T"]
LEAST_SHARE = 1e-24  # of the largest squared norm: a gradient below is none


class GradientMethod(ABC):
    """The weights of the tasks in the gradient of the shared parameters.

    names: all tasks; options: those of `balancing.options`, complete, and the seed. Raises ImportError, naming what to
    install, if a solver is missing.
    """

    scale_free = True  # whether the weights are the same for all gradients times a number

    def __init__(self, names: Sequence[str], options: Mapping[str, int | float]):
        self.names, self.options = tuple(names), dict(options)

    def weigh(self, step: int, names: Sequence[str], gramian: Gramian) -> dict[str, float]:
        """The weight of each of the present tasks `names`, whose gradients have this finite Gramian, in cycle `step`.

        A task whose gradient is zero gets 1, and is left out for the others.
        """
        squares = gramian.diagonal()
        there = [i for i in range(len(names)) if squares[i] > LEAST_SHARE * squares.max()]
        weights = dict.fromkeys(names, 1.0)
        if len(there) > 1:
            chosen = gramian[there][:, there]
            if self.scale_free:
                chosen = chosen / chosen.diagonal().mean()
            found = self.solve(step, [names[i] for i in there], chosen)
            weights |= {names[i]: float(weight) for i, weight in zip(there, found, strict=True)}
        return weights

    def check_solver(self) -> None:
        """ImportError now, and not in the first cycle, if a package that the solver needs is missing or broken."""
        try:
            self.solve(0, ["one", "other"], torch.eye(2, dtype=torch.float64))
        except NameError as error:  # torchjd passes over what cannot be imported
            raise ImportError(f"a package of its solver is broken ({error})") from error

    @abstractmethod
    def solve(self, step: int, names: Sequence[str], gramian: Gramian) -> Float64[Tensor, " T"]:
        """The weights of two or more tasks with gradients."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have no state
        """Go on from there."""


class Plain(GradientMethod):
    """A weighting of torchjd that is a function of the Gramian and, where it draws, of the seed and the step."""

    def __init__(self, build: Any, names: Sequence[str], options: Mapping[str, int | float]):
        super().__init__(names, options)
        self.weighting = build(self.options)
        self.check_solver()

    def solve(self, step: int, names: Sequence[str], gramian: Gramian) -> Float64[Tensor, " T"]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_mix(self.options["seed"], step))
            return self.weighting(gramian)


class Mgda(Plain):
    """MGDA (arXiv 1810.04650) asks for the shortest convex combination, which several weights give where gradients are
    alike, and torchjd's solver then picks one task. A small number on the diagonal picks the most even weights."""

    def solve(self, step: int, names: Sequence[str], gramian: Gramian) -> Float64[Tensor, " T"]:
        return super().solve(step, names, gramian + 1e-9 * torch.eye(len(names), dtype=gramian.dtype))


class FairGrad(Plain):
    """Its weights solve G w = w^(-1 / alpha), which depends on the scale of the gradients."""

    scale_free = False


class GradVac(GradientMethod):
    """torchjd's, with its moving averages of cosines kept here, for each ordered pair of tasks."""

    def __init__(self, names: Sequence[str], options: Mapping[str, int | float]):
        super().__init__(names, options)
        self.targets = {f"{one},{other}": 0.0 for one in names for other in names}

    def solve(self, step: int, names: Sequence[str], gramian: Gramian) -> Float64[Tensor, " T"]:
        weighting: Any = aggregation.GradVacWeighting(beta=self.options["beta"])
        # the library has no way to set them: its own state_dict does not load into a new object
        weighting._phi_t = torch.tensor(
            [[self.targets[f"{one},{other}"] for other in names] for one in names], dtype=gramian.dtype
        )
        weighting._state_key = (len(names), gramian.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_mix(self.options["seed"], step))
            weights = weighting(gramian)
        for one, row in zip(names, weighting._phi_t.tolist(), strict=True):
            self.targets |= {f"{one},{other}": value for other, value in zip(names, row, strict=True)}
        return weights

    def state_dict(self) -> dict[str, Any]:
        return {"targets": dict(self.targets)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.targets = dict(state["targets"])


class NashMtl(GradientMethod):
    """torchjd's (arXiv 2202.01017), which wants the gradients themselves: it gets T vectors with the same Gramian.

    They are scaled to the length 1 and the weights divided by the lengths afterwards. That is the same solution, but
    with gradients of unlike length the solver has errors of some hundred times. Each cycle starts from equal weights,
    not from the last cycle's as in the authors' code, so that there is no state for tasks that come and go. The
    weighted sum is at most `max_norm` long.
    """

    scale_free = False

    def __init__(self, names: Sequence[str], options: Mapping[str, int | float]):
        super().__init__(names, options)
        self.check_solver()

    def solve(self, step: int, names: Sequence[str], gramian: Gramian) -> Float64[Tensor, " T"]:
        lengths = gramian.diagonal().sqrt()
        values, vectors = torch.linalg.eigh(gramian / lengths / lengths[:, None])
        rows = vectors * values.clamp(min=0).sqrt()
        weights = aggregation.NashMTL(n_tasks=len(names), max_norm=0.0).weighting(rows) / lengths
        norm = float(weights @ gramian @ weights) ** 0.5
        return weights * min(1.0, self.options["max_norm"] / norm)


def _mix(seed: int | float, step: int) -> int:
    return (int(seed) * 1_000_003 + step) % 2**63


def _plain(build: Any) -> Any:
    return partial(Plain, build)


GRADIENT_METHODS: dict[str, Any] = {
    "pcgrad": _plain(lambda options: aggregation.PCGradWeighting()),
    "mgda": partial(Mgda, lambda options: aggregation.MGDAWeighting()),
    "imtlg": _plain(lambda options: aggregation.IMTLGWeighting()),
    "aligned_mtl": _plain(lambda options: aggregation.AlignedMTLWeighting()),
    "gradvac": GradVac,
    "cagrad": _plain(lambda options: aggregation.CAGradWeighting(c=options["c"])),
    "upgrad": _plain(lambda options: aggregation.UPGradWeighting()),
    "dualproj": _plain(lambda options: aggregation.DualProjWeighting()),
    "fairgrad": partial(FairGrad, lambda options: aggregation.FairGradWeighting(alpha=options["alpha"])),
    "nashmtl": NashMtl,
}
