"""What the runs of a grid cost, counted and not timed: images, cycles and operations.

A busy machine makes the same step four to ten times slower, so seconds say little. Operations are twice the
multiply-accumulates, and a backward pass counts as two forward passes.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from experiment import build_network, build_tasks
from experiments.grid import Grid, Run
from training.config import MICRO_BATCH, Config, name_regime

BACKWARD = 2  # forward passes that a backward pass costs
VIEWS = 2  # a teacher sees a picture and its mirror image


@dataclass(frozen=True)
class Work:
    """`cycles`: steps of the optimizer; `images`: that pass the encoder in its own training; `flops`: of training, and
    of asking a mean teacher; `teacher_flops`: of training the teachers and those that calibrate them, and of writing
    their pseudo-labels."""

    cycles: int = 0
    images: int = 0
    flops: float = 0.0
    teacher_flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.cycles + other.cycles, self.images + other.images, self.flops + other.flops,
            self.teacher_flops + other.teacher_flops,
        )  # fmt: skip

    @classmethod
    def from_result(cls, content: Mapping[str, Any]) -> "Work":
        """What a kept result says its run has cost."""
        return cls(content["cycles"], content["images"], content["flops"], content["teachers"])

    def to_result(self) -> dict[str, Any]:
        return {"cycles": self.cycles, "images": self.images, "flops": self.flops, "teachers": self.teacher_flops}

    @property
    def total_flops(self) -> float:
        return self.flops + self.teacher_flops


@dataclass(frozen=True)
class Forward:
    """Operations of a forward pass of one image: of encoder and neck, and of each head."""

    shared: int
    heads: Mapping[str, int]


class CostCounter:
    """Counts the work of the runs of a grid; networks of the same options are built once."""

    def __init__(self, grid: Grid):
        self.grid = grid
        width, height = grid.study.dataset.processed.split("x")
        self.size = (int(width), int(height))
        self._forwards: dict[str, Forward] = {}

    def count(self, run: Run, tuned: bool = True) -> Work:
        """The work of one run, with that of its teachers. KeyError while its tuning is not finished; what is tuned is
        no part of the work, so without `tuned` it can be told before."""
        config = self.grid.resolve(run, tuned=tuned)
        forward = self._measure(config)
        steps = config.train.steps
        heard = count_taught_steps(config)
        images, flops = 0, 0.0
        for taught, number_of_steps in ((False, steps - heard), (True, heard)):
            step_images, step_flops = self._count_step(config, forward, taught)
            images += number_of_steps * step_images
            flops += number_of_steps * step_flops
        teachers = sum((self._count_teaching(teacher, tuned) for teacher in run.teachers), 0.0)
        return Work(steps, images, flops, teachers)

    def _count_step(self, config: Config, forward: Forward, taught: bool) -> tuple[int, float]:
        """Images and operations of a step, in which teachers are heard or not."""
        images, flops = 0, 0.0
        for number, labelled in self._list_streams(config, taught):
            images += number
            heads = sum(cost if taught else labelled[name] * cost for name, cost in forward.heads.items())
            flops += (1 + BACKWARD) * number * (forward.shared + heads)
            if taught and config.train.mean_teacher is not None:  # it is asked where there is no true label
                asked = sum((1 - labelled[name]) * cost for name, cost in forward.heads.items())
                flops += VIEWS * number * (forward.shared + asked)
        return images, flops

    def _count_teaching(self, teacher: Run, tuned: bool) -> float:
        config = self.grid.resolve(teacher, tuned=tuned)
        forward = self._measure(config)
        frames = self.grid.study.dataset.count_training_frames(config.data.split_fractions[0])
        calibration = self.grid.find_calibration(teacher)
        training = [self.count(run, tuned).total_flops for run in (teacher, calibration) if run is not None]
        return sum(training) + VIEWS * frames * (forward.shared + sum(forward.heads.values()))

    def _list_streams(self, config: Config, taught: bool) -> Iterator[tuple[int, dict[str, float]]]:
        """Of each stream of a step in which teachers are heard or not, its images, and the share of them that have a
        true label of each task."""
        names, labels, regime = list(config.tasks), config.data.labels, name_regime(config.data.labels)
        given = config.train.micro_batch
        sizes = given if isinstance(given, dict) else dict.fromkeys(names, given)
        cycle = config.train.cycle
        if regime == "symmetric":
            yield given * cycle, dict.fromkeys(names, 1.0)
            return
        budget: dict[str, float] = labels["budget"] if regime == "budget" else {}
        for name in names:
            shares = {other: budget.get(other, 1.0) * self.grid.study.dataset.have_both(name, other) for other in names}
            if regime in ("one_task", "one_at_a_time"):
                shares = dict.fromkeys(names, 0.0)
            shares[name] = 1.0
            yield sizes.get(name, MICRO_BATCH) * cycle, shares
        # frames that no stream of true labels draws
        if regime == "one_task":
            drawn_by_none = len(names) < len(labels["one_task"] if isinstance(labels, dict) else names)
        else:
            most = max(budget.get(name, 1.0) for name in names)
            drawn_by_none = most < 1 or not self.grid.study.dataset.is_complete
        if taught and drawn_by_none:
            own = config.data.pseudo.micro_batch if config.data.pseudo is not None else None
            yield (own or max(sizes.values())) * cycle, dict.fromkeys(names, 0.0)

    def _measure(self, config: Config) -> Forward:
        options: dict[str, Any] = {
            "model": config.model.model_dump(mode="json"),
            "tasks": {name: each.model_dump(mode="json") for name, each in config.tasks.items()},
        }
        key = json.dumps(options)
        if key not in self._forwards:
            size = config.model.input_size or self.size
            net = build_network(config.model, build_tasks(config.tasks), size, load_pretrained=False).eval()
            self._forwards[key] = measure_forward(net, size)
        return self._forwards[key]


def count_taught_steps(config: Config) -> int:
    """In how many steps of a run teachers are heard."""
    teaching = config.data.pseudo or config.train.mean_teacher
    if teaching is None:
        return 0
    steps = config.train.steps
    until = steps if teaching.true_labels_only_from is None else min(steps, teaching.true_labels_only_from)
    return max(0, until - teaching.from_step)


@torch.no_grad()
def measure_forward(net: Any, size: tuple[int, int]) -> Forward:
    """Operations of a network in evaluation mode on an image of (width, height) `size`."""
    image = torch.zeros(1, 3, size[1], size[0], dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        features = net.shared_features(image)
    shared, heads = counter.get_total_flops(), {}
    for name in net.heads:
        with FlopCounterMode(display=False) as counter:
            net.run_head(name, features, (size[1], size[0]))
        heads[name] = counter.get_total_flops()
    return Forward(shared, heads)
