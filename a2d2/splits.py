"""Splits: rules that divide frames into training, validation and test subsets.

Frames of one drive look alike, so a split must not divide a scene if validation is to measure generalization.
"""

import fnmatch
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from a2d2.frames import SCENE_PATTERN, Frame
from a2d2.images import read_yaml

SUBSETS = ("train", "val", "test")

# the split that A2D2's authors sent to other groups (docs/a2d2-format.md, section 9.1)
_PAPER_VAL = {"20181108_141609", "20181204_154421"}
_PAPER_TEST = {"20181016_125231", "20181108_084007", "20181204_170238"}
_PAPER_DIVIDED, _PAPER_DIVIDED_FROM = "20181008_095521", 55000
_MOVED_FOR_BOXES = "20180925_101535"


def _assign_paper(frame: Frame) -> str:
    if frame.scene in _PAPER_TEST:
        return "test"
    in_val_range = frame.scene == _PAPER_DIVIDED and int(frame.id) >= _PAPER_DIVIDED_FROM
    return "val" if in_val_range or frame.scene in _PAPER_VAL else "train"


def _assign_paper_boxes(frame: Frame) -> str:
    return "val" if frame.scene == _MOVED_FOR_BOXES else _assign_paper(frame)


def _split_each(frames: list[Frame], assign) -> dict[str, list[Frame]]:
    subsets = {subset: [] for subset in SUBSETS}
    for frame in frames:
        subsets[assign(frame)].append(frame)
    return subsets


def _split_thesis(frames: list[Frame]) -> dict[str, list[Frame]]:
    scenes = defaultdict(list)
    for frame in frames:
        scenes[frame.scene, frame.view].append(frame)
    subsets = {subset: [] for subset in SUBSETS}
    for members in scenes.values():
        first = int(0.8 * len(members))
        subsets["train"] += members[:first]
        subsets["val"] += members[first:]
    return subsets


def _split_by_scene(frames: list[Frame], fractions: tuple[float, ...], seed: int) -> dict[str, list[Frame]]:
    scenes = sorted({frame.scene for frame in frames})
    random.Random(seed).shuffle(scenes)
    val, test = _count_scenes(len(scenes), fractions)
    of_scene = dict.fromkeys(scenes[:val], "val") | dict.fromkeys(scenes[val : val + test], "test")
    return _split_each(frames, lambda frame: of_scene.get(frame.scene, "train"))


def _count_scenes(scenes: int, fractions: tuple[float, ...]) -> tuple[int, int]:
    """Numbers of validation and of test scenes; of three or more scenes, each subset with a fraction > 0 gets one."""
    least = [int(fraction > 0 and scenes >= len(SUBSETS)) for fraction in fractions]
    val, test = (max(round(scenes * fraction), few) for fraction, few in zip(fractions[1:], least[1:], strict=True))
    val = min(val, scenes - least[0] - least[2])
    return val, min(test, scenes - least[0] - val)


Listed = Mapping[str, Sequence[str]]
"""Subset -> frames "scene/view/id", scenes, or patterns of either with *."""


def read_listed(path: Path) -> Listed:
    """The content of a split file. ValueError, with the file's name, if it is missing or none, or if an entry is no
    text, as a number or a date without quotes."""
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"data.split_file: {error}") from error
    known = isinstance(content, dict) and content and set(content) <= set(SUBSETS)
    if not known or not all(isinstance(entries, list) for entries in content.values()):
        raise ValueError(
            f"data.split_file: {path} must hold lists of frames or scenes under {', '.join(SUBSETS)}, and no other key"
        )
    for subset, entries in content.items():
        for entry in entries:
            if not isinstance(entry, str):
                # YAML reads 0012 as 10, 1.10 as 1.1 and 1_0 as 10: which scene was meant is not known any more
                raise ValueError(
                    f"data.split_file: {path}: {entry!r} under {subset} is no text: put the name in quotes"
                )
    return {subset: list(entries) for subset, entries in content.items()}


def _split_listed(frames: list[Frame], listed: Listed) -> dict[str, list[Frame]]:
    """A frame that is not listed is in no subset. ValueError for one in two subsets, and for an entry without a
    frame."""
    subset_of: dict[Frame, tuple[str, str]] = {}
    by_name: dict[str, list[Frame]] = defaultdict(list)
    for frame in frames:
        by_name[str(frame)].append(frame)
        by_name[frame.scene].append(frame)
    for subset, entries in listed.items():
        for entry in entries:
            names = fnmatch.filter(by_name, entry) if "*" in entry else [entry]
            found = [frame for name in names for frame in by_name.get(name, ())]
            if not found:
                raise ValueError(f"the split lists {entry!r} under {subset}, and there is no such frame or scene")
            for frame in found:
                before = subset_of.setdefault(frame, (subset, entry))
                if before[0] != subset:
                    raise ValueError(f"the split lists {frame} under {before[0]} ({before[1]}) and {subset} ({entry})")
    return {subset: [frame for frame in frames if subset_of.get(frame, ("",))[0] == subset] for subset in SUBSETS}


SPLITS = ("paper", "paper_boxes", "thesis", "by_scene", "all", "listed")
_OF_A2D2 = ("paper", "paper_boxes")


def split_frames(
    frames: Iterable[Frame],
    name: str,
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    listed: Listed | None = None,
) -> dict[str, list[Frame]]:
    """Divide frames into {"train": [...], "val": [...], "test": [...]}, each sorted; a subset may be empty.

    paper: the split of A2D2's authors, by scene. paper_boxes: the same, with one more scene in validation, because the
    paper's validation scenes have almost no boxes. thesis: the last 20 % of each scene are validation frames, which
    look like the training frames. by_scene: scenes drawn with the seed, by `fractions` of (train, val, test). all: all
    frames are training frames. listed: as `listed` says, what it does not name is in no subset. ValueError for another
    name, and for A2D2's own splits of other scenes.
    """
    frames = sorted(frames, key=lambda frame: (frame.scene, frame.view, frame.id))  # faster than comparing frames
    foreign = next((frame.scene for frame in frames if not SCENE_PATTERN.match(frame.scene)), None)
    if name in _OF_A2D2 and foreign is not None:
        raise ValueError(
            f"data.split: {name} divides the scenes of A2D2, and {foreign} is none of these: take by_scene or listed"
        )
    if name == "listed":
        return _split_listed(frames, listed or {})
    if name == "paper":
        return _split_each(frames, _assign_paper)
    if name == "paper_boxes":
        return _split_each(frames, _assign_paper_boxes)
    if name == "thesis":
        return _split_thesis(frames)
    if name == "by_scene":
        return _split_by_scene(frames, fractions, seed)
    if name == "all":
        return {"train": frames, "val": [], "test": []}
    raise ValueError(f"no split {name!r}: choose one of {', '.join(SPLITS)}")
