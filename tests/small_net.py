"""A small network, tasks of one number a row, and micro-batches for them, to compare training with plain autograd."""

from contextlib import nullcontext

import torch
from torch import nn
from torch.utils._pytree import tree_map

from models.multitask import MultitaskNet
from training.balancing import Balancer, Normaliser
from training.config import Balancing
from training.cycle import CycleBackward, count_labels

NAMES = ("a", "b", "c")


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 4, 1))

    def forward(self, image):
        return {"encoder.1": self.layers(image)}


class Mean(nn.Module):
    reads = ("encoder.1",)

    def __init__(self, stop_gradient=False):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.stop_gradient = stop_gradient

    def forward(self, features, size):
        read = features["encoder.1"]
        read = read.detach() if self.stop_gradient else read
        return self.layer(read.mean(dim=(2, 3)))[:, 0]


class Square:
    """A task of one number a row; it counts more than rows, as pixels do."""

    def count(self, target):
        return target["weight"]

    def loss(self, output, target):
        return (target["weight"] * (output - target["value"]) ** 2).sum()


def build_net(names=NAMES):
    torch.manual_seed(0)
    return MultitaskNet(Backbone(), None, {name: Mean() for name in names}).double()


def make_batch(image, target, labelled, frames, tasks=None):
    """A micro-batch as FrameDataset.collate makes it. target: of all rows, the same for all tasks; labelled: task ->
    which rows have its label."""
    batch = {"image": image, "targets": {}, "rows": {}, "counts": {}, "frame": list(frames)}
    for name, flags in labelled.items():
        rows = torch.tensor(flags).nonzero()[:, 0]
        if len(rows):
            batch["rows"][name] = rows
            batch["targets"][name] = tree_map(lambda leaf, rows=rows: leaf[rows], target)
            batch["counts"][name] = (tasks[name] if tasks else Square()).count(batch["targets"][name])
    return batch


def count_cycle(names, cycle):
    """The counts that the training loop hands on: of the names with a labelled row."""
    counts, rows = count_labels(names, cycle)
    return {name: int(count) for name, count, there in zip(names, counts, rows, strict=True) if there}


def build_backward(net, tasks=None, ranks=None):
    tasks = tasks or dict.fromkeys(net.heads, Square())
    return CycleBackward(net, tasks, torch.device("cpu"), nullcontext, ranks=ranks)


def build_update(kind, options, net, weights=None, ranks=None, **balancing):
    """An update with its balancing; further arguments are those of the balancing block."""
    tasks = dict.fromkeys(net.heads, Square())
    balance = Balancer(list(tasks), Balancing(weights=weights or {}, **balancing))
    return kind(net, options, build_backward(net, tasks, ranks), balance, Normaliser(tasks))


def take_step(update, number, cycle, measure=False):
    return update.step(number, cycle, count_cycle(list(update.net.heads), cycle), measure)
