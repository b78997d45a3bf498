"""Predict: write what a network says about frames, pictures or videos, as files in the format of labels.

    python predict.py runs/demo --split test --out predictions/demo                    # frames of the run's own dataset
    python predict.py runs/demo --data Datasets/processed/1024x640 --out predictions/all
    python predict.py runs/demo --images FILE FOLDER VIDEO ... --out predictions/mine  # any pictures

The same command goes on where it was stopped. docs/predictions.md describes the files; evaluate.py and visualize.py
take the folder in place of the run.
"""

import argparse
import sys
from pathlib import Path

from a2d2.console import allow_any_text, parse_shard
from tasks.options import OPTIONS
from training.arguments import count, count_or_none
from training.stopping import exit_on_interrupt

DONE, ERROR, WRONG_USE, PARTLY_FAILED = 0, 1, 2, 3


def read_arguments() -> argparse.Namespace:
    allow_any_text()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="run folder or weights file")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--data", help="preprocessed dataset (default: that of the run)")
    where.add_argument("--images", nargs="+", type=Path, metavar="PATH", help="pictures, videos and folders of them")
    parser.add_argument(
        "--split",
        choices=["train", "val", "test", "all"],
        default="all",
        help="frames of this subset, as the run has recorded it (default: all frames of the dataset)",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for the predictions")
    parser.add_argument("--tasks", nargs="+", choices=list(OPTIONS), help="default: all tasks of the run")
    parser.add_argument("--confidence", action="store_true", help="also write how sure each prediction is")
    parser.add_argument(
        "--format",
        choices=["labels", "coco", "kitti"],
        default="labels",
        help="beside the files in the format of labels: coco: one file of detections; kitti: a folder of depth maps",
    )
    parser.add_argument("--shard", type=parse_shard, default="1/1", metavar="I/N", help="part I of N, for job arrays")
    parser.add_argument("--overwrite", action="store_true", help="predict finished frames again")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the network")
    parser.add_argument("--micro-batch", type=count, default=4, help="pictures at a time")
    parser.add_argument("--workers", type=count_or_none, default=2, help="processes that load pictures")
    return parser.parse_args()


if __name__ == "__main__":
    # before the slow imports, so that help and mistakes take no time and Ctrl-C no traceback
    exit_on_interrupt("predict")
    ARGUMENTS = read_arguments()

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from a2d2.checks.known import FRONT_MATRIX, FULL_SIZE
from a2d2.dataset import DatasetError, Geometry, read_dataset
from a2d2.frames import Frame, list_frames, report_path
from a2d2.images import ImageError, lock_folder, read_json, sweep_temporary, write_bytes, write_json
from a2d2.predictions import Picture, describe_video, find_base, list_pictures, open_folder, read_video
from experiment import Data, Trained, WrongUseError, load_trained, load_trained_data, pick_device
from scoring.exchange import EXPORTS
from tasks.task import Task
from training.cycle import copy_to_cpu
from training.loading import WorkerError, explain_memory, explain_worker_death, load_batches

PANELS = "panels"  # folder with those of videos
VIDEO_WIDTH = 1280  # pixels
UNSURE_FRAMES = 2  # so many frames the header of a whole video may be off


class Pictures(Dataset):
    """Pictures at the network's input size. A damaged one is a reason in place of a picture, and ends nothing.

    A batch: `image` uint8 (B, 3, H, W), RGB; `indices` and `sizes`, (width, height) as they are on disk, of its B
    pictures; `failed`: (index, reason) of those that are not in it.
    """

    def __init__(self, pictures: Sequence[Picture], size: tuple[int, int], own: tuple[int, int] | None):
        """own: the (width, height) that all pictures must have, or None."""
        self.pictures, self.size, self.own = pictures, size, own

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str, tuple[int, int]]:
        try:
            image = self.pictures[index].read()
        except (ImageError, OSError) as error:
            return index, str(error), (0, 0)
        own = (image.shape[1], image.shape[0])
        if self.own is not None and own != self.own:
            return index, f"{self.pictures[index].path} is {own[0]}x{own[1]}, its dataset {self.own}", (0, 0)
        return index, resize(image, self.size), own

    def collate(self, samples: list[tuple[int, Tensor | str, tuple[int, int]]]) -> dict[str, Any]:
        good = [sample for sample in samples if isinstance(sample[1], Tensor)]
        return {
            "image": torch.stack([image for _, image, _ in good]) if good else torch.zeros(0, dtype=torch.uint8),
            "indices": [index for index, _, _ in good],
            "sizes": [own for _, _, own in good],
            "failed": [(index, reason) for index, reason, _ in samples if isinstance(reason, str)],
        }


def resize(image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[Tensor, "3 H W"]:
    """A picture at the network's input size, as it is resized in training and evaluation."""
    geometry = Geometry.identity((image.shape[1], image.shape[0]), size)
    return geometry.transform_image(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)).contiguous()


@dataclass
class Speaker:
    """A network that predicts: the tasks that are wanted of it, and whether also how sure it is."""

    trained: Trained
    tasks: dict[str, Task]
    device: torch.device
    autocast: Callable
    confidence: bool

    @torch.no_grad()
    def predict(
        self, image: UInt8[Tensor, "B 3 H W"], sizes: Sequence[tuple[int, int]], pictures: Sequence[str]
    ) -> list[dict[str, Callable[[], bytes]]]:
        """For each picture kind -> a function that makes the content of the file; sizes, pictures: of the pictures
        their sizes, and what they are called."""
        image = image.to(self.device, non_blocking=True)
        with self.autocast():
            outputs = self.trained.net(image, dict.fromkeys(self.tasks))
            mirrored = self.trained.net(image.flip(3), dict.fromkeys(self.tasks)) if self.confidence else None
        files: list[dict[str, Callable[[], bytes]]] = [{} for _ in sizes]
        for size in dict.fromkeys(sizes):
            rows = [row for row, own in enumerate(sizes) if own == size]
            for name, task in self.tasks.items():
                prediction = task.predict(outputs[name], size)
                for row in rows:
                    files[row][task.kind] = partial(task.encode_prediction, copy_to_cpu(prediction[row]))
                if mirrored is not None:
                    contents = task.encode_confidence(outputs[name], mirrored[name], prediction, size)
                    for row in rows:
                        files[row][task.confidence_kind] = partial(bytes, contents[row])
        return files

    @property
    def kinds(self) -> list[str]:
        """The kinds of file that each picture gets."""
        kinds = [task.kind for task in self.tasks.values()]
        return kinds + [task.confidence_kind for task in self.tasks.values()] * self.confidence


class Writer:
    """Writes the files of pictures in the background, each whole or not at all."""

    MOST_WAITING = 32  # pictures

    def __init__(self, out: Path):
        self.out = out
        self.pool = ThreadPoolExecutor(4)
        self.waiting: list[Future] = []

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=error[0] is not None)

    def write(self, picture: Picture, files: Mapping[str, Callable[[], bytes]]) -> None:
        """OSError of this or an earlier picture if the disk is full."""
        self.waiting.append(self.pool.submit(self._write, picture, files))
        while len(self.waiting) > self.MOST_WAITING:
            self.waiting.pop(0).result()

    def finish(self) -> None:
        """Wait for all files."""
        while self.waiting:
            self.waiting.pop(0).result()

    def _write(self, picture: Picture, files: Mapping[str, Callable[[], bytes]]) -> None:
        for kind, encode in files.items():
            write_bytes(picture.find_file(self.out, kind), encode())


@dataclass
class Report:
    """What became of the pictures; `failed`: name and reason."""

    done: int = 0
    skipped: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        failed = [{"frame": name, "reason": reason} for name, reason in sorted(self.failed)]
        write_json(path, {"done": self.done, "skipped": self.skipped, "failed": failed})


def find_finished(out: Path, pictures: Sequence[Picture], kinds: Sequence[str]) -> set[Picture]:
    """The pictures all of whose files are there."""
    frames = {picture.frame: picture for picture in pictures if picture.frame is not None}
    if frames:
        views = {frame.view for frame in frames}
        there = set(frames).intersection(*(list_frames(out, kind, views, empty=False) for kind in kinds))
        return {frames[frame] for frame in there}
    return {picture for picture in pictures if all(has_content(picture.find_file(out, kind)) for kind in kinds)}


def has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def describe(trained: Trained, arguments: argparse.Namespace, source: str) -> dict[str, Any]:
    """The section "predictions" of dataset.json: which weights made them, from what, and what these were trained on."""
    header = trained.header
    return {
        "run": trained.name,
        "weights": trained.digest,
        "step": header.get("step"),
        "recipe": trained.recipe,
        "input_size": list(trained.size),
        "precision": arguments.precision,
        "source": source,
        "tasks": {name: task.options.model_dump(mode="json") for name, task in trained.tasks.items()},
        "label_statistics": {name: task.label_statistics for name, task in trained.tasks.items()},
        "protocol": header.get("protocol", {}),
        "split": header["split"],
        "record": header.get("record"),
    }


def choose_tasks(trained: Trained, names: Sequence[str] | None) -> dict[str, Task]:
    """WrongUseError for a task that the run does not have."""
    if missing := [name for name in names or () if name not in trained.tasks]:
        raise WrongUseError(f"--tasks {missing[0]}: {trained.name} has {', '.join(trained.tasks)}")
    return {name: task for name, task in trained.tasks.items() if names is None or name in names}


def list_frames_to_predict(trained: Trained, arguments: argparse.Namespace) -> tuple[list[Picture], Data]:
    """The frames of the subset in the dataset."""
    try:
        data = load_trained_data(trained, [arguments.data] if arguments.data else None)
    except DatasetError as error:
        raise ValueError(str(error).replace("data.roots", "--data")) from error
    if arguments.split == "all":
        frames: Iterable[Frame] = sorted({*data.others}.union(*data.subsets.values()))
    else:
        frames = data.subsets[arguments.split]
    if not frames:
        raise ValueError(f"no {arguments.split} frames in {', '.join(map(str, data.roots))}")
    kinds = {path: root.image_kind for path, root in data.roots.items()}
    return [Picture(frame.path(kinds[frame.root]), frame=frame) for frame in frames], data


def predict_pictures(
    speaker: Speaker, pictures: Sequence[Picture], own: tuple[int, int] | None, arguments: argparse.Namespace
) -> Report:
    """Write the predictions of all pictures that are not finished."""
    report = Report()
    finished = set() if arguments.overwrite else find_finished(arguments.out, pictures, speaker.kinds)
    left = [picture for picture in pictures if picture not in finished]
    report.skipped = len(pictures) - len(left)
    dataset = Pictures(left, speaker.trained.size, own)
    with (
        Writer(arguments.out) as writer,
        tqdm(total=len(left), desc="predict", unit="frame") as bar,
        closing(load_batches(dataset, arguments.workers, speaker.device, batch_size=arguments.micro_batch)) as batches,
    ):
        for batch in batches:
            for index, reason in batch["failed"]:
                report.failed.append((left[index].name, reason))
                tqdm.write(f"predict: {reason}", file=sys.stderr)
            if batch["indices"]:
                names = [left[index].name for index in batch["indices"]]
                found = speaker.predict(batch["image"], batch["sizes"], names)
                for index, files in zip(batch["indices"], found, strict=True):
                    writer.write(left[index], files)
            report.done += len(batch["indices"])
            bar.set_postfix(failed=len(report.failed), refresh=False)
            bar.update(len(batch["indices"]) + len(batch["failed"]))
        writer.finish()
    return report


def cut(items: Iterator[Any], length: int) -> Iterator[list[Any]]:
    while part := list(islice(items, length)):
        yield part


def predict_video(speaker: Speaker, video: Picture, arguments: argparse.Namespace) -> Report:
    """Write the predictions of all frames of a video that are not finished."""
    report = Report()
    total, _ = describe_video(video.path)
    with Writer(arguments.out) as writer, tqdm(total=total or None, desc=video.path.name, unit="frame") as bar:
        frames = enumerate(read_video(video.path))
        for part in cut(frames, arguments.micro_batch):
            listed = [(Picture(video.path, video.place / f"{number:06d}"), image) for number, image in part]
            done = set()
            if not arguments.overwrite:
                done = find_finished(arguments.out, [picture for picture, _ in listed], speaker.kinds)
            left = [(picture, image) for picture, image in listed if picture not in done]
            if left:
                images = torch.stack([resize(image, speaker.trained.size) for _, image in left])
                sizes = [(image.shape[1], image.shape[0]) for _, image in left]
                names = [picture.name for picture, _ in left]
                for (picture, _), files in zip(left, speaker.predict(images, sizes, names), strict=True):
                    writer.write(picture, files)
            report.done += len(left)
            report.skipped += len(done)
            bar.update(len(part))
        writer.finish()
    read = report.done + report.skipped
    if read + UNSURE_FRAMES < total:
        report.failed.append((video.name, f"{video.path} says it has {total} frames, and only {read} can be read"))
        print(f"predict: {report.failed[-1][1]}", file=sys.stderr)
    return report


def draw_video(speaker: Speaker, video: Picture, arguments: argparse.Namespace) -> str:
    """Write the panels of a video beside its predictions, unless they are there or PyAV is not; returns a line that
    says so."""
    from pictures.panel import Model, Panel, draw_panel, render_figure
    from pictures.video import VideoError, check_video_support, write_video

    path = arguments.out / PANELS / video.place.with_name(f"{video.place.name}.mp4")
    if has_content(path) and not arguments.overwrite:
        return f"panels: {path}"
    try:
        check_video_support()
    except VideoError as error:
        return f"no panels of {video.name}: {error}"
    total, rate = describe_video(video.path)
    tasks = speaker.tasks

    def draw() -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        bar = tqdm(read_video(video.path), "panels", total or None, unit="frame")
        for number, image in enumerate(bar):
            picture, size = Picture(video.path, video.place / f"{number:06d}"), (image.shape[1], image.shape[0])
            predictions = {
                name: task.load_prediction(
                    picture.find_file(arguments.out, task.kind), task.describe_files(), size, size
                )
                for name, task in tasks.items()
            }
            model = Model(speaker.trained.name, tasks, predictions)
            title = f"{video.name}, {number / rate:.2f} s"
            yield render_figure(draw_panel(Panel(title, image, [model], tasks, labels=False), steady=True), VIDEO_WIDTH)

    return f"panels: {write_video(path, draw(), rate)} frames in {path}"


def run(arguments: argparse.Namespace) -> int:
    device = pick_device(arguments.device, "--device")
    trained = load_trained(arguments.run, device)
    tasks = choose_tasks(trained, arguments.tasks)
    trained.net.to(memory_format=torch.channels_last)
    autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=arguments.precision == "bf16")
    speaker = Speaker(trained, tasks, device, autocast, arguments.confidence)
    out, data, own, cameras, videos = arguments.out, None, None, {}, []
    if arguments.images:
        if arguments.split != "all":
            raise WrongUseError("--split is for frames of a dataset, not for --images")
        pictures, videos, others = list_pictures(arguments.images)
        if not pictures and not videos:
            raise ValueError(f"no pictures in {', '.join(map(str, arguments.images))}")
        if others:
            print(f"{others} files that are no pictures are left out")
        if units := describe_units(trained, tasks):
            print(f"note: the camera of these pictures is unknown: {'; '.join(units)}")
        source = str(find_base(arguments.images))
    else:
        pictures, data = list_frames_to_predict(trained, arguments)
        own = data.size
        source = ", ".join(os.path.abspath(root) for root in data.roots)
        cameras = find_common_cameras(data)
    for export in EXPORTS[arguments.format]:
        export.check(tasks)
    kinds = {task.kind: task.describe_files() for task in tasks.values()}
    if arguments.confidence:
        kinds |= {task.confidence_kind: {} for task in tasks.values()}
    header = describe(trained, arguments, source)
    exported = [export.name for exports in EXPORTS.values() for export in exports]
    open_folder(out, own, cameras, kinds, header, arguments.overwrite, [PANELS, *exported])
    sweep_temporary(out)

    index, shards = arguments.shard
    report = predict_pictures(speaker, pictures[index - 1 :: shards], own, arguments)
    for video in videos[index - 1 :: shards]:
        try:
            part = predict_video(speaker, video, arguments)
        except ImageError as error:
            report.failed.append((video.name, str(error)))
            print(f"predict: {error}", file=sys.stderr)
            continue
        report.done, report.skipped = report.done + part.done, report.skipped + part.skipped
        report.failed += part.failed
        print(draw_video(speaker, video, arguments))
    for export in EXPORTS[arguments.format]:
        with lock_folder(out):  # of several shards the last then sees the files of all
            print(export.write(out, tasks, pictures, data))
    path = report_path(out, "predict", arguments.shard)
    report.write(path)
    print(f"predict: {report.done} done, {report.skipped} skipped, {len(report.failed)} failed; report in {path}")
    return PARTLY_FAILED if report.failed else DONE


def find_common_cameras(data: Data) -> dict[str, Any]:
    """The cameras in dataset.json, as far as all datasets have the same."""
    first, *others = (read_json(root / "dataset.json")["cameras"] for root in data.roots)
    return {view: camera for view, camera in first.items() if all(each.get(view) == camera for each in others)}


def find_focal_length(trained: Trained) -> float:
    """Of the dataset that the run was trained on, in widths of the picture; that of A2D2's front camera if the dataset
    is not there."""
    for root in trained.split.roots:
        try:
            dataset = read_dataset(root)
        except (DatasetError, OSError):
            continue
        view = trained.split.views[0]
        if view in dataset.cameras:
            return float(dataset.cameras[view][0, 0] / dataset.size[0])
    return FRONT_MATRIX[0] / FULL_SIZE[0]


def describe_units(trained: Trained, tasks: Mapping[str, Task]) -> list[str]:
    """What the predictions of these tasks mean on pictures of any camera, as far as a user must know it."""
    focal = find_focal_length(trained)
    return [text for task in tasks.values() if (text := task.describe_units(focal))]


def run_program(name: str, work: Callable[[], int]) -> int:
    """The exit code of `work`; an error of the user or the machine is one line."""
    try:
        return work()
    except WrongUseError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return WRONG_USE
    except (OSError, ValueError, WorkerError, RuntimeError, MemoryError) as error:
        known = explain_memory(error) or explain_worker_death(error)
        if known is None and isinstance(error, RuntimeError) and not isinstance(error, WorkerError):
            raise
        # a ValueError is about what was given, and the same command would meet it again
        rest = "" if isinstance(error, ValueError) and not known else "; the same command goes on"
        print(f"{name}: {known or error}{rest}", file=sys.stderr)
        return ERROR


def main(arguments: argparse.Namespace | None = None) -> int:
    arguments = arguments or read_arguments()
    return run_program("predict", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
