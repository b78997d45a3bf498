"""The gradients of one cycle: micro-batches of any make-up, on any number of ranks, read by the host once.

Each task's loss is divided by one number for the whole cycle, so micro-batches combine exactly, however they are cut
and dealt. One head's graph is alive at a time: its gradient with respect to the shared features is kept, and the
features' own graph is walked once a micro-batch, or once a task where the tasks' gradients are wanted apart.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from training.balancing import NonFiniteError
from training.distributed import Ranks

Cycle = Sequence[Mapping[str, Any]]
"""Micro-batches as FrameDataset.collate makes them, those of this rank."""


def move(batch: Any, device: torch.device) -> Any:
    """All tensors of a batch on the device."""
    return tree_map(lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, batch)


def copy_to_cpu(batch: Any) -> Any:
    """All tensors on the CPU, with their values there: unlike `move`, which may return before a GPU has sent them."""
    return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, batch)


def count_labels(names: Sequence[str], cycle: Cycle, key: str = "counts") -> tuple[list[float], list[float]]:
    """Of each name, the sum of the counts in a rank's micro-batches, and the number of their labelled rows; `key`:
    under which a batch has its counts, "soft_counts" for those of what teachers say."""
    found = {name: [batch[key][name] for batch in cycle if name in batch.get(key, ())] for name in names}
    counts = [math.fsum(float(each.sum()) for each in found[name]) for name in names]
    return counts, [float(sum(map(len, found[name]))) for name in names]


def name_soft(name: str) -> str:
    """The key of a task's loss on what teachers say, beside that of its loss on true labels, which is its name."""
    return f"{name}/pseudo"


def find_task(key: str) -> str:
    """The task of a loss, from its key."""
    return key.partition("/")[0]


@dataclass(frozen=True)
class _Loss:
    """`rows`: of a micro-batch, those with a row in `target`; `measure`: the loss of an output on the target."""

    key: str
    rows: Tensor
    target: Any
    measure: Callable[[Any, Any], Tensor]


def _split_rows(output: Any, losses: Sequence[_Loss]) -> list[Any]:
    """The rows of an output for each loss, in their order."""
    if len(losses) == 1:
        return [output]
    ends = [0]
    for each in losses:
        ends.append(ends[-1] + len(each.rows))
    return [
        tree_map(lambda leaf, low=low, high=high: leaf[low:high] if isinstance(leaf, Tensor) else leaf, output)
        for low, high in itertools.pairwise(ends)
    ]


class GradientRows:
    """The gradient of the shared parameters of each task, one long row each.

    store: where rows are kept: "device", in the parameters' dtype beside them; "bf16", there in half of the memory and
    with 8 significant bits; "cpu", in the memory of the host, for which every backward pass waits.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], store: Literal["device", "bf16", "cpu"] = "device"):
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.sizes = [parameter.numel() for parameter in self.parameters]
        first = self.parameters[0] if self.parameters else torch.empty(0)
        self.dtype = torch.bfloat16 if store == "bf16" else first.dtype
        self.device = torch.device("cpu") if store == "cpu" else first.device
        self.rows: dict[str, Tensor] = {}
        self.reached: set[int] = set()

    def clear(self, names: Sequence[str]) -> None:
        """Rows of zeros for these tasks."""
        kept = {name: row.zero_() for name, row in self.rows.items() if name in names}
        length = sum(self.sizes)
        self.rows = {
            name: kept[name] if name in kept else torch.zeros(length, dtype=self.dtype, device=self.device)
            for name in names
        }
        self.reached = set()

    def _view(self, row: Tensor) -> list[Tensor]:
        """A row cut into the parameters' shapes, in the order of their elements in memory."""
        parts = row.split(self.sizes)
        return [part.as_strided(p.shape, p.stride()) for part, p in zip(parts, self.parameters, strict=True)]

    def add(self, name: str, gradients: Sequence[Tensor | None]) -> None:
        """Add a gradient of each parameter, None for zero."""
        there = [index for index, gradient in enumerate(gradients) if gradient is not None]
        if not there:
            return
        views = self._view(self.rows[name])
        moved = [gradients[index].to(self.device, self.dtype) for index in there]
        torch._foreach_add_([views[index] for index in there], moved)
        self.reached |= set(there)

    def measure(self) -> Tensor:
        """The Gramian of the rows, float64; made of pieces, so that no second copy of the rows is needed."""
        rows = list(self.rows.values())
        total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=self.device)
        for pieces in zip(*(row.split(1 << 22) for row in rows), strict=True):
            stacked = torch.stack(pieces).double()
            total += stacked @ stacked.T
        return total

    def combine(self, weights: Mapping[str, float], reached: Sequence[int]) -> None:
        """Make the weighted sum of the rows the gradient of the parameters; None of those that no task has reached."""
        first = self.parameters[0]
        total = torch.zeros(sum(self.sizes), dtype=first.dtype, device=first.device)
        for name, row in self.rows.items():
            total.add_(row.to(first.device, first.dtype), alpha=weights[name])
        for index, (parameter, view) in enumerate(zip(self.parameters, self._view(total), strict=True)):
            parameter.grad = view if index in reached else None


@dataclass
class Reading:
    """What the host reads of a cycle, over all ranks. `losses`: each task's, divided as it was for the gradient;
    `square`: the squared norm of the gradient, without the rows'; `gramian`: of the rows, if there are any."""

    losses: dict[str, float]
    square: float
    gramian: Tensor | None = None
    reached: list[int] = field(default_factory=list)


class CycleBackward:
    """Adds the gradients of cycles to the parameters of `net`.

    autocast: opens a context of mixed precision. rows: given, the shared gradients go there, task by task, and not into
    the parameters. A micro-batch with a `seed` seeds what its layers draw, as DropPath does.
    """

    def __init__(
        self,
        net: Any,
        tasks: Mapping[str, Any],
        device: torch.device,
        autocast: Callable,
        memory_format: torch.memory_format = torch.contiguous_format,
        ranks: Ranks | None = None,
    ):
        self.net, self.tasks, self.device = net, tasks, device
        self.autocast, self.memory_format = autocast, memory_format
        self.ranks = ranks or Ranks()
        self._parts: list[tuple[str, Tensor, Sequence[str]]] = []

    def run(
        self,
        cycle: Cycle,
        divisors: Mapping[str, float],
        weights: Mapping[str, float],
        rows: GradientRows | None = None,
    ) -> None:
        """The backward passes of this rank's micro-batches. Nothing waits for a GPU here.

        divisors, weights: of the losses on true labels by the names of tasks, and of those on what teachers say by
        `name_soft`; losses without a divisor are left out.
        """
        self._parts = []
        if rows is not None:
            rows.clear([name for name in self.tasks if name in divisors or name_soft(name) in divisors])
        parameters = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        # one context for the cycle, so that the weights are cast once and not in every micro-batch
        with self.autocast():
            for batch in cycle:
                names = [name for name in self.tasks if self._list_losses(batch, name, divisors)]
                if names:
                    before = [parameter.grad for parameter in parameters]
                    for parameter in parameters:
                        parameter.grad = None
                    self._run_micro_batch(batch, names, divisors, weights, rows)
                    _add_gradients(parameters, before)

    def _list_losses(self, batch: Mapping[str, Any], name: str, divisors: Mapping[str, float]) -> list[_Loss]:
        """What a task learns from a micro-batch: from true labels, and from what teachers say."""
        task, found = self.tasks[name], []
        if name in batch["rows"] and name in divisors:
            found.append(_Loss(name, batch["rows"][name], batch["targets"][name], task.loss))
        if name in batch.get("soft_rows", ()) and name_soft(name) in divisors:
            soft = batch["soft_rows"][name], batch["soft_targets"][name]
            found.append(_Loss(name_soft(name), *soft, task.soft_loss))
        return found

    def _run_micro_batch(
        self,
        batch: Mapping[str, Any],
        names: Sequence[str],
        divisors: Mapping[str, float],
        weights: Mapping[str, float],
        rows: GradientRows | None,
    ) -> None:
        if "seed" in batch:
            torch.manual_seed(batch["seed"])
        image = batch["image"].to(self.device, non_blocking=True).to(memory_format=self.memory_format)
        size = tuple(image.shape[-2:])
        features = self.net.shared_features(image, names)
        leaves = {key: value.detach().requires_grad_() for key, value in features.items()}
        for number, name in enumerate(names):
            losses = self._list_losses(batch, name, divisors)
            targets = [move(each.target, self.device) for each in losses]
            chosen = losses[0].rows if len(losses) == 1 else torch.cat([each.rows for each in losses])
            everyone = len(chosen) == len(image) and len(losses) == 1
            output = self.net.run_head(
                name, leaves, size, None if everyone else chosen.to(self.device, non_blocking=True)
            )
            with torch.autocast(self.device.type, enabled=False):
                terms = []
                for each, target, part in zip(losses, targets, _split_rows(output, losses), strict=True):
                    loss = each.measure(part, target)
                    frames = [batch["frame"][row] for row in each.rows.tolist()]
                    self._parts.append((each.key, loss.detach(), frames))
                    terms.append(loss * (weights[each.key] / divisors[each.key]))
                sum(terms[1:], terms[0]).backward()
            if rows is not None:
                self._send_back(features, leaves, rows, name, keep=number < len(names) - 1)
        if rows is None:
            # features of a frozen encoder need no gradient
            reached = [key for key, leaf in leaves.items() if leaf.grad is not None and features[key].requires_grad]
            if reached:
                torch.autograd.backward([features[key] for key in reached], [leaves[key].grad for key in reached])

    def _send_back(
        self, features: dict[str, Tensor], leaves: dict[str, Tensor], rows: GradientRows, name: str, keep: bool
    ) -> None:
        """Walk the features' graph for one task's gradient; `keep` the graph for the next."""
        reached = [key for key, leaf in leaves.items() if leaf.grad is not None and features[key].requires_grad]
        if reached and rows.parameters:
            gradients = torch.autograd.grad(
                [features[key] for key in reached],
                rows.parameters,
                [leaves[key].grad for key in reached],
                retain_graph=keep,
                allow_unused=True,
            )
            rows.add(name, gradients)
        for leaf in leaves.values():
            leaf.grad = None

    def read(
        self, divisors: Mapping[str, float], rows: GradientRows | None = None, check_gradient: bool = True
    ) -> Reading:
        """Add up the gradients over the ranks, and read losses, norm and Gramian, at once.

        A parameter that no rank has a gradient of has none afterwards. NonFiniteError, on all ranks, naming the task
        and the frames of all micro-batches whose loss is not finite, or the frames of the cycle if it is the gradient.
        """
        names = list(divisors)
        parameters = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        own = [loss for _, loss, _ in self._parts]
        sums = torch.zeros(len(names), dtype=parameters[0].dtype, device=self.device)
        if own:
            position = torch.tensor([names.index(name) for name, _, _ in self._parts])
            sums.index_add_(0, position.to(self.device, non_blocking=True), torch.stack(own).to(sums.dtype))
        presence = self._exchange(parameters, sums, rows)
        square = _add_squares(parameters if check_gradient else [], self.device)
        pieces = [sums, square, *own]
        if rows is not None:
            gramian = rows.measure()
            pieces.append(gramian)
        if presence is not None:
            pieces.append(presence)
        # the one moment of a cycle in which the host waits for the GPU
        values = torch.cat([piece.reshape(-1).to(self.device, torch.float64) for piece in pieces]).tolist()

        losses = {name: value / divisors[name] for name, value in zip(names, values, strict=False)}
        values = values[len(names) :]
        reading = Reading(losses, values[0])
        each, values = values[1 : 1 + len(own)], values[1 + len(own) :]
        finite = True
        if rows is not None:
            count = len(rows.rows)
            products, values = values[: count**2], values[count**2 :]
            reading.gramian = torch.tensor(products, dtype=torch.float64).view(count, count)
            reading.reached = sorted(rows.reached)
            finite = all(map(math.isfinite, products))
        finite = finite and all(map(math.isfinite, [*reading.losses.values(), reading.square]))
        if not finite:
            raise self._explain_not_finite(each)
        if presence is not None:
            shared = {id(parameter): index for index, parameter in enumerate(rows.parameters)} if rows else {}
            reading.reached = []
            for parameter, has in zip(parameters, values, strict=True):
                if not has:
                    parameter.grad = None
                elif id(parameter) in shared:
                    reading.reached.append(shared[id(parameter)])
        return reading

    def _exchange(self, parameters: list[nn.Parameter], sums: Tensor, rows: GradientRows | None) -> Tensor | None:
        """One sum over the ranks of all gradients, rows and losses, and of how many ranks have each parameter's.

        Returns the last, None if there is one rank.
        """
        if self.ranks.alone:
            return None
        in_rows = {id(parameter): index for index, parameter in enumerate(rows.parameters)} if rows else {}
        has = [
            in_rows[id(p)] in rows.reached if rows is not None and id(p) in in_rows else p.grad is not None
            for p in parameters
        ]
        presence = torch.tensor([float(each) for each in has], dtype=sums.dtype).to(self.device, non_blocking=True)
        outside = [parameter for parameter in parameters if id(parameter) not in in_rows]
        for parameter in outside:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        tensors: list[Any] = [*(parameter.grad for parameter in outside), sums, presence]
        if rows is None:
            self.ranks.add_up(tensors)
        else:
            # rows of another dtype, or elsewhere, travel on their own
            alike = rows.dtype == sums.dtype and rows.device == sums.device
            self.ranks.add_up(tensors + (list(rows.rows.values()) if alike else []))
            if not alike and rows.rows:
                self.ranks.add_up(list(rows.rows.values()))
        return presence

    def _explain_not_finite(self, each: Sequence[float]) -> Exception:
        """The error for all ranks; `each`: the losses of this rank's micro-batches, one by one."""
        bad: dict[str, set[str]] = {}
        drawn: set[str] = set()
        for (name, _, frames), loss in zip(self._parts, each, strict=True):
            drawn |= set(frames)
            if not math.isfinite(loss):
                bad.setdefault(name, set()).update(frames)
        found = self.ranks.gather((bad, drawn))
        together: dict[str, set[str]] = {}
        for bad, _ in found:
            for name, members in bad.items():
                together.setdefault(name, set()).update(members)
        if together:
            keys = [key for name in self.tasks for key in (name, name_soft(name))]
            name = next(key for key in keys if key in together)
            listed = ", ".join(sorted(together[name]))
            message = f"the loss of {name} is not finite on a micro-batch of {listed}"
        else:
            listed = ", ".join(sorted(set().union(*(drawn for _, drawn in found))))
            message = f"the gradient is not finite; frames of this step: {listed}"
        return self.ranks.blame(NonFiniteError(message))


def _add_gradients(parameters: Sequence[nn.Parameter], before: Sequence[Tensor | None]) -> None:
    """Add the parameters' gradients to those from before, all at once: autograd would launch a kernel for each."""
    both = [(old, p.grad) for p, old in zip(parameters, before, strict=True) if old is not None and p.grad is not None]
    if both:
        torch._foreach_add_([old for old, _ in both], [new for _, new in both])
    for parameter, old in zip(parameters, before, strict=True):
        if old is not None:
            parameter.grad = old


def _add_squares(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    """The squared norm of the gradients of parameters together."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(gradients)).square().sum()
