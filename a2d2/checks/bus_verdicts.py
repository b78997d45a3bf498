"""Checks of bus files: join with the frames, signals, times, sign of the angle (docs/a2d2-format.md, section 7)."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from statistics import median

import numpy as np

from a2d2 import bus
from a2d2.checks.assumptions import (
    ANGLE_SAMPLES,
    ASSUMPTIONS,
    FASTER_KMH,
    LEAST_CORRELATION,
    LEAST_TURNS,
    MOST,
    SAMPLE_GAP_US,
    SENTINEL_SHARE,
)
from a2d2.checks.check import Check, compare_scenes, format_some, make_check, skip_check
from a2d2.checks.facts import YAW_RATE, BusFacts, FrameFacts
from a2d2.checks.known import BUS_SCENES, LARGEST_MAGNITUDE, MAIN_VIEW
from a2d2.checks.raw_set import RawSet


def check_bus(raw: RawSet, frames: list[FrameFacts], buses: list[BusFacts]) -> Iterator[Check]:
    names = [name for name in ASSUMPTIONS if name.startswith("bus_")]
    if not buses:
        yield from (skip_check(name, "no bus signals beside the dataset") for name in names)
        return
    yield compare_scenes("bus_scenes", {facts.scene for facts in buses}, BUS_SCENES)
    buses = [facts for facts in buses if not facts.damaged]
    yield from _check_join(raw, buses)
    items = sum(len(facts.timestamps) for facts in buses)
    if not items:
        yield from (skip_check(name, "no bus items that can be read") for name in names[names.index("bus_signals") :])
        return
    yield from _check_signals(buses, items)
    yield from _check_samples(buses)
    yield _check_bus_times(frames, buses)
    yield _check_sign(buses)


def _check_join(raw: RawSet, buses: list[BusFacts]) -> Iterator[Check]:
    """Only frames with a picture of MAIN_VIEW count: the bus files name no other camera."""
    wanted = defaultdict(set)
    for frame, kinds in raw.index.items():
        if frame.view == MAIN_VIEW and "camera" in kinds:
            wanted[frame.scene].add(frame.path("camera_info").name)
    rows = {
        facts.scene: {
            "items": len(facts.timestamps),
            "frames": len(wanted[facts.scene]),
            "joined": len(wanted[facts.scene] & facts.timestamps.keys()),
        }
        for facts in buses
        if wanted[facts.scene]
    }
    if not rows:
        reason = f"no scene with both bus signals and pictures of {MAIN_VIEW}"
        yield from (skip_check(name, reason) for name in ("bus_items", "bus_join"))
        return
    items, count, joined = (sum(row[key] for row in rows.values()) for key in ("items", "frames", "joined"))
    short = [
        f"{scene} {row['items']} for {row['frames']}" for scene, row in rows.items() if row["items"] < row["frames"]
    ]
    text = f"{items:,} items for {count:,} frames of {len(rows):,} scenes"
    text += f"; fewer items than frames in {len(short):,}: {format_some(short)}" if short else ""
    yield make_check("bus_items", not short, text, scenes=rows)
    text = f"{joined:,} of {count:,} frames ({joined / count:.1%})"
    yield make_check("bus_join", joined > MOST * count, text, joined=joined, frames=count)


def _check_signals(buses: list[BusFacts], items: int) -> Iterator[Check]:
    signals = Counter()
    for facts in buses:
        signals.update(facts.signals)
    for check, names in (("bus_signals", (bus.ANGLE, f"{bus.ANGLE}_sign")), ("bus_motion", (bus.SPEED, YAW_RATE))):
        text = f"of {items:,} items: " + ", ".join(f"{name} {signals[name] / items:.1%}" for name in names)
        holds = all(signals[name] > MOST * items for name in names)
        yield make_check(check, holds, text, items=items, signals=dict(signals.most_common()))


def _check_samples(buses: list[BusFacts]) -> Iterator[Check]:
    lengths = Counter()
    for facts in buses:
        lengths.update(facts.lengths)
    empty = lengths.pop(0, 0)
    samples, sentinels = (sum(getattr(facts, name) for facts in buses) for name in ("samples", "sentinels"))
    if not samples:
        yield from (
            skip_check(name, "no sample of the angle") for name in ("bus_samples", "bus_sentinels", "bus_magnitudes")
        )
        return
    middle = median(lengths.elements())
    unequal = sum(facts.unequal for facts in buses)
    text = f"median {middle:g}, {min(lengths)} to {max(lengths)}; no sample in {empty:,} items; "
    text += f"another number of signs in {unequal:,} items"
    low, high = ANGLE_SAMPLES
    yield make_check(
        "bus_samples", low <= middle <= high and not unequal, text, lengths=dict(sorted(lengths.items())), empty=empty,
        unequal=unequal,
    )  # fmt: skip
    text = f"{sentinels:,} of {samples:,} samples ({sentinels / samples:.1%})"
    yield make_check("bus_sentinels", sentinels <= SENTINEL_SHARE * samples, text, sentinels=sentinels, samples=samples)
    spans = [facts.magnitudes for facts in buses if facts.magnitudes]
    if not spans:
        yield skip_check("bus_magnitudes", "no usable sample of the angle")
        return
    least, greatest = min(low for low, _ in spans), max(high for _, high in spans)
    text = f"{least:g} to {greatest:g}, without sentinels"
    yield make_check(
        "bus_magnitudes", least >= 0 and greatest <= LARGEST_MAGNITUDE, text, least=least, greatest=greatest
    )


def _check_bus_times(frames: list[FrameFacts], buses: list[BusFacts]) -> Check:
    timestamps = {name: timestamp for facts in buses for name, timestamp in facts.timestamps.items()}
    pairs = {
        str(facts.frame): (timestamps[name], facts.timestamp)
        for facts in frames
        if (name := facts.frame.path("camera_info").name) in timestamps and facts.timestamp is not None
    }
    gaps = [gap for facts in buses for gap in facts.sample_gaps]
    if not pairs and not gaps:
        return skip_check("bus_times", "no times to compare")
    other = [name for name, (item, frame) in pairs.items() if item != frame]
    late = sum(gap > SAMPLE_GAP_US for gap in gaps)
    text = f"{len(pairs) - len(other):,} of {len(pairs):,} frames"
    text += f"; another time in {format_some(other)}" if other else ""
    text += f"; nearest sample at most {max(gaps) / 1000:g} ms away" if gaps else ""
    text += f", in {late:,} items more than {bus.LIMIT_MS:g} ms" if late else ""
    return make_check("bus_times", not other and not late, text, other=other, late=late, compared=len(pairs))


def _correlate(turns: list[tuple[float, float]]) -> float | None:
    """Pearson's r of (angle, yaw rate); None for fewer than LEAST_TURNS frames or if one of the two does not vary."""
    if len(turns) < LEAST_TURNS:
        return None
    angles, rates = np.array(turns).T
    if not (angles.std() > 0 and rates.std() > 0):
        return None
    return float(np.corrcoef(angles, rates)[0, 1])


def list_turns(facts: BusFacts) -> list[tuple[float, float]]:
    """(angle, yaw rate) of the frames above FASTER_KMH: a slow or parked car does not turn as its wheel does."""
    return [
        (turn.angle, turn.yaw_rate)
        for turn in facts.turns.values()
        if turn.yaw_rate is not None and turn.speed is not None and turn.speed > FASTER_KMH
    ]


def _check_sign(buses: list[BusFacts]) -> Check:
    of_scenes = {facts.scene: list_turns(facts) for facts in buses}
    turns = [turn for of_scene in of_scenes.values() for turn in of_scene]
    found = _correlate(turns)
    if found is None:
        reason = f"{len(turns)} frames with angle, speed and yaw rate are too few, or their values do not vary"
        return skip_check("bus_sign", reason)
    details = {scene: _correlate(of_scene) for scene, of_scene in of_scenes.items()}
    opposed = [scene for scene, r in details.items() if r is not None and r < 0]
    text = f"r = {found:.3f} over {len(turns):,} frames"
    text += f"; negative in {format_some(opposed)}" if opposed else ""
    return make_check("bus_sign", found >= LEAST_CORRELATION, text, r=found, frames=len(turns), scenes=details)
