"""Intervals of scores by a bootstrap over what is independent: scenes, and in a scene blocks of some seconds.

Neighbouring frames are alike (the autocorrelation of A2D2's steering falls to zero after 5 s), so to draw single frames
would give intervals that are far too narrow. A draw takes as many scenes as there are, with replacement, and of each
taken scene as many blocks as it has, with replacement. All runs are scored on the same draws, so that the interval of a
difference is a paired one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from a2d2.derive import read_frame_times
from a2d2.frames import Frame, times_path

BLOCK_SECONDS = 5.0
LEVEL = 0.95
FEW_BLOCKS = 10  # with fewer, an interval says little, and the table says so


@dataclass(frozen=True)
class Blocks:
    """Of each frame the block it is in, counted over all scenes; `scene` (blocks,): of each block its scene; `untimed`:
    scenes of which some frame has no time, each one block."""

    of_frame: Int64[np.ndarray, " n"]
    scene: Int64[np.ndarray, " blocks"]
    untimed: tuple[str, ...] = ()


def read_times(frames: Sequence[Frame]) -> list[float | None]:
    """The recording time of each frame in seconds, from the frames.json beside its picture; None where unknown."""
    tables: dict[Path, dict] = {}
    times = []
    for frame in frames:
        path = times_path(frame)
        if path not in tables:
            tables[path] = read_frame_times(path)
        stamp = tables[path].get(frame.id)
        times.append(stamp / 1e6 if isinstance(stamp, int | float) and not isinstance(stamp, bool) else None)
    return times


def find_blocks(scenes: Sequence[str], times: Sequence[float | None]) -> Blocks:
    """Cut the frames of each scene into blocks that last BLOCK_SECONDS or more; what is left at its end belongs to the
    block before it."""
    of_frame = np.zeros(len(scenes), dtype=np.int64)
    scene_of_block: list[int] = []
    untimed = []
    for number, scene in enumerate(dict.fromkeys(scenes)):
        members = [index for index, name in enumerate(scenes) if name == scene]
        known = [times[index] for index in members]
        if any(time is None for time in known):
            untimed.append(scene)
            known = [0.0] * len(members)
        order = sorted(range(len(members)), key=known.__getitem__)
        last, start = known[order[-1]], known[order[0]]
        scene_of_block.append(number)
        for place in order:
            # a new block begins when the one before is long enough, and only if it can be long enough itself
            if known[place] - start >= BLOCK_SECONDS and last - known[place] >= BLOCK_SECONDS:
                scene_of_block.append(number)
                start = known[place]
            of_frame[members[place]] = len(scene_of_block) - 1
    return Blocks(of_frame, np.array(scene_of_block, dtype=np.int64), tuple(untimed))


def draw_counts(blocks: Blocks, draws: int, seed: int = 0) -> Float64[np.ndarray, "R n"]:
    """How often each frame counts in each of R draws."""
    rng = np.random.default_rng(seed)
    scenes = int(blocks.scene.max(initial=-1)) + 1
    counts = np.zeros((draws, len(blocks.scene)))
    members = [np.flatnonzero(blocks.scene == scene) for scene in range(scenes)]
    for row in counts:
        for scene in rng.integers(0, scenes, scenes):
            own = members[scene]
            row += np.bincount(own[rng.integers(0, len(own), len(own))], minlength=len(row))
    return counts[:, blocks.of_frame]


def find_interval(values: Float64[np.ndarray, " R"]) -> tuple[float, float] | None:
    """The interval with LEVEL of the draws in it, as many below as above; None unless nearly every draw has a value,
    and they differ."""
    known = values[np.isfinite(values)]
    if len(known) < LEVEL * len(values) or len(known) < 2 or np.ptp(known) == 0:
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
