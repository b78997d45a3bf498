"""Which frame is drawn when: label regimes, and one endless shuffled stream of frames for each task.

Every draw is a function of (seed, stream, position), so data do not depend on the number of loader processes and a
resumed run draws what the uninterrupted one would have drawn.
"""

import hashlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

Draw = tuple[int, int, tuple[str, ...]]
"""Index of a frame, seed of its augmentation, names of the tasks whose labels it brings."""


def assign_labels(has_label: Mapping[str, Sequence[bool]], regime: str, seed: int) -> dict[str, list[int]]:
    """Name -> the frames (by index) whose label of that name is used.

    as_is, one_at_a_time: all there are. symmetric: only frames that have the labels of all. one_task: each frame keeps
    one of its labels, drawn so that names get as equally many frames as the labels allow.
    """
    names = list(has_label)
    count = len(next(iter(has_label.values())))
    labels = [[name for name in names if has_label[name][index]] for index in range(count)]
    if regime in ("as_is", "one_at_a_time"):
        kept = labels
    elif regime == "symmetric":
        kept = [names if len(found) == len(names) else [] for found in labels]
    elif regime == "one_task":
        kept, totals = [[] for _ in labels], dict.fromkeys(names, 0)
        available = {name: sum(map(bool, has_label[name])) for name in names}
        order = list(range(count))
        random.Random(f"one task a frame {seed}").shuffle(order)
        for index in order:
            if labels[index]:
                # of equal names the rarer one, which may not meet another frame
                chosen = min(labels[index], key=lambda name: (totals[name], available[name]))
                totals[chosen] += 1
                kept[index] = [chosen]
        _balance(labels, kept, totals, order)
    else:
        raise ValueError(f"no label regime {regime!r}: choose as_is, symmetric, one_task or one_at_a_time")
    return {name: [index for index in range(count) if name in kept[index]] for name in names}


def _balance(labels: list[list[str]], kept: list[list[str]], totals: dict[str, int], order: list[int]) -> None:
    """Pass frames on, from a name with many to one with few, until no pass makes the totals more equal.

    A frame is passed on by giving it to another name whose label it has; over several names it is a chain of such
    passes. What `order` draws first is passed on first.
    """
    while True:
        movable: dict[str, dict[str, list[int]]] = {name: {} for name in totals}
        for index in order:
            for owner in kept[index]:
                for name in labels[index]:
                    if name != owner:
                        movable[owner].setdefault(name, []).append(index)
        chain = _find_chain(movable, totals)
        if chain is None:
            return
        steps = list(itertools.pairwise(chain))
        amount = min((totals[chain[0]] - totals[chain[-1]]) // 2, *(len(movable[a][b]) for a, b in steps))
        for giver, taker in steps:
            for index in movable[giver][taker][:amount]:
                kept[index] = [taker]
        totals[chain[0]] -= amount
        totals[chain[-1]] += amount


def _find_chain(movable: Mapping[str, Mapping[str, list[int]]], totals: Mapping[str, int]) -> list[str] | None:
    """The shortest chain of names along which a frame can go to one that has at least two less; None if there is none.

    Of several, that from the name with the most frames.
    """
    for source in sorted(totals, key=lambda name: -totals[name]):
        chains, reached = [[source]], {source}
        for chain in chains:  # grows: a search in breadth
            if totals[chain[-1]] <= totals[source] - 2:
                return chain
            for name in movable[chain[-1]]:
                if name not in reached:
                    reached.add(name)
                    chains.append([*chain, name])
    return None


def hash_assignment(frames: Sequence[object], assignment: Mapping[str, Sequence[int]]) -> str:
    """A fingerprint of which labels of which frames are used: equal for runs that saw the same labels."""
    lines = [f"{name} {frames[index]}" for name in sorted(assignment) for index in assignment[name]]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@lru_cache(maxsize=64)
def _shuffle(count: int, key: str) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(key).shuffle(order)
    return tuple(order)


class CycleSampler:
    """Micro-batches of draws for PyTorch's DataLoader (as its batch sampler), from step `start` to `stop`.

    A step is a cycle: `repeats` micro-batches of each stream, in the order of the streams. Under the symmetric regime
    there is one stream that all names share, else one for each name with its frames. Under "as_is" a frame brings all
    its labels, whichever stream draws it, else only that of the stream.
    """

    def __init__(
        self,
        assignment: Mapping[str, Sequence[int]],
        regime: str,
        micro_batch: int,
        repeats: int,
        seed: int,
        start: int,
        stop: int,
    ):
        names = tuple(assignment)
        if regime == "symmetric":
            self.streams = [("all", list(next(iter(assignment.values()))), names)]
        else:
            self.streams = [
                (name, list(indices), names if regime == "as_is" else (name,)) for name, indices in assignment.items()
            ]
        self.micro_batch, self.repeats, self.seed = micro_batch, repeats, seed
        self.start, self.stop = start, stop

    @property
    def batches_per_step(self) -> int:
        return len(self.streams) * self.repeats

    def __len__(self) -> int:
        return (self.stop - self.start) * self.batches_per_step

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.start, self.stop):
            for stream in self.streams:
                for repeat in range(self.repeats):
                    first = (step * self.repeats + repeat) * self.micro_batch
                    yield [self._draw(stream, first + offset) for offset in range(self.micro_batch)]

    def _draw(self, stream: tuple[str, list[int], tuple[str, ...]], position: int) -> Draw:
        name, indices, names = stream
        epoch, index_in_epoch = divmod(position, len(indices))
        index = indices[_shuffle(len(indices), f"{self.seed} {name} {epoch}")[index_in_epoch]]
        return index, random.Random(f"{self.seed} {name} {position}").getrandbits(63), names
