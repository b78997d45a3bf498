"""Which frame is drawn when: label regimes, and one endless shuffled stream of frames for each task.

Every draw is a function of (seed, stream, position), so data do not depend on the number of loader processes or ranks,
and a resumed run draws what the uninterrupted one would have drawn.
"""

import hashlib
import itertools
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ASSIGNMENT_FORMAT = 1

Draw = tuple[int, int, tuple[str, ...]] | tuple[int, int, tuple[str, ...], tuple[str, ...]]
"""Index of a frame, seed of its augmentation, names of the tasks whose labels it brings, and, in steps in which
teachers are heard, of those that learn from them."""

PSEUDO = "pseudo"  # the stream of frames that no stream of true labels draws


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


def draw_budget(
    frames: Sequence[object], has_label: Mapping[str, Sequence[bool]], shares: Mapping[str, float], seed: int
) -> dict[str, list[int]]:
    """Name -> the frames whose label of it is used: a share of those that have it, all where no share is given.

    frames: printed as "scene/view/id". Of each scene the share is drawn, to within two frames; with the same seed a
    smaller share is part of a larger one, and the draw of one name does not depend on the others.
    """
    assignment = {}
    for name, flags in has_label.items():
        scenes: dict[str, list[int]] = defaultdict(list)
        for index, there in enumerate(flags):
            if there:
                scenes[str(frames[index]).partition("/")[0]].append(index)
        # each frame has a place in [0, 1], the frames of a scene evenly apart: a share takes the places up to it
        places = []
        for scene, members in scenes.items():
            draw = random.Random(f"budget {seed} {name} {scene}")
            draw.shuffle(members)
            offset = draw.random()
            places += [((position + offset) / len(members), index) for position, index in enumerate(members)]
        share = shares.get(name, 1.0)
        count = max(1, round(share * len(places))) if places else 0
        assignment[name] = sorted(index for _, index in sorted(places)[:count])
    return assignment


def hold_out(
    frames: Sequence[object], assignment: Mapping[str, Sequence[int]], shares: Mapping[str, float], seed: int
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """An assignment without the labels that are held out, and these: of each name with a share so many of its labels,
    those of whole scenes, because frames of one scene are alike.

    At least one scene of a name is held out, and one is left, where there are two.
    """
    kept = {name: list(indices) for name, indices in assignment.items()}
    held_out: dict[str, list[int]] = {}
    for name, share in shares.items():
        scenes: dict[str, list[int]] = defaultdict(list)
        for index in kept[name]:
            scenes[str(frames[index]).partition("/")[0]].append(index)
        order = sorted(scenes)
        random.Random(f"hold out {seed} {name}").shuffle(order)
        chosen: list[int] = []
        for scene in order[:-1]:
            if len(chosen) >= share * len(kept[name]):
                break
            chosen += scenes[scene]
        held_out[name] = sorted(chosen)
        kept[name] = sorted(set(kept[name]) - set(chosen))
    return kept, held_out


def write_assignment(
    frames: Sequence[object],
    assignment: Mapping[str, Sequence[int]],
    held_out: Mapping[str, Sequence[int]] | None = None,
) -> str:
    """An assignment as the text of a JSON file, which `read_assignment` takes: task -> scene/view -> identities, of the
    labels that are trained on, and of those that are held out."""

    def group(parts: Mapping[str, Sequence[int]]) -> dict[str, dict[str, list[str]]]:
        labels: dict[str, dict[str, list[str]]] = {}
        for name, indices in parts.items():
            groups: dict[str, list[str]] = defaultdict(list)
            for index in indices:
                folder, _, identity = str(frames[index]).rpartition("/")
                groups[folder].append(identity)
            labels[name] = dict(groups)
        return labels

    content = {"format": ASSIGNMENT_FORMAT, "labels": group(assignment)}
    return json.dumps(content | ({"held_out": group(held_out)} if held_out else {}), indent=1) + "\n"


def parse_assignment(text: str, part: str = "labels") -> dict[str, list[str]]:
    """Task -> the names of frames in a text of `write_assignment`, of those trained on, or those "held_out". ValueError
    if it is none, or of another format."""
    try:
        content = json.loads(text)
        if content["format"] != ASSIGNMENT_FORMAT:
            raise ValueError(f"it has format {content['format']}, this version of the code reads {ASSIGNMENT_FORMAT}")
        return {
            name: [f"{folder}/{identity}" for folder, identities in groups.items() for identity in identities]
            for name, groups in (content["labels"] if part == "labels" else content.get(part, {})).items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{error!r}") from error


def read_assignment(
    path: Path, frames: Sequence[object], has_label: Mapping[str, Sequence[bool]]
) -> dict[str, list[int]]:
    """Name -> the frames whose label of it is used, as a file of `write_assignment` says.

    ValueError, with the file and what to do, if it is missing or damaged, does not name the same tasks, or names a
    frame that is no training frame, that lacks the label, or that is named twice.
    """
    try:
        named = parse_assignment(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"data.labels: the file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(
            f"data.labels: {path} is no assignment of labels ({error}); give the assignment.json of a run folder"
        ) from error
    if named.keys() != has_label.keys():
        raise ValueError(
            f"data.labels: {path} assigns labels of {', '.join(named)}, and the tasks are {', '.join(has_label)}: "
            "leave tasks out of the config, or add them to the file"
        )
    position = {str(frame): index for index, frame in enumerate(frames)}
    for name, members in named.items():
        where = f"data.labels: {path}, {name}"
        if foreign := [frame for frame in members if frame not in position]:
            raise ValueError(f"{where}: {len(foreign)} frames are no training frames of this run, such as {foreign[0]}")
        if bare := [frame for frame in members if not has_label[name][position[frame]]]:
            raise ValueError(f"{where}: {len(bare)} frames have no label of it, such as {bare[0]}")
        if twice := [frame for frame, count in Counter(members).items() if count > 1]:
            raise ValueError(f"{where}: {len(twice)} frames are named twice, such as {twice[0]}")
    return {name: sorted(position[frame] for frame in named[name]) for name in has_label}


def find_repeat_factors(categories: Sequence[Collection[str]], below: float) -> list[float]:
    """How often each frame is drawn in comparison, from the categories it shows: repeat factor sampling (LVIS, arXiv
    1908.03195).

    A category that a share f < `below` of the frames shows asks for sqrt(below / f); a frame has the largest that its
    categories ask for, at least 1.
    """
    shown = Counter(category for each in categories for category in set(each))
    factor = {category: max(1.0, math.sqrt(below * len(categories) / count)) for category, count in shown.items()}
    return [max((factor[category] for category in each), default=1.0) for each in categories]


def hash_assignment(frames: Sequence[object], assignment: Mapping[str, Sequence[int]]) -> str:
    """A fingerprint of which labels of which frames are used: equal for runs that saw the same labels."""
    lines = [f"{name} {frames[index]}" for name in sorted(assignment) for index in assignment[name]]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Stream:
    """An endless shuffle of frames.

    indices: the frames; `factors`: how often each is drawn in comparison, None for equally often.
    brings: the names whose labels a drawn frame brings.
    micro_batch: frames in a micro-batch.
    active: (from, until), the steps in which each name of `brings` learns; None: to the end.
    """

    name: str
    indices: tuple[int, ...]
    brings: tuple[str, ...]
    micro_batch: int
    active: Mapping[str, tuple[int, int | None]]
    factors: tuple[float, ...] | None = None

    def list_names(self, step: int) -> tuple[str, ...]:
        """Whose labels a frame brings in this step; none: the stream rests, unless it brings no labels at all."""
        if self.name in self.active and not is_active(self.active[self.name], step):
            return ()
        return tuple(name for name in self.brings if is_active(self.active.get(name, (0, None)), step))


@dataclass(frozen=True)
class Teaching:
    """Which tasks learn from what teachers say, and the steps (from, until) in which they are heard."""

    names: tuple[str, ...]
    steps: tuple[int, int | None]

    def list_names(self, step: int, active: Mapping[str, tuple[int, int | None]]) -> tuple[str, ...]:
        """Those that do so in this step; `active`: see Stream."""
        if not is_active(self.steps, step):
            return ()
        return tuple(name for name in self.names if is_active(active.get(name, (0, None)), step))


def is_active(steps: tuple[int, int | None], step: int) -> bool:
    return steps[0] <= step and (steps[1] is None or step < steps[1])


def build_streams(
    assignment: Mapping[str, Sequence[int]],
    regime: str,
    micro_batch: int | Mapping[str, int],
    active: Mapping[str, tuple[int, int | None]] | None = None,
    factors: Mapping[str, Sequence[float]] | None = None,
    unlabelled: Collection[int] = (),
    unlabelled_batch: int = 0,
) -> list[Stream]:
    """Under the symmetric regime one stream that all names share, else one for each name with its frames.

    Under "one_task" and "one_at_a_time" a frame brings the label of its stream alone, else all that are assigned to it.
    micro_batch: of each name, or of all; active, factors: see Stream, by name. unlabelled: frames about which teachers
    say something; those that no other stream draws have one of their own, with micro-batches of `unlabelled_batch`.
    """
    names, active = tuple(assignment), active or {}
    drawn = {index for indices in assignment.values() for index in indices}
    left = tuple(index for index in sorted(unlabelled) if index not in drawn)
    more = [Stream(PSEUDO, left, (), unlabelled_batch, active)] if left else []
    if regime == "symmetric":
        assert isinstance(micro_batch, int), micro_batch
        return [Stream("all", tuple(sorted(drawn)), names, micro_batch, active), *more]
    alone = regime in ("one_task", "one_at_a_time")
    return [
        Stream(
            name,
            tuple(indices),
            (name,) if alone else names,
            micro_batch if isinstance(micro_batch, int) else micro_batch[name],
            active,
            tuple(factors[name]) if factors and name in factors else None,
        )
        for name, indices in assignment.items()
    ] + more


def _shuffle(stream: Stream, key: str) -> list[int]:
    """The frames of an epoch of a stream: each once, or its share of times, rounded up or down.

    The shares by systematic sampling: equally spaced marks, at a random offset, on a line made of the factors.
    """
    draw = random.Random(key)
    if stream.factors is None:
        order = list(stream.indices)
    else:
        count = len(stream.indices)
        spacing, offset = math.fsum(stream.factors) / count, draw.random()
        order, end = [], 0.0
        for index, factor in zip(stream.indices, stream.factors, strict=True):
            end += factor
            order += [index] * (min(math.ceil(end / spacing - offset), count) - len(order))
        order += [stream.indices[-1]] * (count - len(order))  # what rounding has lost
    draw.shuffle(order)
    return order


class CycleSampler:
    """Micro-batches of draws for PyTorch's DataLoader (as its batch sampler), from step `start` to `stop`.

    A step is a cycle, a fixed list of micro-batches: `repeats` of each stream that is active, in the order of the
    streams; with `merge` one for each repeat, which is those of all streams in one. The list is dealt to the ranks in
    turn, and this sampler gives those of `rank` of `world`.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        repeats: int,
        seed: int,
        start: int,
        stop: int,
        merge: bool = False,
        rank: int = 0,
        world: int = 1,
        teaching: Teaching | None = None,
    ):
        self.teaching = teaching
        self.streams, self.repeats, self.seed, self.merge = list(streams), repeats, seed, merge
        self.start, self.stop, self.rank, self.world = start, stop, rank, world
        self._orders: dict[tuple[str, int], list[int]] = {}

    def count_micro_batches(self, step: int) -> int:
        """Micro-batches of a step, on all ranks."""
        streams = len(self._list_active(step))
        return self.repeats * (min(streams, 1) if self.merge else streams)

    def list_own(self, step: int) -> list[int]:
        """Which of the step's micro-batches are this rank's, by number."""
        return list(range(self.rank, self.count_micro_batches(step), self.world))

    def find_fewest(self) -> int:
        """Micro-batches of the step that has the fewest."""
        ranges = [steps for stream in self.streams for steps in stream.active.values()]
        ranges += [] if self.teaching is None else [self.teaching.steps]
        changes = {step for steps in ranges for step in steps if step is not None}
        return min(self.count_micro_batches(step) for step in {self.start, *changes} if self.start <= step < self.stop)

    def __len__(self) -> int:
        return sum(len(self.list_own(step)) for step in range(self.start, self.stop))

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.start, self.stop):
            micro_batches = self._list_micro_batches(step)
            for number in self.list_own(step):
                yield micro_batches[number]

    def _list_micro_batches(self, step: int) -> list[list[Draw]]:
        micro_batches = [
            [self._draw(stream, brings, first + offset) for offset in range(stream.micro_batch)]
            for stream, brings in self._list_active(step)
            for first in range(
                step * self.repeats * stream.micro_batch,
                (step + 1) * self.repeats * stream.micro_batch,
                stream.micro_batch,
            )
        ]
        if not self.merge:
            return micro_batches
        return [
            [draw for micro_batch in micro_batches[repeat :: self.repeats] for draw in micro_batch]
            for repeat in range(self.repeats if micro_batches else 0)
        ]

    def _list_active(self, step: int) -> list[tuple[Stream, tuple[tuple[str, ...], ...]]]:
        """The streams that are drawn from in this step, and what their frames bring: the names whose labels, and, where
        teachers are heard, those that learn from them."""
        found: list[tuple[Stream, tuple[tuple[str, ...], ...]]] = []
        for stream in self.streams:
            names = stream.list_names(step)
            taught = () if self.teaching is None else self.teaching.list_names(step, stream.active)
            if names or (taught and not stream.brings):
                found.append((stream, (names, taught) if taught else (names,)))
        return found

    def _draw(self, stream: Stream, brings: tuple[tuple[str, ...], ...], position: int) -> Draw:
        epoch, index_in_epoch = divmod(position, len(stream.indices))
        if (stream.name, epoch) not in self._orders:
            if len(self._orders) > 2 * len(self.streams):
                self._orders.clear()
            self._orders[stream.name, epoch] = _shuffle(stream, f"{self.seed} {stream.name} {epoch}")
        seed = random.Random(f"{self.seed} {stream.name} {position}").getrandbits(63)
        index = self._orders[stream.name, epoch][index_in_epoch]
        return (index, seed, brings[0]) if len(brings) == 1 else (index, seed, brings[0], brings[1])
