"""Pseudo-labels: write what teachers say about training frames, and how sure they are, for other networks to learn.

    python pseudo_label.py runs/depth runs/steering [...] --data Datasets/processed/1024x640 --out pseudo/single
    python pseudo_label.py runs/a runs/b --calibrate runs/held_out --out pseudo/ensemble

Of each task all teachers that have it are averaged, each over the picture and its mirror image. Only training frames
are looked at: a frame that any teacher was validated or tested on is refused. A config takes the folder in
`data.pseudo.roots`; docs/pseudo-labels.md describes it. The same command goes on where it was stopped.
"""

import argparse
import sys
from pathlib import Path

from a2d2.console import allow_any_text, parse_shard
from tasks.options import OPTIONS
from training.arguments import count, count_or_none
from training.stopping import exit_on_interrupt

DONE, PARTLY_FAILED = 0, 3


def read_arguments() -> argparse.Namespace:
    allow_any_text()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("teachers", nargs="+", type=Path, metavar="TEACHER", help="run folders or weights files")
    parser.add_argument("--data", help="preprocessed dataset (default: those of the first teacher)")
    parser.add_argument("--out", required=True, type=Path, help="folder for the pseudo-labels")
    parser.add_argument("--tasks", nargs="+", choices=list(OPTIONS), help="default: all tasks of the teachers")
    parser.add_argument(
        "--calibrate",
        nargs="+",
        type=Path,
        default=[],
        metavar="RUN",
        help="run folders with data.hold_out, trained like the teachers: scores are calibrated on the labels they have "
        "held out",
    )
    parser.add_argument(
        "--unrecorded",
        action="store_true",
        help="also frames that are in no subset of any teacher, such as pictures that have come since",
    )
    parser.add_argument("--shard", type=parse_shard, default="1/1", metavar="I/N", help="part I of N, for job arrays")
    parser.add_argument("--overwrite", action="store_true", help="make finished pseudo-labels again")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the networks")
    parser.add_argument("--micro-batch", type=count, default=4, help="pictures at a time")
    parser.add_argument("--workers", type=count_or_none, default=2, help="processes that load pictures")
    return parser.parse_args()


if __name__ == "__main__":
    # before the slow imports, so that help and mistakes take no time and Ctrl-C no traceback
    exit_on_interrupt("pseudo_label")
    ARGUMENTS = read_arguments()

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from a2d2.dataset import DatasetError, FrameDataset
from a2d2.frames import Frame, report_path
from a2d2.images import read_json, sweep_temporary
from a2d2.predictions import Picture, holds_predictions, open_folder
from experiment import (
    WRITTEN,
    Data,
    Trained,
    WrongUseError,
    describe_written,
    find_other_picture,
    index_data,
    load_trained,
    pick_device,
)
from predict import Speaker, find_common_cameras, predict_pictures, run_program
from tasks.task import SoftTarget, Task, TeacherOutput
from training.cycle import copy_to_cpu
from training.loading import load_batches
from training.record import Record
from training.sampling import parse_assignment


@dataclass(kw_only=True)
class Teachers(Speaker):
    """Networks that are asked together. `tasks`: name -> the task as they have learned it together, with the options of
    the first that has it; `calibration`: of each task what makes its scores those of frequencies."""

    teachers: list[Trained]
    calibration: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the input of all."""
        return self.trained.size

    @property
    def kinds(self) -> list[str]:
        return [kind for task in self.tasks.values() for kind in task.describe_soft_files(self.size)]

    @torch.no_grad()
    def ask(
        self, image: UInt8[Tensor, "B 3 H W"], size: tuple[int, int], pictures: Sequence[str]
    ) -> dict[str, SoftTarget]:
        """Of each task what its teachers say about a batch, for pictures of (width, height) `size`; `pictures`: what
        they are called. ValueError for a teacher that does not answer in finite numbers."""
        image = image.to(self.device, non_blocking=True)
        outputs: dict[str, list[TeacherOutput]] = {name: [] for name in self.tasks}
        speakers: dict[str, list[Task]] = {name: [] for name in self.tasks}
        with self.autocast():
            for teacher in self.teachers:
                own = [name for name in self.tasks if name in teacher.tasks]
                for mirrored in (False, True):
                    found = teacher.net(image.flip(3) if mirrored else image, dict.fromkeys(own))
                    if (row := find_not_finite([found[name] for name in own])) is not None:
                        raise ValueError(
                            f"{teacher.name} does not answer in finite numbers about {pictures[row]}: its weights are "
                            "damaged, its training has failed, or --precision bf16 is too coarse for it; leave it out"
                        )
                    for name in own:
                        output = teacher.tasks[name].convert_output(found[name], self.tasks[name])
                        outputs[name].append((output, mirrored))
                        speakers[name].append(teacher.tasks[name])
        return {
            name: task.blend(outputs[name], size, self.calibration.get(name), speakers[name])
            for name, task in self.tasks.items()
        }

    def predict(
        self, image: UInt8[Tensor, "B 3 H W"], sizes: Sequence[tuple[int, int]], pictures: Sequence[str]
    ) -> list[dict[str, Callable[[], bytes]]]:
        """For each picture kind -> a function that makes the content of the file; sizes, pictures: of the pictures
        their sizes, and what they are called."""
        files: list[dict[str, Callable[[], bytes]]] = [{} for _ in sizes]
        for size in dict.fromkeys(sizes):
            said = self.ask(image, size, pictures)
            for name, task in self.tasks.items():
                own = copy_to_cpu(said[name])
                for row, its in enumerate(sizes):
                    if its == size:
                        contents = task.encode_soft(own, row, size, self.calibration.get(name))
                        files[row] |= {kind: partial(bytes, content) for kind, content in contents.items()}
        return files


def find_not_finite(outputs: Sequence[Any]) -> int | None:
    """The first row of a batch of outputs with a number in it that is not finite; None if there is none."""
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    finite = torch.stack([leaf.isfinite().flatten(1).all(dim=1) for leaf in leaves]).all(dim=0).tolist()
    return None if all(finite) else finite.index(False)


def gather_teachers(
    paths: Sequence[Path], names: Sequence[str] | None, device: torch.device, autocast: Callable
) -> Teachers:
    """WrongUseError for teachers that cannot be averaged, or that lack a task that is asked for."""
    teachers = [load_trained(path, device) for path in paths]
    for teacher in teachers:
        teacher.net.to(memory_format=torch.channels_last)
        if teacher.size != teachers[0].size:
            raise WrongUseError(
                f"{teachers[0].name} sees pictures of {teachers[0].size}, {teacher.name} of {teacher.size}: label with "
                "each alone, into folders of their own"
            )
    by_digest: dict[str | None, Trained] = {}
    for path, teacher in zip(paths, teachers, strict=True):
        if (same := by_digest.setdefault(teacher.digest, teacher)) is not teacher:
            raise WrongUseError(f"{path} has the same weights as {same.path}, which would count twice: leave one out")
    there = list(dict.fromkeys(name for teacher in teachers for name in teacher.tasks))
    if missing := [name for name in names or () if name not in there]:
        raise WrongUseError(f"--tasks {missing[0]}: no teacher has it; they have {', '.join(there)}")
    tasks: dict[str, Task] = {}
    for teacher in teachers:
        for name, task in teacher.tasks.items():
            if names is not None and name not in names:
                continue
            first = tasks.setdefault(name, task)
            ours, its = first.describe_agreement(teacher.size), task.describe_agreement(teacher.size)
            if differing := [key for key in ours if ours[key] != its.get(key)]:
                raise WrongUseError(
                    f"{teacher.name}: its {name} cannot be averaged with that of the teacher before it: "
                    f"{differing[0]} is {its.get(differing[0])}, and was {ours[differing[0]]}; label with each alone, "
                    "into folders of their own"
                )
    chosen = {
        name: task.join_teachers([teacher.tasks[name] for teacher in teachers if name in teacher.tasks])
        for name, task in tasks.items()
    }
    used = [teacher for teacher in teachers if chosen.keys() & teacher.tasks.keys()]
    return Teachers(trained=used[0], tasks=chosen, device=device, autocast=autocast, confidence=True, teachers=used)


def choose_frames(teachers: Teachers, data: Data, unrecorded: bool) -> list[Frame]:
    """The training frames of the teachers in the dataset. ValueError if one of these was validated or tested on by
    another, if a teacher does not say what it was trained on, or if there are none."""
    part: dict[str, tuple[str, str]] = {}
    for teacher in teachers.teachers:
        if teacher.record is None:
            raise ValueError(f"{teacher.name} does not say which frames it was trained on, so it cannot teach")
        for subset, members in teacher.record.subsets.items():
            for frame in members:
                before = part.setdefault(frame, (subset, teacher.name))
                if before[0] != subset and "train" in (before[0], subset):
                    raise ValueError(
                        f"{frame} is a {before[0]} frame of {before[1]} and a {subset} frame of {teacher.name}: "
                        "teachers must have the same training frames"
                    )
    frames = [frame for frame in data.others if part.get(str(frame), ("none",))[0] == "train"]
    unknown = [frame for frame in data.others if str(frame) not in part]
    if unrecorded:
        frames += unknown
    if not frames:
        known = len(data.others) - len(unknown)
        raise ValueError(
            f"no training frame of {', '.join(each.name for each in teachers.teachers)} in "
            f"{', '.join(map(str, data.roots))}: {known} of its frames are for validation or test, and {len(unknown)} "
            "are in none of their subsets (--unrecorded takes these)"
        )
    return sorted(frames)


def check_views(teachers: Teachers, frames: Sequence[Frame], data: Data) -> None:
    """ValueError for pictures of another field of view than a teacher was trained on: depth, size and angle would be
    wrong without a word."""
    for teacher in teachers.teachers:
        if conflict := teacher.find_view_conflict(frames, data):
            raise ValueError(
                f"{teacher.name} was trained on {conflict}; name a dataset of the same cameras with --data, or train a "
                "teacher on this one"
            )


def calibrate(teachers: Teachers, paths: Sequence[Path], data: Data, workers: int) -> set[str]:
    """Fit the confidence of the teachers to frequencies, with networks that were trained like them but for the labels
    that they have held out. Returns the names of the frames whose labels were used.

    WrongUseError for a run that has held out nothing, or nothing of use. ValueError for held-out labels of frames that
    a teacher is validated or tested on, or that the run, by what it started from, may have learned from.
    """
    scored = {
        frame: (subset, teacher.name)
        for teacher in teachers.teachers
        if teacher.record is not None
        for subset in ("val", "test")
        for frame in teacher.record.subsets.get(subset, ())
    }
    used: set[str] = set()
    for path in paths:
        try:
            held_out = parse_assignment((path / "assignment.json").read_text(encoding="utf-8"), "held_out")
        except (OSError, ValueError) as error:
            raise WrongUseError(f"--calibrate {path}: it must be a run folder ({error})") from error
        if not any(held_out.values()):
            raise WrongUseError(f"--calibrate {path}: it has held out no label; train it with data.hold_out")
        shared = [name for name in teachers.tasks if held_out.get(name)]
        own = gather_teachers([path], None, teachers.device, teachers.autocast)
        shared = [name for name in shared if name in own.tasks]
        record = own.teachers[0].record
        if shared and (record is None or record.inherited is None):
            raise ValueError(f"--calibrate {path}: it does not say which frames the weights it began with have seen")
        begun: set[str] = set() if record is None else set(record.inherited or ())
        calibrated = []
        for name in shared:
            if name in teachers.calibration:
                raise WrongUseError(
                    f"--calibrate {path}: {name} is calibrated by {teachers.calibration[name]['run']} already; give "
                    "one run for each task"
                )
            if seen := [frame for frame in held_out[name] if frame in scored]:
                subset, teacher = scored[seen[0]]
                raise ValueError(
                    f"--calibrate {path}: {len(seen)} of its held-out labels of {name} are of frames that {teacher} is "
                    f"scored on, such as {seen[0]} ({subset}): train it with the data.split of the teachers"
                )
            if seen := [frame for frame in held_out[name] if frame in begun]:
                raise ValueError(
                    f"--calibrate {path}: {len(seen)} of its held-out labels of {name}, such as that of {seen[0]}, are "
                    "of frames that the weights it began with, or its teachers, were trained on: train it from scratch"
                )
            by_name = {str(frame): frame for frame in data.others}
            frames = [by_name[frame] for frame in held_out[name] if frame in by_name]
            if not frames:
                raise ValueError(
                    f"--calibrate {path}: none of its held-out labels is in {', '.join(map(str, data.roots))}"
                )
            if own.tasks[name].describe_agreement(own.size) != teachers.tasks[name].describe_agreement(teachers.size):
                raise WrongUseError(f"--calibrate {path}: its {name} has other classes or strides than the teachers'")
            check_views(own, frames, data)
            found = own.tasks[name].calibrate(say_about(own, name, frames, data, workers))
            if found:
                teachers.calibration[name] = found | {"run": own.teachers[0].name, "labels": len(frames)}
                used |= set(map(str, frames))
                calibrated.append(name)
        if not calibrated:
            raise WrongUseError(
                f"--calibrate {path}: it has held out labels of {', '.join(held_out)}, and no confidence of the "
                f"teachers' {', '.join(teachers.tasks)} can be calibrated with them"
            )
    return used


def say_about(
    teachers: Teachers, name: str, frames: list[Frame], data: Data, workers: int
) -> Iterator[tuple[SoftTarget, Any]]:
    """What the teachers of a task say about labelled frames, and the targets, in batches."""
    task = {name: teachers.tasks[name]}
    dataset = FrameDataset(frames, data.roots, task, size=teachers.size)
    with closing(load_batches(dataset, workers, teachers.device, batch_size=4)) as batches:
        for batch in tqdm(batches, f"calibrate {name}", -(-len(frames) // 4), leave=False, unit="batch"):
            if name in batch["rows"]:
                rows = batch["rows"][name]
                pictures = [batch["frame"][row] for row in rows.tolist()]
                said = teachers.ask(batch["image"][rows], teachers.size, pictures)[name]
                yield said, batch["targets"][name]


def describe(teachers: Teachers, arguments: argparse.Namespace, source: str, used: Collection[str]) -> dict[str, Any]:
    """The section "predictions" of dataset.json: the teachers, what they were trained on, and the calibration; `used`:
    the frames on whose labels they were calibrated."""
    first = teachers.trained
    manifest = [
        {
            "run": teacher.name,
            "weights": teacher.digest,
            "step": teacher.header.get("step"),
            "tasks": list(teacher.tasks),
            **_describe_annotated(teacher),
            "assignment": teacher.record.assignment if teacher.record else None,
        }
        for teacher in teachers.teachers
    ]
    digest = hashlib.sha256(json.dumps([manifest, teachers.calibration], sort_keys=True).encode()).hexdigest()
    return {
        "run": ", ".join(teacher.name for teacher in teachers.teachers),
        "weights": digest,
        "step": first.header.get("step"),
        "recipe": None,
        "input_size": list(teachers.size),
        "precision": arguments.precision,
        "source": source,
        "tasks": {name: task.options.model_dump(mode="json") for name, task in teachers.tasks.items()},
        "label_statistics": {name: task.label_statistics for name, task in teachers.tasks.items()},
        "protocol": first.header.get("protocol", {}),
        "split": first.header["split"],
        "record": merge_records(teachers.teachers, used).to_dict(with_labels=False),
        "teachers": manifest,
        "calibration": teachers.calibration,
    }


def _describe_annotated(teacher: Trained) -> dict[str, Any]:
    """`annotated`: task -> the classes that the teacher has learned, of tasks of which it has not learned all."""
    known = {name: task.label_statistics.get("annotated") for name, task in teacher.tasks.items()}
    known = {name: names for name, names in known.items() if names is not None}
    return {"annotated": known} if known else {}


def merge_records(teachers: Sequence[Trained], used: Collection[str] = ()) -> Record:
    """The record of the first teacher, which has inherited what the others were trained on, and the frames `used` to
    calibrate them."""
    first, *others = (teacher.record for teacher in teachers)
    assert first is not None
    inherited = None if any(each is None or each.inherited is None for each in [first, *others]) else set()
    if inherited is not None:
        inherited = set(first.inherited or ()).union(used, *(each.trained for each in others))
        inherited -= set(first.subsets["train"])
    return replace(first, inherited=None if inherited is None else tuple(sorted(inherited)))


def run(arguments: argparse.Namespace) -> int:
    device = pick_device(arguments.device, "--device")
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=arguments.precision == "bf16")
    teachers = gather_teachers(arguments.teachers, arguments.tasks, device, autocast)
    split = teachers.trained.split
    try:
        data = index_data([arguments.data] if arguments.data else split.roots, split.views)
    except DatasetError as error:
        raise ValueError(str(error).replace("data.roots", "--data")) from error
    frames = choose_frames(teachers, data, arguments.unrecorded)
    check_views(teachers, frames, data)
    used = calibrate(teachers, arguments.calibrate, data, arguments.workers)
    source = ", ".join(os.path.abspath(root) for root in data.roots)
    kinds = {
        kind: about
        for task in teachers.tasks.values()
        for kind, about in task.describe_soft_files(teachers.size).items()
    }
    out = arguments.out
    before = read_json(out / "dataset.json") if holds_predictions(out) and not arguments.overwrite else {}
    if (other := find_other_picture(before, frames, data)) is not None:
        raise ValueError(
            f"{out} holds pseudo-labels of other pictures with the same names, such as {other}: name another --out, or "
            "make them again with --overwrite"
        )
    header = describe(teachers, arguments, source, used)
    written = {WRITTEN: describe_written(frames, data)}
    open_folder(out, data.size, find_common_cameras(data), kinds, header, arguments.overwrite, more=written)
    sweep_temporary(out)
    image_kinds = {path: root.image_kind for path, root in data.roots.items()}
    pictures = [Picture(frame.path(image_kinds[frame.root]), frame=frame) for frame in frames]
    index, shards = arguments.shard
    report = predict_pictures(teachers, pictures[index - 1 :: shards], data.size, arguments)
    path = report_path(out, "pseudo_label", arguments.shard)
    report.write(path)
    for name, found in teachers.calibration.items():
        print(f"{name}: calibrated on {found['labels']} labels that {found['run']} has held out")
    print(f"pseudo_label: {report.done} done, {report.skipped} skipped, {len(report.failed)} failed; report in {path}")
    return PARTLY_FAILED if report.failed else DONE


def main(arguments: argparse.Namespace | None = None) -> int:
    arguments = arguments or read_arguments()
    return run_program("pseudo_label", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
